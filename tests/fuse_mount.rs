//! The promises of the mount, kept by a real one: served by this process, used by this process and by ordinary tools.
//!
//! The workers run in threads of their own, so a blocking call of a test never waits for itself. Where the machine has
//! no /dev/fuse, or a test needs root or a tool that is not there, it says so in one line and passes.

use fleecefs::fleece::{DiskSpec, Fleece, Options, SnapshotRequest};
use fleecefs::fuse::{MountOptions, Mounted, check_mountpoint, mount};
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};
use tempfile::TempDir;

const MIB: u64 = 1 << 20;
const DISK: u64 = 16 * MIB;
const BLOCK: usize = 4096;

struct Mount {
    dir: TempDir,
    fleece: Arc<Fleece>,
    mounted: Mounted,
}

impl Mount {
    /// `None`, with a line that says why, where nothing can be mounted.
    fn new() -> Option<Mount> {
        Mount::with_threads(4)
    }

    fn with_threads(threads: usize) -> Option<Mount> {
        if !Path::new("/dev/fuse").exists() {
            eprintln!("SKIP: no /dev/fuse on this machine");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("vda.raw");
        File::create(&file).unwrap().set_len(DISK).unwrap();
        let fleece = Fleece::new(Options { state_dir: Some(dir.path().join("state")), ..Options::default() });
        fleece.add_disk(&DiskSpec { file, ..Default::default() }).unwrap();
        let mountpoint = dir.path().join("mnt");
        fs::create_dir(&mountpoint).unwrap();
        check_mountpoint(&mountpoint).unwrap();
        let me = fs::metadata(dir.path()).unwrap();
        let options = MountOptions {
            threads,
            owner: (me.uid(), me.gid()),
            mode: 0o600,
            fuse_options: Vec::new(),
            read_only: false,
            status: Arc::new(|| serde_json::json!({"version": "test"})),
        };
        let mounted = mount(fleece.clone(), &mountpoint, &options).unwrap();
        Some(Mount { dir, fleece, mounted })
    }

    fn path(&self, path: &str) -> PathBuf {
        self.dir.path().join("mnt").join(path)
    }

    fn live(&self) -> PathBuf {
        self.path("live/vda.raw")
    }

    fn open_live(&self) -> File {
        OpenOptions::new().read(true).write(true).open(self.live()).unwrap()
    }

    fn mkdir(&self, name: &str) {
        fs::create_dir(self.path("snapshots").join(name)).unwrap();
    }

    fn rmdir(&self, name: &str) {
        fs::remove_dir(self.path("snapshots").join(name)).unwrap();
    }

    fn flushes(&self) -> Option<u64> {
        let flushes = self.fleece.counters().into_iter().find(|counter| counter.name.contains("flush"));
        flushes.map(|counter| counter.value)
    }

    /// The end of a test: a clean unmount ends the session.
    fn finish(self) {
        // A process that another test has just forked holds this one's files until it runs its program.
        let deadline = Instant::now() + Duration::from_secs(20);
        while let Err(e) = self.mounted.unmount(false) {
            assert!(e.errno() == libc::EBUSY && Instant::now() < deadline, "{e}");
            thread::sleep(Duration::from_millis(10));
        }
        self.mounted.wait().unwrap();
        assert_eq!(fs::read_dir(self.dir.path().join("mnt")).unwrap().count(), 0);
    }
}

fn os_error(result: io::Result<impl Sized>) -> i32 {
    result.map(|_| ()).unwrap_err().raw_os_error().unwrap()
}

fn is_root() -> bool {
    fs::metadata("/proc/self").unwrap().uid() == 0
}

/// Runs a tool; `None`, with a line, where it is not installed.
fn run(tool: &str, args: &[&str]) -> Option<String> {
    match Command::new(tool).args(args).output() {
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            eprintln!("SKIP: {tool} is not installed");
            None
        }
        Err(e) => panic!("{tool}: {e}"),
        Ok(output) => {
            let stderr = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{tool} {args:?}: {stderr}");
            Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
        }
    }
}

/// lseek(2) with SEEK_DATA (3) or SEEK_HOLE (4).
fn seek(file: &File, offset: u64, whence: i32) -> Result<u64, i32> {
    // SAFETY: plain lseek on a descriptor that `file` keeps open.
    let found = unsafe { libc::lseek(file.as_raw_fd(), offset as i64, whence) };
    u64::try_from(found).map_err(|_| io::Error::last_os_error().raw_os_error().unwrap())
}

