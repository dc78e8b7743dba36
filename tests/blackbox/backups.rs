//! `fleecefs backup` and `fleecefs restore`: chains, what interrupts them, and what they refuse.

use crate::harness::*;
use fleecefs::backup::manifest::{DiskEntry, Manifest};
use fleecefs::backup::save::{Draft, Effort, Settings, Shelf, Watch};
use fleecefs::backup::{MapMeta, MapPoint, MapSource};
use fleecefs::image::Format;
use serde_json::Value;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

/// Overwrites a byte in each granule.
fn touch(mount: &Mount, granules: &[u64]) {
    let guest = mount.guest("vda");
    for granule in granules {
        guest.write_all_at(&[0xd1], granule * GRANULE + 777).unwrap();
    }
}

fn backup(mount: &Mount, dir: &Path, args: &str) -> Output {
    let mut all = args!["--to", dir];
    all.extend(args.split_whitespace().map(Into::into));
    mount.run("backup", all)
}

#[track_caller]
fn backed_up(mount: &Mount, dir: &Path, args: &str, code: i32) -> Value {
    let out = backup(mount, dir, &format!("{args} --json"));
    assert_eq!(out.status.code(), Some(code), "{}{}", stdout(&out), stderr(&out));
    serde_json::from_str(&stdout(&out)).unwrap()
}

fn restore(point: &Path, target: &Path, args: &str) -> Output {
    let mut all = args!["restore", point, "--to", target];
    all.extend(args.split_whitespace().map(Into::into));
    fleecefs(all)
}

#[track_caller]
fn restored(point: &Path, target: &Path, args: &str) -> String {
    let out = restore(point, target, args);
    assert_eq!(out.status.code(), Some(0), "{}{}", stdout(&out), stderr(&out));
    stdout(&out)
}

fn consumer(mount: &Mount, name: &str) -> Option<String> {
    let rows = mount.status()["consumers"].as_array().unwrap().clone();
    rows.iter().find(|row| row["name"] == name).map(|row| row["checkpoint"].as_str().unwrap().to_owned())
}

fn snapshots(mount: &Mount) -> usize {
    mount.status()["snapshots"].as_array().unwrap().len()
}

/// A backup that runs beside the test.
struct Running(Child);

impl Running {
    fn start(mount: &Mount, dir: &Path, args: &str) -> Running {
        let mut command = Command::new(env!("CARGO_BIN_EXE_fleecefs"));
        command.arg("backup").arg(&mount.dir).arg("--to").arg(dir).args(args.split_whitespace());
        Running(command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap())
    }

    fn signal(&self, name: &str) {
        ok(tool("kill").args([format!("-{name}"), self.0.id().to_string()]));
    }

    fn end(self) -> Output {
        self.0.wait_with_output().unwrap()
    }
}

/// Waits until the journal of a partial point has something.
fn until_noted(dir: &Path, point: &str) {
    let journal = dir.join(format!("{point}.partial/vda.done"));
    eventually("a noted range", || fs::metadata(&journal).is_ok_and(|meta| meta.len() > 0));
}

const FORMATS: [&str; 2] = ["raw", "qcow2"];

#[test]
fn a_full_backup_and_increments_are_a_chain_that_restores_each_point() {
    requires!("sha256sum");
    for format in FORMATS {
        let rig = Rig::new();
        let mount = rig.mount([rig.image_of("vda", (4 << 20) + 1000)]);
        let dir = rig.path("backup");
        let mut held = Vec::new();
        for (name, granules) in [("a", vec![]), ("b", vec![3, 9]), ("c", vec![9, 20]), ("d", vec![])] {
            touch(&mount, &granules);
            held.push((name, fs::read(mount.live("vda")).unwrap()));
            let reply = backed_up(&mount, &dir, &format!("--name {name} --format {format}"), 0);
            let disk = &reply["disks"][0];
            if name == "a" {
                assert!(disk["base"].is_null());
            } else {
                assert!(disk["base"]["point"].is_string(), "{reply}");
                assert_eq!(disk["changed_bytes"], granules.len() as u64 * GRANULE, "{reply}");
                assert!(disk["copied_bytes"].as_u64().unwrap() <= granules.len() as u64 * GRANULE, "{reply}");
            }
            assert_eq!(snapshots(&mount), 0, "its snapshot is gone");
            ok(tool("sha256sum").args(["--quiet", "-c", "SHA256SUMS"]).current_dir(dir.join(name)));
        }
        for (name, expected) in &held {
            let target = rig.path(&format!("{name}.out"));
            restored(&dir.join(name), &target, "--verify");
            assert!(fs::read(&target).unwrap() == *expected, "{format}: point {name}");
        }
        // A directory of points is its newest one.
        let target = rig.path("newest.out");
        restored(&dir, &target, "");
        assert!(fs::read(&target).unwrap() == held.last().unwrap().1);
    }
}

#[test]
fn a_consumer_moves_when_the_point_is_whole_and_decides_what_it_builds_on() {
    requires!();
    let rig = Rig::new();
    let mount = rig.mount([rig.image("vda", 4)]);
    let dir = rig.path("backup");
    let first = backed_up(&mount, &dir, "--consumer daily --name a --format raw", 3);
    assert!(first["disks"][0]["full_reason"].as_str().unwrap().contains("daily"), "{first}");
    assert_eq!(consumer(&mount, "daily").as_deref(), Some("a"));
    touch(&mount, &[5]);
    // Without the consumer, it stays; and what it gets next is still all since its own point.
    backed_up(&mount, &dir, "--name b --format raw", 0);
    touch(&mount, &[6]);
    let third = backed_up(&mount, &dir, "--consumer daily --name c --format raw", 0);
    assert_eq!(third["disks"][0]["base"]["point"], "a");
    assert_eq!(third["disks"][0]["changed_bytes"], 2 * GRANULE);
    assert_eq!(consumer(&mount, "daily").as_deref(), Some("c"));
    // Elsewhere nothing is there to build on.
    let elsewhere = backup(&mount, &rig.path("other"), "--consumer daily --name d --format raw");
    refused(&elsewhere, 3, &["'vda'", "full", "daily"]);
    let full = backed_up(&mount, &dir, "--full --name e --format raw", 0);
    assert!(full["disks"][0]["base"].is_null());
}

