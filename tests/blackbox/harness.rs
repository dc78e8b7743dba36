//! What the tests share: a scratch directory with images, a mount that always goes away, and the tools.
//!
//! Nothing waits without a limit: every command runs under `timeout`, so that a hang is a failure that names itself.

use serde_json::Value;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

/// Granularity of a checkpoint's bitmap on a raw image, in bytes.
pub const GRANULE: u64 = 65536;
/// Errno values that promises speak of.
pub mod errno {
    pub const EPERM: i32 = 1;
    pub const ENOENT: i32 = 2;
    pub const EIO: i32 = 5;
    pub const EBUSY: i32 = 16;
    pub const EEXIST: i32 = 17;
    pub const EINVAL: i32 = 22;
    pub const ENOSPC: i32 = 28;
    pub const EROFS: i32 = 30;
    pub const ENAMETOOLONG: i32 = 36;
}
/// Longest time that any one command may take, in seconds.
const COMMAND_LIMIT_S: &str = "120";
/// Longest time that one mount may live.
const MOUNT_LIMIT_S: u64 = 300;
const FULL_MOUNT_LIMIT_S: u64 = 1800;

/// Ends the test, with one line, where something that it needs is absent: a tool by name, a file by path, or `root`.
macro_rules! requires {
    ($($need:expr),* $(,)?) => {
        if !$crate::harness::requires(module_path!(), line!(), &[$($need),*]) {
            return;
        }
    };
}

pub fn requires(module: &str, line: u32, needs: &[&str]) -> bool {
    let missing: Vec<_> = ["/dev/fuse"].iter().chain(needs).filter(|need| !present(need)).copied().collect();
    if missing.is_empty() {
        return true;
    }
    let text = format!("{module}:{line}: without {}", missing.join(", "));
    assert!(std::env::var_os("FLEECEFS_REQUIRE_TOOLS").is_none(), "{text}");
    say(&format!("skip {text}"));
    false
}

fn present(need: &str) -> bool {
    match need {
        "root" => is_root(),
        path if path.starts_with('/') => Path::new(path).exists(),
        tool => std::env::var("PATH")
            .unwrap_or_default()
            .split(':')
            .chain(["/sbin", "/usr/sbin"])
            .any(|dir| Path::new(dir).join(tool).is_file()),
    }
}

/// Python with `package` (the virtual environment that `contrib/venv` makes, or FLEECEFS_PYTHON); else one skip line, or
/// a failure where nothing may be skipped.
pub fn python_with(test: &str, package: &str) -> Option<PathBuf> {
    let python = std::env::var_os("FLEECEFS_PYTHON").map_or_else(|| venv().join("bin/python"), PathBuf::from);
    if tool(&python).args(["-c", &format!("import {package}")]).output().is_ok_and(|out| out.status.success()) {
        return Some(python);
    }
    let text = format!("{test}: without Python's package {package} (contrib/venv makes a virtual environment with it)");
    assert!(std::env::var_os("FLEECEFS_REQUIRE_TOOLS").is_none(), "{text}");
    say(&format!("skip {text}"));
    None
}

/// The virtual environment that `contrib/venv` makes.
pub fn venv() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("target/venv")
}

pub fn is_root() -> bool {
    fs::metadata("/proc/self").is_ok_and(|m| m.uid() == 0)
}

