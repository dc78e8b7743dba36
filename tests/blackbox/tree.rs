//! The tree of the mount: what stands where, what it says, and what names are good for.

use crate::harness::*;
use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

fn names(dir: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
    entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect()
}

fn set(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|n| n.to_string()).collect()
}

#[test]
fn the_tree_is_that_of_the_manual() {
    requires!();
    let rig = Rig::new();
    let mount = rig.mount([rig.image("vda", 1), rig.image("vdb", 1)]);
    assert_eq!(names(&mount.dir), set(&["live", "metrics", "snapshots", "status.json"]));
    assert!(names(&mount.path("live")).is_superset(&set(&["vda.raw", "vdb.raw"])));
    assert_eq!(names(&mount.path("snapshots")), set(&[]));
    mount.snap("first");
    mount.drop_snap("first");
    mount.snap("second");
    assert!(names(&mount.path("snapshots")).is_superset(&set(&["second"])));
    let all = set(&["manifest.json", "vda", "vda.map", "vda.raw", "vdb", "vdb.map", "vdb.raw"]);
    assert_eq!(names(&mount.snapshot_dir("second")), all);
    let disk = mount.snapshot_dir("second").join("vda");
    assert!(names(&disk).is_superset(&set(&["changed.raw", "release.raw", "since"])), "{:?}", names(&disk));
    assert_eq!(names(&disk.join("since")), set(&["first"]));
    assert_eq!(
        names(&disk.join("since/first")),
        set(&["changed.raw", "map.bmap", "map.borg", "map.ddrescue", "map.json", "map.nbd.json", "map.rbd.json"])
    );
}

#[test]
fn every_file_is_as_long_as_its_size_says() {
    requires!();
    let rig = Rig::new();
    let mount = rig.mount([rig.image("vda", 1)]);
    mount.snap("a");
    mount.snap("b");
    let dir = mount.snapshot_dir("b");
    let mut files: Vec<_> =
        ["manifest.json", "vda.map", "vda.raw", "vda/changed.raw"].iter().map(|f| dir.join(f)).collect();
    files.extend(fs::read_dir(dir.join("vda/since/a")).unwrap().map(|e| e.unwrap().path()));
    for file in files {
        let size = fs::metadata(&file).unwrap().len();
        assert_eq!(fs::read(&file).unwrap().len() as u64, size, "{}", file.display());
        assert!(size > 0, "{}", file.display());
    }
}

#[test]
fn the_manifest_says_what_the_manual_promises() {
    requires!();
    let rig = Rig::new();
    let image = rig.image("vda", 1);
    let mount = rig.mount([&image]);
    mount.snap("first");
    let manifest = mount.json("snapshots/first/manifest.json");
    for key in ["version", "name", "uuid", "time", "consistency", "hooks", "disks"] {
        assert!(!manifest[key].is_null(), "{key} is missing in {manifest}");
    }
    assert_eq!(manifest["name"], "first");
    assert_eq!(manifest["consistency"], "crash");
    let disk = mount.manifest("first", "vda");
    assert_eq!(disk["image"].as_str(), image.to_str());
    assert_eq!(disk["format"], "raw");
    assert_eq!(disk["size"], 1 << 20);
    assert_eq!(name_of(&disk["reference"]), None);
    assert_eq!(disk["since"].as_array().map(Vec::len), Some(0));
    assert!(disk["full_reason"].is_string(), "a full map says why: {disk}");
    assert!(!disk["checkpoint"].is_null(), "{disk}");

    mount.drop_snap("first");
    mount.snap("second");
    let disk = mount.manifest("second", "vda");
    assert_eq!(name_of(&disk["reference"]), Some("first"));
    assert_eq!(disk["since"].as_array().unwrap().iter().map(name_of).collect::<Vec<_>>(), [Some("first")]);
    assert!(disk["full_reason"].is_null(), "{disk}");
}

