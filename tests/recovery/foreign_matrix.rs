//! What somebody else may do to an image while nobody serves it, by how that came and by kind of image: found out, harmless,
//! or not to be seen. `doc/foreign.md` has the same table; it must not promise more.

use crate::blank;
use crate::rig::*;
use fleecefs::error::Result;
use fleecefs::fleece::{BlockDevicePolicy, Environment, Fleece, Options, Place};
use fleecefs::image::qcow2::{Parts, Qcow2Image};
use fleecefs::image::raw::RawImage;
use fleecefs::image::{Format, Image, OpenOptions};
use fleecefs::storage::faulty::Call;
use fleecefs::storage::os::{OpenOptions as FileOptions, OsFile};
use fleecefs::storage::shm::HeapShmRoot;
use fleecefs::storage::{BlockStatus, OsDir, SharedStorage, Stamp, Storage};
use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

const SIZE: u64 = 6 * GRANULE;
/// More than the slack by which a clock of files may lag.
const PAST_SLACK: Duration = Duration::from_millis(1200);

#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
    Raw,
    Qcow2,
    /// A qcow2 image without our mark.
    Unmarked,
    /// A block device under the default.
    Device,
    /// One that is trusted.
    Trusted,
}

const KINDS: [Kind; 5] = [Kind::Raw, Kind::Qcow2, Kind::Unmarked, Kind::Device, Kind::Trusted];

#[derive(Debug, Clone, Copy, PartialEq)]
enum Stop {
    Clean,
    /// Killed, and the deed comes later than the slack.
    Killed,
    /// Killed, and the deed comes at once.
    JustKilled,
}

const STOPS: [Stop; 3] = [Stop::Clean, Stop::Killed, Stop::JustKilled];

#[derive(Debug, Clone, Copy, PartialEq)]
enum Deed {
    Nothing,
    /// Bytes of the file change.
    Written,
    /// They are written as they are.
    WrittenSame,
    /// An older content comes back into the file, with the older time.
    Restored,
    /// An older file comes back under the name, with the older time.
    RestoredFile,
    Punched,
    Longer,
    Shorter,
    /// A copy of the file takes its place.
    Replaced,
    /// Image and state are copied elsewhere, and used there.
    Copied,
    /// Both are moved, and used there.
    Moved,
    ModeChanged,
    BackingWritten,
}

const DEEDS: [Deed; 13] = [
    Deed::Nothing,
    Deed::Written,
    Deed::WrittenSame,
    Deed::Restored,
    Deed::RestoredFile,
    Deed::Punched,
    Deed::Longer,
    Deed::Shorter,
    Deed::Replaced,
    Deed::Copied,
    Deed::Moved,
    Deed::ModeChanged,
    Deed::BackingWritten,
];

#[derive(Debug, Clone, Copy, PartialEq)]
enum Verdict {
    Exact,
    Everything,
    /// Either: nothing shows it for sure, as `doc/foreign.md` says.
    Open,
    /// Cannot happen to this kind.
    None,
}

fn verdict(deed: Deed, stop: Stop, kind: Kind) -> Verdict {
    use Verdict::*;
    let (device, qcow2) = (matches!(kind, Kind::Device | Kind::Trusted), matches!(kind, Kind::Qcow2 | Kind::Unmarked));
    let file_only =
        [Deed::RestoredFile, Deed::Longer, Deed::Shorter, Deed::Replaced, Deed::Copied, Deed::Moved, Deed::ModeChanged];
    match (deed, stop, kind) {
        (Deed::BackingWritten, ..) if !qcow2 => None,
        (Deed::Shorter, ..) if qcow2 => None,
        (deed, ..) if device && file_only.contains(&deed) => None,
        (_, _, Kind::Device) => Everything,
        (Deed::Nothing, ..) => Exact,
        // Nothing shows it.
        (_, _, Kind::Trusted) => Exact,
        (_, Stop::Clean | Stop::Killed, _) => Everything,
        // Another file, however soon.
        (Deed::RestoredFile | Deed::Replaced | Deed::Copied, Stop::JustKilled, _) => Everything,
        (Deed::Longer | Deed::Shorter, Stop::JustKilled, Kind::Raw) => Everything,
        (_, Stop::JustKilled, _) => Open,
    }
}

