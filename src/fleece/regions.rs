//! Regions of a disk: who writes where now, and where a power loss may leave the image or the bits behind.
//!
//! A region is *armed* while its intent is set durably in the sidecar (see `bitmap::sidecar`). Invariants:
//!
//! * **Armed before written.** Who changes the image holds a *pin* on each region of the range, taken before the gate
//!   and held until the change is made. Only an armed region can be pinned; one that is not is armed first: intent
//!   written and synced, *then* `armed` is published.
//! * **Pinned is armed.** A region is disarmed (see `disarm`) only where nobody had it pinned since before the image
//!   was synced: a pin that comes meanwhile takes it out of the round, with one compare-and-swap and without waiting.
//! * **Nobody waits for a pin.** A disarm passes over what is pinned. Who waits to arm holds no pin, gate or stripe.
//! * **One change of the intents at a time**: arming and clearing hold `arming` across their I/O. So a region that is
//!   armed anew cannot be overtaken by the clearing before.
//!
//! Group commit: those who want regions armed leave their wishes and queue up at `arming`. Who gets there arms all the
//! wishes that there are with one sync; those behind find theirs done. Look-ahead: where the regions just before are
//! armed, as behind a sequential writer, as many again are armed with it, up to a bound. Some may lie behind the disk's
//! end, which does no harm. Bursts: where one arming follows the other, as behind a writer that goes everywhere, each few
//! of them double the neighbourhood that is armed with a region, up to the same bound: a sync less for the guest to wait
//! for, at the price of some more that counts as changed after a power loss.
//!
//! A pinned write costs a load and one atomic read-modify-write, and another one at its end. The word of a region holds
//! two flags, the number of pins and the count of all pins there ever were (which wraps): a region whose word is the
//! same at two looks was idle between them.

use super::counters::Counters;
use super::disk::Disk;
use crate::bitmap::Sidecar;
use crate::error::Result;
use crate::storage::clock::now_ns;
use crate::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use crate::sync::{Mutex, RwLockReadGuard};
use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::OnceLock;

/// The intent is durable.
const ARMED: u64 = 1;
/// A disarm is under way; clearing this flag takes the region out of it.
const DISARMING: u64 = 2;
/// One pin, in the 22 bits of their number.
const PIN: u64 = 4;
const PINS: u64 = (1 << 24) - PIN;
/// One in the count of all pins.
const EVER: u64 = 1 << 24;

/// Regions, as many as the intent page has bits, in segments that are made when they are first used.
const SEGMENT: u64 = 64;
const SEGMENTS: u64 = crate::bitmap::INTENT_REGIONS / SEGMENT;

/// Most regions, and most bytes, that are armed ahead of a sequential writer.
const AHEAD_MAX: u64 = 64;
const AHEAD_MAX_BYTES: u64 = 1 << 30;

/// So many armings of a burst arm neighbourhoods of the same size.
const BURST_STEP: u32 = 4;
/// Most bytes of a neighbourhood, unless one region is larger.
const BURST_MAX_BYTES: u64 = 64 << 20;
/// A longer pause ends a burst.
const BURST_PAUSE_NS: i64 = 1_000_000_000;

type Segment = Box<[AtomicU64]>;

/// Armings, each soon after the one before.
#[derive(Default)]
struct Burst {
    count: u32,
    last_ns: i64,
}

impl Burst {
    /// Counts an arming; returns how many regions of `size` bytes, a power of two, are to be armed as one.
    fn next(&mut self, now_ns: i64, size: u64) -> u64 {
        let goes_on = (0..BURST_PAUSE_NS).contains(&now_ns.saturating_sub(self.last_ns));
        self.count = if goes_on { self.count.saturating_add(1) } else { 0 };
        self.last_ns = now_ns;
        let most = (BURST_MAX_BYTES / size).clamp(1, AHEAD_MAX);
        1_u64.checked_shl(self.count / BURST_STEP).map_or(most, |width| width.min(most))
    }
}

/// See the module.
pub(super) struct Regions {
    /// Binary logarithm of the region size; it changes under the exclusive gate and only grows.
    shift: AtomicU32,
    segments: Box<[OnceLock<Segment>]>,
    /// Intents could not be written: nothing is pinned any more, and all tracking counts as lost.
    given_up: AtomicBool,
    /// Regions that somebody waits for.
    wanted: Mutex<BTreeSet<u64>>,
    /// See the module. Lock rank 5: nothing but the sidecar's is taken below it.
    arming: Mutex<Burst>,
}

