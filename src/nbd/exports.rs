//! What is served: live disks and frozen views as exports, and under which names.
//!
//! [`live`] and [`view`] adapt the core to [`Export`]; [`contexts`] are their meta contexts. [`mount`] serves all that a
//! mount has, [`table`] what was asked for one by one.
//!
//! Invariants:
//! - **A client keeps what it has.** A connection to a live disk counts as an open of its file, so the disk is not removed
//!   meanwhile. A connection to a view holds its snapshot as an open file does: a snapshot that is dropped is no longer
//!   listed, and stays valid to the last disconnect.
//! - **One way in.** Reads and writes go through [`Disk`] and [`View`], as those of files do: exports and files are
//!   coherent, a write through an export is a guest's, and reads of views go by turns beside an active guest.
//! - **Never too little.** A bitmap that an export shows is busy as long as it may be asked for, so its bits only grow.
//!
//! [`Export`]: super::export::Export

pub mod contexts;
pub mod live;
pub mod mount;
pub mod table;
pub mod view;

pub use mount::MountExports;
pub use table::{BitmapName, ExportInfo, ExportSpec, ExportTable};

use crate::error::{Error, Result, errno};
use crate::fleece::{Disk, Fleece, Snapshot, View};
use std::sync::Arc;

/// A disk that is open: it is not removed meanwhile.
#[derive(Debug)]
pub struct OpenDisk(Arc<Disk>);

impl OpenDisk {
    /// Opens a disk by name. ENOENT for an unknown one.
    pub fn open(fleece: &Fleece, name: &str) -> Result<OpenDisk> {
        let disk = fleece.disk(name)?;
        disk.opened();
        let open = OpenDisk(disk);
        // Only a disk that is open cannot be removed: look again now that it is.
        match fleece.disk(name) {
            Ok(now) if Arc::ptr_eq(&now, &open.0) => Ok(open),
            _ => Err(no_such_export(name)),
        }
    }

    /// One more open of the same disk.
    pub fn again(&self) -> OpenDisk {
        self.0.opened();
        OpenDisk(self.0.clone())
    }

    /// The disk.
    pub fn disk(&self) -> &Arc<Disk> {
        &self.0
    }
}

impl Drop for OpenDisk {
    fn drop(&mut self) {
        self.0.closed();
    }
}

/// A view whose snapshot is held: it stays valid though the snapshot is dropped.
#[derive(Debug)]
pub struct OpenView {
    snapshot: Arc<Snapshot>,
    view: Arc<View>,
}

impl OpenView {
    /// Opens the view of one disk. ENOENT where the snapshot has none of it, or is gone.
    pub fn open(snapshot: &Arc<Snapshot>, disk: &str) -> Result<OpenView> {
        let view = snapshot.view(disk)?.clone();
        if !snapshot.opened() {
            return Err(no_such_export(&view_name(snapshot.name(), disk)));
        }
        Ok(OpenView { snapshot: snapshot.clone(), view })
    }

    /// The view.
    pub fn view(&self) -> &Arc<View> {
        &self.view
    }

    /// Its snapshot.
    pub fn snapshot(&self) -> &Arc<Snapshot> {
        &self.snapshot
    }
}

impl Drop for OpenView {
    fn drop(&mut self) {
        self.snapshot.closed();
    }
}

/// The name of a view as a node and an export.
pub fn view_name(snapshot: &str, disk: &str) -> String {
    format!("{snapshot}/{disk}")
}

/// The listed snapshot, and the disk, that a view's name means.
pub fn find_view(fleece: &Fleece, name: &str) -> Option<(Arc<Snapshot>, String)> {
    let (snapshot, disk) = name.rsplit_once('/')?;
    let snapshot = fleece.snapshot(snapshot).ok()?;
    snapshot.view(disk).ok()?;
    Some((snapshot, disk.to_owned()))
}

/// What `NBD_INFO_DESCRIPTION` and the list say of a disk.
pub fn describe_disk(disk: &Disk) -> String {
    let mode = if disk.read_only() { ", read-only" } else { "" };
    format!("live disk '{}'{mode}", disk.name())
}

/// The same of a view.
pub fn describe_view(snapshot: &str, disk: &str) -> String {
    format!("disk '{disk}' as of snapshot '{snapshot}'")
}

fn no_such_export(name: &str) -> Error {
    let why = if name.is_empty() { "there is no default export, give a name that is listed" } else { "no such export" };
    Error::new(errno::ENOENT, format!("export '{}'", name.escape_debug()), why)
}

/// What goes on as long as the core serves the disk; ESHUTDOWN from then on.
fn check_served(is_served: bool, what: &str) -> Result<()> {
    if is_served { Ok(()) } else { Err(Error::new(errno::ESHUTDOWN, what, "it is no longer served")) }
}

#[cfg(test)]
mod tests;
