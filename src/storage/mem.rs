//! Files in memory: the tests' disk.
//!
//! Content lies in pages of 4 KiB in a map; an absent page is a hole, so [`Storage::block_status`] is exact. Every I/O
//! takes the lock once per page and not once per call: two overlapping transfers may interleave at page borders, as
//! they may on a real disk.

use super::{BlockStatus, SharedStorage, Stamp, Storage, clock, end_of};
use crate::error::Result;
use crate::sync::RwLock;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

const PAGE_BYTES: u64 = 4096;

type Page = Box<[u8; PAGE_BYTES as usize]>;

/// A file in memory. Clones share its content, which lives as long as one of them.
#[derive(Debug, Clone)]
pub struct MemFile {
    path: PathBuf,
    ino: u64,
    content: Arc<RwLock<Content>>,
}

#[derive(Debug)]
struct Content {
    pages: BTreeMap<u64, Page>,
    len: u64,
    changed_ns: i64,
    attributes: BTreeMap<String, Vec<u8>>,
}

impl Content {
    /// Notes a change: the clock, but never the same time twice, so that every change shows in the stamp.
    fn touch(&mut self) {
        self.changed_ns = clock::now_coarse_ns().max(self.changed_ns + 1);
    }

    fn page_mut(&mut self, page: u64) -> &mut Page {
        self.pages.entry(page).or_insert_with(|| Box::new([0; PAGE_BYTES as usize]))
    }
}

/// The part of a range that lies in one page.
struct Piece {
    page: u64,
    /// Place in the page.
    start: usize,
    len: usize,
    /// Place in the caller's buffer.
    done: usize,
}

/// Cuts a range at page borders.
fn pieces(offset: u64, len: u64) -> impl Iterator<Item = Piece> {
    let mut done = 0;
    std::iter::from_fn(move || {
        let at = offset + done;
        let start = at % PAGE_BYTES;
        let piece_len = (PAGE_BYTES - start).min(len - done);
        let piece =
            Piece { page: at / PAGE_BYTES, start: start as usize, len: piece_len as usize, done: done as usize };
        done += piece_len;
        (piece_len > 0).then_some(piece)
    })
}

impl MemFile {
    /// A file of `len` bytes, all of them a hole.
    pub fn new(name: &str, len: u64) -> Self {
        static NEXT_INO: AtomicU64 = AtomicU64::new(1);
        MemFile {
            path: PathBuf::from(name),
            ino: NEXT_INO.fetch_add(1, Ordering::Relaxed),
            content: Arc::new(RwLock::new(Content {
                pages: BTreeMap::new(),
                len,
                changed_ns: clock::now_coarse_ns(),
                attributes: BTreeMap::new(),
            })),
        }
    }

    /// Another handle of this file, as the trait object that the other layers take.
    pub fn shared(&self) -> SharedStorage {
        Arc::new(self.clone())
    }

    /// The same content under another name.
    pub(super) fn renamed(&self, name: &str) -> Self {
        MemFile { path: PathBuf::from(name), ..self.clone() }
    }

    /// Bytes that are allocated, in whole pages.
    pub fn allocated_bytes(&self) -> u64 {
        self.content.read().pages.len() as u64 * PAGE_BYTES
    }

    /// Zeros `offset..offset + len`; whole pages become holes where `free` is set, else allocated zeros.
    fn zero(&self, offset: u64, len: u64, free: bool) {
        for piece in pieces(offset, len) {
            let mut content = self.content.write();
            if free && piece.len as u64 == PAGE_BYTES {
                content.pages.remove(&piece.page);
            } else if !free || content.pages.contains_key(&piece.page) {
                content.page_mut(piece.page)[piece.start..piece.start + piece.len].fill(0);
            }
            content.touch();
        }
    }

    /// The part of a range that lies in the file.
    fn clip(&self, what: &str, offset: u64, len: u64) -> Result<u64> {
        let end = end_of(what, &self.path, offset, len)?;
        Ok(end.min(self.content.read().len).saturating_sub(offset))
    }
}