fn fallocate(file: &File, mode: i32, offset: u64, len: u64) -> Result<(), i32> {
    // SAFETY: plain fallocate on a descriptor that `file` keeps open.
    let result = unsafe { libc::fallocate(file.as_raw_fd(), mode, offset as i64, len as i64) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error().raw_os_error().unwrap()) }
}

fn map_shared(file: &File) -> memmap2::MmapMut {
    // SAFETY: the file is this test's own; that others change it meanwhile is what is tested.
    unsafe { memmap2::MmapMut::map_mut(file).unwrap() }
}

/// A page-aligned piece of a larger buffer, for O_DIRECT.
fn aligned(buffer: &mut [u8], len: usize) -> &mut [u8] {
    let skip = buffer.as_ptr().align_offset(BLOCK);
    &mut buffer[skip..skip + len]
}

#[test]
fn the_live_file_reads_what_was_written_and_ends_as_a_block_device() {
    let Some(mount) = Mount::new() else { return };
    let file = mount.open_live();
    assert_eq!(file.metadata().unwrap().len(), DISK);
    let data: Vec<u8> = (0..3 * MIB).map(|n| (n % 251) as u8).collect();
    file.write_all_at(&data, 12345).unwrap();
    let mut back = vec![0; data.len()];
    file.read_exact_at(&mut back, 12345).unwrap();
    assert!(back == data);
    assert_eq!(file.read_at(&mut back, DISK).unwrap(), 0);
    assert_eq!(file.write_at(&data[..100], DISK - 10).unwrap(), 10);
    assert_eq!(os_error(file.write_at(&data[..100], DISK)), libc::ENOSPC);
    assert_eq!(file.metadata().unwrap().len(), DISK);
    file.sync_all().unwrap();
    drop(file);
    mount.finish();
}

#[test]
fn direct_io_needs_no_alignment_and_loses_no_byte() {
    let Some(mount) = Mount::new() else { return };
    let direct = OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(mount.live()).unwrap();
    let mut buffer = vec![7; 3 * BLOCK];
    let block = aligned(&mut buffer, BLOCK);
    direct.write_all_at(block, 0).unwrap();
    direct.write_all_at(b"three", 3).unwrap();
    let mut back = vec![0; 3 * BLOCK];
    let back = aligned(&mut back, BLOCK);
    direct.read_exact_at(back, 0).unwrap();
    assert_eq!(&back[..10], b"\x07\x07\x07three\x07\x07");
    assert!(back[8..].iter().all(|byte| *byte == 7));
    drop(direct);
    mount.finish();
}

#[test]
fn o_trunc_is_ignored_and_truncate_resizes() {
    // Another process serves: a mapping that is cut off after all ends this one with SIGBUS.
    let Some(mut mount) = Served::new() else { return };
    let live = mount.path("live/vda.raw");
    let file = mount.open_live();
    file.write_all_at(b"head", 0).unwrap();
    file.write_all_at(b"tail", DISK - 4).unwrap();
    let map = map_shared(&file);
    let truncated = OpenOptions::new().write(true).truncate(true).open(&live).unwrap();
    // Before anything makes the kernel ask for the size again: it must not have taken it for 0 meanwhile.
    assert_eq!(&map[DISK as usize - 4..], b"tail", "a mapping is not cut off");
    assert_eq!(truncated.metadata().unwrap().len(), DISK);
    assert_eq!(fs::metadata(&live).unwrap().len(), DISK);
    drop((map, truncated));
    let of = format!("of={}", live.display());
    if run("dd", &["if=/dev/zero", &of, "bs=1M", "count=1", "status=none"]).is_some() {
        let mut tail = [0; 4];
        file.read_exact_at(&mut tail, DISK - 4).unwrap();
        assert_eq!(&tail, b"tail");
        assert_eq!(file.metadata().unwrap().len(), DISK);
    }
    file.set_len(DISK + MIB).unwrap();
    assert_eq!(fs::metadata(&live).unwrap().len(), DISK + MIB);
    assert_eq!(file.write_at(b"more", DISK).unwrap(), 4);
    fs::create_dir(mount.path("snapshots/one")).unwrap();
    assert_eq!(os_error(file.set_len(DISK)), libc::EBUSY);
    assert_eq!(file.metadata().unwrap().len(), DISK + MIB);
    assert!(file.set_len(0).is_err());
    drop(file);
    mount.kill();
}

