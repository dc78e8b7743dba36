//! Checkpoints and the consumers that point at them.

use super::{Command, Held};
use crate::error::{Error, errno};
use crate::qmp::args::Arguments;
use crate::qmp::{CommandError, CommandResult, Host};
use serde_json::json;
use std::path::PathBuf;

pub(super) const COMMANDS: &[Command] = &[
    Command::new("fleecefs-checkpoint-list", list),
    Command::new("fleecefs-checkpoint-delete", delete),
    Command::new("fleecefs-checkpoint-export", export),
    Command::new("fleecefs-checkpoint-import", import),
    Command::new("fleecefs-consumer-list", consumer_list),
    Command::holding("fleecefs-consumer-lock", consumer_lock),
    Command::new("fleecefs-consumer-set", consumer_set),
    Command::new("fleecefs-consumer-delete", consumer_delete),
];

fn list(host: &dyn Host, mut arguments: Arguments) -> CommandResult {
    let disk = arguments.optional_string("disk")?;
    arguments.finish()?;
    let mut checkpoints = host.fleece().checkpoints();
    if let Some(disk) = disk {
        host.fleece().disk(&disk)?;
        for checkpoint in &mut checkpoints {
            checkpoint.disks.retain(|row| row.disk == disk);
        }
        checkpoints.retain(|checkpoint| !checkpoint.disks.is_empty());
    }
    Ok(json!(checkpoints))
}

fn delete(host: &dyn Host, mut arguments: Arguments) -> CommandResult {
    let name = arguments.string("name")?;
    arguments.finish()?;
    host.fleece().delete_checkpoint(&name)?;
    Ok(json!({}))
}

/// Answers when all of the disk was read.
fn export(host: &dyn Host, mut arguments: Arguments) -> CommandResult {
    let name = arguments.string("name")?;
    let disk = arguments.string("disk")?;
    let file = file(&mut arguments)?;
    arguments.finish()?;
    Ok(json!(host.fleece().export_checkpoint(&name, &disk, &file)?))
}

/// Answers when all of the disk was read.
fn import(host: &dyn Host, mut arguments: Arguments) -> CommandResult {
    let disk = arguments.optional_string("disk")?;
    let file = file(&mut arguments)?;
    arguments.finish()?;
    Ok(json!(host.fleece().import_checkpoint(&file, disk.as_deref())?))
}

/// The daemon's working directory is not the client's.
fn file(arguments: &mut Arguments) -> Result<PathBuf, CommandError> {
    let file = PathBuf::from(arguments.string("file")?);
    if !file.is_absolute() {
        return Err(Error::new(errno::EINVAL, format!("file '{}'", file.display()), "not an absolute path").into());
    }
    Ok(file)
}

fn consumer_list(host: &dyn Host, arguments: Arguments) -> CommandResult {
    arguments.finish()?;
    Ok(json!(host.fleece().consumers()))
}

/// The lock is the connection's, and goes with it.
fn consumer_lock(host: &dyn Host, held: &mut Held, mut arguments: Arguments) -> CommandResult {
    let name = arguments.string("name")?;
    arguments.finish()?;
    held.consumers.push(host.fleece().lock_consumer(&name)?);
    Ok(json!({}))
}

fn consumer_set(host: &dyn Host, mut arguments: Arguments) -> CommandResult {
    let name = arguments.string("name")?;
    let checkpoint = arguments.string("checkpoint")?;
    arguments.finish()?;
    host.fleece().set_consumer(&name, &checkpoint)?;
    Ok(json!({}))
}

fn consumer_delete(host: &dyn Host, mut arguments: Arguments) -> CommandResult {
    let name = arguments.string("name")?;
    arguments.finish()?;
    host.fleece().delete_consumer(&name)?;
    Ok(json!({}))
}
