//! `fleecefs run`: a user's own tool on a frozen view, and a consumer that moves only where the tool succeeded.
//!
//! * **The consumer moves behind an exit code of 0 alone**, and only where the daemon that froze the view is the one that
//!   completes it, with the view unbroken: what the tool read is then what the disk held.
//! * One run of a consumer at a time: the second would count from the same point, and one of the two would be forgotten.
//! * Each way out ends the snapshot, but for a kill of this process.

use super::Exit;
use super::connect::{Mount, read_reply};
use super::consumer::ConsumerLock;
use super::freeze::FreezeArgs;
use super::output::{complain, printable};
use super::snapshot::{self, Manifest, SkipArg, full_disks};
use crate::daemon::{absolute, explain};
use crate::error::{Error, Result, errno};
use crate::storage::process;
use clap::Args;
use serde_json::json;
use signal_hook::consts::{SIGCHLD, SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2};
use signal_hook::iterator::Signals;
use std::ffi::{OsStr, OsString};
use std::io::ErrorKind;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::process::Command;

/// What the command gets, too.
const FORWARDED: [i32; 6] = [SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGUSR1, SIGUSR2];
/// Longest part of a consumer's name in the name of a snapshot, in bytes; a time stands behind it.
const MAX_PREFIX_BYTES: usize = 170;
const TIME_FORMAT: &str = "%Y%m%dT%H%M%S.%3fZ";
/// Exit codes of a command that was not found, or cannot be run, as of env(1).
const NOT_FOUND: u8 = 127;
const NOT_RUNNABLE: u8 = 126;

/// Arguments of `run`.
#[derive(Debug, Args)]
#[command(
    after_help = "In arguments of CMD, {snapshot} stands for the directory of the snapshot, {map} for the map of \
what changed and {disk} for the frozen view; with several disks, an argument {map} or {disk} becomes one for each disk. \
The same stands in FLEECEFS_SNAPSHOT, FLEECEFS_MAP and FLEECEFS_DISK (these two with one disk only), beside \
FLEECEFS_MOUNT, FLEECEFS_NAME, FLEECEFS_CONSUMER and FLEECEFS_DISKS; FLEECEFS_FULL is 1 where everything counts as changed.

Exit code: that of CMD, 128+N where signal N ended it, 126 or 127 where it cannot be run or found, 125 where fleecefs failed."
)]
pub struct RunArgs {
    /// The mount
    mnt: PathBuf,
    /// The consumer: changes since its checkpoint are told, and it moves where CMD ends with 0
    #[arg(long, value_name = "C")]
    consumer: String,
    /// A disk to freeze [default: all]
    #[arg(long = "disk", value_name = "D")]
    disks: Vec<String>,
    /// Name of the snapshot and of its checkpoint [default: that of the consumer, and the time]
    #[arg(long, value_name = "N")]
    name: Option<String>,
    #[command(flatten)]
    skip: SkipArg,
    #[command(flatten)]
    freeze: FreezeArgs,
    /// The command and its arguments
    #[arg(value_name = "CMD", last = true, required = true)]
    command: Vec<OsString>,
}

/// A snapshot that is there.
struct Taken {
    mount: Mount,
    name: String,
    dir: PathBuf,
    disks: Vec<String>,
    full: bool,
}

