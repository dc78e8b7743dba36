//! A file in memory that counts what is done to it: work is bounded, and who only looks changes nothing.

use fleecefs::error::Result;
use fleecefs::storage::{BlockStatus, MemFile, SharedStorage, Stamp, Storage};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// What a call costs beside its bytes.
const CALL_COST_BYTES: u64 = 512;

/// The file.
#[derive(Debug)]
pub struct Meter {
    file: MemFile,
    /// What may still be transferred.
    budget_bytes: AtomicU64,
    changes: AtomicU64,
}

impl Meter {
    /// A file with this content, nothing of which is shared with `file`'s other handles from now on.
    pub fn new(file: MemFile) -> Arc<Meter> {
        Arc::new(Meter { file, budget_bytes: AtomicU64::new(u64::MAX), changes: AtomicU64::new(0) })
    }

    /// Sets what may be transferred from now on; a panic tells who takes more.
    pub fn allow(&self, bytes: u64) {
        self.budget_bytes.store(bytes, Relaxed);
    }

    /// Number of calls that changed the file.
    pub fn changes(&self) -> u64 {
        self.changes.load(Relaxed)
    }

    /// The file for an image to be over.
    pub fn shared(self: &Arc<Self>) -> SharedStorage {
        self.clone()
    }

    fn spend(&self, bytes: u64) {
        let left = self.budget_bytes.load(Relaxed);
        let cost = bytes.saturating_add(CALL_COST_BYTES);
        assert!(left >= cost, "more work than an input of this size may make");
        self.budget_bytes.store(left - cost, Relaxed);
    }

    fn change(&self, bytes: u64) {
        self.changes.fetch_add(1, Relaxed);
        self.spend(bytes);
    }
}

impl Storage for Meter {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.spend(buf.len() as u64);
        self.file.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.change(buf.len() as u64);
        self.file.write_at(buf, offset)
    }

    fn sync(&self) -> Result<()> {
        self.change(0);
        self.file.sync()
    }

    fn len(&self) -> Result<u64> {
        self.file.len()
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.change(0);
        self.file.set_len(len)
    }

    fn punch_hole(&self, offset: u64, len: u64) -> Result<()> {
        self.change(0);
        self.file.punch_hole(offset, len)
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        self.change(0);
        // Allocated zeros would fill the memory of the fake disk.
        self.file.punch_hole(offset, len)
    }

    fn block_status(&self, offset: u64, len: u64) -> Result<BlockStatus> {
        self.spend(0);
        self.file.block_status(offset, len)
    }

    fn stamp(&self) -> Result<Stamp> {
        self.file.stamp()
    }

    fn path(&self) -> &Path {
        self.file.path()
    }
}
