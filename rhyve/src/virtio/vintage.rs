//! A device as the bhyve of 2012 had it: fewer features, a shorter configuration, shorter queues.
//!
//! [`Vintage`] stands between a device and its transport and lets through what that year's guests
//! saw (FreeBSD, usr.sbin/bhyve/pci_virtio_{block,net}.c of 2011 and 2012): a disk with host features
//! 0x10000004 and 28 bytes of configuration, a network card with 0x18020 and 8 bytes. Neither offered
//! event indices or free layout.

use std::sync::Arc;

use super::{Activation, DeviceError, Inspection, VirtioDevice, device_id, feature};
use crate::lifecycle::Lifecycle;

/// Offsets in a disk's configuration, and the number of data segments a request of 2012 had.
const SEG_MAX: usize = 12;
const SEGMENTS: u32 = 32;

/// What there was of one kind of device.
struct Form {
    /// Feature bits of the device and of its rings.
    features: u64,
    /// Bytes of configuration.
    config: usize,
    /// Descriptors of a queue.
    queue: u16,
}

/// A device of 2012.
pub struct Vintage {
    device: Arc<dyn VirtioDevice>,
    form: Form,
    queue_sizes: Vec<u16>,
}

impl Vintage {
    /// `device` as it was in 2012, or as it is if there was none of its kind.
    pub fn of(device: Arc<dyn VirtioDevice>) -> Arc<dyn VirtioDevice> {
        let form = match device.id() {
            // MAC, MRG_RXBUF, STATUS.
            device_id::NET => Form {
                features: 1 << 5 | 1 << 15 | 1 << 16,
                config: 8,
                queue: 1024,
            },
            // SEG_MAX.
            device_id::BLOCK => Form {
                features: 1 << 2 | feature::RING_INDIRECT_DESC,
                config: 28,
                queue: 64,
            },
            _ => return device,
        };
        let sizes = device.queue_sizes();
        let queue_sizes = sizes.iter().map(|&size| size.min(form.queue)).collect();
        Arc::new(Self {
            device,
            form,
            queue_sizes,
        })
    }
}

impl VirtioDevice for Vintage {
    fn name(&self) -> &'static str {
        self.device.name()
    }

    fn id(&self) -> u16 {
        self.device.id()
    }

    fn features(&self) -> u64 {
        self.device.features() & self.form.features
    }

    fn ring_features(&self) -> u64 {
        self.device.ring_features() & self.form.features
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn config_size(&self) -> usize {
        self.device.config_size().min(self.form.config)
    }

    fn config_read(&self, offset: usize, data: &mut [u8]) {
        let room = self.config_size().saturating_sub(offset);
        let room = room.min(data.len());
        let (data, _) = data.split_at_mut(room);
        self.device.config_read(offset, data);
        if self.id() == device_id::BLOCK {
            let bytes = (SEG_MAX..).zip(SEGMENTS.to_le_bytes());
            for (at, byte) in bytes {
                let to = at.checked_sub(offset).and_then(|at| data.get_mut(at));
                to.into_iter().for_each(|to| *to = byte);
            }
        }
    }

    fn config_write(&self, offset: usize, data: &[u8]) {
        let room = self.config_size().saturating_sub(offset);
        let data = data.get(..room).unwrap_or(data);
        self.device.config_write(offset, data);
    }

    fn config_generation(&self) -> u8 {
        self.device.config_generation()
    }

    fn feature_names(&self) -> &'static [(u64, &'static str)] {
        self.device.feature_names()
    }

    fn inspect(&self) -> Inspection {
        self.device.inspect()
    }

    fn lifecycle(&self) -> Option<&dyn Lifecycle> {
        self.device.lifecycle()
    }

    fn activate(&self, activation: Activation) -> Result<(), DeviceError> {
        self.device.activate(activation)
    }

    fn reset(&self) {
        self.device.reset();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A device that has all features and fills its configuration with 0xee.
    struct Rich {
        id: u16,
    }

    impl VirtioDevice for Rich {
        fn name(&self) -> &'static str {
            "rich"
        }

        fn id(&self) -> u16 {
            self.id
        }

        fn features(&self) -> u64 {
            0xff_ffff
        }

        fn queue_sizes(&self) -> &[u16] {
            &[256, 256]
        }

        fn config_size(&self) -> usize {
            60
        }

        fn config_read(&self, offset: usize, data: &mut [u8]) {
            let left = 60_usize.saturating_sub(offset);
            data.iter_mut().take(left).for_each(|byte| *byte = 0xee);
        }

        fn activate(&self, _activation: Activation) -> Result<(), DeviceError> {
            Ok(())
        }

        fn reset(&self) {}
    }

    #[test]
    fn a_disk_and_a_card_are_those_of_the_time() {
        let disk = Vintage::of(Arc::new(Rich {
            id: device_id::BLOCK,
        }));
        assert_eq!(disk.features() | disk.ring_features(), 0x1000_0004);
        assert_eq!(disk.queue_sizes(), [64, 64]);
        assert_eq!(disk.config_size(), 28);
        let card = Vintage::of(Arc::new(Rich { id: device_id::NET }));
        assert_eq!(card.features() | card.ring_features(), 0x18020);
        assert_eq!(
            (card.config_size(), card.queue_sizes()),
            (8, &[256, 256][..])
        );
        let other = Vintage::of(Arc::new(Rich {
            id: device_id::ENTROPY,
        }));
        assert_eq!((other.features(), other.config_size()), (0xff_ffff, 60));
    }

    #[test]
    fn the_configuration_ends_where_it_did() {
        let disk = Vintage::of(Arc::new(Rich {
            id: device_id::BLOCK,
        }));
        let read = |offset, length| {
            let mut data = vec![0; length];
            disk.config_read(offset, &mut data);
            data
        };
        assert_eq!(read(8, 8), [0xee, 0xee, 0xee, 0xee, 32, 0, 0, 0]);
        assert_eq!(read(13, 2), [0, 0]);
        assert_eq!(read(12, 1), [32]);
        assert_eq!(read(26, 4), [0xee, 0xee, 0, 0]);
        assert_eq!(read(28, 4), [0; 4]);
        assert_eq!(read(usize::MAX, 4), [0; 4]);
        disk.config_write(usize::MAX, &[1]);
    }
}
