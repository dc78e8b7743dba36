//! The intent page: which regions of the disk a power loss may leave behind their fine bits, or behind the image.
//!
//! Invariants:
//! - **Intent clear means durable.** Where the bit of a region is clear on disk, all that was ever written to the
//!   region, and its bits in the areas of all recording bitmaps, are durable. So a bit is set durably before the first
//!   write into its region ([`Sidecar::arm`]), and cleared only after both were synced ([`Sidecar::disarm`]).
//! - **One writer.** The page is composed and written under the sidecar's writer lock, always as a whole: two changes
//!   that share a byte cannot undo each other, and what a failed sync may have dropped is written anew with the next.
//! - **Believed bit by bit.** The page has no checksum: a power loss may leave any mixture of its sectors, old and new,
//!   and each bit is right by itself. A bit too many costs a larger map.
//! - **All recording bitmaps, or none.** [`Sidecar::save_regions`] writes nothing unless the bitmaps that it is given
//!   are just those that the directory lets record: in the middle of a change of these, a region stays armed.
//!
//! Under a CLEAN superblock the page means nothing: all was durable.

use super::areas::Area;
use super::layout::{INTENT_OFFSET, INTENT_REGIONS, PAGE};
use super::superblock::{HEARTBEAT_NS, State};
use super::{Sidecar, Superblock, Writer, content, invalid};
use crate::bitmap::bits::Bits;
use crate::error::{Error, Result, errno};
use crate::storage::Storage;
use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;
use uuid::Uuid;

/// The page as it is to be.
#[derive(Debug)]
pub(super) struct Intents(Vec<u8>);

impl Intents {
    /// No region is armed.
    pub(super) fn none() -> Self {
        Intents(vec![0; PAGE as usize])
    }

    /// What the file holds.
    pub(super) fn read(file: &dyn Storage) -> Result<Self> {
        let mut page = vec![0; PAGE as usize];
        file.read_at(&mut page, INTENT_OFFSET)?;
        Ok(Intents(page))
    }

    fn set(&mut self, region: u64, armed: bool) {
        if let Some(byte) = self.0.get_mut((region / 8) as usize) {
            let mask = 1 << (region % 8);
            *byte = if armed { *byte | mask } else { *byte & !mask };
        }
    }

    fn set_all(&mut self, regions: &[u64], armed: bool) {
        regions.iter().for_each(|region| self.set(*region, armed));
    }

    fn armed(&self) -> impl Iterator<Item = u64> {
        (0..INTENT_REGIONS)
            .filter(|region| self.0.get((region / 8) as usize).is_some_and(|byte| byte >> (region % 8) & 1 != 0))
    }
}

/// The fine bits of one recording bitmap in some regions.
#[derive(Debug)]
pub struct RegionBits<'a> {
    /// The bitmap.
    pub bitmap: Uuid,
    /// Its area.
    pub area: Area,
    /// Its bits as they are in memory.
    pub bits: &'a Bits,
    /// Which of them belong to the regions.
    pub ranges: Vec<Range<u64>>,
}

impl Sidecar {
    /// The regions whose intent is set, in order.
    pub fn intents(&self) -> Vec<u64> {
        self.writer.lock().intents.armed().collect()
    }

    /// Makes `armed` the regions whose intent is set, durably.
    pub fn reset_intents(&self, armed: impl Iterator<Item = u64>) -> Result<()> {
        let mut writer = self.writer.lock();
        writer.intents = Intents::none();
        armed.for_each(|region| writer.intents.set(region, true));
        writer.write_intents()?;
        writer.medium.sync()
    }

    /// Sets the intents of `regions` durably, and renews the heartbeat where it is due at `now_ns`. An error: they are
    /// not armed. EIO once the superblock is CLEAN: the page is not ours any more.
    pub fn arm(&self, regions: &[u64], now_ns: i64) -> Result<()> {
        let mut writer = self.writer.lock();
        self.check_is_open()?;
        self.confirm(&mut writer)?;
        writer.intents.set_all(regions, true);
        writer.write_intents()?;
        match self.due_heartbeat(now_ns, 0) {
            // Its sync is the one of the page too.
            Some(superblock) => self.beat(&mut writer, superblock),
            None => writer.medium.sync(),
        }
    }

