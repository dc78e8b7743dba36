//! Between fuser and the tree: decodes, calls, replies. No decision about names, content or errors is taken here.
//!
//! What is decided here is *where* a request runs: in the worker that read it; in the slow lane, where a store may
//! hold it up; on the control thread (mkdir, rmdir) or on one of its own (truncate), see [`super::control`].

use super::attr::Attr;
use super::control::Control;
use super::files::{Access, Caching, Opened, Whence};
use super::inodes::Inode;
use super::lane::Lane;
use super::node::{Kind, Node};
use super::tree::{Tree, no_entry};
use crate::error::{Error, Result, errno};
use crate::storage::buffer::with_scratch;
use fuser::{
    BsdFileFlags, CopyFileRangeFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation,
    INodeNo, InitFlags, IoctlFlags, KernelConfig, LockOwner, OpenAccMode, OpenFlags, PollEvents, PollFlags,
    PollNotifier, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyIoctl,
    ReplyLseek, ReplyOpen, ReplyPoll, ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};
use std::ffi::OsStr;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Largest transfer of one request in bytes: the kernel's own limit.
const MAX_TRANSFER: u32 = 1 << 20;
/// Requests that the kernel may have in flight in the background: read-ahead and asynchronous direct I/O.
const MAX_BACKGROUND: u16 = 256;
/// What we ask of the kernel. Not WRITEBACK_CACHE: dirty pages would miss the freeze. Not ATOMIC_O_TRUNC: with it the
/// kernel takes the size for 0 after an open with O_TRUNC, and mappings and asynchronous readers of the file see its
/// end there until somebody asks for its attributes.
const CAPABILITIES: [InitFlags; 4] = [
    InitFlags::FUSE_ASYNC_DIO,
    InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP,
    InitFlags::FUSE_HANDLE_KILLPRIV_V2,
    InitFlags::FUSE_PARALLEL_DIROPS,
];

/// open(2)'s flags that fuser does not name, as this architecture has them.
mod flags {
    pub const O_DSYNC: i32 = 0o10000;
    pub const O_DIRECT: i32 = if cfg!(any(target_arch = "arm", target_arch = "aarch64")) {
        0o200_000
    } else if cfg!(any(target_arch = "powerpc", target_arch = "powerpc64")) {
        0o400_000
    } else {
        0o40_000
    };
}

const SEEK_DATA: i32 = 3;
const SEEK_HOLE: i32 = 4;

/// Runs a handler so that a panic in it ends neither the thread nor the mount: whoever waits gets EIO, as the reply
/// answers that when it is dropped.
pub fn caught(what: &str, handler: impl FnOnce()) {
    if catch_unwind(AssertUnwindSafe(handler)).is_err() {
        log::error!("{what}: panicked; the request failed with an I/O error");
    }
}

/// The file system that fuser drives.
pub struct Adapter {
    /// The tree.
    pub tree: Arc<Tree>,
    /// Snapshots and notifications.
    pub control: Arc<Control>,
    /// Requests that a store may hold up.
    pub lane: Arc<Lane>,
    /// Owner of every file.
    pub owner: (u32, u32),
    /// Called when the last worker has gone.
    pub ended: Box<dyn Fn() + Send + Sync>,
}

impl Drop for Adapter {
    fn drop(&mut self) {
        (self.ended)();
    }
}

fn failed(what: &str, inode: Option<&Inode>, e: &Error) -> Errno {
    let live = inode.is_some_and(|inode| inode.node.is_live());
    if live && e.errno() == errno::EIO {
        log::warn!("{what}: {e}");
    } else {
        log::debug!("{what}: {e:?}");
    }
    Errno::from_i32(e.errno())
}

fn text(name: &OsStr) -> Result<&str> {
    name.to_str().ok_or_else(|| no_entry("name that is not UTF-8"))
}

fn file_type(kind: Kind) -> FileType {
    match kind {
        Kind::Directory => FileType::Directory,
        Kind::File => FileType::RegularFile,
        Kind::Symlink => FileType::Symlink,
    }
}

