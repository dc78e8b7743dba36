//! What survives: a killed daemon leaves views and exact maps, a clean end leaves checkpoints.

use crate::harness::*;
use std::fs;
use std::os::unix::fs::FileExt;

fn touch(mount: &Mount, disk: &str, granules: &[u64]) {
    let guest = mount.guest(disk);
    for granule in granules {
        guest.write_all_at(&[0xd1; 100], granule * GRANULE + 777).unwrap();
    }
}

#[test]
fn views_survive_a_killed_daemon_and_maps_are_exact() {
    requires!();
    let rig = Rig::new();
    let images = [rig.image("vda", 2), rig.image("vdb", 2)];
    let mount = rig.mount(&images);
    mount.snap("base");
    mount.drop_snap("base");
    touch(&mount, "vda", &[1]);
    let frozen = images.each_ref().map(|image| fs::read(image).unwrap());
    mount.snap("a");
    touch(&mount, "vda", &[2, 8]);
    touch(&mount, "vdb", &[30]);
    let live = ["vda", "vdb"].map(|disk| fs::read(mount.live(disk)).unwrap());
    let map = mount.map("a", "vda");

    let mount = Mount::at(mount.kill(), &images);
    for (disk, n) in [("vda", 0), ("vdb", 1)] {
        assert!(fs::read(mount.view("a", disk)).unwrap() == frozen[n], "the view of {disk}");
        assert!(fs::read(mount.live(disk)).unwrap() == live[n], "{disk} itself");
    }
    assert_eq!(mount.map("a", "vda"), map);
    touch(&mount, "vda", &[5]);
    mount.snap("b");
    assert_eq!(mount.map_since("b", "vda", "a").granules(), [2, 5, 8]);
    assert_eq!(mount.map_since("b", "vdb", "a").granules(), [30]);
    assert_eq!(mount.map_since("b", "vda", "base").granules(), [1, 2, 5, 8]);
    assert!(fs::read(mount.view("a", "vda")).unwrap() == frozen[0], "it stays right under new writes");
}

#[test]
fn a_mount_that_recovered_from_a_crash_says_so() {
    requires!();
    let rig = Rig::new();
    let images = [rig.image("vda", 1), rig.image("vdb", 1)];
    let mount = rig.mount(&images);
    touch(&mount, "vda", &[1]);
    let mount = Mount::at(mount.kill(), &images);
    has_problem(&mount, "vda");
    has_problem(&mount, "disk 'vdb': recovered: exact after a kill");
    mount.done("disk remove", args!["vdb"]);
    let problems = mount.status()["problems"].to_string();
    assert!(!problems.contains("vdb") && problems.contains("vda"), "it goes with its disk: {problems}");
    mount.umount();
    let mount = rig.mount(&images);
    assert_eq!(mount.run("status", args![]).status.code(), Some(0), "the next mount is clean");
}

#[test]
fn repeated_kills_lose_nothing() {
    requires!();
    let rig = Rig::new();
    let image = rig.image("vda", 2);
    let before = fs::read(&image).unwrap();
    let mut mount = rig.mount([&image]);
    mount.snap("base");
    for round in 0..5_u64 {
        touch(&mount, "vda", &[round * 3]);
        mount = Mount::at(mount.kill(), [&image]);
    }
    assert!(fs::read(mount.view("base", "vda")).unwrap() == before);
    mount.snap("end");
    assert_eq!(mount.map_since("end", "vda", "base").granules(), [0, 3, 6, 9, 12]);
}

#[test]
fn a_clean_umount_ends_views_and_keeps_checkpoints() {
    requires!();
    let rig = Rig::new();
    let image = rig.image("vda", 2);
    let mount = rig.mount([&image]);
    mount.snap("done");
    mount.drop_snap("done");
    touch(&mount, "vda", &[4]);
    mount.snap("open");
    touch(&mount, "vda", &[6]);
    mount.umount();
    assert_eq!(blocks_below(&rig.path("vda.raw.fleece/layers")), 0, "its store is gone");
    let mount = rig.mount([&image]);
    assert!(!mount.snapshot_dir("open").exists());
    mount.snap("next");
    assert_eq!(mount.map_since("next", "vda", "done").granules(), [4, 6]);
    assert_eq!(mount.map_since("next", "vda", "open").granules(), [6]);
}

#[test]
fn keep_snapshots_keeps_views_over_a_clean_umount() {
    requires!();
    let rig = Rig::new();
    let image = rig.image("vda", 2);
    let before = fs::read(&image).unwrap();
    let mount = rig.mount(args!["--keep-snapshots", &image]);
    mount.snap("a");
    touch(&mount, "vda", &[4]);
    mount.umount();
    let mount = rig.mount(args!["--keep-snapshots", &image]);
    assert!(fs::read(mount.view("a", "vda")).unwrap() == before);
    touch(&mount, "vda", &[5]);
    assert!(fs::read(mount.view("a", "vda")).unwrap() == before);
}

#[test]
fn what_was_released_or_broken_stays_so_after_a_kill() {
    requires!("fallocate");
    let rig = Rig::new();
    let image = rig.path("vda.raw");
    fs::write(&image, pattern(1, 4 << 20)).unwrap();
    let options = || args!["--store-limit", "1M", &image];
    let mount = rig.mount(options());
    mount.snap("a");
    release(&mount.snapshot_dir("a").join("vda/release.raw"), 0, 65536);
    let mount = Mount::at(mount.kill(), options());
    unreadable(&mount.view("a", "vda"), 0);
    assert!(direct_read(&mount.view("a", "vda"), 65536).unwrap() == pattern(1, 4 << 20)[65536..69632]);
    mount.guest("vda").write_all_at(&vec![9; 4 << 20], 0).unwrap();
    unreadable(&mount.view("a", "vda"), 3 << 20);
    let mount = Mount::at(mount.kill(), options());
    unreadable(&mount.view("a", "vda"), 3 << 20);
}

#[test]
fn a_foreign_writer_after_a_kill_means_everything() {
    requires!();
    let rig = Rig::new();
    let image = rig.image("vda", 1);
    let mount = rig.mount([&image]);
    mount.snap("base");
    mount.drop_snap("base");
    touch(&mount, "vda", &[1]);
    let dir = mount.kill();
    // Past the slack within which a change of the image may still be the daemon's own.
    std::thread::sleep(std::time::Duration::from_millis(2500));
    fs::OpenOptions::new().write(true).open(&image).unwrap().write_all_at(b"foreign", 900_000).unwrap();
    let mount = Mount::at(dir, [&image]);
    mount.snap("next");
    assert!(mount.map("next", "vda").all_dirty());
    assert!(mount.manifest("next", "vda")["full_reason"].is_string());
}
