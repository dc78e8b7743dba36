//! The bits of one bitmap, written into new clusters.
//!
//! Nothing here is published: the clusters belong to nobody until a directory names their table, and whoever called
//! frees them where that doesn't come about.

use super::alloc::Allocator;
use super::bitmaps_format::{GRANULARITY_BITS, NAME_MAX_BYTES, bad, data_bytes};
use super::refcount::to_bytes;
use super::tables::HostOffset;
use crate::error::Result;
use crate::image::persistent::{BITS_MAX_BYTES, NewBitmap};
use crate::storage::Storage;

/// Most bytes of bits that are written at once.
const BATCH_BYTES: u64 = 1 << 20;
/// A table entry that stands for set bits.
const ONES: u64 = 1;
/// Bits, and bytes, of a word.
const WORD_BITS: u64 = 64;
const WORD_BYTES: u64 = 8;

/// Writes to clusters that nobody refers to yet.
pub(super) struct Writer<'a> {
    storage: &'a dyn Storage,
    allocator: &'a mut Allocator,
    cluster_bits: u32,
    /// Everything that was allocated.
    taken: Vec<u64>,
}

/// A table that was written.
#[derive(Debug, Clone, Copy)]
pub(super) struct Table {
    pub offset: HostOffset,
    pub entries: u32,
}

impl NewBitmap<'_> {
    /// Checks the bitmap against the format's limits, for a disk of `disk_bytes`.
    pub(super) fn check(&self, disk_bytes: u64) -> Result<()> {
        let name_bytes = self.name.len();
        let why = if !(1..=NAME_MAX_BYTES).contains(&name_bytes) || self.name.contains('\0') {
            Some(format!("a name has 1 to {NAME_MAX_BYTES} bytes without NUL, this one {name_bytes}"))
        } else if !GRANULARITY_BITS.contains(&self.granularity_bits) {
            Some(format!("its granularity, 2 to the power of {}, is not from 512 B to 2 GiB", self.granularity_bits))
        } else if disk_bytes == 0 {
            Some("the disk has no bytes".to_owned())
        } else if data_bytes(disk_bytes, self.granularity_bits) > BITS_MAX_BYTES {
            Some("its bits take more than 512 MiB: choose a coarser granularity".to_owned())
        } else if self.words.len() as u64 != self.bits(disk_bytes).div_ceil(WORD_BITS) {
            Some(format!("{} words for {} bits", self.words.len(), self.bits(disk_bytes)))
        } else if self.words.last().is_some_and(|last| last & !tail_mask(self.bits(disk_bytes)) != 0) {
            Some("bits behind the end of the disk are set".to_owned())
        } else {
            None
        };
        // A name may be long; the start of it is enough to find the bitmap.
        let start: String = self.name.chars().take(100).collect();
        why.map_or(Ok(()), |why| Err(bad(format!("'{}'", start.escape_debug()), why)))
    }

    fn bits(&self, disk_bytes: u64) -> u64 {
        disk_bytes.div_ceil(1 << self.granularity_bits)
    }
}

/// The valid bits of the last word.
fn tail_mask(bits: u64) -> u64 {
    u64::MAX >> ((WORD_BITS - bits % WORD_BITS) % WORD_BITS)
}

impl<'a> Writer<'a> {
    pub(super) fn new(storage: &'a dyn Storage, allocator: &'a mut Allocator, cluster_bits: u32) -> Self {
        Writer { storage, allocator, cluster_bits, taken: Vec::new() }
    }

    /// Writes the bits and their table. The bitmap was checked.
    pub(super) fn bitmap(&mut self, bitmap: &NewBitmap<'_>) -> Result<Table> {
        let piece_words = ((1u64 << self.cluster_bits) / WORD_BYTES) as usize;
        let mut table = Vec::new();
        let mut stored = Vec::new();
        for (piece, index) in bitmap.words.chunks(piece_words).zip(0..) {
            // Not where the disk ends in the last word: QEMU would also set the bits behind the end.
            let full = piece.iter().all(|word| *word == u64::MAX);
            table.push(if full { ONES } else { 0 });
            if !full && piece.iter().any(|word| *word != 0) {
                stored.push((index, piece));
            }
        }
        let batch = (BATCH_BYTES >> self.cluster_bits).max(1);
        let mut rest = &stored[..];
        while !rest.is_empty() {
            let run = self.allocator.allocate(batch.min(rest.len() as u64))?;
            self.taken.extend(run.clone());
            let (now, later) = rest.split_at(((run.end - run.start) as usize).min(rest.len()));
            rest = later;
            let mut buf = Vec::with_capacity(now.len() << self.cluster_bits);
            for ((index, piece), cluster) in now.iter().zip(run.clone()) {
                buf.extend(piece.iter().flat_map(|word| word.to_le_bytes()));
                buf.resize(buf.len().next_multiple_of(1 << self.cluster_bits), 0);
                if let Some(entry) = table.get_mut::<usize>(*index) {
                    *entry = cluster << self.cluster_bits;
                }
            }
            self.storage.write_at(&buf, run.start << self.cluster_bits)?;
        }
        let entries = table.len() as u32;
        Ok(Table { offset: self.row(to_bytes(&table))?, entries })
    }

    /// Writes bytes into clusters in a row, zeros behind them.
    pub(super) fn row(&mut self, mut bytes: Vec<u8>) -> Result<HostOffset> {
        bytes.resize(bytes.len().next_multiple_of(1 << self.cluster_bits), 0);
        // A single cluster may be one that was freed.
        let row = match (bytes.len() >> self.cluster_bits) as u64 {
            1 => self.allocator.allocate(1)?,
            many => self.allocator.allocate_row(many)?,
        };
        self.taken.extend(row.clone());
        let offset = row.start << self.cluster_bits;
        self.storage.write_at(&bytes, offset)?;
        Ok(HostOffset(offset))
    }

    /// Makes what was written durable, with its refcounts.
    pub(super) fn finish(&mut self) -> Result<()> {
        self.storage.sync()?;
        self.allocator.write_refcounts()
    }

    /// Gives back everything: it is not published, and won't be.
    pub(super) fn abandon(self) {
        for cluster in self.taken {
            if let Err(e) = self.allocator.free(cluster) {
                log::warn!("{e}");
            }
        }
    }
}
