//! The report: one line a finding.

use core::arch::x86_64::CpuidResult;
use core::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use crate::acpi::{self, Acpi};
use crate::boot::{self, BootInfo, Region};
use crate::console::{Hex, Print, Stored, Text, Two, print, say};
use crate::cpu::{self, Deadline};
use crate::entry::{self, PROTOCOL_PVH};
use crate::memory::string_length;
use crate::startup::CpuList;
use crate::{apic, interrupts, memory, mptable, rtc, shell, smp, startup, traps, uart};

static FAILED: AtomicU32 = AtomicU32::new(0);

/// Whether input has to be polled for, because the serial port's interrupt does not come.
pub static DEAF: AtomicBool = AtomicBool::new(false);

/// Ends a line: what was found is as it should be, or why not.
fn verdict(result: Result<(), &str>) {
    match result {
        Ok(()) => say!(" ok"),
        Err(why) => {
            FAILED.fetch_add(1, Ordering::Relaxed);
            say!(" FAILED (", why, ")");
        }
    }
}

/// The kernel's first Rust function.
pub extern "C" fn main() -> ! {
    uart::init();
    traps::init();
    traps::load();
    say!();
    say!("probe: rhyve's probe kernel");
    run();
    match FAILED.load(Ordering::Relaxed) {
        0 => say!("probe: report done"),
        failed => say!("probe: report done, ", failed, " FAILED"),
    }
    shell::run()
}

fn run() {
    registers();
    let info = loader();
    memory_map(&info);
    texts(&info);
    processor();
    let platform = platform(&info);
    serial_port();
    clock();
    let Ok(()) = local_apic() else { return };
    timer();
    serial_interrupt(&platform);
    other_cpus(&platform);
}

/// The registers at entry.
pub fn registers() {
    let state = entry::state();
    let how = if state.protocol == PROTOCOL_PVH {
        "pvh"
    } else {
        "metadata"
    };
    say!(
        "probe: entry ",
        how,
        " words ",
        Hex(state.words[0].into()),
        " ",
        Hex(state.words[1].into())
    );
    say!(
        "probe: entry cr0 ",
        Hex(state.cr0),
        " cr3 ",
        Hex(state.cr3),
        " cr4 ",
        Hex(state.cr4),
        " efer ",
        Hex(state.efer),
        " rflags ",
        Hex(state.rflags),
    );
    let [cs, ds, es, fs, gs, ss, tr, ldtr] = state.selectors;
    say!(
        "probe: entry cs ",
        Hex(cs),
        " ds ",
        Hex(ds),
        " es ",
        Hex(es),
        " fs ",
        Hex(fs),
        " gs ",
        Hex(gs),
        " ss ",
        Hex(ss),
        " tr ",
        Hex(tr),
        " ldtr ",
        Hex(ldtr),
    );
    let (gdtr, idtr) = (state.gdtr, state.idtr);
    say!(
        "probe: entry gdtr ",
        Hex(gdtr.base),
        "/",
        Hex(gdtr.limit.into()),
        " idtr ",
        Hex(idtr.base),
        "/",
        Hex(idtr.limit.into()),
    );
    const NAMES: [&str; 16] = [
        "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", "r8", "r9", "r10", "r11", "r12",
        "r13", "r14", "r15",
    ];
    print!("probe: entry");
    for (name, &value) in NAMES.iter().zip(&state.general) {
        // A loader leaves most at 0: not worth their time on the line.
        if value != 0 {
            print!(" ", *name, " ", Hex(value));
        }
    }
    say!();
}

fn loader() -> BootInfo {
    print!("probe: loader");
    let info = boot::read();
    if let Ok(info) = &info {
        if info.records > 0 {
            print!(" records ", info.records);
        }
        for text in [info.name, info.kind] {
            if text != 0 {
                print!(" \"");
                Stored(text, string_length(text)).print();
                print!("\"");
            }
        }
        if let Some(howto) = info.howto {
            print!(" howto ", Hex(howto.into()));
        }
        if let Some(end) = info.kernel_end {
            print!(" kernend ", Hex(end));
        }
    }
    verdict(info.map(drop));
    info.unwrap_or_default()
}

/// Prints one region of the memory map.
pub fn region(Region { base, length, kind }: &Region) {
    let name = match kind {
        1 => " ram",
        2 => " reserved",
        3 => " acpi",
        4 => " nvs",
        5 => " bad",
        _ => " unknown",
    };
    print!(
        "probe: memory ",
        Hex(*base),
        "-",
        Hex(base.wrapping_add(*length).wrapping_sub(1)),
        name
    );
}

