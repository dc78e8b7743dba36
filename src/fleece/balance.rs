//! How much time readers of views leave to the guest. Arithmetic alone, on times and counts that it is given; who waits,
//! and how, is the matter of `pace`.
//!
//! The promise: while views are read, the guest keeps at least the share `s` of the speed that it has while none is.
//! Speed is requests done in a time. It is measured, as no model of the medium holds for disks, tmpfs, page caches and
//! guests with short and deep queues alike. All time is of one of two kinds: *beside*, while readers are at work and
//! until [`SETTLE_NS`] later (their answers are copied, requests that waited for them come through), and *alone*. With
//! the guest's speed `a` alone and `b` beside, and `p` the part of the time that it is alone, it has
//! `p a + (1 - p) b` in all. So the smallest part that keeps the promise is
//!
//! ```text
//! p = (s - k) / (1 - k)   with   k = b / a,   where k < s; else none
//! ```
//!
//! A guest that waits for each of its writes has a small `k` and gets about `s` of the time. One with a deep queue holds
//! its own, and costs the reader little. Readers of what is cached do not disturb it. A reader that pauses by itself, to
//! write what it read, pays with that. Both speeds are measured anew all the time: [`PROBE`] of the time the guest is
//! alone whatever it keeps.
//!
//! Invariant: time beside is owed for, `p / (1 - p)` times its length, and time alone pays. From [`MIN_PAUSE_NS`] owed on
//! until nothing is owed, no piece begins. What is owed is bounded, so a reader always gets on.

use super::counters::Load;

/// Time beside ends so much later than the last piece.
const SETTLE_NS: u64 = 300_000;
/// Shortest pause behind the settling. With shorter ones the guest got less than its share: its speed alone seems to be
/// measured too low in them.
const MIN_PAUSE_NS: f64 = 2_000_000.0;
/// See the module.
const PROBE: f64 = 1.0 / 32.0;
/// What is aimed at above the share, as a part of what is left above it: measuring errs.
const MARGIN: f64 = 0.1;
/// Most time beside that is charged at once: behind a store that hangs, nobody is at work.
const MAX_CHARGE_NS: u64 = 20_000_000;
/// Most that is owed.
const MAX_OWED_NS: f64 = 50_000_000.0;
/// Most that is paid ahead, by readers that pause by themselves.
const MAX_PAID_AHEAD_NS: f64 = 1_000_000.0;
/// In a longer time alone the guest may have been idle: it says nothing of its speed.
const MAX_MEASURED_NS: u64 = 100_000_000;
/// Requests done alone from which on the speed is known; before, the guest is taken for one that keeps nothing.
const ENOUGH: f64 = 8.0;
/// A guest without a request for so long is idle.
const IDLE_NS: u64 = 20_000_000;
/// Older requests count half from so many requests on that took at least so long, or from so long on.
const HALVED: (f64, f64, f64) = (128.0, 10e6, 1e9);
/// Bytes of a piece: at least, at most, and for each request that the guest has in flight. A guest's request waits for
/// one piece; but beside a deep queue, a reader that asks for little gets nothing.
const PIECE_BYTES: (u64, u64, f64) = (256 << 10, 1 << 20, 65536.0);
/// Bytes that several readers may ask for at once, for each request that the guest has in flight.
const WINDOW_PER_REQUEST: f64 = 131_072.0;
/// Up to so many times as many where the guest keeps its share with them, if it has so many requests in flight: else it
/// waits for each of them.
const WIDENED: (f64, f64) = (16.0, 4.0);
/// How fast the mean of the requests in flight follows.
const DEPTH_WEIGHT: f64 = 1.0 / 16.0;

/// Requests done in a time, older ones weighing less.
#[derive(Debug, Default, Clone, Copy)]
struct Speed {
    done: f64,
    ns: f64,
}

impl Speed {
    fn add(&mut self, done: f64, ns: u64) {
        self.done += done;
        self.ns += ns as f64;
        let (enough, ns, too_long) = HALVED;
        while (self.done >= enough && self.ns >= ns) || self.ns >= too_long {
            self.done /= 2.0;
            self.ns /= 2.0;
        }
    }

    fn per_ns(&self) -> f64 {
        if self.ns > 0.0 { self.done / self.ns } else { 0.0 }
    }
}

/// What a reader is told that wants to begin a piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    /// Begin.
    Begin,
    /// Ask again at this time, or when a piece ends.
    At(u64),
    /// Ask again when a piece ends.
    AtAnEnd,
}

