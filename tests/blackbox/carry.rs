//! `fleecefs checkpoint export` and `import`: knowledge of changes that goes to another mount, and to QEMU.

use crate::harness::*;
use serde_json::Value;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

fn touch(mount: &Mount, disk: &str, granules: &[u64]) {
    let guest = mount.guest(disk);
    granules.iter().for_each(|granule| guest.write_all_at(&[0xd1], granule * GRANULE + 777).unwrap());
}

/// Granules of a disk that changed since a checkpoint.
fn since(mount: &Mount, disk: &str, point: &str) -> Vec<u64> {
    mount.snap("look");
    let granules = mount.map_since("look", disk, point).granules();
    mount.done("snapshot cancel", ["look"]);
    granules
}

fn rows(text: &str) -> Vec<Value> {
    serde_json::from_str(text).unwrap()
}

/// Copies images into a directory of their own, under their names.
fn copies(rig: &Rig, images: &[&Path]) -> Vec<PathBuf> {
    let dir = rig.mount_point("copies");
    let copy = |image: &&Path| {
        let to = dir.join(image.file_name().unwrap());
        fs::copy(image, &to).unwrap();
        to
    };
    images.iter().map(copy).collect()
}

#[test]
fn changes_are_known_on_where_the_images_were_copied_to() {
    requires!();
    let rig = Rig::new();
    let images = [rig.image_of("vda", (8 << 20) + 1000), rig.image("vdb", 4)];
    let mount = rig.mount(&images);
    mount.snap("monday");
    mount.drop_snap("monday");
    touch(&mount, "vda", &[3, 7]);
    let out = rig.mount_point("exported");
    refused(&mount.run("checkpoint export", args!["monday", rig.path("x")]), 2, &["vda vdb", "--disk", "directory"]);
    let replies = rows(&mount.done("checkpoint export", args!["monday", &out, "--json"]));
    assert_eq!((&replies[0]["disk"], &replies[0]["dirty"]), (&"vda".into(), &(2 * GRANULE).into()));
    assert_eq!((&replies[1]["disk"], &replies[1]["dirty"]), (&"vdb".into(), &0.into()));
    let one = rig.path("one.qcow2");
    let text = mount.done("checkpoint export", args!["monday", &one, "--disk", "vda"]);
    assert!(text.contains("vda: 128.0 KiB of 8.0 MiB changed since 'monday': exported"), "{text}");
    refused(&mount.run("checkpoint export", args!["monday", &one, "--disk", "vda"]), 2, &["exists", "one.qcow2"]);
    refused(&mount.run("checkpoint export", args!["sunday", rig.path("y")]), 1, &["sunday", "no such checkpoint"]);
    assert_eq!(mount.status()["checkpoints"].as_array().unwrap().len(), 1);
    mount.umount();

    let copies = copies(&rig, &[&images[0], &images[1]]);
    let mount = Mount::at(rig.mount_point("there"), &copies);
    mount.done("checkpoint import", args![&out]);
    touch(&mount, "vda", &[9]);
    assert_eq!(since(&mount, "vda", "monday"), [3, 7, 9]);
    assert_eq!(since(&mount, "vdb", "monday"), [0; 0]);
    refused(&mount.run("checkpoint import", args![&out]), 2, &["monday", "exists", "checkpoint delete"]);
    mount.done("consumer set", ["daily", "monday"]);
    // A guest wrote since the export; a file that is none; a disk that is not there.
    mount.done("consumer delete", ["daily"]);
    mount.done("checkpoint delete", ["monday"]);
    refused(&mount.run("checkpoint import", args![&one]), 1, &["monday", "does not hold", "one.qcow2", "was written"]);
    refused(&mount.run("checkpoint import", args![&images[0]]), 2, &["vda.raw"]);
    refused(&mount.run("checkpoint import", args![&one, "--disk", "vdb"]), 2, &["8389608", "4194304"]);
    refused(&mount.run("checkpoint import", args![&one, "--disk", "vdx"]), 1, &["vdx"]);
    assert_eq!(mount.status()["snapshots"].as_array().unwrap().len(), 0);
    // One that was killed leaves its snapshot.
    let left = format!("import-vda-{}", "0a".repeat(16));
    mount.snap(&left);
    let told = mount.done("status", [""; 0]);
    assert!(told.contains(&format!("snapshot '{left}' is of the import of a checkpoint for disk 'vda'")), "{told}");
    mount.umount();
}

/// What a run that was cut off imported does not keep the next one from the other disks.
#[test]
fn an_import_of_a_directory_goes_on_behind_a_disk_that_is_refused() {
    requires!();
    let rig = Rig::new();
    let images = [rig.image("vda", 4), rig.image("vdb", 4)];
    let mount = rig.mount(&images);
    mount.snap("monday");
    mount.drop_snap("monday");
    touch(&mount, "vdb", &[5]);
    let dir = rig.mount_point("exported");
    mount.done("checkpoint export", args!["monday", &dir]);
    mount.umount();
    let mount = Mount::at(rig.mount_point("there"), copies(&rig, &[&images[0], &images[1]]));
    let text = mount.done("checkpoint import", args![&dir, "--disk", "vda"]);
    assert!(text.contains("vda") && !text.contains("vdb"), "{text}");
    let out = mount.run("checkpoint import", args![&dir]);
    refused(&out, 2, &["monday", "exists"]);
    assert!(stdout(&out).contains("vdb: 64.0 KiB of 4.0 MiB"), "{}", stdout(&out));
    assert_eq!(since(&mount, "vdb", "monday"), [5]);
    let out = mount.run("checkpoint import", args![&dir, "--json"]);
    refused(&out, 2, &["monday", "exists"]);
    assert_eq!(stdout(&out), "");
    mount.umount();
}

