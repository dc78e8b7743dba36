//! Looking for volumes: in the views of a snapshot, once; in live disks, as long as what was found holds good.
//!
//! A scan of live disks reads them while the guest writes. What it stands on is watched (see `watch`):
//!
//! * **W3 Tables are watched before they are read.** A scan counts only where the tables that it came from were watched,
//!   with every change that began earlier gone, before the scan began, and are unchanged at its end. Which bytes those are
//!   the scan itself tells: so the first one is made again, and as often as the answer is another one.
//! * What else was read (labels and types) is watched as it is read. Where that changes, the next question is answered by
//!   a new scan; volumes that are in use stay.
//! * A look at the status waits for no image that hangs: it tells what was found before.
//! * A partition depends on the partition table of its disk alone: the guest may extend a logical volume, or write LVM's
//!   label into a partition, while another partition is in use. A logical volume depends on every table.

use super::volumes::{FrozenVolume, LiveVolume};
use super::watch::Watch;
use super::{Disk, Fleece, Snapshot, View};
use crate::error::{Error, Result, errno};
use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::{Mutex, full_fence};
use crate::volume::{self, Content, Scan, Table, Volume};
use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;

/// How often a scan is made again while its tables change.
const TRIES: usize = 5;
/// How long a look at the status waits for a scan.
const PATIENCE: Duration = Duration::from_secs(1);
/// What blkid calls a partition with LVM's metadata.
pub(super) const LVM_MEMBER: &str = "LVM2_member";

/// What was found in live disks. See the module.
#[derive(Debug)]
pub struct LiveVolumes {
    /// All disks of the mount at that time, in name order.
    disks: Arc<[Arc<Disk>]>,
    volumes: Vec<Arc<LiveVolume>>,
    contents: Vec<Option<Content>>,
    warnings: Vec<String>,
    tables: Option<Tables>,
    seen: Arc<Watch>,
    /// Something could not be read, or changed all the while.
    doubtful: bool,
}

impl LiveVolumes {
    /// Scans `disks`. `kept`: what was found before.
    pub(super) fn find(disks: Vec<Arc<Disk>>, kept: Option<&LiveVolumes>) -> LiveVolumes {
        let disks: Arc<[Arc<Disk>]> = disks.into();
        let same = kept.filter(|kept| same_disks(&kept.disks, &disks));
        let mut tables = same.and_then(|kept| kept.tables.clone()).filter(Tables::stand);
        for _ in 0..TRIES {
            let seen = Arc::new(Watch::default());
            let failed = AtomicBool::new(false);
            let scan = scan_live(&disks, &seen, &failed);
            let needed = Sources::of(&scan, disks.len());
            full_fence();
            match tables.take() {
                Some(tables) if tables.sources == needed && tables.stand() => {
                    let doubtful = failed.load(Ordering::SeqCst);
                    return LiveVolumes::of(disks, scan, tables, seen, doubtful, kept);
                }
                _ => tables = Tables::watch(&disks, needed),
            }
            if tables.is_none() {
                break;
            }
        }
        let warnings = vec![match tables {
            Some(_) => "not shown: the partition tables are being written to".to_owned(),
            None => "not shown: writes to the disks do not come to an end".to_owned(),
        }];
        log_new(&warnings, kept.map_or(&[], |kept| &kept.warnings));
        LiveVolumes {
            contents: vec![None; disks.len()],
            disks,
            volumes: Vec::new(),
            warnings,
            tables: None,
            seen: Arc::default(),
            doubtful: true,
        }
    }

    fn of(
        disks: Arc<[Arc<Disk>]>,
        scan: Scan,
        tables: Tables,
        seen: Arc<Watch>,
        doubtful: bool,
        kept: Option<&LiveVolumes>,
    ) -> LiveVolumes {
        log_new(&scan.warnings, kept.map_or(&[], |kept| &kept.warnings));
        let volumes = scan.volumes.into_iter().filter_map(|volume| {
            let watch = tables.watch_of(&volume)?.clone();
            Some(Arc::new(LiveVolume::new(volume, &disks, watch)))
        });
        LiveVolumes {
            volumes: volumes.collect(),
            contents: scan.contents,
            warnings: scan.warnings,
            tables: Some(tables),
            seen,
            doubtful,
            disks,
        }
    }

    /// Whether a new scan of `disks` would find the same.
    pub(super) fn holds_good(&self, disks: &[Arc<Disk>]) -> bool {
        let shared = disks.iter().any(|disk| disk.is_shared());
        !self.doubtful
            && !shared
            && same_disks(&self.disks, disks)
            && !self.seen.has_changed()
            && self.tables.as_ref().is_some_and(Tables::stand)
    }

