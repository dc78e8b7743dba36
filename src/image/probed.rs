//! Images whose format nobody named.
//!
//! A file that begins as qcow2 images do is one; anything else is raw, except where it begins as an image of a format
//! that this program cannot read: serving that as raw is almost surely a mistake.
//!
//! A guest can write such a beginning itself. Its raw image would then be taken for another format at the next open, by
//! us or by QEMU, and could name any file of the host as its backing file. So the first sector of a probed raw image
//! takes no such beginning ([`ProbedRaw`]); who names the format (`-f raw`) has no such limit.

use super::raw::RawImage;
use super::{Format, Image};
use crate::error::{Error, Result, errno};
use crate::storage::os::{OpenOptions, OsFile};
use crate::storage::{BlockStatus, Stamp, Storage};
use parking_lot::Mutex;
use std::path::Path;

/// What QEMU looks at when it probes.
const SECTOR_BYTES: usize = 512;

/// Beginnings of images, with their offsets. LUKS is not among them: it refers to no other file, and guests encrypt
/// their disks.
const MAGICS: [(usize, &[u8], &str); 13] = [
    (0, b"QFI\xfb", "qcow2"),
    (0, b"QED\0", "qed"),
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"),
    (0, b"# Disk DescriptorFile", "vmdk"),
    (0, b"vhdxfile", "vhdx"),
    (0, b"conectix", "vpc"),
    (64, &[0x7f, 0x10, 0xda, 0xbe], "vdi"),
    (0, b"WithoutFreeSpace", "parallels"),
    (0, b"WithouFreSpacExt", "parallels"),
    (0, b"Bochs Virtual HD Image", "bochs"),
    (0, b"#!/bin/sh\n#V2.0 Format\n", "cloop"),
    (0, b"OOOM\0\0\0\x02", "cow"),
];

/// The name of the format whose images begin as `sector` does.
fn magic_of(sector: &[u8]) -> Option<&'static str> {
    let found = MAGICS.iter().find(|(at, magic, _)| sector.get(*at..).is_some_and(|rest| rest.starts_with(magic)));
    found.map(|(.., name)| *name).or_else(|| is_vmdk_text(sector).then_some("vmdk"))
}

/// A VMDK descriptor: a text whose first line that is neither empty nor a comment is its version.
fn is_vmdk_text(sector: &[u8]) -> bool {
    let is_idle = |line: &&[u8]| line.starts_with(b"#") || line.trim_ascii().is_empty();
    let mut lines = sector.split(|byte| *byte == b'\n').skip_while(is_idle);
    lines.next().is_some_and(|line| line.starts_with(b"version="))
}

/// The format of the image at `path`. EOPNOTSUPP where it is one that cannot be read.
pub fn probe(path: &Path) -> Result<Format> {
    probe_file(&OsFile::open(path, &OpenOptions { noatime: true, ..Default::default() })?)
}

/// The format of the image in a file. EOPNOTSUPP where it is one that cannot be read.
pub fn probe_file(file: &dyn Storage) -> Result<Format> {
    let mut sector = [0; SECTOR_BYTES];
    file.read_at(&mut sector, 0)?;
    match magic_of(&sector) {
        None => Ok(Format::Raw),
        Some("qcow2") => Ok(Format::Qcow2),
        Some(name) => Err(Error::new(errno::EOPNOTSUPP, "open", format!("a {name} image, which cannot be served"))
            .at_path(file.path())
            .hint("convert it with qemu-img convert, or give -f raw to take its bytes as they are")),
    }
}

/// A raw image whose first sector takes no beginning of another format.
#[derive(Debug)]
pub struct ProbedRaw {
    image: RawImage,
    /// Held by whoever changes the first sector, from the look at what it will be to the change; a leaf lock, across
    /// one transfer.
    first_sector: Mutex<()>,
}

impl ProbedRaw {
    /// Guards an image. EPERM where the guard comes too late.
    pub fn new(image: RawImage) -> Result<ProbedRaw> {
        let probed = ProbedRaw { image, first_sector: Mutex::new(()) };
        let sector = probed.sector()?;
        probed.check(&sector)?;
        Ok(probed)
    }

    fn sector(&self) -> Result<[u8; SECTOR_BYTES]> {
        let mut sector = [0; SECTOR_BYTES];
        self.image.read_at(&mut sector, 0)?;
        Ok(sector)
    }

    fn check(&self, sector: &[u8]) -> Result<()> {
        let Some(name) = magic_of(sector) else { return Ok(()) };
        let why = format!("the disk would look like a {name} image, and its format was not given");
        Err(Error::new(errno::EPERM, "write", why).at_path(self.path()).at_offset(0).hint("mount it with -f raw"))
    }

    /// Makes a change of a range through `act`; `put` makes the same change to the first sector in memory.
    fn change(&self, offset: u64, put: impl FnOnce(&mut [u8]), act: impl FnOnce() -> Result<()>) -> Result<()> {
        if offset >= SECTOR_BYTES as u64 {
            return act();
        }
        let _first_sector = self.first_sector.lock();
        let mut sector = self.sector()?;
        put(sector.get_mut(offset as usize..).unwrap_or_default());
        self.check(&sector)?;
        act()
    }
}

impl Image for ProbedRaw {
    fn size(&self) -> u64 {
        self.image.size()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.image.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        let put = |sector: &mut [u8]| sector.iter_mut().zip(buf).for_each(|(byte, new)| *byte = *new);
        self.change(offset, put, || self.image.write_at(buf, offset))
    }

