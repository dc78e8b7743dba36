//! Power loss at every moment, kills and failing calls, in random histories.
//!
//! After each call the disk is cut at every event of that call, in every combination of its unsynced sectors (or a
//! random choice, where there are many), and opened: directory and superblock must be those that counted, or those that
//! the call was to make, and every bitmap that the directory names must have the bits that were written for it.

use super::fake::Random;
use super::*;
use crate::storage::crash::CrashDisk;
use std::collections::BTreeMap;

/// What one call tries to change.
#[derive(Clone, Default)]
struct Attempt {
    directory: Option<Directory>,
    superblock: Option<Superblock>,
}

/// The bits of a bitmap: a crash leaves at least `low` and at most `high`.
#[derive(Debug, Clone, Default)]
struct Content {
    low: BTreeSet<u64>,
    high: BTreeSet<u64>,
    /// Written by this session: a sync that succeeds speaks for it.
    ours: bool,
}

struct History {
    disk: Disk,
    sidecar: Sidecar,
    random: Random,
    directory: Directory,
    superblock: Superblock,
    /// What a crash may leave instead.
    other_directories: Vec<Directory>,
    other_superblocks: Vec<Superblock>,
    /// By the UUID of the bitmap.
    content: BTreeMap<Uuid, Content>,
    next_number: u128,
    survivors_limit: u64,
}

impl History {
    fn new(seed: u64, survivors_limit: u64) -> Self {
        let (disk, sidecar) = fresh();
        History {
            superblock: sidecar.superblock(),
            directory: empty(),
            disk,
            sidecar,
            random: Random(seed),
            other_directories: vec![],
            other_superblocks: vec![],
            content: BTreeMap::new(),
            next_number: 1,
            survivors_limit,
        }
    }

    /// Makes one call and checks every crash in it and right after it.
    fn call<R>(&mut self, attempt: Attempt, run: impl FnOnce(&Sidecar) -> Result<R>) -> Result<R> {
        let from = self.disk.events();
        let result = run(&self.sidecar);
        self.other_directories.extend(attempt.directory.clone());
        self.other_superblocks.extend(attempt.superblock.clone());
        self.check(from);
        if result.is_ok() {
            if let Some(new) = attempt.directory {
                self.other_directories.push(std::mem::replace(&mut self.directory, new));
            }
            if let Some(new) = attempt.superblock {
                self.other_superblocks.push(std::mem::replace(&mut self.superblock, new));
            }
        }
        assert_eq!(self.sidecar.directory().as_ref(), &self.directory, "what is visible");
        assert_eq!(self.sidecar.superblock(), self.superblock);
        self.settle();
        self.check(self.disk.events());
        result
    }

    /// Where the sidecar says that nothing is in doubt, only what it shows may be found.
    fn settle(&mut self) {
        let writer = self.sidecar.writer.lock();
        if !writer.directories.failed() && !writer.directories.unconfirmed() {
            self.other_directories.clear();
        }
        if !writer.superblocks.failed() && !writer.superblocks.unconfirmed() {
            self.other_superblocks.clear();
        }
    }

    /// Cuts the power at every event since `from`.
    fn check(&mut self, from: usize) {
        for cut in from..=self.disk.events() {
            for survivor in self.disk.survivors(cut, self.survivors_limit, &mut self.random) {
                self.check_found(&Sidecar::open(survivor.shared()).expect("a crash never makes the file unusable"));
            }
        }
    }

    fn check_found(&self, opened: &Sidecar) {
        let directory = opened.directory();
        let known = self.other_directories.contains(&directory) || *directory == self.directory;
        assert!(known, "{directory:?}\nis neither\n{:?}\nnor of\n{:?}", self.directory, self.other_directories);
        let superblock = opened.superblock();
        let known = self.other_superblocks.contains(&superblock) || superblock == self.superblock;
        assert!(known, "{superblock:?}\nis neither\n{:?}\nnor of\n{:?}", self.superblock, self.other_superblocks);
        for bitmap in directory.all_bitmaps() {
            let found = bits_of(opened, bitmap);
            let content = &self.content[&bitmap.uuid];
            assert!(content.low.is_subset(&found) && found.is_subset(&content.high), "{content:?} {found:?}");
        }
    }

    /// A success that speaks for all bits written before; a commit's does not for bitmaps that record on, where a failed
    /// sync may have lost some.
    fn bits_are_durable(&mut self) {
        let writer = self.sidecar.writer.lock();
        for bitmap in self.directory.all_bitmaps() {
            let lost = bitmap.crc.is_none() && bitmap.area.is_some_and(|area| writer.medium.is_lost(&area));
            if let Some(content) = self.content.get_mut(&bitmap.uuid).filter(|content| content.ours && !lost) {
                content.low = content.high.clone();
            }
        }
    }

