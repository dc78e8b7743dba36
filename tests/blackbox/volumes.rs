//! Volumes inside of disks, frozen and live: against the kernel's partitions, file system checkers, blkid, and a script
//! that reads LVM's metadata by itself.

use crate::harness::*;
use serde_json::Value;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

const MIB: u64 = 1 << 20;
const ESTALE: i32 = 116;
/// How long a guest writes before it is frozen.
const BUSY: Duration = Duration::from_millis(300);

/// Partitions `image` as sfdisk is told.
pub fn partition(image: &Path, script: &str) {
    let mut sfdisk = tool("sfdisk");
    let mut child =
        sfdisk.args(["--quiet", "--no-reread", "--wipe=never"]).arg(image).stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(script.as_bytes()).unwrap();
    assert!(child.wait().unwrap().success(), "{script}");
}

/// A sparse image of that size.
pub fn blank(rig: &Rig, name: &str, mib: u64) -> PathBuf {
    let path = rig.path(&format!("{name}.raw"));
    File::create_new(&path).unwrap().set_len(mib * MIB).unwrap();
    path
}

/// What status or manifest say of the volumes of a disk.
fn rows(disk: &Value) -> Vec<Value> {
    disk["volumes"].as_array().unwrap_or_else(|| panic!("no volumes in {disk}")).clone()
}

fn names(disk: &Value) -> Vec<String> {
    rows(disk).iter().map(|row| row["name"].as_str().unwrap().to_owned()).collect()
}

fn status_of(mount: &Mount, disk: &str) -> Value {
    let status = mount.status();
    status["disks"].as_array().unwrap().iter().find(|row| row["name"] == disk).unwrap().clone()
}

pub fn live_volume(mount: &Mount, disk: &str, volume: &str) -> PathBuf {
    mount.path(&format!("live/{disk}/volumes/{volume}.raw"))
}

pub fn frozen_volume(mount: &Mount, snapshot: &str, disk: &str, volume: &str) -> PathBuf {
    mount.path(&format!("snapshots/{snapshot}/{disk}/volumes/{volume}.raw"))
}

pub fn hash(path: &Path) -> String {
    ok(tool("sha256sum").arg(path)).split(' ').next().unwrap().to_owned()
}

#[track_caller]
fn same(a: &Path, b: &Path) {
    ok(tool("cmp").args([a, b]));
}

pub fn copy(from: &Path, to: &Path) -> PathBuf {
    ok(tool("cp").arg("--sparse=always").arg(from).arg(to));
    to.to_owned()
}

/// A loop device over a part of a file, as long as this lives.
pub fn loop_at(file: &Path, offset: u64, length: u64) -> Loop {
    Loop::new(file, &["-o", &offset.to_string(), "--sizelimit", &length.to_string()])
}

/// Runs `during` while files in `dirs` are written and synced all the time.
pub fn while_writing(dirs: &[&Path], during: impl FnOnce()) {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for dir in dirs {
            let stop = &stop;
            scope.spawn(move || {
                for n in 0_u64.. {
                    if stop.load(Relaxed) {
                        break;
                    }
                    let path = dir.join((n % 40).to_string());
                    fs::write(&path, pattern(n, 5000 + (n as usize % 9) * 3000)).unwrap();
                    if n % 3 == 0 {
                        File::open(&path).unwrap().sync_all().unwrap();
                    }
                }
            });
        }
        std::thread::sleep(BUSY);
        during();
        stop.store(true, Relaxed);
    });
}

/// The journal is replayed, and then there is nothing to complain of.
#[track_caller]
pub fn ext4_is_clean(copy: &Path) {
    // Summaries in the superblock are not in the journal; anything worse ends a preening check with an error.
    let replayed = tool("e2fsck").args(["-fp"]).arg(copy).output().unwrap();
    assert!(matches!(replayed.status.code(), Some(0 | 1)), "{}: {}", copy.display(), stdout(&replayed));
    ok(tool("e2fsck").args(["-fy"]).arg(copy));
    ok(tool("e2fsck").args(["-fn"]).arg(copy));
}

