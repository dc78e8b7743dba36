//! A store that hangs must not hang the guest, the other disks, or the operator.

use crate::rig::*;
use fleecefs::error::errno;
use fleecefs::fleece::{Disk, Fleece, StoreErrorPolicy};
use fleecefs::storage::Storage;
use fleecefs::storage::faulty::Call;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

fn host(policy: StoreErrorPolicy) -> Host {
    Host::pair().with(|options| {
        options.store_timeout = Duration::from_millis(30);
        options.on_store_error = policy;
    })
}

fn written(host: &Host) -> (Arc<Fleece>, Oracle) {
    written_to(host, DISK_BYTES)
}

/// The pair of disks, the first `bytes` of each written.
fn written_to(host: &Host, bytes: u64) -> (Arc<Fleece>, Oracle) {
    let fleece = host.mount();
    let mut oracle = Oracle::new(host);
    for disk in PAIR {
        oracle.write(&fleece, disk, 0, bytes, 1).unwrap();
    }
    (fleece, oracle)
}

/// A busy machine may let even a healthy call pass the short limit: then it is tried again.
fn eventually<T>(mut attempt: impl FnMut() -> fleecefs::error::Result<T>) -> T {
    loop {
        match attempt() {
            Ok(done) => return done,
            Err(e) => assert!([errno::ETIMEDOUT, errno::EIO].contains(&e.errno()), "{e}"),
        }
    }
}

/// A snapshot of all disks; its name has the number of the try that succeeded, from `first` on.
fn frozen(fleece: &Arc<Fleece>, oracle: &mut Oracle, first: u64) -> String {
    let mut serial = first;
    eventually(|| {
        let name = format!("s{serial}");
        serial += 1;
        oracle.freeze(fleece, &name).map(|_| name)
    })
}

const BREAKABLE: Allow = Allow { broken: true, more: true, ..EXACT };

#[test]
fn with_break_snapshot_the_guest_goes_on_and_the_operator_can_clean_up() {
    let host = host(StoreErrorPolicy::BreakSnapshot);
    let (fleece, mut oracle) = written(&host);
    let name = frozen(&fleece, &mut oracle, 1);
    let store = &host.files["a"].store_faults;
    let all = [Call::Read, Call::Write, Call::Sync, Call::SetLen, Call::Punch, Call::Status, Call::Directory];
    all.into_iter().for_each(|call| store.stall(call));
    // Several writers at once: none of them may hang.
    std::thread::scope(|scope| {
        for writer in 0..4_u64 {
            let disk = fleece.disk("a").unwrap();
            scope.spawn(move || {
                for round in 0..8 {
                    let offset = (writer * 16 + round) * CHUNK;
                    assert_eq!(disk.write(&pattern(2, offset, CHUNK), offset).unwrap() as u64, CHUNK);
                }
            });
        }
    });
    oracle.write(&fleece, "a", 0, 64 * CHUNK, 2).unwrap();
    assert!(view_of(&fleece, &name, "a").broken().is_some());
    assert_errno(read_view(&view_of(&fleece, &name, "a"), 0, 1), errno::EIO);
    oracle.zero(&fleece, "a", 70 * CHUNK, CHUNK, true).unwrap();
    assert_same(&read_live(&fleece.disk("a").unwrap(), 0, DISK_BYTES), &oracle.0["a"].live, "live a");

    oracle.write(&fleece, "b", 0, 64 * CHUNK, 2).unwrap();
    let b = view_of(&fleece, &name, "b");
    if b.broken().is_none() {
        assert_same(&eventually(|| read_view(&b, 0, DISK_BYTES)), oracle.0["b"].at(&name), "view of b");
    }

    fleece.cancel_snapshot(&name).unwrap();
    fleece.reap();
    assert!(try_freeze(&fleece, "no", &[], None).is_err(), "no snapshot can begin on a store that hangs");
    let later = try_freeze(&fleece, "b-only", &["b"], None);
    assert!(later.is_ok() || later.is_err_and(|e| e.errno() == errno::ETIMEDOUT));

    all.into_iter().for_each(|call| store.release(call));
    if fleece.snapshot("b-only").is_ok() {
        fleece.cancel_snapshot("b-only").unwrap();
    }
    frozen(&fleece, &mut oracle, 100);
    oracle.write(&fleece, "a", 0, DISK_BYTES, 3).unwrap();
    oracle.check(&fleece, BREAKABLE);
    fleece.close().unwrap();
}

