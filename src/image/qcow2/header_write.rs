//! The header, written as a whole.
//!
//! [`update`] reads the header anew, lets the caller change it, and puts the result in its place. Unknown fields,
//! unknown extensions and the backing file's name are kept. Nothing is touched where the new header does not fit in the
//! first cluster, or would be one that this program refuses.
//!
//! **A power loss leaves the old header or the new one**, although a header with its extensions takes several sectors,
//! of which any may survive. Where one sector is all that changes, it is written. Else:
//! 1. the new extensions and the backing file's name are written behind everything that the old and the new header
//!    use; sync;
//! 2. sector 0 is written, with the new fields, and with an extension of no meaning ([`FILLER`]) that spans all up to
//!    what was written in step 1; sync. From here on the new header counts;
//! 3. what lies in the filler, but for sector 0, gets its final content; sync;
//! 4. sector 0 gets its final content, without the filler; sync. The copy of step 1 is nobody's, and is cleared.
//!
//! So each step changes sectors that nothing refers to, or sector 0 alone. After a power loss the filler may stay: it is
//! an extension unknown to other programs, and the next update drops it.
//!
//! The caller serialises all changes of the header. Fields are taken from the file, so that what others changed there
//! (refcount table, dirty bit) stays.

use super::extensions::FILLER;
use super::header::{BackingName, Header, MAGIC};
use super::read_header;
use super::tables::HostOffset;
use crate::error::{Error, Result, errno};
use crate::storage::Storage;

/// What a medium writes whole or not at all.
const SECTOR_BYTES: usize = 512;
/// Type and length of an extension; both zero at the end of them.
const EXTENSION_HEADER_BYTES: usize = 8;

/// A header with its place in the first cluster.
struct Layout {
    header: Header,
    /// The first cluster, zeros behind `end`.
    bytes: Vec<u8>,
    /// One past the last byte that means something.
    end: usize,
}

/// A change that can be made.
struct Plan {
    compact: Layout,
    /// Sectors in which `compact` differs from what the file has.
    changed: Vec<usize>,
    /// The copy of steps 1 and 2, and where its extensions begin; where more than one sector changes.
    moved: Option<(Layout, usize)>,
}

/// Changes the header, durably; gives the one that stands there now. ENOSPC, and nothing touched, where it does not
/// fit. After any other error the old or the new one stands there.
pub fn update(storage: &dyn Storage, change: impl FnOnce(&mut Header)) -> Result<Header> {
    let plan = Plan::new(storage, change)?;
    plan.write(storage)?;
    Ok(plan.compact.header)
}

/// The first cluster of a new image that has this header; gives the header with the backing file's name where it is then.
pub fn first_cluster(header: &Header) -> Result<(Header, Vec<u8>)> {
    let Layout { header, bytes, .. } = Layout::new(header, header.header_length as usize)?;
    Ok((header, bytes))
}

/// Whether [`update`] could make the change.
pub fn check(storage: &dyn Storage, change: impl FnOnce(&mut Header)) -> Result<()> {
    Plan::new(storage, change).map(|_| ())
}

impl Plan {
    fn new(storage: &dyn Storage, change: impl FnOnce(&mut Header)) -> Result<Plan> {
        let old = read_header(storage)?;
        let mut bytes = vec![0; old.cluster_size() as usize];
        storage.read_at(&mut bytes, 0)?;
        let mut new = old.clone();
        change(&mut new);
        if let (Some(_), Some(backing)) = (old.extensions.find(FILLER), &mut new.backing) {
            // It was moved out of the way, and may come back.
            backing.offset = HostOffset(0);
        }
        new.extensions.remove(FILLER);
        let at = |e: Error| e.at_path(storage.path());
        let start = new.header_length as usize;
        let compact = Layout::new(&new, start).map_err(at)?;
        let again = Header::parse(&compact.bytes, storage.len()?).map_err(at)?;
        if again != compact.header {
            let why = "what would be written is not what was meant";
            return Err(Error::new(errno::EINVAL, "qcow2 header", why).at_path(storage.path()));
        }
        let differs = |sector: &usize| sector_of(&bytes, *sector) != sector_of(&compact.bytes, *sector);
        let changed: Vec<usize> = (0..compact.end.div_ceil(SECTOR_BYTES)).filter(differs).collect();
        let moved = if changed.len() > 1 {
            let from = end_of(&old, start).max(compact.end).next_multiple_of(8);
            Some((Layout::new(&new, from).map_err(at)?, from))
        } else {
            None
        };
        Ok(Plan { compact, changed, moved })
    }

