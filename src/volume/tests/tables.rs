//! GUID partition tables and master boot records.

use super::make::{Mem, gpt, mbr, seal_gpt};
use super::*;

const MIB: u64 = 1 << 20;
const EXT4_MAGIC: [u8; 2] = [0x53, 0xef];

fn one(disk: Mem) -> Scan {
    scan_all(&[disk])
}

/// No volumes and one warning with this text.
fn refused(disk: Mem, warning: &str) {
    let scan = one(disk);
    assert_eq!(scan.volumes, []);
    assert!(matches!(scan.warnings.as_slice(), [line] if line.contains(warning)), "{warning}: {:?}", scan.warnings);
}

#[test]
fn a_guid_table_gives_its_partitions_with_both_sizes_of_sectors() {
    for sector in [512, 4096] {
        let mut disk = Mem::empty(4 * MIB);
        gpt(&mut disk, sector, &[(1, 100, 199), (0, 0, 0), (3, 200, 200)]);
        let scan = one(disk);
        assert_eq!(places(&scan), [("p1", 100 * sector, 100 * sector), ("p3", 200 * sector, sector)]);
        assert!(scan.warnings.is_empty(), "{:?}", scan.warnings);
        let Table::Gpt { kind, uuid, label } = &scan.volumes[1].table else { panic!() };
        assert_eq!(kind, "03030303-0303-0303-0303-030303030303");
        assert_eq!((uuid.as_str(), label.as_deref()), ("12121212-1212-1212-1212-121212121212", Some("part 2 ü")));
        assert!(scan.sources.contains(&(0, 0..512 + sector.max(512) + 128 * 128)) || sector != 512);
    }
}

#[test]
fn the_backup_is_taken_where_the_primary_table_is_damaged() {
    for sector in [512, 4096] {
        for at in [sector, sector + 30, sector + 60, 2 * sector + 40] {
            let mut disk = Mem::empty(4 * MIB);
            gpt(&mut disk, sector, &[(1, 100, 199)]);
            disk.bytes[at as usize] ^= 1;
            let scan = one(disk);
            assert_eq!(places(&scan), [("p1", 100 * sector, 100 * sector)], "{at}");
            assert!(scan.warnings.len() == 1 && scan.warnings[0].contains("backup"), "{:?}", scan.warnings);
        }
    }
}

#[test]
fn without_a_sound_table_there_are_no_partitions() {
    let make = || {
        let mut disk = Mem::empty(4 * MIB);
        gpt(&mut disk, 512, &[(1, 100, 199)]);
        disk
    };
    let mut both = make();
    both.bytes[512 + 60] ^= 1;
    both.bytes[4 * MIB as usize - 512 + 60] ^= 1;
    refused(both, "checksum of its header");
    let mut alone = make();
    alone.bytes[510] = 0;
    refused(alone, "without a protective MBR");
    // Cut off: neither table fits any more.
    let mut short = make();
    short.bytes.truncate(3 * MIB as usize);
    refused(short, "larger disk");
    for (at, value) in [(80, u32::MAX), (84, 0), (84, 129), (84, 1 << 31), (12, 0), (12, u32::MAX), (80, 1 << 24)] {
        let mut disk = make();
        for header in [512, 4 * MIB - 512] {
            disk.put(header + at, &value.to_le_bytes());
            seal_gpt(&mut disk, header);
        }
        refused(disk, "damaged");
    }
    let mut outside = make();
    for header in [512, 4 * MIB - 512] {
        outside.put(header + 72, &u64::MAX.to_le_bytes());
        seal_gpt(&mut outside, header);
    }
    refused(outside, "entries past the end");
}

#[test]
fn partitions_that_share_bytes_or_leave_the_disk_are_left_out() {
    let mut disk = Mem::empty(4 * MIB);
    gpt(&mut disk, 512, &[(1, 100, 500), (1, 150, 160), (1, 400, 600), (1, 601, 700), (1, 900, 800), (1, 8000, 9000)]);
    let scan = one(disk);
    assert_eq!(places(&scan), [("p4", 601 * 512, 100 * 512)]);
    assert!(scan.warnings[0].contains("share bytes are left out: 1, 2, 3"), "{:?}", scan.warnings);
    assert!(scan.warnings[0].contains("usable sectors are left out: 5, 6"), "{:?}", scan.warnings);

    let mut disk = Mem::empty(4 * MIB);
    mbr(&mut disk, 0, &[(0x83, 100, 199), (0x83, 8000, 8192), (0x83, 199, 300), (0x83, 1000, 1000)]);
    let scan = one(disk);
    assert_eq!(places(&scan), [("p4", 1000 * 512, 512)]);
    assert!(scan.warnings[0].contains("past the end of the disk are left out: 2"), "{:?}", scan.warnings);
}

#[test]
fn a_hybrid_record_counts_as_its_guid_table() {
    let mut disk = Mem::empty(4 * MIB);
    gpt(&mut disk, 512, &[(1, 100, 199)]);
    mbr(&mut disk, 0, &[(0x83, 300, 400), (0xee, 1, 99)]);
    assert_eq!(places(&one(disk)), [("p1", 51200, 51200)]);
    let mut disk = Mem::empty(4 * MIB);
    mbr(&mut disk, 0, &[(0xee, 1, 99)]);
    refused(disk, "missing");
}

