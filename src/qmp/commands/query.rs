//! Block nodes with what is on them: the disks, their images and bitmaps, and the file nodes.

use super::Command;
use crate::fleece::{BitmapInfo, Disk};
use crate::image::Cache;
use crate::qmp::args::Arguments;
use crate::qmp::nodes::FileNode;
use crate::qmp::{CommandError, CommandResult, Host};
use serde_json::{Map, Value, json};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

pub(super) const COMMANDS: &[Command] =
    &[Command::new("query-block", query_block), Command::new("query-named-block-nodes", query_nodes)];

/// QEMU's BlockDirtyInfo. That a checkpoint owns the bitmap is a member of our own.
fn bitmap_row(bitmap: &BitmapInfo) -> Value {
    let mut row = json!({
        "name": bitmap.name,
        "count": bitmap.count,
        "granularity": bitmap.granularity,
        "recording": bitmap.recording,
        "busy": bitmap.busy,
        "persistent": bitmap.persistent,
    });
    for (member, set) in [("inconsistent", bitmap.inconsistent), ("checkpoint", bitmap.checkpoint)] {
        if set {
            row[member] = json!(true);
        }
    }
    row
}

/// The members of QEMU's BlockDeviceInfo that all nodes have.
fn node_row(host: &dyn Host, name: &str, driver: &str, file: &Path, read_only: bool, image: Value) -> Value {
    let mut row = json!({
        "node-name": name,
        "drv": driver,
        "file": file.to_string_lossy(),
        "ro": read_only,
        "active": true,
        "encrypted": false,
        "backing_file_depth": 0,
        "detect_zeroes": "off",
        "write_threshold": 0,
        "cache": {
            "writeback": true,
            "direct": host.fleece().options().cache == Cache::None,
            "no-flush": false,
        },
        "image": image,
    });
    for limit in ["bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"] {
        row[limit] = json!(0);
    }
    row
}

/// What the file takes on the medium; not known of block devices.
fn stored_bytes(path: &Path) -> Option<u64> {
    fs::metadata(path).ok().filter(|metadata| metadata.is_file()).map(|metadata| metadata.blocks() * 512)
}

fn image_row(filename: &Path, format: &str, size: u64) -> Map<String, Value> {
    let mut image = Map::new();
    image.insert("filename".into(), json!(filename.to_string_lossy()));
    image.insert("format".into(), json!(format));
    image.insert("virtual-size".into(), json!(size));
    image.insert("dirty-flag".into(), json!(false));
    if let Some(bytes) = stored_bytes(filename) {
        image.insert("actual-size".into(), json!(bytes));
    }
    image
}

fn disk_row(host: &dyn Host, disk: &Disk) -> CommandResult {
    let driver = disk.format().to_string();
    let mut image = image_row(disk.image_path(), &driver, disk.size());
    disk.describe_image(&mut image);
    // While it is served its refcounts may be late, which QEMU does not tell of an image in use either.
    image.insert("dirty-flag".into(), json!(false));
    let backing_file = image.get("backing-filename").cloned();
    let mut row = node_row(host, disk.name(), &driver, disk.image_path(), disk.read_only(), image.into());
    if let Some(backing_file) = backing_file {
        row["backing_file"] = backing_file;
    }
    let bitmaps = host.fleece().bitmaps(disk.name())?;
    if !bitmaps.is_empty() {
        row["dirty-bitmaps"] = bitmaps.iter().map(bitmap_row).collect::<Vec<Value>>().into();
    }
    Ok(row)
}

fn file_row(host: &dyn Host, name: &str, file: &FileNode) -> Value {
    let size = fs::metadata(&file.filename).map_or(0, |metadata| metadata.len());
    let image = image_row(&file.filename, file.driver, size);
    node_row(host, name, file.driver, &file.filename, file.read_only, image.into())
}

/// The disks by name, then the file nodes. `flat` would leave out what backing images are, which is not told here.
fn query_nodes(host: &dyn Host, mut arguments: Arguments) -> CommandResult {
    arguments.optional_bool("flat")?;
    arguments.finish()?;
    let mut rows = disk_rows(host)?;
    rows.extend(host.nodes().list().iter().map(|(name, file)| file_row(host, name, file)));
    Ok(rows.into())
}

fn disk_rows(host: &dyn Host) -> Result<Vec<Value>, CommandError> {
    let mut rows = Vec::new();
    for disk in host.fleece().disks() {
        match disk_row(host, &disk) {
            Ok(row) => rows.push(row),
            // It went meanwhile.
            Err(_) if host.fleece().disk(disk.name()).is_err() => {}
            Err(e) => return Err(e),
        }
    }
    Ok(rows)
}

/// Each disk as the medium of a device of its name.
fn query_block(host: &dyn Host, arguments: Arguments) -> CommandResult {
    arguments.finish()?;
    let device = |inserted: Value| {
        json!({
            "device": inserted["node-name"],
            "type": "unknown",
            "removable": false,
            "locked": false,
            "inserted": inserted,
        })
    };
    Ok(disk_rows(host)?.into_iter().map(device).collect::<Vec<Value>>().into())
}
