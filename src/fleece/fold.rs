//! Reaping: layers that no view needs go, and hidden layers are folded into their older neighbour, so that hourly
//! snapshots under one old view do not grow without bound (I4).
//!
//! Folded are only layers without a view that are not the newest. Those take no more guest copies but such as began
//! before: what these add may be left out, since it comes to a newer layer, too, before the guest overwrites it.
//! Only the chunks that the neighbour lacks, inside its size, that some older view still needs. The shorter chain is
//! published after all states are set, then the directory is written; the folded layer stays intact until the last
//! walker of a longer chain has left, since that walker holds it. A failure leaves everything as it was: what was
//! copied by then is true in both layers.

use super::chain::Chain;
use super::disk::Disk;
use super::layer::Layer;
use super::store::{Piece, read_pieces};
use crate::error::Result;
use crate::storage::buffer::AlignedBuf;
use crate::sync::atomic::Ordering;
use crate::units::MAX_GATE_BYTES;
use std::ops::Range;
use std::sync::Arc;

impl Disk {
    /// Removes and folds what it can. Errors are logged and tried again at the next call. One caller at a time, and
    /// none once the disk is closed: the states that a close saved must not change any more.
    pub(super) fn reap(&self) {
        let _one = self.reaping.lock();
        if self.closed.load(Ordering::SeqCst) {
            return;
        }
        self.drop_unneeded();
        while let Some((older, hidden)) = self.next_fold() {
            if let Err(e) = self.fold(&older, &hidden) {
                log::warn!("disk '{}': a dropped snapshot keeps its space for now: {e}", self.name());
                return;
            }
            self.counters.layers_folded.add(1);
        }
    }

    /// Hidden layers at the old end: no view looks through them.
    fn drop_unneeded(&self) {
        let unneeded = |chain: &Chain| chain.layers.iter().take_while(|layer| !layer.is_viewed()).count();
        if unneeded(&self.chain.load()) > 0 {
            self.edit_chain(|chain| {
                let count = unneeded(chain);
                chain.layers.drain(..count).collect()
            });
        }
    }

    fn next_fold(&self) -> Option<(Arc<Layer>, Arc<Layer>)> {
        let chain = self.chain.load();
        let newest = chain.layers.len().saturating_sub(1);
        (1..newest)
            .find(|&index| !chain.layers[index].is_viewed())
            .map(|index| (chain.layers[index - 1].clone(), chain.layers[index].clone()))
    }

    fn fold(&self, older: &Arc<Layer>, hidden: &Arc<Layer>) -> Result<()> {
        if let Some(reason) = hidden.broken_reason() {
            // Views from the neighbour on looked through it: they stay broken.
            older.break_with(&reason);
        } else {
            self.fold_chunks(older, hidden)?;
        }
        self.edit_chain(|chain| {
            let index = chain.layers.iter().position(|layer| Arc::ptr_eq(layer, hidden));
            index.map(|index| chain.layers.remove(index)).into_iter().collect()
        });
        Ok(())
    }

    fn fold_chunks(&self, older: &Arc<Layer>, hidden: &Arc<Layer>) -> Result<()> {
        let chain = self.chain.load();
        let step = (MAX_GATE_BYTES / hidden.chunk).max(1);
        let mut at = 0;
        while let Some(start) = hidden.next_set(at, older.chunks()) {
            let end = hidden.next_clear(start, older.chunks()).unwrap_or(older.chunks()).min(start + step);
            let mut chunk = start;
            while let Some(first) = older.next_clear(chunk, end) {
                let until = older.next_set(first, end).unwrap_or(end);
                self.fold_run(&chain, older, hidden, first..until)?;
                chunk = until;
            }
            at = end;
        }
        Ok(())
    }

    fn fold_run(&self, chain: &Chain, older: &Arc<Layer>, hidden: &Arc<Layer>, run: Range<u64>) -> Result<()> {
        let wanted = |chunk: u64| chain.needed(older.seq, chunk);
        let mut at = run.start;
        while let Some(start) = (at..run.end).find(|&chunk| wanted(chunk)) {
            let lost = hidden.first_lost(&(start..start + 1)).is_some();
            let stop = |chunk: u64| !wanted(chunk) || hidden.first_lost(&(chunk..chunk + 1)).is_some() != lost;
            let end = (start + 1..run.end).find(|&chunk| stop(chunk)).unwrap_or(run.end);
            if lost {
                if !(start..end).all(|chunk| older.set_lost(chunk)) {
                    self.break_views(older, "too many chunks of the image could not be read");
                    return Ok(());
                }
            } else {
                let bytes = older.bytes_of(&(start..end));
                let len = (bytes.end - bytes.start) as usize;
                let mut data = AlignedBuf::new(len);
                read_pieces(vec![Piece { layer: hidden.clone(), offset: bytes.start, at: 0, len }], &mut data)?;
                older.store.write(data, bytes.start, older.chunk)?;
                older.set_copied(start..end);
            }
            at = end;
        }
        Ok(())
    }

    /// Publishes a chain without the layers that `take` removes, then writes the directory, then lets them go.
    fn edit_chain(&self, take: impl FnOnce(&mut Chain) -> Vec<Arc<Layer>>) {
        let gone = {
            let _one = self.chain_edit.lock();
            let mut chain = (*self.chain.load()).clone();
            let gone = take(&mut chain);
            self.chain.store(Arc::new(chain));
            gone
        };
        let recorded = self.tracking.sidecar.commit(|directory| {
            directory.layers.retain(|entry| gone.iter().all(|layer| layer.uuid != entry.uuid));
            Ok(())
        });
        if let Err(e) = recorded {
            // The directory still names them: an open after a crash finds them whole, as nothing was removed.
            log::warn!("disk '{}': {e}", self.name());
            return;
        }
        for layer in gone {
            layer.doom(self.tracking.shm.clone());
        }
    }
}