    /// The disks that were scanned, in name order: what volumes' places count in.
    pub fn disks(&self) -> &[Arc<Disk>] {
        &self.disks
    }

    /// The volumes that are listed under `disk`.
    pub fn of_disk<'a>(&'a self, disk: &'a Disk) -> impl Iterator<Item = &'a Arc<LiveVolume>> {
        self.volumes.iter().filter(move |volume| volume.home().is_some_and(|home| home.uuid() == disk.uuid()))
    }

    /// What `disk` is itself, without a partition table, or with one that is a file system as well.
    pub fn content_of(&self, disk: &Disk) -> Option<&Content> {
        let index = self.disks.iter().position(|known| known.uuid() == disk.uuid())?;
        self.contents.get(index)?.as_ref()
    }

    /// What was found to be wrong.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }
}

fn same_disks(some: &[Arc<Disk>], others: &[Arc<Disk>]) -> bool {
    some.len() == others.len() && some.iter().zip(others).all(|(a, b)| Arc::ptr_eq(a, b))
}

/// Each warning once, however often is looked again.
fn log_new(warnings: &[String], known: &[String]) {
    for warning in warnings.iter().filter(|warning| !known.contains(warning)) {
        log::warn!("volumes: {warning}");
    }
}

/// The bytes that volumes come from, by disk.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Sources {
    /// Of the partition tables.
    tables: Vec<Vec<Range<u64>>>,
    /// Of these, and of LVM.
    all: Vec<Vec<Range<u64>>>,
}

impl Sources {
    fn of(scan: &Scan, disks: usize) -> Sources {
        let (mut tables, mut all) = (vec![Vec::new(); disks], vec![Vec::new(); disks]);
        for (disk, range) in &scan.sources {
            let (Some(tables), Some(all)) = (tables.get_mut(*disk), all.get_mut(*disk)) else { continue };
            all.push(range.clone());
            if !in_lvm_member(scan, *disk, range) {
                tables.push(range.clone());
            }
        }
        for ranges in tables.iter_mut().chain(&mut all) {
            ranges.sort_by_key(|range| (range.start, range.end));
        }
        Sources { tables, all }
    }
}

/// Whether bytes of a disk lie in a partition that is LVM's, and so are not the partition table's.
fn in_lvm_member(scan: &Scan, disk: usize, range: &Range<u64>) -> bool {
    let is_member = |volume: &Volume| {
        !is_logical(&volume.table) && volume.content.as_ref().is_some_and(|content| content.kind == LVM_MEMBER)
    };
    scan.volumes.iter().filter(|volume| volume.home() == disk && is_member(volume)).any(|volume| {
        let holds = |start| start <= range.start && range.end <= volume.size.saturating_add(start);
        volume.offset().is_some_and(holds)
    })
}

fn is_logical(table: &Table) -> bool {
    matches!(table, Table::Lvm { .. })
}

/// The tables that a scan stands on, watched.
#[derive(Debug, Clone)]
struct Tables {
    sources: Sources,
    /// The partition table of each disk.
    partitions: Vec<Arc<Watch>>,
    /// All of them, and LVM's metadata.
    logical: Arc<Watch>,
}

impl Tables {
    /// Watches them from now on, with every change that began earlier gone; None where those take too long.
    fn watch(disks: &[Arc<Disk>], sources: Sources) -> Option<Tables> {
        let partitions: Vec<_> = disks.iter().map(|_| Arc::new(Watch::default())).collect();
        let logical = Arc::new(Watch::default());
        for (((disk, watch), tables), all) in disks.iter().zip(&partitions).zip(&sources.tables).zip(&sources.all) {
            if !all.is_empty() {
                disk.watches.add(&logical, all.iter().cloned());
                if !disk.watch_and_drain(watch, tables.iter().cloned()) {
                    return None;
                }
            }
        }
        Some(Tables { sources, partitions, logical })
    }

    /// Whether nothing of them was written to.
    fn stand(&self) -> bool {
        !self.logical.has_changed() && !self.partitions.iter().any(|watch| watch.has_changed())
    }

    fn watch_of(&self, volume: &Volume) -> Option<&Arc<Watch>> {
        if is_logical(&volume.table) { Some(&self.logical) } else { self.partitions.get(volume.home()) }
    }
}

/// A live disk below a scan: what is read is watched.
struct Watched<'a> {
    disk: &'a Disk,
    seen: &'a Arc<Watch>,
    failed: &'a AtomicBool,
}

impl volume::Disk for Watched<'_> {
    fn name(&self) -> &str {
        self.disk.name()
    }

    fn size(&self) -> u64 {
        self.disk.size()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let end = offset.saturating_add(buf.len() as u64);
        if end > self.disk.size() {
            return Err(Error::new(errno::EIO, "scan", "past the end of the disk").at_offset(offset));
        }
        self.disk.watches.add(self.seen, Some(offset..end));
        // Not as a read of the guest's: those make readers of views wait.
        let read = self.disk.image().read_at(buf, offset);
        read.inspect_err(|_| self.failed.store(true, Ordering::SeqCst))
    }
}

