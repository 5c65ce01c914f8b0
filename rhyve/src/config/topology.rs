//! How many virtual CPUs there are and how they are arranged.

use std::str::FromStr;

/// Virtual CPUs and their place in packages and cores: `cpus == sockets * cores * threads`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuTopology {
    /// Number of virtual CPUs, 1 to 65535.
    pub cpus: u16,
    /// Packages in the machine.
    pub sockets: u16,
    /// Cores in a package.
    pub cores: u16,
    /// Threads of a core.
    pub threads: u16,
}

impl CpuTopology {
    /// Each vCPU's number and APIC id.
    pub fn apic_ids(self) -> impl Iterator<Item = (u32, u32)> {
        let topology = vmm_api::topology::Topology::from(self);
        (0..self.cpus.into()).map(move |index| (index, topology.apic_id(index)))
    }
}

impl From<CpuTopology> for vmm_api::topology::Topology {
    fn from(cpus: CpuTopology) -> Self {
        let [sockets, cores, threads] = [cpus.sockets, cpus.cores, cpus.threads].map(u32::from);
        Self {
            sockets,
            cores,
            threads,
        }
    }
}

/// Why a topology is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TopologyError {
    /// Not a number from 1 to 65535.
    #[error("{key}={value}: give a number from 1 to 65535")]
    Number {
        /// Which of the four.
        key: &'static str,
        /// What was given.
        value: String,
    },
    /// A key that is none of the four.
    #[error("'{0}' is not one of cpus=N, sockets=N, cores=N, threads=N")]
    Key(String),
    /// The four do not agree.
    #[error(
        "{cpus} CPUs are not {sockets} sockets * {cores} cores * {threads} threads: \
         make them agree, or leave cpus= out"
    )]
    Product {
        /// CPUs asked for.
        cpus: u16,
        /// Sockets asked for, or 1.
        sockets: u16,
        /// Cores asked for, or 1.
        cores: u16,
        /// Threads asked for, or 1.
        threads: u16,
    },
    /// The product has no 16 bits.
    #[error("{0} sockets * {1} cores * {2} threads are more than 65535 CPUs")]
    TooMany(u16, u16, u16),
}

/// What has been said about the topology so far, by `-c` and by `-o`, in bhyve's own words.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TopologyRequest {
    cpus: Option<u16>,
    sockets: Option<u16>,
    cores: Option<u16>,
    threads: Option<u16>,
}

impl TopologyRequest {
    /// Sets one of `cpus`, `sockets`, `cores`, `threads`; what was said of it before is forgotten.
    ///
    /// # Errors
    /// [`TopologyError::Key`] and [`TopologyError::Number`].
    pub fn set(&mut self, key: &str, value: &str) -> Result<(), TopologyError> {
        let (key, place) = match key {
            "cpus" => ("cpus", &mut self.cpus),
            "sockets" => ("sockets", &mut self.sockets),
            "cores" => ("cores", &mut self.cores),
            "threads" => ("threads", &mut self.threads),
            _ => return Err(TopologyError::Key(key.to_owned())),
        };
        let number = value.parse().ok().filter(|&n| n > 0);
        *place = Some(number.ok_or(TopologyError::Number {
            key,
            value: value.to_owned(),
        })?);
        Ok(())
    }

    /// Reads `-c`'s argument, `[cpus=]N[,sockets=N][,cores=N][,threads=N]`, over what is there.
    ///
    /// # Errors
    /// As [`Self::set`].
    pub fn read(&mut self, text: &str) -> Result<(), TopologyError> {
        for (place, item) in text.split(',').enumerate() {
            match item.split_once('=') {
                Some((key, value)) => self.set(key, value)?,
                None if place == 0 => self.set("cpus", item)?,
                None => return Err(TopologyError::Key(item.to_owned())),
            }
        }
        Ok(())
    }

    /// The topology that was asked for. CPUs alone are as many sockets, as in bhyve; what is not
    /// said is 1.
    ///
    /// # Errors
    /// [`TopologyError::Product`] and [`TopologyError::TooMany`].
    pub fn settle(self) -> Result<CpuTopology, TopologyError> {
        if let Self {
            cpus: Some(cpus),
            sockets: None,
            cores: None,
            threads: None,
        } = self
        {
            return Ok(CpuTopology {
                cpus,
                sockets: cpus,
                cores: 1,
                threads: 1,
            });
        }
        let [sockets, cores, threads] =
            [self.sockets, self.cores, self.threads].map(|n| n.unwrap_or(1));
        let product = sockets
            .checked_mul(cores)
            .and_then(|n| n.checked_mul(threads));
        match (self.cpus, product) {
            (Some(cpus), product) if product != Some(cpus) => Err(TopologyError::Product {
                cpus,
                sockets,
                cores,
                threads,
            }),
            (_, Some(cpus)) => Ok(CpuTopology {
                cpus,
                sockets,
                cores,
                threads,
            }),
            (_, None) => Err(TopologyError::TooMany(sockets, cores, threads)),
        }
    }
}

impl FromStr for CpuTopology {
    type Err = TopologyError;

    fn from_str(text: &str) -> Result<Self, TopologyError> {
        let mut request = TopologyRequest::default();
        request.read(text)?;
        request.settle()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bhyves_forms_are_read() {
        for (text, cpus, sockets, cores, threads) in [
            ("1", 1, 1, 1, 1),
            ("4", 4, 4, 1, 1),
            ("cpus=4", 4, 4, 1, 1),
            ("8,sockets=2,cores=2,threads=2", 8, 2, 2, 2),
            ("cores=4", 4, 1, 4, 1),
            ("threads=2,cores=3", 6, 1, 3, 2),
            ("2,cpus=6,cores=6", 6, 1, 6, 1),
        ] {
            let wanted = CpuTopology {
                cpus,
                sockets,
                cores,
                threads,
            };
            assert_eq!(text.parse(), Ok(wanted), "{text}");
        }
    }

    #[test]
    fn each_mistake_is_named() {
        let err = |s: &str| s.parse::<CpuTopology>().unwrap_err().to_string();
        assert_eq!(err("0"), "cpus=0: give a number from 1 to 65535");
        assert_eq!(err(""), "cpus=: give a number from 1 to 65535");
        assert_eq!(
            err("cores=65536"),
            "cores=65536: give a number from 1 to 65535"
        );
        assert_eq!(
            err("2,2"),
            "'2' is not one of cpus=N, sockets=N, cores=N, threads=N"
        );
        assert_eq!(
            err("2,dies=2"),
            "'dies' is not one of cpus=N, sockets=N, cores=N, threads=N"
        );
        assert_eq!(
            err("4,cores=3"),
            "4 CPUs are not 1 sockets * 3 cores * 1 threads: make them agree, or leave cpus= out"
        );
        assert_eq!(
            err("cores=300,sockets=300"),
            "300 sockets * 300 cores * 1 threads are more than 65535 CPUs"
        );
    }
}
