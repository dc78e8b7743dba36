//! Jobs as a client sees them, with a copier that holds a bitmap as a push backup does.

use super::*;
use fleecefs::backup::jobs::{Handle, JobError, JobSpec, Work};
use fleecefs::bitmap::DirtyBitmap;
use fleecefs::error::{Error, errno};
use fleecefs::fleece::{BitmapRef, Hold, HoldEnd, View};
use std::sync::Mutex;

const GRANULE: u64 = 64 << 10;

/// QEMU's `bitmap-mode`.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Mode {
    OnSuccess,
    Never,
    Always,
}

/// What a test says to a copier that has copied its first half.
enum Go {
    On,
    Fail,
}

/// Copies what a held bitmap says from the view of the same instant.
struct Copier {
    fleece: Arc<Fleece>,
    hold: Hold,
    view: Arc<View>,
    mode: Mode,
    target: Arc<Mutex<Vec<u8>>>,
    missing: DirtyBitmap,
    go: Receiver<Go>,
}

impl Copier {
    fn end(&self, end: HoldEnd) -> Result<()> {
        self.fleece.end_holds(&[(&self.hold, end)])
    }
}

impl Work for Copier {
    fn run(&mut self, job: &Handle) -> Result<()> {
        let frozen = self.hold.bitmap();
        let granules: Vec<u64> = (0..DISK_BYTES / GRANULE).filter(|g| frozen.is_dirty(g * GRANULE)).collect();
        job.set_total(granules.len() as u64 * GRANULE);
        for (index, granule) in granules.iter().enumerate() {
            while index == granules.len() / 2 {
                match self.go.try_recv() {
                    Ok(Go::On) => break,
                    Ok(Go::Fail) => {
                        job.io_error("write", "report");
                        return Err(Error::new(errno::ENOSPC, "write", "No space left on device"));
                    }
                    Err(_) => job.advance(0)?,
                }
                std::thread::sleep(Duration::from_millis(1));
            }
            let at = (granule * GRANULE) as usize;
            let mut buf = vec![0; GRANULE as usize];
            assert_eq!(self.view.read(&mut buf, granule * GRANULE)?, buf.len());
            self.target.lock().unwrap()[at..at + buf.len()].copy_from_slice(&buf);
            self.missing.bits().clear_range(*granule..*granule + 1);
            job.advance(GRANULE)?;
        }
        Ok(())
    }

    fn commit(&mut self) -> Result<()> {
        self.end(if self.mode == Mode::Never { HoldEnd::Reclaim } else { HoldEnd::Abdicate })
    }

    fn abort(&mut self) {
        let end = match self.mode {
            Mode::Always => {
                let missing = DirtyBitmap::heap(self.missing.granularity(), self.missing.size()).unwrap();
                missing.merge_from(&self.missing);
                HoldEnd::ReclaimWith(missing)
            }
            Mode::OnSuccess | Mode::Never => HoldEnd::Reclaim,
        };
        self.end(end).unwrap();
    }
}

fn job(id: &str) -> JobSpec {
    JobSpec { id: id.into(), kind: "backup", speed: 0, auto_finalize: true, auto_dismiss: false }
}

impl Fixture {
    fn write(&self, disk: &str, granules: &[u64], byte: u8) {
        let disk = self.fleece.disk(disk).unwrap();
        granules.iter().for_each(|granule| assert_eq!(disk.write(&[byte; 4096], granule * GRANULE).unwrap(), 4096));
    }

    fn content(&self, disk: &str) -> Vec<u8> {
        let mut buf = vec![0; DISK_BYTES as usize];
        assert_eq!(self.fleece.disk(disk).unwrap().read(&mut buf, 0).unwrap(), buf.len());
        buf
    }

