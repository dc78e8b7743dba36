//! Power loss under users' bitmaps: what a batch changed is there once it was answered, as a whole; no bitmap that
//! records, or did, misses a change without saying so.

use crate::blank::{make, open};
use crate::power::{Moments, Watched};
use crate::rig::*;
use crate::steps::*;
use fleecefs::fleece::{Environment, Fleece, HoldEnd, Options, Place};
use fleecefs::storage::crash::CrashDisk;
use fleecefs::storage::shm::HeapShmRoot;
use fleecefs::storage::{Dir, SharedStorage, Storage};
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

const SIZE: u64 = 8 * GRANULE;
/// The qcow2 image; the other disk is raw.
const QCOW2: &str = "b";

fn mount(disk: &CrashDisk, shm: &HeapShmRoot, watch: Option<&Arc<Moments>>) -> Arc<Fleece> {
    let env = Environment { shm: Arc::new(shm.clone()), background: false };
    let fleece = Fleece::with_environment(Options::default(), env);
    for name in PAIR {
        let mut image: SharedStorage = disk.open(&format!("{name}.img")).unwrap().shared();
        let mut dir: Arc<dyn Dir> = Arc::new(disk.dir(&format!("{name}.fleece")));
        if let Some(moments) = watch {
            image = Arc::new(Watched::<dyn Storage> { inner: image, moments: moments.clone() });
            dir = Arc::new(Watched::<dyn Dir> { inner: dir, moments: moments.clone() });
        }
        if name == QCOW2 {
            let place = Place { state: dir.clone(), stores: dir, shm: None, lock: None };
            fleece.attach(name, open(image).unwrap(), place).unwrap();
        } else {
            attach_over(&fleece, name, image, dir.clone(), dir, false).unwrap();
        }
    }
    fleece
}

/// The bitmaps of each disk that are persistent: whether they record, and their bits.
type Seen = BTreeMap<String, BTreeMap<String, (bool, u64)>>;

fn seen(fleece: &Fleece) -> Seen {
    let mut all = Seen::from(PAIR.map(|disk| (disk.to_owned(), BTreeMap::new())));
    for (disk, info, hash) in state(fleece) {
        // `blank`'s own have another granularity.
        if info.persistent && !info.checkpoint && !["on", "off"].contains(&info.name.as_str()) {
            let bits = (0..256).find(|bits| hash == hash_of(&granules(*bits))).unwrap_or(u64::MAX);
            assert!(bits != u64::MAX || info.inconsistent);
            // One whose bits are lost says so; then they don't matter.
            let bits = if info.inconsistent { u64::MAX } else { bits };
            all.get_mut(&disk).unwrap().insert(info.name, (info.recording || info.inconsistent, bits));
        }
    }
    all
}

fn granules(bits: u64) -> Vec<u64> {
    (0..8).filter(|granule| bits >> granule & 1 != 0).collect()
}

struct Run {
    moments: Arc<Moments>,
    /// From which moment on this is what is there at least.
    answered: Vec<(usize, Seen)>,
}

impl Run {
    fn note(&mut self, fleece: &Fleece) {
        let from = self.moments.taken.lock().unwrap().len();
        self.answered.push((from, seen(fleece)));
    }
}

