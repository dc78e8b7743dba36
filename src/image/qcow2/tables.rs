//! Entries of L1 and L2 tables, decoded once into what they mean ("Cluster mapping" and "Extended L2 Entries" of QEMU's
//! docs/interop/qcow2).
//!
//! Decoding is strict: a reserved bit that is set, an offset that is not aligned, a combination that the specification
//! forbids are errors of that entry (EIO), so that damaged metadata never turns into somebody else's bytes. Whether an
//! offset lies in the file, and for an external data file at the guest's own offset, is checked where the entry is used.

use crate::error::{Error, Result, errno};

/// A byte offset in the image's file, or in its external data file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct HostOffset(pub u64);

impl std::fmt::Display for HostOffset {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// Bits 9 to 55 of an entry.
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// Bit 63: the refcount is exactly one.
pub const COPIED: u64 = 1 << 63;
/// Bit 62 of an L2 entry.
pub const COMPRESSED: u64 = 1 << 62;
/// Bit 0 of a standard L2 entry: reads as zeros.
pub const ZERO: u64 = 1;
/// Subclusters of a cluster with extended L2 entries.
pub const SUBCLUSTERS: u64 = 32;
/// Unit of the length of compressed data.
pub const SECTOR_BYTES: u64 = 512;

/// The sizes that follow from the header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// A cluster has `1 << cluster_bits` bytes.
    pub cluster_bits: u32,
    /// 2 or 3.
    pub version: u32,
    /// L2 entries have 128 bits.
    pub extended_l2: bool,
    /// Guest data lies in another file, at the guest's offsets.
    pub external_data: bool,
}

impl CompressedAt {
    /// Of `bytes` (at least 1) at a host offset.
    pub fn new(offset: HostOffset, bytes: u64) -> CompressedAt {
        CompressedAt { offset, max_bytes: (offset.0 + bytes).next_multiple_of(SECTOR_BYTES) - offset.0 }
    }

    /// The L2 entry that says this; None where its bits do not suffice.
    pub fn encode(&self, geometry: &Geometry) -> Option<u64> {
        let bits = geometry.compressed_offset_bits();
        let sectors = (self.offset.0 % SECTOR_BYTES + self.max_bytes) / SECTOR_BYTES - 1;
        let fits = self.offset.0 >> bits.min(56) == 0 && sectors >> (62 - bits) == 0;
        fits.then_some(COMPRESSED | self.offset.0 | sectors << bits)
    }
}

impl Geometry {
    /// Bytes of a cluster.
    pub fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Words of 64 bits that an L2 entry takes.
    pub fn l2_entry_words(&self) -> u64 {
        if self.extended_l2 { 2 } else { 1 }
    }

    /// Entries of an L2 table.
    pub fn l2_entries(&self) -> u64 {
        self.cluster_size() / 8 / self.l2_entry_words()
    }

    /// Bytes of the disk that one L2 table maps.
    pub fn l2_covers(&self) -> u64 {
        self.l2_entries() << self.cluster_bits
    }

    /// Entries of the L1 table that a disk of `size` bytes needs.
    pub fn l1_entries_for(&self, size: u64) -> u64 {
        size.div_ceil(self.l2_covers())
    }

    /// The smallest unit of allocation: a subcluster, or a cluster where there are none.
    pub fn subcluster_size(&self) -> u64 {
        if self.extended_l2 { self.cluster_size() / SUBCLUSTERS } else { self.cluster_size() }
    }

    /// Bits of a compressed descriptor that are the host offset (x in the specification).
    fn compressed_offset_bits(&self) -> u32 {
        62 - (self.cluster_bits - 8)
    }
}

/// An entry of an L1 table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum L1Entry {
    /// No L2 table: all its clusters are unallocated.
    Unallocated,
    /// Where the L2 table lies.
    Table {
        /// Aligned, not 0.
        offset: HostOffset,
        /// The table's refcount is exactly one (true only in the active L1 table).
        copied: bool,
    },
}

/// An entry of an L2 table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum L2Entry {
    /// Reads as the backing file does.
    Unallocated,
    /// Reads as zeros, takes no space.
    ZeroPlain,
    /// Reads as zeros; a host cluster is kept for it.
    ZeroPreallocated {
        /// Aligned.
        offset: HostOffset,
        /// The host cluster's refcount is exactly one.
        copied: bool,
    },
    /// Data.
    Standard {
        /// Aligned. 0 only with an external data file.
        offset: HostOffset,
        /// The host cluster's refcount is exactly one.
        copied: bool,
    },
    /// Compressed data.
    Compressed(CompressedAt),
    /// A cluster with subclusters; bit n of the maps is subcluster n, in neither map: reads as the backing file does.
    Subclusters {
        /// The host cluster, where there is one; there is one where `allocated` is not 0.
        offset: Option<HostOffset>,
        /// The host cluster's refcount is exactly one.
        copied: bool,
        /// Subclusters that are data.
        allocated: u32,
        /// Subclusters that read as zeros; none of `allocated`.
        zero: u32,
    },
}

