//! Meta contexts of exports: what is a hole, where content comes from, and what is dirty.
//!
//! Flags are those of the NBD project's `doc/proto.md` ("Metadata querying", `base:allocation`) and of QEMU's
//! `docs/interop/nbd.rst` (`qemu:allocation-depth`, `qemu:dirty-bitmap:NAME`).

use super::{OpenView, check_served};
use crate::error::Result;
use crate::fleece::{BitmapRef, Changes, Disk, Fleece, ShownBitmap};
use crate::nbd::export::{Context, Run};
use crate::storage::BlockStatus;
use parking_lot::Mutex;
use std::any::Any;
use std::collections::BTreeMap;
use std::sync::{Arc, Weak};
use uuid::Uuid;

/// What is a hole, and what reads as zeros.
pub const ALLOCATION: &str = "base:allocation";
/// Where content comes from.
pub const DEPTH: &str = "qemu:allocation-depth";
/// What is dirty, with the bitmap's name behind it.
pub const DIRTY: &str = "qemu:dirty-bitmap:";

/// `NBD_STATE_HOLE` and `NBD_STATE_ZERO`: what reads as zeros may be a hole.
const HOLE_AND_ZERO: u32 = 0b11;
/// QEMU's flag of a dirty run.
const DIRTY_RUN: u32 = 1;
/// Depths: neither the image nor what lies below it has it, the image itself has it, something below it.
const NOWHERE: u32 = 0;
const OWN: u32 = 1;
const BELOW: u32 = 2;

/// What an export is of.
#[derive(Clone)]
pub enum Source {
    /// A live disk. Whoever has this keeps it open.
    Disk(Arc<Disk>),
    /// A frozen view, held.
    View(Arc<OpenView>),
}

/// Which bitmaps an export shows.
pub enum Bitmaps {
    /// Those that were asked for, held from then on, and whose they are: that stays until all of this is gone.
    Given(Vec<(String, Arc<ShownBitmap>)>, Arc<dyn Any + Send + Sync>),
    /// Those of the disk that fit the export; each is held once a client has asked for it.
    OfDisk(Arc<Fleece>, Arc<SharedBitmaps>),
}

/// The contexts of one export.
pub struct Contexts {
    source: Source,
    has_depth: bool,
    bitmaps: Bitmaps,
}

impl Contexts {
    /// Those of a disk or a view.
    pub fn new(source: Source, has_depth: bool, bitmaps: Bitmaps) -> Contexts {
        Contexts { source, has_depth, bitmaps }
    }

    /// Their names, `base:allocation` first.
    pub fn names(&self) -> Vec<String> {
        let mut names = vec![ALLOCATION.to_owned()];
        names.extend(self.has_depth.then(|| DEPTH.to_owned()));
        let mut dirty: Vec<String> = self.points().into_iter().map(|(name, _)| name).collect();
        match &self.bitmaps {
            Bitmaps::Given(given, _) => dirty.extend(given.iter().map(|(name, _)| name.clone())),
            Bitmaps::OfDisk(fleece, shared) => dirty.extend(shared.names(fleece, self.disk_name(), self.is_live())),
        }
        names.extend(dirty.into_iter().map(|name| format!("{DIRTY}{name}")));
        names
    }

    /// One of them; None also where its bits cannot be had.
    pub fn get(&self, name: &str) -> Option<Arc<dyn Context>> {
        if name == ALLOCATION {
            return Some(Arc::new(Allocation(self.source.clone())));
        }
        if name == DEPTH && self.has_depth {
            return Some(Arc::new(Depth(self.source.clone())));
        }
        let name = name.strip_prefix(DIRTY)?;
        if let (Source::View(view), Some((_, point))) =
            (&self.source, self.points().into_iter().find(|(point, _)| point == name))
        {
            return Some(Arc::new(Since { view: view.clone(), point, changes: Mutex::default() }));
        }
        let shown = match &self.bitmaps {
            Bitmaps::Given(given, _) => given.iter().find(|(other, _)| other == name).map(|(_, shown)| shown.clone()),
            Bitmaps::OfDisk(fleece, shared) => shared.show(fleece, self.disk_name(), name, self.is_live()),
        };
        let _of = match &self.bitmaps {
            Bitmaps::Given(_, of) => Some(of.clone()),
            Bitmaps::OfDisk(..) => None,
        };
        Some(Arc::new(Bitmap { shown: shown?, _of }))
    }

    /// The points from which changes of a view are known.
    fn points(&self) -> Vec<(String, Uuid)> {
        match &self.source {
            Source::Disk(_) => Vec::new(),
            Source::View(view) => view.view().since().into_iter().map(|point| (point.name, point.uuid)).collect(),
        }
    }

    fn disk_name(&self) -> &str {
        match &self.source {
            Source::Disk(disk) => disk.name(),
            Source::View(view) => view.view().disk_name(),
        }
    }

