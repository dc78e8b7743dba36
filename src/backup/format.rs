//! The formats: what each can say, and its text as head, entries and tail.
//!
//! Entries carry their separator in front, so that an entry's text depends on nothing but its run and on whether it is
//! the first. That is what lets [`super::MapFile`] begin in the middle.

use super::runs::Run;
use super::{MapMeta, Totals};
use crate::error::{Error, Result, errno};
use crate::units::human_size;
use std::fmt::Write;

/// Block of a bmap in bytes.
const BMAP_BLOCK: u64 = 4096;
/// Hexadecimal digits of a SHA-256.
const SHA256_DIGITS: usize = 64;

/// Formats of a map, each as its consumer reads it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum MapFormat {
    /// oVirt imageio's `extents?context=dirty`.
    Json,
    /// `START LENGTH data|zero|same` lines for `borg create --map`.
    Borg,
    /// `rbd diff --format json`, and Benji's hints.
    Rbd,
    /// bmap 2.0 XML for bmaptool.
    Bmap,
    /// GNU ddrescue's mapfile, for `--domain-mapfile`.
    Ddrescue,
    /// `nbdinfo --map --json` of a `qemu:dirty-bitmap:` context.
    Nbd,
    /// Kubernetes CSI SnapshotMetadata.
    Csi,
    /// A table for people.
    Text,
}

impl MapFormat {
    /// All of them, in the order of the manual.
    pub const ALL: [MapFormat; 8] = [
        MapFormat::Json,
        MapFormat::Borg,
        MapFormat::Rbd,
        MapFormat::Bmap,
        MapFormat::Ddrescue,
        MapFormat::Nbd,
        MapFormat::Csi,
        MapFormat::Text,
    ];

    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            MapFormat::Json => "json",
            MapFormat::Borg => "borg",
            MapFormat::Rbd => "rbd",
            MapFormat::Bmap => "bmap",
            MapFormat::Ddrescue => "ddrescue",
            MapFormat::Nbd => "nbd",
            MapFormat::Csi => "csi",
            MapFormat::Text => "text",
        }
    }

    /// The file below `since/CHECKPOINT/`, for the formats that have one.
    pub fn file_name(self) -> Option<&'static str> {
        match self {
            MapFormat::Json => Some("map.json"),
            MapFormat::Borg => Some("map.borg"),
            MapFormat::Rbd => Some("map.rbd.json"),
            MapFormat::Bmap => Some("map.bmap"),
            MapFormat::Ddrescue => Some("map.ddrescue"),
            MapFormat::Nbd => Some("map.nbd.json"),
            MapFormat::Csi | MapFormat::Text => None,
        }
    }

    /// What did not change is left out.
    pub(super) fn lists_changes_only(self) -> bool {
        matches!(self, MapFormat::Rbd | MapFormat::Bmap | MapFormat::Csi)
    }

    /// Tells changed data from changed zeros. Where it can't, zeros are listed as changed.
    pub(super) fn says_zero(self) -> bool {
        matches!(self, MapFormat::Json | MapFormat::Borg | MapFormat::Rbd | MapFormat::Text)
    }

    /// Tells zeros from data where nothing changed, too.
    pub(super) fn says_zero_of_unchanged(self) -> bool {
        matches!(self, MapFormat::Json | MapFormat::Text)
    }

    /// Bytes that it counts in (a power of two). Runs are widened to it.
    pub(super) fn unit(self) -> u64 {
        if self == MapFormat::Bmap { BMAP_BLOCK } else { 1 }
    }

    /// The head holds sums, and a checksum over everything (see [`bmap_head`]).
    pub(super) fn head_has_sums(self) -> bool {
        self == MapFormat::Bmap
    }

    /// What stands before the first entry. `totals` matters where [`MapFormat::head_has_sums`] says so, and is then
    /// that of the runs as listed.
    pub(super) fn head(self, meta: &MapMeta, size: u64, totals: &Totals) -> String {
        match self {
            MapFormat::Json | MapFormat::Rbd => "[".into(),
            MapFormat::Nbd => "[\n".into(),
            MapFormat::Csi => format!(
                "{{\"block_metadata_type\":\"VARIABLE_LENGTH\",\"volume_capacity_bytes\":{size},\"block_metadata\":["
            ),
            MapFormat::Borg => format!("# fleecefs dirty map 1\n{}", identity(meta, size)),
            MapFormat::Bmap => bmap_head(size, totals),
            MapFormat::Ddrescue => format!(
                "# Mapfile. '+' changed, '?' did not.\n{}\
                 # current_pos  current_status  current_pass\n0x00000000     +               1\n\
                 #      pos        size  status\n",
                identity(meta, size)
            ),
            MapFormat::Text => {
                let w = text_width(size);
                format!("{}# {:>w$}  {:>w$}  {:>10}  STATE\n", identity(meta, size), "START", "LENGTH", "SIZE")
            }
        }
    }

    /// Appends the entry of one run.
    pub(super) fn entry(self, run: &Run, size: u64, first: bool, out: &mut String) {
        let (start, length) = (run.start, run.length());
        let separator = |with: &'static str| if first { "" } else { with };
        // Writing to a String cannot fail.
        let _ = match self {
            MapFormat::Json => write!(
                out,
                "{}{{\"start\": {start}, \"length\": {length}, \"dirty\": {}, \"zero\": {}}}",
                separator(",\n "),
                run.dirty,
                run.zero
            ),
            MapFormat::Borg => writeln!(out, "{start} {length} {}", borg_state(run)),
            MapFormat::Rbd => write!(
                out,
                "{}{{\"offset\":{start},\"length\":{length},\"exists\":\"{}\"}}",
                separator(",\n"),
                !run.zero
            ),
            MapFormat::Bmap => bmap_range(start / BMAP_BLOCK, run.end / BMAP_BLOCK - 1, out),
            MapFormat::Ddrescue => {
                writeln!(out, "0x{start:08X}  0x{length:08X}  {}", if run.dirty { '+' } else { '?' })
            }
            MapFormat::Nbd => write!(
                out,
                "{}{{ \"offset\": {start}, \"length\": {length}, \"type\": {}, \"description\": \"{}\"}}",
                separator(",\n"),
                u8::from(run.dirty),
                if run.dirty { "dirty" } else { "clean" }
            ),
            MapFormat::Csi => {
                write!(out, "{}{{\"byte_offset\":{start},\"size_bytes\":{length}}}", separator(",\n"))
            }
            MapFormat::Text => {
                let w = text_width(size);
                writeln!(out, "  {start:>w$}  {length:>w$}  {:>10}  {}", human_size(length), text_state(run))
            }
        };
    }

    /// What stands behind the last entry.
    pub(super) fn tail(self, totals: &Totals) -> String {
        match self {
            MapFormat::Json | MapFormat::Rbd => "]\n".into(),
            MapFormat::Nbd => "\n]\n".into(),
            MapFormat::Csi => "]}\n".into(),
            MapFormat::Borg | MapFormat::Ddrescue => String::new(),
            MapFormat::Bmap => "    </BlockMap>\n</bmap>\n".into(),
            MapFormat::Text => format!(
                "# {} of {} changed, {} of it zeros; {} extents\n",
                human_size(totals.dirty),
                human_size(totals.size),
                human_size(totals.zero),
                totals.extents
            ),
        }
    }
}

