//! LVM2: metadata of every kind on one disk and on several.

use super::make::{Mem, group, hyphened, linear, logical, pv, pv_wrapped, uuid};
use super::*;

const MIB: u64 = 1 << 20;
const EXTENT: u64 = 64 << 10;

fn disk_with(letter: char, text: &str) -> Mem {
    let mut disk = Mem::empty(7 * MIB);
    pv(&mut disk, 0, &uuid(letter), text);
    disk
}

fn names(scan: &Scan) -> Vec<&str> {
    scan.volumes.iter().map(|volume| volume.name.as_str()).collect()
}

/// Where extent `n` of a physical volume at the start of a disk lies.
fn extent(n: u64) -> u64 {
    65536 + n * EXTENT
}

#[test]
fn volumes_over_two_disks_are_put_together_by_uuid() {
    let text = group(
        "vg-0",
        1,
        &['a', 'b'],
        &[
            logical("root", &[(3, &linear('a', 5)), (2, &linear('a', 8)), (4, &linear('b', 0))]),
            logical(
                "str-ipe",
                &[(4, "type = \"striped\" stripe_count = 2 stripe_size = 8 stripes = [\"pvb\", 10, \"pva\", 20]")],
            ),
        ]
        .concat(),
    );
    // The second disk is in a partition, and first in the mount.
    let mut second = Mem::empty(9 * MIB);
    super::make::mbr(&mut second, 0, &[(0x8e, 2048, 2048 + 7 * 2048 - 1)]);
    pv(&mut second, MIB, &uuid('b'), &text);
    let scan = scan_all(&[second, disk_with('a', &text)]);
    assert!(scan.warnings.is_empty(), "{:?}", scan.warnings);
    assert_eq!(names(&scan), ["p1", "vg--0-str--ipe", "vg--0-root"]);
    assert_eq!(scan.volumes[0].content.as_ref().unwrap().uuid, Some(hyphened('b')));
    assert_eq!(scan.contents[1].as_ref().unwrap().kind, "LVM2_member");
    let root = &scan.volumes[2];
    assert_eq!(
        root.locate(0, u64::MAX).collect::<Vec<_>>(),
        [(1, extent(5), 5 * EXTENT), (0, MIB + extent(0), 4 * EXTENT)]
    );
    assert_eq!((root.home(), root.size, root.table.uuid()), (1, 9 * EXTENT, hyphened('L').as_str()));
    let striped: Vec<_> = scan.volumes[1].locate(0, 4 * 4096).collect();
    assert_eq!(
        striped,
        [
            (0, MIB + extent(10), 4096),
            (1, extent(20), 4096),
            (0, MIB + extent(10) + 4096, 4096),
            (1, extent(20) + 4096, 4096)
        ]
    );
    assert!(matches!(&scan.volumes[1].table, Table::Lvm { striped: true, group, .. } if group == "vg-0"));
    for source in [(0, MIB + 512), (0, MIB + 4096), (1, 512), (1, 4096), (1, 4608)] {
        assert!(scan.sources.iter().any(|(disk, range)| *disk == source.0 && range.contains(&source.1)), "{source:?}");
    }
}

#[test]
fn a_text_that_goes_round_the_end_of_its_area_is_one() {
    let text = group("vg", 1, &['a'], &logical("root", &[(3, &linear('a', 0))]));
    let mut disk = Mem::empty(7 * MIB);
    pv_wrapped(&mut disk, 0, &uuid('a'), &text, (60 << 10) - 100);
    assert_eq!(names(&scan_all(&[disk])), ["vg-root"]);
}

#[test]
fn the_newest_metadata_wins() {
    let old = group("vg", 9, &['a', 'b'], &logical("old", &[(1, &linear('a', 0))]));
    let new = group("vg", 10, &['a', 'b'], &logical("new", &[(1, &linear('a', 1))]));
    for texts in [[&old, &new], [&new, &old]] {
        let scan = scan_all(&[disk_with('a', texts[0]), disk_with('b', texts[1])]);
        assert_eq!(places(&scan), [("vg-new", extent(1), EXTENT)]);
    }
}

#[test]
fn volumes_on_what_is_missing_are_left_out_and_named() {
    let text = group(
        "vg",
        1,
        &['a', 'b'],
        &(logical("here", &[(1, &linear('a', 0))]) + &logical("gone", &[(1, &linear('a', 1)), (1, &linear('b', 0))])),
    );
    let scan = scan_all(&[disk_with('a', &text)]);
    assert_eq!(names(&scan), ["vg-here"]);
    assert_eq!(scan.warnings.len(), 1);
    assert!(scan.warnings[0].contains(&format!("vg/gone (its physical volume {} is missing)", hyphened('b'))));
}

#[test]
fn copies_of_a_disk_are_not_mixed() {
    let text = group("vg", 1, &['a'], &logical("root", &[(1, &linear('a', 0))]));
    let scan = scan_all(&[disk_with('a', &text), disk_with('a', &text)]);
    let homes: Vec<_> = scan.volumes.iter().map(|volume| (volume.home(), volume.name.as_str())).collect();
    assert_eq!(homes, [(0, "vg-root"), (1, "vg-root")]);
    assert!(scan.warnings.is_empty());

    // A group over two disks, and a copy of one of them: whose half is which?
    let text = group("vg", 1, &['a', 'b'], &logical("root", &[(1, &linear('a', 0)), (1, &linear('b', 0))]));
    let scan = scan_all(&[disk_with('a', &text), disk_with('b', &text), disk_with('b', &text)]);
    assert_eq!(names(&scan), [] as [&str; 0]);
    assert_eq!(scan.warnings.len(), 3);
}

