//! rhyveload against cp: the same file, to the same tmpfs.

use std::error::Error;
use std::path::Path;
use std::process::Command;

use serde::{Deserialize, Serialize};

use super::process::time;
use super::sample::Sample;

/// Wall times of the whole processes, in milliseconds.
#[derive(Debug, Serialize, Deserialize)]
pub struct Copy {
    pub cp_ms: Sample,
    pub rhyveload_ms: Sample,
}

/// Copies and loads `kernel`, which is on the tmpfs that has `dir`, by turns; each time to where
/// nothing is.
pub fn measure(
    programs: &Path,
    kernel: &Path,
    dir: &Path,
    runs: u32,
) -> Result<Copy, Box<dyn Error>> {
    let (mut cp, mut load) = (Vec::new(), Vec::new());
    // The first of each brings the programs into memory.
    for run in 0..=runs {
        let target = dir.join("copy");
        let copied = time(Command::new("cp").arg(kernel).arg(&target))?;
        std::fs::remove_file(&target)?;
        let root = dir.join("root");
        let mut rhyveload = Command::new(programs.join("rhyveload"));
        rhyveload.env("RHYVE_ROOT", &root).args(["-m", "256M"]);
        let loaded = time(rhyveload.arg("--kernel").arg(kernel).arg("copy"))?;
        std::fs::remove_dir_all(&root)?;
        if run != 0 {
            cp.push(copied.as_secs_f64() * 1e3);
            load.push(loaded.as_secs_f64() * 1e3);
        }
    }
    Ok(Copy {
        cp_ms: cp.into(),
        rhyveload_ms: load.into(),
    })
}
