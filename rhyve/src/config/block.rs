//! A disk's configuration: the image's path, and options as bhyve(8) names them.

use std::num::NonZeroU16;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use uuid::Uuid;
use vmm_api::state::{DiskFormat, OwnDisk, WrittenDisk};

use super::SlotError;
use super::virtio::transport;
use crate::virtio::transport::Transport;

/// More queues than any guest has CPUs to fill.
const MAX_QUEUES: u16 = 64;

/// How an image keeps a disk's sectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageFormat {
    /// Byte for byte.
    Raw,
    /// QEMU's copy-on-write format.
    Qcow2,
}

/// Who moves the bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AioEngine {
    /// io_uring if this host has it, otherwise threads.
    #[default]
    Auto,
    /// The queue's own thread, one request after the other.
    Threads,
    /// io_uring.
    IoUring,
}

/// What `-s help` says of a disk's configuration.
pub(super) const HELP: &str = "  virtio-blk,PATH takes
    ro                    the guest cannot write
    snapshot              keep writes in memory, and forget them at the end
    nocache               go past the host's page cache
    sync, direct          each write is on stable storage before it completes
    nodelete              offer no discard
    sectorsize=L[/P]      logical and physical block size
    ser=TEXT              serial number, up to 20 characters
    format=raw|qcow2      qcow2 if PATH ends in .qcow2
    aio=threads|io_uring  who moves the bytes; io_uring where there is something to wait for
    queues=N              queues, each with a thread; 1
";

/// One disk image and how it is to be used.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BlockSpec {
    /// A regular file or a block device.
    pub path: PathBuf,
    /// Its format, if it was said.
    pub format: Option<ImageFormat>,
    /// Go past the host's page cache (O_DIRECT).
    pub nocache: bool,
    /// Each write is on stable storage before it completes (O_DSYNC); bhyve's `direct` and `sync`.
    pub sync: bool,
    /// The guest cannot write.
    pub read_only: bool,
    /// Logical and physical block size in bytes.
    pub block_size: Option<(u32, u32)>,
    /// What the guest reads as the disk's serial number: at most 20 bytes.
    pub serial: Option<String>,
    /// Offer no discard.
    pub nodelete: bool,
    /// Keep writes in memory, and forget them at the end.
    pub snapshot: bool,
    /// Who moves the bytes.
    pub engine: AioEngine,
    /// The path in the options, if a copy of a machine has another file in its place.
    pub in_place_of: Option<PathBuf>,
}

/// A virtio-blk device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlkSpec {
    /// Its image.
    pub disk: BlockSpec,
    /// Its registers.
    pub transport: Transport,
    /// Its queues, each with a thread.
    pub queues: NonZeroU16,
}

/// Why a disk's configuration is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BlockConfError {
    /// No image.
    #[error("a disk needs an image: write its path, as in virtio-blk,disk.img")]
    NoPath,
    /// Not an option.
    #[error(
        "a disk has no option '{0}': there are nocache direct sync ro sectorsize=L[/P] ser=TEXT \
         nodelete snapshot format=raw|qcow2 aio=threads|io_uring queues=N \
         virtio=legacy|modern|transitional"
    )]
    Unknown(String),
    /// Not a block size.
    #[error(
        "'{0}' is no sector size: write LOGICAL or LOGICAL/PHYSICAL, powers of two from 512 to \
         65536, the physical one not smaller"
    )]
    SectorSize(String),
    /// Not a serial number.
    #[error("serial number '{0}' is not 1 to 20 printable ASCII characters")]
    Serial(String),
    /// Not a format.
    #[error("'{0}' is no image format: write raw or qcow2")]
    Format(String),
    /// Not an engine.
    #[error("'{0}' moves no bytes: write threads or io_uring")]
    Engine(String),
    /// Not a number of queues.
    #[error("a disk has 1 to {MAX_QUEUES} queues, not '{0}'")]
    Queues(String),
}

