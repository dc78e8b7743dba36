//! Refcounts: how they are stored, and how references are counted.
//!
//! A refcount table names refcount blocks; a block is one cluster of refcounts of 1 to 64 bits, and an absent block
//! stands for zeros. [`Width`] is the only place that knows how one refcount lies in its block. [`Stored`] reads what
//! an image says of itself and believes nothing: an entry that is not aligned, not in the file or has reserved bits
//! set is a [`BadBlock`], not an offset.
//!
//! [`Counts`] counts what really refers to a cluster. It keeps 16 bits per cluster in pages that exist where something
//! was counted, and the few larger counts beside them. Its memory is bounded by [`MAX_COUNT_PAGES`]: 1 GiB, 32 TiB of
//! fully used image at 64 KiB clusters. Beyond that counting is an error, not a machine without memory.

use crate::error::{Error, Result, errno};
use crate::storage::Storage;
use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap};

/// Bits of a refcount table entry that hold the offset of the block; the rest is reserved.
pub const TABLE_OFFSET_MASK: u64 = !0x1ff;
/// Largest refcount table in bytes (QEMU's limit).
pub const MAX_TABLE_BYTES: u64 = 8 << 20;
/// Bytes of an entry of the refcount table.
pub const TABLE_ENTRY_BYTES: u64 = 8;

/// Clusters that one page of [`Counts`] counts.
const PAGE_CLUSTERS: u64 = 4096;
/// Most pages of [`Counts`], of 8 KiB each.
const MAX_COUNT_PAGES: usize = 131_072;

/// How wide one refcount is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Width {
    order: u32,
}

impl Width {
    /// Refcounts of `2^order` bits; `None` for more than 64.
    pub fn new(order: u32) -> Option<Width> {
        (order <= 6).then_some(Width { order })
    }

    /// Bits of one refcount.
    pub fn bits(self) -> u32 {
        1 << self.order
    }

    /// The largest refcount.
    pub fn max(self) -> u64 {
        u64::MAX >> (64 - self.bits())
    }

    /// Refcounts in a block of one cluster.
    pub fn per_block(self, cluster_bits: u32) -> u64 {
        (1 << (cluster_bits + 3)) >> self.order
    }

    /// The refcount at `index` of a block, 0 past its end.
    pub fn get(self, block: &[u8], index: u64) -> u64 {
        let bit = index << self.order;
        let at = (bit / 8) as usize;
        if self.order < 3 {
            let byte = block.get(at).copied().unwrap_or(0);
            return (u64::from(byte) >> (bit % 8)) & self.max();
        }
        let len = 1usize << (self.order - 3);
        let bytes = block.get(at..at + len).unwrap_or_default();
        bytes.iter().fold(0, |value, byte| value << 8 | u64::from(*byte))
    }

    /// Stores a refcount, which is at most [`Width::max`], at `index` of a block; nothing past its end.
    pub fn set(self, block: &mut [u8], index: u64, value: u64) {
        let bit = index << self.order;
        let at = (bit / 8) as usize;
        if self.order < 3 {
            if let Some(byte) = block.get_mut(at) {
                let shift = bit % 8;
                let mask = (self.max() << shift) as u8;
                *byte = (*byte & !mask) | ((value << shift) as u8 & mask);
            }
            return;
        }
        let len = 1usize << (self.order - 3);
        if let Some(bytes) = block.get_mut(at..at + len) {
            let wide = value.to_be_bytes();
            bytes.copy_from_slice(wide.get(8 - len..).unwrap_or_default());
        }
    }
}

/// Where an image's refcounts lie, as its header says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Logarithm of the cluster size.
    pub cluster_bits: u32,
    /// Width of a refcount.
    pub width: Width,
    /// Host offset of the refcount table.
    pub table_offset: u64,
    /// Clusters that the table takes.
    pub table_clusters: u64,
}

