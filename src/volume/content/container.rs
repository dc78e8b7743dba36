//! What holds other volumes: LUKS, and physical volumes of LVM2.

use super::Content;
use crate::volume::bytes::{be16, part, stands, text};
use crate::volume::lvm;

/// Where the second header of LUKS2 may be, as its size is told by the first one.
const LUKS2_SECONDARY: [usize; 3] = [0x4000, 0x8000, 0x10000];

pub(super) fn luks(head: &[u8]) -> Option<Content> {
    let at = if stands(head, 0, b"LUKS\xba\xbe") {
        0
    } else {
        LUKS2_SECONDARY.into_iter().find(|at| stands(head, *at, b"SKUL\xba\xbe") && be16(head, at + 6) == 2)?
    };
    let uuid = text(part(head, at + 168, 40));
    match be16(head, at + 6) {
        1 => Some(Content::new("crypto_LUKS", None, uuid)),
        2 => Some(Content::new("crypto_LUKS", text(part(head, at + 24, 48)), uuid)),
        _ => None,
    }
}

pub(super) fn lvm(head: &[u8]) -> Option<Content> {
    let uuid = lvm::label_uuid(head)?;
    Some(Content::new("LVM2_member", None, Some(uuid)))
}
