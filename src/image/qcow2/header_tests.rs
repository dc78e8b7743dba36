//! Tests of the header and its extensions.

use super::super::extensions::{BACKING_FORMAT, BITMAPS, Extension};
use super::*;
use proptest::prelude::*;

/// The fields that the tests set.
struct Fields {
    version: u32,
    cluster_bits: u32,
    size: u64,
    l1: (u64, u32),
    refcounts: (u64, u32),
    snapshots: (u64, u32),
}

const FILE_BYTES: u64 = 1 << 20;

impl Fields {
    fn good() -> Fields {
        Fields {
            version: 3,
            cluster_bits: 12,
            size: 10_000,
            l1: (3 << 12, 1),
            refcounts: (1 << 12, 1),
            snapshots: (5 << 12, 2),
        }
    }

    /// The first cluster, with `behind` where the extensions begin.
    fn bytes(&self, behind: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; 1 << self.cluster_bits.clamp(9, 21)];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(0, &MAGIC);
        put(4, &self.version.to_be_bytes());
        put(20, &self.cluster_bits.to_be_bytes());
        put(24, &self.size.to_be_bytes());
        put(36, &self.l1.1.to_be_bytes());
        put(40, &self.l1.0.to_be_bytes());
        put(48, &self.refcounts.0.to_be_bytes());
        put(56, &self.refcounts.1.to_be_bytes());
        put(60, &self.snapshots.1.to_be_bytes());
        put(64, &self.snapshots.0.to_be_bytes());
        if self.version == 3 {
            put(96, &6_u32.to_be_bytes());
            put(100, &120_u32.to_be_bytes());
            put(112, b"unknown!");
        }
        put(if self.version == 3 { 120 } else { 72 }, behind);
        bytes
    }

    fn parse(&self, behind: &[u8]) -> Result<Header> {
        Header::parse(&self.bytes(behind), FILE_BYTES)
    }
}

fn extension(kind: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = [kind.to_be_bytes(), (data.len() as u32).to_be_bytes()].concat();
    bytes.extend(data);
    bytes.resize(bytes.len().next_multiple_of(8), 0xCC);
    bytes
}

#[test]
fn every_field_is_where_the_specification_has_it() {
    let header = Fields::good().parse(&[]).unwrap();
    let Header { version, cluster_bits, size, l1_size, refcount_order, header_length, .. } = header;
    assert_eq!((version, cluster_bits, size, l1_size), (3, 12, 10_000, 1));
    assert_eq!((refcount_order, header_length, header.nb_snapshots), (6, 120, 2));
    assert_eq!((header.l1_table_offset.0, header.refcount_table_offset.0), (3 << 12, 1 << 12));
    assert_eq!((header.snapshots_offset.0, header.refcount_table_clusters), (5 << 12, 1));
    assert_eq!(header.additional, b"\0\0\0\0\0\0\0\0unknown!");
    assert_eq!((header.backing, header.compression), (None, Compression::Zlib));
    let old = Fields { version: 2, ..Fields::good() }.parse(&[]).unwrap();
    assert_eq!((old.version, old.refcount_order, old.header_length, old.incompatible_features), (2, 4, 72, 0));
    assert!(old.additional.is_empty());
}

#[test]
fn extensions_are_kept_as_they_are_and_in_their_order() {
    let unknown = extension(0xABCD_EF01, b"13 bytes long");
    let area = [unknown.clone(), extension(BACKING_FORMAT, b"raw"), unknown, vec![0; 8], vec![0xFF; 8]].concat();
    for version in [2, 3] {
        let header = Fields { version, ..Fields::good() }.parse(&area).unwrap();
        let unknown = Extension { kind: 0xABCD_EF01, data: b"13 bytes long".to_vec() };
        let known = Extension { kind: BACKING_FORMAT, data: b"raw".to_vec() };
        assert_eq!(header.extensions.all, [unknown.clone(), known, unknown], "an unknown type may come twice");
        assert_eq!(header.extensions.backing_format(), Some("raw"));
    }
    let fields =
        [7_u32.to_be_bytes().to_vec(), vec![0; 4], 48_u64.to_be_bytes().to_vec(), 8192_u64.to_be_bytes().to_vec()];
    let header = Fields::good().parse(&extension(BITMAPS, &fields.concat())).unwrap();
    let bitmaps = header.extensions.bitmaps().unwrap();
    assert_eq!((bitmaps.count, bitmaps.directory_bytes, bitmaps.directory_offset), (7, 48, 8192));
}

