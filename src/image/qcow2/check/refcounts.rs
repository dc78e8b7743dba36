//! Comparing the stored refcounts with what was counted.

use super::walk::{Counted, is_hole};
use super::{Cure, Kind, Report};
use crate::error::{Error, Result, errno};
use crate::image::qcow2::header::Header;
use crate::image::qcow2::refcount::{Place, Stored, Width};
use crate::storage::Storage;
use std::collections::HashSet;

/// Where the header says that the refcounts are.
pub(super) fn place_of(storage: &dyn Storage, header: &Header) -> Result<Place> {
    let width = Width::new(header.refcount_order).ok_or_else(|| {
        Error::new(errno::EINVAL, "qcow2 header: refcount_order", "more than 6").at_path(storage.path())
    })?;
    Ok(Place {
        cluster_bits: header.cluster_bits,
        width,
        table_offset: header.refcount_table_offset.0,
        table_clusters: u64::from(header.refcount_table_clusters),
    })
}

/// Counts the refcount structures, then compares every cluster of the file.
pub(super) fn compare(
    storage: &dyn Storage,
    header: &Header,
    counted: &mut Counted,
    report: &mut Report,
) -> Result<()> {
    let mut stored = Stored::open(storage, place_of(storage, header)?)?;
    let good = structures(&stored, counted, report)?;
    let clusters = storage.len()?.div_ceil(header.cluster_size()).max(counted.counts.end());
    let mut comparison = Comparison { counted, report, width: stored.place().width, last: 0 };
    let per_block = stored.place().per_block();
    let mut compared = HashSet::new();
    for block in 0..stored.table().len() as u64 {
        let offset = stored.block_offset(block).unwrap_or(0);
        // A block in a hole has a say only where something was counted: see below.
        if !good.contains(&block) || is_hole(storage, offset, header.cluster_size())? {
            continue;
        }
        compared.insert(block);
        let first = block.saturating_mul(per_block);
        for cluster in first..first.saturating_add(per_block).min(clusters) {
            comparison.cluster(cluster, stored.get(cluster)?, true)?;
        }
    }
    for (first, len) in comparison.counted.counts.pages() {
        for cluster in first..first + len {
            let block = cluster / per_block;
            if !compared.contains(&block) {
                comparison.cluster(cluster, 0, good.contains(&block))?;
            }
        }
    }
    comparison.report.image_end_offset = comparison.last * header.cluster_size();
    comparison.overlaps();
    Ok(())
}

/// Counts the refcount table and its blocks; gives the indices of the blocks that can be read.
fn structures(stored: &Stored<'_>, counted: &mut Counted, report: &mut Report) -> Result<HashSet<u64>> {
    let place = stored.place();
    let table_first = place.table_offset / place.cluster_bytes();
    counted.claim(report, "refcount table", table_first, place.table_clusters, 1)?;
    let mut good = HashSet::new();
    for index in 0..stored.table().len() as u64 {
        match stored.block_offset(index) {
            Ok(0) => (),
            Ok(offset) => {
                if counted.claim(report, "refcount block", offset / place.cluster_bytes(), 1, 1)? {
                    good.insert(index);
                }
            }
            Err(fault) => {
                report.corruption(Cure::Rebuild, || format!("refcount table, entry {index}: {fault}"));
            }
        }
    }
    Ok(good)
}

struct Comparison<'a> {
    counted: &'a mut Counted,
    report: &'a mut Report,
    width: Width,
    /// One past the last cluster in use, or counted as such.
    last: u64,
}

impl Comparison<'_> {
    fn cluster(&mut self, cluster: u64, stored: u64, has_block: bool) -> Result<()> {
        let counted = self.counted.counts.get(cluster);
        if stored == counted {
            if counted > 0 {
                self.last = self.last.max(cluster + 1);
            }
            return Ok(());
        }
        self.counted.differing.add(cluster, 1, if stored == 1 { 1 } else { 2 })?;
        self.last = self.last.max(cluster + 1);
        let tolerated = counted.saturating_add(self.counted.stale.get(cluster));
        if stored > counted && stored <= tolerated {
            return Ok(());
        }
        let text = || format!("cluster {cluster}: refcount {stored}, {counted} references");
        if counted > self.width.max() {
            self.report.corruption(Cure::None, || format!("{}: more than its refcount can say", text()));
        } else if stored < counted {
            self.report.corruption(if has_block { Cure::Counts } else { Cure::Rebuild }, text);
        } else {
            self.report.add(Kind::Leak, Cure::Counts, text);
        }
        Ok(())
    }

    /// Metadata that something else lies on.
    fn overlaps(&mut self) {
        for (cluster, meta) in &self.counted.metadata {
            if self.counted.counts.get(*cluster) > meta.references {
                let what = meta.what;
                let cure = if what.starts_with("refcount") { Cure::Rebuild } else { Cure::None };
                self.report.corruption(cure, || format!("cluster {cluster} is both {what} and data"));
            }
        }
    }
}
