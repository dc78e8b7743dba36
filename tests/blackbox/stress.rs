//! The guest under load, with a journal of what it wrote.
//!
//! Each 4 KiB block that a writer writes carries its writer, its place and the writer's sequence number, so that a
//! frozen view tells by itself which writes it holds. Against the journal this decides:
//! - each view holds, of every writer, exactly the writes up to one point (a *prefix*);
//! - the prefixes of all writers, on all disks, are those of one instant: no write that the view lacks had ended
//!   before one that it holds began;
//! - the map between two views covers every granule that a write between them touched, and no other.

use crate::harness::*;
use crate::qcow2_cells::qemu_bytes;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

const BLOCK: u64 = 4096;
const DISK: u64 = 64 << 20;
/// Blocks among which all writers write for a while, so that some granules stay clean between two snapshots.
const WINDOW_BLOCKS: u64 = 2048;

/// One write: the block, and the ticks at which it began and ended.
#[derive(Debug, Clone, Copy)]
struct Entry {
    block: u64,
    began: u64,
    ended: u64,
}

/// What one writer did; entry `n` has sequence number `n + 1`. A write that has not ended has `ended` at `u64::MAX`.
#[derive(Default)]
struct Journal(Mutex<Vec<Entry>>);

impl Journal {
    fn entries(&self) -> Vec<Entry> {
        self.0.lock().unwrap().clone()
    }
}

struct Load {
    disks: Vec<String>,
    writers: usize,
    /// Tells the writes of one load from those of another on the same image.
    salt: u64,
    clock: AtomicU64,
    window: AtomicU64,
    stop: AtomicBool,
    /// The daemon is about to be killed: a failed write ends its writer, and is no finding.
    killing: AtomicBool,
    /// By disk, then by writer.
    journals: Vec<Vec<Journal>>,
}

impl Load {
    fn new(disks: &[&str], writers: usize, salt: u64) -> Load {
        Load {
            disks: disks.iter().map(|d| d.to_string()).collect(),
            writers,
            salt,
            clock: AtomicU64::new(1),
            window: AtomicU64::new(0),
            stop: AtomicBool::new(false),
            killing: AtomicBool::new(false),
            journals: disks.iter().map(|_| (0..writers).map(|_| Journal::default()).collect()).collect(),
        }
    }

    /// One block of content: writer, block and sequence number in front, bytes that follow from them behind.
    fn content(&self, writer: usize, block: u64, sequence: u64) -> Vec<u8> {
        let mut bytes = pattern(sequence ^ (block << 40) ^ ((writer as u64) << 32) ^ (self.salt << 20), BLOCK as usize);
        bytes[..8].copy_from_slice(&sequence.to_le_bytes());
        bytes[8..16].copy_from_slice(&block.to_le_bytes());
        bytes[16..24].copy_from_slice(&(writer as u64).to_le_bytes());
        bytes
    }

    /// Writes until told to stop or until the daemon is gone. Writers own disjoint blocks.
    fn write(&self, guest: &File, disk: usize, writer: usize) {
        let journal = &self.journals[disk][writer];
        let mut random =
            (self.salt * 1_000_000 + disk as u64 * 1000 + writer as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        for sequence in 1_u64.. {
            if self.stop.load(SeqCst) {
                return;
            }
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            let slots = WINDOW_BLOCKS / self.writers as u64;
            let inside = (random >> 20) % slots * self.writers as u64 + writer as u64;
            let block = (self.window.load(SeqCst) + inside) % (DISK / BLOCK);
            let content = self.content(writer, block, sequence);
            let began = self.clock.fetch_add(1, SeqCst);
            journal.0.lock().unwrap().push(Entry { block, began, ended: u64::MAX });
            if guest.write_all_at(&content, block * BLOCK).is_err() {
                assert!(self.killing.load(SeqCst), "a guest write failed");
                return;
            }
            let ended = self.clock.fetch_add(1, SeqCst);
            journal.0.lock().unwrap().last_mut().unwrap().ended = ended;
        }
    }

    fn start<'scope>(&'scope self, scope: &'scope std::thread::Scope<'scope, '_>, guests: &'scope [File]) {
        for (disk, guest) in guests.iter().enumerate() {
            for writer in 0..self.writers {
                scope.spawn(move || self.write(guest, disk, writer));
            }
        }
    }

    /// Moves the window to another part of the disk.
    fn turn(&self, round: u64) {
        self.window.store(round * 7 % 8 * WINDOW_BLOCKS, SeqCst);
    }

