//! Memory as one vCPU sees it.

use crate::pagewalk::{self, PhysicalMemory, WalkError};
use crate::regs::Registers;

/// Linear addresses by one vCPU's page tables.
#[derive(Clone, Copy)]
pub struct View<'a> {
    /// Guest-physical memory.
    pub memory: &'a dyn PhysicalMemory,
    /// The vCPU.
    pub registers: &'a Registers,
}

impl View<'_> {
    /// Reads bytes.
    ///
    /// # Errors
    ///
    /// They are not all mapped to RAM.
    pub fn read(&self, gla: u64, bytes: &mut [u8]) -> Result<(), WalkError> {
        pagewalk::copyin(self.memory, self.registers, gla, bytes)
    }

    /// Reads this many bytes.
    ///
    /// # Errors
    ///
    /// As [`View::read`].
    pub fn bytes(&self, gla: u64, len: usize) -> Result<Vec<u8>, WalkError> {
        let mut bytes = vec![0; len];
        self.read(gla, &mut bytes)?;
        Ok(bytes)
    }

    /// Reads this many bytes, or as many as there are before the first page that cannot be read.
    pub fn bytes_up_to(&self, gla: u64, len: usize) -> Vec<u8> {
        const PAGE: u64 = 4096;
        let mut bytes = Vec::new();
        while bytes.len() < len {
            let Some(at) = gla.checked_add(bytes.len() as u64) else {
                break;
            };
            let piece = ((PAGE - at % PAGE) as usize).min(len - bytes.len());
            match self.bytes(at, piece) {
                Ok(piece) => bytes.extend(piece),
                Err(_) => break,
            }
        }
        bytes
    }

    /// Reads an integer of up to 8 bytes, little endian.
    ///
    /// # Errors
    ///
    /// As [`View::read`].
    pub fn number(&self, gla: u64, size: u64) -> Result<u64, WalkError> {
        let mut word = [0; 8];
        let size = usize::try_from(size).unwrap_or(8).min(8);
        if let Some(bytes) = word.get_mut(..size) {
            self.read(gla, bytes)?;
        }
        Ok(u64::from_le_bytes(word))
    }

    /// Reads 64 bits.
    ///
    /// # Errors
    ///
    /// As [`View::read`].
    pub fn word(&self, gla: u64) -> Result<u64, WalkError> {
        self.number(gla, 8)
    }

    /// Reads 32 bits.
    ///
    /// # Errors
    ///
    /// As [`View::read`].
    pub fn half(&self, gla: u64) -> Result<u32, WalkError> {
        Ok(self.number(gla, 4)? as u32)
    }

    /// Reads text up to its zero, at most `len` bytes.
    ///
    /// # Errors
    ///
    /// As [`View::read`].
    pub fn text(&self, gla: u64, len: usize) -> Result<String, WalkError> {
        let bytes = self.bytes(gla, len)?;
        let text = bytes.split(|&b| b == 0).next().unwrap_or_default();
        Ok(String::from_utf8_lossy(text).into_owned())
    }
}