impl RunArgs {
    /// Runs the command. An error is one of fleecefs; the consumer has not moved then.
    pub fn run(&self) -> Result<Exit> {
        // From here on a signal ends nothing half-way. Under nohup(1) the end of a session stays ignored, for the command too.
        let nohup = process::ignores(SIGHUP);
        let heard = FORWARDED.iter().filter(|signal| !(nohup && **signal == SIGHUP)).chain([&SIGCHLD]);
        let mut signals = Signals::new(heard).map_err(|e| Error::io("install signal handlers", e))?;
        let mount = Mount::find(&absolute(&self.mnt)?)?;
        let lock = ConsumerLock::take(&mount, &self.consumer)?;
        self.tell_left(&mount)?;
        let taken = self.take(mount)?;
        let ended = match signals.pending().find(|signal| FORWARDED.contains(signal)) {
            Some(signal) => Ok(ended_by(signal)),
            None => self.arguments(&taken).and_then(|arguments| self.run_command(&taken, &arguments, &mut signals)),
        };
        let outcome = ended.and_then(|code| {
            taken.check(&lock, code)?;
            if code == 0 {
                taken.complete(&self.consumer)?;
            }
            Ok(code)
        });
        match outcome {
            Ok(0) => Ok(Exit::Done),
            other => {
                taken.cancel();
                other.map(Exit::Code)
            }
        }
    }

    /// Tells of snapshots that runs of this consumer left when they were killed: as long as they are there, the guest pays
    /// for them. Their commands may still read them, so they stay.
    fn tell_left(&self, mount: &Mount) -> Result<()> {
        let rows = snapshot::rows(mount)?;
        for row in rows.iter().filter(|row| is_default_name(row.name(), &self.consumer)) {
            let name = printable(row.name());
            complain(&format!(
                "fleecefs: snapshot '{name}' is left of a run that was killed\n  once its command has ended: `fleecefs snapshot \
                 cancel {} {name}`",
                self.mnt.display()
            ));
        }
        Ok(())
    }

    fn take(&self, mount: Mount) -> Result<Taken> {
        let name = self.name.clone().unwrap_or_else(|| default_name(&self.consumer));
        let mut arguments = json!({ "name": name, "disks": self.disks, "consumer": self.consumer });
        self.skip.add_to(&mut arguments);
        let manifest: Manifest = read_reply(&self.freeze.create_snapshot(&mount, arguments)?)?;
        let full = full_disks(&format!("@{}", self.consumer), &manifest) == Exit::Full;
        let dir = mount.path.join("snapshots").join(&name);
        Ok(Taken { mount, name, dir, disks: manifest.disks.into_iter().map(|disk| disk.name).collect(), full })
    }

    /// The command with its arguments, paths put in.
    fn arguments(&self, taken: &Taken) -> Result<Vec<OsString>> {
        let mut all = Vec::new();
        for argument in &self.command {
            match argument.as_bytes() {
                b"{map}" => all.extend(taken.disks.iter().map(|disk| taken.map(disk).into_os_string())),
                b"{disk}" => all.extend(taken.disks.iter().map(|disk| taken.view(disk).into_os_string())),
                _ => all.push(taken.put_in(argument)?),
            }
        }
        Ok(all)
    }

    /// Runs the command to its end, and gives its exit code.
    fn run_command(&self, taken: &Taken, arguments: &[OsString], signals: &mut Signals) -> Result<u8> {
        let (program, arguments) = arguments
            .split_first()
            .ok_or_else(|| Error::new(errno::EINVAL, "run", "no command is left: there is no disk"))?;
        let mut command = Command::new(program);
        command.args(arguments);
        taken.environment(&self.consumer, &mut command);
        let mut child = match command.spawn() {
            Ok(child) => child,
            Err(e) => {
                let found = e.kind() != ErrorKind::NotFound;
                let e = Error::io(format!("run '{}'", printable(&program.to_string_lossy())), e);
                complain(&explain(&e));
                return Ok(if found { NOT_RUNNABLE } else { NOT_FOUND });
            }
        };
        loop {
            // The end of the child is a signal, too.
            for signal in signals.wait().filter(|signal| FORWARDED.contains(signal)) {
                // The terminal has told the command already.
                if !([SIGINT, SIGQUIT].contains(&signal) && in_foreground()) {
                    process::signal_process(child.id(), signal)?;
                }
            }
            if let Some(status) = child.try_wait().map_err(|e| Error::io("wait for the command", e))? {
                return Ok(process::exit_code(status));
            }
        }
    }
}

