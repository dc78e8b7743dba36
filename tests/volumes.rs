//! Volumes, what they hold and which blocks are unused, on disks that the tools of Linux made, against what these tools
//! say themselves.
//!
//! Needs root for loop devices and mounts.

#![cfg(not(feature = "shuttle"))]

mod tools;

#[path = "volumes/contents.rs"]
mod contents;
#[path = "volumes/ext4.rs"]
mod ext4;
#[path = "volumes/lvm.rs"]
mod lvm;
#[path = "volumes/partitions.rs"]
mod partitions;
#[path = "volumes/rig.rs"]
mod rig;
