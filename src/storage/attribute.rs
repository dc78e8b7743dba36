//! Extended attributes of open files (xattr(7)).

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Longest value that is read, in bytes. What is longer was not written by us, and is cut off.
const VALUE_MAX_BYTES: usize = 4096;

fn c_name(name: &str) -> io::Result<CString> {
    CString::new(name).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}

/// The value of an attribute; None where there is none of that name, or none can be there.
pub(super) fn get(fd: BorrowedFd<'_>, name: &str) -> io::Result<Option<Vec<u8>>> {
    let name = c_name(name)?;
    let mut value = vec![0u8; VALUE_MAX_BYTES];
    // SAFETY: `name` is a C string, and `value` has as many bytes to write to as are told.
    let len = unsafe { libc::fgetxattr(fd.as_raw_fd(), name.as_ptr(), value.as_mut_ptr().cast(), value.len()) };
    if let Ok(len) = usize::try_from(len) {
        value.truncate(len);
        return Ok(Some(value));
    }
    let e = io::Error::last_os_error();
    match e.raw_os_error() {
        Some(libc::ENODATA | libc::EOPNOTSUPP | libc::ENOSYS) => Ok(None),
        Some(libc::ERANGE) => Ok(Some(Vec::new())),
        _ => Err(e),
    }
}

/// Sets an attribute, or removes it where `value` is None. Not durable yet.
pub(super) fn set(fd: BorrowedFd<'_>, name: &str, value: Option<&[u8]>) -> io::Result<()> {
    let name = c_name(name)?;
    let done = match value {
        // SAFETY: `name` is a C string, and `value` has as many bytes to read as are told.
        Some(value) => unsafe { libc::fsetxattr(fd.as_raw_fd(), name.as_ptr(), value.as_ptr().cast(), value.len(), 0) },
        // SAFETY: `name` is a C string.
        None => unsafe { libc::fremovexattr(fd.as_raw_fd(), name.as_ptr()) },
    };
    if done == 0 {
        return Ok(());
    }
    let e = io::Error::last_os_error();
    if value.is_none() && e.raw_os_error() == Some(libc::ENODATA) { Ok(()) } else { Err(e) }
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn an_attribute_is_set_read_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let file = std::fs::File::create_new(dir.path().join("f")).unwrap();
        let name = "user.fleecefs.test";
        if let Err(e) = set(file.as_fd(), name, Some(b"why")) {
            return eprintln!("skip: no attributes here: {e}");
        }
        assert_eq!(get(file.as_fd(), name).unwrap().as_deref(), Some(&b"why"[..]));
        set(file.as_fd(), name, Some(b"else")).unwrap();
        assert_eq!(get(file.as_fd(), name).unwrap().as_deref(), Some(&b"else"[..]));
        set(file.as_fd(), name, None).unwrap();
        set(file.as_fd(), name, None).unwrap();
        assert_eq!(get(file.as_fd(), name).unwrap(), None);
        assert!(get(file.as_fd(), "a\0b").is_err());
    }

    #[test]
    fn a_device_node_has_none_and_takes_none() {
        let Ok(node) = std::fs::File::options().read(true).write(true).open("/dev/null") else { return };
        assert_eq!(get(node.as_fd(), "user.fleecefs.test").unwrap(), None);
        assert!(set(node.as_fd(), "user.fleecefs.test", Some(b"x")).is_err());
    }
}
