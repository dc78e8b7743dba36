//! The journal of ext4 (jbd2): where newer copies of metadata blocks are.
//!
//! **No copy that a replay would write is missed.** Who replays (the kernel, e2fsck) walks the log from its tail and stops
//! at the first block that is not of the expected transaction, or earlier where a checksum is wrong. This walk stops at
//! the first of these only, so it goes at least as far. It counts copies of transactions that were committed, wrong
//! checksums or not: whoever uses them must be right with each prefix of them. Where the log itself is not understood,
//! the answer is that nothing is known.

use super::superblock::{Checksums, Superblock};
use crate::error::Result;
use crate::volume::Disk;
use crate::volume::bytes::{be16, be32, le16, le32, part, read};
use crate::volume::checksum::crc32c;
use std::collections::{BTreeMap, BTreeSet};

const MAGIC: u32 = 0xc03b_3998;
/// Kinds of blocks.
mod kind {
    pub const DESCRIPTOR: u32 = 1;
    pub const COMMIT: u32 = 2;
    pub const SUPERBLOCK_1: u32 = 3;
    pub const SUPERBLOCK_2: u32 = 4;
    pub const REVOKE: u32 = 5;
}
/// Features.
mod feature {
    pub const REVOKE: u32 = 1;
    pub const WIDE: u32 = 2;
    pub const ASYNC_COMMIT: u32 = 4;
    pub const CSUM_2: u32 = 8;
    pub const CSUM_3: u32 = 16;
}
/// Flags of a tag.
mod tag {
    pub const ESCAPED: u16 = 1;
    pub const SAME_UUID: u16 = 2;
    pub const LAST: u16 = 8;
}
/// Bytes before the tags of a descriptor block, and before the numbers of a revoke block.
const HEADER_BYTES: usize = 12;
const REVOKE_HEADER_BYTES: usize = 16;
/// Longest log in blocks.
const BLOCKS_MAX: u32 = 1 << 22;
/// Most blocks of the tree that says where the log is, and its depth.
const NODES_MAX: usize = 4096;
const DEPTH_MAX: u16 = 5;

/// A newer copy of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Copy {
    /// Where it is on the volume, in bytes.
    pub offset: u64,
    /// Its first four bytes were the magic number of the journal.
    pub is_escaped: bool,
}

impl Copy {
    /// Reads the block as a replay would write it.
    pub fn read(&self, volume: &dyn Disk, superblock: &Superblock) -> Result<Option<Vec<u8>>> {
        let mut block = read(volume, self.offset, superblock.block_bytes as usize)?;
        if let Some(start) = block.as_mut().and_then(|block| block.get_mut(..4)).filter(|_| self.is_escaped) {
            start.copy_from_slice(&MAGIC.to_be_bytes());
        }
        Ok(block)
    }
}

/// Copies by block, each block's in the order in which they are replayed.
pub(super) type Copies = BTreeMap<u64, Vec<Copy>>;

/// The copies of the `wanted` blocks in the journal, whose inode is in this byte range; None where that can't be known.
pub(super) fn copies(
    volume: &dyn Disk,
    superblock: &Superblock,
    number: u32,
    inode_at: u64,
    wanted: &BTreeSet<u64>,
) -> Result<Option<Copies>> {
    let Some(inode) = read(volume, inode_at, superblock.inode_bytes as usize)? else { return Ok(None) };
    let Some(seed) = inode_seed(superblock, number, &inode) else { return Ok(None) };
    let mut log = Log { superblock, extents: vec![] };
    if !log.map(volume, &inode, seed)? {
        return Ok(None);
    }
    let Some(header) = log.block(volume, 0)? else { return Ok(None) };
    let Some(geometry) = Geometry::parse(&header, superblock.block_bytes) else { return Ok(None) };
    if geometry.start == 0 {
        return Ok(Some(Copies::new()));
    }
    walk(volume, &log, &geometry, wanted)
}

/// The start value of the checksums of what belongs to an inode; None where the inode is damaged.
fn inode_seed(superblock: &Superblock, number: u32, inode: &[u8]) -> Option<Option<u32>> {
    const CHECKSUM_LOW: usize = 124;
    const CHECKSUM_HIGH: usize = 130;
    let Checksums::All(seed) = superblock.checksums else { return Some(None) };
    let seed = crc32c(crc32c(seed, &number.to_le_bytes()), part(inode, 100, 4));
    let mut bytes = inode.to_vec();
    let has_high = inode.len() > 128 && le16(inode, 128) >= 4;
    let fields: &[usize] = if has_high { &[CHECKSUM_LOW, CHECKSUM_HIGH] } else { &[CHECKSUM_LOW] };
    for at in fields {
        bytes.get_mut(*at..at + 2)?.fill(0);
    }
    let crc = crc32c(seed, &bytes);
    let is_right =
        le16(inode, CHECKSUM_LOW) == crc as u16 && (!has_high || u32::from(le16(inode, CHECKSUM_HIGH)) == crc >> 16);
    is_right.then_some(Some(seed))
}

