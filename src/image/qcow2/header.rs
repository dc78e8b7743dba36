//! The header: the first cluster of the image ("Header" and "Additional fields" of QEMU's docs/interop/qcow2).
//!
//! [`Header::parse`] is a pure function of the first cluster and the file's length. It is stricter than QEMU: after it
//! has returned, every offset is aligned and inside the file, no two areas that the header names overlap, every size is
//! within a limit, and every incompatible feature is one that this program knows. So whoever uses the fields need not
//! look again, and an image that was refused has not been touched.

use super::extensions::{ENCRYPTION, Extensions};
use super::tables::{Geometry, HostOffset};
use crate::error::{Error, Result, errno};
use crate::units::MAX_DISK_BYTES;
use std::ops::Range;

/// The first four bytes of every image.
pub const MAGIC: [u8; 4] = *b"QFI\xfb";
/// Cluster sizes that QEMU can read, as powers of two: 512 B to 2 MiB.
pub const CLUSTER_BITS: std::ops::RangeInclusive<u32> = 9..=21;
/// Longest header of version 2; its extensions begin behind it.
const HEADER_V2_BYTES: usize = 72;
/// Shortest header of version 3.
const HEADER_V3_BYTES: usize = 104;
/// Largest L1 table in bytes (QEMU's limit).
pub const L1_MAX_BYTES: u64 = 32 << 20;
/// Largest refcount table in bytes (QEMU's limit).
pub const REFCOUNT_TABLE_MAX_BYTES: u64 = 8 << 20;
/// Most internal snapshots (QEMU's limit).
pub const SNAPSHOTS_MAX: u32 = 65536;
/// Longest name of a backing file in bytes.
pub const BACKING_NAME_MAX_BYTES: u32 = 1023;
/// Smallest clusters with extended L2 entries, as a power of two.
const EXTENDED_L2_MIN_CLUSTER_BITS: u32 = 14;
/// What an entry of the snapshot table takes at least.
const SNAPSHOT_ENTRY_MIN_BYTES: u64 = 40;

/// Bits of `incompatible_features`.
pub mod incompatible {
    /// Refcounts may be wrong: rebuild them before writing.
    pub const DIRTY: u64 = 1 << 0;
    /// Metadata may be wrong: no writing.
    pub const CORRUPT: u64 = 1 << 1;
    /// Guest data lies in another file.
    pub const DATA_FILE: u64 = 1 << 2;
    /// `compression_type` says how compressed clusters are compressed.
    pub const COMPRESSION_TYPE: u64 = 1 << 3;
    /// L2 entries of 128 bits with subclusters.
    pub const EXTENDED_L2: u64 = 1 << 4;
    /// All that this program knows.
    pub const KNOWN: u64 = DIRTY | CORRUPT | DATA_FILE | COMPRESSION_TYPE | EXTENDED_L2;
}

/// Bits of `compatible_features`.
pub mod compatible {
    /// Refcount updates may be postponed under the dirty bit.
    pub const LAZY_REFCOUNTS: u64 = 1 << 0;
}

/// Bits of `autoclear_features`.
pub mod autoclear {
    /// The bitmaps extension is consistent with the data.
    pub const BITMAPS: u64 = 1 << 0;
    /// The external data file is a raw image by itself.
    pub const RAW_DATA_FILE: u64 = 1 << 1;
    /// This program's own, next to its extension: no other program has opened the image for writing since.
    pub const FLEECEFS: u64 = 1 << 63;
    /// All that this program knows.
    pub const KNOWN: u64 = BITMAPS | RAW_DATA_FILE | FLEECEFS;
}

/// How compressed clusters are compressed (`compression_type`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// Raw deflate streams (value 0).
    Zlib,
    /// Zstandard frames (value 1).
    Zstd,
}

/// How guest data are encrypted (`crypt_method`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Encryption {
    /// AES in CBC mode, under a passphrase (value 1).
    Aes,
    /// LUKS, with its header in clusters of the image (value 2).
    Luks,
}

/// The name of the backing file, as it stands in the header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackingName {
    /// Where the name stands; it lies in the first cluster, behind the extensions.
    pub offset: HostOffset,
    /// The bytes of the name, 1 to 1023, without NUL.
    pub name: Vec<u8>,
}

