//! Block nodes: add and remove them.
//!
//! A disk is a node of driver `raw` or `qcow2` under its own name. Beside disks there are file nodes
//! ([`crate::qmp::nodes`]). Options that would make a node behave otherwise than this daemon's disks do are refused.

use super::Command;
use crate::error::errno;
use crate::fleece::DiskSpec;
use crate::image::{Cache, Format};
use crate::qmp::args::{Alternate, Arguments, not_accepted};
use crate::qmp::nodes::FileNode;
use crate::qmp::{CommandError, CommandResult, ErrorClass, Host};
use serde_json::json;
use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::PathBuf;

pub(super) const COMMANDS: &[Command] = &[Command::new("blockdev-add", add), Command::new("blockdev-del", del)];

type Taken<T> = std::result::Result<T, CommandError>;

/// Longest name of a node in bytes (QEMU's limit).
const NAME_MAX_BYTES: usize = 31;
/// Options of `qcow2` nodes that QEMU has and this daemon has not.
const QCOW2_OTHERS: [&str; 14] = [
    "backing",
    "lazy-refcounts",
    "pass-discard-request",
    "pass-discard-snapshot",
    "pass-discard-other",
    "discard-no-unref",
    "overlap-check",
    "cache-size",
    "l2-cache-entry-size",
    "refcount-cache-size",
    "cache-clean-interval",
    "encrypt",
    "data-file",
    "key-secret",
];
/// The same for `raw`, `file` and `host_device`.
const RAW_OTHERS: [&str; 2] = ["offset", "size"];
const FILE_OTHERS: [&str; 5] =
    ["pr-manager", "aio-max-batch", "drop-cache", "x-check-cache-dropped", "dynamic-auto-read-only"];

/// What a `blockdev-add` asks for, checked as far as it can be without looking at other nodes.
enum NewNode {
    File(FileNode),
    Disk { format: Format, file: NewFile, read_only: bool, force_share: bool, l2_cache_bytes: Option<u64> },
}

/// What a format node lies on.
enum NewFile {
    /// A node by name.
    Node(String),
    /// One of its own.
    Own(FileNode),
}

/// The options that all nodes have.
struct Common {
    driver: String,
    name: Option<String>,
    read_only: bool,
    force_share: bool,
}

fn common(host: &dyn Host, arguments: &mut Arguments) -> Taken<Common> {
    let driver = arguments.string("driver")?;
    if !["file", "host_device", "raw", "qcow2"].contains(&driver.as_str()) {
        return Err(not_accepted("driver", &driver));
    }
    let name = arguments.optional_string("node-name")?;
    let discard = arguments.optional_choice("discard", &["ignore", "unmap"])?;
    let cache = arguments.optional_object("cache")?;
    let (direct, no_flush) = match cache {
        None => (None, None),
        Some(mut cache) => {
            let taken = (cache.optional_bool("direct")?, cache.optional_bool("no-flush")?);
            cache.finish()?;
            taken
        }
    };
    let active = arguments.optional_bool("active")?;
    let read_only = arguments.optional_bool("read-only")?.unwrap_or(false);
    // The node is read-only or it is not: it never changes by itself.
    arguments.optional_bool("auto-read-only")?;
    let force_share = arguments.optional_bool("force-share")?.unwrap_or(false);
    let detect_zeroes = arguments.optional_choice("detect-zeroes", &["off", "on", "unmap"])?;
    let is_direct = host.fleece().options().cache == Cache::None;
    let unlike = [
        ("discard", discard.as_deref() == Some("ignore"), "discards reach the image"),
        ("cache.direct", direct.is_some_and(|direct| direct != is_direct), "`fleecefs mount --cache` decides"),
        ("cache.no-flush", no_flush == Some(true), "flushes reach the image"),
        ("active", active == Some(false), "nodes are active"),
        ("detect-zeroes", detect_zeroes.is_some_and(|value| value != "off"), "zeroes are not looked for"),
    ];
    match unlike.into_iter().find(|(_, unlike, _)| *unlike) {
        Some((option, _, why)) => Err(not_supported(option, &driver, why)),
        None => Ok(Common { driver, name, read_only, force_share }),
    }
}

