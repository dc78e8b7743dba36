//! What a disk held at a point, back into a file, a device or a live disk.
//!
//! Invariants:
//! - **R1 nothing old shines through.** Each byte of the disk (or, where only changes are asked for, each that may differ) is
//!   written or found equal; zeros are written as zeros unless the target is known to have them.
//! - **R2 no file of the chain is written to**, by whatever name ([`check_apart`]).
//! - **R3 nobody else writes.** The target is locked as QEMU locks images, a block device is claimed; who forces his way
//!   knows better.

use super::Extent;
use super::chain::{Content, Link};
use super::copy::{self, Decision, Side, Source, Target};
use super::manifest::hash_file;
use super::save::Watch;
use crate::error::{Error, Result, errno};
use crate::image::raw::RawImage;
use crate::image::{self, Cache, Format, Image};
use crate::storage::buffer::{is_zero, with_scratch};
use crate::storage::device;
use crate::storage::lock::Access;
use crate::storage::os::{self, OpenOptions, identity};
use crate::storage::{BlockStatus, Dir, OsDir, OsFile, Storage};
use crate::units::human_size;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// What is compared, and written where it differs.
const BLOCK_BYTES: usize = 4096;
/// What is read of a target at once.
const PIECE_BYTES: u64 = 1 << 20;

/// What a target is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A file that is made.
    NewFile,
    /// A file that is there.
    File,
    /// A block device.
    Device,
    /// A live disk of a mount.
    Live,
}

impl Kind {
    /// In words.
    pub fn text(self) -> &'static str {
        match self {
            Kind::NewFile => "a new file",
            Kind::File => "a file",
            Kind::Device => "a block device",
            Kind::Live => "a live disk",
        }
    }
}

/// What a restore read and wrote, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct Report {
    /// Read from the chain.
    pub chain_read: u64,
    /// Read from the target, to compare.
    pub target_read: u64,
    /// Written as data.
    pub written: u64,
    /// Written as zeros.
    pub zeroed: u64,
}

/// Refuses a target that is a file of the chain, or uses one: `disk_image` is the image of a live disk.
pub fn check_apart(target: &Path, disk_image: Option<&Path>, links: &[Link]) -> Result<()> {
    let files: Vec<PathBuf> = links.iter().flat_map(|link| link.files().collect::<Vec<_>>()).collect();
    let same = |path: &Path| identity(path).and_then(|id| files.iter().find(|file| identity(file) == Some(id)));
    let mut found = same(target).cloned();
    for image in [Some(target), disk_image].into_iter().flatten() {
        // A target that cannot be read as an image is none.
        let _ = image::files(image, None, &mut |_, path| {
            found = found.take().or_else(|| same(path).cloned());
            Ok(())
        });
    }
    match found {
        None => Ok(()),
        Some(file) => {
            let why = format!("it is the source, or uses it: {}", file.display());
            Err(Error::new(errno::EINVAL, "restore to", why).at_path(target).hint("give another target"))
        }
    }
}

/// Where a disk of `size` bytes is restored to.
#[derive(Debug)]
pub struct Destination {
    /// The path.
    pub path: PathBuf,
    /// What it is.
    pub kind: Kind,
    /// Its size before; 0 for a new file.
    pub found_bytes: u64,
    size: u64,
    force: bool,
}