fn scan_live(disks: &[Arc<Disk>], seen: &Arc<Watch>, failed: &AtomicBool) -> Scan {
    let watched: Vec<_> = disks.iter().map(|disk| Watched { disk, seen, failed }).collect();
    for disk in disks {
        // Growth moves the end, where some look for something.
        disk.watches.add(seen, Some(disk.size()..u64::MAX));
    }
    let disks: Vec<&dyn volume::Disk> = watched.iter().map(|disk| disk as &dyn volume::Disk).collect();
    volume::scan(&disks)
}

/// What was found in the views of one snapshot.
#[derive(Debug)]
pub struct FrozenVolumes {
    views: Arc<[Arc<View>]>,
    volumes: Vec<Arc<FrozenVolume>>,
    contents: Vec<Option<Content>>,
    warnings: Vec<String>,
}

impl FrozenVolumes {
    /// Scans views; whether something could not be read.
    pub(super) fn find(views: &[Arc<View>]) -> (FrozenVolumes, bool) {
        let views: Arc<[Arc<View>]> = views.into();
        let failed = AtomicBool::new(false);
        let frozen: Vec<_> = views.iter().map(|view| Frozen { view, failed: &failed }).collect();
        let disks: Vec<&dyn volume::Disk> = frozen.iter().map(|disk| disk as &dyn volume::Disk).collect();
        let scan = volume::scan(&disks);
        let volumes = scan.volumes.into_iter().filter(|volume| volume.home() < views.len());
        let volumes = volumes.map(|volume| Arc::new(FrozenVolume::new(volume, views.clone()))).collect();
        let found = FrozenVolumes { views, volumes, contents: scan.contents, warnings: scan.warnings };
        (found, failed.load(Ordering::SeqCst))
    }

    /// The views that were scanned, in name order.
    pub fn views(&self) -> &[Arc<View>] {
        &self.views
    }

    /// All volumes.
    pub(super) fn all(&self) -> impl Iterator<Item = &Arc<FrozenVolume>> {
        self.volumes.iter()
    }

    /// The volumes that are listed under the disk of `view`.
    pub fn of_view<'a>(&'a self, view: &'a View) -> impl Iterator<Item = &'a Arc<FrozenVolume>> {
        self.volumes.iter().filter(move |volume| volume.home().is_some_and(|home| home.disk_uuid() == view.disk_uuid()))
    }

    /// What the disk of `view` is itself.
    pub fn content_of(&self, view: &View) -> Option<&Content> {
        let index = self.views.iter().position(|known| known.disk_uuid() == view.disk_uuid())?;
        self.contents.get(index)?.as_ref()
    }

    /// What was found to be wrong.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }
}

/// A view below a scan.
struct Frozen<'a> {
    view: &'a View,
    failed: &'a AtomicBool,
}

impl volume::Disk for Frozen<'_> {
    fn name(&self) -> &str {
        self.view.disk_name()
    }

    fn size(&self) -> u64 {
        self.view.size()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let read = self.view.read_now(buf, offset).and_then(|count| {
            let short = || Error::new(errno::EIO, "scan", "past the end of the disk").at_offset(offset);
            if count == buf.len() { Ok(()) } else { Err(short()) }
        });
        read.inspect_err(|_| self.failed.store(true, Ordering::SeqCst))
    }
}

/// The volumes of one snapshot, looked for at the first question.
#[derive(Debug, Default)]
pub(super) struct Once(Mutex<Option<Arc<FrozenVolumes>>>);

impl Once {
    /// A scan that could not read something is not kept: the next question looks again.
    pub fn of(&self, views: &[Arc<View>]) -> Arc<FrozenVolumes> {
        let mut kept = self.0.lock();
        if let Some(found) = &*kept {
            return found.clone();
        }
        let (found, failed) = FrozenVolumes::find(views);
        log_new(&found.warnings, &[]);
        let found = Arc::new(found);
        if !failed {
            *kept = Some(found.clone());
        }
        found
    }
}

/// What was found in live disks, and who looks.
#[derive(Debug, Default)]
pub(super) struct Scans {
    kept: Mutex<Kept>,
    /// Held while disks are scanned (lock rank 3, before gates).
    scanning: Mutex<()>,
    /// A scan is under way for who did not wait for it.
    behind: AtomicBool,
}

/// The one scan behind somebody's back, also where it ends in a panic.
struct Behind(Arc<Scans>);

