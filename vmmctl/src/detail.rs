//! Changes and shows what a vCPU and its machine have beyond registers, in bhyvectl's words.

use serde_json::{Map, Value, json};
use vmm_api::control::RtcState;
use vmm_api::inspect::{CAPABILITIES, IntInfo, MachineDetail, Region, RegionKind, VcpuDetail};
use vmm_api::memory::MemoryLayout;
use vmm_api::pagewalk;

use crate::cli::{Sets, Show, Work};
use crate::error::Error;
use crate::output::{Output, hex};
use crate::target::VcpuAccess;

/// Makes the changes, up to the first failure.
///
/// # Errors
///
/// One of them is refused.
pub fn set(access: &mut dyn VcpuAccess, work: &Work, output: &mut Output) -> Result<(), Error> {
    let Sets {
        pinning,
        x2apic,
        capability,
        rtc_nvram,
        rtc_time,
    } = &work.sets;
    if let Some(cpus) = pinning {
        access.pin(work.cpu, cpus)?;
        output.done("set-pinning");
    }
    if let Some(on) = *x2apic {
        access.set_x2apic(work.cpu, on)?;
        output.done("set-x2apic-state");
    }
    if let Some((name, wanted)) = capability {
        let detail = access.vcpu_detail(work.cpu)?;
        let is = detail.capabilities.get(name).copied();
        if is != Some(*wanted) {
            access.live()?;
            return Err(Error::Capability {
                vm: work.vm.clone(),
                name: name.clone(),
                is,
            });
        }
        output.done("setcap");
    }
    if let Some((offset, value)) = *rtc_nvram {
        access.set_rtc_nvram(offset, value)?;
        output.done("set-rtc-nvram");
    }
    if let Some(seconds) = *rtc_time {
        access.set_rtc_time(seconds)?;
        output.done("set-rtc-time");
    }
    Ok(())
}

/// Shows segments and map of memory, which come before the registers.
///
/// # Errors
///
/// The VM cannot be asked.
pub fn memory(access: &mut dyn VcpuAccess, work: &Work, output: &mut Output) -> Result<(), Error> {
    let shows = &work.gets.details.shows;
    if shows.contains(&Show::Memseg) {
        memseg(access.memory()?, output);
    }
    if shows.contains(&Show::Memmap) {
        memmap(&access.machine_detail()?.memory_map.0, output);
    }
    Ok(())
}

/// Shows the rest, which comes after the registers.
///
/// # Errors
///
/// The VM cannot be asked, or something is not known of it.
pub fn show(access: &mut dyn VcpuAccess, work: &Work, output: &mut Output) -> Result<(), Error> {
    let asked = &work.gets.details;
    let (mut vcpu, mut machine, mut rtc) = (None, None, None);
    for &show in &asked.shows {
        match show {
            Show::Memseg | Show::Memmap => {}
            Show::RtcTime => {
                nvram(asked.rtc_nvram, &mut rtc, access, output)?;
                rtc_time(once(&mut rtc, || access.rtc())?, output);
            }
            Show::ActiveCpus | Show::SuspendedCpus | Show::Topology => {
                let detail = once(&mut machine, || access.machine_detail())?;
                of_machine(show, detail, output);
            }
            _ => {
                let cpu = work.cpu;
                let detail = once(&mut vcpu, || access.vcpu_detail(cpu))?;
                of_vcpu(show, detail, access, work, output)?;
            }
        }
    }
    if !asked.shows.contains(&Show::RtcTime) {
        nvram(asked.rtc_nvram, &mut rtc, access, output)?;
    }
    if let Some(name) = &asked.capability {
        access.live()?;
        let detail = once(&mut vcpu, || access.vcpu_detail(work.cpu))?;
        capabilities(name.as_deref(), detail, work.cpu, output);
    }
    if let Some(gla) = asked.pmap {
        pmap(access, work, gla, output)?;
    }
    Ok(())
}

/// Asks once, however often it is shown.
fn once<T>(known: &mut Option<T>, ask: impl FnOnce() -> Result<T, Error>) -> Result<&T, Error> {
    match known {
        Some(known) => Ok(known),
        None => Ok(known.insert(ask()?)),
    }
}

fn of_machine(show: Show, detail: &MachineDetail, output: &mut Output) {
    let cpus = |cpus: &std::collections::BTreeSet<u32>| {
        let texts: Vec<_> = cpus.iter().map(u32::to_string).collect();
        match texts.as_slice() {
            [] => "(none)".to_owned(),
            texts => texts.join(", "),
        }
    };
    match show {
        Show::ActiveCpus => {
            output.line(&format!("active cpus:\t {}", cpus(&detail.active)));
            output.field("active_cpus", json!(detail.active));
        }
        Show::SuspendedCpus => {
            output.line(&format!("suspended cpus:\t {}", cpus(&detail.suspended)));
            output.field("suspended_cpus", json!(detail.suspended));
        }
        _ => {
            let topology = &detail.topology;
            let max = detail.max_vcpus.map_or("-".into(), |max| max.to_string());
            output.line(&format!(
                "cpu_topology:\tsockets={}, cores={}, threads={}, maxcpus={max}",
                topology.sockets, topology.cores, topology.threads,
            ));
            let mut value = json!(topology);
            value["maxcpus"] = detail.max_vcpus.into();
            output.field("cpu_topology", value);
        }
    }
}

