//! A disk that can lose what was not synced: what a power loss may leave of a set of files.
//!
//! The model promises no more than POSIX does:
//! - every write falls apart into sectors of 512 bytes, and each sector has its versions since the last sync of its
//!   file. A power loss leaves any of them, each sector for itself, whatever the order of the writes was;
//! - a hole is a version like any other, so punched sectors may come back;
//! - the length is metadata of the file: any of its values since the last sync may survive, and what lies behind the
//!   surviving one is gone;
//! - names are durable when their directory was synced: until then a file that was made may vanish (with its synced
//!   content), one that was removed may come back, and a renamed one may lie under either name. Each such change
//!   survives or not for itself.
//!
//! A kill of the process loses nothing: the page cache outlives it. Times of files survive everything (the newest
//! ones), as does what a handle of before the crash still holds; only the new disk counts from there on.

use super::names::{Names, check_name};
use super::{BlockStatus, Dir, SharedStorage, Space, Stamp, Storage, clock, end_of};
use crate::error::Result;
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

const SECTOR_BYTES: u64 = 512;
/// Sectors in [`FileState::recent`] from which on a sync moves them into the base.
const RECENT_MAX: usize = 512;

/// Content of a sector; `None` is a hole.
type Content = Option<Arc<[u8; SECTOR_BYTES as usize]>>;

/// A set of files with what is not synced of them. Clones share it.
#[derive(Debug, Clone)]
pub struct CrashDisk(Arc<Mutex<Disk>>);

#[derive(Debug, Clone)]
struct Disk {
    files: BTreeMap<u64, FileState>,
    next_file: u64,
    /// Names as the program sees them.
    names: Names<u64>,
    /// Names that survive for certain, and the changes since, oldest first.
    durable_names: Names<u64>,
    changes: Vec<NameChange>,
}

#[derive(Debug, Clone)]
enum NameChange {
    Create(String, u64),
    Remove(String),
    Rename(String, String),
}

/// The durable version of something, then those since; the last one is what the program sees.
#[derive(Debug, Clone)]
struct Versions<T>(Vec<T>);

#[derive(Debug, Clone)]
struct FileState {
    /// Durable sectors, shared with the disks that were made of this one; holes are not stored.
    base: Arc<BTreeMap<u64, Arc<[u8; SECTOR_BYTES as usize]>>>,
    /// Sectors that changed since they were last put into `base`.
    recent: BTreeMap<u64, Versions<Content>>,
    len: Versions<u64>,
    changed_ns: i64,
}

/// A file of a [`CrashDisk`].
#[derive(Debug, Clone)]
pub struct CrashFile {
    disk: CrashDisk,
    file: u64,
    path: PathBuf,
}

/// A directory of a [`CrashDisk`].
#[derive(Debug, Clone)]
pub struct CrashDir {
    disk: CrashDisk,
    /// `""`, or the name of a subdirectory with a `/` behind it.
    prefix: String,
}

impl<T: Clone + PartialEq> Versions<T> {
    fn new(value: T) -> Self {
        Versions(vec![value])
    }

    fn now(&self) -> &T {
        // A `Versions` is made with one value and never emptied.
        &self.0[self.0.len() - 1]
    }

    fn push(&mut self, value: T) {
        if *self.now() != value {
            self.0.push(value);
        }
    }

    fn sync(&mut self) {
        self.0.drain(..self.0.len() - 1);
    }

    fn unsynced(&self) -> usize {
        self.0.len() - 1
    }

    /// Asks for one of the versions where there is a choice.
    fn survivor(&self, choose: &mut dyn FnMut(usize) -> usize) -> T {
        let index = if self.0.len() > 1 { choose(self.0.len()) } else { 0 };
        self.0[index].clone()
    }
}

impl FileState {
    fn new() -> Self {
        let (base, recent) = (Arc::default(), BTreeMap::new());
        FileState { base, recent, len: Versions::new(0), changed_ns: clock::now_coarse_ns() }
    }

    /// Notes a change: the clock, but never the same time twice.
    fn touch(&mut self) {
        self.changed_ns = clock::now_coarse_ns().max(self.changed_ns + 1);
    }

