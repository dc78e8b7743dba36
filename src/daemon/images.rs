//! What must hold of images and paths before anything is touched.
//!
//! A file in the daemon's own mount would make the daemon wait for itself: no file of an image, be it far down its
//! chain, may lie there, and none of its state. A file that one disk writes to and another one uses would change behind
//! the back of the latter. The locks on images refuse that too; here it is refused by name, before any of the disks is
//! opened.

use super::own_mount::OwnMount;
use crate::error::{Error, Result, errno};
use crate::fleece::{DiskSpec, Fleece, Options, state_dir};
use crate::image::{Part, files};
use crate::storage::device::loop_file;
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

/// The default name of a disk: the stem of the image's file name.
pub fn default_name(file: &Path) -> String {
    file.file_stem().unwrap_or(OsStr::new("")).to_string_lossy().into_owned()
}

/// A file, as one disk uses it.
#[derive(Debug)]
struct Use {
    disk: String,
    part: Part,
    path: PathBuf,
    identity: Identity,
    /// Of a loop device: its file's, which no lock keeps from being written to through the device.
    below: Option<Identity>,
    writes: bool,
    /// Others may write to it meanwhile.
    shares: bool,
    /// It is read for an internal snapshot.
    snapshot: bool,
}

impl Use {
    /// Refuses to use a file beside another disk's use of it, where one of them writes to it.
    fn check_beside(&self, other: &Use) -> Result<()> {
        let conflict = (self.writes && !other.shares) || (other.writes && !self.shares);
        let is_below = |one: &Use, other: &Use| one.below == Some(other.identity);
        let same = self.identity == other.identity || is_below(self, other) || is_below(other, self);
        if !same || !conflict {
            return Ok(());
        }
        let role = match other.part {
            Part::Image => format!("already served as disk '{}'", other.disk),
            Part::DataFile => format!("it holds the data of disk '{}'", other.disk),
            Part::BackingFile => format!("disk '{}' is based on it", other.disk),
        };
        let why = match (self.writes, other.writes) {
            (true, true) => role,
            (_, false) => format!("{role}, and must not be written to"),
            (false, _) => format!("{role}, which writes to it"),
        };
        let what = match self.part {
            Part::Image => "image".to_owned(),
            Part::DataFile => format!("disk '{}': external data file", self.disk),
            Part::BackingFile => format!("disk '{}': backing file", self.disk),
        };
        let e = Error::new(errno::EBUSY, what, why).at_path(&self.path);
        Err(if self.writes && other.writes {
            e
        } else if self.snapshot || other.snapshot {
            e.hint(
                "serve the internal snapshot in another mount, with force-share; or all that use the image read-only",
            )
        } else {
            e.hint("serve all that use it read-only")
        })
    }
}

/// All files that a disk would use, none of them in the mount. What cannot be looked at is left to who opens it.
fn uses_of(spec: &DiskSpec, own_mount: &OwnMount) -> Result<Vec<Use>> {
    let disk = spec.name.clone().unwrap_or_else(|| default_name(&spec.file));
    let mut uses = Vec::new();
    files(&spec.file, spec.format, &mut |part, path| {
        let what = match part {
            Part::Image => "image",
            Part::DataFile => "external data file",
            Part::BackingFile => "backing file",
        };
        own_mount.refuse(what, path)?;
        if let Ok(metadata) = fs::metadata(path) {
            // A loop device, or a file system on one.
            let is_device = metadata.file_type().is_block_device();
            let behind = loop_file(if is_device { metadata.rdev() } else { metadata.dev() });
            let below = behind.as_ref().filter(|_| is_device).and_then(|file| fs::metadata(file).ok());
            let below = below.map(|file| identity(&file));
            if let Some(file) = behind {
                own_mount.refuse(&format!("{what} {}: the file of its loop device", path.display()), &file)?;
            }
            let writes = part != Part::BackingFile && !spec.is_read_only();
            let (path, identity) = (path.to_owned(), identity(&metadata));
            let (shares, snapshot) = (spec.force_share, spec.snapshot.is_some());
            uses.push(Use { disk: disk.clone(), part, path, identity, below, writes, shares, snapshot });
        }
        Ok(())
    })?;
    Ok(uses)
}

