//! The programs as processes: a place with VMs of its own, and guests whose consoles are typed
//! into. Whatever a test starts ends with it, and whatever it waits for is bounded in time.

use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;
use vmm_api::root::Root;
use vmm_api::state::VmState;
use vmm_api::vm::Vm;

/// How long anything may take: a busy machine's KVM, or one inside a software CPU, is slow.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// The VM of every test: each has a place of its own.
pub const VM: &str = "guest0";

/// A program, which Cargo puts next to rhyve.
pub fn program(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_BIN_EXE_rhyve")).with_file_name(name);
    assert!(
        path.exists(),
        "{} is not built: run `cargo build --workspace`, or `cargo xtask test`",
        path.display()
    );
    path
}

/// Waits until something is so, looking again and again.
pub fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "in vain: {what}");
    }
}

/// A directory for VMs and for the files of a test, gone at its end.
pub struct Place {
    directory: TempDir,
    /// Who the programs run as.
    user: u32,
}

/// A user that may do nothing.
pub const NOBODY: u32 = 65534;

impl Place {
    pub fn new() -> Self {
        Self::below(Path::new("/dev/shm"))
    }

    /// In this directory.
    pub fn below(directory: &Path) -> Self {
        let made = tempfile::Builder::new()
            .prefix("rhyve-test-")
            .tempdir_in(directory);
        Self {
            directory: made.unwrap(),
            user: nix::unistd::getuid().as_raw(),
        }
    }

    /// Has its programs run as a user without privileges, but for the use of KVM and of interfaces
    /// that are its own. That takes root, and a /dev that is the test's alone.
    #[allow(dead_code, reason = "only one of the test programs can")]
    pub fn of_nobody(mut self) -> Self {
        self.user = NOBODY;
        std::os::unix::fs::chown(self.directory.path(), Some(NOBODY), Some(NOBODY)).unwrap();
        // As udev has them.
        for device in ["/dev/kvm", "/dev/net/tun"] {
            let everybody = std::fs::Permissions::from_mode(0o666);
            std::fs::set_permissions(device, everybody).unwrap();
        }
        self
    }

    /// A path for a file of the test.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// A command as it would be typed. Words are separated by blanks; more can be added to it.
    pub fn command(&self, line: &str) -> Command {
        let mut words = line.split_whitespace();
        // setpriv: no process outlives the thread of its test, should that be killed.
        let mut command = Command::new("setpriv");
        if self.user == NOBODY {
            command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]);
        }
        command.args(["--pdeathsig", "KILL", "--"]);
        command.arg(program(words.next().unwrap_or_default()));
        command.args(words).env("RHYVE_ROOT", self.path("root"));
        command
    }

    /// Runs a command to its end.
    pub fn run(&self, line: &str) -> Ended {
        Process::start(self.command(line)).wait()
    }

    /// Runs a command that has to succeed, and returns what it prints.
    pub fn ok(&self, line: &str) -> String {
        let ended = self.run(line);
        assert_eq!(ended.status, Some(0), "{line}: {ended:?}");
        ended.output
    }

    /// Starts rhyve with these options and its first serial port as the process's console.
    pub fn start(&self, options: &str) -> Process {
        Process::start(self.command(&format!("rhyve {options} -l com1,stdio {VM}")))
    }

    /// Bytes that a clone has for itself: pages of its process, and of its file.
    pub fn own_memory(&self, name: &str, clone: &Process) -> u64 {
        let file = std::fs::metadata(self.path("root").join(name).join("mem")).unwrap();
        clone.anonymous_memory() + file.blocks() * 512
    }

    pub fn vm(&self) -> Vm {
        let root = Root::open_at(&self.path("root")).unwrap();
        Vm::open(&root, &VM.parse().unwrap()).unwrap()
    }

    pub fn state(&self) -> VmState {
        self.vm().load_state().unwrap()
    }
}

/// A tmpfs, gone at the end. It takes no memory until it is filled.
pub struct Tmpfs(PathBuf);

impl Tmpfs {
    /// Mounts it at a new directory; `size` is as mount(8) has it. That takes root.
    pub fn mount(at: &Path, size: &str) -> Self {
        std::fs::create_dir(at).unwrap();
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &format!("size={size}"), "none"]);
        assert!(mount.arg(at).status().unwrap().success());
        Self(at.to_owned())
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

/// How a process ended.
#[derive(Debug)]
pub struct Ended {
    /// The exit status; 128 more than its number if a signal ended it, as shells have it.
    pub status: Option<i32>,
    /// What it wrote to standard output that no test was waiting for.
    pub output: String,
    /// The same of standard error.
    pub errors: String,
}

/// A process, its standard input and output being a console. Dropping it kills it.
pub struct Process {
    child: Child,
    pub console: Console,
    pub errors: Console,
}

impl Process {
    pub fn start(mut command: Command) -> Self {
        let (typed, keyboard) = std::io::pipe().unwrap();
        let (screen, shown) = std::io::pipe().unwrap();
        command.stdin(typed).stdout(shown);
        Self::with_console(command, Console::new(screen, keyboard))
    }

    /// Starts a command whose standard input and output are set up already.
    pub fn with_console(mut command: Command, console: Console) -> Self {
        let mut child = command
            .stderr(Stdio::piped())
            .spawn()
            .expect("setpriv of util-linux");
        let mut errors = Console::new(child.stderr.take().unwrap(), std::io::sink());
        let mut console = console;
        for end in [&mut console, &mut errors] {
            end.process = Some(child.id());
        }
        console.errors = Some(errors.heard.clone());
        Self {
            child,
            console,
            errors,
        }
    }

