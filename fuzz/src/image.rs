//! A whole small image. Input: see [`super::input`].
//!
//! 1. **Looking changes nothing**: header, check and every read of an image that may be anything end within a bounded
//!    number of transfers, in bytes or an error, and nothing is written.
//! 2. **A block status tells the truth**: what it calls zero reads as zeros.
//! 3. **A repair repairs**: it refuses untouched, or leaves an image in which a check finds nothing; and no byte that
//!    could be read before is another one after it.
//! 4. **A good image is a disk**: one in which a check finds nothing takes any row of operations as a row of bytes
//!    would, with kills between them; what was not changed reads as before, internal snapshots too, and the image is
//!    good again after a close.
//! 5. **A bad image that is driven** ends in errors at most.

use super::input::{Input, Op};
use super::meter::Meter;
use super::model::{Model, Next, OPS_BYTES_MAX, is_zero};
use fleecefs::error::{Error, Result, errno};
use fleecefs::image::qcow2::check::{Repair, Report, check, repair};
use fleecefs::image::qcow2::header::Header;
use fleecefs::image::qcow2::refcount::{Place, Stored, Width};
use fleecefs::image::qcow2::{Parts, Qcow2Image, read_header};
use fleecefs::image::{Format, Image, OpenOptions};
use fleecefs::storage::{BlockStatus, MemFile, Stamp, Storage};
use std::path::Path;
use std::sync::{Arc, OnceLock};

/// Longest sample that is read.
const SAMPLE_BYTES: u64 = 24 << 10;
/// Larger clusters are looked at only: they cost a thousand times as much, and show nothing that smaller ones hide.
const CLUSTER_BITS_MAX: u32 = 16;
/// Most internal snapshots that are looked at.
const SNAPSHOTS_MAX: usize = 3;
/// Little enough for L2 tables to be dropped and loaded again.
const L2_CACHE_BYTES: u64 = 32 << 10;
/// What opening may transfer at most: the L1 table, and the snapshot table in small pieces.
const OPEN_BUDGET_BYTES: u64 = 192 << 20;
/// What a check may transfer beside what lies in the file: tables are no longer than this.
const CHECK_BUDGET_BYTES: u64 = 256 << 20;

/// Runs the target.
pub fn run(bytes: &[u8]) {
    let input = Input::decode(bytes);
    let Some((header, report)) = look(&input) else { return };
    if header.cluster_bits > CLUSTER_BITS_MAX {
        return;
    }
    repaired(&input, &header, &report);
    driven(&input, &header, &report);
}

/// What an image's file is opened with.
struct Disk {
    file: Arc<Meter>,
    data: Option<Arc<Meter>>,
    backing: Option<Arc<dyn Image>>,
}

impl Disk {
    fn new(input: &Input, header: &Header) -> Disk {
        let data = header.has_data_file().then(|| {
            let file = MemFile::new("data", header.size);
            for (at, byte) in [(0, 0xD0), (header.cluster_size(), 0xD1), (header.size / 2, 0xD2)] {
                file.write_at(&[byte; 512], at.min(header.size.saturating_sub(512))).expect("memory takes it");
            }
            file.set_len(header.size).expect("memory takes it");
            Meter::new(file)
        });
        let backing = header.backing.as_ref().map(|_| Arc::new(Pattern(header.size / 2 + 700)) as Arc<dyn Image>);
        Disk { file: Meter::new(input.file()), data, backing }
    }

    fn open(&self, read_only: bool, snapshot: Option<&str>) -> Result<Qcow2Image> {
        let data = self.data.as_ref().map(Meter::shared);
        let parts = Parts { file: self.file.shared(), data, backing: self.backing.clone() };
        let snapshot = snapshot.map(str::to_owned);
        let l2_cache_bytes = Some(L2_CACHE_BYTES);
        let options =
            OpenOptions { format: Some(Format::Qcow2), read_only, snapshot, l2_cache_bytes, ..Default::default() };
        Qcow2Image::over(parts, &options)
    }

    /// Sets what may be transferred from now on.
    fn allow(&self, bytes: u64) {
        for file in [Some(&self.file), self.data.as_ref()].into_iter().flatten() {
            file.allow(bytes);
        }
    }

