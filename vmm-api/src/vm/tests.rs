//! Objects from create to destroy.

use std::os::unix::fs::PermissionsExt;

use super::*;
use crate::memory::{MemSize, MemoryLayout};
use crate::state::{Phase, StopReason};

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
    snapshot(root, &named("snap"), "test", &memory, &state).unwrap();
    assert!(matches!(
        snapshot(root, &named("snap"), "test", &memory, &state),
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
