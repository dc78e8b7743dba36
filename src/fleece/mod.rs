//! The core: disks with copy-before-write, frozen views, checkpoints and consumers.
//!
//! A snapshot of a disk pushes a *layer*: a store (a sparse file at the disk's own offsets) and one state a chunk. A
//! *view* is what a user reads: it starts at its layer and looks through every newer one. What must hold, and where:
//!
//! * **I1** one way in for guest mutations, and **I6** mark before write: `disk`
//! * **I2** preserve before overwrite: `disk`, `layer`
//! * **I3** optimistic questions, without locks: `view`
//! * **I4** one copy per overwrite; hidden layers and their folding: `chain`, `fold`
//! * **I5** one instant: `instant`
//! * **I7** errors: `disk` (policy), `store` (space and time), `layer` (broken, lost)
//!
//! Readers of views yield to the guest: `pace`, `balance`.
//!
//! Volumes inside of disks: `scan`, `volumes`; who learns that a table was changed: `watch`.
//!
//! Tracking (bitmaps, checkpoints, what survives which crash): `tracking`, `regions`, `disarm`, `found`, `recover`, `close`,
//! `transaction`, `checkpoints`; who else writes: `foreign`; what is no longer known: `lost`. Users' bitmaps: `batch`,
//! `bitmaps`, `plan`, `work`, `hold`, `users`. What a job reads: `frozen`; what others are shown: `shown`.

mod balance;
mod batch;
mod bitmaps;
mod carry;
mod chain;
mod checkpoints;
mod close;
mod counters;
mod disarm;
mod disk;
mod events;
#[allow(clippy::module_inception, reason = "the type that the module is named after")]
mod fleece;
mod fold;
mod foreign;
mod found;
mod frozen;
mod hold;
mod info;
mod instant;
mod keep;
mod layer;
mod lost;
mod map;
mod notes;
mod pace;
mod persistent;
mod place;
mod plan;
mod preserve;
mod recover;
mod regions;
mod scan;
mod shown;
mod skip;
mod snapshot;
mod store;
mod stripes;
mod tracking;
mod transaction;
mod users;
mod view;
mod volume_info;
mod volumes;
mod watch;
mod work;
mod zeros;

pub use crate::bitmap::{Consistency, HookNote, Notes};
pub use batch::{Action, Applied, BitmapInfo, BitmapRef, Refused};
pub use carry::{CarriedInfo, IMPORT_PREFIX};
pub use checkpoints::ConsumerLock;
pub use counters::Counter;
pub use disk::Disk;
pub use events::Event;
pub use fleece::Fleece;
pub use frozen::Frozen;
pub use hold::{Hold, HoldEnd, KeptDisk};
pub use info::{
    CheckpointDisk, CheckpointInfo, ConsumerInfo, DiskInfo, SkippedInfo, SnapshotDisk, SnapshotInfo, TrackingLoss,
};
pub use map::{Changes, ViewMap};
pub use place::{Environment, Place, state_dir};
pub use scan::{FrozenVolumes, LiveVolumes};
pub use shown::{BitmapState, ShownBitmap};
pub use skip::Skip;
pub use snapshot::{Snapshot, SnapshotRequest};
pub use view::{Point, View};
pub use volume_info::{ContentInfo, DiskContent, PlaceInfo, SegmentInfo, VolumeInfo};
pub use volumes::{FrozenVolume, LiveVolume};
pub use zeros::ZeroCursor;

use crate::image::{Cache, Format};
use crate::units::DEFAULT_CHUNK;
use std::path::PathBuf;
use std::time::Duration;

/// What happens when old content cannot be kept (QEMU's `on-cbw-error`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum StoreErrorPolicy {
    /// The guest goes on; the views of the disk are broken and answer EIO.
    #[default]
    BreakSnapshot,
    /// The guest's write fails; the views stay right.
    FailWrite,
}

/// What is believed after a stop of a disk on a block device, where a foreign writer leaves no trace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum BlockDevicePolicy {
    /// Nothing: everything counts as changed since the newest checkpoint.
    #[default]
    Distrust,
    /// That nobody else wrote: a clean stop, and a kill in the same boot, are exact.
    Trust,
}

