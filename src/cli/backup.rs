//! `fleecefs backup`: a new point of a chain from a snapshot of a mount, as its client.
//!
//! In this order: what an earlier run left is ended (a snapshot of a whole point is completed, an interrupted copy is gone
//! on with); a point is begun; the snapshot is taken; each disk is copied; the point is published; the snapshot is
//! completed, and with it the consumer moves. `backup::save` says why that order.

mod left;

use super::connect::{Mount, read_reply};
use super::consumer::ConsumerLock;
use super::freeze::FreezeArgs;
use super::map::{Base, ManifestDisk, Status, since_uuid};
use super::output::{Out, complain, printable};
use super::progress::Progress;
use super::snapshot::SkipArg;
use super::{Exit, JsonArg, snapshot};
use crate::backup::chain::{self, Link, MAX_LINKS, Point};
use crate::backup::manifest::{BaseEntry, DiskEntry, Manifest};
use crate::backup::save::{Compression, Draft, Effort, Failure, Partial, Settings, Shelf};
use crate::backup::{MapMeta, MapSource, Totals};
use crate::error::{Error, Result, errno};
use crate::image::Format;
use crate::storage::process;
use crate::units::{check_disk_name, check_name, human_size, parse_size};
use clap::{Args, ValueEnum};
use serde::Deserialize;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use uuid::Uuid;

/// Most points of one second that are told apart by a number.
const MAX_SAME_NAMES: u32 = 100;

/// Arguments of `backup`.
#[derive(Debug, Args)]
pub struct BackupArgs {
    /// The mount
    mnt: PathBuf,
    /// The directory with all points of the backup; made where it is absent
    #[arg(long, value_name = "DIR")]
    to: PathBuf,
    /// A disk to back up [default: all]
    #[arg(long = "disk", value_name = "D")]
    disks: Vec<String>,
    /// Copy everything, whatever there is to build on
    #[arg(long, conflicts_with = "consumer")]
    full: bool,
    /// Copy what changed since this consumer's checkpoint, and move it when all is safe; exit code 3 where that cannot be
    /// had and everything was copied [default: since the newest point in DIR that the mount still knows]
    #[arg(long, value_name = "C")]
    consumer: Option<String>,
    /// Name of the point, of its snapshot and checkpoint [default: the time]
    #[arg(long, value_name = "N")]
    name: Option<String>,
    /// Format of the files
    #[arg(long, value_enum, default_value = "qcow2")]
    format: FormatArg,
    /// Compress qcow2 files
    #[arg(long, value_enum, value_name = "HOW", num_args = 0..=1, require_equals = true, default_missing_value = "zstd")]
    compress: Option<CompressArg>,
    /// Bytes per second that are read at most
    #[arg(long, value_name = "SIZE", value_parser = |text: &str| parse_size(text).map_err(|e| e.to_string()), default_value = "0", hide_default_value = true)]
    rate: u64,
    /// Threads that read and write
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64), default_value = "4")]
    threads: u16,
    /// Give up what an interrupted run left, and begin anew
    #[arg(long)]
    restart: bool,
    /// Show how far it is
    #[arg(short = 'p', long)]
    progress: bool,
    #[command(flatten)]
    skip: SkipArg,
    #[command(flatten)]
    freeze: FreezeArgs,
    #[command(flatten)]
    json: JsonArg,
}

/// Formats of a point's files.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum FormatArg {
    Qcow2,
    Raw,
}

/// How clusters are compressed.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum CompressArg {
    Zstd,
    Zlib,
}

/// What a backup needs of a snapshot's manifest.
#[derive(Deserialize)]
struct Taken {
    uuid: Uuid,
    time: String,
    consistency: String,
    hooks: Value,
    disks: Vec<ManifestDisk>,
}

/// How one disk is copied.
struct Plan {
    view: PathBuf,
    map: MapSource,
    meta: MapMeta,
    totals: Totals,
}

