//! What an image itself keeps for us: bitmaps, and our mark.
//!
//! While a disk is served, the bitmaps in its image are in use; bits stand in memory, beside those of the recording
//! checkpoint. A clean close stores them, and with them the recording checkpoint's under the checkpoint's name, auto: so
//! a guest that runs for a while under plain QEMU goes on recording, and its chain of checkpoints stays whole.
//!
//! The mark says whether another program has opened the image for writing since:
//!
//! | sidecar | mark in the image | proved |
//! | --- | --- | --- |
//! | CLEAN | the directory's, intact | nobody wrote since the close |
//! | OPEN | the session's nonce, intact | nobody wrote but the session that was killed |
//! | OPEN | the directory's, intact | nobody wrote: the session was killed before it began, or when it had closed the image |
//! | any | the directory's, not intact | others may have written to what the image was then |
//! | any | another | nothing |
//! | any | none | nothing |
//!
//! The mark tells of those who open the image as an image; the stamp (see `recover`) of those who write to its files
//! past the format, or put another file in their place. Both have to be right, but that after a clean close others may
//! have opened it, as long as what lies below it is the same.
//!
//! For that a new session first has the mark that it found in the directory, then its superblock {OPEN, nonce} and the
//! outcome, then the image's bitmaps in use and the nonce as mark, each durable; then it takes the found mark out of the
//! directory, and only then are writes accepted. A close writes the mark to be into the directory, then stores the
//! bitmaps, then the mark.
//!
//! Who is believed: a bitmap that is good in the file for itself. The recording checkpoint's only if it is auto, of
//! equal granularity, where the mark is known, and if it has at least the bits that the sidecar kept at the close; what
//! lies behind the size of then counts as changed. Bitmaps in use are believed from memory where nobody else wrote,
//! and after a power loss from what is durable and armed. Else they are inconsistent, and the checkpoint's says
//! everything.
//!
//! Not seen: somebody who removes the checkpoint's bitmap from the image after writes that nobody else recorded, and
//! makes one of the same name, when nothing had changed between the checkpoint and the close.

use super::disk::Disk;
use super::tracking::{Recording, recording_checkpoint, recording_entry};
use crate::bitmap::{
    BitmapEntry, Bits, CheckpointEntry, Directory, DirtyBitmap, InImage, State, Superblock, UserBitmap, UserBitmapState,
};
use crate::error::{Error, Result};
use crate::image::Image;
use crate::image::persistent::{
    BITS_MAX_BYTES, Change, LOST_MARK, Mark, NewBitmap, PersistentBitmaps, StoredBitmap, StoredBitmaps, Trust,
};
use crate::sync::atomic::Ordering;
use std::sync::Arc;
use uuid::Uuid;

/// What the mark in an image proves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Proof {
    /// Nothing: there is none.
    NoMark,
    /// Nobody else wrote.
    Ours,
    /// Others may have written since our clean close.
    SinceClose,
    /// Others may have written since we were killed.
    SinceKill,
    /// Others changed what lies below the image.
    Rebased,
    /// Others wrote to its files, and not as to an image, or may have without a trace.
    Touched,
    /// The image is not what we left.
    Unknown,
}

impl Proof {
    /// Why changes are not known, where that follows.
    pub(super) fn reason(self) -> Option<&'static str> {
        match self {
            Proof::NoMark | Proof::Ours | Proof::Touched => None,
            Proof::SinceClose => Some("another program wrote to the image since the last clean stop"),
            Proof::SinceKill => Some("another program wrote to the image after fleecefs was killed"),
            Proof::Rebased => Some("another program changed the backing file of the image"),
            Proof::Unknown => Some("the image is not the one that fleecefs left"),
        }
    }

    /// The image's stamp says that somebody wrote.
    pub(super) fn touched(self) -> Proof {
        if self == Proof::Ours { Proof::Touched } else { self }
    }

    /// Nothing that the image says of writers is believed.
    pub(super) fn distrusted(self) -> Proof {
        if self.is_ours() { Proof::Touched } else { self }
    }

    /// Whether it is our image at all.
    fn is_ours(self) -> bool {
        !matches!(self, Proof::NoMark | Proof::Unknown)
    }
}

