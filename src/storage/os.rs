//! Files and block devices of the operating system.
//!
//! O_DIRECT (`direct`) comes with two rules of the kernel that show in the contract: transfers keep to
//! [`Storage::alignment`], and a file whose size is no multiple of it has a last piece that O_DIRECT cannot write
//! without making the file longer. From the start of the page that holds this last piece on, I/O goes through a second,
//! buffered descriptor; no page is ever reached both ways, so the page cache cannot write back stale neighbours.
//!
//! Every medium gets the zeros it can do best (`fallocate`); where it can do none, zeros are written, never past the
//! end of the file.

use super::buffer::{PAGE_BYTES, with_scratch};
use super::known::KnownData;
use super::{BlockStatus, Space, Stamp, Storage, attribute, clock, end_of};
use crate::error::{Error, Result, errno};
use crate::units::{round_down, round_up};
use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// Alignment for O_DIRECT where the kernel does not tell: enough for all media but those that do tell.
const UNKNOWN_ALIGNMENT: u64 = 4096;
/// Largest alignment for O_DIRECT that is believed.
const MAX_ALIGNMENT: u64 = PAGE_BYTES as u64;
/// Bytes of zeros that are written at once where a medium cannot make them itself.
const ZEROS_BYTES: usize = 1 << 20;

/// How to open a file; by default for reading only, through the page cache, and only if it exists.
#[derive(Debug, Clone, Copy, Default)]
pub struct OpenOptions {
    /// For writing too.
    pub write: bool,
    /// O_DIRECT.
    pub direct: bool,
    /// Make it where it is absent.
    pub create: bool,
    /// Make it; EEXIST where it exists.
    pub create_new: bool,
    /// Leave its access time alone, where that is allowed.
    pub noatime: bool,
    /// Claim it, where it is a block device (O_EXCL): EBUSY while it is mounted or somebody else has claimed it, and
    /// nobody else can as long as it is open.
    pub claim: bool,
}

/// An open regular file or block device.
#[derive(Debug)]
pub struct OsFile {
    file: File,
    path: PathBuf,
    is_block_device: bool,
    /// 1 without O_DIRECT.
    alignment: u64,
    tail: Option<Tail>,
    known_data: KnownData,
}

/// The end of a file that O_DIRECT cannot write.
#[derive(Debug)]
struct Tail {
    buffered: File,
    /// Offset from which I/O is buffered; `u64::MAX` where the size is a multiple of the alignment.
    start: AtomicU64,
}

impl OsFile {
    /// Opens `path`. Anything but a regular file or block device is refused before it is touched: opening a FIFO
    /// would wait, and opening some devices acts on them.
    pub fn open(path: &Path, options: &OpenOptions) -> Result<OsFile> {
        match std::fs::metadata(path) {
            Ok(meta) => check_kind(&meta, path)?,
            Err(e) if e.kind() == io::ErrorKind::NotFound && (options.create || options.create_new) => (),
            Err(e) => return Err(Error::io("open", e).at_path(path)),
        }
        let file = open_fd(path, options).map_err(|e| match e.errno() {
            errno::EBUSY if options.claim => e.hint("it is mounted, or another program has claimed it: see lsblk"),
            _ => e,
        })?;
        let meta = file.metadata().map_err(|e| Error::io("look at", e).at_path(path))?;
        check_kind(&meta, path)?;
        let is_block_device = meta.file_type().is_block_device();
        let mut opened = OsFile {
            file,
            path: path.to_owned(),
            is_block_device,
            alignment: 1,
            tail: None,
            known_data: KnownData::default(),
        };
        if options.direct {
            opened.alignment = opened.direct_alignment()?;
            if !is_block_device {
                let again = OpenOptions { direct: false, create: false, create_new: false, ..*options };
                let buffered = open_fd(path, &again)?;
                let same =
                    buffered.metadata().is_ok_and(|other| (other.dev(), other.ino()) == (meta.dev(), meta.ino()));
                if !same {
                    return Err(Error::new(errno::ESTALE, "open", "replaced while it was being opened").at_path(path));
                }
                let start = AtomicU64::new(opened.tail_start(meta.len()));
                opened.tail = Some(Tail { buffered, start });
            }
        }
        Ok(opened)
    }

