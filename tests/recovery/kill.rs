//! A kill at every change of the state, also inside the recovery; and state that fails from some change on, while the
//! guest goes on and is killed later.

use crate::medium::{Cut, CutDir, Killed, Mode};
use crate::rig::*;
use fleecefs::error::Result;
use fleecefs::fleece::Fleece;
use fleecefs::storage::Storage;
use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// What is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Action {
    Create,
    Complete,
    CompleteFor,
    Cancel,
    Delete,
    DeleteRecording,
    MoveConsumer,
    Grow,
    Shrink,
    Reap,
    Stop,
    StopKeeping,
}

const ACTIONS: [Action; 12] = [
    Action::Create,
    Action::Complete,
    Action::CompleteFor,
    Action::Cancel,
    Action::Delete,
    Action::DeleteRecording,
    Action::MoveConsumer,
    Action::Grow,
    Action::Shrink,
    Action::Reap,
    Action::Stop,
    Action::StopKeeping,
];

const MORE: Allow = Allow { more: true, ..EXACT };
const GROWN: u64 = DISK_BYTES + 2 * GRANULE;
const SHRUNK: u64 = 4 * GRANULE;

fn full() -> bool {
    std::env::var_os("FLEECEFS_FULL").is_some()
}

struct Rig {
    /// Whether all disks must show the same afterwards. A stop drops views disk by disk; and who decided for all is
    /// not asked where it is mounted later.
    agree: bool,
    /// Snapshots that some disks may have and others not, all the same.
    doubtful: &'static [&'static str],
    host: Host,
    cut: Arc<Cut>,
    oracle: Oracle,
}

impl Rig {
    fn new(action: Action, mode: Mode) -> (Rig, Arc<Fleece>) {
        let host = Host::pair().with(|options| options.keep_snapshots = action == Action::StopKeeping);
        let oracle = Oracle::new(&host);
        let mut rig = Rig { agree: action != Action::Stop, doubtful: &[], host, cut: Cut::new(mode), oracle };
        let fleece = rig.mount(&PAIR).unwrap();
        rig.guest(&fleece, 1);
        rig.freeze(&fleece, "s1");
        fleece.complete_snapshot("s1", Some("daily")).unwrap();
        rig.guest(&fleece, 2);
        rig.freeze(&fleece, "s2");
        rig.guest(&fleece, 3);
        rig.freeze(&fleece, "s3");
        rig.guest(&fleece, 4);
        match action {
            Action::Delete => {
                fleece.complete_snapshot("s2", None).unwrap();
                fleece.complete_snapshot("s3", Some("daily")).unwrap();
                rig.freeze(&fleece, "s4");
            }
            Action::DeleteRecording => fleece.complete_snapshot("s3", None).unwrap(),
            Action::Shrink => {
                fleece.cancel_snapshot("s2").unwrap();
                fleece.cancel_snapshot("s3").unwrap();
                fleece.reap();
            }
            Action::Reap => {
                rig.freeze(&fleece, "s4");
                rig.guest(&fleece, 5);
                fleece.cancel_snapshot("s3").unwrap();
                rig.freeze(&fleece, "s5");
                fleece.complete_snapshot("s4", None).unwrap();
            }
            _ => {}
        }
        rig.guest(&fleece, 6);
        (rig, fleece)
    }

    fn mount(&self, order: &[&str]) -> Result<Arc<Fleece>> {
        let fleece = self.host.empty_mount();
        for name in order {
            let files = &self.host.files[name];
            let state = CutDir { inner: Arc::new(files.state.clone()), cut: self.cut.clone() };
            attach_over(&fleece, name, files.image.shared(), Arc::new(state), Arc::new(files.stores.clone()), false)?;
        }
        Ok(fleece)
    }

    fn freeze(&mut self, fleece: &Fleece, name: &str) {
        self.oracle.freeze(fleece, name).unwrap();
    }

    fn guest(&mut self, fleece: &Fleece, seed: u8) {
        for (index, disk) in PAIR.into_iter().enumerate() {
            let at = (u64::from(seed) * 13 + index as u64 * 7) * CHUNK % (3 * GRANULE);
            self.oracle.write(fleece, disk, at, 2 * CHUNK + 9, seed).unwrap();
            self.oracle.zero(fleece, disk, at + 5 * CHUNK, CHUNK + 100, seed.is_multiple_of(2)).unwrap();
        }
    }

