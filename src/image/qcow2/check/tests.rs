//! Check and repair on images laid out by hand: each kind of damage, power loss, and damage at random.

use super::*;
use crate::error::errno;
use crate::image::qcow2::header::incompatible;
use crate::image::qcow2::tables::COPIED;
use crate::image::qcow2::test_image::Shape;
use crate::storage::MemFile;
use crate::storage::crash::CrashDisk;
use proptest::prelude::*;

fn image(shape: Shape) -> MemFile {
    let file = MemFile::new("a", 0);
    shape.write(&file);
    file
}

/// Sets a stored refcount; the block at cluster 2 is the first.
fn set_refcount(file: &dyn Storage, shape: Shape, cluster: u64, count: u64) {
    let place = shape.place();
    let mut block = vec![0; place.cluster_bytes() as usize];
    let at = shape.at(2 + cluster / place.per_block());
    file.read_at(&mut block, at).unwrap();
    place.width.set(&mut block, cluster % place.per_block(), count);
    file.write_at(&block, at).unwrap();
}

fn data(file: &dyn Storage, shape: Shape) -> Vec<u8> {
    let mut bytes = vec![0; shape.at(shape.data_clusters) as usize];
    file.read_at(&mut bytes, shape.at(shape.data())).unwrap();
    bytes
}

#[test]
fn a_good_image_is_clean_at_every_width() {
    for (order, cluster_bits) in (0..7).zip([9, 10, 12, 14, 16, 9, 18]) {
        let shape = Shape::new(cluster_bits, order, 70);
        let report = check(&image(shape)).unwrap();
        assert!(report.is_clean(), "order {order}: {:?}", report.findings);
        let counted = (report.total_clusters, report.allocated_clusters, report.image_end_offset);
        assert_eq!(counted, (70, 70, shape.at(shape.end())));
    }
}

#[test]
fn wrong_refcounts_are_found_and_corrected_where_they_stand() {
    let shape = Shape::new(12, 4, 10);
    let cases = [(shape.data(), 0, 1, 0), (shape.data(), 3, 0, 1), (shape.l1(), 0, 1, 0), (shape.end(), 1, 0, 0)];
    for (cluster, count, corruptions, leaks) in cases {
        let file = image(shape);
        let content = data(&file, shape);
        set_refcount(&file, shape, cluster, count);
        let report = check(&file).unwrap();
        let flags = report.findings.iter().filter(|finding| finding.cure == Cure::Flags).count() as u64;
        // The flag of a data cluster is wrong too; a count behind the end of the file says nothing.
        assert_eq!(report.corruptions, corruptions + flags, "{:?}", report.findings);
        assert_eq!(flags, u64::from(cluster == shape.data()));
        assert_eq!(report.leaks, leaks);
        let repaired = repair(&file, Repair::All).unwrap();
        assert!(repaired.after.is_clean(), "{:?}", repaired.after.findings);
        assert_eq!(repaired.before, report);
        assert_eq!(data(&file, shape), content);
    }
}

#[test]
fn leaks_are_freed_alone_when_that_is_asked_for() {
    let shape = Shape::new(12, 4, 10);
    let file = image(shape);
    file.set_len(shape.at(shape.end() + 4)).unwrap();
    set_refcount(&file, shape, shape.end() + 2, 1);
    let report = check(&file).unwrap();
    assert_eq!((report.corruptions, report.leaks, report.image_end_offset), (0, 1, shape.at(shape.end() + 3)));
    let repaired = repair(&file, Repair::Leaks).unwrap();
    assert_eq!(repaired.after.image_end_offset, shape.at(shape.end()));
    assert!(repaired.after.is_clean());
    set_refcount(&file, shape, shape.data(), 0);
    assert_eq!(repair(&file, Repair::Leaks).unwrap_err().errno(), errno::EIO);
}

/// Damage to refcount structures: what is written, and where.
fn structural_damage(shape: Shape) -> Vec<(u64, u64)> {
    let table = shape.at(1);
    vec![
        (table, 0),
        (table, shape.at(2) | 1),
        (table, shape.at(2) + 512),
        (table, shape.at(shape.end() + 100)),
        (table, shape.at(shape.l1())),
        (table, shape.at(shape.data())),
        (table + 8, shape.at(2)),
    ]
}

