//! 'I have read this': what a release frees, spares and must not touch.

use crate::rig::*;
use fleecefs::error::errno;
use fleecefs::fleece::Fleece;

fn written(host: &Host) -> (std::sync::Arc<Fleece>, Oracle) {
    let fleece = host.mount();
    let mut oracle = Oracle::new(host);
    oracle.write(&fleece, "a", 0, DISK_BYTES, 1).unwrap();
    (fleece, oracle)
}

fn bytes_stored(fleece: &Fleece) -> u64 {
    counter(fleece, "store_bytes")
}

#[test]
fn a_release_frees_the_store_and_a_guest_write_there_copies_nothing() {
    let host = Host::one();
    let (fleece, mut oracle) = written(&host);
    oracle.freeze(&fleece, "s").unwrap();
    oracle.write(&fleece, "a", 0, 8 * CHUNK, 2).unwrap();
    assert_eq!(bytes_stored(&fleece), 8 * CHUNK);
    // Half of it was copied already, half was not.
    fleece.release("s", "a", 4 * CHUNK, 8 * CHUNK).unwrap();
    wait_for("the space is freed", || bytes_stored(&fleece) == 4 * CHUNK);
    let copied = counter(&fleece, "chunks_copied");
    oracle.write(&fleece, "a", 4 * CHUNK, 8 * CHUNK, 3).unwrap();
    assert_eq!((counter(&fleece, "chunks_copied"), bytes_stored(&fleece)), (copied, 4 * CHUNK));
    let view = view_of(&fleece, "s", "a");
    for at in [4 * CHUNK, 8 * CHUNK, 12 * CHUNK - 1] {
        let e = assert_errno(read_view(&view, at, 1), errno::EIO);
        assert!(e.to_string().contains("released"), "{e}");
    }
    assert_errno(read_view(&view, 0, 5 * CHUNK), errno::EIO);
    assert_same(&read_view(&view, 0, 4 * CHUNK).unwrap(), &pattern(1, 0, 4 * CHUNK), "before");
    assert_same(&read_view(&view, 12 * CHUNK, CHUNK).unwrap(), &pattern(1, 12 * CHUNK, CHUNK), "after");
    oracle.write(&fleece, "a", 12 * CHUNK, 1, 4).unwrap();
    assert_eq!(counter(&fleece, "chunks_copied"), copied + 1, "next to it copies go on");
}

#[test]
fn an_unaligned_release_affects_whole_chunks_only() {
    let host = Host::one();
    let (fleece, _) = written(&host);
    freeze(&fleece, "s");
    let view = view_of(&fleece, "s", "a");
    fleece.release("s", "a", CHUNK + 1, CHUNK).unwrap();
    fleece.release("s", "a", 3 * CHUNK - 1, 2).unwrap();
    fleece.release("s", "a", 5 * CHUNK, CHUNK - 1).unwrap();
    fleece.release("s", "a", 7 * CHUNK, 0).unwrap();
    assert_same(&read_view(&view, 0, DISK_BYTES).unwrap(), &pattern(1, 0, DISK_BYTES), "nothing is released");
    fleece.release("s", "a", 7 * CHUNK - 1, 2 * CHUNK).unwrap();
    assert!(read_view(&view, 6 * CHUNK, CHUNK).is_ok());
    assert_errno(read_view(&view, 7 * CHUNK, CHUNK), errno::EIO);
    assert!(read_view(&view, 8 * CHUNK, CHUNK).is_ok());
}

#[test]
fn the_last_partial_chunk_is_whole_when_the_release_reaches_the_end() {
    let host = Host::one();
    let (fleece, mut oracle) = written(&host);
    freeze(&fleece, "s");
    let view = view_of(&fleece, "s", "a");
    let last = DISK_BYTES / CHUNK * CHUNK;
    fleece.release("s", "a", last, DISK_BYTES - last - 1).unwrap();
    assert!(read_view(&view, last, 1).is_ok(), "not all of it");
    fleece.release("s", "a", last, DISK_BYTES - last).unwrap();
    assert_errno(read_view(&view, last, 1), errno::EIO);
    assert!(read_view(&view, last - 1, 1).is_ok());
    let copied = counter(&fleece, "chunks_copied");
    oracle.write(&fleece, "a", last, DISK_BYTES - last, 2).unwrap();
    assert_eq!(counter(&fleece, "chunks_copied"), copied);
}