impl std::fmt::Debug for Regions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Regions").field("size", &self.size()).field("armed", &self.armed()).finish_non_exhaustive()
    }
}

/// A hold on some regions: they stay armed while it lives.
#[derive(Debug)]
pub(super) struct Pin<'a> {
    regions: &'a Regions,
    range: Range<u64>,
    shift: u32,
    /// False: tracking is given up, and nothing is held.
    held: bool,
}

impl Pin<'_> {
    /// Whether it is of regions as they are now. To be asked under the gate.
    fn counts(&self) -> bool {
        self.held != self.regions.given_up() && self.shift == self.regions.shift.load(Ordering::SeqCst)
    }
}

impl Drop for Pin<'_> {
    fn drop(&mut self) {
        if self.held {
            self.regions.unpin(self.range.clone());
        }
    }
}

impl Regions {
    /// Regions of `size` bytes (a power of two) of which those in `armed` are.
    pub(super) fn new(size: u64, armed: impl Iterator<Item = u64>) -> Self {
        let regions = Regions {
            shift: AtomicU32::new(size.trailing_zeros()),
            segments: (0..SEGMENTS).map(|_| OnceLock::new()).collect(),
            given_up: AtomicBool::new(false),
            wanted: Mutex::new(BTreeSet::new()),
            arming: Mutex::new(Burst::default()),
        };
        armed.for_each(|region| regions.publish(region));
        regions
    }

    /// Size of a region in bytes.
    pub(super) fn size(&self) -> u64 {
        1 << self.shift.load(Ordering::SeqCst)
    }

    /// How many are armed now.
    pub(super) fn armed(&self) -> u64 {
        self.known().filter(|(_, word)| word.load(Ordering::Relaxed) & ARMED != 0).count() as u64
    }

    pub(super) fn given_up(&self) -> bool {
        self.given_up.load(Ordering::SeqCst)
    }

    /// The regions that bytes lie in, as far as there are regions.
    fn of(&self, bytes: Range<u64>, shift: u32) -> Range<u64> {
        let end = bytes.end.div_ceil(1 << shift).min(SEGMENTS * SEGMENT);
        (bytes.start >> shift).min(end)..end
    }

    fn word(&self, region: u64) -> Option<&AtomicU64> {
        let segment = self.segments.get((region / SEGMENT) as usize)?;
        segment.get_or_init(|| (0..SEGMENT).map(|_| AtomicU64::new(0)).collect()).get((region % SEGMENT) as usize)
    }

    /// The words that were ever used.
    fn known(&self) -> impl Iterator<Item = (u64, &AtomicU64)> {
        let segments = (0..).step_by(SEGMENT as usize).zip(&self.segments);
        segments.flat_map(|(first, segment)| (first..).zip(segment.get().into_iter().flatten()))
    }

    fn is_armed(&self, region: u64) -> bool {
        self.word(region).is_some_and(|word| word.load(Ordering::SeqCst) & ARMED != 0)
    }

    fn publish(&self, region: u64) {
        if let Some(word) = self.word(region) {
            word.fetch_or(ARMED, Ordering::SeqCst);
        }
    }

    /// Pins one region, which takes it out of a disarm. False: it is not armed.
    fn pin_one(&self, region: u64) -> bool {
        let Some(word) = self.word(region) else { return false };
        if word.load(Ordering::Acquire) & ARMED == 0 {
            return false;
        }
        let mut now = word.fetch_add(PIN + EVER, Ordering::SeqCst).wrapping_add(PIN + EVER);
        loop {
            if now & ARMED == 0 {
                word.fetch_sub(PIN, Ordering::SeqCst);
                return false;
            }
            if now & DISARMING == 0 {
                return true;
            }
            match word.compare_exchange(now, now & !DISARMING, Ordering::SeqCst, Ordering::SeqCst) {
                Ok(_) => return true,
                Err(other) => now = other,
            }
        }
    }

    fn unpin(&self, range: Range<u64>) {
        for region in range {
            if let Some(word) = self.word(region) {
                word.fetch_sub(PIN, Ordering::SeqCst);
            }
        }
    }