    /// Clears the intents of `regions`, in all of which image and bits are durable and nobody writes. Durable at some
    /// later sync. After an error the page on disk may say either, so who writes there arms anew.
    pub fn disarm(&self, regions: &[u64]) -> Result<()> {
        let mut writer = self.writer.lock();
        self.check_is_open()?;
        writer.intents.set_all(regions, false);
        writer.write_intents()
    }

    /// Makes the fine bits of some regions durable in the areas of all recording bitmaps, by whole pages. False, and
    /// nothing is done: `list` is not what the directory lets record, so a change of that is under way.
    pub fn save_regions(&self, list: &[RegionBits<'_>]) -> Result<bool> {
        let mut writer = self.writer.lock();
        let directory = self.directory.load();
        let recording = directory.all_bitmaps().filter(|entry| entry.crc.is_none());
        let named: BTreeSet<(Uuid, Area)> = recording.filter_map(|entry| Some((entry.uuid, entry.area?))).collect();
        let given: BTreeSet<(Uuid, Area)> = list.iter().map(|one| (one.bitmap, one.area)).collect();
        if named != given || writer.directories.failed() {
            return Ok(false);
        }
        self.confirm(&mut writer)?;
        for one in list {
            content::write_pages(self.file.as_ref(), &one.area, one.bits, &one.ranges)?;
        }
        // A failed sync leaves what was durable before, and the regions armed: no area counts as lost for it.
        if !list.is_empty() {
            writer.medium.sync()?;
        }
        Ok(true)
    }

    /// Renews the heartbeat where it is older than `age_ns`, durably; not once the superblock is CLEAN.
    pub fn renew_heartbeat(&self, now_ns: i64, age_ns: i64) -> Result<()> {
        let mut writer = self.writer.lock();
        match self.due_heartbeat(now_ns, age_ns) {
            Some(superblock) => self.settle(&mut writer).and_then(|()| self.beat(&mut writer, superblock)),
            None => Ok(()),
        }
    }

    /// The superblock with a new heartbeat, where the old one is more than `age_ns` (0: half an interval) old, or ahead
    /// of the clock.
    fn due_heartbeat(&self, now_ns: i64, age_ns: i64) -> Option<Superblock> {
        let superblock = self.superblock();
        let age_ns = if age_ns == 0 { HEARTBEAT_NS / 2 } else { age_ns };
        let fresh = superblock.heartbeat_ns..=superblock.heartbeat_ns.saturating_add(age_ns);
        let due = matches!(superblock.state, State::Open { .. }) && !fresh.contains(&now_ns);
        due.then_some(Superblock { heartbeat_ns: now_ns, ..superblock })
    }

    fn beat(&self, writer: &mut Writer, superblock: Superblock) -> Result<()> {
        writer.replace_superblock(&superblock, &self.superblock.load())?;
        self.superblock.store(Arc::new(superblock));
        Ok(())
    }

    fn check_is_open(&self) -> Result<()> {
        match self.superblock.load().state {
            State::Open { .. } => Ok(()),
            State::Clean { .. } => Err(Error::new(errno::EIO, "dirty log", "it was closed").at_path(self.file.path())),
        }
    }

    /// Changes the superblock and, where its region size grows, sets all intents before: what a bit stands for changes
    /// with every bit set.
    pub fn widen_regions(&self, region_size: u64) -> Result<()> {
        if !region_size.is_power_of_two() || region_size < self.superblock().region_size {
            return Err(invalid("regions only grow").at_path(self.file.path()));
        }
        self.reset_intents(0..INTENT_REGIONS)?;
        self.update_superblock(|superblock| superblock.region_size = region_size)
    }
}

impl Writer {
    fn write_intents(&self) -> Result<()> {
        self.medium.write_at(&self.intents.0, INTENT_OFFSET)
    }
}
