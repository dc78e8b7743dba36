//! Growing and shrinking the disk.
//!
//! The size in the header is the last thing that grows and the first that shrinks: at any time everything that the
//! mapping shows inside the size is right. What a table says of clusters behind the end is never believed: it is zeroed
//! before the disk grows over it. The L1 table moves when it is too small, and never shrinks.

use super::Qcow2Image;
use super::header::L1_MAX_BYTES;
use super::refcount::to_bytes;
use super::tables::{HostOffset, L1Entry, L2Entry, decode_l2};
use super::write::Writer;
use crate::error::{Error, Result, errno};
use crate::image::Image;
use crate::storage::Storage;
use crate::units::{MAX_DISK_BYTES, round_up};
use std::ops::Range;
use std::sync::atomic::Ordering;

/// Where the header keeps `size`.
const SIZE_AT: u64 = 24;
/// Where the header keeps `l1_size`; `l1_table_offset` follows.
const L1_FIELDS_AT: u64 = 36;

impl Qcow2Image {
    pub(super) fn resize_to(&self, writer: &Writer, size: u64) -> Result<()> {
        let _one = writer.resizing.lock();
        if size > MAX_DISK_BYTES {
            let why = format!("{size} bytes are more than the largest disk (1 EiB)");
            return Err(Error::new(errno::EFBIG, "resize", why).at_path(self.path()));
        }
        if self.header.version < 3 && !self.snapshots.is_empty() {
            let why = "an image of version 2 with internal snapshots has one size for all of them";
            return Err(Error::new(errno::EOPNOTSUPP, "resize", why)
                .at_path(self.path())
                .hint("make it version 3: qemu-img amend -o compat=1.1 IMAGE"));
        }
        let old = self.size();
        match size.cmp(&old) {
            std::cmp::Ordering::Less => self.shrink(writer, size),
            std::cmp::Ordering::Equal => Ok(()),
            std::cmp::Ordering::Greater => self.grow(writer, old, size),
        }
    }

    fn grow(&self, writer: &Writer, old: u64, size: u64) -> Result<()> {
        self.grow_l1(writer, size)?;
        if let Some(data) = &self.data {
            let there = data.bytes().clamp(old, size);
            if self.header.has_raw_data_file() && there > old {
                // The file shows the disk by itself, also where no entry does.
                data.punch_hole(old, there - old)?;
            }
            if data.bytes() < size {
                data.grow(size)?;
            }
        }
        let mut at = old;
        while at < size {
            let run = self.status(at, size - at)?;
            if !run.zero {
                self.zero(writer, at..at + run.len, true)?;
            }
            at += run.len;
        }
        self.flush()?;
        self.set_size(size)
    }

    /// The size in the header, then the one that readers go by.
    fn set_size(&self, size: u64) -> Result<()> {
        let (now, written) = self.file.put(SIZE_AT, size.to_be_bytes());
        if let Some(now) = now {
            self.size.store(u64::from_be_bytes(now), Ordering::Release);
        }
        written?;
        self.file.sync()
    }