impl BackupArgs {
    /// Runs the backup; [`Exit::Full`] where everything was copied although an increment was asked for.
    pub fn run(&self) -> Result<Exit> {
        let settings = self.settings()?;
        process::ignore_file_size_signal();
        // A chain is many files.
        process::raise_open_file_limit()?;
        let mount = Mount::find(&self.mnt)?;
        let _lock = self.consumer.as_deref().map(|consumer| ConsumerLock::take(&mount, consumer)).transpose()?;
        let shelf = Shelf::open(&self.to)?;
        left::end_finished(&mount, &shelf)?;
        let progress = Progress::start(self.progress)?;
        let (mut partial, plans) = match self.interrupted(&mount, &shelf, &settings)? {
            Some(going_on) => going_on,
            None => {
                let partial = self.begin(&mount, &shelf, settings)?;
                let plans = self.plans(&mount, &partial).map_err(|e| self.interrupted_error(&partial, e))?;
                (partial, plans)
            }
        };
        let effort = Effort { threads: usize::from(self.threads), rate: self.rate };
        for (index, plan) in plans.iter().enumerate() {
            if let Some(entry) = partial.draft.manifest.disks.get_mut(index) {
                (entry.changed_bytes, entry.zero_bytes) = (plan.totals.dirty, plan.totals.zero);
            }
            progress.begin(&plan.meta.disk, plan.totals.dirty);
            let copied = partial.copy_disk(index, &plan.view, &plan.map, &plan.meta, &effort, &progress);
            progress.end();
            if let Err(failure) = copied {
                return Err(self.ended_early(&mount, partial, failure));
            }
        }
        progress.begin("checksums", partial.bytes_to_hash());
        let published = partial.publish(&progress);
        progress.end();
        let dir = published.map_err(|e| self.interrupted_error(&partial, e))?;
        let manifest = partial.draft.manifest;
        complete(&mount, &shelf, &manifest)?;
        self.report(&dir, &manifest)
    }

    fn settings(&self) -> Result<Settings> {
        self.disks.iter().try_for_each(|disk| check_disk_name(disk))?;
        if let Some(consumer) = &self.consumer {
            check_name("consumer", consumer)?;
        }
        if let Some(name) = &self.name {
            check_name("point", name)?;
            if name.ends_with(crate::backup::manifest::PARTIAL) {
                return Err(Error::new(errno::EINVAL, format!("point '{name}'"), "points that are not whole end so"));
            }
        }
        let (format, compression) = match (self.format, self.compress) {
            (FormatArg::Raw, Some(_)) => {
                return Err(Error::new(errno::EINVAL, "--compress", "raw files are not compressed")
                    .hint("use --format qcow2, or a file system that compresses"));
            }
            (FormatArg::Raw, None) => (Format::Raw, None),
            (FormatArg::Qcow2, None) => (Format::Qcow2, None),
            (FormatArg::Qcow2, Some(CompressArg::Zstd)) => (Format::Qcow2, Some(Compression::Zstd)),
            (FormatArg::Qcow2, Some(CompressArg::Zlib)) => (Format::Qcow2, Some(Compression::Zlib)),
        };
        let mut disks = self.disks.clone();
        disks.sort();
        disks.dedup();
        Ok(Settings { disks, full: self.full, consumer: self.consumer.clone(), format, compression })
    }

    /// Begins a point and takes its snapshot.
    fn begin(&self, mount: &Mount, shelf: &Shelf, settings: Settings) -> Result<Partial> {
        let status: Status = read_reply(&mount.status)?;
        if let Some(unknown) = settings.disks.iter().find(|disk| status.disk_uuid(disk).is_none()) {
            return Err(Error::new(errno::ENOENT, format!("disk '{unknown}'"), "no such disk")
                .hint("`fleecefs status` lists the disks"));
        }
        let name = self.free_name(shelf, &status)?;
        let mut arguments = json!({ "name": name, "disks": settings.disks });
        match (&settings.consumer, self.newest_known(shelf, &status, &settings)?) {
            (Some(consumer), _) => arguments["consumer"] = json!(consumer),
            // Its checkpoint is kept as long as the snapshot counts from it.
            (None, Some(since)) => arguments["since"] = json!(since),
            (None, None) => {}
        }
        // Now, not only when it is to be taken: a snapshot that is there then has to be the one of this point.
        if snapshot::rows(mount)?.iter().any(|row| row.name() == name) {
            let cancel = format!("take another name, or `fleecefs snapshot cancel {} {name}`", self.mnt.display());
            return Err(Error::new(errno::EEXIST, format!("point '{name}'"), "a snapshot of that name exists")
                .hint(printable(&cancel)));
        }
        self.skip.add_to(&mut arguments);
        let mut manifest = Manifest::new(&name);
        manifest.consumer.clone_from(&settings.consumer);
        manifest.time = jiff::Timestamp::now().to_string();
        let mut partial = shelf.begin(Draft { settings, manifest, mount_disks: status.disk_uuids() })?;
        let reply = match self.freeze.create_snapshot(mount, arguments) {
            Ok(reply) => reply,
            Err(e) => {
                partial.discard()?;
                return Err(e);
            }
        };
        let taken: Taken = read_reply(&reply)?;
        self.fill(mount, shelf, &mut partial, &taken).map_err(|e| self.interrupted_error(&partial, e))?;
        Ok(partial)
    }

