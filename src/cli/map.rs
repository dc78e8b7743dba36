//! `fleecefs map`: what changed on one disk of a snapshot, in any format.
//!
//! The extents come from the mount's own files: `DISK.map`, or `DISK/since/CHECKPOINT/map.json`. Where a base was
//! asked for that is not known (any more), the answer is the full map, the reason on standard error, and exit code 3:
//! whoever reads it backs up too much, never too little.

use super::Exit;
use super::connect::{Mount, read_reply};
use super::consumer;
use super::extents::MapSource;
use super::output::{Out, complain, printable};
use super::snapshot::{manifest, read_failed};
use crate::backup::{MapFile, MapFormat, MapMeta, MapPoint, Totals};
use crate::error::{Error, Result, errno};
use crate::units::{check_disk_name, check_name, human_size};
use clap::Args;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use serde::Deserialize;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use uuid::Uuid;

/// Arguments of `map`.
#[derive(Debug, Args)]
pub struct MapArgs {
    /// The mount
    mnt: PathBuf,
    /// The snapshot
    snapshot: String,
    /// The disk
    disk: String,
    /// The point to count from [default: the snapshot's reference point]
    #[arg(long, value_name = "CHECKPOINT|@CONSUMER")]
    since: Option<String>,
    /// The format
    #[arg(long, value_name = "FORMAT", value_parser = format_parser(), default_value = "text")]
    output: MapFormat,
    /// Print sums only, as text or json
    #[arg(long)]
    totals: bool,
    /// As --output json; with --totals, the sums as JSON
    #[arg(long, conflicts_with = "output")]
    json: bool,
}

fn format_parser() -> impl TypedValueParser<Value = MapFormat> {
    PossibleValuesParser::new(MapFormat::ALL.map(MapFormat::name))
        .try_map(|name| MapFormat::ALL.into_iter().find(|format| format.name() == name).ok_or("unknown format"))
}

/// A checkpoint in a manifest: by name, with its identity where it is told.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
enum PointRow {
    Full { name: String, uuid: Uuid },
    Name(String),
}

#[derive(Deserialize)]
struct Manifest {
    name: String,
    disks: Vec<ManifestDisk>,
}

#[derive(Deserialize)]
struct ManifestDisk {
    name: String,
    image: PathBuf,
    size: u64,
    checkpoint: PointRow,
    reference: Option<PointRow>,
    full_reason: Option<String>,
}

/// What the map needs of `status.json`.
#[derive(Deserialize)]
struct Status {
    disks: Vec<StatusDisk>,
    checkpoints: Vec<Checkpoint>,
    consumers: Vec<consumer::Row>,
}

#[derive(Deserialize)]
struct StatusDisk {
    name: String,
    uuid: Uuid,
}

#[derive(Deserialize)]
struct Checkpoint {
    name: String,
    uuid: Uuid,
    disks: Vec<CheckpointDisk>,
}

#[derive(Deserialize)]
struct CheckpointDisk {
    disk: String,
    everything: Option<String>,
}

/// Where the extents come from and from which point they count.
#[derive(Debug)]
struct Base {
    path: PathBuf,
    point: Option<MapPoint>,
    /// Why everything counts as changed.
    full_reason: Option<String>,
    /// The file counts from some other point: only its zeros are of use.
    everything: bool,
}

