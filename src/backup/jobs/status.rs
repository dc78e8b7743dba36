//! Statuses and verbs of jobs, and which goes with which (QEMU's tables in `job.c`, without the statuses of jobs that
//! stay ready).

/// The life of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// It is in the table; nothing runs yet.
    Created,
    /// The work runs.
    Running,
    /// The work waits, for a user asked for that or since it met an error.
    Paused,
    /// The work has ended well; others of the group run.
    Waiting,
    /// All of the group have ended well; what follows is `finalize`.
    Pending,
    /// It failed or was cancelled, and gives back what it took.
    Aborting,
    /// It has ended, and stays to be looked at until `dismiss`.
    Concluded,
    /// It is gone.
    Null,
}

/// What users may ask of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verb {
    /// End it without a result.
    Cancel,
    /// Let it wait.
    Pause,
    /// Let it go on.
    Resume,
    /// Change its limit.
    SetSpeed,
    /// Go on from `pending`.
    Finalize,
    /// Forget it.
    Dismiss,
}

impl Status {
    /// QEMU's name.
    pub fn name(self) -> &'static str {
        match self {
            Status::Created => "created",
            Status::Running => "running",
            Status::Paused => "paused",
            Status::Waiting => "waiting",
            Status::Pending => "pending",
            Status::Aborting => "aborting",
            Status::Concluded => "concluded",
            Status::Null => "null",
        }
    }

    /// Whether a job of this status accepts `verb`.
    pub fn allows(self, verb: Verb) -> bool {
        match verb {
            Verb::Cancel => self.is_busy() || matches!(self, Status::Waiting | Status::Pending),
            Verb::Pause | Verb::Resume | Verb::SetSpeed => self.is_busy(),
            Verb::Finalize => self == Status::Pending,
            Verb::Dismiss => self == Status::Concluded,
        }
    }

    /// Whether `next` may follow.
    pub fn may_become(self, next: Status) -> bool {
        match self {
            Status::Created => matches!(next, Status::Running | Status::Aborting),
            Status::Running => matches!(next, Status::Paused | Status::Waiting | Status::Aborting),
            Status::Paused => next == Status::Running,
            Status::Waiting => matches!(next, Status::Pending | Status::Aborting),
            Status::Pending => matches!(next, Status::Aborting | Status::Concluded),
            Status::Aborting => next == Status::Concluded,
            Status::Concluded => next == Status::Null,
            Status::Null => false,
        }
    }

    /// Whether the work may still be running.
    pub(super) fn is_busy(self) -> bool {
        matches!(self, Status::Created | Status::Running | Status::Paused)
    }
}

impl Verb {
    /// QEMU's name.
    pub fn name(self) -> &'static str {
        match self {
            Verb::Cancel => "cancel",
            Verb::Pause => "pause",
            Verb::Resume => "resume",
            Verb::SetSpeed => "set-speed",
            Verb::Finalize => "finalize",
            Verb::Dismiss => "dismiss",
        }
    }
}