/// A file that tells of its writers as little as a block device does.
#[derive(Debug)]
struct Device(RawImage);

impl Image for Device {
    fn size(&self) -> u64 {
        self.0.size()
    }
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.0.read_at(buf, offset)
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.0.write_at(buf, offset)
    }
    fn write_zeroes(&self, offset: u64, len: u64, discard: bool) -> Result<()> {
        self.0.write_zeroes(offset, len, discard)
    }
    fn flush(&self) -> Result<()> {
        self.0.flush()
    }
    fn resize(&self, size: u64) -> Result<()> {
        self.0.resize(size)
    }
    fn block_status(&self, offset: u64, len: u64) -> Result<BlockStatus> {
        self.0.block_status(offset, len)
    }
    fn stamp(&self) -> Result<Stamp> {
        Ok(Stamp { dev: 0, ino: 0, size: self.0.size(), mtime_ns: 0, ctime_ns: 0 })
    }
    fn format(&self) -> Format {
        Format::Raw
    }
    fn path(&self) -> &Path {
        self.0.path()
    }
    fn read_only(&self) -> bool {
        false
    }
    fn is_block_device(&self) -> bool {
        true
    }
}

fn file(path: &Path) -> OsFile {
    OsFile::open(path, &FileOptions { write: true, ..Default::default() }).unwrap()
}

struct Rig {
    dir: tempfile::TempDir,
    shm: HeapShmRoot,
    kind: Kind,
}

impl Rig {
    fn new(kind: Kind) -> Rig {
        let rig = Rig { dir: tempfile::tempdir().unwrap(), shm: HeapShmRoot::new(), kind };
        fs::create_dir(rig.home("here")).unwrap();
        fs::write(rig.home("base"), pattern(1, 0, SIZE)).unwrap();
        let image = rig.image("here");
        fs::write(&image, pattern(1, 0, SIZE)).unwrap();
        if rig.is_qcow2() {
            blank::make(Arc::new(file(&image)), SIZE);
        }
        rig
    }

    fn is_qcow2(&self) -> bool {
        matches!(self.kind, Kind::Qcow2 | Kind::Unmarked)
    }

