//! The composition root: opens the disks, mounts, serves the control socket, and ends cleanly.
//!
//! Start: check everything (nothing is touched yet), go to the background (before the first thread exists), open the
//! disks, bind the socket, mount, serve, and tell readiness only when the mount answers.
//!
//! End, in this order, whatever asked for it (SIGTERM, SIGINT, SIGHUP, `quit`, or an unmount from outside):
//! 1. no more commands from the socket; those that run are waited for, and jobs are cancelled; then the NBD servers end:
//!    what their clients have asked for is finished and answered;
//! 2. unmount. Where files are open (a guest's disk, a backup's view), the mount is detached from the tree, so that no
//!    new opens come, and the last close is waited for [`BUSY_GRACE`], or until a second signal;
//! 3. `Fleece::close` saves bitmaps and state. This happens in every case: whoever still has a file open gets errors
//!    from then on, and no change goes unrecorded, since the core refuses writes once it is closed;
//! 4. the event `FLEECEFS_CLOSED` tells clients how that went; socket and pid file are removed; a failed close is
//!    logged and makes the exit code non-zero.
//!
//! Logging: to standard error with `--foreground` (with the priority in front where that is the journal), else to
//! syslog. `FLEECEFS_LOG` sets the level (`debug`, `fleecefs=trace`; default `fleecefs=info,warn`).

mod images;
mod logging;
mod nbd;
mod nbd_tls;
mod own_mount;

pub use images::{absolute, check_images};
pub use logging::to_syslog as log_to_syslog;
pub use nbd::{Nbd, NbdPlan};
pub use nbd_tls::{TlsMode, TlsPlan};
pub use own_mount::OwnMount;

use crate::backup::jobs::Jobs;
use crate::error::{Error, Result, errno};
use crate::fleece::{Action, Applied, Disk, DiskSpec, Fleece, Options, Refused, Snapshot, SnapshotRequest};
use crate::fuse::control::Control;
use crate::fuse::session::{self, MountOptions, Mounted};
use crate::qmp::{Events, ExportHost, Host, Listener, Nodes, Server};
use crate::storage::process;
use sd_notify::NotifyState;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::fs::{self, Permissions};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;
use std::time::{Duration, Instant};

/// How long open files may keep a daemon that was asked to end.
const BUSY_GRACE: Duration = Duration::from_secs(10);
/// How long jobs may take to end.
const JOB_GRACE: Duration = Duration::from_secs(30);
/// How long a new mount may take to answer its first question.
const READY_TIMEOUT: Duration = Duration::from_secs(30);

/// Everything that `fleecefs mount` was told.
#[derive(Debug)]
pub struct Plan {
    /// Options of the core.
    pub options: Options,
    /// The disks, each with its name and an absolute path.
    pub disks: Vec<DiskSpec>,
    /// Where to mount: an absolute path.
    pub mountpoint: PathBuf,
    /// FUSE threads.
    pub threads: usize,
    /// User and group of the files.
    pub owner: (u32, u32),
    /// Permission bits of the files.
    pub mode: u32,
    /// Further mount options, one each.
    pub fuse_options: Vec<String>,
    /// Nothing is written to any image.
    pub read_only: bool,
    /// The control socket, where the default is not wanted.
    pub qmp: Option<PathBuf>,
    /// The NBD server.
    pub nbd: NbdPlan,
    /// Where to write the process id.
    pub pidfile: Option<PathBuf>,
    /// Stay in the foreground.
    pub foreground: bool,
}

/// Why the daemon ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Signal,
    Quit,
    Unmounted,
}

impl End {
    /// QEMU's `ShutdownCause`.
    fn reason(self) -> &'static str {
        match self {
            End::Signal => "host-signal",
            End::Quit => "host-qmp-quit",
            End::Unmounted => "host-ui",
        }
    }
}

/// `fleecefs: WHAT: WHY`, with what to do on a line of its own.
pub fn explain(e: &Error) -> String {
    match e.hint_text() {
        Some(hint) => format!("fleecefs: {e}\n  {hint}"),
        None => format!("fleecefs: {e}"),
    }
}

/// Serves until the end. In the background mode this returns in the daemon only; the caller's process has exited by
/// then, with 0 once the mount answers.
pub fn run(plan: &Plan) -> Result<()> {
    check_images(&plan.disks, &plan.options, &plan.mountpoint)?;
    session::check_mountpoint(&plan.mountpoint)?;
    if plan.foreground {
        logging::to_stderr();
        return serve(plan, &mut || {
            // Without systemd there is nobody to notify.
            let _ = sd_notify::notify(&[NotifyState::Ready]);
            Ok(())
        });
    }
    let mut ready = Some(process::daemonize()?);
    logging::to_syslog();
    // All paths are absolute by now, and a daemon must keep no file system busy but those that it serves from.
    let _ = std::env::set_current_dir("/");
    let outcome = serve(plan, &mut || ready.take().map_or(Ok(()), process::Ready::done));
    match (outcome, ready) {
        (Err(e), Some(ready)) => ready.failed(2, &explain(&e)),
        (outcome, _) => outcome,
    }
}

