//! Volumes: partitions and logical volumes inside disks, found by reading; nothing is mounted or activated.
//!
//! [`scan`] reads the partition tables (GPT, MBR with logical partitions) and the LVM2 metadata of all disks of a mount
//! and says where the bytes of each volume lie. What it reads was written by a guest, so it is never trusted:
//!
//! * no input makes it panic, recurse deeply, loop or allocate by a number that stands there;
//! * every byte of a volume lies inside of its disk, and volumes of one table do not share bytes;
//! * who can't be understood is left out, with words for it. A wrong guess would send a restore to the wrong place.

mod bytes;
mod checksum;
pub mod content;
mod free;
mod gpt;
mod lvm;
mod mbr;
mod scan;
mod table;
#[cfg(test)]
mod tests;

pub use content::Content;
pub use free::unused;
pub use scan::scan;

use crate::error::{Error, Result, errno};
use std::fmt;
use std::ops::Range;

/// Something to look for volumes in.
pub trait Disk {
    /// Its name, for messages.
    fn name(&self) -> &str;
    /// Bytes.
    fn size(&self) -> u64;
    /// Fills `buf` from `offset`. Nobody reads past the end.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()>;
}

/// Where a part of a segment begins on a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Index into the disks that were scanned.
    pub disk: usize,
    /// Bytes from the start of that disk.
    pub offset: u64,
}

/// A run of a volume's bytes: in one piece on a disk, or striped over several places.
///
/// Stripes are not listed one by one, as there may be millions: [`Volume::locate`] says where each is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    /// Bytes from the start of the volume.
    pub start: u64,
    /// Bytes; at least 1.
    pub length: u64,
    /// Bytes that lie in a place before the next one has its turn; `length` where there is one place.
    pub stripe: u64,
    /// One where the segment is linear. In turn: stripe 0 is in the first, stripe 1 in the second.
    pub places: Vec<Place>,
}

/// What a volume comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Table {
    /// A GUID partition table.
    Gpt {
        /// Type of the partition, a GUID in small letters.
        kind: String,
        /// The partition's own GUID.
        uuid: String,
        /// Its name.
        label: Option<String>,
    },
    /// A master boot record, or an extended partition.
    Mbr {
        /// Type of the partition.
        kind: u8,
        /// What Linux calls PARTUUID: the disk's identifier and the partition's number.
        uuid: String,
    },
    /// An LVM2 volume group.
    Lvm {
        /// Name of the group.
        group: String,
        /// Name of the logical volume, as LVM shows it.
        name: String,
        /// UUID of the logical volume, in LVM's form.
        uuid: String,
        /// Whether a segment has more than one stripe.
        striped: bool,
    },
}

/// A partition or logical volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Volume {
    /// `p1`, or `VG-LV` with hyphens inside of the names doubled. Unique among volumes of one home; a good file name.
    pub name: String,
    /// Bytes; at least 1.
    pub size: u64,
    /// Sorted; they cover the volume without gap or overlap. At least one.
    pub segments: Vec<Segment>,
    /// What it comes from.
    pub table: Table,
    /// What it holds, where that is known.
    pub content: Option<Content>,
}

/// What disks hold.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Scan {
    /// By home, then by partition number; logical volumes last, by name.
    pub volumes: Vec<Volume>,
    /// What each disk holds where it has no partitions: a file system, a physical volume. One entry a disk.
    pub contents: Vec<Option<Content>>,
    /// Disk and bytes of the tables and metadata that volumes came from. A write there makes the volumes stale.
    pub sources: Vec<(usize, Range<u64>)>,
    /// Disk and bytes where more volumes would begin to show: a write there makes a new scan worth while, but leaves the
    /// volumes as they are. File systems write there now and then.
    pub hints: Vec<(usize, Range<u64>)>,
    /// At most one line a disk, which begins with the disk's name: what is damaged or not understood there.
    pub warnings: Vec<String>,
}

