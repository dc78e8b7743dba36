//! Tracking of one disk: which bitmaps record, and what the sidecar knows of checkpoints, consumers and layers.
//!
//! * I6: every recording bitmap is marked before the image is written, under the gate, so that a freeze, which holds
//!   the gate exclusively while it switches bitmaps, sees each write on one side only.
//! * One truth: the sidecar's directory. What stands here in memory is derived from it.
//! * A checkpoint owns one bitmap, which records until the next checkpoint and is then sealed: written to the sidecar
//!   and dropped from memory. Changes from A to B are the union of the sealed bitmaps from A up to B.
//!
//! Words outside this process' heap (exact after kill -9), in the namespace of the superblock's nonce:
//! `fine.BITMAP` the bits of a recording bitmap; `clock` the time in nanoseconds of the newest image write, the image's
//! inode and device numbers, and the length that we made it, and are about to make it (see `foreign`).

use crate::bitmap::{Area, BitmapEntry, Bits, CheckpointEntry, CheckpointState, Directory, DirtyBitmap, Sidecar};
use crate::error::{Error, Result, errno};
use crate::storage::clock::now_coarse_ns;
use crate::storage::{Shm, Stamp, Words};
use crate::sync::atomic::Ordering;
use crate::sync::{Published, full_fence};
use std::sync::Arc;
use uuid::Uuid;

/// Name of the words that hold the time of the newest image write and what the image was then.
pub(super) const CLOCK: &str = "clock";
/// Count of those words, and which of them are inode and device number, the lengths, and 1 while regions are written to
/// that are not armed.
pub(super) const CLOCK_WORDS: usize = 6;
pub(super) const CLOCK_INO: usize = 1;
pub(super) const CLOCK_DEV: usize = 2;
pub(super) const CLOCK_LEN: usize = 3;
pub(super) const CLOCK_LEN_NEXT: usize = 4;
pub(super) const CLOCK_UNARMED: usize = 5;

/// Fills new clock words for an image of this stamp, which is written from now on.
pub(super) fn start_clock(clock: &Words, stamp: &Stamp) {
    let values = [now_coarse_ns() as u64, stamp.ino, stamp.dev, stamp.size, stamp.size, 0];
    clock.iter().zip(values).for_each(|(word, value)| word.store(value, Ordering::SeqCst));
}

/// Name of the words of a recording bitmap.
pub(super) fn fine_name(bitmap: Uuid) -> String {
    format!("fine.{bitmap}")
}

/// A bitmap that marks guest writes now.
#[derive(Debug, Clone)]
pub(super) struct Recording {
    pub uuid: Uuid,
    pub bitmap: Arc<DirtyBitmap>,
    /// Where its bits go when regions are disarmed, for all its life; None where it is longer than an area can be (then
    /// only its words know them, and a power loss makes it everything), or not to be recorded in.
    pub area: Option<Area>,
}

/// The bitmaps that record, and what all of them have.
#[derive(Debug)]
struct Recordings {
    list: Arc<Vec<Recording>>,
    /// Marked in the whole list, granule by granule of the finest one: a write there has nothing to mark, however many
    /// bitmaps record. None where there are not several. **Never ahead**: marked after each of the list. It is of this
    /// list alone; a bitmap is cleared by another list with a new one in its place.
    everywhere: Option<DirtyBitmap>,
}

impl Recordings {
    fn new(list: Vec<Recording>) -> Self {
        let finest = list.iter().map(|recording| recording.bitmap.granularity()).min();
        let size = list.iter().map(|recording| recording.bitmap.size()).max();
        let everywhere = match (finest, size) {
            (Some(granularity), Some(size)) if list.len() > 1 => DirtyBitmap::heap(granularity, size).ok(),
            _ => None,
        };
        Recordings { list: Arc::new(list), everywhere }
    }

    /// Marks a range in all of them; the caller passes a full fence before the write.
    fn mark_unfenced(&self, offset: u64, len: u64) {
        if self.everywhere.as_ref().is_some_and(|everywhere| everywhere.is_marked(offset, len)) {
            return;
        }
        self.list.iter().for_each(|recording| recording.bitmap.mark_unfenced(offset, len));
        if let Some(everywhere) = &self.everywhere {
            everywhere.mark_unfenced(offset, len);
        }
    }
}

/// Dirty since some point: the bits, and the reason where they say 'everything' for want of knowledge.
#[derive(Debug)]
pub(super) struct Union {
    pub bitmap: DirtyBitmap,
    pub everything: Option<String>,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Tracking {
    pub sidecar: Sidecar,
    pub shm: Arc<dyn Shm>,
    recording: Published<Recordings>,
    clock: Words,
}

impl Tracking {
    pub(super) fn new(sidecar: Sidecar, shm: Arc<dyn Shm>, clock: Words, recording: Vec<Recording>) -> Self {
        Tracking { sidecar, shm, recording: Published::new(Recordings::new(recording)), clock }
    }

