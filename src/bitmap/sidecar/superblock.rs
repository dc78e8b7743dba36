//! The superblock: what the next open needs to know before it believes anything else in the file.

use super::layout::{
    BOOT_ID_MAX_BYTES, INTENT_REGIONS, KNOWN_FEATURES, PAGE, REGION_MIN_BYTES, SUPERBLOCK_MAGIC, VERSION, get, get_u32,
    get_u64, put,
};
use super::slots::Found;
use crate::error::{Error, Result, errno};
use crate::storage::{Stamp, Storage};
use uuid::Uuid;

/// How old the heartbeat may be while the image is written to, in nanoseconds: it is renewed twice as often.
pub const HEARTBEAT_NS: i64 = 10_000_000_000;

const CRC_AT: usize = PAGE as usize - 4;
const STATE_CLEAN: u32 = 0;
const STATE_OPEN: u32 = 1;

/// Whether the last user of the file went in good order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// Everything was saved; true as long as the image still bears `stamp`.
    Clean {
        /// The image as it was left.
        stamp: Stamp,
    },
    /// Somebody is writing, or was when it ended.
    Open {
        /// What the fine bits of this session carry; another's are not ours.
        nonce: Uuid,
        /// The boot of the host that the session runs in.
        boot_id: String,
    },
}

/// What stands in a superblock slot, beside its generation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Superblock {
    /// Clean or open.
    pub state: State,
    /// The disk that the file belongs to for life.
    pub disk: Uuid,
    /// When the writer was last known to live, nanoseconds since the epoch.
    pub heartbeat_ns: i64,
    /// What one intent bit stands for, in bytes.
    pub region_size: u64,
}

/// The smallest region size in bytes with which one intent page covers a disk of `disk_size` bytes.
pub fn region_size_for(disk_size: u64) -> u64 {
    let least = disk_size.div_ceil(INTENT_REGIONS);
    least.checked_next_power_of_two().unwrap_or(1 << 63).max(REGION_MIN_BYTES)
}

impl Superblock {
    /// Whether the fields can be written and cover a disk of `disk_size` bytes.
    pub(super) fn check(&self, disk_size: u64) -> Result<()> {
        let bad = |why: String| Err(Error::new(errno::EINVAL, "dirty log: superblock", why));
        if !self.region_size.is_power_of_two() || self.region_size < region_size_for(disk_size) {
            return bad(format!("a region of {} bytes does not cover a disk of {disk_size} bytes", self.region_size));
        }
        match &self.state {
            State::Open { boot_id, .. } if boot_id.len() > BOOT_ID_MAX_BYTES => {
                bad(format!("boot id of {} bytes, longer than {BOOT_ID_MAX_BYTES}", boot_id.len()))
            }
            _ => Ok(()),
        }
    }

    /// The slot's bytes.
    pub(super) fn encode(&self, generation: u64, directory_sequence: u64) -> Vec<u8> {
        let mut page = vec![0; PAGE as usize];
        put(&mut page, 0, &SUPERBLOCK_MAGIC);
        put(&mut page, 8, &VERSION.to_le_bytes());
        put(&mut page, 24, &generation.to_le_bytes());
        put(&mut page, 32, &directory_sequence.to_le_bytes());
        put(&mut page, 40, &self.region_size.to_le_bytes());
        put(&mut page, 48, &self.heartbeat_ns.to_le_bytes());
        put(&mut page, 56, self.disk.as_bytes());
        match &self.state {
            State::Clean { stamp } => {
                put(&mut page, 12, &STATE_CLEAN.to_le_bytes());
                put(&mut page, 88, &stamp.dev.to_le_bytes());
                put(&mut page, 96, &stamp.ino.to_le_bytes());
                put(&mut page, 104, &stamp.size.to_le_bytes());
                put(&mut page, 112, &stamp.mtime_ns.to_le_bytes());
                put(&mut page, 120, &stamp.ctime_ns.to_le_bytes());
            }
            State::Open { nonce, boot_id } => {
                put(&mut page, 12, &STATE_OPEN.to_le_bytes());
                put(&mut page, 72, nonce.as_bytes());
                put(&mut page, 128, &[boot_id.len() as u8]);
                put(&mut page, 129, boot_id.as_bytes());
            }
        }
        let crc = checksum(&page);
        put(&mut page, CRC_AT, &crc.to_le_bytes());
        page
    }
}

/// The bytes of the slot at `at` with its generation; None where it was never written or only in part.
pub(super) fn read_slot(file: &dyn Storage, at: u64) -> Result<Option<Found>> {
    let mut page = vec![0; PAGE as usize];
    file.read_at(&mut page, at)?;
    let good = page.starts_with(&SUPERBLOCK_MAGIC) && get_u32(&page, CRC_AT) == checksum(&page);
    Ok(good.then(|| Found { sequence: get_u64(&page, 24), bytes: page }))
}

