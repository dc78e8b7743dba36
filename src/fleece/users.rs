//! Users' bitmaps over opens, closes and resizes; `bitmaps` has what users do with them.
//!
//! | a bitmap | while the disk is served | at a clean close | found after a kill | found after anything else |
//! | --- | --- | --- | --- | --- |
//! | records | words in memory | in the image; else in an area | the words | inconsistent, unless the image has it good |
//! | disabled | an area, or the image | in the image; else the area | as it was | as it was |
//! | not persistent | as the others | forgotten | forgotten | forgotten |
//!
//! * After a power loss, one that recorded has what is durable of it and all of the armed regions, and records on.
//! * A bitmap that is persistent and not (or no longer) in the image was made since the last clean close, and the
//!   directory has all of it; where the last close was clean, another program has removed it since.
//! * What a growing disk gets is clean in users' bitmaps, as in QEMU; what is cut off is forgotten, and does not come
//!   back when the disk grows again.

use super::disk::Disk;
use super::persistent::Bitmaps;
use super::tracking::{Recording, fine_name};
use crate::bitmap::{BitmapEntry, Bits, Directory, DirtyBitmap, UserBitmap, UserBitmapState};
use crate::error::{Error, Result, errno};
use crate::image::persistent::{StoredBitmap, Trust};
use crate::storage::Shm;
use std::sync::Arc;
use uuid::Uuid;

/// What a recovery goes by.
pub(super) struct Known<'a> {
    /// Nobody but us has written to the image.
    pub nobody_wrote: bool,
    /// The last close was clean.
    pub clean: bool,
    /// The bits of a bitmap that recorded, where they are known.
    pub bits: &'a dyn Fn(&BitmapEntry) -> Option<DirtyBitmap>,
}

/// The bitmaps of users: those that record, in new words, and what the directory is to say of all.
pub(super) fn recover(
    image: &Bitmaps<'_>,
    directory: &Directory,
    shm: &dyn Shm,
    known: &Known<'_>,
) -> Result<(Vec<Recording>, Vec<UserBitmap>)> {
    let (mut recording, mut users) = (Vec::new(), Vec::new());
    for stored in image.of_users(directory) {
        let entry = directory.bitmaps.iter().find(|entry| known.nobody_wrote && entry.name == stored.name);
        let (user, bits) = found_in_image(image, stored, entry.filter(|entry| entry.persistent), known);
        take(user, bits, image.size, shm, &mut recording, &mut users)?;
    }
    let elsewhere = |user: &&UserBitmap| image.of_users(directory).all(|stored| stored.name != user.name);
    for user in directory.bitmaps.iter().filter(|user| user.persistent).filter(elsewhere) {
        if image.kept && known.clean {
            log::warn!("bitmap '{}' was removed from the image by another program", user.name.escape_debug());
            continue;
        }
        let usable = !image.kept || known.nobody_wrote;
        let (mut user, mut bits) = (user.clone(), None);
        match user.state {
            UserBitmapState::Recording if usable => bits = (known.bits)(&user.bitmap),
            UserBitmapState::Recording => (),
            _ if usable && user.bitmap.everything.is_none() => {
                users.push(user);
                continue;
            }
            _ => (),
        }
        user.state = UserBitmapState::Inconsistent;
        take(user, bits, image.size, shm, &mut recording, &mut users)?;
    }
    for user in users.iter_mut().filter(|user| user.state != UserBitmapState::Recording) {
        // What a shrink that was killed has cut off does not come back either.
        user.bitmap.size = user.bitmap.size.min(image.size);
    }
    // Oldest first; of what came with the image the order of the file.
    users.sort_by_key(|user| user.time_ns);
    Ok((recording, users))
}

/// What becomes of a bitmap in the image, and its bits where it records.
fn found_in_image(
    image: &Bitmaps<'_>,
    stored: &StoredBitmap,
    entry: Option<&UserBitmap>,
    known: &Known<'_>,
) -> (UserBitmap, Option<DirtyBitmap>) {
    let mut user = UserBitmap {
        name: stored.name.clone(),
        state: UserBitmapState::Inconsistent,
        // Under its old name among the words: until the new directory stands, a kill looks for it there.
        bitmap: entry_of(entry.map_or_else(Uuid::new_v4, |entry| entry.bitmap.uuid), stored.granularity, image.size),
        persistent: true,
        read_only: !image.kept,
        time_ns: entry.map_or(0, |entry| entry.time_ns),
    };
    let bits = match (&stored.trust, entry) {
        (Trust::Good, _) if stored.auto => {
            let lost = |e: &Error| log::error!("bitmap '{}' is lost: {e}", stored.name.escape_debug());
            image.load(stored).inspect_err(lost).ok()
        }
        (Trust::Good, _) => {
            user.state = UserBitmapState::Disabled;
            None
        }
        (Trust::InUse, Some(entry)) if entry.state == UserBitmapState::Recording => (known.bits)(&entry.bitmap),
        (Trust::InUse, Some(entry)) => {
            user = entry.clone();
            None
        }
        _ => None,
    };
    (user, bits)
}

