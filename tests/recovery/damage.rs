//! A `dirty.log` that is damaged, from the future, or another disk's.

use crate::rig::*;
use fleecefs::bitmap::sidecar::layout;
use fleecefs::error::errno;
use fleecefs::fleece::Fleece;
use fleecefs::storage::mem::MemFile;
use fleecefs::storage::{Dir, SharedStorage, Storage};
use std::sync::Arc;

const LOG: &str = "dirty.log";
const MORE: Allow = Allow { broken: false, more: true, lost: false, retry: false };

/// A disk with two checkpoints and changes, stopped cleanly or killed.
fn stopped(clean: bool) -> (Host, Oracle) {
    let host = Host::one();
    let fleece = host.mount();
    let mut oracle = Oracle::new(&host);
    for (seed, name) in [(1, "s1"), (2, "s2")] {
        oracle.write(&fleece, "a", u64::from(seed) * GRANULE, 100, seed).unwrap();
        oracle.freeze(&fleece, name).unwrap();
        fleece.complete_snapshot(name, Some("daily")).unwrap();
    }
    oracle.write(&fleece, "a", 3 * GRANULE, 100, 3).unwrap();
    if clean {
        fleece.close().unwrap();
    }
    drop(fleece);
    (host, oracle)
}

fn log(host: &Host) -> SharedStorage {
    host.files["a"].state.open(LOG).unwrap()
}

fn flip(file: &SharedStorage, offset: u64) {
    let mut byte = [0];
    file.read_at(&mut byte, offset).unwrap();
    file.write_at(&[!byte[0]], offset).unwrap();
}

/// It can be mounted, and nothing that it says is wrong.
fn check_mounts(host: &Host, oracle: &mut Oracle, what: &str) -> Arc<Fleece> {
    let fleece = host.empty_mount();
    host.attach(&fleece, "a").unwrap_or_else(|e| panic!("{what}: {e}"));
    let known: Vec<String> = fleece.checkpoints().into_iter().map(|info| info.name).collect();
    oracle.check(&fleece, MORE);
    let found = fleece.disk_infos()[0].tracking.clone();
    oracle.freeze(&fleece, "probe").unwrap();
    oracle.check(&fleece, MORE);
    let aside = host.files["a"].state.list("").unwrap().iter().any(|name| name.starts_with("dirty.log.damaged"));
    if known.is_empty() {
        assert!(aside, "{what}: what was known is gone, and the file was not kept");
        assert!(found.starts_with("everything"), "{what}: {found}");
        assert_eq!(fleece.disk_infos()[0].tracking, "exact since 'probe'", "{what}");
        let view = view_of(&fleece, "probe", "a");
        assert!(view.reference().is_none() && view.full_reason().is_some());
    } else {
        assert_eq!(known, ["s1", "s2"], "{what}");
        assert!(!aside, "{what}");
    }
    fleece
}

#[test]
fn any_flipped_byte_costs_exactness_at_most() {
    let text = layout::DIRECTORY_HEADER_BYTES as u64;
    for clean in [true, false] {
        for slots in [layout::SUPERBLOCK_SLOTS, layout::DIRECTORY_SLOTS] {
            for fields in
                [0, 8, 12, 16, 24, 32, 40, 48, 56, 72, 88, 104, 128, 130, text + 1, text + 200, layout::PAGE - 2]
            {
                for damaged in [&slots[..1], &slots[1..], &slots[..]] {
                    let (host, mut oracle) = stopped(clean);
                    damaged.iter().for_each(|slot| flip(&log(&host), slot + fields));
                    let what = format!("byte {fields} of {damaged:?}, clean {clean}");
                    let fleece = check_mounts(&host, &mut oracle, &what);
                    // With its checkpoint gone, too, an interval that is not known would go on.
                    fleece.complete_snapshot("probe", None).unwrap();
                    fleece.close().unwrap();
                    let fleece = host.mount();
                    assert_eq!(fleece.disk_infos()[0].tracking, "exact", "{what}");
                }
            }
        }
    }
}