/// The volumes of a view are, byte for byte, the partitions that the kernel sees in it.
#[track_caller]
fn as_the_kernel_sees(mount: &Mount, snapshot: &str, disk: &str) {
    let device = Loop::new(&mount.view(snapshot, disk), &["-r", "-P"]);
    // Where the kernel does not know such tables, libblkid reads them for it.
    let partitions = tool("partx").arg("-a").arg(&device.0).output().unwrap();
    let found = rows(&mount.manifest(snapshot, disk));
    let node = device.0.file_name().unwrap().to_str().unwrap().to_owned();
    let kernel =
        fs::read_dir(format!("/sys/block/{node}")).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    // The container of logical partitions is two sectors long for the kernel, and none of the volumes.
    let sectors = |name: &str| fs::read_to_string(format!("/sys/block/{node}/{name}/size")).unwrap();
    let kernel = kernel.filter(|name| name.starts_with(&node) && sectors(name).trim().parse::<u64>().unwrap() > 2);
    let mut kernel: Vec<String> = kernel.map(|name| name[node.len()..].to_owned()).collect();
    let mut ours: Vec<String> = found.iter().map(|row| row["name"].as_str().unwrap().to_owned()).collect();
    kernel.sort();
    ours.sort();
    assert_eq!(ours, kernel, "{disk}: {}", stderr(&partitions));
    for row in found {
        let name = row["name"].as_str().unwrap();
        let read = |file: &str| fs::read_to_string(format!("/sys/block/{node}/{node}{name}/{file}")).unwrap();
        let number = |file: &str| read(file).trim().parse::<u64>().unwrap() * 512;
        assert_eq!(
            (row["offset"].as_u64(), row["size"].as_u64()),
            (Some(number("start")), Some(number("size"))),
            "{row}"
        );
        same(Path::new(&format!("/dev/{node}{name}")), &frozen_volume(mount, snapshot, disk, name));
        let blkid = |field: &str| {
            let volume = frozen_volume(mount, snapshot, disk, name);
            let out = tool("blkid").args(["-p", "-o", "value", "-s", field]).arg(volume).output().unwrap();
            stdout(&out).trim().to_owned()
        };
        for (field, ours) in [("TYPE", "type"), ("LABEL", "label"), ("UUID", "uuid")] {
            assert_eq!(row["content"][ours].as_str().unwrap_or(""), blkid(field), "{field} of {row}");
        }
    }
    ok(tool("partx").arg("-d").arg(&device.0));
}

/// Backs the mount up, writes to the first volume and to the others, and restores the first one into its live disk: it is
/// as it was, and nothing else is touched. Needs `--writable-volumes`.
fn the_first_is_restored(rig: &Rig, mount: &Mount, volumes: &[(&str, &str)]) {
    let backup = rig.path("backup");
    let files: Vec<_> = volumes.iter().map(|(disk, name)| live_volume(mount, disk, name)).collect();
    let hashes = || files.iter().map(|file| hash(file)).collect::<Vec<_>>();
    let then = hashes();
    mount.done("backup", args!["--to", &backup]);
    for file in &files {
        let volume = OpenOptions::new().write(true).open(file).unwrap();
        let end = volume.metadata().unwrap().len();
        for at in [0, end / 2 + 512, end - 512] {
            volume.write_all_at(&[0xd1; 512], at).unwrap();
        }
    }
    let now = hashes();
    assert!(then.iter().zip(&now).all(|(then, now)| then != now));
    let (disk, name) = volumes[0];
    let out =
        fleecefs(args!["restore", &backup, "--disk", disk, "--volume", name, "--verify", "--to", mount.live(disk)]);
    assert_eq!(out.status.code(), Some(0), "{}{}", stdout(&out), stderr(&out));
    assert_eq!(hashes(), [&then[..1], &now[1..]].concat(), "{name} of {disk}");
}

