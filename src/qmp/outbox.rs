//! What waits to be sent on one connection: a queue between those who speak and the one thread that writes.
//!
//! Invariants: an event never waits for the client; when more than [`MAX_PENDING_BYTES`] are pending, the connection
//! is given up. A reply waits for room, so a client that does not read stops its own commands only.

use parking_lot::{Condvar, Mutex};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

/// Most bytes that wait, a last reply aside.
pub const MAX_PENDING_BYTES: usize = 1 << 20;

#[derive(Debug, Default)]
struct Queue {
    messages: VecDeque<Arc<[u8]>>,
    pending_bytes: usize,
    /// A message is being written.
    writing: bool,
    /// Nothing is added any more; what is queued still goes out.
    finished: bool,
    /// Replies wait for room no longer: the daemon ends.
    hurry: bool,
    /// Given up: nothing goes out any more.
    aborted: bool,
}

/// The queue of one connection.
pub struct Outbox {
    queue: Mutex<Queue>,
    /// Any change of the queue.
    changed: Condvar,
    /// Ends the connection under both its threads.
    close: Box<dyn Fn() + Send + Sync>,
}

impl std::fmt::Debug for Outbox {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Outbox").field("queue", &self.queue).finish_non_exhaustive()
    }
}

impl Outbox {
    /// An empty queue; `close` ends the connection and must not wait.
    pub fn new(close: Box<dyn Fn() + Send + Sync>) -> Outbox {
        Outbox { queue: Mutex::new(Queue::default()), changed: Condvar::new(), close }
    }

    /// Queues an event, or gives the connection up where too much is pending.
    pub fn push_event(&self, bytes: Arc<[u8]>) {
        let mut queue = self.queue.lock();
        if queue.finished || queue.aborted {
            return;
        }
        if queue.pending_bytes + bytes.len() > MAX_PENDING_BYTES {
            drop(queue);
            log::warn!("control socket: a client does not read its events: connection closed");
            self.abort();
            return;
        }
        self.add(&mut queue, bytes);
    }

    /// Queues a reply once there is room; false where the connection is over.
    pub fn push_reply(&self, bytes: Vec<u8>) -> bool {
        let mut queue = self.queue.lock();
        while queue.pending_bytes > MAX_PENDING_BYTES / 2 && !queue.finished && !queue.aborted && !queue.hurry {
            self.changed.wait(&mut queue);
        }
        if queue.finished || queue.aborted {
            return false;
        }
        self.add(&mut queue, bytes.into());
        true
    }

    fn add(&self, queue: &mut Queue, bytes: Arc<[u8]>) {
        queue.pending_bytes += bytes.len();
        queue.messages.push_back(bytes);
        self.changed.notify_all();
    }

    /// For the writing thread: the next message, when there is one; `None` when there will be no more. The one before
    /// counts as written.
    pub fn pop(&self) -> Option<Arc<[u8]>> {
        let mut queue = self.queue.lock();
        queue.writing = false;
        self.changed.notify_all();
        loop {
            if queue.aborted {
                return None;
            }
            if let Some(bytes) = queue.messages.pop_front() {
                queue.pending_bytes -= bytes.len();
                queue.writing = true;
                self.changed.notify_all();
                return Some(bytes);
            }
            if queue.finished {
                return None;
            }
            self.changed.wait(&mut queue);
        }
    }

    /// Lets what is queued go out, and nothing more.
    pub fn finish(&self) {
        self.queue.lock().finished = true;
        self.changed.notify_all();
    }

    /// Replies wait for room no longer.
    pub fn hurry(&self) {
        self.queue.lock().hurry = true;
        self.changed.notify_all();
    }

    /// Ends the connection at once.
    pub fn abort(&self) {
        self.queue.lock().aborted = true;
        self.changed.notify_all();
        (self.close)();
    }

    /// Waits until everything is written, the connection is over, or the time has come.
    pub fn wait_drained(&self, deadline: Instant) {
        let mut queue = self.queue.lock();
        while !queue.aborted && (queue.writing || !queue.messages.is_empty()) {
            if self.changed.wait_until(&mut queue, deadline).timed_out() {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    fn outbox() -> (Arc<Outbox>, Arc<AtomicUsize>) {
        let closes = Arc::new(AtomicUsize::new(0));
        let count = closes.clone();
        let close = move || {
            count.fetch_add(1, Ordering::SeqCst);
        };
        (Arc::new(Outbox::new(Box::new(close))), closes)
    }

    #[test]
    fn a_client_that_does_not_read_its_events_is_given_up() {
        let (outbox, closes) = outbox();
        let event: Arc<[u8]> = vec![0; MAX_PENDING_BYTES / 4].into();
        for _ in 0..4 {
            outbox.push_event(event.clone());
        }
        assert_eq!(closes.load(Ordering::SeqCst), 0);
        outbox.push_event(event);
        assert_eq!(closes.load(Ordering::SeqCst), 1);
        assert!(outbox.pop().is_none());
        assert!(!outbox.push_reply(vec![1]));
    }

    #[test]
    fn a_reply_waits_for_room_and_keeps_its_place() {
        let (outbox, closes) = outbox();
        assert!(outbox.push_reply(vec![1; MAX_PENDING_BYTES]));
        let second = std::thread::spawn({
            let outbox = outbox.clone();
            move || outbox.push_reply(vec![2])
        });
        assert_eq!(outbox.pop().unwrap().len(), MAX_PENDING_BYTES);
        assert_eq!(&*outbox.pop().unwrap(), &[2]);
        assert!(second.join().unwrap());
        outbox.finish();
        assert!(outbox.pop().is_none());
        assert_eq!(closes.load(Ordering::SeqCst), 0);
    }

    #[test]
    fn a_waiting_reply_ends_when_the_daemon_does() {
        let (outbox, _) = outbox();
        assert!(outbox.push_reply(vec![1; MAX_PENDING_BYTES]));
        let second = std::thread::spawn({
            let outbox = outbox.clone();
            move || outbox.push_reply(vec![2])
        });
        outbox.hurry();
        assert!(second.join().unwrap());
    }
}