    /// Marks a range in every recording bitmap and notes the time. The caller holds the gate.
    pub(super) fn mark(&self, offset: u64, len: u64) {
        let recordings = self.recording.peek();
        recordings.mark_unfenced(offset, len);
        if !recordings.list.is_empty() {
            // One for all of them: whoever sees the write that follows finds it in each.
            full_fence();
        }
        self.note_write();
    }

    /// Marks everything in every recording bitmap.
    pub(super) fn mark_all(&self) {
        self.recording().iter().for_each(|recording| recording.bitmap.mark_all());
    }

    /// Notes that the image is about to be written, for the next open to tell foreign writers from us.
    pub(super) fn note_write(&self) {
        let now = now_coarse_ns() as u64;
        if self.clock[0].load(Ordering::Relaxed) != now {
            self.clock[0].store(now, Ordering::Relaxed);
        }
    }

    /// Notes the length that the image is about to get. A kill finds it with this one, or the one before.
    pub(super) fn note_next_len(&self, len: u64) {
        self.clock[CLOCK_LEN_NEXT].store(len, Ordering::SeqCst);
    }

    /// Notes the length that the image has.
    pub(super) fn note_len(&self, len: u64) {
        self.clock[CLOCK_LEN].store(len, Ordering::SeqCst);
        self.clock[CLOCK_LEN_NEXT].store(len, Ordering::SeqCst);
    }

    /// Notes for a kill whether regions are written to that are not armed.
    pub(super) fn note_unarmed(&self, unarmed: bool) {
        self.clock[CLOCK_UNARMED].store(u64::from(unarmed), Ordering::SeqCst);
    }

    /// When the image was last written through us, in nanoseconds since the epoch.
    pub(super) fn last_write_ns(&self) -> i64 {
        self.clock[0].load(Ordering::Relaxed) as i64
    }

    /// Gives the words of a bitmap back that no longer records.
    pub(super) fn forget_words(&self, bitmap: Uuid) {
        if let Err(e) = self.shm.remove(&fine_name(bitmap)) {
            log::debug!("{e}");
        }
    }

    pub(super) fn recording(&self) -> Arc<Vec<Recording>> {
        self.recording.peek().list.clone()
    }

    /// Replaces the recording bitmaps. The gate is held exclusively, or the new list has all that the old one has.
    pub(super) fn switch(&self, recording: Vec<Recording>) {
        self.recording.store(Arc::new(Recordings::new(recording)));
    }

    pub(super) fn directory(&self) -> Arc<Directory> {
        self.sidecar.directory()
    }

    /// A new empty bitmap outside the heap, with an area of zeros for its bits. Who lets it record first has the
    /// directory name it, durably (see [`recording_entry`]). [`Tracking::give_back`] where it is not needed after all.
    pub(super) fn new_recording(&self, granularity: u64, size: u64) -> Result<Recording> {
        let recording = self.new_successor(granularity, size)?;
        let area = area_for(&self.sidecar, &recording.bitmap).inspect_err(|_| self.forget_words(recording.uuid))?;
        Ok(Recording { area, ..recording })
    }

    /// The same for a bitmap that records beside one with an area, which has all of its marks: it needs none while no
    /// directory names it.
    pub(super) fn new_successor(&self, granularity: u64, size: u64) -> Result<Recording> {
        let uuid = Uuid::new_v4();
        let bits = size.div_ceil(granularity);
        let words = self.shm.create(&fine_name(uuid), Bits::words_for(bits))?;
        let bitmap = Arc::new(DirtyBitmap::new(granularity, size, Bits::zeroed(words, bits))?);
        Ok(Recording { uuid, bitmap, area: None })
    }

    /// A successor that a directory is about to name: with an area from here on, so that no region is disarmed until
    /// that is done or [`Disk::stop_unnamed`] finds that it is not.
    ///
    /// [`Disk::stop_unnamed`]: super::disk::Disk::stop_unnamed
    pub(super) fn succeed(&self, successor: &Recording) -> Result<Recording> {
        let named = Recording { area: area_for(&self.sidecar, &successor.bitmap)?, ..successor.clone() };
        self.put(&named);
        Ok(named)
    }

    /// Replaces the recording of the same bitmap.
    fn put(&self, changed: &Recording) {
        let put = |one: &Recording| if one.uuid == changed.uuid { changed.clone() } else { one.clone() };
        self.switch(self.recording().iter().map(put).collect());
    }

