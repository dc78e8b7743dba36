//! What status, manifest and lists show. Field names are part of the user's contract.

use super::fleece::Fleece;
use super::snapshot::Snapshot;
use super::volume_info::DiskContent;
use crate::bitmap::{CheckpointState, Consistency, HookNote, Notes};
use crate::units::human_size;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use uuid::Uuid;

/// A checkpoint, by its name on all disks that have it.
#[derive(Debug, Clone, Serialize)]
pub struct CheckpointInfo {
    /// The name.
    pub name: String,
    /// The identity.
    pub uuid: Uuid,
    /// The instant, RFC 3339, UTC.
    pub time: String,
    /// One row a disk.
    pub disks: Vec<CheckpointDisk>,
}

/// A checkpoint on one disk.
#[derive(Debug, Clone, Serialize)]
pub struct CheckpointDisk {
    /// The disk.
    pub disk: String,
    /// Whether the snapshot that made it was read to its end.
    pub completed: bool,
    /// Whether guest writes are marked in it now.
    pub recording: bool,
    /// Bytes per bit.
    pub granularity: u64,
    /// Bytes that may have changed from here to the next checkpoint, or to now.
    pub dirty: u64,
    /// Why everything counts as changed, if it does.
    pub everything: Option<String>,
}

/// A consumer.
#[derive(Debug, Clone, Serialize)]
pub struct ConsumerInfo {
    /// The name.
    pub name: String,
    /// Name of the checkpoint that it last finished; empty where that is gone.
    pub checkpoint: String,
    /// Identity of that checkpoint.
    pub uuid: Uuid,
    /// The disks on which it points there.
    pub disks: Vec<String>,
}

/// A disk.
#[derive(Debug, Clone, Serialize)]
pub struct DiskInfo {
    /// The name.
    pub name: String,
    /// The identity.
    pub uuid: Uuid,
    /// What other mounts called it, from which checkpoints were imported.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub identities: Vec<Uuid>,
    /// The image's file.
    pub image: PathBuf,
    /// The image's format.
    pub format: String,
    /// The internal snapshot of the image that is served, by name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<String>,
    /// Size in bytes.
    pub size: u64,
    /// Whether guest writes are refused.
    pub read_only: bool,
    /// The state directory.
    pub state: PathBuf,
    /// How far maps since the newest checkpoint can be believed now: `exact`, with how that was found at mount (`exact
    /// after a power loss but for N regions of SIZE`) or which checkpoint it goes back to, or `everything: REASON`.
    pub tracking: String,
    /// Why they say everything, and since when, where they do.
    pub tracking_lost: Option<TrackingLoss>,
    /// What tells whether another program wrote to the image: `stamp`, the times of its files; `mark`, in the image.
    pub guards: Vec<&'static str>,
    /// Open files of the live disk.
    pub opens: u64,
    /// Bytes in the stores of this disk.
    pub store_bytes: u64,
    /// The volumes in it, and what it is itself.
    #[serde(flatten)]
    pub holds: DiskContent,
}

/// Changes of a disk are not known.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TrackingLoss {
    /// Why.
    pub reason: String,
    /// Since when at the latest, RFC 3339, UTC.
    pub since: String,
}

/// A snapshot.
#[derive(Debug, Clone, Serialize)]
pub struct SnapshotInfo {
    /// The name.
    pub name: String,
    /// The identity.
    pub uuid: Uuid,
    /// The instant, RFC 3339, UTC.
    pub time: String,
    /// What a restored disk finds, as far as its maker says.
    pub consistency: Consistency,
    /// Whether a view of it can no longer be read.
    pub broken: bool,
    /// One row a disk.
    pub disks: Vec<SnapshotDisk>,
}

/// A frozen view of one disk.
#[derive(Debug, Clone, Serialize)]
pub struct SnapshotDisk {
    /// The disk.
    pub name: String,
    /// Size at the instant in bytes.
    pub size: u64,
    /// The checkpoint made with it.
    pub checkpoint: String,
    /// The reference point of its map.
    pub reference: Option<String>,
    /// Why its map says that everything changed, if it does.
    pub full_reason: Option<String>,
    /// Why it can no longer be read, if so.
    pub broken: Option<String>,
    /// Bytes in its store.
    pub store_bytes: u64,
    /// What it leaves out, if anything.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub skipped: Option<SkippedInfo>,
}

