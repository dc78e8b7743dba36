//! Frozen views: one instant, never changed by the guest, let go when told.

use crate::harness::*;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

#[test]
fn a_view_shows_what_the_disk_held_however_the_guest_changes_it() {
    requires!("xfs_io");
    let rig = Rig::new();
    let image = rig.image_of("vda", (4 << 20) + 1000);
    let mount = rig.mount([&image]);
    let before = fs::read(&image).unwrap();
    mount.snap("a");
    let guest = mount.guest("vda");
    // Whole, left, right and across a boundary; in data and in a hole; the partial end.
    for (offset, length) in
        [(0, 65536), (131072, 100), (262144 - 100, 100), (65536 - 50, 100), (65536 + 8192, 4096), (4 << 20, 1000)]
    {
        guest.write_all_at(&pattern(offset + 7, length), offset).unwrap();
    }
    xfs_io(&mount.live("vda"), "", &["fpunch 393216 65536", "fzero 524288 100"]);
    assert!(fs::read(mount.view("a", "vda")).unwrap() == before);
    let live = fs::read(mount.live("vda")).unwrap();
    assert!(live[..65536 - 50] == pattern(7, 65536)[..65536 - 50] && live[393216..458752].iter().all(|b| *b == 0));
    drop(guest);
    mount.umount();
    assert!(fs::read(&image).unwrap() == live, "the image holds exactly the guest's writes");
}

#[test]
fn a_view_is_frozen_while_the_guest_writes() {
    requires!();
    let rig = Rig::new();
    let image = rig.image("vda", 8);
    let mount = rig.mount([&image]);
    let stop = AtomicBool::new(false);
    let written = std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let guest = mount.guest("vda");
            let mut seed = 1_u64;
            while !stop.load(Relaxed) {
                seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                guest.write_all_at(&pattern(seed, 4096), (seed >> 33) % 2048 * 4096).unwrap();
            }
            seed
        });
        for round in 0..sized(5, 20) {
            let name = format!("s{round}");
            mount.snap(&name);
            let first = fs::read(mount.view(&name, "vda")).unwrap();
            for _ in 0..3 {
                assert!(fs::read(mount.view(&name, "vda")).unwrap() == first, "{name} changed");
                let direct = ok(tool("dd")
                    .args(["bs=1M", "iflag=direct", "status=none"])
                    .arg(format!("if={}", mount.view(&name, "vda").display()))
                    .arg(format!("of={}", rig.path("copy").display())));
                assert!(direct.is_empty() && fs::read(rig.path("copy")).unwrap() == first, "{name} changed");
            }
            mount.drop_snap(&name);
        }
        stop.store(true, Relaxed);
        writer.join().unwrap()
    });
    assert_ne!(written, 1, "the guest wrote");
}

#[test]
fn all_disks_are_frozen_at_one_instant() {
    requires!();
    let rig = Rig::new();
    let disks: Vec<_> = (0..8).map(|n| format!("d{n}")).collect();
    let mount = rig.mount(disks.iter().map(|name| rig.image(name, 1)));
    let stop = AtomicBool::new(false);
    let counter = |file: &File| {
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, 0).unwrap();
        u64::from_le_bytes(bytes)
    };
    let guests: Vec<_> = disks.iter().map(|name| mount.guest(name)).collect();
    guests.iter().for_each(|guest| guest.write_all_at(&0_u64.to_le_bytes(), 0).unwrap());
    let last = std::thread::scope(|scope| {
        // Each number is written to the first disk, then to the second, and so on: at any instant the numbers fall by
        // at most one from the first disk to the last.
        let writer = scope.spawn(|| {
            let mut number = 0_u64;
            while !stop.load(Relaxed) {
                number += 1;
                guests.iter().for_each(|guest| guest.write_all_at(&number.to_le_bytes(), 0).unwrap());
            }
            number
        });
        for round in 0..sized(40, 400) {
            let name = format!("s{round}");
            mount.snap(&name);
            let numbers: Vec<_> =
                disks.iter().map(|disk| counter(&File::open(mount.view(&name, disk)).unwrap())).collect();
            let falls = numbers.windows(2).all(|pair| pair[0] >= pair[1]);
            assert!(falls && numbers[0] <= numbers[7] + 1, "not one instant: {numbers:?}");
            mount.drop_snap(&name);
        }
        stop.store(true, Relaxed);
        writer.join().unwrap()
    });
    assert!(last > 1, "the guest wrote");
}

