//! Preserve before overwrite (I2): what a guest's change is about to overwrite goes to the newest layer's store first.
//!
//! A guest's write may reach the image only where, in one hold of the gate, each chunk that it touches needs no copy in
//! the newest layer: its state is set, no view needs it, or the layer is broken. Where a chunk does, the gate is left,
//! the chunk copied, and the gate entered again: nobody waits for a store in a gate or with a region pinned.
//!
//! * **A copy is of the frozen content.** Without the gate a snapshot may come in the middle, and a writer that looks at
//!   the new layer only may overwrite the chunk while it is read for the old one. So after the read and a full fence,
//!   the layer must still be the newest: then nobody had overwritten what was read, as the state is clear and the stripe
//!   is claimed. What is set in a layer that has just stopped to be the newest is as true there as in the next one.
//! * **One copies, others wait**: the chunks' stripes are claimed. Who hangs in a call on the store keeps them for
//!   good; those who wait then find the layer broken, or give up when that call has taken as long as one may. They wait
//!   for an image that is slow, and behind any number of calls that return in time: neither breaks a view.
//! * **The guest does not wait for a store that hangs.** A call on the store is made on a thread of its own with a time
//!   limit ([`Waits`]), or in the thread of a caller that can be answered by somebody else ([`Answered`]).

use super::StoreErrorPolicy;
use super::chain::Chain;
use super::disk::Disk;
use super::events::Event;
use super::layer::Layer;
use super::stripes::Claim;
use super::watch::Permit;
use crate::error::{Error, Result, errno};
use crate::storage::buffer::AlignedBuf;
use crate::storage::watch::Rest;
use crate::sync::full_fence;
use std::ops::Range;
use std::sync::Arc;

/// Longest write whose first touch is made in the caller's thread: its data are copied for whoever may have to take
/// over, which for longer ones costs more than the way to another thread.
const HERE_MAX_BYTES: usize = 64 << 10;

/// Whether the caller still has anything to do.
#[must_use]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Caller {
    GoesOn,
    /// Somebody else does what remains, and answers.
    IsReplaced,
}

/// How a guest's change waits for the store.
pub(super) trait Wait {
    /// Writes `old` to the store of `layer` at `offset`.
    fn keep(&mut self, layer: &Arc<Layer>, old: AlignedBuf, offset: u64) -> Result<Caller>;
}

/// A caller that waits for the answer, which comes in time in any case.
pub(super) struct Waits;

impl Wait for Waits {
    fn keep(&mut self, layer: &Arc<Layer>, old: AlignedBuf, offset: u64) -> Result<Caller> {
        layer.store.write(old, offset, layer.chunk).map(|()| Caller::GoesOn)
    }
}

/// A write whose answer `done` takes, from whatever thread.
pub(super) struct Answered<'a, D> {
    pub disk: &'a Arc<Disk>,
    pub data: &'a [u8],
    pub offset: u64,
    pub permit: &'a Permit,
    /// None once somebody else answers.
    pub done: Option<D>,
}

impl<D: FnOnce(Result<usize>) + Send + 'static> Wait for Answered<'_, D> {
    fn keep(&mut self, layer: &Arc<Layer>, old: AlignedBuf, offset: u64) -> Result<Caller> {
        let stores = layer.store.stores();
        let place = if self.data.len() <= HERE_MAX_BYTES { stores.watch.enter() } else { None };
        let Some((place, done)) = place.and_then(|place| Some((place, self.done.take()?))) else {
            return Waits.keep(layer, old, offset);
        };
        let mut data = AlignedBuf::uncleared(self.data.len());
        data.copy_from_slice(self.data);
        let (disk, layer_of) = (self.disk.clone(), layer.clone());
        let late = Late { disk, layer: layer_of, data, offset: self.offset, permit: self.permit.clone(), done };
        let written = place.run(late, || layer.store.write_here(&old, offset, layer.chunk));
        let Some((late, written)) = written else { return Ok(Caller::IsReplaced) };
        self.done = Some(late.done);
        written.map(|()| Caller::GoesOn)
    }
}

