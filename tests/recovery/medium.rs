//! A directory that is cut off at the n-th change: by a kill, or by a medium that fails from then on.

use fleecefs::error::{Error, Result, errno};
use fleecefs::storage::{BlockStatus, Dir, SharedStorage, Space, Stamp, Storage};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

/// What unwinds through the product where a kill would stop it.
pub struct Killed;

/// What happens at the cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// The thread goes no further, before the change is made.
    Kill,
    /// The change and all later ones fail and are not made.
    Fail,
    /// This change alone fails and is not made.
    FailOnce,
    /// As `Fail`, but the first one is made although it fails, as a write whose sync fails may be.
    FailMade,
}

/// Runs before a change, with its number.
type Hook = Box<dyn Fn(u64) + Send>;

/// Counts the changes of all directories that share it, and cuts at one of them.
pub struct Cut {
    mode: Mode,
    /// What others do meanwhile.
    meanwhile: Mutex<Option<Hook>>,
    /// The number of the change, from 1; 0 for none.
    at: AtomicU64,
    seen: AtomicU64,
    struck: AtomicBool,
}

impl std::fmt::Debug for Cut {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Cut({:?})", self.mode)
    }
}

impl Cut {
    pub fn new(mode: Mode) -> Arc<Cut> {
        let (at, seen) = (AtomicU64::new(0), AtomicU64::new(0));
        Arc::new(Cut { mode, meanwhile: Mutex::new(None), at, seen, struck: AtomicBool::new(false) })
    }

    /// Has `hook` run before every change up to the cut; `None`: no more.
    pub fn meanwhile(&self, hook: Option<Hook>) {
        *self.meanwhile.lock().unwrap() = hook;
    }

    /// Cuts at the `n`-th change from now on.
    pub fn arm(&self, n: u64) {
        self.seen.store(0, Ordering::SeqCst);
        self.at.store(n, Ordering::SeqCst);
    }

    /// Whether it was cut.
    pub fn struck(&self) -> bool {
        self.struck.load(Ordering::SeqCst)
    }

    fn pass(&self, path: &Path, change: impl FnOnce() -> Result<()>) -> Result<()> {
        let at = self.at.load(Ordering::SeqCst);
        let number = self.seen.fetch_add(1, Ordering::SeqCst) + 1;
        let past = self.mode == Mode::FailOnce && number > at;
        if at == 0 || number < at || past {
            if let Some(hook) = &*self.meanwhile.lock().unwrap()
                && !past
            {
                hook(number);
            }
            return change();
        }
        self.struck.store(true, Ordering::SeqCst);
        match self.mode {
            Mode::Kill => std::panic::resume_unwind(Box::new(Killed)),
            Mode::FailMade if number == at => change()?,
            Mode::Fail | Mode::FailOnce | Mode::FailMade => (),
        }
        Err(Error::new(errno::EIO, "change", "the medium is gone").at_path(path))
    }
}

/// A directory below a [`Cut`].
#[derive(Debug)]
pub struct CutDir {
    pub inner: Arc<dyn Dir>,
    pub cut: Arc<Cut>,
}

#[derive(Debug)]
struct CutFile {
    inner: SharedStorage,
    cut: Arc<Cut>,
}

impl CutDir {
    fn file(&self, inner: SharedStorage) -> SharedStorage {
        Arc::new(CutFile { inner, cut: self.cut.clone() })
    }

    fn pass(&self, name: &str, change: impl FnOnce() -> Result<()>) -> Result<()> {
        self.cut.pass(Path::new(name), change)
    }
}

impl Dir for CutDir {
    fn open(&self, name: &str) -> Result<SharedStorage> {
        self.inner.open(name).map(|file| self.file(file))
    }
    fn create(&self, name: &str) -> Result<SharedStorage> {
        let mut made = None;
        self.pass(name, || {
            made = Some(self.inner.create(name)?);
            Ok(())
        })?;
        Ok(self.file(made.unwrap()))
    }
    fn exists(&self, name: &str) -> Result<bool> {
        self.inner.exists(name)
    }
    fn remove(&self, name: &str) -> Result<()> {
        self.pass(name, || self.inner.remove(name))
    }
    fn rename(&self, from: &str, to: &str) -> Result<()> {
        self.pass(from, || self.inner.rename(from, to))
    }
    fn list(&self, sub: &str) -> Result<Vec<String>> {
        self.inner.list(sub)
    }
    fn sync(&self) -> Result<()> {
        self.pass("", || self.inner.sync())
    }
    fn space(&self) -> Result<Space> {
        self.inner.space()
    }
    fn path(&self, name: &str) -> PathBuf {
        self.inner.path(name)
    }
}

impl CutFile {
    fn pass(&self, change: impl FnOnce() -> Result<()>) -> Result<()> {
        self.cut.pass(self.inner.path(), change)
    }
}

impl Storage for CutFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.inner.read_at(buf, offset)
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.pass(|| self.inner.write_at(buf, offset))
    }
    fn sync(&self) -> Result<()> {
        self.pass(|| self.inner.sync())
    }
    fn len(&self) -> Result<u64> {
        self.inner.len()
    }
    fn set_len(&self, len: u64) -> Result<()> {
        self.pass(|| self.inner.set_len(len))
    }
    fn punch_hole(&self, offset: u64, len: u64) -> Result<()> {
        self.pass(|| self.inner.punch_hole(offset, len))
    }
    fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        self.pass(|| self.inner.write_zeroes(offset, len))
    }
    fn block_status(&self, offset: u64, len: u64) -> Result<BlockStatus> {
        self.inner.block_status(offset, len)
    }
    fn stamp(&self) -> Result<Stamp> {
        self.inner.stamp()
    }
    fn path(&self) -> &Path {
        self.inner.path()
    }
}
