//! Objects: TLS credentials, which `nbd-server-start` names. QEMU's other objects are not there.

use super::Command;
use crate::error::errno;
use crate::qmp::args::{Arguments, not_accepted};
use crate::qmp::exports::{TlsKind, TlsObject};
use crate::qmp::{CommandError, CommandResult, Host};
use serde_json::json;
use std::path::PathBuf;

pub(super) const COMMANDS: &[Command] = &[Command::new("object-add", add), Command::new("object-del", del)];

fn unsupported(what: &str, why: &str) -> CommandError {
    CommandError {
        errno: Some(errno::EOPNOTSUPP),
        ..CommandError::generic(format!("{what} is not supported by fleecefs: {why}"))
    }
}

fn add(host: &dyn Host, mut arguments: Arguments) -> CommandResult {
    let kind = arguments.string("qom-type")?;
    let id = arguments.string("id")?;
    if !["tls-creds-x509", "tls-creds-psk"].contains(&kind.as_str()) {
        return Err(not_accepted("qom-type", &kind));
    }
    let verify_peer = arguments.optional_bool("verify-peer")?.unwrap_or(true);
    let dir = arguments.optional_string("dir")?;
    let endpoint = arguments.optional_choice("endpoint", &["client", "server"])?;
    let priority = arguments.optional_string("priority")?;
    let (mut username, mut password) = (None, None);
    let kind = if kind == "tls-creds-psk" {
        username = arguments.optional_string("username")?;
        TlsKind::Psk
    } else {
        let check = arguments.optional_bool("sanity-check")?.unwrap_or(true);
        password = arguments.optional_string("passwordid")?;
        TlsKind::X509 { verify_peer, check }
    };
    arguments.finish()?;
    if !is_well_formed(&id) {
        return Err(CommandError::generic("Parameter 'id' expects an identifier"));
    }
    if priority.is_some() {
        return Err(unsupported("priority", "TLS 1.3 and 1.2 are spoken with the ciphers of today"));
    }
    if password.is_some() {
        return Err(unsupported("passwordid", "store the key without a password, for the daemon's user alone to read"));
    }
    if endpoint.as_deref() != Some("server") {
        return Err(unsupported("endpoint=client", "it only serves: give endpoint=server"));
    }
    let Some(dir) = dir else {
        return Err(CommandError::generic("Missing 'dir' property value"));
    };
    if username.is_some() {
        return Err(CommandError::generic("username should not be set when endpoint=server"));
    }
    host.exports().add_credentials(&id, &TlsObject { dir: PathBuf::from(dir), kind })?;
    Ok(json!({}))
}

fn del(host: &dyn Host, mut arguments: Arguments) -> CommandResult {
    let id = arguments.string("id")?;
    arguments.finish()?;
    if !host.exports().remove_credentials(&id) {
        return Err(CommandError::generic(format!("object '{id}' not found")));
    }
    Ok(json!({}))
}

/// QEMU's rule for identifiers.
fn is_well_formed(id: &str) -> bool {
    let rest = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
    id.starts_with(|c: char| c.is_ascii_alphabetic()) && id.chars().all(rest)
}
