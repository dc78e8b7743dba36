//! One instant of several disks (I5), and the change of their directories that it belongs to.
//!
//! Everything that needs I/O comes before or after: first stores, bitmaps and, where layers are published, the change
//! as *prepared* in each directory; then the gates of all disks concerned are held exclusively, in name order, while
//! layers are published and recording bitmaps put beside or in place of others, in memory alone; then what has to be
//! durable is written, and the change is committed on all disks or on none; then the answer.
//!
//! Until a directory says durably what counts, both its bitmaps record, those of before and those of after: whatever
//! a recovery goes by is true. Where a commit fails, the change is taken back; while that fails too, it stays so, and
//! the next operation first tries again.

use super::Disk;
use super::fleece::Fleece;
use super::skip::{self, Skip};
use super::snapshot::{Snapshot, Taking, not_taken};
use super::transaction::{self, Part};
use super::view::View;
use super::work::{Lists, Work};
use crate::bitmap::{BitmapEntry, PreparedAction};
use crate::error::Result;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;
use uuid::Uuid;

/// A snapshot that is to be taken.
pub(super) struct NewSnapshot {
    pub name: String,
    pub uuid: Uuid,
    pub time_ns: i64,
    pub taking: Vec<Taking>,
    pub skip: Skip,
}

/// A change of several disks that could not be made durable. The coordinator's directory decides, so it goes first.
pub(super) struct FailedChange {
    transaction: Uuid,
    /// The checkpoint that it would have made.
    checkpoint: Option<Uuid>,
    disks: Vec<Arc<Disk>>,
    taking: Vec<Taking>,
    /// What was sealed for it: areas to give back.
    sealed: Vec<Option<BitmapEntry>>,
    lists: Lists,
    /// On how many of the disks it is taken back: not again, as what it left there (a hidden layer) may be gone.
    back: usize,
}

impl FailedChange {
    /// Takes it back; may be repeated after an error.
    pub(super) fn undo(&mut self) -> Result<()> {
        for disk in self.disks.iter().skip(self.back) {
            let taking = self.taking.iter().find(|one| Arc::ptr_eq(&one.disk, disk));
            let made = |checkpoint| disk.tracking.directory().checkpoints.iter().any(|entry| entry.uuid == checkpoint);
            if self.checkpoint.is_some_and(made) {
                // What was disarmed while this directory let the new bitmap alone record was saved for that one only.
                disk.arm_all()?;
            }
            disk.tracking.sidecar.commit(|directory| {
                directory.prepared = None;
                directory.committed.retain(|id| *id != self.transaction);
                if let Some(bitmaps) = self.lists.old(disk) {
                    let now = std::mem::replace(&mut directory.bitmaps, bitmaps.clone());
                    super::lost::keep_lost(&mut directory.bitmaps, &now);
                }
                if let (Some(taking), Some(checkpoint)) = (taking, self.checkpoint) {
                    taking.undo_in(directory, checkpoint);
                }
                Ok(())
            })?;
            if let Some(taking) = taking {
                taking.undone();
            }
            self.back += 1;
        }
        for (one, entry) in self.taking.iter().zip(&self.sealed) {
            entry.iter().for_each(|entry| one.disk.tracking.abandon(entry));
        }
        self.lists.abandon();
        self.disks.iter().for_each(|disk| disk.stop_unnamed());
        Ok(())
    }
}

impl Fleece {
    /// Makes what is prepared happen: `snapshot`, and the changes of `work`, at one instant.
    pub(super) fn make_happen(&self, snapshot: Option<NewSnapshot>, work: &mut Work) -> Result<Option<Arc<Snapshot>>> {
        let (head, mut taking, skip) = match snapshot {
            Some(NewSnapshot { name, uuid, time_ns, taking, skip }) => (Some((name, uuid, time_ns)), taking, skip),
            None => (None, Vec::new(), Skip::default()),
        };
        let id = Uuid::new_v4();
        let mut parts = parts_of(&taking, &work.lists);
        if !taking.is_empty()
            && let Err(e) = transaction::prepare(id, &parts)
        {
            taking.iter().for_each(Taking::forget);
            work.forget();
            return Err(e);
        }
        let named = |disk: &Arc<Disk>| (disk.name().to_owned(), disk.clone());
        let mut disks: BTreeMap<String, Arc<Disk>> = work.disks().map(named).collect();
        disks.extend(taking.iter().map(|one| named(&one.disk)));
        self.at_one_instant(disks.values(), || {
            work.publish();
            taking.iter().for_each(Taking::publish);
            work.switch();
        });
        skip::leave_out(&mut taking, skip);
        let mut sealed = Vec::new();
        let saved = taking.iter().try_for_each(|one| one.seal().map(|entry| sealed.push(entry)));
        // On all disks before the first commit: recovery takes what is in an area for all that was written there.
        let saved = saved.and_then(|()| work.save());
        let saved = saved.and_then(|()| parts.iter().try_for_each(|part| part.disk.tracking.sidecar.sync()));
        if let Err(e) = saved.and_then(|()| commit(id, &mut parts, &taking, &sealed, &work.lists)) {
            taking.iter().for_each(Taking::record_both);
            let checkpoint = head.as_ref().map(|(_, uuid, _)| *uuid);
            let lists = std::mem::take(&mut work.lists);
            let changes = |disk: &Arc<Disk>| parts.iter().any(|part| Arc::ptr_eq(&part.disk, disk));
            let (disks, others): (Vec<_>, Vec<_>) = disks.into_values().partition(changes);
            others.iter().for_each(|disk| disk.stop_unnamed());
            self.take_back(FailedChange { transaction: id, checkpoint, disks, taking, sealed, lists, back: 0 });
            return Err(match &head {
                Some((name, ..)) => not_taken(name, e),
                None => e,
            });
        }
        for disk in disks.values() {
            work.begin_holds(disk, &self.reaper);
            disk.stop_unnamed();
            disk.renew_loss();
        }
        let Some((name, uuid, time_ns)) = head else { return Ok(None) };
        let views = taking.iter().filter_map(Taking::view).map(Arc::new).collect();
        taking.iter().for_each(Taking::done);
        let snapshot = Arc::new(Snapshot::new(name, uuid, time_ns, views, self.reaper()));
        self.snapshots.write().push(snapshot.clone());
        Ok(Some(snapshot))
    }

