//! Disks in memory under a mount, beside a plain oracle of what they, their frozen views and their maps must hold.

#![allow(dead_code, reason = "each test program uses its own part of it")]

use fleecefs::backup::{Extent, ExtentSource};
use fleecefs::error::{Error, Result, errno};
use fleecefs::fleece::{Disk, Environment, Fleece, Options, Place, Since, Snapshot, SnapshotRequest, View};
use fleecefs::image::raw::RawImage;
use fleecefs::storage::dir::{Dir, MemDir};
use fleecefs::storage::faulty::{FaultPlan, Faulty};
use fleecefs::storage::mem::MemFile;
use fleecefs::storage::shm::{HeapShmRoot, ShmRoot};
use fleecefs::storage::{SharedStorage, Storage};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};
use uuid::Uuid;

/// Copy unit of the disks.
pub const CHUNK: u64 = 4096;
/// Bytes per bit of a checkpoint's bitmap.
pub const GRANULE: u64 = 65536;
/// Six granules and a partial chunk.
pub const DISK_BYTES: u64 = 6 * GRANULE + 1234;
/// The disks of most tests.
pub const PAIR: [&str; 2] = ["a", "b"];

/// The files of one disk, with a plan of faults for each of its three places.
pub struct Files {
    pub image: MemFile,
    pub state: MemDir,
    pub stores: MemDir,
    pub image_faults: Arc<FaultPlan>,
    pub state_faults: Arc<FaultPlan>,
    pub store_faults: Arc<FaultPlan>,
}

/// What survives a daemon.
pub struct Host {
    pub heap: HeapShmRoot,
    pub shm: Arc<dyn ShmRoot>,
    pub files: BTreeMap<&'static str, Files>,
    pub options: Options,
    boots: u32,
}

impl Files {
    pub fn new(name: &str, size: u64) -> Self {
        let plan = || Arc::new(FaultPlan::new());
        Files {
            image: MemFile::new(&format!("{name}.img"), size),
            state: MemDir::new(),
            stores: MemDir::new(),
            image_faults: plan(),
            state_faults: plan(),
            store_faults: plan(),
        }
    }

    pub fn clear_faults(&self) {
        [&self.image_faults, &self.state_faults, &self.store_faults].into_iter().for_each(|plan| plan.clear());
    }

    /// Names of the layers' directories.
    pub fn layers(&self) -> Vec<String> {
        self.stores.list("layers").unwrap()
    }
}

impl Host {
    pub fn new(names: &[&'static str], size: u64) -> Self {
        let heap = HeapShmRoot::new();
        let files = names.iter().map(|name| (*name, Files::new(name, size))).collect();
        Host { shm: Arc::new(heap.clone()), heap, files, options: Options::default(), boots: 1 }
    }

    pub fn pair() -> Self {
        Host::new(&PAIR, DISK_BYTES)
    }

    pub fn one() -> Self {
        Host::new(&["a"], DISK_BYTES)
    }

    pub fn with(mut self, change: impl FnOnce(&mut Options)) -> Self {
        change(&mut self.options);
        self
    }

    pub fn empty_mount(&self) -> Arc<Fleece> {
        let env = Environment { shm: self.shm.clone(), background: false };
        Fleece::with_environment(self.options.clone(), env)
    }

    /// All disks, in name order.
    pub fn mount(&self) -> Arc<Fleece> {
        let fleece = self.empty_mount();
        for name in self.files.keys() {
            self.attach(&fleece, name).unwrap();
        }
        fleece
    }

    pub fn attach(&self, fleece: &Fleece, name: &str) -> Result<Arc<Disk>> {
        self.attach_as(fleece, name, false)
    }

    pub fn attach_as(&self, fleece: &Fleece, name: &str, read_only: bool) -> Result<Arc<Disk>> {
        let files = &self.files[name];
        let image = Faulty { inner: files.image.shared(), plan: files.image_faults.clone() };
        let state = Arc::new(files.state.with_faults(files.state_faults.clone()));
        let stores = Arc::new(files.stores.with_faults(files.store_faults.clone()));
        attach_over(fleece, name, Arc::new(image), state, stores, read_only)
    }

    pub fn clear_faults(&self) {
        self.files.values().for_each(Files::clear_faults);
    }

    pub fn lose_power(&mut self) {
        self.boots += 1;
        self.heap.lose_power(&format!("boot-{}", self.boots));
    }
}

pub fn attach_over(
    fleece: &Fleece,
    name: &str,
    image: SharedStorage,
    state: Arc<dyn Dir>,
    stores: Arc<dyn Dir>,
    read_only: bool,
) -> Result<Arc<Disk>> {
    let image = Arc::new(RawImage::over(image, read_only)?);
    fleece.attach(name, image, Place { state, stores, shm: None, lock: None })
}

/// Content that tells offsets and seeds apart, and is never zero.
pub fn pattern(seed: u8, offset: u64, len: u64) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(len as usize);
    while (bytes.len() as u64) < len {
        let at = offset + bytes.len() as u64;
        let end = (512 - at % 512).min(offset + len - at);
        let byte = (at / 512).to_le_bytes()[0].wrapping_mul(7).wrapping_add(seed) | 1;
        bytes.resize(bytes.len() + end as usize, byte);
    }
    bytes
}

