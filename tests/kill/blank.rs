//! An empty qcow2 image with bitmaps, made without QEMU.

use fleecefs::bitmap::Bits;
use fleecefs::error::Result;
use fleecefs::image::persistent::{Change, NewBitmap};
use fleecefs::image::qcow2::{Parts, Qcow2Image};
use fleecefs::image::{Image, OpenOptions};
use fleecefs::storage::SharedStorage;
use std::sync::Arc;
use uuid::Uuid;

const CLUSTER: u64 = 4096;
/// Granularity of the bitmaps, as a power of two.
pub const FINE_BITS: u8 = 12;
/// The set bits of the disabled bitmap.
pub const OFF: u64 = 0b1011;

/// Opens an image as the core does.
pub fn open(file: SharedStorage) -> Result<Arc<Qcow2Image>> {
    open_as(file, false)
}

/// The same; with `no_mark` it is left without our mark.
pub fn open_as(file: SharedStorage, no_mark: bool) -> Result<Arc<Qcow2Image>> {
    let options = OpenOptions { keeps_bitmaps: true, l2_cache_bytes: Some(65536), no_mark, ..OpenOptions::default() };
    Qcow2Image::over(Parts { file, data: None, backing: None }, &options).map(Arc::new)
}

/// An image of `size` bytes with the bitmaps `on`, which records, and `off`.
pub fn make(storage: SharedStorage, size: u64) {
    let mut bytes = vec![0; 4 * CLUSTER as usize];
    let l1_entries = size.div_ceil(CLUSTER * CLUSTER / 8).max(1) as u32;
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    put(0, b"QFI\xfb");
    put(4, &3u32.to_be_bytes());
    put(20, &12u32.to_be_bytes());
    put(24, &size.to_be_bytes());
    put(36, &l1_entries.to_be_bytes());
    put(40, &(3 * CLUSTER).to_be_bytes());
    put(48, &CLUSTER.to_be_bytes());
    put(56, &1u32.to_be_bytes());
    put(96, &4u32.to_be_bytes());
    put(100, &104u32.to_be_bytes());
    // An extension of nobody's, so that header and extensions take two sectors.
    put(104, &0x1111_2222u32.to_be_bytes());
    put(108, &360u32.to_be_bytes());
    put(CLUSTER as usize, &(2 * CLUSTER).to_be_bytes());
    (0..4).for_each(|cluster| put(2 * CLUSTER as usize + 2 * cluster, &1u16.to_be_bytes()));
    storage.set_len(bytes.len() as u64).unwrap();
    storage.write_at(&bytes, 0).unwrap();
    let image = open(storage.clone()).unwrap();
    let zeros = vec![0; Bits::words_for(size.div_ceil(1 << FINE_BITS))];
    let mut some = zeros.clone();
    some[0] = OFF;
    let new = |name, auto, words| Change::Store(NewBitmap { name, granularity_bits: FINE_BITS, auto, words });
    let persistent = image.persistent().unwrap();
    persistent.finish(&[new("on", true, &zeros), new("off", false, &some)], Uuid::new_v4()).unwrap();
    image.close().unwrap();
    storage.sync().unwrap();
}
