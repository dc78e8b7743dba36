//! Exports that were asked for one by one: QEMU's `block-export-add` and `block-export-del`.
//!
//! Rules, their order and texts are those of QEMU 10 (`block/export/export.c`, `nbd/server.c`).
//!
//! Invariants:
//! - An export of a live disk keeps it open from the beginning, with or without clients; one of a view does not hold the
//!   snapshot: that goes when its user says so, is no longer listed here from then on, and stays valid for those who are
//!   connected. Such an export itself ends when it is deleted, as any other does.
//! - What an export holds (disk, bitmaps) is free before anybody is told that it is gone; it goes when the last session
//!   of it does, at the latest.

use super::contexts::{Bitmaps, Contexts, Source};
use super::live::{LiveExport, LiveOptions};
use super::view::ViewExport;
use super::{OpenDisk, OpenView, describe_disk, describe_view, find_view, no_such_export};
use crate::error::{Result, errno};
use crate::fleece::{BitmapRef, Fleece, Refused, ShownBitmap, Snapshot};
use crate::nbd::export::{Export, Exports};
use parking_lot::Mutex;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};
use uuid::Uuid;

/// Longest name and description (`NBD_MAX_STRING_SIZE`).
const STRING_MAX_BYTES: usize = 4096;
/// How long a session may take to go whose client has closed its socket: its export is not in use.
const LEAVE_GRACE: Duration = Duration::from_millis(500);

/// A bitmap as it is named.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BitmapName {
    /// Of the exported node.
    Own(String),
    /// Of the node that is named.
    Of(BitmapRef),
}

/// What an export is to be.
#[derive(Debug, Clone, Default)]
pub struct ExportSpec {
    /// Its identity.
    pub id: String,
    /// A disk, or `NAME/DISK` for a view.
    pub node: String,
    /// What clients call it.
    pub name: String,
    /// What clients are told; None: what it is.
    pub description: Option<String>,
    /// Whether clients may write.
    pub writable: bool,
    /// Whether a node that is read-only is exported so though `writable` is said, and not refused.
    pub downgrade: bool,
    /// Whether each write is durable when it is answered.
    pub writethrough: bool,
    /// Bitmaps that clients see; of views their since-points need not be named.
    pub bitmaps: Vec<BitmapName>,
    /// Whether clients see where content comes from.
    pub allocation_depth: bool,
}

/// A row of `query-block-exports`, and of the status.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportInfo {
    /// Its identity.
    pub id: String,
    /// The node.
    pub node: String,
    /// What clients call it.
    pub name: String,
    /// Whether clients may write.
    pub writable: bool,
    /// No new client comes: it was deleted and has clients, or its snapshot was dropped.
    pub is_ending: bool,
}

type Checked<T> = std::result::Result<T, Refused>;
/// Told of the id of each export that is gone; must not wait.
type OnGone = Arc<dyn Fn(&str) + Send + Sync>;

/// See the module.
pub struct ExportTable {
    fleece: Arc<Fleece>,
    on_gone: OnGone,
    table: Mutex<Table>,
}

#[derive(Default)]
struct Table {
    /// Newest last.
    exports: Vec<Arc<Exported>>,
    /// Deleted, while sessions of them remain.
    ending: Vec<(ExportInfo, Weak<Exported>)>,
}

/// An export with what it holds. The fields go in this order.
struct Exported {
    spec: ExportSpec,
    of: Of,
    bitmaps: Vec<(String, Arc<ShownBitmap>)>,
    _gone: Gone,
}

enum Of {
    Disk(OpenDisk),
    View { snapshot: Uuid, disk: String },
}

struct Gone {
    id: String,
    told: OnGone,
}

impl Drop for Gone {
    fn drop(&mut self) {
        (self.told)(&self.id);
    }
}

fn refused(errno: i32, text: impl Into<String>) -> Refused {
    Refused { index: 0, errno, text: text.into(), hint: None }
}

impl Exported {
    fn info(&self) -> ExportInfo {
        ExportInfo {
            id: self.spec.id.clone(),
            node: self.spec.node.clone(),
            name: self.spec.name.clone(),
            writable: self.spec.writable,
            is_ending: false,
        }
    }

    fn snapshot(&self, fleece: &Fleece) -> Option<Arc<Snapshot>> {
        let Of::View { snapshot, .. } = &self.of else { return None };
        fleece.snapshots().into_iter().find(|other| other.uuid() == *snapshot)
    }

    /// Whether a new client can have it.
    fn is_there(&self, fleece: &Fleece) -> bool {
        matches!(self.of, Of::Disk(_)) || self.snapshot(fleece).is_some()
    }

    fn description(&self) -> String {
        match (&self.spec.description, &self.of) {
            (Some(text), _) => text.clone(),
            (None, Of::Disk(disk)) => describe_disk(disk.disk()),
            (None, Of::View { disk, .. }) => {
                describe_view(self.spec.node.rsplit_once('/').map_or("", |(snapshot, _)| snapshot), disk)
            }
        }
    }
}

