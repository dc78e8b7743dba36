//! Directories of files behind a trait, so that whole state directories run without a file system.

use super::faulty::{Call, Faulty};
use super::names::{Names, check_name, parent_of};
use super::os::{self, OpenOptions, OsFile};
use super::{FaultPlan, MemFile, SharedStorage, Space};
use crate::error::{Error, Result, errno};
use parking_lot::Mutex;
use std::collections::BTreeSet;
use std::fmt::Debug;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A directory of files. Names are paths relative to it, of plain components (`layers/ID/store.raw`): anything that
/// could lead out of it is EINVAL.
///
/// What `create`, `remove` and `rename` did is durable only after [`Dir::sync`], which says nothing of the files'
/// content: that is their own `sync`.
pub trait Dir: Send + Sync + Debug {
    /// Opens an existing file for reading and writing. ENOENT where there is none.
    fn open(&self, name: &str) -> Result<SharedStorage>;
    /// Makes a file, and the subdirectories that it lies in. EEXIST where there is one.
    fn create(&self, name: &str) -> Result<SharedStorage>;
    /// Whether there is a file or subdirectory of that name.
    fn exists(&self, name: &str) -> Result<bool>;
    /// Removes a file or a whole subdirectory. An absent one is fine. Who holds a file open keeps it.
    fn remove(&self, name: &str) -> Result<()>;
    /// Gives a file or subdirectory another name, at once and in the place of a file that has that name. ENOENT where
    /// there is no `from`, or the subdirectory of `to` is absent.
    fn rename(&self, from: &str, to: &str) -> Result<()>;
    /// The sorted names of what lies in a subdirectory (`""`: in the directory itself); none where it is absent.
    fn list(&self, sub: &str) -> Result<Vec<String>>;
    /// Makes all names durable, those in subdirectories too.
    fn sync(&self) -> Result<()>;
    /// Space of the file system it lies in.
    fn space(&self) -> Result<Space>;
    /// The full path of a name, for messages and for the directory's own records.
    fn path(&self, name: &str) -> PathBuf;
}

/// A directory of the operating system.
#[derive(Debug)]
pub struct OsDir {
    path: PathBuf,
    /// Directories whose entries changed since the last sync.
    unsynced: Mutex<BTreeSet<PathBuf>>,
}

impl OsDir {
    /// The directory at `path`, made where it is absent, with its parents, for this user alone.
    pub fn create(path: &Path) -> Result<OsDir> {
        let mut unsynced = BTreeSet::new();
        make_dirs(path, &mut unsynced)?;
        OsDir::open(path).map(|dir| OsDir { unsynced: Mutex::new(unsynced), ..dir })
    }

    /// The existing directory at `path`.
    pub fn open(path: &Path) -> Result<OsDir> {
        let meta = fs::metadata(path).map_err(|e| Error::io("open directory", e).at_path(path))?;
        if !meta.is_dir() {
            return Err(Error::new(errno::ENOTDIR, "open", "not a directory").at_path(path));
        }
        Ok(OsDir { path: path.to_owned(), unsynced: Mutex::new(BTreeSet::new()) })
    }

    fn changed(&self, name: &str) {
        self.unsynced.lock().insert(self.path.join(parent_of(name)));
    }
}

/// Makes a directory and its parents, and notes the directories that got an entry by it.
fn make_dirs(path: &Path, changed: &mut BTreeSet<PathBuf>) -> Result<()> {
    if path.as_os_str().is_empty() || path.is_dir() {
        return Ok(());
    }
    let parent = path.parent().unwrap_or(Path::new("/"));
    make_dirs(parent, changed)?;
    match fs::DirBuilder::new().mode(0o700).create(path) {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => (),
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
            return Err(Error::new(errno::ENOTDIR, "create directory", "not a directory").at_path(path));
        }
        Err(e) => return Err(Error::io("create directory", e).at_path(path)),
        Ok(()) => (),
    }
    changed.insert(if parent.as_os_str().is_empty() { PathBuf::from(".") } else { parent.to_owned() });
    Ok(())
}