fn system_time(ns: i64) -> SystemTime {
    let distance = Duration::from_nanos(ns.unsigned_abs());
    let time = if ns < 0 { UNIX_EPOCH.checked_sub(distance) } else { UNIX_EPOCH.checked_add(distance) };
    time.unwrap_or(UNIX_EPOCH)
}

fn fopen_flags(opened: &Opened) -> FopenFlags {
    match opened.caching {
        Caching::None => FopenFlags::FOPEN_DIRECT_IO,
        // Only shared mappings have pages of it. Each new mapping drops what is stale by itself; without KEEP_CACHE each
        // open would write back and drop the pages of everybody's mappings, one at a time.
        Caching::NoneParallel => {
            FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES | FopenFlags::FOPEN_KEEP_CACHE
        }
        Caching::Keep => FopenFlags::FOPEN_KEEP_CACHE,
    }
}

/// Any of fuser's replies.
trait Refuse: Send + 'static {
    fn refuse(self, errno: Errno);
}

macro_rules! refuse {
    ($($reply:ty),*) => {
        $(impl Refuse for $reply {
            fn refuse(self, errno: Errno) {
                self.error(errno);
            }
        })*
    };
}

refuse!(ReplyAttr, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyLseek, ReplyOpen, ReplyWrite);

/// Sends a result, or the errno of its error.
fn answer<R: Refuse, T>(what: &str, inode: Option<&Inode>, reply: R, result: Result<T>, send: impl FnOnce(R, T)) {
    match result {
        Ok(value) => send(reply, value),
        Err(e) => reply.refuse(failed(what, inode, &e)),
    }
}

fn never(_: &Node) -> bool {
    false
}

impl Adapter {
    /// Runs `job` on an inode: in this worker, or in the slow lane where a store may hold it up.
    fn serve<R: Refuse>(
        &self,
        what: &'static str,
        ino: INodeNo,
        slow: impl FnOnce(&Node) -> bool,
        reply: R,
        job: impl FnOnce(&Tree, &Inode, R) + Send + 'static,
    ) {
        caught(what, || match self.tree.inode(ino.0) {
            Ok(inode) if slow(&inode.node) => {
                let tree = self.tree.clone();
                self.lane.run(move || job(&tree, &inode, reply));
            }
            Ok(inode) => job(&self.tree, &inode, reply),
            Err(e) => reply.refuse(failed(what, None, &e)),
        });
    }

    /// Gives `job` to the control thread where `parent` is `snapshots/`; elsewhere the answer is a refusal, at once.
    fn hand_over<R: Refuse>(
        &self,
        what: &'static str,
        parent: INodeNo,
        reply: R,
        job: impl FnOnce(&Inode, R) + Send + 'static,
    ) {
        caught(what, || match self.tree.inode(parent.0) {
            Ok(parent) if parent.node == Node::Snapshots => self.control.run(Box::new(move || job(&parent, reply))),
            _ => reply.refuse(self.refusal(parent)),
        });
    }