/// Checks one image by itself, and gives the files that it needs.
fn check_image(spec: &DiskSpec, options: &Options, mountpoint: &Path, own_mount: &OwnMount) -> Result<Vec<Use>> {
    let file = &spec.file;
    own_mount.refuse("image", file)?;
    let metadata = fs::metadata(file).map_err(|e| Error::io("image", e).at_path(file))?;
    if metadata.is_dir() {
        return Err(Error::new(errno::EISDIR, "image", "is a directory")
            .at_path(file)
            .hint("images come first and the mount point last: fleecefs mount [NAME=]IMAGE... MNT"));
    }
    if !metadata.is_file() && !metadata.file_type().is_block_device() {
        return Err(Error::new(errno::EINVAL, "image", "neither a regular file nor a block device").at_path(file));
    }
    if let Some(name) = &spec.name {
        check_disk_name(name).map_err(|e| e.context(format!("image {}", file.display())))?;
    }
    if metadata.is_file() && !spec.is_read_only() {
        let name = spec.name.clone().unwrap_or_else(|| default_name(file));
        let state = state_dir(&name, file, options);
        own_mount.refuse("state directory", &state).map_err(|e| e.hint("choose another one with --state-dir DIR"))?;
        if absolute(&state).is_ok_and(|state| mountpoint.starts_with(state)) {
            let why = format!("the mount point {} would hide what is in it", mountpoint.display());
            return Err(Error::new(errno::EINVAL, "state directory", why)
                .at_path(&state)
                .hint("mount somewhere else, on an empty directory"));
        }
    }
    uses_of(spec, own_mount)
}

/// Checks all images of a new mount: there is one, each is an image, no name occurs twice, and nothing that one of them
/// writes to is used by another.
pub fn check_images(disks: &[DiskSpec], options: &Options, mountpoint: &Path) -> Result<()> {
    if disks.is_empty() {
        return Err(Error::new(errno::EINVAL, "mount", "no image given").hint("fleecefs mount [NAME=]IMAGE... MNT"));
    }
    let own_mount = OwnMount::planned(mountpoint);
    let mut names: Vec<(String, &Path)> = Vec::new();
    let mut seen: Vec<Use> = Vec::new();
    for spec in disks {
        let uses = check_image(spec, options, mountpoint, &own_mount)?;
        for new in &uses {
            seen.iter().try_for_each(|other| new.check_beside(other))?;
        }
        seen.extend(uses);
        let name = spec.name.clone().unwrap_or_else(|| default_name(&spec.file));
        if let Some((_, other)) = names.iter().find(|(other, _)| *other == name) {
            let why = format!("the name of both {} and {}", other.display(), spec.file.display());
            return Err(Error::new(errno::EEXIST, format!("disk '{name}'"), why)
                .hint("give one of them another name with NAME=IMAGE"));
        }
        names.push((name, &spec.file));
    }
    Ok(())
}

