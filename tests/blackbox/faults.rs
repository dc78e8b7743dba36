//! What fails below: a store that is full or hangs, an image that cannot be read or written. The guest goes on.

use crate::harness::*;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

/// A small ext4 on a loop device, at `dir`.
fn small_fs(rig: &Rig, mib: u64, dir: &Path) -> Fs {
    let file = rig.path(&unique("fs"));
    File::create_new(&file).unwrap().set_len(mib << 20).unwrap();
    ok(tool("mkfs.ext4").args(["-q", "-F"]).arg(&file));
    Fs::mount(&file, dir, "loop")
}

/// An image full of data.
fn full_image(rig: &Rig, mib: u64) -> std::path::PathBuf {
    let path = rig.path("vda.raw");
    fs::write(&path, pattern(mib, (mib as usize) << 20)).unwrap();
    path
}

/// The guest overwrites the whole disk.
fn overwrite(mount: &Mount, mib: u64) -> std::io::Result<()> {
    let guest = mount.guest("vda");
    (0..mib).try_for_each(|m| guest.write_all_at(&[0x77; 1 << 20], m << 20))?;
    guest.sync_all()
}

#[test]
fn a_store_at_its_limit_breaks_the_view_and_the_guest_goes_on() {
    requires!();
    let rig = Rig::new();
    let mount = rig.mount(args!["--store-limit", "1M", full_image(&rig, 4)]);
    mount.snap("a");
    overwrite(&mount, 4).unwrap();
    assert!(fs::read(mount.live("vda")).unwrap().iter().all(|b| *b == 0x77));
    for offset in [0, 3 << 20] {
        unreadable(&mount.view("a", "vda"), offset);
    }
    has_problem(&mount, "vda");
    mount.drop_snap("a");
    mount.snap("b");
    assert!(fs::read(mount.view("b", "vda")).unwrap().iter().all(|b| *b == 0x77), "the next view is good");
}

#[test]
fn a_full_store_file_system_breaks_the_view_and_the_guest_goes_on() {
    requires!("root", "losetup", "mkfs.ext4");
    let rig = Rig::new();
    let store = small_fs(&rig, 16, &rig.path("store"));
    let mount = rig.mount(args!["--store-dir", &store.0, "--store-limit", "1G", full_image(&rig, 32)]);
    mount.snap("old");
    mount.snap("new");
    overwrite(&mount, 32).unwrap();
    for view in ["old", "new"] {
        unreadable(&mount.view(view, "vda"), 0);
    }
    has_problem(&mount, "vda");
    assert!(fs::read(mount.live("vda")).unwrap().iter().all(|b| *b == 0x77));
    mount.umount();
}

#[test]
fn a_snapshot_that_has_no_room_to_begin_is_refused_at_once() {
    requires!("root", "losetup", "mkfs.ext4");
    let rig = Rig::new();
    let store = small_fs(&rig, 64, &rig.path("store"));
    let mount = rig.mount(args!["--store-dir", &store.0, rig.image("vda", 4)]);
    fails(fs::create_dir(mount.snapshot_dir("a")), &[errno::ENOSPC]);
    refused(&mount.run("snapshot create", args!["a"]), 2, &["--store-limit"]);
    assert!(!mount.snapshot_dir("a").exists());
    assert_eq!(mount.done("checkpoint list", args!["--json"]).trim(), "[]");
    mount.umount();
}

#[test]
fn fail_write_keeps_the_view_and_tells_the_guest() {
    requires!();
    let rig = Rig::new();
    let mount = rig.mount(args!["--store-limit", "1M", "--on-store-error", "fail-write", full_image(&rig, 4)]);
    let before = fs::read(mount.live("vda")).unwrap();
    mount.snap("a");
    fails(overwrite(&mount, 4), &[errno::ENOSPC, errno::EIO]);
    assert!(fs::read(mount.view("a", "vda")).unwrap() == before);
    mount.drop_snap("a");
    overwrite(&mount, 4).unwrap();
}

#[test]
fn a_store_that_hangs_does_not_hang_the_guest() {
    requires!("root", "losetup", "mkfs.ext4", "fsfreeze");
    let rig = Rig::new();
    let store = small_fs(&rig, 64, &rig.path("store"));
    let options = args!["--store-dir", &store.0, "--store-limit", "1G", "--store-timeout", "2", full_image(&rig, 4)];
    let mount = rig.mount(options);
    mount.snap("a");
    ok(tool("fsfreeze").arg("-f").arg(&store.0));
    let mut dd = tool("dd");
    dd.args(["if=/dev/zero", "bs=64K", "count=64", "conv=notrunc,fsync", "status=none"]);
    let wrote = dd.arg(format!("of={}", mount.live("vda").display())).output().unwrap();
    let read = direct_read(&mount.live("vda"), 0);
    ok(tool("fsfreeze").arg("-u").arg(&store.0));
    assert!(wrote.status.success(), "the guest hung: {}", stderr(&wrote));
    assert!(read.unwrap().iter().all(|b| *b == 0));
    unreadable(&mount.view("a", "vda"), 0);
    has_problem(&mount, "vda");
    mount.drop_snap("a");
    mount.umount();
}

