//! Counting what the image refers to: everything but the refcount structures themselves.

use super::{Cure, Report};
use crate::error::{Error, Result, errno};
use crate::image::qcow2::bitmaps_format::{Directory, Entry, Piece, decode_piece};
use crate::image::qcow2::header::{Header, autoclear};
use crate::image::qcow2::refcount::{Counts, TABLE_ENTRY_BYTES, read_table};
use crate::image::qcow2::snapshots::SnapshotTable;
use crate::image::qcow2::tables::{Geometry, L1Entry, L2Entry, decode_l1, decode_l2};
use crate::storage::Storage;
use std::collections::BTreeMap;

/// Bytes of a table that are read at once.
const READ_BYTES: u64 = 1 << 20;
/// Most clusters of metadata, and most L2 tables, that are remembered.
const METADATA_MAX_CLUSTERS: u64 = 8 << 20;

/// A cluster of metadata.
#[derive(Debug)]
pub(super) struct Meta {
    /// What it holds.
    pub what: &'static str,
    /// References to it as that.
    pub references: u64,
}

/// What was counted.
#[derive(Debug, Default)]
pub(super) struct Counted {
    /// References to each cluster.
    pub counts: Counts,
    /// Clusters of metadata, by index.
    pub metadata: BTreeMap<u64, Meta>,
    /// References from the refcount table and as refcount blocks; part of `counts`.
    pub refcount_references: BTreeMap<u64, u64>,
    /// References from bitmaps that nobody vouches for: kept, but no reason to call a refcount wrong.
    pub stale: Counts,
    /// Where the stored refcount differs from `counts`: 1 where it is one, 2 where it is not.
    pub differing: Counts,
}

impl Counted {
    /// Whether the stored refcount of a cluster is one. Known once the refcounts have been compared.
    pub fn is_one(&self, cluster: u64) -> bool {
        match self.differing.get(cluster) {
            0 => self.counts.get(cluster) == 1,
            stored => stored == 1,
        }
    }

    /// Counts `references` to `clusters` clusters of metadata from `first`; false, with a finding, where one of them
    /// holds other metadata already. They are counted in any case.
    pub fn claim(
        &mut self,
        report: &mut Report,
        what: &'static str,
        first: u64,
        clusters: u64,
        references: u64,
    ) -> Result<bool> {
        self.counts.add(first, clusters, references)?;
        let mut free = true;
        if self.metadata.len() as u64 + clusters > METADATA_MAX_CLUSTERS {
            let why = "more metadata than can be checked in 1 GiB of memory";
            return Err(Error::new(errno::EFBIG, "check", why));
        }
        for cluster in first..first.saturating_add(clusters) {
            let meta = self.metadata.entry(cluster).or_insert(Meta { what, references: 0 });
            if meta.references > 0 {
                free = false;
                let cure = if what.starts_with("refcount") { Cure::Rebuild } else { Cure::None };
                let other = meta.what;
                report.corruption(cure, || format!("cluster {cluster} is both {other} and {what}"));
            }
            meta.references += references;
            if what.starts_with("refcount") {
                *self.refcount_references.entry(cluster).or_default() += references;
            }
        }
        Ok(free)
    }
}

/// How an L2 table is referred to.
#[derive(Debug, Default)]
struct L2Use {
    /// By all L1 tables.
    references: u64,
    /// By the active one.
    active: u64,
    /// The first index there.
    index: Option<u64>,
}

struct Walk<'a> {
    storage: &'a dyn Storage,
    header: &'a Header,
    geometry: Geometry,
    file_bytes: u64,
    counted: Counted,
    report: &'a mut Report,
    /// By host offset.
    l2_tables: BTreeMap<u64, L2Use>,
}

/// The big-endian words of a table, none where it lies in a hole: a file may be far longer than what is in it.
pub(super) fn read_words(storage: &dyn Storage, offset: u64, bytes: u64) -> Result<Vec<u64>> {
    if is_hole(storage, offset, bytes)? {
        Ok(Vec::new())
    } else {
        read_table(storage, offset, bytes / TABLE_ENTRY_BYTES)
    }
}