/// QEMU takes the bitmap over; and an image goes on under plain QEMU with what was imported.
#[test]
fn qemu_reads_what_was_exported_and_goes_on_with_what_was_imported() {
    requires!("qemu-img", "qemu-io");
    let rig = Rig::new();
    let image = rig.path("vda.qcow2");
    ok(tool("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&image).arg("16M"));
    let mount = rig.mount([&image]);
    touch(&mount, "vda", &[0]);
    mount.snap("monday");
    mount.drop_snap("monday");
    touch(&mount, "vda", &[3, 7]);
    let file = rig.path("monday.qcow2");
    mount.done("checkpoint export", args!["monday", &file]);
    mount.done("checkpoint delete", ["monday"]);
    mount.umount();
    ok(tool("qemu-img").args(["check", "-q", "-f", "qcow2"]).arg(&file));
    let info: Value = serde_json::from_str(&ok(tool("qemu-img").args(["info", "--output=json"]).arg(&file))).unwrap();
    assert_eq!(info["virtual-size"], 16 << 20);
    let listed = info["format-specific"]["data"]["bitmaps"].clone();
    assert_eq!((&listed[0]["name"], &listed[0]["granularity"]), (&"monday".into(), &65536.into()));
    assert_eq!(listed[0]["flags"], serde_json::json!([]), "it does not record");
    // Into a bitmap of the image, by QEMU alone.
    ok(tool("qemu-img")
        .args(["bitmap", "--add", "--merge", "monday", "-F", "qcow2", "-b"])
        .args([&file, &image])
        .arg("q"));
    let mount = rig.mount([&image]);
    let bitmaps = rows(&mount.done("bitmap list", ["vda", "--json"]));
    let merged = bitmaps.iter().find(|row| row["name"] == "q").unwrap();
    assert_eq!(merged["count"], 2 * GRANULE);
    mount.done("checkpoint import", args![&file]);
    mount.umount();
    ok(tool("qemu-io").args(["-f", "qcow2", "-c", "write -q 704512 512"]).arg(&image));
    let mount = rig.mount([&image]);
    assert_eq!(since(&mount, "vda", "monday"), [3, 7, 10]);
    mount.umount();
}

/// A chain of `fleecefs backup` that began on one mount goes on on another, and a live disk there goes back to its points.
#[test]
fn backups_go_on_where_the_checkpoint_of_their_newest_point_was_imported() {
    requires!();
    for format in ["raw", "qcow2"] {
        let rig = Rig::new();
        let image = rig.image("vda", 4);
        let mount = rig.mount([&image]);
        let dir = rig.path("backup");
        let backup = |mount: &Mount, name: &str, more: &str| {
            let mut all = args!["--to", &dir, "--name", name, "--format", format, "--json"];
            all.extend(more.split_whitespace().map(Into::into));
            serde_json::from_str::<Value>(&mount.done("backup", all)).unwrap()["disks"][0].clone()
        };
        backup(&mount, "a", "");
        touch(&mount, "vda", &[3]);
        assert_eq!(backup(&mount, "b", "")["base"]["point"], "a");
        touch(&mount, "vda", &[7]);
        let file = rig.path("b.qcow2");
        mount.done("checkpoint export", args!["b", &file]);
        // It goes on on the first mount too: its points are none of the other's.
        assert_eq!(backup(&mount, "c", "")["changed_bytes"], GRANULE);
        mount.umount();

        let copy = &copies(&rig, &[&image])[0];
        let mount = Mount::at(rig.mount_point("there"), [copy]);
        let out = mount.run("backup", args!["--to", &dir, "--name", "full", "--format", format]);
        refused(&out, 3, &["the checkpoint of no point"]);
        mount.done("checkpoint delete", ["full"]);
        fs::remove_dir_all(dir.join("full")).unwrap();
        mount.done("checkpoint import", args![&file]);
        touch(&mount, "vda", &[9]);
        mount.done("consumer set", ["daily", "b"]);
        let next = backup(&mount, "d", "--consumer daily");
        assert_eq!((&next["base"]["point"], &next["changed_bytes"]), (&"b".into(), &(2 * GRANULE).into()), "{next}");
        touch(&mount, "vda", &[1]);
        let then = fs::read(mount.live("vda")).unwrap();
        let next = backup(&mount, "e", "--consumer daily");
        assert_eq!((&next["base"]["point"], &next["changed_bytes"]), (&"d".into(), &GRANULE.into()), "{next}");
        let restored = |point: &str, target: &Path| {
            let out =
                fleecefs(args!["restore", dir.join(point), "--to", target, "--changed-only", "--verify", "--json"]);
            assert_eq!(out.status.code(), Some(0), "{point}: {}", stderr(&out));
            serde_json::from_str::<Value>(&stdout(&out)).unwrap()
        };
        restored("e", &rig.path("out"));
        assert!(fs::read(rig.path("out")).unwrap() == then, "{format}");
        // What changed since the point of the other mount is known here.
        let report = restored("b", &mount.live("vda"));
        assert!(report["chain_read"].as_u64().unwrap() <= 4 * GRANULE, "{report}");
        restored("b", &rig.path("b.out"));
        assert!(fs::read(rig.path("b.out")).unwrap() == fs::read(mount.live("vda")).unwrap(), "{format}");
        mount.umount();
    }
}
