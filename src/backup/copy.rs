//! The one engine that copies extents: from a view, a file or an image into an image, by several threads.
//!
//! Invariants:
//! - **Whole units.** What is written is made of whole units of the target (its clusters), cut off at the end of the disk.
//!   A unit of which any byte is dirty is copied as a whole; it is written as zeros only where all of it is known to be
//!   zero. So a target never has to fill up a unit with what lies below it.
//! - **Told when it is there.** `done` is called for a piece after the target's call for all of it has returned. It
//!   may wait (a limit of speed), and an error of it ends the copy.
//! - **Bounded.** Each thread holds one piece, and as many again wait; whatever the number of extents.
//! - **Ends at once.** After the first error no further piece is begun. `failed` decides what an error of a side means; an
//!   error of `extents` or of `done` always ends the copy.

use super::Extent;
use crate::error::{Error, Result, errno};
use crate::fleece::{Disk, View};
use crate::image::Image;
use crate::storage::buffer::{AlignedBuf, is_zero};
use crate::storage::os::OpenOptions;
use crate::storage::{OsFile, Storage};
use parking_lot::Mutex;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;

/// Most bytes that are zeroed at once: a medium that cannot make zeros has them written.
const ZERO_PIECE_BYTES: u64 = 64 << 20;
/// Smallest unit in which zeros are looked for in data.
const MIN_ZERO_BYTES: u64 = 4096;

/// What is copied. Every byte reads the same each time.
pub trait Source: Sync {
    /// Size in bytes.
    fn size(&self) -> u64;
    /// Fills `buf` from `offset`; the range is in the source.
    fn read(&self, buf: &mut [u8], offset: u64) -> Result<()>;
}

/// Where it goes.
pub trait Target: Sync {
    /// Writes all of `buf` at `offset`.
    fn write(&self, buf: &[u8], offset: u64) -> Result<()>;
    /// Makes a range read as zeros, whatever lies below it, and takes no more space than needed.
    fn write_zeroes(&self, offset: u64, len: u64) -> Result<()>;
}

impl Source for View {
    fn size(&self) -> u64 {
        View::size(self)
    }

    fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let count = View::read(self, buf, offset)?;
        if count == buf.len() {
            return Ok(());
        }
        Err(Error::new(errno::EIO, "read", "past the end of the view").at_offset(offset))
    }
}

/// A file whose content does not change, such as a frozen view's.
#[derive(Debug)]
pub struct FileSource {
    file: OsFile,
    size: u64,
}

impl FileSource {
    /// Opens `path` for reading.
    pub fn open(path: &Path) -> Result<FileSource> {
        let file = OsFile::open(path, &OpenOptions::default())?;
        let size = file.len()?;
        Ok(FileSource { file, size })
    }
}

impl Source for FileSource {
    fn size(&self) -> u64 {
        self.size
    }

    fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.file.read_at(buf, offset)
    }
}

/// An image that is read.
#[derive(Debug, Clone, Copy)]
pub struct ImageSource<'a>(pub &'a dyn Image);

impl Source for ImageSource<'_> {
    fn size(&self) -> u64 {
        self.0.size()
    }

    fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.0.read_at(buf, offset)
    }
}

/// An image that is written to.
#[derive(Debug, Clone, Copy)]
pub struct ImageTarget<'a>(pub &'a dyn Image);

impl Target for ImageTarget<'_> {
    fn write(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.0.write_at(buf, offset)
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        self.0.write_zeroes(offset, len, true)
    }
}

/// An image that is written to, whole clusters compressed.
#[derive(Debug, Clone, Copy)]
pub struct PackedTarget<'a>(pub &'a dyn Image);

impl Target for PackedTarget<'_> {
    fn write(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.0.write_compressed(buf, offset)
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        self.0.write_zeroes(offset, len, true)
    }
}

/// A disk that is served, written to as its guest does.
#[derive(Debug, Clone, Copy)]
pub struct DiskTarget<'a>(pub &'a Disk);

impl Target for DiskTarget<'_> {
    fn write(&self, buf: &[u8], offset: u64) -> Result<()> {
        let mut done = 0;
        while let Some(rest) = buf.get(done..).filter(|rest| !rest.is_empty()) {
            done += self.0.write(rest, offset + done as u64)?;
        }
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        self.0.discard(offset, len)
    }
}

