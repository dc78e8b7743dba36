//! Tracking that is lost while a disk is served: the note on the image, the policy for changes that cannot be recorded, and
//! what status says.

use crate::blank;
use crate::rig::*;
use fleecefs::error::{Error, Result, errno};
use fleecefs::fleece::{Environment, Event, Fleece, Options, Place, TrackingErrorPolicy};
use fleecefs::image::persistent::LOST_MARK;
use fleecefs::image::qcow2::read_header;
use fleecefs::image::raw::RawImage;
use fleecefs::image::{Image, NOTE};
use fleecefs::storage::crash::CrashDisk;
use fleecefs::storage::faulty::{Call, FaultPlan, Faulty};
use fleecefs::storage::shm::HeapShmRoot;
use fleecefs::storage::{BlockStatus, Dir, MemDir, MemFile, SharedStorage, Stamp, Storage};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

const PAST_SLACK: Duration = Duration::from_millis(1200);

fn failure() -> Error {
    Error::new(errno::ENOSPC, "write", "the state directory is full")
}

/// One completed checkpoint and a change after it.
fn story(host: &Host) -> Arc<Fleece> {
    let fleece = host.mount();
    freeze(&fleece, "s1");
    fleece.complete_snapshot("s1", None).unwrap();
    fleece.disk("a").unwrap().write(&[7; 100], GRANULE).unwrap();
    fleece
}

fn note(host: &Host) -> Option<String> {
    let note = host.files["a"].image.attribute(NOTE).unwrap();
    note.map(|why| String::from_utf8(why).unwrap())
}

fn tracking(fleece: &Fleece) -> String {
    fleece.disk_infos()[0].tracking.clone()
}

/// Everything since s1 is what the next map says, and why.
fn check_everything(fleece: &Fleece, why: &str) {
    let info = fleece.disk_infos().remove(0);
    let lost = info.tracking_lost.unwrap_or_else(|| panic!("not lost: {}", info.tracking));
    assert!(lost.reason.contains(why) && info.tracking.contains(why), "{lost:?}");
    assert!(lost.since.starts_with("20") && lost.since.ends_with('Z'), "{lost:?}");
    assert!(fleece.problems().iter().any(|problem| problem.contains(why)), "{:?}", fleece.problems());
    let probe = format!("probe{}", fleece.checkpoints().len());
    freeze(fleece, &probe);
    let view = view_of(fleece, &probe, "a");
    assert_eq!(dirty_granules(&extents_since(&view, "s1")).len(), 7);
    assert!(view.full_reason().unwrap().contains(why));
    fleece.complete_snapshot(&probe, None).unwrap();
}

#[test]
fn where_the_guest_goes_on_the_image_bears_a_note_before_its_write() {
    for clean in [false, true] {
        let host = Host::one();
        let fleece = story(&host);
        let disk = fleece.disk("a").unwrap();
        disk.tracking_failed(&failure()).unwrap();
        assert!(note(&host).unwrap().contains("the state directory is full"));
        disk.write(&[8; 100], 3 * GRANULE).unwrap();
        disk.tracking_failed(&failure()).unwrap();
        assert_eq!((counter(&fleece, "tracking_errors"), counter(&fleece, "tracking_lost")), (2, 1));
        check_everything(&fleece, "the state directory is full");
        assert_eq!(tracking(&fleece), "exact since 'probe1'");
        assert_eq!(note(&host), None, "all of the disk is armed with the new checkpoint");
        disk.tracking_failed(&failure()).unwrap();
        assert!(note(&host).is_some());
        if clean {
            fleece.close().unwrap();
            assert_eq!(note(&host), None, "all is durable, and the directory has the reason");
        }
        drop((disk, fleece));
        let fleece = host.mount();
        assert_eq!(note(&host), None, "the directory has it by now");
        check_everything(&fleece, "changes could not be recorded: ");
        fleece.close().unwrap();
        drop(fleece);
        assert_eq!(tracking(&host.mount()), "exact");
    }
}

