//! What is done with one VM, in 2012's order.

use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::Command;
use std::time::Duration;

use vmm_api::control::{Change, Event};
use vmm_api::memory::{HIGHMEM_BASE, MemSize, MemoryLayout};
use vmm_api::regs::{Reg, RegError, Registers, SegReg};
use vmm_api::root::Root;
use vmm_api::state::Phase;
use vmm_api::vm::{MemorySetup, VmError};

use crate::cli::{Disk, End, Gets, Link, Sets, Work};
use crate::detail;
use crate::devices;
use crate::error::{Error, Status};
use crate::exits;
use crate::interrupt::Interrupt;
use crate::look;
use crate::output::Output;
use crate::stepping;
use crate::target::{self, VcpuAccess};

/// How long a VM may take to end by force: its last state is stored meanwhile.
const END_WAIT: Duration = Duration::from_secs(30);

/// Does all of it, up to the first failure.
///
/// # Errors
///
/// The first failure; what was done before it stays done, and what was found out is in `output`.
pub fn work(work: &Work, output: &mut Output) -> Result<Status, Error> {
    if !work.unavailable_sets.is_empty() {
        return Err(Error::Unavailable(work.unavailable_sets.clone()));
    }
    if work.passthru {
        return Err(Error::Passthru);
    }
    let root = Root::open()?;
    output.field("vm", work.vm.as_str());
    if work.create {
        target::create(&root, &work.vm)?;
        output.done("create");
    }
    if work.lowmem.is_some() || work.highmem.is_some() || work.mem.is_some() {
        set_memory(&root, work)?;
        output.done("set-memory");
    }
    let changes = !work.registers.is_empty() || !work.descriptors.is_empty();
    let events = work.nmi || work.lapic_lvt.is_some();
    let live = work.pause
        || work.balloon.is_some()
        || work.disk.is_some()
        || work.link.is_some()
        || work.until.is_some()
        || work.step.is_some()
        || work.reset_stats
        || events
        || work.resume
        || work.end.is_some();
    let sets = work.sets != Sets::default();
    if changes || sets || live || work.snapshot.is_some() || work.gets != Gets::default() {
        let mut access = target::open(&root, &work.vm)?;
        output.field("cpu", work.cpu);
        if work.pause {
            access.live()?.pause()?;
            output.done("pause");
        }
        if changes {
            update(&mut *access, work)?;
            output.done("set");
        }
        detail::set(&mut *access, work, output)?;
        if let Some(size) = work.balloon {
            access.live()?.set_balloon(size.0)?;
            output.done("set-balloon");
        }
        if let Some(Disk { slot, size }) = &work.disk {
            let bytes = size.map(|size| size.0);
            access.live()?.set_disk(slot, bytes)?;
            output.done("set-disk");
        }
        if let Some(Link { slot, up }) = &work.link {
            access.live()?.set_link(slot, *up)?;
            output.done("set-link");
        }
        if let Some(place) = &work.until {
            stepping::until(&mut *access, work, place, output)?;
            output.done("until");
        }
        if let Some(count) = work.step {
            stepping::step(&mut *access, work, count, output)?;
            output.done("step");
        }
        output.field("phase", access.phase()?);
        get(&mut *access, work, output)?;
        if work.reset_stats {
            access.live()?.reset_stats()?;
            output.done("reset-stats");
        }
        if let Some(pin) = work.lapic_lvt {
            let event = Event::LocalPin { pin };
            access.live()?.inject(work.cpu, event)?;
            output.done("assert-lapic-lvt");
        }
        if work.nmi {
            access.live()?.nmi(work.cpu)?;
            output.done("inject-nmi");
        }
        if let Some(name) = &work.snapshot {
            access.snapshot(name)?;
            output.done("snapshot");
        }
        if work.resume {
            access.live()?.resume()?;
            output.done("resume");
        }
        if let Some(end) = &work.end {
            if let End::Suspend(Some(name)) = end {
                // What it does after that would be lost.
                let _interrupt = Interrupt::new()?;
                access.live()?.pause()?;
                if let Err(error) = access.snapshot(name) {
                    access.live()?.resume()?;
                    return Err(error);
                }
            }
            let client = access.live()?;
            let step = match end {
                End::PowerButton => client.power_button().map(|()| "power-button"),
                End::Reset => client.reset().map(|()| "force-reset"),
                End::PowerOff => client.stop().map(|()| "force-poweroff"),
                End::Suspend(None) => client.suspend().map(|()| "suspend"),
                End::Suspend(Some(_)) => client.stop().map(|()| "suspend"),
            };
            let step = step?;
            drop(access);
            if *end != End::PowerButton {
                target::wait_for_end(&root, &work.vm, END_WAIT)?;
            }
            output.done(step);
        }
    }
    if let Some(name) = &work.clone {
        let locked = target::lock(&root, &work.vm).map_err(|error| match error {
            Error::Vm(VmError::Busy { name, holder }) if holder.program == "rhyve" => {
                Error::CloneOfRunning(name)
            }
            error => error,
        })?;
        locked.clone_to(&root, name, target::PROGRAM)?;
        output.done("clone");
    }
    let mut status = Status::Done;
    if work.run {
        // Whatever was found out comes before what the guest says.
        output.print()?;
        status = run(work)?;
    }
    if work.destroy {
        target::lock(&root, &work.vm)?.destroy()?;
        output.done("destroy");
    }
    Ok(status)
}

