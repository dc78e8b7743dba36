//! A disk being served: the one way in for guest mutations (I1).
//!
//! Every change of the image (write, write-zeroes, discard, resize, restore) comes through here, in this order:
//!
//! 1. the regions of the range are pinned, and armed where they are not (see `regions`). This may wait for a sync, so
//!    nobody does it in a gate;
//! 2. the gate, shared; one hold covers at most 1 MiB, so that a snapshot never waits for a long discard;
//! 3. whether all that a view needs of the range is preserved (I2, I4). Where it is not, gate and pins are let go, what
//!    the range held goes to the newest layer's store, chunk by chunk, then the chunks' states (see `preserve`), and it
//!    begins anew: nobody waits for a store in a gate. Then a full fence;
//! 4. who watches the range is told (W1), and what depends on a watch enters a hold of it (W2, see `watch`);
//! 5. the dirty bits (I6);
//! 6. the image.
//!
//! A discard of what is a hole already changes nothing: it is marked, but needs no region armed.
//!
//! Errors (I7): a failed image write is the guest's error and latches nothing; a failed flush latches until the disk
//! is opened again, as the kernel may have dropped the pages that could not be written. A store that fails breaks the
//! views before the guest's write is issued, or fails the write, by policy; it never hangs the guest.

use super::chain::Chain;
use super::counters::{Counters, Request};
use super::events::Events;
use super::hold::Holds;
use super::lost::Losses;
use super::pace::Pace;
use super::preserve::{Answered, Caller, Wait, Waits};
use super::regions::Regions;
use super::store::StoreIo;
use super::tracking::{Tracking, recording_checkpoint};
use super::watch::{Permit, Watches};
use super::{Options, StoreErrorPolicy};
use crate::error::{Error, Result, errno};
use crate::image::{Format, Image};
use crate::storage::os::resolved;
use crate::storage::{BlockStatus, Dir};
use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use crate::sync::{Mutex, Published, RwLock, RwLockWriteGuard};
use crate::units::MAX_GATE_BYTES;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use uuid::Uuid;

/// A run of holes that one gate hold may skip in a discard: marking it dirty is the whole work.
const MAX_HOLE_BYTES: u64 = 64 << 30;

/// How the tracking state of a disk was found that was closed cleanly, and that nobody else wrote to.
pub(super) const EXACT: &str = "exact";

/// A disk being served. See the module.
#[derive(Debug)]
pub struct Disk {
    name: String,
    uuid: Uuid,
    image: Arc<dyn Image>,
    size: AtomicU64,
    /// Shared by guest mutations, exclusive for freeze and resize (lock rank 3).
    pub(super) gate: RwLock<()>,
    pub(super) chain: Published<Chain>,
    /// Held while a new chain is made from the old one and published (lock rank 5).
    pub(super) chain_edit: Mutex<()>,
    /// Held while layers are folded and removed, and while the disk is closed (lock rank 2).
    pub(super) reaping: Mutex<()>,
    /// Set while the gate is held exclusively: what was saved must not change any more.
    pub(super) closed: AtomicBool,
    pub(super) tracking: Tracking,
    pub(super) holds: Holds,
    pub(super) regions: Regions,
    pub(super) watches: Watches,
    /// What the last round of disarming saw. Held for a round, and by who keeps rounds away (lock rank 2).
    pub(super) disarming: Mutex<Vec<(u64, u64)>>,
    pub(super) state: Arc<dyn Dir>,
    pub(super) store_io: Arc<StoreIo>,
    pub(super) policy: StoreErrorPolicy,
    pub(super) chunk: u64,
    pub(super) counters: Arc<Counters>,
    pub(super) pace: Arc<Pace>,
    pub(super) events: Arc<Events>,
    /// Why a flush failed, if one did.
    flush_failed: Mutex<Option<String>>,
    /// The image's own name, with links resolved when it was opened.
    pub(super) file: PathBuf,
    /// What became of the disk's files behind our back, if anything.
    pub(super) misplaced: Mutex<Option<String>>,
    /// Length of the image's file as far as we made it.
    image_len: AtomicU64,
    opens: AtomicU64,
    /// How the tracking state was found at open, for status.
    pub(super) origin: String,
    /// The checkpoint that recorded then: what was found is about its interval.
    pub(super) opened_with: Option<Uuid>,
    pub(super) losses: Losses,
    /// The checkpoint that recorded when foreign writers were last looked for in vain.
    pub(super) looked: Mutex<Option<Uuid>>,
    /// The image bears our mark.
    pub(super) marked: AtomicBool,
    /// The state directory's lock; None in tests.
    _lock: Option<crate::storage::lock::FileLock>,
}

