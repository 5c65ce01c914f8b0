//! The seed's "Hardware Requirements" as a report: what this machine has, one line a requirement,
//! with the reason and the mend.
//!
//! Facts are gathered first, from /dev/kvm, /proc and /sys; then they are judged, and nothing
//! else, so that machines which are not at hand can be judged too.

use std::collections::BTreeMap;
use std::path::Path;

use kvm_bindings::KVM_API_VERSION;
use kvm_ioctls::Kvm;
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};
use nix::sys::statfs::{TMPFS_MAGIC, statfs};
use serde::{Deserialize, Serialize};

use super::{CAPABILITIES, DEVICE, open_device};
use crate::root::{Root, RootError};

/// What this machine has of what rhyve asks for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostReport {
    /// One entry a requirement, from the processor up.
    pub requirements: Vec<Requirement>,
}

/// One requirement.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Requirement {
    /// What is required.
    pub name: String,
    /// Whether it is there.
    pub status: Standing,
    /// What was found.
    pub found: String,
    /// What it is for, or what its absence means.
    pub reason: String,
    /// What to do about it; empty if there is nothing to mend.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub mend: String,
}

/// Whether a requirement is met.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Standing {
    /// It is.
    Ok,
    /// Guests run, but not all, or not with everything.
    Limited,
    /// It is not, and no guest runs without it.
    Missing,
}

impl Standing {
    /// The standing in one word.
    pub fn word(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Limited => "limited",
            Self::Missing => "missing",
        }
    }
}

/// What KVM itself says.
#[derive(Clone, Debug, Default)]
struct KvmFacts {
    api: i32,
    capabilities: Vec<bool>,
    msrs: usize,
    recommended_vcpus: usize,
    max_vcpus: usize,
}

/// What was found on a machine.
#[derive(Clone, Debug, Default)]
struct Facts {
    model: String,
    flags: Vec<String>,
    /// Parameters of each of KVM's modules that are there.
    modules: BTreeMap<&'static str, BTreeMap<String, String>>,
    /// KVM, or the error's text and its mend in one.
    kvm: Option<Result<KvmFacts, String>>,
    iommu: bool,
    root: Option<Result<RootFacts, String>>,
    /// Bytes; none if there is no limit.
    memlock: Option<u64>,
    tun: bool,
}

#[derive(Clone, Debug)]
struct RootFacts {
    path: String,
    tmpfs: bool,
    size: u64,
    free: u64,
}

/// Which module serves /dev/kvm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Backing {
    Intel,
    Amd,
    /// KVM-PVM: virtualization by page tables and privilege switches alone, without VT-x or AMD-V.
    Pvm,
}

const MODULES: [&str; 3] = ["kvm_intel", "kvm_amd", "kvm_pvm"];

/// What to do when there is no /dev/kvm, for this machine's processor.
pub(super) fn load_hint() -> &'static str {
    let flags = cpu(&std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default()).1;
    let has = |flag| flags.iter().any(|f| f == flag);
    match (has("vmx"), has("svm")) {
        (true, _) => "modprobe kvm_intel",
        (_, true) => "modprobe kvm_amd",
        _ => {
            "the processor shows neither VT-x nor AMD-V: switch virtualization on in the firmware or in the outer hypervisor, then modprobe kvm_intel or kvm_amd"
        }
    }
}

/// Model name and flags of the first processor.
fn cpu(cpuinfo: &str) -> (String, Vec<String>) {
    let field = |name: &str| {
        let mut lines = cpuinfo.lines().filter_map(|line| line.split_once(':'));
        lines.find_map(|(key, value)| (key.trim() == name).then(|| value.trim()))
    };
    let flags = field("flags").unwrap_or_default().split_whitespace();
    (
        field("model name").unwrap_or("unknown").to_owned(),
        flags.map(str::to_owned).collect(),
    )
}