/// Whether nothing is stored there, so that all of it is zeros.
pub(super) fn is_hole(storage: &dyn Storage, offset: u64, bytes: u64) -> Result<bool> {
    let status = storage.block_status(offset, bytes)?;
    Ok(status.zero && status.len >= bytes)
}

/// Counts the references of an image.
pub(super) fn count(storage: &dyn Storage, header: &Header, report: &mut Report) -> Result<Counted> {
    let mut walk = Walk {
        storage,
        header,
        geometry: header.geometry(),
        file_bytes: storage.len()?,
        counted: Counted::default(),
        report,
        l2_tables: BTreeMap::new(),
    };
    walk.counted.claim(walk.report, "the header", 0, 1, 1)?;
    walk.l1_table("active L1 table", header.l1_table_offset.0, header.l1_size, true)?;
    walk.snapshots()?;
    walk.l2_tables()?;
    walk.bitmaps()?;
    Ok(walk.counted)
}

impl Walk<'_> {
    /// Whether bytes can be referred to: the last cluster may end behind the file, nothing else.
    fn in_file(&self, offset: u64, bytes: u64) -> bool {
        let limit = self.file_bytes.saturating_add(self.geometry.cluster_size());
        offset.checked_add(bytes).is_some_and(|end| end < limit)
    }

    fn clusters_of(&self, bytes: u64) -> u64 {
        bytes.div_ceil(self.geometry.cluster_size())
    }

    /// Counts metadata, and tells whether it can be followed.
    fn claim(&mut self, what: &'static str, offset: u64, bytes: u64, references: u64) -> Result<bool> {
        let cluster_bytes = self.geometry.cluster_size();
        if offset == 0 || !offset.is_multiple_of(cluster_bytes) || !self.in_file(offset, bytes) {
            self.report.corruption(Cure::None, || format!("{what} at offset {offset}: not aligned or not in the file"));
            return Ok(false);
        }
        let (first, clusters) = (offset / cluster_bytes, self.clusters_of(bytes));
        self.counted.claim(self.report, what, first, clusters, references)
    }

    fn snapshots(&mut self) -> Result<()> {
        let table = match SnapshotTable::read(self.storage, self.header) {
            Ok(table) => table,
            // What the snapshots hold stays unknown.
            Err(e) if is_finding(&e) => {
                self.report.corruption(Cure::None, || e.to_string());
                return Ok(());
            }
            Err(e) => return Err(e),
        };
        for (snapshot, index) in table.all.iter().zip(0..) {
            match snapshot.l1_place(self.header, self.file_bytes) {
                Ok(None) => (),
                Ok(Some((offset, _))) => {
                    self.l1_table("L1 table of a snapshot", offset.0, snapshot.l1_size, false)?;
                }
                Err(why) => self.report.corruption(Cure::None, || format!("snapshot table, entry {index}: {why}")),
            }
        }
        if table.bytes > 0 {
            self.claim("the snapshot table", self.header.snapshots_offset.0, table.bytes, 1)?;
        }
        Ok(())
    }

    fn l1_table(&mut self, what: &'static str, offset: u64, entries: u32, active: bool) -> Result<()> {
        let bytes = u64::from(entries) * TABLE_ENTRY_BYTES;
        if entries == 0 || !self.claim(what, offset, bytes, 1)? {
            return Ok(());
        }
        let mut index = 0;
        while index < u64::from(entries) {
            let some = (u64::from(entries) - index).min(READ_BYTES / TABLE_ENTRY_BYTES);
            let words = read_words(self.storage, offset + index * TABLE_ENTRY_BYTES, some * TABLE_ENTRY_BYTES)?;
            for (raw, index) in words.into_iter().zip(index..) {
                // A snapshot's table may keep a stale COPIED flag beside nothing.
                if raw != 0 {
                    self.l1_entry(what, raw, index, active);
                }
                if self.l2_tables.len() as u64 > METADATA_MAX_CLUSTERS {
                    let why = "more L2 tables than can be checked in 1 GiB of memory";
                    return Err(Error::new(errno::EFBIG, "check", why).at_path(self.storage.path()));
                }
            }
            index += some;
        }
        Ok(())
    }

    fn l1_entry(&mut self, what: &'static str, raw: u64, index: u64, active: bool) {
        let offset = match decode_l1(raw, &self.geometry) {
            Ok(L1Entry::Unallocated) => return,
            Ok(L1Entry::Table { offset, .. }) => offset.0,
            Err(e) => return self.report.corruption(Cure::None, || format!("{what}, entry {index}: {e}")),
        };
        if !self.in_file(offset, self.geometry.cluster_size()) {
            self.report
                .corruption(Cure::None, || format!("{what}, entry {index}: L2 table at {offset} is not in the file"));
            return;
        }
        let table = self.l2_tables.entry(offset).or_default();
        table.references += 1;
        if active {
            table.active += 1;
            table.index.get_or_insert(index);
        }
    }

    /// Follows each L2 table once, however many L1 tables refer to it.
    fn l2_tables(&mut self) -> Result<()> {
        for (offset, table) in std::mem::take(&mut self.l2_tables) {
            if self.claim("an L2 table", offset, self.geometry.cluster_size(), table.references)? {
                self.l2_table(offset, &table)?;
            }
        }
        Ok(())
    }

    fn l2_table(&mut self, table_offset: u64, table: &L2Use) -> Result<()> {
        let cluster_bytes = self.geometry.cluster_size();
        let words = read_words(self.storage, table_offset, cluster_bytes)?;
        let per_entry = self.geometry.l2_entry_words() as usize;
        let mut next_offset = 0;
        // Clusters in a row are counted at once.
        let mut run = 0..0;
        for (entry, index) in words.chunks_exact(per_entry).zip(0..) {
            let raw = entry.first().copied().unwrap_or(0);
            let bitmap = entry.get(1).copied().unwrap_or(0);
            if raw == 0 && bitmap == 0 {
                continue;
            }
            let decoded = match decode_l2(raw, bitmap, &self.geometry) {
                Ok(decoded) => decoded,
                Err(e) => {
                    self.report.corruption(Cure::None, || format!("L2 table at {table_offset}, entry {index}: {e}"));
                    continue;
                }
            };
            let offset = match decoded {
                L2Entry::Unallocated | L2Entry::ZeroPlain | L2Entry::Subclusters { offset: None, .. } => continue,
                L2Entry::Compressed(at) => {
                    let first = at.offset.0 / cluster_bytes;
                    if self.check_place(table_offset, index, at.offset.0, at.max_bytes) {
                        let last = (at.offset.0 + at.max_bytes - 1) / cluster_bytes;
                        self.counted.counts.add(first, last - first + 1, table.references)?;
                    }
                    self.report.allocated_clusters += table.active;
                    self.report.compressed_clusters += table.active;
                    // Compressed clusters share host clusters, so they count as out of place.
                    self.report.fragmented_clusters += table.active;
                    continue;
                }
                L2Entry::ZeroPreallocated { offset, .. } | L2Entry::Standard { offset, .. } => offset.0,
                L2Entry::Subclusters { offset: Some(offset), .. } => offset.0,
            };
            self.report.allocated_clusters += table.active;
            if next_offset != 0 && next_offset != offset {
                self.report.fragmented_clusters += table.active;
            }
            next_offset = offset + cluster_bytes;
            if self.geometry.external_data {
                self.external(table, index, offset);
            } else if self.check_place(table_offset, index, offset, cluster_bytes) {
                let cluster = offset / cluster_bytes;
                if cluster == run.end {
                    run.end += 1;
                } else {
                    self.counted.counts.add(run.start, run.end - run.start, table.references)?;
                    run = cluster..cluster + 1;
                }
            }
        }
        self.counted.counts.add(run.start, run.end - run.start, table.references)
    }

    fn check_place(&mut self, table_offset: u64, index: u64, offset: u64, bytes: u64) -> bool {
        let good = self.in_file(offset, bytes);
        if !good {
            let text = || format!("L2 table at {table_offset}, entry {index}: data at {offset} is not in the file");
            self.report.corruption(Cure::None, text);
        }
        good
    }

    /// A raw external data file holds each cluster at the guest's own offset.
    fn external(&mut self, table: &L2Use, index: u64, offset: u64) {
        let raw = self.header.autoclear_features & autoclear::RAW_DATA_FILE != 0;
        let own =
            table.index.map(|l1_index| l1_index * self.geometry.l2_covers() + index * self.geometry.cluster_size());
        if raw && own.is_some_and(|own| own != offset) {
            let text = || format!("raw external data file: the cluster at {} lies at {offset}", own.unwrap_or(0));
            self.report.corruption(Cure::None, text);
        }
    }

    fn bitmaps(&mut self) -> Result<()> {
        let consistent = self.header.autoclear_features & autoclear::BITMAPS != 0;
        let directory = match Directory::read(self.storage, self.header) {
            Ok(None) => return Ok(()),
            Ok(Some(directory)) => directory,
            // A program that knows no bitmaps may have freed them and used the space for something else.
            Err(_) if !consistent => return Ok(()),
            Err(e) if is_finding(&e) => {
                self.report.corruption(Cure::None, || e.to_string());
                return Ok(());
            }
            Err(e) => return Err(e),
        };
        if !self.bitmap_area("the bitmap directory", directory.offset.0, directory.bytes, consistent)? {
            return Ok(());
        }
        for entry in &directory.all {
            self.bitmap(entry, consistent)?;
        }
        Ok(())
    }

    fn bitmap(&mut self, entry: &Entry, consistent: bool) -> Result<()> {
        let entries = u64::from(entry.table_entries);
        if entries == 0
            || !self.bitmap_area("a bitmap table", entry.table_offset.0, entries * TABLE_ENTRY_BYTES, consistent)?
        {
            return Ok(());
        }
        let mut done = 0;
        while done < entries {
            let some = (entries - done).min(READ_BYTES / TABLE_ENTRY_BYTES);
            let at = entry.table_offset.0 + done * TABLE_ENTRY_BYTES;
            for raw in read_words(self.storage, at, some * TABLE_ENTRY_BYTES)? {
                match decode_piece(raw, self.geometry.cluster_size()) {
                    Ok(Piece::Zeros | Piece::Ones) => (),
                    Ok(Piece::Stored(offset)) => {
                        self.bitmap_area("bitmap data", offset.0, self.geometry.cluster_size(), consistent)?;
                    }
                    Err(_) if !consistent => (),
                    Err(e) => {
                        let text = || format!("bitmap '{}': {e}", entry.name.escape_debug());
                        self.report.corruption(Cure::None, text);
                    }
                }
            }
            done += some;
        }
        Ok(())
    }

    /// Counts what belongs to bitmaps, and tells whether it can be followed.
    fn bitmap_area(&mut self, what: &'static str, offset: u64, bytes: u64, consistent: bool) -> Result<bool> {
        if consistent {
            return self.claim(what, offset, bytes, 1);
        }
        let cluster_bytes = self.geometry.cluster_size();
        if !offset.is_multiple_of(cluster_bytes) || !self.in_file(offset, bytes) {
            return Ok(false);
        }
        let (first, clusters) = (offset / cluster_bytes, self.clusters_of(bytes));
        if (first..first + clusters).any(|cluster| self.counted.stale.get(cluster) > 0) {
            return Ok(false);
        }
        self.counted.stale.add(first, clusters, 1)?;
        self.report.stale_bitmap_clusters += clusters;
        Ok(true)
    }
}

/// Whether an error is about what the image says, not about its medium.
fn is_finding(e: &Error) -> bool {
    e.errno() == errno::EINVAL
}
