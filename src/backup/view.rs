//! The core's maps as a source of extents.

use super::{Extent, ExtentSource, Extents, MapMeta, MapPoint};
use crate::error::Result;
use crate::fleece::{Point, ViewMap, ZeroCursor};
use std::ops::Range;

impl ExtentSource for ViewMap {
    fn disk_size(&self) -> u64 {
        self.view().size()
    }

    fn extents_from(&self, offset: u64) -> Result<Extents<'_>> {
        Ok(Box::new(Walk { map: self, zeros: self.zero_cursor(), at: offset, dirty: 0..0, zero: (false, 0) }))
    }
}

/// Walks dirty runs and zero runs side by side. Both are as long as possible, so neighbours are of different states.
struct Walk<'a> {
    map: &'a ViewMap,
    zeros: ZeroCursor,
    at: u64,
    /// The first dirty run that ends behind `at`, where it was looked for.
    dirty: Range<u64>,
    /// Whether what is at `at` is zero, and where that ends; behind `at` where it was asked.
    zero: (bool, u64),
}

impl Walk<'_> {
    fn step(&mut self) -> Result<Option<Extent>> {
        let (start, size) = (self.at, self.map.disk_size());
        if start >= size {
            return Ok(None);
        }
        if self.dirty.end <= start {
            self.dirty = self.map.next_dirty(start);
        }
        if self.zero.1 <= start {
            let (zero, length) = self.zeros.run(start, size - start)?;
            self.zero = (zero, start + length.max(1));
        }
        let dirty = self.dirty.start <= start;
        self.at = self.zero.1.min(if dirty { self.dirty.end } else { self.dirty.start });
        Ok(Some(Extent { start, length: self.at - start, dirty, zero: self.zero.0 }))
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
    /// What the heads of the map of one of its volumes say; of a volume over several disks, `map` is that of the disk that
    /// it is listed under.
    pub fn of_volume(map: &ViewMap, volume: &str) -> MapMeta {
        let meta = MapMeta::of(map);
        MapMeta { disk: format!("{}/{volume}", meta.disk), ..meta }
    }
}
