//! The command line: one file per command or group. A client of the control socket and of the files in the mount;
//! `mount` hands a checked plan to the daemon.
//!
//! Exit codes: 0 done; 1 differs or not found, or problems exist (`status`); 2 error; 3 done, but a full map where
//! changes were asked for. `run` ends as its command did, and with 125 where it failed itself.

mod backup;
mod bitmap;
mod check;
mod checkpoint;
mod connect;
mod consumer;
mod demo;
mod disk;
mod freeze;
mod info;
mod local;
mod manual;
mod map;
mod mount;
mod nbd;
mod output;
mod progress;
mod restore;
mod run;
mod snapshot;
mod spec;
mod status;
mod umount;

use crate::daemon::explain;
use crate::error::{Result, errno};
use clap::{Args, Parser, Subcommand};
use std::process::ExitCode;

/// FUSE-mounted fleecing: frozen views and dirty maps of the disks of running virtual machines.
#[derive(Debug, Parser)]
#[command(name = "fleecefs", version, propagate_version = true, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve disk images under a directory
    Mount(Box<mount::MountArgs>),
    /// End a mount and wait until its state is saved
    Umount(umount::UmountArgs),
    /// Show disks, snapshots and problems; exit code 1 where there are problems
    Status(status::StatusArgs),
    /// Add, remove and resize disks of a mount
    #[command(subcommand)]
    Disk(disk::DiskCommand),
    /// Take, end and show frozen views
    #[command(subcommand)]
    Snapshot(snapshot::SnapshotCommand),
    /// Instants from which changes are known
    #[command(subcommand)]
    Checkpoint(checkpoint::CheckpointCommand),
    /// Readers of changes, each with the checkpoint that it last finished
    #[command(subcommand)]
    Consumer(consumer::ConsumerCommand),
    /// Dirty bitmaps, as QEMU's
    #[command(subcommand)]
    Bitmap(bitmap::BitmapCommand),
    /// Add a point to a backup: all of the disks, or what changed
    Backup(Box<backup::BackupArgs>),
    /// Bring back what a disk held at a point of a backup; exit code 1 where --verify finds a difference
    Restore(restore::RestoreArgs),
    /// Print what changed on a disk of a snapshot
    Map(map::MapArgs),
    /// Take a snapshot, run a command on it, and move a consumer where the command ends with 0
    Run(run::RunArgs),
    /// Check a qcow2 image, and repair it; exit code 1 where faults are left
    Check(check::CheckArgs),
    /// Show what an image is and holds: sizes, snapshots, bitmaps
    Info(info::InfoArgs),
    /// Print completions of a shell
    Completions(manual::CompletionsArgs),
    /// Write the man pages to a directory
    #[command(hide = true)]
    ManPages(manual::ManPagesArgs),
    /// Show what fleecefs does, on a disk of its own, in some seconds
    Demo(demo::DemoArgs),
}

/// For every command that prints.
#[derive(Debug, Args)]
struct JsonArg {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// What a command that did not fail ends with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Exit {
    Done,
    Differs,
    Full,
    /// What the command of `run` ended with.
    Code(u8),
}

/// Exit code of `run` where it failed itself, as of env(1) and timeout(1).
const RUN_FAILED: u8 = 125;

impl Command {
    fn run(&self) -> Result<Exit> {
        match self {
            Command::Mount(args) => args.run(),
            Command::Umount(args) => args.run(),
            Command::Status(args) => args.run(),
            Command::Disk(command) => command.run(),
            Command::Snapshot(command) => command.run(),
            Command::Checkpoint(command) => command.run(),
            Command::Consumer(command) => command.run(),
            Command::Bitmap(command) => command.run(),
            Command::Backup(args) => args.run(),
            Command::Restore(args) => args.run(),
            Command::Map(args) => args.run(),
            Command::Run(args) => args.run(),
            Command::Check(args) => args.run(),
            Command::Info(args) => args.run(),
            Command::Completions(args) => args.run(),
            Command::ManPages(args) => args.run(),
            Command::Demo(args) => args.run(),
        }
    }

    /// 'No such thing' is an answer of the commands that look something up, and an error of those that open images.
    fn looks_up(&self) -> bool {
        !matches!(
            self,
            Command::Mount(_)
                | Command::Umount(_)
                | Command::Demo(_)
                | Command::ManPages(_)
                | Command::Disk(disk::DiskCommand::Add(_))
                | Command::Backup(_)
                | Command::Restore(_)
                | Command::Check(_)
                | Command::Info(_)
        )
    }
}

