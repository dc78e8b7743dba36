//! What reaches the medium, change by change, and media as they are when it stops in between.
//!
//! An instant is a number of changes: at instant n the first n of them have happened. Syncs count as changes.

use crate::driver::Files;
use crate::images::{DATA, IMAGE, Prepared, SECTOR};
use fleecefs::error::Result;
use fleecefs::storage::crash::CrashDisk;
use fleecefs::storage::{BlockStatus, SharedStorage, Stamp, Storage};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};

#[derive(Debug, Clone)]
enum Change {
    Write(u64, Vec<u8>),
    SetLen(u64),
    Punch(u64, u64),
    Zero(u64, u64),
    Sync,
    SyncLen,
}

/// A change of a file.
#[derive(Debug, Clone)]
pub struct Event {
    file: &'static str,
    change: Change,
}

impl std::fmt::Display for Event {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: ", self.file)?;
        match &self.change {
            Change::Write(offset, bytes) => {
                write!(f, "write of {} at {offset}: {:x?}", bytes.len(), &bytes[..bytes.len().min(24)])
            }
            other => write!(f, "{other:?}"),
        }
    }
}

/// The changes of the files of one image, in order.
#[derive(Debug, Clone, Default)]
pub struct Log(Arc<Mutex<Vec<Event>>>);

impl Log {
    fn lock(&self) -> MutexGuard<'_, Vec<Event>> {
        self.0.lock().unwrap()
    }

    /// The instant of now.
    pub fn now(&self) -> usize {
        self.lock().len()
    }

    /// All changes so far.
    pub fn events(&self) -> Vec<Event> {
        self.lock().clone()
    }

    /// Files that note their changes here.
    pub fn watch(&self, files: &Files, direct: bool) -> Files {
        let watched = |inner: &SharedStorage, file| -> SharedStorage {
            Arc::new(Watched { inner: inner.clone(), file, log: self.clone(), direct })
        };
        Files { image: watched(&files.image, IMAGE), data: files.data.as_ref().map(|data| watched(data, DATA)) }
    }
}

/// A file that notes its changes.
#[derive(Debug)]
struct Watched {
    inner: SharedStorage,
    file: &'static str,
    log: Log,
    direct: bool,
}

impl Watched {
    /// Does a change and notes it, in one step for everybody else.
    fn note(&self, change: impl FnOnce() -> Change, work: impl FnOnce(&dyn Storage) -> Result<()>) -> Result<()> {
        let mut log = self.log.lock();
        work(&*self.inner)?;
        log.push(Event { file: self.file, change: change() });
        Ok(())
    }

    /// What O_DIRECT asks of a transfer.
    #[track_caller]
    fn check(&self, address: usize, offset: u64, len: u64, may_end_file: bool) {
        let sector = SECTOR as u64;
        let at_end = || may_end_file && self.inner.len().is_ok_and(|end| offset + len == end);
        let whole = len.is_multiple_of(sector) || at_end();
        let aligned = offset.is_multiple_of(sector) && (address as u64).is_multiple_of(sector);
        assert!(!self.direct || whole && aligned, "{len} bytes at {offset} of {}, memory at {address:#x}", self.file);
    }
}

