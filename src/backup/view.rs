//! The core's maps as a source of extents.

use super::{Extent, ExtentSource, Extents, MapMeta, MapPoint};
use crate::error::Result;
use crate::fleece::{Point, ViewMap, ZeroCursor};

impl ExtentSource for ViewMap {
    fn disk_size(&self) -> u64 {
        self.view().size()
    }

    fn extents_from(&self, offset: u64) -> Result<Extents<'_>> {
        Ok(Box::new(Walk { map: self, zeros: self.zero_cursor(), at: offset, next: None }))
    }
}

/// Walks dirty runs and zero runs side by side and merges neighbours of equal state.
struct Walk<'a> {
    map: &'a ViewMap,
    zeros: ZeroCursor,
    at: u64,
    /// The first run behind `at` that was looked at already: it differs from the one before it.
    next: Option<Extent>,
}

impl Walk<'_> {
    /// The run at `at` on which neither state changes.
    fn run(&mut self, at: u64) -> Result<Option<Extent>> {
        let left = self.map.disk_size().saturating_sub(at);
        if left == 0 {
            return Ok(None);
        }
        let (dirty, dirty_len) = self.map.dirty_run(at, left);
        let (zero, length) = self.zeros.run(at, dirty_len)?;
        Ok(Some(Extent { start: at, length: length.max(1), dirty, zero }))
    }

    fn step(&mut self) -> Result<Option<Extent>> {
        let first = match self.next.take() {
            Some(run) => Some(run),
            None => self.run(self.at)?,
        };
        let Some(mut merged) = first else { return Ok(None) };
        while let Some(run) = self.run(merged.start + merged.length)? {
            if (run.dirty, run.zero) != (merged.dirty, merged.zero) {
                self.next = Some(run);
                break;
            }
            merged.length += run.length;
        }
        self.at = merged.start + merged.length;
        Ok(Some(merged))
    }
}

impl Iterator for Walk<'_> {
    type Item = Result<Extent>;

    fn next(&mut self) -> Option<Self::Item> {
        self.step().transpose()
    }
}

impl From<Point> for MapPoint {
    fn from(point: Point) -> Self {
        MapPoint { name: point.name, uuid: point.uuid }
    }
}

impl MapMeta {
    /// What the heads of a view's map say.
    pub fn of(map: &ViewMap) -> MapMeta {
        let view = map.view();
        MapMeta {
            disk: view.disk_name().to_owned(),
            disk_uuid: view.disk_uuid(),
            image: view.image_path().to_owned(),
            snapshot: view.checkpoint().name,
            base: map.base().map(MapPoint::from),
            full_reason: map.everything().map(str::to_owned),
            target: view.checkpoint().into(),
        }
    }
}
