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
        let storage = Faulty { inner: self.file.shared(), plan: self.faults.clone() };
        PushSpec {
            sync,
            goal: Goal::Image(Arc::new(RawImage::over(Arc::new(storage), false).unwrap())),
            compress: false,
            on_source_error: OnError::Report,
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
