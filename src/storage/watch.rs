//! File-system calls that may hang, made in the caller's own thread.
//!
//! Cheaper than [`super::bounded`], which hands the call to another thread and waits for two wake-ups. But a thread in
//! an uninterruptible call cannot leave it: where it is not back in time, what it would have done next is done by
//! another thread, and it has nothing left to do when it comes back.
//!
//! * **One of the two.** What comes next (`rest`) is with the watch while the call runs. Either the caller takes it
//!   back, or the watch takes it once the time is over: it is done once, whoever was first.
//! * **Few at a time.** There are so many places and no more, and none is given out while a call hangs: a thread that
//!   is lost is one that serves nobody. Who gets no place uses [`super::bounded`].
//!
//! The watch looks at its places a few times within the limit while there were calls at all, else it sleeps. So a call
//! is given up late by an eighth of the limit at most, and costs no system call where it does not hang.

#[cfg(not(any(feature = "shuttle", loom)))]
pub use real::{Place, Watch};
#[cfg(any(feature = "shuttle", loom))]
pub use stub::{Place, Watch};

/// What a caller does after its call, or another thread for one that hangs.
pub trait Rest: Send + 'static {
    /// Does it for a caller that hangs.
    fn take_over(self);
}

#[cfg(not(any(feature = "shuttle", loom)))]
mod real {
    use super::Rest;
    use parking_lot::{Condvar, Mutex, MutexGuard};
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
    use std::thread;
    use std::time::{Duration, Instant};

    /// How often the places are looked at within the limit.
    const LOOKS: u32 = 8;
    /// The longest and shortest time between two looks.
    const LOOK_MAX: Duration = Duration::from_millis(500);
    const LOOK_MIN: Duration = Duration::from_millis(1);

    /// [`Rest`] of some kind, held by the watch while the call runs.
    trait Takeable: Send + Sync {
        /// What is to be done now, unless the caller has taken it back.
        fn take(&self) -> Option<Box<dyn FnOnce() + Send>>;
    }

    struct Held<R>(Mutex<Option<R>>);

    impl<R: Rest> Takeable for Held<R> {
        fn take(&self) -> Option<Box<dyn FnOnce() + Send>> {
            let rest = self.0.lock().take()?;
            Some(Box::new(move || rest.take_over()))
        }
    }

    struct Call {
        deadline: Instant,
        rest: Arc<dyn Takeable>,
    }

    #[derive(Default)]
    struct Slot {
        taken: AtomicBool,
        call: Mutex<Option<Call>>,
    }

    struct Shared {
        limit: Duration,
        slots: Box<[Slot]>,
        hanging: AtomicUsize,
        /// The watch is awake, or about to be.
        busy: AtomicBool,
        /// The watching thread: whether there is one, and whether it is to end.
        thread: Mutex<Thread>,
        wake: Condvar,
    }

    #[derive(Default)]
    struct Thread {
        runs: bool,
        closed: bool,
    }

    /// Places for calls that are made here. See the module.
    pub struct Watch(Arc<Shared>);