    /// A successor that no directory names after all goes on without an area.
    pub(super) fn remain_successor(&self, recording: &Recording) {
        if let Some(area) = &recording.area {
            self.put(&Recording { area: None, ..recording.clone() });
            self.sidecar.abandon(area);
        }
    }

    /// The recording with a new area that holds all its bits: the commit that names it makes them durable.
    pub(super) fn with_area(&self, recording: Recording) -> Result<Recording> {
        with_area(&self.sidecar, recording)
    }

    /// Nothing will be marked in a recording that no directory names.
    pub(super) fn give_back(&self, recording: &Recording) {
        self.forget_words(recording.uuid);
        if let Some(area) = &recording.area {
            self.sidecar.abandon(area);
        }
    }

    /// Writes a bitmap, which does not change any more, to its area, or to a new one where it has none. The entry is
    /// what the directory is to hold: the commit that names it makes it durable, and so does [`Sidecar::sync`]. Where
    /// there is no such commit, [`Tracking::abandon`] gives a new area back.
    pub(super) fn seal(&self, recording: &Recording, everything: Option<String>) -> Result<BitmapEntry> {
        let bits = recording.bitmap.bits();
        let area = match recording.area {
            Some(area) => area,
            None => self.sidecar.allocate((Bits::words_for(bits.len()) * 8) as u64)?,
        };
        let crc = self.sidecar.write_bits(&area, bits).inspect_err(|_| self.sidecar.abandon(&area))?;
        Ok(BitmapEntry {
            uuid: recording.uuid,
            granularity: recording.bitmap.granularity(),
            size: recording.bitmap.size(),
            area: Some(area),
            crc: Some(crc),
            everything,
            dirty: recording.bitmap.count_bytes(),
        })
    }

    /// Gives back the area of a sealed bitmap that no commit has named.
    pub(super) fn abandon(&self, sealed: &BitmapEntry) {
        if let Some(area) = &sealed.area {
            self.sidecar.abandon(area);
        }
    }

    /// A bitmap as a fresh copy: of the recording one where it records, else from the sidecar. `Err` is the reason why
    /// everything has to count as dirty.
    pub(super) fn load(&self, entry: &BitmapEntry) -> std::result::Result<DirtyBitmap, String> {
        if let Some(reason) = &entry.everything {
            return Err(reason.clone());
        }
        if let Some(recording) = self.recording().iter().find(|recording| recording.uuid == entry.uuid) {
            return copy_of(&recording.bitmap).map_err(|e| e.to_string());
        }
        let Some(area) = &entry.area else {
            return Err("its bitmap was not saved".to_owned());
        };
        match self.sidecar.read_bits(area, entry.size.div_ceil(entry.granularity), entry.crc) {
            Ok(bits) => DirtyBitmap::new(entry.granularity, entry.size, bits).map_err(|e| e.to_string()),
            Err(e) => Err(format!("its saved bitmap cannot be read: {e}")),
        }
    }

    /// One more bitmap records. The gate is held exclusively.
    pub(super) fn also_record(&self, recording: &Recording) {
        let mut list = (*self.recording()).clone();
        list.push(recording.clone());
        self.switch(list);
    }

    /// A copy of one checkpoint's bitmap for a disk of `size` bytes.
    pub(super) fn alone(&self, checkpoint: &CheckpointEntry, size: u64) -> Result<DirtyBitmap> {
        union_of(self, std::slice::from_ref(checkpoint), size).map(|union| union.bitmap)
    }

    /// Everything that changed from checkpoint `base` up to checkpoint `target`, on a disk of `size` bytes.
    pub(super) fn union(&self, base: Uuid, target: Uuid, size: u64) -> Result<Union> {
        // Holding the directory keeps the areas that it names.
        let directory = self.directory();
        let (from, to) = span(&directory, base, target)?;
        union_of(self, &directory.checkpoints[from..to], size)
    }

    /// A merged copy of two neighbouring checkpoints' bitmaps, for the older one.
    pub(super) fn merged(&self, older: &CheckpointEntry, newer: &CheckpointEntry, size: u64) -> Result<Union> {
        union_of(self, &[older.clone(), newer.clone()], size)
    }

