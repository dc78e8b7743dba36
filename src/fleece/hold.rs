//! Holds: a bitmap as it was at one instant, for somebody who copies what it says (a push backup).
//!
//! Invariants:
//! * **The parent records on.** The bitmap itself (the parent) goes on as before, and a *successor*, clear at the
//!   instant of the hold, records beside it; the holder reads a copy of the parent as it was at that instant. So the
//!   parent has at any time what it had then and what the successor has: reclaiming is letting the successor go, and
//!   so is a crash, for which nothing needs to be written.
//! * **Old or new.** What ends a hold otherwise has its bits durable before the directory says so, on all disks of a
//!   group or on none. Until then both record.
//! * **Busy.** While a hold exists, nothing else changes the bitmap, and its disk is neither resized nor removed.
//!
//! A hold that is dropped without an end is reclaimed. A bitmap that does not record has no successor; one that
//! follows it is clear.

use super::batch::{Action, BitmapRef, Refused};
use super::disk::Disk;
use super::fleece::{Fleece, Reaper};
use super::tracking::Recording;
use super::work::Lists;
use crate::bitmap::{Bits, DirtyBitmap};
use crate::error::{Error, Result, errno};
use crate::sync::Mutex;
use crate::sync::atomic::{AtomicBool, Ordering};
use crate::units::GRANULARITY_RANGE;
use std::sync::Arc;

/// A bitmap that somebody holds. See the module.
#[derive(Debug)]
pub struct Hold(pub(super) Arc<Held>);

/// How a hold ends.
#[derive(Debug)]
pub enum HoldEnd {
    /// The successor takes the name: what the holder saw is done.
    Abdicate,
    /// The bitmap has what it had and what was written since.
    Reclaim,
    /// The bitmap has these bits (what was not copied, say) and what was written since.
    ReclaimWith(DirtyBitmap),
}

/// What holder and disk share.
#[derive(Debug)]
pub(super) struct Held {
    disk: String,
    name: String,
    frozen: Arc<DirtyBitmap>,
    /// It ended, or nobody has it any more.
    over: AtomicBool,
}

/// The holds of one disk.
#[derive(Debug, Default)]
pub(super) struct Holds(Mutex<Vec<(Arc<Held>, Option<Recording>)>>);

/// A disk that a job writes to: as long as this exists it is neither resized nor removed.
#[derive(Debug)]
pub struct KeptDisk {
    held: Arc<Held>,
    reaper: Reaper,
}

impl Drop for KeptDisk {
    fn drop(&mut self) {
        self.held.end();
        self.reaper.wake();
    }
}

impl Hold {
    /// The disk.
    pub fn disk(&self) -> &str {
        &self.0.disk
    }

    /// The bitmap's name.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// The bits at the instant of the hold.
    pub fn bitmap(&self) -> &DirtyBitmap {
        &self.0.frozen
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.0.end();
    }
}

impl Held {
    pub(super) fn new(disk: &str, name: &str, frozen: DirtyBitmap) -> Self {
        Held::over(disk, name, Arc::new(frozen))
    }

    /// The same over bits that may still be marked.
    pub(super) fn over(disk: &str, name: &str, frozen: Arc<DirtyBitmap>) -> Self {
        Held { disk: disk.to_owned(), name: name.to_owned(), frozen, over: AtomicBool::new(false) }
    }

    pub(super) fn end(&self) {
        self.over.store(true, Ordering::SeqCst);
    }

    fn is_over(&self) -> bool {
        self.over.load(Ordering::SeqCst)
    }

    /// The bits when it began.
    pub(super) fn frozen(&self) -> &DirtyBitmap {
        &self.frozen
    }

    /// Set bits times granularity when it began.
    pub(super) fn count_bytes(&self) -> u64 {
        self.frozen.count_bytes()
    }
}

impl Holds {
    pub(super) fn begin(&self, held: Arc<Held>, successor: Option<Recording>) {
        self.0.lock().push((held, successor));
    }

    /// The hold of a bitmap.
    pub(super) fn held(&self, name: &str) -> Option<Arc<Held>> {
        self.0.lock().iter().map(|(held, _)| held).find(|held| held.name == name && !held.is_over()).cloned()
    }

    /// Forgets those that are over; true where there were any.
    pub(super) fn forget_ended(&self) -> bool {
        let mut holds = self.0.lock();
        let before = holds.len();
        holds.retain(|(held, _)| !held.is_over());
        holds.len() < before
    }

    /// Whether a bitmap records for a hold.
    pub(super) fn is_successor(&self, recording: &Recording) -> bool {
        let holds = self.0.lock();
        holds.iter().any(|(_, successor)| successor.as_ref().is_some_and(|one| one.uuid == recording.uuid))
    }

    /// What records for a hold; ESTALE for one of another mount.
    fn successor(&self, held: &Arc<Held>) -> Result<Option<Recording>> {
        let holds = self.0.lock();
        let found = holds.iter().find(|(other, _)| Arc::ptr_eq(other, held)).map(|(_, successor)| successor.clone());
        found.ok_or_else(|| {
            let what = format!("bitmap '{}' of disk '{}'", held.name.escape_debug(), held.disk);
            Error::new(errno::ESTALE, what, "the hold went when the disk was closed")
        })
    }