/// Where the compressed data of one cluster lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct CompressedAt {
    /// First byte; aligned to nothing.
    pub offset: HostOffset,
    /// Bytes from there to the end of the last sector; fewer are there where the file ends.
    pub max_bytes: u64,
}

fn bad(table: &str, raw: u64, why: impl Into<String>) -> Error {
    Error::new(errno::EIO, format!("qcow2 {table} entry {raw:#018x}"), why)
}

fn refuse_reserved(table: &str, raw: u64, allowed: u64) -> Result<()> {
    match raw & !allowed {
        0 => Ok(()),
        reserved => Err(bad(table, raw, format!("reserved bits {reserved:#x} are set"))),
    }
}

fn aligned(table: &str, raw: u64, geometry: &Geometry) -> Result<HostOffset> {
    let offset = raw & OFFSET_MASK;
    if offset.is_multiple_of(geometry.cluster_size()) {
        return Ok(HostOffset(offset));
    }
    Err(bad(table, raw, format!("offset {offset} is not aligned to clusters of {} bytes", geometry.cluster_size())))
}

/// Decodes an entry of an L1 table.
pub fn decode_l1(raw: u64, geometry: &Geometry) -> Result<L1Entry> {
    refuse_reserved("L1", raw, OFFSET_MASK | COPIED)?;
    let offset = aligned("L1", raw, geometry)?;
    match (offset.0, raw & COPIED != 0) {
        (0, false) => Ok(L1Entry::Unallocated),
        (0, true) => Err(bad("L1", raw, "offset 0 with bit 63 set")),
        (_, copied) => Ok(L1Entry::Table { offset, copied }),
    }
}

/// Decodes an entry of an L2 table. `bitmap` is the second word of an extended entry, else 0.
pub fn decode_l2(raw: u64, bitmap: u64, geometry: &Geometry) -> Result<L2Entry> {
    if raw & COMPRESSED != 0 {
        return decode_compressed(raw, bitmap, geometry);
    }
    let zero_bit = if geometry.version >= 3 && !geometry.extended_l2 { ZERO } else { 0 };
    refuse_reserved("L2", raw, OFFSET_MASK | COPIED | zero_bit)?;
    let offset = aligned("L2", raw, geometry)?;
    let copied = raw & COPIED != 0;
    let allocated = offset.0 != 0 || copied;
    if offset.0 == 0 && copied && !geometry.external_data {
        return Err(bad("L2", raw, "offset 0 with bit 63 set"));
    }
    if geometry.extended_l2 {
        return decode_subclusters(raw, bitmap, allocated.then_some(offset), copied);
    }
    Ok(match (raw & ZERO != 0, allocated) {
        (false, false) => L2Entry::Unallocated,
        (true, false) => L2Entry::ZeroPlain,
        (true, true) => L2Entry::ZeroPreallocated { offset, copied },
        (false, true) => L2Entry::Standard { offset, copied },
    })
}

fn decode_subclusters(raw: u64, bitmap: u64, offset: Option<HostOffset>, copied: bool) -> Result<L2Entry> {
    let (allocated, zero) = (bitmap as u32, (bitmap >> 32) as u32);
    if allocated & zero != 0 {
        return Err(bad("L2", raw, format!("subclusters {:#x} are both allocated and zero", allocated & zero)));
    }
    if allocated != 0 && offset.is_none() {
        return Err(bad("L2", raw, format!("subclusters {allocated:#x} are allocated without a host cluster")));
    }
    Ok(L2Entry::Subclusters { offset, copied, allocated, zero })
}

