//! Push backups: a job that copies a disk, as it was when the job began, to a target (QEMU's `blockdev-backup`).
//!
//! The job reads a frozen view of its own ([`Frozen`]), made at one instant with the hold of the bitmap that it goes by. What is
//! copied is decided once, in units of the target's clusters, at least 64 KiB:
//!
//! | sync | copied |
//! | --- | --- |
//! | full | everything |
//! | top | what the source's own image has, without what lies below it |
//! | bitmap | what the bitmap says |
//! | none | what the guest overwrites, until the job is cancelled: what was overwritten since the instant is recorded in a bitmap of its own, and its old content is in the view |
//!
//! Invariants:
//! - **A bitmap moves on only when the target has it all, durably**: the target is flushed before the group's first commit,
//!   which ends the holds of all of the group at once.
//! - **What is not known to be copied is not forgotten**: a job that does not end well gives its bitmap back with all that it
//!   had; with the mode `always`, with what was not copied. A kill does the first, and so does a hold that is dropped.
//! - **The target of a job that has concluded is closed**, whatever the end was, if the job had opened it.

use super::copy::{self, Decision, DiskTarget, ImageTarget, Options, PackedTarget, Side, Source};
use super::jobs::{Handle, IoStatus, Work};
use super::{Extent, ExtentSource};
use crate::bitmap::DirtyBitmap;
use crate::error::{Error, Result, errno};
use crate::fleece::{Disk, Fleece, Frozen, Hold, HoldEnd, View};
use crate::image::Image;
use parking_lot::Mutex;
use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Smallest unit of a copy (QEMU's).
pub const MIN_UNIT_BYTES: u64 = 64 << 10;
/// How often a job that follows the guest looks what was overwritten.
const FOLLOW_INTERVAL: Duration = Duration::from_millis(50);
/// How long a job waits before it tries again what failed, where errors are to be ignored.
const RETRY_INTERVAL: Duration = Duration::from_millis(100);
/// Threads of a copy that begins without a limit; else one does it, in the order of the disk.
const THREADS: usize = 4;

/// What is copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sync {
    /// Everything.
    Full,
    /// What is in the source's own image.
    Top,
    /// What a bitmap says.
    Bitmap,
    /// What the guest overwrites, until the job is cancelled.
    None,
}

/// What becomes of the bitmap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BitmapMode {
    /// It moves on where the job ends well.
    OnSuccess,
    /// It stays as it is, with what is written meanwhile.
    Never,
    /// It moves on; what was not copied stays.
    Always,
}

/// What is done about an error of I/O.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnError {
    /// The job ends.
    Report,
    /// It tries again.
    Ignore,
    /// It stops where there is no space, else it ends.
    Enospc,
    /// It pauses until a user resumes it.
    Stop,
}

/// Where a backup goes.
#[derive(Debug)]
pub enum Goal {
    /// To an image that the job closes at its end.
    Image(Arc<dyn Image>),
    /// To a disk that is served.
    Disk(Arc<Disk>),
}

/// What a push backup is to do.
#[derive(Debug)]
pub struct PushSpec {
    /// What is copied.
    pub sync: Sync,
    /// Where it goes.
    pub goal: Goal,
    /// Whether clusters are stored compressed; of images that can.
    pub compress: bool,
    /// About errors of the source.
    pub on_source_error: OnError,
    /// About errors of the target.
    pub on_target_error: OnError,
    /// Kept as long as the job.
    pub kept: Box<dyn Any + Send + std::marker::Sync>,
}

/// The holds of a group of jobs, which move on together or not at all.
#[derive(Debug)]
pub struct Group {
    fleece: Arc<Fleece>,
    holds: Mutex<Vec<(usize, Hold, BitmapMode)>>,
}

impl Group {
    /// Without holds.
    pub fn new(fleece: Arc<Fleece>) -> Arc<Group> {
        Arc::new(Group { fleece, holds: Mutex::default() })
    }

