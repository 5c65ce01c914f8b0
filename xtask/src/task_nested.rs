//! `cargo xtask nested`: runs a command where real KVM is, on any machine.
//!
//! The lane is a Linux host with kvm-amd inside QEMU's software CPU. Its `/` is this machine's, read by
//! 9p, with a layer of memory on top: every program and build output is there under its own path, all of
//! it can be written, and nothing stays but what lies in a `--share`. The command's input and outputs are
//! virtio ports that end in sockets of ours, so its bytes arrive as it wrote them; the kernel's console
//! is a file that is shown when something goes wrong.

use std::env;
use std::error::Error;
use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use clap::Args;

use crate::task_guest_image::Image;
use crate::{TaskResult, task_guest_image};

/// Run a command in the nested lane: real KVM inside QEMU's software CPU
///
/// The exit status is the command's; 124 if it ran out of time, 125 if the lane itself failed. `/` is this
/// machine's, what is written stays only below a --share. HOME, PATH, TERM, LANG, RHYVE_* and RUST_* are
/// passed on, the working directory as well.
#[derive(Clone, Debug, Args)]
pub struct Nested {
    /// CPUs of the lane
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub cpus: u32,
    /// Memory of the lane, as QEMU writes sizes
    #[arg(long, value_name = "SIZE", default_value = "4G")]
    pub mem: String,
    /// Seconds until the lane is stopped
    #[arg(long, value_name = "S", default_value_t = 300)]
    pub timeout: u64,
    /// Parameter of the kvm-amd module, such as npt=0
    #[arg(long = "kvm-amd-param", value_name = "NAME=VALUE")]
    pub kvm_amd_params: Vec<String>,
    /// Directory that the command shares with this machine, writable
    #[arg(long = "share", value_name = "DIR")]
    pub shares: Vec<PathBuf>,
    /// Environment variable to pass on or to set
    #[arg(long = "env", value_name = "NAME[=VALUE]")]
    pub environment: Vec<String>,
    /// Show the lane's kernel console on standard error
    #[arg(long)]
    pub console: bool,
    /// The command and its arguments
    #[arg(required = true, last = true, value_name = "CMD")]
    pub command: Vec<String>,
}

/// How often the lane's processors are woken from outside; lane-init.sh has the reason.
const PULSE: Duration = Duration::from_millis(200);

/// The command did not end in time, as timeout(1) reports it.
const TIMED_OUT: u8 = 124;
/// The lane failed around the command.
const LANE_FAILED: u8 = 125;
/// Lines of the console that are shown with a failure.
const CONSOLE_TAIL: usize = 25;

impl Nested {
    pub fn run(self) -> TaskResult {
        let image = task_guest_image::make("lane")?;
        let mut lane = Lane::start(&self, &image)?;
        let (status, why) = match lane.wait(Duration::from_secs(self.timeout)) {
            Outcome::Exit(status) => return Ok(ExitCode::from(status)),
            Outcome::TimedOut => (
                TIMED_OUT,
                format!("the command did not end within {} s", self.timeout),
            ),
            Outcome::Failed(why) => (LANE_FAILED, why),
        };
        eprintln!(
            "xtask: nested: {why}; the lane's console ends with:\n{}",
            lane.console_tail()
        );
        Ok(ExitCode::from(status))
    }

    /// The shell script that the lane runs: environment, directory, command.
    fn script(&self) -> Result<String, Box<dyn Error>> {
        let mut script = String::from("unset PWD OLDPWD\n");
        let mut export = |name: &str, value: &str| {
            script += &format!("export {name}={}\n", quote(value));
        };
        for (name, value) in env::vars() {
            let wanted = [
                "HOME",
                "PATH",
                "TERM",
                "LANG",
                "USER",
                "LOGNAME",
                "CARGO_MANIFEST_DIR",
            ];
            if wanted.contains(&&*name) || name.starts_with("RHYVE_") || name.starts_with("RUST_") {
                export(&name, &value);
            }
        }
        for entry in &self.environment {
            match entry.split_once('=') {
                Some((name, value)) => export(name, value),
                None => export(
                    entry,
                    &env::var(entry).map_err(|e| format!("--env {entry}: {e}"))?,
                ),
            }
        }
        let directory = env::current_dir()?;
        script += &format!(
            "cd {} || exit {LANE_FAILED}\nexec",
            quote(&directory.to_string_lossy())
        );
        for word in &self.command {
            script += &format!(" {}", quote(word));
        }
        Ok(script + "\n")
    }
}

/// How a lane ended.
enum Outcome {
    Exit(u8),
    TimedOut,
    Failed(String),
}

/// A running lane. Dropping it ends it.
struct Lane {
    qemu: Child,
    /// Sockets, the command, the console; removed at the end.
    files: tempfile::TempDir,
    outputs: Vec<JoinHandle<()>>,
    status: mpsc::Receiver<String>,
}