#[test]
fn a_file_cut_short_at_any_length_costs_exactness_at_most() {
    let ends = [
        layout::SUPERBLOCK_SLOTS[1],
        layout::INTENT_OFFSET,
        layout::DIRECTORY_SLOTS[0],
        layout::DIRECTORY_SLOTS[1],
        layout::AREAS_START,
    ];
    let lengths = ends.into_iter().flat_map(|end| [end, end + 1, end + 100, end + 4096]).chain([0, 1, 100, 4000]);
    for len in lengths {
        for clean in [true, false] {
            let (host, mut oracle) = stopped(clean);
            log(&host).set_len(len).unwrap();
            check_mounts(&host, &mut oracle, &format!("cut to {len}, clean {clean}"));
        }
    }
}

#[test]
fn arbitrary_bytes_in_its_place_cost_exactness_at_most() {
    for content in [&b""[..], b"x", &[0; 70_000], &[0xff; 70_000], b"FLEECEDL"] {
        for clean in [true, false] {
            let (host, mut oracle) = stopped(clean);
            let file = log(&host);
            file.set_len(0).unwrap();
            file.write_at(content, 0).unwrap();
            let fleece = check_mounts(&host, &mut oracle, &format!("{} bytes", content.len()));
            assert!(!fleece.problems().is_empty(), "an operator is told");
        }
    }
}

#[test]
fn the_stores_of_a_damaged_log_are_not_left_behind() {
    let host = Host::one();
    let fleece = host.mount();
    freeze(&fleece, "s");
    drop(fleece);
    log(&host).set_len(0).unwrap();
    let fleece = host.mount();
    assert!(fleece.snapshots().is_empty());
    wait_for("the store is removed", || host.files["a"].layers().is_empty());
}

#[test]
fn a_newer_version_is_refused_and_left_as_it_is() {
    for (field, value) in [(8, 2_u8), (16, 1)] {
        let (host, mut oracle) = stopped(true);
        let file = log(&host);
        let before = read_all(&file);
        for slot in layout::SUPERBLOCK_SLOTS {
            let mut page = vec![0; layout::PAGE as usize];
            file.read_at(&mut page, slot).unwrap();
            page[field] = value;
            let end = page.len() - 4;
            let crc = crc32c::crc32c(&page[..end]);
            page[end..].copy_from_slice(&crc.to_le_bytes());
            file.write_at(&page, slot).unwrap();
        }
        let newer = read_all(&file);
        let e = assert_errno(host.attach(&host.empty_mount(), "a"), errno::EOPNOTSUPP);
        assert!(e.hint_text().unwrap().contains("newer"), "{e}");
        assert!(read_all(&file) == newer, "untouched");
        assert_eq!(host.files["a"].state.list("").unwrap(), [LOG]);
        file.write_at(&before, 0).unwrap();
        let fleece = host.mount();
        oracle.check_all(&fleece, "probe", Allow { more: true, ..EXACT });
    }
}

fn read_all(file: &SharedStorage) -> Vec<u8> {
    let mut bytes = vec![0; file.len().unwrap() as usize];
    file.read_at(&mut bytes, 0).unwrap();
    bytes
}

/// The same state directory, another image under the same name: what is known is not of this image.
#[test]
fn the_state_of_another_disk_is_not_believed() {
    for clean in [true, false] {
        for size in [DISK_BYTES, DISK_BYTES + 512, 2 * GRANULE] {
            // As the images of two guests that were made at the same time are: nothing but the file differs.
            let other = MemFile::new("other.img", size);
            other.write_at(&pattern(77, 0, size), 0).unwrap();
            let (mut host, _) = stopped(clean);
            host.files.get_mut("a").unwrap().image = other;
            let fleece = host.mount();
            let tracking = fleece.disk_infos()[0].tracking.clone();
            assert!(tracking.starts_with("everything"), "clean {clean}, size {size}: {tracking}");
            let snapshot = freeze(&fleece, "probe");
            let map = snapshot.views()[0].map(snapshot.views()[0].reference().map(|point| point.uuid)).unwrap();
            assert_eq!(map.dirty_bytes(), size);
        }
    }
}