    /// The dirty granules of a bitmap, by merging it into one that is looked at under a hold.
    fn dirty(&self, disk: &str, name: &str) -> Vec<u64> {
        let probe = BitmapRef::new(disk, "probe");
        let add = Action::Add {
            disk: disk.into(),
            name: "probe".into(),
            granularity: None,
            persistent: false,
            disabled: true,
        };
        let merge = Action::Merge { target: probe.clone(), sources: vec![BitmapRef::new(disk, name)] };
        self.fleece.apply(&[add, merge]).unwrap();
        let hold = self.fleece.hold(disk, "probe").unwrap();
        let dirty = (0..DISK_BYTES / GRANULE).filter(|g| hold.bitmap().is_dirty(g * GRANULE)).collect();
        self.fleece.end_holds(&[(&hold, HoldEnd::Reclaim)]).unwrap();
        self.fleece.apply(&[Action::Remove(probe)]).unwrap();
        dirty
    }

    /// Starts a copier for bitmap `b` of each disk, all at one instant, as one group; gives what lets each go on.
    fn copy(&self, disks: &[&str], mode: Mode, targets: &[Arc<Mutex<Vec<u8>>>]) -> Vec<Sender<Go>> {
        let mut senders = Vec::new();
        let make = || -> std::result::Result<Vec<Box<dyn Work>>, JobError> {
            let mut actions: Vec<Action> = disks.iter().map(|disk| Action::Hold(BitmapRef::new(*disk, "b"))).collect();
            let disks = disks.iter().map(|disk| disk.to_string()).collect();
            let name = "job".to_owned();
            actions.push(Action::Snapshot(SnapshotRequest { name, disks, ..SnapshotRequest::default() }));
            let applied = self.fleece.apply(&actions).map_err(|e| JobError::Refused(e.text))?;
            let snapshot = applied.snapshot.unwrap();
            let mut works = Vec::<Box<dyn Work>>::new();
            for (hold, target) in applied.holds.into_iter().zip(targets) {
                let (sender, go) = channel();
                senders.push(sender);
                let missing = DirtyBitmap::heap(GRANULE, DISK_BYTES).unwrap();
                missing.merge_from(hold.bitmap());
                let view = snapshot.view(hold.disk()).unwrap().clone();
                let (fleece, target) = (self.fleece.clone(), target.clone());
                works.push(Box::new(Copier { fleece, hold, view, mode, target, missing, go }));
            }
            Ok(works)
        };
        let specs = disks.iter().map(|disk| job(disk)).collect();
        self.jobs.start(specs, true, make).unwrap();
        senders
    }

    /// Waits for the end of the jobs, forgets them and their snapshot, and gives their errors.
    fn wait(&self, client: &mut Client, disks: &[&str]) -> Vec<Value> {
        let mut errors = Vec::new();
        for disk in disks {
            let row = loop {
                let list = client.execute("query-jobs", json!({})).unwrap();
                let row = list.as_array().unwrap().iter().find(|row| row["id"] == *disk).unwrap().clone();
                if row["status"] == "concluded" {
                    break row;
                }
                std::thread::sleep(Duration::from_millis(1));
            };
            errors.push(row["error"].clone());
            client.execute("job-dismiss", json!({ "id": disk })).unwrap();
        }
        self.fleece.cancel_snapshot("job").unwrap();
        errors
    }
}

fn target() -> Arc<Mutex<Vec<u8>>> {
    Arc::new(Mutex::new(vec![0; DISK_BYTES as usize]))
}

fn add(client: &mut Client, disk: &str) {
    client.execute("block-dirty-bitmap-add", json!({"node": disk, "name": "b", "persistent": true})).unwrap();
}