    /// Bytes marked since a checkpoint, until the next one.
    pub(super) fn dirty_bytes(&self, checkpoint: &CheckpointEntry) -> u64 {
        let entry = &checkpoint.bitmap;
        let recording = self.recording();
        let marked = recording.iter().find(|recording| recording.uuid == entry.uuid);
        let bytes = marked.map_or(entry.dirty, |recording| recording.bitmap.count_bytes());
        if entry.everything.is_some() { entry.size } else { bytes.min(entry.size) }
    }
}

fn union_of(tracking: &Tracking, checkpoints: &[CheckpointEntry], size: u64) -> Result<Union> {
    let granularity =
        checkpoints.iter().map(|c| c.bitmap.granularity).min().unwrap_or(crate::units::DEFAULT_GRANULARITY);
    let mut bitmap = DirtyBitmap::heap(granularity, size)?;
    let mut everything = None;
    for checkpoint in checkpoints {
        match tracking.load(&checkpoint.bitmap) {
            Ok(part) => {
                bitmap.absorb(&part);
                if part.size() < size {
                    // The area past the recorded size is not known to be unchanged.
                    bitmap.mark(part.size(), size - part.size());
                }
            }
            Err(reason) => {
                bitmap.mark_all();
                everything.get_or_insert(reason);
            }
        }
    }
    Ok(Union { bitmap, everything })
}

fn copy_of(bitmap: &DirtyBitmap) -> Result<DirtyBitmap> {
    let mut copy = DirtyBitmap::heap(bitmap.granularity(), bitmap.size())?;
    copy.absorb(bitmap);
    Ok(copy)
}

/// The indices of `base` and `target` in the chain of checkpoints.
fn span(directory: &Directory, base: Uuid, target: Uuid) -> Result<(usize, usize)> {
    let find = |uuid: Uuid| directory.checkpoints.iter().position(|checkpoint| checkpoint.uuid == uuid);
    match (find(base), find(target)) {
        (Some(from), Some(to)) if from < to => Ok((from, to)),
        _ => Err(Error::new(errno::ENOENT, format!("checkpoint {base}"), "not an earlier point of this view")
            .hint("list the known points with `fleecefs checkpoint list`")),
    }
}

/// A new area for the bits of `bitmap`, all zeros; None where it is longer than an area can be.
fn area_for(sidecar: &Sidecar, bitmap: &DirtyBitmap) -> Result<Option<Area>> {
    match sidecar.allocate((Bits::words_for(bitmap.bits().len()) * 8) as u64) {
        Ok(area) => Ok(Some(area)),
        Err(e) if e.errno() == errno::EFBIG => {
            log::warn!("{e}; a power loss makes this bitmap say everything");
            Ok(None)
        }
        Err(e) => Err(e),
    }
}

/// See [`Tracking::with_area`].
pub(super) fn with_area(sidecar: &Sidecar, recording: Recording) -> Result<Recording> {
    let area = area_for(sidecar, &recording.bitmap)?;
    if let Some(area) = &area {
        sidecar.write_bits(area, recording.bitmap.bits()).inspect_err(|_| sidecar.abandon(area))?;
    }
    Ok(Recording { area, ..recording })
}

/// The directory entry of a bitmap that records.
pub(super) fn recording_entry(recording: &Recording) -> BitmapEntry {
    BitmapEntry {
        uuid: recording.uuid,
        granularity: recording.bitmap.granularity(),
        size: recording.bitmap.size(),
        area: recording.area,
        crc: None,
        everything: None,
        dirty: 0,
    }
}

/// The checkpoint that records now, if there is one.
pub(super) fn recording_checkpoint(directory: &Directory) -> Option<&CheckpointEntry> {
    directory.checkpoints.last().filter(|checkpoint| checkpoint.state == CheckpointState::Recording)
}

#[cfg(all(test, not(any(feature = "shuttle", loom))))]
mod tests {
    use super::*;

    const SIZE: u64 = 1 << 20;

    fn recording(granularity: u64) -> Recording {
        let bitmap = Arc::new(DirtyBitmap::heap(granularity, SIZE).unwrap());
        Recording { uuid: Uuid::new_v4(), bitmap, area: None }
    }

    #[test]
    fn several_bitmaps_have_each_mark_whatever_their_granularity_and_a_new_one_in_the_list_too() {
        let list = vec![recording(4096), recording(65536)];
        let marks = [(5000, 10), (0, 4096), (70_000, 200_000), (5000, 10), (SIZE - 1, 1), (60_000, 10_000)];
        let recordings = Recordings::new(list.clone());
        let new = Recordings::new(vec![list[0].clone(), recording(65536)]);
        for (offset, len) in marks.into_iter().chain((0..SIZE / 512).rev().step_by(97).map(|at| (at * 512, 700))) {
            recordings.mark_unfenced(offset, len);
            new.mark_unfenced(offset, len);
            let end = (offset + len).min(SIZE) - 1;
            for one in list.iter().chain(&*new.list) {
                assert!(one.bitmap.is_dirty(offset) && one.bitmap.is_dirty(end), "{offset}, {len}");
            }
        }
    }
}
