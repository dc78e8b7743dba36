//! NBD: live disks and frozen views for any NBD client, after the NBD project's `doc/proto.md`.
//!
//! A surface like `fuse` and `qmp`: it decodes, calls the core, and replies.

pub mod export;
pub mod transport;
