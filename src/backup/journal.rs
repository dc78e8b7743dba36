//! What of a disk a target has for good: so that a copy that was interrupted goes on behind it.
//!
//! Invariant: **a range is noted only after the target was flushed with it** ([`Journal::note`] flushes). What is not noted
//! is copied again, which changes nothing: the source is frozen.
//!
//! One line a range, `OFFSET LENGTH CRC`, and one a flush, `= BYTES CRC`, with the bytes that were written as data by then.
//! CRC is the crc32c of what stands before it, hexadecimal: the first line that is not whole ends the journal.

use crate::error::Result;
use crate::image::Image;
use crate::storage::SharedStorage;
use crate::units::join_ranges;
use parking_lot::Mutex;
use std::fmt::Write;
use std::ops::Range;
use std::time::{Duration, Instant};

/// How long ranges wait to be noted.
const INTERVAL: Duration = Duration::from_secs(2);
/// Longest journal that is read: many more lines than a copy can make.
const MAX_BYTES: u64 = 1 << 30;

/// See the module.
#[derive(Debug)]
pub struct Journal {
    file: SharedStorage,
    pending: Mutex<Vec<Range<u64>>>,
    /// Held by who flushes.
    writing: Mutex<Writing>,
}

#[derive(Debug)]
struct Writing {
    end: u64,
    last: Instant,
}

/// What a journal says.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Noted {
    /// Ascending, joined.
    pub ranges: Vec<Range<u64>>,
    /// Bytes that were written as data.
    pub data_bytes: u64,
}

impl Journal {
    /// Opens a journal, an empty one too, and reads it.
    pub fn open(file: SharedStorage) -> Result<(Journal, Noted)> {
        let mut text = vec![0; file.len()?.min(MAX_BYTES) as usize];
        file.read_at(&mut text, 0)?;
        let (noted, end) = read(&text);
        let writing = Mutex::new(Writing { end, last: Instant::now() });
        Ok((Journal { file, pending: Mutex::default(), writing }, noted))
    }

    /// A range is in the target. Now and then one caller notes all of them; `data_bytes` tells how many bytes were written
    /// as data.
    pub fn done(&self, offset: u64, len: u64, target: &dyn Image, data_bytes: &dyn Fn() -> u64) -> Result<()> {
        self.pending.lock().push(offset..offset + len);
        match self.writing.try_lock() {
            Some(mut writing) if writing.last.elapsed() >= INTERVAL => self.note(&mut writing, target, data_bytes),
            _ => Ok(()),
        }
    }

    /// Notes all that was done.
    pub fn finish(&self, target: &dyn Image, data_bytes: &dyn Fn() -> u64) -> Result<()> {
        self.note(&mut self.writing.lock(), target, data_bytes)
    }

    fn note(&self, writing: &mut Writing, target: &dyn Image, data_bytes: &dyn Fn() -> u64) -> Result<()> {
        // Taken before the flush: what is done after it is noted by the next one.
        let mut ranges = std::mem::take(&mut *self.pending.lock());
        let flushed = target.flush();
        writing.last = Instant::now();
        flushed?;
        if ranges.is_empty() {
            return Ok(());
        }
        join_ranges(&mut ranges);
        let mut text = String::new();
        for range in &ranges {
            line(&mut text, &format!("{} {}", range.start, range.end - range.start));
        }
        line(&mut text, &format!("= {}", data_bytes()));
        self.file.write_at(text.as_bytes(), writing.end)?;
        self.file.sync()?;
        writing.end += text.len() as u64;
        Ok(())
    }
}

fn line(text: &mut String, words: &str) {
    // Writing to a string does not fail.
    let _ = writeln!(text, "{words} {:08x}", crc32c::crc32c(words.as_bytes()));
}

