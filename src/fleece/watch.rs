//! Bytes of a disk that something was derived from: who derived it learns that they were changed.
//!
//! A [`Watch`] stands for what was derived (the volumes of a partition table, say), and each disk lists the ranges that
//! it was derived from. Whoever changes the disk looks into that list, in its gate. An empty list costs one load a change.
//!
//! * **W1 Told before it is done.** A change says so to the watches of what it touches, passes a full fence, and only then
//!   reaches the image. So who reads the disk, passes a full fence and then finds the watch unchanged has read nothing
//!   that came after such a change. A range that is watched while a change is in the gate may be missed by it: so each
//!   change looks again once it is made, before it is answered; and who must not even see it half made
//!   waits for an empty gate after he began to watch ([`Disk::watch_and_drain`]).
//! * **W2 Nothing comes late.** What depends on a watch (a write through a volume) reaches the image in a hold of it
//!   ([`Permit::enter`]), which is refused once it has changed; and a change waits, between telling and doing, for the end
//!   of all holds. So nothing that was let in under the old table is written after the new one.
//! * Nobody who has a hold waits for one to end: a change tells first and enters then. A change that depends on
//!   the very bytes that it touches is refused.

use super::Disk;
use crate::error::{Error, Result, errno};
use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use crate::sync::{Mutex, Published, RwLock, RwLockReadGuard, full_fence};
use crate::units::join_ranges;
use std::ops::Range;
use std::sync::{Arc, Weak};
use std::time::Duration;

/// How long who begins to watch waits for changes that began before, and holds up others meanwhile.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(1);

/// Tells whether what something was derived from has been changed since.
#[derive(Debug)]
pub struct Watch {
    changed: AtomicBool,
    logged: AtomicBool,
    /// Shared by what depends on it while it is done (lock rank 3, in a gate).
    holds: RwLock<()>,
}

impl Default for Watch {
    fn default() -> Self {
        Watch { changed: AtomicBool::new(false), logged: AtomicBool::new(false), holds: RwLock::new(()) }
    }
}

impl Watch {
    /// Whether something touched the bytes, be it that it wrote the same again.
    pub fn has_changed(&self) -> bool {
        self.changed.load(Ordering::SeqCst)
    }

    /// True once: for who says so in the log.
    pub(super) fn to_be_logged(&self) -> bool {
        !self.logged.swap(true, Ordering::SeqCst)
    }

    fn change(&self) {
        self.changed.store(true, Ordering::SeqCst);
        drop(self.holds.write());
    }
}

/// What a change of a disk depends on.
#[derive(Debug, Clone, Default)]
pub(super) struct Permit(Option<Arc<Watch>>);

impl Permit {
    /// A change that holds good whatever happens: the guest's own.
    pub const ALWAYS: Permit = Permit(None);

    /// Only as long as `watch` has not changed.
    pub fn while_unchanged(watch: &Arc<Watch>) -> Permit {
        Permit(Some(watch.clone()))
    }

    /// The hold in which the image may be changed; ESTALE where it depends on what has changed.
    pub fn enter(&self) -> Result<Option<RwLockReadGuard<'_, ()>>> {
        let Some(watch) = &self.0 else { return Ok(None) };
        let hold = watch.holds.read();
        if watch.has_changed() {
            return Err(stale());
        }
        Ok(Some(hold))
    }
}

/// What I/O gets that depends on what has changed.
pub(super) fn stale() -> Error {
    Error::new(errno::ESTALE, "volume", "the partition table or the LVM metadata was changed").hint("open it again")
}

/// Ranges of one disk below one watch.
#[derive(Debug, Clone)]
struct Watched {
    /// Sorted, apart from each other.
    ranges: Vec<Range<u64>>,
    watch: Weak<Watch>,
}

impl Watched {
    fn touches(&self, range: &Range<u64>) -> bool {
        let first = self.ranges.partition_point(|watched| watched.end <= range.start);
        self.ranges.get(first).is_some_and(|watched| watched.start < range.end)
    }

    fn is_of(&self, watch: &Arc<Watch>) -> bool {
        std::ptr::eq(self.watch.as_ptr(), Arc::as_ptr(watch))
    }

    /// Nobody would learn of a change any more.
    fn is_over(&self) -> bool {
        self.watch.upgrade().is_none_or(|watch| watch.has_changed())
    }
}

/// The watched ranges of one disk.
#[derive(Debug)]
pub(super) struct Watches {
    list: Published<Vec<Watched>>,
    /// Grows with each new list, from [`NEVER`].
    version: AtomicU64,
    /// Held while a list is made from the one before.
    edit: Mutex<()>,
}

/// The version of the list that is empty as nobody ever watched.
const NEVER: u64 = 0;

