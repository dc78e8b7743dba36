//! `mount`, `umount`, `status`: readiness, exit codes, and what common mistakes are answered with.

use crate::harness::*;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::process::Stdio;

#[test]
fn mount_returns_when_the_mount_answers() {
    requires!();
    let rig = Rig::new();
    let image = rig.image("vda", 4);
    let mount = rig.mount([&image]);
    assert_eq!(fs::read(mount.live("vda")).unwrap(), fs::read(&image).unwrap());
}

#[test]
fn a_disk_is_named_after_its_file_or_as_told() {
    requires!();
    let rig = Rig::new();
    let (a, b, c) = (rig.image("first", 1), rig.image("second", 1), rig.image("third", 1));
    let named = format!("root={}", b.display());
    let long = format!("name=data,file={},format=raw,read-only", c.display());
    let mount = rig.mount(args!["--disk", long, a, named]);
    let mut names: Vec<_> = fs::read_dir(mount.path("live")).unwrap().map(|e| e.unwrap().file_name()).collect();
    names.retain(|name| name.to_string_lossy().ends_with(".raw"));
    names.sort();
    assert_eq!(names, ["data.raw", "first.raw", "root.raw"]);
    let read_only = fs::OpenOptions::new().write(true).open(mount.live("data"));
    let e = read_only.and_then(|f| f.write_at(b"x", 0)).expect_err("a read-only disk was written");
    assert!(matches!(e.raw_os_error(), Some(errno::EROFS | 1 | 9 | 13)), "{e}");
}

#[test]
fn umount_saves_and_the_image_can_be_mounted_again_at_once() {
    requires!();
    let rig = Rig::new();
    let image = rig.image("vda", 2);
    for round in 0..3_u8 {
        let mount = rig.mount([&image]);
        mount.guest("vda").write_all_at(&[round + 1; 512], u64::from(round) * 512).unwrap();
        let pid = mount.pid;
        mount.umount();
        eventually("the end of the daemon", || !alive(pid));
    }
    assert_eq!(fs::read(&image).unwrap()[..1536], [[1; 512], [2; 512], [3; 512]].concat());
}

#[test]
fn fusermount_and_sigterm_end_it_cleanly() {
    requires!("fusermount3");
    let rig = Rig::new();
    let image = rig.image("vda", 2);
    for how in ["fusermount", "sigterm", "sigint"] {
        let mount = rig.mount([&image]);
        let pid = mount.pid;
        mount.snap(how);
        mount.drop_snap(how);
        match how {
            "fusermount" => drop(ok(tool("fusermount3").arg("-u").arg(&mount.dir))),
            "sigterm" => drop(ok(tool("kill").args(["-TERM", &pid.to_string()]))),
            _ => drop(ok(tool("kill").args(["-INT", &pid.to_string()]))),
        }
        eventually("the end of the daemon", || !alive(pid) && !is_mounted(&mount.dir));
    }
    let mount = rig.mount([&image]);
    let status = mount.run("status", args![]);
    assert_eq!(status.status.code(), Some(0), "a clean end is no problem: {}", stdout(&status));
    mount.snap("next");
    assert_eq!(mount.map("next", "vda").granules(), Vec::<u64>::new(), "nothing was written since");
}

#[test]
fn foreground_stays_and_ends_with_0_at_sigterm() {
    requires!();
    let rig = Rig::new();
    let image = rig.image("vda", 1);
    let dir = rig.mount_point("mnt");
    let pidfile = rig.path("pid");
    let mut child = std::process::Command::new(env!("CARGO_BIN_EXE_fleecefs"))
        .args(args!["mount", "--foreground", "--pidfile", &pidfile, &image, &dir])
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    let guard = Mount::of(dir.clone(), child.id());
    eventually("the mount", || dir.join("status.json").exists());
    assert_eq!(guard.status()["pid"], child.id());
    eventually("the pid file", || fs::read_to_string(&pidfile).is_ok_and(|text| text.trim() == child.id().to_string()));
    ok(tool("kill").args(["-TERM", &child.id().to_string()]));
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert!(!is_mounted(&dir));
}

