//! Closing a disk in good order.
//!
//! The order: image flushed; kept views saved; recording bitmaps written to the sidecar and named in the directory; a note
//! on the image taken away; bitmaps stored in the image, where it has any; image closed; the superblock {CLEAN, stamp};
//! then the words go. Where a step before the superblock fails the words stay, and the next open finds what a kill would
//! have left.
//!
//! Rounds of disarming are kept away meanwhile. The intents stay as they are: under a CLEAN superblock they mean nothing.

use super::chain::Chain;
use super::disk::Disk;
use super::keep;
use super::tracking::recording_checkpoint;
use crate::bitmap::{CheckpointState, State};
use crate::error::{Error, Result, errno};
use crate::sync::atomic::Ordering;
use uuid::Uuid;

impl Disk {
    /// A clean close; see the module for the order. Views are saved, or dropped with their stores.
    pub(super) fn close(&self, keep_views: bool) -> Result<()> {
        let _one = self.reaping.lock();
        let _no_disarm = self.disarming.lock();
        self.check_foreign()?;
        let _gate = self.gate.write();
        self.closed.store(true, Ordering::SeqCst);
        self.close_drained(keep_views).inspect_err(|_| {
            // What was stored must not count while writes go on, nor a sidecar that says CLEAN.
            let is_open = matches!(self.tracking.sidecar.superblock().state, State::Open { .. });
            if is_open && self.begin_in_image().is_ok() {
                self.record_on();
                self.note_again();
                self.closed.store(false, Ordering::SeqCst);
            }
        })
    }

    /// The guest's writes are done, and new ones are refused.
    fn close_drained(&self, keep_views: bool) -> Result<()> {
        if !self.read_only() {
            self.flush()?;
        }
        let chain = self.chain.load();
        if keep_views {
            for layer in &chain.layers {
                keep::save(layer)?;
            }
        }
        let mark = Uuid::new_v4();
        self.save_bitmaps(&chain, keep_views, mark)?;
        self.note_is_over(true);
        self.store_in_image(mark)?;
        if !self.read_only() {
            self.image().close()?;
        }
        self.tracking.note_write();
        let state = State::Clean { stamp: self.image().stamp()? };
        self.tracking.sidecar.update_superblock(|superblock| superblock.state = state)?;
        if !keep_views {
            for layer in &chain.layers {
                layer.store.remove_now();
            }
        }
        self.tracking.shm.remove_all()?;
        match &*self.misplaced.lock() {
            Some(what) => Err(Error::new(errno::ESTALE, format!("disk '{}'", self.name()), what.clone())),
            None => Ok(()),
        }
    }

    /// A close failed and the bitmaps go on recording: what was saved of them is not final. Until that is noted, no
    /// region is disarmed.
    fn record_on(&self) {
        let recording = self.tracking.recording();
        let noted = self.tracking.sidecar.commit(|directory| {
            for entry in directory.all_bitmaps_mut().filter(|entry| recording.iter().any(|one| one.uuid == entry.uuid))
            {
                entry.crc = None;
            }
            Ok(())
        });
        if let Err(e) = noted {
            log::warn!("disk '{}': {e}", self.name());
        }
    }

    /// The recording bitmaps, saved and named in the directory, with the layers that are kept.
    fn save_bitmaps(&self, chain: &Chain, keep_views: bool, mark: Uuid) -> Result<()> {
        let in_image = self.image().persistent().map(|image| image.mark()).transpose()?;
        let in_image = in_image.filter(|found| found.uuid.is_some());
        let recording = self.tracking.recording();
        let directory = self.tracking.directory();
        let mut sealed = Vec::new();
        let mut seal_all = || -> Result<()> {
            for entry in directory.checkpoints.iter().filter(|entry| entry.state == CheckpointState::Recording) {
                if let Some(one) = recording.iter().find(|one| one.uuid == entry.bitmap.uuid) {
                    sealed.push(self.tracking.seal(one, entry.bitmap.everything.clone())?);
                }
            }
            self.seal_users(&directory, &mut sealed)
        };
        let saved = seal_all().and_then(|()| {
            self.tracking.sidecar.commit(|directory| {
                for bitmap in &sealed {
                    for entry in directory.all_bitmaps_mut().filter(|entry| entry.uuid == bitmap.uuid) {
                        *entry = bitmap.clone();
                    }
                }
                let kept = |uuid: Uuid| keep_views && chain.layers.iter().any(|layer| layer.uuid == uuid);
                directory.layers.retain(|entry| kept(entry.uuid));
                if let Some(in_image) = in_image {
                    if let Some(name) = recording_checkpoint(directory).map(|entry| entry.name.clone()) {
                        directory.in_image.checkpoints.retain(|other| *other != name);
                        directory.in_image.checkpoints.push(name);
                    }
                    (directory.in_image.mark, directory.in_image.backing) = (Some(mark), in_image.backing);
                }
                Ok(())
            })
        });
        saved.inspect_err(|_| sealed.iter().for_each(|entry| self.tracking.abandon(entry)))
    }
}
