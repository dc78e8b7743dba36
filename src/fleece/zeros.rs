//! Which chunks of a view are known to read as zeros: decided once, at the first question, and never changed.
//!
//! Allocation alone tells it, and allocation changes under a view: a chunk that was stored as zeros becomes a hole when
//! it is preserved. So the first question walks the view once and keeps the answer in `layers/LAYER/zeros`, one bit a
//! chunk, least significant bit first, bit set where the whole chunk is a hole. The file is complete before it gets its
//! name, and lives as long as the layer, also over kill -9. Memory: one window of 64 KiB.

use super::store::{StoreIo, layer_dir};
use super::view::View;
use crate::error::Result;
use crate::storage::SharedStorage;
use crate::sync::Mutex;
use std::sync::Arc;
use uuid::Uuid;

/// Bytes of bits that are read or written at a time: 512 Ki chunks.
const WINDOW_BYTES: usize = 64 << 10;

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
    io: Arc<StoreIo>,
    chunk: u64,
    size: u64,
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
        let map = Arc::new(ZeroMap { file, io: self.io.clone(), chunk: view.layer.chunk, size: view.size() });
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
        let chunk = view.layer.chunk;
        let window_chunks = WINDOW_BYTES as u64 * 8;
        let mut first = 0;
        while first < view.layer.chunks() {
            let bits = window_bits(view, first, window_chunks.min(view.layer.chunks() - first), chunk)?;
            if bits.iter().any(|&byte| byte != 0) {
                let file = file.clone();
                self.io.run("write the zero map", move |_| file.write_at(&bits, first / 8))?;
            }
            first += window_chunks;
        }
        let (from, to) = (new_name, name.to_owned());
        self.io.run("keep the zero map", move |io| io.dir.rename(&from, &to))?;
        Ok(file)
    }
}

/// The bits of `count` chunks from `first` on.
fn window_bits(view: &View, first: u64, count: u64, chunk: u64) -> Result<Vec<u8>> {
    let mut bits = vec![0_u8; count.div_ceil(8) as usize];
    let end = ((first + count) * chunk).min(view.size());
    let mut at = first * chunk;
    while at < end {
        let run = view.block_status(at, end - at)?;
        let run_end = at + run.len.max(1);
        if run.zero {
            let last = if run_end >= view.size() { run_end.div_ceil(chunk) } else { run_end / chunk };
            for index in at.div_ceil(chunk)..last {
                let bit = (index - first) as usize;
                bits[bit / 8] |= 1 << (bit % 8);
            }
        }
        at = run_end;
    }
    Ok(bits)
}

impl ZeroMap {
    /// A reader of the map, for walking on from some place.
    pub(super) fn cursor(self: &Arc<Self>) -> ZeroCursor {
        ZeroCursor { map: self.clone(), window: Vec::new(), first_byte: 0 }
    }
}

/// Reads a zero map window by window.
#[derive(Debug)]
pub struct ZeroCursor {
    map: Arc<ZeroMap>,
    window: Vec<u8>,
    first_byte: u64,
}

impl ZeroCursor {
    /// Whether the chunk at `offset` is known to read as zeros, and for how many bytes (at most `len`) that holds on.
    pub fn run(&mut self, offset: u64, len: u64) -> Result<(bool, u64)> {
        let end = (offset + len).min(self.map.size);
        if self.map.file.is_none() {
            return Ok((false, end.saturating_sub(offset)));
        }
        let chunk = self.map.chunk;
        let state = self.bit(offset / chunk)?;
        let mut index = offset / chunk + 1;
        while index * chunk < end && self.bit(index)? == state {
            index += 1;
            // Whole bytes of one state are stepped over at once.
            let same = if state { 0xff } else { 0 };
            while index.is_multiple_of(8) && index * chunk < end && self.byte(index / 8)? == same {
                index += 8;
            }
        }
        Ok((state, (index * chunk).min(end).saturating_sub(offset)))
    }

    fn bit(&mut self, index: u64) -> Result<bool> {
        Ok(self.byte(index / 8)? >> (index % 8) & 1 == 1)
    }

    fn byte(&mut self, byte: u64) -> Result<u8> {
        let inside = byte.checked_sub(self.first_byte).and_then(|at| self.window.get(at as usize).copied());
        if let Some(value) = inside {
            return Ok(value);
        }
        let Some(file) = self.map.file.clone() else { return Ok(0) };
        let first = byte - byte % WINDOW_BYTES as u64;
        self.window = self.map.io.run("read the zero map", move |_| {
            let mut window = vec![0; WINDOW_BYTES];
            file.read_at(&mut window, first)?;
            Ok(window)
        })?;
        self.first_byte = first;
        Ok(self.window.get((byte - first) as usize).copied().unwrap_or(0))
    }
}
