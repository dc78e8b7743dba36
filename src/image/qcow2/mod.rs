//! qcow2 images, after QEMU's docs/interop/qcow2.
//!
//! | module | what |
//! | --- | --- |
//! | [`header`], [`extensions`] | the first cluster, checked before anything else is believed |
//! | [`tables`] | L1 and L2 entries, decoded into what they mean |
//! | [`snapshots`] | the table of internal snapshots |
//! | [`host`] | the file, and what entries may point to in it |
//! | [`mapping`] | from guest offsets to runs of bytes with one source, and changes of that |
//! | [`compressed`] | compressed clusters |
//! | [`describe`] | what the header tells, in QEMU's names |
//! | `chain` | opening an image and all that lies below it |
//! | [`files`] | which files these are |
//! | [`create`] | new images |
//! | [`carrier`] | images that carry a bitmap to another host |
//! | `write` | changes of guest data: in place, or allocate, fill, sync, publish |
//! | `pack` | clusters stored compressed |
//! | `resize` | changes of the disk's size |
//! | [`range_lock`] | keeps two changes of one cluster apart |
//! | [`session`], [`alloc`] | what a read-write open keeps: the marks in the header, and who may have which cluster |
//! | [`refcount`] | how refcounts are stored, and references counted |
//! | [`bitmaps_format`] | the directory of persistent bitmaps |
//! | [`header_write`] | the header, changed as a whole |
//! | [`bitmaps`], `bitmaps_store`, `persistent` | persistent bitmaps, as they are changed, and as the core uses them |
//! | [`check`] | compares what the image says of itself with what is there, and repairs it |
//!
//! Strictness: an image is opened only if its header and snapshot table keep every rule; an L1 or L2 entry that breaks
//! one is EIO for the clusters that it maps, and nothing else. Nothing is written to an image that was opened for
//! reading.
//!
//! Every change of an L1 or L2 table is in the file when a request is answered, so a kill loses nothing that was
//! answered. What a power loss may leave is the matter of `write` (guest data and L2 entries), [`session`] (refcounts)
//! and `resize`.

use self::bitmaps_format::Directory;
use self::compressed::Decompressor;
use self::header::Header;
use self::host::HostFile;
use self::mapping::{CACHE_BYTES, Mapping, Run, Source};
use self::session::Session;
use self::snapshots::Snapshot;
use self::write::Writer;
use super::persistent::{PersistentBitmaps, StoredBitmaps};
use super::raw::RawImage;
use super::{Format, Image, OpenOptions};
use crate::error::{Error, Result, errno};
use crate::storage::{BlockStatus, SharedStorage, Stamp, Storage};
use crate::units::MAX_DISK_BYTES;
use serde_json::{Map, Value};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

pub mod alloc;
pub mod bitmaps;
pub mod bitmaps_format;
mod bitmaps_store;
pub mod carrier;
mod chain;
pub mod check;
pub mod compressed;
pub mod create;
pub mod describe;
pub mod extensions;
pub mod files;
pub mod header;
pub mod header_write;
pub mod host;
pub mod mapping;
mod pack;
mod persistent;
mod prepare;
pub mod range_lock;
pub mod refcount;
mod resize;
pub mod session;
pub mod snapshots;
pub mod tables;
#[cfg(test)]
mod test_cuts;
#[cfg(test)]
mod test_image;
mod write;

/// Reads and checks the header of an image.
pub fn read_header(storage: &dyn Storage) -> Result<Header> {
    read_header_as(storage, Header::parse)
}

/// The same of an image that may be encrypted: to tell what it is, nothing more.
pub fn look_at_header(storage: &dyn Storage) -> Result<Header> {
    read_header_as(storage, Header::look)
}

fn read_header_as(storage: &dyn Storage, parse: fn(&[u8], u64) -> Result<Header>) -> Result<Header> {
    let at = |e: Error| e.at_path(storage.path());
    let file_bytes = storage.len()?;
    let mut prefix = vec![0; file_bytes.min(512) as usize];
    storage.read_at(&mut prefix, 0)?;
    let cluster_bytes = header::cluster_size_of(&prefix).map_err(at)?;
    let mut cluster = vec![0; file_bytes.min(cluster_bytes) as usize];
    storage.read_at(&mut cluster, 0)?;
    parse(&cluster, file_bytes).map_err(at)
}

