//! What a disk tells whoever looks from outside.

use std::sync::atomic::Ordering::Relaxed;

use super::config::feature::*;
use super::device::Shared;
use crate::block::engine::Engine;
use crate::virtio::Inspection;

/// Names of the feature bits (5.2.3), and those of a legacy device.
pub(super) const FEATURES: &[(u64, &str)] = &[
    (1 << 0, "barrier"),
    (1 << 1, "size-max"),
    (SEG_MAX, "seg-max"),
    (1 << 4, "geometry"),
    (RO, "ro"),
    (BLK_SIZE, "blk-size"),
    (1 << 7, "scsi"),
    (FLUSH, "flush"),
    (TOPOLOGY, "topology"),
    (CONFIG_WCE, "config-wce"),
    (MQ, "mq"),
    (DISCARD, "discard"),
    (WRITE_ZEROES, "write-zeroes"),
];

/// The image, who serves it, and what was served.
pub(super) fn inspection(shared: &Shared, engine: Engine) -> Inspection {
    let info = shared.backend.info();
    let id = shared.id.iter().take_while(|&&byte| byte != 0);
    let id: Vec<u8> = id.copied().collect();
    let cache = if shared.writeback.load(Relaxed) {
        "write back"
    } else {
        "write through"
    };
    let counters = &shared.counters;
    Inspection {
        properties: vec![
            ("image", shared.label.clone()),
            ("disk", info.to_string()),
            ("engine", engine.name().to_owned()),
            ("serial", String::from_utf8_lossy(&id).into_owned()),
            ("cache", cache.to_owned()),
        ],
        counters: vec![
            ("reads", counters.reads.load(Relaxed)),
            ("bytes read", counters.bytes_read.load(Relaxed)),
            ("writes", counters.writes.load(Relaxed)),
            ("bytes written", counters.bytes_written.load(Relaxed)),
            ("flushes", counters.flushes.load(Relaxed)),
            ("discards", counters.discards.load(Relaxed)),
            ("host errors", counters.host_errors.load(Relaxed)),
            ("bad requests", counters.bad_requests.load(Relaxed)),
        ],
    }
}
