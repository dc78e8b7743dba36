//! A live disk as an export.

use super::contexts::Contexts;
use super::{OpenDisk, check_served};
use crate::error::{Error, Result, errno};
use crate::nbd::export::{Context, Export, Zeroes};
use std::sync::Arc;

/// How a live disk is exported.
#[derive(Debug, Clone, Default)]
pub struct LiveOptions {
    /// Whether changes are refused, though the disk takes them.
    pub read_only: bool,
    /// Whether each change is durable when it is answered.
    pub writethrough: bool,
    /// What the description says.
    pub description: String,
}

/// A live disk, as one session has it.
pub struct LiveExport {
    disk: OpenDisk,
    options: LiveOptions,
    contexts: Contexts,
}

impl LiveExport {
    /// An open disk with its contexts.
    pub fn new(disk: OpenDisk, options: LiveOptions, contexts: Contexts) -> LiveExport {
        LiveExport { disk, options, contexts }
    }

    fn served(&self) -> Result<()> {
        check_served(!self.disk.disk().is_closed(), self.disk.disk().name())
    }

    fn change(&self, change: impl FnOnce() -> Result<()>) -> Result<()> {
        self.served()?;
        if self.read_only() {
            return Err(Error::new(errno::EPERM, "export", "is read-only"));
        }
        change()?;
        if self.options.writethrough { self.disk.disk().flush() } else { Ok(()) }
    }
}

impl Export for LiveExport {
    fn size(&self) -> u64 {
        self.disk.disk().size()
    }

    fn read_only(&self) -> bool {
        self.options.read_only || self.disk.disk().read_only()
    }

    fn description(&self) -> String {
        self.options.description.clone()
    }

    fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.served()?;
        let len = buf.len();
        match self.disk.disk().read(buf, offset)? {
            count if count == len => Ok(()),
            _ => Err(past_the_end(offset)),
        }
    }

    fn write(&self, data: &[u8], offset: u64) -> Result<()> {
        self.change(|| {
            let mut done = 0;
            while let Some(rest) = data.get(done..).filter(|rest| !rest.is_empty()) {
                // A short count is an error behind its first piece: the next call tells it.
                match self.disk.disk().write(rest, offset + done as u64)? {
                    0 => return Err(past_the_end(offset)),
                    count => done += count,
                }
            }
            Ok(())
        })
    }

    fn write_zeroes(&self, offset: u64, len: u64, how: Zeroes) -> Result<()> {
        if how.no_hole && how.only_fast {
            // Some media have to be written to for that.
            return Err(Error::new(errno::EOPNOTSUPP, "write zeroes", "not known to be fast where no hole is left"));
        }
        self.change(|| match how.no_hole {
            true => self.disk.disk().write_zeroes(offset, len),
            false => self.disk.disk().discard(offset, len),
        })
    }

    fn trim(&self, offset: u64, len: u64) -> Result<()> {
        self.change(|| self.disk.disk().discard(offset, len))
    }

    /// Nothing is nearer than the image.
    fn cache(&self, _offset: u64, _len: u64) -> Result<()> {
        self.served()
    }

    fn flush(&self) -> Result<()> {
        self.served()?;
        self.disk.disk().flush()
    }

    fn contexts(&self) -> Vec<String> {
        self.contexts.names()
    }

    fn context(&self, name: &str) -> Option<Arc<dyn Context>> {
        self.contexts.get(name)
    }
}

/// The disk shrank under a client.
fn past_the_end(offset: u64) -> Error {
    Error::new(errno::ENOSPC, "export", "past the end of the disk").at_offset(offset)
}
