//! What a daemon asks of the operating system besides files: processes, users, mounts.

use crate::error::{Error, Result, errno};
use std::ffi::{CString, OsString};
use std::fs::File;
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};

/// Exit code of the command that started a daemon which died without a word.
const DIED_CODE: u8 = 2;

/// The daemon's line to the command that started it, which waits for it.
#[derive(Debug)]
pub struct Ready {
    pipe: PipeWriter,
}

/// Goes on in the background: returns in a new process of a session of its own, without a terminal.
///
/// The process that called does not return. It exits with 0 on [`Ready::done`], with code and text on
/// [`Ready::failed`], and with 2 and a text if the daemon ends without either. Precondition: this process has one
/// thread (no other one survives a fork, nor do the locks it held). The working directory and the file mode mask stay
/// as they are.
pub fn daemonize() -> Result<Ready> {
    let failed = |e| Error::io("go into the background", e);
    let (reader, mut writer) = io::pipe().map_err(failed)?;
    // What lies in the buffer would be printed by both processes.
    io::stdout().flush().map_err(failed)?;
    let child = fork().map_err(failed)?;
    if child != 0 {
        drop(writer);
        wait_for_daemon(reader, child);
    }
    drop(reader);
    // SAFETY: no preconditions; it can only fail for the leader of a process group, which a new process is not.
    unsafe { libc::setsid() };
    // Only the leader of a session can get a terminal again: the daemon is a child of it.
    match fork() {
        Ok(0) => Ok(Ready { pipe: writer }),
        Ok(_) => exit_at_once(0),
        Err(e) => {
            let _ = writer.write_all(&message(DIED_CODE, &format!("fleecefs: {}", failed(e))));
            exit_at_once(i32::from(DIED_CODE))
        }
    }
}

impl Ready {
    /// Tells the waiting command that all is well; standard input, output and error are `/dev/null` from then on.
    /// An error means that nobody waits any more.
    pub fn done(mut self) -> Result<()> {
        let failed = |e| Error::io("report that the daemon is ready", e);
        let null = File::options().read(true).write(true).open("/dev/null").map_err(failed)?;
        io::stdout().flush().map_err(failed)?;
        for standard_fd in 0..=2 {
            // SAFETY: both descriptors are open, or dup2 says that they are not.
            if unsafe { libc::dup2(null.as_raw_fd(), standard_fd) } < 0 {
                return Err(failed(io::Error::last_os_error()));
            }
        }
        self.pipe.write_all(&message(0, "")).map_err(failed)
    }

    /// Ends the daemon; the waiting command prints `text` to standard error and exits with `code`.
    pub fn failed(mut self, code: i32, text: &str) -> ! {
        // Nobody is left to hear of a failure to say so.
        let _ = self.pipe.write_all(&message(u8::try_from(code).unwrap_or(DIED_CODE), text));
        drop(self);
        std::process::exit(code)
    }
}

/// What goes through the pipe: one byte of exit code, then text.
fn message(code: u8, text: &str) -> Vec<u8> {
    let mut bytes = vec![code];
    bytes.extend_from_slice(text.as_bytes());
    bytes
}

fn wait_for_daemon(mut reader: PipeReader, child: i32) -> ! {
    // SAFETY: waits for the child that was forked; a null status is allowed.
    unsafe { libc::waitpid(child, std::ptr::null_mut(), 0) };
    let mut bytes = Vec::new();
    let read = reader.read_to_end(&mut bytes);
    let (code, text) = match (read, bytes.split_first()) {
        (Ok(_), Some((code, text))) => (*code, String::from_utf8_lossy(text).into_owned()),
        _ => (DIED_CODE, "fleecefs: the daemon died before it was ready".to_owned()),
    };
    if !text.is_empty() {
        eprintln!("{text}");
    }
    std::process::exit(i32::from(code))
}

fn fork() -> io::Result<libc::pid_t> {
    // SAFETY: the caller has one thread (precondition of `daemonize`), so the child may do all that the parent may.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        pid => Ok(pid),
    }
}

/// Ends this process without running what is to run at the end of the original one.
fn exit_at_once(code: i32) -> ! {
    // SAFETY: no preconditions; does not return.
    unsafe { libc::_exit(code) }
}

