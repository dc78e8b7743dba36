//! Images that break one rule each: refused with the name of what is wrong, and not touched.

use crate::build::*;
use crate::qemu::*;
use fleecefs::error::Error;
use fleecefs::error::errno::{EINVAL, EIO, ELOOP, ENOENT, EOPNOTSUPP, EROFS};
use fleecefs::image::{Format, OpenOptions};
use sha2::{Digest, Sha256};
use std::path::Path;

type Break = fn(&mut Vec<u8>);

const C: u64 = 4096;
/// The L2 entries of [`Build::small`].
const ENTRY: u64 = L2 * C;

fn or64(file: &mut [u8], at: u64, bits: u64) {
    put64(file, at, get64(file, at) | bits);
}

fn incompatible(file: &mut [u8], bits: u64) {
    or64(file, 72, bits);
}

/// An extension in place of the one that [`Build::small`] has behind its header.
fn extension(file: &mut [u8], kind: u32, count: u32) {
    file[112..200].fill(0);
    put32(file, 112, kind);
    put32(file, 116, count);
}

fn names(file: &mut [u8], bit: u8, name: &[u8]) {
    extension(file, 0x6803_F857, 48);
    file[121] = bit;
    file[122..122 + name.len()].copy_from_slice(name);
}

/// Name of what is wrong, errno, and how to break it.
const HEADERS: &[(&str, i32, Break)] = &[
    ("magic", EINVAL, |f| f[3] = 0xfa),
    ("header_length", EINVAL, |f| f.truncate(71)),
    ("header_length", EINVAL, |f| f.truncate(103)),
    ("version: 1", EOPNOTSUPP, |f| put32(f, 4, 1)),
    ("version: 4", EOPNOTSUPP, |f| put32(f, 4, 4)),
    ("cluster_bits: 8", EINVAL, |f| put32(f, 20, 8)),
    ("cluster_bits: 22", EINVAL, |f| put32(f, 20, 22)),
    ("cluster_bits: 4294967295", EINVAL, |f| put32(f, 20, u32::MAX)),
    ("cluster_bits: 12 with extended L2", EINVAL, |f| incompatible(f, 1 << 4)),
    ("backing_file_offset", EINVAL, |f| {
        put64(f, 8, C - 3);
        put32(f, 16, 4);
    }),
    ("backing_file_offset", EINVAL, |f| {
        put64(f, 8, 100);
        put32(f, 16, 4);
    }),
    ("backing_file_offset", EINVAL, |f| {
        put64(f, 8, u64::MAX);
        put32(f, 16, 4);
    }),
    ("backing_file_size: 1024", EINVAL, |f| {
        put64(f, 8, 200);
        put32(f, 16, 1024);
    }),
    ("backing_file_size: 0", EINVAL, |f| put64(f, 8, 200)),
    ("backing file name", EINVAL, |f| {
        put64(f, 8, 200);
        put32(f, 16, 4);
    }),
    ("size: ", EINVAL, |f| put64(f, 24, (1 << 60) + 1)),
    ("size: ", EINVAL, |f| put64(f, 24, u64::MAX)),
    ("l1_size: 1 entries", EINVAL, |f| put64(f, 24, 512 * C + 1)),
    ("l1_size: 0 entries", EINVAL, |f| put32(f, 36, 0)),
    ("l1_size: 4194305 entries", EINVAL, |f| put32(f, 36, (4 << 20) + 1)),
    ("l1_table_offset", EINVAL, |f| put32(f, 36, 4 << 20)),
    ("l1_table_offset: 0", EINVAL, |f| put64(f, 40, 0)),
    ("l1_table_offset: 12800 is not aligned", EINVAL, |f| put64(f, 40, L1 * C + 512)),
    ("l1_table_offset", EINVAL, |f| put64(f, 40, 1 << 40)),
    ("l1_table_offset", EINVAL, |f| put64(f, 40, (u64::MAX >> 12) << 12)),
    ("lies in the clusters of", EINVAL, |f| put64(f, 40, C)),
    ("lies in the clusters of l1_table_offset", EINVAL, |f| put32(f, 36, 1025)),
    ("crypt_method: 1 (AES)", EOPNOTSUPP, |f| put32(f, 32, 1)),
    ("crypt_method: 2 (LUKS)", EOPNOTSUPP, |f| put32(f, 32, 2)),
    ("crypt_method: 3", EINVAL, |f| put32(f, 32, 3)),
    ("refcount_table_offset: 0", EINVAL, |f| put64(f, 48, 0)),
    ("refcount_table_offset: 4097 is not aligned", EINVAL, |f| put64(f, 48, C + 1)),
    ("refcount_table_offset", EINVAL, |f| put64(f, 48, 1 << 30)),
    ("refcount_table_clusters: 0", EINVAL, |f| put32(f, 56, 0)),
    ("refcount_table_clusters: 2049", EINVAL, |f| put32(f, 56, 2049)),
    ("refcount_table_offset", EINVAL, |f| put32(f, 56, 2048)),
    ("nb_snapshots: 65537", EINVAL, |f| put32(f, 60, 65537)),
    ("snapshots_offset: 0", EINVAL, |f| put64(f, 64, 0)),
    ("snapshots_offset: 20481 is not aligned", EINVAL, |f| put64(f, 64, SNAPSHOTS * C + 1)),
    ("snapshots_offset", EINVAL, |f| put64(f, 64, 1 << 30)),
    ("snapshots_offset", EINVAL, |f| put64(f, 64, L1 * C)),
    ("incompatible_features: unknown bits: 5", EOPNOTSUPP, |f| incompatible(f, 1 << 5)),
    ("unknown bits: 7, 63", EOPNOTSUPP, |f| incompatible(f, 1 << 63 | 1 << 7)),
    ("unknown bits: 9 (time travel)", EOPNOTSUPP, |f| {
        incompatible(f, 1 << 9);
        names(f, 9, b"time travel");
    }),
    // Encryption, wrong sizes and all else come after that.
    ("unknown bits: 9", EOPNOTSUPP, |f| {
        incompatible(f, 1 << 9);
        f[24..64].fill(0xff);
    }),
    ("compression_type: 0 (zlib) although", EINVAL, |f| incompatible(f, 1 << 3)),
    ("compression_type: 1 although", EINVAL, |f| f[104] = 1),
    ("compression_type: 2", EOPNOTSUPP, |f| {
        incompatible(f, 1 << 3);
        f[104] = 2;
    }),
    ("backing_file_offset: a raw external data file", EINVAL, |f| {
        incompatible(f, 1 << 2);
        or64(f, 88, 1 << 1);
        extension(f, 0, 0);
        put64(f, 8, 136);
        put32(f, 16, 4);
        f[136..140].fill(b'x');
    }),
    ("nb_snapshots: 1 with an external data file", EINVAL, |f| incompatible(f, 1 << 2)),
    ("autoclear_features: bit 0", EINVAL, |f| put64(f, 88, 1)),
    ("autoclear_features: bit 1", EINVAL, |f| put64(f, 88, 2)),
    ("refcount_order: 7", EINVAL, |f| put32(f, 96, 7)),
    ("header_length: 0", EINVAL, |f| put32(f, 100, 0)),
    ("header_length: 96", EINVAL, |f| put32(f, 100, 96)),
    ("header_length: 108", EINVAL, |f| put32(f, 100, 108)),
    ("header_length: 4104", EINVAL, |f| put32(f, 100, C as u32 + 8)),
    ("extension: 0x12345678", EINVAL, |f| put32(f, 116, C as u32)),
    ("extension: 0x12345678", EINVAL, |f| put32(f, 116, u32::MAX)),
    ("extension: full disk encryption", EOPNOTSUPP, |f| extension(f, 0x0537_BE77, 16)),
    ("extension: bitmaps: length 23", EINVAL, |f| extension(f, 0x2385_2875, 23)),
    ("extension: feature name table: length 47", EINVAL, |f| extension(f, 0x6803_F857, 47)),
    ("extension: backing file format: length 0", EINVAL, |f| extension(f, 0xE279_2ACA, 0)),
    ("extension: backing file format: length 1024", EINVAL, |f| extension(f, 0xE279_2ACA, 1024)),
    ("extension: backing file format: has other", EINVAL, |f| extension(f, 0xE279_2ACA, 3)),
    ("extension: external data file name: has a NUL", EINVAL, |f| extension(f, 0x4441_5441, 3)),
    ("extension: external data file name: length 0", EINVAL, |f| extension(f, 0x4441_5441, 0)),
    ("extension: external data file name: length 1024", EINVAL, |f| extension(f, 0x4441_5441, 1024)),
    ("extension: bitmaps: length 25", EINVAL, |f| extension(f, 0x2385_2875, 25)),
    ("incompatible_features: bit 2", EINVAL, |f| {
        extension(f, 0x4441_5441, 1);
        f[120] = b'x';
    }),
    ("extension: backing file format: stands there twice", EINVAL, |f| {
        extension(f, 0xE279_2ACA, 8);
        f[120..128].fill(b'x');
        f.copy_within(112..128, 128);
    }),
    ("entry 0: 1025 bytes of extra data", EINVAL, |f| put32(f, SNAPSHOTS * C + 36, 1025)),
    ("entry 0: ends at", EINVAL, |f| {
        put32(f, SNAPSHOTS * C + 12, u32::MAX);
        f.truncate(17 * C as usize);
    }),
    ("entry 1: ", EINVAL, |f| put32(f, 60, 2)),
    ("entry 0: l1_size: 0 entries", EINVAL, |f| put32(f, SNAPSHOTS * C + 8, 0)),
    ("entry 0: l1_size", EINVAL, |f| put32(f, SNAPSHOTS * C + 8, (4 << 20) + 1)),
    ("entry 0: disk_size: 18446744073709551615", EINVAL, |f| put64(f, SNAPSHOTS * C + 48, u64::MAX)),
    ("l1_table_offset: 24577 is not aligned", EINVAL, |f| put64(f, SNAPSHOTS * C, SNAPSHOT_L1 * C + 1)),
    ("l1_table_offset", EINVAL, |f| put64(f, SNAPSHOTS * C, 1 << 62)),
    ("l1_table_offset", EINVAL, |f| put64(f, SNAPSHOTS * C, 0)),
    ("lies in the clusters of refcount_table_offset", EINVAL, |f| put64(f, SNAPSHOTS * C, C)),
    ("lies in the clusters of snapshots_offset", EINVAL, |f| put64(f, SNAPSHOTS * C, SNAPSHOTS * C)),
    ("entry 1: qcow2 image: the L1 table of a snapshot at host offset 24576 lies in", EINVAL, |f| {
        put32(f, 60, 2);
        f.copy_within(
            SNAPSHOTS as usize * C as usize..SNAPSHOTS as usize * C as usize + 64,
            SNAPSHOTS as usize * C as usize + 64,
        );
    }),
];

