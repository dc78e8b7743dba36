//! Files that nobody wrote on purpose: an error or a bitmap that counts as dirty, never a panic, never a large
//! allocation.

use super::fake::Random;
use super::*;
use crate::storage::{MemFile, Storage};
use layout::{AREAS_START, DIRECTORY_SLOTS, SUPERBLOCK_SLOTS};
use proptest::prelude::*;

/// The bytes up to the areas of a sidecar with a history in all four slots.
fn image() -> Vec<u8> {
    let (disk, sidecar) = fresh();
    let area = sidecar.allocate(PAGE).unwrap();
    let add = |directory: &mut Directory| {
        directory.bitmaps.push(user(entry(1, area, None)));
        Ok(())
    };
    sidecar.commit(add).unwrap();
    sidecar.set_superblock(sidecar.superblock()).unwrap();
    let mut bytes = vec![0; AREAS_START as usize];
    disk.shared().read_at(&mut bytes, 0).unwrap();
    bytes
}

fn file(bytes: &[u8]) -> SharedStorage {
    let file = MemFile::new("dirty.log", 0);
    file.write_at(bytes, 0).unwrap();
    file.shared()
}

/// A file with one superblock and the directory `text`.
fn with_text(text: &[u8]) -> SharedStorage {
    let file = file(&directory::encode(text, 5));
    let slot = directory::encode(text, 5);
    file.write_at(&slot, DIRECTORY_SLOTS[1]).unwrap();
    let (_, sidecar) = fresh();
    file.write_at(&sidecar.superblock().encode(3, 5), 0).unwrap();
    file
}

fn refused(file: SharedStorage) -> Error {
    let e = Sidecar::open(file).unwrap_err();
    assert!(e.to_string().contains("dirty.log"), "{e}");
    e
}

#[test]
fn what_is_no_sidecar_is_refused_with_what_to_do() {
    for bytes in [vec![], vec![0; 100_000], vec![0xff; 9 << 20], b"FLEECEDL".to_vec()] {
        let e = refused(file(&bytes));
        assert_eq!(e.errno(), errno::EINVAL);
        assert!(e.hint_text().unwrap().contains("start tracking over"));
    }
}

#[test]
fn both_slots_broken_is_an_error_one_is_not() {
    let good = image();
    for slots in [SUPERBLOCK_SLOTS, DIRECTORY_SLOTS] {
        for (broken, errors) in [(&slots[..1], [true, false]), (&slots[1..], [true, false]), (&slots[..], [true, true])]
        {
            let mut bytes = good.clone();
            broken.iter().for_each(|at| bytes[*at as usize + 20] ^= 1);
            match Sidecar::open(file(&bytes)) {
                Ok(_) => assert!(!errors[1]),
                Err(e) => assert!(errors[1] || e.to_string().contains("newest directory is damaged"), "{e}"),
            }
        }
    }
}

#[test]
fn a_spoiled_directory_that_a_superblock_knows_of_is_not_passed_over() {
    let mut bytes = image();
    assert!(Sidecar::open(file(&bytes)).is_ok());
    // The second commit of a fresh sidecar stands in the second slot.
    bytes[DIRECTORY_SLOTS[1] as usize + 100] ^= 1;
    assert!(refused(file(&bytes)).to_string().contains("newest directory is damaged"));
}

#[test]
fn newer_versions_and_unknown_features_are_refused_by_name() {
    let newer = |at: usize, bytes: &[u8]| {
        let mut page = fresh().1.superblock().encode(1000, 1);
        layout::put(&mut page, at, bytes);
        let crc = crc32c::crc32c(&page[..4092]);
        layout::put(&mut page, 4092, &crc.to_le_bytes());
        let mut image = image();
        image[..4096].copy_from_slice(&page);
        refused(file(&image))
    };
    let version = newer(8, &2u32.to_le_bytes());
    assert_eq!(version.errno(), errno::EOPNOTSUPP);
    assert!(version.to_string().contains("version 2 is newer than version 1"), "{version}");
    let feature = newer(16, &(1u64 << 40).to_le_bytes());
    assert_eq!(feature.errno(), errno::EOPNOTSUPP);
    assert!(feature.to_string().contains("0x10000000000"), "{feature}");
    assert_eq!(newer(8, &0u32.to_le_bytes()).errno(), errno::EINVAL);
    assert_eq!(newer(12, &7u32.to_le_bytes()).errno(), errno::EINVAL);
    assert_eq!(newer(128, &[65]).errno(), errno::EINVAL);
    assert_eq!(newer(40, &3u64.to_le_bytes()).errno(), errno::EINVAL);
    assert_eq!(newer(56, &[1; 16]).errno(), errno::EINVAL);
}

