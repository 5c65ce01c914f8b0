//! `--host`: what this machine has of what rhyve needs, one line a requirement.

use comfy_table::{ContentArrangement, Table, presets};
use vmm_api::capability::HostReport;

use crate::error::Status;
use crate::output::Output;

/// Reports on this machine; [`Status::Failed`] if no guest can run here.
pub fn host(output: &mut Output) -> Status {
    let report = HostReport::probe();
    let mut table = Table::new();
    table
        .load_preset(presets::NOTHING)
        // On a terminal columns are wrapped to its width; elsewhere a line stays a line.
        .set_content_arrangement(ContentArrangement::Dynamic)
        .set_header(["REQUIREMENT", "STATUS", "FOUND", "WHAT FOR, AND WHAT TO DO"]);
    for line in &report.requirements {
        let reason = match line.mend.as_str() {
            "" => line.reason.clone(),
            mend => format!("{} -> {mend}", line.reason),
        };
        table.add_row([&line.name, line.status.word(), &line.found, &reason]);
    }
    output.table(table, &report);
    if report.usable() {
        Status::Done
    } else {
        Status::Failed
    }
}
