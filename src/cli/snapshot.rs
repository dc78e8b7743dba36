//! `fleecefs snapshot`: frozen views from taking to ending.

use super::connect::{Mount, execute, read_reply};
use super::freeze::FreezeArgs;
use super::output::{Out, Style, Table, complain, printable};
use super::restore::{disk_of, restored_disk};
use super::{Exit, JsonArg};
use crate::error::{Error, Result, errno};
use crate::fleece::SkippedInfo;
use crate::fleece::{IMPORT_PREFIX, Skip};
use crate::units::{human_size, parse_size};
use clap::{Args, Subcommand};
use serde::Deserialize;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// Commands of `snapshot`.
#[derive(Debug, Subcommand)]
pub enum SnapshotCommand {
    /// Freeze disks at one instant; exit code 3 where --since cannot be had and everything counts as changed
    Create(CreateArgs),
    /// List snapshots
    List(ListArgs),
    /// Show one snapshot with its disks
    Show(ShowArgs),
    /// End a snapshot whose backup succeeded: the view goes, its checkpoint stays
    Complete(CompleteArgs),
    /// End a snapshot whose backup failed: view and checkpoint go, no change is forgotten
    Cancel(CancelArgs),
    /// Say that a range has been read, so that its space is freed
    Release(ReleaseArgs),
}

/// Arguments of `snapshot create`.
#[derive(Debug, Args)]
pub struct CreateArgs {
    /// The mount
    mnt: PathBuf,
    /// Name of the snapshot and of its checkpoint
    name: String,
    /// A disk to freeze [default: all]
    #[arg(long = "disk", value_name = "D")]
    disks: Vec<String>,
    /// The point that the snapshot's map counts from [default: the newest completed checkpoint]
    #[arg(long, value_name = "CHECKPOINT|@CONSUMER")]
    since: Option<String>,
    #[command(flatten)]
    skip: SkipArg,
    #[command(flatten)]
    freeze: FreezeArgs,
    #[command(flatten)]
    json: JsonArg,
}

/// What a snapshot leaves out.
#[derive(Debug, Args)]
pub struct SkipArg {
    /// What the snapshot leaves out: swap (pages of swap areas), free (unused blocks of ext4); they read as zeros. '' is
    /// nothing [default: as the mount says]
    #[arg(long, value_name = "swap,free")]
    skip: Option<Skip>,
}

impl SkipArg {
    /// Adds it to the arguments of `fleecefs-snapshot-create`.
    pub fn add_to(&self, arguments: &mut Value) {
        if let Some(skip) = self.skip {
            arguments["skip"] = json!(skip.names().collect::<Vec<_>>());
        }
    }
}

/// Arguments of `snapshot list`.
#[derive(Debug, Args)]
pub struct ListArgs {
    /// The mount
    mnt: PathBuf,
    #[command(flatten)]
    json: JsonArg,
}

/// Arguments of `snapshot show`.
#[derive(Debug, Args)]
pub struct ShowArgs {
    /// The mount
    mnt: PathBuf,
    /// The snapshot
    name: String,
    #[command(flatten)]
    json: JsonArg,
}

/// Arguments of `snapshot complete`.
#[derive(Debug, Args)]
pub struct CompleteArgs {
    /// The mount
    mnt: PathBuf,
    /// The snapshot
    name: String,
    /// The consumer that moves to its checkpoint
    #[arg(long, value_name = "C")]
    consumer: Option<String>,
}

/// Arguments of `snapshot cancel`.
#[derive(Debug, Args)]
pub struct CancelArgs {
    /// The mount
    mnt: PathBuf,
    /// The snapshot
    name: String,
}

/// Arguments of `snapshot release`.
#[derive(Debug, Args)]
pub struct ReleaseArgs {
    /// The mount
    mnt: PathBuf,
    /// The snapshot
    name: String,
    /// The disk
    disk: String,
    /// First byte
    #[arg(value_parser = |text: &str| parse_size(text).map_err(|e| e.to_string()))]
    offset: u64,
    /// Count of bytes
    #[arg(value_parser = |text: &str| parse_size(text).map_err(|e| e.to_string()))]
    length: u64,
}

/// A snapshot as the daemon lists it.
#[derive(Deserialize)]
pub struct Row {
    name: String,
    uuid: String,
    time: String,
    #[serde(default)]
    consistency: String,
    broken: bool,
    disks: Vec<DiskRow>,
}

