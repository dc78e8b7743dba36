//! From frozen views into a new point of a backup.
//!
//! ```text
//! DIR/.lock              held by the one backup that runs there
//!     POINT.partial/     until all is there and durable
//!         draft.json     what the point is to be; here, too, until the snapshot was completed
//!         DISK.done      journal of what DISK's file has for good
//! ```
//! Invariants:
//! - **S1 a partial point is never taken for whole.** It has another name, and no manifest, until all of its files are
//!   durable; renaming its directory is the one step that makes it a point.
//! - **S2 the consumer moves last.** Who completes the snapshot does so after [`Partial::publish`]. A kill in between leaves
//!   `draft.json` in the point: the next run completes the snapshot, where it is still there. Where it is not, the
//!   consumer stands where it stood, and the next increment builds on the point of that.
//! - **S3 one instant.** An interrupted copy goes on only from the very snapshot that it began with, by identity.
//! - **S4 nothing of a chain is changed.** Files of other points are opened for reading only.

use super::chain::image_bytes;
use super::copy::{self, Decision, FileSource, ImageTarget, Side, Source, Target};
use super::journal::{Journal, Noted};
use super::manifest::{DiskEntry, MANIFEST, Manifest, PARTIAL, SUMS, hash_file, read_json, write_file, write_json};
use super::{Extent, ExtentSource, MapFile, MapFormat, MapMeta, MapSource};
use crate::error::{Error, Result, errno};
use crate::image::qcow2::create::{self, CreateOptions};
use crate::image::qcow2::header;
use crate::image::raw::RawImage;
use crate::image::{self, Format, Image};
use crate::storage::lock::{FileLock, lock_file};
use crate::storage::{Dir, OsDir};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use std::io::Write;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use uuid::Uuid;

/// The lock in a directory of points.
const LOCK: &str = ".lock";
/// What a point is to be.
const DRAFT: &str = "draft.json";
/// How the journal of a disk is named behind its name.
const JOURNAL: &str = ".done";
/// How long one sleep under a limit of speed may be: so soon an interruption is seen.
const NAP: Duration = Duration::from_millis(50);

/// How clusters are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    /// Deflate.
    Zlib,
    /// Zstandard.
    Zstd,
}

/// What was asked for: an interrupted backup goes on where this is the same.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    /// Names of the disks; empty: all.
    pub disks: Vec<String>,
    /// A full backup whatever there is to build on.
    pub full: bool,
    /// The consumer.
    pub consumer: Option<String>,
    /// Format of the files.
    pub format: Format,
    /// Compression of qcow2 files.
    pub compression: Option<Compression>,
}

/// What a point is to be.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Draft {
    /// What was asked for.
    pub settings: Settings,
    /// Without files; until the snapshot was taken without disks, and with the time at which it was begun.
    pub manifest: Manifest,
    /// Identities of the disks of the mount when it was begun.
    #[serde(default)]
    pub mount_disks: Vec<Uuid>,
}

/// Who watches a run.
pub trait Watch: Sync {
    /// So many bytes of what is to be done are done.
    fn done(&self, bytes: u64);
    /// An error ends the run: it was interrupted.
    fn check(&self) -> Result<()>;
}

/// How to copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Effort {
    /// Threads.
    pub threads: usize,
    /// Bytes per second that are read from views; 0 for no limit.
    pub rate: u64,
}

/// Why a disk was not copied.
#[derive(Debug)]
pub struct Failure {
    /// The view could not be read: trying again does not help.
    pub source: bool,
    /// What happened.
    pub error: Error,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        Failure { source: false, error }
    }
}

/// A directory of points, for one backup at a time.
#[derive(Debug)]
pub struct Shelf {
    path: PathBuf,
    _lock: FileLock,
}

impl Shelf {
    /// Opens or makes the directory. EBUSY where a backup runs there.
    pub fn open(path: &Path) -> Result<Shelf> {
        let path = std::path::absolute(path).map_err(|e| Error::io("look at", e).at_path(path))?;
        let dir = OsDir::create(&path)?;
        let lock = lock_file(&path.join(LOCK)).map_err(|e| match e.errno() {
            errno::EBUSY => Error::new(errno::EBUSY, "backup", "another backup runs there").at_path(&path),
            _ => e,
        })?;
        dir.sync()?;
        Ok(Shelf { path, _lock: lock })
    }

