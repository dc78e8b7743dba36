//! What `stat` says of a node.

use super::node::{Kind, Node};
use std::time::Duration;

/// How long the kernel may keep the attributes of what never changes while it exists.
const FROZEN_TTL: Duration = Duration::from_secs(3600);

/// Attributes of one node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attr {
    /// Inode number.
    pub ino: u64,
    /// Directory, file or link.
    pub kind: Kind,
    /// Size in bytes.
    pub size: u64,
    /// Allocated size in blocks of 512 bytes.
    pub blocks: u64,
    /// All three times, nanoseconds since the epoch.
    pub time_ns: i64,
    /// Permission bits.
    pub perm: u16,
    /// How long the kernel may keep these attributes.
    pub attr_ttl: Duration,
    /// How long the kernel may keep the name that led here.
    pub entry_ttl: Duration,
}

impl Attr {
    /// Permission bits of `node` where the user asked for `mode` (of the live files).
    ///
    /// Directories, the status and the metrics hold nothing of a disk's content and are for everybody; what is below
    /// `snapshots/` is readable by whom `mode` lets read.
    pub fn perm(node: &Node, mode: u32) -> u16 {
        let perm = match node {
            Node::Live(_) | Node::LiveVolume { .. } => mode & 0o666,
            Node::Status | Node::Metrics => 0o444,
            // fallocate(1) opens what it punches for reading, too.
            Node::View { item: super::node::Item::Release, .. } => mode & 0o666,
            _ => match node.kind() {
                Kind::Directory => 0o755,
                Kind::Symlink => 0o777,
                Kind::File => mode & 0o444,
            },
        };
        perm as u16
    }

    /// How long the kernel may keep a node's attributes, and its name.
    ///
    /// Names below `live/` and `snapshots/` come and go through the control socket as well, so the kernel asks each
    /// time; so it does for attributes that change.
    pub fn ttls(node: &Node) -> (Duration, Duration) {
        match node {
            Node::View { .. } if node.kind() == Kind::File => (FROZEN_TTL, Duration::ZERO),
            Node::LiveDir | Node::Snapshots | Node::Status | Node::Metrics => (Duration::ZERO, FROZEN_TTL),
            _ => (Duration::ZERO, Duration::ZERO),
        }
    }

    /// Blocks of a file that may have holes: one less than its size, as cp(1) and tar(1) look for holes only where
    /// fewer blocks than bytes are allocated. Never none where there is content: that is one hole to tar.
    pub fn sparse_blocks(size: u64) -> u64 {
        (size / 512).saturating_sub(1).max(u64::from(size > 0))
    }
}

/// What `statfs` says of the mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Statfs {
    /// Size of a block in bytes.
    pub block: u32,
    /// All disks together, in blocks.
    pub blocks: u64,
    /// Longest name in bytes.
    pub name_len: u32,
}

/// One entry of a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirEntry {
    /// Inode number.
    pub ino: u64,
    /// Where the listing goes on behind this entry.
    pub offset: u64,
    /// Directory, file or link.
    pub kind: Kind,
    /// The name.
    pub name: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_with_content_has_blocks_and_room_for_holes() {
        assert_eq!([0, 1, 512, 1024, 4096].map(Attr::sparse_blocks), [0, 1, 1, 1, 7]);
    }
}
