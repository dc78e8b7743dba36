//! Frozen views for jobs: of one disk, and nobody's snapshot.
//!
//! Invariants:
//! - **No trace.** The directory knows the layer as a hidden one from before it is published, since older views look through
//!   it; no checkpoint is made, no bitmap is sealed. So a kill leaves no view behind: a recovery finds a hidden layer,
//!   which goes as the ones of dropped snapshots do.
//! - **One instant** with all else in its batch: layer and record are published under the gates (`instant`).
//! - **The disk stays.** While the view exists there is a hold without a bitmap's name, so the disk is neither resized
//!   nor removed.

use super::chain::Chain;
use super::disk::Disk;
use super::fleece::Reaper;
use super::hold::Held;
use super::layer::{Layer, LayerWords};
use super::tracking::Recording;
use super::view::View;
use crate::bitmap::{DirtyBitmap, LayerEntry};
use crate::error::Result;
use crate::units::GRANULARITY_RANGE;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use uuid::Uuid;

/// A view that a job reads, as long as this exists.
#[derive(Debug)]
pub struct Frozen {
    view: Arc<View>,
    held: Arc<Held>,
    overwritten: Option<Arc<DirtyBitmap>>,
    reaper: Reaper,
}

impl Frozen {
    /// The view.
    pub fn view(&self) -> &Arc<View> {
        &self.view
    }

    /// What the guest wrote to since the instant, where that was asked for. It goes on being marked.
    pub fn overwritten(&self) -> Option<&DirtyBitmap> {
        self.overwritten.as_deref()
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        self.held.end();
        self.view.layer.hide();
        self.reaper.wake();
    }
}

/// One that is to be.
#[derive(Debug)]
pub(super) struct Freezing {
    pub disk: Arc<Disk>,
    layer: Arc<Layer>,
    /// Marks what is overwritten.
    record: Option<Recording>,
    held: Arc<Held>,
    published: AtomicBool,
}

impl Freezing {
    /// Makes the store, the layer's words and the record, and has the directory know the layer. Nothing is visible yet.
    pub(super) fn prepare(disk: &Arc<Disk>, record: Option<u64>) -> Result<Freezing> {
        let (size, tracking) = (disk.size(), &disk.tracking);
        let held = Arc::new(Held::new(disk.name(), "", DirtyBitmap::heap(*GRANULARITY_RANGE.end(), size)?));
        let newest = disk.chain.load().newest().cloned();
        let chunk = newest.as_ref().map_or(disk.chunk, |layer| layer.chunk);
        let seq = tracking.directory().next_layer.max(newest.map_or(0, |layer| layer.seq + 1));
        let uuid = Uuid::new_v4();
        let store = disk.store_io.create(uuid, size)?;
        let words = LayerWords::create(&*tracking.shm, uuid, size, chunk).inspect_err(|_| store.doom())?;
        let layer = Arc::new(Layer::new(uuid, seq, size, chunk, store, words));
        let record = record.map(|granularity| tracking.new_successor(granularity, size)).transpose();
        let record = record.inspect_err(|_| layer.doom(tracking.shm.clone()))?;
        let freezing = Freezing { disk: disk.clone(), layer, record, held, published: AtomicBool::new(false) };
        let entry = LayerEntry { uuid, seq, size, chunk, store: disk.store_io.path(), snapshot: None };
        let noted = tracking.sidecar.commit(|directory| {
            directory.layers.push(entry);
            directory.next_layer = directory.next_layer.max(seq + 1);
            Ok(())
        });
        noted.inspect_err(|_| freezing.forget())?;
        Ok(freezing)
    }

    /// The instant, first half: the layer is there for every later write. The gate is held.
    pub(super) fn publish(&self) {
        let _one = self.disk.chain_edit.lock();
        let mut chain = Chain::clone(&self.disk.chain.load());
        chain.layers.push(self.layer.clone());
        self.disk.chain.store(Arc::new(chain));
        self.published.store(true, Ordering::SeqCst);
    }

    /// The second half: overwriting is recorded.
    pub(super) fn record(&self) {
        self.record.iter().for_each(|record| self.disk.tracking.also_record(record));
    }

    /// It stands: the disk is held.
    pub(super) fn begin(&self, reaper: Reaper) -> Frozen {
        let held = self.held.clone();
        self.disk.holds.begin(held.clone(), self.record.clone());
        let view = Arc::new(View::of_job(self.disk.clone(), self.layer.clone()));
        let overwritten = self.record.as_ref().map(|record| record.bitmap.clone());
        Frozen { view, held, overwritten, reaper }
    }

    /// Whether this became `frozen`.
    pub(super) fn is(&self, frozen: &Frozen) -> bool {
        self.layer.uuid == frozen.view.layer.uuid
    }

    /// It is not to be after all. What was published is left to the reaper.
    pub(super) fn forget(&self) {
        let tracking = &self.disk.tracking;
        if self.published.load(Ordering::SeqCst) {
            self.layer.hide();
            return;
        }
        self.record.iter().for_each(|record| tracking.forget_words(record.uuid));
        let gone = tracking.sidecar.commit(|directory| {
            directory.layers.retain(|entry| entry.uuid != self.layer.uuid);
            Ok(())
        });
        match gone {
            Ok(()) => self.layer.doom(tracking.shm.clone()),
            // An open after a crash finds it whole, and lets it go.
            Err(e) => log::warn!("disk '{}': {e}", self.disk.name()),
        }
    }
}