/// vm_setup_memory with what was asked for, and the other segment as it is. Memory whose size does
/// not change keeps what is in it.
fn set_memory(root: &Root, work: &Work) -> Result<(), Error> {
    let mut locked = target::lock(root, &work.vm)?;
    let mut state = locked.load_state()?;
    let mut layout = state.machine.memory;
    // 2012: both are rounded up to superpages.
    let round = |size: MemSize| size.0.checked_next_multiple_of(2 << 20).unwrap_or(u64::MAX);
    layout.lowmem = work.lowmem.map_or(layout.lowmem, round);
    layout.highmem = work.highmem.map_or(layout.highmem, round);
    if let Some(size) = work.mem {
        layout = MemoryLayout::split(MemSize(round(size)));
    }
    if layout == state.machine.memory {
        return Ok(());
    }
    let setup = MemorySetup {
        layout,
        wire: state.machine.wired,
        path: state.machine.mem_path.clone(),
    };
    let made = locked.setup_memory(&mut state, &setup);
    // Whether or not there is new memory, what was loaded is gone with the old.
    state.phase = Phase::Created;
    state.machine.boot = None;
    locked.store(&mut state)?;
    Ok(made?)
}

fn update(access: &mut dyn VcpuAccess, work: &Work) -> Result<(), Error> {
    let registers = work.registers.iter();
    let mut changes: Vec<Change> = registers
        .map(|&(reg, value)| Change::Register { reg, value })
        .collect();
    if !work.descriptors.is_empty() {
        let now = access.registers(work.cpu)?;
        changes.extend(work.descriptors.iter().map(|&seg| {
            let desc = now.desc(seg);
            Change::Descriptor {
                seg,
                base: work.desc.base.unwrap_or(desc.base),
                limit: work.desc.limit.unwrap_or(desc.limit),
                access: work.desc.access.unwrap_or(desc.access),
            }
        }));
    }
    access.update(work.cpu, changes)
}

fn get(access: &mut dyn VcpuAccess, work: &Work, output: &mut Output) -> Result<(), Error> {
    let gets = &work.gets;
    if gets.all || gets.lowmem || gets.highmem {
        let memory = access.memory()?;
        if gets.all || gets.lowmem {
            output.memory("lowmem", 0, memory.lowmem);
        }
        if gets.all || gets.highmem {
            output.memory("highmem", HIGHMEM_BASE, memory.highmem);
        }
    }
    detail::memory(access, work, output)?;
    if gets.all || !gets.registers.is_empty() || !gets.descriptors.is_empty() {
        let registers = access.registers(work.cpu)?;
        show(&registers, work, output)?;
    }
    if gets.all {
        // 2012's --get-all ends with these.
        output.line("VMCS and VMCB fields\tnot available through KVM");
    }
    detail::show(access, work, output)?;
    look::show(access, work, output)?;
    if gets.devices {
        devices::show(access, output)?;
    }
    if gets.stats {
        let (vcpu, vm) = access.stats(work.cpu)?;
        output.stats(work.cpu, &vcpu, &vm);
    }
    if let Some(top) = gets.exits {
        exits::show(access, work, top, output)?;
    }
    if gets.unavailable.is_empty() {
        Ok(())
    } else {
        output.field("unavailable", gets.unavailable.clone());
        Err(Error::Unavailable(gets.unavailable.clone()))
    }
}

/// Registers, then descriptors, then selectors and what is like them, as in 2012.
fn show(registers: &Registers, work: &Work, output: &mut Output) -> Result<(), Error> {
    let gets = &work.gets;
    let words = Reg::all().take_while(|&reg| reg != Reg::Cs).count();
    for (n, reg) in Reg::all().enumerate() {
        if n == words {
            let segments = SegReg::ALL.into_iter();
            for seg in segments.filter(|seg| gets.all || gets.descriptors.contains(seg)) {
                output.descriptor(seg, work.cpu, &registers.desc(seg));
            }
        }
        let named = gets.registers.contains(&reg);
        if !named && !gets.all {
            continue;
        }
        match registers.get(reg) {
            Ok(value) => output.register(reg, work.cpu, value),
            // Not everything is there to be shown on every host.
            Err(RegError::Unavailable(_)) if !named => {}
            Err(source) => {
                return Err(Error::Register {
                    vm: work.vm.clone(),
                    source,
                });
            }
        }
    }
    Ok(())
}

/// Becomes `rhyve VM`, or waits for it if there is something to do afterwards.
fn run(work: &Work) -> Result<Status, Error> {
    // The one that came with this vmmctl, if it did.
    let beside = std::env::current_exe()
        .ok()
        .map(|exe| exe.with_file_name("rhyve"))
        .filter(|path| path.exists());
    let program = beside.unwrap_or_else(|| "rhyve".into());
    let mut command = Command::new(&program);
    command.arg(work.vm.as_str());
    let error = |source| Error::Run {
        program: program.display().to_string(),
        source,
    };
    if !work.destroy {
        return Err(error(command.exec()));
    }
    let ended = command.status().map_err(error)?;
    // As a shell says it.
    let signalled = || ended.signal().map(|signal| 128 + signal);
    let code = ended.code().or_else(signalled);
    Ok(Status::Rhyve(
        code.and_then(|c| u8::try_from(c).ok()).unwrap_or(1),
    ))
}
