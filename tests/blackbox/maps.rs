//! Dirty maps: what changed, exactly at granules, since every point, in every format.

use crate::harness::*;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Instant;

/// Overwrites a byte in each granule.
fn touch(mount: &Mount, granules: &[u64]) {
    let guest = mount.guest("vda");
    for granule in granules {
        guest.write_all_at(&[0xd1], granule * GRANULE + 777).unwrap();
    }
}

#[test]
fn the_first_map_says_that_everything_is_dirty_and_where_it_is_zero() {
    requires!();
    let rig = Rig::new();
    let image = rig.image("vda", 1);
    let mount = rig.mount([&image]);
    mount.snap("a");
    let map = mount.map("a", "vda");
    assert!(map.all_dirty() && map.size() == 1 << 20, "{map:?}");
    map.check_zeros(&fs::read(mount.view("a", "vda")).unwrap());
    let zeros: u64 = map.0.iter().filter(|e| e.zero).map(|e| e.length).sum();
    assert_eq!(zeros, 1 << 19, "every other 64 KiB of the image is a hole");
}

#[test]
fn a_map_covers_changes_exactly_at_granules() {
    requires!("xfs_io");
    let rig = Rig::new();
    let mount = rig.mount([rig.image_of("vda", (4 << 20) + 1000)]);
    mount.snap("base");
    mount.drop_snap("base");
    let guest = mount.guest("vda");
    guest.write_all_at(b"x", 3 * GRANULE + 5).unwrap();
    guest.write_all_at(&[1; 200], 11 * GRANULE - 100).unwrap();
    guest.write_all_at(&[2; 65536], 15 * GRANULE).unwrap();
    guest.write_all_at(b"y", (4 << 20) + 999).unwrap();
    xfs_io(&mount.live("vda"), "", &["fpunch 1310720 65536", "fzero 1638400 100"]);
    mount.snap("next");
    let map = mount.map("next", "vda");
    assert_eq!(map.granules(), [3, 10, 11, 15, 20, 25, 64]);
    assert_eq!(map.size(), (4 << 20) + 1000);
    map.check_zeros(&fs::read(mount.view("next", "vda")).unwrap());
    let discarded = map.0.iter().find(|e| e.start <= 20 * GRANULE && 20 * GRANULE < e.start + e.length).unwrap();
    assert!(discarded.dirty && discarded.zero, "a discard is a change to zeros: {discarded:?}");
}

#[test]
fn an_overwrite_with_the_same_bytes_counts_and_a_read_does_not() {
    requires!();
    let rig = Rig::new();
    let image = rig.image("vda", 1);
    let mount = rig.mount([&image]);
    mount.snap("base");
    mount.drop_snap("base");
    let same = fs::read(&image).unwrap();
    fs::read(mount.live("vda")).unwrap();
    mount.guest("vda").write_all_at(&same[..512], 0).unwrap();
    mount.snap("next");
    assert_eq!(mount.map("next", "vda").granules(), [0]);
}

#[test]
fn changes_are_known_since_each_earlier_point() {
    requires!();
    let rig = Rig::new();
    let mount = rig.mount([rig.image("vda", 2)]);
    mount.snap("one");
    touch(&mount, &[1, 2]);
    mount.snap("two");
    touch(&mount, &[2, 5]);
    mount.snap("three");
    touch(&mount, &[9]);
    assert_eq!(mount.map_since("three", "vda", "one").granules(), [1, 2, 5]);
    assert_eq!(mount.map_since("three", "vda", "two").granules(), [2, 5]);
    assert_eq!(mount.map_since("two", "vda", "one").granules(), [1, 2]);
    // Points merge into the one before when they go.
    mount.drop_snap("two");
    mount.done("checkpoint delete", args!["two"]);
    assert!(!mount.snapshot_dir("three").join("vda/since/two").exists());
    assert_eq!(mount.map_since("three", "vda", "one").granules(), [1, 2, 5]);
    mount.snap("four");
    assert_eq!(mount.map_since("four", "vda", "one").granules(), [1, 2, 5, 9]);
    assert_eq!(mount.map_since("four", "vda", "three").granules(), [9]);
}

