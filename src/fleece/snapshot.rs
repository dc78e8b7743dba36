//! Snapshots: frozen views of one or more disks, all at one instant (I5).
//!
//! Taking one: everything that needs I/O is made first (stores, bitmaps, the prepared transaction); then the gates of
//! all its disks are held exclusively, in name order, while layers are published and bitmaps switched, without any
//! I/O; then the old bitmaps are sealed and the transaction is committed. A layer is recorded durably, as prepared,
//! before it is published: a daemon killed in between finds it again, hidden, since older views may need it.

use super::fleece::{Fleece, Reaper};
use super::layer::{Layer, LayerWords};
use super::notes::check_notes;
use super::skip::Skip;
use super::tracking::{Recording, recording_checkpoint, recording_entry};
use super::transaction::{self, Part};
use super::view::{Point, View};
use super::work::Work;
use super::{Disk, Since};
use crate::bitmap::{
    BitmapEntry, CheckpointEntry, CheckpointState, ConsumerEntry, Directory, LayerEntry, Notes, PreparedAction,
    SkippedEntry, SnapshotEntry,
};
use crate::error::{Error, Result, errno};
use crate::sync::Mutex;
use crate::units::{DEFAULT_GRANULARITY, check_name};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;
use uuid::Uuid;

/// How often is looked again whether dropped snapshots have given back what they hold, and how long between.
const GONE_TRIES: u32 = 100;
const GONE_WAIT: Duration = Duration::from_millis(20);

/// What to freeze.
#[derive(Debug, Clone, Default)]
pub struct SnapshotRequest {
    /// Name of the snapshot and of its checkpoint.
    pub name: String,
    /// Names of the disks; empty: all.
    pub disks: Vec<String>,
    /// The reference point; None: the newest completed checkpoint of each disk.
    pub since: Option<Since>,
    /// What its maker says of it.
    pub notes: Notes,
    /// What its views leave out; None: as the mount says.
    pub skip: Option<Skip>,
}

/// A frozen view of one or more disks, all at one instant.
#[derive(Debug)]
pub struct Snapshot {
    name: String,
    uuid: Uuid,
    time_ns: i64,
    views: Vec<Arc<View>>,
    /// Shared with the snapshot object that this one replaced when a disk of it was added.
    holds: Arc<Mutex<Holds>>,
    pub(super) volumes: super::scan::Once,
    reaper: Reaper,
}

/// Who still reads a snapshot.
#[derive(Debug, Default)]
struct Holds {
    opens: u64,
    /// The user let go: the views live until the last close.
    dropped: bool,
}

impl Snapshot {
    pub(super) fn new(name: String, uuid: Uuid, time_ns: i64, views: Vec<Arc<View>>, reaper: Reaper) -> Self {
        let (holds, volumes) = (Arc::new(Mutex::new(Holds::default())), super::scan::Once::default());
        Snapshot { name, uuid, time_ns, views, holds, volumes, reaper }
    }

    /// The same snapshot with the view of one more disk.
    pub(super) fn with_view(&self, view: Arc<View>) -> Self {
        let mut views = self.views.clone();
        views.push(view);
        views.sort_by(|a, b| a.disk_name().cmp(b.disk_name()));
        Snapshot {
            name: self.name.clone(),
            uuid: self.uuid,
            time_ns: self.time_ns,
            views,
            holds: self.holds.clone(),
            // A logical volume may lie on that disk, too.
            volumes: super::scan::Once::default(),
            reaper: self.reaper.clone(),
        }
    }

    /// Its name, and its checkpoint's.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its identity, and its checkpoint's.
    pub fn uuid(&self) -> Uuid {
        self.uuid
    }

    /// The instant, in nanoseconds since the epoch.
    pub fn time_ns(&self) -> i64 {
        self.time_ns
    }

    /// One view a disk, in the disks' name order.
    pub fn views(&self) -> &[Arc<View>] {
        &self.views
    }

    /// The view of one disk.
    pub fn view(&self, disk: &str) -> Result<&Arc<View>> {
        self.views.iter().find(|view| view.disk_name() == disk).ok_or_else(|| {
            Error::new(errno::ENOENT, format!("disk '{disk}'"), format!("not in snapshot '{}'", self.name))
        })
    }

    /// Takes the hold of one open file. False: the snapshot is gone.
    pub fn opened(&self) -> bool {
        let mut holds = self.holds.lock();
        if holds.dropped && holds.opens == 0 {
            return false;
        }
        holds.opens += 1;
        true
    }