    /// All jobs of the group have ended well.
    fn succeed(&self) -> Result<()> {
        let mut holds = self.holds.lock();
        let end = |mode: &BitmapMode| match mode {
            BitmapMode::Never => HoldEnd::Reclaim,
            BitmapMode::OnSuccess | BitmapMode::Always => HoldEnd::Abdicate,
        };
        let ends: Vec<_> = holds.iter().map(|(_, hold, mode)| (hold, end(mode))).collect();
        self.fleece.end_holds(&ends)?;
        holds.clear();
        Ok(())
    }

    /// A job did not end well, or another one of its group did not.
    fn fail(&self, key: usize, left: impl FnOnce() -> Result<DirtyBitmap>) {
        let mut holds = self.holds.lock();
        let Some(index) = holds.iter().position(|(other, ..)| *other == key) else { return };
        let (_, hold, mode) = holds.swap_remove(index);
        drop(holds);
        let end = match mode {
            BitmapMode::Always => left().map(HoldEnd::ReclaimWith),
            BitmapMode::OnSuccess | BitmapMode::Never => Ok(HoldEnd::Reclaim),
        };
        let ended = end.and_then(|end| self.fleece.end_holds(&[(&hold, end)]));
        if let Err(e) = ended {
            // It goes now, which gives back all that it had.
            log::error!("bitmap '{}' of disk '{}': {e}", hold.name().escape_debug(), hold.disk());
        }
    }
}

/// The work of a push backup.
pub struct Push {
    spec: Option<PushSpec>,
    frozen: Option<Frozen>,
    group: Arc<Group>,
    key: usize,
    /// In units: what is to be copied (all that may be, until that is decided), and what was.
    todo: DirtyBitmap,
    done: DirtyBitmap,
    errors: Mutex<Errors>,
    /// How often the job was resumed after an error.
    resumed: AtomicU64,
}

/// What was reported; the job ends with it.
#[derive(Default)]
struct Errors {
    reported: Option<Error>,
}

impl Push {
    /// A work that copies `frozen`, going by `hold` where there is one. `key` is unique in the group.
    pub fn new(
        spec: PushSpec,
        frozen: Frozen,
        hold: Option<(Hold, BitmapMode)>,
        group: &Arc<Group>,
        key: usize,
    ) -> Result<Push> {
        let (unit, size) = (spec.goal.unit_bytes(), frozen.view().size());
        let todo = DirtyBitmap::heap(unit, size)?;
        match (spec.sync, &hold) {
            (Sync::Bitmap, Some((hold, _))) => todo.merge_from(hold.bitmap()),
            // Until it is decided, nothing is known to need no copy.
            (Sync::Full | Sync::Top, _) => todo.mark_all(),
            (Sync::Bitmap | Sync::None, _) => {}
        }
        let done = DirtyBitmap::heap(unit, size)?;
        if let Some((hold, mode)) = hold {
            group.holds.lock().push((key, hold, mode));
        }
        let (errors, resumed) = (Mutex::default(), AtomicU64::new(0));
        let group = group.clone();
        Ok(Push { spec: Some(spec), frozen: Some(frozen), group, key, todo, done, errors, resumed })
    }

    /// What was to be copied and was not.
    fn left(&self) -> Result<DirtyBitmap> {
        let left = DirtyBitmap::heap(self.todo.granularity(), self.todo.size())?;
        let unit = self.todo.granularity();
        for run in runs(&self.todo) {
            let units = (run.start..run.end).step_by(unit as usize);
            units.filter(|at| !self.done.is_dirty(*at)).for_each(|at| left.mark(at, 1));
        }
        Ok(left)
    }

    /// What the source's own image has.
    fn own(&self, view: &View, job: &Handle) -> Result<DirtyBitmap> {
        let all = DirtyBitmap::heap(self.todo.granularity(), self.todo.size())?;
        let mut at = 0;
        while at < view.size() {
            job.admit(0)?;
            let (own, len) = view.is_own(at, view.size() - at)?;
            if own {
                all.mark(at, len);
            }
            at += len.max(1);
        }
        Ok(all)
    }

