//! The table of jobs: how they begin, what verbs do, and how groups end.

use super::handle::{Handle, IoStatus, Sink};
use super::{JobError, JobEvent, JobSpec, Status, Verb, Work};
use crate::error::{Error, Result, errno};
use parking_lot::{Condvar, Mutex, MutexGuard};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

/// What `error` says of a job that was cancelled.
const CANCELLED: &str = "Operation canceled";

/// A job as others see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobInfo {
    /// The id.
    pub id: String,
    /// QEMU's job type.
    pub kind: &'static str,
    /// The status.
    pub status: Status,
    /// Bytes done.
    pub current: u64,
    /// Bytes to do, those done included.
    pub total: u64,
    /// Bytes per second; 0 for no limit.
    pub speed: u64,
    /// Whether it goes on from `pending` by itself.
    pub auto_finalize: bool,
    /// Whether it goes away when it has concluded.
    pub auto_dismiss: bool,
    /// The error that it stopped for, if it did.
    pub io_status: IoStatus,
    /// Why it did not end well.
    pub error: Option<String>,
}

/// How the work of a job ended.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Outcome {
    Done,
    Failed(String),
    Cancelled,
}

struct Job {
    /// Never used twice, unlike ids.
    key: u64,
    group: u64,
    spec: JobSpec,
    status: Status,
    io_status: IoStatus,
    handle: Arc<Handle>,
    /// Absent while it is being called.
    work: Option<Box<dyn Work>>,
    /// Present once the work has ended.
    outcome: Option<Outcome>,
    /// A thread is ending the group (J2).
    settling: bool,
}

#[derive(Default)]
struct Table {
    /// Oldest first.
    jobs: Vec<Job>,
    last_key: u64,
    /// No more jobs begin.
    stopped: bool,
}

/// All jobs of a daemon.
pub struct Jobs {
    table: Mutex<Table>,
    /// A job has ended.
    ended: Condvar,
    sink: Sink,
}

impl std::fmt::Debug for Jobs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Jobs").field("infos", &self.infos()).finish_non_exhaustive()
    }
}

impl Job {
    fn info(&self) -> JobInfo {
        let (current, total) = self.handle.progress();
        let error = match &self.outcome {
            None | Some(Outcome::Done) => None,
            Some(Outcome::Failed(why)) => Some(why.clone()),
            Some(Outcome::Cancelled) => Some(CANCELLED.to_owned()),
        };
        JobInfo {
            id: self.spec.id.clone(),
            kind: self.spec.kind,
            status: self.status,
            current,
            total,
            speed: self.handle.speed(),
            auto_finalize: self.spec.auto_finalize,
            auto_dismiss: self.spec.auto_dismiss,
            io_status: self.io_status,
            error,
        }
    }
}

impl Table {
    fn of_key(&mut self, key: u64) -> Option<&mut Job> {
        self.jobs.iter_mut().find(|job| job.key == key)
    }

    fn of_group(&self, group: u64) -> impl Iterator<Item = &Job> {
        self.jobs.iter().filter(move |job| job.group == group)
    }

    /// Keys of a group's jobs, newest first, as QEMU goes through them.
    fn keys(&self, group: u64) -> Vec<u64> {
        self.jobs.iter().rev().filter(|job| job.group == group).map(|job| job.key).collect()
    }
}

/// QEMU's rule for ids.
fn is_well_formed(id: &str) -> bool {
    id.starts_with(|c: char| c.is_ascii_alphabetic())
        && id.chars().all(|c| c.is_ascii_alphanumeric() || "-._".contains(c))
}

fn speed_of(speed: i64) -> std::result::Result<u64, JobError> {
    u64::try_from(speed).map_err(|_| JobError::Refused("Parameter 'speed' expects a non-negative value".into()))
}

/// A bug in a work must cost neither the other jobs nor the daemon.
fn caught(call: impl FnOnce() -> Result<()>) -> Result<()> {
    catch_unwind(AssertUnwindSafe(call))
        .unwrap_or_else(|_| Err(Error::new(errno::EIO, "job", "internal error; see the log")))
}

impl Jobs {
    /// No jobs; what happens to later ones is told to `sink`, which must not block.
    pub fn new(sink: impl Fn(&JobEvent) + Send + Sync + 'static) -> Arc<Jobs> {
        Arc::new(Jobs { table: Mutex::default(), ended: Condvar::new(), sink: Arc::new(sink) })
    }

    /// All jobs, newest first.
    pub fn infos(&self) -> Vec<JobInfo> {
        self.table.lock().jobs.iter().rev().map(Job::info).collect()
    }

