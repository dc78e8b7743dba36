//! The commands by name: one file per group, each with its own table, put together in [`GROUPS`].

mod backup;
mod basic;
mod bitmap;
mod checkpoint;
mod disk;
mod export;
mod job;
mod node;
mod object;
mod query;
mod snapshot;
mod transaction;

use super::args::Arguments;
use super::{CommandResult, Host};
use crate::fleece::ConsumerLock;

/// What a connection holds: it goes with it, however that ends.
#[derive(Debug, Default)]
pub struct Held {
    /// The consumers that its client works for.
    pub consumers: Vec<ConsumerLock>,
}

/// How a command acts.
#[derive(Debug, Clone, Copy)]
pub enum Run {
    /// On the host alone.
    Plain(fn(&dyn Host, Arguments) -> CommandResult),
    /// On what the connection holds, too.
    Holding(fn(&dyn Host, &mut Held, Arguments) -> CommandResult),
}

/// One command.
#[derive(Debug)]
pub struct Command {
    /// The name in `execute`.
    pub name: &'static str,
    /// Takes the arguments (all of them, or refuses), acts, and gives the `return` member.
    pub run: Run,
    /// Done once the reply of a successful run is on its way.
    pub after: Option<fn(&dyn Host)>,
}

impl Command {
    const fn new(name: &'static str, run: fn(&dyn Host, Arguments) -> CommandResult) -> Command {
        Command { name, run: Run::Plain(run), after: None }
    }

    const fn holding(name: &'static str, run: fn(&dyn Host, &mut Held, Arguments) -> CommandResult) -> Command {
        Command { name, run: Run::Holding(run), after: None }
    }

    const fn with_after(mut self, after: fn(&dyn Host)) -> Command {
        self.after = Some(after);
        self
    }
}

const GROUPS: &[&[Command]] = &[
    backup::COMMANDS,
    basic::COMMANDS,
    bitmap::COMMANDS,
    checkpoint::COMMANDS,
    disk::COMMANDS,
    export::COMMANDS,
    job::COMMANDS,
    node::COMMANDS,
    object::COMMANDS,
    query::COMMANDS,
    snapshot::COMMANDS,
    transaction::COMMANDS,
];

/// All commands, group by group.
pub fn all() -> impl Iterator<Item = &'static Command> {
    GROUPS.iter().flat_map(|group| group.iter())
}

/// The command of that name.
pub fn find(name: &str) -> Option<&'static Command> {
    all().find(|command| command.name == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique() {
        let mut names: Vec<_> = all().map(|c| c.name).collect();
        names.sort_unstable();
        let count = names.len();
        names.dedup();
        assert_eq!(names.len(), count);
    }
}
