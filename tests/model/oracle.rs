//! The oracle: what disks, views and maps must be, kept in the plainest way.

use std::collections::BTreeSet;

/// Bytes per bit of a checkpoint's bitmap.
pub const GRANULE: u64 = 65536;

/// A checkpoint of one disk, and which granules were written from it to the next.
#[derive(Debug, Clone)]
pub struct Point {
    pub name: String,
    pub content: Vec<u8>,
    pub granules: BTreeSet<u64>,
    pub completed: bool,
    /// Changes from here on are not known exactly: the map may say more.
    pub inexact: bool,
}

/// The number in a snapshot's name: they are taken in this order.
fn serial(name: &str) -> u32 {
    name.trim_start_matches('s').parse().unwrap()
}

/// A frozen view of one disk.
#[derive(Debug, Clone)]
pub struct Frozen {
    pub name: String,
    pub content: Vec<u8>,
    pub reference: Option<String>,
    /// Chunks that were released.
    pub released: BTreeSet<u64>,
    /// Chunks that could not be read when they were overwritten.
    pub lost: BTreeSet<u64>,
    pub broken: bool,
    /// The map once looked at: it never changes.
    pub map: Option<Vec<fleecefs::backup::Extent>>,
}

/// One disk of the model.
#[derive(Debug, Clone, Default)]
pub struct Model {
    pub live: Vec<u8>,
    pub points: Vec<Point>,
    pub frozen: Vec<Frozen>,
    /// Chunks of the image that cannot be read now.
    pub bad: BTreeSet<u64>,
    /// Snapshots that were refused for a fault of the state: they may come back, with what they froze.
    pub ghosts: Vec<Frozen>,
}

impl Model {
    /// A guest change of a range, already cut to the disk.
    pub fn change(&mut self, offset: u64, len: u64, byte: u8) {
        self.live[offset as usize..(offset + len) as usize].fill(byte);
        self.mark(offset, len);
        let end = offset + len;
        self.bad.retain(|chunk| {
            let (start, stop) = (chunk * 4096, (chunk + 1) * 4096);
            !(offset <= start && stop <= end)
        });
    }

    pub fn mark(&mut self, offset: u64, len: u64) {
        if let (Some(point), true) = (self.points.last_mut(), len > 0) {
            point.granules.extend(offset / GRANULE..=(offset + len - 1) / GRANULE);
        }
    }

    /// What a snapshot of now holds.
    pub fn frozen_now(&self, name: &str, reference: Option<String>) -> Frozen {
        Frozen {
            name: name.to_owned(),
            content: self.live.clone(),
            reference,
            released: BTreeSet::new(),
            lost: BTreeSet::new(),
            broken: false,
            map: None,
        }
    }

    pub fn freeze(&mut self, name: &str, reference: Option<String>) {
        self.frozen.push(self.frozen_now(name, reference));
        self.points.push(Point {
            name: name.to_owned(),
            content: self.live.clone(),
            granules: BTreeSet::new(),
            completed: false,
            inexact: false,
        });
    }

    /// The checkpoint of a refused snapshot came back, and its view too where it is `shown`. What the checkpoint before
    /// it has been marked with since is not known exactly.
    pub fn return_ghost(&mut self, ghost: Frozen, shown: bool) {
        if self.points.iter().all(|point| point.name != ghost.name) {
            let place = self.points.partition_point(|point| serial(&point.name) < serial(&ghost.name));
            if let Some(before) = place.checked_sub(1) {
                self.points[before].inexact = true;
            }
            self.points.insert(
                place,
                Point {
                    name: ghost.name.clone(),
                    content: ghost.content.clone(),
                    granules: BTreeSet::new(),
                    completed: false,
                    inexact: true,
                },
            );
        }
        if shown && self.frozen.iter().all(|frozen| frozen.name != ghost.name) {
            let place = self.frozen.partition_point(|frozen| serial(&frozen.name) < serial(&ghost.name));
            self.frozen.insert(place, ghost);
        }
    }

    /// A checkpoint goes; its changes go to the one before.
    pub fn merge_away(&mut self, name: &str) {
        let Some(index) = self.points.iter().position(|point| point.name == name) else { return };
        let gone = self.points.remove(index);
        if let Some(before) = index.checked_sub(1).and_then(|before| self.points.get_mut(before)) {
            before.granules.extend(gone.granules);
            before.inexact |= gone.inexact;
        }
    }

    /// Granules that changed from `base` up to `target`, and whether exactly those are to be expected.
    pub fn changed(&self, base: &str, target: &str) -> (BTreeSet<u64>, bool) {
        let at = |name: &str| self.points.iter().position(|point| point.name == name).unwrap();
        let span = &self.points[at(base)..at(target)];
        let granules = span.iter().flat_map(|point| point.granules.iter().copied()).collect();
        (granules, !span.iter().any(|point| point.inexact))
    }

    /// The reference point that a snapshot without `--since` takes.
    pub fn newest_completed(&self) -> Option<String> {
        self.points.iter().rev().find(|point| point.completed).map(|point| point.name.clone())
    }
}
