//! What there is to say: gathered while the work is done, printed once, as text or as JSON.

use comfy_table::Table;
use serde::Serialize;
use serde_json::{Map, Value, json};
use vmm_api::regs::{Reg, SegReg, Segment};
use vmm_api::stats::{VcpuStats, VmStats};

use crate::error::Error;

/// What will be printed on standard output.
#[derive(Debug, Default)]
pub struct Output {
    json: bool,
    text: String,
    /// A report that is no object of fields.
    whole: Option<Value>,
    fields: Map<String, Value>,
    registers: Map<String, Value>,
    descriptors: Map<String, Value>,
    done: Vec<Value>,
}

impl Output {
    /// Nothing yet.
    pub fn new(json: bool) -> Self {
        Self {
            json,
            ..Self::default()
        }
    }

    /// Sets all that is said at once: a table whose lines are flush left and have no frame, and the
    /// same as JSON.
    pub fn table(&mut self, mut table: Table, value: impl Serialize) {
        for column in table.column_iter_mut() {
            column.set_padding((0, 2));
        }
        let lines = table.lines().map(|line| line.trim_end().to_owned() + "\n");
        self.text = lines.collect();
        self.whole = Some(serde_json::to_value(value).unwrap_or_default());
    }

    /// Says something of the VM in JSON only.
    pub fn field(&mut self, name: &str, value: impl Into<Value>) {
        self.fields.insert(name.into(), value.into());
    }

    /// Notes that a step was done, in JSON; as text, no news is good news.
    pub fn done(&mut self, step: &str) {
        self.done.push(step.into());
    }

    /// A line of text.
    pub fn line(&mut self, line: &str) {
        self.text += line;
        self.text.push('\n');
    }

    /// A segment of memory: guest-physical address and length in bytes.
    pub fn memory(&mut self, name: &str, gpa: u64, len: u64) {
        self.text += &format!("{name}\t{gpa:#018x}/{len:#018x}\n");
        self.field(name, json!({ "gpa": hex(gpa), "length": len }));
    }

    /// A register.
    pub fn register(&mut self, reg: Reg, cpu: u32, value: u64) {
        self.text += &format!("{reg}[{cpu}]\t{value:#018x}\n");
        self.registers.insert(reg.name().into(), hex(value));
    }

    /// A segment's hidden part.
    pub fn descriptor(&mut self, seg: SegReg, cpu: u32, desc: &Segment) {
        let Segment {
            base,
            limit,
            access,
            ..
        } = *desc;
        self.text += &format!(
            "{seg} desc[{cpu}]\t{base:#018x}/{limit:#010x}/{:#010x}\n",
            access.0
        );
        self.descriptors.insert(
            seg.name().into(),
            json!({ "base": hex(base), "limit": hex(limit.into()), "access": hex(access.0.into()) }),
        );
    }

    /// What a vCPU and its VM have counted.
    pub fn stats(&mut self, cpu: u32, vcpu: &VcpuStats, vm: &VmStats) {
        let bhyve = vcpu.bhyve();
        self.text += &format!("vcpu{cpu} stats:\n");
        for (name, count) in &bhyve {
            let count = count.map_or("n/a".into(), |n| n.to_string());
            self.count(name, &count);
        }
        for (reason, count) in &vcpu.exits {
            self.count(&format!("exits to rhyve: {reason}"), &count.to_string());
        }
        self.count("nanoseconds in KVM_RUN", &vcpu.guest_ns.to_string());
        self.count("nanoseconds outside of KVM_RUN", &vcpu.host_ns.to_string());
        let values = |values: &[u64]| {
            let texts: Vec<_> = values.iter().map(u64::to_string).collect();
            texts.join(" ")
        };
        for stat in &vcpu.kvm {
            self.count(&format!("kvm: {}", stat.name), &values(&stat.values));
        }
        self.text += "vm stats:\n";
        for (name, count) in &vm.counters {
            self.count(name, &count.to_string());
        }
        for stat in &vm.kvm {
            self.count(&format!("kvm: {}", stat.name), &values(&stat.values));
        }
        let bhyve: Map<String, Value> = bhyve
            .into_iter()
            .map(|(name, count)| (name.to_owned(), count.into()))
            .collect();
        self.field("stats", json!({ "bhyve": bhyve, "vcpu": vcpu, "vm": vm }));
    }

    /// bhyvectl's line of a statistic.
    fn count(&mut self, name: &str, count: &str) {
        self.text += &format!("{name:<40}\t{count}\n");
    }

    /// Prints all of it; what comes later starts anew.
    ///
    /// # Errors
    ///
    /// There is no room for it.
    pub fn print(&mut self) -> Result<(), Error> {
        let Self {
            json, text, whole, ..
        } = self.take();
        let text = match (json, whole) {
            (false, _) => text,
            (true, Some(value)) => format!("{value:#}\n"),
            (true, None) => return Ok(()),
        };
        vmm_api::cli::print(&text).map_err(Error::Output)
    }

    /// All that was gathered, with the fields put together as a whole.
    fn take(&mut self) -> Self {
        let mut all = std::mem::replace(self, Self::new(self.json));
        for (name, group) in [
            ("registers", &mut all.registers),
            ("descriptors", &mut all.descriptors),
        ] {
            if !group.is_empty() {
                all.fields
                    .insert(name.into(), Value::Object(std::mem::take(group)));
            }
        }
        if !all.done.is_empty() {
            let done = std::mem::take(&mut all.done);
            all.fields.insert("done".into(), Value::Array(done));
        }
        if all.whole.is_none() && !all.fields.is_empty() {
            all.whole = Some(Value::Object(std::mem::take(&mut all.fields)));
        }
        all
    }
}

/// A number as it stands in vm.json.
pub(crate) fn hex(value: u64) -> Value {
    format!("{value:#x}").into()
}
