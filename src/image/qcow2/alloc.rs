//! Handing out clusters.
//!
//! Refcounts change in memory; [`Allocator::write_refcounts`] makes them durable. Its owner serialises all calls, and
//! keeps to one of two orders:
//! - **eager** (version 2): `allocate`, `write_refcounts`, then the L2 entry that publishes the cluster. A stored
//!   refcount is then never too low, whatever a power loss leaves.
//! - **lazy** (version 3): [`set_dirty`] before the first `allocate` of a session, `write_refcounts` and `set_dirty`
//!   back at its end. In between the mapping is the only truth, and a crash is followed by
//!   [`repair`](super::check::repair).
//!
//! Invariants:
//! 1. **A cluster is handed out only while nothing refers to it**: its refcount is 0, it is not part of the refcount
//!    structures, nor of what the owner has [protected](Allocator::protect). Anything else is EIO: the image is
//!    damaged, and writing would make it worse.
//! 2. **A freed cluster is free after a flush**: [`Allocator::free`] only notes it. What was noted when
//!    [`Allocator::begin_flush`] was called is given up at [`Allocator::end_flush`], between which the owner makes the
//!    mapping durable; until then a power loss may bring back an entry that refers to it.
//! 3. **New clusters lie behind the last used one**, as the refcounts tell: the file's length says nothing on a block
//!    device.
//! 4. **A write of refcount blocks may come at any time**, so blocks are dropped from memory when there are many
//!    ([`BLOCKS_KEPT_BYTES`]). New blocks are hooked up, and a grown table is switched to, after a sync of what they
//!    hold; old ones are given up after the switch is durable.

use super::header::incompatible;
use super::refcount::{MAX_TABLE_BYTES, Place, Stored, TABLE_ENTRY_BYTES, to_bytes};
use crate::error::{Error, Result, errno};
use crate::storage::{SharedStorage, Storage};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

/// Refcount blocks in memory, in bytes, from which on they are written and dropped.
const BLOCKS_KEPT_BYTES: u64 = 32 << 20;
/// Bits of a host offset that an L2 entry can hold.
const HOST_OFFSET_BITS: u32 = 56;
/// Where the header keeps `refcount_table_offset`; `refcount_table_clusters` follows.
const TABLE_FIELDS_AT: u64 = 48;
/// Where the header keeps `incompatible_features`.
const INCOMPATIBLE_AT: u64 = 72;

/// Sets or clears the dirty bit of a version 3 image, durably; gives the new features. Everything that was written
/// before is made durable first, so that a clear bit vouches for it.
pub fn set_dirty(storage: &dyn Storage, incompatible_features: u64, dirty: bool) -> Result<u64> {
    let without = incompatible_features & !incompatible::DIRTY;
    let features = if dirty { without | incompatible::DIRTY } else { without };
    storage.sync()?;
    storage.write_at(&features.to_be_bytes(), INCOMPATIBLE_AT)?;
    storage.sync()?;
    Ok(features)
}

#[derive(Debug)]
struct Block {
    bytes: Vec<u8>,
    changed: bool,
}

/// What a flush frees.
#[derive(Debug)]
#[must_use]
pub struct Freed(BTreeMap<u64, u64>);

