//! The mount: a tree of files that the core's disks and views are read and written through.
//!
//! ```text
//! adapter   decodes a request of the kernel, calls, replies; the only file besides session that knows fuser
//! tree      names, attributes, directories      files   open, read, write, seek, fallocate
//! inodes    what the kernel holds by number     node    who is who, and the numbers
//! volumes   volumes of live disks and of frozen views
//! control   snapshots, on a thread of their own
//! lane      requests that a slow store may hold up, so that the guest always finds a worker
//! session   mounting, waiting, unmounting
//! ```
//!
//! Everything but [`adapter`] and [`session`] is plain functions over [`Tree`], tested without a mount.
//!
//! Invariants:
//! - **A later process can take over.** Inode numbers are a function of what they name ([`node`]); file handles are 0,
//!   but for what is made at open ([`held`]), and that is made again where a handle is not known.
//! - **No request waits for a request.** A worker never waits for the control thread, nor for what waits for a worker;
//!   see [`control`] for the interleavings that this rules out.
//! - **No request takes a worker down.** Each handler runs inside `catch_unwind`; the reply answers EIO when dropped.

mod adapter;
pub mod attr;
pub mod control;
mod files;
mod held;
mod inodes;
mod lane;
mod maps;
mod metrics;
pub mod node;
pub mod session;
#[cfg(test)]
mod tests;
pub mod tree;
mod volumes;

pub use control::Control;
pub use session::{MountOptions, Mounted, check_mountpoint, mount};
pub use tree::Tree;
