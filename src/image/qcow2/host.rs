//! The file that an image lies in, and the places in it that entries of tables may point to.
//!
//! The file is driven as a raw image, so it is locked as QEMU locks it and takes any range with O_DIRECT too. On top of
//! that, as a [`Storage`]:
//! - **It grows by steps, durably.** A write behind its end makes it longer, in steps ([`GROWTH_BYTES`]), and syncs the
//!   new length before anything else: an entry never points behind the end, whatever a power loss leaves.
//! - **It syncs once for many.** A sync that began after a caller's writes serves that caller; others wait for it.
//! - **A sync that failed fails for ever**: what it was to save may be lost without another word.
//! - **It knows which holes are durable**: those older than the last sync. See [`HostFile::is_durable_hole`].

use super::header::Header;
use super::tables::HostOffset;
use crate::error::{Error, Result, errno};
use crate::image::Image;
use crate::image::raw::RawImage;
use crate::storage::{BlockStatus, Stamp, Storage};
use arc_swap::ArcSwap;
use parking_lot::{Condvar, Mutex, RwLock};
use std::collections::{BTreeMap, HashSet};
use std::ops::RangeInclusive;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Steps by which an image's file grows: an eighth of its length, within these bytes.
const GROWTH_BYTES: RangeInclusive<u64> = 16 << 20..=1 << 30;