#[test]
fn the_reference_is_the_newest_completed_checkpoint() {
    requires!();
    let rig = Rig::new();
    let image = rig.image("vda", 2);
    let mount = rig.mount([&image]);
    let reference = |mount: &Mount, name: &str| name_of(&mount.manifest(name, "vda")["reference"]).map(str::to_owned);

    mount.snap("open");
    touch(&mount, &[1]);
    mount.snap("second");
    assert_eq!(reference(&mount, "second"), None, "an open snapshot is none");
    assert!(mount.map("second", "vda").all_dirty());

    mount.drop_snap("second");
    touch(&mount, &[2]);
    mount.snap("third");
    assert_eq!(reference(&mount, "third").as_deref(), Some("second"));
    assert_eq!(mount.map("third", "vda").granules(), [2]);

    mount.done("snapshot cancel", args!["third"]);
    touch(&mount, &[3]);
    mount.snap("fourth");
    assert_eq!(reference(&mount, "fourth").as_deref(), Some("second"), "a cancelled one is none");
    assert_eq!(mount.map("fourth", "vda").granules(), [2, 3], "no change is forgotten");

    mount.umount();
    let mount = rig.mount([&image]);
    mount.snap("fifth");
    assert_eq!(reference(&mount, "fifth").as_deref(), Some("second"), "an unmounted one is none");
    assert_eq!(mount.map("fifth", "vda").granules(), [2, 3]);

    let dir = mount.kill();
    let mount = Mount::at(dir, [&image]);
    touch(&mount, &[4]);
    mount.snap("sixth");
    assert_eq!(reference(&mount, "sixth").as_deref(), Some("second"), "a crashed one is none");
    assert_eq!(mount.map("sixth", "vda").granules(), [2, 3, 4]);
}

#[test]
fn since_chooses_the_reference() {
    requires!();
    let rig = Rig::new();
    let mount = rig.mount([rig.image("vda", 1)]);
    for (name, granule) in [("one", 1), ("two", 2)] {
        mount.snap(name);
        mount.drop_snap(name);
        touch(&mount, &[granule]);
    }
    mount.done("snapshot create", args!["three", "--since", "one"]);
    assert_eq!(name_of(&mount.manifest("three", "vda")["reference"]), Some("one"));
    assert_eq!(mount.map("three", "vda").granules(), [1, 2]);
}

#[test]
fn zero_is_decided_once_per_view() {
    requires!("xfs_io");
    let rig = Rig::new();
    let mount = rig.mount([rig.image("vda", 1)]);
    mount.snap("a");
    let before = fs::read(mount.snapshot_dir("a").join("vda.map")).unwrap();
    mount.guest("vda").write_all_at(&[1; 65536], 65536).unwrap();
    xfs_io(&mount.live("vda"), "", &["fpunch 0 65536"]);
    assert_eq!(fs::read(mount.snapshot_dir("a").join("vda.map")).unwrap(), before);
    let direct = ok(tool("dd")
        .args(["bs=64K", "iflag=direct", "status=none"])
        .arg(format!("if={}", mount.snapshot_dir("a").join("vda.map").display())));
    assert_eq!(direct.as_bytes(), before);
}

#[test]
fn changed_raw_holds_what_changed_and_holes_for_the_rest() {
    requires!("xfs_io");
    let rig = Rig::new();
    let mount = rig.mount([rig.image("vda", 2)]);
    mount.snap("base");
    mount.drop_snap("base");
    touch(&mount, &[2, 3, 7]);
    xfs_io(&mount.live("vda"), "", &["fpunch 786432 65536"]);
    mount.snap("next");
    let path = mount.snapshot_dir("next").join("vda/changed.raw");
    let runs: Vec<_> = [(2, 4), (7, 8), (12, 13)].iter().map(|(a, b)| (a * GRANULE, b * GRANULE)).collect();
    assert_eq!(data_ranges(&path), runs, "zeros that are a change are data");
    let (changed, view) = (fs::read(&path).unwrap(), fs::read(mount.view("next", "vda")).unwrap());
    let mut expected = vec![0; 2 << 20];
    for (start, end) in runs {
        expected[start as usize..end as usize].copy_from_slice(&view[start as usize..end as usize]);
    }
    assert!(changed == expected);
    let since = mount.snapshot_dir("next").join("vda/since/base/changed.raw");
    assert_eq!(data_ranges(&since), data_ranges(&path));
}

#[test]
fn all_formats_of_one_map_say_the_same() {
    requires!();
    let rig = Rig::new();
    let mount = rig.mount([rig.image("vda", 2)]);
    mount.snap("base");
    touch(&mount, &[4, 9]);
    mount.snap("next");
    let since = |file: &str| fs::read_to_string(mount.snapshot_dir("next").join("vda/since/base").join(file)).unwrap();
    let json = mount.json("snapshots/next/vda/since/base/map.rbd.json");
    let total: u64 = json.as_array().unwrap().iter().map(|e| e["length"].as_u64().unwrap()).sum();
    assert_eq!(total, 2 * GRANULE);
    let borg = since("map.borg");
    assert!(borg.lines().any(|line| line == "262144 65536 data"), "{borg}");
    assert!(borg.lines().filter(|l| l.starts_with('#')).any(|l| l.contains("base")), "{borg}");
    assert!(since("map.bmap").contains("<MappedBlocksCount> 32 </MappedBlocksCount>"));
    assert!(since("map.ddrescue").contains("0x00040000  0x00010000  +"));
    let nbd = mount.json("snapshots/next/vda/since/base/map.nbd.json");
    assert_eq!(nbd[1]["type"], 1);
    assert_eq!(nbd[1]["offset"], 4 * GRANULE);
    for format in ["json", "borg", "rbd", "bmap", "ddrescue", "nbd"] {
        let out = mount.done("map", args!["next", "vda", "--since", "base", "--output", format]);
        let file = if matches!(format, "rbd" | "nbd") { format!("map.{format}.json") } else { format!("map.{format}") };
        assert_eq!(out, since(&file), "the command and the file differ");
    }
    let csi: serde_json::Value =
        serde_json::from_str(&mount.done("map", args!["next", "vda", "--since", "base", "--output", "csi"])).unwrap();
    assert_eq!(csi["block_metadata"][0]["byte_offset"], 4 * GRANULE);
    let text = mount.done("map", args!["next", "vda", "--since", "base", "--output", "text"]);
    assert!(text.contains("64.0 KiB"), "{text}");
    let totals = mount.done("map", args!["next", "vda", "--since", "base", "--output", "json", "--totals"]);
    assert!(totals.contains("131072"), "{totals}");
}

