//! Bitmaps stored, cut off, read again: the set in the file against a plain map of names to bits.

use super::super::check::check;
use super::super::extensions::Extension;
use super::super::test_cuts::Cuts;
use super::super::test_image::Shape;
use super::*;
use crate::bitmap::Bits;
use crate::storage::faulty::{Call, FaultPlan, Faulty};
use crate::storage::{MemFile, SharedStorage};
use parking_lot::Mutex;
use proptest::prelude::*;
use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

/// A bitmap as it should be in the file.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Model {
    granularity_bits: u8,
    auto: bool,
    in_use: bool,
    words: Vec<u64>,
}

type Models = BTreeMap<String, Model>;

/// Clusters of 2 KiB; most of the disk has none.
const SHAPE: Shape = Shape { version: 3, cluster_bits: 11, order: 4, data_clusters: 20, incompatible: 0 };
/// Three pieces of bits at the finest granularity.
const DISK_BYTES: u64 = (20 << 20) - 3 * 4096 - 5;

/// The header takes two sectors, and the bitmaps extension comes to lie on the border.
fn make(storage: &dyn Storage) {
    SHAPE.write(storage);
    header_write::update(storage, |header| {
        (header.size, header.l1_size) = (DISK_BYTES, 40);
        header.extensions.set(77, vec![9; 376]);
    })
    .unwrap();
}

/// The set as the file has it, `None` where nobody vouches for it. Bits of those in use are not looked at.
fn found(storage: &dyn Storage) -> Option<Models> {
    let header = read_header(storage).unwrap();
    let Some(directory) = Directory::read(storage, &header).unwrap() else { return Some(Models::new()) };
    let model = |entry: &Entry| {
        let words = if entry.in_use() {
            vec![]
        } else {
            let bits = entry.load(storage, &header, true).unwrap();
            bits.words().collect()
        };
        Model { granularity_bits: entry.granularity_bits, auto: entry.auto(), in_use: entry.in_use(), words }
    };
    directory.consistent.then(|| directory.all.iter().map(|entry| (entry.name.clone(), model(entry))).collect())
}

/// Without the bits of those in use.
fn visible(models: &Models) -> Models {
    let mut models = models.clone();
    models.values_mut().filter(|model| model.in_use).for_each(|model| model.words.clear());
    models
}

/// Bits of which whole pieces may be clear or set.
fn pattern(granularity_bits: u8, seed: u64) -> Vec<u64> {
    let bits = Bits::heap(DISK_BYTES.div_ceil(1 << granularity_bits));
    let len = bits.len();
    match seed % 5 {
        0 => (),
        1 => bits.set_range(0..len),
        2 => bits.set_range(len / 2..len),
        3 => bits.set_range(0..len / 3),
        _ => (0..len).filter(|bit| (bit ^ seed).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 62 == 0).for_each(|bit| {
            bits.set(bit);
        }),
    }
    bits.words().collect()
}

#[derive(Debug, Clone)]
enum Op {
    Store(Vec<(usize, u8, bool, u64)>),
    Trust(usize),
    Remove(Vec<usize>),
    MarkInUse,
    /// The guest takes clusters, fills them, and lets go of them.
    Guest(u64),
}

fn op() -> impl Strategy<Value = Op> {
    let one = (0usize..5, 9u8..14, any::<bool>(), any::<u64>());
    prop_oneof![
        4 => prop::collection::vec(one, 1..4).prop_map(Op::Store),
        1 => (0usize..5).prop_map(Op::Trust),
        2 => prop::collection::vec(0usize..5, 1..3).prop_map(Op::Remove),
        2 => Just(Op::MarkInUse),
        3 => (1u64..60).prop_map(Op::Guest),
    ]
}

/// Names of such lengths that entries begin at every place of a sector, and one takes more than a sector.
fn name(index: usize) -> String {
    format!("{index}{}", "n".repeat([3, 100, 700, 21, 0][index]))
}

/// The full sizes are asked for.
fn full() -> bool {
    std::env::var_os("FLEECEFS_FULL").is_some()
}

struct Rig {
    file: SharedStorage,
    allocator: Allocator,
    models: Models,
    /// What a power loss may leave.
    allowed: Arc<Mutex<Vec<Models>>>,
    guests: Vec<u64>,
}