    fn home(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn image(&self, home: &str) -> PathBuf {
        self.home(home).join("a.img")
    }

    fn mount(&self, home: &str) -> Arc<Fleece> {
        let block_devices =
            if self.kind == Kind::Trusted { BlockDevicePolicy::Trust } else { BlockDevicePolicy::Distrust };
        let env = Environment { shm: Arc::new(self.shm.clone()), background: false };
        let options = Options { block_devices, store_limit: Some(1 << 30), keep_snapshots: true, ..Options::default() };
        let fleece = Fleece::with_environment(options, env);
        let path = self.image(home);
        let storage: SharedStorage = Arc::new(file(&path));
        let image: Arc<dyn Image> = match self.kind {
            Kind::Raw => Arc::new(RawImage::over(storage, false).unwrap()),
            Kind::Device | Kind::Trusted => Arc::new(Device(RawImage::over(storage, false).unwrap())),
            Kind::Qcow2 | Kind::Unmarked => {
                let base = RawImage::over(Arc::new(file(&self.home("base"))), true).unwrap();
                let options = OpenOptions {
                    keeps_bitmaps: true,
                    l2_cache_bytes: Some(128 << 10),
                    no_mark: self.kind == Kind::Unmarked,
                    ..OpenOptions::default()
                };
                let parts = Parts { file: storage, data: None, backing: Some(Arc::new(base)) };
                Arc::new(Qcow2Image::over(parts, &options).unwrap())
            }
        };
        let state = Arc::new(OsDir::create(&self.home(home).join("a.img.fleece")).unwrap());
        fleece.attach("a", image, Place { state: state.clone(), stores: state, shm: None, lock: None }).unwrap();
        fleece
    }

    /// A completed checkpoint and an open view, with a change after each; stopped.
    fn story(&self, stop: Stop) {
        let fleece = self.mount("here");
        let disk = fleece.disk("a").unwrap();
        disk.write(&pattern(2, 0, 8192), 5 * GRANULE).unwrap();
        freeze(&fleece, "s1");
        fleece.complete_snapshot("s1", None).unwrap();
        disk.write(&pattern(3, 0, 100), GRANULE).unwrap();
        freeze(&fleece, "s2");
        disk.write(&pattern(4, 0, 100), 3 * GRANULE).unwrap();
        match stop {
            Stop::Clean => fleece.close().unwrap(),
            Stop::Killed => std::thread::sleep(PAST_SLACK),
            Stop::JustKilled => (),
        }
    }

    /// Does it; gives where the image is used from then on.
    fn commit(&self, deed: Deed) -> &'static str {
        let image = self.image("here");
        let modified = fs::metadata(&image).unwrap().modified().unwrap();
        let older = modified - Duration::from_secs(3600);
        let len = fs::metadata(&image).unwrap().len();
        // Guest data, also in a qcow2 image: past the format.
        let data = pattern(2, 0, 4096);
        let at = fs::read(&image).unwrap().chunks(4096).position(|block| block == data).unwrap() as u64 * 4096;
        let plain = || fs::File::options().read(true).write(true).open(&image).unwrap();
        match deed {
            Deed::Nothing => (),
            Deed::Written => plain().write_all_at(&[0xdd; 100], at).unwrap(),
            Deed::WrittenSame => {
                let mut bytes = [0; 100];
                plain().read_exact_at(&mut bytes, at).unwrap();
                plain().write_all_at(&bytes, at).unwrap();
            }
            Deed::Restored => {
                let content = fs::read(&image).unwrap();
                fs::write(&image, &content).unwrap();
                plain().set_modified(older).unwrap();
            }
            Deed::RestoredFile | Deed::Replaced => {
                let copy = self.home("copy");
                fs::copy(&image, &copy).unwrap();
                let time = if deed == Deed::Replaced { modified } else { older };
                fs::File::options().write(true).open(&copy).unwrap().set_modified(time).unwrap();
                fs::rename(&copy, &image).unwrap();
            }
            Deed::Punched => file(&image).punch_hole(at, 4096).unwrap(),
            Deed::Longer => plain().set_len(len + 65536).unwrap(),
            Deed::Shorter => plain().set_len(len - 65536).unwrap(),
            Deed::Copied => {
                copy_dir(&self.home("here"), &self.home("there"));
                return "there";
            }
            Deed::Moved => {
                fs::create_dir(self.home("there")).unwrap();
                fs::rename(&image, self.image("there")).unwrap();
                fs::rename(self.home("here/a.img.fleece"), self.home("there/a.img.fleece")).unwrap();
                return "there";
            }
            Deed::ModeChanged => plain().set_permissions(fs::Permissions::from_mode(0o640)).unwrap(),
            Deed::BackingWritten => {
                fs::File::options().write(true).open(self.home("base")).unwrap().write_all_at(b"new", 0).unwrap();
            }
        }
        "here"
    }
}