impl Destination {
    /// Looks at a target, and refuses one that does not fit. Nothing is opened for writing or made.
    pub fn look(path: &Path, live: bool, size: u64, force: bool) -> Result<Destination> {
        let mut destination = Destination { path: path.to_owned(), kind: Kind::NewFile, found_bytes: 0, size, force };
        match std::fs::metadata(path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                if !parent_of(path).is_dir() {
                    return Err(Error::io("restore to", e).at_path(path).hint("make its directory first"));
                }
                return Ok(destination);
            }
            Err(e) => return Err(Error::io("restore to", e).at_path(path)),
            Ok(_) => {}
        }
        let file = OsFile::open(path, &OpenOptions::default())?;
        destination.kind = match (live, file.is_block_device()) {
            (true, _) => Kind::Live,
            (false, true) => Kind::Device,
            (false, false) => Kind::File,
        };
        destination.found_bytes = file.len()?;
        if let Some(device) = device::loop_over(path).filter(|_| !force) {
            let why = format!("in use: it is behind {}", device.display());
            return Err(Error::new(errno::EBUSY, "restore to", why)
                .at_path(path)
                .hint(format!("restore to {0}, or detach it with `losetup -d {0}`", device.display())));
        }
        // Never written to as what it seems to be: a guest could have put a header there that names other files.
        if destination.kind == Kind::File
            && destination.found_bytes > 0
            && !force
            && image::probed::probe(path)? != Format::Raw
        {
            let why = "it begins as a qcow2 image, and would be overwritten as a raw one";
            return Err(Error::new(errno::EINVAL, "restore to", why).at_path(path).hint(
                "give a new file; or mount it with fleecefs, and restore to its live disk; or overwrite it with --force",
            ));
        }
        destination.check_size()?;
        Ok(destination)
    }

    fn check_size(&self) -> Result<()> {
        let grows = self.kind == Kind::File;
        if self.found_bytes < self.size && !grows {
            let why = format!(
                "too small: the disk has {} ({} bytes), the target {} bytes",
                human_size(self.size),
                self.size,
                self.found_bytes
            );
            let hint = match self.kind {
                Kind::Live => "make it larger with `fleecefs disk resize`, or restore to a file",
                _ => "make it larger, or give another target",
            };
            return Err(Error::new(errno::ENOSPC, "restore to", why).at_path(&self.path).hint(hint));
        }
        if self.found_bytes > self.size && grows && !self.force {
            let why = format!("it has {} bytes, and would be cut to the disk's {}", self.found_bytes, self.size);
            return Err(Error::new(errno::EINVAL, "restore to", why)
                .at_path(&self.path)
                .hint("remove it, give another target, or use --force"));
        }
        Ok(())
    }

    /// Refuses a new file that cannot have `data_bytes`.
    pub fn check_space(&self, data_bytes: u64) -> Result<()> {
        if self.kind != Kind::NewFile {
            return Ok(());
        }
        let free = OsDir::open(parent_of(&self.path))?.space()?.free;
        if data_bytes <= free {
            return Ok(());
        }
        let why = format!("no space: {} of data, and {} are free", human_size(data_bytes), human_size(free));
        Err(Error::new(errno::ENOSPC, "restore to", why)
            .at_path(&self.path)
            .hint("make room there, or give another target"))
    }

    /// Opens it for writing (R3), and makes it as large as the disk.
    pub fn open(&self) -> Result<Arc<dyn Image>> {
        let in_use = |e: Error| match e.errno() {
            errno::EBUSY => {
                let hint = e.hint_text().map(str::to_owned).unwrap_or_default();
                e.hint(format!("{hint}; close it, or use --force where you know better"))
            }
            _ => e,
        };
        if self.kind == Kind::NewFile {
            OsFile::open(&self.path, &OpenOptions { write: true, create_new: true, ..Default::default() })?;
            os::sync_parent(&self.path)?;
        }
        let image = if self.force {
            let file = OsFile::open(&self.path, &OpenOptions { write: true, ..Default::default() })?;
            RawImage::over(Arc::new(file), false)?
        } else {
            RawImage::open_for(&self.path, Access::Write, Cache::Writeback).map_err(in_use)?
        };
        if matches!(self.kind, Kind::NewFile | Kind::File) && image.size() != self.size {
            image.resize(self.size)?;
        }
        Ok(Arc::new(image))
    }
}

fn parent_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Opens a file or device for a look at it, without a lock.
pub fn open_for_reading(path: &Path) -> Result<Arc<dyn Image>> {
    let file = OsFile::open(path, &OpenOptions::default())?;
    Ok(Arc::new(RawImage::over(Arc::new(file), true)?))
}

