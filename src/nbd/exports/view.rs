//! A frozen view as an export.

use super::contexts::Contexts;
use super::{OpenView, check_served};
use crate::error::{Error, Result, errno};
use crate::nbd::export::{Context, Export, Zeroes};
use crate::units::MAX_GATE_BYTES;
use std::sync::Arc;

/// Most that one read of a view asks the core for. How long a read may be held up for the guest is bounded for each, so
/// a larger one would go on past the guest once its patience is used up; files of the mount have the same limit.
const PIECE_BYTES: usize = MAX_GATE_BYTES as usize;

/// A frozen view, as one session has it.
pub struct ViewExport {
    view: Arc<OpenView>,
    description: String,
    contexts: Contexts,
}

impl ViewExport {
    /// An open view with its contexts.
    pub fn new(view: Arc<OpenView>, description: String, contexts: Contexts) -> ViewExport {
        ViewExport { view, description, contexts }
    }

    fn served(&self) -> Result<()> {
        check_served(self.view.view().is_served(), "frozen view")
    }
}

fn read_only() -> Error {
    Error::new(errno::EPERM, "frozen view", "is read-only")
}

impl Export for ViewExport {
    fn size(&self) -> u64 {
        self.view.view().size()
    }

    fn read_only(&self) -> bool {
        true
    }

    fn description(&self) -> String {
        self.description.clone()
    }

    fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.served()?;
        let mut at = offset;
        for piece in buf.chunks_mut(PIECE_BYTES) {
            let len = piece.len();
            if self.view.view().read(piece, at)? < len {
                return Err(Error::new(errno::EINVAL, "frozen view", "past its end").at_offset(at));
            }
            at += len as u64;
        }
        Ok(())
    }

    fn write(&self, _data: &[u8], _offset: u64) -> Result<()> {
        Err(read_only())
    }

    fn write_zeroes(&self, _offset: u64, _len: u64, _how: Zeroes) -> Result<()> {
        Err(read_only())
    }

    fn trim(&self, _offset: u64, _len: u64) -> Result<()> {
        Err(read_only())
    }

    fn cache(&self, _offset: u64, _len: u64) -> Result<()> {
        self.served()
    }

    /// Nothing that is read here waits to be written.
    fn flush(&self) -> Result<()> {
        self.served()
    }

    fn contexts(&self) -> Vec<String> {
        self.contexts.names()
    }

    fn context(&self, name: &str) -> Option<Arc<dyn Context>> {
        self.contexts.get(name)
    }
}
