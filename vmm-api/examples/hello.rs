//! A guest of twenty lines, run by the library alone: it reads a byte at a port and says hello.
//!
//! `cargo run -p vmm-api --example hello` needs /dev/kvm.

use std::error::Error;
use std::io::Write;

use vmm_api::capability;
use vmm_api::exit::{Direction, PortAccess, VmExit};
use vmm_api::kvm::{CpuidPolicy, KvmVm, VmPolicy};
use vmm_api::memory::{MemSize, MemoryLayout};
use vmm_api::regs::{Reg, Registers, SegReg};
use vmm_api::root::Root;
use vmm_api::state::VcpuState;
use vmm_api::topology::Topology;
use vmm_api::vm::{MemorySetup, Vm};

/// Where the guest is loaded; it is 16-bit code, as a processor begins with.
const CODE: u64 = 0x1000;

#[rustfmt::skip]
const GUEST: &[u8] = &[
    0x31, 0xc0,             //        xor  ax, ax
    0x8e, 0xd8,             //        mov  ds, ax
    0xfc,                   //        cld
    0xba, 0x10, 0x05,       //        mov  dx, 0x510     ; ask the monitor
    0xec,                   //        in   al, dx        ; for a digit
    0xa2, 0x33, 0x10,       //        mov  [digit], al
    0xba, 0xf8, 0x03,       //        mov  dx, 0x3f8
    0xbe, 0x22, 0x10,       //        mov  si, text
    0xac,                   // next:  lodsb
    0x84, 0xc0,             //        test al, al
    0x74, 0x03,             //        jz   done
    0xee,                   //        out  dx, al
    0xeb, 0xf8,             //        jmp  next
    0xba, 0xf4, 0x00,       // done:  mov  dx, 0xf4      ; tell the monitor
    0xb0, 0x00,             //        mov  al, 0         ; that this is all
    0xee,                   //        out  dx, al
    0xeb, 0xfe,             //        jmp  $
];

/// It lies right behind the code; the guest writes its digit over the question mark.
const TEXT: &[u8] = b"Hello from guest ?\n\0";

fn main() -> Result<(), Box<dyn Error>> {
    let root = Root::open()?;
    let mut vm = Vm::create(&root, &"hello".parse()?, "hello")?;
    let result = run(&mut vm);
    vm.destroy()?;
    result
}

fn run(vm: &mut vmm_api::vm::LockedVm) -> Result<(), Box<dyn Error>> {
    // vm_setup_memory
    let mut state = vm.load_state()?;
    let layout = MemoryLayout::split(MemSize(2 << 20));
    vm.setup_memory(
        &mut state,
        &MemorySetup {
            layout,
            ..MemorySetup::default()
        },
    )?;
    let ram = vm.map_memory(&state)?;
    ram.write(CODE, &[GUEST, TEXT].concat())?;

    // vcpu_reset, vm_set_register, vm_set_desc
    let mut registers = Registers::reset();
    let code = registers.desc(SegReg::Cs);
    registers.set(Reg::Cs, 0)?;
    registers.set_desc(SegReg::Cs, 0, code.limit, code.access)?;
    registers.set(Reg::Rip, CODE)?;

    let cpuid = CpuidPolicy {
        topology: Topology::packages(1),
        x2apic: true,
    };
    let policy = VmPolicy {
        cpuid,
        unknown_msr_exits: false,
    };
    let mut vcpu = KvmVm::new(capability::open()?, ram, policy)?.create_vcpu(0)?;
    vcpu.restore(&VcpuState {
        registers,
        ..VcpuState::reset()
    })?;

    loop {
        // vm_run
        match vcpu.run()? {
            VmExit::Port(PortAccess {
                port: 0x510,
                direction: Direction::In,
                ..
            }) => {
                vcpu.pio_data().fill(b'1');
            }
            VmExit::Port(PortAccess { port: 0x3f8, .. }) => {
                std::io::stdout().write_all(vcpu.pio_data())?;
            }
            VmExit::Port(PortAccess { port: 0xf4, .. }) => return Ok(()),
            exit => return Err(format!("unexpected {exit:?}").into()),
        }
    }
}