#[test]
fn the_note_goes_only_once_the_directory_says_everything() {
    let mut tried = 0;
    for call in [Call::Write, Call::Sync, Call::Directory, Call::Attribute] {
        for nth in 1.. {
            let host = Host::one();
            let fleece = story(&host);
            fleece.complete_snapshot(freeze(&fleece, "s2").name(), None).unwrap();
            drop(fleece);
            let files = &host.files["a"];
            // The directory knows nothing of it, as where its disk was full.
            files.image.set_attribute(NOTE, Some(b"changes could not be recorded")).unwrap();
            files.clear_faults();
            [&files.state_faults, &files.image_faults].iter().for_each(|plan| plan.fail_nth(call, nth, errno::EIO));
            let opened = host.attach(&host.empty_mount(), "a").is_ok();
            let reached = files.state_faults.calls(call).max(files.image_faults.calls(call)) >= nth;
            files.clear_faults();
            let fleece = host.mount();
            let known = fleece.disk_infos()[0].tracking_lost.is_some();
            assert!(known, "{call:?} {nth}, opened {opened}: {}", tracking(&fleece));
            assert_eq!(note(&host), None);
            tried += 1;
            if !reached {
                break;
            }
        }
    }
    assert!(tried > 10, "{tried}");
}

#[test]
fn where_writes_are_refused_nothing_is_lost() {
    let host = Host::one().with(|options| options.on_tracking_error = TrackingErrorPolicy::FailWrite);
    let fleece = story(&host);
    let e = fleece.disk("a").unwrap().tracking_failed(&failure()).unwrap_err();
    assert_eq!(e.errno(), errno::EIO);
    assert!(e.to_string().contains("the state directory is full"), "{e}");
    assert_eq!((note(&host), fleece.disk_infos()[0].tracking_lost.clone()), (None, None));
    assert!(fleece.problems().iter().any(|problem| problem.contains("writes are refused")), "{:?}", fleece.problems());
    assert_eq!((counter(&fleece, "tracking_errors"), counter(&fleece, "tracking_lost")), (1, 0));
    freeze(&fleece, "probe");
    assert_eq!(dirty_granules(&extents_since(&view_of(&fleece, "probe", "a"), "s1")), [1].into());
}

#[test]
fn a_loss_that_the_directory_cannot_take_is_noted_and_tried_again() {
    let host = Host::one();
    let fleece = story(&host);
    let files = &host.files["a"];
    files.image_faults.fail_all(Call::Sync, errno::EIO);
    files.state_faults.fail_all(Call::Write, errno::EIO);
    assert!(fleece.disk("a").unwrap().flush().is_err());
    assert!(note(&host).unwrap().contains("flush"));
    assert!(fleece.disk_infos()[0].tracking_lost.is_some(), "status knows it all the same");
    files.clear_faults();
    check_everything(&fleece, "a flush of the image failed");
}

#[test]
fn where_there_is_no_place_for_a_note_status_says_so() {
    let host = Host::one();
    let fleece = story(&host);
    host.files["a"].image_faults.fail_all(Call::Attribute, errno::EOPNOTSUPP);
    fleece.disk("a").unwrap().tracking_failed(&failure()).unwrap();
    assert!(fleece.problems().iter().any(|problem| problem.contains("not noted anywhere")), "{:?}", fleece.problems());
    check_everything(&fleece, "the state directory is full");
    assert!(fleece.problems().iter().any(|problem| problem.contains("not noted anywhere")), "it stays so");
}

/// The page cache may have what the medium has not: no interval of the session is known.
#[test]
fn after_a_failed_flush_each_new_checkpoint_begins_lost() {
    let host = Host::one();
    let fleece = story(&host);
    let files = &host.files["a"];
    files.image_faults.fail_nth(Call::Sync, files.image_faults.calls(Call::Sync) + 1, errno::EIO);
    assert!(fleece.disk("a").unwrap().flush().is_err());
    check_everything(&fleece, "a flush of the image failed");
    assert!(tracking(&fleece).starts_with("everything: a flush of the image failed"), "{}", tracking(&fleece));
    freeze(&fleece, "next");
    let view = view_of(&fleece, "next", "a");
    assert_eq!(dirty_granules(&extents_since(&view, "probe1")).len(), 7);
    assert!(view.full_reason().is_some());
}