    /// The counterpart of [`Snapshot::opened`]; the last one of a dropped snapshot lets its layers go.
    pub fn closed(&self) {
        let mut holds = self.holds.lock();
        holds.opens = holds.opens.saturating_sub(1);
        if holds.dropped && holds.opens == 0 {
            self.let_go();
        }
    }

    /// The user let go of it. The views stay readable until the last close.
    pub(super) fn drop_views(&self) {
        let mut holds = self.holds.lock();
        holds.dropped = true;
        if holds.opens == 0 {
            self.let_go();
        }
    }

    /// Dropped, and nobody reads it any more.
    pub(super) fn is_gone(&self) -> bool {
        let holds = self.holds.lock();
        holds.dropped && holds.opens == 0
    }

    fn let_go(&self) {
        for view in &self.views {
            view.layer.hide();
        }
        self.reaper.wake();
    }

    /// Why a disk's view is broken, for the first one that is.
    pub fn broken(&self) -> Option<String> {
        self.views.iter().find_map(|view| view.broken())
    }
}

/// One disk's part of a snapshot that is being taken.
pub(super) struct Taking {
    pub(super) disk: Arc<Disk>,
    pub(super) layer: Arc<Layer>,
    recording: Recording,
    /// What recorded until now, if anything did.
    old: Option<Recording>,
    old_everything: Option<String>,
    pub(super) layer_entry: LayerEntry,
    checkpoint: CheckpointEntry,
}

impl Fleece {
    /// Freezes disks at one instant. EEXIST where the name is taken by a snapshot or a checkpoint.
    pub fn create_snapshot(&self, request: &SnapshotRequest) -> Result<Arc<Snapshot>> {
        let _control = self.control.lock();
        check_name("snapshot", &request.name)?;
        self.settle()?;
        self.check_request(request)?;
        let snapshot = self.make_happen(Some(self.prepare_snapshot(request)?), &mut Work::default())?;
        let snapshot = snapshot.ok_or_else(|| self.nothing_to_freeze())?;
        self.snapshot_taken(&snapshot);
        Ok(snapshot)
    }

    /// Whether a snapshot can be named so, and its disks are there.
    pub(super) fn check_request(&self, request: &SnapshotRequest) -> Result<()> {
        check_name("snapshot", &request.name)?;
        check_notes(&request.notes)?;
        self.check_name_free(&request.name)?;
        self.chosen_disks(&request.disks).map(drop)
    }

    pub(super) fn snapshot_taken(&self, snapshot: &Snapshot) {
        // Who wrote since the look before the freeze is in the view, but not in the interval that ends with it.
        for view in &snapshot.views {
            if let Err(e) = view.disk.check_foreign() {
                log::warn!("disk '{}': {e}", view.disk_name());
            }
        }
        log::info!("snapshot '{}' of {} disk(s) taken", snapshot.name, snapshot.views.len());
        self.counters.snapshots_taken.add(1);
        self.retain_checkpoints();
    }

    /// Tries again what fails with `errno` while dropped snapshots are still there: what they hold is given back soon
    /// after the last close of their files, and the kernel tells of a close after the fact.
    pub(super) fn once_gone<T>(&self, errno: i32, begin: impl Fn() -> Result<T>) -> Result<T> {
        let mut result = begin();
        for _ in 0..GONE_TRIES {
            if !matches!(&result, Err(e) if e.errno() == errno) {
                break;
            }
            self.reap();
            result = begin();
            if !self.reaper.has_thread() || self.lingering.read().is_empty() {
                break;
            }
            std::thread::sleep(GONE_WAIT);
        }
        result
    }

    pub(super) fn chosen_disks(&self, names: &[String]) -> Result<Vec<Arc<Disk>>> {
        let disks = self.disks.read();
        if let Some(unknown) = names.iter().find(|name| !disks.contains_key(*name)) {
            return Err(self.unknown_disk(unknown));
        }
        let chosen: Vec<_> = disks
            .values()
            .filter(|disk| names.is_empty() || names.iter().any(|name| name == disk.name()))
            .cloned()
            .collect();
        if chosen.is_empty() {
            return Err(self.nothing_to_freeze());
        }
        Ok(chosen)
    }

    fn nothing_to_freeze(&self) -> Error {
        Error::new(errno::ENODEV, "snapshot", "there is no disk to freeze").hint("add one with `fleecefs disk add`")
    }

