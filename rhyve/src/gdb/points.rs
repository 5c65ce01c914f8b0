//! Breakpoints and watchpoints: INT3 in the guest's memory, and the debug registers.

use vmm_api::kvm::{POINTS, Point};
use vmm_api::memory::{GuestRam, MemoryError};

/// The instruction of a software breakpoint.
const INT3: u8 = 0xcc;

/// An INT3 and what it stands on.
#[derive(Clone, Copy, Debug)]
struct Software {
    gla: u64,
    gpa: u64,
    original: u8,
}

/// All that is set.
#[derive(Debug, Default)]
pub struct Points {
    software: Vec<Software>,
    hardware: [Option<Point>; POINTS],
}

impl Points {
    /// The debug registers.
    pub fn hardware(&self) -> [Option<Point>; POINTS] {
        self.hardware
    }

    /// Whether there are software breakpoints.
    pub fn has_software(&self) -> bool {
        !self.software.is_empty()
    }

    /// Whether a software breakpoint is at this linear address.
    pub fn is_software(&self, gla: u64) -> bool {
        self.software.iter().any(|point| point.gla == gla)
    }

    /// Puts an INT3 there; a second one is the same.
    ///
    /// # Errors
    ///
    /// That is no RAM, or the host has no room for it.
    pub fn add_software(&mut self, ram: &GuestRam, gla: u64, gpa: u64) -> Result<(), MemoryError> {
        if self.is_software(gla) {
            return Ok(());
        }
        // Another address may lead to the same place.
        let known = self.software.iter().find(|point| point.gpa == gpa);
        let original = match known {
            Some(point) => point.original,
            None => {
                let mut byte = [0];
                ram.read(gpa, &mut byte)?;
                byte[0]
            }
        };
        ram.write(gpa, &[INT3])?;
        self.software.push(Software { gla, gpa, original });
        Ok(())
    }

    /// Takes an INT3 away; false if there was none.
    ///
    /// # Errors
    ///
    /// Memory cannot be written.
    pub fn remove_software(&mut self, ram: &GuestRam, gla: u64) -> Result<bool, MemoryError> {
        let Some(at) = self.software.iter().position(|point| point.gla == gla) else {
            return Ok(false);
        };
        let point = self.software.swap_remove(at);
        if !self.software.iter().any(|other| other.gpa == point.gpa) {
            restore(ram, point)?;
        }
        Ok(true)
    }

    /// Takes everything away.
    pub fn clear(&mut self, ram: &GuestRam) {
        for point in self.software.drain(..) {
            if let Err(error) = restore(ram, point) {
                let error = crate::chain(&error);
                tracing::error!(target: "rhyve::gdb", "breakpoint at {:#x}: {error}", point.gla);
            }
        }
        self.hardware = [None; POINTS];
    }

    /// Takes a debug register; false if all are taken.
    pub fn add_hardware(&mut self, point: Point) -> bool {
        let free = self.hardware.iter_mut().find(|slot| slot.is_none());
        free.map(|slot| *slot = Some(point)).is_some()
    }

    /// Frees a debug register; false if none has this.
    pub fn remove_hardware(&mut self, point: Point) -> bool {
        let taken = self.hardware.iter_mut().find(|slot| **slot == Some(point));
        taken.map(|slot| *slot = None).is_some()
    }

    /// Which debug register DR6 tells of.
    pub fn hit(&self, dr6: u64) -> Option<Point> {
        let slots = self.hardware.iter().enumerate();
        slots
            .filter(|(n, _)| dr6 >> n & 1 != 0)
            .find_map(|(_, slot)| *slot)
    }

    /// Shows what was read at `gpa` as if there were no breakpoints.
    pub fn hide(&self, gpa: u64, bytes: &mut [u8]) {
        for point in &self.software {
            let at = point
                .gpa
                .checked_sub(gpa)
                .and_then(|at| usize::try_from(at).ok());
            if let Some(byte) = at.and_then(|at| bytes.get_mut(at)) {
                *byte = point.original;
            }
        }
    }

    /// Bytes were written at `gpa`: the breakpoints there stand on those now.
    ///
    /// # Errors
    ///
    /// Memory cannot be written.
    pub fn written(&mut self, ram: &GuestRam, gpa: u64, bytes: &[u8]) -> Result<(), MemoryError> {
        for point in &mut self.software {
            let at = point
                .gpa
                .checked_sub(gpa)
                .and_then(|at| usize::try_from(at).ok());
            if let Some(byte) = at.and_then(|at| bytes.get(at)) {
                point.original = *byte;
                ram.write(point.gpa, &[INT3])?;
            }
        }
        Ok(())
    }
}

/// Puts back what an INT3 stands on, unless the guest has put something else there meanwhile.
fn restore(ram: &GuestRam, point: Software) -> Result<(), MemoryError> {
    let mut now = [0];
    ram.read(point.gpa, &mut now)?;
    if now == [INT3] {
        ram.write(point.gpa, &[point.original])?;
    }
    Ok(())
}
