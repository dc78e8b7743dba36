//! `fleecefs status`: what is served, and whether it needs somebody. Reads `status.json`, so it works without access
//! to the control socket.

use super::connect::{Mount, read_reply};
use super::output::{Out, Style, Table, printable};
use super::{Exit, JsonArg, consumer, snapshot};
use crate::error::Result;
use crate::units::human_size;
use clap::Args;
use serde::Deserialize;
use std::path::PathBuf;

/// Arguments of `status`.
#[derive(Debug, Args)]
pub struct StatusArgs {
    /// The mount
    mnt: PathBuf,
    #[command(flatten)]
    json: JsonArg,
}

#[derive(Deserialize)]
struct Status {
    version: String,
    pid: u32,
    qmp: PathBuf,
    disks: Vec<Disk>,
    snapshots: Vec<snapshot::Row>,
    checkpoints: Vec<Checkpoint>,
    consumers: Vec<consumer::Row>,
    #[serde(default)]
    problems: Vec<String>,
}

#[derive(Deserialize)]
struct Disk {
    name: String,
    format: String,
    size: u64,
    read_only: bool,
    store_bytes: u64,
    tracking: String,
    #[serde(default)]
    guards: Vec<String>,
    image: PathBuf,
    #[serde(default)]
    snapshot: Option<String>,
}

#[derive(Deserialize)]
struct Checkpoint {
    name: String,
    time: String,
}

impl StatusArgs {
    /// Prints; [`Exit::Differs`] where there are problems.
    pub fn run(&self) -> Result<Exit> {
        let mount = Mount::find(&self.mnt)?;
        let status: Status = read_reply(&mount.status)?;
        let mut out = Out::new();
        if self.json.json {
            out.json(&mount.status)?;
        } else {
            print(&status, &mut out)?;
        }
        Ok(if status.problems.is_empty() { Exit::Done } else { Exit::Differs })
    }
}

fn print(status: &Status, out: &mut Out) -> Result<()> {
    out.line(format!("fleecefs {}, process {}, socket {}", status.version, status.pid, status.qmp.display()))?;
    let mut disks = Table::new(&["DISK", "FORMAT", "ACCESS", ">SIZE", ">STORE", "TRACKING", "GUARDS", "IMAGE"]);
    for disk in &status.disks {
        disks.row([
            disk.name.clone(),
            disk.format.clone(),
            if disk.read_only { "read-only" } else { "read-write" }.into(),
            human_size(disk.size),
            human_size(disk.store_bytes),
            disk.tracking.clone(),
            match disk.guards.as_slice() {
                [] => if disk.read_only { "-" } else { "none" }.into(),
                guards => guards.join("+"),
            },
            match &disk.snapshot {
                Some(snapshot) => format!("{} (snapshot {})", disk.image.display(), printable(snapshot)),
                None => disk.image.display().to_string(),
            },
        ]);
    }
    section(&disks, out)?;
    section(&snapshot::table(&status.snapshots), out)?;
    section(&consumer::table(&status.consumers), out)?;
    out.line("")?;
    match status.checkpoints.last() {
        Some(newest) => out.line(format!(
            "checkpoints: {}, the newest {} of {}",
            status.checkpoints.len(),
            printable(&newest.name),
            newest.time
        ))?,
        None => out.line("checkpoints: none")?,
    }
    let style = Style::of_stdout();
    if status.problems.is_empty() {
        return out.line(format!("problems: {}", style.good("none")));
    }
    out.line(format!("problems: {}", status.problems.len()))?;
    status.problems.iter().try_for_each(|problem| out.line(format!("  {}", style.bad(&printable(problem)))))
}

fn section(table: &Table, out: &mut Out) -> Result<()> {
    let lines = table.lines(Style::of_stdout());
    if !lines.is_empty() {
        out.line("")?;
    }
    lines.iter().try_for_each(|line| out.line(line))
}
