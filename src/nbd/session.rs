//! The transmission phase of one connection: who receives, and who works.
//!
//! * **One reader.** Whoever holds [`Session::input`] receives one request, lets go, works on it and replies: no request
//!   is handed from thread to thread. A thread that finds another one reading waits to be called.
//! * **Nobody keeps later requests unread.** A reader that goes to work calls another thread where the work takes long by
//!   what was measured and the client sends more meanwhile, or where the command is slow by nature. Otherwise it comes
//!   back sooner than a call would; where it does not, the server's watch calls (see [`Session::tick`]). This holds as
//!   long as the connection may have another thread: see [`super::house`].
//! * **Whole replies.** A reply or chunk is sent under [`Session::output`].
//! * **Short replies travel together** where the next request is here already and the work is quick. They wait for no
//!   client: whoever sends, or comes to read by a call of the watch, sends them; so does who leaves.
//! * **The last one closes.** The transport ends when the last thread has left, so replies of what was begun go out.

use super::export::{Context, Export};
use super::handshake::Agreed;
use super::house::{House, OWN_THREADS, Permit};
use super::input::Input;
use super::memory::{Buffer, Share};
use super::proto::requests::{EXTENDED_BYTES, Request, header_bytes};
use super::proto::{PAYLOAD_SKIP_MAX_BYTES, Style, command, command_flags};
use super::transport::Transport;
use crate::error::{Error, Result, errno};
use parking_lot::{Condvar, Mutex};
use std::io::{self, IoSlice};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// Work that takes longer is worth a call: it costs about a tenth of that.
const SLOW: Duration = Duration::from_micros(50);
/// See [`Pace::score`].
const SCORE_MAX: u32 = 16;
/// Longest data of a reply that may travel with others, and most bytes of replies that do.
const SHORT_BYTES: usize = 8 << 10;
/// See [`SHORT_BYTES`].
const WITHHELD_BYTES: usize = 32 << 10;
/// So many requests after the last one that came beside another, calls end.
const DEEP_REQUESTS: u32 = 32;
/// Of slow requests of clients that seem to wait for each, one in so many is tried with a call.
const PROBE: u64 = 16;
/// A thread that nobody called for so long ends.
const IDLE: Duration = Duration::from_secs(2);
/// Data of a reply is sent in pieces of this size, so that it shows that a client takes them.
const PIECE_BYTES: usize = 256 << 10;

/// One connection after its handshake.
pub struct Session {
    pub(super) house: Arc<House>,
    pub(super) export: Arc<dyn Export>,
    pub(super) contexts: Vec<Arc<dyn Context>>,
    pub(super) style: Style,
    pub(super) share: Arc<Share>,
    transport: Arc<dyn Transport>,
    /// Held by the reader.
    input: Mutex<Input>,
    /// Held while a reply or chunk is sent. Whole short ones that are still to be sent.
    output: Mutex<Vec<u8>>,
    /// There are such.
    withheld: AtomicBool,
    crew: Mutex<Crew>,
    /// Somebody in `crew` was called, has left, or all are to leave.
    changed: Condvar,
    /// No more requests are taken.
    over: AtomicBool,
    /// Nobody waits for answers.
    gone: AtomicBool,
    in_flight: AtomicUsize,
    signs: Signs,
    pace: Pace,
}

/// Threads of a connection.
#[derive(Default)]
struct Crew {
    threads: usize,
    /// Of them, those that no permit stands for.
    own: usize,
    idle: usize,
    /// A call that nobody has heard yet.
    called: bool,
}

/// What the watch looks at.
#[derive(Default)]
struct Signs {
    /// Somebody holds `input`, or was called to.
    reading: AtomicBool,
    /// Requests so far.
    requests: AtomicU64,
    /// Data of a request is being received; memory is held for it.
    receiving: AtomicBool,
    received: Arc<AtomicU64>,
    sending: AtomicBool,
    sent: AtomicU64,
}

/// What was measured.
#[derive(Default)]
struct Pace {
    /// Of late, slow requests less quick ones, from 0 to [`SCORE_MAX`]: single ones that were preempted do not count.
    score: AtomicU32,
    /// Counts down from [`DEEP_REQUESTS`].
    deep: AtomicU32,
}

/// A request with its data.
pub(super) struct Job {
    pub request: Request,
    pub data: Option<Buffer>,
    /// Why it is refused.
    pub refusal: Option<Error>,
}