fn serve(plan: &Plan, ready: &mut dyn FnMut() -> Result<()>) -> Result<()> {
    // Stores hold what guests wrote: nobody else's to read.
    process::set_umask(0o077);
    process::ignore_file_size_signal();
    if let Err(e) = process::raise_open_file_limit() {
        log::warn!("{e}");
    }
    let (ends, end) = mpsc::channel();
    watch_signals(ends.clone())?;
    let events = Arc::new(Events::default());
    let sockets = nbd::bind(&plan.nbd)?;
    let fleece = open_disks(plan, &events)?;
    let (outcome, stopped) = match Served::start(plan, &fleece, &events, sockets, ends) {
        Ok(served) => {
            let told = ready();
            let cause = if told.is_ok() { served.wait(&end) } else { End::Quit };
            (told, Some(served.stop(cause, &end, &events)))
        }
        Err(e) => (Err(e), None),
    };
    // What an earlier daemon left stays for the next attempt where the mount could not be made.
    let closed = if stopped.is_some() { fleece.close() } else { fleece.close_unused() };
    let closed = closed.map_err(|e| e.context("save state"));
    if let Err(e) = &closed {
        log::error!("{e}");
    }
    if let Some((server, _pidfile)) = stopped {
        let error = closed.as_ref().err().map(Error::to_string);
        events.emit("FLEECEFS_CLOSED", &json!({ "error": error }));
        server.finish();
    }
    outcome.and(closed)
}

/// Turns the signals that ask for an end into messages, from now on.
fn watch_signals(ends: Sender<End>) -> Result<()> {
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP]).map_err(|e| Error::io("install signal handlers", e))?;
    spawn("signals", move || {
        for _ in signals.forever() {
            let _ = ends.send(End::Signal);
        }
    })
}

fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> Result<()> {
    thread::Builder::new().name(name.into()).spawn(run).map(drop).map_err(|e| Error::io("start a thread", e))
}

/// Opens the core with all disks; on failure what was opened is closed again.
fn open_disks(plan: &Plan, events: &Arc<Events>) -> Result<Arc<Fleece>> {
    let fleece = Fleece::new(plan.options.clone());
    let events = events.clone();
    fleece.subscribe(Box::new(move |event| events.emit_core(event)));
    let opened = fleece.add_disks(&plan.disks);
    if let Err(e) = opened {
        if let Err(second) = fleece.close_unused() {
            log::error!("{second}");
        }
        return Err(e);
    }
    Ok(fleece)
}

/// A mount with its socket.
struct Served {
    mounted: Arc<Mounted>,
    server: Server,
    jobs: Arc<Jobs>,
    nbd: Arc<Nbd>,
    pidfile: Option<PidFile>,
}

impl Served {
    fn start(
        plan: &Plan,
        fleece: &Arc<Fleece>,
        events: &Arc<Events>,
        sockets: Vec<nbd::Sockets>,
        ends: Sender<End>,
    ) -> Result<Served> {
        let listener = Listener::bind(&socket_path(plan, fleece)?)?;
        let qmp = listener.path().to_owned();
        let nbd = Arc::new(Nbd::new(plan.nbd.clone(), &plan.mountpoint, fleece, events));
        let status = {
            let (fleece, nbd, qmp) = (fleece.clone(), nbd.clone(), qmp.clone());
            Arc::new(move || status(&fleece, &nbd, &qmp))
        };
        let options = MountOptions {
            threads: plan.threads,
            owner: plan.owner,
            mode: plan.mode,
            fuse_options: plan.fuse_options.clone(),
            read_only: plan.read_only,
            status,
        };
        let mounted = Arc::new(session::mount(fleece.clone(), &plan.mountpoint, &options)?);
        let attached =
            nbd.serve(sockets).and_then(|()| Served::attach(plan, fleece, events, ends, listener, &mounted, &nbd));
        match attached {
            Ok((server, jobs, pidfile)) => Ok(Served { mounted, server, jobs, nbd, pidfile }),
            Err(e) => {
                nbd.stop();
                if let Err(second) = mounted.unmount(true) {
                    log::error!("{second}");
                }
                Err(e)
            }
        }
    }

