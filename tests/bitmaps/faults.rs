//! Batches and the ends of holds cut at every change of the state, by a kill or by state that fails, while the guest
//! writes: each disk has all of the batch or nothing of it, exactly, and after a kill all disks the same.

use crate::blank;
use crate::medium::{Cut, CutDir, Killed, Mode};
use crate::rig::*;
use crate::steps::*;
use fleecefs::bitmap::DirtyBitmap;
use fleecefs::fleece::{Action, Fleece, HoldEnd, Place};
use fleecefs::storage::Dir;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;

/// Granules of a disk, and its size in bytes: as much as an image of `blank` can have.
const GRANULES: u64 = 32;
const SIZE: u64 = GRANULES * GRANULE;

/// What is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum What {
    /// A batch on one disk.
    One,
    /// The same on two.
    Both,
    /// With a snapshot.
    Snapshot,
    /// On one disk in a qcow2 image, which is cut too; nobody writes meanwhile.
    Qcow2,
    /// Holds on two disks end: the bitmaps are clear since the holds began.
    Abdicate,
    /// They have granule 0 and what was written since.
    With,
}

use What::*;

struct Rig {
    host: Host,
    cut: Arc<Cut>,
    disks: &'static [&'static str],
    qcow2: bool,
}

/// Name of a qcow2 image beside its state.
const IMAGE: &str = "image.qcow2";

impl Rig {
    fn mount(&self) -> Arc<Fleece> {
        let fleece = self.host.empty_mount();
        for name in self.disks {
            let files = &self.host.files[name];
            let state = CutDir { inner: Arc::new(files.state.clone()), cut: self.cut.clone() };
            if self.qcow2 {
                let image = blank::open(state.open(IMAGE).unwrap()).unwrap();
                let place =
                    Place { state: Arc::new(state), stores: Arc::new(files.stores.clone()), shm: None, lock: None };
                fleece.attach(name, image, place).unwrap();
                continue;
            }
            let (image, stores) = (files.image.shared(), Arc::new(files.stores.clone()));
            attach_over(&fleece, name, image, Arc::new(state), stores, false).unwrap();
        }
        fleece
    }

    fn each(&self, fleece: &Fleece, steps: impl Fn(&str) -> Vec<Action>) {
        self.disks.iter().for_each(|disk| drop(apply(fleece, &steps(disk))));
    }

    fn touch(&self, fleece: &Fleece, granules: &[u64]) {
        self.disks.iter().for_each(|disk| touch(fleece, disk, granules));
    }
}

fn at(disk: &str, name: &str) -> String {
    format!("{disk}/{name}")
}

/// What happens at the one instant: to the bitmaps `x`, `z` and `gone`, which have what `all` has.
fn batch(disks: &[&str]) -> Vec<Action> {
    let of = |disk: &&str| {
        let name = |name| at(disk, name);
        [
            add(&name("new")),
            merge(&name("m"), &[&name("x")]),
            merge(&name("e"), &[&name("x")]),
            enable(&name("e")),
            clear(&name("x")),
            disable(&name("z")),
            remove(&name("gone")),
        ]
    };
    disks.iter().flat_map(of).collect()
}

/// Whether the change happened on a disk; either way every bitmap is exactly right.
fn happened(fleece: &Fleece, what: What, disk: &str) -> bool {
    let (hash, name) = (|name| hash(fleece, &at(disk, name)), |name| at(disk, name));
    let there = names(fleece, disk);
    if matches!(what, Abdicate | With) {
        // `x` was held at the instant at which `since` was added.
        if hash("x") == hash("all") && hash("all") != hash("since") {
            return false;
        }
        let mut expected = hash("since");
        if what == With {
            apply(fleece, &[transient(&name("expected")), merge(&name("expected"), &[&name("since"), &name("bit0")])]);
            expected = crate::steps::hash(fleece, &name("expected"));
            apply(fleece, &[remove(&name("expected"))]);
        }
        assert_eq!(hash("x"), expected);
        return true;
    }
    if !there.contains(&"new".to_owned()) {
        let all = hash("all");
        assert_eq!([hash("x"), hash("z"), hash("gone")], [all.clone(), all.clone(), all]);
        assert_eq!([count(fleece, &name("m")), count(fleece, &name("e"))], [0, 0]);
        assert!(info(fleece, &name("z")).recording);
        return false;
    }
    assert!(!there.contains(&"gone".to_owned()) && !info(fleece, &name("z")).recording);
    assert_eq!([hash("x"), hash("m"), hash("e")], [hash("new"), hash("z"), hash("all")]);
    apply(fleece, &[transient(&name("sum")), merge(&name("sum"), &[&name("m"), &name("new")])]);
    assert_eq!(hash("sum"), hash("all"));
    apply(fleece, &[remove(&name("sum"))]);
    if there.contains(&"s".to_owned()) {
        assert_eq!(hash("s"), hash("new"));
    }
    true
}

fn killable<T>(run: impl FnOnce() -> T) -> Option<T> {
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(done) => Some(done),
        Err(payload) if payload.is::<Killed>() => None,
        Err(payload) => resume_unwind(payload),
    }
}

