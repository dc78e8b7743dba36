//! The files that an image needs, named before one of them is opened for use.

use super::chain::{DEPTH_MAX, resolve};
use super::read_header;
use crate::error::Result;
use crate::image::Part;
use crate::storage::os::{OpenOptions, OsFile};
use std::path::Path;

/// Tells `visit` of each file that is needed beside the image at `path`, before that file's header is read. What cannot
/// be read ends the walk: who opens the image says why.
pub fn below(path: &Path, visit: &mut dyn FnMut(Part, &Path) -> Result<()>) -> Result<()> {
    let mut image = path.to_owned();
    for _ in 0..DEPTH_MAX {
        let options = OpenOptions { noatime: true, ..Default::default() };
        let Ok(header) = OsFile::open(&image, &options).and_then(|file| read_header(&file)) else { return Ok(()) };
        if let Some(Ok(data)) = header.extensions.data_file().map(|name| resolve(&image, name)) {
            visit(Part::DataFile, &data)?;
        }
        let Some(Ok(below)) = header.backing.as_ref().map(|backing| resolve(&image, &backing.name)) else {
            return Ok(());
        };
        visit(Part::BackingFile, &below)?;
        if header.extensions.backing_format() != Some("qcow2") {
            return Ok(());
        }
        image = below;
    }
    Ok(())
}
