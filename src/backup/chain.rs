//! Points in a directory, and the chain from an increment down to its full backup.
//!
//! A chain is believed only link by link: each point's manifest names its base by UUID, every file of it has the length
//! that its manifest says, and each qcow2 file is based on just the file that its manifest says. What else lies in the
//! directory is left alone.

use super::copy::Source;
use super::extents::MapSource;
use super::manifest::{DiskEntry, MANIFEST, Manifest, PARTIAL};
use super::{Extent, ExtentSource};
use crate::error::{Error, Result, errno};
use crate::image::{self, Format, Image};
use crate::storage::os::{OpenOptions, identity};
use crate::storage::{BlockStatus, OsFile, Storage};
use crate::units::round_up;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use uuid::Uuid;

/// Most points of a chain: readers open all of its files at once, and QEMU's tools do as we.
pub const MAX_LINKS: usize = 150;

/// A point that is whole, as far as its manifest tells.
#[derive(Debug, Clone)]
pub struct Point {
    /// Its directory.
    pub path: PathBuf,
    /// Its manifest.
    pub manifest: Manifest,
}

/// One point of a disk's chain.
#[derive(Debug, Clone)]
pub struct Link {
    /// The point's directory.
    pub dir: PathBuf,
    /// Its name.
    pub point: String,
    /// The disk in it.
    pub entry: DiskEntry,
}

impl Point {
    /// The point in a directory. Says so where that is a partial one, or none.
    pub fn open(path: &Path) -> Result<Point> {
        let path = std::path::absolute(path).map_err(|e| Error::io("look at", e).at_path(path))?;
        if path.file_name().is_some_and(|name| name.to_string_lossy().ends_with(PARTIAL)) {
            return Err(Error::new(errno::EINVAL, "backup", "it is not whole: its backup did not end")
                .at_path(&path)
                .hint("run the same `fleecefs backup` again: it goes on; or take another point"));
        }
        let manifest = Manifest::read(&path).map_err(|e| match e.errno() {
            errno::ENOENT if path.is_dir() => Error::new(errno::ENOENT, "backup", "there is no manifest.json in it")
                .at_path(&path)
                .hint("give the directory of a point, or the directory with all points for the newest"),
            _ => e,
        })?;
        let point = Point { path, manifest };
        if point.in_place() {
            return Ok(point);
        }
        // A link such as `latest`: what the point builds on lies beside the directory itself.
        let real = point.path.canonicalize().map(|path| Point { path, ..point.clone() });
        Ok(real.ok().filter(Point::in_place).unwrap_or(point))
    }

    /// Whether its directory has its name: who builds on it finds it by that.
    pub fn in_place(&self) -> bool {
        self.path.file_name().is_some_and(|name| name == self.manifest.point.as_str())
    }

    /// When it was taken, in nanoseconds since the epoch.
    pub fn time_ns(&self) -> i128 {
        self.manifest.time.parse::<jiff::Timestamp>().map_or(0, |time| time.as_nanosecond())
    }
}

/// The points in a directory, oldest first, and what could not be read of it.
pub fn points(dir: &Path) -> Result<(Vec<Point>, Vec<Error>)> {
    let failed = |e| Error::io("list", e).at_path(dir);
    let (mut points, mut errors) = (Vec::new(), Vec::new());
    for entry in std::fs::read_dir(dir).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        let partial = path.file_name().is_none_or(|name| name.to_string_lossy().ends_with(PARTIAL));
        if partial || !path.join(MANIFEST).exists() {
            continue;
        }
        match Point::open(&path) {
            Ok(point) => points.push(point),
            Err(e) => errors.push(e),
        }
    }
    points.sort_by_cached_key(|point| (point.time_ns(), point.manifest.point.clone()));
    Ok((points, errors))
}

