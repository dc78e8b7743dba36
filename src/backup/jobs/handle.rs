//! What a running work sees of its job: progress, the limit of its speed, and whether it was cancelled.

use super::JobEvent;
use crate::error::{Error, Result, errno};
use parking_lot::{Condvar, Mutex};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// Where events go. It must not block.
pub(super) type Sink = Arc<dyn Fn(&JobEvent) + Send + Sync>;

struct Limits {
    cancelled: bool,
    /// Bytes per second; 0 for no limit.
    speed: u64,
    /// When the next step may begin.
    next: Instant,
}

/// See the module.
pub struct Handle {
    id: String,
    sink: Sink,
    current: AtomicU64,
    total: AtomicU64,
    limits: Mutex<Limits>,
    /// Any change of the limits.
    changed: Condvar,
}

impl Handle {
    pub(super) fn new(id: &str, speed: u64, sink: Sink) -> Handle {
        let limits = Limits { cancelled: false, speed, next: Instant::now() };
        Handle {
            id: id.to_owned(),
            sink,
            current: AtomicU64::new(0),
            total: AtomicU64::new(0),
            limits: Mutex::new(limits),
            changed: Condvar::new(),
        }
    }

    /// Says how many bytes there are to do.
    pub fn set_total(&self, bytes: u64) {
        self.total.store(bytes, Relaxed);
    }

    /// Counts bytes that were done, then waits as long as the limit demands. ECANCELED where the job was cancelled,
    /// before or meanwhile.
    pub fn advance(&self, bytes: u64) -> Result<()> {
        self.current.fetch_add(bytes, Relaxed);
        let mut limits = self.limits.lock();
        if limits.speed > 0 {
            limits.next = limits.next.max(Instant::now()) + time_of(bytes, limits.speed);
        }
        while !limits.cancelled && limits.speed > 0 && Instant::now() < limits.next {
            let next = limits.next;
            self.changed.wait_until(&mut limits, next);
        }
        if limits.cancelled { Err(cancelled()) } else { Ok(()) }
    }

    /// Tells of an error of I/O and what is done about it, in QEMU's words.
    pub fn io_error(&self, operation: &'static str, action: &'static str) {
        (self.sink)(&JobEvent::Error { id: self.id.clone(), operation, action });
    }

    pub(super) fn cancel(&self) {
        self.limits.lock().cancelled = true;
        self.changed.notify_all();
    }

    pub(super) fn is_cancelled(&self) -> bool {
        self.limits.lock().cancelled
    }

    pub(super) fn set_speed(&self, speed: u64) {
        let mut limits = self.limits.lock();
        // What was waited for counts from now on at the new speed.
        (limits.speed, limits.next) = (speed, Instant::now());
        self.changed.notify_all();
    }

    pub(super) fn speed(&self) -> u64 {
        self.limits.lock().speed
    }

    pub(super) fn progress(&self) -> (u64, u64) {
        (self.current.load(Relaxed), self.total.load(Relaxed))
    }
}

/// How long `bytes` take at `speed` bytes a second, up to an hour.
fn time_of(bytes: u64, speed: u64) -> Duration {
    let ns = u128::from(bytes) * 1_000_000_000 / u128::from(speed.max(1));
    Duration::from_nanos(u64::try_from(ns).unwrap_or(u64::MAX)).min(Duration::from_secs(3600))
}

/// What a work ends with that was cancelled.
pub(super) fn cancelled() -> Error {
    Error::new(errno::ECANCELED, "job", "Operation canceled")
}