    /// Reads a frozen disk and gives how many writes of each writer it holds, after checking that it holds exactly
    /// those and nothing else.
    #[track_caller]
    fn check_view(&self, name: &str, disk: usize, view: &[u8], initial: &[u8]) -> Vec<u64> {
        let journals: Vec<_> = self.journals[disk].iter().map(Journal::entries).collect();
        let mut prefixes = vec![0; self.writers];
        for block in 0..DISK / BLOCK {
            let bytes = &view[(block * BLOCK) as usize..][..BLOCK as usize];
            if bytes == &initial[(block * BLOCK) as usize..][..BLOCK as usize] {
                continue;
            }
            let number = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
            let (sequence, place, writer) = (number(0), number(8), number(16) as usize);
            assert!(place == block && writer < self.writers, "{name}: foreign bytes in block {block}");
            assert!(bytes == self.content(writer, block, sequence), "{name}: torn block {block}");
            prefixes[writer] = prefixes[writer].max(sequence);
        }
        let mut last: BTreeMap<u64, (usize, u64)> = BTreeMap::new();
        for (writer, journal) in journals.iter().enumerate() {
            let held = &journal[..prefixes[writer] as usize];
            last.extend(held.iter().zip(1..).map(|(entry, sequence)| (entry.block, (writer, sequence))));
        }
        for block in 0..DISK / BLOCK {
            let bytes = &view[(block * BLOCK) as usize..][..BLOCK as usize];
            match last.get(&block) {
                Some((writer, sequence)) => {
                    let got = u64::from_le_bytes(bytes[..8].try_into().unwrap());
                    assert!(got == *sequence, "{name}: block {block} of writer {writer} holds {got}, not {sequence}");
                }
                None => {
                    assert!(bytes == &initial[(block * BLOCK) as usize..][..BLOCK as usize], "{name}: block {block}")
                }
            }
        }
        prefixes
    }

    /// No write that is missing had ended before one that is there began, over all disks and writers.
    #[track_caller]
    fn check_instant(&self, name: &str, prefixes: &[Vec<u64>]) {
        let (mut newest_held, mut oldest_missing) = (0, u64::MAX);
        for (journals, prefixes) in self.journals.iter().zip(prefixes) {
            for (journal, prefix) in journals.iter().zip(prefixes) {
                let entries = journal.entries();
                newest_held = newest_held.max((*prefix as usize).checked_sub(1).map_or(0, |n| entries[n].began));
                oldest_missing = oldest_missing.min(entries.get(*prefix as usize).map_or(u64::MAX, |e| e.ended));
            }
        }
        assert!(
            oldest_missing > newest_held,
            "{name}: a write that ended at {oldest_missing} is missing, one that began at {newest_held} is there"
        );
    }

    /// Granules that writes between two prefixes touched.
    fn touched(&self, disk: usize, from: &[u64], to: &[u64]) -> BTreeSet<u64> {
        let mut granules = BTreeSet::new();
        for (journal, (from, to)) in self.journals[disk].iter().zip(from.iter().zip(to)) {
            let entries = journal.entries();
            let between = &entries[*from as usize..*to as usize];
            granules.extend(between.iter().map(|e| e.block * BLOCK / GRANULE));
        }
        granules
    }
}

/// A snapshot that was checked when it was taken.
struct Taken {
    name: String,
    /// By disk, then by writer.
    prefixes: Vec<Vec<u64>>,
}

#[track_caller]
fn check_snapshot(load: &Load, mount: &Mount, name: &str, initial: &[Vec<u8>]) -> Vec<Vec<u64>> {
    let check = |(disk, disk_name): (usize, &String)| {
        let view = fs::read(mount.view(name, disk_name)).unwrap();
        load.check_view(name, disk, &view, &initial[disk])
    };
    let prefixes: Vec<_> = load.disks.iter().enumerate().map(check).collect();
    load.check_instant(name, &prefixes);
    prefixes
}

/// Every pair (older, `taken`): the map equals what the journal says.
#[track_caller]
fn check_maps(load: &Load, mount: &Mount, taken: &Taken, older: &[Taken]) {
    for base in older {
        for (disk, disk_name) in load.disks.iter().enumerate() {
            let map: BTreeSet<_> = mount.map_since(&taken.name, disk_name, &base.name).granules().into_iter().collect();
            let wrote = load.touched(disk, &base.prefixes[disk], &taken.prefixes[disk]);
            let missing: Vec<_> = wrote.difference(&map).collect();
            assert!(missing.is_empty(), "{}..{} of {disk_name}: the map lacks {missing:?}", base.name, taken.name);
            let extra: Vec<_> = map.difference(&wrote).collect();
            assert!(extra.is_empty(), "{}..{} of {disk_name}: nobody wrote to {extra:?}", base.name, taken.name);
        }
    }
}

