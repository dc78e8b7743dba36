//! Images: what a guest's disk lies in.
//!
//! [`Image`] is the trait that the core drives; [`open`] gives one of a file in any format. [`raw`] and [`qcow2`] are the
//! formats; [`probed`] keeps the guest of an image whose format nobody named from changing it.

use self::persistent::{PersistentBitmaps, StoredBitmaps};
use crate::error::{Error, Result, errno};
use crate::storage::lock::Access;
use crate::storage::{BlockStatus, Stamp};
use serde_json::{Map, Value};
use std::fmt::Debug;
use std::ops::RangeInclusive;
use std::path::Path;
use std::sync::Arc;

pub mod persistent;
pub mod probed;
pub mod qcow2;
pub mod raw;

/// The extended attribute that holds the note of an image, see [`Image::set_note`].
pub const NOTE: &str = "user.fleecefs.lost";

/// Formats by the names that QEMU gives them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// The bytes of the disk, nothing else.
    Raw,
    /// QEMU's copy-on-write format.
    Qcow2,
}

impl std::fmt::Display for Format {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Format::Raw => f.write_str("raw"),
            Format::Qcow2 => f.write_str("qcow2"),
        }
    }
}

/// How the host's page cache is used (QEMU's `cache=` of the same names).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Cache {
    /// Through the page cache; durable at flush.
    #[default]
    Writeback,
    /// O_DIRECT, past the page cache; durable at flush.
    None,
}

/// How to open an image.
#[derive(Debug, Clone, Default)]
pub struct OpenOptions {
    /// The format; None: qcow2 where the file says so, else raw, under the guard of [`probed`].
    pub format: Option<Format>,
    /// Whether changes are refused.
    pub read_only: bool,
    /// How the host's page cache is used.
    pub cache: Cache,
    /// Serve the internal snapshot of this ID or name instead of the disk as it is; for reading only.
    pub snapshot: Option<String>,
    /// Most memory for the L2 tables of a qcow2 image, of each one of a chain, from [`L2_CACHE_RANGE`]; None:
    /// [`qcow2::mapping::CACHE_BYTES`].
    pub l2_cache_bytes: Option<u64>,
    /// Read while others may write, as QEMU's option of this name does; for reading only.
    pub force_share: bool,
    /// Whether the caller keeps the persistent bitmaps, see [`persistent`]. Else an open for writing makes them
    /// inconsistent, since they would miss what is written.
    pub keeps_bitmaps: bool,
    /// Leave no mark of ours in the image, see [`persistent::Mark`], and take away one that is there.
    pub no_mark: bool,
}

/// Memory that L2 tables may be given: some of them for every thread, to all of a disk of half a pebibyte.
pub const L2_CACHE_RANGE: RangeInclusive<u64> = 128 << 10..=64 << 30;

impl OpenOptions {
    /// What the image's file is opened for.
    pub fn access(&self) -> Access {
        if self.read_only || self.snapshot.is_some() { self.access_below() } else { Access::Write }
    }

    /// What files that are only read are opened for.
    pub fn access_below(&self) -> Access {
        if self.force_share { Access::ReadShared } else { Access::Read }
    }

    /// Refuses what does not go together, and sizes out of their range.
    fn check(&self, path: &Path) -> Result<()> {
        if self.force_share && self.access() == Access::Write {
            let why = "force-share=on can only be used with read-only images";
            return Err(Error::new(errno::EINVAL, "open", why).at_path(path).hint("open it read-only too (-r)"));
        }
        self.l2_cache_bytes.map_or(Ok(()), check_l2_cache)
    }
}

/// Refuses a size of the L2 cache that is out of [`L2_CACHE_RANGE`].
pub fn check_l2_cache(bytes: u64) -> Result<()> {
    if L2_CACHE_RANGE.contains(&bytes) {
        return Ok(());
    }
    Err(Error::new(errno::EINVAL, format!("l2-cache-size {bytes}"), "not from 128K to 64G"))
}

/// What a file is to an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// The image itself.
    Image,
    /// Where its guest data are.
    DataFile,
    /// What it is based on, at whatever depth.
    BackingFile,
}

/// Tells `visit` of each file that opening an image would open, before anything is read from it; an error of `visit`
/// ends the walk. What cannot be read is passed over: [`open`] says why.
pub fn files(path: &Path, format: Option<Format>, visit: &mut dyn FnMut(Part, &Path) -> Result<()>) -> Result<()> {
    visit(Part::Image, path)?;
    match format.map_or_else(|| probed::probe(path), Ok) {
        Ok(Format::Qcow2) => qcow2::files::below(path, visit),
        Ok(Format::Raw) | Err(_) => Ok(()),
    }
}

