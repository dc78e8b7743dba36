//! What is refused, and with which words. The texts are those of qemu-storage-daemon 10.0.2.

use crate::rig::*;
use crate::steps::*;
use fleecefs::error::errno;
use fleecefs::fleece::{Action, BitmapRef, Fleece};
use fleecefs::image::Image as _;
use fleecefs::image::raw::RawImage;
use fleecefs::storage::MemFile;
use std::sync::Arc;

fn says(fleece: &Fleece, action: Action, text: &str) {
    let before = state(fleece);
    let refused = refused(fleece, std::slice::from_ref(&action));
    assert_eq!((refused.index, refused.text.as_str()), (0, text), "{action:?}");
    assert_eq!(state(fleece), before, "{action:?} changed something");
}

#[test]
fn each_refusal_has_qemus_text() {
    let host = Host::pair();
    let fleece = host.mount();
    apply(&fleece, &[add("a/x"), transient("a/t"), add("b/x")]);
    says(&fleece, add("nope/x"), "Cannot find device='nope' nor node-name='nope'");
    says(&fleece, add("nope/"), "Bitmap name cannot be empty");
    says(&fleece, added("a/", Some(3), false, false), "Bitmap name cannot be empty");
    for granularity in [0, 1, 3, 256, 65537, 1 << 32, u64::MAX] {
        let text = "Granularity must be power of 2 and at least 512";
        says(&fleece, added("a/x", Some(granularity), true, false), text);
    }
    says(&fleece, add("a/x"), "Bitmap already exists: x");
    let long = "n".repeat(1024);
    says(&fleece, add(&format!("a/{long}")), &format!("Bitmap name too long: {long}"));
    says(&fleece, add("a/x\0y"), "Bitmap name cannot contain NUL");
    apply(&fleece, &[add(&format!("a/{}", &long[1..]))]);
    for make in [remove, clear, enable, disable] {
        says(&fleece, make("nope/x"), "Node 'nope' not found");
        says(&fleece, make("a/none"), "Dirty bitmap 'none' not found");
        says(&fleece, make("a/"), "Dirty bitmap '' not found");
    }
    says(&fleece, merge("nope/x", &["a/x"]), "Node 'nope' not found");
    says(&fleece, merge("a/none", &["a/x"]), "Dirty bitmap 'none' not found");
    says(&fleece, merge("a/x", &["a/none"]), "Dirty bitmap 'none' not found");
    says(&fleece, merge("a/x", &["nope/x"]), "Node 'nope' not found");
    says(&fleece, merge("a/x", &["b/none"]), "Dirty bitmap 'none' not found");
    says(&fleece, Action::Abort, "Transaction aborted using Abort action");
    says(&fleece, hold("a/none"), "Dirty bitmap 'none' not found");
    let refused = fleece.bitmap_sha256(&BitmapRef::new("nope", "x")).unwrap_err();
    assert_eq!((refused.text.as_str(), refused.errno), ("Node 'nope' not found", errno::ENOENT));
    assert_eq!(fleece.bitmap_sha256(&bm("a/none")).unwrap_err().text, "Dirty bitmap 'none' not found");
    assert_errno(fleece.bitmaps("nope"), errno::ENOENT);
}

/// What a sidecar cannot keep is told when it is made, not at the stop that should save it.
#[test]
fn a_bitmap_longer_than_an_area_is_not_persistent() {
    let host = Host::one();
    let fleece = host.mount();
    let image = Arc::new(RawImage::over(MemFile::new("huge", 8 << 40).shared(), false).unwrap());
    fleece.attach("huge", image, fleecefs::fleece::Place::in_memory()).unwrap();
    let text = "Can't make bitmap 'x' persistent in 'huge': \
                Too much space will be occupied by the bitmap. Use larger granularity";
    says(&fleece, added("huge/x", Some(512), true, false), text);
    apply(&fleece, &[added("huge/x", Some(64 << 10), true, false)]);
    fleece.close().unwrap();
}

#[test]
fn disks_of_different_sizes_do_not_merge() {
    let host = Host::one();
    let fleece = host.mount();
    let image = Arc::new(RawImage::over(MemFile::new("big", 2 * DISK_BYTES).shared(), false).unwrap());
    fleece.attach("big", image, fleecefs::fleece::Place::in_memory()).unwrap();
    apply(&fleece, &[add("a/x"), add("big/x")]);
    let text = format!(
        "Bitmaps are of different sizes (destination size is {DISK_BYTES}, source size is {}) and can't be merged",
        2 * DISK_BYTES
    );
    says(&fleece, merge("a/x", &["big/x"]), &text);
    says(&fleece, merge("a/x", &["a/x", "big/x"]), &text);
    let before = state(&fleece);
    apply(&fleece, &[merge("a/x", &[]), merge("a/x", &["a/x"])]);
    assert_eq!(state(&fleece), before);
}

#[test]
fn what_a_batch_removes_is_busy_until_it_is_done() {
    let host = Host::one();
    let fleece = host.mount();
    apply(&fleece, &[add("a/x"), add("a/y")]);
    let busy = |name: &str| format!("Bitmap '{name}' is currently in use by another operation and cannot be used");
    for (second, text) in [
        (clear("a/x"), busy("x")),
        (enable("a/x"), busy("x")),
        (disable("a/x"), busy("x")),
        (remove("a/x"), busy("x")),
        (merge("a/x", &["a/y"]), busy("x")),
        (merge("a/y", &["a/x"]), busy("x")),
        (hold("a/x"), busy("x")),
        (add("a/x"), "Bitmap already exists: x".to_owned()),
    ] {
        let refused = refused(&fleece, &[remove("a/x"), second]);
        assert_eq!((refused.index, refused.text), (1, text));
    }
    let both = refused(&fleece, &[remove("a/x"), remove("a/y"), merge("a/y", &["a/x"])]);
    assert_eq!((both.index, both.text), (2, busy("y")), "the target is looked at before the source");
    let missing = refused(&fleece, &[remove("a/y"), merge("a/y", &["a/none"])]);
    assert_eq!(missing.text, "Dirty bitmap 'none' not found");
    assert_eq!(names(&fleece, "a"), ["y", "x"]);
    apply(&fleece, &[remove("a/x")]);
    apply(&fleece, &[add("a/x")]);
    assert_eq!(names(&fleece, "a"), ["x", "y"], "newest first");
}