impl MapArgs {
    /// Prints the map; [`Exit::Full`] where it says 'everything' for want of a base.
    pub fn run(&self) -> Result<Exit> {
        check_disk_name(&self.disk)?;
        let mount = Mount::find(&self.mnt)?;
        let status: Status = read_reply(&mount.status)?;
        let manifest: Manifest = read_reply(&manifest(&mount, &self.snapshot)?)?;
        let disk = manifest.disks.iter().find(|disk| disk.name == self.disk).ok_or_else(|| {
            Error::new(errno::ENOENT, format!("disk '{}' of snapshot '{}'", self.disk, manifest.name), "no such disk")
                .hint("`fleecefs snapshot show` lists its disks")
        })?;
        let dir = mount.path.join("snapshots").join(&manifest.name);
        let base = match &self.since {
            None => reference(&status, disk, &dir),
            Some(since) => since_point(&status, disk, &dir, since)?,
        };
        let source = MapSource::new(&base.path, disk.size, base.everything);
        let meta = MapMeta {
            disk: disk.name.clone(),
            disk_uuid: status.disks.iter().find(|d| d.name == disk.name).map_or(Uuid::nil(), |d| d.uuid),
            image: disk.image.clone(),
            snapshot: manifest.name.clone(),
            base: base.point,
            full_reason: base.full_reason.clone(),
            target: status.point(&disk.checkpoint),
        };
        self.print(source, &meta)?;
        let Some(reason) = &base.full_reason else { return Ok(Exit::Done) };
        if self.since.is_none() && disk.reference.is_none() {
            // Nobody asked for a base: the first backup of a disk is a full one.
            return Ok(Exit::Done);
        }
        let since = self.since.as_ref().map_or(String::new(), |since| format!(" since '{}'", printable(since)));
        complain(&format!("fleecefs: disk '{}'{since}: everything counts as changed: {reason}", disk.name));
        Ok(Exit::Full)
    }

    fn print(&self, source: MapSource, meta: &MapMeta) -> Result<()> {
        let mut out = Out::new();
        if !self.totals {
            let format = if self.json { MapFormat::Json } else { self.output };
            return if format == MapFormat::Json && source.is_the_file() {
                source.copy_to(&mut out)
            } else {
                MapFile::write_once(Arc::new(source), format, meta, &mut out)
            };
        }
        if !matches!(self.output, MapFormat::Text | MapFormat::Json) {
            let why = format!("there are no sums in format '{}'", self.output.name());
            return Err(Error::new(errno::EINVAL, "--totals", why).hint("use --output text or --output json"));
        }
        let totals = Totals::of(&source)?;
        if self.json || self.output == MapFormat::Json {
            return out.json(&totals);
        }
        let share = if totals.size == 0 { 0.0 } else { totals.dirty as f64 * 100.0 / totals.size as f64 };
        out.line(format!("size     {:>11}  {} bytes", human_size(totals.size), totals.size))?;
        out.line(format!("changed  {:>11}  {} bytes, {share:.1} %", human_size(totals.dirty), totals.dirty))?;
        out.line(format!("to zero  {:>11}  {} bytes of what changed", human_size(totals.zero), totals.zero))?;
        out.line(format!("extents  {:>11}", totals.extents))
    }
}

impl Status {
    /// A point with its identity. A name stands for one checkpoint, on all disks.
    fn point(&self, row: &PointRow) -> MapPoint {
        match row {
            PointRow::Full { name, uuid } => MapPoint { name: name.clone(), uuid: *uuid },
            PointRow::Name(name) => {
                let uuid = self.checkpoints.iter().find(|c| c.name == *name).map_or(Uuid::nil(), |c| c.uuid);
                MapPoint { name: name.clone(), uuid }
            }
        }
    }

    /// Why the changes of `disk` from `base` up to `target` are not known, where one of the checkpoints on the way
    /// (oldest first, as they are listed) says so.
    fn unknown_between(&self, disk: &str, base: &MapPoint, target: &MapPoint) -> Option<String> {
        self.checkpoints
            .iter()
            .skip_while(|c| c.uuid != base.uuid)
            .take_while(|c| c.uuid != target.uuid)
            .flat_map(|c| &c.disks)
            .find_map(|row| row.everything.clone().filter(|_| row.disk == disk))
    }
}

/// The map since the reference point.
fn reference(status: &Status, disk: &ManifestDisk, dir: &Path) -> Base {
    let point = disk.reference.as_ref().map(|row| status.point(row));
    let unknown = point.as_ref().and_then(|p| status.unknown_between(&disk.name, p, &status.point(&disk.checkpoint)));
    Base {
        path: dir.join(format!("{}.map", disk.name)),
        point,
        full_reason: disk.full_reason.clone().or(unknown),
        everything: false,
    }
}

