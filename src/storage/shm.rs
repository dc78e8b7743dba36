//! Arrays of bits that outlive this process: fully allocated files in tmpfs, mapped into memory.
//!
//! What the guest's writes mark must be exact after kill -9 without costing them a system call. A shared mapping of
//! tmpfs does that: a store is in the kernel's page cache at once, nothing is ever written back, and because every
//! page was allocated beforehand no access can end in SIGBUS for want of room. A power loss, or a container that is
//! made anew, empties it; who reads it must be able to tell (a nonce in the name or in the words).
//!
//! A plain disk in the place of tmpfs would bring write-back stalls and content of unknown age, so the type of the
//! file system is asked for, whatever the directory is called.

use super::{clock, process};
use crate::error::{Error, Result, errno};
use crate::sync::Mutex;
use crate::sync::atomic::AtomicU64;
use std::collections::BTreeMap;
use std::ffi::CString;
use std::fmt::Debug;
use std::fs::{self, File};
use std::io;
use std::ops::Deref;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

const WORD_BYTES: u64 = 8;
/// Bytes per block of `st_blocks`, whatever the file system's own block is.
const STAT_BLOCK_BYTES: u64 = 512;

/// A fixed array of 64-bit words that many threads change at once. Clones share it; it lives as long as one of them,
/// whatever becomes of its name.
#[derive(Clone)]
pub struct Words(Memory);

#[derive(Clone)]
enum Memory {
    Heap(Arc<[AtomicU64]>),
    #[cfg(not(any(feature = "shuttle", loom)))]
    Mapped {
        map: Arc<memmap2::MmapRaw>,
        count: usize,
    },
}

impl Words {
    /// `count` words of 0 on the heap.
    pub fn heap(count: usize) -> Self {
        Words(Memory::Heap((0..count).map(|_| AtomicU64::new(0)).collect()))
    }

    /// The words for plain access; `None` unless they are on the heap and this is their only holder.
    #[cfg(not(any(feature = "shuttle", loom)))]
    pub fn get_mut(&mut self) -> Option<&mut [u64]> {
        let Memory::Heap(words) = &mut self.0 else { return None };
        let words: &mut [AtomicU64] = Arc::get_mut(words)?;
        const { assert!(align_of::<AtomicU64>() >= align_of::<u64>() && size_of::<AtomicU64>() == size_of::<u64>()) };
        // SAFETY: the slice is borrowed mutably, so nobody else reaches it while the result lives. AtomicU64 has the size
        // of u64 and at least its alignment, and for both every bit pattern is valid.
        Some(unsafe { std::slice::from_raw_parts_mut(words.as_mut_ptr().cast::<u64>(), words.len()) })
    }

    /// The atomics of an explorer are no plain memory.
    #[cfg(any(feature = "shuttle", loom))]
    pub fn get_mut(&mut self) -> Option<&mut [u64]> {
        None
    }

    /// Maps a file of tmpfs, every page of which is allocated.
    #[cfg(not(any(feature = "shuttle", loom)))]
    fn mapped(file: &File, count: usize, path: &Path) -> Result<Self> {
        if count == 0 {
            return Ok(Words::heap(0));
        }
        let map = memmap2::MmapOptions::new()
            .len(count * WORD_BYTES as usize)
            .map_raw(file)
            .map_err(|e| Error::io("map", e).at_path(path))?;
        Ok(Words(Memory::Mapped { map: Arc::new(map), count }))
    }

    /// The atomics of an explorer cannot lie in mapped memory.
    #[cfg(any(feature = "shuttle", loom))]
    fn mapped(_file: &File, _count: usize, path: &Path) -> Result<Self> {
        Err(Error::new(errno::ENOSYS, "map", "not under shuttle or loom").at_path(path))
    }
}

impl Deref for Words {
    type Target = [AtomicU64];

