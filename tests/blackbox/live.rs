//! The live file behaves as a block device.

use crate::harness::*;
use std::fs::{self, OpenOptions};
use std::io::Read;
use std::os::unix::fs::{FileExt, MetadataExt};

#[test]
fn writes_are_read_back_and_reach_the_image() {
    requires!();
    let rig = Rig::new();
    let image = rig.image("vda", 4);
    let mount = rig.mount([&image]);
    let mut expected = fs::read(&image).unwrap();
    let guest = mount.guest("vda");
    for (offset, length) in
        [(0, 512), (3, 100), (4095, 2), (65535, 65538), (1 << 20, 1 << 20), ((4 << 20) - 1, 1), (2 << 20, 3 << 19)]
    {
        let data = pattern(offset, length);
        guest.write_all_at(&data, offset).unwrap();
        expected[offset as usize..][..length].copy_from_slice(&data);
    }
    guest.sync_all().unwrap();
    guest.sync_data().unwrap();
    assert!(fs::read(mount.live("vda")).unwrap() == expected, "the live file");
    drop(guest);
    mount.umount();
    assert!(fs::read(&image).unwrap() == expected, "the image");
}

#[test]
fn a_write_past_the_end_is_enospc_and_a_read_there_is_empty() {
    requires!();
    let rig = Rig::new();
    let size = (1 << 20) + 100;
    let mount = rig.mount([rig.image_of("vda", size)]);
    let guest = mount.guest("vda");
    fails(guest.write_at(b"x", size), &[errno::ENOSPC]);
    fails(guest.write_at(b"x", size + (1 << 40)), &[errno::ENOSPC]);
    assert_eq!(guest.write_at(&[7; 200], size - 60).unwrap(), 60, "a block device takes what fits");
    let mut buf = [0; 200];
    assert_eq!(guest.read_at(&mut buf, size - 60).unwrap(), 60);
    assert_eq!(buf[..60], [7; 60]);
    assert_eq!(guest.read_at(&mut buf, size).unwrap(), 0);
    assert_eq!(guest.metadata().unwrap().len(), size);
}

#[test]
fn o_trunc_is_ignored() {
    requires!();
    let rig = Rig::new();
    let image = rig.image("vda", 1);
    let mount = rig.mount([&image]);
    let before = fs::read(&image).unwrap();
    drop(OpenOptions::new().write(true).truncate(true).open(mount.live("vda")).unwrap());
    assert_eq!(fs::read(mount.live("vda")).unwrap(), before);
}

#[test]
fn truncate_resizes_and_shrinking_under_a_snapshot_is_busy() {
    requires!();
    let rig = Rig::new();
    let image = rig.image("vda", 1);
    let mount = rig.mount([&image]);
    let guest = mount.guest("vda");
    mount.snap("first");
    mount.drop_snap("first");
    mount.snap("small");
    guest.set_len(2 << 20).unwrap();
    assert_eq!(fs::metadata(mount.live("vda")).unwrap().len(), 2 << 20);
    assert_eq!(fs::metadata(&image).unwrap().len(), 2 << 20);
    guest.write_all_at(&[5; 4096], (2 << 20) - 4096).unwrap();
    fails(guest.set_len(1 << 20), &[errno::EBUSY]);
    assert_eq!(fs::metadata(mount.view("small", "vda")).unwrap().len(), 1 << 20, "the view keeps its size");
    mount.snap("grown");
    let map = mount.map_since("grown", "vda", "small");
    assert_eq!(map.size(), 2 << 20);
    assert_eq!(map.granules(), (16..32).collect::<Vec<_>>(), "what was added counts as changed");
    let reader = fs::File::open(mount.view("grown", "vda")).unwrap();
    mount.drop_snap("small");
    mount.drop_snap("grown");
    // The kernel tells of the last close after the fact.
    let late = std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(100));
        drop(reader);
    });
    guest.set_len(1 << 20).unwrap();
    late.join().unwrap();
    assert_eq!(fs::metadata(&image).unwrap().len(), 1 << 20);
}

#[test]
fn discard_and_write_zeroes_reach_the_image() {
    requires!("xfs_io");
    let rig = Rig::new();
    let image = rig.path("vda.raw");
    fs::write(&image, pattern(1, 4 << 20)).unwrap();
    let mount = rig.mount([&image]);
    let blocks = fs::metadata(&image).unwrap().blocks();
    xfs_io(&mount.live("vda"), "", &["fpunch 1048576 1048576", "fzero 65000 1000"]);
    let mut expected = pattern(1, 4 << 20);
    expected[1 << 20..2 << 20].fill(0);
    expected[65000..66000].fill(0);
    assert!(fs::read(mount.live("vda")).unwrap() == expected);
    assert!(fs::read(&image).unwrap() == expected);
    let after = fs::metadata(&image).unwrap().blocks();
    assert!(after + 2048 <= blocks + 16, "1 MiB was freed: {blocks} before, {after} after");
    assert_eq!(fs::metadata(mount.live("vda")).unwrap().len(), 4 << 20);
}

#[test]
fn direct_io_takes_odd_offsets_and_keeps_neighbours() {
    requires!("xfs_io");
    let rig = Rig::new();
    for cache in ["writeback", "none"] {
        let image = rig.image(cache, 1);
        let mut expected = fs::read(&image).unwrap();
        let mount = rig.mount(args!["--cache", cache, &image]);
        xfs_io(
            &mount.live(cache),
            "-d",
            &["pwrite -S 0xa1 3 100", "pwrite -S 0xa2 4000 200", "pwrite -S 0xa3 131071 8194"],
        );
        expected[3..103].fill(0xa1);
        expected[4000..4200].fill(0xa2);
        expected[131071..139265].fill(0xa3);
        assert!(fs::read(mount.live(cache)).unwrap() == expected, "{cache}");
        mount.umount();
        assert!(fs::read(&image).unwrap() == expected, "{cache}");
    }
}

