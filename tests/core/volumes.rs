//! Volumes of live disks and of views, and who learns that their table was changed (W1 to W3).

use crate::rig::*;
use fleecefs::error::{Result, errno};
use fleecefs::fleece::{Disk, Fleece, FrozenVolume, LiveVolume, Since};
use fleecefs::storage::dir::MemDir;
use fleecefs::storage::mem::MemFile;
use fleecefs::storage::{BlockStatus, Stamp, Storage};
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

const SECTOR: u64 = 512;
const SIZE: u64 = 16 * GRANULE;
/// Start and length of the partitions.
const P1: (u64, u64) = (GRANULE, 4 * GRANULE);
const P2: (u64, u64) = (8 * GRANULE, 3 * GRANULE + SECTOR);
/// A while in which something that must wait would have happened.
const A_WHILE: Duration = Duration::from_millis(150);
/// As long as nothing that must happen takes.
const LONG: Duration = Duration::from_secs(60);

/// A master boot record with these partitions.
pub fn mbr(partitions: &[(u64, u64)]) -> Vec<u8> {
    let mut sector = vec![0; SECTOR as usize];
    sector[440..444].copy_from_slice(&[1, 2, 3, 4]);
    for (index, (start, len)) in partitions.iter().enumerate() {
        let entry = &mut sector[446 + 16 * index..][..16];
        entry[4] = 0x83;
        entry[8..12].copy_from_slice(&((start / SECTOR) as u32).to_le_bytes());
        entry[12..16].copy_from_slice(&((len / SECTOR) as u32).to_le_bytes());
    }
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    sector
}

/// The header page of a swap area with this label.
pub fn swap(label: &str) -> Vec<u8> {
    let mut page = vec![0; 4096];
    page[1024] = 1;
    page[1028] = 40;
    page[1036..1052].fill(7);
    page[1052..][..label.len()].copy_from_slice(label.as_bytes());
    page[4086..].copy_from_slice(b"SWAPSPACE2");
    page
}

fn partitioned(host: &Host, name: &str) {
    let image = &host.files[name].image;
    image.write_at(&pattern(1, 0, SIZE), 0).unwrap();
    image.write_at(&mbr(&[P1, P2]), 0).unwrap();
}

fn mounted() -> (Arc<Fleece>, Arc<Disk>) {
    let host = Host::new(&["a"], SIZE);
    partitioned(&host, "a");
    let fleece = host.mount();
    let disk = fleece.disk("a").unwrap();
    (fleece, disk)
}

fn live(fleece: &Fleece, disk: &str, name: &str) -> Option<Arc<LiveVolume>> {
    let found = fleece.live_volumes();
    let disk = fleece.disk(disk).unwrap();
    found.of_disk(&disk).find(|volume| volume.volume().name == name).cloned()
}

fn frozen(fleece: &Fleece, snapshot: &str, name: &str) -> Arc<FrozenVolume> {
    let snapshot = fleece.snapshot(snapshot).unwrap();
    let found = snapshot.volumes();
    found.of_view(&snapshot.views()[0]).find(|volume| volume.volume().name == name).cloned().unwrap()
}

fn read(volume: &LiveVolume, offset: u64, len: u64) -> std::result::Result<Vec<u8>, i32> {
    let mut buf = vec![0xee; len as usize];
    let count = volume.read(&mut buf, offset).map_err(|e| e.errno())?;
    buf.truncate(count);
    Ok(buf)
}

fn write(volume: &Arc<LiveVolume>, data: &[u8], offset: u64) -> std::result::Result<usize, i32> {
    let (told, tells) = channel();
    volume.write_then(data, offset, move |count| told.send(count).unwrap());
    tells.recv_timeout(LONG).unwrap().map_err(|e| e.errno())
}

#[test]
fn a_volume_has_the_bytes_of_its_partition_and_no_others() {
    let (fleece, disk) = mounted();
    freeze(&fleece, "s");
    for (name, (start, len)) in [("p1", P1), ("p2", P2)] {
        let volume = live(&fleece, "a", name).unwrap();
        assert_eq!(volume.size(), len);
        assert_eq!(read(&volume, 0, len + 100).unwrap(), read_live(&disk, start, len));
        assert_eq!(read(&volume, len - 3, 100).unwrap(), read_live(&disk, start + len - 3, 3));
        assert_eq!(read(&volume, len, 100).unwrap(), b"");
        let mut bytes = vec![0; len as usize + 10];
        assert_eq!(frozen(&fleece, "s", name).read(&mut bytes, 0).unwrap() as u64, len);
        assert_eq!(bytes[..len as usize], read_live(&disk, start, len));
    }
    assert!(live(&fleece, "a", "p3").is_none());
    let ids: Vec<_> = ["p1", "p2"].map(|name| live(&fleece, "a", name).unwrap().id()).into();
    assert_ne!(ids[0], ids[1]);
    assert_eq!(ids[0], frozen(&fleece, "s", "p1").id(), "by name and place alone");
}

