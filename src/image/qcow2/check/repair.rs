//! Repair: refcounts and COPIED flags made to agree with the mapping.
//!
//! Where the refcount structures are sound, each refcount is corrected where it stands: whichever of those writes a
//! power loss leaves, every refcount is the old one or the right one. Where they are not, new ones are written in an
//! order that leaves a whole set at any time:
//! 1. new blocks and a new table, behind the last cluster that anything refers to, the old structures included;
//! 2. sync; the header's two fields switch to them in one write within one sector; sync;
//! 3. from there on the old structures are free, since the new ones do not count them.
//!
//! Then the flags are corrected, and synced; only a check without findings clears the dirty and corrupt bits. Until
//! then a dirty image stays dirty, so a crash at any point leaves one that is repaired again.

use super::refcounts::place_of;
use super::walk::Counted;
use super::{Cure, Examined, Kind, Report, examine, flags};
use crate::error::{Error, Result, errno};
use crate::image::qcow2::header::{Header, incompatible};
use crate::image::qcow2::read_header;
use crate::image::qcow2::refcount::{Counts, MAX_TABLE_BYTES, Place, Stored, TABLE_ENTRY_BYTES, to_bytes};
use crate::storage::Storage;
use std::collections::BTreeSet;

/// Where the header keeps `refcount_table_offset`; `refcount_table_clusters` follows.
const TABLE_FIELDS_AT: u64 = 48;
/// Where the header keeps `incompatible_features`.
const INCOMPATIBLE_AT: u64 = 72;

/// How much to repair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Repair {
    /// Free what nothing uses; EIO where there is anything worse.
    Leaks,
    /// Everything.
    All,
}

/// What a repair did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Repaired {
    /// What was found at first.
    pub before: Report,
    /// What is left.
    pub after: Report,
}

/// Repairs the image in `storage`, which nobody else uses. EIO, and nothing changed, where a finding has no cure.
pub fn repair(storage: &dyn Storage, extent: Repair) -> Result<Repaired> {
    let header = read_header(storage)?;
    let Examined { report: before, walk } = examine(storage, &header)?;
    if let Some(why) = refusal(&before, extent) {
        let first = before.findings.iter().find(|finding| finding.kind == Kind::Corruption);
        let why = first.map_or(why.to_owned(), |finding| format!("{why} (the first: {})", finding.text));
        return Err(Error::new(errno::EIO, "repair", why)
            .at_path(storage.path())
            .hint("save what can be read into a new image with: qemu-img convert"));
    }
    if before.findings.is_empty() && !(before.dirty || before.corrupt) {
        return Ok(Repaired { after: before.clone(), before });
    }
    if before.needs_rebuild {
        rebuild(storage, &header, &walk)?;
    } else {
        correct_in_place(storage, &header, &walk)?;
    }
    drop(walk);
    let header = read_header(storage)?;
    let Examined { report: mut after, walk } = examine(storage, &header)?;
    if extent == Repair::All && after.worst_cure == Some(Cure::Flags) {
        flags::correct(storage, &header, &walk)?;
        storage.sync()?;
        after = examine(storage, &header)?.report;
    }
    if after.is_clean() && (after.dirty || after.corrupt) && extent == Repair::All {
        let features = header.incompatible_features & !(incompatible::DIRTY | incompatible::CORRUPT);
        storage.write_at(&features.to_be_bytes(), INCOMPATIBLE_AT)?;
        storage.sync()?;
        (after.dirty, after.corrupt) = (false, false);
    }
    Ok(Repaired { before, after })
}

fn refusal(report: &Report, extent: Repair) -> Option<&'static str> {
    if report.worst_cure == Some(Cure::None) {
        Some("metadata is damaged that a repair of refcounts cannot restore")
    } else if extent == Repair::Leaks && report.worst_cure > Some(Cure::Counts) {
        Some("there is more to repair than leaks")
    } else {
        None
    }
}

/// Sets every stored refcount to the number of references.
fn correct_in_place(storage: &dyn Storage, header: &Header, counted: &Counted) -> Result<()> {
    let place = place_of(storage, header)?;
    let stored = Stored::open(storage, place)?;
    let clusters = storage.len()?.div_ceil(place.cluster_bytes()).max(counted.counts.end());
    for index in blocks_of(&counted.differing, place) {
        let offset = stored.block_offset(index).unwrap_or(0);
        if offset == 0 {
            continue;
        }
        let mut block = vec![0; place.cluster_bytes() as usize];
        storage.read_at(&mut block, offset)?;
        let first = index.saturating_mul(place.per_block());
        let mut changed = false;
        for cluster in first..first.saturating_add(place.per_block()).min(clusters) {
            let old = place.width.get(&block, cluster - first);
            let new = wanted(counted, cluster, old);
            if new != old {
                place.width.set(&mut block, cluster - first, new);
                changed = true;
            }
        }
        if changed {
            storage.write_at(&block, offset)?;
        }
    }
    storage.sync()
}

