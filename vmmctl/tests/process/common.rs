//! What the tests share: a root of their own, vmmctl as a process, and a VM that seems to run.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use assert_cmd::Command;
use tempfile::TempDir;
use vmm_api::control::{Change, ControlTarget, Event, Refusal, RtcState, RunPhase, Server, Status};
use vmm_api::inspect::{
    CmosState, DeviceDetail, LastExit, MachineDetail, MemoryMap, QueueDetail, Region, VcpuDetail,
    VirtioDetail, with_x2apic,
};
use vmm_api::memory::{MemSize, MemoryLayout};
use vmm_api::profile::{Caller, ExitStat, ExitStats};
use vmm_api::regs::Registers;
use vmm_api::root::Root;
use vmm_api::state::{Hex, VcpuEvents, VcpuState, VmState};
use vmm_api::stats::{Stat, StatKind, StatUnit, VcpuStats, VmStats};
use vmm_api::topology::Topology;
use vmm_api::vm::{LockedVm, MemorySetup, Vm};

/// A root that goes away with it.
pub struct Bench {
    dir: TempDir,
    pub root: Root,
}

/// How vmmctl ended: status, standard output, standard error.
pub type Said = (i32, String, String);

impl Bench {
    pub fn new() -> Self {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let root = Root::open_at(&dir.path().join("root")).unwrap();
        Self { dir, root }
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Runs vmmctl with options that are separated by spaces.
    pub fn vmmctl(&self, options: &str) -> Said {
        let program = assert_cmd::cargo::cargo_bin!("vmmctl");
        self.program(program, options)
    }

    pub fn program(&self, program: &Path, options: &str) -> Said {
        let output = Command::new(program)
            .env("RHYVE_ROOT", self.root.path())
            .args(options.split_whitespace())
            .timeout(Duration::from_secs(20))
            .output()
            .unwrap();
        (
            output.status.code().expect("no signal"),
            String::from_utf8(output.stdout).unwrap(),
            String::from_utf8(output.stderr).unwrap(),
        )
    }

    /// vmmctl's output, when all is well.
    pub fn ok(&self, options: &str) -> String {
        let (status, out, err) = self.vmmctl(options);
        assert_eq!((status, &*err), (0, ""), "vmmctl {options}: {out}");
        out
    }

    /// vmmctl's one line of complaint.
    pub fn fails(&self, options: &str, expected: i32) -> String {
        let (status, out, err) = self.vmmctl(options);
        assert_eq!(status, expected, "vmmctl {options}: {out}{err}");
        err
    }

    pub fn json(&self, options: &str) -> serde_json::Value {
        serde_json::from_str(&self.ok(&format!("{options} --json"))).unwrap()
    }

    pub fn vm(&self, name: &str) -> Vm {
        Vm::open(&self.root, &name.parse().unwrap()).unwrap()
    }

    pub fn state(&self, name: &str) -> VmState {
        self.vm(name).load_state().unwrap()
    }

    /// An object with 64 MiB, locked as `program` would.
    pub fn object(&self, name: &str, program: &str) -> LockedVm {
        let mut vm = Vm::create(&self.root, &name.parse().unwrap(), program).unwrap();
        let mut state = vm.load_state().unwrap();
        let setup = MemorySetup {
            layout: MemoryLayout::split(MemSize(64 << 20)),
            ..MemorySetup::default()
        };
        vm.setup_memory(&mut state, &setup).unwrap();
        vm.store(&mut state).unwrap();
        vm
    }

    /// A VM of two vCPUs that seems to run, until it is told to end.
    pub fn running(&self, name: &str) -> Arc<Machine> {
        let vm = self.object(name, "rhyve");
        let machine = Arc::new(Machine {
            inner: Mutex::new(Inner {
                vcpus: [Registers::reset(), Registers::reset()],
                pinning: Default::default(),
                x2apic: false,
                cmos: CmosState::default(),
                phase: RunPhase::Running,
                said: Vec::new(),
            }),
            serving: Mutex::new(None),
        });
        let server = Server::start(&vm, machine.clone(), "rhyve", "0.0.0").unwrap();
        *machine.serving.lock().unwrap() = Some((vm, server));
        machine
    }
}

/// A machine without a hypervisor.
pub struct Machine {
    pub inner: Mutex<Inner>,
    serving: Mutex<Option<(LockedVm, Server)>>,
}

pub struct Inner {
    pub vcpus: [Registers; 2],
    pub pinning: BTreeSet<usize>,
    pub x2apic: bool,
    pub cmos: CmosState,
    pub phase: RunPhase,
    pub said: Vec<String>,
}

impl Machine {
    pub fn said(&self) -> String {
        self.inner.lock().unwrap().said.join(", ")
    }