    fn content(&self, sector: u64) -> Content {
        match self.recent.get(&sector) {
            Some(versions) => versions.now().clone(),
            None => self.base.get(&sector).cloned(),
        }
    }

    fn put(&mut self, sector: u64, content: Content) {
        let base = &self.base;
        self.recent.entry(sector).or_insert_with(|| Versions::new(base.get(&sector).cloned())).push(content);
    }

    /// The first sector from `first` on that is stored, before `end`.
    fn next_stored(&self, first: u64, end: u64) -> Option<u64> {
        if first >= end {
            return None;
        }
        let recent = self.recent.range(first..end).find(|(_, versions)| versions.now().is_some());
        let base = self.base.range(first..end).find(|(sector, _)| !self.recent.contains_key(sector));
        [recent.map(|(sector, _)| *sector), base.map(|(sector, _)| *sector)].into_iter().flatten().min()
    }

    /// Changes some bytes of a sector.
    fn edit(&mut self, sector: u64, edit: impl FnOnce(&mut [u8; SECTOR_BYTES as usize])) {
        let mut bytes = self.content(sector).map_or([0; SECTOR_BYTES as usize], |bytes| *bytes);
        edit(&mut bytes);
        self.put(sector, Some(Arc::new(bytes)));
    }

    /// Makes a range zero: data, or holes where it covers sectors and `free` is set.
    fn zero(&mut self, start: u64, end: u64, free: bool) {
        if !free {
            for (sector, from, to) in sectors_of(start, end) {
                self.edit(sector, |bytes| bytes[from as usize..to as usize].fill(0));
            }
            return;
        }
        if start >= end {
            return;
        }
        let mut at = start / SECTOR_BYTES;
        while let Some(sector) = self.next_stored(at, end.div_ceil(SECTOR_BYTES)) {
            let base = sector * SECTOR_BYTES;
            let (from, to) = (start.max(base) - base, end.min(base + SECTOR_BYTES) - base);
            if to - from == SECTOR_BYTES {
                self.put(sector, None);
            } else {
                self.edit(sector, |bytes| bytes[from as usize..to as usize].fill(0));
            }
            at = sector + 1;
        }
    }

    fn set_len(&mut self, len: u64) {
        let old_len = *self.len.now();
        self.zero(len, old_len, true);
        self.len.push(len);
    }

    fn sync(&mut self) {
        self.recent.values_mut().for_each(Versions::sync);
        self.len.sync();
        if self.recent.len() >= RECENT_MAX {
            let base = Arc::make_mut(&mut self.base);
            for (sector, versions) in std::mem::take(&mut self.recent) {
                match versions.now() {
                    Some(bytes) => base.insert(sector, bytes.clone()),
                    None => base.remove(&sector),
                };
            }
        }
    }

    fn unsynced(&self) -> usize {
        self.len.unsynced() + self.recent.values().map(Versions::unsynced).sum::<usize>()
    }

    fn survivor(&self, choose: &mut dyn FnMut(usize) -> usize) -> FileState {
        let len = self.len.survivor(choose);
        let (base, recent) = (self.base.clone(), BTreeMap::new());
        let mut state = FileState { base, recent, len: Versions::new(len), changed_ns: self.changed_ns };
        let mut put = |sector: u64, content: Content| {
            let inside = len.saturating_sub(sector * SECTOR_BYTES).min(SECTOR_BYTES) as usize;
            let content = content.filter(|_| inside > 0).map(|mut bytes| {
                if inside < SECTOR_BYTES as usize {
                    Arc::make_mut(&mut bytes)[inside..].fill(0);
                }
                bytes
            });
            state.recent.insert(sector, Versions::new(content));
        };
        for (sector, bytes) in self.base.range(len / SECTOR_BYTES..) {
            put(*sector, Some(bytes.clone()));
        }
        for (sector, versions) in &self.recent {
            put(*sector, versions.survivor(choose));
        }
        state
    }

    /// Mixes what the file holds into `hash`: equal for equal content over one base.
    fn hash(&self, hash: &mut u64) {
        let mut add = |word: u64| {
            let mut state = *hash ^ word;
            *hash = split_mix(&mut state);
        };
        add(*self.len.now());
        add(Arc::as_ptr(&self.base).addr() as u64);
        for (sector, versions) in &self.recent {
            add(*sector);
            match versions.now() {
                None => add(0),
                Some(bytes) => bytes.as_chunks().0.iter().for_each(|word| add(u64::from_le_bytes(*word))),
            }
        }
    }
}