#[test]
fn a_chain_that_is_not_whole_is_not_built_on_and_not_restored() {
    requires!();
    let rig = Rig::new();
    let mount = rig.mount([rig.image("vda", 4)]);
    let dir = rig.path("backup");
    for name in ["a", "b", "c"] {
        touch(&mount, &[5]);
        backed_up(&mount, &dir, &format!("--name {name} --format raw"), 0);
    }
    let target = rig.path("out");
    fs::rename(dir.join("a/vda.raw"), rig.path("away")).unwrap();
    refused(&restore(&dir.join("c"), &target, ""), 2, &["point 'a'", "vda.raw", "missing"]);
    refused(&backup(&mount, &dir, "--name d --format raw"), 3, &["full", "point 'a'"]);
    // That one stands by itself, and what follows builds on it.
    restored(&dir.join("d"), &target, "");
    let next = backed_up(&mount, &dir, "--name e --format raw", 0);
    assert_eq!(next["disks"][0]["base"]["point"], "d");
    fs::rename(rig.path("away"), dir.join("a/vda.raw")).unwrap();
    restored(&dir.join("c"), &rig.path("out2"), "--verify");

    // A whole point of the chain is gone; another one has its name.
    fs::rename(dir.join("b"), rig.path("b")).unwrap();
    refused(&restore(&dir.join("c"), &rig.path("out3"), ""), 2, &["point 'b'", "'c'", "builds on"]);
    fs::create_dir(dir.join("b")).unwrap();
    for name in ["manifest.json", "vda.raw"] {
        fs::copy(dir.join("d").join(name), dir.join("b").join(name)).unwrap();
    }
    refused(&restore(&dir.join("c"), &rig.path("out3"), ""), 2, &["point 'b'", "another point"]);
    fs::remove_dir_all(dir.join("b")).unwrap();
    fs::rename(rig.path("b"), dir.join("b")).unwrap();

    // A corrupted increment is found by its length, or by its checksum.
    File::options().write(true).open(dir.join("b/vda.raw")).unwrap().write_all_at(&[9], 5 * GRANULE).unwrap();
    refused(&restore(&dir.join("c"), &rig.path("out3"), "--verify"), 2, &["point 'b'", "vda.raw", "checksum"]);
    assert!(!rig.path("out3").exists());
    File::options().write(true).open(dir.join("b/vda.raw")).unwrap().set_len(1 << 20).unwrap();
    refused(&restore(&dir.join("c"), &rig.path("out3"), ""), 2, &["point 'b'", "vda.raw", "bytes"]);
    assert!(!rig.path("out3").exists());
}

#[test]
fn a_point_that_was_renamed_is_not_built_on_and_a_link_to_one_is_followed() {
    requires!();
    let rig = Rig::new();
    let mount = rig.mount([rig.image("vda", 4)]);
    for format in ["raw", "qcow2"] {
        let dir = rig.path(&format!("backup-{format}"));
        let name = |name: &str| format!("--format {format} --name {format}-{name}");
        let at = |name: &str| dir.join(format!("{format}-{name}"));
        backed_up(&mount, &dir, &name("a"), 0);
        touch(&mount, &[1]);
        backed_up(&mount, &dir, &name("b"), 0);
        let link = rig.path(&format!("latest-{format}"));
        std::os::unix::fs::symlink(at("b"), &link).unwrap();
        restored(&link, &rig.path(&format!("{format}-link")), "--verify");
        // A copy is as good as its original, and nothing builds on it.
        fs::create_dir(dir.join("copy")).unwrap();
        for file in fs::read_dir(at("b")).unwrap().map(|file| file.unwrap().path()) {
            fs::copy(&file, dir.join("copy").join(file.file_name().unwrap())).unwrap();
        }
        touch(&mount, &[2]);
        let next = backed_up(&mount, &dir, &name("c"), 0);
        assert_eq!(next["disks"][0]["base"]["point"], format!("{format}-b"));
        // The newest one was renamed: the one before it is built on; then there is none.
        fs::remove_dir_all(dir.join("copy")).unwrap();
        fs::rename(at("c"), dir.join("renamed")).unwrap();
        touch(&mount, &[3]);
        let out = backup(&mount, &dir, &name("d"));
        assert!(out.status.success() && stderr(&out).contains("renamed"), "{}", stderr(&out));
        restored(&at("d"), &rig.path(&format!("{format}-d")), "--verify");
        restored(&dir.join("renamed"), &rig.path(&format!("{format}-c")), "--verify");
        fs::rename(at("a"), dir.join("first")).unwrap();
        touch(&mount, &[4]);
        refused(&backup(&mount, &dir, &name("e")), 3, &["full", "renamed"]);
        restored(&dir, &rig.path(&format!("{format}-e")), "--verify");
        // The newest of which one cannot be read is not the newest.
        fs::write(at("e").join("manifest.json"), "{").unwrap();
        refused(&restore(&dir, &rig.path("none"), ""), 2, &["newest", "manifest.json", "give the directory"]);
        assert!(!rig.path("none").exists());
    }
}