    /// A name that neither a point nor a snapshot nor a checkpoint has.
    fn free_name(&self, shelf: &Shelf, status: &Status) -> Result<String> {
        if let Some(name) = &self.name {
            return Ok(name.clone());
        }
        let now = jiff::Timestamp::now().strftime("%Y%m%dT%H%M%SZ").to_string();
        let names = (1..MAX_SAME_NAMES).map(|n| if n == 1 { now.clone() } else { format!("{now}-{n}") });
        names
            .into_iter()
            .find(|name| !shelf.has(name) && !status.has_checkpoint(name))
            .ok_or_else(|| Error::new(errno::EEXIST, format!("point '{now}'"), "exists already").hint("give a --name"))
    }

    /// The name of the checkpoint that the first disk will probably count from.
    fn newest_known(&self, shelf: &Shelf, status: &Status, settings: &Settings) -> Result<Option<String>> {
        if settings.full || settings.consumer.is_some() {
            return Ok(None);
        }
        let points = chain::points(shelf.path())?.0;
        let wanted = |name: &str| settings.disks.is_empty() || settings.disks.iter().any(|disk| disk == name);
        let known = points.iter().rev().flat_map(|point| &point.manifest.disks).find_map(|entry| {
            let here = status.is_disk(&entry.name, entry.uuid) && wanted(&entry.name);
            here.then(|| status.checkpoint_name(&entry.name, entry.checkpoint_uuid)).flatten()
        });
        Ok(known)
    }

    /// Writes down what was frozen, and what each disk counts from.
    fn fill(&self, mount: &Mount, shelf: &Shelf, partial: &mut Partial, taken: &Taken) -> Result<()> {
        // Anew: it has the checkpoint of the snapshot.
        let mount = Mount::find(&mount.path)?;
        let status: Status = read_reply(&mount.status)?;
        let (points, errors) = chain::points(shelf.path())?;
        for e in &errors {
            complain(&format!("fleecefs: passed over: {e}"));
        }
        let manifest = &mut partial.draft.manifest;
        manifest.snapshot_uuid = taken.uuid;
        manifest.time.clone_from(&taken.time);
        manifest.consistency.clone_from(&taken.consistency);
        manifest.hooks = taken.hooks.clone();
        let settings = &partial.draft.settings;
        let dir = mount.path.join("snapshots").join(&manifest.point);
        let wanted = |name: &str| settings.disks.is_empty() || settings.disks.iter().any(|disk| disk == name);
        for disk in taken.disks.iter().filter(|disk| wanted(&disk.name)) {
            let mut uuid = status.disk_uuid(&disk.name).unwrap_or(Uuid::nil());
            let (base, full_reason) = match chosen_base(&status, settings, &points, disk, &dir)? {
                Choice::Base(link) => {
                    // One chain is of one disk, whatever mounts its points are of.
                    uuid = link.entry.uuid;
                    (Some(BaseEntry { point: link.point.clone(), uuid: uuid_of(&points, &link) }), None)
                }
                Choice::Full(reason) => (None, reason),
            };
            let extension = if settings.format == Format::Raw { "raw" } else { "qcow2" };
            let map = (base.is_some() && settings.format == Format::Raw).then(|| format!("{}.map.json", disk.name));
            let entry = DiskEntry {
                name: disk.name.clone(),
                uuid,
                image: disk.image.clone(),
                size: disk.size,
                checkpoint_uuid: taken.uuid,
                base,
                full_reason,
                format: settings.format,
                file: format!("{}.{extension}", disk.name),
                map,
                changed_bytes: 0,
                zero_bytes: 0,
                copied_bytes: 0,
                skipped: disk.skipped.clone(),
            };
            manifest.disks.push(entry);
        }
        partial.keep_draft()
    }

