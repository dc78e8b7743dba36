//! The file that an image lies in, and the places in it that entries of tables may point to.
//!
//! The file is driven as a raw image, so it is locked as QEMU locks it and takes any range with O_DIRECT too.

use super::header::Header;
use super::tables::HostOffset;
use crate::error::{Error, Result, errno};
use crate::image::Image;
use crate::image::raw::RawImage;
use std::collections::BTreeMap;

/// The image's file, or its external data file.
#[derive(Debug)]
pub struct HostFile {
    /// The bytes.
    pub image: RawImage,
    /// Length of the file when it was opened.
    bytes: u64,
    /// Metadata that no entry may point into, in whole clusters: start, end and name, none overlapping another. Empty
    /// for an external data file.
    areas: BTreeMap<u64, (u64, &'static str)>,
}

impl HostFile {
    /// A file of guest data alone.
    pub fn of_data(image: RawImage) -> HostFile {
        HostFile { bytes: image.size(), image, areas: BTreeMap::new() }
    }

    /// The file that `header` was read from.
    pub fn of_image(image: RawImage, header: &Header) -> HostFile {
        let areas = header.areas().into_iter().map(|(name, area)| (area.start, (area.end, name))).collect();
        HostFile { bytes: image.size(), image, areas }
    }

    /// Length of the file in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Takes the clusters of an area away from what entries may point to; an error where it lies in other metadata or
    /// ends behind the file.
    pub fn reserve(&mut self, name: &'static str, offset: HostOffset, bytes: u64, cluster_size: u64) -> Result<()> {
        self.check(name, offset, bytes)?;
        self.areas.insert(offset.0, (offset.0 + bytes.next_multiple_of(cluster_size), name));
        Ok(())
    }

    /// Forgets the area that begins at `offset`: its length was not known yet.
    pub fn forget(&mut self, offset: HostOffset) {
        self.areas.remove(&offset.0);
    }

    /// Refuses, with EIO, a target that is not whole in the file or lies in metadata.
    pub fn check(&self, what: &str, offset: HostOffset, bytes: u64) -> Result<()> {
        let bad =
            |why: String| Err(Error::new(errno::EIO, "qcow2 image", format!("{what} at host offset {offset} {why}")));
        let end = match offset.0.checked_add(bytes) {
            Some(end) if end <= self.bytes => end,
            _ => return bad(format!("is not inside the file of {} bytes", self.bytes)),
        };
        match self.areas.range(..end).next_back() {
            Some((_, (area_end, name))) if *area_end > offset.0 => bad(format!("lies in the clusters of {name}")),
            _ => Ok(()),
        }
    }
}
