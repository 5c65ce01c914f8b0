//! What KVM keeps of a machine outside of its vCPUs: both 8259s, the I/O APIC, the interval timer
//! and the paravirtual clock, out of KVM and back into it.
//!
//! The types are ours, with named fields, for they are stored. Values are those of KVM's structures
//! of the same names (linux/kvm.h, Documentation/virt/kvm/api.rst).

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data,
    kvm_ioapic_state, kvm_irqchip, kvm_pic_state, kvm_pit_channel_state, kvm_pit_state2,
};
use serde::{Deserialize, Serialize};

use super::{Away, KvmError, KvmVm, host_ns, ioctl};

macro_rules! mirror {
    ($(#[$doc:meta])* $name:ident of $kvm:ident { $($field:ident: $type:ty),* $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(deny_unknown_fields)]
        #[allow(missing_docs, reason = "as the kernel's structure names them")]
        pub struct $name { $(pub $field: $type),* }

        impl From<&$kvm> for $name {
            fn from(kvm: &$kvm) -> Self {
                Self { $($field: kvm.$field),* }
            }
        }

        impl From<&$name> for $kvm {
            fn from(state: &$name) -> Self {
                // What is not named is padding.
                #[allow(clippy::needless_update, reason = "some structures have padding")]
                Self { $($field: state.$field,)* ..Self::default() }
            }
        }
    };
}

mirror! {
    /// An 8259.
    Pic of kvm_pic_state {
        last_irr: u8, irr: u8, imr: u8, isr: u8, priority_add: u8, irq_base: u8,
        read_reg_select: u8, poll: u8, special_mask: u8, init_state: u8, auto_eoi: u8,
        rotate_on_auto_eoi: u8, special_fully_nested_mode: u8, init4: u8, elcr: u8, elcr_mask: u8,
    }
}

mirror! {
    /// A channel of the interval timer. When it was loaded is not part of it: KVM loads it anew.
    PitChannel of kvm_pit_channel_state {
        count: u32, latched_count: u16, count_latched: u8, status_latched: u8, status: u8,
        read_state: u8, write_state: u8, write_latch: u8, rw_mode: u8, mode: u8, bcd: u8, gate: u8,
    }
}

/// The I/O APIC.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IoApic {
    /// Where it is.
    pub base_address: u64,
    /// The selected register.
    pub ioregsel: u32,
    /// Its id.
    pub id: u32,
    /// Pins that request.
    pub irr: u32,
    /// Redirection entries.
    pub redirtbl: [u64; 24],
}

/// All of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChipState {
    /// The 8259s, the first one first.
    pub pics: [Pic; 2],
    /// The I/O APIC.
    pub ioapic: IoApic,
    /// The interval timer's channels.
    pub pit: [PitChannel; 3],
    /// Its KVM_PIT_FLAGS_*.
    pub pit_flags: u32,
    /// The paravirtual clock, in nanoseconds.
    pub clock_ns: u64,
    /// The host's monotonic clock when that was read.
    pub clock_at_ns: u64,
}

impl ChipState {
    /// The name in [`crate::state::VmState::devices`], and the kind there.
    pub const NAME: &'static str = "kvm-chips";
    /// Version of the shape.
    pub const VERSION: u32 = 1;
}

impl KvmVm {
    /// What KVM keeps beside vCPUs, which must not run meanwhile.
    ///
    /// # Errors
    ///
    /// KVM refuses a read; the error says which.
    pub fn capture_chips(&self) -> Result<ChipState, KvmError> {
        let chip = |chip_id| {
            let mut chip = kvm_irqchip {
                chip_id,
                ..kvm_irqchip::default()
            };
            self.fd
                .get_irqchip(&mut chip)
                .map_err(ioctl("tell the state of an interrupt controller"))?;
            Ok::<_, KvmError>(chip)
        };
        let pic = |id| {
            // SAFETY: the union holds an 8259's state, for that is the chip asked for.
            Ok::<_, KvmError>(unsafe { Pic::from(&chip(id)?.chip.pic) })
        };
        // SAFETY: likewise an I/O APIC's.
        let ioapic = unsafe { chip(KVM_IRQCHIP_IOAPIC)?.chip.ioapic };
        let pit = self
            .fd
            .get_pit2()
            .map_err(ioctl("tell the state of the interval timer"))?;
        let clock = self
            .fd
            .get_clock()
            .map_err(ioctl("tell its paravirtual clock"))?;
        Ok(ChipState {
            pics: [pic(KVM_IRQCHIP_PIC_MASTER)?, pic(KVM_IRQCHIP_PIC_SLAVE)?],
            ioapic: IoApic {
                base_address: ioapic.base_address,
                ioregsel: ioapic.ioregsel,
                id: ioapic.id,
                irr: ioapic.irr,
                // SAFETY: both members of an entry's union are its 64 bits.
                redirtbl: ioapic.redirtbl.map(|entry| unsafe { entry.bits }),
            },
            pit: [0, 1, 2].map(|n| PitChannel::from(&pit.channels[n])),
            pit_flags: pit.flags,
            clock_ns: clock.clock,
            clock_at_ns: host_ns(),
        })
    }

    /// Puts that back. The vCPUs' local APICs come before it, because what the I/O APIC has pending
    /// goes to them at once; the levels of interrupt lines come after it, from the devices.
    ///
    /// # Errors
    ///
    /// KVM refuses a part; the error says which.
    pub fn restore_chips(&self, state: &ChipState, away: Away) -> Result<(), KvmError> {
        let pics = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE];
        for (chip_id, pic) in pics.into_iter().zip(&state.pics) {
            let mut chip = kvm_irqchip {
                chip_id,
                ..kvm_irqchip::default()
            };
            chip.chip.pic = pic.into();
            self.fd
                .set_irqchip(&chip)
                .map_err(ioctl("take the state of an 8259"))?;
        }
        let mut ioapic = kvm_ioapic_state {
            base_address: state.ioapic.base_address,
            ioregsel: state.ioapic.ioregsel,
            id: state.ioapic.id,
            irr: state.ioapic.irr,
            ..kvm_ioapic_state::default()
        };
        for (entry, &bits) in ioapic.redirtbl.iter_mut().zip(&state.ioapic.redirtbl) {
            entry.bits = bits;
        }
        let mut chip = kvm_irqchip {
            chip_id: KVM_IRQCHIP_IOAPIC,
            ..kvm_irqchip::default()
        };
        chip.chip.ioapic = ioapic;
        self.fd
            .set_irqchip(&chip)
            .map_err(ioctl("take the state of the I/O APIC"))?;
        let mut pit = kvm_pit_state2 {
            flags: state.pit_flags,
            ..kvm_pit_state2::default()
        };
        for (channel, stored) in pit.channels.iter_mut().zip(&state.pit) {
            *channel = stored.into();
        }
        self.fd
            .set_pit2(&pit)
            .map_err(ioctl("take the state of the interval timer"))?;
        let passed = away.ticks_since(state.clock_at_ns, 1_000_000_000);
        self.fd
            .set_clock(&kvm_clock_data {
                clock: state.clock_ns.wrapping_add(passed),
                ..kvm_clock_data::default()
            })
            .map_err(ioctl("set its paravirtual clock"))
    }
}