    fn write_zeroes(&self, offset: u64, len: u64, discard: bool) -> Result<()> {
        let put = |sector: &mut [u8]| {
            let count = len.min(sector.len() as u64) as usize;
            sector.iter_mut().take(count).for_each(|byte| *byte = 0);
        };
        self.change(offset, put, || self.image.write_zeroes(offset, len, discard))
    }

    fn flush(&self) -> Result<()> {
        self.image.flush()
    }

    fn close(&self) -> Result<()> {
        self.image.close()
    }

    /// What is cut off reads as zeros, and zeros can end a magic.
    fn resize(&self, size: u64) -> Result<()> {
        self.change(size, |sector| sector.fill(0), || self.image.resize(size))
    }

    fn block_status(&self, offset: u64, len: u64) -> Result<BlockStatus> {
        self.image.block_status(offset, len)
    }

    fn stamp(&self) -> Result<Stamp> {
        self.image.stamp()
    }

    fn format(&self) -> Format {
        self.image.format()
    }

    fn path(&self) -> &Path {
        self.image.path()
    }

    fn read_only(&self) -> bool {
        self.image.read_only()
    }

    fn is_shared(&self) -> bool {
        self.image.is_shared()
    }

    fn snapshot(&self) -> Option<&str> {
        self.image.snapshot()
    }

    fn is_block_device(&self) -> bool {
        self.image.is_block_device()
    }

    fn note(&self) -> Result<Option<String>> {
        self.image.note()
    }

    fn set_note(&self, why: Option<&str>) -> Result<()> {
        self.image.set_note(why)
    }
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests {
    use super::*;
    use crate::storage::MemFile;
    use std::sync::Arc;
    use std::time::Duration;

    fn image() -> ProbedRaw {
        let file = MemFile::new("vda.raw", 65536);
        ProbedRaw::new(RawImage::over(file.shared(), false).unwrap()).unwrap()
    }

    fn sector(image: &ProbedRaw) -> [u8; SECTOR_BYTES] {
        image.sector().unwrap()
    }

    #[test]
    fn a_guest_cannot_give_its_disk_another_format() {
        for (at, magic, name) in MAGICS {
            let image = image();
            let mut data = vec![0; 4096];
            data[at..at + magic.len()].copy_from_slice(magic);
            let e = image.write_at(&data, 0).unwrap_err();
            assert_eq!(e.errno(), errno::EPERM);
            assert!(e.to_string().contains(name), "{e}");
            assert!(e.hint_text().unwrap().contains("-f raw"));
            assert_eq!(sector(&image), [0; SECTOR_BYTES]);
            image.write_at(&data, 512).unwrap();
        }
    }

    #[test]
    fn a_magic_in_pieces_is_a_magic() {
        let image = image();
        image.write_at(b"I\xfb", 2).unwrap();
        assert_eq!(image.write_at(b"QF", 0).unwrap_err().errno(), errno::EPERM);
        // "QF" is no magic without its "I".
        image.write_at(b"Q", 0).unwrap();
        assert_eq!(&sector(&image)[..4], b"Q\0I\xfb");
        assert_eq!(image.write_at(b"F", 1).unwrap_err().errno(), errno::EPERM);
        image.write_at(b"QEDx", 0).unwrap();
        for discard in [false, true] {
            assert_eq!(image.write_zeroes(3, 100, discard).unwrap_err().errno(), errno::EPERM, "zeros end a magic");
        }
        assert_eq!(&sector(&image)[..4], b"QEDx");
        assert_eq!(image.resize(3).unwrap_err().errno(), errno::EPERM, "so does the end of the file");
        image.resize(512).unwrap();
        image.resize(65536).unwrap();
        image.write_zeroes(0, 4096, false).unwrap();
        image.write_at(b"# a comment\n\nversion=1\n", 0).unwrap_err();
        image.write_at(b"# a comment\n\nversions\n", 0).unwrap();
    }

    #[test]
    fn writers_of_a_magic_in_two_pieces_do_not_pass_each_other() {
        // Each step below takes its time, so that two writers look before either has written.
        let slow = crate::image::raw::testing::image(1, 4096, || std::thread::sleep(Duration::from_micros(500)));
        let image = ProbedRaw::new(Arc::into_inner(slow).unwrap()).unwrap();
        for _ in 0..20 {
            image.write_zeroes(0, 512, false).unwrap();
            let results = std::thread::scope(|scope| {
                let image = &image;
                let halves =
                    [(b"QF", 0), (b"I\xfb", 2)].map(|(half, at)| scope.spawn(move || image.write_at(half, at)));
                halves.map(|half| half.join().unwrap().is_ok())
            });
            assert_ne!(results, [true, true]);
            assert!(magic_of(&sector(&image)).is_none());
        }
    }

    #[test]
    fn what_cannot_be_served_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        for (at, magic, name) in MAGICS {
            let mut data = vec![0; 1024];
            data[at..at + magic.len()].copy_from_slice(magic);
            std::fs::write(&path, &data).unwrap();
            match probe(&path) {
                Ok(format) => assert_eq!((format, name), (Format::Qcow2, "qcow2")),
                Err(e) => assert!(e.to_string().contains(name), "{e}"),
            }
        }
        for data in [&b""[..], b"x", b"LUKS\xba\xbe\0\x01"] {
            std::fs::write(&path, data).unwrap();
            assert_eq!(probe(&path).unwrap(), Format::Raw);
        }
    }
}
