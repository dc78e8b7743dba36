//! Counters of one mount, for `status.json` and `metrics`.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::thread;

/// One counter. Plain relaxed additions; nothing is ordered by it.
#[derive(Debug, Default)]
pub struct Count(AtomicU64);

impl Count {
    pub(super) fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A counter's name, meaning and value. Counters only grow, except those whose help says 'now'.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Counter {
    /// Snake case, without a prefix.
    pub name: &'static str,
    /// One line for people.
    pub help: &'static str,
    /// The value.
    pub value: u64,
}

macro_rules! counters {
    ($($name:ident: $help:literal,)*) => {
        /// The counters of one mount.
        #[derive(Debug, Default)]
        pub struct Counters {
            /// Requests of guests, begun and done.
            guest: GuestLoad,
            $(#[doc = $help] pub(super) $name: Count,)*
        }

        impl Counters {
            /// All of them, in a fixed order.
            pub(super) fn list(&self) -> Vec<Counter> {
                vec![$(Counter { name: stringify!($name), help: $help, value: self.$name.get() },)*]
            }
        }
    };
}

counters! {
    guest_reads: "Reads of live disks",
    guest_read_bytes: "Bytes read from live disks",
    guest_writes: "Writes to live disks",
    guest_write_bytes: "Bytes written to live disks",
    guest_zeroes: "Discards and write-zeroes of live disks",
    guest_zero_bytes: "Bytes discarded or zeroed on live disks",
    guest_flushes: "Flushes of live disks",
    chunks_copied: "Chunks of old content copied before a guest write",
    copied_bytes: "Bytes of old content copied before guest writes",
    chunks_lost: "Chunks whose old content could not be read",
    view_reads: "Reads of frozen views",
    view_read_bytes: "Bytes read from frozen views",
    view_reads_paced: "Reads of frozen views made by turns beside an active guest",
    view_pause_ns: "Nanoseconds that reads of frozen views waited for guests",
    view_retries: "Reads of frozen views that a guest write overtook",
    views_broken: "Times that the views of a disk broke",
    tracking_lost: "Times that changes of a disk stopped being known",
    tracking_errors: "Changes that could not be recorded",
    layers_folded: "Layers of dropped snapshots folded into older ones",
    snapshots_taken: "Snapshots taken",
    intent_syncs: "Times that writers waited for regions to be armed",
    regions_armed: "Regions armed: marked durably before they are written to",
    regions_disarmed: "Regions disarmed: idle, all in them durable",
    freeze_ns: "Nanoseconds that guest writes were held for snapshots",
}

impl Counters {
    /// How busy guests keep the disks of the mount.
    pub(super) fn load(&self) -> Load {
        Load::of(self.guest.word.load(Ordering::Relaxed))
    }

    /// Has at least the next `count` requests of guests give way when they end: their threads let others go first. Where more
    /// threads serve guests than there are processors, a single other one gets its turn after all of their slices,
    /// some 20 ms later, and a part of the processors that gets less the more they are. Needs no privilege, and is not
    /// a lock: nobody waits who has a processor to himself.
    pub(super) fn give_way(&self, count: u32) {
        self.guest.giving_way.fetch_max(count, Ordering::Relaxed);
    }

    /// No request is to give way any more.
    pub(super) fn give_no_way(&self) {
        self.guest.giving_way.store(0, Ordering::Relaxed);
    }

    pub(super) fn guest_read(&self, len: usize) -> Request<'_> {
        self.guest_reads.add(1);
        self.guest_read_bytes.add(len as u64);
        self.guest.begin()
    }

    pub(super) fn guest_write(&self, len: usize) -> Request<'_> {
        self.guest_writes.add(1);
        self.guest_write_bytes.add(len as u64);
        self.guest.begin()
    }

    pub(super) fn guest_zero(&self, len: u64) -> Request<'_> {
        self.guest_zeroes.add(1);
        self.guest_zero_bytes.add(len);
        self.guest.begin()
    }

    pub(super) fn guest_flush(&self) -> Request<'_> {
        self.guest_flushes.add(1);
        self.guest.begin()
    }

    pub(super) fn view_read(&self, len: usize) {
        self.view_reads.add(1);
        self.view_read_bytes.add(len as u64);
    }

    pub(super) fn copied(&self, chunks: u64, bytes: u64) {
        self.chunks_copied.add(chunks);
        self.copied_bytes.add(bytes);
    }
}

/// Requests of guests. On a cache line of its own.
#[derive(Debug, Default)]
#[repr(align(64))]
struct GuestLoad {
    /// The count of those done above, which wraps around, and those in flight below.
    word: AtomicU64,
    /// So many of those that end from now on give way.
    giving_way: AtomicU32,
}

/// One request done, in [`GuestLoad`].
const DONE_ONE: u64 = 1 << 32;

impl GuestLoad {
    fn begin(&self) -> Request<'_> {
        self.word.fetch_add(1, Ordering::Relaxed);
        Request(self)
    }

    /// Lets other threads go first, as often as was asked for.
    fn give_way(&self) {
        let is_asked = self.giving_way.load(Ordering::Relaxed) > 0;
        let take = |left: u32| left.checked_sub(1);
        if is_asked && self.giving_way.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_ok() {
            thread::yield_now();
        }
    }
}

/// A request of a guest, from its beginning until this is dropped.
#[derive(Debug)]
#[must_use = "the request ends when this is dropped"]
pub(super) struct Request<'a>(&'a GuestLoad);

impl Drop for Request<'_> {
    fn drop(&mut self) {
        // Still in flight meanwhile: else a deep queue would not look like one.
        self.0.give_way();
        self.0.word.fetch_add(DONE_ONE - 1, Ordering::Relaxed);
    }
}

/// How busy guests are at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Load {
    /// Requests done since the mount, modulo 2^32.
    pub done: u32,
    /// Requests begun and not done.
    pub in_flight: u32,
}

impl Load {
    fn of(word: u64) -> Load {
        Load { done: (word >> 32) as u32, in_flight: word as u32 }
    }

    /// One number for both: equal where nothing happened in between.
    pub(super) fn word(self) -> u64 {
        u64::from(self.done) << 32 | u64::from(self.in_flight)
    }
}

#[cfg(test)]
impl Counters {
    /// Requests that are still to give way.
    pub(super) fn giving_way(&self) -> u32 {
        self.guest.giving_way.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_give_way_as_often_as_was_asked_for() {
        let counters = Counters::default();
        drop(counters.guest_read(1));
        assert_eq!(counters.giving_way(), 0);
        counters.give_way(3);
        let held = counters.guest_write(1);
        assert_eq!(counters.giving_way(), 3, "when it ends, not when it begins");
        drop(held);
        thread::scope(|scope| (0..2).for_each(|_| drop(scope.spawn(|| drop(counters.guest_zero(1))))));
        assert_eq!(counters.giving_way(), 0);
        drop(counters.guest_flush());
        assert_eq!((counters.giving_way(), counters.load()), (0, Load { done: 5, in_flight: 0 }));
    }
}