    /// Whether what is exported changes.
    fn is_live(&self) -> bool {
        matches!(&self.source, Source::Disk(disk) if !disk.read_only())
    }
}

/// Bitmaps that clients of several sessions see, each of them held once.
#[derive(Default)]
pub struct SharedBitmaps(Mutex<BTreeMap<(String, String), Weak<ShownBitmap>>>);

impl SharedBitmaps {
    /// Those of a disk that can be shown. Of what does not change those alone that do not record, as in QEMU: the others
    /// go on.
    fn names(&self, fleece: &Fleece, disk: &str, is_live: bool) -> Vec<String> {
        let shown = self.0.lock();
        let is_shown = |name: &str| {
            let key = (disk.to_owned(), name.to_owned());
            shown.get(&key).is_some_and(|shown| shown.strong_count() > 0)
        };
        let fits = fleece.bitmap_states(disk).into_iter().filter(|state| {
            let is_users = !state.checkpoint && !state.inconsistent;
            is_users && (is_live || !state.recording) && (!state.busy || is_shown(&state.name))
        });
        fits.map(|state| state.name).collect()
    }

    fn show(&self, fleece: &Fleece, disk: &str, name: &str, is_live: bool) -> Option<Arc<ShownBitmap>> {
        if !self.names(fleece, disk, is_live).iter().any(|other| other == name) {
            return None;
        }
        let mut all = self.0.lock();
        all.retain(|_, shown| shown.strong_count() > 0);
        let key = (disk.to_owned(), name.to_owned());
        if let Some(shown) = all.get(&key).and_then(Weak::upgrade) {
            return Some(shown);
        }
        let shown = fleece.show_bitmap(&BitmapRef::new(disk, name));
        let shown = Arc::new(shown.inspect_err(|e| log::warn!("bitmap '{}': {e}", name.escape_debug())).ok()?);
        all.insert(key, Arc::downgrade(&shown));
        Some(shown)
    }
}

fn status(source: &Source, offset: u64, len: u64) -> Result<BlockStatus> {
    let status = match source {
        Source::Disk(disk) => {
            check_served(!disk.is_closed(), disk.name())?;
            disk.block_status(offset, len)?
        }
        Source::View(view) => {
            check_served(view.view().is_served(), "frozen view")?;
            view.view().block_status(offset, len)?
        }
    };
    // Nothing is known of what a disk lost when it shrank.
    Ok(match status.len.min(len) {
        0 => BlockStatus { len, zero: false },
        run => BlockStatus { len: run, ..status },
    })
}

struct Allocation(Source);

impl Context for Allocation {
    fn run(&self, offset: u64, len: u64) -> Result<Run> {
        let status = status(&self.0, offset, len)?;
        Ok(Run { flags: if status.zero { HOLE_AND_ZERO } else { 0 }, len: status.len })
    }
}

struct Depth(Source);

impl Context for Depth {
    fn run(&self, offset: u64, len: u64) -> Result<Run> {
        let (is_own, run) = match &self.0 {
            Source::Disk(disk) => disk.is_own(offset, len)?,
            Source::View(view) => view.view().is_own(offset, len)?,
        };
        let run = run.clamp(1, len);
        if is_own {
            return Ok(Run { flags: OWN, len: run });
        }
        let status = status(&self.0, offset, run)?;
        Ok(Run { flags: if status.zero { NOWHERE } else { BELOW }, len: status.len })
    }
}

struct Since {
    view: Arc<OpenView>,
    point: Uuid,
    /// Put together at the first question: a client may ask for many contexts and use one.
    changes: Mutex<Option<Arc<Changes>>>,
}

impl Since {
    fn changes(&self) -> Result<Arc<Changes>> {
        let mut changes = self.changes.lock();
        if let Some(known) = &*changes {
            return Ok(known.clone());
        }
        let made = Arc::new(self.view.view().changes(Some(self.point))?);
        *changes = Some(made.clone());
        Ok(made)
    }
}

fn dirty_run((is_dirty, run): (bool, u64), len: u64) -> Run {
    Run { flags: if is_dirty { DIRTY_RUN } else { 0 }, len: run.clamp(1, len) }
}

impl Context for Since {
    fn run(&self, offset: u64, len: u64) -> Result<Run> {
        Ok(dirty_run(self.changes()?.dirty_run(offset, len), len))
    }
}

struct Bitmap {
    shown: Arc<ShownBitmap>,
    /// Behind the bits, so that what shows them goes last.
    _of: Option<Arc<dyn Any + Send + Sync>>,
}

impl Context for Bitmap {
    fn run(&self, offset: u64, len: u64) -> Result<Run> {
        Ok(dirty_run(self.shown.dirty_run(offset, len), len))
    }
}
