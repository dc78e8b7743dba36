//! Push backups of the unmounted core: what becomes of bitmaps, and what targets hold.

use crate::rig::*;
use crate::steps::*;
use fleecefs::backup::jobs::{JobError, JobEvent, JobSpec, Jobs, Work};
use fleecefs::backup::push::{BitmapMode, Goal, Group, OnError, Push, PushSpec, Sync};
use fleecefs::error::errno;
use fleecefs::fleece::{Action, Fleece};
use fleecefs::image::raw::RawImage;
use fleecefs::storage::faulty::Call;
use fleecefs::storage::{FaultPlan, Faulty, MemFile, Storage};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};

/// A raw target in memory whose calls may fail.
struct Target {
    file: MemFile,
    faults: Arc<FaultPlan>,
}

impl Target {
    fn new() -> Target {
        Target { file: MemFile::new("target.raw", DISK_BYTES), faults: Arc::new(FaultPlan::new()) }
    }

    fn spec(&self, sync: Sync, on_target_error: OnError) -> PushSpec {
        self.spec_of(sync, OnError::Report, on_target_error)
    }

    fn spec_of(&self, sync: Sync, on_source_error: OnError, on_target_error: OnError) -> PushSpec {
        let storage = Faulty { inner: self.file.shared(), plan: self.faults.clone() };
        PushSpec {
            sync,
            goal: Goal::Image(Arc::new(RawImage::over(Arc::new(storage), false).unwrap())),
            compress: false,
            on_source_error,
            on_target_error,
            kept: Box::new(()),
        }
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; DISK_BYTES as usize];
        self.file.read_at(&mut bytes, 0).unwrap();
        bytes
    }
}

fn job(id: &str) -> JobSpec {
    JobSpec { id: id.to_owned(), kind: "backup", speed: 0, auto_finalize: true, auto_dismiss: true }
}

/// Jobs, and how they end: true for well.
fn jobs() -> (Arc<Jobs>, Receiver<bool>) {
    let (ends, ended) = channel();
    let jobs = Jobs::new(move |event| {
        let well = match event {
            JobEvent::Completed(info) => info.error.is_none(),
            JobEvent::Cancelled(_) => false,
            _ => return,
        };
        let _ = ends.send(well);
    });
    (jobs, ended)
}

/// Begins jobs in one batch, each with the bitmap `x` of its disk; `meanwhile` is done before the first of them runs.
fn start(
    fleece: &Arc<Fleece>,
    jobs: &Arc<Jobs>,
    backups: Vec<(&str, PushSpec, BitmapMode)>,
    grouped: bool,
    meanwhile: impl FnOnce(),
) {
    let specs = backups.iter().map(|(disk, ..)| job(&format!("j{disk}"))).collect();
    let actions: Vec<Action> = backups
        .iter()
        .flat_map(|(disk, ..)| [Action::Freeze { disk: (*disk).to_owned(), record: None }, hold(&format!("{disk}/x"))])
        .collect();
    let make = || -> Result<Vec<Box<dyn Work>>, JobError> {
        let applied = apply(fleece, &actions);
        meanwhile();
        let mut group = Group::new(fleece.clone());
        let made = backups.into_iter().zip(applied.frozen).zip(applied.holds).enumerate();
        Ok(made
            .map(|(key, (((_, spec, mode), frozen), hold))| {
                if !grouped {
                    group = Group::new(fleece.clone());
                }
                let push = Push::new(spec, frozen, Some((hold, mode)), &group, key).unwrap();
                Box::new(push) as Box<dyn Work>
            })
            .collect())
    };
    jobs.start(specs, grouped, make).unwrap();
}

#[test]
fn a_backup_moves_its_bitmap_on_where_it_ended_well_alone() {
    for (mode, fails, expected) in [
        (BitmapMode::OnSuccess, false, &[2u64, 4][..]),
        (BitmapMode::OnSuccess, true, &[0, 1, 2, 3, 4]),
        (BitmapMode::Never, false, &[0, 1, 2, 3, 4]),
        (BitmapMode::Never, true, &[0, 1, 2, 3, 4]),
        (BitmapMode::Always, false, &[2, 4]),
        (BitmapMode::Always, true, &[2, 3, 4]),
    ] {
        let host = Host::one();
        let fleece = host.mount();
        apply(&fleece, &[add("a/x")]);
        touch(&fleece, "a", &[0, 1, 3]);
        let old = read_live(&fleece.disk("a").unwrap(), 0, DISK_BYTES);
        let target = Target::new();
        if fails {
            target.faults.fail_range(Call::Write, 3 * GRANULE..4 * GRANULE, errno::ENOSPC);
        }
        let (jobs, ended) = jobs();
        let backups = vec![("a", target.spec(Sync::Bitmap, OnError::Report), mode)];
        start(&fleece, &jobs, backups, false, || touch(&fleece, "a", &[2, 4]));
        assert_eq!(ended.recv().unwrap(), !fails);
        wait_for("the job goes", || jobs.infos().is_empty());
        // Of what was copied beside the piece that failed nothing is known for certain.
        let now = hash(&fleece, "a/x");
        if (mode, fails) == (BitmapMode::Always, true) {
            let left = [&[2u64, 3, 4][..], &[0, 2, 3, 4], &[1, 2, 3, 4], &[0, 1, 2, 3, 4]];
            assert!(left.iter().any(|granules| now == hash_of(granules)), "{mode:?}");
        } else {
            assert_eq!(now, hash_of(expected), "{mode:?}, fails: {fails}");
        }
        if !fails {
            let bytes = target.bytes();
            for granule in [0, 1, 3usize] {
                let range = granule * GRANULE as usize..(granule + 1) * GRANULE as usize;
                assert!(bytes[range.clone()] == old[range], "granule {granule}");
            }
        }
        drop(jobs);
        wait_for("the view goes", || {
            fleece.reap();
            host.files["a"].layers().is_empty()
        });
    }
}

