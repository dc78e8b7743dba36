//! An image without data that carries one bitmap and a note about it: knowledge of changes on its way to another host.
//!
//! For other programs it is an empty image of the disk's size with a bitmap that does not record; `qemu-img info` shows it
//! and `qemu-img bitmap --merge` takes it over. The note is an extension of our own type, which they keep.
//!
//! Invariants:
//! - **Nothing is overwritten**: a path that exists is refused (EEXIST). What fails leaves no file behind.
//! - **The note comes last**, durably: a file that has it is whole. Whether the bits are still those that the note was
//!   written with is for the note to say.

use super::bitmaps_format::Directory;
use super::create::{self, CreateOptions};
use super::{header_write, read_header};
use crate::error::{Error, Result, errno};
use crate::image::persistent::{Change, NewBitmap};
use crate::image::{self, Format, OpenOptions};
use crate::storage::os::{self, OsFile};
use std::path::Path;
use uuid::Uuid;

/// The extension with the note: bytes of the writer's own.
pub const NOTE: u32 = 0x666c_6563;

/// What a carrier has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Carried {
    /// The note.
    pub note: Vec<u8>,
    /// Size of the disk in bytes, rounded up to whole sectors.
    pub size: u64,
    /// Bytes of the disk that one bit stands for.
    pub granularity: u64,
    /// The bits, least significant first.
    pub words: Vec<u64>,
}

/// Makes a carrier for a disk of `size` bytes. EEXIST where `path` exists; EINVAL, EFBIG and ENOSPC for what the format has no
/// room for.
pub fn write(path: &Path, size: u64, bitmap: NewBitmap<'_>, note: &[u8]) -> Result<()> {
    create::create(path, &CreateOptions::new(size))?;
    fill(path, bitmap, note).inspect_err(|_| {
        let _ = std::fs::remove_file(path);
    })
}

fn fill(path: &Path, bitmap: NewBitmap<'_>, note: &[u8]) -> Result<()> {
    let options = OpenOptions { format: Some(Format::Qcow2), keeps_bitmaps: true, no_mark: true, ..Default::default() };
    let image = image::open(path, &options)?;
    let no_bitmaps = || Error::new(errno::EOPNOTSUPP, "carrier", "the image keeps no bitmaps").at_path(path);
    image.persistent().ok_or_else(no_bitmaps)?.finish(&[Change::Store(bitmap)], Uuid::nil())?;
    image.close()?;
    drop(image);
    let file = OsFile::open(path, &os::OpenOptions { write: true, ..Default::default() })?;
    header_write::update(&file, |header| header.extensions.set(NOTE, note.to_vec())).map(drop)
}

/// Reads a carrier. EINVAL where the file is none, or is damaged.
pub fn read(path: &Path) -> Result<Carried> {
    let none = |why: &str| Error::new(errno::EINVAL, "exported checkpoint", why).at_path(path);
    // A pipe would be waited for.
    if !std::fs::metadata(path).map_err(|e| Error::io("open", e).at_path(path))?.is_file() {
        return Err(none("not a file"));
    }
    let file = OsFile::open(path, &os::OpenOptions::default())?;
    let header = read_header(&file)?;
    let Some(note) = header.extensions.find(NOTE).map(<[u8]>::to_vec) else {
        return Err(none("the image is not one that `fleecefs checkpoint export` made"));
    };
    let directory = Directory::read(&file, &header)?.ok_or_else(|| none("its bitmap was removed"))?;
    let [entry] = directory.all.as_slice() else {
        return Err(none("it has other bitmaps than the one that it was made with"));
    };
    let bits = entry.load(&file, &header, directory.consistent)?;
    Ok(Carried { note, size: header.size, granularity: entry.granularity_bytes(), words: bits.words().collect() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_carrier_is_read_as_it_was_written_and_nothing_is_overwritten() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("c.qcow2");
        let bitmap = NewBitmap { name: "monday", granularity_bits: 16, auto: false, words: &[0b1011] };
        write(&path, 4 * 65536 + 1000, bitmap, b"note").unwrap();
        let carried = read(&path).unwrap();
        assert_eq!((carried.note.as_slice(), carried.words.as_slice()), (&b"note"[..], &[0b1011][..]));
        assert_eq!((carried.size, carried.granularity), (4 * 65536 + 1024, 65536));
        assert_eq!(write(&path, 65536, bitmap, b"").unwrap_err().errno(), errno::EEXIST);
        assert_eq!(read(&path).unwrap(), carried);
        // What cannot be stored leaves nothing.
        let other = temp.path().join("d.qcow2");
        let wrong = NewBitmap { words: &[0, 0], ..bitmap };
        assert!(write(&other, 65536, wrong, b"").is_err() && !other.exists());
        create::create(&other, &CreateOptions::new(65536)).unwrap();
        assert!(read(&other).unwrap_err().to_string().contains("checkpoint export"));
        assert_eq!(read(temp.path()).unwrap_err().errno(), errno::EINVAL);
    }
}