impl Facts {
    fn gather(root: Result<Root, RootError>) -> Self {
        let (model, flags) = cpu(&std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default());
        let modules = MODULES
            .iter()
            .filter_map(|&name| Some((name, parameters(&Path::new("/sys/module").join(name))?)))
            .collect();
        let iommu = std::fs::read_dir("/sys/class/iommu").is_ok_and(|mut d| d.next().is_some());
        let memlock = getrlimit(Resource::RLIMIT_MEMLOCK).map_or(0, |(soft, _)| soft);
        Self {
            model,
            flags,
            modules,
            kvm: Some(
                open_device(DEVICE)
                    .map(|kvm| KvmFacts::ask(&kvm))
                    .map_err(|e| e.to_string()),
            ),
            iommu,
            root: Some(root.map_err(|e| e.to_string()).and_then(root_facts)),
            memlock: (memlock != RLIM_INFINITY).then_some(memlock),
            tun: Path::new("/dev/net/tun").exists(),
        }
    }

    fn flag(&self, name: &str) -> bool {
        self.flags.iter().any(|f| f == name)
    }

    fn backing(&self) -> Option<Backing> {
        let has = |module| self.modules.contains_key(module);
        if has("kvm_intel") && self.flag("vmx") {
            Some(Backing::Intel)
        } else if has("kvm_amd") && self.flag("svm") {
            Some(Backing::Amd)
        } else if has("kvm_pvm") {
            Some(Backing::Pvm)
        } else {
            None
        }
    }

    /// A module's yes-or-no parameter.
    fn parameter(&self, module: &str, name: &str) -> Option<bool> {
        let value = self.modules.get(module)?.get(name)?;
        Some(matches!(value.as_str(), "Y" | "1"))
    }
}

impl KvmFacts {
    fn ask(kvm: &Kvm) -> Self {
        let has = |number: u32| kvm.check_extension_raw(number.into()) > 0;
        Self {
            api: kvm.get_api_version(),
            capabilities: CAPABILITIES.iter().map(|c| has(c.number)).collect(),
            msrs: kvm.get_msr_index_list().map_or(0, |l| l.as_slice().len()),
            recommended_vcpus: kvm.get_nr_vcpus(),
            max_vcpus: kvm.get_max_vcpus(),
        }
    }
}

/// A module's parameters, if the module is there.
fn parameters(module: &Path) -> Option<BTreeMap<String, String>> {
    std::fs::metadata(module).ok()?;
    let entries = std::fs::read_dir(module.join("parameters"));
    let read = |path: std::path::PathBuf| {
        let name = path.file_name()?.to_str()?.to_owned();
        Some((name, std::fs::read_to_string(&path).ok()?.trim().to_owned()))
    };
    Some(
        entries
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|entry| read(entry.path()))
            .collect(),
    )
}

fn root_facts(root: Root) -> Result<RootFacts, String> {
    let path = root.path().display().to_string();
    let fs = statfs(root.path()).map_err(|errno| format!("{path}: {}", errno.desc()))?;
    let block = u64::try_from(fs.block_size()).unwrap_or(0);
    Ok(RootFacts {
        path,
        tmpfs: fs.filesystem_type() == TMPFS_MAGIC,
        size: fs.blocks().saturating_mul(block),
        free: fs.blocks_available().saturating_mul(block),
    })
}

fn line(
    name: &str,
    status: Standing,
    found: impl Into<String>,
    reason: &str,
    mend: &str,
) -> Requirement {
    Requirement {
        name: name.into(),
        status,
        found: found.into(),
        reason: reason.into(),
        mend: if status == Standing::Ok { "" } else { mend }.into(),
    }
}

/// `Ok` if it is there, else what its absence means.
fn standing(there: bool, otherwise: Standing) -> Standing {
    if there { Standing::Ok } else { otherwise }
}

fn yes(there: bool) -> &'static str {
    if there { "yes" } else { "no" }
}

const FIRMWARE: &str = "switch it on in the firmware (VT-x, SVM) or in the outer hypervisor (nested virtualization), or take another machine";

impl HostReport {
    /// Looks at this machine.
    pub fn probe() -> Self {
        Self::of(&Facts::gather(Root::open()))
    }