/// The clusters of an image, and who may have the next ones.
#[derive(Debug)]
pub struct Allocator {
    storage: SharedStorage,
    place: Place,
    /// Offsets of the blocks, those of `new_entries` included.
    table: Vec<u64>,
    /// Entries of `table` that are not written.
    new_entries: BTreeSet<u64>,
    /// The table in the file, where `place` is one that is not switched to yet.
    old_table: Option<Place>,
    /// Blocks in memory, by index.
    blocks: BTreeMap<u64, Block>,
    /// Clusters of blocks that are in `table`.
    block_clusters: BTreeSet<u64>,
    /// One past the last used cluster.
    next: u64,
    /// Free clusters before `next`; of those that were free at the open, the ones of the last block that is in use.
    reusable: BTreeSet<u64>,
    /// Clusters to free with the next flush, and how often each.
    freed: BTreeMap<u64, u64>,
    /// Those of the flushes that are under way.
    settling: BTreeMap<u64, u64>,
    /// Clusters that must not be handed out: first, end and what they hold.
    protected: BTreeMap<u64, (u64, &'static str)>,
    /// Where compressed data go on, in the cluster that holds the last of them; 0: nowhere.
    packing: u64,
    /// See [`Allocator::note_leaks`].
    leaks: bool,
}

impl Allocator {
    /// Reads where an image's clusters end. Its refcounts are right: a dirty image was repaired before. EIO where two
    /// entries of the refcount table share a block, or one is wrong by itself.
    pub fn open(storage: SharedStorage, place: Place) -> Result<Allocator> {
        let stored = Stored::open(&*storage, place)?;
        let mut block_clusters = BTreeSet::new();
        for index in 0..stored.table().len() as u64 {
            let why = match stored.block_offset(index) {
                Ok(0) => continue,
                Ok(offset) if block_clusters.insert(offset >> place.cluster_bits) => continue,
                Ok(offset) => format!("its block at {offset} is another entry's too"),
                Err(fault) => fault.to_string(),
            };
            return Err(damaged(&*storage, format!("refcount table, entry {index}: {why}")));
        }
        let (next, reusable) = end_of_used(&*storage, &stored)?;
        let table = stored.table().to_vec();
        Ok(Allocator {
            storage,
            place,
            table,
            new_entries: BTreeSet::new(),
            old_table: None,
            blocks: BTreeMap::new(),
            block_clusters,
            next,
            reusable,
            freed: BTreeMap::new(),
            settling: BTreeMap::new(),
            protected: BTreeMap::from([(0, (1, "the header"))]),
            packing: 0,
            leaks: false,
        })
    }

    /// Host offsets of the refcount blocks.
    pub fn block_offsets(&self) -> impl Iterator<Item = u64> {
        self.table.iter().copied().filter(|offset| *offset != 0)
    }

    /// How many refcount blocks there are.
    pub fn block_count(&self) -> usize {
        self.block_clusters.len()
    }

    /// One past the last used cluster.
    pub fn end(&self) -> u64 {
        self.next
    }

    /// Where the refcounts lie; it changes when [`Allocator::write_refcounts`] switches to a grown table.
    pub fn place(&self) -> Place {
        self.place
    }

    /// Clusters are counted that nothing may refer to: only a check finds them.
    pub fn note_leaks(&mut self) {
        self.leaks = true;
    }

    /// Whether [`Allocator::note_leaks`] was called.
    pub fn leaks(&self) -> bool {
        self.leaks
    }

    /// Keeps clusters that hold known metadata from being handed out, whatever their refcount says.
    pub fn protect(&mut self, clusters: Range<u64>, what: &'static str) {
        self.protected.insert(clusters.start, (clusters.end, what));
    }

    /// Ends the protection that begins at a cluster.
    pub fn unprotect(&mut self, first: u64) {
        self.protected.remove(&first);
    }

    /// The refcount of a cluster, without what waits to be freed.
    pub fn refcount(&mut self, cluster: u64) -> Result<u64> {
        let slot = cluster % self.place.per_block();
        let width = self.place.width;
        Ok(self.block(cluster)?.map_or(0, |block| width.get(&block.bytes, slot)))
    }

    /// Hands out clusters in a row, at least one and at most `count`, freed ones first; their refcount is one.
    pub fn allocate(&mut self, count: u64) -> Result<Range<u64>> {
        let Some(first) = self.reusable.first().copied() else { return self.allocate_row(count) };
        let mut end = first;
        while end - first < count && self.reusable.contains(&end) {
            end += 1;
        }
        self.hand_out(first..end)?;
        (first..end).for_each(|cluster| {
            self.reusable.remove(&cluster);
        });
        Ok(first..end)
    }

    /// Hands out exactly `count` clusters in a row, behind the last used one; their refcount is one.
    pub fn allocate_row(&mut self, count: u64) -> Result<Range<u64>> {
        if count == 0 {
            return Err(Error::new(errno::EINVAL, "allocate", "no clusters asked for"));
        }
        loop {
            let first = self.next;
            let end = self.end_behind(first, count)?;
            for index in first / self.place.per_block()..=(end - 1) / self.place.per_block() {
                self.ensure_block(index)?;
            }
            // New blocks took the place: look again behind them.
            if self.next == first {
                self.hand_out(first..end)?;
                self.next = end;
                return Ok(first..end);
            }
        }
    }

