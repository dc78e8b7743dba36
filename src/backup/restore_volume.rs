//! One volume of a point, and the place of the same volume on live disks.
//!
//! Volumes are found in what the disks held, so a table that changed since sends nothing to a wrong place: the place on live
//! disks is found in their own tables, and is the same volume only where name, size and the table's UUID agree
//! ([`check_same`]).

use super::chain::Content;
use super::copy::Source;
use crate::error::{Error, Result, errno};
use crate::image::{Format, Image};
use crate::storage::{BlockStatus, Stamp};
use crate::volume::{self, Volume};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

/// A disk to look for volumes in.
struct Looked<'a, F> {
    name: &'a str,
    size: u64,
    read: F,
}

impl<F: Fn(&mut [u8], u64) -> Result<()>> volume::Disk for Looked<'_, F> {
    fn name(&self) -> &str {
        self.name
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        (self.read)(buf, offset)
    }
}

/// The volume of a name on disks (name and content), that begins on disk `home` where that is given.
pub fn find_in_contents(disks: &[(String, Box<dyn Content>)], name: &str, home: Option<&str>) -> Result<Volume> {
    let looked = disks.iter().map(|(name, content)| Looked {
        name,
        size: content.size(),
        read: |buf: &mut [u8], offset| content.read(buf, offset),
    });
    find(&looked.collect::<Vec<_>>(), name, home)
}

/// The same on images.
pub fn find_in_images(disks: &[(String, Arc<dyn Image>)], name: &str, home: Option<&str>) -> Result<Volume> {
    let looked = disks.iter().map(|(name, image)| Looked {
        name,
        size: image.size(),
        read: |buf: &mut [u8], offset| image.read_at(buf, offset),
    });
    find(&looked.collect::<Vec<_>>(), name, home)
}

fn find<F: Fn(&mut [u8], u64) -> Result<()>>(
    disks: &[Looked<'_, F>],
    name: &str,
    home: Option<&str>,
) -> Result<Volume> {
    let all: Vec<&dyn volume::Disk> = disks.iter().map(|disk| disk as &dyn volume::Disk).collect();
    let mut scan = volume::scan(&all);
    let home_of = |volume: &Volume| disks.get(volume.home()).map_or("", |disk| disk.name);
    let list = |volumes: &[Volume]| {
        let names = volumes.iter().map(|volume| format!("{}/{}", home_of(volume), volume.name));
        names.collect::<Vec<_>>().join(" ")
    };
    let what = || format!("volume '{}'", name.escape_debug());
    let there = list(&scan.volumes);
    scan.volumes.retain(|volume| volume.name == name && home.is_none_or(|home| home_of(volume) == home));
    if scan.volumes.len() > 1 {
        let why = format!("several disks have one of that name: {}", list(&scan.volumes));
        return Err(Error::new(errno::EINVAL, what(), why).hint("give its disk with --disk"));
    }
    scan.volumes.pop().ok_or_else(|| {
        let warnings = scan.warnings.iter().map(|warning| format!("; {warning}")).collect::<String>();
        let hint = if there.is_empty() { "there are no volumes".to_owned() } else { format!("there are: {there}") };
        Error::new(errno::ENOENT, what(), format!("no such volume{warnings}")).hint(hint)
    })
}

/// Refuses to take `there` for the volume `wanted`, where they are not the same by size and the table's UUID; with `force` the
/// size alone counts.
pub fn check_same(wanted: &Volume, there: &Volume, force: bool) -> Result<()> {
    let what = || format!("volume '{}'", wanted.name);
    if wanted.size != there.size {
        let why = format!("it had {} bytes in the backup, and has {} now", wanted.size, there.size);
        return Err(Error::new(errno::EINVAL, what(), why).hint("restore it to a file, or restore the whole disk"));
    }
    if (wanted.table.scheme(), wanted.table.uuid()) != (there.table.scheme(), there.table.uuid()) && !force {
        let why = format!(
            "another volume has its name now: its table says {}, and said {}",
            there.table.uuid(),
            wanted.table.uuid()
        );
        return Err(Error::new(errno::EINVAL, what(), why).hint("restore it to a file, or use --force"));
    }
    Ok(())
}

/// What of a volume lies in ranges of its disks (ascending, by index of the disk; None: all of the disk).
pub fn ranges_in(volume: &Volume, disks: &[Option<Vec<Range<u64>>>]) -> Vec<Range<u64>> {
    let mut found: Vec<Range<u64>> = Vec::new();
    let mut add = |range: Range<u64>| match found.last_mut() {
        Some(last) if last.end == range.start => last.end = range.end,
        _ => found.push(range),
    };
    let mut at = 0;
    for (disk, offset, len) in volume.locate(0, volume.size) {
        match disks.get(disk) {
            Some(Some(ranges)) => {
                let first = ranges.partition_point(|range| range.end <= offset);
                for range in ranges.iter().skip(first).take_while(|range| range.start < offset + len) {
                    add(at + range.start.max(offset) - offset..at + range.end.min(offset + len) - offset);
                }
            }
            _ => add(at..at + len),
        }
        at += len;
    }
    found
}

/// What a volume held.
pub struct VolumeContent {
    /// The disks that were scanned.
    pub disks: Vec<(String, Box<dyn Content>)>,
    /// The volume in them.
    pub volume: Volume,
}

fn not_there(volume: &Volume, offset: u64) -> Error {
    Error::new(errno::EIO, format!("volume '{}'", volume.name), "its disk is not there").at_offset(offset)
}

/// Cuts `buf`, at `offset` of the volume, into its pieces on disks.
fn each_piece(
    volume: &Volume,
    buf: &mut [u8],
    offset: u64,
    mut work: impl FnMut(usize, u64, &mut [u8]) -> Result<()>,
) -> Result<()> {
    let mut done = 0;
    for (disk, place, len) in volume.locate(offset, buf.len() as u64) {
        let piece = buf.get_mut(done..done + len as usize).ok_or_else(|| not_there(volume, offset))?;
        work(disk, place, piece)?;
        done += len as usize;
    }
    if done == buf.len() { Ok(()) } else { Err(not_there(volume, offset)) }
}

impl Source for VolumeContent {
    fn size(&self) -> u64 {
        self.volume.size
    }

    fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        each_piece(&self.volume, buf, offset, |disk, place, piece| {
            let (_, content) = self.disks.get(disk).ok_or_else(|| not_there(&self.volume, offset))?;
            content.read(piece, place)
        })
    }
}