impl Taken {
    fn view(&self, disk: &str) -> PathBuf {
        self.dir.join(format!("{disk}.raw"))
    }

    fn map(&self, disk: &str) -> PathBuf {
        self.dir.join(format!("{disk}.map"))
    }

    /// A word with paths put in.
    fn put_in(&self, word: &OsStr) -> Result<OsString> {
        let mut bytes = replace(word.as_bytes(), b"{snapshot}", self.dir.as_os_str().as_bytes());
        for (mark, path) in [("{map}", Taken::map as fn(&Taken, &str) -> PathBuf), ("{disk}", Taken::view)] {
            if !bytes.windows(mark.len()).any(|window| window == mark.as_bytes()) {
                continue;
            }
            let [disk] = &self.disks[..] else {
                let why = format!("{mark} within a word stands for one disk, and there are {}", self.disks.len());
                return Err(Error::new(errno::EINVAL, format!("'{}'", printable(&word.to_string_lossy())), why)
                    .hint(format!("give {mark} as an argument of its own, or one --disk")));
            };
            bytes = replace(&bytes, mark.as_bytes(), path(self, disk).as_os_str().as_bytes());
        }
        Ok(OsString::from_vec(bytes))
    }

    fn environment(&self, consumer: &str, command: &mut Command) {
        // What another run around this one has put there is not about this snapshot.
        for name in ["FLEECEFS_DISK", "FLEECEFS_MAP", "FLEECEFS_FULL"] {
            command.env_remove(name);
        }
        command.env("FLEECEFS_MOUNT", &self.mount.path).env("FLEECEFS_SNAPSHOT", &self.dir);
        command.env("FLEECEFS_NAME", &self.name).env("FLEECEFS_CONSUMER", consumer);
        command.env("FLEECEFS_DISKS", self.disks.join(" "));
        if let [disk] = &self.disks[..] {
            command.env("FLEECEFS_DISK", self.view(disk)).env("FLEECEFS_MAP", self.map(disk));
        }
        if self.full {
            command.env("FLEECEFS_FULL", "1");
        }
    }

    /// Whether what the command read can have been what the disks held.
    fn check(&self, lock: &ConsumerLock, code: u8) -> Result<()> {
        let what = format!("snapshot '{}'", self.name);
        let spoiled =
            |why: &str| Err(Error::new(errno::EIO, what.clone(), format!("{why}; the command ended with {code}")));
        if lock.daemon_ended() {
            return spoiled("the daemon ended while the command ran");
        }
        let rows = snapshot::rows(&self.mount)?;
        match rows.iter().find(|row| row.name() == self.name) {
            None => spoiled("somebody ended it while the command ran"),
            Some(row) if row.is_broken() => spoiled("it broke while the command ran"),
            Some(_) => Ok(()),
        }
    }

    fn complete(&self, consumer: &str) -> Result<()> {
        let arguments = json!({ "name": self.name, "consumer": consumer });
        self.mount.execute("fleecefs-snapshot-complete", arguments).map(drop)
    }

    /// Ends it without success; where that fails, the user hears of it.
    fn cancel(&self) {
        // The daemon may be another one by now, with another socket.
        let cancelled = Mount::find(&self.mount.path)
            .and_then(|mount| mount.execute("fleecefs-snapshot-cancel", json!({ "name": self.name })));
        if let Err(e) =
            cancelled.as_ref().map(drop).or_else(|e| if e.errno() == errno::ENOENT { Ok(()) } else { Err(e) })
        {
            complain(&explain(&e.clone().context(format!("snapshot '{}' may be left", self.name))));
        }
    }
}

fn replace(bytes: &[u8], mark: &[u8], with: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut rest = bytes;
    while let Some((first, behind)) = rest.split_first() {
        match rest.strip_prefix(mark) {
            Some(tail) => {
                out.extend_from_slice(with);
                rest = tail;
            }
            None => {
                out.push(*first);
                rest = behind;
            }
        }
    }
    out
}

