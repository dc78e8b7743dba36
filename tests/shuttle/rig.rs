//! A mount in memory, and the explorers that run a scenario on it under many schedules.

use fleecefs::fleece::{Disk, Environment, Fleece, Options, Place, Snapshot, SnapshotRequest, View};
use fleecefs::image::raw::RawImage;
use fleecefs::storage::dir::MemDir;
use fleecefs::storage::faulty::FaultPlan;
use fleecefs::storage::mem::MemFile;
use fleecefs::storage::shm::HeapShmRoot;
use shuttle::scheduler::{PctScheduler, RandomScheduler, Scheduler};
use shuttle::{Config, FailurePersistence, MaxSteps, Runner};
use std::sync::Arc;

/// Bytes per bit of a checkpoint's bitmap.
pub const GRANULE: u64 = 65536;
/// One page of a [`MemFile`], the unit in which its transfers interleave.
pub const PAGE: u64 = 4096;

/// How deep PCT looks: bugs that need at most this many switches at the wrong moment are found soon.
const PCT_DEPTH: usize = 3;
/// A schedule of this many steps goes round in circles.
const MAX_STEPS: usize = 200_000;
const STACK_BYTES: usize = 512 << 10;

/// Runs `scenario` under random and under PCT schedules. `weight`: times the base count, for scenarios with rare hits.
pub fn explore(weight: usize, scenario: impl Fn() + Send + Sync + 'static) {
    let base = std::env::var("FLEECEFS_SHUTTLE_ITERATIONS").ok().and_then(|text| text.parse().ok()).unwrap_or(400);
    let scenario = Arc::new(scenario);
    run(RandomScheduler::new(base * weight), scenario.clone());
    run(PctScheduler::new(PCT_DEPTH, base * weight), scenario);
}

fn run(scheduler: impl Scheduler + 'static, scenario: Arc<impl Fn() + Send + Sync + 'static>) {
    let mut config = Config::new();
    config.stack_size = STACK_BYTES;
    config.max_steps = MaxSteps::FailAfter(MAX_STEPS);
    config.failure_persistence = FailurePersistence::Print;
    config.silence_warnings = true;
    Runner::new(scheduler, config).run(move || scenario());
}

/// A mount in memory.
pub struct Rig {
    pub fleece: Arc<Fleece>,
    /// Faults of the stores of all disks.
    pub store_faults: Arc<FaultPlan>,
    /// Faults of the state directories of all disks.
    pub state_faults: Arc<FaultPlan>,
}

impl Rig {
    /// Disks `a`, `b` … of these sizes in bytes; byte `i` of page `p` is 1 everywhere.
    pub fn new(options: Options, sizes: &[u64]) -> Arc<Rig> {
        let env = Environment { shm: Arc::new(HeapShmRoot::new()), background: false };
        let fleece = Fleece::with_environment(options, env);
        let rig = Rig { fleece, store_faults: Arc::new(FaultPlan::new()), state_faults: Arc::new(FaultPlan::new()) };
        for (name, &size) in ["a", "b", "c"].iter().zip(sizes) {
            let image = MemFile::new(name, size);
            let image = Arc::new(RawImage::over(image.shared(), false).unwrap());
            let dir = MemDir::new();
            let place = Place {
                state: Arc::new(dir.with_faults(rig.state_faults.clone())),
                stores: Arc::new(dir.with_faults(rig.store_faults.clone())),
                shm: None,
                lock: None,
            };
            rig.fleece.attach(name, image, place).unwrap();
        }
        Arc::new(rig)
    }

    /// One disk `a` of `pages` pages, chunks of one page, every byte 1.
    pub fn filled(pages: u64) -> Arc<Rig> {
        let rig = Rig::new(Options::default(), &[pages * PAGE]);
        rig.fill(0, pages, 1);
        rig
    }

    pub fn disk(&self, name: &str) -> Arc<Disk> {
        self.fleece.disk(name).unwrap()
    }

    pub fn freeze(&self, name: &str) -> Arc<Snapshot> {
        self.fleece.create_snapshot(&SnapshotRequest { name: name.to_owned(), ..SnapshotRequest::default() }).unwrap()
    }

    /// The view of disk `a`.
    pub fn view(&self, snapshot: &str) -> Arc<View> {
        self.fleece.snapshot(snapshot).unwrap().view("a").unwrap().clone()
    }

    /// Writes whole pages of disk `a`.
    pub fn fill(&self, page: u64, count: u64, byte: u8) {
        let data = vec![byte; (count * PAGE) as usize];
        assert_eq!(self.disk("a").write(&data, page * PAGE).unwrap(), data.len());
    }
}

/// All bytes of a view.
pub fn content(view: &View) -> Vec<u8> {
    let mut bytes = vec![0xee; view.size() as usize];
    assert_eq!(view.read(&mut bytes, 0).unwrap(), bytes.len());
    bytes
}

/// All bytes of a live disk.
pub fn live(disk: &Disk) -> Vec<u8> {
    let mut bytes = vec![0xee; disk.size() as usize];
    assert_eq!(disk.read(&mut bytes, 0).unwrap(), bytes.len());
    bytes
}

/// One byte a page; every page must hold one byte only.
pub fn pages(bytes: &[u8]) -> Vec<u8> {
    bytes
        .chunks(PAGE as usize)
        .map(|page| {
            assert!(page.iter().all(|byte| *byte == page[0]), "a torn page");
            page[0]
        })
        .collect()
}

/// Whether the map of `view` since checkpoint `base` calls the granule dirty. Never for want of knowledge.
pub fn is_dirty(view: &Arc<View>, base: &str, granule: u64) -> bool {
    let base = view.since().into_iter().find(|point| point.name == base).unwrap();
    let map = view.map(Some(base.uuid)).unwrap();
    assert_eq!(map.everything(), None);
    map.dirty_run(granule * GRANULE, 1).0
}

/// Every granule that differs between two views is in the newer one's map since the older one's checkpoint.
pub fn assert_covered(older: &View, newer: &Arc<View>) {
    let (old, new) = (content(older), content(newer));
    for granule in 0..newer.size().div_ceil(GRANULE) {
        let start = (granule * GRANULE) as usize;
        let part = |bytes: &[u8]| bytes.get(start..bytes.len().min(start + GRANULE as usize)).map(<[u8]>::to_vec);
        if part(&old) != part(&new) {
            assert!(
                is_dirty(newer, &older.checkpoint().name, granule),
                "a change of granule {granule} is not in the map"
            );
        }
    }
}