#[test]
fn a_length_beyond_the_slot_makes_the_slot_invalid() {
    for len in [u64::MAX, layout::DIRECTORY_TEXT_MAX_BYTES + 1, 1 << 63] {
        let mut bytes = image();
        for at in DIRECTORY_SLOTS {
            layout::put(&mut bytes, at as usize + 16, &len.to_le_bytes());
        }
        assert_eq!(refused(file(&bytes)).errno(), errno::EINVAL);
    }
}

#[test]
fn sequences_that_are_used_up_are_an_error() {
    let disk = Disk::default();
    let (_, sidecar) = fresh();
    disk.shared().write_at(&sidecar.superblock().encode(u64::MAX, 0), 0).unwrap();
    let text = empty().to_text().unwrap();
    disk.shared().write_at(&directory::encode(&text, u64::MAX), DIRECTORY_SLOTS[0]).unwrap();
    let opened = Sidecar::open(disk.shared()).unwrap();
    assert_eq!(opened.commit(rename("a")).unwrap_err().errno(), errno::EINVAL);
    assert_eq!(opened.set_superblock(opened.superblock()).unwrap_err().errno(), errno::EINVAL);
}

#[test]
fn areas_that_cannot_be_right_make_their_bitmap_everything() {
    let at = |pages: u64| AREAS_START + pages * PAGE;
    let good = Area { offset: at(0), len: PAGE };
    let far = Area { offset: at(100), len: PAGE };
    let bad = [
        vec![Area { offset: at(0) + 1, ..good }],
        vec![Area { offset: 0, ..good }],
        vec![Area { offset: u64::MAX - 4095, ..good }],
        vec![Area { len: u64::MAX, ..good }],
        vec![Area { len: u64::MAX - 4095, ..good }],
        vec![Area { len: 0, ..good }],
        vec![Area { len: 4 * PAGE, ..good }, Area { offset: at(1), len: PAGE }],
        vec![Area { len: 9 * PAGE, ..good }, Area { offset: at(1), len: PAGE }, Area { offset: at(3), len: PAGE }],
        vec![good, good],
    ];
    for areas in bad {
        let mut directory = empty();
        for (number, area) in (10..).zip(areas.iter().chain([&far])) {
            let size = if area == &far { PAGE * 8 * 512 } else { 1 << 20 };
            directory.bitmaps.push(user(BitmapEntry { size, ..entry(number, *area, Some(1)) }));
        }
        let opened = Sidecar::open(with_text(&directory.to_text().unwrap())).unwrap();
        let found = opened.directory();
        let (last, faulty) = found.bitmaps.split_last().unwrap();
        assert_eq!((last.bitmap.area, &last.bitmap.everything), (Some(far), &None));
        for UserBitmap { bitmap, .. } in faulty {
            assert_eq!((bitmap.area, bitmap.crc), (None, None), "{areas:?}");
            assert!(bitmap.everything.as_ref().unwrap().contains("damaged"));
        }
        opened.commit(rename("a")).unwrap();
        assert_eq!(opened.allocate(PAGE).unwrap(), good);
    }
}

#[test]
fn an_area_too_short_for_its_bitmap_makes_it_everything() {
    let mut directory = empty();
    let area = Area { offset: AREAS_START, len: PAGE };
    let size = crate::units::MAX_DISK_BYTES;
    directory.bitmaps = vec![user(BitmapEntry { size, ..entry(1, area, None) })];
    let opened = Sidecar::open(with_text(&directory.to_text().unwrap())).unwrap();
    assert!(opened.directory().bitmaps[0].bitmap.everything.as_ref().unwrap().contains("too short"));
    directory.bitmaps[0].bitmap.granularity = 3;
    let e = refused(with_text(&directory.to_text().unwrap()));
    assert!(e.to_string().contains(&directory.bitmaps[0].bitmap.uuid.to_string()), "{e}");
}

