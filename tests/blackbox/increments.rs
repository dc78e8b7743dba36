//! New increments from `changed.raw`, and full copies of a view, by the tools that users have: `doc/tools.md` has a line
//! for each of these tests.

use crate::harness::*;
use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Granules that the guest overwrote; of every two one was a hole before.
const WRITTEN: std::ops::Range<u64> = 0..24;
/// Granules of data that the guest overwrote with zeros, and those that it discarded.
const ZEROED: [u64; 2] = [8, 38];
const DISCARDED: [u64; 2] = [68, 98];
/// What a file may occupy beside 105 % of what changed, for the file system's own.
const SLACK_BYTES: u64 = 128 << 10;

/// A disk of 8 MiB, half of it data, whose snapshot `next` differs from `base` here and there.
pub struct Scene {
    pub mount: Mount,
    pub rig: Rig,
    /// What `base` and `next` froze.
    pub old: Vec<u8>,
    pub new: Vec<u8>,
    /// Bytes that the map calls changed.
    dirty_bytes: u64,
}

impl Scene {
    pub fn new() -> Scene {
        let rig = Rig::new();
        let mount = rig.mount([rig.image("vda", 8)]);
        mount.snap("base");
        let old = fs::read(mount.view("base", "vda")).unwrap();
        mount.drop_snap("base");
        let guest = mount.guest("vda");
        for index in WRITTEN {
            guest.write_all_at(&pattern(index + 1000, GRANULE as usize), (5 * index + 1) * GRANULE).unwrap();
        }
        for granule in ZEROED {
            guest.write_all_at(&[0; GRANULE as usize], granule * GRANULE).unwrap();
        }
        for granule in DISCARDED {
            let (offset, length) = ((granule * GRANULE).to_string(), GRANULE.to_string());
            ok(tool("fallocate").args(["-p", "-o", &offset, "-l", &length]).arg(mount.live("vda")));
        }
        mount.snap("next");
        let new = fs::read(mount.view("next", "vda")).unwrap();
        let dirty_bytes = mount.map("next", "vda").0.iter().filter(|e| e.dirty).map(|e| e.length).sum();
        assert_eq!(dirty_bytes, 28 * GRANULE);
        Scene { mount, rig, old, new, dirty_bytes }
    }

    pub fn view(&self) -> PathBuf {
        self.mount.view("next", "vda")
    }

    pub fn since(&self, file: &str) -> PathBuf {
        self.mount.snapshot_dir("next").join("vda/since/base").join(file)
    }

    pub fn changed(&self) -> PathBuf {
        self.since("changed.raw")
    }

    /// What an increment reads as: what changed, zeros for the rest.
    pub fn increment(&self) -> Vec<u8> {
        let mut content = vec![0; self.new.len()];
        for range in self.ranges(|e| e.dirty) {
            content[range.clone()].copy_from_slice(&self.new[range]);
        }
        content
    }

    /// Ranges of the map.
    pub fn ranges(&self, which: impl Fn(&MapExtent) -> bool) -> Vec<std::ops::Range<usize>> {
        let map = self.mount.map_since("next", "vda", "base");
        map.0.iter().filter(|e| which(e)).map(|e| e.start as usize..(e.start + e.length) as usize).collect()
    }

    /// A name for a new file.
    pub fn file(&self) -> PathBuf {
        self.rig.path(&unique("file"))
    }

    /// `path` is an increment, and as small as the changes.
    #[track_caller]
    fn is_small_increment(&self, path: &Path) {
        assert!(fs::read(path).unwrap() == self.increment(), "{} is wrong", path.display());
        self.is_small(fs::metadata(path).unwrap().blocks() * 512);
    }

    #[track_caller]
    fn is_small(&self, bytes: u64) {
        let most = self.dirty_bytes * 105 / 100 + SLACK_BYTES;
        assert!(bytes <= most, "{bytes} bytes for {} that changed", self.dirty_bytes);
    }

    /// `path` is a full copy, without blocks where the disk has holes.
    #[track_caller]
    fn is_sparse_copy(&self, path: &Path) {
        assert!(fs::read(path).unwrap() == self.new, "{} is wrong", path.display());
        let data: u64 = data_ranges(&self.view()).iter().map(|(start, end)| end - start).sum();
        assert!(data < 6 << 20, "{data} bytes of data");
        let bytes = fs::metadata(path).unwrap().blocks() * 512;
        assert!(bytes <= data * 105 / 100 + SLACK_BYTES, "{bytes} bytes for {data} of data");
    }
}

pub fn cp(sparse: &str) -> Command {
    let mut command = tool("cp");
    command.arg(format!("--sparse={sparse}"));
    command
}

/// rsync that goes by content, not by size and time: files of one test are of one second.
pub fn rsync(options: &[&str]) -> Command {
    let mut command = tool("rsync");
    command.arg("--ignore-times").args(options);
    command
}

