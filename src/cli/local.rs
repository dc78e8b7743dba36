//! Images that commands look at themselves, without a mount: opened, locked as QEMU locks them, their format known.

use crate::error::{Error, Result, errno};
use crate::image::qcow2::header::MAGIC;
use crate::storage::Storage;
use crate::storage::lock::{Access, ImageLock};
use crate::storage::os::{OpenOptions, OsFile};
use clap::{Args, ValueEnum};
use std::path::PathBuf;

/// The image of a command.
#[derive(Debug, Args)]
pub struct LocalArgs {
    /// The image
    pub image: PathBuf,
    /// Its format; without it a qcow2 image is known by its first bytes
    #[arg(short, long, value_name = "FMT")]
    pub format: Option<LocalFormat>,
}

/// Formats by the names that QEMU gives them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LocalFormat {
    /// The bytes of the disk, nothing else
    Raw,
    /// QEMU's image format
    Qcow2,
}

/// An open image.
pub struct Local {
    /// Its format.
    pub format: LocalFormat,
    /// Its file; before the lock, which outlives it.
    pub file: OsFile,
    _lock: ImageLock,
}

impl LocalArgs {
    /// Opens the image. `force_share`: whatever others do to it meanwhile; not together with writing.
    pub fn open(&self, write: bool, force_share: bool) -> Result<Local> {
        let file = OsFile::open(&self.image, &OpenOptions { write, noatime: !write, ..Default::default() })?;
        let access = match (write, force_share) {
            (true, _) => Access::Write,
            (false, false) => Access::Read,
            (false, true) => Access::ReadShared,
        };
        let lock = ImageLock::take(&file, access).map_err(|e| match access {
            Access::Read if e.errno() == errno::EBUSY => {
                e.hint("look at it while it is in use with --force-share (-U)")
            }
            _ => e,
        })?;
        let format = match self.format {
            Some(format) => format,
            None => probe(&file)?,
        };
        Ok(Local { format, file, _lock: lock })
    }
}

fn probe(file: &OsFile) -> Result<LocalFormat> {
    let mut magic = [0; MAGIC.len()];
    file.read_at(&mut magic, 0)?;
    Ok(if magic == MAGIC { LocalFormat::Qcow2 } else { LocalFormat::Raw })
}

/// The error of a command that a format has no answer to.
pub fn not_for(what: &str, format: &str, args: &LocalArgs) -> Error {
    Error::new(errno::EOPNOTSUPP, what, format!("{format} images have nothing to check")).at_path(&args.image)
}
