//! Tables, LVM2 metadata, contents and unused blocks of any bytes. Input: [`Input`]; with an odd number of operations its
//! halves are two disks.
//!
//! Each input is run twice, as it is and with its checksums made right, or no mutation would get behind them.

use super::input::Input;
use fleecefs::error::Result;
use fleecefs::storage::{MemFile, Storage};
use fleecefs::volume::{Content, Disk, Scan, content, scan, unused};
use std::cell::Cell;
use std::collections::BTreeSet;
use std::ops::Range;

/// Largest file: time goes with its length.
const FILE_MAX_BYTES: u64 = 64 << 20;
/// What may be read of a disk in all, beside some times its length.
const READ_BYTES: u64 = 128 << 20;

/// A part of a file as a disk that counts what is read.
struct Counted {
    file: MemFile,
    range: Range<u64>,
    read: Cell<u64>,
}

impl Disk for Counted {
    fn name(&self) -> &str {
        "disk"
    }

    fn size(&self) -> u64 {
        self.range.end - self.range.start
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        assert!(offset.checked_add(buf.len() as u64).unwrap() <= self.size(), "read past the end");
        self.read.set(self.read.get() + 512 + buf.len() as u64);
        self.file.read_at(buf, self.range.start + offset)
    }
}

/// Runs the target.
pub fn run(input: &[u8]) {
    let mut input = Input::decode(input);
    input.file_bytes %= FILE_MAX_BYTES + 1;
    let (file, size) = (input.file(), input.file_bytes);
    let ranges = match input.ops.len() % 2 {
        0 => vec![(0, size)],
        _ => vec![(0, size / 2), (size / 2, size)],
    };
    let make = |(start, end): &(u64, u64)| Counted { file: file.clone(), range: *start..*end, read: Cell::new(0) };
    let disks: Vec<Counted> = ranges.iter().map(make).collect();
    for is_sealed in [false, true] {
        if is_sealed {
            disks.iter().for_each(seal);
        }
        let refs: Vec<&dyn Disk> = disks.iter().map(|disk| disk as &dyn Disk).collect();
        let found = scan(&refs);
        check(&found, &refs);
        for volume in &found.volumes {
            let reader = volume.reader(&refs);
            assert_eq!(content::probe(&reader).ok(), Some(volume.content.clone()));
            judge(&reader, &volume.content);
        }
        for (disk, content) in refs.iter().zip(&found.contents) {
            judge(*disk, content);
        }
    }
    for disk in &disks {
        assert!(disk.read.get() <= READ_BYTES + 32 * size, "{} bytes read of {size}", disk.read.get());
    }
}

fn judge(disk: &dyn Disk, content: &Option<Content>) {
    let Some(content) = content else { return };
    let ranges = unused(disk, content).expect("memory can be read");
    assert!(ranges.windows(2).all(|pair| pair[0].end < pair[1].start), "{ranges:?}");
    assert!(ranges.iter().all(|range| range.start < range.end && range.end <= disk.size()), "{ranges:?}");
}

fn check(found: &Scan, disks: &[&dyn Disk]) {
    assert_eq!(found.contents.len(), disks.len());
    assert!(found.warnings.len() <= disks.len(), "{:?}", found.warnings);
    assert!(found.warnings.iter().all(|line| line.len() < 8192 && !line.contains('\n')), "{:?}", found.warnings);
    let mut names = BTreeSet::new();
    for volume in &found.volumes {
        assert!(names.insert((volume.home(), &volume.name)), "{}", volume.name);
        let is_plain = |c: char| c.is_ascii_alphanumeric() || "+_.-".contains(c);
        assert!(volume.name.chars().all(is_plain) && ![".", ".."].contains(&&*volume.name), "{:?}", volume.name);
        let mut end = 0;
        for segment in &volume.segments {
            assert!(segment.start == end && segment.length > 0, "{volume:?}");
            end = segment.end();
        }
        assert_eq!(end, volume.size);
        let all = volume.locate(0, u64::MAX).take(10_000).chain(volume.locate(volume.size.saturating_sub(4096), 4096));
        for (disk, offset, len) in all {
            assert!(len > 0 && offset.checked_add(len).unwrap() <= disks[disk].size(), "{volume:?}");
        }
    }
    // Partitions of one disk have no byte in common.
    let partitions = found.volumes.iter().filter(|volume| volume.table.scheme() != "lvm");
    let mut ranges: Vec<_> = partitions.filter_map(|v| Some((v.home(), v.offset()?, v.offset()? + v.size))).collect();
    ranges.sort_unstable();
    assert!(ranges.windows(2).all(|pair| pair[0].0 != pair[1].0 || pair[0].2 <= pair[1].1), "{ranges:?}");
    for (disk, range) in found.sources.iter().chain(&found.hints) {
        assert!(range.start < range.end && range.end <= disks[*disk].size(), "{range:?}");
    }
}

