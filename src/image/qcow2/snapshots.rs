//! Internal snapshots: the table that lists them ("Snapshots" of QEMU's docs/interop/qcow2).
//!
//! Each is an L1 table of its own over shared L2 tables and clusters. Entries have a length of their own and stand one
//! behind the other, each padded to 8 bytes. [`SnapshotTable::read`] is the only reader: it takes what has the form of
//! a table and is inside the file. Where an L1 table cannot be ([`Snapshot::l1_place`]) is a finding of a check; [`read`]
//! is for serving an image and refuses it then.

use super::header::{Header, L1_MAX_BYTES, be32, be64, check_place};
use super::host::HostFile;
use super::tables::HostOffset;
use crate::error::{Error, Result, errno};
use crate::storage::Storage;
use crate::units::MAX_DISK_BYTES;

/// Bytes of an entry before its extra data.
const FIXED_BYTES: u64 = 40;
/// Most extra data of an entry in bytes (QEMU's limit).
const EXTRA_MAX_BYTES: u64 = 1024;
/// Largest table in bytes (QEMU's limit).
const TABLE_MAX_BYTES: u64 = 64 << 20;

/// An entry of the snapshot table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// Bytes 0-7: where its L1 table lies, not checked yet: see [`Snapshot::l1_place`].
    pub l1_table_offset: HostOffset,
    /// Bytes 8-11: entries of its L1 table, at most 32 MiB of them.
    pub l1_size: u32,
    /// Bytes 16-19: when it was taken, in seconds since the epoch.
    pub time_s: u32,
    /// Bytes 20-23: the nanoseconds to that.
    pub time_ns: u32,
    /// Bytes 24-31: how long the guest had run, in nanoseconds.
    pub guest_clock_ns: u64,
    /// Bytes 32-35, or 40-47 where they are there: size of the VM state in bytes.
    pub vm_state_bytes: u64,
    /// Bytes 48-55: size of its disk in bytes; the image's where the field is absent.
    pub disk_size: u64,
    /// Bytes 56-63, where they are there and not all ones: the guest's instruction counter.
    pub icount: Option<u64>,
    /// The unique ID, a number in QEMU's images.
    pub id: String,
    /// The name.
    pub name: String,
}

impl Snapshot {
    /// Where its L1 table lies in a file of `file_bytes`, with its length in bytes; `None` where it has no entries. What
    /// is wrong, where none can be there.
    pub fn l1_place(&self, header: &Header, file_bytes: u64) -> std::result::Result<Option<(HostOffset, u64)>, String> {
        let (entries, size) = (u64::from(self.l1_size), self.disk_size);
        if size > MAX_DISK_BYTES {
            return Err(format!("disk_size: {size} bytes are more than the largest disk (1 EiB)"));
        }
        let needed = header.geometry().l1_entries_for(size);
        if entries < needed {
            return Err(format!("l1_size: {entries} entries, but its disk of {size} bytes needs {needed}"));
        }
        if entries == 0 {
            return Ok(None);
        }
        check_place(self.l1_table_offset, entries * 8, header.cluster_size(), file_bytes)
            .map_err(|why| format!("l1_table_offset: {why}"))?;
        Ok(Some((self.l1_table_offset, entries * 8)))
    }
}

/// All internal snapshots.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SnapshotTable {
    /// In the order of the table.
    pub all: Vec<Snapshot>,
    /// Length of the table, without the padding of its last entry, which need not be there.
    pub bytes: u64,
}

fn bad(index: u32, why: impl Into<String>) -> Error {
    Error::new(errno::EINVAL, "qcow2 snapshot table", format!("entry {index}: {}", why.into()))
}

impl SnapshotTable {
    /// Reads the table of the image in `storage`. EINVAL where it is not the form of one.
    pub fn read(storage: &dyn Storage, header: &Header) -> Result<SnapshotTable> {
        let mut table = SnapshotTable::default();
        let file_bytes = storage.len()?;
        for index in 0..header.nb_snapshots {
            let at = header.snapshots_offset.0 + table.bytes.next_multiple_of(8);
            let (snapshot, end) = read_entry(storage, header, file_bytes, index, at)?;
            table.bytes = end - header.snapshots_offset.0;
            if table.bytes > TABLE_MAX_BYTES {
                return Err(bad(index, "the table takes more than 64 MiB").at_path(storage.path()));
            }
            table.all.push(snapshot);
        }
        Ok(table)
    }
}

