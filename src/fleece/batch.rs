//! Batches: changes of users' bitmaps, snapshots and holds that happen on all their disks at one instant, or not at all.
//!
//! This file has the plain types; `bitmaps` makes them happen. Names, rules and texts are QEMU's
//! (`block-dirty-bitmap-*`, `transaction`).

use super::frozen::Frozen;
use super::hold::Hold;
use super::snapshot::{Snapshot, SnapshotRequest};
use crate::error::{Error, errno};
use serde::Serialize;
use std::sync::Arc;

/// One step of a batch. Steps see what the steps before them did.
#[derive(Debug, Clone)]
pub enum Action {
    /// Makes a bitmap that is clear.
    Add {
        /// The disk.
        disk: String,
        /// The bitmap's name: 1 to 1023 bytes, unique on its disk.
        name: String,
        /// Bytes per bit: a power of two from 512 B to 2 GiB. None: the clusters of the image, but from 4 KiB to
        /// 64 KiB; 64 KiB where it has none.
        granularity: Option<u64>,
        /// Whether it survives a close and a crash.
        persistent: bool,
        /// Whether it does not record.
        disabled: bool,
    },
    /// Forgets a bitmap, in the image's file too. The name is free when the batch is done, not before.
    Remove(BitmapRef),
    /// Clears all bits.
    Clear(BitmapRef),
    /// Records from now on.
    Enable(BitmapRef),
    /// Records no longer.
    Disable(BitmapRef),
    /// Adds to a bitmap what others have. Granularities may differ, sizes of the disks may not.
    Merge {
        /// The bitmap that gets the bits.
        target: BitmapRef,
        /// Those that keep theirs; the target may be one of them.
        sources: Vec<BitmapRef>,
    },
    /// Holds a bitmap as it is now for a reader, with whose end it may move on; see [`Hold`].
    Hold(BitmapRef),
    /// Holds a bitmap that will not move on; it may be one of an image that is read-only.
    HoldToRead(BitmapRef),
    /// Freezes a disk for a job; see [`Frozen`].
    Freeze {
        /// The disk.
        disk: String,
        /// Whether what the guest writes to from then on is recorded, and how many bytes a bit.
        record: Option<u64>,
    },
    /// Freezes disks. At most one in a batch.
    Snapshot(SnapshotRequest),
    /// Fails.
    Abort,
}

/// A bitmap by its disk and name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct BitmapRef {
    /// The disk.
    pub disk: String,
    /// The bitmap; a checkpoint's has the checkpoint's name.
    pub name: String,
}

impl BitmapRef {
    /// The bitmap `name` of `disk`.
    pub fn new(disk: impl Into<String>, name: impl Into<String>) -> Self {
        BitmapRef { disk: disk.into(), name: name.into() }
    }
}

/// What a batch made.
#[derive(Debug, Default)]
pub struct Applied {
    /// The snapshot, where the batch took one.
    pub snapshot: Option<Arc<Snapshot>>,
    /// The holds, in the order of their steps.
    pub holds: Vec<Hold>,
    /// The views for jobs, in the order of their steps.
    pub frozen: Vec<Frozen>,
}

/// Why a batch did not happen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    /// Which of its steps failed, from 0.
    pub index: usize,
    /// The errno for callers that take only that.
    pub errno: i32,
    /// The text, QEMU's where QEMU refuses too.
    pub text: String,
    /// What the user can do, where there is something.
    pub hint: Option<String>,
}

impl Refused {
    /// What step `index` fails with.
    pub(super) fn new(errno: i32, text: impl Into<String>) -> Self {
        Refused { index: 0, errno, text: text.into(), hint: None }
    }

    pub(super) fn at(self, index: usize) -> Self {
        Refused { index, ..self }
    }

    pub(super) fn unknown_disk(name: &str) -> Self {
        Refused::new(errno::ENOENT, format!("Node '{name}' not found"))
    }

    pub(super) fn unknown_device(name: &str) -> Self {
        Refused::new(errno::ENOENT, format!("Cannot find device='{name}' nor node-name='{name}'"))
    }

    pub(super) fn unknown_bitmap(name: &str) -> Self {
        Refused::new(errno::ENOENT, format!("Dirty bitmap '{name}' not found"))
    }
}

impl From<Error> for Refused {
    fn from(e: Error) -> Self {
        Refused { index: 0, errno: e.errno(), text: e.to_string(), hint: e.hint_text().map(str::to_owned) }
    }
}

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for Refused {}

/// A bitmap as QEMU lists it (`BlockDirtyInfo`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct BitmapInfo {
    /// The name.
    pub name: String,
    /// Set bits times granularity, in bytes. Of a bitmap that is held: as it was when the hold began.
    pub count: u64,
    /// Bytes per bit.
    pub granularity: u64,
    /// Whether writes are marked in it, or in what follows it when its hold ends.
    pub recording: bool,
    /// Whether a hold keeps it from being changed.
    pub busy: bool,
    /// Whether it survives a close and a crash.
    pub persistent: bool,
    /// Whether its bits are lost, so that it can only be removed.
    pub inconsistent: bool,
    /// Whether a checkpoint of the same name owns it: it can be read and merged from, and nothing else.
    pub checkpoint: bool,
}