#[test]
fn a_snapshot_may_be_of_some_disks_only() {
    requires!();
    let rig = Rig::new();
    let mount = rig.mount([rig.image("vda", 1), rig.image("vdb", 1)]);
    mount.done("snapshot create", args!["one", "--disk", "vdb"]);
    assert!(mount.view("one", "vdb").exists());
    assert!(!mount.view("one", "vda").exists());
    refused(&mount.run("snapshot create", args!["two", "--disk", "vdz"]), 1, &["vdz"]);
}

#[test]
fn rmdir_with_open_files_works_as_unlink_does() {
    requires!();
    let rig = Rig::new();
    let image = rig.image("vda", 1);
    let before = fs::read(&image).unwrap();
    let mount = rig.mount([&image]);
    let guest = mount.guest("vda");
    mount.snap("a");
    let open = File::open(mount.view("a", "vda")).unwrap();
    mount.drop_snap("a");
    assert!(!mount.snapshot_dir("a").exists());
    for offset in (0..1 << 20).step_by(65536) {
        guest.write_all_at(&[0xcc; 65536], offset).unwrap();
    }
    mount.snap("b");
    guest.write_all_at(&[0xdd; 65536], 0).unwrap();
    let mut bytes = vec![0; 1 << 20];
    open.read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes == before, "the open view changed after rmdir");
    let mut newer = vec![0; 1 << 20];
    File::open(mount.view("b", "vda")).unwrap().read_exact_at(&mut newer, 0).unwrap();
    assert!(newer.iter().all(|b| *b == 0xcc));
    drop(open);
    mount.drop_snap("b");
}

#[test]
fn the_last_close_after_rmdir_frees_the_store() {
    requires!();
    let rig = Rig::new();
    let image = rig.image("vda", 4);
    let state = rig.path("vda.raw.fleece");
    let mount = rig.mount([&image]);
    mount.snap("a");
    let open = File::open(mount.view("a", "vda")).unwrap();
    let guest = mount.guest("vda");
    for offset in (0..4 << 20).step_by(65536) {
        guest.write_all_at(&[0xcc; 65536], offset).unwrap();
    }
    mount.drop_snap("a");
    assert!(blocks_below(&state.join("layers")) >= 4096, "2 MiB of data were preserved");
    drop(open);
    eventually("the end of the store", || blocks_below(&state.join("layers")) == 0);
}

#[test]
fn dropping_a_newer_view_does_not_harm_an_older_one() {
    requires!();
    let rig = Rig::new();
    let image = rig.image("vda", 1);
    let mount = rig.mount([&image]);
    let guest = mount.guest("vda");
    let mut expected = vec![];
    for round in 0..8_u8 {
        expected.push(fs::read(&image).unwrap());
        mount.snap(&format!("s{round}"));
        for block in (u64::from(round)..256).step_by(3) {
            guest.write_all_at(&[round + 1; 4096], block * 4096).unwrap();
        }
    }
    for gone in [7, 3, 5, 4, 0, 1] {
        mount.drop_snap(&format!("s{gone}"));
        expected[gone].clear();
        guest.write_all_at(&[0xee; 4096], gone as u64 * 4096).unwrap();
        for (round, content) in expected.iter().enumerate().filter(|(_, content)| !content.is_empty()) {
            let view = fs::read(mount.view(&format!("s{round}"), "vda")).unwrap();
            assert!(view == *content, "s{round} changed when s{gone} went");
        }
    }
}

