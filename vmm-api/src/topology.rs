//! How many vCPUs there are and how they are grouped into cores and sockets.

use serde::{Deserialize, Serialize};

/// Sockets of cores of threads; each number is at least 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Topology {
    /// Processor packages.
    pub sockets: u32,
    /// Cores a package.
    pub cores: u32,
    /// Threads a core.
    pub threads: u32,
}

impl Topology {
    /// bhyve's default: every vCPU is a package of its own.
    pub fn packages(cpus: u32) -> Self {
        Self {
            sockets: cpus,
            cores: 1,
            threads: 1,
        }
    }

    /// All vCPUs.
    pub fn cpus(&self) -> u32 {
        self.sockets
            .saturating_mul(self.cores)
            .saturating_mul(self.threads)
    }

    /// Bits of an APIC id that number the thread in its core.
    pub fn thread_bits(&self) -> u32 {
        bits(self.threads)
    }

    /// Bits of an APIC id that number the thread and the core in their package.
    pub fn package_bits(&self) -> u32 {
        bits(self.threads) + bits(self.cores)
    }

    /// The APIC id of the vCPU with this index: its place in each group in a bit field of its own
    /// (Intel SDM volume 3, 9.9.1), so the ids have gaps where a group's size is no power of two.
    pub fn apic_id(&self, index: u32) -> u32 {
        let thread = index % self.threads;
        let core = index / self.threads % self.cores;
        let socket = index / self.threads / self.cores;
        (socket << self.package_bits()) | (core << self.thread_bits()) | thread
    }
}

fn bits(n: u32) -> u32 {
    n.next_power_of_two().trailing_zeros()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_indices_where_groups_are_powers_of_two() {
        for topology in [
            Topology::packages(5),
            Topology {
                sockets: 2,
                cores: 4,
                threads: 2,
            },
        ] {
            for index in 0..topology.cpus() {
                assert_eq!(topology.apic_id(index), index);
            }
        }
    }

    #[test]
    fn odd_groups_leave_gaps() {
        let topology = Topology {
            sockets: 2,
            cores: 3,
            threads: 1,
        };
        let ids: Vec<_> = (0..topology.cpus()).map(|i| topology.apic_id(i)).collect();
        assert_eq!(ids, [0, 1, 2, 4, 5, 6]);
    }
}