/// One line past the capture of the test harness.
pub fn say(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// The full sizes are asked for.
pub fn full() -> bool {
    std::env::var_os("FLEECEFS_FULL").is_some()
}

/// `short` in CI, `long` in the full check.
pub fn sized<T>(short: T, long: T) -> T {
    if full() { long } else { short }
}

/// A command under a time limit.
pub fn tool(name: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = Command::new("timeout");
    command.args(["-k", "5", COMMAND_LIMIT_S]).arg(name);
    let path = std::env::var("PATH").unwrap_or_default();
    command.env("PATH", format!("{path}:/usr/sbin:/sbin")).env("LC_ALL", "C").stdin(std::process::Stdio::null());
    command
}

pub fn stderr(out: &Output) -> String {
    String::from_utf8_lossy(&out.stderr).into_owned()
}

pub fn stdout(out: &Output) -> String {
    String::from_utf8_lossy(&out.stdout).into_owned()
}

/// Runs a command that must succeed and gives what it printed.
#[track_caller]
pub fn ok(command: &mut Command) -> String {
    let out = command.output().unwrap();
    assert!(out.status.success(), "{command:?}: {}\n{}{}", out.status, stdout(&out), stderr(&out));
    stdout(&out)
}

/// Runs the program.
pub fn fleecefs<I: IntoIterator<Item = S>, S: AsRef<std::ffi::OsStr>>(args: I) -> Output {
    tool(env!("CARGO_BIN_EXE_fleecefs")).args(args).output().unwrap()
}

/// Arguments of mixed string and path types.
macro_rules! args {
    ($($arg:expr),* $(,)?) => { Vec::<std::ffi::OsString>::from([$(std::ffi::OsString::from($arg)),*]) };
}

/// The program must refuse: its exit code, `fleecefs: WHAT: WHY` on standard error, and each of `words` in it.
#[track_caller]
pub fn refused(out: &Output, code: i32, words: &[&str]) {
    let text = stderr(out);
    assert_eq!(out.status.code(), Some(code), "{text}");
    assert!(text.starts_with("fleecefs: "), "{text}");
    for word in words {
        assert!(text.to_lowercase().contains(&word.to_lowercase()), "'{word}' is not in: {text}");
    }
}

/// An operation must fail with one of these errnos.
#[track_caller]
pub fn fails<T>(result: std::io::Result<T>, errnos: &[i32]) {
    let e = result.err().expect("it succeeded");
    assert!(e.raw_os_error().is_some_and(|n| errnos.contains(&n)), "{e:?}, expected one of {errnos:?}");
}

/// Polls until `done`, for a condition that another process brings about.
#[track_caller]
pub fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let limit = Instant::now() + Duration::from_secs(60);
    while !done() {
        assert!(Instant::now() < limit, "{what} did not happen");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A scratch directory.
pub struct Rig {
    dir: tempfile::TempDir,
}

impl Rig {
    pub fn new() -> Rig {
        Rig { dir: tempfile::Builder::new().prefix("fleecefs-test-").tempdir().unwrap() }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A sparse raw image of `mib` MiB: every other 64 KiB holds data.
    pub fn image(&self, name: &str, mib: u64) -> PathBuf {
        self.image_of(name, mib << 20)
    }

    pub fn image_of(&self, name: &str, size: u64) -> PathBuf {
        let path = self.path(&format!("{name}.raw"));
        let file = File::create_new(&path).unwrap();
        file.set_len(size).unwrap();
        for start in (0..size).step_by(2 * GRANULE as usize) {
            let length = GRANULE.min(size - start) as usize;
            file.write_all_at(&pattern(start ^ size, length), start).unwrap();
        }
        path
    }

    /// A mount point that exists and is empty.
    pub fn mount_point(&self, name: &str) -> PathBuf {
        let dir = self.path(name);
        fs::create_dir_all(&dir).unwrap();
        dir
    }

    /// Mounts at `mnt` with options and images in `args`.
    #[track_caller]
    pub fn mount<S: Into<std::ffi::OsString>>(&self, args: impl IntoIterator<Item = S>) -> Mount {
        Mount::at(self.mount_point("mnt"), args)
    }
}

/// Bytes that no other seed gives and that are never zero.
pub fn pattern(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = vec![0; length];
    for chunk in bytes.chunks_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        for (byte, value) in chunk.iter_mut().zip((state | 0x0101_0101_0101_0101).to_le_bytes()) {
            *byte = value;
        }
    }
    bytes
}

/// A mounted daemon. It goes with this value, whatever the test did.
pub struct Mount {
    pub dir: PathBuf,
    pub pid: u32,
    connection: Option<u64>,
    watchdog: Option<Sender<()>>,
}

/// Ends a mount that is still there after [`MOUNT_LIMIT_S`]: callers that the kernel does not let go of otherwise then
/// fail, and the test with them.
fn watchdog(pid: u32, connection: Option<u64>) -> Sender<()> {
    let (sender, receiver) = std::sync::mpsc::channel::<()>();
    std::thread::spawn(move || {
        if receiver.recv_timeout(Duration::from_secs(sized(MOUNT_LIMIT_S, FULL_MOUNT_LIMIT_S)))
            == Err(RecvTimeoutError::Timeout)
        {
            say(&format!("daemon {pid} is killed: its test hangs"));
            let _ = tool("kill").args(["-9", &pid.to_string()]).output();
            connection.into_iter().for_each(abort);
        }
    });
    sender
}

/// The number of the FUSE connection behind a mount, found without touching the mount.
fn connection_of(dir: &Path) -> Option<u64> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
    let fields = |line: &str| line.split(' ').map(str::to_owned).collect::<Vec<_>>();
    let mount = mounts.lines().map(fields).find(|f| f.get(4).is_some_and(|at| Path::new(at) == dir))?;
    mount.get(2)?.split_once(':')?.1.parse().ok()
}

/// Ends a FUSE connection. A kill does not, while a thread of the daemon waits in the kernel for its own mount.
fn abort(connection: u64) {
    let Ok(control) = tempfile::tempdir() else { return };
    if tool("mount").args(["-t", "fusectl", "none"]).arg(control.path()).output().is_ok_and(|o| o.status.success()) {
        let _ = fs::write(control.path().join(connection.to_string()).join("abort"), "1");
        let _ = tool("umount").arg(control.path()).output();
    }
}

impl Mount {
    /// Takes charge of a daemon that was started by other means.
    pub fn of(dir: PathBuf, pid: u32) -> Mount {
        let connection = connection_of(&dir);
        Mount { dir, pid, connection, watchdog: Some(watchdog(pid, connection)) }
    }

    #[track_caller]
    pub fn at<S: Into<std::ffi::OsString>>(dir: PathBuf, args: impl IntoIterator<Item = S>) -> Mount {
        let mut all = args!["mount"];
        all.extend(args.into_iter().map(Into::into));
        all.push(dir.clone().into());
        let out = fleecefs(&all);
        if !out.status.success() {
            detach(&dir);
        }
        assert!(out.status.success(), "{all:?}: {}\n{}", out.status, stderr(&out));
        let mut mount = Mount { connection: connection_of(&dir), dir, pid: 0, watchdog: None };
        mount.pid = mount.status()["pid"].as_u64().expect("status.json has no pid") as u32;
        mount.watchdog = Some(watchdog(mount.pid, mount.connection));
        mount
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    pub fn live(&self, disk: &str) -> PathBuf {
        self.path(&format!("live/{disk}.raw"))
    }

    pub fn view(&self, snapshot: &str, disk: &str) -> PathBuf {
        self.path(&format!("snapshots/{snapshot}/{disk}.raw"))
    }

    /// The guest's open live file.
    #[track_caller]
    pub fn guest(&self, disk: &str) -> File {
        let path = self.live(disk);
        OpenOptions::new().read(true).write(true).open(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
    }

    pub fn snapshot_dir(&self, name: &str) -> PathBuf {
        self.path("snapshots").join(name)
    }

    /// Takes a snapshot as a user of the file system does.
    #[track_caller]
    pub fn snap(&self, name: &str) {
        fs::create_dir(self.snapshot_dir(name)).unwrap_or_else(|e| panic!("mkdir snapshots/{name}: {e}"));
    }

    /// Completes one.
    #[track_caller]
    pub fn drop_snap(&self, name: &str) {
        fs::remove_dir(self.snapshot_dir(name)).unwrap_or_else(|e| panic!("rmdir snapshots/{name}: {e}"));
    }

    #[track_caller]
    pub fn json(&self, name: &str) -> Value {
        let text = fs::read_to_string(self.path(name)).unwrap_or_else(|e| panic!("{name}: {e}"));
        serde_json::from_str(&text).unwrap_or_else(|e| panic!("{name}: {e} in {text}"))
    }

    #[track_caller]
    pub fn status(&self) -> Value {
        self.json("status.json")
    }

    /// The entry of `disk` in the manifest.
    #[track_caller]
    pub fn manifest(&self, snapshot: &str, disk: &str) -> Value {
        let manifest = self.json(&format!("snapshots/{snapshot}/manifest.json"));
        let disks = manifest["disks"].as_array().expect("manifest without disks");
        disks.iter().find(|d| d["name"] == disk).unwrap_or_else(|| panic!("{disk} is not in {manifest}")).clone()
    }

    /// The map since the reference point.
    #[track_caller]
    pub fn map(&self, snapshot: &str, disk: &str) -> Map {
        Map::parse(&self.json(&format!("snapshots/{snapshot}/{disk}.map")))
    }

    #[track_caller]
    pub fn map_since(&self, snapshot: &str, disk: &str, point: &str) -> Map {
        Map::parse(&self.json(&format!("snapshots/{snapshot}/{disk}/since/{point}/map.json")))
    }

    /// Runs `fleecefs COMMAND... MNT ARGS...`.
    pub fn run<S: Into<std::ffi::OsString>>(&self, command: &str, args: impl IntoIterator<Item = S>) -> Output {
        let mut all: Vec<std::ffi::OsString> = command.split(' ').map(Into::into).collect();
        all.push(self.dir.clone().into());
        all.extend(args.into_iter().map(Into::into));
        fleecefs(all)
    }

    /// The same for a command that must succeed with exit code 0.
    #[track_caller]
    pub fn done<S: Into<std::ffi::OsString>>(&self, command: &str, args: impl IntoIterator<Item = S>) -> String {
        let out = self.run(command, args);
        assert_eq!(out.status.code(), Some(0), "{command}: {}{}", stdout(&out), stderr(&out));
        stdout(&out)
    }

    /// Ends the daemon cleanly. A child that another test has just forked has our open files until it runs its program,
    /// so a mount that is in use is tried again.
    #[track_caller]
    pub fn umount(self) {
        let umount = || fleecefs(args!["umount", &self.dir]);
        let mut out = umount();
        for _ in 0..20 {
            let words = ["files in it are open", "a client of NBD has"];
            if out.status.success() || !words.iter().any(|word| stderr(&out).contains(word)) {
                break;
            }
            std::thread::sleep(Duration::from_millis(50));
            out = umount();
        }
        assert!(out.status.success(), "umount: {}{}", stdout(&out), stderr(&out));
        assert!(!is_mounted(&self.dir), "still mounted after umount");
    }

    /// Ends it as the out-of-memory killer does. The dead mount stays, as it would.
    #[track_caller]
    pub fn kill(mut self) -> PathBuf {
        drop(self.watchdog.take());
        ok(tool("kill").args(["-9", &self.pid.to_string()]));
        let pid = self.pid;
        eventually("the end of the killed daemon", || !alive(pid));
        let dir = self.dir.clone();
        std::mem::forget(self);
        dir
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if is_mounted(&self.dir) && !std::thread::panicking() {
            let _ = fleecefs(args!["umount", &self.dir]);
        }
        if is_mounted(&self.dir) {
            detach(&self.dir);
        }
        if std::thread::panicking() {
            self.connection.into_iter().for_each(abort);
        }
        if self.pid != 0 && alive(self.pid) {
            let deadline = Instant::now() + Duration::from_secs(10);
            while alive(self.pid) && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(20));
            }
            let _ = tool("kill").args(["-9", &self.pid.to_string()]).output();
        }
    }
}

/// A process that runs, not one that waits to be reaped.
pub fn alive(pid: u32) -> bool {
    // A zombie with other threads (field 20 of proc_pid_stat(5)) has files open.
    let threads =
        |stat: &str| stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().nth(17)?.parse::<u32>().ok());
    fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z ") || threads(&stat) > Some(1))
}