#[test]
fn a_write_to_a_volume_is_a_write_of_the_guest() {
    let (fleece, disk) = mounted();
    freeze(&fleece, "s");
    fleece.complete_snapshot("s", None).unwrap();
    freeze_since(&fleece, "t", Since::Checkpoint("s".into()));
    let volume = live(&fleece, "a", "p2").unwrap();
    let before = read_live(&disk, 0, SIZE);
    assert_eq!(write(&volume, &[9; 100], 10), Ok(100));
    assert_eq!(write(&volume, &[8; 100], P2.1 - 40), Ok(40), "cut at the end");
    for at in [P2.1, P2.1 + 1] {
        assert_eq!(write(&volume, &[8], at), Err(errno::ENOSPC));
    }
    assert_eq!(volume.write_zeroes(P2.1 - 10, 11).unwrap_err().errno(), errno::ENOSPC);
    volume.write_zeroes(GRANULE, 4096).unwrap();
    volume.discard(2 * GRANULE, 4096).unwrap();
    volume.flush().unwrap();
    let mut expected = before.clone();
    let at = |offset: u64, len: u64| (P2.0 + offset) as usize..(P2.0 + offset + len) as usize;
    expected[at(10, 100)].fill(9);
    expected[at(P2.1 - 40, 40)].fill(8);
    expected[at(GRANULE, 4096)].fill(0);
    expected[at(2 * GRANULE, 4096)].fill(0);
    assert!(read_live(&disk, 0, SIZE) == expected);
    assert!(read_view(&view_of(&fleece, "t", "a"), 0, SIZE).unwrap() == before, "preserved");
    freeze(&fleece, "u");
    let dirty = dirty_granules(&extents_since(&view_of(&fleece, "u", "a"), "t"));
    assert_eq!(dirty.into_iter().collect::<Vec<_>>(), [8, 9, 10, 11]);
}

type Change = fn(&Disk) -> Result<()>;

#[test]
fn any_change_of_the_table_makes_open_volumes_stale() {
    let changes: [(&str, Change); 5] = [
        ("another table", |disk| disk.write(&mbr(&[P1]), 0).map(drop)),
        ("the same again", |disk| disk.write(&mbr(&[P1, P2]), 0).map(drop)),
        ("its last byte", |disk| disk.write(&[0xaa], SECTOR - 1).map(drop)),
        ("zeroes", |disk| disk.write_zeroes(0, SECTOR)),
        ("a discard", |disk| disk.discard(0, GRANULE)),
    ];
    for (what, change) in changes {
        let (fleece, disk) = mounted();
        freeze(&fleece, "s");
        let (volume, view) = (live(&fleece, "a", "p1").unwrap(), frozen(&fleece, "s", "p1"));
        read(&volume, 0, 10).unwrap();
        change(&disk).unwrap();
        assert_eq!(read(&volume, 0, 10), Err(errno::ESTALE), "{what}");
        assert_eq!(write(&volume, &[1], 0), Err(errno::ESTALE), "{what}");
        let errors = [volume.write_zeroes(0, 1), volume.discard(0, GRANULE), volume.flush(), volume.check()];
        assert!(errors.into_iter().all(|e| e.unwrap_err().errno() == errno::ESTALE), "{what}");
        assert_eq!(volume.block_status(0, 1).unwrap_err().errno(), errno::ESTALE, "{what}");
        let mut bytes = [0; 512];
        assert_eq!(view.read(&mut bytes, 0).unwrap(), 512, "{what}: a view stays");
        assert_eq!(bytes[..], read_live(&disk, P1.0, 512), "{what}: nothing was written");
        let found = live(&fleece, "a", "p1").is_some_and(|volume| read(&volume, 0, 10).is_ok());
        assert_eq!(found, !what.contains("zeroes") && !what.contains("discard"), "{what}: a new one is good");
        assert_eq!(read(&volume, 0, 10), Err(errno::ESTALE), "{what}: the old one is not");
    }
}