    fn check_name_free(&self, name: &str) -> Result<()> {
        if self.snapshots.read().iter().any(|snapshot| snapshot.name == name) {
            return Err(Error::new(errno::EEXIST, format!("snapshot '{name}'"), "exists already"));
        }
        let in_image = |disk: &Arc<Disk>| disk.tracking.directory().bitmaps.iter().any(|user| user.name == name);
        if self.disks.read().values().any(in_image) {
            return Err(Error::new(errno::EEXIST, format!("snapshot '{name}'"), "a bitmap of that name exists")
                .hint("take another name"));
        }
        let taken = |disk: &Arc<Disk>| disk.tracking.directory().checkpoints.iter().any(|entry| entry.name == name);
        if self.disks.read().values().any(taken) {
            return Err(Error::new(errno::EEXIST, format!("snapshot '{name}'"), "a checkpoint of that name exists")
                .hint(format!("take another name, or `fleecefs checkpoint delete MNT {name}`")));
        }
        Ok(())
    }

    /// Ends a snapshot whose backup succeeded: the view goes, its checkpoint stays and counts as completed; `consumer`
    /// moves to it. One that cannot have been read as a whole
    /// goes too, but its checkpoint is not completed, and no consumer moves to it (EIO).
    pub fn complete_snapshot(&self, name: &str, consumer: Option<&str>) -> Result<()> {
        let _control = self.control.lock();
        if let Some(consumer) = consumer {
            check_name("consumer", consumer)?;
        }
        let snapshot = self.snapshot(name)?;
        self.settle()?;
        let damage = snapshot.views.iter().find_map(|view| view.damage());
        if let (Some(consumer), Some(reason)) = (consumer, &damage) {
            return Err(Error::new(
                errno::EIO,
                format!("snapshot '{name}'"),
                format!("consumer '{consumer}' cannot move to it: {reason}"),
            )
            .hint("cancel the snapshot and take a new one"));
        }
        let checkpoint = snapshot.uuid;
        let entry = consumer.map(|name| ConsumerEntry { name: name.to_owned(), checkpoint, previous: None });
        let action = match damage {
            None => PreparedAction::Complete { checkpoint, consumer: entry },
            Some(reason) => {
                // Nobody can have read it to its end: its checkpoint stays, but is no reference point.
                log::warn!("the checkpoint of snapshot '{name}' does not count as completed: {reason}");
                PreparedAction::Cancel { checkpoint }
            }
        };
        transaction::run(&parts_of(&snapshot, &action))?;
        self.retire(&snapshot);
        log::info!("snapshot '{name}' completed");
        Ok(())
    }

    /// Ends a snapshot whose backup failed: view and checkpoint go, no change is forgotten. The checkpoint stays while
    /// a consumer points at it, or another open snapshot counts from it.
    pub fn cancel_snapshot(&self, name: &str) -> Result<()> {
        let _control = self.control.lock();
        let snapshot = self.snapshot(name)?;
        self.settle()?;
        let action = PreparedAction::Cancel { checkpoint: snapshot.uuid };
        transaction::run(&parts_of(&snapshot, &action))?;
        self.retire(&snapshot);
        log::info!("snapshot '{name}' cancelled");
        for view in &snapshot.views {
            if self.pinned(&view.disk, snapshot.uuid).is_none() {
                self.merge_away(&view.disk, snapshot.uuid)?;
            }
        }
        Ok(())
    }

    /// Takes a snapshot out of the list; open files keep it until their last close.
    fn retire(&self, snapshot: &Arc<Snapshot>) {
        self.snapshots.write().retain(|other| !Arc::ptr_eq(other, snapshot));
        let mut lingering = self.lingering.write();
        lingering.retain(|other| !other.is_gone());
        lingering.push(snapshot.clone());
        drop(lingering);
        snapshot.drop_views();
    }
}

fn parts_of(snapshot: &Snapshot, action: &PreparedAction) -> Vec<Part> {
    snapshot.views.iter().map(|view| Part { disk: view.disk.clone(), action: action.clone() }).collect()
}

impl Taking {
    /// All disks' parts, or none.
    pub(super) fn prepare_all(
        disks: &[Arc<Disk>],
        request: &SnapshotRequest,
        uuid: Uuid,
        time_ns: i64,
    ) -> Result<Vec<Taking>> {
        let mut taking = Vec::new();
        for disk in disks {
            match Taking::prepare(disk.clone(), request, uuid, time_ns) {
                Ok(one) => taking.push(one),
                Err(e) => {
                    taking.iter().for_each(Taking::forget);
                    return Err(not_taken(&request.name, e));
                }
            }
        }
        Ok(taking)
    }

