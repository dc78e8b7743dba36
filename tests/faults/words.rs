//! The memory outside the process is full, or refuses: every such call fails once, at every place of the scenario.

use crate::rig::*;
use crate::scenario::run;
use fleecefs::error::{Error, Result, errno};
use fleecefs::storage::shm::HeapShmRoot;
use fleecefs::storage::{Shm, ShmRoot, Words};
use std::panic::catch_unwind;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Create,
    Open,
    Remove,
}

/// Fails one call of a kind.
#[derive(Debug)]
struct Plan {
    kind: Kind,
    nth: AtomicU64,
    calls: AtomicU64,
}

impl Plan {
    fn pass(&self, kind: Kind, name: &str) -> Result<()> {
        let failing =
            self.kind == kind && self.calls.fetch_add(1, Ordering::SeqCst) + 1 == self.nth.load(Ordering::SeqCst);
        if failing { Err(Error::new(errno::ENOSPC, format!("words '{name}'"), "on purpose")) } else { Ok(()) }
    }
}

#[derive(Debug)]
struct FailingRoot {
    inner: HeapShmRoot,
    plan: Arc<Plan>,
}

#[derive(Debug)]
struct FailingShm {
    inner: Box<dyn Shm>,
    plan: Arc<Plan>,
}

impl FailingRoot {
    fn wrap(&self, inner: Box<dyn Shm>) -> Box<dyn Shm> {
        Box::new(FailingShm { inner, plan: self.plan.clone() })
    }
}

impl ShmRoot for FailingRoot {
    fn create(&self, id: &str) -> Result<Box<dyn Shm>> {
        self.plan.pass(Kind::Create, id)?;
        self.inner.create(id).map(|shm| self.wrap(shm))
    }
    fn find(&self, id: &str) -> Result<Option<Box<dyn Shm>>> {
        self.plan.pass(Kind::Open, id)?;
        Ok(self.inner.find(id)?.map(|shm| self.wrap(shm)))
    }
    fn boot_id(&self) -> String {
        self.inner.boot_id()
    }
    fn boot_ns(&self) -> i64 {
        self.inner.boot_ns()
    }
}

impl Shm for FailingShm {
    fn create(&self, name: &str, words: usize) -> Result<Words> {
        self.plan.pass(Kind::Create, name)?;
        self.inner.create(name, words)
    }
    fn open(&self, name: &str) -> Result<Option<Words>> {
        self.plan.pass(Kind::Open, name)?;
        self.inner.open(name)
    }
    fn remove(&self, name: &str) -> Result<()> {
        self.plan.pass(Kind::Remove, name)?;
        self.inner.remove(name)
    }
    fn remove_all(&self) -> Result<()> {
        self.plan.pass(Kind::Remove, "all")?;
        self.inner.remove_all()
    }
}

/// False: the run does not make that many calls.
fn strike(kind: Kind, nth: u64, in_mount: bool) -> bool {
    let mut host = Host::pair();
    let plan = Arc::new(Plan { kind, nth: AtomicU64::new(0), calls: AtomicU64::new(0) });
    host.shm = Arc::new(FailingRoot { inner: host.heap.clone(), plan: plan.clone() });
    let fleece = host.mount();
    let mut oracle = Oracle::new(&host);
    let arm = |nth: u64| {
        plan.calls.store(0, Ordering::SeqCst);
        plan.nth.store(nth, Ordering::SeqCst);
    };
    let allow = Allow { more: true, ..EXACT };
    arm(if in_mount { 0 } else { nth });
    let outcome = run(&fleece, &mut oracle, |fleece, oracle| oracle.check(fleece, allow));
    let guest = ["write", "zeroes", "discard", "flush"];
    assert!(outcome.refused.iter().all(|(step, _)| !guest.contains(step)), "no matter of the guest: {outcome:?}");
    let mut struck = plan.calls.load(Ordering::SeqCst) >= nth;
    arm(0);
    oracle.check_all(&fleece, "probe-1", allow);
    let shown = |fleece: &fleecefs::fleece::Fleece| fleece.snapshots().iter().map(|s| s.uuid()).collect::<Vec<_>>();
    let before = shown(&fleece);
    drop(fleece);
    if in_mount {
        arm(nth);
        let again = host.empty_mount();
        let _ = PAIR.into_iter().try_for_each(|name| host.attach(&again, name).map(drop));
        struck = plan.calls.load(Ordering::SeqCst) >= nth;
    }
    arm(0);
    let fleece = host.mount();
    if !in_mount {
        assert_eq!(shown(&fleece), before, "after a kill");
    }
    oracle.check_all(&fleece, "probe-2", allow);
    struck
}

#[test]
fn words_that_cannot_be_made_or_removed_cost_no_change_and_no_wrong_byte() {
    for in_mount in [false, true] {
        for kind in [Kind::Create, Kind::Open, Kind::Remove] {
            for nth in 1.. {
                match catch_unwind(|| strike(kind, nth, in_mount)) {
                    Ok(true) => {}
                    Ok(false) => break,
                    Err(_) => panic!("{kind:?} {nth} fails, in the mount: {in_mount}"),
                }
            }
        }
    }
}
