//! A guest of several threads that writes, zeroes and discards anywhere, beside a twin in memory.
//!
//! An operation claims its range, so that each byte has one owner at a time, while neighbours in one cluster, and in
//! one sector, run at the same time. It is done on the disk first and on the twin then. So at any instant the disk holds
//! what the twin holds, but for operations that are under way: a frozen view, or what a kill left, may hold of each of
//! these any part.

use crate::harness::*;
use crate::qcow2_cells::Random;
use fleecefs::storage::Storage;
use fleecefs::storage::os::{OpenOptions, OsFile};
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex, RwLock};
use std::time::Duration;

/// Unit of comparison.
const PIECE: usize = 4096;
const NOISE_BYTES: u64 = 1 << 20;
/// The longest operation.
const LEN_MAX: u64 = 300 << 10;

/// What an operation makes of its range.
#[derive(Clone)]
struct Change {
    range: Range<u64>,
    kind: Kind,
}

#[derive(Clone)]
enum Kind {
    Write(Arc<[u8]>),
    Zero,
    Discard,
}

impl Change {
    fn overlaps(&self, range: &Range<u64>) -> bool {
        self.range.start < range.end && range.start < self.range.end
    }

    /// What it puts at `at`; None where it doesn't reach.
    fn byte(&self, at: u64) -> Option<u8> {
        if !self.range.contains(&at) {
            return None;
        }
        match &self.kind {
            Kind::Write(bytes) => bytes.get((at - self.range.start) as usize).copied(),
            Kind::Zero | Kind::Discard => Some(0),
        }
    }
}

/// The disk as it should be.
struct Twin {
    bytes: Vec<u8>,
    /// Operations under way.
    claims: BTreeMap<u64, Change>,
    /// Operations that began since a recording did; None where nobody records.
    recorded: Option<Vec<Change>>,
}

/// What a disk may hold: these bytes, but for operations that were under way.
pub struct Expected {
    bytes: Vec<u8>,
    under_way: Vec<Change>,
}

impl Expected {
    #[track_caller]
    pub fn check(&self, what: &str, got: &[u8]) {
        assert_eq!(got.len(), self.bytes.len(), "{what}: size");
        for (index, (got, expected)) in got.chunks(PIECE).zip(self.bytes.chunks(PIECE)).enumerate() {
            if got == expected {
                continue;
            }
            let start = (index * PIECE) as u64;
            let here: Vec<_> =
                self.under_way.iter().filter(|change| change.overlaps(&(start..start + PIECE as u64))).collect();
            for (at, (got, expected)) in (start..).zip(got.iter().zip(expected)).filter(|(_, (a, b))| a != b) {
                let explained = here.iter().any(|change| change.byte(at) == Some(*got));
                assert!(explained, "{what}: byte {at} is {got:#04x}, not {expected:#04x}");
            }
        }
    }
}

/// The guest of one disk.
pub struct Guest {
    twin: Mutex<Twin>,
    /// A claim went.
    unclaimed: Condvar,
    next: AtomicU64,
    /// Shared by operations; held alone for a quiet moment.
    pause: RwLock<()>,
    stop: AtomicBool,
    /// The daemon is about to be killed: a failed operation ends its thread, and is no finding.
    killing: AtomicBool,
    done: AtomicU64,
    /// A length that operations like to have.
    unit: u64,
    /// What is written are pieces of this.
    noise: Vec<u8>,
}

/// Tells threads to stop, however the scope ends: else a failure in it would wait for them for ever.
pub struct Stop<'a>(&'a Guest);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.stop.store(true, SeqCst);
    }
}

impl Guest {
    pub fn new(content: Vec<u8>, unit: u64) -> Guest {
        Guest {
            twin: Mutex::new(Twin { bytes: content, claims: BTreeMap::new(), recorded: None }),
            unclaimed: Condvar::new(),
            next: AtomicU64::new(0),
            pause: RwLock::new(()),
            stop: AtomicBool::new(false),
            killing: AtomicBool::new(false),
            done: AtomicU64::new(0),
            unit,
            noise: pattern(unit, NOISE_BYTES as usize),
        }
    }

    /// Operations that were done.
    pub fn done(&self) -> u64 {
        self.done.load(SeqCst)
    }

    /// The disk as it is now, while nothing is under way.
    pub fn content(&self) -> Vec<u8> {
        let twin = self.twin.lock().unwrap();
        assert!(twin.claims.is_empty(), "operations are under way");
        twin.bytes.clone()
    }

