//! `transaction`: several actions at one instant, or none of them.

use super::backup::{self, Step};
use super::bitmap::{add, clear, disable, enable, merge, remove};
use super::{Command, snapshot};
use crate::fleece::Action;
use crate::qmp::args::{Arguments, not_accepted};
use crate::qmp::{CommandError, CommandResult, Host};

pub(super) const COMMANDS: &[Command] = &[Command::new("transaction", transaction)];

type Read = fn(&mut Arguments) -> Result<Step, CommandError>;

/// What `transaction` knows, by QEMU's names, with how the data of each are read.
const ACTIONS: &[(&str, Read)] = &[
    ("abort", |_| Ok(Step::Other(Action::Abort))),
    ("block-dirty-bitmap-add", |data| add(data).map(Step::Other)),
    ("block-dirty-bitmap-remove", |data| remove(data).map(Step::Other)),
    ("block-dirty-bitmap-clear", |data| clear(data).map(Step::Other)),
    ("block-dirty-bitmap-enable", |data| enable(data).map(Step::Other)),
    ("block-dirty-bitmap-disable", |data| disable(data).map(Step::Other)),
    ("block-dirty-bitmap-merge", |data| merge(data).map(Step::Other)),
    ("fleecefs-snapshot-create", |data| Ok(Step::Other(Action::Snapshot(snapshot::request(data)?)))),
    ("blockdev-backup", |data| backup::blockdev(data).map(Step::Backup)),
    ("drive-backup", |data| backup::drive(data).map(Step::Backup)),
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
    let grouped = mode.as_deref() == Some("grouped");
    let other = actions.iter().find(|(_, step)| matches!(step, Step::Other(_)));
    if let (true, Some((name, _))) = (grouped, other) {
        let text = format!("Action '{name}' does not support transaction property completion-mode = grouped");
        return Err(CommandError::generic(text));
    }
    backup::begin(host, actions.into_iter().map(|(_, step)| step).collect(), grouped)
}

fn action(mut members: Arguments) -> Result<(&'static str, Step), CommandError> {
    let kind = members.string("type")?;
    let (name, read) = ACTIONS.iter().find(|(name, _)| *name == kind).ok_or_else(|| not_accepted("type", &kind))?;
    let mut data = members.object("data")?;
    let action = read(&mut data)?;
    data.finish()?;
    members.finish()?;
    Ok((name, action))
}
