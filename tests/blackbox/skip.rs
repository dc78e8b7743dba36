//! Snapshots that leave out swap pages and unused blocks (`--skip swap,free`).

use crate::harness::*;
use crate::volumes::{blank, copy, ext4_is_clean, frozen_volume, hash, live_volume, loop_at, partition, while_writing};
use serde_json::{Value, json};
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

const MIB: u64 = 1 << 20;
/// Start and length of the partitions with ext4 and with swap.
const ROOT: (u64, u64) = (MIB, 96 * MIB);
const SWAP: (u64, u64) = (97 * MIB, 24 * MIB);
/// What a swap area keeps: the page with its label.
const HEADER: usize = 4096;

/// Brings `file` from the base of a view's map up to the view, by the map alone.
fn apply(file: &File, mount: &Mount, snapshot: &str, base: Option<&str>) {
    let map = match base {
        Some(base) => mount.map_since(snapshot, "vda", base),
        None => mount.map(snapshot, "vda"),
    };
    let view = File::open(mount.view(snapshot, "vda")).unwrap();
    for extent in map.0.iter().filter(|extent| extent.dirty) {
        let mut bytes = vec![0; extent.length as usize];
        if !extent.zero {
            view.read_exact_at(&mut bytes, extent.start).unwrap();
        }
        file.write_all_at(&bytes, extent.start).unwrap();
    }
}

/// The kept files of a file system in `image`, whose journal is replayed first.
fn files(image: &Path, rig: &Rig) -> Vec<(String, Vec<u8>)> {
    ext4_is_clean(image);
    let device = loop_at(image, 0, ROOT.1);
    let mounted = Fs::mount(&device.0, &rig.path("look"), "ro");
    kept(&mounted.0)
}

fn kept(root: &Path) -> Vec<(String, Vec<u8>)> {
    let entries = fs::read_dir(root.join("keep")).unwrap().map(|entry| entry.unwrap());
    let mut all: Vec<_> =
        entries.map(|entry| (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap())).collect();
    all.sort();
    all
}

/// Bytes of the disk in a copy that leaves holes where it reads zeros.
fn allocated(file: &Path) -> u64 {
    fs::metadata(file).unwrap().blocks() * 512
}

