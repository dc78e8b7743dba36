//! One volume of a live disk or of a frozen view, read and written at its own offsets.
//!
//! A write to a live volume is a write of the guest's like any other: preserved, marked, at the disk's own offsets. What a
//! volume depends on is watched: a read looks at the watch before and, after a full fence, once more; a change is made in
//! a hold of it (see `watch`). Frozen volumes never change.

use super::watch::{Permit, Watch, stale};
use super::{Disk, View};
use crate::error::{Error, Result, errno};
use crate::storage::BlockStatus;
use crate::sync::full_fence;
use crate::volume::Volume;
use sha2::{Digest, Sha256};
use std::sync::Arc;
use uuid::Uuid;

/// A volume of a live disk.
#[derive(Debug)]
pub struct LiveVolume {
    volume: Volume,
    /// By the index that its places name; those that it does not lie on are left out, so that they can go.
    disks: Vec<Option<Arc<Disk>>>,
    watch: Arc<Watch>,
    id: Uuid,
}

/// A volume of a frozen view.
#[derive(Debug)]
pub struct FrozenVolume {
    volume: Volume,
    views: Arc<[Arc<View>]>,
    id: Uuid,
}

/// A number for a volume that each process computes again from the same name and place.
fn id_of(volume: &Volume, disk: impl Fn(usize) -> Uuid) -> Uuid {
    let mut hash = Sha256::new();
    hash.update((volume.name.len() as u64).to_le_bytes());
    hash.update(&volume.name);
    hash.update(volume.size.to_le_bytes());
    for segment in &volume.segments {
        for number in [segment.start, segment.length, segment.stripe, segment.places.len() as u64] {
            hash.update(number.to_le_bytes());
        }
        for place in &segment.places {
            hash.update(disk(place.disk).as_bytes());
            hash.update(place.offset.to_le_bytes());
        }
    }
    let mut first = [0; 16];
    first.iter_mut().zip(hash.finalize()).for_each(|(to, from)| *to = from);
    Uuid::from_bytes(first)
}

/// A part of a request: where it lies in the caller's range, and where on which disk.
struct Piece {
    at: usize,
    disk: usize,
    offset: u64,
    len: usize,
}

fn pieces(volume: &Volume, offset: u64, len: u64) -> impl Iterator<Item = Piece> + '_ {
    let mut at = 0;
    volume.locate(offset, len).map(move |(disk, offset, len)| {
        let piece = Piece { at, disk, offset, len: len as usize };
        at += piece.len;
        piece
    })
}

/// Fills `buf` piece by piece, as far as the volume goes.
fn read_pieces(
    volume: &Volume,
    buf: &mut [u8],
    offset: u64,
    read: impl Fn(usize, &mut [u8], u64) -> Result<usize>,
) -> Result<usize> {
    let len = volume.size.saturating_sub(offset).min(buf.len() as u64) as usize;
    let mut done = 0;
    for piece in pieces(volume, offset, len as u64) {
        let part = buf.get_mut(piece.at..piece.at + piece.len).unwrap_or(&mut []);
        if part.len() != piece.len || read(piece.disk, part, piece.offset)? != piece.len {
            return Err(short(volume, piece.offset));
        }
        done += piece.len;
    }
    if done == len { Ok(len) } else { Err(short(volume, offset)) }
}

fn short(volume: &Volume, offset: u64) -> Error {
    Error::new(errno::EIO, format!("volume '{}'", volume.name), "its disk ends before it does").at_offset(offset)
}

impl LiveVolume {
    pub(super) fn new(volume: Volume, disks: &[Arc<Disk>], watch: Arc<Watch>) -> LiveVolume {
        let id = id_of(&volume, |index| disks.get(index).map_or(Uuid::nil(), |disk| disk.uuid()));
        let mut used = vec![None; disks.len()];
        for place in volume.segments.iter().flat_map(|segment| &segment.places) {
            if let Some(used @ None) = used.get_mut(place.disk) {
                *used = disks.get(place.disk).cloned();
            }
        }
        let disks = used;
        LiveVolume { volume, disks, watch, id }
    }