    /// Whether it is a block device.
    pub fn is_block_device(&self) -> bool {
        self.is_block_device
    }

    /// The descriptor, for locks.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    fn error(&self, what: &str, e: io::Error) -> Error {
        Error::io(what, e).at_path(&self.path)
    }

    /// The unit of O_DIRECT as the kernel tells it.
    fn direct_alignment(&self) -> Result<u64> {
        let told = match statx_dio(&self.file) {
            Some((_, 0)) => return Err(no_direct(&self.path)),
            Some((memory, offset)) => u64::from(memory.max(offset)),
            None if self.is_block_device => logical_block_bytes(&self.file).map_err(|e| self.error("look at", e))?,
            None => UNKNOWN_ALIGNMENT,
        };
        if told.is_power_of_two() && told <= MAX_ALIGNMENT {
            return Ok(told);
        }
        let why = format!("blocks of {told} bytes are not supported with O_DIRECT");
        Err(Error::new(errno::EINVAL, "open", why).at_path(&self.path).hint("use --cache writeback"))
    }

    /// Where buffered I/O begins in a file of `len` bytes.
    fn tail_start(&self, len: u64) -> u64 {
        if len.is_multiple_of(self.alignment) { u64::MAX } else { len - len % PAGE_BYTES as u64 }
    }

    /// Refuses what O_DIRECT could not do, even where this kernel or file system would let it pass.
    fn check_aligned(&self, what: &str, address: usize, offset: u64, len: u64, may_end_file: bool) -> Result<()> {
        if self.alignment == 1 {
            return Ok(());
        }
        let whole =
            len.is_multiple_of(self.alignment) || (may_end_file && offset.checked_add(len) == Some(self.len()?));
        if whole && offset.is_multiple_of(self.alignment) && (address as u64).is_multiple_of(self.alignment) {
            return Ok(());
        }
        let why = format!("{len} bytes are not aligned to blocks of {} bytes", self.alignment);
        Err(Error::new(errno::EINVAL, what, why).at_path(&self.path).at_offset(offset))
    }

    /// Bytes of a transfer that come before the buffered tail, and the file for those behind them.
    fn split(&self, offset: u64, len: usize) -> (usize, &File) {
        match &self.tail {
            Some(tail) => {
                let before = tail.start.load(Ordering::Relaxed).saturating_sub(offset);
                (before.min(len as u64) as usize, &tail.buffered)
            }
            None => (len, &self.file),
        }
    }

    fn read_from(&self, file: &File, buf: &mut [u8], offset: u64) -> Result<()> {
        let mut done = 0;
        while done < buf.len() {
            match file.read_at(&mut buf[done..], offset + done as u64) {
                Ok(0) => break,
                Ok(count) => {
                    done += count;
                    // Only the end of the file ends a direct read in mid-block; asking on from there is EINVAL.
                    if !(offset + done as u64).is_multiple_of(self.alignment) {
                        break;
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => (),
                Err(e) => return Err(self.error("read", e).at_offset(offset + done as u64)),
            }
        }
        buf[done..].fill(0);
        Ok(())
    }

    fn write_to(&self, file: &File, buf: &[u8], offset: u64) -> Result<()> {
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            match file.write_at(&buf[done..], at) {
                Ok(0) => {
                    return Err(Error::new(errno::ENOSPC, "write", "nothing was written")
                        .at_path(&self.path)
                        .at_offset(at));
                }
                Ok(count) => done += count,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => (),
                Err(e) => return Err(self.error("write", e).at_offset(at)),
            }
        }
        Ok(())
    }

    /// `fallocate`; false where the medium cannot do this mode.
    fn fallocate(&self, what: &str, mode: i32, offset: u64, len: u64) -> Result<bool> {
        loop {
            // SAFETY: plain system call on an open descriptor; `end_of` has checked that both fit.
            let done = unsafe { libc::fallocate(self.file.as_raw_fd(), mode, offset as i64, len as i64) };
            if done == 0 {
                return Ok(true);
            }
            let e = io::Error::last_os_error();
            match e.raw_os_error() {
                Some(libc::EINTR) => (),
                Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV) => return Ok(false),
                // Some block devices want units of their own.
                Some(libc::EINVAL) if self.is_block_device => return Ok(false),
                _ => return Err(self.error(what, e).at_offset(offset)),
            }
        }
    }

    /// Zeros a range with `fallocate` in `mode`, or by writing.
    fn zero(&self, what: &str, mode: i32, offset: u64, len: u64) -> Result<()> {
        let end = end_of(what, &self.path, offset, len)?.min(self.len()?);
        if offset >= end {
            return Ok(());
        }
        self.check_aligned(what, 0, offset, end - offset, true)?;
        // A block device zeros whole blocks only, none of them larger than a page.
        let unit = if self.is_block_device { PAGE_BYTES as u64 } else { 1 };
        let (start, stop) = (round_up(offset, unit).min(end), round_down(end, unit));
        let zeroed = if start < stop {
            self.fallocate(what, mode | libc::FALLOC_FL_KEEP_SIZE, start, stop - start)
        } else {
            Ok(false)
        };
        // Also where it failed half-way.
        self.known_data.forget();
        if zeroed? {
            self.write_zeros(offset, start)?;
            return self.write_zeros(stop, end);
        }
        self.write_zeros(offset, end)
    }

    /// Writes zeros from `start` to `end`.
    fn write_zeros(&self, start: u64, end: u64) -> Result<()> {
        if start >= end {
            return Ok(());
        }
        with_scratch(ZEROS_BYTES.min((end - start) as usize), |zeros| {
            zeros.fill(0);
            let mut at = start;
            while at < end {
                let count = (end - at).min(zeros.len() as u64);
                self.write_at(&zeros[..count as usize], at)?;
                at += count;
            }
            Ok(())
        })
    }

    /// `lseek`; `None` where there is nothing of that kind up to the end.
    fn seek(&self, offset: u64, whence: i32) -> io::Result<Option<u64>> {
        // SAFETY: plain system call on an open descriptor. It moves the descriptor's position, which nothing uses.
        let at = unsafe { libc::lseek(self.file.as_raw_fd(), offset as i64, whence) };
        if at >= 0 {
            return Ok(Some(at as u64));
        }
        let e = io::Error::last_os_error();
        if e.raw_os_error() == Some(libc::ENXIO) { Ok(None) } else { Err(e) }
    }
}

