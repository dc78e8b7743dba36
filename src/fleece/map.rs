//! The dirty map of a view since one earlier point.
//!
//! Immutable: the union of the sealed bitmaps is made once, from one version of the chain of checkpoints, and `zero`
//! comes from the view's zero map, which is decided once. A map says too much rather than too little: what cannot be
//! known counts as changed, with the reason. What the view leaves out is in each of its maps, as zeros: dirty is what
//! changed or is left out (Z3 of `skip`).

use super::view::{Point, View};
use super::zeros::{ZeroCursor, ZeroMap};
use crate::bitmap::DirtyBitmap;
use crate::error::Result;
use std::ops::Range;
use std::sync::Arc;
use uuid::Uuid;

/// What changed from one point to a view. See the module.
#[derive(Debug)]
pub struct Changes {
    size: u64,
    /// None: everything is dirty.
    bitmap: Option<DirtyBitmap>,
    everything: Option<String>,
}

/// The dirty map of a view since one point: what changed, and what of it reads as zeros. See the module.
#[derive(Debug)]
pub struct ViewMap {
    view: Arc<View>,
    base: Option<Point>,
    changes: Changes,
    zeros: Arc<ZeroMap>,
}

impl Changes {
    pub(super) fn new(view: &View, base: Option<Uuid>) -> Result<Changes> {
        let size = view.size();
        let Some(base) = base else {
            let everything =
                Some(view.full_reason().unwrap_or_else(|| "no earlier checkpoint was asked for".to_owned()));
            return Ok(Changes { size, bitmap: None, everything });
        };
        let tracking = &view.disk.tracking;
        let union = tracking.union(base, view.checkpoint().uuid, view.size())?;
        for range in view.skipped.ranges() {
            union.bitmap.mark_unfenced(range.start, range.end - range.start);
        }
        Ok(Changes { size, bitmap: Some(union.bitmap), everything: union.everything })
    }

    /// Whether the byte at `offset` may have changed, and for how many bytes (at most `len`) that holds on.
    pub fn dirty_run(&self, offset: u64, len: u64) -> (bool, u64) {
        let end = (offset + len).min(self.size);
        let Some(bitmap) = &self.bitmap else { return (true, end.saturating_sub(offset)) };
        match bitmap.next_dirty_run(offset, end) {
            Some(run) if run.start <= offset => (true, run.end.min(end) - offset),
            Some(run) => (false, run.start - offset),
            None => (false, end.saturating_sub(offset)),
        }
    }
}

impl ViewMap {
    pub(super) fn new(view: Arc<View>, base: Option<Uuid>) -> Result<ViewMap> {
        let zeros = view.zeros()?;
        let changes = Changes::new(&view, base)?;
        let base = base.and_then(|uuid| view.since().into_iter().find(|point| point.uuid == uuid));
        Ok(ViewMap { base, changes, view, zeros })
    }

    /// The view that the map is of.
    pub fn view(&self) -> &Arc<View> {
        &self.view
    }

    /// The point since which changes are listed; None: everything is.
    pub fn base(&self) -> Option<Point> {
        self.base.clone()
    }

    /// Why everything counts as dirty, where it does for want of a base or of knowledge.
    pub fn everything(&self) -> Option<&str> {
        self.changes.everything.as_deref()
    }

    /// Whether the byte at `offset` may have changed, and for how many bytes (at most `len`) that holds on.
    pub fn dirty_run(&self, offset: u64, len: u64) -> (bool, u64) {
        self.changes.dirty_run(offset, len)
    }

    /// The first run of bytes at or behind `offset` that may have changed, as long as possible; an empty one at the end of
    /// the disk where there is none.
    pub fn next_dirty(&self, offset: u64) -> Range<u64> {
        let size = self.view.size();
        let found = match &self.changes.bitmap {
            Some(bitmap) => bitmap.next_dirty_run(offset, size),
            None => Some(offset.min(size)..size),
        };
        found.unwrap_or(size..size)
    }

    /// Bytes that may have changed.
    pub fn dirty_bytes(&self) -> u64 {
        match &self.changes.bitmap {
            Some(bitmap) => bitmap.count_bytes().min(self.view.size()),
            None => self.view.size(),
        }
    }

    /// A reader of what is known to be zero.
    pub fn zero_cursor(&self) -> ZeroCursor {
        self.zeros.cursor()
    }
}
