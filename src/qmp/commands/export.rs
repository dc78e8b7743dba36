//! NBD: the server and its exports, by QEMU's commands.

use super::Command;
use crate::error::errno;
use crate::fleece::BitmapRef;
use crate::qmp::args::{Alternate, Arguments, not_accepted};
use crate::qmp::exports::{ExportBitmap, ExportRequest, ServerAddress, ServerRequest};
use crate::qmp::{CommandError, CommandResult, Host};
use serde_json::{Value, json};
use std::path::PathBuf;

pub(super) const COMMANDS: &[Command] = &[
    Command::new("nbd-server-start", start),
    Command::new("nbd-server-stop", stop),
    Command::new("nbd-server-add", add_by_device),
    Command::new("nbd-server-remove", remove_by_name),
    Command::new("block-export-add", add),
    Command::new("block-export-del", del),
    Command::new("query-block-exports", query),
];

type Taken<T> = std::result::Result<T, CommandError>;

/// QEMU's default of `max-connections` and `handshake-max-seconds`.
const CONNECTIONS: u32 = 100;
const HANDSHAKE_SECONDS: u32 = 10;
/// Types of exports that QEMU has.
const TYPES: [&str; 4] = ["nbd", "vhost-user-blk", "fuse", "vduse-blk"];

fn unsupported(what: &str, why: &str) -> CommandError {
    CommandError {
        errno: Some(errno::EOPNOTSUPP),
        ..CommandError::generic(format!("{what} is not supported by fleecefs: {why}"))
    }
}

fn start(host: &dyn Host, mut arguments: Arguments) -> CommandResult {
    let handshake_seconds = arguments.optional_uint32("handshake-max-seconds")?.unwrap_or(HANDSHAKE_SECONDS);
    let tls_creds = arguments.optional_string("tls-creds")?;
    let tls_authz = arguments.optional_string("tls-authz")?;
    let max_connections = arguments.optional_uint32("max-connections")?.unwrap_or(CONNECTIONS);
    let mut addr = arguments.object("addr")?;
    let address = address(&mut addr)?;
    addr.finish()?;
    arguments.finish()?;
    if tls_authz.is_some() {
        return Err(unsupported("tls-authz", "whoever the credentials let in may use all exports"));
    }
    host.exports().start(&ServerRequest { address, handshake_seconds, tls_creds, max_connections })?;
    Ok(json!({}))
}

/// QEMU's SocketAddressLegacy.
fn address(addr: &mut Arguments) -> Taken<ServerAddress> {
    let kind = addr.string("type")?;
    if !["inet", "unix", "vsock", "fd"].contains(&kind.as_str()) {
        return Err(not_accepted("type", &kind));
    }
    let mut data = addr.object("data")?;
    let address = match kind.as_str() {
        "unix" => unix(&mut data)?,
        "inet" => inet(&mut data)?,
        _ => return Err(unsupported(&format!("addr.type={kind}"), "it listens on Unix sockets and TCP")),
    };
    data.finish()?;
    Ok(address)
}

fn unix(data: &mut Arguments) -> Taken<ServerAddress> {
    let path = PathBuf::from(data.string("path")?);
    if data.optional_bool("abstract")? == Some(true) {
        return Err(unsupported("addr.data.abstract", "a socket has a path, whose permissions say who may connect"));
    }
    data.optional_bool("tight")?;
    Ok(ServerAddress::Unix(path))
}

fn inet(data: &mut Arguments) -> Taken<ServerAddress> {
    let host = data.string("host")?;
    let port = data.string("port")?;
    data.optional_bool("numeric")?;
    if data.optional_uint("to")?.is_some() {
        return Err(unsupported("addr.data.to", "give the port"));
    }
    let families = [data.optional_bool("ipv4")?, data.optional_bool("ipv6")?];
    if families.contains(&Some(false)) {
        return Err(unsupported("addr.data.ipv4=off or ipv6=off", "give an address of the family as the host"));
    }
    data.optional_bool("keep-alive")?;
    if data.optional_bool("mptcp")? == Some(true) {
        return Err(unsupported("addr.data.mptcp", "TCP alone"));
    }
    let number = port.parse::<u16>().map_err(|_| {
        CommandError::generic(format!("address resolution failed for {host}:{port}: the port is no number up to 65535"))
    })?;
    Ok(ServerAddress::Tcp { host, port: number })
}

fn stop(host: &dyn Host, arguments: Arguments) -> CommandResult {
    arguments.finish()?;
    host.exports().stop()?;
    Ok(json!({}))
}