/// The consumer's name and the time: `daily-20261120T203000.123Z`.
fn default_name(consumer: &str) -> String {
    format!("{}-{}", prefix(consumer), jiff::Timestamp::now().strftime(TIME_FORMAT))
}

fn is_default_name(name: &str, consumer: &str) -> bool {
    let time = name.strip_prefix(prefix(consumer)).and_then(|rest| rest.strip_prefix('-'));
    time.is_some_and(|time| jiff::civil::DateTime::strptime(TIME_FORMAT, time).is_ok())
}

fn prefix(consumer: &str) -> &str {
    let end = (0..=MAX_PREFIX_BYTES.min(consumer.len())).rev().find(|end| consumer.is_char_boundary(*end)).unwrap_or(0);
    consumer.get(..end).unwrap_or_default()
}

fn ended_by(signal: i32) -> u8 {
    u8::try_from(128 + signal).unwrap_or(u8::MAX)
}

/// Whether this process is in the foreground of its terminal (proc_pid_stat(5), fields 5 and 8): what is typed there as a
/// signal goes to its whole process group.
fn in_foreground() -> bool {
    let stat = std::fs::read_to_string(Path::new("/proc/self/stat")).unwrap_or_default();
    let mut fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace().skip(2);
    let group = fields.next();
    group.is_some() && group == fields.nth(2)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(disks: &[&str]) -> Taken {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("status.json"), r#"{"pid": 1, "qmp": "/none"}"#).unwrap();
        let mount = Mount::find(dir.path()).unwrap();
        let disks = disks.iter().map(|disk| disk.to_string()).collect();
        Taken { mount, name: "s".into(), dir: "/m/snapshots/s".into(), disks, full: false }
    }

    fn words(disks: &[&str], words: &[&str]) -> Result<Vec<OsString>> {
        let command = words.iter().map(OsString::from).collect();
        let freeze =
            <crate::cli::Cli as clap::Parser>::try_parse_from(["fleecefs", "run", "/m", "--consumer", "c", "--", "x"]);
        let Ok(crate::cli::Cli { command: crate::cli::Command::Run(run) }) = freeze else { panic!() };
        RunArgs { command, ..run }.arguments(&taken(disks))
    }

    #[test]
    fn marks_become_paths() {
        let one = words(&["a"], &["x", "{snapshot}", "--m={map}", "{disk}", "{other}", "{snapshot}/{map}"]).unwrap();
        let s = "/m/snapshots/s";
        let expected =
            ["x", s, "--m=/m/snapshots/s/a.map", "/m/snapshots/s/a.raw", "{other}", &format!("{s}/{s}/a.map")];
        assert_eq!(one, expected.map(OsString::from));
        let two = words(&["a", "b"], &["x", "{map}", "{disk}"]).unwrap();
        assert_eq!(
            two,
            ["x".to_owned(), format!("{s}/a.map"), format!("{s}/b.map"), format!("{s}/a.raw"), format!("{s}/b.raw")]
                .map(OsString::from)
        );
        let e = words(&["a", "b"], &["x", "--m={map}"]).unwrap_err();
        assert!(e.to_string().contains("there are 2"), "{e}");
    }

    #[test]
    fn a_default_name_is_a_name() {
        for consumer in ["daily", &"ä".repeat(100)] {
            let name = default_name(consumer);
            crate::units::check_name("snapshot", &name).unwrap();
            assert!(is_default_name(&name, consumer), "{name}");
            assert!(!is_default_name(&name, "other") && !is_default_name(&format!("{name}x"), consumer), "{name}");
        }
        for other in ["daily", "daily-", "daily-1", "daily-2026"] {
            assert!(!is_default_name(other, "daily"), "{other}");
        }
    }
}
