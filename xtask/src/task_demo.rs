//! `cargo xtask demo`: load, run, look, end; each step is a command that a person could type.
//!
//! The guest's console is a pipe here: what it says is shown and searched for what has to be seen,
//! and commands are typed into it.

use std::env;
use std::error::Error;
use std::io::{self, IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitCode, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};

use crate::{TaskResult, project, task_guest_image};

/// Load a guest, run it, look into it while it runs, and end it
///
/// Builds what is needed first. Exit status 0 only if the guest reported, vmmctl showed its
/// registers while it ran, and it switched itself off.
#[derive(Debug, Args)]
pub struct Demo {
    /// The guest
    #[arg(long, value_enum, default_value = "probe")]
    profile: Profile,
    /// In the nested lane, where unmodified kernels boot on any machine
    #[arg(long)]
    nested: bool,
    /// Directory of the programs, built before
    #[arg(long, hide = true, requires = "kernel")]
    programs: Option<PathBuf>,
    /// The guest's kernel, made before
    #[arg(long, hide = true, requires = "programs")]
    kernel: Option<PathBuf>,
    /// The guest's initramfs, made before
    #[arg(long, hide = true)]
    initrd: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Profile {
    /// Our own kernel: runs on any KVM
    Probe,
    /// Debian's unmodified kernel
    Linux,
}

impl Profile {
    fn name(self) -> &'static str {
        match self {
            Profile::Probe => "probe",
            Profile::Linux => "linux",
        }
    }

    /// rhyveload's options for this guest.
    fn load_options(self) -> &'static [&'static str] {
        match self {
            // Entered as a FreeBSD kernel is; its Xen note would ask for PVH.
            Profile::Probe => &[
                "-m",
                "64M",
                "--boot",
                "plain",
                "-e",
                "greeting=hello",
                "--cmdline",
                "from rhyve",
            ],
            Profile::Linux => &["-m", "256M", "--cmdline", "console=ttyS0 quiet"],
        }
    }

    /// What the console shows when the guest is up, and then when it waits for a command.
    fn signs(self) -> [&'static str; 2] {
        match self {
            Profile::Probe => ["probe: report done", "probe> "],
            Profile::Linux => ["rhyve-init: up", "# "],
        }
    }

    /// A command to type, and what comes of it.
    fn question(self) -> [&'static str; 2] {
        match self {
            Profile::Probe => ["echo Is anybody there?\r", "\nIs anybody there?"],
            Profile::Linux => ["echo $(nproc) CPUs\r", "\n2 CPUs"],
        }
    }

    /// The command that switches the guest off.
    fn power_off(self) -> &'static str {
        match self {
            Profile::Probe => "poweroff\r",
            Profile::Linux => "poweroff -f\r",
        }
    }
}

/// The VM's name. Its object is where the user's others are, and gone at the end.
const VM: &str = "demo";
/// rhyve's exit status for a guest that switched itself off.
const POWERED_OFF: i32 = 1;
/// How long the guest may take for one answer. The nested lane is slow.
const PATIENCE: Duration = Duration::from_secs(120);

/// What the demonstration is made of.
struct Parts {
    programs: PathBuf,
    kernel: PathBuf,
    initrd: Option<PathBuf>,
}

impl Demo {
    pub fn run(self) -> TaskResult {
        let parts = match (&self.programs, &self.kernel) {
            (Some(programs), Some(kernel)) => Parts {
                programs: programs.clone(),
                kernel: kernel.clone(),
                initrd: self.initrd.clone(),
            },
            _ => make(self.profile)?,
        };
        if self.nested {
            return nested(self.profile, &parts);
        }
        show(self.profile, &parts)?;
        println!("\ndemo: all seen");
        Ok(ExitCode::SUCCESS)
    }
}

fn make(profile: Profile) -> Result<Parts, Box<dyn Error>> {
    let programs = project::build(&["rhyveload", "rhyve", "vmmctl"], false)?;
    let image = task_guest_image::make(profile.name())?;
    Ok(Parts {
        programs,
        kernel: image.path("kernel")?.to_owned(),
        initrd: image.path("initrd").ok().map(Path::to_owned),
    })
}