fn hash(path: &Path) -> Vec<u8> {
    Sha256::digest(std::fs::read(path).unwrap()).to_vec()
}

/// What is asked for when an image is opened, for reading or for writing.
fn asked(read_only: bool) -> OpenOptions {
    OpenOptions { format: Some(Format::Qcow2), read_only, ..Default::default() }
}

/// The error of an open that must fail, for reading as for writing, without a change of any of `files`.
#[track_caller]
fn refused(path: &Path, files: &[&Path], what: &str) -> Vec<Error> {
    let state = || -> Vec<_> {
        let of = |path: &&Path| (hash(path), std::fs::metadata(path).unwrap().modified().unwrap());
        files.iter().map(of).collect()
    };
    let before = state();
    let refuse = |read_only| match fleecefs::image::open(path, &asked(read_only)) {
        Ok(_) => panic!("{what}: opened, read-only {read_only}"),
        Err(e) => {
            assert!(state() == before, "{what}: refused after a change, read-only {read_only}: {e}");
            e
        }
    };
    [true, false].map(refuse).to_vec()
}

#[test]
fn an_image_that_breaks_a_rule_is_refused_by_name_and_not_touched() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    // What a read-write open clears in a good image: the dirty bit, and autoclear bits that it does not know.
    let marks: [Break; 3] = [|_| (), |f| or64(f, 88, 1 << 62), |f| or64(f, 72, 1)];
    for (index, (name, errno, break_it)) in HEADERS.iter().enumerate() {
        for mark in marks {
            let mut file = Build::small().bytes();
            mark(&mut file);
            break_it(&mut file);
            std::fs::write(&path, &file).unwrap();
            for e in refused(&path, &[&path], &format!("{index}: {name}")) {
                assert!(e.to_string().contains(name), "{index}: {name}: {e}");
                assert_eq!(e.errno(), *errno, "{index}: {name}: {e}");
                assert!(e.to_string().contains(path.to_str().unwrap()), "{index}: no path: {e}");
            }
        }
    }
}