    fn act(&mut self, fleece: &Fleece, action: Action) -> Result<()> {
        match action {
            Action::Create => self.oracle.freeze(fleece, "new").map(drop),
            Action::Complete => fleece.complete_snapshot("s2", None),
            Action::CompleteFor => fleece.complete_snapshot("s2", Some("daily")),
            Action::Cancel => fleece.cancel_snapshot("s3"),
            Action::Delete => fleece.delete_checkpoint("s2"),
            Action::DeleteRecording => fleece.delete_checkpoint("s3"),
            Action::MoveConsumer => fleece.set_consumer("daily", "s2"),
            Action::Grow => fleece.resize_disk("a", GROWN),
            Action::Shrink => fleece.resize_disk("a", SHRUNK),
            Action::Reap => {
                fleece.reap();
                Ok(())
            }
            Action::Stop | Action::StopKeeping => fleece.close(),
        }
    }

    /// A resize that was cut has happened or not.
    fn adopt_size(&mut self) {
        let size = self.host.files["a"].image.len().unwrap();
        assert!([DISK_BYTES, GROWN, SHRUNK].contains(&size));
        self.oracle.adopt_size("a", size);
    }

    fn check(&mut self, fleece: &Fleece, probe: &str, allow: Allow) {
        self.check_agreement(fleece);
        self.oracle.check_all(fleece, probe, allow);
        self.check_agreement(fleece);
    }

    fn check_agreement(&self, fleece: &Fleece) {
        for consumer in fleece.consumers() {
            assert!(!consumer.checkpoint.is_empty());
            assert!(!self.agree || consumer.disks == PAIR, "consumer '{}' moved on one disk only", consumer.name);
        }
        let mut halves = fleece.snapshots().into_iter().filter(|snapshot| snapshot.views().len() != 2);
        let half = halves.find(|snapshot| !self.doubtful.contains(&snapshot.name()));
        assert!(!self.agree || half.is_none(), "snapshot '{}' is on one disk only", half.unwrap().name());
    }
}

/// Runs what may be killed. None: it was.
fn killable<T>(run: impl FnOnce() -> T) -> Option<T> {
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(done) => Some(done),
        Err(payload) if payload.is::<Killed>() => None,
        Err(payload) => resume_unwind(payload),
    }
}

/// Snapshots that the action does not concern, and so must be there afterwards.
fn others(action: Action) -> BTreeSet<&'static str> {
    match action {
        Action::Create | Action::MoveConsumer | Action::Grow | Action::StopKeeping => ["s2", "s3"].into(),
        Action::Complete | Action::CompleteFor => ["s3"].into(),
        Action::Cancel | Action::DeleteRecording => ["s2"].into(),
        Action::Delete => ["s4"].into(),
        Action::Reap => ["s2", "s5"].into(),
        Action::Shrink | Action::Stop => BTreeSet::new(),
    }
}

/// Cuts `action` at change `n`. False: it makes no so many.
fn cut_at(action: Action, mode: Mode, n: u64, order: &[&str], allow: Allow) -> bool {
    let (mut rig, fleece) = Rig::new(action, mode);
    rig.agree &= order == PAIR;
    // The area that a disk was to grow by may be marked although it did not.
    let allow = Allow { more: allow.more || action == Action::Grow, ..allow };
    rig.cut.arm(n);
    let done = killable(|| rig.act(&fleece, action));
    let struck = rig.cut.struck();
    let goes_on = mode != Mode::Kill && ![Action::Stop, Action::StopKeeping].contains(&action);
    if goes_on {
        // The guest does not care for the state; what is shown is right.
        rig.oracle.adopt_size("a", fleece.disk("a").unwrap().size());
        rig.guest(&fleece, 7);
        rig.oracle.check(&fleece, allow);
        rig.guest(&fleece, 8);
    }
    drop((done, fleece));
    rig.cut.arm(0);
    rig.adopt_size();
    let fleece = rig.mount(order).unwrap();
    let shown: BTreeSet<String> = fleece.snapshots().iter().map(|s| s.name().to_owned()).collect();
    for name in others(action) {
        assert!(shown.contains(name), "snapshot '{name}' is lost: {shown:?}");
    }
    rig.check(&fleece, "probe-1", allow);
    rig.guest(&fleece, 9);
    rig.check(&fleece, "probe-2", allow);
    // Nothing of it hurts later: all can be dropped, and no space is left behind.
    for snapshot in fleece.snapshots() {
        fleece.cancel_snapshot(snapshot.name()).unwrap();
    }
    fleece.reap();
    wait_for("all stores are removed", || rig.host.files.values().all(|files| files.layers().is_empty()));
    fleece.close().unwrap();
    drop(fleece);
    let fleece = rig.mount(&PAIR).unwrap();
    rig.check(&fleece, "probe-3", allow);
    struck
}

