//! `fleecefs restore`: what a disk held at a point of a backup, into a file, a block device or a live disk.

use super::connect::{Mount, read_reply};
use super::consumer::ConsumerLock;
use super::map::{ManifestDisk, Status, since_uuid};
use super::output::{Out, complain, printable};
use super::progress::Progress;
use super::{Exit, JsonArg, snapshot};
use crate::backup::chain::{self, Content, Link, Point};
use crate::backup::restore::{self, Destination, Kind, Report};
use crate::backup::restore_volume::{self, VolumeContent, VolumeImage};
use crate::backup::{ExtentSource, MapSource};
use crate::error::{Error, Result, errno};
use crate::fleece::SkippedInfo;
use crate::image::Image;
use crate::storage::process;
use crate::units::human_size;
use crate::volume::Volume;
use clap::Args;
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use uuid::Uuid;

/// How often is looked again whether a live disk is still open, and how long between: the kernel tells of a close late.
const CLOSE_TRIES: u32 = 20;
const CLOSE_WAIT: Duration = Duration::from_millis(50);

/// How the snapshots are named that tell what changed: the disk's name and a UUID stand behind it.
const SNAPSHOT_PREFIX: &str = "restore-";

/// The disk to which the restore writes, or wrote, that took a snapshot of this name; None: no restore did.
pub fn restored_disk(snapshot: &str) -> Option<&str> {
    disk_of(snapshot, SNAPSHOT_PREFIX)
}

/// The disk in the name of a snapshot that is taken for a moment: the prefix, the disk and a UUID.
pub fn disk_of<'a>(snapshot: &'a str, prefix: &str) -> Option<&'a str> {
    let (disk, id) = snapshot.strip_prefix(prefix)?.rsplit_once('-')?;
    (id.len() == uuid::fmt::Simple::LENGTH && Uuid::try_parse(id).is_ok()).then_some(disk)
}

/// Arguments of `restore`.
#[derive(Debug, Args)]
pub struct RestoreArgs {
    /// A point of a backup, or a directory of points for the newest
    backup: PathBuf,
    /// A file, made where it is absent; a block device; or a live disk (MNT/live/DISK.raw)
    #[arg(long, value_name = "TARGET")]
    to: PathBuf,
    /// The disk [default: the only one]
    #[arg(long, value_name = "D")]
    disk: Option<String>,
    /// One volume (partition, or logical volume VG-LV) of the disk; on a live disk, into the volume of that name
    #[arg(long, value_name = "V")]
    volume: Option<String>,
    /// Write only what differs; on a live disk that knows the point, look only at what changed since
    #[arg(long)]
    changed_only: bool,
    /// Check the checksums of the chain before, and compare all of the target after; exit code 1 where it differs
    #[arg(long)]
    verify: bool,
    /// Write to a target that is in use, and cut a file that is larger than the disk
    #[arg(long)]
    force: bool,
    /// Only say what would be written
    #[arg(long)]
    dry_run: bool,
    /// Threads that read and write
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64), default_value = "4")]
    threads: u16,
    /// Show how far it is
    #[arg(short = 'p', long)]
    progress: bool,
    #[command(flatten)]
    json: JsonArg,
}

/// A running mount, and which of its live disks the target is.
struct Live {
    mount: Mount,
    disks: Vec<StatusDisk>,
    index: usize,
}

#[derive(Deserialize)]
struct StatusDisk {
    name: String,
    uuid: Uuid,
    #[serde(default)]
    identities: Vec<Uuid>,
    image: PathBuf,
    size: u64,
    read_only: bool,
    opens: u64,
}

impl StatusDisk {
    /// Whether it has this identity, or had it on a mount from which a checkpoint was imported.
    fn is(&self, uuid: Uuid) -> bool {
        self.uuid == uuid || self.identities.contains(&uuid)
    }
}

/// What is restored.
struct Wanted {
    content: Box<dyn Content>,
    /// The chains of all disks that were looked at.
    chains: Vec<Vec<Link>>,
    /// Where only a volume of them is meant.
    volume: Option<Volume>,
    /// In words.
    what: String,
}

impl Wanted {
    /// What the point left out of each disk that is looked at. What came into the chain before is not restored there: the
    /// point's own map has it as zeros.
    fn skipped(&self) -> Vec<Skipped> {
        let tops = self.chains.iter().filter_map(|links| links.first());
        let left_out = |top: &Link| Some(Skipped { disk: top.entry.name.clone(), entry: top.entry.skipped.clone()? });
        tops.filter_map(left_out).collect()
    }
}