/// Which side an error is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The source could not be read.
    Read,
    /// The target could not be written.
    Write,
}

/// What is done about an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// The same again.
    Retry,
    /// The piece is left out: `done` is not told of it.
    Skip,
    /// The copy ends with this error.
    Fail,
}

/// How to copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// Threads that read and write; at least 1.
    pub threads: usize,
    /// Most bytes that are read at once; at least a unit.
    pub piece_bytes: u64,
    /// The target's unit in bytes: its cluster, or 1.
    pub unit_bytes: u64,
    /// Whether units that are read as zeros are written as zeros.
    pub detect_zeroes: bool,
}

impl Default for Options {
    fn default() -> Self {
        Options { threads: 4, piece_bytes: 1 << 20, unit_bytes: 1, detect_zeroes: true }
    }
}

/// A run of whole units of one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Run {
    start: u64,
    end: u64,
    zero: bool,
}

/// Copies what `extents` lists as dirty, zero ones as zeros, in pieces. The extents ascend and do not overlap; what is not
/// listed is not dirty. See the module for `done` (offset, length) and `failed` (side, offset, length, error).
pub fn copy(
    source: &dyn Source,
    target: &dyn Target,
    extents: impl Iterator<Item = Result<Extent>>,
    options: &Options,
    done: &(dyn Fn(u64, u64) -> Result<()> + Sync),
    failed: &(dyn Fn(Side, u64, u64, &Error) -> Decision + Sync),
) -> Result<()> {
    let threads = options.threads.max(1);
    let unit = options.unit_bytes.max(1);
    let options = Options {
        threads,
        unit_bytes: unit,
        piece_bytes: options.piece_bytes.max(1).next_multiple_of(unit),
        ..*options
    };
    let copier =
        Copier { source, target, options, done, failed, stopped: AtomicBool::new(false), error: Mutex::new(None) };
    let (sender, receiver) = sync_channel(threads);
    let receiver = Mutex::new(receiver);
    thread::scope(|scope| {
        for number in 0..threads {
            let started = thread::Builder::new()
                .name(format!("copy-{number}"))
                .spawn_scoped(scope, || copier.work(&receiver))
                .map_err(|e| Error::io("start a thread", e));
            match started {
                Err(e) if number == 0 => return Err(e),
                // Fewer do it, too.
                Err(_) => break,
                Ok(_) => {}
            }
        }
        if let Err(e) = copier.feed(extents, &sender) {
            copier.stop(e);
        }
        // The workers end when they have emptied it.
        drop(sender);
        Ok(())
    })?;
    copier.error.into_inner().map_or(Ok(()), Err)
}

struct Copier<'a> {
    source: &'a dyn Source,
    target: &'a dyn Target,
    options: Options,
    done: &'a (dyn Fn(u64, u64) -> Result<()> + Sync),
    failed: &'a (dyn Fn(Side, u64, u64, &Error) -> Decision + Sync),
    stopped: AtomicBool,
    /// The first one.
    error: Mutex<Option<Error>>,
}

