//! Jobs: work that goes on after the command that began it was answered, in the terms of QEMU's block jobs.
//!
//! [`Jobs`] is the table of all jobs of a daemon. A job has an id, a [`Status`] and a [`Work`], which runs on a thread of
//! its own and sees a [`Handle`]. Jobs that begin together may be grouped: then they complete together or not at all
//! (a transaction with `completion-mode` grouped). A job without a group is a group of its own.
//!
//! Invariants:
//! - **J1 all or none.** [`Work::commit`] of no job of a group is called before all of them ran and prepared well; if
//!   one did not, or was cancelled, or the first commit fails, [`Work::abort`] of each is called. So works of a group that
//!   must stand or fall together do it all in whichever commit is called first. A commit that fails later costs its own
//!   job alone. Each work is ended once, by a commit that succeeds or by abort, when its `run` has returned.
//! - **J2 one thread ends a group.** It is marked as settling before the table's lock is let go for the works' calls, and
//!   no verb is accepted meanwhile. No work is called under the lock.
//! - **J3 what is told is what happened.** A status changes along [`Status::may_become`] only; each change is one event,
//!   told under the lock, so in the order in which it happened. `concluded` is told after commit or abort.
//!
//! QEMU also shows how a job is paused and resumed while nodes are drained: here nothing is, so only pauses that a user
//! asked for, or an error, are told.

mod handle;
mod status;
mod table;
#[cfg(test)]
mod tests;

pub use handle::{Handle, IoStatus};
pub use status::{Status, Verb};
pub use table::{JobInfo, Jobs};

use crate::error::Result;

/// What a job does. Every call comes from one thread at a time, and may do I/O.
pub trait Work: Send {
    /// Does the work. Tells the handle of each step, and returns at once when that gives an error (it was cancelled).
    fn run(&mut self, job: &Handle) -> Result<()>;
    /// The last step that may fail; called when all jobs of the group ran well.
    fn prepare(&mut self) -> Result<()> {
        Ok(())
    }
    /// Makes the result count. Where it fails, `abort` follows.
    fn commit(&mut self) -> Result<()>;
    /// Gives back what the work took, as if it had not been.
    fn abort(&mut self);
}

/// What a job is to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobSpec {
    /// The id: a letter, then letters, digits, `-`, `.` and `_`.
    pub id: String,
    /// QEMU's job type (`backup`).
    pub kind: &'static str,
    /// Bytes per second; 0 for no limit. Not negative.
    pub speed: i64,
    /// Whether it goes on from `pending` by itself.
    pub auto_finalize: bool,
    /// Whether it goes away when it has concluded.
    pub auto_dismiss: bool,
}

/// Why a job was not started, or a verb not accepted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum JobError {
    /// No job has this id.
    NotFound(String),
    /// Anything else, in QEMU's words.
    Refused(String),
}

/// What happened to a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum JobEvent {
    /// The job has another status.
    Status(String, Status),
    /// It waits for `finalize`.
    Pending(JobInfo),
    /// It ended well, or (with an error) not.
    Completed(JobInfo),
    /// It was cancelled, by a user or since another one of its group did not end well.
    Cancelled(JobInfo),
    /// It met an error of I/O.
    Error {
        /// The job.
        id: String,
        /// QEMU's operation: `read` or `write`.
        operation: &'static str,
        /// What it does about it: `report`, `ignore` or `stop`.
        action: &'static str,
    },
}