fn of_vcpu(
    show: Show,
    detail: &VcpuDetail,
    access: &mut dyn VcpuAccess,
    work: &Work,
    output: &mut Output,
) -> Result<(), Error> {
    let cpu = work.cpu;
    let unknown = |option: &'static str| Error::Unknown {
        vm: work.vm.clone(),
        option,
    };
    match show {
        Show::Pinning => {
            let cpus: Vec<_> = detail.pinning.iter().map(usize::to_string).collect();
            let text = match cpus.as_slice() {
                [] => "-1".to_owned(),
                cpus => cpus.join(","),
            };
            output.line(&format!("pinning[{cpu}]\t{text}"));
            output.field("pinning", json!(detail.pinning));
        }
        Show::X2apic => {
            let state = u8::from(detail.x2apic());
            output.line(&format!("x2apic_state[{cpu}]\t{state}"));
            output.field("x2apic_state", state);
        }
        Show::TscOffset => {
            access.live()?;
            let offset = detail
                .tsc_offset
                .ok_or_else(|| unknown("--get-tsc-offset"))?;
            output.line(&format!("tsc_offset[{cpu}]\t{:#018x}", offset.0));
            output.field("tsc_offset", hex(offset.0));
        }
        Show::Pat => {
            output.line(&format!("guest_pat[{cpu}]\t{:#018x}", detail.pat));
            output.field("guest_pat", hex(detail.pat));
        }
        Show::Sysenter => {
            let mut fields = Map::new();
            for (name, value) in [
                ("cs", detail.sysenter_cs),
                ("sp", detail.sysenter_sp),
                ("ip", detail.sysenter_ip),
            ] {
                // %#lx of printf(3) has no prefix before a zero.
                let text = match value {
                    0 => "0".to_owned(),
                    value => format!("{value:#x}"),
                };
                output.line(&format!("guest_sysenter_{name}[{cpu}]\t{text}"));
                fields.insert(name.into(), hex(value));
            }
            output.field("guest_sysenter", Value::Object(fields));
        }
        Show::ExitReason => {
            access.live()?;
            let exit = detail.exit.as_ref();
            let exit = exit.ok_or_else(|| unknown("--get-exit-reason"))?;
            output.line(&format!("exit_reason[{cpu}]\t{:#x}", exit.reason));
            output.field("exit_reason", json!(exit));
        }
        _ => {
            let infos = [
                ("pending", IntInfo::pending(&detail.events)),
                ("current", IntInfo::current(&detail.events)),
            ];
            let mut fields = Map::new();
            for (name, info) in infos {
                let text = info.map_or("n/a".into(), |info| info.to_string());
                output.line(&format!("{name}:\t{text}"));
                fields.insert(name.into(), json!(info));
            }
            output.field("intinfo", Value::Object(fields));
        }
    }
    Ok(())
}

fn nvram(
    offset: Option<u8>,
    rtc: &mut Option<RtcState>,
    access: &mut dyn VcpuAccess,
    output: &mut Output,
) -> Result<(), Error> {
    let Some(offset) = offset else { return Ok(()) };
    let rtc = once(rtc, || access.rtc())?;
    // 128 bytes, as both sides check; a shorter answer reads as a bus where nobody is.
    let value = rtc.nvram.get(usize::from(offset)).copied().unwrap_or(0xff);
    output.line(&format!("rtc nvram[{offset:03}]: {value:#04x}"));
    output.field("rtc_nvram", json!({ "offset": offset, "value": value }));
    Ok(())
}

fn rtc_time(rtc: &RtcState, output: &mut Output) {
    let seconds = rtc.seconds;
    output.line(&format!("rtc time {seconds:#x}: {}", calendar(seconds)));
    output.field("rtc_time", seconds);
}