#[test]
fn what_cannot_be_backed_up_is_refused_with_a_word() {
    requires!();
    let rig = Rig::new();
    let (one, two) = (rig.image("vda", 4), rig.image("vdb", 2));
    let mount = rig.mount([&one, &two]);
    let dir = rig.path("backup");
    refused(&backup(&mount, &dir, "--disk vdx"), 2, &["vdx", "no such disk"]);
    refused(&backup(&mount, &dir, "--consumer a/b"), 2, &["consumer", "a/b"]);
    refused(&backup(&mount, &dir, "--name x.partial"), 2, &["x.partial"]);
    refused(&backup(&mount, &dir, "--format raw --compress"), 2, &["compress"]);
    // A consumer of another disk.
    backed_up(&mount, &dir, "--disk vdb --consumer daily --name a --format raw", 3);
    touch(&mount, &[1]);
    let both = backup(&mount, &dir, "--consumer daily --name b --format raw");
    refused(&both, 3, &["'vda'", "full", "daily", "of others"]);
    let manifest: Value = serde_json::from_slice(&fs::read(dir.join("b/manifest.json")).unwrap()).unwrap();
    assert!(manifest["disks"][0]["base"].is_null() && manifest["disks"][1]["base"]["point"] == "a", "{manifest}");
    // Names of points and of checkpoints are taken once.
    refused(&backup(&mount, &dir, "--name b --format raw"), 2, &["'b'", "exists"]);
    mount.snap("s");
    refused(&backup(&mount, &dir, "--name s --format raw"), 2, &["'s'", "exists"]);
    assert!(!dir.join("s.partial").exists());
    // Odd names are names.
    let odd = "Ünter grund: 100% \\ 'x'";
    let mut args = args!["--to", &dir, "--name", odd, "--format", "raw"];
    mount.done("backup", args.clone());
    args[3] = "next".into();
    mount.done("backup", args);
    restored(&dir.join("next"), &rig.path("out"), "--disk vda --verify");
}

#[test]
fn a_restore_refuses_what_it_must_not_write_to() {
    requires!();
    let rig = Rig::new();
    let image = rig.image("vda", 4);
    let mount = rig.mount([&image]);
    let dir = rig.path("backup");
    backed_up(&mount, &dir, "--name a --format raw", 0);
    touch(&mount, &[1]);
    backed_up(&mount, &dir, "--name b --format raw", 0);
    let point = dir.join("b");
    let refuses = |target: &Path, words: &[&str]| refused(&restore(&point, target, ""), 2, words);
    // The source, by any name.
    refuses(&dir.join("b/vda.raw"), &["source"]);
    refuses(&dir.join("a/vda.raw"), &["source"]);
    fs::hard_link(dir.join("a/vda.raw"), rig.path("link")).unwrap();
    refuses(&rig.path("link"), &["source"]);
    // A disk whose image it is.
    let mnt = rig.mount_point("other");
    let other = Mount::at(mnt, args!["vdx=".to_owned() + dir.join("a/vda.raw").to_str().unwrap()]);
    refused(&restore(&dir.join("a"), &other.live("vdx"), "--force"), 2, &["source"]);
    other.umount();
    fs::create_dir(dir.join("c.partial")).unwrap();
    refused(&restore(&dir.join("c.partial"), &rig.path("x"), ""), 2, &["not whole"]);
    refused(&restore(&rig.path("none"), &rig.path("x"), ""), 2, &["none"]);
    refused(&restore(&point, &rig.path("x"), "--disk vdb"), 2, &["vdb"]);
    // In use.
    let guest = mount.guest("vda");
    refuses(&mount.live("vda"), &["in use", "--force"]);
    let link = rig.path("disk.img");
    std::os::unix::fs::symlink(mount.live("vda"), &link).unwrap();
    refuses(&link, &["in use", "--force"]);
    restored(&point, &mount.live("vda"), "--force");
    drop(guest);
    refuses(&image, &["in use"]);
    // Too large for what is there.
    let small = rig.path("small.img");
    File::create(&small).unwrap().set_len(8 << 20).unwrap();
    refuses(&small, &["--force", "8388608"]);
    restored(&point, &small, "--force --verify");
    assert_eq!(fs::metadata(&small).unwrap().len(), 4 << 20);
    // What looks like an image of another format is not written to as one.
    let image = rig.path("image.qcow2");
    fs::copy(dir.join("a/vda.raw"), &image).unwrap();
    File::options().write(true).open(&image).unwrap().write_all_at(b"QFI\xfb\0\0\0\x03", 0).unwrap();
    refuses(&image, &["begins as a qcow2 image", "--force"]);
    restored(&point, &image, "--force --verify");
    refuses(&mount.view("latest", "vda"), &[]);
}

#[test]
fn a_target_that_is_too_small_is_told_before_anything_is_written() {
    requires!("root", "losetup");
    let rig = Rig::new();
    let mount = rig.mount([rig.image("vda", 4)]);
    let dir = rig.path("backup");
    backed_up(&mount, &dir, "--name a --format raw", 0);
    let backing = rig.path("loop.img");
    fs::write(&backing, vec![7; 2 << 20]).unwrap();
    let device = Loop::new(&backing, &[]);
    refused(&restore(&dir.join("a"), &device.0, ""), 2, &["too small", "4194304"]);
    drop(device);
    assert!(fs::read(&backing).unwrap().iter().all(|byte| *byte == 7));
    // One that is large enough takes it, zeros and all; mounted, or claimed by who serves it, it does not.
    fs::write(&backing, vec![7; 6 << 20]).unwrap();
    let device = Loop::new(&backing, &[]);
    refused(&restore(&dir.join("a"), &backing, ""), 2, &["in use", device.0.to_str().unwrap()]);
    restored(&dir.join("a"), &device.0, "--verify");
    let holder = Mount::at(rig.mount_point("holder"), args!["held=".to_owned() + device.0.to_str().unwrap()]);
    refused(&restore(&dir.join("a"), &device.0, ""), 2, &["--force"]);
    holder.umount();
    drop(device);
    let content = fs::read(&backing).unwrap();
    assert!(content[..4 << 20] == fs::read(mount.live("vda")).unwrap());
    assert!(content[4 << 20..].iter().all(|byte| *byte == 7));
}