    /// Its path, absolute.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Points that are not whole.
    pub fn partials(&self) -> Result<Vec<Partial>> {
        let dir = OsDir::open(&self.path)?;
        let mut found = Vec::new();
        for name in dir.list("")? {
            let Some(point) = name.strip_suffix(PARTIAL).filter(|point| !point.is_empty()) else { continue };
            match read_json::<Draft>(&self.path.join(&name).join(DRAFT)) {
                Ok(draft) => found.push(Partial::new(&self.path, point, draft)?),
                // Killed before anything was in it; what others put there stays.
                Err(e) if e.errno() == errno::ENOENT => {
                    let _ = std::fs::remove_file(self.path.join(&name).join(format!("{DRAFT}.new")));
                    let _ = std::fs::remove_dir(self.path.join(&name));
                }
                Err(e) => return Err(e.hint("remove the directory: no point is in it")),
            }
        }
        Ok(found)
    }

    /// Points that are whole, whose snapshot may not have been completed.
    pub fn unfinished(&self) -> Result<Vec<(String, Draft)>> {
        let dir = OsDir::open(&self.path)?;
        let drafts = dir.list("")?.into_iter().filter(|name| !name.ends_with(PARTIAL) && !name.starts_with('.'));
        Ok(drafts
            .filter_map(|name| Some((name.clone(), read_json(&self.path.join(&name).join(DRAFT)).ok()?)))
            .collect())
    }

    /// Says that the snapshot of a point was completed, or can't be.
    pub fn finished(&self, point: &str) -> Result<()> {
        let dir = OsDir::open(&self.path.join(point))?;
        for name in dir.list("")?.iter().filter(|name| name.ends_with(JOURNAL)) {
            dir.remove(name)?;
        }
        dir.remove(DRAFT)?;
        dir.sync()
    }

    /// Whether a point, whole or not, has this name.
    pub fn has(&self, point: &str) -> bool {
        let exists = |name: &str| std::fs::symlink_metadata(self.path.join(name)).is_ok();
        exists(point) || exists(&format!("{point}{PARTIAL}"))
    }

    /// Begins a point. EEXIST where there is one of that name.
    pub fn begin(&self, draft: Draft) -> Result<Partial> {
        let point = draft.manifest.point.clone();
        if self.has(&point) {
            return Err(Error::new(errno::EEXIST, format!("point '{point}'"), "exists already")
                .at_path(&self.path)
                .hint("take another name"));
        }
        let partial = Partial::new(&self.path, &point, draft)?;
        partial.keep_draft()?;
        Ok(partial)
    }
}

/// A point that is not whole.
#[derive(Debug)]
pub struct Partial {
    shelf: PathBuf,
    dir: OsDir,
    point: String,
    /// What it is to be.
    pub draft: Draft,
}

impl Partial {
    fn new(shelf: &Path, point: &str, draft: Draft) -> Result<Partial> {
        let dir = OsDir::create(&shelf.join(format!("{point}{PARTIAL}")))?;
        dir.sync()?;
        Ok(Partial { shelf: shelf.to_owned(), dir, point: point.to_owned(), draft })
    }

    /// Name of the point.
    pub fn point(&self) -> &str {
        &self.point
    }

    /// Its directory as long as it is not whole.
    pub fn path(&self) -> PathBuf {
        self.dir.path("")
    }

    /// Makes the draft durable.
    pub fn keep_draft(&self) -> Result<()> {
        write_json(&self.dir, DRAFT, &self.draft)
    }

    /// Gives up: nothing of it is left.
    pub fn discard(self) -> Result<()> {
        // The draft goes last: without it nobody would know whose the rest is.
        for name in self.dir.list("")?.iter().filter(|name| *name != DRAFT) {
            self.dir.remove(name)?;
        }
        self.dir.remove(DRAFT)?;
        self.dir.sync()?;
        let shelf = OsDir::open(&self.shelf)?;
        shelf.remove(&format!("{}{PARTIAL}", self.point))?;
        shelf.sync()
    }

    /// Copies the disk of index `disk` in the draft from `view`, as `map` says, or goes on with that. `meta` heads the map
    /// that a raw increment gets.
    pub fn copy_disk(
        &mut self,
        disk: usize,
        view: &Path,
        map: &MapSource,
        meta: &MapMeta,
        effort: &Effort,
        watch: &dyn Watch,
    ) -> std::result::Result<(), Failure> {
        let Some(entry) = self.draft.manifest.disks.get(disk).cloned() else { return Ok(()) };
        let what = |e: Error| with_hint(e).context(format!("disk '{}'", entry.name));
        let copied = self.copy_entry(&entry, view, map, meta, effort, watch);
        let copied_bytes = copied.map_err(|failure| Failure { error: what(failure.error), ..failure })?;
        if let Some(entry) = self.draft.manifest.disks.get_mut(disk) {
            entry.copied_bytes = copied_bytes;
        }
        self.keep_draft().map_err(|e| what(e).into())
    }