    /// Replaces users' bitmaps in the directories of several disks, on all or on none; both the old and the new ones
    /// record.
    pub(super) fn replace(&self, lists: Lists) -> Result<()> {
        let id = Uuid::new_v4();
        let mut parts = parts_of(&[], &lists);
        let disks: Vec<_> = parts.iter().map(|part| part.disk.clone()).collect();
        if let Err(e) = commit(id, &mut parts, &[], &[], &lists) {
            let (taking, sealed) = (Vec::new(), Vec::new());
            self.take_back(FailedChange { transaction: id, checkpoint: None, disks, taking, sealed, lists, back: 0 });
            return Err(e);
        }
        Ok(())
    }

    fn take_back(&self, mut failed: FailedChange) {
        if let Err(second) = failed.undo() {
            log::error!("{second}; tried again before the next change");
            self.unsettled.lock().push(failed);
        }
        self.reaper().wake();
    }

    /// I5: all gates, then memory only, then all gates open again. The disks come in name order.
    ///
    /// Guests give way meanwhile: where this thread is preempted, those at the gates that it has wait for its next turn.
    fn at_one_instant<'a>(&self, disks: impl Iterator<Item = &'a Arc<Disk>>, switch: impl FnOnce()) {
        let asked = Instant::now();
        self.counters.give_way(u32::MAX);
        let gates: Vec<_> = disks.map(|disk| disk.gate.write()).collect();
        switch();
        drop(gates);
        self.counters.give_no_way();
        self.counters.freeze_ns.add(asked.elapsed().as_nanos() as u64);
    }
}

/// One part a disk whose directory changes, in name order. Of bitmaps it has what is there now: their change is known
/// only after the instant, and until then nothing is committed.
fn parts_of(taking: &[Taking], lists: &Lists) -> Vec<Part> {
    let mut parts: BTreeMap<String, Part> = BTreeMap::new();
    for (disk, old) in lists.all_old() {
        let action = PreparedAction::Bitmaps { bitmaps: old.clone() };
        parts.insert(disk.name().to_owned(), Part { disk: disk.clone(), action });
    }
    for one in taking {
        parts.insert(one.disk.name().to_owned(), one.part());
    }
    parts.into_values().collect()
}

/// The decision, durable: bits are in the sidecars by now.
fn commit(
    id: Uuid,
    parts: &mut [Part],
    taking: &[Taking],
    sealed: &[Option<BitmapEntry>],
    lists: &Lists,
) -> Result<()> {
    for part in parts.iter_mut() {
        let taken = taking.iter().find(|one| Arc::ptr_eq(&one.disk, &part.disk));
        if let (Some(taken), PreparedAction::Snapshot { layer, .. }) = (taken, &mut part.action) {
            layer.clone_from(&taken.layer_entry);
        }
        let Some(new) = lists.new_of(&part.disk) else { continue };
        match &mut part.action {
            PreparedAction::Snapshot { bitmaps, .. } => *bitmaps = Some(new.clone()),
            PreparedAction::Bitmaps { bitmaps } => bitmaps.clone_from(new),
            _ => (),
        }
    }
    if parts.len() > 1 && (!lists.is_empty() || taking.iter().any(Taking::leaves_out)) {
        transaction::prepare_again(id, parts)?;
    }
    transaction::commit(id, parts, |index| {
        let disk = &parts.get(index)?.disk;
        let taking = taking.iter().position(|one| Arc::ptr_eq(&one.disk, disk))?;
        sealed.get(taking).cloned().flatten()
    })
}

impl Taking {
    /// The view of what was taken.
    pub(super) fn view(&self) -> Option<View> {
        View::new(self.disk.clone(), self.layer.clone(), &self.layer_entry)
    }
}