    fn say(&self, what: &str) -> Result<(), Refusal> {
        self.inner.lock().unwrap().said.push(what.into());
        Ok(())
    }

    /// Ends as rhyve does: from another thread than the one that serves.
    fn end(&self, what: &str) -> Result<(), Refusal> {
        self.say(what)?;
        let serving = self.serving.lock().unwrap().take();
        let (vm, server) = serving.ok_or(Refusal::Ending)?;
        std::thread::spawn(move || {
            server.stop(&vm).unwrap();
            std::thread::sleep(Duration::from_millis(50));
            drop(vm);
        });
        Ok(())
    }

    /// Ends as if killed: nothing is tidied up.
    pub fn kill(&self) {
        let serving = self.serving.lock().unwrap().take();
        drop(serving);
    }
}

impl ControlTarget for Machine {
    fn status(&self) -> Status {
        Status {
            phase: self.inner.lock().unwrap().phase,
            vcpus: 2,
            uptime_ms: 75_000,
            memory: MemoryLayout::split(MemSize(64 << 20)),
        }
    }

    fn registers(&self, vcpu: u32) -> Result<Registers, Refusal> {
        let inner = self.inner.lock().unwrap();
        let found = inner.vcpus.get(vcpu as usize).cloned();
        found.ok_or(Refusal::NoSuchVcpu { vcpu, vcpus: 2 })
    }

    fn update(&self, vcpu: u32, changes: &[Change]) -> Result<(), Refusal> {
        let changed = Change::apply_all(changes, &self.registers(vcpu)?)?;
        self.inner.lock().unwrap().vcpus[vcpu as usize] = changed;
        Ok(())
    }

    fn vcpu_stats(&self, vcpu: u32) -> Result<VcpuStats, Refusal> {
        self.registers(vcpu)?;
        Ok(VcpuStats {
            exits: [("io".into(), 70), ("mmio".into(), 7)].into(),
            guest_ns: 1_000_000,
            host_ns: 2_000,
            kvm: vec![stat("exits", &[4711]), stat("halt_poll_hist", &[1, 2, 3])],
        })
    }

    fn vm_stats(&self) -> Result<VmStats, Refusal> {
        Ok(VmStats {
            counters: [("unhandled ports".into(), 1)].into(),
            kvm: vec![stat("remote_tlb_flush", &[9])],
        })
    }

    fn exits(&self, vcpu: u32) -> Result<ExitStats, Refusal> {
        self.registers(vcpu)?;
        let exit = |reason: &str, write, place: u64, count: u64| ExitStat {
            reason: reason.into(),
            write: Some(write),
            place: Some(Hex(place)),
            device: (reason == "inout").then(|| "com1".into()),
            count,
            host_ns: count * 1500,
            callers: vec![Caller {
                rip: Hex(0xffff_ffff_8100_0000),
                count,
            }],
        };
        Ok(ExitStats {
            span_ns: 2_500_000_000,
            exits: vec![
                exit("inout", true, 0x3f8, 4711),
                exit("mmio", false, 0xfebf_0000, 12),
                exit("inout", false, 0x3fd, 3),
            ],
        })
    }

    fn reset_stats(&self) -> Result<(), Refusal> {
        self.say("reset stats")
    }

    fn pause(&self) -> Result<(), Refusal> {
        self.inner.lock().unwrap().phase = RunPhase::Paused;
        self.say("pause")
    }

    fn resume(&self) -> Result<(), Refusal> {
        self.inner.lock().unwrap().phase = RunPhase::Running;
        self.say("resume")
    }

    fn step(&self, vcpu: u32) -> Result<(), Refusal> {
        let mut registers = self.registers(vcpu)?;
        registers.rip = registers.rip.wrapping_add(1);
        let mut inner = self.inner.lock().unwrap();
        inner.vcpus[vcpu as usize] = registers;
        inner.phase = RunPhase::Paused;
        Ok(())
    }

    fn run_until(&self, address: u64, _: u32) -> Result<Option<u32>, Refusal> {
        let mut inner = self.inner.lock().unwrap();
        inner.vcpus[1].rip = address;
        inner.vcpus[1].cs.base = 0;
        inner.phase = RunPhase::Paused;
        Ok(Some(1))
    }

    fn stop(&self) -> Result<(), Refusal> {
        self.end("stop")
    }

    fn reset(&self) -> Result<(), Refusal> {
        self.end("reset")
    }

    fn power_button(&self) -> Result<(), Refusal> {
        self.say("power button")
    }

    fn nmi(&self, vcpu: u32) -> Result<(), Refusal> {
        self.say(&format!("nmi {vcpu}"))
    }