    fn attr(owner: (u32, u32), attr: &Attr) -> FileAttr {
        let time = system_time(attr.time_ns);
        FileAttr {
            ino: INodeNo(attr.ino),
            size: attr.size,
            blocks: attr.blocks,
            atime: time,
            mtime: time,
            ctime: time,
            crtime: time,
            kind: file_type(attr.kind),
            perm: attr.perm,
            // As many file systems do where counting subdirectories would cost something.
            nlink: 1,
            uid: owner.0,
            gid: owner.1,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }

    fn send_entry(owner: (u32, u32), attr: &Attr, reply: ReplyEntry) {
        let sent = Self::attr(owner, attr);
        reply.entry_with_ttls(&attr.attr_ttl, &attr.entry_ttl, &sent, Generation(0));
    }

    /// The answer to whatever would make, move or remove something outside `snapshots/`.
    fn refusal(&self, parent: INodeNo) -> Errno {
        let frozen = self.tree.inode(parent.0).is_ok_and(|inode| inode.node.snapshot().is_some());
        if frozen { Errno::EROFS } else { Errno::EPERM }
    }

    /// chmod, chown and utimes: what changes nothing is granted, as is setting the times of a live file.
    fn check_setattr(
        tree: &Tree,
        owner: (u32, u32),
        inode: &Inode,
        mode: Option<u32>,
        [uid, gid]: [Option<u32>; 2],
        times: bool,
    ) -> Result<Attr> {
        let attr = tree.getattr(inode, None)?;
        let same = mode.is_none_or(|mode| mode & 0o7777 == u32::from(attr.perm))
            && uid.is_none_or(|uid| uid == owner.0)
            && gid.is_none_or(|gid| gid == owner.1);
        if same && (!times || inode.node.is_live()) {
            return Ok(attr);
        }
        let errno = if inode.node.snapshot().is_some() { errno::EROFS } else { errno::EPERM };
        Err(Error::new(errno, "attributes", "owner and mode are options of the mount"))
    }
}

impl Filesystem for Adapter {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> io::Result<()> {
        for capability in CAPABILITIES {
            if let Err(missing) = config.add_capabilities(capability) {
                log::info!("this kernel's FUSE lacks {missing:?}");
            }
        }
        config.set_max_write(MAX_TRANSFER).map_err(|most| io::Error::other(format!("max_write over {most}")))?;
        let background =
            config.set_max_background(MAX_BACKGROUND).and_then(|_| config.set_congestion_threshold(MAX_BACKGROUND));
        background.map(|_| ()).map_err(|least| io::Error::other(format!("max_background under {least}")))
    }

    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        caught("lookup", || {
            let (tree, owner) = (self.tree.clone(), self.owner);
            let entered = move |reply, attr: Result<Attr>| {
                answer("lookup", None, reply, attr, |reply, attr| Self::send_entry(owner, &attr, reply));
            };
            let parent = match self.tree.inode(parent.0) {
                Ok(parent) if parent.node.is_slow_to_list() => {
                    let name = name.to_owned();
                    return self.lane.run(move || {
                        entered(reply, text(&name).and_then(|name| tree.lookup(&parent, name)));
                    });
                }
                parent => parent,
            };
            let found = parent.and_then(|parent| self.tree.find(&parent, text(name)?));
            answer("lookup", None, reply, found, |reply, node| {
                let job = move || entered(reply, tree.enter(node));
                if node.is_slow_to_stat() { self.lane.run(job) } else { job() }
            });
        });
    }

    fn forget(&self, _req: &Request, ino: INodeNo, nlookup: u64) {
        caught("forget", || self.tree.forget(ino.0, nlookup));
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, fh: Option<FileHandle>, reply: ReplyAttr) {
        let owner = self.owner;
        self.serve("getattr", ino, Node::is_slow_to_stat, reply, move |tree, inode, reply| {
            let attr = tree.getattr(inode, fh.map(|fh| fh.0));
            answer("getattr", Some(inode), reply, attr, |reply, attr| {
                reply.attr(&attr.attr_ttl, &Self::attr(owner, &attr));
            });
        });
    }

    fn setattr(
        &self,
        _req: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let (tree, owner) = (self.tree.clone(), self.owner);
        let times = atime.is_some() || mtime.is_some();
        let job = move || {
            let attr = tree.inode(ino.0).and_then(|inode| match size {
                Some(size) => tree.set_size(&inode, size, fh.is_some()),
                None => Self::check_setattr(&tree, owner, &inode, mode, [uid, gid], times),
            });
            answer("setattr", None, reply, attr, |reply, attr| reply.attr(&attr.attr_ttl, &Self::attr(owner, &attr)));
        };
        if size.is_none() {
            return caught("setattr", job);
        }
        if let Err(e) = thread::Builder::new().name("truncate".to_owned()).spawn(move || caught("truncate", job)) {
            log::warn!("cannot start a thread: {e}");
        }
    }

    fn readlink(&self, _req: &Request, ino: INodeNo, reply: ReplyData) {
        self.serve("readlink", ino, never, reply, |tree, inode, reply| {
            answer("readlink", Some(inode), reply, tree.readlink(inode), |reply, target| reply.data(target.as_bytes()));
        });
    }

