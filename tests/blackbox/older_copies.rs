//! An older copy brought up to date: which tools do it, and what those leave behind that do not. `doc/tools.md` has a
//! line for each of these tests; the tools that go by a map are in `map_readers`.

use crate::harness::*;
use crate::increments::{Scene, cp, dd, rsync, untar};
use std::fs;
use std::path::{Path, PathBuf};

/// A full copy of the disk as `base` had it.
fn older_copy(scene: &Scene) -> PathBuf {
    let path = scene.file();
    fs::write(&path, &scene.old).unwrap();
    path
}

/// What did not change is gone from it: zeros.
#[track_caller]
fn lost_the_rest(scene: &Scene, path: &Path) {
    assert!(fs::read(path).unwrap() == scene.increment(), "more or less than the increment");
    let kept = scene.ranges(|e| !e.dirty && !e.zero);
    assert!(kept.iter().any(|range| scene.new[range.clone()].iter().any(|byte| *byte != 0)), "nothing was lost");
}

/// It has old content where the disk has zeros by now; all else is right.
#[track_caller]
fn kept_what_became_zeros(scene: &Scene, got: &[u8]) {
    let mut expected = scene.new.clone();
    for range in scene.ranges(|e| e.dirty) {
        if scene.new[range.clone()].iter().all(|byte| *byte == 0) {
            expected[range.clone()].copy_from_slice(&scene.old[range]);
        }
    }
    assert!(expected != scene.new, "nothing became zeros");
    assert!(got == expected, "other than expected");
}

#[track_caller]
fn is_up_to_date(scene: &Scene, path: &Path) {
    assert!(fs::read(path).unwrap() == scene.new);
}

/// The content of an older copy on a block device, after `write`.
fn on_a_device(scene: &Scene, write: impl FnOnce(&Path)) -> Vec<u8> {
    let file = older_copy(scene);
    let device = Loop::new(&file, &[]);
    write(&device.0);
    drop(device);
    fs::read(file).unwrap()
}

#[test]
fn an_increment_with_its_map_brings_an_older_copy_up_to_date() {
    requires!("fallocate", "ddrescue", "bmaptool", "root", "losetup");
    let scene = Scene::new();
    let (increment, copy) = (scene.file(), older_copy(&scene));
    ok(cp("always").arg(scene.changed()).arg(&increment));
    let map = scene.since("map.ddrescue");
    ok(tool("ddrescue").args(["--force", "--domain-mapfile"]).arg(map).arg(&increment).arg(&copy));
    is_up_to_date(&scene, &copy);
    let got = on_a_device(&scene, |device| {
        let map = scene.since("map.bmap");
        ok(tool("bmaptool").args(["copy", "--bmap"]).arg(map).arg(&increment).arg(device));
    });
    assert!(got == scene.new);
}

#[test]
fn cp_of_changed_raw_over_an_older_copy_loses_what_did_not_change() {
    requires!("fallocate");
    let scene = Scene::new();
    for sparse in ["auto", "always", "never"] {
        let copy = older_copy(&scene);
        ok(cp(sparse).arg(scene.changed()).arg(&copy));
        lost_the_rest(&scene, &copy);
    }
}

#[test]
fn rsync_of_changed_raw_over_an_older_copy_loses_what_did_not_change() {
    requires!("fallocate", "rsync");
    let scene = Scene::new();
    for options in [&["--sparse"][..], &["--inplace"], &["--sparse", "--inplace"]] {
        let copy = older_copy(&scene);
        ok(rsync(options).arg(scene.changed()).arg(&copy));
        lost_the_rest(&scene, &copy);
    }
}

#[test]
fn rsync_that_goes_by_size_and_time_passes_over_a_copy_of_the_same_time() {
    requires!("fallocate", "rsync");
    let scene = Scene::new();
    let copy = older_copy(&scene);
    let time = fs::metadata(scene.view()).unwrap().modified().unwrap();
    fs::File::options().write(true).open(&copy).unwrap().set_modified(time).unwrap();
    ok(tool("rsync").arg(scene.view()).arg(&copy));
    assert!(fs::read(&copy).unwrap() == scene.old);
}

