//! Checkpoints that go from one mount to another: maps go on there, and only where the content is the same.

use crate::rig::*;
use fleecefs::error::errno;
use fleecefs::fleece::Fleece;
use fleecefs::image::qcow2::carrier;
use fleecefs::image::qcow2::extensions::BITMAPS;
use fleecefs::image::qcow2::header::Header;
use fleecefs::image::qcow2::{header_write, read_header};
use fleecefs::storage::Storage;
use fleecefs::storage::faulty::Call;
use fleecefs::storage::os::{self, OsFile};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tempfile::TempDir;

fn touch(fleece: &Fleece, granules: &[u64]) {
    let disk = fleece.disk("a").unwrap();
    granules.iter().for_each(|granule| assert_eq!(disk.write(&[7; 600], granule * GRANULE + 512).unwrap(), 600));
}

fn point(fleece: &Fleece, name: &str) {
    freeze(fleece, name);
    fleece.complete_snapshot(name, None).unwrap();
}

fn names(fleece: &Fleece) -> Vec<String> {
    fleece.checkpoints().into_iter().map(|checkpoint| checkpoint.name).collect()
}

/// What changed since a checkpoint, by a snapshot that goes again.
fn since(fleece: &Fleece, name: &str) -> BTreeSet<u64> {
    freeze(fleece, "look");
    let dirty = dirty_granules(&extents_since(&view_of(fleece, "look", "a"), name));
    fleece.cancel_snapshot("look").unwrap();
    dirty
}

/// A disk with the points `monday` and `tuesday`, both exported, and a host with a copy of the disk.
struct Moved {
    dir: TempDir,
    /// The first mount.
    old: Arc<Fleece>,
    host: Host,
}

impl Moved {
    fn new() -> Moved {
        let dir = tempfile::tempdir().unwrap();
        let first = Host::one();
        let old = first.mount();
        touch(&old, &[0, 5]);
        point(&old, "monday");
        touch(&old, &[1]);
        point(&old, "tuesday");
        touch(&old, &[2]);
        let host = Host::one();
        host.files["a"].image.write_at(&read_image(&first.files["a"].image), 0).unwrap();
        let moved = Moved { dir, old, host };
        for (name, bytes) in [("monday", 2 * GRANULE), ("tuesday", GRANULE)] {
            let info = moved.old.export_checkpoint(name, "a", &moved.file(name)).unwrap();
            assert_eq!((info.checkpoint.as_str(), info.dirty, info.size), (name, bytes, DISK_BYTES));
        }
        moved
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(format!("{name}.qcow2"))
    }
}

/// The import is refused, and nothing of it is left.
#[track_caller]
fn refused(fleece: &Fleece, file: &Path, errno: i32, word: &str) {
    let before = names(fleece);
    let e = assert_errno(fleece.import_checkpoint(file, None), errno);
    assert!(e.to_string().contains(word), "'{word}' is not in: {e}");
    assert_eq!(names(fleece), before);
    assert!(fleece.snapshots().is_empty());
}

#[test]
fn changes_since_an_imported_checkpoint_are_those_of_both_mounts() {
    let moved = Moved::new();
    // Both mounts go on from the same content.
    touch(&moved.old, &[3]);
    let fleece = moved.host.mount();
    for name in ["monday", "tuesday"] {
        let info = fleece.import_checkpoint(&moved.file(name), None).unwrap();
        assert_eq!(info.checkpoint, name);
    }
    assert_eq!(names(&fleece), ["monday", "tuesday"]);
    assert_eq!(since(&fleece, "tuesday"), [2].into());
    touch(&fleece, &[4]);
    assert!(fleece.snapshots().is_empty());
    assert_eq!([since(&fleece, "monday"), since(&fleece, "tuesday")], [[1, 2, 4].into(), [2, 4].into()]);
    assert_eq!(since(&moved.old, "tuesday"), [2, 3].into());
    assert_eq!(names(&moved.old), ["monday", "tuesday"]);
    let uuid = |fleece: &Fleece, index: usize| fleece.checkpoints()[index].uuid;
    assert_eq!([uuid(&fleece, 0), uuid(&fleece, 1)], [uuid(&moved.old, 0), uuid(&moved.old, 1)]);
    // It stays so over a stop and a kill.
    fleece.close().unwrap();
    drop(fleece);
    let fleece = moved.host.mount();
    touch(&fleece, &[0]);
    drop(fleece);
    let fleece = moved.host.mount();
    assert_eq!([since(&fleece, "monday"), since(&fleece, "tuesday")], [[0, 1, 2, 4].into(), [0, 2, 4].into()]);
    // Back to where it was, its name is taken; and once that is free, the content decides.
    refused(&moved.old, &moved.file("monday"), errno::EEXIST, "a checkpoint of that name");
    moved.old.delete_checkpoint("monday").unwrap();
    refused(&moved.old, &moved.file("monday"), errno::ESTALE, "does not hold");
}

