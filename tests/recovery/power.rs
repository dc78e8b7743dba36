//! Power loss: words in memory are gone, and of what was not synced any part.

use crate::rig::*;
use fleecefs::bitmap::Sidecar;
use fleecefs::error::{Result, errno};
use fleecefs::fleece::{Environment, Fleece, Options};
use fleecefs::storage::crash::CrashDisk;
use fleecefs::storage::faulty::Call;
use fleecefs::storage::shm::HeapShmRoot;
use fleecefs::storage::{BlockStatus, Dir, SharedStorage, Space, Stamp, Storage};
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

#[test]
fn after_a_power_loss_maps_say_what_was_armed_views_are_refused_and_checkpoints_stay() {
    let mut host = Host::pair();
    let fleece = host.mount();
    let mut oracle = Oracle::new(&host);
    for (seed, name) in [(1, "s0"), (2, "s1")] {
        oracle.write(&fleece, "a", u64::from(seed) * GRANULE, 100, seed).unwrap();
        oracle.freeze(&fleece, name).unwrap();
        fleece.complete_snapshot(name, Some("daily")).unwrap();
    }
    oracle.freeze(&fleece, "open").unwrap();
    oracle.write(&fleece, "a", 0, DISK_BYTES, 3).unwrap();
    drop(fleece);
    host.lose_power();
    let fleece = host.mount();
    assert!(fleece.snapshots().is_empty());
    for info in fleece.disk_infos() {
        assert_eq!(info.tracking, "exact after a power loss but for 1 region of 1.0 MiB");
    }
    assert!(fleece.problems().iter().any(|text| text.contains("'open'")), "{:?}", fleece.problems());
    let names: Vec<String> = fleece.checkpoints().into_iter().map(|row| row.name).collect();
    assert_eq!(names, ["s0", "s1", "open"]);
    assert_eq!(fleece.consumers()[0].disks, PAIR);
    wait_for("the views' space is freed", || host.files.values().all(|files| files.layers().is_empty()));
    let snapshot = oracle.freeze(&fleece, "t").unwrap();
    for view in snapshot.views() {
        assert_eq!(view.reference().unwrap().name, "s1");
        assert_eq!(view.full_reason(), None);
        // A region is more than the whole disk.
        assert_eq!(view.map(view.reference().map(|point| point.uuid)).unwrap().dirty_bytes(), view.size());
    }
    oracle.check(&fleece, Allow { more: true, ..EXACT });
    fleece.complete_snapshot("t", Some("daily")).unwrap();
    oracle.write(&fleece, "b", GRANULE, 1, 4).unwrap();
    oracle.freeze(&fleece, "u").unwrap();
    let map = extents_since(&view_of(&fleece, "u", "b"), "t");
    assert_eq!(dirty_granules(&map), [1].into(), "from then on it is exact");
    assert_eq!(fleece.disk_infos()[1].tracking, "exact since 'u'");
    fleece.cancel_snapshot("u").unwrap();
    assert_eq!(fleece.disk_infos()[1].tracking, "exact since 't'");
}

#[test]
fn a_power_loss_after_a_clean_stop_loses_nothing() {
    let mut host = Host::pair().with(|options| options.keep_snapshots = true);
    let fleece = host.mount();
    let mut oracle = Oracle::new(&host);
    oracle.freeze(&fleece, "s").unwrap();
    oracle.write(&fleece, "a", 0, DISK_BYTES, 3).unwrap();
    fleece.close().unwrap();
    drop(fleece);
    host.lose_power();
    let fleece = host.mount();
    assert_eq!(fleece.snapshots().len(), 1);
    oracle.check_all(&fleece, "probe", EXACT);
}