#[test]
fn an_image_whose_chain_is_refused_is_not_touched() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    let (base, data) = (dir.path().join("base"), dir.path().join("data"));
    std::fs::write(&data, [7; 512]).unwrap();
    let external = |name: &str| {
        let extensions = (!name.is_empty()).then(|| (0x4441_5441, name.as_bytes().to_vec())).into_iter().collect();
        let mut file = Build { snapshot: false, clusters: vec![], extensions, ..Build::small() }.bytes();
        incompatible(&mut file, 1 << 2);
        file
    };
    let mut unknown_bit = Build::small().bytes();
    incompatible(&mut unknown_bit, 1 << 40);
    let raw_below = |format| Build::overlay("base", format).bytes();
    let cases: &[(&str, Vec<u8>, Vec<u8>)] = &[
        ("doesn't record its format", raw_below(None), vec![7; 4096]),
        ("'vmdk' is not supported", raw_below(Some("vmdk")), vec![7; 4096]),
        ("unknown bits: 40", raw_below(Some("qcow2")), unknown_bit),
        ("is in its own backing chain", Build::overlay("image", Some("qcow2")).bytes(), vec![]),
        ("No such file", Build::overlay("no-such-file", Some("raw")).bytes(), vec![]),
        ("No such file", external("no-such-file"), vec![]),
        ("is in its own backing chain", external("image"), vec![]),
        ("doesn't name its external data file", external(""), vec![]),
    ];
    for (why, image, below) in cases {
        for (at, bit) in [(88, 0), (88, 1 << 62), (72, 1)] {
            let mut image = image.clone();
            or64(&mut image, at, bit);
            std::fs::write(&base, below).unwrap();
            std::fs::write(&path, &image).unwrap();
            for e in refused(&path, &[&path, &base, &data], why) {
                assert!(e.to_string().contains(why), "{why}: {e}");
            }
        }
    }
}