#[test]
fn holes_punching_and_zeroing_work_through_the_kernel() {
    let Some(mount) = Mount::new() else { return };
    let file = mount.open_live();
    file.write_all_at(&vec![1; MIB as usize], MIB).unwrap();
    mount.mkdir("one");
    let frozen = File::open(mount.path("snapshots/one/vda.raw")).unwrap();
    for file in [&file, &frozen] {
        assert_eq!(seek(file, 0, 3), Ok(MIB));
        assert_eq!(seek(file, MIB, 4), Ok(2 * MIB));
        assert_eq!(seek(file, 2 * MIB, 3), Err(libc::ENXIO));
        assert_eq!(seek(file, DISK, 4), Err(libc::ENXIO));
    }
    fallocate(&file, 0x3, MIB, 65536).unwrap();
    fallocate(&file, 0x10, MIB + 65536, 65536).unwrap();
    let mut buf = vec![9; 3 * 65536];
    file.read_exact_at(&mut buf, MIB).unwrap();
    assert!(buf[..2 * 65536].iter().all(|byte| *byte == 0) && buf[2 * 65536..].iter().all(|byte| *byte == 1));
    frozen.read_exact_at(&mut buf, MIB).unwrap();
    assert!(buf.iter().all(|byte| *byte == 1));
    assert_eq!(fallocate(&file, 0, 0, DISK + 1), Err(libc::ENOSPC));
    assert_eq!(fallocate(&file, 0x8, 0, 4096), Err(libc::EOPNOTSUPP));
    assert_eq!(file.metadata().unwrap().len(), DISK);
    drop((file, frozen));
    mount.finish();
}

#[test]
fn what_is_frozen_refuses_writers_and_stays_after_rmdir_while_open() {
    let Some(mount) = Mount::new() else { return };
    let live = mount.open_live();
    live.write_all_at(&[1; BLOCK], 0).unwrap();
    mount.mkdir("one");
    let path = mount.path("snapshots/one/vda.raw");
    assert_eq!(os_error(OpenOptions::new().write(true).open(&path)), libc::EROFS);
    assert_eq!(os_error(OpenOptions::new().read(true).write(true).truncate(true).open(&path)), libc::EROFS);
    assert_eq!(os_error(fs::remove_file(&path)), libc::EROFS);
    assert_eq!(os_error(fs::write(mount.path("snapshots/x"), "")), libc::EPERM);
    assert_eq!(os_error(fs::create_dir(mount.path("live/x"))), libc::EPERM);
    assert_eq!(os_error(fs::create_dir(mount.path("snapshots/one/x"))), libc::EROFS);
    assert_eq!(os_error(fs::remove_dir(mount.path("live"))), libc::EPERM);
    assert_eq!(os_error(fs::remove_dir(mount.path("snapshots/one/vda"))), libc::EROFS);
    assert_eq!(os_error(fs::rename(mount.path("snapshots/one"), mount.path("snapshots/two"))), libc::EPERM);
    assert_eq!(os_error(fs::create_dir(mount.path("snapshots/one"))), libc::EEXIST);
    assert_eq!(os_error(fs::create_dir(mount.path("snapshots/.x"))), libc::EINVAL);
    assert_eq!(os_error(fs::create_dir(mount.path("snapshots").join("x".repeat(201)))), libc::ENAMETOOLONG);
    assert_eq!(os_error(fs::remove_dir(mount.path("snapshots/latest"))), libc::ENOTDIR);
    assert_eq!(fs::read_link(mount.path("snapshots/latest")).unwrap(), Path::new("one"));
    let before = fs::metadata(&path).unwrap();
    let frozen = File::open(&path).unwrap();
    let direct = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(&path).unwrap();
    mount.rmdir("one");
    assert_eq!(os_error(fs::metadata(&path)), libc::ENOENT);
    assert_eq!(os_error(fs::symlink_metadata(mount.path("snapshots/latest"))), libc::ENOENT);
    live.write_all_at(&[2; BLOCK], 0).unwrap();
    for file in [&frozen, &direct] {
        let mut back = vec![0; 3 * BLOCK];
        let back = aligned(&mut back, BLOCK);
        file.read_exact_at(back, 0).unwrap();
        assert_eq!(back, [1; BLOCK]);
    }
    let after = frozen.metadata().unwrap();
    assert_eq!((before.ino(), before.len(), before.mtime_nsec()), (after.ino(), after.len(), after.mtime_nsec()));
    drop((frozen, direct, live));
    mount.mkdir("two");
    assert_ne!(fs::metadata(mount.path("snapshots/two/vda.raw")).unwrap().ino(), before.ino());
    mount.finish();
}

