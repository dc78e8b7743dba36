//! Disks with tables, written independently of the code that reads them.

use crate::error::{Error, Result, errno};
use crate::volume::{Disk, checksum};

/// A disk in memory. It fails where a test says so, and never answers for bytes that it does not have.
pub(super) struct Mem {
    pub bytes: Vec<u8>,
    /// Reads of this byte fail.
    pub bad: Option<u64>,
}

impl Mem {
    pub fn new(bytes: Vec<u8>) -> Mem {
        Mem { bytes, bad: None }
    }

    pub fn empty(bytes: u64) -> Mem {
        Mem::new(vec![0; bytes as usize])
    }

    pub fn put(&mut self, at: u64, bytes: &[u8]) {
        self.bytes[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
    }
}

impl Disk for Mem {
    fn name(&self) -> &str {
        "mem"
    }

    fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let range = offset as usize..offset as usize + buf.len();
        if self.bad.is_some_and(|bad| range.contains(&(bad as usize))) {
            return Err(Error::new(errno::EIO, "read", "bad sector"));
        }
        buf.copy_from_slice(&self.bytes[range]);
        Ok(())
    }
}

/// A partition: kind, first and last sector.
pub(super) type Part = (u8, u64, u64);

/// An entry of a boot record.
pub(super) fn mbr_entry((kind, first, last): Part) -> [u8; 16] {
    let mut entry = [0; 16];
    entry[4] = kind;
    entry[8..12].copy_from_slice(&(first as u32).to_le_bytes());
    entry[12..].copy_from_slice(&((last + 1 - first) as u32).to_le_bytes());
    entry
}

/// A boot record at a byte.
pub(super) fn mbr(disk: &mut Mem, at: u64, entries: &[Part]) {
    for (index, entry) in entries.iter().enumerate().filter(|(_, entry)| entry.0 != 0) {
        disk.put(at + 446 + 16 * index as u64, &mbr_entry(*entry));
    }
    disk.put(at + 440, &[0x78, 0x56, 0x34, 0x12]);
    disk.put(at + 510, &[0x55, 0xaa]);
}

/// A GUID partition table with 128 entries, primary and backup, behind a protective MBR.
pub(super) fn gpt(disk: &mut Mem, sector: u64, parts: &[Part]) {
    let sectors = disk.bytes.len() as u64 / sector;
    let entry_sectors = 128 * 128 / sector;
    mbr(disk, 0, &[(0xee, 1, sectors - 1)]);
    let mut entries = vec![0; 128 * 128];
    for (index, (kind, first, last)) in parts.iter().enumerate().filter(|(_, part)| part.0 != 0) {
        let entry = &mut entries[128 * index..][..128];
        entry[..16].fill(*kind);
        entry[16..32].fill(0x10 + index as u8);
        entry[32..40].copy_from_slice(&first.to_le_bytes());
        entry[40..48].copy_from_slice(&last.to_le_bytes());
        for (at, c) in format!("part {index} ü").encode_utf16().enumerate() {
            entry[56 + 2 * at..][..2].copy_from_slice(&c.to_le_bytes());
        }
    }
    for (own, other, table) in [(1, sectors - 1, 2), (sectors - 1, 1, sectors - 1 - entry_sectors)] {
        disk.put(table * sector, &entries);
        let mut header = vec![0; 92];
        header[..8].copy_from_slice(b"EFI PART");
        for (at, number) in [(8, 0x10000), (12, 92), (80, 128), (84, 128), (88, checksum::crc32(&entries))] {
            header[at..at + 4].copy_from_slice(&u32::to_le_bytes(number));
        }
        let usable = (2 + entry_sectors, sectors - 2 - entry_sectors);
        for (at, number) in [(24, own), (32, other), (40, usable.0), (48, usable.1), (72, table)] {
            header[at..at + 8].copy_from_slice(&u64::to_le_bytes(number));
        }
        disk.put(own * sector, &header);
        seal_gpt(disk, own * sector);
    }
}

/// Makes the checksum of the header at a byte right.
pub(super) fn seal_gpt(disk: &mut Mem, at: u64) {
    disk.put(at + 16, &[0; 4]);
    let crc = checksum::crc32(&disk.bytes[at as usize..at as usize + 92]);
    disk.put(at + 16, &crc.to_le_bytes());
}

