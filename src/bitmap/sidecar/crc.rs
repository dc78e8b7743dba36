//! The crc32c over runs of zeros, without a look at them.
//!
//! A byte of zero changes the checksum's register by a linear map over its 32 bits. The maps of 2^i zero bytes are made
//! once, each out of the one before, so a run costs one map for each bit of its length.

use std::sync::LazyLock;

/// Castagnoli's polynomial, lowest bit first.
const POLYNOMIAL: u32 = 0x82f6_3b78;

/// Column `i` is what becomes of bit `i`.
type Map = [u32; 32];

/// `ZEROS[i]`: what 2^i bytes of zero make of the register.
static ZEROS: LazyLock<[Map; 64]> = LazyLock::new(|| {
    let mut bit: Map = std::array::from_fn(|i| if i == 0 { POLYNOMIAL } else { 1 << (i - 1) });
    for _ in 0..3 {
        bit = twice(&bit);
    }
    let mut map = bit;
    std::array::from_fn(|_| {
        let now = map;
        map = twice(&now);
        now
    })
});

fn twice(map: &Map) -> Map {
    map.map(|column| apply(map, column))
}

fn apply(map: &Map, register: u32) -> u32 {
    map.iter().enumerate().fold(0, |sum, (i, column)| sum ^ column & (register >> i & 1).wrapping_neg())
}

/// The crc32c of what has the crc32c `crc`, followed by `len` zeros.
pub(super) fn append_zeros(crc: u32, len: u64) -> u32 {
    let bits = (0..u64::BITS).filter(|bit| len >> bit & 1 != 0);
    !bits.fold(!crc, |register, bit| ZEROS.get(bit as usize).map_or(register, |map| apply(map, register)))
}

#[cfg(test)]
mod tests {
    use super::append_zeros;

    #[test]
    fn zeros_count_as_if_they_were_read() {
        let start = crc32c::crc32c(b"what comes before");
        for crc in [0, 1, u32::MAX, start] {
            for len in (0..70).chain([4095, 4096, 65536, 65537, 300_001]) {
                assert_eq!(append_zeros(crc, len), crc32c::crc32c_append(crc, &vec![0; len as usize]), "{crc} {len}");
            }
        }
        // Longer than anybody would read: in two steps as in one.
        assert_eq!(append_zeros(start, 1 << 40), append_zeros(append_zeros(start, (1 << 40) - 9), 9));
    }
}
