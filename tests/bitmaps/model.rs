//! Random batches, writes, resizes, holds, closes and kills, against a flag for each granule.

use crate::rig::{GRANULE, Host, PAIR};
use crate::steps::*;
use fleecefs::bitmap::DirtyBitmap;
use fleecefs::fleece::{Action, Fleece, Hold, HoldEnd};
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::sync::Arc;

const NAMES: [&str; 4] = ["w", "x", "y", "z"];
const GRANULES: usize = 9;

#[derive(Debug, Clone)]
enum Op {
    Batch(Vec<Step>),
    Write { disk: usize, granule: u64 },
    Resize { disk: usize, granules: u64 },
    End { hold: usize, how: u8, rest: u64 },
    Close,
    Kill,
}

#[derive(Debug, Clone, Copy)]
enum Step {
    Add { at: (usize, usize), persistent: bool, disabled: bool },
    Remove((usize, usize)),
    Clear((usize, usize)),
    Enable((usize, usize)),
    Disable((usize, usize)),
    Merge((usize, usize), [(usize, usize); 2]),
    Hold((usize, usize)),
    Abort,
}

#[derive(Debug, Clone, PartialEq)]
struct Bitmap {
    bits: Vec<bool>,
    recording: bool,
    persistent: bool,
    /// Since the hold began, where it is held, and what the holder saw.
    held: Option<(Vec<bool>, Vec<bool>)>,
}

type Disks = [BTreeMap<&'static str, Bitmap>; 2];

fn place() -> impl Strategy<Value = (usize, usize)> {
    (0..2usize, 0..NAMES.len())
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        5 => (place(), any::<bool>(), any::<bool>())
            .prop_map(|(at, persistent, disabled)| Step::Add { at, persistent, disabled }),
        2 => place().prop_map(Step::Remove),
        2 => place().prop_map(Step::Clear),
        2 => place().prop_map(Step::Enable),
        2 => place().prop_map(Step::Disable),
        4 => (place(), [place(), place()]).prop_map(|(target, sources)| Step::Merge(target, sources)),
        2 => place().prop_map(Step::Hold),
        1 => Just(Step::Abort),
    ]
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        8 => proptest::collection::vec(step(), 1..5).prop_map(Op::Batch),
        8 => (0..2usize, 0..GRANULES as u64).prop_map(|(disk, granule)| Op::Write { disk, granule }),
        1 => (0..2usize, 3..=GRANULES as u64).prop_map(|(disk, granules)| Op::Resize { disk, granules }),
        3 => (0..4usize, 0..4u8, any::<u64>()).prop_map(|(hold, how, rest)| Op::End { hold, how, rest }),
        1 => Just(Op::Close),
        1 => Just(Op::Kill),
    ]
}

fn full((disk, name): (usize, usize)) -> String {
    format!("{}/{}", PAIR[disk], NAMES[name])
}

fn action(step: Step) -> Action {
    match step {
        Step::Add { at, persistent, disabled } => added(&full(at), Some(GRANULE), persistent, disabled),
        Step::Remove(at) => remove(&full(at)),
        Step::Clear(at) => clear(&full(at)),
        Step::Enable(at) => enable(&full(at)),
        Step::Disable(at) => disable(&full(at)),
        Step::Merge(target, [one, two]) => merge(&full(target), &[&full(one), &full(two)]),
        Step::Hold(at) => hold(&full(at)),
        Step::Abort => Action::Abort,
    }
}

