//! The bytes of `dirty.log`.
//!
//! All numbers are little-endian; UUIDs are 16 bytes in the order of RFC 9562; every byte that is not named is
//! written as zero and not looked at (except by the checksum). A file that ends short reads as zeros.
//!
//! ```text
//! offset    length  what
//! 0         4096    superblock slot 0
//! 4096      4096    superblock slot 1
//! 8192      4096    intent page
//! 12288     53248   zero, for later versions
//! 65536     4 MiB   directory slot 0
//! 4259840   4 MiB   directory slot 1
//! 8454144   …       areas, in units of 4096 bytes
//! ```
//!
//! # Superblock slot
//! ```text
//! 0     8   magic "FLEECEDL"
//! 8     4   version: 1
//! 12    4   state: 0 CLEAN, 1 OPEN
//! 16    8   incompatible features, one bit each: none yet. Who finds a bit that it does not know refuses the file
//! 24    8   generation: of two valid slots the one with the higher counts
//! 32    8   the newest directory sequence that was durable when this was written
//! 40    8   region size in bytes: what one bit of the intent page stands for; a power of two, at least 1 MiB, such
//!           that 32768 regions cover the disk
//! 48    8   heartbeat: nanoseconds since the epoch, signed
//! 56    16  UUID of the disk, the same as in the directory
//! 72    16  OPEN: nonce, which the files with the fine bits carry too. CLEAN: zero
//! 88    8   CLEAN: device number of the image. OPEN: zero, as the next four
//! 96    8   CLEAN: inode number of the image
//! 104   8   CLEAN: size of the image file in bytes
//! 112   8   CLEAN: modification time of the image, nanoseconds since the epoch, signed
//! 120   8   CLEAN: change time of the image, likewise
//! 128   1   OPEN: length of the boot id in bytes, at most 64. CLEAN: zero, as the next
//! 129   64  OPEN: boot id, UTF-8, zeros behind it
//! 193   …   zero
//! 4092  4   crc32c of bytes 0 to 4091
//! ```
//! Magic, version, generation and checksum keep their places in every later version, so that an older program can
//! tell a newer file from a damaged one.
//!
//! # Intent page
//! 32768 bits, bit `i % 8` of byte `i / 8` for region `i`, that is for the bytes `i * region size` and following of the
//! disk. Set: the region's image bytes and fine bits may not be durable. Under a CLEAN superblock the page means nothing.
//! It has no checksum: each bit is believed by itself.
//!
//! # Directory slot
//! ```text
//! 0     8   magic "FLEECEDD"
//! 8     8   sequence: of two valid slots the one with the higher counts
//! 16    8   length of the text in bytes
//! 24    4   crc32c of bytes 0 to 23 and of the text
//! 28    36  zero
//! 64    …   the text: JSON, UTF-8, as `directory.rs` has it
//! ```
//! What follows the text is left over from earlier ones and means nothing.
//!
//! # Areas
//! An area holds the bits of one bitmap: bit `i % 8` of byte `i / 8` for granule `i`, zeros behind the last granule up
//! to the area's end. Without a checksum in the directory the bitmap records: its bits are those of the area and of all
//! regions whose intent is set. The directory names the areas in use; whatever lies outside of them is free and means nothing.

/// Unit of everything in the file, in bytes.
pub const PAGE: u64 = 4096;
/// The version that this program writes.
pub const VERSION: u32 = 1;
/// The incompatible features that this program knows.
pub const KNOWN_FEATURES: u64 = 0;

/// Where the superblock slots begin; each is a [`PAGE`].
pub const SUPERBLOCK_SLOTS: [u64; 2] = [0, PAGE];
/// First bytes of a superblock slot.
pub const SUPERBLOCK_MAGIC: [u8; 8] = *b"FLEECEDL";
/// Longest boot id in bytes.
pub const BOOT_ID_MAX_BYTES: usize = 64;

/// Where the intent page begins.
pub const INTENT_OFFSET: u64 = 2 * PAGE;
/// How many regions the intent page has bits for.
pub const INTENT_REGIONS: u64 = PAGE * 8;
/// Smallest region in bytes.
pub const REGION_MIN_BYTES: u64 = 1 << 20;

/// Where the directory slots begin.
pub const DIRECTORY_SLOTS: [u64; 2] = [64 << 10, (64 << 10) + DIRECTORY_SLOT_BYTES];
/// Length of a directory slot in bytes.
pub const DIRECTORY_SLOT_BYTES: u64 = 4 << 20;
/// First bytes of a directory slot.
pub const DIRECTORY_MAGIC: [u8; 8] = *b"FLEECEDD";
/// Length of a directory slot's header in bytes; the text follows.
pub const DIRECTORY_HEADER_BYTES: usize = 64;
/// Longest text of a directory in bytes.
pub const DIRECTORY_TEXT_MAX_BYTES: u64 = DIRECTORY_SLOT_BYTES - DIRECTORY_HEADER_BYTES as u64;

/// Where areas may begin.
pub const AREAS_START: u64 = DIRECTORY_SLOTS[1] + DIRECTORY_SLOT_BYTES;
/// Where areas end at the latest: what every file system that is common on Linux can address.
pub const AREAS_END: u64 = 1 << 43;
/// Longest area in bytes: 8 Gi granules, which is 512 TiB at 64 KiB.
pub const AREA_MAX_BYTES: u64 = 1 << 30;

/// Copies `bytes` to `at`; a field of this layout always fits its page.
pub(super) fn put(page: &mut [u8], at: usize, bytes: &[u8]) {
    if let Some(field) = page.get_mut(at..at + bytes.len()) {
        field.copy_from_slice(bytes);
    }
}

/// The `N` bytes at `at`; zeros past the end of `page`.
pub(super) fn get<const N: usize>(page: &[u8], at: usize) -> [u8; N] {
    let field = page.get(at..at + N).and_then(|field| field.try_into().ok());
    field.unwrap_or([0; N])
}

/// The number at `at`.
pub(super) fn get_u64(page: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(get(page, at))
}

/// The number at `at`.
pub(super) fn get_u32(page: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(get(page, at))
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests {
    use super::*;

    #[test]
    fn the_parts_of_the_file_stand_where_the_page_says_and_do_not_overlap() {
        assert_eq!(SUPERBLOCK_SLOTS, [0, 4096]);
        assert_eq!((INTENT_OFFSET, INTENT_OFFSET + PAGE), (8192, 12288));
        assert_eq!(DIRECTORY_SLOTS, [65536, 4_259_840]);
        assert_eq!(AREAS_START, 8_454_144);
        assert!(AREAS_START.is_multiple_of(PAGE) && AREAS_END.is_multiple_of(PAGE));
    }
}
