//! Jobs: what there is, and what is asked of them. `job-` commands are for all jobs, `block-job-` commands for block
//! jobs, which all jobs here are; the two differ in what they say of a job that is not there.

use super::Command;
use crate::backup::jobs::{JobError, JobInfo, Jobs, Status};
use crate::qmp::args::Arguments;
use crate::qmp::{CommandError, CommandResult, ErrorClass, Host};
use serde_json::{Value, json};

pub(super) const COMMANDS: &[Command] = &[
    Command::new("query-jobs", |host, arguments| list(host, arguments, job)),
    Command::new("query-block-jobs", |host, arguments| list(host, arguments, block_job)),
    Command::new("job-cancel", |host, arguments| of_id(arguments, |id| host.jobs().cancel(id))),
    Command::new("job-pause", |host, arguments| of_id(arguments, |id| host.jobs().pause(id))),
    Command::new("job-resume", |host, arguments| of_id(arguments, |id| host.jobs().resume(id))),
    Command::new("job-finalize", |host, arguments| of_id(arguments, |id| host.jobs().finalize(id))),
    Command::new("job-dismiss", |host, arguments| of_id(arguments, |id| host.jobs().dismiss(id))),
    Command::new("block-job-cancel", block_job_cancel),
    Command::new("block-job-set-speed", block_job_set_speed),
    Command::new("block-job-pause", |host, arguments| of_block_job(host, arguments, "device", Jobs::pause)),
    Command::new("block-job-resume", |host, arguments| of_block_job(host, arguments, "device", Jobs::resume)),
    Command::new("block-job-finalize", |host, arguments| of_block_job(host, arguments, "id", Jobs::finalize)),
    Command::new("block-job-dismiss", |host, arguments| of_block_job(host, arguments, "id", Jobs::dismiss)),
];

fn list(host: &dyn Host, arguments: Arguments, row: fn(JobInfo) -> Value) -> CommandResult {
    arguments.finish()?;
    Ok(host.jobs().infos().into_iter().map(row).collect::<Vec<Value>>().into())
}

/// QEMU's JobInfo.
fn job(info: JobInfo) -> Value {
    let row = json!({
        "id": info.id,
        "type": info.kind,
        "status": info.status.name(),
        "current-progress": info.current,
        "total-progress": info.total,
    });
    with_error(row, info.error)
}

/// QEMU's BlockJobInfo.
fn block_job(info: JobInfo) -> Value {
    let row = json!({
        "device": info.id,
        "type": info.kind,
        "status": info.status.name(),
        "offset": info.current,
        "len": info.total,
        "speed": info.speed,
        "busy": info.status == Status::Running,
        "paused": info.status == Status::Paused,
        "ready": false,
        "io-status": info.io_status.name(),
        "auto-finalize": info.auto_finalize,
        "auto-dismiss": info.auto_dismiss,
    });
    with_error(row, info.error)
}

fn with_error(mut row: Value, error: Option<String>) -> Value {
    if let Some(error) = error {
        row["error"] = json!(error);
    }
    row
}

fn of_id(mut arguments: Arguments, verb: impl FnOnce(&str) -> Result<(), JobError>) -> CommandResult {
    let id = arguments.string("id")?;
    arguments.finish()?;
    verb(&id)?;
    Ok(json!({}))
}

/// Runs a verb of the `block-job-` family.
fn of_device(jobs: &Jobs, id: &str, verb: impl FnOnce(&Jobs) -> Result<(), JobError>) -> CommandResult {
    match verb(jobs) {
        Ok(()) => Ok(json!({})),
        Err(JobError::NotFound(_)) => {
            let e = CommandError::generic(format!("Block job '{id}' not found"));
            Err(CommandError { class: ErrorClass::DeviceNotActive, ..e })
        }
        Err(e) => Err(e.into()),
    }
}

fn of_block_job(
    host: &dyn Host,
    mut arguments: Arguments,
    name: &str,
    verb: fn(&Jobs, &str) -> Result<(), JobError>,
) -> CommandResult {
    let id = arguments.string(name)?;
    arguments.finish()?;
    of_device(host.jobs(), &id, |jobs| verb(jobs, &id))
}

/// A job that is paused is cancelled by `force` alone.
fn block_job_cancel(host: &dyn Host, mut arguments: Arguments) -> CommandResult {
    let id = arguments.string("device")?;
    let force = arguments.optional_bool("force")?.unwrap_or(false);
    arguments.finish()?;
    let is_paused = |info: &JobInfo| info.id == id && info.status == Status::Paused;
    if !force && host.jobs().infos().iter().any(is_paused) {
        return Err(CommandError::generic(format!("The block job for device '{id}' is currently paused")));
    }
    of_device(host.jobs(), &id, |jobs| jobs.cancel(&id))
}

fn block_job_set_speed(host: &dyn Host, mut arguments: Arguments) -> CommandResult {
    let id = arguments.string("device")?;
    let speed = arguments.int("speed")?;
    arguments.finish()?;
    of_device(host.jobs(), &id, |jobs| jobs.set_speed(&id, speed))
}

impl From<JobError> for CommandError {
    fn from(e: JobError) -> Self {
        match e {
            JobError::NotFound(_) => CommandError::generic("Job not found"),
            JobError::Refused(text) => CommandError::generic(text),
        }
    }
}