#[test]
fn zeros_are_zeros_however_they_are_stored() {
    let moved = Moved::new();
    let zeros = vec![0; GRANULE as usize];
    moved.host.files["a"].image.write_at(&zeros, 3 * GRANULE).unwrap();
    let fleece = moved.host.mount();
    fleece.import_checkpoint(&moved.file("monday"), None).unwrap();
    assert_eq!(since(&fleece, "monday"), [1, 2].into());
}

#[test]
fn one_other_byte_anywhere_refuses_an_import() {
    let moved = Moved::new();
    for at in [0, GRANULE + 512, 3 * GRANULE, 6 * GRANULE + 1233] {
        let image = &moved.host.files["a"].image;
        let mut byte = [0];
        image.read_at(&mut byte, at).unwrap();
        image.write_at(&[byte[0] ^ 1], at).unwrap();
        let fleece = moved.host.mount();
        refused(&fleece, &moved.file("monday"), errno::ESTALE, "does not hold");
        fleece.close().unwrap();
        image.write_at(&byte, at).unwrap();
    }
    let fleece = moved.host.mount();
    touch(&fleece, &[4]);
    refused(&fleece, &moved.file("monday"), errno::ESTALE, "does not hold");
    // A disk that cannot be read proves nothing.
    moved.host.files["a"].image_faults.fail_range(Call::Read, GRANULE..GRANULE + 1, errno::EIO);
    refused(&fleece, &moved.file("monday"), errno::EIO, "");
}

/// The disk held something else before it was brought back to what it is: points of that time have other changes.
#[test]
fn points_and_views_from_before_an_import_do_not_count_from_it() {
    let moved = Moved::new();
    let fleece = moved.host.mount();
    let disk = fleece.disk("a").unwrap();
    let old = read_live(&disk, 3 * GRANULE, 512);
    disk.write(&[9; 512], 3 * GRANULE).unwrap();
    point(&fleece, "other");
    freeze(&fleece, "open");
    disk.write(&old, 3 * GRANULE).unwrap();
    fleece.import_checkpoint(&moved.file("monday"), None).unwrap();
    let points =
        |name: &str| view_of(&fleece, name, "a").since().into_iter().map(|point| point.name).collect::<Vec<_>>();
    assert_eq!(points("open"), ["other"]);
    let later = freeze(&fleece, "later");
    assert_eq!(points("later"), ["other", "open", "monday"]);
    assert_eq!(dirty_granules(&extents_since(later.view("a").unwrap(), "monday")), [1, 2].into());
    assert!(dirty_granules(&extents_since(later.view("a").unwrap(), "other")).contains(&3));
    // Who counts from the newest completed one has read this mount's.
    assert_eq!(later.view("a").unwrap().reference().unwrap().name, "other");
}

/// A reader that keeps no names counts from the newest completed one, which it has read.
#[test]
fn a_snapshot_that_is_completed_after_an_import_is_what_the_next_one_counts_from() {
    let moved = Moved::new();
    let fleece = moved.host.mount();
    let disk = fleece.disk("a").unwrap();
    let old = read_live(&disk, 3 * GRANULE, 512);
    disk.write(&[9; 512], 3 * GRANULE).unwrap();
    freeze(&fleece, "open");
    disk.write(&old, 3 * GRANULE).unwrap();
    fleece.import_checkpoint(&moved.file("monday"), None).unwrap();
    fleece.complete_snapshot("open", None).unwrap();
    let later = freeze(&fleece, "later");
    let view = later.view("a").unwrap();
    assert_eq!(view.reference().unwrap().name, "open");
    assert!(dirty_granules(&extents_since(view, "open")).contains(&3));
}

#[test]
fn what_is_written_during_an_import_is_a_change() {
    let moved = Moved::new();
    let fleece = moved.host.mount();
    let writer = {
        let fleece = fleece.clone();
        std::thread::spawn(move || {
            wait_for("the import begins", || !fleece.snapshots().is_empty() || !fleece.checkpoints().is_empty());
            touch(&fleece, &[4]);
        })
    };
    fleece.import_checkpoint(&moved.file("monday"), None).unwrap();
    writer.join().unwrap();
    assert_eq!(since(&fleece, "monday"), [1, 2, 4].into());
}