    /// From where each disk of the draft is read. ESTALE where a point that it builds on is not there any more.
    fn plans(&self, mount: &Mount, partial: &Partial) -> Result<Vec<Plan>> {
        let status: Status = read_reply(&Mount::find(&mount.path)?.status)?;
        let manifest = &partial.draft.manifest;
        let taken: Taken = read_reply(&snapshot::manifest(mount, &manifest.point)?)?;
        let dir = mount.path.join("snapshots").join(&manifest.point);
        let (points, _) = chain::points(partial.path().parent().unwrap_or(Path::new("/")))?;
        let mut plans = Vec::new();
        for entry in &manifest.disks {
            let disk = taken.disks.iter().find(|disk| disk.name == entry.name);
            let disk =
                disk.ok_or_else(|| Error::new(errno::ENOENT, format!("disk '{}'", entry.name), "not in the snapshot"))?;
            let base = match &entry.base {
                None => Base::everything(disk, &dir, entry.full_reason.clone()),
                Some(base) => {
                    let known = points.iter().find(|point| point.in_place() && point.manifest.uuid == base.uuid);
                    if let Some(point) = known {
                        chain::links(point, &entry.name)
                            .map_err(|e| Error::new(errno::ESTALE, format!("disk '{}'", entry.name), e.to_string()))?;
                    }
                    let checkpoint =
                        known.and_then(|point| point.manifest.disk(&entry.name).ok()).map(|e| e.checkpoint_uuid);
                    let map = checkpoint.map(|uuid| since_uuid(&status, disk, &dir, uuid)).transpose()?.flatten();
                    map.filter(|map| map.full_reason.is_none()).ok_or_else(|| {
                        let why = match known {
                            Some(_) => format!("changes since point '{}' are no longer known", base.point),
                            None => format!("point '{}', which it builds on, is not there any more", base.point),
                        };
                        Error::new(errno::ESTALE, format!("disk '{}'", entry.name), why)
                    })?
                }
            };
            let map = MapSource::new(&base.path, disk.size, base.everything);
            let totals = Totals::of(&map)?;
            let meta = base.meta(&status, disk, &manifest.point);
            plans.push(Plan { view: dir.join(format!("{}.raw", entry.name)), map, meta, totals });
        }
        Ok(plans)
    }

    /// Says how an interrupted backup goes on; one whose view cannot be read is given up.
    fn ended_early(&self, mount: &Mount, partial: Partial, failure: Failure) -> Error {
        let dead = [errno::ENOTCONN, 103].contains(&failure.error.errno());
        if !failure.source || dead {
            return self.interrupted_error(&partial, failure.error);
        }
        let point = partial.point().to_owned();
        let ended =
            mount.execute("fleecefs-snapshot-cancel", json!({ "name": point })).map(drop).and(partial.discard());
        match ended {
            Ok(()) => failure.error.hint("the point was given up, and its snapshot cancelled; no change is forgotten"),
            Err(e) => failure.error.hint(format!("the point was given up, but: {e}")),
        }
    }

    fn interrupted_error(&self, partial: &Partial, e: Error) -> Error {
        let first = e.hint_text().map_or(String::new(), |hint| format!("{hint}. "));
        let hint = format!(
            "{first}The snapshot '{0}' and what was copied are kept: the same command goes on; --restart begins anew; to give \
             up, `fleecefs snapshot cancel {1} {0}` and remove {2}",
            printable(partial.point()),
            self.mnt.display(),
            partial.path().display()
        );
        e.hint(hint)
    }