impl Place {
    /// Bytes of a cluster.
    pub fn cluster_bytes(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Clusters that one refcount block describes.
    pub fn per_block(&self) -> u64 {
        self.width.per_block(self.cluster_bits)
    }

    /// Entries of the table.
    pub fn table_entries(&self) -> u64 {
        (self.table_clusters << self.cluster_bits) / TABLE_ENTRY_BYTES
    }

    /// Why no table can lie there, where none can.
    pub fn fault(&self, file_bytes: u64) -> Option<&'static str> {
        let bytes = self.table_clusters.checked_mul(self.cluster_bytes());
        let end = bytes.and_then(|bytes| self.table_offset.checked_add(bytes));
        if self.table_clusters == 0 || self.table_offset == 0 {
            Some("the image has no refcount table")
        } else if bytes.is_none_or(|bytes| bytes > MAX_TABLE_BYTES) {
            Some("the refcount table is larger than 8 MiB")
        } else if !self.table_offset.is_multiple_of(self.cluster_bytes()) {
            Some("the refcount table is not aligned to a cluster")
        } else if end.is_none_or(|end| end > file_bytes.saturating_add(self.cluster_bytes() - 1)) {
            Some("the refcount table lies outside the file")
        } else {
            None
        }
    }
}

/// What is wrong with an entry of the refcount table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BadBlock {
    /// Reserved bits are set.
    Reserved,
    /// The offset is no multiple of the cluster size.
    Unaligned,
    /// The block is not in the file.
    Outside,
}

impl std::fmt::Display for BadBlock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            BadBlock::Reserved => "has reserved bits set",
            BadBlock::Unaligned => "is not aligned to a cluster",
            BadBlock::Outside => "points outside the file",
        })
    }
}

/// The refcounts that an image stores, read one block at a time.
#[derive(Debug)]
pub struct Stored<'a> {
    storage: &'a dyn Storage,
    place: Place,
    file_bytes: u64,
    table: Vec<u64>,
    /// Index and content of the block that was read last.
    block: Option<(u64, Vec<u8>)>,
}

impl<'a> Stored<'a> {
    /// Reads the refcount table. EINVAL where none can lie where the header says.
    pub fn open(storage: &'a dyn Storage, place: Place) -> Result<Stored<'a>> {
        let file_bytes = storage.len()?;
        if let Some(why) = place.fault(file_bytes) {
            return Err(Error::new(errno::EINVAL, "refcount table", why)
                .at_path(storage.path())
                .at_offset(place.table_offset));
        }
        let table = read_table(storage, place.table_offset, place.table_entries())?;
        Ok(Stored { storage, place, file_bytes, table, block: None })
    }

    /// Entries of the refcount table, as stored.
    pub fn table(&self) -> &[u64] {
        &self.table
    }

    /// Where it all lies.
    pub fn place(&self) -> Place {
        self.place
    }

    /// Host offset of block `index`, 0 where it is absent.
    pub fn block_offset(&self, index: u64) -> std::result::Result<u64, BadBlock> {
        let entry = usize::try_from(index).ok().and_then(|index| self.table.get(index)).copied().unwrap_or(0);
        let offset = entry & TABLE_OFFSET_MASK;
        if entry != offset {
            Err(BadBlock::Reserved)
        } else if !offset.is_multiple_of(self.place.cluster_bytes()) {
            Err(BadBlock::Unaligned)
        } else if offset != 0 && offset >= self.file_bytes {
            Err(BadBlock::Outside)
        } else {
            Ok(offset)
        }
    }

    /// The refcount of a cluster; 0 where its block is absent or bad.
    pub fn get(&mut self, cluster: u64) -> Result<u64> {
        let per_block = self.place.per_block();
        let index = cluster / per_block;
        if self.block.as_ref().is_none_or(|(loaded, _)| *loaded != index) {
            let offset = self.block_offset(index).unwrap_or(0);
            if offset == 0 {
                return Ok(0);
            }
            let (_, mut bytes) = self.block.take().unwrap_or_default();
            bytes.resize(self.place.cluster_bytes() as usize, 0);
            self.storage.read_at(&mut bytes, offset)?;
            self.block = Some((index, bytes));
        }
        let bytes = self.block.as_ref().map_or(&[][..], |(_, bytes)| bytes);
        Ok(self.place.width.get(bytes, cluster % per_block))
    }

    /// One past the last cluster whose block exists.
    pub fn described_clusters(&self) -> u64 {
        let last = self.table.iter().rposition(|entry| *entry != 0).map_or(0, |index| index as u64 + 1);
        last.saturating_mul(self.place.per_block())
    }
}

/// Reads `entries` big-endian words at `offset`.
pub fn read_table(storage: &dyn Storage, offset: u64, entries: u64) -> Result<Vec<u64>> {
    let mut bytes = vec![0; (entries * TABLE_ENTRY_BYTES) as usize];
    storage.read_at(&mut bytes, offset)?;
    Ok(words(&bytes))
}

/// The big-endian words of `bytes`.
pub fn words(bytes: &[u8]) -> Vec<u64> {
    let word = |chunk: &[u8]| chunk.iter().fold(0, |value, byte| value << 8 | u64::from(*byte));
    bytes.chunks_exact(TABLE_ENTRY_BYTES as usize).map(word).collect()
}

/// `words` as they are stored.
pub fn to_bytes(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_be_bytes()).collect()
}

