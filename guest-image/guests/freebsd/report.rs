//! The report: a FreeBSD kernel's lines, and a verdict on each thing that the loader handed over.

use core::sync::atomic::{AtomicU32, Ordering};

use crate::console::{Hex, Stored, print, say};
use crate::metadata::{self as md, File, Metadata, Record};
use crate::traps;
use crate::{apic, cpu, entry, gdb, kernel, memory, module, mptable, pci, smp, startup, terminal};

/// Enter the debugger before anything else (sys/sys/reboot.h).
const RB_KDB: u64 = 0x40;

/// Modules that are linked.
const OBJECTS: [&str; 2] = ["elf obj module", "elf64 obj module"];
/// Preloaded disks.
const DISKS: [&str; 2] = ["md_image", "mfs_root"];

static FAILED: AtomicU32 = AtomicU32::new(0);

/// Ends a line: what was found is as it should be, or why not.
fn verdict<T>(result: Result<T, &str>) -> Option<T> {
    match result {
        Ok(value) => {
            say!(" ok");
            Some(value)
        }
        Err(why) => {
            FAILED.fetch_add(1, Ordering::Relaxed);
            say!(" FAILED (", why, ")");
            None
        }
    }
}

/// The kernel's first Rust function.
pub extern "C" fn main() -> ! {
    terminal::init();
    traps::init();
    traps::load();
    say!();
    if gdb::present() {
        say!("GDB: debug ports: bvm");
        say!("GDB: current port: bvm");
    }
    say!("rhyve's FreeBSD probe on ", terminal::name());
    let [rsp, cr3] = entry::registers();
    say!(
        "probe: entry rsp ",
        Hex(rsp),
        " cr3 ",
        Hex(cr3),
        " modulep ",
        Hex(entry::modulep()),
        " kernend ",
        Hex(entry::kernend())
    );
    run();
    match FAILED.load(Ordering::Relaxed) {
        0 => say!("probe: report done"),
        failed => say!("probe: report done, ", failed, " FAILED"),
    }
    console()
}

fn run() {
    print!("probe: metadata");
    let metadata = Metadata::read(entry::modulep());
    if let Ok(metadata) = &metadata {
        print!(" records ", metadata.records);
    }
    let Some(metadata) = verdict(metadata) else {
        return;
    };
    metadata.iter().for_each(|record| dump(&record));
    let Some(file) = metadata.files().next() else {
        return;
    };
    print!("probe: kernel");
    verdict(kernel::place(&file));
    print!("probe: elf header");
    verdict(kernel::header(&file));
    print!("probe: dynamic");
    verdict(match (file.info(md::DYNAMIC), kernel::is_dynamic()) {
        (Some(_), true) | (None, false) => Ok(()),
        (None, true) => Err("there is one, and no record of it"),
        (Some(_), false) => Err("there is none"),
    });
    print!("probe: symbols");
    let symbols = verdict(kernel::symbols(&file));
    let files_end = files(&metadata);
    print!("probe: environment");
    verdict(kernel::environment(&file, entry::modulep(), files_end));
    kernel::print_environment(&file);
    print!("probe: kernend");
    verdict(kernel::end(&file, &metadata));
    loaded(&file, symbols);
    for module in metadata
        .files()
        .filter(|file| OBJECTS.iter().any(|kind| file.is(kind)))
    {
        load_line(&module);
        say!();
    }
    let howto = file.number(md::HOWTO).unwrap_or(0);
    if howto & RB_KDB != 0 {
        say!("KDB: enter: Boot flags requested debugger");
        gdb::enter();
        say!("KDB: left");
    }
    memory(&file);
    for module in metadata
        .files()
        .filter(|file| OBJECTS.iter().any(|kind| file.is(kind)))
    {
        print!(
            "probe: module ",
            Stored(module.name.payload, module.name.length - 1)
        );
        say!();
        let linked = module::link(&module);
        print!("probe: module");
        if let Ok(relocations) = linked {
            print!(" relocations ", relocations);
        }
        verdict(linked);
    }
    cpus();
    pci::scan();
    let disks = metadata
        .files()
        .filter(|file| DISKS.iter().any(|kind| file.is(kind)));
    for (unit, disk) in (0u32..).zip(disks) {
        preloaded(unit, &disk);
    }
    if let Some([value, length]) = kernel::variable(&file, "vfs.root.mountfrom") {
        say!(
            "Trying to mount root from ",
            Stored(value, length),
            " []..."
        );
    }
}

/// A record as it is, for comparison with another loader's.
fn dump(record: &Record) {
    let name = match record.kind {
        md::MODINFO_NAME => "name",
        md::MODINFO_TYPE => "type",
        md::MODINFO_ADDR => "addr",
        md::MODINFO_SIZE => "size",
        md::MODINFO_ARGS => "args",
        md::ELFHDR => "elfhdr",
        md::SSYM => "ssym",
        md::ESYM => "esym",
        md::DYNAMIC => "dynamic",
        md::ENVP => "envp",
        md::HOWTO => "howto",
        md::KERNEND => "kernend",
        md::SHDR => "shdr",
        md::SMAP => "smap",
        _ => "",
    };
    print!("md: ");
    if name.is_empty() {
        print!(Hex(record.kind.into()));
    }
    print!(name, " ", record.length, " ");
    match record.kind {
        md::MODINFO_NAME | md::MODINFO_TYPE | md::MODINFO_ARGS => {
            say!(
                "\"",
                Stored(record.payload, record.text().unwrap_or(0)),
                "\""
            );
        }
        _ => say!(Hex(record.number().unwrap_or_else(|| sum(record)))),
    }
}