/// What `content` holds, as extents that are all to be written: in `ranges` (ascending), or everywhere.
pub fn extents<'a>(
    content: &'a dyn Content,
    ranges: Option<&'a [Range<u64>]>,
) -> impl Iterator<Item = Result<Extent>> + 'a {
    let whole = || std::iter::once(0..content.size()).collect();
    let ranges: Vec<Range<u64>> = ranges.map_or_else(whole, <[_]>::to_vec);
    ranges.into_iter().flat_map(move |range| {
        let mut at = range.start;
        let end = range.end.min(content.size());
        std::iter::from_fn(move || {
            if at >= end {
                return None;
            }
            let status = content.status(at, end - at);
            let step = status.as_ref().map_or(end - at, |status| status.len.clamp(1, end - at));
            let start = at;
            at += step;
            Some(status.map(|status| Extent { start, length: step, dirty: true, zero: status.zero }))
        })
    })
}

/// Bytes of `content` that are not known to be zeros, in `ranges` or everywhere.
pub fn data_bytes(content: &dyn Content, ranges: Option<&[Range<u64>]>, watch: &dyn Watch) -> Result<u64> {
    let mut sum = 0;
    for extent in extents(content, ranges) {
        watch.check()?;
        let e = extent?;
        sum += if e.zero { 0 } else { e.length };
    }
    Ok(sum)
}

/// Writes `content` to `target`: all of it or what lies in `ranges`, and only blocks that differ where `compare`. `fresh`: what
/// was never written in the target reads as zeros. Durable when it returns.
pub fn restore(
    content: &dyn Content,
    target: &dyn Image,
    ranges: Option<&[Range<u64>]>,
    compare: bool,
    fresh: bool,
    threads: usize,
    watch: &dyn Watch,
) -> Result<Report> {
    let source = Watched { content, watch, read: AtomicU64::new(0) };
    let target = Compared { image: target, compare, fresh, ..Compared::new(target) };
    let options = copy::Options { threads, ..Default::default() };
    let done = |_, len| {
        watch.done(len);
        watch.check()
    };
    let fail = |_: Side, _: u64, _: u64, _: &Error| Decision::Fail;
    let copied = copy::copy(&source, &target, extents(content, ranges), &options, &done, &fail);
    // What was written counts, also where it ended early.
    let flushed = target.image.flush();
    copied?;
    flushed?;
    let count = |bytes: &AtomicU64| bytes.load(Ordering::Relaxed);
    Ok(Report {
        chain_read: count(&source.read),
        target_read: count(&target.read),
        written: count(&target.written),
        zeroed: count(&target.zeroed),
    })
}

/// The first offset at which the two differ.
pub fn first_difference(
    content: &dyn Content,
    target: &dyn Image,
    threads: usize,
    watch: &dyn Watch,
) -> Result<Option<u64>> {
    let source = Watched { content, watch, read: AtomicU64::new(0) };
    let found = AtomicU64::new(u64::MAX);
    let finder = Finder { image: target, first: &found };
    let options = copy::Options { threads, detect_zeroes: false, ..Default::default() };
    let done = |_, len| {
        watch.done(len);
        watch.check()
    };
    let fail = |_: Side, _: u64, _: u64, _: &Error| Decision::Fail;
    copy::copy(&source, &finder, extents(content, None), &options, &done, &fail)?;
    let first = found.into_inner();
    Ok((first != u64::MAX).then_some(first))
}

/// Holds the files of a chain against the checksums of its manifests. `point` gives the checksum of a file of a link.
pub fn check_sums(links: &[Link], sum_of: &dyn Fn(&Link, &str) -> Option<String>, watch: &dyn Watch) -> Result<()> {
    let step = |bytes| {
        watch.done(bytes);
        watch.check()
    };
    for link in links {
        for file in link.files() {
            let entry = hash_file(&file, &step)?;
            if sum_of(link, &entry.name).as_deref() != Some(entry.sha256.as_str()) {
                let why = "its content is not what was written: the checksum differs";
                return Err(Error::new(errno::EIO, format!("point '{}'", link.point), why)
                    .at_path(file)
                    .hint("restore an older point, whose chain does not have this file, or bring the file back"));
            }
        }
    }
    Ok(())
}

struct Watched<'a> {
    content: &'a dyn Content,
    watch: &'a dyn Watch,
    read: AtomicU64,
}

impl Source for Watched<'_> {
    fn size(&self) -> u64 {
        self.content.size()
    }

    fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.watch.check()?;
        self.read.fetch_add(buf.len() as u64, Ordering::Relaxed);
        self.content.read(buf, offset)
    }
}