/// Sets the file mode mask, and returns the old one.
pub fn set_umask(mask: u32) -> u32 {
    // SAFETY: no preconditions; cannot fail.
    unsafe { libc::umask(mask) }
}

/// Makes a write past the limit of file sizes (`ulimit -f`) an error, EFBIG, and not the end of this process.
pub fn ignore_file_size_signal() {
    // SAFETY: ignoring a signal installs no handler.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
}

/// Raises this process' limit of open files as far as it may, and returns it.
pub fn raise_open_file_limit() -> Result<u64> {
    let failed = || Error::io("raise the limit of open files", io::Error::last_os_error());
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is a valid rlimit to write to.
    if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) } != 0 {
        return Err(failed());
    }
    limit.rlim_cur = limit.rlim_max;
    // SAFETY: `limit` is a valid rlimit to read.
    if unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) } != 0 {
        return Err(failed());
    }
    Ok(limit.rlim_cur)
}

/// Whether a process of that id exists (a zombie does).
pub fn pid_alive(pid: u32) -> bool {
    let Ok(pid) = libc::pid_t::try_from(pid) else { return false };
    // SAFETY: signal 0 is not delivered; the kernel only looks for the process. Ids of 0 and below mean groups.
    pid > 0 && (unsafe { libc::kill(pid, 0) } == 0 || io::Error::last_os_error().raw_os_error() == Some(libc::EPERM))
}

/// The signal that nobody can catch.
pub const SIGKILL: i32 = libc::SIGKILL;

/// Whether this process ignores a signal (proc(5), `SigIgn`); false where that cannot be told.
pub fn ignores(signal: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| u64::from_str_radix(line.strip_prefix("SigIgn:")?.trim(), 16).ok());
    let bit = u32::try_from(signal - 1).ok().and_then(|shift| 1u64.checked_shl(shift));
    mask.zip(bit).is_some_and(|(mask, bit)| mask & bit != 0)
}

/// Sends a signal to a process. The caller knows that it was not reaped yet, so that the number is no other one's; one
/// that has ended is no error.
pub fn signal_process(pid: u32, signal: i32) -> Result<()> {
    send(i64::from(pid), signal)
}

/// Sends a signal to the process group that a process leads, under the same condition.
pub fn signal_group(leader: u32, signal: i32) -> Result<()> {
    send(-i64::from(leader), signal)
}

fn send(target: i64, signal: i32) -> Result<()> {
    let bad = || Error::new(errno::EINVAL, "send a signal", format!("no such process: {target}"));
    // 0 and -1 mean groups and everybody.
    let target = libc::pid_t::try_from(target).ok().filter(|target| ![0, -1].contains(target)).ok_or_else(bad)?;
    // SAFETY: no preconditions; the kernel checks both arguments.
    if unsafe { libc::kill(target, signal) } == 0 {
        return Ok(());
    }
    let e = io::Error::last_os_error();
    if e.raw_os_error() == Some(libc::ESRCH) { Ok(()) } else { Err(Error::io("send a signal", e)) }
}

/// The exit code that a shell gives: 128 + N where signal N ended the process.
pub fn exit_code(status: ExitStatus) -> u8 {
    let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
    u8::try_from(code).unwrap_or(u8::MAX)
}

/// Lets a process in the background of a terminal write to it, and not stop.
pub fn ignore_terminal_output_signal() {
    // SAFETY: ignoring a signal installs no handler.
    unsafe { libc::signal(libc::SIGTTOU, libc::SIG_IGN) };
}

/// The effective user and group of this process.
pub fn uid_gid() -> (u32, u32) {
    // SAFETY: no preconditions; cannot fail.
    unsafe { (libc::geteuid(), libc::getegid()) }
}

