//! From an open file to one whose header is believed; for writing, to one that may be changed.
//!
//! A read-write open changes an image only when nothing can be refused any more: header, internal snapshots, the files
//! that it names and everything below it are good, its refcounts can be read. Then, in this order: refcounts that may be
//! wrong (the dirty bit, or version 2, which has none) are checked and repaired ([`prepare`]), which refuses an image
//! that it cannot cure untouched; autoclear bits that this program does not know are cleared, bitmaps that they do not
//! vouch for dropped, and what an earlier kill left in the page cache is made durable ([`begin`]).

use super::Files;
use super::bitmaps;
use super::bitmaps_format::Directory;
use super::check::{Repair, repair};
use super::header::{Header, autoclear};
use super::host::HostFile;
use super::mapping::Mapping;
use super::read_header;
use super::snapshots;
use super::tables::{L1Entry, decode_l1};
use crate::error::{Error, Result, errno};
use crate::image::Image;
use crate::image::raw::RawImage;
use crate::storage::{Stamp, Storage};

/// Where the header keeps `autoclear_features`.
const AUTOCLEAR_AT: u64 = 88;
/// What a stamp looks at: the header and, of most images, its extensions.
const STAMPED_HEADER_BYTES: u64 = 4096;

/// Reads the header; opens the external data file with `open_data`, which gives one where the header asks for it. Changes
/// nothing. A corrupt image is refused where it is open for writing.
pub(super) fn read(image: RawImage, open_data: impl FnOnce(&Header) -> Result<Option<RawImage>>) -> Result<Files> {
    let plain = HostFile::of_data(image);
    let header = read_header(&plain)?;
    if !plain.image.read_only() {
        refuse_corrupt(&plain, &header)?;
        if header.autoclear_features & autoclear::BITMAPS != 0 {
            Directory::read(&plain, &header)?;
        }
    }
    let data = open_data(&header)?.map(HostFile::of_data);
    let found = own_stamp(&plain, data.as_ref())?;
    let keep_bytes = plain.bytes();
    Ok(Files { file: HostFile::of_image(plain.image, &header), header, data, found, keep_bytes })
}

/// Repairs refcounts that may be wrong, of an image that is open for writing. The internal snapshots are looked at
/// before anything is changed.
pub(super) fn prepare(mut files: Files) -> Result<Files> {
    let may_be_wrong = files.header.is_dirty() || files.header.version < 3;
    if files.file.image.read_only() || !may_be_wrong {
        return Ok(files);
    }
    snapshots::read(&files.header, &files.file)?;
    mend(&files.file, &files.header)?;
    if files.header.is_dirty() {
        files.keep_bytes = 0;
    }
    files.header = read_header(&files.file)?;
    // The refcount table may lie elsewhere now.
    files.file = HostFile::of_image(files.file.image, &files.header);
    Ok(files)
}

/// The first changes of an image of which nothing is left to be refused. With `keeps_bitmaps` the persistent bitmaps
/// stay; else they become inconsistent.
pub(super) fn begin(header: &mut Header, file: &HostFile, data: Option<&HostFile>, keeps_bitmaps: bool) -> Result<()> {
    if let Some(data) = data {
        data.sync()?;
        if data.bytes() < header.size && !data.image.is_block_device() {
            data.grow(header.size)?;
        }
    }
    if keeps_bitmaps {
        *header = bitmaps::settle(file)?;
    } else {
        clear_unknown(file, header)?;
    }
    file.sync()
}

/// The stamp of an image's own files, which shows a change of its header too.
pub(super) fn own_stamp(file: &HostFile, data: Option<&HostFile>) -> Result<Stamp> {
    let mut header = vec![0; file.bytes().min(STAMPED_HEADER_BYTES) as usize];
    file.read_at(&mut header, 0)?;
    let data = data.map(Storage::stamp).transpose()?;
    let file = file.stamp()?;
    Ok(file.with_others(file.size, data.as_slice(), &header))
}

fn mend(file: &HostFile, header: &Header) -> Result<()> {
    if header.is_dirty() {
        log::info!("{}: was not closed; its refcounts are rebuilt", file.path().display());
    }
    let repaired = repair(file, Repair::All)?;
    if !repaired.after.is_clean() || repaired.after.dirty {
        return Err(Error::new(errno::EIO, "repair", "faults are left that it does not cure")
            .at_path(file.path())
            .hint("look at them with: fleecefs check IMAGE"));
    }
    if repaired.before.corruptions > 0 && !header.is_dirty() {
        log::warn!("{}: {} faults in refcounts repaired", file.path().display(), repaired.before.corruptions);
    }
    Ok(())
}

fn refuse_corrupt(file: &HostFile, header: &Header) -> Result<()> {
    if !header.is_corrupt() {
        return Ok(());
    }
    Err(Error::new(errno::EIO, "open", "the image is marked corrupt, and can be opened for reading only")
        .at_path(file.path())
        .hint("repair it with: fleecefs check --repair IMAGE"))
}

fn clear_unknown(file: &HostFile, header: &mut Header) -> Result<()> {
    // What the bitmaps record would miss our writes, and our mark would vouch for them.
    let kept = header.autoclear_features & autoclear::RAW_DATA_FILE;
    if kept != header.autoclear_features {
        file.write_at(&kept.to_be_bytes(), AUTOCLEAR_AT)?;
        header.autoclear_features = kept;
    }
    Ok(())
}

/// Notes where the L2 tables lie, so that no guest data are written there. Refuses one where a refcount block is noted:
/// each change of one would change the other.
pub(super) fn note_tables(file: &HostFile, mapping: &Mapping, header: &Header) -> Result<()> {
    let (_, tables) = mapping.l1();
    let mut offsets = Vec::new();
    for raw in tables {
        // An entry that is wrong is an error where it is used.
        if let Ok(L1Entry::Table { offset, .. }) = decode_l1(raw, &header.geometry()) {
            file.check_not_table("an L2 table", offset)?;
            offsets.push(offset.0);
        }
    }
    file.note_tables(offsets);
    Ok(())
}
