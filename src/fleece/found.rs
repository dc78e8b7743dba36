//! What the last user of a disk's state left, and what of it can be believed: see `recover`.

use super::BlockDevicePolicy;
use super::foreign::{signs_since_close, signs_since_kill};
use super::persistent::{Proof, prove};
use super::tracking::{CLOCK, CLOCK_UNARMED};
use crate::bitmap::{Directory, Sidecar, State, region_size_for};
use crate::error::{Result, errno};
use crate::image::Image;
use crate::storage::clock::now_ns;
use crate::storage::shm::ShmRoot;
use crate::storage::{Dir, Shm};
use crate::sync::atomic::Ordering;
use uuid::Uuid;

/// The sidecar's name in the state directory.
pub(super) const SIDECAR: &str = "dirty.log";

/// What the last user of the state left.
pub(super) enum Found {
    New,
    Clean,
    /// Killed; its words are all there.
    Killed(Box<dyn Shm>),
    /// Its words are gone, what it made durable is there: the regions whose intent is set, and their size.
    PowerLoss {
        armed: Vec<u64>,
        region_size: u64,
    },
    /// Why changes are not known.
    Lost(String),
}

/// The region size of the new session, and the regions that it finds armed.
pub(super) fn regions_of(found: &Found, sidecar: &Sidecar, image: &dyn Image) -> (u64, Vec<u64>) {
    let size = image.size();
    let (old, needed) = (sidecar.superblock().region_size, region_size_for(size.max(sidecar.directory().size)));
    let all = || (0..size.div_ceil(needed)).collect();
    match found {
        // All was durable, and nobody wrote since, or will.
        Found::Clean => (needed, Vec::new()),
        _ if image.read_only() => (needed, Vec::new()),
        // Whoever made the image, or wrote to it, may not have synced it.
        Found::New | Found::Lost(_) => (needed, all()),
        Found::Killed(words) if wrote_unarmed(&**words) => (needed.max(old), all()),
        Found::Killed(_) | Found::PowerLoss { .. } if needed <= old => (old, sidecar.intents()),
        Found::Killed(_) | Found::PowerLoss { .. } => (needed, all()),
    }
}

/// Whether the session that these words are of wrote to regions that were not armed.
fn wrote_unarmed(words: &dyn Shm) -> bool {
    let clock = words.open(CLOCK).ok().flatten();
    clock.and_then(|clock| Some(clock.get(CLOCK_UNARMED)?.load(Ordering::SeqCst))) != Some(0)
}

/// Opens or makes the sidecar and looks at what the last user left.
pub(super) fn open_sidecar(
    name: &str,
    image: &dyn Image,
    state: &dyn Dir,
    root: &dyn ShmRoot,
    devices: BlockDevicePolicy,
) -> Result<(Sidecar, Found, Proof)> {
    let new = || -> Result<Sidecar> {
        let file = state.create(SIDECAR)?;
        let sidecar = Sidecar::create(file, Directory::new(Uuid::new_v4(), image.size()))?;
        state.sync()?;
        Ok(sidecar)
    };
    if !state.exists(SIDECAR)? {
        return Ok((new()?, Found::New, Proof::NoMark));
    }
    match Sidecar::open(state.open(SIDECAR)?) {
        Ok(sidecar) => {
            let proof = prove(image, &sidecar.superblock(), &sidecar.directory())?;
            let (found, proof) = classify(&sidecar, image, root, proof, devices)?;
            Ok((sidecar, found, proof))
        }
        // Damaged: what it knew is lost, which must not keep a guest from starting. Newer versions and I/O errors do.
        Err(e) if e.errno() == errno::EINVAL => {
            let aside = format!("{SIDECAR}.damaged-{}", now_ns());
            state.rename(SIDECAR, &aside)?;
            log::error!("disk '{name}': {e}; kept as {}", state.path(&aside).display());
            Ok((new()?, Found::Lost(format!("its tracking state was damaged: {e}")), Proof::NoMark))
        }
        Err(e) => Err(e),
    }
}

/// What was found, and what is left of the proof by then: a mark says nothing of who writes past the format.
fn classify(
    sidecar: &Sidecar,
    image: &dyn Image,
    root: &dyn ShmRoot,
    proof: Proof,
    devices: BlockDevicePolicy,
) -> Result<(Found, Proof)> {
    if let Some(reason) = super::foreign::unbelieved(image, devices) {
        return Ok((Found::Lost(reason), proof.distrusted()));
    }
    let lost = |reason: &str| Ok((Found::Lost(reason.to_owned()), proof));
    let touched = |reason: String| Ok((Found::Lost(reason), proof.touched()));
    if let Some(reason) = proof.reason() {
        return lost(reason);
    }
    let stamp = image.found_stamp()?;
    match sidecar.superblock().state {
        State::Clean { stamp: left } => match signs_since_close(&left, &stamp, image.is_block_device()) {
            Some(reason) => touched(reason),
            None => Ok((Found::Clean, proof)),
        },
        State::Open { nonce, boot_id } => {
            let another_boot = boot_id != root.boot_id();
            let words = if another_boot { None } else { root.find(&nonce.to_string())? };
            let clock = words.as_ref().map(|words| words.open(CLOCK)).transpose()?.flatten();
            let (Some(words), Some(clock)) = (words, clock) else {
                // The mark proves more than any clock can.
                let boot_ns = another_boot.then(|| root.boot_ns());
                let heartbeat_ns = sidecar.superblock().heartbeat_ns;
                if proof != Proof::Ours
                    && let Some(reason) = super::foreign::signs_after_power_loss(image, &stamp, heartbeat_ns, boot_ns)
                {
                    return touched(reason);
                }
                let (armed, region_size) = (sidecar.intents(), sidecar.superblock().region_size);
                return Ok((Found::PowerLoss { armed, region_size }, proof));
            };
            match signs_since_kill(image, &stamp, &clock) {
                Some(reason) => touched(reason),
                None => Ok((Found::Killed(words), proof)),
            }
        }
    }
}