/// Takes a snapshot of all disks.
pub fn freeze(fleece: &Fleece, name: &str) -> Arc<Snapshot> {
    try_freeze(fleece, name, &[], None).unwrap()
}

pub fn freeze_since(fleece: &Fleece, name: &str, since: Since) -> Arc<Snapshot> {
    try_freeze(fleece, name, &[], Some(since)).unwrap()
}

pub fn try_freeze(fleece: &Fleece, name: &str, disks: &[&str], since: Option<Since>) -> Result<Arc<Snapshot>> {
    let disks = disks.iter().map(|disk| (*disk).to_owned()).collect();
    fleece.create_snapshot(&SnapshotRequest { name: name.to_owned(), disks, since, ..SnapshotRequest::default() })
}

pub fn view_of(fleece: &Fleece, snapshot: &str, disk: &str) -> Arc<View> {
    fleece.snapshot(snapshot).unwrap().view(disk).unwrap().clone()
}

pub fn read_live(disk: &Disk, offset: u64, len: u64) -> Vec<u8> {
    let mut buf = vec![0xee; len as usize];
    assert_eq!(disk.read(&mut buf, offset).unwrap() as u64, len);
    buf
}

pub fn read_view(view: &View, offset: u64, len: u64) -> Result<Vec<u8>> {
    let mut buf = vec![0xee; len as usize];
    let count = view.read(&mut buf, offset)?;
    buf.truncate(count);
    Ok(buf)
}

/// Everything that the image file holds, past all layers of the product.
pub fn read_image(image: &MemFile) -> Vec<u8> {
    let mut buf = vec![0xee; image.len().unwrap() as usize];
    image.read_at(&mut buf, 0).unwrap();
    buf
}

pub fn extents(view: &Arc<View>, base: Option<Uuid>) -> Result<Vec<Extent>> {
    let map = view.map(base)?;
    let extents: Result<Vec<Extent>> = map.extents_from(0)?.collect();
    extents
}

/// The map since the checkpoint of that name.
pub fn extents_since(view: &Arc<View>, name: &str) -> Vec<Extent> {
    let base = view.since().into_iter().find(|point| point.name == name).unwrap();
    extents(view, Some(base.uuid)).unwrap()
}

/// Granules that a map calls dirty.
pub fn dirty_granules(extents: &[Extent]) -> BTreeSet<u64> {
    let dirty = extents.iter().filter(|extent| extent.dirty);
    dirty.flat_map(|extent| extent.start / GRANULE..=(extent.start + extent.length - 1) / GRANULE).collect()
}