    fn copy_once(&self, spec: &PushSpec, view: &Arc<View>, job: &Handle) -> Result<()> {
        let map = view.map(None)?;
        let wanted = map.extents_from(0)?.flat_map(|extent| Cut { todo: &self.todo, rest: Some(extent) });
        let paced = Paced { view, job };
        self.copy(spec, &paced, job, wanted, &|| job.admit(0))
    }

    fn copy(
        &self,
        spec: &PushSpec,
        source: &dyn Source,
        job: &Handle,
        extents: impl Iterator<Item = Result<Extent>>,
        go_on: &(dyn Fn() -> Result<()> + std::marker::Sync),
    ) -> Result<()> {
        let unit_bytes = self.todo.granularity();
        let threads = if job.speed() == 0 { THREADS } else { 1 };
        let options = Options { threads, unit_bytes, ..Options::default() };
        let done = |offset: u64, len: u64| {
            self.done.mark(offset, len);
            job.count(len);
            go_on()
        };
        let failed = |side: Side, _: u64, _: u64, e: &Error| self.decide(spec, job, side, e);
        match &spec.goal {
            Goal::Image(image) if spec.compress => {
                copy::copy(source, &PackedTarget(&**image), extents, &options, &done, &failed)
            }
            Goal::Image(image) => copy::copy(source, &ImageTarget(&**image), extents, &options, &done, &failed),
            Goal::Disk(disk) => copy::copy(source, &DiskTarget(disk), extents, &options, &done, &failed),
        }
    }

    /// Copies what is overwritten, until the job is cancelled, and then what was until then.
    fn follow(&self, spec: &PushSpec, frozen: &Frozen, job: &Handle) -> Result<()> {
        let Some(overwritten) = frozen.overwritten() else { return Ok(()) };
        loop {
            let last = job.wait(FOLLOW_INTERVAL);
            if !last && job.admit(0).is_err() {
                continue;
            }
            let unit = self.todo.granularity();
            let units = runs(overwritten).flat_map(|run| (run.start..run.end).step_by(unit as usize));
            let new = units.filter(|at| !self.done.is_dirty(*at)).map(|start| {
                let length = unit.min(self.todo.size() - start);
                Ok(Extent { start, length, dirty: true, zero: false })
            });
            let view: &View = frozen.view();
            self.copy(spec, view, job, new, &|| Ok(()))?;
            if last {
                return job.admit(0);
            }
        }
    }

    /// One error at a time is told of and waited for; who comes upon one meanwhile tries again when the job goes on.
    fn decide(&self, spec: &PushSpec, job: &Handle, side: Side, e: &Error) -> Decision {
        let resumed = self.resumed.load(Ordering::SeqCst);
        let mut errors = self.errors.lock();
        if errors.reported.is_some() || e.errno() == errno::ECANCELED {
            return Decision::Fail;
        }
        if resumed != self.resumed.load(Ordering::SeqCst) {
            return Decision::Retry;
        }
        let (operation, policy) = match side {
            Side::Read => ("read", spec.on_source_error),
            Side::Write => ("write", spec.on_target_error),
        };
        let is_full = e.errno() == errno::ENOSPC;
        match policy {
            OnError::Ignore => {
                job.io_error(operation, "ignore");
                if job.wait(RETRY_INTERVAL) { Decision::Fail } else { Decision::Retry }
            }
            OnError::Stop | OnError::Enospc if is_full || policy == OnError::Stop => {
                job.io_error(operation, "stop");
                let went_on = job.stop(if is_full { IoStatus::NoSpace } else { IoStatus::Failed });
                self.resumed.fetch_add(1, Ordering::SeqCst);
                if went_on.is_ok() { Decision::Retry } else { Decision::Fail }
            }
            OnError::Report | OnError::Enospc | OnError::Stop => {
                job.io_error(operation, "report");
                errors.reported = Some(e.clone());
                job.fail();
                Decision::Fail
            }
        }
    }