    /// Makes the store, the layer's words and the new bitmap. Nothing is visible yet.
    fn prepare(disk: Arc<Disk>, request: &SnapshotRequest, uuid: Uuid, time_ns: i64) -> Result<Taking> {
        let directory = disk.tracking.directory();
        let (reference, full_reason) = reference_of(&directory, request.since.as_ref());
        let size = disk.size();
        let newest = disk.chain.load().newest().cloned();
        // Fixed while layers exist: a view walks them all with one chunk size.
        let chunk = newest.as_ref().map_or(disk.chunk, |layer| layer.chunk);
        let seq = directory.next_layer.max(newest.map_or(0, |layer| layer.seq + 1));
        let layer_uuid = Uuid::new_v4();
        let store = disk.store_io.create(layer_uuid, size)?;
        let made = LayerWords::create(&*disk.tracking.shm, layer_uuid, size, chunk)
            .and_then(|words| Ok((words, disk.tracking.new_recording(DEFAULT_GRANULARITY, size)?)));
        let (words, recording) = match made {
            Ok(made) => made,
            Err(e) => {
                store.doom();
                return Err(e);
            }
        };
        let layer = Arc::new(Layer::new(layer_uuid, seq, size, chunk, store, words));
        let notes = request.notes.clone();
        let snapshot = SnapshotEntry {
            uuid,
            name: request.name.clone(),
            time_ns,
            checkpoint: uuid,
            reference,
            full_reason,
            notes,
            skipped: None,
        };
        let layer_entry =
            LayerEntry { uuid: layer_uuid, seq, size, chunk, store: disk.store_io.path(), snapshot: Some(snapshot) };
        let everything = disk.flush_failure();
        if everything.is_some() {
            recording.bitmap.mark_all();
        }
        let checkpoint = CheckpointEntry {
            uuid,
            name: request.name.clone(),
            time_ns,
            completed: false,
            bitmap: BitmapEntry { everything, ..recording_entry(&recording) },
            state: CheckpointState::Recording,
        };
        let recorded = recording_checkpoint(&directory).map(|entry| entry.bitmap.clone());
        let old = recorded
            .as_ref()
            .and_then(|entry| disk.tracking.recording().iter().find(|recording| recording.uuid == entry.uuid).cloned());
        let old_everything = recorded.and_then(|entry| entry.everything);
        Ok(Taking { disk, layer, recording, old, old_everything, layer_entry, checkpoint })
    }

    pub(super) fn part(&self) -> Part {
        let (layer, checkpoint) = (self.layer_entry.clone(), self.checkpoint.clone());
        let action = PreparedAction::Snapshot { layer, checkpoint, bitmaps: None };
        Part { disk: self.disk.clone(), action }
    }

    /// The instant: the layer is there for every later write, and the new bitmap records. The gate is held.
    pub(super) fn publish(&self) {
        {
            let _one = self.disk.chain_edit.lock();
            let mut chain = (*self.disk.chain.load()).clone();
            chain.layers.push(self.layer.clone());
            self.disk.chain.store(Arc::new(chain));
        }
        self.switch(self.old.as_ref(), &self.recording);
    }

    /// The view is to leave these ranges out. They count as changed from here on (Z2 of `skip`): whoever commits syncs the
    /// sidecar before.
    pub(super) fn leave_out(&mut self, ranges: &[Range<u64>], entry: SkippedEntry) -> Result<()> {
        for range in ranges {
            self.recording.bitmap.mark(range.start, range.end - range.start);
        }
        if let Some(area) = &self.recording.area {
            self.disk.tracking.sidecar.write_bits(area, self.recording.bitmap.bits())?;
        }
        // An error comes before the first of them.
        for range in ranges {
            let chunks = self.layer.chunks_of(range.start, range.end - range.start);
            self.layer.set_released(&*self.disk.tracking.shm, chunks)?;
        }
        if let Some(snapshot) = &mut self.layer_entry.snapshot {
            snapshot.skipped = Some(entry);
        }
        Ok(())
    }

    /// Whether the view leaves something out.
    pub(super) fn leaves_out(&self) -> bool {
        self.layer_entry.snapshot.as_ref().is_some_and(|snapshot| snapshot.skipped.is_some())
    }

    /// The snapshot stands: what recorded until then is in the sidecar.
    pub(super) fn done(&self) {
        self.old.iter().for_each(|old| self.disk.tracking.forget_words(old.uuid));
    }

