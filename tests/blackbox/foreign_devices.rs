//! Images on block devices, where nothing shows who wrote: what is believed of them, by policy, and that nobody else takes
//! them while they are served.

use crate::harness::*;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

const OURS: u64 = 5;

/// Device, the disk's name, and a place for its state.
struct Device {
    rig: Rig,
    device: Loop,
}

impl Device {
    fn raw() -> Device {
        let rig = Rig::new();
        let device = Loop::new(&rig.image("behind", 4), &[]);
        Device { rig, device }
    }

    fn qcow2() -> Device {
        let device = Device::raw();
        let create = ["create", "-q", "-f", "qcow2"];
        ok(tool("qemu-img").args(create).arg(&device.device.0).arg("2M"));
        device
    }

    fn named(&self) -> String {
        format!("vda={}", self.device.0.display())
    }

    #[track_caller]
    fn mount(&self, dir: Option<PathBuf>, options: &[&str]) -> Mount {
        let mut all = args!["--state-dir", self.rig.path("state")];
        all.extend(options.iter().map(Into::into));
        if !options.contains(&"--disk") {
            all.push(self.named().into());
        }
        Mount::at(dir.unwrap_or_else(|| self.rig.mount_point("mnt")), all)
    }
}

fn write(mount: &Mount, seed: u8) {
    mount.guest("vda").write_all_at(&[seed; 100], OURS * GRANULE + 777).unwrap();
}

/// The map since `point`: everything, with this word in manifest and status, or what the guest wrote.
#[track_caller]
fn check(mount: &Mount, point: &str, next: &str, why: Option<&str>) {
    let lost = mount.status()["disks"][0]["tracking_lost"].clone();
    mount.snap(next);
    let map = mount.map_since(next, "vda", point);
    match why {
        Some(why) => {
            assert!(lost["reason"].as_str().is_some_and(|reason| reason.contains(why)), "{lost}");
            assert!(map.all_dirty(), "{map:?}");
            let reason = mount.manifest(next, "vda")["full_reason"].clone();
            assert!(reason.as_str().is_some_and(|reason| reason.contains(why)), "{reason}");
        }
        None => {
            assert!(lost.is_null(), "{lost}");
            assert_eq!(map.granules(), [OURS]);
        }
    }
    mount.drop_snap(next);
    let disk = &mount.status()["disks"][0];
    assert!(disk["tracking_lost"].is_null() && disk["tracking"].as_str().unwrap().starts_with("exact"), "{disk}");
}

#[test]
fn a_block_device_is_not_believed_after_a_stop_unless_it_is_trusted() {
    requires!("root", "losetup", "qemu-img");
    for (device, guards) in [(Device::raw(), vec![]), (Device::qcow2(), vec!["mark"])] {
        let trusted = format!("name=vda,file={},block-devices=trust", device.device.0.display());
        let distrusted = format!("name=vda,file={},block-devices=distrust", device.device.0.display());
        let mut mount = device.mount(None, &[]);
        assert_eq!(mount.status()["disks"][0]["guards"], serde_json::json!(guards));
        mount.snap("s0");
        mount.drop_snap("s0");
        let why = Some("on a block device");
        let rounds: [(&[&str], _); 6] = [
            (&[], why),
            (&["--block-devices", "distrust"], why),
            (&["--block-devices", "trust"], None),
            (&["--disk", &trusted], None),
            (&["--block-devices", "trust", "--disk", &distrusted], why),
            (&["--block-devices", "distrust", "--disk", &trusted], None),
        ];
        let mut serial = 0;
        for (options, why) in rounds {
            for killed in [false, true] {
                serial += 1;
                write(&mount, serial);
                let dir = if killed { mount.kill() } else { umounted(mount) };
                mount = device.mount(Some(dir), options);
                if why.is_some() {
                    has_problem(&mount, "on a block device");
                    assert_eq!(mount.status()["counters"]["tracking_lost"], 1);
                }
                check(&mount, &format!("s{}", serial - 1), &format!("s{serial}"), why);
            }
        }
        mount.umount();
    }
}

fn umounted(mount: Mount) -> PathBuf {
    let dir = mount.dir.clone();
    mount.umount();
    dir
}

/// The reason for the default: this is not to be seen.
#[test]
fn who_writes_to_a_trusted_device_is_not_seen() {
    requires!("root", "losetup");
    let device = Device::raw();
    let trust = ["--block-devices", "trust"];
    let mut mount = device.mount(None, &trust);
    mount.snap("s0");
    mount.drop_snap("s0");
    for (round, killed) in [false, true].into_iter().enumerate() {
        write(&mount, round as u8 + 1);
        let dir = if killed { mount.kill() } else { umounted(mount) };
        dd(&device.device.0);
        mount = device.mount(Some(dir), &trust);
        check(&mount, &format!("s{round}"), &format!("s{}", round + 1), None);
    }
    // While it is served neither; but the view is what it was where nobody wrote.
    dd(&device.device.0);
    mount.snap("last");
    assert!(mount.run("status", args![]).status.code() == Some(1), "the kill is still to be seen");
    mount.drop_snap("last");
    mount.umount();
}

