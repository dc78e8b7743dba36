//! What must hold of images and paths before anything is touched.
//!
//! An image below its own mount point would make the daemon wait for itself, and an image served twice would be
//! written behind the back of one of the two: both are refused, by resolved path and by device and inode.

use crate::error::{Error, Result, errno};
use crate::fleece::DiskSpec;
use crate::units::check_disk_name;
use std::ffi::OsStr;
use std::fs::{self, Metadata};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// What makes two paths the same image: the device itself for block devices, else device and inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Identity {
    Device(u64),
    File(u64, u64),
}

fn identity(metadata: &Metadata) -> Identity {
    if metadata.file_type().is_block_device() {
        Identity::Device(metadata.rdev())
    } else {
        Identity::File(metadata.dev(), metadata.ino())
    }
}

/// The path from the root with every symbolic link resolved, as far as it exists; what does not exist yet, or cannot
/// be asked (a dead mount), keeps its name behind its resolved parent.
pub fn absolute(path: &Path) -> Result<PathBuf> {
    if path.as_os_str().is_empty() {
        return Err(Error::new(errno::EINVAL, "path ''", "it is empty"));
    }
    if let Ok(resolved) = fs::canonicalize(path) {
        return Ok(resolved);
    }
    let path = std::path::absolute(path).map_err(|e| Error::io("path", e).at_path(path))?;
    match (path.parent(), path.file_name()) {
        (Some(parent), Some(name)) => Ok(absolute(parent)?.join(name)),
        _ => Ok(path),
    }
}

/// Refuses a path that lies in the mount point or is it. Both are from [`absolute`].
pub fn refuse_inside(what: &str, path: &Path, mountpoint: &Path) -> Result<()> {
    if !path.starts_with(mountpoint) {
        return Ok(());
    }
    Err(Error::new(errno::EINVAL, what, format!("lies inside the mount point {}", mountpoint.display()))
        .at_path(path)
        .hint("mount somewhere else, on an empty directory"))
}

/// The default name of a disk: the stem of the image's file name.
pub fn default_name(file: &Path) -> String {
    file.file_stem().unwrap_or(OsStr::new("")).to_string_lossy().into_owned()
}

fn check_image(spec: &DiskSpec, mountpoint: &Path) -> Result<Identity> {
    let file = &spec.file;
    if let Some(name) = &spec.name {
        check_disk_name(name).map_err(|e| e.context(format!("image {}", file.display())))?;
    }
    let metadata = fs::metadata(file).map_err(|e| Error::io("image", e).at_path(file))?;
    if metadata.is_dir() {
        return Err(Error::new(errno::EISDIR, "image", "is a directory")
            .at_path(file)
            .hint("images come first and the mount point last: fleecefs mount [NAME=]IMAGE... MNT"));
    }
    if !metadata.is_file() && !metadata.file_type().is_block_device() {
        return Err(Error::new(errno::EINVAL, "image", "neither a regular file nor a block device").at_path(file));
    }
    refuse_inside("image", &absolute(file)?, mountpoint)?;
    Ok(identity(&metadata))
}

/// Checks all images of a new mount: there is one, each is an image, no name and no image occurs twice.
pub fn check_images(disks: &[DiskSpec], mountpoint: &Path) -> Result<()> {
    if disks.is_empty() {
        return Err(Error::new(errno::EINVAL, "mount", "no image given").hint("fleecefs mount [NAME=]IMAGE... MNT"));
    }
    let mut seen: Vec<(Identity, String, &Path)> = Vec::new();
    for spec in disks {
        let identity = check_image(spec, mountpoint)?;
        let name = spec.name.clone().unwrap_or_else(|| default_name(&spec.file));
        for (other_identity, other_name, other_file) in &seen {
            if *other_identity == identity {
                return Err(twice(&spec.file, other_name));
            }
            if *other_name == name {
                let why = format!("the name of both {} and {}", other_file.display(), spec.file.display());
                return Err(Error::new(errno::EEXIST, format!("disk '{name}'"), why)
                    .hint("give one of them another name with NAME=IMAGE"));
            }
        }
        seen.push((identity, name, &spec.file));
    }
    Ok(())
}

