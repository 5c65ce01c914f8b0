//! `cargo xtask guest-image`: makes the guests below `target/guest/`.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use clap::Args;
use serde::Deserialize;

use crate::{TaskResult, project};

/// Make a guest image below target/guest/ and print the paths of its files
#[derive(Debug, Args)]
pub struct GuestImage {
    /// What to make: probe, freebsd-probe, freebsd, linux, lane or tools (see `guest-image --help`)
    #[arg(default_value = "probe")]
    profile: String,
    /// Make a root disk as well (linux)
    #[arg(long)]
    disk: bool,
    /// The same, and a qcow2 image over it, which takes what the guest writes (linux)
    #[arg(long)]
    qcow2: bool,
    /// Directory with FreeBSD's base.txz and kernel.txz, or with a boot/ (freebsd)
    #[arg(long, value_name = "DIR")]
    dist: Option<PathBuf>,
    /// Where the guest's console is: serial or bvm (freebsd)
    #[arg(long, value_name = "CONSOLE")]
    console: Option<String>,
    /// Print what was made as one JSON object
    #[arg(long)]
    json: bool,
}

impl GuestImage {
    pub fn run(self) -> TaskResult {
        let mut command = command(&self.profile)?;
        if self.disk {
            command.arg("--disk");
        }
        if self.qcow2 {
            command.arg("--qcow2");
        }
        if let Some(dist) = &self.dist {
            command.arg("--dist").arg(dist);
        }
        if let Some(console) = &self.console {
            command.args(["--console", console]);
        }
        if self.json {
            command.arg("--json");
        }
        let status = command.status()?;
        Ok(ExitCode::from(
            status
                .code()
                .and_then(|code| u8::try_from(code).ok())
                .unwrap_or(1),
        ))
    }
}

/// What `guest-image --json` reports.
#[derive(Clone, Debug, Deserialize)]
pub struct Image {
    files: Vec<File>,
}

#[derive(Clone, Debug, Deserialize)]
struct File {
    role: String,
    path: PathBuf,
}

impl Image {
    /// The file of a role, such as `kernel`.
    pub fn path(&self, role: &str) -> Result<&Path, String> {
        let file = self.files.iter().find(|file| file.role == role);
        file.map(|file| file.path.as_path())
            .ok_or_else(|| format!("the image has no {role}"))
    }
}

/// Makes the image `profile` and returns what it consists of.
pub fn make(profile: &str) -> Result<Image, Box<dyn Error>> {
    make_with(profile, &[])
}

/// Makes the image of Debian's kernel with a root disk.
pub fn make_linux_disk() -> Result<Image, Box<dyn Error>> {
    make_with("linux", &["--disk"])
}

fn make_with(profile: &str, options: &[&str]) -> Result<Image, Box<dyn Error>> {
    let output = command(profile)?
        .arg("--json")
        .args(options)
        .stderr(Stdio::inherit())
        .output()?;
    if !output.status.success() {
        return Err(format!("guest-image {profile} failed").into());
    }
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// Builds the `guest-image` program and returns the command that makes `profile`.
fn command(profile: &str) -> std::io::Result<Command> {
    let programs = project::build(&["guest-image"], false)?;
    let target = project::target_dir();
    let mut command = Command::new(programs.join("guest-image"));
    command.arg("--out").arg(target.join("guest").join(profile));
    // Beside the guests, which can be removed without fetching the packages again.
    command
        .arg("--cache")
        .arg(target.join("guest-image/debian"))
        .arg(profile);
    Ok(command)
}
