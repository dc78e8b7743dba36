//! Volumes in the tree: of live disks, and of frozen views with their maps.
//!
//! What is there is found by scans that the core keeps; here are names and numbers. A file of a live volume belongs to the
//! scan that it was opened with: it has a handle of its own, so that another open, after a change of the table, does not
//! take it along.

use super::inodes::{Inode, Target};
use super::node::{Item, Node};
use super::tree::{Tree, reference, stale};
use crate::backup::{MapFile, MapFormat, MapMeta, VolumeMap};
use crate::error::Result;
use crate::fleece::{Disk, FrozenVolume, LiveVolume, View};
use std::sync::Arc;
use uuid::Uuid;

impl Tree {
    /// The files of `live/DISK/volumes/`.
    pub(super) fn list_live_volumes(&self, disk: &Disk) -> Vec<(String, Node)> {
        let found = self.fleece.live_volumes();
        let node = |volume: &Arc<LiveVolume>| Node::LiveVolume { disk: disk.uuid(), volume: volume.id() };
        found.of_disk(disk).map(|volume| (format!("{}.raw", volume.volume().name), node(volume))).collect()
    }

    /// The files of `DISK/volumes/` in a snapshot.
    pub(super) fn list_volumes(&self, view: &View) -> Result<Vec<(String, Node)>> {
        let (snapshot, disk) = (view.snapshot_uuid(), view.disk_uuid());
        let node = |item| Node::View { snapshot, disk, item };
        let files = |volume: &Arc<FrozenVolume>| {
            let name = &volume.volume().name;
            [
                (format!("{name}.raw"), node(Item::Volume(volume.id()))),
                (format!("{name}.map"), node(Item::VolumeMap(volume.id()))),
            ]
        };
        Ok(self.snapshot(snapshot)?.volumes().of_view(view).flat_map(files).collect())
    }

    /// A volume of a live disk, as it is found now.
    pub(super) fn live_volume(&self, disk: Uuid, id: Uuid) -> Result<Arc<LiveVolume>> {
        let disk = self.disk(disk)?;
        let found = self.fleece.live_volumes();
        let volume = found.of_disk(&disk).find(|volume| volume.id() == id).cloned();
        volume.ok_or_else(|| stale("volume"))
    }

    /// The volume behind an open file; found again where no open of this process made the handle.
    pub(super) fn live_volume_behind(&self, inode: &Inode, handle: u64) -> Result<Arc<LiveVolume>> {
        match (self.live_volumes.get(inode.ino, handle), inode.node) {
            (Some(volume), _) => Ok(volume),
            (None, Node::LiveVolume { disk, volume }) => self.live_volume(disk, volume),
            _ => Err(stale("volume")),
        }
    }

    /// Whether the mount, and all disks below, take writes to the volume.
    pub(super) fn is_writable(&self, volume: &LiveVolume) -> bool {
        self.fleece.options().writable_volumes && !volume.read_only()
    }

    /// Holds the disks below a live volume, and gives the handle of its new open file.
    pub(super) fn open_live_volume(&self, inode: &Inode, disk: Uuid, id: Uuid) -> Result<u64> {
        let volume = self.live_volume(disk, id)?;
        volume.disks().for_each(|disk| disk.opened());
        // Only a disk that is open cannot be removed: look again now that they are.
        if let Some(e) = volume.disks().find_map(|disk| self.disk(disk.uuid()).err()) {
            volume.disks().for_each(|disk| disk.closed());
            return Err(e);
        }
        Ok(self.live_volumes.hold(inode.ino, volume))
    }

    /// The counterpart of [`Tree::open_live_volume`]; nothing where the handle is not of this process.
    pub(super) fn close_live_volume(&self, ino: u64, handle: u64) {
        if let Some(volume) = self.live_volumes.take(ino, handle) {
            volume.disks().for_each(|disk| disk.closed());
        }
    }

    /// A volume of a frozen view.
    pub(super) fn volume(&self, view: &View, id: Uuid) -> Result<Arc<FrozenVolume>> {
        let found = self.snapshot(view.snapshot_uuid())?.volumes();
        let volume = found.of_view(view).find(|volume| volume.id() == id).cloned();
        volume.ok_or_else(|| stale("volume"))
    }

    /// What changed in a volume since the reference point of each of its disks.
    pub(super) fn volume_map(&self, view: &Arc<View>, id: Uuid) -> Result<Arc<MapFile>> {
        let base = reference(view);
        let key = ((view.snapshot_uuid(), view.disk_uuid(), base), Some(id), MapFormat::Json);
        self.maps.get(key, || {
            let volume = self.volume(view, id)?;
            let mut disks = vec![None; volume.views().len()];
            for place in volume.volume().segments.iter().flat_map(|segment| &segment.places) {
                if let (Some(disk @ None), Some(view)) = (disks.get_mut(place.disk), volume.views().get(place.disk)) {
                    *disk = Some(self.changes(view, reference(view))?);
                }
            }
            let meta = MapMeta::of_volume(&*self.changes(view, base)?, &volume.volume().name);
            let map = VolumeMap::new(volume.volume().clone(), disks);
            Ok(Arc::new(MapFile::new(Arc::new(map), MapFormat::Json, &meta)?))
        })
    }

    /// What the bytes of a frozen volume's file come from.
    pub(super) fn volume_target(&self, view: &Arc<View>, item: Item) -> Result<Option<Target>> {
        Ok(match item {
            Item::Volume(id) => Some(Target::Volume(self.volume(view, id)?)),
            Item::VolumeMap(id) => Some(Target::Map(self.volume_map(view, id)?)),
            _ => None,
        })
    }
}