/// User and group ids of `USER` or `USER:GROUP`, names or numbers. Without a group it is the user's own.
pub fn lookup_owner(spec: &str) -> Result<(u32, u32)> {
    let (user, group) = spec.split_once(':').map_or((spec, None), |(user, group)| (user, Some(group)));
    let unknown = |kind: &str, name: &str| {
        Error::new(errno::EINVAL, format!("{kind} '{}'", name.escape_debug()), format!("no such {kind}"))
            .hint("give USER:GROUP, each a name or a number")
    };
    let number = user.parse::<u32>().ok();
    let entry = passwd_entry(user, number)?;
    let uid = number.or(entry.map(|(uid, _)| uid)).ok_or_else(|| unknown("user", user))?;
    let gid = match group {
        None => entry.map(|(_, gid)| gid).ok_or_else(|| unknown("user", user))?,
        Some(name) => match name.parse() {
            Ok(gid) => gid,
            Err(_) => group_id(name)?.ok_or_else(|| unknown("group", name))?,
        },
    };
    Ok((uid, gid))
}

/// Signature that `getpwnam_r` and its relatives share once the key is given.
type Lookup<'a, T> = &'a dyn Fn(*mut T, *mut libc::c_char, usize, *mut *mut T) -> libc::c_int;

/// Runs a `get…_r` call with a buffer that grows as it asks for, and takes what `pick` wants from the entry.
fn lookup<T, R>(call: Lookup<'_, T>, pick: impl Fn(&T) -> R) -> Result<Option<R>> {
    let mut buf: Vec<libc::c_char> = vec![0; 1024];
    loop {
        let mut entry = std::mem::MaybeUninit::<T>::uninit();
        let mut found: *mut T = std::ptr::null_mut();
        match call(entry.as_mut_ptr(), buf.as_mut_ptr(), buf.len(), &mut found) {
            // SAFETY: a non-null `found` points to `entry`, which the call has filled.
            0 => return Ok(unsafe { found.as_ref() }.map(&pick)),
            libc::ERANGE if buf.len() < 1 << 20 => buf.resize(buf.len() * 2, 0),
            libc::EINTR => (),
            libc::ENOENT | libc::ESRCH => return Ok(None),
            e => return Err(Error::io("look up the owner", io::Error::from_raw_os_error(e))),
        }
    }
}

fn passwd_entry(name: &str, number: Option<u32>) -> Result<Option<(u32, u32)>> {
    let Ok(name) = CString::new(name) else { return Ok(None) };
    let pick = |entry: &libc::passwd| (entry.pw_uid, entry.pw_gid);
    let Some(uid) = number else {
        return lookup(
            // SAFETY: `lookup` gives valid pointers and the buffer's length; `name` is NUL-terminated.
            &|entry, buf, len, found| unsafe { libc::getpwnam_r(name.as_ptr(), entry, buf, len, found) },
            pick,
        );
    };
    // SAFETY: `lookup` gives valid pointers and the buffer's length.
    lookup(&|entry, buf, len, found| unsafe { libc::getpwuid_r(uid, entry, buf, len, found) }, pick)
}

fn group_id(name: &str) -> Result<Option<u32>> {
    let Ok(name) = CString::new(name) else { return Ok(None) };
    lookup(
        // SAFETY: `lookup` gives valid pointers and the buffer's length; `name` is NUL-terminated.
        &|entry, buf, len, found| unsafe { libc::getgrnam_r(name.as_ptr(), entry, buf, len, found) },
        |entry: &libc::group| entry.gr_gid,
    )
}

/// User id of the process at the other end of a socket, as it was when it connected.
pub fn peer_uid(stream: &UnixStream) -> Result<u32> {
    let mut peer = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut len = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: `peer` is a valid ucred of `len` bytes to write to.
    let done = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            std::ptr::from_mut(&mut peer).cast(),
            &mut len,
        )
    };
    if done == 0 { Ok(peer.uid) } else { Err(Error::io("ask who connected", io::Error::last_os_error())) }
}

/// Whether an error says that a FUSE mount's daemon is gone: ENOTCONN, or ECONNABORTED for what it was asked last.
pub fn is_dead_mount(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::ENOTCONN | libc::ECONNABORTED))
}

/// What lies at a path, as far as mounts go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MountState {
    /// No file system is mounted there.
    NotAMount,
    /// One that answers.
    Mounted,
    /// A FUSE mount whose daemon is gone, see [`is_dead_mount`].
    Dead,
}