/// Indices of the refcount blocks of what was counted.
fn blocks_of(counts: &Counts, place: Place) -> BTreeSet<u64> {
    let clusters = counts.pages().into_iter().flat_map(|(first, len)| first..first + len);
    clusters.filter(|cluster| counts.get(*cluster) > 0).map(|cluster| cluster / place.per_block()).collect()
}

/// What a refcount should be: the references, and at most those of stale bitmaps where it has them.
fn wanted(counted: &Counted, cluster: u64, old: u64) -> u64 {
    let references = counted.counts.get(cluster);
    old.clamp(references, references.saturating_add(counted.stale.get(cluster)))
}

/// New refcount structures: where they lie, and for which blocks.
struct Plan {
    place: Place,
    /// Indices of the blocks, in order; they lie behind each other from the start, the table behind them.
    blocks: BTreeSet<u64>,
    first: u64,
}

impl Plan {
    /// One past the last cluster of the new structures.
    fn end(&self) -> u64 {
        self.first + self.blocks.len() as u64 + self.place.table_clusters
    }
}

fn plan(storage: &dyn Storage, header: &Header, counted: &Counted) -> Result<Plan> {
    let place = place_of(storage, header)?;
    let mut used = blocks_of(&counted.counts, place);
    used.extend(blocks_of(&counted.stale, place));
    let first = counted.counts.end().max(counted.stale.end());
    let mut plan = Plan { place: Place { table_clusters: 1, ..place }, blocks: used, first };
    loop {
        let end = plan.end();
        plan.blocks.extend(first / place.per_block()..=(end - 1) / place.per_block());
        let entries = plan.blocks.last().map_or(1, |last| last + 1);
        plan.place.table_clusters = (entries * TABLE_ENTRY_BYTES).div_ceil(place.cluster_bytes());
        plan.place.table_offset = (first + plan.blocks.len() as u64) << place.cluster_bits;
        if plan.place.table_clusters * place.cluster_bytes() > MAX_TABLE_BYTES {
            let why = "the clusters in use reach further than the largest refcount table (8 MiB)";
            return Err(Error::new(errno::EFBIG, "repair", why).at_path(storage.path()));
        }
        if plan.end() == end {
            return Ok(plan);
        }
    }
}

fn rebuild(storage: &dyn Storage, header: &Header, counted: &Counted) -> Result<()> {
    let plan = plan(storage, header, counted)?;
    let place = plan.place;
    let mut table = vec![0; place.table_entries() as usize];
    for (index, cluster) in plan.blocks.iter().zip(plan.first..) {
        let mut block = vec![0; place.cluster_bytes() as usize];
        let first = index * place.per_block();
        for slot in 0..place.per_block() {
            let count = new_count(counted, &plan, first.saturating_add(slot));
            if count > place.width.max() {
                let why = format!("cluster {} has more references than its refcount can say", first + slot);
                return Err(Error::new(errno::EIO, "repair", why).at_path(storage.path()));
            }
            place.width.set(&mut block, slot, count);
        }
        let offset = cluster << place.cluster_bits;
        storage.write_at(&block, offset)?;
        if let Some(entry) = table.get_mut(*index as usize) {
            *entry = offset;
        }
    }
    storage.write_at(&to_bytes(&table), place.table_offset)?;
    storage.sync()?;
    let mut fields = place.table_offset.to_be_bytes().to_vec();
    fields.extend_from_slice(&(place.table_clusters as u32).to_be_bytes());
    storage.write_at(&fields, TABLE_FIELDS_AT)?;
    storage.sync()
}

/// References to a cluster once the new structures have replaced the old ones.
fn new_count(counted: &Counted, plan: &Plan, cluster: u64) -> u64 {
    if (plan.first..plan.end()).contains(&cluster) {
        return 1;
    }
    let old_structures = counted.refcount_references.get(&cluster).copied().unwrap_or(0);
    let references = counted.counts.get(cluster).saturating_sub(old_structures);
    references.saturating_add(counted.stale.get(cluster).min(1))
}
