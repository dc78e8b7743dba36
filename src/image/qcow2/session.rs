//! What a read-write open keeps: the allocator and the marks of a session in the header.
//!
//! Version 3: the dirty bit is durable before the first refcount changes; from then on L1 and L2 tables are the only
//! truth, and refcounts are written, and the bit cleared, by [`Session::close`]. Version 2 has no such bit. There
//! refcounts are durable before a cluster is published: clusters are counted [`AHEAD_CLUSTERS`] at a time and handed out
//! of those, and a refcount that goes down is written late; so a power loss leaks clusters at most, and a read-write open
//! looks for leaks.

use super::alloc::{Allocator, Freed, set_dirty};
use super::bitmaps;
use super::header::Header;
use super::host::HostFile;
use super::refcount::{Place, Width};
use super::tables::{CompressedAt, HostOffset};
use crate::error::{Error, Result, errno};
use crate::image::Image;
use crate::image::persistent::Change;
use crate::storage::Storage;
use std::ops::Range;
use std::sync::Arc;

/// Clusters that version 2 counts at a time.
const AHEAD_CLUSTERS: u64 = 64;

/// The state of a read-write open; its owner serialises the calls.
#[derive(Debug)]
pub struct Session {
    file: Arc<HostFile>,
    /// Who may have the next clusters.
    pub alloc: Allocator,
    cluster_bits: u32,
    version: u32,
    incompatible_features: u64,
    /// The dirty bit may be set.
    dirty: bool,
    /// It is set, durably.
    marked: bool,
    /// Version 2: counted, but not handed out.
    ahead: Range<u64>,
    /// Clusters from here on were never used: they read as zeros whatever happens.
    fresh_from: u64,
    /// What the file is not cut below.
    keep_bytes: u64,
    /// Refcount blocks that are noted as tables.
    noted_blocks: usize,
    /// Where the file's areas have the refcount table.
    noted_table: HostOffset,
}

/// Clusters in a row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Clusters {
    /// The first one's host offset.
    pub offset: HostOffset,
    /// How many.
    pub count: u64,
    /// They read as zeros, and a power loss does not change that.
    pub fresh: bool,
}

impl Session {
    /// Of an image whose refcounts are right. At its end the file is cut behind its last cluster, but not below
    /// `keep_bytes`.
    pub fn new(file: Arc<HostFile>, header: &Header, keep_bytes: u64) -> Result<Session> {
        let width = Width::new(header.refcount_order)
            .ok_or_else(|| Error::new(errno::EINVAL, "qcow2 header: refcount_order", "more than 6"))?;
        let place = Place {
            cluster_bits: header.cluster_bits,
            width,
            table_offset: header.refcount_table_offset.0,
            table_clusters: u64::from(header.refcount_table_clusters),
        };
        let mut alloc = Allocator::open(file.clone(), place)?;
        for offset in alloc.block_offsets() {
            file.check("a refcount block", HostOffset(offset), 1)?;
        }
        // The allocator knows where the refcount table lies, also when it moves.
        let fixed = |(start, ..): &(u64, u64, &str)| *start != header.refcount_table_offset.0;
        for (start, end, name) in file.areas().into_iter().filter(fixed) {
            alloc.protect(start >> header.cluster_bits..end >> header.cluster_bits, name);
        }
        let mut session = Session {
            fresh_from: file.bytes().div_ceil(header.cluster_size()),
            file,
            alloc,
            cluster_bits: header.cluster_bits,
            version: header.version,
            incompatible_features: header.incompatible_features,
            dirty: false,
            marked: false,
            ahead: 0..0,
            keep_bytes,
            noted_blocks: 0,
            noted_table: header.refcount_table_offset,
        };
        session.note_blocks()?;
        Ok(session)
    }

    /// Hands out clusters, at least one and at most `count`, for guest data.
    pub fn allocate(&mut self, count: u64) -> Result<Clusters> {
        self.begin()?;
        let range = if self.version == 2 { self.allocate_counted(count)? } else { self.alloc.allocate(count)? };
        let offset = HostOffset(range.start << self.cluster_bits);
        let fresh = range.start >= self.fresh_from;
        self.fresh_from = self.fresh_from.max(range.end);
        let clusters = Clusters { offset, count: range.end - range.start, fresh };
        if let Err(e) = self.make_room(range).and_then(|()| self.note_blocks()) {
            self.take_back(&clusters);
            return Err(e);
        }
        Ok(clusters)
    }

    /// Clusters can be written to: they are no tables, and the file reaches over them.
    fn make_room(&mut self, clusters: Range<u64>) -> Result<()> {
        for cluster in clusters.clone() {
            self.file.check_not_table("a new cluster", HostOffset(cluster << self.cluster_bits))?;
        }
        self.file.grow(clusters.end << self.cluster_bits)
    }

    fn allocate_counted(&mut self, count: u64) -> Result<Range<u64>> {
        if self.ahead.is_empty() {
            let ahead = self.alloc.allocate(count.max(AHEAD_CLUSTERS))?;
            // A check sees no refcounts of clusters behind the end of the file.
            let grown = self.file.grow(ahead.end << self.cluster_bits);
            let counted = grown.and_then(|()| self.alloc.write_refcounts());
            if let Err(e) = counted {
                self.give_back(ahead);
                return Err(e);
            }
            self.ahead = ahead;
        }
        let end = self.ahead.end.min(self.ahead.start + count);
        let clusters = self.ahead.start..end;
        self.ahead.start = end;
        Ok(clusters)
    }

