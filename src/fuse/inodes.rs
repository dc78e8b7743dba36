//! What the kernel holds by number.
//!
//! An inode is here from the kernel's first lookup of it until the kernel forgets it, so the table is bounded by the
//! kernel's own. A file that is open keeps what it reads and writes at hand ([`Target`]); that is let go at the last
//! close, so that nothing outlives a disk that is removed or a snapshot that is dropped. Counts never go below zero:
//! after a take-over the kernel forgets and closes more than this process has seen.

use super::node::Node;
use crate::backup::MapFile;
use crate::fleece::{Disk, FrozenVolume, LiveVolume, View, ViewMap};
use arc_swap::ArcSwapOption;
use parking_lot::RwLock;
use std::collections::HashMap;
use std::sync::Arc;

/// What a file's bytes come from and go to.
pub enum Target {
    /// The live disk.
    Disk(Arc<Disk>),
    /// A volume of live disks; never pinned, see [`super::held`].
    LiveVolume(Arc<LiveVolume>),
    /// A volume of frozen views.
    Volume(Arc<FrozenVolume>),
    /// The frozen view, also for releases.
    View(Arc<View>),
    /// The frozen view through a dirty map.
    Changed(Arc<ViewMap>),
    /// A map's text.
    Map(Arc<MapFile>),
}

/// One inode.
pub struct Inode {
    /// Its number.
    pub ino: u64,
    /// What it is.
    pub node: Node,
    target: ArcSwapOption<Target>,
}

impl Inode {
    /// What was pinned, if anything is.
    pub fn pinned(&self) -> Option<Arc<Target>> {
        self.target.load_full()
    }

    /// Keeps `target` at hand until the last close.
    pub fn pin(&self, target: Arc<Target>) {
        self.target.store(Some(target));
    }
}

struct Entry {
    inode: Arc<Inode>,
    /// Lookups that the kernel has not forgotten.
    lookups: u64,
    /// Opens without their close.
    opens: u64,
}

impl Entry {
    fn new(node: Node) -> Entry {
        Entry { inode: Arc::new(Inode { ino: node.ino(), node, target: ArcSwapOption::empty() }), lookups: 0, opens: 0 }
    }
}

/// All inodes that the kernel knows.
#[derive(Default)]
pub struct Inodes {
    entries: RwLock<HashMap<u64, Entry>>,
}

impl Inodes {
    /// The inode of a number, where it is known.
    pub fn get(&self, ino: u64) -> Option<Arc<Inode>> {
        self.entries.read().get(&ino).map(|entry| entry.inode.clone())
    }

    /// Counts one lookup by the kernel.
    pub fn remember(&self, node: Node) -> Arc<Inode> {
        let mut entries = self.entries.write();
        let entry = entries.entry(node.ino()).or_insert_with(|| Entry::new(node));
        entry.lookups = entry.lookups.saturating_add(1);
        entry.inode.clone()
    }

    /// Takes `count` lookups back.
    pub fn forget(&self, ino: u64, count: u64) {
        let mut entries = self.entries.write();
        if let Some(entry) = entries.get_mut(&ino) {
            entry.lookups = entry.lookups.saturating_sub(count);
            if entry.lookups == 0 && entry.opens == 0 {
                entries.remove(&ino);
            }
        }
    }

    /// Counts an open.
    pub fn opened(&self, inode: &Inode) {
        if let Some(entry) = self.entries.write().get_mut(&inode.ino) {
            entry.opens += 1;
        }
    }

    /// Takes an open back; false where none was counted. The last one lets go of what was pinned.
    pub fn closed(&self, inode: &Inode) -> bool {
        let mut entries = self.entries.write();
        let Some(entry) = entries.get_mut(&inode.ino) else { return false };
        let counted = entry.opens > 0;
        entry.opens = entry.opens.saturating_sub(1);
        if entry.opens == 0 {
            entry.inode.target.store(None);
            if entry.lookups == 0 {
                entries.remove(&inode.ino);
            }
        }
        counted
    }

    /// Whether the inode is open.
    #[cfg(test)]
    pub fn is_open(&self, ino: u64) -> bool {
        self.entries.read().get(&ino).is_some_and(|entry| entry.opens > 0)
    }

    /// Count of the inodes held, for the test of their bound.
    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.entries.read().len()
    }
}
