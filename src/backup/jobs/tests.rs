//! Jobs against what qemu-storage-daemon 10.0.2 told of its own in the same cases.

use super::*;
use crate::error::{Error, errno};
use parking_lot::Mutex;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

/// So that a test fails and does not hang.
const NEVER: Duration = Duration::from_secs(60);

/// A work that ends when it is told to, or is cancelled.
struct Step {
    id: &'static str,
    log: Log,
    end: Receiver<Result<()>>,
    prepare: Result<()>,
    commit: Result<()>,
}

#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<String>>>);

impl Log {
    fn push(&self, line: String) {
        self.0.lock().push(line);
    }

    fn take(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock())
    }

    /// Waits for a line, and gives all up to then.
    fn until(&self, last: &str) -> Vec<String> {
        let deadline = Instant::now() + NEVER;
        while !self.0.lock().iter().any(|line| line == last) {
            assert!(Instant::now() < deadline, "no '{last}' after {:?}", self.0.lock());
            std::thread::sleep(Duration::from_millis(1));
        }
        self.take()
    }
}

impl Work for Step {
    fn run(&mut self, job: &Handle) -> Result<()> {
        job.set_total(100);
        job.advance(40)?;
        loop {
            match self.end.try_recv() {
                Ok(Ok(())) => return job.advance(60),
                Ok(Err(e)) => {
                    job.io_error("read", "report");
                    return Err(e);
                }
                Err(_) => {
                    std::thread::sleep(Duration::from_millis(1));
                    job.advance(0)?;
                }
            }
        }
    }

    fn prepare(&mut self) -> Result<()> {
        self.log.push(format!("{}.prepare", self.id));
        self.prepare.clone()
    }

    fn commit(&mut self) -> Result<()> {
        self.log.push(format!("{}.commit", self.id));
        self.commit.clone()
    }

    fn abort(&mut self) {
        self.log.push(format!("{}.abort", self.id));
    }
}

struct Rig {
    jobs: Arc<Jobs>,
    log: Log,
}

fn line(event: &JobEvent) -> String {
    match event {
        JobEvent::Status(id, status) => format!("{id} {}", status.name()),
        JobEvent::Pending(info) => format!("PENDING {}", info.id),
        JobEvent::Completed(info) => {
            format!("COMPLETED {} {}/{} {:?}", info.id, info.current, info.total, info.error)
        }
        JobEvent::Cancelled(info) => format!("CANCELLED {} {}/{}", info.id, info.current, info.total),
        JobEvent::Error { id, operation, action } => format!("ERROR {id} {operation} {action}"),
    }
}

fn spec(id: &str) -> JobSpec {
    JobSpec { id: id.into(), kind: "backup", speed: 0, auto_finalize: true, auto_dismiss: true }
}

fn eio() -> Error {
    Error::new(errno::EIO, "read", "Input/output error")
}

impl Rig {
    fn new() -> Rig {
        let log = Log::default();
        let told = log.clone();
        Rig { jobs: Jobs::new(move |event| told.push(line(event))), log }
    }

    /// Starts jobs whose ends are told by what is returned.
    fn start(&self, specs: Vec<JobSpec>, grouped: bool) -> Vec<Sender<Result<()>>> {
        self.start_with(specs, grouped, Ok(()))
    }

    fn start_with(&self, specs: Vec<JobSpec>, grouped: bool, prepare: Result<()>) -> Vec<Sender<Result<()>>> {
        let (mut ends, mut works) = (Vec::new(), Vec::<Box<dyn Work>>::new());
        for spec in &specs {
            let (sender, end) = channel();
            ends.push(sender);
            let id = spec.id.clone().leak();
            let (log, prepare) = (self.log.clone(), prepare.clone());
            works.push(Box::new(Step { id, log, end, prepare, commit: Ok(()) }));
        }
        self.jobs.start::<JobError>(specs, grouped, || Ok(works)).unwrap();
        ends
    }

    fn error(&self, id: &str) -> Option<String> {
        self.jobs.infos().into_iter().find(|info| info.id == id).and_then(|info| info.error)
    }

