//! Checking and repairing an image.
//!
//! The mapping tables are the truth: what the active L1 table, those of the snapshots, the directories and the header
//! refer to is in use, and refcounts and the COPIED flags have to agree with that. [`check`] finds where they do not;
//! [`repair`] changes refcounts and flags, never a mapping, so no guest byte changes.
//!
//! 1. **It ends.** Each cluster of metadata is read at most once for each thing that it can be (a second table in it
//!    is a finding, and is not followed) and holes are not read, so the work is bounded by what the file holds,
//!    whatever its tables say.
//! 2. **Memory is bounded**: counting by [`Counts`](super::refcount::Counts), findings by [`FINDINGS_KEPT`] (all are
//!    counted), one table at a time.
//! 3. **A finding says what cures it** ([`Cure`]). Repair touches nothing while one of them has no cure: refcounts
//!    rebuilt from tables that cannot be read in full would free clusters that hold data.
//!
//! An image whose header cannot be read is an error, not a finding. So is a medium that fails.

mod flags;
mod refcounts;
mod repair;
mod walk;

#[cfg(test)]
mod tests;

use super::header::Header;
use super::read_header;
use crate::error::Result;
use crate::storage::Storage;
pub use repair::{Repair, Repaired, repair};

/// Most findings that a report names; all are counted.
pub const FINDINGS_KEPT: usize = 1000;

/// What repairs a finding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Cure {
    /// Correcting refcounts where they stand.
    Counts,
    /// New refcount structures.
    Rebuild,
    /// Correcting COPIED flags.
    Flags,
    /// Nothing that this program does.
    None,
}

/// What kind of fault it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Data may be wrong, or become so with the next write.
    Corruption,
    /// Space is kept that nothing uses. Harmless.
    Leak,
}

/// One fault.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// Its kind.
    pub kind: Kind,
    /// What repairs it.
    pub cure: Cure,
    /// What it is, in words.
    pub text: String,
}

/// What a check found. Clusters are counted as `qemu-img check` counts them: of the active state only.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// End of the last cluster that is in use or counted as such.
    pub image_end_offset: u64,
    /// Clusters of the disk.
    pub total_clusters: u64,
    /// Clusters of the disk that are stored.
    pub allocated_clusters: u64,
    /// Those of them that are compressed.
    pub compressed_clusters: u64,
    /// Those of them that do not lie behind their neighbour in the file.
    pub fragmented_clusters: u64,
    /// Number of faults that endanger data.
    pub corruptions: u64,
    /// Number of clusters that are kept for nothing.
    pub leaks: u64,
    /// Clusters of bitmaps of an image that a program without support for bitmaps has written to. They are kept: who
    /// removes such a bitmap frees them.
    pub stale_bitmap_clusters: u64,
    /// The first [`FINDINGS_KEPT`] faults.
    pub findings: Vec<Finding>,
    /// The hardest of all cures that are needed.
    pub worst_cure: Option<Cure>,
    /// Whether the refcount structures themselves are at fault.
    pub needs_rebuild: bool,
    /// Whether refcounts were to be rebuilt at the next open for writing.
    pub dirty: bool,
    /// Whether a program has found the image to be corrupt.
    pub corrupt: bool,
}

impl Report {
    /// Whether nothing was found. The dirty bit alone is no fault.
    pub fn is_clean(&self) -> bool {
        self.corruptions == 0 && self.leaks == 0
    }

    fn add(&mut self, kind: Kind, cure: Cure, text: impl FnOnce() -> String) {
        match kind {
            Kind::Corruption => self.corruptions += 1,
            Kind::Leak => self.leaks += 1,
        }
        self.worst_cure = self.worst_cure.max(Some(cure));
        self.needs_rebuild |= cure == Cure::Rebuild;
        if self.findings.len() < FINDINGS_KEPT {
            self.findings.push(Finding { kind, cure, text: text() });
        }
    }

    fn corruption(&mut self, cure: Cure, text: impl FnOnce() -> String) {
        self.add(Kind::Corruption, cure, text);
    }
}

/// Checks the image in `storage`. The caller keeps writers away.
pub fn check(storage: &dyn Storage) -> Result<Report> {
    Ok(examine(storage, &read_header(storage)?)?.report)
}

/// The report, and what a repair needs beside it.
struct Examined {
    report: Report,
    walk: walk::Counted,
}

fn examine(storage: &dyn Storage, header: &Header) -> Result<Examined> {
    let mut report = Report {
        total_clusters: header.size.div_ceil(header.cluster_size()),
        dirty: header.is_dirty(),
        corrupt: header.is_corrupt(),
        ..Report::default()
    };
    let mut walk = walk::count(storage, header, &mut report)?;
    refcounts::compare(storage, header, &mut walk, &mut report)?;
    flags::examine(storage, header, &walk, &mut report)?;
    Ok(Examined { report, walk })
}