pub fn is_mounted(dir: &Path) -> bool {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    mounts.lines().any(|line| line.split(' ').nth(1).is_some_and(|at| Path::new(at) == dir))
}

fn detach(dir: &Path) {
    let out = tool("umount").arg("-l").arg(dir).output();
    if !out.is_ok_and(|o| o.status.success()) {
        let _ = tool("fusermount3").arg("-uz").arg(dir).output();
    }
}

/// A dirty map as the manual has it, checked while it is read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Map(pub Vec<MapExtent>);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MapExtent {
    pub start: u64,
    pub length: u64,
    pub dirty: bool,
    pub zero: bool,
}

impl Map {
    #[track_caller]
    pub fn parse(json: &Value) -> Map {
        let rows = json.as_array().unwrap_or_else(|| panic!("not a list: {json}"));
        let mut extents: Vec<MapExtent> = Vec::new();
        for row in rows {
            let number = |key: &str| row[key].as_u64().unwrap_or_else(|| panic!("{key} in {row}"));
            let flag = |key: &str| row[key].as_bool().unwrap_or_else(|| panic!("{key} in {row}"));
            let e = MapExtent {
                start: number("start"),
                length: number("length"),
                dirty: flag("dirty"),
                zero: flag("zero"),
            };
            let last = extents.last();
            assert_eq!(e.start, last.map_or(0, |l| l.start + l.length), "gap or overlap in {json}");
            assert!(last.is_none_or(|l| (l.dirty, l.zero) != (e.dirty, e.zero)), "not merged: {json}");
            assert!(e.length > 0, "{json}");
            extents.push(e);
        }
        Map(extents)
    }

