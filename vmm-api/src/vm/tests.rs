//! Objects from create to destroy.

use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};

use super::*;
use crate::memory::{MemSize, MemoryLayout};
use crate::state::{DiskFormat, OwnDisk, Phase, RunInfo, StopReason, WrittenDisk};

struct Place {
    root: Root,
    _tmp: tempfile::TempDir,
}

fn place() -> Place {
    let tmp = tempfile::tempdir_in("/dev/shm").unwrap();
    Place {
        root: Root::open_at(&tmp.path().join("root")).unwrap(),
        _tmp: tmp,
    }
}

fn name() -> VmName {
    "guest0".parse().unwrap()
}

fn setup(bytes: u64) -> MemorySetup {
    let layout = MemoryLayout::split(MemSize(bytes));
    MemorySetup {
        layout,
        ..MemorySetup::default()
    }
}

#[test]
fn an_object_lives_from_create_to_destroy() {
    let place = place();
    let mut vm = Vm::create(&place.root, &name(), "test").unwrap();
    let mut state = vm.load_state().unwrap();
    assert_eq!(state.phase, Phase::Created);
    vm.setup_memory(&mut state, &setup(1 << 20)).unwrap();
    state.phase = Phase::Stopped {
        reason: StopReason::Reset,
        detail: Some("x".into()),
    };
    vm.store(&mut state).unwrap();
    vm.map_memory(&state)
        .unwrap()
        .write(0x1000, b"ram")
        .unwrap();
    drop(vm);

    let vm = Vm::open(&place.root, &name()).unwrap();
    assert_eq!(vm.load_state().unwrap(), state);
    assert_eq!(state.generation, 2);
    let mut bytes = [0; 3];
    vm.open_memory(&state)
        .unwrap()
        .read(0x1000, &mut bytes)
        .unwrap();
    assert_eq!(&bytes, b"ram");
    vm.lock("test").unwrap().destroy().unwrap();
    assert!(matches!(
        Vm::open(&place.root, &name()),
        Err(VmError::NotFound(_))
    ));
    assert!(place.root.list().unwrap().is_empty());
}

#[test]
fn a_held_object_names_its_holder() {
    let place = place();
    let held = Vm::create(&place.root, &name(), "rhyve").unwrap();
    assert!(matches!(
        Vm::create(&place.root, &name(), "x"),
        Err(VmError::Exists(_))
    ));
    let other = Vm::open(&place.root, &name()).unwrap();
    let holder = other.holder().unwrap().unwrap();
    assert_eq!(
        (holder.pid, holder.program.as_str()),
        (std::process::id(), "rhyve")
    );
    let error = other.lock("rhyveload").unwrap_err();
    assert!(error.to_string().contains("--force-poweroff"), "{error}");
    drop(held);
    let free = Vm::open(&place.root, &name()).unwrap();
    assert_eq!(free.holder().unwrap(), None);
    free.lock("rhyveload").unwrap();
}

#[test]
fn the_lock_of_a_destroyed_object_is_worth_nothing() {
    let place = place();
    let vm = Vm::create(&place.root, &name(), "a").unwrap();
    let late = Vm::open(&place.root, &name()).unwrap();
    vm.destroy().unwrap();
    assert!(late.lock("b").is_err());
}

#[test]
fn memory_larger_than_its_file_system_is_refused() {
    let place = place();
    let mut vm = Vm::create(&place.root, &name(), "test").unwrap();
    let mut state = vm.load_state().unwrap();
    let error = vm.setup_memory(&mut state, &setup(1 << 45)).unwrap_err();
    let text = error.to_string();
    assert!(
        text.starts_with("vm_setup_memory(highmem): Cannot allocate memory"),
        "{text}"
    );
    assert!(!vm.path().join(MEMORY).exists());
    assert!(matches!(vm.map_memory(&state), Err(VmError::NoMemory(_))));
}

