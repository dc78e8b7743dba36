//! The allocator against a plain model, and through power losses.

use super::super::check::{Repair, check, repair};
use super::super::test_image::Shape;
use super::*;
use crate::storage::MemFile;
use crate::storage::crash::CrashDisk;
use proptest::prelude::*;
use std::sync::Arc;

fn open(shape: Shape) -> (MemFile, Allocator) {
    let file = MemFile::new("a", 0);
    shape.write(&file);
    let allocator = Allocator::open(file.shared(), shape.place()).unwrap();
    (file, allocator)
}

/// The refcounts in the file, as the header in the file says.
fn stored(file: &dyn Storage, shape: Shape, clusters: u64) -> Vec<u64> {
    let mut fields = [0; 12];
    file.read_at(&mut fields, TABLE_FIELDS_AT).unwrap();
    let table_offset = u64::from_be_bytes(fields[..8].try_into().unwrap());
    let table_clusters = u64::from(u32::from_be_bytes(fields[8..].try_into().unwrap()));
    let place = Place { table_offset, table_clusters, ..shape.place() };
    let mut stored = Stored::open(file, place).unwrap();
    (0..clusters).map(|cluster| stored.get(cluster).unwrap()).collect()
}

/// What the refcounts must be: the model's, and one for each cluster of the refcount structures.
fn expected(allocator: &Allocator, model: &BTreeMap<u64, u64>) -> Vec<u64> {
    let mut counts = vec![0; allocator.end() as usize];
    model.iter().for_each(|(cluster, count)| counts[*cluster as usize] += count);
    allocator.block_clusters.iter().for_each(|cluster| counts[*cluster as usize] += 1);
    let place = allocator.place();
    let first = place.table_offset >> place.cluster_bits;
    (first..first + place.table_clusters).for_each(|cluster| counts[cluster as usize] += 1);
    counts
}

/// The image's own clusters, without its refcount structures.
fn used(shape: Shape) -> BTreeMap<u64, u64> {
    std::iter::once(0).chain(shape.l1()..shape.end()).map(|cluster| (cluster, 1)).collect()
}

#[derive(Debug, Clone)]
enum Op {
    Allocate(u64),
    AllocateRow(u64),
    Free(usize),
    Share(usize),
    Flush,
    Write,
    Reopen,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => (1u64..40).prop_map(Op::Allocate),
        2 => (1u64..700).prop_map(Op::AllocateRow),
        6 => any::<usize>().prop_map(Op::Free),
        2 => any::<usize>().prop_map(Op::Share),
        2 => Just(Op::Flush),
        1 => Just(Op::Write),
        1 => Just(Op::Reopen),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn no_cluster_in_use_is_handed_out_and_refcounts_are_right(
        order in 0u32..7,
        ops in prop::collection::vec(op(), 1..60),
    ) {
        let shape = Shape::new(9, order, 5);
        let (file, mut allocator) = open(shape);
        let mut model = used(shape);
        // Freed, but not before the next flush.
        let mut held = BTreeMap::<u64, u64>::new();
        let write = |allocator: &mut Allocator, model: &BTreeMap<u64, u64>, held: &BTreeMap<u64, u64>| {
            allocator.write_refcounts().unwrap();
            let mut all = model.clone();
            held.iter().for_each(|(cluster, count)| *all.entry(*cluster).or_default() += count);
            assert_eq!(stored(&file, shape, allocator.end()), expected(allocator, &all));
        };
        for op in ops {
            match op {
                Op::Allocate(count) | Op::AllocateRow(count) => {
                    let row = matches!(op, Op::AllocateRow(_));
                    let got = if row { allocator.allocate_row(count) } else { allocator.allocate(count) }.unwrap();
                    let len = got.end - got.start;
                    let fits = if row { len == count } else { (1..=count).contains(&len) };
                    prop_assert!(fits);
                    let place = allocator.place();
                    let first = place.table_offset >> place.cluster_bits;
                    for cluster in got {
                        prop_assert!(!held.contains_key(&cluster), "cluster {} is reused before a flush", cluster);
                        prop_assert!(!allocator.block_clusters.contains(&cluster));
                        prop_assert!(!(first..first + place.table_clusters).contains(&cluster));
                        prop_assert_eq!(model.insert(cluster, 1), None, "cluster {} is in use", cluster);
                    }
                }
                Op::Free(which) | Op::Share(which) => {
                    let free = matches!(op, Op::Free(_));
                    let Some((&cluster, &count)) = model.iter().nth(which % model.len()) else { continue };
                    if cluster < shape.end() {
                        continue;
                    }
                    if free {
                        allocator.free(cluster).unwrap();
                        *held.entry(cluster).or_default() += 1;
                        if count == 1 { model.remove(&cluster); } else { model.insert(cluster, count - 1); }
                        if count == 1 {
                            prop_assert_eq!(allocator.free(cluster).unwrap_err().errno(), errno::EIO);
                        }
                    } else if count + held.get(&cluster).unwrap_or(&0) < allocator.place().width.max() {
                        allocator.share(cluster).unwrap();
                        model.insert(cluster, count + 1);
                    } else {
                        prop_assert_eq!(allocator.share(cluster).unwrap_err().errno(), errno::EFBIG);
                    }
                }
                Op::Flush => {
                    let freed = allocator.begin_flush();
                    allocator.end_flush(freed).unwrap();
                    held.clear();
                }
                Op::Write => write(&mut allocator, &model, &held),
                Op::Reopen => {
                    let freed = allocator.begin_flush();
                    allocator.end_flush(freed).unwrap();
                    held.clear();
                    write(&mut allocator, &model, &held);
                    let end = allocator.end();
                    allocator = Allocator::open(file.shared(), allocator.place()).unwrap();
                    prop_assert!(allocator.end() <= end);
                    prop_assert!(model.keys().all(|cluster| *cluster < allocator.end()));
                }
            }
        }
        write(&mut allocator, &model, &held);
    }
}