#[test]
fn words_that_vanish_without_a_reboot_count_as_a_power_loss() {
    let host = Host::one();
    let fleece = host.mount();
    freeze(&fleece, "s");
    fleece.complete_snapshot("s", None).unwrap();
    fleece.disk("a").unwrap().write(&[1; 10], 0).unwrap();
    drop(fleece);
    host.heap.lose_power("boot-1");
    let fleece = host.mount();
    assert_eq!(fleece.disk_infos()[0].tracking, "exact after a power loss but for 1 region of 1.0 MiB");
    let snapshot = freeze(&fleece, "t");
    assert_eq!(dirty_granules(&extents_since(&snapshot.views()[0], "s")).len() as u64, DISK_BYTES.div_ceil(GRANULE));
}

#[test]
fn a_recovery_begins_a_session_that_may_be_killed_too() {
    let host = Host::one();
    let mut fleece = host.mount();
    freeze(&fleece, "s");
    fleece.complete_snapshot("s", None).unwrap();
    for granule in 0..3 {
        fleece.disk("a").unwrap().write(&[1; 10], granule * GRANULE).unwrap();
        drop(fleece);
        fleece = host.mount();
        assert_eq!(fleece.disk_infos()[0].tracking, "exact after a kill");
    }
    let snapshot = freeze(&fleece, "t");
    assert_eq!(dirty_granules(&extents_since(&snapshot.views()[0], "s")), (0..3).collect());
}

/// A mount with a checkpoint `s` and a disk of which nothing is armed; what `act` does, then a power loss.
fn lose_power_after(act: impl Fn(&Host, &Arc<Fleece>)) -> Arc<Fleece> {
    let mut host = Host::one();
    let fleece = host.mount();
    freeze(&fleece, "s");
    fleece.complete_snapshot("s", None).unwrap();
    (0..2).for_each(|_| fleece.disarm_idle());
    assert_eq!(counter(&fleece, "armed_regions"), 0);
    act(&host, &fleece);
    drop(fleece);
    host.lose_power();
    host.mount()
}

#[test]
fn a_power_loss_of_a_quiet_disk_is_exact() {
    let fleece = lose_power_after(|_, fleece| {
        fleece.disk("a").unwrap().write(&[1; 10], GRANULE).unwrap();
        (0..2).for_each(|_| fleece.disarm_idle());
    });
    assert_eq!(fleece.disk_infos()[0].tracking, "exact after a power loss");
    let snapshot = freeze(&fleece, "t");
    assert_eq!(dirty_granules(&extents_since(&snapshot.views()[0], "s")), [1].into());
}

#[test]
fn a_guest_goes_on_where_a_region_cannot_be_armed_and_the_next_snapshot_begins_again() {
    let mut host = Host::one();
    let fleece = host.mount();
    freeze(&fleece, "s");
    fleece.complete_snapshot("s", None).unwrap();
    let disarm = |fleece: &Fleece| (0..2).for_each(|_| fleece.disarm_idle());
    disarm(&fleece);
    let faults = &host.files["a"].state_faults;
    (1..100).for_each(|nth| faults.fail_nth(Call::Write, faults.calls(Call::Write) + nth, errno::EIO));
    let disk = fleece.disk("a").unwrap();
    disk.write(&[1; 10], GRANULE).unwrap();
    disk.write(&[1; 10], 2 * GRANULE).unwrap();
    assert_eq!(counter(&fleece, "armed_regions"), 0);
    assert_errno(try_freeze(&fleece, "t", &[], None), errno::EIO);
    faults.clear();
    freeze(&fleece, "t");
    assert_eq!(counter(&fleece, "armed_regions"), 1, "all of the disk: what was written may not be durable");
    let map = extents_since(&view_of(&fleece, "t", "a"), "s");
    assert_eq!(dirty_granules(&map), (0..DISK_BYTES.div_ceil(GRANULE)).collect());
    fleece.complete_snapshot("t", None).unwrap();
    disk.write(&[1; 10], 3 * GRANULE).unwrap();
    disarm(&fleece);
    drop((disk, fleece));
    host.lose_power();
    let fleece = host.mount();
    assert_eq!(fleece.disk_infos()[0].tracking, "exact after a power loss");
    freeze(&fleece, "u");
    assert_eq!(dirty_granules(&extents_since(&view_of(&fleece, "u", "a"), "t")), [3].into());
}