    /// Begins jobs, all or none, as one group or each for itself. `make` is called when their ids are taken, and makes
    /// one work for each, in the order of `specs`; where it fails, the jobs go again and its error is returned.
    pub fn start<E: From<JobError>>(
        self: &Arc<Self>,
        specs: Vec<JobSpec>,
        grouped: bool,
        make: impl FnOnce() -> std::result::Result<Vec<Box<dyn Work>>, E>,
    ) -> std::result::Result<(), E> {
        let keys = self.create(specs, grouped)?;
        let (works, refusal) = match make() {
            Ok(works) => (works, None),
            Err(e) => (Vec::new(), Some(e)),
        };
        let mut works = works.into_iter();
        for key in &keys {
            let mut table = self.table.lock();
            let work = works.next();
            match table.of_key(*key) {
                Some(job) if work.is_some() => job.work = work,
                _ => self.drop_created(&mut table, *key),
            }
        }
        for key in keys.iter().rev() {
            self.launch(*key);
        }
        refusal.map_or(Ok(()), Err)
    }

    /// Takes the ids.
    fn create(self: &Arc<Self>, specs: Vec<JobSpec>, grouped: bool) -> std::result::Result<Vec<u64>, JobError> {
        let mut table = self.table.lock();
        if table.stopped {
            return Err(JobError::Refused("The daemon is about to end".into()));
        }
        let mut speeds = Vec::new();
        for (index, spec) in specs.iter().enumerate() {
            let id = &spec.id;
            if !is_well_formed(id) {
                return Err(JobError::Refused(format!("Invalid job ID '{id}'")));
            }
            let earlier = specs.iter().take(index).any(|other| other.id == *id);
            if earlier || table.jobs.iter().any(|job| job.spec.id == *id) {
                return Err(JobError::Refused(format!("Job ID '{id}' already in use")));
            }
            speeds.push(speed_of(spec.speed)?);
        }
        let first = table.last_key + 1;
        let mut keys = Vec::new();
        for (spec, speed) in specs.into_iter().zip(speeds) {
            table.last_key += 1;
            let key = table.last_key;
            let group = if grouped { first } else { key };
            let handle = Arc::new(Handle::new(&spec.id, speed, self.sink.clone()));
            let jobs = Arc::downgrade(self);
            handle.on_pause(move |io_status| {
                if let Some(jobs) = jobs.upgrade() {
                    jobs.stop_for_error(key, io_status);
                }
            });
            (self.sink)(&JobEvent::Status(spec.id.clone(), Status::Created));
            let (status, io_status) = (Status::Created, IoStatus::Ok);
            table.jobs.push(Job {
                key,
                group,
                spec,
                status,
                io_status,
                handle,
                work: None,
                outcome: None,
                settling: false,
            });
            keys.push(key);
        }
        Ok(keys)
    }

    /// Forgets a job that has no work: nothing was taken, so there is nothing to give back.
    fn drop_created(&self, table: &mut Table, key: u64) {
        let Some(job) = table.of_key(key) else { return };
        for status in [Status::Aborting, Status::Concluded, Status::Null] {
            self.change(job, status);
        }
        table.jobs.retain(|job| job.key != key);
        self.ended.notify_all();
    }

    /// Starts the thread of a created job.
    fn launch(self: &Arc<Self>, key: u64) {
        let id = {
            let mut table = self.table.lock();
            let Some(job) = table.of_key(key) else { return };
            self.change(job, Status::Running);
            if job.handle.is_paused() {
                self.change(job, Status::Paused);
            }
            job.spec.id.clone()
        };
        let jobs = self.clone();
        if let Err(e) = thread::Builder::new().name(format!("job-{id}")).spawn(move || jobs.run(key)) {
            self.finish(key, None, Err(Error::io("start a thread", e)));
        }
    }

    /// The thread of a job.
    fn run(&self, key: u64) {
        let taken = self.table.lock().of_key(key).and_then(|job| Some((job.work.take()?, job.handle.clone())));
        let Some((mut work, handle)) = taken else { return };
        let result = caught(|| work.run(&handle));
        // Paused when the last was done: what follows waits, too.
        let result = result.and_then(|()| handle.admit(0));
        self.finish(key, Some(work), result);
    }

    /// The work of a job has returned.
    fn finish(&self, key: u64, work: Option<Box<dyn Work>>, result: Result<()>) {
        let mut table = self.table.lock();
        let Some(job) = table.of_key(key) else { return };
        if work.is_some() {
            job.work = work;
        }
        let outcome = match result {
            _ if job.handle.is_cancelled() => Outcome::Cancelled,
            Ok(()) => Outcome::Done,
            Err(e) => Outcome::Failed(e.to_string()),
        };
        let status = if outcome == Outcome::Done { Status::Waiting } else { Status::Aborting };
        if job.status == Status::Paused {
            self.change(job, Status::Running);
        }
        job.outcome = Some(outcome);
        self.change(job, status);
        let group = job.group;
        self.settle(table, group);
    }