impl Rig {
    fn open(file: SharedStorage) -> Rig {
        let allocator = Allocator::open(file.clone(), SHAPE.place()).unwrap();
        Rig { file, allocator, models: Models::new(), allowed: Arc::default(), guests: Vec::new() }
    }

    fn flush(&mut self) {
        let freed = self.allocator.begin_flush();
        self.file.sync().unwrap();
        self.allocator.end_flush(freed).unwrap();
    }

    /// Makes the changes; `next` is the set afterwards.
    fn change(&mut self, changes: &[Change<'_>], next: Models) {
        *self.allowed.lock() = vec![visible(&self.models), visible(&next)];
        change(&*self.file, &mut self.allocator, changes).unwrap();
        self.models = next;
        *self.allowed.lock() = vec![visible(&self.models)];
        assert_eq!(found(&*self.file), Some(visible(&self.models)));
    }

    fn apply(&mut self, op: &Op) {
        let mut next = self.models.clone();
        match op {
            Op::Store(list) => {
                let mut changes = Vec::new();
                let list: BTreeMap<_, _> =
                    list.iter().map(|(index, g, auto, seed)| (name(*index), (*g, *auto, pattern(*g, *seed)))).collect();
                for (name, (granularity_bits, auto, words)) in &list {
                    let (granularity_bits, auto) = (*granularity_bits, *auto);
                    changes.push(Change::Store(NewBitmap { name, granularity_bits, auto, words }));
                    let model = Model { granularity_bits, auto, in_use: false, words: words.clone() };
                    next.insert(name.clone(), model);
                }
                self.change(&changes, next);
            }
            Op::Trust(index) => {
                let name = name(*index);
                let Some(model) = next.get_mut(&name) else { return };
                model.in_use = false;
                self.change(&[Change::Trust(&name)], next);
            }
            Op::Remove(indices) => {
                let names: HashSet<String> = indices.iter().map(|index| name(*index)).collect();
                let names: Vec<&String> = names.iter().filter(|name| next.remove(*name).is_some()).collect();
                self.change(&names.iter().map(|name| Change::Remove(name)).collect::<Vec<_>>(), next);
            }
            Op::MarkInUse => self.mark_in_use(),
            Op::Guest(count) => {
                self.flush();
                let run = self.allocator.allocate(*count).unwrap();
                for cluster in run.clone() {
                    self.file.write_at(&vec![0xa5; SHAPE.at(1) as usize], SHAPE.at(cluster)).unwrap();
                }
                self.allocator.write_refcounts().unwrap();
                std::mem::replace(&mut self.guests, run.collect())
                    .into_iter()
                    .for_each(|cluster| self.allocator.free(cluster).unwrap());
            }
        }
    }

    /// Of those that were good, any may be in use already.
    fn mark_in_use(&mut self) {
        let mut all = vec![self.models.clone()];
        for name in self.models.keys() {
            for mut models in all.clone() {
                models.get_mut(name).unwrap().in_use = true;
                all.push(models);
            }
        }
        *self.allowed.lock() = all.iter().map(visible).collect();
        mark_in_use(&*self.file).unwrap();
        self.models.values_mut().for_each(|model| model.in_use = true);
        *self.allowed.lock() = vec![visible(&self.models)];
        assert_eq!(found(&*self.file), Some(visible(&self.models)));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: if full() { 300 } else { 12 }, ..ProptestConfig::default() })]

    #[test]
    fn a_power_loss_leaves_the_old_set_or_the_new_one(ops in prop::collection::vec(op(), 1..14)) {
        let cuts = Cuts::new(if full() { (8, 60) } else { (4, 6) }, make);
        let mut rig = Rig::open(cuts.clone());
        *rig.allowed.lock() = vec![Models::new()];
        let (allowed, mut looks) = (rig.allowed.clone(), 0);
        cuts.watch(move |left| {
            let found = found(left).expect("the autoclear bit was never clear");
            assert!(allowed.lock().contains(&found), "{found:#?}\nis none of\n{:#?}", allowed.lock());
            looks += 1;
            if looks % 5 == 0 {
                let report = check(left).unwrap();
                assert_eq!(report.corruptions, 0, "{:?}", report.findings);
            }
        });
        for op in &ops {
            rig.apply(op);
        }
        cuts.leave();
        std::mem::take(&mut rig.guests).into_iter().for_each(|cluster| rig.allocator.free(cluster).unwrap());
        rig.flush();
        rig.allocator.write_refcounts().unwrap();
        let report = check(&*cuts).unwrap();
        prop_assert_eq!((report.corruptions, report.leaks), (0, 0), "{:?}", report.findings);
    }
}

