//! Users' bitmaps that others are shown, by an export say: busy meanwhile, as in QEMU.
//!
//! Invariants:
//! * **Busy.** While somebody is shown a bitmap nothing changes it but the guest's writes, where it records: it is
//!   neither cleared nor removed, and its disk is neither resized nor removed. So its bits only grow.
//! * **In place.** One that records is read where it records, so what is shown has the newest write; one that does not
//!   is read once. Nothing is recorded besides, and the end needs no write: unlike a hold of a job, nothing follows.

use super::batch::{Action, BitmapRef, Refused};
use super::disk::Disk;
use super::fleece::{Fleece, Reaper};
use super::hold::Held;
use crate::bitmap::{CheckpointState, DirtyBitmap, UserBitmap, UserBitmapState};
use crate::error::Result;
use std::sync::Arc;

/// A bitmap that somebody is shown, as long as this exists.
#[derive(Debug)]
pub struct ShownBitmap {
    held: Arc<Held>,
    reaper: Reaper,
}

/// What is known of a bitmap without looking at its bits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BitmapState {
    /// The name.
    pub name: String,
    /// Whether writes are marked in it.
    pub recording: bool,
    /// Whether somebody holds it, or is shown it.
    pub busy: bool,
    /// Whether its bits are lost.
    pub inconsistent: bool,
    /// Whether a checkpoint owns it.
    pub checkpoint: bool,
}

impl ShownBitmap {
    /// Whether the byte at `offset` is dirty, and for how many bytes (at most `len`) that holds on. Past its end it is.
    pub fn dirty_run(&self, offset: u64, len: u64) -> (bool, u64) {
        let bits = self.held.frozen();
        let end = offset.saturating_add(len);
        if offset >= bits.size() {
            return (true, len);
        }
        match bits.next_dirty_run(offset, end) {
            Some(run) if run.start <= offset => (true, run.end - offset),
            Some(run) => (false, run.start - offset),
            None => (false, end.min(bits.size()) - offset),
        }
    }
}

impl Drop for ShownBitmap {
    fn drop(&mut self) {
        self.held.end();
        self.reaper.wake();
    }
}

impl Fleece {
    /// The bitmaps of a disk, without the I/O that [`Fleece::bitmaps`] may need for their counts. None for an unknown disk.
    pub fn bitmap_states(&self, disk: &str) -> Vec<BitmapState> {
        let Ok(disk) = self.disk(disk) else { return Vec::new() };
        let directory = disk.tracking.directory();
        let users = directory.bitmaps.iter().map(|user| BitmapState {
            name: user.name.clone(),
            recording: user.state == UserBitmapState::Recording,
            busy: disk.holds.held(&user.name).is_some(),
            inconsistent: user.state == UserBitmapState::Inconsistent,
            checkpoint: false,
        });
        let owned = directory.checkpoints.iter().map(|entry| BitmapState {
            name: entry.name.clone(),
            recording: entry.state == CheckpointState::Recording,
            busy: false,
            inconsistent: false,
            checkpoint: true,
        });
        users.chain(owned).collect()
    }

    /// Makes a user's bitmap busy and gives its bits. Refused in QEMU's words where it is not there, is busy, is
    /// inconsistent, or belongs to a checkpoint.
    pub fn show_bitmap(&self, bitmap: &BitmapRef) -> std::result::Result<ShownBitmap, Refused> {
        let _control = self.control.lock();
        super::plan::Plan::new(self, &[Action::Hold(bitmap.clone())])?;
        let disk = self.disk(&bitmap.disk)?;
        let directory = disk.tracking.directory();
        let user = directory.bitmaps.iter().find(|user| user.name == bitmap.name);
        let user = user.ok_or_else(|| Refused::unknown_bitmap(&bitmap.name))?;
        let held = Arc::new(Held::over(disk.name(), &user.name, disk.bits_in_place(user)?));
        disk.holds.begin(held.clone(), None);
        Ok(ShownBitmap { held, reaper: self.reaper() })
    }
}

impl Disk {
    /// The bits of a user's bitmap where they are marked, or a copy of those that do not change.
    fn bits_in_place(&self, user: &UserBitmap) -> Result<Arc<DirtyBitmap>> {
        let recording = self.tracking.recording();
        match recording.iter().find(|one| one.uuid == user.bitmap.uuid) {
            Some(live) => Ok(live.bitmap.clone()),
            None => self.load_user(user).map(Arc::new),
        }
    }
}
