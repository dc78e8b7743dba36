//! Children under a time limit: each is the first of a process group, which ends as a whole when the time is up.

use crate::error::{Error, Result, errno};
use crate::storage::process::{SIGKILL, exit_code, signal_group};
use std::io::Read;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

const POLL: Duration = Duration::from_millis(2);
/// Most bytes of output that are kept.
const MAX_OUTPUT_BYTES: u64 = 64 << 10;

/// What a child said.
pub struct Output {
    /// Its exit code, as [`exit_code`] has it.
    pub code: u8,
    pub stdout: String,
    pub stderr: String,
}

/// Runs a command to its end or to `deadline`, without input.
pub fn output(command: &mut Command, deadline: Instant) -> Result<Output> {
    let mut child = start(command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()))?;
    let (stdout, stderr) = (read_all(child.stdout.take()), read_all(child.stderr.take()));
    let status = wait(&mut child, deadline, || false)?;
    let status = status.ok_or_else(|| Error::new(errno::ETIMEDOUT, name_of(command), "does not answer"))?;
    // Who keeps a pipe open beyond the end of the child is not waited for.
    let text = |pipe: Receiver<String>| pipe.recv_timeout(Duration::from_secs(1)).unwrap_or_default();
    Ok(Output { code: exit_code(status), stdout: text(stdout), stderr: text(stderr) })
}

/// Starts a command in a process group of its own.
pub fn start(command: &mut Command) -> Result<Child> {
    command.process_group(0).spawn().map_err(|e| Error::io(format!("run {}", name_of(command)), e))
}

/// Waits for a child of [`start`]; None: it was killed, since the time was up or `stopped` said so.
pub fn wait(child: &mut Child, deadline: Instant, mut stopped: impl FnMut() -> bool) -> Result<Option<ExitStatus>> {
    loop {
        if let Some(status) = child.try_wait().map_err(|e| Error::io("wait for a child", e))? {
            return Ok(Some(status));
        }
        if stopped() || Instant::now() >= deadline {
            // It is not reaped yet, so the group is still its own.
            signal_group(child.id(), SIGKILL)?;
            child.wait().map_err(|e| Error::io("wait for a child", e))?;
            return Ok(None);
        }
        thread::sleep(POLL);
    }
}

fn name_of(command: &Command) -> String {
    command.get_program().to_string_lossy().into_owned()
}

fn read_all(pipe: Option<impl Read + Send + 'static>) -> Receiver<String> {
    let (sender, receiver) = channel();
    thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut pipe) = pipe {
            // What was read until an error is all there is.
            let _ = pipe.by_ref().take(MAX_OUTPUT_BYTES).read_to_end(&mut bytes);
            let _ = std::io::copy(&mut pipe, &mut std::io::sink());
        }
        let _ = sender.send(String::from_utf8_lossy(&bytes).into_owned());
    });
    receiver
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sh(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn output_and_exit_code_are_kept() {
        let out = output(&mut sh("echo a; echo b >&2; exit 3"), Instant::now() + Duration::from_secs(20)).unwrap();
        assert_eq!((out.code, out.stdout.as_str(), out.stderr.as_str()), (3, "a\n", "b\n"));
        let out = output(&mut sh("kill -9 $$"), Instant::now() + Duration::from_secs(20)).unwrap();
        assert_eq!(out.code, 137);
        let e = output(&mut Command::new("/nonexistent"), Instant::now()).err().unwrap();
        assert!(e.to_string().contains("/nonexistent"), "{e}");
    }

    #[test]
    fn a_child_that_takes_too_long_ends_with_its_children() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("late");
        let begun = Instant::now();
        let script = format!("(sleep 1; echo > '{}') & sleep 30", file.display());
        assert!(output(&mut sh(&script), begun + Duration::from_millis(100)).is_err());
        assert!(begun.elapsed() < Duration::from_secs(20));
        thread::sleep(Duration::from_millis(1200));
        assert!(!file.exists());
    }
}
