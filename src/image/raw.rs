//! Raw images: the bytes of the disk and nothing else, in a file or block device.
//!
//! Through the page cache the kernel takes any range. With O_DIRECT it takes whole logical blocks from aligned memory,
//! and this module makes byte-granular I/O of that:
//! - memory that is not aligned is copied through a scratch buffer;
//! - part of a block is written by reading it, changing it and writing it back (read-modify-write, RMW).
//!
//! **Claims.** An RMW writes bytes that it does not own. So it holds the claim of its block alone, while writers of
//! whole blocks share theirs: two partial writes of one block lose nothing of each other, and an RMW puts no old bytes
//! back over a whole-block write beside it. One claim covers a unit of 1 MiB, units far apart share one; I/O holds one
//! claim at a time, only `resize` takes them all, in index order.
//!
//! The last block of a file may be shorter than a block. Every write to it is an RMW that ends where the file ends, so
//! the file keeps its length.

use super::{Cache, Format, Image, NOTE};
use crate::error::{Error, Result, errno};
use crate::storage::buffer::with_scratch;
use crate::storage::lock::{Access, ImageLock};
use crate::storage::os::{OpenOptions, OsFile};
use crate::storage::{BlockStatus, SharedStorage, Stamp};
use crate::sync::RwLock;
use crate::units::{MAX_DISK_BYTES, round_down, round_up};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// What one claim covers, and the most that is transferred at once below it.
const CLAIM_BYTES: u64 = 1 << 20;
const CLAIM_COUNT: u64 = 64;
/// What a note is cut to.
const NOTE_MAX_CHARS: usize = 200;

/// A raw image.
#[derive(Debug)]
pub struct RawImage {
    storage: SharedStorage,
    read_only: bool,
    is_block_device: bool,
    is_shared: bool,
    size: AtomicU64,
    /// `storage.alignment()`.
    block: u64,
    /// One per unit of [`CLAIM_BYTES`], modulo [`CLAIM_COUNT`]; leaf locks, held across one transfer below.
    claims: Vec<RwLock<()>>,
    /// Below the storage: fields are dropped in this order, and the lock outlives the last use.
    _lock: Option<ImageLock>,
}

impl RawImage {
    /// Opens and locks an image (DESIGN: as QEMU locks it). Nothing is created or changed; EBUSY where somebody else
    /// uses it.
    pub fn open(path: &Path, read_only: bool, cache: Cache) -> Result<RawImage> {
        RawImage::open_for(path, if read_only { Access::Read } else { Access::Write }, cache)
    }

    /// The same with a lock that suits `access`.
    pub fn open_for(path: &Path, access: Access, cache: Cache) -> Result<RawImage> {
        let read_only = access != Access::Write;
        let options = OpenOptions {
            write: !read_only,
            direct: cache == Cache::None,
            noatime: true,
            claim: !read_only,
            ..Default::default()
        };
        let file = OsFile::open(path, &options).map_err(|e| match e.errno() {
            errno::EROFS | errno::EACCES | errno::EPERM if !read_only => e.hint("open it read-only (-r)"),
            _ => e,
        })?;
        let lock = ImageLock::take(&file, access)?;
        let is_block_device = file.is_block_device();
        let image = RawImage::over(Arc::new(file), read_only)?;
        Ok(RawImage { is_block_device, is_shared: access == Access::ReadShared, _lock: Some(lock), ..image })
    }

    /// An image over any storage, without a lock.
    pub fn over(storage: SharedStorage, read_only: bool) -> Result<RawImage> {
        let size = storage.len()?;
        check_size(size, storage.path())?;
        let block = storage.alignment();
        let claim_count = if block > 1 { CLAIM_COUNT } else { 0 };
        Ok(RawImage {
            storage,
            read_only,
            is_block_device: false,
            is_shared: false,
            size: AtomicU64::new(size),
            block,
            claims: (0..claim_count).map(|_| RwLock::new(())).collect(),
            _lock: None,
        })
    }

    /// Takes notice of a block device that was made longer; gives the size.
    pub fn look_at_growth(&self) -> Result<u64> {
        if self.is_block_device {
            let size = self.storage.len()?;
            check_size(size, self.storage.path())?;
            self.size.fetch_max(size, Ordering::AcqRel);
        }
        Ok(self.size())
    }

