//! What the sidecar promises while nothing crashes, and when calls fail.

use super::*;
use crate::storage::faulty::{Call, FaultPlan, Faulty};
use crate::storage::{BlockStatus, Stamp, Storage};

fn reopened(disk: &Disk) -> Sidecar {
    Sidecar::open(disk.shared()).unwrap()
}

#[test]
fn what_was_committed_is_there_after_reopening() {
    let (disk, sidecar) = fresh();
    let first = sidecar.superblock();
    assert!(matches!(&first.state, State::Open { boot_id, .. } if boot_id.is_empty()));
    assert_eq!((first.heartbeat_ns, first.region_size), (i64::MIN, 1 << 20));
    let stamp = Stamp { dev: 1, ino: 2, size: 3, mtime_ns: -4, ctime_ns: 5 };
    let clean = Superblock { state: State::Clean { stamp }, heartbeat_ns: 9, ..first };
    sidecar.set_superblock(clean.clone()).unwrap();
    assert_eq!(sidecar.commit(|directory| Ok(directory.next_layer + 1)).unwrap(), 1);
    for name in ["a", "b", "c"] {
        sidecar.commit(rename(name)).unwrap();
        let again = reopened(&disk);
        assert_eq!((again.directory(), again.superblock()), (sidecar.directory(), clean.clone()));
        assert_eq!(again.directory().consumers[0].name, name);
    }
}

#[test]
fn a_change_that_fails_leaves_no_trace() {
    let (disk, sidecar) = fresh();
    let events = disk.events();
    let failed: Result<()> = sidecar.commit(|directory| {
        directory.next_layer = 99;
        Err(Error::new(errno::EBUSY, "test", "no"))
    });
    assert_eq!(failed.unwrap_err().errno(), errno::EBUSY);
    assert_eq!((sidecar.directory().next_layer, disk.events()), (0, events));
}

#[test]
fn directories_that_cannot_be_right_are_refused() {
    let (disk, sidecar) = fresh();
    let area = sidecar.allocate(PAGE).unwrap();
    let other = sidecar.allocate(2 * PAGE).unwrap();
    let events = disk.events();
    let good = entry(1, area, None);
    let refused = |change: &dyn Fn(&mut Directory)| {
        let result = sidecar.commit(|directory| {
            change(directory);
            Ok(())
        });
        assert_eq!(result.unwrap_err().errno(), errno::EINVAL);
    };
    refused(&|d| d.disk = Uuid::nil());
    refused(&|d| d.size = 33 << 30);
    refused(&|d| d.bitmaps = vec![user(BitmapEntry { granularity: 3, ..good.clone() })]);
    refused(&|d| d.bitmaps = vec![user(BitmapEntry { size: u64::MAX, ..good.clone() })]);
    refused(&|d| d.bitmaps = vec![user(BitmapEntry { size: good.size + 1, ..good.clone() })]);
    refused(&|d| d.bitmaps = vec![user(entry(1, Area { offset: other.end(), len: PAGE }, None))]);
    refused(&|d| d.bitmaps = vec![user(entry(1, Area { len: PAGE, ..other }, None))]);
    refused(&|d| d.bitmaps = vec![user(entry(1, area, None)), user(entry(2, area, None))]);
    assert_eq!((disk.events(), sidecar.directory().as_ref()), (events, &empty()));
    let superblock = sidecar.superblock();
    for bad in [
        Superblock { disk: Uuid::nil(), ..superblock.clone() },
        Superblock { region_size: 1 << 19, ..superblock.clone() },
    ] {
        assert_eq!(sidecar.set_superblock(bad).unwrap_err().errno(), errno::EINVAL);
    }
    let named = Directory { bitmaps: vec![user(good)], ..empty() };
    assert_eq!(Sidecar::create(Disk::default().shared(), named).unwrap_err().errno(), errno::EINVAL);
}

#[test]
fn growing_the_disk_needs_the_region_size_first() {
    let (disk, sidecar) = fresh();
    let grow = |directory: &mut Directory| {
        directory.size = 100 << 30;
        Ok(())
    };
    assert!(sidecar.commit(grow).is_err());
    let region_size = region_size_for(100 << 30);
    sidecar.set_superblock(Superblock { region_size, ..sidecar.superblock() }).unwrap();
    sidecar.commit(grow).unwrap();
    assert_eq!(reopened(&disk).superblock().region_size, 4 << 20);
}

