//! What must hold of an image that a crash has left.
//!
//! 1. As it lies there it can be read, and each sector holds what the disk may hold. Where the dirty bit is clear, or
//!    there is none (version 2), at most clusters are lost: no corruption.
//! 2. Opened for writing it is repaired, which changes no byte that the guest sees; after the close a check finds
//!    nothing at all.
//! 3. Internal snapshots and stored bitmaps are what they were; one that records, and says that its bits count, has not
//!    missed a change.
//! 4. A crash in the midst of the repair changes nothing of that.
//! 5. A session on it is as right as on any image, and survives crashes too.

use crate::driver::{self, Files};
use crate::images::{Bitmap, GRANULE, Prepared, RECORDING, bitmaps_of, bytes_of};
use crate::oracle::{Loss, Oracle};
use crate::recorder::{Log, Medium};
use crate::session::{Dice, play, story};
use fleecefs::image::Image;
use fleecefs::image::qcow2::check::{Report, check};
use fleecefs::image::qcow2::read_header;

/// How much to ask of one image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Depth {
    /// 1 to 3.
    Image,
    /// Also 4.
    Repair,
    /// All.
    Session,
}

/// Judges what a crash at `instant` of the session that `oracle` watched has left; gives what the guest sees.
pub fn judge(
    prepared: &Prepared,
    left: &Medium,
    oracle: &Oracle,
    (instant, loss): (usize, Loss),
    (depth, seed): (Depth, u64),
) -> Vec<u8> {
    let mut dice = Dice::new(seed);
    let before = look(prepared, left);
    if let Err(why) = oracle.judge(&before, instant, loss) {
        panic!("{why}");
    }
    let repaired = left.kill();
    let log = Log::default();
    let content = open_and_close(prepared, &log.watch(&repaired.files(), prepared.recipe.direct));
    assert_same(&content, &before, "the repair changes the disk");
    assert_intact(prepared, &repaired, &content);
    if loss == Loss::Kill {
        flush_what_was_there(prepared, left, &before, seed);
        repaired.sync();
    }
    if depth != Depth::Image {
        let events = log.events();
        let cut = dice.roll(events.len() as u64 + 1) as usize;
        let half = left.kill();
        events[..cut].iter().for_each(|event| half.apply(event));
        // After a kill, what the guest wrote may not be durable yet.
        let half = if loss == Loss::Kill || dice.roll(3) == 0 { half } else { half.survivor(seed) };
        assert_same(&look(prepared, &half), &before, "a crash in the repair changes the disk");
        assert_same(&open_and_close(prepared, &half.files()), &before, "a second repair changes the disk");
        assert_intact(prepared, &half, &before);
    }
    if depth == Depth::Session {
        session(prepared, &repaired, &content, &mut dice);
    }
    content
}

/// A flush of the next process makes durable what the killed one wrote.
fn flush_what_was_there(prepared: &Prepared, left: &Medium, content: &[u8], seed: u64) {
    let medium = left.kill();
    let image = driver::read_write(&medium.files(), prepared, false).unwrap();
    image.flush().unwrap();
    drop(image);
    assert_same(&look(prepared, &medium.survivor(seed)), content, "flushed after a restart, then lost");
}

/// Reads an image as it lies there.
fn look(prepared: &Prepared, medium: &Medium) -> Vec<u8> {
    let files = medium.files();
    let report = check(&*files.image).unwrap();
    let dirty = report.dirty && !prepared.recipe.is_v2();
    assert!(dirty || report.corruptions == 0, "not dirty, but corrupt: {:?}", findings(&report));
    let content = bytes_of(&driver::read_only(&files, prepared, None).unwrap());
    content.unwrap_or_else(|e| panic!("{e}; {:?}", findings(&report)))
}

fn findings(report: &Report) -> Vec<&str> {
    report.findings.iter().map(|finding| &*finding.text).collect()
}