#[test]
fn a_chain_of_snapshots_that_leave_out_what_nobody_needs() {
    requires!("root", "losetup", "sfdisk", "mkfs.ext4", "e2fsck", "mkswap", "blkid");
    let rig = Rig::new();
    let image = blank(&rig, "vda", 128);
    partition(&image, "label: gpt\nstart=1MiB,size=96MiB,type=L\nstart=97MiB,size=24MiB,type=S\n");
    let mount = rig.mount(args!["--writable-volumes", "--skip", "swap,free", &image]);
    let guest = mount.guest("vda");
    guest.write_all_at(&pattern(1, SWAP.1 as usize), SWAP.0).unwrap();
    ok(tool("mkswap").args(["-q", "-L", "swap0"]).arg(live_volume(&mount, "vda", "p2")));
    ok(tool("mkfs.ext4").args(["-q", "-L", "root"]).arg(live_volume(&mount, "vda", "p1")));
    let label = ok(tool("blkid").args(["-p", "-o", "export"]).arg(live_volume(&mount, "vda", "p2")));
    let device = loop_at(&mount.live("vda"), ROOT.0, ROOT.1);
    let system = Fs::mount(&device.0, &rig.path("guest"), "nodiscard");
    let (keep, junk, busy) = (system.0.join("keep"), system.0.join("junk"), system.0.join("busy"));
    [&keep, &busy].into_iter().for_each(|dir| fs::create_dir(dir).unwrap());
    // Deleted, and still on the disk.
    fs::write(&junk, pattern(2, 60 << 20)).unwrap();
    fs::write(keep.join("first"), pattern(3, 3 << 20)).unwrap();
    ok(&mut tool("sync"));
    fs::remove_file(&junk).unwrap();
    // As long as the journal has a bitmap in which they are in use, a replay might end with that.
    drop(system);
    let system = Fs::mount(&device.0, &rig.path("guest"), "nodiscard");

    let restored = File::create_new(rig.path("restored")).unwrap();
    restored.set_len(128 * MIB).unwrap();
    let mut base: Option<&str> = None;
    let mut sizes = Vec::new();
    let rounds: [(&str, Option<&str>); 5] =
        [("t1", None), ("t2", Some("free")), ("t3", Some("")), ("t4", Some("swap,free")), ("t5", Some(""))];
    for (round, (name, skip)) in rounds.into_iter().enumerate() {
        let there = kept(&system.0);
        let skip: Vec<_> = skip.map(|skip| format!("--skip={skip}")).into_iter().collect();
        while_writing(&[&busy], || drop(mount.done("snapshot create", [vec![name.to_owned()], skip].concat())));
        // Blocks that were left out come into use while the backup is made.
        fs::write(keep.join(name), pattern(round as u64, 5 << 20)).unwrap();
        guest.write_all_at(&pattern(10 + round as u64, MIB as usize), SWAP.0 + MIB).unwrap();
        ok(&mut tool("sync"));

        apply(&restored, &mount, name, base);
        assert_eq!(hash(&rig.path("restored")), hash(&mount.view(name, "vda")), "{name}");
        let root = copy(&frozen_volume(&mount, name, "vda", "p1"), &rig.path(&format!("{name}.p1")));
        let swap = fs::read(frozen_volume(&mount, name, "vda", "p2")).unwrap();
        sizes.push(allocated(&root));
        assert_eq!(files(&root, &rig), there, "{name}");
        let frozen = frozen_volume(&mount, name, "vda", "p2");
        let now = ok(tool("blkid").args(["-p", "-o", "export"]).arg(&frozen));
        assert_eq!(
            now.replace(&frozen.display().to_string(), ""),
            label.replace(&live_volume(&mount, "vda", "p2").display().to_string(), "")
        );
        let told = mount.manifest(name, "vda")["skipped"].clone();
        let shown = mount.done("snapshot show", [name]);
        match name {
            "t1" | "t4" => {
                assert_eq!(told["kinds"], json!(["swap", "free"]), "{told}");
                assert!(told["bytes"].as_u64().unwrap() > SWAP.1 + 40 * MIB, "{told}");
                assert!(shown.contains("swap,free"), "{shown}");
                assert!(swap[HEADER..].iter().all(|byte| *byte == 0));
            }
            "t2" => assert_eq!(told["kinds"], json!(["free"]), "{told}"),
            _ => {
                assert!(told.is_null() && !shown.contains("left out"), "{told} {shown}");
                assert!(swap[HEADER..].iter().any(|byte| *byte != 0));
            }
        }
        mount.done("snapshot complete", [name]);
        base = Some(name);
    }
    assert!(sizes[0] < 20 * MIB && sizes[2] > 60 * MIB, "{sizes:?}");
    let refused_list = mount.run("snapshot create", ["t6", "--skip", "swap,tmp"]);
    assert_eq!(refused_list.status.code(), Some(2), "{}", stderr(&refused_list));
}

/// A kill, and a clean stop that keeps views, change nothing of what a view left out; neither do tools of the user's.
#[test]
fn a_view_that_leaves_something_out_stays_as_it_is() {
    requires!("sfdisk", "mkfs.ext4", "mkswap", "cmp");
    let rig = Rig::new();
    let image = blank(&rig, "vda", 128);
    partition(&image, "label: gpt\nstart=1MiB,size=96MiB,type=L\nstart=97MiB,size=24MiB,type=S\n");
    let options = args!["--writable-volumes", "--keep-snapshots", &image];
    let mount = rig.mount(options.clone());
    mount.guest("vda").write_all_at(&pattern(1, (ROOT.1 + SWAP.1) as usize), ROOT.0).unwrap();
    ok(tool("mkswap").arg("-q").arg(live_volume(&mount, "vda", "p2")));
    ok(tool("mkfs.ext4").args(["-q", "-E", "nodiscard"]).arg(live_volume(&mount, "vda", "p1")));
    mount.done("snapshot create", ["s", "--skip", "swap,free"]);
    mount.done(
        "run",
        args![
            "--consumer",
            "c",
            "--name",
            "r",
            "--skip",
            "swap",
            "--",
            "sh",
            "-c",
            "grep -q '\"kinds\": *\\[' {snapshot}/manifest.json && ! grep -q '\"free\"' {snapshot}/manifest.json"
        ],
    );
    let (first, map) = (rig.path("first"), mount.map("s", "vda"));
    copy(&mount.view("s", "vda"), &first);
    mount.guest("vda").write_all_at(&pattern(7, 64 << 20), 40 * MIB).unwrap();
    ok(tool("cmp").arg(&first).arg(mount.view("s", "vda")));
    let dir = mount.kill();
    let mount = Mount::at(dir, options.clone());
    ok(tool("cmp").arg(&first).arg(mount.view("s", "vda")));
    let dir = mount.path("");
    mount.umount();
    let mount = Mount::at(dir, options);
    ok(tool("cmp").arg(&first).arg(mount.view("s", "vda")));
    assert_eq!(mount.map("s", "vda"), map);
    assert!(allocated(&first) < 20 * MIB, "{}", allocated(&first));
}

