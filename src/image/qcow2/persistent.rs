//! An image's persistent bitmaps and our mark, as the core uses them.
//!
//! The mark is a UUID in an extension of our own, which other programs keep, and an autoclear bit of our own, which
//! whatever opens the image for writing clears. In an image whose first cluster has no room for the extension there is
//! none, nor in one with internal snapshots: `qemu-img check -r` forgets them all where it meets an autoclear bit that it
//! does not know, or a bitmap that records (it then writes the header before it has read their number).

use super::Qcow2Image;
use super::bitmaps::mark_in_use;
use super::bitmaps_format::{COUNT_MAX, DIRECTORY_MAX_BYTES, Directory, Entry, FIXED_BYTES, NAME_MAX_BYTES};
use super::extensions::MARK;
use super::header::{Header, autoclear};
use super::tables::HostOffset;
use super::write::Writer;
use super::{header_write, read_header};
use crate::error::{Error, Result, errno};
use crate::image::Image;
use crate::image::persistent::{
    BITS_MAX_BYTES, Change, LOST_MARK, Mark, PersistentBitmaps, StoredBitmap, StoredBitmaps, Trust,
};
use crate::storage::{Stamp, Storage};
use std::sync::atomic::Ordering;
use uuid::Uuid;

impl Qcow2Image {
    fn bitmap_writer(&self) -> Result<&Writer> {
        self.writer("bitmaps", 0, 0)
    }

    /// The header and the directory as they are in the file; the caller holds the session.
    fn bitmap_directory(&self) -> Result<(Header, Option<Directory>)> {
        let header = read_header(&*self.file)?;
        let directory = Directory::read(&*self.file, &header)?;
        Ok((header, directory))
    }

    /// Entries of tables must not point into the directory of bitmaps.
    fn move_directory(&self, old: &Header, new: &Header) -> Result<()> {
        let place =
            |header: &Header| header.extensions.bitmaps().map(|b| (HostOffset(b.directory_offset), b.directory_bytes));
        if place(old) == place(new) {
            return Ok(());
        }
        if let Some((offset, _)) = place(old) {
            self.file.forget(offset);
        }
        match place(new) {
            Some((offset, bytes)) => self.file.reserve("the bitmap directory", offset, bytes, new.cluster_size()),
            None => Ok(()),
        }
    }
}

impl Qcow2Image {
    /// The mark that the image is to bear: the caller's, unless it bears a note, or is to have none.
    fn mark_to_set(&self, mark: Uuid) -> Option<Uuid> {
        if self.lost.load(Ordering::SeqCst) { Some(LOST_MARK) } else { self.marks.then_some(mark) }
    }

    pub(super) fn found_note(&self) -> Result<Option<String>> {
        let _session = self.writer.as_ref().map(|writer| writer.session.lock());
        if is_lost(&read_header(&*self.file)?) {
            return Ok(Some("the image's mark says so".to_owned()));
        }
        self.file.image.note()
    }

    /// The note is the mark where the image has one, which whoever writes to it keeps, else an attribute of its file.
    pub(super) fn change_note(&self, why: Option<&str>) -> Result<()> {
        let _session = self.writer("note on the image", 0, 0)?.session.lock();
        let header = read_header(&*self.file)?;
        let Some(why) = why else {
            if is_lost(&header) {
                set_mark(&*self.file, None)?;
            }
            self.lost.store(false, Ordering::SeqCst);
            return if self.file.image.note()?.is_some() { self.file.image.set_note(None) } else { Ok(()) };
        };
        if header.extensions.find(MARK).is_some() && set_mark(&*self.file, Some(LOST_MARK)).is_ok() {
            self.lost.store(true, Ordering::SeqCst);
            return Ok(());
        }
        self.file.image.set_note(Some(why))
    }
}

/// Whether the mark in a header says that changes were not recorded.
pub(super) fn is_lost(header: &Header) -> bool {
    header.extensions.find(MARK) == Some(LOST_MARK.as_bytes())
}

/// Puts the mark into the header, or takes it away. An image that has no room for it goes without; from one with
/// internal snapshots it is taken. Who makes one later clears the bit first.
fn set_mark(storage: &dyn Storage, mark: Option<Uuid>) -> Result<()> {
    let set = |header: &mut Header| {
        let Some(mark) = mark.filter(|_| header.nb_snapshots == 0) else {
            header.extensions.remove(MARK);
            header.autoclear_features &= !autoclear::FLEECEFS;
            return;
        };
        header.extensions.set(MARK, mark.as_bytes().to_vec());
        if mark == LOST_MARK {
            header.autoclear_features &= !autoclear::FLEECEFS;
        } else {
            header.autoclear_features |= autoclear::FLEECEFS;
        }
    };
    match header_write::check(storage, set) {
        Err(e) if e.errno() == errno::ENOSPC => {
            log::debug!("{e}");
            Ok(())
        }
        checked => checked.and_then(|()| header_write::update(storage, set).map(drop)),
    }
}

