//! What vm.json holds: the settled state of a virtual machine.
//!
//! The header ([`FORMAT`], version) is read by a small struct of its own first, so that a file of a
//! newer rhyve is refused by its version and not by some field inside. The types are ours, with
//! named fields; nothing of KVM's binary layouts but opaque bulk.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::encoding::{bulk, hex, hex_map};
use crate::memory::MemoryLayout;
use crate::regs::Registers;
use crate::topology::Topology;

/// The value of vm.json's `format`.
pub const FORMAT: &str = "rhyve-vm";

/// The version that this library writes, and the newest that it reads.
pub const VERSION: u32 = 1;

/// Everything that is kept of a virtual machine, but for its RAM.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VmState {
    /// Counts the writes of this object's state.
    pub generation: u64,
    /// Where in its life the VM is.
    pub phase: Phase,
    /// What concerns the machine as a whole.
    pub machine: MachineState,
    /// The vCPUs by index; those that were never written are in reset.
    pub vcpus: Vec<VcpuState>,
    /// Devices by name.
    #[serde(default)]
    pub devices: BTreeMap<String, DeviceState>,
}

/// The last settled phase. "Running" is none of them: a VM runs while its lock is held by `rhyve`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "lowercase")]
pub enum Phase {
    /// Made, nothing loaded.
    Created,
    /// A kernel and its registers are in place.
    Loaded,
    /// Stopped in the middle, to be run again.
    Suspended,
    /// The guest has ended.
    Stopped {
        /// How it ended.
        reason: StopReason,
        /// What more there is to say, in one line.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        detail: Option<String>,
    },
}

impl Phase {
    /// The phase in one word.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Loaded => "loaded",
            Self::Suspended => "suspended",
            Self::Stopped { .. } => "stopped",
        }
    }
}

impl Phase {
    /// The phase, and how the guest ended if it has.
    pub fn words(&self) -> String {
        match self {
            Self::Stopped { reason, detail } => {
                let detail = detail.as_ref().map(|detail| format!(": {detail}"));
                let reason = reason.words();
                format!("stopped ({reason}{})", detail.unwrap_or_default())
            }
            other => other.word().to_owned(),
        }
    }
}

/// How a guest ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StopReason {
    /// The guest reset itself.
    Reset,
    /// The guest powered itself off.
    PowerOff,
    /// Every vCPU halted with interrupts off.
    Halt,
    /// A fault while handling a double fault.
    TripleFault,
    /// Stopped from outside: a signal, `vmmctl`, the console's escape.
    Stopped,
    /// rhyve was killed while the guest ran: memory is as it was then, registers are as loaded.
    Killed,
    /// The guest wrote to the debug-exit port.
    DebugExit,
    /// The monitor could not go on.
    Error,
}

impl StopReason {
    /// The reason in words.
    pub fn words(self) -> &'static str {
        match self {
            Self::Reset => "reset",
            Self::PowerOff => "power-off",
            Self::Halt => "halt",
            Self::TripleFault => "triple fault",
            Self::Stopped => "stopped from outside",
            Self::Killed => "rhyve was killed",
            Self::DebugExit => "debug exit",
            Self::Error => "error",
        }
    }
}

/// The machine as a whole.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct MachineState {
    /// Where RAM lies.
    pub memory: MemoryLayout,
    /// RAM is allocated up front.
    #[serde(default)]
    pub wired: bool,
    /// How the vCPUs were grouped when it ran last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub topology: Option<Topology>,
    /// The directory that holds the memory file, when it is not the object's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mem_path: Option<std::path::PathBuf>,
    /// Microseconds that the loader took.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub load_us: Option<u64>,
    /// What the loader put there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot: Option<BootInfo>,
    /// How it was run when it was suspended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run: Option<RunInfo>,
    /// The files that it has for its disks, being a copy of another machine.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<OwnDisk>,
}

/// One disk of a copy, which it has in place of an image: its files are removed with its object.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OwnDisk {
    /// The image's absolute path, as options say it.
    pub named: std::path::PathBuf,
    /// A qcow2 image over `base`, with what this machine has written.
    pub layer: std::path::PathBuf,
    /// What was there before, which nobody writes to: a hard link that others of its kind have as well.
    pub base: std::path::PathBuf,
    /// Bytes of the disk's logical and physical blocks.
    pub blocks: (u32, u32),
}

/// A disk image that a guest may write to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WrittenDisk {
    /// Its absolute path as the options say it.
    pub named: std::path::PathBuf,
    /// The absolute path of what is used: the same, or in a copy of a machine [`OwnDisk::layer`].
    pub path: std::path::PathBuf,
    /// How the sectors are in it.
    pub format: DiskFormat,
    /// Bytes of the disk's logical and physical blocks.
    pub blocks: (u32, u32),
}

