//! The file of the sidecar, with a memory of what a failed sync may have lost.
//!
//! The kernel reports a failed write-back once, to whoever syncs first, and then forgets the pages. So the sync that
//! fails may be another one than that of the bits that were lost. Therefore every area that was written since the last
//! good sync counts as *lost* after a failed one, and so does an area whose writing itself failed; nothing that speaks
//! for it succeeds until it has been written anew (as a whole) and synced, or is no longer needed.

use super::areas::Area;
use crate::error::{Error, Result, errno};
use crate::storage::SharedStorage;
use std::collections::BTreeSet;

#[derive(Debug)]
pub(super) struct Medium {
    file: SharedStorage,
    /// Offsets of areas changed since the last good sync.
    unsynced: BTreeSet<u64>,
    /// Offsets of areas whose content on disk is unknown.
    lost: BTreeSet<u64>,
}

impl Medium {
    pub(super) fn new(file: SharedStorage) -> Self {
        Medium { file, unsynced: BTreeSet::new(), lost: BTreeSet::new() }
    }

    /// Writes outside of areas.
    pub(super) fn write_at(&self, bytes: &[u8], offset: u64) -> Result<()> {
        self.file.write_at(bytes, offset)
    }

    /// Makes everything durable, or remembers what is in doubt.
    pub(super) fn sync(&mut self) -> Result<()> {
        match self.file.sync() {
            Ok(()) => {
                self.unsynced.clear();
                Ok(())
            }
            Err(e) => {
                self.lost.append(&mut self.unsynced);
                Err(e)
            }
        }
    }

    /// Replaces the whole content of `area` by what `write` does.
    pub(super) fn fill<R>(&mut self, area: &Area, write: impl FnOnce(&SharedStorage) -> Result<R>) -> Result<R> {
        self.lost.insert(area.offset);
        let result = write(&self.file)?;
        self.lost.remove(&area.offset);
        self.unsynced.insert(area.offset);
        Ok(result)
    }

    /// Gives back the space of `area`, which nobody needs any more.
    pub(super) fn punch(&self, area: &Area) {
        if let Err(e) = self.file.punch_hole(area.offset, area.len) {
            log::warn!("space of the dirty log is not given back: {e}");
        }
    }

    /// Whether the content of `area` on disk is unknown.
    #[cfg(all(test, not(feature = "shuttle")))]
    pub(super) fn is_lost(&self, area: &Area) -> bool {
        self.lost.contains(&area.offset)
    }

    /// Nobody will ask for the content of `area` any more.
    pub(super) fn forget(&mut self, area: &Area) {
        self.unsynced.remove(&area.offset);
        self.lost.remove(&area.offset);
    }

    /// Makes all areas durable; an error where the content of a `concerned` one (by its offset) is lost.
    pub(super) fn settle_areas(&mut self, concerned: impl Fn(u64) -> bool) -> Result<()> {
        if !self.unsynced.is_empty() {
            self.sync()?;
        }
        match self.lost.iter().find(|offset| concerned(**offset)) {
            None => Ok(()),
            Some(offset) => {
                let why = "a failed write or sync may have lost the bits here, and they were not written anew";
                Err(Error::new(errno::EIO, "dirty log", why).at_path(self.file.path()).at_offset(*offset))
            }
        }
    }
}
