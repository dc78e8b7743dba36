//! The demo's disk: a partition table and a file system where the tools for them are there, and data that is not zero.

use crate::error::{Error, Result};
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Size of the disk in bytes.
pub const DISK_BYTES: u64 = 64 << 20;
/// Where the file system lies.
const FILE_SYSTEM_OFFSET: u64 = 1 << 20;
const FILE_SYSTEM_BYTES: u64 = 24 << 20;
/// Where the guest writes: a second partition without a file system, as a database may have it.
pub const GUEST_OFFSET: u64 = 32 << 20;
/// Length of what the guest writes to; a rest behind it stays empty.
pub const GUEST_BYTES: u64 = 24 << 20;
/// What the guest's partition holds at first.
const OLD_DATA_BYTES: u64 = 8 << 20;
const BLOCK_BYTES: usize = 1 << 16;

/// The layout for sfdisk, in sectors of 512 bytes.
fn table() -> String {
    let line = |offset: u64, bytes: u64| format!("start={}, size={}, type=linux\n", offset / 512, bytes / 512);
    format!(
        "label: gpt\n{}{}",
        line(FILE_SYSTEM_OFFSET, FILE_SYSTEM_BYTES),
        line(GUEST_OFFSET, DISK_BYTES - GUEST_OFFSET - FILE_SYSTEM_OFFSET)
    )
}

/// A program in the places where system tools are.
pub fn find_tool(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let dirs = std::env::split_paths(&path).chain(["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from));
    dirs.map(|dir| dir.join(name))
        .find(|file| std::fs::metadata(file).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0))
}

/// Makes the disk and tells what is on it.
pub fn create(path: &Path) -> Result<String> {
    let failed = |e| Error::io("make the disk", e).at_path(path);
    let file = File::create_new(path).map_err(failed)?;
    file.set_len(DISK_BYTES).map_err(failed)?;
    let mut random = Random::new();
    let mut block = vec![0; BLOCK_BYTES];
    for start in (0..OLD_DATA_BYTES).step_by(BLOCK_BYTES) {
        random.fill(&mut block);
        file.write_all_at(&block, GUEST_OFFSET + start).map_err(failed)?;
    }
    let mut found = Vec::new();
    if let Some(sfdisk) = find_tool("sfdisk")
        && run(Command::new(sfdisk).arg("--quiet").arg(path), &table())
    {
        found.push("GPT");
    }
    if let Some(mkfs) = find_tool("mkfs.ext4")
        && run(
            Command::new(mkfs)
                .args(["-q", "-F", "-E", &format!("offset={FILE_SYSTEM_OFFSET}")])
                .arg(path)
                .arg(format!("{}K", FILE_SYSTEM_BYTES / 1024)),
            "",
        )
    {
        found.push("ext4");
    }
    found.push("data");
    Ok(found.join(", "))
}

/// Runs a tool with a text on its standard input; what it says is of no interest, only whether it worked.
fn run(command: &mut Command, input: &str) -> bool {
    let child = command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
    let Ok(mut child) = child else { return false };
    let told = child.stdin.take().is_some_and(|mut stdin| stdin.write_all(input.as_bytes()).is_ok());
    child.wait().is_ok_and(|status| status.success()) && told
}

/// xorshift64*: enough for data that cannot be mistaken for other data.
#[derive(Debug)]
pub struct Random(u64);

impl Random {
    /// Seeded anew each time.
    pub fn new() -> Random {
        Random(uuid::Uuid::new_v4().as_u64_pair().0 | 1)
    }

    /// The next number.
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Random bytes.
    pub fn fill(&mut self, buf: &mut [u8]) {
        for word in buf.chunks_mut(8) {
            let bytes = self.next().to_le_bytes();
            for (to, from) in word.iter_mut().zip(bytes) {
                *to = from;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_disk_has_its_size_and_old_data() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("d");
        assert!(create(&path).unwrap().ends_with("data"));
        let file = File::open(&path).unwrap();
        assert_eq!(file.metadata().unwrap().len(), DISK_BYTES);
        let mut block = vec![0; BLOCK_BYTES];
        file.read_exact_at(&mut block, GUEST_OFFSET + OLD_DATA_BYTES - BLOCK_BYTES as u64).unwrap();
        assert!(block.iter().any(|&b| b != 0));
        assert!(create(&path).is_err());
    }

    #[test]
    fn parts_of_the_disk_do_not_overlap() {
        const { assert!(FILE_SYSTEM_OFFSET + FILE_SYSTEM_BYTES <= GUEST_OFFSET) };
        const { assert!(GUEST_OFFSET + GUEST_BYTES <= DISK_BYTES && OLD_DATA_BYTES <= GUEST_BYTES) };
        assert!(table().contains("start=65536"));
    }

    #[test]
    fn tools_are_found_or_not() {
        assert!(find_tool("sh").is_some());
        assert!(find_tool("no-such-tool-anywhere").is_none());
    }
}