    /// See [`Storage::sync_len`].
    ///
    /// [`Storage::sync_len`]: crate::storage::Storage::sync_len
    pub fn sync_len(&self) -> Result<()> {
        self.storage.sync_len()
    }

    fn error(&self, errno: i32, what: &str, why: &str, offset: u64) -> Error {
        Error::new(errno, what, why).at_path(self.storage.path()).at_offset(offset)
    }

    /// Refuses changes of a read-only image, and ranges that are not in the disk.
    fn check_change(&self, what: &str, offset: u64, len: u64) -> Result<()> {
        if self.read_only {
            return Err(self.error(errno::EROFS, what, "the image is open for reading only", offset));
        }
        match offset.checked_add(len) {
            Some(end) if end <= self.size() => Ok(()),
            _ => Err(self.error(errno::ENOSPC, what, "past the end of the disk", offset)),
        }
    }

    fn claim(&self, offset: u64) -> Option<&RwLock<()>> {
        self.claims.get((offset / CLAIM_BYTES % CLAIM_COUNT) as usize)
    }

    /// Splits a range into part of a block, whole blocks, and part of a block; each may be empty.
    fn split(&self, range: Range<u64>) -> [Range<u64>; 3] {
        let first = round_up(range.start, self.block).min(range.end);
        let last = round_down(range.end, self.block).max(first);
        [range.start..first, first..last, last..range.end]
    }

    /// Writes part of one block: reads it, lets `change` do its work on `range`, and writes it back, all under the
    /// exclusive claim.
    fn read_modify_write(&self, range: Range<u64>, change: impl FnOnce(&mut [u8])) -> Result<()> {
        let start = round_down(range.start, self.block);
        let _claim = self.claim(start).map(RwLock::write);
        // After the claim, or a resize could cut the block short in between.
        let len = self.block.min(self.size().saturating_sub(start)) as usize;
        with_scratch(self.block as usize, |block| {
            self.storage.read_at(block, start)?;
            let (from, to) = ((range.start - start) as usize, (range.end - start) as usize);
            change(&mut block[from..to]);
            self.storage.write_at(&block[..len], start)
        })
    }

    /// Runs `write` on every piece of whole blocks that one claim covers, with the claim shared.
    fn each_claim(&self, range: Range<u64>, mut write: impl FnMut(Range<u64>) -> Result<()>) -> Result<()> {
        let mut at = range.start;
        while at < range.end {
            let end = range.end.min(round_down(at, CLAIM_BYTES) + CLAIM_BYTES);
            let _claim = self.claim(at).map(RwLock::read);
            write(at..end)?;
            at = end;
        }
        Ok(())
    }

    /// Writes whole blocks, through aligned memory where the caller's is not.
    fn write_whole(&self, buf: &[u8], offset: u64) -> Result<()> {
        if (buf.as_ptr().addr() as u64).is_multiple_of(self.block) {
            return self.storage.write_at(buf, offset);
        }
        with_scratch(buf.len(), |scratch| {
            scratch.copy_from_slice(buf);
            self.storage.write_at(scratch, offset)
        })
    }
}

fn check_size(size: u64, path: &Path) -> Result<()> {
    if size <= MAX_DISK_BYTES {
        return Ok(());
    }
    Err(Error::new(errno::EFBIG, "use", format!("{size} bytes are more than the largest disk (1 EiB)")).at_path(path))
}