fn rig() -> Rig {
    let file = MemFile::new("a", 0);
    make(&file);
    Rig::open(file.shared())
}

fn first_clusters(storage: &dyn Storage) -> Vec<u8> {
    let mut bytes = vec![0; storage.len().unwrap() as usize];
    storage.read_at(&mut bytes, 0).unwrap();
    bytes
}

#[test]
fn uniform_pieces_take_no_clusters() {
    let mut rig = rig();
    // The last piece ends within a word, where set bits are spelled out.
    for (name, seed, uniform) in [("zeros", 0, 3), ("ones", 1, 2)] {
        let words = pattern(9, seed);
        let bitmap = NewBitmap { name, granularity_bits: 9, auto: false, words: &words };
        change(&*rig.file, &mut rig.allocator, &[Change::Store(bitmap)]).unwrap();
        let header = read_header(&*rig.file).unwrap();
        let directory = Directory::read(&*rig.file, &header).unwrap().unwrap();
        let entry = directory.all.iter().find(|entry| entry.name == name).unwrap();
        let table = read_table(&*rig.file, entry.table_offset.0, entry.table_entries.into()).unwrap();
        assert_eq!((table.len(), &table[..uniform]), (3, &[seed; 3][..uniform]));
        assert!(uniform == 3 || table[2] > 1);
    }
}

#[test]
fn a_change_that_breaks_a_limit_touches_nothing() {
    let mut rig = rig();
    let words = pattern(12, 4);
    let good = NewBitmap { name: "good", granularity_bits: 12, auto: true, words: &words };
    change(&*rig.file, &mut rig.allocator, &[Change::Store(good)]).unwrap();
    let before = first_clusters(&*rig.file);
    let long = "n".repeat(1024);
    let (short, mut tail) = (words[..words.len() - 1].to_vec(), words.clone());
    *tail.last_mut().unwrap() |= 1 << 63;
    let refused = [
        (Change::Store(NewBitmap { name: "", ..good }), errno::EINVAL),
        (Change::Store(NewBitmap { name: &long, ..good }), errno::EINVAL),
        (Change::Store(NewBitmap { name: "a\0b", ..good }), errno::EINVAL),
        (Change::Store(NewBitmap { name: "b", granularity_bits: 8, ..good }), errno::EINVAL),
        (Change::Store(NewBitmap { name: "b", granularity_bits: 32, ..good }), errno::EINVAL),
        (Change::Store(NewBitmap { name: "b", words: &short, ..good }), errno::EINVAL),
        (Change::Store(NewBitmap { name: "b", words: &tail, ..good }), errno::EINVAL),
        (Change::Remove("none"), errno::ENOENT),
        (Change::Trust("none"), errno::ENOENT),
    ];
    for (one, errno) in refused {
        let also_good = Change::Store(NewBitmap { name: "new", ..good });
        let e = change(&*rig.file, &mut rig.allocator, &[also_good, one]).unwrap_err();
        assert_eq!(e.errno(), errno, "{one:?}: {e}");
    }
    let twice = [Change::Remove("good"), Change::Remove("good")];
    assert_eq!(change(&*rig.file, &mut rig.allocator, &twice).unwrap_err().errno(), errno::EINVAL);
    assert_eq!(first_clusters(&*rig.file), before);
    change(&*rig.file, &mut rig.allocator, &[Change::Remove("good")]).unwrap();
    assert_eq!(found(&*rig.file), Some(Models::new()));
    assert_eq!(read_header(&*rig.file).unwrap().extensions.bitmaps(), None);
}

