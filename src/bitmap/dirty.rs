//! A dirty bitmap: which granules of a disk were written.
//!
//! One bit stands for `granularity` bytes (a power of two, as QEMU's bitmaps). Everything here rounds towards dirty: a
//! mark of one byte marks its granule, a merge between granularities marks every granule that a dirty byte touches. So
//! a bitmap may say too much, never too little.

use crate::bitmap::bits::Bits;
use crate::bitmap::put::Put;
use crate::bitmap::scale;
use crate::error::{Error, Result, errno};
use crate::sync::full_fence;
use crate::units::{GRANULARITY_RANGE, MAX_DISK_BYTES, human_size};
use std::ops::Range;

/// The dirty granules of one disk; marked by many threads at once (see [`Bits`]).
#[derive(Debug)]
pub struct DirtyBitmap {
    granularity: u64,
    size: u64,
    bits: Bits,
}

impl DirtyBitmap {
    /// A bitmap of a disk of `size` bytes over `bits`, which keep their state. EINVAL where the granularity is no power
    /// of two in QEMU's limits, the size is out of ours, or `bits` is not one bit per granule.
    pub fn new(granularity: u64, size: u64, bits: Bits) -> Result<Self> {
        let expected = DirtyBitmap::bits_for(granularity, size)?;
        if bits.len() != expected {
            let why = format!("{} bits where a disk of {size} bytes has {expected} granules", bits.len());
            return Err(Error::new(errno::EINVAL, "bitmap", why));
        }
        Ok(DirtyBitmap { granularity, size, bits })
    }

    /// A clean bitmap in this process' heap.
    pub fn heap(granularity: u64, size: u64) -> Result<Self> {
        DirtyBitmap::new(granularity, size, Bits::heap(DirtyBitmap::bits_for(granularity, size)?))
    }

    /// How many granules a disk of `size` bytes has; checks both figures.
    pub fn bits_for(granularity: u64, size: u64) -> Result<u64> {
        if !granularity.is_power_of_two() || !GRANULARITY_RANGE.contains(&granularity) {
            let why = format!("granularity {granularity} is not a power of two between 512 bytes and 2 GiB");
            return Err(Error::new(errno::EINVAL, "bitmap", why));
        }
        if size > MAX_DISK_BYTES {
            let why = format!("a disk of {size} bytes is larger than {}", human_size(MAX_DISK_BYTES));
            return Err(Error::new(errno::EINVAL, "bitmap", why));
        }
        Ok(size.div_ceil(granularity))
    }

    /// Bytes per bit.
    pub fn granularity(&self) -> u64 {
        self.granularity
    }

    /// Bytes of the disk.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The bits, one per granule.
    pub fn bits(&self) -> &Bits {
        &self.bits
    }

    /// Marks every granule that `offset..offset + len` touches, before anything that the caller does afterwards (I6).
    pub fn mark(&self, offset: u64, len: u64) {
        self.mark_unfenced(offset, len);
        full_fence();
    }

    /// Whether every granule that a range touches is marked; what was done before the marks is seen then.
    pub fn is_marked(&self, offset: u64, len: u64) -> bool {
        len == 0 || self.bits.all_set(self.granules(offset, offset.saturating_add(len)))
    }

    /// As [`DirtyBitmap::mark`] without the full fence, which the caller passes before what it does afterwards: one for
    /// all the bitmaps that it marks.
    pub fn mark_unfenced(&self, offset: u64, len: u64) {
        if len > 0 {
            self.bits.set_range_unfenced(self.granules(offset, offset.saturating_add(len)));
        }
    }

    /// Whether the granule of byte `offset` is dirty; never past the end.
    pub fn is_dirty(&self, offset: u64) -> bool {
        offset < self.size && self.bits.get(offset / self.granularity)
    }

    /// The first run of dirty bytes in `from..end`: as long as possible, cut to that range and to the disk.
    pub fn next_dirty_run(&self, from: u64, end: u64) -> Option<Range<u64>> {
        let end = end.min(self.size);
        if from >= end {
            return None;
        }
        let granules = self.granules(from, end);
        let first = self.bits.next_set(granules.start, granules.end)?;
        let last = self.bits.next_clear(first + 1, granules.end).unwrap_or(granules.end);
        Some((first * self.granularity).max(from)..(last * self.granularity).min(end))
    }

    /// Set bits times granularity, as QEMU counts: more than the dirty bytes where the last granule is a partial one.
    pub fn count_bytes(&self) -> u64 {
        self.bits.count() * self.granularity
    }