fn not_supported(option: &str, driver: &str, why: &str) -> CommandError {
    CommandError::generic(format!("This value of option '{option}' of driver '{driver}' is not supported: {why}"))
}

/// Refuses options that QEMU has and this daemon has not.
fn refuse_others(arguments: &Arguments, driver: &str, others: &[&str]) -> Taken<()> {
    match others.iter().find(|name| arguments.has(name)) {
        Some(name) => {
            Err(CommandError::generic(format!("Option '{name}' of driver '{driver}' is not supported by fleecefs")))
        }
        None => Ok(()),
    }
}

/// The rest of a node of driver `file` or `host_device`.
fn file_node(common: &Common, arguments: &mut Arguments) -> Taken<FileNode> {
    let filename = arguments.string("filename")?;
    if arguments.optional_choice("locking", &["auto", "on", "off"])?.as_deref() == Some("off") {
        return Err(not_supported("locking", &common.driver, "images are always locked"));
    }
    // How I/O is issued is this daemon's matter; nobody can tell the difference.
    arguments.optional_choice("aio", &["threads", "native", "io_uring"])?;
    refuse_others(arguments, &common.driver, &FILE_OTHERS)?;
    let driver = if common.driver == "file" { "file" } else { "host_device" };
    let (read_only, force_share) = (common.read_only, common.force_share);
    Ok(FileNode { driver, filename: PathBuf::from(filename), read_only, force_share })
}

/// Looks whether the file is there, with QEMU's texts.
fn check_file(node: &FileNode) -> Taken<()> {
    let (driver, path) = (node.driver, node.filename.display());
    if node.filename.as_os_str().is_empty() {
        return Err(CommandError::generic(format!("The '{driver}' block driver requires a file name")));
    }
    let refused = |number: i32, why: &str| CommandError {
        errno: Some(number),
        ..CommandError::generic(format!("Could not open '{path}': {why}"))
    };
    if !node.filename.is_absolute() {
        return Err(refused(errno::EINVAL, "not an absolute path"));
    }
    let metadata = fs::metadata(&node.filename).map_err(|e| {
        let e = crate::error::Error::io("open", e);
        refused(e.errno(), e.to_string().trim_start_matches("open: "))
    })?;
    let kind = metadata.file_type();
    match driver {
        _ if kind.is_dir() => Err(refused(errno::EISDIR, "Is a directory")),
        "file" if !kind.is_file() => {
            Err(CommandError::generic(format!("'file' driver requires '{path}' to be a regular file")))
        }
        "host_device" if !kind.is_block_device() => {
            Err(CommandError::generic(format!("'host_device' driver requires '{path}' to be a block device")))
        }
        _ => Ok(()),
    }
}

fn read_new(host: &dyn Host, arguments: &mut Arguments) -> Taken<(Option<String>, NewNode)> {
    let common = common(host, arguments)?;
    if common.driver == "file" || common.driver == "host_device" {
        let file = file_node(&common, arguments)?;
        return Ok((common.name, NewNode::File(file)));
    }
    let file = match arguments.alternate("file", "BlockdevRef")? {
        Alternate::String(name) => NewFile::Node(name),
        Alternate::Object(mut members) => {
            let below = self::common(host, &mut members)?;
            if below.driver != "file" && below.driver != "host_device" {
                let text =
                    format!("A node of driver '{}' lies on one of driver 'file' or 'host_device'", common.driver);
                return Err(CommandError::generic(text));
            }
            let file = file_node(&below, &mut members)?;
            members.finish()?;
            NewFile::Own(file)
        }
    };
    let (format, l2_cache_bytes) = if common.driver == "qcow2" {
        let bytes = arguments.optional_int("l2-cache-size")?;
        refuse_others(arguments, "qcow2", &QCOW2_OTHERS)?;
        (Format::Qcow2, bytes.map(|bytes| u64::try_from(bytes).unwrap_or(0)))
    } else {
        refuse_others(arguments, "raw", &RAW_OTHERS)?;
        (Format::Raw, None)
    };
    let (read_only, force_share) = (common.read_only, common.force_share);
    Ok((common.name, NewNode::Disk { format, file, read_only, force_share, l2_cache_bytes }))
}

