//! GUID partition tables (UEFI specification, chapter 5).
//!
//! A table counts only where everything that it says of itself is true: place, checksums of header and entries, usable
//! sectors inside of the disk. Where the primary one is not so, the backup at the end of the disk is taken, with a note.

use super::bytes::{guid, le32, le64, part, read, stands, text16};
use super::checksum::crc32;
use super::table::{Partition, Partitions, SECTOR_BYTES, bytes_of, keep_sound};
use super::{Disk, Table};
use crate::error::Result;
use std::ops::Range;

const SIGNATURE: &[u8] = b"EFI PART";
/// Bytes of a header that its checksum covers: at least what the first revision has.
const HEADER_BYTES_MIN: usize = 92;
/// Bytes of an entry: at least what has a meaning, at most a sector.
const ENTRY_BYTES: std::ops::RangeInclusive<usize> = 128..=4096;
/// Most bytes of all entries. The usual 128 of them take 16 KiB.
const ENTRIES_BYTES_MAX: usize = 1 << 20;

/// A header that is sound.
struct Header {
    /// Sectors that partitions may have.
    usable: Range<u64>,
    /// Where the entries are, in bytes.
    entries: Range<u64>,
    entry_bytes: usize,
    entries_crc: u32,
}

/// Where a header may be.
#[derive(Clone, Copy)]
struct Spot {
    sector: u64,
    /// In sectors.
    place: u64,
}

impl Spot {
    fn bytes(&self) -> Range<u64> {
        bytes_of(self.place, 1, self.sector)
    }
}

/// Whether a header stands where a primary one would.
pub(super) fn is_there(disk: &dyn Disk) -> Result<bool> {
    for sector in SECTOR_BYTES {
        if read(disk, sector, 512)?.is_some_and(|header| stands(&header, 0, SIGNATURE)) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The partitions of a disk whose first sector says that it has such a table.
pub(super) fn partitions(disk: &dyn Disk) -> Result<Partitions> {
    let mut found = Partitions { is_table: true, ..Partitions::default() };
    found.sources.push(0..512);
    let primary = SECTOR_BYTES.map(|sector| Spot { sector, place: 1 });
    let mut spots = primary.to_vec();
    for spot in primary {
        // Where a primary header that is damaged says that its backup is, and at the end of the disk.
        if let Some(header) = read(disk, spot.bytes().start, 512)?
            && stands(&header, 0, SIGNATURE)
        {
            spots.push(Spot { place: le64(&header, 32), ..spot });
        }
        spots.push(Spot { place: (disk.size() / spot.sector).saturating_sub(1), ..spot });
    }
    let mut faults: Vec<String> = Vec::new();
    for spot in spots {
        let fault = match table_at(disk, spot)? {
            Ok((header, entries)) => {
                if spot.place != 1 {
                    found.sources.extend(primary.iter().map(Spot::bytes));
                    let why = faults.first().map_or("damaged", String::as_str);
                    found.notes.push(format!("the primary GUID partition table is {why}: the backup is taken"));
                }
                found.sources.extend([spot.bytes(), header.entries.clone()]);
                fill(&mut found, &header, &entries, spot.sector);
                keep_sound(&mut found, disk.size());
                return Ok(found);
            }
            Err(fault) => fault,
        };
        // The first that is known of a header that is there says most.
        faults.extend(fault);
        found.sources.push(spot.bytes());
    }
    let why = faults.first().map_or("missing", String::as_str);
    found.notes.push(format!("the GUID partition table is {why}, and so is its backup: no partitions"));
    Ok(found)
}

/// The table with its entries, or what is wrong with it; None where there is none.
type Judged<T> = std::result::Result<T, Option<String>>;

fn table_at(disk: &dyn Disk, spot: Spot) -> Result<Judged<(Header, Vec<u8>)>> {
    let Some(sector) = read(disk, spot.bytes().start, spot.sector as usize)? else { return Ok(Err(None)) };
    let header = match header(&sector, spot, disk.size()) {
        Ok(header) => header,
        Err(fault) => return Ok(Err(fault)),
    };
    let bytes = (header.entries.end - header.entries.start) as usize;
    let Some(entries) = read(disk, header.entries.start, bytes)? else {
        return Ok(Err(Some("damaged (entries past the end of the disk)".into())));
    };
    Ok(match crc32(&entries) == header.entries_crc {
        true => Ok((header, entries)),
        false => Err(Some("damaged (checksum of its entries)".into())),
    })
}

fn header(bytes: &[u8], spot: Spot, disk_bytes: u64) -> Judged<Header> {
    if !stands(bytes, 0, SIGNATURE) {
        return Err(None);
    }
    let bad = |why: &str| Err(Some(format!("damaged ({why})")));
    let header_bytes = le32(bytes, 12) as usize;
    if !(HEADER_BYTES_MIN..=bytes.len()).contains(&header_bytes) {
        return bad("length of its header");
    }
    let mut covered = part(bytes, 0, header_bytes).to_vec();
    if let Some(own) = covered.get_mut(16..20) {
        own.fill(0);
    }
    if crc32(&covered) != le32(bytes, 16) {
        return bad("checksum of its header");
    }
    if le64(bytes, 24) != spot.place {
        return bad("it says that it is elsewhere");
    }
    let (first, last) = (le64(bytes, 40), le64(bytes, 48));
    if first > last.saturating_add(1) || last >= disk_bytes / spot.sector {
        return bad("it is for a larger disk");
    }
    let (count, entry_bytes) = (le32(bytes, 80) as usize, le32(bytes, 84) as usize);
    let entries_bytes = count.saturating_mul(entry_bytes);
    if !ENTRY_BYTES.contains(&entry_bytes) || !entry_bytes.is_power_of_two() || entries_bytes > ENTRIES_BYTES_MAX {
        return bad("number or size of its entries");
    }
    let start = le64(bytes, 72).saturating_mul(spot.sector);
    let entries = start..start.saturating_add(entries_bytes as u64);
    if entries.end > disk_bytes {
        return bad("entries past the end of the disk");
    }
    Ok(Header { usable: first..last.saturating_add(1), entries, entry_bytes, entries_crc: le32(bytes, 88) })
}

fn fill(found: &mut Partitions, header: &Header, entries: &[u8], sector: u64) {
    let mut odd = Vec::new();
    for (number, entry) in (1..).zip(entries.chunks(header.entry_bytes)) {
        if part(entry, 0, 16).iter().all(|byte| *byte == 0) {
            continue;
        }
        let (first, last) = (le64(entry, 32), le64(entry, 40));
        if first > last || first < header.usable.start || last >= header.usable.end {
            odd.push(number);
            continue;
        }
        let table = Table::Gpt { kind: guid(entry, 0), uuid: guid(entry, 16), label: text16(part(entry, 56, 72)) };
        let range = bytes_of(first, (last - first).saturating_add(1), sector);
        found.all.push(Partition { number, range, table });
    }
    if !odd.is_empty() {
        let list = super::table::list(&odd);
        found.notes.push(format!("partitions outside of the usable sectors are left out: {list}"));
    }
}