    /// Guests can run here, if with limits.
    pub fn usable(&self) -> bool {
        !self
            .requirements
            .iter()
            .any(|r| r.status == Standing::Missing)
    }

    fn of(facts: &Facts) -> Self {
        let mut requirements = processor(facts);
        requirements.extend(kvm(facts));
        requirements.extend(surroundings(facts));
        Self { requirements }
    }
}

/// The seed's "Hardware Requirements": VT-x with EPT, or AMD-V with RVI.
fn processor(facts: &Facts) -> Vec<Requirement> {
    use Standing::{Limited, Missing, Ok};
    let backing = facts.backing();
    let pvm = backing == Some(Backing::Pvm);
    let (vmx, svm) = (facts.flag("vmx"), facts.flag("svm"));
    let otherwise = if pvm { Limited } else { Missing };
    let found = match (vmx, svm) {
        (true, _) => "VT-x",
        (_, true) => "AMD-V",
        _ => "neither",
    };
    let mut lines = vec![line(
        "VT-x or AMD-V",
        standing(vmx || svm, otherwise),
        format!("{found} ({})", facts.model),
        "runs guest code natively, in all rings",
        FIRMWARE,
    )];
    let (name, paging) = match backing {
        Some(Backing::Intel) => ("EPT", facts.parameter("kvm_intel", "ept")),
        Some(Backing::Amd) => ("RVI (nested paging)", facts.parameter("kvm_amd", "npt")),
        _ => ("EPT or RVI", None),
    };
    lines.push(line(
        name,
        standing(paging == Some(true), Limited),
        paging.map_or("unknown: no module for it is loaded", yes),
        "translates guest addresses in hardware; without it KVM keeps shadow page tables, which is slow",
        "load the module with ept=1 or npt=1, on a processor that has it (Nehalem, Barcelona or later)",
    ));
    if backing == Some(Backing::Intel) {
        let unrestricted = facts.parameter("kvm_intel", "unrestricted_guest");
        lines.push(line(
            "unrestricted guest",
            standing(unrestricted == Some(true), Limited),
            unrestricted.map_or("unknown", yes),
            "runs real mode natively; without it KVM emulates it, which is slow",
            "load kvm_intel with unrestricted_guest=1, on Westmere or later",
        ));
    }
    let nested = match backing {
        Some(Backing::Intel) => facts.parameter("kvm_intel", "nested"),
        Some(Backing::Amd) => facts.parameter("kvm_amd", "nested"),
        _ => None,
    };
    if let Some(nested) = nested {
        lines.push(line(
            "nested virtualization",
            Ok,
            yes(nested),
            "only guests that run guests need it",
            "",
        ));
    }
    lines.push(line(
        "POPCNT",
        Ok,
        yes(facts.flag("popcnt")),
        "the rule of thumb of 2011 for EPT; the lines above know",
        "",
    ));
    lines.push(line(
        "VT-d or AMD-Vi",
        Ok,
        yes(facts.iommu),
        "only PCI pass-through needs it, which rhyve does not have",
        "",
    ));
    lines
}

