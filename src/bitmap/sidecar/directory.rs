//! The directory: everything that is known about a disk's checkpoints, bitmaps, consumers and layers.
//!
//! It is written as JSON: fields that this version does not know are passed over, and a version that would be
//! misunderstood that way raises the version (or a feature bit) of the superblock.

use super::areas::Area;
use super::layout::{DIRECTORY_HEADER_BYTES, DIRECTORY_MAGIC, DIRECTORY_TEXT_MAX_BYTES, PAGE, get_u32, get_u64, put};
use super::slots::Found;
use crate::bitmap::bits::Bits;
use crate::bitmap::dirty::DirtyBitmap;
use crate::error::{Error, Result, errno};
use crate::storage::Storage;
use crate::units::human_size;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::PathBuf;
use uuid::Uuid;

/// All that is known about one disk. One truth: whatever else says the same is derived from it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Directory {
    /// The disk that the file belongs to for life.
    pub disk: Uuid,
    /// What other mounts called it, from which checkpoints were imported.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub identities: Vec<Uuid>,
    /// Size of the disk in bytes.
    pub size: u64,
    /// Oldest first; the last one records.
    pub checkpoints: Vec<CheckpointEntry>,
    /// Bitmaps of users; one a name, oldest first.
    pub bitmaps: Vec<UserBitmap>,
    /// What the image itself keeps for us, where its format can.
    #[serde(default)]
    pub in_image: InImage,
    /// When changes were last found not to be known.
    #[serde(default)]
    pub lost: Option<Loss>,
    /// In no particular order; one a name.
    pub consumers: Vec<ConsumerEntry>,
    /// Oldest first.
    pub layers: Vec<LayerEntry>,
    /// A change of several disks that is not decided yet.
    pub prepared: Option<Prepared>,
    /// The last 16 transactions that this disk coordinated and decided for.
    pub committed: Vec<Uuid>,
    /// Number of the next layer.
    pub next_layer: u64,
}

/// A named instant from which changes are known.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointEntry {
    /// Identity; the name may come back, this does not.
    pub uuid: Uuid,
    /// The user's name for it.
    pub name: String,
    /// The instant, nanoseconds since the epoch.
    pub time_ns: i64,
    /// Whether the snapshot that made it was read to its end.
    pub completed: bool,
    /// What changed from here to the next checkpoint.
    pub bitmap: BitmapEntry,
    /// What its bitmap is doing.
    pub state: CheckpointState,
}

/// What the bitmap of a checkpoint is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CheckpointState {
    /// Writes are marked in it.
    Recording,
    /// It does not change any more.
    Sealed,
    /// It is being merged into the one before it.
    Deleting,
}

/// Where the bits of one bitmap are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BitmapEntry {
    /// Identity.
    pub uuid: Uuid,
    /// Bytes per bit.
    pub granularity: u64,
    /// Bytes of the disk that it covers; what lies behind them counts as dirty.
    pub size: u64,
    /// The bits; None while there are none in the file.
    pub area: Option<Area>,
    /// crc32c of the whole area, once its content is final.
    pub crc: Option<u32>,
    /// Why everything counts as dirty, if it does.
    pub everything: Option<String>,
    /// Bytes that the bits mark, as counted when they were saved.
    #[serde(default)]
    pub dirty: u64,
}

/// A bitmap that a user made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UserBitmap {
    /// The user's name for it.
    pub name: String,
    /// What it is doing.
    pub state: UserBitmapState,
    /// Where its bits are: beside the recording ones in memory, in an area, or else in the image.
    pub bitmap: BitmapEntry,
    /// Whether it survives a close and a crash.
    #[serde(default = "yes")]
    pub persistent: bool,
    /// It came with an image that is open for reading only: its bits cannot be changed.
    #[serde(default)]
    pub read_only: bool,
    /// When it was made, nanoseconds since the epoch; 0 where that is not known.
    #[serde(default)]
    pub time_ns: i64,
}

fn yes() -> bool {
    true
}

/// What a user's bitmap is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum UserBitmapState {
    /// Writes are marked in it.
    Recording,
    /// It does not change.
    Disabled,
    /// Its bits are lost; it can only be removed.
    Inconsistent,
}

