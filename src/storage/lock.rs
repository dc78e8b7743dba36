//! Locks on files that other programs respect.
//!
//! Images are locked in QEMU's way (`block/file-posix.c`): open-file-description locks on single bytes of the image
//! itself, all of them shared. Byte 100 + P says 'I use permission P', byte 200 + P says 'I let nobody else use P'.
//! Whoever takes permissions first locks its bytes and only then looks for a conflicting lock of somebody else, so of
//! two that start at the same time at most one goes on. The locks end with the open file description, so no crash
//! leaves one behind; nothing is ever written.

use super::OsFile;
use crate::error::{Error, Result, errno};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// QEMU's RAW_LOCK_PERM_BASE.
const USED_BASE: i64 = 100;
/// QEMU's RAW_LOCK_SHARED_BASE.
const UNSHARED_BASE: i64 = 200;

/// QEMU's permissions by the number of their bit (BLK_PERM_*; write-unchanged, 2, is never taken here).
const CONSISTENT_READ: i64 = 0;
const WRITE: i64 = 1;
const RESIZE: i64 = 3;

/// What nobody else may do while we read or write: the size and the content are ours to know.
const UNSHARED: [i64; 2] = [WRITE, RESIZE];

/// What an image is opened for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Reading and writing, with nobody else who writes.
    Write,
    /// Reading a content that nobody changes.
    Read,
    /// Reading whatever others do meanwhile (QEMU's `force-share`).
    ReadShared,
}

impl Access {
    /// Permissions that are used.
    fn used(self) -> &'static [i64] {
        if self == Access::Write { &[CONSISTENT_READ, WRITE, RESIZE] } else { &[CONSISTENT_READ] }
    }

    /// Permissions that nobody else may use.
    fn unshared(self) -> &'static [i64] {
        if self == Access::ReadShared { &[] } else { &UNSHARED }
    }
}

/// The lock on an image, held as long as this lives.
#[derive(Debug)]
pub struct ImageLock {
    /// A duplicate of the image's descriptor: locks belong to the open file description that both share.
    fd: OwnedFd,
}

impl ImageLock {
    /// Locks an open image. EBUSY where another program, or another open of this one, uses it in a way that does not go
    /// with that.
    pub fn take(file: &OsFile, access: Access) -> Result<ImageLock> {
        let path = super::Storage::path(file);
        let failed = |e| lock_failed(e, path);
        let fd = file.fd().try_clone_to_owned().map_err(failed)?;
        // From here on `drop` releases what was taken.
        let lock = ImageLock { fd };
        let used = access.used().iter().map(|p| USED_BASE + p);
        for byte in used.chain(access.unshared().iter().map(|p| UNSHARED_BASE + p)) {
            set_lock(&lock.fd, libc::F_RDLCK, byte, 1).map_err(failed)?;
        }
        for permission in access.unshared() {
            if is_locked(&lock.fd, USED_BASE + permission).map_err(failed)? {
                return Err(in_use(path, "writes to it"));
            }
        }
        for permission in access.used() {
            if is_locked(&lock.fd, UNSHARED_BASE + permission).map_err(failed)? {
                let writes = access == Access::Write;
                return Err(in_use(path, if writes { "lets nobody write to it" } else { "lets nobody read it" }));
            }
        }
        Ok(lock)
    }
}

impl Drop for ImageLock {
    fn drop(&mut self) {
        // The image's own descriptor may live on, and the locks with it. Unlocking does not fail on a valid descriptor.
        for base in [USED_BASE, UNSHARED_BASE] {
            let _ = set_lock(&self.fd, libc::F_UNLCK, base, RESIZE + 1);
        }
    }
}

/// A file that exists to be locked, held as long as this lives.
#[derive(Debug)]
pub struct FileLock {
    _file: File,
}

/// Locks the file at `path` for this process alone, and makes it, empty, where it is absent. EBUSY where somebody else
/// has it. Nothing is written to it.
pub fn lock_file(path: &Path) -> Result<FileLock> {
    let file = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .map_err(|e| Error::io("open", e).at_path(path))?;
    set_lock(&file, libc::F_WRLCK, 0, 0).map_err(|e| lock_failed(e, path))?;
    Ok(FileLock { _file: file })
}