    /// Everything is given back: the view, and the target, which is closed.
    fn end(&mut self) -> Result<()> {
        self.frozen = None;
        match self.spec.take() {
            Some(PushSpec { goal: Goal::Image(image), .. }) => image.close(),
            _ => Ok(()),
        }
    }
}

impl Work for Push {
    fn run(&mut self, job: &Handle) -> Result<()> {
        let (Some(spec), Some(frozen)) = (&self.spec, &self.frozen) else { return Ok(()) };
        let view = frozen.view();
        match spec.sync {
            Sync::None => {
                job.set_total(view.size());
                return self.follow(spec, frozen, job);
            }
            Sync::Top => self.todo = self.own(view, job)?,
            Sync::Full | Sync::Bitmap => {}
        }
        job.set_total(self.todo.count_bytes().min(view.size()));
        let copied = self.copy_once(spec, view, job);
        // Other threads may have ended first, for that reason.
        copied.map_err(|e| self.errors.lock().reported.take().unwrap_or(e))
    }

    fn prepare(&mut self) -> Result<()> {
        match self.spec.as_ref().map(|spec| &spec.goal) {
            Some(Goal::Image(image)) => image.flush(),
            Some(Goal::Disk(disk)) => disk.flush(),
            None => Ok(()),
        }
    }

    fn commit(&mut self) -> Result<()> {
        self.group.succeed()?;
        if let Err(e) = self.end() {
            // All of it is durable by now.
            log::warn!("a target was not closed: {e}");
        }
        Ok(())
    }

    fn abort(&mut self) {
        let group = self.group.clone();
        group.fail(self.key, || self.left());
        if let Err(e) = self.end() {
            log::warn!("a target was not closed: {e}");
        }
    }
}

impl Goal {
    /// The unit that is copied at once.
    pub fn unit_bytes(&self) -> u64 {
        let cluster = match self {
            Goal::Image(image) => image.cluster_bytes(),
            Goal::Disk(disk) => disk.cluster_bytes(),
        };
        cluster.unwrap_or(0).max(MIN_UNIT_BYTES)
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        match self {
            Goal::Image(image) => image.size(),
            Goal::Disk(disk) => disk.size(),
        }
    }

    /// Whether clusters can be stored compressed. A disk's cannot: they would not be a guest's writes.
    pub fn can_compress(&self) -> bool {
        match self {
            Goal::Image(image) => image.write_compressed(&[], 0).is_ok(),
            Goal::Disk(_) => false,
        }
    }

    /// Whether it cannot be written to.
    pub fn read_only(&self) -> bool {
        match self {
            Goal::Image(image) => image.read_only(),
            Goal::Disk(disk) => disk.read_only(),
        }
    }
}

/// A view that is read at the job's speed.
struct Paced<'a> {
    view: &'a View,
    job: &'a Handle,
}

impl Source for Paced<'_> {
    fn size(&self) -> u64 {
        self.view.size()
    }

    fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.job.admit(buf.len() as u64)?;
        Source::read(self.view, buf, offset)
    }
}

/// The parts of an extent that are to be copied.
struct Cut<'a> {
    todo: &'a DirtyBitmap,
    rest: Option<Result<Extent>>,
}

impl Iterator for Cut<'_> {
    type Item = Result<Extent>;

    fn next(&mut self) -> Option<Result<Extent>> {
        let rest = match self.rest.take()? {
            Ok(rest) => rest,
            Err(e) => return Some(Err(e)),
        };
        let end = rest.start + rest.length;
        let run = self.todo.next_dirty_run(rest.start, end)?;
        if run.end < end {
            self.rest = Some(Ok(Extent { start: run.end, length: end - run.end, ..rest }));
        }
        Some(Ok(Extent { start: run.start, length: run.end - run.start, dirty: true, zero: rest.zero }))
    }
}

/// The runs of set bits, in bytes, each from the start of a unit.
fn runs(bitmap: &DirtyBitmap) -> impl Iterator<Item = std::ops::Range<u64>> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let run = bitmap.next_dirty_run(at, bitmap.size())?;
        at = run.end;
        Some(run)
    })
}
