//! Block nodes of the drivers `file` and `host_device`: names for files, for disks to be served from.
//!
//! A disk is a node too, but the core keeps those. A file node opens and locks nothing: the disk over it does.

use crate::fleece::{Disk, Fleece};
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use uuid::Uuid;

/// A file under a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileNode {
    /// `file` or `host_device`.
    pub driver: &'static str,
    /// Where the file is.
    pub filename: PathBuf,
    /// Whether disks over it refuse the guest's writes.
    pub read_only: bool,
    /// Whether others may write to it meanwhile.
    pub force_share: bool,
    /// Disks that were made over it. Some may have gone.
    pub users: Vec<Uuid>,
}

impl FileNode {
    /// The disks over it.
    pub fn disks(&self, fleece: &Fleece) -> Vec<Arc<Disk>> {
        fleece.disks().into_iter().filter(|disk| self.users.contains(&disk.uuid())).collect()
    }
}

/// The file nodes of a daemon, by name. The lock is held while a disk is made over one, so that it stays meanwhile.
#[derive(Debug, Default)]
pub struct Nodes(pub(super) Mutex<BTreeMap<String, FileNode>>);