/// A physical volume: UUID (32 letters), extents from 64 KiB on, one metadata area from 4096 up to there.
pub(super) fn pv(disk: &mut Mem, at: u64, uuid: &str, text: &str) {
    pv_wrapped(disk, at, uuid, text, 512);
}

/// The same with its text at a byte of the metadata area, from whose end it goes on behind the area's header.
pub(super) fn pv_wrapped(disk: &mut Mem, at: u64, uuid: &str, text: &str, text_at: u64) {
    let (area, area_bytes) = (4096_u64, 60 << 10);
    let mut label = vec![0; 512];
    label[..8].copy_from_slice(b"LABELONE");
    label[8] = 1;
    label[20] = 32;
    label[24..32].copy_from_slice(b"LVM2 001");
    label[32..64].copy_from_slice(uuid.as_bytes());
    for (at, number) in [(72, 65536_u64), (104, area), (112, area_bytes)] {
        label[at..at + 8].copy_from_slice(&number.to_le_bytes());
    }
    let crc = checksum::lvm(&[&label[20..]]);
    label[16..20].copy_from_slice(&crc.to_le_bytes());
    disk.put(at + 512, &label);

    let text = format!("{text}\0");
    let first = text.len().min((area_bytes - text_at) as usize);
    disk.put(at + area + text_at, &text.as_bytes()[..first]);
    disk.put(at + area + 512, &text.as_bytes()[first..]);
    if first == text.len() {
        disk.put(at + area + text_at, text.as_bytes());
    }
    let mut header = vec![0; 512];
    header[4..20].copy_from_slice(b" LVM2 x[5A%r0N*>");
    header[20] = 1;
    for (at, number) in [(24, area), (32, area_bytes), (40, text_at), (48, text.len() as u64)] {
        header[at..at + 8].copy_from_slice(&number.to_le_bytes());
    }
    header[56..60].copy_from_slice(&checksum::lvm(&[text.as_bytes()]).to_le_bytes());
    let crc = checksum::lvm(&[&header[4..]]);
    header[..4].copy_from_slice(&crc.to_le_bytes());
    disk.put(at + area, &header);
}

/// 32 letters that are a UUID.
pub(super) fn uuid(letter: char) -> String {
    letter.to_string().repeat(32)
}

/// The same as the metadata writes it.
pub(super) fn hyphened(letter: char) -> String {
    [6, 4, 4, 4, 4, 4, 6].map(|len| letter.to_string().repeat(len)).join("-")
}

/// Metadata of a group with extents of 64 KiB; physical volumes by letter with 100 extents each.
pub(super) fn group(name: &str, sequence: u64, pvs: &[char], logical: &str) -> String {
    let pvs: String = pvs
        .iter()
        .map(|letter| format!("pv{letter} {{ id = \"{}\" pe_start = 128 pe_count = 100 }}\n", hyphened(*letter)))
        .collect();
    format!(
        "{name} {{\nid = \"{}\"\nseqno = {sequence}\nextent_size = 128 # 64 KiB\nphysical_volumes {{\n{pvs}}}\n\
         logical_volumes {{\n{logical}}}\n}}\nversion = 1\n",
        hyphened('V')
    )
}

/// A visible logical volume of segments: extents, and the rest of the segment's text.
pub(super) fn logical(name: &str, segments: &[(u64, &str)]) -> String {
    let mut start = 0;
    let mut text = String::new();
    for (index, (count, rest)) in (1..).zip(segments) {
        text += &format!("segment{index} {{ start_extent = {start} extent_count = {count} {rest} }}\n");
        start += count;
    }
    let id = hyphened('L');
    let count = segments.len();
    format!("{name} {{ id = \"{id}\" status = [\"READ\", \"VISIBLE\"] segment_count = {count} {text} }}\n")
}

/// The rest of a linear segment.
pub(super) fn linear(pv: char, extent: u64) -> String {
    format!("type = \"striped\" stripe_count = 1 stripes = [ \"pv{pv}\", {extent} ]")
}
