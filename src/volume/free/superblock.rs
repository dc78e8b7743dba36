//! The superblock of ext2 to ext4, as far as it says where the block bitmaps are.

use crate::volume::bytes::{le16, le32, part, u8_at};
use crate::volume::checksum::crc32c;

/// Where it is, and how long it is, in bytes.
pub(super) const AT: u64 = 1024;
pub(super) const BYTES: usize = 1024;
/// Most block groups: 64 TiB with blocks of 4 KiB.
const GROUPS_MAX: u64 = 1 << 19;

/// Features. What is not in one of these lists may change what a bitmap means.
mod compat {
    pub const HAS_JOURNAL: u32 = 0x4;
    pub const SPARSE_SUPER2: u32 = 0x200;
    pub const FAST_COMMIT: u32 = 0x400;
    /// dir_prealloc, imagic, ext_attr, resize_inode, dir_index, stable_inodes, orphan_file.
    pub const HARMLESS: u32 = 0x1 | 0x2 | 0x8 | 0x10 | 0x20 | 0x800 | 0x1000;
}
mod incompat {
    pub const RECOVER: u32 = 0x4;
    pub const META_BG: u32 = 0x10;
    pub const WIDE: u32 = 0x80;
    pub const CSUM_SEED: u32 = 0x2000;
    /// filetype, extents, mmp, flex_bg, ea_inode, largedir, inline_data, encrypt, casefold.
    pub const HARMLESS: u32 = 0x2 | 0x40 | 0x100 | 0x200 | 0x400 | 0x4000 | 0x8000 | 0x10000 | 0x20000;
}
mod ro_compat {
    pub const SPARSE_SUPER: u32 = 0x1;
    pub const GDT_CSUM: u32 = 0x10;
    pub const BIGALLOC: u32 = 0x200;
    pub const METADATA_CSUM: u32 = 0x400;
    /// large_file, btree_dir, huge_file, dir_nlink, extra_isize, quota, readonly, project, verity, orphan_present.
    pub const HARMLESS: u32 = 0x2 | 0x4 | 0x8 | 0x20 | 0x40 | 0x100 | 0x1000 | 0x2000 | 0x8000 | 0x10000;
}

/// How group descriptors and bitmaps are protected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Checksums {
    None,
    /// CRC-16 of descriptors.
    Descriptors([u8; 16]),
    /// CRC-32C of everything, from this start value.
    All(u32),
}

/// What it says. Numbers are of blocks unless they say otherwise.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Superblock {
    pub block_bytes: u64,
    pub blocks: u64,
    /// The first block of group 0.
    pub first_block: u64,
    pub group_blocks: u64,
    /// Blocks for which a bit of a bitmap stands.
    pub cluster_blocks: u64,
    pub group_clusters: u64,
    pub groups: u64,
    pub descriptor_bytes: u64,
    /// The first block of descriptors that lies in the groups that it is about.
    pub first_meta_block: Option<u64>,
    pub reserved_descriptor_blocks: u64,
    pub checksums: Checksums,
    pub inode_bytes: u64,
    pub group_inodes: u64,
    /// Inode of the journal; None without a journal.
    pub journal_inode: Option<u32>,
    sparse: bool,
    backups: Option<[u64; 2]>,
    inodes: u64,
}

/// Whether what the bitmaps say can be known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct State {
    /// Errors were found since it was last checked.
    pub has_errors: bool,
    /// Unmounted cleanly, or with a journal.
    pub is_valid: bool,
    /// The journal may have blocks in it that are in no transaction.
    pub has_fast_commits: bool,
}