/// A path with every link followed; one that leads nowhere stays as it is.
pub fn resolved(path: &Path) -> PathBuf {
    std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned())
}

/// Makes durable that a file has its name, or that it has it no longer.
pub fn sync_parent(path: &Path) -> Result<()> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let synced = File::open(parent).and_then(|dir| dir.sync_all());
    synced.map_err(|e| Error::io("sync directory", e).at_path(parent))
}

/// Device and inode of what a path names now.
pub fn identity(path: &Path) -> Option<(u64, u64)> {
    std::fs::metadata(path).ok().map(|meta| (meta.dev(), meta.ino()))
}

impl Storage for OsFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        end_of("read", &self.path, offset, buf.len() as u64)?;
        self.check_aligned("read", buf.as_ptr().addr(), offset, buf.len() as u64, false)?;
        let (before, tail) = self.split(offset, buf.len());
        let (direct, buffered) = buf.split_at_mut(before);
        self.read_from(&self.file, direct, offset)?;
        self.read_from(tail, buffered, offset + before as u64)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        end_of("write", &self.path, offset, buf.len() as u64)?;
        self.check_aligned("write", buf.as_ptr().addr(), offset, buf.len() as u64, true)?;
        let (before, tail) = self.split(offset, buf.len());
        let (direct, buffered) = buf.split_at(before);
        self.write_to(&self.file, direct, offset)?;
        self.write_to(tail, buffered, offset + before as u64)
    }

    fn sync(&self) -> Result<()> {
        loop {
            match self.file.sync_data() {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => (),
                done => return done.map_err(|e| self.error("sync", e)),
            }
        }
    }

    fn sync_all(&self) -> Result<()> {
        loop {
            match self.file.sync_all() {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => (),
                done => return done.map_err(|e| self.error("sync", e)),
            }
        }
    }

    /// Writes the last byte with O_DSYNC: durable is then what it takes to read it, and so the length.
    fn sync_len(&self) -> Result<()> {
        let end = self.len()?;
        // Once without: where there is no space for it, that is no failed sync.
        if self.alignment > 1 || self.is_block_device || end == 0 || self.file.write_at(&[0], end - 1).is_err() {
            return self.sync();
        }
        loop {
            let zero = [0u8];
            let part = libc::iovec { iov_base: zero.as_ptr().cast_mut().cast(), iov_len: 1 };
            // SAFETY: `part` is one byte that the kernel only reads, and lives across the call.
            let done =
                unsafe { libc::pwritev2(self.file.as_raw_fd(), &raw const part, 1, end as i64 - 1, libc::RWF_DSYNC) };
            if done == 1 {
                return Ok(());
            }
            let e = io::Error::last_os_error();
            match e.raw_os_error() {
                Some(libc::EINTR) => (),
                Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL) => return self.sync(),
                _ => return Err(self.error("sync", e)),
            }
        }
    }

    fn len(&self) -> Result<u64> {
        let bad = |e| self.error("size of", e);
        if self.is_block_device {
            return Ok(self.seek(0, libc::SEEK_END).map_err(bad)?.unwrap_or(0));
        }
        Ok(self.file.metadata().map_err(bad)?.len())
    }

    fn set_len(&self, len: u64) -> Result<()> {
        if self.is_block_device {
            let size = self.len()?;
            if len == size {
                return Ok(());
            }
            let why = format!("a block device of {size} bytes cannot be made {len} bytes long");
            return Err(Error::new(errno::EINVAL, "resize", why).at_path(&self.path));
        }
        end_of("resize", &self.path, len, 0)?;
        while let Err(e) = self.file.set_len(len) {
            if e.kind() != io::ErrorKind::Interrupted {
                return Err(self.error("resize", e));
            }
        }
        self.known_data.forget();
        if let Some(tail) = &self.tail {
            tail.start.store(self.tail_start(len), Ordering::Relaxed);
        }
        Ok(())
    }

    fn punch_hole(&self, offset: u64, len: u64) -> Result<()> {
        self.zero("punch a hole in", libc::FALLOC_FL_PUNCH_HOLE, offset, len)
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        self.zero("write zeros to", libc::FALLOC_FL_ZERO_RANGE, offset, len)
    }

    fn block_status(&self, offset: u64, len: u64) -> Result<BlockStatus> {
        let end = end_of("block status of", &self.path, offset, len)?;
        let until = |border: u64, zero| BlockStatus { len: border.min(end) - offset, zero };
        let unknown = BlockStatus { len, zero: false };
        if self.is_block_device {
            let size = self.len()?;
            return Ok(if offset >= size { until(end, true) } else { until(size, false) });
        }
        let asked = match self.known_data.end_behind(offset) {
            Ok(border) => return Ok(until(border, false)),
            Err(asked) => asked,
        };
        match self.seek(offset, libc::SEEK_DATA) {
            Ok(None) => Ok(until(end, true)),
            Ok(Some(data)) if data > offset => Ok(until(data, true)),
            Ok(Some(_)) => match self.seek(offset, libc::SEEK_HOLE) {
                Ok(Some(hole)) if hole > offset => {
                    self.known_data.learn(asked, offset..hole);
                    Ok(until(hole, false))
                }
                // Somebody punched or cut the range between the two questions: data is the answer that claims nothing.
                Ok(_) => Ok(until(offset + 1, false)),
                Err(e) => Err(self.error("look for holes in", e).at_offset(offset)),
            },
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => Ok(unknown),
            Err(e) => Err(self.error("look for data in", e).at_offset(offset)),
        }
    }

    /// A block device's writers leave no trace in its node, and numbers of devices change at boot: only its size
    /// counts.
    fn stamp(&self) -> Result<Stamp> {
        if self.is_block_device {
            return Ok(Stamp { dev: 0, ino: 0, size: self.len()?, mtime_ns: 0, ctime_ns: 0 });
        }
        let meta = self.file.metadata().map_err(|e| self.error("look at", e))?;
        Ok(Stamp {
            dev: meta.dev(),
            ino: meta.ino(),
            size: meta.len(),
            mtime_ns: clock::timespec_ns(meta.mtime(), meta.mtime_nsec()),
            ctime_ns: clock::timespec_ns(meta.ctime(), meta.ctime_nsec()),
        })
    }

    fn attribute(&self, name: &str) -> Result<Option<Vec<u8>>> {
        attribute::get(self.file.as_fd(), name).map_err(|e| self.error(&format!("look at attribute {name} of"), e))
    }

    fn set_attribute(&self, name: &str, value: Option<&[u8]>) -> Result<()> {
        let failed = |e| self.error(&format!("set attribute {name} of"), e);
        attribute::set(self.file.as_fd(), name, value).map_err(failed)?;
        // All of the inode: fdatasync need not keep attributes.
        self.sync_all()
    }

    fn alignment(&self) -> u64 {
        self.alignment
    }

    fn path(&self) -> &Path {
        &self.path
    }
}

