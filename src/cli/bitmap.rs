//! `fleecefs bitmap`: dirty bitmaps of a disk, with the options of `qemu-img bitmap`.

use super::connect::{Mount, execute, read_reply};
use super::output::{Out, Table};
use super::{Exit, JsonArg};
use crate::error::{Error, Result, errno};
use crate::units::{human_size, parse_size};
use clap::{ArgAction, Args, Subcommand};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::ops::Not;
use std::path::{Path, PathBuf};

/// Commands of `bitmap`.
#[derive(Debug, Subcommand)]
pub enum BitmapCommand {
    /// Make a bitmap that records what is written from now on
    Add(AddArgs),
    /// Forget a bitmap, in the image too
    Remove(OneArgs),
    /// Clear all bits of a bitmap
    Clear(OneArgs),
    /// Record in a bitmap from now on
    Enable(OneArgs),
    /// Record in a bitmap no longer
    Disable(OneArgs),
    /// Add to a bitmap what others have
    Merge(MergeArgs),
    /// List bitmaps, the newest first
    List(ListArgs),
}

/// Arguments of `bitmap add`.
#[derive(Debug, Args)]
pub struct AddArgs {
    #[command(flatten)]
    one: OneArgs,
    /// Bytes per bit: a power of two from 512 to 2G; without it the image's cluster size, but from 4K to 64K
    #[arg(short, long, value_name = "SIZE", value_parser = |text: &str| parse_size(text).map_err(|e| e.to_string()))]
    granularity: Option<u64>,
    /// Keep it over unmounts and crashes
    #[arg(long, value_name = "BOOL", default_value_t = true, action = ArgAction::Set)]
    persistent: bool,
    /// Do not record yet
    #[arg(long)]
    disabled: bool,
}

/// A bitmap.
#[derive(Debug, Args)]
pub struct OneArgs {
    /// The mount
    mnt: PathBuf,
    /// The disk
    disk: String,
    /// The bitmap
    name: String,
}

/// Arguments of `bitmap merge`.
#[derive(Debug, Args)]
pub struct MergeArgs {
    #[command(flatten)]
    one: OneArgs,
    /// Bitmaps to take the bits of; they keep theirs
    #[arg(required = true)]
    source: Vec<String>,
    /// The disk that the sources are of, where it is another one, of the same size
    #[arg(short = 'b', long, value_name = "DISK")]
    source_disk: Option<String>,
}

/// Arguments of `bitmap list`.
#[derive(Debug, Args)]
pub struct ListArgs {
    /// The mount
    mnt: PathBuf,
    /// Those of this disk only
    disk: Option<String>,
    #[command(flatten)]
    json: JsonArg,
}

/// A bitmap as it is listed.
#[derive(Debug, Serialize, Deserialize)]
struct Row {
    #[serde(default)]
    node: String,
    name: String,
    granularity: u64,
    count: u64,
    recording: bool,
    busy: bool,
    persistent: bool,
    #[serde(default, skip_serializing_if = "Not::not")]
    inconsistent: bool,
    #[serde(default, skip_serializing_if = "Not::not")]
    checkpoint: bool,
}

/// What the daemon says of a node.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Node {
    node_name: String,
    #[serde(default)]
    dirty_bitmaps: Vec<Row>,
}

impl BitmapCommand {
    /// Runs the command.
    pub fn run(&self) -> Result<Exit> {
        match self {
            BitmapCommand::Add(args) => {
                let mut more = json!({ "persistent": args.persistent, "disabled": args.disabled });
                if let Some(bytes) = args.granularity {
                    more["granularity"] = json!(granularity(bytes)?);
                }
                args.one.change("block-dirty-bitmap-add", "name", more)
            }
            BitmapCommand::Remove(args) => args.change("block-dirty-bitmap-remove", "name", json!({})),
            BitmapCommand::Clear(args) => args.change("block-dirty-bitmap-clear", "name", json!({})),
            BitmapCommand::Enable(args) => args.change("block-dirty-bitmap-enable", "name", json!({})),
            BitmapCommand::Disable(args) => args.change("block-dirty-bitmap-disable", "name", json!({})),
            BitmapCommand::Merge(args) => args.one.change("block-dirty-bitmap-merge", "target", args.sources()),
            BitmapCommand::List(args) => args.run(),
        }?;
        Ok(Exit::Done)
    }
}