#[test]
fn mbr_partitions_with_ext4_under_a_writing_guest() {
    requires!("root", "losetup", "sfdisk", "partx", "mkfs.ext4", "e2fsck", "blkid");
    let rig = Rig::new();
    let image = blank(&rig, "vda", 96);
    partition(&image, "label: dos\n2048,65536,83\n67584,1024,da\n68608,+,5\n70656,49152,83\n121856,4096,83\n");
    let mount = rig.mount(args!["--writable-volumes", &image]);
    let parts = [(MIB, 32 * MIB), (70656 * 512, 24 * MIB)];
    let devices = parts.map(|(start, length)| loop_at(&mount.live("vda"), start, length));
    for (device, label) in devices.iter().zip(["system", "data"]) {
        ok(tool("mkfs.ext4").args(["-q", "-L", label]).arg(&device.0));
    }
    mount.guest("vda").write_all_at(&pattern(3, 4096), 121856 * 512).unwrap();
    let guests = [(&devices[0], "one"), (&devices[1], "two")]
        .map(|(device, dir)| Fs::mount(&device.0, &rig.path(dir), "defaults"));
    while_writing(&[&guests[0].0, &guests[1].0], || {
        for n in ["a", "b"] {
            mount.snap(n);
            std::thread::sleep(BUSY);
        }
    });
    drop(guests);
    for snapshot in ["a", "b"] {
        assert_eq!(names(&mount.manifest(snapshot, "vda")), ["p1", "p2", "p5", "p6"]);
        as_the_kernel_sees(&mount, snapshot, "vda");
        for volume in ["p1", "p5"] {
            ext4_is_clean(&copy(&frozen_volume(&mount, snapshot, "vda", volume), &rig.path("copy")));
        }
    }
    let status = status_of(&mount, "vda");
    let labels: Vec<_> = rows(&status).iter().map(|row| row["content"]["label"].clone()).collect();
    assert_eq!(labels, ["system".into(), Value::Null, "data".into(), Value::Null]);
    let text = mount.done("status", args![]);
    assert!(text.contains("VOLUME") && text.contains("system") && text.contains("p6"), "{text}");
    drop(devices);
    the_first_is_restored(&rig, &mount, &[("vda", "p5"), ("vda", "p1"), ("vda", "p2"), ("vda", "p6")]);
}

#[test]
fn gpt_partitions_with_xfs_vfat_and_swap_under_a_writing_guest() {
    requires!(
        "root",
        "losetup",
        "sfdisk",
        "partx",
        "mkfs.xfs",
        "xfs_repair",
        "mkfs.vfat",
        "fsck.vfat",
        "mkswap",
        "blkid"
    );
    let rig = Rig::new();
    let image = blank(&rig, "vda", 384);
    partition(
        &image,
        "label: gpt\nstart=1MiB,size=320MiB,name=root\nstart=321MiB,size=40MiB,type=U\nstart=361MiB,size=16MiB,type=S\n",
    );
    let mount = rig.mount(args!["--writable-volumes", &image]);
    ok(tool("mkfs.xfs").args(["-q", "-L", "rootfs"]).arg(live_volume(&mount, "vda", "p1")));
    ok(tool("mkfs.vfat").args(["-n", "EFI"]).arg(live_volume(&mount, "vda", "p2")));
    ok(tool("mkswap").args(["-q", "-L", "swap0"]).arg(live_volume(&mount, "vda", "p3")));
    let device = loop_at(&mount.live("vda"), MIB, 320 * MIB);
    let guest = Fs::mount(&device.0, &rig.path("guest"), "defaults");
    while_writing(&[&guest.0], || {
        mount.snap("a");
        std::thread::sleep(BUSY);
    });
    let types: Vec<_> = rows(&mount.manifest("a", "vda")).iter().map(|row| row["content"]["type"].clone()).collect();
    assert_eq!(types, ["xfs", "vfat", "swap"]);
    as_the_kernel_sees(&mount, "a", "vda");
    drop((guest, device));
    the_first_is_restored(&rig, &mount, &[("vda", "p1"), ("vda", "p2"), ("vda", "p3")]);
    let xfs = copy(&frozen_volume(&mount, "a", "vda", "p1"), &rig.path("xfs"));
    {
        let device = Loop::new(&xfs, &[]);
        let replayed = Fs::mount(&device.0, &rig.path("replayed"), "nouuid");
        assert!(fs::read_dir(&replayed.0).unwrap().count() > 0);
    }
    ok(tool("xfs_repair").arg("-n").arg(&xfs));
    ok(tool("fsck.vfat").arg("-n").arg(copy(&frozen_volume(&mount, "a", "vda", "p2"), &rig.path("vfat"))));
}

