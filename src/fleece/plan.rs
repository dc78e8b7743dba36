//! What a batch is going to do, found out before anything is done.
//!
//! * **Refused before begun.** Every rule is checked here, step by step, against the bitmaps as the steps before leave
//!   them. So a batch that breaks one has touched nothing, and its first error is the one reported; what can still fail
//!   afterwards is I/O.
//! * Rules, order of checks and texts are those of QEMU 10: what a batch removes is busy, and keeps its name, until the
//!   batch is done; a merge looks at each source in turn, and only then at the target's state.

use super::batch::{Action, BitmapRef, Refused};
use super::disk::Disk;
use super::fleece::Fleece;
use super::snapshot::SnapshotRequest;
use crate::bitmap::{AREA_MAX_BYTES, CheckpointEntry, CheckpointState, UserBitmap, UserBitmapState};
use crate::error::errno;
use crate::units::{DEFAULT_GRANULARITY, GRANULARITY_RANGE};
use std::sync::Arc;

/// Longest name of a bitmap in bytes.
const NAME_MAX_BYTES: usize = 1023;
/// What a default granularity is at least and at most, in bytes.
const DEFAULT_RANGE: (u64, u64) = (4096, DEFAULT_GRANULARITY);

type Checked<T> = std::result::Result<T, Refused>;

/// What a batch does: the bitmaps concerned, and what happens to their bits, in order.
#[derive(Debug, Default)]
pub(super) struct Plan {
    pub slots: Vec<Slot>,
    pub steps: Vec<Step>,
    /// Disks that are frozen for jobs: by which step, and the granularity of what is recorded, if anything is.
    pub freezes: Vec<(usize, Arc<Disk>, Option<u64>)>,
    /// The snapshot that is taken, and by which step.
    pub snapshot: Option<(usize, SnapshotRequest)>,
}

/// A bitmap that takes part.
#[derive(Debug)]
pub(super) struct Slot {
    pub disk: Arc<Disk>,
    pub name: String,
    pub origin: Origin,
    pub granularity: u64,
    pub persistent: bool,
    /// Whether it records when the batch is done.
    pub recording: bool,
    /// The directory has to say something new of it.
    pub changed: bool,
    /// It is gone when the batch is done.
    pub removed: bool,
    /// The batch has to know its bits.
    pub read: bool,
    busy: bool,
}

/// Where a bitmap comes from.
#[derive(Debug)]
pub(super) enum Origin {
    /// The batch adds it.
    Added,
    /// The directory has it.
    User(UserBitmap),
    /// A checkpoint owns it.
    Checkpoint(CheckpointEntry),
    /// The checkpoint that the batch makes owns it.
    NewCheckpoint,
}

/// What happens to bits; bitmaps by their slots.
#[derive(Debug)]
pub(super) enum Step {
    Clear(usize),
    Merge { target: usize, sources: Vec<usize> },
    Hold(usize),
}

/// Which states of a bitmap keep it from being used; one that is inconsistent always does, but for a removal.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Use {
    /// Its bits are changed (QEMU's BDRV_BITMAP_DEFAULT).
    Change,
    /// Its bits are read, or it begins or ceases to record (BDRV_BITMAP_ALLOW_RO).
    Read,
    /// It goes.
    Remove,
}

impl Slot {
    fn state(&self) -> Option<UserBitmapState> {
        match &self.origin {
            Origin::User(user) => Some(user.state),
            _ => None,
        }
    }

    /// Whether a checkpoint owns it.
    pub(super) fn is_checkpoint(&self) -> bool {
        matches!(self.origin, Origin::Checkpoint(_) | Origin::NewCheckpoint)
    }

    fn check(&self, what: Use) -> Checked<()> {
        let name = &self.name;
        if self.busy {
            let text = format!("Bitmap '{name}' is currently in use by another operation and cannot be used");
            return Err(Refused::new(errno::EBUSY, text));
        }
        let read_only = matches!(&self.origin, Origin::User(user) if user.read_only);
        if read_only && what != Use::Read {
            return Err(Refused::new(errno::EROFS, format!("Bitmap '{name}' is readonly and cannot be modified")));
        }
        if self.state() == Some(UserBitmapState::Inconsistent) && what != Use::Remove {
            let text = format!("Bitmap '{name}' is inconsistent and cannot be used");
            let hint = "remove it (block-dirty-bitmap-remove, `fleecefs bitmap remove`) and add a new one".to_owned();
            return Err(Refused { hint: Some(hint), ..Refused::new(errno::EINVAL, text) });
        }
        Ok(())
    }

    /// A checkpoint's bitmap is its own.
    fn check_users(&self) -> Checked<()> {
        if !self.is_checkpoint() {
            return Ok(());
        }
        let text = format!("Bitmap '{0}' belongs to checkpoint '{0}' and cannot be modified", self.name);
        let hint = format!("merge it into a bitmap of your own, or `fleecefs checkpoint delete MNT {}`", self.name);
        Err(Refused { hint: Some(hint), ..Refused::new(errno::EBUSY, text) })
    }
}