/// A qcow2 image, or one of its internal snapshots.
#[derive(Debug)]
pub struct Qcow2Image {
    /// As it was when the image was opened.
    header: Header,
    /// Size of the disk; an internal snapshot has its own.
    size: AtomicU64,
    mapping: Mapping,
    decompressor: Decompressor,
    snapshots: Vec<Snapshot>,
    /// Which of them is served, if one is.
    snapshot: Option<String>,
    file: Arc<HostFile>,
    /// The external data file.
    data: Option<Arc<HostFile>>,
    backing: Option<Arc<dyn Image>>,
    /// Where the image may be changed.
    writer: Option<Writer>,
    /// Whether who opened it for writing keeps its persistent bitmaps.
    keeps_bitmaps: bool,
    /// Whether it is to bear our mark.
    marks: bool,
    /// Its mark says that it bears a note.
    lost: AtomicBool,
    /// The stamp before anything was changed.
    found: Stamp,
}

/// The files of one image, without what is below it.
struct Files {
    header: Header,
    file: HostFile,
    data: Option<HostFile>,
    /// Their stamp before anything was changed.
    found: Stamp,
    /// What the file is not cut below when it is closed.
    keep_bytes: u64,
}

/// What an image consists of.
#[derive(Debug)]
pub struct Parts {
    /// The image's file.
    pub file: SharedStorage,
    /// The external data file.
    pub data: Option<SharedStorage>,
    /// The image below.
    pub backing: Option<Arc<dyn Image>>,
}

impl Qcow2Image {
    /// Opens an image, and what lies below it; an internal snapshot for reading only. For reading, nothing is created or
    /// changed; for writing, an image that was not closed is repaired first. EBUSY where somebody else uses one of the files in another way.
    pub fn open(path: &Path, options: &OpenOptions) -> Result<Qcow2Image> {
        let read_only = options.read_only || options.snapshot.is_some();
        chain::open(path, &OpenOptions { read_only, ..options.clone() })
    }

    /// An image over any storages, without locks; the names that it has for other files are not looked at.
    pub fn over(parts: Parts, options: &OpenOptions) -> Result<Qcow2Image> {
        let read_only = options.read_only;
        let open_data = |header: &Header| {
            let data = parts.data.clone().map(|data| RawImage::over(data, read_only)).transpose()?;
            match (data, header.has_data_file()) {
                (None, true) => Err(Error::new(errno::EINVAL, "open", "the external data file is missing")),
                (data, needed) => Ok(data.filter(|_| needed)),
            }
        };
        let files = prepare::read(RawImage::over(parts.file.clone(), read_only)?, open_data)?;
        Qcow2Image::new(prepare::prepare(files)?, parts.backing, options)
    }

    /// An image of checked parts; of the internal snapshot with an ID or name, where one is given.
    fn new(files: Files, backing: Option<Arc<dyn Image>>, options: &OpenOptions) -> Result<Qcow2Image> {
        let Files { mut header, file, data, found, keep_bytes } = files;
        let snapshots = snapshots::read(&header, &file)?;
        let snapshot = options.snapshot.as_deref().map(|name| snapshots::find(&snapshots, name)).transpose()?;
        let (l1, size) = match snapshot {
            Some(snapshot) => ((snapshot.l1_table_offset, snapshot.l1_size), snapshot.disk_size),
            None => ((header.l1_table_offset, header.l1_size), header.size),
        };
        let snapshot = snapshot.map(|snapshot| snapshot.name.clone());
        let cache_bytes = options.l2_cache_bytes.unwrap_or(CACHE_BYTES);
        // What may grow gets room for more than its size needs now.
        let cached_size = if file.image.read_only() { size } else { MAX_DISK_BYTES };
        let mapping = Mapping::load(&file, header.geometry(), l1, cached_size, cache_bytes)?;
        let decompressor = Decompressor::new(header.compression, &header.geometry());
        let file = Arc::new(file);
        let writer = if file.image.read_only() {
            None
        } else {
            // Refuses refcounts that cannot be used, before the first change; what that does may change some.
            Session::new(file.clone(), &header, keep_bytes)?;
            prepare::note_tables(&file, &mapping, &header)?;
            prepare::begin(&mut header, &file, data.as_ref(), options.keeps_bitmaps)?;
            if header.autoclear_features & header::autoclear::BITMAPS != 0
                && let Some(directory) = Directory::read(&*file, &header)?
            {
                file.reserve("the bitmap directory", directory.offset, directory.bytes, header.cluster_size())?;
            }
            Some(Writer::new(Session::new(file.clone(), &header, keep_bytes)?))
        };
        let below = backing.as_ref().map(|backing| backing.found_stamp()).transpose()?;
        let found = found.with_others(size, below.as_slice(), &[]);
        let (size, data) = (AtomicU64::new(size), data.map(Arc::new));
        let keeps_bitmaps = options.keeps_bitmaps && header.version >= 3;
        let (marks, lost) = (!options.no_mark, AtomicBool::new(persistent::is_lost(&header)));
        Ok(Qcow2Image {
            header,
            size,
            mapping,
            decompressor,
            snapshots,
            snapshot,
            file,
            data,
            backing,
            writer,
            keeps_bitmaps,
            marks,
            lost,
            found,
        })
    }