/// Discards every second granule of `path`.
fn discard_every_second_granule(path: &Path, granules: u64) {
    let script = "import ctypes, os, sys
fallocate = ctypes.CDLL(None, use_errno=True).fallocate
fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_longlong, ctypes.c_longlong]
disk = os.open(sys.argv[1], os.O_RDWR)
for start in range(0, int(sys.argv[2]), 131072):
    if fallocate(disk, 3, start, 65536):
        sys.exit(os.strerror(ctypes.get_errno()))";
    ok(tool("python3").args(["-c", script]).arg(path).arg((granules * GRANULE).to_string()));
}

/// The most memory that a process had resident since it was last asked, in bytes.
fn peak_bytes(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    let kib: u64 = peak.trim().trim_end_matches(" kB").parse().unwrap();
    fs::write(format!("/proc/{pid}/clear_refs"), "5").unwrap();
    kib << 10
}

#[test]
fn sizes_of_maps_of_very_many_extents_are_told_without_holding_them() {
    requires!("python3");
    let granules = sized(1 << 16, 1 << 22);
    let rig = Rig::new();
    let image = rig.path("vda.raw");
    fs::File::create_new(&image).unwrap().set_len(granules * GRANULE).unwrap();
    let mount = rig.mount([&image]);
    mount.snap("base");
    discard_every_second_granule(&mount.live("vda"), granules);
    mount.snap("next");
    let since = mount.snapshot_dir("next").join("vda/since/base");
    let before = (peak_bytes(mount.pid), peak_bytes(mount.pid)).1;
    for file in ["map.json", "map.borg", "map.rbd.json", "map.bmap", "map.ddrescue", "map.nbd.json"] {
        let start = Instant::now();
        let size = fs::metadata(since.join(file)).unwrap().len();
        let cold = start.elapsed();
        let read = std::io::copy(&mut fs::File::open(since.join(file)).unwrap(), &mut std::io::sink()).unwrap();
        assert_eq!(read, size, "{file}");
        assert!(size > granules / 2 * 20, "{file}: {size} bytes");
        say(&format!("{file}: {size} bytes, cold stat {} ms", cold.as_millis()));
    }
    let grown = peak_bytes(mount.pid).saturating_sub(before);
    say(&format!("{granules} extents: {} MiB before, {} MiB more", before >> 20, grown >> 20));
    assert!(grown < 24 << 20, "{grown} bytes for six maps of {granules} extents");
}

#[test]
fn map_of_an_unknown_snapshot_disk_or_format_is_an_error() {
    requires!();
    let rig = Rig::new();
    let mount = rig.mount([rig.image("vda", 1)]);
    mount.snap("a");
    for (args, word) in [
        (["zzz", "vda", "--output", "json"], "zzz"),
        (["a", "vdz", "--output", "json"], "vdz"),
        (["a", "vda", "--output", "xml"], "xml"),
    ] {
        let out = mount.run("map", args);
        assert!(matches!(out.status.code(), Some(1 | 2)), "{args:?}: {}", out.status);
        assert!(stderr(&out).contains(word), "{}", stderr(&out));
    }
}

#[test]
fn a_foreign_writer_while_unmounted_means_everything_and_the_manifest_says_why() {
    requires!();
    let rig = Rig::new();
    let image = rig.image("vda", 1);
    let mount = rig.mount([&image]);
    mount.snap("base");
    mount.drop_snap("base");
    mount.umount();
    fs::OpenOptions::new().write(true).open(&image).unwrap().write_all_at(b"foreign", 500_000).unwrap();
    let mount = rig.mount([&image]);
    mount.snap("next");
    assert!(mount.map("next", "vda").all_dirty());
    let disk = mount.manifest("next", "vda");
    assert!(disk["full_reason"].as_str().is_some_and(|reason| !reason.is_empty()), "{disk}");
}