    /// What needs the mount: the end of it, the socket, the pid file, the first answer.
    fn attach(
        plan: &Plan,
        fleece: &Arc<Fleece>,
        events: &Arc<Events>,
        ends: Sender<End>,
        listener: Listener,
        mounted: &Arc<Mounted>,
        nbd: &Arc<Nbd>,
    ) -> Result<(Server, Arc<Jobs>, Option<PidFile>)> {
        let waiting = (mounted.clone(), ends.clone());
        spawn("mount-wait", move || {
            if let Err(e) = waiting.0.wait() {
                log::error!("{e}");
            }
            let _ = waiting.1.send(End::Unmounted);
        })?;
        let told = events.clone();
        let jobs = Jobs::new(move |event| told.emit_job(event));
        let host = Arc::new(Daemon {
            jobs: jobs.clone(),
            nodes: Nodes::default(),
            nbd: nbd.clone(),
            fleece: fleece.clone(),
            control: mounted.control(),
            mountpoint: plan.mountpoint.clone(),
            qmp: listener.path().to_owned(),
            ends,
        });
        let server = Server::start(listener, host, events.clone())?;
        wait_answer(&plan.mountpoint)?;
        let pidfile = plan.pidfile.as_deref().map(PidFile::write).transpose()?;
        Ok((server, jobs, pidfile))
    }

    /// Waits until somebody asks for the end.
    fn wait(&self, end: &Receiver<End>) -> End {
        // The signal thread never lets go of its sender, so there is always an answer.
        end.recv().unwrap_or(End::Unmounted)
    }

    /// Takes no more commands and unmounts; what is left goes when the core is closed.
    fn stop(self, cause: End, end: &Receiver<End>, events: &Events) -> (Server, Option<PidFile>) {
        log::info!("ending: {}", cause.reason());
        let _ = sd_notify::notify(&[NotifyState::Stopping]);
        events.emit("SHUTDOWN", &json!({ "guest": false, "reason": cause.reason() }));
        self.server.stop();
        self.jobs.stop(JOB_GRACE);
        self.nbd.stop();
        if cause != End::Unmounted {
            unmount(&self.mounted, end);
        }
        (self.server, self.pidfile)
    }
}

/// Unmounts; where files are open, detaches and waits for the last close, but not for ever.
fn unmount(mounted: &Mounted, end: &Receiver<End>) {
    let detached = match mounted.unmount(false) {
        Ok(()) => false,
        Err(e) => {
            log::warn!("{e}: detached; waiting up to {} s for open files", BUSY_GRACE.as_secs());
            if let Err(e) = mounted.unmount(true) {
                log::error!("{e}");
            }
            true
        }
    };
    let deadline = Instant::now() + BUSY_GRACE;
    while let Some(left) = deadline.checked_duration_since(Instant::now()) {
        match end.recv_timeout(left) {
            Ok(End::Unmounted) => return,
            // A second signal: whoever sent it does not want to wait.
            Ok(End::Signal) if detached => break,
            Ok(_) => {}
            Err(_) => break,
        }
    }
    log::warn!("files are still open: they fail from now on");
}

/// Waits until the mount answers its first question.
fn wait_answer(mountpoint: &Path) -> Result<()> {
    let file = mountpoint.join("status.json");
    let (answers, answer) = mpsc::channel();
    let asked = file.clone();
    spawn("first-question", move || drop(answers.send(fs::metadata(asked))))?;
    match answer.recv_timeout(READY_TIMEOUT) {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(e)) => Err(Error::io("mount does not answer", e).at_path(file)),
        Err(_) => {
            let why = format!("no answer in {} s", READY_TIMEOUT.as_secs());
            Err(Error::new(errno::ETIMEDOUT, "mount", why).at_path(mountpoint))
        }
    }
}

/// `--qmp`, else a name that the mount point decides (so that what a killed daemon left is replaced, not added to):
/// below /run for root, below $XDG_RUNTIME_DIR for others, beside the first disk's state where there is none.
fn socket_path(plan: &Plan, fleece: &Fleece) -> Result<PathBuf> {
    if let Some(path) = &plan.qmp {
        return Ok(path.clone());
    }
    let runtime = match process::uid_gid().0 {
        0 => Some(PathBuf::from("/run")),
        _ => std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|dir| dir.is_absolute()),
    };
    let dir = match runtime {
        Some(runtime) => runtime.join("fleecefs"),
        None => match fleece.disk_infos().into_iter().next() {
            Some(disk) => disk.state,
            None => return Err(Error::new(errno::EINVAL, "control socket", "no place for it").hint("give --qmp PATH")),
        },
    };
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&dir)
        .map_err(|e| Error::io("create directory", e).at_path(&dir).hint("choose another place with --qmp PATH"))?;
    Ok(dir.join(socket_name(&plan.mountpoint)))
}

fn socket_name(mountpoint: &Path) -> String {
    let hash = Sha256::digest(mountpoint.as_os_str().as_bytes());
    let digits: String = hash.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    format!("{digits}.qmp")
}