impl Lane {
    fn start(options: &Nested, image: &Image) -> Result<Self, Box<dyn Error>> {
        // A socket's path is short (108 bytes, unix(7)): not below the build directory.
        let files = tempfile::Builder::new().prefix("rhyve-lane-").tempdir()?;
        let control = files.path().join("control");
        fs::create_dir(&control)?;
        fs::write(control.join("command"), options.script()?)?;
        fs::write(
            control.join("kvm-amd"),
            options.kvm_amd_params.join(" ") + "\n",
        )?;
        let shares = options.shares.iter().map(|share| {
            fs::canonicalize(share).map_err(|error| format!("--share {}: {error}", share.display()))
        });
        let shares = shares.collect::<Result<Vec<_>, _>>()?;
        let lines: String = shares
            .iter()
            .map(|share| format!("{}\n", share.display()))
            .collect();
        fs::write(control.join("shares"), lines)?;

        // setpriv: a lane does not outlive an xtask that is killed.
        let mut qemu = Command::new("setpriv");
        qemu.args(["--pdeathsig", "KILL", "--"])
            .arg(image.path("qemu")?);
        qemu.args(["-accel", "tcg,thread=multi", "-cpu", "EPYC,+svm,+npt"]);
        qemu.args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
        ]);
        qemu.arg("-smp")
            .arg(options.cpus.to_string())
            .arg("-m")
            .arg(&options.mem);
        qemu.arg("-kernel")
            .arg(image.path("kernel")?)
            .arg("-initrd")
            .arg(image.path("initrd")?);
        let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        qemu.arg("-append").arg(command_line(&cpuinfo));
        qemu.arg("-serial").arg(format!(
            "file:{}",
            option_path(&files.path().join("console"))
        ));
        qemu.args(plan9("host", Path::new("/"), true))
            .args(plan9("lane", &control, true));
        for (number, share) in shares.iter().enumerate() {
            qemu.args(plan9(&format!("share{number}"), share, false));
        }
        qemu.args(["-device", "virtio-serial-pci,id=ports"]);
        // The first of a device's ports is kept for a console.
        for cpu in 0..options.cpus {
            qemu.arg("-device").arg(format!(
                "virtio-serial-pci,id=wire{cpu},max_ports=2,vectors=2"
            ));
        }
        let mut listeners = Vec::new();
        let mut port = |name: &str, bus: &str| {
            let socket = files.path().join(name);
            let path = option_path(&socket);
            qemu.arg("-chardev")
                .arg(format!("socket,id={name},path={path}"));
            qemu.arg("-device").arg(format!(
                "virtserialport,bus={bus}.0,chardev={name},name={name}"
            ));
            UnixListener::bind(&socket)
        };
        for name in ["in", "out", "err", "status"] {
            listeners.push(port(name, "ports")?);
        }
        for cpu in 0..options.cpus {
            listeners.push(port(&format!("pulse{cpu}"), &format!("wire{cpu}"))?);
        }
        let errors = fs::File::create(files.path().join("qemu"))?;
        qemu.stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(errors);
        let mut qemu = qemu
            .spawn()
            .map_err(|error| format!("setpriv (util-linux): {error}"))?;

        let mut sockets = Vec::new();
        for listener in listeners {
            match accept(&listener, &mut qemu) {
                Ok(socket) => sockets.push(socket),
                Err(error) => {
                    let text = fs::read_to_string(files.path().join("qemu")).unwrap_or_default();
                    return Err(format!("QEMU: {error}: {}", text.trim()).into());
                }
            }
        }
        let pulses = sockets.split_off(4);
        let [input, output, errors, status]: [UnixStream; 4] =
            sockets.try_into().map_err(|_| "QEMU: a port is missing")?;
        // Never joined: it may wait for a terminal that has nothing to say. It ends with xtask.
        thread::spawn(move || copy(io::stdin().lock(), input));
        for mut pulse in pulses {
            // Ends with QEMU.
            thread::spawn(move || {
                while pulse.write_all(&[0]).is_ok() {
                    thread::sleep(PULSE);
                }
            });
        }
        let (sender, receiver) = mpsc::channel();
        thread::spawn(move || {
            for line in BufReader::new(status).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        if options.console {
            let console = files.path().join("console");
            thread::spawn(move || follow(&console));
        }
        let outputs = vec![
            thread::spawn(move || copy(output, io::stdout())),
            thread::spawn(move || copy(errors, io::stderr())),
        ];
        Ok(Self {
            qemu,
            files,
            outputs,
            status: receiver,
        })
    }

    /// Waits for the command's end, for at most `timeout`, and ends the lane.
    fn wait(&mut self, timeout: Duration) -> Outcome {
        let line = self.status.recv_timeout(timeout);
        let outcome = match line {
            Ok(line) => match line.split_once(' ') {
                Some(("exit", status)) => match status.parse() {
                    Ok(status) => Outcome::Exit(status),
                    Err(_) => Outcome::Failed(format!("the lane reports {line:?}")),
                },
                Some(("fail", why)) => Outcome::Failed(why.to_owned()),
                _ => Outcome::Failed(format!("the lane reports {line:?}")),
            },
            Err(mpsc::RecvTimeoutError::Timeout) => Outcome::TimedOut,
            Err(mpsc::RecvTimeoutError::Disconnected) => {
                Outcome::Failed("the lane stopped before the command ended".to_owned())
            }
        };
        // The lane reports after its outputs are written, so nothing is lost by ending QEMU now; its
        // sockets close, and the copies end when they have read all.
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
        for output in self.outputs.drain(..) {
            let _ = output.join();
        }
        outcome
    }

    /// The last lines of the kernel's console, and what QEMU itself said.
    fn console_tail(&self) -> String {
        let mut tail = String::new();
        for name in ["console", "qemu"] {
            let text = fs::read(self.files.path().join(name)).unwrap_or_default();
            let text = String::from_utf8_lossy(&text);
            // EPYC has features that the software CPU lacks; it says so for each at every start.
            let lines = text
                .lines()
                .filter(|line| !line.contains("TCG doesn't support requested"));
            let lines: Vec<&str> = lines.collect();
            for line in &lines[lines.len().saturating_sub(CONSOLE_TAIL)..] {
                tail += &format!("  {}\n", line.trim_end());
            }
        }
        if tail.is_empty() {
            "  (nothing)\n".to_owned()
        } else {
            tail
        }
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

/// Accepts QEMU's connection, unless QEMU ends before it connects.
fn accept(listener: &UnixListener, qemu: &mut Child) -> io::Result<UnixStream> {
    listener.set_nonblocking(true)?;
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        match listener.accept() {
            Ok((socket, _)) => {
                socket.set_nonblocking(false)?;
                return Ok(socket);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if let Some(status) = qemu.try_wait()? {
                    return Err(io::Error::other(status.to_string()));
                }
                if Instant::now() > deadline {
                    return Err(io::ErrorKind::TimedOut.into());
                }
                thread::sleep(Duration::from_millis(5));
            }
            Err(error) => return Err(error),
        }
    }
}

/// Copies until either side ends. Each piece is passed on at once: the other side may be a person.
fn copy(mut from: impl Read, mut to: impl Write) {
    let mut buffer = [0; 64 * 1024];
    while let Ok(length @ 1..) = from.read(&mut buffer) {
        if to
            .write_all(&buffer[..length])
            .and_then(|()| to.flush())
            .is_err()
        {
            break;
        }
    }
}

/// Shows a file on standard error as it grows.
fn follow(path: &Path) {
    while !path.exists() {
        thread::sleep(Duration::from_millis(50));
    }
    let Ok(mut file) = fs::File::open(path) else {
        return;
    };
    while path.exists() {
        copy(&mut file, io::stderr());
        thread::sleep(Duration::from_millis(50));
    }
}

/// QEMU's options for a directory shared by 9p.
/// The lane's kernel command line.
///
/// QEMU's software processor passes this machine's time stamp counter through. On a busy machine the
/// kernel measures its frequency wrongly, by a factor of almost three once, and keeps the mistake; so
/// it is told what this machine's kernel knows: "bogomips" is twice the frequency in MHz.
fn command_line(cpuinfo: &str) -> String {
    let mut line = String::from("console=ttyS0 quiet panic=-1 mitigations=off tsc=reliable");
    let bogomips = cpuinfo.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        (name.trim() == "bogomips").then(|| value.trim().parse::<f64>().ok())?
    });
    if let Some(bogomips) = bogomips {
        line += &format!(" tsc_early_khz={:.0}", bogomips / 2.0 * 1000.0);
    }
    line
}

