//! The options a machine is run with: those on the command line, or, for a suspended machine of
//! which nothing but the name is said, those it had.

use std::ffi::OsString;
use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use vmm_api::state::{OwnDisk, Phase, RunInfo, VmState};

use super::{RunError, system};
use crate::cli::{Invocation, parse};
use crate::config::{MachineSpec, SlotDevice};

/// What the machine is to be, and what is to be remembered of how that was said. `args` have the
/// program's name in front. A suspended machine's relative paths start where they did. A copy has its
/// own disks, whoever says that it has the images.
pub(super) fn options(
    spec: MachineSpec,
    args: &[OsString],
    state: &VmState,
) -> Result<(MachineSpec, RunInfo), RunError> {
    let given = args.get(1..).unwrap_or_default();
    let bare = given.len() <= 1;
    let (mut spec, run) = match &state.machine.run {
        Some(run) if bare && state.phase == Phase::Suspended => again(spec, run)?,
        _ => (
            spec,
            RunInfo {
                args: given
                    .iter()
                    .map(|arg| arg.to_string_lossy().into_owned())
                    .collect(),
                at_ns: 0,
                disks: None,
                directory: std::env::current_dir().unwrap_or_else(|_| PathBuf::from("/")),
            },
        ),
    };
    take_own_disks(&mut spec, &state.machine.disks);
    Ok((spec, run))
}

fn again(spec: MachineSpec, run: &RunInfo) -> Result<(MachineSpec, RunInfo), RunError> {
    std::env::set_current_dir(&run.directory)
        .map_err(system("go to the directory that the VM was run in"))?;
    let words = std::iter::once("rhyve".to_owned()).chain(run.args.iter().cloned());
    match parse(words).map_err(RunError::Options)? {
        Invocation::Run(then, _) => {
            let then = MachineSpec {
                // A clone has another name than what it is a clone of.
                name: spec.name,
                ..*then
            };
            Ok((then, run.clone()))
        }
        // Such a command line runs nothing, so nothing was suspended that ran by it.
        Invocation::Print(_) | Invocation::Done => Ok((spec, run.clone())),
    }
}

/// Gives the machine its own disks in place of the images that they are copies of.
fn take_own_disks(spec: &mut MachineSpec, disks: &[OwnDisk]) {
    for slot in &mut spec.slots {
        if let SlotDevice::VirtioBlk(blk) = &mut slot.device {
            let own = disks.iter().find(|own| same(&blk.disk.path, &own.named));
            if let Some(own) = own {
                blk.disk.replace(own);
            }
        }
    }
}

/// Whether two paths lead to the same file.
fn same(one: &Path, other: &Path) -> bool {
    let id = |path| std::fs::metadata(path).map(|m: Metadata| (m.dev(), m.ino()));
    match (id(one), id(other)) {
        (Ok(one), Ok(other)) => one == other,
        // What is not there any more has its name still.
        _ => std::path::absolute(one).is_ok_and(|one| one == other),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_has_its_own_file_by_whatever_path_the_image_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        std::fs::write(at("disk"), "").unwrap();
        std::os::unix::fs::symlink("disk", at("link")).unwrap();
        let disks = ["disk", "gone"].map(|named| OwnDisk {
            named: at(named),
            layer: at("own"),
            base: at("base"),
            blocks: (512, 512),
        });
        for (named, path) in [
            ("disk", "own"),
            ("link", "own"),
            ("gone", "own"),
            ("other", "other"),
        ] {
            let slot = format!("2,virtio-blk,{}", at(named).display());
            let args = ["rhyve", "-s", &slot, "guest0"].map(str::to_owned);
            let Ok(Invocation::Run(mut spec, _)) = parse(args) else {
                unreachable!("it is a machine");
            };
            take_own_disks(&mut spec, &disks);
            let used: Vec<_> = spec
                .slots
                .iter()
                .filter_map(|slot| match &slot.device {
                    SlotDevice::VirtioBlk(blk) => Some(blk.disk.path.clone()),
                    _ => None,
                })
                .collect();
            assert_eq!(used, [at(path)], "{named}");
        }
    }
}