/// Parses, runs, reports.
pub fn main() -> ExitCode {
    let first = std::env::args_os().nth(1).unwrap_or_default();
    if first == freeze::GUARD_ROLE {
        return freeze::guard_main();
    }
    let command = match Cli::try_parse() {
        Ok(cli) => cli.command,
        Err(e) if e.use_stderr() => {
            let text = e.render().to_string();
            output::complain(&format!("fleecefs: usage: {}", text.strip_prefix("error: ").unwrap_or(&text).trim_end()));
            return ExitCode::from(if first == "run" { RUN_FAILED } else { 2 });
        }
        Err(e) => e.exit(),
    };
    match command.run() {
        Ok(Exit::Done) => ExitCode::SUCCESS,
        Ok(Exit::Differs) => ExitCode::from(1),
        Ok(Exit::Full) => ExitCode::from(3),
        Ok(Exit::Code(code)) => ExitCode::from(code),
        Err(e) => {
            output::complain(&explain(&e));
            if matches!(command, Command::Run(_)) {
                return ExitCode::from(RUN_FAILED);
            }
            ExitCode::from(if e.errno() == errno::ENOENT && command.looks_up() { 1 } else { 2 })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_of_the_manual_parses() {
        for line in [
            "mount -r -f raw -o noexec --disk name=a,file=/x,format=raw,read-only b=/y /mnt --state-dir /s \
             --store-dir /t --store-limit 10G --on-store-error fail-write --store-timeout 30 --chunk 64K --cache none \
             --threads 4 --owner root:root --mode 0640 --keep-snapshots --keep-checkpoints 10 --qmp /q --pidfile /p \
             --foreground",
            "umount /mnt --lazy",
            "status /mnt --json",
            "disk add /mnt a=/x",
            "disk remove /mnt a",
            "disk resize /mnt a 10G",
            "snapshot create /mnt s --disk a --disk b --since @c",
            "snapshot list /mnt --json",
            "snapshot show /mnt s",
            "snapshot complete /mnt s --consumer c",
            "snapshot cancel /mnt s",
            "snapshot release /mnt s a 0 64K",
            "checkpoint list /mnt a",
            "checkpoint delete /mnt s",
            "consumer list /mnt",
            "consumer set /mnt c s",
            "consumer delete /mnt c",
            "bitmap add /mnt a b -g 64K --persistent false --disabled",
            "bitmap remove /mnt a b",
            "bitmap clear /mnt a b",
            "bitmap enable /mnt a b",
            "bitmap disable /mnt a b",
            "bitmap merge /mnt a b c d -b e",
            "bitmap list /mnt a --json",
            "snapshot create /mnt s --freeze qga:/s --freeze libvirt:d --hook h --on-freeze-error continue --freeze-timeout 5",
            "run /mnt --consumer c --disk a --name s --freeze qga:/s --hook h -- cmd -x {snapshot} {map}",
            "map /mnt s a --since c --output borg",
            "map /mnt s a --totals --json",
            "completions bash",
            "man-pages /tmp",
            "backup /mnt --to /b --disk a --disk b --consumer c --rate 50M -p",
            "backup /mnt --to /b --full --format raw --threads 2 --json --name x --restart",
            "backup /mnt --to /b --compress --progress",
            "backup /mnt --to /b --compress=zlib",
            "restore /b --to /x --disk a --changed-only --verify --force --dry-run -p --json --threads 2",
            "restore /b/p --to /mnt/live/a.raw --volume p2",
            "demo /tmp",
        ] {
            let words = std::iter::once("fleecefs").chain(line.split_whitespace());
            assert!(Cli::try_parse_from(words).is_ok(), "{line}");
        }
        for line in [
            "",
            "mount",
            "mount --threads 0 a m",
            "mount --threads 65 a m",
            "mount --mode 0999 a m",
            "mount --chunk 5K a m",
            "mount --chunk 2K a m",
            "map /mnt s a --output xml",
            "backup /mnt",
            "backup /mnt --to /b --full --consumer c",
            "backup /mnt --to /b --format vmdk",
            "bitmap merge /mnt a b",
            "bitmap add /mnt a b -g x",
            "mount --nbd x a m",
            "snapshot create /mnt s --freeze x",
            "snapshot create /mnt s --freeze qga:x --freeze-timeout 11",
            "run /mnt --consumer c",
            "run /mnt -- cmd",
            "map /mnt s a --output borg --json",
        ] {
            let words = std::iter::once("fleecefs").chain(line.split_whitespace());
            assert!(Cli::try_parse_from(words).is_err(), "{line}");
        }
    }
}