#[test]
fn a_directory_that_does_not_fit_is_refused_with_enospc() {
    let (disk, sidecar) = fresh();
    let events = disk.events();
    let full = sidecar.commit(rename(&"x".repeat(4 << 20))).unwrap_err();
    assert_eq!(full.errno(), errno::ENOSPC);
    assert!(full.hint_text().unwrap().contains("--keep-checkpoints"));
    assert_eq!(disk.events(), events);
    sidecar.commit(rename(&"x".repeat((4 << 20) - 1000))).unwrap();
    assert_eq!(reopened(&disk).directory(), sidecar.directory());
}

#[test]
fn a_sidecar_made_over_an_old_one_knows_nothing_of_it() {
    let (disk, old) = fresh();
    for name in ["a", "b", "c"] {
        old.commit(rename(name)).unwrap();
        old.set_superblock(old.superblock()).unwrap();
    }
    Sidecar::create(disk.shared(), empty()).unwrap();
    assert_eq!(reopened(&disk).directory().as_ref(), &empty());
}

#[test]
fn the_intent_page_is_left_alone() {
    let (disk, sidecar) = fresh();
    let page = vec![0xa5; PAGE as usize];
    disk.shared().write_at(&page, layout::INTENT_OFFSET).unwrap();
    for _ in 0..3 {
        sidecar.set_superblock(sidecar.superblock()).unwrap();
        sidecar.commit(rename("a")).unwrap();
    }
    reopened(&disk).commit(rename("b")).unwrap();
    let mut found = vec![0; PAGE as usize];
    disk.shared().read_at(&mut found, layout::INTENT_OFFSET).unwrap();
    assert_eq!(found, page);
}

#[test]
fn bits_round_trip_with_holes_for_clean_pages() {
    let (disk, sidecar) = fresh();
    let base = disk.cache().allocated_bytes();
    let area = sidecar.allocate(2 << 20).unwrap();
    assert_eq!(sidecar.read_bits(&area, area.len * 8, None).unwrap().count(), 0);
    let last = area.len * 8 - 1;
    for set in [vec![], vec![0], vec![last], vec![0, 40_000, 600_000, 1_000_000, last], vec![5]] {
        let crc = sidecar.write_bits(&area, &bits(&area, &set)).unwrap();
        let read = sidecar.read_bits(&area, area.len * 8, Some(crc)).unwrap();
        assert_eq!(set_of(&read), set);
        assert_eq!(disk.cache().allocated_bytes() - base, set.len() as u64 * PAGE, "{set:?}");
        let mut content = vec![0; area.len as usize];
        disk.shared().read_at(&mut content, area.offset).unwrap();
        assert_eq!(crc, crc32c::crc32c(&content));
        let wrong = sidecar.read_bits(&area, 10, Some(crc ^ 1)).unwrap_err();
        assert_eq!(wrong.errno(), errno::EIO);
    }
    let dense = Bits::heap(area.len * 8 - 3);
    dense.set_range(0..dense.len());
    let crc = sidecar.write_bits(&area, &dense).unwrap();
    let read = sidecar.read_bits(&area, dense.len(), Some(crc)).unwrap();
    assert_eq!((read.count(), read.len()), (dense.len(), dense.len()));
    assert_eq!(sidecar.read_bits(&area, 100, None).unwrap().count(), 100, "bits behind the last are cut off");
}

/// A file that counts what is read of it, and perhaps calls all of it a hole.
#[derive(Debug)]
struct Watched {
    file: SharedStorage,
    all_holes: bool,
    bytes_read: std::sync::atomic::AtomicU64,
}

impl Storage for Watched {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.bytes_read.fetch_add(buf.len() as u64, std::sync::atomic::Ordering::Relaxed);
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
        match self.all_holes {
            true => Ok(BlockStatus { len, zero: true }),
            false => self.file.block_status(offset, len),
        }
    }
    fn stamp(&self) -> Result<Stamp> {
        self.file.stamp()
    }
    fn path(&self) -> &std::path::Path {
        self.file.path()
    }
}

