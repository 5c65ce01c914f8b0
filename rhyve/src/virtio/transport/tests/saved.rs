//! A transport goes on in another machine, and survives states that nobody saved.

use proptest::prelude::*;
use serde_json::{Value, json};
use vmm_api::state::DeviceState;

use super::rig::{Rig, memory, rig, rig_on};
use crate::bus::IoSize;
use crate::virtio::transport::Transport;

fn save(rig: &Rig) -> DeviceState {
    let functions = rig.pci.functions();
    let (_, function) = functions.first().unwrap();
    let device = function.lifecycle().unwrap();
    device.freeze();
    device.save().unwrap()
}

fn restore(rig: &Rig, state: &DeviceState) -> Result<(), String> {
    let functions = rig.pci.functions();
    let (_, function) = functions.first().unwrap();
    let restored = function.lifecycle().unwrap().restore(state);
    restored.map_err(|error| error.to_string())
}

#[test]
fn a_driver_goes_on_with_another_device() {
    for msix in [true, false] {
        goes_on(msix);
    }
}

fn goes_on(msix: bool) {
    let first = rig_on(Transport::Modern, memory(), msix);
    if msix {
        first.enable_msix();
    } else {
        first.enable_msi(0x41);
    }
    let mut driver = first.modern_start();
    for _ in 0..3 {
        first.exchange(&mut driver, || first.set(0x3000, 2, 0));
    }
    // Its BARs are not where a new one has them.
    first.set_config(0x20, IoSize::Dword, 0xc010_0000);
    let state = save(&first);
    let second = rig_on(Transport::Modern, first.memory.clone(), msix);
    restore(&second, &state).unwrap();
    assert_eq!(second.bar(4), first.bar(4));
    assert_eq!(second.echo.queues(), [0]);
    assert_eq!(second.doorbells.bound(), first.doorbells.bound());
    second.exchange(&mut driver, || second.set(0x3000, 2, 0));
    if !msix {
        // One more than there were requests, for one that may have been lost.
        assert_eq!(second.msi.sent(), [(0xfee0_0000, 0x41); 2]);
    }
    assert_eq!(save(&second).data["config"], state.data["config"]);

    for other in [
        rig_on(Transport::Legacy, memory(), msix),
        rig_on(Transport::Modern, memory(), !msix),
    ] {
        assert!(restore(&other, &state).unwrap_err().contains("another one"));
    }
}

/// Puts `value` in the place of the leaf `at`.
fn put(tree: &mut Value, at: &mut usize, value: &Value) {
    match tree {
        Value::Array(parts) => parts.iter_mut().for_each(|part| put(part, at, value)),
        Value::Object(parts) => parts.values_mut().for_each(|part| put(part, at, value)),
        leaf => {
            if *at == 0 {
                *leaf = value.clone();
            }
            *at = at.wrapping_sub(1);
        }
    }
}

fn leaf() -> impl Strategy<Value = Value> {
    prop_oneof![
        any::<u64>().prop_map(Value::from),
        any::<u16>().prop_map(Value::from),
        any::<bool>().prop_map(Value::from),
        Just(Value::Null),
        Just(json!("")),
        Just(json!({"next_avail": 7, "next_used": 65535})),
        Just(json!("Legacy")),
        Just(json!([])),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn any_state_is_survived(changes in proptest::collection::vec((0usize..60, leaf()), 1..4)) {
        let first = rig(Transport::Transitional);
        let mut driver = first.modern_start();
        first.exchange(&mut driver, || first.set(0x3000, 2, 0));
        let mut state = save(&first);
        for (mut at, value) in changes {
            put(&mut state.data, &mut at, &value);
        }
        let second = rig_on(Transport::Transitional, first.memory.clone(), true);
        let _ = restore(&second, &state);
        second.echo.serve(0);
        for at in 0..64 {
            let gpa = first.bar(4) + at;
            let _ = second.buses.mmio.read(gpa, &mut [0]);
            let _ = second.buses.mmio.write(gpa, &[0]);
        }
    }
}
