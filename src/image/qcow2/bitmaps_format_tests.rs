//! Bitmaps by the bytes: what is read, refused, and listed without trust.

use super::super::extensions::{BITMAPS, Extension};
use super::super::read_header;
use super::super::test_image::Shape;
use super::*;
use crate::storage::MemFile;

const SHAPE: Shape = Shape { version: 3, cluster_bits: 12, order: 4, data_clusters: 100, incompatible: 0 };

/// Cluster of the directory; the table and the data follow.
fn directory() -> u64 {
    SHAPE.at(SHAPE.end())
}

/// A directory entry: 4 KiB granularity, one table entry.
fn entry(name: &str) -> Vec<u8> {
    let mut raw = Vec::new();
    raw.extend((directory() + 4096).to_be_bytes());
    raw.extend(1u32.to_be_bytes());
    raw.extend(flag::AUTO.to_be_bytes());
    raw.extend([1, 12]);
    raw.extend((name.len() as u16).to_be_bytes());
    raw.extend(0u32.to_be_bytes());
    raw.extend(name.bytes());
    raw.resize(raw.len().next_multiple_of(8), 0);
    raw
}

/// An image with this directory, whose extension says `count` and `bytes`; the bits are a cluster of `data`.
fn image(raw: &[u8], count: u32, bytes: u64, data: &[u8]) -> (MemFile, Header) {
    let file = MemFile::new("a", 0);
    SHAPE.write(&file);
    file.write_at(raw, directory()).unwrap();
    file.write_at(&(directory() + 8192).to_be_bytes(), directory() + 4096).unwrap();
    file.set_len(directory() + 3 * 4096).unwrap();
    file.write_at(data, directory() + 8192).unwrap();
    let mut header = read_header(&file).unwrap();
    header.autoclear_features = autoclear::BITMAPS;
    let mut extension = count.to_be_bytes().to_vec();
    extension.extend([0; 4]);
    extension.extend(bytes.to_be_bytes());
    extension.extend(directory().to_be_bytes());
    header.extensions.all.push(Extension { kind: BITMAPS, data: extension });
    (file, header)
}

fn read(raw: &[u8]) -> Result<Option<Directory>> {
    let (file, header) = image(raw, 1, raw.len() as u64, &[]);
    Directory::read(&file, &header)
}

#[test]
fn bits_lie_least_significant_first_and_end_with_the_disk() {
    let raw = entry("b");
    let load = |data: &[u8]| {
        let (file, header) = image(&raw, 1, raw.len() as u64, data);
        let directory = Directory::read(&file, &header).unwrap().unwrap();
        directory.all[0].load(&file, &header, directory.consistent)
    };
    let mut data = [0; 16];
    (data[0], data[9], data[12]) = (0b101, 0x80, 0b1000);
    let bits = load(&data).unwrap();
    let set: Vec<u64> = (0..200).filter(|bit| bits.get(*bit)).collect();
    assert_eq!((bits.len(), set), (100, vec![0, 2, 79, 99]));
    data[12] = 0b1_0000;
    assert_eq!(load(&data).unwrap_err().errno(), errno::EINVAL);
    assert_eq!(load(&[&[0; 4000][..], &[1]].concat()).unwrap_err().errno(), errno::EINVAL);
}

#[test]
fn a_directory_that_breaks_a_rule_is_refused() {
    assert_eq!(read(&entry("b")).unwrap().unwrap().all[0].name, "b");
    type Break = (&'static str, fn(&mut Vec<u8>));
    let broken: [Break; 11] = [
        ("table_offset", |raw| raw[7] = 1),
        ("table_offset", |raw| raw[..8].fill(0)),
        ("table_size 131073 stands for more than 512 MiB", |raw| raw[8..12].copy_from_slice(&131_073u32.to_be_bytes())),
        ("type", |raw| raw[16] = 2),
        ("granularity_bits", |raw| raw[17] = 8),
        ("granularity_bits", |raw| raw[17] = 32),
        ("name", |raw| raw[19] = 0),
        ("name", |raw| raw[24] = 0),
        ("behind", |raw| raw[20] = 1),
        ("padding", |raw| raw[31] = 1),
        ("left", |raw| raw.extend([0; 8])),
    ];
    for (why, change) in broken {
        let mut raw = entry("b");
        change(&mut raw);
        let e = read(&raw).unwrap_err();
        assert!(e.errno() == errno::EINVAL && e.to_string().contains(why), "{why}: {e}");
    }
    let twice = [entry("b"), entry("b")].concat();
    for (count, bytes) in [(2, twice.len() as u64), (0, 32), (65_536, 32), (1, 31), (1, 65 << 20), (1, 1 << 40)] {
        let (file, header) = image(&twice, count, bytes, &[]);
        assert_eq!(Directory::read(&file, &header).unwrap_err().errno(), errno::EINVAL, "{count} {bytes}");
    }
}

#[test]
fn a_bitmap_that_cannot_be_trusted_is_listed_and_not_loaded() {
    type Break = (&'static str, fn(&mut Vec<u8>));
    let faults: [Break; 4] = [
        ("in use", |raw| raw[15] |= 1),
        ("flags", |raw| raw[14] = 1),
        ("table has 2", |raw| raw[11] = 2),
        ("extra data", |raw| {
            raw[23] = 8;
            raw.splice(24..24, [7; 8]);
        }),
    ];
    for (why, change) in faults {
        let mut raw = entry("b");
        change(&mut raw);
        let (file, header) = image(&raw, 1, raw.len() as u64, &[]);
        let directory = Directory::read(&file, &header).unwrap().unwrap();
        let entry = &directory.all[0];
        assert!(entry.fault(&header, true).unwrap().contains(why), "{why}: {:?}", entry.fault(&header, true));
        assert!(entry.load(&file, &header, true).is_err());
    }
    let raw = entry("b");
    let (file, mut header) = image(&raw, 1, raw.len() as u64, &[1]);
    header.autoclear_features = 0;
    let directory = Directory::read(&file, &header).unwrap().unwrap();
    assert!(!directory.consistent);
    assert!(directory.all[0].load(&file, &header, directory.consistent).is_err());
}

#[test]
fn table_entries_are_decoded_strictly() {
    assert_eq!(decode_piece(0, 4096).unwrap(), Piece::Zeros);
    assert_eq!(decode_piece(1, 4096).unwrap(), Piece::Ones);
    assert_eq!(decode_piece(8192, 4096).unwrap(), Piece::Stored(HostOffset(8192)));
    for raw in [2, 8193, 8192 | 1 << 56, 512, 1 << 63] {
        assert!(decode_piece(raw, 4096).is_err(), "{raw:#x}");
    }
}