impl Copier<'_> {
    fn stop(&self, e: Error) {
        self.error.lock().get_or_insert(e);
        self.stopped.store(true, Ordering::Release);
    }

    fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Acquire)
    }

    /// Hands pieces to the workers until all are handed out or one has failed.
    fn feed(&self, extents: impl Iterator<Item = Result<Extent>>, sender: &SyncSender<Run>) -> Result<()> {
        let mut hand_out = |run: Run| {
            let most = if run.zero {
                ZERO_PIECE_BYTES.next_multiple_of(self.options.unit_bytes)
            } else {
                self.options.piece_bytes
            };
            let mut start = run.start;
            while start < run.end && !self.is_stopped() {
                let end = run.end.min(start - start % most + most);
                // Workers end after the sender is dropped; an error would mean that none is left.
                sender
                    .send(Run { start, end, ..run })
                    .map_err(|_| Error::new(errno::EIO, "copy", "no thread is left"))?;
                start = end;
            }
            Ok(())
        };
        let mut shaper = Shaper::new(self.source.size(), self.options.unit_bytes);
        for extent in extents {
            if self.is_stopped() {
                return Ok(());
            }
            shaper.add(&extent?, &mut hand_out)?;
        }
        shaper.finish(&mut hand_out)
    }

    fn work(&self, pieces: &Mutex<Receiver<Run>>) {
        let mut buf = AlignedBuf::uncleared(self.options.piece_bytes as usize);
        loop {
            // Not in the head of a `while let`: the lock would be held for the whole round.
            let piece = pieces.lock().recv();
            let Ok(run) = piece else { return };
            if self.is_stopped() {
                continue;
            }
            if let Err(e) = self.copy_piece(run, &mut buf) {
                self.stop(e);
            }
        }
    }

    fn copy_piece(&self, run: Run, buf: &mut [u8]) -> Result<()> {
        let len = run.end - run.start;
        let there = if run.zero {
            self.attempt(Side::Write, run, &mut || self.target.write_zeroes(run.start, len))?
        } else {
            let buf = &mut buf[..len as usize];
            self.attempt(Side::Read, run, &mut || self.source.read(buf, run.start))?
                && self.attempt(Side::Write, run, &mut || self.write_data(buf, run.start))?
        };
        if there { (self.done)(run.start, len) } else { Ok(()) }
    }

    /// False: it is to be left out.
    fn attempt(&self, side: Side, run: Run, work: &mut dyn FnMut() -> Result<()>) -> Result<bool> {
        loop {
            let Err(e) = work() else { return Ok(true) };
            match (self.failed)(side, run.start, run.end - run.start, &e) {
                Decision::Skip => return Ok(false),
                // Another thread's error ends what would go on for ever.
                Decision::Retry if !self.is_stopped() => {}
                Decision::Retry | Decision::Fail => return Err(e),
            }
        }
    }

    /// Writes `buf`, runs of units that are zeros as such.
    fn write_data(&self, buf: &[u8], offset: u64) -> Result<()> {
        if !self.options.detect_zeroes {
            return self.target.write(buf, offset);
        }
        let unit = MIN_ZERO_BYTES.next_multiple_of(self.options.unit_bytes) as usize;
        let mut rest = buf;
        while let Some(first) = rest.chunks(unit).next() {
            let zero = is_zero(first);
            let len: usize = rest.chunks(unit).take_while(|unit| is_zero(unit) == zero).map(<[u8]>::len).sum();
            let at = offset + (buf.len() - rest.len()) as u64;
            let (run, behind) = rest.split_at(len);
            if zero {
                self.target.write_zeroes(at, len as u64)?;
            } else {
                self.target.write(run, at)?;
            }
            rest = behind;
        }
        Ok(())
    }
}

/// Puts extents together to runs of whole units.
struct Shaper {
    size: u64,
    unit_bytes: u64,
    /// Up to where extents were taken.
    at: u64,
    /// The run that may go on.
    run: Option<Run>,
    /// The unit that more than one extent belongs to.
    unit: Option<Unit>,
}

struct Unit {
    start: u64,
    zero_bytes: u64,
    dirty: bool,
}

type HandOut<'a> = &'a mut dyn FnMut(Run) -> Result<()>;

impl Shaper {
    fn new(size: u64, unit_bytes: u64) -> Shaper {
        Shaper { size, unit_bytes, at: 0, run: None, unit: None }
    }

    fn add(&mut self, e: &Extent, hand_out: HandOut<'_>) -> Result<()> {
        if e.start < self.at || e.length > self.size.saturating_sub(e.start) {
            let why = format!("the extent of {} bytes is not in its place", e.length);
            return Err(Error::new(errno::EIO, "map", why).at_offset(e.start));
        }
        let end = e.start + e.length;
        self.at = end;
        let first_whole = e.start.next_multiple_of(self.unit_bytes).min(end);
        // The end of the disk ends its last unit.
        let last_whole = if end == self.size { end } else { (end - end % self.unit_bytes).max(first_whole) };
        self.add_part(e, e.start, first_whole, hand_out)?;
        if e.dirty && first_whole < last_whole {
            self.end_unit(hand_out)?;
            self.add_run(Run { start: first_whole, end: last_whole, zero: e.zero }, hand_out)?;
        }
        self.add_part(e, last_whole, end, hand_out)
    }

