//! The sidecar `dirty.log`: the crash-safe file beside an image, in which all that is known about its changes survives.
//!
//! It holds a [`Superblock`] (was the last session ended in good order), the intent page (see `intent.rs`), a
//! [`Directory`] (checkpoints, bitmaps, consumers, layers) and the bits of bitmaps in [`Area`]s; [`layout`] has every byte.
//!
//! Invariants:
//! - **Old or new.** Superblock and directory are replaced in one of two slots each and count once they are synced: a
//!   crash at any moment leaves the old or the new one, never neither (see `slots.rs`, also for what holds after an
//!   error).
//! - **Bits before names.** Areas that were written are durable before a directory or superblock that may speak for
//!   them is written; where a failed sync may have lost them, that fails (see `medium.rs`). Nothing is said for a bitmap
//!   that records on but what [`Sidecar::save_regions`] made durable.
//! - **An area is free** once no directory names it that counts, that may count after a power loss, or that somebody
//!   still holds. So who holds the `Arc` that [`Sidecar::directory`] returned may read the areas it names.
//! - **One writer.** Whatever changes the file does so under one lock, held across the I/O (rank 5 of [`crate::sync`]).
//!   Looking at the superblock or the directory takes no lock.
//! - **Believe nothing.** The file may hold anything: checksums first, then limits, before anything is allocated.
//!
//! What this does not tell apart: a slot whose commit was interrupted, and a committed slot that the medium spoiled
//! later. Both are passed over for the older one, unless a superblock knows of a newer directory.

pub mod areas;
mod content;
mod crc;
pub mod directory;
mod intent;
pub mod layout;
mod medium;
mod slots;
pub mod superblock;
#[cfg(all(test, not(feature = "shuttle")))]
mod tests;

pub use areas::Area;
pub use directory::{
    BitmapEntry, CheckpointEntry, CheckpointState, Consistency, ConsumerEntry, Directory, HookNote, InImage,
    LayerEntry, Loss, Notes, Prepared, PreparedAction, SkippedEntry, SnapshotEntry, UserBitmap, UserBitmapState,
};
pub use intent::RegionBits;
pub use superblock::{HEARTBEAT_NS, State, Superblock, region_size_for};

use crate::bitmap::bits::Bits;
use crate::error::{Error, Result, errno};
use crate::storage::SharedStorage;
use crate::sync::{Mutex, Published};
use areas::Areas;
use intent::Intents;
use layout::{DIRECTORY_SLOTS, SUPERBLOCK_SLOTS};
use medium::Medium;
use slots::Slots;
use std::collections::BTreeSet;
use std::sync::Arc;
use uuid::Uuid;

const START_OVER: &str = "remove the file to start tracking over: the next backup is then a full one";

/// An open `dirty.log`. One process at a time: the caller holds the state directory's lock.
#[derive(Debug)]
pub struct Sidecar {
    file: SharedStorage,
    superblock: Published<Superblock>,
    directory: Published<Directory>,
    writer: Mutex<Writer>,
}

/// What changes of the file go by.
#[derive(Debug)]
struct Writer {
    medium: Medium,
    superblocks: Slots,
    directories: Slots,
    areas: Areas,
    intents: Intents,
}

impl Sidecar {
    /// Makes a new sidecar in `file`, whatever that held. Its superblock is OPEN with a nonce that nobody knows, and a
    /// heartbeat at the beginning of time: until [`Sidecar::set_superblock`], nothing can be proved by it.
    ///
    /// Before this returns, a crash leaves the old sidecar, or a file that [`Sidecar::open`] refuses.
    pub fn create(file: SharedStorage, directory: Directory) -> Result<Sidecar> {
        directory.check()?;
        if directory.areas().next().is_some() {
            return Err(invalid("a new directory cannot name areas").at_path(file.path()));
        }
        let superblock = Superblock {
            state: State::Open { nonce: Uuid::new_v4(), boot_id: String::new() },
            disk: directory.disk,
            heartbeat_ns: i64::MIN,
            region_size: region_size_for(directory.size),
        };
        // Superblocks go first and alone: without them nothing of an old file is believed, whatever else is left of it.
        file.write_at(&[0; 2 * layout::PAGE as usize], SUPERBLOCK_SLOTS[0])?;
        file.sync()?;
        file.set_len(0)?;
        file.sync()?;
        let mut writer = Writer {
            medium: Medium::new(file.clone()),
            superblocks: Slots::fresh(SUPERBLOCK_SLOTS),
            directories: Slots::fresh(DIRECTORY_SLOTS),
            areas: Areas::default(),
            intents: Intents::none(),
        };
        writer.replace_directory(&directory, &directory)?;
        writer.replace_superblock(&superblock, &superblock)?;
        Ok(Sidecar::over(file, superblock, directory, writer))
    }

