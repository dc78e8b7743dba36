//! Counters of one mount, for `status.json` and `metrics`.

use std::sync::atomic::{AtomicU64, Ordering};

/// One counter. Plain relaxed additions; nothing is ordered by it.
#[derive(Debug, Default)]
pub struct Count(AtomicU64);

impl Count {
    pub(super) fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A counter's name, meaning and value. Counters only grow, except those whose help says 'now'.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Counter {
    /// Snake case, without a prefix.
    pub name: &'static str,
    /// One line for people.
    pub help: &'static str,
    /// The value.
    pub value: u64,
}

macro_rules! counters {
    ($($name:ident: $help:literal,)*) => {
        /// The counters of one mount.
        #[derive(Debug, Default)]
        pub struct Counters {
            $(#[doc = $help] pub(super) $name: Count,)*
        }

        impl Counters {
            /// All of them, in a fixed order.
            pub(super) fn list(&self) -> Vec<Counter> {
                vec![$(Counter { name: stringify!($name), help: $help, value: self.$name.get() },)*]
            }
        }
    };
}

counters! {
    guest_reads: "Reads of live disks",
    guest_read_bytes: "Bytes read from live disks",
    guest_writes: "Writes to live disks",
    guest_write_bytes: "Bytes written to live disks",
    guest_zeroes: "Discards and write-zeroes of live disks",
    guest_zero_bytes: "Bytes discarded or zeroed on live disks",
    guest_flushes: "Flushes of live disks",
    chunks_copied: "Chunks of old content copied before a guest write",
    copied_bytes: "Bytes of old content copied before guest writes",
    chunks_lost: "Chunks whose old content could not be read",
    view_reads: "Reads of frozen views",
    view_read_bytes: "Bytes read from frozen views",
    view_retries: "Reads of frozen views that a guest write overtook",
    views_broken: "Times that the views of a disk broke",
    tracking_lost: "Times that changes of a disk stopped being known",
    tracking_errors: "Changes that could not be recorded",
    layers_folded: "Layers of dropped snapshots folded into older ones",
    snapshots_taken: "Snapshots taken",
    intent_syncs: "Times that writers waited for regions to be armed",
    regions_armed: "Regions armed: marked durably before they are written to",
    regions_disarmed: "Regions disarmed: idle, all in them durable",
    freeze_ns: "Nanoseconds that guest writes were held for snapshots",
}

impl Counters {
    pub(super) fn guest_read(&self, len: usize) {
        self.guest_reads.add(1);
        self.guest_read_bytes.add(len as u64);
    }

    pub(super) fn guest_write(&self, len: usize) {
        self.guest_writes.add(1);
        self.guest_write_bytes.add(len as u64);
    }

    pub(super) fn guest_zero(&self, len: u64) {
        self.guest_zeroes.add(1);
        self.guest_zero_bytes.add(len);
    }

    pub(super) fn view_read(&self, len: usize) {
        self.view_reads.add(1);
        self.view_read_bytes.add(len as u64);
    }

    pub(super) fn copied(&self, chunks: u64, bytes: u64) {
        self.chunks_copied.add(chunks);
        self.copied_bytes.add(bytes);
    }
}
