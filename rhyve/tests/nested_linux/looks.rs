//! What vmmctl reads in Linux's memory is what Linux says of itself.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde_json::Value;
use vmm_api::guest::report::printable;

use super::support::{Place, Process};
use super::{boot, ends, number, shell};

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

#[test]
#[ignore = "nested lane"]
fn what_is_seen_from_outside_is_what_linux_says() {
    let place = Place::new();
    let disk = place.path("told.img");
    File::create(&disk).unwrap().set_len(4 << 20).unwrap();
    let run = format!("-c 2 -s 2,virtio-blk,{}", disk.display());
    let mut guest = boot(&place, "linux/vmlinuz", "-m 256M", "", &run);
    compare_logs(&place, &mut guest, &disk);
    compare_processes(&place, &mut guest, &disk);
    ends(&mut guest, "poweroff -f", 1);
}