    /// Opens what [`Sidecar::create`] made. Reads only; the first change makes durable what was read.
    ///
    /// EOPNOTSUPP where a newer program wrote it; EINVAL where it is no sidecar or damaged beyond use. A bitmap whose
    /// area cannot be right is opened without it, and with the reason why everything counts as dirty.
    pub fn open(file: SharedStorage) -> Result<Sidecar> {
        let told = |e: Error| match e.errno() {
            errno::EINVAL => e.at_path(file.path()).hint(START_OVER),
            _ => e.at_path(file.path()),
        };
        let (superblocks, page) = Slots::found(SUPERBLOCK_SLOTS, |at| superblock::read_slot(file.as_ref(), at))?
            .ok_or_else(|| told(invalid("no superblock is valid: not a dirty log, or damaged")))?;
        let (superblock, known_sequence) = superblock::decode(&page).map_err(told)?;
        let (directories, slot) = Slots::found(DIRECTORY_SLOTS, |at| directory::read_slot(file.as_ref(), at))?
            .ok_or_else(|| told(invalid("no directory is valid: the file is damaged")))?;
        if directories.sequence() < known_sequence {
            return Err(told(invalid("the newest directory is damaged, an older one would miss changes")));
        }
        let mut directory = directory::decode(&slot).map_err(told)?;
        if superblock.disk != directory.disk {
            return Err(told(invalid("superblock and directory speak of different disks")));
        }
        superblock.check(directory.size).map_err(told)?;
        directory.drop_faulty_areas();
        let areas = Areas::named_by(&directory);
        let intents = Intents::read(file.as_ref())?;
        let writer = Writer { medium: Medium::new(file.clone()), superblocks, directories, areas, intents };
        Ok(Sidecar::over(file, superblock, directory, writer))
    }

    fn over(file: SharedStorage, superblock: Superblock, directory: Directory, writer: Writer) -> Sidecar {
        Sidecar {
            file,
            superblock: Published::new(superblock),
            directory: Published::new(directory),
            writer: Mutex::new(writer),
        }
    }

    /// The superblock that counts.
    pub fn superblock(&self) -> Superblock {
        self.superblock.load().as_ref().clone()
    }

    /// Replaces the superblock; durable when it returns, and with it all areas written before. The intent page is left
    /// as it is. An error leaves the visible one as it was, as with [`Sidecar::commit`].
    pub fn set_superblock(&self, superblock: Superblock) -> Result<()> {
        self.update_superblock(|old| *old = superblock)
    }

    /// [`Sidecar::set_superblock`] with a changed copy of the one that counts.
    pub fn update_superblock(&self, change: impl FnOnce(&mut Superblock)) -> Result<()> {
        let mut writer = self.writer.lock();
        let mut superblock = self.superblock();
        change(&mut superblock);
        let directory = self.directory.load();
        if superblock.disk != directory.disk {
            return Err(invalid("a dirty log belongs to one disk for life").at_path(self.file.path()));
        }
        superblock.check(directory.size).map_err(|e| e.at_path(self.file.path()))?;
        self.settle(&mut writer)?;
        writer.medium.settle_areas(|_| true)?;
        writer.replace_superblock(&superblock, &self.superblock.load())?;
        self.superblock.store(Arc::new(superblock));
        Ok(())
    }