/// A checked header. Byte ranges are those of the specification.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// Bytes 4-7: 2 or 3.
    pub version: u32,
    /// Bytes 8-19: `backing_file_offset`, `backing_file_size` and the name they point to.
    pub backing: Option<BackingName>,
    /// Bytes 20-23, within [`CLUSTER_BITS`].
    pub cluster_bits: u32,
    /// Bytes 24-31: size of the disk in bytes, at most [`MAX_DISK_BYTES`]; any number of bytes.
    pub size: u64,
    /// Bytes 32-35: `crypt_method`; None in every header that [`Header::parse`] returns.
    pub encryption: Option<Encryption>,
    /// Bytes 36-39: entries of the active L1 table; enough for `size`, at most [`L1_MAX_BYTES`].
    pub l1_size: u32,
    /// Bytes 40-47: aligned, the table inside the file. 0 where `l1_size` is 0.
    pub l1_table_offset: HostOffset,
    /// Bytes 48-55: aligned, not 0, the table inside the file.
    pub refcount_table_offset: HostOffset,
    /// Bytes 56-59: at least 1, at most [`REFCOUNT_TABLE_MAX_BYTES`].
    pub refcount_table_clusters: u32,
    /// Bytes 60-63: at most [`SNAPSHOTS_MAX`].
    pub nb_snapshots: u32,
    /// Bytes 64-71: aligned, inside the file. Without meaning where `nb_snapshots` is 0.
    pub snapshots_offset: HostOffset,
    /// Bytes 72-79: bits of [`incompatible`], no unknown ones. 0 in version 2.
    pub incompatible_features: u64,
    /// Bytes 80-87: bits of [`compatible`] and unknown ones. 0 in version 2.
    pub compatible_features: u64,
    /// Bytes 88-95: bits of [`autoclear`] and unknown ones. 0 in version 2.
    pub autoclear_features: u64,
    /// Bytes 96-99: a refcount has `1 << refcount_order` bits, 0 to 6. 4 in version 2.
    pub refcount_order: u32,
    /// Bytes 100-103: 72 in version 2; in version 3 at least 104, a multiple of 8, within the first cluster.
    pub header_length: u32,
    /// Byte 104, where there is one.
    pub compression: Compression,
    /// Bytes 104 to `header_length` as they are, `compression_type` and fields unknown to this program; a rewritten
    /// header keeps them.
    pub additional: Vec<u8>,
    /// What stands behind the header, in its order; a rewritten header keeps it.
    pub extensions: Extensions,
}

/// The four bytes at `at`, or 0 past the end; callers have checked the length.
pub(super) fn be32(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).map_or(0, |four| u32::from_be_bytes(*four))
}

/// The eight bytes at `at`, or 0 past the end; callers have checked the length.
pub(super) fn be64(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).map_or(0, |eight| u64::from_be_bytes(*eight))
}

/// An error in the image's header that names the field.
fn bad(field: &str, why: impl Into<String>) -> Error {
    Error::new(errno::EINVAL, "qcow2 header", format!("{field}: {}", why.into()))
}

/// Something that the image may be but this program cannot serve.
fn unsupported(field: &str, why: impl Into<String>) -> Error {
    Error::new(errno::EOPNOTSUPP, "qcow2 header", format!("{field}: {}", why.into()))
}

/// The size in bytes of the first cluster, from the first [`HEADER_V2_BYTES`] of an image: what [`Header::parse`] needs.
pub fn cluster_size_of(prefix: &[u8]) -> Result<u64> {
    if !prefix.starts_with(&MAGIC) {
        return Err(bad("magic", "not a qcow2 image"));
    }
    if prefix.len() < HEADER_V2_BYTES {
        return Err(bad("header_length", format!("the file has {} bytes, fewer than a header", prefix.len())));
    }
    let version = be32(prefix, 4);
    if !(2..=3).contains(&version) {
        return Err(unsupported("version", format!("{version} is neither 2 nor 3")));
    }
    let cluster_bits = be32(prefix, 20);
    if !CLUSTER_BITS.contains(&cluster_bits) {
        let (least, most) = CLUSTER_BITS.into_inner();
        return Err(bad("cluster_bits", format!("{cluster_bits} is not from {least} to {most}")));
    }
    Ok(1 << cluster_bits)
}

fn encryption(crypt_method: u32) -> Result<Option<Encryption>> {
    match crypt_method {
        0 => Ok(None),
        1 => Ok(Some(Encryption::Aes)),
        2 => Ok(Some(Encryption::Luks)),
        n => Err(bad("crypt_method", format!("{n} is unknown"))),
    }
}