#[test]
fn refcounts_that_are_not_there_are_refused_for_writing_and_do_not_matter_for_reading() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    let breaks: &[(&str, Break)] = &[
        ("entry 0", |f| put64(f, C, REFCOUNT_BLOCK * C + 512)),
        ("entry 0", |f| put64(f, C, REFCOUNT_BLOCK * C + 1)),
        ("entry 0", |f| put64(f, C, 1 << 50)),
        ("entry 3", |f| put64(f, C + 24, 1 << 40 | 1)),
        ("entry 1", |f| put64(f, C + 8, REFCOUNT_BLOCK * C)),
        ("an L2 table at host offset 8192 lies where", |f| put64(f, L1 * C + 8, 1 << 63 | (REFCOUNT_BLOCK * C))),
        ("lies in the clusters of l1_table_offset", |f| put64(f, C + 8, L1 * C)),
        ("lies in the clusters of the L1 table of a snapshot", |f| put64(f, C, SNAPSHOT_L1 * C)),
    ];
    for (name, break_it) in breaks {
        let build = Build::small();
        let mut file = build.bytes();
        // Room for a second L2 table, of which nothing is read.
        put32(&mut file, 36, 2);
        or64(&mut file, 88, 1 << 62);
        break_it(&mut file);
        std::fs::write(&path, &file).unwrap();
        assert_eq!(bytes(&*open(&path).unwrap(), 4096), build.content(0), "{name}");
        let e = fleecefs::image::open(&path, &asked(false)).unwrap_err();
        assert!(e.to_string().contains("refcount") && e.to_string().contains(name), "{name}: {e}");
        assert!(std::fs::read(&path).unwrap() == file, "{name}: touched");
    }
}