    fn deref(&self) -> &[AtomicU64] {
        match &self.0 {
            Memory::Heap(words) => words,
            #[cfg(not(any(feature = "shuttle", loom)))]
            // SAFETY: the mapping is page-aligned, at least `count` words long (`mapped` made it so), readable and
            // writable, and lives as long as `self`. AtomicU64 has the layout of u64, every bit pattern is valid, and
            // this program touches the memory through these atomics only, in every process that maps it.
            Memory::Mapped { map, count } => unsafe {
                std::slice::from_raw_parts(map.as_mut_ptr().cast::<AtomicU64>(), *count)
            },
        }
    }
}

impl Debug for Words {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Words({})", self.len())
    }
}

/// A namespace of word arrays that survives the process.
pub trait Shm: Send + Sync + Debug {
    /// Makes an array of `words` zeros, all of its memory allocated. One of the same name is replaced; who still holds
    /// the old one keeps it. ENOSPC where memory is short; then the old one stays.
    fn create(&self, name: &str, words: usize) -> Result<Words>;
    /// The array of that name with the content it was left with; `None` where there is none, or none that is whole.
    fn open(&self, name: &str) -> Result<Option<Words>>;
    /// Forgets a name. An absent one is fine.
    fn remove(&self, name: &str) -> Result<()>;
    /// Forgets all names and the namespace itself.
    fn remove_all(&self) -> Result<()>;
}

/// Where namespaces lie.
pub trait ShmRoot: Send + Sync + Debug {
    /// The namespace `id`, made where it is absent. Its content, if any, is kept.
    fn create(&self, id: &str) -> Result<Box<dyn Shm>>;
    /// The namespace `id`, where it exists.
    fn find(&self, id: &str) -> Result<Option<Box<dyn Shm>>>;
    /// A text that is another one after every power loss or reboot.
    fn boot_id(&self) -> String;
    /// When that was, in nanoseconds since the epoch, by the clock of now.
    fn boot_ns(&self) -> i64;
}

/// The namespaces of this machine.
#[derive(Debug, Clone, Copy, Default)]
pub struct OsShmRoot;

impl ShmRoot for OsShmRoot {
    fn create(&self, id: &str) -> Result<Box<dyn Shm>> {
        Ok(Box::new(OsShm::create(id)?))
    }

    fn find(&self, id: &str) -> Result<Option<Box<dyn Shm>>> {
        Ok(OsShm::find(id)?.map(|shm| Box::new(shm) as Box<dyn Shm>))
    }

    fn boot_id(&self) -> String {
        // Without /proc no boot can be told from another: an id that is never equal to a stored one is the safe answer.
        fs::read_to_string("/proc/sys/kernel/random/boot_id")
            .map_or_else(|_| uuid::Uuid::new_v4().to_string(), |text| text.trim().to_owned())
    }

    fn boot_ns(&self) -> i64 {
        clock::boot_ns()
    }
}

/// A namespace in tmpfs: a directory with one file per array.
#[derive(Debug)]
pub struct OsShm {
    dir: PathBuf,
}

impl OsShm {
    /// The namespace `id`, in the first place that is a tmpfs and lets us write: `/run/fleecefs`,
    /// `$XDG_RUNTIME_DIR/fleecefs`, `/dev/shm/fleecefs` (with the user id behind it unless root). One that already
    /// exists in any of them is taken.
    pub fn create(id: &str) -> Result<OsShm> {
        create_in(&candidates(), id)
    }

    /// The namespace `id`, in whichever place it lies.
    pub fn find(id: &str) -> Result<Option<OsShm>> {
        find_in(&candidates(), id)
    }

    fn file(&self, name: &str) -> Result<PathBuf> {
        check_component(name)?;
        Ok(self.dir.join(name))
    }
}

fn candidates() -> Vec<PathBuf> {
    let uid = process::uid_gid().0;
    let own_name = if uid == 0 { "fleecefs".to_owned() } else { format!("fleecefs-{uid}") };
    let mut places = vec![PathBuf::from("/run/fleecefs")];
    places.extend(std::env::var_os("XDG_RUNTIME_DIR").map(|dir| PathBuf::from(dir).join("fleecefs")));
    places.push(Path::new("/dev/shm").join(own_name));
    places
}