/// /dev/kvm and what is behind it.
fn kvm(facts: &Facts) -> Vec<Requirement> {
    use Standing::{Limited, Missing, Ok};
    let mut lines = vec![match facts.backing() {
        Some(Backing::Intel) => line("KVM module", Ok, "kvm_intel", "KVM on VT-x", ""),
        Some(Backing::Amd) => line("KVM module", Ok, "kvm_amd", "KVM on AMD-V", ""),
        Some(Backing::Pvm) => line(
            "KVM module",
            Limited,
            "kvm_pvm",
            "KVM-PVM works without VT-x and AMD-V: it runs a guest's ring 3 natively, but emulates ring 0 of a guest that is not PVM-aware, about 1.6 us an instruction and without SSE; stock kernels cannot boot, small freestanding ones can",
            "cargo xtask nested runs the same programs on a real kvm_amd inside an emulated machine; or take a machine with VT-x or AMD-V",
        ),
        None => line(
            "KVM module",
            Missing,
            "none",
            "serves /dev/kvm",
            "modprobe kvm_intel or kvm_amd",
        ),
    }];
    let kvm = match &facts.kvm {
        Some(Result::Ok(kvm)) => kvm,
        other => {
            let (found, mend) = match other {
                Some(Err(text)) => {
                    let text = text.strip_prefix("vm_create: ").unwrap_or(text);
                    let (found, mend) = text.split_once(": /dev/kvm: ").unwrap_or((text, ""));
                    (found.to_owned(), mend.to_owned())
                }
                _ => ("not looked at".into(), String::new()),
            };
            lines.push(line("/dev/kvm", Missing, found, "the door to KVM", &mend));
            return lines;
        }
    };
    lines.push(line("/dev/kvm", Ok, "open to you", "the door to KVM", ""));
    lines.push(line(
        "KVM API",
        standing(
            u32::try_from(kvm.api) == Result::Ok(KVM_API_VERSION),
            Missing,
        ),
        format!("version {}", kvm.api),
        "version 12 is the only one since Linux 2.6.22",
        "boot a kernel with another KVM",
    ));
    for (capability, &there) in CAPABILITIES.iter().zip(&kvm.capabilities) {
        let otherwise = if capability.needed { Missing } else { Limited };
        lines.push(line(
            &format!("KVM_CAP_{}", capability.name),
            standing(there, otherwise),
            yes(there),
            capability.purpose,
            "take a newer kernel, or a machine whose KVM has it",
        ));
    }
    lines.push(line(
        "MSR list",
        standing(kvm.msrs != 0, Missing),
        format!("{} MSRs", kvm.msrs),
        "capture of model-specific registers",
        "boot a newer kernel",
    ));
    lines.push(line(
        "vCPUs",
        standing(kvm.max_vcpus >= 16, Limited),
        format!(
            "{} at most, {} recommended",
            kvm.max_vcpus, kvm.recommended_vcpus
        ),
        "the largest rhyve -c",
        "boot a kernel that is built for more CPUs",
    ));
    lines
}

