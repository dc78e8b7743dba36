//! Who is who in the tree, and the inode numbers.
//!
//! A [`Node`] names one file or directory by the UUIDs of what it shows, never by its path: the same disk under the
//! same snapshot name taken twice gives two nodes. Its inode number is a hash of that identity, so that a restarted
//! process computes the numbers that the kernel already holds, and a snapshot's files get new ones each time.

use crate::backup::MapFormat;
use sha2::{Digest, Sha256};
use uuid::Uuid;

/// The inode number of the mount's root, as FUSE defines it.
pub const ROOT_INO: u64 = 1;
/// Numbers below are the root's and the directory offsets of `.` and `..`.
const FIRST_INO: u64 = 16;
/// Numbers are also directory offsets, which are signed.
const INO_MASK: u64 = i64::MAX as u64;

/// One file or directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Node {
    /// The mount itself.
    Root,
    /// `status.json`.
    Status,
    /// `metrics`.
    Metrics,
    /// `live/`.
    LiveDir,
    /// `live/DISK.raw`, by the disk's UUID.
    Live(Uuid),
    /// `live/DISK/`.
    LiveDisk(Uuid),
    /// `live/DISK/volumes/`.
    LiveVolumes(Uuid),
    /// `live/DISK/volumes/VOLUME.raw`.
    LiveVolume {
        /// The disk that it is listed under.
        disk: Uuid,
        /// Made of its name and place: another one after a change of the table that moved it.
        volume: Uuid,
    },
    /// `snapshots/`.
    Snapshots,
    /// `snapshots/latest`.
    Latest,
    /// `snapshots/NAME/`, by the snapshot's UUID.
    Snapshot(Uuid),
    /// `snapshots/NAME/manifest.json`.
    Manifest(Uuid),
    /// What belongs to one disk of one snapshot.
    View {
        /// The snapshot.
        snapshot: Uuid,
        /// The disk.
        disk: Uuid,
        /// Which of the view's files.
        item: Item,
    },
}

/// A file or directory of a frozen view.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Item {
    /// `DISK.raw`.
    Raw,
    /// `DISK.map`.
    Map,
    /// `DISK/`.
    Dir,
    /// `DISK/changed.raw`.
    Changed,
    /// `DISK/release.raw`.
    Release,
    /// `DISK/since/`.
    SinceDir,
    /// `DISK/since/CHECKPOINT/`, by the checkpoint's UUID.
    Since(Uuid),
    /// `DISK/since/CHECKPOINT/map.*`.
    SinceMap(Uuid, MapFormat),
    /// `DISK/since/CHECKPOINT/changed.raw`.
    SinceChanged(Uuid),
    /// `DISK/volumes/`.
    Volumes,
    /// `DISK/volumes/VOLUME.raw`, by a UUID made of its name and place.
    Volume(Uuid),
    /// `DISK/volumes/VOLUME.map`.
    VolumeMap(Uuid),
}

/// What `stat` calls the type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A directory.
    Directory,
    /// A regular file.
    File,
    /// A symbolic link.
    Symlink,
}

/// Names and formats of the maps in `since/CHECKPOINT/`.
pub const SINCE_MAPS: [(&str, MapFormat); 6] = [
    ("map.json", MapFormat::Json),
    ("map.borg", MapFormat::Borg),
    ("map.rbd.json", MapFormat::Rbd),
    ("map.bmap", MapFormat::Bmap),
    ("map.ddrescue", MapFormat::Ddrescue),
    ("map.nbd.json", MapFormat::Nbd),
];