/// Checks an image that is to join those of a running mount (names are the core's matter).
pub fn check_added(spec: &DiskSpec, mountpoint: &Path, fleece: &Fleece) -> Result<()> {
    let own_mount = OwnMount::served(mountpoint)?;
    let uses = check_image(spec, fleece.options(), mountpoint, &own_mount)?;
    for disk in fleece.disks() {
        let served = DiskSpec {
            name: Some(disk.name().to_owned()),
            file: disk.image_path().to_owned(),
            format: Some(disk.format()),
            read_only: disk.read_only(),
            force_share: disk.is_shared(),
            snapshot: disk.internal_snapshot().map(str::to_owned),
            ..DiskSpec::default()
        };
        for other in uses_of(&served, &own_mount)? {
            uses.iter().try_for_each(|new| new.check_beside(&other))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn spec(name: &str, file: &Path) -> DiskSpec {
        DiskSpec { name: Some(name.into()), file: file.into(), ..Default::default() }
    }

    fn check(disks: &[DiskSpec], mountpoint: &Path) -> Result<()> {
        check_images(disks, &Options::default(), mountpoint)
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
        check(&[spec("a", &a), spec("b", &b)], &mnt).unwrap();
        for same in [&a, &link, &hard] {
            let e = check(&[spec("a", &a), spec("b", same)], &mnt).unwrap_err();
            assert!(e.to_string().contains("already served as disk 'a'"), "{e}");
            assert_eq!(e.errno(), errno::EBUSY);
        }
        let e = check(&[spec("a", &a), spec("a", &b)], &mnt).unwrap_err();
        assert_eq!(e.errno(), errno::EEXIST);
        assert_eq!(check(&[], &mnt).unwrap_err().errno(), errno::EINVAL);
    }

    #[test]
    fn a_writer_stands_beside_nobody_but_who_shares() {
        let dir = tempfile::tempdir().unwrap();
        let mnt = dir.path().join("mnt");
        let a = dir.path().join("a");
        fs::write(&a, "x").unwrap();
        let writer = spec("w", &a);
        let reader = DiskSpec { read_only: true, ..spec("r", &a) };
        let frozen = DiskSpec { snapshot: Some("s".into()), ..spec("f", &a) };
        let sharer = DiskSpec { force_share: true, ..reader.clone() };
        for (disks, why) in [
            ([&writer, &reader], Some("already served as disk 'w', which writes to it")),
            ([&reader, &writer], Some("already served as disk 'r', and must not be written to")),
            ([&writer, &frozen], Some("which writes to it")),
            ([&reader, &frozen], None),
            ([&sharer, &writer], None),
            ([&writer, &sharer], None),
        ] {
            let checked = check(&disks.map(Clone::clone), &mnt);
            match (checked, why) {
                (Err(e), Some(why)) => assert!(e.to_string().contains(why), "{e}"),
                (checked, why) => assert!(checked.is_ok() && why.is_none(), "{checked:?} {why:?}"),
            }
        }
    }

    #[test]
    fn a_state_directory_is_not_below_the_mount_point_nor_above_it() {
        let dir = tempfile::tempdir().unwrap();
        let dir = absolute(dir.path()).unwrap();
        let (a, state) = (dir.join("a"), dir.join("a.fleece"));
        fs::write(&a, "x").unwrap();
        let e = check(&[spec("a", &a)], &state).unwrap_err();
        assert!(e.to_string().contains("inside the mount point"), "{e}");
        let e = check(&[spec("a", &a)], &state.join("layers")).unwrap_err();
        assert!(e.to_string().contains("would hide"), "{e}");
        check(&[DiskSpec { read_only: true, ..spec("a", &a) }], &state).unwrap();
        symlink(dir.join("mnt/live"), &state).unwrap();
        let e = check(&[spec("a", &a)], &dir.join("mnt")).unwrap_err();
        assert!(e.to_string().contains("state directory") && e.hint_text().unwrap().contains("--state-dir"), "{e}");
        let options = Options { state_dir: Some(dir.join("s")), ..Options::default() };
        check_images(&[spec("a", &a)], &options, &dir.join("mnt")).unwrap();
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
            let e = check(&[spec("a", path)], &mnt).unwrap_err();
            assert!(e.to_string().contains("inside the mount point"), "{e}");
        }
    }

    #[test]
    fn what_is_no_image_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let mnt = dir.path().join("mnt");
        let e = check(&[spec("a", dir.path())], &mnt).unwrap_err();
        assert_eq!(e.errno(), errno::EISDIR);
        let e = check(&[spec("a", &dir.path().join("none"))], &mnt).unwrap_err();
        assert_eq!(e.errno(), errno::ENOENT);
        let e = check(&[spec("a", Path::new("/dev/null"))], &mnt).unwrap_err();
        assert_eq!(e.errno(), errno::EINVAL);
        let e = check(&[spec("a.b", Path::new("/dev/null"))], &mnt).unwrap_err();
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