/// How an image keeps a disk's sectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskFormat {
    /// Byte for byte.
    Raw,
    /// QEMU's copy-on-write format.
    Qcow2,
}

/// The command line of the `rhyve` that a suspended machine goes on with.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunInfo {
    /// Its arguments, without the program's name.
    pub args: Vec<String>,
    /// The directory that relative paths among them start from.
    pub directory: std::path::PathBuf,
    /// The host's monotonic clock when the machine was stopped, in nanoseconds.
    #[serde(default)]
    pub at_ns: u64,
    /// The disk images that its guest may write to; none if they are not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disks: Option<Vec<WrittenDisk>>,
}

impl RunInfo {
    /// Whether there may be disks that are not in `disks`.
    pub fn has_unknown_disks(&self) -> bool {
        let named = |arg: &String| arg.split(',').any(|word| word == "virtio-blk");
        self.disks.is_none() && self.args.iter().any(named)
    }

    /// Removes what makes a machine the one it is, where the options name it: its UUID and the addresses
    /// of its network cards. They are made of the VM's name then.
    pub fn forget_identity(&mut self) {
        let mut args = std::mem::take(&mut self.args).into_iter();
        while let Some(arg) = args.next() {
            if arg == "-U" {
                args.next();
            } else if !arg.starts_with("-U") && !arg.starts_with("-ouuid=") {
                let words = arg.split(',').filter(|word| !word.starts_with("mac="));
                self.args.push(words.collect::<Vec<_>>().join(","));
            }
        }
    }
}

/// What was loaded, for people and for symbol look-ups.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootInfo {
    /// Path of the kernel file.
    pub kernel: String,
    /// Boot protocol: `linux64`, `pvh`, `freebsd`, ...
    pub protocol: String,
    /// Command line, if the protocol has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cmdline: Option<String>,
    /// Where the kernel's symbols are in memory, if its loader put them there, as FreeBSD's does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub symbols: Option<SymbolTables>,
}

/// A kernel's symbols in guest memory, as FreeBSD's loader hands them over (sys/boot/common/load_elf.c,
/// MODINFOMD_SSYM and MODINFOMD_ESYM): the ELF symbol table and then its strings, each behind its
/// length in bytes, a little-endian u64, and padded to a multiple of 8.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SymbolTables {
    /// Guest-physical address of the first length.
    pub start: u64,
    /// Guest-physical address behind the strings.
    pub end: u64,
}

/// One vCPU: what a person asks for by name, and what KVM needs to go on.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct VcpuState {
    /// Every register that bhyve names.
    pub registers: Registers,
    /// Whether it runs, halts or waits to be started; none: as KVM starts it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub activity: Option<Activity>,
    /// Pending exceptions and interrupts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub events: Option<VcpuEvents>,
    /// Model-specific registers by number.
    #[serde(default, with = "hex_map", skip_serializing_if = "BTreeMap::is_empty")]
    pub msrs: BTreeMap<u32, u64>,
    /// The XSAVE area (KVM_GET_XSAVE2), at least 4096 bytes.
    #[serde(default, with = "bulk", skip_serializing_if = "Vec::is_empty")]
    pub xsave: Vec<u8>,
    /// The local APIC's register page (KVM_GET_LAPIC), 1024 bytes.
    #[serde(default, with = "bulk", skip_serializing_if = "Vec::is_empty")]
    pub lapic: Vec<u8>,
    /// Time stamp counter frequency in kHz; none: the host's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tsc_khz: Option<u32>,
    /// The host's monotonic clock when the time stamp counter was read, in nanoseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tsc_at_ns: Option<u64>,
    /// Host processors that it is pinned to; empty: it runs on any.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub pinning: BTreeSet<usize>,
}

impl VcpuState {
    /// A vCPU after power-on.
    pub fn reset() -> Self {
        Self {
            registers: Registers::reset(),
            ..Self::default()
        }
    }
}

/// What a vCPU is doing between instructions (KVM_GET_MP_STATE).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Activity {
    /// Executes.
    Runnable,
    /// Waits for INIT.
    Uninitialized,
    /// Got INIT, waits for SIPI.
    InitReceived,
    /// In HLT.
    Halted,
    /// Got SIPI and is about to start.
    SipiReceived,
}