#[test]
fn an_export_says_what_it_cannot_know() {
    let moved = Moved::new();
    let old = &moved.old;
    let file = moved.file("new");
    assert_errno(old.export_checkpoint("sunday", "a", &file), errno::ENOENT);
    assert_errno(old.export_checkpoint("monday", "b", &file), errno::ENOENT);
    assert_errno(old.export_checkpoint("monday", "a", &moved.file("monday")), errno::EEXIST);
    // Somebody else writes to the image.
    let host = Host::one();
    let fleece = host.mount();
    point(&fleece, "monday");
    fleece.close().unwrap();
    drop(fleece);
    std::thread::sleep(std::time::Duration::from_millis(20));
    host.files["a"].image.write_at(b"foreign", 0).unwrap();
    let fleece = host.mount();
    assert_errno(fleece.export_checkpoint("monday", "a", &file), errno::ESTALE);
    assert!(!file.exists() && fleece.bitmaps("a").unwrap().iter().all(|info| info.checkpoint));
}

/// Nobody looks for foreign writers there, so what its checkpoints know proves nothing elsewhere.
#[test]
fn a_read_only_disk_exports_no_checkpoint() {
    let moved = Moved::new();
    let fleece = moved.host.empty_mount();
    moved.host.attach_as(&fleece, "a", true).unwrap();
    point(&fleece, "here");
    let file = moved.file("new");
    assert_errno(fleece.export_checkpoint("here", "a", &file), errno::EROFS);
    assert!(!file.exists());
}

/// Its digest may have what no bit stands for: the file would be believed where that content is.
#[test]
fn an_export_during_which_somebody_else_writes_is_none() {
    let moved = Moved::new();
    let (faults, file) = (&moved.host.files["a"].image_faults, moved.file("new"));
    let fleece = moved.host.mount();
    point(&fleece, "here");
    faults.clear();
    faults.stall(Call::Read);
    let export = {
        let (fleece, file) = (fleece.clone(), file.clone());
        std::thread::spawn(move || fleece.export_checkpoint("here", "a", &file))
    };
    wait_for("the view is read", || faults.calls(Call::Read) > 0);
    // Past the slack that times have (doc/foreign.md).
    std::thread::sleep(std::time::Duration::from_millis(1200));
    moved.host.files["a"].image.write_at(b"foreign", 4 * GRANULE).unwrap();
    faults.release(Call::Read);
    assert_errno(export.join().unwrap(), errno::ESTALE);
    assert!(!file.exists());
}

#[test]
fn a_file_that_is_not_as_it_was_exported_is_refused() {
    let moved = Moved::new();
    let fleece = moved.host.mount();
    let file = moved.file("monday");
    let other = Host::new(&["b", "c"], DISK_BYTES).mount();
    let e = assert_errno(other.import_checkpoint(&file, None), errno::ENOENT);
    assert!(e.hint_text().unwrap().contains("--disk"), "{e}");
    let small = Host::new(&["a"], GRANULE).mount();
    refused(&small, &file, errno::EINVAL, "bytes");
    // Bits were cleared since, or stand for other places.
    let carried = carrier::read(&file).unwrap();
    let changed = moved.file("changed");
    for (granularity_bits, word) in [(17, carried.words[0]), (16, carried.words[0] & !2)] {
        let words = &[word];
        let bitmap = fleecefs::image::persistent::NewBitmap { name: "monday", granularity_bits, auto: false, words };
        let _ = std::fs::remove_file(&changed);
        carrier::write(&changed, DISK_BYTES, bitmap, &carried.note).unwrap();
        refused(&fleece, &changed, errno::EINVAL, "changed since");
    }
    let open = |file: &Path| OsFile::open(file, &os::OpenOptions { write: true, ..Default::default() }).unwrap();
    let without = |kind: u32| {
        let gone = |header: &mut Header| {
            header.extensions.remove(kind);
            header.autoclear_features = 0;
        };
        header_write::update(&open(&changed), gone).unwrap();
    };
    without(BITMAPS);
    refused(&fleece, &changed, errno::EINVAL, "bitmap was removed");
    without(carrier::NOTE);
    refused(&fleece, &changed, errno::EINVAL, "checkpoint export");
    assert!(read_header(&open(&file)).unwrap().extensions.find(carrier::NOTE).is_some());
    // Names stand for one thing.
    fleece
        .apply(&[fleecefs::fleece::Action::Add {
            disk: "a".into(),
            name: "monday".into(),
            granularity: None,
            persistent: false,
            disabled: false,
        }])
        .unwrap();
    refused(&fleece, &file, errno::EEXIST, "a bitmap of that name");
}
