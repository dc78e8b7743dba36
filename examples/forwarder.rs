//! The limit that `contrib/bench/compare` measures against: one file through FUSE, with the mount's settings, and
//! nothing but one pread or pwrite for each request.
//!
//! ```text
//! forwarder [--direct] [--threads N] FILE MNT
//! ```
//!
//! FILE appears as MNT/disk.raw; with `--direct` its page cache is left out. It serves until MNT is unmounted.

use fleecefs::storage::buffer::with_scratch;
use fuser::{
    Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, InitFlags,
    KernelConfig, LockOwner, MountOption, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry, ReplyOpen,
    ReplyWrite, ReplyXattr, Request, SessionACL, WriteFlags,
};
use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, UNIX_EPOCH};

/// The name of the file in the mount.
const NAME: &str = "disk.raw";
const FILE_INO: INodeNo = INodeNo(2);
/// Names and attributes never change.
const TTL: Duration = Duration::from_secs(3600);
/// Largest transfer of one request in bytes, and requests in the background: those of `src/fuse/adapter.rs`.
const MAX_TRANSFER: u32 = 1 << 20;
const MAX_BACKGROUND: u16 = 256;
const CAPABILITIES: InitFlags = InitFlags::FUSE_ASYNC_DIO
    .union(InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP)
    .union(InitFlags::FUSE_HANDLE_KILLPRIV_V2)
    .union(InitFlags::FUSE_PARALLEL_DIROPS);
/// As this architecture has it.
const O_DIRECT: i32 = if cfg!(any(target_arch = "arm", target_arch = "aarch64")) { 0o200000 } else { 0o40000 };

struct Forwarder {
    file: File,
    size: u64,
    /// The file is open with O_DIRECT, which takes page-aligned memory alone.
    direct: bool,
}

impl Forwarder {
    fn open(path: &Path, direct: bool) -> io::Result<Forwarder> {
        let flags = if direct { O_DIRECT } else { 0 };
        let file = OpenOptions::new().read(true).write(true).custom_flags(flags).open(path)?;
        Ok(Forwarder { size: file.metadata()?.len(), file, direct })
    }

    fn attr(&self, ino: INodeNo) -> FileAttr {
        let file = ino == FILE_INO;
        FileAttr {
            ino,
            size: if file { self.size } else { 0 },
            blocks: self.size / 512,
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind: if file { FileType::RegularFile } else { FileType::Directory },
            perm: if file { 0o600 } else { 0o700 },
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }

    fn pwrite(&self, data: &[u8], offset: u64) -> io::Result<usize> {
        if !self.direct {
            return self.file.write_at(data, offset);
        }
        // A request's data does not begin at a page.
        with_scratch(data.len(), |buf| {
            buf.copy_from_slice(data);
            self.file.write_at(buf, offset)
        })
    }
}

impl Filesystem for Forwarder {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let refused = |what: &str| io::Error::other(format!("the kernel refuses our {what}"));
        config.add_capabilities(CAPABILITIES).map_err(|_| refused("capabilities"))?;
        config.set_max_write(MAX_TRANSFER).map_err(|_| refused("max_write"))?;
        config.set_max_background(MAX_BACKGROUND).map_err(|_| refused("max_background"))?;
        config.set_congestion_threshold(MAX_BACKGROUND).map_err(|_| refused("congestion threshold"))?;
        Ok(())
    }

    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if parent == INodeNo::ROOT && name == NAME {
            reply.entry(&TTL, &self.attr(FILE_INO), Generation(0));
        } else {
            reply.error(Errno::ENOENT);
        }
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&TTL, &self.attr(ino));
    }

    fn open(&self, _req: &Request, _ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        let flags =
            FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES | FopenFlags::FOPEN_KEEP_CACHE;
        reply.opened(FileHandle(0), flags);
    }

    fn read(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        with_scratch(size.min(MAX_TRANSFER) as usize, |buf| match self.file.read_at(buf, offset) {
            Ok(count) => reply.data(&buf[..count]),
            Err(e) => reply.error(e.into()),
        });
    }

    fn write(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        match self.pwrite(data, offset) {
            Ok(count) => reply.written(count as u32),
            Err(e) => reply.error(e.into()),
        }
    }

    fn flush(&self, _req: &Request, _ino: INodeNo, _fh: FileHandle, _lock_owner: LockOwner, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }

    fn fsync(&self, _req: &Request, _ino: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        match self.file.sync_data() {
            Ok(()) => reply.ok(),
            Err(e) => reply.error(e.into()),
        }
    }

    // ENOSYS makes the kernel remember that there are none; else it would ask once per write.
    fn getxattr(&self, _req: &Request, _ino: INodeNo, _name: &OsStr, _size: u32, reply: ReplyXattr) {
        reply.error(Errno::ENOSYS);
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    const USAGE: &str = "usage: forwarder [--direct] [--threads N] FILE MNT";
    let (mut direct, mut threads, mut paths) = (false, 16, Vec::new());
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        match word.as_str() {
            "--direct" => direct = true,
            "--threads" => threads = words.next().ok_or(USAGE)?.parse()?,
            _ => paths.push(word),
        }
    }
    let [file, mnt] = paths.as_slice() else { return Err(USAGE.into()) };
    let mut config = Config::default();
    config.mount_options = vec![MountOption::FSName("forwarder".to_owned()), MountOption::DefaultPermissions];
    config.acl = SessionACL::All;
    config.n_threads = Some(threads);
    config.clone_fd = true;
    fuser::mount(Forwarder::open(Path::new(file), direct)?, mnt, &config)?;
    Ok(())
}
