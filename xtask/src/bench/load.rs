//! rhyveload against cat: a FreeBSD kernel of 20 MB and 20 modules, out of a directory and out of an
//! image of 400 MB. Both are made up here: only their sizes and headers are a real one's.

use std::error::Error;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::process::time;
use super::sample::Sample;

const KERNEL: usize = 20 << 20;
const MODULES: usize = 20;
const MODULE: usize = 256 << 10;
const KERNBASE: u64 = 0xffff_ffff_8000_0000;

/// The image's size, as makefs takes it.
const IMAGE: &str = "400m";

/// How often a process's memory is looked at.
const GLANCE: Duration = Duration::from_micros(200);

/// Wall times of whole processes, and the memory of the one that loads.
#[derive(Debug, Serialize)]
pub struct Loads {
    /// cat of all files to /dev/null.
    pub cat_ms: Sample,
    /// cat of all files to one on the same tmpfs.
    pub cat_to_file_ms: Sample,
    pub directory_ms: Sample,
    pub image_ms: Sample,
    /// Anonymous memory and mapped files at their highest: all but the guest's pages.
    pub directory_mib: Sample,
    pub image_mib: Sample,
}

/// Makes the files on tmpfs, and loads them by turns; each time to where nothing is.
pub fn measure(programs: &Path, makefs: &Path, runs: u32) -> Result<Loads, Box<dyn Error>> {
    let dir = tempfile::Builder::new()
        .prefix("rhyve-bench-")
        .tempdir_in("/dev/shm")?;
    let tree = dir.path().join("tree");
    let files = make_tree(&tree)?;
    let image = dir.path().join("image");
    time(
        Command::new(makefs)
            .args(["-t", "ffs", "-B", "little", "-o", "version=2", "-s", IMAGE])
            .args([&image, &tree]),
    )?;
    let root = dir.path().join("root");
    let rhyveload = |from: &str, path: &Path| {
        let mut command = Command::new(programs.join("rhyveload"));
        command.env("RHYVE_ROOT", &root).args(["-m", "256M", from]);
        command.arg(path).arg("bench");
        command
    };
    let copy = dir.path().join("copy");
    let (mut cat, mut cat_to_file) = (Vec::new(), Vec::new());
    let (mut directory, mut disk) = (Vec::new(), Vec::new());
    let (mut directory_mib, mut disk_mib) = (Vec::new(), Vec::new());
    let sources = [("-h", &tree), ("-d", &image)];
    // The first of each brings the programs into memory.
    for run in 0..=runs {
        let mut ms = Vec::new();
        for to in [Path::new("/dev/null"), &copy] {
            let script = format!("exec cat \"$@\" > '{}'", to.display());
            let mut command = Command::new("sh");
            ms.push(milliseconds(time(
                command.args(["-c", &script, "sh"]).args(&files),
            )?));
        }
        fs::remove_file(&copy)?;
        for (option, path) in sources {
            ms.push(milliseconds(time(&mut rhyveload(option, path))?));
            fs::remove_dir_all(&root)?;
        }
        let mut mib = Vec::new();
        for (option, path) in sources {
            mib.push(resident_mib(&mut rhyveload(option, path))?);
            fs::remove_dir_all(&root)?;
        }
        if let ([a, b, c, d], [e, f], 1..) = (&ms[..], &mib[..], run) {
            cat.push(*a);
            cat_to_file.push(*b);
            directory.push(*c);
            disk.push(*d);
            directory_mib.push(*e);
            disk_mib.push(*f);
        }
    }
    Ok(Loads {
        cat_ms: cat.into(),
        cat_to_file_ms: cat_to_file.into(),
        directory_ms: directory.into(),
        image_ms: disk.into(),
        directory_mib: directory_mib.into(),
        image_mib: disk_mib.into(),
    })
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

impl Loads {
    /// A line for each figure, with its ratio to what it is compared with.
    pub fn table(&self) -> String {
        let mut text = String::new();
        let mut row = |name: &str, sample: &Sample, unit: &str, than: Option<&Sample>| {
            let ratio = than.map(|than| format!("{:8.2}", sample.median / than.median));
            let ratio = ratio.unwrap_or_default();
            let Sample {
                median, min, max, ..
            } = sample;
            // Writing to a String cannot fail.
            let _ = writeln!(
                text,
                "  {name:<38}{median:9.2}{min:9.2}{max:9.2} {unit:<4}{ratio}"
            );
        };
        let cat = &self.cat_ms;
        row("cat of the files to /dev/null", cat, "ms", None);
        row(
            "cat of the files to a file",
            &self.cat_to_file_ms,
            "ms",
            Some(cat),
        );
        row("rhyveload -h", &self.directory_ms, "ms", Some(cat));
        row(
            "rhyveload -d (UFS2)",
            &self.image_ms,
            "ms",
            Some(&self.directory_ms),
        );
        row(
            "memory beyond the guest's: -h",
            &self.directory_mib,
            "MiB",
            None,
        );
        row(
            "memory beyond the guest's: -d",
            &self.image_mib,
            "MiB",
            None,
        );
        text + "\n  columns: median, least, most, unit, ratio to cat to /dev/null, of -d to -h\n"
    }
}

/// Runs a command to its end, and sees how much memory that is not shared it has at the most.
fn resident_mib(command: &mut Command) -> Result<f64, Box<dyn Error>> {
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn()?;
    let status = format!("/proc/{}/status", child.id());
    let end = Instant::now() + Duration::from_secs(60);
    let mut most = 0;
    loop {
        if let Ok(text) = fs::read_to_string(&status) {
            most = most.max(resident_kib(&text));
        }
        if let Some(done) = child.try_wait()? {
            if !done.success() {
                return Err(format!("rhyveload ended with {done}").into());
            }
            return Ok(f64::from(most) / 1024.0);
        }
        if Instant::now() > end {
            child.kill()?;
            return Err("rhyveload does not end".into());
        }
        sleep(GLANCE);
    }
}

/// RssAnon and RssFile of /proc/PID/status (proc_pid_status(5)); guest memory is RssShmem.
fn resident_kib(status: &str) -> u32 {
    let lines = status.lines().filter_map(|line| line.split_once(':'));
    let ours = lines.filter(|(key, _)| matches!(*key, "RssAnon" | "RssFile"));
    ours.filter_map(|(_, value)| value.trim().trim_end_matches(" kB").parse::<u32>().ok())
        .sum()
}

/// Makes boot/ with its files, and says which they are.
fn make_tree(tree: &Path) -> Result<Vec<PathBuf>, Box<dyn Error>> {
    let kernels = tree.join("boot/kernel");
    fs::create_dir_all(&kernels)?;
    let mut conf = String::from("autoboot_delay=-1\n");
    let mut files = vec![kernels.join("kernel")];
    fs::write(&files[0], kernel())?;
    for number in 0..MODULES {
        let path = kernels.join(format!("module{number}.ko"));
        fs::write(&path, module())?;
        files.push(path);
        writeln!(conf, "module{number}_load=YES")?;
    }
    fs::write(tree.join("boot/loader.conf"), conf)?;
    Ok(files)
}

/// Bytes that are not zeros, which would not be copied.
fn content(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at * 7 + at / 4096) as u8 | 1).collect()
}

