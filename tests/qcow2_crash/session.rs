//! A guest that does this and that, watched by an oracle.

use crate::driver::{self, Files};
use crate::images::{GRANULE, Prepared, RECORDING, SECTOR, stamps};
use crate::oracle::Oracle;
use crate::recorder::{Event, Log};
use fleecefs::error::errno;
use fleecefs::image::Image;
use fleecefs::image::persistent::{Change, NewBitmap, Trust};
use fleecefs::image::qcow2::Qcow2Image;
use fleecefs::image::qcow2::check::check;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};
use uuid::Uuid;

/// A small generator: equal seeds, equal sessions.
#[derive(Debug, Clone)]
pub struct Dice(u64);

impl Dice {
    pub fn new(seed: u64) -> Dice {
        Dice(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    pub fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) % sides.max(1)
    }
}

/// What a guest does.
#[derive(Debug, Clone)]
pub enum Op {
    Write(Range<u64>),
    /// The clusters that the range touches, compressed.
    Pack(Range<u64>),
    Zero(Range<u64>),
    Discard(Range<u64>),
    Read(Range<u64>),
    Flush,
    Resize(u64),
    Reopen,
}

/// A session as it went.
#[derive(Debug)]
pub struct Recording {
    pub events: Vec<Event>,
    pub oracle: Oracle,
    /// What was done, with the instants between which it was done.
    pub steps: Vec<(usize, usize, String)>,
}

/// The guest.
#[derive(Clone)]
struct Player<'a> {
    prepared: &'a Prepared,
    /// What is below `files`.
    medium: &'a Files,
    files: Files,
    log: Log,
    image: Arc<Qcow2Image>,
    oracle: Arc<Mutex<Oracle>>,
    dice: Dice,
    /// Number of the last write.
    seq: u64,
    /// Places that are used again and again.
    hot: Vec<u64>,
    tiny_cache: bool,
    steps: Vec<(usize, usize, String)>,
    /// Bits of the bitmap that records, where they are right.
    recorded: Option<Vec<u64>>,
    /// Other bitmaps whose bits are right.
    kept: Vec<String>,
    /// Which of several guests it is; each has pieces of its own.
    share: Option<u64>,
}

/// Guests at once, and the sectors of a piece: fewer than a cluster's.
const GUESTS: u64 = 2;
const PIECE_SECTORS: u64 = 3;

/// Leaves a mark, as whoever keeps bitmaps does.
const MARK: Uuid = Uuid::from_u128(0x5bd1_e995);

/// Does these things to the image in `medium`, and closes it. `oracle` knows what the disk holds; its instants begin
/// at 0.
pub fn play_script(prepared: &Prepared, medium: &Files, oracle: Oracle, script: &[Op]) -> Recording {
    let mut player = Player::new(prepared, medium, oracle, 1);
    player.begin();
    script.iter().for_each(|op| player.act(op.clone()));
    player.close();
    player.recording(Vec::new())
}

/// The same with `count` things chosen by a seed.
pub fn play(prepared: &Prepared, medium: &Files, oracle: Oracle, seed: u64, count: usize) -> Recording {
    let mut player = Player::new(prepared, medium, oracle, seed);
    player.begin();
    for _ in 0..count {
        player.step();
    }
    player.close();
    player.recording(Vec::new())
}

/// The same with several guests at once, each with sectors of its own, in the same clusters.
pub fn play_together(prepared: &Prepared, medium: &Files, oracle: Oracle, seed: u64, count: usize) -> Recording {
    let mut first = Player::new(prepared, medium, oracle, seed);
    first.share = Some(0);
    let others = (1..GUESTS).map(|share| Player {
        dice: Dice::new(seed + share),
        seq: first.seq + (share << 16),
        share: Some(share),
        ..first.clone()
    });
    let mut others: Vec<Player<'_>> = others.collect();
    std::thread::scope(|scope| {
        let all = others.iter_mut().chain([&mut first]);
        all.for_each(|player| {
            scope.spawn(move || (0..count).for_each(|_| player.step()));
        });
    });
    first.close();
    first.recording(others.into_iter().flat_map(|player| player.steps).collect())
}

impl<'a> Player<'a> {
    fn new(prepared: &'a Prepared, medium: &'a Files, oracle: Oracle, seed: u64) -> Player<'a> {
        let log = Log::default();
        let files = log.watch(medium, prepared.recipe.direct);
        let mut dice = Dice::new(seed);
        let tiny_cache = dice.roll(3) == 0;
        Player {
            prepared,
            medium,
            image: Arc::new(driver::read_write(&files, prepared, tiny_cache).unwrap()),
            files,
            log,
            hot: (0..6).map(|_| dice.roll(oracle.size())).collect(),
            oracle: Arc::new(Mutex::new(oracle)),
            dice,
            seq: seed << 20,
            tiny_cache,
            steps: Vec::new(),
            recorded: None,
            kept: Vec::new(),
            share: None,
        }
    }

    fn recording(self, others: Vec<(usize, usize, String)>) -> Recording {
        let mut steps = self.steps;
        steps.extend(others);
        steps.sort();
        let oracle = self.oracle.lock().unwrap().clone();
        Recording { events: self.log.events(), oracle, steps }
    }
}

