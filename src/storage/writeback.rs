//! Having the kernel write back what is dirty in shared mappings of a file, through a mount that this process serves.
//!
//! Such a wait cannot be interrupted, and it ends only when the process itself answers the writes. Were the process
//! killed meanwhile, the waiting thread would keep the descriptor table alive, with it the connection of the mount,
//! and with that its own wait: an unkillable process and a mount that hangs. So the thread that waits has a descriptor
//! table of its own: when the others are gone, the connection closes and the wait fails.
//!
//! Nothing but paths and results may cross to that thread: a descriptor would mean another file there.

use crate::error::{Error, Result, errno};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, IntoRawFd};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

type Job = (PathBuf, Sender<Result<()>>);

/// The thread that waits. Dropping this ends it once it has nothing to do.
#[derive(Debug)]
pub struct WriteBack {
    jobs: Sender<Job>,
}

impl WriteBack {
    /// Starts the thread.
    pub fn start() -> Result<WriteBack> {
        let (jobs, queue) = channel();
        let (started, ready) = channel();
        let serve = move || {
            let own = own_descriptors();
            let serves = own.is_ok();
            // The starter waits below: it cannot have gone.
            let _ = started.send(own);
            if serves {
                serve(&queue);
            }
        };
        let spawned = thread::Builder::new().name("write-back".to_owned()).spawn(serve);
        spawned.map_err(|e| Error::io("start the write-back thread", e))?;
        ready.recv().unwrap_or_else(|_| Err(ended()))?;
        Ok(WriteBack { jobs })
    }

    /// Returns when everything that was dirty in the file's shared mappings has been written.
    pub fn write_back(&self, path: &Path) -> Result<()> {
        let (done, result) = channel();
        self.jobs.send((path.to_owned(), done)).map_err(|_| ended())?;
        result.recv().unwrap_or_else(|_| Err(ended()))
    }
}

fn ended() -> Error {
    Error::new(errno::EIO, "write back", "the thread has ended")
}

fn serve(queue: &Receiver<Job>) {
    for (path, done) in queue {
        // Who asked may have been ended meanwhile.
        let _ = done.send(sync_mappings(&path));
    }
}

/// Leaves the process' descriptor table for an empty one, with /dev/null as standard streams.
fn own_descriptors() -> Result<()> {
    // SAFETY: the thread has just started and owns no descriptor; CLOSE_RANGE_UNSHARE gives it a table of its own
    // first, so that descriptors of other threads stay open.
    let result = unsafe { libc::syscall(libc::SYS_close_range, 0u32, u32::MAX, libc::CLOSE_RANGE_UNSHARE) };
    if result != 0 {
        return Err(Error::io("leave the descriptor table", io::Error::last_os_error()));
    }
    for _ in 0..3 {
        let null = File::options().read(true).write(true).open("/dev/null");
        // Kept open for good: what libraries print must not end up in a file that is opened later.
        let _ = null.map_err(|e| Error::io("open", e).at_path("/dev/null"))?.into_raw_fd();
    }
    Ok(())
}

fn sync_mappings(path: &Path) -> Result<()> {
    let file = File::open(path).map_err(|e| Error::io("open", e).at_path(path))?;
    const ALL: u32 = libc::SYNC_FILE_RANGE_WAIT_BEFORE | libc::SYNC_FILE_RANGE_WRITE | libc::SYNC_FILE_RANGE_WAIT_AFTER;
    // SAFETY: plain call on a descriptor that `file` keeps open.
    let result = unsafe { libc::sync_file_range(file.as_raw_fd(), 0, 0, ALL) };
    if result == 0 { Ok(()) } else { Err(Error::io("write back", io::Error::last_os_error()).at_path(path)) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::io::Write;

    #[test]
    fn descriptors_of_the_process_stay_and_the_thread_has_none_of_them() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        // Not how many there are: other tests open and close theirs meanwhile.
        let own = format!("/proc/self/fd/{}", file.as_file().as_raw_fd());
        let write_back = WriteBack::start().unwrap();
        file.write_all(b"still open").unwrap();
        write_back.write_back(file.path()).unwrap();
        assert_eq!(fs::read_link(&own).unwrap(), file.path());
        let tasks = fs::read_dir("/proc/self/task").unwrap().map(|task| task.unwrap().path());
        let thread =
            tasks.into_iter().find(|task| fs::read(task.join("comm")).is_ok_and(|name| name == b"write-back\n"));
        let descriptors = fs::read_dir(thread.unwrap().join("fd")).unwrap();
        let targets: Vec<PathBuf> = descriptors.map(|fd| fs::read_link(fd.unwrap().path()).unwrap()).collect();
        assert_eq!(targets, vec![PathBuf::from("/dev/null"); 3]);
        assert_eq!(write_back.write_back(Path::new("/nowhere")).unwrap_err().errno(), errno::ENOENT);
    }
}
