//! The machine under test beside its oracle.

use super::oracle::{Frozen, GRANULE, Model, Point};
use fleecefs::backup::{Extent, ExtentSource};
use fleecefs::error::errno;
use fleecefs::fleece::{Environment, Fleece, Options, Place, Since, SnapshotRequest, StoreErrorPolicy, View};
use fleecefs::image::raw::RawImage;
use fleecefs::storage::Storage;
use fleecefs::storage::dir::MemDir;
use fleecefs::storage::faulty::{Call, FaultPlan, Faulty};
use fleecefs::storage::mem::MemFile;
use fleecefs::storage::shm::HeapShmRoot;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

const CHUNK: u64 = 4096;
/// Ten granules and a partial chunk.
pub const DISK_BYTES: u64 = 10 * GRANULE + 1234;
const NAMES: [&str; 2] = ["a", "b"];

#[derive(Debug, Clone)]
pub enum Op {
    Write {
        disk: usize,
        offset: u64,
        len: u64,
        byte: u8,
    },
    Zero {
        disk: usize,
        offset: u64,
        len: u64,
    },
    Discard {
        disk: usize,
        offset: u64,
        len: u64,
    },
    /// `since`: 0 and 1 none, 2 the oldest checkpoint, 3 the consumer. `disks`: 0 both, else one.
    Snapshot {
        since: usize,
        disks: usize,
    },
    Complete {
        which: usize,
        consumer: bool,
    },
    Cancel {
        which: usize,
    },
    DeleteCheckpoint {
        which: usize,
    },
    Release {
        which: usize,
        disk: usize,
        offset: u64,
        len: u64,
    },
    Resize {
        disk: usize,
        step: usize,
    },
    Reap,
    Kill,
    /// `foreign`: another program writes that many bytes at the start of a disk before the next mount.
    CleanStop {
        keep: bool,
        foreign: Option<(usize, u64)>,
    },
    PowerLoss,
    /// The n-th write to a store from now on fails once.
    FailStore {
        nth: u64,
    },
    /// The n-th write to the state from now on fails, and so many that follow.
    FailState {
        nth: u64,
        count: u64,
    },
    /// A chunk of disk a cannot be read until it is overwritten.
    BadSector {
        chunk: u64,
    },
    LookAtMap {
        which: usize,
    },
}

/// What survives the process.
struct Host {
    shm: HeapShmRoot,
    boots: u32,
    images: [MemFile; 2],
    image_faults: [Arc<FaultPlan>; 2],
    state: [MemDir; 2],
    state_faults: Arc<FaultPlan>,
    stores: [MemDir; 2],
    store_faults: Arc<FaultPlan>,
}

/// What a write may change beside the live disk.
struct Before {
    broken: Vec<bool>,
    bad: BTreeSet<u64>,
}

pub struct Machine {
    host: Host,
    options: Options,
    fleece: Arc<Fleece>,
    models: [Model; 2],
    /// Consumer `c`: checkpoint by disk.
    consumer: BTreeMap<usize, String>,
    serial: u32,
    /// A fault of the stores, or of the state, may have struck since the last remount.
    store_fault: bool,
    state_fault: bool,
}

impl Machine {
    pub fn new(fail_write: bool) -> Self {
        let host = Host {
            shm: HeapShmRoot::new(),
            boots: 1,
            images: [MemFile::new("a.img", DISK_BYTES), MemFile::new("b.img", DISK_BYTES)],
            image_faults: [Arc::new(FaultPlan::new()), Arc::new(FaultPlan::new())],
            state: [MemDir::new(), MemDir::new()],
            state_faults: Arc::new(FaultPlan::new()),
            stores: [MemDir::new(), MemDir::new()],
            store_faults: Arc::new(FaultPlan::new()),
        };
        let on_store_error = if fail_write { StoreErrorPolicy::FailWrite } else { StoreErrorPolicy::BreakSnapshot };
        let options = Options { on_store_error, ..Options::default() };
        let fleece = host.mount(&options);
        let model = || Model { live: vec![0; DISK_BYTES as usize], ..Model::default() };
        Machine {
            host,
            options,
            fleece,
            models: [model(), model()],
            consumer: BTreeMap::new(),
            serial: 0,
            store_fault: false,
            state_fault: false,
        }
    }

