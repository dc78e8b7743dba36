//! The disks of one mount with their snapshots, checkpoints and consumers.

use super::checkpoints::Working;
use super::counters::{Counter, Counters};
use super::disk::Disk;
use super::events::{Event, Events};
use super::instant::FailedChange;
use super::pace::Pace;
use super::place::{Environment, Place, while_busy};
use super::scan::Scans;
use super::snapshot::Snapshot;
use super::store::Stores;
use super::transaction::{self, Part};
use super::view::View;
use super::{BlockDevicePolicy, DiskSpec, Options};
use crate::bitmap::{LayerEntry, PreparedAction};
use crate::error::{Error, Result, errno};
use crate::image::{self, Image, OpenOptions};
use crate::sync::{Mutex, RwLock};
use crate::units::check_disk_name;
use std::collections::BTreeMap;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Weak};
use std::time::Duration;
use uuid::Uuid;

/// How often a quiet mount looks for foreign writers.
const FOREIGN_INTERVAL: Duration = Duration::from_secs(5);

/// See the module.
pub struct Fleece {
    options: Options,
    env: Environment,
    /// One snapshot, checkpoint, consumer or disk operation at a time (lock rank 1).
    pub(super) control: Mutex<()>,
    pub(super) disks: RwLock<BTreeMap<String, Arc<Disk>>>,
    /// Oldest first.
    pub(super) snapshots: RwLock<Vec<Arc<Snapshot>>>,
    /// Dropped by the user, still read by open files.
    pub(super) lingering: RwLock<Vec<Arc<Snapshot>>>,
    stores: Arc<Stores>,
    pub(super) counters: Arc<Counters>,
    pace: Arc<Pace>,
    pub(super) events: Arc<Events>,
    /// Changes that failed and could not be taken back yet.
    pub(super) unsettled: Mutex<Vec<FailedChange>>,
    /// What the recoveries of disks found, for `problems`: a disk's name, and the text. It goes with the disk.
    pub(super) recovered: Mutex<Vec<(String, String)>>,
    /// The volumes of the live disks.
    pub(super) volumes: Arc<Scans>,
    pub(super) reaper: Reaper,
    pub(super) working: Working,
}

impl std::fmt::Debug for Fleece {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Fleece").field("options", &self.options).finish_non_exhaustive()
    }
}

/// Wakes the thread that reaps layers; without a thread, [`Fleece::reap`] does it when called.
#[derive(Debug, Clone)]
pub(super) struct Reaper(Option<Sender<()>>);

impl Reaper {
    pub(super) fn wake(&self) {
        if let Some(thread) = &self.0 {
            // The thread ends with its Fleece; then there is nothing left to reap.
            let _ = thread.send(());
        }
    }

    /// Whether a thread reaps.
    pub(super) fn has_thread(&self) -> bool {
        self.0.is_some()
    }
}