    fn mkdir(&self, _req: &Request, parent: INodeNo, name: &OsStr, _mode: u32, _umask: u32, reply: ReplyEntry) {
        let (control, name, owner) = (self.control.clone(), name.to_owned(), self.owner);
        self.hand_over("mkdir", parent, reply, move |_, reply| {
            let bad = || Error::new(errno::EINVAL, "name", "not UTF-8");
            let made = name.to_str().ok_or_else(bad).and_then(|name| control.mkdir(name));
            if let Err(e) = &made {
                log::info!("mkdir {}: {e}", name.display());
            }
            answer("mkdir", None, reply, made, |reply, attr| Self::send_entry(owner, &attr, reply));
        });
    }

    fn rmdir(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let (control, name) = (self.control.clone(), name.to_owned());
        self.hand_over("rmdir", parent, reply, move |parent, reply| {
            let removed = text(&name).and_then(|name| control.rmdir(parent, name));
            if let Err(e) = &removed {
                log::info!("rmdir {}: {e}", name.display());
            }
            answer("rmdir", None, reply, removed, |reply, ()| reply.ok());
        });
    }

    fn open(&self, _req: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let mode = flags.acc_mode();
        let access = Access {
            read: mode != OpenAccMode::O_WRONLY,
            write: mode != OpenAccMode::O_RDONLY,
            direct: flags.0 & flags::O_DIRECT != 0,
        };
        self.serve("open", ino, Node::is_slow_to_stat, reply, move |tree, inode, reply| {
            answer("open", Some(inode), reply, tree.open(inode, access), |reply, opened| {
                reply.opened(FileHandle(opened.handle), fopen_flags(&opened));
            });
        });
    }

    fn read(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        self.serve("read", ino, Node::is_slow, reply, move |tree, inode, reply| {
            with_scratch(size.min(MAX_TRANSFER) as usize, |buf| {
                let count = tree.read(inode, fh.0, offset, buf);
                answer("read", Some(inode), reply, count, |reply, count| reply.data(buf.get(..count).unwrap_or(&[])));
            });
        });
    }

    fn write(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        caught("write", || match self.tree.inode(ino.0) {
            Ok(inode) => {
                let sync = flags.0 & flags::O_DSYNC != 0;
                let asked = inode.clone();
                self.tree.write_then(&inode, fh.0, offset, data, sync, move |count| {
                    // A request carries at most MAX_TRANSFER bytes.
                    answer("write", Some(&asked), reply, count, |reply, count| reply.written(count as u32));
                });
            }
            Err(e) => reply.refuse(failed("write", None, &e)),
        });
    }

    /// The kernel then asks no more: nothing is kept back that a close would have to write.
    fn flush(&self, _req: &Request, _ino: INodeNo, _fh: FileHandle, _lock_owner: LockOwner, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }

    fn release(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        // The last close of a dropped snapshot's file is what removes its store.
        let slow = |node: &Node| node.snapshot().is_some();
        self.serve("release", ino, slow, reply, move |tree, inode, reply| {
            tree.release(inode, fh.0);
            reply.ok();
        });
    }

    fn fsync(&self, _req: &Request, ino: INodeNo, fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        self.serve("fsync", ino, never, reply, move |tree, inode, reply| {
            answer("fsync", Some(inode), reply, tree.fsync(inode, fh.0), |reply, ()| reply.ok());
        });
    }

    fn fsyncdir(&self, _req: &Request, _ino: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        reply.ok();
    }

    fn readdir(&self, _req: &Request, ino: INodeNo, _fh: FileHandle, offset: u64, reply: ReplyDirectory) {
        self.serve("readdir", ino, Node::is_slow_to_list, reply, move |tree, inode, reply| {
            answer("readdir", Some(inode), reply, tree.readdir(inode, offset), |mut reply, entries| {
                for entry in entries {
                    if reply.add(INodeNo(entry.ino), entry.offset, file_type(entry.kind), &entry.name) {
                        break;
                    }
                }
                reply.ok();
            });
        });
    }

