//! Which parts of a view are known to read as zeros: decided once, at the first question, and never changed.
//!
//! Allocation alone tells it, and allocation changes under a view: a chunk that was stored as zeros becomes a hole when
//! it is preserved. So the first question walks the view once and keeps the answer in `layers/LAYER/zeros`: the offsets
//! in bytes, 64 bits each, little-endian, ascending, at which whole chunks of holes begin and end, in turn. The file is
//! complete before it gets its name, and lives as long as the layer, also over kill -9. Memory: one window of 64 KiB for
//! each walk, and the one that was read last, where the next walk begins: who reads a map's text in pieces walks on.

use super::store::{StoreIo, layer_dir};
use super::view::View;
use crate::error::Result;
use crate::storage::SharedStorage;
use crate::sync::Mutex;
use crate::units::{round_down, round_up};
use std::ops::Range;
use std::sync::Arc;
use uuid::Uuid;

/// Bytes of one offset in the file.
const ENTRY_BYTES: u64 = 8;
/// Bytes that are read or written at a time.
const WINDOW_BYTES: u64 = 64 << 10;

/// The place of a view's zero map.
#[derive(Debug)]
pub(super) struct Zeros {
    io: Arc<StoreIo>,
    layer: Uuid,
    made: Mutex<Option<Arc<ZeroMap>>>,
}

/// A view's zero map, complete.
#[derive(Debug)]
pub(super) struct ZeroMap {
    /// None: nothing is known to be zero (the view broke before anybody asked).
    file: Option<SharedStorage>,
    /// Count of offsets in the file.
    entries: u64,
    io: Arc<StoreIo>,
    size: u64,
    latest: Mutex<Window>,
}

/// A piece of the file. Clones share it.
#[derive(Debug, Clone)]
struct Window {
    bytes: Arc<[u8]>,
    /// Byte of the file at which it starts.
    start: u64,
}

impl Zeros {
    pub(super) fn new(io: Arc<StoreIo>, layer: Uuid) -> Self {
        Zeros { io, layer, made: Mutex::new(None) }
    }

    /// The map, made now if nobody asked before.
    pub(super) fn get(&self, view: &View) -> Result<Arc<ZeroMap>> {
        let mut made = self.made.lock();
        if let Some(map) = &*made {
            return Ok(map.clone());
        }
        let name = format!("{}/zeros", layer_dir(self.layer));
        let known = self.io.run("look for the zero map", {
            let name = name.clone();
            move |io| if io.dir.exists(&name)? { io.dir.open(&name).map(Some) } else { Ok(None) }
        })?;
        let file = match known {
            Some(file) => Some(file),
            None if view.broken().is_some() => None,
            None => Some(self.make(view, &name)?),
        };
        let entries = match &file {
            Some(file) => {
                let file = file.clone();
                self.io.run("look at the zero map", move |_| file.len())? / ENTRY_BYTES
            }
            None => 0,
        };
        let latest = Mutex::new(Window { bytes: Arc::new([]), start: 0 });
        let map = Arc::new(ZeroMap { file, entries, io: self.io.clone(), size: view.size(), latest });
        *made = Some(map.clone());
        Ok(map)
    }

    fn make(&self, view: &View, name: &str) -> Result<SharedStorage> {
        let new_name = format!("{name}.new");
        let file = self.io.run("make the zero map", {
            let new_name = new_name.clone();
            move |io| {
                io.dir.remove(&new_name)?;
                io.dir.create(&new_name)
            }
        })?;
        let mut out = Writer { io: &self.io, file: &file, buffer: Vec::new(), written: 0 };
        let mut pending: Option<(u64, u64)> = None;
        let mut at = 0;
        while at < view.size() {
            let run = view.block_status(at, view.size() - at)?;
            let end = at + run.len.max(1);
            // Only whole chunks; the last one of the disk may be short.
            let whole_end = if end >= view.size() { view.size() } else { round_down(end, view.layer.chunk) };
            let whole = (round_up(at, view.layer.chunk), whole_end);
            at = end;
            if !run.zero || whole.0 >= whole.1 {
                continue;
            }
            match &mut pending {
                Some(last) if last.1 == whole.0 => last.1 = whole.1,
                _ => {
                    out.run(pending.replace(whole))?;
                }
            }
        }
        out.run(pending)?;
        out.flush()?;
        let (from, to) = (new_name, name.to_owned());
        self.io.run("keep the zero map", move |io| io.dir.rename(&from, &to))?;
        Ok(file)
    }
}

