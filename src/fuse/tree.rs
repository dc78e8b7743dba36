//! The tree: names, attributes and directories over the core's disks and snapshots.
//!
//! The tree keeps no copy of what the core knows: each question is answered from the core as it is now, so that what
//! the control socket does shows at once. Only inodes, open texts and recent maps are held ([`super::inodes`],
//! [`super::held`], [`super::maps`]).

use super::attr::{Attr, DirEntry, Statfs};
use super::held::Held;
use super::inodes::{Inode, Inodes};
use super::maps::Recent;
use super::metrics::prometheus;
use super::node::{Item, Kind, Node, ROOT_INO, SINCE_MAPS};
use crate::backup::{MapFile, MapFormat, MapMeta};
use crate::error::{Error, Result, errno};
use crate::fleece::{Disk, Fleece, LiveVolume, Snapshot, View, ViewMap};
use crate::storage::clock::now_ns;
use std::sync::Arc;
use uuid::Uuid;

/// Maps kept at hand: a few files of a few views, as one reader looks at them.
const RECENT_MAPS: usize = 32;
/// Dirty maps kept at hand, below the maps' texts and `changed.raw`.
const RECENT_CHANGES: usize = 16;
/// Longest name of a snapshot in bytes.
const NAME_LEN: u32 = 200;
/// Block of `statfs` in bytes.
const STATFS_BLOCK: u32 = 4096;
/// Directory offset behind `..`; the offset behind an entry is its inode number.
const FIRST_OFFSET: u64 = 2;

/// Makes the content of `status.json`.
pub type Status = Arc<dyn Fn() -> serde_json::Value + Send + Sync>;

/// Snapshot, disk, base.
type ChangesKey = (Uuid, Uuid, Option<Uuid>);
/// The disk's map, the volume that it is cut to, the format.
pub(super) type MapKey = (ChangesKey, Option<Uuid>, MapFormat);

/// The tree of one mount.
pub struct Tree {
    pub(super) fleece: Arc<Fleece>,
    pub(super) inodes: Inodes,
    pub(super) texts: Held<str>,
    pub(super) live_volumes: Held<LiveVolume>,
    /// Permission bits of the live files.
    mode: u32,
    status: Status,
    pub(super) maps: Recent<MapKey, MapFile>,
    changes: Recent<ChangesKey, ViewMap>,
    started_ns: i64,
}

pub(super) fn no_entry(what: &str) -> Error {
    Error::new(errno::ENOENT, what, "no such file or directory")
}

pub(super) fn stale(what: &str) -> Error {
    Error::new(errno::ESTALE, what, "is gone")
}

impl Tree {
    /// The tree over `fleece`, with live files of permission bits `mode`.
    pub fn new(fleece: Arc<Fleece>, mode: u32, status: Status) -> Tree {
        Tree {
            fleece,
            inodes: Inodes::default(),
            texts: Held::default(),
            live_volumes: Held::default(),
            mode,
            status,
            maps: Recent::new(RECENT_MAPS),
            changes: Recent::new(RECENT_CHANGES),
            started_ns: now_ns(),
        }
    }

    /// The inode that the kernel calls `ino`. A number that this process never gave out is searched for in the whole
    /// tree: an earlier process of the same mount did.
    pub fn inode(&self, ino: u64) -> Result<Arc<Inode>> {
        if let Some(inode) = self.inodes.get(ino) {
            return Ok(inode);
        }
        let node = self.search(Node::Root, ino).ok_or_else(|| stale("inode"))?;
        Ok(self.inodes.remember(node))
    }

    fn search(&self, from: Node, ino: u64) -> Option<Node> {
        if from.ino() == ino {
            return Some(from);
        }
        if from.kind() != Kind::Directory {
            return None;
        }
        self.children(&from).ok()?.into_iter().find_map(|(_, node)| self.search(node, ino))
    }

    /// The node called `name` in a directory; nothing is counted.
    pub fn find(&self, parent: &Inode, name: &str) -> Result<Node> {
        let found = self.children(&parent.node)?.into_iter().find(|(child, _)| child == name);
        found.map(|(_, node)| node).ok_or_else(|| no_entry(name))
    }