#[test]
fn what_was_written_unarmed_before_a_kill_is_armed_after_it() {
    let host = Host::one();
    let fleece = host.mount();
    freeze(&fleece, "s");
    (0..2).for_each(|_| fleece.disarm_idle());
    let faults = &host.files["a"].state_faults;
    (1..100).for_each(|nth| faults.fail_nth(Call::Write, faults.calls(Call::Write) + nth, errno::EIO));
    // Nor can it be noted on the image.
    let image = &host.files["a"].image_faults;
    (1..100).for_each(|nth| image.fail_nth(Call::Attribute, image.calls(Call::Attribute) + nth, errno::EIO));
    fleece.disk("a").unwrap().write(&[1; 10], GRANULE).unwrap();
    drop(fleece);
    host.clear_faults();
    let fleece = host.mount();
    assert_eq!(fleece.disk_infos()[0].tracking, "exact after a kill");
    assert_eq!(counter(&fleece, "armed_regions"), 1);
}

#[test]
fn a_writer_waits_once_for_a_region_and_rarely_where_it_writes_in_order() {
    const MIB: u64 = 1 << 20;
    let host = Host::new(&["a"], 256 * MIB);
    let fleece = host.mount();
    let disk = fleece.disk("a").unwrap();
    let waits = |places: &[u64]| {
        let before = counter(&fleece, "intent_syncs");
        places.iter().for_each(|mib| assert_eq!(disk.write(&[1; 10], mib * MIB).unwrap(), 10));
        counter(&fleece, "intent_syncs") - before
    };
    (0..2).for_each(|_| fleece.disarm_idle());
    assert_eq!(waits(&[5, 100, 50, 5, 50]), 3);
    let in_order: Vec<u64> = (101..256).collect();
    assert!(waits(&in_order) < 10);
    assert_eq!(waits(&in_order), 0);
    (0..3).for_each(|_| fleece.disarm_idle());
    assert_eq!(counter(&fleece, "armed_regions"), 0);
    assert_eq!(waits(&[7]), 1);
}

/// Status says that another program wrote, and the map everything.
fn assert_foreign(fleece: &Fleece, what: &str) {
    let tracking = &fleece.disk_infos()[0].tracking;
    assert!(tracking.starts_with("everything: ") && tracking.contains(what), "{tracking}");
    let snapshot = freeze(fleece, "t");
    assert!(snapshot.views()[0].full_reason().is_some());
}

#[test]
fn a_write_of_another_program_after_the_heartbeat_or_in_this_boot_means_everything() {
    const SECOND: i64 = 1_000_000_000;
    let late = |host: &Host| host.files["a"].image.stamp().unwrap().ctime_ns;
    // The heartbeat was that long before the last write to the image.
    for (seconds, foreign) in [(9, false), (14, true)] {
        let fleece = lose_power_after(|host, fleece| {
            fleece.disk("a").unwrap().write(&[1; 10], GRANULE).unwrap();
            let sidecar = host.files["a"].state.open("dirty.log").unwrap();
            let sidecar = Sidecar::open(sidecar).unwrap();
            let heartbeat_ns = late(host) - seconds * SECOND;
            sidecar.update_superblock(|superblock| superblock.heartbeat_ns = heartbeat_ns).unwrap();
        });
        match foreign {
            true => assert_foreign(&fleece, "before the host stopped"),
            false => assert!(fleece.disk_infos()[0].tracking.starts_with("exact after a power loss")),
        }
    }
    let fleece = lose_power_after(|host, _| {
        let sidecar = Sidecar::open(host.files["a"].state.open("dirty.log").unwrap()).unwrap();
        sidecar.update_superblock(|superblock| superblock.heartbeat_ns = late(host) + 3600 * SECOND).unwrap();
    });
    assert_foreign(&fleece, "clock went back");
    let mut host = Host::one();
    let fleece = host.mount();
    freeze(&fleece, "s");
    fleece.complete_snapshot("s", None).unwrap();
    drop(fleece);
    host.lose_power();
    std::thread::sleep(std::time::Duration::from_millis(20));
    host.files["a"].image.write_at(&[7; 10], 0).unwrap();
    assert_foreign(&host.mount(), "since the host started");
}

