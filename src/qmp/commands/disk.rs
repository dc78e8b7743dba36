//! Disks: add, remove, resize.

use super::Command;
use crate::error::{Error, errno};
use crate::fleece::{BlockDevicePolicy, DiskSpec};
use crate::image::Format;
use crate::qmp::args::Arguments;
use crate::qmp::{CommandError, CommandResult, Host};
use serde_json::{Value, json};
use std::path::PathBuf;

pub(super) const COMMANDS: &[Command] = &[
    Command::new("fleecefs-disk-add", add),
    Command::new("fleecefs-disk-remove", remove),
    Command::new("fleecefs-disk-resize", resize),
];

/// `file` must be absolute: the daemon's working directory is not the client's.
fn add(host: &dyn Host, mut arguments: Arguments) -> CommandResult {
    let file = PathBuf::from(arguments.string("file")?);
    let name = arguments.optional_string("name")?;
    let format = arguments.optional_string("format")?.map(format_by_name).transpose()?;
    let read_only = arguments.optional_bool("read-only")?.unwrap_or(false);
    let snapshot = arguments.optional_string("snapshot")?;
    let force_share = arguments.optional_bool("force-share")?.unwrap_or(false);
    let l2_cache_bytes = arguments.optional_uint("l2-cache-size")?;
    let block_devices = arguments.optional_string("block-devices")?.map(block_devices_by_name).transpose()?;
    let no_mark = arguments.optional_bool("no-mark")?;
    arguments.finish()?;
    if !file.is_absolute() {
        let e = Error::new(errno::EINVAL, format!("image '{}'", file.display()), "not an absolute path");
        return Err(e.into());
    }
    // Without a name the core takes the file's.
    let stem = || file.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
    let node = name.clone().unwrap_or_else(stem);
    if host.nodes().get(&node).is_some() {
        let e = Error::new(errno::EEXIST, format!("disk '{node}'"), "a block node has this name");
        return Err(e.into());
    }
    let disk = host.add_disk(&DiskSpec {
        name,
        file,
        format,
        read_only,
        snapshot,
        force_share,
        l2_cache_bytes,
        block_devices,
        no_mark,
    })?;
    Ok(json!({ "name": disk.name(), "uuid": disk.uuid(), "size": disk.size() }))
}

fn format_by_name(name: String) -> Result<Format, CommandError> {
    let text = format!("Parameter 'format' does not accept value '{name}'");
    serde_json::from_value(Value::String(name)).map_err(|_| CommandError::generic(text))
}

fn block_devices_by_name(name: String) -> Result<BlockDevicePolicy, CommandError> {
    match name.as_str() {
        "distrust" => Ok(BlockDevicePolicy::Distrust),
        "trust" => Ok(BlockDevicePolicy::Trust),
        _ => Err(CommandError::generic(format!("Parameter 'block-devices' does not accept value '{name}'"))),
    }
}

fn remove(host: &dyn Host, mut arguments: Arguments) -> CommandResult {
    let name = arguments.string("name")?;
    arguments.finish()?;
    host.fleece().remove_disk(&name)?;
    Ok(json!({}))
}

fn resize(host: &dyn Host, mut arguments: Arguments) -> CommandResult {
    let name = arguments.string("name")?;
    let size = arguments.uint("size")?;
    arguments.finish()?;
    host.fleece().resize_disk(&name, size)?;
    Ok(json!({}))
}