/// The entry at `at`, and where it ends.
fn read_entry(storage: &dyn Storage, header: &Header, file_bytes: u64, index: u32, at: u64) -> Result<(Snapshot, u64)> {
    let bad = |why: String| Err(bad(index, why).at_path(storage.path()));
    let mut fixed = [0; FIXED_BYTES as usize];
    storage.read_at(&mut fixed, at)?;
    let id_bytes = u64::from(be32(&fixed, 12) >> 16);
    let name_bytes = u64::from(be32(&fixed, 12) & 0xffff);
    let extra_bytes = u64::from(be32(&fixed, 36));
    let l1_size = be32(&fixed, 8);
    if extra_bytes > EXTRA_MAX_BYTES {
        return bad(format!("{extra_bytes} bytes of extra data are more than {EXTRA_MAX_BYTES}"));
    }
    if u64::from(l1_size) * 8 > L1_MAX_BYTES {
        return bad(format!("l1_size: {l1_size} entries take more than 32 MiB"));
    }
    let end = at + FIXED_BYTES + extra_bytes + id_bytes + name_bytes;
    if end > file_bytes {
        return bad(format!("ends at {end}, behind the file of {file_bytes} bytes"));
    }
    let mut variable = vec![0; (extra_bytes + id_bytes + name_bytes) as usize];
    storage.read_at(&mut variable, at + FIXED_BYTES)?;
    let (extra, strings) = variable.split_at(extra_bytes as usize);
    let (id, name) = strings.split_at(id_bytes as usize);
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let field = |at: usize| (extra.len() >= at + 8).then(|| be64(extra, at));
    let snapshot = Snapshot {
        l1_table_offset: HostOffset(be64(&fixed, 0)),
        l1_size,
        time_s: be32(&fixed, 16),
        time_ns: be32(&fixed, 20),
        guest_clock_ns: be64(&fixed, 24),
        vm_state_bytes: field(0).unwrap_or(u64::from(be32(&fixed, 32))),
        disk_size: field(8).unwrap_or(header.size),
        icount: field(16).filter(|count| *count != u64::MAX),
        id: text(id),
        name: text(name),
    };
    Ok((snapshot, end))
}

/// Reads the table of an image that is to be served, and takes its clusters and those of the L1 tables away from what L2
/// entries may point to. EINVAL where one of them is not where it can be.
pub fn read(header: &Header, file: &HostFile) -> Result<Vec<Snapshot>> {
    let SnapshotTable { all, bytes } = SnapshotTable::read(file, header)?;
    if all.is_empty() {
        return Ok(all);
    }
    let overlap = |e: Error| Error::new(errno::EINVAL, "qcow2 snapshot table", e.to_string()).at_path(file.path());
    let bad = |index: u32, why: String| bad(index, why).at_path(file.path());
    file.forget(header.snapshots_offset);
    file.reserve("snapshots_offset", header.snapshots_offset, bytes, header.cluster_size()).map_err(overlap)?;
    let mut places = Vec::new();
    for (index, snapshot) in (0..).zip(&all) {
        places.extend(
            snapshot.l1_place(header, file.bytes()).map_err(|why| bad(index, why))?.map(|place| (index, place)),
        );
    }
    let indices: Vec<u32> = places.iter().map(|(index, _)| *index).collect();
    let places = places.into_iter().map(|(_, place)| place);
    file.reserve_all("the L1 table of a snapshot", places, header.cluster_size())
        .map_err(|(place, e)| bad(indices.get(place).copied().unwrap_or(0), e.to_string()))?;
    Ok(all)
}

/// The snapshot with an ID, else the first with a name.
pub fn find<'a>(snapshots: &'a [Snapshot], id_or_name: &str) -> Result<&'a Snapshot> {
    let by_id = snapshots.iter().find(|snapshot| snapshot.id == id_or_name);
    by_id.or_else(|| snapshots.iter().find(|snapshot| snapshot.name == id_or_name)).ok_or_else(|| {
        let what = format!("internal snapshot '{}'", id_or_name.escape_debug());
        let e = Error::new(errno::ENOENT, what, "the image has none of this ID or name");
        e.hint("list them with: fleecefs info IMAGE")
    })
}

