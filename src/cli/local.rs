//! Images that commands look at themselves, without a mount: opened, locked as QEMU locks them, their format known.

use super::spec::format_by_name;
use crate::error::{Result, errno};
use crate::image::Format;
use crate::image::probed::probe_file;
use crate::storage::lock::{Access, ImageLock};
use crate::storage::os::{OpenOptions, OsFile};
use clap::Args;
use std::path::PathBuf;

/// The image of a command.
#[derive(Debug, Args)]
pub struct LocalArgs {
    /// The image
    pub image: PathBuf,
    /// Its format; without it a qcow2 image is known by its first bytes
    #[arg(short, long, value_name = "FMT", value_parser = format_by_name)]
    pub format: Option<Format>,
}

/// An open image.
pub struct Local {
    /// Its format.
    pub format: Format,
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
            None => probe_file(&file)?,
        };
        Ok(Local { format, file, _lock: lock })
    }
}
