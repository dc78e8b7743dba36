//! Mounting, waiting for the end, unmounting.
//!
//! The unmount is ours, not fuser's: a busy mount answers EBUSY and goes on serving, and what another process mounts
//! at the same place later is never touched.

use super::adapter::Adapter;
use super::control::{Control, Kernel};
use super::lane::Lane;
use super::tree::{Status, Tree};
use crate::error::{Error, Result, errno};
use crate::fleece::Fleece;
use crate::storage::process::{self, MountState};
use crate::storage::writeback::WriteBack;
use fuser::{BackgroundSession, Config, INodeNo, MountOption, Notifier, Session, SessionACL};
use parking_lot::{Condvar, Mutex};
use std::fs;
use std::io;
use std::mem::ManuallyDrop;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Read-ahead of the mount: more wrecks random reads of a cold view.
const READ_AHEAD_KIB: u32 = 1024;
/// Where the system says whether users may let others into their mounts.
const FUSE_CONF: &str = "/etc/fuse.conf";

/// What to mount, and how.
#[derive(Clone)]
pub struct MountOptions {
    /// Count of workers.
    pub threads: usize,
    /// User and group of every file.
    pub owner: (u32, u32),
    /// Permission bits of the live files; frozen files get the reading ones.
    pub mode: u32,
    /// Options of mount(8) and FUSE, each possibly several with commas.
    pub fuse_options: Vec<String>,
    /// Mount read-only: nothing can be written, no snapshot taken through the mount.
    pub read_only: bool,
    /// Makes the content of `status.json`.
    pub status: Status,
}

/// A mount that is being served.
pub struct Mounted {
    mountpoint: PathBuf,
    control: Arc<Control>,
    lane: Arc<Lane>,
    ended: Arc<Ended>,
    /// Never dropped: its drop would unmount whatever is at the mountpoint then.
    _session: ManuallyDrop<BackgroundSession>,
}

/// The kernel's side of the mount.
struct Connection {
    mountpoint: PathBuf,
    write_back: Option<WriteBack>,
    notifier: Notifier,
}

impl Kernel for Connection {
    fn write_back(&self, disk: &str) -> Result<()> {
        let live = self.mountpoint.join("live").join(format!("{disk}.raw"));
        self.write_back.as_ref().map_or(Ok(()), |thread| thread.write_back(&live))
    }

    fn attributes_changed(&self, ino: u64) -> Result<()> {
        // A negative offset leaves the pages alone.
        self.notifier.inval_inode(INodeNo(ino), -1, 0).map_err(|e| Error::io("notify", e))
    }
}

/// Set when the last worker has gone.
#[derive(Default)]
struct Ended {
    flag: Mutex<bool>,
    changed: Condvar,
}

impl Ended {
    fn set(&self) {
        *self.flag.lock() = true;
        self.changed.notify_all();
    }

    fn wait(&self) {
        let mut flag = self.flag.lock();
        while !*flag {
            self.changed.wait(&mut flag);
        }
    }
}

/// Whether a mount can be made at `path`: an empty directory, or the remains of a mount whose process was killed.
pub fn check_mountpoint(path: &Path) -> Result<()> {
    let error = |errno, why: &str| Error::new(errno, "mountpoint", why).at_path(path);
    let metadata = match fs::metadata(path) {
        Ok(metadata) => metadata,
        Err(e) if process::is_dead_mount(&e) => return Ok(()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            return Err(error(errno::ENOENT, "no such directory").hint(format!("make it: mkdir -p {}", path.display())));
        }
        Err(e) => return Err(Error::io("mountpoint", e).at_path(path)),
    };
    if !metadata.is_dir() {
        return Err(error(errno::ENOTDIR, "not a directory")
            .hint("the last argument is the directory to mount at; images come before it"));
    }
    let first = fs::read_dir(path).map_err(|e| Error::io("mountpoint", e).at_path(path))?.next();
    if first.is_none() {
        return Ok(());
    }
    if matches!(process::mount_state(path), Ok(MountState::Mounted)) {
        return Err(error(errno::EBUSY, "something is mounted there")
            .hint(format!("unmount it first: fleecefs umount {}", path.display())));
    }
    Err(error(errno::ENOTEMPTY, "the directory is not empty")
        .hint("mounting would hide what is in it: name an empty one"))
}