impl Storage for MemFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        end_of("read", &self.path, offset, buf.len() as u64)?;
        for piece in pieces(offset, buf.len() as u64) {
            let target = &mut buf[piece.done..piece.done + piece.len];
            match self.content.read().pages.get(&piece.page) {
                Some(page) => target.copy_from_slice(&page[piece.start..piece.start + piece.len]),
                None => target.fill(0),
            }
        }
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        end_of("write", &self.path, offset, buf.len() as u64)?;
        for piece in pieces(offset, buf.len() as u64) {
            let mut content = self.content.write();
            content.page_mut(piece.page)[piece.start..piece.start + piece.len]
                .copy_from_slice(&buf[piece.done..piece.done + piece.len]);
            let end = piece.page * PAGE_BYTES + (piece.start + piece.len) as u64;
            content.len = content.len.max(end);
            content.touch();
        }
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        Ok(())
    }

    fn len(&self) -> Result<u64> {
        Ok(self.content.read().len)
    }

    fn set_len(&self, len: u64) -> Result<()> {
        end_of("set the length of", &self.path, len, 0)?;
        let mut content = self.content.write();
        if len < content.len {
            content.pages.split_off(&len.div_ceil(PAGE_BYTES));
            if let Some(last) = content.pages.get_mut(&(len / PAGE_BYTES)) {
                last[(len % PAGE_BYTES) as usize..].fill(0);
            }
        }
        content.len = len;
        content.touch();
        Ok(())
    }

    fn punch_hole(&self, offset: u64, len: u64) -> Result<()> {
        let len = self.clip("punch a hole in", offset, len)?;
        self.zero(offset, len, true);
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        let len = self.clip("write zeros to", offset, len)?;
        self.zero(offset, len, false);
        Ok(())
    }

    fn block_status(&self, offset: u64, len: u64) -> Result<BlockStatus> {
        let end = end_of("block status of", &self.path, offset, len)?;
        let content = self.content.read();
        let mut page = offset / PAGE_BYTES;
        let zero = !content.pages.contains_key(&page);
        if zero {
            page = content.pages.range(page..).next().map_or(u64::MAX, |(next, _)| *next);
        } else {
            while page * PAGE_BYTES < end && content.pages.contains_key(&page) {
                page += 1;
            }
        }
        Ok(BlockStatus { len: page.saturating_mul(PAGE_BYTES).min(end) - offset, zero })
    }

    fn stamp(&self) -> Result<Stamp> {
        let content = self.content.read();
        Ok(Stamp {
            dev: 0,
            ino: self.ino,
            size: content.len,
            mtime_ns: content.changed_ns,
            ctime_ns: content.changed_ns,
        })
    }

    fn attribute(&self, name: &str) -> Result<Option<Vec<u8>>> {
        Ok(self.content.read().attributes.get(name).cloned())
    }

    fn set_attribute(&self, name: &str, value: Option<&[u8]>) -> Result<()> {
        let mut content = self.content.write();
        match value {
            Some(value) => content.attributes.insert(name.to_owned(), value.to_vec()),
            None => content.attributes.remove(name),
        };
        content.touch();
        Ok(())
    }

    fn path(&self) -> &Path {
        &self.path
    }
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests {
    use super::*;
    use crate::error::errno;
    use proptest::prelude::*;

    #[derive(Debug, Clone)]
    enum Op {
        Write(u64, usize, u8),
        Punch(u64, u64),
        Zero(u64, u64),
        SetLen(u64),
    }

    fn ops() -> impl Strategy<Value = Vec<Op>> {
        let place = 0..20_000u64;
        let op = prop_oneof![
            (place.clone(), 1..9000usize, 1..=255u8).prop_map(|(o, l, b)| Op::Write(o, l, b)),
            (place.clone(), 1..9000u64).prop_map(|(o, l)| Op::Punch(o, l)),
            (place.clone(), 1..9000u64).prop_map(|(o, l)| Op::Zero(o, l)),
            place.prop_map(Op::SetLen),
        ];
        proptest::collection::vec(op, 1..20)
    }

    fn zero(model: &mut [u8], offset: u64, len: u64) {
        let end = (offset + len).min(model.len() as u64) as usize;
        if (offset as usize) < end {
            model[offset as usize..end].fill(0);
        }
    }

    proptest! {
        #[test]
        fn behaves_as_a_vector_of_bytes_does(ops in ops()) {
            let file = MemFile::new("f", 0);
            let mut model: Vec<u8> = Vec::new();
            for op in ops {
                let before = file.stamp().unwrap();
                let mut changes = true;
                match op {
                    Op::Write(offset, len, byte) => {
                        file.write_at(&vec![byte; len], offset).unwrap();
                        let end = offset as usize + len;
                        model.resize(model.len().max(end), 0);
                        model[offset as usize..end].fill(byte);
                    }
                    Op::Punch(offset, len) => {
                        file.punch_hole(offset, len).unwrap();
                        changes = offset < model.len() as u64;
                        zero(&mut model, offset, len);
                    }
                    Op::Zero(offset, len) => {
                        file.write_zeroes(offset, len).unwrap();
                        changes = offset < model.len() as u64;
                        zero(&mut model, offset, len);
                    }
                    Op::SetLen(len) => {
                        file.set_len(len).unwrap();
                        model.resize(len as usize, 0);
                    }
                }
                prop_assert!(!changes || file.stamp().unwrap() != before);
                prop_assert_eq!(file.len().unwrap(), model.len() as u64);
                let mut read = vec![1; 30_000];
                file.read_at(&mut read, 0).unwrap();
                model.resize(model.len(), 0);
                prop_assert_eq!(&read[..model.len().min(30_000)], &model[..model.len().min(30_000)]);
                prop_assert!(read[model.len().min(30_000)..].iter().all(|b| *b == 0));
                let mut at = 0;
                while at < 30_000 {
                    let run = file.block_status(at, 30_000 - at).unwrap();
                    prop_assert!(run.len >= 1 && at + run.len <= 30_000);
                    let bytes = &read[at as usize..(at + run.len) as usize];
                    prop_assert!(!run.zero || bytes.iter().all(|b| *b == 0));
                    at += run.len;
                }
            }
        }
    }

    #[test]
    fn holes_and_data_are_told_apart() {
        let file = MemFile::new("f", 1 << 40);
        file.write_at(b"x", 3 * PAGE_BYTES + 5).unwrap();
        assert_eq!(file.block_status(100, 1 << 30).unwrap(), BlockStatus { len: 3 * PAGE_BYTES - 100, zero: true });
        assert_eq!(file.block_status(3 * PAGE_BYTES, 1 << 30).unwrap(), BlockStatus { len: PAGE_BYTES, zero: false });
        assert_eq!(file.block_status(4 * PAGE_BYTES, 1 << 50).unwrap(), BlockStatus { len: 1 << 50, zero: true });
        file.write_zeroes(0, PAGE_BYTES).unwrap();
        assert!(!file.block_status(0, 1).unwrap().zero, "written zeros stay allocated");
        assert_eq!(file.allocated_bytes(), 2 * PAGE_BYTES);
        file.punch_hole(0, 10 * PAGE_BYTES).unwrap();
        assert_eq!(file.allocated_bytes(), 0);
    }

    #[test]
    fn clones_share_and_offsets_past_the_largest_are_refused() {
        let file = MemFile::new("f", 10);
        let other = file.clone();
        drop(file.shared());
        file.write_at(b"abc", 4).unwrap();
        drop(file);
        let mut buf = [0; 3];
        other.read_at(&mut buf, 4).unwrap();
        assert_eq!(&buf, b"abc");
        assert_eq!(other.write_at(b"x", i64::MAX as u64).unwrap_err().errno(), errno::EFBIG);
        assert_eq!(other.write_at(b"x", u64::MAX).unwrap_err().errno(), errno::EFBIG);
        assert_eq!(other.len().unwrap(), 10);
    }
}

#[cfg(all(test, feature = "shuttle"))]
mod shuttle_tests {
    use super::*;

    /// Two writers of the same two pages can leave one page of each: the fake is no more atomic than a disk.
    #[test]
    fn overlapping_writes_interleave_at_pages() {
        let mixed = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let seen = mixed.clone();
        shuttle::check_random(
            move || {
                let file = MemFile::new("f", 2 * PAGE_BYTES);
                let writers: Vec<_> = [1u8, 2]
                    .into_iter()
                    .map(|byte| {
                        let file = file.clone();
                        crate::sync::thread::spawn(move || file.write_at(&[byte; 8192], 0).unwrap())
                    })
                    .collect();
                writers.into_iter().for_each(|w| w.join().unwrap());
                let mut buf = [0; 8192];
                file.read_at(&mut buf, 0).unwrap();
                if buf[0] != buf[8191] {
                    seen.store(true, Ordering::Relaxed);
                }
            },
            200,
        );
        assert!(mixed.load(Ordering::Relaxed));
    }
}