    /// A place for `bytes` of compressed data, more than none and fewer than a cluster has: behind what was packed last,
    /// which may go on in the cluster `new`, handed out for this, else at the start of that. Each cluster that they touch has one more
    /// reference; `new` keeps the one that it has. None where there is no place without a new cluster.
    ///
    /// A cluster that nothing refers to any more is nobody's place to go on: `give_up` sees to that.
    pub fn pack(&mut self, bytes: u64, new: Option<u64>) -> Result<Option<u64>> {
        let bits = self.place.cluster_bits;
        let (at, here) = (self.packing, self.packing >> bits);
        let room = at.next_multiple_of(self.place.cluster_bytes()) - at;
        let joins = room > 0 && self.refcount(here)? < self.place.width.max();
        let start = match new {
            None if joins && bytes <= room => at,
            None => return Ok(None),
            Some(new) if joins && new == here + 1 => at,
            Some(new) => new << bits,
        };
        if joins && start == at {
            self.share(here)?;
        }
        self.packing = start + bytes;
        Ok(Some(start))
    }

    /// Counts one more reference to a cluster that is in use.
    pub fn share(&mut self, cluster: u64) -> Result<()> {
        match self.refcount(cluster)? {
            0 => Err(damaged(&*self.storage, format!("cluster {cluster} is shared, but its refcount is 0"))),
            count if count == self.place.width.max() => {
                Err(Error::new(errno::EFBIG, "share", format!("the refcount of cluster {cluster} is at its largest")))
            }
            count => self.set(cluster, count + 1),
        }
    }

    /// Notes that a reference to a cluster is gone from the mapping in memory. It counts until the next flush.
    pub fn free(&mut self, cluster: u64) -> Result<()> {
        let waiting = |map: &BTreeMap<u64, u64>| map.get(&cluster).copied().unwrap_or(0);
        if waiting(&self.freed) + waiting(&self.settling) >= self.refcount(cluster)? {
            return Err(damaged(&*self.storage, format!("cluster {cluster} is freed more often than it is used")));
        }
        *self.freed.entry(cluster).or_default() += 1;
        Ok(())
    }

    /// Gives back what was handed out and never published: nothing refers to it.
    pub fn take_back(&mut self, clusters: Range<u64>) -> Result<()> {
        clusters.into_iter().try_for_each(|cluster| self.give_up(cluster, 1))
    }

    /// Begins a flush: what was freed up to here is gone from the mapping as written to the file, and the owner now
    /// makes that durable. There may be several at once.
    pub fn begin_flush(&mut self) -> Freed {
        let freed = std::mem::take(&mut self.freed);
        for (cluster, count) in &freed {
            *self.settling.entry(*cluster).or_default() += count;
        }
        Freed(freed)
    }

    /// Ends a flush: the mapping is durable, what was freed before [`Allocator::begin_flush`] may be used again.
    pub fn end_flush(&mut self, freed: Freed) -> Result<()> {
        for (cluster, count) in freed.0 {
            self.settled(cluster, count);
            self.give_up(cluster, count)?;
        }
        Ok(())
    }

    /// A flush failed: what it would have freed waits for the next one.
    pub fn fail_flush(&mut self, freed: Freed) {
        for (cluster, count) in freed.0 {
            self.settled(cluster, count);
            *self.freed.entry(cluster).or_default() += count;
        }
    }

    fn settled(&mut self, cluster: u64, count: u64) {
        if let Some(left) = self.settling.get_mut(&cluster) {
            *left = left.saturating_sub(count);
            if *left == 0 {
                self.settling.remove(&cluster);
            }
        }
    }

    /// Makes all refcounts durable. Invariant 4.
    pub fn write_refcounts(&mut self) -> Result<()> {
        self.write_blocks()?;
        self.storage.sync()?;
        if let Some(old) = self.old_table {
            self.storage.write_at(&to_bytes(&self.table), self.place.table_offset)?;
            self.storage.sync()?;
            let mut fields = self.place.table_offset.to_be_bytes().to_vec();
            fields.extend_from_slice(&(self.place.table_clusters as u32).to_be_bytes());
            self.storage.write_at(&fields, TABLE_FIELDS_AT)?;
            self.storage.sync()?;
            self.old_table = None;
            self.new_entries.clear();
            let first = old.table_offset >> old.cluster_bits;
            for cluster in first..first + old.table_clusters {
                self.give_up(cluster, 1)?;
            }
            self.write_blocks()?;
            return self.storage.sync();
        }
        if self.new_entries.is_empty() {
            return Ok(());
        }
        for index in &self.new_entries {
            let entry = self.table.get(*index as usize).copied().unwrap_or(0);
            self.storage.write_at(&entry.to_be_bytes(), self.place.table_offset + index * TABLE_ENTRY_BYTES)?;
        }
        self.storage.sync()?;
        self.new_entries.clear();
        Ok(())
    }

