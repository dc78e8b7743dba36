//! `fleecefs umount`: ends a mount and returns when its daemon has saved everything and gone.

use super::Exit;
use super::connect::Mount;
use super::output::complain;
use crate::daemon::absolute;
use crate::error::{Error, Result, errno};
use crate::qmp::Client;
use crate::storage::process::{self, MountState};
use clap::Args;
use serde_json::Value;
use std::fs;
use std::path::PathBuf;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

/// How long to wait before saying what is waited for.
const PATIENCE: Duration = Duration::from_secs(2);
const POLL: Duration = Duration::from_millis(20);

/// Arguments of `umount`.
#[derive(Debug, Args)]
pub struct UmountArgs {
    /// The mount
    mnt: PathBuf,
    /// Detach it even while files are open; the daemon ends with the last close, and disconnects clients of NBD
    #[arg(long)]
    lazy: bool,
}

impl UmountArgs {
    /// Unmounts and waits.
    pub fn run(&self) -> Result<Exit> {
        let path = absolute(&self.mnt)?;
        if process::mount_state(&path)? == MountState::Dead {
            process::unmount(&path, true)?;
            return Ok(Exit::Done);
        }
        let mount = Mount::find(&path)?;
        if !self.lazy {
            self.refuse_clients(&mount.status)?;
        }
        let daemon = Process::find(mount.pid);
        // Events tell how the saving went. Who may not use the socket can still unmount, and learns less.
        let outcome = mount.client().ok().map(listen);
        process::unmount(&path, self.lazy).map_err(|e| self.explain_busy(e))?;
        if self.lazy && !daemon.wait_at_most(PATIENCE) {
            complain(&format!(
                "fleecefs: {}: detached; process {} goes on until the last file is closed",
                self.mnt.display(),
                daemon.pid
            ));
            return Ok(Exit::Done);
        }
        if !daemon.wait_at_most(PATIENCE) {
            complain(&format!(
                "fleecefs: {}: waiting for process {} to save its state",
                self.mnt.display(),
                daemon.pid
            ));
            daemon.wait();
        }
        // The process is gone, so the connection is closed and the listener has ended.
        match outcome.and_then(|outcome| outcome.recv_timeout(PATIENCE).ok()).flatten() {
            Some(why) => Err(Error::new(errno::EIO, self.mnt.display().to_string(), why)
                .hint("unmounted, but what was not saved counts as changed in the next backup")),
            None => Ok(Exit::Done),
        }
    }

    /// A guest that has its disk by NBD is no other than one that has its file open, which the kernel looks after.
    fn refuse_clients(&self, status: &Value) -> Result<()> {
        let rows = |of: &Value, key: &str| of.get(key).and_then(Value::as_array).cloned().unwrap_or_default();
        let exports = rows(status, "nbd").into_iter().flat_map(|server| rows(&server, "exports"));
        let is_used = |export: &Value| export.get("connections").and_then(Value::as_u64).is_some_and(|count| count > 0);
        let Some(export) = exports.into_iter().find(is_used) else { return Ok(()) };
        let name = export.get("name").and_then(Value::as_str).unwrap_or_default().escape_debug().to_string();
        let mnt = self.mnt.display();
        Err(Error::new(errno::EBUSY, mnt.to_string(), format!("a client of NBD has '{name}' open"))
            .hint(format!("end it first; `fleecefs umount {mnt} --lazy` disconnects it")))
    }

    fn explain_busy(&self, e: Error) -> Error {
        if e.errno() != errno::EBUSY {
            return e;
        }
        let mnt = self.mnt.display();
        Error::new(errno::EBUSY, mnt.to_string(), "files in it are open, or somebody works in it").hint(format!(
            "`lsof +f -- {mnt}` or `fuser -m {mnt}` shows who; `fleecefs umount {mnt} --lazy` detaches it now"
        ))
    }
}

/// Waits in the background for the daemon's last word; gives the error, if its state could not be saved.
fn listen(mut client: Client) -> mpsc::Receiver<Option<String>> {
    let (words, word) = mpsc::channel();
    thread::spawn(move || {
        let closed = client.wait_event("FLEECEFS_CLOSED").unwrap_or_default();
        let _ = words.send(closed.get("error").and_then(Value::as_str).map(str::to_owned));
    });
    word
}

/// A process by number and start, so that another one that got the number is not waited for.
#[derive(Debug)]
struct Process {
    pid: u32,
    start: Option<String>,
}

impl Process {
    fn find(pid: u32) -> Process {
        Process { pid, start: start_of(pid) }
    }

    fn has_ended(&self) -> bool {
        self.start.is_none() || start_of(self.pid) != self.start
    }

    fn wait_at_most(&self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        while !self.has_ended() {
            if Instant::now() >= deadline {
                return false;
            }
            thread::sleep(POLL);
        }
        true
    }

    fn wait(&self) {
        while !self.has_ended() {
            thread::sleep(POLL);
        }
    }
}

/// When a process started, in ticks since boot (proc_pid_stat(5), field 22); `None` where there is none, or only its
/// exit code is left. A first thread that has ended leaves the others (field 20) with all open files, and their locks.
fn start_of(pid: u32) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // Field 2 is the name in parentheses, which may hold anything.
    let mut fields = stat.get(stat.rfind(')')? + 1..)?.split_whitespace();
    let state = fields.next()?;
    let threads: u64 = fields.nth(16)?.parse().ok()?;
    if matches!(state, "Z" | "X") && threads <= 1 {
        return None;
    }
    fields.nth(1).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    #[test]
    fn a_process_is_seen_to_end() {
        let mut child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        let process = Process::find(child.id());
        assert!(!process.has_ended());
        drop(child.stdin.take());
        // Not reaped yet: what is left of it is no process that could still save anything.
        process.wait();
        child.wait().unwrap();
        assert!(process.has_ended());
        assert!(Process::find(child.id()).has_ended());
    }

    #[test]
    fn another_process_of_the_number_is_not_waited_for() {
        let process = Process { pid: std::process::id(), start: Some("0".into()) };
        assert!(process.has_ended());
    }
}
