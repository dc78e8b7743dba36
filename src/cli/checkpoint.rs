//! `fleecefs checkpoint`: instants from which changes are known.

use super::connect::{Mount, execute, read_reply};
use super::output::{Out, Table, complain, printable};
use super::{Exit, JsonArg};
use crate::daemon::{absolute, explain};
use crate::error::{Error, Result, errno};
use crate::units::human_size;
use clap::{Args, Subcommand};
use serde::Deserialize;
use serde_json::{Value, json};
use std::path::PathBuf;

/// Commands of `checkpoint`.
#[derive(Debug, Subcommand)]
pub enum CheckpointCommand {
    /// List checkpoints, oldest first
    List(ListArgs),
    /// Delete a checkpoint; what it knows goes to the one before
    Delete(DeleteArgs),
    /// Write what changed since a checkpoint to a new file, for another mount of the same content, or for QEMU
    Export(ExportArgs),
    /// Make the checkpoint in a file known, where the disk holds just what it held at the export; exit code 1 where not
    Import(ImportArgs),
}

/// Arguments of `checkpoint export`.
#[derive(Debug, Args)]
pub struct ExportArgs {
    /// The mount
    mnt: PathBuf,
    /// The checkpoint
    name: String,
    /// The file, a qcow2 image without data that has a bitmap; it must not exist. Or a directory, which gets DISK.qcow2
    file: PathBuf,
    /// The disk [default: the only one that has the checkpoint; with a directory all of them]
    #[arg(long, value_name = "D")]
    disk: Option<String>,
    #[command(flatten)]
    json: JsonArg,
}

/// Arguments of `checkpoint import`.
#[derive(Debug, Args)]
pub struct ImportArgs {
    /// The mount
    mnt: PathBuf,
    /// The file, or a directory with DISK.qcow2 for each disk
    file: PathBuf,
    /// The disk [default: the one of the name that it had, or the only one; with a directory all of them]
    #[arg(long, value_name = "D")]
    disk: Option<String>,
    #[command(flatten)]
    json: JsonArg,
}

/// Arguments of `checkpoint list`.
#[derive(Debug, Args)]
pub struct ListArgs {
    /// The mount
    mnt: PathBuf,
    /// Those of this disk only
    disk: Option<String>,
    #[command(flatten)]
    json: JsonArg,
}

/// Arguments of `checkpoint delete`.
#[derive(Debug, Args)]
pub struct DeleteArgs {
    /// The mount
    mnt: PathBuf,
    /// The checkpoint
    name: String,
}

#[derive(Deserialize)]
struct Row {
    name: String,
    time: String,
    disks: Vec<DiskRow>,
}

#[derive(Deserialize)]
struct DiskRow {
    disk: String,
    completed: bool,
    recording: bool,
    granularity: u64,
    dirty: u64,
    everything: Option<String>,
}

impl CheckpointCommand {
    /// Runs the command.
    pub fn run(&self) -> Result<Exit> {
        match self {
            CheckpointCommand::List(args) => args.run()?,
            CheckpointCommand::Export(args) => args.run()?,
            CheckpointCommand::Import(args) => return args.run(),
            CheckpointCommand::Delete(args) => {
                execute(&args.mnt, "fleecefs-checkpoint-delete", json!({ "name": args.name }))?;
            }
        }
        Ok(Exit::Done)
    }
}

/// What the daemon says of a checkpoint that went or came.
#[derive(Deserialize)]
struct Carried {
    checkpoint: String,
    disk: String,
    size: u64,
    dirty: u64,
}

impl ExportArgs {
    fn run(&self) -> Result<()> {
        let mount = Mount::find(&self.mnt)?;
        let disks = self.disks(&mount)?;
        let is_dir = self.file.is_dir();
        if disks.len() > 1 && !is_dir {
            let why = format!("several disks have it: {}", disks.join(" "));
            return Err(Error::new(errno::EINVAL, format!("checkpoint '{}'", self.name), why)
                .hint("give one with --disk, or a directory that exists"));
        }
        let mut replies = Vec::new();
        for disk in &disks {
            let file = absolute(&if is_dir { self.file.join(format!("{disk}.qcow2")) } else { self.file.clone() })?;
            let arguments = json!({ "name": self.name, "disk": disk, "file": file });
            replies.push(mount.execute("fleecefs-checkpoint-export", arguments)?);
        }
        print(&replies, "exported", self.json.json)
    }

