//! A vCPU's registers: the names bhyve gives them, and the values as one plain struct.
//!
//! [`Registers`] is what is stored in vm.json, what `KVM_GET_REGS` and its relatives fill, and what
//! the control socket carries; [`Reg`] and [`SegReg`] address its fields by bhyve's names
//! (`VM_REG_GUEST_*` of sys/amd64/include/vmm.h).

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::encoding::hex;

/// A segment register with its hidden part, access rights in the VMX format.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Segment {
    /// The selector.
    pub selector: u16,
    /// Linear base address.
    #[serde(with = "hex")]
    pub base: u64,
    /// Limit in bytes, inclusive; never in pages, whatever the granularity bit says.
    pub limit: u32,
    /// Access rights (Intel SDM volume 3, 24.4.1, table 24-2).
    pub access: Access,
}

/// Access rights of a segment in the VMX format: type in bits 0-3, S 4, DPL 5-6, P 7, AVL 12, L 13,
/// D/B 14, G 15, unusable 16.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Access(pub u32);

impl Access {
    /// The bits that have a meaning.
    pub const VALID: u32 = 0x1_f0ff;

    /// Segment type, with the accessed or busy bit.
    pub fn kind(self) -> u8 {
        (self.0 & 0xf) as u8
    }

    /// Descriptor privilege level, 0 to 3.
    pub fn dpl(self) -> u8 {
        (self.0 >> 5 & 3) as u8
    }

    /// One bit by its number in the VMX format.
    pub fn bit(self, n: u32) -> bool {
        self.0 >> n & 1 != 0
    }

    /// Puts access rights together from their parts: `flags` are pairs of bit number and value.
    pub fn from_parts(kind: u8, dpl: u8, flags: [(u32, bool); 7]) -> Self {
        let bits = flags
            .iter()
            .fold(0, |bits, &(n, set)| bits | u32::from(set) << n);
        Self(u32::from(kind & 0xf) | u32::from(dpl & 3) << 5 | bits)
    }
}

/// GDTR or IDTR.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Table {
    /// Linear base address.
    #[serde(with = "hex")]
    pub base: u64,
    /// Limit in bytes, inclusive.
    pub limit: u16,
}