    fn copy_entry(
        &self,
        entry: &DiskEntry,
        view: &Path,
        map: &MapSource,
        meta: &MapMeta,
        effort: &Effort,
        watch: &dyn Watch,
    ) -> std::result::Result<u64, Failure> {
        let unreadable = |error| Failure { source: true, error };
        let file = FileSource::open(view).map_err(unreadable)?;
        if file.size() != entry.size {
            let why = format!("the view has {} bytes, and the disk {}", file.size(), entry.size);
            return Err(unreadable(Error::new(errno::EIO, "backup", why).at_path(view)));
        }
        let (image, journal, noted) = self.target(entry, map, meta)?;
        let source =
            Paced { file: &file, size: image.size(), rate: effort.rate, next: Mutex::new(Instant::now()), watch };
        let fresh = entry.base.is_none() || entry.format == Format::Raw;
        let compressed = self.draft.settings.compression.is_some() && entry.format == Format::Qcow2;
        let target = Counted { image: &*image, fresh, compressed, data_bytes: AtomicU64::new(noted.data_bytes) };
        let data_bytes = || target.data_bytes.load(Ordering::Relaxed);
        let done = |offset, len| {
            watch.done(len);
            journal.done(offset, len, &*image, &data_bytes)?;
            watch.check()
        };
        let side = Mutex::new(None);
        let failed = |of: Side, _: u64, _: u64, e: &Error| {
            if e.errno() != errno::ECANCELED {
                side.lock().get_or_insert(of);
            }
            Decision::Fail
        };
        let options = copy::Options {
            threads: effort.threads,
            unit_bytes: image.cluster_bytes().unwrap_or(1),
            ..Default::default()
        };
        watch.done(noted.ranges.iter().map(|range| range.end - range.start).sum());
        let extents = Without { extents: map.extents_from(0)?, done: noted.ranges.into_iter().peekable(), rest: None };
        let copied = copy::copy(&source, &target, extents, &options, &done, &failed);
        // What was copied before an error or an interruption is of use, where the target still takes it.
        let noted = journal.finish(&*image, &data_bytes);
        copied.map_err(|error| Failure { source: side.into_inner() == Some(Side::Read), error })?;
        noted?;
        image.close()?;
        Ok(data_bytes())
    }

    /// The file that a disk goes to, its journal, and what that says.
    fn target(&self, entry: &DiskEntry, map: &MapSource, meta: &MapMeta) -> Result<(Arc<dyn Image>, Journal, Noted)> {
        let journal_name = format!("{}{JOURNAL}", entry.name);
        // The journal is made last: without it what lies there may be half made.
        let goes_on = self.dir.exists(&journal_name)?;
        if !goes_on {
            self.dir.remove(&entry.file)?;
            self.make_file(entry)?;
            if let Some(name) = &entry.map {
                self.write_map(name, map, meta)?;
            }
            self.dir.create(&journal_name)?;
            self.dir.sync()?;
        }
        let image: Arc<dyn Image> = match entry.format {
            Format::Raw => Arc::new(RawImage::over(self.dir.open(&entry.file)?, false)?),
            Format::Qcow2 => {
                let options = image::OpenOptions { format: Some(Format::Qcow2), no_mark: true, ..Default::default() };
                image::open(&self.dir.path(&entry.file), &options)?
            }
        };
        let (journal, noted) = Journal::open(self.dir.open(&journal_name)?)?;
        Ok((image, journal, noted))
    }

    fn make_file(&self, entry: &DiskEntry) -> Result<()> {
        if entry.format == Format::Raw {
            let file = self.dir.create(&entry.file)?;
            file.set_len(entry.size)?;
            return file.sync_all();
        }
        let mut options = CreateOptions::new(image_bytes(entry.size));
        options.backing = entry.base.as_ref().map(|base| (format!("../{}/{}", base.point, entry.file), Format::Qcow2));
        if self.draft.settings.compression == Some(Compression::Zstd) {
            options.compression = header::Compression::Zstd;
        }
        create::create(&self.dir.path(&entry.file), &options)
    }

    fn write_map(&self, name: &str, map: &MapSource, meta: &MapMeta) -> Result<()> {
        let path = self.dir.path(name);
        let failed = |e| Error::io("write", e).at_path(&path);
        let file = std::fs::File::create(&path).map_err(failed)?;
        let mut out = std::io::BufWriter::new(file);
        MapFile::write_once(Arc::new(map.clone()), MapFormat::Json, meta, &mut out)?;
        out.flush().map_err(failed)?;
        out.get_ref().sync_all().map_err(failed)
    }