/// References counted per cluster.
#[derive(Debug)]
pub struct Counts {
    pages: HashMap<u64, Box<[u16; PAGE_CLUSTERS as usize]>>,
    /// What a count has beyond `u16::MAX`.
    excess: BTreeMap<u64, u64>,
    /// One past the last cluster counted.
    end: u64,
    max_pages: usize,
}

impl Default for Counts {
    fn default() -> Self {
        Counts::limited(MAX_COUNT_PAGES)
    }
}

impl Counts {
    fn limited(max_pages: usize) -> Counts {
        Counts { pages: HashMap::new(), excess: BTreeMap::new(), end: 0, max_pages }
    }

    /// Counts `references` more references to each of `count` clusters from `first`. EFBIG where that takes more than
    /// the memory that counting may take.
    pub fn add(&mut self, first: u64, count: u64, references: u64) -> Result<()> {
        if count == 0 || references == 0 {
            return Ok(());
        }
        let end = first.saturating_add(count);
        self.end = self.end.max(end);
        let mut cluster = first;
        while cluster < end {
            let page_end = (cluster / PAGE_CLUSTERS + 1).saturating_mul(PAGE_CLUSTERS).min(end);
            let excess = &mut self.excess;
            let is_full = self.pages.len() >= self.max_pages;
            let page = match self.pages.entry(cluster / PAGE_CLUSTERS) {
                Entry::Occupied(page) => page.into_mut(),
                Entry::Vacant(_) if is_full => return Err(too_large()),
                Entry::Vacant(vacant) => vacant.insert(Box::new([0; PAGE_CLUSTERS as usize])),
            };
            let from = (cluster % PAGE_CLUSTERS) as usize;
            for (slot, cluster) in page.iter_mut().skip(from).zip(cluster..page_end) {
                let sum = u64::from(*slot).saturating_add(references);
                *slot = sum.min(u64::from(u16::MAX)) as u16;
                if sum > u64::from(u16::MAX) {
                    let more = excess.entry(cluster).or_default();
                    *more = more.saturating_add(sum - u64::from(u16::MAX));
                }
            }
            cluster = page_end;
        }
        Ok(())
    }

    /// References to a cluster.
    pub fn get(&self, cluster: u64) -> u64 {
        let page = self.pages.get(&(cluster / PAGE_CLUSTERS));
        let low = page.and_then(|page| page.get((cluster % PAGE_CLUSTERS) as usize)).copied().unwrap_or(0);
        let more = if low == u16::MAX { self.excess.get(&cluster).copied().unwrap_or(0) } else { 0 };
        u64::from(low).saturating_add(more)
    }

    /// One past the last cluster that is referred to; 0 where none is.
    pub fn end(&self) -> u64 {
        self.end
    }

    /// The first clusters of the pages in which something was counted, in order, each with the page's length.
    pub fn pages(&self) -> Vec<(u64, u64)> {
        let mut pages: Vec<u64> = self.pages.keys().copied().collect();
        pages.sort_unstable();
        pages.into_iter().map(|page| (page * PAGE_CLUSTERS, PAGE_CLUSTERS)).collect()
    }
}