    /// Takes note of a part of one unit.
    fn add_part(&mut self, e: &Extent, start: u64, end: u64, hand_out: HandOut<'_>) -> Result<()> {
        if start >= end {
            return Ok(());
        }
        let unit_start = start - start % self.unit_bytes;
        if self.unit.as_ref().is_some_and(|unit| unit.start != unit_start) {
            self.end_unit(hand_out)?;
        }
        let unit = self.unit.get_or_insert(Unit { start: unit_start, zero_bytes: 0, dirty: false });
        unit.dirty |= e.dirty;
        unit.zero_bytes += if e.zero { end - start } else { 0 };
        Ok(())
    }

    fn end_unit(&mut self, hand_out: HandOut<'_>) -> Result<()> {
        let Some(unit) = self.unit.take().filter(|unit| unit.dirty) else { return Ok(()) };
        let end = self.size.min(unit.start + self.unit_bytes);
        self.add_run(Run { start: unit.start, end, zero: unit.zero_bytes == end - unit.start }, hand_out)
    }

    fn add_run(&mut self, run: Run, hand_out: HandOut<'_>) -> Result<()> {
        match &mut self.run {
            Some(open) if (open.end, open.zero) == (run.start, run.zero) => {
                open.end = run.end;
                Ok(())
            }
            open => open.replace(run).map_or(Ok(()), hand_out),
        }
    }

    fn finish(mut self, hand_out: HandOut<'_>) -> Result<()> {
        self.end_unit(hand_out)?;
        self.run.take().map_or(Ok(()), hand_out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::MemFile;
    use std::collections::BTreeMap;
    use std::sync::atomic::AtomicU64;
    use std::time::Duration;

    const SIZE: u64 = 1_000_000;

    /// A medium in memory that can fail in a range, some times.
    struct Medium {
        file: MemFile,
        fails: Mutex<Option<(u64, u32)>>,
        written: AtomicU64,
        zeroed: AtomicU64,
        busy: AtomicU64,
        busiest: AtomicU64,
    }

    impl Medium {
        fn new(fill: impl Fn(u64) -> u8) -> Medium {
            let file = MemFile::new("medium", 0);
            file.write_at(&(0..SIZE).map(fill).collect::<Vec<u8>>(), 0).unwrap();
            let zero = || AtomicU64::new(0);
            Medium { file, fails: Mutex::new(None), written: zero(), zeroed: zero(), busy: zero(), busiest: zero() }
        }

        fn failing(self, at: u64, times: u32) -> Medium {
            *self.fails.lock() = Some((at, times));
            self
        }

        fn pass(&self, offset: u64, len: u64) -> Result<()> {
            let busy = self.busy.fetch_add(len, Ordering::SeqCst) + len;
            self.busiest.fetch_max(busy, Ordering::SeqCst);
            thread::sleep(Duration::from_micros(offset % 7 * 50));
            self.busy.fetch_sub(len, Ordering::SeqCst);
            match &mut *self.fails.lock() {
                Some((at, times)) if *times > 0 && (offset..offset + len).contains(at) => {
                    *times -= 1;
                    Err(Error::new(errno::EIO, "medium", "fails").at_offset(offset))
                }
                _ => Ok(()),
            }
        }

        fn content(&self) -> Vec<u8> {
            let mut all = vec![0; SIZE as usize];
            self.file.read_at(&mut all, 0).unwrap();
            all
        }
    }

    impl Source for Medium {
        fn size(&self) -> u64 {
            SIZE
        }
        fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
            self.pass(offset, buf.len() as u64)?;
            self.file.read_at(buf, offset)
        }
    }

    impl Target for Medium {
        fn write(&self, buf: &[u8], offset: u64) -> Result<()> {
            self.pass(offset, buf.len() as u64)?;
            self.written.fetch_add(buf.len() as u64, Ordering::SeqCst);
            self.file.write_at(buf, offset)
        }
        fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
            self.pass(offset, len)?;
            self.zeroed.fetch_add(len, Ordering::SeqCst);
            self.file.write_zeroes(offset, len)
        }
    }

    fn extent(start: u64, end: u64, dirty: bool, zero: bool) -> Extent {
        Extent { start, length: end - start, dirty, zero }
    }

    fn whole() -> Vec<Extent> {
        vec![extent(0, SIZE, true, false)]
    }

    fn options(unit_bytes: u64) -> Options {
        Options { threads: 4, piece_bytes: 16384, unit_bytes, detect_zeroes: false }
    }