impl Header {
    /// Checks and decodes the header of an image whose first cluster is `bytes` (shorter only where the file ends in
    /// it) and which is `file_bytes` long. EOPNOTSUPP where it is encrypted.
    pub fn parse(bytes: &[u8], file_bytes: u64) -> Result<Header> {
        let header = Header::look(bytes, file_bytes)?;
        let (field, name) = match header.encryption {
            Some(Encryption::Aes) => ("crypt_method", "1 (AES)"),
            Some(Encryption::Luks) => ("crypt_method", "2 (LUKS)"),
            None if header.extensions.find(ENCRYPTION).is_some() => ("extension", "full disk encryption"),
            None => return Ok(header),
        };
        Err(unsupported(field, format!("{name}: encrypted images are not supported"))
            .hint("decrypt it into a new image with qemu-img convert"))
    }

    /// The same of an image that may be encrypted: to tell what it is, nothing more.
    pub fn look(bytes: &[u8], file_bytes: u64) -> Result<Header> {
        let cluster_size = cluster_size_of(bytes)?;
        let version = be32(bytes, 4);
        let mut header = Header {
            version,
            backing: None,
            cluster_bits: be32(bytes, 20),
            size: be64(bytes, 24),
            encryption: None,
            l1_size: be32(bytes, 36),
            l1_table_offset: HostOffset(be64(bytes, 40)),
            refcount_table_offset: HostOffset(be64(bytes, 48)),
            refcount_table_clusters: be32(bytes, 56),
            nb_snapshots: be32(bytes, 60),
            snapshots_offset: HostOffset(be64(bytes, 64)),
            incompatible_features: 0,
            compatible_features: 0,
            autoclear_features: 0,
            refcount_order: 4,
            header_length: HEADER_V2_BYTES as u32,
            compression: Compression::Zlib,
            additional: Vec::new(),
            extensions: Extensions::default(),
        };
        let first_cluster = bytes.get(..cluster_size as usize).unwrap_or(bytes);
        if version == 3 {
            header.parse_v3(first_cluster)?;
        }
        header.encryption = encryption(be32(bytes, 32))?;
        let extensions_end = header.parse_backing(first_cluster)?;
        header.extensions = header.parse_extensions(first_cluster, extensions_end)?;
        header.check_features()?;
        header.check_sizes()?;
        header.check_places(file_bytes)?;
        Ok(header)
    }

    /// What the mapping tables need to know.
    pub fn geometry(&self) -> Geometry {
        Geometry {
            cluster_bits: self.cluster_bits,
            version: self.version,
            extended_l2: self.has_extended_l2(),
            external_data: self.has_data_file(),
        }
    }

    /// Bytes of a cluster.
    pub fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Whether guest data lies in another file.
    pub fn has_data_file(&self) -> bool {
        self.incompatible_features & incompatible::DATA_FILE != 0
    }

    /// Whether that other file is a raw image by itself.
    pub fn has_raw_data_file(&self) -> bool {
        self.autoclear_features & autoclear::RAW_DATA_FILE != 0
    }

    /// Whether L2 entries have subclusters.
    pub fn has_extended_l2(&self) -> bool {
        self.incompatible_features & incompatible::EXTENDED_L2 != 0
    }

    /// Whether refcounts may be wrong.
    pub fn is_dirty(&self) -> bool {
        self.incompatible_features & incompatible::DIRTY != 0
    }

    /// Whether any metadata may be wrong.
    pub fn is_corrupt(&self) -> bool {
        self.incompatible_features & incompatible::CORRUPT != 0
    }

    /// The areas that the header names, with their names, in whole clusters (the snapshot table: its shortest form).
    pub fn areas(&self) -> Vec<(&'static str, Range<u64>)> {
        let cluster_size = self.cluster_size();
        let area = |offset: HostOffset, bytes: u64| offset.0..offset.0 + bytes.div_ceil(cluster_size) * cluster_size;
        let mut areas = vec![("header", 0..cluster_size)];
        if self.l1_size > 0 {
            areas.push(("l1_table_offset", area(self.l1_table_offset, u64::from(self.l1_size) * 8)));
        }
        let refcount_bytes = u64::from(self.refcount_table_clusters) * cluster_size;
        areas.push(("refcount_table_offset", area(self.refcount_table_offset, refcount_bytes)));
        if self.nb_snapshots > 0 {
            let bytes = u64::from(self.nb_snapshots) * SNAPSHOT_ENTRY_MIN_BYTES;
            areas.push(("snapshots_offset", area(self.snapshots_offset, bytes)));
        }
        areas
    }