/// What is in the error, and how to break the L2 entry of guest cluster 0 or 1; the other stays readable.
const ENTRIES: &[(&str, u64, Break)] = &[
    ("L2 entry", 0, |f| or64(f, ENTRY, 2)),
    ("reserved bits 0x100 are set", 0, |f| or64(f, ENTRY, 1 << 8)),
    ("reserved bits", 0, |f| or64(f, ENTRY, 1 << 56)),
    ("reserved bits", 0, |f| or64(f, ENTRY, 1 << 61)),
    ("not aligned", 0, |f| or64(f, ENTRY, 512)),
    ("offset 0 with bit 63 set", 0, |f| put64(f, ENTRY, 1 << 63)),
    ("is not inside the file", 0, |f| put64(f, ENTRY, 1 << 40)),
    ("lies in the clusters of refcount_table_offset", 0, |f| put64(f, ENTRY, C)),
    ("lies in the clusters of l1_table_offset", 0, |f| put64(f, ENTRY, L1 * C)),
    ("lies in the clusters of snapshots_offset", 0, |f| put64(f, ENTRY, SNAPSHOTS * C)),
    ("lies in the clusters of the L1 table of a snapshot", 0, |f| put64(f, ENTRY, SNAPSHOT_L1 * C)),
    ("bit 63 is set on a compressed cluster", 1, |f| f[ENTRY as usize + 8] |= 0x80),
    ("is not inside the file", 1, |f| put64(f, ENTRY + 8, 1 << 62 | 1 << 50)),
    ("reserved bits above bit 55", 1, |f| or64(f, ENTRY + 8, 1 << 56)),
    ("lies in the clusters of header", 1, |f| put64(f, ENTRY + 8, 1 << 62)),
    ("compressed data", 1, |f| {
        let at = get64(f, ENTRY + 8) & 0xffff_ffff;
        f[at as usize..at as usize + 20].fill(0xff);
    }),
    // A stored block of no bytes, the last one: a stream that ends at once.
    ("ends after 0 of 4096", 1, |f| {
        let at = (get64(f, ENTRY + 8) & 0xffff_ffff) as usize;
        f[at..at + 5].copy_from_slice(&[1, 0, 0, 0xff, 0xff]);
    }),
];

#[test]
fn a_wrong_l2_entry_is_an_error_of_its_cluster_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    for (name, guest, break_it) in ENTRIES {
        let build = Build::small();
        let mut file = build.bytes();
        break_it(&mut file);
        std::fs::write(&path, &file).unwrap();
        let before = hash(&path);
        let image = open(&path).unwrap();
        let mut cluster = vec![0; C as usize];
        let e = image.read_at(&mut cluster, guest * C).unwrap_err();
        assert!(e.to_string().contains(name), "{name}: {e}");
        assert_eq!(e.errno(), EIO);
        assert!(e.to_string().contains(path.to_str().unwrap()), "no path: {e}");
        assert!(e.to_string().contains(&format!("at offset {}", guest * C)), "no offset: {e}");
        for index in (0..build.clusters.len() as u64).filter(|index| index != guest) {
            let len = (build.size - index * C).min(C) as usize;
            image.read_at(&mut cluster[..len], index * C).unwrap();
            assert_eq!(cluster[..len], build.content(0)[(index * C) as usize..][..len], "{name}: {index}");
        }
        assert_eq!(hash(&path), before);
    }
}

