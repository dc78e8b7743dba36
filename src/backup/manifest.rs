//! What a point of a backup is: the manifest and the checksums beside its files.
//!
//! ```text
//! DIR/POINT/manifest.json    this, written when all other files are durable
//!           SHA256SUMS       the checksums of all other files, as `sha256sum -c` reads them
//!           DISK.qcow2       one disk; an increment's backing file is ../BASE/DISK.qcow2
//!           DISK.raw         or so: an increment has what changed, the rest are holes
//!           DISK.map.json    and what of it is data, of an increment
//! ```
//! A point is known by its UUID, an instant of a disk by its checkpoint's: names can be used again. Fields are added, and
//! unknown ones passed over; what changes their meaning has another version, which is refused.

use crate::error::{Error, Result, errno};
use crate::fleece::SkippedInfo;
use crate::image::Format;
use crate::storage::{Dir, OsDir};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use uuid::Uuid;

/// Name of the manifest in a point's directory.
pub const MANIFEST: &str = "manifest.json";
/// Name of the file of checksums.
pub const SUMS: &str = "SHA256SUMS";
/// How the directory of a point ends that is not whole.
pub const PARTIAL: &str = ".partial";
/// The version that this program writes, and the newest that it reads.
const VERSION: u32 = 1;
/// Longest manifest in bytes.
const MAX_MANIFEST_BYTES: u64 = 64 << 20;
/// What is hashed at once.
const HASH_BYTES: usize = 1 << 20;

/// One point of a backup.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of these fields.
    pub version: u32,
    /// The program that wrote it.
    pub tool: String,
    /// Name of the point, of the snapshot it was read from, and of its checkpoint.
    pub point: String,
    /// Identity of the point.
    pub uuid: Uuid,
    /// Identity of the snapshot.
    pub snapshot_uuid: Uuid,
    /// The instant, RFC 3339, UTC.
    pub time: String,
    /// `crash`, or `filesystem` where guests were frozen.
    pub consistency: String,
    /// What hooks ran around the instant.
    #[serde(default)]
    pub hooks: Value,
    /// The consumer that moved to it.
    pub consumer: Option<String>,
    /// One entry a disk.
    pub disks: Vec<DiskEntry>,
    /// All files but the manifest itself.
    pub files: Vec<FileEntry>,
}

/// One disk in a point.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DiskEntry {
    /// Its name.
    pub name: String,
    /// Its identity in the mount.
    pub uuid: Uuid,
    /// The image that was served.
    pub image: PathBuf,
    /// Size in bytes at the instant.
    pub size: u64,
    /// Identity of the disk's checkpoint of the instant.
    pub checkpoint_uuid: Uuid,
    /// The point that this one is an increment to; none: it is a full backup.
    pub base: Option<BaseEntry>,
    /// Why it is full where an increment was asked for.
    pub full_reason: Option<String>,
    /// Format of the file.
    pub format: Format,
    /// Name of the file.
    pub file: String,
    /// Name of the file that says which bytes of an increment count, where the format can't.
    pub map: Option<String>,
    /// Bytes that the map has as changed.
    pub changed_bytes: u64,
    /// Those of them that are known to be zeros.
    pub zero_bytes: u64,
    /// Bytes that were written as data.
    pub copied_bytes: u64,
    /// What the view left out, if anything: it is zeros in this point, whatever older points have there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub skipped: Option<SkippedInfo>,
}

/// The point that another one builds on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BaseEntry {
    /// Its name, and its directory's.
    pub point: String,
    /// Its identity.
    pub uuid: Uuid,
}

/// A file of a point.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FileEntry {
    /// Its name.
    pub name: String,
    /// Its length in bytes.
    pub size: u64,
    /// Its SHA-256, hexadecimal.
    pub sha256: String,
}

impl Manifest {
    /// A manifest of this version, without disks and files.
    pub fn new(point: &str) -> Manifest {
        Manifest {
            version: VERSION,
            tool: format!("fleecefs {}", env!("CARGO_PKG_VERSION")),
            point: point.to_owned(),
            uuid: Uuid::new_v4(),
            snapshot_uuid: Uuid::nil(),
            time: String::new(),
            consistency: "crash".to_owned(),
            hooks: Value::Array(Vec::new()),
            consumer: None,
            disks: Vec::new(),
            files: Vec::new(),
        }
    }

