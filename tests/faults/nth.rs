//! The n-th call fails, for every n.

use crate::rig::*;
use crate::scenario::{Outcome, run};
use fleecefs::error::errno;
use fleecefs::fleece::{Fleece, StoreErrorPolicy};
use fleecefs::storage::faulty::{Call, FaultPlan};
use std::sync::Arc;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Image,
    State,
    Store,
}

#[derive(Debug, Clone, Copy)]
struct Fault {
    place: Place,
    disk: &'static str,
    call: Call,
    nth: u64,
    errno: i32,
    policy: StoreErrorPolicy,
    keep: bool,
}

const CALLS: [Call; 8] =
    [Call::Read, Call::Write, Call::Sync, Call::SetLen, Call::Punch, Call::Zero, Call::Status, Call::Directory];

fn full() -> bool {
    std::env::var_os("FLEECEFS_FULL").is_some()
}

fn plan(host: &Host, place: Place, disk: &str) -> Arc<FaultPlan> {
    let files = &host.files[disk];
    match place {
        Place::Image => files.image_faults.clone(),
        Place::State => files.state_faults.clone(),
        Place::Store => files.store_faults.clone(),
    }
}

fn host(policy: StoreErrorPolicy, keep: bool) -> Host {
    Host::pair().with(|options| {
        options.on_store_error = policy;
        options.keep_snapshots = keep;
    })
}

/// How many calls of a kind the whole run makes, with mounts and stops.
fn count(place: Place, disk: &'static str, call: Call, policy: StoreErrorPolicy) -> u64 {
    let host = host(policy, true);
    let fleece = host.mount();
    let mut oracle = Oracle::new(&host);
    let outcome = run(&fleece, &mut oracle, |_, _| {});
    assert!(outcome.refused.is_empty(), "{outcome:?}");
    fleece.close().unwrap();
    plan(&host, place, disk).calls(call)
}

/// What a failing call may show. Never allowed: wrong bytes, and maps that miss a change.
fn allowed(fault: &Fault) -> Allow {
    Allow {
        broken: fault.place == Place::Store && fault.policy == StoreErrorPolicy::BreakSnapshot,
        // What was refused half-way may be marked all the same.
        more: true,
        lost: fault.place == Place::Image && fault.call == Call::Read,
        // It may strike the looking itself.
        retry: fault.place != Place::State,
    }
}

/// What a user sees after every step.
fn look(fleece: &Fleece, oracle: &Oracle, fault: &Fault) {
    // The guest's own reads would take the fault: those are looked at behind it.
    if (fault.place, fault.call) != (Place::Image, Call::Read) {
        oracle.check(fleece, allowed(fault));
    }
}

/// The snapshots with the number of their disks.
fn shown(fleece: &Fleece) -> Vec<(String, usize)> {
    fleece.snapshots().iter().map(|snapshot| (snapshot.name().to_owned(), snapshot.views().len())).collect()
}

/// One run with one fault: it must go on, refuse only what it could not do, and leave everything right.
fn strike(fault: Fault) -> (bool, Outcome) {
    let host = host(fault.policy, fault.keep);
    let fleece = host.mount();
    let mut oracle = Oracle::new(&host);
    let plan = plan(&host, fault.place, fault.disk);
    // The mount's own calls are struck elsewhere.
    if fault.nth <= plan.calls(fault.call) {
        return (false, Outcome::default());
    }
    plan.fail_nth(fault.call, fault.nth, fault.errno);
    let outcome = run(&fleece, &mut oracle, |fleece, oracle| look(fleece, oracle, &fault));
    let struck = plan.calls(fault.call) >= fault.nth;
    check_refusals(&fault, &outcome);
    let snapshots = shown(&fleece);
    // Then the image bears a note, and nothing is believed after a kill.
    let noted = fleece.counters().iter().any(|counter| counter.name == "tracking_errors" && counter.value > 0);
    if struck {
        oracle.check(&fleece, allowed(&fault));
    }
    let clean = !fault.nth.is_multiple_of(2);
    if !clean {
        // A kill.
        drop(fleece);
    } else {
        // A clean stop, which may be what is struck: then it counts as a kill.
        let _ = fleece.close();
        drop(fleece);
    }
    host.clear_faults();
    let fleece = host.mount();
    oracle.check(&fleece, allowed(&fault));
    let found = shown(&fleece);
    // What was refused half-way may have been decided either way.
    let open = |name: &str| outcome.refused.iter().any(|(step, _)| step.ends_with(name));
    let lost = snapshots.iter().find(|one| !found.contains(one) && !open(&one.0));
    let may = (clean && !fault.keep) || (!clean && noted);
    assert!(lost.is_none() || may, "{lost:?} is not there: {outcome:?}");
    // A stop that drops views is one of each disk for itself.
    let agree = found.iter().all(|one| one.1 == 2) || may;
    assert!(agree, "all disks agree: {found:?} of {snapshots:?} after {outcome:?}");
    oracle.check_all(&fleece, "probe", allowed(&fault));
    (struck, outcome)
}