    pub fn apply(&mut self, op: &Op) {
        match *op {
            Op::Write { disk, offset, len, byte } => self.write(disk, offset, len, byte),
            Op::Zero { disk, offset, len } => self.zero(disk, offset, len, false),
            Op::Discard { disk, offset, len } => self.zero(disk, offset, len, true),
            Op::Snapshot { since, disks } => self.snapshot(since, disks),
            Op::Complete { which, consumer } => self.complete(which, consumer),
            Op::Cancel { which } => self.cancel(which),
            Op::DeleteCheckpoint { which } => self.delete_checkpoint(which),
            Op::Release { which, disk, offset, len } => self.release(which, disk, offset, len),
            Op::Resize { disk, step } => self.resize(disk, step),
            Op::Reap => {
                self.fleece.reap();
                self.fleece.disarm_idle();
            }
            Op::Kill => self.remount(),
            Op::CleanStop { keep, foreign } => self.clean_stop(keep, foreign),
            Op::PowerLoss => self.power_loss(),
            Op::FailStore { nth } => {
                let faults = &self.host.store_faults;
                faults.fail_nth(Call::Write, faults.calls(Call::Write) + nth, errno::EIO);
                self.store_fault = true;
            }
            Op::FailState { nth, count } => {
                let faults = &self.host.state_faults;
                let first = faults.calls(Call::Write) + nth;
                (first..first + count).for_each(|nth| faults.fail_nth(Call::Write, nth, errno::EIO));
                self.state_fault = true;
            }
            Op::BadSector { chunk } => self.bad_sector(chunk),
            Op::LookAtMap { which } => self.look_at_map(which),
        }
        if self.has_ghosts() {
            // Any operation may have taken them back.
            self.adopt_state();
        }
    }

    /// Refused snapshots may still stand in directories.
    fn has_ghosts(&self) -> bool {
        self.models.iter().any(|model| !model.ghosts.is_empty())
    }

    fn write(&mut self, disk: usize, offset: u64, len: u64, byte: u8) {
        let size = self.models[disk].live.len() as u64;
        let cut = len.min(size.saturating_sub(offset));
        let before = self.before(disk);
        let done = self.disk(disk).write(&vec![byte; len as usize], offset);
        if cut == 0 {
            assert_eq!(done.unwrap_err().errno(), errno::ENOSPC);
            return;
        }
        match done {
            Ok(count) => {
                assert_eq!(count as u64, cut);
                self.models[disk].change(offset, cut, byte);
            }
            Err(e) => {
                assert_eq!(self.options.on_store_error, StoreErrorPolicy::FailWrite, "{e}");
                self.models[disk].mark(offset, 0);
            }
        }
        self.settle(disk, before, offset, cut);
    }

    fn zero(&mut self, disk: usize, offset: u64, len: u64, discard: bool) {
        let size = self.models[disk].live.len() as u64;
        let live = self.disk(disk);
        let call = |offset, len| if discard { live.discard(offset, len) } else { live.write_zeroes(offset, len) };
        if offset + len > size {
            assert_eq!(call(offset, len).unwrap_err().errno(), errno::ENOSPC);
        }
        let cut = len.min(size.saturating_sub(offset));
        if cut == 0 {
            return;
        }
        let before = self.before(disk);
        match call(offset, cut) {
            Ok(()) => self.models[disk].change(offset, cut, 0),
            Err(e) => {
                assert_eq!(self.options.on_store_error, StoreErrorPolicy::FailWrite, "{e}");
                self.reread(disk, offset, cut);
            }
        }
        self.settle(disk, before, offset, cut);
    }

