//! From guest offsets to where their bytes are: the L1 table and a bounded cache of L2 tables.
//!
//! The L1 table is an array of atomics. L2 tables are loaded in slices of at most [`SLICE_BYTES`], each an array of
//! atomics too, so a table of 2 MiB costs no more than the parts of it that are used. The default budget of 64 MiB
//! holds the mapping of 512 GiB in 64 KiB clusters at once; a disk of 1 TiB or more stays within it as long as access is
//! local, since slices are replaced one by one.
//!
//! **Look-up takes no lock.** A slice's place in the cache follows from its host offset (a set of [`WAYS`] ways). A
//! look-up compares the keys of its set and loads the way that matches; a hit holds the slice alive by itself, whatever
//! replaces it meanwhile. Only loading takes a lock, that of its set's stripe, and holds it across the read: two threads
//! never load one slice, and whoever changes a table on disk under that lock cannot be overtaken by a load of its old
//! content.
//!
//! **A change is written first** ([`Mapping::update`]): under the stripe's lock, to the file, then to the slice if it
//! is loaded. A slice never holds what is not on disk. So dropping one loses nothing, and a kill loses no answered
//! write. Entries of two words are read under the slice's sequence number, or a reader would see half a change.
//!
//! Whoever changes an entry holds the range lock of its cluster, or two changes would undo each other.

use super::host::HostFile;
use super::tables::{CompressedAt, Geometry, HostOffset, L1Entry, L2Entry, SUBCLUSTERS, decode_l1, decode_l2};
use crate::error::{Error, Result, errno};
use crate::storage::Storage;
use arc_swap::{ArcSwap, ArcSwapOption, Guard};
use parking_lot::Mutex;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};

/// Most bytes of an L2 table that are loaded at once.
const SLICE_BYTES: u64 = 4096;
/// What a slice costs beside its entries: two allocations with their headers, and its place.
const SLICE_OVERHEAD_BYTES: u64 = 96;
/// Slices that may stand in one set of the cache.
const WAYS: usize = 8;
/// Locks for loading; sets share them.
const STRIPES: usize = 64;
/// Most pieces that one answer merges, so that a question about a huge range ends soon.
const MERGE_MAX: usize = 1 << 16;

/// Memory for the L2 tables of one image in bytes.
pub const CACHE_BYTES: u64 = 64 << 20;

/// Where the bytes of a run are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// In the image's file, or its external data file, from this offset on.
    Data(HostOffset),
    /// They are zeros.
    Zero,
    /// In the backing file, at the same offset; zeros where there is none.
    Backing,
    /// In a compressed cluster, from the run's offset in the cluster on.
    Compressed(CompressedAt),
}

/// A run of guest bytes with one source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// Length in bytes, at least 1.
    pub len: u64,
    /// Where the bytes are.
    pub source: Source,
}

/// A part of an L2 table.
#[derive(Debug)]
struct Slice {
    /// Host offset of its first entry.
    key: u64,
    /// Entries, one or two words each.
    words: Box<[AtomicU64]>,
    /// Odd while two-word entries change.
    sequence: AtomicU64,
    /// Looked at since the last search for a slice to replace.
    used: AtomicBool,
}

/// A slice that stays while it is looked at. Unlike a reference that is counted, it costs no write to memory that other
/// threads read.
type Held = Guard<Option<Arc<Slice>>>;

/// An L1 table.
#[derive(Debug)]
struct L1 {
    offset: HostOffset,
    /// Entries as they stand in the file.
    words: Box<[AtomicU64]>,
}

/// An entry as it stands in the file: one word, or two with extended L2 entries (else the second is 0).
pub type RawEntry = (u64, u64);

/// See the head of the module.
#[derive(Debug)]
pub struct Mapping {
    geometry: Geometry,
    l1: ArcSwap<L1>,
    slice_bytes: u64,
    /// Sets of [`WAYS`] places each.
    places: Box<[ArcSwapOption<Slice>]>,
    /// The key of the slice in each place, 0 where there is none: a search compares these. It may be behind, so the
    /// slice's own key decides. Changed under the stripe's lock, after the place.
    keys: Box<[AtomicU64]>,
    /// Held while a slice of one of their sets is loaded; leaf locks, of which a thread holds one.
    stripes: Box<[Mutex<()>]>,
}