/// What a change of a file changes.
fn traits(stamp: Stamp) -> String {
    format!("{} {} {} {}", stamp.ino, stamp.size, stamp.mtime_ns, stamp.ctime_ns)
}

fn stored(entry: &Entry, header: &Header, consistent: bool) -> StoredBitmap {
    let trust = match entry.fault(header, consistent) {
        None => Trust::Good,
        Some(_) if consistent && entry.in_use() => Trust::InUse,
        Some(why) => Trust::Unusable(why),
    };
    StoredBitmap { name: entry.name.clone(), granularity: entry.granularity_bytes(), auto: entry.auto(), trust }
}

impl StoredBitmaps for Qcow2Image {
    fn list(&self) -> Result<Vec<StoredBitmap>> {
        let _session = self.writer.as_ref().map(|writer| writer.session.lock());
        let (header, directory) = self.bitmap_directory()?;
        let Some(directory) = directory else { return Ok(Vec::new()) };
        Ok(directory.all.iter().map(|entry| stored(entry, &header, directory.consistent)).collect())
    }

    fn load(&self, name: &str) -> Result<Vec<u64>> {
        let _session = self.writer.as_ref().map(|writer| writer.session.lock());
        let (header, directory) = self.bitmap_directory()?;
        let found = directory.iter().flat_map(|d| &d.all).find(|entry| entry.name == name);
        let Some(entry) = found else {
            let what = format!("bitmap '{}'", name.escape_debug());
            return Err(Error::new(errno::ENOENT, what, "there is none of that name").at_path(self.file.path()));
        };
        let bits = entry.released().load(&*self.file, &header, true)?;
        Ok(bits.words().collect())
    }

    fn can_store(&self, name: &str, granularity: u64, others: &[&str]) -> std::result::Result<(), String> {
        if self.header.version < 3 {
            return Err("Cannot store dirty bitmaps in qcow2 v2 files".to_owned());
        }
        if self.size().div_ceil(granularity).div_ceil(8) > BITS_MAX_BYTES {
            return Err("Too much space will be occupied by the bitmap. Use larger granularity".to_owned());
        }
        if name.len() > NAME_MAX_BYTES {
            return Err(format!("Name length exceeds maximum ({NAME_MAX_BYTES} characters)"));
        }
        if others.len() >= COUNT_MAX as usize {
            return Err("Maximum number of persistent bitmaps is already reached".to_owned());
        }
        let entry_bytes = |name: &str| (FIXED_BYTES + name.len()).next_multiple_of(8) as u64;
        let bytes: u64 = others.iter().map(|other| entry_bytes(other)).sum();
        if bytes + entry_bytes(name) > DIRECTORY_MAX_BYTES {
            return Err("Not enough space in the bitmap directory".to_owned());
        }
        Ok(())
    }
}

impl PersistentBitmaps for Qcow2Image {
    fn remove(&self, names: &[&str]) -> Result<()> {
        let mut session = self.bitmap_writer()?.session.lock();
        let (old, directory) = self.bitmap_directory()?;
        let there = directory.iter().flat_map(|directory| &directory.all).map(|entry| entry.name.as_str());
        let changes: Vec<Change<'_>> = there.filter(|name| names.contains(name)).map(Change::Remove).collect();
        if changes.is_empty() {
            return Ok(());
        }
        let new = session.change_bitmaps(&changes)?;
        self.move_directory(&old, &new)
    }

    fn mark(&self) -> Result<Mark> {
        let _session = self.bitmap_writer()?.session.lock();
        let header = read_header(&*self.file)?;
        let uuid = header.extensions.find(MARK).and_then(|bytes| Uuid::from_slice(bytes).ok());
        let intact = header.autoclear_features & autoclear::FLEECEFS != 0;
        let below = self.backing.as_ref().map(|backing| backing.stamp()).transpose()?.map_or_else(String::new, traits);
        let backing = header.backing.map(|name| format!("{} {below}", String::from_utf8_lossy(&name.name)));
        Ok(Mark { uuid, intact, backing })
    }

    fn begin(&self, mark: Uuid) -> Result<()> {
        let _session = self.bitmap_writer()?.session.lock();
        mark_in_use(&*self.file)?;
        set_mark(&*self.file, self.mark_to_set(mark))
    }

    fn finish(&self, changes: &[Change<'_>], mark: Uuid) -> Result<()> {
        let mut session = self.bitmap_writer()?.session.lock();
        if !changes.is_empty() {
            let old = read_header(&*self.file)?;
            let new = session.change_bitmaps(changes)?;
            self.move_directory(&old, &new)?;
        }
        set_mark(&*self.file, self.mark_to_set(mark))
    }
}