/// See the module. Times are nanoseconds since any moment.
#[derive(Debug)]
pub(super) struct Balance {
    share: f64,
    /// The guest is idle; nothing is measured and nobody waits.
    idle: bool,
    /// When it was last seen active.
    active_ns: u64,
    /// Pieces that are being read, and their bytes.
    pieces: u32,
    bytes: u64,
    /// End of the time beside, while no piece is read.
    settled_ns: u64,
    /// What the speeds know already: the time, and the guest's requests done by then.
    noted_ns: u64,
    noted_done: u32,
    beside: Speed,
    alone: Speed,
    owed_ns: f64,
    paying: bool,
    /// Mean of the guest's requests in flight.
    depth: f64,
    /// Times [`WINDOW_PER_REQUEST`].
    widened: f64,
}

impl Balance {
    /// For a share from 0 to 0.95.
    pub(super) fn new(share: f64) -> Balance {
        Balance {
            share,
            idle: true,
            active_ns: 0,
            pieces: 0,
            bytes: 0,
            settled_ns: 0,
            noted_ns: 0,
            noted_done: 0,
            beside: Speed::default(),
            alone: Speed::default(),
            owed_ns: 0.0,
            paying: false,
            depth: 0.0,
            widened: 1.0,
        }
    }

    /// Takes note of what the guest did up to now. True: it is idle.
    pub(super) fn note(&mut self, now_ns: u64, load: Load) -> bool {
        if self.idle {
            // Nobody is in a piece then.
            *self = Balance {
                idle: false,
                active_ns: now_ns,
                noted_ns: now_ns,
                noted_done: load.done,
                depth: f64::from(load.in_flight),
                ..Balance::new(self.share)
            };
            return false;
        }
        self.account(now_ns, load);
        self.depth += (f64::from(load.in_flight) - self.depth) * DEPTH_WEIGHT;
        self.idle = self.pieces == 0 && now_ns.saturating_sub(self.active_ns) > IDLE_NS;
        self.idle
    }

    /// Whether the guest was idle at the last look.
    pub(super) fn is_idle(&self) -> bool {
        self.idle
    }

    /// Bytes of the pieces in which reads are made now: a power of two.
    pub(super) fn piece_bytes(&self) -> u64 {
        let (least, most, each) = PIECE_BYTES;
        ((self.depth * each) as u64).clamp(least, most).next_power_of_two()
    }

    /// Whether a piece of `bytes` may begin, noted just before. The guest is active.
    pub(super) fn next(&mut self, now_ns: u64, bytes: u64) -> Next {
        self.paying |= self.owed_ns >= MIN_PAUSE_NS;
        if self.paying {
            if self.pieces > 0 {
                return Next::AtAnEnd;
            }
            if now_ns < self.settled_ns {
                return Next::At(self.settled_ns);
            }
            if self.owed_ns > 0.0 {
                return Next::At(now_ns + self.owed_ns as u64 + 1);
            }
            self.paying = false;
            self.widen();
        }
        let window = (self.depth * WINDOW_PER_REQUEST * self.widened) as u64;
        if self.pieces > 0 && self.bytes + bytes > window { Next::AtAnEnd } else { Next::Begin }
    }

    /// A piece begins, noted just before.
    pub(super) fn begin(&mut self, bytes: u64) {
        self.pieces += 1;
        self.bytes += bytes;
    }

    /// A piece ends.
    pub(super) fn end(&mut self, now_ns: u64, load: Load, bytes: u64) {
        self.account(now_ns, load);
        self.pieces = self.pieces.saturating_sub(1);
        self.bytes = self.bytes.saturating_sub(bytes);
        self.settled_ns = now_ns + SETTLE_NS;
    }

    /// The part of its speed to be kept, with some margin.
    fn aim(&self) -> f64 {
        self.share + (1.0 - self.share) * MARGIN
    }

    /// The part of its speed that the guest keeps in time beside; None where that is not known.
    fn kept(&self) -> Option<f64> {
        (self.alone.done >= ENOUGH).then(|| self.beside.per_ns() / self.alone.per_ns())
    }

    /// The part of the time that the guest is to have alone.
    fn alone_part(&self) -> f64 {
        let aim = self.aim();
        match self.kept() {
            None => self.share,
            Some(kept) if kept < aim => ((aim - kept) / (1.0 - kept)).max(PROBE),
            Some(_) => PROBE,
        }
    }

    /// After each pause, when both speeds were just measured.
    fn widen(&mut self) {
        let (most, depth) = WIDENED;
        let has_room = self.depth >= depth && self.kept().is_some_and(|kept| kept >= self.aim());
        self.widened = if has_room { self.widened * 2.0 } else { self.widened / 2.0 }.clamp(1.0, most);
    }