    fn grow_l1(&self, writer: &Writer, size: u64) -> Result<()> {
        let cluster_size = self.header.cluster_size();
        let entries = self.header.geometry().l1_entries_for(size);
        let mut session = writer.session.lock();
        let (old, mut words) = self.mapping.l1();
        let old_bytes = words.len() as u64 * 8;
        if entries * 8 <= old_bytes {
            return Ok(());
        }
        if entries * 8 > L1_MAX_BYTES {
            let why = format!("{size} bytes need an L1 table of {entries} entries, more than 32 MiB");
            return Err(Error::new(errno::EFBIG, "resize", why)
                .at_path(self.path())
                .hint("larger clusters reach further: copy it with qemu-img convert -o cluster_size=2M"));
        }
        words.resize(entries as usize, 0);
        let bytes = round_up(entries * 8, cluster_size);
        let row = session.allocate_row(bytes / cluster_size)?;
        let new = row.offset;
        let mut table = to_bytes(&words);
        table.resize(bytes as usize, 0);
        if let Err(e) = self.file.write_at(&table, new.0).and_then(|()| self.file.sync()) {
            session.take_back(&row);
            return Err(e);
        }
        let mut fields = [0; 12];
        fields[..4].copy_from_slice(&(entries as u32).to_be_bytes());
        fields[4..].copy_from_slice(&new.0.to_be_bytes());
        let (now, linked) = self.file.put(L1_FIELDS_AT, fields);
        if now != Some(fields) {
            return linked.inspect_err(|e| session.leak(e));
        }
        let linked = linked.and_then(|()| self.file.sync());
        self.mapping.move_l1(new, words);
        self.file.forget(old);
        let clusters = |start: HostOffset, bytes: u64| {
            start.0 / cluster_size..start.0 / cluster_size + bytes.div_ceil(cluster_size)
        };
        self.file.reserve("the L1 table", new, bytes, cluster_size)?;
        if old_bytes > 0 {
            session.alloc.unprotect(old.0 / cluster_size);
            for cluster in clusters(old, old_bytes) {
                session.free(HostOffset(cluster * cluster_size))?;
            }
        }
        session.alloc.protect(clusters(new, bytes), "the L1 table");
        linked
    }

    fn shrink(&self, writer: &Writer, size: u64) -> Result<()> {
        writer.session.lock().begin()?;
        self.set_size(size)?;
        // The disk has its new size: what fails from here on costs space alone.
        if let Err(e) = self.cut(writer, size) {
            writer.session.lock().leak(&e);
        }
        Ok(())
    }

    /// Frees what lies behind the end of the disk.
    fn cut(&self, writer: &Writer, size: u64) -> Result<()> {
        let covers = self.header.geometry().l2_covers();
        let (_, tables) = self.mapping.l1();
        for index in size / covers..tables.len() as u64 {
            let table = index * covers..(index + 1) * covers;
            let L1Entry::Table { offset: place, .. } = self.mapping.table(table.start)? else { continue };
            let from = round_up(size, self.header.cluster_size()).max(table.start);
            if from >= table.end {
                continue;
            }
            if from > table.start {
                self.own_table(writer, table.start)?;
            }
            let gone = self.cut_entries(from..table.end, from > table.start)?;
            let mut session = writer.session.lock();
            if from == table.start {
                self.mapping.set_table(&self.file, table.start, 0)?;
                self.mapping.forget_table(place);
                self.file.forget_table(place.0);
                session.free(place)?;
            }
            for entry in gone {
                match entry {
                    L2Entry::Compressed(at) => session.free_compressed(at)?,
                    L2Entry::Standard { offset, .. }
                    | L2Entry::ZeroPreallocated { offset, .. }
                    | L2Entry::Subclusters { offset: Some(offset), .. }
                        if !self.header.has_data_file() =>
                    {
                        session.free(offset)?;
                    }
                    _ => (),
                }
            }
        }
        match &self.data {
            Some(data) if self.header.has_raw_data_file() => data.set_len(size),
            _ => Ok(()),
        }
    }

    /// What the entries of a part of a table were; they are cleared where the table stays.
    fn cut_entries(&self, part: Range<u64>, clear: bool) -> Result<Vec<L2Entry>> {
        let (cluster_size, slice) = (self.header.cluster_size(), self.mapping.slice_covers());
        let mut gone = Vec::new();
        let mut at = part.start;
        while at < part.end {
            let stop = part.end.min(at / slice * slice + slice);
            let count = (stop - at) / cluster_size;
            self.mapping.raw_entries(&self.file, at, count, |_, (raw, bitmap)| {
                gone.push(decode_l2(raw, bitmap, &self.header.geometry())?);
                Ok(())
            })?;
            if clear {
                self.mapping.update(&self.file, at, std::iter::repeat_n((0, 0), count as usize))?;
            }
            at = stop;
        }
        Ok(gone)
    }
}