#[test]
fn tar_of_changed_raw_over_an_older_copy_loses_what_did_not_change() {
    requires!("fallocate");
    let scene = Scene::new();
    let (archive, dir) = (scene.file(), scene.changed().parent().unwrap().to_owned());
    ok(tool("tar").arg("-cSf").arg(&archive).arg("-C").arg(dir).arg("changed.raw"));
    let copy = untar(&scene, &archive, "changed.raw");
    fs::write(&copy, &scene.old).unwrap();
    ok(tool("tar").args(["-xS", "--overwrite", "-f"]).arg(&archive).arg("-C").arg(copy.parent().unwrap()));
    lost_the_rest(&scene, &copy);
}

#[test]
fn dd_of_changed_raw_over_an_older_copy_loses_what_did_not_change() {
    requires!("fallocate");
    let scene = Scene::new();
    for conv in ["sparse", "notrunc"] {
        let copy = older_copy(&scene);
        ok(&mut dd(conv, &scene.changed(), &copy));
        lost_the_rest(&scene, &copy);
    }
}

#[test]
fn dd_that_skips_zeros_keeps_old_content_where_the_disk_became_zeros() {
    requires!("fallocate", "root", "losetup");
    let scene = Scene::new();
    for source in [scene.changed(), scene.view()] {
        let copy = older_copy(&scene);
        ok(&mut dd("sparse,notrunc", &source, &copy));
        kept_what_became_zeros(&scene, &fs::read(&copy).unwrap());
        let got = on_a_device(&scene, |device| drop(ok(&mut dd("sparse", &source, device))));
        kept_what_became_zeros(&scene, &got);
    }
}

#[test]
fn bmaptool_onto_a_file_loses_what_did_not_change() {
    requires!("fallocate", "bmaptool");
    let scene = Scene::new();
    for source in [scene.changed(), scene.view()] {
        let copy = older_copy(&scene);
        ok(tool("bmaptool").args(["copy", "--bmap"]).arg(scene.since("map.bmap")).arg(source).arg(&copy));
        lost_the_rest(&scene, &copy);
    }
}

#[test]
fn ddrescue_that_writes_sparsely_keeps_old_content_where_the_disk_became_zeros() {
    requires!("fallocate", "ddrescue");
    let scene = Scene::new();
    let copy = older_copy(&scene);
    let map = scene.since("map.ddrescue");
    ok(tool("ddrescue").args(["--sparse", "--force", "--domain-mapfile"]).arg(map).arg(scene.view()).arg(&copy));
    kept_what_became_zeros(&scene, &fs::read(&copy).unwrap());
}

#[test]
fn ddrescue_with_the_log_of_an_earlier_run_copies_nothing() {
    requires!("fallocate", "ddrescue", "ddrescuelog");
    let scene = Scene::new();
    let (map, log) = (scene.since("map.ddrescue"), scene.file());
    let run = || {
        let copy = older_copy(&scene);
        ok(tool("ddrescue").arg("--domain-mapfile").arg(&map).arg(scene.view()).arg(&copy).arg(&log));
        ok(tool("ddrescuelog").arg("--domain-mapfile").arg(&map).arg("--done-status").arg(&log));
        copy
    };
    is_up_to_date(&scene, &run());
    assert!(fs::read(run()).unwrap() == scene.old, "it was done before");
}

#[test]
fn qemu_img_that_believes_in_a_zeroed_target_keeps_old_content_where_the_disk_became_zeros() {
    requires!("fallocate", "qemu-img");
    let scene = Scene::new();
    let copy = older_copy(&scene);
    let mut convert = tool("qemu-img");
    convert.args(["convert", "-n", "--target-is-zero", "-f", "raw", "-O", "raw"]);
    ok(convert.arg(scene.view()).arg(&copy));
    kept_what_became_zeros(&scene, &fs::read(&copy).unwrap());
}

#[test]
fn full_copies_of_a_view_over_an_older_copy_are_right() {
    requires!("fallocate", "rsync", "qemu-img");
    let scene = Scene::new();
    let over = |command: &mut std::process::Command| {
        let copy = older_copy(&scene);
        ok(command.arg(scene.view()).arg(&copy));
        is_up_to_date(&scene, &copy);
    };
    for sparse in ["auto", "always", "never"] {
        over(&mut cp(sparse));
    }
    for options in [&["--sparse"][..], &["--inplace"], &["--sparse", "--inplace", "--no-whole-file"]] {
        over(&mut rsync(options));
    }
    over(tool("qemu-img").args(["convert", "-n", "-f", "raw", "-O", "raw"]));
    for conv in ["sparse", "notrunc"] {
        let copy = older_copy(&scene);
        ok(&mut dd(conv, &scene.view(), &copy));
        is_up_to_date(&scene, &copy);
    }
}