#[cfg(test)]
mod tests {
    use super::super::read_header;
    use super::super::test_image::Shape;
    use super::*;
    use crate::storage::MemFile;

    /// An image whose snapshot table, behind everything else, is made of `entries`.
    fn image(entries: &[Vec<u8>]) -> (MemFile, Header) {
        let shape = Shape::new(12, 4, 1);
        let file = MemFile::new("a", 0);
        shape.write(&file);
        let at = shape.at(shape.end());
        let mut table = Vec::new();
        for entry in entries {
            table.resize(table.len().next_multiple_of(8), 0);
            table.extend_from_slice(entry);
        }
        file.write_at(&table, at).unwrap();
        let mut header = read_header(&file).unwrap();
        header.nb_snapshots = entries.len() as u32;
        header.snapshots_offset = HostOffset(at);
        (file, header)
    }

    /// An entry with this extra data.
    fn entry(extra: &[u8], id: &[u8], name: &[u8]) -> Vec<u8> {
        let mut entry = vec![0; FIXED_BYTES as usize];
        let mut put = |at: usize, bytes: &[u8]| entry[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &(7u64 << 12).to_be_bytes());
        put(8, &1u32.to_be_bytes());
        put(12, &(id.len() as u16).to_be_bytes());
        put(14, &(name.len() as u16).to_be_bytes());
        put(16, &[0, 0, 0, 5, 0, 0, 0, 6]);
        put(24, &7u64.to_be_bytes());
        put(32, &8u32.to_be_bytes());
        put(36, &(extra.len() as u32).to_be_bytes());
        [&entry, extra, id, name].concat()
    }

    #[test]
    fn fields_that_an_entry_is_too_short_for_have_their_old_meaning() {
        let words: Vec<u8> = [9u64, 10, 11, 12].iter().flat_map(|word| word.to_be_bytes()).collect();
        let lengths = [0, 7, 8, 16, 24, 32];
        let entries: Vec<_> = lengths.iter().map(|len| entry(&words[..*len], b"1", "namé".as_bytes())).collect();
        let (file, header) = image(&entries);
        let table = SnapshotTable::read(&file, &header).unwrap();
        let long = |len: usize, at: usize, value: u64| (len >= at + 8).then_some(value);
        assert_eq!(table.all.len(), lengths.len());
        for (snapshot, len) in table.all.iter().zip(lengths) {
            assert_eq!(snapshot.vm_state_bytes, long(len, 0, 9).unwrap_or(8), "{len}");
            assert_eq!(snapshot.disk_size, long(len, 8, 10).unwrap_or(header.size), "{len}");
            assert_eq!(snapshot.icount, long(len, 16, 11), "{len}");
            assert_eq!((snapshot.l1_table_offset, snapshot.l1_size), (HostOffset(7 << 12), 1));
            assert_eq!((snapshot.time_s, snapshot.time_ns, snapshot.guest_clock_ns), (5, 6, 7));
            assert_eq!((snapshot.id.as_str(), snapshot.name.as_str()), ("1", "namé"));
        }
        assert_eq!(table.bytes, file.len().unwrap() - header.snapshots_offset.0, "without the last padding");
        let none = entry(&[[0xFF; 8]; 3].concat(), b"1", b"");
        let (file, header) = image(&[none]);
        assert_eq!(SnapshotTable::read(&file, &header).unwrap().all[0].icount, None);
    }

    #[test]
    fn a_table_is_at_most_64_mib_long_and_in_the_file() {
        let long = entry(&[], &[b'i'; 65535], &[b'n'; 65535]);
        let count = (TABLE_MAX_BYTES as usize).div_ceil(long.len().next_multiple_of(8));
        let (file, mut header) = image(&vec![long; count]);
        let e = SnapshotTable::read(&file, &header).unwrap_err();
        assert!(e.to_string().contains(&format!("entry {}: the table takes more than 64 MiB", count - 1)), "{e}");
        header.nb_snapshots -= 1;
        SnapshotTable::read(&file, &header).unwrap();
        file.set_len(file.len().unwrap() - 200_000).unwrap();
        let e = SnapshotTable::read(&file, &header).unwrap_err();
        assert!(e.to_string().contains("behind the file of"), "{e}");
    }
}