/// Mounts and starts to serve; the mount answers when this returns.
pub fn mount(fleece: Arc<Fleece>, mountpoint: &Path, options: &MountOptions) -> Result<Mounted> {
    if process::mount_state(mountpoint)? == MountState::Dead {
        log::warn!("{}: detaching a mount whose process has gone", mountpoint.display());
        process::unmount(mountpoint, true)?;
    }
    let mountpoint = mountpoint.canonicalize().map_err(|e| Error::io("mountpoint", e).at_path(mountpoint))?;
    let workers = options.threads.max(1);
    let tree = Arc::new(Tree::new(fleece, options.mode, options.status.clone()));
    let control = Control::start(tree.clone())?;
    let lane = Lane::new(workers);
    let ended = Arc::new(Ended::default());
    let adapter = Adapter {
        tree,
        control: control.clone(),
        lane: lane.clone(),
        owner: options.owner,
        ended: Box::new({
            let ended = ended.clone();
            move || ended.set()
        }),
    };
    let write_back = WriteBack::start()
        .inspect_err(|e| log::warn!("snapshots will have synced stores of shared mappings only: {e}"))
        .ok();
    let session = Session::new(adapter, &mountpoint, &config(options, workers));
    let session = session.and_then(|session| {
        let notifier = session.notifier();
        control.connect(Box::new(Connection { mountpoint: mountpoint.clone(), write_back, notifier }));
        session.spawn()
    });
    let session = match session {
        Ok(session) => ManuallyDrop::new(session),
        Err(e) => {
            control.stop();
            return Err(mount_error(e).at_path(&mountpoint));
        }
    };
    if let Err(e) = process::set_read_ahead(&mountpoint, READ_AHEAD_KIB) {
        log::debug!("read-ahead stays as it is: {e}");
    }
    Ok(Mounted { mountpoint, control, lane, ended, _session: session })
}

fn mount_error(e: io::Error) -> Error {
    let kind = e.kind();
    let error = Error::io("mount", e);
    match kind {
        io::ErrorKind::NotFound => error.hint("needs /dev/fuse (modprobe fuse) and, for users, fusermount3"),
        io::ErrorKind::InvalidInput => Error::new(error.errno(), "mount", "the kernel refuses the options")
            .hint("is there one behind -o that FUSE does not know?"),
        io::ErrorKind::PermissionDenied => error.hint("needs root, or fusermount3 and access to /dev/fuse"),
        _ => error,
    }
}

fn config(options: &MountOptions, workers: usize) -> Config {
    let mut config = Config::default();
    config.mount_options = mount_options(&options.fuse_options, options.read_only);
    config.acl = acl(process::uid_gid().0, &fs::read_to_string(FUSE_CONF).unwrap_or_default());
    config.n_threads = Some(workers);
    config.clone_fd = true;
    config
}

/// The kernel checks permissions, so all users may come in, where the system lets us say so.
fn acl(uid: u32, fuse_conf: &str) -> SessionACL {
    if uid == 0 || fuse_conf.lines().any(|line| line.trim() == "user_allow_other") {
        return SessionACL::All;
    }
    log::info!("other users, root too, have no access: {FUSE_CONF} does not have user_allow_other");
    SessionACL::Owner
}

/// Ours first, then the user's; what ours say already, or decide, is left out.
fn mount_options(words: &[String], read_only: bool) -> Vec<MountOption> {
    let words: Vec<&str> = words.iter().flat_map(|word| word.split(',')).map(str::trim).collect();
    let has = |word: &str| words.contains(&word);
    let mut options = vec![MountOption::DefaultPermissions];
    if !words.iter().any(|word| word.starts_with("fsname=")) {
        options.push(MountOption::FSName("fleecefs".to_owned()));
    }
    if !words.iter().any(|word| word.starts_with("subtype=")) {
        options.push(subtype("fleecefs"));
    }
    if !has("dev") {
        options.push(MountOption::NoDev);
    }
    if !has("suid") {
        options.push(MountOption::NoSuid);
    }
    if read_only || has("ro") {
        options.push(MountOption::RO);
    }
    for word in words {
        options.extend(match word {
            "" | "ro" | "rw" | "nodev" | "nosuid" | "allow_other" | "allow_root" | "default_permissions" => None,
            "dev" => Some(MountOption::Dev),
            "suid" => Some(MountOption::Suid),
            "exec" => Some(MountOption::Exec),
            "noexec" => Some(MountOption::NoExec),
            "atime" => Some(MountOption::Atime),
            "noatime" => Some(MountOption::NoAtime),
            "sync" => Some(MountOption::Sync),
            "async" => Some(MountOption::Async),
            "dirsync" => Some(MountOption::DirSync),
            word => Some(match word.split_once('=') {
                Some(("fsname", name)) => MountOption::FSName(name.to_owned()),
                Some(("subtype", name)) => subtype(name),
                _ => MountOption::CUSTOM(word.to_owned()),
            }),
        });
    }
    options
}