/// What a disk is made of.
pub(super) struct DiskParts {
    pub name: String,
    pub image: Arc<dyn Image>,
    pub chain: Chain,
    pub tracking: Tracking,
    pub regions: Regions,
    pub state: Arc<dyn Dir>,
    pub store_io: Arc<StoreIo>,
    pub counters: Arc<Counters>,
    pub pace: Arc<Pace>,
    pub events: Arc<Events>,
    pub origin: String,
    pub lock: Option<crate::storage::lock::FileLock>,
}

impl Disk {
    pub(super) fn new(parts: DiskParts, options: &Options) -> Self {
        let image_len = parts.image.stamp().map_or(0, |stamp| stamp.size);
        Disk {
            uuid: parts.tracking.directory().disk,
            opened_with: recording_checkpoint(&parts.tracking.directory()).map(|entry| entry.uuid),
            size: AtomicU64::new(parts.image.size()),
            name: parts.name,
            file: resolved(parts.image.path()),
            image: parts.image,
            gate: RwLock::new(()),
            chain: Published::new(parts.chain),
            chain_edit: Mutex::new(()),
            reaping: Mutex::new(()),
            closed: AtomicBool::new(false),
            tracking: parts.tracking,
            holds: Holds::default(),
            regions: parts.regions,
            watches: Watches::default(),
            disarming: Mutex::new(Vec::new()),
            state: parts.state,
            store_io: parts.store_io,
            policy: options.on_store_error,
            chunk: options.chunk,
            counters: parts.counters,
            pace: parts.pace,
            events: parts.events,
            flush_failed: Mutex::new(None),
            misplaced: Mutex::new(None),
            image_len: AtomicU64::new(image_len),
            opens: AtomicU64::new(0),
            losses: Losses::new(options),
            looked: Mutex::new(None),
            marked: AtomicBool::new(false),
            origin: parts.origin,
            _lock: parts.lock,
        }
    }

    /// The disk's name, unique in its mount.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The disk's identity, kept in its sidecar.
    pub fn uuid(&self) -> Uuid {
        self.uuid
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.size.load(Ordering::SeqCst)
    }

    /// Whether guest writes are refused.
    pub fn read_only(&self) -> bool {
        self.image.read_only()
    }

    /// Whether others may change what is read.
    pub fn is_shared(&self) -> bool {
        self.image.is_shared()
    }

    /// The internal snapshot of the image that is served, by name.
    pub fn internal_snapshot(&self) -> Option<&str> {
        self.image.snapshot()
    }

    /// The image's file.
    pub fn image_path(&self) -> &Path {
        self.image.path()
    }

    /// The image's format.
    pub fn format(&self) -> Format {
        self.image.format()
    }

    /// Adds to an ImageInfo, in QEMU's names, what the image's format knows of it.
    pub fn describe_image(&self, object: &mut serde_json::Map<String, serde_json::Value>) {
        self.image.describe(object);
    }

    /// Bytes of a cluster of the image, where its format has them.
    pub fn cluster_bytes(&self) -> Option<u64> {
        self.image.cluster_bytes()
    }

    pub(super) fn image(&self) -> &Arc<dyn Image> {
        &self.image
    }

    /// Last change of the disk by the guest, in nanoseconds since the epoch.
    pub fn mtime_ns(&self) -> i64 {
        self.tracking.last_write_ns()
    }

    /// Counts an open of the live file, which keeps the disk from being removed.
    pub fn opened(&self) {
        self.opens.fetch_add(1, Ordering::SeqCst);
    }