#[test]
fn ordinary_tools_read_the_tree() {
    let Some(mount) = Mount::new() else { return };
    let live = mount.open_live();
    live.write_all_at(&vec![5; 65536], 4 * MIB).unwrap();
    mount.mkdir("one");
    mount.rmdir("one");
    live.write_all_at(&vec![6; 65536], 8 * MIB).unwrap();
    mount.mkdir("two");
    let status: serde_json::Value = serde_json::from_slice(&fs::read(mount.path("status.json")).unwrap()).unwrap();
    assert_eq!(status["version"], "test");
    assert!(fs::read_to_string(mount.path("metrics")).unwrap().contains("# TYPE fleecefs_"));
    let map = fs::read(mount.path("snapshots/latest/vda.map")).unwrap();
    assert_eq!(map.len() as u64, fs::metadata(mount.path("snapshots/two/vda.map")).unwrap().len());
    let extents: serde_json::Value = serde_json::from_slice(&map).unwrap();
    let dirty = extents.as_array().unwrap().iter().find(|extent| extent["dirty"] == true).unwrap();
    assert_eq!((dirty["start"].as_u64(), dirty["length"].as_u64()), (Some(8 * MIB), Some(65536)));
    let mut names: Vec<_> = fs::read_dir(mount.path("snapshots/two/vda/since/one"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    let expected = ["changed.raw", "map.bmap", "map.borg", "map.ddrescue", "map.json", "map.nbd.json", "map.rbd.json"];
    assert_eq!(names, expected);
    let changed = mount.path("snapshots/two/vda/changed.raw");
    let copy = mount.dir.path().join("increment.raw");
    if run("cp", &["--sparse=auto", changed.to_str().unwrap(), copy.to_str().unwrap()]).is_some() {
        let copy = File::open(&copy).unwrap();
        assert_eq!(copy.metadata().unwrap().len(), DISK);
        let mut buf = vec![0; 65536];
        copy.read_exact_at(&mut buf, 8 * MIB).unwrap();
        assert!(buf.iter().all(|byte| *byte == 6));
        copy.read_exact_at(&mut buf, 4 * MIB).unwrap();
        assert!(buf.iter().all(|byte| *byte == 0), "that did not change since the reference point");
        assert!(copy.metadata().unwrap().blocks() <= 2 * MIB / 512, "cp kept the holes");
    }
    run("ls", &["-lR", mount.path("").to_str().unwrap()]);
    run("stat", &["-f", mount.path("").to_str().unwrap()]);
    drop(live);
    mount.finish();
}

#[test]
fn release_raw_frees_a_range_by_punching() {
    let Some(mount) = Mount::new() else { return };
    let live = mount.open_live();
    live.write_all_at(&vec![5; MIB as usize], 0).unwrap();
    mount.mkdir("one");
    let path = mount.path("snapshots/one/vda/release.raw");
    assert_eq!(os_error(File::open(&path)), libc::EACCES);
    let release = OpenOptions::new().write(true).open(&path).unwrap();
    assert_eq!(release.metadata().unwrap().len(), DISK);
    assert_eq!(os_error(release.write_at(b"x", 0)), libc::EINVAL);
    fallocate(&release, 0x3, 0, 65536).unwrap();
    let frozen = File::open(mount.path("snapshots/one/vda.raw")).unwrap();
    let mut buf = [0; 16];
    assert_eq!(os_error(frozen.read_at(&mut buf, 0)), libc::EIO);
    frozen.read_exact_at(&mut buf, 512 << 10).unwrap();
    assert_eq!(buf, [5; 16]);
    drop((live, release, frozen));
    mount.finish();
}

/// Stores through a shared mapping that was not synced are in the snapshot, however it is taken.
#[test]
fn a_snapshot_has_the_stores_of_shared_mappings() {
    let Some(mount) = Mount::new() else { return };
    let live = mount.open_live();
    let mut map = map_shared(&live);
    for (round, name) in ["one", "two"].into_iter().enumerate() {
        let byte = round as u8 + 1;
        for page in (0..DISK as usize).step_by(64 * BLOCK) {
            map[page + 5] = byte;
        }
        if name == "one" {
            mount.mkdir(name);
        } else {
            let request = SnapshotRequest { name: name.to_owned(), ..SnapshotRequest::default() };
            mount.mounted.control().create_snapshot(&request).unwrap();
        }
        map[5] = 99;
        map.flush().unwrap();
        let frozen = fs::read(mount.path("snapshots").join(name).join("vda.raw")).unwrap();
        for page in (0..DISK as usize).step_by(64 * BLOCK) {
            assert_eq!(frozen[page + 5], byte, "{name}, page at {page}");
        }
    }
    let mut back = [0; 6];
    live.read_exact_at(&mut back, 0).unwrap();
    assert_eq!(back[5], 99, "msync makes it visible to readers");
    live.write_all_at(&[77; 6], 0).unwrap();
    assert_eq!(map[5], 77, "and the mapping sees writes");
    drop((map, live));
    // What another surface writes is in a mapping that is made later.
    mount.fleece.disk("vda").unwrap().write(&[88; 6], 0).unwrap();
    let live = mount.open_live();
    let map = map_shared(&live);
    assert_eq!(map[5], 88);
    drop((map, live));
    mount.finish();
}

/// Snapshots wait for the write-back of mappings, which truncates hold back, and look the live file up, which whoever
/// makes something in its directory holds back: none of them may wait for a snapshot.
#[test]
fn snapshots_of_a_mapped_file_and_others_do_not_block_each_other() {
    // Another process serves: this one can be killed should they block each other after all.
    let Some(mut served) = Served::new() else { return };
    let live = served.open_live();
    let mut map = map_shared(&live);
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let file = served.open_live();
            while !done.load(Ordering::Relaxed) {
                file.set_len(DISK).unwrap();
                drop(OpenOptions::new().write(true).truncate(true).open(served.path("live/vda.raw")).unwrap());
            }
        });
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                assert_eq!(os_error(fs::create_dir(served.path("live/x"))), libc::EPERM);
                assert_eq!(os_error(fs::create_dir(served.path("x"))), libc::EPERM);
                assert_eq!(os_error(File::create(served.path("live/x"))), libc::EPERM);
            }
        });
        scope.spawn(|| {
            let mut byte = 0u8;
            while !done.load(Ordering::Relaxed) {
                byte = byte.wrapping_add(1);
                for page in map.chunks_mut(BLOCK) {
                    page[0] = byte;
                }
            }
        });
        for round in 0..30 {
            let path = served.path(&format!("snapshots/s{round}"));
            fs::create_dir(&path).unwrap();
            fs::remove_dir(&path).unwrap();
        }
        done.store(true, Ordering::Relaxed);
    });
    drop((map, live));
    served.kill();
}