    /// Divides the time since the last look, and the requests done in it, among beside and alone.
    fn account(&mut self, now_ns: u64, load: Load) {
        let (from_ns, done) = (self.noted_ns, load.done.wrapping_sub(self.noted_done));
        let ns = now_ns.saturating_sub(from_ns);
        (self.noted_ns, self.noted_done) = (from_ns + ns, load.done);
        if done > 0 || load.in_flight > 0 {
            self.active_ns = now_ns;
        }
        if ns == 0 {
            return;
        }
        let beside_ns = if self.pieces > 0 { ns } else { self.settled_ns.saturating_sub(from_ns).min(ns) };
        let alone_ns = ns - beside_ns;
        if ns <= MAX_MEASURED_NS {
            let each = f64::from(done) / ns as f64;
            self.beside.add(each * beside_ns as f64, beside_ns);
            self.alone.add(each * alone_ns as f64, alone_ns);
        }
        let part = self.alone_part();
        let charged = beside_ns.min(MAX_CHARGE_NS) as f64 * part / (1.0 - part);
        self.owed_ns = (self.owed_ns + charged).min(MAX_OWED_NS);
        self.owed_ns = (self.owed_ns - alone_ns as f64).max(-MAX_PAID_AHEAD_NS);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: f64 = 1e9;
    const READ_NS: u64 = 250_000;

    /// A guest with one speed alone and one beside a reader, in requests a second, and a reader that always has a
    /// next piece, every fourth after `rest_ns`. Sleeps end late. Gives the part of its speed that the guest kept, and
    /// the part of the time in which a piece was read.
    struct World {
        alone: f64,
        beside: f64,
        read_ns: u64,
        rest_ns: u64,
    }

    const WORLD: World = World { alone: 10_000.0, beside: 1_000.0, read_ns: READ_NS, rest_ns: 50_000 };
    const LATE_NS: u64 = 60_000;

    impl World {
        fn run(&self, balance: &mut Balance, from_ns: u64, seconds: f64) -> (f64, f64) {
            self.run_with(balance, from_ns, seconds, 1)
        }

        fn run_with(&self, balance: &mut Balance, from_ns: u64, seconds: f64, in_flight: u32) -> (f64, f64) {
            let (mut now_ns, mut done, mut reading_ns, mut pieces) = (from_ns, 0.0, 0, 0);
            let end_ns = from_ns + (seconds * S) as u64;
            let load = |done: f64| Load { done: done as u64 as u32, in_flight };
            while now_ns < end_ns {
                assert!(!balance.note(now_ns, load(done)), "the guest is active");
                let pause_ns = match balance.next(now_ns, 1) {
                    Next::Begin => 0,
                    Next::At(at) => at - now_ns + LATE_NS,
                    Next::AtAnEnd => panic!("no piece is read that could end"),
                };
                if pause_ns > 0 {
                    now_ns += pause_ns;
                    done += self.alone * pause_ns as f64 / S;
                    continue;
                }
                balance.begin(1);
                now_ns += self.read_ns;
                reading_ns += self.read_ns;
                done += self.beside * self.read_ns as f64 / S;
                balance.end(now_ns, load(done), 1);
                pieces += 1;
                if pieces % 4 == 0 {
                    now_ns += self.rest_ns;
                    done += self.alone * self.rest_ns as f64 / S;
                }
            }
            (done / (self.alone * seconds), reading_ns as f64 / (seconds * S))
        }

        fn under(&self, share: f64) -> (f64, f64) {
            self.run(&mut Balance::new(share), 1, 2.0)
        }
    }

    #[test]
    fn a_guest_that_loses_to_readers_keeps_its_share_and_little_more() {
        for share in [0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95] {
            for beside in [0.0, 100.0, 500.0, 1000.0] {
                let (kept, reading) = World { beside, ..WORLD }.under(share);
                assert!((share..share + 0.2).contains(&kept), "{share} {beside}: keeps {kept}");
                assert!(reading > (1.0 - share) * 0.7, "{share} {beside}: reads {reading} of the time");
            }
        }
    }

    #[test]
    fn a_guest_that_holds_its_own_costs_readers_little() {
        for beside in [6_000.0, 8_000.0, 10_000.0] {
            let (kept, reading) = World { beside, ..WORLD }.under(0.5);
            assert!(kept >= 0.5 && reading > 0.85, "{beside}: keeps {kept}, reads {reading} of the time");
        }
    }

    #[test]
    fn a_reader_that_pauses_by_itself_never_waits() {
        let (kept, reading) = World { rest_ns: 10_000_000, ..WORLD }.under(0.5);
        let undisturbed = 4.0 * READ_NS as f64 / (4.0 * READ_NS as f64 + 10e6);
        assert!(kept > 0.9 && (reading - undisturbed).abs() < 0.01, "keeps {kept}, reads {reading} of the time");
    }

    #[test]
    fn what_the_guest_does_may_change() {
        let mut balance = Balance::new(0.5);
        let strong = World { beside: 9_000.0, ..WORLD };
        strong.run(&mut balance, 1, 2.0);
        let (kept, _) = WORLD.run(&mut balance, (2.0 * S) as u64, 2.0);
        assert!(kept > 0.45, "keeps {kept} when it got weaker");
        let (_, reading) = strong.run(&mut balance, (4.0 * S) as u64, 2.0);
        assert!(reading > 0.75, "reads {reading} of the time when it got stronger");
    }

    #[test]
    fn an_idle_guest_is_found_out_and_awakes() {
        let mut balance = Balance::new(0.5);
        assert!(balance.is_idle());
        assert!(!balance.note(1_000, Load { done: 1, in_flight: 0 }));
        assert!(!balance.note(IDLE_NS / 2, Load { done: 1, in_flight: 1 }));
        assert!(!balance.note(10 * IDLE_NS, Load { done: 1, in_flight: 1 }), "a request that hangs is no idleness");
        assert!(!balance.note(10 * IDLE_NS + IDLE_NS, Load { done: 2, in_flight: 0 }));
        assert!(balance.note(12 * IDLE_NS + 1, Load { done: 2, in_flight: 0 }) && balance.is_idle());
        assert!(!balance.note(13 * IDLE_NS, Load { done: 3, in_flight: 0 }) && !balance.is_idle());
    }

    #[test]
    fn many_bytes_at_once_only_beside_a_deep_queue() {
        const BYTES: u64 = 256 << 10;
        for (in_flight, most) in [(0, 1), (1, 1), (2, 1), (8, 4), (16, 8)] {
            let mut balance = Balance::new(0.5);
            let load = Load { done: 1, in_flight };
            balance.note(1, load);
            let mut begun = 0;
            while balance.next(1, BYTES) == Next::Begin {
                balance.begin(BYTES);
                begun += 1;
            }
            assert_eq!(begun, most, "beside {in_flight}");
            balance.end(2, load, BYTES);
            assert_eq!(balance.next(2, BYTES), Next::Begin);
        }
    }

    #[test]
    fn more_at_once_where_a_deep_queue_keeps_its_share() {
        for (in_flight, beside, widened) in [(16, 9_000.0, 16.0), (16, 1_000.0, 1.0), (1, 9_000.0, 1.0)] {
            let mut balance = Balance::new(0.5);
            World { beside, ..WORLD }.run_with(&mut balance, 1, 2.0, in_flight);
            assert_eq!(balance.widened, widened, "{in_flight} in flight, {beside} a second");
        }
    }

    #[test]
    fn pieces_are_longer_beside_a_deep_queue() {
        for (in_flight, bytes) in
            [(0, 256 << 10), (1, 256 << 10), (4, 256 << 10), (5, 512 << 10), (16, 1 << 20), (99, 1 << 20)]
        {
            let mut balance = Balance::new(0.5);
            balance.note(1, Load { done: 1, in_flight });
            assert_eq!(balance.piece_bytes(), bytes, "beside {in_flight}");
        }
    }

    #[test]
    fn whatever_happened_readers_get_on() {
        for share in [0.01, 0.5, 0.95] {
            let mut balance = Balance::new(share);
            let load = Load { done: 7, in_flight: 3 };
            balance.note(1, load);
            balance.begin(1);
            // A store that hung for an hour, beside a guest that hung as well.
            let hour = 3_600_000_000_000;
            balance.end(hour, load, 1);
            let mut now = hour;
            while let Next::At(at) = balance.next(now, 1) {
                assert!(at > now);
                now = at;
                balance.note(now, load);
            }
            assert!(now - hour <= SETTLE_NS + MAX_OWED_NS as u64 + 10, "{share}: {} ns", now - hour);
            // A clock that stands still, or goes back, and counts that wrap around.
            balance.note(now, load);
            balance.note(now - 5, Load { done: 3, in_flight: 0 });
            balance.begin(1);
            balance.end(now, Load { done: 4, in_flight: 0 }, 1);
            assert!(balance.owed_ns.is_finite() && balance.alone_part() < 1.0);
        }
    }
}
