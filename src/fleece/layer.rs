//! A layer: what a snapshot pushes onto a disk, and where the old content of later overwrites goes.
//!
//! Per chunk one state. *Clear*: the frozen content still stands in a newer layer or in the image. *Copied*: it is
//! complete in this layer's store. *Lost*: it could not be read when it had to be copied; the view answers EIO there.
//! A chunk's state only ever goes from clear to copied or lost, and only while its stripe is claimed (or, in folding,
//! by the one folder, into a layer whose guest copies, if one is still under way, are of the same content).
//!
//! The states, the `broken` flag and the released ranges live in words outside this process' heap, so that they are
//! exact after kill -9:
//!
//! | array | words |
//! | --- | --- |
//! | `layer.UUID.head` | 0: 1 where broken; 1: number of lost chunks; 2: 1 where hidden; 3 .. 511: lost chunk + 1 each |
//! | `layer.UUID.copied` | one bit a chunk: copied or lost |
//! | `layer.UUID.released` | one bit a chunk: released in this layer's view (made at the first release) |

use super::store::Store;
use super::stripes::Stripes;
use crate::bitmap::Bits;
use crate::error::{Error, Result, errno};
use crate::storage::{Shm, Words};
use crate::sync::Mutex;
use crate::sync::atomic::Ordering;
use crate::sync::full_fence;
use std::ops::Range;
use std::sync::{Arc, OnceLock};
use uuid::Uuid;

/// Words of a layer's head.
pub(super) const HEAD_WORDS: usize = 512;
const BROKEN: usize = 0;
const LOST_COUNT: usize = 1;
const HIDDEN: usize = 2;
const LOST_FIRST: usize = 3;
/// Most unreadable chunks that one layer keeps apart; with more, its views break.
const MAX_LOST: usize = HEAD_WORDS - LOST_FIRST;

/// The word arrays of a layer.
pub(super) const PARTS: [&str; 3] = ["head", "copied", "released"];

/// Names of a layer's word arrays.
pub(super) fn word_name(layer: Uuid, part: &str) -> String {
    format!("layer.{layer}.{part}")
}

/// One layer of a disk. See the module.
#[derive(Debug)]
pub(super) struct Layer {
    pub uuid: Uuid,
    /// Grows with every layer of a disk: newer layers have larger numbers.
    pub seq: u64,
    /// Size of the disk when it was frozen, in bytes.
    pub size: u64,
    /// Copy unit in bytes, a power of two.
    pub chunk: u64,
    pub store: Store,
    /// Held by whoever copies chunks for the first time.
    pub stripes: Stripes,
    copied: Bits,
    head: Words,
    released: OnceLock<Bits>,
    /// Held while `released` is made, so that two first releases make one array.
    making_released: Mutex<()>,
    reason: Mutex<Option<String>>,
}

/// The word arrays of a layer, new or found again after a crash.
pub(super) struct LayerWords {
    pub head: Words,
    pub copied: Bits,
    pub released: Option<Bits>,
}

impl LayerWords {
    /// New arrays, all clear.
    pub(super) fn create(shm: &dyn Shm, uuid: Uuid, size: u64, chunk: u64) -> Result<Self> {
        let chunks = size.div_ceil(chunk);
        Ok(LayerWords {
            head: shm.create(&word_name(uuid, "head"), HEAD_WORDS)?,
            copied: Bits::zeroed(shm.create(&word_name(uuid, "copied"), Bits::words_for(chunks))?, chunks),
            released: None,
        })
    }
}

impl Layer {
    pub(super) fn new(uuid: Uuid, seq: u64, size: u64, chunk: u64, store: Store, words: LayerWords) -> Self {
        let released = OnceLock::new();
        if let Some(bits) = words.released {
            let _ = released.set(bits);
        }
        Layer {
            uuid,
            seq,
            size,
            chunk,
            store,
            stripes: Stripes::new(),
            copied: words.copied,
            head: words.head,
            released,
            making_released: Mutex::new(()),
            reason: Mutex::new(None),
        }
    }

    /// Number of chunks, the last one possibly partial.
    pub(super) fn chunks(&self) -> u64 {
        self.copied.len()
    }

    /// Bytes that `chunks` cover, cut to the layer's size.
    pub(super) fn bytes_of(&self, chunks: &Range<u64>) -> Range<u64> {
        chunks.start * self.chunk..(chunks.end * self.chunk).min(self.size)
    }

    /// Chunks that a byte range touches, cut to the layer's size.
    pub(super) fn chunks_of(&self, offset: u64, len: u64) -> Range<u64> {
        let start = (offset / self.chunk).min(self.chunks());
        let end = (offset + len).div_ceil(self.chunk).min(self.chunks());
        start..end.max(start)
    }

    /// Whether a chunk is copied or lost.
    pub(super) fn is_set(&self, chunk: u64) -> bool {
        self.copied.get(chunk)
    }

    pub(super) fn all_set(&self, chunks: Range<u64>) -> bool {
        self.copied.all_set(chunks)
    }

    pub(super) fn next_set(&self, from: u64, end: u64) -> Option<u64> {
        self.copied.next_set(from, end)
    }

    pub(super) fn next_clear(&self, from: u64, end: u64) -> Option<u64> {
        self.copied.next_clear(from, end)
    }

