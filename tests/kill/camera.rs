//! A host in memory that can be photographed at any of its I/O calls: what a kill -9 at that moment leaves.

use super::blank;
use fleecefs::error::Result;
use fleecefs::fleece::{Environment, Fleece, Options, Place};
use fleecefs::image::Image;
use fleecefs::image::raw::RawImage;
use fleecefs::storage::{BlockStatus, Dir, MemDir, SharedStorage, Shm, ShmRoot, Space, Stamp, Storage, Words};
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

pub const DISKS: [&str; 2] = ["a", "b"];

/// What survives a kill: images, state directories with the stores in them, and the words in tmpfs.
#[derive(Debug, Clone)]
pub struct Host {
    images: [Bytes; 2],
    qcow2: bool,
    dirs: [MemDir; 2],
    words: Album,
}

impl Host {
    pub fn new(disk_bytes: usize) -> Host {
        let image = || Bytes::new(disk_bytes as u64);
        let (images, dirs) = ([image(), image()], [MemDir::new(), MemDir::new()]);
        Host { images, qcow2: false, dirs, words: Album::default() }
    }

    /// With qcow2 images that have bitmaps.
    pub fn qcow2(disk_bytes: usize) -> Host {
        let host = Host { qcow2: true, ..Host::new(0) };
        host.images.iter().for_each(|image| blank::make(Arc::new(image.clone()), disk_bytes as u64));
        host
    }

    /// The file of an image.
    pub fn file(&self, disk: usize) -> SharedStorage {
        Arc::new(self.images[disk].clone())
    }

    /// The copy of this moment. A background thread may be freeing what nobody needs any more: so what is freed is
    /// looked at after what says that it may be.
    pub fn copy(&self) -> Host {
        let images = self.images.each_ref().map(Bytes::copy);
        let words = self.words.copy();
        let dirs = self.dirs.each_ref().map(copy_of);
        Host { images, qcow2: self.qcow2, dirs, words }
    }

    /// A mount on this host, watched by `camera` where there is one.
    pub fn mount(&self, camera: Option<&Arc<Camera>>) -> Arc<Fleece> {
        let env = Environment { shm: Arc::new(self.words.clone()), background: false };
        let fleece = Fleece::with_environment(Options::default(), env);
        for (disk, name) in DISKS.into_iter().enumerate() {
            let image: SharedStorage = Arc::new(self.images[disk].clone());
            let (image, dir): (SharedStorage, Arc<dyn Dir>) = match camera {
                Some(camera) => (
                    Arc::new(WatchedFile {
                        inner: image,
                        unit: if self.qcow2 { 512 } else { 1 },
                        camera: camera.clone(),
                    }),
                    Arc::new(WatchedDir { inner: self.dirs[disk].clone(), camera: camera.clone() }),
                ),
                None => (image, Arc::new(self.dirs[disk].clone())),
            };
            let place = Place { state: dir.clone(), stores: dir, shm: None, lock: None };
            let image: Arc<dyn Image> = match self.qcow2 {
                true => blank::open(image).unwrap(),
                false => Arc::new(RawImage::over(image, false).unwrap()),
            };
            fleece.attach(name, image, place).unwrap();
        }
        fleece
    }
}

fn copy_of(dir: &MemDir) -> MemDir {
    let copy = MemDir::new();
    copy_below(dir, &copy, "");
    copy
}

fn copy_below(from: &MemDir, to: &MemDir, sub: &str) {
    for name in from.list(sub).unwrap() {
        let name = if sub.is_empty() { name } else { format!("{sub}/{name}") };
        let Ok(file) = from.open(&name) else {
            copy_below(from, to, &name);
            continue;
        };
        let (new, len) = (to.create(&name).unwrap(), file.len().unwrap());
        new.set_len(len).unwrap();
        let mut at = 0;
        while at < len {
            let run = file.block_status(at, len - at).unwrap();
            if !run.zero {
                let mut data = vec![0; run.len as usize];
                file.read_at(&mut data, at).unwrap();
                new.write_at(&data, at).unwrap();
            }
            at += run.len;
        }
    }
}

/// Called at every moment at which a kill makes a difference; takes the picture at one of them.
pub struct Camera {
    host: Host,
    state: Mutex<State>,
}

struct State {
    moments: u64,
    at: u64,
    /// Runs just before the picture, where the script allows it.
    before: Option<Box<dyn FnOnce() + Send>>,
    picture: Option<Host>,
    busy: bool,
}

impl std::fmt::Debug for Camera {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Camera")
    }
}