fn check_kind(meta: &std::fs::Metadata, path: &Path) -> Result<()> {
    let kind = meta.file_type();
    if kind.is_file() || kind.is_block_device() {
        return Ok(());
    }
    let (errno, why) = if kind.is_dir() {
        (errno::EISDIR, "a directory")
    } else if kind.is_fifo() {
        (errno::EINVAL, "a FIFO, not a file or block device")
    } else if kind.is_socket() {
        (errno::EINVAL, "a socket, not a file or block device")
    } else {
        (errno::EINVAL, "a character device, not a file or block device")
    };
    Err(Error::new(errno, "open", why).at_path(path))
}

fn open_fd(path: &Path, options: &OpenOptions) -> Result<File> {
    let direct = if options.direct { libc::O_DIRECT } else { 0 };
    let claim = options.claim && std::fs::metadata(path).is_ok_and(|meta| meta.file_type().is_block_device());
    let claim = if claim { libc::O_EXCL } else { 0 };
    let open = |flags: i32| {
        std::fs::OpenOptions::new()
            .read(true)
            .write(options.write)
            .create(options.create)
            .create_new(options.create_new)
            .mode(0o600)
            .custom_flags(flags | direct | claim | libc::O_NOCTTY)
            .open(path)
    };
    let mut opened = open(if options.noatime { libc::O_NOATIME } else { 0 });
    // Only the owner may leave the access time alone.
    if options.noatime && opened.as_ref().is_err_and(|e| e.raw_os_error() == Some(libc::EPERM)) {
        opened = open(0);
    }
    opened.map_err(|e| match e.raw_os_error() {
        Some(libc::EINVAL) if options.direct => no_direct(path),
        _ => Error::io("open", e).at_path(path),
    })
}

