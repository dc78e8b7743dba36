//! qcow2 images behind the mount.

use crate::harness::*;
use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

const MIB: u64 = 1 << 20;

fn qemu_io(image: &Path, commands: &[&str]) {
    let mut command = tool("qemu-io");
    command.args(["-f", "qcow2"]);
    for text in commands {
        command.args(["-c", text]);
    }
    ok(command.arg(image));
}

/// What QEMU reads from an image.
fn qemu_bytes(rig: &Rig, image: &Path) -> Vec<u8> {
    let raw = rig.path("expected");
    ok(tool("qemu-img").args(["convert", "-f", "qcow2", "-O", "raw"]).args([image, &raw]));
    fs::read(raw).unwrap()
}

/// A raw base, a compressed middle and an overlay of another cluster size, each with data of its own and the latter
/// with an internal snapshot named `before`.
fn chain(rig: &Rig) -> PathBuf {
    let base = rig.image("base", 4);
    let (middle, top) = (rig.path("middle.qcow2"), rig.path("vda.qcow2"));
    let create = |options: &str, below: &str, format: &str, image: &Path, size: &str| {
        let mut command = tool("qemu-img");
        command.args(["create", "-q", "-f", "qcow2", "-o", options, "-b", below, "-F", format]);
        ok(command.arg(image).arg(size));
    };
    create("cluster_size=16384,compression_type=zstd", base.to_str().unwrap(), "raw", &middle, "5M");
    qemu_io(&middle, &["write -q -c -P 5 1M 512K", "write -q -z 2M 300K"]);
    create("extended_l2=on", "middle.qcow2", "qcow2", &top, "7M");
    qemu_io(&top, &["write -q -P 6 100K 3000", "write -q -P 7 6M 64K"]);
    ok(tool("qemu-img").args(["snapshot", "-c", "before"]).arg(&top));
    qemu_io(&top, &["write -q -P 8 3M 200K", "write -q -z 0 10K"]);
    top
}

#[test]
fn a_qcow2_chain_is_served_read_only_as_qemu_reads_it() {
    requires!("qemu-img", "qemu-io");
    let rig = Rig::new();
    let top = chain(&rig);
    let expected = qemu_bytes(&rig, &top);
    let before = ["vda.qcow2", "middle.qcow2", "base.raw"].map(|name| fs::read(rig.path(name)).unwrap());
    let mount = rig.mount(args!["-r", &top]);
    assert_eq!(mount.status()["disks"][0]["format"], "qcow2");
    assert!(fs::read(mount.live("vda")).unwrap() == expected, "live");
    mount.umount();
    let mount = rig.mount(args!["--disk", format!("file={},read-only", top.display())]);
    assert!(fs::read(mount.live("vda")).unwrap() == expected, "live");
    mount.snap("frozen");
    assert!(fs::read(mount.view("frozen", "vda")).unwrap() == expected, "frozen");
    let map = mount.map("frozen", "vda");
    assert_eq!(map.0.iter().map(|e| e.length).sum::<u64>(), 7 * MIB);
    for extent in map.0.iter().filter(|extent| extent.zero) {
        let range = extent.start as usize..(extent.start + extent.length) as usize;
        assert!(expected[range].iter().all(|byte| *byte == 0), "no zeros: {extent:?}");
    }
    let zero_bytes: u64 = map.0.iter().filter(|extent| extent.zero).map(|extent| extent.length).sum();
    assert!(zero_bytes > 2 * MIB, "of 7 MiB QEMU was never given 5 to 6, and half of the base: {zero_bytes}");
    fails(
        fs::OpenOptions::new().write(true).open(mount.live("vda")).and_then(|f| f.write_at(b"x", 0)),
        &[1, 9, 13, 30],
    );
    mount.umount();
    for (name, before) in ["vda.qcow2", "middle.qcow2", "base.raw"].iter().zip(before) {
        assert!(fs::read(rig.path(name)).unwrap() == before, "{name} was changed");
    }
}

#[test]
fn an_internal_snapshot_is_a_disk() {
    requires!("qemu-img", "qemu-io");
    let rig = Rig::new();
    let top = chain(&rig);
    ok(tool("qemu-img").args(["convert", "-l", "before", "-O", "raw"]).args([&top, &rig.path("expected")]));
    let expected = fs::read(rig.path("expected")).unwrap();
    // Without -r: nothing can write to a snapshot anyway.
    let mount = rig.mount(args!["--disk", format!("file={},format=qcow2,snapshot=before", top.display())]);
    assert!(fs::read(mount.live("vda")).unwrap() == expected);
    assert_ne!(expected, qemu_bytes(&rig, &top));
    assert_eq!(mount.status()["disks"][0]["snapshot"], "before");
    let shown = stdout(&mount.run("status", args![]));
    assert!(shown.contains("vda.qcow2 (snapshot before)"), "{shown}");
    assert_eq!(fs::metadata(mount.live("vda")).unwrap().mode() & 0o777, 0o400);
    mount.umount();
    let mnt = rig.mount_point("mnt");
    let wrong = fleecefs(args!["mount", "--disk", format!("file={},snapshot=none", top.display()), &mnt]);
    refused(&wrong, 2, &["internal snapshot 'none'"]);
    let raw = rig.path("base.raw");
    let wrong = fleecefs(args!["mount", "--disk", format!("file={},snapshot=none", raw.display()), &mnt]);
    refused(&wrong, 2, &["raw image has no internal snapshots"]);
}

