//! Texts that are made at open and read until release, so that a reader sees one state from beginning to end.

use parking_lot::RwLock;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use uuid::Uuid;

/// Open texts by file handle.
pub struct Texts {
    next: AtomicU64,
    held: RwLock<HashMap<(u64, u64), Arc<str>>>,
}

impl Default for Texts {
    /// Handles start at a random number: those of an earlier process of the same mount must not name ours.
    fn default() -> Self {
        let (random, _) = Uuid::new_v4().as_u64_pair();
        Texts { next: AtomicU64::new(random | 1 << 63), held: RwLock::default() }
    }
}

impl Texts {
    /// Keeps `text` for a reader of `ino`; the handle is not 0.
    pub fn hold(&self, ino: u64, text: Arc<str>) -> u64 {
        let handle = self.next.fetch_add(1, Ordering::Relaxed).max(1);
        self.held.write().insert((ino, handle), text);
        handle
    }

    /// The text behind a handle, where this process made it.
    pub fn get(&self, ino: u64, handle: u64) -> Option<Arc<str>> {
        self.held.read().get(&(ino, handle)).cloned()
    }

    /// Lets go of a text.
    pub fn drop(&self, ino: u64, handle: u64) {
        self.held.write().remove(&(ino, handle));
    }

    /// Count of the texts held.
    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.held.read().len()
    }
}