    /// Attributes of a node that the kernel is told of by name, counted as one lookup.
    pub fn enter(&self, node: Node) -> Result<Attr> {
        let attr = self.attr(&node, None)?;
        self.inodes.remember(node);
        Ok(attr)
    }

    /// [`Tree::find`] and [`Tree::enter`].
    pub fn lookup(&self, parent: &Inode, name: &str) -> Result<Attr> {
        self.enter(self.find(parent, name)?)
    }

    /// Takes back `count` lookups of `ino`.
    pub fn forget(&self, ino: u64, count: u64) {
        self.inodes.forget(ino, count);
    }

    /// Attributes; those of a text that is open under `handle` are of that text.
    pub fn getattr(&self, inode: &Inode, handle: Option<u64>) -> Result<Attr> {
        self.attr(&inode.node, handle)
    }

    /// Where a symbolic link points.
    pub fn readlink(&self, inode: &Inode) -> Result<String> {
        match inode.node {
            Node::Latest => Ok(self.newest()?.name().to_owned()),
            _ => Err(Error::new(errno::EINVAL, "readlink", "not a symbolic link")),
        }
    }

    /// The entries of a directory behind `offset`, in order of inode numbers: entries that come and go between two
    /// calls neither hide nor repeat the others.
    pub fn readdir(&self, inode: &Inode, offset: u64) -> Result<Vec<DirEntry>> {
        let children = self.children(&inode.node)?;
        let dot =
            |offset, name: &str| DirEntry { ino: inode.ino, offset, kind: Kind::Directory, name: name.to_owned() };
        let mut entries = vec![dot(FIRST_OFFSET - 1, "."), dot(FIRST_OFFSET, "..")];
        entries.extend(children.into_iter().map(|(name, node)| {
            let ino = node.ino();
            DirEntry { ino, offset: ino, kind: node.kind(), name }
        }));
        entries.sort_by_key(|entry| entry.offset);
        entries.retain(|entry| entry.offset > offset);
        Ok(entries)
    }

    /// The mount as `df` shows it: all disks, and nothing free.
    pub fn statfs(&self) -> Statfs {
        let bytes = self.fleece.disks().iter().fold(0u64, |sum, disk| sum.saturating_add(disk.size()));
        Statfs { block: STATFS_BLOCK, blocks: bytes.div_ceil(u64::from(STATFS_BLOCK)), name_len: NAME_LEN }
    }

    /// Lets go of the maps of snapshots that are gone.
    pub fn tidy(&self) {
        let lives = |(snapshot, _, _): &ChangesKey| self.fleece.snapshot_by_uuid(*snapshot).is_some();
        self.maps.retain(|(key, ..)| lives(key));
        self.changes.retain(lives);
    }

    /// Whether [`Tree::tidy`] could have something to do.
    pub fn keeps_maps(&self) -> bool {
        !self.maps.is_empty() || !self.changes.is_empty()
    }

    fn attr(&self, node: &Node, handle: Option<u64>) -> Result<Attr> {
        let (size, blocks, time_ns) = self.extent(node, handle)?;
        let (attr_ttl, entry_ttl) = Attr::ttls(node);
        let mut perm = Attr::perm(node, self.mode);
        let writable = match *node {
            Node::Live(disk) => !self.disk(disk)?.read_only(),
            Node::LiveVolume { disk, volume } => self.is_writable(&*self.live_volume(disk, volume)?),
            _ => true,
        };
        if !writable {
            perm &= 0o444;
        }
        Ok(Attr { ino: node.ino(), kind: node.kind(), size, blocks, time_ns, perm, attr_ttl, entry_ttl })
    }