    /// Takes a group as far as it can go after one of its jobs ended or was cancelled.
    fn settle(&self, mut table: MutexGuard<'_, Table>, group: u64) {
        let failed = table.of_group(group).any(|job| job.outcome.as_ref().is_some_and(|end| *end != Outcome::Done));
        let busy = table.of_group(group).any(|job| job.status.is_busy());
        if failed {
            table.of_group(group).for_each(|job| job.handle.cancel());
        }
        if busy {
            return;
        }
        if failed {
            self.abort(table, group);
            return;
        }
        for key in table.keys(group) {
            let Some(job) = table.of_key(key) else { continue };
            self.change(job, Status::Pending);
            if !job.spec.auto_finalize {
                (self.sink)(&JobEvent::Pending(job.info()));
            }
        }
        if table.of_group(group).all(|job| job.spec.auto_finalize) {
            self.complete(table, group);
        }
    }

    /// Marks the group (J2).
    fn begin_settling(table: &mut Table, group: u64) -> Vec<u64> {
        table.jobs.iter_mut().filter(|job| job.group == group).for_each(|job| job.settling = true);
        table.keys(group)
    }

    /// Calls the work of a job without the lock.
    fn call(&self, key: u64, call: impl FnOnce(&mut dyn Work) -> Result<()>) -> Result<()> {
        let Some(mut work) = self.table.lock().of_key(key).and_then(|job| job.work.take()) else { return Ok(()) };
        let result = caught(|| call(&mut *work));
        if let Some(job) = self.table.lock().of_key(key) {
            job.work = Some(work);
        }
        result
    }

    /// Ends a group all of whose works ran well.
    fn complete(&self, mut table: MutexGuard<'_, Table>, group: u64) {
        let keys = Self::begin_settling(&mut table, group);
        drop(table);
        for key in &keys {
            if let Err(e) = self.call(*key, |work| work.prepare()) {
                let mut table = self.table.lock();
                if let Some(job) = table.of_key(*key) {
                    job.outcome = Some(Outcome::Failed(e.to_string()));
                }
                self.abort(table, group);
                return;
            }
        }
        let mut stands = false;
        for key in keys {
            let Err(e) = self.call(key, |work| work.commit()) else {
                stands = true;
                self.conclude(key);
                continue;
            };
            let mut table = self.table.lock();
            if let Some(job) = table.of_key(key) {
                job.outcome = Some(Outcome::Failed(e.to_string()));
            }
            if !stands {
                self.abort(table, group);
                return;
            }
            drop(table);
            log::error!("job: commit: {e}");
            self.abort_one(key);
        }
    }

    /// Ends a group that did not end well: what ended well counts as cancelled.
    fn abort(&self, mut table: MutexGuard<'_, Table>, group: u64) {
        let keys = Self::begin_settling(&mut table, group);
        drop(table);
        keys.into_iter().for_each(|key| self.abort_one(key));
    }

    fn abort_one(&self, key: u64) {
        {
            let mut table = self.table.lock();
            let Some(job) = table.of_key(key) else { return };
            if job.outcome == Some(Outcome::Done) {
                job.outcome = Some(Outcome::Cancelled);
            }
            if job.status != Status::Aborting {
                self.change(job, Status::Aborting);
            }
        }
        let aborted = self.call(key, |work| {
            work.abort();
            Ok(())
        });
        if let Err(e) = aborted {
            log::error!("job: abort: {e}");
        }
        self.conclude(key);
    }

    /// The end of a job whose work was committed or aborted.
    fn conclude(&self, key: u64) {
        let mut table = self.table.lock();
        let Some(job) = table.of_key(key) else { return };
        let work = job.work.take();
        (self.sink)(&match job.outcome {
            Some(Outcome::Cancelled) => JobEvent::Cancelled(job.info()),
            _ => JobEvent::Completed(job.info()),
        });
        self.change(job, Status::Concluded);
        job.settling = false;
        if job.spec.auto_dismiss {
            self.forget(&mut table, key);
        }
        self.ended.notify_all();
        // It goes without the lock, too.
        drop(table);
        drop(work);
    }

    fn forget(&self, table: &mut Table, key: u64) {
        if let Some(job) = table.of_key(key) {
            self.change(job, Status::Null);
        }
        table.jobs.retain(|job| job.key != key);
    }

    fn change(&self, job: &mut Job, status: Status) {
        debug_assert!(job.status.may_become(status), "{:?} to {status:?}", job.status);
        job.status = status;
        (self.sink)(&JobEvent::Status(job.spec.id.clone(), status));
    }