/// Where the log is: its first block, how many, and where they are.
struct Log<'a> {
    superblock: &'a Superblock,
    extents: Vec<(u64, u64, u64)>,
}

impl Log<'_> {
    /// Reads the tree of extents of the journal's inode. False where it is not understood.
    fn map(&mut self, volume: &dyn Disk, inode: &[u8], seed: Option<u32>) -> Result<bool> {
        const HAS_EXTENTS: u32 = 0x8_0000;
        let own = self.superblock;
        if le32(inode, 32) & HAS_EXTENTS == 0 {
            return Ok(false);
        }
        let root = part(inode, 40, 60).to_vec();
        let mut pending = vec![(le16(&root, 6), root)];
        let mut nodes = 0;
        while let Some((depth, node)) = pending.pop() {
            nodes += 1;
            let (entries, room) = (usize::from(le16(&node, 2)), usize::from(le16(&node, 4)));
            let is_good = le16(&node, 0) == 0xf30a
                && le16(&node, 6) == depth
                && depth <= DEPTH_MAX
                && entries <= room
                && 12 + 12 * room <= node.len()
                && nodes <= NODES_MAX;
            if !is_good {
                return Ok(false);
            }
            for entry in part(&node, 12, 12 * entries).chunks(12) {
                if depth == 0 {
                    let (length, high) = (le16(entry, 4), u64::from(le16(entry, 6)));
                    let place = high << 32 | u64::from(le32(entry, 8));
                    let end = place.saturating_add(u64::from(length));
                    // Longer ones are not written yet.
                    if length == 0 || length > 32768 || end > own.blocks {
                        return Ok(false);
                    }
                    self.extents.push((u64::from(le32(entry, 0)), u64::from(length), place));
                    continue;
                }
                let place = u64::from(le16(entry, 8)) << 32 | u64::from(le32(entry, 4));
                let Some(child) = self.read_node(volume, place, seed)? else { return Ok(false) };
                if pending.len() >= NODES_MAX {
                    return Ok(false);
                }
                pending.push((depth - 1, child));
            }
        }
        self.extents.sort_unstable();
        let mut end = 0;
        let follows = |(first, length, _): &(u64, u64, u64)| std::mem::replace(&mut end, first + length) == *first;
        Ok(self.extents.iter().all(follows))
    }

    fn read_node(&self, volume: &dyn Disk, block: u64, seed: Option<u32>) -> Result<Option<Vec<u8>>> {
        let Some(node) = self.read_block(volume, block)? else { return Ok(None) };
        let tail = 12 + 12 * usize::from(le16(&node, 4));
        let is_right = seed.is_none_or(|seed| crc32c(seed, part(&node, 0, tail)) == le32(&node, tail));
        Ok(is_right.then_some(node))
    }

    fn read_block(&self, volume: &dyn Disk, block: u64) -> Result<Option<Vec<u8>>> {
        let bytes = self.superblock.block_bytes;
        read(volume, block.saturating_mul(bytes), bytes as usize)
    }

    /// Where a block of the log is on the volume, in bytes.
    fn offset(&self, block: u32) -> Option<u64> {
        let block = u64::from(block);
        let index = self.extents.partition_point(|(first, length, _)| first + length <= block);
        let (first, _, place) = self.extents.get(index)?;
        place.checked_add(block.checked_sub(*first)?)?.checked_mul(self.superblock.block_bytes)
    }

    fn block(&self, volume: &dyn Disk, block: u32) -> Result<Option<Vec<u8>>> {
        match self.offset(block) {
            Some(offset) => read(volume, offset, self.superblock.block_bytes as usize),
            None => Ok(None),
        }
    }
}

/// The superblock of the log.
struct Geometry {
    /// Blocks of the log, of which those before `first` are not in the round.
    blocks: u32,
    first: u32,
    /// Where the oldest transaction is, 0 where there is none, and its number.
    start: u32,
    sequence: u32,
    tag_bytes: usize,
    tail_bytes: usize,
    is_wide: bool,
}

