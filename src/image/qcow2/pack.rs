//! Clusters stored compressed, as `qemu-img convert -c` stores them: packed one behind the other, aligned to nothing.
//!
//! 1. compress, without a lock; 2. take places, of which several share a host cluster; 3. write the data; 4. sync;
//! 5. L2 entries; 6. what they said before is freed.
//!
//! Invariants, beside those of `write`:
//! - **Data before the entry, always**: bytes that are no whole stream are EIO to who reads them, whatever was there
//!   before. So step 4 is never left out; callers at once share their syncs.
//! - **A host cluster has one reference for each entry that touches it**, by the sectors that the entry names. So what is
//!   freed there frees nobody else's data.
//! - **Nothing is cached from before** for a place that gets new data ([`super::compressed`]).
//!
//! A cluster that has a host cluster already is written to as any other, since data of the guest stay where they are.

use super::Qcow2Image;
use super::compressed::compress;
use super::mapping::RawEntry;
use super::tables::{CompressedAt, HostOffset, L2Entry, SECTOR_BYTES, decode_l2};
use super::write::Writer;
use crate::error::{Error, Result, errno};
use crate::image::Image;
use crate::storage::Storage;
use crate::units::round_down;
use std::borrow::Cow;

/// A cluster on its way.
struct Packed {
    /// Its guest offset.
    guest: u64,
    /// The compressed data.
    bytes: Vec<u8>,
    at: CompressedAt,
}

impl Qcow2Image {
    /// See [`Image::write_compressed`].
    pub(super) fn pack(&self, writer: &Writer, buf: &[u8], offset: u64) -> Result<()> {
        let cluster_size = self.header.cluster_size();
        let refused =
            |errno, why| Err(Error::new(errno, "write compressed", why).at_path(self.path()).at_offset(offset));
        if self.header.version < 3 || self.header.has_data_file() {
            return refused(errno::EOPNOTSUPP, "not in images of version 2 or with an external data file");
        }
        let end = offset + buf.len() as u64;
        // A new image may be longer than the disk by less than a sector.
        let is_end = self.size() - end < SECTOR_BYTES;
        if !offset.is_multiple_of(cluster_size) || !(end.is_multiple_of(cluster_size) || is_end) {
            return refused(errno::EINVAL, "only whole clusters can be stored compressed");
        }
        let mut at = offset;
        while at < end {
            let slice_end = round_down(at, self.mapping.slice_covers()) + self.mapping.slice_covers();
            let stop = end.min(slice_end);
            let piece = buf.get((at - offset) as usize..(stop - offset) as usize).unwrap_or_default();
            self.pack_slice(writer, piece, at)?;
            at = stop;
        }
        Ok(())
    }

    /// Within one slice.
    fn pack_slice(&self, writer: &Writer, buf: &[u8], first: u64) -> Result<()> {
        let cluster_size = self.header.cluster_size();
        let clusters = buf.chunks(cluster_size as usize);
        let count = clusters.len() as u64;
        let streams: Vec<Option<Vec<u8>>> = clusters.clone().map(|data| self.compressed(data)).collect();
        let mut plain: Vec<bool> = streams.iter().map(Option::is_none).collect();
        if streams.iter().any(Option::is_some) {
            let _held = writer.ranges.lock(first..first + count * cluster_size);
            let mut entries: Vec<RawEntry> = Vec::with_capacity(count as usize);
            self.mapping.raw_entries(&self.file, first, count, |_, entry| {
                entries.push(entry);
                Ok(())
            })?;
            let mut packed = Vec::with_capacity(count as usize);
            for (index, bytes) in streams.into_iter().enumerate() {
                let entry = entries.get(index).copied().unwrap_or_default();
                let guest = first + index as u64 * cluster_size;
                let Some(bytes) = bytes else { continue };
                if self.has_host(entry).map_err(|e| e.at_path(self.path()).at_offset(guest))? {
                    plain.get_mut(index).into_iter().for_each(|plain| *plain = true);
                } else {
                    packed.push(Packed { guest, bytes, at: CompressedAt { offset: HostOffset(0), max_bytes: 0 } });
                }
            }
            if !packed.is_empty() {
                self.publish(writer, first, &mut entries, &mut packed)?;
            }
        }
        for (index, data) in clusters.enumerate().filter(|(index, _)| plain.get(*index).is_some_and(|plain| *plain)) {
            self.write(writer, data, first + index as u64 * cluster_size)?;
        }
        Ok(())
    }