    /// The fields that version 2 lacks. Unknown incompatible bits come first: nothing else can be trusted under them.
    fn parse_v3(&mut self, bytes: &[u8]) -> Result<()> {
        if bytes.len() < HEADER_V3_BYTES {
            return Err(bad("header_length", format!("the file has {} bytes, fewer than a header", bytes.len())));
        }
        self.incompatible_features = be64(bytes, 72);
        self.compatible_features = be64(bytes, 80);
        self.autoclear_features = be64(bytes, 88);
        self.refcount_order = be32(bytes, 96);
        self.header_length = be32(bytes, 100);
        let length = self.header_length as usize;
        let valid_length = length >= HEADER_V3_BYTES && length.is_multiple_of(8) && length <= bytes.len();
        let unknown = self.incompatible_features & !incompatible::KNOWN;
        if unknown != 0 {
            let from = if valid_length { length } else { HEADER_V3_BYTES };
            let area = bytes.get(from..).unwrap_or_default();
            return Err(unknown_features(unknown, &Extensions::parse(area).unwrap_or_default()));
        }
        if !valid_length {
            let why = format!("{length} is not a multiple of 8 from {HEADER_V3_BYTES} to the end of the first cluster");
            return Err(bad("header_length", why));
        }
        self.additional = bytes.get(HEADER_V3_BYTES..length).unwrap_or_default().to_vec();
        let kind = self.additional.first().copied().unwrap_or(0);
        let has_kind = self.incompatible_features & incompatible::COMPRESSION_TYPE != 0;
        self.compression = match (kind, has_kind) {
            (0, false) => Compression::Zlib,
            (1, true) => Compression::Zstd,
            (0, true) => return Err(bad("compression_type", "0 (zlib) although its incompatible bit 3 is set")),
            (_, false) => return Err(bad("compression_type", format!("{kind} although incompatible bit 3 is clear"))),
            (_, true) => return Err(unsupported("compression_type", format!("{kind} is neither zlib nor zstd"))),
        };
        Ok(())
    }

    /// Reads the backing file's name; gives the end of the area in which extensions may stand.
    fn parse_backing(&mut self, bytes: &[u8]) -> Result<usize> {
        let (offset, count) = (be64(bytes, 8), be32(bytes, 16));
        if offset == 0 {
            return Ok(bytes.len());
        }
        if !(1..=BACKING_NAME_MAX_BYTES).contains(&count) {
            return Err(bad("backing_file_size", format!("{count} is not from 1 to {BACKING_NAME_MAX_BYTES}")));
        }
        let start = usize::try_from(offset).ok().filter(|start| *start >= self.header_length as usize);
        let name = start.and_then(|start| bytes.get(start..)).and_then(|rest| rest.get(..count as usize));
        let (Some(start), Some(name)) = (start, name) else {
            let why = format!("{count} bytes at {offset} are not in the first cluster behind the header");
            return Err(bad("backing_file_offset", why));
        };
        if name.contains(&0) {
            return Err(bad("backing file name", "has a NUL byte"));
        }
        self.backing = Some(BackingName { offset: HostOffset(offset), name: name.to_vec() });
        Ok(start)
    }

    fn parse_extensions(&self, bytes: &[u8], end: usize) -> Result<Extensions> {
        Extensions::parse(bytes.get(self.header_length as usize..end).unwrap_or_default())
    }

    /// Features that exclude or need each other.
    fn check_features(&self) -> Result<()> {
        let auto = |bit| self.autoclear_features & bit != 0;
        if self.has_extended_l2() && self.cluster_bits < EXTENDED_L2_MIN_CLUSTER_BITS {
            let why = format!("{} with extended L2 entries, which need at least 14", self.cluster_bits);
            return Err(bad("cluster_bits", why));
        }
        if auto(autoclear::BITMAPS) && self.extensions.bitmaps().is_none() {
            return Err(bad("autoclear_features", "bit 0 (bitmaps) is set without the bitmaps extension"));
        }
        if self.has_raw_data_file() && !self.has_data_file() {
            return Err(bad("autoclear_features", "bit 1 (raw external data) is set without an external data file"));
        }
        if self.has_raw_data_file() && self.backing.is_some() {
            return Err(bad("backing_file_offset", "a raw external data file goes with no backing file"));
        }
        if self.has_data_file() && self.nb_snapshots > 0 {
            return Err(bad("nb_snapshots", format!("{} with an external data file", self.nb_snapshots)));
        }
        if self.extensions.data_file().is_some() && !self.has_data_file() {
            return Err(bad("incompatible_features", "bit 2 is clear although an external data file is named"));
        }
        Ok(())
    }