fn memory_map(info: &BootInfo) {
    if info.regions == 0 {
        print!("probe: memory");
        return verdict(Err("no memory map"));
    }
    let large_pages = cpu::cpuid(0x8000_0001, 0).edx & 1 << 26 != 0;
    let mut total = 0u64;
    for each in info.map() {
        region(&each);
        if each.kind != 1 {
            say!();
            continue;
        }
        total = total.wrapping_add(each.length);
        let end = each.base.wrapping_add(each.length) & !7;
        if each.length < 16 || end <= each.base {
            verdict(Err("empty, or past the end of memory"));
        } else if end > 512 << 30 || end > 8 << 30 && !large_pages {
            say!(" not touched: out of the identity map's reach");
        } else if memory::writable(each.base + 7 & !7) && memory::writable(end - 8) {
            verdict(Ok(()));
        } else {
            verdict(Err("its first or last word does not hold what is written"));
        }
    }
    say!("probe: memory total ", total >> 10, " KiB");
}

fn texts(info: &BootInfo) {
    let mut given = false;
    if info.command_line != 0 {
        given = true;
        print!("probe: command line \"");
        Stored(info.command_line, string_length(info.command_line)).print();
        say!("\"");
    }
    info.for_each_variable(|address, length| {
        given = true;
        print!("probe: environment ");
        Stored(address, length).print();
        say!();
    });
    if !given {
        say!("probe: environment empty, no command line");
    }
}

/// CPUID's highlights.
pub fn processor() {
    let text = |words: [u32; 3]| {
        for word in words {
            Text(&word.to_le_bytes()).print();
        }
    };
    let CpuidResult {
        eax: max,
        ebx,
        ecx,
        edx,
    } = cpu::cpuid(0, 0);
    print!("probe: cpuid vendor \"");
    text([ebx, edx, ecx]);
    let one = cpu::cpuid(1, 0);
    let extended = cpu::cpuid(0x8000_0000, 0).eax;
    say!(
        "\" max ",
        Hex(max.into()),
        " extended ",
        Hex(extended.into()),
        " signature ",
        Hex(one.eax.into())
    );
    print!("probe: cpuid features");
    for (set, name) in [
        (one.edx & 1 << 4, " tsc"),
        (one.edx & 1 << 9, " apic"),
        (one.ecx & 1 << 21, " x2apic"),
        (one.ecx & 1 << 24, " tsc-deadline"),
        (one.ecx & 1 << 26, " xsave"),
        (one.ecx & 1 << 31, " hypervisor"),
        (cpu::cpuid(0x8000_0001, 0).edx & 1 << 26, " 1g-pages"),
    ] {
        if set != 0 {
            print!(name);
        }
    }
    say!();
    if one.ecx & 1 << 31 != 0 {
        let CpuidResult { eax, ebx, ecx, edx } = cpu::cpuid(0x4000_0000, 0);
        print!("probe: cpuid hypervisor \"");
        text([ebx, ecx, edx]);
        say!("\" max ", Hex(eax.into()));
    }
    print!(
        "probe: cpuid topology apic id ",
        one.ebx >> 24,
        " logical ",
        one.ebx >> 16 & 0xff
    );
    if max >= 0xb {
        for level in 0..4 {
            let leaf = cpu::cpuid(0xb, level);
            let name = match leaf.ecx >> 8 & 0xff {
                1 => " thread",
                2 => " core",
                _ => break,
            };
            print!(
                name,
                " shift ",
                leaf.eax & 0x1f,
                " cpus ",
                leaf.ebx & 0xffff
            );
        }
    }
    say!();
}

/// What the firmware tables say of interrupts and CPUs.
struct Platform {
    cpus: Option<CpuList>,
    ioapic: u64,
    serial_pin: u32,
}

fn platform(info: &BootInfo) -> Platform {
    let mut platform = Platform {
        cpus: None,
        ioapic: 0xfec0_0000,
        serial_pin: u32::from(uart::IRQ),
    };
    let acpi = acpi::find(info);
    match mptable::find() {
        Ok(None) => say!("probe: mptable none"),
        Ok(Some(table)) => {
            print!(
                "probe: mptable ",
                Hex(table.floating),
                " table ",
                Hex(table.table),
                " revision ",
                u32::from(table.revision),
                " entries ",
                table.entries,
                " cpus ",
                table.cpus.count,
            );
            verdict(Ok(()));
            if let Some(address) = table.ioapic {
                platform.ioapic = address;
            }
            platform.cpus = Some(table.cpus);
        }
        Err(why) => {
            print!("probe: mptable");
            verdict(Err(why));
        }
    }
    match acpi {
        None => say!("probe: acpi none"),
        Some(acpi) => acpi_tables(&acpi, &mut platform),
    }
    if platform.cpus.is_none() {
        say!("probe: no table lists the CPUs");
    }
    platform
}

