//! Holes: every file tells them, and the tools that look for them copy right.

use crate::harness::*;
use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

/// 16 MiB with data at both ends and a little in the middle.
fn sparse_image(rig: &Rig) -> std::path::PathBuf {
    let path = rig.path("vda.raw");
    let file = fs::File::create_new(&path).unwrap();
    file.set_len(16 << 20).unwrap();
    for offset in [0, 5 << 20, (16 << 20) - 65536] {
        file.write_all_at(&pattern(offset, 65536), offset).unwrap();
    }
    path
}

/// What SEEK_DATA calls a hole must be zero; what holds data must be told.
fn check_seek(path: &Path) {
    let content = fs::read(path).unwrap();
    let mut rest = 0;
    for (start, end) in data_ranges(path) {
        assert!(content[rest..start as usize].iter().all(|b| *b == 0), "{}: data in a hole", path.display());
        rest = end as usize;
    }
    assert!(content[rest..].iter().all(|b| *b == 0), "{}: data behind the last hole", path.display());
}

#[test]
fn seek_data_and_hole_work_on_every_file() {
    requires!("xfs_io");
    let rig = Rig::new();
    let image = sparse_image(&rig);
    let mount = rig.mount([&image]);
    mount.snap("a");
    mount.guest("vda").write_all_at(&[1; 65536], 10 << 20).unwrap();
    xfs_io(&mount.live("vda"), "", &["fpunch 5242880 65536"]);
    mount.snap("b");
    for snapshot in ["a", "b"] {
        check_seek(&mount.view(snapshot, "vda"));
        let ranges = data_ranges(&mount.view(snapshot, "vda"));
        assert!(ranges.iter().map(|(a, b)| b - a).sum::<u64>() <= 1 << 20, "holes stay holes: {ranges:?}");
    }
    check_seek(&mount.live("vda"));
    check_seek(&mount.snapshot_dir("b").join("vda/since/a/changed.raw"));
    for file in ["vda.map", "manifest.json", "vda/since/a/map.borg"] {
        let path = mount.snapshot_dir("b").join(file);
        assert_eq!(data_ranges(&path), [(0, fs::metadata(&path).unwrap().len())], "{file} is all data");
    }
    let release = mount.snapshot_dir("b").join("vda/release.raw");
    assert_eq!(fs::metadata(release).unwrap().len(), 16 << 20);
}

#[test]
fn sparse_copies_of_a_view_are_right_and_sparse() {
    requires!("rsync");
    let rig = Rig::new();
    let image = sparse_image(&rig);
    let mount = rig.mount([&image]);
    let before = fs::read(&image).unwrap();
    mount.snap("a");
    mount.guest("vda").write_all_at(&[1; 1 << 20], 0).unwrap();
    let view = mount.view("a", "vda");
    let (cp, rsync, dd) = (rig.path("cp"), rig.path("rsync"), rig.path("dd"));
    ok(tool("cp").arg("--sparse=always").arg(&view).arg(&cp));
    ok(tool("rsync").arg("-S").arg(&view).arg(&rsync));
    ok(tool("dd")
        .args(["bs=64K", "conv=sparse", "status=none"])
        .arg(format!("if={}", view.display()))
        .arg(format!("of={}", dd.display())));
    for copy in [cp, rsync, dd] {
        assert!(fs::read(&copy).unwrap() == before, "{}", copy.display());
        assert!(fs::metadata(&copy).unwrap().blocks() * 512 <= 2 << 20, "{} is not sparse", copy.display());
    }
}

#[test]
fn qemu_img_reads_a_view_as_it_was() {
    requires!("qemu-img");
    let rig = Rig::new();
    let image = sparse_image(&rig);
    let mount = rig.mount([&image]);
    let copy = rig.path("copy");
    fs::copy(&image, &copy).unwrap();
    mount.snap("a");
    mount.guest("vda").write_all_at(&[1; 1 << 20], 4 << 20).unwrap();
    let view = mount.view("a", "vda");
    ok(tool("qemu-img").args(["compare", "-f", "raw", "-F", "raw"]).arg(&view).arg(&copy));
    let map: serde_json::Value =
        serde_json::from_str(&ok(tool("qemu-img").args(["map", "-f", "raw", "--output", "json"]).arg(&view))).unwrap();
    let data: u64 =
        map.as_array().unwrap().iter().filter(|e| e["data"] == true).map(|e| e["length"].as_u64().unwrap()).sum();
    assert!((3 * 65536..1 << 20).contains(&data), "{map}");
    ok(tool("qemu-img").args(["convert", "-f", "raw", "-O", "qcow2"]).arg(&view).arg(rig.path("q.qcow2")));
    ok(tool("qemu-img").args(["compare", "-f", "qcow2", "-F", "raw"]).arg(rig.path("q.qcow2")).arg(&copy));
}

#[test]
fn qemu_writes_discards_and_zeroes_through_the_live_file() {
    requires!("qemu-io", "qemu-img");
    let rig = Rig::new();
    let image = rig.image("vda", 4);
    let mount = rig.mount([&image]);
    mount.snap("base");
    mount.drop_snap("base");
    let mut qemu = tool("qemu-io");
    qemu.args(["-f", "raw", "-t", "none", "-d", "unmap"]);
    for command in
        ["write -P 0x11 0 64k", "write -z 1M 64k", "discard 2M 64k", "flush", "read -P 0x11 0 64k", "read -P 0 1M 64k"]
    {
        qemu.args(["-c", command]);
    }
    let text = ok(qemu.arg(mount.live("vda")));
    assert!(!text.contains("failed") && !text.contains("differ"), "{text}");
    mount.snap("next");
    assert_eq!(mount.map("next", "vda").granules(), [0, 16, 32]);
    ok(tool("qemu-img")
        .args(["compare", "-f", "raw", "-F", "raw"])
        .arg(mount.view("next", "vda"))
        .arg(mount.live("vda")));
}
