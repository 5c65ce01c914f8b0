//! A guest's memory full of lies: page walks, symbol tables, types, logs, lists of processes and stacks
//! end, and read nothing that is not there.

use std::ops::Range;

use vmm_api::guest::linux::btf::Btf;
use vmm_api::guest::linux::log::Ring;
use vmm_api::guest::linux::modules::{Module, Orc, modules};
use vmm_api::guest::linux::orc::Unwinder;
use vmm_api::guest::linux::vmcoreinfo::VmcoreInfo;
use vmm_api::guest::linux::{Linux, kallsyms, tasks};
use vmm_api::guest::{Kernel, Report, Symbols, View, backtrace, freebsd};
use vmm_api::memory::MemoryError;
use vmm_api::pagewalk::{self, Access, PhysicalMemory};
use vmm_api::regs::Registers;

/// Where everything is that a kernel's symbols name.
const MAP: &[u8] = b"0000000000000008 D prb
0000000000000010 D init_task
0000000000000018 D msgbufp
0000000000000020 D allproc
0000000000000028 R proc_off_p_pid
000000000000002c R proc_off_p_comm
0000000000000030 R proc_off_p_list
0000000000000040 R __start_orc_unwind_ip
0000000000000080 R __stop_orc_unwind_ip
0000000000000080 R __start_orc_unwind
0000000000000100 R __start_BTF
0000000000000048 D modules
0000000000000050 d vmcoreinfo_data
0000000000000058 d vmcoreinfo_size
0000000000000200 T text
";

/// The input is guest-physical memory from 0 on.
struct Memory<'a>(&'a [u8]);

impl PhysicalMemory for Memory<'_> {
    fn read_physical(&self, gpa: u64, bytes: &mut [u8]) -> Result<(), MemoryError> {
        let len = bytes.len();
        let from = usize::try_from(gpa).ok();
        let found = from.and_then(|from| self.0.get(from..from.checked_add(len)?));
        match found {
            Some(found) => bytes.copy_from_slice(found),
            None => {
                return Err(MemoryError::NotRam {
                    gpa,
                    len: len as u64,
                });
            }
        }
        Ok(())
    }

    fn next_written(&self, gpa: u64) -> Option<Range<u64>> {
        let len = self.0.len() as u64;
        (gpa < len).then_some(gpa..len)
    }
}

/// True if anything in it was believed.
///
/// # Panics
///
/// Something was made up, or had no end.
pub fn check(input: &[u8]) -> bool {
    let memory = Memory(input);
    let flat = Registers {
        rip: 0x204,
        rsp: 0x300,
        rbp: 0x310,
        ..Registers::reset()
    };
    let mut flat = flat;
    flat.cs.base = 0;
    // Paging on, 64-bit; the tables begin with the input.
    let long = Registers {
        cr0: 1 << 31 | 1,
        cr4: 1 << 5,
        efer: 1 << 8 | 1 << 10,
        cr3: 0,
        rsp: 0xffff_ffff_8000_0100,
        ..flat.clone()
    };
    let mut believed = false;
    for registers in [&flat, &long] {
        for gla in [0, 0x1234, 0xffff_ffff_8000_0000, u64::MAX] {
            if let Ok(found) = pagewalk::gla2gpa(&memory, registers, gla, Access::default()) {
                assert!(found.entries.len() <= 5);
            }
        }
        let kernel = Kernel::find(&memory, std::slice::from_ref(registers), None, None);
        believed |= kernel.is_ok();
        let frames = backtrace(&memory, registers, None);
        assert!((1..=64).contains(&frames.len()));
        let report = Report::new(&memory, std::slice::from_ref(registers), None, None);
        assert_eq!(report.vcpus.len(), 1);
    }
    let Some(symbols) = Symbols::parse(MAP) else {
        return believed;
    };
    let view = View {
        memory: &memory,
        registers: &flat,
    };
    if let Ok(messages) = freebsd::messages(view, &symbols) {
        let said: usize = messages.iter().map(|m| m.text.len()).sum();
        // What is no UTF-8 becomes a character of three bytes.
        assert!(said <= 3 * input.len());
        believed = true;
    }
    if let Ok(processes) = freebsd::processes(view, &symbols) {
        assert!(processes.len() <= input.len());
    }
    let module = Module {
        name: "module".into(),
        code: std::iter::once(0x204..0x208).collect(),
        orc: Some(Orc {
            addresses: 0x60,
            entries: 0x70,
            count: 4,
        }),
    };
    if let Some(unwinder) = Unwinder::new(view, &symbols, &[module]) {
        let frames = backtrace(&memory, &flat, Some(&unwinder));
        assert!((1..=128).contains(&frames.len()));
    }
    if let Ok(linux) = Linux::new(view, &symbols) {
        let _ = Ring::of_types(&linux).and_then(|ring| ring.messages(view));
        if let Ok(modules) = modules(&linux) {
            assert!(modules.len() <= input.len());
        }
        if let Ok(processes) = tasks::processes(&linux) {
            assert!(processes.len() <= input.len());
        }
        believed = true;
    }
    if let Some(told) = VmcoreInfo::find(view, &symbols) {
        let _ = Ring::of_vmcoreinfo(view, &told).and_then(|ring| ring.messages(view));
        believed = true;
    }
    if let Some(kernel) = Kernel::nameless(&memory, std::slice::from_ref(&flat)) {
        let _ = kernel.messages(&memory);
        assert!(kernel.processes(&memory).is_err());
    }
    if let Some(symbols) = kallsyms::find(input) {
        assert!(symbols.count() <= input.len());
        believed = true;
    }
    if let Ok(btf) = Btf::parse(input) {
        for path in ["comm", "tasks.next", "mm.pgd"] {
            let _ = btf.member("task_struct", path);
        }
        believed = true;
    }
    believed
}

/// FreeBSD's message buffer, page tables that lead back to themselves, and what Linux tells for dumps.
pub fn seeds() -> Vec<Vec<u8>> {
    let mut messages = vec![0; 0x400];
    let mut word = |at: usize, word: u64| messages[at..at + 8].copy_from_slice(&word.to_le_bytes());
    word(0x18, 0x340);
    word(0x340, 0x380);
    word(0x348, 0x6_3062 | 64 << 32);
    word(0x350, 20);
    messages[0x380..0x394].copy_from_slice(b"<6>panic: page fault");
    let mut tables = vec![0; 0x2000];
    for entry in tables.as_chunks_mut::<8>().0 {
        *entry = 0x1003u64.to_le_bytes();
    }
    let mut told = vec![0; 0x2000];
    let text = "OSRELEASE=6.1\nSYMBOL(_stext)=200\nSYMBOL(prb)=8\n\
                OFFSET(printk_ringbuffer.desc_ring)=8\nSIZE(prb_desc)=24\n";
    let head = [11, text.len() as u32, 0].map(u32::to_le_bytes).concat();
    let note = [&head[..], b"VMCOREINFO\0\0", text.as_bytes()].concat();
    told[0x1000..0x1000 + note.len()].copy_from_slice(&note);
    vec![messages, tables, told]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_seeds_are_read() {
        let seeds = seeds();
        assert!(check(&seeds[0]));
        check(&seeds[1]);
        assert!(check(&seeds[2]));
        check(&[]);
    }
}
