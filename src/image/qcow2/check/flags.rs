//! The COPIED flags of the active tables: set exactly where the refcount is one.
//!
//! A flag that is set on a shared cluster lets the next write go to both of its owners; one that is missing costs a copy.
//! Flags are held against the refcounts as stored, so they are corrected after those.

use super::refcounts::place_of;
use super::{Cure, Report};
use crate::error::Result;
use crate::image::qcow2::header::Header;
use crate::image::qcow2::refcount::{Stored, TABLE_ENTRY_BYTES, read_table, to_bytes};
use crate::image::qcow2::tables::{COPIED, Geometry, L1Entry, L2Entry, decode_l1, decode_l2};
use crate::storage::Storage;
use std::collections::HashSet;

/// Reports the flags that are wrong.
pub(super) fn examine(storage: &dyn Storage, header: &Header, report: &mut Report) -> Result<()> {
    walk(storage, header, &mut |table, index, refcount| {
        report.corruption(Cure::Flags, || {
            format!(
                "{} table at {}, entry {index}: COPIED flag is wrong for refcount {refcount}",
                table.name, table.offset
            )
        });
        false
    })
}

/// Corrects the flags that are wrong; the refcounts are right and written. Gives the number of corrections.
pub(super) fn correct(storage: &dyn Storage, header: &Header) -> Result<u64> {
    let mut corrected = 0;
    walk(storage, header, &mut |_, _, _| {
        corrected += 1;
        true
    })?;
    Ok(corrected)
}

/// A table with its words as they are read.
struct Table {
    name: &'static str,
    offset: u64,
    words: Vec<u64>,
}

/// Told of each wrong flag: the table, the entry's index and the refcount; says whether to correct it.
type OnWrong<'a> = &'a mut dyn FnMut(&Table, u64, u64) -> bool;

fn walk(storage: &dyn Storage, header: &Header, on_wrong: OnWrong<'_>) -> Result<()> {
    let geometry = header.geometry();
    let mut stored = Stored::open(storage, place_of(storage, header)?)?;
    if header.l1_size == 0 {
        return Ok(());
    }
    let offset = header.l1_table_offset.0;
    let words = read_table(storage, offset, u64::from(header.l1_size))?;
    let mut l1 = Table { name: "L1", offset, words };
    let l2_offsets: Vec<u64> = l1.words.iter().filter_map(|raw| l2_offset(*raw, &geometry)).collect();
    visit(storage, &mut l1, 1, on_wrong, |words| match words.first().map(|raw| decode_l1(*raw, &geometry)) {
        Some(Ok(L1Entry::Table { offset, copied })) => {
            Ok(Some((stored.get(offset.0 >> geometry.cluster_bits)?, copied)))
        }
        _ => Ok(None),
    })?;
    let file_bytes = storage.len()?;
    let mut seen = HashSet::new();
    for offset in l2_offsets {
        if offset >= file_bytes || !seen.insert(offset) {
            continue;
        }
        let words = read_table(storage, offset, geometry.cluster_size() / TABLE_ENTRY_BYTES)?;
        let mut l2 = Table { name: "L2", offset, words };
        visit(storage, &mut l2, geometry.l2_entry_words() as usize, on_wrong, |words| {
            let raw = words.first().copied().unwrap_or(0);
            let Some((offset, copied)) = data_of(raw, words.get(1).copied().unwrap_or(0), &geometry) else {
                return Ok(None);
            };
            let external = geometry.external_data;
            let refcount = if external { 1 } else { stored.get(offset >> geometry.cluster_bits)? };
            Ok(Some((refcount, copied)))
        })?;
    }
    Ok(())
}

fn l2_offset(raw: u64, geometry: &Geometry) -> Option<u64> {
    match decode_l1(raw, geometry) {
        Ok(L1Entry::Table { offset, .. }) => Some(offset.0),
        _ => None,
    }
}

/// The host cluster of an L2 entry that has one to itself, and its flag.
fn data_of(raw: u64, bitmap: u64, geometry: &Geometry) -> Option<(u64, bool)> {
    match decode_l2(raw, bitmap, geometry) {
        Ok(L2Entry::Standard { offset, copied } | L2Entry::ZeroPreallocated { offset, copied }) => {
            Some((offset.0, copied))
        }
        Ok(L2Entry::Subclusters { offset: Some(offset), copied, .. }) => Some((offset.0, copied)),
        _ => None,
    }
}

/// Visits the entries of a table, each of `width` words; writes the table back where flags were corrected.
fn visit(
    storage: &dyn Storage,
    table: &mut Table,
    width: usize,
    on_wrong: OnWrong<'_>,
    mut look: impl FnMut(&[u64]) -> Result<Option<(u64, bool)>>,
) -> Result<()> {
    let mut corrections = Vec::new();
    for (words, index) in table.words.chunks_exact(width).zip(0..) {
        if let Some((refcount, copied)) = look(words)?
            && (refcount == 1) != copied
            && on_wrong(table, index, refcount)
        {
            corrections.push(index as usize * width);
        }
    }
    if corrections.is_empty() {
        return Ok(());
    }
    for at in corrections {
        if let Some(word) = table.words.get_mut(at) {
            *word ^= COPIED;
        }
    }
    storage.write_at(&to_bytes(&table.words), table.offset)
}
