//! Power loss under tracking by regions: every granule whose surviving content differs from its content at a checkpoint
//! is in the map, also where the image fell back behind the checkpoint; and maps say no more than what was written, and
//! the regions that were armed.

use crate::blank;
use crate::power::{Moments, Watched};
use crate::rig::*;
use fleecefs::bitmap::sidecar::layout::INTENT_OFFSET;
use fleecefs::fleece::{Environment, Fleece, Options, Place};
use fleecefs::image::Image;
use fleecefs::image::raw::RawImage;
use fleecefs::storage::crash::CrashDisk;
use fleecefs::storage::shm::HeapShmRoot;
use fleecefs::storage::{Dir, SharedStorage, Storage};
use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

const REGION: u64 = 1 << 20;
const REGION_GRANULES: u64 = REGION / GRANULE;
const SIZE: u64 = 4 * REGION + GRANULE + 1024;
const GROWN: u64 = 6 * REGION + 512;
/// What is ever written of a granule.
const WINDOW: u64 = 8192;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Raw,
    Qcow2,
}

impl Kind {
    fn disks(self) -> &'static [&'static str] {
        match self {
            Kind::Raw => &PAIR,
            Kind::Qcow2 => &["a"],
        }
    }

    fn mount(self, disk: &CrashDisk, shm: &HeapShmRoot, watch: Option<&Arc<Moments>>) -> Arc<Fleece> {
        let env = Environment { shm: Arc::new(shm.clone()), background: false };
        let fleece = Fleece::with_environment(Options::default(), env);
        for name in self.disks() {
            let mut file: SharedStorage = disk.open(&format!("{name}.img")).unwrap().shared();
            let mut dir: Arc<dyn Dir> = Arc::new(disk.dir(&format!("{name}.fleece")));
            if let Some(moments) = watch {
                file = Arc::new(Watched::<dyn Storage> { inner: file, moments: moments.clone() });
                dir = Arc::new(Watched::<dyn Dir> { inner: dir, moments: moments.clone() });
            }
            let image: Arc<dyn Image> = match self {
                Kind::Raw => Arc::new(RawImage::over(file, false).unwrap()),
                Kind::Qcow2 => blank::open(file).unwrap(),
            };
            fleece.attach(name, image, Place { state: dir.clone(), stores: dir, shm: None, lock: None }).unwrap();
        }
        fleece
    }
}

/// The windows of granules that are not all zeros.
type Content = BTreeMap<u64, Vec<u8>>;

fn content(fleece: &Fleece, disk: &str, granules: &BTreeSet<u64>) -> Content {
    let disk = fleece.disk(disk).unwrap();
    let window = |granule: &u64| {
        let at = granule * GRANULE;
        let len = disk.size().saturating_sub(at).min(WINDOW);
        let bytes = read_live(&disk, at, len);
        (!is_zero(&bytes)).then_some((*granule, bytes))
    };
    granules.iter().filter_map(window).collect()
}

#[derive(Debug)]
enum Did {
    Wrote(&'static str, BTreeSet<u64>),
    Froze(String),
}

/// A session of everything that the product does, each change of any file noted.
struct Run {
    kind: Kind,
    moments: Arc<Moments>,
    shm: HeapShmRoot,
    points: BTreeMap<(String, &'static str), Content>,
    /// What was done, with the number of moments by then.
    log: Vec<(usize, Did)>,
    written: BTreeSet<u64>,
    serial: u8,
}

impl Run {
    fn new(kind: Kind) -> Run {
        let moments = Arc::new(Moments::default());
        for name in kind.disks() {
            let file = moments.disk.open(&format!("{name}.img")).unwrap();
            match kind {
                Kind::Raw => {
                    file.set_len(SIZE).unwrap();
                    file.sync().unwrap();
                }
                Kind::Qcow2 => blank::make(file.shared(), SIZE),
            }
        }
        let (points, shm) = (BTreeMap::new(), HeapShmRoot::new());
        Run { kind, moments, shm, points, log: Vec::new(), written: BTreeSet::new(), serial: 0 }
    }

    fn open(&self) -> Arc<Fleece> {
        self.kind.mount(&self.moments.disk, &self.shm, Some(&self.moments))
    }

    fn did(&mut self, what: Did) {
        let at = self.moments.taken.lock().unwrap().len();
        self.log.push((at, what));
    }

    fn write(&mut self, fleece: &Fleece, granule: u64) {
        self.serial += 1;
        self.written.insert(granule);
        for disk in self.kind.disks() {
            self.did(Did::Wrote(disk, [granule].into()));
            let (at, len) = (granule * GRANULE + u64::from(self.serial % 4) * 512, 700);
            assert_eq!(fleece.disk(disk).unwrap().write(&pattern(self.serial, at, len), at).unwrap(), len as usize);
        }
    }

    fn discard(&mut self, fleece: &Fleece, granule: u64) {
        for disk in self.kind.disks() {
            self.did(Did::Wrote(disk, [granule].into()));
            fleece.disk(disk).unwrap().discard(granule * GRANULE, WINDOW).unwrap();
        }
    }

