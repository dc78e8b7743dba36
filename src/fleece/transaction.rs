//! Changes of several disks' directories that happen on all of them or on none.
//!
//! Each disk's directory first holds the change as *prepared*, with the transaction's id and the coordinator: the
//! first disk in name order. Then the coordinator's directory makes the change and records the id as committed; that
//! single durable write decides. Then the others follow; one that cannot be written stays pending and is settled before
//! the next operation. Recovery asks the coordinator: committed, the prepared change
//! is made; not, or coordinator not there, it is taken back. A change of one disk alone is one commit.

use super::disk::Disk;
use crate::bitmap::{
    BitmapEntry, CheckpointEntry, CheckpointState, ConsumerEntry, Directory, LayerEntry, Prepared, PreparedAction,
};
use crate::error::Result;
use std::sync::Arc;
use uuid::Uuid;

/// Most committed transactions that a coordinator remembers; the others follow within the same operation.
const MAX_COMMITTED: usize = 16;

/// One disk's part of a transaction.
pub(super) struct Part {
    pub disk: Arc<Disk>,
    pub action: PreparedAction,
}

/// Prepares every part durably. On an error nothing is left prepared.
pub(super) fn prepare(id: Uuid, parts: &[Part]) -> Result<()> {
    let disks: Vec<Uuid> = parts.iter().map(|part| part.disk.uuid()).collect();
    let Some(&coordinator) = disks.first() else { return Ok(()) };
    for (index, part) in parts.iter().enumerate() {
        let prepared = Prepared { transaction: id, coordinator, disks: disks.clone(), action: part.action.clone() };
        let done = part.disk.tracking.sidecar.commit(|directory| {
            directory.prepared = Some(prepared);
            Ok(())
        });
        if let Err(e) = done {
            take_back(&parts[..index]);
            return Err(e);
        }
    }
    Ok(())
}

/// Prepares parts anew, with what is known only now. After an error some are as they were.
pub(super) fn prepare_again(id: Uuid, parts: &[Part]) -> Result<()> {
    let disks: Vec<Uuid> = parts.iter().map(|part| part.disk.uuid()).collect();
    let Some(&coordinator) = disks.first() else { return Ok(()) };
    for part in parts {
        let prepared = Prepared { transaction: id, coordinator, disks: disks.clone(), action: part.action.clone() };
        part.disk.tracking.sidecar.commit(|directory| {
            directory.prepared = Some(prepared);
            Ok(())
        })?;
    }
    Ok(())
}

/// Takes prepared parts back; the directories then say nothing of them.
pub(super) fn take_back(parts: &[Part]) {
    for part in parts {
        let done = part.disk.tracking.sidecar.commit(|directory| {
            directory.prepared = None;
            Ok(())
        });
        if let Err(e) = done {
            // While it is in doubt what the coordinator's directory says, the others stay prepared.
            log::warn!("disk '{}': {e}", part.disk.name());
            return;
        }
    }
}

/// Commits every part, the coordinator's first. `sealed` gives the entry of a bitmap that the part seals.
/// The error is the first one; parts before it are committed.
pub(super) fn commit(id: Uuid, parts: &[Part], sealed: impl Fn(usize) -> Option<BitmapEntry>) -> Result<()> {
    for (index, part) in parts.iter().enumerate() {
        part.disk.tracking.sidecar.commit(|directory| {
            apply(directory, &part.action, sealed(index));
            directory.prepared = None;
            if index == 0 && parts.len() > 1 {
                remember(directory, id);
            }
            Ok(())
        })?;
    }
    Ok(())
}

/// All of a transaction that needs nothing between prepare and commit. An error means that nothing happened: once the
/// coordinator has committed, a part that cannot be written is left to [`settle`].
pub(super) fn run(parts: &[Part]) -> Result<()> {
    let id = Uuid::new_v4();
    if parts.len() > 1 {
        prepare(id, parts)?;
    }
    let done = commit(id, parts, |_| None);
    match (&done, parts.first()) {
        (Err(e), Some(first)) if first.disk.tracking.directory().committed.contains(&id) => {
            log::error!("disk '{}' and others: {e}; tried again before the next change", first.disk.name());
            Ok(())
        }
        _ => done.inspect_err(|_| take_back(parts)),
    }
}

/// Makes, or takes back, what an earlier transaction left prepared on a disk, going by its coordinator among `disks`.
pub(super) fn settle(disk: &Disk, disks: &[Arc<Disk>]) -> Result<()> {
    let directory = disk.tracking.directory();
    let Some(prepared) = &directory.prepared else { return Ok(()) };
    let coordinator = disks.iter().find(|other| other.uuid() == prepared.coordinator);
    let committed =
        coordinator.is_some_and(|other| other.tracking.directory().committed.contains(&prepared.transaction));
    // A snapshot is taken back by who was taking it; one that was never published has left nothing to make.
    let action =
        Some(&prepared.action).filter(|action| committed && !matches!(action, PreparedAction::Snapshot { .. }));
    disk.tracking.sidecar.commit(|directory| {
        directory.prepared = None;
        action.iter().for_each(|action| apply(directory, action, None));
        Ok(())
    })
}

fn remember(directory: &mut Directory, id: Uuid) {
    directory.committed.push(id);
    let extra = directory.committed.len().saturating_sub(MAX_COMMITTED);
    directory.committed.drain(..extra);
}

/// Makes a change in a directory. `sealed`: the saved form of the bitmap that recorded until now.
pub(super) fn apply(directory: &mut Directory, action: &PreparedAction, sealed: Option<BitmapEntry>) {
    match action {
        PreparedAction::Snapshot { layer, checkpoint, bitmaps } => {
            apply_snapshot(directory, layer, checkpoint, sealed);
            if let Some(bitmaps) = bitmaps {
                directory.bitmaps.clone_from(bitmaps);
            }
        }
        PreparedAction::Bitmaps { bitmaps } => directory.bitmaps.clone_from(bitmaps),
        PreparedAction::Complete { checkpoint, consumer } => {
            for entry in directory.checkpoints.iter_mut().filter(|entry| entry.uuid == *checkpoint) {
                entry.completed = true;
            }
            hide_layer(directory, *checkpoint);
            if let Some(consumer) = consumer {
                set_consumer(directory, consumer);
            }
        }
        PreparedAction::Cancel { checkpoint } => hide_layer(directory, *checkpoint),
        PreparedAction::Consumer { entry } => set_consumer(directory, entry),
    }
}

fn apply_snapshot(
    directory: &mut Directory,
    layer: &LayerEntry,
    checkpoint: &CheckpointEntry,
    sealed: Option<BitmapEntry>,
) {
    if let (Some(last), Some(sealed)) = (directory.checkpoints.last_mut(), sealed) {
        last.state = CheckpointState::Sealed;
        last.bitmap = sealed;
    }
    directory.checkpoints.push(checkpoint.clone());
    directory.layers.push(layer.clone());
    directory.next_layer = directory.next_layer.max(layer.seq + 1);
}

/// The view of `checkpoint` goes; its layer may stay, hidden.
fn hide_layer(directory: &mut Directory, checkpoint: Uuid) {
    for layer in &mut directory.layers {
        if layer.snapshot.as_ref().is_some_and(|snapshot| snapshot.checkpoint == checkpoint) {
            layer.snapshot = None;
        }
    }
}

fn set_consumer(directory: &mut Directory, entry: &ConsumerEntry) {
    directory.consumers.retain(|consumer| consumer.name != entry.name);
    directory.consumers.push(entry.clone());
}