fn dd(device: &Path) {
    let to = format!("of={}", device.display());
    ok(tool("dd").args(["if=/dev/urandom", &to, "bs=64K", "count=1", "seek=8", "conv=notrunc,fsync", "status=none"]));
}

#[test]
fn a_qcow2_image_over_or_with_its_data_on_a_device_is_not_believed_either() {
    requires!("root", "losetup", "qemu-img");
    let device = Device::raw();
    let path = device.device.0.to_str().unwrap();
    let over = device.rig.path("over.qcow2");
    ok(tool("qemu-img").args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b", path]).arg(&over));
    let beside = device.rig.path("beside.qcow2");
    let data = format!("data_file={path}");
    ok(tool("qemu-img").args(["create", "-q", "-f", "qcow2", "-o", &data]).arg(&beside).arg("4M"));
    for image in [&over, &beside] {
        let named = format!("vda={}", image.display());
        let mut mount = device.rig.mount([&named]);
        assert_eq!(mount.status()["disks"][0]["guards"], serde_json::json!(["mark"]));
        mount.snap("s0");
        mount.drop_snap("s0");
        for (round, (options, why)) in
            [(args![&named], Some("on a block device")), (args!["--block-devices", "trust", &named], None)]
                .into_iter()
                .enumerate()
        {
            write(&mount, round as u8 + 1);
            mount.umount();
            mount = device.rig.mount(options);
            check(&mount, &format!("s{round}"), &format!("s{}", round + 1), why);
        }
        mount.umount();
    }
}

#[test]
fn a_served_device_is_claimed_and_a_claimed_one_is_not_served() {
    requires!("root", "losetup", "mkfs.ext4", "mount");
    let device = Device::raw();
    ok(tool("mkfs.ext4").args(["-q", "-F"]).arg(&device.device.0));
    let at = device.rig.path("fs");
    let mount = device.mount(None, &[]);
    fs::create_dir_all(&at).unwrap();
    let out = tool("mount").arg(&device.device.0).arg(&at).output().unwrap();
    assert!(!out.status.success(), "it was mounted behind the guest's back");
    let out = tool("mkfs.ext4").args(["-q", "-F"]).arg(&device.device.0).output().unwrap();
    assert!(!out.status.success(), "{}", stderr(&out));
    mount.umount();
    let mounted = Fs::mount(&device.device.0, &at, "rw");
    let named = device.named();
    let out = fleecefs(args!["mount", "--state-dir", device.rig.path("state"), &named, device.rig.mount_point("mnt")]);
    refused(&out, 2, &["busy", "mounted", "lsblk"]);
    // For reading it is not claimed.
    let reader = device.mount(None, &["-r"]);
    assert_eq!(reader.status()["disks"][0]["guards"], serde_json::json!([]));
    reader.umount();
    drop(mounted);
}

#[test]
fn a_device_that_is_added_is_believed_as_it_is_told() {
    requires!("root", "losetup");
    let device = Device::raw();
    let first = device.rig.image("vdb", 1);
    let mount = device.rig.mount(args!["--state-dir", device.rig.path("state"), &first]);
    let add = |mount: &Mount, options: &[&str]| {
        let mut all = args![];
        all.extend(options.iter().map(Into::into));
        all.push(device.named().into());
        mount.done("disk add", all);
    };
    let tracking = |mount: &Mount| mount.status()["disks"][0]["tracking"].as_str().unwrap().to_owned();
    add(&mount, &[]);
    mount.snap("s0");
    mount.drop_snap("s0");
    mount.done("disk remove", args!["vda"]);
    add(&mount, &["--block-devices", "trust"]);
    assert_eq!(tracking(&mount), "exact");
    mount.done("disk remove", args!["vda"]);
    add(&mount, &[]);
    assert!(tracking(&mount).contains("on a block device"), "{}", tracking(&mount));
    let out = mount.run("disk add", args!["--block-devices", "hope", device.named()]);
    refused_usage(&out);
    mount.umount();
}

#[track_caller]
fn refused_usage(out: &std::process::Output) {
    assert_eq!(out.status.code(), Some(2), "{}", stderr(out));
    assert!(stderr(out).contains("distrust"), "{}", stderr(out));
}