impl Table {
    /// `gpt`, `mbr` or `lvm`.
    pub fn scheme(&self) -> &'static str {
        match self {
            Table::Gpt { .. } => "gpt",
            Table::Mbr { .. } => "mbr",
            Table::Lvm { .. } => "lvm",
        }
    }

    /// The type, as `blkid` prints PART_ENTRY_TYPE (a GUID, `0x83`); for LVM `linear` or `striped`.
    pub fn kind(&self) -> String {
        match self {
            Table::Gpt { kind, .. } => kind.clone(),
            Table::Mbr { kind, .. } => format!("{kind:#x}"),
            Table::Lvm { striped, .. } => if *striped { "striped" } else { "linear" }.to_owned(),
        }
    }

    /// The volume's UUID by its table; not that of the file system in it.
    pub fn uuid(&self) -> &str {
        match self {
            Table::Gpt { uuid, .. } | Table::Mbr { uuid, .. } | Table::Lvm { uuid, .. } => uuid,
        }
    }

    /// The volume's name by its table, where tables of that kind have names.
    pub fn label(&self) -> Option<&str> {
        match self {
            Table::Gpt { label, .. } => label.as_deref(),
            Table::Mbr { .. } => None,
            Table::Lvm { name, .. } => Some(name),
        }
    }
}

impl Segment {
    /// A segment in one piece.
    pub fn linear(start: u64, length: u64, disk: usize, offset: u64) -> Segment {
        Segment { start, length, stripe: length, places: vec![Place { disk, offset }] }
    }

    /// Bytes from the start of the volume behind the segment.
    pub fn end(&self) -> u64 {
        self.start.saturating_add(self.length)
    }

    /// Where the byte `at` (from the start of the segment) lies, and how many follow it there.
    fn locate(&self, at: u64) -> Option<(usize, u64, u64)> {
        let left = self.length.checked_sub(at)?;
        let columns = self.places.len() as u64;
        let (number, within) = (at / self.stripe.max(1), at % self.stripe.max(1));
        let (row, column) = (number / columns.max(1), number % columns.max(1));
        let place = self.places.get(column as usize)?;
        let offset = place.offset.checked_add(row.checked_mul(self.stripe)?)?.checked_add(within)?;
        Some((place.disk, offset, left.min(self.stripe.checked_sub(within)?)))
    }
}

impl Volume {
    /// The disk of its first byte, under which it is listed: an index into the disks that were scanned.
    pub fn home(&self) -> usize {
        self.segments.first().and_then(|segment| segment.places.first()).map_or(0, |place| place.disk)
    }

    /// Where it begins on its home, in bytes, where the whole of it lies there in one piece.
    pub fn offset(&self) -> Option<u64> {
        match self.segments.as_slice() {
            [Segment { places, .. }] => match places.as_slice() {
                [place] => Some(place.offset),
                _ => None,
            },
            _ => None,
        }
    }

    /// The pieces `(disk, offset on that disk, length)` that hold a range of the volume, in its order. What of the range
    /// is past the end of the volume has none.
    pub fn locate(&self, offset: u64, len: u64) -> impl Iterator<Item = (usize, u64, u64)> + '_ {
        let end = offset.saturating_add(len).min(self.size);
        let mut at = offset;
        let mut index = self.segments.partition_point(|segment| segment.end() <= offset);
        std::iter::from_fn(move || {
            if at >= end {
                return None;
            }
            let mut segment = self.segments.get(index)?;
            if at >= segment.end() {
                index += 1;
                segment = self.segments.get(index)?;
            }
            let (disk, place, left) = segment.locate(at.checked_sub(segment.start)?)?;
            let len = left.min(end - at);
            at += len;
            (len > 0).then_some((disk, place, len))
        })
    }

    /// The volume as something that can be read; `disks` are those that were scanned.
    pub fn reader<'a>(&'a self, disks: &'a [&'a dyn Disk]) -> VolumeReader<'a> {
        VolumeReader { volume: self, disks }
    }
}

/// A volume that is read through its disks.
#[derive(Clone, Copy)]
pub struct VolumeReader<'a> {
    volume: &'a Volume,
    disks: &'a [&'a dyn Disk],
}

impl fmt::Debug for VolumeReader<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("VolumeReader").field(&self.volume.name).finish()
    }
}

impl Disk for VolumeReader<'_> {
    fn name(&self) -> &str {
        &self.volume.name
    }

    fn size(&self) -> u64 {
        self.volume.size
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let mut done = 0;
        for (disk, place, len) in self.volume.locate(offset, buf.len() as u64) {
            let piece = buf.get_mut(done..done + len as usize);
            let (Some(piece), Some(disk)) = (piece, self.disks.get(disk)) else { break };
            disk.read_at(piece, place)?;
            done += len as usize;
        }
        if done == buf.len() {
            return Ok(());
        }
        let what = format!("read volume '{}'", self.volume.name);
        Err(Error::new(errno::EINVAL, what, "past its end").at_offset(offset))
    }
}