/// What an image keeps for us.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct InImage {
    /// The mark that the image may bear instead of the session's: since a clean close, and until the next session has
    /// begun.
    pub mark: Option<Uuid>,
    /// What then told a change of what lies below the image.
    pub backing: Option<String>,
    /// Names under which bitmaps of checkpoints may be in the image.
    pub checkpoints: Vec<String>,
}

/// Changes stopped being known.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Loss {
    /// Why.
    pub reason: String,
    /// When, nanoseconds since the epoch.
    pub time_ns: i64,
}

/// A named reader of changes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsumerEntry {
    /// The user's name for it.
    pub name: String,
    /// The last checkpoint that it finished.
    pub checkpoint: Uuid,
    /// The one before, to roll back to.
    pub previous: Option<Uuid>,
}

/// A layer: what was overwritten since an instant, kept in a store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerEntry {
    /// Identity.
    pub uuid: Uuid,
    /// Its number: later layers have higher ones.
    pub seq: u64,
    /// Size of the disk at that instant in bytes.
    pub size: u64,
    /// Copy unit in bytes.
    pub chunk: u64,
    /// The store file.
    pub store: PathBuf,
    /// The view that users see, unless it is hidden.
    pub snapshot: Option<SnapshotEntry>,
}

/// The part of a snapshot that belongs to one disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotEntry {
    /// Identity, the same on all disks of the snapshot.
    pub uuid: Uuid,
    /// The user's name for it.
    pub name: String,
    /// The instant, nanoseconds since the epoch.
    pub time_ns: i64,
    /// The checkpoint that it made.
    pub checkpoint: Uuid,
    /// The checkpoint that its map counts from.
    pub reference: Option<Uuid>,
    /// Why its map says that everything is dirty, if it does.
    pub full_reason: Option<String>,
    /// What its maker says of it.
    #[serde(default)]
    pub notes: Notes,
    /// What its view leaves out, if anything.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub skipped: Option<SkippedEntry>,
}

/// What a view leaves out; the list of it lies beside the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SkippedEntry {
    /// `swap`, `free`: what there was of that.
    pub kinds: Vec<String>,
    /// Bytes of the disk.
    pub bytes: u64,
    /// crc32c of the list.
    pub crc: u32,
}

/// What the maker of a snapshot says of it: nothing here is found out by us.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Notes {
    /// What a restored disk finds.
    pub consistency: Consistency,
    /// What was run around the instant, in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub hooks: Vec<HookNote>,
}

/// What a restored disk finds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Consistency {
    /// What a guest finds after a loss of power: journals are replayed.
    #[default]
    Crash,
    /// File systems that were frozen at the instant.
    Filesystem,
}

/// Something that was run around the instant of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HookNote {
    /// The command of a hook, or the guest that was frozen.
    pub command: String,
    /// `pre`, `freeze`, `thaw`, `post` or `failed`.
    pub phase: String,
    /// Its exit code, 128 + N where signal N ended it; of a freeze or a thaw 0 or 1.
    pub exit: i32,
    /// How long it took, in milliseconds.
    pub ms: u64,
    /// What went wrong, in words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// One disk's part in a change of several disks, until the coordinator's directory tells whether it happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Prepared {
    /// Identity of the change.
    pub transaction: Uuid,
    /// The disk whose `committed` decides.
    pub coordinator: Uuid,
    /// All disks that take part.
    pub disks: Vec<Uuid>,
    /// What is to happen here.
    pub action: PreparedAction,
}

/// What a change of several disks does to one of them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(clippy::large_enum_variant, reason = "at most one exists per disk")]
pub enum PreparedAction {
    /// A snapshot: a new layer and a new checkpoint.
    Snapshot {
        /// The layer.
        layer: LayerEntry,
        /// The checkpoint.
        checkpoint: CheckpointEntry,
        /// The users' bitmaps as they are to be, where the batch that it belongs to changes them.
        #[serde(default)]
        bitmaps: Option<Vec<UserBitmap>>,
    },
    /// The users' bitmaps change.
    Bitmaps {
        /// All of them as they are to be.
        bitmaps: Vec<UserBitmap>,
    },
    /// A snapshot ends well: its view goes, its checkpoint counts as completed.
    Complete {
        /// The checkpoint.
        checkpoint: Uuid,
        /// The consumer that moves to it.
        consumer: Option<ConsumerEntry>,
    },
    /// A snapshot ends without success: its view goes.
    Cancel {
        /// The checkpoint.
        checkpoint: Uuid,
    },
    /// A consumer moves.
    Consumer {
        /// Where to.
        entry: ConsumerEntry,
    },
}