impl ExportTable {
    /// An empty one. `on_gone` is told of each export that has gone, from whatever thread, and must not wait.
    pub fn new(fleece: Arc<Fleece>, on_gone: impl Fn(&str) + Send + Sync + 'static) -> ExportTable {
        ExportTable { fleece, on_gone: Arc::new(on_gone), table: Mutex::default() }
    }

    /// Adds an export. `is_running`: whether a server serves this table.
    pub fn add(&self, mut spec: ExportSpec, is_running: bool) -> Checked<()> {
        let mut table = self.table.lock();
        table.forget_gone();
        if table.has_id(&spec.id) {
            return Err(refused(errno::EEXIST, format!("Block export id '{}' is already in use", spec.id)));
        }
        let of = self.find(&mut spec)?;
        if !is_running {
            return Err(refused(errno::EINVAL, "NBD server not running"));
        }
        if spec.name.len() > STRING_MAX_BYTES {
            return Err(refused(errno::EINVAL, format!("export name '{}' too long", spec.name)));
        }
        if let Some(text) = spec.description.as_ref().filter(|text| text.len() > STRING_MAX_BYTES) {
            return Err(refused(errno::EINVAL, format!("description '{text}' too long")));
        }
        if table.exports.iter().any(|other| other.spec.name == spec.name) {
            let text = format!("NBD server already has export named '{}'", spec.name);
            return Err(refused(errno::EEXIST, text));
        }
        let bitmaps = self.bitmaps(&spec, &of)?;
        let _gone = Gone { id: spec.id.clone(), told: self.on_gone.clone() };
        log::info!("NBD: '{}' is exported as '{}'", spec.node, spec.name.escape_debug());
        table.exports.push(Arc::new(Exported { spec, of, bitmaps, _gone }));
        Ok(())
    }

    /// The node, open where it is a disk. What cannot be written to is not writable.
    fn find(&self, spec: &mut ExportSpec) -> Checked<Of> {
        let (of, read_only) = match find_view(&self.fleece, &spec.node) {
            Some((snapshot, disk)) => (Of::View { snapshot: snapshot.uuid(), disk }, true),
            None => {
                let text = format!("Cannot find device='' nor node-name='{}'", spec.node);
                let disk = OpenDisk::open(&self.fleece, &spec.node).map_err(|_| refused(errno::ENOENT, text))?;
                let read_only = disk.disk().read_only();
                (Of::Disk(disk), read_only)
            }
        };
        if spec.writable && read_only && !spec.downgrade {
            return Err(refused(errno::EROFS, "Cannot export read-only node as writable"));
        }
        spec.writable &= !read_only;
        Ok(of)
    }

    /// The bitmaps that are asked for, all held or none. A view's since-points come by themselves.
    fn bitmaps(&self, spec: &ExportSpec, of: &Of) -> Checked<Vec<(String, Arc<ShownBitmap>)>> {
        let (disk, points) = match of {
            Of::Disk(disk) => (disk.disk().name().to_owned(), Vec::new()),
            Of::View { disk, .. } => {
                let view =
                    find_view(&self.fleece, &spec.node).and_then(|(snapshot, _)| snapshot.view(disk).cloned().ok());
                (disk.clone(), view.map(|view| view.since()).unwrap_or_default())
            }
        };
        let mut wanted: Vec<String> = Vec::new();
        for bitmap in &spec.bitmaps {
            let name = self.check_bitmap(spec, &disk, bitmap)?;
            if !points.iter().any(|point| point.name == name) && !wanted.contains(&name) {
                self.check_no_checkpoint(&disk, &name)?;
                wanted.push(name);
            }
        }
        let shown = wanted.into_iter().map(|name| {
            let shown = self.fleece.show_bitmap(&BitmapRef::new(&disk, &name))?;
            Ok((name, Arc::new(shown)))
        });
        shown.collect()
    }

    /// The name of a bitmap of `disk` that there is.
    fn check_bitmap(&self, spec: &ExportSpec, disk: &str, bitmap: &BitmapName) -> Checked<String> {
        let find = |name: &str| self.fleece.bitmap_states(disk).into_iter().find(|state| state.name == name);
        match bitmap {
            BitmapName::Own(name) => {
                let found =
                    find(name).ok_or_else(|| refused(errno::ENOENT, format!("Bitmap '{name}' is not found")))?;
                let is_written = self.fleece.disk(disk).is_ok_and(|disk| !disk.read_only());
                if !spec.writable && is_written && found.recording && !found.checkpoint {
                    let text = format!("Enabled bitmap '{name}' incompatible with readonly export");
                    return Err(refused(errno::EINVAL, text));
                }
                Ok(name.clone())
            }
            BitmapName::Of(BitmapRef { disk: node, name }) => {
                if node != disk && *node != spec.node {
                    if self.fleece.disk(node).is_err() && find_view(&self.fleece, node).is_none() {
                        return Err(refused(errno::ENOENT, format!("Node '{node}' not found")));
                    }
                    let text = format!("Bitmap '{name}' is of node '{node}', and not of '{}'", spec.node);
                    return Err(refused(errno::EINVAL, text));
                }
                find(name).ok_or_else(|| refused(errno::ENOENT, format!("Dirty bitmap '{name}' not found")))?;
                Ok(name.clone())
            }
        }
    }