    /// A write that was refused half-way: the guest may find old or new bytes, each granule counts as changed.
    fn reread(&mut self, disk: usize, offset: u64, len: u64) {
        // The oracle looks below the bad sectors.
        self.host.image_faults[disk].clear();
        let mut now = vec![0; len as usize];
        let live = self.disk(disk);
        live.read(&mut now, offset).unwrap();
        self.arm_bad(disk);
        let old = &mut self.models[disk].live[offset as usize..(offset + len) as usize];
        for (at, (new, old)) in now.iter().zip(old.iter()).enumerate() {
            assert!(*new == *old || *new == 0, "byte {at} is neither old nor new");
        }
        old.copy_from_slice(&now);
        if let Some(point) = self.models[disk].points.last_mut() {
            point.inexact = true;
            point.granules.extend(offset / GRANULE..=(offset + len - 1) / GRANULE);
        }
    }

    /// Takes over what a store failure or a bad sector did to the views: only those two may do anything.
    fn settle(&mut self, disk: usize, before: Before, offset: u64, len: u64) {
        // Where a region could not be armed, tracking is lost, and says so.
        let rows = self.fleece.checkpoints().into_iter().flat_map(|row| row.disks);
        let lost = rows.filter(|row| row.disk == NAMES[disk] && row.recording).any(|row| row.everything.is_some());
        if self.state_fault
            && lost
            && let Some(point) = self.models[disk].points.last_mut()
        {
            point.inexact = true;
        }
        for (index, frozen) in self.models[disk].frozen.iter_mut().enumerate() {
            let snapshot = self.fleece.snapshot(&frozen.name).unwrap();
            let now = snapshot.view(NAMES[disk]).unwrap().broken().is_some();
            if now && !before.broken[index] {
                assert_eq!(self.options.on_store_error, StoreErrorPolicy::BreakSnapshot);
                assert!(self.store_fault, "a view broke without a fault");
                frozen.broken = true;
            }
        }
        let touched = offset / CHUNK..(offset + len).div_ceil(CHUNK);
        let model = &mut self.models[disk];
        for frozen in model.frozen.iter_mut().chain(&mut model.ghosts) {
            frozen.lost.extend(before.bad.iter().filter(|chunk| touched.contains(chunk)));
        }
        self.arm_bad(disk);
    }

    fn arm_bad(&self, disk: usize) {
        self.host.image_faults[disk].clear();
        for chunk in &self.models[disk].bad {
            self.host.image_faults[disk].fail_range(Call::Read, chunk * CHUNK..(chunk + 1) * CHUNK, errno::EIO);
        }
    }

    fn before(&self, disk: usize) -> Before {
        let model = &self.models[disk];
        Before { broken: model.frozen.iter().map(|frozen| frozen.broken).collect(), bad: model.bad.clone() }
    }

    fn snapshot(&mut self, since: usize, disks: usize) {
        self.serial += 1;
        let name = format!("s{}", self.serial);
        let chosen: Vec<usize> = if disks == 0 { vec![0, 1] } else { vec![disks - 1] };
        let since = match since {
            // What is about to be taken back is no checkpoint to count from.
            _ if self.has_ghosts() => None,
            2 => self.models[chosen[0]].points.first().map(|point| Since::Checkpoint(point.name.clone())),
            3 => Some(Since::Consumer("c".to_owned())),
            _ => None,
        };
        let references: Vec<Option<String>> = chosen
            .iter()
            .map(|&disk| match &since {
                None => self.models[disk].newest_completed(),
                Some(Since::Checkpoint(name)) => {
                    self.models[disk].points.iter().find(|point| point.name == *name).map(|point| point.name.clone())
                }
                Some(Since::Consumer(_)) => self.consumer.get(&disk).cloned(),
            })
            .collect();
        let request = SnapshotRequest {
            name: name.clone(),
            disks: if disks == 0 { vec![] } else { vec![NAMES[chosen[0]].to_owned()] },
            since,
            ..SnapshotRequest::default()
        };
        match self.fleece.create_snapshot(&request) {
            Ok(_) => {
                for (disk, reference) in chosen.into_iter().zip(references) {
                    self.models[disk].freeze(&name, reference);
                }
            }
            Err(e) => {
                assert!(self.any_fault(), "{e}");
                for (disk, reference) in chosen.into_iter().zip(references) {
                    let ghost = self.models[disk].frozen_now(&name, reference);
                    self.models[disk].ghosts.push(ghost);
                }
                self.adopt_state();
            }
        }
    }