impl std::fmt::Display for MapFormat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for MapFormat {
    type Err = Error;

    fn from_str(text: &str) -> Result<MapFormat> {
        MapFormat::ALL.into_iter().find(|f| f.name() == text).ok_or_else(|| {
            let names: Vec<_> = MapFormat::ALL.iter().map(|f| f.name()).collect();
            Error::new(errno::EINVAL, format!("map format '{}'", text.escape_debug()), "not known")
                .hint(format!("one of {}", names.join(", ")))
        })
    }
}

/// Comment lines that tell disk, base and target. Each value ends its line, the UUID stands before the name: names may
/// hold blanks, and the text after a `#` ends where the line does.
fn identity(meta: &MapMeta, size: u64) -> String {
    let base = match &meta.base {
        Some(base) => format!("{} {}", base.uuid, one_line(&base.name)),
        None => "none".into(),
    };
    let mut text = format!(
        "# disk {} {}\n# image {}\n# size {size}\n# snapshot {}\n# base {base}\n# target {} {}\n",
        meta.disk_uuid,
        one_line(&meta.disk),
        one_line(&meta.image.to_string_lossy()),
        one_line(&meta.snapshot),
        meta.target.uuid,
        one_line(&meta.target.name),
    );
    if let Some(reason) = &meta.full_reason {
        text += &format!("# everything {}\n", one_line(reason));
    }
    text
}

/// A path may hold a line end; a comment may not.
fn one_line(text: &str) -> String {
    text.chars().flat_map(|c| if c.is_control() { c.escape_default().collect() } else { vec![c] }).collect()
}

fn borg_state(run: &Run) -> &'static str {
    match (run.dirty, run.zero) {
        (false, _) => "same",
        (true, true) => "zero",
        (true, false) => "data",
    }
}

fn text_state(run: &Run) -> &'static str {
    match (run.dirty, run.zero) {
        (true, true) => "changed, zeros",
        (true, false) => "changed",
        (false, true) => "same, zeros",
        (false, false) => "same",
    }
}

/// Digits of the largest offset, and of the heading over it.
fn text_width(size: u64) -> usize {
    (size.checked_ilog10().unwrap_or(0) as usize + 1).max("LENGTH".len())
}

/// bmap 2.0. The checksum is that of the whole file with zeros in its own place ([`bmap_checksum_place`]). Range
/// checksums are optional and left out: they would need every changed byte.
fn bmap_head(size: u64, totals: &Totals) -> String {
    format!(
        "<?xml version=\"1.0\" ?>\n\
         <!-- The blocks that changed, zeroed ones included. -->\n\
         <bmap version=\"2.0\">\n\
         \x20   <ImageSize> {size} </ImageSize>\n\
         \x20   <BlockSize> {BMAP_BLOCK} </BlockSize>\n\
         \x20   <BlocksCount> {} </BlocksCount>\n\
         \x20   <MappedBlocksCount> {} </MappedBlocksCount>\n\
         \x20   <ChecksumType> sha256 </ChecksumType>\n\
         {BMAP_CHECKSUM_TAG}{} </BmapFileChecksum>\n\
         \x20   <BlockMap>\n",
        size.div_ceil(BMAP_BLOCK),
        totals.dirty / BMAP_BLOCK,
        "0".repeat(SHA256_DIGITS),
    )
}

const BMAP_CHECKSUM_TAG: &str = "    <BmapFileChecksum> ";

/// Where in the head the checksum stands.
pub(super) fn bmap_checksum_place(head: &str) -> Option<std::ops::Range<usize>> {
    let start = head.find(BMAP_CHECKSUM_TAG)? + BMAP_CHECKSUM_TAG.len();
    Some(start..start + SHA256_DIGITS)
}

fn bmap_range(first: u64, last: u64, out: &mut String) -> std::fmt::Result {
    if first == last {
        writeln!(out, "        <Range> {first} </Range>")
    } else {
        writeln!(out, "        <Range> {first}-{last} </Range>")
    }
}