impl Storage for Watched {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.check(buf.as_ptr().addr(), offset, buf.len() as u64, false);
        self.inner.read_at(buf, offset)
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.check(buf.as_ptr().addr(), offset, buf.len() as u64, true);
        self.note(|| Change::Write(offset, buf.to_vec()), |inner| inner.write_at(buf, offset))
    }
    fn sync(&self) -> Result<()> {
        self.note(|| Change::Sync, |inner| inner.sync())?;
        // What others write until this returns is not synced.
        std::thread::yield_now();
        Ok(())
    }
    fn sync_len(&self) -> Result<()> {
        if self.direct { self.sync() } else { self.note(|| Change::SyncLen, |inner| inner.sync_len()) }
    }
    fn len(&self) -> Result<u64> {
        self.inner.len()
    }
    fn set_len(&self, len: u64) -> Result<()> {
        self.note(|| Change::SetLen(len), |inner| inner.set_len(len))
    }
    fn punch_hole(&self, offset: u64, len: u64) -> Result<()> {
        self.check(0, offset, len, true);
        self.note(|| Change::Punch(offset, len), |inner| inner.punch_hole(offset, len))
    }
    fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        self.check(0, offset, len, true);
        self.note(|| Change::Zero(offset, len), |inner| inner.write_zeroes(offset, len))
    }
    fn block_status(&self, offset: u64, len: u64) -> Result<BlockStatus> {
        self.inner.block_status(offset, len)
    }
    fn stamp(&self) -> Result<Stamp> {
        self.inner.stamp()
    }
    fn alignment(&self) -> u64 {
        if self.direct { SECTOR as u64 } else { 1 }
    }
    fn path(&self) -> &Path {
        self.inner.path()
    }
}

/// A medium that can lose what was not synced, with the files of one image.
#[derive(Debug, Clone)]
pub struct Medium {
    disk: CrashDisk,
    has_data: bool,
}

impl Medium {
    /// The files of an image, durable.
    pub fn of(prepared: &Prepared) -> Medium {
        let medium = Medium { disk: CrashDisk::new(), has_data: prepared.data.is_some() };
        let files = prepared.files();
        let own = medium.files();
        let pairs = [(Some(files.image), Some(own.image)), (files.data, own.data)];
        for (from, to) in pairs.into_iter().filter_map(|(from, to)| from.zip(to)) {
            let len = from.len().unwrap();
            to.set_len(len).unwrap();
            let mut at = 0;
            while at < len {
                let run = from.block_status(at, len - at).unwrap();
                if !run.zero {
                    let mut bytes = vec![0; run.len as usize];
                    from.read_at(&mut bytes, at).unwrap();
                    to.write_at(&bytes, at).unwrap();
                }
                at += run.len;
            }
            to.sync().unwrap();
        }
        medium
    }

    pub fn files(&self) -> Files {
        let open = |name| self.disk.open(name).unwrap().shared();
        Files { image: open(IMAGE), data: self.has_data.then(|| open(DATA)) }
    }

    /// Makes all of it durable.
    pub fn sync(&self) {
        let files = self.files();
        [Some(files.image), files.data].into_iter().flatten().for_each(|file| file.sync().unwrap());
    }

    /// Does a change.
    pub fn apply(&self, event: &Event) {
        let file = self.disk.open(event.file).unwrap();
        match &event.change {
            Change::Write(offset, bytes) => file.write_at(bytes, *offset),
            Change::SetLen(len) => file.set_len(*len),
            Change::Punch(offset, len) => file.punch_hole(*offset, *len),
            Change::Zero(offset, len) => file.write_zeroes(*offset, *len),
            Change::Sync => file.sync(),
            Change::SyncLen => file.sync_len(),
        }
        .unwrap();
    }

    /// A copy, as after a kill of the process: nothing is lost.
    pub fn kill(&self) -> Medium {
        self.with(self.disk.kill())
    }

    /// What a power loss may leave; equal seeds choose equally.
    pub fn survivor(&self, seed: u64) -> Medium {
        self.with(self.disk.survivors(seed))
    }

    /// All that a power loss may leave, where at most `max_unsynced` things can be lost.
    pub fn all_survivors(&self, max_unsynced: usize) -> Option<impl Iterator<Item = Medium>> {
        Some(self.disk.exhaustive(max_unsynced)?.map(|disk| self.with(disk)))
    }

    /// Two media with one fingerprint hold the same, as long as this one was not synced in between.
    pub fn fingerprint(&self) -> u64 {
        self.disk.fingerprint()
    }

    fn with(&self, disk: CrashDisk) -> Medium {
        Medium { disk, has_data: self.has_data }
    }
}