impl Dir for OsDir {
    fn open(&self, name: &str) -> Result<SharedStorage> {
        check_name(name, false)?;
        Ok(Arc::new(OsFile::open(&self.path.join(name), &OpenOptions { write: true, ..Default::default() })?))
    }

    fn create(&self, name: &str) -> Result<SharedStorage> {
        check_name(name, false)?;
        let path = self.path.join(name);
        if let Some(parent) = path.parent() {
            make_dirs(parent, &mut self.unsynced.lock())?;
        }
        let file = OsFile::open(&path, &OpenOptions { write: true, create_new: true, ..Default::default() })?;
        self.changed(name);
        Ok(Arc::new(file))
    }

    fn exists(&self, name: &str) -> Result<bool> {
        check_name(name, false)?;
        let path = self.path.join(name);
        match fs::symlink_metadata(&path) {
            Ok(_) => Ok(true),
            Err(e) if is_absent(&e) => Ok(false),
            Err(e) => Err(Error::io("look at", e).at_path(path)),
        }
    }

    fn remove(&self, name: &str) -> Result<()> {
        check_name(name, false)?;
        let path = self.path.join(name);
        let removed = fs::symlink_metadata(&path)
            .and_then(|meta| if meta.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) });
        match removed {
            Ok(()) => self.changed(name),
            Err(e) if is_absent(&e) => (),
            Err(e) => return Err(Error::io("remove", e).at_path(path)),
        }
        Ok(())
    }

    fn rename(&self, from: &str, to: &str) -> Result<()> {
        check_name(from, false)?;
        check_name(to, false)?;
        let path = self.path.join(from);
        fs::rename(&path, self.path.join(to)).map_err(|e| Error::io(format!("rename to {to}"), e).at_path(path))?;
        self.changed(from);
        self.changed(to);
        Ok(())
    }

    fn list(&self, sub: &str) -> Result<Vec<String>> {
        check_name(sub, true)?;
        let path = self.path.join(sub);
        let bad = |e| Error::io("list", e).at_path(&path);
        let entries = match fs::read_dir(&path) {
            Ok(entries) => entries,
            Err(e) if is_absent(&e) => return Ok(Vec::new()),
            Err(e) => return Err(bad(e)),
        };
        let mut names = entries
            .map(|entry| entry.map(|entry| entry.file_name().to_string_lossy().into_owned()).map_err(bad))
            .collect::<Result<Vec<_>>>()?;
        names.sort();
        Ok(names)
    }

    fn sync(&self) -> Result<()> {
        let mut unsynced = self.unsynced.lock();
        for dir in unsynced.iter() {
            match File::open(dir).and_then(|dir| dir.sync_all()) {
                Ok(()) => (),
                // Removed since: its own entry's removal is in the set as well.
                Err(e) if is_absent(&e) => (),
                Err(e) => return Err(Error::io("sync directory", e).at_path(dir)),
            }
        }
        unsynced.clear();
        Ok(())
    }

    fn space(&self) -> Result<Space> {
        os::space(&self.path)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }
}