    /// Marks what is dirty in `other`, whatever its granularity; what lies past the end of this disk is left out.
    pub fn merge_from(&self, other: &DirtyBitmap) {
        scaled(other, self.granularity, self.size, &mut self.bits.put_shared());
        full_fence();
    }

    /// As [`DirtyBitmap::merge_from`], into a bitmap that nobody marks yet: several times as fast.
    pub fn absorb(&mut self, other: &DirtyBitmap) {
        scaled(other, self.granularity, self.size, &mut self.bits.put());
    }

    /// Marks everything.
    pub fn mark_all(&self) {
        self.bits.set_range(0..self.bits.len());
    }

    /// Clears everything. The caller keeps markers away.
    pub fn clear(&self) {
        self.bits.clear_all();
    }

    /// This bitmap for a disk of `new_size` bytes, over clear `bits`: the same granules dirty, and what was added dirty
    /// too where `growth_dirty`. The caller keeps markers away.
    pub fn resized(&self, new_size: u64, bits: Bits, growth_dirty: bool) -> Result<DirtyBitmap> {
        let mut resized = DirtyBitmap::new(self.granularity, new_size, bits)?;
        resized.bits.or_from_mut(&self.bits);
        if growth_dirty && new_size > self.size {
            resized.mark(self.size, new_size - self.size);
        }
        Ok(resized)
    }

    /// The granules that the bytes `from..end` touch.
    fn granules(&self, from: u64, end: u64) -> Range<u64> {
        from / self.granularity..end.div_ceil(self.granularity)
    }
}

