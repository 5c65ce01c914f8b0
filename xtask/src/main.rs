//! `cargo xtask`: the project's own tasks, one `task_*.rs` a verb.
//!
//! Each verb is a clap argument struct with `run(self) -> TaskResult`. What several verbs need is in
//! [`project`] (paths, building our own programs).

#![forbid(unsafe_code)]

mod bench;
mod project;
mod task_bench;
mod task_demo;
mod task_fuzz;
mod task_guest_image;
mod task_man;
mod task_nested;
mod task_test;

use std::error::Error;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// What a task ends with: its exit status, or the error that stopped it.
type TaskResult = Result<ExitCode, Box<dyn Error>>;

/// The project's own tasks.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    Bench(task_bench::Bench),
    Demo(task_demo::Demo),
    Fuzz(task_fuzz::Fuzz),
    GuestImage(task_guest_image::GuestImage),
    Man(task_man::Man),
    Nested(task_nested::Nested),
    Test(task_test::Test),
}

fn main() -> ExitCode {
    let result = match Cli::parse().task {
        Task::Bench(task) => task.run(),
        Task::Demo(task) => task.run(),
        Task::Fuzz(task) => task.run(),
        Task::GuestImage(task) => task.run(),
        Task::Man(task) => task.run(),
        Task::Nested(task) => task.run(),
        Task::Test(task) => task.run(),
    };
    result.unwrap_or_else(|error| {
        eprintln!("xtask: {}", chain(&*error));
        ExitCode::FAILURE
    })
}

/// An error and its causes on one line.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text += &format!(": {cause}");
        source = cause.source();
    }
    text
}