    /// Puts `to` in the place of `from` among the recording bitmaps.
    fn switch(&self, from: Option<&Recording>, to: &Recording) {
        let mut list = (*self.disk.tracking.recording()).clone();
        list.retain(|recording| from.is_none_or(|from| from.uuid != recording.uuid));
        list.push(to.clone());
        self.disk.tracking.switch(list);
    }

    pub(super) fn seal(&self) -> Result<Option<BitmapEntry>> {
        self.old.as_ref().map(|old| self.disk.tracking.seal(old, self.old_everything.clone())).transpose()
    }

    /// Nothing was published: all that was made goes.
    pub(super) fn forget(&self) {
        self.layer.doom(self.disk.tracking.shm.clone());
        self.disk.tracking.give_back(&self.recording);
    }

    /// From here on the old bitmap records on, beside the new one, with what the new one has.
    pub(super) fn record_both(&self) {
        if let Some(old) = &self.old {
            let _gate = self.disk.gate.write();
            old.bitmap.merge_from(&self.recording.bitmap);
            self.disk.tracking.also_record(old);
        }
    }

    /// Takes the snapshot back in the directory; once that is durable, [`Taking::undone`] follows. The layer stays,
    /// hidden, since older views may look through it by now.
    pub(super) fn undo_in(&self, directory: &mut Directory, checkpoint: Uuid) {
        // A loss since then stands with whichever of both recorded.
        let lost = directory.checkpoints.last().and_then(|entry| entry.bitmap.everything.clone());
        directory.checkpoints.retain(|entry| entry.uuid != checkpoint);
        if let (Some(last), Some(old)) = (directory.checkpoints.last_mut(), &self.old) {
            last.state = CheckpointState::Recording;
            last.bitmap = BitmapEntry { everything: self.old_everything.clone().or(lost), ..recording_entry(old) };
        }
        directory.layers.retain(|entry| entry.uuid != self.layer.uuid);
        directory.layers.push(LayerEntry { snapshot: None, ..self.layer_entry.clone() });
        directory.next_layer = directory.next_layer.max(self.layer.seq + 1);
    }

    pub(super) fn undone(&self) {
        self.layer.hide();
        self.stop_recording();
    }

    fn stop_recording(&self) {
        let mut list = (*self.disk.tracking.recording()).clone();
        list.retain(|recording| recording.uuid != self.recording.uuid);
        self.disk.tracking.switch(list);
        self.disk.tracking.forget_words(self.recording.uuid);
    }
}

/// A file that is missing below is an I/O error here: ENOENT would say that the caller named something unknown.
pub(super) fn not_taken(name: &str, e: Error) -> Error {
    let what = format!("snapshot '{name}' was not taken");
    if e.errno() == errno::ENOENT {
        return Error::new(errno::EIO, what, e.to_string())
            .hint("were its state or store directory removed? unmount and mount again");
    }
    e.context(what)
}

/// The reference point that a new snapshot's map counts from, and why its map says 'everything', where it does.
fn reference_of(directory: &Directory, since: Option<&Since>) -> (Option<Uuid>, Option<String>) {
    let by_uuid = |uuid: Uuid| directory.checkpoints.iter().position(|entry| entry.uuid == uuid);
    let index = match since {
        None => match directory.checkpoints.iter().rposition(|entry| entry.completed) {
            Some(index) => index,
            None => return (None, Some("no completed checkpoint yet".to_owned())),
        },
        Some(Since::Checkpoint(name)) => match directory.checkpoints.iter().position(|entry| entry.name == *name) {
            Some(index) => index,
            None => return (None, Some(format!("checkpoint '{name}' is not known for this disk"))),
        },
        Some(Since::Consumer(name)) => match directory.consumers.iter().find(|consumer| consumer.name == *name) {
            Some(consumer) => match by_uuid(consumer.checkpoint) {
                Some(index) => index,
                None => return (None, Some(format!("the checkpoint of consumer '{name}' is gone"))),
            },
            None => return (None, Some(format!("consumer '{name}' has not finished a backup of this disk"))),
        },
    };
    let span = &directory.checkpoints[index..];
    let lost = span.iter().find_map(|entry| entry.bitmap.everything.clone());
    (span.first().map(|entry| entry.uuid), lost)
}

impl From<&CheckpointEntry> for Point {
    fn from(entry: &CheckpointEntry) -> Self {
        Point { name: entry.name.clone(), uuid: entry.uuid }
    }
}
