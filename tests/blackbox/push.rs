//! Push backups of a mount: what `drive-backup` makes, and what is left of a job after a kill.

use crate::harness::*;
use crate::qmp::Client;
use serde_json::{Value, json};
use std::os::unix::fs::FileExt;
use std::path::Path;

const MIB: u64 = 1 << 20;

/// Begins a `drive-backup` and waits for its end.
#[track_caller]
fn backup(client: &mut Client, target: &Path, more: Value) {
    let mut arguments = json!({ "job-id": "j", "device": "vda", "target": target });
    arguments.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    client.ok("drive-backup", arguments);
    let event = client.event("BLOCK_JOB_COMPLETED");
    assert_eq!(event["data"].get("error"), None, "{event}");
    eventually("the job goes", || client.ok("query-jobs", json!({})) == json!([]));
}

#[track_caller]
fn same(target: &Path, format: &str, content: &[u8]) {
    if format == "qcow2" {
        ok(tool("qemu-img").args(["check", "-q", "-f", format]).arg(target));
    }
    let raw = target.with_extension("compared");
    ok(tool("qemu-img").args(["convert", "-f", format, "-O", "raw"]).args([target, &raw]));
    let theirs = std::fs::read(&raw).unwrap();
    std::fs::remove_file(raw).unwrap();
    assert!(theirs[..content.len()] == *content, "{}", target.display());
}

fn content(mount: &Mount) -> Vec<u8> {
    std::fs::read(mount.live("vda")).unwrap()
}

fn info(image: &Path) -> Value {
    serde_json::from_str(&ok(tool("qemu-img").args(["info", "--output=json"]).arg(image))).unwrap()
}

#[test]
fn drive_backup_makes_images_and_chains_that_qemu_reads() {
    requires!("qemu-img");
    let rig = Rig::new();
    // The last sector of the disk is no whole one.
    let image = rig.image_of("vda", 8 * MIB + 1000);
    let mount = rig.mount([&image]);
    let mut client = Client::new(&mount);
    let guest = mount.guest("vda");
    guest.write_all_at(&pattern(1, 3 * MIB as usize), 0).unwrap();
    guest.write_all_at(&[b'a'; 1 << 20], 5 * MIB).unwrap();
    let dir = rig.mount_point("targets");
    let full = dir.join("full.raw");
    backup(&mut client, &full, json!({ "sync": "full", "format": "raw" }));
    same(&full, "raw", &content(&mount));
    let plain = dir.join("plain.qcow2");
    backup(&mut client, &plain, json!({ "sync": "full", "format": "qcow2" }));
    same(&plain, "qcow2", &content(&mount));
    let packed = dir.join("packed.qcow2");
    backup(&mut client, &packed, json!({ "sync": "top", "format": "qcow2", "compress": true }));
    same(&packed, "qcow2", &content(&mount));
    let bytes = |path: &Path| std::fs::metadata(path).unwrap().len();
    assert!(bytes(&packed) + MIB / 2 < bytes(&plain), "{} {}", bytes(&packed), bytes(&plain));
    // An existing file is nobody's to overwrite.
    let e = client.error("drive-backup", json!({ "job-id": "j", "device": "vda", "target": plain, "sync": "full" }));
    assert_eq!(e.1, format!("Could not create '{}': File exists", plain.display()));
    // Increments on it, made as oVirt makes them.
    client.ok("block-dirty-bitmap-add", json!({ "node": "vda", "name": "b", "persistent": true }));
    let mut below = packed;
    for point in 1..4u64 {
        guest.write_all_at(&pattern(point + 7, 200_000), point * MIB - 7).unwrap();
        let target = dir.join(format!("{point}.qcow2"));
        ok(tool("qemu-img").args(["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"]).args([&below, &target]));
        let compress = point == 2;
        let more = json!({ "sync": "incremental", "bitmap": "b", "mode": "existing", "format": "qcow2", "compress": compress });
        backup(&mut client, &target, more);
        same(&target, "qcow2", &content(&mount));
        below = target;
    }
    assert!(!mount.path("snapshots").read_dir().unwrap().any(|entry| entry.unwrap().file_name() != "latest"));
    assert_eq!(client.ok("fleecefs-checkpoint-list", json!({})), json!([]));
    drop(guest);
    mount.umount();
}