impl Content for VolumeContent {
    fn status(&self, offset: u64, len: u64) -> Result<BlockStatus> {
        let piece = self.volume.locate(offset, len).next();
        let (disk, place, len) = piece.ok_or_else(|| not_there(&self.volume, offset))?;
        let (_, content) = self.disks.get(disk).ok_or_else(|| not_there(&self.volume, offset))?;
        content.status(place, len)
    }
}

/// A volume on disks that are written to.
#[derive(Debug)]
pub struct VolumeImage {
    /// The disks that were scanned; None: one that the volume does not lie on.
    pub disks: Vec<Option<Arc<dyn Image>>>,
    /// The volume on them.
    pub volume: Volume,
}

impl VolumeImage {
    fn disk(&self, disk: usize, offset: u64) -> Result<&dyn Image> {
        let image = self.disks.get(disk).and_then(Option::as_deref);
        image.ok_or_else(|| not_there(&self.volume, offset))
    }

    fn unsupported(&self, what: &str) -> Error {
        Error::new(errno::EOPNOTSUPP, what, "a volume is part of disks").at_path(self.path())
    }

    fn first(&self) -> Option<&dyn Image> {
        self.disks.get(self.volume.home()).and_then(Option::as_deref)
    }
}

impl Image for VolumeImage {
    fn size(&self) -> u64 {
        self.volume.size
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        each_piece(&self.volume, buf, offset, |disk, place, piece| self.disk(disk, offset)?.read_at(piece, place))
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        let mut done = 0;
        for (disk, place, len) in self.volume.locate(offset, buf.len() as u64) {
            let piece = buf.get(done..done + len as usize).ok_or_else(|| not_there(&self.volume, offset))?;
            self.disk(disk, offset)?.write_at(piece, place)?;
            done += len as usize;
        }
        if done == buf.len() { Ok(()) } else { Err(not_there(&self.volume, offset)) }
    }

    fn write_zeroes(&self, offset: u64, len: u64, discard: bool) -> Result<()> {
        for (disk, place, len) in self.volume.locate(offset, len) {
            self.disk(disk, offset)?.write_zeroes(place, len, discard)?;
        }
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        self.disks.iter().flatten().try_for_each(|disk| disk.flush())
    }

    fn resize(&self, _size: u64) -> Result<()> {
        Err(self.unsupported("resize"))
    }

    fn block_status(&self, offset: u64, len: u64) -> Result<BlockStatus> {
        let piece = self.volume.locate(offset, len).next();
        let (disk, place, len) = piece.ok_or_else(|| not_there(&self.volume, offset))?;
        self.disk(disk, offset)?.block_status(place, len)
    }

