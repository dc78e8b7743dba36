//! Short names for the steps of batches, and what bitmaps have.

#![allow(dead_code, reason = "each test program uses its own part of it")]

use crate::blank;
use crate::rig::*;
use fleecefs::bitmap::DirtyBitmap;
use fleecefs::fleece::{
    Action, Applied, BitmapInfo, BitmapRef, Environment, Fleece, Options, Place, Refused, SnapshotRequest,
};
use fleecefs::storage::dir::Dir;
use fleecefs::storage::faulty::{FaultPlan, Faulty};
use fleecefs::storage::shm::HeapShmRoot;
use fleecefs::storage::{MemDir, MemFile, SharedStorage};
use std::sync::Arc;

/// `disk/name`.
pub fn bm(text: &str) -> BitmapRef {
    let (disk, name) = text.split_once('/').unwrap();
    BitmapRef::new(disk, name)
}

pub fn add(text: &str) -> Action {
    added(text, Some(GRANULE), true, false)
}

pub fn added(text: &str, granularity: Option<u64>, persistent: bool, disabled: bool) -> Action {
    let BitmapRef { disk, name } = bm(text);
    Action::Add { disk, name, granularity, persistent, disabled }
}

pub fn transient(text: &str) -> Action {
    added(text, Some(GRANULE), false, false)
}

pub fn remove(text: &str) -> Action {
    Action::Remove(bm(text))
}

pub fn clear(text: &str) -> Action {
    Action::Clear(bm(text))
}

pub fn enable(text: &str) -> Action {
    Action::Enable(bm(text))
}

pub fn disable(text: &str) -> Action {
    Action::Disable(bm(text))
}

pub fn merge(target: &str, sources: &[&str]) -> Action {
    Action::Merge { target: bm(target), sources: sources.iter().map(|source| bm(source)).collect() }
}

pub fn hold(text: &str) -> Action {
    Action::Hold(bm(text))
}

pub fn snapshot(name: &str) -> Action {
    Action::Snapshot(SnapshotRequest { name: name.to_owned(), ..SnapshotRequest::default() })
}

pub fn apply(fleece: &Fleece, actions: &[Action]) -> Applied {
    fleece.apply(actions).unwrap()
}

pub fn refused(fleece: &Fleece, actions: &[Action]) -> Refused {
    fleece.apply(actions).map(drop).unwrap_err()
}

pub fn info(fleece: &Fleece, text: &str) -> BitmapInfo {
    let BitmapRef { disk, name } = bm(text);
    let all = fleece.bitmaps(&disk).unwrap();
    all.iter().find(|info| info.name == name).unwrap_or_else(|| panic!("no bitmap '{text}': {all:?}")).clone()
}

pub fn count(fleece: &Fleece, text: &str) -> u64 {
    info(fleece, text).count
}

pub fn hash(fleece: &Fleece, text: &str) -> String {
    fleece.bitmap_sha256(&bm(text)).unwrap()
}

pub fn names(fleece: &Fleece, disk: &str) -> Vec<String> {
    fleece.bitmaps(disk).unwrap().into_iter().map(|info| info.name).collect()
}

/// Everything that can be asked of the bitmaps of all disks.
pub fn state(fleece: &Fleece) -> Vec<(String, BitmapInfo, String)> {
    let mut all = Vec::new();
    for disk in fleece.disks() {
        for info in fleece.bitmaps(disk.name()).unwrap() {
            let hash = fleece.bitmap_sha256(&BitmapRef::new(disk.name(), &info.name)).unwrap();
            all.push((disk.name().to_owned(), info, hash));
        }
    }
    all
}

/// Writes into granules of a disk.
pub fn touch(fleece: &Fleece, disk: &str, granules: &[u64]) {
    for granule in granules {
        assert_eq!(fleece.disk(disk).unwrap().write(&[7], granule * GRANULE + 5).unwrap(), 1);
    }
}

/// The hash of a bitmap of the disks' size and granularity that has these granules.
pub fn hash_of(granules: &[u64]) -> String {
    use sha2::{Digest, Sha256};
    let word = granules.iter().fold(0u64, |word, granule| word | 1 << granule);
    Sha256::digest(word.to_le_bytes()).iter().map(|byte| format!("{byte:02x}")).collect()
}

pub fn granules_of(bitmap: &DirtyBitmap) -> Vec<u64> {
    (0..bitmap.bits().len()).filter(|bit| bitmap.bits().get(*bit)).collect()
}

/// A qcow2 image in memory, `a`, with the bitmaps of `blank`.
pub struct Image {
    pub file: MemFile,
    pub dir: MemDir,
    pub shm: HeapShmRoot,
    pub faults: Arc<FaultPlan>,
    pub state_faults: Arc<FaultPlan>,
}

impl Image {
    pub fn new(size: u64) -> Self {
        let file = MemFile::new("a.qcow2", 0);
        blank::make(file.shared(), size);
        let plan = || Arc::new(FaultPlan::new());
        Image { file, dir: MemDir::new(), shm: HeapShmRoot::new(), faults: plan(), state_faults: plan() }
    }

    pub fn mount(&self) -> Arc<Fleece> {
        let fleece = self.empty_mount();
        self.attach(&fleece, "a");
        fleece
    }

    pub fn empty_mount(&self) -> Arc<Fleece> {
        let env = Environment { shm: Arc::new(self.shm.clone()), background: false };
        Fleece::with_environment(Options::default(), env)
    }

    pub fn attach(&self, fleece: &Fleece, name: &str) {
        let file: SharedStorage = Arc::new(Faulty { inner: self.file.shared(), plan: self.faults.clone() });
        let dir: Arc<dyn Dir> = Arc::new(self.dir.with_faults(self.state_faults.clone()));
        let place = Place { state: dir.clone(), stores: dir, shm: None, lock: None };
        fleece.attach(name, blank::open(file).unwrap(), place).unwrap();
    }
}