/// Cuts a range at sector borders: number of the sector, and first and past-the-last byte in it.
fn sectors_of(start: u64, end: u64) -> impl Iterator<Item = (u64, u64, u64)> {
    let numbers = if start < end { start / SECTOR_BYTES..(end - 1) / SECTOR_BYTES + 1 } else { 0..0 };
    numbers.map(move |sector| {
        let base = sector * SECTOR_BYTES;
        (sector, start.max(base) - base, end.min(base + SECTOR_BYTES) - base)
    })
}

impl NameChange {
    /// Does it to `names`; where what it builds on did not survive, it has no effect.
    fn apply(&self, names: &mut Names<u64>) {
        let _ = match self {
            NameChange::Create(name, file) => names.create(name, *file),
            NameChange::Remove(name) => {
                names.remove(name);
                Ok(())
            }
            NameChange::Rename(from, to) => names.rename(from, to),
        };
    }

    fn is_below(&self, prefix: &str) -> bool {
        match self {
            NameChange::Create(name, _) | NameChange::Remove(name) => name.starts_with(prefix),
            NameChange::Rename(from, to) => from.starts_with(prefix) && to.starts_with(prefix),
        }
    }
}

impl Disk {
    fn file(&mut self, file: u64) -> &mut FileState {
        self.files.entry(file).or_insert_with(FileState::new)
    }

    fn new_file(&mut self) -> u64 {
        self.next_file += 1;
        self.files.insert(self.next_file, FileState::new());
        self.next_file
    }

    fn change(&mut self, change: NameChange) {
        change.apply(&mut self.names);
        self.changes.push(change);
    }

    /// What a power loss leaves, with every choice made by `choose`: it gets a count and answers an index below it.
    fn survivor(&self, choose: &mut dyn FnMut(usize) -> usize) -> Disk {
        let mut names = self.durable_names.clone();
        for change in &self.changes {
            if choose(2) == 1 {
                change.apply(&mut names);
            }
        }
        let files = self.files.iter().map(|(file, state)| (*file, state.survivor(choose)));
        let mut files: BTreeMap<_, _> = files.collect();
        let named: Vec<u64> = names.files().copied().collect();
        files.retain(|file, _| named.contains(file));
        Disk { files, next_file: self.next_file, durable_names: names.clone(), names, changes: Vec::new() }
    }

    fn unsynced(&self) -> usize {
        self.changes.len() + self.files.values().map(FileState::unsynced).sum::<usize>()
    }
}

impl CrashDisk {
    /// A disk without files.
    pub fn new() -> Self {
        let (names, durable_names) = (Names::new(), Names::new());
        CrashDisk::with(Disk { files: BTreeMap::new(), next_file: 0, names, durable_names, changes: Vec::new() })
    }

    fn with(disk: Disk) -> Self {
        CrashDisk(Arc::new(Mutex::new(disk)))
    }

    /// Opens a file. An absent one is made, and is there for good at once: it stands for what was there before.
    pub fn open(&self, name: &str) -> Result<CrashFile> {
        check_name(name, false)?;
        let mut disk = self.0.lock();
        if !disk.names.exists(name) {
            let file = disk.new_file();
            disk.names.create(name, file)?;
            disk.durable_names.create(name, file)?;
        }
        let file = *disk.names.file(name)?;
        Ok(CrashFile { disk: self.clone(), file, path: PathBuf::from(name) })
    }

    /// The directory `sub` (`""`: the disk's own), which need not exist: it is made with the first file in it.
    pub fn dir(&self, sub: &str) -> CrashDir {
        let prefix = if sub.is_empty() { String::new() } else { format!("{sub}/") };
        CrashDir { disk: self.clone(), prefix }
    }

    /// Versions of sectors, lengths and names that a power loss could take back.
    pub fn unsynced(&self) -> usize {
        self.0.lock().unsynced()
    }

