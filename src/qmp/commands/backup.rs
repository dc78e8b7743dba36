//! `blockdev-backup` and `drive-backup`: jobs that push a disk to a target.
//!
//! Checks come in QEMU's order and have its texts; what concerns bitmaps is checked by the core, for a transaction may
//! have made them. Nothing is begun before all of a transaction's checks have passed, so a refusal tells no event.

use super::Command;
use crate::backup::jobs::{JobSpec, Work};
use crate::backup::push::{BitmapMode, Goal, Group, OnError, Push, PushSpec, Sync};
use crate::error::errno;
use crate::fleece::{Action, BitmapRef, Disk, DiskSpec};
use crate::image::qcow2::create::{CreateOptions, create};
use crate::image::{self, Format, OpenOptions};
use crate::qmp::args::{Arguments, not_accepted};
use crate::qmp::nodes::Role;
use crate::qmp::{CommandError, CommandResult, Host};
use crate::storage::Storage;
use crate::storage::os::{self, OsFile};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub(super) const COMMANDS: &[Command] = &[
    Command::new("blockdev-backup", |host, arguments| alone(host, arguments, blockdev)),
    Command::new("drive-backup", |host, arguments| alone(host, arguments, drive)),
];

type Taken<T> = std::result::Result<T, CommandError>;

/// Sizes are compared in these, as QEMU knows no parts of one.
const SECTOR_BYTES: u64 = 512;

/// A backup as it was asked for.
#[derive(Debug)]
pub(super) struct Request {
    job: JobSpec,
    device: String,
    target: Target,
    sync: String,
    bitmap: Option<String>,
    bitmap_mode: Option<String>,
    compress: bool,
    on_source_error: OnError,
    on_target_error: OnError,
}

#[derive(Debug)]
enum Target {
    Node(String),
    File { path: PathBuf, format: Option<String>, existing: bool },
}

/// One that may begin.
pub(super) struct Ready {
    job: JobSpec,
    push: PushSpec,
    disk: String,
    bitmap: Option<(String, BitmapMode)>,
    /// What was made for it.
    created: Option<PathBuf>,
}

/// Takes the members of a `blockdev-backup`, all but [`Arguments::finish`].
pub(super) fn blockdev(arguments: &mut Arguments) -> Taken<Request> {
    request(arguments, |arguments| Ok(Target::Node(arguments.string("target")?)))
}

/// The same of a `drive-backup`.
pub(super) fn drive(arguments: &mut Arguments) -> Taken<Request> {
    request(arguments, |arguments| {
        let path = PathBuf::from(arguments.string("target")?);
        let format = arguments.optional_string("format")?;
        let mode = arguments.optional_choice("mode", &["existing", "absolute-paths"])?;
        Ok(Target::File { path, format, existing: mode.as_deref() == Some("existing") })
    })
}

fn request(arguments: &mut Arguments, target: impl FnOnce(&mut Arguments) -> Taken<Target>) -> Taken<Request> {
    let id = arguments.optional_string("job-id")?;
    let device = arguments.string("device")?;
    let sync = arguments.optional_choice("sync", &["top", "full", "none", "incremental", "bitmap"])?;
    let sync = sync.ok_or_else(|| CommandError::generic("Parameter 'sync' is missing"))?;
    let speed = arguments.optional_int("speed")?.unwrap_or(0);
    let bitmap = arguments.optional_string("bitmap")?;
    let bitmap_mode = arguments.optional_choice("bitmap-mode", &["on-success", "never", "always"])?;
    let compress = arguments.optional_bool("compress")?.unwrap_or(false);
    let on_source_error = on_error(arguments, "on-source-error")?;
    let on_target_error = on_error(arguments, "on-target-error")?;
    let auto_finalize = arguments.optional_bool("auto-finalize")?.unwrap_or(true);
    let auto_dismiss = arguments.optional_bool("auto-dismiss")?.unwrap_or(true);
    // No node is made for the job.
    arguments.optional_string("filter-node-name")?;
    let break_guest = arguments.optional_choice("on-cbw-error", &["break-guest-write", "break-snapshot"])?;
    if break_guest.is_some_and(|policy| policy == "break-guest-write") {
        let text = "on-cbw-error is the mount's: `fleecefs mount --on-store-error fail-write`";
        return Err(CommandError::generic(text));
    }
    if arguments.optional_bool("discard-source")? == Some(true) {
        return Err(CommandError::generic("discard-source is not supported by fleecefs"));
    }
    if let Some(mut perf) = arguments.optional_object("x-perf")? {
        perf.optional_bool("use-copy-range")?;
        let workers = perf.optional_int("max-workers")?;
        perf.optional_int("max-chunk")?;
        perf.optional_int("min-cluster-size")?;
        perf.finish()?;
        if workers.is_some_and(|workers| !(1..=i64::from(i32::MAX)).contains(&workers)) {
            return Err(CommandError::generic(format!("max-workers must be between 1 and {}", i32::MAX)));
        }
    }
    let target = target(arguments)?;
    let id = id.unwrap_or_else(|| device.clone());
    let job = JobSpec { id, kind: "backup", speed, auto_finalize, auto_dismiss };
    Ok(Request { job, device, target, sync, bitmap, bitmap_mode, compress, on_source_error, on_target_error })
}

