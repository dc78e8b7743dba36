//! From the source's extents to the runs that one format lists.
//!
//! Four steps, each an iterator that holds one element: check (no gap, no overlap, the disk's end is reached), project
//! to what the format can say, drop what it does not list, merge neighbours. A run remembers the extent that it began
//! with, so that a later walk can begin there and give the same runs.

use super::{Extent, ExtentSource, Extents, MapFormat};
use crate::error::{Error, Result, errno};
use crate::units::{round_down, round_up};

/// What a format writes one entry for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Run {
    /// Start of the source's extent that the run began with: where a walk can be taken up.
    pub source: u64,
    /// First byte.
    pub start: u64,
    /// Byte after the last.
    pub end: u64,
    /// Listed as changed.
    pub dirty: bool,
    /// Listed as zeros.
    pub zero: bool,
}

impl Run {
    pub fn length(&self) -> u64 {
        self.end - self.start
    }
}

/// The runs that `format` lists, from the extent that starts at `from`.
pub(super) fn runs(
    source: &dyn ExtentSource,
    format: MapFormat,
    from: u64,
) -> Result<impl Iterator<Item = Result<Run>> + '_> {
    let checked = Checked { extents: source.extents_from(from)?, next: from, size: source.disk_size(), failed: false };
    let listed = checked.filter_map(move |extent| match extent {
        Ok(e) => project(format, &e).map(Ok),
        Err(e) => Some(Err(e)),
    });
    Ok(Merged { runs: listed, pending: None })
}

/// What the format says about an extent; `None` where it does not list it.
fn project(format: MapFormat, e: &Extent) -> Option<Run> {
    if !e.dirty && format.lists_changes_only() {
        return None;
    }
    let zero = e.zero && if e.dirty { format.says_zero() } else { format.says_zero_of_unchanged() };
    let unit = format.unit();
    Some(Run {
        source: e.start,
        start: round_down(e.start, unit),
        end: round_up(e.start + e.length, unit),
        dirty: e.dirty,
        zero,
    })
}

/// Passes extents on while they continue each other and stay on the disk.
struct Checked<'a> {
    extents: Extents<'a>,
    next: u64,
    size: u64,
    failed: bool,
}

impl Checked<'_> {
    fn wrong(&mut self, why: String) -> Option<Result<Extent>> {
        self.failed = true;
        Some(Err(Error::new(errno::EIO, "map", why).at_offset(self.next)))
    }
}

impl Iterator for Checked<'_> {
    type Item = Result<Extent>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.failed {
            return None;
        }
        match self.extents.next() {
            None if self.next == self.size => None,
            None => self.wrong(format!("ends before the disk's end at {}", self.size)),
            Some(Err(e)) => {
                self.failed = true;
                Some(Err(e))
            }
            Some(Ok(e)) if e.start != self.next || e.length == 0 || e.length > self.size - self.next => {
                self.wrong(format!("extent of {} bytes at {} does not continue it", e.length, e.start))
            }
            Some(Ok(e)) => {
                self.next += e.length;
                Some(Ok(e))
            }
        }
    }
}

/// Joins neighbours of equal state that touch or, widened to blocks, overlap.
struct Merged<I> {
    runs: I,
    pending: Option<Run>,
}

impl<I: Iterator<Item = Result<Run>>> Iterator for Merged<I> {
    type Item = Result<Run>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            match self.runs.next() {
                Some(Ok(run)) => match &mut self.pending {
                    Some(p) if run.start <= p.end && (run.dirty, run.zero) == (p.dirty, p.zero) => {
                        p.end = p.end.max(run.end);
                    }
                    pending => {
                        if let Some(done) = pending.replace(run) {
                            return Some(Ok(done));
                        }
                    }
                },
                Some(Err(e)) => {
                    self.pending = None;
                    return Some(Err(e));
                }
                None => return self.pending.take().map(Ok),
            }
        }
    }
}