    fn close(&self) -> Result<()> {
        self.disks.iter().flatten().try_for_each(|disk| disk.close())
    }

    fn stamp(&self) -> Result<Stamp> {
        Err(self.unsupported("look at"))
    }

    fn format(&self) -> Format {
        Format::Raw
    }

    fn path(&self) -> &Path {
        self.first().map_or(Path::new(""), |disk| disk.path())
    }

    fn read_only(&self) -> bool {
        false
    }

    fn is_block_device(&self) -> bool {
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::raw::RawImage;
    use crate::storage::MemFile;
    use crate::volume::{Place, Segment, Table};

    /// Two stripes of 4 KiB over two disks, then a run on the second one.
    fn volume() -> Volume {
        let place = |disk, offset| Place { disk, offset };
        let striped = Segment { start: 0, length: 16384, stripe: 4096, places: vec![place(0, 65536), place(1, 0)] };
        let table = Table::Lvm { group: "g".into(), name: "v".into(), uuid: "u".into(), striped: true };
        let segments = vec![striped, Segment::linear(16384, 8192, 1, 100_000)];
        Volume { name: "g-v".into(), size: 24576, segments, table, content: None }
    }

    fn disk() -> Arc<dyn Image> {
        Arc::new(RawImage::over(MemFile::new("disk", 200_000).shared(), false).unwrap())
    }

    #[test]
    fn a_volume_is_read_and_written_where_it_lies() {
        let disks = [disk(), disk()];
        let image = VolumeImage { disks: disks.iter().cloned().map(Some).collect(), volume: volume() };
        let data: Vec<u8> = (0..24576u32).map(|n| (n / 100) as u8 | 1).collect();
        image.write_at(&data, 0).unwrap();
        let read = |disk: usize, offset: u64, len: usize| {
            let mut buf = vec![0; len];
            disks[disk].read_at(&mut buf, offset).unwrap();
            buf
        };
        assert!(read(0, 65536, 4096) == data[..4096] && read(1, 0, 4096) == data[4096..8192]);
        assert!(read(0, 69632, 4096) == data[8192..12288] && read(1, 100_000, 8192) == data[16384..]);
        let mut part = vec![0; 10_000];
        image.read_at(&mut part, 3000).unwrap();
        assert!(part == data[3000..13_000]);
        image.write_zeroes(4000, 200, true).unwrap();
        image.read_at(&mut part, 3000).unwrap();
        assert!(part[1000..1200].iter().all(|byte| *byte == 0) && part[1200..] == data[4200..13_000]);
        for at in [24_576, 20_000] {
            assert!(image.read_at(&mut part, at).is_err() && image.write_at(&part, at).is_err(), "{at}");
        }
        let missing = VolumeImage { disks: vec![Some(disk()), None], volume: volume() };
        assert!(missing.write_at(&data, 0).is_err());
    }

    #[test]
    fn changed_ranges_of_disks_are_ranges_of_the_volume() {
        type Pair = (u64, u64);
        let of = |first: &[Pair], second: &[Pair]| {
            let ranges = |pairs: &[Pair]| Some(pairs.iter().map(|(start, end)| *start..*end).collect());
            ranges_in(&volume(), &[ranges(first), ranges(second)])
        };
        assert_eq!(of(&[(0, 65536)], &[]), []);
        assert_eq!(of(&[(0, 200_000)], &[]), [0..4096, 8192..12288]);
        assert_eq!(of(&[], &[(0, 200_000)]), [4096..8192, 12288..24576]);
        assert_eq!(
            of(&[(65540, 65550)], &[(4000, 5000), (100_000, 100_001)]),
            [4..14, 8096..8192, 12288..13192, 16384..16385]
        );
        let all = ranges_in(&volume(), &[None, Some(Vec::new())]);
        assert_eq!(all, [0..4096, 8192..12288]);
        let every = ranges_in(&volume(), &[None, None]);
        assert_eq!((every.len(), every[0].end), (1, 24576));
    }

    #[test]
    fn another_volume_of_that_name_is_not_the_one() {
        let other = Volume { table: Table::Mbr { kind: 0x83, uuid: "u".into() }, ..volume() };
        assert!(check_same(&volume(), &volume(), false).is_ok());
        assert!(check_same(&volume(), &other, false).unwrap_err().to_string().contains("another volume"));
        assert!(check_same(&volume(), &other, true).is_ok());
        let shorter = Volume { size: 16384, ..volume() };
        assert!(check_same(&volume(), &shorter, true).unwrap_err().to_string().contains("16384"));
    }
}
