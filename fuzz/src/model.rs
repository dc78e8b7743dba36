//! What a disk should hold after some operations: what it held before, and over it the sectors that were changed.

use super::input::Op;
use fleecefs::image::Image;
use fleecefs::image::qcow2::Qcow2Image;
use std::collections::BTreeMap;

const SECTOR_BYTES: u64 = 512;
/// Most bytes that one operation writes or reads.
const IO_MAX_BYTES: u64 = 128 << 10;
/// Most bytes that one operation zeroes.
const ZERO_MAX_BYTES: u64 = 4 << 20;
/// Largest disk that a resize makes.
const SIZE_MAX_BYTES: u64 = 4 << 30;
/// What all operations of an input may transfer at most.
pub const OPS_BYTES_MAX: u64 = super::input::OPS_MAX as u64 * ZERO_MAX_BYTES;

/// Whether all bytes are 0; compared in one piece, since each comparison of an instrumented binary is told to the fuzzer.
pub fn is_zero(bytes: &[u8]) -> bool {
    const ZEROS: [u8; 4096] = [0; 4096];
    bytes.chunks(ZEROS.len()).all(|piece| piece == &ZEROS[..piece.len()])
}

/// What comes after an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// The next one.
    Go,
    /// The image is to be closed and opened again.
    Reopen,
    /// The image is to be opened again without having been closed, as after a kill.
    Kill,
}

/// See the head of the module.
#[derive(Debug)]
pub struct Model {
    /// The disk as it was.
    before: Qcow2Image,
    /// Up to where it shows: behind the smallest size that the disk has had, all is new.
    shows: u64,
    size: u64,
    /// Changed sectors, by index.
    changed: BTreeMap<u64, [u8; SECTOR_BYTES as usize]>,
    /// Ranges that were touched.
    touched: Vec<(u64, u64)>,
    /// Whether every operation must succeed, and every byte be right: not where compressed data cannot be read.
    good: bool,
}

impl Model {
    /// A disk that holds what `before` holds.
    pub fn new(before: Qcow2Image, good: bool) -> Model {
        let size = before.size();
        Model { before, shows: size, size, changed: BTreeMap::new(), touched: Vec::new(), good }
    }

    /// Applies an operation to the image and to the model.
    pub fn apply(&mut self, image: &Qcow2Image, op: &Op) -> Next {
        if self.size == 0 && op.kind & 15 != 8 {
            return Next::Go;
        }
        self.probe(op);
        match op.kind & 15 {
            0..=3 => self.write(image, op),
            4 | 5 => self.zero(image, op, false),
            6 | 7 => self.zero(image, op, true),
            8 => self.resize(image, op),
            9 => self.demand("flush", image.flush()),
            10 => return Next::Reopen,
            11 | 12 => self.status(image, op),
            15 => return Next::Kill,
            _ => {
                let (offset, len) = op.range(self.size, IO_MAX_BYTES);
                self.read(image, offset, len);
            }
        }
        Next::Go
    }

    /// Garbage in a compressed cluster is no fault that a check finds; what comes after a change of it is uncertain.
    fn probe(&mut self, op: &Op) {
        let cluster = self.before.header().cluster_size();
        let (offset, len) = op.range(self.size.max(1), ZERO_MAX_BYTES);
        let end = (offset + len).next_multiple_of(cluster).min(self.shows);
        let mut buf = vec![0; cluster as usize];
        for at in (offset / cluster * cluster..end).step_by(cluster as usize) {
            let here = buf.get_mut(..(end - at).min(cluster) as usize).unwrap_or_default();
            self.good &= self.before.read_at(here, at).is_ok();
        }
    }

    /// Reads all that was touched.
    pub fn compare(&self, image: &Qcow2Image) {
        assert!(!self.good || image.size() == self.size, "{} bytes, not {}", image.size(), self.size);
        for (offset, len) in &self.touched {
            let len = self.size.min(image.size()).saturating_sub(*offset).min(*len).min(IO_MAX_BYTES);
            if len > 0 {
                self.read(image, *offset, len);
            }
        }
    }

    fn demand(&self, what: &str, result: fleecefs::error::Result<()>) {
        if let Err(e) = result {
            assert!(!self.good, "{what}: {e:?}");
        }
    }

