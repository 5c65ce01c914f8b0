//! What vmmctl reads in Linux's memory is what Linux says of itself, while it lives and after its panic.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use serde_json::Value;
use vmm_api::guest::report::printable;

use super::support::{Place, Process};
use super::{boot, ends, number};

/// A process as ps shows it.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    parent: u64,
    state: String,
    command: String,
}

/// What a command prints in the guest, by way of its disk: the console is slow, and adds to it.
fn told(guest: &mut Process, disk: &Path, command: &str) -> String {
    let write = "wc -c </tmp/told; dd if=/tmp/told of=/dev/vda bs=64k conv=fsync 2>/dev/null";
    let len = number(guest, &format!("{command} >/tmp/told; {write}"));
    let mut bytes = vec![0; len as usize];
    let disk = File::open(disk).unwrap();
    disk.read_exact_at(&mut bytes, 0).unwrap();
    String::from_utf8(bytes).unwrap()
}

fn look(place: &Place, options: &str) -> String {
    place.ok(&format!("vmmctl --vm=guest0 {options}"))
}

fn json(place: &Place, options: &str) -> Value {
    serde_json::from_str(&look(place, &format!("--json {options}"))).unwrap()
}

/// The guest's own log comes first, line for line; what came since is behind it.
fn compare_logs(place: &Place, guest: &mut Process, disk: &Path) {
    let said = told(guest, disk, "dmesg");
    let seen = look(place, "--dmesg");
    let mut seen = seen.lines();
    for line in said.lines() {
        assert_eq!(seen.next(), Some(&*printable(line)));
    }
    assert!(said.lines().count() > 150, "{said}");
    let since: Vec<_> = seen.collect();
    assert!(since.len() < 10, "{since:#?}");
}

fn processes(place: &Place) -> HashMap<u64, Seen> {
    let all = json(place, "--ps");
    let all = all["ps"].as_array().unwrap().iter();
    let seen = all.map(|process| {
        let text = |name: &str| process[name].as_str().unwrap().to_owned();
        let number = |name: &str| process[name].as_u64().unwrap();
        let mut command = text("command");
        // busybox has 15 bytes of a name.
        if command == format!("[{}]", text("name")) {
            command = format!("[{:.15}]", text("name"));
        }
        let seen = Seen {
            parent: number("parent"),
            state: text("state"),
            command,
        };
        (number("id"), seen)
    });
    seen.collect()
}

/// What does not change while its thread works at one thing and then at another.
fn lasting(command: &str) -> &str {
    let worker = command.strip_prefix("[kworker/");
    let end = worker.and_then(|rest| rest.find(['+', '-']));
    end.map_or(command, |end| &command[..end + "[kworker/".len()])
}

/// Whatever is there before and after the guest's own ps is in it, and what is in it was there.
fn compare_processes(place: &Place, guest: &mut Process, disk: &Path) {
    let before = processes(place);
    let said = told(guest, disk, "ps -o pid,ppid,stat,args");
    let after = processes(place);
    let mut listed = HashMap::new();
    for line in said.lines().skip(1) {
        let mut words = line.split_whitespace();
        let mut number = || words.next().unwrap().parse::<u64>().unwrap();
        let (id, parent) = (number(), number());
        let state = words.next().unwrap()[..1].to_owned();
        // busybox puts a name in front that is not the command's.
        let named = |word: &&str| word.starts_with('{') && word.ends_with('}');
        let command = words.skip_while(named).collect::<Vec<_>>().join(" ");
        listed.insert(id, (parent, state, command));
    }
    let (mut workers, mut passing) = (0, Vec::new());
    for (id, (parent, state, command)) in &listed {
        let moments = [before.get(id), after.get(id)];
        let moments: Vec<_> = moments.into_iter().flatten().collect();
        if moments.is_empty() {
            passing.push(command);
            continue;
        }
        let is =
            |seen: &&&Seen| (seen.parent == *parent) && lasting(&seen.command) == lasting(command);
        let fitting: Vec<_> = moments.iter().filter(is).collect();
        assert!(!fitting.is_empty(), "{id} {parent} {command}: {moments:?}");
        // It ran for a moment, or it worked at something.
        let state = state == "R" || fitting.iter().any(|seen| seen.state == *state);
        assert!(
            state || command.starts_with("[kworker"),
            "{id} {command}: {moments:?}"
        );
        let exact = fitting.iter().any(|seen| seen.command == *command);
        workers += u32::from(exact && lasting(command) != command);
    }
    // ps itself, which is the shell's child and begins as it.
    assert!(passing.len() <= 1, "{passing:?}");
    assert!(workers > 0, "what workers work at: {said}");
    for (id, seen) in &before {
        let stays = after
            .get(id)
            .is_some_and(|later| later.parent == seen.parent);
        assert!(!stays || listed.contains_key(id), "{id} {seen:?}: {said}");
    }
    assert_eq!(after[&1].command, "/bin/sh /init");
    assert!(after.len() > 30, "{after:?}");
}