/// Words of a table as they stand in the file.
fn read_words(file: &HostFile, offset: HostOffset, bytes: u64) -> Result<Box<[AtomicU64]>> {
    let mut raw = vec![0; bytes as usize];
    file.read_at(&mut raw, offset.0)?;
    let (words, _) = raw.as_chunks::<8>();
    Ok(words.iter().map(|word| AtomicU64::new(u64::from_be_bytes(*word))).collect())
}

impl Slice {
    /// The entry whose first word has this index; zeros behind the slice.
    fn entry(&self, word: usize, two_words: bool) -> RawEntry {
        let load = |at: usize| self.words.get(at).map_or(0, |word| word.load(Ordering::Acquire));
        if !two_words {
            return (load(word), 0);
        }
        loop {
            let before = self.sequence.load(Ordering::Acquire);
            let entry = (load(word), load(word + 1));
            fence(Ordering::Acquire);
            if before.is_multiple_of(2) && self.sequence.load(Ordering::Relaxed) == before {
                return entry;
            }
            std::thread::yield_now();
        }
    }

    /// Changes words from an index on. One caller at a time: it holds the stripe's lock.
    fn store(&self, first: usize, words: impl Iterator<Item = u64>) {
        let sequence = self.sequence.load(Ordering::Relaxed);
        self.sequence.store(sequence + 1, Ordering::Relaxed);
        fence(Ordering::Release);
        for (place, word) in self.words.iter().skip(first).zip(words) {
            place.store(word, Ordering::Release);
        }
        self.sequence.store(sequence + 2, Ordering::Release);
    }
}

impl Mapping {
    /// Loads an L1 table of `l1_size` entries for a disk of `size` bytes; L2 tables may take `cache_bytes` of memory.
    pub fn load(
        file: &HostFile,
        geometry: Geometry,
        (l1_offset, l1_size): (HostOffset, u32),
        size: u64,
        cache_bytes: u64,
    ) -> Result<Mapping> {
        let l1 = L1 { offset: l1_offset, words: read_words(file, l1_offset, u64::from(l1_size) * 8)? };
        let slice_bytes = SLICE_BYTES.min(geometry.cluster_size());
        let tables_bytes = geometry.l1_entries_for(size).saturating_mul(geometry.cluster_size());
        // Not every set is as popular as the others: a small disk gets twice the places that it needs.
        let wanted = (tables_bytes / slice_bytes).saturating_mul(2);
        let sets = (wanted.min(cache_bytes / (slice_bytes + SLICE_OVERHEAD_BYTES)) as usize / WAYS).max(1);
        Ok(Mapping {
            geometry,
            l1: ArcSwap::from_pointee(l1),
            slice_bytes,
            places: (0..sets * WAYS).map(|_| ArcSwapOption::empty()).collect(),
            keys: (0..sets * WAYS).map(|_| AtomicU64::new(0)).collect(),
            stripes: (0..STRIPES).map(|_| Mutex::new(())).collect(),
        })
    }

    /// The run of bytes from `offset` on that have one source, at most `len` (not 0) bytes of it.
    pub fn run(&self, file: &HostFile, data: &HostFile, offset: u64, len: u64) -> Result<Run> {
        let mut recent = None;
        let look = |at: u64, recent: &mut Option<Held>| {
            let most = len - (at - offset);
            let piece = self.piece(file, data, at, recent)?;
            Ok::<_, Error>(Run { len: piece.len.min(most), ..piece })
        };
        let named = |e: Error, at| e.at_path(file.path()).at_offset(at);
        let mut run = look(offset, &mut recent).map_err(|e| named(e, offset))?;
        for _ in 0..MERGE_MAX {
            if run.len >= len || matches!(run.source, Source::Compressed(_)) {
                break;
            }
            // What is wrong behind the run is the matter of who asks for it.
            let Ok(next) = look(offset + run.len, &mut recent) else { break };
            let continues = match (run.source, next.source) {
                (Source::Data(first), Source::Data(second)) => first.0 + run.len == second.0,
                (one, other) => one == other,
            };
            if !continues {
                break;
            }
            run.len += next.len;
        }
        Ok(run)
    }

