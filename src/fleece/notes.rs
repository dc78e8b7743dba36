//! What the maker of a snapshot says of it: how consistent its content is, and what was run around the instant.
//!
//! * **Never a promise.** A snapshot is crash-consistent until its maker knows better, which is after the instant: a
//!   guest that thawed too early is found by asking it then. So [`Fleece::annotate_snapshot`] comes second, and a kill
//!   between the two leaves what is true at least.
//! * The notes stand in the directory of each disk with the snapshot, and survive what it survives. A snapshot is
//!   file-system-consistent where all of its disks say so.

use super::fleece::Fleece;
use super::snapshot::Snapshot;
use super::view::View;
use crate::bitmap::{Consistency, Notes};
use crate::error::{Error, Result, errno};

/// Most entries in the notes of a snapshot.
const MAX_HOOKS: usize = 64;
/// Most bytes of all texts in them: they lie in the directory of each disk.
const MAX_TEXT_BYTES: usize = 16 << 10;

impl Fleece {
    /// Replaces what is noted of a snapshot. ENOENT for an unknown name, EINVAL where the notes are too long.
    pub fn annotate_snapshot(&self, name: &str, notes: &Notes) -> Result<()> {
        let _control = self.control.lock();
        check_notes(notes)?;
        let snapshot = self.snapshot(name)?;
        self.settle()?;
        for view in snapshot.views() {
            view.disk.tracking.sidecar.commit(|directory| {
                let entries = directory.layers.iter_mut().filter_map(|layer| layer.snapshot.as_mut());
                entries.filter(|entry| entry.uuid == snapshot.uuid()).for_each(|entry| entry.notes = notes.clone());
                Ok(())
            })?;
        }
        Ok(())
    }
}

impl Snapshot {
    /// What is noted of it: the hooks as its first disk has them, and the least consistency of all disks.
    pub fn notes(&self) -> Notes {
        let mut all = self.views().iter().map(|view| notes_of(view));
        let Some(first) = all.next() else { return Notes::default() };
        let same = all.all(|notes| notes.consistency == first.consistency);
        Notes { consistency: if same { first.consistency } else { Consistency::Crash }, ..first }
    }
}

fn notes_of(view: &View) -> Notes {
    let directory = view.disk.tracking.directory();
    let mut entries = directory.layers.iter().filter_map(|layer| layer.snapshot.as_ref());
    entries.find(|entry| entry.uuid == view.snapshot).map(|entry| entry.notes.clone()).unwrap_or_default()
}

/// Whether notes fit into a directory beside everything else.
pub(super) fn check_notes(notes: &Notes) -> Result<()> {
    let text = |note: &crate::bitmap::HookNote| {
        note.command.len() + note.phase.len() + note.error.as_ref().map_or(0, String::len)
    };
    if notes.hooks.len() > MAX_HOOKS || notes.hooks.iter().map(text).sum::<usize>() > MAX_TEXT_BYTES {
        let why = format!("at most {MAX_HOOKS} entries and {MAX_TEXT_BYTES} bytes of text");
        return Err(Error::new(errno::EINVAL, "hooks of a snapshot", why));
    }
    Ok(())
}