/// A time as bhyvectl writes it: `Tue Apr 10 23:59:58 2012`.
fn calendar(seconds: i64) -> String {
    const WEEKDAYS: [&str; 7] = ["Thu", "Fri", "Sat", "Sun", "Mon", "Tue", "Wed"];
    const MONTHS: [&str; 12] = [
        "Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec",
    ];
    let days = seconds.div_euclid(86_400);
    let second = seconds.rem_euclid(86_400);
    // Years from March 0000 on, so that a leap day is a year's last; 146097 days are 400 years.
    let march = days + 719_468;
    let (era, day) = (march.div_euclid(146_097), march.rem_euclid(146_097));
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    // Months from March on have 31, 30, 31, 30, 31 days, and again.
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let name = MONTHS[usize::try_from((month + 2) % 12).unwrap_or(0)];
    let year = era * 400 + year + i64::from(month >= 10);
    let weekday = WEEKDAYS[usize::try_from(days.rem_euclid(7)).unwrap_or(0)];
    format!(
        "{weekday} {name} {day:02} {:02}:{:02}:{:02} {year}",
        second / 3600,
        second / 60 % 60,
        second % 60
    )
}

fn capabilities(name: Option<&str>, detail: &VcpuDetail, cpu: u32, output: &mut Output) {
    let mut fields = Map::new();
    let asked = CAPABILITIES
        .iter()
        .filter(|&&n| name.is_none_or(|name| name == n));
    for &name in asked {
        let set = detail.capabilities.get(name).copied();
        output.line(&match set {
            Some(true) => format!("Capability \"{name}\" is set on vcpu {cpu}"),
            Some(false) => format!("Capability \"{name}\" is not set on vcpu {cpu}"),
            None => format!("Capability \"{name}\" is not available"),
        });
        fields.insert(name.into(), set.into());
    }
    output.field("capabilities", Value::Object(fields));
}

/// Where the vCPU's own page tables lead an address.
fn pmap(
    access: &mut dyn VcpuAccess,
    work: &Work,
    gla: u64,
    output: &mut Output,
) -> Result<(), Error> {
    let registers = access.registers(work.cpu)?;
    let memory = access.open_memory()?;
    let found =
        pagewalk::gla2gpa_nofault(&memory, &registers, gla).map_err(|source| Error::Walk {
            vm: work.vm.clone(),
            source,
        })?;
    let entries: Vec<_> = found.entries.iter().map(|e| e.value).collect();
    let text: String = entries.iter().map(|value| format!(" {value:#x}")).collect();
    output.line(&format!("gpa {:#x}:{text}", found.gpa));
    let entries: Vec<Value> = entries.into_iter().map(hex).collect();
    output.field(
        "gpa_pmap",
        json!({
            "gla": hex(gla), "gpa": hex(found.gpa), "page_size": found.page_size,
            "writable": found.writable, "user": found.user, "executable": found.executable,
            "entries": entries,
        }),
    );
    Ok(())
}

fn memseg(layout: MemoryLayout, output: &mut Output) {
    output.line("ID  Length      Name");
    let len = layout.total();
    // bhyve's one segment of memory, which it maps in two places.
    if len != 0 {
        output.line(&format!("{:<4}{:<12}sysmem", 0, humanize(len)));
    }
    let segments = if len == 0 {
        json!([])
    } else {
        json!([{ "id": 0, "length": len, "name": "sysmem" }])
    };
    output.field("memseg", segments);
}

fn memmap(map: &[Region], output: &mut Output) {
    output.line("Address     Length      Segment     Offset      Prot  Flags");
    for region in map {
        let (protection, flags) = match region.kind {
            RegionKind::Ram if region.wired => ("RWX", "wired"),
            RegionKind::Ram => ("RWX", ""),
            RegionKind::Device => ("RW-", ""),
            RegionKind::Hole => ("---", ""),
        };
        let line = format!(
            "{:<12X}{:<12}{:<12}{:<12X}{protection}   {flags}",
            region.gpa,
            humanize(region.len),
            region.name,
            region.offset
        );
        output.line(line.trim_end());
    }
    output.field("memmap", json!(map));
}

/// humanize_number(3) as bhyvectl calls it: whole units, at most five digits.
fn humanize(bytes: u64) -> String {
    let units = ["", "K", "M", "G", "T", "P", "E"];
    let mut value = bytes;
    for unit in units {
        if value < 100_000 {
            return format!("{value}{unit}B");
        }
        value = (value >> 10) + (value >> 9 & 1);
    }
    format!("{bytes}B")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_written_as_ctime_does() {
        for (seconds, text) in [
            (0, "Thu Jan 01 00:00:00 1970"),
            (1_334_102_398, "Tue Apr 10 23:59:58 2012"),
            (951_782_400, "Tue Feb 29 00:00:00 2000"),
            (4_107_542_400, "Mon Mar 01 00:00:00 2100"),
            (-1, "Wed Dec 31 23:59:59 1969"),
        ] {
            assert_eq!(calendar(seconds), text);
        }
    }

    #[test]
    fn lengths_have_five_digits_at_most() {
        for (bytes, text) in [
            (4096, "4096B"),
            (64 << 20, "65536KB"),
            (256 << 20, "256MB"),
            (3 << 30, "3072MB"),
            (1 << 45, "32768GB"),
        ] {
            assert_eq!(humanize(bytes), text);
        }
    }
}