#[derive(Debug, Clone, Copy)]
enum Images {
    Raw,
    /// `vda` is an overlay, `vdb` has subclusters.
    Qcow2,
}

impl Images {
    fn make(self, rig: &Rig) -> [PathBuf; 2] {
        let raw = ["vda", "vdb"].map(|disk| rig.image_of(disk, DISK));
        if let Images::Raw = self {
            return raw;
        }
        let paths = ["vda", "vdb"].map(|disk| rig.path(&format!("{disk}.qcow2")));
        ok(tool("qemu-img").args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"]).args([&raw[0], &paths[0]]));
        let options = ["-f", "raw", "-O", "qcow2", "-o", "extended_l2=on"];
        ok(tool("qemu-img").arg("convert").args(options).args([&raw[1], &paths[1]]));
        paths
    }

    fn content(self, path: &Path) -> Vec<u8> {
        match self {
            Images::Raw => fs::read(path).unwrap(),
            Images::Qcow2 => qemu_bytes(path, None),
        }
    }
}

#[test]
fn views_are_prefixes_of_one_instant_and_maps_are_exact_under_load() {
    requires!();
    views_under_load(Images::Raw, sized(10, 60));
}

#[test]
fn views_of_qcow2_disks_are_prefixes_of_one_instant_and_maps_are_exact_under_load() {
    requires!("qemu-img");
    views_under_load(Images::Qcow2, sized(5, 60));
}

fn views_under_load(images: Images, seconds: u64) {
    let rig = Rig::new();
    let load = Load::new(&["vda", "vdb"], 3, 0);
    let paths = images.make(&rig);
    let initial = paths.each_ref().map(|path| images.content(path));
    let mount = rig.mount(&paths);
    let guests: Vec<_> = load.disks.iter().map(|disk| mount.guest(disk)).collect();
    let until = Instant::now() + Duration::from_secs(seconds);
    let mut open: Vec<Taken> = Vec::new();
    std::thread::scope(|scope| {
        load.start(scope, &guests);
        let stop = StopAtEnd(&load.stop);
        let mut round = 0;
        while Instant::now() < until || open.len() < 3 {
            load.turn(round);
            let name = format!("s{round}");
            mount.snap(&name);
            let taken = Taken { prefixes: check_snapshot(&load, &mount, &name, &initial), name };
            check_maps(&load, &mount, &taken, &open);
            open.push(taken);
            if open.len() == 8 {
                // An old one, the newest and those between go in turn, so that older views look through what is gone.
                let gone = open.remove([0, 7, 3, 5, 1][round as usize % 5]);
                mount.done("snapshot cancel", args![&gone.name]);
            }
            round += 1;
        }
        drop(stop);
        for taken in &open {
            assert!(check_snapshot(&load, &mount, &taken.name, &initial) == taken.prefixes, "{} changed", taken.name);
        }
        say(&format!("stress: {round} snapshots, {} guest writes", load.clock.load(SeqCst) / 2));
    });
}

#[test]
fn a_kill_under_load_loses_no_view_no_completed_write_and_no_change() {
    requires!();
    kills_under_load(Images::Raw, sized(3, 12));
}

#[test]
fn a_kill_under_load_on_qcow2_disks_loses_no_view_no_completed_write_and_no_change() {
    requires!("qemu-img");
    kills_under_load(Images::Qcow2, sized(2, 12));
}

fn kills_under_load(images: Images, rounds: u64) {
    let rig = Rig::new();
    let paths = images.make(&rig);
    for round in 0..rounds {
        let load = Load::new(&["vda", "vdb"], 2, round);
        let initial = paths.each_ref().map(|path| images.content(path));
        let mount = rig.mount(&paths);
        let base = format!("base{round}");
        mount.snap(&base);
        let name = format!("s{round}");
        let guests: Vec<_> = load.disks.iter().map(|disk| mount.guest(disk)).collect();
        let (dir, before) = std::thread::scope(|scope| {
            load.start(scope, &guests);
            let stop = StopAtEnd(&load.stop);
            std::thread::sleep(Duration::from_millis(700));
            mount.snap(&name);
            let before = check_snapshot(&load, &mount, &name, &initial);
            std::thread::sleep(Duration::from_millis(300));
            load.killing.store(true, SeqCst);
            let dir = mount.kill();
            drop(stop);
            (dir, before)
        });
        drop(guests);
        let mount = Mount::at(dir, &paths);
        assert!(check_snapshot(&load, &mount, &name, &initial) == before, "{name} changed");
        assert!(check_snapshot(&load, &mount, &base, &initial).iter().flatten().all(|n| *n == 0));
        mount.snap(&format!("after{round}"));
        for (disk, disk_name) in load.disks.iter().enumerate() {
            let live = fs::read(mount.live(disk_name)).unwrap();
            let held = load.check_view("live", disk, &live, &initial[disk]);
            for (journal, held) in load.journals[disk].iter().zip(&held) {
                let ended = journal.entries().iter().filter(|e| e.ended != u64::MAX).count() as u64;
                assert!(*held >= ended, "a write that had ended is lost: {held} of {ended}");
            }
            for (from, prefixes) in [(&name, &before[disk]), (&base, &vec![0; load.writers])] {
                let map: BTreeSet<_> =
                    mount.map_since(&format!("after{round}"), disk_name, from).granules().into_iter().collect();
                let wrote = load.touched(disk, prefixes, &held);
                assert!(map.is_superset(&wrote), "the map since {from} lacks {:?}", wrote.difference(&map));
                // A write that the kill cut off between its mark and its data is in the map, and that is right.
                let begun: Vec<_> = load.journals[disk].iter().map(|j| j.entries().len() as u64).collect();
                assert!(map.is_subset(&load.touched(disk, prefixes, &begun)), "the map since {from} says too much");
            }
        }
        mount.umount();
    }
}

#[test]
fn the_verifier_finds_lost_torn_late_and_foreign_writes() {
    let rig = Rig::new();
    let path = rig.image_of("plain", DISK);
    let initial = fs::read(&path).unwrap();
    let load = Load::new(&["plain"], 2, 0);
    let guests = [File::options().read(true).write(true).open(&path).unwrap()];
    std::thread::scope(|scope| {
        load.start(scope, &guests);
        let _stop = StopAtEnd(&load.stop);
        eventually("a few writes", || load.journals[0].iter().all(|j| j.entries().len() > 100));
    });
    let view = fs::read(&path).unwrap();
    let held = load.check_view("plain", 0, &view, &initial);
    assert!(load.journals[0].iter().zip(&held).all(|(journal, held)| journal.entries().len() as u64 == *held));
    load.check_instant("plain", std::slice::from_ref(&held));
    assert!(!load.touched(0, &[0, 0], &held).is_empty());

    let found = |what: &str, check: &dyn Fn()| {
        let quiet = std::panic::catch_unwind(std::panic::AssertUnwindSafe(check));
        assert!(quiet.is_err(), "{what} was not found");
    };
    let block = load.journals[0][1].entries()[20].block;
    let at = (block * BLOCK) as usize..((block + 1) * BLOCK) as usize;
    let spoil = |bytes: &[u8]| {
        let mut spoilt = view.clone();
        spoilt[at.clone()].copy_from_slice(bytes);
        spoilt
    };
    found("a lost write", &|| drop(load.check_view("plain", 0, &spoil(&initial[at.clone()]), &initial)));
    let mut torn = view[at.clone()].to_vec();
    torn[4095] ^= 1;
    found("a torn write", &|| drop(load.check_view("plain", 0, &spoil(&torn), &initial)));
    found("a foreign write", &|| drop(load.check_view("plain", 0, &spoil(&[9; BLOCK as usize]), &initial)));
    // The newest write of one is there, and one of the other's that had ended by then is not.
    let journals: Vec<_> = load.journals[0].iter().map(Journal::entries).collect();
    let newest = |writer: usize| journals[writer].last().unwrap().began;
    let (ahead, behind) = if newest(0) > newest(1) { (0, 1) } else { (1, 0) };
    let ended = journals[behind].iter().filter(|entry| entry.ended < newest(ahead)).count() as u64;
    let mut late = held.clone();
    late[behind] = ended - 1;
    found("a view of two instants", &|| load.check_instant("plain", std::slice::from_ref(&late)));
}

/// Tells the writers to stop when the scope is left, by a panic too.
struct StopAtEnd<'a>(&'a AtomicBool);