    /// Size in bytes, blocks and time of a node.
    fn extent(&self, node: &Node, handle: Option<u64>) -> Result<(u64, u64, i64)> {
        let dense = |size: u64, time_ns| (size, size.div_ceil(512), time_ns);
        Ok(match node {
            Node::Root | Node::LiveDir | Node::LiveDisk(_) | Node::LiveVolumes(_) => (0, 0, self.started_ns),
            Node::Snapshots => (0, 0, self.newest().map_or(self.started_ns, |snapshot| snapshot.time_ns())),
            Node::Latest => {
                let snapshot = self.newest()?;
                (snapshot.name().len() as u64, 0, snapshot.time_ns())
            }
            Node::Status | Node::Metrics => dense(self.text_behind(node.ino(), node, handle)?.len() as u64, now_ns()),
            Node::Manifest(uuid) => {
                let time_ns = self.snapshot(*uuid)?.time_ns();
                dense(self.text_behind(node.ino(), node, handle)?.len() as u64, time_ns)
            }
            Node::Live(uuid) => {
                let disk = self.disk(*uuid)?;
                let size = disk.size();
                (size, Attr::sparse_blocks(size), disk.mtime_ns())
            }
            Node::LiveVolume { disk, volume } => {
                let volume = self.live_volume(*disk, *volume)?;
                (volume.size(), Attr::sparse_blocks(volume.size()), volume.mtime_ns())
            }
            Node::Snapshot(uuid) => (0, 0, self.snapshot(*uuid)?.time_ns()),
            Node::View { snapshot, disk, item } => {
                let view = self.view(*snapshot, *disk)?;
                let time_ns = view.time_ns();
                match item {
                    Item::Dir | Item::SinceDir | Item::Since(_) | Item::Volumes => (0, 0, time_ns),
                    Item::Volume(id) => {
                        let size = self.volume(&view, *id)?.size();
                        (size, Attr::sparse_blocks(size), time_ns)
                    }
                    Item::VolumeMap(id) => dense(self.volume_map(&view, *id)?.len(), time_ns),
                    Item::Raw => (view.size(), Attr::sparse_blocks(view.size()), time_ns),
                    Item::Release => (view.size(), 0, time_ns),
                    Item::Changed => self.changed_extent(&view, reference(&view))?,
                    Item::SinceChanged(base) => self.changed_extent(&view, Some(*base))?,
                    Item::Map => dense(self.map(&view, reference(&view), MapFormat::Json)?.len(), time_ns),
                    Item::SinceMap(base, format) => dense(self.map(&view, Some(*base), *format)?.len(), time_ns),
                }
            }
        })
    }

    /// `changed.raw` is as long as the disk and occupies what changed.
    fn changed_extent(&self, view: &Arc<View>, base: Option<Uuid>) -> Result<(u64, u64, i64)> {
        let dirty = self.changes(view, base)?.dirty_bytes().min(view.size());
        Ok((view.size(), dirty.div_ceil(512), view.time_ns()))
    }

    /// Names and nodes in a directory; nothing here looks at a map.
    fn children(&self, node: &Node) -> Result<Vec<(String, Node)>> {
        let named = |name: &str, node| (name.to_owned(), node);
        Ok(match *node {
            Node::Root => vec![
                named("status.json", Node::Status),
                named("metrics", Node::Metrics),
                named("live", Node::LiveDir),
                named("snapshots", Node::Snapshots),
            ],
            Node::LiveDir => self
                .fleece
                .disks()
                .iter()
                .flat_map(|disk| {
                    let (name, uuid) = (disk.name(), disk.uuid());
                    [(format!("{name}.raw"), Node::Live(uuid)), (name.to_owned(), Node::LiveDisk(uuid))]
                })
                .collect(),
            Node::LiveDisk(disk) => {
                self.disk(disk)?;
                vec![named("volumes", Node::LiveVolumes(disk))]
            }
            Node::LiveVolumes(disk) => self.list_live_volumes(&*self.disk(disk)?),
            Node::Snapshots => {
                let snapshots = self.fleece.snapshots();
                let mut children: Vec<_> =
                    snapshots.iter().map(|snapshot| named(snapshot.name(), Node::Snapshot(snapshot.uuid()))).collect();
                if !children.is_empty() {
                    children.push(named("latest", Node::Latest));
                }
                children
            }
            Node::Snapshot(uuid) => self.snapshot_children(uuid)?,
            Node::View { snapshot, disk, item } => {
                let child = |name: &str, item| named(name, Node::View { snapshot, disk, item });
                let view = self.view(snapshot, disk)?;
                let since = view.since();
                match item {
                    Item::Dir => vec![
                        child("changed.raw", Item::Changed),
                        child("release.raw", Item::Release),
                        child("since", Item::SinceDir),
                        child("volumes", Item::Volumes),
                    ],
                    Item::Volumes => self.list_volumes(&view)?,
                    Item::SinceDir => since.iter().map(|point| child(&point.name, Item::Since(point.uuid))).collect(),
                    Item::Since(base) if since.iter().any(|point| point.uuid == base) => SINCE_MAPS
                        .iter()
                        .map(|(name, format)| child(name, Item::SinceMap(base, *format)))
                        .chain([child("changed.raw", Item::SinceChanged(base))])
                        .collect(),
                    Item::Since(_) => return Err(stale("checkpoint")),
                    _ => return Err(Error::new(errno::ENOTDIR, "directory", "not a directory")),
                }
            }
            _ => return Err(Error::new(errno::ENOTDIR, "directory", "not a directory")),
        })
    }