/// A target that is written to, only where it differs if so asked.
struct Compared<'a> {
    image: &'a dyn Image,
    compare: bool,
    fresh: bool,
    read: AtomicU64,
    written: AtomicU64,
    zeroed: AtomicU64,
}

impl<'a> Compared<'a> {
    fn new(image: &'a dyn Image) -> Compared<'a> {
        let zero = || AtomicU64::new(0);
        Compared { image, compare: false, fresh: false, read: zero(), written: zero(), zeroed: zero() }
    }

    fn put(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.written.fetch_add(buf.len() as u64, Ordering::Relaxed);
        self.image.write_at(buf, offset)
    }

    fn put_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        self.zeroed.fetch_add(len, Ordering::Relaxed);
        self.image.write_zeroes(offset, len, true)
    }

    /// Reads the target at `offset` and gives each run of blocks for which `differs` says so to `put`.
    fn each_difference(
        &self,
        offset: u64,
        len: u64,
        differs: &dyn Fn(&[u8], usize) -> bool,
        put: &mut dyn FnMut(Range<usize>) -> Result<()>,
    ) -> Result<()> {
        with_scratch(len as usize, |old| {
            self.image.read_at(old, offset)?;
            self.read.fetch_add(len, Ordering::Relaxed);
            let mut run: Option<Range<usize>> = None;
            for (index, block) in old.chunks(BLOCK_BYTES).enumerate() {
                let at = index * BLOCK_BYTES;
                if differs(block, at) {
                    run.get_or_insert(at..at).end = at + block.len();
                } else if let Some(run) = run.take() {
                    put(run)?;
                }
            }
            run.map_or(Ok(()), put)
        })
    }
}

impl Target for Compared<'_> {
    fn write(&self, buf: &[u8], offset: u64) -> Result<()> {
        if !self.compare {
            return self.put(buf, offset);
        }
        let differs = |block: &[u8], at: usize| buf.get(at..at + block.len()) != Some(block);
        self.each_difference(offset, buf.len() as u64, &differs, &mut |run| {
            let start = offset + run.start as u64;
            self.put(buf.get(run).unwrap_or_default(), start)
        })
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        if self.fresh {
            return Ok(());
        }
        if !self.compare {
            return self.put_zeroes(offset, len);
        }
        let (mut at, end) = (offset, offset + len);
        while at < end {
            let BlockStatus { len, zero } = self.image.block_status(at, end - at)?;
            let step = if zero { len.clamp(1, end - at) } else { len.clamp(1, (end - at).min(PIECE_BYTES)) };
            if !zero {
                let differs = |block: &[u8], _| !is_zero(block);
                self.each_difference(at, step, &differs, &mut |run| {
                    self.put_zeroes(at + run.start as u64, (run.end - run.start) as u64)
                })?;
            }
            at += step;
        }
        Ok(())
    }
}

/// A target that is only looked at.
struct Finder<'a> {
    image: &'a dyn Image,
    first: &'a AtomicU64,
}

impl Finder<'_> {
    fn differs_at(&self, offset: u64) {
        self.first.fetch_min(offset, Ordering::Relaxed);
    }
}

impl Target for Finder<'_> {
    fn write(&self, buf: &[u8], offset: u64) -> Result<()> {
        with_scratch(buf.len(), |there| {
            self.image.read_at(there, offset)?;
            if let Some(at) = buf.iter().zip(there.iter()).position(|(a, b)| a != b) {
                self.differs_at(offset + at as u64);
            }
            Ok(())
        })
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        let (mut at, end) = (offset, offset + len);
        while at < end {
            let BlockStatus { len, zero } = self.image.block_status(at, end - at)?;
            let step = if zero { len.clamp(1, end - at) } else { len.clamp(1, (end - at).min(PIECE_BYTES)) };
            if !zero {
                with_scratch(step as usize, |there| {
                    self.image.read_at(there, at)?;
                    if let Some(set) = there.iter().position(|byte| *byte != 0) {
                        self.differs_at(at + set as u64);
                    }
                    Ok(())
                })?;
            }
            at += step;
        }
        Ok(())
    }
}