fn decode_compressed(raw: u64, bitmap: u64, geometry: &Geometry) -> Result<L2Entry> {
    if geometry.external_data {
        return Err(bad("L2", raw, "a compressed cluster in an image with an external data file"));
    }
    if raw & COPIED != 0 {
        return Err(bad("L2", raw, "bit 63 is set on a compressed cluster"));
    }
    if bitmap != 0 {
        return Err(bad("L2", raw, format!("subcluster bits {bitmap:#x} are set on a compressed cluster")));
    }
    let bits = geometry.compressed_offset_bits();
    let descriptor = raw & !COMPRESSED;
    let offset = descriptor & ((1 << bits) - 1);
    if offset >> 56 != 0 {
        return Err(bad("L2", raw, "reserved bits above bit 55 of the compressed offset are set"));
    }
    let sectors = (descriptor >> bits) + 1;
    let max_bytes = sectors * SECTOR_BYTES - offset % SECTOR_BYTES;
    Ok(L2Entry::Compressed(CompressedAt { offset: HostOffset(offset), max_bytes }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn geometry(cluster_bits: u32, version: u32, extended_l2: bool, external_data: bool) -> Geometry {
        Geometry { cluster_bits, version, extended_l2, external_data }
    }

    fn geometries() -> impl Strategy<Value = Geometry> {
        (9..=21u32, 2..=3u32, any::<bool>(), any::<bool>()).prop_map(|(bits, version, extended, external)| {
            geometry(bits, version, extended && version == 3 && bits >= 14, external && version == 3)
        })
    }

    /// The words that an entry was decoded from.
    fn words_of(entry: L2Entry, geometry: &Geometry) -> (u64, u64) {
        let flag = |copied| if copied { COPIED } else { 0 };
        match entry {
            L2Entry::Unallocated => (0, 0),
            L2Entry::ZeroPlain => (ZERO, 0),
            L2Entry::ZeroPreallocated { offset, copied } => (offset.0 | flag(copied) | ZERO, 0),
            L2Entry::Standard { offset, copied } => (offset.0 | flag(copied), 0),
            L2Entry::Compressed(at) => (at.encode(geometry).unwrap(), 0),
            L2Entry::Subclusters { offset, copied, allocated, zero } => {
                let raw = offset.map_or(0, |offset| offset.0) | flag(copied);
                (raw, u64::from(allocated) | u64::from(zero) << 32)
            }
        }
    }

    #[test]
    fn sizes_follow_from_the_header() {
        let plain = geometry(16, 3, false, false);
        assert_eq!((plain.l2_entries(), plain.l2_covers(), plain.subcluster_size()), (8192, 512 << 20, 65536));
        assert_eq!([0, 1, 512 << 20, (512 << 20) + 1].map(|size| plain.l1_entries_for(size)), [0, 1, 1, 2]);
        let extended = geometry(16, 3, true, false);
        assert_eq!((extended.l2_entries(), extended.l2_covers(), extended.subcluster_size()), (4096, 256 << 20, 2048));
    }

    #[test]
    fn entries_are_what_the_specification_says() {
        let g = geometry(16, 3, false, false);
        let host = HostOffset(5 << 16);
        for (raw, entry) in [
            (0, L2Entry::Unallocated),
            (1, L2Entry::ZeroPlain),
            (5 << 16, L2Entry::Standard { offset: host, copied: false }),
            (5 << 16 | 1 << 63, L2Entry::Standard { offset: host, copied: true }),
            (5 << 16 | 1 << 63 | 1, L2Entry::ZeroPreallocated { offset: host, copied: true }),
            (
                1 << 62 | 3 << 54 | 0x12345,
                L2Entry::Compressed(CompressedAt { offset: HostOffset(0x12345), max_bytes: 4 * 512 - 0x145 }),
            ),
        ] {
            assert_eq!(decode_l2(raw, 0, &g).unwrap(), entry, "{raw:#x}");
        }
        let external = geometry(16, 3, false, true);
        let first = L2Entry::Standard { offset: HostOffset(0), copied: true };
        assert_eq!(decode_l2(1 << 63, 0, &external).unwrap(), first);
        assert_eq!(
            decode_l1(3 << 16 | 1 << 63, &g).unwrap(),
            L1Entry::Table { offset: HostOffset(3 << 16), copied: true }
        );
        assert_eq!(decode_l1(0, &g).unwrap(), L1Entry::Unallocated);
    }

    proptest! {
        #[test]
        fn what_is_accepted_says_all_that_stands_there(
            raw in any::<u64>(), clear in any::<u64>(), also in any::<u64>(), bitmap in any::<u64>(), few: bool, g in geometries()
        ) {
            // Few bits set, or nothing would ever be accepted.
            let raw = if few { raw & clear & also } else { raw };
            let raw = if raw & COMPRESSED == 0 && also % 4 != 0 { raw & !((g.cluster_size() - 1) & !ZERO) } else { raw };
            let bitmap = if !g.extended_l2 || also % 3 == 0 { 0 } else { bitmap & clear };
            if let Ok(entry) = decode_l2(raw, bitmap, &g) {
                prop_assert_eq!(words_of(entry, &g), (raw, bitmap));
                match entry {
                    L2Entry::Standard { offset, .. } | L2Entry::ZeroPreallocated { offset, .. } => {
                        prop_assert!(offset.0.is_multiple_of(g.cluster_size()) && offset.0 < 1 << 56);
                        prop_assert!(offset.0 != 0 || g.external_data);
                    }
                    L2Entry::Compressed(at) => {
                        prop_assert!(at.offset.0 < 1 << 56 && (1..=2 * g.cluster_size()).contains(&at.max_bytes));
                        prop_assert!(!g.external_data);
                    }
                    L2Entry::Subclusters { offset, allocated, zero, .. } => {
                        prop_assert!(g.extended_l2 && allocated & zero == 0);
                        prop_assert!(allocated == 0 || offset.is_some());
                    }
                    L2Entry::ZeroPlain => prop_assert!(g.version == 3 && !g.extended_l2),
                    L2Entry::Unallocated => (),
                }
            }
            if let Ok(L1Entry::Table { offset, copied }) = decode_l1(raw, &g) {
                prop_assert_eq!(offset.0 | if copied { COPIED } else { 0 }, raw);
                prop_assert!(offset.0 != 0 && offset.0.is_multiple_of(g.cluster_size()));
            }
        }
    }
}