#[derive(Deserialize)]
struct DiskRow {
    name: String,
    size: u64,
    checkpoint: String,
    reference: Option<String>,
    full_reason: Option<String>,
    broken: Option<String>,
    store_bytes: u64,
    skipped: Option<SkippedInfo>,
}

impl Row {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether a view of it can no longer be read.
    pub fn is_broken(&self) -> bool {
        self.broken
    }
}

impl SnapshotCommand {
    /// Runs the command.
    pub fn run(&self) -> Result<Exit> {
        match self {
            SnapshotCommand::Create(args) => return args.run(),
            SnapshotCommand::List(args) => args.run()?,
            SnapshotCommand::Show(args) => args.run()?,
            SnapshotCommand::Complete(args) => {
                let mut arguments = json!({ "name": args.name });
                if let Some(consumer) = &args.consumer {
                    arguments["consumer"] = json!(consumer);
                }
                execute(&args.mnt, "fleecefs-snapshot-complete", arguments)?;
            }
            SnapshotCommand::Cancel(args) => {
                execute(&args.mnt, "fleecefs-snapshot-cancel", json!({ "name": args.name }))?;
            }
            SnapshotCommand::Release(args) => {
                let arguments =
                    json!({ "name": args.name, "disk": args.disk, "offset": args.offset, "length": args.length });
                execute(&args.mnt, "fleecefs-snapshot-release", arguments)?;
            }
        }
        Ok(Exit::Done)
    }
}

/// What the takers of snapshots need of a manifest.
#[derive(Deserialize)]
pub struct Manifest {
    /// In name order.
    pub disks: Vec<ManifestDisk>,
}

/// A disk in it.
#[derive(Deserialize)]
pub struct ManifestDisk {
    /// Its name.
    pub name: String,
    /// Why everything counts as changed, also where there is a base; None: it does not.
    pub full_reason: Option<String>,
}

impl CreateArgs {
    fn run(&self) -> Result<Exit> {
        let mut arguments = json!({ "name": self.name, "disks": self.disks });
        if let Some(since) = &self.since {
            match since.strip_prefix('@') {
                Some(consumer) => arguments["consumer"] = json!(consumer),
                None => arguments["since"] = json!(since),
            }
        }
        self.skip.add_to(&mut arguments);
        let reply = self.freeze.create_snapshot(&Mount::find(&self.mnt)?, arguments)?;
        let manifest: Manifest = read_reply(&reply)?;
        let mut out = Out::new();
        if self.json.json {
            out.json(&reply)?;
        } else {
            let dir = self.mnt.join("snapshots").join(&self.name);
            for disk in &manifest.disks {
                out.line(dir.join(format!("{}.raw", disk.name)).display().to_string())?;
            }
        }
        Ok(self.since.as_ref().map_or(Exit::Done, |since| full_disks(since, &manifest)))
    }
}

/// All snapshots of a mount.
pub fn rows(mount: &Mount) -> Result<Vec<Row>> {
    read_reply(&mount.execute("fleecefs-snapshot-list", json!({}))?)
}

/// Tells of disks where what was asked for cannot be had.
pub fn full_disks(since: &str, manifest: &Manifest) -> Exit {
    let mut exit = Exit::Done;
    for disk in &manifest.disks {
        let Some(reason) = &disk.full_reason else { continue };
        complain(&format!(
            "fleecefs: disk '{}' since '{}': everything counts as changed: {reason}",
            disk.name,
            printable(since)
        ));
        exit = Exit::Full;
    }
    exit
}

impl ListArgs {
    fn run(&self) -> Result<()> {
        let reply = execute(&self.mnt, "fleecefs-snapshot-list", json!({}))?;
        let mut out = Out::new();
        if self.json.json {
            return out.json(&reply);
        }
        let rows: Vec<Row> = read_reply(&reply)?;
        table(&rows).print(&mut out)?;
        of_moments(&rows, &self.mnt).iter().for_each(|line| complain(&format!("fleecefs: {line}")));
        Ok(())
    }
}

/// Tells of snapshots that are there for a moment, but where what took them was killed.
pub fn of_moments(rows: &[Row], mnt: &Path) -> Vec<String> {
    let line = |name: &str| {
        let restored = restored_disk(name).map(|disk| ("a restore to", disk));
        let imported = || Some(("the import of a checkpoint for", disk_of(name, IMPORT_PREFIX)?));
        let (what, disk) = restored.or_else(imported)?;
        let cancel = format!("fleecefs snapshot cancel {} {name}", mnt.display());
        Some(format!("snapshot '{name}' is of {what} disk '{disk}': where that was killed, `{cancel}`"))
    };
    rows.iter().filter_map(|row| line(&row.name)).collect()
}