/// Cuts at change `n`. False: it makes no so many.
fn cut_at(what: What, mode: Mode, n: u64) -> bool {
    let disks = disks_of(what);
    let rig = Rig { host: Host::new(disks, SIZE), cut: Cut::new(mode), disks, qcow2: what == Qcow2 };
    if rig.qcow2 {
        blank::make(rig.host.files["a"].state.create(IMAGE).unwrap(), SIZE);
    }
    let mut fleece = rig.mount();
    rig.each(&fleece, |disk| {
        let name = |name| at(disk, name);
        let off = |bitmap| added(&name(bitmap), Some(GRANULE), true, true);
        let some = [add(&name("all")), add(&name("x")), add(&name("z")), add(&name("gone")), add(&name("bit0"))];
        some.into_iter().chain([off("m"), off("e")]).collect()
    });
    if rig.qcow2 {
        fleece.close().unwrap();
        drop(fleece);
        fleece = rig.mount();
    }
    rig.touch(&fleece, &[0]);
    rig.each(&fleece, |disk| vec![disable(&at(disk, "bit0"))]);
    rig.touch(&fleece, &[1]);
    let mut holds = Vec::new();
    if matches!(what, Abdicate | With) {
        let steps: Vec<_> = disks.iter().flat_map(|disk| [hold(&at(disk, "x")), add(&at(disk, "since"))]).collect();
        holds = apply(&fleece, &steps).holds;
        rig.touch(&fleece, &[2]);
    }
    let guest = fleece.clone();
    let touched = disks.to_vec();
    if !rig.qcow2 {
        rig.cut.meanwhile(Some(Box::new(move |number| {
            touched.iter().for_each(|disk| touch(&guest, disk, &[3 + number % (GRANULES - 5)]));
        })));
    }
    rig.cut.arm(n);
    let done = killable(|| match what {
        One | Both | Qcow2 => fleece.apply(&batch(disks)).map(drop).map_err(|e| e.text),
        Snapshot => {
            let mut steps = batch(disks);
            steps.insert(2, snapshot("s"));
            fleece.apply(&steps).map(drop).map_err(|e| e.text)
        }
        Abdicate => {
            let ends: Vec<_> = holds.iter().map(|hold| (hold, HoldEnd::Abdicate)).collect();
            fleece.end_holds(&ends).map_err(|e| e.to_string())
        }
        With => {
            let bits = || {
                let bits = DirtyBitmap::heap(GRANULE, SIZE).unwrap();
                bits.mark(0, 1);
                bits
            };
            let ends: Vec<_> = holds.iter().map(|hold| (hold, HoldEnd::ReclaimWith(bits()))).collect();
            fleece.end_holds(&ends).map_err(|e| e.to_string())
        }
    });
    let struck = rig.cut.struck();
    rig.cut.meanwhile(None);
    if mode == Mode::FailOnce || !struck {
        rig.cut.arm(0);
    }
    if let Some(done) = &done {
        // What comes after the commit is clearing up, and may fail.
        assert!(done.is_ok() || struck, "{done:?}");
        rig.touch(&fleece, &[GRANULES - 2]);
        if done.is_err() && mode == Mode::FailOnce {
            // What failed can be tried, and nothing of it is seen; held bitmaps go on being held.
            drop(std::mem::take(&mut holds));
            let _ = fleece.apply(&[]);
            assert!(disks.iter().all(|disk| !happened(&fleece, what, disk)));
        } else if done.is_ok() && (mode == Mode::FailOnce || !struck) {
            assert!(disks.iter().all(|disk| happened(&fleece, what, disk)));
        }
    }
    let was_ok = matches!(done, Some(Ok(())));
    drop((holds, fleece));
    // A kill.
    rig.cut.arm(0);
    let fleece = rig.mount();
    let all: Vec<bool> = disks.iter().map(|disk| happened(&fleece, what, disk)).collect();
    if was_ok {
        assert!(all.iter().all(|happened| *happened), "what was answered is lost");
    }
    if mode == Mode::Kill {
        assert!(all.iter().all(|happened| *happened == all[0]), "disks disagree: {all:?}");
    }
    rig.touch(&fleece, &[GRANULES - 1]);
    let again: Vec<bool> = disks.iter().map(|disk| happened(&fleece, what, disk)).collect();
    assert_eq!(again, all);
    let before = state(&fleece);
    fleece.close().unwrap();
    drop(fleece);
    let fleece = rig.mount();
    assert_eq!(state(&fleece), before);
    struck
}

fn disks_of(what: What) -> &'static [&'static str] {
    if matches!(what, One | Qcow2) { &["a"] } else { &PAIR }
}

fn cut_everywhere(mode: Mode) {
    // On a medium that is gone for good the guest cannot write to its image either.
    let for_good = matches!(mode, Mode::Fail | Mode::FailMade);
    for what in [One, Qcow2, Both, Snapshot, Abdicate, With].into_iter().filter(|what| !for_good || *what != Qcow2) {
        let mut n = 1;
        loop {
            match catch_unwind(|| cut_at(what, mode, n)) {
                Ok(true) => n += 1,
                Ok(false) => break,
                Err(_) => panic!("{what:?} cut at change {n}, {mode:?}"),
            }
        }
        assert!(n > 4, "{what:?} makes {n} changes");
    }
}

#[test]
fn after_a_kill_at_any_change_a_batch_happened_on_all_disks_or_on_none() {
    cut_everywhere(Mode::Kill);
}

#[test]
fn a_batch_whose_state_fails_once_is_taken_back_exactly() {
    cut_everywhere(Mode::FailOnce);
}

#[test]
fn a_state_that_fails_from_any_change_on_leaves_each_disk_with_all_or_nothing() {
    cut_everywhere(Mode::Fail);
    cut_everywhere(Mode::FailMade);
}