    /// Looks a job up that must accept `verb`; gives its key.
    fn accept(table: &Table, id: &str, verb: Verb) -> std::result::Result<u64, JobError> {
        let job = table.jobs.iter().find(|job| job.spec.id == id);
        let job = job.ok_or_else(|| JobError::NotFound(id.to_owned()))?;
        if job.settling || !job.status.allows(verb) {
            let (status, verb) = (job.status.name(), verb.name());
            let text = format!("Job '{id}' in state '{status}' cannot accept command verb '{verb}'");
            return Err(JobError::Refused(text));
        }
        Ok(job.key)
    }

    /// Asks for the end of a job and its group; it may go on for a while.
    pub fn cancel(&self, id: &str) -> std::result::Result<(), JobError> {
        let mut table = self.table.lock();
        let key = Self::accept(&table, id, Verb::Cancel)?;
        let Some(job) = table.of_key(key) else { return Ok(()) };
        job.handle.cancel();
        if job.status.is_busy() {
            return Ok(());
        }
        job.outcome = Some(Outcome::Cancelled);
        let group = job.group;
        self.settle(table, group);
        Ok(())
    }

    /// Lets a job wait, until it is resumed.
    pub fn pause(&self, id: &str) -> std::result::Result<(), JobError> {
        let mut table = self.table.lock();
        let key = Self::accept(&table, id, Verb::Pause)?;
        let Some(job) = table.of_key(key) else { return Ok(()) };
        if job.handle.is_paused() {
            return Err(JobError::Refused("Job is already paused".into()));
        }
        self.set_paused(job);
        Ok(())
    }

    /// Lets a job that waits go on.
    pub fn resume(&self, id: &str) -> std::result::Result<(), JobError> {
        let mut table = self.table.lock();
        let key = Self::accept(&table, id, Verb::Resume)?;
        let Some(job) = table.of_key(key) else { return Ok(()) };
        if !job.handle.is_paused() {
            return Err(JobError::Refused("Can't resume a job that was not paused".into()));
        }
        job.io_status = IoStatus::Ok;
        if job.status == Status::Paused {
            self.change(job, Status::Running);
        }
        job.handle.set_paused(false);
        Ok(())
    }

    fn set_paused(&self, job: &mut Job) {
        job.handle.set_paused(true);
        if job.status == Status::Running {
            self.change(job, Status::Paused);
        }
    }

    /// A running work met an error for which it is to wait.
    fn stop_for_error(&self, key: u64, io_status: IoStatus) {
        let mut table = self.table.lock();
        let Some(job) = table.of_key(key) else { return };
        // A user's pause stays one.
        if job.io_status == IoStatus::Ok {
            job.io_status = io_status;
        }
        if !job.handle.is_cancelled() {
            self.set_paused(job);
        }
    }

    /// Lets a group go on from `pending`; returns when its jobs have concluded.
    pub fn finalize(&self, id: &str) -> std::result::Result<(), JobError> {
        let mut table = self.table.lock();
        let key = Self::accept(&table, id, Verb::Finalize)?;
        let Some(group) = table.of_key(key).map(|job| job.group) else { return Ok(()) };
        self.complete(table, group);
        Ok(())
    }

    /// Forgets a job that has concluded.
    pub fn dismiss(&self, id: &str) -> std::result::Result<(), JobError> {
        let mut table = self.table.lock();
        let key = Self::accept(&table, id, Verb::Dismiss)?;
        self.forget(&mut table, key);
        Ok(())
    }

    /// Changes the limit: bytes per second, 0 for none.
    pub fn set_speed(&self, id: &str, speed: i64) -> std::result::Result<(), JobError> {
        let mut table = self.table.lock();
        let key = Self::accept(&table, id, Verb::SetSpeed)?;
        let speed = speed_of(speed)?;
        if let Some(job) = table.of_key(key) {
            job.handle.set_speed(speed);
        }
        Ok(())
    }

    /// Cancels all jobs and waits for their end, but not longer than `limit`. No job begins from then on.
    pub fn stop(&self, limit: Duration) {
        let ids: Vec<String> = {
            let mut table = self.table.lock();
            table.stopped = true;
            table.jobs.iter().map(|job| job.spec.id.clone()).collect()
        };
        for id in ids {
            // Refused where it has ended, or is about to.
            let _ = self.cancel(&id);
        }
        let deadline = Instant::now() + limit;
        let mut table = self.table.lock();
        while table.jobs.iter().any(|job| job.status != Status::Concluded) {
            if self.ended.wait_until(&mut table, deadline).timed_out() {
                log::error!("jobs did not end within {} s", limit.as_secs());
                return;
            }
        }
    }
}
