//! Requests that a slow store, or the pace of readers beside an active guest, may hold up.
//!
//! A request about a frozen view is served where it arrives, in the worker that read it: a hand-over costs more than
//! the read. But never are more than half of the workers in such requests: the rest goes to a few threads of its own
//! and is answered from there. So a guest's write always finds a worker, however long a store takes or a reader waits.

use super::adapter::caught;
use parking_lot::{Condvar, Mutex};
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

type Job = Box<dyn FnOnce() + Send>;

/// The slow lane beside the workers.
pub struct Lane {
    /// Workers that are in a slow request.
    inside: AtomicUsize,
    inside_max: usize,
    threads_max: usize,
    queue: Mutex<Queue>,
    arrived: Condvar,
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    threads: usize,
    idle: usize,
    stopped: bool,
}

/// Leaves the lane also where the request panics.
struct Inside<'a>(&'a Lane);

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        self.0.inside.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Lane {
    /// The lane beside `workers` workers.
    pub fn new(workers: usize) -> Arc<Lane> {
        Arc::new(Lane {
            inside: AtomicUsize::new(0),
            inside_max: workers / 2,
            threads_max: workers.div_ceil(2).max(2),
            queue: Mutex::default(),
            arrived: Condvar::new(),
        })
    }

    /// Runs `job` here, or hands it over where half of the workers are inside already.
    pub fn run(self: &Arc<Self>, job: impl FnOnce() + Send + 'static) {
        match self.enter() {
            Some(_inside) => job(),
            None => self.hand_over(Box::new(job)),
        }
    }

    fn enter(&self) -> Option<Inside<'_>> {
        let next = |inside| (inside < self.inside_max).then_some(inside + 1);
        self.inside.fetch_update(Ordering::AcqRel, Ordering::Relaxed, next).ok().map(|_| Inside(self))
    }

    fn hand_over(self: &Arc<Self>, job: Job) {
        let mut queue = self.queue.lock();
        queue.jobs.push_back(job);
        if queue.jobs.len() > queue.idle && queue.threads < self.threads_max {
            let lane = self.clone();
            match thread::Builder::new().name("fuse-slow".to_owned()).spawn(move || lane.serve()) {
                Ok(_) => queue.threads += 1,
                Err(e) if queue.threads == 0 => {
                    // Nobody would ever take it: the worker does after all.
                    log::warn!("cannot start a thread: {e}");
                    let job = queue.jobs.pop_back();
                    drop(queue);
                    if let Some(job) = job {
                        job();
                    }
                    return;
                }
                Err(e) => log::warn!("cannot start a thread: {e}"),
            }
        }
        drop(queue);
        self.arrived.notify_one();
    }

    fn serve(&self) {
        let mut queue = self.queue.lock();
        loop {
            if let Some(job) = queue.jobs.pop_front() {
                drop(queue);
                caught("request", job);
                queue = self.queue.lock();
            } else if queue.stopped {
                return;
            } else {
                queue.idle += 1;
                self.arrived.wait(&mut queue);
                queue.idle -= 1;
            }
        }
    }

    /// Ends the threads once nothing is left to do.
    pub fn stop(&self) {
        self.queue.lock().stopped = true;
        self.arrived.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;
    use std::time::Duration;

    /// With every slow request stuck, half of the workers are still free, and all requests are answered in the end.
    #[test]
    fn half_of_the_workers_stay_free_while_a_store_hangs() {
        const WORKERS: usize = 4;
        const REQUESTS: usize = 40;
        let lane = Lane::new(WORKERS);
        let store = Arc::new(Mutex::new(()));
        let hold = store.lock();
        let (requests, queue) = channel::<usize>();
        let queue = Arc::new(Mutex::new(queue));
        let (answer, answers) = channel();
        let (free, freed) = channel();
        thread::scope(|scope| {
            for _ in 0..WORKERS {
                let (queue, lane, store) = (queue.clone(), lane.clone(), store.clone());
                let (answer, free) = (answer.clone(), free.clone());
                scope.spawn(move || {
                    loop {
                        let Ok(request) = queue.lock().recv() else { return };
                        if request == 0 {
                            free.send(()).unwrap();
                            continue;
                        }
                        let (store, answer) = (store.clone(), answer.clone());
                        lane.run(move || {
                            drop(store.lock());
                            answer.send(request).unwrap();
                        });
                    }
                });
            }
            for request in 1..=REQUESTS {
                requests.send(request).unwrap();
            }
            for _ in 0..2 {
                requests.send(0).unwrap();
            }
            for _ in 0..2 {
                freed.recv_timeout(Duration::from_secs(60)).expect("a worker must be free");
            }
            assert!(answers.try_recv().is_err());
            drop(hold);
            drop(requests);
        });
        drop(answer);
        let mut got: Vec<usize> = answers.iter().take(REQUESTS).collect();
        got.sort_unstable();
        assert_eq!(got, (1..=REQUESTS).collect::<Vec<_>>());
        lane.stop();
    }

    #[test]
    fn a_panic_leaves_the_lane() {
        let lane = Lane::new(2);
        for _ in 0..3 {
            let lane = lane.clone();
            caught("test", move || lane.run(|| panic!("on purpose")));
        }
        assert_eq!(lane.inside.load(Ordering::SeqCst), 0);
        let (sender, receiver) = channel();
        lane.run(move || sender.send(thread::current().id()).unwrap());
        assert_eq!(receiver.recv().unwrap(), thread::current().id(), "served inline again");
    }
}
