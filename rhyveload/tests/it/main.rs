//! Loads made-up kernels, as plans and as a process.

#[cfg(test)]
mod elf;
#[cfg(test)]
mod image;
#[cfg(test)]
mod kernels;
#[cfg(test)]
mod linux;
#[cfg(test)]
mod process;
#[cfg(test)]
mod robustness;