/// Many writers with O_DIRECT, snapshots, readers: a frozen view is one state of each block and never changes.
#[test]
fn writers_snapshots_and_readers_run_together() {
    let Some(mount) = Mount::with_threads(8) else { return };
    const WRITERS: usize = 4;
    const BLOCKS: usize = 256;
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        for writer in 0..WRITERS {
            let (mount, done) = (&mount, &done);
            scope.spawn(move || {
                let options = OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).to_owned();
                let file = options.open(mount.live()).unwrap();
                let mut buffer = vec![0; 3 * BLOCK];
                let mut round = 0u8;
                while !done.load(Ordering::Relaxed) {
                    round = round.wrapping_add(1);
                    for block in (writer..BLOCKS).step_by(WRITERS) {
                        let block_data = aligned(&mut buffer, BLOCK);
                        block_data.fill(round ^ block as u8);
                        file.write_all_at(block_data, (block * BLOCK) as u64).unwrap();
                    }
                }
            });
        }
        for round in 0..12 {
            let name = format!("s{round}");
            mount.mkdir(&name);
            let path = mount.path("snapshots").join(&name).join("vda.raw");
            let cached = fs::read(&path).unwrap();
            for block in cached[..BLOCKS * BLOCK].chunks(BLOCK) {
                assert!(block.iter().all(|byte| *byte == block[0]), "a torn block");
            }
            let direct = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(&path).unwrap();
            let mut again = vec![0; DISK as usize + BLOCK];
            let again = aligned(&mut again, DISK as usize);
            direct.read_exact_at(again, 0).unwrap();
            assert!(again == cached, "{name} changed");
            drop(direct);
            mount.rmdir(&name);
        }
        done.store(true, Ordering::Relaxed);
    });
    mount.finish();
}