#[test]
fn only_what_changed_is_written_to_a_live_disk() {
    requires!();
    let rig = Rig::new();
    let image = rig.image("vda", 64);
    let mount = rig.mount([&image]);
    let dir = rig.path("backup");
    let then = fs::read(mount.live("vda")).unwrap();
    backed_up(&mount, &dir, "--name a --format raw", 0);
    let guest = mount.guest("vda");
    guest.write_all_at(&[0xd1; 4096], 40 * GRANULE).unwrap();
    guest.write_all_at(&[0xd2; 8192], 41 * GRANULE).unwrap();
    drop(guest);
    let live = mount.live("vda");
    let dry = restored(&dir, &live, "--changed-only --dry-run");
    assert!(dry.contains("'a'") && dry.contains("live disk"), "{dry}");
    let report: Value = serde_json::from_str(&restored(&dir, &live, "--changed-only --verify --json")).unwrap();
    assert!(report["chain_read"].as_u64().unwrap() <= 2 * GRANULE, "{report}");
    assert!(report["target_read"].as_u64().unwrap() <= 2 * GRANULE, "{report}");
    assert_eq!(report["written"].as_u64().unwrap() + report["zeroed"].as_u64().unwrap(), 4096 + 8192, "{report}");
    assert!(fs::read(&live).unwrap() == then);
    assert_eq!(snapshots(&mount), 0);
    // What it wrote is a change like any other.
    let next = backed_up(&mount, &dir, "--name b --format raw", 0);
    assert_eq!(next["disks"][0]["changed_bytes"], 2 * GRANULE, "{next}");
    // Where the disk does not know the point, all of it is compared.
    mount.done("checkpoint delete", args!["a"]);
    touch(&mount, &[7]);
    let out = restore(&dir.join("a"), &live, "--changed-only --json");
    assert!(out.status.success() && stderr(&out).contains("compared"), "{}", stderr(&out));
    let report: Value = serde_json::from_str(&stdout(&out)).unwrap();
    assert_eq!(report["written"].as_u64().unwrap() + report["zeroed"].as_u64().unwrap(), 4096, "{report}");
    assert!(fs::read(&live).unwrap() == then);
    // A file of before.
    let copy = rig.path("copy.img");
    let mut older = then.clone();
    older[5_000_000] ^= 1;
    fs::write(&copy, &older).unwrap();
    let report: Value = serde_json::from_str(&restored(&dir.join("a"), &copy, "--changed-only --json")).unwrap();
    assert_eq!(report["written"].as_u64().unwrap() + report["zeroed"].as_u64().unwrap(), 4096, "{report}");
    assert!(fs::read(&copy).unwrap() == then);
}

#[test]
fn an_interrupted_backup_goes_on_behind_what_it_had() {
    requires!();
    let cases = [("qcow2", "INT"), ("raw", "KILL"), ("raw", "INT"), ("qcow2", "KILL")];
    for (format, signal) in &cases[..sized(2, 4)] {
        let (format, signal) = (*format, *signal);
        let rig = Rig::new();
        let mount = rig.mount([rig.image("vda", 32)]);
        let dir = rig.path("backup");
        let then = fs::read(mount.live("vda")).unwrap();
        let running = Running::start(&mount, &dir, &format!("--name a --format {format} --rate 4M -p --consumer c"));
        until_noted(&dir, "a");
        running.signal(signal);
        let out = running.end();
        if signal == "INT" {
            assert_eq!(out.status.code(), Some(2));
            for word in ["interrupted", "the same command goes on", "--restart", "snapshot cancel"] {
                assert!(stderr(&out).contains(word), "'{word}' is not in: {}", stderr(&out));
            }
            assert!(stderr(&out).contains("vda: "), "lines of progress: {}", stderr(&out));
        }
        assert!(dir.join("a.partial").exists() && !dir.join("a").exists());
        assert_eq!((snapshots(&mount), consumer(&mount, "c")), (1, None));
        refused(&restore(&dir, &rig.path("x"), ""), 2, &["manifest"]);
        // What the guest does meanwhile is not in it.
        touch(&mount, &[0, 100, 400]);
        let reads = || mount.status()["counters"]["view_read_bytes"].as_u64().unwrap_or_default();
        let before = reads();
        let out = backup(&mount, &dir, &format!("--format {format} --consumer c"));
        assert_eq!(out.status.code(), Some(3), "{}", stderr(&out));
        assert!(stderr(&out).contains("going on"), "{}", stderr(&out));
        assert!(reads() - before < 13 << 20, "it began anew: {}", reads() - before);
        assert_eq!((snapshots(&mount), consumer(&mount, "c").as_deref()), (0, Some("a")));
        restored(&dir.join("a"), &rig.path("out"), "--verify");
        assert!(fs::read(rig.path("out")).unwrap() == then, "{format} {signal}");
        assert!(
            !dir.join("a.partial").exists() && !dir.join("a/vda.done").exists() && !dir.join("a/draft.json").exists()
        );
    }
}

