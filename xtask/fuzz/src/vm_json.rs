//! vm.json: what is read can be written, and comes back the same.

use std::collections::BTreeMap;

use vmm_api::memory::MemoryLayout;
use vmm_api::state::{
    Activity, BootInfo, DeviceState, Phase, StopReason, SymbolTables, VcpuEvents, VcpuState,
    VmState,
};

/// True if the text is a VM's state.
///
/// # Panics
///
/// It changes when it is written and read again.
pub fn check(text: &[u8]) -> bool {
    let state = match VmState::from_json(text) {
        Ok(state) => state,
        Err(error) => {
            assert!(!error.to_string().is_empty());
            return false;
        }
    };
    assert!(!state.vcpus.is_empty() && state.machine.memory.validate().is_ok());
    let written = state.to_json().map_err(|e| e.to_string());
    let again = written.and_then(|text| VmState::from_json(&text).map_err(|e| e.to_string()));
    assert_eq!(again.as_ref(), Ok(&state));
    true
}

/// A VM that was just made, and one with everything there can be.
pub fn seeds() -> Vec<Vec<u8>> {
    let mut full = VmState::created();
    full.phase = Phase::Stopped {
        reason: StopReason::TripleFault,
        detail: Some("vCPU 0".into()),
    };
    full.machine.memory = MemoryLayout {
        lowmem: 3 << 30,
        highmem: 2 << 30,
    };
    full.machine.mem_path = Some("/dev/hugepages".into());
    full.machine.boot = Some(BootInfo {
        kernel: "/boot/kernel/kernel".into(),
        protocol: "freebsd".into(),
        cmdline: Some("console=ttyS0".into()),
        symbols: Some(SymbolTables {
            start: 0xbc_0000,
            end: 0xbc_f000,
        }),
    });
    full.vcpus = vec![VcpuState {
        activity: Some(Activity::Halted),
        events: Some(VcpuEvents::default()),
        msrs: BTreeMap::from([(0xc000_0080, 0x500)]),
        xsave: vec![1; 24],
        lapic: vec![2; 24],
        tsc_khz: Some(2_000_000),
        ..VcpuState::reset()
    }];
    let data = serde_json::json!({"lcr": 3, "fifo": [0, 1.5, null, "x"]});
    let device = DeviceState {
        kind: "uart".into(),
        version: 1,
        data,
    };
    full.devices = BTreeMap::from([("com1".into(), device)]);
    let states = [VmState::created(), full];
    let texts = states.iter().filter_map(|state| state.to_json().ok());
    texts.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_are_read() {
        let seeds = seeds();
        assert_eq!(seeds.len(), 2);
        assert!(seeds.iter().all(|seed| check(seed)));
    }
}