    fn write_blocks(&mut self) -> Result<()> {
        for (index, block) in self.blocks.iter_mut().filter(|(_, block)| block.changed) {
            let offset = self.table.get(*index as usize).copied().unwrap_or(0);
            self.storage.write_at(&block.bytes, offset)?;
            block.changed = false;
        }
        Ok(())
    }

    fn end_behind(&self, first: u64, count: u64) -> Result<u64> {
        let limit = 1 << (HOST_OFFSET_BITS - self.place.cluster_bits);
        first.checked_add(count).filter(|end| *end <= limit).ok_or_else(|| {
            Error::new(errno::EFBIG, "allocate", "the image is as large as the format allows")
                .at_path(self.storage.path())
        })
    }

    /// Invariant 1: refuses a cluster that anything refers to.
    fn check_unused(&mut self, cluster: u64) -> Result<()> {
        let table_first = |place: &Place| place.table_offset >> place.cluster_bits;
        let in_table =
            |place: &Place| (table_first(place)..table_first(place) + place.table_clusters).contains(&cluster);
        let protected = self.protected.range(..=cluster).next_back().filter(|(_, (end, _))| cluster < *end);
        let holder = if in_table(&self.place) || self.old_table.as_ref().is_some_and(in_table) {
            Some("the refcount table".to_owned())
        } else if self.block_clusters.contains(&cluster) {
            Some("a refcount block".to_owned())
        } else if let Some((_, (_, what))) = protected {
            Some((*what).to_owned())
        } else {
            match self.refcount(cluster)? {
                0 => None,
                count => Some(format!("something that refers to it {count} times")),
            }
        };
        match holder {
            None => Ok(()),
            Some(holder) => {
                Err(damaged(&*self.storage, format!("cluster {cluster} should be free, but holds {holder}")))
            }
        }
    }

    fn hand_out(&mut self, clusters: Range<u64>) -> Result<()> {
        for cluster in clusters.clone() {
            self.check_unused(cluster)?;
        }
        clusters.into_iter().try_for_each(|cluster| self.set(cluster, 1))
    }

    fn give_up(&mut self, cluster: u64, count: u64) -> Result<()> {
        let left = self.refcount(cluster)?.saturating_sub(count);
        self.set(cluster, left)?;
        if left == 0 {
            self.reusable.insert(cluster);
            // Whoever gets it next fills it from its start.
            if self.packing >> self.place.cluster_bits == cluster {
                self.packing = 0;
            }
        }
        Ok(())
    }

    /// Sets the refcount of a cluster whose block exists.
    fn set(&mut self, cluster: u64, count: u64) -> Result<()> {
        let slot = cluster % self.place.per_block();
        let width = self.place.width;
        match self.block(cluster)? {
            Some(block) => {
                width.set(&mut block.bytes, slot, count);
                block.changed = true;
                Ok(())
            }
            None => Err(damaged(&*self.storage, format!("cluster {cluster} has no refcount"))),
        }
    }

    fn entry(&self, index: u64) -> u64 {
        usize::try_from(index).ok().and_then(|index| self.table.get(index)).copied().unwrap_or(0)
    }

    /// The block that describes a cluster, `None` where there is none.
    fn block(&mut self, cluster: u64) -> Result<Option<&mut Block>> {
        let index = cluster / self.place.per_block();
        let offset = self.entry(index);
        if offset == 0 {
            return Ok(None);
        }
        if !self.blocks.contains_key(&index) {
            self.make_room()?;
            let mut bytes = vec![0; self.place.cluster_bytes() as usize];
            self.storage.read_at(&mut bytes, offset)?;
            self.blocks.insert(index, Block { bytes, changed: false });
        }
        Ok(self.blocks.get_mut(&index))
    }

    fn make_room(&mut self) -> Result<()> {
        if self.blocks.len() as u64 * self.place.cluster_bytes() >= BLOCKS_KEPT_BYTES {
            self.write_blocks()?;
            self.blocks.clear();
        }
        Ok(())
    }