fn copy_dir(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for entry in fs::read_dir(from).unwrap().flatten() {
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_dir(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

/// Map, manifest and status say the same; from the next checkpoint on everything is exact again.
fn check_says(fleece: &Fleece, expected: Verdict, what: &str) {
    let info = fleece.disk_infos().remove(0);
    let lost = info.tracking_lost.is_some();
    match expected {
        Verdict::Exact => assert!(!lost, "{what}: {}", info.tracking),
        Verdict::Everything => assert!(lost, "{what}: {}", info.tracking),
        Verdict::Open | Verdict::None => (),
    }
    assert_eq!(info.tracking.starts_with("everything: "), lost, "{what}: {}", info.tracking);
    assert_eq!(fleece.problems().iter().any(|problem| problem.contains("maps say everything")), lost, "{what}");
    assert_eq!(counter(fleece, "tracking_lost"), u64::from(lost), "{what}");
    assert_eq!(fleece.snapshots().is_empty(), lost, "{what}: views are believed with the tracking");
    freeze(fleece, "probe");
    let view = view_of(fleece, "probe", "a");
    let everything = (0..view.size().div_ceil(GRANULE)).collect();
    let exact = [1, 3].into();
    assert_eq!(dirty_granules(&extents_since(&view, "s1")), if lost { everything } else { exact }, "{what}");
    assert_eq!(view.full_reason().is_some(), lost, "{what}");
    fleece.complete_snapshot("probe", None).unwrap();
    let info = fleece.disk_infos().remove(0);
    assert!(info.tracking_lost.is_none() && info.tracking.starts_with("exact"), "{what}: {}", info.tracking);
    assert!(!fleece.problems().iter().any(|problem| problem.contains("maps say everything")), "{what}");
    fleece.disk("a").unwrap().write(&[9; 10], 2 * GRANULE).unwrap();
    freeze(fleece, "again");
    assert_eq!(dirty_granules(&extents_since(&view_of(fleece, "again", "a"), "probe")), [2].into(), "{what}");
}

fn cell(deed: Deed, stop: Stop, kind: Kind) {
    let expected = verdict(deed, stop, kind);
    if expected == Verdict::None {
        return;
    }
    let what = format!("{deed:?}, {stop:?}, {kind:?}");
    let rig = Rig::new(kind);
    rig.story(stop);
    let home = rig.commit(deed);
    if home == "there" {
        // What another image has at the old place is none of ours.
        fs::create_dir_all(rig.home("here/a.img.fleece/layers/5b2cc3b6-0000-4000-8000-000000000000")).unwrap();
    }
    let fleece = rig.mount(home);
    check_says(&fleece, expected, &what);
    assert!(
        home == "here" || rig.home("here/a.img.fleece/layers/5b2cc3b6-0000-4000-8000-000000000000").exists(),
        "{what}: it was removed"
    );
    if deed == Deed::Copied {
        // The copy was used; the original has all that it had.
        let what = format!("{what}: the original");
        check_says(&rig.mount("here"), Verdict::Exact, &what);
    }
    fleece.close().unwrap();
}

/// All cells at once: most of their time is waiting for the slack to pass.
fn run(deeds: &[Deed]) {
    std::thread::scope(|scope| {
        let mut cells = Vec::new();
        for deed in deeds {
            for stop in STOPS {
                for kind in KINDS {
                    cells.push(scope.spawn(move || cell(*deed, stop, kind)));
                }
            }
        }
        let failed = cells.into_iter().filter_map(|cell| cell.join().err()).count();
        assert_eq!(failed, 0, "cells failed, see above");
    });
}

#[test]
fn every_deed_is_found_out_or_named() {
    DEEDS.chunks(5).for_each(run);
}

#[test]
fn nothing_done_is_exact() {
    run(&[Deed::Nothing]);
}

/// A resize that a kill cut off is ours, made or not; any other length is not.
#[test]
fn a_resize_in_flight_is_no_foreign_one() {
    for to in [DISK_BYTES + GRANULE, DISK_BYTES - GRANULE] {
        for (len, ours) in [(DISK_BYTES, true), (to, true), (to + 512, false)] {
            let host = Host::one();
            let fleece = host.mount();
            freeze(&fleece, "s1");
            fleece.complete_snapshot("s1", None).unwrap();
            fleece.reap();
            let files = &host.files["a"];
            let before = files.image_faults.calls(Call::SetLen);
            files.image_faults.stall(Call::SetLen);
            let tracking = std::thread::scope(|scope| {
                scope.spawn(|| fleece.resize_disk("a", to));
                wait_for("the resize", || files.image_faults.calls(Call::SetLen) > before);
                files.image.set_len(len).unwrap();
                // As after a kill: the words are there, and nobody uses them any more.
                let image = RawImage::over(files.image.shared(), false).unwrap();
                let dir = Arc::new(files.state.clone());
                let place = Place { state: dir.clone(), stores: dir, shm: None, lock: None };
                let next = host.empty_mount();
                next.attach("a", Arc::new(image), place).unwrap();
                let tracking = next.disk_infos()[0].tracking.clone();
                files.image_faults.release(Call::SetLen);
                tracking
            });
            assert_eq!(tracking == "exact after a kill", ours, "to {to}, found {len}: {tracking}");
        }
    }
}
