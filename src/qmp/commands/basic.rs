//! What every QMP server has: negotiation, version, the list of commands, status, the end.

use super::{Command, all};
use crate::qmp::args::Arguments;
use crate::qmp::session::{already_negotiated, version};
use crate::qmp::{CommandResult, Host};
use serde_json::{Value, json};

pub(super) const COMMANDS: &[Command] = &[
    // The session answers the first one.
    Command::new("qmp_capabilities", |_, _| Err(already_negotiated())),
    Command::new("query-version", query_version),
    Command::new("query-commands", query_commands),
    Command::new("query-status", query_status),
    Command::new("quit", quit).with_after(|host| host.quit()),
    Command::new("fleecefs-status", fleecefs_status),
];

fn query_version(_: &dyn Host, arguments: Arguments) -> CommandResult {
    arguments.finish()?;
    Ok(version())
}

fn query_commands(_: &dyn Host, arguments: Arguments) -> CommandResult {
    arguments.finish()?;
    let mut names: Vec<&str> = all().map(|command| command.name).collect();
    names.sort_unstable();
    Ok(names.into_iter().map(|name| json!({ "name": name })).collect::<Vec<Value>>().into())
}

fn query_status(_: &dyn Host, arguments: Arguments) -> CommandResult {
    arguments.finish()?;
    Ok(json!({ "running": true, "status": "running" }))
}

fn quit(_: &dyn Host, arguments: Arguments) -> CommandResult {
    arguments.finish()?;
    Ok(json!({}))
}

fn fleecefs_status(host: &dyn Host, arguments: Arguments) -> CommandResult {
    arguments.finish()?;
    Ok(host.status())
}