#[test]
fn text_that_is_no_directory_is_refused_and_unknown_fields_are_not() {
    for text in ["", "{}", "[1]", "null", &"[".repeat(100_000), "{\"disk\":7}"] {
        assert_eq!(refused(with_text(text.as_bytes())).errno(), errno::EINVAL);
    }
    let mut value = serde_json::to_value(empty()).unwrap();
    value["from_a_later_version"] = serde_json::json!({"a": [1, 2]});
    let opened = Sidecar::open(with_text(value.to_string().as_bytes())).unwrap();
    assert_eq!(opened.directory().as_ref(), &empty());
}

#[test]
fn truncated_files_are_opened_or_refused() {
    let good = image();
    let mut random = Random(1);
    for _ in 0..60 {
        let len = match random.below(3) {
            0 => random.below(20_000),
            1 => DIRECTORY_SLOTS[0] + random.below(2000),
            _ => DIRECTORY_SLOTS[1] + random.below(2000),
        };
        if let Err(e) = Sidecar::open(file(&good[..len as usize])) {
            assert_eq!(e.errno(), errno::EINVAL);
        }
    }
}

#[test]
fn flipped_bits_give_an_error_or_what_was_committed() {
    let good = image();
    let newest = Sidecar::open(file(&good)).unwrap();
    let cache = MemFile::new("dirty.log", 0);
    cache.write_at(&good, 0).unwrap();
    let mut random = Random(2);
    for _ in 0..2000 {
        let part = [0, 4096, DIRECTORY_SLOTS[0], DIRECTORY_SLOTS[1]][random.below(4) as usize];
        let at = part + random.below(600);
        let byte = good[at as usize];
        cache.write_at(&[byte ^ (1 << random.below(8))], at).unwrap();
        match Sidecar::open(cache.shared()) {
            Ok(opened) => assert_eq!(opened.directory(), newest.directory(), "byte {at}"),
            Err(e) => assert_eq!(e.errno(), errno::EINVAL, "byte {at}: {e}"),
        }
        cache.write_at(&[byte], at).unwrap();
    }
}

fn option<T: std::fmt::Debug + Clone>(inner: impl Strategy<Value = T>) -> impl Strategy<Value = Option<T>> {
    proptest::option::of(inner)
}

fn uuid() -> impl Strategy<Value = Uuid> {
    any::<u128>().prop_map(Uuid::from_u128)
}

fn name() -> impl Strategy<Value = String> {
    "\\PC{0,12}"
}

fn bitmap() -> impl Strategy<Value = BitmapEntry> {
    let place =
        (0..20u64, 1..6u64).prop_map(|(page, pages)| Area { offset: AREAS_START + page * PAGE, len: pages * PAGE });
    (uuid(), 9..32u32, 0..(1u64 << 24), option(place), option(any::<u32>()), option(name())).prop_map(
        |(uuid, shift, size, area, crc, everything)| BitmapEntry {
            uuid,
            granularity: 1 << shift,
            size,
            area,
            crc,
            everything,
            dirty: 0,
        },
    )
}

fn checkpoint() -> impl Strategy<Value = CheckpointEntry> {
    let state =
        prop_oneof![Just(CheckpointState::Recording), Just(CheckpointState::Sealed), Just(CheckpointState::Deleting)];
    (uuid(), name(), any::<i64>(), any::<bool>(), bitmap(), state).prop_map(
        |(uuid, name, time_ns, completed, bitmap, state)| CheckpointEntry {
            uuid,
            name,
            time_ns,
            completed,
            bitmap,
            state,
        },
    )
}

fn consumer() -> impl Strategy<Value = ConsumerEntry> {
    (name(), uuid(), option(uuid())).prop_map(|(name, checkpoint, previous)| ConsumerEntry {
        name,
        checkpoint,
        previous,
    })
}