#[test]
fn other_writes_leave_volumes_as_they_are() {
    let (fleece, disk) = mounted();
    let volume = live(&fleece, "a", "p1").unwrap();
    let found = fleece.live_volumes();
    disk.write(&[7; 4096], P1.0 + P1.1 - 4096).unwrap();
    disk.write(&[7; 512], P2.0 - 4096).unwrap();
    assert!(Arc::ptr_eq(&found, &fleece.live_volumes()), "nothing is looked for again");
    // A file system, or what looks like one, is made: that shows, and nobody minds.
    disk.write(&swap("first"), P2.0).unwrap();
    disk.write(&swap("data"), P1.0).unwrap();
    let label = |name| live(&fleece, "a", name).unwrap().volume().content.as_ref().unwrap().label.clone();
    assert_eq!((label("p1").as_deref(), label("p2").as_deref()), (Some("data"), Some("first")));
    disk.write(&swap("second"), P2.0).unwrap();
    assert_eq!(label("p2").as_deref(), Some("second"));
    fleece.resize_disk("a", SIZE + GRANULE).unwrap();
    assert_eq!(read(&volume, 0, 512).unwrap(), swap("data")[..512]);
    fleece.resize_disk("a", SIZE).unwrap();
    assert_eq!(read(&volume, 0, 512), Err(errno::ESTALE), "what is cut off may be the volume's");
}

#[test]
fn volumes_come_and_go_with_their_disks() {
    let host = Host::new(&["a", "b"], SIZE);
    partitioned(&host, "b");
    let fleece = host.empty_mount();
    host.attach(&fleece, "a").unwrap();
    assert!(live(&fleece, "a", "p1").is_none());
    host.attach(&fleece, "b").unwrap();
    let volume = live(&fleece, "b", "p1").unwrap();
    assert!(live(&fleece, "a", "p1").is_none());
    fleece.disk("a").unwrap().write(&mbr(&[P2]), 0).unwrap();
    assert_eq!(live(&fleece, "a", "p1").unwrap().size(), P2.1, "a table where there was none");
    assert!(read(&volume, 0, 1).is_ok(), "another disk's table is none of its");
    let weak = Arc::downgrade(&fleece.disk("a").unwrap());
    fleece.remove_disk("a").unwrap();
    assert!(weak.upgrade().is_none(), "a volume of another disk keeps it not");
    assert!(live(&fleece, "b", "p1").is_some());
    let weak = Arc::downgrade(&fleece.disk("b").unwrap());
    drop(volume);
    fleece.remove_disk("b").unwrap();
    assert!(weak.upgrade().is_none(), "what was found keeps no disk");
}

#[test]
fn a_view_is_scanned_once_and_an_unreadable_one_again() {
    let host = Host::new(&["a"], SIZE);
    partitioned(&host, "a");
    let fleece = host.mount();
    let snapshot = freeze(&fleece, "s");
    host.files["a"].image_faults.fail_all(fleecefs::storage::faulty::Call::Read, errno::EIO);
    assert_eq!(snapshot.volumes().of_view(&snapshot.views()[0]).count(), 0);
    assert_eq!(snapshot.volumes().warnings().len(), 1);
    assert_eq!(fleece.live_volumes().warnings().len(), 1);
    host.clear_faults();
    assert_eq!(snapshot.volumes().of_view(&snapshot.views()[0]).count(), 2);
    assert!(Arc::ptr_eq(&snapshot.volumes(), &snapshot.volumes()));
    assert!(live(&fleece, "a", "p2").is_some());
}

/// What comes first, once: before a write or else a read, in which range, and what.
type Hook = (bool, Range<u64>, Box<dyn FnOnce() + Send>);

/// A file that does something else first, once, when it is read or written in some place.
#[derive(Debug)]
struct Hooked {
    inner: MemFile,
    hooks: Hooks,
}

#[derive(Clone, Default)]
struct Hooks(Arc<Mutex<Vec<Hook>>>);

impl std::fmt::Debug for Hooks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Hooks")
    }
}

impl Hooks {
    fn before(&self, write: bool, range: Range<u64>, hook: impl FnOnce() + Send + 'static) {
        self.0.lock().unwrap().push((write, range, Box::new(hook)));
    }