#[test]
fn the_refcount_table_grows_and_its_old_place_is_free_again() {
    for order in 0..7 {
        let shape = Shape::new(9, order, 3);
        let (file, mut allocator) = open(shape);
        let per_table = shape.place().table_entries() * shape.place().per_block();
        let mut model = used(shape);
        while allocator.end() < per_table * 2 {
            allocator.allocate_row(per_table / 3).unwrap().for_each(|cluster| {
                assert_eq!(model.insert(cluster, 1), None);
            });
        }
        assert!(allocator.place().table_clusters > 1);
        assert_eq!(stored(&file, shape, shape.end()), vec![1; shape.end() as usize], "nothing is switched to yet");
        allocator.write_refcounts().unwrap();
        assert_eq!(stored(&file, shape, allocator.end()), expected(&allocator, &model), "order {order}");
        assert_eq!(allocator.allocate(1).unwrap(), 1..2, "the old table's cluster");
    }
}

#[test]
fn damage_is_found_before_it_spreads() {
    let shape = Shape::new(9, 4, 3);
    let (_file, mut allocator) = open(shape);
    allocator.protect(allocator.end()..allocator.end() + 1, "an L2 table");
    let e = allocator.allocate(1).unwrap_err();
    assert_eq!(e.errno(), errno::EIO);
    assert!(e.to_string().contains("an L2 table"), "{e}");
    allocator.unprotect(allocator.end());
    allocator.allocate(1).unwrap();
    assert_eq!(allocator.share(allocator.end() + 5).unwrap_err().errno(), errno::EIO);
    assert_eq!(allocator.free(allocator.end() + 5).unwrap_err().errno(), errno::EIO);
    assert_eq!(allocator.allocate_row(0).unwrap_err().errno(), errno::EINVAL);
    assert_eq!(allocator.allocate_row(1 << 60).unwrap_err().errno(), errno::EFBIG);

    let (file, _) = open(shape);
    file.write_at(&0x201u64.to_be_bytes(), shape.at(1) + 8).unwrap();
    assert_eq!(Allocator::open(file.shared(), shape.place()).unwrap_err().errno(), errno::EIO);
}

#[test]
fn what_a_failed_flush_covered_is_free_after_the_next() {
    let shape = Shape::new(9, 4, 3);
    let (_file, mut allocator) = open(shape);
    let first = allocator.allocate(1).unwrap().start;
    allocator.free(first).unwrap();
    let failing = allocator.begin_flush();
    let second = allocator.allocate(1).unwrap().start;
    assert_ne!(first, second);
    allocator.free(second).unwrap();
    let beside = allocator.begin_flush();
    allocator.end_flush(beside).unwrap();
    assert_eq!(allocator.allocate(9).unwrap(), second..second + 1, "the other flush is still under way");
    allocator.free(second).unwrap();
    allocator.fail_flush(failing);
    let next = allocator.begin_flush();
    allocator.end_flush(next).unwrap();
    assert_eq!(allocator.allocate(9).unwrap(), first..first + 2);
}

/// Publishes a cluster as data of the last guest cluster, or nothing there.
fn publish(file: &dyn Storage, shape: Shape, cluster: Option<u64>) {
    let entry = cluster.map_or(0, |cluster| shape.at(cluster) | super::super::tables::COPIED);
    file.write_at(&entry.to_be_bytes(), shape.at(shape.l1() + 1) + (shape.data_clusters - 1) * 8).unwrap();
}