/// What a view leaves out, which reads as zeros.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SkippedInfo {
    /// `swap`, `free`.
    pub kinds: Vec<String>,
    /// Bytes.
    pub bytes: u64,
}

impl SkippedInfo {
    /// In words: `2.0 MiB left out, which read as zeros (swap,free)`.
    pub fn text(&self) -> String {
        let kinds = self.kinds.join(",");
        format!("{} left out, which read as zeros ({})", human_size(self.bytes), kinds.escape_debug())
    }

    fn of(view: &super::View) -> Option<SkippedInfo> {
        view.skipped().map(|(kinds, bytes)| SkippedInfo { kinds: kinds.to_vec(), bytes })
    }
}

/// The manifest of a snapshot.
#[derive(Debug, Serialize)]
struct Manifest<'a> {
    version: u32,
    name: &'a str,
    uuid: Uuid,
    time: String,
    consistency: Consistency,
    hooks: Vec<HookNote>,
    disks: Vec<ManifestDisk>,
    /// What is wrong with partition tables, at most one line a disk.
    volume_warnings: Vec<String>,
}

#[derive(Debug, Serialize)]
struct ManifestDisk {
    name: String,
    image: PathBuf,
    format: String,
    size: u64,
    checkpoint: String,
    checkpoint_uuid: Uuid,
    /// None: everything counts as changed.
    reference: Option<String>,
    reference_uuid: Option<Uuid>,
    /// Names of the earlier points, oldest first.
    since: Vec<String>,
    full_reason: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    skipped: Option<SkippedInfo>,
    /// The volumes in it, and what it is itself.
    #[serde(flatten)]
    holds: DiskContent,
}

/// Version of the manifest's fields.
const MANIFEST_VERSION: u32 = 1;

/// A time as RFC 3339 in UTC.
pub(super) fn rfc3339(time_ns: i64) -> String {
    jiff::Timestamp::from_nanosecond(i128::from(time_ns)).map(|time| time.to_string()).unwrap_or_default()
}

impl Snapshot {
    /// What was frozen, and what its maps count from.
    pub fn manifest(&self) -> serde_json::Value {
        let Notes { consistency, hooks } = self.notes();
        let volumes = self.volumes();
        let manifest = Manifest {
            version: MANIFEST_VERSION,
            name: self.name(),
            uuid: self.uuid(),
            time: rfc3339(self.time_ns()),
            consistency,
            hooks,
            disks: self
                .views()
                .iter()
                .map(|view| ManifestDisk {
                    name: view.disk_name().to_owned(),
                    image: view.image_path().to_owned(),
                    format: view.disk.format().to_string(),
                    size: view.size(),
                    checkpoint: view.checkpoint().name,
                    checkpoint_uuid: view.checkpoint().uuid,
                    reference: view.reference().map(|point| point.name),
                    reference_uuid: view.reference().map(|point| point.uuid),
                    since: view.since().into_iter().map(|point| point.name).collect(),
                    full_reason: view.full_reason(),
                    skipped: SkippedInfo::of(view),
                    holds: DiskContent::of_view(&volumes, view),
                })
                .collect(),
            volume_warnings: volumes.warnings().to_vec(),
        };
        serde_json::to_value(manifest).unwrap_or_default()
    }
}

impl Fleece {
    /// The disks, in name order.
    pub fn disk_infos(&self) -> Vec<DiskInfo> {
        let volumes = self.live_volumes_soon();
        let info = |disk: std::sync::Arc<super::Disk>| DiskInfo {
            name: disk.name().to_owned(),
            uuid: disk.uuid(),
            identities: disk.tracking.directory().identities.clone(),
            image: disk.image_path().to_owned(),
            format: disk.format().to_string(),
            snapshot: disk.internal_snapshot().map(str::to_owned),
            size: disk.size(),
            read_only: disk.read_only(),
            state: disk.state.path(""),
            tracking: disk.tracking_text(),
            tracking_lost: disk.tracking_loss_info(),
            guards: disk.guards(),
            opens: disk.opens(),
            store_bytes: disk.chain.load().layers.iter().map(|layer| layer.store.bytes()).sum(),
            holds: volumes.as_ref().map(|volumes| DiskContent::of_disk(volumes, &disk)).unwrap_or_default(),
        };
        self.disks().into_iter().map(info).collect()
    }

