//! Opening what is tested.

use crate::images::Prepared;
use fleecefs::error::Result;
use fleecefs::image::OpenOptions;
use fleecefs::image::qcow2::{Parts, Qcow2Image};
use fleecefs::storage::SharedStorage;

/// The files of an image.
#[derive(Debug, Clone)]
pub struct Files {
    pub image: SharedStorage,
    /// The external data file.
    pub data: Option<SharedStorage>,
}

fn open(files: &Files, prepared: &Prepared, options: &OpenOptions) -> Result<Qcow2Image> {
    let parts = Parts { file: files.image.clone(), data: files.data.clone(), backing: prepared.backing() };
    Qcow2Image::over(parts, options)
}

/// The disk, or one of its internal snapshots, for reading.
pub fn read_only(files: &Files, prepared: &Prepared, snapshot: Option<&str>) -> Result<Qcow2Image> {
    let snapshot = snapshot.map(str::to_owned);
    open(files, prepared, &OpenOptions { read_only: true, snapshot, ..Default::default() })
}

/// The disk for reading and writing. `tiny_cache`: tables are loaded and dropped all the time.
pub fn read_write(files: &Files, prepared: &Prepared, tiny_cache: bool) -> Result<Qcow2Image> {
    // The default takes longer to set up than a small image to read.
    let l2_cache_bytes = Some(if tiny_cache { 1 } else { 1 << 18 });
    let keeps_bitmaps = prepared.recipe.bitmaps;
    open(files, prepared, &OpenOptions { l2_cache_bytes, keeps_bitmaps, ..Default::default() })
}