#[test]
fn holes_are_not_read_and_believed_under_a_checksum_alone() {
    let (disk, sidecar) = fresh();
    let area = sidecar.allocate(2 << 20).unwrap();
    let set = [3, 70_000, area.len * 8 - 1];
    let crc = sidecar.write_bits(&area, &bits(&area, &set)).unwrap();
    let watched = |all_holes| Watched { file: disk.shared(), all_holes, bytes_read: 0.into() };
    let read = |file: &Watched, crc| content::read(file, &area, area.len * 8, crc);

    let honest = watched(false);
    assert_eq!(set_of(&read(&honest, Some(crc)).unwrap()), set);
    assert_eq!(honest.bytes_read.into_inner(), set.len() as u64 * PAGE);

    let lying = watched(true);
    assert_eq!(read(&lying, Some(crc)).unwrap_err().errno(), errno::EIO, "no bit is lost to a file system's error");
    assert_eq!(set_of(&read(&lying, None).unwrap()), set);
}

#[test]
fn bits_go_only_where_an_area_was_given() {
    let (_disk, sidecar) = fresh();
    let area = sidecar.allocate(100).unwrap();
    assert_eq!((area.offset, area.len), (layout::AREAS_START, PAGE));
    let too_many = Bits::heap(PAGE * 8 + 1);
    let strange = Area { offset: area.end(), len: PAGE };
    assert_eq!(sidecar.write_bits(&area, &too_many).unwrap_err().errno(), errno::EINVAL);
    assert_eq!(sidecar.write_bits(&strange, &Bits::heap(1)).unwrap_err().errno(), errno::EINVAL);
    assert_eq!(sidecar.read_bits(&area, u64::MAX, None).unwrap_err().errno(), errno::EINVAL);
    assert_eq!(sidecar.allocate(u64::MAX).unwrap_err().errno(), errno::EFBIG);
    sidecar.abandon(&area);
    assert!(sidecar.write_bits(&area, &Bits::heap(1)).is_err());
    assert_eq!(sidecar.allocate(1).unwrap(), area, "an abandoned area is free again");
}

#[test]
fn an_area_is_freed_when_its_last_reader_is_gone() {
    let (disk, sidecar) = fresh();
    let base = disk.cache().allocated_bytes();
    let area = sidecar.allocate(PAGE).unwrap();
    let crc = sidecar.write_bits(&area, &bits(&area, &[1, 2])).unwrap();
    let add = |directory: &mut Directory| {
        directory.bitmaps.push(user(entry(1, area, Some(crc))));
        Ok(())
    };
    sidecar.commit(add).unwrap();
    sidecar.abandon(&area);
    assert!(sidecar.write_bits(&area, &bits(&area, &[1, 2])).is_ok(), "a named area cannot be abandoned");
    let reader = sidecar.directory();
    sidecar.commit(rename("newer")).unwrap();
    let remove = |directory: &mut Directory| {
        directory.bitmaps.clear();
        Ok(())
    };
    sidecar.commit(remove).unwrap();
    let other = sidecar.allocate(PAGE).unwrap();
    assert_ne!(other, area);
    let named = reader.areas().next().unwrap();
    assert_eq!(set_of(&sidecar.read_bits(&named, 10, Some(crc)).unwrap()), [1, 2]);
    drop(reader);
    assert!(sidecar.commit(add).is_err(), "what left does not come back where nobody held it");
    assert_eq!(sidecar.allocate(PAGE).unwrap(), area);
    assert_eq!(sidecar.read_bits(&area, 10, None).unwrap().count(), 0);
    assert!(disk.cache().allocated_bytes() <= base + 2 * PAGE);
}

