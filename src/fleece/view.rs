//! The frozen view of one disk.
//!
//! I3: a view never blocks the guest and takes no lock. For every question: where a layer from its own on has the
//! chunk, ask that layer's store; else ask the image, then (after a full fence) look at the states again, in the chain
//! as it is by then. Still clear: the answer is frozen truth, be it data, a hole or an error. Set: ask the store.
//! Whether the view is broken or the range released is looked at last, so that an answer that went out was right.
//!
//! Beside an active guest, reads go by turns and wait (`pace`), with nothing in hand that the guest could need.

use super::chain::{Chain, Source};
use super::disk::Disk;
use super::layer::Layer;
use super::map::{Changes, ViewMap};
use super::skip::Skipped;
use super::store::{Piece, read_pieces};
use crate::bitmap::LayerEntry;
use crate::error::{Error, Result, errno};
use crate::storage::BlockStatus;
use crate::sync::full_fence;
use crate::units::{MAX_GATE_BYTES, round_down, round_up};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use uuid::Uuid;

/// Most bytes that one question for the block status looks at: it bounds the walk over the states.
const MAX_STATUS_BYTES: u64 = 256 << 20;

/// Runs of copied chunks up to so long are read over in the image: what lies around them is one read then.
const MAX_BRIDGE_BYTES: u64 = 64 << 10;

/// A checkpoint by name and identity.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Point {
    /// The name that the user gave.
    pub name: String,
    /// The identity: names can be used again, identities can't.
    pub uuid: Uuid,
}

/// The frozen view of one disk. See the module.
#[derive(Debug)]
pub struct View {
    pub(super) disk: Arc<Disk>,
    pub(super) layer: Arc<Layer>,
    pub(super) snapshot: Uuid,
    checkpoint: Point,
    reference: Option<Point>,
    full_reason: Option<String>,
    time_ns: i64,
    zeros: super::zeros::Zeros,
    /// What reads as zeros whatever the layers and the image have.
    pub(super) skipped: Skipped,
}

/// What a read takes from stores.
#[derive(Default)]
struct Copies {
    pieces: Vec<Piece>,
    /// The first chunk that is lost instead.
    lost: Option<u64>,
}

impl Copies {
    /// `bytes` of `chunks` from the store of `layer`; `base` is the offset of the whole read.
    fn add(&mut self, layer: Arc<Layer>, chunks: Range<u64>, bytes: Range<u64>, base: u64) {
        self.lost = self.lost.or_else(|| layer.first_lost(&chunks));
        let at = (bytes.start - base) as usize;
        self.pieces.push(Piece { layer, offset: bytes.start, at, len: (bytes.end - bytes.start) as usize });
    }
}

impl View {
    /// The view that a directory entry describes. None where the entry has no snapshot.
    pub(super) fn new(disk: Arc<Disk>, layer: Arc<Layer>, entry: &LayerEntry) -> Option<View> {
        let snapshot = entry.snapshot.as_ref()?;
        let directory = disk.tracking.directory();
        let name_of = |uuid: Uuid| directory.checkpoints.iter().find(|c| c.uuid == uuid).map(|c| c.name.clone());
        let reference = snapshot.reference.and_then(|uuid| Some(Point { name: name_of(uuid)?, uuid }));
        let zeros = super::zeros::Zeros::new(disk.store_io.clone(), layer.uuid);
        let skipped = Skipped::load(&disk.store_io, layer.uuid, snapshot.skipped.as_ref(), layer.size);
        Some(View {
            checkpoint: Point { name: snapshot.name.clone(), uuid: snapshot.checkpoint },
            reference,
            full_reason: snapshot.full_reason.clone(),
            snapshot: snapshot.uuid,
            time_ns: snapshot.time_ns,
            zeros,
            skipped,
            disk,
            layer,
        })
    }

    /// The view of a layer that is nobody's snapshot.
    pub(super) fn of_job(disk: Arc<Disk>, layer: Arc<Layer>) -> View {
        let zeros = super::zeros::Zeros::new(disk.store_io.clone(), layer.uuid);
        let time_ns = crate::storage::clock::now_ns();
        View {
            checkpoint: Point { name: "of a job".to_owned(), uuid: layer.uuid },
            reference: None,
            full_reason: None,
            snapshot: layer.uuid,
            time_ns,
            zeros,
            skipped: Skipped::default(),
            disk,
            layer,
        }
    }

    /// The disk's name.
    pub fn disk_name(&self) -> &str {
        self.disk.name()
    }

