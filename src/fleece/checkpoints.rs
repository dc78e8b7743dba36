//! Checkpoints and consumers: naming instants, and who has read up to which.
//!
//! Deleting checkpoint A merges its bitmap into P, the one before it, so that no change is forgotten. Where A records,
//! P records from then on: it is switched in beside A, under the gate, before A's bits are added, so that every write
//! is in P; A stops after the directory no longer names it.

use super::disk::Disk;
use super::fleece::Fleece;
use super::tracking::{Recording, recording_entry};
use crate::bitmap::{BitmapEntry, CheckpointEntry, CheckpointState, ConsumerEntry, Directory, PreparedAction};
use crate::error::{Error, Result, errno};
use crate::sync::Mutex;
use crate::units::check_name;
use std::collections::BTreeSet;
use std::sync::Arc;
use uuid::Uuid;

/// The names of the consumers that somebody works for.
pub(super) type Working = Arc<Mutex<BTreeSet<String>>>;

/// A consumer is at work, and nobody else begins to work for it; until this value goes. It keeps nobody from setting or
/// deleting the consumer.
#[derive(Debug)]
pub struct ConsumerLock {
    name: String,
    working: Working,
}

impl Drop for ConsumerLock {
    fn drop(&mut self) {
        self.working.lock().remove(&self.name);
    }
}

impl Fleece {
    /// Deletes a checkpoint; its changes go to the one before it. EBUSY while a consumer or an open snapshot needs it.
    pub fn delete_checkpoint(&self, name: &str) -> Result<()> {
        let _control = self.control.lock();
        self.settle()?;
        let mut found = Vec::new();
        for disk in self.disks() {
            let directory = disk.tracking.directory();
            let Some(entry) = directory.checkpoints.iter().find(|entry| entry.name == name) else { continue };
            if let Some(who) = self.pinned(&disk, entry.uuid) {
                return Err(Error::new(errno::EBUSY, format!("checkpoint '{name}'"), format!("{who} needs it"))
                    .hint("complete or cancel the snapshot, move or delete the consumer first"));
            }
            found.push((disk.clone(), entry.uuid));
        }
        if found.is_empty() {
            return Err(unknown_checkpoint(name));
        }
        for (disk, uuid) in found {
            self.merge_away(&disk, uuid)?;
        }
        log::info!("checkpoint '{name}' deleted");
        Ok(())
    }

    /// Who keeps a checkpoint from being deleted: a consumer that points at it, or an open snapshot.
    pub(super) fn pinned(&self, disk: &Disk, checkpoint: Uuid) -> Option<String> {
        let directory = disk.tracking.directory();
        if let Some(consumer) = directory.consumers.iter().find(|consumer| consumer.checkpoint == checkpoint) {
            return Some(format!("consumer '{}'", consumer.name));
        }
        let snapshots = self.snapshots.read();
        let lingering = self.lingering.read();
        snapshots.iter().chain(lingering.iter().filter(|snapshot| !snapshot.is_gone())).find_map(|snapshot| {
            let view = snapshot.view(disk.name()).ok()?;
            let needs = snapshots.iter().any(|open| Arc::ptr_eq(open, snapshot)) && snapshot.uuid() == checkpoint
                || view.reference().is_some_and(|reference| reference.uuid == checkpoint);
            needs.then(|| format!("open snapshot '{}'", snapshot.name()))
        })
    }

    /// Merges a checkpoint of one disk into the one before it.
    pub(super) fn merge_away(&self, disk: &Disk, checkpoint: Uuid) -> Result<()> {
        let directory = disk.tracking.directory();
        let Some(index) = directory.checkpoints.iter().position(|entry| entry.uuid == checkpoint) else {
            return Ok(());
        };
        let entry = &directory.checkpoints[index];
        let before = index.checked_sub(1).map(|before| &directory.checkpoints[before]);
        match (before, entry.state) {
            (None, _) => remove(disk, entry, None),
            (Some(before), CheckpointState::Recording) => merge_recording(disk, before, entry),
            (Some(before), _) => merge_sealed(disk, before, entry),
        }
    }

    /// Merges the oldest checkpoints away until no more than the limit are left, never one that is needed.
    pub(super) fn retain_checkpoints(&self) {
        let limit = self.options().keep_checkpoints.max(1);
        for disk in self.disks() {
            let directory = disk.tracking.directory();
            let extra = directory.checkpoints.len().saturating_sub(limit);
            let old = directory.checkpoints.iter().take(directory.checkpoints.len().saturating_sub(1));
            for entry in old.filter(|entry| self.pinned(&disk, entry.uuid).is_none()).take(extra) {
                if let Err(e) = self.merge_away(&disk, entry.uuid) {
                    log::warn!("disk '{}': checkpoint '{}' could not be merged away: {e}", disk.name(), entry.name);
                }
            }
        }
    }