    /// Reads the manifest in the directory of a point. ENOENT where there is none.
    pub fn read(dir: &Path) -> Result<Manifest> {
        let path = dir.join(MANIFEST);
        let manifest: Manifest = read_json(&path)?;
        if manifest.version > VERSION {
            let why = format!("version {} is newer than this program knows", manifest.version);
            return Err(Error::new(errno::EOPNOTSUPP, "backup", why).at_path(path));
        }
        manifest.check().map_err(|why| damaged(&path, why))?;
        Ok(manifest)
    }

    /// Names become paths: they must not lead elsewhere.
    fn check(&self) -> std::result::Result<(), String> {
        let mut names = vec![&self.point];
        names.extend(self.files.iter().map(|file| &file.name));
        for disk in &self.disks {
            names.extend([&disk.name, &disk.file]);
            names.extend(disk.map.iter());
            names.extend(disk.base.iter().map(|base| &base.point));
            for file in [Some(&disk.file), disk.map.as_ref()].into_iter().flatten() {
                if !self.files.iter().any(|entry| entry.name == *file) {
                    return Err(format!("'{}' is not in the list of files", file.escape_debug()));
                }
            }
        }
        match names.into_iter().find(|name| !is_plain(name)) {
            Some(name) => Err(format!("'{}' is no name of a file", name.escape_debug())),
            None => Ok(()),
        }
    }

    /// The entry of a disk. ENOENT where there is none.
    pub fn disk(&self, name: &str) -> Result<&DiskEntry> {
        self.disks.iter().find(|disk| disk.name == name).ok_or_else(|| {
            let all: Vec<_> = self.disks.iter().map(|disk| disk.name.as_str()).collect();
            let what = format!("disk '{}' of point '{}'", name.escape_debug(), self.point);
            Error::new(errno::ENOENT, what, "no such disk").hint(format!("it has: {}", all.join(" ")))
        })
    }

    /// The entry of a file.
    pub fn file(&self, name: &str) -> Option<&FileEntry> {
        self.files.iter().find(|file| file.name == name)
    }

    /// The checksums as `sha256sum -c` reads them.
    pub fn sums(&self) -> String {
        self.files
            .iter()
            .filter(|file| file.name != SUMS)
            .map(|file| format!("{}  {}\n", file.sha256, file.name))
            .collect()
    }
}

/// One component of a path, that is not hidden.
fn is_plain(name: &str) -> bool {
    !name.is_empty() && !name.starts_with('.') && !name.contains(['/', '\0'])
}

fn damaged(path: &Path, why: impl Into<String>) -> Error {
    Error::new(errno::EIO, "backup", why).at_path(path)
}

/// Reads a file of JSON.
pub(super) fn read_json<T: for<'a> Deserialize<'a>>(path: &Path) -> Result<T> {
    let failed = |e| Error::io("read", e).at_path(path);
    let mut text = Vec::new();
    File::open(path).map_err(failed)?.take(MAX_MANIFEST_BYTES).read_to_end(&mut text).map_err(failed)?;
    serde_json::from_slice(&text).map_err(|e| damaged(path, e.to_string()))
}

/// Writes a file of JSON that is whole whenever it is there; durable when it returns.
pub(super) fn write_json(dir: &OsDir, name: &str, value: &impl Serialize) -> Result<()> {
    let failed = |e: serde_json::Error| Error::io("write", e.into()).at_path(dir.path(name));
    let mut text = serde_json::to_vec_pretty(value).map_err(failed)?;
    text.push(b'\n');
    write_file(dir, name, &text)
}

/// Writes a file that is whole whenever it is there; durable when it returns.
pub(super) fn write_file(dir: &OsDir, name: &str, content: &[u8]) -> Result<()> {
    let unfinished = format!("{name}.new");
    dir.remove(&unfinished)?;
    let file = dir.create(&unfinished)?;
    file.write_at(content, 0)?;
    file.sync_all()?;
    dir.rename(&unfinished, name)?;
    dir.sync()
}