/// What a point left out of a disk.
#[derive(Serialize)]
struct Skipped {
    disk: String,
    #[serde(flatten)]
    entry: SkippedInfo,
}

/// Where it goes.
enum Place {
    /// A file, a device, or a whole live disk.
    One(Destination),
    /// A volume of live disks; those that it does not lie on are None.
    Volume(Vec<Option<Destination>>, Volume),
}

impl RestoreArgs {
    /// Restores; [`Exit::Differs`] where `--verify` finds a difference.
    pub fn run(&self) -> Result<Exit> {
        process::ignore_file_size_signal();
        // A chain is many files.
        process::raise_open_file_limit()?;
        let point = chain::point_at(&self.backup)?;
        let wanted = match &self.volume {
            None => self.disk(&point)?,
            Some(name) => self.volume(&point, name)?,
        };
        for Skipped { disk, entry } in wanted.skipped() {
            complain(&format!(
                "fleecefs: disk '{disk}' of point '{}': {}",
                printable(&point.manifest.point),
                entry.text()
            ));
        }
        let live = Live::find(&self.to)?;
        let place = self.place(&wanted, live.as_ref())?;
        let progress = Progress::start(self.progress)?;
        if self.verify {
            self.check_sums(&wanted.chains, &progress)?;
        }
        let content = &*wanted.content;
        let changed = match &live {
            Some(live) if self.changed_only && !self.dry_run => self.changed_since(live, &wanted, &place)?,
            _ => None,
        };
        let ranges = changed.as_deref();
        let data_bytes = restore::data_bytes(content, ranges, &progress)?;
        let looked_at =
            ranges.map_or(content.size(), |ranges| ranges.iter().map(|range| range.end - range.start).sum());
        self.say(&json!({
            "point": point.manifest.point, "time": point.manifest.time, "what": wanted.what, "size": content.size(),
            "target": self.to, "target_kind": place.text(), "target_size": place.found_bytes(),
            "changed_only": self.changed_only, "range_bytes": looked_at, "data_bytes": data_bytes,
            "skipped": wanted.skipped(),
        }))?;
        if self.dry_run {
            return Ok(Exit::Done);
        }
        let (target, fresh) = place.open(data_bytes)?;
        let threads = usize::from(self.threads);
        progress.begin("restore", looked_at);
        let restored = restore::restore(content, &*target, ranges, self.changed_only, fresh, threads, &progress);
        progress.end();
        let report = restored.map_err(|e| self.half_done(e))?;
        let mut difference = None;
        if self.verify {
            progress.begin("verify", content.size());
            let found = restore::first_difference(content, &*target, threads, &progress);
            progress.end();
            difference = found?;
        }
        target.close()?;
        self.report(&report, &wanted.skipped(), difference)
    }

    fn disk(&self, point: &Point) -> Result<Wanted> {
        let links = chain::links(point, &self.disk_of(point)?)?;
        let what = format!("disk {}", links.first().map_or("", |top| top.entry.name.as_str()));
        Ok(Wanted { content: chain::content(&links)?, chains: vec![links], volume: None, what })
    }

    /// A volume may lie on any disk of the point.
    fn volume(&self, point: &Point, name: &str) -> Result<Wanted> {
        let home = self.disk.as_deref();
        home.map_or(Ok(()), |disk| point.manifest.disk(disk).map(drop))?;
        let (mut disks, mut chains) = (Vec::new(), Vec::new());
        for entry in &point.manifest.disks {
            let links = chain::links(point, &entry.name)?;
            disks.push((entry.name.clone(), chain::content(&links)?));
            chains.push(links);
        }
        let found = restore_volume::find_in_contents(&disks, name, home)?;
        let home = disks.get(found.home()).map_or("", |(name, _)| name.as_str());
        let what = format!("volume {} of disk {home}", found.name);
        Ok(Wanted {
            content: Box::new(VolumeContent { disks, volume: found.clone() }),
            chains,
            volume: Some(found),
            what,
        })
    }