impl Drop for Behind {
    fn drop(&mut self) {
        self.0.behind.store(false, Ordering::SeqCst);
    }
}

#[derive(Debug, Default)]
struct Kept {
    found: Option<Arc<LiveVolumes>>,
    /// How often it was let go of: what was looked for before that is not kept.
    forgotten: u64,
}

impl Scans {
    fn kept(&self, disks: &[Arc<Disk>]) -> Option<Arc<LiveVolumes>> {
        let found = self.kept.lock().found.clone();
        found.filter(|found| found.holds_good(disks))
    }

    fn now(&self, disks: Vec<Arc<Disk>>) -> Arc<LiveVolumes> {
        if let Some(found) = self.kept(&disks) {
            return found;
        }
        let _scanning = self.scanning.lock();
        if let Some(found) = self.kept(&disks) {
            return found;
        }
        let (before, forgotten) = {
            let kept = self.kept.lock();
            (kept.found.clone(), kept.forgotten)
        };
        let found = Arc::new(LiveVolumes::find(disks, before.as_deref()));
        let mut kept = self.kept.lock();
        if kept.forgotten == forgotten {
            kept.found = Some(found.clone());
        }
        found
    }

    /// The same for who would rather have what was found before than wait for an image that hangs.
    fn soon(self: &Arc<Self>, disks: Vec<Arc<Disk>>) -> Option<Arc<LiveVolumes>> {
        if let Some(found) = self.kept(&disks) {
            return Some(found);
        }
        if !self.behind.swap(true, Ordering::SeqCst) {
            let (behind, (done, wait)) = (Behind(self.clone()), channel());
            let scan = move || {
                let found = behind.0.now(disks);
                drop(behind);
                // Who asked may have gone.
                let _ = done.send(found);
            };
            match std::thread::Builder::new().name("scan".to_owned()).spawn(scan) {
                Ok(_) => {
                    if let Ok(found) = wait.recv_timeout(PATIENCE) {
                        return Some(found);
                    }
                }
                Err(e) => log::warn!("volumes are not looked for: cannot start a thread: {e}"),
            }
        }
        self.kept.lock().found.clone()
    }

    fn forget(&self) {
        let mut kept = self.kept.lock();
        kept.found = None;
        kept.forgotten += 1;
    }
}

impl Fleece {
    /// The volumes of the live disks. Scans only where that may find something else than the last time; reads the images,
    /// and waits for nobody but who scans.
    pub fn live_volumes(&self) -> Arc<LiveVolumes> {
        self.volumes.now(self.disks())
    }

    /// The same, or where the images do not answer soon what was found before, if anything was.
    pub(super) fn live_volumes_soon(&self) -> Option<Arc<LiveVolumes>> {
        self.volumes.soon(self.disks())
    }

    /// What was found to be wrong with tables, at most one line a disk; empty where all is well.
    pub fn volume_warnings(&self) -> Vec<String> {
        self.live_volumes_soon().map(|found| found.warnings.clone()).unwrap_or_default()
    }

    /// Lets go of the disks that volumes were found in.
    pub(super) fn forget_volumes(&self) {
        self.volumes.forget();
    }
}

impl Snapshot {
    /// The volumes in its views: scanned once, at the first question. May have to wait for stores.
    pub fn volumes(&self) -> Arc<FrozenVolumes> {
        self.volumes.of(self.views())
    }
}

#[cfg(all(test, not(any(feature = "shuttle", loom))))]
mod tests {
    use super::*;
    use crate::volume::Segment;

    #[test]
    fn metadata_in_a_partition_of_lvm_are_no_partition_table() {
        let content = |kind: &str| Content { kind: kind.to_owned(), label: None, uuid: None };
        let partition = |name: &str, offset, content| Volume {
            name: name.to_owned(),
            size: 1000,
            segments: vec![Segment::linear(0, 1000, 1, offset)],
            table: Table::Mbr { kind: 0x83, uuid: String::new() },
            content,
        };
        let volumes =
            vec![partition("p1", 1000, Some(content(LVM_MEMBER))), partition("p2", 2000, Some(content("ext4")))];
        let (table, other, inside, beyond) = (0..512, 2000..2512, 1512..2000, 1990..2010);
        let sources = [&table, &inside, &beyond, &other].map(|range| (1, range.clone())).to_vec();
        let scan = Scan { volumes, contents: vec![None; 2], sources, ..Scan::default() };
        let found = Sources::of(&scan, 2);
        assert_eq!(found.tables, [vec![], vec![table.clone(), beyond.clone(), other.clone()]]);
        assert_eq!(found.all, [vec![], vec![table, inside, beyond, other]]);
        assert_eq!(Sources::of(&scan, 1).all, [vec![]], "a disk that is none");
    }
}