impl Directory {
    /// The directory of a disk about which nothing is known yet.
    pub fn new(disk: Uuid, size: u64) -> Self {
        Directory {
            disk,
            identities: Vec::new(),
            size,
            checkpoints: Vec::new(),
            bitmaps: Vec::new(),
            in_image: InImage::default(),
            lost: None,
            consumers: Vec::new(),
            layers: Vec::new(),
            prepared: None,
            committed: Vec::new(),
            next_layer: 0,
        }
    }

    /// Every bitmap: the checkpoints', the users', and those of a prepared change.
    pub fn all_bitmaps(&self) -> impl Iterator<Item = &BitmapEntry> {
        let (prepared, users) = match &self.prepared {
            Some(Prepared { action: PreparedAction::Snapshot { checkpoint, bitmaps, .. }, .. }) => {
                (Some(&checkpoint.bitmap), bitmaps.as_deref().unwrap_or_default())
            }
            Some(Prepared { action: PreparedAction::Bitmaps { bitmaps }, .. }) => (None, &bitmaps[..]),
            _ => (None, &[][..]),
        };
        let users = self.bitmaps.iter().chain(users).map(|user| &user.bitmap);
        self.checkpoints.iter().map(|checkpoint| &checkpoint.bitmap).chain(users).chain(prepared)
    }

    /// [`Directory::all_bitmaps`], to change them.
    pub fn all_bitmaps_mut(&mut self) -> impl Iterator<Item = &mut BitmapEntry> {
        let (prepared, users) = match &mut self.prepared {
            Some(Prepared { action: PreparedAction::Snapshot { checkpoint, bitmaps, .. }, .. }) => {
                (Some(&mut checkpoint.bitmap), bitmaps.as_deref_mut().unwrap_or_default())
            }
            Some(Prepared { action: PreparedAction::Bitmaps { bitmaps }, .. }) => (None, &mut bitmaps[..]),
            _ => (None, &mut [][..]),
        };
        let users = self.bitmaps.iter_mut().chain(users).map(|user| &mut user.bitmap);
        self.checkpoints.iter_mut().map(|checkpoint| &mut checkpoint.bitmap).chain(users).chain(prepared)
    }

    /// Every area that is named.
    pub fn areas(&self) -> impl Iterator<Item = Area> {
        self.all_bitmaps().filter_map(|bitmap| bitmap.area)
    }

    /// Whether every bitmap is one that can exist.
    pub(super) fn check(&self) -> Result<()> {
        for bitmap in self.all_bitmaps() {
            DirtyBitmap::bits_for(bitmap.granularity, bitmap.size)
                .map_err(|e| e.context(format!("dirty log: bitmap {}", bitmap.uuid)))?;
        }
        Ok(())
    }

    /// What is wrong with which area: out of place, too short for its bitmap, or overlapping
    /// another one in place. (One bitmap may be named twice with the same area.)
    pub(super) fn area_faults(&self) -> BTreeMap<Area, String> {
        let mut faults = BTreeMap::new();
        let mut named = Vec::new();
        for bitmap in self.all_bitmaps() {
            let Some(area) = bitmap.area else { continue };
            let bits = DirtyBitmap::bits_for(bitmap.granularity, bitmap.size).unwrap_or(u64::MAX);
            let short = area.len < area_len_for(bits);
            if let Some(fault) = area.fault().or(short.then_some("is too short for its bitmap")) {
                faults.insert(area, format!("area at {} of {} bytes {fault}", area.offset, area.len));
            }
            if area.fault().is_none() {
                named.push((area, bitmap.uuid));
            }
        }
        named.sort_unstable();
        named.dedup();
        // Sorted by offset, an area that overlaps any earlier one overlaps the one that reaches furthest.
        let mut furthest: Option<Area> = None;
        for (area, _) in named {
            if let Some(earlier) = furthest
                && area.offset < earlier.end()
            {
                let fault = format!("areas at {} and {} overlap", earlier.offset, area.offset);
                faults.entry(earlier).or_insert_with(|| fault.clone());
                faults.entry(area).or_insert(fault);
            }
            if furthest.is_none_or(|earlier| earlier.end() < area.end()) {
                furthest = Some(area);
            }
        }
        faults
    }