/// An ELF64 file header for FreeBSD/amd64 (System V ABI, figure 4-3).
fn header(kind: u16, entry: u64, sections: (u64, u16), programs: u16) -> Vec<u8> {
    let mut bytes = b"\x7fELF\x02\x01\x01\x09\0\0\0\0\0\0\0\0".to_vec();
    for half in [kind, 62] {
        bytes.extend_from_slice(&half.to_le_bytes());
    }
    bytes.extend_from_slice(&1u32.to_le_bytes());
    for word in [entry, if programs == 0 { 0 } else { 64 }, sections.0] {
        bytes.extend_from_slice(&word.to_le_bytes());
    }
    bytes.extend_from_slice(&0u32.to_le_bytes());
    let names = sections.1.saturating_sub(1);
    for half in [64, 56, programs, 64, sections.1, names] {
        bytes.extend_from_slice(&half.to_le_bytes());
    }
    bytes
}

/// A kernel with one segment.
fn kernel() -> Vec<u8> {
    let mut bytes = header(2, KERNBASE + 0x20_0000, (0, 0), 1);
    bytes.extend_from_slice(&[1, 0, 0, 0, 5, 0, 0, 0]);
    let at = KERNBASE + 0x20_0000;
    for word in [120, at, at, KERNEL as u64, KERNEL as u64, 0x20_0000] {
        bytes.extend_from_slice(&word.to_le_bytes());
    }
    bytes.extend(content(KERNEL));
    bytes
}

/// A module with text, a symbol table, and names.
fn module() -> Vec<u8> {
    // Type, length, link; in the order of the file.
    let sections = [
        (0u32, 0, 0u32),
        (1, MODULE, 0),
        (2, 24, 3),
        (3, 16, 0),
        (3, 16, 0),
    ];
    let length: usize = sections.iter().map(|section| section.1).sum();
    let mut bytes = header(1, 0, (64 + length as u64, sections.len() as u16), 0);
    bytes.extend(content(MODULE));
    bytes.resize(64 + length, 0);
    let mut offset = 64u64;
    for (kind, length, link) in sections {
        bytes.extend_from_slice(&0u32.to_le_bytes());
        bytes.extend_from_slice(&kind.to_le_bytes());
        for word in [0, 0, offset, length as u64] {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
        bytes.extend_from_slice(&link.to_le_bytes());
        bytes.extend_from_slice(&0u32.to_le_bytes());
        for word in [8u64, 0] {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
        offset += length as u64;
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_is_read() {
        let status = "VmRSS:\t 9000 kB\nRssAnon:\t    1204 kB\nRssFile:\t    2000 kB\n\
                      RssShmem:\t    5796 kB\n";
        assert_eq!(resident_kib(status), 3204);
    }

    #[test]
    fn headers_are_as_long_as_they_should_be() {
        assert_eq!(header(1, 0, (0, 0), 0).len(), 64);
        assert_eq!(kernel().len(), 64 + 56 + KERNEL);
        assert_eq!(module().len(), 64 + MODULE + 24 + 32 + 5 * 64);
    }
}
