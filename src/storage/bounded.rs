//! File-system calls that may hang, with a limit on how long the caller waits.
//!
//! A thread in an uninterruptible call cannot be stopped, only left behind. So calls run on threads kept for them, and
//! the caller waits on a condition variable with a deadline. A thread that outlives its caller's patience counts as
//! *stuck*: another one takes its place, and when the call comes back after all, the thread rejoins or ends. Once as
//! many are stuck as the pool may have threads, further calls fail at once: the file system hangs.
//!
//! The hand-off is on the path of the guest's first write to a chunk: two wake-ups and two small allocations; threads
//! are made when first needed and then parked, never ended before the pool.
//!
//! Work that nobody waits for (closing and removing files) runs on one more thread, in order: were it to hang on a
//! thread of the others, nobody would notice, and calls would queue behind it.
//!
//! Lock order: pool, then call. A job runs without either.

use crate::error::Result;
use std::time::Duration;

#[cfg(not(any(feature = "shuttle", loom)))]
pub use pool::Bounded;

#[cfg(not(any(feature = "shuttle", loom)))]
mod pool {
    use super::{Duration, Result};
    use crate::error::{Error, errno};
    use parking_lot::{Condvar, Mutex};
    use std::collections::VecDeque;
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::sync::Arc;
    use std::time::Instant;

    /// What a job tells the thread that ran it.
    #[derive(Clone, Copy, PartialEq, Eq)]
    enum Outcome {
        InTime,
        /// The caller had gone, and has counted the thread as stuck.
        Abandoned,
    }

    type Job = Box<dyn FnOnce() -> Outcome + Send>;

    /// A pool of threads for calls that may hang. Dropping it waits for nobody.
    #[derive(Debug)]
    pub struct Bounded {
        pool: Arc<Pool>,
    }

    #[derive(Debug)]
    struct Pool {
        name: String,
        timeout: Duration,
        max_threads: usize,
        state: Mutex<State>,
        work: Condvar,
        background_work: Condvar,
    }

    #[derive(Default)]
    struct State {
        queue: VecDeque<Job>,
        /// Threads that wait on `work`.
        idle: usize,
        /// Threads that exist and are not stuck, the idle ones too; at most `max_threads`.
        active: usize,
        stuck: usize,
        /// Jobs that nobody waits for.
        background: VecDeque<Box<dyn FnOnce() + Send>>,
        has_background_thread: bool,
        closed: bool,
    }

