//! Open files: reading, writing, seeking, allocating.
//!
//! A live file behaves as a block device: its size is the disk's, a write past the end is ENOSPC, a read there is
//! empty. A frozen file is read-only. Ranges that a request asks for are cut to the file here; the core gets none
//! that reach past the end. A live volume is a live file but for its size, which nobody changes.

use super::attr::Attr;
use super::inodes::{Inode, Target};
use super::node::{Item, Node};
use super::tree::{Tree, reference};
use crate::error::{Error, Result, errno};
use crate::fleece::{View, ViewMap};
use std::sync::Arc;

/// EBADF of errno(3).
const EBADF: i32 = 9;

/// Modes of fallocate(2).
mod falloc {
    pub const KEEP_SIZE: i32 = 0x01;
    pub const PUNCH_HOLE: i32 = 0x02;
    pub const ZERO_RANGE: i32 = 0x10;
}

/// How a file is opened.
#[derive(Debug, Clone, Copy)]
pub struct Access {
    /// For reading.
    pub read: bool,
    /// For writing.
    pub write: bool,
    /// With O_DIRECT.
    pub direct: bool,
}

/// What the kernel's page cache is to a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Caching {
    /// Nothing is cached.
    None,
    /// Nothing is cached, and writes go in parallel.
    NoneParallel,
    /// What was read stays, also after the last close.
    Keep,
}

/// An open file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Opened {
    /// The file handle: 0 but for texts.
    pub handle: u64,
    /// What the kernel may cache.
    pub caching: Caching,
}

/// What lseek(2) looks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Whence {
    /// SEEK_DATA.
    Data,
    /// SEEK_HOLE.
    Hole,
}

fn read_only(what: &str) -> Error {
    Error::new(errno::EROFS, what, "is read-only")
}

impl Tree {
    /// Opens a file. Below a snapshot it takes a hold of that snapshot, so that the file stays valid to its last close.
    pub fn open(&self, inode: &Inode, access: Access) -> Result<Opened> {
        let node = inode.node;
        if node.is_text() {
            return self.open_text(inode, access);
        }
        match node {
            Node::Live(uuid) => {
                let disk = self.disk(uuid)?;
                if access.write && disk.read_only() {
                    return Err(read_only("disk"));
                }
                disk.opened();
                // Only a disk that is open cannot be removed: look again now that it is.
                if let Err(e) = self.disk(uuid) {
                    disk.closed();
                    return Err(e);
                }
                inode.pin(Arc::new(Target::Disk(disk)));
                self.inodes.opened(inode);
                Ok(Opened { handle: 0, caching: Caching::NoneParallel })
            }
            Node::LiveVolume { disk, volume } => {
                if access.write && !self.is_writable(&*self.live_volume(disk, volume)?) {
                    return Err(
                        read_only("volume").hint("volumes are writable with `fleecefs mount --writable-volumes`")
                    );
                }
                let handle = self.open_live_volume(inode, disk, volume)?;
                self.inodes.opened(inode);
                Ok(Opened { handle, caching: Caching::NoneParallel })
            }
            Node::View { snapshot, item, .. } => {
                let release = item == Item::Release;
                if release && !access.write {
                    return Err(Error::new(errno::EACCES, "release.raw", "can only be opened for writing"));
                }
                if !release && access.write {
                    return Err(read_only("frozen view"));
                }
                let snapshot = self.snapshot(snapshot)?;
                if !snapshot.opened() {
                    return Err(Error::new(errno::ESTALE, "snapshot", "is gone"));
                }
                let target = self.make_target(&node).inspect_err(|_| snapshot.closed())?;
                inode.pin(target);
                self.inodes.opened(inode);
                let caching = if release || access.direct { Caching::None } else { Caching::Keep };
                Ok(Opened { handle: 0, caching })
            }
            _ => Err(Error::new(errno::EISDIR, "open", "not a file")),
        }
    }