/// Looks at the mark, before it is changed.
pub(super) fn prove(image: &dyn Image, superblock: &Superblock, directory: &Directory) -> Result<Proof> {
    let Some(mark) = image.persistent().map(PersistentBitmaps::mark).transpose()? else { return Ok(Proof::NoMark) };
    let Some(uuid) = mark.uuid else { return Ok(Proof::NoMark) };
    if uuid == LOST_MARK {
        return Ok(Proof::Touched);
    }
    let of_session = matches!(superblock.state, State::Open { nonce, .. } if nonce == uuid);
    let of_close = directory.in_image.mark == Some(uuid);
    let known = &directory.in_image;
    Ok(match (of_session, of_close, mark.intact) {
        // What changes around the image during a session, the stamp tells.
        (true, _, true) => Proof::Ours,
        (true, _, false) => Proof::SinceKill,
        (_, false, _) => Proof::Unknown,
        _ if mark.backing != known.backing => Proof::Rebased,
        (_, _, true) => Proof::Ours,
        (_, _, false) => Proof::SinceClose,
    })
}

/// A recovery's look at the bitmaps of an image.
pub(super) struct Bitmaps<'a> {
    image: Option<&'a dyn StoredBitmaps>,
    /// The image is open for writing, so that its bitmaps are kept.
    pub(super) kept: bool,
    pub(super) size: u64,
    pub(super) proof: Proof,
    mark: Option<Mark>,
    stored: Vec<StoredBitmap>,
}

impl<'a> Bitmaps<'a> {
    /// Lists what is there, by what `proof` makes of it.
    pub(super) fn new(image: &'a dyn Image, proof: Proof) -> Result<Bitmaps<'a>> {
        let persistent = image.persistent();
        // What is opened for reading only is looked at; version 2 has none.
        let readable = image.stored().filter(|_| persistent.is_some() || (image.read_only() && !image.is_shared()));
        let stored = match readable.map(|image| image.list()).transpose() {
            Ok(stored) => stored.unwrap_or_default(),
            Err(e) if persistent.is_none() => {
                log::warn!("{e}");
                Vec::new()
            }
            Err(e) => return Err(e),
        };
        let mark = persistent.map(PersistentBitmaps::mark).transpose()?;
        Ok(Bitmaps { mark, image: readable, kept: persistent.is_some(), size: image.size(), proof, stored })
    }

    /// The bits of the recording checkpoint as the image has them; `kept` is the sidecar's copy of the close, where
    /// there is one. The error is why they are not believed.
    pub(super) fn checkpoint(
        &self,
        directory: &Directory,
        entry: &CheckpointEntry,
        kept: Option<std::result::Result<DirtyBitmap, String>>,
    ) -> std::result::Result<DirtyBitmap, String> {
        if !matches!(self.proof, Proof::Ours | Proof::SinceClose) {
            return Err("the image is not the one that was closed".to_owned());
        }
        let ours = directory.in_image.checkpoints.contains(&entry.name);
        let stored = self.stored.iter().find(|stored| ours && stored.name == entry.name);
        let Some(stored) = stored else { return Err("the image has no bitmap of the checkpoint".to_owned()) };
        match &stored.trust {
            Trust::Good if stored.auto && stored.granularity == entry.bitmap.granularity => (),
            Trust::Good => return Err("the bitmap in the image was changed".to_owned()),
            Trust::InUse => return Err("the bitmap in the image is in use".to_owned()),
            Trust::Unusable(why) => return Err(format!("the bitmap in the image cannot be used: {why}")),
        }
        let bitmap = self.load(stored).map_err(|e| format!("the bitmap in the image cannot be read: {e}"))?;
        if let Some(kept) = kept
            && !has_all(&bitmap, &kept?)
        {
            return Err("the bitmap in the image has lost changes".to_owned());
        }
        if entry.bitmap.size < self.size {
            bitmap.mark(entry.bitmap.size, self.size - entry.bitmap.size);
        }
        Ok(bitmap)
    }

    /// Those that are not a checkpoint's.
    pub(super) fn of_users(&self, directory: &Directory) -> impl Iterator<Item = &StoredBitmap> {
        let ours = directory.in_image.checkpoints.clone();
        self.stored.iter().filter(move |stored| !ours.contains(&stored.name))
    }

    pub(super) fn load(&self, stored: &StoredBitmap) -> Result<DirtyBitmap> {
        let words = self.image.map_or(Ok(Vec::new()), |image| image.load(&stored.name))?;
        let mut bits = Bits::heap(DirtyBitmap::bits_for(stored.granularity, self.size)?);
        bits.or_words(0, words);
        DirtyBitmap::new(stored.granularity, self.size, bits)
    }

    /// Notes the mark that was found, where it proves that nobody else wrote: a session that is killed before it has
    /// begun leaves the image with it.
    pub(super) fn keep_mark(&self, in_image: &mut InImage) {
        if let (Proof::Ours, Some(Mark { uuid: Some(uuid), backing, .. })) = (self.proof, &self.mark) {
            (in_image.mark, in_image.backing) = (Some(*uuid), backing.clone());
        }
    }

    /// The names of checkpoints' bitmaps that are still there, where it is our image.
    pub(super) fn checkpoint_names(&self, directory: &Directory, nobody_wrote: bool) -> Vec<String> {
        let ours = nobody_wrote || self.proof.is_ours();
        let there = |name: &&String| ours && self.stored.iter().any(|stored| stored.name == **name);
        directory.in_image.checkpoints.iter().filter(there).cloned().collect()
    }
}

/// Whether every bit of `kept` is set in `now`, as far as both reach.
fn has_all(now: &DirtyBitmap, kept: &DirtyBitmap) -> bool {
    let (now, kept) = (now.bits(), kept.bits());
    let mut words = kept.words().zip(now.words());
    words.all(|(kept, now)| kept & !now == 0)
        // Where the disk was cut off, the last word may have lost bits behind its end.
        || (now.len() < kept.len() && (0..now.len()).all(|bit| now.get(bit) || !kept.get(bit)))
}

/// What is stored at a close.
struct ToStore {
    name: String,
    granularity: u64,
    auto: bool,
    words: Vec<u64>,
}

impl ToStore {
    fn new(name: &str, auto: bool, bitmap: &DirtyBitmap) -> ToStore {
        let words = bitmap.bits().words().collect();
        ToStore { name: name.to_owned(), granularity: bitmap.granularity(), auto, words }
    }

