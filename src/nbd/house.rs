//! What all connections of a server share: memory, threads, and the word that it stops.

use super::memory::Memory;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// Threads of one connection that every connection may have, whatever others do: one may receive while the other is in
/// a request that blocks.
pub const OWN_THREADS: usize = 2;
/// Most threads of one connection, and so most requests of it at once.
pub const CONNECTION_THREADS: usize = 16;
/// Most threads beyond the connections' own ones. Views have half of them at most: a store that hangs keeps its threads.
pub const POOL_THREADS: usize = 128;

/// See the head of the file.
pub struct House {
    /// Memory for data of requests.
    pub memory: Arc<Memory>,
    /// Most threads of one connection.
    pub connection_threads: usize,
    stopping: AtomicBool,
    panics: AtomicUsize,
    borrowed: AtomicUsize,
    borrowed_by_views: AtomicUsize,
}

impl House {
    /// For so much memory ([`super::memory::MEMORY_MAX_BYTES`]) and so many threads of one connection
    /// ([`CONNECTION_THREADS`]).
    pub fn new(memory_bytes: usize, connection_threads: usize) -> Arc<House> {
        Arc::new(House {
            memory: Memory::new(memory_bytes),
            connection_threads,
            stopping: AtomicBool::new(false),
            panics: AtomicUsize::new(0),
            borrowed: AtomicUsize::new(0),
            borrowed_by_views: AtomicUsize::new(0),
        })
    }

    /// Requests from now on are answered with `NBD_ESHUTDOWN`.
    pub fn stop(&self) {
        self.stopping.store(true, Ordering::SeqCst);
    }

    /// Whether it stops.
    pub fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::SeqCst)
    }

    /// A request has panicked.
    pub fn note_panic(&self) {
        self.panics.fetch_add(1, Ordering::Relaxed);
    }

    /// How many requests have panicked.
    pub fn panics(&self) -> usize {
        self.panics.load(Ordering::Relaxed)
    }

    /// A thread of the pool, for as long as the permit lives.
    pub fn borrow_thread(self: &Arc<Self>, view: bool) -> Option<Permit> {
        let take = |counter: &AtomicUsize, limit| {
            let next = |count| (count < limit).then_some(count + 1);
            counter.fetch_update(Ordering::AcqRel, Ordering::Relaxed, next).is_ok()
        };
        if view && !take(&self.borrowed_by_views, POOL_THREADS / 2) {
            return None;
        }
        // Made before the second counter is asked: it gives back what was taken.
        let mut permit = Permit { house: self.clone(), view, counted: false };
        permit.counted = take(&self.borrowed, POOL_THREADS);
        permit.counted.then_some(permit)
    }
}

/// One thread of the pool.
pub struct Permit {
    house: Arc<House>,
    view: bool,
    counted: bool,
}

impl Drop for Permit {
    fn drop(&mut self) {
        if self.view {
            self.house.borrowed_by_views.fetch_sub(1, Ordering::AcqRel);
        }
        if self.counted {
            self.house.borrowed.fetch_sub(1, Ordering::AcqRel);
        }
    }
}