impl Camera {
    /// Takes the picture at moment `at`, the first being 0.
    pub fn new(host: &Host, at: u64) -> Arc<Camera> {
        let state = State { moments: 0, at, before: None, picture: None, busy: false };
        Arc::new(Camera { host: host.clone(), state: Mutex::new(state) })
    }

    /// What is done just before the picture, if it is taken before the next call of this.
    pub fn before_picture(&self, act: Option<Box<dyn FnOnce() + Send>>) {
        self.state.lock().before = act;
    }

    /// No moments from here on, or again.
    pub fn pause(&self, pause: bool) {
        self.state.lock().busy = pause;
    }

    pub fn taken(&self) -> bool {
        self.state.lock().picture.is_some()
    }

    pub fn picture(&self) -> Option<Host> {
        self.state.lock().picture.take()
    }

    fn moment(&self) {
        let act = {
            let mut state = self.state.lock();
            if state.busy || state.picture.is_some() {
                return;
            }
            state.moments += 1;
            if state.moments <= state.at {
                return;
            }
            state.busy = true;
            state.before.take()
        };
        if let Some(act) = act {
            act();
        }
        let picture = self.host.copy();
        self.state.lock().picture = Some(picture);
    }
}

/// An image: bytes whose time never changes, so that no copy looks as if a stranger had written it.
#[derive(Debug, Clone)]
struct Bytes(Arc<Mutex<Data>>);

#[derive(Debug, Clone, Default)]
struct Data {
    /// Up to the last byte that was written; zeros follow.
    bytes: Vec<u8>,
    len: u64,
}

impl Data {
    /// The bytes of a range, which then are there.
    fn range(&mut self, offset: u64, len: usize) -> &mut [u8] {
        let (from, end) = (offset as usize, offset as usize + len);
        assert!(end as u64 <= self.len);
        if self.bytes.len() < end {
            self.bytes.resize(end, 0);
        }
        &mut self.bytes[from..end]
    }
}

impl Bytes {
    fn new(len: u64) -> Bytes {
        Bytes(Arc::new(Mutex::new(Data { bytes: Vec::new(), len })))
    }

    fn copy(&self) -> Bytes {
        Bytes(Arc::new(Mutex::new(self.0.lock().clone())))
    }
}

impl Storage for Bytes {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let data = self.0.lock();
        assert!(offset + buf.len() as u64 <= data.len);
        let there = data.bytes.get(offset as usize..).unwrap_or_default();
        let (here, behind) = buf.split_at_mut(there.len().min(buf.len()));
        here.copy_from_slice(&there[..here.len()]);
        behind.fill(0);
        Ok(())
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.0.lock().range(offset, buf.len()).copy_from_slice(buf);
        Ok(())
    }
    fn sync(&self) -> Result<()> {
        Ok(())
    }
    fn len(&self) -> Result<u64> {
        Ok(self.0.lock().len)
    }
    fn set_len(&self, len: u64) -> Result<()> {
        let mut data = self.0.lock();
        data.bytes.truncate(len as usize);
        data.len = len;
        Ok(())
    }
    fn punch_hole(&self, offset: u64, len: u64) -> Result<()> {
        self.0.lock().range(offset, len as usize).fill(0);
        Ok(())
    }
    fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        self.punch_hole(offset, len)
    }
    fn block_status(&self, offset: u64, len: u64) -> Result<BlockStatus> {
        let data = self.0.lock();
        let there = data.bytes.get(offset as usize..).unwrap_or_default();
        let there = &there[..there.len().min(len as usize)];
        let zero = there.first().is_none_or(|byte| *byte == 0);
        let run = there.iter().take_while(|byte| (**byte == 0) == zero).count();
        let to_the_end = zero && run == there.len();
        Ok(BlockStatus { len: if to_the_end { len } else { run as u64 }, zero })
    }
    fn stamp(&self) -> Result<Stamp> {
        Ok(Stamp { dev: 0, ino: 1, size: self.len()?, mtime_ns: 0, ctime_ns: 0 })
    }
    fn path(&self) -> &Path {
        Path::new("image")
    }
}

/// A file whose changes are moments: before, in the middle of, and after each.
#[derive(Debug)]
struct WatchedFile {
    inner: SharedStorage,
    /// What a kill does not tear.
    unit: u64,
    camera: Arc<Camera>,
}

impl WatchedFile {
    fn change(&self, change: impl FnOnce() -> Result<()>) -> Result<()> {
        self.camera.moment();
        change()?;
        self.camera.moment();
        Ok(())
    }
}

