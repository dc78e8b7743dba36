//! Stores: where a layer keeps the old content of what the guest overwrote.
//!
//! A store is a sparse file with the disk's own offsets; a chunk of zeros stays a hole. Everything that touches the
//! directory of the stores goes through [`StoreIo`], which bounds the time (a hung file system must not hang the
//! guest) and the space (a store must not fill a file system that others need, I7).

use super::Options;
use crate::error::{Error, Result, errno};
use crate::storage::bounded::Bounded;
use crate::storage::buffer::{AlignedBuf, is_zero};
use crate::storage::clock::now_coarse_ns;
use crate::storage::watch::Watch;
use crate::storage::{Dir, SharedStorage, Storage};
use crate::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use crate::units::human_size;
use std::fmt;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use uuid::Uuid;

/// Free space that stores leave to others, where no limit is given: this share of the file system, or
/// [`RESERVED_BYTES`], whichever is more.
const RESERVED_SHARE: u64 = 20;
/// See [`RESERVED_SHARE`].
const RESERVED_BYTES: u64 = 1 << 30;
/// The free space is looked at again after this time.
const SPACE_CHECK_NS: i64 = 1_000_000_000;
/// A store is nearly full past this many percent of its limit.
const NEARLY_FULL_PERCENT: u64 = 80;
/// Most threads that wait on one disk's store directory; past that it counts as hung.
const MAX_STORE_THREADS: usize = 64;

/// What the stores of one mount have in common.
#[derive(Debug)]
pub struct Stores {
    /// Most bytes in all stores; None: the free-space rule.
    pub limit: Option<u64>,
    /// How long a call may take.
    pub timeout: Duration,
    /// Places for calls in the caller's own thread.
    pub watch: Watch,
    used: AtomicU64,
}

impl Stores {
    /// As the options say.
    pub fn new(options: &Options) -> Self {
        Stores {
            limit: options.store_limit,
            timeout: options.store_timeout,
            watch: Watch::new(options.store_calls_here, options.store_timeout),
            used: AtomicU64::new(0),
        }
    }

    /// Bytes in all stores now.
    pub fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }
}

/// Bounded access to the directory in which one disk's stores lie.
pub(super) struct StoreIo {
    pub dir: Arc<dyn Dir>,
    pool: Bounded,
    /// Shared by all stores of the mount.
    pub stores: Arc<Stores>,
    /// What the file system had left above the reserve at the last look, less what was written since.
    headroom: AtomicI64,
    headroom_at_look: AtomicI64,
    looked_at_ns: AtomicI64,
    /// Bytes that all stores together might take at the last look.
    allowed: AtomicU64,
    warned: AtomicBool,
    warn: Box<dyn Fn(u64, u64) + Send + Sync>,
}

impl fmt::Debug for StoreIo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StoreIo").field("dir", &self.dir).field("stores", &self.stores).finish_non_exhaustive()
    }
}

impl StoreIo {
    /// `warn` is told used and allowed bytes once when 80 % are passed.
    pub(super) fn new(dir: Arc<dyn Dir>, stores: Arc<Stores>, warn: Box<dyn Fn(u64, u64) + Send + Sync>) -> Arc<Self> {
        Arc::new(StoreIo {
            dir,
            pool: Bounded::new("store", stores.timeout, MAX_STORE_THREADS),
            stores,
            headroom: AtomicI64::new(0),
            headroom_at_look: AtomicI64::new(0),
            looked_at_ns: AtomicI64::new(0),
            allowed: AtomicU64::new(u64::MAX),
            warned: AtomicBool::new(false),
            warn,
        })
    }

