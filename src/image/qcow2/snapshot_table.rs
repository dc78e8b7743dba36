//! The table of internal snapshots ("Snapshots" of QEMU's docs/interop/qcow2): entries of their own length, one behind
//! the other, each padded to 8 bytes.

use super::header::{Header, L1_MAX_BYTES, be32, be64};
use super::tables::HostOffset;
use crate::error::{Error, Result, errno};
use crate::storage::Storage;

/// Bytes of an entry before its extra data.
const FIXED_BYTES: u64 = 40;
/// Most extra data that an entry may have (QEMU's limit).
const EXTRA_MAX_BYTES: u64 = 1024;
/// Largest snapshot table in bytes (QEMU's limit).
const TABLE_MAX_BYTES: u64 = 64 << 20;

/// An internal snapshot, by the bytes of its entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// Bytes 0-7: its L1 table, not checked yet.
    pub l1_table_offset: HostOffset,
    /// Bytes 8-11: entries of that table, at most 32 MiB.
    pub l1_size: u32,
    /// Unique identifier.
    pub id: String,
    /// Name.
    pub name: String,
    /// Bytes 16-19: seconds since the epoch.
    pub date_s: u32,
    /// Bytes 20-23: nanoseconds behind them.
    pub date_ns: u32,
    /// Bytes 24-31: the guest's clock in nanoseconds.
    pub vm_clock_ns: u64,
    /// Bytes 32-35, or 40-47 where there: size of the saved state of the machine in bytes.
    pub vm_state_bytes: u64,
    /// Bytes 48-55, where there: size of the disk in bytes when the snapshot was made.
    pub disk_bytes: Option<u64>,
    /// Bytes 56-63, where there and known: the guest's instruction counter.
    pub icount: Option<u64>,
}

/// All internal snapshots.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SnapshotTable {
    /// In the order of the table.
    pub all: Vec<Snapshot>,
    /// Length of the table, without the padding of its last entry.
    pub bytes: u64,
}

impl SnapshotTable {
    /// Reads the table of an image.
    pub fn read(storage: &dyn Storage, header: &Header) -> Result<SnapshotTable> {
        let mut table = SnapshotTable::default();
        if header.nb_snapshots == 0 {
            return Ok(table);
        }
        let start = header.snapshots_offset.0;
        let file_bytes = storage.len()?;
        for index in 0..header.nb_snapshots {
            let bad = |why: String| {
                Error::new(errno::EINVAL, format!("qcow2 snapshot table: entry {index}"), why).at_path(storage.path())
            };
            let at = table.bytes.next_multiple_of(8);
            let mut fixed = [0; FIXED_BYTES as usize];
            storage.read_at(&mut fixed, start + at)?;
            let id_bytes = be32(&fixed, 12) >> 16;
            let name_bytes = be32(&fixed, 12) & 0xffff;
            let extra_bytes = u64::from(be32(&fixed, 36));
            if extra_bytes > EXTRA_MAX_BYTES {
                return Err(bad(format!("{extra_bytes} bytes of extra data are more than {EXTRA_MAX_BYTES}")));
            }
            let mut rest = vec![0; (extra_bytes + u64::from(id_bytes) + u64::from(name_bytes)) as usize];
            table.bytes = at + FIXED_BYTES + rest.len() as u64;
            if table.bytes > TABLE_MAX_BYTES || start + table.bytes > file_bytes {
                return Err(bad("ends behind the file or the largest table (64 MiB)".into()));
            }
            storage.read_at(&mut rest, start + at + FIXED_BYTES)?;
            let snapshot = decode(&fixed, &rest, extra_bytes as usize, id_bytes as usize);
            if u64::from(snapshot.l1_size) * 8 > L1_MAX_BYTES {
                return Err(bad(format!("an L1 table of {} entries takes more than 32 MiB", snapshot.l1_size)));
            }
            table.all.push(snapshot);
        }
        Ok(table)
    }
}

fn decode(fixed: &[u8], rest: &[u8], extra_bytes: usize, id_bytes: usize) -> Snapshot {
    let extra = rest.get(..extra_bytes).unwrap_or_default();
    let names = rest.get(extra_bytes..).unwrap_or_default();
    let text = |bytes: Option<&[u8]>| String::from_utf8_lossy(bytes.unwrap_or_default()).into_owned();
    let long = |at: usize| (extra.len() >= at + 8).then(|| be64(extra, at));
    Snapshot {
        l1_table_offset: HostOffset(be64(fixed, 0)),
        l1_size: be32(fixed, 8),
        id: text(names.get(..id_bytes)),
        name: text(names.get(id_bytes..)),
        date_s: be32(fixed, 16),
        date_ns: be32(fixed, 20),
        vm_clock_ns: be64(fixed, 24),
        vm_state_bytes: long(0).unwrap_or(u64::from(be32(fixed, 32))),
        disk_bytes: long(8),
        icount: long(16).filter(|count| *count != u64::MAX),
    }
}