/// The socket takes 32 bits; more is out of every range.
fn granularity(bytes: u64) -> Result<u32> {
    let text = "Granularity must be power of 2 and at least 512, and at most 2G";
    u32::try_from(bytes).map_err(|_| Error::new(errno::EINVAL, format!("granularity {bytes}"), text))
}

impl OneArgs {
    /// Changes the bitmap, whose name the command's argument `key` takes.
    fn change(&self, command: &str, key: &str, mut arguments: Value) -> Result<()> {
        arguments["node"] = json!(self.disk);
        arguments[key] = json!(self.name);
        let what = format!("bitmap '{}' of disk '{}'", self.name.escape_debug(), self.disk);
        Mount::find(&self.mnt)?.client()?.execute_for(&what, command, arguments).map(drop)
    }
}

impl MergeArgs {
    fn sources(&self) -> Value {
        let node = self.source_disk.as_ref().unwrap_or(&self.one.disk);
        let source = |name: &String| json!({ "node": node, "name": name });
        json!({ "bitmaps": self.source.iter().map(source).collect::<Vec<_>>() })
    }
}

impl ListArgs {
    fn run(&self) -> Result<()> {
        let rows = rows(&self.mnt, self.disk.as_deref())?;
        let mut out = Out::new();
        if self.json.json {
            return out.json(&rows);
        }
        let mut table = Table::new(&["DISK", "BITMAP", ">DIRTY", ">GRANULARITY", "STATE"]);
        for row in rows {
            let state = state(&row);
            table.row([row.node, row.name, human_size(row.count), human_size(row.granularity), state]);
        }
        table.print(&mut out)
    }
}

/// The bitmaps of a disk, or of all.
fn rows(mnt: &Path, disk: Option<&str>) -> Result<Vec<Row>> {
    let reply = execute(mnt, "query-named-block-nodes", json!({ "flat": true }))?;
    let mut nodes: Vec<Node> = read_reply(&reply)?;
    if let Some(disk) = disk {
        nodes.retain(|node| node.node_name == disk);
        if nodes.is_empty() {
            return Err(Error::new(errno::ENOENT, format!("disk '{disk}'"), "no such disk")
                .hint("`fleecefs status` lists the disks"));
        }
    }
    let of_node = |node: Node| {
        let name = node.node_name;
        node.dirty_bitmaps.into_iter().map(move |row| Row { node: name.clone(), ..row })
    };
    Ok(nodes.into_iter().flat_map(of_node).collect())
}

fn state(row: &Row) -> String {
    let words = [
        (row.inconsistent, "inconsistent: it can only be removed"),
        (row.recording, "recording"),
        (!row.recording && !row.inconsistent, "disabled"),
        (row.busy, "busy"),
        (!row.persistent, "not persistent"),
        (row.checkpoint, "of a checkpoint"),
    ];
    words.iter().filter(|(is, _)| *is).map(|(_, word)| *word).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_is_read_with_and_without_bitmaps() {
        let row = json!({"name": "b", "count": 0, "granularity": 65536, "recording": true, "busy": false,
            "persistent": true});
        let nodes = json!([{"node-name": "a", "drv": "raw"}, {"node-name": "q", "dirty-bitmaps": [row]}]);
        let nodes: Vec<Node> = read_reply(&nodes).unwrap();
        assert!(nodes[0].dirty_bitmaps.is_empty());
        assert_eq!(state(&nodes[1].dirty_bitmaps[0]), "recording");
    }

    #[test]
    fn the_state_says_what_can_be_done() {
        let row = json!({"name": "b", "count": 0, "granularity": 65536, "recording": false, "busy": true,
            "persistent": false});
        let mut row: Row = read_reply(&row).unwrap();
        assert_eq!(state(&row), "disabled, busy, not persistent");
        (row.busy, row.persistent, row.inconsistent) = (false, true, true);
        assert_eq!(state(&row), "inconsistent: it can only be removed");
        assert!(granularity(1 << 31).is_ok() && granularity(1 << 32).is_err());
    }
}