    fn fail(_: Side, _: u64, _: u64, _: &Error) -> Decision {
        Decision::Fail
    }

    fn run(source: &Medium, target: &Medium, extents: &[Extent], options: &Options) -> Result<()> {
        copy(source, target, extents.iter().copied().map(Ok), options, &|_, _| Ok(()), &fail)
    }

    #[test]
    fn what_is_dirty_is_copied_and_told_once_whatever_the_order() {
        let (source, target) = (Medium::new(|at| (at / 3) as u8), Medium::new(|_| 0xee));
        let extents = [
            extent(0, 100, false, false),
            extent(100, 70_000, true, false),
            extent(70_000, 300_000, false, true),
            extent(300_000, 400_000, true, true),
            extent(400_000, 999_999, false, false),
            extent(999_999, SIZE, true, false),
        ];
        let told = Mutex::new(BTreeMap::new());
        let done = |offset, len| {
            assert!(told.lock().insert(offset, len).is_none(), "told twice");
            Ok(())
        };
        copy(&source, &target, extents.into_iter().map(Ok), &options(1), &done, &fail).unwrap();
        let (from, to) = (source.content(), target.content());
        for e in &extents {
            let range = e.start as usize..(e.start + e.length) as usize;
            match (e.dirty, e.zero) {
                (true, false) => assert!(to[range.clone()] == from[range], "{e:?}"),
                (true, true) => assert!(is_zero(&to[range]), "{e:?}"),
                (false, _) => assert!(to[range].iter().all(|byte| *byte == 0xee), "{e:?}"),
            }
        }
        let sum: u64 = told.into_inner().values().sum();
        assert_eq!(sum, extents.iter().filter(|e| e.dirty).map(|e| e.length).sum::<u64>());
    }

    #[test]
    fn units_are_whole_and_zeros_only_where_all_of_them_is() {
        const UNIT: u64 = 65536;
        let shape = |extents: &[Extent]| {
            let mut runs = Vec::new();
            let mut shaper = Shaper::new(SIZE, UNIT);
            let mut take = |run: Run| {
                runs.push((run.start, run.end, run.zero));
                Ok(())
            };
            for e in extents {
                shaper.add(e, &mut take).unwrap();
            }
            shaper.finish(&mut take).unwrap();
            runs
        };
        assert_eq!(shape(&[extent(0, SIZE, true, false)]), [(0, SIZE, false)]);
        assert_eq!(shape(&[extent(0, SIZE, false, true)]), []);
        // One byte makes its unit; two parts of one unit make it once.
        let parts = [extent(5, 6, true, false), extent(6, 9, false, false), extent(9, 70_000, true, false)];
        assert_eq!(shape(&parts), [(0, 2 * UNIT, false)]);
        // Part of a unit is zeros and dirty, the rest is zeros and not: the unit is zeros. With data beside it, it is not.
        let zeros = [extent(0, 4096, true, true), extent(4096, UNIT, false, true), extent(UNIT, SIZE, false, false)];
        assert_eq!(shape(&zeros), [(0, UNIT, true)]);
        let mixed = [extent(0, 4096, true, true), extent(4096, UNIT, false, false)];
        assert_eq!(shape(&mixed), [(0, UNIT, false)]);
        // Of what is not listed nothing is known.
        assert_eq!(shape(&[extent(0, 4096, true, true)]), [(0, UNIT, false)]);
        // The last unit ends with the disk.
        let last = SIZE - SIZE % UNIT;
        let tail = [extent(last, last + 10, false, true), extent(last + 10, SIZE, true, true)];
        assert_eq!(shape(&tail), [(last, SIZE, true)]);
        assert_eq!(shape(&[extent(SIZE - 1, SIZE, true, false)]), [(last, SIZE, false)]);
        // Neighbours of one kind are one run, over all borders.
        let many: Vec<_> = (0..SIZE / 1000).map(|n| extent(n * 1000, n * 1000 + 1000, n != 400, false)).collect();
        assert_eq!(shape(&many), [(0, SIZE, false)]);
    }