/// One line a snapshot.
pub fn table(rows: &[Row]) -> Table {
    let mut table = Table::new(&["SNAPSHOT", "TIME", "STATE", ">STORE", "DISKS"]);
    for row in rows {
        let disks: Vec<_> = row.disks.iter().map(|disk| disk.name.as_str()).collect();
        table.row([
            row.name.clone(),
            row.time.clone(),
            if row.broken { "broken" } else { "good" }.into(),
            human_size(row.disks.iter().map(|disk| disk.store_bytes).sum()),
            disks.join(" "),
        ]);
    }
    table
}

/// Reads the manifest of a snapshot; ENOENT where there is no such snapshot.
pub fn manifest(mount: &Mount, name: &str) -> Result<Value> {
    // The name becomes a path: what no snapshot can be called must not lead elsewhere.
    crate::units::check_name("snapshot", name).or_else(|e| if name == "latest" { Ok(()) } else { Err(e) })?;
    let path = mount.path.join("snapshots").join(name).join("manifest.json");
    let text = std::fs::read(&path).map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => unknown(name),
        _ => Error::io("read", e).at_path(&path),
    })?;
    serde_json::from_slice(&text).map_err(|e| Error::new(errno::EIO, "manifest", e.to_string()).at_path(path))
}

fn unknown(name: &str) -> Error {
    Error::new(errno::ENOENT, format!("snapshot '{name}'"), "no such snapshot")
        .hint("`fleecefs snapshot list` lists the snapshots")
}

/// An absent file in a snapshot is told in the user's terms.
pub fn read_failed(what: &str, path: &Path, e: std::io::Error) -> Error {
    if e.kind() == std::io::ErrorKind::NotFound {
        return Error::new(errno::ENOENT, what, "not found");
    }
    Error::io("read", e).at_path(path)
}

impl ShowArgs {
    fn run(&self) -> Result<()> {
        let mount = Mount::find(&self.mnt)?;
        let mut out = Out::new();
        if self.json.json {
            return out.json(&manifest(&mount, &self.name)?);
        }
        let rows = rows(&mount)?;
        let found = match self.name.as_str() {
            "latest" => rows.last(),
            name => rows.iter().find(|row| row.name == name),
        };
        let row = found.ok_or_else(|| unknown(&self.name))?;
        out.line(format!("snapshot  {}", Style::of_stdout().bold(&printable(&row.name))))?;
        out.line(format!("uuid      {}", row.uuid))?;
        out.line(format!("taken     {}", row.time))?;
        let frozen = row.consistency == "filesystem";
        out.line(format!("content   {}-consistent", if frozen { "file-system" } else { "crash" }))?;
        out.line(format!("path      {}", self.mnt.join("snapshots").join(&row.name).display()))?;
        out.line("")?;
        let mut table = Table::new(&["DISK", ">SIZE", ">STORE", "CHECKPOINT", "CHANGES SINCE", "STATE"]);
        for disk in &row.disks {
            let since = match (&disk.reference, &disk.full_reason) {
                (Some(reference), None) => reference.clone(),
                (_, Some(reason)) => format!("(all: {reason})"),
                (None, None) => "(all: no earlier point)".to_owned(),
            };
            table.row([
                disk.name.clone(),
                human_size(disk.size),
                human_size(disk.store_bytes),
                disk.checkpoint.clone(),
                since,
                disk.broken.as_ref().map_or("good".into(), |why| format!("broken: {why}")),
            ]);
        }
        table.print(&mut out)?;
        for disk in &row.disks {
            if let Some(skipped) = &disk.skipped {
                out.line(format!("disk {}: {}", printable(&disk.name), skipped.text()))?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_map_is_a_fallback_only_where_a_base_was_asked_for() {
        let manifest: Manifest = read_reply(&json!({"disks": [
            {"name": "a", "reference": "x", "full_reason": null},
            {"name": "b", "reference": "x", "full_reason": "the image was changed by another program"},
        ]}))
        .unwrap();
        assert_eq!(full_disks("x", &manifest), Exit::Full);
        let good = Manifest { disks: manifest.disks.into_iter().take(1).collect() };
        assert_eq!(full_disks("x", &good), Exit::Done);
    }
}