    fn open_text(&self, inode: &Inode, access: Access) -> Result<Opened> {
        if access.write {
            return Err(read_only("generated file"));
        }
        let text = self.text(&inode.node)?;
        if let Node::Manifest(uuid) = inode.node
            && !self.snapshot(uuid)?.opened()
        {
            return Err(Error::new(errno::ESTALE, "snapshot", "is gone"));
        }
        self.inodes.opened(inode);
        Ok(Opened { handle: self.texts.hold(inode.ino, text), caching: Caching::None })
    }

    /// The close of one [`Tree::open`]. An open that an earlier process answered is none of ours to give back.
    pub fn release(&self, inode: &Inode, handle: u64) {
        self.texts.take(inode.ino, handle);
        self.close_live_volume(inode.ino, handle);
        let pinned = inode.pinned();
        if !self.inodes.closed(inode) {
            return;
        }
        if let Some(Target::Disk(disk)) = pinned.as_deref() {
            disk.closed();
        } else if let Some(uuid) = inode.node.snapshot()
            && let Ok(snapshot) = self.snapshot(uuid)
        {
            snapshot.closed();
        }
    }

    /// What a file's bytes come from; found again where no open of this process has pinned it.
    fn target(&self, inode: &Inode, handle: u64) -> Result<Arc<Target>> {
        if matches!(inode.node, Node::LiveVolume { .. }) {
            return Ok(Arc::new(Target::LiveVolume(self.live_volume_behind(inode, handle)?)));
        }
        match inode.pinned() {
            Some(target) => Ok(target),
            None => self.make_target(&inode.node),
        }
    }

    fn make_target(&self, node: &Node) -> Result<Arc<Target>> {
        let target = match *node {
            Node::Live(uuid) => Target::Disk(self.disk(uuid)?),
            Node::View { snapshot, disk, item } => {
                let view = self.view(snapshot, disk)?;
                match item {
                    Item::Raw | Item::Release => Target::View(view),
                    Item::Changed => Target::Changed(self.changes(&view, reference(&view))?),
                    Item::SinceChanged(base) => Target::Changed(self.changes(&view, Some(base))?),
                    Item::Map => Target::Map(self.map(&view, reference(&view), crate::backup::MapFormat::Json)?),
                    Item::SinceMap(base, format) => Target::Map(self.map(&view, Some(base), format)?),
                    Item::Dir | Item::SinceDir | Item::Since(_) => return Err(not_a_file()),
                    Item::Volumes | Item::Volume(_) | Item::VolumeMap(_) => {
                        self.volume_target(&view, item)?.ok_or_else(not_a_file)?
                    }
                }
            }
            _ => return Err(not_a_file()),
        };
        Ok(Arc::new(target))
    }

    /// Fills `buf` from `offset`; the count is short at the end of the file only.
    pub fn read(&self, inode: &Inode, handle: u64, offset: u64, buf: &mut [u8]) -> Result<usize> {
        if inode.node.is_text() {
            let text = self.text_behind(inode.ino, &inode.node, Some(handle))?;
            return Ok(read_text(&text, offset, buf));
        }
        if is_release(&inode.node) {
            return Err(Error::new(EBADF, "release.raw", "cannot be read"));
        }
        match &*self.target(inode, handle)? {
            Target::Disk(disk) => disk.read(buf, offset),
            Target::View(view) => view.read(buf, offset),
            Target::LiveVolume(volume) => volume.read(buf, offset),
            Target::Volume(volume) => volume.read(buf, offset),
            Target::Changed(changes) => read_changed(changes, offset, buf),
            Target::Map(map) => map.read_at(buf, offset),
        }
    }

    /// Writes to a live file, up to the end of the disk, and tells `done`, from whatever thread; durable by then where
    /// `sync` asks for it.
    pub fn write_then(
        &self,
        inode: &Inode,
        handle: u64,
        offset: u64,
        data: &[u8],
        sync: bool,
        done: impl FnOnce(Result<usize>) + Send + 'static,
    ) {
        let target = match self.writable(inode, handle) {
            Ok(target) => target,
            Err(e) => return done(Err(e)),
        };
        let synced = target.clone();
        let done = move |count: Result<usize>| {
            done(count.and_then(|count| if sync { flush(&synced).map(|()| count) } else { Ok(count) }));
        };
        match &*target {
            Target::Disk(disk) => disk.write_then(data, offset, done),
            Target::LiveVolume(volume) => volume.write_then(data, offset, done),
            _ => done(Err(Error::new(errno::EINVAL, "release.raw", "takes hole punching alone"))),
        }
    }