#[test]
fn broken_refcount_structures_are_replaced() {
    let shape = Shape::new(12, 4, 10);
    for (offset, value) in structural_damage(shape) {
        let file = image(shape);
        let content = data(&file, shape);
        file.write_at(&value.to_be_bytes(), offset).unwrap();
        let report = check(&file).unwrap();
        assert!(report.corruptions > 0 && report.needs_rebuild, "{offset} {value:#x}: {report:?}");
        let repaired = repair(&file, Repair::All).unwrap();
        assert!(repaired.after.is_clean(), "{offset} {value:#x}: {:?}", repaired.after.findings);
        assert_eq!(data(&file, shape), content);
    }
}

#[test]
fn a_dirty_image_is_repaired_and_clean_then() {
    let shape = Shape { incompatible: incompatible::DIRTY | incompatible::CORRUPT, ..Shape::new(12, 4, 10) };
    let file = image(shape);
    let report = check(&file).unwrap();
    assert!(report.is_clean() && report.dirty && report.corrupt);
    file.write_at(&[0; 4096], shape.at(2)).unwrap();
    let repaired = repair(&file, Repair::All).unwrap();
    assert_eq!((repaired.after.is_clean(), repaired.after.dirty, repaired.after.corrupt), (true, false, false));
    assert!(!read_header(&file).unwrap().is_dirty());
}

#[test]
fn what_no_repair_can_restore_is_left_alone() {
    let shape = Shape::new(12, 4, 10);
    let l2 = shape.at(shape.l1() + 1);
    let damage = [
        (shape.at(shape.l1()), shape.at(shape.l1() + 1) | 2),
        (shape.at(shape.l1()), shape.at(shape.end() + 9)),
        (shape.at(shape.l1()), shape.at(shape.l1())),
        (l2, shape.at(shape.data()) | COPIED | 2),
        (l2, shape.at(shape.data()) + 512),
        (l2, shape.at(shape.end() + 9) | COPIED),
        (l2, shape.at(shape.l1()) | COPIED),
    ];
    for (offset, value) in damage {
        let file = image(shape);
        file.write_at(&value.to_be_bytes(), offset).unwrap();
        set_refcount(&file, shape, shape.data() + 3, 0);
        let report = check(&file).unwrap();
        assert_eq!(report.worst_cure, Some(Cure::None), "{offset} {value:#x}: {:?}", report.findings);
        let stamp = file.stamp().unwrap();
        assert_eq!(repair(&file, Repair::All).unwrap_err().errno(), errno::EIO);
        assert_eq!(file.stamp().unwrap(), stamp, "nothing is written");
    }
}

#[test]
fn findings_are_counted_beyond_those_that_are_kept() {
    let shape = Shape::new(9, 4, 3000);
    let file = image(shape);
    for cluster in shape.data()..shape.end() {
        set_refcount(&file, shape, cluster, 0);
    }
    let report = check(&file).unwrap();
    assert_eq!((report.corruptions, report.findings.len()), (6000, FINDINGS_KEPT));
    assert!(repair(&file, Repair::All).unwrap().after.is_clean());
}

#[test]
fn a_power_loss_in_a_repair_leaves_what_the_next_repair_can_finish() {
    let shape = Shape { incompatible: incompatible::DIRTY, ..Shape::new(9, 4, 20) };
    for (offset, value) in structural_damage(shape).into_iter().chain([(shape.at(2), 0)]) {
        // Each sync is a step; the disk is looked at as it was between each two, and after the last.
        for step in 0..12 {
            let disk = CrashDisk::new();
            let file = disk.open("a").unwrap();
            shape.write(&file);
            file.write_at(&value.to_be_bytes(), offset).unwrap();
            file.sync().unwrap();
            let content = data(&file, shape);
            let stopping = Stopping { inner: file.shared(), syncs_left: step.into(), bytes_read: 0.into() };
            let finished = repair(&stopping, Repair::All).is_ok();
            for seed in 0..12 {
                let after = disk.survivors(seed).open("a").unwrap();
                let repaired = repair(&after, Repair::All).unwrap();
                assert!(repaired.after.is_clean() && !repaired.after.dirty, "step {step}, seed {seed}");
                assert_eq!(data(&after, shape), content, "step {step}, seed {seed}");
            }
            if finished {
                break;
            }
            assert!(step < 11, "a repair of more steps than are tested");
        }
    }
}