/// The point that `path` names: a point's directory, or the newest one in a directory of points. An error where one of them
/// cannot be read: it may be the newest.
pub fn point_at(path: &Path) -> Result<Point> {
    if path.join(MANIFEST).exists() || !path.is_dir() {
        return Point::open(path);
    }
    let (mut points, errors) = points(path)?;
    if let Some(e) = errors.into_iter().next() {
        return Err(e.context("which point is the newest is not known").hint("give the directory of the point"));
    }
    points.pop().map_or_else(|| Point::open(path), Ok)
}

/// The chain of a disk, newest first: all files there, of their length, linked by identity.
pub fn links(point: &Point, disk: &str) -> Result<Vec<Link>> {
    let mut links: Vec<Link> = Vec::new();
    let mut point = point.clone();
    loop {
        let entry = point.manifest.disk(disk)?.clone();
        if links.first().is_some_and(|first| first.entry.uuid != entry.uuid) {
            let why = format!("it has disk '{disk}' of another identity than the points that build on it");
            return Err(Error::new(errno::EIO, "backup", why).at_path(&point.path));
        }
        check_files(&point, &entry)?;
        let base = entry.base.clone();
        links.push(Link { dir: point.path.clone(), point: point.manifest.point.clone(), entry });
        let Some(base) = base else { break };
        if links.len() >= MAX_LINKS {
            return Err(
                Error::new(errno::ELOOP, "backup", format!("more than {MAX_LINKS} points")).at_path(&point.path)
            );
        }
        let path = point.path.parent().unwrap_or(Path::new("/")).join(&base.point);
        point = Point::open(&path).map_err(|e| missing(&base.point, &point.manifest.point, e))?;
        if point.manifest.uuid != base.uuid {
            let why = "another point has the name of its base";
            return Err(Error::new(errno::ESTALE, format!("point '{}'", base.point), why).at_path(&path));
        }
    }
    check_backing(&links)?;
    Ok(links)
}

fn missing(base: &str, point: &str, e: Error) -> Error {
    let told = Error::new(e.errno(), format!("point '{base}', which '{point}' builds on"), e.to_string());
    told.hint("without it nothing that builds on it can be restored: bring it back, or take a full backup")
}

fn check_files(point: &Point, entry: &DiskEntry) -> Result<()> {
    for name in [Some(&entry.file), entry.map.as_ref()].into_iter().flatten() {
        let path = point.path.join(name);
        let failed = |e| {
            Error::io("look at", e)
                .at_path(&path)
                .context(format!("point '{}'", point.manifest.point))
                .hint("a file of the chain is missing: bring it back, or take another point")
        };
        let size = std::fs::metadata(&path).map_err(failed)?.len();
        let expected = point.manifest.file(name).map_or(0, |file| file.size);
        if size != expected {
            let why = format!("it has {size} bytes, and had {expected} when it was written");
            return Err(Error::new(errno::EIO, format!("point '{}'", point.manifest.point), why)
                .at_path(path)
                .hint("the file was changed since: restore another point"));
        }
    }
    Ok(())
}

/// Whether each qcow2 file of the chain builds on the next one, and a raw one on none.
fn check_backing(links: &[Link]) -> Result<()> {
    let Some(top) = links.first() else { return Ok(()) };
    if let Some(other) = links.iter().find(|link| link.entry.format != top.entry.format) {
        let why = format!("the chain of point '{}' is in more than one format", top.point);
        return Err(Error::new(errno::EIO, "backup", why).at_path(other.file()));
    }
    if top.entry.format == Format::Raw {
        return Ok(());
    }
    let mut expected = links.iter().map(Link::file);
    image::files(&top.file(), Some(Format::Qcow2), &mut |_, path| {
        let next = expected.next();
        if next.as_ref().and_then(|file| identity(file)).is_some_and(|id| identity(path) == Some(id)) {
            return Ok(());
        }
        let why = match next {
            Some(file) => format!("the chain has {} where the manifests have {}", path.display(), file.display()),
            None => format!("the chain goes on with {}, which no manifest has", path.display()),
        };
        Err(Error::new(errno::EIO, format!("point '{}'", top.point), why))
    })?;
    match expected.next() {
        None => Ok(()),
        Some(file) => {
            let why = "no file of the chain builds on it, although the manifests say so";
            Err(Error::new(errno::EIO, format!("point '{}'", top.point), why).at_path(file))
        }
    }
}

