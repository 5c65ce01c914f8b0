//! What `--help` says beyond the list of options.

use vmm_api::regs::{Reg, SegReg};

/// Registers, order, output, examples, exit status.
pub(super) fn details() -> String {
    let names = |names: Vec<&str>| {
        names
            .chunks(14)
            .map(|line| format!("\n        {}", line.join(" ")))
            .collect::<String>()
    };
    let registers = names(Reg::all().map(Reg::name).collect()).replace('_', "-");
    let segments = names(SegReg::ALL.iter().map(|s| s.name()).collect());
    format!(
        "\
Registers and descriptors of vCPU --cpu:
  --get-REG, --set-REG=VALUE
      where REG is one of{registers}
      (pdpte0 to pdpte3 can only be read, where the host's KVM tells them)
  --get-desc-SEG
  --set-desc-SEG --desc-base=VALUE --desc-limit=VALUE --desc-access=VALUE
      where SEG is one of{segments}
      Access rights are in VT-x's format. What is not given stays as it is.
  --get-vmcs-..., --get-vmcb-..., --get-avic-..., --set-vmcs-...
      fields of a VMCS or VMCB: not available through KVM, exit status 2

  All changes of one call are made together or not at all.
  Numbers are decimal, hexadecimal with 0x, or octal with 0 in front.

Order:
  Options may be combined, in any order. What they say is done in this one,
  and ends at the first failure: create, set memory, pause, set registers
  and descriptors, set pinning, x2APIC mode, capability and CMOS, balloon,
  disk and link, run until, step, get, reset statistics, inject, snapshot,
  resume, end (power button, reset, power-off or suspend), clone, run,
  destroy.

Output:
  name[cpu]<tab>VALUE                   a register
  name desc[cpu]<tab>BASE/LIMIT/ACCESS  a descriptor
  lowmem<tab>ADDRESS/LENGTH             memory, by its guest-physical
                                        address: KVM does not tell the
                                        host-physical one, which stood
                                        here in 2012
  --get-all ends with a word on what KVM does not tell. Registers,
  addresses and memory are hexadecimal, what is counted is decimal.

Examples:
  vmmctl --list
  vmmctl --vm=guest0 --get-all
  vmmctl --vm=guest0 --cpu=1 --get-rip --get-cr3
  vmmctl --vm=guest0 --pause --set-rip=0x100000 --resume
  vmmctl --vm=guest0 --set-desc-cs --desc-base=0 --desc-limit=0xffffffff \\
        --desc-access=0xa09b
  vmmctl --vm=guest0 --create --set-lowmem=256
  vmmctl --vm=guest0 --cpu=1 --set-pinning=0 --get-pinning --get-intinfo
  vmmctl --vm=guest0 --disasm --x/16xg 0xffffffff81000000 --core g.core
  vmmctl --vm=guest0 --until=do_sys_openat2 --bt --step=3 --resume
  vmmctl --vm=guest0 --force-poweroff --destroy

VMs are directories under $RHYVE_ROOT, by default /dev/shm/rhyve-UID.

Exit status:
   0  all was done; for --host, guests can run here
   1  something failed, one line on standard error says what
   2  something was asked that is not available through KVM
  64  the command line is wrong, nothing was done
  With --run it is rhyve's: see rhyve --help."
    )
}