/// The same with everything made already, in the nested lane.
fn nested(profile: Profile, parts: &Parts) -> TaskResult {
    let xtask = env::current_exe()?;
    let mut command = Command::new(&xtask);
    command.args(["nested", "--"]).arg(&xtask);
    command.args(["demo", "--profile", profile.name()]);
    command.arg("--programs").arg(&parts.programs);
    command.arg("--kernel").arg(&parts.kernel);
    if let Some(initrd) = &parts.initrd {
        command.arg("--initrd").arg(initrd);
    }
    let code = command.status()?.code();
    Ok(ExitCode::from(
        code.and_then(|code| u8::try_from(code).ok()).unwrap_or(1),
    ))
}

fn show(profile: Profile, parts: &Parts) -> Result<(), Box<dyn Error>> {
    let program = |name: &str| Command::new(parts.programs.join(name));

    let mut load = program("rhyveload");
    load.args(profile.load_options());
    load.arg("--kernel").arg(&parts.kernel);
    if let Some(initrd) = &parts.initrd {
        load.arg("--initrd").arg(initrd);
    }
    // A VM of this name that a killed demo left is loaded anew.
    say(load.arg(VM))?;
    let mut guard = Guard {
        destroy: program("vmmctl"),
        armed: true,
    };

    // setpriv: a guest does not outlive an xtask that is killed.
    let mut run = Command::new("setpriv");
    run.args(["--pdeathsig", "KILL", "--"])
        .arg(parts.programs.join("rhyve"))
        .args(["-c", "2", "-l", "com1,stdio", VM]);
    let mut guest = Guest::start(run)?;
    let [up, prompt] = profile.signs();
    guest.expect(up)?;
    if guest.expect(prompt)?.contains("FAILED") {
        return Err("the guest's report tells of a failure".into());
    }

    say(program("vmmctl").arg("--list"))?;
    let registers = say(program("vmmctl").args([&format!("--vm={VM}"), "--cpu=0", "--get-all"]))?;
    for register in ["rip[0]", "rsp[0]", "cr3[0]"] {
        if !registers.contains(register) {
            return Err(format!("vmmctl --get-all shows no {register}").into());
        }
    }

    heading("Typed on the console:");
    let [question, answer] = profile.question();
    guest.type_in(question)?;
    guest.expect(answer)?;
    guest.expect(prompt)?;
    guest.type_in(profile.power_off())?;
    let status = guest.wait()?;
    if status.code() != Some(POWERED_OFF) {
        return Err(format!("rhyve ended with {status}, not with exit status 1").into());
    }
    println!("\nrhyve's exit status: 1, the guest switched itself off");

    guard.armed = false;
    say(program("vmmctl").args([&format!("--vm={VM}"), "--destroy"]))?;
    Ok(())
}

/// Shows a command and what it writes, and returns that; an error if it fails.
fn say(command: &mut Command) -> Result<String, Box<dyn Error>> {
    heading(&format!("$ {}", line(command)));
    let output = command
        .stderr(Stdio::inherit())
        .output()
        .map_err(|error| format!("{}: {error}", command.get_program().display()))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    print!("{text}");
    if !output.status.success() {
        let program = Path::new(command.get_program());
        let name = program.file_name().unwrap_or_default().display();
        return Err(format!("{name} ended with {}", output.status).into());
    }
    Ok(text)
}

fn heading(text: &str) {
    if io::stdout().is_terminal() {
        println!("\n\x1b[1m{text}\x1b[0m");
    } else {
        println!("\n{text}");
    }
}

/// A command as it would be typed in the repository's directory.
fn line(command: &Command) -> String {
    let root = project::root();
    let words = [command.get_program()]
        .into_iter()
        .chain(command.get_args())
        .map(|word| {
            let path = Path::new(word);
            let word = path.strip_prefix(&root).unwrap_or(path).to_string_lossy();
            if word.contains(' ') {
                format!("'{word}'")
            } else {
                word.into_owned()
            }
        });
    words.collect::<Vec<_>>().join(" ")
}

