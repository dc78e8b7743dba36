//! Dirty bitmaps: each change is an action that `transaction` has too.

use super::Command;
use crate::fleece::{Action, BitmapRef};
use crate::qmp::args::{Alternate, Arguments};
use crate::qmp::{CommandError, CommandResult, Host};
use serde_json::json;

pub(super) const COMMANDS: &[Command] = &[
    Command::new("block-dirty-bitmap-add", |host, arguments| alone(host, arguments, add)),
    Command::new("block-dirty-bitmap-remove", |host, arguments| alone(host, arguments, remove)),
    Command::new("block-dirty-bitmap-clear", |host, arguments| alone(host, arguments, clear)),
    Command::new("block-dirty-bitmap-enable", |host, arguments| alone(host, arguments, enable)),
    Command::new("block-dirty-bitmap-disable", |host, arguments| alone(host, arguments, disable)),
    Command::new("block-dirty-bitmap-merge", |host, arguments| alone(host, arguments, merge)),
    Command::new("x-debug-block-dirty-bitmap-sha256", sha256),
];

type Taken<T> = std::result::Result<T, CommandError>;
/// Takes the members of an action, all but [`Arguments::finish`].
type Read = fn(&mut Arguments) -> Taken<Action>;

pub(super) fn add(arguments: &mut Arguments) -> Taken<Action> {
    Ok(Action::Add {
        disk: arguments.string("node")?,
        name: arguments.string("name")?,
        granularity: arguments.optional_uint32("granularity")?.map(u64::from),
        persistent: arguments.optional_bool("persistent")?.unwrap_or(false),
        disabled: arguments.optional_bool("disabled")?.unwrap_or(false),
    })
}

fn bitmap(arguments: &mut Arguments) -> Taken<BitmapRef> {
    Ok(BitmapRef { disk: arguments.string("node")?, name: arguments.string("name")? })
}

pub(super) fn remove(arguments: &mut Arguments) -> Taken<Action> {
    Ok(Action::Remove(bitmap(arguments)?))
}

pub(super) fn clear(arguments: &mut Arguments) -> Taken<Action> {
    Ok(Action::Clear(bitmap(arguments)?))
}

pub(super) fn enable(arguments: &mut Arguments) -> Taken<Action> {
    Ok(Action::Enable(bitmap(arguments)?))
}

pub(super) fn disable(arguments: &mut Arguments) -> Taken<Action> {
    Ok(Action::Disable(bitmap(arguments)?))
}

pub(super) fn merge(arguments: &mut Arguments) -> Taken<Action> {
    let target = BitmapRef { disk: arguments.string("node")?, name: arguments.string("target")? };
    let sources = arguments.alternates("bitmaps", "BlockDirtyBitmapOrStr", |source| match source {
        Alternate::String(name) => Ok(BitmapRef::new(&target.disk, name)),
        Alternate::Object(mut members) => {
            let source = bitmap(&mut members)?;
            members.finish()?;
            Ok(source)
        }
    })?;
    Ok(Action::Merge { target, sources })
}

fn alone(host: &dyn Host, mut arguments: Arguments, read: Read) -> CommandResult {
    let action = read(&mut arguments)?;
    arguments.finish()?;
    host.apply(&[action])?;
    Ok(json!({}))
}

fn sha256(host: &dyn Host, mut arguments: Arguments) -> CommandResult {
    let bitmap = bitmap(&mut arguments)?;
    arguments.finish()?;
    Ok(json!({ "sha256": host.fleece().bitmap_sha256(&bitmap)? }))
}