    fn changes(&self) -> u64 {
        self.file.changes() + self.data.as_ref().map_or(0, |data| data.changes())
    }
}

/// What a check of `input` may transfer.
fn check_budget(input: &Input) -> u64 {
    CHECK_BUDGET_BYTES + 8 * input.file_bytes
}

/// Opens, checks and reads what may be anything.
fn look(input: &Input) -> Option<(Header, Report)> {
    let file = Meter::new(input.file());
    file.allow(OPEN_BUDGET_BYTES);
    let header = match read_header(&*file) {
        Ok(header) => header,
        Err(_) => {
            let parts = Parts { file: file.shared(), data: None, backing: None };
            assert!(Qcow2Image::over(parts, &OpenOptions::default()).is_err(), "opened without a header");
            assert_eq!(file.changes(), 0, "a refused image was changed");
            return None;
        }
    };
    let disk = Disk::new(input, &header);
    disk.allow(check_budget(input));
    let report = check(&*disk.file);
    disk.allow(OPEN_BUDGET_BYTES);
    if let Ok(image) = disk.open(true, None) {
        disk.allow(u64::MAX);
        sample(&disk, &image, &samples(input, image.size()));
        for result in [image.write_at(&[1], 0), image.write_zeroes(0, 1, true), image.resize(1 << 20)] {
            assert_eq!(result.expect_err("changed read-only").errno(), errno::EROFS);
        }
        for snapshot in image.snapshots().iter().take(SNAPSHOTS_MAX) {
            disk.allow(OPEN_BUDGET_BYTES);
            if let Ok(frozen) = disk.open(true, Some(&snapshot.id)) {
                sample(&disk, &frozen, &samples(input, frozen.size()));
            }
        }
    }
    assert_eq!(disk.changes(), 0, "looking changed the image");
    match report {
        Ok(report) => Some((header, report)),
        Err(e) => {
            assert!([errno::EINVAL, errno::EIO, errno::EFBIG].contains(&e.errno()), "{e:?}");
            None
        }
    }
}

/// Ranges of a disk of `size` bytes that are looked at: its ends, and where the operations go.
fn samples(input: &Input, size: u64) -> Vec<(u64, u64)> {
    if size == 0 {
        return Vec::new();
    }
    let end = size.saturating_sub(4096);
    let mut all = vec![(0, size.min(SAMPLE_BYTES)), (end, size - end)];
    all.extend(input.ops.iter().take(6).map(|op: &Op| op.range(size, SAMPLE_BYTES)));
    all
}

/// What a disk holds in some ranges; `None` where it cannot be read.
type Sample = Vec<Option<Vec<u8>>>;

/// Reads ranges whole and in pieces, and asks for their block status.
fn sample(disk: &Disk, image: &Qcow2Image, ranges: &[(u64, u64)]) -> Sample {
    let cluster = image.header().cluster_size();
    let read = |&(offset, len): &(u64, u64)| {
        // Each cluster may be compressed data of two clusters, and need a piece of an L2 table.
        disk.allow((len / cluster + 2) * (4 * cluster + (8 << 10)) + 64 * len + OPEN_BUDGET_BYTES);
        let mut whole = vec![0xAA; len as usize];
        let read = image.read_at(&mut whole, offset);
        let mut pieces = vec![0x55; len as usize];
        let step = (len as usize / 2).max(1);
        let all = (0..len as usize).step_by(step).try_for_each(|at| {
            let end = (at + step).min(len as usize);
            image.read_at(&mut pieces[at..end], offset + at as u64)
        });
        assert_eq!(read.is_ok(), all.is_ok(), "whole: {read:?}, in pieces: {all:?}");
        status(image, offset, len, read.is_ok().then_some(&whole[..]));
        if let Err(e) = read {
            assert!(e.errno() == errno::EIO, "{e:?}");
            return None;
        }
        assert!(whole == pieces, "another read gives other bytes in {len} bytes at {offset}");
        Some(whole)
    };
    ranges.iter().map(read).collect()
}

