//! Persistent bitmaps, as they are changed; [`bitmaps_format`](super::bitmaps_format) reads and judges them.
//!
//! | when | what |
//! | --- | --- |
//! | an image is opened for writing | [`settle`]: unknown autoclear bits are cleared; bitmaps for which autoclear bit 0 does not vouch are dropped, as QEMU drops them |
//! | before the first write | the good ones are loaded, then [`mark_in_use`] makes durable that their bits no longer count |
//! | at the end, or in between | [`change`]: stores, trusts again, removes |
//!
//! **[`change`] replaces the directory as a whole**, in this order:
//! 1. new bits, new tables, the new directory, all in clusters that nobody uses; sync; their refcounts, durable;
//! 2. the header, with the extension and autoclear bit 0, switches to the new directory ([`header_write::update`]: the old
//!    header or the new one, wherever a power loss cuts);
//! 3. the clusters of what was replaced are freed, and the allocator hands them out only after another flush.
//!
//! So before the switch is durable the old set stands untouched, with each bitmap that was in use still in use; after it
//! everything that the new set refers to is durable. A mixture does not exist. An error in step 1 frees what was
//! written; one in step 2 leaves open which set counts, and the clusters of neither are used again.
//!
//! **[`mark_in_use`] writes the directory in place**, with no more than one bit of each entry changed. An entry is aligned to 8
//! bytes, so that its flags lie within a sector: after a power loss each bitmap is as good as it was, or in use. That
//! the autoclear bit stays set meanwhile vouches for nothing wrong, since nobody has written to the disk yet.
//!
//! Bitmaps that were in use when the image was opened, and those with extra data of an unknown kind, are kept as they
//! are, and can be removed. One of unknown kind that records is marked in use as well: what it misses from then on would
//! make it wrong.
//!
//! The caller serialises all calls, together with all other changes of the header.

use super::alloc::Allocator;
use super::bitmaps_format::{COUNT_MAX, DIRECTORY_MAX_BYTES, Directory, Entry, Piece, flag};
use super::bitmaps_format::{bad, decode_piece};
use super::bitmaps_store::Writer;
use super::check::{Repair, repair};
use super::extensions::{BITMAPS, BitmapsExtension};
use super::header::{Header, autoclear};
use super::refcount::read_table;
use super::tables::HostOffset;
use super::{header_write, read_header};
use crate::error::{Error, Result, errno};
use crate::image::persistent::{BITS_MAX_BYTES, Change, NewBitmap};
use crate::storage::Storage;
use std::collections::HashMap;

/// What an image needs whenever it is opened for writing, before an [`Allocator`] looks at it. Gives the header as it
/// is now. Nothing is written where nothing is to be done.
pub fn settle(storage: &dyn Storage) -> Result<Header> {
    let header = read_header(storage)?;
    let stale = header.extensions.bitmaps().is_some() && header.autoclear_features & autoclear::BITMAPS == 0;
    if header.version < 3 || (header.autoclear_features & !autoclear::KNOWN == 0 && !stale) {
        return Ok(header);
    }
    if stale {
        let names = Directory::read(storage, &header).ok().flatten().map_or_else(String::new, |directory| {
            let names: Vec<String> = directory.all.iter().map(|entry| entry.name.escape_debug().to_string()).collect();
            format!(" ({})", names.join(", "))
        });
        log::warn!(
            "{}: a program without support for bitmaps has written to the image; its bitmaps are dropped{names}",
            storage.path().display()
        );
    }
    let header = header_write::update(storage, |header| {
        header.autoclear_features &= autoclear::KNOWN;
        if stale {
            header.extensions.remove(BITMAPS);
        }
    })?;
    if stale && let Err(e) = repair(storage, Repair::Leaks) {
        log::warn!("the clusters of the dropped bitmaps stay in use: {e}");
    }
    Ok(header)
}

/// Marks as in use, durably, each good bitmap and each that records, before the first write to the disk. Gives the
/// directory as it is now.
pub fn mark_in_use(storage: &dyn Storage) -> Result<Option<Directory>> {
    let header = read_header(storage)?;
    let Some(mut directory) = Directory::read(storage, &header)? else { return Ok(None) };
    let mut changed = false;
    for entry in directory.all.iter_mut().filter(|entry| directory.consistent && !entry.in_use()) {
        if entry.auto() || entry.fault(&header, true).is_none() {
            entry.flags |= flag::IN_USE;
            changed = true;
        }
    }
    if changed {
        storage.write_at(&encode(directory.all.iter()), directory.offset.0)?;
        storage.sync()?;
    }
    Ok(Some(directory))
}

