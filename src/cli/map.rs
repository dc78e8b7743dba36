//! `fleecefs map`: what changed on one disk of a snapshot, in any format.
//!
//! The extents come from the mount's own files: `DISK.map`, or `DISK/since/CHECKPOINT/map.json`. Where a base was
//! asked for that is not known (any more), the answer is the full map, the reason on standard error, and exit code 3:
//! whoever reads it backs up too much, never too little.

use super::Exit;
use super::connect::{Mount, read_reply};
use super::consumer;
use super::output::{Out, complain, printable};
use super::snapshot::{manifest, read_failed};
use crate::backup::{MapFile, MapFormat, MapMeta, MapPoint, MapSource, Totals, VolumeMap};
use crate::error::{Error, Result, errno};
use crate::fleece::DiskContent;
use crate::fleece::SkippedInfo;
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
    /// The map of one volume of the disk, with offsets from the volume's start
    #[arg(long, value_name = "VOLUME")]
    volume: Option<String>,
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

/// A disk in the manifest of a snapshot.
#[derive(Deserialize)]
pub(super) struct ManifestDisk {
    pub(super) name: String,
    pub(super) image: PathBuf,
    pub(super) size: u64,
    checkpoint: PointRow,
    reference: Option<PointRow>,
    full_reason: Option<String>,
    pub(super) skipped: Option<SkippedInfo>,
    #[serde(flatten)]
    holds: DiskContent,
}

/// What maps need of `status.json`.
#[derive(Deserialize)]
pub(super) struct Status {
    disks: Vec<StatusDisk>,
    checkpoints: Vec<Checkpoint>,
    consumers: Vec<consumer::Row>,
}

#[derive(Deserialize)]
struct StatusDisk {
    name: String,
    uuid: Uuid,
    #[serde(default)]
    identities: Vec<Uuid>,
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
pub(super) struct Base {
    /// The map.
    pub(super) path: PathBuf,
    point: Option<MapPoint>,
    /// Why everything counts as changed.
    pub(super) full_reason: Option<String>,
    /// The file counts from some other point: only its zeros are of use.
    pub(super) everything: bool,
}

impl Base {
    /// All of the disk, whatever changed.
    pub(super) fn everything(disk: &ManifestDisk, dir: &Path, full_reason: Option<String>) -> Base {
        Base { path: dir.join(format!("{}.map", disk.name)), point: None, full_reason, everything: true }
    }

    /// What the head of the map says.
    pub(super) fn meta(&self, status: &Status, disk: &ManifestDisk, snapshot: &str) -> MapMeta {
        MapMeta {
            disk: disk.name.clone(),
            disk_uuid: status.disk_uuid(&disk.name).unwrap_or(Uuid::nil()),
            image: disk.image.clone(),
            snapshot: snapshot.to_owned(),
            base: self.point.clone(),
            full_reason: self.full_reason.clone(),
            target: status.point(&disk.checkpoint),
        }
    }
}

/// Where the extents come from.
enum Source {
    Disk(MapSource),
    Volume(VolumeMap<MapSource>),
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
        let base_of = |disk: &ManifestDisk| match &self.since {
            None => Ok(reference(&status, disk, &dir)),
            Some(since) => since_point(&status, disk, &dir, since),
        };
        let mut base = base_of(disk)?;
        let source = match &self.volume {
            None => Source::Disk(MapSource::new(&base.path, disk.size, base.everything)),
            Some(name) => {
                let (map, full_reason) = volume_map(&manifest, disk, name, base_of)?;
                base.full_reason = full_reason;
                Source::Volume(map)
            }
        };
        let mut meta = base.meta(&status, disk, &manifest.name);
        if let Some(volume) = &self.volume {
            meta.disk = format!("{}/{volume}", meta.disk);
        }
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

