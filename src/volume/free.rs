//! Which bytes of a volume hold nothing that anybody needs: a backup may leave them out.
//!
//! **A byte is unused only if no reader of the restored volume can ever need it.** Whatever is not understood, or fails a
//! checksum, is in use: too little costs space in a backup, too much costs a user's data.

mod ext4;
mod journal;
mod superblock;

use super::bytes::read_some;
use super::content::swap::{self, Swap};
use super::{Content, Disk};
use crate::error::Result;
use std::ops::Range;

/// Byte ranges of a volume whose content nobody needs, sorted, without touching each other.
///
/// Of a swap area all but the page with its header, unless a system hibernated into it. Of ext4 (ext3 and ext2 where that
/// is clean) runs of free blocks of at least 64 KiB, as they are after a replay of the journal, whether or not it is
/// mounted. Fails where the volume can't be read.
pub fn unused(volume: &dyn Disk, content: &Content) -> Result<Vec<Range<u64>>> {
    match content.kind.as_str() {
        "swap" => swap_pages(volume),
        "ext2" | "ext3" | "ext4" => Ok(ext4::free_blocks(volume)?.unwrap_or_default()),
        _ => Ok(vec![]),
    }
}

/// All pages of a swap area behind its header. A system that comes up again begins with an empty one.
fn swap_pages(volume: &dyn Disk) -> Result<Vec<Range<u64>>> {
    let [.., longest] = swap::PAGE_BYTES;
    let head = read_some(volume, 0, longest)?;
    let Some(swap) = Swap::read(&head).filter(|swap| !swap.is_hibernated) else { return Ok(vec![]) };
    let page = swap.page_bytes as u64;
    let end = (u64::from(swap.last_page) + 1).saturating_mul(page).min(volume.size());
    Ok(std::iter::once(page..end).filter(|range| !range.is_empty()).collect())
}