fn cut_everywhere(actions: &[Action], mode: Mode, order: &[&str], allow: Allow) {
    for &action in actions {
        let mut n = 1;
        loop {
            let done = catch_unwind(|| cut_at(action, mode, n, order, allow));
            match done {
                Ok(true) => n += 1,
                Ok(false) => break,
                Err(_) => panic!("{action:?} cut at change {n}, {mode:?}, mounted as {order:?}"),
            }
        }
        assert!(n > 2 || action == Action::Reap, "{action:?} makes {n} changes");
    }
}

#[test]
fn after_a_kill_at_any_change_views_and_maps_are_exact_and_the_disks_agree() {
    cut_everywhere(&ACTIONS, Mode::Kill, &PAIR, EXACT);
}

/// The first disk in name order decides for all. Where it is not there yet, the others go without the change.
#[test]
fn in_any_order_of_mounting_after_a_kill_views_are_right_and_no_change_is_missing() {
    use Action::*;
    cut_everywhere(&[Create, Complete, CompleteFor, Cancel, MoveConsumer], Mode::Kill, &["b", "a"], EXACT);
}

#[test]
fn a_state_that_fails_from_any_change_on_costs_no_view_and_no_change() {
    cut_everywhere(&ACTIONS, Mode::Fail, &PAIR, MORE);
}

#[test]
fn a_state_whose_failing_change_was_made_all_the_same_costs_no_view_and_no_change() {
    cut_everywhere(&ACTIONS, Mode::FailMade, &PAIR, MORE);
}

/// Only one disk's state fails, from every change on: the other disk can make and record what it likes.
#[test]
fn one_disk_whose_state_fails_does_not_make_the_other_disagree() {
    use Action::*;
    for broken in PAIR {
        for mode in [Mode::Fail, Mode::FailMade] {
            for action in [Create, Complete, CompleteFor, Cancel, MoveConsumer] {
                for n in 1.. {
                    let done = catch_unwind(|| cut_one(action, mode, broken, n));
                    match done {
                        Ok(true) => {}
                        Ok(false) => break,
                        Err(_) => panic!("{action:?}, state of {broken} fails from change {n} on, {mode:?}"),
                    }
                }
            }
        }
    }
}

fn cut_one(action: Action, mode: Mode, broken: &str, n: u64) -> bool {
    let allow = MORE;
    let (mut rig, fleece) = Rig::new(action, mode);
    // A snapshot that was refused is taken back disk by disk: what one that fails holds by then is in doubt.
    rig.doubtful = &["new", "later"];
    drop(fleece);
    let healthy = Cut::new(mode);
    let fleece = rig.host.empty_mount();
    for name in PAIR {
        let files = &rig.host.files[name];
        let cut = if name == broken { rig.cut.clone() } else { healthy.clone() };
        let state = CutDir { inner: Arc::new(files.state.clone()), cut };
        attach_over(&fleece, name, files.image.shared(), Arc::new(state), Arc::new(files.stores.clone()), false)
            .unwrap();
    }
    rig.cut.arm(n);
    let _ = rig.act(&fleece, action);
    rig.guest(&fleece, 7);
    rig.oracle.check(&fleece, allow);
    // Other operations go on, where they can, and settle nothing wrongly.
    let _ = rig.oracle.freeze(&fleece, "later").map(drop);
    rig.guest(&fleece, 8);
    rig.oracle.check(&fleece, allow);
    let struck = rig.cut.struck();
    drop(fleece);
    rig.cut.arm(0);
    let fleece = rig.mount(&PAIR).unwrap();
    rig.check(&fleece, "probe-1", allow);
    rig.guest(&fleece, 9);
    rig.check(&fleece, "probe-2", allow);
    struck
}

/// A recovery that is killed again and again starts from the same facts.
#[test]
fn a_kill_inside_the_recovery_loses_nothing() {
    for action in [Action::Create, Action::CompleteFor, Action::Delete, Action::Grow, Action::StopKeeping] {
        for n in 1.. {
            let mut m = 1;
            let struck = loop {
                match catch_unwind(|| recover_twice(action, n, m)) {
                    Ok((struck, false)) => break struck,
                    Ok((_, true)) => m += if full() { 1 } else { 1 + n % 3 },
                    Err(_) => panic!("{action:?} killed at change {n}, the recovery at change {m}"),
                }
            };
            if !struck {
                break;
            }
        }
    }
}

