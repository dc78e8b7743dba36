//! A disk that remembers the order of writes and syncs, so that every power loss can be played afterwards.
//!
//! Sectors of 512 bytes are atomic and independent of each other. A sync makes the last version of each durable. A
//! sync that fails makes nothing durable and lets the kernel forget what it was to write: those versions may or may not
//! reach the medium, and a later sync that succeeds says nothing about them; only writing them anew does.

use crate::error::{Error, Result, errno};
use crate::storage::{BlockStatus, MemFile, SharedStorage, Stamp, Storage};
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

const SECTOR_BYTES: u64 = 512;
type Sector = Vec<u8>;

#[derive(Debug, Clone)]
enum Event {
    Write(u64, Vec<u8>),
    Sync,
    FailedSync,
}

#[derive(Debug, Default)]
struct Log {
    /// What the medium held before the first event.
    base: BTreeMap<u64, Sector>,
    events: Vec<Event>,
    /// Calls until one fails: writes and punches, syncs.
    fail_write_in: Option<u32>,
    fail_sync_in: Option<u32>,
}

/// The disk; clones share it.
#[derive(Debug, Clone)]
pub struct Disk {
    /// What the page cache shows.
    cache: MemFile,
    log: Arc<Mutex<Log>>,
}

impl Default for Disk {
    fn default() -> Self {
        Disk { cache: MemFile::new("dirty.log", 0), log: Arc::default() }
    }
}

/// A small generator of numbers that a seed decides.
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % end
    }
}

/// Every version that each sector may have after a power loss.
type Choices = BTreeMap<u64, Vec<Sector>>;

impl Disk {
    pub fn shared(&self) -> SharedStorage {
        Arc::new(self.clone())
    }

    pub fn cache(&self) -> &MemFile {
        &self.cache
    }

    /// How many events there were.
    pub fn events(&self) -> usize {
        self.log.lock().events.len()
    }

    pub fn syncs(&self) -> usize {
        let log = self.log.lock();
        log.events.iter().filter(|event| matches!(event, Event::Sync)).count()
    }

    /// Fails the n-th write or punch from now (1 is the next); a part of it is done all the same.
    pub fn fail_write_in(&self, n: u32) {
        self.log.lock().fail_write_in = Some(n);
    }

    /// Fails the n-th sync from now.
    pub fn fail_sync_in(&self, n: u32) {
        self.log.lock().fail_sync_in = Some(n);
    }

    /// Nothing is to fail any more; true where something still was.
    pub fn heal(&self) -> bool {
        let mut log = self.log.lock();
        let due = log.fail_sync_in.take().is_some();
        log.fail_write_in.take().is_some() || due
    }

    /// The disks that a power loss after `events` events may leave: all where there are at most `limit`, else none
    /// written, all written, and random ones.
    pub fn survivors(&self, events: usize, limit: u64, random: &mut Random) -> Vec<Disk> {
        let choices = self.choices(events);
        let total = choices.values().fold(1u64, |n, versions| n.saturating_mul(versions.len() as u64));
        if total <= limit {
            return (0..total).map(|n| pick(&choices, n)).collect();
        }
        let extreme = |last: bool| compose(&choices, |versions| if last { versions.len() - 1 } else { 0 });
        let mut disks = vec![extreme(false), extreme(true)];
        for _ in 2..limit {
            disks.push(compose(&choices, |versions| random.below(versions.len() as u64) as usize));
        }
        disks
    }