    /// Points a consumer at a checkpoint, on every disk that has it. ENOENT for an unknown checkpoint.
    pub fn set_consumer(&self, name: &str, checkpoint: &str) -> Result<()> {
        let _control = self.control.lock();
        check_name("consumer", name)?;
        self.settle()?;
        let mut parts = Vec::new();
        for disk in self.disks() {
            let directory = disk.tracking.directory();
            if let Some(entry) = directory.checkpoints.iter().find(|entry| entry.name == checkpoint) {
                let previous = directory.consumers.iter().find(|consumer| consumer.name == name).map(|c| c.checkpoint);
                let entry = ConsumerEntry { name: name.to_owned(), checkpoint: entry.uuid, previous };
                parts.push((disk, PreparedAction::Consumer { entry }));
            }
        }
        if parts.is_empty() {
            return Err(unknown_checkpoint(checkpoint));
        }
        self.transact(parts)
    }

    /// Says that somebody works for a consumer, known or not. EBUSY where somebody does already.
    pub fn lock_consumer(&self, name: &str) -> Result<ConsumerLock> {
        check_name("consumer", name)?;
        if !self.working.lock().insert(name.to_owned()) {
            return Err(Error::new(errno::EBUSY, format!("consumer '{name}'"), "is at work already")
                .hint("wait until the other run has ended, or take a consumer of its own"));
        }
        Ok(ConsumerLock { name: name.to_owned(), working: self.working.clone() })
    }

    /// Forgets a consumer. ENOENT for an unknown name.
    pub fn delete_consumer(&self, name: &str) -> Result<()> {
        let _control = self.control.lock();
        self.settle()?;
        let knows = |directory: &Directory| directory.consumers.iter().any(|consumer| consumer.name == name);
        let disks: Vec<_> = self.disks().into_iter().filter(|disk| knows(&disk.tracking.directory())).collect();
        if disks.is_empty() {
            return Err(Error::new(errno::ENOENT, format!("consumer '{name}'"), "no such consumer")
                .hint("`fleecefs consumer list` lists the consumers"));
        }
        for disk in disks {
            disk.tracking.sidecar.commit(|directory| {
                directory.consumers.retain(|consumer| consumer.name != name);
                Ok(())
            })?;
        }
        Ok(())
    }
}

fn unknown_checkpoint(name: &str) -> Error {
    Error::new(errno::ENOENT, format!("checkpoint '{name}'"), "no such checkpoint")
        .hint("list them with `fleecefs checkpoint list`")
}

/// Takes a checkpoint out of the directory; `merged` is the new bitmap of the one before it.
fn remove(disk: &Disk, gone: &CheckpointEntry, merged: Option<(Uuid, BitmapEntry, CheckpointState)>) -> Result<()> {
    disk.tracking.sidecar.commit(|directory| {
        if let Some((before, bitmap, state)) = merged {
            for entry in directory.checkpoints.iter_mut().filter(|entry| entry.uuid == before) {
                entry.bitmap = bitmap.clone();
                entry.state = state;
            }
        }
        directory.checkpoints.retain(|entry| entry.uuid != gone.uuid);
        Ok(())
    })?;
    let mut list = (*disk.tracking.recording()).clone();
    if list.iter().any(|recording| recording.uuid == gone.bitmap.uuid) {
        // Writers that still hold the longer list mark the bitmap in vain; the one before has their marks too.
        list.retain(|recording| recording.uuid != gone.bitmap.uuid);
        disk.tracking.switch(list);
        disk.tracking.forget_words(gone.bitmap.uuid);
    }
    Ok(())
}

/// The newer one records: the older one records from now on, with both contents.
fn merge_recording(disk: &Disk, older: &CheckpointEntry, newer: &CheckpointEntry) -> Result<()> {
    let tracking = &disk.tracking;
    let size = disk.size();
    let granularity = older.bitmap.granularity.min(newer.bitmap.granularity);
    let fresh = tracking.new_recording(granularity, size)?;
    {
        let _gate = disk.gate.write();
        tracking.also_record(&fresh);
    }
    // From here on every write is in `fresh`; what came before is added. The sum may be read at any time after.
    let sum = tracking.merged(older, newer, size)?;
    fresh.bitmap.merge_from(&sum.bitmap);
    let saved =
        fresh.area.as_ref().map_or(Ok(()), |area| tracking.sidecar.write_bits(area, fresh.bitmap.bits()).map(drop));
    let entry = BitmapEntry { everything: sum.everything, ..recording_entry(&fresh) };
    // The commit makes the bits durable. A round of disarming passes over until then: `fresh` is not named yet.
    let done = saved.and_then(|()| remove(disk, newer, Some((older.uuid, entry, CheckpointState::Recording))));
    done.inspect_err(|_| {
        let mut list = (*tracking.recording()).clone();
        list.retain(|recording| recording.uuid != fresh.uuid);
        tracking.switch(list);
        tracking.give_back(&fresh);
    })
}

fn merge_sealed(disk: &Disk, older: &CheckpointEntry, newer: &CheckpointEntry) -> Result<()> {
    let tracking = &disk.tracking;
    let size = newer.bitmap.size;
    let sum = tracking.merged(older, newer, size)?;
    let bitmap = Arc::new(sum.bitmap);
    let sealed = tracking.seal(&Recording { uuid: Uuid::new_v4(), bitmap, area: None }, sum.everything)?;
    let merged = Some((older.uuid, sealed.clone(), CheckpointState::Sealed));
    remove(disk, newer, merged).inspect_err(|_| tracking.abandon(&sealed))
}
