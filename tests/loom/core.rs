//! The real core under loom: one disk of two chunks, each of which is one relaxed cell in the image.
//!
//! Setting up a mount takes thousands of steps of one thread, which loom repeats for every execution; what is explored
//! is what follows, up to a bound of preemptions that every known bug needs fewer of.

use super::explore::{acts, always};
use fleecefs::error::{Result, errno};
use fleecefs::fleece::{Environment, Fleece, Options, Place, SnapshotRequest, View};
use fleecefs::image::raw::RawImage;
use fleecefs::storage::dir::MemDir;
use fleecefs::storage::faulty::{Call, FaultPlan};
use fleecefs::storage::shm::HeapShmRoot;
use fleecefs::storage::{BlockStatus, Stamp, Storage};
use fleecefs::sync::full_fence;
use loom::sync::atomic::{AtomicU64, Ordering};
use std::path::Path;
use std::sync::Arc;

const PAGE: usize = 4096;
const PAGES: usize = 2;
const OLD: u8 = 1;
const NEW: u8 = 2;
/// Every known bug needs fewer.
const PREEMPTIONS: usize = 4;

/// An image in which all bytes of a page are one relaxed cell. Transfers are of whole pages.
#[derive(Debug)]
struct Cells([AtomicU64; PAGES]);

impl Cells {
    fn new() -> Cells {
        Cells([(); PAGES].map(|()| AtomicU64::new(u64::from(OLD))))
    }

    fn cells(&self, offset: u64, len: usize) -> &[AtomicU64] {
        &self.0[offset as usize / PAGE..(offset as usize + len) / PAGE]
    }
}

impl Storage for Cells {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        for (cell, page) in self.cells(offset, buf.len()).iter().zip(buf.chunks_mut(PAGE)) {
            page.fill(cell.load(Ordering::Relaxed) as u8);
        }
        Ok(())
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        for (cell, page) in self.cells(offset, buf.len()).iter().zip(buf.chunks(PAGE)) {
            cell.store(u64::from(page[0]), Ordering::Relaxed);
        }
        Ok(())
    }
    fn sync(&self) -> Result<()> {
        Ok(())
    }
    fn len(&self) -> Result<u64> {
        Ok((PAGES * PAGE) as u64)
    }
    fn set_len(&self, _len: u64) -> Result<()> {
        Ok(())
    }
    fn punch_hole(&self, offset: u64, len: u64) -> Result<()> {
        self.cells(offset, len as usize).iter().for_each(|cell| cell.store(0, Ordering::Relaxed));
        Ok(())
    }
    fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        self.punch_hole(offset, len)
    }
    fn block_status(&self, offset: u64, _len: u64) -> Result<BlockStatus> {
        let zero = self.cells(offset, PAGE)[0].load(Ordering::Relaxed) == 0;
        Ok(BlockStatus { len: PAGE as u64, zero })
    }
    fn stamp(&self) -> Result<Stamp> {
        Ok(Stamp { dev: 0, ino: 1, size: (PAGES * PAGE) as u64, mtime_ns: 0, ctime_ns: 0 })
    }
    fn path(&self) -> &Path {
        Path::new("a")
    }
}

/// A mount of the disk with a snapshot `s` of it.
struct Rig {
    fleece: Arc<Fleece>,
    image: Arc<Cells>,
    view: Arc<View>,
    stores: Arc<FaultPlan>,
}

impl Rig {
    fn new() -> Arc<Rig> {
        let env = Environment { shm: Arc::new(HeapShmRoot::new()), background: false };
        let fleece = Fleece::with_environment(Options::default(), env);
        let cells = Arc::new(Cells::new());
        let image = RawImage::over(cells.clone(), false).unwrap();
        let stores = Arc::new(FaultPlan::new());
        let dir = MemDir::new();
        let place = Place {
            state: Arc::new(dir.clone()),
            stores: Arc::new(dir.with_faults(stores.clone())),
            shm: None,
            lock: None,
        };
        fleece.attach("a", Arc::new(image), place).unwrap();
        freeze(&fleece, "s");
        // What the first release makes is handed over by a standard library's type, which loom knows nothing of.
        fleece.release("s", "a", PAGE as u64, PAGE as u64).unwrap();
        let view = fleece.snapshot("s").unwrap().view("a").unwrap().clone();
        Arc::new(Rig { fleece, image: cells, view, stores })
    }

