//! Guest first: readers of views go by turns while a guest is active, and wait as long as its share asks for.
//!
//! A read of a view is cut into pieces, so that a guest's request waits for one piece at most and not for a whole
//! transfer. Before each piece [`Balance`] is asked, which says how long it is, and how long the guest is to be left
//! alone. Everything that reads a view comes through here, as [`View::read`] does: files of the mount and jobs alike.
//!
//! * The guest pays nothing for it but two atomic additions for each request (`counters`): it takes no lock of this
//!   module, and nobody who waits here holds one that it needs.
//! * While guests are idle a read costs one load and a comparison, is not cut, and goes beside others.
//! * One reader at a time, the *head*, waits for what the balance says; the others wait for the head's place. So a
//!   pause wakes one thread.
//! * Where the guest keeps more threads busy than there are processors, the requests that end beside a piece *give way*
//!   to it (`counters`), after their answer where they are writes. So the reader's thread is not one of many: it gets
//!   what it can use. If that leaves the guest less than its share, the balance finds out, as ever. Readers that never
//!   wait are given way to as well.
//! * The last piece of a read is read first. Where the kernel sees no sequence it reads nothing ahead; else it would go
//!   on, for megabytes, while the guest is to be alone.
//! * A read never waits longer than [`MAX_WAIT`] in all. Then it goes on without asking: an unmount, the drop of a
//!   snapshot or a reader with a deadline never hang on a guest.
//!
//! One pace for all disks of a mount: they often share a medium, and always the processors.
//!
//! [`View::read`]: super::view::View::read

use super::balance::{Balance, Next};
use super::counters::Counters;
use crate::error::Result;
use crate::units::round_down;
use parking_lot::{Condvar, Mutex};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// Longest that one read waits in all.
const MAX_WAIT: Duration = Duration::from_millis(250);
/// So many requests of a guest give way to each piece: as many as come while it is read, answered and followed by the
/// next one. With 1000 the reader got no more.
const GIVE_WAY: u32 = 128;
/// No [`Load`]: more requests in flight than there are threads.
///
/// [`Load`]: super::counters::Load
const ACTIVE: u64 = u64::MAX;

/// See the module.
#[derive(Debug)]
pub(super) struct Pace {
    counters: Arc<Counters>,
    /// False where readers never wait.
    is_on: bool,
    /// What the guests' load was when they were found idle; [`ACTIVE`] where they were not.
    idle_load: AtomicU64,
    start: Instant,
    /// Processors that this process may use.
    processors: u32,
    /// Held by the reader that waits for the balance. Taken before `balance`.
    head: Mutex<()>,
    /// A leaf lock (rank 6), never held across I/O.
    balance: Mutex<Balance>,
    ended: Condvar,
}

/// A piece that is being read.
struct Turn<'a> {
    pace: &'a Pace,
    bytes: u64,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut balance = self.pace.balance.lock();
        balance.end(self.pace.now_ns(), self.pace.counters.load(), self.bytes);
        drop(balance);
        self.pace.ended.notify_one();
    }
}

impl Pace {
    /// Leaves guests `percent` of their speed (0: readers never wait; at most 95 is taken).
    ///
    /// Never on where schedules are explored: time stands still there.
    pub(super) fn new(percent: u8, counters: Arc<Counters>) -> Arc<Pace> {
        let percent = percent.min(super::MAX_GUEST_SHARE);
        Arc::new(Pace {
            counters,
            is_on: percent > 0 && !cfg!(any(feature = "shuttle", loom)),
            idle_load: AtomicU64::new(0),
            start: Instant::now(),
            processors: thread::available_parallelism().map_or(1, |count| count.get() as u32),
            head: Mutex::new(()),
            balance: Mutex::new(Balance::new(f64::from(percent) / 100.0)),
            ended: Condvar::new(),
        })
    }