    /// The header.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The internal snapshots.
    pub fn snapshots(&self) -> &[Snapshot] {
        &self.snapshots
    }

    /// The image below, where there is one.
    pub fn backing(&self) -> Option<&Arc<dyn Image>> {
        self.backing.as_ref()
    }

    /// Where guest data are.
    fn data(&self) -> &HostFile {
        self.data.as_deref().unwrap_or(&self.file)
    }

    /// Reads what lies below; what the backing file doesn't have is zeros.
    fn read_backing(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let Some(backing) = &self.backing else {
            buf.fill(0);
            return Ok(());
        };
        let there = backing.size().saturating_sub(offset).min(buf.len() as u64) as usize;
        let (below, behind) = buf.split_at_mut(there);
        behind.fill(0);
        if below.is_empty() { Ok(()) } else { backing.read_at(below, offset) }
    }

    /// The status of a run that lies below.
    fn backing_status(&self, offset: u64, len: u64) -> Result<BlockStatus> {
        match &self.backing {
            Some(backing) if offset < backing.size() => backing.block_status(offset, len.min(backing.size() - offset)),
            _ => Ok(BlockStatus { len, zero: true }),
        }
    }

    /// The status of a run; the disk's size does not matter.
    fn status(&self, offset: u64, len: u64) -> Result<BlockStatus> {
        let run = self.mapping.run(&self.file, self.data(), offset, len)?;
        match run.source {
            Source::Data(host) => self.data().image.block_status(host.0, run.len),
            Source::Zero => Ok(BlockStatus { len: run.len, zero: true }),
            Source::Backing => self.backing_status(offset, run.len),
            Source::Compressed(_) => Ok(BlockStatus { len: run.len, zero: false }),
        }
    }

    /// Reads from compressed data. They may be given up while they are read: then the mapping says something else now,
    /// and what was read, or an error, is no answer. False where that is so.
    fn read_compressed(&self, buf: &mut [u8], offset: u64, run: Run) -> Result<bool> {
        let Source::Compressed(place) = run.source else { return Ok(false) };
        let from = (offset % self.header.cluster_size()) as usize;
        let read = self.decompressor.read(&self.file, place, buf, from);
        let still =
            self.writer.is_none() || self.mapping.run(&self.file, self.data(), offset, run.len)?.source == run.source;
        if still { read.map(|()| true).map_err(|e| e.at_offset(offset)) } else { Ok(false) }
    }

    /// What makes the image writable; refuses a change of one that was opened for reading, and of a range behind the end.
    fn writer(&self, what: &str, offset: u64, len: u64) -> Result<&Writer> {
        let error = |errno, why| Err(Error::new(errno, what, why).at_path(self.path()).at_offset(offset));
        match (&self.writer, offset.checked_add(len)) {
            (None, _) => error(errno::EROFS, "the image is open for reading only"),
            (Some(writer), Some(end)) if end <= self.size() => Ok(writer),
            _ => error(errno::ENOSPC, "past the end of the disk"),
        }
    }
}