pub fn dd(conv: &str, source: &Path, target: &Path) -> Command {
    let mut command = tool("dd");
    command.arg(format!("if={}", source.display())).arg(format!("of={}", target.display()));
    command.args(["bs=64K", "status=none", &format!("conv={conv}")]);
    command
}

/// Packs `source` with `tar -S`; the archive.
fn tar(scene: &Scene, source: &Path) -> PathBuf {
    let archive = scene.file();
    let (dir, name) = (source.parent().unwrap(), source.file_name().unwrap());
    ok(tool("tar").arg("-cSf").arg(&archive).arg("-C").arg(dir).arg(name));
    archive
}

/// Unpacks an archive of one file; the file.
pub fn untar(scene: &Scene, archive: &Path, name: &str) -> PathBuf {
    let dir = scene.rig.mount_point(&unique("dir"));
    ok(tool("tar").arg("-xSf").arg(archive).arg("-C").arg(&dir));
    dir.join(name)
}

#[test]
fn cp_makes_a_small_increment() {
    requires!("xfs_io", "fallocate");
    let scene = Scene::new();
    for sparse in ["auto", "always"] {
        let file = scene.file();
        ok(cp(sparse).arg(scene.changed()).arg(&file));
        scene.is_small_increment(&file);
    }
}

#[test]
fn an_increment_without_changes_takes_nothing() {
    requires!("xfs_io", "fallocate");
    let scene = Scene::new();
    scene.mount.snap("same");
    let changed = scene.mount.snapshot_dir("same").join("vda/since/next/changed.raw");
    assert_eq!(data_ranges(&changed), []);
    let file = scene.file();
    ok(cp("auto").arg(&changed).arg(&file));
    let metadata = fs::metadata(&file).unwrap();
    assert_eq!((metadata.len(), metadata.blocks()), (8 << 20, 0));
    let archive = tar(&scene, &changed);
    assert!(fs::metadata(&archive).unwrap().len() <= 20 << 10);
    let unpacked = fs::metadata(untar(&scene, &archive, "changed.raw")).unwrap();
    assert_eq!((unpacked.len(), unpacked.blocks()), (8 << 20, 0));
}

#[test]
fn rsync_makes_a_small_increment() {
    requires!("rsync", "fallocate");
    let scene = Scene::new();
    for options in [&["--sparse"][..], &["--sparse", "--inplace"]] {
        let file = scene.file();
        ok(rsync(options).arg(scene.changed()).arg(&file));
        scene.is_small_increment(&file);
    }
}

#[test]
fn tar_makes_a_small_increment() {
    requires!("fallocate");
    let scene = Scene::new();
    let archive = tar(&scene, &scene.changed());
    scene.is_small(fs::metadata(&archive).unwrap().len());
    scene.is_small_increment(&untar(&scene, &archive, "changed.raw"));
}

#[test]
fn dd_makes_a_small_increment() {
    requires!("fallocate");
    let scene = Scene::new();
    let file = scene.file();
    ok(&mut dd("sparse", &scene.changed(), &file));
    scene.is_small_increment(&file);
}

#[test]
fn qemu_img_makes_a_small_increment() {
    requires!("fallocate", "qemu-img");
    let scene = Scene::new();
    for format in ["raw", "qcow2"] {
        let file = scene.file();
        ok(tool("qemu-img").args(["convert", "-f", "raw", "-O", format]).arg(scene.changed()).arg(&file));
        scene.is_small(fs::metadata(&file).unwrap().blocks() * 512);
        let raw = scene.file();
        ok(tool("qemu-img").args(["convert", "-f", format, "-O", "raw"]).arg(&file).arg(&raw));
        scene.is_small_increment(&raw);
    }
}

#[test]
fn restic_makes_a_small_increment() {
    requires!("fallocate", "restic");
    let scene = Scene::new();
    let repository = scene.rig.path("repository");
    let restic = |args: &[&str], more: &Path| {
        let mut command = tool("restic");
        command.env("RESTIC_REPOSITORY", &repository).env("RESTIC_PASSWORD", "x").env("HOME", scene.rig.path("home"));
        ok(command.args(["--no-cache", "-q"]).args(args).arg(more))
    };
    restic(&["init", "--repo"], &repository);
    restic(&["backup"], &scene.changed());
    scene.is_small(blocks_below(&repository) * 512 - SLACK_BYTES);
    let target = scene.rig.mount_point("restored");
    restic(&["restore", "latest", "--target"], &target);
    let file = target.join(scene.changed().strip_prefix("/").unwrap());
    assert!(fs::read(file).unwrap() == scene.increment());
}