/// Notes a bitmap; where there are bits, it records.
fn take(
    mut user: UserBitmap,
    bits: Option<DirtyBitmap>,
    size: u64,
    shm: &dyn Shm,
    recording: &mut Vec<Recording>,
    users: &mut Vec<UserBitmap>,
) -> Result<()> {
    user.bitmap = match &bits {
        Some(bits) => {
            let one = in_words(bits, user.bitmap.uuid, size, shm)?;
            user.state = UserBitmapState::Recording;
            let entry = entry_of(one.uuid, bits.granularity(), size);
            recording.push(one);
            entry
        }
        None => user.bitmap,
    };
    users.push(user);
    Ok(())
}

/// A copy of a bitmap for a disk of `size` bytes that outlives this process.
fn in_words(bits: &DirtyBitmap, uuid: Uuid, size: u64, shm: &dyn Shm) -> Result<Recording> {
    let count = DirtyBitmap::bits_for(bits.granularity(), size)?;
    let words = shm.create(&fine_name(uuid), Bits::words_for(count))?;
    let bitmap = bits.resized(size, Bits::zeroed(words, count), false)?;
    Ok(Recording { uuid, bitmap: Arc::new(bitmap), area: None })
}

/// The entry of a bitmap without an area.
fn entry_of(uuid: Uuid, granularity: u64, size: u64) -> BitmapEntry {
    BitmapEntry { uuid, granularity, size, area: None, crc: None, everything: None, dirty: 0 }
}

impl Disk {
    /// The bits of a user's bitmap as they are now, as a copy of the disk's size; none set where they are lost.
    pub(super) fn load_user(&self, user: &UserBitmap) -> Result<DirtyBitmap> {
        let (entry, size) = (&user.bitmap, self.size());
        let clear = || DirtyBitmap::heap(entry.granularity, size);
        let found = match user.state {
            UserBitmapState::Inconsistent => return clear(),
            UserBitmapState::Disabled if entry.area.is_none() && entry.everything.is_none() => {
                let image = self.image().stored();
                let words = image.map_or_else(|| Ok(Vec::new()), |image| image.load(&user.name))?;
                let mut bits = Bits::heap(DirtyBitmap::bits_for(entry.granularity, entry.size)?);
                bits.or_words(0, words);
                DirtyBitmap::new(entry.granularity, entry.size, bits)?
            }
            // Where changes were not known, its bits say everything.
            _ => self.tracking.load(&BitmapEntry { everything: None, ..entry.clone() }).map_err(|why| {
                Error::new(errno::EIO, format!("bitmap '{}' of disk '{}'", user.name.escape_debug(), self.name()), why)
            })?,
        };
        let bits = Bits::heap(DirtyBitmap::bits_for(entry.granularity, size)?);
        found.resized(size, bits, false)
    }

    /// At a clean close: saves the bitmaps that record, where the image keeps none.
    pub(super) fn seal_users(&self, directory: &Directory, sealed: &mut Vec<BitmapEntry>) -> Result<()> {
        if self.image().persistent().is_some() {
            return Ok(());
        }
        let recording = self.tracking.recording();
        for user in directory.bitmaps.iter().filter(|user| user.persistent) {
            if let Some(one) = recording.iter().find(|one| one.uuid == user.bitmap.uuid) {
                sealed.push(self.tracking.seal(one, None)?);
            }
        }
        Ok(())
    }

    /// Whether a recording bitmap is a checkpoint's: what a growing disk gets is dirty in those.
    pub(super) fn grows_dirty(&self, recording: &Recording) -> bool {
        let users = &self.tracking.directory().bitmaps;
        users.iter().all(|user| user.bitmap.uuid != recording.uuid)
    }
}

/// What a shrinking disk cuts off disabled bitmaps does not come back.
pub(super) fn cut_disabled(directory: &mut Directory, size: u64) {
    for user in directory.bitmaps.iter_mut().filter(|user| user.state != UserBitmapState::Recording) {
        user.bitmap.size = user.bitmap.size.min(size);
    }
}