#[test]
fn sync_top_leaves_out_what_lies_below() {
    requires!("qemu-img");
    let rig = Rig::new();
    let base = rig.image("base", 4);
    std::fs::OpenOptions::new().write(true).open(&base).unwrap().write_all_at(&pattern(3, 2 << 20), 0).unwrap();
    let top = rig.path("vda.qcow2");
    ok(tool("qemu-img").args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"]).args([&base, &top]));
    let mount = rig.mount(args!["-f", "qcow2", &top]);
    let guest = mount.guest("vda");
    guest.write_all_at(&pattern(4, 100_000), 64 << 10).unwrap();
    guest.write_all_at(&[0; 65536], 1 << 20).unwrap();
    let target = rig.path("target.qcow2");
    let mut client = Client::new(&mount);
    backup(&mut client, &target, json!({ "sync": "top" }));
    same(&target, "qcow2", &content(&mount));
    let told = info(&target);
    assert_eq!(told["full-backing-filename"], json!(base));
    let map: Vec<Value> =
        serde_json::from_str(&ok(tool("qemu-img").args(["map", "--output=json"]).arg(&target))).unwrap();
    let own: u64 = map.iter().filter(|run| run["depth"] == 0).map(|run| run["length"].as_u64().unwrap()).sum();
    assert_eq!(own, 3 << 16, "{map:?}");
    drop(guest);
    mount.umount();
}

#[test]
fn a_kill_in_a_backup_gives_the_bitmap_back_and_leaves_no_view() {
    let rig = Rig::new();
    let image = rig.image("vda", 16);
    let mount = rig.mount([&image]);
    let mut client = Client::new(&mount);
    client
        .ok("block-dirty-bitmap-add", json!({ "node": "vda", "name": "b", "persistent": true, "granularity": 65536 }));
    let guest = mount.guest("vda");
    guest.write_all_at(&pattern(1, 4 << 20), 0).unwrap();
    let count = |client: &mut Client| client.ok("query-block", json!({}))[0]["inserted"]["dirty-bitmaps"][0].clone();
    assert_eq!(count(&mut client)["count"], 4 * MIB);
    let target = rig.path("target.raw");
    let more = json!({ "job-id": "j", "device": "vda", "target": target, "sync": "incremental", "bitmap": "b",
        "format": "raw", "speed": 65536 });
    client.ok("drive-backup", more);
    guest.write_all_at(&pattern(2, 1 << 20), 8 * MIB).unwrap();
    assert_eq!(count(&mut client)["busy"], true);
    drop((guest, client));
    let dir = mount.kill();
    let mount = Mount::at(dir, [&image]);
    let mut client = Client::new(&mount);
    let bitmap = count(&mut client);
    assert_eq!((&bitmap["count"], &bitmap["busy"]), (&json!(5 * MIB), &json!(false)));
    assert!(!mount.path("snapshots").read_dir().unwrap().any(|entry| entry.unwrap().file_name() != "latest"));
    let layers = rig.path("vda.raw.fleece/layers");
    eventually("the view's store goes", || !layers.exists() || std::fs::read_dir(&layers).unwrap().next().is_none());
    mount.umount();
}

#[test]
fn a_loop_device_over_an_image_is_no_target() {
    requires!("root", "losetup");
    let rig = Rig::new();
    let (image, other) = (rig.image("vda", 1), rig.image("vdb", 1));
    let mount = rig.mount([&image, &other]);
    let mut client = Client::new(&mount);
    for file in [&image, &other] {
        let device = Loop::new(file, &[]);
        let arguments = json!({ "job-id": "j", "device": "vda", "target": device.0, "sync": "full", "mode": "existing",
            "format": "raw" });
        assert_eq!(client.error("drive-backup", arguments).1, "Failed to get \"write\" lock");
    }
    mount.umount();
}