impl Link {
    /// The file with the disk's content.
    pub fn file(&self) -> PathBuf {
        self.dir.join(&self.entry.file)
    }

    /// All files of the disk in this point.
    pub fn files(&self) -> impl Iterator<Item = PathBuf> + '_ {
        [Some(&self.entry.file), self.entry.map.as_ref()].into_iter().flatten().map(|name| self.dir.join(name))
    }
}

/// The newest of `points` (oldest first) that holds the disk, by `is_it` of its identity, as it was at a checkpoint that is
/// known, with its chain; errors of newer ones on the way. One whose directory was renamed is none: what builds on it would not find it.
pub fn base_for(
    points: &[Point],
    disk: &str,
    is_it: &dyn Fn(Uuid) -> bool,
    knows: &dyn Fn(Uuid) -> bool,
) -> (Option<Vec<Link>>, Vec<Error>) {
    let mut errors = Vec::new();
    for point in points.iter().rev() {
        let Ok(entry) = point.manifest.disk(disk) else { continue };
        if !is_it(entry.uuid) || !knows(entry.checkpoint_uuid) {
            continue;
        }
        if !point.in_place() {
            let why = format!("its directory was renamed to {}", point.path.display());
            errors.push(Error::new(errno::ESTALE, format!("point '{}'", point.manifest.point), why));
            continue;
        }
        match links(point, disk) {
            Ok(links) => return (Some(links), errors),
            Err(e) => errors.push(e),
        }
    }
    (None, errors)
}

/// The ranges of a list of extents that are dirty, joined.
pub fn dirty_ranges(extents: impl Iterator<Item = Result<Extent>>) -> Result<Vec<Range<u64>>> {
    let mut ranges: Vec<Range<u64>> = Vec::new();
    for extent in extents {
        let e = extent?;
        if !e.dirty {
            continue;
        }
        let range = e.start..e.start.saturating_add(e.length);
        match ranges.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => ranges.push(range),
        }
    }
    Ok(ranges)
}

/// What a disk held at a point.
pub trait Content: Source {
    /// Whether a run at `offset` is known to read as zeros, for at most `len` bytes.
    fn status(&self, offset: u64, len: u64) -> Result<BlockStatus>;
}

/// Opens what the chain holds, newest first. Its files are locked for reading as QEMU locks them.
pub fn content(links: &[Link]) -> Result<Box<dyn Content>> {
    let Some(top) = links.first() else { return Err(Error::new(errno::EINVAL, "backup", "an empty chain")) };
    let content: Box<dyn Content> = if top.entry.format == Format::Qcow2 {
        let options = image::OpenOptions { format: Some(Format::Qcow2), read_only: true, ..Default::default() };
        let image = image::open(&top.file(), &options)?;
        if image.size() != image_bytes(top.entry.size) {
            let why = format!("it is a disk of {} bytes, and its manifest says {}", image.size(), top.entry.size);
            return Err(Error::new(errno::EIO, format!("point '{}'", top.point), why).at_path(top.file()));
        }
        Box::new(ImageContent { image, size: top.entry.size })
    } else {
        Box::new(RawChain::open(links)?)
    };
    Ok(content)
}

/// Size of the qcow2 image for a disk of `size` bytes: whole sectors.
pub(super) fn image_bytes(size: u64) -> u64 {
    round_up(size, 512)
}

struct ImageContent {
    image: Arc<dyn Image>,
    /// Of the disk.
    size: u64,
}