    /// Runs a job on the store directory within the time limit.
    pub(super) fn run<T: Send + 'static>(
        self: &Arc<Self>,
        what: &str,
        job: impl FnOnce(&StoreIo) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let io = self.clone();
        self.pool.run(what, move || job(&io))
    }

    /// Writes a file of the store directory anew; durable when it returns.
    pub(super) fn keep(self: &Arc<Self>, what: &str, name: String, bytes: Vec<u8>) -> Result<()> {
        self.run(what, move |io| {
            io.dir.remove(&name)?;
            let file = io.dir.create(&name)?;
            file.write_at(&bytes, 0)?;
            file.sync()?;
            io.dir.sync()
        })
    }

    /// Makes the store of a new layer, or says why a snapshot cannot even begin (I7).
    pub(super) fn create(self: &Arc<Self>, layer: Uuid, size: u64) -> Result<Store> {
        let name = store_name(layer);
        let file_name = name.clone();
        let file = self.run("create the store", move |io| {
            io.admit(0)?;
            let file = io.dir.create(&file_name)?;
            file.set_len(size)?;
            Ok(file)
        })?;
        Ok(self.store_of(layer, file, 0))
    }

    /// The store of a layer that an earlier daemon made.
    pub(super) fn reopen(self: &Arc<Self>, layer: Uuid, size: u64) -> Result<Store> {
        let name = store_name(layer);
        let (file, bytes) = self.run("open the store", move |io| {
            let file = io.dir.open(&name)?;
            let bytes = allocated(&*file, 0, size)?;
            Ok((file, bytes))
        })?;
        self.stores.used.fetch_add(bytes, Ordering::Relaxed);
        Ok(self.store_of(layer, file, bytes))
    }

    fn store_of(self: &Arc<Self>, layer: Uuid, file: SharedStorage, bytes: u64) -> Store {
        Store { layer, file, io: self.clone(), bytes: Arc::new(AtomicU64::new(bytes)), doomed: AtomicBool::new(false) }
    }

    /// Removes what a layer left behind, when there is time for it.
    pub(super) fn remove_later(self: &Arc<Self>, layer: Uuid) {
        let io = self.clone();
        self.pool.detach(move || {
            if let Err(e) = io.dir.remove(&layer_dir(layer)) {
                log::warn!("a dropped snapshot's store could not be removed: {e}");
            }
        });
    }

    /// Whether `bytes` more may be written now. Counts them.
    fn admit(&self, bytes: u64) -> Result<()> {
        match self.stores.limit {
            Some(limit) => self.admit_under_limit(bytes, limit),
            None => self.admit_by_free_space(bytes),
        }
    }

    fn admit_under_limit(&self, bytes: u64, limit: u64) -> Result<()> {
        let used = self.stores.used.fetch_add(bytes, Ordering::Relaxed) + bytes;
        if used > limit || (bytes == 0 && used >= limit) {
            self.stores.used.fetch_sub(bytes, Ordering::Relaxed);
            return Err(Error::new(
                errno::ENOSPC,
                "store",
                format!("the limit of {} for all stores is reached", human_size(limit)),
            )
            .at_path(self.path())
            .hint("drop snapshots that are no longer read, or mount with a larger --store-limit"));
        }
        self.allow(limit);
        Ok(())
    }

    fn admit_by_free_space(&self, bytes: u64) -> Result<()> {
        let now_ns = now_coarse_ns();
        let left = self.headroom.fetch_sub(bytes as i64, Ordering::Relaxed) - bytes as i64;
        let stale = now_ns - self.looked_at_ns.load(Ordering::Relaxed) >= SPACE_CHECK_NS;
        let spent = left < self.headroom_at_look.load(Ordering::Relaxed) / 2;
        if stale || spent || bytes == 0 {
            let space = self.dir.space()?;
            let reserve = (space.total / RESERVED_SHARE).max(RESERVED_BYTES);
            let headroom = space.free as i64 - reserve as i64;
            self.headroom_at_look.store(headroom, Ordering::Relaxed);
            self.headroom.store(headroom - bytes as i64, Ordering::Relaxed);
            self.looked_at_ns.store(now_ns, Ordering::Relaxed);
            if headroom < bytes as i64 || headroom <= 0 {
                return Err(Error::new(
                    errno::ENOSPC,
                    "store",
                    format!(
                        "its file system has {} free of {}, and stores leave {} to others",
                        human_size(space.free),
                        human_size(space.total),
                        human_size(reserve)
                    ),
                )
                .at_path(self.path())
                .hint("free space, or mount with --store-dir on another file system, or with --store-limit SIZE"));
            }
            self.allow(self.stores.used() + headroom as u64);
        }
        self.stores.used.fetch_add(bytes, Ordering::Relaxed);
        Ok(())
    }

    /// Takes note of what the stores may take together, and warns once where they are past 80 % of it.
    fn allow(&self, bytes: u64) {
        self.allowed.store(bytes, Ordering::Relaxed);
        if self.nearly_full() && !self.warned.swap(true, Ordering::Relaxed) {
            (self.warn)(self.stores.used(), bytes);
        }
    }

    /// Gives back what a store no longer takes.
    fn give_back(&self, bytes: u64) {
        let _ = self
            .stores
            .used
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |used| Some(used.saturating_sub(bytes)));
        if !self.nearly_full() {
            self.warned.store(false, Ordering::Relaxed);
        }
    }

    /// Whether the stores are past 80 % of what they might take at the last look.
    pub(super) fn nearly_full(&self) -> bool {
        self.stores.used() / NEARLY_FULL_PERCENT > self.allowed.load(Ordering::Relaxed) / 100
    }

    pub(super) fn path(&self) -> PathBuf {
        self.dir.path("")
    }
}

