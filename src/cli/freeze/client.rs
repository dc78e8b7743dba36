//! The guard as its client sees it.

use super::agent::Guest;
use super::guard::{Done, Plan, ROLE, Report, thaw_for_sure};
use crate::cli::output::{complain, printable};
use crate::error::{Error, Result, errno};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

/// A guard that runs. Dropping it closes its input: guests are thawed.
pub struct Guard {
    child: Child,
    /// None: the pipe is closed.
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
    guests: Vec<Guest>,
    /// The guests that may be frozen, as the guard told before it asked them.
    freezing: Vec<usize>,
}

impl Guard {
    /// Starts a guard and gives it the plan.
    pub fn start(plan: Plan) -> Result<Guard> {
        let failed = |e| Error::io("start the freeze guard", e);
        // The file may have been replaced by an update; what runs is what is needed. A terminal's ^C is for the client.
        let mut command = Command::new("/proc/self/exe");
        command.arg0("fleecefs").arg(ROLE).process_group(0).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().map_err(failed)?;
        let (Some(input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(Error::new(errno::EIO, "start the freeze guard", "no pipes"));
        };
        let mut guard = Guard {
            child,
            input: Some(input),
            output: BufReader::new(output),
            guests: plan.guests.clone(),
            freezing: Vec::new(),
        };
        let text =
            serde_json::to_string(&plan).map_err(|e| Error::new(errno::EINVAL, "freeze guard", e.to_string()))?;
        guard.send(&text).map_err(failed)?;
        Ok(guard)
    }

    /// Waits until all guests that can be are frozen. An error: nothing is frozen any more, hooks were told.
    pub fn ready(&mut self) -> Result<Done> {
        match self.report()? {
            Report::Ready(done) => Ok(done),
            Report::Refused(why, hint) => Err(super::refused(&why, hint.as_deref())),
            other => Err(self.confused(&other)),
        }
    }

    /// Says whether there is a snapshot, and waits until guests are thawed and hooks have ended.
    pub fn finish(mut self, taken: bool) -> Result<Done> {
        // A guard that is gone is seen by its silence.
        let _ = self.send(if taken { "true" } else { "false" });
        match self.report()? {
            Report::Done(done) => Ok(done),
            other => Err(self.confused(&other)),
        }
    }

    fn send(&mut self, line: &str) -> std::io::Result<()> {
        self.input.as_mut().map_or(Ok(()), |input| writeln!(input, "{line}").and_then(|()| input.flush()))
    }

    fn report(&mut self) -> Result<Report> {
        loop {
            let mut line = String::new();
            let count = self.output.read_line(&mut line).unwrap_or(0);
            match serde_json::from_str(&line) {
                Ok(Report::Freezing(guest)) => self.freezing.push(guest),
                Ok(report) => return Ok(report),
                Err(_) if count > 0 => {}
                Err(_) => return Err(self.lost()),
            }
        }
    }

    /// The guard is gone: what it may have frozen is thawed here.
    fn lost(&mut self) -> Error {
        for guest in self.freezing.drain(..).filter_map(|index| self.guests.get(index)) {
            complain(&format!("fleecefs: the freeze guard was killed: thawing {}", printable(&guest.to_string())));
            thaw_for_sure(guest);
        }
        Error::new(errno::EIO, "no snapshot", "the freeze guard was killed")
    }

    fn confused(&self, report: &Report) -> Error {
        Error::new(errno::EIO, "freeze guard", format!("an unexpected {report:?}"))
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.input = None;
        let _ = self.child.wait();
    }
}