/// Whether something is mounted at `path`, and alive. Bind mounts of the same file system are not told apart from
/// plain directories.
pub fn mount_state(path: &Path) -> Result<MountState> {
    let failed = |e| Error::io("look at", e).at_path(path);
    let meta = match std::fs::metadata(path) {
        Ok(meta) => meta,
        Err(e) if is_dead_mount(&e) => return Ok(MountState::Dead),
        Err(e) => return Err(failed(e)),
    };
    if !meta.is_dir() {
        return Ok(MountState::NotAMount);
    }
    let above = std::fs::metadata(path.join("..")).map_err(failed)?;
    // The root directory is its own parent.
    let is_mount = meta.dev() != above.dev() || meta.ino() == above.ino();
    Ok(if is_mount { MountState::Mounted } else { MountState::NotAMount })
}

/// Unmounts what is mounted at `path`; with `lazy` it vanishes from the tree at once, and for good when its last user
/// has gone. EBUSY while it is in use, EINVAL where nothing is mounted.
pub fn unmount(path: &Path, lazy: bool) -> Result<()> {
    let failed = |e: io::Error| {
        let error = Error::io("unmount", e).at_path(path);
        if error.errno() == errno::EBUSY {
            error.hint("close what uses it (fuser -vm MNT), or use --lazy")
        } else {
            error
        }
    };
    let name =
        CString::new(path.as_os_str().as_bytes()).map_err(|_| failed(io::Error::from_raw_os_error(libc::EINVAL)))?;
    let flags = if lazy { libc::MNT_DETACH } else { 0 };
    // SAFETY: `name` is NUL-terminated.
    if unsafe { libc::umount2(name.as_ptr(), flags) } == 0 {
        return Ok(());
    }
    let e = io::Error::last_os_error();
    // Who is not root unmounts FUSE by its helper.
    if e.raw_os_error() == Some(libc::EPERM) { unmount_by_helper(path, lazy) } else { Err(failed(e)) }
}

fn unmount_by_helper(path: &Path, lazy: bool) -> Result<()> {
    let mut command = Command::new("fusermount3");
    command.arg(if lazy { "-uz" } else { "-u" }).arg("--").arg(path);
    let out = command.output().map_err(|e| Error::io("run fusermount3 to unmount", e).at_path(path))?;
    if out.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&out.stderr).trim().to_owned();
    let errno = if text.contains("busy") { errno::EBUSY } else { errno::EPERM };
    Err(Error::new(errno, "unmount", text).at_path(path))
}

/// Sets how far the kernel reads ahead on the mount at `path`, absolute and without links. Needs root.
///
/// The mount is not asked who it is: a process that serves it itself, and is killed while it waits for its own answer,
/// stays unkillable.
pub fn set_read_ahead(path: &Path, kib: u32) -> Result<()> {
    let table = std::fs::read("/proc/self/mountinfo").map_err(|e| Error::io("list the mounts", e))?;
    let device = device_of_mount(&table, path)
        .ok_or_else(|| Error::new(libc::ENOENT, "list the mounts", "it is not there").at_path(path))?;
    let setting = format!("/sys/class/bdi/{device}/read_ahead_kb");
    let written = File::options().write(true).open(&setting).and_then(|mut file| write!(file, "{kib}"));
    written.map_err(|e| Error::io("set the read-ahead", e).at_path(setting))
}

/// All places where the file system that is mounted at `path`, absolute and without links, can be reached (bind mounts
/// of it or of parts of it); none where nothing is mounted there. No mount is asked anything.
pub fn mount_points(path: &Path) -> Result<Vec<PathBuf>> {
    let table = std::fs::read("/proc/self/mountinfo").map_err(|e| Error::io("list the mounts", e))?;
    Ok(places_of_mount(&table, path))
}

/// `MAJOR:MINOR` of the topmost mount at `path`, from the table of proc(5).
fn device_of_mount(table: &[u8], path: &Path) -> Option<String> {
    let found = mounts(table).filter(|(_, place)| place == path).last();
    found.map(|(device, _)| String::from_utf8_lossy(device).into_owned())
}

fn places_of_mount(table: &[u8], path: &Path) -> Vec<PathBuf> {
    let Some((device, _)) = mounts(table).filter(|(_, place)| place == path).last() else { return Vec::new() };
    mounts(table).filter(|(other, _)| *other == device).map(|(_, place)| place).collect()
}