    fn change(&self) -> Change<'_> {
        let granularity_bits = self.granularity.trailing_zeros() as u8;
        Change::Store(NewBitmap { name: &self.name, granularity_bits, auto: self.auto, words: &self.words })
    }
}

/// What turns the bitmaps that are there into those that are to be.
fn changes<'a>(
    there: &[StoredBitmap],
    directory: &'a Directory,
    checkpoint: Option<&'a ToStore>,
    users: &'a [Option<ToStore>],
) -> Vec<Change<'a>> {
    let is_there = |name: &String| there.iter().any(|stored| stored.name == *name);
    let old = directory.in_image.checkpoints.iter().filter(|name| is_there(name));
    let old = old.filter(|name| checkpoint.is_none_or(|checkpoint| checkpoint.name != **name));
    let mut changes: Vec<Change<'_>> = old.map(|name| Change::Remove(name)).collect();
    changes.extend(checkpoint.map(ToStore::change));
    for (user, stored) in directory.bitmaps.iter().zip(users) {
        match (stored, user.state) {
            (Some(stored), _) => changes.push(stored.change()),
            (None, UserBitmapState::Disabled) if user.bitmap.area.is_none() && is_there(&user.name) => {
                changes.push(Change::Trust(&user.name));
            }
            _ => (),
        }
    }
    changes
}

impl Disk {
    /// The image's bitmaps are ours from here on, and nobody else's mark: before the first write.
    pub(super) fn begin_in_image(&self) -> Result<()> {
        let Some(image) = self.image().persistent() else { return Ok(()) };
        let State::Open { nonce, .. } = self.tracking.sidecar.superblock().state else { return Ok(()) };
        self.tracking.note_write();
        image.begin(nonce)?;
        self.tracking.note_write();
        self.marked.store(image.mark()?.uuid.is_some_and(|uuid| uuid != LOST_MARK), Ordering::SeqCst);
        self.tracking.sidecar.commit(|directory| {
            directory.in_image.mark = None;
            Ok(())
        })
    }

    /// Whether the mark of the session is still in the image; `None` where the image has no mark.
    pub(super) fn mark_is_ours(&self) -> Result<Option<bool>> {
        let Some(image) = self.image().persistent() else { return Ok(None) };
        let mark = image.mark()?;
        let State::Open { nonce, .. } = self.tracking.sidecar.superblock().state else { return Ok(None) };
        // That of a note is none of others.
        Ok(mark.uuid.filter(|uuid| *uuid != LOST_MARK).map(|uuid| mark.intact && uuid == nonce))
    }

