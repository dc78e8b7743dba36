//! Memory for the data of requests, bounded over all connections.
//!
//! * **Bounded.** What is held together never exceeds [`Memory::new`]'s limit.
//! * **Views leave half to live disks.** A store that hangs keeps the buffers of reads of views; they never take what
//!   writable exports need.
//! * **One connection leaves room for others**: it has at most a quarter of the limit, but always room for one request.

use crate::storage::buffer::AlignedBuf;
use parking_lot::{Condvar, Mutex};
use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// Limit over all connections.
pub const MEMORY_MAX_BYTES: usize = 256 << 20;

/// The memory of a server.
pub struct Memory {
    limit: usize,
    state: Mutex<State>,
    returned: Condvar,
    waiting: AtomicUsize,
}

#[derive(Default)]
struct State {
    used: usize,
    used_by_views: usize,
}

/// A connection's part.
pub struct Share {
    memory: Arc<Memory>,
    view: bool,
    used: AtomicUsize,
    closed: AtomicBool,
}

/// A buffer that counts until it is dropped.
pub struct Buffer {
    data: AlignedBuf,
    share: Arc<Share>,
}

impl Memory {
    /// Nothing is used yet.
    pub fn new(limit: usize) -> Arc<Memory> {
        let (state, returned) = (Mutex::default(), Condvar::new());
        Arc::new(Memory { limit, state, returned, waiting: AtomicUsize::new(0) })
    }

    /// Bytes in use.
    pub fn used(&self) -> usize {
        self.state.lock().used
    }

    /// Whether somebody waits.
    pub fn is_wanted(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) > 0
    }

    /// The part of a connection to a frozen view, or to what may be written.
    pub fn share(self: &Arc<Self>, view: bool) -> Arc<Share> {
        Arc::new(Share { memory: self.clone(), view, used: AtomicUsize::new(0), closed: AtomicBool::new(false) })
    }
}

impl Share {
    /// A buffer of arbitrary content; waits for it, after `before_wait`. `None` once the connection has ended.
    ///
    /// Pages of large ones are the system's until they are touched: what a client only announced takes none.
    pub fn take(self: &Arc<Self>, len: usize, before_wait: impl FnOnce()) -> Option<Buffer> {
        let memory = &self.memory;
        let mut state = memory.state.lock();
        if !self.fits(&state, len) {
            drop(state);
            before_wait();
            state = memory.state.lock();
            memory.waiting.fetch_add(1, Ordering::Relaxed);
            while !self.closed.load(Ordering::Relaxed) && !self.fits(&state, len) {
                memory.returned.wait(&mut state);
            }
            memory.waiting.fetch_sub(1, Ordering::Relaxed);
            if self.closed.load(Ordering::Relaxed) {
                return None;
            }
        }
        state.used += len;
        state.used_by_views += if self.view { len } else { 0 };
        self.used.fetch_add(len, Ordering::Relaxed);
        drop(state);
        Some(Buffer { data: AlignedBuf::uncleared(len), share: self.clone() })
    }

    fn fits(&self, state: &State, len: usize) -> bool {
        let (limit, own) = (self.memory.limit, self.used.load(Ordering::Relaxed));
        state.used + len <= limit
            && (own == 0 || own + len <= limit / 4)
            && (!self.view || state.used_by_views + len <= limit / 2)
    }

    /// Who waits comes back with nothing.
    pub fn close(&self) {
        let _state = self.memory.state.lock();
        self.closed.store(true, Ordering::Relaxed);
        self.memory.returned.notify_all();
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let (memory, len) = (&self.share.memory, self.data.len());
        let mut state = memory.state.lock();
        state.used -= len;
        state.used_by_views -= if self.share.view { len } else { 0 };
        self.share.used.fetch_sub(len, Ordering::Relaxed);
        if memory.is_wanted() {
            memory.returned.notify_all();
        }
    }
}

impl Deref for Buffer {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.data
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.data
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;
    use std::time::Duration;

    /// Whether `work` waits; it is let go by `release`.
    fn waits(memory: &Arc<Memory>, share: &Arc<Share>, len: usize, release: impl FnOnce()) -> Option<usize> {
        let taker = share.clone();
        let thread = thread::spawn(move || taker.take(len, || ()).map(|buffer| buffer.len()));
        while !memory.is_wanted() {
            assert!(!thread.is_finished(), "{len} bytes were to be waited for");
            thread::sleep(Duration::from_millis(1));
        }
        release();
        thread.join().unwrap()
    }

    #[test]
    fn all_together_never_exceed_the_limit() {
        let memory = Memory::new(1000);
        let shares: Vec<_> = (0..5).map(|_| memory.share(false)).collect();
        let mut held: Vec<_> = shares[..4].iter().map(|share| share.take(250, || ()).unwrap()).collect();
        assert_eq!(memory.used(), 1000);
        assert_eq!(waits(&memory, &shares[4], 1, || drop(held.pop())), Some(1));
        drop(held);
        assert_eq!((memory.used(), memory.is_wanted()), (0, false));
    }

    #[test]
    fn one_connection_has_a_quarter_or_one_request() {
        let memory = Memory::new(1000);
        let share = memory.share(false);
        let large = share.take(900, || ()).unwrap();
        assert_eq!(waits(&memory, &share, 1, || drop(large)), Some(1));
        let small = share.take(200, || ()).unwrap();
        assert_eq!(waits(&memory, &share, 51, || drop(small)), Some(51));
    }

    #[test]
    fn views_leave_half_to_live_disks() {
        let memory = Memory::new(1000);
        let views = [memory.share(true), memory.share(true), memory.share(true)];
        let held = [views[0].take(250, || ()).unwrap(), views[1].take(250, || ()).unwrap()];
        let live = memory.share(false).take(500, || ()).unwrap();
        drop(live);
        assert_eq!(waits(&memory, &views[2], 1, || drop(held)), Some(1));
    }

    #[test]
    fn who_waits_comes_back_when_its_connection_ends() {
        let memory = Memory::new(1000);
        let (share, other) = (memory.share(false), memory.share(false));
        let _all = other.take(1000, || ()).unwrap();
        assert_eq!(waits(&memory, &share, 1, || share.close()), None);
        assert!(!memory.is_wanted());
    }
}