    /// Looks at the target, and refuses what must not be written to.
    fn place(&self, wanted: &Wanted, live: Option<&Live>) -> Result<Place> {
        let image = live.and_then(Live::disk).map(|disk| disk.image.as_path());
        for links in &wanted.chains {
            restore::check_apart(&self.to, image, links)?;
        }
        let size = wanted.content.size();
        let (Some(live), Some(wanted_volume)) = (live, &wanted.volume) else {
            let destination = Destination::look(&self.to, live.is_some(), size, self.force)?;
            if let Some(live) = live {
                self.check_unused(live, live.index)?;
                if destination.found_bytes > size {
                    let more = destination.found_bytes - size;
                    complain(&format!(
                        "fleecefs: the disk is larger than the backup: its last {more} bytes stay as they are"
                    ));
                }
            }
            return Ok(Place::One(destination));
        };
        let images =
            live.disks.iter().map(|disk| Ok((disk.name.clone(), restore::open_for_reading(&live.path(disk))?)));
        let images = images.collect::<Result<Vec<_>>>()?;
        let home = live.disk().map(|disk| disk.name.as_str());
        let there = restore_volume::find_in_images(&images, &wanted_volume.name, home)?;
        restore_volume::check_same(wanted_volume, &there, self.force)?;
        drop(images);
        let used = |index: usize| there.segments.iter().flat_map(|s| &s.places).any(|place| place.disk == index);
        let mut destinations = Vec::new();
        for (index, disk) in live.disks.iter().enumerate() {
            if !used(index) {
                destinations.push(None);
                continue;
            }
            for links in &wanted.chains {
                restore::check_apart(&live.path(disk), Some(&disk.image), links)?;
            }
            self.check_unused(live, index)?;
            destinations.push(Some(Destination::look(&live.path(disk), true, disk.size, self.force)?));
        }
        Ok(Place::Volume(destinations, there))
    }

    fn disk_of(&self, point: &Point) -> Result<String> {
        match (&self.disk, point.manifest.disks.as_slice()) {
            (Some(name), _) => point.manifest.disk(name).map(|entry| entry.name.clone()),
            (None, [only]) => Ok(only.name.clone()),
            (None, all) => {
                let names: Vec<_> = all.iter().map(|disk| disk.name.as_str()).collect();
                Err(Error::new(errno::EINVAL, format!("point '{}'", point.manifest.point), "it has several disks")
                    .hint(format!("give one with --disk: {}", names.join(" "))))
            }
        }
    }

    /// Refuses a live disk that somebody has open.
    fn check_unused(&self, live: &Live, index: usize) -> Result<()> {
        let Some(disk) = live.disks.get(index) else { return Ok(()) };
        let what = || format!("live disk '{}'", disk.name);
        if disk.read_only {
            return Err(Error::new(errno::EROFS, what(), "it is served read-only").hint("mount it without -r"));
        }
        let mut opens = disk.opens;
        for _ in 0..CLOSE_TRIES {
            if opens == 0 || self.force {
                return Ok(());
            }
            std::thread::sleep(CLOSE_WAIT);
            opens = Live::find(&self.to)?.and_then(|live| live.disks.get(index).map(|disk| disk.opens)).unwrap_or(0);
        }
        Err(Error::new(errno::EBUSY, what(), format!("in use: {opens} open file(s) of it"))
            .at_path(&self.to)
            .hint("shut the guest down first; with --force it is overwritten under it"))
    }

    fn check_sums(&self, chains: &[Vec<Link>], progress: &Progress) -> Result<()> {
        let links = &chains.concat();
        let size = |path: PathBuf| std::fs::metadata(path).map_or(0, |meta| meta.len());
        progress.begin("checksums", links.iter().flat_map(|link| link.files().map(size).collect::<Vec<_>>()).sum());
        let sum_of = |link: &Link, name: &str| {
            let manifest = Point::open(&link.dir).ok()?.manifest;
            manifest.file(name).map(|file| file.sha256.clone())
        };
        let checked = restore::check_sums(links, &sum_of, progress);
        progress.end();
        checked
    }

