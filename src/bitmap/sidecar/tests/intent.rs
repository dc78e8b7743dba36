//! The intent page, and the bits of recording bitmaps.

use super::*;
use std::thread;

const SECOND: i64 = 1_000_000_000;

/// A sidecar in use, with a heartbeat at second 100.
fn open() -> (Disk, Sidecar) {
    let (disk, sidecar) = fresh();
    sidecar.update_superblock(|superblock| superblock.heartbeat_ns = 100 * SECOND).unwrap();
    (disk, sidecar)
}

/// What a power loss now may leave; all of it where that is little.
fn survivors(disk: &Disk) -> Vec<Sidecar> {
    let left = disk.survivors(disk.events(), 512, &mut fake::Random(1));
    left.iter().map(|left| Sidecar::open(left.shared()).unwrap()).collect()
}

#[test]
fn what_is_armed_is_durable_and_what_is_disarmed_may_come_back() {
    let (disk, sidecar) = open();
    sidecar.arm(&[0, 7, 8, 32767], 101 * SECOND).unwrap();
    assert!(survivors(&disk).iter().all(|left| left.intents() == [0, 7, 8, 32767]));
    sidecar.disarm(&[7, 8]).unwrap();
    let left: Vec<Vec<u64>> = survivors(&disk).iter().map(Sidecar::intents).collect();
    assert!(left.contains(&vec![0, 32767]) && left.contains(&vec![0, 7, 8, 32767]));
    assert!(left.iter().all(|left| left.contains(&0) && left.contains(&32767)));
    // The next sync is its sync too, whatever it is for.
    sidecar.arm(&[9], 101 * SECOND).unwrap();
    assert!(survivors(&disk).iter().all(|left| left.intents() == [0, 9, 32767]));
}

#[test]
fn changes_of_one_byte_by_many_threads_lose_nothing() {
    let (disk, sidecar) = open();
    sidecar.reset_intents(0..64).unwrap();
    thread::scope(|scope| {
        for part in 0..4 {
            let sidecar = &sidecar;
            scope.spawn(move || {
                for region in (part..64).step_by(4) {
                    sidecar.disarm(&[region]).unwrap();
                    if region % 8 < 4 {
                        sidecar.arm(&[region], 101 * SECOND).unwrap();
                    }
                }
            });
        }
    });
    sidecar.arm(&[], 101 * SECOND).unwrap();
    let expected: Vec<u64> = (0..64).filter(|region| region % 8 < 4).collect();
    assert_eq!(sidecar.intents(), expected);
    assert!(survivors(&disk).iter().all(|left| left.intents() == expected));
}

#[test]
fn an_intent_that_a_failed_sync_dropped_is_written_anew() {
    let (disk, sidecar) = open();
    disk.fail_sync_in(1);
    assert!(sidecar.arm(&[5], 101 * SECOND).is_err());
    sidecar.arm(&[5], 101 * SECOND).unwrap();
    assert!(survivors(&disk).iter().all(|left| left.intents() == [5]));
}

#[test]
fn arming_renews_an_old_heartbeat_by_the_way() {
    let (disk, sidecar) = open();
    let syncs = disk.syncs();
    sidecar.arm(&[1], 104 * SECOND).unwrap();
    assert_eq!((sidecar.superblock().heartbeat_ns, disk.syncs()), (100 * SECOND, syncs + 1));
    sidecar.arm(&[2], 106 * SECOND).unwrap();
    assert_eq!((sidecar.superblock().heartbeat_ns, disk.syncs()), (106 * SECOND, syncs + 2), "one sync for both");
    assert!(survivors(&disk).iter().all(|left| left.superblock().heartbeat_ns == 106 * SECOND));
    assert!(survivors(&disk).iter().all(|left| left.intents() == [1, 2]));
    sidecar.arm(&[3], 50 * SECOND).unwrap();
    assert_eq!(sidecar.superblock().heartbeat_ns, 50 * SECOND, "the clock was set back");
    sidecar.renew_heartbeat(52 * SECOND, 3 * SECOND).unwrap();
    assert_eq!(sidecar.superblock().heartbeat_ns, 50 * SECOND);
    sidecar.renew_heartbeat(54 * SECOND, 3 * SECOND).unwrap();
    assert_eq!(sidecar.superblock().heartbeat_ns, 54 * SECOND);
}

