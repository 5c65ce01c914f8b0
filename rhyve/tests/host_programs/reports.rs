//! The probe kernel's report of what it was given, and its prompt.

use crate::guests::{ask, load, probe, start_probe};
use crate::support::Place;

/// The report's lines that are not as they should be.
fn faults(report: &str) -> Vec<&str> {
    report
        .lines()
        .filter(|line| line.contains("FAILED"))
        .collect()
}

#[test]
fn nothing_fails_on_one_two_and_four_cpus() {
    let place = Place::new();
    for cpus in [1, 2, 4] {
        let (_guest, report) = start_probe(&place, &format!("-c {cpus}"));
        assert_eq!(faults(&report), [""; 0], "{report}");
        assert!(report.contains("probe: report done\r\n"), "{report}");
        let tables = format!(" cpus {cpus} ok");
        assert!(
            report.contains(&format!("entries {}{tables}", 20 + cpus)),
            "{report}"
        );
        assert!(
            report.contains(&format!("probe: madt cpus {cpus} ")),
            "{report}"
        );
        let last = match cpus {
            1 => "probe: one cpu".to_owned(),
            _ => format!("probe: cpu{0} apic {0} up ok", cpus - 1),
        };
        assert!(report.contains(&last), "{report}");
    }
}

#[test]
fn what_the_loader_was_told_arrives() {
    let place = Place::new();
    let options = "-m 64M --boot plain -e greeting=hello -e x=y --cmdline terse";
    load(&place, options, &probe(&place));
    let mut guest = place.start("");
    let report = guest.console.expect("probe> ");
    for line in [
        "probe: entry metadata ",
        "probe: entry cs 0x8 ds 0x10 es 0x10 fs 0x10 gs 0x10 ss 0x10 tr 0x0 ldtr 0x0\r\n",
        "probe: entry gdtr 0x5000/0x17 ",
        "probe: environment greeting=hello",
        "probe: environment x=y",
        "probe: environment cmdline=terse",
    ] {
        assert!(report.contains(line), "{line}: {report}");
    }
    assert_eq!(faults(&report), [""; 0], "{report}");
}

#[test]
fn pvh_and_highmem_are_there() {
    let place = Place::new();
    let options = "-m 32M -M 8M --boot pvh --cmdline terse";
    load(&place, options, &probe(&place));
    let report = place.start("").console.expect("probe> ");
    for line in [
        "probe: entry pvh ",
        "probe: entry cr0 0x11 cr3 0x0 ",
        "probe: memory 0x100000-0x1ffffff ram ok\r\n",
        "probe: memory 0x100000000-0x1007fffff ram ok\r\n",
        "probe: command line \"terse\"\r\n",
    ] {
        assert!(report.contains(line), "{line}: {report}");
    }
}

#[test]
fn commands_are_answered() {
    let place = Place::new();
    let (mut guest, _) = start_probe(&place, "-c 2");
    assert_eq!(
        ask(&mut guest, "echo Is anybody there?"),
        "Is anybody there?\r\n"
    );
    assert!(ask(&mut guest, "mem").contains("probe: memory 0x100000-0x3ffffff ram"));
    // The first bytes of the ELF file are not loaded, but what is at its entry is what is there.
    assert!(ask(&mut guest, "mem 0x200000 16").starts_with("0x200000: 0x"));
    assert!(
        ask(&mut guest, "cpuid 0x40000000").contains("ebx 0x4b4d564b"),
        "KVMK"
    );
    assert!(ask(&mut guest, "nonsense").contains("no command nonsense"));
}

#[test]
fn the_time_is_right() {
    let place = Place::new();
    let (mut guest, _) = start_probe(&place, "-u");
    let now = |at: i64| {
        let time = nix::time::clock_gettime(nix::time::ClockId::CLOCK_REALTIME).unwrap();
        let seconds = time.tv_sec() + at;
        format!(
            "{:02}:{:02}:{:02}",
            seconds / 3600 % 24,
            seconds / 60 % 60,
            seconds % 60
        )
    };
    let early = now(-2);
    let answer = ask(&mut guest, "time");
    let (_, shown) = answer
        .trim_end()
        .trim_end_matches(" ok")
        .rsplit_once(' ')
        .unwrap();
    let late = now(2);
    let within = if early < late {
        early.as_str() <= shown && shown <= late.as_str()
    } else {
        // Midnight.
        early.as_str() <= shown || shown <= late.as_str()
    };
    assert!(within, "{early} <= {shown} <= {late}: {answer}");
}

#[test]
fn cpus_are_arranged_as_told() {
    let place = Place::new();
    for (option, topology) in [
        ("4", "logical 1 thread shift 0 cpus 1 core shift 0 cpus 1"),
        (
            "cpus=4,sockets=2,cores=2",
            "logical 2 thread shift 0 cpus 1 core shift 1 cpus 2",
        ),
        (
            "2,threads=2",
            "logical 2 thread shift 1 cpus 2 core shift 1 cpus 2",
        ),
        (
            "sockets=1,cores=2,threads=2",
            "logical 4 thread shift 1 cpus 2 core shift 2 cpus 4",
        ),
    ] {
        let (_guest, report) = start_probe(&place, &format!("-c {option}"));
        let line = format!("topology apic id 0 {topology}");
        assert!(report.contains(&line), "-c {option}: {line}: {report}");
        assert!(report.contains(" up ok"), "{report}");
    }
}

#[test]
fn the_local_apics_mode_is_as_told() {
    let place = Place::new();
    for (option, mode) in [("-a", " xapic "), ("-x", " x2apic ")] {
        let (_guest, report) = start_probe(&place, &format!("-c 2 {option}"));
        assert!(report.contains(&format!("probe: lapic{mode}")), "{report}");
        let offered = report.contains("apic x2apic tsc");
        assert_eq!(offered, option == "-x", "{report}");
        assert!(report.contains("probe: cpu1 apic 1 up ok"), "{report}");
    }
}