    /// What it is.
    pub fn volume(&self) -> &Volume {
        &self.volume
    }

    /// The same for the same name and place, in every process.
    pub fn id(&self) -> Uuid {
        self.id
    }

    /// The disk that it is listed under.
    pub fn home(&self) -> Option<&Arc<Disk>> {
        self.disks.get(self.volume.home())?.as_ref()
    }

    /// The disks that it lies on.
    pub fn disks(&self) -> impl Iterator<Item = &Arc<Disk>> {
        self.disks.iter().flatten()
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.volume.size
    }

    /// Whether one of its disks refuses writes.
    pub fn read_only(&self) -> bool {
        self.disks().any(|disk| disk.read_only())
    }

    /// Last change of its disks, in nanoseconds since the epoch.
    pub fn mtime_ns(&self) -> i64 {
        self.disks().map(|disk| disk.mtime_ns()).max().unwrap_or(0)
    }

    fn disk(&self, index: usize) -> Result<&Arc<Disk>> {
        self.disks.get(index).and_then(Option::as_ref).ok_or_else(|| short(&self.volume, 0))
    }

    /// ESTALE where the table that it came from was written to since.
    pub fn check(&self) -> Result<()> {
        if self.watch.has_changed() {
            return Err(self.is_stale(stale()));
        }
        Ok(())
    }

    /// Says it in the log, once for all volumes that became stale together.
    fn is_stale(&self, e: Error) -> Error {
        if e.errno() == errno::ESTALE && self.watch.to_be_logged() {
            let disk = self.home().map_or("", |disk| disk.name());
            log::warn!(
                "disk '{disk}': the table that volume '{}' came from was changed; I/O on it fails until it is opened again",
                self.volume.name
            );
        }
        e
    }

    fn permit(&self) -> Permit {
        Permit::while_unchanged(&self.watch)
    }

    /// Reads what the guest sees, at most up to the end of the volume; returns the count.
    pub fn read(&self, buf: &mut [u8], offset: u64) -> Result<usize> {
        self.check()?;
        let count = read_pieces(&self.volume, buf, offset, |disk, part, offset| self.disk(disk)?.read(part, offset));
        full_fence();
        self.check()?;
        count
    }

    /// Whether a run of it is known to read as zeros, for at most `len` bytes.
    pub fn block_status(&self, offset: u64, len: u64) -> Result<BlockStatus> {
        self.check()?;
        let len = len.min(self.size().saturating_sub(offset));
        let Some(piece) = pieces(&self.volume, offset, len).next() else {
            return Ok(BlockStatus { len: 0, zero: true });
        };
        let status = self.disk(piece.disk)?.block_status(piece.offset, piece.len as u64);
        full_fence();
        self.check()?;
        status.map(|status| BlockStatus { len: status.len.min(piece.len as u64), ..status })
    }

    /// Writes up to the end of the volume and tells `done` the count, here or from another thread. ENOSPC where `offset`
    /// is at or past the end, ESTALE where the table was changed. Of a write over several places of its disks an error
    /// after the first is a short count.
    pub fn write_then(self: &Arc<Self>, data: &[u8], offset: u64, done: impl FnOnce(Result<usize>) + Send + 'static) {
        let len = self.size().saturating_sub(offset).min(data.len() as u64) as usize;
        let Some(data) = data.get(..len).filter(|_| len > 0 || data.is_empty()) else {
            return done(Err(self.past_the_end(offset)));
        };
        let mut all = pieces(&self.volume, offset, len as u64);
        let (first, second) = (all.next(), all.next());
        if let (Some(only), None) = (&first, &second)
            && let Ok(disk) = self.disk(only.disk)
        {
            let volume = self.clone();
            let told = move |count: Result<usize>| done(count.map_err(|e| volume.is_stale(e)));
            return disk.write_then_under(&self.permit(), data, only.offset, told);
        }
        done(self.write_pieces(data, first.into_iter().chain(second).chain(all)));
    }

