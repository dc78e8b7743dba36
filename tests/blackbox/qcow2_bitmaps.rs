//! Persistent bitmaps of a qcow2 image: they record what the guest writes through the mount, and through QEMU alone.

use crate::harness::*;
use serde_json::Value;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

const MIB: u64 = 1 << 20;
/// Where a header keeps its autoclear features.
const AUTOCLEAR_AT: u64 = 88;

fn create(rig: &Rig) -> PathBuf {
    let image = rig.path("vda.qcow2");
    ok(tool("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&image).arg("64M"));
    image
}

/// One byte into each of these granules, by QEMU.
fn qemu_writes(image: &Path, granules: &[u64]) {
    let mut command = tool("qemu-io");
    command.args(["-f", "qcow2"]);
    for granule in granules {
        command.args(["-c", &format!("write -q {} 512", granule * GRANULE + 512)]);
    }
    ok(command.arg(image));
}

/// One byte into each of these granules, by the guest.
fn guest_writes(mount: &Mount, granules: &[u64]) {
    let guest = mount.guest("vda");
    granules.iter().for_each(|granule| guest.write_all_at(b"x", granule * GRANULE + 77).unwrap());
}

fn check(image: &Path) {
    ok(tool("qemu-img").args(["check", "-q", "-f", "qcow2"]).arg(image));
}

fn bitmap(image: &Path, args: &[&str], name: &str) {
    ok(tool("qemu-img").arg("bitmap").args(args).arg(image).arg(name));
}

/// Names and flags as `qemu-img info` tells them, in the order of the names.
fn listed(image: &Path) -> Vec<(String, Vec<String>)> {
    let info: Value =
        serde_json::from_str(&ok(tool("qemu-img").args(["info", "-U", "--output=json"]).arg(image))).unwrap();
    let bitmaps = info["format-specific"]["data"]["bitmaps"].as_array().cloned().unwrap_or_default();
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let one = |bitmap: &Value| (text(&bitmap["name"]), bitmap["flags"].as_array().unwrap().iter().map(text).collect());
    let mut all: Vec<_> = bitmaps.iter().map(one).collect();
    all.sort();
    all
}

fn names(list: &[(&str, &[&str])]) -> Vec<(String, Vec<String>)> {
    list.iter().map(|(name, flags)| (name.to_string(), flags.iter().map(|flag| flag.to_string()).collect())).collect()
}

/// What QEMU sees in a bitmap: starts and ends of dirty ranges in bytes.
fn dirty(rig: &Rig, image: &Path, name: &str) -> Vec<(u64, u64)> {
    let socket = rig.path("socket");
    let mut command = Command::new("timeout");
    command.args(["60", "qemu-nbd", "-r", "-f", "qcow2", "-B", name, "-k"]).arg(&socket).arg(image);
    let mut server = command.spawn().unwrap();
    while !socket.exists() && server.try_wait().unwrap().is_none() {
        std::thread::sleep(Duration::from_millis(2));
    }
    let context = format!("--map=qemu:dirty-bitmap:{name}");
    let map = ok(tool("nbdinfo").args([&context, "--json"]).arg(format!("nbd+unix:///?socket={}", socket.display())));
    server.wait().unwrap();
    let map: Vec<Value> = serde_json::from_str(&map).unwrap();
    let number = |extent: &Value, key: &str| extent[key].as_u64().unwrap();
    let dirty = map.iter().filter(|extent| extent["type"] == 1);
    dirty.map(|e| (number(e, "offset"), number(e, "offset") + number(e, "length"))).collect()
}

fn tracking(mount: &Mount) -> String {
    mount.status()["disks"][0]["tracking"].as_str().unwrap().to_owned()
}

#[test]
fn a_guest_that_ran_under_qemu_alone_keeps_its_chain() {
    requires!("qemu-img", "qemu-io");
    let rig = Rig::new();
    let image = create(&rig);
    let mount = rig.mount([&image]);
    mount.snap("c1");
    guest_writes(&mount, &[3]);
    mount.umount();
    assert_eq!(listed(&image), names(&[("c1", &["auto"])]));
    check(&image);
    qemu_writes(&image, &[10, 20, 21]);
    qemu_writes(&image, &[30]);
    check(&image);
    let mount = rig.mount([&image]);
    assert_eq!(tracking(&mount), "exact after writes of another program");
    guest_writes(&mount, &[40]);
    mount.snap("c2");
    assert_eq!(mount.map_since("c2", "vda", "c1").granules(), [3, 10, 20, 21, 30, 40]);
    guest_writes(&mount, &[50]);
    mount.umount();
    assert_eq!(listed(&image), names(&[("c2", &["auto"])]));
    check(&image);
    // Again, and with nothing at all in between.
    qemu_writes(&image, &[60]);
    rig.mount([&image]).umount();
    let mount = rig.mount([&image]);
    assert_eq!(tracking(&mount), "exact");
    mount.snap("c3");
    assert_eq!(mount.map_since("c3", "vda", "c2").granules(), [50, 60]);
    assert_eq!(mount.map_since("c3", "vda", "c1").granules(), [3, 10, 20, 21, 30, 40, 50, 60]);
    mount.umount();
    check(&image);
}

#[test]
fn bitmaps_that_qemu_made_record_what_the_guest_writes() {
    requires!("qemu-img", "qemu-io", "qemu-nbd", "nbdinfo");
    let rig = Rig::new();
    let image = create(&rig);
    bitmap(&image, &["--add", "-g", "4096"], "on");
    bitmap(&image, &["--add"], "off");
    qemu_writes(&image, &[1]);
    bitmap(&image, &["--disable"], "off");
    let mount = rig.mount([&image]);
    assert_eq!(listed(&image), names(&[("off", &["in-use"]), ("on", &["in-use", "auto"])]), "while it is served");
    mount.snap("c1");
    guest_writes(&mount, &[5, 7]);
    let taken = mount.run("snapshot create", ["on"]);
    assert!(stderr(&taken).contains("a bitmap of that name exists"), "{}", stderr(&taken));
    mount.umount();
    assert_eq!(listed(&image), names(&[("c1", &["auto"]), ("off", &[]), ("on", &["auto"])]));
    check(&image);
    let at = |granule: u64| (granule * GRANULE, granule * GRANULE + 4096);
    assert_eq!(dirty(&rig, &image, "on"), [at(1), at(5), at(7)]);
    assert_eq!(dirty(&rig, &image, "off"), [(GRANULE, 2 * GRANULE)]);
    assert_eq!(dirty(&rig, &image, "c1"), [(5 * GRANULE, 6 * GRANULE), (7 * GRANULE, 8 * GRANULE)]);
    bitmap(&image, &["--add", "--disable", "-g", "64K", "--merge", "on"], "sum");
    assert_eq!(dirty(&rig, &image, "sum").len(), 3);
    // A resize takes them all along; what is added counts as changed for checkpoints, and not for users, as in QEMU.
    let mount = rig.mount([&image]);
    mount.done("disk resize", ["vda", "70M"]);
    guest_writes(&mount, &[9]);
    mount.umount();
    check(&image);
    assert_eq!(dirty(&rig, &image, "on"), [at(1), at(5), at(7), at(9)]);
    assert_eq!(dirty(&rig, &image, "off"), [(GRANULE, 2 * GRANULE)]);
    let whole = |granule: u64| (granule * GRANULE, (granule + 1) * GRANULE);
    assert_eq!(dirty(&rig, &image, "c1"), [whole(5), whole(7), whole(9), (64 * MIB, 70 * MIB)]);
    assert_eq!(listed(&image), names(&[("c1", &["auto"]), ("off", &[]), ("on", &["auto"]), ("sum", &[])]));
}

#[test]
fn a_kill_loses_no_bitmap() {
    requires!("qemu-img", "qemu-io", "qemu-nbd", "nbdinfo");
    let rig = Rig::new();
    let image = create(&rig);
    bitmap(&image, &["--add"], "on");
    qemu_writes(&image, &[1]);
    bitmap(&image, &["--add", "--disable", "--merge", "on"], "off");
    let mount = rig.mount([&image]);
    mount.snap("c1");
    guest_writes(&mount, &[2]);
    let mut dir = mount.kill();
    assert_eq!(listed(&image), names(&[("off", &["in-use"]), ("on", &["in-use", "auto"])]));
    for granule in [3, 4] {
        let mount = Mount::at(dir, [&image]);
        assert_eq!(tracking(&mount), "exact after a kill");
        guest_writes(&mount, &[granule]);
        dir = mount.kill();
    }
    let mount = Mount::at(dir, [&image]);
    mount.snap("c2");
    assert_eq!(mount.map_since("c2", "vda", "c1").granules(), [2, 3, 4]);
    mount.umount();
    check(&image);
    assert_eq!(listed(&image), names(&[("c2", &["auto"]), ("off", &[]), ("on", &["auto"])]));
    assert_eq!(dirty(&rig, &image, "on"), [(GRANULE, 5 * GRANULE)]);
    assert_eq!(dirty(&rig, &image, "off"), [(GRANULE, 2 * GRANULE)]);
}

/// Everything counts as changed, and why.
fn assert_everything(rig: &Rig, image: &Path, why: &str) {
    let mount = rig.mount([image]);
    let tracking = tracking(&mount);
    assert!(tracking.starts_with("everything: ") && tracking.contains(why), "{tracking}");
    mount.snap("next");
    assert!(mount.map_since("next", "vda", "c1").all_dirty(), "{why}");
    mount.umount();
    check(image);
}

/// c1, then a granule, then a clean stop.
fn stopped(rig: &Rig) -> PathBuf {
    let image = create(rig);
    let mount = rig.mount([&image]);
    mount.snap("c1");
    guest_writes(&mount, &[3]);
    mount.umount();
    image
}

#[test]
fn what_others_did_to_the_bitmap_means_everything() {
    requires!("qemu-img", "qemu-io");
    type Deed = fn(&Path);
    let deeds: [(&str, Deed); 5] = [
        ("the bitmap in the image was changed", |image| bitmap(image, &["--disable"], "c1")),
        ("the bitmap in the image has lost changes", |image| bitmap(image, &["--clear"], "c1")),
        ("the image has no bitmap of the checkpoint", |image| bitmap(image, &["--remove"], "c1")),
        ("the bitmap in the image was changed", |image| {
            bitmap(image, &["--remove"], "c1");
            bitmap(image, &["--add", "-g", "512"], "c1");
        }),
        ("another program changed the backing file", |image| {
            let base = image.with_file_name("base");
            fs::write(&base, vec![7; 1 << 20]).unwrap();
            ok(tool("qemu-img").args(["rebase", "-u", "-b"]).arg(&base).args(["-F", "raw"]).arg(image));
        }),
    ];
    for (why, deed) in deeds {
        let rig = Rig::new();
        let image = stopped(&rig);
        qemu_writes(&image, &[10]);
        deed(&image);
        assert_everything(&rig, &image, why);
    }
}

#[test]
fn a_writer_without_bitmaps_means_everything_and_its_leftovers_go() {
    requires!("qemu-img");
    let rig = Rig::new();
    let image = stopped(&rig);
    let file = fs::OpenOptions::new().write(true).open(&image).unwrap();
    file.write_all_at(&(1u64 << 40).to_be_bytes(), AUTOCLEAR_AT).unwrap();
    let before = fs::read(&image).unwrap();
    rig.mount(args!["-r", &image]).umount();
    assert!(fs::read(&image).unwrap() == before, "a read-only mount changes nothing");
    assert_everything(&rig, &image, "another program wrote to the image");
    assert_eq!(listed(&image), names(&[("next", &["auto"])]));
    assert_eq!(fs::read(&image).unwrap()[AUTOCLEAR_AT as usize..][..8], (1u64 << 63 | 1).to_be_bytes());
}

#[test]
fn writes_of_qemu_after_a_kill_mean_everything_and_its_bitmaps_are_inconsistent() {
    requires!("qemu-img", "qemu-io");
    let rig = Rig::new();
    let image = create(&rig);
    bitmap(&image, &["--add"], "user");
    let mount = rig.mount([&image]);
    mount.snap("c1");
    guest_writes(&mount, &[3]);
    let dir = mount.kill();
    ok(tool("fusermount3").args(["-u", "-z"]).arg(&dir));
    qemu_writes(&image, &[10]);
    assert_everything(&rig, &image, "another program wrote to the image after fleecefs was killed");
    assert_eq!(listed(&image), names(&[("next", &["auto"]), ("user", &["in-use", "auto"])]));
}

#[test]
fn an_older_copy_of_the_image_means_everything() {
    requires!("qemu-img", "qemu-io");
    let rig = Rig::new();
    let image = stopped(&rig);
    let copy = fs::read(&image).unwrap();
    rig.mount([&image]).umount();
    fs::write(&image, copy).unwrap();
    assert_everything(&rig, &image, "the image is not the one that fleecefs left");
}

#[test]
fn an_image_whose_header_has_no_room_for_bitmaps_is_closed_well() {
    requires!("qemu-img");
    let rig = Rig::new();
    // Header, the name of the backing file, and no 24 bytes more in a cluster of 512.
    let base = rig.path(&"b".repeat(200)).with_file_name("b".repeat(250));
    let image = rig.path("vda.qcow2");
    ok(tool("qemu-img").args(["create", "-q", "-f", "raw"]).arg(&base).arg("1M"));
    let name = "./".repeat(45) + base.file_name().unwrap().to_str().unwrap();
    ok(tool("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-o", "cluster_size=512", "-F", "raw", "-b", &name])
        .arg(&image));
    for round in 0..2 {
        let mount = rig.mount([&image]);
        mount.snap(&format!("c{round}"));
        guest_writes(&mount, &[3]);
        mount.umount();
        check(&image);
        let info: Value =
            serde_json::from_str(&ok(tool("qemu-img").args(["info", "--output=json"]).arg(&image))).unwrap();
        assert_eq!(info["dirty-flag"], false);
    }
}

#[test]
fn a_repair_by_qemu_keeps_internal_snapshots() {
    requires!("qemu-img", "qemu-io");
    let rig = Rig::new();
    let image = stopped(&rig);
    let snapshot = |args: &[&str]| ok(tool("qemu-img").args(["snapshot"]).args(args).arg(&image));
    snapshot(&["-c", "before"]);
    let repair = || {
        ok(tool("qemu-img").args(["check", "-q", "-r", "leaks"]).arg(&image));
        assert!(snapshot(&["-l"]).contains("before"), "qemu-img lists the snapshot");
    };
    let mount = rig.mount([&image]);
    assert_eq!(tracking(&mount), "exact after writes of another program");
    guest_writes(&mount, &[4]);
    let dir = mount.kill();
    let mount = Mount::at(dir, [&image]);
    assert_eq!(tracking(&mount), "exact after a kill");
    guest_writes(&mount, &[5]);
    mount.umount();
    let mount = rig.mount([&image]);
    assert_eq!(tracking(&mount), "exact");
    mount.snap("c2");
    assert_eq!(mount.map_since("c2", "vda", "c1").granules(), [3, 4, 5]);
    let dir = mount.kill();
    ok(tool("fusermount3").args(["-u", "-z"]).arg(&dir));
    repair();
    rig.mount([&image]).umount();
    repair();
    check(&image);
}