    /// The disk's identity.
    pub fn disk_uuid(&self) -> Uuid {
        self.disk.uuid()
    }

    /// The image's file.
    pub fn image_path(&self) -> &Path {
        self.disk.image_path()
    }

    /// The snapshot's identity.
    pub fn snapshot_uuid(&self) -> Uuid {
        self.snapshot
    }

    /// Size of the disk at the instant, in bytes.
    pub fn size(&self) -> u64 {
        self.layer.size
    }

    /// The instant, in nanoseconds since the epoch.
    pub fn time_ns(&self) -> i64 {
        self.time_ns
    }

    /// The checkpoint that was made with this view.
    pub fn checkpoint(&self) -> Point {
        self.checkpoint.clone()
    }

    /// The reference point of the view's own map; None: everything counts as changed, see [`View::full_reason`].
    pub fn reference(&self) -> Option<Point> {
        self.reference.clone()
    }

    /// Why the view's own map says that everything changed, where it does so from the start.
    pub fn full_reason(&self) -> Option<String> {
        self.full_reason.clone()
    }

    /// Earlier points from which changes are known, oldest first.
    pub fn since(&self) -> Vec<Point> {
        let directory = self.disk.tracking.directory();
        let own = directory.checkpoints.iter().position(|checkpoint| checkpoint.uuid == self.checkpoint.uuid);
        directory.checkpoints[..own.unwrap_or(0)]
            .iter()
            .map(|checkpoint| Point { name: checkpoint.name.clone(), uuid: checkpoint.uuid })
            .collect()
    }

    /// What changed from `base` (None: everything) to this view. ENOENT for a point that is not known.
    pub fn map(self: &Arc<Self>, base: Option<Uuid>) -> Result<Arc<ViewMap>> {
        ViewMap::new(self.clone(), base).map(Arc::new)
    }

    /// The same without what reads as zeros, which takes a walk over the view where it was not asked for yet.
    pub fn changes(&self, base: Option<Uuid>) -> Result<Changes> {
        Changes::new(self, base)
    }

    /// Whether its disk is still served.
    pub fn is_served(&self) -> bool {
        !self.disk.is_closed()
    }

    /// Why the view can no longer be read, if so.
    pub fn broken(&self) -> Option<String> {
        self.skipped.unreadable().map(str::to_owned).or_else(|| self.disk.chain.load().broken(self.layer.seq))
    }

    /// What the view leaves out, which reads as zeros: of what kinds, and how many bytes.
    pub fn skipped(&self) -> Option<(&[String], u64)> {
        self.skipped.told().map(|told| (&told.kinds[..], told.bytes))
    }

    /// Why the view cannot have been read as a whole: it is broken, or chunks that it still shows are lost.
    pub(super) fn damage(&self) -> Option<String> {
        let chain = self.disk.chain.load();
        let seq = self.layer.seq;
        let shown = |layer: &Arc<Layer>, chunk: u64| {
            self.layer.view_needs(chunk)
                && matches!(chain.source(seq, chunk..chunk + 1).0, Source::Layer(source) if Arc::ptr_eq(&source, layer))
        };
        let lost = |layer: &Arc<Layer>| layer.lost().filter(|chunk| shown(layer, *chunk)).count();
        let count: usize = chain.seen_from(seq).iter().map(lost).sum();
        let lost = (count > 0).then(|| format!("{count} chunk(s) of disk '{}' could not be read", self.disk.name()));
        self.broken().or(lost)
    }

    /// Bytes that the store of this view's layer takes.
    pub fn store_bytes(&self) -> u64 {
        self.layer.store.bytes()
    }

    /// Reads at most up to the end of the view; returns the count.
    pub fn read(&self, buf: &mut [u8], offset: u64) -> Result<usize> {
        let len = self.size().saturating_sub(offset).min(buf.len() as u64) as usize;
        let Some(buf) = buf.get_mut(..len) else { return Ok(0) };
        if len == 0 {
            return Ok(0);
        }
        self.disk.counters.view_read(len);
        let answer = self.disk.pace.by_turns(buf, offset, |piece, at| self.read_unchecked(piece, at));
        self.check_last(offset, len as u64)?;
        answer.map(|()| len)
    }

    /// Reads a little without waiting for the guest, at most up to the end of the view; returns the count.
    pub(super) fn read_now(&self, buf: &mut [u8], offset: u64) -> Result<usize> {
        let len = self.size().saturating_sub(offset).min(buf.len() as u64) as usize;
        let Some(buf) = buf.get_mut(..len).filter(|buf| !buf.is_empty()) else { return Ok(0) };
        let answer = self.read_unchecked(buf, offset);
        self.check_last(offset, len as u64)?;
        answer.map(|()| len)
    }

