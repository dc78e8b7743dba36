//! Where the state of a disk lies.
//!
//! | what | where |
//! | --- | --- |
//! | `dirty.log`, `lock` | `IMAGE.fleece/` beside an image file; `/var/lib/fleecefs/ID/` for a block device; `DIR/NAME.fleece/` with `--state-dir DIR` |
//! | `layers/ID/` | the same directory, or `DIR/NAME.fleece/` with `--store-dir DIR` |
//! | words | tmpfs, in the namespace of the sidecar's nonce |
//!
//! A disk that is served read-only keeps all of it in memory: nothing on the host is written for it.

use super::Options;
use crate::bitmap::Directory;
use crate::error::{Error, Result, errno};
use crate::image::Image;
use crate::storage::Dir;
use crate::storage::device::device_name;
use crate::storage::dir::{MemDir, OsDir};
use crate::storage::lock::{FileLock, lock_file};
use crate::storage::os::resolved;
use crate::storage::shm::{HeapShmRoot, OsShmRoot, ShmRoot};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Where block devices' state lies, unless told otherwise.
const DEVICE_STATE: &str = "/var/lib/fleecefs";

/// How long a lock that somebody holds is asked for, and how often.
const BUSY_GRACE: Duration = Duration::from_secs(1);
const BUSY_PAUSE: Duration = Duration::from_millis(50);

/// What a mount runs on: the host, or memory in tests.
#[derive(Debug, Clone)]
pub struct Environment {
    /// Words that survive this process.
    pub shm: Arc<dyn ShmRoot>,
    /// Whether a thread reaps dropped layers; without one the test calls `Fleece::reap`.
    pub background: bool,
}

impl Environment {
    /// The host.
    pub fn host() -> Self {
        Environment { shm: Arc::new(OsShmRoot), background: true }
    }
}

/// Where one disk's state lies.
#[derive(Debug)]
pub struct Place {
    /// Holds `dirty.log`.
    pub state: Arc<dyn Dir>,
    /// Holds `layers/`.
    pub stores: Arc<dyn Dir>,
    /// Words of this disk alone, instead of the environment's.
    pub shm: Option<Arc<dyn ShmRoot>>,
    /// The state directory's lock.
    pub lock: Option<FileLock>,
}

impl Place {
    /// Nothing survives; for disks that are served read-only.
    pub fn in_memory() -> Self {
        let dir: Arc<dyn Dir> = Arc::new(MemDir::new());
        Place { state: dir.clone(), stores: dir, shm: Some(Arc::new(HeapShmRoot::new())), lock: None }
    }

    /// The directories of an image on the host, made if they are not there, and locked.
    pub(super) fn of_image(name: &str, image: &dyn Image, options: &Options) -> Result<Self> {
        let state_path = match &options.state_dir {
            None if image.is_block_device() => device_state(image.path())?,
            _ => state_dir(name, image.path(), options),
        };
        let explain = |what: &str, option: &str, e: Error| {
            e.context(format!("{what} of disk '{name}'")).hint(format!("give a writable directory with {option} DIR"))
        };
        for (dir, option) in [(&options.state_dir, "--state-dir"), (&options.store_dir, "--store-dir")] {
            check_parent(dir.as_deref(), option)?;
        }
        let state = OsDir::create(&state_path).map_err(|e| explain("state directory", "--state-dir", e))?;
        let lock = while_busy(|| lock_file(&state_path.join("lock"))).map_err(|e| {
            if e.errno() == errno::EBUSY {
                Error::new(errno::EBUSY, format!("disk '{name}'"), "another fleecefs serves this image")
                    .at_path(image.path())
                    .hint("use that mount, or unmount it first")
            } else {
                explain("state directory", "--state-dir", e)
            }
        })?;
        let state: Arc<dyn Dir> = Arc::new(state);
        let stores = match &options.store_dir {
            None => state.clone(),
            Some(dir) => {
                let path = dir.join(format!("{name}.fleece"));
                Arc::new(OsDir::create(&path).map_err(|e| explain("store directory", "--store-dir", e))?)
            }
        };
        Ok(Place { state, stores, shm: None, lock: Some(lock) })
    }
}

/// A directory that is given is made, but not what leads to it: that would hide a slip of the pen, or a file system
/// that is not mounted.
fn check_parent(dir: Option<&Path>, option: &str) -> Result<()> {
    match dir.and_then(Path::parent) {
        Some(parent) if !parent.as_os_str().is_empty() && !parent.is_dir() => {
            Err(Error::new(errno::EINVAL, option, "no such directory").at_path(parent).hint("make it with mkdir"))
        }
        _ => Ok(()),
    }
}

/// Tries again for a second while somebody else holds a lock: a daemon that was killed a moment ago lets go only when
/// the kernel has ended it.
pub(super) fn while_busy<T>(take: impl Fn() -> Result<T>) -> Result<T> {
    let deadline = Instant::now() + BUSY_GRACE;
    loop {
        match take() {
            Err(e) if e.errno() == errno::EBUSY && Instant::now() < deadline => std::thread::sleep(BUSY_PAUSE),
            done => return done,
        }
    }
}

/// Where the state of an image file lies: `DIR/NAME.fleece` with `--state-dir DIR`, else `IMAGE.fleece` beside the file
/// that the image's name leads to, so that an image has one state whatever it is called.
pub fn state_dir(name: &str, image: &Path, options: &Options) -> PathBuf {
    if let Some(dir) = &options.state_dir {
        return dir.join(format!("{name}.fleece"));
    }
    let mut beside = resolved(image).into_os_string();
    beside.push(".fleece");
    PathBuf::from(beside)
}

/// Where the stores of recorded layers are, if those are to be kept and are elsewhere than in `stores`. A state that was
/// moved or copied names a place that may be another image's by now.
pub(super) fn stores_in_use(kept: bool, directory: &Directory, stores: &dyn Dir) -> Result<Option<Arc<dyn Dir>>> {
    let Some(first) = directory.layers.first().filter(|_| kept) else { return Ok(None) };
    let layer = format!("layers/{}", first.uuid);
    if first.store == stores.path("") || stores.exists(&layer)? {
        return Ok(None);
    }
    let dir = OsDir::open(&first.store).inspect_err(|e| log::warn!("stores of snapshots are not found: {e}")).ok();
    Ok(dir.filter(|dir| dir.exists(&layer).unwrap_or(false)).map(|dir| Arc::new(dir) as Arc<dyn Dir>))
}

/// `/var/lib/fleecefs/ID`. States of devices that were at the same path and are gone for good are removed.
fn device_state(device: &Path) -> Result<PathBuf> {
    let base = Path::new(DEVICE_STATE);
    let name = device_name(device)?;
    if let (Some(stem), Ok(entries)) = (&name.passing, std::fs::read_dir(base)) {
        let gone = entries.flatten().filter(|entry| {
            let other = entry.file_name();
            other.to_string_lossy().starts_with(stem) && other.to_string_lossy() != name.name.as_str()
        });
        for entry in gone {
            if let Err(e) = std::fs::remove_dir_all(entry.path()) {
                log::debug!("{}: {e}", entry.path().display());
            }
        }
    }
    Ok(base.join(name.name))
}