impl Node {
    /// The inode number. The texts hashed here are part of it: changing one breaks a take-over.
    pub fn ino(&self) -> u64 {
        let mut hash = Sha256::new();
        match self {
            Node::Root => return ROOT_INO,
            Node::Status => hash.update("status"),
            Node::Metrics => hash.update("metrics"),
            Node::LiveDir => hash.update("live-dir"),
            Node::Snapshots => hash.update("snapshots"),
            Node::Latest => hash.update("latest"),
            Node::Live(disk) => update(&mut hash, "live", &[disk]),
            Node::LiveDisk(disk) => update(&mut hash, "live-disk", &[disk]),
            Node::LiveVolumes(disk) => update(&mut hash, "live-volumes", &[disk]),
            Node::LiveVolume { disk, volume } => update(&mut hash, "live-volume", &[disk, volume]),
            Node::Snapshot(snapshot) => update(&mut hash, "snapshot", &[snapshot]),
            Node::Manifest(snapshot) => update(&mut hash, "manifest", &[snapshot]),
            Node::View { snapshot, disk, item } => {
                update(&mut hash, "view", &[snapshot, disk]);
                match item {
                    Item::Raw => hash.update("raw"),
                    Item::Map => hash.update("map"),
                    Item::Dir => hash.update("dir"),
                    Item::Changed => hash.update("changed"),
                    Item::Release => hash.update("release"),
                    Item::SinceDir => hash.update("since-dir"),
                    Item::Since(point) => update(&mut hash, "since", &[point]),
                    Item::SinceChanged(point) => update(&mut hash, "since-changed", &[point]),
                    Item::Volumes => hash.update("volumes"),
                    Item::Volume(volume) => update(&mut hash, "volume", &[volume]),
                    Item::VolumeMap(volume) => update(&mut hash, "volume-map", &[volume]),
                    Item::SinceMap(point, format) => {
                        update(&mut hash, "since-map", &[point]);
                        hash.update(format.name());
                    }
                }
            }
        }
        let mut first = [0; 8];
        first.iter_mut().zip(hash.finalize()).for_each(|(to, from)| *to = from);
        let ino = u64::from_le_bytes(first) & INO_MASK;
        if ino < FIRST_INO { ino + FIRST_INO } else { ino }
    }

    /// Directory, file or link.
    pub fn kind(&self) -> Kind {
        match self {
            Node::Root | Node::LiveDir | Node::LiveDisk(_) | Node::LiveVolumes(_) => Kind::Directory,
            Node::Snapshots | Node::Snapshot(_) => Kind::Directory,
            Node::View { item: Item::Dir | Item::SinceDir | Item::Since(_) | Item::Volumes, .. } => Kind::Directory,
            Node::Latest => Kind::Symlink,
            _ => Kind::File,
        }
    }

    /// The snapshot that it belongs to, itself included.
    pub fn snapshot(&self) -> Option<Uuid> {
        match *self {
            Node::Snapshot(snapshot) | Node::Manifest(snapshot) | Node::View { snapshot, .. } => Some(snapshot),
            _ => None,
        }
    }

    /// Whether its text is made when it is opened.
    pub fn is_text(&self) -> bool {
        matches!(self, Node::Status | Node::Metrics | Node::Manifest(_))
    }

    /// Whether it is a live disk or a volume of one: what guests read and write.
    pub fn is_live(&self) -> bool {
        matches!(self, Node::Live(_) | Node::LiveVolume { .. })
    }

    /// Whether answering for it may have to look into bitmaps, stores or the image's allocation: work that a slow
    /// store holds up.
    pub fn is_slow(&self) -> bool {
        matches!(self, Node::View { .. }) && self.kind() == Kind::File
    }

    /// Whether already its attributes are such work: those of a map, of `changed.raw` and of what scans for volumes, not
    /// those of the others.
    pub fn is_slow_to_stat(&self) -> bool {
        match self {
            Node::Manifest(_) | Node::LiveVolume { .. } => true,
            _ => self.is_slow() && !matches!(self, Node::View { item: Item::Raw | Item::Release, .. }),
        }
    }

    /// Whether telling what is in it scans for volumes.
    pub fn is_slow_to_list(&self) -> bool {
        matches!(self, Node::LiveVolumes(_) | Node::View { item: Item::Volumes, .. })
    }
}

fn update(hash: &mut Sha256, text: &str, uuids: &[&Uuid]) {
    hash.update(text);
    for uuid in uuids {
        hash.update(uuid.as_bytes());
    }
}