/// The directory of a layer's files below the store directory.
pub(super) fn layer_dir(layer: Uuid) -> String {
    format!("layers/{layer}")
}

fn store_name(layer: Uuid) -> String {
    format!("layers/{layer}/store.raw")
}

/// Bytes of a range that are not holes.
fn allocated(file: &dyn Storage, offset: u64, len: u64) -> Result<u64> {
    let (mut at, end, mut bytes) = (offset, offset + len, 0);
    while at < end {
        let run = file.block_status(at, end - at)?;
        if !run.zero {
            bytes += run.len;
        }
        at += run.len.max(1);
    }
    Ok(bytes)
}

/// One layer's store.
#[derive(Debug)]
pub(super) struct Store {
    layer: Uuid,
    file: SharedStorage,
    io: Arc<StoreIo>,
    bytes: Arc<AtomicU64>,
    doomed: AtomicBool,
}

/// A piece of a store to read: the offset there, and where in the reader's buffer it goes.
#[derive(Debug, Clone)]
pub(super) struct Piece {
    pub layer: Arc<super::layer::Layer>,
    pub offset: u64,
    pub at: usize,
    pub len: usize,
}

impl Store {
    /// Writes `data` at `offset`, chunk by chunk, leaving chunks of zeros as holes.
    /// Complete when it returns `Ok`; when it returns an error nothing may be assumed.
    pub(super) fn write(&self, data: AlignedBuf, offset: u64, chunk: u64) -> Result<()> {
        let (file, bytes) = (self.file.clone(), self.bytes.clone());
        self.io.run("preserve old content", move |io| write_chunks(io, &*file, &bytes, &data, offset, chunk))
    }

    /// The same in this thread, however long it takes.
    pub(super) fn write_here(&self, data: &[u8], offset: u64, chunk: u64) -> Result<()> {
        write_chunks(&self.io, &*self.file, &self.bytes, data, offset, chunk)
    }

