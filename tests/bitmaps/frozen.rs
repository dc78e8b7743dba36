//! Views of jobs: of the instant of their batch, and without a trace.

use crate::rig::*;
use crate::steps::*;
use fleecefs::error::errno;
use fleecefs::fleece::{Action, Fleece, HoldEnd};
use std::sync::atomic::{AtomicBool, Ordering};

fn frozen(disk: &str) -> Action {
    Action::Freeze { disk: disk.to_owned(), record: None }
}

fn recorded(disk: &str) -> Action {
    Action::Freeze { disk: disk.to_owned(), record: Some(GRANULE) }
}

/// Nothing is left of a view.
fn assert_no_trace(host: &Host, fleece: &Fleece) {
    fleece.reap();
    wait_for("the store is removed", || host.files["a"].layers().is_empty());
    assert!(fleece.snapshots().is_empty() && fleece.checkpoints().is_empty());
}

#[test]
fn a_jobs_view_is_of_its_instant_and_leaves_nothing() {
    let host = Host::one();
    let fleece = host.mount();
    let disk = fleece.disk("a").unwrap();
    disk.write(&pattern(1, 0, DISK_BYTES), 0).unwrap();
    let before = read_live(&disk, 0, DISK_BYTES);
    apply(&fleece, &[add("a/x")]);
    touch(&fleece, "a", &[1]);
    let old = read_live(&disk, 0, DISK_BYTES);
    let applied = apply(&fleece, &[recorded("a"), hold("a/x")]);
    assert_ne!(before, old);
    touch(&fleece, "a", &[1, 3]);
    let view = applied.frozen[0].view().clone();
    assert_eq!(read_view(&view, 0, DISK_BYTES).unwrap(), old);
    assert_eq!(granules_of(applied.frozen[0].overwritten().unwrap()), [1, 3]);
    assert_eq!(granules_of(applied.holds[0].bitmap()), [1]);
    assert!(fleece.snapshots().is_empty() && fleece.checkpoints().is_empty());
    // The disk stays as it is for the job.
    assert_errno(fleece.resize_disk("a", 2 * DISK_BYTES), errno::EBUSY);
    assert_errno(fleece.remove_disk("a"), errno::EBUSY);
    fleece.end_holds(&[(&applied.holds[0], HoldEnd::Abdicate)]).unwrap();
    assert_eq!(hash(&fleece, "a/x"), hash_of(&[1, 3]));
    drop((applied, view));
    assert_no_trace(&host, &fleece);
    fleece.resize_disk("a", 2 * DISK_BYTES).unwrap();
    // An older snapshot looks through it.
    freeze(&fleece, "s");
    let now = read_live(&disk, 0, DISK_BYTES);
    let applied = apply(&fleece, &[frozen("a"), snapshot("t"), frozen("a")]);
    touch(&fleece, "a", &[0, 2]);
    for view in [view_of(&fleece, "s", "a"), view_of(&fleece, "t", "a"), applied.frozen[1].view().clone()] {
        assert_eq!(read_view(&view, 0, DISK_BYTES).unwrap(), now);
    }
    drop(applied);
    fleece.reap();
    assert_eq!(read_view(&view_of(&fleece, "s", "a"), 0, DISK_BYTES).unwrap(), now);
    assert_eq!(read_view(&view_of(&fleece, "t", "a"), 0, DISK_BYTES).unwrap(), now);
}

#[test]
fn a_kill_in_a_job_leaves_no_view() {
    let host = Host::one();
    let fleece = host.mount();
    apply(&fleece, &[add("a/x")]);
    touch(&fleece, "a", &[0]);
    let applied = apply(&fleece, &[recorded("a"), hold("a/x")]);
    touch(&fleece, "a", &[1]);
    // As after a kill: nobody lets go of anything.
    std::mem::forget(applied);
    drop(fleece);
    let fleece = host.mount();
    assert_eq!(hash(&fleece, "a/x"), hash_of(&[0, 1]));
    assert!(!info(&fleece, "a/x").busy);
    assert_no_trace(&host, &fleece);
}

#[test]
fn a_batch_that_fails_leaves_no_view() {
    let host = Host::one();
    let fleece = host.mount();
    apply(&fleece, &[add("a/x")]);
    refused(&fleece, &[frozen("a"), Action::Abort]);
    refused(&fleece, &[frozen("none")]);
    assert_no_trace(&host, &fleece);
    // Each call on the state fails once.
    let mut refusals = 0;
    for nth in 1..40 {
        host.clear_faults();
        host.files["a"].state_faults.fail_nth(fleecefs::storage::faulty::Call::Write, nth, errno::EIO);
        let applied = fleece.apply(&[recorded("a"), clear("a/x"), hold("a/x")]);
        host.clear_faults();
        let done = applied.is_ok();
        refusals += u64::from(!done);
        drop(applied);
        // What failed is taken back before anything else.
        touch(&fleece, "a", &[nth % 4]);
        apply(&fleece, &[add("a/y")]);
        apply(&fleece, &[remove("a/y")]);
        assert_no_trace(&host, &fleece);
        if done {
            break;
        }
    }
    assert!(refusals > 1, "{refusals}");
}

/// What differs from the view was written after the instant, so what follows the bitmap says so.
#[test]
fn no_write_is_in_neither_the_view_nor_the_successor() {
    let host = Host::one();
    let fleece = host.mount();
    apply(&fleece, &[add("a/x")]);
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let (fleece, over) = (&fleece, &over);
        for writer in 0..2u64 {
            scope.spawn(move || {
                let disk = fleece.disk("a").unwrap();
                let mut number = 0u64;
                while !over.load(Ordering::Relaxed) {
                    number += 1;
                    disk.write(&number.to_le_bytes(), (number * 2 + writer) % 6 * GRANULE).unwrap();
                }
            });
        }
        for round in 0..150 {
            let applied = apply(fleece, &[recorded("a"), hold("a/x")]);
            let view = applied.frozen[0].view();
            std::thread::yield_now();
            for granule in 0..6 {
                let disk = fleece.disk("a").unwrap();
                let now = read_live(&disk, granule * GRANULE, 8);
                if now != read_view(view, granule * GRANULE, 8).unwrap() {
                    let overwritten = applied.frozen[0].overwritten().unwrap();
                    assert!(
                        overwritten.is_dirty(granule * GRANULE),
                        "round {round}: granule {granule} is not recorded"
                    );
                }
            }
            // What is different at a second instant is in the bitmap that followed, as it was then.
            fleece.end_holds(&[(&applied.holds[0], HoldEnd::Abdicate)]).unwrap();
            let later = apply(fleece, &[frozen("a"), hold("a/x")]);
            for granule in (0..6).map(|granule| granule * GRANULE) {
                let [then, now] = [view, later.frozen[0].view()].map(|view| read_view(view, granule, 8).unwrap());
                assert!(
                    then == now || later.holds[0].bitmap().is_dirty(granule),
                    "round {round}: {granule} is forgotten"
                );
            }
            drop(later);
            drop(applied);
            fleece.reap();
        }
        over.store(true, Ordering::Relaxed);
    });
}
