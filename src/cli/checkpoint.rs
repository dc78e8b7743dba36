//! `fleecefs checkpoint`: instants from which changes are known.

use super::connect::{execute, read_reply};
use super::output::{Out, Table};
use super::{Exit, JsonArg};
use crate::error::Result;
use crate::units::human_size;
use clap::{Args, Subcommand};
use serde::Deserialize;
use serde_json::json;
use std::path::PathBuf;

/// Commands of `checkpoint`.
#[derive(Debug, Subcommand)]
pub enum CheckpointCommand {
    /// List checkpoints, oldest first
    List(ListArgs),
    /// Delete a checkpoint; what it knows goes to the one before
    Delete(DeleteArgs),
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
            CheckpointCommand::Delete(args) => {
                execute(&args.mnt, "fleecefs-checkpoint-delete", json!({ "name": args.name }))?;
            }
        }
        Ok(Exit::Done)
    }
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
