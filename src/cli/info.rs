//! `fleecefs info`: what an image is and holds. The names in the JSON are those of `qemu-img info`.

use super::local::{Local, LocalArgs};
use super::output::{Out, Table, printable};
use super::{Exit, JsonArg};
use crate::error::{Error, Result};
use crate::image::Format;
use crate::image::qcow2::bitmaps_format::{Directory, Entry};
use crate::image::qcow2::describe::describe;
use crate::image::qcow2::header::Header;
use crate::image::qcow2::look_at_header;
use crate::image::qcow2::snapshots::{Snapshot, SnapshotTable};
use crate::storage::Storage;
use crate::units::human_size;
use clap::Args;
use jiff::Timestamp;
use serde_json::{Map, Value, json};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Arguments of `info`.
#[derive(Debug, Args)]
pub struct InfoArgs {
    #[command(flatten)]
    image: LocalArgs,
    /// Look at the image while it is in use: what is read may change meanwhile
    #[arg(short = 'U', long)]
    force_share: bool,
    #[command(flatten)]
    json: JsonArg,
}

/// What there is to tell.
struct Info {
    format: &'static str,
    virtual_bytes: u64,
    /// What the file takes on the medium; unknown for block devices.
    stored_bytes: Option<u64>,
    qcow2: Option<Qcow2Info>,
}

struct Qcow2Info {
    header: Header,
    snapshots: Vec<Snapshot>,
    /// Why the snapshots or bitmaps cannot be listed.
    faults: Vec<String>,
    bitmaps: Option<Directory>,
}

impl InfoArgs {
    /// Runs the command.
    pub fn run(&self) -> Result<Exit> {
        let local = self.image.open(false, self.force_share)?;
        let info = gather(&local, &self.image.image)?;
        let mut out = Out::new();
        if self.json.json {
            out.json(&info.as_json(&self.image.image))?;
        } else {
            info.print(&mut out, &self.image.image)?;
        }
        Ok(Exit::Done)
    }
}

fn gather(local: &Local, path: &Path) -> Result<Info> {
    let metadata = std::fs::metadata(path).map_err(|e| Error::io("look at", e).at_path(path))?;
    let stored_bytes = (!local.file.is_block_device()).then(|| metadata.blocks() * 512);
    if local.format == Format::Raw {
        // The size of a disk is in sectors of 512 bytes, as QEMU rounds it.
        let virtual_bytes = local.file.len()?.next_multiple_of(512);
        return Ok(Info { format: "raw", virtual_bytes, stored_bytes, qcow2: None });
    }
    let header = look_at_header(&local.file)?;
    let mut faults = Vec::new();
    let snapshots = SnapshotTable::read(&local.file, &header).unwrap_or_else(|e| {
        faults.push(e.to_string());
        SnapshotTable::default()
    });
    let bitmaps = Directory::read(&local.file, &header).unwrap_or_else(|e| {
        faults.push(e.to_string());
        None
    });
    let virtual_bytes = header.size;
    let qcow2 = Some(Qcow2Info { header, snapshots: snapshots.all, faults, bitmaps });
    Ok(Info { format: "qcow2", virtual_bytes, stored_bytes, qcow2 })
}

impl Info {
    fn as_json(&self, path: &Path) -> Value {
        let mut object = Map::new();
        object.insert("filename".into(), json!(path.to_string_lossy()));
        object.insert("format".into(), json!(self.format));
        object.insert("virtual-size".into(), json!(self.virtual_bytes));
        if let Some(stored_bytes) = self.stored_bytes {
            object.insert("actual-size".into(), json!(stored_bytes));
        }
        object.insert("dirty-flag".into(), json!(false));
        if let Some(qcow2) = &self.qcow2 {
            qcow2.as_json(path, &mut object);
        }
        Value::Object(object)
    }

    fn print(&self, out: &mut Out, path: &Path) -> Result<()> {
        let size = |bytes: u64| format!("{} ({bytes} bytes)", human_size(bytes));
        let mut rows = vec![
            ("image", path.to_string_lossy().into_owned()),
            ("format", self.format.to_owned()),
            ("virtual size", size(self.virtual_bytes)),
            ("disk size", self.stored_bytes.map_or("unknown".into(), human_size)),
        ];
        if let Some(qcow2) = &self.qcow2 {
            qcow2.rows(&mut rows);
        }
        let width = rows.iter().map(|(name, _)| name.len() + 1).max().unwrap_or(0);
        for (name, value) in rows {
            out.line(format!("{:<width$} {}", format!("{name}:"), printable(&value)))?;
        }
        if let Some(qcow2) = &self.qcow2 {
            qcow2.print_tables(out)?;
        }
        Ok(())
    }
}

impl Qcow2Info {
    fn as_json(&self, path: &Path, object: &mut Map<String, Value>) {
        describe(&self.header, path, object);
        if !self.snapshots.is_empty() {
            object.insert("snapshots".into(), self.snapshots.iter().map(snapshot_json).collect());
        }
        if let Some(directory) = &self.bitmaps {
            let list = directory.all.iter().map(|entry| bitmap_json(entry, &self.header, directory.consistent));
            if let Some(specific) = object.get_mut("format-specific") {
                specific["data"]["bitmaps"] = list.collect();
            }
        }
        if !self.faults.is_empty() {
            object.insert("faults".into(), json!(self.faults));
        }
    }