    /// The disks that have the checkpoint.
    fn disks(&self, mount: &Mount) -> Result<Vec<String>> {
        if let Some(disk) = &self.disk {
            return Ok(vec![disk.clone()]);
        }
        let rows: Vec<Row> = read_reply(&mount.execute("fleecefs-checkpoint-list", json!({}))?)?;
        let row = rows.into_iter().find(|row| row.name == self.name);
        row.map(|row| row.disks.into_iter().map(|disk| disk.disk).collect()).ok_or_else(|| {
            Error::new(errno::ENOENT, format!("checkpoint '{}'", self.name), "no such checkpoint")
                .hint("list them with `fleecefs checkpoint list`")
        })
    }
}

impl ImportArgs {
    /// [`Exit::Differs`] where a disk does not hold what it held at the export. A file that fails does not keep the others
    /// back: after a run that was cut off, the next one finds some imported.
    fn run(&self) -> Result<Exit> {
        let mount = Mount::find(&self.mnt)?;
        let (mut replies, mut exit, mut failed) = (Vec::new(), Exit::Done, None);
        for file in self.files()? {
            let mut arguments = json!({ "file": absolute(&file)? });
            if let Some(disk) = &self.disk {
                arguments["disk"] = json!(disk);
            }
            match mount.execute("fleecefs-checkpoint-import", arguments) {
                Ok(reply) => replies.push(reply),
                Err(e) if e.errno() == errno::ESTALE => {
                    complain(&explain(&e));
                    exit = Exit::Differs;
                }
                Err(e) => {
                    if let Some(before) = failed.replace(e) {
                        complain(&explain(&before));
                    }
                }
            }
        }
        if failed.is_none() || !replies.is_empty() {
            print(&replies, "imported", self.json.json)?;
        }
        failed.map_or(Ok(exit), Err)
    }

    fn files(&self) -> Result<Vec<PathBuf>> {
        if !self.file.is_dir() {
            return Ok(vec![self.file.clone()]);
        }
        if let Some(disk) = &self.disk {
            return Ok(vec![self.file.join(format!("{disk}.qcow2"))]);
        }
        let failed = |e| Error::io("list", e).at_path(&self.file);
        let entries = std::fs::read_dir(&self.file).map_err(failed)?.collect::<std::io::Result<Vec<_>>>();
        let mut files: Vec<PathBuf> = entries.map_err(failed)?.into_iter().map(|entry| entry.path()).collect();
        files.retain(|file| file.extension().is_some_and(|extension| extension == "qcow2"));
        files.sort();
        if files.is_empty() {
            return Err(Error::new(errno::EINVAL, "import", "no file in it is named *.qcow2").at_path(&self.file));
        }
        Ok(files)
    }
}

fn print(replies: &[Value], done: &str, as_json: bool) -> Result<()> {
    let mut out = Out::new();
    if as_json {
        return out.json(&json!(replies));
    }
    for reply in replies {
        let Carried { checkpoint, disk, size, dirty } = read_reply(reply)?;
        let (dirty, size) = (human_size(dirty), human_size(size));
        out.line(format!("{disk}: {dirty} of {size} changed since '{}': {done}", printable(&checkpoint)))?;
    }
    Ok(())
}

impl ListArgs {
    fn run(&self) -> Result<()> {
        let arguments = self.disk.as_ref().map_or(json!({}), |disk| json!({ "disk": disk }));
        let reply = execute(&self.mnt, "fleecefs-checkpoint-list", arguments)?;
        let mut out = Out::new();
        if self.json.json {
            return out.json(&reply);
        }
        let mut table = Table::new(&["CHECKPOINT", "TIME", "DISK", ">CHANGED AFTER", ">GRANULARITY", "STATE"]);
        for row in read_reply::<Vec<Row>>(&reply)? {
            for disk in row.disks {
                let state = state(&disk);
                table.row([
                    row.name.clone(),
                    row.time.clone(),
                    disk.disk,
                    human_size(disk.dirty),
                    human_size(disk.granularity),
                    state,
                ]);
            }
        }
        table.print(&mut out)
    }
}

fn state(disk: &DiskRow) -> String {
    let mut words = vec![if disk.completed { "completed".to_owned() } else { "not completed".to_owned() }];
    if disk.recording {
        words.push("recording".into());
    }
    if let Some(reason) = &disk.everything {
        words.push(format!("everything counts as changed: {reason}"));
    }
    words.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_state_says_what_a_map_can_rely_on() {
        let mut row: DiskRow = read_reply(
            &json!({"disk": "a", "completed": true, "recording": true, "granularity": 1, "dirty": 0, "everything": null}),
        )
        .unwrap();
        assert_eq!(state(&row), "completed, recording");
        row.completed = false;
        row.recording = false;
        row.everything = Some("foreign writer".into());
        assert_eq!(state(&row), "not completed, everything counts as changed: foreign writer");
    }
}