    /// Reads without the last look at `broken` and `released`.
    fn read_unchecked(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        for (bytes, is_skipped) in self.skipped.runs(offset, buf.len() as u64) {
            let part = &mut buf[(bytes.start - offset) as usize..(bytes.end - offset) as usize];
            if is_skipped {
                part.fill(0);
            } else {
                self.read_kept(part, bytes.start)?;
            }
        }
        Ok(())
    }

    /// The same where nothing is left out.
    fn read_kept(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let end = offset + buf.len() as u64;
        let chunks = self.layer.chunks_of(offset, buf.len() as u64);
        let mut copies = Copies::default();
        let mut at = chunks.start;
        while at < chunks.end {
            // Anew each time: what made an answer void may stand in a layer that an older chain does not have.
            let chain = self.disk.chain.load();
            let (source, run_end) = chain.source(self.layer.seq, at..chunks.end);
            if let Source::Layer(layer) = source {
                copies.add(layer, at..run_end, self.cut(at..run_end, offset..end), offset);
                at = run_end;
                continue;
            }
            let into = |bytes: &Range<u64>| (bytes.start - offset) as usize..(bytes.end - offset) as usize;
            let far = self.bridge(&chain, run_end..chunks.end);
            let bytes = self.cut(at..far, offset..end);
            if far > run_end && self.read_across(&mut buf[into(&bytes)], at..far, bytes, offset, &mut copies) {
                at = far;
                continue;
            }
            let bytes = self.cut(at..run_end, offset..end);
            at = self.read_image(&mut buf[into(&bytes)], bytes.start, at..run_end)?;
        }
        if let Some(chunk) = copies.lost {
            return Err(self.lost(chunk));
        }
        read_pieces(copies.pieces, buf)
    }

    /// How far one read of the image that ends at `chunks.start` may go on: over copied chunks, few enough at a time, to
    /// the end of the last run behind them that the image has.
    fn bridge(&self, chain: &Chain, chunks: Range<u64>) -> u64 {
        let (mut far, mut at) = (chunks.start, chunks.start);
        while at < chunks.end {
            let (source, run_end) = chain.source(self.layer.seq, at..chunks.end);
            match source {
                Source::Image => far = run_end,
                Source::Layer(_) if (run_end - far) * self.layer.chunk > MAX_BRIDGE_BYTES => break,
                Source::Layer(_) => {}
            }
            at = run_end;
        }
        far
    }

    /// Asks the image for chunks of which some are copied, in one read, then looks again (I3): what is set by then, copied
    /// before or meanwhile, is added to `copies`, which go over it. False: nothing stands, an error may belong to chunks
    /// that were overwritten. `base` is the offset of the whole read.
    fn read_across(
        &self,
        buf: &mut [u8],
        chunks: Range<u64>,
        bytes: Range<u64>,
        base: u64,
        copies: &mut Copies,
    ) -> bool {
        if self.disk.image().read_at(buf, bytes.start).is_err() {
            return false;
        }
        full_fence();
        let chain = self.disk.chain.load();
        let mut at = chunks.start;
        while at < chunks.end {
            let (source, run_end) = chain.source(self.layer.seq, at..chunks.end);
            if let Source::Layer(layer) = source {
                copies.add(layer, at..run_end, self.cut(at..run_end, bytes.clone()), base);
            }
            at = run_end;
        }
        true
    }

    /// Asks the image, then looks again (I3). Returns the chunk from which the answer is void and must be asked for
    /// anew: the end of `chunks` where all of it stands.
    fn read_image(&self, buf: &mut [u8], offset: u64, chunks: Range<u64>) -> Result<u64> {
        let answer = self.disk.image().read_at(buf, offset);
        full_fence();
        let void = self.disk.chain.load().first_set(self.layer.seq, chunks.clone());
        if let Some(first) = void {
            self.disk.counters.view_retries.add(1);
            if first > chunks.start && answer.is_err() {
                // The error may belong to the part that was overwritten: ask for the rest alone.
                let keep = (first * self.layer.chunk - offset) as usize;
                return self.read_image(&mut buf[..keep], offset, chunks.start..first);
            }
            return Ok(first);
        }
        answer.map(|()| chunks.end)
    }