    fn statfs(&self, _req: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        caught("statfs", || {
            let statfs = self.tree.statfs();
            // All of it free: nothing here fills up, and who watches for full file systems need not wake anybody.
            let all = statfs.blocks;
            reply.statfs(all, all, all, 0, 0, statfs.block, statfs.name_len, statfs.block);
        });
    }

    fn fallocate(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        self.serve("fallocate", ino, Node::is_slow, reply, move |tree, inode, reply| {
            let done = tree.fallocate(inode, fh.0, mode, offset, length);
            answer("fallocate", Some(inode), reply, done, |reply, ()| reply.ok());
        });
    }

    fn lseek(&self, _req: &Request, ino: INodeNo, fh: FileHandle, offset: i64, whence: i32, reply: ReplyLseek) {
        let whence = match whence {
            SEEK_DATA => Whence::Data,
            SEEK_HOLE => Whence::Hole,
            _ => return reply.error(Errno::EINVAL),
        };
        let Ok(offset) = u64::try_from(offset) else { return reply.error(Errno::ENXIO) };
        self.serve("lseek", ino, Node::is_slow, reply, move |tree, inode, reply| {
            let found = tree.seek(inode, fh.0, offset, whence);
            // At most the size of a disk, which fits a signed offset.
            answer("lseek", Some(inode), reply, found, |reply, found| reply.offset(found as i64));
        });
    }

    fn mknod(&self, _: &Request, parent: INodeNo, _: &OsStr, _: u32, _: u32, _: u32, reply: ReplyEntry) {
        reply.error(self.refusal(parent));
    }

    fn create(&self, _: &Request, parent: INodeNo, _: &OsStr, _: u32, _: u32, _: i32, reply: ReplyCreate) {
        reply.error(self.refusal(parent));
    }

    fn unlink(&self, _req: &Request, parent: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        reply.error(self.refusal(parent));
    }

    fn symlink(&self, _req: &Request, parent: INodeNo, _name: &OsStr, _target: &Path, reply: ReplyEntry) {
        reply.error(self.refusal(parent));
    }

    fn link(&self, _req: &Request, _ino: INodeNo, parent: INodeNo, _name: &OsStr, reply: ReplyEntry) {
        reply.error(self.refusal(parent));
    }

    fn rename(
        &self,
        _req: &Request,
        parent: INodeNo,
        _name: &OsStr,
        _new_parent: INodeNo,
        _new_name: &OsStr,
        _flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        reply.error(self.refusal(parent));
    }

    // ENOSYS makes the kernel remember that there are none; else it would ask once per write.
    fn getxattr(&self, _req: &Request, _ino: INodeNo, _name: &OsStr, _size: u32, reply: ReplyXattr) {
        reply.error(Errno::ENOSYS);
    }

    fn listxattr(&self, _req: &Request, _ino: INodeNo, _size: u32, reply: ReplyXattr) {
        reply.error(Errno::ENOSYS);
    }

    fn setxattr(&self, _: &Request, _: INodeNo, _: &OsStr, _: &[u8], _: i32, _: u32, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }

    fn removexattr(&self, _req: &Request, _ino: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }

    fn ioctl(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _flags: IoctlFlags,
        _cmd: u32,
        _in_data: &[u8],
        _out_size: u32,
        reply: ReplyIoctl,
    ) {
        reply.error(Errno::ENOTTY);
    }

    fn poll(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _ph: PollNotifier,
        _events: PollEvents,
        _flags: PollFlags,
        reply: ReplyPoll,
    ) {
        reply.error(Errno::ENOSYS);
    }

    // The kernel copies by itself then.
    fn copy_file_range(
        &self,
        _req: &Request,
        _ino_in: INodeNo,
        _fh_in: FileHandle,
        _offset_in: u64,
        _ino_out: INodeNo,
        _fh_out: FileHandle,
        _offset_out: u64,
        _len: u64,
        _flags: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        reply.error(Errno::ENOSYS);
    }
}