#[test]
fn a_size_that_can_never_fit_leaves_the_old_memory() {
    let place = place();
    let mut vm = Vm::create(&place.root, &name(), "test").unwrap();
    let mut state = vm.load_state().unwrap();
    vm.setup_memory(&mut state, &setup(1 << 20)).unwrap();
    vm.map_memory(&state)
        .unwrap()
        .write(0x1000, b"ram")
        .unwrap();
    let before = state.clone();
    vm.setup_memory(&mut state, &setup(1 << 45)).unwrap_err();
    assert_eq!(state, before);
    let mut bytes = [0; 3];
    let memory = vm.open_memory(&state).unwrap();
    memory.read(0x1000, &mut bytes).unwrap();
    assert_eq!(&bytes, b"ram");
}

#[test]
fn wired_memory_is_allocated_and_memory_elsewhere_goes_with_the_object() {
    let place = place();
    let elsewhere = tempfile::tempdir_in("/dev/shm").unwrap();
    let mut vm = Vm::create(&place.root, &name(), "test").unwrap();
    let mut state = vm.load_state().unwrap();
    let wired = MemorySetup {
        wire: true,
        path: Some(elsewhere.path().to_owned()),
        ..setup(1 << 20)
    };
    vm.setup_memory(&mut state, &wired).unwrap();
    vm.store(&mut state).unwrap();
    assert_eq!(vm.open_memory(&state).unwrap().resident().unwrap(), 1 << 20);
    vm.destroy().unwrap();
    assert_eq!(elsewhere.path().read_dir().unwrap().count(), 0);
}

#[test]
fn half_written_state_never_shows() {
    let place = place();
    let vm = Vm::create(&place.root, &name(), "test").unwrap();
    std::fs::write(vm.path().join(STATE_NEW), b"{\"format\":").unwrap();
    assert_eq!(vm.load_state().unwrap().phase, Phase::Created);
    std::fs::remove_file(vm.path().join(STATE)).unwrap();
    assert!(matches!(vm.load_state(), Err(VmError::State { .. })));
    vm.destroy().unwrap();
}

#[test]
fn all_of_an_object_is_private() {
    let place = place();
    let mut vm = Vm::create(&place.root, &name(), "test").unwrap();
    let mut state = vm.load_state().unwrap();
    vm.setup_memory(&mut state, &setup(1 << 20)).unwrap();
    for entry in vm.path().read_dir().unwrap() {
        let mode = entry.unwrap().metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o077, 0);
    }
}

#[test]
fn a_reserve_is_kept_for_the_next_state() {
    let place = place();
    let mut vm = Vm::create(&place.root, &name(), "test").unwrap();
    let mut state = vm.load_state().unwrap();
    vm.reserve(1 << 16).unwrap();
    for _ in 0..2 {
        let reserved = std::fs::metadata(vm.path().join(STATE_NEW)).unwrap();
        assert!(std::os::unix::fs::MetadataExt::blocks(&reserved) * 512 >= 1 << 16);
        vm.store(&mut state).unwrap();
    }
    assert_eq!(vm.load_state().unwrap(), state);
}

