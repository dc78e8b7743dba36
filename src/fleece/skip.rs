//! What a snapshot leaves out: bytes of volumes whose content nobody needs. They read as zeros in its views.
//!
//! Decided once, after the instant and before the snapshot is committed: its views are scanned for volumes, what these do
//! not use is cut inwards to whole chunks and kept in `layers/LAYER/skipped`: the offsets in bytes, 64 bits each,
//! little-endian, ascending, at which ranges begin and end, in turn. The directory has their checksum.
//!
//! * **Z1 One answer.** The file is complete and durable before a directory names it, and nothing is shown before that. So
//!   a view reads the same at any time, also after a kill: zeros there, for data, block status and map alike. A view whose
//!   file is gone or damaged is broken.
//! * **Z2 What a view leaves out counts as changed from then on.** The ranges are marked in the bitmap that records from its
//!   checkpoint on, durably before the commit. What comes into use without a write is in the next map then.
//! * **Z3 A map lists what its own view leaves out**, as zeros. An older point may have content there, and a chain must give
//!   what the view gives.
//! * **All that is known, or nothing.** Where a volume is not understood, cannot be read, shares bytes with another one, or
//!   takes longer than [`PATIENCE`], nothing of it is left out, with one line in the log. Nothing here fails a snapshot.
//!
//! Of what is left out nothing is preserved for this view any more: its chunks count as released in its layer.

use super::scan::FrozenVolumes;
use super::snapshot::Taking;
use super::store::{StoreIo, layer_dir};
use super::view::View;
use crate::bitmap::SkippedEntry;
use crate::error::{Error, Result, errno};
use crate::units::{human_size, join_ranges, round_down, round_up};
use crate::volume::{self, Content, Segment, Table, Volume};
use std::fmt;
use std::ops::Range;
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, Instant};
use uuid::Uuid;

/// How long volumes may be looked at: who froze the guest's file systems for the snapshot waits meanwhile.
const PATIENCE: Duration = Duration::from_secs(3);
/// Most ranges of a view; the longest ones are taken. They stand in memory, 16 bytes each.
const MAX_RANGES: usize = 1 << 16;
/// Bytes of one offset in the file.
const ENTRY_BYTES: usize = 8;

/// Which content is left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Skip {
    /// Pages of swap areas; their headers stay.
    pub swap: bool,
    /// Free blocks of ext2, ext3 and ext4.
    pub free: bool,
}

impl Skip {
    /// By its parts' names. EINVAL for an unknown one.
    pub fn of<'a>(names: impl IntoIterator<Item = &'a str>) -> Result<Skip> {
        let mut skip = Skip::default();
        for name in names {
            match name {
                "swap" => skip.swap = true,
                "free" => skip.free = true,
                _ => {
                    let what = format!("what to leave out: '{name}'");
                    return Err(Error::new(errno::EINVAL, what, "neither 'swap' nor 'free'"));
                }
            }
        }
        Ok(skip)
    }

    /// The names of its parts.
    pub fn names(self) -> impl Iterator<Item = &'static str> {
        [("swap", self.swap), ("free", self.free)].into_iter().filter_map(|(name, is_in)| is_in.then_some(name))
    }

    /// Whether nothing is left out.
    pub fn is_none(self) -> bool {
        self == Skip::default()
    }

    fn takes(self, content: &Content) -> bool {
        match content.kind.as_str() {
            "swap" => self.swap,
            "ext2" | "ext3" | "ext4" => self.free,
            _ => false,
        }
    }
}

/// Names with commas between them; none of them is fine, too.
impl FromStr for Skip {
    type Err = Error;

    fn from_str(text: &str) -> Result<Skip> {
        Skip::of(text.split(',').filter(|name| !name.is_empty()))
    }
}

impl fmt::Display for Skip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.names().collect::<Vec<_>>().join(","))
    }
}

/// What one view leaves out.
#[derive(Debug, Default)]
pub(super) struct Skipped {
    /// Sorted; they do not touch each other.
    ranges: Vec<Range<u64>>,
    told: Option<SkippedEntry>,
    unreadable: Option<String>,
}

impl Skipped {
    /// What a directory says of a view of `size` bytes.
    pub(super) fn load(io: &Arc<StoreIo>, layer: Uuid, told: Option<&SkippedEntry>, size: u64) -> Skipped {
        let Some(entry) = told else { return Skipped::default() };
        let found = read(io, layer).and_then(|bytes| parse(&bytes, entry.crc, size));
        let (ranges, unreadable) = match found {
            Ok(ranges) => (ranges, None),
            Err(e) => (Vec::new(), Some(format!("what it leaves out is not known: {e}"))),
        };
        Skipped { ranges, told: told.cloned(), unreadable }
    }

