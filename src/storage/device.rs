//! Names of block devices that tell one from another.

use super::shm::{OsShmRoot, ShmRoot};
use crate::error::{Error, Result};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Links that udev makes for identities which a device keeps over reboots: directory, and how the name starts.
const LASTING: [(&str, &str); 3] =
    [("/dev/disk/by-id", "wwn-"), ("/dev/disk/by-id", "nvme-eui."), ("/dev/disk/by-partuuid", "")];

/// The name of a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceName {
    /// The name, good as a file name.
    pub name: String,
    /// For a name that holds only as long as the device does: how the names of its path start. All others of them are
    /// names of devices that are gone for good.
    pub passing: Option<String>,
}

/// The name of the block device at `path`: WWN or partition UUID where udev knows one, else its path with the boot and
/// the kernel's number of the disk (diskseq), which is never given twice in a boot. What is behind `/dev/loop0` or
/// `/dev/sdb` today need not be there tomorrow.
pub fn device_name(path: &Path) -> Result<DeviceName> {
    let failed = |e| Error::io("look at", e).at_path(path);
    let target = path.canonicalize().map_err(failed)?;
    if let Some(name) = LASTING.iter().find_map(|(dir, start)| link_to(Path::new(dir), start, &target)) {
        return Ok(DeviceName { name, passing: None });
    }
    let device = std::fs::metadata(&target).map_err(failed)?.rdev();
    let stem = format!("{}@", target.to_string_lossy().trim_start_matches('/').replace('/', "-"));
    let boot = OsShmRoot.boot_id();
    let name = format!("{stem}{boot}-{}", disk_sequence(device)?);
    Ok(DeviceName { name, passing: Some(stem) })
}

fn link_to(dir: &Path, start: &str, target: &Path) -> Option<String> {
    let entries = std::fs::read_dir(dir).ok()?;
    let links = entries.flatten().filter(|entry| entry.path().canonicalize().is_ok_and(|path| path == target));
    links.map(|entry| entry.file_name().to_string_lossy().into_owned()).filter(|name| name.starts_with(start)).min()
}

/// The number of a disk, or of the disk that a partition is on.
fn disk_sequence(device: u64) -> Result<String> {
    let dir = PathBuf::from(format!("/sys/dev/block/{}:{}", libc::major(device), libc::minor(device)));
    let own = dir.join("diskseq");
    let read = std::fs::read_to_string(&own).or_else(|_| std::fs::read_to_string(dir.join("../diskseq")));
    let text = read.map_err(|e| Error::io("number of the disk", e).at_path(own).hint("give a --state-dir"))?;
    Ok(text.trim().to_owned())
}

/// The loop device that a file is behind, if any.
pub fn loop_over(file: &Path) -> Option<PathBuf> {
    let wanted = super::os::identity(file)?;
    std::fs::read_dir("/sys/block").ok()?.flatten().find_map(|entry| {
        let text = std::fs::read(entry.path().join("loop/backing_file")).ok()?;
        let behind = Path::new(OsStr::from_bytes(text.strip_suffix(b"\n").unwrap_or(&text)));
        (super::os::identity(behind) == Some(wanted)).then(|| Path::new("/dev").join(entry.file_name()))
    })
}

/// The file behind a loop device of a number, or behind the one that this is a partition of.
pub fn loop_file(device: u64) -> Option<PathBuf> {
    let dir = PathBuf::from(format!("/sys/dev/block/{}:{}", libc::major(device), libc::minor(device)));
    let read = |name: &str| std::fs::read(dir.join(name)).ok();
    let text = read("loop/backing_file").or_else(|| read("../loop/backing_file"))?;
    Some(PathBuf::from(OsStr::from_bytes(text.strip_suffix(b"\n").unwrap_or(&text))))
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn the_first_link_of_the_kind_names_its_target() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("sda");
        std::fs::write(&target, "").unwrap();
        for name in ["wwn-2", "wwn-1", "ata-0"] {
            symlink(&target, dir.path().join(name)).unwrap();
        }
        let target = target.canonicalize().unwrap();
        assert_eq!(link_to(dir.path(), "wwn-", &target).as_deref(), Some("wwn-1"));
        assert_eq!(link_to(dir.path(), "nvme-", &target), None);
        assert_eq!(link_to(&dir.path().join("none"), "", &target), None);
    }

    #[test]
    fn a_device_without_a_lasting_identity_is_named_by_path_boot_and_number() {
        let Ok(name) = device_name(Path::new("/dev/loop0")) else {
            return eprintln!("skip: without /dev/loop0");
        };
        let stem = name.passing.unwrap();
        assert_eq!(stem, "dev-loop0@");
        let (boot, number) = name.name.strip_prefix(&stem).unwrap().rsplit_once('-').unwrap();
        assert_eq!(boot, OsShmRoot.boot_id());
        assert!(number.parse::<u64>().is_ok());
    }
}