impl BlockSpec {
    /// Takes one `name` or `name=value`; whether there is such an option.
    ///
    /// # Errors
    /// The value cannot be.
    pub fn option(&mut self, text: &str) -> Result<bool, BlockConfError> {
        let (name, value) = match text.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (text, None),
        };
        match (name, value) {
            ("nocache", None) => self.nocache = true,
            ("direct" | "sync", None) => self.sync = true,
            ("ro", None) => self.read_only = true,
            ("nodelete", None) => self.nodelete = true,
            ("snapshot", None) => self.snapshot = true,
            ("sectorsize", Some(value)) => self.block_size = Some(block_size(value)?),
            ("ser" | "serial", Some(value)) => self.serial = Some(serial(value)?),
            ("format", Some(value)) => {
                self.format = Some(match value {
                    "raw" => ImageFormat::Raw,
                    "qcow2" => ImageFormat::Qcow2,
                    _ => return Err(BlockConfError::Format(value.to_owned())),
                });
            }
            ("aio", Some(value)) => {
                self.engine = match value {
                    "threads" => AioEngine::Threads,
                    "io_uring" => AioEngine::IoUring,
                    _ => return Err(BlockConfError::Engine(value.to_owned())),
                };
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Has a copy's own disk in place of the image, for a guest that is not to notice.
    pub fn replace(&mut self, by: &OwnDisk) {
        self.serial = Some(self.serial());
        self.block_size = Some(by.blocks);
        self.format = Some(ImageFormat::Qcow2);
        self.in_place_of = Some(std::mem::replace(&mut self.path, by.layer.clone()));
        if self.engine == AioEngine::IoUring {
            // Which only a raw image has.
            self.engine = AioEngine::Auto;
        }
    }

    /// The serial number that was given, or one that is the image's path's: the same at every start,
    /// and another for each disk.
    pub fn serial(&self) -> String {
        self.serial.clone().unwrap_or_else(|| {
            let path = absolute(&self.path);
            let uuid = Uuid::new_v5(&Uuid::NAMESPACE_URL, path.as_os_str().as_encoded_bytes());
            let [a, b, c, d, e, f, ..] = uuid.into_bytes();
            format!("RHYVE-{a:02X}{b:02X}-{c:02X}{d:02X}-{e:02X}{f:02X}")
        })
    }

    /// The image, unless the guest cannot write to it; `blocks` are those of the disk.
    pub fn written(&self, blocks: (u32, u32)) -> Option<WrittenDisk> {
        if self.read_only || self.snapshot {
            return None;
        }
        Some(WrittenDisk {
            named: absolute(self.in_place_of.as_ref().unwrap_or(&self.path)),
            path: absolute(&self.path),
            format: match self.format() {
                ImageFormat::Raw => DiskFormat::Raw,
                ImageFormat::Qcow2 => DiskFormat::Qcow2,
            },
            blocks,
        })
    }

    /// What was said, or what the name says. What is in the image is not asked: a guest can write
    /// anything there.
    pub fn format(&self) -> ImageFormat {
        let named = |path: &Path| path.extension().is_some_and(|end| end == "qcow2");
        self.format.unwrap_or(if named(&self.path) {
            ImageFormat::Qcow2
        } else {
            ImageFormat::Raw
        })
    }
}

impl BlkSpec {
    /// Reads `PATH[,option]...`.
    ///
    /// # Errors
    /// [`SlotError::Block`] and, for `virtio=`, [`SlotError::Value`].
    pub fn parse(conf: &str) -> Result<Self, SlotError> {
        let (path, options) = conf.split_once(',').unwrap_or((conf, ""));
        let mut spec = Self {
            disk: path.parse()?,
            transport: Transport::default(),
            queues: NonZeroU16::MIN,
        };
        for word in options.split(',').filter(|word| !word.is_empty()) {
            match word.split_once('=') {
                Some(("virtio", value)) => spec.transport = transport(value)?,
                Some(("queues", value)) => {
                    let queues = value.parse().ok();
                    let queues = queues.filter(|queues: &NonZeroU16| queues.get() <= MAX_QUEUES);
                    let wrong = || BlockConfError::Queues(value.to_owned());
                    spec.queues = queues.ok_or_else(wrong)?;
                }
                _ if spec.disk.option(word)? => {}
                _ => return Err(BlockConfError::Unknown(word.to_owned()).into()),
            }
        }
        Ok(spec)
    }
}

impl FromStr for BlockSpec {
    type Err = BlockConfError;

    /// Reads `PATH[,option]...`.
    fn from_str(text: &str) -> Result<Self, BlockConfError> {
        let mut words = text.split(',');
        let path = words.next().filter(|path| !path.is_empty());
        let mut spec = Self {
            path: path.ok_or(BlockConfError::NoPath)?.into(),
            ..Self::default()
        };
        for word in words {
            if !spec.option(word)? {
                return Err(BlockConfError::Unknown(word.to_owned()));
            }
        }
        Ok(spec)
    }
}

fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}

fn block_size(text: &str) -> Result<(u32, u32), BlockConfError> {
    let (logical, physical) = text.split_once('/').unwrap_or((text, text));
    let size = |text: &str| {
        let size = text.parse().ok();
        size.filter(|size: &u32| size.is_power_of_two() && (512..=65536).contains(size))
    };
    match (size(logical), size(physical)) {
        (Some(logical), Some(physical)) if logical <= physical => Ok((logical, physical)),
        _ => Err(BlockConfError::SectorSize(text.to_owned())),
    }
}

fn serial(text: &str) -> Result<String, BlockConfError> {
    let printable = |byte: u8| byte == b' ' || byte.is_ascii_graphic();
    if (1..=20).contains(&text.len()) && text.bytes().all(printable) {
        Ok(text.to_owned())
    } else {
        Err(BlockConfError::Serial(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_option_is_read() {
        let spec: BlockSpec = "disk.img,nocache,direct,ro,sectorsize=512/4096,ser=S1,nodelete,\
                               snapshot,format=qcow2,aio=io_uring"
            .parse()
            .unwrap();
        let wanted = BlockSpec {
            path: "disk.img".into(),
            format: Some(ImageFormat::Qcow2),
            nocache: true,
            sync: true,
            read_only: true,
            block_size: Some((512, 4096)),
            serial: Some("S1".into()),
            nodelete: true,
            snapshot: true,
            engine: AioEngine::IoUring,
            in_place_of: None,
        };
        assert_eq!(spec, wanted);
        let plain: BlockSpec = "a.qcow2,sync,aio=threads".parse().unwrap();
        assert_eq!(plain.format(), ImageFormat::Qcow2);
        assert!(plain.sync && plain.engine == AioEngine::Threads);
        let raw: BlockSpec = "a.qcow2,format=raw".parse().unwrap();
        assert_eq!(raw.format(), ImageFormat::Raw);
        assert_eq!(
            "disk".parse::<BlockSpec>().unwrap().format(),
            ImageFormat::Raw
        );
    }

    #[test]
    fn each_mistake_is_named() {
        let err = |text: &str| text.parse::<BlockSpec>().unwrap_err();
        assert_eq!(err(""), BlockConfError::NoPath);
        assert_eq!(err(",ro"), BlockConfError::NoPath);
        assert_eq!(err("a,rw"), BlockConfError::Unknown("rw".into()));
        assert_eq!(err("a,ro=1"), BlockConfError::Unknown("ro=1".into()));
        for size in ["", "0", "513", "256", "131072", "4096/512", "512/", "x"] {
            let text = format!("a,sectorsize={size}");
            assert_eq!(err(&text), BlockConfError::SectorSize(size.into()));
        }
        let long = "x".repeat(21);
        for text in ["", "é", long.as_str()] {
            assert_eq!(
                err(&format!("a,ser={text}")),
                BlockConfError::Serial(text.into())
            );
        }
        assert_eq!(err("a,format=vmdk"), BlockConfError::Format("vmdk".into()));
        assert_eq!(err("a,aio=magic"), BlockConfError::Engine("magic".into()));
    }

    #[test]
    fn another_file_has_the_same_serial_number_and_blocks() {
        let mut spec: BlockSpec = "/d/disk.img,aio=io_uring".parse().unwrap();
        let serial = spec.serial();
        spec.replace(&OwnDisk {
            named: "/d/disk.img".into(),
            layer: "/d/disk.img.copy".into(),
            base: "/d/disk.img.copy.base".into(),
            blocks: (512, 4096),
        });
        assert_eq!(spec.serial(), serial);
        assert_eq!(
            (spec.format(), spec.engine),
            (ImageFormat::Qcow2, AioEngine::Auto)
        );
        let written = WrittenDisk {
            named: "/d/disk.img".into(),
            path: "/d/disk.img.copy".into(),
            format: DiskFormat::Qcow2,
            blocks: (512, 4096),
        };
        assert_eq!(spec.written((512, 4096)), Some(written));
        for unwritten in ["/d/disk.img,ro", "/d/disk.img,snapshot"] {
            let spec: BlockSpec = unwritten.parse().unwrap();
            assert_eq!(spec.written((512, 512)), None);
        }
    }

    #[test]
    fn a_device_has_options_of_its_own() {
        let spec = BlkSpec::parse("disk.img,queues=4,ro,virtio=legacy").unwrap();
        let wanted = BlkSpec {
            disk: "disk.img,ro".parse().unwrap(),
            transport: Transport::Legacy,
            queues: NonZeroU16::new(4).unwrap(),
        };
        assert_eq!(spec, wanted);
        let plain = BlkSpec::parse("disk.img").unwrap();
        assert_eq!(
            (plain.queues.get(), plain.transport),
            (1, Transport::Customary)
        );
        let err = |conf: &str| BlkSpec::parse(conf).unwrap_err();
        assert_eq!(err(""), BlockConfError::NoPath.into());
        assert_eq!(err("a,x"), BlockConfError::Unknown("x".into()).into());
        for queues in ["", "0", "65", "-1"] {
            let conf = format!("a,queues={queues}");
            assert_eq!(err(&conf), BlockConfError::Queues(queues.into()).into());
        }
        assert!(matches!(err("a,virtio=old"), SlotError::Value { .. }));
    }

    proptest::proptest! {
        #[test]
        fn any_text_is_answered(text in "[a-z0-9=,/]{0,40}") {
            if let Ok(spec) = text.parse::<BlockSpec>() {
                proptest::prop_assert!(!spec.path.as_os_str().is_empty());
            }
        }
    }
}