fn create_in(places: &[PathBuf], id: &str) -> Result<OsShm> {
    if let Some(found) = find_in(places, id)? {
        return Ok(found);
    }
    let mut reasons = Vec::new();
    for place in places {
        match make_place(place).and_then(|()| own_dir(&place.join(id), true)) {
            Ok(()) => return Ok(OsShm { dir: place.join(id) }),
            Err(e) => reasons.push(e.to_string()),
        }
    }
    Err(Error::new(errno::ENOSPC, "shared memory for dirty bits", reasons.join("; "))
        .hint("mount a tmpfs at /dev/shm or /run, writable for this user"))
}

fn find_in(places: &[PathBuf], id: &str) -> Result<Option<OsShm>> {
    check_component(id)?;
    for place in places {
        let dir = place.join(id);
        // Both levels are checked: whoever owns the outer one could swap the inner one under us.
        if own_dir(place, false).is_ok() && own_dir(&dir, false).is_ok() && is_tmpfs(&dir).unwrap_or(false) {
            return Ok(Some(OsShm { dir }));
        }
    }
    Ok(None)
}

/// Makes our directory in a tmpfs, or accepts the one that is there.
fn make_place(place: &Path) -> Result<()> {
    let parent = place.parent().unwrap_or(Path::new("/"));
    if !is_tmpfs(parent)? {
        return Err(Error::new(errno::ENODEV, "use", "not a tmpfs").at_path(parent));
    }
    own_dir(place, true)?;
    if is_tmpfs(place)? {
        return Ok(());
    }
    Err(Error::new(errno::ENODEV, "use", "not a tmpfs").at_path(place))
}

/// Checks that `dir` is a directory (no link) of ours that nobody else can enter, and makes it first where it is
/// absent and `make` is set. In /dev/shm anybody can put something under our name.
fn own_dir(dir: &Path, make: bool) -> Result<()> {
    if make {
        match fs::DirBuilder::new().mode(0o700).create(dir) {
            Ok(()) => (),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => (),
            Err(e) => return Err(Error::io("create directory", e).at_path(dir)),
        }
    }
    let meta = fs::symlink_metadata(dir).map_err(|e| Error::io("look at", e).at_path(dir))?;
    let why = if !meta.is_dir() {
        "not a directory"
    } else if meta.uid() != process::uid_gid().0 {
        "belongs to another user"
    } else if meta.mode() & 0o077 != 0 {
        "open to other users"
    } else {
        return Ok(());
    };
    Err(Error::new(errno::EPERM, "use", why).at_path(dir).hint("remove it; it is made again with mode 0700"))
}

fn is_tmpfs(path: &Path) -> Result<bool> {
    let bad = |e| Error::io("ask the file system of", e).at_path(path);
    let name =
        CString::new(path.as_os_str().as_bytes()).map_err(|_| bad(io::Error::from_raw_os_error(libc::EINVAL)))?;
    let mut info = std::mem::MaybeUninit::<libc::statfs>::uninit();
    // SAFETY: `name` is NUL-terminated and `info` is large enough for what statfs writes.
    if unsafe { libc::statfs(name.as_ptr(), info.as_mut_ptr()) } != 0 {
        return Err(bad(io::Error::last_os_error()));
    }
    // SAFETY: statfs succeeded, so it filled `info`.
    let kind = unsafe { info.assume_init() }.f_type;
    Ok(kind == libc::TMPFS_MAGIC)
}

fn check_component(name: &str) -> Result<()> {
    if !name.is_empty() && !name.starts_with('.') && !name.contains(['/', '\0']) {
        return Ok(());
    }
    Err(Error::new(errno::EINVAL, format!("shared memory '{}'", name.escape_debug()), "not a plain file name"))
}

/// Gives `file` a length and allocates all of it.
fn allocate(file: &File, len: u64) -> io::Result<()> {
    if len == 0 {
        return Ok(());
    }
    let len = i64::try_from(len).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))?;
    loop {
        // SAFETY: plain system call on an open descriptor.
        if unsafe { libc::fallocate(file.as_raw_fd(), 0, 0, len) } == 0 {
            return Ok(());
        }
        let e = io::Error::last_os_error();
        if e.kind() != io::ErrorKind::Interrupted {
            return Err(e);
        }
    }
}