#[test]
fn an_interrupted_backup_is_given_up_when_asked_and_when_its_snapshot_is_gone() {
    requires!();
    let rig = Rig::new();
    let image = rig.image("vda", 16);
    let mount = rig.mount([&image]);
    let dir = rig.path("backup");
    let interrupt = |mount: &Mount, name: &str| {
        touch(mount, &(0..256).collect::<Vec<_>>());
        let running = Running::start(mount, &dir, &format!("--name {name} --format raw --rate 1M"));
        eventually("a partial point", || dir.join(format!("{name}.partial/vda.done")).exists());
        // One backup at a time.
        refused(&backup(mount, &dir, "--name z --format raw"), 2, &["another backup runs"]);
        running.signal("INT");
        assert_eq!(running.end().status.code(), Some(2));
    };
    interrupt(&mount, "a");
    let out = backup(&mount, &dir, "--name b --format raw --restart");
    assert!(out.status.success() && stderr(&out).contains("given up"), "{}", stderr(&out));
    assert!(!dir.join("a.partial").exists() && dir.join("b").exists() && snapshots(&mount) == 0);
    // Other settings begin anew, too.
    interrupt(&mount, "c");
    let out = backup(&mount, &dir, "--name d --format raw --full");
    assert!(out.status.success() && stderr(&out).contains("given up"), "{}", stderr(&out));
    // The point that it builds on goes in between: the next run says so, and begins anew.
    touch(&mount, &[3]);
    backed_up(&mount, &dir, "--name g --format raw", 0);
    interrupt(&mount, "h");
    fs::rename(dir.join("g"), rig.path("g")).unwrap();
    let out = backup(&mount, &dir, "--name h --format raw");
    assert!(out.status.success() && snapshots(&mount) == 0, "{}", stderr(&out));
    for word in ["given up", "'g'", "not there"] {
        assert!(stderr(&out).contains(word), "'{word}' is not in: {}", stderr(&out));
    }
    restored(&dir.join("h"), &rig.path("h"), "--verify");
    interrupt(&mount, "e");
    mount.umount();
    let mount = rig.mount([&image]);
    touch(&mount, &[3]);
    let out = backup(&mount, &dir, "--name f --format raw");
    assert!(out.status.success() && stderr(&out).contains("snapshot is gone"), "{}", stderr(&out));
    assert!(!dir.join("e.partial").exists() && snapshots(&mount) == 0);
    restored(&dir, &rig.path("out"), "");
    assert!(fs::read(rig.path("out")).unwrap() == fs::read(mount.live("vda")).unwrap());
}

#[test]
fn an_interrupted_backup_of_several_disks_is_given_up_when_one_is_gone() {
    requires!();
    for kept in [false, true] {
        let rig = Rig::new();
        let (one, two, other) = (rig.image("vda", 8), rig.image("vdb", 8), rig.image("vdc", 1));
        let options = |images: &[&PathBuf]| {
            let mut all = if kept { args!["--keep-snapshots"] } else { args![] };
            all.extend(images.iter().map(|image| image.as_os_str().to_owned()));
            all
        };
        let mount = rig.mount(options(&[&one, &two]));
        let dir = rig.path("backup");
        let running = Running::start(&mount, &dir, "--name a --format raw --rate 1M");
        until_noted(&dir, "a");
        running.signal("INT");
        assert_eq!(running.end().status.code(), Some(2));
        mount.umount();
        // A mount with none of its disks leaves it alone.
        let mount = rig.mount([&other]);
        backed_up(&mount, &dir, "--name c --format raw", 0);
        assert!(dir.join("a.partial").exists());
        mount.umount();
        let mount = rig.mount(options(&[&one]));
        assert_eq!(snapshots(&mount), usize::from(kept));
        let out = backup(&mount, &dir, "--name b --format raw");
        assert_eq!(out.status.code(), Some(0), "{}", stderr(&out));
        assert!(stderr(&out).contains("'a' is given up: the mount has no disk 'vdb'"), "{}", stderr(&out));
        assert!(!dir.join("a.partial").exists() && snapshots(&mount) == 0);
        restored(&dir.join("b"), &rig.path("out"), "--verify");
    }
}

#[test]
fn a_snapshot_that_a_killed_restore_left_is_told_of_and_cancelled_by_the_next() {
    requires!();
    let rig = Rig::new();
    let mount = rig.mount([rig.image("vda", 4), rig.image("vdb", 4)]);
    let dir = rig.path("backup");
    backed_up(&mount, &dir, "--name a --format raw", 0);
    let left = format!("restore-vda-{}", "0a".repeat(16));
    let theirs = format!("restore-vdb-{}", "0b".repeat(16));
    let users = "restore-vda-mine";
    for name in [&left, &theirs, users] {
        mount.snap(name);
    }
    let told = stderr(&mount.run("snapshot list", [""; 0])) + &stdout(&mount.run("status", [""; 0]));
    for (name, disk) in [(&left, "vda"), (&theirs, "vdb")] {
        let line = format!("snapshot '{name}' is of a restore to disk '{disk}'");
        assert_eq!(told.matches(&line).count(), 2, "{told}");
        assert!(told.contains(&format!("fleecefs snapshot cancel {} {name}", mount.dir.display())), "{told}");
    }
    assert!(!told.contains(&format!("snapshot '{users}'")), "{told}");
    touch(&mount, &[3]);
    let out = restore(&dir.join("a"), &mount.live("vda"), "--disk vda --changed-only --verify");
    assert_eq!(out.status.code(), Some(0), "{}", stderr(&out));
    assert!(stderr(&out).contains(&format!("snapshot '{left}' was left by a restore")), "{}", stderr(&out));
    let names: Vec<_> = mount.status()["snapshots"].as_array().unwrap().iter().map(|row| row["name"].clone()).collect();
    assert_eq!(names, [theirs.as_str(), users]);
}

