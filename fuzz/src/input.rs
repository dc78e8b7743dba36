//! The input of the target `image`: a sparse file in few bytes, and what is done to the image in it.
//!
//! | bytes | what |
//! | --- | --- |
//! | 8 | length of the file, taken modulo 1 GiB |
//! | 2 | number of operations |
//! | 8 each | the operations ([`Op`]) |
//! | rest | runs: offset (4 bytes), length (2 bytes), content; the last one may end short |
//!
//! All numbers are big-endian. Every string of bytes is an input, so that no mutation is wasted.

use fleecefs::storage::{MemFile, Storage};

/// Longest file.
pub const FILE_MAX_BYTES: u64 = 1 << 30;
/// Most operations.
pub const OPS_MAX: usize = 48;

/// A decoded input.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Input {
    /// Length of the file.
    pub file_bytes: u64,
    /// What is done to the image.
    pub ops: Vec<Op>,
    /// Content of the file: offset and bytes; later ones lie over earlier ones.
    pub runs: Vec<(u32, Vec<u8>)>,
}

/// An operation: what, how much, with what, where; [`Op::range`] gives the words their meaning.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Op {
    /// What is done, in the low four bits; how the place is counted, in the high ones.
    pub kind: u8,
    /// Length as a power of two in the low five bits, less a little in the high ones.
    pub len: u8,
    /// The byte that is written.
    pub fill: u8,
    /// Moves the place by some bytes.
    pub shift: u8,
    /// The place.
    pub place: u32,
}

impl Op {
    fn decode(bytes: &[u8; 8]) -> Op {
        let [kind, len, fill, shift, place @ ..] = *bytes;
        Op { kind, len, fill, shift, place: u32::from_be_bytes(place) }
    }

    fn encode(&self) -> [u8; 8] {
        let [a, b, c, d] = self.place.to_be_bytes();
        [self.kind, self.len, self.fill, self.shift, a, b, c, d]
    }

    /// Offset and length in a disk of `size` bytes (not 0), at least one byte and at most `max_bytes`.
    pub fn range(&self, size: u64, max_bytes: u64) -> (u64, u64) {
        let place = u64::from(self.place);
        let at = match self.kind >> 4 {
            0..=5 => place,
            6..=9 => place << 9,
            10..=11 => place << 16,
            12..=13 => place << 24,
            _ => (size - 1).saturating_sub(place % (1 << 20)),
        };
        let offset = at.saturating_add(u64::from(self.shift) * 509) % size;
        let len = (1u64 << (self.len & 31)).saturating_sub(u64::from(self.len >> 5) * 77).max(1);
        (offset, len.min(max_bytes).min(size - offset))
    }
}

fn take<const N: usize>(bytes: &mut &[u8]) -> Option<[u8; N]> {
    let (first, rest) = bytes.split_first_chunk()?;
    *bytes = rest;
    Some(*first)
}

impl Input {
    /// Decodes any bytes.
    pub fn decode(mut bytes: &[u8]) -> Input {
        let rest = &mut bytes;
        let file_bytes = take(rest).map_or(0, u64::from_be_bytes) % (FILE_MAX_BYTES + 1);
        let mut input = Input { file_bytes, ..Input::default() };
        for _ in 0..take(rest).map_or(0, u16::from_be_bytes) {
            match take(rest) {
                Some(op) if input.ops.len() < OPS_MAX => input.ops.push(Op::decode(&op)),
                Some(_) => (),
                None => break,
            }
        }
        while let (Some(offset), Some(count)) = (take(rest), take(rest)) {
            let (data, behind) = rest.split_at(usize::from(u16::from_be_bytes(count)).min(rest.len()));
            input.runs.push((u32::from_be_bytes(offset), data.to_vec()));
            *rest = behind;
        }
        input
    }

    /// The bytes that decode to this.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = self.file_bytes.to_be_bytes().to_vec();
        bytes.extend((self.ops.len() as u16).to_be_bytes());
        bytes.extend(self.ops.iter().flat_map(Op::encode));
        for (offset, data) in &self.runs {
            for (index, piece) in data.chunks(usize::from(u16::MAX)).enumerate() {
                bytes.extend((*offset + (index * usize::from(u16::MAX)) as u32).to_be_bytes());
                bytes.extend((piece.len() as u16).to_be_bytes());
                bytes.extend(piece);
            }
        }
        bytes
    }

    /// A new file with this content.
    pub fn file(&self) -> MemFile {
        let file = MemFile::new("image", self.file_bytes);
        for (offset, data) in &self.runs {
            let offset = u64::from(*offset);
            let there = self.file_bytes.saturating_sub(offset).min(data.len() as u64) as usize;
            file.write_at(&data[..there], offset).expect("memory takes it");
        }
        file
    }
}