fn plan9(tag: &str, path: &Path, read_only: bool) -> [String; 2] {
    let path = option_path(path);
    let access = if read_only { ",readonly=on" } else { "" };
    [
        "-virtfs".to_owned(),
        format!("local,path={path},mount_tag={tag},security_model=none,multidevs=remap{access}"),
    ]
}

/// A path as a value among QEMU's comma-separated options.
fn option_path(path: &Path) -> String {
    path.to_string_lossy().replace(',', ",,")
}

/// A word for the shell.
fn quote(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_reach_the_shell_as_they_are() {
        let words = ["plain", "it's", "a b", "$HOME `x` \\ \"", ""];
        let line = words.map(quote).join(" ");
        let script = format!("printf '%s|' {line}");
        let output = Command::new("sh").arg("-c").arg(script).output().unwrap();
        assert_eq!(
            String::from_utf8_lossy(&output.stdout),
            words.join("|") + "|"
        );
    }

    #[test]
    fn the_lane_is_told_the_time_stamp_counters_frequency() {
        let line = command_line("cpu MHz\t\t: 800.1\nbogomips\t: 5192.24\nflags\t: tsc\n");
        assert!(line.ends_with(" tsc_early_khz=2596120"), "{line}");
        assert!(!command_line("").contains("tsc_early_khz"));
    }

    #[test]
    fn commas_in_paths_are_doubled() {
        let [_, value] = plan9("share0", Path::new("/a,b"), false);
        assert_eq!(
            value,
            "local,path=/a,,b,mount_tag=share0,security_model=none,multidevs=remap"
        );
    }
}
