//! Master boot records, with the chain of extended boot records in which logical partitions lie.

use super::bytes::{le32, read, stands, u8_at};
use super::table::{Partition, Partitions, SECTOR_BYTES, begins_something, bytes_of, keep_sound};
use super::{Disk, Table};
use crate::error::Result;
use std::collections::HashSet;

/// Type of the entry that a GUID partition table hides behind.
pub(super) const PROTECTIVE: u8 = 0xee;
/// Types of extended partitions: of DOS, of Windows, of Linux.
const EXTENDED: [u8; 3] = [0x05, 0x0f, 0x85];
/// Most extended boot records of a disk; Linux follows 100 without a partition.
const CHAIN_MAX: usize = 256;
/// Where the four entries begin, and how long each is.
const ENTRIES_AT: usize = 446;
const ENTRY_BYTES: usize = 16;

/// An entry of a master boot record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Entry {
    pub flag: u8,
    pub kind: u8,
    pub first: u32,
    pub count: u32,
}

impl Entry {
    fn read(bytes: &[u8], at: usize) -> Entry {
        Entry {
            flag: u8_at(bytes, at),
            kind: u8_at(bytes, at + 4),
            first: le32(bytes, at + 8),
            count: le32(bytes, at + 12),
        }
    }

    /// Whether it names a partition.
    pub fn is_used(&self) -> bool {
        self.kind != 0 && self.count != 0
    }

    /// Whether its first byte is one of the two that it can be; in other boot sectors it is anything.
    pub fn has_plain_flag(&self) -> bool {
        matches!(self.flag, 0 | 0x80)
    }

    fn is_extended(&self) -> bool {
        self.is_used() && EXTENDED.contains(&self.kind)
    }
}

/// The four entries of a boot record.
pub(super) fn entries(record: &[u8]) -> [Entry; 4] {
    [0, 1, 2, 3].map(|index| Entry::read(record, ENTRIES_AT + index * ENTRY_BYTES))
}

/// The partitions of the master boot record `boot`, whose entries these are.
pub(super) fn partitions(disk: &dyn Disk, boot: &[u8], entries: [Entry; 4]) -> Result<Partitions> {
    let sector = sector_bytes(disk, &entries)?;
    let mut found = Partitions { is_table: true, ..Partitions::default() };
    found.sources.push(0..512);
    let identifier = le32(boot, 440);
    let named = |number: u32, kind: u8| Table::Mbr { kind, uuid: format!("{identifier:08x}-{number:02x}") };
    for (number, entry) in (1..).zip(entries) {
        if entry.is_used() && !entry.is_extended() {
            let range = bytes_of(entry.first.into(), entry.count.into(), sector);
            found.all.push(Partition { number, range, table: named(number, entry.kind) });
        }
    }
    if let Some(extended) = entries.iter().find(|entry| entry.is_extended()) {
        for (number, (entry, start)) in (5..).zip(logical(disk, extended, sector, &mut found)?) {
            let range = bytes_of(start, entry.count.into(), sector);
            found.all.push(Partition { number, range, table: named(number, entry.kind) });
        }
    }
    keep_sound(&mut found, disk.size());
    Ok(found)
}

/// Follows the chain of an extended partition: entries, with the first sector of each. A chain that is damaged is
/// followed up to there; numbers before it are right.
fn logical(disk: &dyn Disk, extended: &Entry, sector: u64, found: &mut Partitions) -> Result<Vec<(Entry, u64)>> {
    let base = u64::from(extended.first);
    let mut partitions = Vec::new();
    let mut seen = HashSet::new();
    let mut place = base;
    loop {
        if !seen.insert(place) || seen.len() > CHAIN_MAX {
            found.notes.push("the chain of logical partitions goes round in a circle or is too long".into());
            break;
        }
        let start = place.saturating_mul(sector);
        let Some(record) = read(disk, start, 512)? else {
            found.notes.push("the chain of logical partitions leaves the disk".into());
            break;
        };
        found.sources.push(start..start + 512);
        if !stands(&record, 510, &[0x55, 0xaa]) {
            // An extended partition without any may never have been written to.
            if place != base || record.iter().any(|byte| *byte != 0) {
                found.notes.push(format!("the chain of logical partitions is broken at byte {start}"));
            }
            break;
        }
        let entries = entries(&record);
        // As Linux numbers them: each that is not a link.
        for (index, entry) in entries.iter().enumerate() {
            let first = place.saturating_add(entry.first.into());
            let end = first.saturating_add(entry.count.into());
            let inside = first >= base && end <= base.saturating_add(extended.count.into());
            if entry.is_used() && !entry.is_extended() && (index < 2 || inside) {
                partitions.push((*entry, first));
            }
        }
        match entries.iter().find(|entry| entry.is_extended()) {
            Some(link) => place = base.saturating_add(link.first.into()),
            None => break,
        }
    }
    Ok(partitions)
}

/// Size of the sectors that the entries count in: 512 bytes, unless something that is known begins where partitions are
/// with 4096, and nowhere with 512.
fn sector_bytes(disk: &dyn Disk, entries: &[Entry; 4]) -> Result<u64> {
    let [small, _] = SECTOR_BYTES;
    for sector in SECTOR_BYTES {
        for entry in entries.iter().filter(|entry| entry.is_used()) {
            let range = bytes_of(entry.first.into(), entry.count.into(), sector);
            let known = match entry.is_extended() {
                true => read(disk, range.start, 512)?.is_some_and(|record| stands(&record, 510, &[0x55, 0xaa])),
                false => begins_something(disk, range)?,
            };
            if known {
                return Ok(sector);
            }
        }
    }
    Ok(small)
}
