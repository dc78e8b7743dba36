//! The extents of a map that the mount serves as JSON, read piece by piece: a map of millions is never held.

use super::{Extent, ExtentSource, Extents};
use crate::error::{Error, Result, errno};
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};

/// Longest text of one extent in bytes.
const MAX_EXTENT_BYTES: u64 = 1024;
const BUFFER_BYTES: usize = 1 << 20;

/// A map file of a frozen view. It never changes while the view exists, so every walk gives the same.
#[derive(Debug, Clone)]
pub struct MapSource {
    path: PathBuf,
    disk_size: u64,
    /// Everything counts as changed; `zero` is as the file has it.
    everything: bool,
}

impl MapSource {
    /// The map at `path` of a disk of `disk_size` bytes; with `everything`, as the full map that it implies.
    pub fn new(path: &Path, disk_size: u64, everything: bool) -> MapSource {
        MapSource { path: path.to_owned(), disk_size, everything }
    }

    /// Whether the file says what this says: then it is this map as JSON.
    pub fn is_the_file(&self) -> bool {
        !self.everything
    }

    /// Writes the file as it is; EIO where it was cut off.
    pub fn copy_to(&self, out: &mut dyn Write) -> Result<()> {
        let failed = |e| Error::io("read", e).at_path(&self.path);
        let mut file = File::open(&self.path).map_err(failed)?;
        let mut buffer = vec![0; BUFFER_BYTES];
        let mut last = 0;
        loop {
            let count = file.read(&mut buffer).map_err(failed)?;
            let Some(text) = buffer.get(..count).filter(|text| !text.is_empty()) else { break };
            out.write_all(text).map_err(|e| Error::io("write map", e))?;
            last = text.trim_ascii_end().last().copied().unwrap_or(last);
        }
        if last != b']' {
            return Err(self.cut_off());
        }
        out.flush().map_err(|e| Error::io("write map", e))
    }

    fn cut_off(&self) -> Error {
        Error::new(errno::EIO, "map", "ends too early").at_path(&self.path)
    }
}

impl ExtentSource for MapSource {
    fn disk_size(&self) -> u64 {
        self.disk_size
    }

    fn extents_from(&self, offset: u64) -> Result<Extents<'_>> {
        let file = File::open(&self.path).map_err(|e| Error::io("open", e).at_path(&self.path))?;
        let reader = BufReader::with_capacity(BUFFER_BYTES, file);
        let extents = Reader { source: self, reader, text: Vec::new(), ended: false };
        Ok(Box::new(
            extents.skip_while(move |extent| extent.as_ref().is_ok_and(|e| e.start.saturating_add(e.length) <= offset)),
        ))
    }
}

struct Reader<'a, R> {
    source: &'a MapSource,
    reader: BufReader<R>,
    text: Vec<u8>,
    ended: bool,
}

impl<R: Read> Reader<'_, R> {
    /// The next object of the array: objects are flat, so one ends at the first `}`.
    fn read(&mut self) -> Result<Option<Extent>> {
        let bad = |why: String| Error::new(errno::EIO, "map", why).at_path(&self.source.path);
        let text = &mut self.text;
        text.clear();
        self.reader
            .by_ref()
            .take(MAX_EXTENT_BYTES)
            .read_until(b'}', text)
            .map_err(|e| Error::io("read", e).at_path(&self.source.path))?;
        let Some(start) = text.iter().position(|&b| b == b'{') else {
            // Without another object there is the closing bracket, or the file was cut off.
            return if text.trim_ascii_end().ends_with(b"]") { Ok(None) } else { Err(self.source.cut_off()) };
        };
        let object = text.get(start..).unwrap_or_default();
        let mut extent: Extent = serde_json::from_slice(object).map_err(|e| bad(e.to_string()))?;
        extent.dirty |= self.source.everything;
        Ok(Some(extent))
    }
}

impl<R: Read> Iterator for Reader<'_, R> {
    type Item = Result<Extent>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ended {
            return None;
        }
        let item = self.read().transpose();
        self.ended = !matches!(item, Some(Ok(_)));
        item
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backup::{MapFile, MapFormat, MapMeta, MapPoint, Totals};
    use std::sync::Arc;
    use uuid::Uuid;

    fn source(text: &str, everything: bool) -> (tempfile::TempDir, MapSource) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.map");
        std::fs::write(&path, text).unwrap();
        (dir, MapSource::new(&path, 300, everything))
    }

    const MAP: &str = "[{\"start\": 0, \"length\": 100, \"dirty\": true, \"zero\": false},\n \
                        {\"start\": 100, \"length\": 100, \"dirty\": false, \"zero\": false},\n \
                        {\"start\": 200, \"length\": 100, \"dirty\": true, \"zero\": true}]\n";

    #[test]
    fn extents_are_read_from_any_start() {
        let (_dir, source) = source(MAP, false);
        let starts = |offset| source.extents_from(offset).unwrap().map(|e| e.unwrap().start).collect::<Vec<_>>();
        assert_eq!(starts(0), [0, 100, 200]);
        assert_eq!(starts(200), [200]);
        let totals = Totals::of(&source).unwrap();
        assert_eq!((totals.dirty, totals.zero, totals.extents), (200, 100, 3));
    }

    #[test]
    fn a_copy_is_what_the_extents_say_as_json() {
        let (_dir, source) = source(MAP, false);
        let mut copy = Vec::new();
        source.copy_to(&mut copy).unwrap();
        assert!(source.is_the_file() && copy == MAP.as_bytes());
        let point = MapPoint { name: "a".into(), uuid: Uuid::nil() };
        let meta = MapMeta {
            disk: "a".into(),
            disk_uuid: Uuid::nil(),
            image: "/a".into(),
            snapshot: "s".into(),
            base: None,
            full_reason: None,
            target: point,
        };
        let mut made = Vec::new();
        MapFile::write_once(Arc::new(source), MapFormat::Json, &meta, &mut made).unwrap();
        assert_eq!(String::from_utf8(made).unwrap(), MAP);
    }

    #[test]
    fn everything_is_dirty_and_zero_stays() {
        let (_dir, source) = source(MAP, true);
        let totals = Totals::of(&source).unwrap();
        assert_eq!((totals.dirty, totals.zero, totals.extents), (300, 100, 2));
    }

    #[test]
    fn a_map_that_was_cut_off_is_an_error() {
        for cut in [0, 1, 30, MAP.find('}').unwrap() + 1, MAP.len() - 2] {
            let (_dir, source) = source(&MAP[..cut], false);
            let last = source.extents_from(0).unwrap().last();
            assert!(last.is_some_and(|e| e.is_err()), "cut at {cut}");
            assert_eq!(source.copy_to(&mut Vec::new()).unwrap_err().errno(), errno::EIO, "cut at {cut}");
        }
        let (_dir, empty) = source("[]", false);
        assert!(empty.extents_from(0).unwrap().next().is_none());
    }
}
