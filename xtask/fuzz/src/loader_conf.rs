//! loader.conf and its neighbours: whatever they say, reading them ends, and no value grows without
//! bounds.

use rhyveload::freebsd::config::{Config, Host, read};
use rhyveload::freebsd::words::words;
use rhyveload::source::{BootFs, DirEntry, FileKind, FsError, Source, Stat};

/// A value in loader.conf and in a command.
const VALUE_MAX: usize = 64 << 10;

/// The files, as a zero byte separates them.
const PATHS: [&str; 4] = [
    "/boot/defaults/loader.conf",
    "/boot/loader.conf",
    "/boot/loader.conf.d/a.conf",
    "/boot/a.conf",
];

#[derive(Debug)]
struct Files<'a>(Vec<&'a [u8]>);

impl BootFs for Files<'_> {
    fn open(&self, path: &str) -> Result<Box<dyn Source>, FsError> {
        let index = PATHS.iter().position(|known| *known == path);
        let file = index.and_then(|index| self.0.get(index));
        Ok(Box::new(file.ok_or(FsError::NotFound)?.to_vec()))
    }

    fn read_dir(&self, path: &str) -> Result<Vec<DirEntry>, FsError> {
        if path != "/boot/loader.conf.d" {
            return Err(FsError::NotFound);
        }
        Ok(vec![DirEntry {
            name: "a.conf".to_owned(),
            kind: FileKind::File,
        }])
    }

    fn stat(&self, _: &str) -> Result<Stat, FsError> {
        Err(FsError::NotFound)
    }
}

struct Reader<'a> {
    files: Files<'a>,
    config: Config,
    complaints: usize,
}

impl Host for Reader<'_> {
    fn fs(&self) -> &dyn BootFs {
        &self.files
    }

    fn config(&mut self) -> &mut Config {
        &mut self.config
    }

    fn complain(&mut self, text: &str) {
        assert!(!text.is_empty());
        self.complaints += 1;
    }

    fn command(&mut self, _: &str, command: &str) {
        if let Ok(words) = words(command, |name| self.config.env.get(name)) {
            let len: usize = words.iter().map(String::len).sum();
            assert!(len <= command.len() + VALUE_MAX);
        }
    }
}

/// The bytes are files with a zero byte between each two. True if nothing was wrong.
///
/// # Panics
///
/// A value is longer than it may be.
pub fn check(data: &[u8]) -> bool {
    let mut reader = Reader {
        files: Files(data.split(|&byte| byte == 0).collect()),
        config: Config::default(),
        complaints: 0,
    };
    read(&mut reader);
    for (name, value) in reader.config.env.iter() {
        assert!(value.len() <= VALUE_MAX, "{name}");
    }
    reader.complaints == 0
}

/// What a release has, and all that is special.
pub fn seeds() -> Vec<Vec<u8>> {
    vec![
        b"exec=\"echo Loading $kernel\"\nkernel=\"kernel\" # comment\n\
          loader_conf_files=\"/boot/loader.conf /boot/a.conf\"\n\0\
          virtio_load=\"YES\"\nvirtio_name=\"x\"\nvirtio_before=\"echo ${kernel}\"\n\
          autoboot_delay=-1\nloader_conf_files=\"/boot/loader.conf\"\n\0\
          a=\"${b}$c\\\"d\"\n\0b=word\n"
            .to_vec(),
        b"\0\0\0x=y".to_vec(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_are_taken() {
        assert!(seeds().iter().all(|seed| check(seed)));
        assert!(!check(b"a = \"b"));
    }
}