    fn snapshot_children(&self, uuid: Uuid) -> Result<Vec<(String, Node)>> {
        let snapshot = self.snapshot(uuid)?;
        let mut children = vec![("manifest.json".to_owned(), Node::Manifest(uuid))];
        for view in snapshot.views() {
            let (name, disk) = (view.disk_name(), view.disk_uuid());
            let child = |suffix: &str, item| (format!("{name}{suffix}"), Node::View { snapshot: uuid, disk, item });
            children.extend([child(".raw", Item::Raw), child(".map", Item::Map), child("", Item::Dir)]);
        }
        Ok(children)
    }

    fn newest(&self) -> Result<Arc<Snapshot>> {
        self.fleece.snapshots().pop().ok_or_else(|| no_entry("latest"))
    }

    pub(super) fn disk(&self, uuid: Uuid) -> Result<Arc<Disk>> {
        self.fleece.disks().into_iter().find(|disk| disk.uuid() == uuid).ok_or_else(|| stale("disk"))
    }

    pub(super) fn snapshot(&self, uuid: Uuid) -> Result<Arc<Snapshot>> {
        self.fleece.snapshot_by_uuid(uuid).ok_or_else(|| stale("snapshot"))
    }

    pub(super) fn view(&self, snapshot: Uuid, disk: Uuid) -> Result<Arc<View>> {
        let snapshot = self.snapshot(snapshot)?;
        let found = snapshot.views().iter().find(|view| view.disk_uuid() == disk);
        found.cloned().ok_or_else(|| stale("view"))
    }

    /// The text of a node that is one, as of now.
    pub(super) fn text(&self, node: &Node) -> Result<Arc<str>> {
        let json = |value: &serde_json::Value| {
            let text = serde_json::to_string_pretty(value);
            text.map(|text| text + "\n").map_err(|e| Error::new(errno::EIO, "write JSON", e.to_string()))
        };
        let text = match node {
            Node::Status => json(&(self.status)())?,
            Node::Metrics => prometheus(&self.fleece.counters()),
            Node::Manifest(uuid) => json(&self.snapshot(*uuid)?.manifest())?,
            _ => return Err(Error::new(errno::EINVAL, "text", "not a generated file")),
        };
        Ok(text.into())
    }

    /// The text that was made for `handle`, or that of now where the handle is none of ours.
    pub(super) fn text_behind(&self, ino: u64, node: &Node, handle: Option<u64>) -> Result<Arc<str>> {
        match handle.and_then(|handle| self.texts.get(ino, handle)) {
            Some(text) => Ok(text),
            None => self.text(node),
        }
    }

    /// What changed from `base` to `view`.
    pub(super) fn changes(&self, view: &Arc<View>, base: Option<Uuid>) -> Result<Arc<ViewMap>> {
        self.changes.get((view.snapshot_uuid(), view.disk_uuid(), base), || view.map(base))
    }

    /// The text of what changed from `base` to `view`.
    pub(super) fn map(&self, view: &Arc<View>, base: Option<Uuid>, format: MapFormat) -> Result<Arc<MapFile>> {
        let key = (view.snapshot_uuid(), view.disk_uuid(), base);
        self.maps.get((key, None, format), || {
            let changes = self.changes(view, base)?;
            let meta = MapMeta::of(&changes);
            Ok(Arc::new(MapFile::new(changes, format, &meta)?))
        })
    }

    /// The inode of the mount itself.
    pub fn root(&self) -> Result<Arc<Inode>> {
        self.inode(ROOT_INO)
    }
}

/// The point that a view's own map and `changed.raw` start from.
pub(super) fn reference(view: &View) -> Option<Uuid> {
    view.reference().map(|point| point.uuid)
}
