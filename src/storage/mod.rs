//! Positional file I/O behind one small trait, and everything else that needs the operating system.
//!
//! This is the only layer with `libc` and `unsafe`. Tests replace it: [`mem`] keeps files in memory, [`faulty`] fails
//! at the n-th call, [`crash`] loses what was not synced.

use crate::error::{Error, Result, errno};
use sha2::{Digest, Sha256};
use std::fmt::Debug;
use std::path::Path;
use std::sync::Arc;

mod attribute;
pub mod bounded;
pub mod buffer;
pub mod clock;
pub mod crash;
pub mod device;
pub mod dir;
pub mod faulty;
mod known;
pub mod lock;
pub mod mem;
mod names;
pub mod os;
pub mod process;
pub mod shm;
pub mod watch;
pub mod writeback;

pub use dir::{Dir, MemDir, OsDir};
pub use faulty::{FaultPlan, Faulty};
pub use mem::MemFile;
pub use os::OsFile;
pub use shm::{Shm, ShmRoot, Words};

/// What a file held when it was looked at: a foreign writer changes at least one of these.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Stamp {
    /// Device number (`st_dev`), 0 where there is none.
    pub dev: u64,
    /// Inode number (`st_ino`).
    pub ino: u64,
    /// Length in bytes; for block devices their size; for an image in several files the size of its disk.
    pub size: u64,
    /// Modification time in nanoseconds since the epoch; for an image in several files see [`Stamp::with_others`].
    pub mtime_ns: i64,
    /// Change time in nanoseconds since the epoch.
    pub ctime_ns: i64,
}

impl Stamp {
    /// The stamp of something that holds `size` bytes and lies in this file and others: this one's identity, the newest
    /// change time, and for a modification time a digest of all that any of the files' stamps says (but for device
    /// numbers, which change at boot) and of `also`.
    pub fn with_others(&self, size: u64, others: &[Stamp], also: &[u8]) -> Stamp {
        let mut digest = Sha256::new();
        for stamp in std::iter::once(self).chain(others) {
            for number in [stamp.ino, stamp.size, stamp.mtime_ns as u64, stamp.ctime_ns as u64] {
                digest.update(number.to_le_bytes());
            }
        }
        digest.update(also);
        let mtime_ns = digest.finalize().first_chunk().map_or(0, |bytes| i64::from_le_bytes(*bytes));
        let ctime_ns = others.iter().map(|stamp| stamp.ctime_ns).fold(self.ctime_ns, i64::max);
        Stamp { size, mtime_ns, ctime_ns, ..self.clone() }
    }
}

/// What a run of bytes is, as far as allocation tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockStatus {
    /// Length of the run from the offset that was asked for: at least 1, at most what was asked for.
    pub len: u64,
    /// The whole run reads as zeros without being stored (a hole). `false` promises nothing about the content.
    pub zero: bool,
}

/// Space of a file system in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Space {
    /// Size of the file system.
    pub total: u64,
    /// What an ordinary user may still take (`f_bavail`).
    pub free: u64,
}