/// A number that is another for other bytes.
fn sum(record: &Record) -> u64 {
    let mut sum = 0u64;
    for offset in (0..record.length).step_by(8) {
        let word = memory::peek64(record.payload + offset).unwrap_or(0);
        sum = sum.rotate_left(7) ^ word;
    }
    sum
}

/// No file lies in another; returns where the last one ends.
fn files(metadata: &Metadata) -> u64 {
    print!("probe: files");
    let mut last = 0;
    let mut count = 0u32;
    let mut result = Ok(());
    for (index, file) in metadata.files().enumerate() {
        let Some([start, end]) = file.place() else {
            result = Err("one without a place");
            continue;
        };
        let before = metadata.files().take(index).filter_map(|file| file.place());
        if { before }.any(|[from, to]| start < to && from < end) {
            result = Err("two overlap");
        }
        last = end.max(last);
        count += 1;
    }
    print!(" ", count);
    verdict(result);
    last
}

/// What the loader said of the kernel.
fn loaded(file: &File, symbols: Option<[u64; 2]>) {
    print!(Stored(file.name.payload, file.name.length - 1));
    if let Some([start, _]) = file.place() {
        kernel::segments(start);
    }
    if let Some([symtab, strtab]) = symbols {
        print!(" syms=[0x8+", Hex(symtab), "+0x8+", Hex(strtab), "]");
    }
    say!();
}

/// What the loader said of a module.
fn load_line(file: &File) {
    let [address, end] = file.place().unwrap_or_default();
    print!(
        Stored(file.name.payload, file.name.length - 1),
        " size ",
        Hex(end - address),
        " at ",
        Hex(address)
    );
}

fn memory(file: &File) {
    kernel::print_memory_map(file);
    print!("probe: memory");
    let Some([top, available]) = verdict(kernel::memory_map(file)) else {
        return;
    };
    say!("real memory  = ", top, " (", top >> 20, " MB)");
    say!("avail memory = ", available, " (", available >> 20, " MB)");
}

fn cpus() {
    let table = match mptable::find() {
        Ok(Some(table)) => table,
        Ok(None) => return say!("MPTable: not found"),
        Err(why) => {
            print!("probe: mptable");
            verdict::<()>(Err(why));
            return;
        }
    };
    say!(
        "MPTable: <",
        Stored(table.table + 8, 8),
        " ",
        Stored(table.table + 16, 12),
        ">"
    );
    if table.ioapic.is_none() {
        say!("probe: mptable has no I/O APIC");
    }
    print!("probe: lapic");
    let apic = apic::enable();
    if apic.is_ok() {
        let mode = if apic::is_x2apic() { "x2apic" } else { "xapic" };
        print!(" ", mode, " version ", Hex(apic::version().into()));
    }
    if verdict(apic).is_none() {
        return;
    }
    say!(
        "FreeBSD/SMP: Multiprocessor System Detected: ",
        table.cpus.count,
        " CPUs"
    );
    startup::prepare();
    let own = apic::id();
    for (cpu, id) in (0u32..).zip(table.cpus.ids()) {
        let role = if id == own { "BSP" } else { "AP" };
        say!(" cpu", cpu, " (", role, "): APIC ID:  ", id);
    }
    for (cpu, id) in (0u32..).zip(table.cpus.ids()).filter(|(_, id)| *id != own) {
        let before = smp::launched();
        match startup::start(id) {
            Ok(()) if smp::launched() > before => say!("SMP: AP CPU #", cpu, " Launched!"),
            result => {
                print!("probe: cpu", cpu);
                verdict(result.and(Err("it did not arrive")) as Result<(), _>);
            }
        }
    }
}

/// A preloaded disk: ours begins with a text, its length, and the sum of the words that follow.
fn preloaded(unit: u32, file: &File) {
    let [address, end] = file.place().unwrap_or_default();
    say!(
        "md",
        unit,
        ": Preloaded image <",
        Stored(file.name.payload, file.name.length - 1),
        "> ",
        end - address,
        " bytes at ",
        Hex(address)
    );
    print!("probe: image");
    let word = |at: u64| memory::peek64(address + at).unwrap_or(0);
    let (length, told) = (word(16), word(24));
    if word(0).to_le_bytes() != *b"rhyve-md" || length > end - address || length % 8 != 0 {
        return drop(verdict::<()>(Err("it does not begin as it should")));
    }
    let sum = (32..length)
        .step_by(8)
        .fold(0, |sum: u64, at| sum.wrapping_add(word(at)));
    verdict(if sum == told {
        Ok(())
    } else {
        Err("its words have another sum")
    });
}

/// One letter a command.
fn console() -> ! {
    say!("The probe is up: r reboots, h halts, d enters the debugger.");
    loop {
        match terminal::read() {
            Some(b'r') => {
                say!("Rebooting...");
                cpu::outb(0x64, 0xfe);
            }
            Some(b'h') => {
                say!("The operating system has halted.");
                cpu::halt();
            }
            Some(b'd') => {
                say!("KDB: enter: manual");
                gdb::enter();
                say!("KDB: left");
            }
            Some(byte @ b' '..) => say!("? ", Hex(byte.into())),
            _ => core::hint::spin_loop(),
        }
    }
}