    /// What may have changed of the target since the point, where its checkpoints know that; None: anything.
    fn changed_since(&self, live: &Live, wanted: &Wanted, place: &Place) -> Result<Option<Vec<Range<u64>>>> {
        let top_of = |disk: &StatusDisk| {
            wanted.chains.iter().filter_map(|links| links.first()).find(|top| disk.is(top.entry.uuid))
        };
        let (Place::Volume(_, there), Some(before)) = (place, &wanted.volume) else {
            let (Some(disk), [links]) = (live.disk(), wanted.chains.as_slice()) else { return Ok(None) };
            let top = links.first().filter(|top| disk.is(top.entry.uuid));
            return live.changed_since(disk, top);
        };
        // What did not change on a disk is what the volume had there only where the volume lies as it lay, on the same disks.
        let is_of = |(disk, links): (&StatusDisk, &Vec<Link>)| links.first().is_some_and(|top| disk.is(top.entry.uuid));
        let same_disks = live.disks.len() == wanted.chains.len() && live.disks.iter().zip(&wanted.chains).all(is_of);
        if there.segments != before.segments || !same_disks {
            complain("fleecefs: the volume, or a disk, lies elsewhere now: all of the volume is compared");
            return Ok(None);
        }
        let used = |index: usize| there.segments.iter().flat_map(|s| &s.places).any(|place| place.disk == index);
        let mut ranges = Vec::new();
        for (index, disk) in live.disks.iter().enumerate() {
            ranges.push(if used(index) { live.changed_since(disk, top_of(disk))? } else { Some(Vec::new()) });
        }
        Ok(Some(restore_volume::ranges_in(there, &ranges)))
    }

    /// What will be written, before it is.
    fn say(&self, plan: &serde_json::Value) -> Result<()> {
        if self.json.json {
            return if self.dry_run { Out::new().json(plan) } else { Ok(()) };
        }
        let text = |key: &str| printable(plan[key].as_str().unwrap_or_default());
        let size = |key: &str| human_size(plan[key].as_u64().unwrap_or_default());
        let mut out = Out::new();
        out.line(format!("from  point '{}' of {}, {}, {}", text("point"), text("time"), text("what"), size("size")))?;
        out.line(format!("to    {}, {}, {}", text("target"), text("target_kind"), size("target_size")))?;
        let how = if self.changed_only { "what differs" } else { "everything" };
        out.line(format!("write {how} of {}: {} of data, the rest zeros", size("range_bytes"), size("data_bytes")))
    }

    fn half_done(&self, e: Error) -> Error {
        let first = e.hint_text().map_or(String::new(), |hint| format!("{hint}. "));
        e.hint(format!(
            "{first}{} holds parts of both now: run the same command again (with --changed-only it writes only what is missing)",
            self.to.display()
        ))
    }

    fn report(&self, report: &Report, skipped: &[Skipped], difference: Option<u64>) -> Result<Exit> {
        let mut out = Out::new();
        if self.json.json {
            let mut reply = json!(report);
            reply["skipped"] = json!(skipped);
            reply["verified"] = json!(self.verify.then_some(difference.is_none()));
            reply["first_difference"] = json!(difference);
            out.json(&reply)?;
        } else {
            out.line(format!(
                "done  {} written, {} zeroed; {} read of the backup, {} of the target",
                human_size(report.written),
                human_size(report.zeroed),
                human_size(report.chain_read),
                human_size(report.target_read)
            ))?;
        }
        let Some(offset) = difference else { return Ok(Exit::Done) };
        complain(&format!("fleecefs: verify {}: it differs from the backup at offset {offset}", self.to.display()));
        Ok(Exit::Differs)
    }
}

impl Place {
    fn text(&self) -> &'static str {
        match self {
            Place::One(destination) => destination.kind.text(),
            Place::Volume(..) => "a volume of a live disk",
        }
    }

    fn found_bytes(&self) -> u64 {
        match self {
            Place::One(destination) => destination.found_bytes,
            Place::Volume(_, volume) => volume.size,
        }
    }

    /// Opens it, and says whether it is known to hold zeros alone.
    fn open(&self, data_bytes: u64) -> Result<(Arc<dyn Image>, bool)> {
        match self {
            Place::One(destination) => {
                destination.check_space(data_bytes)?;
                Ok((destination.open()?, destination.kind == Kind::NewFile))
            }
            Place::Volume(destinations, volume) => {
                let open = |one: &Option<Destination>| one.as_ref().map(Destination::open).transpose();
                let disks = destinations.iter().map(open).collect::<Result<Vec<_>>>()?;
                Ok((Arc::new(VolumeImage { disks, volume: volume.clone() }), false))
            }
        }
    }
}