    /// Whether the byte at `offset` is left out, and where that ends, at most `end`.
    pub(super) fn run(&self, offset: u64, end: u64) -> (bool, u64) {
        let index = self.ranges.partition_point(|range| range.end <= offset);
        match self.ranges.get(index) {
            Some(range) if range.start <= offset => (true, range.end.min(end)),
            Some(range) => (false, range.start.min(end)),
            None => (false, end),
        }
    }

    /// The runs of a range, and whether they are left out.
    pub(super) fn runs(&self, offset: u64, len: u64) -> impl Iterator<Item = (Range<u64>, bool)> + '_ {
        let (mut at, end) = (offset, offset.saturating_add(len));
        std::iter::from_fn(move || {
            let start = at;
            (start < end).then(|| {
                let (is_in, until) = self.run(start, end);
                at = until;
                (start..until, is_in)
            })
        })
    }

    /// All of it, sorted.
    pub(super) fn ranges(&self) -> &[Range<u64>] {
        &self.ranges
    }

    /// Why it is not known, if so.
    pub(super) fn unreadable(&self) -> Option<&str> {
        self.unreadable.as_deref()
    }

    /// What of it is told.
    pub(super) fn told(&self) -> Option<&SkippedEntry> {
        self.told.as_ref()
    }
}

fn file_name(layer: Uuid) -> String {
    format!("{}/skipped", layer_dir(layer))
}

fn read(io: &Arc<StoreIo>, layer: Uuid) -> Result<Vec<u8>> {
    io.run("read what is left out", move |io| {
        let file = io.dir.open(&file_name(layer))?;
        let len = file.len()?.min((MAX_RANGES * 2 * ENTRY_BYTES) as u64);
        let mut bytes = vec![0; len as usize];
        file.read_at(&mut bytes, 0)?;
        Ok(bytes)
    })
}

/// Writes the file durably; gives its checksum.
fn write(io: &Arc<StoreIo>, layer: Uuid, ranges: &[Range<u64>]) -> Result<u32> {
    let bytes: Vec<u8> =
        ranges.iter().flat_map(|range| [range.start, range.end]).flat_map(|offset| offset.to_le_bytes()).collect();
    let crc = crc32c::crc32c(&bytes);
    io.keep("keep what is left out", file_name(layer), bytes)?;
    Ok(crc)
}

fn parse(bytes: &[u8], crc: u32, size: u64) -> Result<Vec<Range<u64>>> {
    let damaged = |why: &str| Err(Error::new(errno::EIO, "list of what is left out", why));
    if crc32c::crc32c(bytes) != crc {
        return damaged("its checksum is wrong");
    }
    let mut offsets = bytes.chunks_exact(ENTRY_BYTES).filter_map(|entry| entry.try_into().ok()).map(u64::from_le_bytes);
    let mut ranges: Vec<Range<u64>> = Vec::with_capacity(bytes.len() / ENTRY_BYTES / 2);
    while let (Some(start), Some(end)) = (offsets.next(), offsets.next()) {
        let after = ranges.last().is_none_or(|last| last.end < start);
        if !after || start >= end || end > size {
            return damaged("its ranges are out of order");
        }
        ranges.push(start..end);
    }
    Ok(ranges)
}

/// Leaves out of what is being taken what `skip` says; see the module. The layers are published, nothing is committed.
pub(super) fn leave_out(taking: &mut [Taking], skip: Skip) {
    let views: Vec<Arc<View>> = taking.iter().filter_map(Taking::view).map(Arc::new).collect();
    if skip.is_none() || views.len() != taking.len() {
        return;
    }
    for ((one, view), (skip, ranges)) in taking.iter_mut().zip(&views).zip(unneeded(&views, skip)) {
        let ranges = whole_chunks(ranges, view.layer.chunk, view.size());
        if ranges.is_empty() {
            continue;
        }
        let done = write(&one.disk.store_io, view.layer.uuid, &ranges).and_then(|crc| {
            let bytes = ranges.iter().map(|range| range.end - range.start).sum();
            let kinds = skip.names().map(str::to_owned).collect();
            one.leave_out(&ranges, SkippedEntry { kinds, bytes, crc }).map(|()| bytes)
        });
        match done {
            Ok(bytes) => log::info!("disk '{}': {} are left out ({skip})", view.disk_name(), human_size(bytes)),
            Err(e) => log::warn!("disk '{}': nothing is left out: {e}", view.disk_name()),
        }
    }
}