    /// Stores the bitmaps, whose recording has ended, and the mark that the directory has already. A checkpoint's that
    /// cannot be stored is left out: the sidecar has it too.
    pub(super) fn store_in_image(&self, mark: Uuid) -> Result<()> {
        let Some(image) = self.image().persistent() else { return Ok(()) };
        let directory = self.tracking.directory();
        let checkpoint = self.checkpoint_to_store(&directory);
        let users = self.users_to_store(&directory);
        let store = |checkpoint: Option<&ToStore>| {
            let there = image.list()?;
            image.finish(&changes(&there, &directory, checkpoint, &users), mark)
        };
        let Some(checkpoint) = checkpoint else { return store(None) };
        let Err(e) = store(Some(&checkpoint)) else { return Ok(()) };
        store(None)?;
        log::warn!("disk '{}': what other programs write will not be known: {e}", self.name());
        self.tracking.sidecar.commit(|directory| {
            directory.in_image.checkpoints.clear();
            Ok(())
        })
    }

    /// The recording checkpoint's bitmap, where the image can have it. Without a mark nobody would believe it.
    fn checkpoint_to_store(&self, directory: &Directory) -> Option<ToStore> {
        directory.in_image.mark?;
        let entry = recording_checkpoint(directory)?;
        if directory.bitmaps.iter().any(|user| user.name == entry.name) {
            return None;
        }
        let recording = self.tracking.recording();
        let recording = recording.iter().find(|recording| recording.uuid == entry.bitmap.uuid)?;
        let bytes = recording.bitmap.bits().len().div_ceil(8);
        (1..=BITS_MAX_BYTES).contains(&bytes).then(|| ToStore::new(&entry.name, true, &recording.bitmap))
    }

    /// For each user's bitmap the bits that are to be stored, if any are.
    fn users_to_store(&self, directory: &Directory) -> Vec<Option<ToStore>> {
        let recording = self.tracking.recording();
        let one = |user: &UserBitmap| match user.state {
            _ if !user.persistent => None,
            UserBitmapState::Recording => {
                let recording = recording.iter().find(|recording| recording.uuid == user.bitmap.uuid)?;
                Some(ToStore::new(&user.name, true, &recording.bitmap))
            }
            UserBitmapState::Disabled if user.bitmap.area.is_some() => match self.load_user(user) {
                Ok(bitmap) => Some(ToStore::new(&user.name, false, &bitmap)),
                Err(e) => {
                    log::warn!("disk '{}': bitmap '{}' is lost: {e}", self.name(), user.name.escape_debug());
                    None
                }
            },
            _ => None,
        };
        directory.bitmaps.iter().map(one).collect()
    }

    /// Before a bitmap is removed from the image: its bits go to the sidecar where they stand there only, so that the
    /// directory has all of it until it names it no more. What cannot be read is nothing to keep.
    pub(super) fn keep_removed(&self, name: &str) -> Result<()> {
        let Some(image) = self.image().persistent() else { return Ok(()) };
        self.keep(|user| user.name == name && image.load(name).is_ok())
    }

    /// Before a resize: the bits of disabled bitmaps, which stand in the image only and have its size, go to the sidecar.
    pub(super) fn keep_disabled(&self) -> Result<()> {
        self.keep(|_| true)
    }

    fn keep(&self, which: impl Fn(&UserBitmap) -> bool) -> Result<()> {
        let Some(image) = self.image().persistent() else { return Ok(()) };
        let directory = self.tracking.directory();
        let in_image = |user: &&UserBitmap| user.state == UserBitmapState::Disabled && user.bitmap.area.is_none();
        let mut kept = Vec::new();
        for user in directory.bitmaps.iter().filter(in_image).filter(|user| which(user)) {
            let (granularity, size) = (user.bitmap.granularity, user.bitmap.size);
            let mut bits = Bits::heap(DirtyBitmap::bits_for(granularity, size)?);
            bits.or_words(0, image.load(&user.name)?);
            let bitmap = Arc::new(DirtyBitmap::new(granularity, size, bits)?);
            kept.push(self.tracking.seal(&Recording { uuid: user.bitmap.uuid, bitmap, area: None }, None)?);
        }
        if kept.is_empty() {
            return Ok(());
        }
        let named = self.tracking.sidecar.commit(|directory| {
            for user in &mut directory.bitmaps {
                if let Some(entry) = kept.iter().find(|entry| entry.uuid == user.bitmap.uuid) {
                    user.bitmap = entry.clone();
                }
            }
            Ok(())
        });
        named.inspect_err(|_: &Error| kept.iter().for_each(|entry| self.tracking.abandon(entry)))
    }
}

/// What the directory says of a user's bitmap that records in new words.
pub(super) fn follow(directory: &mut Directory, old: Uuid, new: &Recording) {
    for user in directory.bitmaps.iter_mut().filter(|user| user.bitmap.uuid == old) {
        user.bitmap = BitmapEntry { everything: user.bitmap.everything.take(), ..recording_entry(new) };
    }
}