#[test]
fn each_mode_leaves_exactly_its_bits_however_the_job_ends() {
    let before = [1, 4, 7, 10];
    let meanwhile = [2, 7];
    let all = [1, 2, 4, 7, 10];
    for (mode, how, left) in [
        (Mode::OnSuccess, "done", &meanwhile[..]),
        (Mode::OnSuccess, "failed", &all[..]),
        (Mode::OnSuccess, "cancelled", &all[..]),
        (Mode::Never, "done", &all[..]),
        (Mode::Never, "failed", &all[..]),
        (Mode::Never, "cancelled", &all[..]),
        (Mode::Always, "done", &meanwhile[..]),
        // Two of the four were copied.
        (Mode::Always, "failed", &[2, 7, 10][..]),
        (Mode::Always, "cancelled", &[2, 7, 10][..]),
    ] {
        let f = Fixture::new();
        let mut c = f.client();
        add(&mut c, "vda");
        f.write("vda", &before, 1);
        let frozen = f.content("vda");
        let target = target();
        let go = f.copy(&["vda"], mode, std::slice::from_ref(&target));
        let nodes = c.execute("query-named-block-nodes", json!({})).unwrap();
        let rows = nodes[0]["dirty-bitmaps"].as_array().unwrap();
        let held = rows.iter().find(|row| row["name"] == "b").unwrap();
        assert_eq!((&held["busy"], &held["count"]), (&json!(true), &json!(4 * GRANULE)));
        c.execute("block-dirty-bitmap-add", json!({"node": "vda", "name": "other"})).unwrap();
        for (command, arguments) in [
            ("clear", json!({"node": "vda", "name": "b"})),
            ("enable", json!({"node": "vda", "name": "b"})),
            ("disable", json!({"node": "vda", "name": "b"})),
            ("remove", json!({"node": "vda", "name": "b"})),
            ("merge", json!({"node": "vda", "target": "b", "bitmaps": ["other"]})),
            ("merge", json!({"node": "vda", "target": "other", "bitmaps": ["b"]})),
        ] {
            let e = c.execute(&format!("block-dirty-bitmap-{command}"), arguments).unwrap_err();
            let text = "Bitmap 'b' is currently in use by another operation and cannot be used";
            assert!(e.to_string().contains(text), "{e}");
        }
        c.execute("x-debug-block-dirty-bitmap-sha256", json!({"node": "vda", "name": "b"})).unwrap();
        let e = c.execute("blockdev-del", json!({"node-name": "vda"})).unwrap_err();
        assert!(e.to_string().contains("Node vda is in use"), "{e}");
        // The first half is copied before this returns, so that what is missing is known.
        while c.execute("query-jobs", json!({})).unwrap()[0]["current-progress"] != json!(2 * GRANULE) {
            std::thread::sleep(Duration::from_millis(1));
        }
        f.write("vda", &meanwhile, 2);
        let error = match how {
            "done" => {
                go[0].send(Go::On).unwrap();
                json!(null)
            }
            "failed" => {
                go[0].send(Go::Fail).unwrap();
                json!("write: No space left on device")
            }
            _ => {
                c.execute("job-cancel", json!({"id": "vda"})).unwrap();
                json!("Operation canceled")
            }
        };
        assert_eq!(f.wait(&mut c, &["vda"]), [error], "{mode:?} {how}");
        assert_eq!(f.dirty("vda", "b"), left, "{mode:?} {how}");
        if how == "done" {
            assert!(*target.lock().unwrap() == frozen, "{mode:?}: the copy is of the instant");
        }
    }
}

#[test]
fn a_failed_increment_is_made_good_by_the_next_one() {
    let f = Fixture::new();
    let mut c = f.client();
    add(&mut c, "vda");
    f.write("vda", &(0..16).collect::<Vec<_>>(), 1);
    let target = target();
    for (round, how) in [(2, Go::On), (3, Go::Fail), (4, Go::Fail), (5, Go::On)] {
        let frozen = f.content("vda");
        let done = matches!(how, Go::On);
        let go = f.copy(&["vda"], Mode::OnSuccess, std::slice::from_ref(&target));
        f.write("vda", &[round.into(), 12], round);
        go[0].send(how).unwrap();
        f.wait(&mut c, &["vda"]);
        if done {
            assert!(*target.lock().unwrap() == frozen, "round {round}");
        }
        f.write("vda", &[u64::from(round) + 5], round);
    }
}

