//! Guest first: readers of views yield to an active guest, and read the same whether they do or not.

use crate::rig::*;
use fleecefs::error::errno;
use fleecefs::fleece::{Disk, Fleece};
use fleecefs::storage::faulty::Call;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};

const SIZE: u64 = 4 << 20;

fn paced(fleece: &Fleece) -> u64 {
    counter(fleece, "view_reads_paced")
}

/// One request, after which the guest counts as active for a while.
fn stir(disk: &Disk) {
    disk.read(&mut [0; 512], 0).unwrap();
}

#[test]
fn readers_beside_an_idle_guest_are_not_paced() {
    let host = Host::new(&["a"], SIZE);
    let fleece = host.mount();
    freeze(&fleece, "s");
    let view = view_of(&fleece, "s", "a");
    for _ in 0..50 {
        assert_eq!(read_view(&view, 0, SIZE).unwrap().len() as u64, SIZE);
    }
    assert_eq!((paced(&fleece), counter(&fleece, "view_pause_ns")), (0, 0));
    assert_eq!(host.files["a"].image_faults.calls(Call::Read), 50, "each in one piece");
}

#[test]
fn every_request_of_the_guest_makes_readers_yield() {
    let requests: [fn(&Disk); 5] = [
        |disk| stir(disk),
        |disk| assert_eq!(disk.write(&[1; 512], 0).unwrap(), 512),
        |disk| disk.write_zeroes(0, 512).unwrap(),
        |disk| disk.discard(0, 4096).unwrap(),
        |disk| disk.flush().unwrap(),
    ];
    for (index, request) in requests.into_iter().enumerate() {
        let host = Host::new(&["a"], SIZE);
        let fleece = host.mount();
        freeze(&fleece, "s");
        request(&fleece.disk("a").unwrap());
        let before = host.files["a"].image_faults.calls(Call::Read);
        read_view(&view_of(&fleece, "s", "a"), CHUNK, SIZE - CHUNK).unwrap();
        assert_eq!(paced(&fleece), 1, "request {index}");
        let pieces = host.files["a"].image_faults.calls(Call::Read) - before;
        assert!(pieces > 1, "request {index}: {pieces} pieces");
    }
}

#[test]
fn without_a_share_readers_never_wait() {
    let host = Host::new(&["a"], SIZE).with(|options| options.guest_share = 0);
    let fleece = host.mount();
    freeze(&fleece, "s");
    stir(&fleece.disk("a").unwrap());
    read_view(&view_of(&fleece, "s", "a"), 0, SIZE).unwrap();
    assert_eq!((paced(&fleece), counter(&fleece, "view_pause_ns")), (0, 0));
}

#[test]
fn readers_wait_for_a_guest_that_goes_on() {
    let host = Host::new(&["a"], SIZE).with(|options| options.guest_share = 95);
    let fleece = host.mount();
    freeze(&fleece, "s");
    let view = view_of(&fleece, "s", "a");
    let (disk, stop) = (fleece.disk("a").unwrap(), AtomicBool::new(false));
    thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(SeqCst) {
                stir(&disk);
            }
        });
        let limit = Instant::now() + Duration::from_secs(60);
        while counter(&fleece, "view_pause_ns") == 0 && Instant::now() < limit {
            read_view(&view, 0, SIZE).unwrap();
        }
        stop.store(true, SeqCst);
    });
    assert!(counter(&fleece, "view_pause_ns") > 0 && paced(&fleece) > 0);
}

/// A guest's request that hangs stops none of several readers.
#[test]
fn readers_get_on_beside_a_guest_that_hangs() {
    let host = Host::new(&["a"], SIZE).with(|options| options.guest_share = 95);
    let fleece = host.mount();
    freeze(&fleece, "s");
    host.files["a"].image_faults.stall(Call::Sync);
    let disk: Arc<Disk> = fleece.disk("a").unwrap();
    let guest = thread::spawn(move || disk.flush());
    wait_for("the guest", || counter(&fleece, "guest_flushes") > 0);
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                let view = view_of(&fleece, "s", "a");
                for _ in 0..3 {
                    assert_eq!(read_view(&view, 0, SIZE).unwrap().len() as u64, SIZE);
                }
            });
        }
    });
    assert!(paced(&fleece) > 0);
    host.files["a"].image_faults.release(Call::Sync);
    guest.join().unwrap().unwrap();
}

/// Ranges that begin and end anywhere, over copied chunks scattered among clear ones, beside an active guest and not.
#[test]
fn paced_or_not_a_view_reads_the_same() {
    for share in [0, 50] {
        let host = Host::new(&["a"], SIZE).with(|options| options.guest_share = share);
        let fleece = host.mount();
        let mut oracle = Oracle::new(&host);
        oracle.write(&fleece, "a", 0, SIZE, 1).unwrap();
        oracle.freeze(&fleece, "s").unwrap();
        for chunk in (0..SIZE / CHUNK).filter(|chunk| chunk % 3 == 1 || chunk % 64 > 40) {
            oracle.write(&fleece, "a", chunk * CHUNK, CHUNK, 2).unwrap();
        }
        let frozen = oracle.0["a"].at("s").to_owned();
        let (view, disk) = (view_of(&fleece, "s", "a"), fleece.disk("a").unwrap());
        for (offset, len) in [(0, SIZE), (5, 1 << 20), (CHUNK, 300 << 10), ((1 << 20) - 7, 14), (SIZE - 9, 9), (77, 1)]
        {
            stir(&disk);
            let expected = &frozen[offset as usize..(offset + len) as usize];
            assert_same(&read_view(&view, offset, len).unwrap(), expected, &format!("{share}: {offset} {len}"));
        }
        assert_eq!(paced(&fleece) > 0, share > 0);
    }
}

#[test]
fn scattered_copies_are_one_read_of_the_image() {
    const LEN: u64 = 1 << 20;
    let host = Host::new(&["a"], SIZE);
    let fleece = host.mount();
    let mut oracle = Oracle::new(&host);
    oracle.write(&fleece, "a", 0, SIZE, 1).unwrap();
    oracle.freeze(&fleece, "s").unwrap();
    for chunk in (1..LEN / CHUNK).step_by(3) {
        oracle.write(&fleece, "a", chunk * CHUNK, CHUNK, 2).unwrap();
    }
    let frozen = oracle.0["a"].at("s")[..LEN as usize].to_owned();
    let view = view_of(&fleece, "s", "a");
    // The guest is idle by then.
    thread::sleep(Duration::from_millis(50));
    read_view(&view, 0, 1).unwrap();
    thread::sleep(Duration::from_millis(50));
    read_view(&view, 0, 1).unwrap();
    let plan = &host.files["a"].image_faults;
    let before = plan.calls(Call::Read);
    assert_same(&read_view(&view, 0, LEN).unwrap(), &frozen, "scattered copies");
    assert_eq!(plan.calls(Call::Read) - before, 1);

    // A chunk that the image cannot give, but the store: no matter. One that nobody can: an error, of its range alone.
    plan.fail_range(Call::Read, CHUNK..2 * CHUNK, errno::EIO);
    assert_same(&read_view(&view, 0, LEN).unwrap(), &frozen, "over a bad sector under a copy");
    plan.fail_range(Call::Read, 2 * CHUNK..3 * CHUNK, errno::EIO);
    assert_errno(read_view(&view, 0, LEN), errno::EIO);
    assert_same(&read_view(&view, 3 * CHUNK, LEN - 3 * CHUNK).unwrap(), &frozen[3 * CHUNK as usize..], "behind it");
}