impl Shm for OsShm {
    fn create(&self, name: &str, words: usize) -> Result<Words> {
        let path = self.file(name)?;
        // A name appears only when its array is whole: a kill in between leaves the old one or none.
        let unfinished = self.dir.join(format!(".{name}.new"));
        remove_file(&unfinished)?;
        let file = fs::OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&unfinished)
            .map_err(|e| Error::io("create", e).at_path(&unfinished))?;
        let len = (words as u64).saturating_mul(WORD_BYTES);
        let made = allocate(&file, len)
            .map_err(|e| {
                Error::io(format!("allocate {len} bytes of"), e)
                    .at_path(&path)
                    .hint("give the tmpfs more room: mount -o remount,size=...")
            })
            .and_then(|()| Words::mapped(&file, words, &path))
            .and_then(|words| {
                fs::rename(&unfinished, &path).map_err(|e| Error::io("create", e).at_path(&path))?;
                Ok(words)
            });
        if made.is_err() {
            remove_file(&unfinished)?;
        }
        made
    }

    fn open(&self, name: &str) -> Result<Option<Words>> {
        let path = self.file(name)?;
        let file = match fs::OpenOptions::new().read(true).write(true).custom_flags(libc::O_NOFOLLOW).open(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(Error::io("open", e).at_path(&path)),
        };
        let meta = file.metadata().map_err(|e| Error::io("look at", e).at_path(&path))?;
        let whole = meta.is_file()
            && meta.len().is_multiple_of(WORD_BYTES)
            && meta.blocks().saturating_mul(STAT_BLOCK_BYTES) >= meta.len();
        if !whole {
            return Ok(None);
        }
        Words::mapped(&file, (meta.len() / WORD_BYTES) as usize, &path).map(Some)
    }

    fn remove(&self, name: &str) -> Result<()> {
        remove_file(&self.file(name)?)
    }

    fn remove_all(&self) -> Result<()> {
        match fs::remove_dir_all(&self.dir) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(Error::io("remove", e).at_path(&self.dir)),
            _ => Ok(()),
        }
    }
}

fn remove_file(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(Error::io("remove", e).at_path(path)),
        _ => Ok(()),
    }
}

/// Namespaces on the heap, for tests. Clones share them: drop everything else and go on with a clone, and that was a
/// kill -9; [`HeapShmRoot::lose_power`] is what its name says.
#[derive(Debug, Clone)]
pub struct HeapShmRoot(Arc<Mutex<HeapState>>);

#[derive(Debug)]
struct HeapState {
    boot_id: String,
    boot_ns: i64,
    spaces: BTreeMap<String, BTreeMap<String, Words>>,
}

impl HeapState {
    fn new(boot_id: &str, boot_ns: i64) -> Self {
        HeapState { boot_id: boot_id.to_owned(), boot_ns, spaces: BTreeMap::new() }
    }
}

impl HeapShmRoot {
    /// No namespaces, on the first boot.
    pub fn new() -> Self {
        HeapShmRoot(Arc::new(Mutex::new(HeapState::new("boot-1", i64::MIN))))
    }

    /// Forgets everything; the machine then runs under `boot_id`.
    pub fn lose_power(&self, boot_id: &str) {
        *self.0.lock() = HeapState::new(boot_id, clock::now_ns());
    }
}

impl Default for HeapShmRoot {
    fn default() -> Self {
        Self::new()
    }
}

impl ShmRoot for HeapShmRoot {
    fn create(&self, id: &str) -> Result<Box<dyn Shm>> {
        check_component(id)?;
        self.0.lock().spaces.entry(id.to_owned()).or_default();
        Ok(Box::new(HeapShm { root: self.clone(), id: id.to_owned() }))
    }

    fn find(&self, id: &str) -> Result<Option<Box<dyn Shm>>> {
        check_component(id)?;
        let known = self.0.lock().spaces.contains_key(id);
        Ok(known.then(|| Box::new(HeapShm { root: self.clone(), id: id.to_owned() }) as Box<dyn Shm>))
    }