    /// Has `read` fill `buf` from `offset`: at once while guests are idle, else piece by piece. Ends with its first error.
    pub(super) fn by_turns(
        &self,
        buf: &mut [u8],
        offset: u64,
        mut read: impl FnMut(&mut [u8], u64) -> Result<()>,
    ) -> Result<()> {
        let (mut rest, mut patience, mut was_paced) = (buf, MAX_WAIT, false);
        while !rest.is_empty() {
            let turn = self.turn(offset, rest.len(), &mut patience);
            let bytes = turn.as_ref().map_or(rest.len(), |turn| turn.bytes as usize);
            if turn.is_some() && !was_paced {
                was_paced = true;
                self.counters.view_reads_paced.add(1);
            }
            let before = rest.len().saturating_sub(bytes);
            let (before, piece) = rest.split_at_mut(before);
            if self.counters.load().in_flight > self.processors {
                self.counters.give_way(GIVE_WAY);
            }
            read(piece, offset + before.len() as u64)?;
            rest = before;
        }
        Ok(())
    }

    /// Waits for the turn of the last piece of `len` bytes at `offset`, for `patience` at most, from which it takes what it
    /// waited. None while guests are idle.
    fn turn(&self, offset: u64, len: usize, patience: &mut Duration) -> Option<Turn<'_>> {
        if !self.is_on || self.counters.load().word() == self.idle_load.load(Ordering::Relaxed) {
            return None;
        }
        if self.look(&mut self.balance.lock()) {
            return None;
        }
        let asked = Instant::now();
        let deadline = asked + *patience;
        let mut has_waited = false;
        let head = self.head.try_lock().or_else(|| {
            has_waited = true;
            self.head.try_lock_until(deadline)
        });
        let mut balance = self.balance.lock();
        let end = offset.saturating_add(len as u64);
        let bytes = end - round_down(end.saturating_sub(1), balance.piece_bytes()).max(offset);
        while !self.look(&mut balance) && head.is_some() {
            let until = match balance.next(self.now_ns(), bytes) {
                Next::Begin => break,
                Next::At(at_ns) => deadline.min(self.start + Duration::from_nanos(at_ns)),
                Next::AtAnEnd => deadline,
            };
            if Instant::now() >= deadline {
                break;
            }
            has_waited = true;
            self.ended.wait_until(&mut balance, until);
        }
        if has_waited {
            let waited = asked.elapsed();
            *patience = patience.saturating_sub(waited);
            self.counters.view_pause_ns.add(waited.as_nanos() as u64);
        }
        if balance.is_idle() {
            return None;
        }
        balance.begin(bytes);
        Some(Turn { pace: self, bytes })
    }

    /// Notes what guests did. True: they are idle.
    fn look(&self, balance: &mut Balance) -> bool {
        let load = self.counters.load();
        let is_idle = balance.note(self.now_ns(), load);
        self.idle_load.store(if is_idle { load.word() } else { ACTIVE }, Ordering::Relaxed);
        is_idle
    }

    fn now_ns(&self) -> u64 {
        self.start.elapsed().as_nanos() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Requests that give way to a piece that is read beside so many in flight.
    fn giving_way_beside(in_flight: usize, percent: u8) -> u32 {
        let counters = Arc::new(Counters::default());
        let pace = Pace::new(percent, counters.clone());
        let _guest: Vec<_> = (0..in_flight).map(|_| counters.guest_write(4096)).collect();
        let mut seen = 0;
        let read = |_: &mut [u8], _| {
            seen = counters.giving_way();
            Ok(())
        };
        pace.by_turns(&mut [0; 4096], 0, read).unwrap();
        seen
    }

    #[test]
    fn a_crowd_gives_way_to_a_reader_and_a_few_do_not() {
        let processors = thread::available_parallelism().unwrap().get();
        for percent in [0, 50] {
            assert_eq!(giving_way_beside(0, percent), 0);
            assert_eq!(giving_way_beside(1, percent), 0);
            assert_eq!(giving_way_beside(processors, percent), 0);
            assert_eq!(giving_way_beside(processors + 1, percent), GIVE_WAY);
        }
    }
}
