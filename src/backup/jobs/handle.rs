//! What a running work sees of its job: progress, the limit of its speed, and whether it is to wait or was cancelled.
//!
//! A work may have many threads; all of them may call. Whoever waits here wakes at once when the job is cancelled.

use super::JobEvent;
use crate::error::{Error, Result, errno};
use parking_lot::{Condvar, Mutex};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// Where events go. It must not block.
pub(super) type Sink = Arc<dyn Fn(&JobEvent) + Send + Sync>;

struct Limits {
    cancelled: bool,
    /// The work has failed, and none of its threads is to go on.
    failed: bool,
    paused: bool,
    /// Bytes per second; 0 for no limit.
    speed: u64,
    /// When the next step may begin.
    next: Instant,
}

impl Limits {
    fn spend(&mut self, bytes: u64) {
        if self.speed > 0 {
            self.next = self.next.max(Instant::now()) + time_of(bytes, self.speed);
        }
    }
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
    /// Changes the job's status to paused.
    pause: OnceLock<Box<dyn Fn(IoStatus) + Send + Sync>>,
}

/// How the last error of I/O was, of a job that stopped for it (QEMU's `io-status`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IoStatus {
    /// None, or it was resumed since.
    Ok,
    /// Any error but the next.
    Failed,
    /// There was no space.
    NoSpace,
}

impl IoStatus {
    /// QEMU's name.
    pub fn name(self) -> &'static str {
        match self {
            IoStatus::Ok => "ok",
            IoStatus::Failed => "failed",
            IoStatus::NoSpace => "nospace",
        }
    }
}

impl Handle {
    pub(super) fn new(id: &str, speed: u64, sink: Sink) -> Handle {
        let limits = Limits { cancelled: false, failed: false, paused: false, speed, next: Instant::now() };
        Handle {
            id: id.to_owned(),
            sink,
            current: AtomicU64::new(0),
            total: AtomicU64::new(0),
            limits: Mutex::new(limits),
            changed: Condvar::new(),
            pause: OnceLock::new(),
        }
    }

    pub(super) fn on_pause(&self, pause: impl Fn(IoStatus) + Send + Sync + 'static) {
        let _ = self.pause.set(Box::new(pause));
    }

    /// Says how many bytes there are to do.
    pub fn set_total(&self, bytes: u64) {
        self.total.store(bytes, Relaxed);
    }

    /// Counts bytes that were done, then waits as long as the limit demands. ECANCELED where the job was cancelled,
    /// before or meanwhile.
    pub fn advance(&self, bytes: u64) -> Result<()> {
        self.count(bytes);
        self.limits.lock().spend(bytes);
        self.admit(0)
    }

    /// Counts bytes that were done.
    pub fn count(&self, bytes: u64) {
        self.current.fetch_add(bytes, Relaxed);
    }

    /// Before `bytes` are done: waits while the job is paused, and until the limit admits them. ECANCELED where the job
    /// was cancelled, before or meanwhile.
    pub fn admit(&self, bytes: u64) -> Result<()> {
        let mut limits = self.limits.lock();
        loop {
            if limits.cancelled || limits.failed {
                return Err(cancelled());
            }
            if limits.paused {
                self.changed.wait(&mut limits);
            } else if limits.speed > 0 && Instant::now() < limits.next {
                let next = limits.next;
                self.changed.wait_until(&mut limits, next);
            } else {
                limits.spend(bytes);
                return Ok(());
            }
        }
    }

    /// Waits for a while, or less where the job is cancelled. Whether it is.
    pub fn wait(&self, time: Duration) -> bool {
        let mut limits = self.limits.lock();
        if !limits.cancelled {
            self.changed.wait_for(&mut limits, time);
        }
        limits.cancelled
    }

    /// The work has failed: whoever is to be admitted gets ECANCELED from now on.
    pub fn fail(&self) {
        self.limits.lock().failed = true;
        self.changed.notify_all();
    }

    /// Pauses the job for an error; it goes on when a user resumes it. ECANCELED where it was cancelled instead.
    pub fn stop(&self, status: IoStatus) -> Result<()> {
        if let Some(pause) = self.pause.get() {
            pause(status);
        }
        self.admit(0)
    }

    /// Tells of an error of I/O and what is done about it, in QEMU's words.
    pub fn io_error(&self, operation: &'static str, action: &'static str) {
        (self.sink)(&JobEvent::Error { id: self.id.clone(), operation, action });
    }

    pub(super) fn set_paused(&self, paused: bool) {
        self.limits.lock().paused = paused;
        self.changed.notify_all();
    }

    pub(super) fn is_paused(&self) -> bool {
        self.limits.lock().paused
    }

    pub(super) fn cancel(&self) {
        self.limits.lock().cancelled = true;
        self.changed.notify_all();
    }

    /// Whether it was cancelled.
    pub fn is_cancelled(&self) -> bool {
        self.limits.lock().cancelled
    }

    pub(super) fn set_speed(&self, speed: u64) {
        let mut limits = self.limits.lock();
        // What was waited for counts from now on at the new speed.
        (limits.speed, limits.next) = (speed, Instant::now());
        self.changed.notify_all();
    }

    /// Bytes per second; 0 for no limit.
    pub fn speed(&self) -> u64 {
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
fn cancelled() -> Error {
    Error::new(errno::ECANCELED, "job", "Operation canceled")
}