impl Player<'_> {
    fn step(&mut self) {
        let alone = self.share.is_none();
        let packs = alone && self.prepared.recipe.packs;
        let op = match self.dice.roll(100) {
            0..30 if packs => Op::Pack(self.range()),
            0..52 => Op::Write(self.range()),
            52..62 => Op::Zero(self.range()),
            62..74 => Op::Discard(self.range()),
            74..84 => Op::Flush,
            // What becomes of bitmaps then is the matter of who keeps them.
            92..98 if alone && !self.prepared.recipe.bitmaps => Op::Resize(self.new_size()),
            92.. if alone => Op::Reopen,
            _ => Op::Read(self.range()),
        };
        self.act(op);
    }

    fn act(&mut self, op: Op) {
        match op {
            Op::Write(range) => self.write(range),
            Op::Pack(range) => self.pack(range),
            Op::Zero(range) => self.zero(range, false),
            Op::Discard(range) => self.zero(range, true),
            Op::Read(range) => self.read(range),
            Op::Flush => self.flush(),
            Op::Resize(size) => self.resize(size),
            Op::Reopen => self.reopen(),
        }
    }

    /// Before the first change: what bitmaps say of this session is not in the file from now on.
    fn begin(&mut self) {
        let Some(bitmaps) = self.image.persistent() else { return };
        let good: Vec<_> = bitmaps.list().unwrap().into_iter().filter(|bitmap| bitmap.trust == Trust::Good).collect();
        (self.recorded, self.kept) = (None, Vec::new());
        for bitmap in good {
            if bitmap.name == RECORDING {
                self.recorded = Some(bitmaps.load(RECORDING).unwrap());
            } else {
                self.kept.push(bitmap.name);
            }
        }
        bitmaps.begin(MARK).unwrap();
    }

    /// After the last change: what was recorded is stored.
    fn finish(&self) {
        let Some(bitmaps) = self.image.persistent() else { return };
        let mut changes: Vec<Change<'_>> = self.kept.iter().map(|name| Change::Trust(name)).collect();
        if let Some(words) = &self.recorded {
            let granularity_bits = GRANULE.trailing_zeros() as u8;
            changes.push(Change::Store(NewBitmap { name: RECORDING, granularity_bits, auto: true, words }));
        }
        bitmaps.finish(&changes, MARK).unwrap();
    }

    /// Before a change of a range.
    fn record(&mut self, range: &Range<u64>) {
        for granule in range.start / GRANULE..range.end.div_ceil(GRANULE) {
            if let Some(words) = &mut self.recorded {
                words[(granule / 64) as usize] |= 1 << (granule % 64);
            }
        }
    }

    fn note(&mut self, begun: usize, what: String) {
        self.steps.push((begun, self.log.now(), what));
    }

    /// Where the next operation goes: whole clusters, parts of one, odd bytes, across borders.
    fn range(&mut self) -> Range<u64> {
        let size = self.oracle().size();
        let cluster = self.prepared.cluster_size;
        let sector = SECTOR as u64;
        let hot = self.dice.roll(self.hot.len() as u64) as usize;
        let place = match self.dice.roll(10) {
            0..7 => self.hot[hot],
            7..9 => self.dice.roll(size),
            _ => size.saturating_sub(self.dice.roll(2 * cluster)),
        };
        if let Some(share) = self.share {
            return self.own_range(share, place, size);
        }
        let start = place / cluster * cluster;
        let range = match self.dice.roll(8) {
            0..2 => start..start + cluster * (1 + self.dice.roll(3)),
            2..5 => {
                let from = start + self.dice.roll(cluster / sector) * sector;
                from..from + (1 + self.dice.roll((cluster / sector).min(8))) * sector
            }
            5 => {
                let unit = (cluster / 32).max(sector);
                let from = start + self.dice.roll(cluster / unit) * unit;
                from..from + (1 + self.dice.roll(4)) * unit
            }
            6 => place..place + 1 + self.dice.roll(3 * sector),
            _ => {
                let from = (start + cluster).saturating_sub(sector * (1 + self.dice.roll(3)));
                from..from + (2 + self.dice.roll(8)) * sector
            }
        };
        range.start.min(size - sector)..range.end.min(size)
    }

    /// Sectors of one of its pieces.
    fn own_range(&mut self, share: u64, place: u64, size: u64) -> Range<u64> {
        let sector = SECTOR as u64;
        let turn = GUESTS * PIECE_SECTORS;
        let near = (place / sector + self.dice.roll(2 * self.prepared.cluster_size / sector)).min(size / sector - turn);
        let start = near / turn * turn + share * PIECE_SECTORS;
        let first = start + self.dice.roll(PIECE_SECTORS);
        let end = first + 1 + self.dice.roll(start + PIECE_SECTORS - first);
        first * sector..end * sector
    }

    fn oracle(&self) -> MutexGuard<'_, Oracle> {
        self.oracle.lock().unwrap()
    }

    fn write(&mut self, range: Range<u64>) {
        self.seq += 1;
        let bytes = stamps(range.clone(), self.seq);
        self.record(&range);
        let begun = self.log.now();
        self.oracle().begin_write(begun, range.start, &bytes);
        self.image.write_at(&bytes, range.start).unwrap();
        self.oracle().end_write(self.log.now(), range.clone());
        self.note(begun, format!("write {range:?} with number {}", self.seq));
    }

    fn pack(&mut self, range: Range<u64>) {
        self.seq += 1;
        let cluster = self.prepared.cluster_size;
        let end = range.end.next_multiple_of(cluster).min(self.oracle().size());
        let range = range.start / cluster * cluster..end;
        let bytes = stamps(range.clone(), self.seq);
        self.record(&range);
        let begun = self.log.now();
        self.oracle().begin_write(begun, range.start, &bytes);
        self.image.write_compressed(&bytes, range.start).unwrap();
        self.oracle().end_write(self.log.now(), range.clone());
        self.note(begun, format!("pack {range:?} with number {}", self.seq));
    }

    fn zero(&mut self, range: Range<u64>, discard: bool) {
        let len = range.end - range.start;
        self.record(&range);
        let begun = self.log.now();
        self.oracle().begin_write(begun, range.start, &vec![0; len as usize]);
        self.image.write_zeroes(range.start, len, discard).unwrap();
        self.oracle().end_write(self.log.now(), range.clone());
        self.note(begun, format!("{} {range:?}", if discard { "discard" } else { "zero" }));
    }

    fn flush(&mut self) {
        let begun = self.log.now();
        self.image.flush().unwrap();
        self.oracle().flushed(begun, self.log.now());
        self.note(begun, "flush".into());
    }

    fn read(&mut self, range: Range<u64>) {
        let mut bytes = vec![0xEE; (range.end - range.start) as usize];
        self.image.read_at(&mut bytes, range.start).unwrap();
        let expected = self.oracle().bytes(range.clone());
        let differs = (bytes != expected).then(|| (0..bytes.len()).find(|at| bytes[*at] != expected[*at]));
        if let Some(at) = differs.flatten() {
            let from = at / SECTOR * SECTOR;
            let piece = |all: &[u8]| all[from..all.len().min(from + 24)].to_vec();
            let (found, wanted) = (piece(&bytes), piece(&expected));
            panic!(
                "read {range:?}: byte {} is wrong: {found:?}, not {wanted:?}\n{}",
                range.start + at as u64,
                self.story()
            );
        }
    }

    fn new_size(&mut self) -> u64 {
        let old = self.oracle().size();
        let most = self.oracle().most();
        let sector = SECTOR as u64;
        let near = old.saturating_sub(self.prepared.cluster_size * 2) + self.dice.roll(self.prepared.cluster_size * 5);
        let wanted = match self.dice.roll(4) {
            0 => near,
            // Where there are data.
            1..3 => self.hot[self.dice.roll(6) as usize] + self.dice.roll(self.prepared.cluster_size),
            _ => most / 3 + self.dice.roll(most / 3 * 2),
        };
        (wanted / sector * sector).clamp(16 * sector, most)
    }

    fn resize(&mut self, size: u64) {
        let old = self.oracle().size();
        let begun = self.log.now();
        let before = self.oracle().clone();
        self.oracle().begin_resize(begun, size);
        match self.image.resize(size) {
            Ok(()) => self.oracle().end_resize(self.log.now()),
            Err(e) if e.errno() == errno::EOPNOTSUPP => *self.oracle() = before,
            Err(e) => panic!("resize from {old} to {size}: {e}\n{}", self.story()),
        }
        assert_eq!(self.image.size(), self.oracle().size());
        self.note(begun, format!("resize from {old} to {size}"));
    }

    fn close(&mut self) {
        let begun = self.log.now();
        self.image.flush().unwrap();
        self.finish();
        self.image.close().unwrap();
        self.oracle().flushed(begun, self.log.now());
        self.note(begun, "close".into());
        let report = check(&*self.medium.image).unwrap();
        assert!(report.is_clean() && !report.dirty, "after a close: {report:?}\n{}", self.story());
    }

    fn reopen(&mut self) {
        self.close();
        self.image = Arc::new(driver::read_write(&self.files, self.prepared, self.tiny_cache).unwrap());
        self.begin();
    }

    fn story(&self) -> String {
        story(self.prepared, &self.steps, usize::MAX)
    }
}

/// What was done before an instant, for messages.
pub fn story(prepared: &Prepared, steps: &[(usize, usize, String)], instant: usize) -> String {
    let before: Vec<_> = steps.iter().filter(|(begun, ..)| *begun < instant).collect();
    let lines = before.iter().skip(before.len().saturating_sub(25));
    let lines: Vec<String> = lines.map(|(begun, done, what)| format!("  {begun}..{done} {what}")).collect();
    format!("{:?}\n{}", prepared.recipe, lines.join("\n"))
}