fn on_error(arguments: &mut Arguments, name: &str) -> Taken<OnError> {
    match arguments.optional_string(name)?.as_deref() {
        None | Some("report" | "auto") => Ok(OnError::Report),
        Some("ignore") => Ok(OnError::Ignore),
        Some("enospc") => Ok(OnError::Enospc),
        Some("stop") => Ok(OnError::Stop),
        Some(other) => Err(not_accepted(name, other)),
    }
}

fn alone(host: &dyn Host, mut arguments: Arguments, read: fn(&mut Arguments) -> Taken<Request>) -> CommandResult {
    let request = read(&mut arguments)?;
    arguments.finish()?;
    begin(host, vec![Step::Backup(request)], false)
}

/// An action of a transaction.
pub(super) enum Step {
    Other(Action),
    Backup(Request),
}

/// Does all steps at one instant, or none of them, and begins the jobs.
pub(super) fn begin(host: &dyn Host, steps: Vec<Step>, grouped: bool) -> CommandResult {
    let mut actions = Vec::new();
    let mut jobs: Vec<Ready> = Vec::new();
    for step in steps {
        match step {
            Step::Other(action) => actions.push(action),
            Step::Backup(request) => match ready(host, request, &actions) {
                Ok(one) => {
                    actions.extend(one.actions());
                    jobs.push(one);
                }
                Err(e) => {
                    jobs.into_iter().for_each(Ready::forget);
                    return Err(e);
                }
            },
        }
    }
    if jobs.is_empty() {
        if !actions.is_empty() {
            host.apply(&actions)?;
        }
        return Ok(json!({}));
    }
    if let Err(e) = host.fleece().check(&actions) {
        jobs.into_iter().for_each(Ready::forget);
        return Err(e.into());
    }
    let created: Vec<PathBuf> = jobs.iter().filter_map(|job| job.created.clone()).collect();
    let specs = jobs.iter().map(|job| job.job.clone()).collect();
    let started = host.jobs().start(specs, grouped, || works(host, jobs, &actions, grouped));
    if started.is_err() {
        created.iter().for_each(|path| remove(path));
    }
    started.map(|()| json!({}))
}

fn works(host: &dyn Host, jobs: Vec<Ready>, actions: &[Action], grouped: bool) -> Taken<Vec<Box<dyn Work>>> {
    let applied = host.apply(actions)?;
    let mut holds = applied.holds.into_iter();
    let mut group = Group::new(host.fleece().clone());
    let mut works: Vec<Box<dyn Work>> = Vec::new();
    for (key, (job, frozen)) in jobs.into_iter().zip(applied.frozen).enumerate() {
        if !grouped {
            group = Group::new(host.fleece().clone());
        }
        let hold = job.bitmap.and_then(|(_, mode)| Some((holds.next()?, mode)));
        works.push(Box::new(Push::new(job.push, frozen, hold, &group, key)?));
    }
    Ok(works)
}

impl Ready {
    /// What has to happen at the instant of its beginning.
    fn actions(&self) -> impl Iterator<Item = Action> {
        let record = (self.push.sync == Sync::None).then(|| self.push.goal.unit_bytes());
        let freeze = Action::Freeze { disk: self.disk.clone(), record };
        let hold = self.bitmap.iter().map(|(name, mode)| {
            let bitmap = BitmapRef::new(&self.disk, name);
            if *mode == BitmapMode::Never { Action::HoldToRead(bitmap) } else { Action::Hold(bitmap) }
        });
        std::iter::once(freeze).chain(hold)
    }

    /// It is not to be.
    fn forget(self) {
        drop(self.push);
        self.created.iter().for_each(|path| remove(path));
    }
}