#[test]
fn a_group_of_backups_moves_all_bitmaps_on_or_none() {
    for fails in [false, true] {
        let host = Host::pair();
        let fleece = host.mount();
        apply(&fleece, &[add("a/x"), add("b/x")]);
        touch(&fleece, "a", &[0]);
        touch(&fleece, "b", &[1]);
        let targets = [Target::new(), Target::new()];
        if fails {
            targets[1].faults.fail_all(Call::Sync, errno::EIO);
        }
        let (jobs, ended) = jobs();
        let spec = |index: usize| targets[index].spec(Sync::Bitmap, OnError::Report);
        let backups = vec![("a", spec(0), BitmapMode::OnSuccess), ("b", spec(1), BitmapMode::OnSuccess)];
        start(&fleece, &jobs, backups, true, || touch(&fleece, "a", &[3]));
        let ends = [ended.recv().unwrap(), ended.recv().unwrap()];
        assert_eq!(ends, [!fails; 2]);
        let expected: [&[u64]; 2] = if fails { [&[0, 3], &[1]] } else { [&[3], &[]] };
        assert_eq!([hash(&fleece, "a/x"), hash(&fleece, "b/x")], expected.map(hash_of), "fails: {fails}");
    }
}

#[test]
fn a_backup_that_stops_for_an_error_goes_on_where_it_was() {
    let host = Host::one();
    let fleece = host.mount();
    apply(&fleece, &[add("a/x")]);
    touch(&fleece, "a", &[0, 1, 2, 3, 4, 5]);
    let old = read_live(&fleece.disk("a").unwrap(), 0, DISK_BYTES);
    let target = Target::new();
    target.faults.fail_range(Call::Write, 0..GRANULE, errno::ENOSPC);
    let (jobs, ended) = jobs();
    let backups = vec![("a", target.spec(Sync::Full, OnError::Stop), BitmapMode::OnSuccess)];
    start(&fleece, &jobs, backups, false, || ());
    wait_for("the job stops", || jobs.infos()[0].status.name() == "paused");
    assert_eq!(jobs.infos()[0].io_status.name(), "nospace");
    assert!(info(&fleece, "a/x").busy);
    target.faults.clear();
    jobs.resume("ja").unwrap();
    assert!(ended.recv().unwrap());
    assert_eq!(hash(&fleece, "a/x"), hash_of(&[]));
    assert!(target.bytes() == old);
}

/// What is told of a job, in short.
fn told(event: &JobEvent) -> String {
    match event {
        JobEvent::Status(_, status) => status.name().to_owned(),
        JobEvent::Pending(_) => "waits for finalize".to_owned(),
        JobEvent::Completed(info) if info.error.is_none() => "ended well".to_owned(),
        JobEvent::Completed(_) => "failed".to_owned(),
        JobEvent::Cancelled(_) => "cancelled".to_owned(),
        JobEvent::Error { operation, action, .. } => format!("{operation}: {action}"),
    }
}

/// A push of all of disk `a`, by the bitmap `x`, one side of which fails.
struct Failing {
    host: Host,
    fleece: Arc<Fleece>,
    target: Target,
    jobs: Arc<Jobs>,
    events: Receiver<JobEvent>,
    old: Vec<u8>,
}

impl Failing {
    /// Its source fails to read, or its target to write, from `range` on until [`Failing::mend`].
    fn start(read: bool, range: std::ops::Range<u64>, errno: i32, policy: OnError) -> Failing {
        let host = Host::one();
        let fleece = host.mount();
        apply(&fleece, &[add("a/x")]);
        touch(&fleece, "a", &[0, 1, 2, 3, 4, 5]);
        let old = read_live(&fleece.disk("a").unwrap(), 0, DISK_BYTES);
        let target = Target::new();
        // The other side ends the job at its first error.
        let (plan, call, spec) = if read {
            (&host.files["a"].image_faults, Call::Read, target.spec_of(Sync::Full, policy, OnError::Report))
        } else {
            (&target.faults, Call::Write, target.spec_of(Sync::Full, OnError::Report, policy))
        };
        plan.fail_range(call, range, errno);
        let (tell, events) = channel();
        let jobs = Jobs::new(move |event| {
            let _ = tell.send(event.clone());
        });
        start(&fleece, &jobs, vec![("a", spec, BitmapMode::OnSuccess)], false, || ());
        Failing { host, fleece, target, jobs, events, old }
    }

