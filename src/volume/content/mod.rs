//! What a volume holds, told by its signatures as `blkid` tells it.
//!
//! Where signatures of two kinds are found, the answer is none: one of them is left from earlier, and nobody knows which.

mod container;
mod fat;
mod filesystem;
pub(super) mod swap;

use super::Disk;
use super::bytes::{be16, read_some, stands, u8_at};
use crate::error::Result;

/// A file system, a swap area or a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Content {
    /// `blkid`'s TYPE: ext2, ext3, ext4, xfs, btrfs, vfat, exfat, ntfs, iso9660, swap, swsuspend (a hibernated system in
    /// a swap area), crypto_LUKS, LVM2_member.
    pub kind: String,
    /// Its label.
    pub label: Option<String>,
    /// Its UUID, or what takes its place, in the form of its kind.
    pub uuid: Option<String>,
}

impl Content {
    fn new(kind: &str, label: Option<String>, uuid: Option<String>) -> Content {
        Content { kind: kind.into(), label, uuid }
    }
}

/// The bytes at the start in which every signature lies, that of btrfs last.
const HEAD_BYTES: usize = 68 << 10;

/// Looks for signatures. Fails where the disk can't be read.
pub fn probe(disk: &dyn Disk) -> Result<Option<Content>> {
    let head = read_some(disk, 0, HEAD_BYTES)?;
    let mut found = Vec::new();
    found.extend(container::luks(&head));
    found.extend(container::lvm(&head));
    found.extend(swap::probe(&head));
    found.extend(filesystem::ext(&head));
    found.extend(filesystem::xfs(&head));
    found.extend(filesystem::btrfs(&head));
    found.extend(filesystem::ntfs(disk, &head)?);
    found.extend(fat::vfat(disk, &head)?);
    found.extend(fat::exfat(disk, &head)?);
    found.extend(filesystem::iso9660(&head));
    Ok(if found.len() == 1 { found.pop() } else { None })
}

/// Whether a first sector is that of a file system, which ends like a master boot record.
pub(super) fn is_boot_sector(sector: &[u8]) -> bool {
    let jumps =
        u8_at(sector, 0) == 0xe9 || (u8_at(sector, 0) == 0xeb && u8_at(sector, 2) == 0x90) || be16(sector, 0) == 0xeb76;
    jumps && (fat::is_fat(sector) || stands(sector, 3, b"EXFAT   ") || stands(sector, 3, b"NTFS    "))
}
