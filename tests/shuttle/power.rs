//! Power loss at any moment of writers, rounds of disarming and a snapshot that run beside each other.

use super::rig::{GRANULE, explore};
use fleecefs::fleece::{Environment, Fleece, Options, Place, SnapshotRequest, View};
use fleecefs::image::raw::RawImage;
use fleecefs::storage::crash::CrashDisk;
use fleecefs::storage::shm::HeapShmRoot;
use fleecefs::storage::{Dir, Storage};
use shuttle::rand::{Rng, thread_rng};
use shuttle::thread;
use std::sync::{Arc, Mutex};

const REGION: u64 = 1 << 20;
/// The granules that are written to: two in each of two regions.
const GRANULES: [u64; 4] = [0, 1, 17, 18];
/// Media that are looked at for one moment.
const LOSSES: u64 = 4;

fn mount(disk: &CrashDisk, shm: &HeapShmRoot) -> Arc<Fleece> {
    let env = Environment { shm: Arc::new(shm.clone()), background: false };
    let fleece = Fleece::with_environment(Options::default(), env);
    let image = RawImage::over(disk.open("a.img").unwrap().shared(), false).unwrap();
    let dir: Arc<dyn Dir> = Arc::new(disk.dir("a.fleece"));
    fleece.attach("a", Arc::new(image), Place { state: dir.clone(), stores: dir, shm: None, lock: None }).unwrap();
    fleece
}

fn freeze(fleece: &Fleece, name: &str) -> Arc<View> {
    let request = SnapshotRequest { name: name.to_owned(), ..SnapshotRequest::default() };
    fleece.create_snapshot(&request).unwrap().view("a").unwrap().clone()
}

fn write(fleece: &Fleece, granule: u64, byte: u8) {
    assert_eq!(fleece.disk("a").unwrap().write(&[byte; 512], granule * GRANULE).unwrap(), 512);
}

/// The first byte of each granule that is written to.
fn bytes(view: &View) -> [u8; 4] {
    GRANULES.map(|granule| {
        let mut byte = [0];
        assert_eq!(view.read(&mut byte, granule * GRANULE).unwrap(), 1);
        byte[0]
    })
}

/// What is left when the power fails while `others` are at work: no map misses a change.
fn lose_power(others: &[fn(&Arc<Fleece>)], names: &[&str]) {
    let disk = CrashDisk::new();
    disk.open("a.img").unwrap().set_len(2 * REGION).unwrap();
    disk.open("a.img").unwrap().sync().unwrap();
    let fleece = mount(&disk, &HeapShmRoot::new());
    write(&fleece, GRANULES[0], 1);
    freeze(&fleece, "s0");
    fleece.disarm_idle();
    fleece.disarm_idle();
    // The first region is armed, and the next round takes it in; the second one is not.
    write(&fleece, GRANULES[1], 2);
    fleece.disarm_idle();
    let left = Arc::new(Mutex::new(None));
    let crash = thread::spawn({
        let left = left.clone();
        move || {
            for _ in 0..thread_rng().gen_range(0..300) {
                thread::yield_now();
            }
            *left.lock().unwrap() = Some(disk.kill());
        }
    });
    let others: Vec<_> = others
        .iter()
        .map(|other| {
            let (other, fleece) = (*other, fleece.clone());
            thread::spawn(move || other(&fleece))
        })
        .collect();
    others.into_iter().chain([crash]).for_each(|thread| thread.join().unwrap());
    let points: Vec<(String, [u8; 4])> = names
        .iter()
        .map(|name| ((*name).to_owned(), bytes(fleece.snapshot(name).unwrap().view("a").unwrap())))
        .collect();
    let left = left.lock().unwrap().take().unwrap();
    for _ in 0..LOSSES {
        // No words, in the same boot: the clock stands still here, so times cannot tell one boot from another.
        let fleece = mount(&left.survivors(thread_rng().r#gen()), &HeapShmRoot::new());
        let view = freeze(&fleece, "probe");
        let now = bytes(&view);
        for base in view.since() {
            // One that was cancelled later is not known any more.
            let Some((_, then)) = points.iter().find(|(name, _)| *name == base.name) else { continue };
            let map = view.map(Some(base.uuid)).unwrap();
            assert_eq!(map.everything(), None);
            for (index, granule) in GRANULES.into_iter().enumerate() {
                let dirty = map.dirty_run(granule * GRANULE, 1).0;
                assert!(dirty || then[index] == now[index], "granule {granule} since {}: {then:?}, {now:?}", base.name);
            }
        }
    }
}

fn rounds(fleece: &Arc<Fleece>) {
    (0..3).for_each(|_| fleece.disarm_idle());
}

/// Armed before written, and durable before disarmed, whoever meets whom.
#[test]
fn writers_beside_rounds_of_disarming_lose_nothing() {
    explore(2, || {
        let first: fn(&Arc<Fleece>) = |fleece| {
            write(fleece, GRANULES[0], 2);
            write(fleece, GRANULES[2], 3);
        };
        let second: fn(&Arc<Fleece>) = |fleece| {
            write(fleece, GRANULES[1], 4);
            write(fleece, GRANULES[0], 5);
        };
        lose_power(&[first, second, rounds], &["s0"]);
    });
}

/// A write that meets the round that is just about to disarm its region, at each of its steps.
#[test]
fn a_write_in_the_middle_of_a_round_loses_nothing() {
    explore(4, || lose_power(&[|fleece| write(fleece, GRANULES[0], 7), |fleece| fleece.disarm_idle()], &["s0"]));
}

/// Who finds a region armed by another goes ahead: it must be so on disk.
#[test]
fn two_writers_of_one_region_lose_nothing() {
    explore(4, || {
        lose_power(&[|fleece| write(fleece, GRANULES[2], 7), |fleece| write(fleece, GRANULES[3], 8)], &["s0"])
    });
}

/// A round between the freeze of a snapshot and its commit, when the bitmap of before is nowhere marked and not sealed.
#[test]
fn a_round_in_the_middle_of_a_snapshot_loses_nothing() {
    explore(4, || lose_power(&[|fleece| fleece.disarm_idle(), |fleece| drop(freeze(fleece, "s1"))], &["s0", "s1"]));
}

/// Writes and rounds beside a snapshot.
#[test]
fn a_snapshot_beside_rounds_of_disarming_loses_nothing() {
    explore(2, || {
        let writer: fn(&Arc<Fleece>) = |fleece| {
            write(fleece, GRANULES[0], 2);
            write(fleece, GRANULES[2], 3);
            write(fleece, GRANULES[0], 4);
        };
        lose_power(&[writer, rounds, |fleece| drop(freeze(fleece, "s1"))], &["s0", "s1"]);
    });
}

/// A checkpoint that records goes while rounds run: what takes over has its bits.
#[test]
fn a_merge_beside_rounds_of_disarming_loses_nothing() {
    explore(1, || {
        let merge: fn(&Arc<Fleece>) = |fleece| {
            freeze(fleece, "s1");
            write(fleece, GRANULES[1], 6);
            fleece.cancel_snapshot("s1").unwrap();
        };
        let writer: fn(&Arc<Fleece>) = |fleece| {
            write(fleece, GRANULES[0], 2);
            write(fleece, GRANULES[1], 3);
        };
        lose_power(&[writer, rounds, merge], &["s0"]);
    });
}
