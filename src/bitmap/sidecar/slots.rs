//! Two slots of which one always holds: how superblock and directory are replaced.
//!
//! A new content goes to the slot that does not count, with the next higher sequence; it counts once it is synced. So a
//! power loss at any moment leaves the old content or the new one.
//!
//! **After an error.** Where the write or the sync fails, the new content may or may not be durable, and the other slot
//! still holds the old one: the next open would find either. The caller was told that nothing changed, so the same slot
//! is written once more at once, in full, with the *old* content. Where that fails too, the doubt stays, and the
//! sidecar tries again before it replaces anything else; the slot with the old content is not touched until then, and
//! the first write of the doubtful one that succeeds ends the doubt. A rewrite makes the pages dirty anew, so that its
//! sync speaks for them even where the kernel has dropped the failed ones; the checksum tells the attempts apart,
//! should their sectors mix.
//!
//! **After open.** What was read may stand in the page cache only, left by a killed process whose sync never ended or
//! failed. Before the first change the bytes are written over themselves and synced: whatever a power loss leaves of
//! that is what stood there.

use super::medium::Medium;
use crate::error::{Error, Result, errno};

/// A valid slot.
pub(super) struct Found {
    /// Its sequence (or generation).
    pub(super) sequence: u64,
    /// Its bytes as they were written.
    pub(super) bytes: Vec<u8>,
}

/// Why the slots may not be on disk as this process sees them.
#[derive(Debug)]
enum Doubt {
    None,
    /// The newest slot was read, not written: these bytes.
    ReadBack(Vec<u8>),
    /// Writing the slot that does not count failed, and undoing that too.
    Failed,
}

/// The state of a pair of slots.
#[derive(Debug)]
pub(super) struct Slots {
    at: [u64; 2],
    newest: usize,
    /// The sequence of the newest slot.
    sequence: u64,
    doubt: Doubt,
}

/// Makes the bytes of a slot for a sequence.
pub(super) type Encode<'a> = &'a dyn Fn(u64) -> Result<Vec<u8>>;

impl Slots {
    /// A pair that was never written.
    pub(super) fn fresh(at: [u64; 2]) -> Self {
        Slots { at, newest: 1, sequence: 0, doubt: Doubt::None }
    }

    /// The pair as it was found, and the bytes of the newest valid slot; None without one.
    pub(super) fn found(at: [u64; 2], read: impl Fn(u64) -> Result<Option<Found>>) -> Result<Option<(Slots, Vec<u8>)>> {
        let (newest, found) = match (read(at[0])?, read(at[1])?) {
            (Some(a), Some(b)) if b.sequence > a.sequence => (1, b),
            (Some(a), _) => (0, a),
            (None, Some(b)) => (1, b),
            (None, None) => return Ok(None),
        };
        let doubt = Doubt::ReadBack(found.bytes.clone());
        let slots = Slots { at, newest, sequence: found.sequence, doubt };
        Ok(Some((slots, found.bytes)))
    }

    /// The sequence of the newest slot. It is durable unless [`Slots::unconfirmed`].
    pub(super) fn sequence(&self) -> u64 {
        self.sequence
    }

    /// Whether the other slot may hold something that this process does not go by.
    pub(super) fn failed(&self) -> bool {
        matches!(self.doubt, Doubt::Failed)
    }

    /// Whether [`Slots::write_back`] is still due.
    pub(super) fn unconfirmed(&self) -> bool {
        matches!(self.doubt, Doubt::ReadBack(_))
    }

    /// Writes what was read over itself; the caller syncs, then says [`Slots::confirm`].
    pub(super) fn write_back(&self, medium: &Medium) -> Result<()> {
        match &self.doubt {
            Doubt::ReadBack(bytes) => medium.write_at(bytes, self.at[self.newest]),
            _ => Ok(()),
        }
    }

    /// What was written back is durable.
    pub(super) fn confirm(&mut self) {
        if self.unconfirmed() {
            self.doubt = Doubt::None;
        }
    }

    /// Replaces the content `old` by `new`, durably; see the head of this file for what an error leaves.
    pub(super) fn replace(&mut self, medium: &mut Medium, new: Encode, old: Encode) -> Result<()> {
        let result = self.write(medium, new);
        if self.failed()
            && let Err(e) = self.write(medium, old)
        {
            log::warn!("a failed write could not be undone, a crash may bring it back: {e}");
        }
        result
    }

    fn write(&mut self, medium: &mut Medium, encode: Encode) -> Result<()> {
        let end = || Error::new(errno::EINVAL, "dirty log", "its sequence numbers are used up");
        let sequence = self.sequence.checked_add(1).ok_or_else(end)?;
        let bytes = encode(sequence)?;
        let slot = 1 - self.newest;
        self.doubt = Doubt::Failed;
        medium.write_at(&bytes, self.at[slot])?;
        medium.sync()?;
        (self.newest, self.sequence, self.doubt) = (slot, sequence, Doubt::None);
        Ok(())
    }
}