#[test]
fn one_volume_is_written_and_the_others_stay() {
    requires!("sfdisk", "mke2fs", "e2fsck");
    let rig = Rig::new();
    let image = rig.image("vda", 48);
    partition(&image, "label: gpt\nstart=1MiB,size=16MiB\nstart=17MiB,size=8MiB\nstart=25MiB,size=22MiB\n");
    let mount = rig.mount(args!["--writable-volumes", &image]);
    let before: Vec<_> = ["p1", "p2", "p3"].map(|name| hash(&live_volume(&mount, "vda", name))).into();
    mount.snap("a");
    let (own, disk) = (live_volume(&mount, "vda", "p2"), mount.live("vda"));
    ok(tool("mke2fs").args(["-q", "-F", "-t", "ext4"]).arg(&own));
    ok(tool("e2fsck").args(["-fn"]).arg(&own));
    assert_eq!(fs::metadata(&own).unwrap().len(), 8 * MIB);
    // All of it, as dd does, which truncates; then by single pieces, and read back through the disk's own file.
    let content = pattern(77, 8 << 20);
    fs::write(rig.path("content"), &content).unwrap();
    ok(tool("dd").arg(format!("if={}", rig.path("content").display())).arg(format!("of={}", own.display())).args([
        "bs=1M",
        "conv=fsync",
        "status=none",
    ]));
    let (volume, guest) = (OpenOptions::new().read(true).write(true).open(&own).unwrap(), mount.guest("vda"));
    let mut bytes = vec![0; 8 << 20];
    guest.read_exact_at(&mut bytes, 17 * MIB).unwrap();
    assert!(bytes == content);
    for round in 0..50_u64 {
        let (offset, data) = (round * 7919 % (8 * MIB - 5000), pattern(round, 4321));
        let mut back = vec![0; data.len()];
        let (writer, at, reader, from) = match round % 2 {
            0 => (&volume, offset, &guest, 17 * MIB + offset),
            _ => (&guest, 17 * MIB + offset, &volume, offset),
        };
        writer.write_all_at(&data, at).unwrap();
        reader.read_exact_at(&mut back, from).unwrap();
        assert!(back == data, "round {round}: one file does not see what the other wrote");
    }
    fails(volume.write_at(b"x", 8 * MIB), &[errno::ENOSPC]);
    fails(volume.set_len(MIB), &[errno::EINVAL]);
    xfs_io(&own, "", &["fpunch 0 64k", "fzero 1m 64k", "fsync"]);
    guest.read_exact_at(&mut bytes, 17 * MIB).unwrap();
    assert!(bytes[..65536].iter().all(|b| *b == 0) && bytes[1 << 20..(1 << 20) + 65536].iter().all(|b| *b == 0));
    assert_eq!(hash(&live_volume(&mount, "vda", "p1")), before[0]);
    assert_eq!(hash(&live_volume(&mount, "vda", "p3")), before[2]);
    for (name, hashed) in ["p1", "p2", "p3"].iter().zip(&before) {
        assert_eq!(hash(&frozen_volume(&mount, "a", "vda", name)), *hashed, "{name} as it was frozen");
    }
    drop((volume, guest));
    // What a volume was written is a change like any other.
    mount.snap("b");
    let map = mount.map_since("b", "vda", "a");
    let granules = map.granules();
    assert!(granules.iter().all(|g| (17 * 16..25 * 16).contains(g)) && granules.len() == 8 * 16, "{granules:?}");
    let own = Map::parse(&mount.json("snapshots/b/vda/volumes/p2.map"));
    assert!(own.size() == 8 * MIB);
    let _ = disk;
}

#[test]
fn volumes_of_live_disks_are_read_only_where_nobody_asked_for_more() {
    requires!("sfdisk");
    let rig = Rig::new();
    let image = rig.image("vda", 8);
    partition(&image, "label: gpt\n2048,4096,L\n");
    let mount = rig.mount([&image]);
    let path = live_volume(&mount, "vda", "p1");
    fails(OpenOptions::new().write(true).open(&path), &[errno::EROFS]);
    assert!(fs::read(&path).unwrap() == fs::read(&image).unwrap()[1 << 20..3 << 20]);
    let meta = fs::metadata(&path).unwrap();
    assert_eq!((meta.mode() & 0o7777, meta.uid()), (0o400, fs::metadata(mount.live("vda")).unwrap().uid()));
    fails(fs::remove_file(&path), &[errno::EPERM]);
    mount.snap("a");
    let frozen = frozen_volume(&mount, "a", "vda", "p1");
    fails(OpenOptions::new().write(true).open(&frozen), &[errno::EROFS]);
    fails(fs::remove_file(&frozen), &[errno::EROFS]);
    assert_eq!(data_ranges(&frozen).first().map(|range| range.0), Some(0));
    // A table that makes no sense gives no volumes, and nothing else goes wrong.
    for entries in [1024, 8 * MIB - 33 * 512] {
        mount.guest("vda").write_all_at(&[0xff; 64], entries).unwrap();
    }
    assert!(names(&status_of(&mount, "vda")).is_empty());
    assert_eq!(mount.status()["volume_warnings"].as_array().unwrap().len(), 1);
    assert!(mount.done("status", args![]).contains("volumes: disk 'vda'"));
    assert!(fs::read_dir(mount.path("live/vda/volumes")).unwrap().next().is_none());
    mount.snap("b");
    assert!(names(&mount.manifest("b", "vda")).is_empty());
    assert_eq!(names(&mount.manifest("a", "vda")), ["p1"]);
}

