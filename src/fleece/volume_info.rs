//! What status and manifest show of volumes. Field names are part of the user's contract.

use super::scan::{FrozenVolumes, LiveVolumes};
use super::{Disk, View};
use crate::volume::{Content, Place, Segment, Table, Volume};
use serde::{Deserialize, Serialize};

/// What a disk holds.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskContent {
    /// What it is itself, where it has no partitions.
    #[serde(default)]
    pub content: Option<ContentInfo>,
    /// The volumes that are listed under it.
    #[serde(default)]
    pub volumes: Vec<VolumeInfo>,
}

/// A volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeInfo {
    /// `p1`, or `VG-LV`.
    pub name: String,
    /// Bytes.
    pub size: u64,
    /// Bytes from the start of the disk, where all of it lies there in one piece.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub offset: Option<u64>,
    /// Where it lies otherwise.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub segments: Vec<SegmentInfo>,
    /// `gpt`, `mbr` or `lvm`.
    pub table: String,
    /// The type that its table says, as blkid prints it; `linear` or `striped` of a logical volume.
    #[serde(rename = "type")]
    pub kind: String,
    /// The UUID that its table gives it.
    pub uuid: String,
    /// The name that its table gives it.
    pub label: Option<String>,
    /// What it holds.
    pub content: Option<ContentInfo>,
}

/// A file system, swap, an encrypted or physical volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContentInfo {
    /// blkid's TYPE.
    #[serde(rename = "type")]
    pub kind: String,
    /// Its label.
    pub label: Option<String>,
    /// Its UUID, as blkid prints it.
    pub uuid: Option<String>,
}

/// A run of a volume's bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SegmentInfo {
    /// Bytes from the start of the volume.
    pub start: u64,
    /// Bytes.
    pub length: u64,
    /// Bytes in one place before the next has its turn.
    pub stripe: u64,
    /// Where it lies: one place, or one for each stripe in turn.
    pub places: Vec<PlaceInfo>,
}

/// A place on a disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlaceInfo {
    /// Name of the disk.
    pub disk: String,
    /// Bytes from its start.
    pub offset: u64,
}

impl DiskContent {
    pub(super) fn of_disk(found: &LiveVolumes, disk: &Disk) -> DiskContent {
        let name = |index: usize| found.disks().get(index).map_or("", |disk| disk.name());
        DiskContent {
            content: found.content_of(disk).map(ContentInfo::of),
            volumes: found.of_disk(disk).map(|volume| VolumeInfo::of(volume.volume(), name)).collect(),
        }
    }

    pub(super) fn of_view(found: &FrozenVolumes, view: &View) -> DiskContent {
        let name = |index: usize| found.views().get(index).map_or("", |view| view.disk_name());
        DiskContent {
            content: found.content_of(view).map(ContentInfo::of),
            volumes: found.of_view(view).map(|volume| VolumeInfo::of(volume.volume(), name)).collect(),
        }
    }
}

impl ContentInfo {
    fn of(content: &Content) -> ContentInfo {
        ContentInfo { kind: content.kind.clone(), label: content.label.clone(), uuid: content.uuid.clone() }
    }
}

impl VolumeInfo {
    fn of<'a>(volume: &Volume, disk: impl Fn(usize) -> &'a str) -> VolumeInfo {
        let place = |place: &Place| PlaceInfo { disk: disk(place.disk).to_owned(), offset: place.offset };
        let segment = |segment: &Segment| SegmentInfo {
            start: segment.start,
            length: segment.length,
            stripe: segment.stripe,
            places: segment.places.iter().map(place).collect(),
        };
        let offset = volume.offset();
        VolumeInfo {
            name: volume.name.clone(),
            size: volume.size,
            offset,
            segments: if offset.is_some() { Vec::new() } else { volume.segments.iter().map(segment).collect() },
            table: volume.table.scheme().to_owned(),
            kind: volume.table.kind(),
            uuid: volume.table.uuid().to_owned(),
            label: volume.table.label().map(str::to_owned),
            content: volume.content.as_ref().map(ContentInfo::of),
        }
    }

    /// The volume again, with the disks that it lies on, in the order in which its places name them. Its table is told in
    /// words alone, so what comes back says nothing of that.
    pub fn volume(&self, home: &str) -> (Volume, Vec<String>) {
        let mut disks: Vec<String> = Vec::new();
        let mut index_of = |name: &str| {
            disks.iter().position(|known| known == name).unwrap_or_else(|| {
                disks.push(name.to_owned());
                disks.len() - 1
            })
        };
        let segments = match self.offset {
            Some(offset) => vec![Segment::linear(0, self.size, index_of(home), offset)],
            None => {
                let mut place = |place: &PlaceInfo| Place { disk: index_of(&place.disk), offset: place.offset };
                let mut segment = |segment: &SegmentInfo| Segment {
                    start: segment.start,
                    length: segment.length,
                    stripe: segment.stripe,
                    places: segment.places.iter().map(&mut place).collect(),
                };
                self.segments.iter().map(&mut segment).collect()
            }
        };
        let table = Table::Mbr { kind: 0, uuid: String::new() };
        (Volume { name: self.name.clone(), size: self.size, segments, table, content: None }, disks)
    }
}