/// Walks the block status of a range and holds it against what was read there.
fn status(image: &Qcow2Image, offset: u64, len: u64, bytes: Option<&[u8]>) {
    let mut done = 0;
    while done < len {
        let Ok(status) = image.block_status(offset + done, len - done) else { return };
        assert!((1..=len - done).contains(&status.len), "{status:?} for {} bytes", len - done);
        let bytes = bytes.and_then(|bytes| bytes.get(done as usize..(done + status.len) as usize));
        assert!(!status.zero || bytes.is_none_or(is_zero), "{status:?} is not zero");
        done += status.len;
    }
}

/// What can be read of a file, the disk as it is first and then each internal snapshot.
fn contents(input: &Input, disk: &Disk) -> Vec<Sample> {
    disk.allow(OPEN_BUDGET_BYTES);
    let Ok(image) = disk.open(true, None) else { return Vec::new() };
    let mut all = vec![sample(disk, &image, &samples(input, image.size()))];
    all.extend(frozen(input, disk, &image));
    all
}

/// What the internal snapshots hold.
fn frozen(input: &Input, disk: &Disk, image: &Qcow2Image) -> Vec<Sample> {
    let some = image.snapshots().iter().take(SNAPSHOTS_MAX);
    some.filter_map(|snapshot| {
        disk.allow(OPEN_BUDGET_BYTES);
        let frozen = disk.open(true, Some(&snapshot.id)).ok()?;
        Some(sample(disk, &frozen, &samples(input, frozen.size())))
    })
    .collect()
}

/// Whether all that could be read before reads the same now.
fn kept(before: &[Sample], after: &[Sample]) -> bool {
    let same = |(one, other): (&Option<Vec<u8>>, &Option<Vec<u8>>)| one.is_none() || one == other;
    before.len() == after.len()
        && before.iter().zip(after).all(|(one, other)| one.len() == other.len() && one.iter().zip(other).all(same))
}

fn repaired(input: &Input, header: &Header, report: &Report) {
    if report.is_clean() && !report.dirty && !report.corrupt {
        let disk = Disk::new(input, header);
        repair(&*disk.file, Repair::All).expect("nothing to repair");
        return assert_eq!(disk.changes(), 0, "a repair changed a clean image");
    }
    for extent in [Repair::Leaks, Repair::All] {
        let disk = Disk::new(input, header);
        let before = contents(input, &disk);
        disk.allow(6 * check_budget(input));
        match repair(&*disk.file, extent) {
            Err(e) => refused(&e, &disk),
            Ok(done) => {
                assert_eq!(done.before, *report);
                assert!(kept(&before, &contents(input, &disk)), "a repair changed what the guest reads");
                disk.allow(4 * check_budget(input));
                assert_eq!(check(&*disk.file).expect("checked before"), done.after);
                assert_eq!(done.after.leaks, 0, "{:?}", done.after.findings);
                if extent == Repair::All {
                    assert!(done.after.is_clean() && !done.after.dirty && !done.after.corrupt, "{:?}", done.after);
                    let changes = disk.changes();
                    repair(&*disk.file, extent).expect("nothing to repair");
                    assert_eq!(disk.changes(), changes, "a second repair changes something");
                }
            }
        }
    }
}

/// A repair that gave up: it changed nothing, unless the medium or the format ended.
fn refused(e: &Error, disk: &Disk) {
    match e.errno() {
        errno::EIO => assert_eq!(disk.changes(), 0, "{e:?}, and the image was changed"),
        other => assert!([errno::EINVAL, errno::EFBIG].contains(&other), "{e:?}"),
    }
}

/// Whether a refcount behind the end of the file is not 0: no check sees it, but the leak comes to light when the file
/// grows.
fn counts_behind_end(input: &Input, header: &Header) -> bool {
    let file = input.file();
    let place = Place {
        cluster_bits: header.cluster_bits,
        width: Width::new(header.refcount_order).expect("the header is good"),
        table_offset: header.refcount_table_offset.0,
        table_clusters: header.refcount_table_clusters.into(),
    };
    let Ok(mut stored) = Stored::open(&file, place) else { return true };
    let end = input.file_bytes.div_ceil(header.cluster_size());
    let described = stored.described_clusters().min(end + (1 << 20));
    (end..described).any(|cluster| stored.get(cluster).map_or(true, |count| count != 0))
}

