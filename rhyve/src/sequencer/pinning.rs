//! Which host processors a vCPU's thread may run on.

use std::collections::BTreeSet;

use nix::errno::Errno;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

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