    fn rows(&self, rows: &mut Vec<(&'static str, String)>) {
        let header = &self.header;
        let yes_no = |yes: bool| if yes { "yes" } else { "no" }.to_owned();
        rows.push(("cluster size", human_size(header.cluster_size())));
        if let Some(backing) = header.backing_name() {
            let format = header.extensions.backing_format().unwrap_or("format not recorded");
            rows.push(("backing file", format!("{backing} ({format})")));
        }
        rows.push(("compat", header.compat().into()));
        rows.push(("compression type", header.compression_name().into()));
        rows.push(("refcount bits", (1u64 << header.refcount_order).to_string()));
        if header.version >= 3 {
            rows.push(("lazy refcounts", yes_no(header.lazy_refcounts())));
            rows.push(("extended L2", yes_no(header.has_extended_l2())));
        }
        if let Some(name) = header.encryption_name() {
            rows.push(("encrypted", format!("yes ({name}): it cannot be served")));
        }
        if let Some(name) = header.data_file_name() {
            rows.push(("data file", format!("{name}{}", if header.has_raw_data_file() { " (raw)" } else { "" })));
        }
        if header.is_dirty() {
            rows.push(("dirty", "yes: it was not closed, its refcounts may be wrong".into()));
        }
        if header.is_corrupt() {
            rows.push(("corrupt", "yes: no writing before a repair".into()));
        }
        rows.extend(self.faults.iter().map(|fault| ("fault", fault.clone())));
    }

    fn print_tables(&self, out: &mut Out) -> Result<()> {
        let mut table = Table::new(&["SNAPSHOT", "NAME", ">VM STATE", "TIME (UTC)", ">VM CLOCK", ">DISK SIZE"]);
        for snapshot in &self.snapshots {
            table.row([
                snapshot.id.clone(),
                snapshot.name.clone(),
                human_size(snapshot.vm_state_bytes),
                time_of(snapshot),
                vm_clock(snapshot.guest_clock_ns),
                human_size(snapshot.disk_size),
            ]);
        }
        if !self.snapshots.is_empty() {
            out.line("")?;
            table.print(out)?;
        }
        let Some(directory) = &self.bitmaps else { return Ok(()) };
        let mut table = Table::new(&["BITMAP", ">GRANULARITY", "STATE"]);
        for entry in &directory.all {
            let fault = entry.fault(&self.header, directory.consistent);
            let state = fault.map_or_else(
                || if entry.auto() { "recording".to_owned() } else { "disabled".to_owned() },
                |why| format!("unusable: {why}"),
            );
            table.row([entry.name.clone(), human_size(entry.granularity_bytes()), state]);
        }
        out.line("")?;
        table.print(out)
    }
}

fn snapshot_json(snapshot: &Snapshot) -> Value {
    let mut object = Map::new();
    object.insert("id".into(), json!(snapshot.id));
    object.insert("name".into(), json!(snapshot.name));
    object.insert("vm-state-size".into(), json!(snapshot.vm_state_bytes));
    object.insert("date-sec".into(), json!(snapshot.time_s));
    object.insert("date-nsec".into(), json!(snapshot.time_ns));
    object.insert("vm-clock-sec".into(), json!(snapshot.guest_clock_ns / 1_000_000_000));
    object.insert("vm-clock-nsec".into(), json!(snapshot.guest_clock_ns % 1_000_000_000));
    if let Some(icount) = snapshot.icount {
        object.insert("icount".into(), json!(icount));
    }
    Value::Object(object)
}

fn bitmap_json(entry: &Entry, header: &Header, consistent: bool) -> Value {
    let flags: Vec<&str> =
        [(entry.in_use(), "in-use"), (entry.auto(), "auto")].into_iter().filter(|(set, _)| *set).map(|f| f.1).collect();
    let mut value = json!({ "name": entry.name, "granularity": entry.granularity_bytes(), "flags": flags });
    if let (Some(why), Some(object)) = (entry.fault(header, consistent), value.as_object_mut()) {
        object.insert("inconsistent".into(), json!(true));
        object.insert("reason".into(), json!(why));
    }
    value
}

fn time_of(snapshot: &Snapshot) -> String {
    Timestamp::new(i64::from(snapshot.time_s), 0)
        .map(|time| time.strftime("%Y-%m-%d %H:%M:%S").to_string())
        .unwrap_or_default()
}

/// `HHHH:MM:SS.mmm`, as QEMU writes it.
fn vm_clock(clock_ns: u64) -> String {
    let seconds = clock_ns / 1_000_000_000;
    let millis = clock_ns / 1_000_000 % 1000;
    format!("{:04}:{:02}:{:02}.{millis:03}", seconds / 3600, seconds / 60 % 60, seconds % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guest_clock_is_hours_and_milliseconds() {
        assert_eq!(vm_clock(3_661_001_000_000), "0001:01:01.001");
    }
}
