//! Paths that lead into the daemon's own mount.
//!
//! A daemon that opens a file which it serves itself may wait for its own answer, and cannot even be killed while it
//! does. So a path is followed link by link, and given up where it enters the mount; no file in the mount, nor the mount
//! itself, is asked anything.

use crate::error::{Error, Result, errno};
use crate::storage::process::mount_points;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};

/// Links that are followed in one path (the kernel's limit).
const LINKS_MAX: usize = 40;

/// Where a mount is, or will be.
#[derive(Debug)]
pub struct OwnMount {
    /// The mount point, then the other places where it can be reached.
    places: Vec<PathBuf>,
}

impl OwnMount {
    /// A mount that is still to be made at a path without links.
    pub fn planned(mountpoint: &Path) -> OwnMount {
        OwnMount { places: vec![mountpoint.to_owned()] }
    }

    /// A mount that is served at a path without links.
    pub fn served(mountpoint: &Path) -> Result<OwnMount> {
        let mut places = vec![mountpoint.to_owned()];
        places.extend(mount_points(mountpoint)?);
        Ok(OwnMount { places })
    }

    /// Refuses a path that leads into the mount. What does not exist leads nowhere.
    pub fn refuse(&self, what: &str, path: &Path) -> Result<()> {
        match self.entered_by(path) {
            Ok(None) => Ok(()),
            Ok(Some(place)) => {
                let why = format!("lies inside the mount point {}", place.display());
                Err(Error::new(errno::EINVAL, what, why).at_path(path).hint("name a file outside the mount"))
            }
            Err(e) => Err(Error::io(what, e).at_path(path)),
        }
    }

    /// The place of the mount where a path enters it.
    fn entered_by(&self, path: &Path) -> io::Result<Option<&Path>> {
        let mut here = PathBuf::from("/");
        // What is left of the path, its next part last.
        let mut left = parts(&std::path::absolute(path)?);
        let mut links = 0;
        while let Some(part) = left.pop() {
            if part == ".." {
                here.pop();
                continue;
            }
            here.push(part);
            if let Some(place) = self.places.iter().find(|place| **place == here) {
                return Ok(Some(place));
            }
            let Ok(target) = fs::read_link(&here) else { continue };
            links += 1;
            if links > LINKS_MAX {
                return Err(io::Error::from_raw_os_error(errno::ELOOP));
            }
            if target.is_absolute() {
                here = PathBuf::from("/");
            } else {
                here.pop();
            }
            left.extend(parts(&target));
        }
        Ok(None)
    }
}

/// The parts of a path below the root, the last one first.
fn parts(path: &Path) -> Vec<OsString> {
    let name = |part: Component<'_>| match part {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some("..".into()),
        Component::RootDir | Component::CurDir | Component::Prefix(_) => None,
    };
    path.components().rev().filter_map(name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn a_path_into_the_mount_is_found_through_links() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().canonicalize().unwrap();
        let mnt = dir.join("mnt");
        fs::create_dir_all(dir.join("sub/deep")).unwrap();
        symlink(&mnt, dir.join("whole")).unwrap();
        symlink("../mnt/live/a", dir.join("sub/file")).unwrap();
        symlink("deep/../file", dir.join("sub/twice")).unwrap();
        symlink("loop", dir.join("loop")).unwrap();
        let own = OwnMount::planned(&mnt);
        for inside in ["mnt", "mnt/live/a", "whole/x", "sub/file", "sub/twice", "sub/deep/../../mnt/a", "./mnt/."] {
            let e = own.refuse("image", &dir.join(inside)).unwrap_err();
            assert!(e.to_string().contains("inside the mount point"), "{inside}: {e}");
        }
        // A part that does not exist leads nowhere, and the mount may be left again only by who is in it.
        for outside in ["mnt2", "mnt2/../a", "sub/none", "sub/deep", "none/x", "a mnt"] {
            own.refuse("image", &dir.join(outside)).unwrap();
        }
        assert_eq!(own.refuse("image", &dir.join("loop")).unwrap_err().errno(), errno::ELOOP);
    }

    #[test]
    fn nothing_in_the_mount_is_asked() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().canonicalize().unwrap();
        let mnt = dir.join("mnt");
        fs::create_dir(&mnt).unwrap();
        // Were the path followed into the mount, it would leave it again by this link.
        symlink(&dir, mnt.join("out")).unwrap();
        let e = OwnMount::planned(&mnt).refuse("image", &mnt.join("out/file")).unwrap_err();
        assert_eq!(e.errno(), errno::EINVAL);
    }

    #[test]
    fn other_places_of_a_served_mount_are_known() {
        let own = OwnMount::served(Path::new("/proc")).unwrap();
        own.refuse("image", Path::new("/proc/self/exe")).unwrap_err();
        own.refuse("image", Path::new("/etc/hostname")).unwrap();
        OwnMount::served(Path::new("/no/such/mount")).unwrap();
    }
}
