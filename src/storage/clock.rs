//! Wall-clock time in nanoseconds since the epoch, as the times of files use it.

/// The time of now (CLOCK_REALTIME).
pub fn now_ns() -> i64 {
    read(libc::CLOCK_REALTIME)
}

/// The time of the last timer tick (CLOCK_REALTIME_COARSE): up to some milliseconds old, and never later than
/// [`now_ns`]. The kernel takes the times of files from this clock.
pub fn now_coarse_ns() -> i64 {
    read(libc::CLOCK_REALTIME_COARSE)
}

/// When the host started, by the clock of now: a time of a file that is later is of this boot.
pub fn boot_ns() -> i64 {
    read(libc::CLOCK_REALTIME).saturating_sub(read(libc::CLOCK_BOOTTIME))
}

/// Time stands still where every schedule must be repeatable: what a thread does may not depend on the clock.
#[cfg(any(feature = "shuttle", loom))]
fn read(_clock: libc::clockid_t) -> i64 {
    1_700_000_000_000_000_000
}

#[cfg(not(any(feature = "shuttle", loom)))]
fn read(clock: libc::clockid_t) -> i64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a valid timespec to write to. Both clocks exist on every Linux, so the call cannot fail.
    unsafe { libc::clock_gettime(clock, &mut time) };
    timespec_ns(time.tv_sec, time.tv_nsec)
}

/// Seconds and nanoseconds as one number, held at the ends of its range (a file may carry any time at all).
pub(super) fn timespec_ns(sec: i64, nsec: i64) -> i64 {
    sec.saturating_mul(1_000_000_000).saturating_add(nsec)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn coarse_time_is_not_ahead_of_fine_time() {
        let coarse = now_coarse_ns();
        let fine = now_ns();
        assert!(coarse > 1_600_000_000_000_000_000, "nanoseconds since the epoch");
        assert!(coarse <= fine);
    }

    #[test]
    fn extreme_times_saturate() {
        assert_eq!(timespec_ns(1, 5), 1_000_000_005);
        assert_eq!(timespec_ns(i64::MAX, 0), i64::MAX);
        assert_eq!(timespec_ns(i64::MIN, 0), i64::MIN);
    }
}
