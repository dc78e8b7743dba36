//! What snapshots leave out (Z1 to Z3): zeros in the view, in its map and in what a chain of maps makes.

use crate::rig::*;
use crate::volumes::{mbr, swap};
use fleecefs::error::errno;
use fleecefs::fleece::{Fleece, Skip, Snapshot, SnapshotRequest, View};
use fleecefs::storage::Storage;
use fleecefs::storage::faulty::Call;
use std::ops::Range;
use std::sync::Arc;

const SIZE: u64 = 16 * GRANULE;
/// Start and length of the swap area, and of what is behind it.
const SWAP: (u64, u64) = (GRANULE, 4 * GRANULE);
const DATA: (u64, u64) = (8 * GRANULE, 3 * GRANULE);
/// The 41 pages of the area but for its header.
const UNUSED: Range<u64> = SWAP.0 + 4096..SWAP.0 + 41 * 4096;

fn disk_with_swap(host: &Host, name: &str) {
    let image = &host.files[name].image;
    image.write_at(&pattern(1, 0, SIZE), 0).unwrap();
    image.write_at(&mbr(&[SWAP, DATA]), 0).unwrap();
    image.write_at(&swap("here"), SWAP.0).unwrap();
}

fn host(names: &[&'static str]) -> Host {
    let host = Host::new(names, SIZE).with(|options| options.keep_snapshots = true);
    names.iter().for_each(|name| disk_with_swap(&host, name));
    host
}

fn take(fleece: &Fleece, name: &str, skip: &str) -> Arc<Snapshot> {
    let skip = Some(skip.parse::<Skip>().unwrap());
    fleece.create_snapshot(&SnapshotRequest { name: name.to_owned(), skip, ..SnapshotRequest::default() }).unwrap()
}

fn live(fleece: &Fleece, disk: &str) -> Vec<u8> {
    read_live(&fleece.disk(disk).unwrap(), 0, SIZE)
}

/// The content without what is left out.
fn without(mut content: Vec<u8>) -> Vec<u8> {
    content[UNUSED.start as usize..UNUSED.end as usize].fill(0);
    content
}

/// Data, block status and map of a view are one answer.
fn assert_view(view: &Arc<View>, expected: &[u8]) {
    assert_same(&read_view(view, 0, SIZE).unwrap(), expected, "view");
    for (offset, len) in [(UNUSED.start - 100, 200), (UNUSED.end - 100, 200), (UNUSED.start + 5, 100), (0, SIZE)] {
        let part = &expected[offset as usize..(offset + len) as usize];
        assert_same(&read_view(view, offset, len).unwrap(), part, "part of the view");
    }
    check_status(view, expected, EXACT, "view");
    for base in std::iter::once(None).chain(view.since().into_iter().map(|point| Some(point.uuid))) {
        for extent in extents(view, base).unwrap() {
            let part = &expected[extent.start as usize..(extent.start + extent.length) as usize];
            assert!(!extent.zero || is_zero(part), "{extent:?}");
            if view.skipped().is_some() && extent.start < UNUSED.end && UNUSED.start < extent.start + extent.length {
                assert!(extent.dirty, "{extent:?} since {base:?}");
                let inside = UNUSED.start <= extent.start && extent.start + extent.length <= UNUSED.end;
                assert!(extent.zero && inside, "{extent:?} since {base:?}");
            }
        }
    }
}

/// Brings a copy of the view's base up to the view, by its map alone.
fn apply(copy: &mut [u8], view: &Arc<View>, base: Option<&str>) {
    let map = match base {
        Some(name) => extents_since(view, name),
        None => extents(view, None).unwrap(),
    };
    for extent in map.iter().filter(|extent| extent.dirty) {
        let part = &mut copy[extent.start as usize..(extent.start + extent.length) as usize];
        match extent.zero {
            true => part.fill(0),
            false => part.copy_from_slice(&read_view(view, extent.start, extent.length).unwrap()),
        }
    }
}

#[test]
fn what_is_left_out_reads_as_zeros_and_costs_nothing() {
    let host = host(&["a"]);
    let fleece = host.mount();
    let before = live(&fleece, "a");
    let snapshot = take(&fleece, "s", "swap");
    let view = &snapshot.views()[0];
    assert_eq!(view.skipped(), Some((&["swap".to_owned()][..], UNUSED.end - UNUSED.start)));
    assert_view(view, &without(before.clone()));
    let manifest = snapshot.manifest();
    assert_eq!(manifest["disks"][0]["skipped"]["kinds"], serde_json::json!(["swap"]));
    assert_eq!(manifest["disks"][0]["skipped"]["bytes"], UNUSED.end - UNUSED.start);
    assert_eq!(manifest["disks"][0]["volumes"][0]["content"]["label"], "here");
    let disk = fleece.disk("a").unwrap();
    disk.write(&pattern(9, UNUSED.start, UNUSED.end - UNUSED.start), UNUSED.start).unwrap();
    assert_eq!(view.store_bytes(), 0, "nobody needs what was there");
    disk.write(&pattern(9, SWAP.0, 4096), SWAP.0).unwrap();
    disk.write(&pattern(9, UNUSED.end, 4096), UNUSED.end).unwrap();
    assert_view(view, &without(before));
    // What somebody has read is given back; the rest of the answer stays.
    view.release(0, UNUSED.end).unwrap();
    assert!(is_zero(&read_view(view, UNUSED.start, UNUSED.end - UNUSED.start).unwrap()));
    assert_errno(read_view(view, UNUSED.start - 1, 2), errno::EIO);
}

#[test]
fn an_older_view_keeps_what_a_newer_one_leaves_out() {
    let host = host(&["a"]);
    let fleece = host.mount();
    let before = live(&fleece, "a");
    let (old, new) = (take(&fleece, "old", ""), take(&fleece, "new", "swap"));
    fleece.disk("a").unwrap().write(&pattern(9, 0, SIZE), 0).unwrap();
    assert_view(&old.views()[0], &before);
    assert_view(&new.views()[0], &without(before.clone()));
    fleece.cancel_snapshot("new").unwrap();
    assert_view(&old.views()[0], &before);
}

#[test]
fn the_mount_says_what_is_left_out_where_the_snapshot_does_not() {
    let host = host(&["a"]).with(|options| options.skip = Skip { swap: true, free: true });
    let fleece = host.mount();
    let before = live(&fleece, "a");
    assert_view(&freeze(&fleece, "s").views()[0], &without(before.clone()));
    for (name, skip) in [("none", ""), ("free", "free")] {
        let snapshot = take(&fleece, name, skip);
        assert_eq!(snapshot.views()[0].skipped(), None, "{name}");
        assert_view(&snapshot.views()[0], &before);
    }
}

/// Z2 and Z3: whichever points leave something out, each one restored from the chain is its view; also where the daemon
/// was killed in between, or the power failed.
#[test]
fn a_chain_gives_what_its_views_gave() {
    for stop in ["", "close", "kill", "power"] {
        let mut host = host(&["a"]);
        let mut fleece = host.mount();
        let mut copy = vec![0xee; SIZE as usize];
        let mut base = None;
        for (round, skip) in ["", "swap", "", "", "swap", "swap", ""].into_iter().enumerate() {
            let name = format!("t{round}");
            let content = live(&fleece, "a");
            // What is armed counts as changed after a power loss, whatever the bits say.
            (0..3).for_each(|_| fleece.disarm_idle());
            let snapshot = take(&fleece, &name, skip);
            let view = &snapshot.views()[0];
            // Comes into use, or not, while the backup is made.
            let disk = fleece.disk("a").unwrap();
            if round == 4 {
                disk.write(&pattern(round as u8, UNUSED.start, 3 * GRANULE / 2), UNUSED.start).unwrap();
            }
            apply(&mut copy, view, base.as_deref());
            let expected = if skip.is_empty() { content } else { without(content) };
            assert_same(&copy, &expected, &format!("the chain up to {name}, {stop}"));
            assert_view(view, &expected);
            drop(disk);
            fleece.complete_snapshot(&name, None).unwrap();
            drop(snapshot);
            base = Some(name);
            match stop {
                "close" => fleece.close().unwrap(),
                "power" => host.lose_power(),
                _ => {}
            }
            if !stop.is_empty() {
                drop(fleece);
                fleece = host.mount();
            }
        }
    }
}

/// Where nobody writes, what comes back is all that an increment has.
#[test]
fn an_increment_has_what_was_left_out_before_and_no_more() {
    let host = host(&["a"]);
    let fleece = host.mount();
    take(&fleece, "t0", "swap");
    fleece.complete_snapshot("t0", None).unwrap();
    for (name, base, skip) in [("t1", "t0", ""), ("t2", "t1", ""), ("t3", "t2", "swap")] {
        let snapshot = take(&fleece, name, skip);
        let dirty = dirty_granules(&extents_since(&snapshot.views()[0], base));
        let expected = if name == "t2" { 0..0 } else { UNUSED.start / GRANULE..UNUSED.end.div_ceil(GRANULE) };
        assert_eq!(dirty, expected.collect(), "{name}");
        drop(snapshot);
        fleece.complete_snapshot(name, None).unwrap();
    }
    fleece.delete_checkpoint("t1").unwrap();
    fleece.delete_checkpoint("t2").unwrap();
    let view = take(&fleece, "t4", "").views()[0].clone();
    assert!(!dirty_granules(&extents_since(&view, "t0")).is_empty(), "a merge forgets nothing");
}

#[test]
fn a_view_reads_the_same_after_a_stop() {
    for kill in [false, true] {
        let host = host(&["a", "b"]);
        let fleece = host.mount();
        let before = ["a", "b"].map(|name| live(&fleece, name));
        drop(take(&fleece, "s", "swap,free"));
        for name in ["a", "b"] {
            fleece.disk(name).unwrap().write(&pattern(5, GRANULE, 4 * GRANULE), GRANULE).unwrap();
        }
        if !kill {
            fleece.close().unwrap();
        }
        drop(fleece);
        let fleece = host.mount();
        for (name, before) in ["a", "b"].into_iter().zip(before) {
            assert_view(&view_of(&fleece, "s", name), &without(before));
        }
    }
}

/// Z1: zeros that a view showed are not replaced by something else, whatever becomes of the list.
#[test]
fn a_view_whose_list_is_damaged_is_broken() {
    for remove in [false, true] {
        let host = host(&["a"]);
        let fleece = host.mount();
        drop(take(&fleece, "s", "swap"));
        drop(fleece);
        let stores = &host.files["a"].stores;
        let name = format!("layers/{}/skipped", host.files["a"].layers()[0]);
        use fleecefs::storage::dir::Dir;
        match remove {
            true => stores.remove(&name).unwrap(),
            false => stores.open(&name).unwrap().write_at(&[0xff], 1).unwrap(),
        }
        let fleece = host.mount();
        let view = view_of(&fleece, "s", "a");
        assert_errno(read_view(&view, 0, 1), errno::EIO);
        assert_errno(view.block_status(0, SIZE), errno::EIO);
        assert!(view.broken().unwrap().contains("leaves out"), "{:?}", view.broken());
        assert_errno(fleece.complete_snapshot("s", Some("c")), errno::EIO);
        fleece.cancel_snapshot("s").unwrap();
        let again = take(&fleece, "t", "swap");
        assert_view(&again.views()[0], &without(live(&fleece, "a")));
    }
}

#[test]
fn nothing_is_left_out_where_that_cannot_be_known_or_kept() {
    // A system that hibernated into it.
    let host = host(&["a"]);
    host.files["a"].image.write_at(b"S1SUSPEND\0", SWAP.0 + 4086).unwrap();
    let fleece = host.mount();
    let snapshot = take(&fleece, "s", "swap");
    assert_eq!(snapshot.views()[0].skipped(), None);
    assert_view(&snapshot.views()[0], &live(&fleece, "a"));

    // The list of it cannot be kept.
    let host = self::host(&["a"]);
    let fleece = host.mount();
    host.files["a"].store_faults.fail_all(Call::Write, errno::ENOSPC);
    let snapshot = take(&fleece, "s", "swap");
    host.clear_faults();
    assert_eq!(snapshot.views()[0].skipped(), None);
    assert_view(&snapshot.views()[0], &live(&fleece, "a"));
}

/// A snapshot that is not committed leaves nothing but marks.
#[test]
fn a_snapshot_that_fails_forgets_no_change() {
    let host = host(&["a", "b"]);
    let fleece = host.mount();
    drop(take(&fleece, "t0", ""));
    fleece.complete_snapshot("t0", None).unwrap();
    let mut copies = ["a", "b"].map(|name| live(&fleece, name));
    for n in 1..60 {
        host.files["b"].state_faults.fail_nth(Call::Write, n, errno::EIO);
        let skip = Some(Skip { swap: true, free: false });
        let request = SnapshotRequest { name: format!("s{n}"), skip, ..SnapshotRequest::default() };
        let taken = fleece.create_snapshot(&request).is_ok();
        host.clear_faults();
        fleece.disk("b").unwrap().write(&[n as u8; 512], UNUSED.start + 4096 * (n % 40)).unwrap();
        if taken {
            fleece.cancel_snapshot(&request.name).unwrap();
            break;
        }
        assert!(n < 59, "every call failed");
    }
    let snapshot = take(&fleece, "t1", "");
    for (view, copy) in snapshot.views().iter().zip(&mut copies) {
        apply(copy, view, Some("t0"));
        assert_same(copy, &live(&fleece, view.disk_name()), "the chain");
    }
}

/// A disk whose directory follows only after a kill follows with what is left out.
#[test]
fn all_disks_of_a_snapshot_agree_after_a_kill() {
    let mut both = 0;
    for (n, m) in (1..16).flat_map(|n| (1..24).map(move |m| (n, m))) {
        let host = host(&["a", "b"]);
        let fleece = host.mount();
        let before = without(live(&fleece, "a"));
        let skip = Some(Skip { swap: true, free: false });
        host.files["b"].state_faults.fail_nth(Call::Write, n, errno::EIO);
        host.files["a"].state_faults.fail_nth(Call::Write, m, errno::EIO);
        let request = SnapshotRequest { name: "s".to_owned(), skip, ..SnapshotRequest::default() };
        let taken = fleece.create_snapshot(&request).is_ok();
        drop(fleece);
        host.clear_faults();
        let fleece = host.mount();
        let Ok(snapshot) = fleece.snapshot("s") else { continue };
        both += u32::from(!taken && snapshot.views().len() == 2);
        snapshot.views().iter().for_each(|view| assert_view(view, &before));
    }
    assert!(both > 0, "no kill came between two commits");
}
