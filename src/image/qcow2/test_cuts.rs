//! A file whose power fails after each single call: what a power loss could leave by then is looked at every time.

use crate::error::Result;
use crate::storage::crash::{CrashDisk, CrashFile};
use crate::storage::{BlockStatus, Stamp, Storage};
use parking_lot::Mutex;
use std::fmt;
use std::path::Path;
use std::sync::Arc;

type Look = Box<dyn FnMut(&dyn Storage) + Send>;

/// A [`CrashFile`] that shows its survivors after each write and before each sync.
pub(super) struct Cuts {
    disk: CrashDisk,
    file: CrashFile,
    look: Mutex<Option<Look>>,
    /// Up to how many unsynced sectors all survivors are shown, and how many where there are more.
    shown: (usize, u64),
}

impl Cuts {
    /// A file with what `make` writes into it.
    pub fn new(shown: (usize, u64), make: impl FnOnce(&dyn Storage)) -> Arc<Cuts> {
        let disk = CrashDisk::new();
        let file = disk.open("a").unwrap();
        make(&file);
        file.sync().unwrap();
        Arc::new(Cuts { disk, file, look: Mutex::new(None), shown })
    }

    /// Shows all that could be left, from now on to `look`.
    pub fn watch(&self, look: impl FnMut(&dyn Storage) + Send + 'static) {
        *self.look.lock() = Some(Box::new(look));
        self.cut();
    }

    /// Watches no longer.
    pub fn leave(&self) {
        *self.look.lock() = None;
    }

    fn cut(&self) {
        let mut look = self.look.lock();
        let Some(look) = look.as_mut() else { return };
        match self.disk.exhaustive(self.shown.0) {
            Some(all) => all.for_each(|disk| look(&disk.open("a").unwrap())),
            None => (0..self.shown.1).for_each(|seed| look(&self.disk.survivors(seed).open("a").unwrap())),
        }
    }
}

impl fmt::Debug for Cuts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.disk.fmt(f)
    }
}

impl Storage for Cuts {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.file.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.file.write_at(buf, offset)?;
        self.cut();
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        self.file.sync()?;
        self.cut();
        Ok(())
    }

    fn len(&self) -> Result<u64> {
        self.file.len()
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.file.set_len(len)
    }

    fn punch_hole(&self, offset: u64, len: u64) -> Result<()> {
        self.file.punch_hole(offset, len)
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        self.file.write_zeroes(offset, len)
    }

    fn block_status(&self, offset: u64, len: u64) -> Result<BlockStatus> {
        self.file.block_status(offset, len)
    }

    fn stamp(&self) -> Result<Stamp> {
        self.file.stamp()
    }

    fn path(&self) -> &Path {
        self.file.path()
    }
}