    /// The counterpart of [`Disk::opened`].
    pub fn closed(&self) {
        let _ = self.opens.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |opens| opens.checked_sub(1));
    }

    /// Opens that were not closed yet.
    pub(super) fn opens(&self) -> u64 {
        self.opens.load(Ordering::SeqCst)
    }

    pub(super) fn is_open(&self) -> bool {
        self.opens.load(Ordering::SeqCst) > 0
    }

    /// Reads what the guest sees, at most up to the end of the disk; returns the count.
    pub fn read(&self, buf: &mut [u8], offset: u64) -> Result<usize> {
        let len = (self.size().saturating_sub(offset)).min(buf.len() as u64) as usize;
        let Some(buf) = buf.get_mut(..len) else { return Ok(0) };
        let _request = self.counters.guest_read(len);
        if len > 0 {
            self.image.read_at(buf, offset)?;
        }
        Ok(len)
    }

    /// Writes up to the end of the disk and returns the count; ENOSPC where `offset` is at or past the end.
    pub fn write(&self, data: &[u8], offset: u64) -> Result<usize> {
        self.write_under(&Permit::ALWAYS, data, offset)
    }

    /// The same for a write that depends on a watch.
    pub(super) fn write_under(&self, permit: &Permit, data: &[u8], offset: u64) -> Result<usize> {
        let (len, _request) = self.admit_write(data.len(), offset)?;
        self.write_pieces(&data[..len], offset, permit, &mut Waits).map(|(count, _)| count)
    }

    /// The same for who need not answer in this thread: `done` takes the result, here or, where this thread comes to
    /// hang in a call on a store, in another one. Shorter writes make such calls here, which spares two wake-ups.
    pub fn write_then(self: &Arc<Self>, data: &[u8], offset: u64, done: impl FnOnce(Result<usize>) + Send + 'static) {
        self.write_then_under(&Permit::ALWAYS, data, offset, done);
    }

    /// The same for a write that depends on a watch.
    pub(super) fn write_then_under(
        self: &Arc<Self>,
        permit: &Permit,
        data: &[u8],
        offset: u64,
        done: impl FnOnce(Result<usize>) + Send + 'static,
    ) {
        let (len, _request) = match self.admit_write(data.len(), offset) {
            Ok(admitted) => admitted,
            Err(e) => return done(Err(e)),
        };
        let data = &data[..len];
        let mut answered = Answered { disk: self, data, offset, permit, done: Some(done) };
        let written = self.write_pieces(data, offset, permit, &mut answered);
        if let Some(done) = answered.done {
            done(written.map(|(count, _)| count));
        }
    }

    /// How much of a write of `len` bytes lies in the disk; it counts as a guest's request while that is kept.
    fn admit_write(&self, len: usize, offset: u64) -> Result<(usize, Request<'_>)> {
        self.check_writable()?;
        let inside = (self.size().saturating_sub(offset)).min(len as u64) as usize;
        if inside == 0 && len > 0 {
            return Err(self.past_the_end(offset));
        }
        Ok((inside, self.counters.guest_write(inside)))
    }

    /// Writes `data` piece by piece; an error after the first piece is a short count.
    pub(super) fn write_pieces(
        &self,
        data: &[u8],
        offset: u64,
        permit: &Permit,
        wait: &mut impl Wait,
    ) -> Result<(usize, Caller)> {
        let mut done = 0;
        for piece in data.chunks(MAX_GATE_BYTES as usize) {
            let at = offset + done as u64;
            match self.mutate(at, piece.len() as u64, false, permit, wait, || self.image.write_at(piece, at)) {
                Ok(Caller::GoesOn) => done += piece.len(),
                Ok(Caller::IsReplaced) => return Ok((done, Caller::IsReplaced)),
                Err(_) if done > 0 => break,
                Err(e) => return Err(e),
            }
        }
        Ok((done, Caller::GoesOn))
    }

    /// Makes a range read as zeros and keeps it allocated. ENOSPC where it passes the end.
    pub fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        self.write_zeroes_under(&Permit::ALWAYS, offset, len)
    }

    /// The same for who depends on a watch.
    pub(super) fn write_zeroes_under(&self, permit: &Permit, offset: u64, len: u64) -> Result<()> {
        self.check_range(offset, len)?;
        let _request = self.counters.guest_zero(len);
        let end = offset + len;
        let mut at = offset;
        while at < end {
            let piece = gate_piece(at, end);
            let _ = self.mutate(at, piece, true, permit, &mut Waits, || self.image.write_zeroes(at, piece, false))?;
            at += piece;
        }
        Ok(())
    }

    /// Gives a range back to the host; it reads as zeros. ENOSPC where it passes the end.
    pub fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.discard_under(&Permit::ALWAYS, offset, len)
    }

    /// The same for who depends on a watch.
    pub(super) fn discard_under(&self, permit: &Permit, offset: u64, len: u64) -> Result<()> {
        self.check_range(offset, len)?;
        let _request = self.counters.guest_zero(len);
        let end = offset + len;
        let mut at = offset;
        while at < end {
            // A hole stays as it is: nothing to preserve, nothing to free. It need not be asked under the gate, since a
            // write that fills it meanwhile is as good as one after the discard.
            let status = self.image.block_status(at, (end - at).min(MAX_HOLE_BYTES))?;
            let piece = if status.zero { status.len.max(1) } else { gate_piece(at, end).min(status.len.max(1)) };
            if status.zero {
                let _gate = self.gate.read();
                self.check_open()?;
                // What is written again as it was counts as changed.
                let looked = self.watches.before(at..at + piece);
                drop(permit.enter()?);
                self.tracking.mark(at, piece);
                self.watches.after(at..at + piece, looked);
            } else {
                let _ =
                    self.mutate(at, piece, true, permit, &mut Waits, || self.image.write_zeroes(at, piece, true))?;
            }
            at += piece;
        }
        Ok(())
    }

    /// Makes all completed changes durable. After a failure every later flush fails too: what was lost is not known.
    pub fn flush(&self) -> Result<()> {
        let _request = self.counters.guest_flush();
        self.flush_image()
    }

    pub(super) fn flush_image(&self) -> Result<()> {
        if self.flush_failure().is_some() {
            return Err(Error::new(errno::EIO, format!("flush of disk '{}'", self.name), "an earlier flush failed")
                .at_path(self.image.path())
                .hint("check the host's storage, then unmount and mount again"));
        }
        if self.image.read_only() {
            return Ok(());
        }
        self.image.flush().inspect_err(|e| {
            let mut failed = self.flush_failed.lock();
            if failed.is_none() {
                log::error!("disk '{}': {e}; every flush fails until it is mounted again", self.name);
                let reason = format!("a flush of the image failed: {e}");
                *failed = Some(reason.clone());
                drop(failed);
                // The kernel may have dropped pages that a view or a backup has read: the image may fall back behind a
                // checkpoint.
                self.lose_tracking(&reason);
            }
        })
    }

    /// Why the image may change by itself, if it may: then no interval of this session is known.
    pub(super) fn flush_failure(&self) -> Option<String> {
        self.flush_failed.lock().clone()
    }

    /// Whether a run of the live disk is known to read as zeros.
    pub fn block_status(&self, offset: u64, len: u64) -> Result<BlockStatus> {
        self.image.block_status(offset, len)
    }

    /// Whether a run of the live disk is the image's own, and not of what lies below it; as [`View::is_own`].
    ///
    /// [`View::is_own`]: super::view::View::is_own
    pub fn is_own(&self, offset: u64, len: u64) -> Result<(bool, u64)> {
        self.image.is_own(offset, len)
    }

    /// All steps of the module for at most 1 MiB. `zeroes`: the range will read as zeros, so that what reads as
    /// zeros already needs no copy.
    fn mutate(
        &self,
        offset: u64,
        len: u64,
        zeroes: bool,
        permit: &Permit,
        wait: &mut impl Wait,
        change: impl Fn() -> Result<()>,
    ) -> Result<Caller> {
        loop {
            {
                let (_gate, _pin) = self.enter(offset, len)?;
                self.check_open()?;
                if offset + len > self.size() {
                    return Err(self.past_the_end(offset));
                }
                if !self.must_preserve(offset, len, zeroes)? {
                    let looked = self.watches.before(offset..offset + len);
                    let hold = permit.enter()?;
                    self.tracking.mark(offset, len);
                    let changed = change();
                    drop(hold);
                    self.watches.after(offset..offset + len, looked);
                    self.tracking.note_write();
                    return changed.map(|()| Caller::GoesOn);
                }
            }
            if self.preserve(offset, len, zeroes, wait)? == Caller::IsReplaced {
                return Ok(Caller::IsReplaced);
            }
        }
    }

    pub(super) fn known_size(&self) -> u64 {
        self.image_len.load(Ordering::SeqCst)
    }

    /// Takes the length that the image's file has now for the one that we made.
    pub(super) fn set_known_size(&self) {
        if let Ok(stamp) = self.image.stamp() {
            self.image_len.store(stamp.size, Ordering::SeqCst);
            self.tracking.note_len(stamp.size);
        }
    }

    /// Grows or shrinks the disk. The new area counts as changed. EBUSY for shrinking while a view exists.
    pub(super) fn resize(&self, size: u64) -> Result<()> {
        self.check_writable()?;
        if size == 0 || size > crate::units::MAX_DISK_BYTES {
            return Err(Error::new(
                errno::EINVAL,
                format!("size {size} of disk '{}'", self.name),
                "not from 1 byte to 1 EiB",
            ));
        }
        if self.image.format() == Format::Qcow2 && !size.is_multiple_of(512) {
            let why = "the new size of a qcow2 image must be a multiple of 512";
            return Err(Error::new(errno::EINVAL, format!("size {size} of disk '{}'", self.name), why));
        }
        self.holds.check_none(&self.name)?;
        self.reap();
        self.keep_disabled()?;
        // What grows or is cut off may come back as it was: those regions are armed, and no round disarms them meanwhile.
        let _no_disarm = self.disarming.lock();
        let old = self.size();
        if !self.regions.given_up() {
            self.regions.arm(size.min(old)..size.max(old), &self.tracking.sidecar, &self.counters)?;
        }
        let gate = self.gate.write();
        self.tracking.note_write();
        if size < old && !self.chain.load().layers.is_empty() {
            return Err(Error::new(
                errno::EBUSY,
                format!("disk '{}'", self.name),
                "it cannot shrink while snapshots of it exist",
            )
            .hint("drop the snapshots first"));
        }
        // Bytes that are cut off may belong to any volume; growth touches none.
        let touched = if size < old { 0 } else { old }..u64::MAX;
        let looked = self.watches.before(touched.clone());
        if size > old {
            self.resize_bitmaps(size, &gate)?;
            self.tracking.note_next_len(size);
            if let Err(e) = self.image.resize(size) {
                self.set_known_size();
                self.resize_bitmaps(old, &gate)?;
                return Err(e);
            }
        } else if size < old {
            self.tracking.note_next_len(size);
            self.image.resize(size).inspect_err(|_| self.set_known_size())?;
            // Bits are cut off once it is durable: a power loss would bring back what they say of.
            if let Err(e) = self.flush_image().and_then(|()| self.resize_bitmaps(size, &gate)) {
                // Longer bitmaps than the disk are harmless, and the next open cuts them.
                log::warn!("disk '{}': {e}", self.name);
            }
        }
        self.size.store(size, Ordering::SeqCst);
        self.watches.after(touched, looked);
        self.tracking.note_write();
        self.set_known_size();
        self.renew_loss();
        Ok(())
    }

    /// New recording bitmaps of the new size, then the directory. The gate proves that nobody marks meanwhile.
    fn resize_bitmaps(&self, size: u64, _gate: &RwLockWriteGuard<'_, ()>) -> Result<()> {
        use super::tracking::{Recording, fine_name, recording_entry};
        use crate::bitmap::Bits;
        let old = self.tracking.recording();
        let mut new = Vec::new();
        for recording in old.iter() {
            let uuid = Uuid::new_v4();
            let bits = size.div_ceil(recording.bitmap.granularity());
            let words = self.tracking.shm.create(&fine_name(uuid), Bits::words_for(bits))?;
            let dirty = self.grows_dirty(recording);
            let bitmap = Arc::new(recording.bitmap.resized(size, Bits::zeroed(words, bits), dirty)?);
            new.push(self.tracking.with_area(Recording { uuid, bitmap, area: None })?);
        }
        let region_size = crate::bitmap::region_size_for(size);
        if region_size > self.regions.size() {
            self.regions.widen(region_size, size, &self.tracking.sidecar)?;
        }
        self.tracking.sidecar.commit(|directory| {
            directory.size = size;
            super::users::cut_disabled(directory, size);
            for (old, new) in old.iter().zip(&new) {
                super::persistent::follow(directory, old.uuid, new);
                for entry in directory.checkpoints.iter_mut().map(|checkpoint| &mut checkpoint.bitmap) {
                    if entry.uuid == old.uuid {
                        *entry =
                            crate::bitmap::BitmapEntry { everything: entry.everything.clone(), ..recording_entry(new) };
                    }
                }
            }
            Ok(())
        })?;
        self.tracking.switch(new);
        for recording in old.iter() {
            self.tracking.forget_words(recording.uuid);
        }
        Ok(())
    }

    /// Whether it is no longer served.
    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
    }

    pub(super) fn check_open(&self) -> Result<()> {
        if self.is_closed() {
            return Err(Error::new(errno::EIO, format!("disk '{}'", self.name), "it is no longer served"));
        }
        Ok(())
    }

    fn check_writable(&self) -> Result<()> {
        if self.image.read_only() {
            return Err(Error::new(errno::EROFS, format!("disk '{}'", self.name), "it is served read-only"));
        }
        Ok(())
    }

    fn check_range(&self, offset: u64, len: u64) -> Result<()> {
        self.check_writable()?;
        match offset.checked_add(len) {
            Some(end) if end <= self.size() => Ok(()),
            _ => Err(self.past_the_end(offset)),
        }
    }

    fn past_the_end(&self, offset: u64) -> Error {
        Error::new(errno::ENOSPC, format!("disk '{}'", self.name), format!("past its end at {} bytes", self.size()))
            .at_offset(offset)
    }
}

/// The next piece of a long range: at most 1 MiB, ending on a multiple of 1 MiB.
fn gate_piece(at: u64, end: u64) -> u64 {
    (end - at).min(MAX_GATE_BYTES - at % MAX_GATE_BYTES)
}