#[test]
fn a_large_disk_with_fine_granules_is_too_much() {
    let new = NewBitmap { name: "a", granularity_bits: 9, auto: false, words: &[] };
    let e = new.check((512 << 20) * 8 * 512 + 1).unwrap_err();
    assert!(e.to_string().contains("512 MiB"), "{e}");
    assert!(new.check(0).unwrap_err().to_string().contains("no bytes"));
}

#[test]
fn no_more_bitmaps_than_the_format_can_count() {
    let mut rig = rig();
    let names: Vec<String> = (0..65_536).map(|index| format!("{index:x}")).collect();
    let store = |name| Change::Store(NewBitmap { name, granularity_bits: 31, auto: false, words: &[1] });
    let changes: Vec<Change<'_>> = names.iter().map(|name| store(name)).collect();
    let before = first_clusters(&*rig.file);
    let e = change(&*rig.file, &mut rig.allocator, &changes).unwrap_err();
    assert!(e.errno() == errno::ENOSPC && e.to_string().contains("65536 bitmaps"), "{e}");
    assert_eq!(first_clusters(&*rig.file), before);
    let long: Vec<String> = (0..65_535).map(|index| format!("{index:x}{}", "n".repeat(1010))).collect();
    let changes: Vec<Change<'_>> = long.iter().map(|name| store(name)).collect();
    let e = change(&*rig.file, &mut rig.allocator, &changes).unwrap_err();
    assert!(e.errno() == errno::ENOSPC && e.to_string().contains("directory of 6"), "{e}");
    assert_eq!(first_clusters(&*rig.file), before);
}

#[test]
fn version_2_has_no_bitmaps() {
    let file = MemFile::new("a", 0);
    let shape = Shape { version: 2, ..SHAPE };
    shape.write(&file);
    let mut allocator = Allocator::open(file.shared(), shape.place()).unwrap();
    let before = first_clusters(&file);
    let words = [0];
    let store = Change::Store(NewBitmap { name: "a", granularity_bits: 9, auto: true, words: &words });
    let e = change(&file, &mut allocator, &[store]).unwrap_err();
    assert!(e.errno() == errno::EOPNOTSUPP && e.to_string().contains("version 2"), "{e}");
    assert_eq!(mark_in_use(&file).unwrap(), None);
    assert_eq!(settle(&file).unwrap(), read_header(&file).unwrap());
    assert_eq!(first_clusters(&file), before);
}

#[test]
fn what_is_not_understood_is_kept() {
    let mut rig = rig();
    let words = pattern(12, 4);
    let mine = |name| Change::Store(NewBitmap { name, granularity_bits: 12, auto: true, words: &words });
    let names = ["compatible", "foreign", "frozen", "mine"];
    change(&*rig.file, &mut rig.allocator, &names.map(mine)).unwrap();
    let header = read_header(&*rig.file).unwrap();
    let mut directory = Directory::read(&*rig.file, &header).unwrap().unwrap();
    for entry in directory.all.iter_mut().take(3) {
        entry.extra = vec![7; 11];
    }
    directory.all[0].flags |= flag::EXTRA_DATA_COMPATIBLE;
    directory.all[2].flags &= !flag::AUTO;
    let extended = encode(directory.all.iter());
    let offset = rig.allocator.allocate_row(1).unwrap().start << SHAPE.cluster_bits;
    rig.file.write_at(&extended, offset).unwrap();
    header_write::update(&*rig.file, |header| {
        let bitmaps = header.extensions.bitmaps().unwrap();
        let directory_bytes = extended.len() as u64;
        header.extensions.set_bitmaps(BitmapsExtension { directory_offset: offset, directory_bytes, ..bitmaps });
    })
    .unwrap();
    let marked = mark_in_use(&*rig.file).unwrap().unwrap();
    let in_use: Vec<bool> = marked.all.iter().map(Entry::in_use).collect();
    assert_eq!(in_use, [true, true, false, true], "one that records and misses our writes is not good any more");
    let e = change(&*rig.file, &mut rig.allocator, &[mine("foreign")]).unwrap_err();
    assert_eq!(e.errno(), errno::EEXIST);
    assert!(change(&*rig.file, &mut rig.allocator, &[Change::Trust("foreign")]).is_err());
    change(&*rig.file, &mut rig.allocator, &[mine("compatible"), Change::Trust("mine")]).unwrap();
    let header = read_header(&*rig.file).unwrap();
    let directory = Directory::read(&*rig.file, &header).unwrap().unwrap();
    assert_eq!(directory.all[1..3], marked.all[1..3]);
    assert_eq!(directory.all[0].extra, [7; 11]);
    assert_eq!(directory.all[0].flags, flag::AUTO | flag::EXTRA_DATA_COMPATIBLE);
    assert!(directory.all[0].load(&*rig.file, &header, true).is_ok());
    change(&*rig.file, &mut rig.allocator, &[Change::Remove("foreign"), Change::Remove("frozen")]).unwrap();
}