#[test]
fn logical_partitions_follow_their_chain() {
    let mut disk = Mem::empty(4 * MIB);
    mbr(&mut disk, 0, &[(0x83, 10, 19), (0x05, 1000, 3999), (0x82, 20, 29)]);
    mbr(&mut disk, 1000 * 512, &[(0x83, 8, 99), (0x05, 1000, 1999)]);
    mbr(&mut disk, 2000 * 512, &[(0x83, 8, 99), (0x05, 500, 999)]);
    mbr(&mut disk, 1500 * 512, &[(0x07, 8, 99)]);
    let scan = one(disk);
    let sectors: Vec<_> = places(&scan).into_iter().map(|(name, at, len)| (name, at / 512, len / 512)).collect();
    assert_eq!(sectors, [("p1", 10, 10), ("p3", 20, 10), ("p5", 1008, 92), ("p6", 2008, 92), ("p7", 1508, 92)]);
    assert_eq!(scan.volumes[4].table.uuid(), "12345678-07");
    assert_eq!(scan.volumes[4].table.kind(), "0x7");
    for record in [0, 1000, 1500, 2000] {
        assert!(scan.sources.contains(&(0, record * 512..record * 512 + 512)), "{:?}", scan.sources);
    }
    assert!(scan.warnings.is_empty(), "{:?}", scan.warnings);
}

#[test]
fn a_damaged_chain_ends_with_a_warning() {
    let make = |link: (u8, u64, u64)| {
        let mut disk = Mem::empty(4 * MIB);
        mbr(&mut disk, 0, &[(0x0f, 1000, 3999)]);
        mbr(&mut disk, 1000 * 512, &[(0x83, 8, 99), link]);
        disk
    };
    for (link, warning) in
        [((0x05, 0, 99), "circle"), ((0x05, 2000, 3000), "broken"), ((0x05, 90_000, 90_001), "leaves")]
    {
        let scan = one(make(link));
        assert_eq!(places(&scan), [("p5", 1008 * 512, 92 * 512)]);
        assert!(scan.warnings.len() == 1 && scan.warnings[0].contains(warning), "{:?}", scan.warnings);
    }
    let mut long = Mem::empty(4 * MIB);
    mbr(&mut long, 0, &[(0x05, 1000, 7999)]);
    for record in 0..1000 {
        mbr(&mut long, (1000 + 2 * record) * 512, &[(0x83, 1, 1), (0x05, 2 * record + 2, 2 * record + 3)]);
    }
    let scan = one(long);
    assert!(scan.volumes.len() < 300 && scan.warnings[0].contains("too long"), "{:?}", scan.warnings);
    let mut empty = Mem::empty(4 * MIB);
    mbr(&mut empty, 0, &[(0x05, 1000, 3999)]);
    assert!(one(empty).warnings.is_empty());
}

#[test]
fn what_is_no_master_boot_record_gives_no_partitions() {
    for bytes in [0, 100, 511, 512, 513, 4096] {
        let scan = one(Mem::empty(bytes));
        assert!(scan.volumes.is_empty() && scan.warnings.is_empty() && scan.contents == [None]);
    }
    let mut odd = Mem::empty(MIB);
    mbr(&mut odd, 0, &[(0x83, 100, 199)]);
    odd.bytes[446] = 0x41;
    assert_eq!(one(odd), Scan { hints: vec![(0, 0..1024)], contents: vec![None], ..Scan::default() });
    let mut boot = Mem::empty(MIB);
    mbr(&mut boot, 0, &[(0x83, 100, 199)]);
    boot.put(0, b"\xeb\x3c\x90mkfs.fat\0\x02\x04\x01\0\x02\0\x02\0\x08\xf8\x02\0");
    boot.put(54, b"FAT16   ");
    let scan = one(boot);
    assert!(scan.volumes.is_empty());
    assert_eq!(scan.contents[0].as_ref().unwrap().kind, "vfat");
}

#[test]
fn sectors_of_a_record_are_large_where_something_begins_there() {
    let make = |at: u64| {
        let mut disk = Mem::empty(4 * MIB);
        mbr(&mut disk, 0, &[(0x83, 100, 199)]);
        disk.put(at + 1024 + 56, &EXT4_MAGIC);
        one(disk)
    };
    assert_eq!(places(&make(100 * 4096)), [("p1", 100 * 4096, 100 * 4096)]);
    assert_eq!(places(&make(100 * 512)), [("p1", 100 * 512, 100 * 512)]);
    assert_eq!(make(100 * 4096).volumes[0].content.as_ref().unwrap().kind, "ext2");
}

#[test]
fn a_disk_that_cannot_be_read_has_a_warning_and_no_volumes() {
    let make = |bad: u64| {
        let mut disk = Mem::empty(4 * MIB);
        gpt(&mut disk, 512, &[(1, 100, 199)]);
        disk.bad = Some(bad);
        disk
    };
    for bad in [0, 512, 1024] {
        refused(make(bad), "bad sector");
    }
    // What a partition holds is another matter.
    let scan = one(make(100 * 512));
    assert!(scan.volumes.len() == 1 && scan.warnings.len() == 1, "{scan:?}");
}