    fn write(&self, storage: &dyn Storage) -> Result<()> {
        let compact = &self.compact;
        let put = |bytes: &[u8], from: usize, end: usize| -> Result<()> {
            match bytes.get(from..end) {
                Some(some) if !some.is_empty() => storage.write_at(some, from as u64),
                _ => Ok(()),
            }
        };
        let Some((moved, from)) = &self.moved else {
            for sector in &self.changed {
                let end = ((sector + 1) * SECTOR_BYTES).min(compact.bytes.len());
                put(&compact.bytes, sector * SECTOR_BYTES, end)?;
            }
            return if self.changed.is_empty() { Ok(()) } else { storage.sync() };
        };
        put(&moved.bytes, *from, moved.end)?;
        storage.sync()?;
        put(&moved.bytes, 0, SECTOR_BYTES)?;
        storage.sync()?;
        put(&compact.bytes, SECTOR_BYTES, compact.end)?;
        storage.sync()?;
        put(&compact.bytes, 0, SECTOR_BYTES)?;
        storage.sync()?;
        put(&compact.bytes, compact.end.max(SECTOR_BYTES), moved.end)
    }
}

impl Layout {
    /// Lays out a header whose extensions begin at `from`: behind the fields, or further behind a filler. The backing
    /// file's name stays where it is if it can.
    fn new(header: &Header, from: usize) -> Result<Layout> {
        let cluster_bytes = header.cluster_size() as usize;
        let start = header.header_length as usize;
        let list = header.extensions.to_bytes();
        let list_end = from + list.len() + EXTENSION_HEADER_BYTES;
        let mut header = header.clone();
        if let Some(BackingName { offset, .. }) = &mut header.backing {
            *offset = HostOffset(offset.0.max(list_end as u64));
        }
        let end = end_of(&header, from);
        // The filler's own header has to change together with the fields.
        if end > cluster_bytes || (from > start && start + EXTENSION_HEADER_BYTES > SECTOR_BYTES) {
            let why = format!("it does not fit in the first cluster of {cluster_bytes} bytes");
            return Err(Error::new(errno::ENOSPC, "qcow2 header", why)
                .hint("larger clusters have more room: copy it with qemu-img convert -o cluster_size=64K"));
        }
        let mut bytes = fields(&header);
        if from > start {
            bytes.extend_from_slice(&FILLER.to_be_bytes());
            bytes.extend_from_slice(&((from - start - EXTENSION_HEADER_BYTES) as u32).to_be_bytes());
        }
        bytes.resize(from, 0);
        bytes.extend_from_slice(&list);
        if let Some(backing) = &header.backing {
            bytes.resize(backing.offset.0 as usize, 0);
            bytes.extend_from_slice(&backing.name);
        }
        bytes.resize(cluster_bytes, 0);
        Ok(Layout { header, bytes, end })
    }
}

/// One past the last byte that a header uses whose extensions begin at `from`.
fn end_of(header: &Header, from: usize) -> usize {
    let list_end = from + header.extensions.len_bytes() + EXTENSION_HEADER_BYTES;
    let name_end = header.backing.as_ref().map_or(0, |backing| backing.offset.0 as usize + backing.name.len());
    list_end.max(name_end)
}

fn sector_of(bytes: &[u8], sector: usize) -> &[u8] {
    let start = sector * SECTOR_BYTES;
    bytes.get(start..(start + SECTOR_BYTES).min(bytes.len())).unwrap_or_default()
}

/// The fields, `header_length` bytes.
fn fields(header: &Header) -> Vec<u8> {
    let (name_offset, name_bytes) = header.backing.as_ref().map_or((0, 0), |b| (b.offset.0, b.name.len() as u32));
    let mut bytes = MAGIC.to_vec();
    bytes.extend_from_slice(&header.version.to_be_bytes());
    bytes.extend_from_slice(&name_offset.to_be_bytes());
    bytes.extend_from_slice(&name_bytes.to_be_bytes());
    bytes.extend_from_slice(&header.cluster_bits.to_be_bytes());
    bytes.extend_from_slice(&header.size.to_be_bytes());
    // crypt_method: encrypted images are refused.
    bytes.extend_from_slice(&0u32.to_be_bytes());
    bytes.extend_from_slice(&header.l1_size.to_be_bytes());
    bytes.extend_from_slice(&header.l1_table_offset.0.to_be_bytes());
    bytes.extend_from_slice(&header.refcount_table_offset.0.to_be_bytes());
    bytes.extend_from_slice(&header.refcount_table_clusters.to_be_bytes());
    bytes.extend_from_slice(&header.nb_snapshots.to_be_bytes());
    bytes.extend_from_slice(&header.snapshots_offset.0.to_be_bytes());
    if header.version >= 3 {
        bytes.extend_from_slice(&header.incompatible_features.to_be_bytes());
        bytes.extend_from_slice(&header.compatible_features.to_be_bytes());
        bytes.extend_from_slice(&header.autoclear_features.to_be_bytes());
        bytes.extend_from_slice(&header.refcount_order.to_be_bytes());
        bytes.extend_from_slice(&header.header_length.to_be_bytes());
        bytes.extend_from_slice(&header.additional);
    }
    bytes
}

#[cfg(test)]
#[path = "header_write_tests.rs"]
mod tests;
