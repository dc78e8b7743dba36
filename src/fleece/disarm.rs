//! Disarming regions that are idle, and the heartbeat: what keeps a power loss from costing much.
//!
//! One round disarms many regions with one flush of the image and one sync of the sidecar, in this order:
//!
//! 1. regions that were idle since the last round and that nobody has pinned are taken in: a pin from here on takes its
//!    region out again (see `regions`), so nobody ever waits for a round;
//! 2. the image is flushed, all its files. Without it a power loss could take the image back behind a checkpoint that a
//!    backup has read by then;
//! 3. the fine bits of the regions, of all recording bitmaps, are written to their areas and synced. The list of these
//!    is loaded only now: whoever marked in the regions has left. Where it is not the list that the directory has, a
//!    change of it is under way, and the round ends without success;
//! 4. `armed` is cleared for the regions that are still in, then their intents are written, then they may be armed anew.
//!
//! An error, and a flush that failed at any time before, leaves them armed: too much, never too little.

use super::disk::Disk;
use super::fleece::Fleece;
use crate::bitmap::{HEARTBEAT_NS, RegionBits};
use crate::error::Result;
use crate::storage::clock::now_ns;
use std::sync::{Arc, Weak};
use std::time::Duration;

/// How long between two rounds, which is how long a region is idle before it is disarmed (up to twice that). Also how
/// often the heartbeat is looked at: it is to be renewed twice in its interval.
const ROUND: Duration = Duration::from_nanos(HEARTBEAT_NS as u64 / 2);

impl Disk {
    /// One round; see the module. What was pinned since the last one is left alone.
    pub(super) fn disarm_idle(&self) -> Result<()> {
        let mut seen = self.disarming.lock();
        if self.read_only() || self.is_closed() || self.flush_failure().is_some() {
            return Ok(());
        }
        let idle = self.regions.begin_disarm(&mut seen);
        // While arming is given up, who writes has no pin. Asked only now: what is given up later ends with the whole disk
        // armed, which takes all regions out.
        if idle.is_empty() || self.regions.given_up() {
            self.regions.cancel_disarm(&idle);
            return Ok(());
        }
        match self.make_durable(&idle) {
            Ok(true) => {
                let cleared = self.regions.finish_disarm(&idle, &self.tracking.sidecar)?;
                self.counters.regions_disarmed.add(cleared);
                Ok(())
            }
            other => {
                self.regions.cancel_disarm(&idle);
                other.map(drop)
            }
        }
    }

    /// Steps 2 and 3. False: not now.
    fn make_durable(&self, idle: &[u64]) -> Result<bool> {
        self.flush_image()?;
        let still = self.regions.still_disarming(idle);
        let recording = self.tracking.recording();
        let bits_of = |one: &super::tracking::Recording| {
            let granules = |region: &u64| {
                let bytes = self.regions.bytes_of(*region);
                bytes.start / one.bitmap.granularity()..bytes.end.div_ceil(one.bitmap.granularity())
            };
            let ranges = still.iter().map(granules).map(|range| range.start..range.end.min(one.bitmap.bits().len()));
            (one.uuid, one.area, ranges.collect::<Vec<_>>())
        };
        let list: Vec<RegionBits<'_>> = recording
            .iter()
            .filter_map(|one| {
                let (bitmap, area, ranges) = bits_of(one);
                Some(RegionBits { bitmap, area: area?, bits: one.bitmap.bits(), ranges })
            })
            .collect();
        self.tracking.sidecar.save_regions(&list)
    }

    /// Renews the heartbeat where the image was written since and it is getting old: see `foreign`.
    pub(super) fn beat(&self) -> Result<()> {
        let heartbeat = self.tracking.sidecar.superblock().heartbeat_ns;
        if self.read_only() || self.tracking.last_write_ns() <= heartbeat {
            return Ok(());
        }
        self.tracking.sidecar.renew_heartbeat(now_ns(), HEARTBEAT_NS / 4)
    }
}

impl Fleece {
    /// Renews heartbeats and disarms regions that were idle since the last call: what bounds the loss at a power loss.
    /// Called in the background where there is a thread for it.
    pub fn disarm_idle(&self) {
        for disk in self.disks() {
            if let Err(e) = disk.beat().and_then(|()| disk.disarm_idle()) {
                log::warn!("disk '{}': regions stay armed: {e}", disk.name());
            }
        }
    }
}

/// Starts the thread; it ends with its `Fleece`.
pub(super) fn start(fleece: &Arc<Fleece>) {
    let weak: Weak<Fleece> = Arc::downgrade(fleece);
    let work = move || {
        loop {
            std::thread::sleep(ROUND);
            let Some(fleece) = weak.upgrade() else { return };
            fleece.disarm_idle();
        }
    };
    if let Err(e) = std::thread::Builder::new().name("disarm".to_owned()).spawn(work) {
        log::error!("after a power loss maps will say more than they need to: {e}");
    }
}