/// Opens an image for writing, reads it and closes it.
fn open_and_close(prepared: &Prepared, files: &Files) -> Vec<u8> {
    let image = driver::read_write(files, prepared, false).unwrap();
    let content = bytes_of(&image).unwrap();
    image.close().unwrap();
    drop(image);
    assert_same(&bytes_of(&driver::read_only(files, prepared, None).unwrap()).unwrap(), &content, "after the close");
    content
}

/// An image that was closed has no fault, and its snapshots and bitmaps.
fn assert_intact(prepared: &Prepared, medium: &Medium, content: &[u8]) {
    let files = medium.files();
    let report = check(&*files.image).unwrap();
    assert!(report.is_clean() && !report.dirty, "after the repair: dirty {}, {:?}", report.dirty, findings(&report));
    for (name, old) in &prepared.snapshots {
        let snapshot = driver::read_only(&files, prepared, Some(name)).unwrap();
        assert_same(&bytes_of(&snapshot).unwrap(), old, &format!("internal snapshot {name}"));
    }
    assert_eq!(read_header(&*files.image).unwrap().nb_snapshots as usize, prepared.snapshots.len());
    let bitmaps = bitmaps_of(&*files.image);
    assert_eq!(bitmaps.len(), prepared.bitmaps.len());
    for (now, old) in bitmaps.iter().zip(&prepared.bitmaps) {
        assert_eq!(now.name, old.name);
        if now.name != RECORDING {
            assert_eq!(now.words, old.words, "bitmap {}", now.name);
        } else if now.good {
            assert_recorded(&now.words, old, &prepared.content, content);
        }
    }
}

/// What differs is in the bitmap.
fn assert_recorded(words: &[u64], old: &Bitmap, before: &[u8], now: &[u8]) {
    assert!(words.iter().zip(&old.words).all(|(now, old)| now & old == *old), "bits are gone");
    let granule = GRANULE as usize;
    for (index, (one, other)) in before.chunks(granule).zip(now.chunks(granule)).enumerate() {
        assert!(one == other || words[index / 64] >> (index % 64) & 1 == 1, "granule {index} is not in the bitmap");
    }
}

/// The guest goes on, and that session ends in a crash as well.
fn session(prepared: &Prepared, medium: &Medium, content: &[u8], dice: &mut Dice) {
    let most = (content.len() as u64).max(prepared.content.len() as u64 * 3 / 2);
    let later = medium.kill();
    let seed = (1 << 30) + dice.roll(1 << 30);
    let recording = play(prepared, &later.files(), Oracle::new(content, most), seed, 6);
    let events = &recording.events;
    assert_intact(prepared, &later, &recording.oracle.bytes(0..recording.oracle.size()));
    let crashed = medium.kill();
    let cut = dice.roll(events.len() as u64 + 1) as usize;
    events[..cut].iter().for_each(|event| crashed.apply(event));
    let (crashed, loss) = if dice.roll(4) == 0 { (crashed, Loss::Kill) } else { (crashed.survivor(seed), Loss::Power) };
    let found = look(prepared, &crashed);
    if let Err(why) = recording.oracle.judge(&found, cut, loss) {
        panic!(
            "in a session after the crash, cut at {cut} ({loss:?}): {why}\n{}",
            story(prepared, &recording.steps, cut)
        );
    }
    assert_same(&open_and_close(prepared, &crashed.files()), &found, "the second crash's repair");
    assert_intact(prepared, &crashed, &found);
}

fn assert_same(one: &[u8], other: &[u8], what: &str) {
    if one == other {
        return;
    }
    assert_eq!(one.len(), other.len(), "{what}: length");
    if let Some(at) = (0..one.len()).find(|at| one[*at] != other[*at]) {
        let piece = |all: &[u8]| all[at..all.len().min(at + 24)].to_vec();
        panic!("{what}: byte {at}: {:?}, not {:?}", piece(one), piece(other));
    }
}