#[test]
fn closing_returns_while_the_store_hangs_and_nothing_is_forgotten() {
    let host = host(StoreErrorPolicy::BreakSnapshot);
    let (fleece, mut oracle) = written(&host);
    frozen(&fleece, &mut oracle, 1);
    let store = &host.files["a"].store_faults;
    for call in [Call::Read, Call::Write, Call::Status, Call::Directory] {
        store.stall(call);
    }
    oracle.write(&fleece, "a", 3 * GRANULE, 100, 2).unwrap();
    fleece.close().unwrap();
    drop(fleece);
    for call in [Call::Read, Call::Write, Call::Status, Call::Directory] {
        store.release(call);
    }
    let fleece = host.mount();
    assert!(fleece.snapshots().is_empty());
    oracle.note("probe");
    eventually(|| try_freeze(&fleece, "probe", &[], None));
    oracle.check(&fleece, EXACT);
}

#[test]
fn with_fail_write_the_guest_gets_an_error_and_can_go_on_later() {
    let host = host(StoreErrorPolicy::FailWrite);
    let (fleece, mut oracle) = written(&host);
    let name = frozen(&fleece, &mut oracle, 1);
    let store = &host.files["a"].store_faults;
    store.stall(Call::Write);
    let before = oracle.0["a"].live.clone();
    for _ in 0..3 {
        assert_errno(oracle.write(&fleece, "a", 0, 2 * CHUNK, 2), errno::ETIMEDOUT);
    }
    assert_same(&oracle.0["a"].live, &before, "the disk after refused writes");
    assert!(view_of(&fleece, &name, "a").broken().is_none());
    eventually(|| oracle.write(&fleece, "b", 0, 2 * CHUNK, 2));
    store.release(Call::Write);
    eventually(|| oracle.write(&fleece, "a", 0, 2 * CHUNK, 3));
    eventually(|| oracle.write(&fleece, "a", CHUNK, 8 * CHUNK, 4));
    let view = view_of(&fleece, &name, "a");
    assert_same(&eventually(|| read_view(&view, 0, DISK_BYTES)), oracle.0["a"].at(&name), "view");
    assert_same(&read_live(&fleece.disk("a").unwrap(), 0, DISK_BYTES), &oracle.0["a"].live, "live");
    fleece.close().unwrap();
}

#[test]
fn a_reader_of_a_view_whose_store_hangs_gets_an_error_and_later_the_right_bytes() {
    let host = host(StoreErrorPolicy::BreakSnapshot);
    let (fleece, mut oracle) = written(&host);
    let name = frozen(&fleece, &mut oracle, 1);
    oracle.write(&fleece, "a", 0, 4 * CHUNK, 2).unwrap();
    let view = view_of(&fleece, &name, "a");
    if view.broken().is_some() {
        // The machine was too busy for the short limit.
        return;
    }
    let store = &host.files["a"].store_faults;
    store.stall(Call::Read);
    assert_errno(read_view(&view, 0, CHUNK), errno::ETIMEDOUT);
    assert_same(&read_view(&view, 4 * CHUNK, CHUNK).unwrap(), &pattern(1, 4 * CHUNK, CHUNK), "the image's part");
    store.release(Call::Read);
    assert_same(&eventually(|| read_view(&view, 0, DISK_BYTES)), oracle.0["a"].at(&name), "view");
}

/// Two guests' writes to neighbours that were never touched, while reads of the image take longer than a call on the
/// store may: the one waits for the other, and the store has done nothing wrong.
#[test]
fn an_image_that_is_slow_is_no_store_that_hangs() {
    for policy in [StoreErrorPolicy::BreakSnapshot, StoreErrorPolicy::FailWrite] {
        let host = Host::pair().with(|options| {
            options.store_timeout = Duration::from_millis(300);
            options.on_store_error = policy;
        });
        let (fleece, mut oracle) = written(&host);
        oracle.freeze(&fleece, "s").unwrap();
        let image = &host.files["a"].image_faults;
        image.stall(Call::Read);
        std::thread::scope(|scope| {
            let write = |at: u64| {
                let disk = fleece.disk("a").unwrap();
                scope.spawn(move || disk.write(&pattern(2, at, CHUNK), at).unwrap())
            };
            let writers = [write(0), write(CHUNK), write(2 * CHUNK)];
            std::thread::sleep(Duration::from_millis(900));
            image.release(Call::Read);
            for writer in writers {
                assert_eq!(writer.join().unwrap() as u64, CHUNK);
            }
        });
        oracle.write(&fleece, "a", 0, 3 * CHUNK, 2).unwrap();
        oracle.check(&fleece, Allow { more: true, ..EXACT });
    }
}

