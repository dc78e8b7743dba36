//! Entries of tables. Input: kind (1 byte), geometry (1 byte), bytes of that kind.
//!
//! Directories and streams are put into an image that is good otherwise ([`Frame`]).

use fleecefs::image::qcow2::bitmaps_format::{Directory, Piece, data_bytes, decode_piece};
use fleecefs::image::qcow2::extensions::{BITMAPS, Extension};
use fleecefs::image::qcow2::header::{Header, SNAPSHOTS_MAX};
use fleecefs::image::qcow2::refcount::Width;
use fleecefs::image::qcow2::snapshots::SnapshotTable;
use fleecefs::image::qcow2::tables::{
    COMPRESSED, COPIED, Geometry, HostOffset, L1Entry, L2Entry, ZERO, decode_l1, decode_l2,
};
use fleecefs::image::qcow2::{Parts, Qcow2Image, read_header};
use fleecefs::image::{Image, OpenOptions};
use fleecefs::storage::{MemFile, Storage};

/// Longest bits of a bitmap that are loaded here.
const BITS_MAX_BYTES: u64 = 1 << 20;

/// Runs the target.
pub fn run(input: &[u8]) {
    let [kind, shape, bytes @ ..] = input else { return };
    match kind % 7 {
        0 => l1_entries(*shape, bytes),
        1 => l2_entries(*shape, bytes),
        2 => refcounts(*shape, bytes),
        3 => bitmap_table(*shape, bytes),
        4 => bitmap_directory(*shape, bytes),
        5 => snapshot_table(*shape, bytes),
        _ => compressed_stream(*shape, bytes),
    }
}

fn words(bytes: &[u8]) -> impl Iterator<Item = u64> + '_ {
    bytes.chunks_exact(8).map(|word| u64::from_be_bytes(word.try_into().expect("eight")))
}

/// Cluster size in the low bits, kind of image in the high ones.
fn geometry(shape: u8) -> Geometry {
    let version = if shape >> 4 == 0 { 2 } else { 3 };
    let cluster_bits = 9 + u32::from(shape & 15) % 13;
    let extended_l2 = version == 3 && shape >> 4 & 1 == 1 && cluster_bits >= 14;
    Geometry { cluster_bits, version, extended_l2, external_data: version == 3 && shape >> 5 & 1 == 1 }
}

fn flag(copied: bool) -> u64 {
    if copied { COPIED } else { 0 }
}

fn l1_entries(shape: u8, bytes: &[u8]) {
    let geometry = geometry(shape);
    for raw in words(bytes) {
        match decode_l1(raw, &geometry) {
            Ok(L1Entry::Unallocated) => assert_eq!(raw, 0),
            Ok(L1Entry::Table { offset, copied }) => {
                assert_eq!(offset.0 | flag(copied), raw);
                assert!(offset.0 != 0 && offset.0.is_multiple_of(geometry.cluster_size()) && offset.0 < 1 << 56);
            }
            Err(e) => assert!(e.to_string().contains(&format!("{raw:#018x}")), "{e}"),
        }
    }
}

fn l2_entries(shape: u8, bytes: &[u8]) {
    let geometry = geometry(shape);
    let mut words = words(bytes);
    while let Some(raw) = words.next() {
        let bitmap = if geometry.extended_l2 { words.next().unwrap_or(0) } else { 0 };
        match decode_l2(raw, bitmap, &geometry) {
            Ok(entry) => assert_eq!(stored(entry, &geometry), (raw, bitmap), "{entry:?}"),
            Err(e) => assert!(e.to_string().contains(&format!("{raw:#018x}")), "{e}"),
        }
    }
}

/// The words that stand for an entry.
fn stored(entry: L2Entry, geometry: &Geometry) -> (u64, u64) {
    let aligned = |offset: HostOffset| {
        assert!(offset.0.is_multiple_of(geometry.cluster_size()) && offset.0 < 1 << 56, "{offset}");
        assert!(offset.0 != 0 || geometry.external_data);
        offset.0
    };
    match entry {
        L2Entry::Unallocated => (0, 0),
        L2Entry::ZeroPlain => (ZERO, 0),
        L2Entry::ZeroPreallocated { offset, copied } => (aligned(offset) | flag(copied) | ZERO, 0),
        L2Entry::Standard { offset, copied } => (aligned(offset) | flag(copied), 0),
        L2Entry::Compressed(at) => {
            assert!((1..=2 * geometry.cluster_size()).contains(&at.max_bytes) && at.offset.0 < 1 << 56);
            let sectors = (at.offset.0 % 512 + at.max_bytes) / 512 - 1;
            (COMPRESSED | at.offset.0 | sectors << (62 - (geometry.cluster_bits - 8)), 0)
        }
        L2Entry::Subclusters { offset, copied, allocated, zero } => {
            assert!(geometry.extended_l2 && allocated & zero == 0 && (allocated == 0 || offset.is_some()));
            (offset.map_or(0, aligned) | flag(copied), u64::from(allocated) | u64::from(zero) << 32)
        }
    }
}