#[test]
fn writes_that_ask_for_durability_are_flushed() {
    let Some(mount) = Mount::new() else { return };
    let Some(before) = mount.flushes() else { return eprintln!("SKIP: the core counts no flushes") };
    let file = mount.open_live();
    file.write_all_at(b"x", 0).unwrap();
    assert_eq!(mount.flushes(), Some(before), "a plain write is not flushed");
    let sync = OpenOptions::new().write(true).custom_flags(libc::O_DSYNC).open(mount.live()).unwrap();
    sync.write_all_at(b"x", 0).unwrap();
    let after = mount.flushes().unwrap();
    assert!(after > before, "O_DSYNC");
    let data = [libc::iovec { iov_base: b"y".as_ptr() as *mut _, iov_len: 1 }];
    // SAFETY: one iovec over a byte that outlives the call.
    let written = unsafe { libc::pwritev2(file.as_raw_fd(), data.as_ptr(), 1, 0, libc::RWF_DSYNC) };
    assert_eq!(written, 1);
    assert!(mount.flushes().unwrap() > after, "RWF_DSYNC");
    let after = mount.flushes().unwrap();
    file.sync_data().unwrap();
    assert!(mount.flushes().unwrap() > after, "fdatasync");
    let after = mount.flushes().unwrap();
    drop((file, sync));
    assert_eq!(mount.flushes().unwrap(), after, "close is no flush");
    mount.finish();
}

#[test]
fn owner_and_mode_are_the_mounts_and_times_of_a_live_file_are_free() {
    let Some(mount) = Mount::new() else { return };
    let live = mount.open_live();
    live.set_permissions(fs::Permissions::from_mode(0o600)).unwrap();
    assert_eq!(os_error(live.set_permissions(fs::Permissions::from_mode(0o666))), libc::EPERM);
    live.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
    mount.mkdir("one");
    let frozen = File::open(mount.path("snapshots/one/vda.raw")).unwrap();
    assert_eq!(frozen.metadata().unwrap().mode() & 0o7777, 0o400);
    assert_eq!(os_error(frozen.set_modified(std::time::SystemTime::UNIX_EPOCH)), libc::EROFS);
    drop((live, frozen));
    mount.finish();
}

#[test]
fn a_busy_mount_answers_ebusy_and_goes_on() {
    let Some(mount) = Mount::new() else { return };
    let file = mount.open_live();
    assert_eq!(mount.mounted.unmount(false).unwrap_err().errno(), libc::EBUSY);
    file.write_all_at(b"still here", 0).unwrap();
    assert!(check_mountpoint(&mount.path("")).is_err());
    mount.mounted.unmount(true).unwrap();
    let mut back = [0; 10];
    file.read_exact_at(&mut back, 0).unwrap();
    assert_eq!(&back, b"still here", "out of sight, and served to the last close");
    assert!(!mount.live().exists());
    drop(file);
    mount.mounted.wait().unwrap();
}

#[test]
fn an_aborted_connection_leaves_no_mount_behind() {
    let Some(mount) = Mount::new() else { return };
    let control = mount.dir.path().join("connections");
    fs::create_dir(&control).unwrap();
    let control_text = control.to_str().unwrap();
    if !is_root()
        || !Command::new("mount").args(["-t", "fusectl", "none", control_text]).status().is_ok_and(|s| s.success())
    {
        eprintln!("SKIP: needs root and fusectl");
        return mount.finish();
    }
    let device = fs::metadata(mount.path("")).unwrap().dev();
    fs::write(control.join(libc::minor(device).to_string()).join("abort"), "1").unwrap();
    run("umount", &[control_text]);
    mount.mounted.wait().unwrap();
    assert_eq!(fs::read_dir(mount.path("")).unwrap().count(), 0);
}

/// Names the directory to serve from, for the process that a test kills.
const SERVE: &str = "FLEECEFS_TEST_SERVE";

/// Not a test but the process that [`Served`] starts.
#[test]
fn child_that_serves() {
    let Some(dir) = std::env::var_os(SERVE) else { return };
    let fleece = Fleece::new(Options { state_dir: Some(Path::new(&dir).join("state")), ..Options::default() });
    let file = Path::new(&dir).join("vda.raw");
    fleece.add_disk(&DiskSpec { file, ..Default::default() }).unwrap();
    let me = fs::metadata(&dir).unwrap();
    let options = MountOptions {
        threads: 4,
        owner: (me.uid(), me.gid()),
        mode: 0o600,
        fuse_options: Vec::new(),
        read_only: false,
        status: Arc::new(|| serde_json::Value::Null),
    };
    let mounted = mount(fleece, &Path::new(&dir).join("mnt"), &options).unwrap();
    println!("serving");
    mounted.wait().unwrap();
}

