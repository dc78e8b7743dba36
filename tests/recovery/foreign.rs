//! Somebody else wrote to the image: every map says everything, with the reason, and no view is trusted.

use crate::rig::*;
use fleecefs::fleece::{DiskSpec, Environment, Fleece, Options};
use fleecefs::storage::Storage;
use fleecefs::storage::mem::MemFile;
use fleecefs::storage::shm::HeapShmRoot;
use std::fs;
use std::io::{Seek, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// More than the slack by which a clock of files may lag.
const PAST_SLACK: Duration = Duration::from_millis(1200);

/// A disk with history: s1 completed, s2 open, and changes after it.
fn story(host: &Host) -> (Arc<Fleece>, Oracle) {
    let fleece = host.mount();
    let mut oracle = Oracle::new(host);
    oracle.write(&fleece, "a", 0, DISK_BYTES, 1).unwrap();
    oracle.freeze(&fleece, "s0").unwrap();
    fleece.complete_snapshot("s0", None).unwrap();
    oracle.write(&fleece, "a", 0, 100, 2).unwrap();
    oracle.freeze(&fleece, "s1").unwrap();
    fleece.complete_snapshot("s1", Some("daily")).unwrap();
    oracle.freeze(&fleece, "s2").unwrap();
    oracle.write(&fleece, "a", GRANULE, 100, 3).unwrap();
    (fleece, oracle)
}

/// Maps over the gap say everything and why; those between older points, and later ones, are exact.
fn check_lost(fleece: &Fleece, oracle: &mut Oracle, image: &MemFile) {
    assert!(fleece.snapshots().is_empty(), "no view is trusted");
    assert!(fleece.disk_infos()[0].tracking.starts_with("everything: "), "{}", fleece.disk_infos()[0].tracking);
    assert!(!fleece.problems().is_empty());
    let names: Vec<String> = fleece.checkpoints().into_iter().map(|info| info.name).collect();
    assert_eq!(names, ["s0", "s1", "s2"], "checkpoints stay");
    assert_eq!(fleece.consumers()[0].checkpoint, "s1");
    oracle.story("a").live = read_image(image);
    let snapshot = oracle.freeze(fleece, "t").unwrap();
    let view = &snapshot.views()[0];
    assert_eq!(view.reference().unwrap().name, "s1");
    assert!(view.full_reason().is_some());
    for since in view.since() {
        let map = view.map(Some(since.uuid)).unwrap();
        assert_eq!(map.dirty_bytes(), view.size(), "since {}", since.name);
        assert!(map.everything().is_some());
    }
    assert!(snapshot.manifest()["disks"][0]["full_reason"].is_string());
    oracle.check(fleece, Allow { more: true, ..EXACT });
    fleece.complete_snapshot("t", Some("daily")).unwrap();
    oracle.write(fleece, "a", 2 * GRANULE, 1, 9).unwrap();
    oracle.freeze(fleece, "u").unwrap();
    let u = view_of(fleece, "u", "a");
    assert!(u.full_reason().is_none());
    assert_eq!(dirty_granules(&extents_since(&u, "t")), [2].into(), "from then on it is exact");
}

#[test]
fn after_a_clean_stop_any_change_of_the_image_means_everything() {
    type Change = fn(&mut MemFile);
    let changes: [(&str, Change); 5] = [
        ("write", |image| image.write_at(b"foreign", 5 * GRANULE).unwrap()),
        ("write of what was there", |image| image.write_at(&pattern(1, 5 * GRANULE, 1), 5 * GRANULE).unwrap()),
        ("discard", |image| image.punch_hole(0, CHUNK).unwrap()),
        ("resize", |image| image.set_len(DISK_BYTES + 512).unwrap()),
        ("another file", |image| {
            let copy = MemFile::new("a.img", DISK_BYTES);
            copy.write_at(&read_image(image), 0).unwrap();
            *image = copy;
        }),
    ];
    for keep in [false, true] {
        for (name, change) in changes {
            let mut host = Host::one().with(|options| options.keep_snapshots = keep);
            let (fleece, mut oracle) = story(&host);
            fleece.close().unwrap();
            drop(fleece);
            change(&mut host.files.get_mut("a").unwrap().image);
            let fleece = host.mount();
            let image = host.files["a"].image.clone();
            println!("{name}, keep {keep}");
            check_lost(&fleece, &mut oracle, &image);
        }
    }
}

#[test]
fn without_a_foreign_writer_a_clean_stop_and_a_kill_are_exact() {
    for clean in [false, true] {
        let host = Host::one();
        let (fleece, mut oracle) = story(&host);
        if clean {
            fleece.close().unwrap();
        }
        drop(fleece);
        let fleece = host.mount();
        assert_eq!(fleece.disk_infos()[0].tracking, if clean { "exact" } else { "exact after a kill" });
        oracle.check_all(&fleece, "probe", EXACT);
    }
}

#[test]
fn after_a_kill_a_later_write_to_the_image_means_everything() {
    let host = Host::one();
    let (fleece, mut oracle) = story(&host);
    drop(fleece);
    std::thread::sleep(PAST_SLACK);
    host.files["a"].image.write_at(b"foreign", 5 * GRANULE).unwrap();
    let fleece = host.mount();
    check_lost(&fleece, &mut oracle, &host.files["a"].image);
}

/// Not every change of the file is a guest write: a resize is ours as well.
#[test]
fn a_resize_of_ours_is_no_foreign_write_after_a_kill() {
    let host = Host::one();
    let (fleece, mut oracle) = story(&host);
    std::thread::sleep(PAST_SLACK);
    oracle.grow(&fleece, "a", DISK_BYTES + GRANULE).unwrap();
    drop(fleece);
    let fleece = host.mount();
    assert_eq!(fleece.disk_infos()[0].tracking, "exact after a kill");
    oracle.check_all(&fleece, "probe", EXACT);
}

/// A disk in real files, with words that outlive the daemon.
struct Real {
    dir: tempfile::TempDir,
    shm: HeapShmRoot,
}

impl Real {
    fn new() -> Real {
        let real = Real { dir: tempfile::tempdir().unwrap(), shm: HeapShmRoot::new() };
        fs::write(real.image(), pattern(1, 0, DISK_BYTES)).unwrap();
        real
    }

    fn image(&self) -> PathBuf {
        self.dir.path().join("a.img")
    }

    fn mount(&self) -> Arc<Fleece> {
        let env = Environment { shm: Arc::new(self.shm.clone()), background: false };
        let fleece = Fleece::with_environment(Options { store_limit: Some(1 << 30), ..Options::default() }, env);
        fleece.add_disk(&DiskSpec { file: self.image(), ..Default::default() }).unwrap();
        fleece
    }

    /// One completed checkpoint and a change after it.
    fn story(&self) -> Arc<Fleece> {
        let fleece = self.mount();
        freeze(&fleece, "s1");
        fleece.complete_snapshot("s1", None).unwrap();
        fleece.disk("a").unwrap().write(&[7; 100], GRANULE).unwrap();
        fleece
    }

    /// What a map since s1 calls dirty, now.
    fn dirty(&self) -> (String, usize) {
        let fleece = self.mount();
        let tracking = fleece.disk_infos()[0].tracking.clone();
        freeze(&fleece, "probe");
        let dirty = dirty_granules(&extents_since(&view_of(&fleece, "probe", "a"), "s1")).len();
        fleece.cancel_snapshot("probe").unwrap();
        fleece.close().unwrap();
        (tracking, dirty)
    }
}

fn overwrite(path: &Path, offset: u64) {
    let mut file = fs::OpenOptions::new().write(true).open(path).unwrap();
    file.seek(std::io::SeekFrom::Start(offset)).unwrap();
    file.write_all(b"foreign").unwrap();
}

#[test]
fn on_real_files_a_clean_stop_is_exact_until_somebody_writes() {
    let real = Real::new();
    real.story().close().unwrap();
    assert_eq!(real.dirty(), ("exact".to_owned(), 1));
    let modified = fs::metadata(real.image()).unwrap().modified().unwrap();
    overwrite(&real.image(), 5 * GRANULE);
    // A copying tool that puts the time of modification back does not hide it.
    fs::File::options().write(true).open(real.image()).unwrap().set_modified(modified).unwrap();
    let (tracking, dirty) = real.dirty();
    assert!(tracking.starts_with("everything"), "{tracking}");
    assert_eq!(dirty, 7);
}

#[test]
fn on_real_files_an_image_that_was_replaced_means_everything() {
    let real = Real::new();
    real.story().close().unwrap();
    let copy = real.dir.path().join("copy");
    fs::copy(real.image(), &copy).unwrap();
    fs::rename(&copy, real.image()).unwrap();
    let (tracking, dirty) = real.dirty();
    assert!(tracking.starts_with("everything"), "{tracking}");
    assert_eq!(dirty, 7);
}

#[test]
fn on_real_files_a_kill_is_exact_until_somebody_writes() {
    let real = Real::new();
    drop(real.story());
    assert_eq!(real.dirty(), ("exact after a kill".to_owned(), 1));
    let fleece = real.mount();
    fleece.disk("a").unwrap().write(&[8; 100], 2 * GRANULE).unwrap();
    drop(fleece);
    std::thread::sleep(PAST_SLACK);
    overwrite(&real.image(), 5 * GRANULE);
    let (tracking, dirty) = real.dirty();
    assert!(tracking.starts_with("everything"), "{tracking}");
    assert_eq!(dirty, 7);
}

#[test]
fn a_foreign_write_while_the_disk_is_served_breaks_the_views_and_the_next_map_says_everything() {
    for cut in [false, true] {
        let host = Host::new(&["a"], DISK_BYTES);
        let (fleece, _oracle) = story(&host);
        std::thread::sleep(PAST_SLACK);
        let image = &host.files["a"].image;
        if cut {
            image.set_len(DISK_BYTES / 2).unwrap()
        } else {
            image.write_at(b"foreign", 5 * GRANULE).unwrap()
        }
        let snapshot = freeze(&fleece, "t");
        assert!(snapshot.views()[0].full_reason().is_some(), "cut: {cut}");
        assert!(fleece.snapshot("s2").unwrap().broken().is_some(), "it was frozen before");
        assert!(fleece.snapshot("t").unwrap().broken().is_none(), "it was frozen after");
        let map = snapshot.views()[0].map(snapshot.views()[0].reference().map(|point| point.uuid)).unwrap();
        assert_eq!(map.dirty_bytes(), snapshot.views()[0].size());
        assert!(!fleece.problems().is_empty());
    }
}

#[test]
fn a_foreign_write_before_a_clean_stop_is_not_forgotten_by_it() {
    let host = Host::new(&["a"], DISK_BYTES);
    let (fleece, _oracle) = story(&host);
    std::thread::sleep(PAST_SLACK);
    host.files["a"].image.write_at(b"foreign", 5 * GRANULE).unwrap();
    fleece.close().unwrap();
    let fleece = host.mount();
    let snapshot = freeze(&fleece, "t");
    assert!(snapshot.views()[0].full_reason().is_some());
}