/// A point as a run makes it that is killed before it completed the snapshot; with `published` false, before it wrote
/// down that the snapshot is there.
fn killed_run(mount: &Mount, dir: &Path, name: &str, published: bool) {
    let settings =
        Settings { disks: vec![], full: false, consumer: Some("c".into()), format: Format::Raw, compression: None };
    let mut manifest = Manifest::new(name);
    manifest.consumer = Some("c".into());
    let shelf = Shelf::open(dir).unwrap();
    manifest.time = jiff::Timestamp::now().to_string();
    let mount_disks = vec![mount.status()["disks"][0]["uuid"].as_str().unwrap().parse().unwrap()];
    let mut partial = shelf.begin(Draft { settings, manifest, mount_disks }).unwrap();
    mount.snap(name);
    if !published {
        return;
    }
    let taken = mount.json(&format!("snapshots/{name}/manifest.json"));
    let uuid = |value: &Value| value.as_str().unwrap().parse().unwrap();
    let size = taken["disks"][0]["size"].as_u64().unwrap();
    let manifest = &mut partial.draft.manifest;
    manifest.snapshot_uuid = uuid(&taken["uuid"]);
    manifest.time = taken["time"].as_str().unwrap().into();
    manifest.disks.push(DiskEntry {
        name: "vda".into(),
        uuid: uuid(&mount.status()["disks"][0]["uuid"]),
        image: "vda.raw".into(),
        size,
        checkpoint_uuid: uuid(&taken["uuid"]),
        base: None,
        full_reason: None,
        format: Format::Raw,
        file: "vda.raw".into(),
        map: None,
        changed_bytes: size,
        zero_bytes: 0,
        copied_bytes: 0,
        skipped: None,
    });
    let point = MapPoint { name: name.into(), uuid: uuid(&taken["uuid"]) };
    let meta = MapMeta {
        disk: "vda".into(),
        disk_uuid: point.uuid,
        image: "vda.raw".into(),
        snapshot: name.into(),
        base: None,
        full_reason: None,
        target: point,
    };
    let map = MapSource::new(&mount.path(&format!("snapshots/{name}/vda.map")), size, true);
    partial.copy_disk(0, &mount.view(name, "vda"), &map, &meta, &Effort { threads: 2, rate: 0 }, &Nobody).unwrap();
    partial.publish(&Nobody).unwrap();
}

struct Nobody;

impl Watch for Nobody {
    fn done(&self, _bytes: u64) {}
    fn check(&self) -> fleecefs::error::Result<()> {
        Ok(())
    }
}

#[test]
fn a_run_that_was_killed_between_two_steps_is_ended_by_the_next_one() {
    requires!();
    let rig = Rig::new();
    let image = rig.image("vda", 4);
    let mount = rig.mount([&image]);
    let dir = rig.path("backup");
    backed_up(&mount, &dir, "--consumer c --name a --format raw", 3);
    // Published, and its snapshot is still there: it is completed, and what follows builds on it.
    killed_run(&mount, &dir, "b", true);
    assert_eq!((consumer(&mount, "c").as_deref(), snapshots(&mount)), (Some("a"), 1));
    touch(&mount, &[4]);
    let next = backed_up(&mount, &dir, "--consumer c --name d --format raw", 0);
    assert_eq!((next["disks"][0]["base"]["point"].as_str(), snapshots(&mount)), (Some("b"), 0));
    assert!(!dir.join("b/draft.json").exists());
    // Published, and the snapshot went with the mount: the consumer stands where it stood, and so does what is built on.
    touch(&mount, &[5]);
    killed_run(&mount, &dir, "e", true);
    mount.umount();
    let mount = rig.mount([&image]);
    touch(&mount, &[6]);
    let next = backed_up(&mount, &dir, "--consumer c --name f --format raw", 0);
    assert_eq!(next["disks"][0]["base"]["point"], "d");
    assert_eq!(next["disks"][0]["changed_bytes"], 2 * GRANULE);
    restored(&dir.join("f"), &rig.path("f.out"), "--verify");
    assert!(fs::read(rig.path("f.out")).unwrap() == fs::read(mount.live("vda")).unwrap());
    restored(&dir.join("e"), &rig.path("e.out"), "--verify");
    // The snapshot was taken, and not written down: it is the one.
    killed_run(&mount, &dir, "g", false);
    let then = fs::read(mount.live("vda")).unwrap();
    touch(&mount, &[7]);
    let out = backup(&mount, &dir, "--consumer c --format raw");
    assert!(out.status.success() && stderr(&out).contains("going on"), "{}", stderr(&out));
    assert_eq!((consumer(&mount, "c").as_deref(), snapshots(&mount)), (Some("g"), 0));
    restored(&dir.join("g"), &rig.path("g.out"), "--verify");
    assert!(fs::read(rig.path("g.out")).unwrap() == then);
    // Killed before the snapshot was taken: one of that name on another mount is not it, nor an older one.
    let mnt = rig.mount_point("other");
    let other = Mount::at(mnt, args!["vdx=".to_owned() + rig.image("x", 1).to_str().unwrap()]);
    killed_run(&mount, &dir, "h", false);
    other.snap("h");
    backed_up(&other, &dir, "--name i --format raw", 0);
    assert_eq!((snapshots(&other), snapshots(&mount), dir.join("h.partial").exists()), (1, 1, true));
    let draft = dir.join("h.partial/draft.json");
    let mut later: Value = serde_json::from_slice(&fs::read(&draft).unwrap()).unwrap();
    later["manifest"]["time"] = "2999-01-01T00:00:00Z".into();
    fs::write(&draft, later.to_string()).unwrap();
    let out = backup(&mount, &dir, "--consumer c --name j --format raw");
    assert!(out.status.success() && !stderr(&out).contains("going on"), "{}", stderr(&out));
    assert_eq!((snapshots(&mount), dir.join("h.partial").exists()), (1, false));
}