#[test]
fn clones_and_snapshots_are_whole_objects() {
    let place = place();
    let root = &place.root;
    let named = |name: &str| name.parse::<VmName>().unwrap();
    let mut vm = Vm::create(root, &name(), "test").unwrap();
    let mut state = vm.load_state().unwrap();
    let refused = vm.clone_to(root, &named("copy"), "test").unwrap_err();
    assert!(
        refused.to_string().contains("nothing is loaded"),
        "{refused}"
    );
    vm.setup_memory(&mut state, &setup(4 << 20)).unwrap();
    vm.map_memory(&state)
        .unwrap()
        .write(0x3000, b"kernel")
        .unwrap();
    state.phase = Phase::Loaded;
    let args = "-c 2 -U 00000000-0000-0000-0000-000000000001 -s 3,virtio-net,tap0,mac=2:0:0:0:0:1,mtu=9000 guest0";
    state.machine.run = Some(crate::state::RunInfo {
        args: args.split(' ').map(Into::into).collect(),
        ..Default::default()
    });
    vm.store(&mut state).unwrap();

    let memory = vm.open_memory(&state).unwrap();
    snapshot(root, &named("snap"), "test", &memory, &state, Images::Free).unwrap();
    assert!(matches!(
        snapshot(root, &named("snap"), "test", &memory, &state, Images::Free),
        Err(VmError::Exists(_))
    ));
    for copy in ["one", "two"] {
        vm.clone_to(root, &named(copy), "test").unwrap();
    }
    let again = vm.clone_to(root, &named("two"), "test").unwrap_err();
    assert!(matches!(again, VmError::Exists(_)), "{again}");

    // Each writes for itself; the original is one of them.
    let seen = |name: &str| {
        let vm = Vm::open(root, &named(name)).unwrap();
        let mut bytes = [0; 6];
        let memory = vm.open_memory(&vm.load_state().unwrap()).unwrap();
        memory.read(0x3000, &mut bytes).unwrap();
        bytes
    };
    let one = Vm::open(root, &named("one")).unwrap().lock("test").unwrap();
    let state = one.load_state().unwrap();
    let args = state.machine.run.as_ref().unwrap().args.join(" ");
    assert_eq!(args, "-c 2 -s 3,virtio-net,tap0,mtu=9000 guest0");
    let ram = one.map_memory(&state).unwrap();
    ram.write(0x3000, b"writes").unwrap();
    ram.keep().unwrap();
    drop(ram);
    // A clone of a clone has what that has written.
    one.clone_to(root, &named("three"), "test").unwrap();
    vm.destroy().unwrap();
    for (name, content) in [
        ("one", b"writes"),
        ("two", b"kernel"),
        ("three", b"writes"),
        ("snap", b"kernel"),
    ] {
        assert_eq!(&seen(name), content, "{name}");
    }
    // Loading anew ends what was shared.
    let mut one = one;
    let mut state = state;
    one.setup_memory(&mut state, &setup(1 << 20)).unwrap();
    assert!(!one.is_clone().unwrap());
    assert_eq!(&seen("three"), b"writes");
}

/// A suspended object whose guest writes to these disks.
fn suspended(root: &Root, name: &VmName, disks: Option<Vec<WrittenDisk>>) -> LockedVm {
    let mut vm = Vm::create(root, name, "test").unwrap();
    let mut state = vm.load_state().unwrap();
    vm.setup_memory(&mut state, &setup(1 << 20)).unwrap();
    state.phase = Phase::Suspended;
    state.machine.run = Some(RunInfo {
        args: vec!["-s".into(), "2,virtio-blk,disk".into()],
        disks,
        ..RunInfo::default()
    });
    vm.store(&mut state).unwrap();
    vm
}