/// A name is also absent where something on the way to it is no directory.
fn is_absent(e: &io::Error) -> bool {
    matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

/// A directory in memory, for tests. Clones share it: drop everything else and go on with a clone, and that was a
/// kill -9.
#[derive(Debug, Clone)]
pub struct MemDir {
    content: Arc<Mutex<Content>>,
    plan: Option<Arc<FaultPlan>>,
}

#[derive(Debug)]
struct Content {
    names: Names<MemFile>,
    space: Space,
}

impl MemDir {
    /// An empty directory on a file system of 1 TiB, all of it free.
    pub fn new() -> Self {
        let space = Space { total: 1 << 40, free: 1 << 40 };
        MemDir { content: Arc::new(Mutex::new(Content { names: Names::new(), space })), plan: None }
    }

    /// A handle of this directory whose calls, and those of the files got through it, fail as `plan` says.
    #[must_use]
    pub fn with_faults(&self, plan: Arc<FaultPlan>) -> Self {
        MemDir { content: self.content.clone(), plan: Some(plan) }
    }

    /// What [`Dir::space`] says from now on.
    pub fn set_space(&self, space: Space) {
        self.content.lock().space = space;
    }

    fn change(&self, name: &str) -> Result<()> {
        check_name(name, false)?;
        self.plan.as_ref().map_or(Ok(()), |plan| plan.pass(Call::Directory, 0..0, Path::new(name)))
    }

    fn hand_out(&self, name: &str, file: &MemFile) -> SharedStorage {
        let file = file.renamed(name).shared();
        match &self.plan {
            Some(plan) => Arc::new(Faulty { inner: file, plan: plan.clone() }),
            None => file,
        }
    }
}

impl Default for MemDir {
    fn default() -> Self {
        Self::new()
    }
}

impl Dir for MemDir {
    fn open(&self, name: &str) -> Result<SharedStorage> {
        check_name(name, false)?;
        let content = self.content.lock();
        Ok(self.hand_out(name, content.names.file(name)?))
    }

    fn create(&self, name: &str) -> Result<SharedStorage> {
        self.change(name)?;
        let file = MemFile::new(name, 0);
        self.content.lock().names.create(name, file.clone())?;
        Ok(self.hand_out(name, &file))
    }

    fn exists(&self, name: &str) -> Result<bool> {
        check_name(name, false)?;
        Ok(self.content.lock().names.exists(name))
    }

    fn remove(&self, name: &str) -> Result<()> {
        self.change(name)?;
        self.content.lock().names.remove(name);
        Ok(())
    }

    fn rename(&self, from: &str, to: &str) -> Result<()> {
        check_name(to, false)?;
        self.change(from)?;
        self.content.lock().names.rename(from, to)
    }

    fn list(&self, sub: &str) -> Result<Vec<String>> {
        check_name(sub, true)?;
        Ok(self.content.lock().names.list(sub))
    }

    fn sync(&self) -> Result<()> {
        self.plan.as_ref().map_or(Ok(()), |plan| plan.pass(Call::Directory, 0..0, Path::new("")))
    }

    fn space(&self) -> Result<Space> {
        Ok(self.content.lock().space)
    }

    fn path(&self, name: &str) -> PathBuf {
        PathBuf::from(name)
    }
}

/// What every implementation of [`Dir`] must do; the crash fake runs it too.
#[cfg(all(test, not(feature = "shuttle")))]
pub(super) fn check_dir(dir: &dyn Dir) {
    assert_eq!(dir.open("a").unwrap_err().errno(), errno::ENOENT);
    let file = dir.create("a").unwrap();
    file.write_at(b"hello", 0).unwrap();
    assert_eq!(dir.create("a").unwrap_err().errno(), errno::EEXIST);
    dir.create("layers/1/store.raw").unwrap().write_at(b"old", 0).unwrap();
    dir.create("layers/2/store.raw").unwrap();
    assert_eq!(dir.list("").unwrap(), ["a", "layers"]);
    assert_eq!(dir.list("layers").unwrap(), ["1", "2"]);
    assert_eq!(dir.list("nowhere").unwrap(), [""; 0]);
    assert!(dir.exists("layers/1").unwrap() && dir.exists("layers/1/store.raw").unwrap());
    assert!(!dir.exists("layers/3").unwrap());
    assert_eq!(dir.create("a/b").unwrap_err().errno(), errno::ENOTDIR);
    assert!(dir.open("layers").is_err());
    dir.sync().unwrap();

    dir.rename("layers/1", "layers/9").unwrap();
    let mut buf = [0; 3];
    dir.open("layers/9/store.raw").unwrap().read_at(&mut buf, 0).unwrap();
    assert_eq!(&buf, b"old");
    assert_eq!(dir.rename("layers/1", "layers/8").unwrap_err().errno(), errno::ENOENT);
    assert_eq!(dir.rename("a", "none/a").unwrap_err().errno(), errno::ENOENT);
    dir.create("b").unwrap();
    dir.rename("b", "a").unwrap();
    assert!(!dir.exists("b").unwrap());
    assert_eq!(dir.open("a").unwrap().len().unwrap(), 0, "the old file was replaced");
    assert_eq!(file.len().unwrap(), 5, "who holds it open keeps it");

    dir.remove("layers").unwrap();
    dir.remove("layers").unwrap();
    assert_eq!(dir.list("").unwrap(), ["a"]);
    assert!(!dir.exists("layers/9/store.raw").unwrap());
    dir.sync().unwrap();
    for name in ["", "..", "../a", "/a", "a/../b", "a//b", "a/", "a\0"] {
        assert_eq!(dir.create(name).unwrap_err().errno(), errno::EINVAL, "{name:?}");
        assert!(dir.remove(name).is_err() && dir.open(name).is_err() && dir.rename("a", name).is_err());
    }
    let space = dir.space().unwrap();
    assert!(space.total >= space.free && space.total > 0);
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn both_directories_keep_the_contract() {
        let temp = tempfile::tempdir().unwrap();
        check_dir(&OsDir::create(&temp.path().join("x/vda.raw.fleece")).unwrap());
        check_dir(&MemDir::new());
    }

    #[test]
    fn what_is_made_is_for_this_user_alone() {
        let temp = tempfile::tempdir().unwrap();
        let dir = OsDir::create(&temp.path().join("x/y")).unwrap();
        dir.create("layers/1/store.raw").unwrap();
        for (name, mode) in [("", 0o700), ("layers/1", 0o700), ("layers/1/store.raw", 0o600)] {
            assert_eq!(fs::metadata(dir.path(name)).unwrap().permissions().mode() & 0o777, mode, "{name}");
        }
        assert_eq!(OsDir::open(&temp.path().join("none")).unwrap_err().errno(), errno::ENOENT);
        assert_eq!(OsDir::open(&dir.path("layers/1/store.raw")).unwrap_err().errno(), errno::ENOTDIR);
        assert_eq!(OsDir::create(&dir.path("layers/1/store.raw")).unwrap_err().errno(), errno::ENOTDIR);
    }

    #[test]
    fn every_directory_with_a_new_entry_is_synced() {
        let temp = tempfile::tempdir().unwrap();
        let dir = OsDir::create(&temp.path().join("x/y")).unwrap();
        dir.create("layers/1/store.raw").unwrap();
        let base = temp.path();
        let expected =
            [base.to_owned(), base.join("x"), base.join("x/y/"), base.join("x/y/layers"), base.join("x/y/layers/1")];
        assert_eq!(*dir.unsynced.lock(), BTreeSet::from(expected));
        dir.sync().unwrap();
        assert!(dir.unsynced.lock().is_empty());
        dir.rename("layers/1/store.raw", "s").unwrap();
        dir.remove("layers/1").unwrap();
        assert_eq!(dir.unsynced.lock().len(), 3);
        dir.sync().unwrap();
    }

    #[test]
    fn memory_survives_a_kill_and_fails_as_planned() {
        let dir = MemDir::new();
        let plan = Arc::new(FaultPlan::new());
        let worker = dir.with_faults(plan.clone());
        let file = worker.create("dirty.log").unwrap();
        plan.fail_nth(Call::Write, 2, errno::ENOSPC);
        file.write_at(b"one", 0).unwrap();
        assert_eq!(file.write_at(b"two", 0).unwrap_err().errno(), errno::ENOSPC);
        plan.fail_all(Call::Directory, errno::EIO);
        assert_eq!(worker.create("x").unwrap_err().errno(), errno::EIO);
        assert_eq!(worker.sync().unwrap_err().errno(), errno::EIO);
        drop((file, worker));
        let mut buf = [0; 3];
        dir.open("dirty.log").unwrap().read_at(&mut buf, 0).unwrap();
        assert_eq!(&buf, b"one");
        assert_eq!(dir.list("").unwrap(), ["dirty.log"]);
        dir.set_space(Space { total: 100, free: 7 });
        assert_eq!(dir.space().unwrap().free, 7);
    }
}