fn no_direct(path: &Path) -> Error {
    Error::new(errno::EINVAL, "open", "its file system cannot do O_DIRECT").at_path(path).hint("use --cache writeback")
}

/// Alignment of memory and offset for O_DIRECT; (0, 0) where it cannot be done, `None` where the kernel cannot tell.
fn statx_dio(file: &File) -> Option<(u32, u32)> {
    let mut info = std::mem::MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: the empty path names the descriptor itself (AT_EMPTY_PATH), and `info` is what statx writes to.
    let done = unsafe {
        libc::statx(file.as_raw_fd(), c"".as_ptr(), libc::AT_EMPTY_PATH, libc::STATX_DIOALIGN, info.as_mut_ptr())
    };
    // SAFETY: all zeros is a valid `statx`, and the call can only have filled it further.
    let info = unsafe { info.assume_init() };
    (done == 0 && info.stx_mask & libc::STATX_DIOALIGN != 0)
        .then_some((info.stx_dio_mem_align, info.stx_dio_offset_align))
}

fn logical_block_bytes(device: &File) -> io::Result<u64> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: BLKSSZGET writes one int.
    if unsafe { libc::ioctl(device.as_raw_fd(), libc::BLKSSZGET, &mut bytes) } != 0 {
        return Err(io::Error::last_os_error());
    }
    u64::try_from(bytes).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}