    /// The write is held up until something is sent.
    fn hold_write(&self, range: Range<u64>) -> (Receiver<()>, std::sync::mpsc::Sender<()>) {
        let ((here, arrived), (go_on, may_go)) = (channel(), channel::<()>());
        self.before(true, range, move || {
            here.send(()).unwrap();
            may_go.recv_timeout(LONG).unwrap();
        });
        (arrived, go_on)
    }

    fn run(&self, write: bool, offset: u64, len: u64) {
        let mut hooks = self.0.lock().unwrap();
        let found =
            hooks.iter().position(|(w, range, _)| *w == write && offset < range.end && range.start < offset + len);
        let hook = found.map(|index| hooks.remove(index).2);
        drop(hooks);
        if let Some(hook) = hook {
            hook();
        }
    }
}

impl Storage for Hooked {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.hooks.run(false, offset, buf.len() as u64);
        self.inner.read_at(buf, offset)
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.hooks.run(true, offset, buf.len() as u64);
        self.inner.write_at(buf, offset)
    }
    fn sync(&self) -> Result<()> {
        self.inner.sync()
    }
    fn len(&self) -> Result<u64> {
        Storage::len(&self.inner)
    }
    fn set_len(&self, len: u64) -> Result<()> {
        self.inner.set_len(len)
    }
    fn punch_hole(&self, offset: u64, len: u64) -> Result<()> {
        self.inner.punch_hole(offset, len)
    }
    fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        self.inner.write_zeroes(offset, len)
    }
    fn block_status(&self, offset: u64, len: u64) -> Result<BlockStatus> {
        self.inner.block_status(offset, len)
    }
    fn stamp(&self) -> Result<Stamp> {
        self.inner.stamp()
    }
    fn path(&self) -> &Path {
        self.inner.path()
    }
}

/// A partitioned disk over a file with hooks.
fn hooked() -> (Arc<Fleece>, Arc<Disk>, Hooks) {
    let host = Host::new(&["a"], SIZE);
    partitioned(&host, "a");
    let fleece = host.empty_mount();
    let hooks = Hooks::default();
    let file = Hooked { inner: host.files["a"].image.clone(), hooks: hooks.clone() };
    let dir = || Arc::new(MemDir::new());
    let disk = attach_over(&fleece, "a", Arc::new(file), dir(), dir(), false).unwrap();
    (fleece, disk, hooks)
}

/// W1: with the new table on its way to the image, the old one is not believed any more.
#[test]
fn a_change_of_the_table_is_told_before_it_is_made() {
    let (fleece, disk, hooks) = hooked();
    let volume = live(&fleece, "a", "p1").unwrap();
    let (said, says) = channel();
    hooks.before(true, 0..SECTOR, move || said.send(read(&volume, 0, 10)).unwrap());
    disk.write(&mbr(&[P2]), 0).unwrap();
    assert_eq!(says.recv().unwrap(), Err(errno::ESTALE));
}

/// W1: a read that the guest overtook with a new table and new data gives neither.
#[test]
fn a_read_of_a_volume_gives_nothing_that_came_after_a_new_table() {
    let (fleece, disk, hooks) = hooked();
    let volume = live(&fleece, "a", "p1").unwrap();
    hooks.before(false, P1.0..P1.0 + 10, move || {
        disk.write(&mbr(&[P2]), 0).unwrap();
        disk.write(&[0x77; 4096], P1.0).unwrap();
    });
    assert_eq!(read(&volume, 0, 10), Err(errno::ESTALE));
}

/// W2: once a new table is written, nothing that was let in under the old one is written any more.
#[test]
fn a_new_table_waits_for_writes_that_the_old_one_let_in() {
    let (fleece, disk, hooks) = hooked();
    let volume = live(&fleece, "a", "p1").unwrap();
    let (arrived, go_on) = hooks.hold_write(P1.0..P1.0 + 10);
    let writer = {
        let volume = volume.clone();
        thread::spawn(move || write(&volume, &[5; 10], 0))
    };
    arrived.recv_timeout(LONG).unwrap();
    let guest = {
        let disk = disk.clone();
        thread::spawn(move || {
            disk.write(&mbr(&[P2]), 0).unwrap();
            disk.write(&[6; 10], P1.0).unwrap();
        })
    };
    thread::sleep(A_WHILE);
    assert!(!guest.is_finished());
    assert_eq!(read_live(&disk, 0, SECTOR), mbr(&[P1, P2]), "the old table still");
    go_on.send(()).unwrap();
    assert_eq!(writer.join().unwrap(), Ok(10));
    guest.join().unwrap();
    assert_eq!(read_live(&disk, P1.0, 10), [6; 10], "the guest's own came last");
    assert_eq!(write(&volume, &[5; 10], 0), Err(errno::ESTALE));
}