    /// Makes what was written to a live file durable; there is nothing to do elsewhere.
    pub fn fsync(&self, inode: &Inode, handle: u64) -> Result<()> {
        if inode.node.is_live() { flush(&*self.target(inode, handle)?) } else { Ok(()) }
    }

    /// fallocate(2) with its mode: discard and write-zeroes on a live file, release on `release.raw`.
    ///
    /// A block device's rules at the end: with KEEP_SIZE what lies behind it is cut off, else it is ENOSPC.
    pub fn fallocate(&self, inode: &Inode, handle: u64, mode: i32, offset: u64, len: u64) -> Result<()> {
        const DISCARD: i32 = falloc::PUNCH_HOLE | falloc::KEEP_SIZE;
        let unsupported = || Error::new(errno::EOPNOTSUPP, "fallocate", format!("mode {mode:#x} is not supported"));
        let target = self.writable(inode, handle)?;
        let size = match &*target {
            Target::Disk(disk) => disk.size(),
            Target::LiveVolume(volume) => volume.size(),
            Target::View(view) => view.size(),
            _ => return Err(unsupported()),
        };
        let inside = size.saturating_sub(offset).min(len);
        if mode & falloc::KEEP_SIZE == 0 && inside < len {
            return Err(Error::new(errno::ENOSPC, "fallocate", "past the end of the disk").at_offset(offset));
        }
        match (&*target, mode) {
            (_, DISCARD) if inside == 0 => Ok(()),
            (Target::View(view), DISCARD) => view.release(offset, inside),
            (Target::Disk(disk), DISCARD) => disk.discard(offset, inside),
            (Target::LiveVolume(volume), DISCARD) => volume.discard(offset, inside),
            // All of a disk is allocated as far as the guest can tell.
            (Target::Disk(_) | Target::LiveVolume(_), 0 | falloc::KEEP_SIZE) => Ok(()),
            (_, mode) if mode & !falloc::KEEP_SIZE != falloc::ZERO_RANGE => Err(unsupported()),
            (Target::Disk(_) | Target::LiveVolume(_), _) if inside == 0 => Ok(()),
            (Target::Disk(disk), _) => disk.write_zeroes(offset, inside),
            (Target::LiveVolume(volume), _) => volume.write_zeroes(offset, inside),
            _ => Err(unsupported()),
        }
    }

    /// The next data or hole at or behind `offset`; ENXIO where there is none. Every file ends in a hole.
    pub fn seek(&self, inode: &Inode, handle: u64, offset: u64, whence: Whence) -> Result<u64> {
        let all_data = |_, len| Ok((false, len));
        if inode.node.is_text() {
            let size = self.text_behind(inode.ino, &inode.node, Some(handle))?.len() as u64;
            return find(size, offset, whence, all_data);
        }
        match &*self.target(inode, handle)? {
            _ if is_release(&inode.node) => find(self.getattr(inode, None)?.size, offset, whence, all_data),
            Target::Map(map) => find(map.len(), offset, whence, all_data),
            Target::Disk(disk) => find(disk.size(), offset, whence, |offset, len| {
                disk.block_status(offset, len).map(|status| (status.zero, status.len))
            }),
            Target::View(view) => find(view.size(), offset, whence, |offset, len| {
                view.block_status(offset, len).map(|status| (status.zero, status.len))
            }),
            Target::LiveVolume(volume) => find(volume.size(), offset, whence, |offset, len| {
                volume.block_status(offset, len).map(|status| (status.zero, status.len))
            }),
            Target::Volume(volume) => find(volume.size(), offset, whence, |offset, len| {
                volume.block_status(offset, len).map(|status| (status.zero, status.len))
            }),
            Target::Changed(changes) => find(changes.view().size(), offset, whence, |offset, len| {
                let (dirty, len) = changes.dirty_run(offset, len);
                Ok((!dirty, len))
            }),
        }
    }