fn too_large() -> Error {
    Error::new(errno::EFBIG, "reference counts", "the clusters in use take more than 1 GiB of memory to count")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::MemFile;
    use proptest::prelude::*;

    #[test]
    fn refcounts_lie_where_the_specification_puts_them() {
        let cases: [(u32, u64, u64, &[u8]); 7] = [
            (0, 9, 1, &[0, 0b10, 0, 0]),
            (1, 5, 3, &[0, 0b1100, 0, 0]),
            (2, 1, 0xa, &[0xa0, 0, 0, 0]),
            (3, 2, 0xfe, &[0, 0, 0xfe, 0]),
            (4, 1, 0x1234, &[0, 0, 0x12, 0x34]),
            (5, 0, 0x1234_5678, &[0x12, 0x34, 0x56, 0x78]),
            (6, 0, 0x0102_0304_0506_0708, &[1, 2, 3, 4, 5, 6, 7, 8]),
        ];
        for (order, index, value, bytes) in cases {
            let width = Width::new(order).unwrap();
            let mut block = vec![0; bytes.len()];
            width.set(&mut block, index, value);
            assert_eq!(block, bytes, "order {order}");
            assert_eq!(width.get(&block, index), value);
            assert_eq!(width.get(&block, 1000), 0);
        }
        assert_eq!(Width::new(7), None);
        assert_eq!(Width::new(4).unwrap().per_block(16), 32768);
        assert_eq!(Width::new(0).unwrap().max(), 1);
        assert_eq!(Width::new(6).unwrap().max(), u64::MAX);
    }

    proptest! {
        #[test]
        fn each_refcount_is_its_own(order in 0u32..7, values in prop::collection::vec(any::<u64>(), 64)) {
            let width = Width::new(order).unwrap();
            let mut block = vec![0xff; 64 << order >> 3];
            for (index, value) in values.iter().enumerate() {
                width.set(&mut block, index as u64, value & width.max());
            }
            for (index, value) in values.iter().enumerate() {
                prop_assert_eq!(width.get(&block, index as u64), value & width.max());
            }
        }

        #[test]
        fn counts_are_those_of_a_plain_map(
            adds in prop::collection::vec((0u64..20_000, 1u64..5000, prop::sample::select(vec![1, 3, 65_534, 1 << 40])), 1..20),
        ) {
            let mut counts = Counts::default();
            let mut model = BTreeMap::<u64, u64>::new();
            for (first, count, references) in adds {
                counts.add(first, count, references).unwrap();
                (first..first + count).for_each(|cluster| *model.entry(cluster).or_default() += references);
            }
            for cluster in 0..26_000 {
                prop_assert_eq!(counts.get(cluster), model.get(&cluster).copied().unwrap_or(0));
            }
            prop_assert_eq!(counts.end(), model.keys().last().unwrap() + 1);
        }
    }

    #[test]
    fn counting_ends_before_memory_does() {
        let mut counts = Counts::limited(100);
        let mut refused = 0;
        for page in 0..=100 {
            refused += u64::from(counts.add(page * PAGE_CLUSTERS * 7, 1, 1).is_err());
        }
        assert_eq!(refused, 1);
        assert_eq!(counts.get(7 * PAGE_CLUSTERS), 1, "a page that exists still counts");
        counts.add(7 * PAGE_CLUSTERS, 1, 1).unwrap();
    }

    #[test]
    fn a_table_that_cannot_be_there_is_refused() {
        let file = MemFile::new("a", 1 << 20);
        let good = Place { cluster_bits: 16, width: Width::new(4).unwrap(), table_offset: 65536, table_clusters: 1 };
        Stored::open(&file, good).unwrap();
        for bad in [
            Place { table_offset: 0, ..good },
            Place { table_clusters: 0, ..good },
            Place { table_offset: 65536 + 512, ..good },
            Place { table_offset: 1 << 20, ..good },
            Place { table_offset: !0xffff, ..good },
            Place { table_clusters: 129, ..good },
            Place { table_clusters: u64::MAX, ..good },
        ] {
            assert_eq!(Stored::open(&file, bad).unwrap_err().errno(), errno::EINVAL, "{bad:?}");
        }
    }

    #[test]
    fn a_bad_block_counts_nothing() {
        let file = MemFile::new("a", 1 << 20);
        let entries = [0x2_0000, 0x2_0001, 0x2_0200, 0x10_0000, 0];
        file.write_at(&to_bytes(&entries), 65536).unwrap();
        file.write_at(&[0, 5], 0x2_0002).unwrap();
        let place = Place { cluster_bits: 16, width: Width::new(4).unwrap(), table_offset: 65536, table_clusters: 1 };
        let mut stored = Stored::open(&file, place).unwrap();
        assert_eq!(stored.get(1).unwrap(), 5);
        assert_eq!(stored.block_offset(0), Ok(0x2_0000));
        assert_eq!(stored.block_offset(1), Err(BadBlock::Reserved));
        assert_eq!(stored.block_offset(2), Err(BadBlock::Unaligned));
        assert_eq!(stored.block_offset(3), Err(BadBlock::Outside));
        assert_eq!(stored.block_offset(4), Ok(0));
        for block in 1..6 {
            assert_eq!(stored.get(block * 32768 + 1).unwrap(), 0);
        }
        assert_eq!(stored.get(1).unwrap(), 5);
        assert_eq!(stored.described_clusters(), 4 * 32768);
    }
}