    fn vcpu_detail(&self, vcpu: u32) -> Result<VcpuDetail, Refusal> {
        self.registers(vcpu)?;
        let inner = self.inner.lock().unwrap();
        let stored = VcpuDetail::stored(vcpu, &VcpuState::reset());
        Ok(VcpuDetail {
            apic_base: with_x2apic(stored.apic_base, inner.x2apic),
            events: VcpuEvents {
                interrupt: Some(48),
                exception: Some(14),
                exception_error: Some(2),
                exception_pending: true,
                ..VcpuEvents::default()
            },
            // As on a KVM that does not tell it of the second.
            tsc_offset: (vcpu == 0).then_some(Hex(0xffff_ffff_0000_0000)),
            exit: Some(LastExit {
                reason: 2,
                name: "inout".into(),
            }),
            pinning: inner.pinning.clone(),
            capabilities: [("hlt_exit".into(), true), ("rdpid".into(), false)].into(),
            ..stored
        })
    }

    fn machine_detail(&self) -> Result<MachineDetail, Refusal> {
        let mut state = VmState::created();
        state.machine.memory = self.status().memory;
        let devices = [Region::device("ioapic", 0xfec0_0000, 0x1000)];
        let held = self.status().phase == RunPhase::Paused;
        Ok(MachineDetail {
            topology: Topology::packages(2),
            max_vcpus: Some(1024),
            active: [0, 1].into(),
            suspended: if held { [0, 1].into() } else { [].into() },
            memory_map: MemoryMap::new(state.machine.memory, false, &devices),
        })
    }

    fn devices(&self) -> Result<Vec<DeviceDetail>, Refusal> {
        let words = |words: &[&str]| words.iter().map(|&word| word.to_owned()).collect();
        let bridge = DeviceDetail {
            slot: "0:0:0".into(),
            kind: "hostbridge".into(),
            ..DeviceDetail::default()
        };
        let disk = DeviceDetail {
            slot: "0:2:0".into(),
            kind: "virtio-blk".into(),
            virtio: Some(VirtioDetail {
                offered: "transitional".into(),
                transport: Some("modern".into()),
                status: words(&["acknowledge", "driver", "features-ok", "driver-ok"]),
                interrupts: "msi-x".into(),
                features: words(&["flush", "version-1"]),
                declined: Vec::new(),
                queues: vec![QueueDetail {
                    index: 0,
                    size: 256,
                    next_avail: 12,
                    next_used: 11,
                    requests: 65_547,
                    interrupts: 40_000,
                }],
            }),
            properties: [("image".into(), "disk.img".into())].into(),
            counters: [("bytes read".into(), 4096), ("reads".into(), 1)].into(),
        };
        let idle = DeviceDetail {
            slot: "0:3:0".into(),
            kind: "virtio-rnd".into(),
            virtio: Some(VirtioDetail {
                offered: "legacy".into(),
                interrupts: "intx".into(),
                ..VirtioDetail::default()
            }),
            ..DeviceDetail::default()
        };
        Ok(vec![bridge, disk, idle])
    }

    fn set_balloon(&self, bytes: u64) -> Result<(), Refusal> {
        self.say(&format!("balloon {bytes}"))
    }

    fn pin(&self, _: u32, cpus: &BTreeSet<usize>) -> Result<(), Refusal> {
        self.inner.lock().unwrap().pinning = cpus.clone();
        Ok(())
    }

    fn set_x2apic(&self, _: u32, on: bool) -> Result<(), Refusal> {
        self.inner.lock().unwrap().x2apic = on;
        Ok(())
    }

    fn inject(&self, vcpu: u32, event: Event) -> Result<(), Refusal> {
        self.say(&format!("{event:?} for {vcpu}"))
    }

    fn rtc(&self) -> Result<RtcState, Refusal> {
        let inner = self.inner.lock().unwrap();
        Ok(RtcState {
            seconds: 1_334_102_398,
            nvram: inner.cmos.nvram.clone(),
        })
    }

    fn set_rtc_time(&self, seconds: i64) -> Result<(), Refusal> {
        self.say(&format!("time {seconds}"))
    }

    fn set_rtc_nvram(&self, offset: u8, value: u8) -> Result<(), Refusal> {
        self.inner.lock().unwrap().cmos.nvram[usize::from(offset)] = value;
        Ok(())
    }
}

fn stat(name: &str, values: &[u64]) -> Stat {
    Stat {
        name: name.into(),
        kind: StatKind::Cumulative,
        unit: StatUnit::None,
        exponent: 0,
        base: 10,
        bucket: None,
        values: values.to_vec(),
    }
}