/// The functions on a vCPU's stack, the innermost first.
fn functions(stack: &Value) -> Vec<String> {
    let frames = stack.as_array().unwrap().iter();
    let name = |frame: &Value| {
        assert_eq!(frame["certain"], true, "{frame}");
        frame["name"].as_str().unwrap_or_default().to_owned()
    };
    frames.map(name).collect()
}

/// Has a command typed that comes by a function, and stops the guest there; the stacks of the vCPU that
/// does and of the other. The guest is held.
fn stop_at(place: &Place, guest: &mut Process, command: &str, function: &str) -> [Vec<String>; 2] {
    look(place, "--pause");
    guest.console.send(&format!("{command}; echo done$((6*7))"));
    let stopped = json(place, &format!("--until={function} --bt"));
    let vcpu = stopped["until"]["vcpu"].as_u64().unwrap() as usize;
    [vcpu, 1 - vcpu].map(|vcpu| functions(&stopped["bt"][vcpu]))
}

fn go_on(place: &Place, guest: &mut Process) {
    look(place, "--resume");
    guest.console.expect("done42\r\n");
    guest.console.expect("# ");
}

/// The functions of the guest's own trace, as far as it is sure: `name+0x12/0x34 [module]`.
fn trace(log: &str) -> Vec<String> {
    let lines = log
        .lines()
        .skip_while(|line| !line.ends_with("] Call Trace:"));
    let lines = lines.take_while(|line| !line.ends_with("</TASK>"));
    let frames = lines.filter_map(|line| {
        let (_, function) = line.split_once("]  ")?;
        let (name, rest) = function.split_once('/')?;
        let module = rest.split_once(' ').map(|(_, module)| format!(" {module}"));
        (!name.starts_with('?')).then(|| format!("{name}{}", module.unwrap_or_default()))
    });
    frames.collect()
}

/// A vCPU that asks for a trace is where its trace says.
fn compare_traces(place: &Place, guest: &mut Process, disk: &Path) {
    let ask = "echo l >/proc/sysrq-trigger";
    let [stack, other] = stop_at(place, guest, ask, "sysrq_handle_showallcpus");
    go_on(place, guest);
    let log = told(guest, disk, "dmesg | sed -n '/Show backtrace of all/,$p'");
    assert_eq!(stack[0], "sysrq_handle_showallcpus+0x0");
    let trace = trace(&log);
    let caller = trace.iter().position(|name| *name == stack[1]);
    let caller = caller.unwrap_or_else(|| panic!("{stack:#?} {log}"));
    assert!(caller > 0, "{log}");
    assert_eq!(stack[1..], trace[caller..], "{log}");
    let names = stack.join(" ");
    for name in ["write_sysrq_trigger+", "vfs_write+", "entry_SYSCALL_64"] {
        assert!(names.contains(name), "{names}");
    }
    // Whatever the other one does at that moment, its stack is known to the end.
    assert!(!other.is_empty());
}

/// Functions of a module have names, and its callers are found.
fn name_modules(place: &Place, guest: &mut Process) {
    let write = "dd if=/dev/zero of=/dev/vda bs=4k count=1 oflag=direct 2>/dev/null";
    let [stack, _] = stop_at(place, guest, write, "virtio_queue_rq");
    go_on(place, guest);
    assert_eq!(stack[0], "virtio_queue_rq+0x0 [virtio_blk]");
    // The writer itself has it sent, or has a worker do it.
    assert!(stack[1].contains("blk_mq_"), "{stack:#?}");
    let outermost = stack.last().unwrap();
    let known = ["entry_SYSCALL_64_after_hwframe+", "ret_from_fork+"];
    assert!(
        known.iter().any(|name| outermost.starts_with(name)),
        "{stack:#?}"
    );
}

