//! The n-th call to the medium fails, for every n.
//!
//! Whatever fails: the operation's error names what, where and why; each byte of its range is the old or the new one
//! from then on; the next operation works; and after a close, or the repair that the next open makes, nothing is wrong
//! with the image. A write that failed may have reached the medium all the same, in whole or in part.

use crate::driver::{self, Files};
use crate::images::{Prepared, Recipe, SECTOR, bytes_of, has_qemu, stamps};
use fleecefs::error::{Error, Result, errno};
use fleecefs::image::Image;
use fleecefs::image::qcow2::Qcow2Image;
use fleecefs::image::qcow2::check::check;
use fleecefs::storage::faulty::Call;
use fleecefs::storage::{BlockStatus, FaultPlan, Faulty, SharedStorage, Stamp, Storage};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

/// What a failing write leaves on the medium.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Left {
    Nothing,
    /// The first sectors, about half.
    Half,
    All,
}

/// A storage whose failing writes leave something.
#[derive(Debug)]
struct Torn {
    faulty: Faulty,
    left: Left,
}

impl Storage for Torn {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.faulty.read_at(buf, offset)
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.faulty.write_at(buf, offset).inspect_err(|_| {
            let len = match self.left {
                Left::Nothing => 0,
                Left::Half => buf.len() / SECTOR / 2 * SECTOR,
                Left::All => buf.len(),
            };
            self.faulty.inner.write_at(&buf[..len], offset).unwrap();
        })
    }
    fn sync(&self) -> Result<()> {
        self.faulty.sync()
    }
    fn len(&self) -> Result<u64> {
        self.faulty.len()
    }
    fn set_len(&self, len: u64) -> Result<()> {
        self.faulty.set_len(len)
    }
    fn punch_hole(&self, offset: u64, len: u64) -> Result<()> {
        self.faulty.punch_hole(offset, len)
    }
    fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        self.faulty.write_zeroes(offset, len)
    }
    fn block_status(&self, offset: u64, len: u64) -> Result<BlockStatus> {
        self.faulty.block_status(offset, len)
    }
    fn stamp(&self) -> Result<Stamp> {
        self.faulty.stamp()
    }
    fn path(&self) -> &Path {
        self.faulty.path()
    }
}

/// What a disk may hold.
#[derive(Debug, Clone)]
struct Either {
    /// By the operations that were done.
    done: Vec<u8>,
    /// By each one that failed, where nothing was done since.
    failed: Vec<Vec<Option<u8>>>,
}

impl Either {
    fn set(&mut self, range: Range<usize>, bytes: &[u8], failed: bool) {
        if failed {
            let mut maybe = vec![None; self.done.len()];
            maybe[range].iter_mut().zip(bytes).for_each(|(place, byte)| *place = Some(*byte));
            self.failed.push(maybe);
        } else {
            self.done[range.clone()].copy_from_slice(bytes);
            self.failed.iter_mut().for_each(|maybe| maybe[range.clone()].fill(None));
        }
    }

    fn resize(&mut self, len: usize) {
        self.done.resize(len, 0);
        self.failed.iter_mut().for_each(|maybe| maybe.resize(len, None));
    }

    #[track_caller]
    fn check(&self, bytes: &[u8], from: usize, what: &str) {
        if bytes == &self.done[from..from + bytes.len()] {
            return;
        }
        for (at, byte) in (from..).zip(bytes) {
            let maybe = || self.failed.iter().filter_map(|maybe| maybe[at]);
            let right = *byte == self.done[at] || maybe().any(|one| one == *byte);
            assert!(
                right,
                "{what}: byte {at} is {byte:#x}, not {:#x} or {:x?}",
                self.done[at],
                maybe().collect::<Vec<_>>()
            );
        }
    }
}

/// What is done to the disk; the same in each run.
#[derive(Debug, Clone, Copy)]
enum Op {
    Write(u64, usize),
    Zero(u64, usize, bool),
    Resize(u64),
    Flush,
    Read,
    Close,
}

/// One fault in one run.
#[derive(Debug, Clone, Copy)]
struct Fault {
    call: Call,
    nth: u64,
    errno: i32,
    left: Left,
    /// Of the external data file instead of the image's.
    data: bool,
}

/// First touches, overwrites, shared and compressed clusters, freed ones used again.
fn script(prepared: &Prepared, size: u64) -> Vec<Op> {
    use Op::*;
    let c = prepared.cluster_size;
    let half = c as usize / 2;
    // Version 2 has one size for the disk and its snapshots.
    let resizes = !(prepared.recipe.is_v2() && prepared.recipe.snapshots);
    let all = [
        Write(0, half),
        Write(c + c / 4, half),
        Write(5 * c - 700, 2000),
        Read,
        Zero(2 * c, c as usize, true),
        Zero(3 * c + 512, half, false),
        Write(2 * c + 512, 700),
        Flush,
        Write(8 * c, 3 * c as usize),
        Zero(8 * c, 2 * c as usize, true),
        Write(8 * c + c / 2, c as usize),
        Flush,
        Write(6 * c, half),
        Write(7 * c, half),
        Read,
        Resize(size + 3 * c),
        Write(size + c - 600, c as usize),
        Zero(0, 4 * c as usize, true),
        Write(0, c as usize),
        Close,
        Write(12 * c + 100, 1000),
        Write(9 * c, half),
        Flush,
        Read,
        Resize(10 * c - c / 4),
        Write(9 * c, half),
        Resize(size),
        Read,
    ];
    let fits = |op: &Op| match op {
        Write(offset, len) => offset + *len as u64 <= size,
        Resize(_) => false,
        _ => true,
    };
    all.into_iter().filter(|op| resizes || fits(op)).collect()
}

