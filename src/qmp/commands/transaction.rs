//! `transaction`: several actions at one instant, or none of them.

use super::bitmap::{Read, add, clear, disable, enable, merge, remove};
use super::{Command, snapshot};
use crate::fleece::Action;
use crate::qmp::args::{Arguments, not_accepted};
use crate::qmp::{CommandError, CommandResult, Host};
use serde_json::json;

pub(super) const COMMANDS: &[Command] = &[Command::new("transaction", transaction)];

/// What `transaction` knows, by QEMU's names, with how the data of each are read.
const ACTIONS: &[(&str, Read)] = &[
    ("abort", |_| Ok(Action::Abort)),
    ("block-dirty-bitmap-add", add),
    ("block-dirty-bitmap-remove", remove),
    ("block-dirty-bitmap-clear", clear),
    ("block-dirty-bitmap-enable", enable),
    ("block-dirty-bitmap-disable", disable),
    ("block-dirty-bitmap-merge", merge),
    ("fleecefs-snapshot-create", |data| Ok(Action::Snapshot(snapshot::request(data)?))),
    ("blockdev-backup", |_| {
        Err(CommandError::generic("Action 'blockdev-backup' is not available in this version of fleecefs"))
    }),
];

fn transaction(host: &dyn Host, mut arguments: Arguments) -> CommandResult {
    let actions = arguments.objects("actions", action)?;
    let mode = match arguments.optional_object("properties")? {
        None => None,
        Some(mut properties) => {
            let mode = properties.optional_choice("completion-mode", &["individual", "grouped"])?;
            properties.finish()?;
            mode
        }
    };
    arguments.finish()?;
    let (names, actions): (Vec<&str>, Vec<Action>) = actions.into_iter().unzip();
    if mode.as_deref() == Some("grouped")
        && let Some(name) = names.first()
    {
        let text = format!("Action '{name}' does not support transaction property completion-mode = grouped");
        return Err(CommandError::generic(text));
    }
    if !actions.is_empty() {
        host.apply(&actions)?;
    }
    Ok(json!({}))
}

fn action(mut members: Arguments) -> Result<(&'static str, Action), CommandError> {
    let kind = members.string("type")?;
    let (name, read) = ACTIONS.iter().find(|(name, _)| *name == kind).ok_or_else(|| not_accepted("type", &kind))?;
    let mut data = members.object("data")?;
    let action = read(&mut data)?;
    data.finish()?;
    members.finish()?;
    Ok((name, action))
}