    fn freeze(&mut self, fleece: &Fleece, name: &str) {
        self.did(Did::Froze(name.to_owned()));
        for disk in self.kind.disks() {
            self.points.insert((name.to_owned(), disk), content(fleece, disk, &self.written));
        }
        freeze(fleece, name);
    }

    fn resize(&mut self, fleece: &Fleece, size: u64) {
        for disk in self.kind.disks() {
            let old = fleece.disk(disk).unwrap().size();
            self.did(Did::Wrote(disk, (size.min(old) / GRANULE..=size.max(old) / GRANULE).collect()));
            fleece.resize_disk(disk, size).unwrap();
        }
    }

    /// Disarms whatever is armed.
    fn disarm(&self, fleece: &Fleece) {
        fleece.disarm_idle();
        fleece.disarm_idle();
        assert_eq!(counter(fleece, "armed_regions"), 0);
    }

    /// What may be dirty since a checkpoint, in the eyes of somebody who knows what was done before a moment.
    fn written_since(&self, base: &str, disk: &str, moment: usize) -> BTreeSet<u64> {
        let from = self.log.iter().rposition(|(_, did)| matches!(did, Did::Froze(name) if name == base)).unwrap();
        let done = self.log[from..].iter().filter(|(at, _)| *at <= moment);
        done.filter_map(|(_, did)| match did {
            Did::Wrote(on, granules) if *on == disk => Some(granules.iter().copied()),
            _ => None,
        })
        .flatten()
        .collect()
    }
}

fn session(kind: Kind) -> Run {
    let mut run = Run::new(kind);
    let [a, b, c, d] = [0, 1, 2, 3].map(|region| region * REGION_GRANULES + 3);
    let fleece = run.open();
    run.write(&fleece, a);
    run.write(&fleece, c);
    run.freeze(&fleece, "s1");
    run.disarm(&fleece);
    run.write(&fleece, a);
    run.write(&fleece, b + 1);
    run.freeze(&fleece, "s2");
    fleece.complete_snapshot("s1", Some("daily")).unwrap();
    run.write(&fleece, c);
    run.disarm(&fleece);
    run.write(&fleece, a);
    run.write(&fleece, b);
    run.discard(&fleece, b + 1);
    run.freeze(&fleece, "s3");
    run.disarm(&fleece);
    run.write(&fleece, a + 1);
    fleece.cancel_snapshot("s3").unwrap();
    run.write(&fleece, d);
    run.disarm(&fleece);
    run.write(&fleece, a);
    fleece.complete_snapshot("s2", None).unwrap();
    fleece.delete_checkpoint("s2").unwrap();
    run.disarm(&fleece);
    fleece.close().unwrap();
    drop(fleece);
    let fleece = run.open();
    run.write(&fleece, c);
    run.freeze(&fleece, "s4");
    run.write(&fleece, c + 2);
    // A kill: what is armed stays so.
    drop(fleece);
    let fleece = run.open();
    assert!(fleece.disk_infos().iter().all(|info| info.tracking == "exact after a kill"));
    run.write(&fleece, b);
    run.disarm(&fleece);
    run.resize(&fleece, GROWN);
    run.write(&fleece, GROWN / GRANULE - 2);
    run.freeze(&fleece, "s5");
    run.disarm(&fleece);
    run.write(&fleece, a);
    // Back and forth: what was cut off must not come back unnoticed.
    for name in ["s4", "s5"] {
        fleece.complete_snapshot(name, None).unwrap();
    }
    fleece.reap();
    run.disarm(&fleece);
    run.resize(&fleece, 3 * REGION);
    run.resize(&fleece, GROWN);
    run.freeze(&fleece, "s6");
    run.moments.take();
    run.write(&fleece, b);
    fleece.close().unwrap();
    drop(fleece);
    run.moments.take();
    run
}

/// Regions whose intent is set on a disk's sidecar.
fn armed(disk: &CrashDisk, name: &str) -> Vec<u64> {
    let mut page = vec![0; 4096];
    let Ok(file) = disk.dir(&format!("{name}.fleece")).open("dirty.log") else { return Vec::new() };
    file.read_at(&mut page, INTENT_OFFSET).unwrap();
    (0..4096 * 8).filter(|region| page[*region / 8] >> (region % 8) & 1 != 0).map(|region| region as u64).collect()
}

/// A medium as a power loss left it: its maps say what they must, and hardly more. `more` are regions that were armed
/// in what this one was made of.
fn check_survivor(run: &Run, moment: usize, left: &CrashDisk, more: &BTreeMap<&'static str, Vec<u64>>) {
    let armed: BTreeMap<&str, Vec<u64>> = run.kind.disks().iter().map(|disk| (*disk, armed(left, disk))).collect();
    let shm = HeapShmRoot::new();
    shm.lose_power("boot-2");
    let fleece = run.kind.mount(left, &shm, None);
    let now: BTreeMap<&str, Content> =
        run.kind.disks().iter().map(|disk| (*disk, content(&fleece, disk, &run.written))).collect();
    let infos = fleece.disk_infos();
    let probe = freeze(&fleece, "probe");
    for view in probe.views() {
        let disk = *run.kind.disks().iter().find(|disk| **disk == view.disk_name()).unwrap();
        let info = infos.iter().find(|info| info.name == disk).unwrap();
        let armed = if info.tracking == "exact" { &[][..] } else { &armed[disk] };
        let armed: BTreeSet<u64> = armed.iter().chain(more.get(disk).into_iter().flatten()).copied().collect();
        for base in view.since() {
            let what = format!("disk {disk}, since {}, {}", base.name, info.tracking);
            assert!(info.tracking.starts_with("exact"), "{what}");
            let old = &run.points[&(base.name.clone(), disk)];
            let map = view.map(Some(base.uuid)).unwrap();
            assert_eq!(map.everything(), None, "{what}");
            let dirty = dirty_granules(&extents(view, Some(base.uuid)).unwrap());
            for granule in run.written.iter().filter(|granule| **granule * GRANULE < view.size()) {
                let same = old.get(granule) == now[disk].get(granule);
                assert!(same || dirty.contains(granule), "{what}: a change of granule {granule} is missing");
            }
            let mut known = run.written_since(&base.name, disk, moment);
            // What a recovery finds to be longer than it was told counts as changed.
            known.extend(3 * REGION / GRANULE..=GROWN / GRANULE);
            let extra: Vec<&u64> = dirty
                .iter()
                .filter(|granule| !known.contains(granule) && !armed.contains(&(**granule / REGION_GRANULES)))
                .collect();
            assert!(extra.is_empty(), "{what}: {extra:?} were not written, {armed:?} are armed");
        }
    }
}

fn survivors(moment: &CrashDisk, number: usize, exhaustive: usize, seeds: u64) -> Vec<CrashDisk> {
    match moment.exhaustive(exhaustive) {
        Some(all) => all.collect(),
        None => (0..seeds).map(|seed| moment.survivors(number as u64 * 1000 + seed)).collect(),
    }
}

fn is_full() -> bool {
    std::env::var_os("FLEECEFS_FULL").is_some()
}

fn every_power_loss(kind: Kind) {
    let run = session(kind);
    let taken = run.moments.taken.lock().unwrap();
    assert!(taken.len() > 200, "{} moments", taken.len());
    let (exhaustive, seeds) = if is_full() { (8, 60) } else { (2, 3) };
    for (number, moment) in taken.iter().enumerate() {
        for (index, left) in survivors(moment, number, exhaustive, seeds).iter().enumerate() {
            let check = || check_survivor(&run, number, left, &BTreeMap::new());
            let done = catch_unwind(AssertUnwindSafe(check));
            assert!(done.is_ok(), "{kind:?}: power loss before change {number} of {}, survivor {index}", taken.len());
        }
    }
}

#[test]
fn whatever_a_power_loss_leaves_maps_cover_it_and_say_little_more() {
    every_power_loss(Kind::Raw);
}

#[test]
fn whatever_a_power_loss_leaves_of_a_qcow2_image_maps_cover_it_and_say_little_more() {
    every_power_loss(Kind::Qcow2);
}

/// The power fails again while the first loss is recovered from, and soon after.
fn power_loss_in_the_recovery(kind: Kind) {
    let mut run = session(kind);
    let taken = std::mem::take(&mut *run.moments.taken.lock().unwrap());
    let (stride, inner, seeds) = if is_full() { (3, 1, 6) } else { (41, 3, 1) };
    for (number, moment) in taken.iter().enumerate().skip(stride / 2).step_by(stride) {
        let left = moment.survivors(number as u64);
        let more: BTreeMap<&str, Vec<u64>> = kind.disks().iter().map(|disk| (*disk, armed(&left, disk))).collect();
        let again = Arc::new(Moments { disk: left, ..Moments::default() });
        let shm = HeapShmRoot::new();
        shm.lose_power("boot-1b");
        let fleece = kind.mount(&again.disk, &shm, Some(&again));
        if fleece.disk(kind.disks()[0]).unwrap().size() != SIZE {
            // What this writes is known by its place; see `written_since`.
            continue;
        }
        let granule = 2 * REGION_GRANULES + 9;
        run.written.insert(granule);
        for disk in kind.disks() {
            run.log.push((number, Did::Wrote(disk, [granule].into())));
            fleece.disk(disk).unwrap().write(&pattern(77, 0, 700), granule * GRANULE).unwrap();
        }
        fleece.disarm_idle();
        fleece.disarm_idle();
        again.take();
        drop(fleece);
        for (step, moment) in again.taken.lock().unwrap().iter().enumerate().step_by(inner) {
            for seed in 0..seeds {
                let left = moment.survivors((number * 1000 + step) as u64 * 10 + seed);
                let done = catch_unwind(AssertUnwindSafe(|| check_survivor(&run, number, &left, &more)));
                assert!(done.is_ok(), "{kind:?}: power loss before change {number}, then before change {step}");
            }
        }
    }
}

#[test]
fn a_power_loss_in_a_recovery_is_recovered_from_by_the_same_facts() {
    power_loss_in_the_recovery(Kind::Raw);
    power_loss_in_the_recovery(Kind::Qcow2);
}