#[test]
fn a_guest_that_repartitions_makes_open_volumes_stale() {
    requires!("sfdisk");
    let rig = Rig::new();
    let (image, other) = (rig.image("vda", 64), rig.image("vdb", 64));
    for image in [&image, &other] {
        partition(image, "label: gpt\nstart=1MiB,size=16MiB\nstart=17MiB,size=16MiB\n");
    }
    let mount = rig.mount(args!["--writable-volumes", &image, &other]);
    mount.snap("a");
    let open = |path: &Path| OpenOptions::new().read(true).write(true).open(path).unwrap();
    let volume = open(&live_volume(&mount, "vda", "p2"));
    let elsewhere = open(&live_volume(&mount, "vdb", "p2"));
    let frozen = File::open(frozen_volume(&mount, "a", "vda", "p2")).unwrap();
    let old = hash(&frozen_volume(&mount, "a", "vda", "p2"));
    let mut bytes = vec![0; 4096];
    volume.read_exact_at(&mut bytes, 0).unwrap();
    partition(&mount.live("vda"), "label: gpt\nstart=1MiB,size=8MiB\nstart=40MiB,size=8MiB\nstart=48MiB,size=4MiB\n");
    fails(volume.read_at(&mut bytes, 0), &[ESTALE]);
    fails(volume.write_at(&bytes, 0), &[ESTALE]);
    fails(volume.sync_all(), &[ESTALE]);
    elsewhere.write_all_at(&bytes, 4096).unwrap();
    frozen.read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(hash(&frozen_volume(&mount, "a", "vda", "p2")), old);
    assert_eq!(names(&status_of(&mount, "vda")), ["p1", "p2", "p3"]);
    let new = open(&live_volume(&mount, "vda", "p2"));
    new.write_all_at(&[9; 4096], 0).unwrap();
    mount.guest("vda").read_exact_at(&mut bytes, 40 * MIB).unwrap();
    assert_eq!(bytes, [9; 4096]);
    fails(volume.read_at(&mut bytes, 0), &[ESTALE]);
}