/// Pending events (KVM_GET_VCPU_EVENTS), the fields that every KVM of the last decade has.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuEvents {
    /// An exception that is being delivered: vector.
    pub exception: Option<u8>,
    /// Its error code, if it has one.
    pub exception_error: Option<u32>,
    /// The exception is pending, not yet injected.
    pub exception_pending: bool,
    /// The exception's payload: CR2 or DR6 bits.
    #[serde(default)]
    pub exception_payload: Option<u64>,
    /// An interrupt that is being delivered: vector.
    pub interrupt: Option<u8>,
    /// That interrupt is INT n.
    pub interrupt_soft: bool,
    /// An NMI is being delivered.
    pub nmi_injected: bool,
    /// An NMI is pending.
    pub nmi_pending: bool,
    /// NMIs are blocked until IRET.
    pub nmi_masked: bool,
    /// Vector of a SIPI that was received.
    pub sipi_vector: u32,
    /// In system management mode.
    pub smm: bool,
    /// A system management interrupt is pending.
    pub smi_pending: bool,
    /// SMM entered with NMIs blocked.
    pub smm_inside_nmi: bool,
    /// INIT is latched.
    pub latched_init: bool,
}

/// A device's state in its own version and shape.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DeviceState {
    /// What kind of device wrote it.
    pub kind: String,
    /// Version of `data`'s shape.
    pub version: u32,
    /// The device's own state.
    pub data: serde_json::Value,
}

/// Why vm.json cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// Not JSON, or not of this shape.
    #[error("damaged; load the VM again, or destroy it")]
    Damaged(#[source] serde_json::Error),
    /// JSON of something else.
    #[error("this is not a VM's state: format is '{0}', not '{FORMAT}'")]
    Format(String),
    /// Written by a newer rhyve.
    #[error(
        "version {0}, this rhyve reads 1-{VERSION}: use the rhyve that wrote it, or destroy the VM"
    )]
    Version(u32),
    /// Not what was written.
    #[error(
        "damaged: its checksum does not agree with what is in it; load the VM again, or destroy it"
    )]
    Checksum,
    /// A value that no rhyve writes.
    #[error("{0}; load the VM again, or destroy it")]
    Value(String),
}

#[derive(Deserialize)]
struct Header {
    format: String,
    version: u32,
    #[serde(default)]
    checksum: Option<String>,
}

#[derive(Serialize)]
struct File<'a> {
    format: &'a str,
    version: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    checksum: Option<&'a str>,
    #[serde(flatten)]
    state: &'a VmState,
}

/// The checksum while it is being made. A file's checksum is the CRC-32 of the file with this in
/// its place.
const NO_CHECKSUM: &str = "00000000";

/// The CRC-32 of a file whose checksum is at `at`.
fn checksum(text: &[u8], at: usize) -> String {
    let mut crc = crc32fast::Hasher::new();
    let (before, rest) = text.split_at(at);
    crc.update(before);
    crc.update(NO_CHECKSUM.as_bytes());
    crc.update(rest.get(NO_CHECKSUM.len()..).unwrap_or_default());
    format!("{:08x}", crc.finalize())
}

/// Where the checksum is, which is right behind the version.
fn find_checksum(text: &[u8], sum: &str) -> Option<usize> {
    let wanted = format!("\"checksum\": \"{sum}\"");
    let mut windows = text.windows(wanted.len()).take(200);
    let at = windows.position(|window| window == wanted.as_bytes())?;
    Some(at + wanted.len() - 1 - sum.len())
}

impl VmState {
    /// The state of an object that was just made, without memory.
    pub fn created() -> Self {
        Self {
            generation: 0,
            phase: Phase::Created,
            machine: MachineState::default(),
            vcpus: vec![VcpuState::reset()],
            devices: BTreeMap::new(),
        }
    }

    /// Reads the text of a vm.json.
    ///
    /// # Errors
    ///
    /// Damaged, of another format or a newer version, or with impossible values.
    pub fn from_json(text: &[u8]) -> Result<Self, StateError> {
        let header: Header = serde_json::from_slice(text).map_err(StateError::Damaged)?;
        if header.format != FORMAT {
            return Err(StateError::Format(header.format));
        }
        if header.version == 0 || header.version > VERSION {
            return Err(StateError::Version(header.version));
        }
        if let Some(sum) = &header.checksum {
            let at = find_checksum(text, sum).filter(|_| sum.len() == NO_CHECKSUM.len());
            if at.is_none_or(|at| checksum(text, at) != *sum) {
                return Err(StateError::Checksum);
            }
        }
        let state: Self = serde_json::from_slice(text).map_err(StateError::Damaged)?;
        // What is to go on as if nothing had been must be what was left, to the last bit.
        if state.phase == Phase::Suspended && header.checksum.is_none() {
            return Err(StateError::Checksum);
        }
        state
            .machine
            .memory
            .validate()
            .map_err(|e| StateError::Value(e.to_string()))?;
        if state.vcpus.is_empty() {
            return Err(StateError::Value("there is no vCPU in it".into()));
        }
        Ok(state)
    }

