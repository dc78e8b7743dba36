//! Free blocks of ext2 to ext4, of a file system that may have been frozen in mid-flight.
//!
//! **A block counts as free only if every version of its bitmap says so that a mount of the volume could come to see:**
//! the one in its place, and each copy of a committed transaction in the journal. Which of them a replay ends with is of
//! no matter then. The newest version must also agree with its group's newest descriptor, by checksum and by the number
//! of free blocks, and must have the blocks with the file system's own structures in use. Else the group has no free
//! blocks. What a transaction that was not committed has written to blocks is lost by a replay, so nobody needs it.
//!
//! Without a journal bitmaps are right only after a clean unmount.

use super::journal::{self, Copies, Copy};
use super::superblock::{self, Checksums, Superblock};
use crate::error::Result;
use crate::units::join_ranges;
use crate::volume::Disk;
use crate::volume::bytes::{le16, le32, part, read};
use crate::volume::checksum::{crc16, crc32c};
use std::collections::BTreeSet;
use std::ops::Range;

/// Shortest run in bytes that is worth a mention; doubled while there are more runs than [`RUNS_MAX`].
const RUN_MIN: u64 = 64 << 10;
const RUNS_MAX: usize = 1 << 21;

/// Flags of a group.
const BLOCK_UNINIT: u16 = 2;
/// Bytes of a descriptor behind which the higher halves stand.
const SHORT_DESCRIPTOR: u64 = 32;

/// What a group's descriptor says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Descriptor {
    bitmap: u64,
    inode_bitmap: u64,
    inode_table: u64,
    free_clusters: u64,
    bitmap_crc: u32,
    /// The bitmap was never written: just the blocks with structures are in use.
    is_uninit: bool,
}

/// What is known of a group.
struct Group {
    newest: Descriptor,
    /// Versions of its descriptor agree on where things are, and their checksums are right.
    is_sound: bool,
    /// A version says that the bitmap was written.
    has_bitmap: bool,
}

/// Byte ranges of the volume that are free blocks; None where the file system is not understood.
pub(super) fn free_blocks(volume: &dyn Disk) -> Result<Option<Vec<Range<u64>>>> {
    let Some(bytes) = read(volume, superblock::AT, superblock::BYTES)? else { return Ok(None) };
    let Some((own, state)) = Superblock::parse(&bytes, volume.size()) else { return Ok(None) };
    if state.has_errors || !state.is_valid || state.has_fast_commits {
        return Ok(None);
    }
    let Some(mut groups) = descriptors(volume, &own)? else { return Ok(None) };
    let mut copies = Copies::new();
    if let Some(number) = own.journal_inode {
        let Some(at) = inode_at(&own, &groups, number) else { return Ok(None) };
        let wanted = wanted(&own, &groups);
        let Some(found) = journal::copies(volume, &own, number, at, &wanted)? else { return Ok(None) };
        copies = found;
    }
    if !is_same_geometry(volume, &own, &copies)? {
        return Ok(None);
    }
    for index in 0..own.descriptor_blocks() {
        for copy in copies_of(&copies, own.descriptor_block(index)) {
            let Some(block) = copy.read(volume, &own)? else { return Ok(None) };
            newer_descriptors(&own, index, &block, &mut groups);
        }
    }
    let structures = structures(&own, &groups);
    let mut runs = Runs { found: vec![], shortest: RUN_MIN };
    for (number, group) in (0..).zip(&groups) {
        if let Some(used) = used_clusters(volume, &own, number, group, &copies, &structures)? {
            runs.add(&own, number, &used);
        }
    }
    Ok(Some(runs.done()))
}

fn copies_of(copies: &Copies, block: u64) -> &[Copy] {
    copies.get(&block).map_or(&[], Vec::as_slice)
}

fn descriptor(own: &Superblock, number: u64, bytes: &[u8]) -> Option<Descriptor> {
    const CHECKSUM: usize = 30;
    let number = u32::try_from(number).ok()?.to_le_bytes();
    let expected = match own.checksums {
        Checksums::None => None,
        Checksums::Descriptors(uuid) => {
            let crc = crc16(crc16(crc16(u16::MAX, &uuid), &number), part(bytes, 0, CHECKSUM));
            Some(crc16(crc, part(bytes, CHECKSUM + 2, bytes.len())))
        }
        Checksums::All(seed) => {
            let mut bytes = bytes.to_vec();
            bytes.get_mut(CHECKSUM..CHECKSUM + 2)?.fill(0);
            Some(crc32c(crc32c(seed, &number), &bytes) as u16)
        }
    };
    if expected.is_some_and(|crc| crc != le16(bytes, CHECKSUM)) {
        return None;
    }
    let is_long = bytes.len() as u64 > SHORT_DESCRIPTOR;
    let place = |low: usize, high: usize| {
        let high = if is_long { u64::from(le32(bytes, high)) << 32 } else { 0 };
        Some(high | u64::from(le32(bytes, low))).filter(|block| (own.first_block..own.blocks).contains(block))
    };
    let half = |low: usize, high: usize| {
        let high = if is_long { u32::from(le16(bytes, high)) << 16 } else { 0 };
        high | u32::from(le16(bytes, low))
    };
    let is_uninit = le16(bytes, 18) & BLOCK_UNINIT != 0;
    // Without checksums the flag has no meaning.
    if is_uninit && own.checksums == Checksums::None {
        return None;
    }
    Some(Descriptor {
        bitmap: place(0, 32)?,
        inode_bitmap: place(4, 36)?,
        inode_table: place(8, 40)?,
        free_clusters: half(12, 44).into(),
        bitmap_crc: half(24, 56),
        is_uninit,
    })
}