    /// The snapshots, oldest first.
    pub fn snapshot_infos(&self) -> Vec<SnapshotInfo> {
        let disk = |view: &std::sync::Arc<super::View>| SnapshotDisk {
            name: view.disk_name().to_owned(),
            size: view.size(),
            checkpoint: view.checkpoint().name,
            reference: view.reference().map(|point| point.name),
            full_reason: view.full_reason(),
            broken: view.broken(),
            store_bytes: view.store_bytes(),
            skipped: SkippedInfo::of(view),
        };
        self.snapshots()
            .iter()
            .map(|snapshot| SnapshotInfo {
                name: snapshot.name().to_owned(),
                uuid: snapshot.uuid(),
                time: rfc3339(snapshot.time_ns()),
                consistency: snapshot.notes().consistency,
                broken: snapshot.broken().is_some(),
                disks: snapshot.views().iter().map(disk).collect(),
            })
            .collect()
    }

    /// The checkpoints, oldest first, one row a name.
    pub fn checkpoints(&self) -> Vec<CheckpointInfo> {
        let mut rows: Vec<(i64, CheckpointInfo)> = Vec::new();
        for disk in self.disks() {
            for entry in &disk.tracking.directory().checkpoints {
                let row = CheckpointDisk {
                    disk: disk.name().to_owned(),
                    completed: entry.completed,
                    recording: entry.state == CheckpointState::Recording,
                    granularity: entry.bitmap.granularity,
                    dirty: disk.tracking.dirty_bytes(entry),
                    everything: entry.bitmap.everything.clone(),
                };
                match rows.iter_mut().find(|(_, info)| info.uuid == entry.uuid) {
                    Some((_, info)) => info.disks.push(row),
                    None => rows.push((
                        entry.time_ns,
                        CheckpointInfo {
                            name: entry.name.clone(),
                            uuid: entry.uuid,
                            time: rfc3339(entry.time_ns),
                            disks: vec![row],
                        },
                    )),
                }
            }
        }
        rows.sort_by_key(|(time_ns, _)| *time_ns);
        rows.into_iter().map(|(_, info)| info).collect()
    }

    /// The consumers, by name.
    pub fn consumers(&self) -> Vec<ConsumerInfo> {
        let mut rows: Vec<ConsumerInfo> = Vec::new();
        for disk in self.disks() {
            let directory = disk.tracking.directory();
            for consumer in &directory.consumers {
                let same = |row: &&mut ConsumerInfo| row.name == consumer.name && row.uuid == consumer.checkpoint;
                if let Some(row) = rows.iter_mut().find(same) {
                    row.disks.push(disk.name().to_owned());
                    continue;
                }
                let checkpoint = directory.checkpoints.iter().find(|entry| entry.uuid == consumer.checkpoint);
                rows.push(ConsumerInfo {
                    name: consumer.name.clone(),
                    checkpoint: checkpoint.map(|entry| entry.name.clone()).unwrap_or_default(),
                    uuid: consumer.checkpoint,
                    disks: vec![disk.name().to_owned()],
                });
            }
        }
        rows.sort_by(|a, b| a.name.cmp(&b.name));
        rows
    }

    /// What needs an operator: broken views, lost tracking, stores past 80 %, a recovered crash. Empty where all is well.
    pub fn problems(&self) -> Vec<String> {
        let mut problems: Vec<_> = self.recovered.lock().iter().map(|(_, text)| text.clone()).collect();
        for snapshot in self.snapshots() {
            for view in snapshot.views() {
                if let Some(reason) = view.broken() {
                    problems.push(format!(
                        "snapshot '{}', disk '{}': broken: {reason}",
                        snapshot.name(),
                        view.disk_name()
                    ));
                }
            }
        }
        for disk in self.disks() {
            problems.extend(disk.tracking_problems());
            if let Some(what) = &*disk.misplaced.lock() {
                problems.push(format!("disk '{}': {what}", disk.name()));
            }
            if disk.store_io.nearly_full() {
                problems.push(format!("disk '{}': its stores are past 80 % of what they may take", disk.name()));
            }
        }
        problems
    }
}
