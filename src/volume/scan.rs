//! Looks at all disks: tables first, then physical volumes in whatever they left, then logical volumes over all disks.

use super::bytes::Part;
use super::table::{self, Partitions};
use super::{Disk, Scan, Segment, Volume, content, lvm};
use std::ops::Range;

/// Bytes at the start of a partition where a physical volume would show.
const LABEL_BYTES: u64 = 1024;
/// Bytes at the start of a disk where a partition table would show.
const TABLE_BYTES: u64 = 512;
/// Longest part of a warning in bytes.
const NOTE_MAX: usize = 300;

/// Finds the volumes of these disks, which are those of one mount: logical volumes may lie on several of them.
///
/// Never fails: what can't be read or is damaged gives no volumes and one warning a disk.
pub fn scan(disks: &[&dyn Disk]) -> Scan {
    let mut scan = Scan::default();
    let mut notes: Vec<Vec<String>> = vec![Vec::new(); disks.len()];
    let mut members = Vec::new();
    for ((index, disk), notes) in disks.iter().enumerate().zip(&mut notes) {
        let found = table::partitions(*disk).unwrap_or_else(|e| {
            notes.push(e.to_string());
            Partitions { is_table: true, ..Partitions::default() }
        });
        notes.extend(found.notes);
        scan.sources.extend(found.sources.into_iter().map(|range| (index, range)));
        scan.hints.push((index, 0..TABLE_BYTES.max(LABEL_BYTES)));
        let mut content_of = |range: Range<u64>| {
            content::probe(&Part::new(*disk, range)).unwrap_or_else(|e| {
                notes.push(e.to_string());
                None
            })
        };
        if !found.is_table {
            scan.contents.push(content_of(0..disk.size()));
            members.push((index, 0..disk.size()));
            continue;
        }
        scan.contents.push(None);
        for partition in found.all {
            let range = partition.range;
            let size = range.end.saturating_sub(range.start);
            let volume = Volume {
                name: format!("p{}", partition.number),
                size,
                segments: vec![Segment::linear(0, size, index, range.start)],
                table: partition.table,
                content: content_of(range.clone()),
            };
            scan.volumes.push(volume);
            scan.hints.push((index, range.start..range.start.saturating_add(LABEL_BYTES)));
            members.push((index, range));
        }
    }
    let logical = lvm::find(disks, &members);
    scan.sources.extend(logical.sources);
    for (disk, note) in logical.notes {
        if let Some(notes) = notes.get_mut(disk) {
            notes.push(note);
        }
    }
    for mut volume in logical.volumes {
        volume.content = content::probe(&volume.reader(disks)).unwrap_or_else(|e| {
            if let Some(notes) = notes.get_mut(volume.home()) {
                notes.push(e.to_string());
            }
            None
        });
        scan.volumes.push(volume);
    }
    // Stable: partitions of a disk come first, in their order.
    scan.volumes.sort_by_key(Volume::home);
    for ranges in [&mut scan.sources, &mut scan.hints] {
        tidy(ranges, disks);
    }
    let lines = disks.iter().zip(&notes).filter(|(_, notes)| !notes.is_empty());
    scan.warnings = lines.map(|(disk, notes)| format!("disk '{}': {}", disk.name(), joined(notes))).collect();
    scan
}

/// Cuts ranges to their disks, sorts them, and joins those that touch.
fn tidy(ranges: &mut Vec<(usize, Range<u64>)>, disks: &[&dyn Disk]) {
    for (disk, range) in ranges.iter_mut() {
        range.end = range.end.min(disks.get(*disk).map_or(0, |disk| disk.size()));
    }
    ranges.retain(|(_, range)| range.start < range.end);
    ranges.sort_by_key(|(disk, range)| (*disk, range.start));
    ranges.dedup_by(|(disk, range), (kept_disk, kept)| {
        let joins = disk == kept_disk && range.start <= kept.end;
        if joins {
            kept.end = kept.end.max(range.end);
        }
        joins
    });
}

/// One line of them, of bounded length.
fn joined(notes: &[String]) -> String {
    const MOST: usize = 6;
    let cut = |note: &String| match note.char_indices().nth(NOTE_MAX) {
        Some((end, _)) => format!("{}…", note.get(..end).unwrap_or_default()),
        None => note.clone(),
    };
    let mut line = notes.iter().take(MOST).map(cut).collect::<Vec<_>>().join("; ");
    if notes.len() > MOST {
        line += &format!("; and {} more", notes.len() - MOST);
    }
    line
}