impl Live {
    /// The live disk that a path is, if it is one.
    fn find(path: &Path) -> Result<Option<Live>> {
        // A link to a live disk is that disk. What cannot be followed, such as into a dead mount, is told of later.
        let Ok(path) = path.canonicalize().or_else(|_| std::path::absolute(path)) else { return Ok(None) };
        let parts = || {
            let dir = path.parent().filter(|dir| dir.file_name().is_some_and(|name| name == "live"))?;
            let name = path.file_name()?.to_str()?.strip_suffix(".raw")?;
            Some((dir.parent()?, name))
        };
        let Some((root, name)) = parts() else { return Ok(None) };
        if !root.join("status.json").exists() {
            return Ok(None);
        }
        #[derive(Deserialize)]
        struct Disks {
            disks: Vec<StatusDisk>,
        }
        let mount = Mount::find(root)?;
        let Disks { disks } = read_reply(&mount.status)?;
        let index = disks.iter().position(|disk| disk.name == name);
        Ok(index.map(|index| Live { mount, disks, index }))
    }

    fn disk(&self) -> Option<&StatusDisk> {
        self.disks.get(self.index)
    }

    fn path(&self, disk: &StatusDisk) -> PathBuf {
        self.mount.path.join("live").join(format!("{}.raw", disk.name))
    }

    /// What may have changed on a disk since its point `top`; None: that is not known.
    fn changed_since(&self, disk: &StatusDisk, top: Option<&Link>) -> Result<Option<Vec<Range<u64>>>> {
        let status: Status = read_reply(&self.mount.status)?;
        let known = top.and_then(|top| Some((top, status.checkpoint_name(&disk.name, top.entry.checkpoint_uuid)?)));
        let Some((top, since)) = known else {
            complain(&format!(
                "fleecefs: disk '{}' does not know this point's checkpoint: all of it is compared",
                disk.name
            ));
            return Ok(None);
        };
        // Held as long as the snapshot is there: one that is found under it was left by a restore that was killed.
        let _lock = ConsumerLock::take(&self.mount, &format!("restore to disk {}", disk.name)).map_err(|e| {
            let busy =
                || Error::new(errno::EBUSY, "restore", format!("another one to disk '{}' begins just now", disk.name));
            if e.errno() == errno::EBUSY { busy() } else { e }
        })?;
        self.cancel_left(disk)?;
        // A snapshot for a moment: maps are a view's. What it left out would be in its map, and in the next one.
        let name = format!("{SNAPSHOT_PREFIX}{}-{}", disk.name, Uuid::new_v4().simple());
        let reply = self.mount.execute(
            "fleecefs-snapshot-create",
            json!({ "name": name, "disks": [disk.name], "since": since, "skip": [] }),
        )?;
        let ranges = self.changed_ranges(&name, &reply, disk, top);
        let cancelled = self.mount.execute("fleecefs-snapshot-cancel", json!({ "name": name }));
        let ranges = ranges?;
        cancelled?;
        if ranges.is_none() {
            complain(&format!(
                "fleecefs: disk '{}': what changed since this point is not known: all is compared",
                disk.name
            ));
        }
        Ok(ranges)
    }

    /// Cancels the snapshots that restores to this disk left when they were killed: as long as they are there, the guest pays
    /// for them.
    fn cancel_left(&self, disk: &StatusDisk) -> Result<()> {
        let rows = snapshot::rows(&self.mount)?;
        for name in rows.iter().map(snapshot::Row::name).filter(|name| restored_disk(name) == Some(&disk.name)) {
            complain(&format!("fleecefs: snapshot '{name}' was left by a restore that was killed: it is cancelled"));
            self.mount.execute("fleecefs-snapshot-cancel", json!({ "name": name }))?;
        }
        Ok(())
    }

    fn changed_ranges(
        &self,
        snapshot: &str,
        reply: &serde_json::Value,
        disk: &StatusDisk,
        top: &Link,
    ) -> Result<Option<Vec<Range<u64>>>> {
        #[derive(Deserialize)]
        struct Taken {
            disks: Vec<ManifestDisk>,
        }
        let taken: Taken = read_reply(reply)?;
        let status: Status = read_reply(&Mount::find(&self.mount.path)?.status)?;
        let Some(taken) = taken.disks.iter().find(|row| row.name == disk.name) else { return Ok(None) };
        let dir = self.mount.path.join("snapshots").join(snapshot);
        let Some(base) = since_uuid(&status, taken, &dir, top.entry.checkpoint_uuid)? else { return Ok(None) };
        if base.full_reason.is_some() {
            return Ok(None);
        }
        let map = MapSource::new(&base.path, taken.size, false);
        let mut ranges = chain::dirty_ranges(map.extents_from(0)?)?;
        // What grew since the point was taken is not in it.
        ranges.retain_mut(|range| {
            range.end = range.end.min(top.entry.size);
            range.start < range.end
        });
        Ok(Some(ranges))
    }
}