/// Points with and without `--skip` in one chain of `fleecefs backup`, in both formats; and a live disk taken back to them.
#[test]
fn backups_restore_to_what_was_left_out_and_what_was_not() {
    requires!("sfdisk", "mkfs.ext4", "mkswap", "e2fsck", "qemu-img");
    let rig = Rig::new();
    let image = blank(&rig, "vda", 64);
    partition(&image, "label: gpt\nstart=1MiB,size=40MiB,type=L\nstart=41MiB,size=16MiB,type=S\n");
    let mount = rig.mount(args!["--writable-volumes", "--skip", "free", &image]);
    let guest = mount.guest("vda");
    guest.write_all_at(&pattern(1, 56 << 20), MIB).unwrap();
    ok(tool("mkswap").arg("-q").arg(live_volume(&mount, "vda", "p2")));
    ok(tool("mkfs.ext4").args(["-q", "-E", "nodiscard"]).arg(live_volume(&mount, "vda", "p1")));
    drop(guest);
    let whole = hash(&mount.live("vda"));
    for format in ["raw", "qcow2"] {
        let to = rig.path(format);
        let points = [("all", "--skip="), ("less", "--skip=swap,free"), ("again", "--skip=")];
        for (name, skip) in points {
            let name = format!("{format}-{name}");
            let out = mount.run("backup", args!["--to", &to, "--format", format, "--name", &name, skip]);
            assert_eq!(out.status.code(), Some(0), "{name}: {}", stderr(&out));
            let point: Value =
                serde_json::from_slice(&fs::read(to.join(&name).join("manifest.json")).unwrap()).unwrap();
            let told = &point["disks"][0]["skipped"];
            if skip == "--skip=" {
                assert!(told.is_null() && !stdout(&out).contains("left out"), "{name}: {told} {}", stdout(&out));
            } else {
                assert_eq!(told["kinds"], json!(["swap", "free"]), "{name}: {point}");
                assert!(told["bytes"].as_u64().unwrap() > 15 * MIB, "{name}: {told}");
                assert!(stdout(&out).contains("left out, which read as zeros (swap,free)"), "{}", stdout(&out));
            }
        }
        let restored = |name: &str| {
            let (from, file) = (to.join(format!("{format}-{name}")), rig.path(&format!("{format}-{name}.img")));
            let out = fleecefs(args!["restore", from, "--to", &file, "--verify", "--json"]);
            assert_eq!(out.status.code(), Some(0), "{name}: {}", stderr(&out));
            // Of the point alone, whatever others of its chain left out.
            let report: Value = serde_json::from_str(&stdout(&out)).unwrap();
            assert_eq!(report["skipped"].as_array().unwrap().len(), usize::from(name == "less"), "{name}: {report}");
            assert_eq!(stderr(&out).contains("left out"), name == "less", "{name}: {}", stderr(&out));
            file
        };
        assert_eq!(hash(&restored("all")), whole, "{format}");
        assert_eq!(hash(&restored("again")), whole, "{format}");
        let less = restored("less");
        assert_ne!(hash(&less), whole);
        let bytes = fs::read(&less).unwrap();
        assert!(bytes[(41 * MIB) as usize + HEADER..(57 * MIB) as usize].iter().all(|byte| *byte == 0));
        fs::write(rig.path("p1"), &bytes[MIB as usize..(41 * MIB) as usize]).unwrap();
        ok(tool("e2fsck").args(["-fn"]).arg(rig.path("p1")));
        for (name, expected) in [("less", hash(&less)), ("all", whole.clone())] {
            let from = to.join(format!("{format}-{name}"));
            let out = fleecefs(args!["restore", from, "--to", mount.live("vda"), "--changed-only"]);
            assert_eq!(out.status.code(), Some(0), "{name}: {}", stderr(&out));
            assert_eq!(hash(&mount.live("vda")), expected, "back to {name}");
        }
    }
}