struct Run<'a> {
    prepared: &'a Prepared,
    plan: Arc<FaultPlan>,
    /// The medium underneath.
    sound: Files,
    /// What the image is given.
    files: Files,
    fault: Option<Fault>,
    disk: Either,
    failures: Vec<String>,
    /// A sync failed: what it was to save may be lost, so this open promises nothing more.
    is_latched: bool,
}

impl Run<'_> {
    fn new(prepared: &Prepared, fault: Option<Fault>, data_counts: bool) -> Run<'_> {
        let sound = prepared.files();
        let plan = Arc::new(FaultPlan::new());
        let left = fault.map_or(Left::Nothing, |fault| fault.left);
        let faulty = |inner: &SharedStorage, counts: bool| -> SharedStorage {
            let plan = if counts { plan.clone() } else { Arc::new(FaultPlan::new()) };
            Arc::new(Torn { faulty: Faulty { inner: inner.clone(), plan }, left })
        };
        let files = Files {
            image: faulty(&sound.image, !data_counts),
            data: sound.data.as_ref().map(|data| faulty(data, data_counts)),
        };
        if let Some(fault) = fault {
            plan.fail_nth(fault.call, fault.nth, fault.errno);
        }
        let disk = Either { done: prepared.content.clone(), failed: Vec::new() };
        Run { prepared, plan, sound, files, fault, disk, failures: Vec::new(), is_latched: false }
    }

    fn what(&self, step: &str) -> String {
        format!("{:?}, {:?}, failed: {:?}, {step}", self.prepared.recipe, self.fault, self.failures)
    }

    /// Takes note of a failure, which must be the injected one, told as it should be.
    fn failed<T>(&mut self, result: Result<T>, step: &str) -> Option<T> {
        let e: Error = match result {
            Ok(value) => return Some(value),
            Err(e) => e,
        };
        let what = self.what(step);
        let fault = self.fault.unwrap_or_else(|| panic!("{what}: {e}"));
        assert_eq!(e.errno(), fault.errno, "{what}: {e}");
        let text = e.to_string();
        assert!(text.contains("disk."), "{what}: no path in '{text}'");
        self.failures.push(format!("{step}: {e}"));
        assert!(self.failures.len() == 1 || self.is_latched, "{what}: one fault, two failures: {e}");
        self.is_latched |= fault.call == Call::Sync;
        None
    }

    /// What failed once is done when it is asked for again, unless a sync failed.
    fn again<T>(&mut self, mut work: impl FnMut() -> Result<T>, step: &str) -> Option<T> {
        let first = work();
        if let Some(done) = self.failed(first, step) {
            return Some(done);
        }
        let second = work();
        self.failed(second, &format!("{step}, again"))
    }

    fn open(&mut self) -> Qcow2Image {
        self.is_latched = false;
        let (files, prepared) = (self.files.clone(), self.prepared);
        let open = || driver::read_write(&files, prepared, true);
        let image = self.again(open, "open");
        self.is_latched = false;
        image.unwrap_or_else(|| open().unwrap_or_else(|e| panic!("{}: {e}", self.what("third open"))))
    }

    fn run(&mut self) {
        let mut image = self.open();
        for (number, op) in script(self.prepared, image.size()).into_iter().enumerate() {
            let step = format!("step {number}: {op:?}");
            match op {
                Op::Write(offset, len) => self.write(&image, offset, len, number as u64, &step),
                Op::Zero(offset, len, discard) => {
                    let done = image.write_zeroes(offset, len as u64, discard);
                    self.changed(&image, offset, &vec![0; len], done, &step);
                }
                Op::Resize(size) => {
                    self.again(|| image.resize(size), &step);
                    if image.size() != size {
                        assert!(self.is_latched);
                        image = self.open();
                        image.resize(size).unwrap();
                    }
                    self.disk.resize(size as usize);
                }
                Op::Flush => {
                    self.again(|| image.flush(), &step);
                    assert!(
                        !self.is_latched || image.flush().is_err(),
                        "{}: after a sync that failed",
                        self.what(&step)
                    );
                }
                Op::Read => {
                    let bytes = self.again(|| bytes_of(&image), &step).unwrap();
                    self.disk.check(&bytes, 0, &self.what(&step));
                }
                Op::Close => {
                    let done = image.close();
                    if self.failed(done, &step).is_none() {
                        self.go_on_after_a_close(&image);
                    }
                    drop(image);
                    image = self.open();
                }
            }
        }
        let done = image.close();
        if self.failed(done, "last close").is_none() {
            self.go_on_after_a_close(&image);
        }
    }

    /// The guest goes on although the close failed, and is killed.
    fn go_on_after_a_close(&mut self, image: &Qcow2Image) {
        let c = self.prepared.cluster_size;
        self.write(image, 15 * c + 512, c as usize, 500, "write after a close that failed");
        self.write(image, 20 * c, c as usize, 501, "write after a close that failed");
        let report = check(&*self.sound.image).unwrap();
        let v2 = self.prepared.recipe.is_v2();
        assert!(!v2 && report.dirty || report.corruptions == 0, "{}: {:?}", self.what("killed"), report.findings);
    }

    fn write(&mut self, image: &Qcow2Image, offset: u64, len: usize, seq: u64, step: &str) {
        let bytes = stamps(offset..offset + len as u64, 1000 + seq);
        let done = image.write_at(&bytes, offset);
        self.changed(image, offset, &bytes, done, step);
    }

    /// A change of a range is answered: what it holds now, and what it may hold.
    fn changed(&mut self, image: &Qcow2Image, offset: u64, bytes: &[u8], done: Result<()>, step: &str) {
        let range = offset as usize..offset as usize + bytes.len();
        let failed = self.failed(done, step).is_none();
        self.disk.set(range, bytes, failed);
        // The neighbours, too.
        let from = offset.saturating_sub(2 * self.prepared.cluster_size);
        let to = (offset + bytes.len() as u64 + 2 * self.prepared.cluster_size).min(image.size());
        let mut held = vec![0xEE; (to - from) as usize];
        self.again(|| image.read_at(&mut held, from), step).unwrap();
        self.disk.check(&held, from as usize, &self.what(step));
    }
}