#[test]
fn a_map_is_cut_to_a_volume_in_every_format() {
    requires!("sfdisk");
    let rig = Rig::new();
    let image = rig.image("vda", 48);
    partition(&image, "label: gpt\nstart=1MiB,size=16MiB\nstart=17MiB,size=8MiB\nstart=25MiB,size=20MiB\n");
    let mount = rig.mount([&image]);
    mount.snap("a");
    mount.drop_snap("a");
    mount.snap("b");
    let guest = mount.guest("vda");
    for (offset, length) in [(17 * MIB - 10, 20), (18 * MIB, 100), (26 * MIB, 1)] {
        guest.write_all_at(&pattern(offset, length), offset).unwrap();
    }
    drop(guest);
    mount.drop_snap("b");
    mount.snap("c");
    let args = |rest: &[&str]| -> Vec<std::ffi::OsString> {
        ["c", "vda", "--volume", "p2"].iter().chain(rest).map(Into::into).collect()
    };
    let sidecar = fs::read_to_string(mount.path("snapshots/c/vda/volumes/p2.map")).unwrap();
    assert_eq!(mount.done("map", args(&["--output", "json"])), sidecar);
    let map = Map::parse(&serde_json::from_str(&sidecar).unwrap());
    assert_eq!((map.size(), map.granules()), (8 * MIB, vec![0, 16]));
    map.check_zeros(&fs::read(frozen_volume(&mount, "c", "vda", "p2")).unwrap());
    for (format, words) in [
        ("borg", ["vda/p2", "0 65536 data"]),
        ("rbd", ["\"offset\":1048576", "\"length\":65536"]),
        ("bmap", ["<ImageSize> 8388608 </ImageSize>", "<Range"]),
        ("ddrescue", ["0x00100000", "vda/p2"]),
        ("nbd", ["\"length\"", "1048576"]),
        ("csi", ["\"volume_capacity_bytes\":8388608", "\"byte_offset\":1048576"]),
        ("text", ["vda/p2", "1048576"]),
    ] {
        let text = mount.done("map", args(&["--output", format]));
        assert!(words.iter().all(|word| text.contains(word)), "{format}: {text}");
    }
    let since = mount.done("map", args(&["--output", "json", "--since", "a"]));
    assert_eq!(Map::parse(&serde_json::from_str(&since).unwrap()).granules(), [0, 16]);
    let totals: Value = serde_json::from_str(&mount.done("map", args(&["--totals", "--json"]))).unwrap();
    assert_eq!((totals["size"].as_u64(), totals["dirty"].as_u64()), (Some(8 * MIB), Some(2 * GRANULE)));
    refused(&mount.run("map", args!["c", "vda", "--volume", "p9"]), 1, &["p9", "p1, p2, p3"]);
    let full = mount.run("map", args(&["--output", "json", "--since", "none"]));
    assert_eq!(full.status.code(), Some(3), "{}", stderr(&full));
    assert!(Map::parse(&serde_json::from_str(&stdout(&full)).unwrap()).all_dirty());
}

/// The script that knows LVM2's metadata by itself.
const LVM: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/volume_scripts/lvm.py");

fn lvm(args: &[&str]) -> String {
    ok(tool("python3").arg(LVM).args(args))
}

/// Two disks with a group over both: `vda` has it in its second partition, `vdb` is a physical volume itself. `root` is
/// linear over both, `fast` striped.
fn group_over_two_disks(rig: &Rig) -> (PathBuf, PathBuf) {
    let (vda, vdb) = (blank(rig, "vda", 72), blank(rig, "vdb", 64));
    partition(&vda, "label: gpt\nstart=1MiB,size=4MiB\nstart=5MiB,size=64MiB,type=lvm\n");
    let text = |path: &Path| path.display().to_string();
    let spec = serde_json::json!({
        "vg": "my-data", "extent": MIB,
        "pvs": [{"file": text(&vda), "offset": 5 * MIB, "size": 64 * MIB}, {"file": text(&vdb), "offset": 0, "size": 64 * MIB}],
        "lvs": {
            "root": [{"count": 20, "places": [[0, 3]]}, {"count": 20, "places": [[1, 30]]}],
            "fast": [{"count": 24, "stripe": 65536, "places": [[1, 2], [0, 40]]}],
        },
    });
    lvm(&["make", &spec.to_string()]);
    (vda, vdb)
}