#[test]
fn a_wrong_l1_entry_is_an_error_of_what_it_maps_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    let breaks: &[(&str, Break)] = &[
        ("reserved bits 0x1 are set", |f| put64(f, L1 * C, (L2 * C) | 1)),
        ("reserved bits", |f| put64(f, L1 * C, (L2 * C) | (1 << 62))),
        ("not aligned", |f| put64(f, L1 * C, L2 * C + 512)),
        ("offset 0 with bit 63 set", |f| put64(f, L1 * C, 1 << 63)),
        ("an L2 table at host offset 1048576 is not inside the file", |f| put64(f, L1 * C, 1 << 20)),
        ("lies in the clusters of l1_table_offset", |f| put64(f, L1 * C, L1 * C)),
    ];
    for (name, break_it) in breaks {
        let mut file = Build { size: 512 * C + C, ..Build::small() }.bytes();
        put32(&mut file, 36, 2);
        put32(&mut file, SNAPSHOTS * C + 8, 2);
        break_it(&mut file);
        std::fs::write(&path, &file).unwrap();
        let image = open(&path).unwrap();
        let mut cluster = vec![1; C as usize];
        let e = image.read_at(&mut cluster, 0).unwrap_err();
        assert!(e.to_string().contains(name) && e.errno() == EIO, "{name}: {e}");
        assert_eq!(image.block_status(0, 1).unwrap_err().errno(), EIO);
        image.read_at(&mut cluster, 512 * C).unwrap();
        assert_eq!(cluster, vec![0; C as usize]);
    }
}

#[test]
fn version_2_has_no_zero_clusters() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    let mut file = Build::v2().bytes();
    put64(&mut file, ENTRY + 16, 1);
    std::fs::write(&path, &file).unwrap();
    let e = open(&path).unwrap().read_at(&mut [0; 512], 2 * C).unwrap_err();
    assert!(e.to_string().contains("reserved bits 0x1 are set"), "{e}");
}

#[test]
fn subclusters_that_contradict_each_other_are_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    let entry = L2 * 16384;
    let breaks: &[(&str, u64, Break)] = &[
        ("are both allocated and zero", 0, |f| put64(f, L2 * 16384 + 8, 0x1_0000_0001)),
        ("without a host cluster", 2, |f| put64(f, L2 * 16384 + 40, 1)),
        ("subcluster bits", 1, |f| put64(f, L2 * 16384 + 24, 1)),
        ("reserved bits 0x1 are set", 0, |f| f[L2 as usize * 16384 + 7] |= 1),
    ];
    for (name, guest, break_it) in breaks {
        let mut file = Build::extended().bytes();
        assert_ne!(get64(&file, entry), 0);
        break_it(&mut file);
        std::fs::write(&path, &file).unwrap();
        let image = open(&path).unwrap();
        let e = image.read_at(&mut [0; 512], guest * 16384).unwrap_err();
        assert!(e.to_string().contains(name) && e.errno() == EIO, "{name}: {e}");
        image.read_at(&mut [0; 512], 3 * 16384).unwrap();
    }
}

#[test]
fn compressed_data_may_end_short_at_the_end_of_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    let build = Build { clusters: vec![Cluster::Compressed(7)], size: C, ..Build::small() };
    let mut file = build.bytes();
    while file.last() == Some(&0) {
        file.pop();
    }
    std::fs::write(&path, &file).unwrap();
    let image = open(&path).unwrap();
    assert_eq!(bytes(&*image, 4096), build.content(0));
}

#[test]
fn what_is_open_for_reading_is_not_changed_and_what_is_corrupt_not_opened_for_writing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    let mut file = Build::small().bytes();
    std::fs::write(&path, &file).unwrap();
    let image = open(&path).unwrap();
    for result in [image.write_at(&[1], 0), image.write_zeroes(0, 1, true), image.resize(1)] {
        assert_eq!(result.unwrap_err().errno(), EROFS);
    }
    drop(image);
    incompatible(&mut file, 1 << 1 | 1);
    std::fs::write(&path, &file).unwrap();
    let e = fleecefs::image::open(&path, &OpenOptions::default()).unwrap_err();
    assert!(e.errno() == EIO && e.hint_text().unwrap().contains("check --repair"), "{e}");
    assert_eq!(std::fs::read(&path).unwrap(), file);
}