#[test]
fn a_clean_sidecar_is_not_armed_and_has_no_heartbeat() {
    let (_, sidecar) = open();
    let stamp = Stamp { dev: 1, ino: 2, size: 3, mtime_ns: 4, ctime_ns: 5 };
    sidecar.update_superblock(|superblock| superblock.state = State::Clean { stamp }).unwrap();
    let clean = sidecar.superblock();
    sidecar.renew_heartbeat(1000 * SECOND, SECOND).unwrap();
    assert_eq!(sidecar.arm(&[1], 1000 * SECOND).unwrap_err().errno(), errno::EIO);
    assert_eq!(sidecar.disarm(&[1]).unwrap_err().errno(), errno::EIO);
    assert_eq!(sidecar.superblock(), clean);
}

#[test]
fn regions_widen_with_every_intent_set() {
    let (disk, sidecar) = open();
    sidecar.arm(&[3], 101 * SECOND).unwrap();
    let before = disk.events();
    sidecar.widen_regions(4 << 20).unwrap();
    for cut in before..=disk.events() {
        for left in disk.survivors(cut, 512, &mut fake::Random(cut as u64)) {
            let left = Sidecar::open(left.shared()).unwrap();
            let wide = left.superblock().region_size == 4 << 20;
            assert!(left.intents().contains(&3) && (!wide || left.intents().len() == 32768));
        }
    }
    assert!(sidecar.widen_regions(1 << 20).is_err());
    assert!(sidecar.widen_regions(5 << 20).is_err());
}

#[test]
fn bits_of_regions_are_saved_for_all_that_record_or_for_none() {
    let (disk, sidecar) = open();
    let [one, two] = [2 * PAGE, PAGE].map(|len| sidecar.allocate(len).unwrap());
    sidecar
        .commit(|directory| {
            directory.bitmaps = vec![user(entry(1, one, None)), user(entry(2, two, None))];
            Ok(())
        })
        .unwrap();
    let [first, second] = [bits(&one, &[5, 40_000]), bits(&two, &[9])];
    let of =
        |number, area, bits, range| RegionBits { bitmap: Uuid::from_u128(number), area, bits, ranges: vec![range] };
    let all = || [of(1, one, &first, 32_768..40_000), of(2, two, &second, 0..10)];
    let [lone, _] = all();
    assert!(!sidecar.save_regions(&[lone]).unwrap(), "one is missing");
    let third = of(3, one, &first, 0..9);
    let [_, other] = all();
    assert!(!sidecar.save_regions(&[third, other]).unwrap(), "one is not named");
    assert!(sidecar.save_regions(&all()).unwrap());
    for left in survivors(&disk) {
        assert_eq!(set_of(&left.read_bits(&one, one.len * 8, None).unwrap()), [40_000], "by pages of the regions");
        assert_eq!(set_of(&left.read_bits(&two, two.len * 8, None).unwrap()), [9]);
    }
    let crc = sidecar.write_bits(&two, &second).unwrap();
    sidecar
        .commit(|directory| {
            directory.bitmaps[1].bitmap.crc = Some(crc);
            Ok(())
        })
        .unwrap();
    assert!(!sidecar.save_regions(&all()).unwrap(), "what is sealed is not written to");
    // While a directory is in doubt, nobody knows what records.
    let [lone, _] = all();
    disk.fail_sync_in(1);
    disk.fail_write_in(2);
    assert!(sidecar.commit(rename("n")).is_err());
    assert!(!sidecar.save_regions(&[lone]).unwrap());
    sidecar.commit(rename("m")).unwrap();
    let [lone, _] = all();
    assert!(sidecar.save_regions(&[lone]).unwrap());
}

#[test]
fn a_failed_save_of_regions_stops_no_commit_and_is_made_good_by_the_next() {
    let (disk, sidecar) = open();
    let area = sidecar.allocate(PAGE).unwrap();
    sidecar
        .commit(|directory| {
            directory.bitmaps = vec![user(entry(1, area, None))];
            Ok(())
        })
        .unwrap();
    let bits = bits(&area, &[5]);
    let range = 0..9;
    let list = || [RegionBits { bitmap: Uuid::from_u128(1), area, bits: &bits, ranges: vec![range.clone()] }];
    disk.fail_sync_in(1);
    assert!(sidecar.save_regions(&list()).is_err());
    sidecar.commit(rename("n")).unwrap();
    assert!(sidecar.save_regions(&list()).unwrap());
    assert!(survivors(&disk).iter().all(|left| set_of(&left.read_bits(&area, 9, None).unwrap()) == [5]));
}