/// With views that are broken there is nothing to keep: a guest's write that waits behind a store goes on.
#[test]
fn who_waits_for_the_store_of_broken_views_goes_on_whatever_the_policy() {
    let host = Host::pair().with(|options| {
        options.store_timeout = Duration::from_secs(5);
        options.on_store_error = StoreErrorPolicy::FailWrite;
    });
    let (fleece, mut oracle) = written(&host);
    oracle.freeze(&fleece, "s").unwrap();
    let files = &host.files["a"];
    let calls = files.store_faults.calls(Call::Write);
    files.store_faults.stall(Call::Write);
    std::thread::scope(|scope| {
        let write = |at: u64| {
            let disk = fleece.disk("a").unwrap();
            scope.spawn(move || disk.write(&pattern(2, at, CHUNK), at))
        };
        let first = write(0);
        wait_for("the first writer asks the store", || files.store_faults.calls(Call::Write) > calls);
        let second = write(CHUNK);
        std::thread::sleep(Duration::from_millis(100));
        // Another program writes to the image.
        files.image.set_len(DISK_BYTES + 4096).unwrap();
        let new = try_freeze(&fleece, "t", &["a"], None);
        assert!(view_of(&fleece, "s", "a").broken().is_some());
        let check = |written: fleecefs::error::Result<usize>| match written {
            // It came to the new view's layer, for which its old content cannot be kept either.
            Err(e) if new.is_ok() => assert_eq!(e.errno(), errno::ETIMEDOUT, "{e}"),
            written => assert_eq!(written.unwrap() as u64, CHUNK),
        };
        check(second.join().unwrap());
        files.store_faults.release(Call::Write);
        check(first.join().unwrap());
    });
}

/// Disks of which each stripe of first writers has room for the writers below.
const STRIPE: u64 = 256 << 10;
const WRITERS: u64 = 16;
const WIDE_BYTES: u64 = WRITERS / 2 * STRIPE;

fn wide(policy: StoreErrorPolicy) -> Host {
    let mut host = host(policy);
    for name in PAIR {
        host.files.insert(name, Files::new(name, WIDE_BYTES));
    }
    host
}

/// What a write was answered, and whether in the thread that asked for it.
struct Answer {
    done: fleecefs::error::Result<usize>,
    here: bool,
}

/// A guest's writes, each in a thread of its own that need not answer it.
struct Guests {
    threads: Vec<JoinHandle<()>>,
    answers: Receiver<Answer>,
}

impl Guests {
    /// Two in each stripe, a chunk each: more than there are places for calls in the writer's thread.
    fn write(disk: &Arc<Disk>, seed: u8) -> Self {
        let (tell, answers) = channel();
        let start = |writer: u64| {
            let (disk, tell) = (disk.clone(), tell.clone());
            thread::spawn(move || {
                let (offset, caller) = (Self::offset(writer), thread::current().id());
                disk.write_then(&pattern(seed, offset, CHUNK), offset, move |done| {
                    tell.send(Answer { done, here: thread::current().id() == caller }).unwrap();
                });
            })
        };
        Guests { threads: (0..WRITERS).map(start).collect(), answers }
    }

    fn offset(writer: u64) -> u64 {
        writer / 2 * STRIPE + writer % 2 * CHUNK
    }

    /// One for each write, in time.
    fn answers(&self) -> Vec<Answer> {
        (0..WRITERS).map(|_| self.answers.recv_timeout(Duration::from_secs(60)).expect("an answer")).collect()
    }

    /// The threads come back, and have nothing to say.
    fn end(self) {
        self.threads.into_iter().for_each(|guest| guest.join().unwrap());
        assert!(self.answers.recv().is_err(), "a write was answered twice");
    }
}