    /// I2, second step: the old content of `chunks` is complete in the store. The fence keeps the guest's write, which
    /// the caller issues next, behind the state for everybody who fences between reading the image and looking here.
    pub(super) fn set_copied(&self, chunks: Range<u64>) {
        self.copied.set_range(chunks);
        full_fence();
    }

    /// The old content of `chunk` cannot be read: the view has an error there, and the guest may overwrite it. False:
    /// there is no room to note it, the state stays clear, and the caller breaks the views.
    #[must_use]
    pub(super) fn set_lost(&self, chunk: u64) -> bool {
        let slot = self.head[LOST_COUNT].fetch_add(1, Ordering::SeqCst) as usize;
        if slot >= MAX_LOST {
            return false;
        }
        self.head[LOST_FIRST + slot].store(chunk + 1, Ordering::SeqCst);
        self.set_copied(chunk..chunk + 1);
        true
    }

    /// The lost chunks, in no order.
    pub(super) fn lost(&self) -> impl Iterator<Item = u64> {
        let count = (self.head[LOST_COUNT].load(Ordering::SeqCst) as usize).min(MAX_LOST);
        let entries = (0..count).map(|slot| self.head[LOST_FIRST + slot].load(Ordering::SeqCst));
        entries.filter_map(|entry| entry.checked_sub(1))
    }

    /// The first lost chunk in a range of set chunks.
    pub(super) fn first_lost(&self, chunks: &Range<u64>) -> Option<u64> {
        self.lost().filter(|chunk| chunks.contains(chunk)).min()
    }

    /// Latches that views through this layer can no longer be trusted (I7). True where it was not broken before.
    pub(super) fn break_with(&self, reason: &str) -> bool {
        let mut kept = self.reason.lock();
        if kept.is_none() {
            *kept = Some(reason.to_owned());
        }
        let first = self.head[BROKEN].swap(1, Ordering::SeqCst) == 0;
        full_fence();
        first
    }

    pub(super) fn is_broken(&self) -> bool {
        self.head[BROKEN].load(Ordering::SeqCst) != 0
    }

    /// Why it broke, where it did.
    pub(super) fn broken_reason(&self) -> Option<String> {
        if !self.is_broken() {
            return None;
        }
        let reason = self.reason.lock().clone();
        Some(reason.unwrap_or_else(|| "its store failed before the daemon was restarted".to_owned()))
    }

    /// Whether a user still sees or reads this layer's view.
    pub(super) fn is_viewed(&self) -> bool {
        self.head[HIDDEN].load(Ordering::SeqCst) == 0
    }

    /// The view goes for good. Kept with the states: from here on old content may be missing that the view would need,
    /// whatever a directory that a recovery goes by may say.
    pub(super) fn hide(&self) {
        self.head[HIDDEN].store(1, Ordering::SeqCst);
    }

    /// Whether this layer's view needs what `chunk` held: it is seen, covers the chunk and has not released it.
    pub(super) fn view_needs(&self, chunk: u64) -> bool {
        self.is_viewed() && chunk < self.chunks() && !self.is_released(chunk)
    }

    pub(super) fn is_released(&self, chunk: u64) -> bool {
        self.released.get().is_some_and(|bits| bits.get(chunk))
    }

    /// The first chunk of a range that was released in this layer's view.
    pub(super) fn first_released(&self, chunks: Range<u64>) -> Option<u64> {
        self.released.get()?.next_set(chunks.start, chunks.end)
    }

    /// Nothing was ever released: whole runs can be answered for at once.
    pub(super) fn has_releases(&self) -> bool {
        self.released.get().is_some()
    }

    /// Marks `chunks` released in this layer's view. The caller has claimed their stripes, or punches nothing.
    pub(super) fn set_released(&self, shm: &dyn Shm, chunks: Range<u64>) -> Result<()> {
        let bits = match self.released.get() {
            Some(bits) => bits,
            None => {
                let _one = self.making_released.lock();
                if self.released.get().is_none() {
                    let words = shm.create(&word_name(self.uuid, "released"), Bits::words_for(self.chunks()))?;
                    let _ = self.released.set(Bits::zeroed(words, self.chunks()));
                }
                self.released.get().ok_or_else(|| Error::new(errno::EIO, "release", "no released ranges"))?
            }
        };
        bits.set_range(chunks);
        full_fence();
        Ok(())
    }

    /// The word arrays to keep over a clean stop, by part name.
    pub(super) fn parts(&self) -> Vec<(&'static str, Box<dyn ExactSizeIterator<Item = u64> + '_>)> {
        let head = self.head.iter().map(|word| word.load(Ordering::SeqCst));
        let mut parts: Vec<(_, Box<dyn ExactSizeIterator<Item = u64> + '_>)> =
            vec![("head", Box::new(head)), ("copied", Box::new(self.copied.words()))];
        if let Some(bits) = self.released.get() {
            parts.push(("released", Box::new(bits.words())));
        }
        parts
    }

    /// Gives the store's space and the words back once the last reader of this layer has left.
    pub(super) fn doom(&self, shm: Arc<dyn Shm>) {
        self.store.doom();
        for part in PARTS {
            // The mappings stay valid for readers that are still inside.
            if let Err(e) = shm.remove(&word_name(self.uuid, part)) {
                log::debug!("{e}");
            }
        }
    }
}