    impl std::fmt::Debug for State {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            let queued = self.queue.len() + self.background.len();
            write!(f, "{queued} queued, {} idle of {}, {} stuck", self.idle, self.active, self.stuck)
        }
    }

    /// One call and its answer.
    struct Call<T> {
        state: Mutex<Progress<T>>,
        done: Condvar,
    }

    enum Progress<T> {
        Queued,
        Running,
        Done(Result<T>),
        Abandoned,
    }

    impl Bounded {
        /// A pool of at most `max_threads` threads (and as many stuck ones), none of them made yet. `name` tells what
        /// they work on, for messages and the names of the threads.
        pub fn new(name: &str, timeout: Duration, max_threads: usize) -> Self {
            Bounded {
                pool: Arc::new(Pool {
                    name: name.to_owned(),
                    timeout,
                    max_threads: max_threads.max(1),
                    state: Mutex::new(State::default()),
                    work: Condvar::new(),
                    background_work: Condvar::new(),
                }),
            }
        }

        /// Runs `job` on a thread of the pool and waits for its result, but not longer than the timeout.
        ///
        /// ETIMEDOUT: `job` may still be running, or run to its end at any later time, and its result is dropped; where
        /// no thread came free in time it never runs. EIO at once: as many threads are stuck as the pool may have.
        pub fn run<T: Send + 'static>(
            &self,
            what: &str,
            job: impl FnOnce() -> Result<T> + Send + 'static,
        ) -> Result<T> {
            let deadline = Instant::now() + self.pool.timeout;
            let call = Arc::new(Call { state: Mutex::new(Progress::Queued), done: Condvar::new() });
            let answer = call.clone();
            let mut state = self.pool.state.lock();
            if state.stuck >= self.pool.max_threads {
                let why = format!("{} hangs: {} calls have not come back", self.pool.name, state.stuck);
                return Err(Error::new(errno::EIO, what, why));
            }
            self.pool.submit(&mut state, Box::new(move || answer.perform(job)))?;
            drop(state);
            call.wait(deadline).unwrap_or_else(|| self.give_up(what, &call))
        }

        /// Runs `job` in the background, after those handed over before it. It runs even after the pool was dropped,
        /// unless one of them never comes back.
        pub fn detach(&self, job: impl FnOnce() + Send + 'static) {
            let mut state = self.pool.state.lock();
            state.background.push_back(Box::new(job));
            if state.has_background_thread {
                self.pool.background_work.notify_one();
                return;
            }
            let pool = self.pool.clone();
            match std::thread::Builder::new().name(self.pool.name.clone()).spawn(move || pool.serve_background()) {
                Ok(_) => state.has_background_thread = true,
                // It stays queued: the next one tries again.
                Err(e) => log::warn!("{}", Error::io(format!("start a thread for {}", self.pool.name), e)),
            }
        }

        /// Threads left behind in a call that has not come back.
        pub fn stuck(&self) -> usize {
            self.pool.state.lock().stuck
        }

        /// The deadline is over: leaves the call to itself, unless its answer came at the last moment.
        fn give_up<T>(&self, what: &str, call: &Call<T>) -> Result<T> {
            let mut pool = self.pool.state.lock();
            let mut state = call.state.lock();
            match std::mem::replace(&mut *state, Progress::Abandoned) {
                Progress::Done(result) => return result,
                Progress::Running => {
                    // Both locks are held: the thread sees `Abandoned` only together with these counts.
                    pool.stuck += 1;
                    pool.active -= 1;
                    // What waits in the queue must not wait for the stuck thread.
                    if let Err(e) = self.pool.staff(&mut pool) {
                        log::warn!("{e}");
                    }
                }
                Progress::Queued | Progress::Abandoned => (),
            }
            let why = format!("{} gave no answer in {} ms", self.pool.name, self.pool.timeout.as_millis());
            Err(Error::new(errno::ETIMEDOUT, what, why))
        }
    }

    impl Drop for Bounded {
        fn drop(&mut self) {
            self.pool.state.lock().closed = true;
            self.pool.work.notify_all();
            self.pool.background_work.notify_all();
        }
    }

    impl Pool {
        /// Queues a job and sees to it that a thread will take it.
        fn submit(self: &Arc<Self>, state: &mut State, job: Job) -> Result<()> {
            state.queue.push_back(job);
            self.staff(state).inspect_err(|_| {
                state.queue.pop_back();
            })
        }

        /// Wakes or makes a thread for the newest job. Fails only where no thread exists and none can be made.
        fn staff(self: &Arc<Self>, state: &mut State) -> Result<()> {
            if state.queue.len() <= state.idle {
                self.work.notify_one();
                return Ok(());
            }
            if state.queue.is_empty() || state.active >= self.max_threads {
                return Ok(());
            }
            let pool = self.clone();
            match std::thread::Builder::new().name(self.name.clone()).spawn(move || pool.serve()) {
                Ok(_) => state.active += 1,
                Err(_) if state.active > 0 => (),
                Err(e) => return Err(Error::io(format!("start a thread for {}", self.name), e)),
            }
            Ok(())
        }

        /// The life of the background's thread.
        fn serve_background(&self) {
            let mut state = self.state.lock();
            loop {
                while let Some(job) = state.background.pop_front() {
                    drop(state);
                    // A panic is reported by the panic hook; the thread goes on with the next job.
                    let _ = catch_unwind(AssertUnwindSafe(job));
                    state = self.state.lock();
                }
                if state.closed {
                    state.has_background_thread = false;
                    return;
                }
                self.background_work.wait(&mut state);
            }
        }

        /// The life of a thread that serves calls.
        fn serve(&self) {
            let mut state = self.state.lock();
            loop {
                while let Some(job) = state.queue.pop_front() {
                    drop(state);
                    let outcome = job();
                    state = self.state.lock();
                    if outcome == Outcome::Abandoned {
                        state.stuck -= 1;
                        if state.active >= self.max_threads {
                            return;
                        }
                        state.active += 1;
                    }
                }
                if state.closed {
                    state.active -= 1;
                    return;
                }
                state.idle += 1;
                self.work.wait(&mut state);
                state.idle -= 1;
            }
        }
    }

    impl<T> Call<T> {
        /// Runs the job unless its caller has gone. On the pool's thread.
        fn perform(&self, job: impl FnOnce() -> Result<T>) -> Outcome {
            {
                let mut state = self.state.lock();
                if matches!(*state, Progress::Abandoned) {
                    return Outcome::InTime;
                }
                *state = Progress::Running;
            }
            let result = catch_unwind(AssertUnwindSafe(job))
                .unwrap_or_else(|_| Err(Error::new(errno::EIO, "file-system call", "the thread panicked")));
            let mut state = self.state.lock();
            if matches!(*state, Progress::Abandoned) {
                return Outcome::Abandoned;
            }
            *state = Progress::Done(result);
            self.done.notify_one();
            Outcome::InTime
        }

        /// The answer, or `None` when the deadline is over. On the caller's thread.
        fn wait(&self, deadline: Instant) -> Option<Result<T>> {
            let mut state = self.state.lock();
            loop {
                if matches!(*state, Progress::Done(_)) {
                    return match std::mem::replace(&mut *state, Progress::Abandoned) {
                        Progress::Done(result) => Some(result),
                        _ => None,
                    };
                }
                if self.done.wait_until(&mut state, deadline).timed_out() {
                    return None;
                }
            }
        }
    }

    #[cfg(test)]
    #[test]
    fn a_call_whose_caller_has_gone_never_runs() {
        let call = Call { state: Mutex::new(Progress::<()>::Queued), done: Condvar::new() };
        assert!(call.wait(Instant::now()).is_none());
        let bounded = Bounded::new("store", Duration::ZERO, 1);
        assert_eq!(bounded.give_up("write", &call).unwrap_err().errno(), errno::ETIMEDOUT);
        assert!(call.perform(|| panic!("nobody waits for this")) == Outcome::InTime);
        assert_eq!(bounded.stuck(), 0);
    }
}