/// QEMU's rules for names of nodes.
fn check_name(name: &str) -> Taken<()> {
    let well_formed = name.starts_with(|c: char| c.is_ascii_alphabetic())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || "-._".contains(c));
    if !well_formed {
        return Err(CommandError::generic(format!("Invalid node-name: '{name}'")));
    }
    if name.len() > NAME_MAX_BYTES {
        return Err(CommandError::generic("Node name too long"));
    }
    Ok(())
}

fn add(host: &dyn Host, mut arguments: Arguments) -> CommandResult {
    let (name, node) = read_new(host, &mut arguments)?;
    arguments.finish()?;
    let Some(name) = name else {
        return Err(CommandError::generic("'node-name' must be specified for the root node"));
    };
    check_name(&name)?;
    let duplicate = |_| CommandError::generic(format!("Duplicate nodes with node-name='{name}'"));
    let NewNode::Disk { format, file, read_only, force_share, l2_cache_bytes } = node else {
        let NewNode::File(file) = node else { return Ok(json!({})) };
        check_file(&file)?;
        host.nodes().add(&name, file, host.fleece()).map_err(duplicate)?;
        return Ok(json!({}));
    };
    let below_name = match &file {
        NewFile::Node(below) => Some(below.as_str()),
        NewFile::Own(_) => None,
    };
    let opening = host.nodes().begin(&name, below_name, host.fleece()).map_err(duplicate)?;
    let below = match &file {
        NewFile::Own(file) => file.clone(),
        NewFile::Node(below) => match host.nodes().get(below) {
            Some(file) => file,
            None if host.fleece().disk(below).is_ok() => {
                let text = format!("Node '{below}' is a disk: no other node can lie on it");
                return Err(CommandError::generic(text));
            }
            None => {
                let text = format!("Cannot find device='{below}' nor node-name='{below}'");
                return Err(CommandError::generic(text));
            }
        },
    };
    check_file(&below)?;
    let spec = DiskSpec {
        name: Some(name.clone()),
        file: below.filename.clone(),
        format: Some(format),
        read_only: read_only || below.read_only,
        force_share: force_share || below.force_share,
        l2_cache_bytes,
        ..DiskSpec::default()
    };
    let refused = |e| CommandError { class: ErrorClass::GenericError, ..CommandError::from(e) };
    let disk = host.add_disk(&spec).map_err(refused)?;
    opening.done(&disk);
    Ok(json!({}))
}

fn del(host: &dyn Host, mut arguments: Arguments) -> CommandResult {
    let name = arguments.string("node-name")?;
    arguments.finish()?;
    if host.nodes().is_occupied(&name) {
        return Err(CommandError::generic(format!("Block device {name} is in use")));
    }
    match host.nodes().remove(&name, host.fleece()) {
        Ok(true) => return Ok(json!({})),
        Ok(false) => {}
        Err(user) => {
            let hint = format!("disk '{}' lies on it", user.0);
            let e = CommandError::generic(format!("Block device {name} is in use"));
            return Err(CommandError { errno: Some(errno::EBUSY), hint: Some(hint), ..e });
        }
    }
    if host.fleece().disk(&name).is_err() {
        return Err(CommandError::generic(format!("Failed to find node with node-name='{name}'")));
    }
    host.fleece().remove_disk(&name).map_err(|e| match e.errno() {
        errno::EBUSY => CommandError {
            errno: Some(errno::EBUSY),
            hint: Some(e.hint_text().map_or_else(|| e.to_string(), |hint| format!("{e}; {hint}"))),
            ..CommandError::generic(format!("Node {name} is in use"))
        },
        _ => CommandError { class: ErrorClass::GenericError, ..CommandError::from(e) },
    })?;
    Ok(json!({}))
}
