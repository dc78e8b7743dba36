//! Tests of the sidecar as a whole; `fake.rs` is their disk.

mod behaviour;
mod crash;
mod fake;
mod intent;
mod malformed;

use super::*;
use crate::storage::Stamp;
use fake::Disk;

const PAGE: u64 = layout::PAGE;

/// A directory of a 1 GiB disk without anything.
fn empty() -> Directory {
    Directory::new(Uuid::from_u128(7), 1 << 30)
}

/// A fresh sidecar and its disk.
fn fresh() -> (Disk, Sidecar) {
    let disk = Disk::default();
    let sidecar = Sidecar::create(disk.shared(), empty()).unwrap();
    (disk, sidecar)
}

/// A user's bitmap with these bits.
fn user(bitmap: BitmapEntry) -> UserBitmap {
    UserBitmap {
        name: bitmap.uuid.to_string(),
        state: UserBitmapState::Recording,
        bitmap,
        persistent: true,
        read_only: false,
        time_ns: 0,
    }
}

/// The bits of a user's bitmap, of 512-byte granules that just fill `area`.
fn entry(number: u128, area: Area, crc: Option<u32>) -> BitmapEntry {
    BitmapEntry {
        uuid: Uuid::from_u128(number),
        granularity: 512,
        size: area.len.saturating_mul(8 * 512),
        area: Some(area),
        crc,
        everything: None,
        dirty: 0,
    }
}

/// Bits for all of `area`, `set` of them set.
fn bits(area: &Area, set: &[u64]) -> Bits {
    let bits = Bits::heap(area.len * 8);
    set.iter().for_each(|i| {
        bits.set(*i);
    });
    bits
}

fn set_of(bits: &Bits) -> Vec<u64> {
    (0..bits.len()).filter(|i| bits.get(*i)).collect()
}

fn rename(name: &str) -> impl FnOnce(&mut Directory) -> Result<()> {
    let consumer = ConsumerEntry { name: name.to_owned(), checkpoint: Uuid::nil(), previous: None };
    move |directory| {
        directory.consumers = vec![consumer];
        Ok(())
    }
}