impl Image for RawImage {
    fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let end = match offset.checked_add(buf.len() as u64) {
            Some(end) if end <= MAX_DISK_BYTES => end,
            _ => return Err(self.error(errno::EINVAL, "read", "past the largest disk", offset)),
        };
        let whole = [offset, end, buf.as_ptr().addr() as u64].iter().all(|n| n.is_multiple_of(self.block));
        if whole {
            return self.storage.read_at(buf, offset);
        }
        let mut at = offset;
        while at < end {
            let (first, stop) = (round_down(at, self.block), end.min(round_down(at, CLAIM_BYTES) + CLAIM_BYTES));
            with_scratch((round_up(stop, self.block) - first) as usize, |blocks| {
                self.storage.read_at(blocks, first)?;
                buf[(at - offset) as usize..(stop - offset) as usize]
                    .copy_from_slice(&blocks[(at - first) as usize..(stop - first) as usize]);
                Ok(())
            })?;
            at = stop;
        }
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.check_change("write", offset, buf.len() as u64)?;
        if self.block == 1 {
            return self.storage.write_at(buf, offset);
        }
        let data = |range: Range<u64>| &buf[(range.start - offset) as usize..(range.end - offset) as usize];
        let [head, whole, tail] = self.split(offset..offset + buf.len() as u64);
        self.each_claim(whole, |piece| self.write_whole(data(piece.clone()), piece.start))?;
        for part in [head, tail].into_iter().filter(|part| !part.is_empty()) {
            self.read_modify_write(part.clone(), |bytes| bytes.copy_from_slice(data(part)))?;
        }
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, len: u64, discard: bool) -> Result<()> {
        let what = if discard { "discard" } else { "write zeros" };
        self.check_change(what, offset, len)?;
        let zero = |piece: Range<u64>| {
            let len = piece.end - piece.start;
            if discard {
                self.storage.punch_hole(piece.start, len)
            } else {
                self.storage.write_zeroes(piece.start, len)
            }
        };
        if self.block == 1 {
            return zero(offset..offset + len);
        }
        let [head, whole, tail] = self.split(offset..offset + len);
        self.each_claim(whole, zero)?;
        for part in [head, tail].into_iter().filter(|part| !part.is_empty()) {
            self.read_modify_write(part, |bytes| bytes.fill(0))?;
        }
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        self.storage.sync()
    }

    fn close(&self) -> Result<()> {
        self.storage.sync_all()
    }

    fn resize(&self, size: u64) -> Result<()> {
        self.check_change("resize", 0, 0)?;
        check_size(size, self.storage.path())?;
        // No RMW may be under way: it would write the last block at its old length.
        let _claims: Vec<_> = self.claims.iter().map(RwLock::write).collect();
        self.storage.set_len(size)?;
        self.size.store(size, Ordering::Release);
        Ok(())
    }

    fn block_status(&self, offset: u64, len: u64) -> Result<BlockStatus> {
        self.storage.block_status(offset, len)
    }

    fn stamp(&self) -> Result<Stamp> {
        self.storage.stamp()
    }

    fn format(&self) -> Format {
        Format::Raw
    }

    fn path(&self) -> &Path {
        self.storage.path()
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn is_shared(&self) -> bool {
        self.is_shared
    }

    fn is_block_device(&self) -> bool {
        self.is_block_device
    }

    fn note(&self) -> Result<Option<String>> {
        let note = self.storage.attribute(NOTE)?;
        Ok(note.map(|why| String::from_utf8_lossy(&why).into_owned()))
    }

    fn set_note(&self, why: Option<&str>) -> Result<()> {
        self.check_change("note on the image", 0, 0)?;
        // File systems have room for some hundreds of bytes at least.
        let cut = |why: &str| why.chars().take(NOTE_MAX_CHARS).collect::<String>();
        self.storage.set_attribute(NOTE, why.map(cut).as_ref().map(String::as_bytes))
    }
}

#[cfg(test)]
pub(super) mod testing {
    use super::*;
    use crate::storage::{MemFile, Storage};

    /// A medium that takes whole, aligned blocks only, and lets other threads run between any two steps.
    #[derive(Debug)]
    pub struct Blocks {
        pub file: MemFile,
        pub block: u64,
        pub pause: fn(),
    }

    impl Blocks {
        fn check(&self, address: usize, offset: u64, len: u64, may_end_file: bool) -> Result<()> {
            let whole = len.is_multiple_of(self.block)
                || (may_end_file && self.file.len().is_ok_and(|end| offset + len == end));
            let good = whole && offset.is_multiple_of(self.block) && (address as u64).is_multiple_of(self.block);
            if good { Ok(()) } else { Err(Error::new(errno::EINVAL, "transfer", "not aligned").at_offset(offset)) }
        }
    }