/// What a valid slot says, and the directory sequence that was durable then. EOPNOTSUPP where a newer program wrote it.
pub(super) fn decode(page: &[u8]) -> Result<(Superblock, u64)> {
    let version = get_u32(page, 8);
    if version > VERSION {
        let why = format!("version {version} is newer than version {VERSION}, the newest that this program knows");
        return Err(too_new(why));
    }
    let unknown = get_u64(page, 16) & !KNOWN_FEATURES;
    if unknown != 0 {
        return Err(too_new(format!("feature bits {unknown:#x} are not known to this program (version {VERSION})")));
    }
    let damaged = |why: String| Error::new(errno::EINVAL, "dirty log", why);
    if version != VERSION {
        return Err(damaged(format!("version {version} was never written")));
    }
    let state = match get_u32(page, 12) {
        STATE_CLEAN => State::Clean {
            stamp: Stamp {
                dev: get_u64(page, 88),
                ino: get_u64(page, 96),
                size: get_u64(page, 104),
                mtime_ns: i64::from_le_bytes(get(page, 112)),
                ctime_ns: i64::from_le_bytes(get(page, 120)),
            },
        },
        STATE_OPEN => State::Open {
            nonce: Uuid::from_bytes(get(page, 72)),
            boot_id: boot_id(page).ok_or_else(|| damaged("the boot id is not a text of at most 64 bytes".into()))?,
        },
        other => return Err(damaged(format!("state {other} is neither clean nor open"))),
    };
    let superblock = Superblock {
        state,
        disk: Uuid::from_bytes(get(page, 56)),
        heartbeat_ns: i64::from_le_bytes(get(page, 48)),
        region_size: get_u64(page, 40),
    };
    Ok((superblock, get_u64(page, 32)))
}

fn boot_id(page: &[u8]) -> Option<String> {
    let len = usize::from(get::<1>(page, 128)[0]);
    let bytes = page.get(129..129 + BOOT_ID_MAX_BYTES)?.get(..len)?;
    String::from_utf8(bytes.to_vec()).ok()
}

fn checksum(page: &[u8]) -> u32 {
    crc32c::crc32c(page.get(..CRC_AT).unwrap_or_default())
}

fn too_new(why: String) -> Error {
    Error::new(errno::EOPNOTSUPP, "dirty log", why).hint("use the newer fleecefs that wrote it")
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn superblock() -> impl Strategy<Value = Superblock> {
        let stamp = any::<(u64, u64, u64, i64, i64)>().prop_map(|(dev, ino, size, mtime_ns, ctime_ns)| State::Clean {
            stamp: Stamp { dev, ino, size, mtime_ns, ctime_ns },
        });
        let open = (any::<u128>(), "[a-f0-9-]{0,64}")
            .prop_map(|(nonce, boot_id)| State::Open { nonce: Uuid::from_u128(nonce), boot_id });
        (prop_oneof![stamp, open], any::<u128>(), any::<i64>(), 20..50u32).prop_map(
            |(state, disk, heartbeat_ns, shift)| Superblock {
                state,
                disk: Uuid::from_u128(disk),
                heartbeat_ns,
                region_size: 1 << shift,
            },
        )
    }

    proptest! {
        #[test]
        fn what_was_encoded_is_decoded(superblock in superblock(), sequence: u64, generation: u64) {
            let page = superblock.encode(generation, sequence);
            prop_assert_eq!(get_u64(&page, 24), generation);
            prop_assert_eq!(decode(&page).unwrap(), (superblock, sequence));
        }

        #[test]
        fn arbitrary_fields_never_panic(page in proptest::collection::vec(any::<u8>(), 0..300), valid: bool) {
            let mut page = page;
            if valid && page.len() >= 24 {
                put(&mut page, 8, &VERSION.to_le_bytes());
                put(&mut page, 16, &[0; 8]);
                let state = u32::from(page[12] & 1);
                put(&mut page, 12, &state.to_le_bytes());
            }
            page.resize(PAGE as usize, 0);
            let _ = decode(&page);
        }
    }

    #[test]
    fn one_intent_page_covers_every_disk() {
        for size in [0, 1, 32 << 30, (32 << 30) + 1, 1 << 40, 1 << 60, u64::MAX] {
            let region = region_size_for(size);
            assert!(region.is_power_of_two() && region >= 1 << 20);
            assert!(u128::from(region) * 32768 >= u128::from(size), "{size}");
            assert!(region == 1 << 20 || u128::from(region) / 2 * 32768 < u128::from(size), "no larger than needed");
        }
    }

    #[test]
    fn fields_out_of_range_are_refused_before_they_are_written() {
        let good = Superblock {
            state: State::Open { nonce: Uuid::nil(), boot_id: "b".repeat(64) },
            disk: Uuid::nil(),
            heartbeat_ns: 0,
            region_size: 1 << 20,
        };
        assert!(good.check(32 << 30).is_ok());
        assert!(good.check((32 << 30) + 1).is_err());
        assert!(Superblock { region_size: 3 << 20, ..good.clone() }.check(0).is_err());
        assert!(Superblock { region_size: 1 << 19, ..good.clone() }.check(0).is_err());
        let state = State::Open { nonce: Uuid::nil(), boot_id: "b".repeat(65) };
        assert!(Superblock { state, ..good }.check(0).is_err());
    }
}