/// The SHA-256 of a file, hexadecimal, and its length. `step` is told of each count of bytes, and may end it.
pub fn hash_file(path: &Path, step: &dyn Fn(u64) -> Result<()>) -> Result<FileEntry> {
    let failed = |e| Error::io("read", e).at_path(path);
    let mut file = File::open(path).map_err(failed)?;
    let (mut digest, mut size, mut buffer) = (Sha256::new(), 0, vec![0; HASH_BYTES]);
    loop {
        let count = match file.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => count,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(failed(e)),
        };
        digest.update(buffer.get(..count).unwrap_or_default());
        size += count as u64;
        step(count as u64)?;
    }
    let sha256 = digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    Ok(FileEntry { name, size, sha256 })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest() -> Manifest {
        let sum = |name: &str| FileEntry { name: name.into(), size: 3, sha256: "00".repeat(32) };
        let disk = DiskEntry {
            name: "vda".into(),
            uuid: Uuid::new_v4(),
            image: "/images/vda.raw".into(),
            size: 3,
            checkpoint_uuid: Uuid::new_v4(),
            base: Some(BaseEntry { point: "a".into(), uuid: Uuid::new_v4() }),
            full_reason: None,
            format: Format::Raw,
            file: "vda.raw".into(),
            map: Some("vda.map.json".into()),
            changed_bytes: 2,
            zero_bytes: 1,
            copied_bytes: 1,
            skipped: Some(SkippedInfo { kinds: vec!["swap".into()], bytes: 4096 }),
        };
        Manifest { disks: vec![disk], files: vec![sum("vda.raw"), sum("vda.map.json")], ..Manifest::new("b") }
    }

    #[test]
    fn a_manifest_is_read_as_it_was_written() {
        let temp = tempfile::tempdir().unwrap();
        let dir = OsDir::create(temp.path()).unwrap();
        write_json(&dir, MANIFEST, &manifest()).unwrap();
        let first = Manifest::read(temp.path()).unwrap();
        write_json(&dir, MANIFEST, &first).unwrap();
        assert_eq!(Manifest::read(temp.path()).unwrap(), first);
        assert_eq!(dir.list("").unwrap(), [MANIFEST]);
        assert_eq!(first.sums().lines().count(), 2);
        assert!(first.disk("vda").is_ok() && first.disk("vdb").unwrap_err().hint_text().unwrap().contains("vda"));
    }

    #[test]
    fn names_that_lead_elsewhere_and_newer_versions_are_refused() {
        let temp = tempfile::tempdir().unwrap();
        let dir = OsDir::create(temp.path()).unwrap();
        let refused = |change: &dyn Fn(&mut Manifest)| {
            let mut bad = manifest();
            change(&mut bad);
            write_json(&dir, MANIFEST, &bad).unwrap();
            Manifest::read(temp.path()).unwrap_err()
        };
        for name in ["", "..", "../x", "a/b", ".hidden"] {
            refused(&|m| m.files[0].name = name.into());
            refused(&|m| m.disks[0].base.as_mut().unwrap().point = name.into());
            refused(&|m| m.point = name.into());
        }
        refused(&|m| m.disks[0].file = "not-listed.raw".into());
        assert_eq!(refused(&|m| m.version = VERSION + 1).errno(), errno::EOPNOTSUPP);
        std::fs::write(temp.path().join(MANIFEST), "{").unwrap();
        assert_eq!(Manifest::read(temp.path()).unwrap_err().errno(), errno::EIO);
        assert_eq!(Manifest::read(&temp.path().join("none")).unwrap_err().errno(), errno::ENOENT);
    }

    #[test]
    fn a_hash_is_what_everybody_computes() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("x");
        std::fs::write(&path, "abc").unwrap();
        let entry = hash_file(&path, &|_| Ok(())).unwrap();
        assert_eq!((entry.name.as_str(), entry.size), ("x", 3));
        assert_eq!(entry.sha256, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    }
}
