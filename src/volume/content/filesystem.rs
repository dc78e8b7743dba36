//! File systems: ext2 to ext4, xfs, btrfs, NTFS, iso9660.

use super::Content;
use crate::error::Result;
use crate::volume::Disk;
use crate::volume::bytes::{be16, be32, le16, le32, le64, part, read, stands, text, text16, u8_at, uuid};

/// Where the superblock of ext2 to ext4 is.
const EXT_AT: usize = 1024;

/// Features of ext by which `blkid` tells the kinds apart.
mod feature {
    pub const JOURNAL: u32 = 1 << 2;
    pub const JOURNAL_DEVICE: u32 = 1 << 3;
    /// filetype, needs_recovery, meta_bg.
    pub const EXT3_INCOMPAT: u32 = 0x2 | 0x4 | 0x10;
    /// sparse_super, large_file, btree_dir.
    pub const EXT3_RO_COMPAT: u32 = 0x1 | 0x2 | 0x4;
    /// needs_recovery: not of ext2.
    pub const RECOVER: u32 = 0x4;
}

pub(super) fn ext(head: &[u8]) -> Option<Content> {
    let superblock = part(head, EXT_AT, 1024);
    if superblock.len() < 1024 || le16(superblock, 56) != 0xef53 || le32(superblock, 24) > 6 {
        return None;
    }
    let (compat, incompat, ro_compat) = (le32(superblock, 92), le32(superblock, 96), le32(superblock, 100));
    if incompat & feature::JOURNAL_DEVICE != 0 {
        return Some(Content::new("jbd", text(part(superblock, 120, 16)), uuid(superblock, 104)));
    }
    let is_new = incompat & !feature::EXT3_INCOMPAT != 0 || ro_compat & !feature::EXT3_RO_COMPAT != 0;
    let kind = match compat & feature::JOURNAL != 0 {
        _ if is_new => "ext4",
        true => "ext3",
        false if incompat & feature::RECOVER != 0 => return None,
        false => "ext2",
    };
    Some(Content::new(kind, text(part(superblock, 120, 16)), uuid(superblock, 104)))
}

pub(super) fn xfs(head: &[u8]) -> Option<Content> {
    let (block_bytes, groups) = (be32(head, 4), be32(head, 88));
    let is_sound = stands(head, 0, b"XFSB")
        && block_bytes.is_power_of_two()
        && (512..=65536).contains(&block_bytes)
        && groups > 0
        && (512..=32768).contains(&be16(head, 102));
    is_sound.then(|| Content::new("xfs", text(part(head, 108, 12)), uuid(head, 32)))
}

pub(super) fn btrfs(head: &[u8]) -> Option<Content> {
    const AT: usize = 64 << 10;
    if !stands(head, AT + 64, b"_BHRfS_M") {
        return None;
    }
    Some(Content::new("btrfs", text(part(head, AT + 299, 256)), uuid(head, AT + 32)))
}

pub(super) fn ntfs(disk: &dyn Disk, head: &[u8]) -> Result<Option<Content>> {
    let (sector, per_cluster) = (u64::from(le16(head, 11)), u8_at(head, 13));
    // More than 128 sectors are told as the negative of a power of two.
    let cluster_sectors = match per_cluster {
        1..=128 => u64::from(per_cluster),
        240..=255 => 1 << (256 - u32::from(per_cluster)),
        _ => 0,
    };
    let is_sound = stands(head, 3, b"NTFS    ")
        && (256..=4096).contains(&sector)
        && sector.is_power_of_two()
        && cluster_sectors.is_power_of_two()
        && le16(head, 14) == 0
        && u8_at(head, 16) == 0;
    if !is_sound {
        return Ok(None);
    }
    let label = ntfs_label(disk, head, sector * cluster_sectors)?;
    Ok(Some(Content::new("ntfs", label, Some(format!("{:016X}", le64(head, 72))))))
}

/// The label stands in an attribute of record 3 of the master file table.
fn ntfs_label(disk: &dyn Disk, head: &[u8], cluster: u64) -> Result<Option<String>> {
    const VOLUME_NAME: u32 = 0x60;
    const END: u32 = u32::MAX;
    let size = u8_at(head, 64) as i8;
    let record_bytes = match size {
        1.. => u64::from(size.unsigned_abs()) * cluster,
        -31..=-1 => 1 << size.unsigned_abs(),
        _ => 0,
    };
    if !(512..=65536).contains(&record_bytes) {
        return Ok(None);
    }
    let start = le64(head, 48).saturating_mul(cluster).saturating_add(3 * record_bytes);
    let Some(record) = read(disk, start, record_bytes as usize)? else { return Ok(None) };
    if !stands(&record, 0, b"FILE") {
        return Ok(None);
    }
    let mut at = usize::from(le16(&record, 20));
    while at + 24 <= record.len() {
        let (kind, bytes) = (le32(&record, at), le32(&record, at + 4) as usize);
        if kind == END || bytes < 24 {
            break;
        }
        if kind == VOLUME_NAME {
            let (value_bytes, value_at) = (le32(&record, at + 16) as usize, usize::from(le16(&record, at + 20)));
            return Ok(text16(part(&record, at + value_at, value_bytes.min(256))));
        }
        at = at.saturating_add(bytes);
    }
    Ok(None)
}

pub(super) fn iso9660(head: &[u8]) -> Option<Content> {
    const AT: usize = 32 << 10;
    if !stands(head, AT + 1, b"CD001") || u8_at(head, AT) != 1 {
        return None;
    }
    // When it was changed, else when it was made: YYYYMMDDhhmmss and hundredths.
    let date = [830, 813].into_iter().find_map(|at| {
        let digits = std::str::from_utf8(part(head, AT + at, 16)).ok()?;
        let is_date = digits.bytes().all(|b| b.is_ascii_digit()) && digits.bytes().any(|b| b != b'0');
        let pieces =
            [0..4, 4..6, 6..8, 8..10, 10..12, 12..14, 14..16].map(|range| digits.get(range).unwrap_or_default());
        is_date.then(|| pieces.join("-"))
    });
    Some(Content::new("iso9660", text(part(head, AT + 40, 32)), date))
}
