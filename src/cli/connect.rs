//! From a mount point to its daemon: `status.json` in the mount names the control socket and the process.

use crate::error::{Error, Result, errno};
use crate::qmp::Client;
use serde::Deserialize;
use serde_json::Value;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

/// A mount that answers.
#[derive(Debug)]
pub struct Mount {
    /// The mount point as given.
    pub path: PathBuf,
    /// The text of `status.json`.
    pub status: Value,
    /// The daemon.
    pub pid: u32,
    qmp: PathBuf,
}

/// What the command line needs of `status.json`.
#[derive(Deserialize)]
struct Head {
    pid: u32,
    qmp: PathBuf,
}

impl Mount {
    /// Asks the mount at `path` who serves it.
    pub fn find(path: &Path) -> Result<Mount> {
        let text = std::fs::read(path.join("status.json")).map_err(|e| no_answer(path, e))?;
        let status: Value = serde_json::from_slice(&text).map_err(|_| not_a_mount(path))?;
        let Head { pid, qmp } = Head::deserialize(&status).map_err(|_| not_a_mount(path))?;
        Ok(Mount { path: path.to_owned(), status, pid, qmp })
    }

    /// Connects to the control socket.
    pub fn client(&self) -> Result<Client> {
        Client::connect(&self.qmp)
    }

    /// Connects and runs one command.
    pub fn execute(&self, command: &str, arguments: Value) -> Result<Value> {
        self.client()?.execute(command, arguments)
    }
}

/// Runs one command on the mount at `path`.
pub fn execute(path: &Path, command: &str, arguments: Value) -> Result<Value> {
    Mount::find(path)?.execute(command, arguments)
}

fn not_a_mount(path: &Path) -> Error {
    Error::new(errno::EINVAL, path.display().to_string(), "not a fleecefs mount")
        .hint("give the directory that `fleecefs mount IMAGE MNT` was given")
}

/// Why `status.json` could not be read.
fn no_answer(path: &Path, e: io::Error) -> Error {
    if crate::storage::process::is_dead_mount(&e) {
        return Error::new(errno::ENOTCONN, path.display().to_string(), "the mount is dead: its daemon has ended")
            .hint(format!("detach it with `fleecefs umount {0}`, or mount again over it", path.display()));
    }
    match e.kind() {
        ErrorKind::NotFound | ErrorKind::NotADirectory => not_a_mount(path),
        ErrorKind::PermissionDenied => Error::io("mount", e)
            .at_path(path)
            .hint("run this as the user who mounted it: others, root too, come in only where /etc/fuse.conf has user_allow_other"),
        _ => Error::io("mount", e).at_path(path),
    }
}

/// Reads a reply of the daemon into a type of ours.
pub fn read_reply<T: for<'a> Deserialize<'a>>(value: &Value) -> Result<T> {
    T::deserialize(value).map_err(|e| Error::new(errno::EIO, "reply of the daemon", e.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_mount_says_so() {
        let dir = tempfile::tempdir().unwrap();
        let find = || Mount::find(dir.path()).unwrap_err();
        assert!(find().to_string().contains("not a fleecefs mount"));
        std::fs::write(dir.path().join("status.json"), "{}").unwrap();
        assert!(find().to_string().contains("not a fleecefs mount"));
        assert_ne!(find().errno(), errno::ENOENT);
        let dead = no_answer(Path::new("/m"), io::Error::from_raw_os_error(errno::ENOTCONN));
        assert!(dead.to_string().contains("dead") && dead.hint_text().unwrap().contains("fleecefs umount /m"));
    }
}
