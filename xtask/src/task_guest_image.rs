//! `cargo xtask guest-image`: makes the guests below `target/guest-image/`.

use std::path::PathBuf;
use std::process::{Command, ExitCode};

use clap::Args;

use crate::{TaskResult, project};

/// Make guest images below target/guest-image/ and print their paths
#[derive(Debug, Args)]
pub struct GuestImage {
    /// What to make: a profile of the guest-image program
    #[arg(default_value = "probe")]
    profile: String,
}

impl GuestImage {
    pub fn run(self) -> TaskResult {
        let status = command(&self.profile)?.status()?;
        Ok(ExitCode::from(
            status
                .code()
                .and_then(|code| u8::try_from(code).ok())
                .unwrap_or(1),
        ))
    }
}

/// Where the files of `profile` are.
pub fn out_dir(profile: &str) -> PathBuf {
    project::target_dir().join("guest-image").join(profile)
}

/// Builds the `guest-image` program and returns the command that makes `profile` in [`out_dir`].
pub fn command(profile: &str) -> std::io::Result<Command> {
    let programs = project::build(&["guest-image"], false)?;
    let mut command = Command::new(programs.join("guest-image"));
    command.arg("--out").arg(out_dir(profile)).arg(profile);
    Ok(command)
}
