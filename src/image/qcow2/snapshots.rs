//! Internal snapshots: the table that lists them ("Snapshots" of QEMU's docs/interop/qcow2).
//!
//! Each is an L1 table of its own over shared L2 tables and clusters. All places are checked when the image is opened.

use super::header::{Header, L1_MAX_BYTES, be32, be64, check_place};
use super::host::HostFile;
use super::tables::HostOffset;
use crate::error::{Error, Result, errno};
use crate::storage::Storage;
use crate::units::MAX_DISK_BYTES;

/// Bytes of an entry before its extra data.
const ENTRY_BYTES: usize = 40;
/// Most extra data of an entry in bytes (QEMU's limit).
const EXTRA_MAX_BYTES: u64 = 1024;
/// Largest table in bytes (QEMU's limit).
const TABLE_MAX_BYTES: u64 = 64 << 20;

/// An entry of the snapshot table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// Bytes 0-7: where its L1 table lies.
    pub l1_table_offset: HostOffset,
    /// Bytes 8-11: entries of its L1 table; enough for its disk.
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
    /// Extra data behind byte 55, unknown to this program; a rewritten table keeps them.
    pub unknown_extra: Vec<u8>,
    /// The unique ID, a number in QEMU's images.
    pub id: String,
    /// The name.
    pub name: String,
}

fn bad(index: u32, why: impl Into<String>) -> Error {
    Error::new(errno::EINVAL, "qcow2 snapshot table", format!("entry {index}: {}", why.into()))
}

/// Reads the table of an image, and takes its clusters and those of the L1 tables away from what L2 entries may point
/// to.
pub fn read(header: &Header, file: &HostFile) -> Result<Vec<Snapshot>> {
    let mut snapshots = Vec::new();
    if header.nb_snapshots == 0 {
        return Ok(snapshots);
    }
    let start = header.snapshots_offset.0;
    let mut at = start;
    for index in 0..header.nb_snapshots {
        let (snapshot, bytes) = read_entry(header, file, index, at)?;
        at += bytes;
        if at - start > TABLE_MAX_BYTES {
            return Err(bad(index, "the table takes more than 64 MiB"));
        }
        snapshots.push(snapshot);
    }
    let cluster_size = header.cluster_size();
    // The last entry's padding need not be there.
    let table_bytes = at.min(file.bytes()) - start;
    let overlap = |e: Error| Error::new(errno::EINVAL, "qcow2 snapshot table", e.to_string());
    file.forget(header.snapshots_offset);
    file.reserve("snapshots_offset", header.snapshots_offset, table_bytes, cluster_size).map_err(overlap)?;
    for (index, snapshot) in (0..).zip(&snapshots) {
        reserve_l1(header, file, snapshot).map_err(|why| bad(index, why))?;
    }
    Ok(snapshots)
}

/// The entry at `at` and its length in the table.
fn read_entry(header: &Header, file: &HostFile, index: u32, at: u64) -> Result<(Snapshot, u64)> {
    let mut fixed = [0; ENTRY_BYTES];
    file.read_at(&mut fixed, at)?;
    let id_bytes = u64::from(be32(&fixed, 12) >> 16);
    let name_bytes = u64::from(be32(&fixed, 12) & 0xffff);
    let extra_bytes = u64::from(be32(&fixed, 36));
    if extra_bytes > EXTRA_MAX_BYTES {
        return Err(bad(index, format!("{extra_bytes} bytes of extra data are more than {EXTRA_MAX_BYTES}")));
    }
    let variable_bytes = extra_bytes + id_bytes + name_bytes;
    let end = at + ENTRY_BYTES as u64 + variable_bytes;
    if end > file.bytes() {
        return Err(bad(index, format!("ends at {end}, behind the file of {} bytes", file.bytes())));
    }
    let mut variable = vec![0; variable_bytes as usize];
    file.read_at(&mut variable, at + ENTRY_BYTES as u64)?;
    let (extra, strings) = variable.split_at(extra_bytes as usize);
    let (id, name) = strings.split_at(id_bytes as usize);
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let snapshot = Snapshot {
        l1_table_offset: HostOffset(be64(&fixed, 0)),
        l1_size: be32(&fixed, 8),
        time_s: be32(&fixed, 16),
        time_ns: be32(&fixed, 20),
        guest_clock_ns: be64(&fixed, 24),
        vm_state_bytes: if extra.len() >= 8 { be64(extra, 0) } else { u64::from(be32(&fixed, 32)) },
        disk_size: if extra.len() >= 16 { be64(extra, 8) } else { header.size },
        unknown_extra: extra.get(16..).unwrap_or_default().to_vec(),
        id: text(id),
        name: text(name),
    };
    Ok((snapshot, (ENTRY_BYTES as u64 + variable_bytes).next_multiple_of(8)))
}

fn reserve_l1(header: &Header, file: &HostFile, snapshot: &Snapshot) -> std::result::Result<(), String> {
    let fail = |why: String| Err(format!("l1_size: {why}"));
    let bytes = u64::from(snapshot.l1_size) * 8;
    if bytes > L1_MAX_BYTES {
        return fail(format!("{} entries take more than 32 MiB", snapshot.l1_size));
    }
    if snapshot.disk_size > MAX_DISK_BYTES {
        return fail(format!("its disk of {} bytes is larger than 1 EiB", snapshot.disk_size));
    }
    let needed = header.geometry().l1_entries_for(snapshot.disk_size);
    if u64::from(snapshot.l1_size) < needed {
        let size = snapshot.disk_size;
        return fail(format!("{} entries, but its disk of {size} bytes needs {needed}", snapshot.l1_size));
    }
    if bytes == 0 {
        return Ok(());
    }
    check_place(snapshot.l1_table_offset, bytes, header.cluster_size(), file.bytes())
        .map_err(|why| format!("l1_table_offset: {why}"))?;
    file.reserve("the L1 table of a snapshot", snapshot.l1_table_offset, bytes, header.cluster_size())
        .map_err(|e| e.to_string())
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