/// What happens when a change cannot be recorded so that a power loss does not undo that.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TrackingErrorPolicy {
    /// The guest goes on; tracking is lost, and the image bears a note that it is.
    #[default]
    Continue,
    /// The guest's write fails; tracking stays right.
    FailWrite,
}

/// Percent of its speed that a guest keeps at least while views are read, where nothing else is asked for.
pub const DEFAULT_GUEST_SHARE: u8 = 50;
/// Most that can be asked for: readers get on.
pub const MAX_GUEST_SHARE: u8 = 95;

/// The options of a mount.
#[derive(Debug, Clone)]
pub struct Options {
    /// Copy unit of new layers in bytes: a power of two from 4 KiB to 1 MiB.
    pub chunk: u64,
    /// What happens when old content cannot be kept.
    pub on_store_error: StoreErrorPolicy,
    /// How long a call on the store directory may take before it counts as failed.
    pub store_timeout: Duration,
    /// How many short guest writes may make a call on a store in their own thread at a time: as many threads may come to
    /// hang there. The others use threads kept for that.
    pub store_calls_here: usize,
    /// Most bytes in all stores of the mount; None: a store leaves the larger of 5 % and 1 GiB of its file system free.
    pub store_limit: Option<u64>,
    /// Where disks' state goes instead of beside their images.
    pub state_dir: Option<PathBuf>,
    /// Where stores go instead of the state directory.
    pub store_dir: Option<PathBuf>,
    /// Whether views survive a clean stop.
    pub keep_snapshots: bool,
    /// What happens when a change cannot be recorded.
    pub on_tracking_error: TrackingErrorPolicy,
    /// What is believed of disks on block devices, unless the disk's own option says otherwise.
    pub block_devices: BlockDevicePolicy,
    /// Whether qcow2 images are left without our mark, unless the disk's own option says otherwise.
    pub no_mark: bool,
    /// Most checkpoints a disk; the oldest that nobody needs are merged away.
    pub keep_checkpoints: usize,
    /// How the host's page cache is used for images.
    pub cache: Cache,
    /// Percent of its speed that a guest keeps at least while views are read, 0 to 95. 0: readers never wait.
    pub guest_share: u8,
    /// Whether volumes of live disks can be written to.
    pub writable_volumes: bool,
    /// What the views of snapshots leave out, unless the snapshot's own request says otherwise.
    pub skip: Skip,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            chunk: DEFAULT_CHUNK,
            on_store_error: StoreErrorPolicy::default(),
            store_timeout: Duration::from_secs(10),
            store_calls_here: 4,
            store_limit: None,
            state_dir: None,
            store_dir: None,
            keep_snapshots: false,
            on_tracking_error: TrackingErrorPolicy::default(),
            block_devices: BlockDevicePolicy::default(),
            no_mark: false,
            keep_checkpoints: 1000,
            cache: Cache::default(),
            guest_share: DEFAULT_GUEST_SHARE,
            writable_volumes: false,
            skip: Skip::default(),
        }
    }
}

/// A disk to serve.
#[derive(Debug, Clone, Default)]
pub struct DiskSpec {
    /// The name; None: the file's stem.
    pub name: Option<String>,
    /// The image file or block device.
    pub file: PathBuf,
    /// The image's format; None: found out.
    pub format: Option<Format>,
    /// Whether guest writes are refused.
    pub read_only: bool,
    /// The internal snapshot to serve instead of the disk as it is, by ID or name; guest writes are refused.
    pub snapshot: Option<String>,
    /// Whether others may write to the image meanwhile; of a disk that is read-only. Such a disk is never frozen.
    pub force_share: bool,
    /// Most memory for the mapping tables of each qcow2 image; None: the default.
    pub l2_cache_bytes: Option<u64>,
    /// What is believed where it is on a block device; None: as the mount says.
    pub block_devices: Option<BlockDevicePolicy>,
    /// Whether a qcow2 image is left without our mark; None: as the mount says.
    pub no_mark: Option<bool>,
}

impl DiskSpec {
    /// Whether guest writes are refused.
    pub fn is_read_only(&self) -> bool {
        self.read_only || self.snapshot.is_some()
    }
}

/// The point that a snapshot's map is to count from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Since {
    /// A checkpoint by name.
    Checkpoint(String),
    /// The last checkpoint that a consumer finished.
    Consumer(String),
}
