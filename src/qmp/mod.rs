//! The control socket: QEMU's machine protocol (QMP), so that existing QMP clients drive a mount.
//!
//! A surface: it decodes a command, calls [`Host`], and replies; no decision is taken here. Layers, top down:
//! [`Server`] (Unix socket, one thread that reads and one that writes per connection), [`session`] (greeting,
//! negotiation, dispatch of one connection), [`commands`] (one file per group of commands), [`args`] (strict argument
//! checking with QEMU's texts), [`codec`] (bytes to JSON values, pure). [`client`] is what the command line uses.
//!
//! [`nodes`] are the block nodes that are no disks, [`exports`] what NBD's commands ask for.
//!
//! Invariants:
//! - Who may command: root and the user that the daemon runs as, by the peer's credentials, whatever the socket's mode.
//! - An event never waits: it is queued for each negotiated connection, and a client that does not read loses its
//!   connection ([`outbox`]), because events come from the path of guest writes.
//! - Commands of one connection run one after another, in order; connections don't wait for each other.

pub mod args;
pub mod client;
pub mod codec;
pub mod commands;
pub mod events;
pub mod exports;
pub mod nodes;
pub mod outbox;
pub mod server;
pub mod session;

pub use client::Client;
pub use events::Events;
pub use exports::ExportHost;
pub use nodes::Nodes;
pub use server::{Listener, Server};

use crate::backup::jobs::Jobs;
use crate::error::{Error, Result, errno};
use crate::fleece::{Action, Applied, Disk, DiskSpec, Fleece, Refused, Snapshot, SnapshotRequest};
use serde_json::{Value, json};
use std::sync::Arc;

/// What the commands act on. The daemon is it, so that this surface knows neither FUSE nor signals.
pub trait Host: Send + Sync {
    /// The core.
    fn fleece(&self) -> &Arc<Fleece>;
    /// Takes a snapshot with everything that belongs to it (write-back of mapped pages first).
    fn create_snapshot(&self, request: &SnapshotRequest) -> Result<Arc<Snapshot>>;
    /// Makes changes of bitmaps and snapshots at one instant, with everything that belongs to a snapshot.
    fn apply(&self, actions: &[Action]) -> std::result::Result<Applied, Refused>;
    /// The jobs.
    fn jobs(&self) -> &Arc<Jobs>;
    /// The file nodes.
    fn nodes(&self) -> &Nodes;
    /// The NBD server of the commands.
    fn exports(&self) -> &dyn ExportHost;
    /// Refuses an image whose files a disk uses, or that lies in the mount itself.
    fn check_image(&self, spec: &DiskSpec) -> Result<()>;
    /// Serves one more image.
    fn add_disk(&self, spec: &DiskSpec) -> Result<Arc<Disk>>;
    /// What `status.json` holds.
    fn status(&self) -> Value;
    /// Asks for a clean end. Returns at once.
    fn quit(&self);
}

/// Error classes of QMP that are in use here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorClass {
    /// Everything without a class of its own.
    GenericError,
    /// No such command, or not in this mode.
    CommandNotFound,
    /// What a `fleecefs-` command names does not exist.
    DeviceNotFound,
    /// No such block job.
    DeviceNotActive,
}

impl ErrorClass {
    fn name(self) -> &'static str {
        match self {
            ErrorClass::GenericError => "GenericError",
            ErrorClass::CommandNotFound => "CommandNotFound",
            ErrorClass::DeviceNotFound => "DeviceNotFound",
            ErrorClass::DeviceNotActive => "DeviceNotActive",
        }
    }
}

/// A command's failure: QMP's class and text. `errno` and `hint` ride along as further members of the error object
/// (clients skip members that they do not know), so that the command line can say what to do and choose its exit code.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CommandError {
    /// QMP's class.
    pub class: ErrorClass,
    /// The text.
    pub desc: String,
    /// Errno, where the failure had one.
    pub errno: Option<i32>,
    /// What the user can do.
    pub hint: Option<String>,
}

impl CommandError {
    /// A failure of class GenericError.
    pub fn generic(desc: impl Into<String>) -> Self {
        CommandError { class: ErrorClass::GenericError, desc: desc.into(), errno: None, hint: None }
    }

    /// A failure of class CommandNotFound.
    pub fn not_found(desc: impl Into<String>) -> Self {
        CommandError { class: ErrorClass::CommandNotFound, ..CommandError::generic(desc) }
    }

    /// The `error` member of a reply.
    pub fn to_json(&self) -> Value {
        let mut object = json!({ "class": self.class.name(), "desc": self.desc });
        if let Some(errno) = self.errno {
            object["errno"] = json!(errno);
        }
        if let Some(hint) = &self.hint {
            object["hint"] = json!(hint);
        }
        object
    }
}

impl From<Error> for CommandError {
    fn from(e: Error) -> Self {
        let class = if e.errno() == errno::ENOENT { ErrorClass::DeviceNotFound } else { ErrorClass::GenericError };
        CommandError { class, desc: e.to_string(), errno: Some(e.errno()), hint: e.hint_text().map(str::to_owned) }
    }
}

impl From<Refused> for CommandError {
    fn from(refused: Refused) -> Self {
        CommandError { errno: Some(refused.errno), hint: refused.hint, ..CommandError::generic(refused.text) }
    }
}

/// What a command gives.
pub type CommandResult = std::result::Result<Value, CommandError>;