/// Checks an image that is to join those of a running mount (names are the core's matter).
pub fn check_added<'a>(
    spec: &DiskSpec,
    mountpoint: &Path,
    served: impl Iterator<Item = (&'a str, &'a Path)>,
) -> Result<()> {
    let added = check_image(spec, mountpoint)?;
    for (name, path) in served {
        if fs::metadata(path).is_ok_and(|metadata| identity(&metadata) == added) {
            return Err(twice(&spec.file, name));
        }
    }
    Ok(())
}

fn twice(file: &Path, name: &str) -> Error {
    Error::new(errno::EBUSY, "image", format!("already served as disk '{name}'")).at_path(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn spec(name: &str, file: &Path) -> DiskSpec {
        DiskSpec { name: Some(name.into()), file: file.into(), format: None, read_only: false, snapshot: None }
    }

    #[test]
    fn an_image_or_a_name_given_twice_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let mnt = dir.path().join("mnt");
        let (a, b, link, hard) =
            (dir.path().join("a"), dir.path().join("b"), dir.path().join("l"), dir.path().join("h"));
        for file in [&a, &b] {
            fs::write(file, "x").unwrap();
        }
        symlink(&a, &link).unwrap();
        fs::hard_link(&a, &hard).unwrap();
        check_images(&[spec("a", &a), spec("b", &b)], &mnt).unwrap();
        for same in [&a, &link, &hard] {
            let e = check_images(&[spec("a", &a), spec("b", same)], &mnt).unwrap_err();
            assert!(e.to_string().contains("already served as disk 'a'"), "{e}");
            let e = check_added(&spec("b", same), &mnt, [("a", a.as_path())].into_iter()).unwrap_err();
            assert_eq!(e.errno(), errno::EBUSY);
        }
        check_added(&spec("b", &b), &mnt, [("a", a.as_path())].into_iter()).unwrap();
        let e = check_images(&[spec("a", &a), spec("a", &b)], &mnt).unwrap_err();
        assert_eq!(e.errno(), errno::EEXIST);
        assert_eq!(check_images(&[], &mnt).unwrap_err().errno(), errno::EINVAL);
    }

    #[test]
    fn an_image_below_the_mount_point_is_refused_through_links_too() {
        let dir = tempfile::tempdir().unwrap();
        let mnt = absolute(dir.path()).unwrap();
        let inside = mnt.join("a");
        fs::write(&inside, "x").unwrap();
        let elsewhere = tempfile::tempdir().unwrap();
        let link = elsewhere.path().join("a");
        symlink(&inside, &link).unwrap();
        for path in [&inside, &link] {
            let e = check_images(&[spec("a", path)], &mnt).unwrap_err();
            assert!(e.to_string().contains("inside the mount point"), "{e}");
        }
    }

    #[test]
    fn what_is_no_image_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let mnt = dir.path().join("mnt");
        let e = check_images(&[spec("a", dir.path())], &mnt).unwrap_err();
        assert_eq!(e.errno(), errno::EISDIR);
        let e = check_images(&[spec("a", &dir.path().join("none"))], &mnt).unwrap_err();
        assert_eq!(e.errno(), errno::ENOENT);
        let e = check_images(&[spec("a", Path::new("/dev/null"))], &mnt).unwrap_err();
        assert_eq!(e.errno(), errno::EINVAL);
        let e = check_images(&[spec("a.b", Path::new("/dev/null"))], &mnt).unwrap_err();
        assert!(e.to_string().contains("/dev/null"), "{e}");
    }

    #[test]
    fn names_and_paths_have_defaults() {
        assert_eq!(default_name(Path::new("/a/vda.qcow2")), "vda");
        assert_eq!(default_name(Path::new("/dev/sdb")), "sdb");
        assert_eq!(default_name(Path::new("/")), "");
        let dir = absolute(tempfile::tempdir().unwrap().path()).unwrap();
        assert_eq!(absolute(&dir.join("no/such")).unwrap(), dir.join("no/such"));
    }
}