/// A write whose thread hangs in a call on the store.
struct Late<D> {
    disk: Arc<Disk>,
    layer: Arc<Layer>,
    data: AlignedBuf,
    offset: u64,
    permit: Permit,
    done: D,
}

impl<D: FnOnce(Result<usize>) + Send + 'static> Rest for Late<D> {
    fn take_over(self) {
        let answer = match self.disk.not_kept(&self.layer, self.layer.store.hangs()) {
            // The layer is broken and its store not asked any more; a newer layer's is, with a limit.
            Ok(()) => self.disk.write_pieces(&self.data, self.offset, &self.permit, &mut Waits).map(|(count, _)| count),
            Err(e) => Err(e),
        };
        (self.done)(answer);
    }
}

impl Disk {
    /// The first run of `chunks` whose old content has to be copied before the guest may overwrite it. `zeroes`: it
    /// will read as zeros, so that what reads as zeros already needs no copy: the view may go on reading the image.
    fn first_to_copy(
        &self,
        chain: &Chain,
        layer: &Layer,
        chunks: Range<u64>,
        zeroes: bool,
    ) -> Result<Option<Range<u64>>> {
        let mut at = chunks.start;
        while let Some(first) = layer.next_clear(at, chunks.end) {
            let clear_end = layer.next_set(first, chunks.end).unwrap_or(chunks.end);
            let (needed, end) = chain.needed_run(first..clear_end);
            at = end;
            if needed && !zeroes {
                return Ok(Some(first..end));
            }
            if needed && let Some(run) = self.first_data(layer, first..end) {
                return Ok(Some(run));
            }
        }
        Ok(None)
    }

    /// The first run of `chunks` that the image does not know to be zeros.
    fn first_data(&self, layer: &Layer, chunks: Range<u64>) -> Option<Range<u64>> {
        let mut at = chunks.start;
        while at < chunks.end {
            let bytes = layer.bytes_of(&(at..chunks.end));
            let len = bytes.end - bytes.start;
            match self.image().block_status(bytes.start, len) {
                Ok(status) if status.zero && status.len >= layer.chunk.min(len) => {
                    at = (at + (status.len / layer.chunk).max(1)).min(chunks.end);
                }
                Ok(status) if !status.zero => {
                    return Some(at..layer.chunks_of(bytes.start, status.len).end.min(chunks.end));
                }
                _ => return Some(at..at + 1),
            }
        }
        None
    }

    /// Whether something has to be copied before `offset..offset + len` may be overwritten; the answer holds as long as
    /// the caller holds the gate. False: the guest's write, if it is issued now, stays behind the states, `broken` and
    /// `released` that say so.
    pub(super) fn must_preserve(&self, offset: u64, len: u64, zeroes: bool) -> Result<bool> {
        let chain = self.chain.peek();
        let Some(layer) = chain.newest() else { return Ok(false) };
        let chunks = layer.chunks_of(offset, len);
        let must = !(chunks.is_empty() || layer.all_set(chunks.clone()) || layer.is_broken())
            && self.first_to_copy(&chain, layer, chunks, zeroes)?.is_some();
        full_fence();
        Ok(must)
    }

    /// Copies what has to be, as far as the newest layer stays the newest. The caller holds neither gate nor pin.
    pub(super) fn preserve(&self, offset: u64, len: u64, zeroes: bool, wait: &mut impl Wait) -> Result<Caller> {
        let chain = self.chain.load();
        let Some(layer) = chain.newest() else { return Ok(Caller::GoesOn) };
        let chunks = layer.chunks_of(offset, len);
        let bytes = layer.bytes_of(&chunks);
        let (len, limit) = (bytes.end.saturating_sub(bytes.start), layer.store.stores().timeout);
        let Some(claim) = layer.stripes.claim(bytes.start, len, limit, || !layer.is_broken()) else {
            return self.not_kept(layer, layer.store.hangs()).map(|()| Caller::GoesOn);
        };
        let mut at = chunks.start;
        while !layer.is_broken()
            && let Some(run) = self.first_to_copy(&chain, layer, at..chunks.end, zeroes)?
        {
            at = run.end;
            match self.copy(layer, &claim, run, wait)? {
                Copied::All => {}
                Copied::Overtaken => return Ok(Caller::GoesOn),
                Copied::ByOthers => return Ok(Caller::IsReplaced),
            }
        }
        Ok(Caller::GoesOn)
    }