#[test]
fn borg_makes_a_small_increment() {
    requires!("fallocate", "borg");
    let scene = Scene::new();
    let repository = scene.rig.path("repository");
    let out = scene.rig.mount_point("restored");
    let borg = |command: &str, options: &[&str], archive: &str, file: Option<&Path>| {
        let mut tool = tool("borg");
        tool.env("BORG_BASE_DIR", scene.rig.path("home")).env("BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK", "yes");
        tool.arg(command).args(options).arg(format!("{}{archive}", repository.display())).args(file);
        ok(tool.current_dir(&out));
    };
    borg("init", &["-e", "none"], "", None);
    borg("create", &["--sparse", "--chunker-params", "fixed,65536"], "::next", Some(&scene.changed()));
    scene.is_small(blocks_below(&repository) * 512 - SLACK_BYTES);
    borg("extract", &["--sparse"], "::next", None);
    scene.is_small_increment(&out.join(scene.changed().strip_prefix("/").unwrap()));
}

#[test]
fn an_increment_has_holes_where_the_disk_became_zeros_and_needs_its_map() {
    requires!("xfs_io", "fallocate");
    let scene = Scene::new();
    let file = scene.file();
    ok(cp("always").arg(scene.changed()).arg(&file));
    let data = data_ranges(&file);
    let zeroed = scene.ranges(|e| e.dirty && e.zero);
    assert_eq!(zeroed.len(), DISCARDED.len());
    for range in zeroed {
        let start = range.start as u64;
        assert!(data.iter().all(|(from, to)| start < *from || start >= *to), "{range:?} is data in {data:?}");
    }
    assert_ne!(data, data_ranges(&scene.changed()));
}

/// Bytes that a command read of `source`, and the calls that a kernel could answer without a read.
fn traced(scene: &Scene, source: &Path, command: &[&std::ffi::OsStr]) -> (u64, String) {
    let log = scene.file();
    let calls = "trace=read,pread64,copy_file_range,sendfile,splice,ioctl";
    ok(tool("strace").args(["-f", "-y", "-s0", "-e", calls, "-o"]).arg(&log).args(command));
    let text = fs::read_to_string(&log).unwrap();
    let mark = format!("<{}>", source.display());
    let of_source = || text.lines().filter(|line| line.contains(&mark));
    let count = |line: &str| line.rsplit("= ").next().and_then(|n| n.trim().parse::<u64>().ok());
    let reads = |line: &&str| line.contains("read(") || line.contains("pread64(") || line.contains("copy_file_range(");
    let others = of_source().filter(|line| !line.contains("read")).collect::<Vec<_>>().join("\n");
    (of_source().filter(reads).filter_map(count).sum(), others)
}

#[test]
fn cp_and_tar_read_the_changes_alone() {
    requires!("xfs_io", "fallocate", "strace");
    let scene = Scene::new();
    let changed = scene.changed();
    let ranges = data_ranges(&changed);
    let expected: Vec<_> =
        scene.mount.map("next", "vda").granules().iter().map(|g| (g * GRANULE, (g + 1) * GRANULE)).collect();
    assert_eq!(ranges, expected, "SEEK_DATA finds the changes, zeros too");
    let file = scene.file();
    for sparse in ["--sparse=auto", "--sparse=always"] {
        let (bytes, calls) =
            traced(&scene, &changed, &["cp".as_ref(), sparse.as_ref(), changed.as_ref(), file.as_ref()]);
        assert_eq!(bytes, scene.dirty_bytes, "{sparse}: {calls}");
    }
    let (bytes, _) = traced(&scene, &changed, &["tar".as_ref(), "-cSf".as_ref(), file.as_ref(), changed.as_ref()]);
    assert_eq!(bytes, scene.dirty_bytes);
    // What says to cp(1) and tar(1) that a file has holes.
    let metadata = fs::metadata(&changed).unwrap();
    assert_eq!(metadata.blocks() * 512, scene.dirty_bytes);
    assert!(fs::metadata(scene.view()).unwrap().blocks() * 512 < metadata.len());
}

#[test]
fn full_copies_of_a_view_are_right_and_sparse() {
    requires!("xfs_io", "fallocate", "rsync", "qemu-img");
    let scene = Scene::new();
    let view = scene.view();
    let copy = |command: &mut Command| {
        let file = scene.file();
        ok(command.arg(&view).arg(&file));
        scene.is_sparse_copy(&file);
    };
    copy(&mut cp("auto"));
    copy(&mut cp("always"));
    copy(&mut rsync(&["--sparse"]));
    copy(tool("qemu-img").args(["convert", "-f", "raw", "-O", "raw"]));
    let file = scene.file();
    ok(&mut dd("sparse", &view, &file));
    scene.is_sparse_copy(&file);
    let archive = tar(&scene, &view);
    scene.is_sparse_copy(&untar(&scene, &archive, "vda.raw"));
}