fn run() -> Run {
    let moments = Arc::new(Moments::default());
    moments.disk.open("a.img").unwrap().shared().set_len(SIZE).unwrap();
    make(moments.disk.open("b.img").unwrap().shared(), SIZE);
    moments.disk.open("a.img").unwrap().shared().sync().unwrap();
    let mut run = Run { moments, answered: Vec::new() };
    let shm = HeapShmRoot::new();
    let open = |run: &Run| mount(&run.moments.disk, &shm, Some(&run.moments));
    let mut fleece = open(&run);
    run.note(&fleece);
    for round in 0..3u64 {
        for disk in PAIR {
            let name = |name: &str| format!("{disk}/{name}{round}");
            apply(&fleece, &[add(&name("x")), added(&name("m"), Some(GRANULE), true, true), transient(&name("t"))]);
            run.note(&fleece);
            touch(&fleece, disk, &[round, round + 3]);
            run.note(&fleece);
            apply(&fleece, &[merge(&name("m"), &[&name("x")]), disable(&name("x")), clear(&name("t"))]);
            run.note(&fleece);
        }
        let m = |disk: &str| format!("{disk}/m{round}");
        apply(&fleece, &[merge(&m("a"), &[&format!("b/x{round}")]), add(&format!("b/r{round}")), snapshot("s")]);
        fleece.cancel_snapshot("s").unwrap();
        run.note(&fleece);
        let hold = fleece.hold("b", &format!("m{round}")).unwrap();
        let rest = fleecefs::bitmap::DirtyBitmap::heap(GRANULE, SIZE).unwrap();
        rest.mark(7 * GRANULE, 1);
        fleece.end_holds(&[(&hold, HoldEnd::ReclaimWith(rest))]).unwrap();
        run.note(&fleece);
        apply(&fleece, &[remove(&format!("a/x{round}")), remove(&format!("b/x{round}"))]);
        run.note(&fleece);
        match round {
            0 => {
                fleece.close().unwrap();
                drop(fleece);
                fleece = open(&run);
            }
            1 => {
                drop(fleece);
                fleece = open(&run);
            }
            _ => (),
        }
        run.note(&fleece);
    }
    fleece.close().unwrap();
    run
}

/// What a power loss left of a disk is what was there before the batch that it cut, or after it.
fn fits(now: &BTreeMap<String, (bool, u64)>, then: &BTreeMap<String, (bool, u64)>) -> bool {
    now.keys().eq(then.keys())
        && now.iter().zip(then).all(|((_, now), (_, then))| {
            // What records may have more, for want of knowledge; what does not is exact.
            if then.0 { now.1 & then.1 == then.1 } else { now == then }
        })
}

fn check_survivor(left: &CrashDisk, run: &Run, number: usize) {
    let shm = HeapShmRoot::new();
    shm.lose_power("boot-2");
    let fleece = mount(left, &shm, None);
    let now = seen(&fleece);
    let last = run.answered.iter().rposition(|(from, _)| *from <= number).unwrap();
    let around: Vec<&Seen> = run.answered[last..].iter().take(2).map(|(_, seen)| seen).collect();
    for disk in PAIR {
        let fit = around.iter().any(|then| fits(&now[disk], &then[disk]));
        assert!(
            fit,
            "{disk} has {:?}, where there was {:?}",
            now[disk],
            around.iter().map(|s| &s[disk]).collect::<Vec<_>>()
        );
    }
    // What does not record any more can be used, and what is lost be removed.
    let lost: Vec<_> = state(&fleece).into_iter().filter(|(_, info, _)| info.inconsistent).collect();
    lost.iter().for_each(|(disk, info, _)| drop(apply(&fleece, &[remove(&format!("{disk}/{}", info.name))])));
    apply(&fleece, &[add("a/new"), add("b/new")]);
    let before = seen(&fleece);
    fleece.close().unwrap();
    drop(fleece);
    assert_eq!(seen(&mount(left, &shm, None)), before);
}

#[test]
fn after_a_power_loss_at_any_moment_a_batch_is_there_or_not_and_no_bitmap_misses_a_change() {
    let full = std::env::var_os("FLEECEFS_FULL").is_some();
    let run = run();
    let moments = run.moments.taken.lock().unwrap();
    assert!(moments.len() > 300, "{} moments", moments.len());
    let first = run.answered[0].0;
    let (stride, exhaustive, seeds) = if full { (1, 7, 30) } else { (3, 1, 2) };
    for (number, moment) in moments.iter().enumerate().skip(first).step_by(stride) {
        let left: Vec<CrashDisk> = match moment.exhaustive(exhaustive) {
            Some(all) => all.collect(),
            None => (0..seeds).map(|seed| moment.survivors(number as u64 * 1000 + seed)).collect(),
        };
        for (index, disk) in left.iter().enumerate() {
            let done = catch_unwind(AssertUnwindSafe(|| check_survivor(disk, &run, number)));
            assert!(done.is_ok(), "power loss before change {number} of {}, survivor {index}", moments.len());
        }
    }
}
