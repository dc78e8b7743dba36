//! The bits of a batch: what its bitmaps have when the instant is over, and how they become durable.
//!
//! Invariants:
//! * **One side of the instant.** Under the gates of all disks concerned, bits are read and put together as the plan's
//!   steps say, and what records from then on joins the recording bitmaps. So a write is before the instant in every
//!   bitmap, or after it in every one.
//! * **Nothing is touched.** A bitmap that changes is made anew: a new one takes its name when the directory says so,
//!   and the old one goes on recording until then. Taking a batch back, or a kill before the directory is written, needs
//!   nothing but letting the new ones go.
//! * **Bits before names.** What a new bitmap has from before the instant is written to the sidecar before a directory
//!   names it, and durable with it.
//!
//! The guest waits for bits to be copied in memory: a merge reads the words of its bitmaps once, which is 2 MiB for
//! 1 TiB at 64 KiB a bit.

use super::disk::Disk;
use super::fleece::Reaper;
use super::frozen::{Freezing, Frozen};
use super::hold::{Held, Hold};
use super::plan::{Origin, Plan, Slot, Step};
use super::tracking::{Recording, Tracking, recording_entry};
use crate::bitmap::{BitmapEntry, CheckpointState, Directory, DirtyBitmap, UserBitmap, UserBitmapState};
use crate::error::Result;
use crate::storage::clock::now_ns;
use std::sync::Arc;
use uuid::Uuid;

/// The users' bitmaps of several disks' directories, as they were and as they are to be.
#[derive(Default)]
pub(super) struct Lists {
    changes: Vec<ListChange>,
    /// Areas that are nobody's until a commit names them.
    written: Vec<(Arc<Disk>, BitmapEntry)>,
}

struct ListChange {
    disk: Arc<Disk>,
    /// Holding it keeps the areas that it names, should it have to be brought back.
    old: Arc<Directory>,
    new: Vec<UserBitmap>,
}

impl Lists {
    pub(super) fn is_empty(&self) -> bool {
        self.changes.is_empty()
    }

    pub(super) fn old(&self, disk: &Arc<Disk>) -> Option<&Vec<UserBitmap>> {
        self.of(disk).map(|change| &change.old.bitmaps)
    }

    pub(super) fn new_of(&self, disk: &Arc<Disk>) -> Option<&Vec<UserBitmap>> {
        self.of(disk).map(|change| &change.new)
    }

    pub(super) fn all_old(&self) -> impl Iterator<Item = (&Arc<Disk>, &Vec<UserBitmap>)> {
        self.changes.iter().map(|change| (&change.disk, &change.old.bitmaps))
    }

    fn of(&self, disk: &Arc<Disk>) -> Option<&ListChange> {
        self.changes.iter().find(|change| Arc::ptr_eq(&change.disk, disk))
    }

    /// The list of a disk, to be changed.
    pub(super) fn edit(&mut self, disk: &Arc<Disk>) -> &mut Vec<UserBitmap> {
        let index = self.changes.iter().position(|change| Arc::ptr_eq(&change.disk, disk)).unwrap_or_else(|| {
            let old = disk.tracking.directory();
            self.changes.push(ListChange { disk: disk.clone(), new: old.bitmaps.clone(), old });
            self.changes.len() - 1
        });
        &mut self.changes[index].new
    }

    /// The entry of a bitmap that records and that has bits from before: they are durable with the entry. One that is
    /// not persistent needs none of that.
    pub(super) fn record(&mut self, disk: &Arc<Disk>, recording: &Recording, persistent: bool) -> Result<BitmapEntry> {
        if !persistent {
            return Ok(recording_entry(recording));
        }
        // No checksum: the bits go on changing.
        let sealed = disk.tracking.seal(recording, None)?;
        self.written.push((disk.clone(), sealed.clone()));
        Ok(BitmapEntry { crc: None, ..sealed })
    }

    /// The entry of a bitmap that does not record: its bits are durable with the entry.
    pub(super) fn seal(&mut self, disk: &Arc<Disk>, bits: DirtyBitmap) -> Result<BitmapEntry> {
        let sealed =
            disk.tracking.seal(&Recording { uuid: Uuid::new_v4(), bitmap: Arc::new(bits), area: None }, None)?;
        self.written.push((disk.clone(), sealed.clone()));
        Ok(sealed)
    }

    /// Gives back what no directory names after all.
    pub(super) fn abandon(&self) {
        self.written.iter().for_each(|(disk, entry)| disk.tracking.abandon(entry));
    }
}

/// A plan with all that it needs. See the module.
#[derive(Default)]
pub(super) struct Work {
    plan: Plan,
    bits: Vec<Prepared>,
    holds: Vec<NewHold>,
    /// Views for jobs, with the index of their steps.
    freezes: Vec<Freezing>,
    frozen: Vec<Frozen>,
    pub lists: Lists,
    /// Why bits could not be put together.
    failed: Option<crate::error::Error>,
}

/// The bits of one slot.
#[derive(Default)]
struct Prepared {
    /// What records until now under the name; it is read in place.
    live: Option<Recording>,
    /// What it has besides the live bits or instead of them, as the steps so far leave it.
    value: Option<DirtyBitmap>,
    /// What records from the instant on.
    fresh: Option<Recording>,
}