#[test]
fn a_backup_goes_on_after_the_daemon_was_killed() {
    requires!();
    let rig = Rig::new();
    let image = rig.image("vda", 16);
    let mount = rig.mount([&image]);
    let dir = rig.path("backup");
    let then = fs::read(mount.live("vda")).unwrap();
    let running = Running::start(&mount, &dir, "--consumer c --name a --rate 2M");
    eventually("a partial point", || dir.join("a.partial/vda.done").exists());
    let dead = mount.kill();
    let out = running.end();
    assert_eq!(out.status.code(), Some(2), "{}", stderr(&out));
    assert!(stderr(&out).contains("the same command goes on"), "{}", stderr(&out));
    let mount = Mount::at(dead, [&image]);
    touch(&mount, &[3]);
    let out = backup(&mount, &dir, "--consumer c");
    assert!(out.status.code() == Some(3) && stderr(&out).contains("going on"), "{}", stderr(&out));
    restored(&dir.join("a"), &rig.path("out"), "--verify");
    assert!(fs::read(rig.path("out")).unwrap() == then);
}

#[test]
fn a_view_that_cannot_be_read_gives_the_point_up() {
    requires!();
    let rig = Rig::new();
    let mount = rig.mount([rig.image("vda", 16)]);
    let dir = rig.path("backup");
    backed_up(&mount, &dir, "--consumer c --name a", 3);
    touch(&mount, &(0..256).collect::<Vec<_>>());
    let running = Running::start(&mount, &dir, "--consumer c --name b --rate 4M");
    eventually("a partial point", || dir.join("b.partial/vda.done").exists());
    mount.done("snapshot release", args!["b", "vda", "15M", "1M"]);
    let out = running.end();
    assert_eq!(out.status.code(), Some(2), "{}", stderr(&out));
    for word in ["'vda'", "given up", "no change is forgotten"] {
        assert!(stderr(&out).contains(word), "'{word}' is not in: {}", stderr(&out));
    }
    assert!(!dir.join("b.partial").exists() && !dir.join("b").exists());
    assert_eq!((consumer(&mount, "c").as_deref(), snapshots(&mount)), (Some("a"), 0));
    let next = backed_up(&mount, &dir, "--consumer c --name d", 0);
    assert_eq!(next["disks"][0]["base"]["point"], "a");
    restored(&dir.join("d"), &rig.path("out"), "--verify");
    assert!(fs::read(rig.path("out")).unwrap() == fs::read(mount.live("vda")).unwrap());
}

#[test]
fn compressed_points_are_small_sound_and_restored() {
    requires!("qemu-img");
    for how in ["zstd", "zlib"] {
        let rig = Rig::new();
        let image = rig.image_of("vda", (8 << 20) + 1000);
        fs::OpenOptions::new()
            .write(true)
            .open(&image)
            .unwrap()
            .write_all_at(&b"text ".repeat(300_000), 1 << 20)
            .unwrap();
        let mount = rig.mount([&image]);
        let plain = rig.path("plain");
        backed_up(&mount, &plain, "--name plain", 0);
        let dir = rig.path("backup");
        backed_up(&mount, &dir, &format!("--name a --compress={how}"), 0);
        mount.guest("vda").write_all_at(&b"words ".repeat(100_000), 5 << 20).unwrap();
        backed_up(&mount, &dir, &format!("--name b --compress={how}"), 0);
        let length = |path: &Path| fs::metadata(path).unwrap().len();
        let (small, large) = (length(&dir.join("a/vda.qcow2")), length(&plain.join("plain/vda.qcow2")));
        assert!(small + (1 << 20) < large, "{small} of {large}");
        for name in ["a", "b"] {
            let file = dir.join(name).join("vda.qcow2");
            ok(tool("qemu-img").args(["check", "-q"]).arg(&file));
            let target = rig.path(name);
            restored(&dir.join(name), &target, "--verify");
            ok(tool("qemu-img").args(["compare", "-q", "-f", "qcow2", "-F", "raw"]).args([&file, &target]));
        }
        assert!(fs::read(rig.path("b")).unwrap() == fs::read(mount.live("vda")).unwrap());
        // An increment is served with its chain.
        let served = Mount::at(rig.mount_point("served"), args!["-r", dir.join("b/vda.qcow2")]);
        assert!(fs::read(served.live("vda")).unwrap()[..(8 << 20) + 1000] == fs::read(mount.live("vda")).unwrap());
        served.umount();
    }
}

/// A disk with two partitions, of 16 and 32 MiB.
fn partitioned(rig: &Rig, name: &str) -> PathBuf {
    let image = rig.image(name, 64);
    partition(&image);
    image
}

fn partition(disk: &Path) {
    let table = "label: gpt\nstart=2048,size=32768\nstart=34816,size=65536\n";
    let mut sh = tool("sh");
    ok(sh.args(["-c", "printf '%s' \"$1\" | sfdisk -q --no-reread --no-tell-kernel \"$2\"", "-", table]).arg(disk));
}