/// Makes the changes, all or none, durably; the module says how. Gives the header as it is now.
///
/// ENOENT for a name that is not there; EINVAL, ENOSPC and EEXIST, and nothing touched, where the result would break a
/// rule or a limit of the format.
pub fn change(storage: &dyn Storage, allocator: &mut Allocator, changes: &[Change<'_>]) -> Result<Header> {
    let at = |e: Error| e.at_path(storage.path());
    let header = read_header(storage)?;
    if changes.is_empty() {
        return Ok(header);
    }
    let old = Directory::read(storage, &header)?;
    let mut set = Set::new(&header, old.as_ref(), changes).map_err(at)?;
    header_write::check(storage, |header| set.publish(header, u64::MAX))?;
    let mut writer = Writer::new(storage, allocator, header.cluster_bits);
    let offset = match set.write(&mut writer).and_then(|offset| writer.finish().map(|()| offset)) {
        Ok(offset) => offset,
        Err(e) => {
            writer.abandon();
            return Err(e);
        }
    };
    // Which set counts is open where that fails: the clusters of neither are used again.
    let switched = header_write::update(storage, |header| set.publish(header, offset));
    let header = switched.inspect_err(|_| allocator.note_leaks())?;
    if let Some(old) = &old {
        release(storage, allocator, &header, old, &set.replaced);
    }
    let clusters = set.bytes().div_ceil(header.cluster_size());
    if clusters > 0 {
        let first = offset >> header.cluster_bits;
        allocator.protect(first..first + clusters, "the bitmap directory");
    }
    Ok(header)
}

/// The bitmaps as they are to be.
struct Set<'a> {
    /// Entries, and the bitmaps that are to be written for them.
    all: Vec<(Entry, Option<NewBitmap<'a>>)>,
    /// Entries of the old directory whose clusters are not used any more.
    replaced: Vec<Entry>,
}

impl<'a> Set<'a> {
    fn new(header: &Header, old: Option<&Directory>, changes: &[Change<'a>]) -> Result<Set<'a>> {
        if header.version < 3 {
            return Err(Error::new(errno::EOPNOTSUPP, "qcow2 bitmaps", "an image of version 2 cannot have bitmaps")
                .hint("make it one of version 3 with: qemu-img amend -o compat=1.1 IMAGE"));
        }
        if old.is_some_and(|old| !old.consistent) {
            return Err(bad("directory", "autoclear bit 0 does not vouch for it: open the image for writing first"));
        }
        let mut pending = HashMap::new();
        for change in changes {
            if pending.insert(change.name(), change).is_some() {
                return Err(bad(format!("'{}'", change.name().escape_debug()), "is to be changed twice"));
            }
        }
        let mut set = Set { all: Vec::new(), replaced: Vec::new() };
        for entry in old.map_or(&[][..], |old| &old.all) {
            set.carry(header, entry, pending.remove(entry.name.as_str()))?;
        }
        for change in changes.iter().filter(|change| pending.contains_key(change.name())) {
            let Change::Store(bitmap) = change else {
                let what = format!("bitmap '{}'", change.name().escape_debug());
                return Err(Error::new(errno::ENOENT, what, "there is none of that name"));
            };
            set.all.push((new_entry(header, bitmap)?, Some(*bitmap)));
        }
        if set.all.len() > COUNT_MAX as usize || set.bytes() > DIRECTORY_MAX_BYTES {
            let why = format!("{} bitmaps with a directory of {} bytes", set.all.len(), set.bytes());
            return Err(Error::new(errno::ENOSPC, "qcow2 bitmaps", format!("{why} are more than an image can have"))
                .hint("remove bitmaps that are no longer needed"));
        }
        Ok(set)
    }

    /// Takes over an entry of the old directory, changed as told.
    fn carry(&mut self, header: &Header, old: &Entry, change: Option<&Change<'a>>) -> Result<()> {
        let what = || format!("bitmap '{}'", old.name.escape_debug());
        match change {
            None => self.all.push((old.clone(), None)),
            Some(Change::Remove(_)) => self.replaced.push(old.clone()),
            Some(Change::Trust(_)) => {
                let entry = old.released();
                if let Some(why) = entry.fault(header, true) {
                    return Err(bad(what(), why));
                }
                self.all.push((entry, None));
            }
            Some(Change::Store(bitmap)) => {
                let compatible = old.flags & flag::EXTRA_DATA_COMPATIBLE;
                if !old.extra.is_empty() && compatible == 0 {
                    let why = "one with extra data of an unknown kind has that name";
                    return Err(Error::new(errno::EEXIST, what(), why));
                }
                let new = new_entry(header, bitmap)?;
                let entry = Entry { flags: new.flags | compatible, extra: old.extra.clone(), ..new };
                self.all.push((entry, Some(*bitmap)));
                self.replaced.push(old.clone());
            }
        }
        Ok(())
    }

    /// Bytes of the directory.
    fn bytes(&self) -> u64 {
        self.all.iter().map(|(entry, _)| entry.len_bytes() as u64).sum()
    }

    /// Step 1: writes what is new; gives the directory's offset, 0 where there is to be none.
    fn write(&mut self, writer: &mut Writer<'_>) -> Result<u64> {
        for (entry, bitmap) in &mut self.all {
            if let Some(bitmap) = bitmap {
                let table = writer.bitmap(bitmap)?;
                (entry.table_offset, entry.table_entries) = (table.offset, table.entries);
            }
        }
        if self.all.is_empty() {
            return Ok(0);
        }
        Ok(writer.row(encode(self.all.iter().map(|(entry, _)| entry)))?.0)
    }

    /// Step 2: what the header says of a directory at `offset`.
    fn publish(&self, header: &mut Header, offset: u64) {
        if self.all.is_empty() {
            header.extensions.remove(BITMAPS);
            header.autoclear_features &= !autoclear::BITMAPS;
            return;
        }
        header.autoclear_features |= autoclear::BITMAPS;
        header.extensions.set_bitmaps(BitmapsExtension {
            count: self.all.len() as u32,
            reserved: 0,
            directory_bytes: self.bytes(),
            directory_offset: offset,
        });
    }
}

/// The entry of a bitmap that has no table yet.
fn new_entry(header: &Header, bitmap: &NewBitmap<'_>) -> Result<Entry> {
    bitmap.check(header.size)?;
    Ok(Entry {
        table_offset: HostOffset::default(),
        table_entries: 0,
        flags: if bitmap.auto { flag::AUTO } else { 0 },
        granularity_bits: bitmap.granularity_bits,
        name: bitmap.name.to_owned(),
        extra: Vec::new(),
    })
}

fn encode<'a>(entries: impl Iterator<Item = &'a Entry>) -> Vec<u8> {
    let mut directory = Vec::new();
    entries.for_each(|entry| entry.encode(&mut directory));
    directory
}

/// Step 3: frees the old directory, and the bitmaps that are gone. The new set counts already, so what cannot be freed
/// is a leak, and no reason to fail.
fn release(storage: &dyn Storage, allocator: &mut Allocator, header: &Header, old: &Directory, replaced: &[Entry]) {
    let clusters = |offset: u64, bytes: u64| {
        let first = offset >> header.cluster_bits;
        first..first + bytes.div_ceil(header.cluster_size())
    };
    let first = old.offset.0 >> header.cluster_bits;
    allocator.unprotect(first);
    let mut free: Vec<u64> = clusters(old.offset.0, old.bytes).collect();
    for entry in replaced {
        match pieces(storage, entry, header) {
            Ok(pieces) => {
                free.extend(clusters(entry.table_offset.0, u64::from(entry.table_entries) * 8));
                free.extend(pieces.into_iter().map(|offset| offset >> header.cluster_bits));
            }
            Err(e) => log::warn!("the clusters of bitmap '{}' stay in use: {e}", entry.name.escape_debug()),
        }
    }
    for cluster in free {
        if let Err(e) = allocator.free(cluster) {
            log::warn!("{e}");
        }
    }
}

/// Offsets of the clusters that hold the bits of a bitmap.
fn pieces(storage: &dyn Storage, entry: &Entry, header: &Header) -> Result<Vec<u64>> {
    let entries = u64::from(entry.table_entries);
    // Of a bitmap in use nobody has compared the table with the disk.
    if entries * header.cluster_size() > BITS_MAX_BYTES {
        return Err(bad("table", format!("{entries} entries stand for more than 512 MiB of bits")));
    }
    let mut offsets = Vec::new();
    for raw in read_table(storage, entry.table_offset.0, entries)? {
        if let Piece::Stored(offset) = decode_piece(raw, header.cluster_size())? {
            offsets.push(offset.0);
        }
    }
    Ok(offsets)
}

#[cfg(test)]
#[path = "bitmaps_tests.rs"]
mod tests;
