//! qcow2 images, after QEMU's docs/interop/qcow2.
//!
//! | module | what |
//! | --- | --- |
//! | [`header`], [`extensions`] | the first cluster, checked before anything else is believed |
//! | [`tables`] | L1 and L2 entries, decoded into what they mean |
//! | [`snapshots`] | the table of internal snapshots |
//! | [`host`] | the file, and what entries may point to in it |
//! | [`mapping`] | from guest offsets to runs of bytes with one source |
//! | [`compressed`] | compressed clusters |
//! | `chain` | opening an image and all that lies below it |
//! | [`refcount`] | how refcounts are stored, and references counted |
//! | [`snapshot_table`], [`bitmaps_format`] | the directories of snapshots and bitmaps as a check reads them, entry by entry |
//! | [`check`] | compares what the image says of itself with what is there, and repairs it |
//!
//! Strictness: an image is opened only if its header and snapshot table keep every rule; an L1 or L2 entry that breaks
//! one is EIO for the clusters that it maps, and nothing else. Nothing is written to an image that was opened for
//! reading.

use self::compressed::Decompressor;
use self::header::Header;
use self::host::HostFile;
use self::mapping::{CACHE_BYTES, Mapping, Source};
use self::snapshots::Snapshot;
use super::{Format, Image, OpenOptions};
use crate::error::{Error, Result, errno};
use crate::storage::{BlockStatus, Stamp, Storage};
use std::path::Path;
use std::sync::Arc;

pub mod bitmaps_format;
mod chain;
pub mod check;
pub mod compressed;
pub mod extensions;
pub mod header;
pub mod host;
pub mod mapping;
pub mod refcount;
pub mod snapshot_table;
pub mod snapshots;
pub mod tables;
#[cfg(test)]
mod test_image;

/// Reads and checks the header of an image.
pub fn read_header(storage: &dyn Storage) -> Result<Header> {
    let at = |e: Error| e.at_path(storage.path());
    let file_bytes = storage.len()?;
    let mut prefix = vec![0; file_bytes.min(512) as usize];
    storage.read_at(&mut prefix, 0)?;
    let cluster_bytes = header::cluster_size_of(&prefix).map_err(at)?;
    let mut cluster = vec![0; file_bytes.min(cluster_bytes) as usize];
    storage.read_at(&mut cluster, 0)?;
    Header::parse(&cluster, file_bytes).map_err(at)
}

/// A qcow2 image, or one of its internal snapshots.
#[derive(Debug)]
pub struct Qcow2Image {
    header: Header,
    /// Size of the disk; an internal snapshot has its own.
    size: u64,
    mapping: Mapping,
    decompressor: Decompressor,
    snapshots: Vec<Snapshot>,
    file: HostFile,
    /// The external data file.
    data: Option<HostFile>,
    backing: Option<Arc<dyn Image>>,
}

impl Qcow2Image {
    /// Opens an image, and what lies below it, for reading. Nothing is created or changed; EBUSY where somebody else
    /// writes to one of the files.
    pub fn open(path: &Path, options: &OpenOptions) -> Result<Qcow2Image> {
        if !options.read_only && options.snapshot.is_none() {
            return Err(Error::new(errno::EROFS, "open", "qcow2 images can be served for reading only")
                .at_path(path)
                .hint("open it read-only (-r)"));
        }
        chain::open(path, options)
    }

    /// An image of checked parts; of the internal snapshot with an ID or name, where one is given.
    fn new(
        header: Header,
        mut file: HostFile,
        data: Option<HostFile>,
        backing: Option<Arc<dyn Image>>,
        snapshot: Option<&str>,
    ) -> Result<Qcow2Image> {
        let snapshots = snapshots::read(&header, &mut file)?;
        let (l1, size) = match snapshot.map(|name| snapshots::find(&snapshots, name)).transpose()? {
            Some(snapshot) => ((snapshot.l1_table_offset, snapshot.l1_size), snapshot.disk_size),
            None => ((header.l1_table_offset, header.l1_size), header.size),
        };
        let mapping = Mapping::load(&file, header.geometry(), l1, size, CACHE_BYTES)?;
        let decompressor = Decompressor::new(header.compression, &header.geometry());
        Ok(Qcow2Image { header, size, mapping, decompressor, snapshots, file, data, backing })
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
        self.data.as_ref().unwrap_or(&self.file)
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

    fn refuse_change(&self, what: &str, offset: u64) -> Result<()> {
        Err(Error::new(errno::EROFS, what, "the image is open for reading only").at_path(self.path()).at_offset(offset))
    }
}

impl Image for Qcow2Image {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let there = self.size.saturating_sub(offset).min(buf.len() as u64) as usize;
        let (mut rest, behind) = buf.split_at_mut(there);
        behind.fill(0);
        let mut at = offset;
        while !rest.is_empty() {
            let run = self.mapping.run(&self.file, self.data(), at, rest.len() as u64)?;
            let (piece, next) = rest.split_at_mut(run.len as usize);
            match run.source {
                Source::Data(host) => self.data().image.read_at(piece, host.0)?,
                Source::Zero => piece.fill(0),
                Source::Backing => self.read_backing(piece, at)?,
                Source::Compressed(place) => {
                    let from = (at % self.header.cluster_size()) as usize;
                    self.decompressor.read(&self.file, place, piece, from).map_err(|e| e.at_offset(at))?;
                }
            }
            at += run.len;
            rest = next;
        }
        Ok(())
    }

    fn write_at(&self, _buf: &[u8], offset: u64) -> Result<()> {
        self.refuse_change("write", offset)
    }

    fn write_zeroes(&self, offset: u64, _len: u64, discard: bool) -> Result<()> {
        self.refuse_change(if discard { "discard" } else { "write zeros" }, offset)
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn resize(&self, _size: u64) -> Result<()> {
        self.refuse_change("resize", 0)
    }

    /// Zero where the mapping says so, where nothing is below, and where the host's file has a hole.
    fn block_status(&self, offset: u64, len: u64) -> Result<BlockStatus> {
        let there = self.size.saturating_sub(offset).min(len);
        if there == 0 {
            return Ok(BlockStatus { len, zero: true });
        }
        let run = self.mapping.run(&self.file, self.data(), offset, there)?;
        match run.source {
            Source::Data(host) => self.data().image.block_status(host.0, run.len),
            Source::Zero => Ok(BlockStatus { len: run.len, zero: true }),
            Source::Backing => self.backing_status(offset, run.len),
            Source::Compressed(_) => Ok(BlockStatus { len: run.len, zero: false }),
        }
    }

    fn stamp(&self) -> Result<Stamp> {
        self.file.image.stamp()
    }

    fn format(&self) -> Format {
        Format::Qcow2
    }

    fn path(&self) -> &Path {
        self.file.image.path()
    }

    fn read_only(&self) -> bool {
        true
    }

    fn is_block_device(&self) -> bool {
        self.file.image.is_block_device()
    }
}
