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
use crate::error::{Error, Result, errno};
use crate::image::Image;
use crate::storage::Dir;
use crate::storage::dir::{MemDir, OsDir};
use crate::storage::lock::{FileLock, lock_file};
use crate::storage::shm::{HeapShmRoot, OsShmRoot, ShmRoot};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Where block devices' state lies, unless told otherwise.
const DEVICE_STATE: &str = "/var/lib/fleecefs";

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
            Some(dir) => dir.join(format!("{name}.fleece")),
            None if image.is_block_device() => Path::new(DEVICE_STATE).join(device_id(image.path())),
            None => beside(image.path()),
        };
        let explain = |what: &str, option: &str, e: Error| {
            e.context(format!("{what} of disk '{name}'")).hint(format!("give a writable directory with {option} DIR"))
        };
        let state = OsDir::create(&state_path).map_err(|e| explain("state directory", "--state-dir", e))?;
        let lock = lock_file(&state_path.join("lock")).map_err(|e| {
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

/// `IMAGE.fleece` beside the image.
fn beside(image: &Path) -> PathBuf {
    let mut name = image.as_os_str().to_owned();
    name.push(".fleece");
    PathBuf::from(name)
}

/// A name that a block device keeps over reboots: WWN, else partition UUID, else the path's own.
fn device_id(device: &Path) -> String {
    let target = device.canonicalize().unwrap_or_else(|_| device.to_owned());
    let links = [("/dev/disk/by-id", "wwn-"), ("/dev/disk/by-id", "nvme-eui."), ("/dev/disk/by-partuuid", "")];
    for (dir, prefix) in links {
        let Ok(entries) = std::fs::read_dir(dir) else { continue };
        let mut names: Vec<String> = entries
            .flatten()
            .filter(|entry| entry.path().canonicalize().is_ok_and(|path| path == target))
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .filter(|name| name.starts_with(prefix))
            .collect();
        names.sort();
        if let Some(name) = names.into_iter().next() {
            return name;
        }
    }
    target.to_string_lossy().trim_start_matches('/').replace('/', "-")
}