/// Appends offsets to a new zero map.
struct Writer<'a> {
    io: &'a Arc<StoreIo>,
    file: &'a SharedStorage,
    buffer: Vec<u8>,
    written: u64,
}

impl Writer<'_> {
    fn run(&mut self, run: Option<(u64, u64)>) -> Result<()> {
        let Some((start, end)) = run else { return Ok(()) };
        self.buffer.extend_from_slice(&start.to_le_bytes());
        self.buffer.extend_from_slice(&end.to_le_bytes());
        if self.buffer.len() as u64 >= WINDOW_BYTES { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<()> {
        let bytes = std::mem::take(&mut self.buffer);
        if bytes.is_empty() {
            return Ok(());
        }
        let (file, at) = (self.file.clone(), self.written);
        self.written += bytes.len() as u64;
        self.io.run("write the zero map", move |_| file.write_at(&bytes, at))
    }
}

impl ZeroMap {
    /// A reader of the map, for walking on from some place.
    pub(super) fn cursor(self: &Arc<Self>) -> ZeroCursor {
        ZeroCursor { map: self.clone(), window: self.latest.lock().clone(), passed: 0, span: 0..0 }
    }
}

/// Reads a zero map window by window.
#[derive(Debug)]
pub struct ZeroCursor {
    map: Arc<ZeroMap>,
    window: Window,
    /// Count of offsets at or before the place that was asked for last.
    passed: u64,
    /// The run at that place; empty where nobody asked yet.
    span: Range<u64>,
}

impl ZeroCursor {
    /// Whether the byte at `offset` is known to read as zero, and for how many bytes (at most `len`) that holds on.
    pub fn run(&mut self, offset: u64, len: u64) -> Result<(bool, u64)> {
        if !self.span.contains(&offset) {
            let end = self.span.end;
            let next = if (1..=offset).contains(&end) { self.entry(self.passed + 1)? } else { 0 };
            if offset < next {
                self.passed += 1;
                self.span = end..next;
            } else {
                self.passed = self.search(offset)?;
                let start = if self.passed > 0 { self.entry(self.passed - 1)? } else { 0 };
                self.span = start..self.entry(self.passed)?;
            }
        }
        let end = offset.saturating_add(len).min(self.map.size).min(self.span.end);
        Ok((self.passed % 2 == 1, end.saturating_sub(offset)))
    }

    /// Count of offsets at or before `offset`.
    fn search(&mut self, offset: u64) -> Result<u64> {
        let (mut low, mut high) = (0, self.map.entries);
        let (first, count) = (self.window.start / ENTRY_BYTES, self.window.bytes.len() as u64 / ENTRY_BYTES);
        if count > 0 && self.entry(first)? <= offset && self.entry(first + count - 1)? > offset {
            (low, high) = (first, first + count);
        }
        while low < high {
            let middle = low + (high - low) / 2;
            if self.entry(middle)? <= offset { low = middle + 1 } else { high = middle }
        }
        Ok(low)
    }

    /// One offset; past the last one, the end of all disks.
    fn entry(&mut self, index: u64) -> Result<u64> {
        if index >= self.map.entries {
            return Ok(u64::MAX);
        }
        let at = index * ENTRY_BYTES;
        if self.window.at(at).is_none() {
            self.window = self.map.read(at - at % WINDOW_BYTES)?;
        }
        Ok(self.window.at(at).unwrap_or(u64::MAX))
    }
}

impl ZeroMap {
    fn read(&self, start: u64) -> Result<Window> {
        let Some(file) = self.file.clone() else { return Ok(self.latest.lock().clone()) };
        let len = WINDOW_BYTES.min((self.entries * ENTRY_BYTES).saturating_sub(start)) as usize;
        let bytes = self.io.run("read the zero map", move |_| {
            let mut bytes = vec![0; len];
            file.read_at(&mut bytes, start)?;
            Ok(bytes)
        })?;
        let window = Window { bytes: bytes.into(), start };
        *self.latest.lock() = window.clone();
        Ok(window)
    }
}

impl Window {
    /// The offset that stands at that byte of the file.
    fn at(&self, at: u64) -> Option<u64> {
        let from = usize::try_from(at.checked_sub(self.start)?).ok()?;
        let bytes = self.bytes.get(from..from.checked_add(ENTRY_BYTES as usize)?)?;
        bytes.try_into().ok().map(u64::from_le_bytes)
    }
}