    impl std::fmt::Debug for Watch {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            write!(f, "{} places, {} hang", self.0.slots.len(), self.0.hanging.load(Ordering::Relaxed))
        }
    }

    /// A place for one call at a time.
    pub struct Place<'a> {
        shared: &'a Shared,
        slot: &'a Slot,
    }

    impl Drop for Place<'_> {
        fn drop(&mut self) {
            self.slot.taken.store(false, Ordering::Release);
        }
    }

    impl Watch {
        /// Places for `places` calls at a time, each of which may take `limit`.
        pub fn new(places: usize, limit: Duration) -> Self {
            Watch(Arc::new(Shared {
                limit,
                slots: (0..places).map(|_| Slot::default()).collect(),
                hanging: AtomicUsize::new(0),
                busy: AtomicBool::new(false),
                thread: Mutex::default(),
                wake: Condvar::new(),
            }))
        }

        /// A place for calls of this thread; None where all are taken, or one hangs.
        pub fn enter(&self) -> Option<Place<'_>> {
            if self.0.hanging.load(Ordering::Relaxed) > 0 {
                return None;
            }
            let free = |slot: &&Slot| !slot.taken.load(Ordering::Relaxed) && !slot.taken.swap(true, Ordering::SeqCst);
            let slot = self.0.slots.iter().find(free)?;
            let place = Place { shared: &self.0, slot };
            // After the place was taken: a watch that goes to sleep looks at the places last.
            if !self.0.busy.load(Ordering::SeqCst) && !self.0.busy.swap(true, Ordering::SeqCst) && !self.begin() {
                return None;
            }
            Some(place)
        }

        /// Sees to it that somebody watches.
        fn begin(&self) -> bool {
            let mut thread = self.0.thread.lock();
            if !thread.runs {
                let shared = self.0.clone();
                match thread::Builder::new().name("watch".to_owned()).spawn(move || shared.watch()) {
                    Ok(_) => thread.runs = true,
                    Err(e) => {
                        log::warn!("cannot start a thread: {e}");
                        self.0.busy.store(false, Ordering::SeqCst);
                        return false;
                    }
                }
            }
            self.0.wake.notify_one();
            true
        }
    }

    impl Drop for Watch {
        fn drop(&mut self) {
            self.0.thread.lock().closed = true;
            self.0.wake.notify_one();
        }
    }

    impl Place<'_> {
        /// Makes a call here. Back in time, it returns `rest` and what `call` returned. Else `rest` was run by another
        /// thread, and None comes back whenever the call does: there is nothing left to do.
        pub fn run<R: Rest, T>(&self, rest: R, call: impl FnOnce() -> T) -> Option<(R, T)> {
            let held = Arc::new(Held(Mutex::new(Some(rest))));
            *self.slot.call.lock() = Some(Call { deadline: Instant::now() + self.shared.limit, rest: held.clone() });
            let done = call();
            // None: the look has taken the call out, and counted this thread.
            let in_time = self.slot.call.lock().take().is_some();
            let rest = held.0.lock().take();
            if !in_time {
                self.shared.hanging.fetch_sub(1, Ordering::Relaxed);
            }
            rest.map(|rest| (rest, done))
        }
    }

    impl Shared {
        /// The life of the watching thread.
        fn watch(&self) {
            let pause = (self.limit / LOOKS).clamp(LOOK_MIN, LOOK_MAX);
            let mut thread = self.thread.lock();
            while !thread.closed {
                if !self.busy.load(Ordering::SeqCst) {
                    self.wake.wait(&mut thread);
                    continue;
                }
                let next = Instant::now() + pause;
                while !thread.closed && !self.wake.wait_until(&mut thread, next).timed_out() {}
                // Without the lock: where no thread can be made, what is left is done here.
                MutexGuard::unlocked(&mut thread, || self.look(Instant::now()));
                // Who enters from here on wakes this thread; who is inside by now may have found it awake.
                self.busy.store(false, Ordering::SeqCst);
                if self.slots.iter().any(|slot| slot.taken.load(Ordering::SeqCst)) {
                    self.busy.store(true, Ordering::SeqCst);
                }
            }
        }

        fn look(&self, now: Instant) {
            for slot in &self.slots {
                let rest = {
                    let mut call = slot.call.lock();
                    if call.as_ref().is_none_or(|call| call.deadline > now) {
                        continue;
                    }
                    // Counted before the caller can see that it was given up.
                    self.hanging.fetch_add(1, Ordering::Relaxed);
                    call.take().and_then(|call| call.rest.take())
                };
                if let Some(rest) = rest {
                    spawn(rest);
                }
            }
        }
    }

    /// What is left may take its time, as with an image on the same medium: the watch must not wait for it.
    fn spawn(rest: Box<dyn FnOnce() + Send>) {
        let rest = Arc::new(Mutex::new(Some(rest)));
        let run = {
            let rest = rest.clone();
            move || {
                let rest = rest.lock().take();
                if let Some(rest) = rest {
                    rest();
                }
            }
        };
        if let Err(e) = thread::Builder::new().name("take-over".to_owned()).spawn(run.clone()) {
            log::warn!("cannot start a thread: {e}");
            run();
        }
    }

    #[cfg(test)]
    mod tests {
        use super::*;
        use std::sync::mpsc::channel;

        impl<F: FnOnce() + Send + 'static> Rest for F {
            fn take_over(self) {
                self();
            }
        }

        const LONG: Duration = Duration::from_secs(600);
        const SHORT: Duration = Duration::from_millis(20);

        #[test]
        fn in_time_the_caller_has_the_rest() {
            let watch = Watch::new(2, LONG);
            let (told, tells) = channel();
            let place = watch.enter().unwrap();
            for n in 0..3 {
                let told = told.clone();
                let (rest, done) = place.run(move || told.send(n).unwrap(), || n + 1).unwrap();
                assert_eq!(done, n + 1);
                assert!(tells.try_recv().is_err(), "nobody else has done it");
                rest();
                assert_eq!(tells.try_recv(), Ok(n));
            }
        }

        #[test]
        fn late_somebody_else_does_the_rest_once_and_no_place_is_given_out() {
            let watch = Watch::new(2, SHORT);
            let (told, tells) = channel();
            let (free, freed) = channel::<()>();
            thread::scope(|scope| {
                let late = scope.spawn(|| {
                    let place = watch.enter().unwrap();
                    place.run(move || told.send(thread::current().id()).unwrap(), move || freed.recv().unwrap())
                });
                let by = tells.recv_timeout(LONG).unwrap();
                assert_ne!(by, late.thread().id());
                assert!(watch.enter().is_none(), "a call hangs");
                free.send(()).unwrap();
                assert!(late.join().unwrap().is_none());
            });
            assert!(tells.try_recv().is_err(), "once");
            assert!(watch.enter().is_some(), "it came back");
        }

        #[test]
        fn at_the_limit_the_rest_is_done_once_by_one_of_the_two() {
            const ROUNDS: u32 = 100;
            let watch = Watch::new(2, LOOK_MIN * 2);
            let (told, tells) = channel();
            let (mut mine, mut entered) = (0, 0);
            for round in 0..ROUNDS {
                let Some(place) = watch.enter() else { continue };
                entered += 1;
                let told = told.clone();
                let pause = LOOK_MIN / 4 * (round % 16);
                if let Some((rest, ())) = place.run(move || told.send(round).unwrap(), || thread::sleep(pause)) {
                    mine += 1;
                    rest();
                }
            }
            drop(told);
            let done: Vec<u32> = tells.iter().collect();
            let rounds: std::collections::BTreeSet<u32> = done.iter().copied().collect();
            assert_eq!((done.len(), rounds.len()), (entered, entered), "{mine} were back in time");
            assert!(watch.enter().is_some(), "none is counted that came back");
        }

        #[test]
        fn a_call_after_a_pause_is_watched_too() {
            let watch = Watch::new(1, SHORT);
            for _ in 0..3 {
                let (told, tells) = channel();
                let place = watch.enter().unwrap();
                assert!(place.run(move || told.send(()).unwrap(), || tells.recv_timeout(LONG).unwrap()).is_none());
                drop(place);
                // Long enough for the watch to go to sleep.
                thread::sleep(SHORT * 3);
            }
        }

        #[test]
        fn there_are_so_many_places_and_no_more() {
            let watch = Watch::new(2, LONG);
            let [first, second] = [watch.enter().unwrap(), watch.enter().unwrap()];
            assert!(watch.enter().is_none());
            drop(first);
            assert!(watch.enter().is_some());
            drop(second);
        }
    }
}

/// Stands in where shuttle or loom schedules the threads: there is never a place.
#[cfg(any(feature = "shuttle", loom))]
mod stub {
    use super::Rest;
    use std::time::Duration;

    /// See the product's `Watch`.
    #[derive(Debug)]
    pub struct Watch;

    /// See the product's `Place`.
    pub enum Place {}

    impl Watch {
        /// See the product's `Watch`.
        pub fn new(_places: usize, _limit: Duration) -> Self {
            Watch
        }

        /// None.
        pub fn enter(&self) -> Option<Place> {
            None
        }
    }

    impl Place {
        /// Never called.
        pub fn run<R: Rest, T>(&self, _rest: R, _call: impl FnOnce() -> T) -> Option<(R, T)> {
            match *self {}
        }
    }
}