    fn write_pieces(&self, data: &[u8], pieces: impl Iterator<Item = Piece>) -> Result<usize> {
        let permit = self.permit();
        let mut done = 0;
        for piece in pieces {
            let part = data.get(piece.at..piece.at + piece.len).unwrap_or(&[]);
            let written = self.disk(piece.disk).and_then(|disk| disk.write_under(&permit, part, piece.offset));
            match written {
                Ok(count) if count == piece.len => done += count,
                Ok(count) => return Ok(done + count),
                Err(_) if done > 0 => break,
                Err(e) => return Err(self.is_stale(e)),
            }
        }
        Ok(done)
    }

    /// Makes a range read as zeros and keeps it allocated. ENOSPC where it passes the end.
    pub fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        self.for_each(offset, len, |disk, permit, offset, len| disk.write_zeroes_under(permit, offset, len))
    }

    /// Gives a range back to the host; it reads as zeros. ENOSPC where it passes the end.
    pub fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.for_each(offset, len, |disk, permit, offset, len| disk.discard_under(permit, offset, len))
    }

    fn for_each(&self, offset: u64, len: u64, change: impl Fn(&Disk, &Permit, u64, u64) -> Result<()>) -> Result<()> {
        if offset.checked_add(len).is_none_or(|end| end > self.size()) {
            return Err(self.past_the_end(offset));
        }
        let permit = self.permit();
        self.volume.locate(offset, len).try_for_each(|(disk, offset, len)| {
            change(self.disk(disk)?, &permit, offset, len).map_err(|e| self.is_stale(e))
        })
    }

    /// Makes all completed changes of its disks durable.
    pub fn flush(&self) -> Result<()> {
        self.check()?;
        self.disks().try_for_each(|disk| disk.flush())
    }

    fn past_the_end(&self, offset: u64) -> Error {
        let why = format!("past its end at {} bytes", self.size());
        Error::new(errno::ENOSPC, format!("volume '{}'", self.volume.name), why).at_offset(offset)
    }
}

impl FrozenVolume {
    pub(super) fn new(volume: Volume, views: Arc<[Arc<View>]>) -> FrozenVolume {
        let id = id_of(&volume, |index| views.get(index).map_or(Uuid::nil(), |view| view.disk_uuid()));
        FrozenVolume { volume, views, id }
    }

    /// What it is.
    pub fn volume(&self) -> &Volume {
        &self.volume
    }

    /// The same for the same name and place, in every process.
    pub fn id(&self) -> Uuid {
        self.id
    }

    /// The views that its segments count in: one a disk of the snapshot, in name order.
    pub fn views(&self) -> &[Arc<View>] {
        &self.views
    }

    /// The view that it is listed under.
    pub fn home(&self) -> Option<&Arc<View>> {
        self.views.get(self.volume.home())
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.volume.size
    }

    fn view(&self, index: usize) -> Result<&Arc<View>> {
        self.views.get(index).ok_or_else(|| short(&self.volume, 0))
    }

    /// Reads at most up to the end of the volume; returns the count.
    pub fn read(&self, buf: &mut [u8], offset: u64) -> Result<usize> {
        read_pieces(&self.volume, buf, offset, |disk, part, offset| self.view(disk)?.read(part, offset))
    }

    /// Whether a run of it is known to read as zeros, for at most `len` bytes.
    pub fn block_status(&self, offset: u64, len: u64) -> Result<BlockStatus> {
        let len = len.min(self.size().saturating_sub(offset));
        let Some(piece) = pieces(&self.volume, offset, len).next() else {
            return Ok(BlockStatus { len: 0, zero: true });
        };
        let status = self.view(piece.disk)?.block_status(piece.offset, piece.len as u64)?;
        Ok(BlockStatus { len: status.len.min(piece.len as u64), ..status })
    }
}