    #[test]
    fn extents_out_of_place_are_an_error() {
        let (source, target) = (Medium::new(|_| 1), Medium::new(|_| 2));
        for bad in [
            vec![extent(10, 20, true, false), extent(0, 10, true, false)],
            vec![extent(0, 20, true, false), extent(10, 30, true, false)],
            vec![extent(0, SIZE + 1, true, false)],
            vec![extent(SIZE + 5, SIZE + 6, true, false)],
        ] {
            assert_eq!(run(&source, &target, &bad, &options(1)).unwrap_err().errno(), errno::EIO, "{bad:?}");
        }
        let broken = [Ok(extent(0, 10, true, false)), Err(Error::new(errno::EIO, "map", "broken"))];
        let e = copy(&source, &target, broken.into_iter(), &options(1), &|_, _| Ok(()), &fail).unwrap_err();
        assert!(e.to_string().contains("broken"));
    }

    #[test]
    fn zeros_in_data_are_found_where_that_is_asked_for() {
        let source = Medium::new(|at| u8::from((300_000..310_000).contains(&at)));
        for (unit, detect_zeroes, written) in [(1, true, 4096 * 4), (65536, true, 65536), (65536, false, SIZE)] {
            let target = Medium::new(|_| 0xee);
            run(&source, &target, &whole(), &Options { detect_zeroes, ..options(unit) }).unwrap();
            assert!(target.content() == source.content());
            let count = target.written.load(Ordering::SeqCst);
            assert!(count <= written, "{count} bytes in units of {unit}");
            assert_eq!(count + target.zeroed.load(Ordering::SeqCst), SIZE);
        }
    }

    #[test]
    fn an_error_of_either_side_ends_the_copy_or_is_skipped_or_tried_again() {
        for side in [Side::Read, Side::Write] {
            let make = |times| {
                let (source, target) = (Medium::new(|_| 1), Medium::new(|_| 2));
                if side == Side::Read {
                    (source.failing(500_000, times), target)
                } else {
                    (source, target.failing(500_000, times))
                }
            };
            let told = AtomicU64::new(0);
            let done = |_, len| {
                told.fetch_add(len, Ordering::SeqCst);
                Ok(())
            };
            let extents = || whole().into_iter().map(Ok);
            let (source, target) = make(u32::MAX);
            let e = copy(&source, &target, extents(), &options(1), &done, &fail).unwrap_err();
            assert!(e.to_string().contains("fails"), "{e}");
            assert!(told.swap(0, Ordering::SeqCst) < SIZE);

            let (source, target) = make(u32::MAX);
            let skip = |at: Side, offset: u64, len: u64, _: &Error| {
                assert!(at == side && (offset..offset + len).contains(&500_000));
                Decision::Skip
            };
            copy(&source, &target, extents(), &options(1), &done, &skip).unwrap();
            assert_eq!(told.swap(0, Ordering::SeqCst), SIZE - 16384);
            assert_eq!(target.content().iter().filter(|byte| **byte == 2).count(), 16384);

            let (source, target) = make(3);
            copy(&source, &target, extents(), &options(1), &done, &|_, _, _, _| Decision::Retry).unwrap();
            assert_eq!(told.swap(0, Ordering::SeqCst), SIZE);
            assert!(target.content() == source.content());
        }
    }

    #[test]
    fn a_cancelled_copy_begins_no_further_piece() {
        let (source, target) = (Medium::new(|_| 1), Medium::new(|_| 2));
        let count = AtomicU64::new(0);
        let done = |_, _| match count.fetch_add(1, Ordering::SeqCst) {
            0..3 => Ok(()),
            _ => Err(Error::new(errno::ECANCELED, "copy", "cancelled")),
        };
        let e = copy(&source, &target, whole().into_iter().map(Ok), &options(1), &done, &fail).unwrap_err();
        assert_eq!(e.errno(), errno::ECANCELED);
        // Those that were under way: one a thread.
        assert!(count.load(Ordering::SeqCst) <= 3 + 2 * 4, "{count:?}");
        assert!(target.written.load(Ordering::SeqCst) < SIZE / 2);
    }

    #[test]
    fn no_more_is_under_way_than_a_piece_for_each_thread() {
        let (source, target) = (Medium::new(|_| 1), Medium::new(|_| 2));
        run(&source, &target, &whole(), &options(4096)).unwrap();
        for medium in [&source, &target] {
            assert!(medium.busiest.load(Ordering::SeqCst) <= 4 * 16384);
        }
    }
}