impl Superblock {
    /// Reads it; None where something in it is not understood or not true.
    pub fn parse(bytes: &[u8], volume_bytes: u64) -> Option<(Superblock, State)> {
        let (has_compat, has_incompat, has_ro) = (le32(bytes, 92), le32(bytes, 96), le32(bytes, 100));
        let known = [
            (has_compat, compat::HARMLESS | compat::HAS_JOURNAL | compat::SPARSE_SUPER2 | compat::FAST_COMMIT),
            (
                has_incompat,
                incompat::HARMLESS | incompat::RECOVER | incompat::META_BG | incompat::WIDE | incompat::CSUM_SEED,
            ),
            (
                has_ro,
                ro_compat::HARMLESS
                    | ro_compat::SPARSE_SUPER
                    | ro_compat::GDT_CSUM
                    | ro_compat::BIGALLOC
                    | ro_compat::METADATA_CSUM,
            ),
        ];
        let is_known = known.iter().all(|(has, known)| has & !known == 0);
        if bytes.len() != BYTES || le16(bytes, 56) != 0xef53 || le32(bytes, 76) != 1 || !is_known {
            return None;
        }
        let checksums = checksums(bytes, has_incompat, has_ro)?;
        let (block_log2, cluster_log2) = (le32(bytes, 24), le32(bytes, 28));
        if block_log2 > 6 || cluster_log2 < block_log2 || cluster_log2 > 20 {
            return None;
        }
        let block_bytes = 1024 << block_log2;
        let is_big = has_ro & ro_compat::BIGALLOC != 0;
        let cluster_blocks = if is_big { 1 << (cluster_log2 - block_log2) } else { 1 };
        let wide = has_incompat & incompat::WIDE != 0;
        let high = if wide { u64::from(le32(bytes, 336)) << 32 } else { 0 };
        let blocks = high | u64::from(le32(bytes, 4));
        let [first_block, group_blocks, group_inodes] = [20, 32, 40].map(|at| u64::from(le32(bytes, at)));
        let group_clusters = if is_big { u64::from(le32(bytes, 36)) } else { group_blocks };
        // mkfs makes no smaller groups; so there are few beside the blocks.
        let has_good_groups = group_clusters >= 256
            && group_clusters.is_multiple_of(8)
            && group_clusters <= 8 * block_bytes
            && group_clusters * cluster_blocks == group_blocks;
        let fits = blocks.checked_mul(block_bytes).is_some_and(|bytes| bytes <= volume_bytes);
        if !has_good_groups
            || !fits
            || blocks <= first_block
            || first_block != u64::from(block_bytes == 1024 && !is_big)
        {
            return None;
        }
        let groups = (blocks - first_block).div_ceil(group_blocks);
        let descriptor_bytes = if wide { u64::from(le16(bytes, 254)) } else { 32 };
        let has_good_descriptors = descriptor_bytes.is_power_of_two()
            && (if wide { 64..=1024 } else { 32..=32 }).contains(&descriptor_bytes)
            && groups <= GROUPS_MAX;
        let inode_bytes = u64::from(le16(bytes, 88));
        let has_good_inodes = inode_bytes.is_power_of_two()
            && (128..=block_bytes).contains(&inode_bytes)
            && (1..=8 * block_bytes).contains(&group_inodes);
        if !has_good_descriptors || !has_good_inodes {
            return None;
        }
        let has_journal = has_compat & compat::HAS_JOURNAL != 0;
        let state = le16(bytes, 58);
        let state = State {
            has_errors: state & 2 != 0 || le32(bytes, 404) != 0,
            is_valid: state & 1 != 0 && (has_journal || has_incompat & incompat::RECOVER == 0),
            has_fast_commits: has_compat & compat::FAST_COMMIT != 0 && has_incompat & incompat::RECOVER != 0,
        };
        let backups = [588, 592].map(|at| u64::from(le32(bytes, at)));
        let superblock = Superblock {
            block_bytes,
            blocks,
            first_block,
            group_blocks,
            cluster_blocks,
            group_clusters,
            groups,
            descriptor_bytes,
            first_meta_block: (has_incompat & incompat::META_BG != 0).then(|| u64::from(le32(bytes, 260))),
            reserved_descriptor_blocks: u64::from(le16(bytes, 206)),
            checksums,
            inode_bytes,
            group_inodes,
            journal_inode: has_journal.then(|| le32(bytes, 224)),
            sparse: has_ro & ro_compat::SPARSE_SUPER != 0,
            backups: (has_compat & compat::SPARSE_SUPER2 != 0).then_some(backups),
            inodes: u64::from(le32(bytes, 0)),
        };
        Some((superblock, state))
    }