    /// The disk after a kill of the process: all that was written is there, and what was not synced still is not.
    pub fn kill(&self) -> CrashDisk {
        CrashDisk::with(self.0.lock().clone())
    }

    /// A disk as a power loss may leave this one. Equal seeds make equal choices.
    pub fn survivors(&self, seed: u64) -> CrashDisk {
        let mut random = seed;
        CrashDisk::with(self.0.lock().survivor(&mut |count| (split_mix(&mut random) % count as u64) as usize))
    }

    /// Equal for disks that hold the same, made of one disk between two syncs. Names are not looked at.
    pub fn fingerprint(&self) -> u64 {
        let mut hash = 0;
        for (file, state) in &self.0.lock().files {
            hash ^= file;
            state.hash(&mut hash);
        }
        hash
    }

    /// Every disk that a power loss may leave; `None` where there are more than `max_unsynced` things to lose (up to
    /// two to that power many disks).
    pub fn exhaustive(&self, max_unsynced: usize) -> Option<impl Iterator<Item = CrashDisk> + use<>> {
        let disk = self.0.lock().clone();
        if disk.unsynced() > max_unsynced {
            return None;
        }
        let mut counts = Vec::new();
        disk.survivor(&mut |count| {
            counts.push(count);
            0
        });
        let mut next = Some(vec![0; counts.len()]);
        Some(std::iter::from_fn(move || {
            let choices = next.take()?;
            next = successor(&choices, &counts);
            let mut choices = choices.into_iter();
            Some(CrashDisk::with(disk.survivor(&mut |_| choices.next().unwrap_or(0))))
        }))
    }
}

impl Default for CrashDisk {
    fn default() -> Self {
        Self::new()
    }
}

/// The next combination of choices, `None` after the last: a counter whose digits have bases of their own.
fn successor(choices: &[usize], counts: &[usize]) -> Option<Vec<usize>> {
    let digit = choices.iter().zip(counts).position(|(choice, count)| choice + 1 < *count)?;
    let mut next = choices.to_vec();
    next[..digit].fill(0);
    next[digit] += 1;
    Some(next)
}

/// splitmix64: each call moves the state on and answers a well-mixed number.
fn split_mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut mixed = *state;
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    mixed ^ (mixed >> 31)
}

impl CrashFile {
    /// The file as the trait object that the other layers take.
    pub fn shared(&self) -> SharedStorage {
        Arc::new(self.clone())
    }

    fn with<R>(&self, work: impl FnOnce(&mut FileState) -> R) -> R {
        work(self.disk.0.lock().file(self.file))
    }

    fn zero(&self, what: &str, offset: u64, len: u64, free: bool) -> Result<()> {
        let end = end_of(what, &self.path, offset, len)?;
        self.with(|state| {
            state.zero(offset, end.min(*state.len.now()), free);
            state.touch();
        });
        Ok(())
    }
}

impl Storage for CrashFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let end = end_of("read", &self.path, offset, buf.len() as u64)?;
        self.with(|state| {
            let mut rest = buf;
            for (sector, from, to) in sectors_of(offset, end) {
                let (piece, behind) = rest.split_at_mut((to - from) as usize);
                match state.content(sector) {
                    Some(bytes) => piece.copy_from_slice(&bytes[from as usize..to as usize]),
                    None => piece.fill(0),
                }
                rest = behind;
            }
        });
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        let end = end_of("write", &self.path, offset, buf.len() as u64)?;
        if buf.is_empty() {
            return Ok(());
        }
        self.with(|state| {
            let mut rest = buf;
            for (sector, from, to) in sectors_of(offset, end) {
                let (piece, behind) = rest.split_at((to - from) as usize);
                state.edit(sector, |bytes| bytes[from as usize..to as usize].copy_from_slice(piece));
                rest = behind;
            }
            let len = end.max(*state.len.now());
            state.len.push(len);
            state.touch();
        });
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        self.with(FileState::sync);
        Ok(())
    }

    fn sync_len(&self) -> Result<()> {
        self.with(|state| state.len.sync());
        Ok(())
    }

    fn len(&self) -> Result<u64> {
        Ok(self.with(|state| *state.len.now()))
    }

    fn set_len(&self, len: u64) -> Result<()> {
        end_of("resize", &self.path, len, 0)?;
        self.with(|state| {
            state.set_len(len);
            state.touch();
        });
        Ok(())
    }

    fn punch_hole(&self, offset: u64, len: u64) -> Result<()> {
        self.zero("punch a hole in", offset, len, true)
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        self.zero("write zeros to", offset, len, false)
    }

    fn block_status(&self, offset: u64, len: u64) -> Result<BlockStatus> {
        let end = end_of("block status of", &self.path, offset, len)?;
        let first = offset / SECTOR_BYTES;
        self.with(|state| {
            let zero = state.content(first).is_none();
            let behind = end.div_ceil(SECTOR_BYTES);
            let border = if zero {
                state.next_stored(first, behind).unwrap_or(behind)
            } else {
                (first..behind).find(|sector| state.content(*sector).is_none()).unwrap_or(behind)
            };
            Ok(BlockStatus { len: border.saturating_mul(SECTOR_BYTES).min(end) - offset, zero })
        })
    }

    fn stamp(&self) -> Result<Stamp> {
        Ok(self.with(|state| Stamp {
            dev: 0,
            ino: self.file,
            size: *state.len.now(),
            mtime_ns: state.changed_ns,
            ctime_ns: state.changed_ns,
        }))
    }

    fn path(&self) -> &Path {
        &self.path
    }
}

