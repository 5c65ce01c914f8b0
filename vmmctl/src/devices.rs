//! `--get-devices`: what a running VM's devices are, and what they have served.

use std::fmt::Write;

use serde_json::json;
use vmm_api::inspect::{DeviceDetail, VirtioDetail};

use crate::error::Error;
use crate::output::Output;
use crate::target::VcpuAccess;

/// Shows them all.
///
/// # Errors
///
/// The VM does not run, or cannot be asked.
pub fn show(access: &mut dyn VcpuAccess, output: &mut Output) -> Result<(), Error> {
    let devices = access.live()?.devices()?;
    for device in &devices {
        output.line(text(device).trim_end());
    }
    output.field("devices", json!(devices));
    Ok(())
}

/// A device in lines: its place and kind, then all there is of it, indented.
fn text(device: &DeviceDetail) -> String {
    let mut text = format!("{}\t{}\n", device.slot, device.kind);
    let longest = device.properties.keys().map(String::len).max();
    let width = longest.unwrap_or(0).max(12) + 2;
    let mut line = |name: &str, value: &str| {
        // Writing into a string does not fail.
        let _ = writeln!(text, "  {name:<width$}{value}");
    };
    if let Some(virtio) = &device.virtio {
        let VirtioDetail {
            offered, transport, ..
        } = virtio;
        let driver = transport.as_deref().unwrap_or("no driver");
        line("transport", &format!("{driver} (of {offered})"));
        line("status", &words(&virtio.status));
        line("interrupts", &virtio.interrupts);
        if transport.is_some() {
            line("features", &words(&virtio.features));
            line("declined", &words(&virtio.declined));
        }
    }
    for (name, value) in &device.properties {
        line(name, value);
    }
    for queue in device.virtio.iter().flat_map(|virtio| &virtio.queues) {
        line(
            &format!("queue {}", queue.index),
            &format!(
                "size {}, available {}, used {}, {} requests, {} interrupts",
                queue.size, queue.next_avail, queue.next_used, queue.requests, queue.interrupts
            ),
        );
    }
    let counters = device.counters.iter();
    let counters: Vec<_> = counters.map(|(name, n)| format!("{n} {name}")).collect();
    if !counters.is_empty() {
        line("served", &counters.join(", "));
    }
    text
}

fn words(words: &[String]) -> String {
    if words.is_empty() {
        "none".into()
    } else {
        words.join(" ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_name_stands_apart_from_its_value() {
        let mut device = DeviceDetail {
            slot: "0:4:0".into(),
            kind: "virtio-balloon".into(),
            ..DeviceDetail::default()
        };
        device.properties.insert("actual".into(), "16M".into());
        assert_eq!(
            text(&device),
            "0:4:0\tvirtio-balloon\n  actual        16M\n"
        );
        let failures = "guest huge page failures".to_owned();
        device.properties.insert(failures, "0".into());
        assert_eq!(
            text(&device).lines().skip(1).collect::<Vec<_>>(),
            [
                "  actual                    16M",
                "  guest huge page failures  0",
            ]
        );
    }
}