impl Source for ImageContent {
    fn size(&self) -> u64 {
        self.size
    }

    fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.image.read_at(buf, offset)
    }
}

impl Content for ImageContent {
    fn status(&self, offset: u64, len: u64) -> Result<BlockStatus> {
        self.image.block_status(offset, len)
    }
}

/// Raw files, newest first, each with what of it counts.
struct RawChain {
    layers: Vec<RawLayer>,
    size: u64,
}

struct RawLayer {
    file: OsFile,
    size: u64,
    /// Ascending; None: all of it.
    counts: Option<Vec<Range<u64>>>,
}

impl RawChain {
    fn open(links: &[Link]) -> Result<RawChain> {
        let open = |link: &Link| {
            let size = link.entry.size;
            let file = OsFile::open(&link.file(), &OpenOptions::default())?;
            if file.len()? != size {
                let why = format!("it has {} bytes, and its manifest says {size}", file.len()?);
                return Err(Error::new(errno::EIO, format!("point '{}'", link.point), why).at_path(link.file()));
            }
            let counts = match (&link.entry.map, &link.entry.base) {
                (Some(map), Some(_)) => {
                    let map = MapSource::new(&link.dir.join(map), size, false);
                    let mut next = 0;
                    let whole =
                        map.extents_from(0)?.inspect(|e| next = e.as_ref().map_or(next, |e| e.start + e.length));
                    let counts = dirty_ranges(whole)?;
                    if next != size {
                        let why = format!("the map of point '{}' is not that of a disk of {size} bytes", link.point);
                        return Err(Error::new(errno::EIO, "backup", why)
                            .at_path(link.dir.join(link.entry.map.as_deref().unwrap_or_default())));
                    }
                    Some(counts)
                }
                (None, Some(_)) => {
                    let why = "an increment without a map";
                    return Err(Error::new(errno::EIO, format!("point '{}'", link.point), why).at_path(link.file()));
                }
                (_, None) => None,
            };
            Ok(RawLayer { file, size, counts })
        };
        let layers = links.iter().map(open).collect::<Result<Vec<_>>>()?;
        let size = layers.first().map_or(0, |layer| layer.size);
        Ok(RawChain { layers, size })
    }

    /// The layer that has the byte at `offset`, and for how many bytes, at most `len`, that holds; None: it is zero.
    fn source(&self, offset: u64, len: u64) -> (Option<&RawLayer>, u64) {
        let mut len = len;
        for layer in &self.layers {
            if offset >= layer.size {
                // Cut off then: what lies below is not what grew there later.
                return (None, len);
            }
            len = len.min(layer.size - offset);
            let Some(counts) = &layer.counts else { return (Some(layer), len) };
            let next = counts.partition_point(|range| range.end <= offset);
            match counts.get(next) {
                Some(range) if range.start <= offset => return (Some(layer), len.min(range.end - offset)),
                Some(range) => len = len.min(range.start - offset),
                None => {}
            }
        }
        (None, len)
    }
}

impl Source for RawChain {
    fn size(&self) -> u64 {
        self.size
    }

    fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let mut at = 0;
        while at < buf.len() {
            let (layer, len) = self.source(offset + at as u64, (buf.len() - at) as u64);
            let end = at + len.max(1) as usize;
            let Some(part) = buf.get_mut(at..end) else {
                return Err(Error::new(errno::EIO, "backup", "past the end").at_offset(offset));
            };
            match layer {
                Some(layer) => layer.file.read_at(part, offset + at as u64)?,
                None => part.fill(0),
            }
            at = end;
        }
        Ok(())
    }
}

impl Content for RawChain {
    fn status(&self, offset: u64, len: u64) -> Result<BlockStatus> {
        match self.source(offset, len) {
            (Some(layer), len) => layer.file.block_status(offset, len),
            (None, len) => Ok(BlockStatus { len, zero: true }),
        }
    }
}
