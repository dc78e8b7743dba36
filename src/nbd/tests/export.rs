//! Exports in memory that can be told to hang, fail and panic.

use crate::error::{Error, Result, errno};
use crate::nbd::export::{Context, Export, Exports, Run, Zeroes};
use parking_lot::{Condvar, Mutex};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

pub const SIZE: u64 = 4 << 20;
/// Reads from here on fail.
pub const BAD: u64 = 3 << 20;
/// A read of exactly this offset panics.
pub const PANIC: u64 = (2 << 20) + 13;
/// Reads from here on hang while [`Disk::hang`] is set.
pub const HANG: u64 = 1 << 20;
/// Size of the export `huge`, which holds nothing.
pub const HUGE: u64 = 1 << 50;

/// What the exports of a server are.
#[derive(Default)]
pub struct Shelf {
    pub disk: Arc<Disk>,
}

/// Content and history.
#[derive(Default)]
pub struct Disk {
    pub bytes: Mutex<Vec<u8>>,
    pub flushes: AtomicUsize,
    pub zeroes: Mutex<Vec<(u64, u64, bool, bool)>>,
    pub trims: AtomicUsize,
    pub hang: Mutex<bool>,
    pub hanging: AtomicUsize,
    pub changed: Condvar,
}

impl Disk {
    pub fn set_hang(&self, hang: bool) {
        *self.hang.lock() = hang;
        self.changed.notify_all();
    }

    pub fn hanging(&self) -> usize {
        self.hanging.load(Ordering::SeqCst)
    }
}

struct Open {
    disk: Arc<Disk>,
    read_only: bool,
    size: u64,
}

impl Exports for Shelf {
    fn list(&self) -> Vec<(String, String)> {
        vec![("vda".into(), "live".into()), ("s/vda".into(), String::new())]
    }

    fn open(&self, name: &str) -> Result<Arc<dyn Export>> {
        let (read_only, size) = match name {
            "vda" => (false, SIZE),
            "s/vda" => (true, SIZE),
            "huge" => (false, HUGE),
            "slow" => {
                let mut hang = self.disk.hang.lock();
                while *hang {
                    self.disk.changed.wait(&mut hang);
                }
                (false, SIZE)
            }
            "busy" => return Err(Error::new(errno::EBUSY, "export", "is busy")),
            _ => return Err(Error::new(errno::ENOENT, "export", "there is none")),
        };
        self.disk.bytes.lock().resize(SIZE as usize, 0);
        Ok(Arc::new(Open { disk: self.disk.clone(), read_only, size }))
    }
}

impl Export for Open {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn description(&self) -> String {
        "in memory".into()
    }

    fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        assert!(offset != PANIC, "as the test asks for");
        if offset >= BAD {
            return Err(Error::new(errno::EIO, "read", "bad medium").at_offset(offset));
        }
        if offset >= HANG {
            let mut hang = self.disk.hang.lock();
            self.disk.hanging.fetch_add(1, Ordering::SeqCst);
            while *hang {
                self.disk.changed.wait(&mut hang);
            }
            self.disk.hanging.fetch_sub(1, Ordering::SeqCst);
        }
        let bytes = self.disk.bytes.lock();
        buf.copy_from_slice(&bytes[offset as usize..offset as usize + buf.len()]);
        Ok(())
    }

    fn write(&self, data: &[u8], offset: u64) -> Result<()> {
        self.disk.bytes.lock()[offset as usize..offset as usize + data.len()].copy_from_slice(data);
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, len: u64, how: Zeroes) -> Result<()> {
        self.disk.zeroes.lock().push((offset, len, how.no_hole, how.only_fast));
        if how.only_fast && how.no_hole {
            return Err(Error::new(errno::EOPNOTSUPP, "write zeroes", "not fast"));
        }
        let mut bytes = self.disk.bytes.lock();
        let end = (offset + len).min(SIZE) as usize;
        bytes.get_mut(offset as usize..end).unwrap_or_default().fill(0);
        Ok(())
    }

    fn trim(&self, _: u64, _: u64) -> Result<()> {
        self.disk.trims.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn cache(&self, _: u64, _: u64) -> Result<()> {
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        self.disk.flushes.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn contexts(&self) -> Vec<String> {
        ["base:allocation", "qemu:dirty-bitmap:a", "qemu:dirty-bitmap:b", "qemu:other"].map(String::from).into()
    }

    fn context(&self, name: &str) -> Option<Arc<dyn Context>> {
        Some(Arc::new(Stripes { all: name.ends_with('n'), size: self.size }))
    }
}

/// Pieces of 512 bytes; flags change every two of them, or never.
struct Stripes {
    all: bool,
    size: u64,
}

impl Context for Stripes {
    fn run(&self, offset: u64, len: u64) -> Result<Run> {
        assert!(len > 0 && offset + len <= self.size);
        if self.all {
            return Ok(Run { flags: 0, len });
        }
        Ok(Run { flags: (offset / 1024 % 2) as u32, len: (512 - offset % 512).min(len) })
    }
}
