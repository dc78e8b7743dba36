//! The map of a volume: the maps of its disks, cut to where it lies and joined.

use super::{Extent, ExtentSource, Extents};
use crate::error::{Error, Result, errno};
use crate::volume::Volume;
use std::sync::Arc;

/// The map of one volume over the maps of the disks that it lies on. Offsets count from the volume's start.
#[derive(Debug)]
pub struct VolumeMap<S> {
    volume: Volume,
    /// By the index that the volume's places name.
    disks: Vec<Option<Arc<S>>>,
}

impl<S: ExtentSource> VolumeMap<S> {
    /// `disks`: the maps of the disks that the volume's places name; None where it has none there.
    pub fn new(volume: Volume, disks: Vec<Option<Arc<S>>>) -> VolumeMap<S> {
        VolumeMap { volume, disks }
    }
}

impl<S: ExtentSource> ExtentSource for VolumeMap<S> {
    fn disk_size(&self) -> u64 {
        self.volume.size
    }

    fn extents_from(&self, offset: u64) -> Result<Extents<'_>> {
        let pieces = Box::new(self.volume.locate(offset, self.volume.size.saturating_sub(offset)));
        let readers = self.disks.iter().map(|_| None).collect();
        Ok(Box::new(Cut { map: self, pieces, piece: (0, 0, 0), at: offset, readers }))
    }
}

/// Walks the volume's pieces, and the map of each disk once as long as they go on upwards there.
struct Cut<'a, S> {
    map: &'a VolumeMap<S>,
    pieces: Box<dyn Iterator<Item = (usize, u64, u64)> + 'a>,
    /// What is left of the piece at `at`: disk, offset there, length.
    piece: (usize, u64, u64),
    at: u64,
    readers: Vec<Option<Reader<'a>>>,
}

/// A disk's map, and the extent that it stands at.
struct Reader<'a> {
    extents: Extents<'a>,
    current: Extent,
}

impl<'a> Reader<'a> {
    fn open(map: &'a impl ExtentSource, offset: u64) -> Result<Reader<'a>> {
        let mut extents = map.extents_from(offset)?;
        let current = extents.next().unwrap_or_else(|| Err(too_short(offset)))?;
        Ok(Reader { extents, current })
    }

    /// Goes on to the extent that holds `offset`; false where that lies behind.
    fn go_on_to(&mut self, offset: u64) -> Result<bool> {
        while self.current.start.saturating_add(self.current.length) <= offset {
            self.current = self.extents.next().unwrap_or_else(|| Err(too_short(offset)))?;
        }
        Ok(self.current.start <= offset)
    }
}

fn too_short(offset: u64) -> Error {
    Error::new(errno::EIO, "map", "ends before the volume does").at_offset(offset)
}

impl<S: ExtentSource> Cut<'_, S> {
    fn step(&mut self) -> Result<Option<Extent>> {
        if self.piece.2 == 0 {
            let Some(piece) = self.pieces.next() else { return Ok(None) };
            self.piece = piece;
        }
        let (disk, offset, len) = self.piece;
        let map = self.map.disks.get(disk).and_then(Option::as_ref);
        let (Some(map), Some(place)) = (map, self.readers.get_mut(disk)) else { return Err(too_short(offset)) };
        let reader = match place.take() {
            Some(mut reader) => {
                if reader.go_on_to(offset)? {
                    Some(reader)
                } else {
                    None
                }
            }
            None => None,
        };
        let mut reader = match reader {
            Some(reader) => reader,
            None => Reader::open(map.as_ref(), offset)?,
        };
        if !reader.go_on_to(offset)? {
            return Err(too_short(offset));
        }
        let Extent { start, length, dirty, zero } = reader.current;
        let length = start.saturating_add(length).saturating_sub(offset).min(len);
        *place = Some(reader);
        let extent = Extent { start: self.at, length, dirty, zero };
        self.at += length;
        self.piece = (disk, offset + length, len - length);
        Ok(Some(extent))
    }
}