/// Which list a change has looked into.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use = "it looks again once the change is made"]
pub(super) struct Looked(u64);

impl Default for Watches {
    fn default() -> Self {
        Watches { list: Published::new(Vec::new()), version: AtomicU64::new(NEVER), edit: Mutex::new(()) }
    }
}

impl Watches {
    /// Has `watch` stand for `ranges` too. What the caller reads after this was not changed unnoticed (W1).
    pub fn add(&self, watch: &Arc<Watch>, ranges: impl IntoIterator<Item = Range<u64>>) {
        let _edit = self.edit.lock();
        let mut list: Vec<Watched> = self.list.load().iter().filter(|watched| !watched.is_over()).cloned().collect();
        let index = list.iter().position(|watched| watched.is_of(watch)).unwrap_or_else(|| {
            list.push(Watched { ranges: Vec::new(), watch: Arc::downgrade(watch) });
            list.len() - 1
        });
        if let Some(own) = list.get_mut(index) {
            own.ranges.extend(ranges.into_iter().filter(|range| range.start < range.end));
            join_ranges(&mut own.ranges);
        }
        self.list.store(Arc::new(list));
        self.version.fetch_add(1, Ordering::SeqCst);
        drop(_edit);
        full_fence();
    }

    /// Before `range` of the image is changed; in the gate, and in no hold.
    pub fn before(&self, range: Range<u64>) -> Looked {
        let looked = Looked(self.version.load(Ordering::SeqCst));
        if looked != Looked(NEVER) {
            self.tell(&range);
        }
        looked
    }

    /// Once it is changed, before that is answered.
    pub fn after(&self, range: Range<u64>, looked: Looked) {
        full_fence();
        if Looked(self.version.load(Ordering::SeqCst)) != looked {
            self.tell(&range);
        }
    }

    fn tell(&self, range: &Range<u64>) {
        let list = self.list.peek();
        let mut told = false;
        for watch in list.iter().filter(|watched| watched.touches(range)).filter_map(|w| w.watch.upgrade()) {
            watch.change();
            told = true;
        }
        if told {
            full_fence();
        }
    }
}

impl Disk {
    /// Has `watch` stand for `ranges`, and waits for the changes that began without knowing: from then on, each change
    /// there says so before it is made. False: they did not end in time. Guests wait as long.
    #[must_use]
    pub(super) fn watch_and_drain(&self, watch: &Arc<Watch>, ranges: impl IntoIterator<Item = Range<u64>>) -> bool {
        self.watches.add(watch, ranges);
        self.gate.try_write_for(DRAIN_TIMEOUT).is_some()
    }
}

#[cfg(all(test, not(any(feature = "shuttle", loom))))]
mod tests {
    use super::*;

    fn watches(ranges: impl IntoIterator<Item = Range<u64>>) -> (Watches, Arc<Watch>) {
        let (watches, watch) = (Watches::default(), Arc::new(Watch::default()));
        watches.add(&watch, ranges);
        (watches, watch)
    }

    #[test]
    fn a_change_is_told_where_it_touches_and_nowhere_else() {
        for (range, touches) in
            [(0..512, true), (511..600, true), (0..1 << 40, true), (512..1024, false), (1500..1536, true)]
        {
            let (watches, watch) = watches([1024..1536, 0..512, 256..300, 5..5]);
            let looked = watches.before(range.clone());
            assert_eq!(watch.has_changed(), touches, "{range:?}");
            watches.after(range, looked);
        }
    }

    #[test]
    fn what_is_watched_while_a_change_is_made_is_told_once_it_is_made() {
        let (watches, _) = watches(None);
        let looked = watches.before(0..512);
        let watch = Arc::new(Watch::default());
        watches.add(&watch, Some(0..1));
        assert!(!watch.has_changed());
        watches.after(0..512, looked);
        assert!(watch.has_changed());
    }

    #[test]
    fn watches_that_nobody_asks_any_more_go() {
        let (watches, watch) = watches(Some(0..512));
        drop(watch);
        let changed = Arc::new(Watch::default());
        watches.add(&changed, Some(0..1));
        assert_eq!(watches.list.load().len(), 1);
        let _ = watches.before(0..1);
        watches.add(&Arc::new(Watch::default()), Some(7..8));
        assert_eq!(watches.list.load().len(), 1);
    }

    #[test]
    fn a_permit_ends_with_its_watch() {
        let (watches, watch) = watches(Some(0..512));
        let permit = Permit::while_unchanged(&watch);
        drop(permit.enter().unwrap());
        let _ = watches.before(511..512);
        assert_eq!(permit.enter().map(drop).unwrap_err().errno(), errno::ESTALE);
        assert!(Permit::ALWAYS.enter().unwrap().is_none());
        assert!(watch.to_be_logged() && !watch.to_be_logged());
    }
}