/// Where objects live, and what some options need.
fn surroundings(facts: &Facts) -> Vec<Requirement> {
    use Standing::{Limited, Missing};
    let mib = |bytes: u64| bytes >> 20;
    let mut lines = Vec::new();
    lines.push(match &facts.root {
        Some(Ok(root)) => line(
            "room for VMs",
            standing(root.tmpfs, Limited),
            format!(
                "{}{}: {} MiB free of {}",
                root.path,
                if root.tmpfs { "" } else { " (no tmpfs)" },
                mib(root.free),
                mib(root.size)
            ),
            "holds the memory of all VMs; on a disk guests are as slow as it",
            "set RHYVE_ROOT to a directory of yours on a tmpfs",
        ),
        Some(Err(text)) => line(
            "room for VMs",
            Missing,
            text.as_str(),
            "holds the memory of all VMs",
            "set RHYVE_ROOT to a directory of yours on a tmpfs",
        ),
        None => line(
            "room for VMs",
            Missing,
            "not looked at",
            "holds the memory of all VMs",
            "",
        ),
    });
    let memlock = match facts.memlock {
        None => "no limit".into(),
        Some(bytes) => format!("{} MiB", mib(bytes)),
    };
    lines.push(line(
        "locked memory",
        standing(facts.memlock.is_none_or(|b| mib(b) >= 256), Limited),
        memlock,
        "the most that rhyve -S can lock for a user without CAP_IPC_LOCK",
        "raise it with ulimit -l, or in /etc/security/limits.conf",
    ));
    lines.push(line(
        "/dev/net/tun",
        standing(facts.tun, Limited),
        yes(facts.tun),
        "only network devices with a tap backend need it",
        "modprobe tun",
    ));
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(flags: &str, module: &'static str, parameters: &[(&str, &str)]) -> Facts {
        let parameters = parameters
            .iter()
            .map(|&(name, value)| (name.to_owned(), value.to_owned()));
        Facts {
            model: "A processor".into(),
            flags: flags.split(' ').map(str::to_owned).collect(),
            modules: [(module, parameters.collect())].into(),
            kvm: Some(Ok(KvmFacts {
                api: 12,
                capabilities: vec![true; CAPABILITIES.len()],
                msrs: 100,
                recommended_vcpus: 8,
                max_vcpus: 1024,
            })),
            iommu: true,
            root: Some(Ok(RootFacts {
                path: "/dev/shm/rhyve-1000".into(),
                tmpfs: true,
                size: 1 << 30,
                free: 1 << 29,
            })),
            memlock: Some(8 << 20),
            tun: true,
        }
    }

    fn find<'a>(report: &'a HostReport, name: &str) -> &'a Requirement {
        let mut lines = report.requirements.iter();
        lines.find(|r| r.name == name).expect(name)
    }

    #[test]
    fn a_machine_with_everything_is_ok() {
        let facts = machine(
            "vmx popcnt",
            "kvm_intel",
            &[("ept", "Y"), ("unrestricted_guest", "Y"), ("nested", "N")],
        );
        let report = HostReport::of(&facts);
        assert!(report.usable());
        let not_ok: Vec<_> = report
            .requirements
            .iter()
            .filter(|r| r.status != Standing::Ok)
            .map(|r| &*r.name)
            .collect();
        assert_eq!(not_ok, ["locked memory"]);
        assert!(
            report
                .requirements
                .iter()
                .all(|r| (r.status == Standing::Ok) == r.mend.is_empty())
        );
    }

    #[test]
    fn amd_without_nested_paging_is_limited() {
        let report = HostReport::of(&machine("svm", "kvm_amd", &[("npt", "0")]));
        assert_eq!(
            find(&report, "RVI (nested paging)").status,
            Standing::Limited
        );
        assert!(report.usable());
    }

    #[test]
    fn kvm_pvm_is_named_for_what_it_is() {
        let report = HostReport::of(&machine("popcnt", "kvm_pvm", &[]));
        let module = find(&report, "KVM module");
        assert_eq!(
            (module.status, &*module.found),
            (Standing::Limited, "kvm_pvm")
        );
        assert!(module.reason.contains("emulates ring 0"));
        assert!(module.mend.contains("nested"));
        assert_eq!(find(&report, "VT-x or AMD-V").status, Standing::Limited);
        assert!(report.usable());
    }

    #[test]
    fn what_is_missing_says_what_to_do() {
        let mut facts = machine("fpu", "none", &[]);
        facts.kvm = Some(Err(
            "vm_create: Permission denied: /dev/kvm: it is for group kvm".into(),
        ));
        let report = HostReport::of(&facts);
        assert!(!report.usable());
        assert_eq!(find(&report, "VT-x or AMD-V").status, Standing::Missing);
        let door = find(&report, "/dev/kvm");
        assert_eq!(
            (&*door.found, &*door.mend),
            ("Permission denied", "it is for group kvm")
        );

        let mut facts = machine("vmx", "kvm_intel", &[("ept", "Y")]);
        if let Some(Ok(kvm)) = &mut facts.kvm {
            kvm.capabilities[0] = false;
        }
        let report = HostReport::of(&facts);
        assert_eq!(
            find(&report, "KVM_CAP_USER_MEMORY").status,
            Standing::Missing
        );
    }

    #[test]
    fn processors_are_read_from_cpuinfo() {
        let text = "processor\t: 0\nmodel name\t: A: B\nflags\t\t: fpu svm\n\nprocessor\t: 1\n";
        assert_eq!(cpu(text), ("A: B".into(), vec!["fpu".into(), "svm".into()]));
        assert_eq!(cpu(""), ("unknown".into(), vec![]));
    }

    #[test]
    fn this_machine_is_reported_on() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let root = Root::open_at(&dir.path().join("root"));
        let report = HostReport::of(&Facts::gather(root));
        let json = serde_json::to_string(&report).unwrap();
        assert_eq!(serde_json::from_str::<HostReport>(&json).unwrap(), report);
        assert!(report.requirements.iter().any(|r| r.name == "/dev/kvm"));
    }
}