    /// What one entry says about `offset`, and for how long.
    fn piece(&self, file: &HostFile, data: &HostFile, offset: u64, recent: &mut Option<Held>) -> Result<Run> {
        let covers = self.geometry.l2_covers();
        let to_end_of_table = covers - offset % covers;
        let table = match self.table(offset)? {
            L1Entry::Unallocated => return Ok(Run { len: to_end_of_table, source: Source::Backing }),
            L1Entry::Table { offset, .. } => offset,
        };
        let entry = self.entry_in(file, table, offset, recent)?;
        self.run_of_entry(entry, file, data, offset)
    }

    /// The L1 entry for a guest offset.
    pub fn table(&self, offset: u64) -> Result<L1Entry> {
        let index = (offset / self.geometry.l2_covers()) as usize;
        match self.l1.load().words.get(index) {
            Some(word) => decode_l1(word.load(Ordering::Acquire), &self.geometry),
            None => Err(Error::new(errno::EIO, "qcow2 L1 table", "has no entry for this offset")),
        }
    }

    /// Where the entry for a guest offset lies: its slice's host offset, and the index of its first word there.
    fn place(&self, table: HostOffset, offset: u64) -> (u64, usize) {
        let index = offset / self.geometry.cluster_size() % self.geometry.l2_entries();
        let at = index * 8 * self.geometry.l2_entry_words();
        (table.0 + at / self.slice_bytes * self.slice_bytes, (at % self.slice_bytes / 8) as usize)
    }

    fn entry_in(&self, file: &HostFile, table: HostOffset, offset: u64, recent: &mut Option<Held>) -> Result<L2Entry> {
        let (raw, bitmap) = self.raw_entry_in(file, table, offset, recent)?;
        decode_l2(raw, bitmap, &self.geometry)
    }

    fn raw_entry_in(
        &self,
        file: &HostFile,
        table: HostOffset,
        offset: u64,
        recent: &mut Option<Held>,
    ) -> Result<RawEntry> {
        let (key, word) = self.place(table, offset);
        let is_wanted = |held: &Held| held.as_ref().is_some_and(|slice| slice.key == key);
        let held = match recent.take().filter(is_wanted) {
            Some(held) => held,
            None => self.slice(file, table, key)?,
        };
        let entry = held.as_ref().map_or((0, 0), |slice| slice.entry(word, self.geometry.extended_l2));
        *recent = Some(held);
        Ok(entry)
    }

    /// Guest bytes that one slice maps: changes of entries go by pieces of it.
    pub fn slice_covers(&self) -> u64 {
        self.slice_bytes / 8 / self.geometry.l2_entry_words() * self.geometry.cluster_size()
    }

    /// Gives `take` the raw entries of `count` clusters from the one at `offset` on, within one slice, each with its guest
    /// offset; zeros without a table.
    pub fn raw_entries(
        &self,
        file: &HostFile,
        offset: u64,
        count: u64,
        mut take: impl FnMut(u64, RawEntry) -> Result<()>,
    ) -> Result<()> {
        let table = self.table(offset)?;
        let mut recent = None;
        for at in (0..count).map(|i| offset + i * self.geometry.cluster_size()) {
            let entry = match table {
                L1Entry::Table { offset: table, .. } => self.raw_entry_in(file, table, at, &mut recent)?,
                L1Entry::Unallocated => (0, 0),
            };
            take(at, entry)?;
        }
        Ok(())
    }

    /// The host bytes for a write at `offset` that needs no change of the mapping, and how many: data in a cluster
    /// that is referred to once.
    pub fn own_run(
        &self,
        file: &HostFile,
        data: &HostFile,
        offset: u64,
        len: u64,
    ) -> Result<Option<(HostOffset, u64)>> {
        let mut recent = None;
        let mut found: Option<(HostOffset, u64)> = None;
        for _ in 0..MERGE_MAX {
            let done = found.map_or(0, |(_, len)| len);
            if done >= len {
                break;
            }
            let at = offset + done;
            let L1Entry::Table { offset: table, copied: true } = self.table(at)? else { break };
            let entry = self.entry_in(file, table, at, &mut recent)?;
            let (L2Entry::Standard { copied: true, offset: host }
            | L2Entry::Subclusters { copied: true, offset: Some(host), .. }) = entry
            else {
                break;
            };
            let piece = self.run_of_entry(entry, file, data, at)?;
            let Source::Data(place) = piece.source else { break };
            if found.is_some_and(|(first, len)| first.0 + len != place.0) {
                break;
            }
            if !self.geometry.external_data {
                data.check_not_table("a data cluster", host)?;
            }
            found = Some((found.map_or(place, |(first, _)| first), (done + piece.len).min(len)));
        }
        Ok(found)
    }

