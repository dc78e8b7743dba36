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
            MapFormat::Bmap => bmap_head(meta, size, totals),
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

    /// Puts the entry of one run into `line`. Maps have millions of them: those that programs read are put together
    /// without the machinery of [`write!`], which takes several times as long.
    pub(super) fn entry(self, run: &Run, size: u64, first: bool, line: &mut impl Sink) {
        let (start, length) = (run.start, run.length());
        line.clear();
        match self {
            MapFormat::Json => {
                if !first {
                    line.put(b",\n ");
                }
                line.put(b"{\"start\": ").number(start).put(b", \"length\": ").number(length);
                match (run.dirty, run.zero) {
                    (false, false) => line.put(b", \"dirty\": false, \"zero\": false}"),
                    (false, true) => line.put(b", \"dirty\": false, \"zero\": true}"),
                    (true, false) => line.put(b", \"dirty\": true, \"zero\": false}"),
                    (true, true) => line.put(b", \"dirty\": true, \"zero\": true}"),
                };
            }
            MapFormat::Borg => {
                line.number(start).put(b" ").number(length).put(match (run.dirty, run.zero) {
                    (false, _) => b" same\n",
                    (true, true) => b" zero\n",
                    (true, false) => b" data\n",
                });
            }
            MapFormat::Rbd => {
                // All in one line, as `rbd` prints it: Benji has read no more than that.
                if !first {
                    line.put(b",");
                }
                line.put(b"{\"offset\":").number(start).put(b",\"length\":").number(length);
                if run.zero {
                    line.put(b",\"exists\":\"false\"}")
                } else {
                    line.put(b",\"exists\":\"true\"}")
                };
            }
            MapFormat::Bmap => {
                let (from, to) = (start / BMAP_BLOCK, run.end / BMAP_BLOCK - 1);
                line.put(b"        <Range> ").number(from);
                if from != to {
                    line.put(b"-").number(to);
                }
                line.put(b" </Range>\n");
            }
            MapFormat::Ddrescue => {
                let status = if run.dirty { b"  +\n" } else { b"  ?\n" };
                line.put(b"0x").hex(start).put(b"  0x").hex(length).put(status);
            }
            MapFormat::Nbd => {
                line.separate(first).put(b"{ \"offset\": ").number(start).put(b", \"length\": ").number(length);
                line.put(match run.dirty {
                    true => b", \"type\": 1, \"description\": \"dirty\"}",
                    false => b", \"type\": 0, \"description\": \"clean\"}",
                });
            }
            MapFormat::Csi => {
                line.separate(first).put(b"{\"byte_offset\":").number(start);
                line.put(b",\"size_bytes\":").number(length).put(b"}");
            }
            MapFormat::Text => {
                let (w, size) = (text_width(size), human_size(length));
                // Writing to a line cannot fail.
                let _ = writeln!(line, "  {start:>w$}  {length:>w$}  {size:>10}  {}", text_state(run));
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

/// [`identity`] as lines of an XML comment, which may hold neither `--` nor two characters of Unicode.
fn xml_identity(meta: &MapMeta, size: u64) -> String {
    let mut text = String::new();
    for line in identity(meta, size).lines() {
        text += &format!("     {}\n", line.strip_prefix("# ").unwrap_or(line));
    }
    while text.contains("--") {
        text = text.replace("--", "- -");
    }
    text.replace(['\u{fffe}', '\u{ffff}'], "?")
}

/// bmap 2.0. The checksum is that of the whole file with zeros in its own place ([`bmap_checksum_place`]). Range
/// checksums are optional and left out: they would need every changed byte.
fn bmap_head(meta: &MapMeta, size: u64, totals: &Totals) -> String {
    format!(
        "<?xml version=\"1.0\" ?>\n\
         <!-- The blocks that changed, zeroed ones included.\n{}-->\n\
         <bmap version=\"2.0\">\n\
         \x20   <ImageSize> {size} </ImageSize>\n\
         \x20   <BlockSize> {BMAP_BLOCK} </BlockSize>\n\
         \x20   <BlocksCount> {} </BlocksCount>\n\
         \x20   <MappedBlocksCount> {} </MappedBlocksCount>\n\
         \x20   <ChecksumType> sha256 </ChecksumType>\n\
         {BMAP_CHECKSUM_TAG}{} </BmapFileChecksum>\n\
         \x20   <BlockMap>\n",
        xml_identity(meta, size),
        size.div_ceil(BMAP_BLOCK),
        totals.dirty / BMAP_BLOCK,
        "0".repeat(SHA256_DIGITS),
    )
}

const BMAP_CHECKSUM_TAG: &str = "    <BmapFileChecksum> ";

/// Where in the head the checksum stands.
pub(super) fn bmap_checksum_place(head: &str) -> Option<std::ops::Range<usize>> {
    // The last one: names in the comment may hold anything.
    let start = head.rfind(BMAP_CHECKSUM_TAG)? + BMAP_CHECKSUM_TAG.len();
    Some(start..start + SHA256_DIGITS)
}

/// Room for the longest entry: of [`MapFormat::Nbd`], with two numbers of 20 digits.
const LINE_BYTES: usize = 128;

/// Takes an entry piece by piece: its text, or only the length of it.
pub(super) trait Sink: Write + Default {
    fn clear(&mut self);

    fn put<const N: usize>(&mut self, text: &[u8; N]) -> &mut Self;

    /// The lowest `digits` digits of a number.
    fn digits<const BASE: u64>(&mut self, number: u64, digits: usize) -> &mut Self;

    #[inline(always)]
    fn number(&mut self, number: u64) -> &mut Self {
        self.digits::<10>(number, number.checked_ilog10().unwrap_or(0) as usize + 1)
    }

    /// In at least eight digits.
    #[inline(always)]
    fn hex(&mut self, number: u64) -> &mut Self {
        self.digits::<16>(number, (16 - number.leading_zeros() as usize / 4).max(8))
    }

    #[inline(always)]
    fn separate(&mut self, first: bool) -> &mut Self {
        if first { self } else { self.put(b",\n") }
    }
}

/// The text of one entry.
pub(super) struct Line {
    bytes: [u8; LINE_BYTES],
    len: usize,
}

impl Default for Line {
    fn default() -> Line {
        Line { bytes: [0; LINE_BYTES], len: 0 }
    }
}

impl Line {
    /// The text so far.
    pub fn text(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or_default()
    }
}

impl Sink for Line {
    fn clear(&mut self) {
        self.len = 0;
    }

    /// Copies of a length that the compiler knows take an instruction or two.
    #[inline(always)]
    fn put<const N: usize>(&mut self, text: &[u8; N]) -> &mut Self {
        let room = self.bytes.get_mut(self.len..).and_then(|rest| rest.first_chunk_mut());
        debug_assert!(room.is_some(), "the longest entry is longer");
        if let Some(room) = room {
            *room = *text;
            self.len += N;
        }
        self
    }

    #[inline(always)]
    fn digits<const BASE: u64>(&mut self, number: u64, digits: usize) -> &mut Self {
        let room = self.bytes.get_mut(self.len..self.len + digits);
        debug_assert!(room.is_some(), "the longest entry is longer");
        let digit = |digit: u64| digit as u8 + if digit < 10 { b'0' } else { b'A' - 10 };
        let mut left = number;
        // Two at a time: a division is what takes long.
        for pair in room.unwrap_or_default().rchunks_mut(2) {
            let both = left % (BASE * BASE);
            left /= BASE * BASE;
            if let [high, low] = pair {
                (*high, *low) = (digit(both / BASE), digit(both % BASE));
            } else if let [only] = pair {
                *only = digit(both % BASE);
            }
        }
        self.len = (self.len + digits).min(LINE_BYTES);
        self
    }
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        let room = self.bytes.get_mut(self.len..self.len + text.len()).ok_or(std::fmt::Error)?;
        room.copy_from_slice(text.as_bytes());
        self.len += text.len();
        Ok(())
    }
}

/// The length of one entry in bytes.
#[derive(Default)]
pub(super) struct Length(pub usize);

impl Sink for Length {
    fn clear(&mut self) {
        self.0 = 0;
    }

    #[inline(always)]
    fn put<const N: usize>(&mut self, _text: &[u8; N]) -> &mut Self {
        self.0 += N;
        self
    }

    #[inline(always)]
    fn digits<const BASE: u64>(&mut self, _number: u64, digits: usize) -> &mut Self {
        self.0 += digits;
        self
    }
}

impl Write for Length {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        self.0 += text.len();
        Ok(())
    }
}
