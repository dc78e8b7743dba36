//! Opening an image with all that lies below it: external data file and backing files.
//!
//! A chain is opened from the top down and put together from the bottom up, without recursion. Each file is locked as
//! QEMU locks it; backing files only for reading. The same file twice (by device and inode) is a loop.
//!
//! Names come from the image, so they are as trustworthy as whoever made it: like QEMU, this opens what they say. But
//! nothing is probed: a backing file without a recorded format is refused, or a guest could turn its raw base into an
//! image that names any file of the host.

use super::prepare;
use super::{Files, OpenOptions, Qcow2Image};
use crate::error::{Error, Result, errno};
use crate::image::Image;
use crate::image::raw::RawImage;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Most images in a chain, the active one included.
pub(super) const DEPTH_MAX: usize = 200;

/// What to do about files that are not where an image says.
const BACKING_CURE: &str = "record where it is with: qemu-img rebase -u -b BACKING -F FORMAT IMAGE";
const DATA_CURE: &str = "its name counts from the image's directory (in QEMU from where that was started); record all of \
                         its path with: qemu-img amend -o data_file=PATH IMAGE";

/// Says what to do about a file that is not there, where nothing else is said.
fn gone(e: Error, cure: &str) -> Error {
    if e.errno() == errno::ENOENT && e.hint_text().is_none() { e.hint(cure) } else { e }
}

/// What a header says about the image below.
enum Below {
    Nothing,
    Raw(PathBuf),
    Qcow2(PathBuf),
}

/// The files of a chain so far.
#[derive(Default)]
struct Seen(Vec<(u64, u64)>);

impl Seen {
    /// Refuses a file that the chain has already.
    fn add(&mut self, path: &Path) -> Result<()> {
        let meta = std::fs::metadata(path).map_err(|e| Error::io("open", e).at_path(path))?;
        // A device has many nodes; its number is what it is.
        let device = meta.file_type().is_block_device();
        let identity = if device { (u64::MAX, meta.rdev()) } else { (meta.dev(), meta.ino()) };
        if self.0.contains(&identity) {
            return Err(Error::new(errno::ELOOP, "open", "is in its own backing chain").at_path(path));
        }
        self.0.push(identity);
        Ok(())
    }
}

/// Opens the image at `path` and everything below it.
pub(super) fn open(path: &Path, options: &OpenOptions) -> Result<Qcow2Image> {
    let mut seen = Seen::default();
    let mut layers = vec![Files::open(path, options, &mut seen)?];
    let below_options = OpenOptions { read_only: true, snapshot: None, ..options.clone() };
    let mut base: Option<Arc<dyn Image>> = None;
    while let Some(top) = layers.last() {
        let (below, is_qcow2) = match top.below()? {
            Below::Nothing => break,
            Below::Raw(below) => (below, false),
            Below::Qcow2(below) => (below, true),
        };
        let of = format!("backing file of {}", top.file.image.path().display());
        if layers.len() >= DEPTH_MAX {
            return Err(Error::new(errno::ELOOP, of, format!("the chain is longer than {DEPTH_MAX} images")));
        }
        if !is_qcow2 {
            seen.add(&below).map_err(|e| gone(e, BACKING_CURE).context(of.clone()))?;
            base = Some(Arc::new(
                RawImage::open_for(&below, below_options.access(), options.cache).map_err(|e| e.context(of))?,
            ));
            break;
        }
        layers.push(Files::open(&below, &below_options, &mut seen).map_err(|e| gone(e, BACKING_CURE).context(of))?);
    }
    let Some(active) = layers.drain(..1).next() else {
        return Err(Error::new(errno::EINVAL, "open", "an empty chain").at_path(path));
    };
    for layer in layers.into_iter().rev() {
        let named = layer.file.image.path().to_owned();
        let image = layer
            .complete(base.take(), &below_options)
            .map_err(|e| e.context(format!("backing file {}", named.display())))?;
        base = Some(Arc::new(image));
    }
    prepare::prepare(active)?.complete(base, options)
}

impl Files {
    fn open(path: &Path, options: &OpenOptions, seen: &mut Seen) -> Result<Files> {
        seen.add(path)?;
        let file = RawImage::open_for(path, options.access(), options.cache)?;
        prepare::read(file, |header| {
            if !header.has_data_file() {
                return Ok(None);
            }
            let name = header.extensions.data_file().ok_or_else(|| {
                Error::new(errno::EINVAL, "open", "the image doesn't name its external data file").at_path(path)
            })?;
            let of = || format!("external data file of {}", path.display());
            let data = resolve(path, name).map_err(|e| e.context(of()))?;
            seen.add(&data).map_err(|e| gone(e, DATA_CURE).context(of()))?;
            RawImage::open_for(&data, options.access(), options.cache).map(Some).map_err(|e| e.context(of()))
        })
    }

    /// The backing file as the header has it.
    fn below(&self) -> Result<Below> {
        let path = self.file.image.path();
        let Some(backing) = &self.header.backing else { return Ok(Below::Nothing) };
        let name = String::from_utf8_lossy(&backing.name);
        let of = || format!("backing file '{}' of {}", name.escape_debug(), path.display());
        let below = resolve(path, &backing.name).map_err(|e| e.context(of()))?;
        match self.header.extensions.backing_format() {
            Some("raw") => Ok(Below::Raw(below)),
            Some("qcow2") => Ok(Below::Qcow2(below)),
            Some(format) => Err(Error::new(errno::EOPNOTSUPP, of(), format!("its format '{format}' is not supported"))),
            None => Err(Error::new(errno::EINVAL, of(), "the image doesn't record its format")
                .hint("record it with: qemu-img rebase -u -b BACKING -F FORMAT IMAGE")),
        }
    }

    fn complete(self, backing: Option<Arc<dyn Image>>, options: &OpenOptions) -> Result<Qcow2Image> {
        let path = self.file.image.path().to_owned();
        Qcow2Image::new(self, backing, options).map_err(|e| e.at_path(&path))
    }
}

/// A file's name as an image has it: relative to the image's directory. QEMU takes what stands before a colon for a
/// protocol; of these only `file:` is one that we know.
pub(super) fn resolve(image: &Path, name: &[u8]) -> Result<PathBuf> {
    let plain = name.strip_prefix(b"file:").unwrap_or(name);
    let colon = plain.iter().position(|byte| *byte == b':');
    let slash = plain.iter().position(|byte| *byte == b'/').unwrap_or(plain.len());
    if colon.is_some_and(|colon| colon < slash) && plain.len() == name.len() {
        let why = format!("'{}' is not a path of a file", String::from_utf8_lossy(name).escape_debug());
        return Err(Error::new(errno::EOPNOTSUPP, "open", why));
    }
    let directory = image.parent().unwrap_or(Path::new(""));
    Ok(directory.join(OsStr::from_bytes(plain)))
}