impl CrashDir {
    fn full(&self, name: &str) -> Result<String> {
        check_name(name, false)?;
        Ok(format!("{}{name}", self.prefix))
    }

    fn hand_out(&self, name: &str, file: u64) -> SharedStorage {
        Arc::new(CrashFile { disk: self.disk.clone(), file, path: PathBuf::from(name) })
    }
}

impl Dir for CrashDir {
    fn open(&self, name: &str) -> Result<SharedStorage> {
        let name = self.full(name)?;
        let file = *self.disk.0.lock().names.file(&name)?;
        Ok(self.hand_out(&name, file))
    }

    fn create(&self, name: &str) -> Result<SharedStorage> {
        let name = self.full(name)?;
        let mut disk = self.disk.0.lock();
        let file = disk.new_file();
        disk.names.create(&name, file)?;
        disk.changes.push(NameChange::Create(name.clone(), file));
        Ok(self.hand_out(&name, file))
    }

    fn exists(&self, name: &str) -> Result<bool> {
        Ok(self.disk.0.lock().names.exists(&self.full(name)?))
    }

    fn remove(&self, name: &str) -> Result<()> {
        let name = self.full(name)?;
        let mut disk = self.disk.0.lock();
        if disk.names.exists(&name) {
            disk.change(NameChange::Remove(name));
        }
        Ok(())
    }

    fn rename(&self, from: &str, to: &str) -> Result<()> {
        let (from, to) = (self.full(from)?, self.full(to)?);
        let mut disk = self.disk.0.lock();
        disk.names.rename(&from, &to)?;
        disk.changes.push(NameChange::Rename(from, to));
        Ok(())
    }

    fn list(&self, sub: &str) -> Result<Vec<String>> {
        check_name(sub, true)?;
        Ok(self.disk.0.lock().names.list(format!("{}{sub}", self.prefix).trim_end_matches('/')))
    }

    fn sync(&self) -> Result<()> {
        let mut disk = self.disk.0.lock();
        let changes = std::mem::take(&mut disk.changes);
        let (mine, others) = changes.into_iter().partition(|change| change.is_below(&self.prefix));
        let mine: Vec<NameChange> = mine;
        mine.iter().for_each(|change| change.apply(&mut disk.durable_names));
        disk.changes = others;
        Ok(())
    }

    fn space(&self) -> Result<Space> {
        Ok(Space { total: 1 << 40, free: 1 << 40 })
    }