    /// Writes entries, from that of the cluster at `offset` on, within one slice of a table that is referred to once.
    pub fn update(&self, file: &HostFile, offset: u64, entries: impl Iterator<Item = RawEntry>) -> Result<()> {
        let L1Entry::Table { offset: table, .. } = self.table(offset)? else {
            return Err(Error::new(errno::EIO, "qcow2 L1 table", "has no table to change").at_offset(offset));
        };
        let (key, word) = self.place(table, offset);
        let mut bytes = Vec::with_capacity(entries.size_hint().0 * 16);
        for (raw, bitmap) in entries {
            bytes.extend_from_slice(&raw.to_be_bytes());
            if self.geometry.extended_l2 {
                bytes.extend_from_slice(&bitmap.to_be_bytes());
            }
        }
        let set = self.set(key);
        let _changing = self.stripes.get(set % STRIPES).map(Mutex::lock);
        if let Err(e) = file.write_at(&bytes, key + word as u64 * 8) {
            // Some of them may stand there all the same: only the file tells.
            self.drop_slice(set, key);
            return Err(e);
        }
        if let Some(slice) = self.find(set, key).as_ref().and_then(|held| held.as_ref()) {
            let (words, _) = bytes.as_chunks::<8>();
            slice.store(word, words.iter().map(|word| u64::from_be_bytes(*word)));
        }
        Ok(())
    }

    /// Changes an L1 entry. One caller at a time.
    pub fn set_table(&self, file: &HostFile, offset: u64, raw: u64) -> Result<()> {
        let index = offset / self.geometry.l2_covers();
        let l1 = self.l1.load();
        let Some(word) = l1.words.get(index as usize) else {
            return Err(Error::new(errno::EIO, "qcow2 L1 table", "has no entry for this offset").at_offset(offset));
        };
        let (now, written) = file.put(l1.offset.0 + index * 8, raw.to_be_bytes());
        if let Some(now) = now {
            word.store(u64::from_be_bytes(now), Ordering::Release);
        }
        written
    }

    /// The L1 table: where it lies, and its entries.
    pub fn l1(&self) -> (HostOffset, Vec<u64>) {
        let l1 = self.l1.load();
        (l1.offset, l1.words.iter().map(|word| word.load(Ordering::Acquire)).collect())
    }

    /// Goes over to an L1 table that was written elsewhere. Nobody changes entries meanwhile.
    pub fn move_l1(&self, offset: HostOffset, words: Vec<u64>) {
        self.l1.store(Arc::new(L1 { offset, words: words.into_iter().map(AtomicU64::new).collect() }));
    }

    /// Forgets what was loaded of an L2 table that lay where a new one was written.
    pub fn forget_table(&self, table: HostOffset) {
        for at in (0..self.geometry.cluster_size()).step_by(self.slice_bytes as usize) {
            let set = self.set(table.0 + at);
            let _changing = self.stripes.get(set % STRIPES).map(Mutex::lock);
            self.drop_slice(set, table.0 + at);
        }
    }

    /// Drops a slice from the cache. Called under the set's lock.
    fn drop_slice(&self, set: usize, key: u64) {
        for (way, its_key) in self.ways(set) {
            if way.load().as_ref().is_some_and(|slice| slice.key == key) {
                way.store(None);
                its_key.store(0, Ordering::Release);
            }
        }
    }

