//! A fixed run of everything that changes a disk or its state, which goes on whatever fails.

use crate::rig::*;
use fleecefs::error::Result;
use fleecefs::fleece::Fleece;
use std::sync::Arc;

/// What went wrong in a run: the steps that were refused.
#[derive(Debug, Default)]
pub struct Outcome {
    pub refused: Vec<(&'static str, i32)>,
}

impl Outcome {
    fn note<T>(&mut self, step: &'static str, result: Result<T>) {
        if let Err(e) = result {
            self.refused.push((step, e.errno()));
        }
    }
}

/// Guest writes, zeroes and discards of both disks; `seed` keeps the rounds apart.
fn guest(oracle: &mut Oracle, fleece: &Fleece, seed: u8, outcome: &mut Outcome) {
    let at = u64::from(seed) * 9 * CHUNK % (DISK_BYTES / 2);
    for disk in PAIR {
        outcome.note("write", oracle.write(fleece, disk, at, 3 * CHUNK + 77, seed));
        outcome.note("write", oracle.write(fleece, disk, at + 5 * CHUNK + 100, 200, seed));
        outcome.note("zeroes", oracle.zero(fleece, disk, at + 8 * CHUNK - 50, CHUNK, false));
        outcome.note("discard", oracle.zero(fleece, disk, at + 11 * CHUNK, 2 * CHUNK, true));
        outcome.note("write", oracle.write(fleece, disk, DISK_BYTES - 1000, 900, seed));
    }
}

/// The whole run, up to but without the clean stop. `check` is called after every step.
pub fn run(fleece: &Arc<Fleece>, oracle: &mut Oracle, check: impl Fn(&Fleece, &Oracle)) -> Outcome {
    let mut outcome = Outcome::default();
    let mut seed = 0;
    let mut step = |name: &'static str, oracle: &mut Oracle, outcome: &mut Outcome, result: Result<()>| {
        outcome.note(name, result);
        seed += 1;
        check(fleece, oracle);
        guest(oracle, fleece, seed, outcome);
        check(fleece, oracle);
    };
    step("start", oracle, &mut outcome, Ok(()));
    let done = oracle.freeze(fleece, "s1").map(drop);
    step("create s1", oracle, &mut outcome, done);
    step("complete s1", oracle, &mut outcome, fleece.complete_snapshot("s1", Some("daily")));
    let done = oracle.freeze(fleece, "s2").map(drop);
    step("create s2", oracle, &mut outcome, done);
    (0..2).for_each(|_| fleece.disarm_idle());
    let done = oracle.freeze(fleece, "s3").map(drop);
    step("create s3", oracle, &mut outcome, done);
    let done = oracle.grow(fleece, "a", DISK_BYTES + 3 * CHUNK);
    step("grow", oracle, &mut outcome, done);
    step("cancel s3", oracle, &mut outcome, fleece.cancel_snapshot("s3"));
    let done = oracle.freeze(fleece, "s4").map(drop);
    step("create s4", oracle, &mut outcome, done);
    fleece.reap();
    step("complete s2", oracle, &mut outcome, fleece.complete_snapshot("s2", Some("daily")));
    fleece.reap();
    step("cancel s4", oracle, &mut outcome, fleece.cancel_snapshot("s4"));
    step("delete s1", oracle, &mut outcome, fleece.delete_checkpoint("s1"));
    (0..2).for_each(|_| fleece.disarm_idle());
    let done = oracle.freeze(fleece, "s5").map(drop);
    step("create s5", oracle, &mut outcome, done);
    fleece.reap();
    for disk in fleece.disks() {
        outcome.note("flush", disk.flush());
    }
    outcome
}
