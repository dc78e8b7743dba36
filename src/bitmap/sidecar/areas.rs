//! Areas: where in the file the bits of bitmaps lie.
//!
//! The list of what is taken is derived from the directory at open and kept in memory. An area leaves it only when no
//! directory that counts, may count after a power loss, or is still being read by somebody names it.

use super::directory::Directory;
use super::layout::{AREA_MAX_BYTES, AREAS_END, AREAS_START, PAGE};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Weak};

/// A piece of the sidecar for the bits of one bitmap.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
pub struct Area {
    /// First byte, a multiple of a page.
    pub offset: u64,
    /// Length in bytes, a multiple of a page.
    pub len: u64,
}

impl Area {
    /// The byte behind the last one.
    pub fn end(&self) -> u64 {
        self.offset.saturating_add(self.len)
    }

    /// What is wrong with it, if anything: it must lie on pages, within the limits of the file.
    pub(super) fn fault(&self) -> Option<&'static str> {
        if !self.offset.is_multiple_of(PAGE) || !self.len.is_multiple_of(PAGE) || self.len == 0 {
            Some("is not made of whole pages")
        } else if self.offset < AREAS_START {
            Some("reaches into the fixed part of the file")
        } else if self.len > AREA_MAX_BYTES || self.end() > AREAS_END {
            Some("reaches past the limits of the file")
        } else {
            None
        }
    }
}

/// Which areas are in use.
#[derive(Debug, Default)]
pub(super) struct Areas {
    /// Offset to length; disjoint.
    taken: BTreeMap<u64, u64>,
    /// Taken ones that the directory no longer names.
    leaving: Vec<Area>,
    /// Earlier directories, for as long as somebody holds them.
    past: Vec<Weak<Directory>>,
}

impl Areas {
    /// The areas that `directory` names; its areas were checked.
    pub(super) fn named_by(directory: &Directory) -> Self {
        let taken = directory.areas().map(|area| (area.offset, area.len)).collect();
        Areas { taken, ..Areas::default() }
    }

    /// Takes the first free place of `len` bytes (whole pages); None where there is none.
    pub(super) fn take(&mut self, len: u64) -> Option<Area> {
        let mut offset = AREAS_START;
        for (taken, taken_len) in &self.taken {
            if taken.saturating_sub(offset) >= len {
                break;
            }
            offset = taken + taken_len;
        }
        let area = Area { offset, len };
        if area.fault().is_some() {
            return None;
        }
        self.taken.insert(offset, len);
        Some(area)
    }

    /// Whether `area` is in use: handed out or named by the directory.
    pub(super) fn in_use(&self, area: &Area) -> bool {
        self.taken.get(&area.offset) == Some(&area.len) && !self.leaving.contains(area)
    }

    /// Whether a directory may name `area`: it is in use, or an earlier directory that is still held names it, so that
    /// it has kept its content.
    pub(super) fn may_be_named(&self, area: &Area) -> bool {
        let held = |past: &Weak<Directory>| past.upgrade().is_some_and(|old| old.areas().any(|named| named == *area));
        self.in_use(area) || (self.leaving.contains(area) && self.past.iter().any(held))
    }

    /// These are named by the directory that counts: none of them leaves any more.
    pub(super) fn stay(&mut self, named: &BTreeSet<Area>) {
        self.leaving.retain(|area| !named.contains(area));
    }

    /// The free places below `end`.
    pub(super) fn gaps(&self, end: u64) -> Vec<Area> {
        let mut gaps = Vec::new();
        let mut offset = AREAS_START;
        for (taken, len) in self.taken.iter().map(|(at, len)| (*at, *len)).chain([(end, 0)]) {
            if taken > offset {
                gaps.push(Area { offset, len: taken - offset });
            }
            offset = offset.max(taken + len);
        }
        gaps
    }

    /// `old` no longer counts; the areas `unnamed` leave when the last holder of such a directory has let go.
    pub(super) fn leave(&mut self, old: &Arc<Directory>, unnamed: Vec<Area>) {
        self.past.push(Arc::downgrade(old));
        self.leaving.extend(unnamed);
    }

    /// `area` was handed out, is not named by the directory and is not needed after all.
    pub(super) fn abandon(&mut self, area: &Area) {
        if self.in_use(area) {
            self.leaving.push(*area);
        }
    }

    /// Frees the leaving areas that no earlier directory in somebody's hands names, and lists them. To be asked only
    /// while no failed directory may come back.
    pub(super) fn reclaim(&mut self) -> Vec<Area> {
        let mut held = Vec::new();
        self.past.retain(|past| past.upgrade().map(|directory| held.push(directory)).is_some());
        let named = |area: &Area| held.iter().any(|directory| directory.areas().any(|named| named == *area));
        let free: Vec<Area> = self.leaving.extract_if(.., |area| !named(area)).collect();
        for area in &free {
            self.taken.remove(&area.offset);
        }
        free
    }
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests {
    use super::*;

    #[test]
    fn the_first_place_that_fits_is_taken() {
        let mut areas = Areas::default();
        let a = areas.take(PAGE).unwrap();
        let b = areas.take(2 * PAGE).unwrap();
        let c = areas.take(PAGE).unwrap();
        assert_eq!([a.offset, b.offset, c.offset], [0, 1, 3].map(|page| AREAS_START + page * PAGE));
        areas.abandon(&b);
        assert_eq!(areas.reclaim(), [b]);
        assert_eq!(areas.gaps(c.end() + PAGE), [b, Area { offset: c.end(), len: PAGE }]);
        assert_eq!(areas.take(3 * PAGE).unwrap().offset, c.end());
        assert_eq!(areas.take(PAGE).unwrap().offset, b.offset);
        assert_eq!(areas.take(PAGE).unwrap().end(), c.offset);
        assert_eq!(areas.gaps(0), []);
    }

    #[test]
    fn what_does_not_fit_the_file_is_not_handed_out() {
        let mut areas = Areas::default();
        assert_eq!(areas.take(AREA_MAX_BYTES + PAGE), None);
        areas.taken.insert(AREAS_START, AREAS_END - AREAS_START);
        assert_eq!(areas.take(PAGE), None);
    }

    #[test]
    fn faulty_areas_are_told() {
        let good = Area { offset: AREAS_START, len: PAGE };
        assert_eq!(good.fault(), None);
        for bad in [
            Area { offset: AREAS_START + 1, ..good },
            Area { offset: AREAS_START - PAGE, ..good },
            Area { offset: u64::MAX - PAGE + 1, ..good },
            Area { len: 0, ..good },
            Area { len: 5, ..good },
            Area { len: u64::MAX - PAGE + 1, ..good },
            Area { offset: AREAS_END, ..good },
        ] {
            assert!(bad.fault().is_some(), "{bad:?}");
        }
    }
}