    fn boot_id(&self) -> String {
        self.0.lock().boot_id.clone()
    }

    fn boot_ns(&self) -> i64 {
        self.0.lock().boot_ns
    }
}

/// One namespace on the heap. Clones share it.
#[derive(Debug, Clone)]
pub struct HeapShm {
    root: HeapShmRoot,
    id: String,
}

impl Shm for HeapShm {
    fn create(&self, name: &str, words: usize) -> Result<Words> {
        check_component(name)?;
        let words = Words::heap(words);
        self.root.0.lock().spaces.entry(self.id.clone()).or_default().insert(name.to_owned(), words.clone());
        Ok(words)
    }

    fn open(&self, name: &str) -> Result<Option<Words>> {
        check_component(name)?;
        Ok(self.root.0.lock().spaces.get(&self.id).and_then(|space| space.get(name)).cloned())
    }

    fn remove(&self, name: &str) -> Result<()> {
        check_component(name)?;
        if let Some(space) = self.root.0.lock().spaces.get_mut(&self.id) {
            space.remove(name);
        }
        Ok(())
    }

    fn remove_all(&self) -> Result<()> {
        self.root.0.lock().spaces.remove(&self.id);
        Ok(())
    }
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests {
    use super::*;
    use std::sync::atomic::Ordering::SeqCst;

    /// A directory of this test in tmpfs, removed at the end.
    struct Tmpfs(tempfile::TempDir);

    impl Tmpfs {
        fn new() -> Self {
            assert!(is_tmpfs(Path::new("/dev/shm")).unwrap(), "the tests need a tmpfs at /dev/shm");
            Tmpfs(tempfile::tempdir_in("/dev/shm").unwrap())
        }

        fn join(&self, name: &str) -> PathBuf {
            self.0.path().join(name)
        }
    }

    fn each_root(check: impl Fn(&dyn Shm)) {
        let tmpfs = Tmpfs::new();
        check(&create_in(&[tmpfs.join("fleecefs")], "id").unwrap());
        check(&*HeapShmRoot::new().create("id").unwrap());
    }

    #[test]
    fn words_keep_their_content_without_their_holders() {
        each_root(|shm| {
            assert!(shm.open("bits").unwrap().is_none());
            let words = shm.create("bits", 1000).unwrap();
            assert_eq!(words.len(), 1000);
            assert!(words.iter().all(|w| w.load(SeqCst) == 0));
            words[999].store(7, SeqCst);
            drop(words);
            let again = shm.open("bits").unwrap().unwrap();
            assert_eq!((again.len(), again[999].load(SeqCst)), (1000, 7));

            let new = shm.create("bits", 10).unwrap();
            again[0].store(1, SeqCst);
            assert_eq!((new.len(), new[0].load(SeqCst)), (10, 0), "the new array is another one");
            shm.remove("bits").unwrap();
            shm.remove("bits").unwrap();
            assert!(shm.open("bits").unwrap().is_none());
            new[9].store(3, SeqCst);
            assert_eq!(new[9].load(SeqCst), 3, "a holder keeps what was removed");
            assert_eq!(shm.create("none", 0).unwrap().len(), 0);
            assert_eq!(shm.open("none").unwrap().unwrap().len(), 0);
        });
    }

    #[test]
    fn names_cannot_leave_the_namespace() {
        each_root(|shm| {
            for name in ["", ".", "..", "a/b", "/a", ".hidden", "a\0b"] {
                assert_eq!(shm.create(name, 1).unwrap_err().errno(), errno::EINVAL, "{name:?}");
                assert!(shm.open(name).is_err());
                assert!(shm.remove(name).is_err());
            }
        });
    }

    #[test]
    fn a_namespace_is_found_in_any_place_until_it_is_removed() {
        let tmpfs = Tmpfs::new();
        let places = [tmpfs.join("a"), tmpfs.join("b")];
        assert!(find_in(&places, "x").unwrap().is_none());
        create_in(&places[1..], "x").unwrap().create("bits", 1).unwrap();
        let found = create_in(&places, "x").unwrap();
        assert!(found.open("bits").unwrap().is_some(), "what exists is taken before a better place");
        found.remove_all().unwrap();
        found.remove_all().unwrap();
        assert!(find_in(&places, "x").unwrap().is_none());
        assert!(create_in(&places, "../x").is_err());
    }

    #[test]
    fn a_disk_is_no_shared_memory() {
        let disk = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        if is_tmpfs(disk.path()).unwrap() {
            eprintln!("skip: the source tree lies in a tmpfs");
            return;
        }
        let place = disk.path().join("fleecefs");
        assert!(create_in(std::slice::from_ref(&place), "x").is_err());
        assert!(!place.exists());
        let tmpfs = Tmpfs::new();
        let shm = create_in(&[place, tmpfs.join("fleecefs")], "x").unwrap();
        assert!(shm.dir.starts_with(tmpfs.0.path()));
    }

    #[test]
    fn a_directory_that_others_prepared_is_refused() {
        let tmpfs = Tmpfs::new();
        let link = tmpfs.join("link");
        let target = tmpfs.join("target");
        fs::DirBuilder::new().mode(0o700).create(&target).unwrap();
        std::os::unix::fs::symlink(&target, &link).unwrap();
        assert!(create_in(&[link], "x").is_err(), "a link");
        let open = tmpfs.join("open");
        fs::create_dir(&open).unwrap();
        fs::set_permissions(&open, std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
        assert!(create_in(std::slice::from_ref(&open), "x").is_err(), "open to others");
        assert!(!open.join("x").exists());
        std::os::unix::fs::symlink("/etc/hostname", target.join("bits")).unwrap();
        let shm = OsShm { dir: target };
        assert!(shm.open("bits").is_err(), "a link in the place of an array");
    }

    #[test]
    fn memory_is_allocated_beforehand_or_refused() {
        let tmpfs = Tmpfs::new();
        let shm = create_in(&[tmpfs.join("fleecefs")], "x").unwrap();
        shm.create("bits", 4096).unwrap();
        let file = shm.dir.join("bits");
        assert!(fs::metadata(&file).unwrap().blocks() * 512 >= 4096 * 8);
        let e = shm.create("bits", 1 << 57).unwrap_err();
        assert!(e.hint_text().is_some());
        assert_eq!(shm.open("bits").unwrap().unwrap().len(), 4096, "the old array stays");
        assert_eq!(fs::read_dir(&shm.dir).unwrap().count(), 1, "nothing unfinished is left");

        File::create(shm.dir.join("sparse")).unwrap().set_len(8192).unwrap();
        assert!(shm.open("sparse").unwrap().is_none(), "a hole could end in SIGBUS");
    }

    #[test]
    fn words_survive_a_killed_process() {
        let tmpfs = Tmpfs::new();
        let shm = create_in(&[tmpfs.join("fleecefs")], "x").unwrap();
        let words = shm.create("bits", 8).unwrap();
        // SAFETY: the child calls nothing but atomics and kill(2), both safe after a fork of many threads.
        let child = unsafe { libc::fork() };
        if child == 0 {
            words[5].store(42, SeqCst);
            // SAFETY: kills this child alone.
            unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
        }
        // SAFETY: waits for the child made above.
        unsafe { libc::waitpid(child, std::ptr::null_mut(), 0) };
        drop(words);
        assert_eq!(shm.open("bits").unwrap().unwrap()[5].load(SeqCst), 42);
    }

    #[test]
    fn lost_power_empties_the_heap_and_changes_the_boot() {
        let root = HeapShmRoot::new();
        let boot = root.boot_id();
        root.create("x").unwrap().create("bits", 1).unwrap();
        assert!(root.find("x").unwrap().unwrap().open("bits").unwrap().is_some());
        root.lose_power("boot-2");
        assert!(root.find("x").unwrap().is_none());
        assert_ne!(root.boot_id(), boot);
        assert_eq!(OsShmRoot.boot_id(), OsShmRoot.boot_id());
    }
}