#[test]
fn a_release_past_the_end_or_of_something_unknown_is_refused() {
    let host = Host::one();
    let (fleece, _) = written(&host);
    freeze(&fleece, "s");
    assert_errno(fleece.release("s", "a", DISK_BYTES, 1), errno::EINVAL);
    assert_errno(fleece.release("s", "a", 1, DISK_BYTES), errno::EINVAL);
    assert_errno(fleece.release("s", "a", u64::MAX, 2), errno::EINVAL);
    assert_errno(fleece.release("t", "a", 0, 1), errno::ENOENT);
    assert_errno(fleece.release("s", "b", 0, 1), errno::ENOENT);
    fleece.release("s", "a", 0, DISK_BYTES).unwrap();
}

#[test]
fn an_older_view_is_right_where_a_newer_one_released() {
    let host = Host::one();
    let (fleece, mut oracle) = written(&host);
    oracle.freeze(&fleece, "old").unwrap();
    oracle.write(&fleece, "a", 0, 4 * CHUNK, 2).unwrap();
    oracle.freeze(&fleece, "new").unwrap();
    oracle.write(&fleece, "a", 0, 8 * CHUNK, 3).unwrap();
    fleece.release("new", "a", 0, DISK_BYTES).unwrap();
    oracle.write(&fleece, "a", 0, DISK_BYTES, 4).unwrap();
    assert_same(&read_view(&view_of(&fleece, "old", "a"), 0, DISK_BYTES).unwrap(), oracle.0["a"].at("old"), "old");
    assert_errno(read_view(&view_of(&fleece, "new", "a"), 0, 1), errno::EIO);
    // Once the older one released it too, nobody needs it.
    fleece.release("old", "a", 0, DISK_BYTES).unwrap();
    // What only `new` needed and what both needed may stay in the newest layer until it goes; the older one is empty.
    wait_for("the older one's space is freed", || view_of(&fleece, "old", "a").store_bytes() == 0);
    wait_for("the newer one's space is freed", || view_of(&fleece, "new", "a").store_bytes() == 0);
}

#[test]
fn a_newer_view_is_right_where_an_older_one_released() {
    let host = Host::one();
    let (fleece, mut oracle) = written(&host);
    oracle.freeze(&fleece, "old").unwrap();
    oracle.write(&fleece, "a", 0, 4 * CHUNK, 2).unwrap();
    oracle.freeze(&fleece, "new").unwrap();
    fleece.release("old", "a", 0, DISK_BYTES).unwrap();
    oracle.write(&fleece, "a", 0, 8 * CHUNK, 3).unwrap();
    assert_same(&read_view(&view_of(&fleece, "new", "a"), 0, DISK_BYTES).unwrap(), oracle.0["a"].at("new"), "new");
    assert_eq!(view_of(&fleece, "new", "a").store_bytes(), 8 * CHUNK);
    fleece.cancel_snapshot("old").unwrap();
    fleece.reap();
    oracle.write(&fleece, "a", 0, DISK_BYTES, 4).unwrap();
    oracle.check(&fleece, EXACT);
}

#[test]
fn a_view_that_released_something_is_right_under_a_newer_one_that_was_dropped() {
    let host = Host::one();
    let (fleece, mut oracle) = written(&host);
    oracle.freeze(&fleece, "old").unwrap();
    oracle.freeze(&fleece, "new").unwrap();
    fleece.release("old", "a", 0, 2 * CHUNK).unwrap();
    fleece.cancel_snapshot("new").unwrap();
    oracle.write(&fleece, "a", 0, 8 * CHUNK, 2).unwrap();
    let view = view_of(&fleece, "old", "a");
    assert_errno(read_view(&view, CHUNK, 1), errno::EIO);
    let rest = 2 * CHUNK..DISK_BYTES;
    assert_same(
        &read_view(&view, rest.start, rest.end - rest.start).unwrap(),
        &oracle.0["a"].at("old")[2 * CHUNK as usize..],
        "old",
    );
    assert_eq!(counter(&fleece, "chunks_copied"), 6);
}

#[test]
fn a_release_outlives_a_kill() {
    let host = Host::one();
    let (fleece, mut oracle) = written(&host);
    freeze(&fleece, "s");
    oracle.write(&fleece, "a", 0, 4 * CHUNK, 2).unwrap();
    fleece.release("s", "a", 0, 8 * CHUNK).unwrap();
    wait_for("the space is freed", || bytes_stored(&fleece) == 0);
    drop(fleece);
    let fleece = host.mount();
    let view = view_of(&fleece, "s", "a");
    assert_errno(read_view(&view, 0, 1), errno::EIO);
    assert_errno(read_view(&view, 7 * CHUNK, 1), errno::EIO);
    assert_same(&read_view(&view, 8 * CHUNK, CHUNK).unwrap(), &pattern(1, 8 * CHUNK, CHUNK), "behind it");
    oracle.write(&fleece, "a", 0, 8 * CHUNK, 3).unwrap();
    assert_eq!(counter(&fleece, "chunks_copied"), 0);
}