    fn print(&self, source: Source, meta: &MapMeta) -> Result<()> {
        let mut out = Out::new();
        if !self.totals {
            let format = if self.json { MapFormat::Json } else { self.output };
            return match source {
                Source::Disk(map) if format == MapFormat::Json && map.is_the_file() => map.copy_to(&mut out),
                Source::Disk(map) => MapFile::write_once(Arc::new(map), format, meta, &mut out),
                Source::Volume(map) => MapFile::write_once(Arc::new(map), format, meta, &mut out),
            };
        }
        if !matches!(self.output, MapFormat::Text | MapFormat::Json) {
            let why = format!("there are no sums in format '{}'", self.output.name());
            return Err(Error::new(errno::EINVAL, "--totals", why).hint("use --output text or --output json"));
        }
        let totals = match &source {
            Source::Disk(map) => Totals::of(map)?,
            Source::Volume(map) => Totals::of(map)?,
        };
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
    /// The identity of a disk; None: there is no such disk.
    pub(super) fn disk_uuid(&self, disk: &str) -> Option<Uuid> {
        self.disks.iter().find(|row| row.name == disk).map(|row| row.uuid)
    }

    /// The identities of all disks.
    pub(super) fn disk_uuids(&self) -> Vec<Uuid> {
        self.disks.iter().map(|row| row.uuid).collect()
    }

    /// Whether there is a disk of this identity, here or on a mount from which a checkpoint was imported.
    pub(super) fn has_disk(&self, uuid: Uuid) -> bool {
        self.disks.iter().any(|row| row.uuid == uuid || row.identities.contains(&uuid))
    }

    /// Whether the disk of this name has that identity, or had it there.
    pub(super) fn is_disk(&self, disk: &str, uuid: Uuid) -> bool {
        self.disks.iter().any(|row| row.name == disk && (row.uuid == uuid || row.identities.contains(&uuid)))
    }

    /// Whether a checkpoint has this name.
    pub(super) fn has_checkpoint(&self, name: &str) -> bool {
        self.checkpoints.iter().any(|checkpoint| checkpoint.name == name)
    }

    /// The name of a disk's checkpoint; None: it is not known (any more).
    pub(super) fn checkpoint_name(&self, disk: &str, uuid: Uuid) -> Option<String> {
        let checkpoint = self.checkpoints.iter().find(|checkpoint| checkpoint.uuid == uuid)?;
        checkpoint.disks.iter().any(|row| row.disk == disk).then(|| checkpoint.name.clone())
    }

    /// Where a consumer is on a disk, by name and identity, or why nobody knows.
    pub(super) fn consumer_of(&self, consumer: &str, disk: &str) -> std::result::Result<(String, Uuid), String> {
        let mut rows = self.consumers.iter().filter(|row| row.name == consumer).peekable();
        if rows.peek().is_none() {
            return Err(format!("consumer '{consumer}' has finished no checkpoint"));
        }
        let row = rows.find(|row| row.disks.iter().any(|name| name == disk));
        let row = row
            .ok_or_else(|| format!("consumer '{consumer}' has finished no checkpoint of this disk, only of others"))?;
        let uuid = row.uuid.parse().map_err(|_| format!("consumer '{consumer}': '{}' is no UUID", row.uuid))?;
        Ok((row.checkpoint.clone(), uuid))
    }

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

/// The map of a volume from those of the disks that it lies on, and why everything counts as changed on one of them.
fn volume_map(
    manifest: &Manifest,
    disk: &ManifestDisk,
    name: &str,
    base_of: impl Fn(&ManifestDisk) -> Result<Base>,
) -> Result<(VolumeMap<MapSource>, Option<String>)> {
    let info = disk.holds.volumes.iter().find(|volume| volume.name == name).ok_or_else(|| {
        let names: Vec<&str> = disk.holds.volumes.iter().map(|volume| volume.name.as_str()).collect();
        let hint = if names.is_empty() { "it has none".to_owned() } else { format!("it has {}", names.join(", ")) };
        Error::new(errno::ENOENT, format!("volume '{}' of disk '{}'", printable(name), disk.name), "no such volume")
            .hint(printable(&hint))
    })?;
    let (volume, disks) = info.volume(&disk.name);
    let mut full_reason = None;
    let map_of = |name: &String| {
        let unknown = || Error::new(errno::EIO, format!("disk '{name}'"), "not in the manifest");
        let disk = manifest.disks.iter().find(|disk| disk.name == *name).ok_or_else(unknown)?;
        let base = base_of(disk)?;
        full_reason = full_reason.take().or(base.full_reason);
        Ok(Some(Arc::new(MapSource::new(&base.path, disk.size, base.everything))))
    };
    let maps = disks.iter().map(map_of).collect::<Result<_>>()?;
    Ok((VolumeMap::new(volume, maps), full_reason))
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

/// The map since the checkpoint of this identity; None: it is not known (any more).
pub(super) fn since_uuid(status: &Status, disk: &ManifestDisk, dir: &Path, uuid: Uuid) -> Result<Option<Base>> {
    let Some(name) = status.checkpoint_name(&disk.name, uuid) else { return Ok(None) };
    let base = since_point(status, disk, dir, &name)?;
    Ok(base.point.as_ref().is_some_and(|point| point.uuid == uuid).then_some(base))
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