    fn write(&mut self, image: &Qcow2Image, op: &Op) {
        let (offset, len) = op.range(self.size, IO_MAX_BYTES);
        let data: Vec<u8> = (offset..offset + len).map(|at| op.fill.wrapping_add((at / 97) as u8)).collect();
        self.demand("write", image.write_at(&data, offset));
        self.put(offset, &data);
    }

    fn zero(&mut self, image: &Qcow2Image, op: &Op, discard: bool) {
        let (offset, len) = op.range(self.size, ZERO_MAX_BYTES);
        self.demand("write zeros", image.write_zeroes(offset, len, discard));
        self.put(offset, &vec![0; len as usize]);
    }

    fn put(&mut self, offset: u64, data: &[u8]) {
        if !self.good {
            return;
        }
        self.touched.push((offset, data.len() as u64));
        let mut done = 0;
        while done < data.len() {
            let at = offset + done as u64;
            let from = (at % SECTOR_BYTES) as usize;
            let len = (SECTOR_BYTES as usize - from).min(data.len() - done);
            let mut sector = self.sector(at / SECTOR_BYTES);
            sector[from..from + len].copy_from_slice(&data[done..done + len]);
            self.changed.insert(at / SECTOR_BYTES, sector);
            done += len;
        }
    }

    fn sector(&self, index: u64) -> [u8; SECTOR_BYTES as usize] {
        if let Some(sector) = self.changed.get(&index) {
            return *sector;
        }
        let mut sector = [0; SECTOR_BYTES as usize];
        let there = self.shows.saturating_sub(index * SECTOR_BYTES).min(SECTOR_BYTES) as usize;
        if there > 0 {
            self.before.read_at(&mut sector[..there], index * SECTOR_BYTES).expect("it could be read before");
        }
        sector
    }

    fn resize(&mut self, image: &Qcow2Image, op: &Op) {
        let (offset, len) = op.range(SIZE_MAX_BYTES, SIZE_MAX_BYTES);
        let size = if op.fill & 1 == 0 { offset } else { self.size.saturating_add(len).min(SIZE_MAX_BYTES) };
        // A refusal (internal snapshots, a disk too large for its L1 table) changes nothing.
        if image.resize(size).is_err() {
            assert!(!self.good || image.size() == self.size, "a resize failed in the middle");
            return;
        }
        assert_eq!(image.size(), size);
        self.size = size;
        self.shows = self.shows.min(size);
        self.changed.split_off(&size.div_ceil(SECTOR_BYTES));
        if let Some(last) = self.changed.get_mut(&(size / SECTOR_BYTES)) {
            last[(size % SECTOR_BYTES) as usize..].fill(0);
        }
        self.touched.push((size.saturating_sub(8192), 16384));
    }

    fn read(&self, image: &Qcow2Image, offset: u64, len: u64) {
        let mut bytes = vec![0xCC; len as usize];
        self.demand("read", image.read_at(&mut bytes, offset));
        if self.good {
            self.same(offset, &bytes);
        }
    }

    /// Panics where `bytes` are not what the disk holds at `offset`.
    fn same(&self, offset: u64, bytes: &[u8]) {
        let mut done = 0;
        while done < bytes.len() {
            let at = offset + done as u64;
            let from = (at % SECTOR_BYTES) as usize;
            let len = (SECTOR_BYTES as usize - from).min(bytes.len() - done);
            let wanted = &self.sector(at / SECTOR_BYTES)[from..from + len];
            let found = &bytes[done..done + len];
            assert!(found == wanted, "{len} bytes at {at}, in hex: {found:02x?}, not {wanted:02x?}");
            done += len;
        }
    }

    fn status(&self, image: &Qcow2Image, op: &Op) {
        let (offset, len) = op.range(self.size, IO_MAX_BYTES);
        let mut done = 0;
        while done < len {
            let status = match image.block_status(offset + done, len - done) {
                Ok(status) => status,
                Err(e) => return assert!(!self.good, "block status: {e:?}"),
            };
            assert!((1..=len - done).contains(&status.len), "{status:?}");
            if status.zero && self.good {
                self.same(offset + done, &vec![0; status.len as usize]);
            }
            done += status.len;
        }
    }
}
