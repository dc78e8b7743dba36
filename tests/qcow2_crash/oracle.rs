//! What a disk may hold at each instant of a session, sector by sector.
//!
//! A version of a sector begins at the instant when its operation was asked for and is acknowledged at the instant when
//! that was answered. After a crash at an instant a sector holds a version that had begun before it. Gone for good is a
//! version with a later one that was acknowledged before a completed flush began (a power loss), or at all (a kill).
//! The size of the disk has versions like a sector.
//!
//! A sector is one version as a whole, since disks write whole sectors. Only where an operation covered a part of it,
//! which no disk's driver does, each byte counts for itself.

use crate::images::SECTOR;
use std::ops::Range;
use std::sync::Arc;

/// What is left after a crash.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loss {
    /// All that was written.
    Kill,
    /// Any part of what was not synced.
    Power,
}

#[derive(Debug, Clone)]
struct Version<T> {
    begun: usize,
    /// `usize::MAX` while it is not answered.
    done: usize,
    value: T,
}

#[derive(Debug, Clone)]
struct History<T>(Vec<Version<T>>);

impl<T> History<T> {
    fn new(value: T) -> Self {
        History(vec![Version { begun: 0, done: 0, value }])
    }

    fn begin(&mut self, now: usize, value: T) {
        self.0.push(Version { begun: now, done: usize::MAX, value });
    }

    fn end(&mut self, now: usize) {
        self.0.iter_mut().filter(|version| version.done == usize::MAX).for_each(|version| version.done = now);
    }

    fn latest(&self) -> &T {
        &self.0[self.0.len() - 1].value
    }

    /// What may be there after a crash at `instant`, where all that was done at `settled` is there for good.
    fn allowed(&self, instant: usize, settled: usize) -> impl Iterator<Item = &T> {
        let first = self.0.iter().rposition(|version| version.done <= settled).unwrap_or(0);
        let begun = move |version: &&Version<T>| version.begun < instant || version.done <= settled;
        self.0[first..].iter().filter(begun).map(|version| &version.value)
    }
}

/// A version of a sector.
#[derive(Debug, Clone)]
struct Content {
    /// `None` is zeros.
    bytes: Option<Arc<[u8; SECTOR]>>,
    /// Only a part of it was written.
    in_part: bool,
}

impl Content {
    fn new(bytes: &[u8], in_part: bool) -> Content {
        let mut sector = [0; SECTOR];
        sector[..bytes.len()].copy_from_slice(bytes);
        Content { bytes: sector.iter().any(|byte| *byte != 0).then(|| Arc::new(sector)), in_part }
    }

    fn bytes(&self) -> &[u8; SECTOR] {
        self.bytes.as_deref().unwrap_or(&[0; SECTOR])
    }
}

/// See the head of the file.
#[derive(Debug, Clone)]
pub struct Oracle {
    sectors: Vec<History<Content>>,
    size: History<u64>,
    /// Instants when completed flushes began and ended.
    flushes: Vec<(usize, usize)>,
}

fn sectors_of(range: &Range<u64>) -> Range<usize> {
    (range.start / SECTOR as u64) as usize..range.end.div_ceil(SECTOR as u64) as usize
}

impl Oracle {
    /// A disk that holds `bytes`, durably, and may grow up to `most`.
    pub fn new(bytes: &[u8], most: u64) -> Oracle {
        let mut sectors: Vec<_> = bytes.chunks(SECTOR).map(|piece| History::new(Content::new(piece, false))).collect();
        let most = most.div_ceil(SECTOR as u64) as usize;
        sectors.resize(sectors.len().max(most), History::new(Content::new(&[], false)));
        Oracle { sectors, size: History::new(bytes.len() as u64), flushes: Vec::new() }
    }

    /// Size of the disk as the last operation made it.
    pub fn size(&self) -> u64 {
        *self.size.latest()
    }

    /// Largest size that it may get.
    pub fn most(&self) -> u64 {
        (self.sectors.len() * SECTOR) as u64
    }

    /// What a range holds, all operations done.
    pub fn bytes(&self, range: Range<u64>) -> Vec<u8> {
        let sectors = sectors_of(&range);
        let first = (sectors.start * SECTOR) as u64;
        let mut bytes = Vec::with_capacity(sectors.len() * SECTOR);
        for history in &self.sectors[sectors] {
            bytes.extend(history.latest().bytes());
        }
        bytes[(range.start - first) as usize..(range.end - first) as usize].to_vec()
    }