    fn pick(&self, which: usize) -> Option<String> {
        let all = self.fleece.snapshots();
        (!all.is_empty()).then(|| all[which % all.len()].name().to_owned())
    }

    fn complete(&mut self, which: usize, consumer: bool) {
        let Some(name) = self.pick(which) else { return };
        let any = |of: fn(&Frozen) -> bool| {
            self.models.iter().any(|model| model.frozen.iter().any(|frozen| frozen.name == name && of(frozen)))
        };
        // What may be lost was overwritten while it could not be read; the view may have had it by then.
        let (broken, damaged) = (any(|frozen| frozen.broken), any(|frozen| frozen.broken || !frozen.lost.is_empty()));
        let done = self.fleece.complete_snapshot(&name, consumer.then_some("c"));
        if done.is_err() {
            assert!((damaged && consumer) || self.any_fault());
            self.adopt_state();
            return;
        }
        let rows = self.fleece.checkpoints();
        let row = rows.iter().find(|row| row.name == name).unwrap();
        // One disk decides; the directory of another may follow later, after a fault.
        let seen = |disk: usize| self.models[disk].frozen.iter().any(|frozen| frozen.name == name);
        let completed =
            (0..2).any(|disk| seen(disk) && row.disks.iter().any(|row| row.disk == NAMES[disk] && row.completed));
        assert!(if completed { !broken } else { damaged });
        for (disk, model) in self.models.iter_mut().enumerate() {
            let had = model.frozen.iter().any(|frozen| frozen.name == name);
            model.frozen.retain(|frozen| frozen.name != name);
            if had {
                let own = model.points.iter_mut().filter(|point| point.name == name);
                own.for_each(|point| point.completed = completed);
                if consumer {
                    self.consumer.insert(disk, name.clone());
                }
            }
        }
    }

    /// After a state failure in the middle: which of the two outcomes each disk shows is read back.
    fn adopt_state(&mut self) {
        let checkpoints = self.fleece.checkpoints();
        let consumers = self.fleece.consumers();
        for (disk, model) in self.models.iter_mut().enumerate() {
            for mut ghost in model.ghosts.clone() {
                let row = checkpoints.iter().find(|row| row.name == ghost.name);
                if row.is_some_and(|row| row.disks.iter().any(|row| row.disk == NAMES[disk])) {
                    let snapshot = self.fleece.snapshot(&ghost.name).ok();
                    let view = snapshot.as_ref().and_then(|snapshot| snapshot.view(NAMES[disk]).ok());
                    ghost.broken = self.store_fault && view.is_some_and(|view| view.broken().is_some());
                    model.return_ghost(ghost, view.is_some());
                }
            }
            for point in &mut model.points {
                let row = checkpoints.iter().find(|row| row.name == point.name);
                let row = row.and_then(|row| row.disks.iter().find(|row| row.disk == NAMES[disk]));
                // One that is decided and not written yet follows before the next change.
                point.completed |= row.is_some_and(|row| row.completed);
            }
            let known: Vec<String> = model.points.iter().map(|point| point.name.clone()).collect();
            for name in known {
                let row = checkpoints.iter().find(|row| row.name == name);
                if row.is_none_or(|row| row.disks.iter().all(|row| row.disk != NAMES[disk])) {
                    model.merge_away(&name);
                }
            }
            let shown = self.fleece.snapshots();
            model.frozen.retain(|frozen| shown.iter().any(|s| s.name() == frozen.name && s.view(NAMES[disk]).is_ok()));
            self.consumer.remove(&disk);
            if let Some(row) =
                consumers.iter().find(|row| row.name == "c" && row.disks.iter().any(|d| d == NAMES[disk]))
            {
                self.consumer.insert(disk, row.checkpoint.clone());
            }
        }
    }

    fn needed(&self, disk: usize, name: &str) -> bool {
        self.consumer.get(&disk).is_some_and(|checkpoint| checkpoint == name)
            || self.models[disk].frozen.iter().any(|frozen| frozen.reference.as_deref() == Some(name))
    }

