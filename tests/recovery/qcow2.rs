//! Power loss under a qcow2 image with bitmaps of its own: no bitmap that the image calls good, and no map, misses a
//! change.

use crate::blank::{OFF, make, open};
use crate::power::{Moments, Watched};
use crate::rig::*;
use fleecefs::bitmap::Bits;
use fleecefs::error::errno;
use fleecefs::fleece::{Environment, Fleece, Options, Place};
use fleecefs::image::Image;
use fleecefs::image::persistent::{Change, NewBitmap, Trust};
use fleecefs::image::qcow2::{Qcow2Image, check};
use fleecefs::storage::crash::CrashDisk;
use fleecefs::storage::faulty::{Call, FaultPlan, Faulty};
use fleecefs::storage::shm::HeapShmRoot;
use fleecefs::storage::{Dir, MemDir, MemFile, SharedStorage, Storage};
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use uuid::Uuid;

const CLUSTER: u64 = 4096;
const SIZE: u64 = 5 * GRANULE + 512;
const GROWN: u64 = 6 * GRANULE;

fn mount(disk: &CrashDisk, shm: &HeapShmRoot, watch: Option<&Arc<Moments>>) -> Arc<Fleece> {
    let env = Environment { shm: Arc::new(shm.clone()), background: false };
    let fleece = Fleece::with_environment(Options::default(), env);
    let mut image: SharedStorage = disk.open("a.qcow2").unwrap().shared();
    let mut dir: Arc<dyn Dir> = Arc::new(disk.dir("a.fleece"));
    if let Some(moments) = watch {
        image = Arc::new(Watched::<dyn Storage> { inner: image, moments: moments.clone() });
        dir = Arc::new(Watched::<dyn Dir> { inner: dir, moments: moments.clone() });
    }
    let place = Place { state: dir.clone(), stores: dir, shm: None, lock: None };
    fleece.attach("a", open(image).unwrap(), place).unwrap();
    fleece
}

/// What the disk held at each freeze.
type Points = BTreeMap<String, Vec<u8>>;

struct Run {
    moments: Arc<Moments>,
    points: Points,
    serial: u8,
}

impl Run {
    fn freeze(&mut self, fleece: &Fleece, name: &str) {
        let disk = fleece.disk("a").unwrap();
        self.points.insert(name.to_owned(), read_live(&disk, 0, disk.size()));
        freeze(fleece, name);
    }

    fn guest(&mut self, fleece: &Fleece) {
        self.serial += 1;
        let live = fleece.disk("a").unwrap();
        let at = u64::from(self.serial) * 7 * CLUSTER % (5 * GRANULE - 2 * CLUSTER);
        live.write(&pattern(self.serial, at, CLUSTER / 2), at).unwrap();
        match self.serial % 3 {
            0 => live.discard(at, CLUSTER).unwrap(),
            1 => live.flush().unwrap(),
            _ => (),
        }
    }
}

/// Sessions that end cleanly, in a kill, and after a resize; every change is watched.
fn run() -> Run {
    let moments = Arc::new(Moments::default());
    make(moments.disk.open("a.qcow2").unwrap().shared(), SIZE);
    let mut run = Run { moments, points: Points::new(), serial: 0 };
    let shm = HeapShmRoot::new();
    let open = |run: &Run| mount(&run.moments.disk, &shm, Some(&run.moments));
    let fleece = open(&run);
    run.guest(&fleece);
    run.freeze(&fleece, "s1");
    run.guest(&fleece);
    fleece.complete_snapshot("s1", None).unwrap();
    fleece.close().unwrap();
    drop(fleece);
    let fleece = open(&run);
    run.guest(&fleece);
    run.freeze(&fleece, "s2 of a longer name");
    run.guest(&fleece);
    // A kill, and what its recovery leaves.
    drop(fleece);
    let fleece = open(&run);
    assert_eq!(fleece.disk_infos()[0].tracking, "exact after a kill");
    run.guest(&fleece);
    fleece.complete_snapshot("s2 of a longer name", None).unwrap();
    fleece.reap();
    fleece.resize_disk("a", GROWN).unwrap();
    run.guest(&fleece);
    fleece.close().unwrap();
    drop(fleece);
    let fleece = open(&run);
    assert_eq!(fleece.disk_infos()[0].tracking, "exact");
    fleece.close().unwrap();
    run.moments.take();
    run
}