#[test]
fn a_checkpoints_bitmap_can_be_read_and_nothing_else() {
    let host = Host::one();
    let fleece = host.mount();
    apply(&fleece, &[add("a/x")]);
    freeze(&fleece, "s1");
    touch(&fleece, "a", &[2]);
    freeze(&fleece, "s2");
    touch(&fleece, "a", &[4]);
    for name in ["a/s1", "a/s2"] {
        let short = &name[2..];
        let text = format!("Bitmap '{short}' belongs to checkpoint '{short}' and cannot be modified");
        for make in [remove, clear, enable, disable, hold] {
            says(&fleece, make(name), &text);
        }
        says(&fleece, merge(name, &["a/x"]), &text);
        says(&fleece, add(name), &format!("Bitmap already exists: {short}"));
    }
    assert_eq!(names(&fleece, "a"), ["s2", "s1", "x"]);
    let (old, new) = (info(&fleece, "a/s1"), info(&fleece, "a/s2"));
    assert!(old.checkpoint && old.persistent && !old.recording && new.recording && !new.busy);
    assert_eq!((old.count, new.count, hash(&fleece, "a/s1")), (GRANULE, GRANULE, hash_of(&[2])));
    apply(&fleece, &[add("a/y"), merge("a/y", &["a/s1", "a/s2"])]);
    assert_eq!(hash(&fleece, "a/y"), hash_of(&[2, 4]));
    assert_errno(try_freeze(&fleece, "y", &[], None), errno::EEXIST);
    let refused = refused(&fleece, &[add("a/z"), snapshot("z")]);
    assert_eq!((refused.index, refused.errno), (1, errno::EEXIST));
    let again = crate::steps::refused(&fleece, &[snapshot("t"), snapshot("u")]);
    assert_eq!((again.index, again.text.as_str()), (1, "Only one snapshot can be taken in a transaction"));
}

#[test]
fn default_granularities_are_those_of_qemu() {
    let host = Host::one();
    let fleece = host.mount();
    apply(&fleece, &[added("a/x", None, false, false)]);
    assert_eq!(info(&fleece, "a/x").granularity, 65536);
    let image = Image::new(DISK_BYTES / 512 * 512);
    let fleece = image.mount();
    apply(&fleece, &[added("a/x", None, false, false)]);
    assert_eq!(info(&fleece, "a/x").granularity, 4096, "a cluster");
    assert_eq!(fleece.disk("a").unwrap().size() % 512, 0);
}

#[test]
fn a_qcow2_image_keeps_no_bitmap_that_breaks_its_limits() {
    let image = Image::new(4 * GRANULE);
    let fleece = image.mount();
    let long = "n".repeat(1024);
    let start = |name: &str| format!("Can't make bitmap '{name}' persistent in 'a': ");
    says(&fleece, add(&format!("a/{long}")), &format!("{}Name length exceeds maximum (1023 characters)", start(&long)));
    apply(&fleece, &[added("a/x", Some(1 << 31), true, false)]);
}

#[test]
fn bitmaps_of_an_image_that_is_read_only_cannot_be_changed() {
    let image = Image::new(4 * GRANULE);
    let fleece = image.mount();
    touch(&fleece, "a", &[1]);
    let hash_on = hash(&fleece, "a/on");
    fleece.close().unwrap();
    let file = RawImage::over(image.file.shared(), true).unwrap();
    drop(file);
    let options = fleecefs::image::OpenOptions { read_only: true, ..Default::default() };
    let parts = fleecefs::image::qcow2::Parts { file: image.file.shared(), data: None, backing: None };
    let read_only = Arc::new(fleecefs::image::qcow2::Qcow2Image::over(parts, &options).unwrap());
    assert!(read_only.read_only());
    let fleece = Host::one().empty_mount();
    fleece.attach("a", read_only, fleecefs::fleece::Place::in_memory()).unwrap();
    assert_eq!(hash(&fleece, "a/on"), hash_on);
    assert!(info(&fleece, "a/on").recording && !info(&fleece, "a/off").recording);
    let text = |name: &str| format!("Bitmap '{name}' is readonly and cannot be modified");
    says(&fleece, remove("a/on"), &text("on"));
    says(&fleece, clear("a/off"), &text("off"));
    apply(&fleece, &[transient("a/x"), add("a/p")]);
    says(&fleece, merge("a/on", &["a/x"]), &text("on"));
    apply(&fleece, &[merge("a/p", &["a/on", "a/off"]), disable("a/on"), enable("a/off"), remove("a/x")]);
    assert!(!info(&fleece, "a/on").recording && info(&fleece, "a/off").recording);
    assert!(count(&fleece, "a/p") > 0);
    fleece.close().unwrap();
    let fleece = image.mount();
    assert_eq!(hash(&fleece, "a/on"), hash_on);
    assert_eq!(names(&fleece, "a"), ["off", "on"]);
}