    fn cancel(&mut self, which: usize) {
        let Some(name) = self.pick(which) else { return };
        if self.fleece.cancel_snapshot(&name).is_err() {
            assert!(self.any_fault());
            self.adopt_state();
            return;
        }
        for disk in 0..2 {
            let had = self.models[disk].frozen.iter().any(|frozen| frozen.name == name);
            self.models[disk].frozen.retain(|frozen| frozen.name != name);
            if had && !self.needed(disk, &name) {
                self.models[disk].merge_away(&name);
            }
        }
    }

    fn delete_checkpoint(&mut self, which: usize) {
        let all = self.fleece.checkpoints();
        if all.is_empty() {
            return;
        }
        let name = all[which % all.len()].name.clone();
        let open = self.models.iter().any(|model| model.frozen.iter().any(|frozen| frozen.name == name));
        let needed = open || (0..2).any(|disk| self.needed(disk, &name));
        match self.fleece.delete_checkpoint(&name) {
            Ok(()) => {
                assert!(!needed);
                self.models.iter_mut().for_each(|model| model.merge_away(&name));
            }
            Err(e) if e.errno() == errno::EBUSY => assert!(needed, "{e}"),
            Err(e) => {
                assert!(self.any_fault(), "{e}");
                self.adopt_state();
            }
        }
    }

    fn release(&mut self, which: usize, disk: usize, offset: u64, len: u64) {
        let Some(name) = self.pick(which) else { return };
        let Some(frozen) = self.models[disk].frozen.iter_mut().find(|frozen| frozen.name == name) else { return };
        let size = frozen.content.len() as u64;
        if offset + len > size {
            assert_eq!(self.fleece.release(&name, NAMES[disk], offset, len).unwrap_err().errno(), errno::EINVAL);
        }
        let end = (offset + len).min(size);
        if end <= offset {
            return;
        }
        self.fleece.release(&name, NAMES[disk], offset, end - offset).unwrap();
        let last = if end == size { size.div_ceil(CHUNK) } else { end / CHUNK };
        frozen.released.extend(offset.div_ceil(CHUNK)..last.max(offset.div_ceil(CHUNK)));
    }

    fn resize(&mut self, disk: usize, step: usize) {
        let size = [DISK_BYTES - 70_000, DISK_BYTES, DISK_BYTES + 5, DISK_BYTES + 100_000][step];
        let old = self.models[disk].live.len() as u64;
        self.fleece.reap();
        match self.fleece.resize_disk(NAMES[disk], size) {
            Ok(()) => {
                assert!(size >= old || self.models[disk].frozen.is_empty());
                let model = &mut self.models[disk];
                model.live.resize(size as usize, 0);
                model.points.iter_mut().for_each(|point| point.inexact = true);
                model.bad.retain(|chunk| (chunk + 1) * CHUNK <= size);
                self.arm_bad(disk);
            }
            Err(e) if e.errno() == errno::EBUSY => assert!(size < old),
            Err(e) => assert!(self.any_fault(), "{e}"),
        }
    }

    fn bad_sector(&mut self, chunk: u64) {
        if (chunk + 1) * CHUNK <= self.models[0].live.len() as u64 {
            self.models[0].bad.insert(chunk);
            self.arm_bad(0);
        }
    }

    fn clear_faults(&mut self) {
        self.host.store_faults.clear();
        self.host.state_faults.clear();
    }

    /// A kill, unless the state was closed before.
    fn remount(&mut self) {
        self.clear_faults();
        self.fleece = self.host.mount(&self.options);
        // A change that a fault stopped half-way may have been settled either way.
        self.adopt_state();
        self.models.iter_mut().for_each(|model| model.ghosts.clear());
        (self.store_fault, self.state_fault) = (false, false);
    }

