//! The run of data that a file was last found to have.
//!
//! To find where a run ends may cost as much as the run is long (tmpfs looks at each page), and who walks a view asks again
//! behind each of its copied chunks.
//!
//! Invariant: data is the answer that claims nothing, so a run may be remembered that others have punched since; what was
//! punched, zeroed or cut off through the same open file is forgotten before that call returns, also by a question that was
//! asked meanwhile.

use parking_lot::Mutex;
use std::ops::Range;

/// See the head of the file.
#[derive(Debug, Default)]
pub struct KnownData(Mutex<Known>);

#[derive(Debug, Default)]
struct Known {
    run: Range<u64>,
    changes: u64,
}

/// How often something was forgotten until then.
#[derive(Debug, Clone, Copy)]
pub struct Asked(u64);

impl KnownData {
    /// The end of the run that `offset` is in, or what [`KnownData::learn`] wants to hear.
    pub fn end_behind(&self, offset: u64) -> Result<u64, Asked> {
        let known = self.0.lock();
        if known.run.contains(&offset) { Ok(known.run.end) } else { Err(Asked(known.changes)) }
    }

    /// Remembers what was found, unless something was forgotten since it was `asked` for.
    pub fn learn(&self, asked: Asked, run: Range<u64>) {
        let mut known = self.0.lock();
        if known.changes == asked.0 {
            known.run = run;
        }
    }

    /// Something was punched, zeroed or cut off.
    pub fn forget(&self) {
        let mut known = self.0.lock();
        known.changes += 1;
        known.run = 0..0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_is_known_until_something_is_punched_also_meanwhile() {
        let known = KnownData::default();
        let asked = known.end_behind(5).unwrap_err();
        known.learn(asked, 4..9);
        assert_eq!((known.end_behind(4).unwrap(), known.end_behind(8).unwrap()), (9, 9));
        assert!(known.end_behind(3).is_err() && known.end_behind(9).is_err());
        let asked = known.end_behind(20).unwrap_err();
        known.forget();
        assert!(known.end_behind(4).is_err());
        known.learn(asked, 20..30);
        assert!(known.end_behind(20).is_err());
    }
}
