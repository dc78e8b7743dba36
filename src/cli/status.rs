//! `fleecefs status`: what is served, and whether it needs somebody. Reads `status.json`, so it works without access
//! to the control socket.

use super::connect::{Mount, read_reply};
use super::output::{Out, Style, Table, printable};
use super::{Exit, JsonArg, consumer, snapshot};
use crate::error::Result;
use crate::fleece::{ContentInfo, DiskContent};
use crate::units::human_size;
use clap::Args;
use serde::Deserialize;
use std::path::{Path, PathBuf};

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
    nbd: Vec<NbdServer>,
    #[serde(default)]
    problems: Vec<String>,
    #[serde(default)]
    volume_warnings: Vec<String>,
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
    #[serde(flatten)]
    holds: DiskContent,
}

#[derive(Deserialize)]
struct NbdServer {
    by: String,
    #[serde(default)]
    tls: String,
    addresses: Vec<String>,
    exports: Vec<NbdExport>,
}

#[derive(Deserialize)]
struct NbdExport {
    connections: usize,
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
            print(&status, &self.mnt, &mut out)?;
        }
        Ok(if status.problems.is_empty() { Exit::Done } else { Exit::Differs })
    }
}

fn print(status: &Status, mnt: &Path, out: &mut Out) -> Result<()> {
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
    section(&volumes(&status.disks), out)?;
    status.volume_warnings.iter().try_for_each(|text| out.line(format!("volumes: {}", printable(text))))?;
    section(&snapshot::table(&status.snapshots), out)?;
    snapshot::of_moments(&status.snapshots, mnt).iter().try_for_each(|line| out.line(printable(line)))?;
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
    status.nbd.iter().try_for_each(|server| out.line(nbd_line(server)))?;
    let style = Style::of_stdout();
    if status.problems.is_empty() {
        return out.line(format!("problems: {}", style.good("none")));
    }
    out.line(format!("problems: {}", status.problems.len()))?;
    status.problems.iter().try_for_each(|problem| out.line(format!("  {}", style.bad(&printable(problem)))))
}

fn nbd_line(server: &NbdServer) -> String {
    let clients: usize = server.exports.iter().map(|export| export.connections).sum();
    let (by, count) = (if server.by == "qmp" { " (nbd-server-start)" } else { "" }, server.exports.len());
    let addresses = printable(&server.addresses.join(", "));
    let tls = match server.tls.as_str() {
        "require" => ", TLS",
        "allow" => ", TLS or not",
        _ => "",
    };
    format!("nbd: {addresses}{by}{tls}, {count} export(s), {clients} client(s)")
}

/// One line a volume, and one for what a disk is itself.
fn volumes(disks: &[Disk]) -> Table {
    let mut table = Table::new(&["DISK", "VOLUME", ">SIZE", "TABLE", "CONTENT", "LABEL"]);
    for disk in disks {
        let mut row = |name: &str, size, scheme: &str, content: Option<&ContentInfo>, label: Option<&String>| {
            let label = content.and_then(|content| content.label.as_ref()).or(label);
            let kind = content.map_or("-", |content| content.kind.as_str());
            let size = human_size(size);
            let cells: [&str; 6] = [&disk.name, name, &size, scheme, kind, label.map_or("-", String::as_str)];
            table.row(cells.map(str::to_owned));
        };
        if let Some(content) = &disk.holds.content {
            row("-", disk.size, "-", Some(content), None);
        }
        for volume in &disk.holds.volumes {
            row(&volume.name, volume.size, &volume.table, volume.content.as_ref(), volume.label.as_ref());
        }
    }
    table
}

fn section(table: &Table, out: &mut Out) -> Result<()> {
    let lines = table.lines(Style::of_stdout());
    if !lines.is_empty() {
        out.line("")?;
    }
    lines.iter().try_for_each(|line| out.line(line))
}