/// Those who hang in a call in their own thread, which is no more than there are places, are answered by others.
fn assert_taken_over(host: &Host, answers: &[Answer]) {
    let by_others = answers.iter().filter(|answer| !answer.here).count();
    assert!((1..=host.options.store_calls_here).contains(&by_others), "{by_others} answers came from other threads");
}

#[test]
fn with_break_snapshot_a_write_that_hangs_is_done_by_another_thread() {
    let host = wide(StoreErrorPolicy::BreakSnapshot);
    let (fleece, mut oracle) = written_to(&host, WIDE_BYTES);
    let name = frozen(&fleece, &mut oracle, 1);
    let disk = fleece.disk("a").unwrap();
    let store = &host.files["a"].store_faults;
    store.stall(Call::Write);

    let guests = Guests::write(&disk, 2);
    let answers = guests.answers();
    assert!(answers.iter().all(|answer| answer.done.as_ref().is_ok_and(|count| *count as u64 == CHUNK)));
    assert_taken_over(&host, &answers);
    let view = view_of(&fleece, &name, "a");
    assert!(view.broken().is_some());
    assert_errno(read_view(&view, 0, 1), errno::EIO);
    for offset in (0..WRITERS).map(Guests::offset) {
        assert_same(&read_live(&disk, offset, CHUNK), &pattern(2, offset, CHUNK), "what was answered");
    }
    // Others go on, in the stripes that are held too, and the gate is free.
    oracle.write(&fleece, "a", 0, WIDE_BYTES, 2).unwrap();
    let during = frozen(&fleece, &mut oracle, 100);
    assert_same(&read_view(&view_of(&fleece, &during, "a"), 0, WIDE_BYTES).unwrap(), oracle.0["a"].at(&during), "new");
    oracle.write(&fleece, "a", 0, WIDE_BYTES, 3).unwrap();

    store.release(Call::Write);
    guests.end();
    assert!(view.broken().is_some());
    oracle.check(&fleece, BREAKABLE);
    let later = Guests::write(&disk, 4);
    assert!(later.answers().iter().all(|answer| answer.done.is_ok()));
    later.end();
    for offset in (0..WRITERS).map(Guests::offset) {
        oracle.write(&fleece, "a", offset, CHUNK, 4).unwrap();
    }
    oracle.check(&fleece, BREAKABLE);
    fleece.close().unwrap();
}

#[test]
fn with_fail_write_a_write_that_hangs_is_refused_by_another_thread() {
    let host = wide(StoreErrorPolicy::FailWrite);
    let (fleece, mut oracle) = written_to(&host, WIDE_BYTES);
    let name = frozen(&fleece, &mut oracle, 1);
    let disk = fleece.disk("a").unwrap();
    let store = &host.files["a"].store_faults;
    store.stall(Call::Write);

    let guests = Guests::write(&disk, 2);
    let answers = guests.answers();
    assert!(answers.iter().all(|answer| answer.done.as_ref().is_err_and(|e| e.errno() == errno::ETIMEDOUT)));
    assert_taken_over(&host, &answers);
    assert_same(&read_live(&disk, 0, WIDE_BYTES), &oracle.0["a"].live, "the disk after refused writes");
    eventually(|| oracle.write(&fleece, "b", 0, 2 * CHUNK, 2));
    let view = view_of(&fleece, &name, "a");
    assert!(view.broken().is_none());
    assert_same(&read_view(&view, 0, WIDE_BYTES).unwrap(), oracle.0["a"].at(&name), "view");

    store.release(Call::Write);
    guests.end();
    assert_same(&read_live(&disk, 0, WIDE_BYTES), &oracle.0["a"].live, "the disk after the store came back");
    for offset in (0..WRITERS).map(Guests::offset) {
        eventually(|| oracle.write(&fleece, "a", offset, CHUNK, 3));
    }
    let view = view_of(&fleece, &name, "a");
    assert_same(&eventually(|| read_view(&view, 0, WIDE_BYTES)), oracle.0["a"].at(&name), "view");
    assert_same(&read_live(&disk, 0, WIDE_BYTES), &oracle.0["a"].live, "live");
    fleece.close().unwrap();
}