impl Storage for WatchedFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.inner.read_at(buf, offset)
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        let half = offset + buf.len() as u64 / 2;
        let (first, rest) = buf.split_at((half - half % self.unit).saturating_sub(offset) as usize);
        self.change(|| {
            self.inner.write_at(first, offset)?;
            self.camera.moment();
            self.inner.write_at(rest, offset + first.len() as u64)
        })
    }
    fn sync(&self) -> Result<()> {
        self.inner.sync()
    }
    fn len(&self) -> Result<u64> {
        self.inner.len()
    }
    fn set_len(&self, len: u64) -> Result<()> {
        self.change(|| self.inner.set_len(len))
    }
    /// Of stores they come from a thread in the background, whose moments would not be the script's.
    fn punch_hole(&self, offset: u64, len: u64) -> Result<()> {
        self.inner.punch_hole(offset, len)
    }
    fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        self.change(|| self.inner.write_zeroes(offset, len))
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

#[derive(Debug)]
struct WatchedDir {
    inner: MemDir,
    camera: Arc<Camera>,
}

impl WatchedDir {
    fn watched(&self, file: SharedStorage) -> SharedStorage {
        Arc::new(WatchedFile { inner: file, unit: 1, camera: self.camera.clone() })
    }
}

impl Dir for WatchedDir {
    fn open(&self, name: &str) -> Result<SharedStorage> {
        Ok(self.watched(self.inner.open(name)?))
    }
    fn create(&self, name: &str) -> Result<SharedStorage> {
        self.camera.moment();
        let file = self.inner.create(name)?;
        self.camera.moment();
        Ok(self.watched(file))
    }
    fn exists(&self, name: &str) -> Result<bool> {
        self.inner.exists(name)
    }
    fn remove(&self, name: &str) -> Result<()> {
        self.inner.remove(name)
    }
    fn rename(&self, from: &str, to: &str) -> Result<()> {
        self.inner.rename(from, to)
    }
    fn list(&self, sub: &str) -> Result<Vec<String>> {
        self.inner.list(sub)
    }
    fn sync(&self) -> Result<()> {
        self.inner.sync()
    }
    fn space(&self) -> Result<Space> {
        self.inner.space()
    }
    fn path(&self, name: &str) -> PathBuf {
        self.inner.path(name)
    }
}

/// Words by namespace and name.
#[derive(Debug, Clone, Default)]
struct Album(Arc<Mutex<BTreeMap<String, BTreeMap<String, Words>>>>);

impl Album {
    fn copy(&self) -> Album {
        let copy_of = |words: &Words| {
            let copy = Words::heap(words.len());
            for (to, from) in copy.iter().zip(words.iter()) {
                to.store(from.load(Ordering::SeqCst), Ordering::SeqCst);
            }
            copy
        };
        let spaces = self.0.lock();
        let copies = spaces.iter().map(|(id, space)| {
            (id.clone(), space.iter().map(|(name, words)| (name.clone(), copy_of(words))).collect())
        });
        Album(Arc::new(Mutex::new(copies.collect())))
    }
}

impl ShmRoot for Album {
    fn create(&self, id: &str) -> Result<Box<dyn Shm>> {
        self.0.lock().entry(id.to_owned()).or_default();
        Ok(Box::new(Page { album: self.clone(), id: id.to_owned() }))
    }
    fn find(&self, id: &str) -> Result<Option<Box<dyn Shm>>> {
        let known = self.0.lock().contains_key(id);
        Ok(known.then(|| Box::new(Page { album: self.clone(), id: id.to_owned() }) as Box<dyn Shm>))
    }
    fn boot_id(&self) -> String {
        "boot".to_owned()
    }
    fn boot_ns(&self) -> i64 {
        i64::MIN
    }
}

/// One namespace.
#[derive(Debug)]
struct Page {
    album: Album,
    id: String,
}

impl Shm for Page {
    fn create(&self, name: &str, words: usize) -> Result<Words> {
        let words = Words::heap(words);
        self.album.0.lock().entry(self.id.clone()).or_default().insert(name.to_owned(), words.clone());
        Ok(words)
    }
    fn open(&self, name: &str) -> Result<Option<Words>> {
        Ok(self.album.0.lock().get(&self.id).and_then(|space| space.get(name)).cloned())
    }
    fn remove(&self, name: &str) -> Result<()> {
        if let Some(space) = self.album.0.lock().get_mut(&self.id) {
            space.remove(name);
        }
        Ok(())
    }
    fn remove_all(&self) -> Result<()> {
        self.album.0.lock().remove(&self.id);
        Ok(())
    }
}
