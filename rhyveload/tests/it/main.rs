//! Loads made-up kernels, as plans and as a process, and reads file systems.

#[cfg(test)]
mod boot;
#[cfg(test)]
mod configuration;
#[cfg(test)]
mod disks;
#[cfg(test)]
mod elf;
#[cfg(test)]
mod freebsd_files;
#[cfg(test)]
mod image;
#[cfg(test)]
mod kernels;
#[cfg(test)]
mod linux;
#[cfg(test)]
mod process;
#[cfg(test)]
mod prompt;
#[cfg(test)]
mod robustness;
#[cfg(test)]
mod ufs_damage;
#[cfg(test)]
mod ufs_files;
