//! `fleecefs disk`: the disks of a running mount.

use super::connect::{execute, read_reply};
use super::output::Out;
use super::spec::parse_image;
use super::{Exit, JsonArg};
use crate::error::{Error, Result, errno};
use crate::units::{human_size, parse_size};
use clap::{Args, Subcommand};
use serde::Deserialize;
use serde_json::json;
use std::ffi::OsString;
use std::path::PathBuf;

/// Commands of `disk`.
#[derive(Debug, Subcommand)]
pub enum DiskCommand {
    /// Serve one more image
    Add(AddArgs),
    /// Serve an image no longer
    Remove(RemoveArgs),
    /// Grow or shrink a disk
    Resize(ResizeArgs),
}

/// Arguments of `disk add`.
#[derive(Debug, Args)]
pub struct AddArgs {
    /// The mount
    mnt: PathBuf,
    /// The image, under the name of its file or NAME
    #[arg(value_name = "[NAME=]IMAGE")]
    image: OsString,
    /// What is believed after a stop where it is on a block device: distrust or trust [default: as the mount]
    #[arg(long, value_name = "POLICY", value_parser = ["distrust", "trust"])]
    block_devices: Option<String>,
    /// Leave no mark of ours in a qcow2 image [default: as the mount]
    #[arg(long)]
    no_mark: bool,
    #[command(flatten)]
    json: JsonArg,
}

/// Arguments of `disk remove`.
#[derive(Debug, Args)]
pub struct RemoveArgs {
    /// The mount
    mnt: PathBuf,
    /// The disk
    disk: String,
}

/// Arguments of `disk resize`.
#[derive(Debug, Args)]
pub struct ResizeArgs {
    /// The mount
    mnt: PathBuf,
    /// The disk
    disk: String,
    /// The new size
    #[arg(value_parser = |text: &str| parse_size(text).map_err(|e| e.to_string()))]
    size: u64,
}

#[derive(Deserialize)]
struct Added {
    name: String,
    size: u64,
}

impl DiskCommand {
    /// Runs the command.
    pub fn run(&self) -> Result<Exit> {
        match self {
            DiskCommand::Add(args) => args.run()?,
            DiskCommand::Remove(args) => {
                drop(execute(&args.mnt, "fleecefs-disk-remove", json!({ "name": args.disk }))?);
            }
            DiskCommand::Resize(args) => {
                drop(execute(&args.mnt, "fleecefs-disk-resize", json!({ "name": args.disk, "size": args.size }))?);
            }
        }
        Ok(Exit::Done)
    }
}

impl AddArgs {
    fn run(&self) -> Result<()> {
        let spec = parse_image(&self.image)?;
        let file = spec.file.to_str().ok_or_else(|| {
            Error::new(errno::EINVAL, "image", "its path is not UTF-8, which the control socket cannot carry")
                .at_path(&spec.file)
                .hint("give it to `fleecefs mount`")
        })?;
        let mut arguments = json!({ "file": file, "name": spec.name });
        if let Some(policy) = &self.block_devices {
            arguments["block-devices"] = json!(policy);
        }
        if self.no_mark {
            arguments["no-mark"] = json!(true);
        }
        let reply = execute(&self.mnt, "fleecefs-disk-add", arguments)?;
        let mut out = Out::new();
        if self.json.json {
            return out.json(&reply);
        }
        let added: Added = read_reply(&reply)?;
        let live = self.mnt.join("live").join(format!("{}.raw", added.name));
        out.line(format!("{}  {}", live.display(), human_size(added.size)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reply_of_an_added_disk_is_read() {
        let added: Added = read_reply(&json!({"name": "a", "size": 7, "uuid": "x"})).unwrap();
        assert_eq!((added.name.as_str(), added.size), ("a", 7));
        assert!(read_reply::<Added>(&json!(null)).is_err());
    }
}