#[test]
fn the_backing_files_name_ends_the_extensions() {
    let fields = Fields { version: 2, ..Fields::good() };
    let mut bytes = fields.bytes(b"/images/base.raw");
    // As the oldest images have it: directly behind the header, where extensions would begin.
    bytes[8..16].copy_from_slice(&72_u64.to_be_bytes());
    bytes[16..20].copy_from_slice(&16_u32.to_be_bytes());
    let header = Header::parse(&bytes, FILE_BYTES).unwrap();
    assert_eq!(header.backing, Some(BackingName { offset: HostOffset(72), name: b"/images/base.raw".to_vec() }));
    assert!(header.extensions.all.is_empty());
}

#[test]
fn areas_that_touch_are_apart_and_areas_that_share_a_cluster_are_not() {
    let good = Fields { l1: (2 << 12, 512), refcounts: (1 << 12, 1), snapshots: (3 << 12, 1), ..Fields::good() };
    good.parse(&[]).unwrap();
    let bad = Fields { l1: (2 << 12, 513), ..good };
    let e = bad.parse(&[]).unwrap_err();
    assert!(e.to_string().contains("snapshots_offset: 12288 lies in the clusters of l1_table_offset"), "{e}");
    let end = Fields { refcounts: (FILE_BYTES - 4096, 1), ..Fields::good() };
    end.parse(&[]).unwrap();
    Fields { refcounts: (FILE_BYTES - 4096, 2), ..end }.parse(&[]).unwrap_err();
}

#[test]
fn a_disk_of_no_bytes_needs_no_l1_table() {
    Fields { size: 0, l1: (0, 0), ..Fields::good() }.parse(&[]).unwrap();
    Fields { size: 1, l1: (0, 0), ..Fields::good() }.parse(&[]).unwrap_err();
}

proptest! {
    #[test]
    fn what_is_accepted_keeps_what_the_head_promises(
        version in 1..5u32,
        cluster_bits in 8..23u32,
        size: u64,
        shift in 0..64u32,
        places in proptest::collection::vec((0..300u64, 0..3u64), 3),
        counts in proptest::collection::vec(0..2000u32, 3),
        behind in proptest::collection::vec(any::<u8>(), 0..300),
        patch in proptest::collection::vec((0..160usize, any::<u8>()), 0..3),
    ) {
        let at = |index: usize| (places[index].0 << 12) + places[index].1 / 2;
        let fields = Fields {
            version,
            cluster_bits,
            size: size >> shift,
            l1: (at(0), counts[0]),
            refcounts: (at(1), counts[1] % 4),
            snapshots: (at(2), counts[2] % 20),
        };
        let mut bytes = fields.bytes(&behind);
        for (at, byte) in patch {
            bytes[at] = byte;
        }
        if let Ok(header) = Header::parse(&bytes, FILE_BYTES) {
            let mut areas: Vec<_> = header.areas().into_iter().map(|(_, area)| area).collect();
            areas.sort_by_key(|area| area.start);
            for area in &areas {
                prop_assert!(area.start.is_multiple_of(header.cluster_size()) && area.start < FILE_BYTES);
            }
            prop_assert!(areas.windows(2).all(|pair| pair[0].end <= pair[1].start));
            prop_assert!(u64::from(header.l1_size) >= header.geometry().l1_entries_for(header.size));
            prop_assert!(header.size <= MAX_DISK_BYTES && header.refcount_order <= 6);
            prop_assert_eq!(header.incompatible_features & !incompatible::KNOWN, 0);
            prop_assert!(header.header_length as usize <= bytes.len());
        }
    }
}
