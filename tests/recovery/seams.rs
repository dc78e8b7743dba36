//! Where two mechanisms meet: what one does in the middle of another, and then a stop.

use crate::medium::{Cut, CutDir, Mode};
use crate::power::{Moments, Watched};
use crate::rig::*;
use crate::steps::*;
use fleecefs::bitmap::sidecar::layout::INTENT_OFFSET;
use fleecefs::error::errno;
use fleecefs::fleece::{Environment, Fleece, HoldEnd, Options};
use fleecefs::storage::crash::CrashDisk;
use fleecefs::storage::faulty::Call;
use fleecefs::storage::shm::HeapShmRoot;
use fleecefs::storage::{Dir, SharedStorage, Storage};
use std::sync::Arc;

const MIB: u64 = 1 << 20;
const SIZE: u64 = 8 * MIB;

fn disarm(fleece: &Fleece) {
    (0..2).for_each(|_| fleece.disarm_idle());
}

/// A mount of a pair, where the state of `b` is below `cut`.
fn mount_below(host: &Host, cut: &Arc<Cut>) -> Arc<Fleece> {
    let fleece = host.empty_mount();
    host.attach(&fleece, "a").unwrap();
    let files = &host.files["b"];
    let state = Arc::new(CutDir { inner: Arc::new(files.state.clone()), cut: cut.clone() });
    attach_over(&fleece, "b", files.image.shared(), state, Arc::new(files.stores.clone()), false).unwrap();
    fleece
}

fn has_checkpoint(fleece: &Fleece, disk: &str, name: &str) -> bool {
    fleece.bitmaps(disk).unwrap().iter().any(|info| info.checkpoint && info.name == name)
}

#[test]
fn what_was_disarmed_under_a_snapshot_that_is_taken_back_is_in_the_older_bitmap() {
    let granule = 2 * MIB / GRANULE;
    let mut tried = 0;
    for n in 1..30 {
        let mut host = Host::new(&PAIR, SIZE);
        let cut = Cut::new(Mode::FailOnce);
        let fleece = mount_below(&host, &cut);
        freeze(&fleece, "s");
        fleece.complete_snapshot("s", None).unwrap();
        disarm(&fleece);
        assert_eq!(counter(&fleece, "armed_regions"), 0);
        let guest = fleece.clone();
        cut.meanwhile(Some(Box::new(move |_| {
            if has_checkpoint(&guest, "a", "t") && counter(&guest, "armed_regions") == 0 {
                touch(&guest, "a", &[granule]);
                // `b` is not written to, so that nothing of it is armed.
                disarm(&guest);
                assert_eq!(counter(&guest, "armed_regions"), 0);
            }
        })));
        cut.arm(n);
        let done = try_freeze(&fleece, "t", &[], None);
        cut.meanwhile(None);
        cut.arm(0);
        let written = fleece.disk("a").unwrap().mtime_ns() > 0
            && read_live(&fleece.disk("a").unwrap(), granule * GRANULE + 5, 1) == [7];
        if done.is_ok() || !written {
            if done.is_ok() {
                break;
            }
            continue;
        }
        tried += 1;
        assert!(!has_checkpoint(&fleece, "a", "t"));
        drop(fleece);
        host.lose_power();
        let fleece = host.mount();
        freeze(&fleece, "u");
        let map = dirty_granules(&extents_since(&view_of(&fleece, "u", "a"), "s"));
        assert!(map.contains(&granule), "cut at change {n}: {map:?}");
    }
    assert!(tried > 0);
}

#[test]
fn what_was_taken_back_on_one_disk_is_not_taken_back_again_with_the_others() {
    let mut tried = 0;
    for second in 1..8 {
        let host = Host::new(&PAIR, SIZE);
        let fleece = host.mount();
        let faults = host.files["b"].state_faults.clone();
        let calls = faults.calls(Call::Write);
        (0..100).for_each(|nth| faults.fail_nth(Call::Write, calls + second + nth, errno::EIO));
        let done = try_freeze(&fleece, "t", &[], None);
        fleece.reap();
        host.clear_faults();
        if done.is_ok() {
            break;
        }
        tried += 1;
        freeze(&fleece, "v");
        drop(fleece);
        let fleece = host.mount();
        let views = fleece.snapshot("v").map_or(0, |snapshot| snapshot.views().len());
        assert_eq!(views, 2, "cut at write {second}: {:?}", fleece.problems());
    }
    assert!(tried > 1);
}