/// fuser gives a subtype to fusermount3 alone; as any other option the kernel gets it as well.
fn subtype(name: &str) -> MountOption {
    MountOption::CUSTOM(format!("subtype={name}"))
}

impl Mounted {
    /// Waits until nothing is served any more: after an unmount, and after a lazy one when the last file was closed.
    pub fn wait(&self) -> Result<()> {
        self.ended.wait();
        self.control.stop();
        self.lane.stop();
        // The connection can also be aborted under /sys/fs/fuse; the mount is then left behind.
        if matches!(process::mount_state(&self.mountpoint), Ok(MountState::Dead)) {
            process::unmount(&self.mountpoint, true)?;
        }
        Ok(())
    }

    /// Unmounts; a busy mount answers EBUSY and goes on being served. A lazy unmount takes it out of sight at once and
    /// serves the files that are open to their last close.
    pub fn unmount(&self, lazy: bool) -> Result<()> {
        if *self.ended.flag.lock() {
            return Ok(());
        }
        process::unmount(&self.mountpoint, lazy)
    }

    /// The control thread, for the control socket.
    pub fn control(&self) -> Arc<Control> {
        self.control.clone()
    }

    /// Where it is mounted.
    pub fn mountpoint(&self) -> &Path {
        &self.mountpoint
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if let Err(e) = self.unmount(true) {
            log::warn!("{e}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(words: &[&str]) -> Vec<String> {
        words.iter().map(|word| (*word).to_owned()).collect()
    }

    #[test]
    fn ours_are_there_and_the_users_win() {
        let options = mount_options(&[], false);
        for option in [
            MountOption::DefaultPermissions,
            MountOption::NoDev,
            MountOption::NoSuid,
            MountOption::FSName("fleecefs".to_owned()),
            MountOption::CUSTOM("subtype=fleecefs".to_owned()),
        ] {
            assert!(options.contains(&option), "{option:?}");
        }
        assert!(!options.contains(&MountOption::RO));
        let options = mount_options(&words(&["noatime,fsname=x", "allow_other,max_read=4096,dev"]), true);
        assert!(options.contains(&MountOption::RO));
        assert!(options.contains(&MountOption::NoAtime));
        assert!(options.contains(&MountOption::FSName("x".to_owned())));
        assert!(!options.contains(&MountOption::FSName("fleecefs".to_owned())));
        assert!(options.contains(&MountOption::CUSTOM("max_read=4096".to_owned())));
        assert!(options.contains(&MountOption::Dev) && !options.contains(&MountOption::NoDev));
        assert!(!options.contains(&MountOption::CUSTOM("allow_other".to_owned())));
    }

    #[test]
    fn others_come_in_where_the_system_allows_it() {
        assert_eq!(acl(0, ""), SessionACL::All);
        assert_eq!(acl(1000, "# user_allow_other\n"), SessionACL::Owner);
        assert_eq!(acl(1000, "mount_max = 5\n user_allow_other \n"), SessionACL::All);
    }

    #[test]
    fn a_bad_mountpoint_is_refused_with_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let check = |path: &Path| check_mountpoint(path).unwrap_err();
        let missing = check(&dir.path().join("none"));
        assert_eq!(missing.errno(), errno::ENOENT);
        assert!(missing.hint_text().unwrap().contains("mkdir -p"));
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        assert_eq!(check(&file).errno(), errno::ENOTDIR);
        assert_eq!(check(dir.path()).errno(), errno::ENOTEMPTY);
        fs::remove_file(&file).unwrap();
        check_mountpoint(dir.path()).unwrap();
    }
}