fn driven(input: &Input, header: &Header, report: &Report) {
    let disk = Disk::new(input, header);
    let good = report.is_clean() && !report.corrupt && !counts_behind_end(input, header);
    disk.allow(u64::MAX);
    let before = contents(input, &disk);
    disk.allow(OPEN_BUDGET_BYTES + 8 * check_budget(input));
    let image = match disk.open(false, None) {
        Ok(image) => image,
        Err(e) => return assert!(!good, "not opened for writing: {e:?}"),
    };
    let pristine = Disk::new(input, header);
    let Ok(reference) = pristine.open(true, None) else { panic!("open for writing, but not for reading") };
    disk.allow(8 * check_budget(input) + 64 * OPS_BYTES_MAX);
    let mut model = Model::new(reference, good);
    let mut image = Some(image);
    for op in &input.ops {
        let Some(open) = &image else { break };
        let next = model.apply(open, op);
        if next == Next::Reopen {
            close(open, good);
        }
        if next != Next::Go {
            drop(image.take());
            image = disk.open(false, None).inspect_err(|e| assert!(!good, "it does not open again: {e:?}")).ok();
        }
    }
    let Some(open) = image else { return };
    model.compare(&open);
    close(&open, good);
    drop(open);
    if !good {
        return;
    }
    let after = check(&*disk.file).expect("it could be checked before");
    assert!(after.is_clean() && !after.dirty && !after.corrupt, "{:?}", after.findings);
    let again = disk.open(true, None).expect("it was open");
    model.compare(&again);
    assert!(kept(&before[1..], &frozen(input, &disk, &again)), "an internal snapshot has changed");
}

fn close(image: &Qcow2Image, good: bool) {
    if let Err(e) = image.close() {
        assert!(!good, "close: {e:?}");
    }
}

/// What lies below: no byte of it is 0 but in every fourth sector.
#[derive(Debug)]
struct Pattern(u64);

impl Pattern {
    /// The bytes from offset 0 on until they are repeated.
    fn period() -> &'static [u8] {
        static PERIOD: OnceLock<Vec<u8>> = OnceLock::new();
        let byte = |at: usize| if at / 512 % 4 == 3 { 0 } else { (at % 251) as u8 + 1 };
        PERIOD.get_or_init(|| (0..251 * 2048).map(byte).collect())
    }
}

impl Image for Pattern {
    fn size(&self) -> u64 {
        self.0
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        assert!(offset + buf.len() as u64 <= self.0, "{} bytes at {offset} behind the end", buf.len());
        let period = Pattern::period();
        let mut done = 0;
        while done < buf.len() {
            let from = ((offset + done as u64) % period.len() as u64) as usize;
            let len = (period.len() - from).min(buf.len() - done);
            buf[done..done + len].copy_from_slice(&period[from..from + len]);
            done += len;
        }
        Ok(())
    }

    fn write_at(&self, _: &[u8], _: u64) -> Result<()> {
        panic!("the backing file is written to");
    }

    fn write_zeroes(&self, _: u64, _: u64, _: bool) -> Result<()> {
        panic!("the backing file is written to");
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn resize(&self, _: u64) -> Result<()> {
        panic!("the backing file is resized");
    }

    fn block_status(&self, offset: u64, len: u64) -> Result<BlockStatus> {
        assert!(offset + len <= self.0);
        let to_edge = (512 - offset % 512).min(len);
        Ok(BlockStatus { len: to_edge, zero: offset / 512 % 4 == 3 })
    }

    fn stamp(&self) -> Result<Stamp> {
        Ok(Stamp { dev: 0, ino: 0, size: self.0, mtime_ns: 0, ctime_ns: 0 })
    }

    fn format(&self) -> Format {
        Format::Raw
    }

    fn path(&self) -> &Path {
        Path::new("base")
    }

    fn read_only(&self) -> bool {
        true
    }

    fn is_block_device(&self) -> bool {
        false
    }
}
