//! A map as a file: its size is known, any piece of it can be read, its text is held nowhere.
//!
//! One pass over the source counts the bytes and notes *resume points*: where in the text an entry begins, and with
//! which extent. A read walks the source from the nearest point before it. Points lie [`POINT_SPACING_BYTES`] apart;
//! when there are more than [`MAX_POINTS`], every other one goes and the spacing doubles, so that what a map holds
//! does not grow with it.

use super::format::{Length, Line, Sink, bmap_checksum_place};
use super::runs::{Run, runs};
use super::{ExtentSource, MapFormat, MapMeta, Totals};
use crate::error::{Error, Result, errno};
use sha2::{Digest, Sha256};
use std::io::Write;
use std::ops::ControlFlow;
use std::sync::Arc;

/// Text between two resume points, at first.
const POINT_SPACING_BYTES: u64 = 32 << 10;
/// Most resume points of one map (16 bytes each).
const MAX_POINTS: usize = 8192;
/// Text that is collected before it is written out.
const WRITE_BYTES: usize = 256 << 10;

/// An entry where a walk can be taken up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Point {
    /// Where its text begins, counted from the end of the head.
    text: u64,
    /// The extent to begin with.
    source: u64,
}

const START: Point = Point { text: 0, source: 0 };

/// The map of one frozen view in one format.
pub struct MapFile {
    source: Arc<dyn ExtentSource + Send + Sync>,
    format: MapFormat,
    head: String,
    body_len: u64,
    tail: String,
    points: Points,
    totals: Totals,
}

impl std::fmt::Debug for MapFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MapFile").field("format", &self.format).field("len", &self.len()).finish_non_exhaustive()
    }
}

impl MapFile {
    /// Walks the source once (twice where the format's head holds sums).
    pub fn new(source: Arc<dyn ExtentSource + Send + Sync>, format: MapFormat, meta: &MapMeta) -> Result<MapFile> {
        MapFile::with_points(source, format, meta, Points::new(POINT_SPACING_BYTES, MAX_POINTS))
    }

    pub(super) fn with_points(
        source: Arc<dyn ExtentSource + Send + Sync>,
        format: MapFormat,
        meta: &MapMeta,
        mut points: Points,
    ) -> Result<MapFile> {
        let size = source.disk_size();
        let mut totals = Totals { size, ..Totals::default() };
        if format.head_has_sums() {
            for run in runs(&*source, format, 0)? {
                totals.add(&run?);
            }
        }
        let mut head = format.head(meta, size, &totals);
        let mut hash = format.head_has_sums().then(Sha256::new);
        if let Some(hash) = &mut hash {
            hash.update(&head);
        }
        let mut totals = Totals { size, ..Totals::default() };
        let mut body_len = 0;
        let mut note = |run: &Run, len: usize| {
            points.note(Point { text: body_len, source: run.source });
            totals.add(run);
            body_len += len as u64;
            Ok(ControlFlow::Continue(()))
        };
        match &mut hash {
            Some(hash) => entries(&*source, format, START, |run, line: &Line| {
                hash.update(line.text());
                note(run, line.text().len())
            })?,
            None => entries(&*source, format, START, |run, length: &Length| note(run, length.0))?,
        }
        let tail = format.tail(&totals);
        if let (Some(mut hash), Some(place)) = (hash, bmap_checksum_place(&head)) {
            hash.update(&tail);
            head.replace_range(place, &format!("{:x}", hash.finalize()));
        }
        Ok(MapFile { source, format, head, body_len, tail, points, totals })
    }

    /// Length of the text in bytes.
    pub fn len(&self) -> u64 {
        self.head.len() as u64 + self.body_len + self.tail.len() as u64
    }

    /// True where there is no text.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Sums over the runs as this format lists them: widened and merged to what it can say.
    pub fn totals(&self) -> Totals {
        self.totals
    }