#[test]
fn status_is_0_where_all_is_well_and_prints_json() {
    requires!();
    let rig = Rig::new();
    let mount = rig.mount([rig.image("vda", 1)]);
    let text = mount.done("status", args![]);
    assert!(text.contains("vda"), "{text}");
    assert!(!text.contains('\x1b'), "colour without a terminal: {text:?}");
    let json: serde_json::Value = serde_json::from_str(&mount.done("status", args!["--json"])).unwrap();
    for key in ["version", "pid", "qmp", "disks", "snapshots", "checkpoints", "consumers", "counters"] {
        assert!(!json[key].is_null(), "{key} is missing in {json}");
        assert!(!mount.status()[key].is_null(), "{key} is missing in status.json");
    }
    assert_eq!(json["disks"][0]["name"], "vda");
}

#[test]
fn the_live_file_has_the_mode_that_was_asked_for() {
    requires!();
    let rig = Rig::new();
    let image = rig.image("vda", 1);
    let mount = rig.mount([&image]);
    assert_eq!(fs::metadata(mount.live("vda")).unwrap().permissions().mode() & 0o777, 0o600);
    mount.umount();
    let mount = rig.mount(args!["--mode", "0660", &image]);
    assert_eq!(fs::metadata(mount.live("vda")).unwrap().permissions().mode() & 0o777, 0o660);
}

#[test]
fn the_owner_of_the_files_is_the_one_asked_for() {
    requires!("root");
    let rig = Rig::new();
    let mount = rig.mount(args!["--owner", "65534:65534", rig.image("vda", 1)]);
    let m = fs::metadata(mount.live("vda")).unwrap();
    assert_eq!((m.uid(), m.gid()), (65534, 65534));
}

#[test]
fn a_missing_image_is_named() {
    requires!();
    let rig = Rig::new();
    let (missing, dir) = (rig.path("no-such.raw"), rig.mount_point("mnt"));
    refused(&fleecefs(args!["mount", &missing, &dir]), 2, &["no-such.raw", "No such file"]);
    assert!(!is_mounted(&dir));
}

#[test]
fn a_directory_is_no_image() {
    requires!();
    let rig = Rig::new();
    let (image, dir) = (rig.mount_point("folder"), rig.mount_point("mnt"));
    refused(&fleecefs(args!["mount", image, dir]), 2, &["folder", "directory"]);
}

#[test]
fn a_mount_point_that_is_missing_or_a_file_or_not_empty_is_named() {
    requires!();
    let rig = Rig::new();
    let image = rig.image("vda", 1);
    refused(&fleecefs(args!["mount", &image, rig.path("nowhere")]), 2, &["nowhere"]);
    fs::write(rig.path("file"), "").unwrap();
    refused(&fleecefs(args!["mount", &image, rig.path("file")]), 2, &["file", "directory"]);
    let dir = rig.mount_point("taken");
    fs::write(dir.join("data"), "x").unwrap();
    refused(&fleecefs(args!["mount", &image, &dir]), 2, &["taken", "not empty"]);
    assert_eq!(fs::read_to_string(dir.join("data")).unwrap(), "x");
}

#[test]
fn two_disks_of_one_name_are_refused() {
    requires!();
    let rig = Rig::new();
    fs::create_dir(rig.path("b")).unwrap();
    let (a, b) = (rig.image("vda", 1), rig.image("b/vda", 1));
    refused(&fleecefs(args!["mount", a, b, rig.mount_point("mnt")]), 2, &["vda"]);
}

#[test]
fn a_second_daemon_on_one_image_is_refused() {
    requires!();
    let rig = Rig::new();
    let image = rig.image("vda", 1);
    let mount = rig.mount([&image]);
    refused(&fleecefs(args!["mount", &image, rig.mount_point("second")]), 2, &["vda", "use"]);
    assert!(fs::read(mount.live("vda")).is_ok(), "the first goes on");
}

#[test]
fn bad_usage_is_2() {
    for args in [&[][..], &["no-such-command"], &["mount"], &["status"], &["mount", "--chunk", "5", "a", "b"]] {
        let out = fleecefs(args);
        assert_eq!(out.status.code(), Some(2), "{args:?}: {}", stderr(&out));
        assert!(!out.stderr.is_empty(), "{args:?} fails without a word");
    }
}