/// The descriptors in their places, one a group; None where one of them is damaged. (Its structures may be anywhere.)
fn descriptors(volume: &dyn Disk, own: &Superblock) -> Result<Option<Vec<Group>>> {
    let mut groups = Vec::new();
    for index in 0..own.descriptor_blocks() {
        let at = own.descriptor_block(index).saturating_mul(own.block_bytes);
        let Some(block) = read(volume, at, own.block_bytes as usize)? else { return Ok(None) };
        let count = (own.groups - groups.len() as u64).min(own.descriptors_per_block());
        for bytes in block.chunks_exact(own.descriptor_bytes as usize).take(count as usize) {
            let Some(newest) = descriptor(own, groups.len() as u64, bytes) else { return Ok(None) };
            groups.push(Group { newest, is_sound: true, has_bitmap: !newest.is_uninit });
        }
    }
    Ok(Some(groups))
}

/// Takes the descriptors in a newer copy of a block of them.
fn newer_descriptors(own: &Superblock, index: u64, block: &[u8], groups: &mut [Group]) {
    let first = index * own.descriptors_per_block();
    let groups = groups.iter_mut().skip(first as usize);
    for ((number, group), bytes) in (first..).zip(groups).zip(block.chunks_exact(own.descriptor_bytes as usize)) {
        let Some(newer) = descriptor(own, number, bytes) else {
            group.is_sound = false;
            continue;
        };
        let places = |of: &Descriptor| (of.bitmap, of.inode_bitmap, of.inode_table);
        group.is_sound &= places(&newer) == places(&group.newest);
        group.has_bitmap |= !newer.is_uninit;
        group.newest = newer;
    }
}

/// The blocks whose copies in the journal matter.
fn wanted(own: &Superblock, groups: &[Group]) -> BTreeSet<u64> {
    let descriptors = (0..own.descriptor_blocks()).map(|index| own.descriptor_block(index));
    let bitmaps = groups.iter().map(|group| group.newest.bitmap);
    std::iter::once(own.own_block()).chain(descriptors).chain(bitmaps).collect()
}

/// Where an inode is, in bytes.
fn inode_at(own: &Superblock, groups: &[Group], number: u32) -> Option<u64> {
    let index = u64::from(number.checked_sub(1)?);
    let group = groups.get((index / own.group_inodes) as usize)?;
    let within = (index % own.group_inodes) * own.inode_bytes;
    group.newest.inode_table.checked_mul(own.block_bytes)?.checked_add(within)
}