    fn path(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("{}{name}", self.prefix))
    }
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests {
    use super::*;
    use crate::error::errno;
    use crate::storage::MemFile;
    use crate::storage::dir::check_dir;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn read(storage: &dyn Storage, offset: u64, len: usize) -> Vec<u8> {
        let mut buf = vec![0xEE; len];
        storage.read_at(&mut buf, offset).unwrap();
        buf
    }

    /// First byte of each of the first `count` sectors, and the length, of every disk that may be left.
    fn outcomes(disk: &CrashDisk, name: &str, count: u64) -> BTreeSet<(Vec<u8>, u64)> {
        let disks = disk.exhaustive(12).unwrap();
        disks
            .map(|left| {
                let file = left.open(name).unwrap();
                let sectors = (0..count).map(|sector| read(&file, sector * SECTOR_BYTES, 1)[0]).collect();
                (sectors, file.len().unwrap())
            })
            .collect()
    }

    #[test]
    fn what_moved_into_the_base_stays_what_it_was() {
        let disk = CrashDisk::new();
        let file = disk.open("f").unwrap();
        let sectors = 2 * RECENT_MAX as u64;
        for sector in 0..sectors {
            file.write_at(&[sector as u8 | 1; 512], sector * 512).unwrap();
        }
        file.sync().unwrap();
        let before = disk.kill();
        file.punch_hole(512, 1024).unwrap();
        file.write_at(&[200; 512], 5 * 512).unwrap();
        assert_eq!(disk.unsynced(), 3);
        let prints: BTreeSet<_> = disk.exhaustive(3).unwrap().map(|left| left.fingerprint()).collect();
        assert_eq!(prints.len(), 8);
        assert!(prints.contains(&disk.fingerprint()));
        file.sync().unwrap();
        file.set_len((sectors - 1) * 512 + 100).unwrap();
        let tails: BTreeSet<_> = disk
            .exhaustive(2)
            .unwrap()
            .map(|left| {
                let file = left.open("f").unwrap();
                (read(&file, (sectors - 1) * 512 + 99, 2), file.len().unwrap() % 512, read(&file, 5 * 512, 1)[0])
            })
            .collect();
        let cut = (vec![255, 0], 100, 200);
        assert_eq!(tails, BTreeSet::from([cut, (vec![255, 0], 0, 200), (vec![255, 255], 0, 200)]));
        assert_eq!(read(&before.open("f").unwrap(), 512, 1), [1]);
        assert_eq!(file.block_status(0, 4096).unwrap(), BlockStatus { len: 512, zero: false });
        assert_eq!(file.block_status(512, 4096).unwrap(), BlockStatus { len: 1024, zero: true });
    }

    #[test]
    fn directories_keep_the_contract() {
        check_dir(&CrashDisk::new().dir(""));
        check_dir(&CrashDisk::new().dir("vda.raw.fleece"));
    }

    #[test]
    fn each_unsynced_sector_keeps_any_of_its_versions() {
        let disk = CrashDisk::new();
        let file = disk.open("f").unwrap();
        file.write_at(&[1; 1024], 0).unwrap();
        file.sync().unwrap();
        assert_eq!(disk.unsynced(), 0);
        assert_eq!(outcomes(&disk, "f", 2), BTreeSet::from([(vec![1, 1], 1024)]));
        file.write_at(&[2; 1024], 0).unwrap();
        file.write_at(&[3; 512], 0).unwrap();
        let expected = [1, 2, 3].into_iter().flat_map(|a| [1, 2].map(|b| (vec![a, b], 1024)));
        assert_eq!(outcomes(&disk, "f", 2), expected.collect());
        file.sync().unwrap();
        assert_eq!(outcomes(&disk, "f", 2), BTreeSet::from([(vec![3, 2], 1024)]));
        file.punch_hole(0, 512).unwrap();
        assert_eq!(outcomes(&disk, "f", 2), BTreeSet::from([(vec![0, 2], 1024), (vec![3, 2], 1024)]));
    }

    #[test]
    fn the_length_survives_for_itself() {
        let disk = CrashDisk::new();
        let file = disk.open("f").unwrap();
        file.write_at(&[1; 512], 0).unwrap();
        file.sync().unwrap();
        file.write_at(&[2; 512], 512).unwrap();
        let expected = [(vec![1, 0], 512), (vec![1, 0], 1024), (vec![1, 2], 1024)];
        assert_eq!(outcomes(&disk, "f", 2), BTreeSet::from(expected));
        file.sync().unwrap();
        file.set_len(256).unwrap();
        let left: BTreeSet<_> = disk
            .exhaustive(10)
            .unwrap()
            .map(|left| {
                let file = left.open("f").unwrap();
                let len = file.len().unwrap();
                file.set_len(1024).unwrap();
                (len, read(&file, 0, 257)[255..].to_vec(), read(&file, 512, 1)[0])
            })
            .collect();
        assert!(left.contains(&(256, vec![1, 0], 0)) && left.contains(&(1024, vec![1, 1], 2)));
        assert!(left.iter().all(|(len, bytes, last)| *len > 256 || (bytes[1] == 0 && *last == 0)), "{left:?}");
    }

    #[test]
    fn a_length_can_be_durable_before_the_content_is() {
        let disk = CrashDisk::new();
        let file = disk.open("f").unwrap();
        file.write_at(&[1; 512], 0).unwrap();
        file.sync().unwrap();
        file.write_at(&[2; 512], 0).unwrap();
        file.set_len(1024).unwrap();
        file.sync_len().unwrap();
        assert_eq!(outcomes(&disk, "f", 2), BTreeSet::from([(vec![1, 0], 1024), (vec![2, 0], 1024)]));
    }

    #[test]
    fn seeds_reach_every_outcome_and_repeat_themselves() {
        let disk = CrashDisk::new();
        let file = disk.open("f").unwrap();
        file.write_at(&[1; 1536], 0).unwrap();
        file.sync().unwrap();
        file.write_at(&[2; 1536], 0).unwrap();
        let left = |seed| read(&disk.survivors(seed).open("f").unwrap(), 0, 1536);
        let seen: BTreeSet<_> = (0..200).map(left).collect();
        assert_eq!(seen.len(), 8);
        assert_eq!(left(5), left(5));
        assert!(disk.exhaustive(2).is_none());
        assert_eq!(disk.exhaustive(3).unwrap().count(), 8);
    }

    #[test]
    fn what_survived_is_durable() {
        let disk = CrashDisk::new();
        let dir = disk.dir("state");
        dir.create("f").unwrap().write_at(&[1; 512], 0).unwrap();
        for seed in 0..20 {
            let left = disk.survivors(seed);
            assert_eq!(left.unsynced(), 0);
            assert_eq!(left.exhaustive(0).unwrap().count(), 1);
        }
    }

    #[test]
    fn a_kill_loses_nothing_and_syncs_nothing() {
        let disk = CrashDisk::new();
        let file = disk.open("f").unwrap();
        file.write_at(&[1; 512], 0).unwrap();
        let killed = disk.kill();
        assert_eq!(killed.unsynced(), disk.unsynced());
        let again = killed.open("f").unwrap();
        assert_eq!(read(&again, 0, 512), [1; 512]);
        file.write_at(&[2; 512], 0).unwrap();
        assert_eq!(read(&again, 0, 512), [1; 512], "the killed process writes no more");
        assert!((0..50).any(|seed| killed.survivors(seed).open("f").unwrap().is_empty().unwrap()));
    }

    /// The names in a subdirectory of every disk that may be left.
    fn names_left(disk: &CrashDisk, sub: &str) -> BTreeSet<Vec<String>> {
        disk.exhaustive(12).unwrap().map(|left| left.dir(sub).list("").unwrap()).collect()
    }

    #[test]
    fn names_are_durable_after_their_directory_was_synced() {
        let disk = CrashDisk::new();
        let (dir, other) = (disk.dir("state"), disk.dir("other"));
        let file = dir.create("new").unwrap();
        file.write_at(b"x", 0).unwrap();
        file.sync().unwrap();
        other.create("o").unwrap();
        assert!(names_left(&disk, "state").contains(&vec![]), "synced content, but no name");
        other.sync().unwrap();
        assert!(names_left(&disk, "state").contains(&vec![]), "another directory was synced");
        dir.sync().unwrap();
        assert_eq!(names_left(&disk, "state"), BTreeSet::from([vec!["new".to_owned()]]));

        dir.rename("new", "renamed").unwrap();
        let either = [vec!["new".to_owned()], vec!["renamed".to_owned()]];
        assert_eq!(names_left(&disk, "state"), BTreeSet::from(either));
        dir.sync().unwrap();
        dir.remove("renamed").unwrap();
        assert_eq!(names_left(&disk, "state"), BTreeSet::from([vec![], vec!["renamed".to_owned()]]));
        let back = disk.exhaustive(1).unwrap().find(|left| left.dir("state").exists("renamed").unwrap()).unwrap();
        assert_eq!(read(&back.open("state/renamed").unwrap(), 0, 1), b"x");
        dir.sync().unwrap();
        assert_eq!(names_left(&disk, "state"), BTreeSet::from([vec![]]));
        assert_eq!(disk.kill().dir("state").open("renamed").unwrap_err().errno(), errno::ENOENT);
    }

    #[test]
    fn a_replaced_file_is_the_old_or_the_new_one() {
        let disk = CrashDisk::new();
        disk.open("s/f").unwrap().write_at(b"old", 0).unwrap();
        disk.open("s/f").unwrap().sync().unwrap();
        let dir = disk.dir("s");
        let new = dir.create("f.new").unwrap();
        new.write_at(b"new", 0).unwrap();
        new.sync().unwrap();
        dir.rename("f.new", "f").unwrap();
        let left: BTreeSet<_> =
            disk.exhaustive(4).unwrap().map(|left| read(&left.open("s/f").unwrap(), 0, 3)).collect();
        assert_eq!(left, BTreeSet::from([b"old".to_vec(), b"new".to_vec()]));
    }

    #[derive(Debug, Clone)]
    enum Op {
        Write(u64, usize, u8),
        Punch(u64, u64),
        Zero(u64, u64),
        SetLen(u64),
        Sync,
    }

    fn ops() -> impl Strategy<Value = Vec<Op>> {
        let place = 0..4000u64;
        let op = prop_oneof![
            (place.clone(), 1..2000usize, 1..=255u8).prop_map(|(o, l, b)| Op::Write(o, l, b)),
            (place.clone(), 1..2000u64).prop_map(|(o, l)| Op::Punch(o, l)),
            (place.clone(), 1..2000u64).prop_map(|(o, l)| Op::Zero(o, l)),
            place.prop_map(Op::SetLen),
            Just(Op::Sync),
        ];
        proptest::collection::vec(op, 1..16)
    }

    proptest! {
        /// Before a crash it is a file like any other; after one every sector is of some moment since the last sync.
        #[test]
        fn survivors_are_made_of_what_was_once_there(ops in ops(), seed: u64) {
            let disk = CrashDisk::new();
            let file = disk.open("f").unwrap();
            let plain = MemFile::new("f", 0);
            let mut moments = vec![(vec![0; 8192], 0)];
            for op in ops {
                for storage in [&file as &dyn Storage, &plain] {
                    match op {
                        Op::Write(offset, len, byte) => storage.write_at(&vec![byte; len], offset),
                        Op::Punch(offset, len) => storage.punch_hole(offset, len),
                        Op::Zero(offset, len) => storage.write_zeroes(offset, len),
                        Op::SetLen(len) => storage.set_len(len),
                        Op::Sync => storage.sync(),
                    }.unwrap();
                }
                let content = read(&file, 0, 8192);
                prop_assert!(content == read(&plain, 0, 8192));
                prop_assert_eq!(file.len().unwrap(), plain.len().unwrap());
                let mut at = 0;
                while at < 8192 {
                    let run = file.block_status(at, 8192 - at).unwrap();
                    prop_assert!(run.len >= 1);
                    prop_assert!(!run.zero || content[at as usize..(at + run.len) as usize].iter().all(|b| *b == 0));
                    at += run.len;
                }
                if matches!(op, Op::Sync) {
                    moments.clear();
                }
                moments.push((content, file.len().unwrap()));
            }
            let left = disk.survivors(seed).open("f").unwrap();
            let len = left.len().unwrap();
            prop_assert!(moments.iter().any(|(_, l)| *l == len));
            let bytes = read(&left, 0, 8192);
            prop_assert!(bytes[len as usize..].iter().all(|b| *b == 0));
            for (sector, from, to) in sectors_of(0, len) {
                let place = (sector * SECTOR_BYTES + from) as usize..(sector * SECTOR_BYTES + to) as usize;
                prop_assert!(moments.iter().any(|(content, _)| content[place.clone()] == bytes[place.clone()]));
            }
        }
    }
}