#[test]
fn what_is_not_linear_or_striped_is_left_out_and_named() {
    let text = group(
        "vg",
        1,
        &['a'],
        &[
            logical("plain", &[(1, &linear('a', 0))]),
            logical("thin", &[(1, "type = \"thin\" thin_pool = \"pool\"")]),
            logical("raid", &[(1, "type = \"raid1\" device_count = 2")]),
            logical(
                "moved",
                &[(1, &linear('a', 1)), (1, "type = \"striped\" stripe_count = 1 stripes = [\"pvmove0\", 0]")],
            ),
            logical("store", &[(1, &linear('a', 4))]),
            logical("snapshot0", &[(1, "type = \"snapshot\" origin = \"plain\" cow_store = \"store\"")])
                .replace("\"VISIBLE\"", ""),
            logical("pool_tdata", &[(1, &linear('a', 5))]).replace("\"VISIBLE\"", ""),
        ]
        .concat(),
    );
    let scan = scan_all(&[disk_with('a', &text)]);
    assert_eq!(names(&scan), ["vg-plain"]);
    let [warning] = scan.warnings.as_slice() else { panic!("{:?}", scan.warnings) };
    for name in ["vg/thin (thin)", "vg/raid (raid1)", "vg/moved (on another logical volume)", "vg/store (snapshot)"] {
        assert!(warning.contains(name), "{warning}");
    }
    assert!(!warning.contains("pool_tdata"), "{warning}");
    let merging = text.replace("cow_store", "merging_store");
    assert_eq!(names(&scan_all(&[disk_with('a', &merging)])), [] as [&str; 0]);
}

#[test]
fn metadata_that_cannot_be_true_gives_nothing() {
    let none: [&str; 0] = [];
    let lv = |segment: &str| group("vg", 1, &['a'], &logical("root", &[(2, segment)]));
    let two = |first: u64, second: u64| {
        group(
            "vg",
            1,
            &['a'],
            &(logical("x", &[(2, &linear('a', first))]) + &logical("y", &[(2, &linear('a', second))])),
        )
    };
    assert_eq!(names(&scan_all(&[disk_with('a', &two(0, 2))])), ["vg-x", "vg-y"]);
    for (text, warning) in [
        (two(0, 1), "share extents"),
        (lv(&linear('a', 99)), "share extents or lie outside"),
        (lv(&linear('a', u64::MAX)), "share extents or lie outside"),
        (lv(&linear('a', 0)).replace("pe_start = 128", "pe_start = 100000"), "past the end of a physical volume"),
        (lv(&linear('a', 0)).replace("extent_size = 128", "extent_size = 18446744073709551615"), "extent_size"),
        (lv(&linear('a', 0)).replace("extent_size = 128", "extent_size = 0"), "extent_size"),
        (lv(&linear('a', 0)).replace("start_extent = 0", "start_extent = 1"), "do not follow"),
        (lv(&linear('a', 0)).replace("segment_count = 1", "segment_count = 2"), "segments are missing"),
        (lv("type = \"striped\" stripe_count = 2 stripes = [\"pva\", 0]"), "damaged segment"),
        (lv("type = \"striped\" stripe_count = 2 stripe_size = 0 stripes = [\"pva\", 0, \"pva\", 1]"), "stripes"),
        (lv("type = \"striped\" stripe_count = 2 stripe_size = 3 stripes = [\"pva\", 0, \"pva\", 1]"), "stripes"),
        (lv(&linear('a', 0)).replace("root {", "ro/ot {"), "its name"),
        (lv(&linear('a', 0)).replace("root {", ".. {"), "its name"),
        (lv(&linear('a', 0)).replace("vg {", "../x {"), "a name that no group can have"),
        (lv(&linear('a', 0)).replace("root {", &format!("{} {{", "r".repeat(200))), "its name"),
        ("vg { seqno = 1 }".into(), "damaged"),
        ("vg {".repeat(100), "too deep"),
    ] {
        let scan = scan_all(&[disk_with('a', &text)]);
        assert_eq!(names(&scan), none, "{text}");
        assert!(scan.warnings.len() == 1 && scan.warnings[0].contains(warning), "{warning}: {:?}", scan.warnings);
    }
}

#[test]
fn damaged_areas_give_nothing_and_one_warning() {
    let text = group("vg", 1, &['a'], &logical("root", &[(1, &linear('a', 0))]));
    for (at, warning) in [(4096, "checksum of its header"), (4100, "header"), (4608, "checksum of its text")] {
        let mut disk = disk_with('a', &text);
        disk.bytes[at] ^= 1;
        let scan = scan_all(&[disk]);
        assert!(scan.volumes.is_empty() && scan.warnings.len() == 1, "{scan:?}");
        assert!(scan.warnings[0].contains(warning), "{:?}", scan.warnings);
    }
    let mut label = disk_with('a', &text);
    label.bytes[512 + 40] ^= 1;
    let scan = scan_all(&[label]);
    assert!(scan.volumes.is_empty() && scan.contents == [None], "{scan:?}");
}