    /// Makes the block `index`, where it is absent, at the end of the clusters in use.
    fn ensure_block(&mut self, index: u64) -> Result<()> {
        while self.entry(index) == 0 {
            let at = self.next;
            let describes = at / self.place.per_block();
            if index.max(describes) >= self.table.len() as u64 {
                self.grow_table(index)?;
            } else if describes != index && self.entry(describes) == 0 {
                // That one will lie at `at` and describe itself.
                self.ensure_block(describes)?;
            } else {
                self.make_room()?;
                let end = self.end_behind(at, 1)?;
                self.check_unused(at)?;
                if let Some(entry) = self.table.get_mut(index as usize) {
                    *entry = at << self.place.cluster_bits;
                }
                let bytes = vec![0; self.place.cluster_bytes() as usize];
                self.blocks.insert(index, Block { bytes, changed: true });
                self.new_entries.insert(index);
                self.block_clusters.insert(at);
                self.next = end;
                self.set(at, 1)?;
            }
        }
        Ok(())
    }

    /// Moves the table, in memory, to the end of the clusters in use, with room for `index` and for its own growth.
    fn grow_table(&mut self, index: u64) -> Result<()> {
        let first = self.next;
        let per_table_cluster = self.place.cluster_bytes() / TABLE_ENTRY_BYTES;
        let mut clusters = (self.table.len() as u64 * 3 / 2).max(index + 1).div_ceil(per_table_cluster);
        // The table, and as many blocks again as could be needed to describe it, have to find their entries in it.
        while (first + 2 * clusters + 2) / self.place.per_block() >= clusters * per_table_cluster {
            clusters += 1;
        }
        if clusters * self.place.cluster_bytes() > MAX_TABLE_BYTES {
            let most = MAX_TABLE_BYTES / self.place.cluster_bytes();
            if most * per_table_cluster <= index || self.place.table_clusters >= most {
                let why = "the image needs more than the largest refcount table (8 MiB)";
                return Err(Error::new(errno::EFBIG, "allocate", why)
                    .at_path(self.storage.path())
                    .hint("larger clusters reach further: copy it with qemu-img convert -o cluster_size=2M"));
            }
            clusters = most;
        }
        let end = self.end_behind(first, clusters)?;
        for cluster in first..end {
            self.check_unused(cluster)?;
        }
        // A table that was never switched to is nobody's any more.
        let abandoned = self.old_table.map(|_| self.place);
        self.old_table.get_or_insert(self.place);
        self.place.table_offset = first << self.place.cluster_bits;
        self.place.table_clusters = clusters;
        self.table.resize((clusters * per_table_cluster) as usize, 0);
        self.next = end;
        for block in first / self.place.per_block()..=(end - 1) / self.place.per_block() {
            self.ensure_block(block)?;
        }
        for cluster in first..end {
            self.set(cluster, 1)?;
        }
        if let Some(abandoned) = abandoned {
            let first = abandoned.table_offset >> abandoned.cluster_bits;
            (first..first + abandoned.table_clusters).try_for_each(|cluster| self.give_up(cluster, 1))?;
        }
        Ok(())
    }
}

/// One past the last cluster with a refcount, and the free clusters before it that the same block describes. Blocks in
/// holes are not read: a file may be far longer than what is in it.
fn end_of_used(storage: &dyn Storage, stored: &Stored<'_>) -> Result<(u64, BTreeSet<u64>)> {
    let place = stored.place();
    let per_byte = (8 / place.width.bits()).max(1) as usize;
    let mut bytes = vec![0; place.cluster_bytes() as usize];
    for (block, offset) in stored.table().iter().enumerate().rev().filter(|(_, offset)| **offset != 0) {
        let status = storage.block_status(*offset, place.cluster_bytes())?;
        if status.zero && status.len >= place.cluster_bytes() {
            continue;
        }
        storage.read_at(&mut bytes, *offset)?;
        let Some(last) = bytes.iter().rposition(|byte| *byte != 0) else { continue };
        let slot = last * 8 / place.width.bits() as usize;
        let slots = slot..slot + per_byte;
        let used = slots.rev().find(|slot| place.width.get(&bytes, *slot as u64) > 0).unwrap_or(slot) as u64;
        let first = block as u64 * place.per_block();
        let free = (0..used).filter(|slot| place.width.get(&bytes, *slot) == 0).map(|slot| first + slot);
        return Ok((first + used + 1, free.collect()));
    }
    Ok((0, BTreeSet::new()))
}

fn damaged(storage: &dyn Storage, why: String) -> Error {
    Error::new(errno::EIO, "qcow2 refcounts", why)
        .at_path(storage.path())
        .hint("end all use of the image, then run: fleecefs check --repair IMAGE")
}

#[cfg(test)]
#[path = "alloc_tests.rs"]
mod tests;
