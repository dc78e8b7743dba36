//! Logical volumes as bytes of disks.

use super::group::{Group, Logical, Run};
use crate::units::MAX_DISK_BYTES;
use crate::volume::{Place, Segment, Table, Volume};
use std::collections::BTreeMap;
use std::ops::Range;

/// Longest name in bytes: that of device-mapper.
const NAME_MAX: usize = 127;
/// Most volumes that a note names.
const NOTED_MAX: usize = 8;

/// Where a physical volume is.
#[derive(Debug, Clone)]
pub(super) struct PhysicalPlace {
    pub disk: usize,
    /// Bytes of the disk.
    pub range: Range<u64>,
}

/// Physical volumes that are there, by UUID; None where there are two of it.
pub(super) type Places<'a> = BTreeMap<&'a str, Option<PhysicalPlace>>;

/// The volumes of a group, and what to say of those that are left out.
pub(super) fn volumes(group: &Group, places: &Places) -> (Vec<Volume>, Option<String>) {
    if !is_name(&group.name) {
        let name: String = group.name.chars().take(40).collect();
        return (vec![], Some(format!("the volume group '{}' has a name that no group can have", name.escape_debug())));
    }
    if shares_extents(group) {
        return (
            vec![],
            Some(format!("volumes of the group '{}' share extents or lie outside of it: all are left out", group.name)),
        );
    }
    let (mut found, mut left_out) = (Vec::new(), Vec::new());
    for logical in group.logical.iter().filter(|logical| logical.is_visible) {
        match volume(group, logical, places) {
            Ok(volume) => found.push(volume),
            Err(why) => {
                let name: String = logical.name.chars().take(NAME_MAX).collect();
                left_out.push(format!("{}/{} ({why})", group.name, name.escape_debug()));
            }
        }
    }
    if left_out.is_empty() {
        return (found, None);
    }
    let mut note = format!("logical volumes left out: {}", left_out.join(", "));
    if left_out.len() > NOTED_MAX {
        let first = left_out.get(..NOTED_MAX).unwrap_or_default().join(", ");
        note = format!("logical volumes left out: {first} and {} more", left_out.len() - NOTED_MAX);
    }
    (found, Some(note))
}

fn volume(group: &Group, logical: &Logical, places: &Places) -> Result<Volume, String> {
    let runs = logical.runs.as_ref().map_err(String::clone)?;
    let name = format!("{}-{}", doubled(&group.name), doubled(&logical.name));
    if !is_name(&logical.name) || name.len() > NAME_MAX {
        return Err("its name".into());
    }
    let mut segments: Vec<Segment> = Vec::new();
    for run in runs {
        let next = segment(group, run, places)?;
        match segments.last_mut().filter(|last| follows(last, &next)) {
            Some(last) => {
                last.length = last.length.saturating_add(next.length);
                last.stripe = last.length;
            }
            None => segments.push(next),
        }
    }
    let table = Table::Lvm {
        group: group.name.clone(),
        name: logical.name.clone(),
        uuid: logical.uuid.clone(),
        striped: segments.iter().any(|segment| segment.places.len() > 1),
    };
    let size = segments.last().map_or(0, Segment::end);
    Ok(Volume { name, size, segments, table, content: None })
}

/// Whether a linear segment goes on where another one ends.
fn follows(last: &Segment, next: &Segment) -> bool {
    match (last.places.as_slice(), next.places.as_slice()) {
        ([last_place], [next_place]) => {
            last_place.disk == next_place.disk && last_place.offset.checked_add(last.length) == Some(next_place.offset)
        }
        _ => false,
    }
}

fn segment(group: &Group, run: &Run, places: &Places) -> Result<Segment, String> {
    let too_large = || "it is larger than a disk can be".to_owned();
    let bytes = |extents: u64| extents.checked_mul(group.extent_bytes).filter(|bytes| *bytes <= MAX_DISK_BYTES);
    let (start, length) = (bytes(run.start).ok_or_else(too_large)?, bytes(run.count).ok_or_else(too_large)?);
    if start.checked_add(length).is_none_or(|end| end > MAX_DISK_BYTES) {
        return Err(too_large());
    }
    let columns = run.areas.len() as u64;
    let stripe = if columns == 1 { length } else { run.stripe };
    if columns > 1 && (stripe == 0 || !group.extent_bytes.is_multiple_of(stripe)) {
        return Err("size of its stripes".into());
    }
    let area_bytes = length / columns.max(1);
    let mut found = Vec::with_capacity(run.areas.len());
    for (index, extent) in &run.areas {
        let physical = group.physical.get(*index).ok_or("damaged segment")?;
        let place = match places.get(physical.uuid.as_str()) {
            Some(Some(place)) => place,
            Some(None) => return Err(format!("its physical volume {} is there twice", physical.uuid)),
            None => return Err(format!("its physical volume {} is missing", physical.uuid)),
        };
        let within = bytes(*extent).and_then(|at| at.checked_add(physical.start)).ok_or_else(too_large)?;
        let offset = place.range.start.checked_add(within).ok_or_else(too_large)?;
        if offset.checked_add(area_bytes).is_none_or(|end| end > place.range.end) {
            return Err("it reaches past the end of a physical volume".into());
        }
        found.push(Place { disk: place.disk, offset });
    }
    Ok(Segment { start, length, stripe, places: found })
}

/// Whether two segments of linear or striped volumes, hidden ones too, have an extent in common.
fn shares_extents(group: &Group) -> bool {
    let mut areas: Vec<(usize, u64, u64)> = Vec::new();
    for run in group.logical.iter().filter_map(|logical| logical.runs.as_ref().ok()).flatten() {
        let extents = run.count / (run.areas.len() as u64).max(1);
        areas.extend(run.areas.iter().map(|(index, first)| (*index, *first, first.saturating_add(extents))));
    }
    areas.sort_unstable();
    let outside = |(index, _, end): &(usize, u64, u64)| group.physical.get(*index).is_none_or(|own| *end > own.count);
    areas.windows(2).any(|pair| matches!(pair, [a, b] if a.0 == b.0 && b.1 < a.2)) || areas.iter().any(outside)
}

/// Whether LVM takes it as a name. Among the names that it does not take are all that mean something in a path.
fn is_name(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"+_.-".contains(&byte);
    !name.is_empty() && !name.starts_with('-') && name != "." && name != ".." && name.bytes().all(plain)
}

/// A name as device-mapper has it, so that the hyphen between group and volume can be told.
fn doubled(name: &str) -> String {
    name.replace('-', "--")
}
