//! Tables and metadata made by hand: what each rule lets through, and what it stops.

mod lvm;
mod make;
mod tables;

use super::*;
use make::Mem;

/// Scans disks.
fn scan_all(disks: &[Mem]) -> Scan {
    let disks: Vec<&dyn Disk> = disks.iter().map(|disk| disk as &dyn Disk).collect();
    let scan = scan(&disks);
    check(&scan, &disks);
    scan
}

/// What holds for every scan of whatever disks.
fn check(scan: &Scan, disks: &[&dyn Disk]) {
    assert_eq!(scan.contents.len(), disks.len());
    assert!(scan.warnings.len() <= disks.len(), "{:?}", scan.warnings);
    let mut names = std::collections::BTreeSet::new();
    for volume in &scan.volumes {
        assert!(names.insert((volume.home(), &volume.name)), "{volume:?}");
        assert!(!volume.name.contains(['/', '\0']) && !volume.name.starts_with("..") && volume.name.len() < 200);
        let mut end = 0;
        for segment in &volume.segments {
            assert!(segment.start == end && segment.length > 0, "{volume:?}");
            end = segment.end();
        }
        assert_eq!(end, volume.size);
        let mut done = 0;
        for (disk, offset, len) in volume.locate(0, u64::MAX).take(10_000) {
            assert!(len > 0 && offset.checked_add(len).unwrap() <= disks[disk].size(), "{volume:?}");
            done += len;
        }
        assert!(done <= volume.size);
    }
    for (disk, range) in scan.sources.iter().chain(&scan.hints) {
        assert!(range.start < range.end && range.end <= disks[*disk].size());
    }
}

/// Names with ranges of volumes in one piece.
fn places(scan: &Scan) -> Vec<(&str, u64, u64)> {
    scan.volumes.iter().map(|volume| (volume.name.as_str(), volume.offset().unwrap(), volume.size)).collect()
}

#[test]
fn pieces_of_a_striped_volume_are_where_they_are_read() {
    let places = vec![Place { disk: 1, offset: 100 }, Place { disk: 0, offset: 40 }];
    let segments = vec![
        Segment::linear(0, 10, 0, 5),
        Segment { start: 10, length: 16, stripe: 4, places },
        Segment::linear(26, 6, 1, 200),
    ];
    let table = Table::Mbr { kind: 0x83, uuid: String::new() };
    let volume = Volume { name: "x".into(), size: 32, segments, table, content: None };
    let whole: Vec<_> = volume.locate(0, 100).collect();
    assert_eq!(whole, [(0, 5, 10), (1, 100, 4), (0, 40, 4), (1, 104, 4), (0, 44, 4), (1, 200, 6)]);
    assert_eq!(volume.locate(15, 5).collect::<Vec<_>>(), [(0, 41, 3), (1, 104, 2)]);
    assert_eq!(volume.locate(32, 1).count() + volume.locate(u64::MAX, 1).count() + volume.locate(3, 0).count(), 0);

    let disks: Vec<Mem> = (0..2).map(|disk| Mem::new((0..255).map(|n| n ^ (disk * 128)).collect())).collect();
    let disks: Vec<&dyn Disk> = disks.iter().map(|disk| disk as &dyn Disk).collect();
    for (start, len) in [(0, 32), (9, 2), (13, 10), (31, 1), (5, 0)] {
        let mut bytes = vec![0; len];
        volume.reader(&disks).read_at(&mut bytes, start).unwrap();
        for (at, byte) in (start..).zip(bytes) {
            let (disk, offset, _) = volume.locate(at, 1).next().unwrap();
            assert_eq!(byte, offset as u8 ^ (disk as u8 * 128));
        }
    }
    assert_eq!(volume.reader(&disks).read_at(&mut [0; 2], 31).unwrap_err().errno(), errno::EINVAL);
}