/// Whether all copies of the superblock in the journal describe the same file system. It changes while it is resized.
fn is_same_geometry(volume: &dyn Disk, own: &Superblock, copies: &Copies) -> Result<bool> {
    for copy in copies_of(copies, own.own_block()) {
        let Some(block) = copy.read(volume, own)? else { return Ok(false) };
        let at = (superblock::AT - own.own_block() * own.block_bytes) as usize;
        let is_same = Superblock::parse(part(&block, at, superblock::BYTES), volume.size())
            .is_some_and(|(other, state)| other == *own && !state.has_errors && !state.has_fast_commits);
        if !is_same {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Blocks of bitmaps and inode tables of all groups, which may be in other groups: sorted ranges that do not touch.
fn structures(own: &Superblock, groups: &[Group]) -> Vec<Range<u64>> {
    let table_blocks = (own.group_inodes * own.inode_bytes).div_ceil(own.block_bytes);
    let mut ranges: Vec<Range<u64>> = Vec::with_capacity(3 * groups.len());
    for group in groups {
        let Descriptor { bitmap, inode_bitmap, inode_table, .. } = group.newest;
        ranges.extend([bitmap..bitmap + 1, inode_bitmap..inode_bitmap + 1, inode_table..inode_table + table_blocks]);
    }
    for index in 0..own.descriptor_blocks() {
        let block = own.descriptor_block(index);
        ranges.push(block..block + 1);
    }
    join_ranges(&mut ranges);
    ranges
}

/// The bits of clusters of a group in which structures lie.
fn structure_clusters(own: &Superblock, number: u64, structures: &[Range<u64>]) -> Vec<u8> {
    let mut bits = vec![0; own.block_bytes as usize];
    let first = own.first_block_of(number);
    let end = first + own.clusters_of(number) * own.cluster_blocks;
    let mut set = |range: Range<u64>| {
        let (start, stop) = (range.start.max(first), range.end.min(end));
        if start < stop {
            let clusters = (start - first) / own.cluster_blocks..(stop - first).div_ceil(own.cluster_blocks);
            for cluster in clusters {
                if let Some(byte) = bits.get_mut((cluster / 8) as usize) {
                    *byte |= 1 << (cluster % 8);
                }
            }
        }
    };
    set(first..first + own.base_blocks_of(number));
    let from = structures.partition_point(|range| range.end <= first);
    for range in structures.iter().skip(from).take_while(|range| range.start < end) {
        set(range.clone());
    }
    bits
}

/// The bits of a group's clusters that are in use in any version; None where the group is not understood.
fn used_clusters(
    volume: &dyn Disk,
    own: &Superblock,
    number: u64,
    group: &Group,
    copies: &Copies,
    structures: &[Range<u64>],
) -> Result<Option<Vec<u8>>> {
    let newest = &group.newest;
    if !group.is_sound || (newest.is_uninit && group.has_bitmap) {
        return Ok(None);
    }
    let base = structure_clusters(own, number, structures);
    let is_right = |bits: &[u8]| free_count(bits, own.clusters_of(number)) == newest.free_clusters;
    if newest.is_uninit {
        return Ok(is_right(&base).then_some(base));
    }
    let at = newest.bitmap.saturating_mul(own.block_bytes);
    let Some(mut last) = read(volume, at, own.block_bytes as usize)? else { return Ok(None) };
    let mut used = last.clone();
    for copy in copies_of(copies, newest.bitmap) {
        let Some(block) = copy.read(volume, own)? else { return Ok(None) };
        for (used, byte) in used.iter_mut().zip(&block) {
            *used |= byte;
        }
        last = block;
    }
    if let Checksums::All(seed) = own.checksums {
        let crc = crc32c(seed, part(&last, 0, (own.group_clusters / 8) as usize));
        let mask = if own.descriptor_bytes > SHORT_DESCRIPTOR { u32::MAX } else { 0xffff };
        if crc & mask != newest.bitmap_crc {
            return Ok(None);
        }
    }
    let has_structures = base.iter().zip(&last).all(|(base, byte)| base & !byte == 0);
    Ok((is_right(&last) && has_structures).then_some(used))
}

/// Bits that are clear among the first `count`.
fn free_count(bits: &[u8], count: u64) -> u64 {
    let whole = (count / 8) as usize;
    let free: u64 = part(bits, 0, whole).iter().map(|byte| u64::from(byte.count_zeros())).sum();
    let rest = bits.get(whole).copied().unwrap_or(0) | 0xff_u8.checked_shl((count % 8) as u32).unwrap_or(0);
    free + u64::from(rest.count_zeros())
}

/// Runs of free bytes, as they are found.
struct Runs {
    found: Vec<Range<u64>>,
    shortest: u64,
}

impl Runs {
    /// Adds the clear bits of a group.
    fn add(&mut self, own: &Superblock, number: u64, used: &[u8]) {
        let first = own.first_block_of(number);
        let mut run: Option<u64> = None;
        let count = own.clusters_of(number);
        let mut next = 0;
        while next <= count {
            let cluster = next;
            let byte = used.get((cluster / 8) as usize).copied().unwrap_or(u8::MAX);
            let is_used = cluster == count || byte & 1 << (cluster % 8) != 0;
            // Most bytes go on as the bit before them.
            let goes_on =
                cluster.is_multiple_of(8) && cluster + 8 <= count && byte == if run.is_some() { 0 } else { u8::MAX };
            next += if goes_on { 8 } else { 1 };
            match (is_used, run) {
                (false, None) => run = Some(cluster),
                (true, Some(start)) => {
                    run = None;
                    let place = |cluster: u64| (first + cluster * own.cluster_blocks).min(own.blocks) * own.block_bytes;
                    self.push(place(start)..place(cluster));
                }
                _ => {}
            }
        }
    }

    /// Joins a run to the one before where they touch: groups follow each other.
    fn push(&mut self, range: Range<u64>) {
        match self.found.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => {
                // The last one may still grow; what is before it does not.
                self.drop_short_last();
                self.found.push(range);
            }
        }
        while self.found.len() > RUNS_MAX {
            self.shortest *= 2;
            let shortest = self.shortest;
            self.found.retain(|range| range.end - range.start >= shortest);
        }
    }

    fn drop_short_last(&mut self) {
        if self.found.last().is_some_and(|last| last.end - last.start < self.shortest) {
            self.found.pop();
        }
    }

    fn done(mut self) -> Vec<Range<u64>> {
        self.drop_short_last();
        self.found
    }
}