fn in_use(path: &Path, how: &str) -> Error {
    Error::new(errno::EBUSY, "lock", format!("in use: QEMU or another fleecefs disk {how}"))
        .at_path(path)
        .hint(format!("see who has it open: fuser -v {}", path.display()))
}

fn lock_failed(e: io::Error, path: &Path) -> Error {
    match e.raw_os_error() {
        Some(libc::EAGAIN | libc::EACCES) => in_use(path, "holds its lock"),
        Some(libc::ENOLCK | libc::EOPNOTSUPP | libc::ENOSYS) => {
            Error::io("lock", e).at_path(path).hint("its file system offers no locks: is NFS mounted with nolock?")
        }
        _ => Error::io("lock", e).at_path(path),
    }
}

fn byte_range(kind: i32, start: i64, len: i64) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: start,
        l_len: len,
        l_pid: 0,
    }
}

fn set_lock(fd: &impl AsRawFd, kind: i32, start: i64, len: i64) -> io::Result<()> {
    let range = byte_range(kind, start, len);
    loop {
        // SAFETY: F_OFD_SETLK reads the flock given; it does not wait.
        if unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_OFD_SETLK, &range) } == 0 {
            return Ok(());
        }
        let e = io::Error::last_os_error();
        if e.kind() != io::ErrorKind::Interrupted {
            return Err(e);
        }
    }
}