    fn choices(&self, events: usize) -> Choices {
        let log = self.log.lock();
        let mut durable = log.base.clone();
        // Versions since the last sync, each with whether the kernel forgot it.
        let mut pending: BTreeMap<u64, Vec<(Sector, bool)>> = BTreeMap::new();
        for event in &log.events[..events] {
            match event {
                Event::Write(offset, bytes) => {
                    for (index, bytes) in (offset / SECTOR_BYTES..).zip(bytes.chunks(SECTOR_BYTES as usize)) {
                        let versions = pending.entry(index).or_default();
                        let before = versions.last().map(|(sector, _)| sector).or(durable.get(&index));
                        let mut sector = before.cloned().unwrap_or_else(|| vec![0; SECTOR_BYTES as usize]);
                        sector[..bytes.len()].copy_from_slice(bytes);
                        versions.push((sector, false));
                    }
                }
                Event::Sync => pending.retain(|index, versions| match versions.last() {
                    Some((sector, false)) => {
                        durable.insert(*index, sector.clone());
                        false
                    }
                    _ => true,
                }),
                Event::FailedSync => pending.values_mut().flatten().for_each(|(_, forgotten)| *forgotten = true),
            }
        }
        let mut choices: Choices = durable.into_iter().map(|(index, sector)| (index, vec![sector])).collect();
        for (index, versions) in pending {
            let all = choices.entry(index).or_insert_with(|| vec![vec![0; SECTOR_BYTES as usize]]);
            all.extend(versions.into_iter().map(|(sector, _)| sector));
            all.dedup();
        }
        choices
    }

    fn record(&self, offset: u64, bytes: Vec<u8>) -> Result<()> {
        let mut log = self.log.lock();
        let fail = count_down(&mut log.fail_write_in);
        let done = if fail { bytes.len() / 1024 * 512 } else { bytes.len() };
        self.cache.write_at(&bytes[..done], offset)?;
        log.events.push(Event::Write(offset, bytes[..done].to_vec()));
        if fail { Err(Error::new(errno::EIO, "write", "a test says so")) } else { Ok(()) }
    }
}

fn count_down(left: &mut Option<u32>) -> bool {
    *left = left.and_then(|n| n.checked_sub(1));
    let hit = *left == Some(0);
    if hit {
        *left = None;
    }
    hit
}

/// The `n`-th of all combinations.
fn pick(choices: &Choices, mut n: u64) -> Disk {
    compose(choices, |versions| {
        let count = versions.len() as u64;
        let chosen = n % count;
        n /= count;
        chosen as usize
    })
}

fn compose(choices: &Choices, mut choose: impl FnMut(&[Sector]) -> usize) -> Disk {
    let disk = Disk::default();
    let base: BTreeMap<u64, Sector> =
        choices.iter().map(|(index, versions)| (*index, versions[choose(versions)].clone())).collect();
    for (index, sector) in &base {
        disk.cache.write_at(sector, index * SECTOR_BYTES).unwrap();
    }
    disk.log.lock().base = base;
    disk
}

impl Storage for Disk {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.cache.read_at(buf, offset)
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        assert!(offset.is_multiple_of(SECTOR_BYTES), "the sidecar writes from page borders");
        self.record(offset, buf.to_vec())
    }
    fn sync(&self) -> Result<()> {
        let mut log = self.log.lock();
        if count_down(&mut log.fail_sync_in) {
            log.events.push(Event::FailedSync);
            return Err(Error::new(errno::EIO, "sync", "a test says so"));
        }
        log.events.push(Event::Sync);
        Ok(())
    }
    fn len(&self) -> Result<u64> {
        self.cache.len()
    }
    fn set_len(&self, len: u64) -> Result<()> {
        let old = self.cache.len()?;
        if len < old {
            self.record(len, vec![0; (old - len) as usize])?;
        }
        self.cache.set_len(len)
    }
    fn punch_hole(&self, offset: u64, len: u64) -> Result<()> {
        let end = (offset + len).min(self.cache.len()?);
        if offset < end {
            self.record(offset, vec![0; (end - offset) as usize])?;
            self.cache.punch_hole(offset, end - offset)?;
        }
        Ok(())
    }
    fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        self.record(offset, vec![0; len as usize])
    }
    fn block_status(&self, offset: u64, len: u64) -> Result<BlockStatus> {
        self.cache.block_status(offset, len)
    }
    fn stamp(&self) -> Result<Stamp> {
        self.cache.stamp()
    }
    fn path(&self) -> &Path {
        self.cache.path()
    }
}