    /// EBUSY while there is a hold.
    pub(super) fn check_none(&self, disk: &str) -> Result<()> {
        match self.0.lock().iter().map(|(held, _)| held).find(|held| !held.is_over()) {
            Some(held) => {
                let why = match held.name.as_str() {
                    "" => "a job uses it".to_owned(),
                    name => format!("its bitmap '{}' is in use", name.escape_debug()),
                };
                Err(Error::new(errno::EBUSY, format!("disk '{disk}'"), why)
                    .hint("end the job or the export that uses it"))
            }
            None => Ok(()),
        }
    }
}

impl Fleece {
    /// Keeps a disk as long as it is and where it is, for who writes a copy to it: what was copied must be there at the
    /// end. ENOENT for an unknown name.
    pub fn keep_disk(&self, name: &str) -> Result<KeptDisk> {
        // A resize or removal that began is over, or has not looked for holds yet.
        let _control = self.control.lock();
        let disk = self.disk(name)?;
        let held = Arc::new(Held::new(name, "", DirtyBitmap::heap(*GRANULARITY_RANGE.end(), disk.size())?));
        disk.holds.begin(held.clone(), None);
        Ok(KeptDisk { held, reaper: self.reaper() })
    }

    /// Holds one bitmap: a batch of that alone.
    pub fn hold(&self, disk: &str, name: &str) -> std::result::Result<Hold, Refused> {
        let applied = self.apply(&[Action::Hold(BitmapRef::new(disk, name))])?;
        applied.holds.into_iter().next().ok_or_else(|| Refused::unknown_bitmap(name))
    }

    /// Ends holds, all at once or none; what it changed survives a kill and a power loss. Of a hold that is over,
    /// nothing happens. EINVAL for bits of another disk's size, ESTALE where the disk was closed meanwhile.
    ///
    /// After an error the holds go on: they may be ended again, where a bitmap may then have bits of the end that failed
    /// besides; or reclaimed, or dropped, which is the same, and exact.
    pub fn end_holds(&self, ends: &[(&Hold, HoldEnd)]) -> Result<()> {
        let _control = self.control.lock();
        self.settle()?;
        let mut lists = Lists::default();
        let mut disks = Vec::new();
        let ended = ends.iter().filter(|(hold, _)| !hold.0.is_over()).try_for_each(|(hold, end)| {
            let disk = self.disk(hold.disk())?;
            disks.push(disk.clone());
            end_one(&disk, &hold.0, end, &mut lists)
        });
        if let Err(e) = ended {
            lists.abandon();
            disks.iter().for_each(|disk| disk.stop_unnamed());
            return Err(e);
        }
        if !lists.is_empty() {
            self.replace(lists)?;
        }
        ends.iter().for_each(|(hold, _)| hold.0.end());
        for disk in disks {
            disk.holds.forget_ended();
            disk.stop_unnamed();
        }
        Ok(())
    }
}

/// What the directory is to say when one hold has ended; the bits are written.
fn end_one(disk: &Arc<Disk>, held: &Arc<Held>, end: &HoldEnd, lists: &mut Lists) -> Result<()> {
    let extra = match end {
        HoldEnd::Reclaim => return Ok(()),
        HoldEnd::Abdicate => None,
        HoldEnd::ReclaimWith(bits) if bits.size() != disk.size() => {
            let why = format!("the bits are of a disk of {} bytes, not {}", bits.size(), disk.size());
            return Err(Error::new(errno::EINVAL, format!("bitmap '{}'", held.name.escape_debug()), why));
        }
        HoldEnd::ReclaimWith(bits) => Some(bits),
    };
    let successor = disk.holds.successor(held)?;
    let granularity = held.frozen.granularity();
    let persistent = lists.edit(disk).iter().any(|user| user.name == held.name && user.persistent);
    let entry = match successor {
        Some(successor) => {
            // Of what was written without its region armed, a power loss would leave the bits of the hold's end alone.
            disk.begin_again()?;
            extra.iter().for_each(|extra| successor.bitmap.merge_from(extra));
            let successor = disk.tracking.succeed(&successor)?;
            lists.record(disk, &successor, persistent)?
        }
        None => {
            let bits = DirtyBitmap::new(granularity, disk.size(), Bits::heap(held.frozen.bits().len()))?;
            extra.iter().for_each(|extra| bits.merge_from(extra));
            lists.seal(disk, bits)?
        }
    };
    for user in lists.edit(disk).iter_mut().filter(|user| user.name == held.name) {
        user.bitmap = entry.clone();
    }
    Ok(())
}

impl Disk {
    /// Lets go of the recording bitmaps that neither the directory nor a hold knows; a hold's has no area while no
    /// directory names it. To be called only while it is certain what the directory in the file says, and under the
    /// control lock.
    pub(super) fn stop_unnamed(&self) {
        let directory = self.tracking.directory();
        let named = |recording: &Recording| directory.all_bitmaps().any(|entry| entry.uuid == recording.uuid);
        for recording in self.tracking.recording().iter().filter(|one| !named(one) && self.holds.is_successor(one)) {
            self.tracking.remain_successor(recording);
        }
        let known = |recording: &Recording| named(recording) || self.holds.is_successor(recording);
        let all = self.tracking.recording();
        let (stay, go): (Vec<_>, Vec<_>) = all.iter().cloned().partition(known);
        if !go.is_empty() {
            // Writers that still hold the longer list mark the others in vain.
            self.tracking.switch(stay);
            go.iter().for_each(|recording| self.tracking.give_back(recording));
        }
    }
}