    /// Frees the space of a range that nobody reads any more. Failure costs only space.
    pub(super) fn punch(&self, offset: u64, len: u64) {
        let file = self.file.clone();
        let bytes = self.bytes.clone();
        let io = self.io.clone();
        self.io.pool.detach(move || {
            let freed = allocated(&*file, offset, len).and_then(|freed| file.punch_hole(offset, len).map(|()| freed));
            match freed {
                Ok(freed) => {
                    let _ = bytes.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |b| Some(b.saturating_sub(freed)));
                    io.give_back(freed);
                }
                Err(e) => log::warn!("the space of a released range could not be freed: {e}"),
            }
        });
    }

    /// Whether a run reads as zeros without being stored.
    pub(super) fn block_status(&self, offset: u64, len: u64) -> Result<crate::storage::BlockStatus> {
        let file = self.file.clone();
        self.io.run("look at the store", move |_| file.block_status(offset, len))
    }

    /// Makes what was preserved durable.
    pub(super) fn sync(&self) -> Result<()> {
        let file = self.file.clone();
        self.io.run("sync the store", move |_| file.sync())
    }

    /// Bytes that the store takes.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    pub(super) fn io(&self) -> &Arc<StoreIo> {
        &self.io
    }

    pub(super) fn stores(&self) -> &Stores {
        &self.io.stores
    }

    /// What to say where a call in somebody's own thread takes too long.
    pub(super) fn hangs(&self) -> Error {
        let why = format!("it gave no answer in {} ms", self.io.stores.timeout.as_millis());
        Error::new(errno::ETIMEDOUT, "store", why).at_path(self.io.path())
    }

    /// Removes the files now, where nobody reads them any more.
    pub(super) fn remove_now(&self) {
        let layer = self.layer;
        self.io.give_back(self.bytes());
        let removed = self.io.run("remove the store", move |io| io.dir.remove(&layer_dir(layer)));
        if let Err(e) = removed {
            log::warn!("a dropped snapshot's store could not be removed: {e}");
        }
    }

    /// The files go when the last holder lets go.
    pub(super) fn doom(&self) {
        self.doomed.store(true, Ordering::SeqCst);
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        if self.doomed.load(Ordering::SeqCst) {
            self.io.give_back(self.bytes());
            self.io.remove_later(self.layer);
        }
    }
}

fn write_chunks(
    io: &StoreIo,
    file: &dyn Storage,
    bytes: &AtomicU64,
    data: &[u8],
    offset: u64,
    chunk: u64,
) -> Result<()> {
    let chunk = chunk as usize;
    let mut start = 0;
    while start < data.len() {
        let zero = |from: usize| is_zero(&data[from..data.len().min(from + chunk)]);
        let mut end = start;
        while end < data.len() && !zero(end) {
            end += chunk;
        }
        let end = end.min(data.len());
        if end > start {
            io.admit((end - start) as u64)?;
            file.write_at(&data[start..end], offset + start as u64)
                .inspect_err(|_| io.give_back((end - start) as u64))?;
            bytes.fetch_add((end - start) as u64, Ordering::Relaxed);
        }
        start = if end == start { start + chunk } else { end };
    }
    Ok(())
}

/// A gap that is rather read than left out between two pieces of one store: a call costs as much.
const GAP_MAX_BYTES: u64 = 16 << 10;

/// One read of a store: for one piece, or several with small gaps between.
struct Span {
    layer: Arc<super::layer::Layer>,
    bytes: Range<u64>,
    /// Where it begins in the memory that all of them are read to.
    at: usize,
}

/// Reads pieces of the stores of one disk, in the order of their offsets, in one hand-off and puts them where they
/// belong.
pub(super) fn read_pieces(pieces: Vec<Piece>, buf: &mut [u8]) -> Result<()> {
    let mut spans: Vec<Span> = Vec::new();
    let mut total = 0;
    for piece in &pieces {
        let end = piece.offset + piece.len as u64;
        match spans.last_mut() {
            Some(last) if Arc::ptr_eq(&last.layer, &piece.layer) && piece.offset - last.bytes.end <= GAP_MAX_BYTES => {
                total += (end - last.bytes.end) as usize;
                last.bytes.end = end;
            }
            _ => {
                spans.push(Span { layer: piece.layer.clone(), bytes: piece.offset..end, at: total });
                total += piece.len;
            }
        }
    }
    let Some(first) = spans.first() else { return Ok(()) };
    let io = first.layer.store.io.clone();
    let (data, spans) = io.run("read the store", move |_| {
        let mut data = AlignedBuf::uncleared(total);
        for span in &spans {
            let into = span.at..span.at + (span.bytes.end - span.bytes.start) as usize;
            span.layer.store.file.read_at(&mut data[into], span.bytes.start)?;
        }
        Ok((data, spans))
    })?;
    let mut span = spans.iter().peekable();
    for piece in &pieces {
        while span.next_if(|span| span.bytes.end <= piece.offset || !Arc::ptr_eq(&span.layer, &piece.layer)).is_some() {
        }
        let Some(span) = span.peek() else { break };
        let from = span.at + (piece.offset - span.bytes.start) as usize;
        buf[piece.at..piece.at + piece.len].copy_from_slice(&data[from..from + piece.len]);
    }
    Ok(())
}