impl Plan {
    /// Checks all steps. The caller holds the control lock.
    pub(super) fn new(fleece: &Fleece, actions: &[Action]) -> Checked<Plan> {
        let mut plan = Plan::default();
        for (index, action) in actions.iter().enumerate() {
            plan.step(fleece, index, action).map_err(|refused| refused.at(index))?;
        }
        Ok(plan)
    }

    fn step(&mut self, fleece: &Fleece, index: usize, action: &Action) -> Checked<()> {
        match action {
            Action::Add { disk, name, granularity, persistent, disabled } => {
                self.add(fleece, &BitmapRef::new(disk, name), *granularity, *persistent, *disabled)
            }
            Action::Remove(bitmap) => {
                let slot = self.find(fleece, bitmap)?;
                self.checked(slot, Use::Remove)?;
                let slot = &mut self.slots[slot];
                (slot.removed, slot.busy, slot.changed) = (true, true, true);
                Ok(())
            }
            Action::Clear(bitmap) => {
                let slot = self.find(fleece, bitmap)?;
                self.checked(slot, Use::Change)?;
                self.slots[slot].changed = true;
                self.steps.push(Step::Clear(slot));
                Ok(())
            }
            Action::Enable(bitmap) => self.record(fleece, bitmap, true),
            Action::Disable(bitmap) => self.record(fleece, bitmap, false),
            Action::Merge { target, sources } => self.merge(fleece, target, sources),
            Action::Hold(bitmap) => self.hold(fleece, bitmap, Use::Change),
            Action::HoldToRead(bitmap) => self.hold(fleece, bitmap, Use::Read),
            Action::Freeze { disk, record } => {
                let disk = fleece.disk(disk).map_err(|_| Refused::unknown_device(disk))?;
                disk.check_freezable()?;
                self.freezes.push((index, disk, *record));
                Ok(())
            }
            Action::Snapshot(request) => {
                if self.snapshot.is_some() {
                    return Err(Refused::new(errno::EINVAL, "Only one snapshot can be taken in a transaction"));
                }
                fleece.check_request(request)?;
                let taken = |slot: &Slot| matches!(slot.origin, Origin::Added) && slot.name == request.name;
                if self.slots.iter().any(taken) {
                    return Err(Refused::new(errno::EEXIST, format!("Bitmap already exists: {}", request.name)));
                }
                self.snapshot = Some((index, request.clone()));
                Ok(())
            }
            Action::Abort => Err(Refused::new(errno::EINVAL, "Transaction aborted using Abort action")),
        }
    }

    /// Whether a bitmap may be used like that.
    fn checked(&self, slot: usize, what: Use) -> Checked<()> {
        self.slots[slot].check(what)?;
        self.slots[slot].check_users()
    }

    fn add(
        &mut self,
        fleece: &Fleece,
        bitmap: &BitmapRef,
        granularity: Option<u64>,
        persistent: bool,
        disabled: bool,
    ) -> Checked<()> {
        let BitmapRef { disk: disk_name, name } = bitmap;
        if name.is_empty() {
            return Err(Refused::new(errno::EINVAL, "Bitmap name cannot be empty"));
        }
        let disk = fleece.disk(disk_name).map_err(|_| Refused::unknown_device(disk_name))?;
        let granularity = granularity.unwrap_or_else(|| default_granularity(&disk));
        if !granularity.is_power_of_two() || !GRANULARITY_RANGE.contains(&granularity) {
            return Err(Refused::new(errno::EINVAL, "Granularity must be power of 2 and at least 512"));
        }
        if self.slot_of(fleece, bitmap)?.is_some() {
            return Err(Refused::new(errno::EEXIST, format!("Bitmap already exists: {name}")));
        }
        if persistent {
            self.check_storable(&disk, name, granularity)?;
        }
        if name.len() > NAME_MAX_BYTES {
            return Err(Refused::new(errno::ENAMETOOLONG, format!("Bitmap name too long: {name}")));
        }
        if name.contains('\0') {
            return Err(Refused::new(errno::EINVAL, "Bitmap name cannot contain NUL"));
        }
        self.slots.push(Slot {
            disk,
            name: name.clone(),
            origin: Origin::Added,
            granularity,
            persistent,
            recording: !disabled,
            changed: true,
            removed: false,
            read: false,
            busy: false,
        });
        Ok(())
    }

    /// Whether the image can keep one more bitmap, or else the sidecar.
    fn check_storable(&self, disk: &Arc<Disk>, name: &str, granularity: u64) -> Checked<()> {
        let refused = |why: &str| {
            let text = format!("Can't make bitmap '{name}' persistent in '{}': {why}", disk.name());
            Err(Refused::new(errno::EINVAL, text))
        };
        let Some(image) = disk.image().stored() else {
            let bytes = disk.size().div_ceil(granularity).div_ceil(8);
            let fits = bytes <= AREA_MAX_BYTES;
            return if fits {
                Ok(())
            } else {
                refused("Too much space will be occupied by the bitmap. Use larger granularity")
            };
        };
        let directory = disk.tracking.directory();
        let added = |slot: &&Slot| {
            matches!(slot.origin, Origin::Added) && slot.persistent && !slot.removed && Arc::ptr_eq(&slot.disk, disk)
        };
        let mut others: Vec<&str> = self.slots.iter().filter(added).map(|slot| slot.name.as_str()).collect();
        others.extend(directory.bitmaps.iter().filter(|user| user.persistent).map(|user| user.name.as_str()));
        image.can_store(name, granularity, &others).or_else(|why| refused(&why))
    }