    /// Hands out exactly `count` clusters in a row, with their refcounts as the version asks.
    pub fn allocate_row(&mut self, count: u64) -> Result<Clusters> {
        self.begin()?;
        let row = self.alloc.allocate_row(count)?;
        self.fresh_from = self.fresh_from.max(row.end);
        let grown = self.file.grow(row.end << self.cluster_bits).and_then(|()| self.note_blocks());
        let counted = grown.and_then(|()| if self.version == 2 { self.alloc.write_refcounts() } else { Ok(()) });
        if let Err(e) = counted {
            self.give_back(row);
            return Err(e);
        }
        Ok(Clusters { offset: HostOffset(row.start << self.cluster_bits), count, fresh: false })
    }

    /// Hands out a place for `bytes` of compressed data, fewer than a cluster has. Version 3 only: in version 2 refcounts
    /// would have to be durable before each entry.
    pub fn allocate_bytes(&mut self, bytes: u64) -> Result<HostOffset> {
        self.begin()?;
        if let Some(place) = self.alloc.pack(bytes, None)? {
            return Ok(HostOffset(place));
        }
        let new = self.allocate(1)?;
        match self.alloc.pack(bytes, Some(new.offset.0 >> self.cluster_bits)) {
            Ok(place) => Ok(HostOffset(place.unwrap_or(new.offset.0))),
            Err(e) => {
                self.take_back(&new);
                Err(e)
            }
        }
    }

    /// Gives back a place for compressed data that was not published.
    pub fn take_back_bytes(&mut self, at: CompressedAt) {
        self.give_back(self.clusters_of(at));
    }

    /// Gives back what was handed out and not published.
    pub fn take_back(&mut self, clusters: &Clusters) {
        let first = clusters.offset.0 >> self.cluster_bits;
        self.give_back(first..first + clusters.count);
    }

    fn give_back(&mut self, clusters: Range<u64>) {
        if let Err(e) = self.alloc.take_back(clusters) {
            self.leak(&e);
        }
    }

    /// Clusters can be neither used nor freed, for this reason.
    pub fn leak(&mut self, e: &Error) {
        if !self.alloc.leaks() {
            log::warn!("{e}; clusters leak until the image is opened again");
        }
        self.alloc.note_leaks();
    }

    /// Whether a cluster is referred to once.
    pub fn is_own(&mut self, offset: HostOffset) -> Result<bool> {
        Ok(self.alloc.refcount(offset.0 >> self.cluster_bits)? == 1)
    }

    /// One reference to a cluster is gone from the tables in the file.
    pub fn free(&mut self, offset: HostOffset) -> Result<()> {
        self.begin()?;
        self.alloc.free(offset.0 >> self.cluster_bits)
    }

    /// A compressed cluster is gone from the tables in the file: one reference to each host cluster that it touched.
    pub fn free_compressed(&mut self, at: CompressedAt) -> Result<()> {
        self.begin()?;
        self.clusters_of(at).into_iter().try_for_each(|cluster| self.alloc.free(cluster))
    }

    /// The clusters that compressed data touch.
    fn clusters_of(&self, at: CompressedAt) -> Range<u64> {
        let last = (at.offset.0 + at.max_bytes - 1) >> self.cluster_bits;
        at.offset.0 >> self.cluster_bits..last + 1
    }

    /// See [`Allocator::begin_flush`].
    pub fn begin_flush(&mut self) -> Freed {
        self.alloc.begin_flush()
    }

    /// Before the first change of a refcount, or of an entry that lets a cluster go.
    pub fn begin(&mut self) -> Result<()> {
        if self.version >= 3 && !self.marked {
            self.dirty = true;
            self.incompatible_features = set_dirty(&*self.file, self.incompatible_features, true)?;
            self.marked = true;
        }
        Ok(())
    }

    /// Changes the persistent bitmaps, see [`bitmaps::change`]; gives the header as it is then.
    pub fn change_bitmaps(&mut self, changes: &[Change<'_>]) -> Result<Header> {
        self.begin()?;
        let changed = bitmaps::change(&*self.file, &mut self.alloc, changes);
        self.fresh_from = self.fresh_from.max(self.alloc.end());
        let noted = self.note_blocks();
        changed.and_then(|header| noted.map(|()| header))
    }

    /// Notes where the refcounts lie now; the file reaches over them.
    fn note_blocks(&mut self) -> Result<()> {
        let count = self.alloc.block_count();
        if count != self.noted_blocks {
            self.file.note_tables(self.alloc.block_offsets());
            self.noted_blocks = count;
        }
        let place = self.alloc.place();
        let table = HostOffset(place.table_offset);
        if table != self.noted_table {
            let bytes = place.table_clusters * place.cluster_bytes();
            self.file.forget(self.noted_table);
            self.noted_table = table;
            self.file.reserve("the refcount table", table, bytes, place.cluster_bytes())?;
        }
        Ok(())
    }

    /// Ends the session: refcounts are right and durable, the dirty bit is clear unless clusters leaked, the file ends with
    /// its last cluster. The caller has flushed. A change afterwards begins a new session.
    pub fn close(&mut self) -> Result<()> {
        let ahead = std::mem::replace(&mut self.ahead, 0..0);
        self.alloc.take_back(ahead)?;
        self.alloc.write_refcounts()?;
        let end = (self.alloc.end() << self.cluster_bits).max(self.keep_bytes);
        // A block device keeps its length.
        if end < self.file.bytes() && !self.file.image.is_block_device() {
            self.file.set_len(end)?;
        }
        if self.dirty && !self.alloc.leaks() {
            // Where that fails, the bit may be clear all the same.
            self.marked = false;
            self.incompatible_features = set_dirty(&*self.file, self.incompatible_features, false)?;
            self.dirty = false;
        }
        Ok(())
    }
}