    fn clean_stop(&mut self, keep: bool, foreign: Option<(usize, u64)>) {
        // A fault that is still armed, or a latched one, would stop the close: that is a kill.
        self.remount();
        self.fleece = self.host.mount(&Options { keep_snapshots: keep, ..self.options.clone() });
        self.fleece.close().unwrap();
        if !keep {
            self.models.iter_mut().for_each(|model| model.frozen.clear());
        }
        if let Some((disk, len)) = foreign {
            self.host.images[disk].write_at(&vec![0xf0; len as usize], 0).unwrap();
            let model = &mut self.models[disk];
            model.change(0, len, 0xf0);
            model.frozen.clear();
            if let Some(point) = model.points.last_mut() {
                point.inexact = true;
            }
            self.arm_bad(disk);
        }
        self.remount();
    }

    fn power_loss(&mut self) {
        self.host.boots += 1;
        self.host.shm.lose_power(&format!("boot-{}", self.host.boots));
        for model in &mut self.models {
            model.frozen.clear();
            if let Some(point) = model.points.last_mut() {
                point.inexact = true;
            }
        }
        self.remount();
    }

    fn look_at_map(&mut self, which: usize) {
        let Some(name) = self.pick(which) else { return };
        for (disk, model) in self.models.iter_mut().enumerate() {
            let Some(frozen) = model.frozen.iter_mut().find(|frozen| frozen.name == name) else { continue };
            let snapshot = self.fleece.snapshot(&name).unwrap();
            let view = snapshot.view(NAMES[disk]).unwrap();
            if let Ok(extents) = extents(view, view.reference().map(|point| point.uuid)) {
                frozen.map.get_or_insert(extents);
            }
        }
    }

    fn any_fault(&self) -> bool {
        self.store_fault || self.state_fault
    }

    fn disk(&self, disk: usize) -> Arc<fleecefs::fleece::Disk> {
        self.fleece.disk(NAMES[disk]).unwrap()
    }

    /// Everything a user can see, against the oracle.
    pub fn check(&mut self) {
        let shown: Vec<String> = self.fleece.snapshots().iter().map(|snapshot| snapshot.name().to_owned()).collect();
        for (disk, name) in NAMES.into_iter().enumerate() {
            self.check_live(disk);
            for index in 0..self.models[disk].frozen.len() {
                let frozen = self.models[disk].frozen[index].clone();
                assert!(shown.contains(&frozen.name), "snapshot {} is gone", frozen.name);
                let snapshot = self.fleece.snapshot(&frozen.name).unwrap();
                let view = snapshot.view(name).unwrap();
                self.check_view(disk, view, index);
                self.check_maps(disk, view, &frozen);
            }
        }
    }

    fn check_live(&self, disk: usize) {
        let model = &self.models[disk];
        let live = self.disk(disk);
        assert_eq!(live.size(), model.live.len() as u64);
        let mut now = vec![0xee; CHUNK as usize];
        for chunk in 0..live.size().div_ceil(CHUNK) {
            let offset = chunk * CHUNK;
            match live.read(&mut now, offset) {
                Ok(count) => {
                    assert!(
                        now[..count] == model.live[offset as usize..offset as usize + count],
                        "disk {disk}, live {offset}"
                    );
                }
                Err(e) => assert!(model.bad.contains(&chunk), "{e}"),
            }
        }
    }

    fn check_view(&mut self, disk: usize, view: &Arc<View>, index: usize) {
        let bad = self.models[disk].bad.clone();
        let frozen = &mut self.models[disk].frozen[index];
        assert_eq!(view.size(), frozen.content.len() as u64);
        assert_eq!(view.broken().is_some(), frozen.broken);
        let mut now = vec![0xee; CHUNK as usize];
        for chunk in 0..view.size().div_ceil(CHUNK) {
            let offset = chunk * CHUNK;
            match view.read(&mut now, offset) {
                Ok(count) => {
                    assert!(!frozen.broken, "a broken view answered");
                    assert!(!frozen.released.contains(&chunk), "a released chunk answered");
                    let right = now[..count] == frozen.content[offset as usize..offset as usize + count];
                    assert!(right, "disk {disk}, view {}, offset {offset}: {}", frozen.name, now[0]);
                }
                Err(e) => {
                    assert_eq!(e.errno(), errno::EIO);
                    if bad.contains(&chunk) {
                        // Overwritten later, it stays lost in the view.
                        frozen.lost.insert(chunk);
                    }
                    let excused = frozen.broken || frozen.released.contains(&chunk) || frozen.lost.contains(&chunk);
                    assert!(excused, "{e}");
                }
            }
        }
        check_status(view, frozen);
    }

