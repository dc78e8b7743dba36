//! `fleecefs mount`: parses and checks everything before anything is touched.

use super::Exit;
use super::nbd::NbdTlsArgs;
use super::spec::{block_devices_by_name, format_by_name, l2_cache_size, parse_disk_option, parse_image};
use crate::daemon::{self, NbdPlan, OwnMount, Plan, absolute};
use crate::error::{Error, Result, errno};
use crate::fleece::{
    BlockDevicePolicy, DEFAULT_GUEST_SHARE, MAX_GUEST_SHARE, Options, Skip, StoreErrorPolicy, TrackingErrorPolicy,
};
use crate::image::{Cache, Format};
use crate::nbd::listen::Address;
use crate::storage::process;
use crate::units::{CHUNK_RANGE, DEFAULT_CHUNK, parse_size};
use clap::{Args, ValueEnum};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Arguments of `mount`.
#[derive(Debug, Args)]
#[command(override_usage = "fleecefs mount [OPTIONS] [[NAME=]IMAGE]... MNT")]
pub struct MountArgs {
    /// Serve the images read-only
    #[arg(short = 'r')]
    read_only: bool,
    /// Read the images while others may write to them; with -r
    #[arg(short = 'U', long)]
    force_share: bool,
    /// Format of the images
    #[arg(short = 'f', value_name = "FMT", value_parser = format_by_name)]
    format: Option<Format>,
    /// Mount option, for example noexec
    #[arg(short = 'o', value_name = "FUSEOPT", value_delimiter = ',')]
    fuse_options: Vec<String>,
    /// A disk in full: name=N,file=F[,format=raw|qcow2][,read-only][,snapshot=S][,force-share][,l2-cache-size=SIZE]
    /// [,block-devices=distrust|trust][,no-mark]; commas inside values are doubled
    #[arg(long = "disk", value_name = "OPTIONS")]
    disks: Vec<OsString>,
    /// Where to keep tracking state [default: IMAGE.fleece beside each image]
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// Where to keep the old content that snapshots preserve [default: with the state]
    #[arg(long, value_name = "DIR")]
    store_dir: Option<PathBuf>,
    /// Most space that the stores of one disk may take
    #[arg(long, value_name = "SIZE", value_parser = size)]
    store_limit: Option<u64>,
    /// When old content cannot be preserved: break the snapshot, or fail the guest's write
    #[arg(long, value_name = "POLICY", value_enum, default_value_t = OnStoreError::BreakSnapshot)]
    on_store_error: OnStoreError,
    /// When a change cannot be recorded: go on and note on the image that tracking is lost, or fail the guest's write
    #[arg(long, value_name = "POLICY", value_enum, default_value_t = OnTrackingError::Continue)]
    on_tracking_error: OnTrackingError,
    /// After a stop of a disk on a block device, where foreign writers leave no trace: count everything as changed, or
    /// believe that nobody else wrote
    #[arg(long, value_name = "POLICY", value_parser = block_devices_by_name, default_value = "distrust")]
    block_devices: BlockDevicePolicy,
    /// Leave no mark of ours in qcow2 images: only their times tell then who else wrote
    #[arg(long)]
    no_mark: bool,
    /// Seconds after which a store that does not answer counts as failed
    #[arg(long, value_name = "SECS", value_parser = clap::value_parser!(u64).range(1..=86400))]
    store_timeout: Option<u64>,
    /// Unit in which old content is preserved
    #[arg(long, value_name = "SIZE", value_parser = chunk, default_value = "4K")]
    chunk: u64,
    /// How the host's page cache is used for the images
    #[arg(long, value_name = "MODE", value_enum, default_value_t = CacheMode::Writeback)]
    cache: CacheMode,
    /// Percent of its speed that the guest keeps at least while views are read: readers wait where they take more. 0: they
    /// never wait
    #[arg(long, value_name = "PERCENT", value_parser = clap::value_parser!(u8).range(..=i64::from(MAX_GUEST_SHARE)), default_value_t = DEFAULT_GUEST_SHARE)]
    guest_share: u8,
    /// Most memory for the mapping tables of a qcow2 image [default: 64M]
    #[arg(long, value_name = "SIZE", value_parser = |text: &str| l2_cache_size(text).map_err(|e| e.to_string()))]
    l2_cache_size: Option<u64>,
    /// Threads that serve requests
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64), default_value_t = 16)]
    threads: u16,
    /// Owner of the files in the mount [default: you]
    #[arg(long, value_name = "USER:GROUP")]
    owner: Option<String>,
    /// Permissions of the files in the mount
    #[arg(long, value_name = "OCTAL", value_parser = mode, default_value = "0600")]
    mode: u32,
    /// Keep views across a clean umount
    #[arg(long)]
    keep_snapshots: bool,
    /// Most checkpoints of a disk; the oldest are merged away
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000_000), default_value_t = 1000)]
    keep_checkpoints: u32,
    /// Let volumes of live disks be written to: what is written there, the guest finds on its disk
    #[arg(long)]
    writable_volumes: bool,
    /// What snapshots leave out: swap (pages of swap areas), free (unused blocks of ext4); they read as zeros there
    #[arg(long, value_name = "swap,free", default_value_t, hide_default_value = true)]
    skip: Skip,
    /// Control socket [default: below /run/fleecefs, or $XDG_RUNTIME_DIR/fleecefs]
    #[arg(long, value_name = "PATH")]
    qmp: Option<PathBuf>,
    /// Serve all disks and snapshots by NBD: unix:PATH, or tcp:HOST:PORT; may be given several times
    #[arg(long, value_name = "ADDR")]
    nbd: Vec<Address>,
    #[command(flatten)]
    nbd_tls: NbdTlsArgs,
    /// Where to write the process id
    #[arg(long, value_name = "PATH")]
    pidfile: Option<PathBuf>,
    /// Stay in the foreground and log to standard error
    #[arg(long)]
    foreground: bool,
    /// Images, under the names of their files or NAME, and last the directory to mount on.
    ///
    /// Where a file exists under the whole of NAME=IMAGE, it is the image.
    #[arg(value_name = "[NAME=]IMAGE... MNT", required = true)]
    images_and_mountpoint: Vec<OsString>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum OnStoreError {
    /// Views of that disk break; the guest goes on
    BreakSnapshot,
    /// The guest gets the error; views stay whole
    FailWrite,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum OnTrackingError {
    /// The guest goes on; maps say everything
    Continue,
    /// The guest gets the error; maps stay right
    FailWrite,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum CacheMode {
    /// Through the page cache
    Writeback,
    /// Past the page cache (O_DIRECT)
    None,
}

fn size(text: &str) -> std::result::Result<u64, String> {
    parse_size(text).map_err(|e| e.to_string())
}

/// A copy unit: a power of two in [`CHUNK_RANGE`].
fn chunk(text: &str) -> std::result::Result<u64, String> {
    let bytes = size(text)?;
    if bytes.is_power_of_two() && CHUNK_RANGE.contains(&bytes) {
        return Ok(bytes);
    }
    Err(format!("not a power of two from {DEFAULT_CHUNK} to {} bytes", CHUNK_RANGE.end()))
}

/// Permission bits in octal.
fn mode(text: &str) -> std::result::Result<u32, String> {
    let digits = text.strip_prefix("0o").unwrap_or(text);
    match u32::from_str_radix(digits, 8) {
        Ok(mode) if mode <= 0o777 && !digits.starts_with('+') => Ok(mode),
        _ => Err("not permissions in octal, such as 0640".into()),
    }
}

impl MountArgs {
    /// Mounts; returns once the mount answers, or with `--foreground` once it has ended.
    pub fn run(&self) -> Result<Exit> {
        daemon::run(&self.plan()?)?;
        Ok(Exit::Done)
    }

    fn plan(&self) -> Result<Plan> {
        let Some((mountpoint, images)) = self.images_and_mountpoint.split_last() else {
            return Err(Error::new(errno::EINVAL, "mount", "no mount point given"));
        };
        let mountpoint = checked_mountpoint(Path::new(mountpoint))?;
        let mut disks = Vec::new();
        for text in &self.disks {
            disks.push(parse_disk_option(text)?);
        }
        for text in images {
            disks.push(parse_image(text)?);
        }
        let (fuse_options, read_only) = self.split_fuse_options();
        for disk in &mut disks {
            disk.format = disk.format.or(self.format);
            disk.read_only |= read_only;
            disk.force_share |= self.force_share;
            disk.l2_cache_bytes = disk.l2_cache_bytes.or(self.l2_cache_size);
        }
        let own_mount = OwnMount::planned(&mountpoint);
        let outside = |what: &str, path: &Option<PathBuf>| -> Result<Option<PathBuf>> {
            let Some(path) = path else { return Ok(None) };
            own_mount.refuse(what, path)?;
            Ok(Some(absolute(path)?))
        };
        Ok(Plan {
            options: self.options(outside("--state-dir", &self.state_dir)?, outside("--store-dir", &self.store_dir)?),
            disks,
            threads: usize::from(self.threads),
            owner: match &self.owner {
                Some(owner) => process::lookup_owner(owner)?,
                None => process::uid_gid(),
            },
            mode: self.mode,
            fuse_options,
            read_only,
            qmp: outside("--qmp", &self.qmp)?,
            nbd: self.nbd(&own_mount)?,
            pidfile: outside("--pidfile", &self.pidfile)?,
            foreground: self.foreground,
            mountpoint,
        })
    }

    /// The NBD server; its sockets lie outside of the mount.
    fn nbd(&self, own_mount: &OwnMount) -> Result<NbdPlan> {
        let outside = |address: &Address| match address {
            Address::Unix(path) => {
                own_mount.refuse("--nbd", path)?;
                Ok(Address::Unix(absolute(path)?))
            }
            Address::Tcp { .. } => Ok(address.clone()),
        };
        let addresses = self.nbd.iter().map(outside).collect::<Result<_>>()?;
        let plan = NbdPlan { addresses, tls: self.nbd_tls.plan(own_mount)? };
        plan.check()?;
        Ok(plan)
    }

    /// `-o ro` and `-o rw` are ours to obey, the rest is FUSE's.
    fn split_fuse_options(&self) -> (Vec<String>, bool) {
        let mut read_only = self.read_only;
        let mut rest = Vec::new();
        for option in self.fuse_options.iter().filter(|option| !option.is_empty()) {
            match option.as_str() {
                "ro" => read_only = true,
                "rw" => {}
                _ => rest.push(option.clone()),
            }
        }
        (rest, read_only)
    }

    fn options(&self, state_dir: Option<PathBuf>, store_dir: Option<PathBuf>) -> Options {
        let defaults = Options::default();
        Options {
            chunk: self.chunk,
            on_store_error: match self.on_store_error {
                OnStoreError::BreakSnapshot => StoreErrorPolicy::BreakSnapshot,
                OnStoreError::FailWrite => StoreErrorPolicy::FailWrite,
            },
            store_timeout: self.store_timeout.map_or(defaults.store_timeout, Duration::from_secs),
            // With the half that readers of views may take, that leaves some where all of these hang.
            store_calls_here: usize::from(self.threads) * 3 / 8,
            store_limit: self.store_limit,
            state_dir,
            store_dir,
            keep_snapshots: self.keep_snapshots,
            on_tracking_error: match self.on_tracking_error {
                OnTrackingError::Continue => TrackingErrorPolicy::Continue,
                OnTrackingError::FailWrite => TrackingErrorPolicy::FailWrite,
            },
            block_devices: self.block_devices,
            no_mark: self.no_mark,
            keep_checkpoints: self.keep_checkpoints as usize,
            cache: match self.cache {
                CacheMode::Writeback => Cache::Writeback,
                CacheMode::None => Cache::None,
            },
            guest_share: self.guest_share,
            writable_volumes: self.writable_volumes,
            skip: self.skip,
        }
    }
}

/// The mount point with links resolved. It must be a directory; a dead mount is taken, since the daemon detaches it.
fn checked_mountpoint(path: &Path) -> Result<PathBuf> {
    match std::fs::metadata(path) {
        Ok(metadata) if !metadata.is_dir() => Err(Error::new(errno::ENOTDIR, "mount point", "not a directory")
            .at_path(path)
            .hint("images come first and the mount point last: fleecefs mount [NAME=]IMAGE... MNT")),
        Err(e) if !process::is_dead_mount(&e) => {
            Err(Error::io("mount point", e).at_path(path).hint("create it with mkdir"))
        }
        _ => absolute(path),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: MountArgs,
    }

    fn plan(words: &[&str]) -> Result<Plan> {
        Line::try_parse_from(std::iter::once(&"mount").chain(words)).unwrap().args.plan()
    }

    #[test]
    fn modes_and_chunks_are_checked() {
        for (text, value) in [("0600", 0o600), ("600", 0o600), ("0", 0), ("0777", 0o777), ("0o640", 0o640)] {
            assert_eq!(mode(text), Ok(value), "{text}");
        }
        for text in ["", "8", "0608", "01777", "-1", "+600", "rw"] {
            assert!(mode(text).is_err(), "{text}");
        }
        for (text, value) in [("4K", 4096), ("65536", 65536), ("1M", 1 << 20)] {
            assert_eq!(chunk(text), Ok(value), "{text}");
        }
        for text in ["2K", "5K", "2M", "0", "x"] {
            assert!(chunk(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_plan_holds_what_was_said() {
        let dir = tempfile::tempdir().unwrap();
        let (image, mnt) = (dir.path().join("vda.raw"), dir.path().join("mnt"));
        std::fs::write(&image, "x").unwrap();
        std::fs::create_dir(&mnt).unwrap();
        let image = image.to_str().unwrap();
        let mnt = mnt.to_str().unwrap();
        let p = plan(&[
            "-o",
            "ro,noexec",
            "-f",
            "raw",
            "--mode",
            "0640",
            "--chunk",
            "64K",
            "--store-timeout",
            "7",
            image,
            mnt,
        ])
        .unwrap();
        assert_eq!(p.fuse_options, ["noexec"]);
        assert!(p.read_only && p.disks[0].read_only);
        assert_eq!(p.disks[0].name.as_deref(), Some("vda"));
        assert_eq!(p.disks[0].format, Some(Format::Raw));
        assert_eq!((p.mode, p.options.chunk, p.options.store_timeout.as_secs()), (0o640, 65536, 7));
        assert_eq!((p.threads, p.options.keep_checkpoints), (16, 1000));
        assert_eq!(p.mountpoint, absolute(Path::new(mnt)).unwrap());
    }

    #[test]
    fn what_is_believed_is_an_option_of_the_mount_and_of_each_disk() {
        let dir = tempfile::tempdir().unwrap();
        let (image, mnt) = (dir.path().join("vda.raw"), dir.path().join("mnt"));
        std::fs::write(&image, "x").unwrap();
        std::fs::create_dir(&mnt).unwrap();
        let (image, mnt) = (image.to_str().unwrap(), mnt.to_str().unwrap());
        let options = plan(&[image, mnt]).unwrap().options;
        assert_eq!(options.block_devices, BlockDevicePolicy::Distrust);
        assert_eq!((options.on_tracking_error, options.no_mark), (TrackingErrorPolicy::Continue, false));
        let disk = format!("file={image},no-mark=off,block-devices=distrust");
        let words =
            ["--block-devices", "trust", "--on-tracking-error", "fail-write", "--no-mark", "--disk", &disk, mnt];
        let p = plan(&words).unwrap();
        assert_eq!(p.options.block_devices, BlockDevicePolicy::Trust);
        assert_eq!((p.options.on_tracking_error, p.options.no_mark), (TrackingErrorPolicy::FailWrite, true));
        assert_eq!((p.disks[0].block_devices, p.disks[0].no_mark), (Some(BlockDevicePolicy::Distrust), Some(false)));
    }

    #[test]
    fn wrong_places_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (image, mnt) = (dir.path().join("vda.raw"), dir.path().join("mnt"));
        std::fs::write(&image, "x").unwrap();
        std::fs::create_dir(&mnt).unwrap();
        let (image, mnt) = (image.to_str().unwrap(), mnt.to_str().unwrap());
        let e = plan(&[mnt, image]).unwrap_err();
        assert_eq!(e.errno(), errno::ENOTDIR);
        assert!(e.hint_text().unwrap().contains("mount point last"));
        let inside = format!("{mnt}/s");
        for option in ["--state-dir", "--store-dir", "--qmp", "--pidfile"] {
            let e = plan(&[option, &inside, image, mnt]).unwrap_err();
            assert!(e.to_string().contains("inside the mount point"), "{e}");
        }
        assert_eq!(plan(&[image, "/no/such"]).unwrap_err().errno(), errno::ENOENT);
    }
}