struct NewHold {
    slot: usize,
    successor: Option<Recording>,
    held: Option<Arc<Held>>,
}

impl Work {
    /// Loads what the plan reads, and makes what is to record. Nothing is visible yet.
    pub(super) fn prepare(plan: Plan) -> Result<Work> {
        let mut work = Work { plan, ..Work::default() };
        let made = work.keep_removed().and_then(|()| work.prepare_bits()).and_then(|()| work.prepare_holds());
        let made = made.and_then(|()| work.prepare_freezes());
        made.inspect_err(|_| work.forget()).map(|()| work)
    }

    /// Before the lists are begun, which go on with what it leaves.
    fn keep_removed(&self) -> Result<()> {
        let mut removed = self.plan.slots.iter().filter(|slot| slot.removed && slot.persistent);
        removed.try_for_each(|slot| slot.disk.keep_removed(&slot.name))
    }

    fn prepare_bits(&mut self) -> Result<()> {
        for slot in &self.plan.slots {
            let mut bits = Prepared::default();
            bits.find(slot)?;
            if slot.changed && slot.recording && !slot.removed {
                slot.disk.begin_again()?;
                bits.fresh = Some(slot.disk.tracking.new_recording(slot.granularity, slot.disk.size())?);
            }
            self.bits.push(bits);
            if slot.changed {
                self.lists.edit(&slot.disk);
            }
        }
        Ok(())
    }

    fn prepare_holds(&mut self) -> Result<()> {
        for step in &self.plan.steps {
            let Step::Hold(slot) = step else { continue };
            let held = &self.plan.slots[*slot];
            let make = || held.disk.tracking.new_successor(held.granularity, held.disk.size());
            let successor = held.recording.then(make).transpose()?;
            self.holds.push(NewHold { slot: *slot, successor, held: None });
        }
        Ok(())
    }

    fn prepare_freezes(&mut self) -> Result<()> {
        for (_, disk, record) in &self.plan.freezes {
            disk.check_foreign()?;
            disk.begin_again()?;
            self.freezes.push(Freezing::prepare(disk, *record)?);
        }
        Ok(())
    }

    /// Nothing was published: all that was made goes.
    pub(super) fn forget(&self) {
        for (slot, bits) in self.plan.slots.iter().zip(&self.bits) {
            bits.fresh.iter().for_each(|fresh| slot.disk.tracking.give_back(fresh));
        }
        for hold in &self.holds {
            let tracking = &self.plan.slots[hold.slot].disk.tracking;
            hold.successor.iter().for_each(|successor| tracking.forget_words(successor.uuid));
        }
        self.thaw();
    }

    /// The batch failed: what was frozen for jobs goes, published or not.
    pub(super) fn thaw(&self) {
        self.freezes.iter().for_each(Freezing::forget);
    }

    /// The disks whose gates it needs.
    pub(super) fn disks(&self) -> impl Iterator<Item = &Arc<Disk>> {
        let frozen = self.freezes.iter().map(|freezing| &freezing.disk);
        self.plan.slots.iter().map(|slot| &slot.disk).chain(frozen)
    }

    /// The instant, before layers of snapshots are published, which come after these in their disks' chains. The gates of
    /// all disks are held.
    pub(super) fn publish(&self) {
        self.freezes.iter().for_each(Freezing::publish);
    }

    /// The instant. The gates of all disks are held.
    pub(super) fn switch(&mut self) {
        self.freezes.iter().for_each(Freezing::record);
        if let Err(e) = self.evaluate() {
            self.failed = Some(e);
            return;
        }
        for (slot, bits) in self.plan.slots.iter().zip(&self.bits) {
            bits.fresh.iter().for_each(|fresh| slot.disk.tracking.also_record(fresh));
        }
        for hold in &self.holds {
            let tracking = &self.plan.slots[hold.slot].disk.tracking;
            hold.successor.iter().for_each(|successor| tracking.also_record(successor));
        }
    }

    fn evaluate(&mut self) -> Result<()> {
        let mut holds = self.holds.iter_mut();
        for step in &self.plan.steps {
            match step {
                Step::Clear(slot) => {
                    let Slot { granularity, disk, .. } = &self.plan.slots[*slot];
                    self.bits[*slot].value = Some(DirtyBitmap::heap(*granularity, disk.size())?);
                }
                Step::Merge { target, sources } => {
                    let mut sum = self.bits[*target].copy(&self.plan.slots[*target])?;
                    sources.iter().for_each(|source| self.bits[*source].add_to(&mut sum));
                    self.bits[*target].value = Some(sum);
                }
                Step::Hold(slot) => {
                    let (bits, slot) = (&self.bits[*slot], &self.plan.slots[*slot]);
                    if let Some(hold) = holds.next() {
                        hold.held = Some(Arc::new(Held::new(slot.disk.name(), &slot.name, bits.copy(slot)?)));
                    }
                }
            }
        }
        for (slot, bits) in self.plan.slots.iter().zip(&mut self.bits) {
            // A new bitmap begins with what the old one has now.
            if slot.changed && !slot.removed && bits.value.is_none() {
                bits.value = Some(bits.copy(slot)?);
            }
        }
        Ok(())
    }

