//! Snapshots: create, complete, cancel, release, list.

use super::Command;
use crate::fleece::{Since, SnapshotRequest};
use crate::qmp::args::Arguments;
use crate::qmp::{CommandError, CommandResult, Host};
use serde_json::json;

pub(super) const COMMANDS: &[Command] = &[
    Command::new("fleecefs-snapshot-create", create),
    Command::new("fleecefs-snapshot-complete", complete),
    Command::new("fleecefs-snapshot-cancel", cancel),
    Command::new("fleecefs-snapshot-release", release),
    Command::new("fleecefs-snapshot-list", list),
];

/// The arguments of `fleecefs-snapshot-create`. `since` names a checkpoint, `consumer` a consumer whose checkpoint is
/// meant.
pub(super) fn request(arguments: &mut Arguments) -> Result<SnapshotRequest, CommandError> {
    let name = arguments.string("name")?;
    let disks = arguments.strings("disks")?;
    let since = arguments.optional_string("since")?;
    let consumer = arguments.optional_string("consumer")?;
    let since = match (since, consumer) {
        (Some(_), Some(_)) => {
            return Err(CommandError::generic("Parameters 'since' and 'consumer' cannot be used together"));
        }
        (Some(checkpoint), None) => Some(Since::Checkpoint(checkpoint)),
        (None, Some(consumer)) => Some(Since::Consumer(consumer)),
        (None, None) => None,
    };
    Ok(SnapshotRequest { name, disks, since })
}

/// Returns the manifest.
fn create(host: &dyn Host, mut arguments: Arguments) -> CommandResult {
    let request = self::request(&mut arguments)?;
    arguments.finish()?;
    Ok(host.create_snapshot(&request)?.manifest())
}

fn complete(host: &dyn Host, mut arguments: Arguments) -> CommandResult {
    let name = arguments.string("name")?;
    let consumer = arguments.optional_string("consumer")?;
    arguments.finish()?;
    host.fleece().complete_snapshot(&name, consumer.as_deref())?;
    Ok(json!({}))
}

fn cancel(host: &dyn Host, mut arguments: Arguments) -> CommandResult {
    let name = arguments.string("name")?;
    arguments.finish()?;
    host.fleece().cancel_snapshot(&name)?;
    Ok(json!({}))
}

fn release(host: &dyn Host, mut arguments: Arguments) -> CommandResult {
    let name = arguments.string("name")?;
    let disk = arguments.string("disk")?;
    let offset = arguments.uint("offset")?;
    let length = arguments.uint("length")?;
    arguments.finish()?;
    host.fleece().release(&name, &disk, offset, length)?;
    Ok(json!({}))
}

fn list(host: &dyn Host, arguments: Arguments) -> CommandResult {
    arguments.finish()?;
    Ok(json!(host.fleece().snapshot_infos()))
}