/// The guest sees errors only where its own data could not be stored, or by policy.
fn check_refusals(fault: &Fault, outcome: &Outcome) {
    for (step, error) in &outcome.refused {
        let guest = ["write", "zeroes", "discard"].contains(step);
        let may = match fault.place {
            Place::Image => true,
            Place::State => !guest && *step != "flush",
            Place::Store => !guest || fault.policy == StoreErrorPolicy::FailWrite,
        };
        assert!(may, "{step} failed with {error}");
    }
    let guest_errors = outcome.refused.iter().filter(|(step, _)| ["write", "zeroes", "discard"].contains(step)).count();
    assert!(guest_errors <= 1, "one fault, one error of the guest: {outcome:?}");
}

fn sweep(place: Place) {
    let policies = [StoreErrorPolicy::BreakSnapshot, StoreErrorPolicy::FailWrite];
    let mut strikes = 0;
    for disk in PAIR {
        for call in CALLS {
            let calls = count(place, disk, call, policies[0]).max(count(place, disk, call, policies[1]));
            for nth in 1..=calls {
                for (index, (errno, policy)) in [
                    (errno::EIO, policies[0]),
                    (errno::ENOSPC, policies[1]),
                    (errno::ENOSPC, policies[0]),
                    (errno::EIO, policies[1]),
                ]
                .into_iter()
                .enumerate()
                {
                    // Without the full size, every place is struck once.
                    if !full() && index as u64 != nth / 2 % 4 {
                        continue;
                    }
                    let keep = nth / 8 % 2 == 0;
                    let fault = Fault { place, disk, call, nth, errno, policy, keep };
                    let done = std::panic::catch_unwind(|| strike(fault));
                    let Ok((struck, _)) = done else { panic!("{fault:?}") };
                    strikes += u64::from(struck);
                }
            }
        }
    }
    assert!(strikes > 20, "the faults strike: {strikes}");
}

#[test]
fn every_failing_call_on_the_image_is_the_guests_error_and_nothing_more() {
    sweep(Place::Image);
}

#[test]
fn every_failing_call_on_the_state_leaves_old_or_new_and_never_hurts_the_guest() {
    sweep(Place::State);
}

#[test]
fn every_failing_call_on_the_store_breaks_the_view_or_fails_the_write_by_policy() {
    sweep(Place::Store);
}

/// A mount that fails and is tried again finds what a mount without failure would have found.
#[test]
fn a_mount_that_failed_is_tried_again_from_the_same_facts() {
    for clean in [false, true] {
        for disk in PAIR {
            for place in [Place::State, Place::Image] {
                for call in CALLS {
                    for nth in 1.. {
                        if !mount_twice(clean, disk, place, call, nth) {
                            break;
                        }
                    }
                }
            }
        }
    }
}

/// False: the mount does not make that many calls.
fn mount_twice(clean: bool, disk: &'static str, place: Place, call: Call, nth: u64) -> bool {
    let host = host(StoreErrorPolicy::BreakSnapshot, true);
    let fleece = host.mount();
    let mut oracle = Oracle::new(&host);
    run(&fleece, &mut oracle, |_, _| {});
    let before = shown(&fleece);
    if clean {
        fleece.close().unwrap();
    }
    drop(fleece);
    host.clear_faults();
    let plan = plan(&host, place, disk);
    plan.fail_nth(call, nth, errno::EIO);
    let fleece = host.empty_mount();
    let failed = PAIR.into_iter().any(|name| host.attach(&fleece, name).is_err());
    let struck = plan.calls(call) >= nth;
    drop(fleece);
    host.clear_faults();
    let fleece = host.mount();
    let what = format!("clean {clean}, disk {disk}, {place:?} {call:?} {nth}, failed {failed}");
    assert_eq!(shown(&fleece), before, "{what}");
    // Bits that a mount could not read count as all set, and it went on.
    let allow = Allow { more: !failed, ..EXACT };
    let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| oracle.check_all(&fleece, "probe", allow)));
    assert!(done.is_ok(), "{what}");
    struck
}

/// Flushes of a stop, too: what is not durable is not called so.
#[test]
fn a_stop_whose_saving_fails_is_told_and_leaves_no_stale_good_state() {
    let baseline = |host: &Host| {
        let fleece = host.mount();
        let mut oracle = Oracle::new(host);
        run(&fleece, &mut oracle, |_, _| {});
        (fleece, oracle)
    };
    for errno in [errno::EIO, errno::ENOSPC] {
        for call in [Call::Write, Call::Sync] {
            for place in [Place::State, Place::Image] {
                let host = host(StoreErrorPolicy::BreakSnapshot, false);
                let (fleece, mut oracle) = baseline(&host);
                plan(&host, place, "a").fail_all(call, errno);
                let closed = fleece.close();
                if place == Place::State || call == Call::Sync {
                    assert_errno(closed, errno);
                }
                drop(fleece);
                host.clear_faults();
                let fleece = host.mount();
                // An image that could not be synced may fall behind what a backup has read.
                oracle.check_all(&fleece, "probe", Allow { more: place == Place::Image, ..EXACT });
                let infos = fleece.disk_infos();
                assert_eq!(infos[1].tracking, "exact", "the other disk was saved");
                if place == Place::State || call == Call::Sync {
                    assert_ne!(infos[0].tracking, "exact");
                }
            }
        }
    }
}