pub fn counter(fleece: &Fleece, name: &str) -> u64 {
    fleece.counters().into_iter().find(|counter| counter.name == name).unwrap().value
}

/// Waits for work in the background; a minute without it is a failure.
pub fn wait_for(what: &str, done: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !done() {
        assert!(Instant::now() < deadline, "never: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

pub fn assert_errno<T>(result: Result<T>, errno: i32) -> Error {
    let e = result.map(|_| ()).unwrap_err();
    assert_eq!(e.errno(), errno, "{e}");
    e
}

/// How much of an image may be missing in what a check sees.
#[derive(Debug, Clone, Copy, Default)]
pub struct Allow {
    /// Views may be broken: EIO, never wrong bytes.
    pub broken: bool,
    /// Maps may say more than what changed.
    pub more: bool,
    /// One chunk of a view may be lost: EIO there.
    pub lost: bool,
    /// A call may fail once.
    pub retry: bool,
}

/// Nothing but the exact truth.
pub const EXACT: Allow = Allow { broken: false, more: false, lost: false, retry: false };

impl Allow {
    fn attempt<T>(&self, call: impl Fn() -> Result<T>) -> Result<T> {
        call().or_else(|e| if self.retry { call() } else { Err(e) })
    }
}

/// What one disk must hold.
#[derive(Debug, Clone)]
pub struct Story {
    pub live: Vec<u8>,
    log: Vec<Entry>,
    points: BTreeMap<String, Vec<u8>>,
}

#[derive(Debug, Clone)]
enum Entry {
    Point(String),
    Dirty(u64),
}

/// The oracle: what each disk must hold, and held at each point.
#[derive(Debug, Clone)]
pub struct Oracle(pub BTreeMap<&'static str, Story>);

impl Oracle {
    pub fn new(host: &Host) -> Self {
        let story = |files: &Files| Story { live: read_image(&files.image), log: Vec::new(), points: BTreeMap::new() };
        Oracle(host.files.iter().map(|(name, files)| (*name, story(files))).collect())
    }

    pub fn story(&mut self, disk: &str) -> &mut Story {
        self.0.get_mut(disk).unwrap()
    }

    /// A guest write of a pattern. What an error leaves is looked up: each byte old or new.
    pub fn write(&mut self, fleece: &Fleece, disk: &str, offset: u64, len: u64, seed: u8) -> Result<()> {
        let data = pattern(seed, offset, len);
        let live = fleece.disk(disk).unwrap();
        let done = live.write(&data, offset).map(|count| assert_eq!(count as u64, len));
        self.story(disk).changed(&live, offset, &data, done)
    }

    /// A guest's write-zeroes, or discard.
    pub fn zero(&mut self, fleece: &Fleece, disk: &str, offset: u64, len: u64, discard: bool) -> Result<()> {
        let live = fleece.disk(disk).unwrap();
        let done = if discard { live.discard(offset, len) } else { live.write_zeroes(offset, len) };
        self.story(disk).changed(&live, offset, &vec![0; len as usize], done)
    }

    /// A snapshot of all disks; the instant counts as taken whatever the answer, since a crash may bring it back.
    pub fn freeze(&mut self, fleece: &Fleece, name: &str) -> Result<Arc<Snapshot>> {
        self.note(name);
        try_freeze(fleece, name, &[], None)
    }

    /// Notes that the disks were frozen now.
    pub fn note(&mut self, name: &str) {
        for story in self.0.values_mut() {
            story.log.push(Entry::Point(name.to_owned()));
            story.points.insert(name.to_owned(), story.live.clone());
        }
    }

    pub fn grow(&mut self, fleece: &Fleece, disk: &str, size: u64) -> Result<()> {
        let done = fleece.resize_disk(disk, size);
        let story = self.story(disk);
        let old = story.live.len() as u64;
        let now = fleece.disk(disk).unwrap().size();
        assert!(now == size || (done.is_err() && now == old), "neither the old nor the new size");
        story.live.resize(now as usize, 0);
        // The new area counts as changed, and what failed may be marked all the same.
        story.log.extend((old / GRANULE..=(size - 1) / GRANULE).map(Entry::Dirty));
        done
    }

    /// A resize whose outcome was not known came out like this.
    pub fn adopt_size(&mut self, disk: &str, size: u64) {
        let story = self.story(disk);
        let old = story.live.len() as u64;
        if size > old {
            story.log.extend((old / GRANULE..=(size - 1) / GRANULE).map(Entry::Dirty));
        }
        story.live.resize(size as usize, 0);
    }

    /// What was frozen came out like this.
    pub fn adopt_point(&mut self, disk: &str, name: &str, content: Vec<u8>) {
        self.story(disk).points.insert(name.to_owned(), content);
    }

    /// The snapshot does not exist.
    pub fn forget_point(&mut self, name: &str) {
        self.0.values_mut().for_each(|story| drop(story.points.remove(name)));
    }

    /// Everything that a user can see now.
    pub fn check(&self, fleece: &Fleece, allow: Allow) {
        for (name, story) in &self.0 {
            let Ok(disk) = fleece.disk(name) else { continue };
            assert_eq!(disk.size(), story.live.len() as u64, "size of {name}");
            assert_same(&read_live(&disk, 0, disk.size()), &story.live, &format!("live {name}"));
            for snapshot in fleece.snapshots() {
                if let Ok(view) = snapshot.view(name) {
                    story.check_view(view, allow);
                    story.check_maps(view, allow);
                }
            }
        }
    }

    /// Everything, and what the recording bitmaps hold: by one more snapshot.
    pub fn check_all(&mut self, fleece: &Fleece, probe: &str, allow: Allow) {
        self.check(fleece, allow);
        self.freeze(fleece, probe).unwrap();
        self.check(fleece, allow);
        fleece.cancel_snapshot(probe).unwrap();
        self.check(fleece, allow);
    }
}

/// By comparison of slices, which is fast in a debug build too.
pub fn is_zero(bytes: &[u8]) -> bool {
    bytes.chunks(CHUNK as usize).all(|chunk| *chunk == [0; CHUNK as usize][..chunk.len()])
}

/// Compares long contents without printing them.
pub fn assert_same(now: &[u8], expected: &[u8], what: &str) {
    assert_eq!(now.len(), expected.len(), "length of {what}");
    if now == expected {
        return;
    }
    if let Some(at) = now.iter().zip(expected).position(|(now, expected)| now != expected) {
        panic!("{what}: byte {at} (chunk {}) is {}, not {}", at as u64 / CHUNK, now[at], expected[at]);
    }
}

impl Story {
    fn changed(&mut self, live: &Disk, offset: u64, new: &[u8], done: Result<()>) -> Result<()> {
        let range = offset as usize..offset as usize + new.len();
        self.log.extend((offset / GRANULE..=(range.end as u64 - 1) / GRANULE).map(Entry::Dirty));
        if done.is_ok() {
            self.live[range].copy_from_slice(new);
        } else {
            let now = read_live(live, offset, new.len() as u64);
            let old = &self.live[range.clone()];
            let good = now.iter().zip(old).zip(new).all(|((now, old), new)| now == old || now == new);
            assert!(good, "a failed write left bytes that are neither old nor new");
            self.live[range].copy_from_slice(&now);
        }
        done
    }

    /// What the disk held when the snapshot was taken.
    pub fn at(&self, point: &str) -> &[u8] {
        self.points.get(point).unwrap_or_else(|| panic!("no instant '{point}'"))
    }

    pub fn check_view(&self, view: &Arc<View>, allow: Allow) {
        let what = format!("view {} of {}", view.checkpoint().name, view.disk_name());
        let frozen = self.at(&view.checkpoint().name);
        assert_eq!(view.size(), frozen.len() as u64, "size of {what}");
        match allow.attempt(|| read_view(view, 0, view.size())) {
            Ok(now) => {
                assert!(view.broken().is_none(), "{what} is broken and answered");
                assert_same(&now, frozen, &what);
                check_status(view, frozen, allow, &what);
            }
            Err(e) if allow.lost && view.broken().is_none() => {
                check_chunks(view, frozen, &what, &e);
                check_status(view, frozen, allow, &what);
            }
            Err(e) => {
                assert_eq!(e.errno(), errno::EIO, "{what}: {e}");
                assert!(allow.broken && view.broken().is_some(), "{what}: {e}");
            }
        }
    }

    /// The maps since every known point.
    pub fn check_maps(&self, view: &Arc<View>, allow: Allow) {
        let target = view.checkpoint().name;
        for base in view.since() {
            let what = format!("map {} of {} since {}", target, view.disk_name(), base.name);
            let map = match allow.attempt(|| extents(view, Some(base.uuid))) {
                Ok(map) => map,
                Err(_) if allow.broken && view.broken().is_some() => continue,
                Err(e) => panic!("{what}: {e}"),
            };
            self.check_map(&map, &base.name, &target, allow, &what);
        }
    }

    pub fn check_map(&self, map: &[Extent], base: &str, target: &str, allow: Allow, what: &str) {
        let (old, new) = (self.at(base), self.at(target));
        let mut at = 0;
        for extent in map {
            assert_eq!(extent.start, at, "{what}: gap or overlap");
            assert!(extent.length > 0, "{what}: empty extent");
            at += extent.length;
            let range = extent.start as usize..at as usize;
            if !extent.dirty {
                let text = format!("{what}: a change is missing in {range:?}");
                assert!(old.get(range.clone()) == new.get(range.clone()), "{text}");
            }
            if extent.zero {
                assert!(is_zero(&new[range]), "{what}: zero that is none");
            }
        }
        assert_eq!(at, new.len() as u64, "{what}: end");
        if !allow.more {
            let expected = self.granules(base, target, new.len() as u64);
            assert_eq!(dirty_granules(map), expected, "{what}: dirty granules");
        }
    }

    /// Granules that were written between two points.
    fn granules(&self, base: &str, target: &str, size: u64) -> BTreeSet<u64> {
        let at = |name: &str| {
            let found = self.log.iter().position(|entry| matches!(entry, Entry::Point(point) if point == name));
            found.unwrap_or_else(|| panic!("no instant '{name}'"))
        };
        let span = &self.log[at(base)..at(target)];
        let dirty = span.iter().filter_map(|entry| match entry {
            Entry::Dirty(granule) if granule * GRANULE < size => Some(*granule),
            _ => None,
        });
        dirty.collect()
    }
}

/// One chunk may be an error, the others are right.
fn check_chunks(view: &View, frozen: &[u8], what: &str, lost: &Error) {
    let mut errors = 0;
    for (chunk, frozen) in frozen.chunks(CHUNK as usize).enumerate() {
        match read_view(view, chunk as u64 * CHUNK, CHUNK) {
            Ok(now) => assert_same(&now, frozen, what),
            Err(e) => {
                assert_eq!(e.errno(), errno::EIO);
                errors += 1;
            }
        }
    }
    assert_eq!(errors, 1, "{what}: {lost}");
}

/// Runs that are called zero are.
pub fn check_status(view: &View, frozen: &[u8], allow: Allow, what: &str) {
    let mut at = 0;
    while at < view.size() {
        let run = allow.attempt(|| view.block_status(at, view.size() - at)).unwrap();
        assert!(run.len > 0);
        let range = at as usize..(at + run.len) as usize;
        assert!(!run.zero || is_zero(&frozen[range.clone()]), "{what}: hole {range:?} that is none");
        at += run.len;
    }
}
