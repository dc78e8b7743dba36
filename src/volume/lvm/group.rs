//! A volume group as its metadata describes it, with what is left of a logical volume once it is understood.

use super::text::{Section, Value, parse};
use std::collections::{BTreeMap, BTreeSet};

/// Bytes of the sectors that the metadata counts in, whatever the disks have.
const SECTOR_BYTES: u64 = 512;

/// A volume group.
#[derive(Debug)]
pub(super) struct Group {
    pub name: String,
    pub uuid: String,
    /// Counts the changes of the metadata.
    pub sequence: u64,
    pub extent_bytes: u64,
    pub physical: Vec<Physical>,
    pub logical: Vec<Logical>,
}

/// A physical volume of a group.
#[derive(Debug)]
pub(super) struct Physical {
    pub uuid: String,
    /// Where its extents begin, in bytes from its start.
    pub start: u64,
    /// Extents.
    pub count: u64,
}

/// A logical volume.
#[derive(Debug)]
pub(super) struct Logical {
    pub name: String,
    pub uuid: String,
    /// Users see it; others are parts of those.
    pub is_visible: bool,
    /// Its segments where each is linear or striped, or why not.
    pub runs: Result<Vec<Run>, String>,
}

/// A segment, in extents.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Run {
    pub start: u64,
    pub count: u64,
    /// Bytes of a stripe, where there are several areas.
    pub stripe: u64,
    /// Index into the physical volumes, and the first extent there, of each area.
    pub areas: Vec<(usize, u64)>,
}

impl Group {
    /// Reads the text of a metadata area. The error says what is wrong.
    pub fn parse(text: &str) -> Result<Group, String> {
        let all = parse(text)?;
        let (name, group) = all
            .entries
            .iter()
            .find_map(|(name, value)| match value {
                Value::Section(section) => Some((*name, section)),
                _ => None,
            })
            .ok_or("no group in it")?;
        let need = |what: &str, found: Option<u64>| found.ok_or_else(|| format!("no {what}"));
        let extent_bytes = need("extent_size", group.number("extent_size"))?.checked_mul(SECTOR_BYTES);
        let mut numbers = BTreeMap::new();
        let mut physical = Vec::new();
        for (own, section) in group.sections_of("physical_volumes") {
            numbers.insert(own, physical.len());
            physical.push(Physical {
                uuid: section.text("id").ok_or("a physical volume without id")?.to_owned(),
                start: need("pe_start", section.number("pe_start"))?.saturating_mul(SECTOR_BYTES),
                count: need("pe_count", section.number("pe_count"))?,
            });
        }
        let stores = snapshot_stores(group);
        let mut logical = Vec::new();
        for (own, section) in group.sections_of("logical_volumes") {
            let runs = match stores.contains(own) {
                true => Err("snapshot".to_owned()),
                false => runs(section, &numbers),
            };
            logical.push(Logical {
                name: own.to_owned(),
                uuid: section.text("id").unwrap_or_default().to_owned(),
                is_visible: section.lists("status", "VISIBLE"),
                runs,
            });
        }
        Ok(Group {
            name: name.to_owned(),
            uuid: group.text("id").ok_or("no id")?.to_owned(),
            sequence: need("seqno", group.number("seqno"))?,
            extent_bytes: extent_bytes.filter(|bytes| *bytes > 0).ok_or("extent_size")?,
            physical,
            logical,
        })
    }
}

/// Names of the volumes that keep what snapshots differ in, and of those whose snapshot is being merged back: neither
/// reads as its own bytes do.
fn snapshot_stores<'a>(group: &'a Section) -> BTreeSet<&'a str> {
    let mut stores = BTreeSet::new();
    for (_, volume) in group.sections_of("logical_volumes") {
        for (_, segment) in segments(volume).filter(|(_, segment)| segment.text("type") == Some("snapshot")) {
            stores.extend(["cow_store", "merging_store"].into_iter().filter_map(|name| segment.text(name)));
            if segment.get("merging_store").is_some() {
                stores.extend(segment.text("origin"));
            }
        }
    }
    stores
}

fn segments<'a, 'b>(volume: &'b Section<'a>) -> impl Iterator<Item = (&'a str, &'b Section<'a>)> {
    volume.entries.iter().filter_map(|(name, value)| match value {
        Value::Section(section) if name.starts_with("segment") => Some((*name, section)),
        _ => None,
    })
}

/// The segments of a volume in their order, which must cover it; or why they can't be used.
fn runs(volume: &Section, physical: &BTreeMap<&str, usize>) -> Result<Vec<Run>, String> {
    let mut runs = Vec::new();
    for (_, segment) in segments(volume) {
        runs.push(run(segment, physical)?);
    }
    if volume.number("segment_count") != Some(runs.len() as u64) || runs.is_empty() {
        return Err("segments are missing".into());
    }
    runs.sort_by_key(|run| run.start);
    let mut end = 0;
    for run in &runs {
        if run.start != end {
            return Err("segments do not follow each other".into());
        }
        end = run.start.saturating_add(run.count);
    }
    Ok(runs)
}

fn run(segment: &Section, physical: &BTreeMap<&str, usize>) -> Result<Run, String> {
    match segment.text("type") {
        Some("striped" | "linear") => {}
        other => return Err(other.unwrap_or("no type").chars().take(40).collect()),
    }
    let bad = || "damaged segment".to_owned();
    let start = segment.number("start_extent").ok_or_else(bad)?;
    let count = segment.number("extent_count").filter(|count| *count > 0).ok_or_else(bad)?;
    let columns = segment.number("stripe_count").ok_or_else(bad)?;
    let mut areas = Vec::new();
    for pair in segment.list("stripes").chunks(2) {
        let [Value::Text(name), Value::Number(extent)] = pair else { return Err(bad()) };
        let Some(index) = physical.get(name.as_ref()) else { return Err("on another logical volume".into()) };
        areas.push((*index, *extent));
    }
    let stripe = match areas.len() {
        0 => return Err(bad()),
        1 => 0,
        _ => segment.number("stripe_size").unwrap_or(0).saturating_mul(SECTOR_BYTES),
    };
    if columns != areas.len() as u64 || !count.is_multiple_of(columns) {
        return Err(bad());
    }
    Ok(Run { start, count, stripe, areas })
}