/// A mount that another process serves.
struct Served {
    dir: TempDir,
    child: Child,
}

impl Served {
    fn new() -> Option<Served> {
        if !Path::new("/dev/fuse").exists() {
            eprintln!("SKIP: no /dev/fuse on this machine");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        File::create(dir.path().join("vda.raw")).unwrap().set_len(DISK).unwrap();
        fs::create_dir(dir.path().join("mnt")).unwrap();
        let child = Served::start(dir.path());
        Some(Served { dir, child })
    }

    fn start(dir: &Path) -> Child {
        check_mountpoint(&dir.join("mnt")).unwrap();
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child_that_serves", "--nocapture"])
            .env(SERVE, dir)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        assert!(lines.any(|line| line.unwrap().ends_with("serving")), "the child must serve");
        child
    }

    fn path(&self, path: &str) -> PathBuf {
        self.dir.path().join("mnt").join(path)
    }

    fn open_live(&self) -> File {
        OpenOptions::new().read(true).write(true).open(self.path("live/vda.raw")).unwrap()
    }

    /// kill -9; the process must be gone soon.
    fn kill(&mut self) {
        self.child.kill().unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        while self.child.try_wait().unwrap().is_none() {
            assert!(Instant::now() < deadline, "the process does not die");
            thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        // Neither matters after a failure, nor where the test has killed it.
        let _ = self.child.kill();
        let _ = Command::new("umount").arg("-l").arg(self.dir.path().join("mnt")).status();
    }
}

/// A kill at any moment, also while the kernel writes mappings back, ends the process, and the next mount takes the
/// place of the dead one.
#[test]
fn a_killed_process_is_gone_and_its_mount_is_replaced() {
    let Some(mut served) = Served::new() else { return };
    for round in 0..8 {
        let file = served.open_live();
        let mut map = map_shared(&file);
        map.chunks_mut(BLOCK).for_each(|page| page[0] = 1);
        thread::scope(|scope| {
            let path = served.path(&format!("snapshots/s{round}"));
            scope.spawn(move || fs::create_dir(path));
            thread::sleep(Duration::from_millis(round * 2));
            served.kill();
        });
        // Pages of a mapping whose file system is gone are dropped with it.
        drop((map, file));
        served.child = Served::start(served.dir.path());
    }
    served.kill();
}

#[test]
fn loop_devices_and_file_systems_work_on_it() {
    let Some(mount) = Mount::with_threads(8) else { return };
    if !is_root() || !Path::new("/dev/loop-control").exists() {
        return eprintln!("SKIP: needs root and loop devices");
    }
    let live = mount.live();
    if run("mkfs.ext4", &["-q", "-F", live.to_str().unwrap()]).is_none() {
        return;
    }
    let Some(device) = run("losetup", &["--find", "--show", "--direct-io=on", live.to_str().unwrap()]) else { return };
    let inner = mount.dir.path().join("inner");
    fs::create_dir(&inner).unwrap();
    let inner_text = inner.to_str().unwrap().to_owned();
    run("mount", &[&device, &inner_text]);
    fs::write(inner.join("file"), "before").unwrap();
    run("sync", &["-f", &inner_text]);
    mount.mkdir("one");
    fs::write(inner.join("file"), "after").unwrap();
    run("umount", &[&inner_text]);
    run("losetup", &["--detach", &device]);
    let frozen = mount.path("snapshots/one/vda.raw");
    run("mount", &["-o", "loop,ro,noload", frozen.to_str().unwrap(), &inner_text]);
    let mut text = String::new();
    File::open(inner.join("file")).unwrap().read_to_string(&mut text).unwrap();
    run("umount", &[&inner_text]);
    assert_eq!(text, "before");
    // The loop device lets go of the file a moment after the unmount.
    while let Err(e) = mount.mounted.unmount(false) {
        assert_eq!(e.errno(), libc::EBUSY);
        thread::yield_now();
    }
    mount.mounted.wait().unwrap();
    io::stderr().flush().unwrap();
}