    fn write(&self) {
        assert_eq!(self.fleece.disk("a").unwrap().write(&[NEW; PAGE], 0).unwrap(), PAGE);
    }
}

fn freeze(fleece: &Fleece, name: &str) {
    fleece.create_snapshot(&SnapshotRequest { name: name.to_owned(), ..SnapshotRequest::default() }).unwrap();
}

/// What a read of the view's first page gives: its first byte, or None for EIO.
fn read(view: &View) -> Option<u8> {
    let mut bytes = [0xee; PAGE];
    match view.read(&mut bytes, 0) {
        Ok(_) => Some(bytes[0]),
        Err(e) => {
            assert_eq!(e.errno(), errno::EIO);
            None
        }
    }
}

/// `guest` beside a reader of the view, who must find what `right` says.
fn beside(guest: fn(&Rig), right: fn(&Rig) -> bool) -> bool {
    always(Some(PREEMPTIONS), move || {
        let rig = Rig::new();
        let other = rig.clone();
        [acts(move || guest(&other)), Box::new(move || right(&rig))]
    })
}

#[test]
fn a_view_reads_the_frozen_byte_beside_a_first_write() {
    assert!(beside(Rig::write, |rig| read(&rig.view) == Some(OLD)));
}

#[test]
fn a_view_sees_no_hole_beside_a_first_discard() {
    assert!(beside(
        |rig| rig.fleece.disk("a").unwrap().discard(0, PAGE as u64).unwrap(),
        |rig| !rig.view.block_status(0, PAGE as u64).unwrap().zero
    ));
}

/// The second guest finds the chunk copied by the first, and writes before it. With two preemptions, a quarter of an hour
/// or more: at full size only.
#[test]
fn a_view_reads_the_frozen_byte_beside_two_writers() {
    let preemptions = if std::env::var_os("FLEECEFS_FULL").is_some() { 2 } else { 1 };
    assert!(always(Some(preemptions), || {
        let rig = Rig::new();
        let (first, second) = (rig.clone(), rig.clone());
        [acts(move || first.write()), acts(move || second.write()), Box::new(move || read(&rig.view) == Some(OLD))]
    }));
}

/// The copy goes to a layer that the reader's first walk does not know.
#[test]
fn a_view_reads_the_frozen_byte_beside_a_freeze_and_a_write() {
    assert!(beside(
        |rig| {
            freeze(&rig.fleece, "t");
            rig.write();
        },
        |rig| read(&rig.view) == Some(OLD)
    ));
}

#[test]
fn a_view_answers_the_frozen_byte_or_eio_when_the_store_fails() {
    assert!(beside(
        |rig| {
            rig.stores.fail_all(Call::Write, errno::EIO);
            rig.write();
        },
        |rig| matches!(read(&rig.view), Some(OLD) | None)
    ));
}

#[test]
fn a_view_answers_the_frozen_byte_or_eio_beside_a_release() {
    assert!(beside(
        |rig| {
            rig.fleece.release("s", "a", 0, PAGE as u64).unwrap();
            rig.write();
        },
        |rig| matches!(read(&rig.view), Some(OLD) | None)
    ));
}

/// I6, for whoever looks at bitmaps that record without the gate.
#[test]
fn a_guests_write_is_seen_with_its_mark() {
    assert!(beside(Rig::write, |rig| {
        if rig.image.0[0].load(Ordering::Relaxed) == u64::from(OLD) {
            return true;
        }
        full_fence();
        rig.fleece.checkpoints()[0].disks[0].dirty > 0
    }));
}