#[test]
fn logical_volumes_over_two_disks_under_a_writing_guest() {
    requires!("root", "losetup", "sfdisk", "python3", "mkfs.ext4", "e2fsck");
    let rig = Rig::new();
    let (vda, vdb) = group_over_two_disks(&rig);
    let mount = rig.mount(args!["--writable-volumes", &vda, &vdb]);
    assert_eq!(names(&status_of(&mount, "vda")), ["p1", "p2", "my--data-root"]);
    assert_eq!(names(&status_of(&mount, "vdb")), ["my--data-fast"]);
    assert_eq!(status_of(&mount, "vdb")["content"]["type"], "LVM2_member");
    let volumes = [("vda", "my--data-root"), ("vdb", "my--data-fast")];
    let devices = volumes.map(|(disk, name)| Loop::new(&live_volume(&mount, disk, name), &[]));
    for device in &devices {
        ok(tool("mkfs.ext4").arg("-q").arg(&device.0));
    }
    mount.snap("base");
    mount.drop_snap("base");
    let guests = [(&devices[0], "one"), (&devices[1], "two")]
        .map(|(device, dir)| Fs::mount(&device.0, &rig.path(dir), "defaults"));
    while_writing(&[&guests[0].0, &guests[1].0], || mount.snap("a"));
    drop(guests);
    drop(devices);
    let places = [
        format!("{}@{}", mount.view("a", "vda").display(), 5 * MIB),
        format!("{}@0", mount.view("a", "vdb").display()),
    ];
    for (disk, name) in volumes {
        let volume = frozen_volume(&mount, "a", disk, name);
        let apart = rig.path("apart");
        lvm(&["read", name.rsplit('-').next().unwrap(), apart.to_str().unwrap(), &places[0], &places[1]]);
        same(&apart, &volume);
        ext4_is_clean(&apart);
        let sidecar = fs::read_to_string(volume.with_extension("map")).unwrap();
        assert_eq!(mount.done("map", args!["a", disk, "--volume", name, "--output", "json"]), sidecar);
        let map = Map::parse(&serde_json::from_str(&sidecar).unwrap());
        assert_eq!(map.size(), fs::metadata(&volume).unwrap().len());
        map.check_zeros(&fs::read(&volume).unwrap());
        assert!(map.0.iter().any(|e| e.dirty) && !map.all_dirty(), "{sidecar}");
    }
    // The map of `root` is that of its two places, one behind the other.
    let granules = |disk: &str, from: u64, count: u64| -> Vec<bool> {
        let dirty = mount.map("a", disk).granules();
        (from..from + count).map(|granule| dirty.contains(&granule)).collect()
    };
    let expected = [granules("vda", (5 + 2 + 3) * 16, 20 * 16), granules("vdb", (2 + 30) * 16, 20 * 16)].concat();
    let root = Map::parse(&mount.json("snapshots/a/vda/volumes/my--data-root.map")).granules();
    assert_eq!((0..40 * 16).map(|granule| root.contains(&granule)).collect::<Vec<_>>(), expected);
    the_first_is_restored(&rig, &mount, &[("vda", "my--data-root"), ("vdb", "my--data-fast"), ("vda", "p1")]);
}

#[test]
fn lvm_metadata_concern_logical_volumes_alone() {
    requires!("sfdisk", "python3");
    let rig = Rig::new();
    let (vda, vdb) = group_over_two_disks(&rig);
    let mount = rig.mount(args!["--writable-volumes", &vda, &vdb]);
    mount.snap("a");
    let open = |path: PathBuf| OpenOptions::new().read(true).write(true).open(path).unwrap();
    let (root, fast) =
        (open(live_volume(&mount, "vda", "my--data-root")), open(live_volume(&mount, "vdb", "my--data-fast")));
    let (member, boot) = (open(live_volume(&mount, "vda", "p2")), open(live_volume(&mount, "vda", "p1")));
    let frozen = File::open(frozen_volume(&mount, "a", "vda", "my--data-root")).unwrap();
    let mut bytes = [0; 512];
    // An area of the metadata on the other disk, written again as it is.
    let area = lvm(&["areas", &format!("{}@0", mount.live("vdb").display())]);
    let offset: u64 = area.split(' ').nth(1).unwrap().parse().unwrap();
    root.read_exact_at(&mut bytes, 0).unwrap();
    mount.guest("vdb").read_exact_at(&mut bytes, offset).unwrap();
    mount.guest("vdb").write_all_at(&bytes, offset).unwrap();
    for volume in [&root, &fast] {
        fails(volume.read_at(&mut bytes, 0), &[ESTALE]);
        fails(volume.write_at(&bytes, 0), &[ESTALE]);
    }
    for volume in [&member, &boot, &frozen] {
        volume.read_exact_at(&mut bytes, 0).unwrap();
    }
    // The same through a partition that is a physical volume: its own place is not LVM's to say.
    let root = open(live_volume(&mount, "vda", "my--data-root"));
    root.read_exact_at(&mut bytes, 0).unwrap();
    member.write_all_at(&[0; 4096], 0).unwrap();
    fails(root.read_at(&mut bytes, 0), &[ESTALE]);
    member.write_all_at(&[1; 4096], 0).unwrap();
    boot.write_all_at(&[1; 4096], 0).unwrap();
    frozen.read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(names(&status_of(&mount, "vda")), ["p1", "p2"], "without its physical volume there is no group");
    assert_eq!(names(&mount.manifest("a", "vda")), ["p1", "p2", "my--data-root"]);
}