#[test]
fn a_flush_that_fails_while_a_snapshot_is_taken_makes_its_interval_everything() {
    let host = Host::new(&PAIR, SIZE);
    let cut = Cut::new(Mode::FailOnce);
    let fleece = mount_below(&host, &cut);
    freeze(&fleece, "s");
    fleece.complete_snapshot("s", None).unwrap();
    apply(&fleece, &[add("a/x")]);
    let faults = host.files["a"].image_faults.clone();
    faults.fail_nth(Call::Sync, faults.calls(Call::Sync) + 1, errno::EIO);
    let guest = fleece.clone();
    cut.meanwhile(Some(Box::new(move |number| {
        if number == 1 {
            assert_errno(guest.disk("a").unwrap().flush(), errno::EIO);
        }
    })));
    cut.arm(u64::MAX);
    freeze(&fleece, "t");
    cut.meanwhile(None);
    assert_errno(fleece.disk("a").unwrap().flush(), errno::EIO);
    fleece.complete_snapshot("t", None).unwrap();
    let snapshot = freeze(&fleece, "u");
    let map = dirty_granules(&extents_since(snapshot.view("a").unwrap(), "t"));
    assert_eq!(map.len() as u64, SIZE / GRANULE);
}

#[test]
fn a_batch_that_stays_undecided_over_a_clean_stop_of_one_disk_loses_no_change() {
    let mut undecided = 0;
    for (first, second) in (1..14).flat_map(|first| (1..8).map(move |second| (first, second))) {
        let host = Host::new(&PAIR, SIZE);
        let fleece = host.mount();
        apply(&fleece, &[add("a/x"), add("b/x")]);
        let plan = |name: &str| host.files[name].state_faults.clone();
        let (a, b) = (plan("a"), plan("b"));
        let now = (a.calls(Call::Write), b.calls(Call::Write));
        (0..200).for_each(|nth| a.fail_nth(Call::Write, now.0 + first + nth, errno::EIO));
        b.fail_nth(Call::Write, now.1 + second, errno::EIO);
        let done = fleece.apply(&[clear("a/x"), clear("b/x")]);
        touch(&fleece, "b", &[5]);
        let closed = fleece.close();
        undecided += u32::from(done.is_err() && closed.is_err());
        drop(fleece);
        host.clear_faults();
        let fleece = host.mount();
        let info = info(&fleece, "b/x");
        assert!(info.inconsistent || hash(&fleece, "b/x") == hash_of_128(&[5]), "{first}, {second}: {info:?}");
    }
    assert!(undecided > 0);
}