    /// Bytes that [`Partial::publish`] reads for the checksums.
    pub fn bytes_to_hash(&self) -> u64 {
        let length = |name: &String| std::fs::metadata(self.dir.path(name)).map_or(0, |meta| meta.len());
        self.file_names().iter().map(length).sum()
    }

    fn file_names(&self) -> Vec<String> {
        let disks = &self.draft.manifest.disks;
        disks.iter().flat_map(|disk| [Some(&disk.file), disk.map.as_ref()]).flatten().cloned().collect()
    }

    /// Makes the point whole (S1), once all of its disks were copied: gives its directory. The snapshot is to be
    /// completed then, and [`Shelf::finished`] to be told.
    pub fn publish(&mut self, watch: &dyn Watch) -> Result<PathBuf> {
        let step = |bytes| {
            watch.done(bytes);
            watch.check()
        };
        let names = self.file_names();
        let files = names.iter().map(|name| hash_file(&self.dir.path(name), &step)).collect::<Result<Vec<_>>>()?;
        self.draft.manifest.files = files;
        write_json(&self.dir, MANIFEST, &self.draft.manifest)?;
        let own = hash_file(&self.dir.path(MANIFEST), &|_| Ok(()))?;
        let sums = format!("{}{}  {MANIFEST}\n", self.draft.manifest.sums(), own.sha256);
        write_file(&self.dir, SUMS, sums.as_bytes())?;
        self.dir.sync()?;
        let shelf = OsDir::open(&self.shelf)?;
        shelf.rename(&format!("{}{PARTIAL}", self.point), &self.point)?;
        shelf.sync()?;
        Ok(self.shelf.join(&self.point))
    }
}

fn with_hint(e: Error) -> Error {
    match e.errno() {
        errno::ENOSPC | errno::EFBIG | EDQUOT => e.hint("make room there; the same command goes on then"),
        _ => e,
    }
}

/// Linux's number for an exceeded quota.
const EDQUOT: i32 = 122;

/// A view, read no faster than allowed.
struct Paced<'a> {
    file: &'a FileSource,
    /// Of the target's disk: bytes past the view's end are zeros.
    size: u64,
    rate: u64,
    /// When the next read may begin.
    next: Mutex<Instant>,
    watch: &'a dyn Watch,
}

impl Source for Paced<'_> {
    fn size(&self) -> u64 {
        self.size
    }

    fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.watch.check()?;
        if self.rate > 0 {
            let cost = Duration::from_secs_f64(buf.len() as f64 / self.rate as f64);
            let turn = {
                let mut next = self.next.lock();
                let turn = (*next).max(Instant::now());
                *next = turn + cost;
                turn
            };
            while let Some(rest) = turn.checked_duration_since(Instant::now()).filter(|rest| !rest.is_zero()) {
                std::thread::sleep(rest.min(NAP));
                self.watch.check()?;
            }
        }
        self.file.read(buf, offset)
    }
}

/// The image of a point.
struct Counted<'a> {
    image: &'a dyn Image,
    /// What was not written reads as zeros, or does not count.
    fresh: bool,
    compressed: bool,
    data_bytes: AtomicU64,
}

impl Target for Counted<'_> {
    fn write(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.data_bytes.fetch_add(buf.len() as u64, Ordering::Relaxed);
        if self.compressed {
            return self.image.write_compressed(buf, offset);
        }
        ImageTarget(self.image).write(buf, offset)
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        if self.fresh { Ok(()) } else { ImageTarget(self.image).write_zeroes(offset, len) }
    }
}

/// Extents but for what is done: that is no longer dirty.
struct Without<I, D: Iterator<Item = Range<u64>>> {
    extents: I,
    /// Ascending.
    done: std::iter::Peekable<D>,
    rest: Option<Extent>,
}

impl<I: Iterator<Item = Result<Extent>>, D: Iterator<Item = Range<u64>>> Iterator for Without<I, D> {
    type Item = Result<Extent>;

    fn next(&mut self) -> Option<Self::Item> {
        let extent = match self.rest.take() {
            Some(rest) => rest,
            None => match self.extents.next()? {
                Ok(extent) => extent,
                Err(e) => return Some(Err(e)),
            },
        };
        while self.done.next_if(|done| done.end <= extent.start).is_some() {}
        let end = extent.start + extent.length;
        let (cut, dirty) = match self.done.peek() {
            Some(done) if done.start <= extent.start => (done.end.min(end), false),
            Some(done) => (done.start.min(end), extent.dirty),
            None => (end, extent.dirty),
        };
        if cut < end {
            self.rest = Some(Extent { start: cut, length: end - cut, ..extent });
        }
        Some(Ok(Extent { length: cut - extent.start, dirty, ..extent }))
    }
}