/// Runs the script with one fault, and looks at what is left.
fn with_fault(prepared: &Prepared, fault: Fault) {
    let mut run = Run::new(prepared, Some(fault), fault.data);
    run.run();
    let sound = run.sound.clone();
    run.plan.clear();
    let what = run.what("at the end");
    let before = check(&*sound.image).unwrap();
    assert!(before.dirty || before.corruptions == 0, "{what}: {:?}", before.findings);
    for _ in 0..2 {
        let image = driver::read_write(&sound, prepared, false).unwrap_or_else(|e| panic!("{what}: {e}"));
        run.disk.check(&bytes_of(&image).unwrap(), 0, &what);
        image.close().unwrap();
        let report = check(&*sound.image).unwrap();
        assert!(report.is_clean() && !report.dirty, "{what}: {:?}", report.findings);
    }
    for (name, content) in &prepared.snapshots {
        let snapshot = driver::read_only(&sound, prepared, Some(name)).unwrap();
        assert!(bytes_of(&snapshot).unwrap() == *content, "{what}: internal snapshot {name}");
    }
}

const CALLS: [Call; 7] = [Call::Read, Call::Write, Call::Sync, Call::SetLen, Call::Punch, Call::Zero, Call::Status];

/// Every call of every kind, of the image's file or of its data file.
fn every_call(recipe: Recipe) {
    let prepared = Prepared::make(recipe);
    let full = std::env::var_os("FLEECEFS_FULL").is_some();
    for data in [false, true] {
        if data && prepared.data.is_none() {
            continue;
        }
        let mut run = Run::new(&prepared, None, data);
        run.run();
        for call in CALLS {
            let count = run.plan.calls(call);
            let step = if full { 1 } else { (count / 20).max(1) };
            let first = if full { 1 } else { 1 + prepared.cluster_size % 7 % step };
            for nth in (first..=count).step_by(step as usize) {
                let errno = if nth % 2 == 0 { errno::EIO } else { errno::ENOSPC };
                let lefts =
                    if call == Call::Write { &[Left::Nothing, Left::Half, Left::All][..] } else { &[Left::Nothing] };
                lefts.iter().for_each(|left| with_fault(&prepared, Fault { call, nth, errno, left: *left, data }));
            }
        }
    }
}

const K: u64 = 1024;

#[test]
fn whatever_call_fails_no_byte_is_wrong_and_the_image_can_be_repaired() {
    if !has_qemu("whatever_call_fails_no_byte_is_wrong_and_the_image_can_be_repaired") {
        return;
    }
    every_call(Recipe::new("cluster_size=4k", 100 * K).compressed().snapshots());
    every_call(Recipe::new("cluster_size=4k", 100 * K).based(70 * K));
    every_call(Recipe::new("cluster_size=16k,extended_l2=on", 400 * K).based(300 * K));
    every_call(Recipe::new("cluster_size=4k,data_file=DATA", 100 * K));
    every_call(Recipe::new("cluster_size=512", 62 * K));
}

#[test]
fn whatever_call_fails_version_2_loses_clusters_at_most() {
    if !has_qemu("whatever_call_fails_version_2_loses_clusters_at_most") {
        return;
    }
    every_call(Recipe::new("compat=0.10,cluster_size=4k", 100 * K).compressed());
    every_call(Recipe::new("compat=0.10,cluster_size=512", 62 * K).snapshots());
}
