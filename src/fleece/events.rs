//! What an operator should see: each event is one log line, one event on the control socket and one counter.

use parking_lot::RwLock;
use serde::Serialize;
use std::fmt;

/// Something that an operator should see.
#[derive(Debug, Clone, Serialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Event {
    /// The frozen views of a disk can no longer be read.
    ViewBroken {
        /// The disk.
        disk: String,
        /// What happened to the store.
        reason: String,
    },
    /// The stores passed 80 % of what they may take.
    StoreNearlyFull {
        /// The disk whose write passed it.
        disk: String,
        /// Bytes in all stores.
        used: u64,
        /// Bytes that they may take.
        limit: u64,
    },
    /// Changes since the newest checkpoint are not known: maps say 'everything'.
    TrackingLost {
        /// The disk.
        disk: String,
        /// Why.
        reason: String,
    },
    /// A mount took over what a daemon left that did not stop cleanly, or what another program wrote and recorded.
    Recovered {
        /// The disk.
        disk: String,
        /// What was found.
        how: String,
    },
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Event::ViewBroken { disk, reason } => write!(f, "disk '{disk}': its snapshots are broken: {reason}"),
            Event::StoreNearlyFull { disk, used, limit } => write!(
                f,
                "disk '{disk}': the stores are at {} of {}",
                crate::units::human_size(*used),
                crate::units::human_size(*limit)
            ),
            Event::TrackingLost { disk, reason } => {
                write!(f, "disk '{disk}': changes are not known, maps say everything: {reason}")
            }
            Event::Recovered { disk, how } => write!(f, "disk '{disk}': recovered: {how}"),
        }
    }
}

type Sink = Box<dyn Fn(&Event) + Send + Sync>;

/// Where events go: the log, and who subscribed.
#[derive(Default)]
pub struct Events {
    sinks: RwLock<Vec<Sink>>,
}

impl fmt::Debug for Events {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Events")
    }
}

impl Events {
    /// Hands every later event to `sink`, which must not block.
    pub fn subscribe(&self, sink: Sink) {
        self.sinks.write().push(sink);
    }

    /// Logs an event and hands it on.
    pub(super) fn emit(&self, event: &Event) {
        match event {
            Event::Recovered { .. } => log::warn!("{event}"),
            Event::StoreNearlyFull { .. } => log::warn!("{event}"),
            Event::ViewBroken { .. } | Event::TrackingLost { .. } => log::error!("{event}"),
        }
        for sink in self.sinks.read().iter() {
            sink(event);
        }
    }
}
