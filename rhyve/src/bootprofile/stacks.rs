//! From samples to named stacks, each with the number of its samples.

use std::collections::BTreeMap;

use serde::Serialize;
use vmm_api::guest::{Frame, Function, Kernel, Symbols, backtrace};
use vmm_api::memory::GuestRam;
use vmm_api::state::BootInfo;

use super::{Sample, is_user};

/// A stack and how often it was seen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Folded {
    /// The vCPU, then the outermost function first.
    pub frames: Vec<String>,
    /// Samples.
    pub count: u64,
}

/// All different stacks.
pub(super) fn fold(samples: &[Sample], ram: &GuestRam, boot: Option<&BootInfo>) -> Vec<Folded> {
    // The last that was in the kernel sees it as it is now.
    let seen = samples.iter().rev().filter(|s| !is_user(&s.registers));
    let registers: Vec<_> = seen.take(1).map(|s| s.registers.clone()).collect();
    let kernel = Kernel::find(ram, &registers, None, boot).ok();
    let kernel = kernel.map(|kernel| kernel.with_modules(ram));
    let unwinder = kernel.as_ref().and_then(|kernel| kernel.unwinder(ram));
    let mut stacks = BTreeMap::<Vec<String>, u64>::new();
    for sample in samples {
        let mut frames = vec![format!("vcpu{}", sample.vcpu)];
        if is_user(&sample.registers) {
            frames.push("user mode".into());
        } else {
            let word = |gla: u64| {
                let at = gla.checked_sub(sample.registers.rsp)?;
                let at = usize::try_from(at).ok()?;
                let bytes = sample.stack.get(at..)?.first_chunk()?;
                Some(u64::from_le_bytes(*bytes))
            };
            let found = backtrace::follow(ram, &sample.registers, unwinder.as_ref(), &word);
            // Guesses would be as many graphs as there are stale words on stacks.
            let certain = found.iter().rev().filter(|frame| frame.certain);
            let symbols = kernel.as_ref().map(|kernel| &kernel.symbols);
            frames.extend(certain.map(|frame| name(symbols, frame)));
        }
        *stacks.entry(frames).or_default() += 1;
    }
    let folded = stacks.into_iter();
    folded
        .map(|(frames, count)| Folded { frames, count })
        .collect()
}

/// A function's name, or the megabyte where there is none: a kernel that unpacks or moves itself.
fn name(symbols: Option<&Symbols>, frame: &Frame) -> String {
    match symbols.and_then(|symbols| frame.function(symbols)) {
        Some(Function { name, module, .. }) => match module {
            Some(module) => format!("{name} [{module}]"),
            None => name.to_owned(),
        },
        None => format!("no name at {:#x}", frame.address & !0xf_ffff),
    }
}
