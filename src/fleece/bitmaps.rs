//! Users' bitmaps, as users see and change them: QEMU's `block-dirty-bitmap-*` and `transaction`.
//!
//! * **All or nothing, at one instant.** A batch is checked as a whole before anything is done (`plan`); then its bits
//!   are put together under the gates of all its disks (`work`), and one commit of the directories makes it stand
//!   (`instant`). An error at any point leaves every bitmap as if the batch had not been tried.
//! * **Durable before the answer.** What a batch changed survives a kill and a power loss once it is answered.
//! * A checkpoint's bitmap is listed beside them: it can be read and merged from, and is nobody else's to change.
//!
//! `users` has how they live through opens and closes, `hold` how a job holds one.

use super::batch::{Action, Applied, BitmapInfo, BitmapRef, Refused};
use super::disk::Disk;
use super::fleece::Fleece;
use super::instant::NewSnapshot;
use super::plan::Plan;
use super::snapshot::{SnapshotRequest, Taking};
use super::work::Work;
use crate::bitmap::{CheckpointState, DirtyBitmap, UserBitmap, UserBitmapState};
use crate::error::{Result, errno};
use sha2::{Digest, Sha256};
use uuid::Uuid;

impl Fleece {
    /// Makes all changes at one instant, in order, or none. The first step that breaks a rule is the one reported.
    ///
    /// When it returns, what it changed survives a kill and a power loss. Errors: QEMU's texts where QEMU refuses, else
    /// the I/O error of what could not be written.
    pub fn apply(&self, actions: &[Action]) -> std::result::Result<Applied, Refused> {
        let _control = self.control.lock();
        self.settle()?;
        let plan = Plan::new(self, actions)?;
        // Who wrote before the instant did so before bitmaps cease to record, or are cleared.
        plan.slots.iter().try_for_each(|slot| slot.disk.check_foreign())?;
        let request = plan.snapshot.clone();
        let mut work = Work::prepare(plan)?;
        let snapshot = match &request {
            Some((index, request)) => {
                let made = self.prepare_snapshot(request);
                Some(made.inspect_err(|_| work.forget()).map_err(|e| Refused::from(e).at(*index))?)
            }
            None => None,
        };
        let snapshot = self.make_happen(snapshot, &mut work).inspect_err(|_| work.thaw())?;
        if let Some(snapshot) = &snapshot {
            self.snapshot_taken(snapshot);
        }
        let (holds, frozen) = work.into_made();
        Ok(Applied { snapshot, holds, frozen })
    }

    /// Refuses what [`Fleece::apply`] would refuse without having done anything.
    pub fn check(&self, actions: &[Action]) -> std::result::Result<(), Refused> {
        let _control = self.control.lock();
        Plan::new(self, actions).map(drop)
    }

    /// Makes all that a snapshot needs, on all disks or on none. Nothing is visible yet.
    pub(super) fn prepare_snapshot(&self, request: &SnapshotRequest) -> Result<NewSnapshot> {
        let disks = self.chosen_disks(&request.disks)?;
        let uuid = Uuid::new_v4();
        let time_ns = crate::storage::clock::now_ns();
        for disk in &disks {
            disk.check_freezable()?;
            disk.check_foreign()?;
            disk.begin_again()?;
        }
        let taking = self.once_gone(errno::ENOSPC, || Taking::prepare_all(&disks, request, uuid, time_ns))?;
        let skip = request.skip.unwrap_or(self.options().skip);
        Ok(NewSnapshot { name: request.name.clone(), uuid, time_ns, taking, skip })
    }

    /// The bitmaps of a disk, newest first, those of checkpoints too. ENOENT for an unknown disk.
    pub fn bitmaps(&self, disk: &str) -> Result<Vec<BitmapInfo>> {
        let disk = self.disk(disk)?;
        let directory = disk.tracking.directory();
        let users = directory.bitmaps.iter().map(|user| (user.time_ns, disk.user_info(user)));
        let mut all = users.collect::<Vec<_>>();
        for entry in &directory.checkpoints {
            let count = match &entry.bitmap.everything {
                Some(_) => disk.size().div_ceil(entry.bitmap.granularity) * entry.bitmap.granularity,
                None => disk.tracking.dirty_bytes(entry),
            };
            let info = BitmapInfo {
                name: entry.name.clone(),
                count,
                granularity: entry.bitmap.granularity,
                recording: entry.state == CheckpointState::Recording,
                busy: false,
                persistent: true,
                inconsistent: false,
                checkpoint: true,
            };
            all.push((entry.time_ns, info));
        }
        // Of several without a time the last one of the file is the newest.
        all.reverse();
        all.sort_by_key(|(time_ns, _)| std::cmp::Reverse(*time_ns));
        Ok(all.into_iter().map(|(_, info)| info).collect())
    }

    /// SHA-256 of a bitmap's bits, as QEMU's `x-debug-block-dirty-bitmap-sha256` gives it: of whole 64-bit words, least
    /// significant byte first, at least one. Of a bitmap that is held: as it was when the hold began.
    pub fn bitmap_sha256(&self, bitmap: &BitmapRef) -> std::result::Result<String, Refused> {
        let disk = self.disk(&bitmap.disk).map_err(|_| Refused::unknown_disk(&bitmap.disk))?;
        let directory = disk.tracking.directory();
        if let Some(held) = disk.holds.held(&bitmap.name) {
            return Ok(sha256(held.frozen()));
        }
        if let Some(user) = directory.bitmaps.iter().find(|user| user.name == bitmap.name) {
            return Ok(sha256(&disk.load_user(user)?));
        }
        match directory.checkpoints.iter().find(|entry| entry.name == bitmap.name) {
            Some(entry) => Ok(sha256(&disk.tracking.alone(entry, disk.size())?)),
            None => Err(Refused::unknown_bitmap(&bitmap.name)),
        }
    }
}

fn sha256(bitmap: &DirtyBitmap) -> String {
    let mut hash = Sha256::new();
    let words = bitmap.bits().words();
    if words.len() == 0 {
        hash.update([0; 8]);
    }
    for word in words {
        hash.update(word.to_le_bytes());
    }
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

impl Disk {
    /// One whose bits cannot be read is listed as inconsistent, and keeps none of the others from being listed.
    fn user_info(&self, user: &UserBitmap) -> BitmapInfo {
        let held = self.holds.held(&user.name);
        let recording = self.tracking.recording();
        let live = recording.iter().find(|recording| recording.uuid == user.bitmap.uuid);
        let count = match (&held, live) {
            (Some(held), _) => Some(held.count_bytes()),
            (None, Some(live)) => Some(live.bitmap.count_bytes()),
            (None, None) => {
                let loaded = self.load_user(user).inspect_err(|e| log::warn!("{e}"));
                loaded.ok().map(|bitmap| bitmap.count_bytes())
            }
        };
        BitmapInfo {
            name: user.name.clone(),
            count: count.unwrap_or(0),
            granularity: user.bitmap.granularity,
            recording: user.state == UserBitmapState::Recording,
            busy: held.is_some(),
            persistent: user.persistent,
            inconsistent: user.state == UserBitmapState::Inconsistent || count.is_none(),
            checkpoint: false,
        }
    }
}
