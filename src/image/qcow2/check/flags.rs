//! The COPIED flags of the active tables: set exactly where the refcount is one.
//!
//! A flag that is set on a shared cluster lets the next write go to both of its owners; one that is missing costs a copy.
//! Flags are held against the refcounts as stored, so they are corrected after those. Tables point anywhere in any
//! order, so what is stored is not looked up in the file but known from the comparison ([`Counted::is_one`]): reading a
//! refcount block for each entry would take a table's length times a block's.

use super::walk::{Counted, read_words};
use super::{Cure, Report};
use crate::error::Result;
use crate::image::qcow2::header::Header;
use crate::image::qcow2::refcount::{TABLE_ENTRY_BYTES, to_bytes};
use crate::image::qcow2::tables::{COPIED, Geometry, L1Entry, L2Entry, decode_l1, decode_l2};
use crate::storage::Storage;
use std::collections::HashSet;

/// Reports the flags that are wrong.
pub(super) fn examine(storage: &dyn Storage, header: &Header, counted: &Counted, report: &mut Report) -> Result<()> {
    walk(storage, header, counted, &mut |table, index, is_one| {
        report.corruption(Cure::Flags, || {
            let why = if is_one { "missing although the refcount is 1" } else { "set although the refcount is not 1" };
            format!("{} table at {}, entry {index}: the COPIED flag is {why}", table.name, table.offset)
        });
        false
    })
}

/// Corrects the flags that are wrong; the refcounts that were counted are right and written.
pub(super) fn correct(storage: &dyn Storage, header: &Header, counted: &Counted) -> Result<()> {
    walk(storage, header, counted, &mut |_, _, _| true)
}

/// A table with its words as they are read.
struct Table {
    name: &'static str,
    offset: u64,
    words: Vec<u64>,
}

/// Told of each wrong flag: the table, the entry's index and whether the refcount is one; says whether to correct it.
type OnWrong<'a> = &'a mut dyn FnMut(&Table, u64, bool) -> bool;

fn walk(storage: &dyn Storage, header: &Header, counted: &Counted, on_wrong: OnWrong<'_>) -> Result<()> {
    let geometry = header.geometry();
    if header.l1_size == 0 {
        return Ok(());
    }
    let offset = header.l1_table_offset.0;
    let words = read_words(storage, offset, u64::from(header.l1_size) * TABLE_ENTRY_BYTES)?;
    let mut l1 = Table { name: "L1", offset, words };
    let l2_offsets: Vec<u64> = l1.words.iter().filter_map(|raw| l2_offset(*raw, &geometry)).collect();
    visit(storage, &mut l1, 1, on_wrong, |words| match words.first().map(|raw| decode_l1(*raw, &geometry)) {
        Some(Ok(L1Entry::Table { offset, copied })) => {
            Some((counted.is_one(offset.0 >> geometry.cluster_bits), copied))
        }
        _ => None,
    })?;
    let file_bytes = storage.len()?;
    let mut seen = HashSet::new();
    for offset in l2_offsets {
        if offset >= file_bytes || !seen.insert(offset) {
            continue;
        }
        let words = read_words(storage, offset, geometry.cluster_size())?;
        let mut l2 = Table { name: "L2", offset, words };
        visit(storage, &mut l2, geometry.l2_entry_words() as usize, on_wrong, |words| {
            let raw = words.first().copied().unwrap_or(0);
            let (offset, copied) = data_of(raw, words.get(1).copied().unwrap_or(0), &geometry)?;
            Some((geometry.external_data || counted.is_one(offset >> geometry.cluster_bits), copied))
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
    look: impl Fn(&[u64]) -> Option<(bool, bool)>,
) -> Result<()> {
    let mut corrections = Vec::new();
    for (words, index) in table.words.chunks_exact(width).zip(0..) {
        if let Some((is_one, copied)) = look(words)
            && is_one != copied
            && on_wrong(table, index, is_one)
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
