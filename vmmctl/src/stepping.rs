//! `--until` and `--step`: a VM that runs is led to a place, instruction by instruction.

use serde_json::json;
use vmm_api::control::{ClientError, Refusal, RunPhase};
use vmm_api::pagewalk::{self, WalkError};

use crate::cli::{Location, Work};
use crate::error::Error;
use crate::interrupt::Interrupt;
use crate::look;
use crate::output::{Output, hex};
use crate::target::VcpuAccess;

/// How long the VM runs between two looks at whether this is to go on: other clients wait meanwhile.
const SLICE_MS: u32 = 200;

/// Lets all vCPUs run until one comes to a place, and shows it. The VM is paused afterwards.
///
/// # Errors
///
/// The VM does not run or ends, nobody knows where the place is, or a signal came first: then the VM is
/// as it was, running or paused.
pub fn until(
    access: &mut dyn VcpuAccess,
    work: &Work,
    place: &Location,
    output: &mut Output,
) -> Result<(), Error> {
    let was = access.live()?.status()?.phase;
    let names = look::names(access, work, place.is_named())?;
    let address = look::locate(work, place, names.as_ref())?;
    // No vCPU comes there, in whatever mode: linear addresses have 57 bits at most.
    if !matches!(address.cast_signed() >> 56, 0 | -1) {
        let (vm, source) = (work.vm.clone(), WalkError::NotCanonical(address));
        return Err(Error::Walk { vm, source });
    }
    let interrupt = Interrupt::new()?;
    // It is there already: that is what it leaves, not what it comes to.
    access.live()?.pause()?;
    for vcpu in 0..access.vcpus()? {
        if pagewalk::linear_rip(&access.registers(vcpu)?) == address {
            match access.live()?.step(vcpu) {
                // One that is halted there does come to it, once it is woken.
                Ok(())
                | Err(ClientError::Refused {
                    refusal: Refusal::Failed(_),
                    ..
                }) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
    let vcpu = loop {
        if let Some(vcpu) = access.live()?.run_until(address, SLICE_MS)? {
            break vcpu;
        }
        if interrupt.came() {
            if was == RunPhase::Running {
                access.live()?.resume()?;
            }
            return Err(Error::Interrupted {
                vm: work.vm.clone(),
                place: place.to_string(),
                phase: was.word(),
            });
        }
    };
    output.line(&format!("vcpu{vcpu}:"));
    look::instruction(access, work, vcpu, names.as_ref(), output)?;
    output.field("until", json!({ "vcpu": vcpu, "address": hex(address) }));
    Ok(())
}

/// Has a vCPU execute instructions one by one while the others wait, and shows each, and the one that
/// would be next. The VM is paused afterwards.
///
/// # Errors
///
/// The VM does not run, or the vCPU executes nothing.
pub fn step(
    access: &mut dyn VcpuAccess,
    work: &Work,
    count: u32,
    output: &mut Output,
) -> Result<(), Error> {
    access.live()?.pause()?;
    let names = look::names(access, work, false)?;
    let names = names.as_ref();
    let mut shown = Vec::new();
    for _ in 0..count {
        shown.push(look::instruction(access, work, work.cpu, names, output)?);
        access.live()?.step(work.cpu)?;
    }
    shown.push(look::instruction(access, work, work.cpu, names, output)?);
    output.field("step", shown);
    Ok(())
}
