//! The checksums of partition tables, LVM2 and ext4.

/// CRC-32 as in Ethernet, of GUID partition tables.
pub(super) fn crc32(bytes: &[u8]) -> u32 {
    crc32fast::hash(bytes)
}

/// The same polynomial with LVM2's start value, and not inverted at the end.
pub(super) fn lvm(pieces: &[&[u8]]) -> u32 {
    const START: u32 = 0xf597_a6cf;
    let mut crc = crc32fast::Hasher::new_with_initial(!START);
    for piece in pieces {
        crc.update(piece);
    }
    !crc.finalize()
}

/// CRC-32C from a start value, not inverted at the end: that of ext4's and jbd2's metadata.
pub(super) fn crc32c(start: u32, bytes: &[u8]) -> u32 {
    !crc32c::crc32c_append(!start, bytes)
}

/// CRC-16 from a start value, that of ext4's older group descriptors.
pub(super) fn crc16(start: u16, bytes: &[u8]) -> u16 {
    bytes.iter().fold(start, |crc, byte| {
        (0..8).fold(crc ^ u16::from(*byte), |crc, _| if crc & 1 == 0 { crc >> 1 } else { crc >> 1 ^ 0xa001 })
    })
}