/// By view: the bytes that nobody needs, in any order, and of what kinds they are.
fn unneeded(views: &[Arc<View>], skip: Skip) -> Vec<(Skip, Vec<Range<u64>>)> {
    let mut all: Vec<(Skip, Vec<Range<u64>>)> = views.iter().map(|_| Default::default()).collect();
    let (found, failed) = FrozenVolumes::find(views);
    if failed {
        log::warn!("nothing is left out: a part of the disks could not be read");
        return all;
    }
    let volumes = candidates(&found, views, skip);
    let deadline = Instant::now() + PATIENCE;
    for volume in &volumes {
        let Some(content) = &volume.content else { continue };
        let unused = volume::unused(&Reader { volume, views, deadline }, content);
        match unused {
            Ok(unused) if !unused.is_empty() => {
                let pieces = unused.iter().flat_map(|range| volume.locate(range.start, range.end - range.start));
                for (disk, offset, len) in pieces {
                    let Some((kinds, ranges)) = all.get_mut(disk) else { continue };
                    kinds.swap |= content.kind == "swap";
                    kinds.free |= content.kind != "swap";
                    match ranges.last_mut() {
                        Some(last) if last.end == offset => last.end = offset.saturating_add(len),
                        _ => ranges.push(offset..offset.saturating_add(len)),
                    }
                }
            }
            Ok(_) => log::info!("volume '{}' ({}): nothing is known to be unused", volume.name, content.kind),
            Err(e) => log::warn!("volume '{}' ({}): nothing is left out: {e}", volume.name, content.kind),
        }
    }
    all
}

/// The volumes, and the disks without any, of which something may be left out.
fn candidates(found: &FrozenVolumes, views: &[Arc<View>], skip: Skip) -> Vec<Volume> {
    let mut volumes: Vec<Volume> = found.all().map(|volume| volume.volume().clone()).collect();
    for (index, view) in views.iter().enumerate() {
        volumes.extend(found.content_of(view).map(|content| Volume {
            name: view.disk_name().to_owned(),
            size: view.size(),
            segments: vec![Segment::linear(0, view.size(), index, 0)],
            table: Table::Mbr { kind: 0, uuid: String::new() },
            content: Some(content.clone()),
        }));
    }
    // What holds others is none of these: its bytes are theirs.
    volumes.retain(|volume| volume.content.as_ref().is_none_or(|content| content.kind != super::scan::LVM_MEMBER));
    if shares_bytes(&volumes) {
        log::warn!("nothing is left out: volumes share bytes");
        return Vec::new();
    }
    // A store of a snapshot, or a thin volume, may need blocks of another logical volume that are free there.
    let whole = found.warnings().is_empty();
    let is_wanted = |volume: &Volume| {
        volume.content.as_ref().is_some_and(|content| skip.takes(content))
            && (whole || !matches!(volume.table, Table::Lvm { .. }))
    };
    volumes.retain(is_wanted);
    volumes
}

/// Whether two volumes may have bytes in common.
fn shares_bytes(volumes: &[Volume]) -> bool {
    let mut places: Vec<(usize, u64, u64)> = Vec::new();
    for segment in volumes.iter().flat_map(|volume| &volume.segments) {
        let each = segment.length.div_ceil(segment.places.len().max(1) as u64);
        // The last round of stripes may be a partial one.
        let stripe = segment.stripe.max(1);
        let each = if segment.places.len() > 1 { each.div_ceil(stripe).saturating_mul(stripe) } else { each };
        places.extend(segment.places.iter().map(|place| (place.disk, place.offset, place.offset.saturating_add(each))));
    }
    places.sort_unstable();
    places.windows(2).any(|pair| matches!(pair, [(disk, _, end), (next, start, _)] if disk == next && start < end))
}

/// Sorted and joined ranges, cut inwards to whole chunks, the longest [`MAX_RANGES`] of them. The last chunk of a disk of
/// odd size is whole where a range reaches the end.
fn whole_chunks(mut ranges: Vec<Range<u64>>, chunk: u64, size: u64) -> Vec<Range<u64>> {
    join_ranges(&mut ranges);
    for range in &mut ranges {
        let end = if range.end >= size { size } else { round_down(range.end, chunk) };
        *range = round_up(range.start, chunk)..end;
    }
    ranges.retain(|range| range.start < range.end);
    if ranges.len() > MAX_RANGES {
        ranges.select_nth_unstable_by_key(MAX_RANGES, |range| std::cmp::Reverse(range.end - range.start));
        ranges.truncate(MAX_RANGES);
        ranges.sort_unstable_by_key(|range| range.start);
    }
    ranges
}

/// A volume of views that are being taken.
struct Reader<'a> {
    volume: &'a Volume,
    views: &'a [Arc<View>],
    deadline: Instant,
}

