//! Somebody else writes to a file of an image: to itself, its data file, or what it is based on.

use crate::harness::*;
use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// More than the slack by which a clock of files may lag.
const PAST_SLACK: Duration = Duration::from_millis(1200);

/// An image and the files below it that somebody may write to.
fn images(rig: &Rig) -> Vec<(PathBuf, Vec<PathBuf>)> {
    let base = rig.image("base", 4);
    let [middle, top, far, data] = ["middle.qcow2", "top.qcow2", "far.qcow2", "data.raw"].map(|name| rig.path(name));
    let create = |options: &[&str], image: &Path| {
        ok(tool("qemu-img").args(["create", "-q", "-f", "qcow2"]).args(options).arg(image).arg("4M"));
    };
    create(&["-b", base.to_str().unwrap(), "-F", "raw"], &middle);
    create(&["-b", middle.to_str().unwrap(), "-F", "qcow2"], &top);
    create(&["-o", &format!("data_file={}", data.display())], &far);
    vec![(top.clone(), vec![top, middle, base]), (far.clone(), vec![far, data])]
}

/// A byte of a file becomes what it was: no lock is asked, and nothing but its times shows it.
fn touch_bytes(file: &Path) {
    let file = OpenOptions::new().read(true).write(true).open(file).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, 0).unwrap();
    file.write_all_at(&byte, 0).unwrap();
}

fn write(mount: &Mount, disk: &str, granules: &[u64]) {
    let guest = mount.guest(disk);
    for granule in granules {
        guest.write_all_at(&[0xd1; 100], granule * GRANULE + 777).unwrap();
    }
}

fn name(image: &Path) -> &str {
    image.file_stem().unwrap().to_str().unwrap()
}

/// The map since `point` says everything, and the manifest why; or it has these granules.
#[track_caller]
fn map_says(mount: &Mount, disk: &str, snapshot: &str, point: &str, granules: Option<&[u64]>) {
    let map = mount.map_since(snapshot, disk, point);
    match granules {
        Some(granules) => assert_eq!(map.granules(), granules),
        None => {
            assert!(map.all_dirty(), "{map:?}");
            let reason = mount.manifest(snapshot, disk)["full_reason"].as_str().unwrap().to_owned();
            assert!(reason.contains("another program"), "{reason}");
        }
    }
}

#[test]
fn between_two_mounts_a_write_to_any_file_of_an_image_means_everything() {
    requires!("qemu-img");
    let rig = Rig::new();
    for (image, files) in images(&rig) {
        let disk = name(&image);
        let mut mount = rig.mount([&image]);
        write(&mount, disk, &[3]);
        mount.snap("s0");
        mount.drop_snap("s0");
        write(&mount, disk, &[5]);
        for (round, file) in files.iter().map(Some).chain([None]).enumerate() {
            mount.umount();
            file.iter().for_each(|file| touch_bytes(file));
            mount = rig.mount([&image]);
            write(&mount, disk, &[7]);
            let (point, next) = (format!("s{round}"), format!("s{}", round + 1));
            mount.snap(&next);
            // Without a foreign writer it is exact. The last round's interval begins clean.
            map_says(&mount, disk, &next, &point, if file.is_some() { None } else { Some(&[7]) });
            mount.drop_snap(&next);
        }
        mount.umount();
    }
}

#[test]
fn after_a_kill_a_write_to_any_file_of_an_image_means_everything() {
    requires!("qemu-img");
    let rig = Rig::new();
    for (image, files) in images(&rig) {
        let disk = name(&image);
        let mut mount = rig.mount([&image]);
        mount.snap("s0");
        mount.drop_snap("s0");
        for (round, file) in [None].into_iter().chain(files.iter().map(Some)).enumerate() {
            write(&mount, disk, &[3, 5]);
            std::thread::sleep(PAST_SLACK);
            let dir = mount.kill();
            file.iter().for_each(|file| touch_bytes(file));
            // The repair of what the kill left is no foreign write.
            mount = Mount::at(dir, [&image]);
            let (point, next) = (format!("s{round}"), format!("s{}", round + 1));
            mount.snap(&next);
            map_says(&mount, disk, &next, &point, if file.is_some() { None } else { Some(&[3, 5]) });
            mount.drop_snap(&next);
        }
        mount.umount();
    }
}

#[test]
fn while_it_is_served_a_write_to_any_file_of_an_image_breaks_views() {
    requires!("qemu-img");
    let rig = Rig::new();
    for (image, files) in images(&rig) {
        let disk = name(&image);
        let mount = rig.mount([&image]);
        for (round, file) in files.iter().enumerate() {
            let (point, view) = (format!("s{round}"), format!("v{round}"));
            mount.snap(&point);
            mount.drop_snap(&point);
            write(&mount, disk, &[3]);
            mount.snap(&view);
            std::thread::sleep(PAST_SLACK);
            assert!(direct_read(&mount.view(&view, disk), 0).is_ok());
            touch_bytes(file);
            mount.snap("next");
            unreadable(&mount.view(&view, disk), 0);
            assert!(direct_read(&mount.view("next", disk), 0).is_ok());
            map_says(&mount, disk, "next", &view, None);
            mount.drop_snap("next");
            mount.done("checkpoint delete", args!["next"]);
            mount.done("snapshot cancel", args![&view]);
        }
        mount.umount();
    }
}

#[test]
fn a_guest_that_only_writes_is_no_foreign_writer() {
    requires!("qemu-img");
    let rig = Rig::new();
    for (image, _) in images(&rig) {
        let disk = name(&image);
        let mount = rig.mount([&image]);
        mount.snap("s");
        // The image's file grows, is flushed, and the looks for foreign writers come in between.
        for granule in 0..64 {
            write(&mount, disk, &[granule]);
            if granule % 16 == 0 {
                mount.guest(disk).sync_all().unwrap();
                std::thread::sleep(PAST_SLACK);
                mount.snap("look");
                mount.drop_snap("look");
                mount.done("checkpoint delete", args!["look"]);
            }
        }
        assert!(direct_read(&mount.view("s", disk), 0).is_ok(), "the view is whole");
        assert_eq!(mount.run("status", args![]).status.code(), Some(0));
        mount.umount();
        assert!(fs::metadata(&image).is_ok());
    }
}