    /// A range is about to become `bytes`.
    pub fn begin_write(&mut self, now: usize, offset: u64, bytes: &[u8]) {
        let range = offset..offset + bytes.len() as u64;
        let sectors = sectors_of(&range);
        let first = (sectors.start * SECTOR) as u64;
        let mut new = self.bytes(first..(sectors.end * SECTOR) as u64);
        new[(offset - first) as usize..][..bytes.len()].copy_from_slice(bytes);
        for (index, piece) in sectors.zip(new.chunks(SECTOR)) {
            let start = (index * SECTOR) as u64;
            let in_part = start < range.start || start + SECTOR as u64 > range.end;
            self.sectors[index].begin(now, Content::new(piece, in_part));
        }
    }

    /// What was asked for in a range is answered.
    pub fn end_write(&mut self, now: usize, range: Range<u64>) {
        self.sectors[sectors_of(&range)].iter_mut().for_each(|history| history.end(now));
    }

    /// The size is about to change; what is cut off becomes zeros.
    pub fn begin_resize(&mut self, now: usize, size: u64) {
        let old = self.size();
        if size < old {
            self.begin_write(now, size, &vec![0; (old - size) as usize]);
        }
        self.size.begin(now, size);
    }

    /// The size has changed.
    pub fn end_resize(&mut self, now: usize) {
        self.size.end(now);
        self.end_write(now, 0..self.most());
    }

    /// A flush that began at `begun` is answered.
    pub fn flushed(&mut self, begun: usize, now: usize) {
        self.flushes.push((begun, now));
    }

    /// What was done at this instant is there for good after a crash at `instant`.
    pub fn settled(&self, instant: usize, loss: Loss) -> usize {
        match loss {
            Loss::Kill => instant,
            Loss::Power => {
                let ended = self.flushes.iter().filter(|(_, end)| *end <= instant);
                ended.map(|(begun, _)| *begun).max().unwrap_or(0)
            }
        }
    }

    /// Whether a disk may hold `bytes` after a crash at `instant`; else what is wrong.
    pub fn judge(&self, bytes: &[u8], instant: usize, loss: Loss) -> Result<(), String> {
        let settled = self.settled(instant, loss);
        let sizes: Vec<u64> = self.size.allowed(instant, settled).copied().collect();
        if !sizes.contains(&(bytes.len() as u64)) {
            return Err(format!("the disk has {} bytes, not {sizes:?}", bytes.len()));
        }
        for (sector, (piece, history)) in bytes.chunks(SECTOR).zip(&self.sectors).enumerate() {
            let allowed = || history.allowed(instant, settled);
            let whole = || allowed().any(|value| value.bytes()[..piece.len()] == *piece);
            let in_part = || {
                let byte_is_there = |at: usize| allowed().any(|value| value.bytes()[at] == piece[at]);
                allowed().any(|value| value.in_part) && (0..piece.len()).all(byte_is_there)
            };
            if !whole() && !in_part() {
                return Err(self.complaint(sector, piece, instant, settled));
            }
        }
        Ok(())
    }

    fn complaint(&self, sector: usize, found: &[u8], instant: usize, settled: usize) -> String {
        let head = |bytes: &[u8]| bytes[..24.min(bytes.len())].to_vec();
        let allowed: Vec<_> = self.sectors[sector].allowed(instant, settled).collect();
        let show = |value: &Content| head(value.bytes());
        format!(
            "sector {sector} (offset {}) holds {:?}..., not one of {:?}; all versions: {:?}",
            sector * SECTOR,
            head(found),
            allowed.into_iter().map(show).collect::<Vec<_>>(),
            self.sectors[sector].0.iter().map(|v| (v.begun, v.done, show(&v.value))).collect::<Vec<_>>(),
        )
    }
}

#[test]
fn versions_may_be_there_from_when_they_begin_until_a_flush_settles_a_later_one() {
    let sector = |byte| [byte; SECTOR];
    let mut oracle = Oracle::new(&sector(1), 2048);
    oracle.begin_write(2, 0, &sector(2));
    oracle.end_write(4, 0..512);
    oracle.begin_write(6, 0, &sector(3));
    oracle.end_write(8, 0..512);
    oracle.flushed(5, 10);
    let may =
        |instant, loss| (0..4).filter(|byte| oracle.judge(&sector(*byte), instant, loss).is_ok()).collect::<Vec<u8>>();
    use Loss::{Kill, Power};
    assert_eq!(may(2, Power), [1]);
    assert_eq!(may(3, Power), [1, 2]);
    assert_eq!(may(3, Kill), [1, 2]);
    assert_eq!(may(4, Kill), [2]);
    assert_eq!(may(6, Power), [1, 2]);
    assert_eq!(may(9, Power), [1, 2, 3]);
    assert_eq!(may(9, Kill), [3]);
    assert_eq!(may(10, Power), [2, 3]);
}