#[test]
fn who_holds_a_directory_can_bring_its_areas_back() {
    let (disk, sidecar) = fresh();
    let area = sidecar.allocate(PAGE).unwrap();
    let crc = sidecar.write_bits(&area, &bits(&area, &[5])).unwrap();
    let named = |directory: &mut Directory| -> Result<()> {
        directory.bitmaps = vec![user(entry(1, area, Some(crc)))];
        Ok(())
    };
    let unnamed = |directory: &mut Directory| -> Result<()> {
        directory.bitmaps.clear();
        Ok(())
    };
    sidecar.commit(named).unwrap();
    let held = sidecar.directory();
    sidecar.commit(unnamed).unwrap();
    assert_ne!(sidecar.allocate(PAGE).unwrap(), area);
    sidecar.commit(named).unwrap();
    drop(held);
    sidecar.commit(rename("x")).unwrap();
    assert_ne!(sidecar.allocate(PAGE).unwrap(), area, "it is named again");
    let now = reopened(&disk);
    assert_eq!(set_of(&now.read_bits(&area, PAGE * 8, Some(crc)).unwrap()), [5]);
    sidecar.commit(unnamed).unwrap();
    assert_eq!(sidecar.commit(named).unwrap_err().errno(), errno::EINVAL, "nobody held it");
}

#[test]
fn a_new_area_is_zero_also_where_the_old_content_could_not_be_punched() {
    let (disk, sidecar) = fresh();
    let area = sidecar.allocate(PAGE).unwrap();
    sidecar.write_bits(&area, &bits(&area, &[1])).unwrap();
    sidecar.abandon(&area);
    disk.fail_write_in(1);
    assert_ne!(sidecar.allocate(PAGE).ok(), None, "the punch that failed was only for the space");
    assert_eq!(sidecar.read_bits(&area, 10, None).unwrap().count(), 0);
    sidecar.abandon(&area);
    disk.fail_write_in(2);
    assert_eq!(sidecar.allocate(PAGE).unwrap_err().errno(), errno::EIO);
    sidecar.sync().unwrap();
    assert_eq!(sidecar.allocate(PAGE).unwrap(), area);
}

#[test]
fn space_that_nobody_names_is_given_back_after_reopening() {
    let (disk, sidecar) = fresh();
    let areas = [(); 3].map(|()| sidecar.allocate(PAGE).unwrap());
    for area in &areas {
        sidecar.write_bits(area, &bits(area, &[7])).unwrap();
    }
    let keep = |directory: &mut Directory| {
        directory.bitmaps.push(user(entry(1, areas[1], None)));
        Ok(())
    };
    sidecar.commit(keep).unwrap();
    drop(sidecar);
    let allocated = disk.cache().allocated_bytes();
    let again = reopened(&disk);
    assert_eq!(disk.cache().allocated_bytes(), allocated, "opening alone writes nothing");
    again.commit(rename("a")).unwrap();
    assert_eq!(disk.cache().allocated_bytes(), allocated - 2 * PAGE);
    assert_eq!(set_of(&again.read_bits(&areas[1], 10, None).unwrap()), [7]);
    assert_eq!(again.allocate(PAGE).unwrap(), areas[0]);
}

#[test]
fn a_failed_commit_is_undone_before_the_next() {
    for fail in [Disk::fail_write_in, Disk::fail_sync_in] {
        let (disk, sidecar) = fresh();
        sidecar.commit(rename("old")).unwrap();
        fail(&disk, 1);
        assert_eq!(sidecar.commit(rename("failed")).unwrap_err().errno(), errno::EIO);
        assert_eq!(sidecar.directory().consumers[0].name, "old");
        assert_eq!(reopened(&disk).directory(), sidecar.directory(), "undone at once");
        sidecar.commit(rename("next")).unwrap();
        assert_eq!(reopened(&disk).directory().consumers[0].name, "next");
    }
}

#[test]
fn while_a_failed_commit_cannot_be_undone_later_ones_fail_and_no_space_is_reused() {
    let (disk, sidecar) = fresh();
    let area = sidecar.allocate(PAGE).unwrap();
    sidecar.commit(rename("old")).unwrap();
    drop(sidecar);
    let plan = Arc::new(FaultPlan::new());
    let sidecar = Sidecar::open(Arc::new(Faulty { inner: disk.shared(), plan: plan.clone() })).unwrap();
    assert_eq!(sidecar.allocate(PAGE).unwrap(), area);
    plan.fail_range(Call::Write, layout::DIRECTORY_SLOTS[0]..layout::AREAS_START, errno::EIO);
    for _ in 0..3 {
        assert_eq!(sidecar.commit(rename("failed")).unwrap_err().errno(), errno::EIO);
        assert_eq!(sidecar.directory().consumers[0].name, "old");
    }
    sidecar.abandon(&area);
    assert_ne!(sidecar.allocate(PAGE).unwrap(), area, "the failed directory may have named it");
    assert!(sidecar.set_superblock(sidecar.superblock()).is_err(), "nor is a superblock built on the doubt");
    plan.clear();
    sidecar.commit(rename("next")).unwrap();
    assert_eq!(reopened(&disk).directory().consumers[0].name, "next");
    assert_eq!(sidecar.allocate(PAGE).unwrap(), area);
}