/// The mounts of the table in its order, oldest first: the device (third field), and the place (fifth field, where
/// blanks and backslashes are three octal digits behind a backslash).
fn mounts(table: &[u8]) -> impl Iterator<Item = (&[u8], PathBuf)> {
    table.split(|byte| *byte == b'\n').filter_map(|line| {
        let mut fields = line.split(|byte| *byte == b' ').skip(2);
        let (device, place) = (fields.next()?, fields.nth(1)?);
        Some((device, PathBuf::from(OsString::from_vec(unescaped(place)))))
    })
}

fn unescaped(field: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, behind)) = rest.split_first() {
        let digits = behind.get(..3).filter(|_| *first == b'\\').and_then(|digits| std::str::from_utf8(digits).ok());
        let (byte, skip) = match digits.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => (byte, 4),
            None => (*first, 1),
        };
        plain.push(byte);
        rest = rest.get(skip..).unwrap_or_default();
    }
    plain
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests {
    use super::*;
    use std::process::Output;

    #[test]
    fn the_topmost_mount_of_a_path_tells_its_device_and_its_other_places() {
        let table = b"22 1 254:0 / / rw - ext4 /dev/vda rw\n30 22 0:40 / /m/a\\040b rw shared:1 - fuse x rw\n\
                      31 30 0:41 / /m/a\\040b rw - fuse.fleecefs fleecefs rw\n\
                      32 22 0:41 /live /bind\\1341 rw - fuse.fleecefs fleecefs rw\n";
        let device = |path: &str| device_of_mount(table, Path::new(path));
        assert_eq!(device("/m/a b").as_deref(), Some("0:41"));
        assert_eq!(device("/").as_deref(), Some("254:0"));
        assert_eq!(device("/m"), None);
        assert_eq!(places_of_mount(table, Path::new("/m/a b")), [Path::new("/m/a b"), Path::new("/bind\\1")]);
        assert_eq!(places_of_mount(table, Path::new("/m")), <[&Path; 0]>::default());
    }

    /// Names what the test binary does as a daemon, when it runs itself.
    const ROLE: &str = "FLEECEFS_TEST_DAEMON_ROLE";
    const DIR: &str = "FLEECEFS_TEST_DAEMON_DIR";

    /// Not a test of its own: the daemon of those below, in a process of its own.
    #[test]
    fn daemon() {
        let (Ok(role), Ok(dir)) = (std::env::var(ROLE), std::env::var(DIR)) else { return };
        let dir = Path::new(&dir);
        let ready = daemonize().unwrap();
        std::fs::write(dir.join("before"), "").unwrap();
        match role.as_str() {
            "fails" => ready.failed(3, "fleecefs: image 'x': no such file"),
            "dies" => exit_at_once(0),
            _ => ready.done().unwrap(),
        }
        // SAFETY: no preconditions.
        let session = unsafe { libc::getsid(0) };
        let output = std::fs::read_link("/proc/self/fd/1").unwrap();
        std::fs::write(dir.join("unfinished"), format!("{session} {} {}", std::process::id(), output.display()))
            .unwrap();
        std::fs::rename(dir.join("unfinished"), dir.join("after")).unwrap();
        exit_at_once(0);
    }

    fn start_daemon(role: &str, dir: &Path) -> Output {
        Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "storage::process::tests::daemon", "--nocapture", "--test-threads=1"])
            .env(ROLE, role)
            .env(DIR, dir)
            .output()
            .unwrap()
    }

    #[test]
    fn the_command_ends_when_its_daemon_is_ready() {
        let dir = tempfile::tempdir().unwrap();
        let out = start_daemon("works", dir.path());
        assert!(out.status.success(), "{out:?}");
        assert!(dir.path().join("before").exists());
        while !dir.path().join("after").exists() {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        let text = std::fs::read_to_string(dir.path().join("after")).unwrap();
        let words: Vec<&str> = text.split(' ').collect();
        // SAFETY: no preconditions.
        let our_session = unsafe { libc::getsid(0) }.to_string();
        assert_ne!(words[0], our_session, "a session of its own");
        assert_ne!(words[0], words[1], "not its leader");
        assert_eq!(words[2], "/dev/null");
    }

    #[test]
    fn the_command_says_what_its_daemon_died_of() {
        let dir = tempfile::tempdir().unwrap();
        let out = start_daemon("fails", dir.path());
        assert_eq!(out.status.code(), Some(3));
        assert!(String::from_utf8_lossy(&out.stderr).contains("fleecefs: image 'x': no such file"));
        let out = start_daemon("dies", dir.path());
        assert_eq!(out.status.code(), Some(2));
        assert!(String::from_utf8_lossy(&out.stderr).contains("died before it was ready"));
    }

    #[test]
    fn owners_are_names_or_numbers() {
        assert_eq!(lookup_owner("root").unwrap(), (0, 0));
        assert_eq!(lookup_owner("0").unwrap(), (0, 0));
        assert_eq!(lookup_owner("root:root").unwrap(), (0, 0));
        assert_eq!(lookup_owner("root:1234").unwrap(), (0, 1234));
        assert_eq!(lookup_owner("4000000000:5").unwrap(), (4_000_000_000, 5));
        for bad in ["", "nobody-of-this-name", "root:", "root:no-such-group", "4000000000", ":0", "-1", "a\0b"] {
            assert_eq!(lookup_owner(bad).unwrap_err().errno(), errno::EINVAL, "{bad:?}");
        }
    }

    #[test]
    fn mounts_are_told_from_directories() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(mount_state(dir.path()).unwrap(), MountState::NotAMount);
        assert_eq!(mount_state(Path::new("/proc")).unwrap(), MountState::Mounted);
        assert_eq!(mount_state(Path::new("/")).unwrap(), MountState::Mounted);
        assert_eq!(mount_state(Path::new("/proc/self/status")).unwrap(), MountState::NotAMount);
        assert_eq!(mount_state(&dir.path().join("none")).unwrap_err().errno(), errno::ENOENT);
        let e = unmount(dir.path(), false).unwrap_err();
        assert!([errno::EINVAL, errno::EPERM].contains(&e.errno()), "{e}");
    }

    #[test]
    fn a_tmpfs_is_unmounted_and_busy_while_it_is_used() {
        let dir = tempfile::tempdir().unwrap();
        let mounted = Command::new("mount").args(["-t", "tmpfs", "none"]).arg(dir.path()).output();
        if !mounted.is_ok_and(|out| out.status.success()) {
            eprintln!("skip: cannot mount");
            return;
        }
        assert_eq!(mount_state(dir.path()).unwrap(), MountState::Mounted);
        let user = File::create(dir.path().join("f")).unwrap();
        let e = unmount(dir.path(), false).unwrap_err();
        assert_eq!(e.errno(), errno::EBUSY);
        assert!(e.hint_text().unwrap().contains("--lazy"));
        unmount(dir.path(), true).unwrap();
        assert_eq!(mount_state(dir.path()).unwrap(), MountState::NotAMount);
        drop(user);
    }

    #[test]
    fn signals_reach_processes_and_nobody_else() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        signal_process(child.id(), libc::SIGTERM).unwrap();
        let status = child.wait().unwrap();
        assert_eq!(exit_code(status), 143);
        assert_eq!(exit_code(Command::new("false").status().unwrap()), 1);
        for everybody in [0, 1] {
            assert_eq!(signal_group(everybody, 0).unwrap_err().errno(), errno::EINVAL);
        }
        assert_eq!(signal_process(u32::MAX, 0).unwrap_err().errno(), errno::EINVAL);
    }

    #[test]
    fn peers_processes_and_limits_are_known() {
        let (a, _b) = UnixStream::pair().unwrap();
        assert_eq!(peer_uid(&a).unwrap(), uid_gid().0);
        assert!(pid_alive(std::process::id()) && pid_alive(1));
        assert!(!pid_alive(0) && !pid_alive(u32::MAX));
        let mut child = Command::new("true").spawn().unwrap();
        child.wait().unwrap();
        assert!(!pid_alive(child.id()));
        assert!(raise_open_file_limit().unwrap() > 0);
    }
}