/// Refcounts of every width are what a copy bit by bit has at their places.
fn refcounts(shape: u8, bytes: &[u8]) {
    let Some(width) = Width::new(u32::from(shape % 8)) else { return assert_eq!(shape % 8, 7) };
    let Some((ops, block)) = bytes.split_at_checked(bytes.len() / 2) else { return };
    let mut block = block.to_vec();
    let count = block.len() as u64 * 8 / u64::from(width.bits());
    let mut model: Vec<u64> = (0..count).map(|index| bits_of(&block, width.bits(), index)).collect();
    for op in words(ops) {
        let (index, value) = (op >> 48, op & width.max());
        let old = model.get(index as usize).copied();
        assert_eq!(width.get(&block, index), old.unwrap_or(0));
        width.set(&mut block, index, value);
        if let Some(slot) = model.get_mut(index as usize) {
            *slot = value;
        }
    }
    for (index, value) in (0..).zip(&model) {
        assert_eq!(bits_of(&block, width.bits(), index), *value);
        assert_eq!(width.get(&block, index), *value);
    }
}

/// Narrow refcounts begin at the least significant bit of a byte, wide ones are big-endian.
fn bits_of(block: &[u8], bits: u32, index: u64) -> u64 {
    let bits = u64::from(bits);
    if bits < 8 {
        let at = index * bits;
        return (0..bits).map(|bit| u64::from(block[(at / 8) as usize] >> ((at + bit) % 8) & 1) << bit).sum();
    }
    let start = (index * bits / 8) as usize;
    block[start..start + bits as usize / 8].iter().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

fn bitmap_table(shape: u8, bytes: &[u8]) {
    let cluster = geometry(shape).cluster_size();
    for raw in words(bytes) {
        match decode_piece(raw, cluster) {
            Ok(Piece::Zeros) => assert_eq!(raw, 0),
            Ok(Piece::Ones) => assert_eq!(raw, 1),
            Ok(Piece::Stored(offset)) => {
                assert_eq!(offset.0, raw);
                assert!(offset.0.is_multiple_of(cluster) && offset.0 < 1 << 56 && offset.0 != 0);
            }
            Err(e) => assert!(e.to_string().contains(&format!("{raw:#018x}")), "{e}"),
        }
    }
}

/// A small good image: header, refcount table, its block, L1 table, an L2 table, and what a test puts behind.
struct Frame {
    file: MemFile,
    header: Header,
}

/// First cluster behind the metadata of a [`Frame`].
const FREE: u64 = 5;

impl Frame {
    /// With `behind` from cluster [`FREE`] on, and the first L2 entry.
    fn new(cluster_bits: u32, zstd: bool, l2_entry: u64, behind: &[u8]) -> Frame {
        let cluster = 1u64 << cluster_bits;
        let file = MemFile::new("image", FREE * cluster + behind.len() as u64);
        let mut header = vec![0; 112];
        let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, b"QFI\xfb\0\0\0\x03");
        put(20, &cluster_bits.to_be_bytes());
        put(24, &(cluster * 3).to_be_bytes());
        put(36, &1u32.to_be_bytes());
        put(40, &(3 * cluster).to_be_bytes());
        put(48, &cluster.to_be_bytes());
        put(56, &1u32.to_be_bytes());
        put(72, &(u64::from(zstd) << 3).to_be_bytes());
        put(96, &4u32.to_be_bytes());
        put(100, &112u32.to_be_bytes());
        put(104, &[u8::from(zstd)]);
        let words = [(cluster, 2 * cluster), (3 * cluster, 4 * cluster + COPIED), (4 * cluster, l2_entry)];
        file.write_at(&header, 0).expect("memory takes it");
        for (at, word) in words {
            file.write_at(&word.to_be_bytes(), at).expect("memory takes it");
        }
        file.write_at(behind, FREE * cluster).expect("memory takes it");
        let header = read_header(&file).expect("the frame is good");
        Frame { file, header }
    }
}