    fn commit(&mut self, next: Directory) -> bool {
        let attempt = Attempt { directory: Some(next.clone()), ..Attempt::default() };
        let done = self.call(attempt, |sidecar| {
            sidecar.commit(|directory| {
                *directory = next;
                Ok(())
            })
        });
        if done.is_ok() {
            self.bits_are_durable();
        }
        done.is_ok()
    }

    /// A new bitmap, with its checksum (sealed) or without (recording).
    fn add(&mut self) {
        let pages = 1 + self.random.below(3);
        let Ok(area) = self.call(Attempt::default(), |sidecar| sidecar.allocate(pages * PAGE)) else { return };
        let set: BTreeSet<u64> = (0..3).map(|_| self.random.below(area.len * 8)).collect();
        let bits = bits(&area, &Vec::from_iter(set.clone()));
        let sealed = self.random.below(2) == 0;
        let uuid = Uuid::from_u128(self.next_number);
        self.next_number += 1;
        let written = self.call(Attempt::default(), |sidecar| sidecar.write_bits(&area, &bits));
        let named = written.is_ok_and(|crc| {
            let content = Content { low: set.clone(), high: set, ours: true };
            self.content.insert(uuid, content);
            let bitmap = entry(uuid.as_u128(), area, sealed.then_some(crc));
            let mut next = self.directory.clone();
            next.bitmaps.push(user(bitmap));
            self.commit(next)
        });
        if !named {
            self.sidecar.abandon(&area);
        }
    }

    fn remove(&mut self) {
        let mut next = self.directory.clone();
        if !next.bitmaps.is_empty() {
            let index = self.random.below(next.bitmaps.len() as u64) as usize;
            next.bitmaps.remove(index);
            self.commit(next);
        }
    }

    fn change_consumers(&mut self) {
        let mut next = self.directory.clone();
        let name = "n".repeat(1 + self.random.below(1500) as usize);
        rename(&name)(&mut next).unwrap();
        next.next_layer += 1;
        self.commit(next);
    }

    /// More bits in a recording bitmap, in place.
    fn grow(&mut self) {
        let recording: Vec<BitmapEntry> =
            self.directory.all_bitmaps().filter(|bitmap| bitmap.crc.is_none()).cloned().collect();
        let Some(bitmap) = recording.last() else { return };
        let area = bitmap.area.unwrap();
        let more = [(); 4].map(|()| self.random.below(area.len * 8));
        let content = self.content.get_mut(&bitmap.uuid).unwrap();
        content.high.extend(more);
        content.ours = false;
        let bits = bits(&area, &Vec::from_iter(content.high.clone()));
        if self.call(Attempt::default(), |sidecar| sidecar.write_bits(&area, &bits)).is_ok() {
            self.content.get_mut(&bitmap.uuid).unwrap().ours = true;
        }
        if self.random.below(2) == 0 && self.call(Attempt::default(), Sidecar::sync).is_ok() {
            self.bits_are_durable();
            self.check(self.disk.events());
        }
    }

    fn change_superblock(&mut self) {
        let number = self.random.below(1 << 20);
        let open = State::Open { nonce: Uuid::from_u128(number.into()), boot_id: number.to_string() };
        let next = Superblock { state: open, heartbeat_ns: number as i64, ..self.superblock.clone() };
        let attempt = Attempt { superblock: Some(next.clone()), ..Attempt::default() };
        if self.call(attempt, |sidecar| sidecar.set_superblock(next)).is_ok() {
            self.bits_are_durable();
        }
    }

    /// The process dies; the next one finds what the page cache holds, which is not durable yet.
    fn kill(&mut self) {
        self.disk.heal();
        self.sidecar = Sidecar::open(self.disk.shared()).unwrap();
        self.check_found(&self.sidecar);
        let directory = self.sidecar.directory().as_ref().clone();
        self.other_directories.push(std::mem::replace(&mut self.directory, directory));
        let superblock = self.sidecar.superblock();
        self.other_superblocks.push(std::mem::replace(&mut self.superblock, superblock));
        self.content.values_mut().for_each(|content| content.ours = false);
        self.check(self.disk.events());
    }

