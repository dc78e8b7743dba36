//! LVM2: physical volumes by their labels, groups by their metadata, logical volumes by the groups.
//!
//! Only linear and striped volumes are found, whose bytes lie as they are on the disks. What goes through another
//! target of device-mapper (thin pools, mirrors, raid, caches, stores of snapshots) is left out and named.
//!
//! Disks that are copies of each other (cloned machines in one mount) have the same UUIDs. So where a physical volume is
//! there more than once, each disk is taken alone: nothing is ever put together from two copies.

mod group;
mod label;
mod map;
mod text;

use super::bytes::Part;
use super::{Disk, Volume};
use group::Group;
use label::Label;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

pub(super) use label::label_uuid;

/// Most bytes of metadata of all disks; that of a group with many volumes is about 100 KiB.
const METADATA_MAX: u64 = 128 << 20;

/// What was found.
#[derive(Debug, Default)]
pub(super) struct Logical {
    /// By group and name. What they hold is not looked at.
    pub volumes: Vec<Volume>,
    /// Labels and metadata that were read.
    pub sources: Vec<(usize, Range<u64>)>,
    /// Disk and what is wrong there.
    pub notes: Vec<(usize, String)>,
}

/// A physical volume.
struct Member {
    disk: usize,
    /// Bytes of the disk.
    range: Range<u64>,
    uuid: String,
    /// The newest metadata in its areas.
    group: Option<Group>,
}

/// Looks for physical volumes in these ranges of disks, and for the logical volumes on them.
pub(super) fn find(disks: &[&dyn Disk], places: &[(usize, Range<u64>)]) -> Logical {
    let mut found = Logical::default();
    let mut members = Vec::new();
    let mut budget = METADATA_MAX;
    for (disk, range) in places {
        let Some(whole) = disks.get(*disk) else { continue };
        let part = Part::new(*whole, range.clone());
        match label::read(&part, &mut budget) {
            Ok(Some(label)) => members.push(member(*disk, range.clone(), label, &mut found)),
            Ok(None) => {}
            Err(e) => found.notes.push((*disk, e.to_string())),
        }
    }
    let groups: BTreeSet<&str> =
        members.iter().filter_map(|member| Some(member.group.as_ref()?.uuid.as_str())).collect();
    for uuid in groups {
        find_group(uuid, &members, &mut found);
    }
    found.volumes.sort_by(|a, b| (a.home(), &a.name).cmp(&(b.home(), &b.name)));
    let mut left_out = Vec::new();
    found.volumes.dedup_by(|volume, kept| {
        let same = volume.home() == kept.home() && volume.name == kept.name;
        if same {
            left_out.push((kept.home(), format!("a second logical volume '{}' is left out", kept.name)));
        }
        same
    });
    found.notes.extend(left_out);
    found
}

/// Reads what a physical volume knows of its group.
fn member(disk: usize, range: Range<u64>, label: Label, found: &mut Logical) -> Member {
    let on_disk = |range_in: &Range<u64>| {
        let [start, end] = [range_in.start, range_in.end].map(|at| range.start.saturating_add(at));
        (disk, start..end)
    };
    found.sources.extend(label.sources.iter().map(on_disk));
    found.notes.extend(label.notes.into_iter().map(|note| (disk, note)));
    let mut newest: Option<Group> = None;
    for text in &label.texts {
        match Group::parse(&String::from_utf8_lossy(text)) {
            Ok(group) if newest.as_ref().is_none_or(|newest| group.sequence > newest.sequence) => newest = Some(group),
            Ok(_) => {}
            Err(why) => found.notes.push((disk, format!("LVM metadata is damaged ({why})"))),
        }
    }
    Member { disk, range, uuid: label.uuid, group: newest }
}

/// Puts one group together: from all disks, or, where there are copies, from each disk alone.
fn find_group(uuid: &str, members: &[Member], found: &mut Logical) {
    let knows = |member: &&Member| member.group.as_ref().is_some_and(|group| group.uuid == uuid);
    let mut wanted: BTreeSet<&str> = BTreeSet::new();
    for group in members.iter().filter(knows).filter_map(|member| member.group.as_ref()) {
        wanted.extend(group.physical.iter().map(|physical| physical.uuid.as_str()));
    }
    let mut homes: BTreeMap<&str, BTreeSet<usize>> = BTreeMap::new();
    for member in members.iter().filter(|member| wanted.contains(member.uuid.as_str())) {
        homes.entry(&member.uuid).or_default().insert(member.disk);
    }
    if homes.values().all(|disks| disks.len() == 1) {
        return map_group(members.iter().filter(knows), members.iter().collect(), found);
    }
    let disks: BTreeSet<usize> = members.iter().filter(knows).map(|member| member.disk).collect();
    for disk in disks {
        let own = |member: &&Member| member.disk == disk;
        map_group(members.iter().filter(knows).filter(own), members.iter().filter(own).collect(), found);
    }
}

/// Maps the newest metadata of `knowing` on the physical volumes `there`.
fn map_group<'a>(knowing: impl Iterator<Item = &'a Member>, there: Vec<&'a Member>, found: &mut Logical) {
    let newest = knowing.filter_map(|member| Some((member.disk, member.group.as_ref()?)));
    // The first one of those with the same number.
    let newest = newest.reduce(|best, other| if other.1.sequence > best.1.sequence { other } else { best });
    let Some((disk, group)) = newest else { return };
    let mut places: BTreeMap<&str, Option<map::PhysicalPlace>> = BTreeMap::new();
    for member in there {
        let place = map::PhysicalPlace { disk: member.disk, range: member.range.clone() };
        // Two of one UUID: nobody knows which is meant.
        places.entry(&member.uuid).and_modify(|place| *place = None).or_insert(Some(place));
    }
    let (volumes, note) = map::volumes(group, &places);
    found.volumes.extend(volumes);
    found.notes.extend(note.map(|note| (disk, note)));
}