    fn mend(&self) {
        self.host.clear_faults();
        self.target.faults.clear();
    }

    #[track_caller]
    fn expect(&self, events: &[&str]) {
        for expected in events {
            let event = self.events.recv_timeout(std::time::Duration::from_secs(60)).expect(expected);
            assert_eq!(told(&event), *expected, "{event:?}");
        }
    }

    /// It ended well: the target has it all, and the bitmap moved on.
    #[track_caller]
    fn expect_well(&self) {
        self.expect(&["waiting", "pending", "ended well", "concluded", "null"]);
        assert!(self.target.bytes() == self.old);
        assert_eq!((hash(&self.fleece, "a/x"), info(&self.fleece, "a/x").busy), (hash_of(&[]), false));
    }

    /// It did not: the bitmap is as it was.
    fn expect_nothing_forgotten(&self) {
        assert_eq!(hash(&self.fleece, "a/x"), hash_of(&[0, 1, 2, 3, 4, 5]));
        assert!(!info(&self.fleece, "a/x").busy);
    }
}

/// One of several threads comes upon it.
const ONE_GRANULE: std::ops::Range<u64> = 2 * GRANULE..3 * GRANULE;

#[test]
fn an_error_that_is_reported_ends_the_job_and_the_bitmap_stays() {
    for (read, operation) in [(true, "read: report"), (false, "write: report")] {
        for (policy, errno) in
            [(OnError::Report, errno::EIO), (OnError::Report, errno::ENOSPC), (OnError::Enospc, errno::EIO)]
        {
            for range in [ONE_GRANULE, 0..DISK_BYTES] {
                let push = Failing::start(read, range, errno, policy);
                push.expect(&["created", "running", operation, "aborting", "failed", "concluded", "null"]);
                push.expect_nothing_forgotten();
            }
        }
    }
}

#[test]
fn an_error_that_is_ignored_is_told_and_tried_again_until_it_is_gone() {
    for (read, operation) in [(true, "read: ignore"), (false, "write: ignore")] {
        for errno in [errno::EIO, errno::ENOSPC] {
            let push = Failing::start(read, ONE_GRANULE, errno, OnError::Ignore);
            // It never counts as copied.
            push.expect(&["created", "running", operation, operation]);
            assert_eq!(push.jobs.infos()[0].io_status.name(), "ok");
            push.mend();
            let ends = loop {
                let event = push.events.recv_timeout(std::time::Duration::from_secs(60)).unwrap();
                if told(&event) != operation {
                    break event;
                }
            };
            assert_eq!(told(&ends), "waiting");
            push.expect(&["pending", "ended well", "concluded", "null"]);
            assert!(push.target.bytes() == push.old);
            assert_eq!(hash(&push.fleece, "a/x"), hash_of(&[]));
        }
        let push = Failing::start(read, ONE_GRANULE, errno::EIO, OnError::Ignore);
        push.expect(&["created", "running", operation]);
        push.jobs.cancel("ja").unwrap();
        wait_for("the job goes", || push.jobs.infos().is_empty());
        push.expect_nothing_forgotten();
    }
}

#[test]
fn an_error_that_stops_a_job_stops_it_once_for_each_resume() {
    for (read, operation) in [(true, "read: stop"), (false, "write: stop")] {
        for (policy, errno, status) in [
            (OnError::Stop, errno::EIO, "failed"),
            (OnError::Stop, errno::ENOSPC, "nospace"),
            (OnError::Enospc, errno::ENOSPC, "nospace"),
        ] {
            // All threads come upon it, and one of them tells.
            let push = Failing::start(read, 0..DISK_BYTES, errno, policy);
            push.expect(&["created", "running", operation, "paused"]);
            assert_eq!(push.jobs.infos()[0].io_status.name(), status);
            assert!(info(&push.fleece, "a/x").busy);
            push.jobs.resume("ja").unwrap();
            push.expect(&["running", operation, "paused"]);
            push.mend();
            push.jobs.resume("ja").unwrap();
            push.expect(&["running"]);
            push.expect_well();
        }
    }
}

#[test]
fn a_job_that_stopped_for_an_error_can_be_cancelled() {
    for read in [true, false] {
        let push = Failing::start(read, ONE_GRANULE, errno::ENOSPC, OnError::Enospc);
        let operation = if read { "read: stop" } else { "write: stop" };
        push.expect(&["created", "running", operation, "paused"]);
        touch(&push.fleece, "a", &[1]);
        push.jobs.cancel("ja").unwrap();
        push.expect(&["running", "aborting", "cancelled", "concluded", "null"]);
        push.expect_nothing_forgotten();
    }
}