impl Drop for StopAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, SeqCst);
    }
}

#[test]
fn fio_verifies_the_live_file_while_eight_snapshots_come_and_go() {
    requires!("fio", "sha256sum");
    let rig = Rig::new();
    let mount = rig.mount([rig.image("vda", 128)]);
    let seconds = sized(10, 30);
    let mut fio = tool("fio");
    fio.args([
        "--name=guest",
        "--ioengine=libaio",
        "--iodepth=8",
        "--rw=randrw",
        "--bs=4k",
        "--size=96m",
        "--direct=1",
    ]);
    fio.args(["--verify=crc32c", "--verify_fatal=1", "--verify_backlog=1024", "--time_based", "--eta=never"]);
    fio.arg(format!("--runtime={seconds}")).arg(format!("--filename={}", mount.live("vda").display()));
    fio.arg("--allow_file_create=0").stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
    let mut fio = fio.current_dir(rig.path(".")).spawn().unwrap();
    let hash = |name: &str| ok(tool("sha256sum").arg(mount.view(name, "vda")));
    let mut open: Vec<(String, String)> = Vec::new();
    let mut taken = 0;
    while fio.try_wait().unwrap().is_none() {
        let name = format!("s{taken}");
        mount.snap(&name);
        let first = hash(&name);
        open.push((name, first));
        taken += 1;
        if open.len() == 8 {
            let (name, first) = open.remove(taken % 8);
            assert_eq!(hash(&name), first, "{name} changed");
            mount.drop_snap(&name);
        }
    }
    let out = fio.wait_with_output().unwrap();
    assert!(out.status.success(), "fio: {}{}", stdout(&out), stderr(&out));
    for (name, first) in open {
        assert_eq!(hash(&name), first, "{name} changed");
    }
    say(&format!("fio: verified beside {taken} snapshots"));
}