/// Every bitmap that the image calls good has all that it is to have.
fn check_good(image: &Qcow2Image, points: &Points) {
    let mut now = vec![0; image.size() as usize];
    image.read_at(&mut now, 0).unwrap();
    let persistent = image.persistent().unwrap();
    for stored in persistent.list().unwrap().into_iter().filter(|stored| stored.trust == Trust::Good) {
        let words = persistent.load(&stored.name).unwrap();
        let bit = |index: usize| words[index / 64] >> (index % 64) & 1 != 0;
        let zeros = vec![0; now.len()];
        let mut before = match stored.name.as_str() {
            "on" => zeros,
            "off" => {
                assert_eq!(words[0], OFF);
                continue;
            }
            checkpoint => points[checkpoint].clone(),
        };
        before.resize(now.len(), 0);
        let granule = stored.granularity as usize;
        for (index, (now, before)) in now.chunks(granule).zip(before.chunks(granule)).enumerate() {
            assert!(now == before || bit(index), "bitmap '{}' misses granule {index}", stored.name);
        }
    }
}

/// A medium as a power loss left it: neither what the image says nor what a mount says of it is wrong.
fn check_survivor(left: &CrashDisk, points: &Points) {
    let file = || left.open("a.qcow2").unwrap().shared();
    let report = check::check(&*file()).unwrap();
    assert!(report.dirty || report.corruptions == 0, "{:?}", report.findings);
    check_good(&open(file()).unwrap(), points);
    let shm = HeapShmRoot::new();
    shm.lose_power("boot-2");
    let fleece = mount(left, &shm, None);
    let probe = freeze(&fleece, "probe");
    let view = &probe.views()[0];
    let now = read_view(view, 0, view.size()).unwrap();
    let mut points = points.clone();
    for base in view.since() {
        let old = points.get_mut(&base.name).unwrap();
        old.resize(now.len(), 0);
        for extent in extents(view, Some(base.uuid)).unwrap() {
            let range = extent.start as usize..(extent.start + extent.length) as usize;
            assert!(extent.dirty || old[range.clone()] == now[range.clone()], "since {}: {range:?}", base.name);
        }
    }
    points.insert("probe".to_owned(), now);
    fleece.disk("a").unwrap().write(&pattern(99, 0, 10), 3 * GRANULE).unwrap();
    fleece.close().unwrap();
    let report = check::check(&*file()).unwrap();
    assert!(report.is_clean() && !report.dirty, "{:?}", report.findings);
    let image = open(file()).unwrap();
    check_good(&image, &points);
    let listed = image.persistent().unwrap().list().unwrap();
    let good = |name: &str| listed.iter().any(|stored| stored.name == name && stored.trust == Trust::Good);
    assert!(good("probe"), "{listed:?}");
}

#[test]
fn whatever_a_power_loss_leaves_no_bitmap_and_no_map_misses_a_change() {
    let full = std::env::var_os("FLEECEFS_FULL").is_some();
    let run = run();
    let moments = run.moments.taken.lock().unwrap();
    assert!(moments.len() > 200, "{} moments", moments.len());
    let (stride, exhaustive, seeds) = if full { (1, 7, 30) } else { (3, 1, 2) };
    for (number, moment) in moments.iter().enumerate().step_by(stride) {
        let left: Vec<CrashDisk> = match moment.exhaustive(exhaustive) {
            Some(all) => all.collect(),
            None => (0..seeds).map(|seed| moment.survivors(number as u64 * 1000 + seed)).collect(),
        };
        for (index, disk) in left.iter().enumerate() {
            let done = catch_unwind(AssertUnwindSafe(|| check_survivor(disk, &run.points)));
            assert!(done.is_ok(), "power loss before change {number} of {}, survivor {index}", moments.len());
        }
    }
}

/// A mount of one image in memory whose calls fail by a plan.
fn mount_faulty(image: &MemFile, dir: &MemDir, shm: &HeapShmRoot, plan: &Arc<FaultPlan>) -> Arc<Fleece> {
    let env = Environment { shm: Arc::new(shm.clone()), background: false };
    let fleece = Fleece::with_environment(Options::default(), env);
    let file: SharedStorage = Arc::new(Faulty { inner: image.shared(), plan: plan.clone() });
    let dir: Arc<dyn Dir> = Arc::new(dir.clone());
    let place = Place { state: dir.clone(), stores: dir, shm: None, lock: None };
    fleece.attach("a", open(file).unwrap(), place).unwrap();
    fleece
}