fn acpi_tables(acpi: &Acpi, platform: &mut Platform) {
    print!(
        "probe: acpi rsdp ",
        Hex(acpi.rsdp),
        " revision ",
        u32::from(acpi.revision),
        " oem \""
    );
    Text(&acpi.oem()).print();
    print!("\"");
    for table in acpi.tables() {
        print!(" ");
        Stored(table, 4).print();
    }
    verdict(acpi.check());
    if let Some(madt) = acpi.madt() {
        print!("probe: madt cpus ", madt.cpus.count);
        if let Some((address, first)) = madt.ioapic {
            platform.ioapic = address;
            let line = madt.serial.unwrap_or(platform.serial_pin);
            platform.serial_pin = line.wrapping_sub(first);
            print!(" ioapic ", Hex(address), " gsi ", first);
        }
        verdict(if madt.cpus.count == 0 {
            Err("no CPU is enabled")
        } else {
            Ok(())
        });
        platform.cpus = Some(madt.cpus);
    }
}

fn serial_port() {
    print!(
        "probe: uart ",
        Hex(uart::PORT.into()),
        if uart::has_fifo() { " 16550a" } else { "" }
    );
    verdict(if !uart::has_fifo() {
        Err("no working FIFO")
    } else if !uart::scratch_works() {
        Err("the scratch register forgets")
    } else if !uart::loopback_works() {
        Err("loopback")
    } else {
        Ok(())
    });
}

/// The time of day.
pub fn clock() {
    print!("probe: rtc");
    match rtc::read() {
        Ok(time) => {
            print!(
                " ",
                time.year,
                "-",
                Two(time.month),
                "-",
                Two(time.day),
                " ",
                Two(time.hour),
                ":",
                Two(time.minute),
                ":",
                Two(time.second),
            );
            verdict(Ok(()));
        }
        Err(why) => verdict(Err(why)),
    }
}

fn local_apic() -> Result<(), &'static str> {
    print!("probe: lapic");
    let result = apic::enable();
    if result.is_ok() {
        let mode = if apic::is_x2apic() {
            " x2apic"
        } else {
            " xapic"
        };
        print!(
            mode,
            " id ",
            apic::id(),
            " version ",
            Hex(apic::version().into())
        );
    }
    verdict(result);
    result
}

fn timer() {
    // A hundred thousand periods: 0.1 ms of KVM's 1 GHz clock, a few ms of a slow bus.
    const COUNT: u32 = 100_000;
    print!("probe: lapic-timer");
    apic::start_timer(COUNT);
    cpu::enable_interrupts();
    let fired = Deadline::after(Deadline::LONG).wait(|| interrupts::ticks() > 0);
    cpu::disable_interrupts();
    if !fired {
        let stuck = apic::timer_left() == COUNT;
        apic::stop_timer();
        return verdict(Err(if stuck {
            "it does not count"
        } else {
            "no interrupt"
        }));
    }
    verdict(Ok(()));
    // Now that it is known to come, the same interrupt may end a HLT.
    print!("probe: hlt");
    let before = interrupts::ticks();
    apic::start_timer(COUNT);
    cpu::sleep();
    apic::stop_timer();
    verdict(if interrupts::ticks() != before {
        Ok(())
    } else {
        Err("woken by something else")
    });
}

fn serial_interrupt(platform: &Platform) {
    print!(
        "probe: uart-irq ioapic ",
        Hex(platform.ioapic),
        " pin ",
        platform.serial_pin
    );
    let result =
        apic::route(platform.ioapic, platform.serial_pin, interrupts::SERIAL).and_then(|pins| {
            print!("/", pins);
            uart::provoke_interrupt();
            cpu::enable_interrupts();
            let came = Deadline::after(Deadline::LONG).wait(|| uart::transmit_interrupts() > 0);
            cpu::disable_interrupts();
            if came {
                Ok(())
            } else {
                Err("it does not come")
            }
        });
    DEAF.store(result.is_err(), Ordering::Relaxed);
    uart::listen();
    verdict(result);
}

fn other_cpus(platform: &Platform) {
    let Some(cpus) = &platform.cpus else { return };
    let own = apic::id();
    if !cpus.ids().any(|id| id == own) {
        print!("probe: cpu0 apic ", own);
        verdict(Err("the tables do not list the CPU that runs"));
    }
    startup::prepare();
    let mut number = 0u32;
    for id in cpus.ids().filter(|&id| id != own) {
        number += 1;
        print!("probe: cpu", number, " apic ", id);
        let up = startup::start(id);
        if up.is_ok() {
            print!(" up");
        }
        verdict(up.and_then(|()| {
            if smp::call(id) {
                Ok(())
            } else {
                Err("deaf to interrupts from here")
            }
        }));
    }
    if number == 0 {
        say!("probe: one cpu");
    }
}