    pub fn size(&self) -> u64 {
        self.0.last().map_or(0, |e| e.start + e.length)
    }

    /// Granules that hold dirty bytes. A map marks whole granules: a part of one is a wrong map.
    #[track_caller]
    pub fn granules(&self) -> Vec<u64> {
        let mut runs: Vec<(u64, u64)> = Vec::new();
        for e in self.0.iter().filter(|e| e.dirty) {
            match runs.last_mut() {
                Some(run) if run.1 == e.start => run.1 += e.length,
                _ => runs.push((e.start, e.start + e.length)),
            }
        }
        let size = self.size();
        for (start, end) in &runs {
            assert!(
                start % GRANULE == 0 && (end % GRANULE == 0 || *end == size),
                "{start}..{end} is no run of granules"
            );
        }
        runs.iter().flat_map(|(start, end)| start / GRANULE..end.div_ceil(GRANULE)).collect()
    }

    pub fn all_dirty(&self) -> bool {
        !self.0.is_empty() && self.0.iter().all(|e| e.dirty)
    }

    /// What the map says of zeros must hold in `view`.
    #[track_caller]
    pub fn check_zeros(&self, view: &[u8]) {
        for e in self.0.iter().filter(|e| e.zero) {
            let bytes = &view[e.start as usize..(e.start + e.length) as usize];
            assert!(bytes.iter().all(|b| *b == 0), "{e:?} is not zero in the view");
        }
    }
}

