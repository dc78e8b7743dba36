//! All that a mount has, under the names of its disks (`vda`) and views (`NAME/vda`), as long as it has them.
//!
//! Invariant: **a name never comes to mean another disk.** The empty one stands for the disk of a mount that began with one,
//! whatever disks come and go later: a client that connects again has the disk that it had, or none.

use super::contexts::{Bitmaps, Contexts, SharedBitmaps, Source};
use super::live::{LiveExport, LiveOptions};
use super::view::ViewExport;
use super::{OpenDisk, OpenView, describe_disk, describe_view, find_view, no_such_export, view_name};
use crate::error::Result;
use crate::fleece::Fleece;
use crate::nbd::export::{Export, Exports};
use std::sync::Arc;

/// See the module.
pub struct MountExports {
    fleece: Arc<Fleece>,
    bitmaps: Arc<SharedBitmaps>,
    /// The disk that the empty name stands for.
    default: Option<String>,
}

impl MountExports {
    /// Those of a mount with the disks that it begins with.
    pub fn new(fleece: Arc<Fleece>) -> MountExports {
        let default = match fleece.disks().as_slice() {
            [only] => Some(only.name().to_owned()),
            _ => None,
        };
        MountExports { fleece, bitmaps: Arc::default(), default }
    }

    fn contexts(&self, source: Source) -> Contexts {
        Contexts::new(source, true, Bitmaps::OfDisk(self.fleece.clone(), self.bitmaps.clone()))
    }
}

impl Exports for MountExports {
    fn list(&self) -> Vec<(String, String)> {
        let mut list: Vec<_> =
            self.fleece.disks().iter().map(|disk| (disk.name().to_owned(), describe_disk(disk))).collect();
        for snapshot in self.fleece.snapshots() {
            list.extend(snapshot.views().iter().map(|view| {
                let disk = view.disk_name();
                (view_name(snapshot.name(), disk), describe_view(snapshot.name(), disk))
            }));
        }
        list.sort();
        list
    }

    fn canonical(&self, name: &str) -> String {
        let default = self.default.as_deref().filter(|_| name.is_empty());
        default.unwrap_or(name).to_owned()
    }

    fn open(&self, name: &str) -> Result<Arc<dyn Export>> {
        if !name.contains('/') {
            let disk = OpenDisk::open(&self.fleece, name).map_err(|_| no_such_export(name))?;
            let contexts = self.contexts(Source::Disk(disk.disk().clone()));
            let options = LiveOptions { description: describe_disk(disk.disk()), ..LiveOptions::default() };
            return Ok(Arc::new(LiveExport::new(disk, options, contexts)));
        }
        let (snapshot, disk) = find_view(&self.fleece, name).ok_or_else(|| no_such_export(name))?;
        let view = Arc::new(OpenView::open(&snapshot, &disk)?);
        let contexts = self.contexts(Source::View(view.clone()));
        Ok(Arc::new(ViewExport::new(view, describe_view(snapshot.name(), &disk), contexts)))
    }
}