    fn wait(&self, id: &str, status: Status) {
        let deadline = Instant::now() + NEVER;
        while !self.jobs.infos().iter().any(|info| info.id == id && info.status == status) {
            assert!(Instant::now() < deadline, "{id} is not {status:?}: {:?}", self.jobs.infos());
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

fn refused(text: &str) -> std::result::Result<(), JobError> {
    Err(JobError::Refused(text.into()))
}

#[test]
fn a_job_that_is_left_alone_goes_through_all_statuses() {
    let rig = Rig::new();
    let ends = rig.start(vec![spec("j")], false);
    ends[0].send(Ok(())).unwrap();
    assert_eq!(
        rig.log.until("j null"),
        [
            "j created",
            "j running",
            "j waiting",
            "j pending",
            "j.prepare",
            "j.commit",
            "COMPLETED j 100/100 None",
            "j concluded",
            "j null"
        ]
    );
    assert!(rig.jobs.infos().is_empty());
}

#[test]
fn without_automatisms_it_waits_for_finalize_and_dismiss() {
    let rig = Rig::new();
    let manual = JobSpec { auto_finalize: false, auto_dismiss: false, ..spec("j") };
    let ends = rig.start(vec![manual.clone()], false);
    ends[0].send(Ok(())).unwrap();
    assert_eq!(rig.log.until("PENDING j"), ["j created", "j running", "j waiting", "j pending", "PENDING j"]);
    let state =
        |status: &str, verb: &str| refused(&format!("Job 'j' in state '{status}' cannot accept command verb '{verb}'"));
    assert_eq!(rig.jobs.dismiss("j"), state("pending", "dismiss"));
    assert_eq!(rig.jobs.set_speed("j", 1), state("pending", "set-speed"));
    rig.jobs.finalize("j").unwrap();
    assert_eq!(rig.log.take(), ["j.prepare", "j.commit", "COMPLETED j 100/100 None", "j concluded"]);
    assert_eq!(rig.jobs.finalize("j"), state("concluded", "finalize"));
    assert_eq!(rig.jobs.cancel("j"), state("concluded", "cancel"));
    assert_eq!(rig.error("j"), None);
    rig.jobs.dismiss("j").unwrap();
    assert_eq!(rig.log.take(), ["j null"]);
    assert_eq!(rig.jobs.dismiss("j"), Err(JobError::NotFound("j".into())));

    let ends = rig.start(vec![manual], false);
    ends[0].send(Ok(())).unwrap();
    rig.log.until("PENDING j");
    rig.jobs.cancel("j").unwrap();
    assert_eq!(rig.log.take(), ["j aborting", "j.abort", "CANCELLED j 100/100", "j concluded"]);
    assert_eq!(rig.error("j").as_deref(), Some("Operation canceled"));
}

#[test]
fn a_cancelled_job_gives_back_what_it_took() {
    let rig = Rig::new();
    let _ends = rig.start(vec![JobSpec { auto_dismiss: false, ..spec("j") }], false);
    rig.wait("j", Status::Running);
    for (verb, outcome) in [("finalize", rig.jobs.finalize("j")), ("dismiss", rig.jobs.dismiss("j"))] {
        assert_eq!(outcome, refused(&format!("Job 'j' in state 'running' cannot accept command verb '{verb}'")));
    }
    rig.jobs.cancel("j").unwrap();
    assert_eq!(
        rig.log.until("j concluded"),
        ["j created", "j running", "j aborting", "j.abort", "CANCELLED j 40/100", "j concluded"]
    );
    assert_eq!(rig.error("j").as_deref(), Some("Operation canceled"));
}

#[test]
fn a_job_that_fails_says_why() {
    let rig = Rig::new();
    let ends = rig.start(vec![JobSpec { auto_finalize: false, auto_dismiss: false, ..spec("j") }], false);
    ends[0].send(Err(eio())).unwrap();
    assert_eq!(
        rig.log.until("j concluded"),
        [
            "j created",
            "j running",
            "ERROR j read report",
            "j aborting",
            "j.abort",
            "COMPLETED j 40/100 Some(\"read: Input/output error\")",
            "j concluded"
        ]
    );
    assert_eq!(rig.error("j").as_deref(), Some("read: Input/output error"));
}

#[test]
fn a_group_commits_when_all_are_ready() {
    let rig = Rig::new();
    let ends = rig.start(vec![spec("a"), spec("b")], true);
    assert_eq!(rig.log.until("a running"), ["a created", "b created", "b running", "a running"]);
    ends[0].send(Ok(())).unwrap();
    assert_eq!(rig.log.until("a waiting"), ["a waiting"]);
    assert_eq!(rig.jobs.finalize("a"), refused("Job 'a' in state 'waiting' cannot accept command verb 'finalize'"));
    ends[1].send(Ok(())).unwrap();
    assert_eq!(
        rig.log.until("a null"),
        [
            "b waiting",
            "b pending",
            "a pending",
            "b.prepare",
            "a.prepare",
            "b.commit",
            "COMPLETED b 100/100 None",
            "b concluded",
            "b null",
            "a.commit",
            "COMPLETED a 100/100 None",
            "a concluded",
            "a null"
        ]
    );
}

#[test]
fn one_finalize_is_for_the_whole_group() {
    let rig = Rig::new();
    let ends = rig.start(vec![JobSpec { auto_finalize: false, ..spec("a") }, spec("b")], true);
    ends.iter().for_each(|end| end.send(Ok(())).unwrap());
    rig.log.until("PENDING a");
    rig.wait("b", Status::Pending);
    rig.jobs.finalize("b").unwrap();
    assert!(rig.jobs.infos().is_empty());
    assert_eq!(rig.log.take().iter().filter(|line| line.contains("commit")).count(), 2);
}

#[test]
fn a_group_is_cancelled_with_one_of_it() {
    // The one that still runs, and the one that waits.
    for cancelled in ["b", "a"] {
        let rig = Rig::new();
        let kept = |id| JobSpec { auto_dismiss: false, ..spec(id) };
        let ends = rig.start(vec![kept("a"), kept("b")], true);
        ends[0].send(Ok(())).unwrap();
        rig.log.until("a waiting");
        rig.jobs.cancel(cancelled).unwrap();
        assert_eq!(
            rig.log.until("a concluded"),
            [
                "b aborting",
                "b.abort",
                "CANCELLED b 40/100",
                "b concluded",
                "a aborting",
                "a.abort",
                "CANCELLED a 100/100",
                "a concluded"
            ]
        );
    }
}

#[test]
fn a_group_is_cancelled_where_one_fails() {
    let rig = Rig::new();
    let ends = rig.start(vec![spec("a"), spec("b")], true);
    rig.log.until("a running");
    ends[1].send(Err(eio())).unwrap();
    assert_eq!(
        rig.log.until("a null"),
        [
            "ERROR b read report",
            "b aborting",
            "a aborting",
            "b.abort",
            "COMPLETED b 40/100 Some(\"read: Input/output error\")",
            "b concluded",
            "b null",
            "a.abort",
            "CANCELLED a 40/100",
            "a concluded",
            "a null"
        ]
    );
}

#[test]
fn a_prepare_that_fails_leaves_no_commit() {
    let rig = Rig::new();
    let ends = rig.start_with(vec![spec("a"), spec("b")], true, Err(eio()));
    ends.iter().for_each(|end| end.send(Ok(())).unwrap());
    let lines = rig.log.until("a null");
    assert!(!lines.iter().any(|line| line.contains("commit")), "{lines:?}");
    for line in ["a.abort", "b.abort", "CANCELLED a 100/100"] {
        assert!(lines.iter().any(|other| other == line), "{line} is not in {lines:?}");
    }
    assert!(lines.iter().any(|line| line.starts_with("COMPLETED b 100/100 Some")), "{lines:?}");
}

impl Rig {
    /// A group of `a` and `b` (which goes first) that run well, with what each says at the end; gives what happened.
    fn ends(&self, a: [Result<()>; 2], b: [Result<()>; 2]) -> Vec<String> {
        let mut works = Vec::<Box<dyn Work>>::new();
        for (id, [prepare, commit]) in [("a", a), ("b", b)] {
            let (sender, end) = channel();
            sender.send(Ok(())).unwrap();
            works.push(Box::new(Step { id, log: self.log.clone(), end, prepare, commit }));
        }
        self.jobs.start::<JobError>(vec![spec("a"), spec("b")], true, || Ok(works)).unwrap();
        self.log.until("a null")
    }
}

#[test]
fn a_late_prepare_that_fails_leaves_no_commit() {
    let lines = Rig::new().ends([Err(eio()), Ok(())], [Ok(()), Ok(())]);
    assert!(!lines.iter().any(|line| line.contains("commit")), "{lines:?}");
}

#[test]
fn a_first_commit_that_fails_leaves_no_other_one() {
    let lines = Rig::new().ends([Ok(()), Ok(())], [Ok(()), Err(eio())]);
    let tail = lines.iter().position(|line| line == "b.commit").unwrap();
    assert_eq!(
        lines[tail..],
        [
            "b.commit",
            "b aborting",
            "b.abort",
            "COMPLETED b 100/100 Some(\"read: Input/output error\")",
            "b concluded",
            "b null",
            "a aborting",
            "a.abort",
            "CANCELLED a 100/100",
            "a concluded",
            "a null"
        ]
    );
}

#[test]
fn a_later_commit_that_fails_costs_its_own_job() {
    let lines = Rig::new().ends([Ok(()), Err(eio())], [Ok(()), Ok(())]);
    let has = |text: &str| lines.iter().any(|line| line == text);
    assert!(has("COMPLETED b 100/100 None") && !has("b.abort"), "{lines:?}");
    assert!(has("a.abort") && has("COMPLETED a 100/100 Some(\"read: Input/output error\")"), "{lines:?}");
}

#[test]
fn jobs_that_are_not_grouped_end_alone() {
    let rig = Rig::new();
    let ends = rig.start(vec![spec("a"), spec("b")], false);
    ends[0].send(Err(eio())).unwrap();
    rig.log.until("a null");
    ends[1].send(Ok(())).unwrap();
    assert!(rig.log.until("b null").contains(&"b.commit".to_owned()));
}

#[test]
fn ids_are_checked_for_all_before_any_begins() {
    let rig = Rig::new();
    let _ends = rig.start(vec![spec("j")], false);
    rig.wait("j", Status::Running);
    rig.log.until("j running");
    let refusal = |specs: Vec<JobSpec>| {
        let Err(JobError::Refused(text)) = rig.jobs.start::<JobError>(specs, false, || panic!("made")) else {
            panic!("started");
        };
        text
    };
    assert_eq!(refusal(vec![spec("k"), spec("j")]), "Job ID 'j' already in use");
    assert_eq!(refusal(vec![spec("k"), spec("k")]), "Job ID 'k' already in use");
    for id in ["", "1", "a b", "ä"] {
        assert_eq!(refusal(vec![spec("k"), spec(id)]), format!("Invalid job ID '{id}'"));
    }
    let negative = JobSpec { speed: -1, ..spec("k") };
    assert_eq!(refusal(vec![negative]), "Parameter 'speed' expects a non-negative value");
    assert!(rig.log.take().is_empty());
    let made = rig.jobs.start(vec![spec("k")], false, || Err(JobError::Refused("no".into())));
    assert_eq!(made, refused("no"));
    assert_eq!(rig.log.take(), ["k created", "k aborting", "k concluded", "k null"]);
    rig.jobs.stop(NEVER);
    assert!(rig.jobs.infos().is_empty());
    assert_eq!(refusal(vec![spec("k")]), "The daemon is about to end");
}

#[test]
fn stop_cancels_what_runs_and_what_waits() {
    let rig = Rig::new();
    let ends = rig.start(vec![spec("a"), spec("b")], true);
    let pending = rig.start(vec![JobSpec { auto_finalize: false, auto_dismiss: false, ..spec("p") }], false);
    ends[0].send(Ok(())).unwrap();
    pending[0].send(Ok(())).unwrap();
    rig.wait("a", Status::Waiting);
    rig.wait("p", Status::Pending);
    rig.jobs.stop(NEVER);
    let lines = rig.log.take();
    for id in ["a", "b", "p"] {
        assert!(lines.contains(&format!("{id}.abort")), "{id}: {lines:?}");
    }
}

#[test]
fn a_work_that_panics_fails() {
    struct Bug(Log);
    impl Work for Bug {
        fn run(&mut self, _: &Handle) -> Result<()> {
            panic!("on purpose")
        }
        fn commit(&mut self) -> Result<()> {
            Ok(())
        }
        fn abort(&mut self) {
            self.0.push("abort".into());
        }
    }
    let rig = Rig::new();
    rig.jobs.start::<JobError>(vec![spec("j")], false, || Ok(vec![Box::new(Bug(rig.log.clone()))])).unwrap();
    assert!(rig.log.until("j null").contains(&"abort".to_owned()));
}

/// A work that asks for its own end while the group is being ended (J2).
struct Meddler {
    jobs: Arc<Jobs>,
    log: Log,
    fails: bool,
}

impl Meddler {
    fn meddle(&self, step: &str) {
        let outcomes = [self.jobs.cancel("j"), self.jobs.finalize("j"), self.jobs.dismiss("j")];
        let refused = outcomes.iter().filter(|outcome| matches!(outcome, Err(JobError::Refused(_)))).count();
        self.log.push(format!("{step} {refused}"));
    }
}

impl Work for Meddler {
    fn run(&mut self, _: &Handle) -> Result<()> {
        Ok(())
    }
    fn prepare(&mut self) -> Result<()> {
        self.meddle("prepare");
        if self.fails { Err(eio()) } else { Ok(()) }
    }
    fn commit(&mut self) -> Result<()> {
        self.meddle("commit");
        Ok(())
    }
    fn abort(&mut self) {
        self.meddle("abort");
    }
}

#[test]
fn no_verb_is_accepted_while_a_group_ends() {
    for fails in [false, true] {
        let rig = Rig::new();
        let works = || -> std::result::Result<Vec<Box<dyn Work>>, JobError> {
            Ok(vec![Box::new(Meddler { jobs: rig.jobs.clone(), log: rig.log.clone(), fails })])
        };
        rig.jobs.start(vec![spec("j")], false, works).unwrap();
        let lines = rig.log.until("j null");
        let last = if fails { "abort 3" } else { "commit 3" };
        let steps: Vec<&String> = lines.iter().filter(|line| line.ends_with('3')).collect();
        assert_eq!(steps, ["prepare 3", last], "{lines:?}");
        assert_eq!(lines.iter().filter(|line| line.starts_with("COMPLETED")).count(), 1, "{lines:?}");
    }
}

#[test]
fn the_limit_of_the_speed_holds_and_can_be_changed() {
    let handle = Arc::new(Handle::new("j", 1000, Arc::new(|_| {})));
    let begin = Instant::now();
    (0..10).for_each(|_| handle.advance(20).unwrap());
    assert!(begin.elapsed() >= Duration::from_millis(190), "{:?}", begin.elapsed());
    assert_eq!(handle.progress(), (200, 0));
    // Whoever waits for an hour is woken by a new limit, and by the end.
    let waiting = {
        let handle = handle.clone();
        handle.set_speed(1);
        std::thread::spawn(move || (handle.advance(3600), handle.advance(1)))
    };
    std::thread::sleep(Duration::from_millis(20));
    handle.set_speed(0);
    let (first, second) = waiting.join().unwrap();
    assert!(first.is_ok() && second.is_ok());
    handle.cancel();
    assert_eq!(handle.advance(0).unwrap_err().errno(), errno::ECANCELED);
}

#[test]
fn a_paused_job_waits_until_it_is_resumed_or_cancelled() {
    for cancels in [false, true] {
        let rig = Rig::new();
        let ends = rig.start(vec![spec("j")], false);
        rig.wait("j", Status::Running);
        assert_eq!(rig.jobs.resume("j"), refused("Can't resume a job that was not paused"));
        rig.jobs.pause("j").unwrap();
        assert_eq!(rig.jobs.pause("j"), refused("Job is already paused"));
        ends[0].send(Ok(())).unwrap();
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(rig.jobs.infos()[0].status, Status::Paused);
        if cancels { rig.jobs.cancel("j") } else { rig.jobs.resume("j") }.unwrap();
        let lines = rig.log.until("j null");
        let at = lines.iter().position(|line| line == "j paused").unwrap();
        let next = if cancels { "j aborting" } else { "j waiting" };
        assert_eq!(lines[at + 1..at + 3], ["j running", next], "{lines:?}");
    }
}

#[test]
fn a_job_that_stops_for_an_error_says_which() {
    struct Stops(Log);
    impl Work for Stops {
        fn run(&mut self, job: &Handle) -> Result<()> {
            job.stop(IoStatus::NoSpace)
        }
        fn commit(&mut self) -> Result<()> {
            self.0.push("commit".into());
            Ok(())
        }
        fn abort(&mut self) {}
    }
    let rig = Rig::new();
    rig.jobs.start::<JobError>(vec![spec("j")], false, || Ok(vec![Box::new(Stops(rig.log.clone()))])).unwrap();
    rig.wait("j", Status::Paused);
    assert_eq!(rig.jobs.infos()[0].io_status.name(), "nospace");
    rig.jobs.resume("j").unwrap();
    assert!(rig.log.until("j null").contains(&"commit".to_owned()));
}

#[test]
fn verbs_and_statuses_have_qemus_names() {
    let all = [Verb::Cancel, Verb::Pause, Verb::Resume, Verb::SetSpeed, Verb::Finalize, Verb::Dismiss];
    assert_eq!(all.map(Verb::name), ["cancel", "pause", "resume", "set-speed", "finalize", "dismiss"]);
    assert!(!Status::Null.may_become(Status::Created) && Status::Null.name() == "null");
}
