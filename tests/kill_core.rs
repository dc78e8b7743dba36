//! A kill -9 at every I/O call of a script on the unmounted core: views stay whole, maps stay exact enough.
//!
//! The script runs once for every moment: before, in the middle of and after each change of a file. There all that
//! outlives the process is copied, and a new process starts on the copy. A second pass lets the guest write at that
//! very moment first, where the core is in the middle of an operation that does not hold writes up: that is the write
//! whose old content lands in a layer that was published but never committed.

#![cfg(not(any(feature = "shuttle", loom)))]

#[path = "kill/blank.rs"]
mod blank;
#[path = "kill/camera.rs"]
mod camera;

use camera::{Camera, DISKS, Host};
use fleecefs::fleece::{Fleece, SnapshotRequest, View};
use fleecefs::image::Image;
use fleecefs::image::persistent::Trust;
use fleecefs::image::qcow2::check;
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Bytes per bit of a checkpoint's bitmap. The script writes the first page of granules.
const GRANULE: u64 = 65536;
const PAGE: usize = 4096;
const GRANULES: usize = 6;

/// What the first pages of a disk's granules hold.
type Content = [u8; GRANULES];

#[derive(Debug, Clone, Copy)]
enum Step {
    Write(usize, u8),
    Zero(usize),
    Discard(usize),
    Freeze(&'static str),
    Complete(&'static str),
    Cancel(&'static str),
    Delete(&'static str),
    Release(&'static str, usize),
    Reap,
    /// Every region is disarmed. What comes next is a write, which arms one: a write in the middle of anything else must
    /// not wait for the sidecar.
    Disarm,
}

/// Two generations under an old view: a middle layer is hidden and folded, a checkpoint that records is merged away.
const SCRIPT: &[Step] = &[
    Step::Write(0, 1),
    Step::Freeze("old"),
    Step::Write(0, 2),
    Step::Write(1, 3),
    Step::Freeze("middle"),
    Step::Write(1, 4),
    Step::Write(2, 5),
    Step::Zero(0),
    Step::Release("middle", 3),
    Step::Write(3, 6),
    Step::Freeze("new"),
    Step::Discard(1),
    Step::Write(4, 7),
    Step::Complete("middle"),
    Step::Reap,
    Step::Disarm,
    Step::Write(2, 8),
    Step::Delete("middle"),
    Step::Cancel("new"),
    Step::Write(3, 9),
    Step::Reap,
    Step::Freeze("last"),
    Step::Write(4, 10),
    Step::Complete("old"),
    Step::Reap,
    Step::Disarm,
    Step::Write(0, 11),
    Step::Disarm,
];

/// What the guest writes at the moment of the kill in the second pass.
const LATE: (usize, u8) = (5, 77);

/// What must be found after a kill at any moment of the present step.
#[derive(Debug, Clone, Default)]
struct Expected {
    live: Content,
    /// Views that the user has and keeps.
    views: Vec<(&'static str, Content)>,
    /// Checkpoints that there are and stay.
    points: Vec<(&'static str, Content)>,
    /// The snapshot that comes or goes in this step.
    passing: Option<(&'static str, Content)>,
    /// The granule that was released in a view, or is in this step.
    released: Vec<(&'static str, usize)>,
}

impl Expected {
    /// The step begins.
    fn begin(&mut self, step: Step) {
        match step {
            Step::Freeze(name) => self.passing = Some((name, self.live)),
            Step::Complete(name) => self.passing = take(&mut self.views, name),
            Step::Cancel(name) => {
                self.passing = take(&mut self.views, name);
                take(&mut self.points, name);
            }
            Step::Delete(name) => {
                take(&mut self.points, name);
            }
            Step::Release(name, granule) => self.released.push((name, granule)),
            Step::Write(..) | Step::Zero(_) | Step::Discard(_) | Step::Reap | Step::Disarm => (),
        }
    }

    /// The step is over.
    fn end(&mut self, step: Step) {
        match step {
            Step::Write(granule, byte) => self.live[granule] = byte,
            Step::Zero(granule) | Step::Discard(granule) => self.live[granule] = 0,
            Step::Freeze(_) => {
                self.views.extend(self.passing);
                self.points.extend(self.passing);
            }
            _ => (),
        }
        self.passing = None;
    }
}

fn take(list: &mut Vec<(&'static str, Content)>, name: &str) -> Option<(&'static str, Content)> {
    let index = list.iter().position(|(other, _)| *other == name)?;
    Some(list.remove(index))
}

fn freeze(fleece: &Fleece, name: &str) {
    fleece.create_snapshot(&SnapshotRequest { name: name.to_owned(), ..SnapshotRequest::default() }).unwrap();
}

fn write(fleece: &Fleece, granule: usize, byte: u8) {
    for disk in fleece.disks() {
        assert_eq!(disk.write(&[byte; PAGE], granule as u64 * GRANULE).unwrap(), PAGE);
    }
}

fn perform(fleece: &Fleece, step: Step) {
    let at = |granule: usize| granule as u64 * GRANULE;
    match step {
        Step::Write(granule, byte) => write(fleece, granule, byte),
        Step::Zero(granule) => {
            fleece.disks().iter().for_each(|disk| disk.write_zeroes(at(granule), PAGE as u64).unwrap());
        }
        Step::Discard(granule) => {
            fleece.disks().iter().for_each(|disk| disk.discard(at(granule), PAGE as u64).unwrap());
        }
        Step::Freeze(name) => freeze(fleece, name),
        Step::Complete(name) => fleece.complete_snapshot(name, None).unwrap(),
        Step::Cancel(name) => fleece.cancel_snapshot(name).unwrap(),
        Step::Delete(name) => fleece.delete_checkpoint(name).unwrap(),
        Step::Release(name, granule) => {
            DISKS.iter().for_each(|disk| fleece.release(name, disk, at(granule), PAGE as u64).unwrap());
        }
        Step::Reap => fleece.reap(),
        Step::Disarm => (0..2).for_each(|_| fleece.disarm_idle()),
    }
}

/// Whether the guest can write in the middle of a step: it holds no gate over its I/O.
fn lets_guests_in(step: Step) -> bool {
    matches!(step, Step::Freeze(_) | Step::Complete(_) | Step::Cancel(_) | Step::Delete(_) | Step::Reap)
}

/// Makes a host whose disks have that many bytes.
type NewHost = fn(usize) -> Host;

/// Runs the script up to the picture at `moment`, and hands it to `look`. False: the script ended before.
fn kill_at(new_host: NewHost, moment: u64, late_write: bool, look: fn(&Host, &Expected, bool)) -> bool {
    let host = new_host(GRANULES * GRANULE as usize);
    let first = host.mount(None);
    first.close().unwrap();
    let camera = Camera::new(&host, moment);
    let fleece = host.mount(Some(&camera));
    let mut expected = Expected::default();
    let wrote_late = Arc::new(Mutex::new(false));
    let mut last = None;
    for &step in SCRIPT {
        expected.begin(step);
        if late_write && lets_guests_in(step) {
            let (fleece, wrote) = (fleece.clone(), wrote_late.clone());
            camera.before_picture(Some(Box::new(move || {
                write(&fleece, LATE.0, LATE.1);
                *wrote.lock() = true;
            })));
        } else {
            camera.before_picture(None);
        }
        last = Some(step);
        perform(&fleece, step);
        if camera.taken() {
            break;
        }
        expected.end(step);
    }
    camera.before_picture(None);
    let Some(host) = camera.picture() else { return false };
    let late = *wrote_late.lock();
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| look(&host, &expected, late)));
    if let Err(panic) = outcome {
        eprintln!("killed at moment {moment}, in {last:?}, late write: {late}");
        std::panic::resume_unwind(panic);
    }
    true
}

fn content(view: &View) -> Content {
    std::array::from_fn(|granule| {
        let mut page = [0xee; PAGE];
        view.read(&mut page, granule as u64 * GRANULE).unwrap();
        assert!(page.iter().all(|byte| *byte == page[0]), "a torn page in a view");
        page[0]
    })
}

/// Compares a view with what it was frozen with, but for what was released.
fn assert_frozen(fleece: &Fleece, (name, frozen): (&str, Content), expected: &Expected, late: bool) {
    let snapshot = fleece.snapshot(name).unwrap_or_else(|e| panic!("{e}"));
    for view in snapshot.views() {
        assert_eq!(view.broken(), None);
        for (granule, byte) in frozen.iter().enumerate() {
            let released = expected.released.contains(&(name_of(expected, name), granule));
            let mut page = [0xee; PAGE];
            match view.read(&mut page, granule as u64 * GRANULE) {
                Ok(_) => {
                    let late = late && granule == LATE.0 && page == [LATE.1; PAGE];
                    assert!(page == [*byte; PAGE] || late, "view '{name}', granule {granule}: {}", page[0]);
                }
                Err(e) => assert!(released, "{e}"),
            }
        }
    }
}

/// The script's own spelling of a name.
fn name_of(expected: &Expected, name: &str) -> &'static str {
    expected.released.iter().map(|(known, _)| *known).find(|known| *known == name).unwrap_or("")
}

/// A new process on the picture.
fn look_at(host: &Host, expected: &Expected, late: bool) {
    let fleece = host.mount(None);
    for disk in fleece.disk_infos() {
        assert!(disk.tracking.starts_with("exact"), "{}", disk.tracking);
    }
    let shown: Vec<String> = fleece.snapshots().iter().map(|snapshot| snapshot.name().to_owned()).collect();
    for name in &shown {
        let known =
            expected.views.iter().any(|view| view.0 == name) || expected.passing.is_some_and(|view| view.0 == name);
        assert!(known, "snapshot '{name}' came back");
    }
    let passing = expected.passing.filter(|(name, _)| shown.iter().any(|other| other == name));
    let check = |fleece: &Fleece| {
        expected.views.iter().for_each(|view| assert_frozen(fleece, *view, expected, false));
        passing.iter().for_each(|view| assert_frozen(fleece, *view, expected, late));
    };
    check(&fleece);
    check_maps(&fleece, expected);
    // The states that were found again go on to protect the views.
    for granule in 0..GRANULES {
        write(&fleece, granule, 99);
    }
    check(&fleece);
    fleece.reap();
    check(&fleece);
    fleece.close().unwrap();
}

/// Everything that differs from a checkpoint is in the map since it.
fn check_maps(fleece: &Fleece, expected: &Expected) {
    freeze(fleece, "end");
    for (name, old) in &expected.points {
        for view in fleece.snapshot("end").unwrap().views() {
            let base = view.since().into_iter().find(|point| point.name == *name);
            let base = base.unwrap_or_else(|| panic!("checkpoint '{name}' is gone"));
            let map = view.map(Some(base.uuid)).unwrap();
            assert_eq!(map.everything(), None);
            for (granule, old) in old.iter().enumerate() {
                let offset = granule as u64 * GRANULE;
                let mut page = [0xee; PAGE];
                view.read(&mut page, offset).unwrap();
                let same = page == [*old; PAGE];
                assert!(same || map.dirty_run(offset, 1).0, "granule {granule} is not in the map since '{name}'");
            }
        }
    }
}

/// The new process is killed too, at every moment of its start; the third one looks.
fn look_after_a_killed_start(host: &Host, expected: &Expected, late: bool) {
    for moment in 0.. {
        let host = host.copy();
        let camera = Camera::new(&host, moment);
        host.mount(Some(&camera));
        let Some(host) = camera.picture() else { return };
        look_at(&host, expected, late);
    }
}

/// Kills at every `stride`-th moment.
fn kill_at_moments(new_host: NewHost, stride: usize, late_write: bool, look: fn(&Host, &Expected, bool)) {
    let moment = (0..).step_by(stride).find(|moment| !kill_at(new_host, *moment, late_write, look));
    assert!(moment.is_some_and(|moment| moment > 200), "the script has fewer moments than it should: {moment:?}");
}

#[test]
fn a_kill_at_every_moment_leaves_views_and_maps_right() {
    kill_at_moments(Host::new, 1, false, look_at);
}

#[test]
fn a_write_and_a_kill_at_every_moment_leave_views_and_maps_right() {
    kill_at_moments(Host::new, 1, true, look_at);
}

/// Of the moments of the script one in 23, in CI; all of them with `FLEECEFS_FULL=1`.
#[test]
fn a_kill_at_every_moment_of_a_recovery_leaves_views_and_maps_right() {
    let stride = if std::env::var_os("FLEECEFS_FULL").is_some() { 1 } else { 23 };
    kill_at_moments(Host::new, stride, true, look_after_a_killed_start);
}

/// As [`look_at`], and at the bitmaps in the images.
fn look_at_bitmaps(host: &Host, expected: &Expected, late: bool) {
    for disk in 0..DISKS.len() {
        assert!(expected.live == Content::default() || good(host, disk).is_empty(), "good while the disk is written");
    }
    look_at(host, expected, late);
    for disk in 0..DISKS.len() {
        let report = check::check(&*host.file(disk)).unwrap();
        assert!(report.is_clean() && !report.dirty, "{:?}", report.findings);
        // A write by the new process into each granule; `late` or not, the bitmap of the checkpoint `end` has them too.
        let pages: Vec<u64> = (0..GRANULES as u64).map(|granule| granule * GRANULE / PAGE as u64).collect();
        let good = good(host, disk);
        assert_eq!(set_bits(&good["on"]), pages);
        assert_eq!(set_bits(&good["end"]), (0..GRANULES as u64).collect::<Vec<_>>());
        assert_eq!(good["off"][0], blank::OFF);
    }
}

/// As [`look_after_a_killed_start`], and at the bitmaps.
fn look_at_bitmaps_after_a_killed_start(host: &Host, expected: &Expected, late: bool) {
    for moment in (0..).step_by(3) {
        let host = host.copy();
        let camera = Camera::new(&host, moment);
        host.mount(Some(&camera));
        let Some(host) = camera.picture() else { return };
        look_at_bitmaps(&host, expected, late);
    }
}

/// The words of the bitmaps that an image calls good.
fn good(host: &Host, disk: usize) -> BTreeMap<String, Vec<u64>> {
    let image = blank::open(host.copy().file(disk)).unwrap();
    let persistent = image.persistent().unwrap();
    let good = persistent.list().unwrap().into_iter().filter(|stored| stored.trust == Trust::Good);
    good.map(|stored| (stored.name.clone(), persistent.load(&stored.name).unwrap())).collect()
}

fn set_bits(words: &[u64]) -> Vec<u64> {
    (0..words.len() as u64 * 64).filter(|bit| words[(bit / 64) as usize] >> (bit % 64) & 1 != 0).collect()
}

/// Of the moments one in 11, in CI; all of them with `FLEECEFS_FULL=1`.
#[test]
fn a_kill_under_qcow2_images_leaves_views_maps_and_bitmaps_right() {
    let full = std::env::var_os("FLEECEFS_FULL").is_some();
    kill_at_moments(Host::qcow2, if full { 1 } else { 11 }, true, look_at_bitmaps);
    kill_at_moments(Host::qcow2, if full { 7 } else { 131 }, false, look_at_bitmaps_after_a_killed_start);
}

/// A kill while the disks are closed, and while they are opened again.
#[test]
fn a_kill_at_every_moment_of_a_close_and_an_open_loses_no_bitmap() {
    for moment in 0.. {
        let host = Host::qcow2(GRANULES * GRANULE as usize);
        let camera = Camera::new(&host, moment);
        camera.pause(true);
        let fleece = host.mount(Some(&camera));
        freeze(&fleece, "start");
        write(&fleece, 2, 7);
        camera.pause(false);
        fleece.close().unwrap();
        drop(fleece);
        host.mount(Some(&camera));
        let Some(host) = camera.picture() else {
            assert!(moment > 100, "{moment} moments");
            return;
        };
        let fleece = host.mount(None);
        for disk in fleece.disk_infos() {
            assert!(disk.tracking.starts_with("exact"), "{}", disk.tracking);
        }
        freeze(&fleece, "end");
        for view in fleece.snapshot("end").unwrap().views() {
            let base = view.since().into_iter().find(|point| point.name == "start").unwrap();
            assert_eq!(view.map(Some(base.uuid)).unwrap().dirty_bytes(), GRANULE, "moment {moment}");
        }
        fleece.close().unwrap();
        for disk in 0..DISKS.len() {
            let good = good(&host, disk);
            assert_eq!(set_bits(&good["on"]), [2 * GRANULE / PAGE as u64], "moment {moment}");
            assert_eq!(good["off"][0], blank::OFF);
            assert!(set_bits(&good["end"]).is_empty());
            assert!(!good.contains_key("start"));
        }
    }
}

/// The script itself, without a kill, ends as it should.
#[test]
fn the_script_alone_is_right() {
    let host = Host::new(GRANULES * GRANULE as usize);
    let fleece = host.mount(None);
    let mut expected = Expected::default();
    for &step in SCRIPT {
        expected.begin(step);
        perform(&fleece, step);
        expected.end(step);
    }
    freeze(&fleece, "final");
    assert!(fleece.snapshot("final").unwrap().views().iter().all(|view| content(view) == expected.live));
    expected.views.iter().for_each(|view| assert_frozen(&fleece, *view, &expected, false));
    check_maps(&fleece, &expected);
}