/// Makes the checksums of tables and metadata right where they are looked for first.
fn seal(disk: &Counted) {
    for sector in [512, 4096] {
        for at in [sector, (disk.size() / sector).saturating_sub(1) * sector] {
            seal_gpt(disk, at, sector);
        }
    }
    let mut places = vec![0];
    let refs: [&dyn Disk; 1] = [disk];
    places.extend(scan(&refs).volumes.iter().filter_map(|volume| volume.offset()).take(16));
    for place in places {
        for sector in 0..4 {
            seal_label(disk, place, place + 512 * sector);
        }
    }
}

fn get(disk: &Counted, at: u64, len: u64) -> Option<Vec<u8>> {
    let end = at.checked_add(len).filter(|end| *end <= disk.size() && len <= 1 << 20)?;
    let mut bytes = vec![0; (end - at) as usize];
    disk.file.read_at(&mut bytes, disk.range.start + at).ok()?;
    Some(bytes)
}

fn put(disk: &Counted, at: u64, bytes: &[u8]) {
    disk.file.write_at(bytes, disk.range.start + at).expect("memory takes it");
}

fn number(bytes: &[u8], at: usize, len: usize) -> u64 {
    bytes[at..at + len].iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

fn seal_gpt(disk: &Counted, at: u64, sector: u64) {
    let Some(mut header) = get(disk, at, 512).filter(|header| header.starts_with(b"EFI PART")) else { return };
    let entries = number(&header, 80, 4).saturating_mul(number(&header, 84, 4));
    if let Some(entries) = get(disk, number(&header, 72, 8).saturating_mul(sector), entries) {
        header[88..92].copy_from_slice(&(!crc(u32::MAX, &entries)).to_le_bytes());
    }
    header[16..20].fill(0);
    let own = !crc(u32::MAX, &header[..(number(&header, 12, 4) as usize).min(512)]);
    header[16..20].copy_from_slice(&own.to_le_bytes());
    put(disk, at, &header);
}

fn seal_label(disk: &Counted, place: u64, at: u64) {
    const START: u32 = 0xf597_a6cf;
    let Some(mut label) = get(disk, at, 512).filter(|label| label.starts_with(b"LABELONE")) else { return };
    for index in 0..4 {
        let area = number(&label, 104 + 16 * index, 8);
        let Some(mut header) = place.checked_add(area).and_then(|at| get(disk, at, 512)) else { continue };
        if area == 0 || !header[4..].starts_with(b" LVM2 x[") {
            continue;
        }
        let (bytes, from, len) = (number(&header, 32, 8), number(&header, 40, 8), number(&header, 48, 8));
        let first = len.min(bytes.saturating_sub(from));
        let text = get(disk, (place + area).saturating_add(from), first)
            .zip(get(disk, place + area + 512, len - first))
            .map(|(first, rest)| [first, rest].concat());
        if let Some(text) = text {
            header[56..60].copy_from_slice(&crc(START, &text).to_le_bytes());
        }
        let own = crc(START, &header[4..]);
        header[..4].copy_from_slice(&own.to_le_bytes());
        put(disk, place + area, &header);
    }
    let own = crc(START, &label[20..]);
    label[16..20].copy_from_slice(&own.to_le_bytes());
    put(disk, at, &label);
}

/// CRC-32 bit by bit, not inverted at the end.
fn crc(start: u32, bytes: &[u8]) -> u32 {
    bytes.iter().fold(start, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| if crc & 1 == 0 { crc >> 1 } else { crc >> 1 ^ 0xedb8_8320 })
    })
}