#[test]
fn what_the_header_has_and_we_do_not_know_is_kept_but_for_autoclear_bits() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    for snapshot in [true, false] {
        let mut file = Build { snapshot, ..Build::small() }.bytes();
        or64(&mut file, 80, u64::MAX);
        or64(&mut file, 88, u64::MAX << 2);
        file[105..112].copy_from_slice(b"unknown");
        std::fs::write(&path, &file).unwrap();
        let header = || std::fs::read(&path).unwrap()[..C as usize].to_vec();
        drop(open(&path).unwrap());
        assert!(std::fs::read(&path).unwrap() == file, "changed by an open for reading");
        let image = fleecefs::image::open(&path, &asked(false)).unwrap();
        let mut expected = file[..C as usize].to_vec();
        put64(&mut expected, 88, 0);
        assert_eq!(header(), expected, "before the first write");
        image.write_at(&[5; 5000], 100).unwrap();
        image.write_zeroes(C, C, true).unwrap();
        // The L1 table moves.
        image.resize(600 * C * 512).unwrap();
        image.close().unwrap();
        let mut after = header();
        assert_eq!((get64(&after, 24), get64(&after, 72)), (600 * C * 512, 0));
        after[24..60].copy_from_slice(&expected[24..60]);
        assert_eq!(after, expected);
    }
}

#[test]
fn dirty_and_corrupt_images_and_those_with_unknown_harmless_bits_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    for (at, bits) in [(72, 1), (72, 2), (72, 3), (80, 1), (80, u64::MAX), (88, 1 << 63 | 1 << 2)] {
        let build = Build::small();
        let mut file = build.bytes();
        or64(&mut file, at, bits);
        std::fs::write(&path, &file).unwrap();
        assert_eq!(bytes(&*open(&path).unwrap(), 4096), build.content(0));
        assert_eq!(std::fs::read(&path).unwrap(), file);
    }
}

#[test]
fn an_external_data_file_holds_each_cluster_where_the_guest_has_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    let external = |entries: &[u64], name: Option<&str>| {
        let mut build = Build { snapshot: false, size: 3 * C, ..Build::small() };
        build.clusters = vec![Cluster::Unallocated; 3];
        build.extensions = name.iter().map(|name| (0x4441_5441, name.as_bytes().to_vec())).collect();
        let mut file = build.bytes();
        incompatible(&mut file, 1 << 2);
        for (index, entry) in (0..).zip(entries) {
            put64(&mut file, ENTRY + index * 8, *entry);
        }
        std::fs::write(&path, &file).unwrap();
        open(&path)
    };
    let copied = 1 << 63;
    assert_eq!(external(&[0], Some("data")).unwrap_err().errno(), ENOENT);
    let e = external(&[0], None).unwrap_err();
    assert!(e.to_string().contains("doesn't name its external data file"), "{e}");
    let e = external(&[0], Some("image")).unwrap_err();
    assert_eq!(e.errno(), ELOOP, "{e}");
    std::fs::write(dir.path().join("data"), [vec![1; C as usize], vec![2; C as usize]].concat()).unwrap();
    let image = external(&[copied, 0, (2 * C) | copied | 1], Some("data")).unwrap();
    assert_eq!(bytes(&*image, 4096), [vec![1; C as usize], vec![0; 2 * C as usize]].concat());
    let image = external(&[0, C | copied, 0], Some("file:data")).unwrap();
    assert_eq!(bytes(&*image, 4096), [vec![0; C as usize], vec![2; C as usize], vec![0; C as usize]].concat());
    for (entry, why) in
        [(C | copied, "is not the guest offset 0"), (1 << 62 | C, "compressed cluster in an image with an external")]
    {
        let e = external(&[entry], Some("data")).unwrap().read_at(&mut [0; 512], 0).unwrap_err();
        assert!(e.to_string().contains(why), "{e}");
    }
    let image = external(&[0, 0, (2 * C) | copied], Some("data")).unwrap();
    let e = image.read_at(&mut [0; 512], 2 * C).unwrap_err();
    assert!(e.to_string().contains("is not inside the file of 8192 bytes"), "{e}");
}