#[test]
fn one_volume_is_restored_and_the_others_are_left_alone() {
    requires!("sfdisk");
    let rig = Rig::new();
    let mount = rig.mount([partitioned(&rig, "vda"), rig.image("vdb", 1)]);
    let dir = rig.path("backup");
    let live = mount.live("vda");
    let then = fs::read(&live).unwrap();
    backed_up(&mount, &dir, "--name a", 0);
    let guest = mount.guest("vda");
    let (first, second) = ((1 << 20)..(17 << 20), (17 << 20)..(49 << 20));
    for at in [first.start as u64 + 5000, second.start as u64, second.end as u64 - 512, 60 << 20] {
        guest.write_all_at(&[0xd1; 512], at).unwrap();
    }
    drop(guest);
    let now = fs::read(&live).unwrap();
    // Into the live disk: only what changed of it is looked at.
    let told = restored(&dir, &live, "--volume p2 --changed-only --dry-run");
    assert!(told.contains("volume p2 of disk vda") && told.contains("32.0 MiB"), "{told}");
    let report: Value =
        serde_json::from_str(&restored(&dir, &live, "--volume p2 --changed-only --verify --json")).unwrap();
    assert_eq!(report["written"].as_u64().unwrap() + report["zeroed"].as_u64().unwrap(), 2 * 4096, "{report}");
    assert!(report["target_read"].as_u64().unwrap() <= 2 * GRANULE, "{report}");
    let mut expected = now.clone();
    expected[second.clone()].copy_from_slice(&then[second.clone()]);
    assert!(fs::read(&live).unwrap() == expected);
    // All of it, and the other one.
    restored(&dir, &live, "--volume p2 --verify");
    assert!(fs::read(&live).unwrap() == expected);
    restored(&dir, &live, "--volume p1");
    expected[first.clone()].copy_from_slice(&then[first.clone()]);
    assert!(fs::read(&live).unwrap() == expected);
    // Into a file.
    restored(&dir, &rig.path("p2.img"), "--volume p2 --disk vda --verify");
    assert!(fs::read(rig.path("p2.img")).unwrap() == then[second]);
    refused(&restore(&dir, &rig.path("x"), "--volume p3"), 2, &["'p3'", "no such volume", "vda/p1"]);
    refused(&restore(&dir, &rig.path("x"), "--volume p2 --disk vdb"), 2, &["'p2'", "no such volume"]);
    // A guest has it open; another table says that it is another volume; one that lies elsewhere has no place.
    let guest = mount.guest("vda");
    refused(&restore(&dir, &live, "--volume p2"), 2, &["in use", "--force"]);
    drop(guest);
    partition(&live);
    refused(&restore(&dir, &live, "--volume p2"), 2, &["another volume", "--force"]);
    refused(&restore(&dir, &mount.live("vdb"), "--volume p2"), 2, &["'p2'", "no such volume"]);
}

#[test]
fn an_interrupted_restore_is_run_again() {
    requires!();
    let rig = Rig::new();
    let mount = rig.mount([rig.image("vda", 256)]);
    let dir = rig.path("backup");
    backed_up(&mount, &dir, "--name a --format raw", 0);
    let target = rig.path("out");
    for code in [2, 0] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_fleecefs"));
        command.arg("restore").arg(&dir).arg("--to").arg(&target).arg("--changed-only");
        let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let running = Running(child);
        if code == 2 {
            eventually("the target", || target.exists());
            running.signal("INT");
        }
        let out = running.end();
        if code == 2 && out.status.success() {
            say("skip: the restore was faster than its interruption");
            return;
        }
        assert_eq!(out.status.code(), Some(code), "{}", stderr(&out));
        assert!(code == 0 || stderr(&out).contains("run the same command again"), "{}", stderr(&out));
    }
    assert!(fs::read(&target).unwrap() == fs::read(mount.live("vda")).unwrap());
}

#[test]
fn a_point_that_cannot_be_published_does_not_move_the_consumer() {
    requires!();
    let rig = Rig::new();
    let mount = rig.mount([rig.image("vda", 16)]);
    let dir = rig.path("backup");
    backed_up(&mount, &dir, "--consumer c --name a --format raw", 3);
    touch(&mount, &(0..64).collect::<Vec<_>>());
    let running = Running::start(&mount, &dir, "--consumer c --name b --format raw --rate 2M");
    eventually("a partial point", || dir.join("b.partial/vda.done").exists());
    fs::create_dir(dir.join("b")).unwrap();
    fs::write(dir.join("b/of somebody"), "").unwrap();
    let out = running.end();
    assert_eq!(out.status.code(), Some(2), "{}", stderr(&out));
    assert_eq!(consumer(&mount, "c").as_deref(), Some("a"));
    fs::remove_dir_all(dir.join("b")).unwrap();
    backed_up(&mount, &dir, "--consumer c --format raw", 0);
    assert_eq!(consumer(&mount, "c").as_deref(), Some("b"));
}

#[test]
fn a_full_target_is_told_and_the_same_command_goes_on_when_there_is_room() {
    requires!("root");
    for format in FORMATS {
        let rig = Rig::new();
        let mount = rig.mount([rig.image("vda", 32)]);
        let small = rig.mount_point("small");
        ok(tool("mount").args(["-t", "tmpfs", "-o", "size=24m", "none"]).arg(&small));
        let _fs = Fs(small.clone());
        let dir = small.join("backup");
        backed_up(&mount, &dir, &format!("--consumer c --name a --format {format}"), 3);
        let filler = small.join("filler");
        fs::write(&filler, vec![1; 7 << 20]).unwrap();
        let guest = mount.guest("vda");
        guest.write_all_at(&pattern(1, 4 << 20), 1 << 20).unwrap();
        drop(guest);
        let out = backup(&mount, &dir, &format!("--consumer c --name b --format {format}"));
        refused(&out, 2, &["no space", "make room"]);
        assert_eq!(consumer(&mount, "c").as_deref(), Some("a"));
        fs::remove_file(&filler).unwrap();
        touch(&mount, &[1, 2]);
        backed_up(&mount, &dir, &format!("--consumer c --format {format}"), 0);
        restored(&dir.join("a"), &rig.path("a.out"), "--verify");
        restored(&dir.join("b"), &rig.path("b.out"), "--verify");
        let b = fs::read(rig.path("b.out")).unwrap();
        assert!(b[1 << 20..5 << 20] == pattern(1, 4 << 20));
        // A restore that does not fit is told before it begins.
        refused(&restore(&dir.join("a"), &small.join("out"), ""), 2, &["no space"]);
        assert!(!small.join("out").exists());
    }
}
