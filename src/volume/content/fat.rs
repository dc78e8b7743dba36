//! FAT12, FAT16, FAT32 and exFAT. Their labels are entries of the root directory.

use super::Content;
use crate::error::Result;
use crate::volume::Disk;
use crate::volume::bytes::{le16, le32, part, read, read_some, stands, text, text16, u8_at};

/// Bytes of an entry of a directory.
const ENTRY_BYTES: usize = 32;
/// Most clusters of a root directory that are looked at for the label.
const CLUSTERS_MAX: usize = 64;
/// Most bytes of a root directory that are read at once.
const DIRECTORY_BYTES_MAX: usize = 64 << 10;

/// Whether a boot sector describes a FAT file system.
pub(super) fn is_fat(sector: &[u8]) -> bool {
    let has_name = [(54, "FAT12   "), (54, "FAT16   "), (54, "FAT     "), (82, "FAT32   ")]
        .iter()
        .any(|(at, name)| stands(sector, *at, name.as_bytes()))
        || stands(sector, 82, b"MSWIN");
    let media = u8_at(sector, 21);
    has_name
        && stands(sector, 510, &[0x55, 0xaa])
        && (512..=4096).contains(&le16(sector, 11))
        && le16(sector, 11).is_power_of_two()
        && u8_at(sector, 13).is_power_of_two()
        && le16(sector, 14) != 0
        && u8_at(sector, 16) != 0
        && (media == 0xf0 || media >= 0xf8)
}

pub(super) fn vfat(disk: &dyn Disk, head: &[u8]) -> Result<Option<Content>> {
    if !is_fat(head) {
        return Ok(None);
    }
    let sector = u64::from(le16(head, 11));
    let cluster_bytes = sector * u64::from(u8_at(head, 13));
    let reserved = u64::from(le16(head, 14));
    let root_entries = usize::from(le16(head, 17));
    let short = u64::from(le16(head, 22));
    let is_32 = short == 0;
    let fat_sectors = if is_32 { u64::from(le32(head, 36)) } else { short };
    let behind_fats = (reserved + fat_sectors * u64::from(u8_at(head, 16))) * sector;
    let mut label = None;
    if is_32 {
        let mut cluster = le32(head, 44);
        for _ in 0..CLUSTERS_MAX {
            let Some(index) = cluster.checked_sub(2).filter(|index| *index < 0x0fff_fff5) else { break };
            let start = behind_fats + u64::from(index) * cluster_bytes;
            let entries = read_some(disk, start, DIRECTORY_BYTES_MAX.min(cluster_bytes as usize))?;
            label = label_entry(&entries);
            let is_last = entries.is_empty() || entries.chunks(ENTRY_BYTES).any(|entry| u8_at(entry, 0) == 0);
            if label.is_some() || is_last {
                break;
            }
            let Some(next) = read(disk, reserved * sector + u64::from(cluster) * 4, 4)? else { break };
            cluster = le32(&next, 0) & 0x0fff_ffff;
        }
    } else {
        let entries = read_some(disk, behind_fats, DIRECTORY_BYTES_MAX.min(root_entries * ENTRY_BYTES))?;
        label = label_entry(&entries);
    }
    let at = if is_32 { 67 } else { 39 };
    let own = Some(part(head, at + 4, 11)).filter(|own| *own != b"NO NAME    ").and_then(text);
    let uuid = serial(le32(head, at));
    Ok(Some(Content::new("vfat", label.or(own), uuid)))
}

/// The label in entries of a root directory.
fn label_entry(entries: &[u8]) -> Option<String> {
    const ATTRIBUTES: u8 = 0x3f;
    const LONG_NAME: u8 = 0x0f;
    const VOLUME: u8 = 0x08;
    const DIRECTORY: u8 = 0x10;
    for entry in entries.chunks(ENTRY_BYTES) {
        let (first, attributes) = (u8_at(entry, 0), u8_at(entry, 11));
        if first == 0 {
            return None;
        }
        let is_label = attributes & ATTRIBUTES != LONG_NAME && attributes & (VOLUME | DIRECTORY) == VOLUME;
        let starts_a_file = le16(entry, 26) != 0 || le16(entry, 20) != 0;
        if first != 0xe5 && is_label && !starts_a_file {
            let mut name = part(entry, 0, 11).to_vec();
            // 0xe5 marks what was deleted; a name that begins with it is stored so.
            if let (0x05, Some(first)) = (first, name.first_mut()) {
                *first = 0xe5;
            }
            return text(&name);
        }
    }
    None
}

fn serial(number: u32) -> Option<String> {
    (number != 0).then(|| format!("{:04X}-{:04X}", number >> 16, number & 0xffff))
}

pub(super) fn exfat(disk: &dyn Disk, head: &[u8]) -> Result<Option<Content>> {
    const LABEL: u8 = 0x83;
    let (sector_log2, cluster_log2) = (u8_at(head, 108), u8_at(head, 109));
    let is_sound = stands(head, 3, b"EXFAT   ")
        && stands(head, 510, &[0x55, 0xaa])
        && (9..=12).contains(&sector_log2)
        && cluster_log2 <= 25 - sector_log2
        && part(head, 11, 53).iter().all(|byte| *byte == 0);
    if !is_sound {
        return Ok(None);
    }
    let cluster_bytes = 1_u64 << (sector_log2 + cluster_log2);
    let heap = u64::from(le32(head, 88)) << sector_log2;
    let start = heap.saturating_add(u64::from(le32(head, 96).saturating_sub(2)).saturating_mul(cluster_bytes));
    let entries = read_some(disk, start, DIRECTORY_BYTES_MAX.min(cluster_bytes as usize))?;
    let label = entries
        .chunks(ENTRY_BYTES)
        .take_while(|entry| u8_at(entry, 0) != 0)
        .find(|entry| u8_at(entry, 0) == LABEL)
        .and_then(|entry| text16(part(entry, 2, 2 * usize::from(u8_at(entry, 1)).min(11))));
    Ok(Some(Content::new("exfat", label, serial(le32(head, 100)))))
}