    /// After the instant: writes bits, and says what the directories are to hold.
    pub(super) fn save(&mut self) -> Result<()> {
        if let Some(e) = self.failed.take() {
            return Err(e);
        }
        for (slot, bits) in self.plan.slots.iter().zip(&mut self.bits).filter(|(slot, _)| slot.changed) {
            let value = bits.value.take();
            let entry = match (&bits.fresh, value) {
                _ if slot.removed => None,
                (Some(fresh), Some(value)) if value.bits().any_set(0..value.bits().len()) => {
                    fresh.bitmap.merge_from(&value);
                    Some(self.lists.record(&slot.disk, fresh, slot.persistent)?)
                }
                (Some(fresh), _) => Some(recording_entry(fresh)),
                (None, Some(value)) => Some(self.lists.seal(&slot.disk, value)?),
                (None, None) => None,
            };
            let state = if slot.recording { UserBitmapState::Recording } else { UserBitmapState::Disabled };
            let list = self.lists.edit(&slot.disk);
            match (entry, list.iter_mut().find(|user| user.name == slot.name)) {
                (None, _) => list.retain(|user| user.name != slot.name),
                (Some(entry), Some(user)) => (user.bitmap, user.state) = (entry, state),
                (Some(bitmap), None) => list.push(UserBitmap {
                    name: slot.name.clone(),
                    state,
                    bitmap,
                    persistent: slot.persistent,
                    read_only: false,
                    time_ns: now_ns(),
                }),
            }
        }
        self.remove_from_images()
    }

    /// Before the directories: where that is all that happens, the bitmap stands in the directory, and a close stores
    /// it again. In the other order a kill in between would leave one in use that nobody knows.
    fn remove_from_images(&self) -> Result<()> {
        for slot in self.plan.slots.iter().filter(|slot| slot.removed && slot.persistent) {
            if let Some(image) = slot.disk.image().persistent() {
                slot.disk.tracking.note_write();
                image.remove(&[&slot.name])?;
                slot.disk.tracking.note_write();
                slot.disk.set_known_size();
            }
        }
        Ok(())
    }

    /// The batch stands: the holds of a disk begin, those of its views for jobs too.
    pub(super) fn begin_holds(&mut self, disk: &Arc<Disk>, reaper: &Reaper) {
        let frozen = self.freezes.iter().filter(|freezing| Arc::ptr_eq(&freezing.disk, disk));
        self.frozen.extend(frozen.map(|freezing| freezing.begin(reaper.clone())));
        for hold in &mut self.holds {
            if Arc::ptr_eq(&self.plan.slots[hold.slot].disk, disk)
                && let Some(held) = &hold.held
            {
                disk.holds.begin(held.clone(), hold.successor.take());
            }
        }
    }

    /// The holds, and the views for jobs, each in the order of their steps.
    pub(super) fn into_made(mut self) -> (Vec<Hold>, Vec<Frozen>) {
        let order = |frozen: &Frozen| self.freezes.iter().position(|freezing| freezing.is(frozen));
        self.frozen.sort_by_key(order);
        (self.holds.into_iter().filter_map(|hold| hold.held).map(Hold).collect(), self.frozen)
    }
}

impl Prepared {
    /// The bits of a bitmap as they are before the batch, as far as it reads them.
    fn find(&mut self, slot: &Slot) -> Result<()> {
        let (disk, tracking) = (&slot.disk, &slot.disk.tracking);
        match &slot.origin {
            Origin::Added | Origin::NewCheckpoint => {
                self.value = Some(DirtyBitmap::heap(slot.granularity, disk.size())?);
            }
            Origin::User(user) if user.state == UserBitmapState::Recording => {
                self.live = live(tracking, user.bitmap.uuid);
            }
            Origin::User(user) if slot.read => self.value = Some(disk.load_user(user)?),
            Origin::User(_) => (),
            Origin::Checkpoint(entry) => {
                let exact = entry.bitmap.everything.is_none() && entry.state == CheckpointState::Recording;
                self.live = live(tracking, entry.bitmap.uuid).filter(|_| exact);
                if self.live.is_none() && slot.read {
                    self.value = Some(tracking.alone(entry, disk.size())?);
                }
            }
        }
        Ok(())
    }

    fn add_to(&self, sum: &mut DirtyBitmap) {
        match (&self.value, &self.live) {
            (Some(value), _) => sum.absorb(value),
            (None, Some(live)) => sum.absorb(&live.bitmap),
            (None, None) => (),
        }
    }

    fn copy(&self, slot: &Slot) -> Result<DirtyBitmap> {
        let mut copy = DirtyBitmap::heap(slot.granularity, slot.disk.size())?;
        self.add_to(&mut copy);
        Ok(copy)
    }
}

fn live(tracking: &Tracking, uuid: Uuid) -> Option<Recording> {
    tracking.recording().iter().find(|recording| recording.uuid == uuid).cloned()
}