macro_rules! registers {
    ($(#[$doc:meta] $field:ident $variant:ident),* $(,)?) => {
        /// Every register of a vCPU that bhyve names.
        #[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
        pub struct Registers {
            $(#[$doc] #[serde(with = "hex")] pub $field: u64,)*
            /// Code segment.
            pub cs: Segment,
            /// Data segment.
            pub ds: Segment,
            /// Extra segment.
            pub es: Segment,
            /// FS segment.
            pub fs: Segment,
            /// GS segment.
            pub gs: Segment,
            /// Stack segment.
            pub ss: Segment,
            /// Task register.
            pub tr: Segment,
            /// Local descriptor table register.
            pub ldtr: Segment,
            /// Global descriptor table register.
            pub gdtr: Table,
            /// Interrupt descriptor table register.
            pub idtr: Table,
            /// The page directory pointers of PAE paging, where KVM tells them (KVM_GET_SREGS2).
            #[serde(default, skip_serializing_if = "Option::is_none")]
            pub pdpte: Option<[u64; 4]>,
        }

        /// The name of a register whose value is one number.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Reg {
            $(#[$doc] $variant,)*
            /// Selector of the code segment.
            Cs,
            /// Selector of the data segment.
            Ds,
            /// Selector of the extra segment.
            Es,
            /// Selector of the FS segment.
            Fs,
            /// Selector of the GS segment.
            Gs,
            /// Selector of the stack segment.
            Ss,
            /// Selector of the task register.
            Tr,
            /// Selector of the local descriptor table register.
            Ldtr,
            /// Base of the FS segment (bhyve's FS_BASE).
            FsBase,
            /// Base of the GS segment (bhyve's GS_BASE).
            GsBase,
            /// PAE page directory pointer 0.
            Pdpte0,
            /// PAE page directory pointer 1.
            Pdpte1,
            /// PAE page directory pointer 2.
            Pdpte2,
            /// PAE page directory pointer 3.
            Pdpte3,
        }

        const WORDS: &[(Reg, &str)] = &[$((Reg::$variant, stringify!($field)),)*];

        impl Registers {
            fn word(&self, reg: Reg) -> Option<u64> {
                match reg { $(Reg::$variant => Some(self.$field),)* _ => None }
            }

            fn word_mut(&mut self, reg: Reg) -> Option<&mut u64> {
                match reg { $(Reg::$variant => Some(&mut self.$field),)* _ => None }
            }
        }
    };
}

registers! {
    /// Extended feature enable register (MSR 0xc0000080).
    efer Efer,
    /// Control register 0.
    cr0 Cr0,
    /// Control register 2: the last page fault's linear address.
    cr2 Cr2,
    /// Control register 3.
    cr3 Cr3,
    /// Control register 4.
    cr4 Cr4,
    /// Control register 8: the task priority (bhyve's TPR).
    cr8 Cr8,
    /// Extended control register 0: the enabled XSAVE features.
    xcr0 Xcr0,
    /// Debug address 0.
    dr0 Dr0,
    /// Debug address 1.
    dr1 Dr1,
    /// Debug address 2.
    dr2 Dr2,
    /// Debug address 3.
    dr3 Dr3,
    /// Debug status.
    dr6 Dr6,
    /// Debug control.
    dr7 Dr7,
    /// Stack pointer.
    rsp Rsp,
    /// Instruction pointer.
    rip Rip,
    /// Accumulator.
    rax Rax,
    /// Base.
    rbx Rbx,
    /// Counter.
    rcx Rcx,
    /// Data.
    rdx Rdx,
    /// Source index.
    rsi Rsi,
    /// Destination index.
    rdi Rdi,
    /// Frame pointer.
    rbp Rbp,
    /// General register 8.
    r8 R8,
    /// General register 9.
    r9 R9,
    /// General register 10.
    r10 R10,
    /// General register 11.
    r11 R11,
    /// General register 12.
    r12 R12,
    /// General register 13.
    r13 R13,
    /// General register 14.
    r14 R14,
    /// General register 15.
    r15 R15,
    /// Flags.
    rflags Rflags,
    /// The GS base that SWAPGS swaps in (MSR 0xc0000102; bhyve's KGS_BASE).
    kgs_base KgsBase,
    /// Interrupts held off for one instruction: bit 0 after STI, bit 1 after MOV SS.
    intr_shadow IntrShadow,
}

const OTHERS: &[(Reg, &str)] = &[
    (Reg::Cs, "cs"),
    (Reg::Ds, "ds"),
    (Reg::Es, "es"),
    (Reg::Fs, "fs"),
    (Reg::Gs, "gs"),
    (Reg::Ss, "ss"),
    (Reg::Tr, "tr"),
    (Reg::Ldtr, "ldtr"),
    (Reg::FsBase, "fs_base"),
    (Reg::GsBase, "gs_base"),
    (Reg::Pdpte0, "pdpte0"),
    (Reg::Pdpte1, "pdpte1"),
    (Reg::Pdpte2, "pdpte2"),
    (Reg::Pdpte3, "pdpte3"),
];

/// The name of a segment or descriptor table register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SegReg {
    /// Code segment.
    Cs,
    /// Data segment.
    Ds,
    /// Extra segment.
    Es,
    /// FS segment.
    Fs,
    /// GS segment.
    Gs,
    /// Stack segment.
    Ss,
    /// Task register.
    Tr,
    /// Local descriptor table register.
    Ldtr,
    /// Global descriptor table register: base and limit only.
    Gdtr,
    /// Interrupt descriptor table register: base and limit only.
    Idtr,
}

/// Why a register cannot be read or set.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RegError {
    /// No register has this name.
    #[error("no register is named '{0}'")]
    Unknown(String),
    /// A page directory pointer without PAE paging, or on a KVM without KVM_GET_SREGS2.
    #[error("register {0} has no value: PAE paging is off, or this machine's KVM does not tell it")]
    Unavailable(Reg),
    /// The value has more bits than the register.
    #[error("value {value:#x} does not fit in register {reg} ({bits} bits)")]
    TooWide {
        /// The register.
        reg: Reg,
        /// What was to be set.
        value: u64,
        /// The register's width.
        bits: u32,
    },
    /// The register can be read but not set.
    #[error("register {0} cannot be set")]
    ReadOnly(Reg),
    /// The descriptor's limit is wider than a table limit.
    #[error("limit {limit:#x} of {seg} does not fit in 16 bits")]
    TableLimit {
        /// GDTR or IDTR.
        seg: SegReg,
        /// What was to be set.
        limit: u32,
    },
    /// Access rights with bits that mean nothing.
    #[error("access rights {0:#x} have bits outside of {valid:#x}", valid = Access::VALID)]
    Access(u32),
}

impl Reg {
    /// Every register, in the order in which they are shown.
    pub fn all() -> impl Iterator<Item = Reg> {
        WORDS.iter().chain(OTHERS).map(|&(reg, _)| reg)
    }

    /// bhyve's name in lower case.
    pub fn name(self) -> &'static str {
        WORDS
            .iter()
            .chain(OTHERS)
            .find(|&&(reg, _)| reg == self)
            .map_or("", |&(_, name)| name)
    }
}