impl<S: ExtentSource> Iterator for Cut<'_, S> {
    type Item = Result<Extent>;

    fn next(&mut self) -> Option<Self::Item> {
        self.step().transpose()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backup::{MapFormat, Totals, runs};
    use crate::volume::{Place, Segment, Table};

    /// A map that says `dirty` in every other ten bytes, `zero` in every third; extents of five bytes.
    #[derive(Debug)]
    struct Stripes {
        size: u64,
        shift: u64,
    }

    impl Stripes {
        fn at(&self, offset: u64) -> (bool, bool) {
            let number = (offset + self.shift) / 10;
            (number.is_multiple_of(2), number.is_multiple_of(3))
        }
    }

    impl ExtentSource for Stripes {
        fn disk_size(&self) -> u64 {
            self.size
        }

        fn extents_from(&self, offset: u64) -> Result<Extents<'_>> {
            let first = offset / 5 * 5;
            Ok(Box::new((first..self.size).step_by(5).map(|start| {
                let (dirty, zero) = self.at(start);
                Ok(Extent { start, length: 5.min(self.size - start), dirty, zero })
            })))
        }
    }

    fn volume(segments: Vec<Segment>) -> Volume {
        let size = segments.iter().map(|segment| segment.length).sum();
        Volume {
            name: "v".into(),
            size,
            segments,
            table: Table::Mbr { kind: 0x83, uuid: String::new() },
            content: None,
        }
    }

    /// Linear backwards, striped over both, linear on the second.
    fn tangled() -> (VolumeMap<Stripes>, Vec<(bool, bool)>) {
        let striped = vec![Place { disk: 0, offset: 100 }, Place { disk: 1, offset: 33 }];
        let volume = volume(vec![
            Segment::linear(0, 30, 0, 70),
            Segment { start: 30, length: 64, stripe: 8, places: striped },
            Segment::linear(94, 21, 0, 3),
            Segment::linear(115, 17, 1, 90),
        ]);
        let disks = [Stripes { size: 200, shift: 0 }, Stripes { size: 120, shift: 5 }];
        let expected = (0..volume.size)
            .map(|at| {
                let (disk, offset, _) = volume.locate(at, 1).next().unwrap();
                disks[disk].at(offset)
            })
            .collect();
        (VolumeMap::new(volume, disks.into_iter().map(|disk| Some(Arc::new(disk))).collect()), expected)
    }

    #[test]
    fn a_map_is_cut_and_joined_byte_for_byte() {
        let (map, expected) = tangled();
        let mut said = Vec::new();
        for run in runs::runs(&map, MapFormat::Json, 0).unwrap() {
            let run = run.unwrap();
            said.extend((run.start..run.end).map(|_| (run.dirty, run.zero)));
        }
        assert_eq!(said, expected);
        assert_eq!(Totals::of(&map).unwrap().dirty, expected.iter().filter(|(dirty, _)| *dirty).count() as u64);
    }

    #[test]
    fn a_walk_that_begins_in_the_middle_gives_the_rest() {
        let (map, _) = tangled();
        let all: Vec<Extent> = map.extents_from(0).unwrap().map(Result::unwrap).collect();
        for (index, extent) in all.iter().enumerate() {
            let rest: Vec<Extent> = map.extents_from(extent.start).unwrap().map(Result::unwrap).collect();
            assert_eq!(rest, all[index..]);
        }
    }

    #[test]
    fn a_disk_that_is_too_short_or_missing_is_an_error() {
        let segments = || vec![Segment::linear(0, 30, 0, 70), Segment::linear(30, 20, 1, 110)];
        let disk = |size| Some(Arc::new(Stripes { size, shift: 0 }));
        for disks in [vec![disk(200)], vec![disk(200), None], vec![disk(200), disk(120)], vec![disk(90), disk(200)]] {
            let map = VolumeMap::new(volume(segments()), disks);
            let last = runs::runs(&map, MapFormat::Json, 0).unwrap().last();
            assert!(last.is_some_and(|run| run.is_err()));
        }
    }
}