#[test]
fn a_close_that_cannot_store_bitmaps_leaves_none_that_is_wrong() {
    let mut failed = 0;
    // One write fails, or all from one on.
    for (nth, lasting) in (1..).flat_map(|nth| [(nth, false), (nth, true)]) {
        let (image, dir, shm) = (MemFile::new("a.qcow2", 0), MemDir::new(), HeapShmRoot::new());
        make(image.shared(), SIZE);
        let plan = Arc::new(FaultPlan::new());
        let fleece = mount_faulty(&image, &dir, &shm, &plan);
        let disk = fleece.disk("a").unwrap();
        let mut points = Points::from([("s".to_owned(), read_live(&disk, 0, SIZE))]);
        freeze(&fleece, "s");
        disk.write(&pattern(1, 0, 100), 2 * GRANULE).unwrap();
        disk.flush().unwrap();
        plan.clear();
        (nth..nth + if lasting { 500 } else { 1 }).for_each(|n| plan.fail_nth(Call::Write, n, errno::ENOSPC));
        let calls = || plan.calls(Call::Write);
        let closed = fleece.close();
        let reached = calls() >= nth;
        plan.clear();
        failed += u64::from(closed.is_err());
        // Where it failed, the guest may go on, and what it writes is in no bitmap that counts; unless nothing works.
        let goes_on = disk.write(&pattern(2, 0, 100), 4 * GRANULE).is_ok();
        assert!(goes_on == closed.is_err() || (lasting && !goes_on), "write {nth}, lasting {lasting}");
        // On a copy: a use of the image itself is one of a foreign program.
        let copy = MemFile::new("copy", 0);
        copy.set_len(image.len().unwrap()).unwrap();
        copy.write_at(&read_image(&image), 0).unwrap();
        check_good(&open(copy.shared()).unwrap(), &points);
        drop((disk, fleece));
        let fleece = mount_faulty(&image, &dir, &shm, &plan);
        let tracking = &fleece.disk_infos()[0].tracking;
        assert!(tracking.starts_with("exact"), "write {nth}, lasting {lasting}: {tracking}, {closed:?}");
        let now = read_live(&fleece.disk("a").unwrap(), 0, SIZE);
        freeze(&fleece, "t");
        let view = view_of(&fleece, "t", "a");
        let expected = if goes_on { vec![2, 4] } else { vec![2] };
        assert_eq!(dirty_granules(&extents_since(&view, "s")), expected.into_iter().collect());
        points.insert("t".to_owned(), now);
        fleece.close().unwrap();
        let image = open(image.shared()).unwrap();
        check_good(&image, &points);
        let listed = image.persistent().unwrap().list().unwrap();
        assert!(listed.iter().all(|stored| stored.trust == Trust::Good) && listed.len() == 3, "{listed:?}");
        if !reached && lasting {
            break;
        }
    }
    assert!(failed > 5, "{failed}");
}

#[test]
fn an_older_copy_of_the_image_after_a_power_loss_means_everything() {
    let (image, dir, shm) = (MemFile::new("a.qcow2", 0), MemDir::new(), HeapShmRoot::new());
    make(image.shared(), SIZE);
    let plan = Arc::new(FaultPlan::new());
    let fleece = mount_faulty(&image, &dir, &shm, &plan);
    freeze(&fleece, "s1");
    fleece.complete_snapshot("s1", None).unwrap();
    fleece.close().unwrap();
    drop(fleece);
    let copy = read_image(&image);
    let fleece = mount_faulty(&image, &dir, &shm, &plan);
    fleece.disk("a").unwrap().write(&[1; 100], GRANULE).unwrap();
    freeze(&fleece, "s2");
    fleece.complete_snapshot("s2", None).unwrap();
    drop(fleece);
    shm.lose_power("boot-2");
    image.set_len(copy.len() as u64).unwrap();
    image.write_at(&copy, 0).unwrap();
    let fleece = mount_faulty(&image, &dir, &shm, &plan);
    let snapshot = freeze(&fleece, "t");
    let view = &snapshot.views()[0];
    let map = view.map(view.reference().map(|point| point.uuid)).unwrap();
    assert!(map.everything().is_some_and(|why| why.contains("not the one")), "{:?}", map.everything());
}

#[test]
fn clusters_that_held_bits_come_back_as_zeros() {
    let image = MemFile::new("a.qcow2", 0);
    make(image.shared(), SIZE);
    let open = open(image.shared()).unwrap();
    let persistent = open.persistent().unwrap();
    let mut words = vec![0x5555_5555_5555_5555; Bits::words_for(SIZE / 512)];
    *words.last_mut().unwrap() &= 1;
    let names: Vec<String> = (0..20).map(|index| index.to_string()).collect();
    let new = |name| Change::Store(NewBitmap { name, granularity_bits: 9, auto: false, words: &words });
    let all: Vec<Change<'_>> = names.iter().map(|name| new(name)).collect();
    persistent.finish(&all, Uuid::new_v4()).unwrap();
    let all: Vec<Change<'_>> = names.iter().map(|name| Change::Remove(name)).collect();
    persistent.finish(&all, Uuid::new_v4()).unwrap();
    open.flush().unwrap();
    for cluster in 0..60 {
        open.write_at(b"x", cluster * 4096 + 7).unwrap();
    }
    let mut now = vec![0; SIZE as usize];
    open.read_at(&mut now, 0).unwrap();
    let wrong =
        now.iter().enumerate().filter(|(at, byte)| **byte != if at % 4096 == 7 && *at < 60 * 4096 { b'x' } else { 0 });
    assert_eq!(wrong.count(), 0);
    open.close().unwrap();
    let report = check::check(&image).unwrap();
    assert!(report.is_clean(), "{:?}", report.findings);
}