#[test]
fn what_a_program_without_bitmaps_left_is_dropped_and_its_clusters_are_free() {
    let mut rig = rig();
    let words = pattern(9, 4);
    let stored = Change::Store(NewBitmap { name: "a", granularity_bits: 9, auto: true, words: &words });
    change(&*rig.file, &mut rig.allocator, &[stored]).unwrap();
    rig.flush();
    rig.allocator.write_refcounts().unwrap();
    header_write::update(&*rig.file, |header| {
        header.autoclear_features = 1 << 40 | autoclear::FLEECEFS;
        header.extensions.all.push(Extension { kind: 78, data: vec![1] });
    })
    .unwrap();
    assert_eq!(found(&*rig.file), None);
    let directory = mark_in_use(&*rig.file).unwrap().unwrap();
    assert!(!directory.consistent && !directory.all[0].in_use(), "nothing is changed in it");
    assert_eq!(change(&*rig.file, &mut rig.allocator, &[Change::Remove("a")]).unwrap_err().errno(), errno::EINVAL);
    let header = settle(&*rig.file).unwrap();
    assert_eq!(header.autoclear_features, autoclear::FLEECEFS);
    assert_eq!(header.extensions.bitmaps(), None);
    assert_eq!(header.extensions.find(78), Some(&[1][..]));
    let report = check(&*rig.file).unwrap();
    assert!(report.is_clean(), "{:?}", report.findings);
    let before = first_clusters(&*rig.file);
    assert_eq!(settle(&*rig.file).unwrap(), header);
    assert_eq!(first_clusters(&*rig.file), before);
}

/// Of another length than "old", so that the header changes in both of its sectors.
const NEW: &str = "a longer name";

#[test]
fn a_failing_medium_leaves_the_old_set_or_the_new_one() {
    let words = pattern(9, 4);
    let bitmap = |name| Change::Store(NewBitmap { name, granularity_bits: 9, auto: true, words: &words });
    for call in [Call::Write, Call::Sync] {
        let mut failures = 0;
        for nth in 1..100 {
            let mut rig = rig();
            change(&*rig.file, &mut rig.allocator, &[bitmap("old")]).unwrap();
            rig.flush();
            rig.allocator.write_refcounts().unwrap();
            let plan = Arc::new(FaultPlan::new());
            let faulty = Faulty { inner: rig.file.clone(), plan: plan.clone() };
            plan.fail_nth(call, nth, errno::EIO);
            let changes = [bitmap(NEW), Change::Remove("old")];
            if change(&faulty, &mut rig.allocator, &changes).is_ok() {
                break;
            }
            failures += 1;
            let names: Vec<String> = found(&*rig.file).unwrap().into_keys().collect();
            assert!(names == ["old"] || names == [NEW], "{names:?}");
            rig.flush();
            rig.allocator.write_refcounts().unwrap();
            let report = check(&*rig.file).unwrap();
            assert_eq!(report.corruptions, 0, "{:?}", report.findings);
            assert!(failures > 1 || report.leaks == 0, "a failure before the header gives all back: {report:?}");
            let again = if names == ["old"] { &changes[..] } else { &changes[..1] };
            change(&*rig.file, &mut rig.allocator, again).unwrap();
            rig.flush();
            rig.allocator.write_refcounts().unwrap();
            assert_eq!(found(&*rig.file).unwrap().into_keys().collect::<Vec<_>>(), [NEW]);
            assert_eq!(check(&*rig.file).unwrap().corruptions, 0);
        }
        assert!(failures > 3, "{call:?}: {failures}");
    }
}