#[test]
fn copies_have_disks_of_their_own_until_they_are_destroyed() {
    let Place { root, _tmp: tmp } = &place();
    let path = |name: &str| tmp.path().join(name);
    let named = |name: &str| name.parse::<VmName>().unwrap();
    // Larger than what a file system allocates at once, with a hole, and with an odd end.
    let image = std::fs::File::create(path("disk")).unwrap();
    image.set_len((4 << 20) + 100).unwrap();
    image.write_all_at(&[7; 5000], 3 << 20).unwrap();
    let disk = WrittenDisk {
        named: path("disk"),
        path: path("disk"),
        format: DiskFormat::Raw,
        blocks: (512, 4096),
    };
    let vm = suspended(root, &name(), Some(vec![disk]));
    vm.clone_to(root, &named("one"), "test").unwrap();
    image.write_all_at(&[8; 5000], 3 << 20).unwrap();

    let base = std::fs::File::open(path("disk.one.base")).unwrap();
    let mut bytes = [0; 5000];
    base.read_exact_at(&mut bytes, 3 << 20).unwrap();
    assert_eq!(bytes, [7; 5000]);
    assert!(base.metadata().unwrap().blocks() * 512 < 64 << 10);
    assert_eq!(base.metadata().unwrap().mode() & 0o777, 0o400);
    let layer = || std::fs::File::open(path("disk.one")).unwrap();
    assert_eq!(layer::size(&layer()).unwrap(), 4 << 20);
    let below = layer::below(&layer()).unwrap();
    assert_eq!(below.as_deref(), Some("disk.one.base"));

    // A copy of a copy: the base is the same file, what was written since is copied.
    let mut one = Vm::open(root, &named("one")).unwrap().lock("test").unwrap();
    let mut state = one.load_state().unwrap();
    let own = OwnDisk {
        named: path("disk"),
        blocks: (512, 4096),
        layer: path("disk.one"),
        base: path("disk.one.base"),
    };
    assert_eq!(state.machine.disks, [own]);
    let run = state.machine.run.as_ref().unwrap();
    let used = &run.disks.as_ref().unwrap()[0];
    assert_eq!(
        (&used.named, &used.path, used.format),
        (&path("disk"), &path("disk.one"), DiskFormat::Qcow2)
    );
    let write = std::fs::OpenOptions::new()
        .write(true)
        .open(path("disk.one"))
        .unwrap();
    write.write_all_at(b"written", 1 << 20).unwrap();
    let memory = one.open_memory(&state).unwrap();
    snapshot(root, &named("two"), "test", &memory, &state, Images::Free).unwrap();
    let ino = |name: &str| std::fs::metadata(path(name)).unwrap().ino();
    assert_eq!(ino("disk.one.base"), ino("disk.two.base"));
    let two = std::fs::File::open(path("disk.two")).unwrap();
    let mut bytes = [0; 7];
    two.read_exact_at(&mut bytes, 1 << 20).unwrap();
    assert_eq!(&bytes, b"written");
    assert_eq!(
        layer::below(&two).unwrap().as_deref(),
        Some("disk.two.base")
    );

    // What the loader does to an object leaves it its disks.
    state.machine.run = None;
    state.phase = Phase::Loaded;
    one.store(&mut state).unwrap();
    one.destroy().unwrap();
    assert!(!path("disk.one").exists() && !path("disk.one.base").exists());
    assert!(path("disk.two.base").exists() && path("disk").exists());
}

#[test]
fn what_is_no_file_of_ones_own_is_not_copied() {
    let Place { root, _tmp: tmp } = &place();
    let path = tmp.path().join("disk");
    std::fs::write(&path, [0; 4096]).unwrap();
    let refusal = |disks: Option<Vec<(&Path, DiskFormat)>>| {
        let disks = disks.map(|disks| {
            let disks = disks.iter().map(|&(path, format)| WrittenDisk {
                named: path.to_owned(),
                path: path.to_owned(),
                format,
                blocks: (512, 512),
            });
            disks.collect()
        });
        let vm = suspended(root, &name(), disks);
        let refused = vm.clone_to(root, &"copy".parse().unwrap(), "test");
        vm.destroy().unwrap();
        let files = std::fs::read_dir(tmp.path()).unwrap().count();
        assert_eq!(files, 2, "nothing is left but the root and the disk");
        assert_eq!(root.list().unwrap(), []);
        refused.unwrap_err()
    };
    let raw = DiskFormat::Raw;
    assert!(matches!(refusal(None), VmError::UnknownDisks));
    // A device, behind a link.
    std::fs::remove_file(&path).unwrap();
    std::os::unix::fs::symlink("/dev/null", &path).unwrap();
    let device = refusal(Some(vec![(&path, raw)]));
    assert!(matches!(device, VmError::NotAFile(_)), "{device}");
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, [0; 4096]).unwrap();
    let gone = tmp.path().join("gone");
    let missing = refusal(Some(vec![(&path, raw), (&gone, raw)]));
    assert!(missing.to_string().contains("find this disk"), "{missing}");
    let no_image = refusal(Some(vec![(&path, DiskFormat::Qcow2)]));
    assert!(matches!(no_image, VmError::Disk { .. }), "{no_image}");
}