/// Opens and locks an image, as QEMU locks it. Nothing is created or changed; EBUSY where somebody else uses it.
pub fn open(path: &Path, options: &OpenOptions) -> Result<Arc<dyn Image>> {
    options.check(path)?;
    let format = match options.format {
        Some(format) => format,
        None => probed::probe(path)?,
    };
    if let (Format::Raw, Some(name)) = (format, &options.snapshot) {
        let why = "a raw image has no internal snapshots";
        return Err(
            Error::new(errno::EINVAL, format!("internal snapshot '{}'", name.escape_debug()), why).at_path(path)
        );
    }
    let open = || -> Result<Arc<dyn Image>> {
        if format == Format::Qcow2 {
            return Ok(Arc::new(qcow2::Qcow2Image::open(path, options)?));
        }
        let image = raw::RawImage::open_for(path, options.access(), options.cache)?;
        Ok(if options.format.is_some() { Arc::new(image) } else { Arc::new(probed::ProbedRaw::new(image)?) })
    };
    open().map_err(|e| match e.hint_text() {
        Some(hint) if e.errno() == errno::EBUSY && options.access() == Access::Read => {
            let hint = format!("{hint}; read it all the same with --force-share (-U)");
            e.hint(hint)
        }
        _ => e,
    })
}

/// A disk image, driven by many threads at once.
///
/// Preconditions of every range: `offset + len <= size()`; the core has checked. Only `fleece::Disk` calls the
/// functions that change the image. Postconditions: when a changing call returns `Ok`, later reads by anybody see it,
/// and a kill of this process does not undo it; only `flush` makes it durable against power loss. When it returns an
/// error, the range holds old or new bytes, each byte one or the other.
pub trait Image: Send + Sync + Debug {
    /// Size of the disk in bytes.
    fn size(&self) -> u64;
    /// Fills `buf` from `offset`.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()>;
    /// Writes all of `buf` at `offset`. Byte-granular whatever lies below; disjoint writes never lose each other's bytes.
    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()>;
    /// The same of whole clusters (the last one of the disk may be partial), stored compressed where they take no host
    /// cluster yet and that makes them smaller. EOPNOTSUPP where the format has no way, EINVAL where a cluster is not whole.
    fn write_compressed(&self, _buf: &[u8], offset: u64) -> Result<()> {
        let why = "the format has no compressed clusters";
        Err(Error::new(errno::EOPNOTSUPP, "write compressed", why).at_path(self.path()).at_offset(offset))
    }
    /// Makes a range read as zeros, allocated where the format can (`discard` false), or freed (`discard` true).
    fn write_zeroes(&self, offset: u64, len: u64, discard: bool) -> Result<()>;
    /// Makes all completed changes durable.
    fn flush(&self) -> Result<()>;
    /// Grows or shrinks the disk; new bytes read as zeros. The caller keeps all other I/O away from a cut-off range.
    fn resize(&self, size: u64) -> Result<()>;
    /// Whether a run at `offset` is known to read as zeros, for at most `len` bytes.
    fn block_status(&self, offset: u64, len: u64) -> Result<BlockStatus>;
    /// Whether a run at `offset` is data or zeros of this image itself, not of what lies below it, and for how many bytes
    /// (at most `len`) that holds on.
    fn is_own(&self, _offset: u64, len: u64) -> Result<(bool, u64)> {
        Ok((true, len))
    }
    /// Ends the use of the image: everything is durable, the times of its files too, and no repair is needed at the next
    /// open. Without it a use ends as by a kill.
    fn close(&self) -> Result<()> {
        self.flush()
    }
    /// What a foreign writer would change, of all the image's files.
    fn stamp(&self) -> Result<Stamp>;
    /// What [`Image::stamp`] was before the open changed anything.
    fn found_stamp(&self) -> Result<Stamp> {
        self.stamp()
    }
    /// The persistent bitmaps, where the format has them and the image was opened for writing by who keeps them.
    fn persistent(&self) -> Option<&dyn PersistentBitmaps> {
        None
    }
    /// The persistent bitmaps for reading, where the format has them, and the disk is no internal snapshot.
    fn stored(&self) -> Option<&dyn StoredBitmaps> {
        None
    }
    /// Bytes of a cluster, where the format has them.
    fn cluster_bytes(&self) -> Option<u64> {
        None
    }
    /// Adds to an ImageInfo, in QEMU's names, what the format knows of the image.
    fn describe(&self, object: &mut Map<String, Value>) {
        let _ = object;
    }
    /// The format.
    fn format(&self) -> Format;
    /// The file, for messages and the manifest.
    fn path(&self) -> &Path;
    /// True where the image was opened for reading only.
    fn read_only(&self) -> bool;
    /// True where others may change what is read (`force_share`), so that it cannot be frozen.
    fn is_shared(&self) -> bool {
        false
    }
    /// The internal snapshot that is served instead of the disk as it is.
    fn snapshot(&self) -> Option<&str> {
        None
    }
    /// Whether the medium is a block device: foreign writers leave no time stamp there.
    fn is_block_device(&self) -> bool;
    /// Whether any of the files that the disk consists of is a block device.
    fn on_block_device(&self) -> bool {
        self.is_block_device()
    }
    /// The note that the image bears, see [`Image::set_note`].
    fn note(&self) -> Result<Option<String>> {
        Ok(None)
    }
    /// Notes on the image itself that changes of the disk were not recorded, and why; or takes the note away. Durable
    /// when it returns. It is for when what is kept beside the image can't be written. EOPNOTSUPP where there is no place for
    /// it.
    fn set_note(&self, _why: Option<&str>) -> Result<()> {
        Err(Error::new(errno::EOPNOTSUPP, "note on the image", "it has no place for it").at_path(self.path()))
    }
}