    /// One copy: image to store to states.
    fn copy(&self, layer: &Arc<Layer>, claim: &Claim<'_>, chunks: Range<u64>, wait: &mut impl Wait) -> Result<Copied> {
        let bytes = layer.bytes_of(&chunks);
        let len = (bytes.end - bytes.start) as usize;
        let mut old = AlignedBuf::uncleared(len);
        let read = self.image().read_at(&mut old, bytes.start);
        full_fence();
        if !self.chain.peek().newest().is_some_and(|newest| Arc::ptr_eq(newest, layer)) {
            return Ok(Copied::Overtaken);
        }
        if let Err(e) = read {
            self.check_open()?;
            return self.copy_unreadable(layer, claim, chunks, &e, wait);
        }
        let kept = claim.ask(|| {
            let kept = wait.keep(layer, old, bytes.start);
            let hung = match &kept {
                Ok(caller) => *caller == Caller::IsReplaced,
                Err(e) => e.errno() == errno::ETIMEDOUT,
            };
            (kept, hung)
        });
        match kept {
            Ok(Caller::GoesOn) => {
                self.counters.copied(chunks.end - chunks.start, len as u64);
                layer.set_copied(chunks);
                Ok(Copied::All)
            }
            Ok(Caller::IsReplaced) => Ok(Copied::ByOthers),
            Err(e) => self.not_kept(layer, e).map(|()| Copied::All),
        }
    }

    /// Copies chunk by chunk what cannot be read as a whole; one that cannot be read by itself is lost.
    fn copy_unreadable(
        &self,
        layer: &Arc<Layer>,
        claim: &Claim<'_>,
        chunks: Range<u64>,
        e: &Error,
        wait: &mut impl Wait,
    ) -> Result<Copied> {
        if chunks.end - chunks.start > 1 {
            for chunk in chunks {
                match self.copy(layer, claim, chunk..chunk + 1, wait)? {
                    Copied::All if !layer.is_broken() => {}
                    other => return Ok(other),
                }
            }
            return Ok(Copied::All);
        }
        log::warn!("disk '{}': {e}; the frozen views have an error there", self.name());
        self.counters.chunks_lost.add(1);
        if !layer.set_lost(chunks.start) {
            self.break_views(layer, "too many chunks of the image could not be read");
        }
        Ok(Copied::All)
    }

    /// Old content cannot be kept: by policy the views break and the guest's write goes on, or it fails. Where they are
    /// broken already, there is nothing to keep for whatever policy.
    fn not_kept(&self, layer: &Layer, e: Error) -> Result<()> {
        if layer.is_broken() {
            return Ok(());
        }
        match self.policy {
            StoreErrorPolicy::FailWrite => {
                Err(e.context(format!("write to disk '{}' refused, its old content cannot be kept", self.name())))
            }
            StoreErrorPolicy::BreakSnapshot => {
                self.break_views(layer, &e.to_string());
                Ok(())
            }
        }
    }

    /// Every view looks through the newest layer: breaking it breaks them all, before the guest's write is issued.
    pub(super) fn break_views(&self, layer: &Layer, reason: &str) {
        if layer.break_with(reason) {
            self.counters.views_broken.add(1);
            self.events.emit(&Event::ViewBroken { disk: self.name().to_owned(), reason: reason.to_owned() });
        }
    }
}

/// What became of a copy.
enum Copied {
    /// It is done, or the views are broken and it need not be.
    All,
    /// The layer is not the newest any more.
    Overtaken,
    /// Somebody else does what remains of the write.
    ByOthers,
}