    /// Takes areas that cannot be right away from their bitmaps, of which everything then counts as dirty.
    pub(super) fn drop_faulty_areas(&mut self) {
        let faults = self.area_faults();
        for bitmap in self.all_bitmaps_mut() {
            if let Some(fault) = bitmap.area.and_then(|area| faults.get(&area)) {
                log::warn!("dirty log: bitmap {}: {fault}; everything counts as changed", bitmap.uuid);
                bitmap.everything = Some(format!("the dirty log is damaged: {fault}"));
                (bitmap.area, bitmap.crc) = (None, None);
            }
        }
    }

    /// The text of the slot; ENOSPC where it is too long.
    pub(super) fn to_text(&self) -> Result<Vec<u8>> {
        let text =
            serde_json::to_vec(self).map_err(|e| Error::new(errno::EINVAL, "dirty log: directory", e.to_string()))?;
        if text.len() as u64 > DIRECTORY_TEXT_MAX_BYTES {
            let why = format!("{} where {} fit", human_size(text.len() as u64), human_size(DIRECTORY_TEXT_MAX_BYTES));
            return Err(Error::new(errno::ENOSPC, "dirty log: directory", why)
                .hint("delete checkpoints that are no longer needed, or mount with a smaller --keep-checkpoints"));
        }
        Ok(text)
    }
}

/// Length in bytes of the area for `bits` bits: whole pages, at least one.
pub(super) fn area_len_for(bits: u64) -> u64 {
    (Bits::words_for(bits) as u64 * 8).div_ceil(PAGE).max(1) * PAGE
}

/// The bytes of a slot with `text` in it.
pub(super) fn encode(text: &[u8], sequence: u64) -> Vec<u8> {
    let mut slot = vec![0; DIRECTORY_HEADER_BYTES];
    put(&mut slot, 0, &DIRECTORY_MAGIC);
    put(&mut slot, 8, &sequence.to_le_bytes());
    put(&mut slot, 16, &(text.len() as u64).to_le_bytes());
    let crc = checksum(&slot, text);
    put(&mut slot, 24, &crc.to_le_bytes());
    slot.extend_from_slice(text);
    slot
}

/// The bytes of the slot at `at` with its sequence; None where it was never written or only in part.
pub(super) fn read_slot(file: &dyn Storage, at: u64) -> Result<Option<Found>> {
    let mut bytes = vec![0; DIRECTORY_HEADER_BYTES];
    file.read_at(&mut bytes, at)?;
    let len = get_u64(&bytes, 16);
    if !bytes.starts_with(&DIRECTORY_MAGIC) || len > DIRECTORY_TEXT_MAX_BYTES {
        return Ok(None);
    }
    bytes.resize(DIRECTORY_HEADER_BYTES + len as usize, 0);
    let (header, text) = bytes.split_at_mut(DIRECTORY_HEADER_BYTES);
    file.read_at(text, at + DIRECTORY_HEADER_BYTES as u64)?;
    let good = get_u32(header, 24) == checksum(header, text);
    Ok(good.then(|| Found { sequence: get_u64(&bytes, 8), bytes }))
}

/// What a valid slot says.
pub(super) fn decode(slot: &[u8]) -> Result<Directory> {
    let text = slot.get(DIRECTORY_HEADER_BYTES..).unwrap_or_default();
    let directory: Directory = serde_json::from_slice(text)
        .map_err(|e| Error::new(errno::EINVAL, "dirty log", format!("the directory cannot be read: {e}")))?;
    directory.check()?;
    Ok(directory)
}

fn checksum(header: &[u8], text: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(header.get(..24).unwrap_or_default()), text)
}