/// One file or block device, read and written at byte offsets by many threads at once.
///
/// Transfers are whole or an error: short counts and EINTR are dealt with inside. Writes past the end extend a file;
/// a block device answers ENOSPC. Every error carries errno, path and offset.
pub trait Storage: Send + Sync + Debug {
    /// Fills `buf` from `offset`. Bytes past the end of the file read as zeros.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()>;
    /// Writes all of `buf` at `offset`.
    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()>;
    /// Makes everything written before this call durable (fdatasync).
    fn sync(&self) -> Result<()>;
    /// The same with the file's times, which [`Storage::sync`] may leave to later (fsync).
    fn sync_all(&self) -> Result<()> {
        self.sync()
    }
    /// Makes the length durable, where nobody has written to the file's last byte since `set_len` made it longer; other
    /// changes perhaps not, so that it need not wait for them.
    fn sync_len(&self) -> Result<()> {
        self.sync()
    }
    /// Length in bytes.
    fn len(&self) -> Result<u64>;
    /// True where the length is 0.
    fn is_empty(&self) -> Result<bool> {
        Ok(self.len()? == 0)
    }
    /// Sets the length; new bytes read as zeros. A block device answers EINVAL unless `len` is its size.
    fn set_len(&self, len: u64) -> Result<()>;
    /// Makes a range read as zeros and frees its space where the medium can; where it can't, zeros are written.
    /// Never changes the length.
    fn punch_hole(&self, offset: u64, len: u64) -> Result<()>;
    /// Makes a range read as zeros and keeps its space allocated where the medium can. Never changes the length.
    fn write_zeroes(&self, offset: u64, len: u64) -> Result<()>;
    /// Tells hole from data at `offset`, for at most `len` bytes. Past the end: zero.
    fn block_status(&self, offset: u64, len: u64) -> Result<BlockStatus>;
    /// What to compare to find a foreign writer.
    fn stamp(&self) -> Result<Stamp>;
    /// The value of an extended attribute; None where the file has none of that name, or its medium has none at all.
    fn attribute(&self, _name: &str) -> Result<Option<Vec<u8>>> {
        Ok(None)
    }
    /// Sets an extended attribute, or removes it; durable when it returns. EOPNOTSUPP where the medium has none.
    fn set_attribute(&self, name: &str, _value: Option<&[u8]>) -> Result<()> {
        let what = format!("set attribute {name}");
        Err(Error::new(errno::EOPNOTSUPP, what, "the medium has no attributes").at_path(self.path()))
    }
    /// The smallest unit in bytes that the medium transfers, where callers must keep to it (O_DIRECT), else 1.
    ///
    /// Where it is more than 1, the offset, the length and the buffer's address of every transfer are multiples of it;
    /// only a write may end in mid-unit, exactly at the end of the file. Anything else is EINVAL. Ranges of
    /// `punch_hole` and `write_zeroes` keep to the same rule.
    fn alignment(&self) -> u64 {
        1
    }
    /// The path, for messages.
    fn path(&self) -> &Path;
}

/// A storage that several owners share.
pub type SharedStorage = Arc<dyn Storage>;

/// Checks that `offset + len` is a place that a file can have, and returns it.
fn end_of(what: &str, path: &Path, offset: u64, len: u64) -> Result<u64> {
    offset.checked_add(len).filter(|end| *end <= i64::MAX as u64).ok_or_else(|| {
        Error::new(errno::EFBIG, what, "the range ends past the largest file offset").at_path(path).at_offset(offset)
    })
}

#[cfg(test)]
mod tests {
    use super::Stamp;

    #[test]
    fn a_stamp_of_several_files_shows_each_change_of_each() {
        let stamp = |n: i64| Stamp { dev: 1, ino: 2, size: 3, mtime_ns: n, ctime_ns: n };
        let [top, low] = [stamp(10), stamp(20)];
        let whole = top.with_others(7, std::slice::from_ref(&low), b"header");
        assert_eq!((whole.dev, whole.ino, whole.size, whole.ctime_ns), (1, 2, 7, 20));
        let rebooted = [top.clone(), low.clone()].map(|stamp| Stamp { dev: 9, ..stamp });
        assert_eq!(rebooted[0].with_others(7, &rebooted[1..], b"header"), Stamp { dev: 9, ..whole.clone() });
        for changed in [
            Stamp { ino: 5, ..low.clone() },
            Stamp { size: 5, ..low.clone() },
            Stamp { mtime_ns: 5, ..low.clone() },
            Stamp { ctime_ns: 5, ..low.clone() },
        ] {
            assert_ne!(
                top.with_others(7, std::slice::from_ref(&changed), b"header").mtime_ns,
                whole.mtime_ns,
                "{changed:?}"
            );
        }
        assert_ne!(stamp(11).with_others(7, std::slice::from_ref(&low), b"header").mtime_ns, whole.mtime_ns);
        assert_ne!(top.with_others(7, std::slice::from_ref(&low), b"Header").mtime_ns, whole.mtime_ns);
        assert_ne!(top.with_others(7, &[], b"header").mtime_ns, whole.mtime_ns);
        assert_eq!(stamp(30).with_others(7, &[low], b"").ctime_ns, 30);
    }
}