#[test]
fn release_frees_the_store_and_reads_of_it_fail() {
    requires!("fallocate");
    let rig = Rig::new();
    let image = rig.path("vda.raw");
    fs::write(&image, pattern(3, 4 << 20)).unwrap();
    let layers = rig.path("vda.raw.fleece/layers");
    let mount = rig.mount([&image]);
    mount.snap("a");
    let guest = mount.guest("vda");
    guest.write_all_at(&vec![1; 2 << 20], 0).unwrap();
    let full = blocks_below(&layers);
    assert!(full >= 4096, "2 MiB were preserved, {full} blocks taken");

    release(&mount.snapshot_dir("a").join("vda/release.raw"), 0, 1048576);
    eventually("the return of 1 MiB to the store's file system", || blocks_below(&layers) + 2048 <= full + 64);
    let half = blocks_below(&layers);
    let view = mount.view("a", "vda");
    unreadable(&view, 4096);
    for offset in (1_u64 << 20..4 << 20).step_by(1 << 18) {
        let expected = &pattern(3, 4 << 20)[offset as usize..][..4096];
        assert!(direct_read(&view, offset).unwrap() == expected, "{offset} was not released");
    }

    // What is released is not preserved any more: the guest no longer pays for it.
    mount.done("snapshot release", args!["a", "vda", "3M", "1M"]);
    guest.write_all_at(&vec![2; 1 << 20], 3 << 20).unwrap();
    assert!(blocks_below(&layers) <= half + 64);
    unreadable(&view, (3 << 20) + 4096);
}

#[test]
fn an_unaligned_release_takes_whole_chunks_only() {
    requires!("fallocate");
    let rig = Rig::new();
    let image = rig.path("vda.raw");
    fs::write(&image, pattern(4, 1 << 20)).unwrap();
    let mount = rig.mount([&image]);
    mount.snap("a");
    release(&mount.snapshot_dir("a").join("vda/release.raw"), 4095, 8194);
    let view = mount.view("a", "vda");
    assert!(direct_read(&view, 0).unwrap() == pattern(4, 1 << 20)[..4096]);
    unreadable(&view, 4096);
    unreadable(&view, 8192);
    assert!(direct_read(&view, 12288).unwrap() == pattern(4, 1 << 20)[12288..16384]);
}

#[test]
fn release_of_one_view_leaves_the_others() {
    requires!("fallocate");
    let rig = Rig::new();
    let image = rig.image("vda", 1);
    let before = fs::read(&image).unwrap();
    let mount = rig.mount([&image]);
    mount.snap("old");
    mount.snap("new");
    release(&mount.snapshot_dir("new").join("vda/release.raw"), 0, 1048576);
    mount.guest("vda").write_all_at(&vec![1; 1 << 20], 0).unwrap();
    assert!(fs::read(mount.view("old", "vda")).unwrap() == before);
    assert!(fs::read(mount.view("new", "vda")).is_err());
}

#[test]
fn the_release_file_is_for_punching_only() {
    requires!();
    let rig = Rig::new();
    let mount = rig.mount([rig.image("vda", 1)]);
    mount.snap("a");
    let path = mount.snapshot_dir("a").join("vda/release.raw");
    assert_eq!(fs::metadata(&path).unwrap().len(), 1 << 20);
    let write = fs::OpenOptions::new().write(true).open(&path).unwrap().write_at(b"x", 0);
    assert!(write.is_err(), "a write was taken");
    assert!(fs::read(&path).is_err(), "a read was answered");
    assert!(fs::read(mount.view("a", "vda")).is_ok());
}

#[test]
fn snapshot_commands_list_and_show() {
    requires!();
    let rig = Rig::new();
    let mount = rig.mount([rig.image("vda", 1)]);
    mount.done("snapshot create", args!["a"]);
    mount.done("snapshot create", args!["b"]);
    let list: serde_json::Value = serde_json::from_str(&mount.done("snapshot list", args!["--json"])).unwrap();
    let names: Vec<_> = list.as_array().expect("a list").iter().map(|s| s["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["a", "b"]);
    assert!(mount.done("snapshot show", args!["a"]).contains("vda"));
    let unknown = mount.run("snapshot show", args!["zzz"]);
    assert!(matches!(unknown.status.code(), Some(1 | 2)) && stderr(&unknown).contains("zzz"), "{}", stderr(&unknown));
    mount.done("snapshot complete", args!["a"]);
    mount.done("snapshot cancel", args!["b"]);
    assert_eq!(mount.done("snapshot list", args!["--json"]).trim(), "[]");
    let checkpoints = mount.done("checkpoint list", args!["--json"]);
    assert!(checkpoints.contains("\"a\"") && !checkpoints.contains("\"b\""), "{checkpoints}");
}
