//! `fleecefs bitmap`: users' dirty bitmaps, over unmounts, kills and full file systems.

use crate::harness::*;
use serde_json::{Value, json};
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

const MIB: u64 = 1 << 20;

/// The bitmaps of a disk as `bitmap list --json` has them, by name.
#[track_caller]
fn list(mount: &Mount, disk: &str) -> Vec<Value> {
    let mut rows: Vec<Value> = serde_json::from_str(&mount.done("bitmap list", args![disk, "--json"])).unwrap();
    rows.sort_by_key(|row| row["name"].as_str().unwrap().to_owned());
    rows
}

#[track_caller]
fn count(mount: &Mount, disk: &str, name: &str) -> u64 {
    let rows = list(mount, disk);
    let row = rows.iter().find(|row| row["name"] == name).unwrap_or_else(|| panic!("{name} is not in {rows:?}"));
    row["count"].as_u64().unwrap()
}

fn qcow2(rig: &Rig, name: &str, mib: u64) -> PathBuf {
    let path = rig.path(&format!("{name}.qcow2"));
    ok(tool("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&path).arg(format!("{mib}M")));
    path
}

#[test]
fn every_command_does_what_it_says() {
    requires!();
    let rig = Rig::new();
    let mount = rig.mount([rig.image("vda", 4), rig.image("vdb", 4)]);
    let guest = mount.guest("vda");
    for line in ["bitmap add", "bitmap disable", "bitmap enable", "bitmap clear"] {
        assert_eq!(mount.done(line, args!["vda", "b"]), "", "{line}");
    }
    assert_eq!(
        list(&mount, "vda"),
        [json!({"node": "vda", "name": "b", "granularity": 65536, "count": 0, "recording": true, "busy": false,
            "persistent": true})]
    );
    guest.write_all_at(b"x", 0).unwrap();
    assert_eq!(count(&mount, "vda", "b"), GRANULE);
    mount.done("bitmap disable", args!["vda", "b"]);
    guest.write_all_at(b"x", MIB).unwrap();
    assert_eq!(count(&mount, "vda", "b"), GRANULE);

    mount.done("bitmap add", args!["vda", "c", "-g", "4K", "--persistent", "false", "--disabled"]);
    mount.done("bitmap merge", args!["vda", "c", "b"]);
    assert_eq!(count(&mount, "vda", "c"), GRANULE);
    mount.done("bitmap add", args!["vdb", "d", "--granularity", "128K"]);
    mount.done("bitmap merge", args!["vdb", "d", "b", "c", "-b", "vda"]);
    assert_eq!(count(&mount, "vdb", "d"), 2 * GRANULE);
    mount.done("bitmap clear", args!["vda", "c"]);
    assert_eq!(count(&mount, "vda", "c"), 0);
    let table = mount.done("bitmap list", args![]);
    for words in ["vda   c", "vdb   d", "disabled, not persistent", "recording", "4.0 KiB", "128.0 KiB"] {
        assert!(table.contains(words), "'{words}' is not in\n{table}");
    }
    mount.done("bitmap remove", args!["vda", "c"]);
    assert_eq!(list(&mount, "vda").len(), 1);
}

#[test]
fn what_cannot_be_done_says_why() {
    requires!();
    let rig = Rig::new();
    let mount = rig.mount([rig.image("vda", 4), rig.image("vdb", 2)]);
    mount.done("bitmap add", args!["vda", "b"]);
    mount.done("bitmap add", args!["vdb", "c"]);
    for (line, args, code, words) in [
        ("bitmap add", args!["vda", "b"], 2, "bitmap 'b' of disk 'vda': Bitmap already exists: b"),
        ("bitmap add", args!["vda", "x", "-g", "64000"], 2, "Granularity must be power of 2 and at least 512"),
        ("bitmap add", args!["vda", "x", "-g", "4G"], 2, "at most 2G"),
        ("bitmap add", args!["vda", "x", "-g", "many"], 2, "not a size in bytes"),
        ("bitmap add", args!["vda", ""], 2, "Bitmap name cannot be empty"),
        ("bitmap add", args!["vdx", "b"], 1, "vdx"),
        ("bitmap clear", args!["vda", "x"], 1, "bitmap 'x' of disk 'vda': Dirty bitmap 'x' not found"),
        ("bitmap remove", args!["vdx", "b"], 1, "Node 'vdx' not found"),
        ("bitmap merge", args!["vda", "b", "x"], 1, "Dirty bitmap 'x' not found"),
        ("bitmap merge", args!["vda", "b", "c", "-b", "vdb"], 2, "different sizes"),
        ("bitmap merge", args!["vda", "b"], 2, "usage"),
        ("bitmap list", args!["vdx"], 1, "disk 'vdx': no such disk"),
    ] {
        refused(&mount.run(line, args), code, &[words]);
    }
}

#[test]
fn what_a_checkpoint_owns_is_read_and_nothing_else() {
    requires!();
    let rig = Rig::new();
    let mount = rig.mount([rig.image("vda", 4)]);
    mount.snap("monday");
    mount.drop_snap("monday");
    mount.guest("vda").write_all_at(b"x", MIB).unwrap();
    assert_eq!(list(&mount, "vda")[0]["checkpoint"], true);
    for line in ["bitmap clear", "bitmap enable", "bitmap disable", "bitmap remove"] {
        refused(&mount.run(line, args!["vda", "monday"]), 2, &["checkpoint", "monday"]);
    }
    mount.done("bitmap add", args!["vda", "b", "--disabled"]);
    mount.done("bitmap merge", args!["vda", "b", "monday"]);
    assert_eq!(count(&mount, "vda", "b"), GRANULE);
}

#[test]
fn persistent_bitmaps_outlive_unmounts_and_kills_and_others_do_not() {
    requires!("qemu-img");
    for format in ["raw", "qcow2"] {
        let rig = Rig::new();
        let image = if format == "raw" { rig.image("vda", 4) } else { qcow2(&rig, "vda", 4) };
        let mut mount = rig.mount([&image]);
        mount.done("bitmap add", args!["vda", "kept"]);
        mount.done("bitmap add", args!["vda", "lost", "--persistent", "false"]);
        for round in 1..=3 {
            mount.guest("vda").write_all_at(b"x", round * MIB).unwrap();
            let rows = list(&mount, "vda");
            assert_eq!(rows.len(), if round == 1 { 2 } else { 1 }, "{format}: {rows:?}");
            assert_eq!(count(&mount, "vda", "kept"), round * GRANULE, "{format}");
            if round == 2 {
                let dead = mount.kill();
                mount = Mount::at(dead, [&image]);
            } else {
                mount.umount();
                mount = rig.mount([&image]);
            }
        }
        assert_eq!(count(&mount, "vda", "kept"), 3 * GRANULE, "{format}");
        mount.done("bitmap remove", args!["vda", "kept"]);
        mount.umount();
        let mount = rig.mount([&image]);
        assert!(list(&mount, "vda").is_empty(), "{format}");
    }
}

#[test]
fn qemu_img_sees_what_was_made_here() {
    requires!("qemu-img");
    let rig = Rig::new();
    let image = qcow2(&rig, "vda", 4);
    let mount = rig.mount([&image]);
    mount.done("bitmap add", args!["vda", "on", "-g", "4K"]);
    mount.done("bitmap add", args!["vda", "off", "--disabled"]);
    mount.umount();
    let info: Value = serde_json::from_str(&ok(tool("qemu-img").args(["info", "--output=json"]).arg(&image))).unwrap();
    let mut bitmaps = info["format-specific"]["data"]["bitmaps"].as_array().unwrap().clone();
    bitmaps.sort_by_key(|row| row["name"].as_str().unwrap().to_owned());
    let expected = json!([{"name": "off", "granularity": 65536, "flags": []}, {"name": "on", "granularity": 4096, "flags": ["auto"]}]);
    assert_eq!(json!(bitmaps), expected);
    ok(tool("qemu-img").args(["bitmap", "--remove"]).arg(&image).arg("off"));
    let mount = rig.mount([&image]);
    assert_eq!(list(&mount, "vda").len(), 1);
}

/// A small file system of its own, unmounted with this value.
pub struct Tmpfs(PathBuf);

impl Tmpfs {
    pub fn new(dir: PathBuf, bytes: u64) -> Tmpfs {
        ok(tool("mount").args(["-t", "tmpfs", "-o", &format!("size={bytes}"), "tmpfs"]).arg(&dir));
        Tmpfs(dir)
    }

    /// Leaves no room.
    pub fn fill(&self) {
        let to = format!("of={}", self.0.join("fill").display());
        let out = tool("dd").args(["if=/dev/zero", "bs=4k", &to]).output().unwrap();
        assert!(!out.status.success(), "the file system is not full");
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = tool("umount").arg("-l").arg(&self.0).output();
    }
}

fn good_bitmaps(image: &Path) -> Vec<String> {
    let out = ok(tool("qemu-img").args(["info", "--output=json"]).arg(image));
    let info: Value = serde_json::from_str(&out).unwrap();
    let rows = info["format-specific"]["data"]["bitmaps"].as_array().cloned().unwrap_or_default();
    let good = |row: &&Value| !row["flags"].as_array().unwrap().contains(&json!("in-use"));
    rows.iter().filter(good).map(|row| row["name"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn no_room_for_the_bitmaps_ends_in_an_error_and_leaves_no_stale_good_one() {
    requires!("root", "qemu-img", "dd");
    let rig = Rig::new();
    let small = Tmpfs::new(rig.mount_point("small"), 2 * MIB);
    let image = small.0.join("vda.qcow2");
    ok(tool("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&image).arg("1G"));
    ok(tool("qemu-img").args(["bitmap", "--add"]).arg(&image).arg("old"));
    let state = rig.mount_point("state");
    let options = |image: &Path| args!["--state-dir", &state, image];
    let mount = rig.mount(options(&image));
    // The guest's data has its place; the bits of this granularity have none.
    mount.guest("vda").write_all_at(&[1; 4096], 0).unwrap();
    mount.done("bitmap add", args!["vda", "fine", "-g", "512"]);
    let guest = mount.guest("vda");
    (0..64).for_each(|step| guest.write_all_at(&[1; 512], step * 512).unwrap());
    drop(guest);
    small.fill();
    let dir = mount.dir.clone();
    let out = mount.run("umount", args![]);
    assert_eq!(out.status.code(), Some(2), "{}{}", stdout(&out), stderr(&out));
    assert!(stderr(&out).contains("vda") || stderr(&out).contains("state"), "{}", stderr(&out));
    drop(mount);
    assert!(!is_mounted(&dir));
    assert_eq!(good_bitmaps(&image), Vec::<String>::new(), "what was not stored is not good");
    // With room again nothing is lost that the sidecar knows.
    fs::remove_file(small.0.join("fill")).unwrap();
    let mount = rig.mount(options(&image));
    let rows = list(&mount, "vda");
    assert_eq!(rows.len(), 2, "{rows:?}");
    for row in &rows {
        let sure = row.get("inconsistent").is_some() || row["count"].as_u64() >= Some(32768);
        assert!(sure, "{row}");
    }
    mount.umount();
    assert_eq!(good_bitmaps(&image).len(), rows.iter().filter(|row| row.get("inconsistent").is_none()).count());
}
