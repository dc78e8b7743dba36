//! What a server serves, as its sessions see it.

use crate::error::Result;
use std::sync::Arc;

/// One export as one session has it. It stays valid until it is dropped, whatever becomes of its name meanwhile.
///
/// Ranges lie inside `size`; the session has cut or refused what does not. Calls come from several threads at once.
pub trait Export: Send + Sync {
    /// Size in bytes.
    fn size(&self) -> u64;
    /// Whether changes are refused.
    fn read_only(&self) -> bool;
    /// What `NBD_INFO_DESCRIPTION` says.
    fn description(&self) -> String;
    /// Fills `buf`.
    fn read(&self, buf: &mut [u8], offset: u64) -> Result<()>;
    /// Writes all of `data`.
    fn write(&self, data: &[u8], offset: u64) -> Result<()>;
    /// Makes a range read as zeros. ENOTSUP where `only_fast` asks for what would not be faster than writing.
    fn write_zeroes(&self, offset: u64, len: u64, how: Zeroes) -> Result<()>;
    /// Discards a range.
    fn trim(&self, offset: u64, len: u64) -> Result<()>;
    /// Brings a range nearer, where that means anything.
    fn cache(&self, offset: u64, len: u64) -> Result<()>;
    /// Makes durable what was answered, on whatever session of this export.
    fn flush(&self) -> Result<()>;
    /// Names of its meta contexts, `base:allocation` first.
    fn contexts(&self) -> Vec<String>;
    /// One of them.
    fn context(&self, name: &str) -> Option<Arc<dyn Context>>;
}

/// How zeros are written.
#[derive(Debug, Clone, Copy, Default)]
pub struct Zeroes {
    /// `NBD_CMD_FLAG_NO_HOLE`: the range stays allocated.
    pub no_hole: bool,
    /// `NBD_CMD_FLAG_FAST_ZERO`.
    pub only_fast: bool,
}

/// One meta context of an export.
pub trait Context: Send + Sync {
    /// The run at `offset`, `len` bytes at most and one at least.
    fn run(&self, offset: u64, len: u64) -> Result<Run>;
}

/// Bytes of one status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// Flags as the context defines them.
    pub flags: u32,
    /// Length in bytes.
    pub len: u64,
}

/// All that a server serves.
pub trait Exports: Send + Sync {
    /// Names and descriptions, by name.
    fn list(&self) -> Vec<(String, String)>;
    /// The name that a client's `name` stands for: the empty one may stand for a default.
    fn canonical(&self, name: &str) -> String {
        name.to_owned()
    }
    /// Opens one by its canonical name for a session. ENOENT where there is none.
    fn open(&self, name: &str) -> Result<Arc<dyn Export>>;
}