    impl Storage for Blocks {
        fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
            self.check(buf.as_ptr().addr(), offset, buf.len() as u64, false)?;
            self.file.read_at(buf, offset)?;
            (self.pause)();
            Ok(())
        }
        fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
            self.check(buf.as_ptr().addr(), offset, buf.len() as u64, true)?;
            for (i, piece) in buf.chunks(self.block as usize).enumerate() {
                (self.pause)();
                self.file.write_at(piece, offset + i as u64 * self.block)?;
            }
            Ok(())
        }
        fn sync(&self) -> Result<()> {
            self.file.sync()
        }
        fn len(&self) -> Result<u64> {
            self.file.len()
        }
        fn set_len(&self, len: u64) -> Result<()> {
            self.file.set_len(len)
        }
        fn punch_hole(&self, offset: u64, len: u64) -> Result<()> {
            self.check(0, offset, len, true)?;
            (self.pause)();
            self.file.punch_hole(offset, len)
        }
        fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
            self.check(0, offset, len, true)?;
            (self.pause)();
            self.file.write_zeroes(offset, len)
        }
        fn block_status(&self, offset: u64, len: u64) -> Result<BlockStatus> {
            self.file.block_status(offset, len)
        }
        fn stamp(&self) -> Result<Stamp> {
            self.file.stamp()
        }
        fn alignment(&self) -> u64 {
            self.block
        }
        fn path(&self) -> &Path {
            self.file.path()
        }
    }

    pub fn image(block: u64, size: u64, pause: fn()) -> Arc<RawImage> {
        let file = MemFile::new("vda.raw", size);
        Arc::new(RawImage::over(Arc::new(Blocks { file, block, pause }), false).unwrap())
    }

    pub fn bytes(image: &RawImage, offset: u64, len: usize) -> Vec<u8> {
        let mut buf = vec![0xEE; len];
        image.read_at(&mut buf, offset).unwrap();
        buf
    }

    type Change = fn(&RawImage) -> Result<()>;

    /// Two changes that run at the same time on blocks full of 1.
    #[derive(Clone, Copy)]
    pub struct Race {
        name: &'static str,
        changes: [Change; 2],
        /// What each of the first 8192 bytes may be afterwards.
        may_be: fn(usize) -> &'static [u8],
    }

    pub const RACES: [Race; 4] = [
        Race {
            name: "two parts of one block",
            changes: [|image| image.write_at(&[2; 100], 0), |image| image.write_at(&[3; 100], 100)],
            may_be: |at| [&[2], &[3], &[1]][(at / 100).min(2)],
        },
        Race {
            name: "part of a block and a write of whole blocks",
            changes: [|image| image.write_at(&[2; 100], 50), |image| image.write_at(&[3; 8192], 0)],
            may_be: |at| if (50..150).contains(&at) { &[2, 3] } else { &[3] },
        },
        Race {
            name: "part of a block and a discard",
            changes: [|image| image.write_at(&[2; 100], 50), |image| image.write_zeroes(0, 8192, true)],
            may_be: |at| if (50..150).contains(&at) { &[0, 2] } else { &[0] },
        },
        Race {
            name: "zeros in parts of blocks and a write beside them",
            changes: [|image| image.write_zeroes(4000, 200, false), |image| image.write_at(&[3; 200], 4200)],
            may_be: |at| match at {
                4000..4200 => &[0],
                4200..4400 => &[3],
                _ => &[1],
            },
        },
    ];

    pub fn race(image: &Arc<RawImage>, race: Race) {
        image.write_at(&[1; 8192], 0).unwrap();
        let threads = race.changes.map(|change| {
            let image = image.clone();
            crate::sync::thread::spawn(move || change(&image).unwrap())
        });
        threads.into_iter().for_each(|t| t.join().unwrap());
        for (at, byte) in bytes(image, 0, 8192).into_iter().enumerate() {
            let may_be = (race.may_be)(at);
            assert!(may_be.contains(&byte), "{}: byte {at} is {byte}, not one of {may_be:?}", race.name);
        }
    }
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests {
    use super::testing::*;
    use super::*;
    use crate::storage::MemFile;
    use proptest::prelude::*;
    use std::process::Command;
    use std::time::Duration;

    #[test]
    fn writers_of_parts_of_a_block_lose_no_bytes() {
        for block in [512, 4096] {
            let image = image(block, 65536, || std::thread::sleep(Duration::from_micros(200)));
            for pair in RACES {
                for _ in 0..20 {
                    race(&image, pair);
                }
            }
        }
    }

    #[derive(Debug, Clone)]
    enum Op {
        /// Offset and length, from an address with this distance to a page, a byte to start with.
        Write(u64, usize, usize, u8),
        Zero(u64, u64, bool),
        Resize(u64),
    }

    fn ops() -> impl Strategy<Value = Vec<Op>> {
        let place = prop_oneof![0..20_000u64, (0..40u64).prop_map(|n| n * 512), (0..5u64).prop_map(|n| n * 4096)];
        let len = prop_oneof![1..9000usize, (1..16usize).prop_map(|n| n * 512)];
        let address = prop_oneof![Just(0usize), Just(512), 1..4096usize];
        let op = prop_oneof![
            4 => (place.clone(), len.clone(), address, 1..=255u8).prop_map(|(o, l, a, b)| Op::Write(o, l, a, b)),
            2 => (place.clone(), len, any::<bool>()).prop_map(|(o, l, d)| Op::Zero(o, l as u64, d)),
            1 => place.prop_map(Op::Resize),
        ];
        proptest::collection::vec(op, 1..16)
    }

    /// Runs the operations on an image and on a vector of bytes, and compares.
    fn compare(image: &RawImage, ops: &[Op]) -> std::result::Result<(), TestCaseError> {
        let mut model = bytes(image, 0, image.size() as usize);
        for op in ops {
            let size = model.len() as u64;
            match *op {
                Op::Write(offset, len, address, byte) => {
                    let mut memory = crate::storage::buffer::AlignedBuf::new(address + len);
                    let data = &mut memory[address..];
                    data.iter_mut().enumerate().for_each(|(i, b)| *b = byte.wrapping_add(i as u8));
                    let result = image.write_at(data, offset);
                    if offset + len as u64 <= size {
                        prop_assert!(result.is_ok(), "{:?}", result);
                        model[offset as usize..offset as usize + len].copy_from_slice(data);
                    } else {
                        prop_assert_eq!(result.unwrap_err().errno(), errno::ENOSPC);
                    }
                }
                Op::Zero(offset, len, discard) => {
                    let result = image.write_zeroes(offset, len, discard);
                    if offset + len <= size {
                        prop_assert!(result.is_ok(), "{:?}", result);
                        model[offset as usize..(offset + len) as usize].fill(0);
                    } else {
                        prop_assert_eq!(result.unwrap_err().errno(), errno::ENOSPC);
                    }
                }
                Op::Resize(size) => {
                    image.resize(size).unwrap();
                    model.resize(size as usize, 0);
                }
            }
            prop_assert_eq!(image.size(), model.len() as u64);
            prop_assert_eq!(image.storage.len().unwrap(), model.len() as u64);
            prop_assert!(bytes(image, 0, model.len()) == model, "after {:?}", op);
            let mid = model.len() / 3;
            prop_assert!(bytes(image, mid as u64, model.len() - mid) == model[mid..]);
        }
        Ok(())
    }

    proptest! {
        #[test]
        fn an_image_is_a_row_of_bytes_whatever_the_medium_takes(ops in ops(), block_bits in 0..4u32, size in 0..20_000u64) {
            let block = [1, 512, 1024, 4096][block_bits as usize];
            compare(&image(block, size, || ()), &ops)?;
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn a_file_with_either_cache_mode_is_a_row_of_bytes(ops in ops(), size in 0..20_000u64, direct: bool) {
            let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
            let path = dir.path().join("vda.raw");
            std::fs::write(&path, vec![5; size as usize]).unwrap();
            let cache = if direct { Cache::None } else { Cache::Writeback };
            match RawImage::open(&path, false, cache) {
                Ok(image) => {
                    compare(&image, &ops)?;
                    image.flush().unwrap();
                    prop_assert!(std::fs::read(&path).unwrap() == bytes(&image, 0, image.size() as usize));
                }
                Err(e) => eprintln!("skip: {e}"),
            }
        }
    }

    #[test]
    fn large_transfers_through_scratch_memory_arrive_whole() {
        let image = image(4096, 5 << 20, || ());
        let data: Vec<u8> = (0..(4u32 << 20) + 777).map(|i| (i % 251) as u8).collect();
        image.write_at(&data, 12_345).unwrap();
        assert!(bytes(&image, 12_345, data.len()) == data);
        assert_eq!(bytes(&image, 0, 12_345), [0; 12_345]);
        image.write_zeroes(100, 4 << 20, true).unwrap();
        assert!(bytes(&image, 100, 4 << 20).iter().all(|b| *b == 0));
    }

    #[test]
    fn a_read_only_image_refuses_every_change() {
        let file = MemFile::new("vda.raw", 4096);
        let image = RawImage::over(file.shared(), true).unwrap();
        let before = file.stamp().unwrap();
        for result in [
            image.write_at(&[1], 0),
            image.write_zeroes(0, 1, false),
            image.write_zeroes(0, 1, true),
            image.resize(8192),
        ] {
            assert_eq!(result.unwrap_err().errno(), errno::EROFS);
        }
        assert_eq!(file.stamp().unwrap(), before);
        assert!(image.read_only());
    }

    use crate::storage::Storage;

    #[test]
    fn what_is_no_image_is_refused_untouched() {
        let dir = tempfile::tempdir().unwrap();
        for cache in [Cache::Writeback, Cache::None] {
            for read_only in [true, false] {
                let e = RawImage::open(&dir.path().join("none"), read_only, cache).unwrap_err();
                assert_eq!(e.errno(), errno::ENOENT);
                let e = RawImage::open(dir.path(), read_only, cache).unwrap_err();
                assert_eq!(e.errno(), errno::EISDIR);
            }
        }
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn an_image_is_locked_while_it_is_open() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vda.raw");
        std::fs::write(&path, [7; 1000]).unwrap();
        let image = RawImage::open(&path, false, Cache::Writeback).unwrap();
        let e = RawImage::open(&path, false, Cache::Writeback).unwrap_err();
        assert_eq!(e.errno(), errno::EBUSY);
        assert_eq!((image.size(), image.is_block_device(), image.format()), (1000, false, Format::Raw));
        drop(image);
        let readers = [0; 2].map(|_| RawImage::open(&path, true, Cache::Writeback).unwrap());
        assert_eq!(RawImage::open(&path, false, Cache::Writeback).unwrap_err().errno(), errno::EBUSY);
        drop(readers);
        assert_eq!(std::fs::read(&path).unwrap(), [7; 1000]);
    }

    /// A loop device over a file, detached at the end; `None` where that cannot be had.
    struct Loop(std::path::PathBuf);

    impl Loop {
        fn attach(file: &Path, block: u64) -> Option<Loop> {
            let out = Command::new("losetup")
                .args(["--find", "--show", "--sector-size", &block.to_string()])
                .arg(file)
                .output();
            match out {
                Ok(out) if out.status.success() => {
                    Some(Loop(String::from_utf8_lossy(&out.stdout).trim().to_owned().into()))
                }
                Ok(out) => {
                    eprintln!("skip: losetup: {}", String::from_utf8_lossy(&out.stderr).trim());
                    None
                }
                Err(e) => {
                    eprintln!("skip: losetup: {e}");
                    None
                }
            }
        }
    }

    impl Drop for Loop {
        fn drop(&mut self) {
            let _ = Command::new("losetup").arg("-d").arg(&self.0).status();
        }
    }

    #[test]
    fn a_block_device_is_a_row_of_bytes_of_fixed_length() {
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let file = dir.path().join("medium");
        for (block, cache) in
            [(512, Cache::None), (4096, Cache::None), (512, Cache::Writeback), (4096, Cache::Writeback)]
        {
            std::fs::write(&file, vec![9; 64 << 10]).unwrap();
            let Some(device) = Loop::attach(&file, block) else { return };
            let image = RawImage::open(&device.0, false, cache).unwrap();
            assert!(image.is_block_device());
            assert_eq!(image.size(), 64 << 10);
            assert_eq!(image.block, if cache == Cache::None { block } else { 1 });
            let ops = [
                Op::Write(100, 5000, 3, 1),
                Op::Write(8192, 4096, 0, 2),
                Op::Write(65_000, 536, 0, 3),
                Op::Write(65_000, 537, 0, 3),
                Op::Zero(10_000, 20_000, true),
                Op::Zero(33_000, 10, true),
                Op::Zero(4096, 8192, true),
                Op::Zero(1, 65_535, false),
                Op::Write(0, 4096, 1, 3),
            ];
            compare(&image, &ops).unwrap();
            assert_eq!(image.resize(128 << 10).unwrap_err().errno(), errno::EINVAL);
            image.resize(64 << 10).unwrap();
            assert_eq!(image.stamp().unwrap().mtime_ns, 0);
            assert!(!image.block_status(0, 4096).unwrap().zero);
            image.flush().unwrap();
            assert_eq!(RawImage::open(&device.0, false, cache).unwrap_err().errno(), errno::EBUSY);
        }
    }
}

#[cfg(all(test, feature = "shuttle"))]
mod shuttle_tests {
    use super::testing::*;

    #[test]
    fn writers_of_parts_of_a_block_lose_no_bytes_in_any_order() {
        for pair in RACES {
            shuttle::check_random(move || race(&image(4096, 65536, crate::sync::thread::yield_now), pair), 300);
        }
    }
}