    /// truncate(2): resizes a live disk. A volume keeps its size.
    ///
    /// Without a handle, size 0 is O_TRUNC of an open as well as truncate(2) of a path. It is answered with the size as
    /// it is, which the kernel then believes: a block device ignores O_TRUNC.
    pub fn set_size(&self, inode: &Inode, size: u64, has_handle: bool) -> Result<Attr> {
        match inode.node {
            Node::Live(_) | Node::LiveVolume { .. } if size == 0 && !has_handle => {}
            Node::LiveVolume { disk, volume } => {
                if self.live_volume(disk, volume)?.size() != size {
                    return Err(Error::new(errno::EINVAL, "volume", "its table has its size"));
                }
            }
            Node::Live(uuid) => {
                let disk = self.disk(uuid)?;
                if disk.read_only() {
                    return Err(read_only("disk"));
                }
                self.fleece.resize_disk(disk.name(), size)?;
            }
            ref node if is_release(node) => {
                return Err(Error::new(errno::EINVAL, "release.raw", "takes hole punching alone"));
            }
            _ => return Err(read_only("frozen view")),
        }
        self.getattr(inode, None)
    }

    /// What takes changes: a live file, or `release.raw`.
    fn writable(&self, inode: &Inode, handle: u64) -> Result<Arc<Target>> {
        if inode.node.is_live() || is_release(&inode.node) {
            self.target(inode, handle)
        } else {
            Err(read_only("frozen view"))
        }
    }
}

fn flush(target: &Target) -> Result<()> {
    match target {
        Target::Disk(disk) => disk.flush(),
        Target::LiveVolume(volume) => volume.flush(),
        _ => Ok(()),
    }
}

fn not_a_file() -> Error {
    Error::new(errno::EISDIR, "file", "not a file with content")
}

fn is_release(node: &Node) -> bool {
    matches!(node, Node::View { item: Item::Release, .. })
}

fn read_text(text: &str, offset: u64, buf: &mut [u8]) -> usize {
    let rest = usize::try_from(offset).ok().and_then(|offset| text.as_bytes().get(offset..)).unwrap_or(&[]);
    buf.iter_mut().zip(rest).map(|(to, from)| *to = *from).count()
}

/// What changed as the view has it, zeros where nothing changed.
fn read_changed(changes: &ViewMap, offset: u64, buf: &mut [u8]) -> Result<usize> {
    let view: &Arc<View> = changes.view();
    let count = view.size().saturating_sub(offset).min(buf.len() as u64) as usize;
    let mut rest = buf.get_mut(..count).unwrap_or(&mut []);
    let mut at = offset;
    while !rest.is_empty() {
        let (dirty, len) = changes.dirty_run(at, rest.len() as u64);
        let len = len.clamp(1, rest.len() as u64);
        let (piece, behind) = rest.split_at_mut(len as usize);
        if dirty {
            read_whole(view, at, piece)?;
        } else {
            piece.fill(0);
        }
        at += len;
        rest = behind;
    }
    Ok(count)
}

/// Inside the view a read is never short.
fn read_whole(view: &View, offset: u64, piece: &mut [u8]) -> Result<()> {
    if view.read(piece, offset)? == piece.len() {
        return Ok(());
    }
    Err(Error::new(errno::EIO, "read", "the frozen view ended early").at_offset(offset))
}

/// Walks runs of `(hole, length)` from `offset` to the first of the wanted kind.
fn find(size: u64, offset: u64, whence: Whence, run: impl Fn(u64, u64) -> Result<(bool, u64)>) -> Result<u64> {
    let nothing = || Error::new(errno::ENXIO, "lseek", "nothing behind that offset").at_offset(offset);
    if offset >= size {
        return Err(nothing());
    }
    let mut at = offset;
    while at < size {
        let (hole, len) = run(at, size - at)?;
        if hole == (whence == Whence::Hole) {
            return Ok(at);
        }
        at = at.saturating_add(len.max(1));
    }
    match whence {
        Whence::Hole => Ok(size),
        Whence::Data => Err(nothing()),
    }
}
