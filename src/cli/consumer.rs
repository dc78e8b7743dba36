//! `fleecefs consumer`: readers of changes and the checkpoints that they last finished.

use super::connect::{execute, read_reply};
use super::output::{Out, Table};
use super::{Exit, JsonArg};
use crate::error::Result;
use clap::{Args, Subcommand};
use serde::Deserialize;
use serde_json::json;
use std::path::PathBuf;

/// Commands of `consumer`.
#[derive(Debug, Subcommand)]
pub enum ConsumerCommand {
    /// List consumers
    List(ListArgs),
    /// Point a consumer, new or known, at a checkpoint
    Set(SetArgs),
    /// Forget a consumer
    Delete(DeleteArgs),
}

/// Arguments of `consumer list`.
#[derive(Debug, Args)]
pub struct ListArgs {
    /// The mount
    mnt: PathBuf,
    #[command(flatten)]
    json: JsonArg,
}

/// Arguments of `consumer set`.
#[derive(Debug, Args)]
pub struct SetArgs {
    /// The mount
    mnt: PathBuf,
    /// The consumer
    consumer: String,
    /// The checkpoint
    checkpoint: String,
}

/// Arguments of `consumer delete`.
#[derive(Debug, Args)]
pub struct DeleteArgs {
    /// The mount
    mnt: PathBuf,
    /// The consumer
    consumer: String,
}

/// A consumer as the daemon lists it.
#[derive(Debug, Deserialize)]
pub struct Row {
    /// Its name.
    pub name: String,
    /// The checkpoint's name.
    pub checkpoint: String,
    /// The checkpoint's identity.
    pub uuid: String,
    disks: Vec<String>,
}

impl ConsumerCommand {
    /// Runs the command.
    pub fn run(&self) -> Result<Exit> {
        match self {
            ConsumerCommand::List(args) => args.run()?,
            ConsumerCommand::Set(args) => {
                let arguments = json!({ "name": args.consumer, "checkpoint": args.checkpoint });
                execute(&args.mnt, "fleecefs-consumer-set", arguments)?;
            }
            ConsumerCommand::Delete(args) => {
                execute(&args.mnt, "fleecefs-consumer-delete", json!({ "name": args.consumer }))?;
            }
        }
        Ok(Exit::Done)
    }
}

impl ListArgs {
    fn run(&self) -> Result<()> {
        let reply = execute(&self.mnt, "fleecefs-consumer-list", json!({}))?;
        let mut out = Out::new();
        if self.json.json {
            return out.json(&reply);
        }
        table(&read_reply::<Vec<Row>>(&reply)?).print(&mut out)
    }
}

/// One line a consumer.
pub fn table(rows: &[Row]) -> Table {
    let mut table = Table::new(&["CONSUMER", "CHECKPOINT", "DISKS"]);
    for row in rows {
        table.row([row.name.clone(), row.checkpoint.clone(), row.disks.join(" ")]);
    }
    table
}