/// The map since a checkpoint, or since the one that a consumer points at; without it, the full map.
fn since_point(status: &Status, disk: &ManifestDisk, dir: &Path, since: &str) -> Result<Base> {
    let full = |reason: String| Base {
        path: dir.join(format!("{}.map", disk.name)),
        point: None,
        full_reason: Some(reason),
        everything: true,
    };
    let base = match since.strip_prefix('@') {
        Some(name) => {
            check_name("consumer", name)?;
            match status.consumers.iter().find(|row| row.name == name) {
                Some(row) => MapPoint { name: row.checkpoint.clone(), uuid: read_reply(&row.uuid.as_str().into())? },
                None => return Ok(full(format!("consumer '{name}' has finished no checkpoint"))),
            }
        }
        None => {
            check_name("checkpoint", since)?;
            status.point(&PointRow::Name(since.to_owned()))
        }
    };
    let gone = format!("checkpoint '{}' is not known for this disk (any more)", base.name);
    let path = dir.join(&disk.name).join("since").join(&base.name).join("map.json");
    match std::fs::metadata(&path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(full(gone)),
        Err(e) => return Err(read_failed("map", &path, e)),
        Ok(_) => {}
    }
    // Identity decides, not the name: a checkpoint may have been made anew under it.
    if status.checkpoints.iter().any(|c| c.name == base.name && c.uuid != base.uuid) {
        return Ok(full(gone));
    }
    let full_reason = status.unknown_between(&disk.name, &base, &status.point(&disk.checkpoint));
    Ok(Base { path, point: Some(base), full_reason, everything: false })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const OLD: &str = "11111111-1111-4111-8111-111111111111";
    const NEW: &str = "22222222-2222-4222-8222-222222222222";
    const OWN: &str = "33333333-3333-4333-8333-333333333333";

    fn status(everything: Option<&str>) -> Status {
        let row = |name: &str, uuid: &str, everything: Option<&str>| json!({"name": name, "uuid": uuid, "disks": [{"disk": "a", "everything": everything}]});
        read_reply(&json!({
            "disks": [{"name": "a", "uuid": OLD}],
            "checkpoints": [row("old", OLD, None), row("new", NEW, everything), row("s", OWN, Some("not on the way"))],
            "consumers": [
                {"name": "c", "checkpoint": "old", "uuid": OLD, "disks": ["a"]},
                {"name": "stale", "checkpoint": "old", "uuid": OWN, "disks": ["a"]},
            ],
        }))
        .unwrap()
    }

    fn disk() -> ManifestDisk {
        read_reply(&json!({"name": "a", "image": "/a", "size": 10, "checkpoint": "s",
                           "reference": {"name": "new", "uuid": NEW}, "full_reason": null}))
        .unwrap()
    }

    fn snapshot_dir() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for point in ["old", "new"] {
            let since = dir.path().join("a/since").join(point);
            std::fs::create_dir_all(&since).unwrap();
            std::fs::write(since.join("map.json"), "[]").unwrap();
        }
        dir
    }

    #[test]
    fn a_known_base_is_used_by_name_and_by_consumer() {
        let dir = snapshot_dir();
        for since in ["old", "@c"] {
            let base = since_point(&status(None), &disk(), dir.path(), since).unwrap();
            assert_eq!(base.path, dir.path().join("a/since/old/map.json"));
            assert_eq!((base.full_reason, base.everything), (None, false));
            assert_eq!(base.point.unwrap().uuid.to_string(), OLD);
        }
        let base = reference(&status(None), &disk(), dir.path());
        assert_eq!((base.path, base.full_reason), (dir.path().join("a.map"), None));
    }

    #[test]
    fn an_unknown_base_gives_everything_with_the_reason() {
        let dir = snapshot_dir();
        for since in ["none", "@none", "@stale"] {
            let base = since_point(&status(None), &disk(), dir.path(), since).unwrap();
            assert!(base.everything && base.full_reason.is_some() && base.point.is_none(), "{since}");
            assert_eq!(base.path, dir.path().join("a.map"));
        }
        for bad in ["../x", "", "@", "a/b"] {
            assert!(since_point(&status(None), &disk(), dir.path(), bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn lost_tracking_on_the_way_is_told() {
        let dir = snapshot_dir();
        let base = since_point(&status(Some("lost")), &disk(), dir.path(), "old").unwrap();
        assert_eq!(base.full_reason.as_deref(), Some("lost"));
        assert_eq!(reference(&status(Some("lost")), &disk(), dir.path()).full_reason.as_deref(), Some("lost"));
        assert_eq!(reference(&status(None), &disk(), dir.path()).full_reason, None);
    }
}
