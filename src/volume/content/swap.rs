//! Swap areas (mm/swapfile.c of Linux, mkswap).

use super::Content;
use crate::volume::bytes::{le32, part, stands, text, uuid};

/// Sizes of pages, at the end of the first of which the signature stands.
pub(in crate::volume) const PAGE_BYTES: [usize; 5] = [4 << 10, 8 << 10, 16 << 10, 32 << 10, 64 << 10];
/// What a kernel writes over the signature when it keeps its memory there over a power-off.
const HIBERNATED: [&[u8]; 5] = [b"S1SUSPEND", b"S2SUSPEND", b"ULSUSPEND", b"LINHIB0001", b"TuxOnIce"];
/// Where the header is.
const HEADER_AT: usize = 1024;

/// A swap area by its header.
pub(in crate::volume) struct Swap {
    /// Bytes of a page. The header takes the first page.
    pub page_bytes: usize,
    /// The number of the last page.
    pub last_page: u32,
    /// It holds an image of a hibernated system.
    pub is_hibernated: bool,
}

impl Swap {
    /// Reads the header from the first 64 KiB.
    pub fn read(head: &[u8]) -> Option<Swap> {
        PAGE_BYTES.into_iter().find_map(|page_bytes| {
            let signature = page_bytes - 10;
            let is_hibernated = HIBERNATED.iter().any(|magic| stands(head, signature, magic));
            if !is_hibernated && !stands(head, signature, b"SWAPSPACE2") {
                return None;
            }
            let (version, last_page) = (le32(head, HEADER_AT), le32(head, HEADER_AT + 4));
            let padding = part(head, HEADER_AT + 44, 117 * 4);
            // What else begins at this byte, a superblock of ext4 for one, has something there.
            let is_sound = version == 1 && last_page != 0 && padding.iter().all(|byte| *byte == 0);
            is_sound.then_some(Swap { page_bytes, last_page, is_hibernated })
        })
    }
}

pub(super) fn probe(head: &[u8]) -> Option<Content> {
    let swap = Swap::read(head)?;
    let kind = if swap.is_hibernated { "swsuspend" } else { "swap" };
    Some(Content::new(kind, text(part(head, HEADER_AT + 28, 16)), uuid(head, HEADER_AT + 12)))
}