impl volume::Disk for Reader<'_> {
    fn name(&self) -> &str {
        &self.volume.name
    }

    fn size(&self) -> u64 {
        self.volume.size
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let short = || Error::new(errno::EIO, "scan", "past the end of the disk").at_offset(offset);
        if Instant::now() > self.deadline {
            return Err(Error::new(errno::ETIMEDOUT, "scan", "it takes too long"));
        }
        let mut rest = &mut *buf;
        for (disk, at, len) in self.volume.locate(offset, rest.len() as u64) {
            let (part, others) = rest.split_at_mut_checked(len as usize).ok_or_else(short)?;
            rest = others;
            if self.views.get(disk).ok_or_else(short)?.read_now(part, at)? != part.len() {
                return Err(short());
            }
        }
        if rest.is_empty() { Ok(()) } else { Err(short()) }
    }
}

#[cfg(all(test, not(any(feature = "shuttle", loom))))]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_and_told() {
        for (text, swap, free) in [("", false, false), ("swap", true, false), ("free,swap", true, true)] {
            assert_eq!(text.parse::<Skip>().unwrap(), Skip { swap, free });
        }
        assert_eq!("free,swap".parse::<Skip>().unwrap().to_string(), "swap,free");
        assert_eq!("swap,frei".parse::<Skip>().unwrap_err().errno(), errno::EINVAL);
    }

    #[test]
    fn ranges_are_joined_and_cut_inwards() {
        let cut = |ranges: &[(u64, u64)]| {
            let ranges = ranges.iter().map(|(start, end)| *start..*end).collect();
            whole_chunks(ranges, 16, 150).iter().map(|range| (range.start, range.end)).collect::<Vec<_>>()
        };
        assert_eq!(cut(&[]), []);
        assert_eq!(cut(&[(65, 95), (5, 18), (18, 50)]), [(16, 48)]);
        assert_eq!(cut(&[(65, 110)]), [(80, 96)]);
        assert_eq!(cut(&[(0, 16), (16, 32), (129, 150)]), [(0, 32), (144, 150)], "the last chunk is a partial one");
        assert_eq!(cut(&[(129, 149)]), []);
        let many = (0..MAX_RANGES as u64 + 5).map(|at| at * 128..at * 128 + if at == 7 { 16 } else { 32 }).collect();
        let kept = whole_chunks(many, 16, u64::MAX);
        assert_eq!(kept.len(), MAX_RANGES);
        assert!(!kept.contains(&(896..912)) && kept.is_sorted_by_key(|range| range.start));
    }

    #[test]
    fn a_list_that_is_damaged_is_refused() {
        let bytes = |offsets: &[u64]| offsets.iter().flat_map(|at| at.to_le_bytes()).collect::<Vec<_>>();
        let read = |offsets: &[u64]| {
            let bytes = bytes(offsets);
            parse(&bytes, crc32c::crc32c(&bytes), 100).map_err(|e| e.errno())
        };
        assert_eq!(read(&[0, 10, 20, 100]), Ok(vec![0..10, 20..100]));
        for wrong in [&[0, 101][..], &[10, 10], &[20, 30, 5, 10], &[0, 10, 10, 20]] {
            assert_eq!(read(wrong), Err(errno::EIO), "{wrong:?}");
        }
        assert_eq!(parse(&bytes(&[0, 10]), 1, 100).unwrap_err().errno(), errno::EIO);
    }

    #[test]
    fn runs_end_where_ranges_do() {
        let skipped = Skipped { ranges: vec![10..20, 30..40], ..Skipped::default() };
        let runs = [(0, 5, false, 5), (0, 50, false, 10), (10, 15, true, 15), (19, 50, true, 20), (20, 50, false, 30)];
        for (at, end, is_in, until) in runs.into_iter().chain([(40, 50, false, 50)]) {
            assert_eq!(skipped.run(at, end), (is_in, until), "{at}..{end}");
        }
        assert_eq!(Skipped::default().run(3, 7), (false, 7));
    }

    #[test]
    fn volumes_that_share_bytes_are_noticed() {
        let volume = |segments| Volume {
            name: "v".into(),
            size: 100,
            segments,
            table: Table::Mbr { kind: 0, uuid: String::new() },
            content: None,
        };
        let linear = |disk, offset| volume(vec![Segment::linear(0, 100, disk, offset)]);
        assert!(!shares_bytes(&[linear(0, 0), linear(0, 100), linear(1, 50)]));
        assert!(shares_bytes(&[linear(0, 0), linear(1, 0), linear(0, 99)]));
        let places = [0, 40].map(|offset| volume::Place { disk: 0, offset }).to_vec();
        let striped = volume(vec![Segment { start: 0, length: 75, stripe: 10, places }]);
        assert!(!shares_bytes(std::slice::from_ref(&striped)));
        assert!(shares_bytes(&[striped, linear(0, 79)]));
    }
}