/// Bytes 0-7: number, granularity of a small disk, length of the directory; then the directory and what lies behind it.
fn bitmap_directory(shape: u8, bytes: &[u8]) {
    let Some((fixed, rest)) = bytes.split_first_chunk::<8>() else { return };
    let [count_high, count_low, size_bits, consistent, length @ ..] = *fixed;
    let cluster_bits = 9 + u32::from(shape) % 8;
    let Frame { file, mut header } = Frame::new(cluster_bits, false, 0, rest);
    let count = u32::from(u16::from_be_bytes([count_high, count_low]));
    let directory_offset = FREE << cluster_bits;
    let mut data = count.to_be_bytes().to_vec();
    data.extend(0u32.to_be_bytes());
    data.extend(u64::from(u32::from_be_bytes(length)).to_be_bytes());
    data.extend(directory_offset.to_be_bytes());
    header.extensions.all.push(Extension { kind: BITMAPS, data });
    header.autoclear_features = u64::from(consistent & 1);
    header.size = 1 << (size_bits % 64).min(60);
    let Ok(Some(directory)) = Directory::read(&file, &header) else { return };
    assert_eq!(directory.all.len(), count as usize);
    assert_eq!(directory.offset.0, directory_offset);
    let entries_bytes: usize =
        directory.all.iter().map(|entry| (24 + entry.extra.len() + entry.name.len()).next_multiple_of(8)).sum();
    assert_eq!(entries_bytes as u64, directory.bytes);
    for entry in &directory.all {
        assert!((1..=1023).contains(&entry.name.len()) && (9..=31).contains(&entry.granularity_bits));
        assert!(entry.table_offset.0 != 0 && entry.table_offset.0.is_multiple_of(header.cluster_size()));
        if data_bytes(header.size, entry.granularity_bits) > BITS_MAX_BYTES {
            continue;
        }
        match (entry.fault(&header, directory.consistent), entry.load(&file, &header, directory.consistent)) {
            (Some(why), Ok(_)) => panic!("loaded although {why}"),
            (None, Ok(bits)) => assert_eq!(bits.len(), header.size.div_ceil(entry.granularity_bytes())),
            (_, Err(e)) => assert!(!e.to_string().is_empty()),
        }
    }
}

/// Bytes 0-1: number of entries; then the table.
fn snapshot_table(shape: u8, bytes: &[u8]) {
    let Some((count, table)) = bytes.split_first_chunk() else { return };
    let Frame { file, mut header } = Frame::new(9 + u32::from(shape) % 8, false, 0, table);
    header.nb_snapshots = u32::from(u16::from_be_bytes(*count)).min(SNAPSHOTS_MAX);
    header.snapshots_offset = HostOffset(FREE << header.cluster_bits);
    match SnapshotTable::read(&file, &header) {
        Ok(snapshots) => {
            assert_eq!(snapshots.all.len() as u32, header.nb_snapshots);
            assert!(snapshots.bytes <= table.len() as u64);
            assert!(snapshots.all.iter().all(|snapshot| snapshot.l1_size <= 4 << 20));
        }
        Err(e) => assert!(e.to_string().starts_with("qcow2 snapshot table image: entry "), "{e}"),
    }
}

/// The stream of the first guest cluster: its bytes, or an error of that cluster alone.
fn compressed_stream(shape: u8, bytes: &[u8]) {
    let cluster_bits = 9 + u32::from(shape & 15) % 13;
    let cluster = 1u64 << cluster_bits;
    let sectors = (bytes.len() as u64).div_ceil(512).clamp(1, 2 * cluster / 512) - 1;
    let entry = (COMPRESSED + FREE * cluster) | sectors << (62 - (cluster_bits - 8));
    let Frame { file, .. } = Frame::new(cluster_bits, shape & 16 != 0, entry, bytes);
    let parts = Parts { file: file.shared(), data: None, backing: None };
    let image = Qcow2Image::over(parts, &OpenOptions { read_only: true, ..Default::default() }).expect("it is good");
    let mut first = vec![0; cluster as usize];
    let read = image.read_at(&mut first, 0);
    let mut half = vec![0; cluster as usize / 2];
    match (&read, image.read_at(&mut half, cluster / 2)) {
        (Ok(()), Ok(())) => assert_eq!(first[cluster as usize / 2..], half),
        (Err(_), Err(_)) => (),
        (one, other) => panic!("{one:?}, then {other:?}"),
    }
    let mut next = vec![1; cluster as usize];
    image.read_at(&mut next, cluster).expect("another cluster");
    assert!(next.iter().all(|byte| *byte == 0));
}
