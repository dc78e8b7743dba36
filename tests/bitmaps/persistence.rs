//! What survives what.

use crate::rig::*;
use crate::steps::*;
use fleecefs::fleece::Fleece;
use fleecefs::image::Image as _;
use fleecefs::storage::Storage;
use std::sync::Arc;

/// Bitmaps of each kind, on a disk of four granules at least.
fn make(fleece: &Fleece) {
    apply(fleece, &[add("a/x"), transient("a/t"), added("a/n", Some(4096), true, false), add("a/d"), add("a/gone")]);
    touch(fleece, "a", &[0, 1]);
    apply(fleece, &[disable("a/d"), clear("a/n"), transient("a/toff"), disable("a/toff")]);
    touch(fleece, "a", &[2]);
    apply(fleece, &[remove("a/gone"), add("a/m"), merge("a/m", &["a/d", "a/t"])]);
    touch(fleece, "a", &[3]);
}

fn check(fleece: &Fleece, more: &[u64]) {
    let with = |granules: &[u64]| hash_of(&granules.iter().chain(more).copied().collect::<Vec<_>>());
    assert_eq!(hash(fleece, "a/x"), with(&[0, 1, 2, 3]));
    assert_eq!(hash(fleece, "a/m"), with(&[0, 1, 2, 3]));
    assert_eq!((hash(fleece, "a/d"), info(fleece, "a/d").recording), (hash_of(&[0, 1]), false));
    assert_eq!((count(fleece, "a/n"), info(fleece, "a/n").granularity), (4096 * (2 + more.len() as u64), 4096));
    let mut all = names(fleece, "a");
    all.retain(|name| !["on", "off"].contains(&name.as_str()));
    assert_eq!(all, ["m", "d", "n", "x"]);
}

fn twice(mount: impl Fn() -> Arc<Fleece>, clean: bool) {
    let fleece = mount();
    make(&fleece);
    if clean {
        fleece.close().unwrap();
    }
    drop(fleece);
    let fleece = mount();
    check(&fleece, &[]);
    touch(&fleece, "a", &[5]);
    if clean {
        fleece.close().unwrap();
    }
    drop(fleece);
    let fleece = mount();
    check(&fleece, &[5]);
    apply(&fleece, &[remove("a/m"), enable("a/d")]);
    touch(&fleece, "a", &[4]);
    if clean {
        fleece.close().unwrap();
    }
    drop(fleece);
    let fleece = mount();
    assert_eq!(hash(&fleece, "a/d"), hash_of(&[0, 1, 4]));
    assert!(!names(&fleece, "a").contains(&"m".to_owned()));
}

#[test]
fn bitmaps_of_a_raw_disk_survive_closes_and_kills() {
    for clean in [true, false] {
        let host = Host::one();
        twice(|| host.mount(), clean);
    }
}

#[test]
fn bitmaps_of_a_qcow2_disk_survive_closes_and_kills() {
    for clean in [true, false] {
        let image = Image::new(7 * GRANULE);
        twice(|| image.mount(), clean);
    }
}

#[test]
fn a_removed_bitmap_is_gone_from_the_image_at_once() {
    let image = Image::new(7 * GRANULE);
    let fleece = image.mount();
    let in_file = || {
        let copy = fleecefs::storage::MemFile::new("copy", 0);
        copy.set_len(image.file.len().unwrap()).unwrap();
        copy.write_at(&read_image(&image.file), 0).unwrap();
        let image = crate::blank::open(copy.shared()).unwrap();
        let listed = image.stored().unwrap().list().unwrap();
        listed.into_iter().map(|stored| stored.name).collect::<Vec<_>>()
    };
    assert_eq!(in_file(), ["on", "off"]);
    apply(&fleece, &[remove("a/on"), add("a/x")]);
    assert_eq!(in_file(), ["off"]);
    touch(&fleece, "a", &[1]);
    drop(fleece);
    // After a kill it does not come back as one whose bits are lost.
    let fleece = image.mount();
    assert_eq!(names(&fleece, "a"), ["x", "off"]);
    apply(&fleece, &[remove("a/off"), remove("a/x")]);
    fleece.close().unwrap();
    let fleece = image.mount();
    assert!(names(&fleece, "a").is_empty());
}

#[test]
fn after_a_power_loss_a_bitmap_that_recorded_says_that_it_is_lost_or_has_every_change() {
    let mut host = Host::one();
    let fleece = host.mount();
    make(&fleece);
    drop(fleece);
    host.lose_power();
    let fleece = host.mount();
    assert_eq!(hash(&fleece, "a/d"), hash_of(&[0, 1]), "a disabled one does not change");
    for name in ["a/x", "a/m"] {
        let found = info(&fleece, name);
        assert!(found.inconsistent && !found.recording || found.count >= 4 * GRANULE, "{found:?}");
        if found.inconsistent {
            let short = &name[2..];
            let text = format!("Bitmap '{short}' is inconsistent and cannot be used");
            for step in [clear(name), enable(name), disable(name), merge(name, &["a/d"]), merge("a/d", &[name])] {
                assert_eq!(refused(&fleece, &[step]).text, text);
            }
        }
    }
    apply(&fleece, &[remove("a/x"), remove("a/m"), remove("a/n")]);
    fleece.close().unwrap();
    assert_eq!(names(&host.mount(), "a"), ["d"]);
}

#[test]
fn a_foreign_writer_makes_bitmaps_of_a_raw_disk_inconsistent() {
    let host = Host::one();
    let fleece = host.mount();
    make(&fleece);
    fleece.close().unwrap();
    drop(fleece);
    std::thread::sleep(std::time::Duration::from_millis(20));
    host.files["a"].image.write_at(b"foreign", 4 * GRANULE).unwrap();
    let fleece = host.mount();
    assert!(info(&fleece, "a/x").inconsistent);
    assert_eq!(hash(&fleece, "a/d"), hash_of(&[0, 1]));
}

#[test]
fn qcow2_bitmaps_follow_their_disk_when_it_grows_and_shrinks() {
    let image = Image::new(7 * GRANULE);
    let mut fleece = image.mount();
    apply(&fleece, &[add("a/x"), add("a/d")]);
    touch(&fleece, "a", &[1, 6]);
    apply(&fleece, &[disable("a/d")]);
    for (size, add_one) in [(9, "a/y9"), (3, "a/y3"), (12, "a/y12")] {
        fleece.resize_disk("a", size * GRANULE).unwrap();
        apply(&fleece, &[add(add_one)]);
        fleece.close().unwrap();
        drop(fleece);
        fleece = image.mount();
        let expected: &[u64] = if size == 9 { &[1, 6] } else { &[1] };
        assert_eq!([hash(&fleece, "a/x"), hash(&fleece, "a/d")], [hash_of(expected), hash_of(expected)], "{size}");
        if size == 9 {
            apply(&fleece, &[remove("a/y9")]);
        }
    }
    touch(&fleece, "a", &[11]);
    assert_eq!([hash(&fleece, "a/x"), hash(&fleece, "a/y3")], [hash_of(&[1, 11]), hash_of(&[11])]);
}