/// What the text says, and where it ends to be whole.
fn read(text: &[u8]) -> (Noted, u64) {
    let (mut noted, mut end) = (Noted::default(), 0);
    for line in text.split_inclusive(|byte| *byte == b'\n') {
        let whole = line.strip_suffix(b"\n").and_then(|line| std::str::from_utf8(line).ok()?.rsplit_once(' '));
        let Some((words, crc)) = whole else { break };
        if format!("{:08x}", crc32c::crc32c(words.as_bytes())) != crc {
            break;
        }
        match words.split_once(' ').map(|(a, b)| (a.parse::<u64>(), b.parse::<u64>(), a)) {
            Some((Ok(offset), Ok(len), _)) if offset.checked_add(len).is_some() => {
                noted.ranges.push(offset..offset + len);
            }
            Some((Err(_), Ok(bytes), "=")) => noted.data_bytes = bytes,
            _ => break,
        }
        end += line.len() as u64;
    }
    join_ranges(&mut noted.ranges);
    (noted, end)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::errno;
    use crate::image::raw::RawImage;
    use crate::storage::faulty::{Call, FaultPlan, Faulty};
    use crate::storage::{MemFile, Storage};
    use std::sync::Arc;

    fn image() -> RawImage {
        RawImage::over(MemFile::new("target", 1 << 20).shared(), false).unwrap()
    }

    fn ranges(file: &MemFile) -> Noted {
        Journal::open(file.shared()).unwrap().1
    }

    #[test]
    fn what_was_noted_is_read_again_and_added_to() {
        let file = MemFile::new("journal", 0);
        let (journal, noted) = Journal::open(file.shared()).unwrap();
        assert_eq!(noted, Noted::default());
        let target = image();
        for start in [65536, 0, 131072, 400_000] {
            journal.done(start, 65536, &target, &|| 7).unwrap();
        }
        assert_eq!(ranges(&file), Noted::default(), "not yet");
        journal.finish(&target, &|| 7).unwrap();
        let first = Noted { ranges: vec![0..196_608, 400_000..465_536], data_bytes: 7 };
        assert_eq!(ranges(&file), first);
        let (journal, _) = Journal::open(file.shared()).unwrap();
        journal.done(196_608, 203_392, &target, &|| 8).unwrap();
        journal.finish(&target, &|| 8).unwrap();
        let noted = ranges(&file);
        assert_eq!((noted.ranges.as_slice(), noted.data_bytes), (std::slice::from_ref(&(0..465_536)), 8));
    }

    #[test]
    fn nothing_is_noted_that_was_not_flushed() {
        let plan = Arc::new(FaultPlan::new());
        let storage = Faulty { inner: MemFile::new("target", 1 << 20).shared(), plan: plan.clone() };
        let target = RawImage::over(Arc::new(storage), false).unwrap();
        let file = MemFile::new("journal", 0);
        let (journal, _) = Journal::open(file.shared()).unwrap();
        journal.done(0, 65536, &target, &|| 0).unwrap();
        plan.fail_all(Call::Sync, errno::EIO);
        assert_eq!(journal.finish(&target, &|| 0).unwrap_err().errno(), errno::EIO);
        assert_eq!(file.len().unwrap(), 0);
    }

    #[test]
    fn a_journal_ends_at_the_first_line_that_is_not_whole() {
        let file = MemFile::new("journal", 0);
        let (journal, _) = Journal::open(file.shared()).unwrap();
        let target = image();
        for start in [0u64, 200_000, 400_000] {
            journal.done(start, 1000, &target, &|| start).unwrap();
            journal.finish(&target, &|| start).unwrap();
        }
        let mut text = vec![0; file.len().unwrap() as usize];
        file.read_at(&mut text, 0).unwrap();
        for cut in 0..text.len() {
            let (noted, end) = read(&text[..cut]);
            assert!(end as usize <= cut && noted.ranges.len() <= 3, "{cut}");
            let whole = text[..cut].iter().filter(|byte| **byte == b'\n').count();
            assert_eq!(noted.ranges.len(), whole.div_ceil(2), "{cut}");
        }
        for at in 0..text.len() {
            let mut torn = text.clone();
            torn[at] = 0;
            let (noted, _) = read(&torn);
            assert!(noted.ranges.iter().all(|range| range.end - range.start == 1000), "{at}");
        }
    }
}
