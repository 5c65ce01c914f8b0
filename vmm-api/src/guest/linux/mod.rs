//! Linux, from 5.11 on: [`kallsyms`] says where things are, [`btf`] what they are made of; the kernel
//! log ([`log`]), the list of tasks ([`tasks`]) and that of [`modules`] are read with both.

pub mod btf;
mod image;
pub mod kallsyms;
pub mod log;
pub mod modules;
pub mod orc;
pub mod tasks;
pub mod vmcoreinfo;

pub use image::symbols;

use super::{GuestError, Symbols, View};
use crate::pagewalk::WalkError;
use btf::{Btf, Member};

/// Longer than any array of characters that is looked at.
const TEXT_MAX: u64 = 256;
/// More than any kernel's type information has.
const BTF_MAX: u64 = 64 << 20;

/// A kernel whose structures are known.
pub struct Linux<'a> {
    /// Its memory.
    pub view: View<'a>,
    /// Where things are.
    pub symbols: &'a Symbols,
    /// What they are made of.
    pub btf: Btf,
}

impl<'a> Linux<'a> {
    /// Reads what the kernel says of its types.
    ///
    /// # Errors
    ///
    /// It says nothing, or nothing that can be read.
    pub fn new(view: View<'a>, symbols: &'a Symbols) -> Result<Self, GuestError> {
        let start = symbols.address("__start_BTF");
        let start = start.ok_or_else(|| match symbols.address("init_task") {
            Some(_) => GuestError::NoTypes,
            None => GuestError::NoSymbol("__start_BTF", true),
        })?;
        let mut header = [0; 24];
        view.read(start, &mut header)?;
        let size = Btf::size(&header).filter(|&size| size <= BTF_MAX);
        let size = size.ok_or_else(|| GuestError::NoType("task_struct".into()))?;
        let bytes = view.bytes(start, size as usize)?;
        Ok(Self {
            view,
            symbols,
            btf: Btf::parse(&bytes)?,
        })
    }

    /// Where a variable is.
    fn address(&self, name: &'static str) -> Result<u64, GuestError> {
        let address = self.symbols.address(name);
        address.ok_or(GuestError::NoSymbol(name, true))
    }

    /// Reads a member of a structure that is an integer or a pointer.
    fn member(&self, at: u64, structure: &str, path: &str) -> Result<u64, GuestError> {
        Ok(self.view.member(at, self.btf.member(structure, path)?)?)
    }
}

impl View<'_> {
    /// Reads a member, an integer or a pointer, of the structure at an address.
    fn member(&self, at: u64, member: Member) -> Result<u64, WalkError> {
        self.number(at.wrapping_add(member.offset), member.size.min(8))
    }

    /// The same of a text in an array.
    fn text_of(&self, at: u64, member: Member) -> Result<String, WalkError> {
        let len = member.size.min(TEXT_MAX) as usize;
        self.text(at.wrapping_add(member.offset), len)
    }
}