    /// Whether a run of the view is known to read as zeros, for at most `len` bytes. Lost and released chunks are not:
    /// who copies the view must come upon their error. EIO where the view is broken.
    pub fn block_status(&self, offset: u64, len: u64) -> Result<BlockStatus> {
        let len = len.min(self.size().saturating_sub(offset)).min(MAX_STATUS_BYTES);
        if len == 0 {
            return Ok(BlockStatus { len: 0, zero: true });
        }
        let (is_skipped, end) = self.skipped.run(offset, offset + len);
        let len = end - offset;
        if is_skipped {
            self.check_whole(&self.disk.chain.load(), offset)?;
            return Ok(BlockStatus { len, zero: true });
        }
        let chunks = self.layer.chunks_of(offset, len);
        loop {
            let chain = self.disk.chain.load();
            let (source, run_end) = chain.source(self.layer.seq, chunks.clone());
            let bytes = self.cut(chunks.start..run_end, offset..offset + len);
            let mut status = match &source {
                Source::Layer(layer) => layer.store.block_status(bytes.start, bytes.end - bytes.start)?,
                Source::Image => match self.image_status(&bytes, chunks.start..run_end)? {
                    Some(status) => status,
                    None => continue,
                },
            };
            status.len = status.len.min(bytes.end - bytes.start);
            full_fence();
            self.check_whole(&self.disk.chain.load(), offset)?;
            let lost = match &source {
                Source::Layer(layer) => layer.first_lost(&self.layer.chunks_of(offset, status.len)),
                Source::Image => None,
            };
            let released = self.layer.first_released(self.layer.chunks_of(offset, status.len));
            return Ok(match lost.into_iter().chain(released).min() {
                Some(first) if first == chunks.start => BlockStatus {
                    len: status.len.min(self.layer.bytes_of(&(first..first + 1)).end - offset),
                    zero: false,
                },
                Some(first) => BlockStatus { len: first * self.layer.chunk - offset, ..status },
                None => status,
            });
        }
    }

    /// Whether a run of the view may be data or zeros of the image itself, not of what lies below it, and how long that
    /// holds on (at most `len`). What was overwritten since counts as the image's own.
    pub fn is_own(&self, offset: u64, len: u64) -> Result<(bool, u64)> {
        let len = len.min(self.size().saturating_sub(offset)).min(MAX_STATUS_BYTES);
        let (is_skipped, end) = self.skipped.run(offset, offset + len);
        let len = end - offset;
        if is_skipped {
            return Ok((true, len));
        }
        let chunks = self.layer.chunks_of(offset, len);
        let answer = self.disk.image().is_own(offset, len);
        full_fence();
        let chain = self.disk.chain.load();
        self.check_whole(&chain, offset)?;
        let overwritten = chain.first_set(self.layer.seq, chunks.clone());
        if overwritten == Some(chunks.start) {
            let (_, run_end) = chain.source(self.layer.seq, chunks.clone());
            return Ok((true, self.cut(chunks.start..run_end, offset..offset + len).end - offset));
        }
        let (own, run) = answer?;
        let most = overwritten.map_or(len, |first| first * self.layer.chunk - offset);
        Ok((own, run.min(most)))
    }

    /// Asks the image for the status of a run, then looks again (I3). None: the first chunk's answer is void.
    fn image_status(&self, bytes: &Range<u64>, chunks: Range<u64>) -> Result<Option<BlockStatus>> {
        let answer = self.disk.image().block_status(bytes.start, bytes.end - bytes.start);
        full_fence();
        let void = self.disk.chain.load().first_set(self.layer.seq, chunks.clone());
        match (void, answer) {
            (Some(first), _) if first == chunks.start => {
                self.disk.counters.view_retries.add(1);
                Ok(None)
            }
            // The error may belong to the part that was overwritten.
            (Some(_), Err(_)) => Ok(None),
            (None, Err(e)) => Err(e),
            (Some(first), Ok(status)) => {
                let len = status.len.min(first * self.layer.chunk - bytes.start);
                Ok(Some(BlockStatus { len, ..status }))
            }
            (None, Ok(status)) => Ok(Some(status)),
        }
    }

    /// The bytes of `chunks` inside `within`.
    fn cut(&self, chunks: Range<u64>, within: Range<u64>) -> Range<u64> {
        let bytes = self.layer.bytes_of(&chunks);
        bytes.start.max(within.start)..bytes.end.min(within.end)
    }