    pub fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.child.id()).unwrap())
    }

    /// Bytes of its memory that are no file's.
    pub fn anonymous_memory(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let kib = status.lines().find_map(|line| {
            let kib = line.strip_prefix("RssAnon:")?.trim().strip_suffix(" kB")?;
            kib.parse::<u64>().ok()
        });
        kib.unwrap() * 1024
    }

    pub fn signal(&self, signal: Signal) {
        kill(self.pid(), signal).unwrap();
    }

    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Waits for its end.
    pub fn wait(&mut self) -> Ended {
        let status = self.exit_status();
        Ended {
            status: status.code().or(status.signal().map(|signal| 128 + signal)),
            output: self.console.rest(),
            errors: self.errors.rest(),
        }
    }

    /// Waits for its end, but not for that of its console.
    pub fn exit_status(&mut self) -> ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            if Instant::now() > deadline {
                let (console, errors) = (self.console.tail(), self.errors.tail());
                panic!("it does not end; its console ends with:\n{console}\nerrors:\n{errors}");
            }
            thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What each thread of a process is at (proc_pid_stat(5)) and waits for in the kernel
/// (proc_pid_stack(5), which takes root): whether a guest that says nothing more is at fault, or
/// rhyve, or what both run on.
fn threads(process: u32) -> String {
    let threads = std::fs::read_dir(format!("/proc/{process}/task"));
    let threads = threads.into_iter().flatten().flatten().map(|thread| {
        let read = |what| std::fs::read_to_string(thread.path().join(what)).unwrap_or_default();
        read("stat") + &read("stack")
    });
    threads.collect::<Vec<_>>().join("\n")
}

/// Both directions of a console.
pub struct Console {
    /// Whose it is.
    process: Option<u32>,
    /// What that process writes to standard error.
    errors: Option<Arc<Heard>>,
    heard: Arc<Heard>,
    /// How much of it was looked at.
    seen: usize,
    input: Box<dyn Write + Send>,
}

/// What came so far.
#[derive(Default)]
struct Heard {
    text: Mutex<Text>,
    more: Condvar,
}

#[derive(Default)]
struct Text {
    bytes: Vec<u8>,
    ended: bool,
}

impl Console {
    pub fn new(mut output: impl Read + Send + 'static, input: impl Write + Send + 'static) -> Self {
        let heard = Arc::<Heard>::default();
        let console = Self {
            process: None,
            errors: None,
            heard: heard.clone(),
            seen: 0,
            input: Box::new(input),
        };
        // It ends with the process, at the latest.
        thread::spawn(move || {
            let mut piece = [0; 4096];
            loop {
                let length = output.read(&mut piece).unwrap_or(0);
                let mut text = heard.text.lock().unwrap();
                text.bytes.extend_from_slice(&piece[..length]);
                text.ended = length == 0;
                heard.more.notify_all();
                if text.ended {
                    break;
                }
            }
        });
        console
    }

    /// Waits for `sign`, and returns what came before it.
    pub fn expect(&mut self, sign: &str) -> String {
        match self.find(sign, PATIENCE) {
            Some(before) => before,
            None => panic!("{sign:?} does not come; {}", self.circumstances()),
        }
    }

    /// Waits for `sign` this long at most; what came before it.
    pub fn find(&mut self, sign: &str, patience: Duration) -> Option<String> {
        let deadline = Instant::now() + patience;
        let mut text = self.heard.text.lock().unwrap();
        loop {
            let new = &text.bytes[self.seen..];
            let mut pieces = new.windows(sign.len());
            if let Some(at) = pieces.position(|piece| piece == sign.as_bytes()) {
                let before = String::from_utf8_lossy(&new[..at]).into_owned();
                self.seen += at + sign.len();
                return Some(before);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if text.ended || left.is_zero() {
                return None;
            }
            text = self.heard.more.wait_timeout(text, left).unwrap().0;
        }
    }

    /// Types a line.
    pub fn send(&mut self, line: &str) {
        self.input
            .write_all(format!("{line}\r").as_bytes())
            .unwrap();
        self.input.flush().unwrap();
    }

    /// All that still comes until its end.
    fn rest(&mut self) -> String {
        let deadline = Instant::now() + PATIENCE;
        let heard = self.heard.clone();
        let mut text = heard.text.lock().unwrap();
        while !text.ended {
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(
                !left.is_zero(),
                "the process has ended, its console has not"
            );
            text = heard.more.wait_timeout(text, left).unwrap().0;
        }
        let rest = String::from_utf8_lossy(&text.bytes[self.seen..]).into_owned();
        self.seen = text.bytes.len();
        rest
    }

    /// What there is to say when something is in vain: what came, whether more can come, and what
    /// its process is at, looked at twice: does it run, or run in circles?
    pub fn circumstances(&self) -> String {
        const BETWEEN: Duration = Duration::from_secs(1);
        let ended = self.heard.text.lock().unwrap().ended;
        let first = self.process.map(threads).unwrap_or_default();
        thread::sleep(BETWEEN);
        let then = self.process.map(threads).unwrap_or_default();
        let errors = self.errors.as_deref().map(Heard::tail).unwrap_or_default();
        let reports = errors.lines().filter_map(|line| line.split_once("; see "));
        let reports = reports.map(|(_, path)| std::fs::read_to_string(path).unwrap_or_default());
        format!(
            "the console {} with:\n{}\nerrors:\n{errors}\n{}\nthreads:\n{first}\n{BETWEEN:?} later:\n{then}",
            if ended { "ended" } else { "is open, and ends" },
            self.tail(),
            reports.collect::<String>(),
        )
    }

    fn tail(&self) -> String {
        self.heard.tail()
    }
}

impl Heard {
    /// The last lines.
    fn tail(&self) -> String {
        let text = self.text.lock().unwrap();
        let text = String::from_utf8_lossy(&text.bytes).replace('\r', "");
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(25)..].join("\n")
    }
}
