//! Which partition table a disk has, and what every table keeps to.
//!
//! The rules are those of Linux: a GUID table counts only behind a protective (or hybrid) master boot record, which
//! makes an old one at the end of a disk harmless; a boot sector of a file system is no master boot record.

use super::bytes::{Part, read, stands};
use super::{Disk, Table, content, gpt, mbr};
use crate::error::Result;
use std::ops::Range;

/// Sizes of logical sectors that tables are read with: an image does not say which one its guest sees.
pub(super) const SECTOR_BYTES: [u64; 2] = [512, 4096];

/// A partition in a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Partition {
    /// From 1.
    pub number: u32,
    /// Bytes of the disk.
    pub range: Range<u64>,
    /// What the table says of it.
    pub table: Table,
}

/// What was found of partition tables.
#[derive(Debug, Default)]
pub(super) struct Partitions {
    /// By number; inside of the disk, without a byte in common.
    pub all: Vec<Partition>,
    /// Bytes that they came from.
    pub sources: Vec<Range<u64>>,
    /// What is wrong.
    pub notes: Vec<String>,
    /// There is a table, be it damaged or without partitions, so that the disk as a whole holds nothing.
    pub is_table: bool,
}

/// Reads the partition table of a disk.
pub(super) fn partitions(disk: &dyn Disk) -> Result<Partitions> {
    let Some(boot) = read(disk, 0, 512)? else { return Ok(Partitions::default()) };
    if !stands(&boot, 510, &[0x55, 0xaa]) {
        let mut found = Partitions::default();
        if gpt::is_there(disk)? {
            found.is_table = true;
            found.sources.push(0..512);
            found.notes.push("a GUID partition table without a protective MBR is left alone".into());
        }
        return Ok(found);
    }
    let entries = mbr::entries(&boot);
    if entries.iter().any(|entry| entry.kind == mbr::PROTECTIVE) {
        return gpt::partitions(disk);
    }
    let is_mbr = entries.iter().any(|entry| entry.is_used())
        && entries.iter().all(|entry| entry.has_plain_flag())
        && !content::is_boot_sector(&boot);
    match is_mbr {
        true => mbr::partitions(disk, &boot, entries),
        false => Ok(Partitions::default()),
    }
}

/// Leaves out what is not wholly on the disk or shares bytes with another partition, and notes it: with such a table
/// nobody knows whose bytes they are.
pub(super) fn keep_sound(found: &mut Partitions, disk_bytes: u64) {
    let mut outside = Vec::new();
    found.all.retain(|partition| {
        let inside = partition.range.start < partition.range.end && partition.range.end <= disk_bytes;
        if !inside {
            outside.push(partition.number);
        }
        inside
    });
    let mut order: Vec<usize> = (0..found.all.len()).collect();
    order.sort_by_key(|index| found.all.get(*index).map_or(0, |partition| partition.range.start));
    let mut shared = vec![false; found.all.len()];
    // Who reaches farthest so far shares bytes with everybody who begins before its end.
    let mut farthest: Option<(usize, u64)> = None;
    for index in order {
        let Some(range) = found.all.get(index).map(|partition| partition.range.clone()) else { continue };
        if let Some((other, end)) = farthest
            && range.start < end
        {
            for index in [index, other] {
                if let Some(shared) = shared.get_mut(index) {
                    *shared = true;
                }
            }
        }
        if farthest.is_none_or(|(_, end)| range.end > end) {
            farthest = Some((index, range.end));
        }
    }
    let mut flags = shared.iter();
    let mut overlapping = Vec::new();
    found.all.retain(|partition| {
        let keep = !flags.next().copied().unwrap_or(false);
        if !keep {
            overlapping.push(partition.number);
        }
        keep
    });
    for (numbers, why) in [(outside, "reach past the end of the disk"), (overlapping, "share bytes")] {
        if !numbers.is_empty() {
            found.notes.push(format!("partitions that {why} are left out: {}", list(&numbers)));
        }
    }
}

/// Numbers for a message, the first ones.
pub(super) fn list(numbers: &[u32]) -> String {
    const MOST: usize = 8;
    let mut text = numbers.iter().take(MOST).map(u32::to_string).collect::<Vec<_>>().join(", ");
    if numbers.len() > MOST {
        text += &format!(" and {} more", numbers.len() - MOST);
    }
    text
}

/// Whether something that is known begins at a place: what tells a master boot record's sectors apart.
pub(super) fn begins_something(disk: &dyn Disk, range: Range<u64>) -> Result<bool> {
    if range.end > disk.size() {
        return Ok(false);
    }
    Ok(content::probe(&Part::new(disk, range))?.is_some())
}

/// Sectors of a partition in bytes; an overflow lies past the end of every disk.
pub(super) fn bytes_of(first: u64, count: u64, sector: u64) -> Range<u64> {
    let start = first.saturating_mul(sector);
    start..start.saturating_add(count.saturating_mul(sector))
}