/// Replaces a cluster and grows the refcounts beside it, in the eager order; `crash` is called between all steps.
fn eager_session(file: SharedStorage, shape: Shape, crash: &mut dyn FnMut()) {
    let mut allocator = Allocator::open(file.clone(), shape.place()).unwrap();
    let mut current = shape.end() - 1;
    for round in 0..3 {
        let new = allocator.allocate(1).unwrap().start;
        let ballast = allocator.allocate_row(if round == 1 { 300 } else { 2 }).unwrap();
        file.write_at(&vec![0xaa; shape.at(1) as usize], shape.at(new)).unwrap();
        crash();
        allocator.write_refcounts().unwrap();
        crash();
        publish(&*file, shape, Some(new));
        allocator.free(current).unwrap();
        ballast.into_iter().for_each(|cluster| allocator.free(cluster).unwrap());
        crash();
        let freed = allocator.begin_flush();
        file.sync().unwrap();
        allocator.end_flush(freed).unwrap();
        crash();
        allocator.write_refcounts().unwrap();
        crash();
        current = new;
    }
}

#[test]
fn eager_refcounts_survive_power_loss_with_leaks_at_most() {
    for version in [2, 3] {
        let shape = Shape { version, ..Shape::new(9, 4, 4) };
        let disk = CrashDisk::new();
        let file = disk.open("a").unwrap().shared();
        shape.write(&*file);
        let mut seed = 0;
        eager_session(file, shape, &mut || {
            for _ in 0..40 {
                seed += 1;
                let after = disk.survivors(seed).open("a").unwrap();
                let report = check(&after).unwrap();
                assert_eq!(report.corruptions, 0, "seed {seed}: {:?}", report.findings);
            }
        });
        let report = check(&*disk.open("a").unwrap().shared()).unwrap();
        assert_eq!((report.corruptions, report.leaks), (0, 0), "{:?}", report.findings);
    }
}

#[test]
fn a_lazy_session_that_crashed_is_repaired_from_its_mapping() {
    let shape = Shape::new(9, 4, 4);
    let disk = CrashDisk::new();
    let file = disk.open("a").unwrap().shared();
    shape.write(&*file);
    let features = set_dirty(&*file, 0, true).unwrap();
    let mut allocator = Allocator::open(Arc::clone(&file), shape.place()).unwrap();
    for _ in 0..300 {
        let new = allocator.allocate_row(1).unwrap().start;
        file.write_at(&[0xaa; 512], shape.at(new)).unwrap();
        file.sync().unwrap();
        publish(&*file, shape, Some(new));
        file.sync().unwrap();
    }
    for seed in 0..20 {
        let after = disk.survivors(seed).open("a").unwrap();
        assert!(!check(&after).unwrap().is_clean());
        let repaired = repair(&after, Repair::All).unwrap();
        assert!(repaired.after.is_clean() && !repaired.after.dirty, "{:?}", repaired.after);
    }
    allocator.write_refcounts().unwrap();
    set_dirty(&*file, features, false).unwrap();
    let report = check(&*file).unwrap();
    assert_eq!((report.corruptions, report.dirty), (0, false), "{:?}", report.findings);
}

#[test]
fn a_refcount_table_that_is_wrong_is_refused() {
    let shape = Shape::new(12, 4, 5);
    for (entry, why) in [
        (shape.at(2), "entry 1: its block at 8192 is another entry's too"),
        (shape.at(3) | 1, "entry 1: has reserved bits set"),
        (shape.at(3) | 512, "entry 1: is not aligned to a cluster"),
        (shape.at(1 << 20), "entry 1: points outside the file"),
    ] {
        let (file, _) = open(shape);
        file.write_at(&entry.to_be_bytes(), shape.at(1) + 8).unwrap();
        let e = Allocator::open(file.shared(), shape.place()).unwrap_err();
        assert!(e.to_string().contains(why), "{e}");
    }
}

/// A block for 16 million clusters each: to look at every refcount of them would take weeks.
#[test]
fn the_end_of_what_is_used_is_found_before_any_number_of_blocks_in_holes() {
    for order in [0, 1, 2, 3, 4, 6] {
        let shape = Shape::new(21, order, 1);
        let (file, allocator) = open(shape);
        let end = allocator.end();
        assert_eq!(end, shape.end());
        let table: Vec<u64> = (0..100_000).map(|index| shape.at(if index == 0 { 2 } else { 1000 + index })).collect();
        file.set_len(shape.at(200_000)).unwrap();
        file.write_at(&to_bytes(&table), shape.at(1)).unwrap();
        assert_eq!(Allocator::open(file.shared(), shape.place()).unwrap().end(), end, "order {order}");
        let mut block = vec![0; 1 << 21];
        shape.place().width.set(&mut block, 77, 1);
        file.write_at(&block, shape.at(1000 + 3)).unwrap();
        let used = 3 * shape.place().per_block() + 78;
        assert_eq!(Allocator::open(file.shared(), shape.place()).unwrap().end(), used, "order {order}");
    }
}
