//! The one error type.
//!
//! An error is born with its errno, says what was being done (`what`), why it failed (`why`), where (path, offset),
//! and, where there is something to do, what to do (`hint`). Surfaces map it in one place each: FUSE sends the errno,
//! QMP and the command line print the text.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// A result whose error is [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// Errno values that the core speaks of by name, so that only `storage/` needs the C library (Linux, errno(3)).
#[allow(missing_docs)]
pub mod errno {
    pub const EPERM: i32 = 1;
    pub const ENOENT: i32 = 2;
    pub const EIO: i32 = 5;
    pub const ENXIO: i32 = 6;
    pub const EAGAIN: i32 = 11;
    pub const EACCES: i32 = 13;
    pub const EBUSY: i32 = 16;
    pub const EEXIST: i32 = 17;
    pub const ENODEV: i32 = 19;
    pub const ENOTDIR: i32 = 20;
    pub const EISDIR: i32 = 21;
    pub const EINVAL: i32 = 22;
    pub const EFBIG: i32 = 27;
    pub const ENOSPC: i32 = 28;
    pub const EROFS: i32 = 30;
    pub const ENAMETOOLONG: i32 = 36;
    pub const ENOSYS: i32 = 38;
    pub const ENOTEMPTY: i32 = 39;
    pub const ELOOP: i32 = 40;
    pub const ENODATA: i32 = 61;
    pub const EOPNOTSUPP: i32 = 95;
    pub const ENOTCONN: i32 = 107;
    pub const ESHUTDOWN: i32 = 108;
    pub const ETIMEDOUT: i32 = 110;
    pub const ECONNREFUSED: i32 = 111;
    pub const ESTALE: i32 = 116;
    pub const ECANCELED: i32 = 125;
}

/// What went wrong, where, and what to do about it. Boxed: the success path carries one pointer.
pub struct Error(Box<Inner>);

#[derive(Debug, Clone)]
struct Inner {
    errno: i32,
    what: String,
    why: String,
    path: Option<PathBuf>,
    offset: Option<u64>,
    hint: Option<String>,
}

impl Error {
    /// An error with its errno, the thing at fault (`snapshot 'a'`, `open`), and the reason.
    pub fn new(errno: i32, what: impl Into<String>, why: impl Into<String>) -> Self {
        Error(Box::new(Inner { errno, what: what.into(), why: why.into(), path: None, offset: None, hint: None }))
    }

    /// An error of the operating system while doing `what`.
    pub fn io(what: impl Into<String>, e: io::Error) -> Self {
        let errno = e.raw_os_error().unwrap_or(errno::EIO);
        let why = strip_os_error(&e.to_string());
        Error::new(errno, what, why)
    }

    /// Names the file at fault.
    #[must_use]
    pub fn at_path(mut self, path: impl AsRef<Path>) -> Self {
        self.0.path = Some(path.as_ref().to_owned());
        self
    }

    /// Names the byte offset at fault.
    #[must_use]
    pub fn at_offset(mut self, offset: u64) -> Self {
        self.0.offset = Some(offset);
        self
    }

    /// Says, in one line, what the user can do.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.0.hint = Some(hint.into());
        self
    }

    /// Puts a wider context in front: the old text, with its path and offset, becomes the reason.
    #[must_use]
    pub fn context(mut self, what: impl Into<String>) -> Self {
        self.0.why = self.to_string();
        self.0.what = what.into();
        (self.0.path, self.0.offset) = (None, None);
        self
    }

    /// The errno to give to a caller that takes only that.
    pub fn errno(&self) -> i32 {
        self.0.errno
    }

    /// What the user can do, where there is something.
    pub fn hint_text(&self) -> Option<&str> {
        self.0.hint.as_deref()
    }
}

impl Clone for Error {
    fn clone(&self) -> Self {
        Error(self.0.clone())
    }
}

/// `No such file or directory (os error 2)` reads better without its tail.
fn strip_os_error(text: &str) -> String {
    match text.find(" (os error") {
        Some(end) => text[..end].to_owned(),
        None => text.to_owned(),
    }
}

/// `WHAT: WHY`, with path and offset where known.
impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.what)?;
        if let Some(path) = &self.0.path {
            write!(f, " {}", path.display())?;
        }
        if let Some(offset) = self.0.offset {
            write!(f, " at offset {offset}")?;
        }
        write!(f, ": {}", self.0.why)
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self} (errno {})", self.0.errno)
    }
}

impl std::error::Error for Error {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_names_path_offset_and_reason() {
        let e = Error::io("read", io::Error::from_raw_os_error(5)).at_path("/a/b").at_offset(4096);
        assert_eq!(e.to_string(), "read /a/b at offset 4096: Input/output error");
        assert_eq!(e.errno(), errno::EIO);
        assert_eq!(e.context("disk 'vda'").to_string(), "disk 'vda': read /a/b at offset 4096: Input/output error");
    }
}