#[test]
fn tables_that_point_to_and_fro_cost_no_more_than_others() {
    let shape = Shape::new(12, 6, 512);
    let far = 4 * shape.place().per_block();
    let file = image(shape);
    file.set_len(shape.at(far + 512)).unwrap();
    file.write_at(&shape.at(far).to_be_bytes(), shape.at(1) + 4 * 8).unwrap();
    for guest in (0..512).step_by(2) {
        let entry = shape.at(shape.l1() + 1) + guest * 8;
        file.write_at(&(shape.at(far + guest) | COPIED).to_be_bytes(), entry).unwrap();
    }
    let counting = Stopping { inner: file.shared(), syncs_left: u32::MAX.into(), bytes_read: 0.into() };
    let report = check(&counting).unwrap();
    assert!(report.corruptions > 256);
    let clusters = *counting.bytes_read.lock() / shape.at(1);
    assert!(clusters < 16, "{clusters} clusters read");
}

#[test]
fn tables_in_holes_cost_nothing() {
    let shape = Shape::new(12, 4, 1);
    let file = image(shape);
    file.set_len(1 << 40).unwrap();
    for index in 1..200 {
        let (block, table) = (shape.at(2000 + index), shape.at(4000 + index) | COPIED);
        file.write_at(&block.to_be_bytes(), shape.at(1) + index * 8).unwrap();
        file.write_at(&table.to_be_bytes(), shape.at(shape.l1()) + index * 8).unwrap();
    }
    file.write_at(&200u32.to_be_bytes(), 36).unwrap();
    let counting = Stopping { inner: file.shared(), syncs_left: u32::MAX.into(), bytes_read: 0.into() };
    let report = check(&counting).unwrap();
    // The clusters of the tables and of the blocks are not counted as used, and the COPIED flags stand for that.
    assert_eq!((report.corruptions, report.leaks, report.worst_cure), (3 * 199, 0, Some(Cure::Flags)));
    let clusters = *counting.bytes_read.lock() / shape.at(1);
    assert!(clusters < 12, "{clusters} clusters read");
    assert!(repair(&file, Repair::All).unwrap().after.is_clean());
    assert!(check(&file).unwrap().is_clean());
}

/// A file whose n-th sync fails before it has done anything; it counts what is read.
#[derive(Debug)]
struct Stopping {
    inner: crate::storage::SharedStorage,
    syncs_left: parking_lot::Mutex<u32>,
    bytes_read: parking_lot::Mutex<u64>,
}

impl Storage for Stopping {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        *self.bytes_read.lock() += buf.len() as u64;
        self.inner.read_at(buf, offset)
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.inner.write_at(buf, offset)
    }
    fn sync(&self) -> Result<()> {
        let mut left = self.syncs_left.lock();
        if *left == 0 {
            return Err(crate::error::Error::new(errno::EIO, "sync", "stopped here"));
        }
        *left -= 1;
        self.inner.sync()
    }
    fn len(&self) -> Result<u64> {
        self.inner.len()
    }
    fn set_len(&self, len: u64) -> Result<()> {
        self.inner.set_len(len)
    }
    fn punch_hole(&self, offset: u64, len: u64) -> Result<()> {
        self.inner.punch_hole(offset, len)
    }
    fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        self.inner.write_zeroes(offset, len)
    }
    fn block_status(&self, offset: u64, len: u64) -> Result<crate::storage::BlockStatus> {
        self.inner.block_status(offset, len)
    }
    fn stamp(&self) -> Result<crate::storage::Stamp> {
        self.inner.stamp()
    }
    fn path(&self) -> &std::path::Path {
        self.inner.path()
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    /// Whatever the metadata say: an answer, no panic, and a repair that was done leaves a clean image.
    #[test]
    fn any_damage_gets_an_answer(
        order in 0u32..7,
        flips in prop::collection::vec((any::<prop::sample::Index>(), 0u8..8), 1..6),
    ) {
        let shape = Shape::new(9, order, 100);
        let file = image(shape);
        for (place, bit) in flips {
            let offset = place.index(shape.at(shape.data()) as usize) as u64;
            let mut byte = [0];
            file.read_at(&mut byte, offset).unwrap();
            file.write_at(&[byte[0] ^ 1 << bit], offset).unwrap();
        }
        let _ = check(&file);
        if let Ok(repaired) = repair(&file, Repair::All) {
            prop_assert!(repaired.after.is_clean(), "{:?}", repaired.after.findings);
        }
    }
}
