//! The oracle of the stress loops: every cell of the disk has one owner, which numbers what it does to it.
//!
//! An owner publishes the number before it asks the image (`begun`) and after the answer (`done`). Odd numbers write a
//! stamp of cell and number, even ones zeros; 0 is what the image held at first. Whoever reads a cell finds the bytes of
//! a number from `done` as it was before the read to `begun` as it was after it, each byte for itself where that is more
//! than one; never another cell's, never an older one's.

use fleecefs::image::Image;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes of a cell; less than a sector, so that disjoint writes meet in one.
pub const CELL: usize = 64;

/// See the head of the file.
pub struct Cells {
    begun: Vec<AtomicU64>,
    done: Vec<AtomicU64>,
    /// The number before `begun`.
    before: Vec<AtomicU64>,
    initial: Vec<u8>,
}

/// Numbers of some cells at one moment.
pub struct Seen {
    first: usize,
    done: Vec<u64>,
}

fn load(all: &[AtomicU64], range: Range<usize>) -> Vec<u64> {
    all[range].iter().map(|number| number.load(Ordering::SeqCst)).collect()
}

/// What an odd number writes.
fn stamp(cell: usize, number: u64) -> [u8; CELL] {
    let mut bytes = [0; CELL];
    let cell = cell as u64 + 1;
    let mixed = cell.wrapping_mul(0x9E37_79B9_0000_0001) ^ number.wrapping_mul(0x85EB_CA6B) | 0x0101_0101_0101_0101;
    bytes.as_chunks_mut().0.fill(mixed.to_be_bytes());
    bytes[..8].copy_from_slice(&cell.to_be_bytes());
    bytes[8..16].copy_from_slice(&number.to_be_bytes());
    bytes
}

impl Cells {
    /// Cells of a disk that holds `initial`, and zeros behind it, up to `most` bytes.
    pub fn new(initial: &[u8], most: u64) -> Cells {
        let mut initial = initial.to_vec();
        initial.resize(most as usize, 0);
        let zeros = || (0..most as usize / CELL).map(|_| AtomicU64::new(0)).collect();
        Cells { begun: zeros(), done: zeros(), before: zeros(), initial }
    }

    pub fn count(&self) -> usize {
        self.begun.len()
    }

    fn expected(&self, cell: usize, number: u64) -> [u8; CELL] {
        match number {
            0 => self.initial[cell * CELL..][..CELL].try_into().unwrap(),
            even if even % 2 == 0 => [0; CELL],
            odd => stamp(cell, odd),
        }
    }

    /// The owner is about to do `number` to its cells.
    pub fn begin(&self, range: Range<usize>, number: u64) {
        for cell in range {
            self.before[cell].store(self.done[cell].load(Ordering::SeqCst), Ordering::SeqCst);
            self.begun[cell].store(number, Ordering::SeqCst);
        }
    }

    /// It is done.
    pub fn end(&self, range: Range<usize>, number: u64) {
        range.for_each(|cell| self.done[cell].store(number, Ordering::SeqCst));
    }

    /// The bytes that `number` writes.
    pub fn bytes(&self, range: Range<usize>, number: u64) -> Vec<u8> {
        range.flat_map(|cell| self.expected(cell, number)).collect()
    }

    /// Before a read of a range.
    pub fn look(&self, range: Range<usize>) -> Seen {
        Seen { first: range.start, done: load(&self.done, range) }
    }

    /// After it: `bytes` is what was read.
    #[track_caller]
    pub fn check(&self, seen: &Seen, bytes: &[u8], what: &str) {
        for (index, found) in bytes.chunks(CELL).enumerate() {
            let (cell, done) = (seen.first + index, seen.done[index]);
            let begun = self.begun[cell].load(Ordering::SeqCst);
            let before = self.before[cell].load(Ordering::SeqCst);
            if found == self.expected(cell, done) || found == self.expected(cell, begun) {
                continue;
            }
            let mut candidates = vec![self.expected(cell, done), self.expected(cell, begun)];
            if begun != done && before != done {
                // More than one in between.
                let written = u64::from_be_bytes(found[8..16].try_into().unwrap());
                if (done..begun).contains(&written) && written % 2 == 1 {
                    candidates.push(self.expected(cell, written));
                }
                candidates.push([0; CELL]);
            }
            let mixed = begun != done && (0..CELL).all(|at| candidates.iter().any(|one| one[at] == found[at]));
            assert!(
                mixed || candidates.iter().any(|one| one == found),
                "{what}: cell {cell} (offset {}), numbers {done} to {begun} (before: {before}): {:?}, not one of {:?}",
                cell * CELL,
                &found[..24],
                candidates.iter().map(|one| &one[..24]).collect::<Vec<_>>()
            );
        }
    }

    /// Reads a range beside everything else and checks it.
    #[track_caller]
    pub fn read(&self, image: &dyn Image, range: Range<usize>, buf: &mut Vec<u8>, what: &str) {
        buf.clear();
        buf.resize(range.len() * CELL, 0xEE);
        let seen = self.look(range.clone());
        image.read_at(buf, (range.start * CELL) as u64).unwrap_or_else(|e| panic!("{what}: {e}"));
        self.check(&seen, buf, what);
    }

    /// All cells up to the end of the disk, with everybody else gone.
    #[track_caller]
    pub fn read_all(&self, image: &dyn Image, what: &str) {
        let mut buf = Vec::new();
        let count = image.size() as usize / CELL;
        (0..count).step_by(1500).for_each(|at| self.read(image, at..count.min(at + 1500), &mut buf, what));
    }
}