impl Image for Qcow2Image {
    fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let there = self.size().saturating_sub(offset).min(buf.len() as u64) as usize;
        let (mut rest, behind) = buf.split_at_mut(there);
        behind.fill(0);
        let mut at = offset;
        while !rest.is_empty() {
            let run = self.mapping.run(&self.file, self.data(), at, rest.len() as u64)?;
            let (piece, _) = rest.split_at_mut(run.len as usize);
            match run.source {
                Source::Data(host) => self.data().read_at(piece, host.0)?,
                Source::Zero => piece.fill(0),
                Source::Backing => self.read_backing(piece, at)?,
                Source::Compressed(_) => {
                    if !self.read_compressed(piece, at, run)? {
                        continue;
                    }
                }
            }
            at += run.len;
            rest = &mut rest[run.len as usize..];
        }
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.write(self.writer("write", offset, buf.len() as u64)?, buf, offset)
    }

    fn write_compressed(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.pack(self.writer("write compressed", offset, buf.len() as u64)?, buf, offset)
    }

    fn write_zeroes(&self, offset: u64, len: u64, discard: bool) -> Result<()> {
        let what = if discard { "discard" } else { "write zeros" };
        self.zero(self.writer(what, offset, len)?, offset..offset + len, discard)
    }

    fn flush(&self) -> Result<()> {
        let Some(writer) = &self.writer else { return Ok(()) };
        let freed = writer.session.lock().begin_flush();
        let data = self.data.as_ref().map_or(Ok(()), |data| data.sync());
        let synced = data.and_then(|()| self.file.sync());
        let mut session = writer.session.lock();
        match synced {
            Ok(()) => session.alloc.end_flush(freed),
            Err(e) => {
                session.alloc.fail_flush(freed);
                Err(e)
            }
        }
    }

    fn resize(&self, size: u64) -> Result<()> {
        self.resize_to(self.writer("resize", 0, 0)?, size)
    }

    fn close(&self) -> Result<()> {
        let Some(writer) = &self.writer else { return Ok(()) };
        self.flush()?;
        writer.session.lock().close()?;
        // The stamp has their times, and a power loss must not take those back.
        self.data.iter().try_for_each(|data| data.image.close())?;
        self.file.image.close()
    }

    /// Zero where the mapping says so, where nothing is below, and where the host's file has a hole.
    fn block_status(&self, offset: u64, len: u64) -> Result<BlockStatus> {
        let there = self.size().saturating_sub(offset).min(len);
        if there == 0 {
            return Ok(BlockStatus { len, zero: true });
        }
        self.status(offset, there)
    }

    fn is_own(&self, offset: u64, len: u64) -> Result<(bool, u64)> {
        if len == 0 {
            return Ok((true, 0));
        }
        let run = self.mapping.run(&self.file, self.data(), offset, len)?;
        Ok((run.source != Source::Backing, run.len))
    }

    fn stamp(&self) -> Result<Stamp> {
        let below = self.backing.as_ref().map(|backing| backing.stamp()).transpose()?;
        Ok(prepare::own_stamp(&self.file, self.data.as_deref())?.with_others(self.size(), below.as_slice(), &[]))
    }

    fn found_stamp(&self) -> Result<Stamp> {
        Ok(self.found.clone())
    }

    fn persistent(&self) -> Option<&dyn PersistentBitmaps> {
        if self.keeps_bitmaps && self.writer.is_some() { Some(self) } else { None }
    }

    fn stored(&self) -> Option<&dyn StoredBitmaps> {
        if self.snapshot.is_none() { Some(self) } else { None }
    }

    fn cluster_bytes(&self) -> Option<u64> {
        Some(self.header.cluster_size())
    }

    fn describe(&self, object: &mut Map<String, Value>) {
        describe::describe(&self.header, self.path(), object);
    }

    fn format(&self) -> Format {
        Format::Qcow2
    }

    fn path(&self) -> &Path {
        self.file.image.path()
    }

    fn read_only(&self) -> bool {
        self.writer.is_none()
    }

    fn is_shared(&self) -> bool {
        self.file.image.is_shared()
    }

    fn snapshot(&self) -> Option<&str> {
        self.snapshot.as_deref()
    }

    fn is_block_device(&self) -> bool {
        self.file.image.is_block_device()
    }

    fn on_block_device(&self) -> bool {
        self.is_block_device()
            || self.data.as_ref().is_some_and(|data| data.image.is_block_device())
            || self.backing.as_ref().is_some_and(|backing| backing.on_block_device())
    }

    fn note(&self) -> Result<Option<String>> {
        self.found_note()
    }

    fn set_note(&self, why: Option<&str>) -> Result<()> {
        self.change_note(why)
    }
}