#[test]
fn disjoint_writers_of_one_block_do_not_lose_each_others_bytes() {
    requires!();
    let rig = Rig::new();
    for cache in ["writeback", "none"] {
        let image = rig.image_of(cache, 65536);
        let mount = rig.mount(args!["--cache", cache, &image]);
        mount.snap("under");
        let guest = mount.guest(cache);
        for round in 1..=sized(50_u8, 250) {
            std::thread::scope(|scope| {
                for writer in 0..8_u64 {
                    let guest = &guest;
                    scope.spawn(move || guest.write_all_at(&[round; 100], writer * 100).unwrap());
                }
            });
            let mut got = [0; 800];
            guest.read_exact_at(&mut got, 0).unwrap();
            assert_eq!(got, [round; 800], "{cache}");
        }
    }
}

#[test]
fn a_store_through_a_shared_mapping_is_frozen_at_msync() {
    requires!("xfs_io");
    let rig = Rig::new();
    let mount = rig.mount([rig.image("vda", 1)]);
    let write = |byte| {
        xfs_io(&mount.live("vda"), "", &["mmap -w 0 65536", &format!("mwrite -S {byte} 4096 100"), "msync -s 0 65536"])
    };
    let byte_of = |path| fs::read(path).unwrap()[4096];
    write("0x5a");
    mount.snap("a");
    write("0x6b");
    assert_eq!(byte_of(mount.view("a", "vda")), 0x5a);
    assert_eq!(byte_of(mount.live("vda")), 0x6b);
    mount.snap("b");
    assert_eq!(byte_of(mount.view("b", "vda")), 0x6b);
    assert_eq!(mount.map_since("b", "vda", "a").granules(), [0]);
}

#[test]
fn mapped_stores_resizes_and_snapshots_do_not_wait_for_each_other_for_ever() {
    requires!("xfs_io", "truncate");
    let rig = Rig::new();
    let mount = rig.mount([rig.image("vda", 1)]);
    let live = mount.live("vda");
    let stop = std::sync::atomic::AtomicBool::new(false);
    let running = || !stop.load(std::sync::atomic::Ordering::Relaxed);
    // Every step is a command under a time limit, so that one that hangs ends the test.
    let rounds = std::thread::scope(|scope| {
        let mapper = scope.spawn(|| {
            let mut commands = vec!["mmap -w 0 1048576"];
            commands.resize(200, "mwrite -S 0x33 0 1048576");
            while running() {
                xfs_io(&live, "", &commands);
            }
        });
        let resizer = scope.spawn(|| {
            for step in (1..).take_while(|_| running()) {
                ok(tool("truncate").args(["-s", &((1 << 20) + step * 4096).to_string()]).arg(&live));
            }
        });
        let snapshots = scope.spawn(|| {
            for round in 0..sized(25, 250) {
                let dir = mount.snapshot_dir(&format!("s{round}"));
                ok(tool("mkdir").arg(&dir));
                ok(tool("rmdir").arg(&dir));
            }
        });
        while !snapshots.is_finished() && !mapper.is_finished() && !resizer.is_finished() {
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        [snapshots.join(), mapper.join(), resizer.join()]
    });
    assert!(rounds.iter().all(Result::is_ok), "a step hung or failed");
}

#[test]
fn read_write_and_mapping_are_coherent() {
    requires!("xfs_io");
    let rig = Rig::new();
    let mount = rig.mount([rig.image("vda", 1)]);
    let guest = mount.guest("vda");
    guest.write_all_at(&[0x11; 4096], 8192).unwrap();
    let seen = xfs_io(&mount.live("vda"), "-r", &["mmap -r 0 65536", "mread -v 8192 16"]);
    assert!(seen.matches("11").count() >= 16, "{seen}");
    let mut second = fs::File::open(mount.live("vda")).unwrap();
    let mut buf = vec![0; 12288];
    second.read_exact(&mut buf).unwrap();
    assert_eq!(buf[8192..], [0x11; 4096]);
}

#[test]
fn a_read_only_mount_writes_nothing() {
    requires!();
    let rig = Rig::new();
    let image = rig.image("vda", 1);
    let before = (fs::read(&image).unwrap(), fs::metadata(&image).unwrap().mtime());
    let mount = rig.mount(args!["-r", &image]);
    let write = OpenOptions::new().write(true).open(mount.live("vda")).and_then(|f| f.write_at(b"x", 0));
    assert!(write.is_err());
    assert!(fs::read(mount.live("vda")).unwrap() == before.0);
    mount.umount();
    assert!((fs::read(&image).unwrap(), fs::metadata(&image).unwrap().mtime()) == before);
}

#[test]
fn disks_come_and_go_and_grow_by_command() {
    requires!();
    let rig = Rig::new();
    let (a, b) = (rig.image("vda", 1), rig.image("vdb", 1));
    let mount = rig.mount([&a]);
    mount.done("disk add", args![format!("data={}", b.display())]);
    assert!(fs::read(mount.live("data")).unwrap() == fs::read(&b).unwrap());
    mount.done("disk resize", args!["data", "2M"]);
    assert_eq!(fs::metadata(mount.live("data")).unwrap().len(), 2 << 20);
    mount.snap("s");
    refused(&mount.run("disk remove", args!["data"]), 2, &["data"]);
    mount.drop_snap("s");
    mount.done("disk remove", args!["data"]);
    fails(fs::metadata(mount.live("data")), &[errno::ENOENT]);
    assert!(mount.live("vda").exists());
}
