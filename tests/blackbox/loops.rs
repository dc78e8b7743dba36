//! Loop devices over live and frozen files, with real file systems on them.

use crate::harness::*;
use std::fs::{self, File};
use std::path::PathBuf;

/// mkfs on a loop device over the live file, a file, a snapshot, a change; then the frozen file system is read.
fn file_system_round(format: &str, mkfs: &[&str], size_mib: u64, frozen_options: &str) {
    let rig = Rig::new();
    let image: PathBuf = rig.path(&format!("vda.{format}"));
    ok(tool("qemu-img").args(["create", "-q", "-f", format]).arg(&image).arg(format!("{size_mib}M")));
    let mount = rig.mount([&image]);
    let old = pattern(5, 3 << 20);
    {
        let device = Loop::new(&mount.live("vda"), &[]);
        ok(tool(mkfs[0]).args(&mkfs[1..]).arg(&device.0));
        let guest = Fs::mount(&device.0, &rig.path("guest"), "defaults");
        fs::write(guest.0.join("file"), &old).unwrap();
        fs::write(guest.0.join("gone"), &old).unwrap();
        ok(tool("fsfreeze").arg("-f").arg(&guest.0));
        let taken = fs::create_dir(mount.snapshot_dir("a"));
        ok(tool("fsfreeze").arg("-u").arg(&guest.0));
        taken.unwrap();
        fs::write(guest.0.join("file"), pattern(6, 3 << 20)).unwrap();
        fs::remove_file(guest.0.join("gone")).unwrap();
        ok(tool("fstrim").arg(&guest.0));
        ok(&mut tool("sync"));

        let view = Loop::new(&mount.view("a", "vda"), &["-r"]);
        let frozen = Fs::mount(&view.0, &rig.path("frozen"), frozen_options);
        assert!(fs::read(frozen.0.join("file")).unwrap() == old);
        assert!(fs::read(frozen.0.join("gone")).unwrap() == old);
        assert!(fs::read(guest.0.join("file")).unwrap() == pattern(6, 3 << 20));
    }
    mount.umount();
    let raw = rig.path("after.raw");
    ok(tool("qemu-img").args(["convert", "-f", format, "-O", "raw"]).args([&image, &raw]));
    let device = Loop::new(&raw, &[]);
    let after = Fs::mount(&device.0, &rig.path("after"), "defaults");
    assert!(fs::read(after.0.join("file")).unwrap() == pattern(6, 3 << 20), "the image is a good file system");
}

#[test]
fn ext4_over_live_and_frozen_files() {
    requires!("root", "losetup", "mkfs.ext4", "fsfreeze", "fstrim", "qemu-img");
    file_system_round("raw", &["mkfs.ext4", "-q"], 64, "ro,noload");
}

#[test]
fn ext4_over_live_and_frozen_files_of_a_qcow2_image() {
    requires!("root", "losetup", "mkfs.ext4", "fsfreeze", "fstrim", "qemu-img");
    file_system_round("qcow2", &["mkfs.ext4", "-q"], 64, "ro,noload");
}

#[test]
fn xfs_over_live_and_frozen_files() {
    requires!("root", "losetup", "mkfs.xfs", "fsfreeze", "fstrim", "qemu-img");
    file_system_round("raw", &["mkfs.xfs", "-q"], 320, "ro,norecovery,nouuid");
}

#[test]
fn vfat_in_live_and_frozen_files() {
    requires!("mkfs.vfat", "fsck.vfat", "fatlabel");
    let rig = Rig::new();
    let mount = rig.mount([rig.image_of("vda", 16 << 20)]);
    ok(tool("mkfs.vfat").args(["-n", "FIRST"]).arg(mount.live("vda")));
    mount.snap("a");
    ok(tool("mkfs.vfat").args(["-n", "SECOND", "-F", "16"]).arg(mount.live("vda")));
    for (file, label) in [(mount.view("a", "vda"), "FIRST"), (mount.live("vda"), "SECOND")] {
        ok(tool("fsck.vfat").arg("-n").arg(&file));
        assert_eq!(ok(tool("fatlabel").arg(&file)).trim(), label);
    }
}

#[test]
fn losetup_falls_back_to_read_only_on_a_frozen_file() {
    requires!("root", "losetup");
    let rig = Rig::new();
    let mount = rig.mount([rig.image("vda", 1)]);
    mount.snap("a");
    let device = Loop::new(&mount.view("a", "vda"), &[]);
    assert_eq!(ok(tool("losetup").args(["-n", "-O", "RO"]).arg(&device.0)).trim(), "1");
}

#[test]
fn a_crash_consistent_ext4_replays_its_journal() {
    requires!("root", "losetup", "mkfs.ext4", "e2fsck");
    let rig = Rig::new();
    let image: PathBuf = rig.path("vda.raw");
    File::create_new(&image).unwrap().set_len(64 << 20).unwrap();
    let mount = rig.mount([&image]);
    {
        let device = Loop::new(&mount.live("vda"), &[]);
        ok(tool("mkfs.ext4").arg("-q").arg(&device.0));
        let guest = Fs::mount(&device.0, &rig.path("guest"), "defaults");
        let stop = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for n in 0_u64.. {
                    if stop.load(std::sync::atomic::Ordering::Relaxed) {
                        break;
                    }
                    let path = guest.0.join((n % 50).to_string());
                    fs::write(&path, pattern(n, 10_000)).unwrap();
                    File::open(&path).unwrap().sync_all().unwrap();
                }
            });
            for n in 0..4 {
                std::thread::sleep(std::time::Duration::from_millis(200));
                mount.snap(&format!("s{n}"));
            }
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
        });
    }
    for n in 0..4 {
        let copy = rig.path(&format!("copy{n}"));
        ok(tool("cp").arg("--sparse=always").arg(mount.view(&format!("s{n}"), "vda")).arg(&copy));
        let journal = tool("e2fsck").args(["-p"]).arg(&copy).output().unwrap();
        assert!(matches!(journal.status.code(), Some(0 | 1)), "s{n}: {}", stdout(&journal));
        ok(tool("e2fsck").args(["-f", "-n"]).arg(&copy));
    }
}
