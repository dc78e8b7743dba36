//! Push backups where nothing goes as planned: what is left of bitmaps, and of targets.

use super::*;
use fleecefs::backup::jobs::{JobError, JobSpec, Work};
use fleecefs::backup::push::{BitmapMode, Goal, Group, OnError, Push, PushSpec, Sync};
use fleecefs::fleece::BitmapRef;
use fleecefs::image::{self, Format, OpenOptions};

fn spec(sync: Sync, target: &std::path::Path) -> PushSpec {
    let options = OpenOptions { format: Some(Format::Raw), ..OpenOptions::default() };
    let goal = Goal::Image(image::open(target, &options).unwrap());
    let report = OnError::Report;
    PushSpec { sync, goal, compress: false, on_source_error: report, on_target_error: report, kept: Box::new(()) }
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