impl fmt::Display for Reg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Reg {
    type Err = RegError;

    fn from_str(s: &str) -> Result<Self, RegError> {
        let found = WORDS.iter().chain(OTHERS).find(|&&(_, name)| name == s);
        found
            .map(|&(reg, _)| reg)
            .ok_or_else(|| RegError::Unknown(s.to_owned()))
    }
}

impl SegReg {
    /// Every segment and table register, in the order in which they are shown.
    pub const ALL: [SegReg; 10] = [
        Self::Ds,
        Self::Es,
        Self::Fs,
        Self::Gs,
        Self::Ss,
        Self::Cs,
        Self::Tr,
        Self::Ldtr,
        Self::Gdtr,
        Self::Idtr,
    ];

    /// The name in lower case.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cs => "cs",
            Self::Ds => "ds",
            Self::Es => "es",
            Self::Fs => "fs",
            Self::Gs => "gs",
            Self::Ss => "ss",
            Self::Tr => "tr",
            Self::Ldtr => "ldtr",
            Self::Gdtr => "gdtr",
            Self::Idtr => "idtr",
        }
    }
}

impl fmt::Display for SegReg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for SegReg {
    type Err = RegError;

    fn from_str(s: &str) -> Result<Self, RegError> {
        let found = Self::ALL.into_iter().find(|seg| seg.name() == s);
        found.ok_or_else(|| RegError::Unknown(s.to_owned()))
    }
}

impl Registers {
    /// A vCPU after power-on or INIT (libvmmapi's vcpu_reset; Intel SDM volume 3, table 9-1).
    pub fn reset() -> Self {
        let data = Segment {
            selector: 0,
            base: 0,
            limit: 0xffff,
            access: Access(0x93),
        };
        let system = |access| Segment {
            access: Access(access),
            ..data
        };
        Self {
            rflags: 0x2,
            rip: 0xfff0,
            cr0: 0x6000_0010,
            rdx: 0xf00,
            dr6: 0xffff_0ff0,
            dr7: 0x400,
            xcr0: 1,
            cs: Segment {
                selector: 0xf000,
                base: 0xffff_0000,
                ..data
            },
            ds: data,
            es: data,
            fs: data,
            gs: data,
            ss: data,
            tr: system(0x8b),
            ldtr: system(0x82),
            gdtr: Table {
                base: 0,
                limit: 0xffff,
            },
            idtr: Table {
                base: 0,
                limit: 0xffff,
            },
            ..Self::default()
        }
    }

    /// The value of one register, zero-extended.
    ///
    /// # Errors
    ///
    /// The host's KVM does not tell it.
    pub fn get(&self, reg: Reg) -> Result<u64, RegError> {
        let pdpte = |n: usize| self.pdpte.map(|p| p[n]).ok_or(RegError::Unavailable(reg));
        Ok(match reg {
            Reg::Cs => self.cs.selector.into(),
            Reg::Ds => self.ds.selector.into(),
            Reg::Es => self.es.selector.into(),
            Reg::Fs => self.fs.selector.into(),
            Reg::Gs => self.gs.selector.into(),
            Reg::Ss => self.ss.selector.into(),
            Reg::Tr => self.tr.selector.into(),
            Reg::Ldtr => self.ldtr.selector.into(),
            Reg::FsBase => self.fs.base,
            Reg::GsBase => self.gs.base,
            Reg::Pdpte0 => pdpte(0)?,
            Reg::Pdpte1 => pdpte(1)?,
            Reg::Pdpte2 => pdpte(2)?,
            Reg::Pdpte3 => pdpte(3)?,
            word => self.word(word).ok_or(RegError::Unavailable(word))?,
        })
    }

    /// Sets one register.
    ///
    /// # Errors
    ///
    /// The value is wider than the register, or the register can only be read.
    pub fn set(&mut self, reg: Reg, value: u64) -> Result<(), RegError> {
        if let Some(seg) = self.selector_mut(reg) {
            *seg = u16::try_from(value).map_err(|_| RegError::TooWide {
                reg,
                value,
                bits: 16,
            })?;
            return Ok(());
        }
        match reg {
            Reg::FsBase => self.fs.base = value,
            Reg::GsBase => self.gs.base = value,
            Reg::IntrShadow if value > 3 => {
                return Err(RegError::TooWide {
                    reg,
                    value,
                    bits: 2,
                });
            }
            Reg::Cr8 if value > 15 => {
                return Err(RegError::TooWide {
                    reg,
                    value,
                    bits: 4,
                });
            }
            word => *self.word_mut(word).ok_or(RegError::ReadOnly(reg))? = value,
        }
        Ok(())
    }