    fn run_of_entry(&self, entry: L2Entry, file: &HostFile, data: &HostFile, offset: u64) -> Result<Run> {
        let cluster_size = self.geometry.cluster_size();
        let in_cluster = offset % cluster_size;
        let whole = |source| Ok(Run { len: cluster_size - in_cluster, source });
        match entry {
            L2Entry::Unallocated => whole(Source::Backing),
            L2Entry::ZeroPlain | L2Entry::ZeroPreallocated { .. } => whole(Source::Zero),
            L2Entry::Standard { offset: host, .. } => {
                self.check_data(data, host, offset)?;
                whole(Source::Data(HostOffset(host.0 + in_cluster)))
            }
            L2Entry::Compressed(at) => {
                file.check("compressed data", at.offset, 1)?;
                whole(Source::Compressed(at))
            }
            L2Entry::Subclusters { offset: host, allocated, zero, .. } => {
                let subcluster_size = self.geometry.subcluster_size();
                let first = (in_cluster / subcluster_size) as u32;
                let (source, same) = match host {
                    Some(host) if allocated >> first & 1 == 1 => {
                        self.check_data(data, host, offset)?;
                        (Source::Data(HostOffset(host.0 + in_cluster)), allocated)
                    }
                    _ if zero >> first & 1 == 1 => (Source::Zero, zero),
                    _ => (Source::Backing, !(allocated | zero)),
                };
                let count = u64::from((same >> first).trailing_ones()).min(SUBCLUSTERS);
                let end = (u64::from(first) + count) * subcluster_size;
                Ok(Run { len: end - in_cluster, source })
            }
        }
    }

    /// A host cluster of data begins inside its file (the file may end in it), not in metadata; in an external data
    /// file it is where the guest has it.
    fn check_data(&self, data: &HostFile, host: HostOffset, offset: u64) -> Result<()> {
        let guest = offset - offset % self.geometry.cluster_size();
        if self.geometry.external_data && host.0 != guest {
            let why = format!("host offset {host} in the external data file is not the guest offset {guest}");
            return Err(Error::new(errno::EIO, "qcow2 L2 entry", why));
        }
        data.check("a data cluster", host, 1)
    }

    /// The set of places for a slice.
    fn set(&self, key: u64) -> usize {
        let sets = (self.places.len() / WAYS).max(1) as u64;
        // Tables lie at regular distances; the high bits of a multiple of 2^64 / phi spread them over the sets.
        let hash = (key / self.slice_bytes).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        ((hash * sets) >> 32) as usize
    }

    /// The places of a set, with their keys.
    fn ways(&self, set: usize) -> impl Iterator<Item = (&ArcSwapOption<Slice>, &AtomicU64)> {
        let range = set * WAYS..(set + 1) * WAYS;
        let places = self.places.get(range.clone()).unwrap_or_default();
        places.iter().zip(self.keys.get(range).unwrap_or_default())
    }

    fn find(&self, set: usize, key: u64) -> Option<Held> {
        self.ways(set).filter(|(_, here)| here.load(Ordering::Acquire) == key).find_map(|(way, _)| {
            let held = way.load();
            let slice = held.as_ref().filter(|slice| slice.key == key)?;
            // A plain look first: writing would take the cache line from the other readers.
            if !slice.used.load(Ordering::Relaxed) {
                slice.used.store(true, Ordering::Relaxed);
            }
            Some(held)
        })
    }

    /// The slice with host offset `key`, which is part of the L2 table at `table`.
    fn slice(&self, file: &HostFile, table: HostOffset, key: u64) -> Result<Held> {
        let set = self.set(key);
        if let Some(held) = self.find(set, key) {
            return Ok(held);
        }
        file.check("an L2 table", table, self.geometry.cluster_size())?;
        let _loading = self.stripes.get(set % STRIPES).map(Mutex::lock);
        if let Some(held) = self.find(set, key) {
            return Ok(held);
        }
        let words = read_words(file, HostOffset(key), self.slice_bytes)?;
        let slice = Arc::new(Slice { key, words, sequence: AtomicU64::new(0), used: AtomicBool::new(true) });
        if let Some((way, its_key)) = self.victim(set) {
            way.store(Some(slice.clone()));
            its_key.store(key, Ordering::Release);
        }
        Ok(Guard::from_inner(Some(slice)))
    }

    /// A free place, else one whose slice was not used since the last search, else any. Called under the set's lock.
    fn victim(&self, set: usize) -> Option<(&ArcSwapOption<Slice>, &AtomicU64)> {
        let is_idle = |(way, _): &(&ArcSwapOption<Slice>, &AtomicU64)| {
            way.load().as_ref().is_some_and(|slice| !slice.used.swap(false, Ordering::Relaxed))
        };
        let free = self.ways(set).find(|(_, key)| key.load(Ordering::Relaxed) == 0);
        free.or_else(|| self.ways(set).find(is_idle)).or_else(|| self.ways(set).next())
    }
}

#[cfg(all(test, not(feature = "shuttle")))]
#[path = "mapping_tests.rs"]
mod tests;
