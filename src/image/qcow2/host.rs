//! The file that an image lies in, and the places in it that entries of tables may point to.
//!
//! The file is driven as a raw image, so it is locked as QEMU locks it and takes any range with O_DIRECT too. On top of
//! that, as a [`Storage`]:
//! - **It grows by steps, durably.** A write behind its end makes it longer, in steps ([`GROWTH_BYTES`]), and syncs the
//!   new length before anything else: an entry never points behind the end, whatever a power loss leaves. Steps are
//!   large, for each one waits for the medium, and what is not written yet takes no space; a close cuts the rest off.
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
use parking_lot::{Condvar, Mutex, MutexGuard, RwLock};
use std::collections::{BTreeMap, HashSet};
use std::ops::RangeInclusive;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Steps by which an image's file grows: an eighth of the disk, within these bytes.
const GROWTH_BYTES: RangeInclusive<u64> = 16 << 20..=1 << 30;

/// 64 bits each: few offsets of a disk of 1 TiB in clusters of 64 KiB share a bit.
const HINT_WORDS: usize = 1 << 11;

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
    /// A bit for each hash of an offset that is or was in `tables`, set before it is there: a clear bit answers without
    /// the lock, whose word all writers would share.
    table_hints: Box<[AtomicU64]>,
    /// The length is made a multiple of this where the file grows.
    growth_bytes: u64,
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
        HostFile::over(image, Areas::new(), 1)
    }

    /// The file that `header` was read from.
    pub fn of_image(image: RawImage, header: &Header) -> HostFile {
        let areas = header.areas().into_iter().map(|(name, area)| (area.start, (area.end, name))).collect();
        let (least, most) = GROWTH_BYTES.into_inner();
        HostFile::over(image, areas, (header.size / 8).clamp(least, most).next_power_of_two())
    }

    fn over(image: RawImage, areas: Areas, growth_bytes: u64) -> HostFile {
        HostFile {
            image,
            areas: ArcSwap::from_pointee(areas),
            tables: RwLock::default(),
            table_hints: (0..HINT_WORDS).map(|_| AtomicU64::new(0)).collect(),
            growth_bytes,
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
        let hinted = offsets.into_iter().inspect(|offset| {
            let (word, bit) = hint(*offset);
            if let Some(word) = self.table_hints.get(word) {
                word.fetch_or(bit, Ordering::Release);
            }
        });
        self.tables.write().extend(hinted);
    }

    /// An L2 table or refcount block is none any more.
    pub fn forget_table(&self, offset: u64) {
        self.tables.write().remove(&offset);
    }

    /// Refuses, with EIO, to put something into a cluster that is an L2 table or a refcount block.
    pub fn check_not_table(&self, what: &str, cluster: HostOffset) -> Result<()> {
        let (word, bit) = hint(cluster.0);
        let hinted = self.table_hints.get(word).is_some_and(|word| word.load(Ordering::Acquire) & bit != 0);
        if !hinted || !self.tables.read().contains(&cluster.0) {
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
        // Where a file cannot be so long, or holes take space, a whole step may be too much.
        self.image.resize(bytes.next_multiple_of(self.growth_bytes)).or_else(|_| self.image.resize(bytes))?;
        let mut syncs = self.syncs.lock();
        while syncs.running {
            self.synced.wait(&mut syncs);
        }
        syncs.failed.clone().map_or(Ok(()), Err)?;
        // Nobody writes to the new last byte yet: what is there is handed out, or becomes the disk's, after this.
        self.run_sync(&mut syncs, || self.image.sync_len())
    }

    /// Runs a sync, of which there is one at a time: the kernel tells what was lost to one of them only.
    fn run_sync(&self, syncs: &mut MutexGuard<'_, Syncs>, sync: impl FnOnce() -> Result<()>) -> Result<()> {
        syncs.running = true;
        let result = MutexGuard::unlocked(syncs, sync);
        syncs.running = false;
        if let Err(e) = &result {
            syncs.failed = Some(e.clone());
        }
        self.synced.notify_all();
        result
    }

    /// Writes fields of metadata. Where that fails they may stand there all the same, so this also gives what counts
    /// from now on: what the file holds, where it can be read.
    pub fn put<const N: usize>(&self, offset: u64, fields: [u8; N]) -> (Option<[u8; N]>, Result<()>) {
        let written = self.write_at(&fields, offset);
        let mut now = fields;
        let known = written.is_ok() || self.read_at(&mut now, offset).is_ok();
        (known.then_some(now), written)
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

/// The word and the bit of `table_hints` for an offset.
fn hint(offset: u64) -> (usize, u64) {
    let hash = (offset >> 9).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    ((hash >> 32) as usize % HINT_WORDS, 1 << (hash >> 58))
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
            syncs.begun += 1;
            let this = syncs.begun;
            let punches = self.punches.load(Ordering::SeqCst);
            if self.run_sync(&mut syncs, || self.image.flush()).is_ok() {
                syncs.done = this;
                self.durable_punches.fetch_max(punches, Ordering::SeqCst);
            }
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

#[cfg(all(test, not(feature = "shuttle")))]
mod tests {
    use super::*;
    use crate::image::qcow2::read_header;
    use crate::image::qcow2::test_image::Shape;
    use crate::storage::faulty::Call;
    use crate::storage::{FaultPlan, Faulty, MemFile};

    fn image() -> (HostFile, Arc<FaultPlan>, u64) {
        let file = MemFile::new("vda.qcow2", 0);
        Shape::new(12, 4, 3).write(&file);
        let (inner, plan) = (file.shared(), Arc::new(FaultPlan::new()));
        let storage = Arc::new(Faulty { inner, plan: plan.clone() });
        let header = read_header(&*storage).unwrap();
        let bytes = storage.len().unwrap();
        (HostFile::of_image(RawImage::over(storage, false).unwrap(), &header), plan, bytes)
    }

    #[test]
    fn growth_is_synced_and_goes_by_steps_where_a_step_is_possible() {
        let (host, plan, bytes) = image();
        host.grow(bytes + 1).unwrap();
        assert_eq!((host.bytes(), plan.calls(Call::Sync)), (*GROWTH_BYTES.start(), 1));
        host.grow(host.bytes()).unwrap();
        assert_eq!(plan.calls(Call::Sync), 1);
        plan.fail_nth(Call::SetLen, 2, errno::EFBIG);
        let wanted = host.bytes() + 4096;
        host.grow(wanted).unwrap();
        assert_eq!((host.bytes(), plan.calls(Call::Sync)), (wanted, 2));
    }

    #[test]
    fn a_sync_of_the_length_that_failed_is_a_sync_that_failed() {
        let (host, plan, bytes) = image();
        plan.fail_nth(Call::Sync, 1, errno::EIO);
        assert_eq!(host.grow(bytes + 1).unwrap_err().errno(), errno::EIO);
        assert_eq!(host.sync().unwrap_err().errno(), errno::EIO);
        assert_eq!(plan.calls(Call::Sync), 1);
    }
}
