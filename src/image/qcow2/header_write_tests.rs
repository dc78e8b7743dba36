//! Headers of all shapes, rewritten and cut off.

use super::super::extensions::{BACKING_FORMAT, BITMAPS, BitmapsExtension, Extension, FEATURE_NAMES};
use super::super::header::autoclear;
use super::super::test_cuts::Cuts;
use super::super::test_image::Shape;
use super::*;
use crate::storage::MemFile;
use parking_lot::Mutex;
use proptest::prelude::*;
use std::sync::Arc;

/// Writes the image with these extensions behind the header, and this name behind a gap.
fn image(storage: &dyn Storage, shape: Shape, list: &[(u32, usize)], backing: Option<(usize, usize)>) {
    shape.write(storage);
    let mut header = read_header(storage).unwrap();
    header.extensions.all = list
        .iter()
        .zip(1..)
        .map(|(&(kind, bytes), tag)| Extension {
            kind,
            data: vec![if kind == BACKING_FORMAT { b'r' } else { tag }; bytes],
        })
        .collect();
    let start = header.header_length as usize;
    let end = start + header.extensions.len_bytes() + 8;
    header.backing =
        backing.map(|(gap, bytes)| BackingName { offset: HostOffset((end + gap) as u64), name: vec![b'n'; bytes] });
    let layout = Layout::new(&header, start).unwrap();
    storage.write_at(&layout.bytes, 0).unwrap();
    assert_eq!(read_header(storage).unwrap(), header);
}

/// Without what may move or stay behind.
fn meaning(header: &Header) -> Header {
    let mut header = header.clone();
    header.extensions.remove(FILLER);
    if let Some(backing) = &mut header.backing {
        backing.offset = HostOffset(0);
    }
    header
}

fn first_cluster(storage: &dyn Storage, shape: Shape) -> Vec<u8> {
    let mut bytes = vec![0; shape.at(1) as usize];
    storage.read_at(&mut bytes, 0).unwrap();
    bytes
}

#[derive(Debug, Clone)]
enum Op {
    Bitmaps(u64),
    NoBitmaps,
    Set(u32, usize),
    Remove(usize),
    Features(u64),
    Size(u64),
    Name(usize),
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        3 => any::<u64>().prop_map(Op::Bitmaps),
        2 => Just(Op::NoBitmaps),
        2 => (100u32..103, 0usize..90).prop_map(|(kind, bytes)| Op::Set(kind, bytes)),
        1 => (0usize..6).prop_map(Op::Remove),
        2 => any::<u64>().prop_map(Op::Features),
        1 => (1u64..512).prop_map(Op::Size),
        1 => (1usize..300).prop_map(Op::Name),
    ]
}

fn apply(op: &Op, header: &mut Header) {
    match *op {
        Op::Bitmaps(directory_offset) => {
            let bitmaps = BitmapsExtension { count: 1, reserved: 0, directory_bytes: 99, directory_offset };
            header.extensions.set_bitmaps(bitmaps);
            header.autoclear_features |= autoclear::BITMAPS;
        }
        Op::NoBitmaps => {
            header.extensions.remove(BITMAPS);
            header.autoclear_features &= !autoclear::BITMAPS;
        }
        Op::Set(kind, bytes) => header.extensions.set(kind, vec![7; bytes]),
        Op::Remove(index) => {
            let kind = header.extensions.all.get(index).map_or(0, |extension| extension.kind);
            if kind != BITMAPS {
                header.extensions.remove(kind);
            }
        }
        Op::Features(bits) => {
            let known = header.autoclear_features & autoclear::BITMAPS;
            header.autoclear_features = known | (bits & !(autoclear::BITMAPS | autoclear::RAW_DATA_FILE));
        }
        Op::Size(size) => header.size = size,
        Op::Name(bytes) => {
            if let Some(backing) = &mut header.backing {
                backing.name = vec![b'm'; bytes];
            }
        }
    }
}

type List = Vec<(u32, usize)>;

