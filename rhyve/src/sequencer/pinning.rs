//! Which host processors a vCPU's thread may run on.

use std::collections::BTreeSet;

use nix::errno::Errno;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

/// A vCPU's thread cannot be where it is to be.
#[derive(Debug, thiserror::Error)]
#[error("vCPU {vcpu} cannot be pinned to host CPU {}", list(.cpus))]
pub struct PinError {
    vcpu: u32,
    cpus: BTreeSet<usize>,
    source: Errno,
}

fn refused(vcpu: u32, cpus: &BTreeSet<usize>) -> impl Fn(Errno) -> PinError {
    let cpus = cpus.clone();
    move |source| PinError {
        vcpu,
        cpus: cpus.clone(),
        source,
    }
}

fn list(cpus: &BTreeSet<usize>) -> String {
    let cpus: Vec<_> = cpus.iter().map(usize::to_string).collect();
    cpus.join(",")
}

/// The calling thread.
const SELF: Pid = Pid::from_raw(0);

/// The host processors that the calling thread may run on.
///
/// # Errors
///
/// The host has more than 1024 of them.
pub fn get() -> Result<BTreeSet<usize>, Errno> {
    let set = sched_getaffinity(SELF)?;
    let cpus = 0..CpuSet::count();
    Ok(cpus.filter(|&cpu| set.is_set(cpu) == Ok(true)).collect())
}

/// Moves the calling thread to these host processors.
///
/// # Errors
///
/// None of them is there for it.
pub fn set(cpus: &BTreeSet<usize>) -> Result<(), Errno> {
    let mut set = CpuSet::new();
    cpus.iter().try_for_each(|&cpu| set.set(cpu))?;
    sched_setaffinity(SELF, &set)
}

/// Moves the calling thread, vCPU `vcpu`'s, to these host processors; where there are none, it stays.
///
/// # Errors
///
/// None of them is there for it.
pub fn pin(vcpu: u32, cpus: &BTreeSet<usize>) -> Result<(), PinError> {
    if cpus.is_empty() {
        return Ok(());
    }
    set(cpus).map_err(refused(vcpu, cpus))
}

/// Finds out whether [`pin`] would do: the calling thread goes there, and back.
///
/// # Errors
///
/// None of the processors is there for it.
pub fn check(vcpu: u32, cpus: &BTreeSet<usize>) -> Result<(), PinError> {
    if cpus.is_empty() {
        return Ok(());
    }
    let before = get();
    pin(vcpu, cpus)?;
    // It came from there.
    let back = before.and_then(|before| set(&before));
    back.map_err(refused(vcpu, cpus))
}