/// Stands in for the pool where shuttle or loom schedules the threads: runs every job at once, in the caller.
#[cfg(any(feature = "shuttle", loom))]
#[derive(Debug)]
pub struct Bounded;

#[cfg(any(feature = "shuttle", loom))]
impl Bounded {
    /// See the product's `Bounded`.
    pub fn new(_name: &str, _timeout: Duration, _max_threads: usize) -> Self {
        Bounded
    }

    /// Runs `job` in the caller.
    pub fn run<T: Send + 'static>(&self, _what: &str, job: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
        job()
    }

    /// Runs `job` in the caller.
    pub fn detach(&self, job: impl FnOnce() + Send + 'static) {
        job();
    }

    /// Nothing ever gets stuck.
    pub fn stuck(&self) -> usize {
        0
    }
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests {
    use super::*;
    use crate::error::{Error, errno};
    use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
    use std::sync::{Arc, Barrier, mpsc};
    use std::thread::ThreadId;

    const LONG: Duration = Duration::from_secs(60);
    const SHORT: Duration = Duration::from_millis(20);

    fn id() -> Result<ThreadId> {
        Ok(std::thread::current().id())
    }

    /// A job that hangs until the sender is dropped.
    fn hang() -> (mpsc::Sender<()>, impl FnOnce() -> Result<()> + Send) {
        let (release, wait) = mpsc::channel();
        let job = move || {
            let _ = wait.recv();
            Ok(())
        };
        (release, job)
    }

    fn wait_until(condition: impl Fn() -> bool) {
        while !condition() {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn results_and_errors_come_back_from_one_reused_thread() {
        let pool = Bounded::new("store", LONG, 4);
        let first = pool.run("read", id).unwrap();
        assert_ne!(first, std::thread::current().id());
        for _ in 0..100 {
            wait_until(|| pool_is_idle(&pool));
            assert_eq!(pool.run("read", id).unwrap(), first);
        }
        let e = pool.run::<()>("read", || Err(Error::new(errno::ENOSPC, "write", "full"))).unwrap_err();
        assert_eq!(e.errno(), errno::ENOSPC);
        let e = pool.run::<()>("read", || panic!("on purpose")).unwrap_err();
        assert_eq!(e.errno(), errno::EIO);
        assert!(pool.run("read", id).is_ok(), "a panic takes no thread away");
    }

    /// The text of `Debug` is the only look inside: all threads are idle.
    fn pool_is_idle(pool: &Bounded) -> bool {
        format!("{pool:?}").contains("0 queued, 1 idle of 1")
    }

    #[test]
    fn calls_run_at_the_same_time_up_to_the_limit() {
        let pool = Arc::new(Bounded::new("store", LONG, 3));
        let together = Arc::new(Barrier::new(3));
        let running = Arc::new(AtomicUsize::new(0));
        let most = Arc::new(AtomicUsize::new(0));
        let callers: Vec<_> = (0..12)
            .map(|_| {
                let (pool, together, running, most) = (pool.clone(), together.clone(), running.clone(), most.clone());
                std::thread::spawn(move || {
                    pool.run("read", move || {
                        most.fetch_max(running.fetch_add(1, SeqCst) + 1, SeqCst);
                        together.wait();
                        running.fetch_sub(1, SeqCst);
                        Ok(())
                    })
                })
            })
            .collect();
        callers.into_iter().for_each(|c| c.join().unwrap().unwrap());
        assert_eq!(most.load(SeqCst), 3, "the barrier needs three at once, the pool has no more");
    }

    /// Leaves one more thread of the pool stuck, until the sender is dropped. (On a busy machine a job may time out
    /// before its thread has begun; then there is another try.)
    fn stick(pool: &Bounded) -> mpsc::Sender<()> {
        let before = pool.stuck();
        loop {
            let (release, job) = hang();
            assert_eq!(pool.run("write", job).unwrap_err().errno(), errno::ETIMEDOUT);
            if pool.stuck() > before {
                return release;
            }
        }
    }

    /// Runs a job that answers at once; it may still time out on a busy machine.
    fn answer(pool: &Bounded) {
        while let Err(e) = pool.run("write", || Ok(())) {
            assert_eq!(e.errno(), errno::ETIMEDOUT);
        }
    }

    #[test]
    fn a_hung_call_times_out_and_its_thread_is_replaced_and_rejoins() {
        let pool = Bounded::new("store", SHORT, 2);
        let release = stick(&pool);
        assert_eq!(pool.stuck(), 1);
        answer(&pool);
        drop(release);
        wait_until(|| pool.stuck() == 0);
        answer(&pool);
    }

    #[test]
    fn past_the_limit_of_stuck_threads_calls_fail_at_once() {
        let pool = Bounded::new("store", SHORT, 2);
        let release_a = stick(&pool);
        let release_b = stick(&pool);
        let e = pool.run("write", || Ok(())).unwrap_err();
        assert_eq!(e.errno(), errno::EIO);
        assert!(e.to_string().contains("hangs"), "{e}");
        drop(release_a);
        wait_until(|| pool.stuck() == 1);
        answer(&pool);
        drop(release_b);
        wait_until(|| pool.stuck() == 0);
        for _ in 0..10 {
            answer(&pool);
        }
    }

    #[test]
    fn background_jobs_run_in_order_and_outlive_the_pool() {
        let pool = Bounded::new("store", SHORT, 1);
        let (release, job) = hang();
        let (say, heard) = mpsc::channel();
        pool.detach(move || {
            let _ = job();
        });
        pool.detach(|| panic!("on purpose"));
        for i in 0..10 {
            let say = say.clone();
            pool.detach(move || say.send(i).unwrap());
        }
        drop(say);
        answer(&pool);
        drop(pool);
        drop(release);
        assert_eq!(heard.iter().collect::<Vec<_>>(), (0..10).collect::<Vec<_>>());
    }

    #[test]
    fn dropping_the_pool_waits_for_no_stuck_thread() {
        let pool = Bounded::new("store", SHORT, 1);
        let release = stick(&pool);
        drop(pool);
        assert!(release.send(()).is_ok(), "its thread still waits");
    }

    #[test]
    fn many_callers_with_calls_at_the_edge_of_the_timeout_lose_nothing() {
        let pool = Arc::new(Bounded::new("store", Duration::from_millis(1), 4));
        let callers: Vec<_> = (0..8u32)
            .map(|caller| {
                let pool = pool.clone();
                std::thread::spawn(move || {
                    for i in 0..200 {
                        let pause = Duration::from_micros(u64::from((caller * 131 + i * 977) % 1500));
                        let job = move || {
                            std::thread::sleep(pause);
                            Ok(i)
                        };
                        match pool.run("write", job) {
                            Ok(got) => assert_eq!(got, i),
                            Err(e) => assert!([errno::ETIMEDOUT, errno::EIO].contains(&e.errno())),
                        }
                    }
                })
            })
            .collect();
        callers.into_iter().for_each(|c| c.join().unwrap());
        wait_until(|| pool.stuck() == 0);
    }
}