#[test]
fn the_heartbeat_is_renewed_while_the_image_is_written_to_and_only_then() {
    let host = Host::one();
    let fleece = host.mount();
    let sidecar = || Sidecar::open(host.files["a"].state.open("dirty.log").unwrap()).unwrap();
    let heartbeat = || sidecar().superblock().heartbeat_ns;
    (0..2).for_each(|_| fleece.disarm_idle());
    let first = heartbeat();
    std::thread::sleep(std::time::Duration::from_millis(2600));
    fleece.disarm_idle();
    assert_eq!(heartbeat(), first, "nobody wrote");
    fleece.disk("a").unwrap().write(&[1; 10], 0).unwrap();
    assert_eq!(heartbeat(), first, "it is not that old");
    fleece.disarm_idle();
    let second = heartbeat();
    assert!(second > first, "somebody wrote");
    fleece.disk("a").unwrap().write(&[1; 10], 0).unwrap();
    fleece.disarm_idle();
    assert_eq!(heartbeat(), second, "not at every write");
}

/// What a power loss at some moment may leave is chosen from this.
#[derive(Debug, Default)]
pub struct Moments {
    pub disk: CrashDisk,
    pub taken: Mutex<Vec<CrashDisk>>,
}

/// Passes calls on, and keeps the disk as it is before each change.
#[derive(Debug)]
pub struct Watched<T: ?Sized> {
    pub inner: Arc<T>,
    pub moments: Arc<Moments>,
}

impl Moments {
    pub fn take(&self) {
        let mut taken = self.taken.lock().unwrap();
        taken.push(self.disk.kill());
    }
}

impl Storage for Watched<dyn Storage> {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.inner.read_at(buf, offset)
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.moments.take();
        self.inner.write_at(buf, offset)
    }
    fn sync(&self) -> Result<()> {
        self.moments.take();
        self.inner.sync()
    }
    fn len(&self) -> Result<u64> {
        self.inner.len()
    }
    fn set_len(&self, len: u64) -> Result<()> {
        self.moments.take();
        self.inner.set_len(len)
    }
    fn punch_hole(&self, offset: u64, len: u64) -> Result<()> {
        self.moments.take();
        self.inner.punch_hole(offset, len)
    }
    fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        self.moments.take();
        self.inner.write_zeroes(offset, len)
    }
    fn block_status(&self, offset: u64, len: u64) -> Result<BlockStatus> {
        self.inner.block_status(offset, len)
    }
    fn stamp(&self) -> Result<Stamp> {
        self.inner.stamp()
    }
    fn path(&self) -> &Path {
        self.inner.path()
    }
}

impl Watched<dyn Dir> {
    fn file(&self, inner: SharedStorage) -> SharedStorage {
        Arc::new(Watched::<dyn Storage> { inner, moments: self.moments.clone() })
    }
}

impl Dir for Watched<dyn Dir> {
    fn open(&self, name: &str) -> Result<SharedStorage> {
        self.inner.open(name).map(|file| self.file(file))
    }
    fn create(&self, name: &str) -> Result<SharedStorage> {
        self.moments.take();
        self.inner.create(name).map(|file| self.file(file))
    }
    fn exists(&self, name: &str) -> Result<bool> {
        self.inner.exists(name)
    }
    fn remove(&self, name: &str) -> Result<()> {
        self.moments.take();
        self.inner.remove(name)
    }
    fn rename(&self, from: &str, to: &str) -> Result<()> {
        self.moments.take();
        self.inner.rename(from, to)
    }
    fn list(&self, sub: &str) -> Result<Vec<String>> {
        self.inner.list(sub)
    }
    fn sync(&self) -> Result<()> {
        self.moments.take();
        self.inner.sync()
    }
    fn space(&self) -> Result<Space> {
        self.inner.space()
    }
    fn path(&self, name: &str) -> PathBuf {
        self.inner.path(name)
    }
}