/// Whether anybody but this open file description holds a lock, even a shared one, on a byte.
fn is_locked(fd: &impl AsRawFd, byte: i64) -> io::Result<bool> {
    let mut range = byte_range(libc::F_WRLCK, byte, 1);
    // SAFETY: F_OFD_GETLK reads and writes the flock given.
    if unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_OFD_GETLK, &mut range) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(i32::from(range.l_type) != libc::F_UNLCK)
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests {
    use super::super::os::OpenOptions;
    use super::*;
    use std::io::{BufRead, BufReader, Write};
    use std::process::{Child, Command, Stdio};

    fn image() -> (tempfile::TempDir, std::path::PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vda.raw");
        std::fs::write(&path, vec![1; 1 << 20]).unwrap();
        (dir, path)
    }

    fn open(path: &Path, write: bool) -> OsFile {
        OsFile::open(path, &OpenOptions { write, ..Default::default() }).unwrap()
    }

    #[test]
    fn one_writer_or_many_readers() {
        let (_dir, path) = image();
        let (a, b) = (open(&path, true), open(&path, true));
        let (r1, r2) = (open(&path, false), open(&path, false));
        let writer = ImageLock::take(&a, Access::Write).unwrap();
        assert_eq!(ImageLock::take(&b, Access::Write).unwrap_err().errno(), errno::EBUSY);
        assert_eq!(ImageLock::take(&r1, Access::Read).unwrap_err().errno(), errno::EBUSY);
        drop(writer);
        let reader = ImageLock::take(&r1, Access::Read).unwrap();
        let other = ImageLock::take(&r2, Access::Read).unwrap();
        assert_eq!(ImageLock::take(&b, Access::Write).unwrap_err().errno(), errno::EBUSY);
        drop((reader, other));
        ImageLock::take(&b, Access::Write).unwrap();
    }

    #[test]
    fn who_shares_all_keeps_no_writer_away_and_is_kept_away_by_who_lets_nobody_read() {
        let (_dir, path) = image();
        let (a, b, c) = (open(&path, true), open(&path, false), open(&path, false));
        let writer = ImageLock::take(&a, Access::Write).unwrap();
        let reader = ImageLock::take(&b, Access::ReadShared).unwrap();
        drop(writer);
        ImageLock::take(&a, Access::Write).unwrap();
        drop(reader);
        set_lock(&a.fd().try_clone_to_owned().unwrap(), libc::F_RDLCK, UNSHARED_BASE + CONSISTENT_READ, 1).unwrap();
        let e = ImageLock::take(&c, Access::ReadShared).unwrap_err();
        assert!(e.to_string().contains("lets nobody read it"), "{e}");
    }

    #[test]
    fn a_refused_lock_leaves_nothing_locked() {
        let (_dir, path) = image();
        let (a, b, c) = (open(&path, true), open(&path, true), open(&path, true));
        let reader = ImageLock::take(&a, Access::Read).unwrap();
        ImageLock::take(&b, Access::Write).unwrap_err();
        drop(reader);
        ImageLock::take(&c, Access::Write).unwrap();
    }

    #[test]
    fn a_lock_file_is_exclusive_and_stays_empty() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let lock = lock_file(&path).unwrap();
        assert_eq!(lock_file(&path).unwrap_err().errno(), errno::EBUSY);
        drop(lock);
        std::fs::write(&path, "text of somebody").unwrap();
        lock_file(&path).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"text of somebody");
    }

    /// Whether qemu-io is there; says so where it is not.
    fn has_qemu_io() -> bool {
        let found = Command::new("qemu-io").arg("--version").output().is_ok_and(|out| out.status.success());
        if !found {
            eprintln!("skip: no qemu-io");
        }
        found
    }

    fn qemu_io(path: &Path, options: &[&str]) -> Command {
        let mut command = Command::new("qemu-io");
        command.args(["-f", "raw"]).args(options).arg(path);
        command
    }

    /// qemu-io with the image open, until its input is closed.
    fn qemu_that_holds(path: &Path, options: &[&str]) -> Child {
        let mut child =
            qemu_io(path, options).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        // Its answer to a command proves that the image is open.
        child.stdin.as_mut().unwrap().write_all(b"length\n").unwrap();
        let mut line = String::new();
        let mut output = BufReader::new(child.stdout.as_mut().unwrap());
        while !line.contains("1 MiB") {
            line.clear();
            assert_ne!(output.read_line(&mut line).unwrap(), 0, "qemu-io ended");
        }
        child
    }

    fn end(mut child: Child) {
        drop(child.stdin.take());
        child.wait().unwrap();
    }

    #[test]
    fn qemu_cannot_write_while_we_hold_an_image() {
        if !has_qemu_io() {
            return;
        }
        let (_dir, path) = image();
        let write = || qemu_io(&path, &["-c", "write -P 9 0 512"]).output().unwrap();
        for access in [Access::Write, Access::Read] {
            let file = open(&path, access == Access::Write);
            let lock = ImageLock::take(&file, access).unwrap();
            let out = write();
            let text = String::from_utf8_lossy(&out.stderr).into_owned();
            assert!(text.contains("lock"), "{text}");
            assert_eq!(std::fs::read(&path).unwrap()[0], 1);
            let out = qemu_io(&path, &["-r", "-c", "read -P 1 0 512"]).output().unwrap();
            let read = String::from_utf8_lossy(&out.stdout).into_owned();
            assert!(read.contains("read 512/512"), "QEMU may read what it shares: {read}");
            drop(lock);
        }
        assert!(write().status.success());
        assert_eq!(std::fs::read(&path).unwrap()[0], 9);
    }

    #[test]
    fn we_refuse_an_image_that_qemu_writes_to() {
        if !has_qemu_io() {
            return;
        }
        let (_dir, path) = image();
        let qemu = qemu_that_holds(&path, &[]);
        for access in [Access::Write, Access::Read] {
            let e = ImageLock::take(&open(&path, access == Access::Write), access).unwrap_err();
            assert_eq!(e.errno(), errno::EBUSY);
            assert!(e.to_string().contains("QEMU"), "{e}");
            assert!(e.hint_text().unwrap().contains(path.to_str().unwrap()));
        }
        ImageLock::take(&open(&path, false), Access::ReadShared).unwrap();
        end(qemu);
        let qemu = qemu_that_holds(&path, &["-r"]);
        ImageLock::take(&open(&path, false), Access::Read).unwrap();
        end(qemu);
        ImageLock::take(&open(&path, true), Access::Write).unwrap();
    }
}
