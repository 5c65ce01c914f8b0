//! A guest's memory for tests: some bytes from guest-physical 0 on, seen without paging.

use std::ops::Range;

use super::View;
use crate::memory::MemoryError;
use crate::pagewalk::PhysicalMemory;
use crate::regs::Registers;

/// Memory that tests write.
pub struct Ram {
    bytes: Vec<u8>,
    registers: Registers,
}

impl Ram {
    /// Zeros.
    pub fn new(len: usize) -> Self {
        let mut registers = Registers::reset();
        registers.cs.base = 0;
        Self {
            bytes: vec![0; len],
            registers,
        }
    }

    pub fn put(&mut self, at: u64, bytes: &[u8]) {
        let at = at as usize;
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    pub fn half(&mut self, at: u64, half: u32) {
        self.put(at, &half.to_le_bytes());
    }

    pub fn word(&mut self, at: u64, word: u64) {
        self.put(at, &word.to_le_bytes());
    }

    pub fn view(&self) -> View<'_> {
        View {
            memory: self,
            registers: &self.registers,
        }
    }

    pub fn vcpus(&self) -> &[Registers] {
        std::slice::from_ref(&self.registers)
    }
}

impl PhysicalMemory for Ram {
    fn read_physical(&self, gpa: u64, bytes: &mut [u8]) -> Result<(), MemoryError> {
        let len = bytes.len() as u64;
        let end = gpa.checked_add(len);
        let found = end.and_then(|end| self.bytes.get(gpa as usize..end as usize));
        bytes.copy_from_slice(found.ok_or(MemoryError::NotRam { gpa, len })?);
        Ok(())
    }

    fn next_written(&self, gpa: u64) -> Option<Range<u64>> {
        let len = self.bytes.len() as u64;
        (gpa < len).then_some(gpa..len)
    }
}