    /// The directory that counts. While the caller holds it, the areas that it names keep their content, unless the
    /// caller's own side writes them.
    pub fn directory(&self) -> Arc<Directory> {
        self.directory.load()
    }

    /// Changes the directory: durable, then visible to [`Sidecar::directory`], then done. One at a time; `change` must
    /// not call the sidecar. Who holds an earlier directory may name its areas again.
    ///
    /// An error, also one of `change`, leaves the visible directory as it was. Where the writing failed and could not
    /// be undone, a crash may still find the new one: until that is undone no area is reused, and commits and
    /// superblocks fail (each tries to undo it first). EINVAL where the new directory cannot be right, ENOSPC where it
    /// does not fit its slot, EIO where bits that it names may be lost.
    pub fn commit<R>(&self, change: impl FnOnce(&mut Directory) -> Result<R>) -> Result<R> {
        let mut writer = self.writer.lock();
        self.settle(&mut writer)?;
        let old = self.directory.load();
        let mut new = old.as_ref().clone();
        let result = change(&mut new)?;
        let new_areas = self.check_change(&writer, &old, &new)?;
        let claimed: BTreeSet<u64> = {
            let growing = growing_areas(&old);
            let still = growing_areas(&new).into_iter().filter(|area| growing.contains(area)).collect::<BTreeSet<_>>();
            new_areas.difference(&still).map(|area| area.offset).collect()
        };
        writer.medium.settle_areas(|offset| claimed.contains(&offset))?;
        writer.replace_directory(&new, &old)?;
        writer.areas.stay(&new_areas);
        let unnamed: BTreeSet<Area> = old.areas().filter(|area| !new_areas.contains(area)).collect();
        unnamed.iter().for_each(|area| writer.medium.forget(area));
        writer.areas.leave(&old, unnamed.into_iter().collect());
        self.directory.store(Arc::new(new));
        drop(old);
        writer.reclaim();
        Ok(result)
    }

    /// Reserves an area for `bytes` bytes that reads as zeros. It is the caller's until a commit names it; then until a
    /// commit no longer does. EFBIG where `bytes` is more than an area can have.
    pub fn allocate(&self, bytes: u64) -> Result<Area> {
        let len = content::area_len(bytes).map_err(|e| e.at_path(self.file.path()))?;
        let mut writer = self.writer.lock();
        self.confirm(&mut writer)?;
        writer.reclaim();
        let full = || Error::new(errno::ENOSPC, "dirty log", "no room for another bitmap").at_path(self.file.path());
        let area = writer.areas.take(len).ok_or_else(full)?;
        let zeroed = writer.medium.fill(&area, |file| file.punch_hole(area.offset, area.len));
        if zeroed.is_err() {
            writer.abandon(&area);
        }
        zeroed.map(|()| area)
    }

    /// Gives back an area that [`Sidecar::allocate`] handed out and no commit has named.
    pub fn abandon(&self, area: &Area) {
        let mut writer = self.writer.lock();
        if self.directory.load().areas().all(|named| named != *area) {
            writer.abandon(area);
        }
    }

    /// Makes `bits` the whole content of `area` and returns the crc32c over it. Pages without a set bit become holes.
    /// Not durable before the next [`Sidecar::sync`], commit or superblock.
    pub fn write_bits(&self, area: &Area, bits: &Bits) -> Result<u32> {
        let mut writer = self.writer.lock();
        if !writer.areas.in_use(area) || directory::area_len_for(bits.len()) > area.len {
            return Err(invalid("the bits have no such area").at_path(self.file.path()).at_offset(area.offset));
        }
        self.confirm(&mut writer)?;
        writer.medium.fill(area, |file| content::write(file.as_ref(), area, bits))
    }

    /// Reads `nbits` bits from `area`. EIO where the area's checksum is not `crc`, EINVAL where the area cannot hold
    /// them.
    pub fn read_bits(&self, area: &Area, nbits: u64, crc: Option<u32>) -> Result<Bits> {
        content::read(self.file.as_ref(), area, nbits, crc)
    }