#[test]
fn nothing_is_committed_while_a_failed_superblock_may_come_back() {
    let (disk, sidecar) = fresh();
    let wide = Superblock { region_size: 4 << 20, ..sidecar.superblock() };
    sidecar.set_superblock(wide.clone()).unwrap();
    drop(sidecar);
    let plan = Arc::new(FaultPlan::new());
    let sidecar = Sidecar::open(Arc::new(Faulty { inner: disk.shared(), plan: plan.clone() })).unwrap();
    sidecar.commit(rename("a")).unwrap();
    plan.fail_all(Call::Sync, errno::EIO);
    let narrow = Superblock { region_size: 1 << 20, ..wide.clone() };
    assert!(sidecar.set_superblock(narrow).is_err());
    plan.clear();
    plan.fail_range(Call::Write, 0..2 * PAGE, errno::EIO);
    let grow = |directory: &mut Directory| {
        directory.size = 100 << 30;
        Ok(())
    };
    assert_eq!(sidecar.commit(grow).unwrap_err().errno(), errno::EIO, "narrow regions would not cover it");
    plan.clear();
    sidecar.commit(grow).unwrap();
    let again = reopened(&disk);
    assert_eq!((again.superblock(), again.directory()), (wide, sidecar.directory()));
}

#[test]
fn bits_that_a_failed_sync_may_have_lost_are_never_vouched_for() {
    let (disk, sidecar) = fresh();
    let [lost, fine] = [(); 2].map(|()| sidecar.allocate(PAGE).unwrap());
    sidecar.sync().unwrap();
    let crc = sidecar.write_bits(&lost, &bits(&lost, &[3])).unwrap();
    disk.fail_sync_in(1);
    assert!(sidecar.sync().is_err());
    let fine_crc = sidecar.write_bits(&fine, &bits(&fine, &[4])).unwrap();
    let name = |number, area, crc| {
        move |directory: &mut Directory| {
            directory.bitmaps.push(user(entry(number, area, Some(crc))));
            Ok(())
        }
    };
    assert_eq!(sidecar.sync().unwrap_err().errno(), errno::EIO, "the second sync would succeed, the bits are gone");
    assert_eq!(sidecar.set_superblock(sidecar.superblock()).unwrap_err().errno(), errno::EIO);
    assert_eq!(sidecar.commit(name(1, lost, crc)).unwrap_err().errno(), errno::EIO);
    sidecar.commit(name(2, fine, fine_crc)).unwrap();
    sidecar.write_bits(&lost, &bits(&lost, &[3])).unwrap();
    sidecar.sync().unwrap();
    sidecar.commit(name(1, lost, crc)).unwrap();
    sidecar.set_superblock(sidecar.superblock()).unwrap();
}

#[test]
fn bits_whose_writing_failed_are_not_vouched_for_until_given_up() {
    let (disk, sidecar) = fresh();
    let area = sidecar.allocate(PAGE).unwrap();
    disk.fail_write_in(1);
    assert!(sidecar.write_bits(&area, &bits(&area, &[3])).is_err());
    assert!(sidecar.sync().is_err());
    sidecar.abandon(&area);
    sidecar.sync().unwrap();
}

#[test]
fn a_commit_syncs_bits_before_it_names_them() {
    let (disk, sidecar) = fresh();
    let syncs = disk.syncs();
    sidecar.commit(rename("a")).unwrap();
    assert_eq!(disk.syncs() - syncs, 1, "nothing to wait for");
    let area = sidecar.allocate(PAGE).unwrap();
    sidecar.write_bits(&area, &bits(&area, &[3])).unwrap();
    sidecar.commit(rename("b")).unwrap();
    assert_eq!(disk.syncs() - syncs, 3);
}