    fn selector_mut(&mut self, reg: Reg) -> Option<&mut u16> {
        Some(match reg {
            Reg::Cs => &mut self.cs.selector,
            Reg::Ds => &mut self.ds.selector,
            Reg::Es => &mut self.es.selector,
            Reg::Fs => &mut self.fs.selector,
            Reg::Gs => &mut self.gs.selector,
            Reg::Ss => &mut self.ss.selector,
            Reg::Tr => &mut self.tr.selector,
            Reg::Ldtr => &mut self.ldtr.selector,
            _ => return None,
        })
    }

    /// A segment's hidden part; a table register has neither selector nor access rights.
    pub fn desc(&self, seg: SegReg) -> Segment {
        let table = |t: Table| Segment {
            base: t.base,
            limit: t.limit.into(),
            ..Segment::default()
        };
        match seg {
            SegReg::Cs => self.cs,
            SegReg::Ds => self.ds,
            SegReg::Es => self.es,
            SegReg::Fs => self.fs,
            SegReg::Gs => self.gs,
            SegReg::Ss => self.ss,
            SegReg::Tr => self.tr,
            SegReg::Ldtr => self.ldtr,
            SegReg::Gdtr => table(self.gdtr),
            SegReg::Idtr => table(self.idtr),
        }
    }

    /// Sets a segment's base, limit and access rights; its selector stays.
    ///
    /// # Errors
    ///
    /// Access rights with undefined bits, or a table limit beyond 16 bits.
    pub fn set_desc(
        &mut self,
        seg: SegReg,
        base: u64,
        limit: u32,
        access: Access,
    ) -> Result<(), RegError> {
        let target = match seg {
            SegReg::Cs => &mut self.cs,
            SegReg::Ds => &mut self.ds,
            SegReg::Es => &mut self.es,
            SegReg::Fs => &mut self.fs,
            SegReg::Gs => &mut self.gs,
            SegReg::Ss => &mut self.ss,
            SegReg::Tr => &mut self.tr,
            SegReg::Ldtr => &mut self.ldtr,
            SegReg::Gdtr | SegReg::Idtr => {
                let limit =
                    u16::try_from(limit).map_err(|_| RegError::TableLimit { seg, limit })?;
                let table = if seg == SegReg::Gdtr {
                    &mut self.gdtr
                } else {
                    &mut self.idtr
                };
                *table = Table { base, limit };
                return Ok(());
            }
        };
        if access.0 & !Access::VALID != 0 {
            return Err(RegError::Access(access.0));
        }
        *target = Segment {
            selector: target.selector,
            base,
            limit,
            access,
        };
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_register_is_found_by_its_name() {
        for reg in Reg::all() {
            assert_eq!(reg.name().parse(), Ok(reg));
        }
        for seg in SegReg::ALL {
            assert_eq!(seg.name().parse(), Ok(seg));
        }
        assert_eq!("eip".parse::<Reg>(), Err(RegError::Unknown("eip".into())));
    }

    #[test]
    fn what_is_set_is_read_back_and_nothing_else_changes() {
        for reg in Reg::all() {
            let before = Registers::reset();
            let mut after = before.clone();
            match after.set(reg, 3) {
                Ok(()) => assert_eq!(after.get(reg), Ok(3), "{reg}"),
                Err(e) => assert_eq!(e, RegError::ReadOnly(reg)),
            }
            let changed = Reg::all().filter(|&r| before.get(r) != after.get(r));
            assert!(
                changed.collect::<Vec<_>>().iter().all(|&r| r == reg),
                "{reg}"
            );
        }
    }

    #[test]
    fn values_too_wide_are_refused() {
        let mut regs = Registers::reset();
        assert!(matches!(
            regs.set(Reg::Cs, 0x1_0000),
            Err(RegError::TooWide { bits: 16, .. })
        ));
        assert!(matches!(
            regs.set(Reg::Cr8, 16),
            Err(RegError::TooWide { bits: 4, .. })
        ));
        assert!(regs.set_desc(SegReg::Gdtr, 0, 0x1_0000, Access(0)).is_err());
        assert_eq!(
            regs.set_desc(SegReg::Cs, 0, 0, Access(0x100)),
            Err(RegError::Access(0x100))
        );
    }

    #[test]
    fn registers_survive_json() {
        let mut regs = Registers::reset();
        regs.rax = u64::MAX;
        regs.pdpte = Some([1, 2, 3, 4]);
        let json = serde_json::to_string(&regs).unwrap();
        assert!(json.contains(r#""rax":"0xffffffffffffffff""#));
        assert_eq!(serde_json::from_str::<Registers>(&json).unwrap(), regs);
    }
}