    /// Limits of sizes and numbers.
    fn check_sizes(&self) -> Result<()> {
        if self.size > MAX_DISK_BYTES {
            return Err(bad("size", format!("{} bytes are more than the largest disk (1 EiB)", self.size)));
        }
        if self.refcount_order > 6 {
            return Err(bad("refcount_order", format!("{} is more than 6", self.refcount_order)));
        }
        let l1_bytes = u64::from(self.l1_size) * 8;
        if l1_bytes > L1_MAX_BYTES {
            return Err(bad("l1_size", format!("{} entries take more than 32 MiB", self.l1_size)));
        }
        let needed = self.geometry().l1_entries_for(self.size);
        if u64::from(self.l1_size) < needed {
            let why = format!("{} entries, but a disk of {} bytes needs {needed}", self.l1_size, self.size);
            return Err(bad("l1_size", why));
        }
        let refcount_bytes = u64::from(self.refcount_table_clusters) * self.cluster_size();
        if self.refcount_table_clusters == 0 || refcount_bytes > REFCOUNT_TABLE_MAX_BYTES {
            let why = format!("{} clusters are not from 1 cluster to 8 MiB", self.refcount_table_clusters);
            return Err(bad("refcount_table_clusters", why));
        }
        if self.nb_snapshots > SNAPSHOTS_MAX {
            return Err(bad("nb_snapshots", format!("{} is more than {SNAPSHOTS_MAX}", self.nb_snapshots)));
        }
        Ok(())
    }

    /// Areas are aligned, inside the file and apart from each other.
    fn check_places(&self, file_bytes: u64) -> Result<()> {
        let mut places = vec![(
            "refcount_table_offset",
            self.refcount_table_offset,
            u64::from(self.refcount_table_clusters) * self.cluster_size(),
        )];
        if self.l1_size > 0 {
            places.push(("l1_table_offset", self.l1_table_offset, u64::from(self.l1_size) * 8));
        }
        if self.nb_snapshots > 0 {
            let bytes = u64::from(self.nb_snapshots) * SNAPSHOT_ENTRY_MIN_BYTES;
            places.push(("snapshots_offset", self.snapshots_offset, bytes));
        }
        for (field, offset, bytes) in places {
            check_place(offset, bytes, self.cluster_size(), file_bytes).map_err(|why| bad(field, why))?;
        }
        let mut areas = self.areas();
        areas.sort_by_key(|(_, range)| range.start);
        for pair in areas.windows(2) {
            if let [(first, a), (second, b)] = pair
                && a.end > b.start
            {
                return Err(bad(second, format!("{} lies in the clusters of {first}", b.start)));
            }
        }
        Ok(())
    }
}

/// Refuses, with the reason, a place in the file that is not aligned to clusters, is the header's, or ends behind the
/// file.
pub(super) fn check_place(
    offset: HostOffset,
    bytes: u64,
    cluster_size: u64,
    file_bytes: u64,
) -> std::result::Result<(), String> {
    let offset = offset.0;
    if offset == 0 {
        return Err("0 is the place of the header".into());
    }
    if !offset.is_multiple_of(cluster_size) {
        return Err(format!("{offset} is not aligned to clusters of {cluster_size} bytes"));
    }
    match offset.checked_add(bytes) {
        Some(end) if end <= file_bytes => Ok(()),
        _ => Err(format!("{bytes} bytes at {offset} are not inside the file of {file_bytes} bytes")),
    }
}

/// Names the bits that are unknown, in the words of the program that set them where the image has those.
fn unknown_features(bits: u64, extensions: &Extensions) -> Error {
    let names: Vec<String> = (0..64)
        .filter(|bit| bits & (1 << bit) != 0)
        .map(|bit| match extensions.incompatible_name(bit) {
            Some(name) => format!("{bit} ({})", name.escape_debug()),
            None => bit.to_string(),
        })
        .collect();
    unsupported("incompatible_features", format!("unknown bits: {}", names.join(", ")))
        .hint("a newer program made this image: use that, or a newer fleecefs")
}

#[cfg(test)]
#[path = "header_tests.rs"]
mod tests;