#[test]
fn a_group_keeps_all_its_bitmaps_where_one_disk_fails() {
    let f = Fixture::new();
    f.fleece.add_disk(&spec("vdb", f.image("vdb"))).unwrap();
    let mut c = f.client();
    for disk in ["vda", "vdb"] {
        add(&mut c, disk);
        f.write(disk, &[3, 5], 1);
    }
    let targets = [target(), target()];
    let go = f.copy(&["vda", "vdb"], Mode::OnSuccess, &targets);
    go[0].send(Go::On).unwrap();
    f.write("vda", &[9], 2);
    go[1].send(Go::Fail).unwrap();
    let errors = f.wait(&mut c, &["vda", "vdb"]);
    assert_eq!(errors, [json!("Operation canceled"), json!("write: No space left on device")]);
    assert_eq!(f.dirty("vda", "b"), [3, 5, 9]);
    assert_eq!(f.dirty("vdb", "b"), [3, 5]);

    let frozen = [f.content("vda"), f.content("vdb")];
    for go in f.copy(&["vda", "vdb"], Mode::OnSuccess, &targets) {
        go.send(Go::On).unwrap();
    }
    assert_eq!(f.wait(&mut c, &["vda", "vdb"]), [json!(null), json!(null)]);
    assert!(*targets[0].lock().unwrap() == frozen[0] && *targets[1].lock().unwrap() == frozen[1]);
    assert!(f.dirty("vda", "b").is_empty() && f.dirty("vdb", "b").is_empty());
}

#[test]
fn a_client_sees_and_ends_jobs_as_qemus() {
    let f = Fixture::new();
    let mut c = f.client();
    add(&mut c, "vda");
    f.write("vda", &[3, 5], 1);
    let mut listener = f.raw().negotiated();
    let _go = f.copy(&["vda"], Mode::OnSuccess, &[target()]);
    while c.execute("query-jobs", json!({})).unwrap()[0]["current-progress"] != json!(GRANULE) {
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(
        c.execute("query-jobs", json!({})).unwrap(),
        json!([{"id": "vda", "type": "backup", "status": "running", "current-progress": GRANULE,
            "total-progress": 2 * GRANULE}])
    );
    c.execute("block-job-set-speed", json!({"device": "vda", "speed": 1 << 20})).unwrap();
    assert_eq!(
        c.execute("query-block-jobs", json!({})).unwrap(),
        json!([{"device": "vda", "type": "backup", "status": "running", "offset": GRANULE, "len": 2 * GRANULE,
            "speed": 1 << 20, "busy": true, "paused": false, "ready": false, "io-status": "ok",
            "auto-finalize": true, "auto-dismiss": false}])
    );
    let mut raw = f.raw().negotiated();
    for (command, arguments, class, desc) in [
        ("job-cancel", r#"{"id":"x"}"#, "GenericError", "Job not found"),
        ("block-job-cancel", r#"{"device":"x"}"#, "DeviceNotActive", "Block job 'x' not found"),
        (
            "block-job-set-speed",
            r#"{"device":"vda","speed":-1}"#,
            "GenericError",
            "Parameter 'speed' expects a non-negative value",
        ),
        (
            "job-dismiss",
            r#"{"id":"vda"}"#,
            "GenericError",
            "Job 'vda' in state 'running' cannot accept command verb 'dismiss'",
        ),
    ] {
        let answer = raw.ask(&format!(r#"{{"execute":"{command}","arguments":{arguments}}}"#));
        assert_eq!(answer, error(class, desc), "{command}");
    }
    c.execute("block-job-cancel", json!({"device": "vda"})).unwrap();
    assert_eq!(f.wait(&mut c, &["vda"]), [json!("Operation canceled")]);
    assert_eq!(c.execute("query-block-jobs", json!({})).unwrap(), json!([]));
    let status = |status: &str| ("JOB_STATUS_CHANGE".to_owned(), json!({"id": "vda", "status": status}));
    let cancelled = json!({"type": "backup", "device": "vda", "len": 2 * GRANULE, "offset": GRANULE, "speed": 1 << 20});
    for expected in [
        status("created"),
        status("running"),
        status("aborting"),
        ("BLOCK_JOB_CANCELLED".to_owned(), cancelled),
        status("concluded"),
        status("null"),
    ] {
        let event = listener.receive();
        assert_eq!((event["event"].as_str().unwrap().to_owned(), event["data"].clone()), expected);
    }
}