    /// Pins all regions of a range of bytes, or none.
    fn pin(&self, bytes: Range<u64>) -> Option<Pin<'_>> {
        let shift = self.shift.load(Ordering::SeqCst);
        let range = self.of(bytes, shift);
        let held = !self.given_up();
        if held && let Some(first) = range.clone().find(|region| !self.pin_one(*region)) {
            self.unpin(range.start..first);
            return None;
        }
        Some(Pin { regions: self, range, shift, held })
    }

    /// Arms all regions of a range of bytes; on an error some may not be.
    pub(super) fn arm(&self, bytes: Range<u64>, sidecar: &Sidecar, counters: &Counters) -> Result<()> {
        let shift = self.shift.load(Ordering::SeqCst);
        let range = self.of(bytes, shift);
        let wish: Vec<u64> = range.clone().chain(self.ahead(&range)).filter(|region| !self.is_armed(*region)).collect();
        self.wanted.lock().extend(wish);
        let mut burst = self.arming.lock();
        if shift != self.shift.load(Ordering::SeqCst) {
            return Ok(());
        }
        let mut batch = std::mem::take(&mut *self.wanted.lock());
        batch.extend(range);
        batch.retain(|region| !self.is_armed(*region));
        if batch.is_empty() {
            return Ok(());
        }
        let now_ns = now_ns();
        let width = burst.next(now_ns, 1 << shift);
        let blocks: BTreeSet<u64> = batch.into_iter().map(|region| region / width * width).collect();
        let batch = blocks.into_iter().flat_map(|first| first..(first + width).min(SEGMENTS * SEGMENT));
        let batch: Vec<u64> = batch.filter(|region| !self.is_armed(*region)).collect();
        sidecar.arm(&batch, now_ns)?;
        batch.iter().for_each(|region| self.publish(*region));
        counters.intent_syncs.add(1);
        counters.regions_armed.add(batch.len() as u64);
        Ok(())
    }

    /// What is armed beyond `range`: as many regions as are armed just before it.
    fn ahead(&self, range: &Range<u64>) -> Range<u64> {
        let most = AHEAD_MAX.min(AHEAD_MAX_BYTES / self.size()).min(range.start);
        let run = (1..=most).take_while(|back| self.is_armed(range.start - back)).count() as u64;
        range.end..(range.end + run).min(SEGMENTS * SEGMENT)
    }

    /// Begins a disarm of the armed regions that nobody has pinned, and whose word is the one in `seen`, which is
    /// replaced. One at a time.
    pub(super) fn begin_disarm(&self, seen: &mut Vec<(u64, u64)>) -> Vec<u64> {
        let mut before = std::mem::take(seen).into_iter().peekable();
        let mut idle = Vec::new();
        for (region, word) in self.known() {
            let now = word.load(Ordering::SeqCst);
            if now & ARMED == 0 {
                continue;
            }
            seen.push((region, now));
            while before.next_if(|(other, _)| *other < region).is_some() {}
            let same = before.next_if(|(other, _)| *other == region).is_some_and(|(_, then)| then == now);
            let may = same && now & (PINS | DISARMING) == 0;
            let set = |now: u64| word.compare_exchange(now, now | DISARMING, Ordering::SeqCst, Ordering::SeqCst);
            if may && set(now).is_ok() {
                idle.push(region);
            }
        }
        idle
    }

    /// Those of `regions` that nobody took out of the disarm.
    pub(super) fn still_disarming(&self, regions: &[u64]) -> Vec<u64> {
        let still = |region: u64| self.word(region).is_some_and(|word| word.load(Ordering::SeqCst) & DISARMING != 0);
        regions.iter().copied().filter(|region| still(*region)).collect()
    }

    /// Ends a disarm without success: the regions stay armed.
    pub(super) fn cancel_disarm(&self, regions: &[u64]) {
        for word in regions.iter().filter_map(|region| self.word(*region)) {
            word.fetch_and(!DISARMING, Ordering::SeqCst);
        }
    }

    /// Ends a disarm, now that everything in the regions is durable: those that nobody took out of it cannot be pinned
    /// from here on, their intents are cleared, and only then they may be armed anew. Returns their number; after an
    /// error they are not armed either.
    pub(super) fn finish_disarm(&self, regions: &[u64], sidecar: &Sidecar) -> Result<u64> {
        let _arming = self.arming.lock();
        let clear = |region: &u64| {
            let word = self.word(*region)?;
            let mut now = word.load(Ordering::SeqCst);
            while now & DISARMING != 0 {
                let cleared = now & !(ARMED | DISARMING);
                match word.compare_exchange(now, cleared, Ordering::SeqCst, Ordering::SeqCst) {
                    Ok(_) => return Some(*region),
                    Err(other) => now = other,
                }
            }
            None
        };
        let cleared: Vec<u64> = regions.iter().filter_map(clear).collect();
        if !cleared.is_empty() {
            sidecar.disarm(&cleared)?;
        }
        Ok(cleared.len() as u64)
    }

    /// The bytes of a region.
    pub(super) fn bytes_of(&self, region: u64) -> Range<u64> {
        region.saturating_mul(self.size())..(region + 1).saturating_mul(self.size())
    }

    /// Regions of `size` bytes from here on, all of those that a disk of `disk` bytes has armed. The caller holds the
    /// gate exclusively and keeps disarms away.
    pub(super) fn widen(&self, size: u64, disk: u64, sidecar: &Sidecar) -> Result<()> {
        let _arming = self.arming.lock();
        sidecar.widen_regions(size)?;
        self.shift.store(size.trailing_zeros(), Ordering::SeqCst);
        self.wanted.lock().clear();
        (0..disk.div_ceil(size)).for_each(|region| self.publish(region));
        Ok(())
    }
}

