//! Files as disks, and commands.

use fleecefs::error::{Error, Result};
use fleecefs::volume::{Content, Disk, Scan, scan};
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A file as a disk.
pub struct FileDisk {
    pub path: PathBuf,
    file: File,
    size: u64,
}

impl FileDisk {
    pub fn open(path: &Path) -> FileDisk {
        let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
        let size = file.metadata().unwrap().len();
        FileDisk { path: path.to_owned(), file, size }
    }

    /// Makes a file of this length.
    pub fn create(path: &Path, size: u64) -> FileDisk {
        File::create(path).unwrap().set_len(size).unwrap();
        FileDisk::open(path)
    }

    pub fn write(&self, bytes: &[u8], offset: u64) {
        self.file.write_all_at(bytes, offset).unwrap();
    }

    pub fn text(&self) -> &str {
        self.path.to_str().unwrap()
    }
}

impl Disk for FileDisk {
    fn name(&self) -> &str {
        self.path.file_name().unwrap().to_str().unwrap()
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        assert!(offset + buf.len() as u64 <= self.size, "read past the end");
        self.file.read_exact_at(buf, offset).map_err(|e| Error::io("read", e).at_path(&self.path).at_offset(offset))
    }
}

pub fn scan_files(disks: &[&FileDisk]) -> Scan {
    let disks: Vec<&dyn Disk> = disks.iter().map(|disk| *disk as &dyn Disk).collect();
    scan(&disks)
}

/// Runs a line of shell commands; what it prints.
pub fn sh(line: &str) -> String {
    let out = Command::new("bash").args(["-euo", "pipefail", "-c", line]).env("LC_ALL", "C.UTF-8").output().unwrap();
    let (text, errors) = (String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    assert!(out.status.success(), "{line}: {:?}\n{text}{errors}", out.status);
    text.into_owned()
}

/// A loop device of a file, gone with the value.
pub struct Loop(pub String);

impl Loop {
    pub fn new(path: &Path, sector: u64) -> Loop {
        Loop(sh(&format!("losetup -f --show --sector-size {sector} {}", path.display())).trim().to_owned())
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["-d", &self.0]).status();
    }
}

/// A mount, gone with the value.
pub struct Mount(pub PathBuf);

impl Mount {
    pub fn new(options: &str, what: &Path, at: &Path) -> Mount {
        std::fs::create_dir_all(at).unwrap();
        sh(&format!("mount -o {options} {} {}", what.display(), at.display()));
        Mount(at.to_owned())
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let done = Command::new("umount").arg(&self.0).status().is_ok_and(|status| status.success());
        if !done {
            let _ = Command::new("umount").arg("-l").arg(&self.0).status();
        }
    }
}

/// What `blkid` says of a range of a file.
pub fn blkid(path: &Path, offset: u64, size: u64) -> Option<Content> {
    let path = path.display();
    let text = sh(&format!(
        "blkid -p -o export --usages filesystem,raid,crypto,other --offset {offset} --size {size} {path} || [ $? = 2 ]"
    ));
    let fields: BTreeMap<&str, String> = text
        .lines()
        .filter_map(|line| line.split_once('='))
        .map(|(name, value)| (name, value.replace('\\', "")))
        .collect();
    let get = |name: &str| fields.get(name).cloned();
    Some(Content { kind: get("TYPE")?, label: get("LABEL"), uuid: get("UUID") })
}