    fn report(&self, dir: &Path, manifest: &Manifest) -> Result<Exit> {
        let mut out = Out::new();
        if self.json.json {
            let mut reply = serde_json::to_value(manifest).unwrap_or_default();
            reply["path"] = json!(dir);
            out.json(&reply)?;
        } else {
            for disk in &manifest.disks {
                let kind = match &disk.base {
                    Some(base) => format!("changes since '{}'", printable(&base.point)),
                    None => "full".to_owned(),
                };
                let copied = human_size(disk.copied_bytes);
                let left_out = disk.skipped.as_ref().map_or(String::new(), |skipped| format!(", {}", skipped.text()));
                out.line(format!("{}: {kind}, {copied} copied of {}{left_out}", disk.name, human_size(disk.size)))?;
            }
            out.line(dir.display().to_string())?;
        }
        let mut exit = Exit::Done;
        for disk in &manifest.disks {
            let Some(reason) = &disk.full_reason else { continue };
            complain(&format!("fleecefs: disk '{}': a full backup was made: {}", disk.name, printable(reason)));
            exit = Exit::Full;
        }
        Ok(exit)
    }
}

/// What a disk's new point is.
enum Choice {
    /// An increment.
    Base(Box<Link>),
    /// All of it, and why where an increment was wanted.
    Full(Option<String>),
}

fn uuid_of(points: &[Point], link: &Link) -> Uuid {
    points.iter().find(|point| point.path == link.dir).map_or(Uuid::nil(), |point| point.manifest.uuid)
}

fn chosen_base(
    status: &Status,
    settings: &Settings,
    points: &[Point],
    disk: &ManifestDisk,
    dir: &Path,
) -> Result<Choice> {
    let is_it = |uuid| status.is_disk(&disk.name, uuid);
    let full = |reason: String| Ok(Choice::Full(Some(reason)));
    if settings.full {
        return Ok(Choice::Full(None));
    }
    let (links, errors) = match &settings.consumer {
        Some(consumer) => {
            let (name, checkpoint) = match status.consumer_of(consumer, &disk.name) {
                Ok(point) => point,
                Err(reason) => return full(reason),
            };
            let (links, errors) = chain::base_for(points, &disk.name, &is_it, &|known| known == checkpoint);
            if links.is_none() && errors.is_empty() {
                return full(format!("no point is there of checkpoint '{name}', at which consumer '{consumer}' is"));
            }
            (links, errors)
        }
        None => {
            let known = |checkpoint| status.checkpoint_name(&disk.name, checkpoint).is_some();
            let (links, errors) = chain::base_for(points, &disk.name, &is_it, &known);
            let any = points.iter().any(|point| point.manifest.disk(&disk.name).is_ok());
            if links.is_none() && errors.is_empty() {
                let reason = any.then(|| "the mount knows the checkpoint of no point that is there".to_owned());
                return Ok(Choice::Full(reason));
            }
            (links, errors)
        }
    };
    for e in &errors {
        complain(&format!("fleecefs: passed over: {e}"));
    }
    let Some(link) = links.as_ref().and_then(|links| links.first()) else {
        return full(errors.first().map(ToString::to_string).unwrap_or_default());
    };
    let count = links.as_ref().map_or(0, Vec::len);
    if count >= MAX_LINKS {
        return full(format!("the chain has {count} points, which is the most"));
    }
    if link.entry.format != settings.format {
        return full(format!("the chain is in format {}", link.entry.format));
    }
    match since_uuid(status, disk, dir, link.entry.checkpoint_uuid)? {
        Some(Base { full_reason: Some(reason), .. }) => full(reason),
        Some(_) => Ok(Choice::Base(Box::new(link.clone()))),
        None => full(format!("changes since point '{}' are not known (any more)", link.point)),
    }
}

/// Completes the snapshot of a point that is whole, and moves the consumer.
fn complete(mount: &Mount, shelf: &Shelf, manifest: &Manifest) -> Result<()> {
    let mut arguments = json!({ "name": manifest.point });
    if let Some(consumer) = &manifest.consumer {
        arguments["consumer"] = json!(consumer);
    }
    if let Err(e) = mount.execute("fleecefs-snapshot-complete", arguments) {
        let hint = "the point is whole, and can be restored; the next backup builds on an earlier one";
        if e.errno() == errno::EIO {
            // The view broke after it was read. It is of no use to anybody any more.
            mount.execute("fleecefs-snapshot-complete", json!({ "name": manifest.point }))?;
            shelf.finished(&manifest.point)?;
        }
        return Err(e.hint(hint));
    }
    shelf.finished(&manifest.point)
}