fn add(host: &dyn Host, mut arguments: Arguments) -> CommandResult {
    let kind = arguments.string("type")?;
    if !TYPES.contains(&kind.as_str()) {
        return Err(not_accepted("type", &kind));
    }
    let id = arguments.string("id")?;
    arguments.optional_bool("fixed-iothread")?;
    let iothread = arguments.optional_string("iothread")?;
    let node = arguments.string("node-name")?;
    let writable = arguments.optional_bool("writable")?.unwrap_or(false);
    let writethrough = arguments.optional_bool("writethrough")?.unwrap_or(false);
    // Nodes are active.
    arguments.optional_bool("allow-inactive")?;
    if kind != "nbd" {
        return Err(CommandError::generic("No driver found for the requested export type"));
    }
    let name = arguments.optional_string("name")?;
    let description = arguments.optional_string("description")?;
    let bitmaps = if arguments.has("bitmaps") { bitmaps(&mut arguments)? } else { Vec::new() };
    let allocation_depth = arguments.optional_bool("allocation-depth")?.unwrap_or(false);
    arguments.finish()?;
    if !is_well_formed(&id) {
        return Err(CommandError::generic("Invalid block export id"));
    }
    if let Some(iothread) = iothread {
        return Err(CommandError::generic(format!("iothread \"{iothread}\" not found")));
    }
    let request = ExportRequest {
        id,
        node,
        name,
        description,
        writable,
        downgrade: false,
        writethrough,
        bitmaps,
        allocation_depth,
    };
    add_request(host, &request)
}

fn bitmaps(arguments: &mut Arguments) -> Taken<Vec<ExportBitmap>> {
    arguments.alternates("bitmaps", "BlockDirtyBitmapOrStr", |bitmap| match bitmap {
        Alternate::String(name) => Ok(ExportBitmap::Own(name)),
        Alternate::Object(mut members) => {
            let of = BitmapRef { disk: members.string("node")?, name: members.string("name")? };
            members.finish()?;
            Ok(ExportBitmap::Of(of))
        }
    })
}

/// QEMU's rule for identities (`id_wellformed`).
fn is_well_formed(id: &str) -> bool {
    id.starts_with(|c: char| c.is_ascii_alphabetic())
        && id.chars().all(|c| c.is_ascii_alphanumeric() || "-._".contains(c))
}

fn add_request(host: &dyn Host, request: &ExportRequest) -> CommandResult {
    if host.nodes().get(&request.node).is_some() {
        let why = "disks and frozen views can be exported, what lies below them cannot";
        return Err(unsupported(&format!("An export of file node '{}'", request.node), why));
    }
    host.exports().add(request)?;
    Ok(json!({}))
}

/// `nbd-server-add`: the export's name is its identity, too.
fn add_by_device(host: &dyn Host, mut arguments: Arguments) -> CommandResult {
    let name = arguments.optional_string("name")?;
    let description = arguments.optional_string("description")?;
    let node = arguments.string("device")?;
    let writable = arguments.optional_bool("writable")?.unwrap_or(false);
    let bitmap = arguments.optional_string("bitmap")?;
    arguments.finish()?;
    // The name of a view is no identity in QEMU, where no node has such a name.
    if let Some(name) = name.as_ref().filter(|name| **name != node && !is_well_formed(name)) {
        log::debug!("nbd-server-add: '{}' is no identity", name.escape_debug());
        return Err(CommandError::generic("Invalid block export id"));
    }
    let id = name.clone().unwrap_or_else(|| node.clone());
    let request = ExportRequest {
        id,
        name,
        description,
        writable,
        downgrade: true,
        writethrough: false,
        bitmaps: bitmap.map(ExportBitmap::Own).into_iter().collect(),
        allocation_depth: false,
        node,
    };
    add_request(host, &request).map_err(|e| {
        // QEMU looks for a device first here.
        let missing = |device: &str| format!("Cannot find device='{device}' nor node-name='{}'", request.node);
        if e.desc == missing("") { CommandError { desc: missing(&request.node), ..e } } else { e }
    })
}

fn mode(arguments: &mut Arguments) -> Taken<bool> {
    Ok(arguments.optional_choice("mode", &["safe", "hard"])?.as_deref() == Some("hard"))
}

fn del(host: &dyn Host, mut arguments: Arguments) -> CommandResult {
    let id = arguments.string("id")?;
    let hard = mode(&mut arguments)?;
    arguments.finish()?;
    host.exports().remove(&id, hard)?;
    Ok(json!({}))
}

fn remove_by_name(host: &dyn Host, mut arguments: Arguments) -> CommandResult {
    let name = arguments.string("name")?;
    let hard = mode(&mut arguments)?;
    arguments.finish()?;
    host.exports().remove(&name, hard)?;
    Ok(json!({}))
}

fn query(host: &dyn Host, arguments: Arguments) -> CommandResult {
    arguments.finish()?;
    let row = |row: crate::qmp::exports::ExportRow| json!({ "id": row.id, "type": "nbd", "node-name": row.node, "shutting-down": row.shutting_down });
    Ok(host.exports().list().into_iter().map(row).collect::<Vec<Value>>().into())
}