/// One step as QEMU has it; None where it is refused. `removed` is gone at the end of the batch.
fn model_step(disks: &mut Disks, removed: &mut Vec<(usize, usize)>, size: [usize; 2], step: Step) -> Option<()> {
    let usable = |disks: &Disks, removed: &Vec<(usize, usize)>, at: (usize, usize)| {
        let bitmap = disks[at.0].get(NAMES[at.1])?;
        (bitmap.held.is_none() && !removed.contains(&at)).then_some(())
    };
    match step {
        Step::Abort => return None,
        Step::Add { at, persistent, disabled } => {
            if disks[at.0].contains_key(NAMES[at.1]) {
                return None;
            }
            let bits = vec![false; size[at.0]];
            disks[at.0].insert(NAMES[at.1], Bitmap { bits, recording: !disabled, persistent, held: None });
        }
        Step::Remove(at) => {
            usable(disks, removed, at)?;
            removed.push(at);
        }
        Step::Clear(at) => {
            usable(disks, removed, at)?;
            disks[at.0].get_mut(NAMES[at.1])?.bits.fill(false);
        }
        Step::Enable(at) | Step::Disable(at) => {
            usable(disks, removed, at)?;
            disks[at.0].get_mut(NAMES[at.1])?.recording = matches!(step, Step::Enable(_));
        }
        Step::Merge(target, sources) => {
            disks[target.0].get(NAMES[target.1])?;
            for source in sources {
                disks[source.0].get(NAMES[source.1])?;
                usable(disks, removed, target)?;
                usable(disks, removed, source)?;
                if size[source.0] != size[target.0] {
                    return None;
                }
                let from = disks[source.0].get(NAMES[source.1])?.bits.clone();
                let to = &mut disks[target.0].get_mut(NAMES[target.1])?.bits;
                to.iter_mut().zip(from).for_each(|(to, from)| *to |= from);
            }
        }
        Step::Hold(at) => {
            usable(disks, removed, at)?;
            let bitmap = disks[at.0].get_mut(NAMES[at.1])?;
            bitmap.held = Some((vec![false; bitmap.bits.len()], bitmap.bits.clone()));
        }
    }
    Some(())
}

/// The bitmaps of the disks, without their bits.
fn shown(fleece: &Fleece) -> Disks {
    PAIR.map(|disk| {
        let listed = fleece.bitmaps(disk).unwrap();
        let of = |name: &&'static str| {
            let info = listed.iter().find(|info| info.name == *name)?;
            assert!(!info.inconsistent);
            let held = info.busy.then(|| (Vec::new(), Vec::new()));
            Some((*name, Bitmap { bits: Vec::new(), recording: info.recording, persistent: info.persistent, held }))
        };
        NAMES.iter().filter_map(of).collect()
    })
}

fn check(fleece: &Fleece, model: &Disks) {
    let shown = shown(fleece);
    for (index, disk) in PAIR.into_iter().enumerate() {
        let (now, expected) = (&shown[index], &model[index]);
        assert_eq!(now.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>(), "bitmaps of {disk}");
        for (name, expected) in expected {
            let now = &now[name];
            let flags = |bitmap: &Bitmap| (bitmap.recording, bitmap.persistent, bitmap.held.is_some());
            assert_eq!(flags(now), flags(expected), "{disk}/{name}");
            let bits = expected.held.as_ref().map_or(&expected.bits, |(_, frozen)| frozen);
            let set: Vec<u64> = (0..bits.len() as u64).filter(|bit| bits[*bit as usize]).collect();
            assert_eq!(hash(fleece, &format!("{disk}/{name}")), hash_of(&set), "{disk}/{name} is to have {set:?}");
        }
    }
}

/// What ends all holds without a word, and forgets what is not persistent.
fn ended(model: &mut Disks) {
    for disk in model {
        disk.retain(|_, bitmap| bitmap.persistent);
        disk.values_mut().for_each(|bitmap| bitmap.held = None);
    }
}

/// The disks of both formats.
enum World {
    Raw(Host),
    Qcow2([Image; 2]),
}

impl World {
    fn new(qcow2: bool) -> Self {
        let size = GRANULES as u64 * GRANULE;
        if qcow2 { World::Qcow2([Image::new(size), Image::new(size)]) } else { World::Raw(Host::new(&PAIR, size)) }
    }

