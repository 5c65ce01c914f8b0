//! Processes that are measured: a monitor with its guest's console, and its resident memory.

use std::cmp::Reverse;
use std::error::Error;
use std::ffi::OsString;
use std::fs;
use std::io::{self, Read, Write};
use std::process::{Child, ChildStderr, ChildStdin, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// How long a guest may take. QEMU needs some ten seconds in the nested lane.
const PATIENCE: Duration = Duration::from_secs(120);

/// Runs a command to its end and returns its wall time.
pub fn time(command: &mut Command) -> Result<Duration, Box<dyn Error>> {
    let start = Instant::now();
    let output = command.stdin(Stdio::null()).output()?;
    let spent = start.elapsed();
    if !output.status.success() {
        let program = command.get_program().display();
        let errors = String::from_utf8_lossy(&output.stderr);
        return Err(format!("{program} ended with {}: {}", output.status, errors.trim()).into());
    }
    Ok(spent)
}

/// A running monitor whose standard output is its guest's console. Dropping it kills it.
pub struct Monitor {
    /// What was started, for errors.
    program: OsString,
    child: Child,
    /// Kept open: the end of input may end a console.
    input: Option<ChildStdin>,
    console: Receiver<Vec<u8>>,
    text: Vec<u8>,
    /// How long it went before it last stood still.
    ran: Duration,
    /// Since when it goes, unless it stands still.
    goes_since: Option<Instant>,
}

impl Monitor {
    pub fn start(mut command: Command) -> Result<Self, Box<dyn Error>> {
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let program = command.get_program().to_owned();
        let child = command.spawn();
        let mut child = child.map_err(|error| format!("{}: {error}", program.display()))?;
        let mut output = child.stdout.take().ok_or("a monitor has no output")?;
        let (sender, console) = mpsc::channel();
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(length @ 1..) = output.read(&mut buffer) {
                if sender.send(buffer[..length].to_vec()).is_err() {
                    break;
                }
            }
        });
        Ok(Self {
            program,
            input: child.stdin.take(),
            child,
            console,
            text: Vec::new(),
            ran: Duration::ZERO,
            goes_since: Some(Instant::now()),
        })
    }

    /// Types a line; what the console shows from here on is looked at anew.
    pub fn send(&mut self, line: &str) -> Result<(), Box<dyn Error>> {
        self.text.clear();
        let input = self.input.as_mut().ok_or("a monitor has no input")?;
        input.write_all(format!("{line}\r").as_bytes())?;
        Ok(input.flush()?)
    }

    /// Has it stand still, or go on: what is measured meanwhile has the processors to itself. QEMU's
    /// main thread wakes 250 times a second for its guest's clock, and takes some 7 % of a lane's.
    pub fn stand_still(&mut self, still: bool) -> Result<(), Box<dyn Error>> {
        let signal = if still {
            Signal::SIGSTOP
        } else {
            Signal::SIGCONT
        };
        let pid = Pid::from_raw(self.child.id().try_into()?);
        kill(pid, signal)?;
        self.ran = self.ran();
        self.goes_since = (!still).then(Instant::now);
        Ok(())
    }

    /// How long it has gone since it was started: the time without that in which it stood still.
    pub fn ran(&self) -> Duration {
        self.ran
            + self
                .goes_since
                .map_or(Duration::ZERO, |since| since.elapsed())
    }

    /// Its standard error, if that is a pipe and was not taken yet.
    pub fn errors(&mut self) -> Option<ChildStderr> {
        self.child.stderr.take()
    }

    /// Waits for its end.
    pub fn wait(&mut self) -> Result<(), Box<dyn Error>> {
        let deadline = Instant::now() + PATIENCE;
        while self.child.try_wait()?.is_none() {
            if Instant::now() >= deadline {
                return Err(format!("{}: it does not end", self.program.display()).into());
            }
            thread::sleep(Duration::from_micros(200));
        }
        Ok(())
    }

    /// Waits until the console has shown `sign`.
    pub fn expect(&mut self, sign: &str) -> Result<(), Box<dyn Error>> {
        let deadline = Instant::now() + PATIENCE;
        while !contains(&self.text, sign.as_bytes()) {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.console.recv_timeout(left) {
                Ok(piece) => self.text.extend(piece),
                Err(_) => {
                    let (program, text) =
                        (self.program.display(), String::from_utf8_lossy(&self.text));
                    let never = format!("{program}: the console never showed {sign:?}");
                    return Err(format!("{never}, but {text:?}").into());
                }
            }
        }
        Ok(())
    }

    /// Types a command and waits for `end`, which the command itself must not contain; returns what
    /// the console has shown.
    pub fn ask(&mut self, command: &str, end: &str) -> Result<String, Box<dyn Error>> {
        self.send(command)?;
        self.expect(end)?;
        Ok(String::from_utf8_lossy(&self.text).into_owned())
    }

    /// How long its thread of this name was ready to run, but no processor was free (Linux'
    /// Documentation/scheduler/sched-stats.rst).
    pub fn waited(&self, thread: &str) -> Result<Duration, Box<dyn Error>> {
        for task in fs::read_dir(format!("/proc/{}/task", self.child.id()))? {
            let task = task?.path();
            if fs::read_to_string(task.join("comm"))?.trim() != thread {
                continue;
            }
            let stats = fs::read_to_string(task.join("schedstat"))?;
            let waited = stats.split_whitespace().nth(1);
            let waited = waited.ok_or("the kernel keeps no schedstat")?;
            return Ok(Duration::from_nanos(waited.parse()?));
        }
        Err(format!("there is no thread {thread}").into())
    }

    /// Resident memory in MiB that is not guest RAM: every mapping's pages in full, those of shared
    /// libraries as well, but not those of mappings that `is_ram` recognizes.
    pub fn resident_mib(
        &self,
        is_ram: impl Fn(&Mapping<'_>) -> bool,
    ) -> Result<f64, Box<dyn Error>> {
        let smaps = self.smaps()?;
        let (mut ram, mut rest) = (0, 0);
        for mapping in mappings(&smaps) {
            *(if is_ram(&mapping) {
                &mut ram
            } else {
                &mut rest
            }) += mapping.rss_kib;
        }
        if ram == 0 {
            return Err("the mapping of guest RAM is not found".into());
        }
        Ok(f64::from(rest) / 1024.0)
    }

    /// What is resident, the most of it first, for whoever wonders where it comes from.
    pub fn resident_mappings(&self) -> Result<String, Box<dyn Error>> {
        let smaps = self.smaps()?;
        let mut mappings = mappings(&smaps);
        mappings.retain(|mapping| mapping.rss_kib != 0);
        mappings.sort_by_key(|mapping| Reverse(mapping.rss_kib));
        let lines = mappings.iter().map(|mapping| {
            let Mapping {
                path,
                size_kib,
                rss_kib,
            } = mapping;
            format!("  {rss_kib:8} of {size_kib:8} KiB  {path}\n")
        });
        Ok(lines.collect())
    }

    fn smaps(&self) -> io::Result<String> {
        fs::read_to_string(format!("/proc/{}/smaps", self.child.id()))
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn contains(text: &[u8], sign: &[u8]) -> bool {
    text.windows(sign.len()).any(|window| window == sign)
}

/// A mapping as /proc/PID/smaps has it (proc_pid_smaps(5)).
#[derive(Debug, PartialEq, Eq)]
pub struct Mapping<'a> {
    /// The file, or empty.
    pub path: &'a str,
    pub size_kib: u32,
    pub rss_kib: u32,
}

fn mappings(smaps: &str) -> Vec<Mapping<'_>> {
    let mut mappings: Vec<Mapping<'_>> = Vec::new();
    for line in smaps.lines() {
        let (key, value) = line.split_once(' ').unwrap_or((line, ""));
        let kib = || value.trim().trim_end_matches(" kB").parse().unwrap_or(0);
        match (key, mappings.last_mut()) {
            ("Size:", Some(mapping)) => mapping.size_kib = kib(),
            ("Rss:", Some(mapping)) => mapping.rss_kib = kib(),
            (key, _) if !key.ends_with(':') => {
                // Address, permissions, offset, device, inode; the path is what is left.
                let path = value.splitn(5, ' ').nth(4).unwrap_or("").trim();
                mappings.push(Mapping {
                    path,
                    size_kib: 0,
                    rss_kib: 0,
                });
            }
            _ => {}
        }
    }
    mappings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn smaps_are_read() {
        let smaps = "7f00-7f10 rw-s 00000000 00:1b 36          /dev/shm/a b/mem\n\
                     Size:             262144 kB\nKernelPageSize:        4 kB\n\
                     Rss:               61440 kB\nVmFlags: rd wr sh\n\
                     7f20-7f30 rw-p 00000000 00:00 0 \n\
                     Size:                132 kB\nRss:                  12 kB\n";
        let mapping = |path, size_kib, rss_kib| Mapping {
            path,
            size_kib,
            rss_kib,
        };
        assert_eq!(
            mappings(smaps),
            [
                mapping("/dev/shm/a b/mem", 262_144, 61_440),
                mapping("", 132, 12)
            ]
        );
    }

    #[test]
    fn a_threads_wait_is_read() {
        let mut command = Command::new("sh");
        command.args(["-c", "while :; do :; done"]);
        let monitor = Monitor::start(command).unwrap();
        let deadline = Instant::now() + PATIENCE;
        // Until it has become the shell.
        while monitor.waited("sh").is_err() {
            assert!(Instant::now() < deadline);
        }
        assert!(monitor.waited("sh").unwrap() < PATIENCE);
        assert!(monitor.waited("vcpu-0").is_err());
    }

    #[test]
    fn what_stands_still_goes_on() {
        let mut monitor = Monitor::start(Command::new("cat")).unwrap();
        monitor.ask("one", "one").unwrap();
        monitor.stand_still(true).unwrap();
        let ran = monitor.ran();
        monitor.send("two").unwrap();
        let silent = monitor.console.recv_timeout(Duration::from_millis(100));
        assert!(silent.is_err(), "{silent:?}");
        assert_eq!(monitor.ran(), ran);
        monitor.stand_still(false).unwrap();
        monitor.expect("two").unwrap();
        assert!(monitor.ran() > ran);
    }

    #[test]
    fn a_sign_is_found_across_pieces() {
        let mut command = Command::new("sh");
        command.args([
            "-c",
            "printf 'rhyve-'; sleep 0.05; printf 'init: up'; sleep 60",
        ]);
        let mut monitor = Monitor::start(command).unwrap();
        monitor.expect("rhyve-init: up").unwrap();
        drop(monitor);
        let mut command = Command::new("sh");
        command.args(["-c", "echo something else"]);
        let error = Monitor::start(command).unwrap().expect("up").unwrap_err();
        assert!(error.to_string().contains("something else"), "{error}");
    }
}