/// What the watch remembers of a session between two looks.
#[derive(Default)]
pub struct Seen {
    requests: u64,
    received: u64,
    sent: u64,
    stuck_since: Option<Instant>,
}

impl Seen {
    /// For how long the client has kept memory without moving.
    pub fn stuck_for(&self, now: Instant) -> Option<Duration> {
        self.stuck_since.map(|since| now.saturating_duration_since(since))
    }
}

/// What the watch finds.
pub struct Look {
    /// There is work.
    pub active: bool,
    /// For how long the client has kept memory without moving.
    pub stuck: Option<Duration>,
}

/// Counts a request.
struct Flight<'a>(&'a AtomicUsize);

impl Drop for Flight<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

fn broken(why: &str) -> Error {
    Error::new(errno::EINVAL, "transmission", why)
}

impl Session {
    /// A session that nobody serves yet.
    pub fn new(agreed: Agreed, house: Arc<House>) -> Arc<Session> {
        let Agreed { export, style, contexts, input, .. } = agreed;
        let share = house.memory.share(export.read_only());
        let signs = Signs { reading: AtomicBool::new(true), received: input.counter(), ..Signs::default() };
        Arc::new(Session {
            house,
            export,
            contexts,
            style,
            share,
            transport: input.transport().clone(),
            input: Mutex::new(input),
            output: Mutex::default(),
            withheld: AtomicBool::new(false),
            crew: Mutex::new(Crew { threads: 1, own: 1, ..Crew::default() }),
            changed: Condvar::new(),
            over: AtomicBool::new(false),
            gone: AtomicBool::new(false),
            in_flight: AtomicUsize::new(0),
            signs,
            pace: Pace::default(),
        })
    }

    /// Serves until the client leaves, on this thread and others; all have left when it returns.
    pub fn run(self: &Arc<Self>) {
        self.work(true);
        let mut crew = self.crew.lock();
        crew.threads -= 1;
        while crew.threads > 0 {
            self.changed.wait(&mut crew);
        }
        drop(crew);
        // It fails where the client is gone.
        let _ = self.send_withheld();
        self.transport.shutdown();
    }

    /// Ends it at once: who waits for the client or for memory comes back.
    pub fn kill(&self) {
        self.gone.store(true, Ordering::SeqCst);
        self.leave();
        self.share.close();
        self.transport.shutdown();
    }

    /// Whether requests are not answered yet.
    pub fn is_busy(&self) -> bool {
        self.in_flight.load(Ordering::SeqCst) > 0 || self.withheld.load(Ordering::SeqCst)
    }