#[test]
fn metrics_are_prometheus_text_of_the_same_counters() {
    requires!();
    let rig = Rig::new();
    let mount = rig.mount([rig.image("vda", 1)]);
    mount.snap("a");
    mount.guest("vda").write_all_at(&[1; 4096], 0).unwrap();
    let text = fs::read_to_string(mount.path("metrics")).unwrap();
    let rows: Vec<_> = text.lines().filter(|line| !line.starts_with('#') && !line.is_empty()).collect();
    assert!(!rows.is_empty());
    for row in &rows {
        let (name, value) = row.rsplit_once(' ').unwrap_or_else(|| panic!("{row}"));
        let bare = name.split('{').next().unwrap();
        assert!(bare.starts_with("fleecefs_"), "{row}");
        assert!(bare.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_'), "{row}");
        assert!(value.parse::<f64>().is_ok(), "{row}");
        assert!(text.contains(&format!("# TYPE {bare} ")), "{row} has no type");
    }
    let counters = mount.status()["counters"].as_object().unwrap().len();
    assert!(counters > 0 && rows.len() >= counters, "{counters} counters in status.json, {} rows here", rows.len());
}

#[test]
fn latest_is_a_link_to_the_newest_snapshot() {
    requires!();
    let rig = Rig::new();
    let mount = rig.mount([rig.image("vda", 1)]);
    let latest = mount.path("snapshots/latest");
    assert!(fs::symlink_metadata(&latest).is_err(), "no snapshot, no link");
    mount.snap("one");
    mount.snap("two");
    assert!(fs::symlink_metadata(&latest).unwrap().is_symlink());
    assert_eq!(fs::read_link(&latest).unwrap(), Path::new("two"));
    assert!(latest.join("manifest.json").exists());
    mount.drop_snap("two");
    assert_eq!(fs::read_link(&latest).unwrap(), Path::new("one"));
}

#[test]
fn unknown_names_are_absent() {
    requires!();
    let rig = Rig::new();
    let mount = rig.mount([rig.image("vda", 1)]);
    mount.snap("a");
    for name in [
        "nothing",
        "live/vdz.raw",
        "snapshots/b",
        "snapshots/a/vdz.raw",
        "snapshots/a/vda.rawx",
        "snapshots/a/vda/since/zero/map.json",
        "snapshots/a/vda/since/a/map.json",
    ] {
        fails(fs::metadata(mount.path(name)), &[errno::ENOENT]);
    }
}

#[test]
fn what_is_frozen_does_not_open_for_writing() {
    requires!();
    let rig = Rig::new();
    let mount = rig.mount([rig.image("vda", 1)]);
    mount.snap("a");
    mount.snap("b");
    for name in
        ["vda.raw", "vda.map", "manifest.json", "vda/changed.raw", "vda/since/a/map.json", "vda/since/a/changed.raw"]
    {
        let path = mount.snapshot_dir("b").join(name);
        fails(fs::OpenOptions::new().write(true).open(&path), &[errno::EROFS]);
        fails(fs::OpenOptions::new().read(true).write(true).open(&path), &[errno::EROFS]);
        assert!(fs::File::open(&path).is_ok(), "{name}");
    }
}

#[test]
fn inode_size_and_times_of_a_view_never_change() {
    requires!();
    let rig = Rig::new();
    let mount = rig.mount([rig.image("vda", 1)]);
    mount.snap("a");
    let facts = |name: &str| {
        let m = fs::metadata(mount.snapshot_dir("a").join(name)).unwrap();
        (m.ino(), m.len(), m.mtime(), m.mtime_nsec(), m.ctime(), m.ctime_nsec())
    };
    let files = ["vda.raw", "vda.map", "manifest.json"];
    let before = files.map(facts);
    mount.guest("vda").write_all_at(&[9; 65536], 0).unwrap();
    mount.snap("b");
    assert_eq!(files.map(facts), before);
    let other = fs::metadata(mount.view("b", "vda")).unwrap().ino();
    assert_ne!(other, before[0].0, "another snapshot's view is another file");
}

#[test]
fn names_of_snapshots_keep_to_the_rules() {
    requires!();
    let rig = Rig::new();
    let mount = rig.mount([rig.image("vda", 1)]);
    let make = |name: &str| fs::create_dir(mount.snapshot_dir(name));
    let longest = "x".repeat(200);
    make(&longest).unwrap();
    make("with blank, and ümläut").unwrap();
    fails(make(&"x".repeat(201)), &[errno::ENAMETOOLONG]);
    fails(make(".hidden"), &[errno::EINVAL]);
    fails(make("tab\there"), &[errno::EINVAL]);
    fails(make("latest"), &[errno::EINVAL, errno::EEXIST]);
    fails(make(&longest), &[errno::EEXIST]);
    for bad in ["a/b", ".hidden", "latest", "tab\there", ""] {
        refused(&mount.run("snapshot create", args![bad]), 2, &[]);
    }
    refused(&mount.run("snapshot create", args!["x".repeat(201)]), 2, &["200"]);
    assert_eq!(mount.status()["snapshots"].as_array().unwrap().len(), 2);
}

#[test]
fn a_name_that_a_snapshot_or_a_checkpoint_has_exists() {
    requires!();
    let rig = Rig::new();
    let mount = rig.mount([rig.image("vda", 1)]);
    mount.snap("a");
    fails(fs::create_dir(mount.snapshot_dir("a")), &[errno::EEXIST]);
    refused(&mount.run("snapshot create", args!["a"]), 2, &["'a'", "exist"]);
    mount.drop_snap("a");
    fails(fs::create_dir(mount.snapshot_dir("a")), &[errno::EEXIST]);
    mount.done("checkpoint delete", args!["a"]);
    mount.snap("a");
}