impl Geometry {
    fn parse(block: &[u8], block_bytes: u64) -> Option<Geometry> {
        let version = be32(block, 4);
        let is_good = be32(block, 0) == MAGIC
            && matches!(version, kind::SUPERBLOCK_1 | kind::SUPERBLOCK_2)
            && u64::from(be32(block, 12)) == block_bytes
            // An error of the file system was noted.
            && be32(block, 32) == 0;
        let features = if version == kind::SUPERBLOCK_2 { be32(block, 40) } else { 0 };
        let known = feature::REVOKE | feature::WIDE | feature::ASYNC_COMMIT | feature::CSUM_2 | feature::CSUM_3;
        if !is_good
            || features & !known != 0
            || features & (feature::CSUM_2 | feature::CSUM_3) == feature::CSUM_2 | feature::CSUM_3
        {
            return None;
        }
        let has_checksums = features & (feature::CSUM_2 | feature::CSUM_3) != 0;
        if has_checksums {
            const CHECKSUM_AT: usize = 252;
            let mut own = part(block, 0, 1024).to_vec();
            own.get_mut(CHECKSUM_AT..CHECKSUM_AT + 4)?.fill(0);
            if crc32c(u32::MAX, &own) != be32(block, CHECKSUM_AT) {
                return None;
            }
        }
        let is_wide = features & feature::WIDE != 0;
        let tag_bytes = match (features & feature::CSUM_3 != 0, features & feature::CSUM_2 != 0, is_wide) {
            (true, ..) => 16,
            (_, csum_2, wide) => 8 + if csum_2 { 2 } else { 0 } + if wide { 4 } else { 0 },
        };
        let [blocks, first, sequence, start] = [16, 20, 24, 28].map(|at| be32(block, at));
        let fits =
            blocks <= BLOCKS_MAX && first >= 1 && first < blocks && (start == 0 || (first..blocks).contains(&start));
        let tail_bytes = if has_checksums { 4 } else { 0 };
        fits.then_some(Geometry { blocks, first, start, sequence, tag_bytes, tail_bytes, is_wide })
    }

    /// The block that follows in the round.
    fn after(&self, block: u32) -> u32 {
        if block + 1 >= self.blocks { self.first } else { block + 1 }
    }
}

/// Goes through the log from its tail.
fn walk(volume: &dyn Disk, log: &Log, geometry: &Geometry, wanted: &BTreeSet<u64>) -> Result<Option<Copies>> {
    let mut found = Copies::new();
    // Of the transaction whose commit was not reached yet.
    let mut open: Vec<(u64, Copy)> = Vec::new();
    let (mut at, mut sequence, mut walked) = (geometry.start, geometry.sequence, 0_u32);
    loop {
        let Some(block) = log.block(volume, at)? else { return Ok(None) };
        if be32(&block, 0) != MAGIC || be32(&block, 8) != sequence {
            return Ok(Some(found));
        }
        at = geometry.after(at);
        walked += 1;
        match be32(&block, 4) {
            kind::DESCRIPTOR => {
                for (target, is_escaped) in tags(&block, geometry) {
                    let Some(offset) = log.offset(at) else { return Ok(None) };
                    if wanted.contains(&target) {
                        open.push((target, Copy { offset, is_escaped }));
                    }
                    at = geometry.after(at);
                    walked += 1;
                }
            }
            kind::COMMIT => {
                for (target, copy) in open.drain(..) {
                    found.entry(target).or_default().push(copy);
                }
                sequence = sequence.wrapping_add(1);
            }
            // Such a block never stops to be one, unless the file system is being made larger or smaller.
            kind::REVOKE if revoked(&block, geometry).any(|target| wanted.contains(&target)) => return Ok(None),
            kind::REVOKE => {}
            _ => return Ok(Some(found)),
        }
        if walked > geometry.blocks {
            return Ok(None);
        }
    }
}

/// The blocks whose copies follow a descriptor block, and whether they are escaped.
fn tags(block: &[u8], geometry: &Geometry) -> Vec<(u64, bool)> {
    let end = block.len().saturating_sub(geometry.tail_bytes);
    let mut tags = Vec::new();
    let mut at = HEADER_BYTES;
    while at + geometry.tag_bytes <= end {
        let flags = be16(block, at + 6);
        let high = if geometry.is_wide { u64::from(be32(block, at + 8)) << 32 } else { 0 };
        tags.push((high | u64::from(be32(block, at)), flags & tag::ESCAPED != 0));
        at += geometry.tag_bytes + if flags & tag::SAME_UUID == 0 { 16 } else { 0 };
        if flags & tag::LAST != 0 {
            break;
        }
    }
    tags
}

/// The numbers in a revoke block.
fn revoked(block: &[u8], geometry: &Geometry) -> impl Iterator<Item = u64> {
    let bytes = (be32(block, HEADER_BYTES) as usize).min(block.len());
    let entry = if geometry.is_wide { 8 } else { 4 };
    let numbers = part(block, REVOKE_HEADER_BYTES, bytes.saturating_sub(REVOKE_HEADER_BYTES));
    numbers.chunks_exact(entry).map(move |number| match entry {
        8 => u64::from(be32(number, 0)) << 32 | u64::from(be32(number, 4)),
        _ => u64::from(be32(number, 0)),
    })
}