    /// Whether nobody waits for answers any more. A client that disconnects in good order still does.
    pub(super) fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Relaxed)
    }

    fn is_over(&self) -> bool {
        self.over.load(Ordering::SeqCst)
    }

    fn leave(&self) {
        self.over.store(true, Ordering::SeqCst);
        let _crew = self.crew.lock();
        self.changed.notify_all();
    }

    /// One look of the watch, which comes every few milliseconds. Calls a reader where one has been missing since the
    /// last look.
    pub fn tick(self: &Arc<Self>, seen: &mut Seen, now: Instant) -> Look {
        let signs = &self.signs;
        let requests = signs.requests.load(Ordering::SeqCst);
        let active = requests != seen.requests;
        if !signs.reading.load(Ordering::SeqCst) && !active {
            self.call();
        }
        let (received, sent) = (signs.received.load(Ordering::Relaxed), signs.sent.load(Ordering::Relaxed));
        let receives = signs.receiving.load(Ordering::Relaxed);
        let sends = signs.sending.load(Ordering::Relaxed);
        let stuck = (receives && received == seen.received) || (sends && sent == seen.sent);
        let stuck_since = if stuck { seen.stuck_since.or(Some(now)) } else { None };
        *seen = Seen { requests, received, sent, stuck_since };
        Look { active: active || self.is_busy(), stuck: seen.stuck_for(now) }
    }

    /// `main` stays for as long as the session lives.
    fn work(self: &Arc<Self>, main: bool) {
        while !self.is_over() {
            let Some(mut input) = self.input.try_lock() else {
                // The reader may have looked before this thread kept an answer back.
                if self.send_withheld().is_err() {
                    self.kill();
                }
                if !self.wait_for_call(main) {
                    return;
                }
                // Who was to send it may hang.
                if self.send_withheld().is_err() {
                    self.kill();
                }
                continue;
            };
            self.signs.reading.store(true, Ordering::SeqCst);
            let job = match self.next(&mut input) {
                Ok(Some(job)) => job,
                Ok(None) => return self.leave(),
                Err(e) => {
                    if !self.is_over() {
                        log::debug!("nbd: {e}");
                    }
                    return self.leave();
                }
            };
            let flight = Flight(&self.in_flight);
            // Looked at while nobody else can have read the end.
            if self.is_over() {
                return;
            }
            let help = self.wants_help(&job, input.buffered());
            let more = !help && !self.is_slow(&job.request) && self.has_next(&input);
            self.signs.reading.store(help, Ordering::SeqCst);
            drop(input);
            if help {
                self.call();
            }
            self.perform_caught(&job, more);
            drop((job, flight));
        }
    }

    /// What waits to be sent goes out before anybody waits for the client, and where the one that kept it hangs.
    fn next(&self, input: &mut Input) -> Result<Option<Job>> {
        if self.withheld.load(Ordering::SeqCst) && !self.has_next(input) {
            self.send_withheld().map_err(|e| Error::io("send", e))?;
        }
        self.receive(input)
    }

    /// Whether the next request is here with all its data.
    fn has_next(&self, input: &Input) -> bool {
        let (here, header) = (input.peek(), header_bytes(self.style));
        let request = here.get(..header).and_then(|bytes| Request::decode(bytes, self.style));
        request.is_some_and(|request| request.payload_len(self.style) <= (here.len() - header) as u64)
    }

    fn perform_caught(&self, job: &Job, more: bool) {
        let work = AssertUnwindSafe(|| self.perform(job, more));
        match catch_unwind(work) {
            Ok(Ok(())) => (),
            Ok(Err(e)) => {
                log::debug!("nbd: send: {e}");
                self.kill();
            }
            Err(_) => {
                // Half a reply may be out.
                self.house.note_panic();
                log::error!("nbd: a request panicked; its connection ends");
                self.kill();
            }
        }
    }

    /// Whether another thread is to read meanwhile.
    fn wants_help(&self, job: &Job, buffered: usize) -> bool {
        let deep = &self.pace.deep;
        if buffered > 0 || self.in_flight.load(Ordering::SeqCst) > 1 {
            deep.store(DEEP_REQUESTS, Ordering::Relaxed);
        } else {
            let less = |deep: u32| deep.checked_sub(1);
            let _ = deep.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
        }
        let probe = self.signs.requests.load(Ordering::Relaxed).is_multiple_of(PROBE);
        self.is_slow(&job.request) && (probe || deep.load(Ordering::Relaxed) > 0)
    }

    /// Whether a request will take long, as far as can be told.
    fn is_slow(&self, request: &Request) -> bool {
        let by_nature = request.command == command::FLUSH || request.has(command_flags::FUA);
        by_nature || self.pace.score.load(Ordering::Relaxed) > SCORE_MAX / 2
    }

    /// Notes how long an export took.
    pub(super) fn note_pace(&self, took: Duration) {
        let old = self.pace.score.load(Ordering::Relaxed);
        let new = if took > SLOW { (old + 1).min(SCORE_MAX) } else { old.saturating_sub(1) };
        if new != old {
            self.pace.score.store(new, Ordering::Relaxed);
        }
    }

    /// Wakes a thread, or starts one, to read.
    fn call(self: &Arc<Self>) {
        self.signs.reading.store(true, Ordering::SeqCst);
        let mut crew = self.crew.lock();
        if crew.called || self.is_over() {
            return;
        }
        if crew.idle > 0 {
            crew.called = true;
            self.changed.notify_one();
            return;
        }
        if crew.threads >= self.house.connection_threads {
            return self.signs.reading.store(false, Ordering::SeqCst);
        }
        let own = crew.own < OWN_THREADS;
        let permit = if own { None } else { self.house.borrow_thread(self.export.read_only()) };
        if !own && permit.is_none() {
            return self.signs.reading.store(false, Ordering::SeqCst);
        }
        crew.threads += 1;
        crew.own += usize::from(own);
        let session = self.clone();
        let started = thread::Builder::new().name("nbd-work".into()).spawn(move || session.help(permit));
        if let Err(e) = started {
            crew.threads -= 1;
            crew.own -= usize::from(own);
            self.signs.reading.store(false, Ordering::SeqCst);
            log::debug!("nbd: cannot start a thread: {e}");
        }
    }

    /// The life of another thread than the first.
    fn help(self: &Arc<Self>, permit: Option<Permit>) {
        // It is started by a call, too: see `work`.
        if self.send_withheld().is_err() {
            self.kill();
        }
        self.work(false);
        let mut crew = self.crew.lock();
        crew.threads -= 1;
        crew.own -= usize::from(permit.is_none());
        self.changed.notify_all();
    }

    /// Whether there is something to do; `false` ends the thread.
    fn wait_for_call(&self, main: bool) -> bool {
        let mut crew = self.crew.lock();
        crew.idle += 1;
        let mut patient = true;
        while !crew.called && !self.is_over() && patient {
            patient = !self.changed.wait_for(&mut crew, IDLE).timed_out() || main;
        }
        crew.idle -= 1;
        std::mem::take(&mut crew.called)
    }

    /// The next request; `None` where the client leaves.
    fn receive(&self, input: &mut Input) -> Result<Option<Job>> {
        let failed = |e| Error::io("receive", e);
        let mut header = [0; EXTENDED_BYTES];
        let header = header.get_mut(..header_bytes(self.style)).unwrap_or_default();
        if !input.fill_or_end(header).map_err(failed)? {
            self.gone.store(true, Ordering::SeqCst);
            return Ok(None);
        }
        let request = Request::decode(header, self.style).ok_or_else(|| broken("a request has no magic number"))?;
        if request.command == command::DISC {
            return Ok(None);
        }
        // Before it is looked whether the server stops: it looks the other way round.
        self.in_flight.fetch_add(1, Ordering::SeqCst);
        self.signs.requests.fetch_add(1, Ordering::SeqCst);
        let job = self.receive_data(input, request);
        if job.is_err() {
            self.in_flight.fetch_sub(1, Ordering::SeqCst);
        }
        job.map(Some)
    }

    fn receive_data(&self, input: &mut Input, request: Request) -> Result<Job> {
        let len = request.payload_len(self.style);
        let refusal = self.refusal(&request);
        if len == 0 || refusal.is_some() {
            if len > PAYLOAD_SKIP_MAX_BYTES {
                return Err(broken("a refused request has too much data to skip"));
            }
            input.skip(len).map_err(|e| Error::io("receive", e))?;
            return Ok(Job { request, data: None, refusal });
        }
        // Answers do not wait for memory that others have; a failure to send them shows when more is sent.
        let before_wait = || drop(self.send_withheld());
        let data = self.share.take(len as usize, before_wait);
        let mut data = data.ok_or_else(|| broken("the connection has ended"))?;
        self.signs.receiving.store(true, Ordering::Relaxed);
        let filled = input.fill(&mut data);
        self.signs.receiving.store(false, Ordering::Relaxed);
        filled.map_err(|e| Error::io("receive", e))?;
        Ok(Job { request, data: Some(data), refusal: None })
    }

    /// Sends a reply or chunk, whole; `more` where it may wait for the next one.
    pub(super) fn send(&self, head: &[u8], data: &[u8], more: bool) -> io::Result<()> {
        let mut withheld = self.output.lock();
        if more && data.len() <= SHORT_BYTES && withheld.len() < WITHHELD_BYTES && !self.house.is_stopping() {
            withheld.extend_from_slice(head);
            withheld.extend_from_slice(data);
            self.withheld.store(true, Ordering::SeqCst);
            return Ok(());
        }
        self.send_all(&mut withheld, head, data)
    }

    fn send_withheld(&self) -> io::Result<()> {
        let mut withheld = self.output.lock();
        if withheld.is_empty() { Ok(()) } else { self.send_all(&mut withheld, &[], &[]) }
    }

    /// Sends what was withheld, and what comes behind it.
    fn send_all(&self, withheld: &mut Vec<u8>, head: &[u8], data: &[u8]) -> io::Result<()> {
        self.signs.sending.store(true, Ordering::Relaxed);
        let (first, mut rest) = data.split_at(data.len().min(PIECE_BYTES));
        let mut sent = self.transport.send(&[IoSlice::new(withheld), IoSlice::new(head), IoSlice::new(first)]);
        while sent.is_ok() && !rest.is_empty() {
            self.signs.sent.fetch_add(1, Ordering::Relaxed);
            let (piece, later) = rest.split_at(rest.len().min(PIECE_BYTES));
            sent = self.transport.send(&[IoSlice::new(piece)]);
            rest = later;
        }
        withheld.clear();
        self.withheld.store(false, Ordering::SeqCst);
        self.signs.sent.fetch_add(1, Ordering::Relaxed);
        self.signs.sending.store(false, Ordering::Relaxed);
        sent
    }
}