    /// Starts `count` threads on a live file.
    pub fn start<'scope>(
        &'scope self,
        scope: &'scope std::thread::Scope<'scope, '_>,
        live: &Path,
        count: u64,
        seed: u64,
    ) -> Stop<'scope> {
        self.stop.store(false, SeqCst);
        self.killing.store(false, SeqCst);
        for thread in 0..count {
            let file = OsFile::open(live, &OpenOptions { write: true, ..Default::default() }).unwrap();
            scope.spawn(move || {
                let mut random = Random::new(seed << 8 | thread);
                while !self.stop.load(SeqCst) {
                    if !self.step(&file, &mut random) {
                        break;
                    }
                }
            });
        }
        Stop(self)
    }

    /// One operation; false where the daemon is gone.
    fn step(&self, file: &OsFile, random: &mut Random) -> bool {
        let _running = self.pause.read().unwrap();
        if random.below(40) == 0 {
            return self.allowed(file.sync());
        }
        let size = self.twin.lock().unwrap().bytes.len() as u64;
        let len = match random.below(8) {
            0 | 1 => 1 + random.below(5000),
            2 | 3 => 512 * (1 + random.below(16)),
            4 | 5 => 4096,
            6 => self.unit * (1 + random.below(2)),
            _ => 1 + random.below(3 * self.unit),
        };
        let len = len.min(size / 3).min(LEN_MAX);
        let grain = random.one_of(&[1, 512, 4096, self.unit]);
        let start = random.below(size - len + 1) / grain * grain;
        let range = start..start + len;
        let kind = match random.below(10) {
            0 | 1 => Kind::Zero,
            2 | 3 => Kind::Discard,
            _ => {
                let from = random.below(NOISE_BYTES - len) as usize;
                Kind::Write(self.noise[from..from + len as usize].into())
            }
        };
        self.run(file, Change { range, kind })
    }

    /// Claims, does it on the disk, does it on the twin. A failed one keeps its claim: it may have been done in part.
    fn run(&self, file: &OsFile, change: Change) -> bool {
        let Some(id) = self.claim(&change) else { return false };
        let (start, len) = (change.range.start, change.range.end - change.range.start);
        let result = match &change.kind {
            Kind::Write(bytes) => file.write_at(bytes, start),
            Kind::Zero => file.write_zeroes(start, len),
            Kind::Discard => file.punch_hole(start, len),
        };
        if !self.allowed(result) {
            return false;
        }
        let mut twin = self.twin.lock().unwrap();
        let target = &mut twin.bytes[start as usize..][..len as usize];
        match &change.kind {
            Kind::Write(bytes) => target.copy_from_slice(bytes),
            Kind::Zero | Kind::Discard => target.fill(0),
        }
        twin.claims.remove(&id);
        self.unclaimed.notify_all();
        self.done.fetch_add(1, SeqCst);
        true
    }

    /// Waits until nobody else has any byte of the range; None where the guest stops meanwhile.
    fn claim(&self, change: &Change) -> Option<u64> {
        let id = self.next.fetch_add(1, SeqCst);
        let mut twin = self.twin.lock().unwrap();
        while twin.claims.values().any(|other| other.overlaps(&change.range)) {
            if self.stop.load(SeqCst) {
                return None;
            }
            twin = self.unclaimed.wait_timeout(twin, Duration::from_millis(20)).unwrap().0;
        }
        twin.claims.insert(id, change.clone());
        if let Some(recorded) = &mut twin.recorded {
            recorded.push(change.clone());
        }
        Some(id)
    }

    fn allowed(&self, result: fleecefs::error::Result<()>) -> bool {
        if let Err(e) = &result {
            assert!(self.killing.load(SeqCst), "an operation of the guest failed: {e}");
        }
        result.is_ok()
    }

    /// Runs `act`, which freezes the disk at some instant, and says what the disk may have held at it.
    pub fn around(&self, act: impl FnOnce()) -> Expected {
        let bytes = {
            let mut twin = self.twin.lock().unwrap();
            twin.recorded = Some(twin.claims.values().cloned().collect());
            twin.bytes.clone()
        };
        act();
        let under_way = self.twin.lock().unwrap().recorded.take().unwrap();
        Expected { bytes, under_way }
    }

    /// Runs `act` while nothing is under way.
    pub fn quiet(&self, act: impl FnOnce()) {
        let _alone = self.pause.write().unwrap();
        act();
    }

    /// The disk has another size now; it grew with zeros, or shrank in a quiet moment.
    pub fn resized(&self, size: u64) {
        self.twin.lock().unwrap().bytes.resize(size as usize, 0);
    }

    pub fn size(&self) -> u64 {
        self.twin.lock().unwrap().bytes.len() as u64
    }

    /// The daemon is about to be killed.
    pub fn expect_kill(&self) {
        self.killing.store(true, SeqCst);
    }

    /// After a kill, when the threads have ended: checks what the disk holds, and takes it as the truth from now on.
    #[track_caller]
    pub fn recover(&self, what: &str, got: Vec<u8>) {
        let mut twin = self.twin.lock().unwrap();
        let under_way = std::mem::take(&mut twin.claims).into_values().collect();
        let expected = Expected { bytes: std::mem::take(&mut twin.bytes), under_way };
        expected.check(what, &got);
        twin.bytes = got;
    }
}