#[test]
fn a_command_on_what_is_no_mount_says_so() {
    let rig = Rig::new();
    let dir = rig.mount_point("plain");
    for command in ["status", "snapshot list", "umount"] {
        let mut all: Vec<_> = command.split(' ').map(std::ffi::OsString::from).collect();
        all.push(dir.clone().into());
        let out = fleecefs(&all);
        assert!(matches!(out.status.code(), Some(1 | 2)), "{command}: {:?}", out.status);
        assert!(stderr(&out).contains("plain"), "{command}: {}", stderr(&out));
    }
}

#[test]
fn a_store_directory_that_cannot_be_written_is_named() {
    requires!();
    let rig = Rig::new();
    let image = rig.image("vda", 1);
    fs::write(rig.path("occupied"), "").unwrap();
    for bad in [rig.path("occupied"), "/proc/no-store-here".into()] {
        let out = fleecefs(args!["mount", "--store-dir", &bad, &image, rig.mount_point("mnt")]);
        refused(&out, 2, &[bad.file_name().unwrap().to_str().unwrap()]);
    }
}

#[test]
fn an_image_that_qemu_has_open_is_refused() {
    requires!("qemu-io");
    let rig = Rig::new();
    let image = rig.image("vda", 1);
    let mut qemu =
        tool("qemu-io").args(["-f", "raw"]).arg(&image).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    qemu.stdin.as_mut().unwrap().write_all(b"read 0 512\n").unwrap();
    let mut line = String::new();
    let mut out = BufReader::new(qemu.stdout.take().unwrap());
    while !line.contains("512/512") {
        line.clear();
        assert_ne!(out.read_line(&mut line).unwrap(), 0, "qemu-io ended");
    }
    let refusal = fleecefs(args!["mount", &image, rig.mount_point("mnt")]);
    drop(qemu.stdin.take());
    qemu.wait().unwrap();
    refused(&refusal, 2, &["vda", "use"]);
    rig.mount([&image]).umount();
}

#[test]
fn qemu_refuses_to_write_to_an_image_in_use() {
    requires!("qemu-io", "qemu-img");
    let rig = Rig::new();
    let image = rig.image("vda", 1);
    let mount = rig.mount([&image]);
    let out = tool("qemu-io").args(["-f", "raw", "-c", "write 0 512"]).arg(&image).output().unwrap();
    assert!(!out.status.success() && stderr(&out).contains("lock"), "{}", stderr(&out));
    mount.umount();
    ok(tool("qemu-io").args(["-f", "raw", "-c", "write 0 512"]).arg(&image));
}

#[test]
fn demo_ends_with_0() {
    requires!();
    let rig = Rig::new();
    let out = fleecefs(args!["demo", rig.mount_point("demo")]);
    assert_eq!(out.status.code(), Some(0), "{}{}", stdout(&out), stderr(&out));
    assert!(!stdout(&out).is_empty());
}

#[test]
fn the_cache_of_mapping_tables_may_be_small() {
    requires!("qemu-img");
    let rig = Rig::new();
    let image = rig.path("vda.qcow2");
    // 1024 L2 tables of 64 entries.
    ok(tool("qemu-img").args(["create", "-q", "-f", "qcow2", "-o", "cluster_size=512"]).arg(&image).arg("32M"));
    let data = pattern(1, 32 << 20);
    let disk = |size: &str| format!("file={},l2-cache-size={size}", image.display());
    let mount = rig.mount(args!["--disk", disk("128K")]);
    mount.guest("vda").write_all_at(&data, 0).unwrap();
    assert!(fs::read(mount.live("vda")).unwrap() == data);
    mount.umount();
    let mount = rig.mount(args!["--l2-cache-size", "64G", "-r", &image]);
    assert!(fs::read(mount.live("vda")).unwrap() == data);
    mount.umount();
    for size in ["127K", "65G", "0"] {
        let mnt = rig.mount_point("mnt");
        refused(&fleecefs(args!["mount", "--disk", disk(size), &mnt]), 2, &["l2-cache-size", "not from 128K to 64G"]);
        let out = fleecefs(args!["mount", "--l2-cache-size", size, &image, &mnt]);
        refused(&out, 2, &["l2-cache-size", "not from 128K to 64G"]);
    }
}