fn list() -> impl Strategy<Value = List> {
    let features = prop_oneof![Just(vec![]), Just(vec![(FEATURE_NAMES, 336)]), Just(vec![(FEATURE_NAMES, 384)])];
    let rest = prop_oneof![Just(vec![]), Just(vec![(77, 5), (78, 0), (79, 48)]), Just(vec![(77, 600)])];
    (prop_oneof![Just(vec![]), Just(vec![(BACKING_FORMAT, 3)])], features, rest)
        .prop_map(|(a, b, c)| [a, b, c].concat())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn a_power_loss_leaves_the_old_header_or_the_new_one(
        list in list(),
        backing in prop::option::of((prop_oneof![Just(0usize), 0usize..100], 1usize..300)),
        cluster_bits in 11u32..13,
        ops in prop::collection::vec(op(), 1..5),
        crash_after in 0usize..40,
    ) {
        let shape = Shape::new(cluster_bits, 4, 1);
        let cuts = Cuts::new((10, 60), |storage| image(storage, shape, &list, backing));
        let allowed = Arc::new(Mutex::new(Vec::new()));
        for op in ops {
            let old = read_header(&*cuts).unwrap();
            let mut new = old.clone();
            apply(&op, &mut new);
            *allowed.lock() = vec![meaning(&old), meaning(&new)];
            let (known, survivors) = (allowed.clone(), Arc::new(Mutex::new(Vec::new())));
            let kept = survivors.clone();
            let mut count = 0;
            cuts.watch(move |left| {
                let found = meaning(&read_header(left).expect("a power loss never makes an image unusable"));
                assert!(known.lock().contains(&found), "{found:#?}\nis none of\n{:#?}", known.lock());
                count += 1;
                if count % 7 == crash_after % 7 && kept.lock().len() < 6 {
                    kept.lock().push((found, first_cluster(left, shape)));
                }
            });
            let before = first_cluster(&*cuts, shape);
            match update(&*cuts, |header| apply(&op, header)) {
                Ok(header) => {
                    prop_assert_eq!(meaning(&header), meaning(&new));
                    prop_assert_eq!(header.extensions.find(FILLER), None);
                    cuts.sync().unwrap();
                    prop_assert_eq!(read_header(&*cuts).unwrap(), header);
                }
                Err(e) => {
                    prop_assert_eq!(e.errno(), errno::ENOSPC);
                    prop_assert_eq!(first_cluster(&*cuts, shape), before);
                }
            }
            cuts.leave();
            // Whatever is left can be changed again, and then has no trace of the cut.
            for (header, bytes) in std::mem::take(&mut *survivors.lock()) {
                let file = MemFile::new("b", 0);
                shape.write(&file);
                file.write_at(&bytes, 0).unwrap();
                match update(&file, |header| header.compatible_features ^= 1 << 9) {
                    Ok(again) => {
                        prop_assert_eq!(again.extensions.find(FILLER), None);
                        let expected = Header { compatible_features: header.compatible_features ^ 1 << 9, ..header };
                        prop_assert_eq!(meaning(&again), expected.clone());
                        prop_assert_eq!(meaning(&read_header(&file).unwrap()), expected);
                    }
                    Err(e) => prop_assert_eq!(e.errno(), errno::ENOSPC),
                }
            }
        }
    }
}

#[test]
fn what_is_not_changed_is_not_written() {
    for version in [2, 3] {
        let shape = Shape { version, ..Shape::new(12, 4, 3) };
        let file = MemFile::new("a", 0);
        image(&file, shape, &[(BACKING_FORMAT, 3), (1234, 11), (FEATURE_NAMES, 384)], Some((24, 77)));
        // Padding and room that nobody uses may hold anything.
        let at = u64::from(read_header(&file).unwrap().header_length) + 8 + 3;
        file.write_at(b"pad", shape.at(1) - 500).unwrap();
        let before = first_cluster(&file, shape);
        let header = update(&file, |_| ()).unwrap();
        assert_eq!(first_cluster(&file, shape), before);
        assert_eq!(header, read_header(&file).unwrap());
        file.write_at(b"x", at).unwrap();
        update(&file, |header| header.size = 5).unwrap();
        let after = read_header(&file).unwrap();
        assert_eq!(after, Header { size: 5, ..header });
    }
}

#[test]
fn unknown_fields_of_a_longer_header_stay() {
    let shape = Shape::new(12, 4, 1);
    let file = MemFile::new("a", 0);
    shape.write(&file);
    let mut bytes = vec![0; 160];
    file.read_at(&mut bytes, 0).unwrap();
    bytes[103] = 144;
    bytes[112..144].fill(0xab);
    file.write_at(&bytes, 0).unwrap();
    let header = update(&file, |header| header.extensions.set(99, vec![1, 2, 3])).unwrap();
    assert_eq!(header.additional, [&[0; 8][..], &[0xab; 32]].concat());
    assert_eq!(read_header(&file).unwrap(), header);
    assert_eq!(header.extensions.find(99), Some(&[1, 2, 3][..]));
}

#[test]
fn a_header_that_does_not_fit_is_not_begun() {
    let shape = Shape::new(9, 4, 1);
    let file = MemFile::new("a", 0);
    image(&file, shape, &[(FEATURE_NAMES, 336), (BACKING_FORMAT, 3)], Some((0, 20)));
    let before = first_cluster(&file, shape);
    let add = |header: &mut Header| header.extensions.set(99, vec![1; 24]);
    assert_eq!(check(&file, add).unwrap_err().errno(), errno::ENOSPC);
    let e = update(&file, add).unwrap_err();
    assert!(e.errno() == errno::ENOSPC && e.to_string().contains("first cluster of 512 bytes"), "{e}");
    assert_eq!(first_cluster(&file, shape), before);
    // In a cluster of one sector there is no need for a second copy.
    update(&file, |header| header.extensions.set(99, vec![])).unwrap();
    assert_eq!(read_header(&file).unwrap().extensions.find(99), Some(&[][..]));
}

#[test]
fn a_header_that_would_be_refused_is_not_written() {
    let shape = Shape::new(12, 4, 1);
    let file = MemFile::new("a", 0);
    shape.write(&file);
    let before = first_cluster(&file, shape);
    let refused: [fn(&mut Header); 4] = [
        |header| header.autoclear_features |= autoclear::BITMAPS,
        |header| header.size = 1 << 40,
        |header| header.l1_table_offset = HostOffset(512),
        |header| header.extensions.set(BITMAPS, vec![0; 23]),
    ];
    for change in refused {
        assert_eq!(update(&file, change).unwrap_err().errno(), errno::EINVAL);
        assert_eq!(first_cluster(&file, shape), before);
    }
}