#[test]
fn an_operator_hears_of_a_loss_once_an_interval() {
    let host = Host::one();
    let fleece = story(&host);
    let heard = Arc::new(AtomicUsize::new(0));
    let count = heard.clone();
    fleece.subscribe(Box::new(move |event| {
        count.fetch_add(usize::from(matches!(event, Event::TrackingLost { .. })), SeqCst);
    }));
    let disk = fleece.disk("a").unwrap();
    for _ in 0..3 {
        disk.tracking_failed(&failure()).unwrap();
    }
    assert_eq!(heard.load(SeqCst), 1);
    freeze(&fleece, "s2");
    disk.tracking_failed(&failure()).unwrap();
    assert_eq!(heard.load(SeqCst), 2);
    // With s2's interval the one before it is that of s1 again, which was lost.
    fleece.cancel_snapshot("s2").unwrap();
    assert!(fleece.disk_infos()[0].tracking_lost.is_some());
}

/// The look at the image comes before the freeze. Who writes in between is in the view, so the interval that ends with
/// it is not known.
#[test]
fn a_foreign_write_while_a_snapshot_is_prepared_counts_before_it() {
    let host = Host::one();
    let fleece = story(&host);
    freeze(&fleece, "s2");
    fleece.complete_snapshot("s2", None).unwrap();
    std::thread::sleep(PAST_SLACK);
    let files = &host.files["a"];
    files.state_faults.stall(Call::Write);
    std::thread::scope(|scope| {
        let taken = scope.spawn(|| freeze(&fleece, "t"));
        let before = files.state_faults.calls(Call::Write);
        wait_for("the snapshot writes its part", || files.state_faults.calls(Call::Write) > before);
        files.image.write_at(b"foreign", 5 * GRANULE).unwrap();
        files.state_faults.release(Call::Write);
        taken.join().unwrap();
    });
    assert!(fleece.snapshot("t").unwrap().broken().is_some());
    let lost: Vec<bool> = fleece.checkpoints().iter().map(|info| info.disks[0].everything.is_some()).collect();
    assert_eq!(lost, [false, true, true], "of s1, s2 and t");
    // Looked for in vain since t, a foreign writer came after it.
    freeze(&fleece, "u");
    std::thread::sleep(PAST_SLACK);
    host.files["a"].image.write_at(b"foreign", 5 * GRANULE).unwrap();
    freeze(&fleece, "v");
    let lost: Vec<bool> = fleece.checkpoints().iter().map(|info| info.disks[0].everything.is_some()).collect();
    assert_eq!(lost, [false, true, true, true, false], "of s1, s2, t, u and v");
}

/// A file that may lose what is not synced, with attributes that are durable when they are set.
#[derive(Debug)]
struct Noted {
    file: SharedStorage,
    note: Arc<Mutex<Option<Vec<u8>>>>,
}

impl Storage for Noted {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.file.read_at(buf, offset)
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.file.write_at(buf, offset)
    }
    fn sync(&self) -> Result<()> {
        self.file.sync()
    }
    fn len(&self) -> Result<u64> {
        self.file.len()
    }
    fn set_len(&self, len: u64) -> Result<()> {
        self.file.set_len(len)
    }
    fn punch_hole(&self, offset: u64, len: u64) -> Result<()> {
        self.file.punch_hole(offset, len)
    }
    fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        self.file.write_zeroes(offset, len)
    }
    fn block_status(&self, offset: u64, len: u64) -> Result<BlockStatus> {
        self.file.block_status(offset, len)
    }
    fn stamp(&self) -> Result<Stamp> {
        self.file.stamp()
    }
    fn attribute(&self, _name: &str) -> Result<Option<Vec<u8>>> {
        Ok(self.note.lock().unwrap().clone())
    }
    fn set_attribute(&self, _name: &str, value: Option<&[u8]>) -> Result<()> {
        *self.note.lock().unwrap() = value.map(<[u8]>::to_vec);
        Ok(())
    }
    fn path(&self) -> &Path {
        self.file.path()
    }
}