    /// Makes all bits written before durable; an error also where an earlier failed sync may have lost some that were
    /// not written anew since.
    pub fn sync(&self) -> Result<()> {
        self.writer.lock().medium.settle_areas(|_| true)
    }

    /// What a commit must keep to; returns the areas that `new` names.
    fn check_change(&self, writer: &Writer, old: &Directory, new: &Directory) -> Result<BTreeSet<Area>> {
        let refuse = |why: &str| Err(invalid(why).at_path(self.file.path()));
        if new.disk != old.disk {
            return refuse("a dirty log belongs to one disk for life");
        }
        if region_size_for(new.size) > self.superblock.load().region_size {
            return refuse("the regions do not cover the disk; the superblock's region size comes first");
        }
        new.check().map_err(|e| e.at_path(self.file.path()))?;
        if let Some(fault) = new.area_faults().values().next() {
            return refuse(fault);
        }
        let areas: BTreeSet<Area> = new.areas().collect();
        match areas.iter().find(|area| !writer.areas.may_be_named(area)) {
            Some(area) => refuse(&format!("nobody was given an area at {} of {} bytes", area.offset, area.len)),
            None => Ok(areas),
        }
    }

    /// Before a superblock or directory is replaced: nothing is built on what a crash may take back, or on the absence
    /// of what it may bring back.
    fn settle(&self, writer: &mut Writer) -> Result<()> {
        self.confirm(writer)?;
        if writer.superblocks.failed() {
            let superblock = self.superblock.load();
            writer.replace_superblock(&superblock, &superblock)?;
        }
        if writer.directories.failed() {
            let directory = self.directory.load();
            writer.replace_directory(&directory, &directory)?;
        }
        Ok(())
    }

    /// Before the first change after open: what was read is made durable, since what follows builds on it, and space
    /// that no directory names (left by a crash between a commit and its clearing up) is given back.
    fn confirm(&self, writer: &mut Writer) -> Result<()> {
        if !writer.superblocks.unconfirmed() && !writer.directories.unconfirmed() {
            return Ok(());
        }
        writer.superblocks.write_back(&writer.medium)?;
        writer.directories.write_back(&writer.medium)?;
        writer.medium.sync()?;
        writer.superblocks.confirm();
        writer.directories.confirm();
        for gap in writer.areas.gaps(self.file.len()?) {
            writer.medium.punch(&gap);
        }
        Ok(())
    }
}

impl Writer {
    fn replace_superblock(&mut self, new: &Superblock, old: &Superblock) -> Result<()> {
        let sequence = self.directories.sequence();
        let encode = |superblock: &Superblock, generation| Ok(superblock.encode(generation, sequence));
        self.superblocks
            .replace(&mut self.medium, &|generation| encode(new, generation), &|generation| encode(old, generation))
    }

    fn replace_directory(&mut self, new: &Directory, old: &Directory) -> Result<()> {
        let text = new.to_text()?;
        let encode_old = |sequence| Ok(directory::encode(&old.to_text()?, sequence));
        self.directories.replace(&mut self.medium, &|sequence| Ok(directory::encode(&text, sequence)), &encode_old)
    }

    fn abandon(&mut self, area: &Area) {
        self.areas.abandon(area);
        self.medium.forget(area);
    }

    /// Punches and frees areas that left, unless a directory whose writing failed may come back and name them.
    fn reclaim(&mut self) {
        if !self.directories.failed() {
            self.areas.reclaim().iter().for_each(|area| self.medium.punch(area));
        }
    }
}

/// The areas of bitmaps that record. Nothing is claimed of one but what was synced by itself: bits only come, and the
/// regions of those that are not durable are armed.
fn growing_areas(directory: &Directory) -> BTreeSet<Area> {
    directory.all_bitmaps().filter(|entry| entry.crc.is_none()).filter_map(|entry| entry.area).collect()
}

fn invalid(why: &str) -> Error {
    Error::new(errno::EINVAL, "dirty log", why)
}