/// The name of a point that may stand as a name or as an object.
pub fn name_of(value: &Value) -> Option<&str> {
    value.as_str().or_else(|| value["name"].as_str())
}

/// Where data is by SEEK_DATA and SEEK_HOLE.
#[track_caller]
pub fn data_ranges(path: &Path) -> Vec<(u64, u64)> {
    let size = fs::metadata(path).unwrap().len();
    let text = ok(tool("xfs_io").args(["-r", "-c", "seek -a -r 0"]).arg(path));
    let mut ranges = Vec::new();
    let mut open = None;
    for line in text.lines().skip(1) {
        let (whence, at) = line.split_once('\t').unwrap_or_else(|| panic!("seek of {}: {text}", path.display()));
        match (whence, at.parse::<u64>()) {
            ("DATA", Ok(at)) => open = Some(at),
            ("HOLE", Ok(at)) => ranges.extend(open.take().map(|start| (start, at))),
            _ => {}
        }
    }
    ranges.extend(open.map(|start| (start, size)));
    ranges.retain(|(start, end)| start < end);
    ranges
}

#[track_caller]
pub fn xfs_io(path: &Path, flags: &str, commands: &[&str]) -> String {
    let mut command = tool("xfs_io");
    command.args(flags.split_whitespace());
    for c in commands {
        command.args(["-c", c]);
    }
    ok(command.arg(path))
}

