//! Push backups where nothing goes as planned: what is left of bitmaps, and of targets.

use super::*;
use fleecefs::backup::jobs::{JobError, JobSpec, Work};
use fleecefs::backup::push::{BitmapMode, Goal, Group, OnError, Push, PushSpec, Sync};
use fleecefs::fleece::BitmapRef;
use fleecefs::image::{self, Format, OpenOptions, qcow2};

fn spec(sync: Sync, target: &std::path::Path) -> PushSpec {
    let options = OpenOptions { format: Some(Format::Raw), ..OpenOptions::default() };
    let goal = Goal::Image(image::open(target, &options).unwrap());
    let report = OnError::Report;
    PushSpec { sync, goal, compress: false, on_source_error: report, on_target_error: report, kept: Box::new(()) }
}

fn qcow2_spec(name: &str, file: &std::path::Path) -> DiskSpec {
    DiskSpec { format: Some(Format::Qcow2), ..super::spec(name, file.to_owned()) }
}

fn wait_for_no_job(client: &mut Client) {
    while client.execute("query-jobs", json!({})).unwrap() != json!([]) {
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_push_that_ends_before_it_is_decided_forgets_nothing() {
    for sync in [Sync::Full, Sync::Top, Sync::Bitmap] {
        let f = Fixture::new();
        let mut c = f.client();
        c.execute("block-dirty-bitmap-add", json!({"node": "vda", "name": "b", "granularity": 65536})).unwrap();
        let disk = f.fleece.disk("vda").unwrap();
        [3, 5].iter().for_each(|granule| assert_eq!(disk.write(&[1; 4096], granule << 16).unwrap(), 4096));
        let target = f.image("target");
        let make = || -> std::result::Result<Vec<Box<dyn Work>>, JobError> {
            let freeze = Action::Freeze { disk: "vda".into(), record: None };
            let applied = f.fleece.apply(&[freeze, Action::Hold(BitmapRef::new("vda", "b"))]).unwrap();
            let (frozen, hold) = (applied.frozen.into_iter().next(), applied.holds.into_iter().next());
            let group = Group::new(f.fleece.clone());
            let hold = Some((hold.unwrap(), BitmapMode::Always));
            let push = Push::new(spec(sync, &target), frozen.unwrap(), hold, &group, 0).unwrap();
            f.jobs.cancel("j").unwrap();
            Ok(vec![Box::new(push)])
        };
        let job = JobSpec { id: "j".into(), kind: "backup", speed: 0, auto_finalize: true, auto_dismiss: true };
        f.jobs.start(vec![job], false, make).unwrap();
        wait_for_no_job(&mut c);
        let hold = f.fleece.hold("vda", "b").unwrap();
        assert!([3, 5].iter().all(|granule| hold.bitmap().is_dirty(granule << 16)), "{sync:?}");
    }
}

#[test]
fn a_disk_that_is_copied_to_keeps_its_size_and_its_place() {
    let f = Fixture::new();
    f.fleece.add_disk(&super::spec("vdb", f.image("vdb"))).unwrap();
    let mut c = f.client();
    let disk = f.fleece.disk("vda").unwrap();
    assert_eq!(disk.write(&vec![1; DISK_BYTES as usize], 0).unwrap() as u64, DISK_BYTES);
    let backup = json!({"job-id": "j", "device": "vda", "target": "vdb", "sync": "full", "speed": 1});
    c.execute("blockdev-backup", backup).unwrap();
    for disk in ["vda", "vdb"] {
        for e in [f.fleece.resize_disk(disk, 2 * DISK_BYTES), f.fleece.remove_disk(disk)] {
            assert!(e.unwrap_err().to_string().contains("a job uses it"), "{disk}");
        }
    }
    c.execute("job-cancel", json!({"id": "j"})).unwrap();
    wait_for_no_job(&mut c);
    f.fleece.resize_disk("vdb", 2 * DISK_BYTES).unwrap();
    f.fleece.remove_disk("vdb").unwrap();
}

#[test]
fn a_bitmap_that_cannot_move_on_is_refused_and_nothing_is_made() {
    let f = Fixture::new();
    let mut c = f.client();
    let add = |c: &mut Client, disk: &str| {
        let arguments = json!({"node": disk, "name": "b", "persistent": true});
        c.execute("block-dirty-bitmap-add", arguments).unwrap();
    };
    add(&mut c, "vda");
    let hold = f.fleece.hold("vda", "b").unwrap();
    // Another program writes to a raw image while it is not served: nothing says which bits are missing.
    let lost = f.image("lost");
    f.fleece.add_disk(&super::spec("lost", lost.clone())).unwrap();
    add(&mut c, "lost");
    f.fleece.remove_disk("lost").unwrap();
    std::thread::sleep(Duration::from_millis(20));
    std::fs::write(&lost, vec![1; DISK_BYTES as usize]).unwrap();
    f.fleece.add_disk(&super::spec("lost", lost)).unwrap();
    // A qcow2 image has its bitmaps with it.
    let frozen = f.dir.path().join("frozen.qcow2");
    qcow2::create::create(&frozen, &qcow2::create::CreateOptions::new(DISK_BYTES)).unwrap();
    f.fleece.add_disk(&qcow2_spec("frozen", &frozen)).unwrap();
    add(&mut c, "frozen");
    f.fleece.remove_disk("frozen").unwrap();
    f.fleece.add_disk(&DiskSpec { read_only: true, ..qcow2_spec("frozen", &frozen) }).unwrap();
    let mut raw = f.raw().negotiated();
    let target = f.dir.path().join("target.raw");
    for (disk, text) in [
        ("vda", "Bitmap 'b' is currently in use by another operation and cannot be used"),
        ("lost", "Bitmap 'b' is inconsistent and cannot be used"),
        ("frozen", "Bitmap 'b' is readonly and cannot be modified"),
    ] {
        let before = c.execute("query-block", json!({})).unwrap();
        for more in [json!({"sync": "incremental"}), json!({"sync": "bitmap", "bitmap-mode": "always"})] {
            let mut arguments = json!({"job-id": "j", "device": disk, "target": target, "bitmap": "b"});
            arguments.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            let answer = raw.ask(&json!({"execute": "drive-backup", "arguments": arguments}).to_string());
            assert_eq!(answer["error"]["desc"], text, "{disk} {more}");
        }
        assert_eq!(c.execute("query-block", json!({})).unwrap(), before);
        assert!(!target.exists(), "{disk}: the target that was made is gone");
    }
    drop(hold);
    // One that is only read may be read-only.
    let never = json!({"job-id": "j", "device": "frozen", "target": target, "bitmap": "b", "sync": "bitmap",
        "bitmap-mode": "never"});
    c.execute("drive-backup", never).unwrap();
    wait_for_no_job(&mut c);
}
