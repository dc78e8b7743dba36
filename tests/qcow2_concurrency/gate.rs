//! A medium on which one chosen call waits until a test has brought the other threads to where they should be.

use fleecefs::error::Result;
use fleecefs::storage::faulty::Call;
use fleecefs::storage::{BlockStatus, SharedStorage, Stamp, Storage};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::ScopedJoinHandle;
use std::time::{Duration, Instant};

/// When a call waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    /// Before it has done anything.
    Before,
    /// It is done, but does not return yet.
    After,
}

/// Holds up at most one call at a time; files share it.
#[derive(Debug, Default)]
pub struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    calls: BTreeMap<Call, u64>,
    /// The call that is to wait, by its number.
    held: Option<(Call, u64, When)>,
    /// It waits.
    is_there: bool,
}

impl Gate {
    /// A file whose calls pass here.
    pub fn before(self: &Arc<Gate>, inner: &SharedStorage) -> SharedStorage {
        Arc::new(Gated { inner: inner.clone(), gate: self.clone() })
    }

    /// The next call of a kind waits, and only that one.
    pub fn hold_next(&self, call: Call, when: When) {
        let mut state = self.state.lock().unwrap();
        let nth = state.calls.get(&call).copied().unwrap_or(0) + 1;
        state.held = Some((call, nth, when));
        state.is_there = false;
    }

    /// Waits until the call is there that `thread` makes.
    #[track_caller]
    pub fn wait_for<T>(&self, thread: &ScopedJoinHandle<'_, T>) {
        while !self.state.lock().unwrap().is_there {
            assert!(!thread.is_finished(), "the call to hold up was never made");
            std::thread::yield_now();
        }
    }

    /// Calls of a kind so far.
    pub fn calls(&self, call: Call) -> u64 {
        self.state.lock().unwrap().calls.get(&call).copied().unwrap_or(0)
    }

    /// Lets the call go on.
    pub fn release(&self) {
        self.state.lock().unwrap().held = None;
        self.changed.notify_all();
    }

    fn pass<T>(&self, call: Call, work: impl FnOnce() -> T) -> T {
        let mut state = self.state.lock().unwrap();
        let count = state.calls.entry(call).or_default();
        *count += 1;
        let nth = *count;
        self.wait(state, (call, nth, When::Before));
        let done = work();
        self.wait(self.state.lock().unwrap(), (call, nth, When::After));
        done
    }

    fn wait(&self, mut state: MutexGuard<'_, State>, this: (Call, u64, When)) {
        while state.held == Some(this) {
            state.is_there = true;
            state = self.changed.wait(state).unwrap();
        }
    }
}

/// Gives a thread that may have to wait for another one the time to get as far as it can.
pub fn let_go_on<T>(thread: &ScopedJoinHandle<'_, T>) {
    let begun = Instant::now();
    while !thread.is_finished() && begun.elapsed() < Duration::from_millis(200) {
        std::thread::yield_now();
    }
}

#[derive(Debug)]
struct Gated {
    inner: SharedStorage,
    gate: Arc<Gate>,
}

impl Storage for Gated {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.gate.pass(Call::Read, || self.inner.read_at(buf, offset))
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.gate.pass(Call::Write, || self.inner.write_at(buf, offset))
    }
    fn sync(&self) -> Result<()> {
        self.gate.pass(Call::Sync, || self.inner.sync())
    }
    fn len(&self) -> Result<u64> {
        self.inner.len()
    }
    fn set_len(&self, len: u64) -> Result<()> {
        self.gate.pass(Call::SetLen, || self.inner.set_len(len))
    }
    fn punch_hole(&self, offset: u64, len: u64) -> Result<()> {
        self.gate.pass(Call::Punch, || self.inner.punch_hole(offset, len))
    }
    fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        self.gate.pass(Call::Zero, || self.inner.write_zeroes(offset, len))
    }
    fn block_status(&self, offset: u64, len: u64) -> Result<BlockStatus> {
        self.gate.pass(Call::Status, || self.inner.block_status(offset, len))
    }
    fn stamp(&self) -> Result<Stamp> {
        self.inner.stamp()
    }
    fn path(&self) -> &Path {
        self.inner.path()
    }
}