fn reap_in_background(fleece: Weak<Fleece>, wakeups: Receiver<()>) {
    loop {
        let woken = wakeups.recv_timeout(FOREIGN_INTERVAL);
        let Some(fleece) = fleece.upgrade() else { return };
        match woken {
            Ok(()) => {
                while wakeups.try_recv().is_ok() {}
                fleece.reap();
            }
            Err(RecvTimeoutError::Timeout) => fleece.check_foreign(),
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}

impl Fleece {
    /// A mount without disks.
    pub fn new(options: Options) -> Arc<Fleece> {
        Fleece::with_environment(options, Environment::host())
    }

    /// A mount whose files lie where `env` says; tests keep them in memory.
    pub fn with_environment(options: Options, env: Environment) -> Arc<Fleece> {
        let (thread, wakeups) = channel();
        let background = env.background;
        let counters = Arc::new(Counters::default());
        let pace = Pace::new(options.guest_share, counters.clone());
        let fleece = Arc::new(Fleece {
            stores: Arc::new(Stores::new(&options)),
            options,
            env,
            control: Mutex::new(()),
            disks: RwLock::new(BTreeMap::new()),
            snapshots: RwLock::new(Vec::new()),
            lingering: RwLock::new(Vec::new()),
            counters,
            pace,
            events: Arc::new(Events::default()),
            unsettled: Mutex::new(Vec::new()),
            recovered: Mutex::new(Vec::new()),
            volumes: Arc::default(),
            reaper: Reaper(background.then_some(thread)),
            working: Working::default(),
        });
        if background {
            super::disarm::start(&fleece);
            let weak = Arc::downgrade(&fleece);
            let started =
                std::thread::Builder::new().name("reaper".to_owned()).spawn(move || reap_in_background(weak, wakeups));
            if let Err(e) = started {
                log::error!("the space of dropped snapshots is freed at the next mount only: {e}");
            }
        }
        fleece
    }

    /// Hands every later event to `sink`, which must not block.
    pub fn subscribe(&self, sink: Box<dyn Fn(&Event) + Send + Sync>) {
        self.events.subscribe(sink);
    }

    /// The options of the mount.
    pub fn options(&self) -> &Options {
        &self.options
    }

    pub(super) fn reaper(&self) -> Reaper {
        self.reaper.clone()
    }

    /// Frees what no view needs any more. Called in the background where there is a thread for it.
    pub fn reap(&self) {
        self.lingering.write().retain(|snapshot| !snapshot.is_gone());
        for disk in self.disks() {
            disk.reap();
        }
    }

    /// Not while a snapshot is taken, which looks itself: who is found between the freeze and its record would count in
    /// the wrong interval.
    fn check_foreign(&self) {
        let Some(_control) = self.control.try_lock() else { return };
        for disk in self.disks() {
            if let Err(e) = disk.check_foreign() {
                log::warn!("disk '{}': {e}", disk.name());
            }
        }
    }

    /// Opens several images, in name order: a change of several disks that a crash left undecided is settled by the
    /// first disk in name order, which must be there when the others ask.
    pub fn add_disks(&self, specs: &[DiskSpec]) -> Result<()> {
        let mut named = specs
            .iter()
            .map(|spec| Ok(DiskSpec { name: Some(name_of(spec)?), ..spec.clone() }))
            .collect::<Result<Vec<_>>>()?;
        named.sort_by(|a, b| a.name.cmp(&b.name));
        named.iter().try_for_each(|spec| self.add_disk(spec).map(drop))
    }

    /// Opens an image, recovers its tracking state and serves it. EEXIST for a name in use, EBUSY for an image in use.
    pub fn add_disk(&self, spec: &DiskSpec) -> Result<Arc<Disk>> {
        let name = name_of(spec)?;
        self.check_new_disk(&name)?;
        let options = OpenOptions {
            format: spec.format,
            read_only: spec.read_only,
            cache: self.options.cache,
            snapshot: spec.snapshot.clone(),
            l2_cache_bytes: spec.l2_cache_bytes,
            force_share: spec.force_share,
            keeps_bitmaps: true,
            no_mark: spec.no_mark.unwrap_or(self.options.no_mark),
        };
        let image = while_busy(|| image::open(&spec.file, &options))?;
        self.check_image_once(&*image)?;
        let place =
            if image.read_only() { Place::in_memory() } else { Place::of_image(&name, &*image, &self.options)? };
        self.attach_believing(&name, image, place, spec.block_devices.unwrap_or(self.options.block_devices))
    }

    /// Serves an open image with its state in `place`.
    pub fn attach(&self, name: &str, image: Arc<dyn Image>, place: Place) -> Result<Arc<Disk>> {
        self.attach_believing(name, image, place, self.options.block_devices)
    }

    fn attach_believing(
        &self,
        name: &str,
        image: Arc<dyn Image>,
        place: Place,
        block_devices: BlockDevicePolicy,
    ) -> Result<Arc<Disk>> {
        let _control = self.control.lock();
        self.check_new_disk(name)?;
        let disk = Arc::new(super::recover::open(name, image, place, self.parts(block_devices))?);
        self.disks.write().insert(name.to_owned(), disk.clone());
        self.show_views(&disk);
        // Hidden layers that an earlier daemon left.
        self.reaper.wake();
        log::info!("disk '{name}' ({}) is served: {}", disk.image_path().display(), disk.origin);
        Ok(disk)
    }

    fn parts(&self, block_devices: BlockDevicePolicy) -> super::recover::Shared<'_> {
        super::recover::Shared {
            options: &self.options,
            env: &self.env,
            stores: &self.stores,
            counters: &self.counters,
            pace: &self.pace,
            events: &self.events,
            recovered: &self.recovered,
            block_devices,
            known: self.disks(),
        }
    }

    fn check_new_disk(&self, name: &str) -> Result<()> {
        check_disk_name(name)?;
        if self.disks.read().contains_key(name) {
            return Err(Error::new(errno::EEXIST, format!("disk '{name}'"), "another disk has this name")
                .hint("give one of them another name with NAME=IMAGE"));
        }
        Ok(())
    }

    /// Two writers of one image; of a writer beside readers its lock takes care.
    fn check_image_once(&self, image: &dyn Image) -> Result<()> {
        let stamp = image.stamp()?;
        for disk in self.disks() {
            let other = disk.image().stamp()?;
            let reader = image.read_only() || disk.read_only();
            if (other.dev, other.ino) == (stamp.dev, stamp.ino) && stamp.ino != 0 && !reader {
                return Err(Error::new(errno::EBUSY, "image", format!("is disk '{}' already", disk.name()))
                    .at_path(image.path()));
            }
        }
        Ok(())
    }

    /// Views that an earlier daemon left for us.
    fn show_views(&self, disk: &Arc<Disk>) {
        let directory = disk.tracking.directory();
        let chain = disk.chain.load();
        // Reads the stores' directory, so before the lock.
        let view_of = |entry: &LayerEntry| {
            let layer = chain.layers.iter().find(|layer| layer.uuid == entry.uuid)?;
            Some((entry.snapshot.clone()?, View::new(disk.clone(), layer.clone(), entry).map(Arc::new)?))
        };
        let views: Vec<_> = directory.layers.iter().filter_map(view_of).collect();
        let mut snapshots = self.snapshots.write();
        for (snapshot, view) in views {
            let whole = match snapshots.iter().position(|other| other.uuid() == snapshot.uuid) {
                Some(index) => snapshots.remove(index).with_view(view),
                None => {
                    Snapshot::new(snapshot.name.clone(), snapshot.uuid, snapshot.time_ns, vec![view], self.reaper())
                }
            };
            let place = snapshots.partition_point(|other| other.time_ns() <= whole.time_ns());
            snapshots.insert(place, Arc::new(whole));
        }
    }

    /// Stops serving a disk; its state is saved. EBUSY while snapshots of it exist or its live file is open.
    pub fn remove_disk(&self, name: &str) -> Result<()> {
        let _control = self.control.lock();
        let disk = self.disk(name)?;
        self.settle()?;
        let held = |snapshot: &Arc<Snapshot>| snapshot.view(name).is_ok();
        if let Some(snapshot) = self.snapshots.read().iter().find(|snapshot| held(snapshot)) {
            return Err(Error::new(
                errno::EBUSY,
                format!("disk '{name}'"),
                format!("snapshot '{}' holds it", snapshot.name()),
            )
            .hint("complete or cancel the snapshot first"));
        }
        disk.holds.check_none(name)?;
        if disk.is_open() || self.lingering.read().iter().any(|snapshot| !snapshot.is_gone() && held(snapshot)) {
            return Err(Error::new(errno::EBUSY, format!("disk '{name}'"), "its files are open")
                .hint("stop the guest and the readers first, and end its NBD exports"));
        }
        self.disks.write().remove(name);
        disk.close(false).inspect_err(|_| {
            self.disks.write().insert(name.to_owned(), disk.clone());
        })?;
        self.recovered.lock().retain(|(disk, _)| disk != name);
        self.forget_volumes();
        log::info!("disk '{name}' removed");
        Ok(())
    }

    /// Grows or shrinks a disk and its image. EBUSY for shrinking while a snapshot of it exists.
    pub fn resize_disk(&self, name: &str, size: u64) -> Result<()> {
        let _control = self.control.lock();
        let disk = self.disk(name)?;
        self.settle()?;
        self.once_gone(errno::EBUSY, || disk.resize(size))?;
        log::info!("disk '{name}' is {size} bytes now");
        Ok(())
    }

    /// The disks, in name order.
    pub fn disks(&self) -> Vec<Arc<Disk>> {
        self.disks.read().values().cloned().collect()
    }

    /// One disk. ENOENT for an unknown name.
    pub fn disk(&self, name: &str) -> Result<Arc<Disk>> {
        self.disks.read().get(name).cloned().ok_or_else(|| self.unknown_disk(name))
    }

    pub(super) fn unknown_disk(&self, name: &str) -> Error {
        Error::new(errno::ENOENT, format!("disk '{name}'"), "no such disk").hint("`fleecefs status` lists the disks")
    }

    /// The snapshots, oldest first.
    pub fn snapshots(&self) -> Vec<Arc<Snapshot>> {
        self.snapshots.read().clone()
    }

    /// One snapshot. ENOENT for an unknown name.
    pub fn snapshot(&self, name: &str) -> Result<Arc<Snapshot>> {
        self.snapshots
            .read()
            .iter()
            .find(|snapshot| snapshot.name() == name)
            .cloned()
            .ok_or_else(|| unknown_snapshot(name))
    }

    /// A snapshot by its identity, also one that was dropped and still has open files.
    pub fn snapshot_by_uuid(&self, uuid: Uuid) -> Option<Arc<Snapshot>> {
        let find = |list: &Vec<Arc<Snapshot>>| list.iter().find(|snapshot| snapshot.uuid() == uuid).cloned();
        find(&self.snapshots.read()).or_else(|| find(&self.lingering.read()).filter(|snapshot| !snapshot.is_gone()))
    }

    /// 'I have read this': see [`View::release`].
    pub fn release(&self, snapshot: &str, disk: &str, offset: u64, len: u64) -> Result<()> {
        let snapshot = self.snapshot(snapshot)?;
        let view = snapshot.view(disk)?;
        if offset.checked_add(len).is_none_or(|end| end > view.size()) {
            return Err(Error::new(
                errno::EINVAL,
                format!("release of disk '{disk}'"),
                format!("past its end at {} bytes", view.size()),
            )
            .at_offset(offset));
        }
        view.release(offset, len)
    }

    /// The counters, in a fixed order; those whose help says 'now' go up and down.
    pub fn counters(&self) -> Vec<Counter> {
        let mut list = self.counters.list();
        list.push(Counter { name: "store_bytes", help: "Bytes in all stores now", value: self.stores.used() });
        let armed = self.disks().iter().map(|disk| disk.regions.armed()).sum();
        list.push(Counter { name: "armed_regions", help: "Regions armed now", value: armed });
        list.push(Counter { name: "snapshots", help: "Snapshots now", value: self.snapshots.read().len() as u64 });
        list
    }

    /// Settles what failed half-way, before anything new is begun. An error: the state still cannot be written.
    pub(super) fn settle(&self) -> Result<()> {
        let mut unsettled = self.unsettled.lock();
        while let Some(failed) = unsettled.first_mut() {
            failed.undo().map_err(|e| e.context("an earlier change cannot be taken back"))?;
            unsettled.remove(0);
            self.reaper.wake();
        }
        let disks = self.disks();
        disks.iter().try_for_each(|disk| transaction::settle(disk, &disks))?;
        disks.iter().filter(|disk| disk.holds.forget_ended()).for_each(|disk| disk.stop_unnamed());
        Ok(())
    }

    /// Runs one change of several disks' directories.
    pub(super) fn transact(&self, parts: Vec<(Arc<Disk>, PreparedAction)>) -> Result<()> {
        let parts: Vec<Part> = parts.into_iter().map(|(disk, action)| Part { disk, action }).collect();
        transaction::run(&parts)
    }

    /// A clean stop: views go unless they are to be kept, bitmaps and state are saved. Every disk is tried; the first
    /// error is returned.
    pub fn close(&self) -> Result<()> {
        self.close_all(self.options.keep_snapshots)
    }

    /// Takes back a mount that could not be made: what was found stays as it was, views that a killed daemon left too.
    pub fn close_unused(&self) -> Result<()> {
        self.close_all(true)
    }

    fn close_all(&self, keep_views: bool) -> Result<()> {
        let _control = self.control.lock();
        let mut first = self.settle();
        for disk in self.disks() {
            if let Err(e) = disk.close(keep_views) {
                log::error!("disk '{}': {e}", disk.name());
                first = first.and(Err(e));
            }
        }
        self.snapshots.write().clear();
        self.lingering.write().clear();
        self.disks.write().clear();
        self.forget_volumes();
        first
    }
}

fn unknown_snapshot(name: &str) -> Error {
    Error::new(errno::ENOENT, format!("snapshot '{name}'"), "no such snapshot")
        .hint("`fleecefs snapshot list` lists the snapshots")
}

/// The name that was given, else the file's stem.
fn name_of(spec: &DiskSpec) -> Result<String> {
    let name = match &spec.name {
        Some(name) => name.clone(),
        None => spec.file.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default(),
    };
    check_disk_name(&name).map(|()| name)
}