/// The longest write that overlapped `from..to`, by one writer's list of (began, ended).
fn longest(writes: &[(Instant, Instant)], from: Instant, to: Instant) -> Duration {
    let overlapping = writes.iter().filter(|(began, ended)| *began <= to && *ended >= from);
    overlapping.map(|(began, ended)| *ended - *began).max().unwrap_or_default()
}

#[test]
fn the_guests_pause_at_a_snapshot_of_eight_disks_is_measured() {
    requires!();
    let rig = Rig::new();
    let disks: Vec<_> = (0..8).map(|n| format!("d{n}")).collect();
    let mount = rig.mount(disks.iter().map(|disk| rig.image_of(disk, 16 << 20)));
    let guests: Vec<_> = disks.iter().map(|disk| mount.guest(disk)).collect();
    let stop = AtomicBool::new(false);
    let rounds = sized(30, 200);
    let (writes, snapshots, quiet) = std::thread::scope(|scope| {
        let writer = |guest: &File| {
            let mut writes = Vec::new();
            for n in 0_u64.. {
                if stop.load(SeqCst) {
                    break;
                }
                let began = Instant::now();
                guest.write_all_at(&[n as u8; 4096], n * 7919 % 4096 * 4096).unwrap();
                writes.push((began, Instant::now()));
            }
            writes
        };
        let writers: Vec<_> = guests.iter().map(|guest| scope.spawn(move || writer(guest))).collect();
        let guard = StopAtEnd(&stop);
        let (mut snapshots, mut quiet) = (Vec::new(), Vec::new());
        for round in 0..rounds {
            std::thread::sleep(Duration::from_millis(20));
            let began = Instant::now();
            mount.snap(&format!("s{round}"));
            let ended = Instant::now();
            snapshots.push((began, ended));
            mount.drop_snap(&format!("s{round}"));
            std::thread::sleep(Duration::from_millis(20));
            let began = Instant::now();
            std::thread::sleep(ended - snapshots[round].0);
            quiet.push((began, Instant::now()));
        }
        drop(guard);
        (writers.into_iter().map(|w| w.join().unwrap()).collect::<Vec<_>>(), snapshots, quiet)
    });
    let figures = |spans: &[(Instant, Instant)]| {
        let mut pauses: Vec<_> = spans
            .iter()
            .map(|(from, to)| writes.iter().map(|w| longest(w, *from, *to)).max().unwrap().as_secs_f64() * 1e3)
            .collect();
        pauses.sort_by(f64::total_cmp);
        (pauses[pauses.len() / 2], pauses[pauses.len() - 1])
    };
    let ((median, worst), (quiet_median, quiet_worst)) = (figures(&snapshots), figures(&quiet));
    say(&format!(
        "pause: longest guest write at a snapshot of 8 disks: median {median:.2} ms, worst {worst:.2} ms; \
         in spans of the same length without one: median {quiet_median:.2} ms, worst {quiet_worst:.2} ms"
    ));
    assert!(writes.iter().all(|w| !w.is_empty()), "every guest wrote");
}