/// As `hash_of` for a disk of [`SIZE`].
fn hash_of_128(granules: &[u64]) -> String {
    use sha2::{Digest, Sha256};
    let word = granules.iter().fold(0u128, |word, granule| word | 1 << granule);
    Sha256::digest(word.to_le_bytes()).iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn a_bitmap_in_the_image_alone_is_whole_where_its_removal_fails_or_is_cut_off() {
    for (n, killed) in (1..20).flat_map(|n| [(n, false), (n, true)]) {
        let image = Image::new(32 * GRANULE);
        let mut fleece = image.mount();
        let before = hash(&fleece, "a/off");
        let calls = image.state_faults.calls(Call::Write);
        (0..100).for_each(|nth| image.state_faults.fail_nth(Call::Write, calls + n + nth, errno::EIO));
        let done = fleece.apply(&[remove("a/off")]);
        image.state_faults.clear();
        if done.is_ok() {
            assert!(n > 2, "the directory is written twice");
            return;
        }
        if killed {
            drop(fleece);
            fleece = image.mount();
        }
        assert_eq!(fleece.bitmaps("a").map(|all| all.len()).unwrap(), 2, "cut at write {n}");
        assert_eq!(hash(&fleece, "a/off"), before, "cut at write {n}");
        fleece.close().unwrap();
        drop(fleece);
        assert_eq!(hash(&image.mount(), "a/off"), before, "cut at write {n}");
    }
    panic!("it never succeeds");
}

fn mount_on(disk: &CrashDisk, shm: &HeapShmRoot, watch: Option<&Arc<Moments>>) -> Arc<Fleece> {
    let env = Environment { shm: Arc::new(shm.clone()), background: false };
    let fleece = Fleece::with_environment(Options::default(), env);
    let mut image: SharedStorage = disk.open("a.img").unwrap().shared();
    let mut dir: Arc<dyn Dir> = Arc::new(disk.dir("a.fleece"));
    if let Some(moments) = watch {
        image = Arc::new(Watched::<dyn Storage> { inner: image, moments: moments.clone() });
        dir = Arc::new(Watched::<dyn Dir> { inner: dir, moments: moments.clone() });
    }
    attach_over(&fleece, "a", image, dir.clone(), dir, false).unwrap();
    fleece
}

#[test]
fn a_shrink_that_a_power_loss_undoes_has_not_cut_users_bitmaps() {
    let last = SIZE / GRANULE - 3;
    let moments = Arc::new(Moments::default());
    let file = moments.disk.open("a.img").unwrap();
    file.set_len(SIZE).unwrap();
    file.sync().unwrap();
    let fleece = mount_on(&moments.disk, &HeapShmRoot::new(), Some(&moments));
    apply(&fleece, &[add("a/on"), add("a/off")]);
    touch(&fleece, "a", &[1, last]);
    apply(&fleece, &[disable("a/off")]);
    disarm(&fleece);
    moments.taken.lock().unwrap().clear();
    fleece.resize_disk("a", SIZE / 2).unwrap();
    moments.take();
    let mut undone = 0;
    for (number, moment) in moments.taken.lock().unwrap().iter().enumerate() {
        for seed in 0..5 {
            let shm = HeapShmRoot::new();
            shm.lose_power("boot-2");
            let fleece = mount_on(&moment.survivors(seed), &shm, None);
            let least = if fleece.disk("a").unwrap().size() == SIZE { 2 } else { 1 };
            undone += least - 1;
            for name in ["a/on", "a/off"] {
                let info = info(&fleece, name);
                assert!(!info.inconsistent && info.count >= least * GRANULE, "before change {number}: {info:?}");
            }
        }
    }
    assert!(undone > 0);
}

#[test]
fn a_bitmap_whose_saved_bits_are_damaged_is_inconsistent_and_hides_no_other() {
    let host = Host::new(&["a"], SIZE);
    let fleece = host.mount();
    apply(&fleece, &[add("a/x"), add("a/y")]);
    touch(&fleece, "a", &[3]);
    apply(&fleece, &[disable("a/x")]);
    fleece.close().unwrap();
    drop(fleece);
    let log = host.files["a"].state.open("dirty.log").unwrap();
    let areas = fleecefs::bitmap::sidecar::layout::AREAS_START;
    for at in (areas..log.len().unwrap()).step_by(4096) {
        let mut byte = [0];
        log.read_at(&mut byte, at).unwrap();
        log.write_at(&[byte[0] ^ 0x80], at).unwrap();
    }
    let fleece = host.mount();
    assert_eq!(fleece.bitmaps("a").map(|all| all.len()).map_err(|e| e.to_string()), Ok(2));
    assert!(info(&fleece, "a/x").inconsistent);
    apply(&fleece, &[remove("a/x")]);
}

#[test]
fn no_region_is_disarmed_while_writers_have_no_pins() {
    let mut host = Host::new(&["a"], SIZE);
    let fleece = host.mount();
    freeze(&fleece, "s");
    disarm(&fleece);
    touch(&fleece, "a", &[0]);
    fleece.disarm_idle();
    let faults = host.files["a"].state_faults.clone();
    faults.fail_all(Call::Write, errno::EIO);
    touch(&fleece, "a", &[4 * MIB / GRANULE]);
    faults.clear();
    // A write to the region that is armed, and a snapshot behind it, which begins to arm again.
    let image = host.files["a"].image_faults.clone();
    image.stall(Call::Write);
    let writes = image.calls(Call::Write);
    let guest = fleece.clone();
    let writer = std::thread::spawn(move || touch(&guest, "a", &[1]));
    wait_for("the write", || image.calls(Call::Write) > writes);
    let control = fleece.clone();
    let freezer = std::thread::spawn(move || freeze(&control, "t"));
    wait_for("the arming", || counter(&fleece, "armed_regions") == SIZE / MIB);
    fleece.disarm_idle();
    image.release(Call::Write);
    writer.join().unwrap();
    freezer.join().unwrap();
    assert_eq!(counter(&fleece, "armed_regions"), SIZE / MIB);
    fleece.complete_snapshot("t", None).unwrap();
    drop(fleece);
    host.lose_power();
    let fleece = host.mount();
    freeze(&fleece, "u");
    // The write may not have been durable when the power failed.
    assert!(dirty_granules(&extents_since(&view_of(&fleece, "u", "a"), "t")).contains(&1));
}

#[test]
fn a_batch_whose_snapshot_cannot_be_prepared_gives_back_what_it_made() {
    let host = Host::new(&["a"], SIZE);
    let fleece = host.mount();
    apply(&fleece, &[add("a/x")]);
    touch(&fleece, "a", &[3]);
    let faults = host.files["a"].state_faults.clone();
    let end = |name: &str| {
        // Where the bits of a new bitmap lie tells how much is taken before them.
        apply(&fleece, &[added(name, Some(GRANULE), true, true), merge(name, &["a/x"])]);
        host.files["a"].state.open("dirty.log").unwrap().len().unwrap()
    };
    let before = end("a/m");
    for _ in 0..20 {
        faults.fail_nth(Call::Write, faults.calls(Call::Write) + 1, errno::EIO);
        refused(&fleece, &[add("a/y"), hold("a/x"), snapshot("t")]);
        faults.clear();
    }
    assert!(end("a/n") <= before + 4 * 4096);
}

#[test]
fn a_foreign_write_before_a_batch_is_in_the_bitmap_that_it_disables() {
    let host = Host::new(&["a"], SIZE);
    let fleece = host.mount();
    apply(&fleece, &[add("a/x")]);
    touch(&fleece, "a", &[3]);
    // More than the slack by which a clock of files may lag.
    std::thread::sleep(std::time::Duration::from_millis(1200));
    host.files["a"].image.write_at(&[9], 5 * GRANULE).unwrap();
    apply(&fleece, &[disable("a/x")]);
    freeze(&fleece, "s");
    assert_eq!(count(&fleece, "a/x"), SIZE);
}

#[test]
fn what_a_successor_has_of_regions_that_were_not_armed_is_there_after_a_power_loss() {
    let mut host = Host::new(&["a"], SIZE);
    let fleece = host.mount();
    apply(&fleece, &[add("a/x")]);
    disarm(&fleece);
    let faults = host.files["a"].state_faults.clone();
    faults.fail_all(Call::Write, errno::EIO);
    touch(&fleece, "a", &[4 * MIB / GRANULE]);
    faults.clear();
    let hold = fleece.hold("a", "x").unwrap();
    fleece.end_holds(&[(&hold, HoldEnd::Abdicate)]).unwrap();
    touch(&fleece, "a", &[9]);
    assert_eq!(counter(&fleece, "armed_regions"), SIZE / MIB);
    drop((hold, fleece));
    host.lose_power();
    let fleece = host.mount();
    let info = info(&fleece, "a/x");
    assert!(info.inconsistent || info.count == SIZE, "{info:?}");
}

#[test]
fn a_resize_keeps_what_the_directory_says_of_a_lost_bitmap() {
    let mut host = Host::new(&["a"], SIZE);
    let fleece = host.mount();
    apply(&fleece, &[add("a/x")]);
    disarm(&fleece);
    // The image has no place for a note: the directory alone says it.
    host.files["a"].image_faults.fail_all(Call::Attribute, errno::EOPNOTSUPP);
    let faults = host.files["a"].state_faults.clone();
    faults.fail_range(Call::Write, INTENT_OFFSET..INTENT_OFFSET + 1, errno::EIO);
    touch(&fleece, "a", &[4 * MIB / GRANULE]);
    faults.clear();
    assert_eq!(count(&fleece, "a/x"), SIZE);
    fleece.resize_disk("a", 2 * SIZE).unwrap();
    let grown = SIZE / GRANULE + 9;
    touch(&fleece, "a", &[grown]);
    drop(fleece);
    host.lose_power();
    let fleece = host.mount();
    let info = info(&fleece, "a/x");
    assert!(info.inconsistent || info.count == 2 * SIZE, "{info:?}");
}

#[test]
fn a_loss_stands_though_a_snapshot_is_taken_back_after_it() {
    let mut tried = 0;
    for n in 1..10 {
        let mut host = Host::new(&["a"], SIZE);
        let fleece = host.mount();
        freeze(&fleece, "s");
        fleece.complete_snapshot("s", None).unwrap();
        apply(&fleece, &[add("a/x"), add("a/y")]);
        disarm(&fleece);
        // The image has no place for a note: the directory alone says it.
        host.files["a"].image_faults.fail_all(Call::Attribute, errno::EOPNOTSUPP);
        let faults = host.files["a"].state_faults.clone();
        let calls = faults.calls(Call::Write);
        (0..100).for_each(|nth| faults.fail_nth(Call::Write, calls + n + nth, errno::EIO));
        if fleece.apply(&[clear("a/y"), snapshot("t")]).is_ok() {
            break;
        }
        faults.clear();
        faults.fail_range(Call::Write, INTENT_OFFSET..INTENT_OFFSET + 1, errno::EIO);
        touch(&fleece, "a", &[0]);
        faults.clear();
        apply(&fleece, &[]);
        tried += u32::from(!has_checkpoint(&fleece, "a", "t"));
        touch(&fleece, "a", &[9]);
        drop(fleece);
        host.lose_power();
        let fleece = host.mount();
        freeze(&fleece, "u");
        let map = dirty_granules(&extents_since(&view_of(&fleece, "u", "a"), "s"));
        assert!(map.contains(&0) && map.contains(&9), "cut at write {n}: {map:?}");
        for name in ["a/x", "a/y"] {
            let info = info(&fleece, name);
            assert!(info.inconsistent || info.count == SIZE, "cut at write {n}: {info:?}");
        }
    }
    assert!(tried > 0);
}