#[test]
fn a_guest_writes_to_a_qcow2_chain_and_the_view_stays() {
    requires!("qemu-img", "qemu-io");
    let rig = Rig::new();
    let top = chain(&rig);
    let mut content = qemu_bytes(&rig, &top);
    let below = ["middle.qcow2", "base.raw"].map(|name| fs::read(rig.path(name)).unwrap());
    let mount = rig.mount([&top]);
    let guest = mount.guest("vda");
    let mut write = |at: usize, byte: u8, len: usize| {
        guest.write_all_at(&vec![byte; len], at as u64).unwrap();
        content[at..at + len].fill(byte);
    };
    write(1_048_577, 1, 5000);
    write(0, 2, 300);
    mount.snap("frozen");
    let frozen = fs::read(mount.live("vda")).unwrap();
    write(1_050_000, 3, 70_000);
    write(5 << 20, 4, 1 << 20);
    refused(&mount.run("disk resize", args!["vda", "9000001"]), 2, &["9000001", "multiple of 512"]);
    mount.done("disk resize", args!["vda", "9M"]);
    content.resize(9 << 20, 0);
    assert!(fs::read(mount.live("vda")).unwrap() == content);
    assert!(fs::read(mount.view("frozen", "vda")).unwrap() == frozen);
    drop(guest);
    mount.umount();
    ok(tool("qemu-img").args(["check", "-q"]).arg(&top));
    assert!(qemu_bytes(&rig, &top) == content);
    for (name, before) in ["middle.qcow2", "base.raw"].iter().zip(below) {
        assert!(fs::read(rig.path(name)).unwrap() == before, "{name} was changed");
    }
    // As raw it is its own bytes, whatever they are.
    let bytes = fs::read(&top).unwrap();
    let mount = rig.mount(args!["-f", "raw", "-r", &top]);
    assert!(fs::read(mount.live("vda")).unwrap() == bytes);
}

#[test]
fn a_killed_daemon_loses_no_write_to_a_qcow2_image() {
    requires!("qemu-img");
    let rig = Rig::new();
    let image = rig.path("vda.qcow2");
    ok(tool("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&image).arg("16M"));
    let mount = rig.mount([&image]);
    mount.snap("base");
    let guest = mount.guest("vda");
    let data = pattern(3, 3 << 20);
    guest.write_all_at(&data, 777).unwrap();
    drop(guest);
    let mount = Mount::at(mount.kill(), [&image]);
    let live = fs::read(mount.live("vda")).unwrap();
    assert!(live[777..777 + data.len()] == data);
    assert!(fs::read(mount.view("base", "vda")).unwrap().iter().all(|byte| *byte == 0), "the view is kept");
    mount.snap("next");
    let map = mount.map_since("next", "vda", "base");
    let dirty: u64 = map.0.iter().filter(|extent| extent.dirty).map(|extent| extent.length).sum();
    assert!((3 * MIB..3 * MIB + 2 * 65536).contains(&dirty), "the map is exact: {dirty}");
    mount.umount();
    ok(tool("qemu-img").args(["check", "-q"]).arg(&image));
}

#[test]
fn a_guest_cannot_make_its_raw_disk_a_qcow2_image() {
    requires!();
    let rig = Rig::new();
    let image = rig.image("vda", 1);
    let mut sector = pattern(9, 512);
    sector[..4].copy_from_slice(b"QFI\xfb");
    let write = |mount: &Mount| {
        let guest = mount.guest("vda");
        guest.write_all_at(&sector, 0).and_then(|()| guest.sync_all())
    };
    let mount = rig.mount([&image]);
    fails(write(&mount), &[errno::EPERM]);
    mount.guest("vda").write_all_at(&sector, 512).unwrap();
    mount.umount();
    assert_ne!(fs::read(&image).unwrap()[..4], sector[..4]);
    let mount = rig.mount(args!["-f", "raw", &image]);
    write(&mount).unwrap();
    mount.umount();
    assert_eq!(fs::read(&image).unwrap()[..512], sector);
}