    fn mount(&self) -> Arc<Fleece> {
        match self {
            World::Raw(host) => host.mount(),
            World::Qcow2(images) => {
                let fleece = images[0].empty_mount();
                images.iter().zip(PAIR).for_each(|(image, name)| image.attach(&fleece, name));
                fleece
            }
        }
    }
}

fn run(qcow2: bool, ops: &[Op]) {
    let host = World::new(qcow2);
    let mut fleece: Arc<Fleece> = host.mount();
    let mut model: Disks = Default::default();
    let mut size = [GRANULES; 2];
    let mut holds: Vec<Hold> = Vec::new();
    for op in ops {
        match op {
            Op::Batch(steps) => {
                let (mut after, mut removed, mut refused_at) = (model.clone(), Vec::new(), None);
                for (index, step) in steps.iter().enumerate() {
                    if model_step(&mut after, &mut removed, size, *step).is_none() {
                        refused_at = Some(index);
                        break;
                    }
                }
                let actions: Vec<Action> = steps.iter().map(|step| action(*step)).collect();
                match (fleece.apply(&actions), refused_at) {
                    (Ok(applied), None) => {
                        removed.into_iter().for_each(|at| drop(after[at.0].remove(NAMES[at.1])));
                        model = after;
                        holds.extend(applied.holds);
                    }
                    (Err(refused), Some(at)) => assert_eq!(refused.index, at, "{refused}"),
                    (result, at) => panic!("{result:?}, the model refuses {at:?}"),
                }
            }
            Op::Write { disk, granule } if (*granule as usize) < size[*disk] => {
                touch(&fleece, PAIR[*disk], &[*granule]);
                for bitmap in model[*disk].values_mut().filter(|bitmap| bitmap.recording) {
                    bitmap.bits[*granule as usize] = true;
                    if let Some((since, _)) = &mut bitmap.held {
                        since[*granule as usize] = true;
                    }
                }
            }
            Op::Write { .. } => (),
            Op::Resize { disk, granules } => {
                let held = model[*disk].values().any(|bitmap| bitmap.held.is_some());
                let resized = fleece.resize_disk(PAIR[*disk], granules * GRANULE);
                assert_eq!(resized.is_err(), held);
                if !held {
                    size[*disk] = *granules as usize;
                    model[*disk].values_mut().for_each(|bitmap| bitmap.bits.resize(*granules as usize, false));
                }
            }
            Op::End { hold, how, rest } => {
                if holds.is_empty() {
                    continue;
                }
                let hold = holds.remove(hold % holds.len());
                let disk = PAIR.iter().position(|disk| *disk == hold.disk()).unwrap();
                let bitmap = model[disk].get_mut(hold.name()).unwrap();
                let (since, _) = bitmap.held.take().unwrap();
                let end = match how {
                    0 => HoldEnd::Reclaim,
                    1 => {
                        bitmap.bits = since;
                        HoldEnd::Abdicate
                    }
                    2 => {
                        let bits = DirtyBitmap::heap(GRANULE, size[disk] as u64 * GRANULE).unwrap();
                        bitmap.bits = since;
                        for index in (0..size[disk]).filter(|index| rest >> index & 1 != 0) {
                            bits.mark(index as u64 * GRANULE, 1);
                            bitmap.bits[index] = true;
                        }
                        HoldEnd::ReclaimWith(bits)
                    }
                    _ => {
                        drop(hold);
                        continue;
                    }
                };
                fleece.end_holds(&[(&hold, end)]).unwrap();
            }
            Op::Close | Op::Kill => {
                holds.clear();
                if matches!(op, Op::Close) {
                    fleece.close().unwrap();
                }
                drop(fleece);
                fleece = host.mount();
                ended(&mut model);
            }
        }
        check(&fleece, &model);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn bitmaps_agree_with_a_flag_for_each_granule(ops in proptest::collection::vec(op(), 1..40)) {
        run(false, &ops);
    }

    #[test]
    fn bitmaps_of_qcow2_images_agree_with_a_flag_for_each_granule(ops in proptest::collection::vec(op(), 1..40)) {
        run(true, &ops);
    }
}
