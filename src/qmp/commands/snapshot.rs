//! Snapshots: create, complete, cancel, release, list.

use super::Command;
use crate::fleece::{Consistency, HookNote, Notes, Since, Skip, SnapshotRequest};
use crate::qmp::args::{Arguments, not_accepted};
use crate::qmp::{CommandError, CommandResult, Host};
use serde_json::json;

pub(super) const COMMANDS: &[Command] = &[
    Command::new("fleecefs-snapshot-create", create),
    Command::new("fleecefs-snapshot-annotate", annotate),
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
    let notes = notes(arguments)?;
    let skip = skip(arguments)?;
    Ok(SnapshotRequest { name, disks, since, notes, skip })
}

/// `skip`: what the views leave out; an empty list is nothing, none what the mount says.
fn skip(arguments: &mut Arguments) -> Result<Option<Skip>, CommandError> {
    if !arguments.has("skip") {
        return Ok(None);
    }
    let names = arguments.strings("skip")?;
    let unknown = names.iter().find(|name| Skip::of([name.as_str()]).is_err());
    if let Some(unknown) = unknown {
        return Err(not_accepted("skip", unknown));
    }
    Ok(Skip::of(names.iter().map(String::as_str)).ok())
}

/// `consistency` and `hooks`, as the manifest has them.
fn notes(arguments: &mut Arguments) -> Result<Notes, CommandError> {
    let consistency = match arguments.optional_choice("consistency", &["crash", "filesystem"])?.as_deref() {
        Some("filesystem") => Consistency::Filesystem,
        _ => Consistency::Crash,
    };
    let hooks = if arguments.has("hooks") { arguments.objects("hooks", hook)? } else { Vec::new() };
    Ok(Notes { consistency, hooks })
}

fn hook(mut members: Arguments) -> Result<HookNote, CommandError> {
    let command = members.string("command")?;
    let phase = members.string("phase")?;
    let exit = members.int("exit")?;
    let exit = i32::try_from(exit).map_err(|_| CommandError::generic("Parameter 'exit' expects int32_t"))?;
    let ms = members.uint("ms")?;
    let error = members.optional_string("error")?;
    members.finish()?;
    Ok(HookNote { command, phase, exit, ms, error })
}

/// Replaces both `consistency` and `hooks`, by their defaults where they are not given. Returns the manifest.
fn annotate(host: &dyn Host, mut arguments: Arguments) -> CommandResult {
    let name = arguments.string("name")?;
    let notes = notes(&mut arguments)?;
    arguments.finish()?;
    host.fleece().annotate_snapshot(&name, &notes)?;
    Ok(host.fleece().snapshot(&name)?.manifest())
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