    pub fn descriptors_per_block(&self) -> u64 {
        self.block_bytes / self.descriptor_bytes
    }

    pub fn descriptor_blocks(&self) -> u64 {
        self.groups.div_ceil(self.descriptors_per_block())
    }

    pub fn first_block_of(&self, group: u64) -> u64 {
        self.first_block + group * self.group_blocks
    }

    /// Clusters that the bitmap of a group is about.
    pub fn clusters_of(&self, group: u64) -> u64 {
        let blocks = self.blocks.saturating_sub(self.first_block_of(group)).min(self.group_blocks);
        blocks.div_ceil(self.cluster_blocks)
    }

    /// The block with the superblock.
    pub fn own_block(&self) -> u64 {
        AT / self.block_bytes
    }

    fn is_meta(&self, descriptor_block: u64) -> bool {
        self.first_meta_block.is_some_and(|first| descriptor_block >= first)
    }

    /// The block in which a block of descriptors lies.
    pub fn descriptor_block(&self, index: u64) -> u64 {
        if !self.is_meta(index) {
            return self.own_block() + 1 + index;
        }
        let group = index * self.descriptors_per_block();
        // With clusters, the first block of group 0 is 0 though blocks of 1 KiB put the superblock in the next one.
        let shift = u64::from(self.block_bytes == 1024 && group == 0 && self.first_block == 0);
        self.first_block_of(group) + u64::from(self.has_super(group)) + shift
    }

    /// Whether a copy of the superblock begins a group.
    fn has_super(&self, group: u64) -> bool {
        let is_power = |base: u64| {
            let mut power = base;
            while power < group {
                power *= base;
            }
            power == group
        };
        match self.backups {
            _ if group == 0 => true,
            Some(backups) => backups.contains(&group),
            None => group == 1 || !self.sparse || [3, 5, 7].into_iter().any(is_power),
        }
    }

    /// Blocks at the start of a group that hold the superblock and descriptors, and what is kept for more of those.
    pub fn base_blocks_of(&self, group: u64) -> u64 {
        let own = u64::from(self.has_super(group));
        let descriptor_block = group / self.descriptors_per_block();
        if self.is_meta(descriptor_block) {
            let first = descriptor_block * self.descriptors_per_block();
            let last = first + self.descriptors_per_block() - 1;
            return own + u64::from(group == first || group == first + 1 || group == last);
        }
        let descriptors = self.first_meta_block.unwrap_or(self.descriptor_blocks());
        own * (1 + descriptors + self.reserved_descriptor_blocks)
    }
}

/// How the file system is protected; None where its own checksum is wrong.
fn checksums(bytes: &[u8], has_incompat: u32, has_ro: u32) -> Option<Checksums> {
    let uuid: [u8; 16] = part(bytes, 104, 16).try_into().ok()?;
    if has_ro & ro_compat::METADATA_CSUM == 0 {
        let descriptors = has_ro & ro_compat::GDT_CSUM != 0;
        return Some(if descriptors { Checksums::Descriptors(uuid) } else { Checksums::None });
    }
    const CRC32C: u8 = 1;
    if u8_at(bytes, 373) != CRC32C || crc32c(u32::MAX, part(bytes, 0, BYTES - 4)) != le32(bytes, BYTES - 4) {
        return None;
    }
    let has_seed = has_incompat & incompat::CSUM_SEED != 0;
    Some(Checksums::All(if has_seed { le32(bytes, 624) } else { crc32c(u32::MAX, &uuid) }))
}