/// Whether the action was killed at change `n`, and the recovery at change `m`.
fn recover_twice(action: Action, n: u64, m: u64) -> (bool, bool) {
    let (mut rig, fleece) = Rig::new(action, Mode::Kill);
    rig.cut.arm(n);
    let done = killable(|| rig.act(&fleece, action));
    let first = rig.cut.struck();
    drop((done, fleece));
    rig.adopt_size();
    let mut second = false;
    for _ in 0..2 {
        rig.cut.arm(m);
        second = killable(|| rig.mount(&PAIR).map(drop)).is_none();
    }
    rig.cut.arm(0);
    let fleece = rig.mount(&PAIR).unwrap();
    let shown: BTreeSet<String> = fleece.snapshots().iter().map(|s| s.name().to_owned()).collect();
    for name in others(action) {
        assert!(shown.contains(name), "snapshot '{name}' is lost: {shown:?}");
    }
    rig.check(&fleece, "probe", Allow { more: action == Action::Grow, ..EXACT });
    (first, second)
}

/// The guest writes while the state is being written: all of its writes are on one side of the instant, the same on
/// both disks, and those behind it are in the map, whatever becomes of the snapshot.
#[test]
fn guest_writes_during_a_snapshot_that_is_killed_are_in_the_view_or_in_the_map() {
    for mode in [Mode::Kill, Mode::FailOnce, Mode::Fail, Mode::FailMade] {
        for n in 1.. {
            match catch_unwind(|| write_meanwhile(mode, n)) {
                Ok(true) => {}
                Ok(false) => break,
                Err(_) => panic!("{mode:?} at change {n}"),
            }
        }
    }
}

/// Where the `number`-th write meanwhile goes: the later ones into granules that nobody else writes.
fn place(number: u64) -> u64 {
    let granule = if number < 5 { 0 } else { 5 - number % 2 };
    granule * GRANULE + number * 512
}

fn write_meanwhile(mode: Mode, n: u64) -> bool {
    let (mut rig, fleece) = Rig::new(Action::Create, mode);
    let disks: Vec<_> = PAIR.into_iter().map(|disk| fleece.disk(disk).unwrap()).collect();
    let writes = Arc::new(AtomicU64::new(0));
    let made = writes.clone();
    rig.cut.meanwhile(Some(Box::new(move |_| {
        let number = made.fetch_add(1, Ordering::SeqCst) + 1;
        for disk in &disks {
            disk.write(&[number as u8; 512], place(number)).unwrap();
        }
    })));
    rig.cut.arm(n);
    let done = killable(|| rig.act(&fleece, Action::Create));
    let struck = rig.cut.struck();
    rig.cut.meanwhile(None);
    let before: Vec<Vec<u8>> = PAIR.into_iter().map(|disk| rig.oracle.0[disk].live.clone()).collect();
    for disk in PAIR {
        rig.oracle.story(disk).live = read_image(&rig.host.files[disk].image);
    }
    let writes = writes.load(Ordering::SeqCst);
    if mode == Mode::FailOnce {
        rig.cut.arm(0);
        rig.check_instant(&fleece, &before, writes);
    }
    drop((done, fleece));
    rig.cut.arm(0);
    let fleece = rig.mount(&PAIR).unwrap();
    rig.check_instant(&fleece, &before, writes);
    struck
}

impl Rig {
    /// The snapshot `new`, if there is one, is of one instant among the writes meanwhile, and no map misses any. Without
    /// its views there is no checkpoint of it either.
    fn check_instant(&mut self, fleece: &Fleece, before: &[Vec<u8>], writes: u64) {
        let mut seen = BTreeSet::new();
        if let Ok(snapshot) = fleece.snapshot("new") {
            for (view, before) in snapshot.views().iter().zip(before) {
                let frozen = read_view(view, 0, view.size()).unwrap();
                let (count, expected) = replay(before, &frozen, writes);
                assert_same(&frozen, &expected, "view during writes");
                seen.insert(count);
                self.oracle.adopt_point(view.disk_name(), "new", frozen);
            }
        } else {
            let left = fleece.checkpoints().into_iter().find(|checkpoint| checkpoint.name == "new");
            assert!(left.is_none(), "of a snapshot without views there is {left:?}");
        }
        assert!(seen.len() <= 1, "one instant for both disks: {seen:?} writes");
        self.check(fleece, "probe", MORE);
    }
}

/// How many of the writes meanwhile a view holds, and what it must be with the first so many.
fn replay(before: &[u8], frozen: &[u8], writes: u64) -> (u64, Vec<u8>) {
    let mut expected = before.to_vec();
    for number in 1..=writes {
        let at = place(number) as usize;
        if frozen[at] == expected[at] {
            return (number - 1, expected);
        }
        expected[at..at + 512].fill(number as u8);
    }
    (writes, expected)
}