    /// `broken` and `released`, looked at after the answer was got (I3).
    fn check_last(&self, offset: u64, len: u64) -> Result<()> {
        full_fence();
        self.check_whole(&self.disk.chain.load(), offset)?;
        // Nobody needs what is left out, so it counts as released.
        let is_released = |bytes: Range<u64>| {
            self.layer.first_released(self.layer.chunks_of(bytes.start, bytes.end - bytes.start)).is_some()
        };
        if self.skipped.runs(offset, len).any(|(bytes, is_skipped)| !is_skipped && is_released(bytes)) {
            return Err(self.error(offset, "the range was released".to_owned()));
        }
        Ok(())
    }

    /// Whether the layers that the view looks through are all there and can be believed.
    fn check_whole(&self, chain: &Chain, offset: u64) -> Result<()> {
        let seen = chain.seen_from(self.layer.seq);
        if !seen.first().is_some_and(|layer| Arc::ptr_eq(layer, &self.layer)) {
            // It was dropped while somebody without an open file looked at it: the rest would be the live disk.
            let what = format!("snapshot '{}', disk '{}'", self.checkpoint.name, self.disk.name());
            return Err(Error::new(errno::ESTALE, what, "it was dropped").at_offset(offset));
        }
        if self.skipped.unreadable().is_some() || seen.iter().any(|layer| layer.is_broken()) {
            let reason = self.broken().unwrap_or_default();
            return Err(self
                .error(offset, format!("the view is broken: {reason}"))
                .hint("cancel the snapshot and take a new one; no change is forgotten"));
        }
        Ok(())
    }

    fn lost(&self, chunk: u64) -> Error {
        self.error(chunk * self.layer.chunk, "the image could not be read when the guest overwrote it".to_owned())
    }

    fn error(&self, offset: u64, why: String) -> Error {
        let what = format!("snapshot '{}', disk '{}'", self.checkpoint.name, self.disk.name());
        Error::new(errno::EIO, what, why).at_offset(offset)
    }

    /// 'I have read this': the whole chunks inside the range give their store space back, and the guest no longer pays
    /// for them; reads of them fail from now on, but for what the view leaves out.
    pub fn release(&self, offset: u64, len: u64) -> Result<()> {
        let end = offset.saturating_add(len).min(self.size());
        let start = round_up(offset.min(end), self.layer.chunk);
        // The last chunk of a disk of odd size is whole when the range reaches the end.
        let end = if end == self.size() { end } else { round_down(end, self.layer.chunk) };
        let mut at = start;
        while at < end {
            let piece = (end - at).min(MAX_GATE_BYTES);
            self.release_piece(at, piece)?;
            at += piece;
        }
        Ok(())
    }

    /// The mark is set under the stripes of the newest layer, so that a first writer either sees it and spares its copy,
    /// or has set the state, and the copy is punched here. Punched later than the mark: nobody reads what no view needs.
    fn release_piece(&self, offset: u64, len: u64) -> Result<()> {
        let chunks = self.layer.chunks_of(offset, len);
        loop {
            let Some(newest) = self.disk.chain.load().newest().cloned() else { return Ok(()) };
            let claim = newest.stripes.claim(offset, len, newest.store.stores().timeout, || true);
            let Some(_claim) = claim else { return Err(newest.store.hangs()) };
            self.layer.set_released(&*self.disk.tracking.shm, chunks.clone())?;
            if self.disk.chain.peek().newest().is_some_and(|now| Arc::ptr_eq(now, &newest)) {
                break;
            }
        }
        let chain = self.disk.chain.load();
        for layer in chain.seen_from(self.layer.seq) {
            self.punch(&chain, layer, chunks.clone());
        }
        Ok(())
    }

    fn punch(&self, chain: &Chain, layer: &Layer, chunks: Range<u64>) {
        let free = |chunk: u64| layer.is_set(chunk) && !chain.needed(layer.seq, chunk);
        let mut at = chunks.start;
        while at < chunks.end {
            let Some(start) = (at..chunks.end).find(|&chunk| free(chunk)) else { return };
            let end = (start..chunks.end).find(|&chunk| !free(chunk)).unwrap_or(chunks.end);
            let bytes = layer.bytes_of(&(start..end));
            layer.store.punch(bytes.start, bytes.end - bytes.start);
            at = end;
        }
    }

    /// Runs of the view that are known to read as zeros; decided once, at the first question, and never changed.
    pub(super) fn zeros(&self) -> Result<Arc<super::zeros::ZeroMap>> {
        self.zeros.get(self)
    }
}