/// W3: a table that somebody writes when it is first watched is read when that is done.
#[test]
fn a_scan_waits_for_a_change_that_began_before_it() {
    let (fleece, disk, hooks) = hooked();
    let (arrived, go_on) = hooks.hold_write(0..SECTOR);
    let guest = {
        let disk = disk.clone();
        thread::spawn(move || disk.write(&mbr(&[P2]), 0).unwrap())
    };
    arrived.recv_timeout(LONG).unwrap();
    let done = Arc::new(AtomicBool::new(false));
    let scan = {
        let (fleece, done) = (fleece.clone(), done.clone());
        thread::spawn(move || {
            // A scan that waits for too long gives up.
            let size =
                std::iter::repeat_with(|| live(&fleece, "a", "p1")).find_map(|found| Some(found?.size())).unwrap();
            done.store(true, Ordering::SeqCst);
            size
        })
    };
    thread::sleep(A_WHILE);
    assert!(!done.load(Ordering::SeqCst), "the old table may be half gone");
    go_on.send(()).unwrap();
    guest.join().unwrap();
    assert_eq!(scan.join().unwrap(), P2.1);
}

/// W1: what is watched while a change is under way hears of it before that is answered.
#[test]
fn a_label_that_is_written_during_a_scan_shows_afterwards() {
    let (fleece, disk, hooks) = hooked();
    disk.write(&swap("old"), P1.0).unwrap();
    assert!(live(&fleece, "a", "p1").is_some());
    // The next question scans again, and need not wait for anybody, as the table stands.
    disk.write(&swap("old"), P1.0).unwrap();
    let (arrived, go_on) = hooks.hold_write(P1.0..P1.0 + 4096);
    let guest = {
        let disk = disk.clone();
        thread::spawn(move || disk.write(&swap("new"), P1.0).unwrap())
    };
    arrived.recv_timeout(LONG).unwrap();
    let label = || live(&fleece, "a", "p1").unwrap().volume().content.as_ref().unwrap().label.clone();
    assert_eq!(label().as_deref(), Some("old"));
    go_on.send(()).unwrap();
    guest.join().unwrap();
    assert_eq!(label().as_deref(), Some("new"));
}

/// An image that does not answer holds up who asks for its volumes, and nobody who looks at the status.
#[test]
fn the_status_does_not_wait_for_an_image_that_hangs() {
    let (fleece, disk, hooks) = hooked();
    let names =
        || -> Vec<String> { fleece.disk_infos()[0].holds.volumes.iter().map(|volume| volume.name.clone()).collect() };
    assert_eq!(names(), ["p1", "p2"]);
    disk.write(&mbr(&[P1]), 0).unwrap();
    let (here, arrived) = channel();
    let (go_on, may_go) = channel::<()>();
    hooks.before(false, 0..SECTOR, move || {
        here.send(()).unwrap();
        may_go.recv_timeout(LONG).unwrap();
    });
    assert_eq!(names(), ["p1", "p2"], "as it was before");
    arrived.recv_timeout(LONG).unwrap();
    assert_eq!(names(), ["p1", "p2"]);
    go_on.send(()).unwrap();
    assert_eq!(fleece.live_volumes().of_disk(&disk).count(), 1);
    assert_eq!(names(), ["p1"]);
}

/// A table that never rests gives no volumes, and an end to the looking.
#[test]
fn a_table_that_is_written_all_the_while_gives_no_volumes() {
    let (fleece, disk, hooks) = hooked();
    for round in 0..100 {
        let disk = disk.clone();
        hooks.before(false, 0..SECTOR, move || drop(disk.write(&mbr(&[(P1.0, P1.1 + round % 2 * SECTOR)]), 0)));
    }
    let found = fleece.live_volumes();
    assert_eq!(found.of_disk(&disk).count(), 0);
    assert!(found.warnings()[0].contains("being written"), "{:?}", found.warnings());
    hooks.0.lock().unwrap().clear();
    assert!(live(&fleece, "a", "p1").is_some(), "the next question looks again");
}