/// Destroys the VM when the demonstration stops half-way.
struct Guard {
    destroy: Command,
    armed: bool,
}

impl Drop for Guard {
    fn drop(&mut self) {
        if self.armed {
            let _ = self
                .destroy
                .args([&format!("--vm={VM}"), "--destroy"])
                .stdout(Stdio::null())
                .status();
        }
    }
}

/// A running rhyve with its console. Dropping it ends it.
struct Guest {
    child: Child,
    input: ChildStdin,
    output: Receiver<Vec<u8>>,
    /// What was read and not yet matched.
    text: String,
}

impl Guest {
    fn start(mut command: Command) -> Result<Self, Box<dyn Error>> {
        heading(&format!("$ {}", line(&command)));
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command
            .spawn()
            .map_err(|error| format!("setpriv (util-linux): {error}"))?;
        let (Some(input), Some(mut console)) = (child.stdin.take(), child.stdout.take()) else {
            return Err("rhyve has no console".into());
        };
        let (sender, output) = mpsc::channel();
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(length @ 1..) = console.read(&mut buffer) {
                if sender.send(buffer[..length].to_vec()).is_err() {
                    break;
                }
            }
        });
        Ok(Self {
            child,
            input,
            output,
            text: String::new(),
        })
    }

    /// Shows the console until `sign` has been seen, and returns what came before it; an error if
    /// that takes too long.
    fn expect(&mut self, sign: &str) -> Result<String, Box<dyn Error>> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(at) = self.text.find(sign) {
                let mut before: String = self.text.drain(..at + sign.len()).collect();
                before.truncate(at);
                return Ok(before);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            match self.output.recv_timeout(left) {
                Ok(piece) => self.text += &shown(&piece)?,
                Err(mpsc::RecvTimeoutError::Timeout) => {
                    let seconds = PATIENCE.as_secs();
                    return Err(format!("the guest did not say {sign:?} in {seconds} s").into());
                }
                Err(mpsc::RecvTimeoutError::Disconnected) => {
                    let status = self.child.wait()?;
                    let sign = sign.trim();
                    return Err(format!("rhyve ended with {status} before {sign:?}").into());
                }
            }
        }
    }

    fn type_in(&mut self, text: &str) -> io::Result<()> {
        self.input.write_all(text.as_bytes())?;
        self.input.flush()
    }

    /// Shows the console until rhyve ends.
    fn wait(&mut self) -> Result<ExitStatus, Box<dyn Error>> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.output.recv_timeout(left) {
                Ok(piece) => drop(shown(&piece)?),
                Err(mpsc::RecvTimeoutError::Disconnected) => return Ok(self.child.wait()?),
                Err(mpsc::RecvTimeoutError::Timeout) => {
                    return Err(format!("rhyve did not end in {} s", PATIENCE.as_secs()).into());
                }
            }
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Shows a piece of the console at once, and returns it as text.
fn shown(piece: &[u8]) -> io::Result<String> {
    let text = String::from_utf8_lossy(piece).into_owned();
    print!("{text}");
    io::stdout().flush()?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guest(script: &str) -> Guest {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        Guest::start(command).unwrap()
    }

    #[test]
    fn signs_are_found_in_order_and_answers_typed() {
        let mut guest = guest("printf 'up\\nname> '; read name; echo \"hello $name\"; exit 1");
        guest.expect("up").unwrap();
        assert_eq!(guest.expect("> ").unwrap(), "\nname");
        guest.type_in("you\n").unwrap();
        guest.expect("hello you").unwrap();
        assert_eq!(guest.wait().unwrap().code(), Some(POWERED_OFF));
    }

    #[test]
    fn a_guest_that_ends_early_is_an_error() {
        let error = guest("echo up; exit 3").expect("report").unwrap_err();
        let text = error.to_string();
        assert!(text.contains("exit status: 3"), "{text}");
        assert!(text.contains("before \"report\""), "{text}");
    }
}