/// Space of the file system that `path` lies in.
pub(super) fn space(path: &Path) -> Result<Space> {
    let bad = |e| Error::io("ask for the space of", e).at_path(path);
    let name =
        CString::new(path.as_os_str().as_bytes()).map_err(|_| bad(io::Error::from_raw_os_error(libc::EINVAL)))?;
    let mut info = std::mem::MaybeUninit::<libc::statvfs>::uninit();
    // SAFETY: `name` is NUL-terminated and `info` is large enough for what statvfs writes.
    if unsafe { libc::statvfs(name.as_ptr(), info.as_mut_ptr()) } != 0 {
        return Err(bad(io::Error::last_os_error()));
    }
    // SAFETY: statvfs succeeded, so it filled `info`.
    let info = unsafe { info.assume_init() };
    let bytes = |blocks: u64| blocks.saturating_mul(info.f_frsize);
    Ok(Space { total: bytes(info.f_blocks), free: bytes(info.f_bavail) })
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests {
    use super::super::buffer::AlignedBuf;
    use super::*;
    use proptest::prelude::*;
    use std::process::Command;

    const READ_WRITE: OpenOptions =
        OpenOptions { write: true, direct: false, create: false, create_new: false, noatime: false, claim: false };
    const CREATE: OpenOptions = OpenOptions { create: true, ..READ_WRITE };
    const DIRECT: OpenOptions = OpenOptions { direct: true, ..READ_WRITE };

    fn bytes(file: &OsFile, offset: u64, len: usize) -> Vec<u8> {
        let mut buf = AlignedBuf::new(len);
        file.read_at(&mut buf, offset).unwrap();
        buf.to_vec()
    }

    /// A directory that can do O_DIRECT: that of the source tree.
    fn disk_dir() -> tempfile::TempDir {
        tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap()
    }

    #[test]
    fn only_files_and_block_devices_open_and_nothing_is_created() {
        let dir = tempfile::tempdir().unwrap();
        let absent = dir.path().join("absent");
        for options in [OpenOptions::default(), READ_WRITE, DIRECT] {
            assert_eq!(OsFile::open(&absent, &options).unwrap_err().errno(), errno::ENOENT);
            assert_eq!(OsFile::open(dir.path(), &options).unwrap_err().errno(), errno::EISDIR);
            assert_eq!(OsFile::open(Path::new("/dev/null"), &options).unwrap_err().errno(), errno::EINVAL);
        }
        assert!(!absent.exists());
        let fifo = dir.path().join("fifo");
        assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
        let e = OsFile::open(&fifo, &OpenOptions::default()).unwrap_err();
        assert!(e.to_string().contains("FIFO"), "{e}");

        let new = OpenOptions { create_new: true, ..READ_WRITE };
        OsFile::open(&absent, &new).unwrap();
        assert_eq!(OsFile::open(&absent, &new).unwrap_err().errno(), errno::EEXIST);
        let read_only = OsFile::open(&absent, &OpenOptions::default()).unwrap();
        let e = read_only.write_at(b"x", 7).unwrap_err();
        assert!(e.to_string().contains("absent at offset 7"), "{e}");
    }

    #[test]
    fn holes_data_and_the_end_are_told_apart() {
        let dir = disk_dir();
        let file = OsFile::open(&dir.path().join("f"), &CREATE).unwrap();
        file.set_len(1 << 20).unwrap();
        file.write_at(&[1; 65536], 65536).unwrap();
        assert_eq!(file.block_status(0, 1 << 20).unwrap(), BlockStatus { len: 65536, zero: true });
        assert_eq!(file.block_status(65536, 1000).unwrap(), BlockStatus { len: 1000, zero: false });
        assert_eq!(file.block_status(65536, 1 << 20).unwrap(), BlockStatus { len: 65536, zero: false });
        assert_eq!(file.block_status(1 << 20, 5).unwrap(), BlockStatus { len: 5, zero: true });
        assert_eq!(file.block_status(1 << 19, 1 << 30).unwrap(), BlockStatus { len: (1 << 30), zero: true });
        file.punch_hole(65536, 65536).unwrap();
        assert!(file.block_status(65536, 65536).unwrap().zero);
        let blocks = || std::fs::metadata(file.path()).unwrap().blocks();
        assert_eq!(blocks(), 0);
        file.write_zeroes(0, 65536).unwrap();
        assert!(blocks() >= 65536 / 512, "zeros that stay allocated");
        assert_eq!(file.len().unwrap(), 1 << 20);
    }

    #[test]
    fn zeroing_never_makes_a_file_longer() {
        // On tmpfs there is no ZERO_RANGE: zeros are written.
        for dir in [disk_dir(), tempfile::tempdir_in("/dev/shm").unwrap()] {
            let file = OsFile::open(&dir.path().join("f"), &CREATE).unwrap();
            file.write_at(&[1; 5000], 0).unwrap();
            file.write_zeroes(4000, 1 << 30).unwrap();
            file.punch_hole(10, 20).unwrap();
            file.punch_hole(9000, 20).unwrap();
            assert_eq!(file.len().unwrap(), 5000);
            let read = bytes(&file, 0, 6000);
            assert!(read.iter().enumerate().all(|(i, b)| *b == u8::from(i < 4000 && !(10..30).contains(&i))));
        }
    }

    #[test]
    fn stamps_show_every_change() {
        let dir = disk_dir();
        let path = dir.path().join("f");
        let file = OsFile::open(&path, &CREATE).unwrap();
        let empty = file.stamp().unwrap();
        file.write_at(b"x", 0).unwrap();
        let written = file.stamp().unwrap();
        assert_ne!(empty, written);
        assert!((clock::now_ns() - written.mtime_ns).abs() < 3_600_000_000_000);
        std::fs::rename(&path, dir.path().join("g")).unwrap();
        std::fs::write(&path, b"x").unwrap();
        assert_ne!(OsFile::open(&path, &READ_WRITE).unwrap().stamp().unwrap().ino, written.ino);
    }

    #[test]
    fn direct_transfers_keep_to_their_alignment_and_to_the_file_length() {
        let dir = disk_dir();
        let path = dir.path().join("f");
        std::fs::write(&path, vec![7; 3 * 4096 + 100]).unwrap();
        let file = match OsFile::open(&path, &DIRECT) {
            Ok(file) => file,
            Err(e) => return eprintln!("skip: {e}"),
        };
        let unit = file.alignment();
        assert!(unit >= 512);
        let mut buf = AlignedBuf::new(4 * 4096);
        assert_eq!(file.read_at(&mut buf[1..513], 0).unwrap_err().errno(), errno::EINVAL, "address");
        assert_eq!(file.read_at(&mut buf[..512], 1).unwrap_err().errno(), errno::EINVAL, "offset");
        assert_eq!(file.read_at(&mut buf[..100], 3 * 4096).unwrap_err().errno(), errno::EINVAL, "length");
        assert_eq!(file.write_at(&buf[..101], 3 * 4096).unwrap_err().errno(), errno::EINVAL, "past the end");

        let read = bytes(&file, 0, 4 * 4096);
        assert!(read[..3 * 4096 + 100].iter().all(|b| *b == 7) && read[3 * 4096 + 100..].iter().all(|b| *b == 0));
        buf.fill(8);
        file.write_at(&buf[..4096 + 100], 2 * 4096).unwrap();
        assert_eq!(file.len().unwrap(), 3 * 4096 + 100);
        let expected: Vec<u8> = (0..3 * 4096 + 100).map(|i| if i < 2 * 4096 { 7 } else { 8 }).collect();
        assert_eq!(std::fs::read(&path).unwrap(), expected);
        file.punch_hole(2 * 4096, 1 << 20).unwrap();
        assert_eq!(std::fs::read(&path).unwrap()[2 * 4096..], [0; 4096 + 100]);

        let tail_start = || file.tail.as_ref().unwrap().start.load(Ordering::Relaxed);
        assert_eq!(tail_start(), 3 * 4096);
        file.set_len(2 * 4096 + 1).unwrap();
        assert_eq!(tail_start(), 2 * 4096);
        file.set_len(4 * 4096).unwrap();
        assert_eq!(tail_start(), u64::MAX);
        file.write_at(&buf[..4096], 3 * 4096).unwrap();
        assert_eq!(std::fs::read(&path).unwrap()[3 * 4096..], [8; 4096]);
        file.sync().unwrap();
    }

    #[test]
    fn syncing_the_length_leaves_length_and_zeros_as_they_are() {
        let dir = disk_dir();
        let path = dir.path().join("f");
        for options in [CREATE, OpenOptions { create: true, ..DIRECT }] {
            let file = match OsFile::open(&path, &options) {
                Ok(file) => file,
                Err(e) => return eprintln!("skip: {e}"),
            };
            for len in [8192, 0, 4096, 3 << 20] {
                file.set_len(len).unwrap();
                file.sync_len().unwrap();
                assert_eq!(file.len().unwrap(), len);
                assert!(std::fs::read(&path).unwrap().iter().all(|byte| *byte == 0), "{len}");
            }
        }
    }

    #[test]
    fn a_hole_is_seen_as_soon_as_it_is_there() {
        let dir = disk_dir();
        let file = OsFile::open(&dir.path().join("f"), &CREATE).unwrap();
        let zero = |offset| file.block_status(offset, (1 << 20) - offset).unwrap().zero;
        for change in [|file: &OsFile| file.punch_hole(1 << 19, 1 << 16), |file: &OsFile| file.set_len(1 << 18)] {
            file.write_at(&vec![1; 1 << 20], 0).unwrap();
            assert!(!zero(0) && !zero(1 << 19));
            change(&file).unwrap();
            assert!(!zero(0) && zero(1 << 19));
        }
    }

    #[test]
    fn offsets_past_the_largest_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let file = OsFile::open(&dir.path().join("f"), &CREATE).unwrap();
        assert_eq!(file.write_at(b"x", u64::MAX).unwrap_err().errno(), errno::EFBIG);
        assert_eq!(file.read_at(&mut [0], i64::MAX as u64).unwrap_err().errno(), errno::EFBIG);
        assert_eq!(file.set_len(1 << 63).unwrap_err().errno(), errno::EFBIG);
        assert_eq!(file.punch_hole(u64::MAX, 1).unwrap_err().errno(), errno::EFBIG);
        assert_eq!(file.block_status(u64::MAX, 1).unwrap_err().errno(), errno::EFBIG);
    }

    #[derive(Debug, Clone)]
    enum Op {
        Write(u64, usize, u8),
        Punch(u64, u64),
        Zero(u64, u64),
        SetLen(u64),
    }

    fn ops() -> impl Strategy<Value = Vec<Op>> {
        let place = 0..20_000u64;
        let op = prop_oneof![
            (place.clone(), 1..9000usize, 1..=255u8).prop_map(|(o, l, b)| Op::Write(o, l, b)),
            (place.clone(), 1..9000u64).prop_map(|(o, l)| Op::Punch(o, l)),
            (place.clone(), 1..9000u64).prop_map(|(o, l)| Op::Zero(o, l)),
            place.prop_map(Op::SetLen),
        ];
        proptest::collection::vec(op, 1..12)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        /// The memory fake is the oracle of the real thing, so that tests over the fake mean something.
        #[test]
        fn a_file_behaves_as_the_memory_fake_does(ops in ops(), on_tmpfs: bool) {
            let dir = if on_tmpfs { tempfile::tempdir_in("/dev/shm").unwrap() } else { disk_dir() };
            let file = OsFile::open(&dir.path().join("f"), &CREATE).unwrap();
            let fake = super::super::MemFile::new("f", 0);
            for op in ops {
                for storage in [&file as &dyn Storage, &fake] {
                    match op {
                        Op::Write(offset, len, byte) => storage.write_at(&vec![byte; len], offset),
                        Op::Punch(offset, len) => storage.punch_hole(offset, len),
                        Op::Zero(offset, len) => storage.write_zeroes(offset, len),
                        Op::SetLen(len) => storage.set_len(len),
                    }.unwrap();
                }
                prop_assert_eq!(file.len().unwrap(), fake.len().unwrap());
                let (mut real, mut expected) = (vec![1; 30_000], vec![2; 30_000]);
                file.read_at(&mut real, 0).unwrap();
                fake.read_at(&mut expected, 0).unwrap();
                prop_assert!(real == expected);
            }
        }
    }
}
