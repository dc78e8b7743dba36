//! New images.
//!
//! Invariants:
//! - **Nothing is overwritten**: a path that exists is refused (EEXIST), a link to nowhere too.
//! - **The header comes last**: until all else is durable the file is no image, and what a crash leaves there cannot be
//!   taken for one. What fails leaves no file behind.
//! - When [`create`] returns, the image and its name are durable.
//!
//! The layout is that of `qemu-img create`: header, refcount table, refcount blocks, L1 table; refcounts of 16 bits.

use super::extensions::{BACKING_FORMAT, Extensions};
use super::header::{BackingName, CLUSTER_BITS, Compression, Header, L1_MAX_BYTES, incompatible};
use super::header_write;
use super::refcount::{TABLE_ENTRY_BYTES, Width};
use super::tables::{Geometry, HostOffset};
use crate::error::{Error, Result, errno};
use crate::image::Format;
use crate::storage::Storage;
use crate::storage::os::{self, OsFile};
use crate::units::MAX_DISK_BYTES;
use std::path::Path;

/// Bytes of a cluster where nobody says otherwise.
pub const CLUSTER_BYTES: u64 = 64 << 10;
/// Refcounts of 16 bits, as a power of two.
const REFCOUNT_ORDER: u32 = 4;
/// What sizes of disks are multiples of.
const SECTOR_BYTES: u64 = 512;
/// The fields of version 3 with `compression_type`, to a multiple of 8.
const HEADER_BYTES: u32 = 112;

/// What a new image is to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CreateOptions {
    /// Size of the disk in bytes, at most [`MAX_DISK_BYTES`]; rounded up to whole sectors, as QEMU knows no parts of one.
    pub size: u64,
    /// Bytes of a cluster: a power of two from 512 to 2 MiB.
    pub cluster_bytes: u64,
    /// The backing file's name, as it is to stand in the image (a relative one counts from the image's directory), and its
    /// format. It is not opened.
    pub backing: Option<(String, Format)>,
    /// How clusters will be compressed, where they are.
    pub compression: Compression,
}

impl CreateOptions {
    /// Of a size, without a backing file, with QEMU's defaults.
    pub fn new(size: u64) -> CreateOptions {
        CreateOptions { size, cluster_bytes: CLUSTER_BYTES, backing: None, compression: Compression::Zlib }
    }
}

/// Makes an image of version 3. EEXIST where `path` exists, EINVAL and EFBIG for options that the format has no way for.
pub fn create(path: &Path, options: &CreateOptions) -> Result<()> {
    let plan = Plan::new(options).map_err(|e| e.at_path(path))?;
    let new = os::OpenOptions { write: true, create_new: true, ..Default::default() };
    let file = OsFile::open(path, &new)?;
    let done = plan.write(&file).and_then(|()| os::sync_parent(path));
    if done.is_err() {
        let _ = std::fs::remove_file(path);
    }
    done
}

/// The parts of a new image.
#[derive(Debug)]
struct Plan {
    first_cluster: Vec<u8>,
    /// Refcount table and blocks, which follow the header.
    refcounts: Vec<u8>,
    bytes: u64,
}

impl Plan {
    fn new(options: &CreateOptions) -> Result<Plan> {
        let cluster_bits = options.cluster_bytes.trailing_zeros();
        if !options.cluster_bytes.is_power_of_two() || !CLUSTER_BITS.contains(&cluster_bits) {
            let why = "the cluster size is not a power of two from 512 to 2M";
            return Err(Error::new(errno::EINVAL, format!("create with clusters of {}", options.cluster_bytes), why));
        }
        let geometry = Geometry { cluster_bits, version: 3, extended_l2: false, external_data: false };
        let size = options.size.checked_next_multiple_of(SECTOR_BYTES).unwrap_or(u64::MAX);
        let l1_bytes = geometry.l1_entries_for(size).saturating_mul(8);
        if size > MAX_DISK_BYTES || l1_bytes > L1_MAX_BYTES {
            let what = format!("create of {} bytes in clusters of {}", options.size, options.cluster_bytes);
            return Err(Error::new(errno::EFBIG, what, "the format has no room for so large a disk")
                .hint("larger clusters reach further"));
        }
        let width = Width::new(REFCOUNT_ORDER)
            .ok_or_else(|| Error::new(errno::EINVAL, "create", "no such width of refcounts"))?;
        let cluster = options.cluster_bytes;
        let per_block = width.per_block(cluster_bits);
        let l1_clusters = l1_bytes.div_ceil(cluster);
        let (mut table_clusters, mut blocks) = (1, 1);
        let used = loop {
            let used = 1 + table_clusters + blocks + l1_clusters;
            let needed = used.div_ceil(per_block);
            let table = (needed * TABLE_ENTRY_BYTES).div_ceil(cluster);
            if (table, needed) == (table_clusters, blocks) {
                break used;
            }
            (table_clusters, blocks) = (table, needed);
        };
        let mut refcounts: Vec<u8> =
            (0..blocks).map(|block| (1 + table_clusters + block) * cluster).flat_map(u64::to_be_bytes).collect();
        refcounts.resize((table_clusters * cluster) as usize, 0);
        for block in 0..blocks {
            let mut bytes = vec![0; cluster as usize];
            (0..used.saturating_sub(block * per_block).min(per_block)).for_each(|slot| width.set(&mut bytes, slot, 1));
            refcounts.extend(bytes);
        }
        let header = header(options, cluster_bits, table_clusters, l1_bytes / 8, 1 + table_clusters + blocks);
        let (meant, first_cluster) = header_write::first_cluster(&header)?;
        if Header::parse(&first_cluster, used * cluster)? != meant {
            return Err(Error::new(errno::EINVAL, "create", "what would be written is not what was meant"));
        }
        Ok(Plan { first_cluster, refcounts, bytes: used * cluster })
    }

    fn write(&self, file: &OsFile) -> Result<()> {
        file.set_len(self.bytes)?;
        file.write_at(&self.refcounts, self.first_cluster.len() as u64)?;
        file.sync()?;
        file.write_at(&self.first_cluster, 0)?;
        file.sync()
    }
}

/// The header of an image whose L1 table begins at cluster `l1`.
fn header(options: &CreateOptions, cluster_bits: u32, table_clusters: u64, l1_size: u64, l1: u64) -> Header {
    let mut extensions = Extensions::default();
    let backing = options.backing.as_ref().map(|(name, format)| {
        extensions.set(BACKING_FORMAT, format.to_string().into_bytes());
        BackingName { offset: HostOffset(0), name: name.clone().into_bytes() }
    });
    let is_zstd = options.compression == Compression::Zstd;
    let mut additional = vec![0; (HEADER_BYTES - 104) as usize];
    additional.iter_mut().take(1).for_each(|kind| *kind = u8::from(is_zstd));
    Header {
        version: 3,
        backing,
        cluster_bits,
        size: options.size.next_multiple_of(SECTOR_BYTES),
        encryption: None,
        l1_size: l1_size as u32,
        l1_table_offset: HostOffset(if l1_size == 0 { 0 } else { l1 << cluster_bits }),
        refcount_table_offset: HostOffset(1 << cluster_bits),
        refcount_table_clusters: table_clusters as u32,
        nb_snapshots: 0,
        snapshots_offset: HostOffset(0),
        incompatible_features: if is_zstd { incompatible::COMPRESSION_TYPE } else { 0 },
        compatible_features: 0,
        autoclear_features: 0,
        refcount_order: REFCOUNT_ORDER,
        header_length: HEADER_BYTES,
        compression: options.compression,
        additional,
        extensions,
    }
}
