//! Maps of a frozen view, in the formats that readers understand; and what is done by them: backups ([`save`], [`chain`])
//! and their restore, on one engine ([`copy`](mod@copy)), and jobs.
//!
//! Maps:
//! One model ([`Extent`]): sorted runs of bytes that cover the whole disk without gap or overlap, neighbours of equal
//! state merged. The core supplies it ([`ExtentSource`]); they only translate it, and depend on neither images
//! nor stores.
//!
//! Invariants:
//! - A map may say too much, never too little. A format that cannot say 'zero' lists zeroed ranges as changed; one
//!   that counts in blocks lists every block that a change touches.
//! - A source that leaves a gap, overlaps or ends early is an error ([`runs`]), never a shorter map.
//! - The text is a function of source and [`MapMeta`] alone, and the source is immutable: any piece of it can be made
//!   again at any time ([`MapFile`]), so that nobody holds the text of a map of millions of extents.

pub mod chain;
pub mod copy;
mod extents;
mod file;
mod format;
pub mod jobs;
mod journal;
pub mod manifest;
pub mod push;
pub mod restore;
pub mod restore_volume;
mod runs;
pub mod save;
#[cfg(test)]
mod tests;
mod view;
mod volume;

pub use extents::MapSource;
pub use file::MapFile;
pub use format::MapFormat;
pub use volume::VolumeMap;

use crate::error::Result;
use std::path::PathBuf;
use uuid::Uuid;

/// A run of bytes of equal state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Extent {
    /// First byte.
    pub start: u64,
    /// Length in bytes, at least 1.
    pub length: u64,
    /// Changed since the base, as far as tracking tells: never false for a byte that changed.
    pub dirty: bool,
    /// Reads as zeros. `false` promises nothing.
    pub zero: bool,
}

/// Iterator over extents in ascending order.
pub type Extents<'a> = Box<dyn Iterator<Item = Result<Extent>> + 'a>;

/// Where the extents of a map come from. The same answer every time: two walks from one offset never differ.
pub trait ExtentSource {
    /// Size of the disk in bytes: where the extents end.
    fn disk_size(&self) -> u64;
    /// The extents up to the disk's end from the one that holds `offset` on: whole, or what of it is behind `offset`. From
    /// the start of an extent that an earlier walk gave the rest of that walk follows.
    fn extents_from(&self, offset: u64) -> Result<Extents<'_>>;
}

/// An instant by name and identity.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MapPoint {
    /// Name of the checkpoint.
    pub name: String,
    /// What decides whether a base is the base.
    pub uuid: Uuid,
}

/// Whose map it is, for the heads of the formats that carry it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MapMeta {
    /// Name of the disk.
    pub disk: String,
    /// Identity of the disk.
    pub disk_uuid: Uuid,
    /// The image.
    pub image: PathBuf,
    /// Name of the snapshot.
    pub snapshot: String,
    /// The point from which changes are listed; `None` where everything counts as changed.
    pub base: Option<MapPoint>,
    /// Why everything counts as changed, where there is no base or its changes are not known.
    pub full_reason: Option<String>,
    /// The point up to which changes are listed: the snapshot's own checkpoint.
    pub target: MapPoint,
}

/// Sums over a map.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct Totals {
    /// Size of the disk in bytes.
    pub size: u64,
    /// Bytes that changed.
    pub dirty: u64,
    /// Bytes that changed and read as zeros: part of `dirty`.
    pub zero: u64,
    /// Count of extents after neighbours of equal state are merged.
    pub extents: u64,
}

impl Totals {
    /// Walks the whole map once.
    pub fn of(source: &dyn ExtentSource) -> Result<Totals> {
        let mut totals = Totals { size: source.disk_size(), ..Totals::default() };
        for run in runs::runs(source, MapFormat::Json, 0)? {
            totals.add(&run?);
        }
        Ok(totals)
    }

    fn add(&mut self, run: &runs::Run) {
        self.extents += 1;
        if run.dirty {
            self.dirty += run.length();
            self.zero += if run.zero { run.length() } else { 0 };
        }
    }
}