fn remove(created: &Path) {
    if let Err(e) = std::fs::remove_file(created) {
        log::warn!("{}: {e}", created.display());
    }
}

fn unknown(name: &str) -> CommandError {
    CommandError::generic(format!("Cannot find device='{name}' nor node-name='{name}'"))
}

/// Checks a request and opens its target. `before`: what the transaction does first.
fn ready(host: &dyn Host, request: Request, before: &[Action]) -> Taken<Ready> {
    let fleece = host.fleece();
    let disk = fleece.disk(&request.device).map_err(|_| unknown(&request.device))?;
    if let Target::Node(name) = &request.target
        && fleece.disk(name).is_err()
        && host.nodes().get(name).is_none()
    {
        return Err(unknown(name));
    }
    let (sync, mode) = sync_of(host, &request, before)?;
    let Request { job, device, target, bitmap, compress, on_source_error, on_target_error, .. } = request;
    if matches!(&target, Target::Node(name) if *name == device) {
        return Err(CommandError::generic("Source and target cannot be the same"));
    }
    let source = host.nodes().occupy(&device, Role::Source).map_err(|busy| busy_node(&busy))?;
    let (goal, used, created) = match target {
        Target::Node(name) => {
            let used = host.nodes().occupy(&name, Role::Target).map_err(|busy| busy_node(&busy))?;
            let (goal, kept) = match fleece.disk(&name) {
                Ok(disk) => (Goal::Disk(disk), Some(fleece.keep_disk(&name)?)),
                Err(_) => (node_goal(host, &name)?, None),
            };
            (goal, Some((used, kept)), None)
        }
        Target::File { path, format, existing } => {
            let (goal, created) = file_goal(host, &disk, &path, format.as_deref(), existing, sync)?;
            (goal, None, created)
        }
    };
    let push = PushSpec { sync, goal, compress, on_source_error, on_target_error, kept: Box::new((source, used)) };
    let bitmap = bitmap.zip(mode);
    let ready = Ready { job, push, disk: device, bitmap, created };
    let goal = &ready.push.goal;
    let refusal = if compress && !goal.can_compress() {
        Some("Compression is not supported for this drive ".to_owned())
    } else if goal.size().div_ceil(SECTOR_BYTES) != disk.size().div_ceil(SECTOR_BYTES) {
        Some("Source and target image have different sizes".to_owned())
    } else if goal.read_only() {
        Some("Could not create node: Block node is read-only".to_owned())
    } else {
        None
    };
    match refusal {
        Some(text) => {
            ready.forget();
            Err(CommandError::generic(text))
        }
        None => Ok(ready),
    }
}

fn busy_node(name: &str) -> CommandError {
    CommandError::generic(format!("Node '{name}' is busy: block device is in use by block job: backup"))
}

/// What is copied, and what becomes of the bitmap where there is one.
fn sync_of(host: &dyn Host, request: &Request, before: &[Action]) -> Taken<(Sync, Option<BitmapMode>)> {
    let refused = |text: String| Err(CommandError::generic(text));
    let asked = request.sync.as_str();
    let mut mode = request.bitmap_mode.as_deref();
    if (asked == "bitmap" || asked == "incremental") && request.bitmap.is_none() {
        return refused(format!("must provide a valid bitmap name for '{asked}' sync mode"));
    }
    if asked == "incremental" && mode.is_some_and(|mode| mode != "on-success") {
        return refused("Bitmap sync mode must be 'on-success' when using sync mode 'incremental'".to_owned());
    }
    if asked == "incremental" {
        mode = Some("on-success");
    }
    if let Some(bitmap) = &request.bitmap {
        let listed = host.fleece().bitmaps(&request.device).unwrap_or_default();
        let added = before.iter().any(
            |action| matches!(action, Action::Add { disk, name, .. } if *disk == request.device && name == bitmap),
        );
        if !added && !listed.iter().any(|info| info.name == *bitmap) {
            return refused(format!("Bitmap '{bitmap}' could not be found"));
        }
        let Some(mode) = mode else {
            return refused("Bitmap sync mode must be given when providing a bitmap".to_owned());
        };
        if asked == "none" {
            return refused("sync mode 'none' does not produce meaningful bitmap outputs".to_owned());
        }
        if mode == "never" && asked != "bitmap" {
            let text = "Bitmap sync mode 'never' has no meaningful effect when combined with sync mode";
            return refused(format!("{text} '{asked}'"));
        }
    } else if mode.is_some() {
        return refused("Cannot specify bitmap sync mode without a bitmap".to_owned());
    }
    let sync = match asked {
        "full" => Sync::Full,
        "top" => Sync::Top,
        "none" => Sync::None,
        _ => Sync::Bitmap,
    };
    let mode = mode.map(|mode| match mode {
        "never" => BitmapMode::Never,
        "always" => BitmapMode::Always,
        _ => BitmapMode::OnSuccess,
    });
    Ok((sync, mode))
}