/// Whatever a power loss leaves of what was not synced, the note is there, and is believed before anything else.
#[test]
fn a_power_loss_does_not_forget_the_note() {
    for seed in 0..20 {
        let disk = CrashDisk::new();
        let file = disk.open("a.img").unwrap();
        file.set_len(DISK_BYTES).unwrap();
        file.sync().unwrap();
        let (shm, note) = (HeapShmRoot::new(), Arc::new(Mutex::new(None)));
        let mount = |disk: &CrashDisk| {
            let env = Environment { shm: Arc::new(shm.clone()), background: false };
            let fleece = Fleece::with_environment(Options::default(), env);
            let file = Noted { file: disk.open("a.img").unwrap().shared(), note: note.clone() };
            let image = RawImage::over(Arc::new(file), false).unwrap();
            let dir: Arc<dyn Dir> = Arc::new(disk.dir("a.fleece"));
            let place = Place { state: dir.clone(), stores: dir, shm: None, lock: None };
            fleece.attach("a", Arc::new(image), place).unwrap();
            fleece
        };
        let fleece = mount(&disk);
        freeze(&fleece, "s1");
        fleece.complete_snapshot("s1", None).unwrap();
        let live = fleece.disk("a").unwrap();
        live.write(&[7; 100], GRANULE).unwrap();
        freeze(&fleece, "s2");
        fleece.complete_snapshot("s2", None).unwrap();
        live.tracking_failed(&failure()).unwrap();
        // What is not armed is in no map that a power loss leaves.
        live.write(&[8; 100], 3 * GRANULE).unwrap();
        let left = disk.survivors(seed);
        shm.lose_power("boot-2");
        let fleece = mount(&left);
        assert!(tracking(&fleece).contains("changes could not be recorded"), "{}", tracking(&fleece));
        assert!(note.lock().unwrap().is_none());
        freeze(&fleece, "probe");
        let view = view_of(&fleece, "probe", "a");
        assert_eq!(dirty_granules(&extents_since(&view, "s2")).len(), 7);
    }
}

struct Qcow2 {
    image: MemFile,
    state: MemDir,
    shm: HeapShmRoot,
    no_mark: bool,
}

impl Qcow2 {
    fn new() -> Qcow2 {
        let image = MemFile::new("a.qcow2", 0);
        blank::make(image.shared(), DISK_BYTES / 512 * 512);
        Qcow2 { image, state: MemDir::new(), shm: HeapShmRoot::new(), no_mark: false }
    }

    fn mount(&self) -> Arc<Fleece> {
        self.mount_with(&Arc::new(FaultPlan::new()))
    }

    fn mount_with(&self, plan: &Arc<FaultPlan>) -> Arc<Fleece> {
        let env = Environment { shm: Arc::new(self.shm.clone()), background: false };
        let fleece = Fleece::with_environment(Options::default(), env);
        let file = Arc::new(Faulty { inner: self.image.shared(), plan: plan.clone() });
        let image = blank::open_as(file, self.no_mark).unwrap();
        let dir: Arc<dyn Dir> = Arc::new(self.state.clone());
        fleece.attach("a", image, Place { state: dir.clone(), stores: dir, shm: None, lock: None }).unwrap();
        fleece
    }

    /// The mark's UUID and whether it is intact.
    fn mark(&self) -> Option<(uuid::Uuid, bool)> {
        let header = read_header(&self.image).unwrap();
        let bytes = header.extensions.find(0x666c_6565)?;
        Some((uuid::Uuid::from_slice(bytes).unwrap(), header.autoclear_features >> 63 == 1))
    }

    fn story(&self) -> Arc<Fleece> {
        let fleece = self.mount();
        freeze(&fleece, "s1");
        fleece.complete_snapshot("s1", None).unwrap();
        fleece.disk("a").unwrap().write(&[7; 100], GRANULE).unwrap();
        fleece
    }

    fn dirty(&self, fleece: &Fleece) -> usize {
        freeze(fleece, "probe");
        let dirty = dirty_granules(&extents_since(&view_of(fleece, "probe", "a"), "s1")).len();
        fleece.cancel_snapshot("probe").unwrap();
        dirty
    }
}