/// Metadata in whole clusters: by its start its end and name.
type Areas = BTreeMap<u64, (u64, &'static str)>;

/// The image's file, or its external data file.
#[derive(Debug)]
pub struct HostFile {
    /// The bytes.
    pub image: RawImage,
    /// Metadata that no entry may point into, none overlapping another. Empty for an external data file.
    areas: ArcSwap<Areas>,
    /// Host offsets of L2 tables and refcount blocks, known where the image is open for writing.
    tables: RwLock<HashSet<u64>>,
    /// Grows by steps; an external data file grows to what is written.
    by_steps: bool,
    growing: Mutex<()>,
    syncs: Mutex<Syncs>,
    synced: Condvar,
    /// Begins and ends of hole punching.
    punches: AtomicU64,
    /// What `punches` was when the last good sync began.
    durable_punches: AtomicU64,
}

/// Syncs in their order, from 1.
#[derive(Debug, Default)]
struct Syncs {
    begun: u64,
    done: u64,
    running: bool,
    failed: Option<Error>,
}

impl HostFile {
    /// A file of guest data alone.
    pub fn of_data(image: RawImage) -> HostFile {
        HostFile::over(image, Areas::new(), false)
    }

    /// The file that `header` was read from.
    pub fn of_image(image: RawImage, header: &Header) -> HostFile {
        let areas = header.areas().into_iter().map(|(name, area)| (area.start, (area.end, name))).collect();
        HostFile::over(image, areas, true)
    }

    fn over(image: RawImage, areas: Areas, by_steps: bool) -> HostFile {
        HostFile {
            image,
            areas: ArcSwap::from_pointee(areas),
            tables: RwLock::default(),
            by_steps,
            growing: Mutex::new(()),
            syncs: Mutex::default(),
            synced: Condvar::new(),
            punches: AtomicU64::new(0),
            durable_punches: AtomicU64::new(0),
        }
    }

    /// Length of the file in bytes.
    pub fn bytes(&self) -> u64 {
        self.image.size()
    }

    /// Takes the clusters of an area away from what entries may point to; an error where it lies in other metadata or
    /// ends behind the file.
    pub fn reserve(&self, name: &'static str, offset: HostOffset, bytes: u64, cluster_size: u64) -> Result<()> {
        self.reserve_all(name, [(offset, bytes)], cluster_size).map_err(|(_, e)| e)
    }

    /// [`HostFile::reserve`] for areas of one kind, in one change of the map; the error comes with the area's index, and
    /// none is taken then. One caller at a time: at open, later who holds the lock of resizes.
    pub fn reserve_all(
        &self,
        name: &'static str,
        places: impl IntoIterator<Item = (HostOffset, u64)>,
        cluster_size: u64,
    ) -> std::result::Result<(), (usize, Error)> {
        let mut areas = Areas::clone(&self.areas.load());
        for (index, (offset, bytes)) in places.into_iter().enumerate() {
            check_in(&areas, self.bytes(), name, offset, bytes).map_err(|e| (index, e))?;
            areas.insert(offset.0, (offset.0 + bytes.next_multiple_of(cluster_size), name));
        }
        self.areas.store(Arc::new(areas));
        Ok(())
    }

    /// Forgets the area that begins at `offset`.
    pub fn forget(&self, offset: HostOffset) {
        self.areas.rcu(|areas| {
            let mut areas = Areas::clone(areas);
            areas.remove(&offset.0);
            areas
        });
    }

    /// All areas of metadata that are known: start, end and name.
    pub fn areas(&self) -> Vec<(u64, u64, &'static str)> {
        self.areas.load().iter().map(|(start, (end, name))| (*start, *end, *name)).collect()
    }

    /// Refuses, with EIO, a target that is not whole in the file or lies in metadata.
    pub fn check(&self, what: &str, offset: HostOffset, bytes: u64) -> Result<()> {
        check_in(&self.areas.load(), self.bytes(), what, offset, bytes)
    }

    /// Notes the places of L2 tables and refcount blocks.
    pub fn note_tables(&self, offsets: impl IntoIterator<Item = u64>) {
        self.tables.write().extend(offsets);
    }

    /// An L2 table or refcount block is none any more.
    pub fn forget_table(&self, offset: u64) {
        self.tables.write().remove(&offset);
    }

    /// Refuses, with EIO, to put something into a cluster that is an L2 table or a refcount block.
    pub fn check_not_table(&self, what: &str, cluster: HostOffset) -> Result<()> {
        if !self.tables.read().contains(&cluster.0) {
            return Ok(());
        }
        let why = format!("{what} at host offset {cluster} lies where an L2 table or a refcount block is");
        Err(Error::new(errno::EIO, "qcow2 image", why)
            .at_path(self.path())
            .hint("the image is damaged: end all use of it, then run: fleecefs check IMAGE"))
    }

    /// Whether a range is a hole that no power loss fills again: it reads as zeros, and no hole was made since the last
    /// sync began.
    pub fn is_durable_hole(&self, offset: HostOffset, bytes: u64) -> Result<bool> {
        let durable = || self.punches.load(Ordering::SeqCst) == self.durable_punches.load(Ordering::SeqCst);
        Ok(durable() && self.is_hole(offset.0, bytes)? && durable())
    }

    fn is_hole(&self, offset: u64, bytes: u64) -> Result<bool> {
        let status = self.image.block_status(offset, bytes)?;
        Ok(status.zero && status.len >= bytes)
    }

    /// Makes the file at least `bytes` long, and that durable.
    pub fn grow(&self, bytes: u64) -> Result<()> {
        let _one = self.growing.lock();
        if bytes <= self.bytes() {
            return Ok(());
        }
        if self.image.is_block_device() {
            if bytes <= self.image.look_at_growth()? {
                return Ok(());
            }
            let why = format!("the block device is full: it has {} bytes", self.bytes());
            return Err(Error::new(errno::ENOSPC, "allocate", why).at_path(self.path()).hint("enlarge the device"));
        }
        let (least, most) = GROWTH_BYTES.into_inner();
        let step = if self.by_steps { (self.bytes() / 8).clamp(least, most).next_power_of_two() } else { 1 };
        self.image.resize(bytes.next_multiple_of(step))?;
        self.sync()
    }

    /// Writes a word of metadata. Where that fails it may stand there all the same, so this also gives the word that
    /// counts from now on: what the file holds, where it can be read.
    pub fn put_word(&self, offset: u64, word: u64) -> (Option<u64>, Result<()>) {
        let written = self.write_at(&word.to_be_bytes(), offset);
        let mut now = word.to_be_bytes();
        let known = written.is_ok() || self.read_at(&mut now, offset).is_ok();
        (known.then_some(u64::from_be_bytes(now)), written)
    }

    /// Zeros in the part of a range that is in the file; what lies behind its end reads as zeros.
    fn zero_inside(&self, offset: u64, len: u64, discard: bool) -> Result<()> {
        match self.bytes().saturating_sub(offset).min(len) {
            0 => Ok(()),
            inside => self.image.write_zeroes(offset, inside, discard),
        }
    }
}

fn check_in(areas: &Areas, file_bytes: u64, what: &str, offset: HostOffset, bytes: u64) -> Result<()> {
    let bad = |why: String| Err(Error::new(errno::EIO, "qcow2 image", format!("{what} at host offset {offset} {why}")));
    let end = match offset.0.checked_add(bytes) {
        Some(end) if end <= file_bytes => end,
        _ => return bad(format!("is not inside the file of {file_bytes} bytes")),
    };
    match areas.range(..end).next_back() {
        Some((_, (area_end, name))) if *area_end > offset.0 => bad(format!("lies in the clusters of {name}")),
        _ => Ok(()),
    }
}

impl Storage for HostFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.image.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        let end = offset.saturating_add(buf.len() as u64);
        if end > self.bytes() {
            self.grow(end)?;
        }
        self.image.write_at(buf, offset)
    }

    fn sync(&self) -> Result<()> {
        let mut syncs = self.syncs.lock();
        let wanted = syncs.begun + 1;
        loop {
            if let Some(e) = &syncs.failed {
                return Err(e.clone());
            }
            if syncs.done >= wanted {
                return Ok(());
            }
            if syncs.running {
                self.synced.wait(&mut syncs);
                continue;
            }
            syncs.running = true;
            syncs.begun += 1;
            let this = syncs.begun;
            drop(syncs);
            let punches = self.punches.load(Ordering::SeqCst);
            let result = self.image.flush();
            syncs = self.syncs.lock();
            syncs.running = false;
            match result {
                Ok(()) => {
                    syncs.done = this;
                    self.durable_punches.fetch_max(punches, Ordering::SeqCst);
                }
                Err(e) => syncs.failed = Some(e),
            }
            self.synced.notify_all();
        }
    }

    fn len(&self) -> Result<u64> {
        Ok(self.bytes())
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.image.resize(len)
    }

    fn punch_hole(&self, offset: u64, len: u64) -> Result<()> {
        // Once before and once after, so that no sync in between counts it as done.
        self.punches.fetch_add(1, Ordering::SeqCst);
        let punched = self.zero_inside(offset, len, true);
        self.punches.fetch_add(1, Ordering::SeqCst);
        punched
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        self.punches.fetch_add(1, Ordering::SeqCst);
        let written = self.zero_inside(offset, len, false);
        self.punches.fetch_add(1, Ordering::SeqCst);
        written
    }

    fn block_status(&self, offset: u64, len: u64) -> Result<BlockStatus> {
        self.image.block_status(offset, len)
    }

    fn stamp(&self) -> Result<Stamp> {
        self.image.stamp()
    }

    fn path(&self) -> &Path {
        self.image.path()
    }
}