    fn hold(&mut self, fleece: &Fleece, bitmap: &BitmapRef, what: Use) -> Checked<()> {
        let slot = self.find(fleece, bitmap)?;
        self.checked(slot, what)?;
        let held = &mut self.slots[slot];
        (held.busy, held.read) = (true, true);
        self.steps.push(Step::Hold(slot));
        Ok(())
    }

    fn record(&mut self, fleece: &Fleece, bitmap: &BitmapRef, recording: bool) -> Checked<()> {
        let slot = self.find(fleece, bitmap)?;
        self.checked(slot, Use::Read)?;
        let slot = &mut self.slots[slot];
        if slot.recording != recording {
            (slot.recording, slot.changed, slot.read) = (recording, true, true);
        }
        Ok(())
    }

    fn merge(&mut self, fleece: &Fleece, target: &BitmapRef, sources: &[BitmapRef]) -> Checked<()> {
        let target = self.find(fleece, target)?;
        let mut found = Vec::new();
        for source in sources {
            let source = self.find(fleece, source)?;
            self.checked(target, Use::Change)?;
            self.slots[source].check(Use::Read)?;
            let (to, from) = (self.slots[target].disk.size(), self.slots[source].disk.size());
            if to != from {
                let text = format!(
                    "Bitmaps are of different sizes (destination size is {to}, source size is {from}) and can't be merged"
                );
                return Err(Refused::new(errno::EINVAL, text));
            }
            found.push(source);
        }
        found.retain(|source| *source != target);
        if found.is_empty() {
            return Ok(());
        }
        found.iter().for_each(|source| self.slots[*source].read = true);
        (self.slots[target].changed, self.slots[target].read) = (true, true);
        self.steps.push(Step::Merge { target, sources: found });
        Ok(())
    }

    /// The slot of a bitmap that has to be there.
    fn find(&mut self, fleece: &Fleece, bitmap: &BitmapRef) -> Checked<usize> {
        fleece.disk(&bitmap.disk).map_err(|_| Refused::unknown_disk(&bitmap.disk))?;
        self.slot_of(fleece, bitmap)?.ok_or_else(|| Refused::unknown_bitmap(&bitmap.name))
    }

    /// The slot of a bitmap, made where the bitmap is there.
    fn slot_of(&mut self, fleece: &Fleece, bitmap: &BitmapRef) -> Checked<Option<usize>> {
        let same = |slot: &Slot| slot.disk.name() == bitmap.disk && slot.name == bitmap.name;
        if let Some(slot) = self.slots.iter().position(same) {
            return Ok(Some(slot));
        }
        let disk = fleece.disk(&bitmap.disk).map_err(|_| Refused::unknown_disk(&bitmap.disk))?;
        let directory = disk.tracking.directory();
        let user = directory.bitmaps.iter().find(|user| user.name == bitmap.name);
        let checkpoint = directory.checkpoints.iter().find(|entry| entry.name == bitmap.name);
        let made = |request: &SnapshotRequest| {
            request.name == bitmap.name && (request.disks.is_empty() || request.disks.contains(&bitmap.disk))
        };
        let (origin, granularity, recording, persistent) = match (user, checkpoint) {
            (Some(user), _) => {
                let recording = user.state == UserBitmapState::Recording;
                (Origin::User(user.clone()), user.bitmap.granularity, recording, user.persistent)
            }
            (None, Some(entry)) => {
                let recording = entry.state == CheckpointState::Recording;
                (Origin::Checkpoint(entry.clone()), entry.bitmap.granularity, recording, true)
            }
            (None, None) if self.snapshot.as_ref().is_some_and(|(_, request)| made(request)) => {
                (Origin::NewCheckpoint, DEFAULT_GRANULARITY, true, true)
            }
            (None, None) => return Ok(None),
        };
        let busy = matches!(origin, Origin::User(_)) && disk.holds.held(&bitmap.name).is_some();
        self.slots.push(Slot {
            disk,
            name: bitmap.name.clone(),
            origin,
            granularity,
            persistent,
            recording,
            changed: false,
            removed: false,
            read: false,
            busy,
        });
        Ok(Some(self.slots.len() - 1))
    }
}

/// The granularity of a bitmap for which none is asked.
fn default_granularity(disk: &Disk) -> u64 {
    let (least, most) = DEFAULT_RANGE;
    disk.image().cluster_bytes().map_or(DEFAULT_GRANULARITY, |bytes| bytes.clamp(least, most))
}