    /// The power fails; the next process finds one of the disks that may be left.
    fn lose_power(&mut self) {
        let mut survivors = self.disk.survivors(self.disk.events(), 8, &mut self.random);
        let index = self.random.below(survivors.len() as u64) as usize;
        self.disk = survivors.swap_remove(index);
        self.sidecar = Sidecar::open(self.disk.shared()).unwrap();
        self.check_found(&self.sidecar);
        self.directory = self.sidecar.directory().as_ref().clone();
        self.superblock = self.sidecar.superblock();
        (self.other_directories, self.other_superblocks) = (vec![], vec![]);
        for bitmap in self.directory.all_bitmaps() {
            let found = bits_of(&self.sidecar, bitmap);
            let content = Content { low: found.clone(), high: found, ours: true };
            self.content.insert(bitmap.uuid, content);
        }
    }

    fn step(&mut self, with_faults: bool) {
        if with_faults {
            match self.random.below(8) {
                0 => self.disk.fail_write_in(1 + self.random.below(5) as u32),
                1 => self.disk.fail_sync_in(1 + self.random.below(3) as u32),
                2 => {
                    self.disk.fail_write_in(1 + self.random.below(2) as u32);
                    self.disk.fail_sync_in(1);
                }
                3 | 4 => {
                    self.disk.heal();
                }
                _ => {}
            }
        }
        match self.random.below(10) {
            0..3 => self.add(),
            3 | 4 => self.remove(),
            5 => self.change_consumers(),
            6 => self.grow(),
            7 => self.change_superblock(),
            8 => self.kill(),
            _ if self.random.below(3) == 0 => self.lose_power(),
            _ => self.grow(),
        }
    }
}

fn bits_of(opened: &Sidecar, bitmap: &BitmapEntry) -> BTreeSet<u64> {
    let area = bitmap.area.expect("no area is damaged");
    let bits = opened.read_bits(&area, area.len * 8, bitmap.crc).expect("the checksum matches");
    let mut at = 0;
    std::iter::from_fn(|| {
        let found = bits.next_set(at, bits.len())?;
        at = found + 1;
        Some(found)
    })
    .collect()
}

#[test]
fn every_power_loss_leaves_the_old_or_the_new_and_bits_as_written() {
    for seed in 0..25 {
        let mut history = History::new(seed, 12);
        (0..25).for_each(|_| history.step(false));
    }
}

#[test]
fn so_it_is_where_calls_fail() {
    for seed in 0..40 {
        let mut history = History::new(1000 + seed, 8);
        (0..25).for_each(|_| history.step(true));
    }
}

#[test]
fn one_commit_and_one_superblock_in_every_combination_of_sectors() {
    for seed in 0..3 {
        let mut history = History::new(seed, 5000);
        history.change_consumers();
        history.change_superblock();
        history.add();
        history.change_superblock();
        history.remove();
    }
}

#[test]
fn a_crash_while_it_is_made_leaves_the_old_the_new_or_none() {
    let (disk, sidecar) = fresh();
    sidecar.commit(rename("older")).unwrap();
    sidecar.commit(rename("old")).unwrap();
    let old = sidecar.directory();
    let from = disk.events();
    let new = Directory { next_layer: 5, ..empty() };
    Sidecar::create(disk.shared(), new.clone()).unwrap();
    let mut random = Random(3);
    for cut in from..=disk.events() {
        for survivor in disk.survivors(cut, 2000, &mut random) {
            match Sidecar::open(survivor.shared()) {
                Ok(opened) if cut == disk.events() => assert_eq!(*opened.directory(), new),
                Ok(opened) => assert!([&new, old.as_ref()].contains(&opened.directory().as_ref()), "cut {cut}"),
                Err(e) => assert!(e.errno() == errno::EINVAL && cut < disk.events(), "cut {cut}: {e}"),
            }
        }
    }
}

/// The same on the crash disk of the storage layer, which takes lengths back too.
#[test]
fn a_length_that_was_not_synced_loses_nothing_that_counts() {
    let crash = CrashDisk::new();
    let file = crash.open("dirty.log").unwrap();
    let sidecar = Sidecar::create(file.shared(), empty()).unwrap();
    let area = sidecar.allocate(PAGE).unwrap();
    let crc = sidecar.write_bits(&area, &bits(&area, &[9])).unwrap();
    let name = |directory: &mut Directory| {
        directory.bitmaps.push(user(entry(1, area, Some(crc))));
        Ok(())
    };
    sidecar.commit(name).unwrap();
    let unnamed = sidecar.allocate(PAGE).unwrap();
    sidecar.write_bits(&unnamed, &bits(&unnamed, &[1])).unwrap();
    for seed in 0..50 {
        let survivor = crash.survivors(seed).open("dirty.log").unwrap();
        let opened = Sidecar::open(survivor.shared()).unwrap();
        assert_eq!(bits_of(&opened, &opened.directory().bitmaps[0].bitmap), BTreeSet::from([9]));
    }
}