fn layer() -> impl Strategy<Value = LayerEntry> {
    let hook = (name(), name(), any::<i32>(), any::<u64>(), option(name()))
        .prop_map(|(command, phase, exit, ms, error)| HookNote { command, phase, exit, ms, error });
    let consistency =
        any::<bool>().prop_map(|frozen| if frozen { Consistency::Filesystem } else { Consistency::Crash });
    let notes = (consistency, proptest::collection::vec(hook, 0..3usize))
        .prop_map(|(consistency, hooks)| Notes { consistency, hooks });
    let snapshot = (uuid(), name(), any::<i64>(), uuid(), option(uuid()), option(name()), notes).prop_map(
        |(uuid, name, time_ns, checkpoint, reference, full_reason, notes)| SnapshotEntry {
            uuid,
            name,
            time_ns,
            checkpoint,
            reference,
            full_reason,
            notes,
            skipped: None,
        },
    );
    (uuid(), any::<u64>(), any::<u64>(), any::<u64>(), name(), option(snapshot)).prop_map(
        |(uuid, seq, size, chunk, store, snapshot)| LayerEntry {
            uuid,
            seq,
            size,
            chunk,
            store: store.into(),
            snapshot,
        },
    )
}

fn any_directory() -> impl Strategy<Value = Directory> {
    let few = 0..3usize;
    let action = prop_oneof![
        (layer(), checkpoint()).prop_map(|(layer, checkpoint)| PreparedAction::Snapshot {
            layer,
            checkpoint,
            bitmaps: None
        }),
        consumer().prop_map(|entry| PreparedAction::Consumer { entry }),
    ];
    let prepared = (uuid(), uuid(), proptest::collection::vec(uuid(), few.clone()), action)
        .prop_map(|(transaction, coordinator, disks, action)| Prepared { transaction, coordinator, disks, action });
    let lists = (
        proptest::collection::vec(checkpoint(), few.clone()),
        proptest::collection::vec(bitmap().prop_map(user), few.clone()),
        proptest::collection::vec(consumer(), few.clone()),
        proptest::collection::vec(layer(), few.clone()),
        proptest::collection::vec(uuid(), few),
    );
    let in_image = (option(uuid()), option(name()), proptest::collection::vec(name(), 0..3usize))
        .prop_map(|(mark, backing, checkpoints)| InImage { mark, backing, checkpoints });
    (lists, option(prepared), any::<u64>(), in_image).prop_map(
        |((checkpoints, bitmaps, consumers, layers, committed), prepared, next_layer, in_image)| Directory {
            identities: committed.clone(),
            checkpoints,
            bitmaps,
            in_image,
            consumers,
            layers,
            prepared,
            committed,
            next_layer,
            ..empty()
        },
    )
}

#[test]
fn a_snapshot_of_before_there_were_notes_is_crash_consistent() {
    let entry = serde_json::json!({
        "uuid": Uuid::nil(), "name": "s", "time_ns": 0, "checkpoint": Uuid::nil(), "reference": null, "full_reason": null,
    });
    let entry: SnapshotEntry = serde_json::from_value(entry).unwrap();
    assert_eq!(entry.notes, Notes { consistency: Consistency::Crash, hooks: Vec::new() });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn every_directory_comes_back_as_it_was(directory in any_directory(), sequence: u64) {
        let slot = directory::encode(&directory.to_text().unwrap(), sequence);
        let cache = MemFile::new("dirty.log", 0);
        cache.write_at(&slot, DIRECTORY_SLOTS[0]).unwrap();
        let found = directory::read_slot(&cache, DIRECTORY_SLOTS[0]).unwrap().unwrap();
        prop_assert_eq!(found.sequence, sequence);
        prop_assert_eq!(directory::decode(&found.bytes).unwrap(), directory);
    }

    #[test]
    fn overlapping_areas_are_found_as_by_comparing_all(directory in any_directory()) {
        let faults = directory.area_faults();
        let all: Vec<(Area, Uuid)> = directory.all_bitmaps().filter_map(|b| Some((b.area?, b.uuid))).collect();
        for (index, (area, uuid)) in all.iter().enumerate() {
            let overlaps = all.iter().enumerate().any(|(other_index, (other, other_uuid))| {
                other_index != index
                    && (other, other_uuid) != (area, uuid)
                    && other.offset < area.end()
                    && area.offset < other.end()
            });
            let short = directory.all_bitmaps().filter(|b| b.area == Some(*area)).any(|b| {
                b.size.div_ceil(b.granularity) > area.len * 8
            });
            prop_assert_eq!(faults.contains_key(area), overlaps || short, "{:?} of {:?}", area, all);
        }
    }

    #[test]
    fn arbitrary_text_never_panics(text in proptest::collection::vec(any::<u8>(), 0..200)) {
        let opened = Sidecar::open(with_text(&text));
        prop_assert!(opened.is_err());
    }
}