#[test]
fn a_sector_of_the_image_that_cannot_be_read_is_eio_there_and_can_be_overwritten() {
    requires!("root", "losetup", "blockdev");
    let rig = Rig::new();
    let file = full_image(&rig, 8);
    let device = Loop::new(&file, &[]);
    // The device's second half has nothing below it any more.
    File::options().write(true).open(&file).unwrap().set_len(4 << 20).unwrap();
    ok(tool("blockdev").arg("--flushbufs").arg(&device.0));
    let named = format!("vda={}", device.0.display());
    let mount = rig.mount(args!["--cache", "none", "--state-dir", rig.path("state"), named]);
    mount.snap("a");
    let bad = 6 << 20;
    unreadable(&mount.live("vda"), bad);
    unreadable(&mount.view("a", "vda"), bad);
    assert!(direct_read(&mount.live("vda"), 0).is_ok());
    let guest = mount.guest("vda");
    guest.write_all_at(&[0x66; 4096], bad).unwrap();
    guest.write_all_at(&[0x55; 4096], 0).unwrap();
    assert!(direct_read(&mount.live("vda"), bad).unwrap().iter().all(|b| *b == 0x66), "the guest healed it");
    unreadable(&mount.view("a", "vda"), bad);
    assert!(
        direct_read(&mount.view("a", "vda"), 0).unwrap() == pattern(8, 8 << 20)[..4096],
        "the view is good elsewhere"
    );
    drop(guest);
    mount.umount();
}

#[test]
fn an_image_without_room_gives_the_guest_enospc_and_nothing_latches() {
    requires!("root", "losetup", "mkfs.ext4");
    let rig = Rig::new();
    let host = small_fs(&rig, 16, &rig.path("host"));
    let image = host.0.join("vda.raw");
    File::create_new(&image).unwrap().set_len(64 << 20).unwrap();
    let mount = rig.mount(args!["--state-dir", rig.path("state"), &image]);
    mount.snap("a");
    fails(overwrite(&mount, 64), &[errno::ENOSPC, errno::EIO]);
    let guest = mount.guest("vda");
    guest.write_all_at(&[1; 4096], 0).unwrap();
    assert!(fs::read(mount.view("a", "vda")).unwrap().iter().all(|b| *b == 0), "the view is good");
    drop(guest);
    mount.umount();
}

#[test]
fn a_state_directory_that_was_removed_is_a_problem_and_the_unmount_says_so() {
    requires!();
    let rig = Rig::new();
    let image = rig.image("vda", 1);
    let mount = rig.mount([&image]);
    mount.snap("a");
    fs::remove_dir_all(image.with_extension("raw.fleece")).unwrap();
    refused(&mount.run("snapshot create", args!["b"]), 2, &["'b'", "not taken"]);
    mount.guest("vda").write_all_at(b"the guest goes on", 0).unwrap();
    has_problem(&mount, "removed");
    refused(&mount.run("umount", args![]), 2, &["vda"]);
}

#[test]
fn an_image_that_was_replaced_is_a_problem_and_the_unmount_says_so() {
    requires!();
    let rig = Rig::new();
    let image = rig.image("vda", 1);
    let mount = rig.mount([&image]);
    let other = rig.image("other", 1);
    fs::rename(&other, &image).unwrap();
    mount.guest("vda").write_all_at(b"the guest goes on", 0).unwrap();
    eventually("the daemon sees it", || {
        mount.status()["problems"].as_array().is_some_and(|problems| !problems.is_empty())
    });
    has_problem(&mount, "replaced");
    refused(&mount.run("umount", args![]), 2, &["replaced"]);
}

#[test]
fn the_manuals_backup_script_does_not_take_a_failed_copy_for_a_good_one() {
    requires!("ddrescue", "ddrescuelog", "sh");
    let rig = Rig::new();
    let mount = rig.mount([full_image(&rig, 4)]);
    let script = format!(
        "set -e; cd {dir}; mnt={mnt}; fleecefs={program}
         $fleecefs snapshot create $mnt \"$1\" --since @daily || [ $? = 3 ]
         [ \"$2\" = whole ] || fallocate -p -o 65536 -l 65536 $mnt/snapshots/\"$1\"/vda/release.raw
         $fleecefs map $mnt \"$1\" vda --output ddrescue > domain || [ $? = 3 ]
         rm -f log
         if ddrescue -q --domain-mapfile=domain $mnt/snapshots/\"$1\"/vda.raw copy log &&
            ddrescuelog --domain-mapfile=domain --done-status log
         then $fleecefs snapshot complete $mnt \"$1\" --consumer daily
         else $fleecefs snapshot cancel $mnt \"$1\"; exit 1
         fi",
        dir = rig.path(".").display(),
        mnt = mount.path(".").display(),
        program = env!("CARGO_BIN_EXE_fleecefs"),
    );
    let run = |name: &str, how: &str| tool("sh").args(["-c", &script, "backup", name, how]).output().unwrap();
    let copied = || fs::read(rig.path("copy")).unwrap() == fs::read(mount.live("vda")).unwrap();
    let first = run("one", "whole");
    assert!(first.status.success() && copied(), "{}", stderr(&first));
    mount.guest("vda").write_all_at(&[1; 200_000], 0).unwrap();
    assert_eq!(run("two", "unreadable").status.code(), Some(1));
    assert_eq!(mount.status()["consumers"][0]["checkpoint"], "one");
    let third = run("three", "whole");
    assert!(third.status.success() && copied(), "{}", stderr(&third));
    assert_eq!(mount.status()["consumers"][0]["checkpoint"], "three");
}
