//! Loads made-up kernels, as plans and as a process.

mod elf;
mod kernels;
mod linux;
mod process;