impl Disk {
    /// I1: every change of the image is made between this and the end of what it returns: the gate, shared, and the
    /// regions of `offset..offset + len` pinned and armed. Arming may wait for a sync, so it comes before the gate.
    pub(super) fn enter(&self, offset: u64, len: u64) -> Result<(RwLockReadGuard<'_, ()>, Pin<'_>)> {
        loop {
            let pin = self.pin(offset..offset.saturating_add(len))?;
            let gate = self.gate.read();
            if pin.counts() {
                return Ok((gate, pin));
            }
        }
    }

    fn pin(&self, bytes: Range<u64>) -> Result<Pin<'_>> {
        loop {
            if let Some(pin) = self.regions.pin(bytes.clone()) {
                return Ok(pin);
            }
            self.check_open()?;
            if let Err(e) = self.regions.arm(bytes.clone(), &self.tracking.sidecar, &self.counters) {
                self.check_open()?;
                self.tracking_failed(&e)?;
            }
        }
    }

    /// Arms the whole disk: what it holds may not be durable, for a reason that is not ours.
    pub(super) fn arm_all(&self) -> Result<()> {
        let all = 0..self.size();
        // What is armed already may be in a disarm whose sync began before.
        self.regions
            .cancel_disarm(&self.regions.of(all.clone(), self.regions.size().trailing_zeros()).collect::<Vec<_>>());
        self.regions.arm(all, &self.tracking.sidecar, &self.counters)
    }

    /// From here on nothing is pinned or armed.
    pub(super) fn give_up_arming(&self) {
        self.tracking.note_unarmed(true);
        self.regions.given_up.store(true, Ordering::SeqCst);
    }

    /// Once intents could not be written: before anything new is to be tracked, the whole disk is armed, or an error.
    pub(super) fn begin_again(&self) -> Result<()> {
        if !self.regions.given_up() {
            return Ok(());
        }
        self.arm_all()?;
        // Who went in without a pin has left when the gate is held; who waits for it looks again.
        {
            let _gate = self.gate.write();
            self.regions.given_up.store(false, Ordering::SeqCst);
            self.tracking.note_unarmed(false);
        }
        // What was not recorded is armed, and the directory says the rest.
        if self.note_is_over(false) { self.begin_in_image() } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_arms_more_and_more_up_to_its_bound_and_ends_with_a_pause() {
        const MIB: u64 = 1 << 20;
        let mut burst = Burst::default();
        let start = BURST_PAUSE_NS * 10;
        let widths: Vec<u64> = (0..40).map(|n| burst.next(start + n * 1000, MIB)).collect();
        assert_eq!(widths[..4], [1; 4], "a few alone arm nothing more");
        assert!(widths.windows(2).all(|pair| pair[1] == pair[0] || pair[1] == 2 * pair[0]));
        assert_eq!(widths.last(), Some(&(BURST_MAX_BYTES / MIB)));
        assert_eq!(burst.next(start + 40_000, BURST_MAX_BYTES / 2), 2);
        assert_eq!(burst.next(start + 41_000, BURST_MAX_BYTES * 4), 1, "a region may be larger than the bound");
        assert_eq!(burst.next(start + 42_000 + BURST_PAUSE_NS, MIB), 1, "after a pause");
        assert_eq!(burst.next(start, MIB), 1, "a clock that was put back");
    }
}