    /// The data of a cluster compressed, where that makes them smaller; zeros behind the end of the disk.
    fn compressed(&self, data: &[u8]) -> Option<Vec<u8>> {
        let cluster_bytes = self.header.cluster_size() as usize;
        let mut data = Cow::Borrowed(data);
        if data.len() < cluster_bytes {
            data.to_mut().resize(cluster_bytes, 0);
        }
        compress(self.header.compression, &data)
    }

    /// Whether an entry names a host cluster.
    fn has_host(&self, entry: RawEntry) -> Result<bool> {
        Ok(match decode_l2(entry.0, entry.1, &self.header.geometry())? {
            L2Entry::Unallocated | L2Entry::ZeroPlain | L2Entry::Compressed(_) => false,
            L2Entry::Standard { .. } | L2Entry::ZeroPreallocated { .. } => true,
            L2Entry::Subclusters { offset, .. } => offset.is_some(),
        })
    }

    /// Steps 2 to 6; the range lock is held.
    fn publish(&self, writer: &Writer, first: u64, entries: &mut [RawEntry], packed: &mut [Packed]) -> Result<()> {
        let (geometry, cluster_size) = (self.header.geometry(), self.header.cluster_size());
        self.own_table(writer, first)?;
        let mut placed = 0;
        let mut old = Vec::new();
        let written = self.place(writer, packed, &mut placed).and_then(|()| {
            for piece in packed.iter() {
                let place = entries.get_mut(((piece.guest - first) / cluster_size) as usize);
                let entry = piece.at.encode(&geometry).ok_or_else(|| {
                    let why = "compressed data would lie where no entry can point to";
                    Error::new(errno::EFBIG, "allocate", why).at_path(self.path())
                })?;
                let Some(place) = place else { continue };
                if let L2Entry::Compressed(at) = decode_l2(place.0, place.1, &geometry)? {
                    old.push(at);
                }
                *place = (entry, 0);
            }
            self.put_packed(packed)?;
            self.file.sync()
        });
        if let Err(e) = written {
            let mut session = writer.session.lock();
            packed.iter().take(placed).for_each(|piece| session.take_back_bytes(piece.at));
            return Err(e);
        }
        packed.iter().for_each(|piece| self.decompressor.forget(piece.at));
        let updated = self.mapping.update(&self.file, first, entries.iter().copied());
        updated.inspect_err(|e| writer.session.lock().leak(e))?;
        let mut session = writer.session.lock();
        for at in old {
            if let Err(e) = session.free_compressed(at) {
                session.leak(&e);
            }
        }
        Ok(())
    }

    /// Takes a place for each; `placed` says how many have one.
    fn place(&self, writer: &Writer, packed: &mut [Packed], placed: &mut usize) -> Result<()> {
        let mut session = writer.session.lock();
        for piece in packed {
            let bytes = piece.bytes.len() as u64;
            piece.at = CompressedAt::new(session.allocate_bytes(bytes)?, bytes);
            *placed += 1;
        }
        Ok(())
    }

    /// Writes the data; what lies side by side in one go.
    fn put_packed(&self, packed: &[Packed]) -> Result<()> {
        let mut run: Vec<u8> = Vec::new();
        let mut start = 0;
        for piece in packed {
            if start + run.len() as u64 != piece.at.offset.0 {
                self.put_run(&run, start)?;
                run.clear();
                start = piece.at.offset.0;
            }
            run.extend_from_slice(&piece.bytes);
        }
        self.put_run(&run, start)
    }

    fn put_run(&self, run: &[u8], start: u64) -> Result<()> {
        if run.is_empty() { Ok(()) } else { self.file.write_at(run, start) }
    }
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests {
    use super::super::create::{CreateOptions, create};
    use crate::image::{OpenOptions, open};

    #[test]
    fn a_place_that_gets_new_data_is_read_anew() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vda.qcow2");
        create(&path, &CreateOptions { cluster_bytes: 4096, ..CreateOptions::new(1 << 20) }).unwrap();
        let image = open(&path, &OpenOptions::default()).unwrap();
        let mut bytes = [0; 4096];
        image.write_compressed(&[b'a'; 4096], 0).unwrap();
        image.read_at(&mut bytes, 0).unwrap();
        assert_eq!(bytes, [b'a'; 4096]);
        // Its place is free after the flush, and the next one's.
        image.write_at(&[b'c'; 4096], 0).unwrap();
        image.flush().unwrap();
        image.write_compressed(&[b'b'; 4096], 8192).unwrap();
        image.read_at(&mut bytes, 8192).unwrap();
        assert_eq!(bytes, [b'b'; 4096]);
    }
}
