//! Persistent bitmaps of an image, in plain words: what whoever tracks changes may do with them.
//!
//! While an image is written, its bitmaps are in use: the file says of each that its bits do not count, and who writes
//! keeps them. [`PersistentBitmaps::begin`] comes before the first change of the disk, [`PersistentBitmaps::finish`]
//! after the last one; a use that ends without it leaves bitmaps in use.
//!
//! Beside them an image carries a [`Mark`] of ours, by which a writer that came in between is told.

use crate::error::Result;
use std::fmt::Debug;
use uuid::Uuid;

/// Most bytes of bits that an image keeps for one bitmap.
pub const BITS_MAX_BYTES: u64 = 512 << 20;

/// What the file says of a bitmap's bits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Trust {
    /// They are right.
    Good,
    /// Somebody was using the bitmap, and did not store it.
    InUse,
    /// They cannot be used, for this reason.
    Unusable(String),
}

/// A bitmap in the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredBitmap {
    /// Its name, unique in the image.
    pub name: String,
    /// Bytes of the disk that one bit stands for: a power of two from 512 B to 2 GiB.
    pub granularity: u64,
    /// It records writes.
    pub auto: bool,
    /// What its bits are worth.
    pub trust: Trust,
}

/// What tells whether another program has opened the image for writing.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Mark {
    /// What we left in the image. Other programs keep it.
    pub uuid: Option<Uuid>,
    /// No other program has opened the image for writing since.
    pub intact: bool,
    /// What tells a change of what lies below the image, its recorded name included.
    pub backing: Option<String>,
}

/// The mark of an image that bears a note: changes of its disk were not recorded, see [`Image::set_note`]. It is never
/// intact.
///
/// [`Image::set_note`]: super::Image::set_note
pub const LOST_MARK: Uuid = Uuid::from_bytes(*b"fleecefs is lost");

/// A bitmap to be stored.
#[derive(Debug, Clone, Copy)]
pub struct NewBitmap<'a> {
    /// 1 to 1023 bytes without NUL.
    pub name: &'a str,
    /// The granularity is 2 to the power of this, 9 to 31.
    pub granularity_bits: u8,
    /// It records writes.
    pub auto: bool,
    /// One bit for each granule of the disk, least significant first; those behind the end are clear.
    pub words: &'a [u64],
}

/// What to do to a bitmap.
#[derive(Debug, Clone, Copy)]
pub enum Change<'a> {
    /// Stores it, in place of one of the same name.
    Store(NewBitmap<'a>),
    /// Its bits in the file are right, and it is no longer in use.
    Trust(&'a str),
    /// Removes it, whatever state it is in.
    Remove(&'a str),
}

impl Change<'_> {
    /// Name of the bitmap.
    pub fn name(&self) -> &str {
        match self {
            Change::Store(bitmap) => bitmap.name,
            Change::Trust(name) | Change::Remove(name) => name,
        }
    }
}

/// The persistent bitmaps of an image, for reading.
pub trait StoredBitmaps: Send + Sync + Debug {
    /// All of them, in the order of the file. EINVAL where what the image says of them breaks the format.
    fn list(&self) -> Result<Vec<StoredBitmap>>;
    /// The bits of one, a word for 64 of them, also where it is in use: the caller knows whether they are worth
    /// anything.
    fn load(&self, name: &str) -> Result<Vec<u64>>;
    /// Whether the format can have one more bitmap, of this name and granularity in bytes, beside `others`. The error is
    /// QEMU's text.
    fn can_store(&self, name: &str, granularity: u64, others: &[&str]) -> std::result::Result<(), String>;
}

/// The persistent bitmaps of an image that is open for writing.
pub trait PersistentBitmaps: StoredBitmaps {
    /// Takes bitmaps out of the file, all or none, durably, while the others are in use. Unknown names are passed over.
    fn remove(&self, names: &[&str]) -> Result<()>;
    /// The mark as it is in the file now.
    fn mark(&self) -> Result<Mark>;
    /// Makes durable that the bits of all good bitmaps no longer count, and the mark where the image has room for one and
    /// is to have one. While the image bears a note, its mark stays [`LOST_MARK`].
    fn begin(&self, mark: Uuid) -> Result<()>;
    /// Makes the changes, all or none, then the mark; all of it durable. No disk write may follow but after another
    /// [`PersistentBitmaps::begin`].
    fn finish(&self, changes: &[Change<'_>], mark: Uuid) -> Result<()>;
}