    /// A checkpoint's own bitmap has what changed until the next one, and no later.
    fn check_no_checkpoint(&self, disk: &str, name: &str) -> Checked<()> {
        let states = self.fleece.bitmap_states(disk);
        if !states.iter().any(|state| state.name == name && state.checkpoint) {
            return Ok(());
        }
        let text = format!("Bitmap '{name}' belongs to checkpoint '{name}' and cannot be exported");
        let hint = "take a snapshot and export its view, which shows what changed since each checkpoint".to_owned();
        Err(Refused { hint: Some(hint), ..refused(errno::EINVAL, text) })
    }

    /// Takes an export away: with `is_hard` also from its clients, for which the caller calls `disconnect` then, by the
    /// name that this gives; else only where it has none.
    pub fn remove(&self, id: &str, is_hard: bool) -> Checked<String> {
        let deadline = Instant::now() + LEAVE_GRACE;
        loop {
            let mut table = self.table.lock();
            table.forget_gone();
            let Some(index) = table.exports.iter().position(|export| export.spec.id == id) else {
                let text = match table.has_id(id) {
                    true => format!("Export '{id}' is already shutting down"),
                    false => format!("Export '{id}' is not found"),
                };
                return Err(refused(errno::ENOENT, text));
            };
            // Sessions come by `open` alone, which takes the lock.
            let is_used = table.exports.get(index).is_some_and(|export| Arc::strong_count(export) > 1);
            if !is_used || is_hard {
                let export = table.take(index);
                drop(table);
                log::info!("NBD: '{}' is no longer exported", export.spec.name.escape_debug());
                return Ok(export.spec.name.clone());
            }
            drop(table);
            if Instant::now() >= deadline {
                let hint = Some("Use mode='hard' to force client disconnect".to_owned());
                return Err(Refused { hint, ..refused(errno::EBUSY, format!("export '{id}' still in use")) });
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Takes all exports away, the newest first; the server has ended, or ends their sessions.
    pub fn clear(&self) {
        loop {
            let mut table = self.table.lock();
            let Some(last) = table.exports.len().checked_sub(1) else { return };
            let export = table.take(last);
            drop(table);
            drop(export);
        }
    }

    /// All exports, newest first, with those that were deleted and still have clients.
    pub fn infos(&self) -> Vec<ExportInfo> {
        let mut table = self.table.lock();
        table.forget_gone();
        let ending = table.ending.iter().map(|(info, _)| info.clone());
        let there = table.exports.iter().map(|export| {
            let is_ending = !export.is_there(&self.fleece);
            ExportInfo { is_ending, ..export.info() }
        });
        let mut infos: Vec<_> = ending.chain(there).collect();
        infos.reverse();
        infos
    }
}

impl Table {
    fn forget_gone(&mut self) {
        self.ending.retain(|(_, export)| export.strong_count() > 0);
    }

    fn has_id(&self, id: &str) -> bool {
        self.exports.iter().any(|export| export.spec.id == id) || self.ending.iter().any(|(info, _)| info.id == id)
    }

    fn take(&mut self, index: usize) -> Arc<Exported> {
        let export = self.exports.remove(index);
        self.ending.push((ExportInfo { is_ending: true, ..export.info() }, Arc::downgrade(&export)));
        export
    }
}

impl Exports for ExportTable {
    fn list(&self) -> Vec<(String, String)> {
        let exports = self.table.lock().exports.clone();
        let there = exports.iter().filter(|export| export.is_there(&self.fleece));
        let mut list: Vec<_> = there.map(|export| (export.spec.name.clone(), export.description())).collect();
        list.sort();
        list
    }

    fn open(&self, name: &str) -> Result<Arc<dyn Export>> {
        let table = self.table.lock();
        let found = table.exports.iter().find(|export| export.spec.name == name).cloned();
        let of = found.ok_or_else(|| no_such_export(name))?;
        drop(table);
        let contexts = |source| {
            let given = Bitmaps::Given(of.bitmaps.clone(), of.clone());
            Contexts::new(source, of.spec.allocation_depth, given)
        };
        let description = of.description();
        match &of.of {
            Of::Disk(disk) => {
                let contexts = contexts(Source::Disk(disk.disk().clone()));
                let (read_only, writethrough) = (!of.spec.writable, of.spec.writethrough);
                let options = LiveOptions { read_only, writethrough, description };
                Ok(Arc::new(LiveExport::new(disk.again(), options, contexts)))
            }
            Of::View { disk, .. } => {
                let snapshot = of.snapshot(&self.fleece).ok_or_else(|| no_such_export(name))?;
                let view = Arc::new(OpenView::open(&snapshot, disk)?);
                let contexts = contexts(Source::View(view.clone()));
                Ok(Arc::new(ViewExport::new(view, description, contexts)))
            }
        }
    }
}