/// Puts a bitmap's bits into one of another granularity, as far as its disk of `size` bytes reaches too. What becomes
/// part of groups that are full there is not looked at.
fn scaled(from: &DirtyBitmap, granularity: u64, size: u64, put: &mut Put<'_>) {
    let bytes = size.min(from.size);
    let (to_shift, from_shift) = (granularity.trailing_zeros(), from.granularity.trailing_zeros());
    let bits = bytes.div_ceil(from.granularity);
    let there = put.summary();
    if to_shift < from_shift {
        let (shift, end) = (from_shift - to_shift, bytes.div_ceil(granularity));
        let full = |group: usize| {
            let first = group.saturating_mul(1 << shift);
            (first..first.saturating_add(1 << shift)).all(|group| there.is_full(group))
        };
        from.bits.each_group(bits, full, |first, words| {
            scale::expand(words, first, shift, end, |first, words| put.or(first, words));
        });
    } else {
        let shift = to_shift - from_shift;
        let full = |group: usize| there.is_full(group >> shift);
        from.bits.each_group(bits, full, |first, words| {
            scale::shrink(words, first, shift, |first, words| put.or(first, words));
        });
    }
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The naive model: one flag per granule, asked byte by byte.
    struct Model {
        granularity: u64,
        size: u64,
        dirty: Vec<bool>,
    }

    impl Model {
        fn new(granularity: u64, size: u64) -> Model {
            Model { granularity, size, dirty: vec![false; size.div_ceil(granularity) as usize] }
        }
        fn mark(&mut self, offset: u64, len: u64) {
            for (i, dirty) in self.dirty.iter_mut().enumerate() {
                let start = i as u64 * self.granularity;
                *dirty |= len > 0 && start < offset.saturating_add(len) && offset < start + self.granularity;
            }
        }
        fn is_dirty(&self, byte: u64) -> bool {
            byte < self.size && self.dirty[(byte / self.granularity) as usize]
        }
        fn merge(&mut self, other: &Model) {
            for step in 0..other.size.min(self.size).div_ceil(512) {
                if other.is_dirty(step * 512) {
                    let len = (other.size.min(self.size) - step * 512).min(512);
                    self.mark(step * 512, len);
                }
            }
        }
    }

    fn assert_same(bitmap: &DirtyBitmap, model: &Model) {
        let dirty: Vec<bool> = (0..bitmap.bits().len()).map(|i| bitmap.bits().get(i)).collect();
        assert_eq!(dirty, model.dirty);
        assert_eq!(bitmap.count_bytes(), dirty.iter().filter(|d| **d).count() as u64 * model.granularity);
    }

    fn granularity() -> impl Strategy<Value = u64> {
        (9..17u32).prop_map(|shift| 1u64 << shift)
    }

    fn marks() -> impl Strategy<Value = Vec<(u64, u64)>> {
        let offset = prop_oneof![9 => 0..40_000u64, 1 => Just(u64::MAX)];
        let len = prop_oneof![2 => Just(0u64), 4 => 1..600u64, 4 => 1..9000u64, 1 => Just(u64::MAX)];
        proptest::collection::vec((offset, len), 0..6)
    }

    proptest! {
        #[test]
        fn marks_runs_and_merges_agree_with_the_naive_model(
            (g1, g2) in (granularity(), granularity()),
            (size1, size2) in (0..33_000u64, 0..33_000u64),
            (marks1, marks2) in (marks(), marks()),
            alone: bool,
            (from, end) in (0..34_000u64, 0..40_000u64),
        ) {
            let (mut a, b) = (DirtyBitmap::heap(g1, size1).unwrap(), DirtyBitmap::heap(g2, size2).unwrap());
            let (mut ma, mut mb) = (Model::new(g1, size1), Model::new(g2, size2));
            for (offset, len) in marks1 {
                a.mark(offset, len);
                ma.mark(offset, len);
            }
            for (offset, len) in marks2 {
                b.mark(offset, len);
                mb.mark(offset, len);
            }
            assert_same(&a, &ma);
            if alone { a.absorb(&b) } else { a.merge_from(&b) }
            ma.merge(&mb);
            assert_same(&a, &ma);
            let mut at = from;
            while let Some(run) = a.next_dirty_run(at, end) {
                prop_assert!(run.start >= at && run.start < run.end && run.end <= end.min(size1));
                prop_assert!((at..run.start).all(|byte| !ma.is_dirty(byte)));
                prop_assert!(run.clone().all(|byte| ma.is_dirty(byte)));
                prop_assert!(run.end == end.min(size1) || !ma.is_dirty(run.end));
                at = run.end;
            }
            prop_assert!((at..end.min(size1)).all(|byte| !ma.is_dirty(byte)));
        }

        #[test]
        fn resizing_keeps_marks_and_treats_growth_as_told(
            g in granularity(), old in 0..20_000u64, new in 0..20_000u64, marks in marks(), growth_dirty: bool,
        ) {
            let a = DirtyBitmap::heap(g, old).unwrap();
            marks.iter().for_each(|(offset, len)| a.mark(*offset, *len));
            let bits = Bits::heap(DirtyBitmap::bits_for(g, new).unwrap());
            let b = a.resized(new, bits, growth_dirty).unwrap();
            for i in 0..b.bits().len() {
                let granule = i * g..((i + 1) * g).min(new);
                let kept = a.bits().get(i);
                prop_assert_eq!(b.bits().get(i), kept || (growth_dirty && granule.end > old));
            }
        }
    }

    #[test]
    fn merging_between_granularities_rounds_to_dirty() {
        let fine = DirtyBitmap::heap(512, 8192).unwrap();
        let coarse = DirtyBitmap::heap(4096, 8192).unwrap();
        fine.mark(4096 + 513, 1);
        coarse.merge_from(&fine);
        assert_eq!(coarse.next_dirty_run(0, u64::MAX), Some(4096..8192));
        fine.clear();
        fine.merge_from(&coarse);
        assert_eq!(fine.next_dirty_run(0, u64::MAX), Some(4096..8192));
        assert_eq!(fine.count_bytes(), 4096);
    }

    #[test]
    fn limits_are_refused_not_clamped() {
        for granularity in [0, 1, 256, 513, 1 << 32, u64::MAX] {
            assert_eq!(DirtyBitmap::heap(granularity, 4096).unwrap_err().errno(), errno::EINVAL, "{granularity}");
        }
        assert!(DirtyBitmap::heap(1 << 31, MAX_DISK_BYTES).is_ok());
        assert_eq!(DirtyBitmap::bits_for(512, u64::MAX).unwrap_err().errno(), errno::EINVAL);
        assert!(DirtyBitmap::new(512, 1024, Bits::heap(1)).is_err(), "a bit too few would lose marks");
        let empty = DirtyBitmap::heap(512, 0).unwrap();
        empty.mark(0, 1);
        empty.mark_all();
        assert_eq!((empty.count_bytes(), empty.next_dirty_run(0, 1)), (0, None));
    }

    #[test]
    fn everything_means_every_granule_up_to_the_partial_last_one() {
        let bitmap = DirtyBitmap::heap(4096, 10_000).unwrap();
        bitmap.mark_all();
        assert_eq!(bitmap.next_dirty_run(100, u64::MAX), Some(100..10_000));
        assert_eq!(bitmap.count_bytes(), 12_288);
        bitmap.clear();
        assert_eq!(bitmap.next_dirty_run(0, u64::MAX), None);
    }
}
