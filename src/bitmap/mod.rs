//! Dirty bitmaps: which parts of a disk changed, and the file that remembers it.
//!
//! [`bits`] are plain bits that many threads set without a lock, under a summary of where some and all are set;
//! `put` sets them by groups; [`dirty`] puts bytes of a disk to them, `scale` one granularity to another; [`sidecar`]
//! is the crash-safe file in which they, and everything known about checkpoints, consumers and layers, survive.

pub mod bits;
pub mod dirty;
mod put;
mod scale;
pub mod sidecar;
mod summary;

pub use bits::Bits;
pub use dirty::DirtyBitmap;
pub use sidecar::layout::{AREA_MAX_BYTES, INTENT_REGIONS};
pub use sidecar::{
    Area, BitmapEntry, CheckpointEntry, CheckpointState, Consistency, ConsumerEntry, Directory, HEARTBEAT_NS, HookNote,
    InImage, LayerEntry, Loss, Notes, Prepared, PreparedAction, RegionBits, Sidecar, SkippedEntry, SnapshotEntry,
    State, Superblock, UserBitmap, UserBitmapState, region_size_for,
};