    fn check_maps(&self, disk: usize, view: &Arc<View>, frozen: &Frozen) {
        let model = &self.models[disk];
        assert_eq!(view.reference().map(|point| point.name), frozen.reference, "reference of {}", frozen.name);
        let own = model.points.iter().position(|point| point.name == frozen.name).unwrap();
        let names: Vec<String> = view.since().into_iter().map(|point| point.name).collect();
        let expected: Vec<String> = model.points[..own].iter().map(|point| point.name.clone()).collect();
        assert_eq!(names, expected);
        if frozen.map.is_none() {
            return;
        }
        for point in &model.points[..own] {
            let uuid = view.since().into_iter().find(|since| since.name == point.name).unwrap().uuid;
            let map = extents(view, Some(uuid)).unwrap();
            self.check_map(disk, &map, point, frozen);
        }
        let map = extents(view, view.reference().map(|point| point.uuid)).unwrap();
        assert_eq!(Some(map), frozen.map, "a map changed");
    }

    fn check_map(&self, disk: usize, map: &[Extent], base: &Point, frozen: &Frozen) {
        let (granules, exact) = self.models[disk].changed(&base.name, &frozen.name);
        let mut at = 0;
        for extent in map {
            assert_eq!(extent.start, at, "gap or overlap");
            at += extent.length;
            let range = extent.start as usize..at as usize;
            if extent.zero && !frozen.broken {
                assert!(frozen.content[range.clone()].iter().all(|byte| *byte == 0), "zero that is not");
            }
            if !extent.dirty {
                let old = base.content.get(range.clone());
                assert!(old == frozen.content.get(range.clone()), "a change is missing from the map");
            }
            if exact {
                for granule in extent.start / GRANULE..=(at - 1) / GRANULE {
                    assert_eq!(granules.contains(&granule), extent.dirty, "granule {granule}");
                }
            }
        }
        assert_eq!(at, frozen.content.len() as u64);
    }
}

fn extents(view: &Arc<View>, base: Option<uuid::Uuid>) -> fleecefs::error::Result<Vec<Extent>> {
    let map = view.map(base)?;
    let extents: fleecefs::error::Result<Vec<Extent>> = map.extents_from(0)?.collect();
    extents
}

/// What is said to be a hole is one, or readers of holes would never meet the error of what is lost or released. A
/// broken view knows no holes.
fn check_status(view: &Arc<View>, frozen: &Frozen) {
    let mut at = 0;
    while at < view.size() {
        let Ok(status) = view.block_status(at, view.size() - at) else {
            assert!(frozen.broken, "no block status at {at}");
            return;
        };
        assert!(status.len > 0 && !frozen.broken);
        if status.zero {
            let hole = &frozen.content[at as usize..(at + status.len) as usize];
            assert!(hole.iter().all(|byte| *byte == 0), "a hole at {at} that is none");
        }
        at += status.len;
    }
}

impl Host {
    fn environment(&self) -> Environment {
        Environment { shm: Arc::new(self.shm.clone()), background: false }
    }

    fn mount(&self, options: &Options) -> Arc<Fleece> {
        let fleece = Fleece::with_environment(options.clone(), self.environment());
        for (disk, name) in NAMES.iter().enumerate() {
            let storage: Arc<dyn Storage> =
                Arc::new(Faulty { inner: self.images[disk].shared(), plan: self.image_faults[disk].clone() });
            let image = Arc::new(RawImage::over(storage, false).unwrap());
            let place = Place {
                state: Arc::new(self.state[disk].with_faults(self.state_faults.clone())),
                stores: Arc::new(self.stores[disk].with_faults(self.store_faults.clone())),
                shm: None,
                lock: None,
            };
            fleece.attach(name, image, place).unwrap();
        }
        fleece
    }
}