#[test]
fn a_qcow2_image_is_noted_by_its_mark() {
    for clean in [false, true] {
        let rig = Qcow2::new();
        let fleece = rig.story();
        assert!(rig.mark().unwrap().1);
        assert_eq!(fleece.disk_infos()[0].guards, ["stamp", "mark"]);
        fleece.disk("a").unwrap().tracking_failed(&failure()).unwrap();
        assert_eq!(rig.mark(), Some((LOST_MARK, false)));
        // A look for foreign writers takes it for none.
        freeze(&fleece, "s2");
        assert_eq!(counter(&fleece, "views_broken"), 0);
        let own = |mark: Option<(uuid::Uuid, bool)>| mark.is_some_and(|(mark, intact)| intact && mark != LOST_MARK);
        assert!(own(rig.mark()), "the new checkpoint has all of the disk armed");
        fleece.complete_snapshot("s2", None).unwrap();
        fleece.disk("a").unwrap().tracking_failed(&failure()).unwrap();
        assert_eq!(rig.mark(), Some((LOST_MARK, false)));
        if clean {
            fleece.close().unwrap();
            assert!(own(rig.mark()), "all is durable, and the directory has the reason");
        }
        drop(fleece);
        let fleece = rig.mount();
        assert!(tracking(&fleece).contains("could not be recorded"), "{}", tracking(&fleece));
        let (mark, intact) = rig.mark().unwrap();
        assert!(intact && mark != LOST_MARK, "a session's own again");
        assert_eq!(rig.dirty(&fleece), 7);
        freeze(&fleece, "t");
        fleece.complete_snapshot("t", None).unwrap();
        fleece.close().unwrap();
        drop(fleece);
        assert_eq!(tracking(&rig.mount()), "exact");
    }
}

#[test]
fn without_a_mark_a_qcow2_image_is_left_as_it_is_and_its_stamp_tells() {
    let mut rig = Qcow2::new();
    rig.story().close().unwrap();
    assert!(rig.mark().unwrap().1, "an earlier session marked it");
    rig.no_mark = true;
    for round in 0..3 {
        // From a clean close, from a kill, and again.
        let fleece = rig.mount();
        assert!(tracking(&fleece).starts_with("exact"), "round {round}: {}", tracking(&fleece));
        assert_eq!(rig.mark(), None, "round {round}");
        assert_eq!(fleece.disk_infos()[0].guards, ["stamp"]);
        assert_eq!(rig.dirty(&fleece), 1, "round {round}");
        if round != 0 {
            fleece.close().unwrap();
        }
    }
    assert_eq!(rig.mark(), None);
    // On a copy: a use of the image itself is one of a foreign program.
    let copy = MemFile::new("copy", 0);
    copy.write_at(&read_image(&rig.image), 0).unwrap();
    let image = blank::open_as(copy.shared(), true).unwrap();
    let listed = image.persistent().unwrap().list().unwrap();
    assert!(listed.iter().all(|stored| stored.name != "s1"), "no checkpoint's bitmap: {listed:?}");
    rig.image.write_at(&[1], rig.image.len().unwrap() - 1).unwrap();
    let fleece = rig.mount();
    assert!(tracking(&fleece).starts_with("everything: "), "{}", tracking(&fleece));
    freeze(&fleece, "s2");
    // The note is an attribute of the file then.
    fleece.disk("a").unwrap().tracking_failed(&failure()).unwrap();
    assert!(rig.image.attribute(NOTE).unwrap().is_some());
    assert_eq!(rig.mark(), None);
    drop(fleece);
    rig.no_mark = false;
    let fleece = rig.mount();
    assert!(tracking(&fleece).contains("could not be recorded"), "{}", tracking(&fleece));
    assert!(rig.mark().unwrap().1 && rig.image.attribute(NOTE).unwrap().is_none());
}

/// The mark is taken away when a session begins. Whatever write fails on the way, or is the last one before a kill, the next
/// open, with or without marks, is exact or says everything, and here nobody wrote.
#[test]
fn a_mark_that_is_taken_away_can_be_cut_off_anywhere() {
    for (nth, lasting) in (1..).flat_map(|nth| [(nth, false), (nth, true)]) {
        let mut rig = Qcow2::new();
        rig.story().close().unwrap();
        rig.no_mark = true;
        let plan = Arc::new(FaultPlan::new());
        (nth..nth + if lasting { 100 } else { 1 }).for_each(|n| plan.fail_nth(Call::Write, n, errno::EIO));
        let opened = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| drop(rig.mount_with(&plan)))).is_ok();
        let reached = plan.calls(Call::Write) >= nth;
        plan.clear();
        for no_mark in [true, false] {
            rig.no_mark = no_mark;
            let fleece = rig.mount();
            assert!(tracking(&fleece).starts_with("exact"), "write {nth}, opened {opened}: {}", tracking(&fleece));
            assert_eq!(rig.dirty(&fleece), 1, "write {nth}, opened {opened}");
        }
        if !reached {
            assert!(nth > 1);
            break;
        }
    }
}