    /// Fills `buf` with the text from `offset`; the count is short at the end only.
    pub fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<usize> {
        let want = self.len().saturating_sub(offset).min(buf.len() as u64) as usize;
        let Some(buf) = buf.get_mut(..want) else { return Ok(0) };
        let mut window = Window { buf, offset, filled: 0 };
        let body = self.head.len() as u64;
        window.put(self.head.as_bytes(), 0);
        if !window.is_full() && window.next() < body + self.body_len {
            let point = self.points.before(window.next() - body);
            let mut at = body + point.text;
            entries(&*self.source, self.format, point, |_, line: &Line| {
                window.put(line.text(), at);
                at += line.text().len() as u64;
                Ok(if window.is_full() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
            })?;
        }
        window.put(self.tail.as_bytes(), body + self.body_len);
        if !window.is_full() {
            return Err(Error::new(errno::EIO, "map", "came out shorter than before").at_offset(window.next()));
        }
        Ok(want)
    }

    /// Writes the whole text in one pass.
    pub fn write_to(&self, out: &mut dyn Write) -> Result<()> {
        write_text(&*self.source, self.format, &self.head, |_| self.tail.clone(), out)
    }

    /// Writes the map of `source` for who wants its text once: as [`MapFile::new`] and [`MapFile::write_to`], in one pass
    /// over the source where the format's head holds no sums.
    pub fn write_once(
        source: Arc<dyn ExtentSource + Send + Sync>,
        format: MapFormat,
        meta: &MapMeta,
        out: &mut dyn Write,
    ) -> Result<()> {
        if format.head_has_sums() {
            return MapFile::new(source, format, meta)?.write_to(out);
        }
        let head = format.head(meta, source.disk_size(), &Totals::default());
        write_text(&*source, format, &head, |totals| format.tail(totals), out)
    }

    /// Bytes that this map keeps, for the test of their bound.
    #[cfg(test)]
    pub(super) fn held_bytes(&self) -> usize {
        self.head.capacity() + self.tail.capacity() + self.points.list.capacity() * size_of::<Point>()
    }
}

fn write_text(
    source: &dyn ExtentSource,
    format: MapFormat,
    head: &str,
    tail: impl FnOnce(&Totals) -> String,
    out: &mut dyn Write,
) -> Result<()> {
    let mut buffer = head.as_bytes().to_vec();
    let mut totals = Totals { size: source.disk_size(), ..Totals::default() };
    entries(source, format, START, |run, line: &Line| {
        totals.add(run);
        buffer.extend_from_slice(line.text());
        if buffer.len() >= WRITE_BYTES {
            write_out(out, &mut buffer)?;
        }
        Ok(ControlFlow::Continue(()))
    })?;
    buffer.extend_from_slice(tail(&totals).as_bytes());
    write_out(out, &mut buffer)?;
    out.flush().map_err(|e| Error::io("write map", e))
}

fn write_out(out: &mut dyn Write, buffer: &mut Vec<u8>) -> Result<()> {
    out.write_all(buffer).map_err(|e| Error::io("write map", e))?;
    buffer.clear();
    Ok(())
}

/// Makes the entries from `point` on and hands each to `take` with its run, until that has enough.
fn entries<S: Sink>(
    source: &dyn ExtentSource,
    format: MapFormat,
    point: Point,
    mut take: impl FnMut(&Run, &S) -> Result<ControlFlow<()>>,
) -> Result<()> {
    let size = source.disk_size();
    let mut first = point == START;
    let mut line = S::default();
    for run in runs(source, format, point.source)? {
        let run = run?;
        format.entry(&run, size, first, &mut line);
        first = false;
        if take(&run, &line)?.is_break() {
            break;
        }
    }
    Ok(())
}

/// Resume points in ascending order; [`START`] is understood.
pub(super) struct Points {
    list: Vec<Point>,
    spacing: u64,
    max: usize,
}

impl Points {
    /// `spacing` bytes of text apart, at most `max` (2 or more).
    pub fn new(spacing: u64, max: usize) -> Points {
        Points { list: Vec::new(), spacing, max }
    }

    fn note(&mut self, point: Point) {
        if point.text - self.list.last().unwrap_or(&START).text < self.spacing {
            return;
        }
        if self.list.len() >= self.max {
            let mut index = 0;
            self.list.retain(|_| {
                index += 1;
                index % 2 == 1
            });
            self.spacing *= 2;
        }
        self.list.push(point);
    }

    /// The last point at or before `text`.
    fn before(&self, text: u64) -> Point {
        let count = self.list.partition_point(|p| p.text <= text);
        count.checked_sub(1).and_then(|index| self.list.get(index)).copied().unwrap_or(START)
    }
}

/// The piece of the text that a reader asked for, filled front to back.
struct Window<'a> {
    buf: &'a mut [u8],
    offset: u64,
    filled: usize,
}

impl Window<'_> {
    /// Offset of the first byte that is missing.
    fn next(&self) -> u64 {
        self.offset + self.filled as u64
    }

    fn is_full(&self) -> bool {
        self.filled == self.buf.len()
    }

    /// Takes from `text`, which stands at `at`, what is wanted next.
    fn put(&mut self, text: &[u8], at: u64) {
        let Some(skip) = self.next().checked_sub(at) else { return };
        let rest = usize::try_from(skip).ok().and_then(|skip| text.get(skip..)).unwrap_or(&[]);
        let free = self.buf.get_mut(self.filled..).unwrap_or(&mut []);
        let count = rest.len().min(free.len());
        if let (Some(to), Some(from)) = (free.get_mut(..count), rest.get(..count)) {
            to.copy_from_slice(from);
        }
        self.filled += count;
    }
}
