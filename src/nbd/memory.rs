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
    /// A buffer of arbitrary content; waits for it. `None` once the connection has ended.
    ///
    /// Pages of large ones are the system's until they are touched: what a client only announced takes none.
    pub fn take(self: &Arc<Self>, len: usize) -> Option<Buffer> {
        let memory = &self.memory;
        let mut state = memory.state.lock();
        if !self.fits(&state, len) {
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

    /// Bytes in use by this connection.
    pub fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
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