const SIZE: u64 = 3 * GRANULE + 1234;

fn options(keep: bool) -> Options {
    Options { keep_snapshots: keep, ..Options::default() }
}

/// Mounts both disks of a medium; `watch` notes every change.
fn mount(disk: &CrashDisk, shm: &HeapShmRoot, keep: bool, watch: Option<&Arc<Moments>>) -> Result<Arc<Fleece>> {
    let env = Environment { shm: Arc::new(shm.clone()), background: false };
    let fleece = Fleece::with_environment(options(keep), env);
    for name in PAIR {
        let mut image: SharedStorage = disk.open(&format!("{name}.img"))?.shared();
        let mut dir: Arc<dyn Dir> = Arc::new(disk.dir(&format!("{name}.fleece")));
        if let Some(moments) = watch {
            image = Arc::new(Watched::<dyn Storage> { inner: image, moments: moments.clone() });
            dir = Arc::new(Watched::<dyn Dir> { inner: dir, moments: moments.clone() });
        }
        attach_over(&fleece, name, image, dir.clone(), dir, false)?;
    }
    Ok(fleece)
}

/// What each disk held at each instant that may have been backed up.
type Points = BTreeMap<(String, &'static str), Vec<u8>>;

struct Run {
    moments: Arc<Moments>,
    points: Points,
    serial: u8,
}

impl Run {
    fn freeze(&mut self, fleece: &Fleece, name: &str) {
        for disk in PAIR {
            self.points.insert((name.to_owned(), disk), read_live(&fleece.disk(disk).unwrap(), 0, SIZE));
        }
        freeze(fleece, name);
    }

    fn guest(&mut self, fleece: &Fleece) {
        self.serial += 1;
        for disk in PAIR {
            let live = fleece.disk(disk).unwrap();
            let at = u64::from(self.serial) * 11 * CHUNK % (3 * GRANULE - 2 * CHUNK);
            live.write(&pattern(self.serial, at, CHUNK + 600), at).unwrap();
            // Once only: what is written before a freeze must become durable by the stop.
            if self.serial == 4 {
                live.flush().unwrap();
            }
            if self.serial.is_multiple_of(4) {
                live.discard(at, CHUNK).unwrap();
            }
        }
    }
}

/// Everything that the product does, watched change by change.
fn run(keep: bool) -> Run {
    let moments = Arc::new(Moments::default());
    for name in PAIR {
        let image = moments.disk.open(&format!("{name}.img")).unwrap();
        image.write_at(&pattern(200, 0, SIZE), 0).unwrap();
        image.sync().unwrap();
    }
    let mut run = Run { moments, points: BTreeMap::new(), serial: 0 };
    let shm = HeapShmRoot::new();
    let open = |run: &Run| mount(&run.moments.disk, &shm, keep, Some(&run.moments)).unwrap();
    let fleece = open(&run);
    run.guest(&fleece);
    run.freeze(&fleece, "s1");
    run.guest(&fleece);
    fleece.complete_snapshot("s1", Some("daily")).unwrap();
    run.freeze(&fleece, "s2");
    run.guest(&fleece);
    run.freeze(&fleece, "s3");
    fleece.release("s2", "a", 0, GRANULE).unwrap();
    run.guest(&fleece);
    fleece.cancel_snapshot("s3").unwrap();
    fleece.reap();
    run.guest(&fleece);
    fleece.close().unwrap();
    drop(fleece);
    let fleece = open(&run);
    run.guest(&fleece);
    run.freeze(&fleece, "s4");
    run.guest(&fleece);
    fleece.complete_snapshot("s4", Some("daily")).unwrap();
    if !keep {
        // Kept, s2 counts from it.
        fleece.delete_checkpoint("s1").unwrap();
    }
    run.guest(&fleece);
    // A kill, and what its recovery leaves.
    drop(fleece);
    let fleece = open(&run);
    run.guest(&fleece);
    run.freeze(&fleece, "s5");
    run.guest(&fleece);
    fleece.close().unwrap();
    drop(fleece);
    run.moments.take();
    run
}

/// A medium as a power loss left it can be mounted, and nothing that is said of it is wrong.
fn check_survivor(left: &CrashDisk, points: &Points, keep: bool) {
    let shm = HeapShmRoot::new();
    shm.lose_power("boot-2");
    let fleece = mount(left, &shm, keep, None).unwrap();
    for snapshot in fleece.snapshots() {
        assert!(keep, "views after a power loss");
        for view in snapshot.views() {
            check_view(view, points);
        }
    }
    for disk in PAIR {
        // The image holds what survived: from here on it is what counts.
        let live = read_live(&fleece.disk(disk).unwrap(), 0, SIZE);
        assert_eq!(live.len() as u64, SIZE);
    }
    let probe = freeze(&fleece, "probe");
    for view in probe.views() {
        let now = read_view(view, 0, SIZE).unwrap();
        for base in view.since() {
            let old = &points[&(base.name.clone(), PAIR.into_iter().find(|disk| *disk == view.disk_name()).unwrap())];
            for extent in extents(view, Some(base.uuid)).unwrap() {
                let range = extent.start as usize..(extent.start + extent.length) as usize;
                let same = old[range.clone()] == now[range.clone()];
                assert!(extent.dirty || same, "disk {}, since {}: {range:?} changed", view.disk_name(), base.name);
                assert!(!extent.zero || is_zero(&now[range]), "zero that is none");
            }
        }
    }
}

/// Chunk by chunk: right, or an error (released).
fn check_view(view: &fleecefs::fleece::View, points: &Points) {
    let disk = PAIR.into_iter().find(|disk| *disk == view.disk_name()).unwrap();
    let frozen = &points[&(view.checkpoint().name, disk)];
    let what = format!("view {} of {disk}", view.checkpoint().name);
    for (chunk, frozen) in frozen.chunks(CHUNK as usize).enumerate() {
        match read_view(view, chunk as u64 * CHUNK, CHUNK) {
            Ok(now) => assert_same(&now, frozen, &what),
            Err(e) => {
                assert_eq!(e.errno(), errno::EIO);
                let released = view.checkpoint().name == "s2" && disk == "a" && (chunk as u64) < GRANULE / CHUNK;
                assert!(released, "{what}: {e}");
            }
        }
    }
}

fn survivors(keep: bool) {
    let full = std::env::var_os("FLEECEFS_FULL").is_some();
    let run = run(keep);
    let moments = run.moments.taken.lock().unwrap();
    assert!(moments.len() > 200, "{} moments", moments.len());
    for (number, moment) in moments.iter().enumerate() {
        let mut left: Vec<CrashDisk> = Vec::new();
        let (exhaustive, seeds) = if full { (8, 40) } else { (3, 2) };
        match moment.exhaustive(exhaustive) {
            Some(all) => left.extend(all),
            None => left.extend((0..seeds).map(|seed| moment.survivors(number as u64 * 1000 + seed))),
        }
        for (index, disk) in left.iter().enumerate() {
            let done = catch_unwind(AssertUnwindSafe(|| check_survivor(disk, &run.points, keep)));
            assert!(
                done.is_ok(),
                "power loss before change {number} of {}, survivor {index}, keep {keep}",
                moments.len()
            );
        }
    }
}

#[test]
fn whatever_a_power_loss_leaves_no_map_misses_a_change() {
    survivors(false);
}

#[test]
fn whatever_a_power_loss_leaves_of_kept_views_no_wrong_byte_is_shown() {
    survivors(true);
}