/// What `status.json` and `fleecefs-status` say.
fn status(fleece: &Fleece, nbd: &Nbd, qmp: &Path) -> Value {
    let counters: serde_json::Map<_, _> =
        fleece.counters().into_iter().map(|c| (c.name.to_owned(), json!(c.value))).collect();
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "pid": std::process::id(),
        "qmp": qmp,
        "nbd": nbd.status(),
        "disks": fleece.disk_infos(),
        "snapshots": fleece.snapshot_infos(),
        "checkpoints": fleece.checkpoints(),
        "consumers": fleece.consumers(),
        "guest_share": fleece.options().guest_share,
        "counters": counters,
        "problems": fleece.problems(),
        "volume_warnings": fleece.volume_warnings(),
    })
}

/// What the control socket's commands act on.
struct Daemon {
    fleece: Arc<Fleece>,
    jobs: Arc<Jobs>,
    nodes: Nodes,
    nbd: Arc<Nbd>,
    control: Arc<Control>,
    mountpoint: PathBuf,
    qmp: PathBuf,
    ends: Sender<End>,
}

impl Host for Daemon {
    fn fleece(&self) -> &Arc<Fleece> {
        &self.fleece
    }

    fn create_snapshot(&self, request: &SnapshotRequest) -> Result<Arc<Snapshot>> {
        self.control.create_snapshot(request)
    }

    fn apply(&self, actions: &[Action]) -> std::result::Result<Applied, Refused> {
        self.control.apply(actions)
    }

    fn jobs(&self) -> &Arc<Jobs> {
        &self.jobs
    }

    fn nodes(&self) -> &Nodes {
        &self.nodes
    }

    fn exports(&self) -> &dyn ExportHost {
        &*self.nbd
    }

    fn check_image(&self, spec: &DiskSpec) -> Result<()> {
        images::check_added(spec, &self.mountpoint, &self.fleece)
    }

    fn add_disk(&self, spec: &DiskSpec) -> Result<Arc<Disk>> {
        self.check_image(spec)?;
        self.fleece.add_disk(spec)
    }

    fn status(&self) -> Value {
        status(&self.fleece, &self.nbd, &self.qmp)
    }

    fn quit(&self) {
        let _ = self.ends.send(End::Quit);
    }
}

/// The file with the process id; removed with the daemon.
struct PidFile(PathBuf);

impl PidFile {
    /// Takes a path that is free, or holds what a killed daemon left: a number and nothing else.
    fn write(path: &Path) -> Result<PidFile> {
        match fs::metadata(path) {
            Ok(meta) if !meta.is_file() || meta.len() > 20 || !holds_pid(path) => {
                return Err(Error::new(errno::EEXIST, "pid file", "the file is there and holds something else")
                    .at_path(path)
                    .hint("give --pidfile a path that is free"));
            }
            _ => {}
        }
        // For anybody to read, whatever the mask.
        fs::write(path, format!("{}\n", std::process::id()))
            .and_then(|()| fs::set_permissions(path, Permissions::from_mode(0o644)))
            .map_err(|e| Error::io("write pid file", e).at_path(path))?;
        Ok(PidFile(path.to_owned()))
    }
}

fn holds_pid(path: &Path) -> bool {
    fs::read_to_string(path).is_ok_and(|text| text.trim_end().parse::<u32>().is_ok() || text.is_empty())
}

impl Drop for PidFile {
    fn drop(&mut self) {
        if !holds_pid(&self.0) {
            return;
        }
        if let Err(e) = fs::remove_file(&self.0) {
            log::warn!("{}", Error::io("remove pid file", e).at_path(&self.0));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_point_has_one_socket_name() {
        assert_eq!(socket_name(Path::new("/mnt/a")), socket_name(Path::new("/mnt/a")));
        assert_ne!(socket_name(Path::new("/mnt/a")), socket_name(Path::new("/mnt/b")));
        assert_eq!(socket_name(Path::new("/")).len(), 20);
    }

    #[test]
    fn the_pid_file_goes_with_its_owner() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pid");
        let file = PidFile::write(&path).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), format!("{}\n", std::process::id()));
        drop(file);
        assert!(!path.exists());
        assert!(PidFile::write(&dir.path().join("no/pid")).is_err());
        for precious in ["an image\n", "12345678901234567890123456789"] {
            fs::write(&path, precious).unwrap();
            assert_eq!(PidFile::write(&path).err().unwrap().errno(), errno::EEXIST);
            assert_eq!(fs::read_to_string(&path).unwrap(), precious);
        }
        fs::write(&path, "4711\n").unwrap();
        drop(PidFile::write(&path).unwrap());
        assert!(!path.exists());
    }

    #[test]
    fn errors_end_with_what_to_do() {
        let e = Error::new(errno::EBUSY, "unmount", "busy");
        assert_eq!(explain(&e), "fleecefs: unmount: busy");
        assert_eq!(explain(&e.hint("close it")), "fleecefs: unmount: busy\n  close it");
    }
}