/// A file node as a raw image.
fn node_goal(host: &dyn Host, name: &str) -> Taken<Goal> {
    let Some(node) = host.nodes().get(name) else { return Err(unknown(name)) };
    if node.read_only {
        return Err(CommandError::generic("Could not create node: Block node is read-only"));
    }
    open(host, &node.filename, Some(Format::Raw)).map(Goal::Image)
}

/// Opens a target; the files that it uses are nobody else's.
fn open(host: &dyn Host, path: &Path, format: Option<Format>) -> Taken<Arc<dyn image::Image>> {
    let spec = DiskSpec { name: Some("target".to_owned()), file: path.to_owned(), format, ..DiskSpec::default() };
    let cache = host.fleece().options().cache;
    let options = OpenOptions { format, cache, no_mark: true, ..OpenOptions::default() };
    let opened = host.check_image(&spec).and_then(|()| image::open(path, &options));
    opened.map_err(|e| {
        let hint = Some(e.hint_text().map_or_else(|| e.to_string(), |hint| format!("{e}; {hint}")));
        let text = match e.errno() {
            errno::EBUSY => "Failed to get \"write\" lock".to_owned(),
            errno::ENOENT => format!("Could not open '{}': No such file or directory", path.display()),
            _ => format!("Could not open '{}': {e}", path.display()),
        };
        CommandError { errno: Some(e.errno()), hint, ..CommandError::generic(text) }
    })
}

/// The target of a `drive-backup`; with the path of what was made.
fn file_goal(
    host: &dyn Host,
    disk: &Disk,
    path: &Path,
    format: Option<&str>,
    existing: bool,
    sync: Sync,
) -> Taken<(Goal, Option<PathBuf>)> {
    let named = match format {
        None => None,
        Some("raw") => Some(Format::Raw),
        Some("qcow2") => Some(Format::Qcow2),
        Some(other) => return Err(CommandError::generic(format!("Unknown file format '{other}'"))),
    };
    if !path.is_absolute() {
        let text = format!("Could not open '{}': not an absolute path", path.display());
        return Err(CommandError { errno: Some(errno::EINVAL), ..CommandError::generic(text) });
    }
    if existing {
        return Ok((Goal::Image(open(host, path, named)?), None));
    }
    let format = named.unwrap_or_else(|| disk.format());
    let made = match format {
        Format::Raw => create_raw(path, disk.size()),
        Format::Qcow2 => {
            let backing = if sync == Sync::Top { backing_of(disk) } else { None };
            create(path, &CreateOptions { backing, ..CreateOptions::new(disk.size()) })
        }
    };
    made.map_err(|e| {
        let why = match e.errno() {
            errno::EEXIST => "File exists".to_owned(),
            errno::ENOENT => "No such file or directory".to_owned(),
            _ => e.to_string(),
        };
        let text = format!("Could not create '{}': {why}", path.display());
        CommandError { errno: Some(e.errno()), hint: e.hint_text().map(str::to_owned), ..CommandError::generic(text) }
    })?;
    let goal = open(host, path, Some(format)).inspect_err(|_| remove(path))?;
    Ok((Goal::Image(goal), Some(path.to_owned())))
}

fn create_raw(path: &Path, size: u64) -> crate::error::Result<()> {
    let new = os::OpenOptions { write: true, create_new: true, ..Default::default() };
    let file = OsFile::open(path, &new)?;
    file.set_len(size.next_multiple_of(SECTOR_BYTES)).and_then(|()| os::sync_parent(path)).inspect_err(|_| remove(path))
}

/// What lies below a disk's image: its name from everywhere, and its format.
fn backing_of(disk: &Disk) -> Option<(String, Format)> {
    let mut info = serde_json::Map::new();
    disk.describe_image(&mut info);
    let name = info.get("full-backing-filename")?.as_str()?.to_owned();
    let format = match info.get("backing-filename-format")?.as_str()? {
        "raw" => Format::Raw,
        _ => Format::Qcow2,
    };
    let name = std::path::absolute(&name).ok()?;
    Some((name.to_str()?.to_owned(), format))
}