/// gdb opens the core: its threads are the vCPUs, with their registers, and memory is where the
/// guest has it.
fn compare_with_gdb(place: &Place) {
    let core = place.path("core");
    look(place, &format!("--core {}", core.display()));
    let mut gdb = Command::new("gdb");
    gdb.args(["-q", "-nx", "-batch"]);
    let open = format!("core-file {}", core.display());
    let mut commands = vec![open, "info threads".into()];
    for vcpu in 0..2 {
        commands.push(format!("thread {}", vcpu + 1));
        commands.push("info registers".into());
        commands.push("x/8xg $rsp".into());
        commands.push(format!("echo end of vcpu{vcpu}\\n"));
    }
    gdb.args(commands.iter().flat_map(|command| ["-ex", command]));
    let output = gdb.output().expect("gdb: apt-get install gdb");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{output:?}");
    let mut rest = said.as_str();
    for vcpu in 0..2 {
        let (block, after) = rest
            .split_once(&format!("end of vcpu{vcpu}\n"))
            .unwrap_or_else(|| panic!("{said}"));
        rest = after;
        let all = look(place, &format!("--cpu={vcpu} --get-all"));
        let ours = |name: &str| {
            let value = all
                .lines()
                .find_map(|line| line.strip_prefix(&format!("{name}[{vcpu}]\t0x")));
            u64::from_str_radix(value.unwrap_or_else(|| panic!("{name}: {all}")), 16).unwrap()
        };
        let theirs = |name: &str| {
            let mut lines = block.lines().map(str::split_whitespace);
            let mut words = lines
                .find_map(|mut words| (words.next() == Some(name)).then_some(words))
                .unwrap_or_else(|| panic!("{name}: {said}"));
            let value = words.next().and_then(|value| value.strip_prefix("0x"));
            u64::from_str_radix(value.unwrap_or_else(|| panic!("{name}: {said}")), 16).unwrap()
        };
        for name in [
            "rip", "rsp", "rbp", "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "r8", "r9", "r10",
            "r11", "r12", "r13", "r14", "r15", "cs", "ss",
        ] {
            assert_eq!(theirs(name), ours(name), "{name} of vCPU {vcpu}: {said}");
        }
        assert_eq!(theirs("eflags"), ours("rflags"), "{said}");
        let stack = look(place, &format!("--cpu={vcpu} --x/8xg {:#x}", ours("rsp")));
        assert!(block.contains(&stack), "{stack}, gdb: {block}");
    }
}

#[test]
#[ignore = "nested lane"]
fn what_is_seen_from_outside_is_what_linux_says() {
    let place = Place::new();
    let disk = place.path("told.img");
    File::create(&disk).unwrap().set_len(4 << 20).unwrap();
    let run = format!("-c 2 -s 2,virtio-blk,{}", disk.display());
    let mut guest = boot(&place, "linux/vmlinuz", "-m 256M", "panic=-1", &run);
    compare_logs(&place, &mut guest, &disk);
    compare_processes(&place, &mut guest, &disk);
    compare_traces(&place, &mut guest, &disk);
    name_modules(&place, &mut guest);

    let ended = ends(&mut guest, "echo c >/proc/sysrq-trigger", 0);
    let report = place.path("root/guest0/report.txt");
    let told = format!("rhyve: guest0: reset; see {}", report.display());
    assert!(ended.errors.contains(&told), "{ended:?}");
    let report = std::fs::read_to_string(&report).unwrap();
    let shown = look(&place, "--panic");
    for text in [&report, &shown] {
        let mut lines = text.lines().skip(1);
        assert_eq!(lines.next(), Some("panic: sysrq triggered crash"), "{text}");
        let function = lines.next().unwrap_or_default();
        assert!(function.starts_with("in: sysrq_handle_crash+0x"), "{text}");
    }
    let body = |text: &str| text.split_once('\n').map(|(_, body)| body.to_owned());
    assert_eq!(body(&report), body(&shown));
    assert!(shown.contains("Kernel panic - not syncing: sysrq triggered crash"));

    // What is known without the kernel's names and types is known of its log.
    let log = look(&place, "--dmesg");
    let map = place.path("System.map");
    std::fs::write(&map, "ffffffff80000000 T nothing\n").unwrap();
    let nameless = look(&place, &format!("--dmesg --symbols {}", map.display()));
    assert_eq!(nameless, log);
    compare_with_gdb(&place);
}