/// Tells a snapshot that a range was read, as a user of fallocate(1) does.
#[track_caller]
pub fn release(release_file: &Path, offset: u64, length: u64) {
    let (offset, length) = (offset.to_string(), length.to_string());
    ok(tool("fallocate").args(["-p", "-o", &offset, "-l", &length]).arg(release_file));
}

/// `status` must say that something needs an operator, and name it.
#[track_caller]
pub fn has_problem(mount: &Mount, word: &str) {
    let out = mount.run("status", args![]);
    assert_eq!(out.status.code(), Some(1), "{}{}", stdout(&out), stderr(&out));
    assert!(stdout(&out).contains(word), "{}", stdout(&out));
}

/// 4 KiB at `offset` (a multiple of that), past the page cache; the tool's message where it fails.
pub fn direct_read(path: &Path, offset: u64) -> Result<Vec<u8>, String> {
    let mut dd = tool("dd");
    dd.arg(format!("if={}", path.display())).arg(format!("skip={}", offset / 4096));
    let out = dd.args(["bs=4096", "count=1", "iflag=direct", "status=none"]).output().unwrap();
    if out.status.success() { Ok(out.stdout) } else { Err(stderr(&out)) }
}

/// A read that reaches the daemon must fail with EIO.
#[track_caller]
pub fn unreadable(path: &Path, offset: u64) {
    let e = direct_read(path, offset).expect_err("it was read");
    assert!(e.contains("Input/output error"), "{e}");
}

/// Blocks of 512 bytes that the files below `dir` take.
pub fn blocks_below(dir: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(dir) else { return 0 };
    entries
        .flatten()
        .map(|entry| match entry.metadata() {
            Ok(m) if m.is_dir() => blocks_below(&entry.path()),
            Ok(m) => m.blocks(),
            Err(_) => 0,
        })
        .sum()
}

/// A name that no other test of this run uses.
pub fn unique(prefix: &str) -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    format!("{prefix}-{}-{}", std::process::id(), NEXT.fetch_add(1, Relaxed))
}

/// A loop device. It goes with this value.
pub struct Loop(pub PathBuf);

impl Loop {
    #[track_caller]
    pub fn new(file: &Path, flags: &[&str]) -> Loop {
        Loop(ok(tool("losetup").args(["-f", "--show"]).args(flags).arg(file)).trim().into())
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = tool("losetup").arg("-d").arg(&self.0).output();
    }
}

/// A mounted file system. It goes with this value, thawed before.
pub struct Fs(pub PathBuf);

impl Fs {
    #[track_caller]
    pub fn mount(device: &Path, dir: &Path, options: &str) -> Fs {
        fs::create_dir_all(dir).unwrap();
        ok(tool("mount").args(["-o", options]).arg(device).arg(dir));
        Fs(dir.to_owned())
    }
}

impl Drop for Fs {
    fn drop(&mut self) {
        let _ = tool("fsfreeze").arg("-u").arg(&self.0).output();
        let out = tool("umount").arg(&self.0).output();
        if !out.is_ok_and(|o| o.status.success()) {
            let _ = tool("umount").arg("-l").arg(&self.0).output();
        }
    }
}
