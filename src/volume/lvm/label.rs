//! Labels of physical volumes, and the areas with metadata that they point at.

use crate::error::Result;
use crate::volume::Disk;
use crate::volume::bytes::{self, le32, le64, part, read_some, stands};
use crate::volume::checksum::lvm as checksum;
use std::ops::Range;

const SECTOR_BYTES: usize = 512;
/// Sectors at the start in one of which the label is.
const LABEL_SECTORS: usize = 4;
/// Bytes of a UUID as it is stored.
const UUID_BYTES: usize = 32;
/// Most areas of each kind that are looked at; LVM makes one or two.
const AREAS_MAX: usize = 4;
/// Bytes of the header of a metadata area, behind which the text goes round.
const AREA_HEADER_BYTES: u64 = 512;
/// Longest text.
const TEXT_MAX: u64 = 8 << 20;
const AREA_MAGIC: &[u8] = b" LVM2 x[5A%r0N*>";
/// The text of this place is not to be used.
const IGNORED: u32 = 1;

/// A physical volume as it describes itself.
#[derive(Debug)]
pub(super) struct Label {
    /// In LVM's form, with hyphens.
    pub uuid: String,
    /// The text in each of its metadata areas.
    pub texts: Vec<Vec<u8>>,
    /// Bytes from the start of the physical volume of all that was read.
    pub sources: Vec<Range<u64>>,
    /// What is wrong with it.
    pub notes: Vec<String>,
}

/// The label's sector in the first sectors of a volume, and which one it is.
fn label_sector(head: &[u8]) -> Option<(usize, &[u8])> {
    (0..LABEL_SECTORS).find_map(|number| {
        let sector = part(head, number * SECTOR_BYTES, SECTOR_BYTES);
        let is_label = sector.len() == SECTOR_BYTES
            && stands(sector, 0, b"LABELONE")
            && stands(sector, 24, b"LVM2 001")
            && le64(sector, 8) == number as u64
            && le32(sector, 16) == checksum(&[part(sector, 20, SECTOR_BYTES)]);
        is_label.then_some((number, sector))
    })
}

/// The UUID in the label of a physical volume that begins with these bytes.
pub(in crate::volume) fn label_uuid(head: &[u8]) -> Option<String> {
    let (_, sector) = label_sector(head)?;
    uuid(part(sector, le32(sector, 20) as usize, UUID_BYTES))
}

/// 32 letters and digits with hyphens between, as LVM prints them.
fn uuid(bytes: &[u8]) -> Option<String> {
    let text = std::str::from_utf8(bytes).ok()?;
    if text.len() != UUID_BYTES
        || !text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'!' || byte == b'#')
    {
        return None;
    }
    let pieces = [0..6, 6..10, 10..14, 14..18, 18..22, 22..26, 26..32].map(|range| text.get(range).unwrap_or_default());
    Some(pieces.join("-"))
}

/// Reads the label and the metadata of a physical volume; None where there is no label. `budget` is how many bytes of
/// metadata may still be read.
pub(super) fn read(volume: &dyn Disk, budget: &mut u64) -> Result<Option<Label>> {
    let head = read_some(volume, 0, LABEL_SECTORS * SECTOR_BYTES)?;
    let Some((number, sector)) = label_sector(&head) else { return Ok(None) };
    let start = (number * SECTOR_BYTES) as u64;
    let header = le32(sector, 20) as usize;
    let Some(uuid) = uuid(part(sector, header, UUID_BYTES)) else { return Ok(None) };
    let own_sector = start..start + SECTOR_BYTES as u64;
    let mut label = Label { uuid, texts: Vec::new(), sources: vec![own_sector], notes: Vec::new() };
    // Two lists of areas behind the UUID and the size, for data and for metadata, each of which ends with zeros.
    let mut at = header.saturating_add(UUID_BYTES + 8);
    for is_metadata in [false, true] {
        for _ in 0..AREAS_MAX {
            let (offset, bytes) = (le64(sector, at), le64(sector, at.saturating_add(8)));
            at = at.saturating_add(16);
            if offset == 0 {
                break;
            }
            if is_metadata {
                area(volume, offset, bytes, budget, &mut label)?;
            }
        }
    }
    Ok(Some(label))
}

/// Reads the text of one metadata area.
fn area(volume: &dyn Disk, start: u64, bytes: u64, budget: &mut u64, label: &mut Label) -> Result<()> {
    let is_inside = start.checked_add(bytes).is_some_and(|end| end <= volume.size()) && bytes > AREA_HEADER_BYTES;
    let fault = match is_inside {
        true => text_of(volume, start, bytes, budget, label)?.err(),
        false => Some("past the end of the physical volume"),
    };
    label.notes.extend(fault.map(|why| format!("the LVM metadata area at byte {start} is damaged ({why})")));
    Ok(())
}

/// Reads the text of an area that is inside of its volume; the error says what is damaged.
fn text_of(
    volume: &dyn Disk,
    start: u64,
    bytes: u64,
    budget: &mut u64,
    label: &mut Label,
) -> Result<std::result::Result<(), &'static str>> {
    let header = bytes::read(volume, start, AREA_HEADER_BYTES as usize)?.unwrap_or_default();
    label.sources.push(start..start + AREA_HEADER_BYTES);
    if !stands(&header, 4, AREA_MAGIC) || le32(&header, 20) != 1 || le64(&header, 24) != start {
        return Ok(Err("header"));
    }
    if checksum(&[part(&header, 4, SECTOR_BYTES)]) != le32(&header, 0) {
        return Ok(Err("checksum of its header"));
    }
    let area_bytes = le64(&header, 32).min(bytes);
    // The first place is that of the committed text; the second one's is being written.
    let (offset, text_bytes) = (le64(&header, 40), le64(&header, 48));
    let (wanted, flags) = (le32(&header, 56), le32(&header, 60));
    if offset == 0 || flags & IGNORED != 0 {
        return Ok(Ok(()));
    }
    let most = area_bytes.saturating_sub(AREA_HEADER_BYTES).min(TEXT_MAX);
    if !(AREA_HEADER_BYTES..area_bytes).contains(&offset) || text_bytes > most {
        return Ok(Err("place of its text"));
    }
    *budget = match budget.checked_sub(text_bytes) {
        Some(left) => left,
        None => return Ok(Err("too much metadata in all")),
    };
    // The text goes on at the start where it reaches the end.
    let first = text_bytes.min(area_bytes - offset);
    let mut text = Vec::new();
    for (from, len) in [(start + offset, first), (start + AREA_HEADER_BYTES, text_bytes - first)] {
        if len > 0 {
            text.extend(bytes::read(volume, from, len as usize)?.unwrap_or_default());
            label.sources.push(from..from + len);
        }
    }
    if checksum(&[&text]) != wanted {
        return Ok(Err("checksum of its text"));
    }
    label.texts.push(text);
    Ok(Ok(()))
}