    /// The text of a vm.json.
    ///
    /// # Errors
    ///
    /// A device's data is no JSON value (a map with keys that are no text).
    pub fn to_json(&self) -> Result<Vec<u8>, serde_json::Error> {
        let suspended = self.phase == Phase::Suspended;
        let mut text = serde_json::to_vec_pretty(&File {
            format: FORMAT,
            version: VERSION,
            checksum: suspended.then_some(NO_CHECKSUM),
            state: self,
        })?;
        text.push(b'\n');
        if let Some(at) = find_checksum(&text, NO_CHECKSUM).filter(|_| suspended) {
            let sum = checksum(&text, at);
            text.splice(at..at + sum.len(), sum.into_bytes());
        }
        Ok(text)
    }
}

/// A register value that is shown in hexadecimal JSON, for protocols outside of this file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Hex(#[serde(with = "hex")] pub u64);

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> VmState {
        let mut state = VmState::created();
        state.phase = Phase::Stopped {
            reason: StopReason::TripleFault,
            detail: None,
        };
        state.vcpus[0].msrs.insert(0xc000_0080, 0x500);
        state.vcpus[0].xsave = vec![1, 2, 3];
        state.vcpus[0].events = Some(VcpuEvents {
            exception: Some(14),
            ..VcpuEvents::default()
        });
        state
    }

    #[test]
    fn state_survives_its_file() {
        let text = sample().to_json().unwrap();
        assert_eq!(VmState::from_json(&text).unwrap(), sample());
    }

    #[test]
    fn a_devices_numbers_survive_to_the_last_bit() {
        let mut state = sample();
        let data = serde_json::json!([1.0715660391465826e-75, -1.603964615428183e143, u64::MAX]);
        let device = DeviceState {
            kind: "clock".into(),
            version: 1,
            data,
        };
        state.devices.insert("clock".into(), device);
        let text = state.to_json().unwrap();
        assert_eq!(VmState::from_json(&text).unwrap(), state);
    }

    #[test]
    fn a_newer_version_is_refused_by_its_number() {
        let text = br#"{"format":"rhyve-vm","version":3,"shape":"unknown"}"#;
        let error = VmState::from_json(text).unwrap_err();
        assert!(matches!(error, StateError::Version(3)));
        assert!(
            error
                .to_string()
                .contains("version 3, this rhyve reads 1-1")
        );
    }

    #[test]
    fn a_suspended_state_is_taken_whole_or_not_at_all() {
        let mut state = sample();
        state.phase = Phase::Suspended;
        let text = state.to_json().unwrap();
        assert_eq!(VmState::from_json(&text).unwrap(), state);
        for at in 0..text.len() {
            for bit in 0..8 {
                let mut flipped = text.clone();
                flipped[at] ^= 1 << bit;
                assert!(VmState::from_json(&flipped).is_err(), "bit {bit} of {at}");
            }
            // Without its last newline it is still whole.
            if at < text.len() - 1 {
                assert!(VmState::from_json(&text[..at]).is_err(), "{at} bytes");
            }
        }
        let text = String::from_utf8(text).unwrap();
        let bare: String = text.lines().filter(|l| !l.contains("checksum")).collect();
        let refused = VmState::from_json(bare.as_bytes()).unwrap_err();
        assert!(matches!(refused, StateError::Checksum), "{refused}");
    }

    #[test]
    fn other_files_are_refused() {
        let refused = |text: &[u8]| VmState::from_json(text).unwrap_err();
        assert!(matches!(refused(b""), StateError::Damaged(_)));
        assert!(matches!(
            refused(br#"{"format":"x","version":1}"#),
            StateError::Format(_)
        ));
        let text = sample().to_json().unwrap();
        assert!(matches!(
            refused(&text[..text.len() / 2]),
            StateError::Damaged(_)
        ));
        let mut none = sample();
        none.vcpus.clear();
        assert!(matches!(
            refused(&none.to_json().unwrap()),
            StateError::Value(_)
        ));
    }

    proptest::proptest! {
        #[test]
        fn garbage_never_panics(mut text in proptest::collection::vec(proptest::num::u8::ANY, 0..64),
                                at in 0usize..4000) {
            let _ = VmState::from_json(&text);
            let mut whole = sample().to_json().unwrap();
            let at = at % whole.len();
            let end = (at + text.len()).min(whole.len());
            whole.splice(at..end, text.drain(..));
            let _ = VmState::from_json(&whole);
        }
    }
}
