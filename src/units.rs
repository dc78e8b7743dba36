//! Sizes, offsets and names: parsing, limits and arithmetic that every layer shares.

use crate::error::{Error, Result, errno};
use std::ops::Range;

/// Default copy unit in bytes: the piece of old content that the first overwrite of it preserves.
pub const DEFAULT_CHUNK: u64 = 4096;
/// Smallest and largest copy unit in bytes (powers of two).
pub const CHUNK_RANGE: std::ops::RangeInclusive<u64> = 4096..=1 << 20;
/// Most bytes that one hold of a disk's gate covers (DESIGN I1), so that a snapshot never waits for a long discard.
pub const MAX_GATE_BYTES: u64 = 1 << 20;
/// Smallest and largest granularity of a dirty bitmap in bytes (powers of two; QEMU's limits).
pub const GRANULARITY_RANGE: std::ops::RangeInclusive<u64> = 512..=1 << 31;
/// Granularity of a bitmap where nothing else is asked for (QEMU's default for images without clusters).
pub const DEFAULT_GRANULARITY: u64 = 65536;
/// Largest disk in bytes: 1 EiB. Offsets then fit a signed 64-bit file offset with room to round up.
pub const MAX_DISK_BYTES: u64 = 1 << 60;

/// Rounds `n` down to a multiple of `unit` (a power of two).
pub fn round_down(n: u64, unit: u64) -> u64 {
    n & !(unit - 1)
}

/// Rounds `n` up to a multiple of `unit` (a power of two); `n` must be at most 2^63.
pub fn round_up(n: u64, unit: u64) -> u64 {
    (n + unit - 1) & !(unit - 1)
}

/// Sorts ranges, and makes one of those that touch or overlap.
pub fn join_ranges(ranges: &mut Vec<Range<u64>>) {
    ranges.sort_unstable_by_key(|range| range.start);
    ranges.dedup_by(|next, last| {
        let touch = next.start <= last.end;
        if touch {
            last.end = last.end.max(next.end);
        }
        touch
    });
}

/// Parses a size in bytes: digits with an optional `K`, `M`, `G`, `T`, `P` (powers of 1024), an optional `iB` or `B`
/// behind it.
pub fn parse_size(text: &str) -> Result<u64> {
    let bad = || {
        Error::new(errno::EINVAL, format!("size '{text}'"), "not a size in bytes")
            .hint("write digits with K, M, G or T behind them, for example 64K or 10G")
    };
    let digits_end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let number: u64 = text[..digits_end].parse().map_err(|_| bad())?;
    let suffix = text[digits_end..].to_ascii_uppercase();
    let shift = match suffix.trim_end_matches('B').trim_end_matches('I') {
        "" if suffix.is_empty() || suffix == "B" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        "P" => 50,
        _ => return Err(bad()),
    };
    number
        .checked_mul(1 << shift)
        .ok_or_else(|| Error::new(errno::EINVAL, format!("size '{text}'"), "larger than 16 EiB"))
}

/// A size for people: `512 B`, `4.0 KiB`, `1.5 GiB`.
pub fn human_size(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut value = bytes as f64 / 1024.0;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

/// Checks the name of a disk: `[A-Za-z0-9_-]{1,64}`.
pub fn check_disk_name(name: &str) -> Result<()> {
    let good =
        (1..=64).contains(&name.len()) && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-');
    if good {
        return Ok(());
    }
    Err(Error::new(
        errno::EINVAL,
        format!("disk name '{}'", name.escape_debug()),
        "not 1 to 64 letters, digits, '_' and '-'",
    )
    .hint("give one with NAME=IMAGE"))
}

/// Checks the name of a snapshot, checkpoint or consumer: 1 to 200 bytes without `/`, control characters or a leading
/// dot; `latest` is reserved. `what` is the kind, for the message.
pub fn check_name(what: &str, name: &str) -> Result<()> {
    let why = if name.is_empty() {
        "a name cannot be empty"
    } else if name.len() > 200 {
        return Err(Error::new(
            errno::ENAMETOOLONG,
            format!("{what} name of {} bytes", name.len()),
            "longer than 200 bytes",
        ));
    } else if name.starts_with('.') {
        "a name cannot start with a dot"
    } else if name.contains('/') {
        "a name cannot contain '/'"
    } else if name.chars().any(char::is_control) {
        "a name cannot contain control characters"
    } else if name == "latest" {
        "'latest' is reserved for the link to the newest snapshot"
    } else {
        return Ok(());
    };
    Err(Error::new(errno::EINVAL, format!("{what} '{}'", name.escape_debug()), why))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_that_touch_or_overlap_are_one() {
        for (ranges, joined) in [
            (vec![], vec![]),
            (vec![5..6, 0..2], vec![0..2, 5..6]),
            (vec![2..4, 0..2, 9..10], vec![0..4, 9..10]),
            (vec![0..9, 1..3, 8..12, 20..21], vec![0..12, 20..21]),
        ] {
            let mut ranges = ranges;
            join_ranges(&mut ranges);
            assert_eq!(ranges, joined);
        }
    }

    #[test]
    fn sizes_parse_with_and_without_units() {
        for (text, bytes) in [
            ("0", 0),
            ("512", 512),
            ("512B", 512),
            ("4K", 4096),
            ("4k", 4096),
            ("1MiB", 1 << 20),
            ("2G", 2 << 30),
            ("1T", 1 << 40),
        ] {
            assert_eq!(parse_size(text).unwrap(), bytes, "{text}");
        }
        for text in ["", "K", "4X", "-1", "4KK", "1.5G", "iB", "99999999999999999999", "99999999P"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn names_are_checked_at_their_limits() {
        assert!(check_name("snapshot", &"a".repeat(200)).is_ok());
        assert_eq!(check_name("snapshot", &"a".repeat(201)).unwrap_err().errno(), errno::ENAMETOOLONG);
        for bad in ["", ".a", "a/b", "a\nb", "latest"] {
            assert!(check_name("snapshot", bad).is_err(), "{bad:?}");
        }
        assert!(check_disk_name(&"a".repeat(64)).is_ok());
        assert!(check_disk_name(&"a".repeat(65)).is_err());
        assert!(check_disk_name("a.b").is_err());
    }
}
