//! Foreign writers: who writes an image behind our back.
//!
//! `doc/foreign.md` says deed by deed what is found and what is not.
//!
//! * **While it is served, and after a kill**: the clock word says when the image was last written through us. It is
//!   stored before and after each write. An image whose ctime is later than that, by more than the slack, was written
//!   by somebody else; so was one of another length than we made or were about to make. After a kill it must also be
//!   the very file: device and inode stand beside the clock. Asked at open, at every snapshot, before and after it,
//!   before a batch, at a clean close, and every few seconds in between.
//! * **After a clean stop**: the stamp is compared as a whole. A ctime can't be set, so whoever wrote in between shows.
//! * **After a power loss** the clock word is gone. The heartbeat in the superblock stands in: it is durable, and renewed
//!   while the image is written to, so that no write of ours is later than it by more than its interval.
//! * **A block device** has no such times. What lies on one is not believed after any stop, unless told otherwise.
//! * **A note** on the image ([`super::lost`]) is believed before anything else.
//!
//! Not seen: a write within the slack after one of ours, one that comes with a clock set back, and any to a block device
//! while it is served (it is claimed, so that nobody mounts it).

use super::BlockDevicePolicy;
use super::disk::Disk;
use super::found::SIDECAR;
use super::tracking::{CLOCK, CLOCK_DEV, CLOCK_INO, CLOCK_LEN, CLOCK_LEN_NEXT};
use crate::bitmap::HEARTBEAT_NS;
use crate::error::{Error, Result, errno};
use crate::image::Image;
use crate::storage::clock::now_ns;
use crate::storage::os::identity;
use crate::storage::{Shm, Stamp, Words};
use crate::sync::atomic::Ordering;
use uuid::Uuid;

/// Clocks of files are coarse, and a write may wait in the kernel between our clock and the file's.
const SLACK_NS: i64 = 1_000_000_000;

/// Why nothing is believed of an image after a stop, whatever its times say.
pub(super) fn unbelieved(image: &dyn Image, devices: BlockDevicePolicy) -> Option<String> {
    if let Some(reason) = super::lost::noted(image) {
        return Some(reason);
    }
    let distrusted = image.on_block_device() && devices == BlockDevicePolicy::Distrust;
    distrusted.then(|| {
        "it is on a block device, where nothing shows whether another program wrote since fleecefs stopped".to_owned()
    })
}

/// Why an image is not as a clean stop left it. Device numbers change over reboots, and a device node has no times (but
/// what an image on it is based on may have some).
pub(super) fn signs_since_close(left: &Stamp, now: &Stamp, block_device: bool) -> Option<String> {
    let why = if !block_device && left.ino != now.ino {
        "the image is another file than at the last clean stop: it was replaced, or its state was copied"
    } else if left.size != now.size || left.mtime_ns != now.mtime_ns {
        "the image was changed by another program since the last clean stop"
    } else if !block_device && left.ctime_ns != now.ctime_ns {
        "the image's change time is another than at the last clean stop: it was renamed or its mode was changed, or \
         another program wrote to it and put its time back"
    } else {
        return None;
    };
    Some(why.to_owned())
}

/// Why an image is not as a killed session left it, whose clock words these are. Words of an older program may be fewer.
pub(super) fn signs_since_kill(image: &dyn Image, stamp: &Stamp, clock: &Words) -> Option<String> {
    if !is_the_file(image, stamp, clock) {
        return Some("the state belongs to another image file".to_owned());
    }
    let word = |index: usize| clock.get(index).map(|word| word.load(Ordering::SeqCst));
    let lens = [word(CLOCK_LEN), word(CLOCK_LEN_NEXT)];
    let newest = word(0).unwrap_or(0) as i64;
    // A resize that was under way may have been made or not.
    let known = lens.iter().flatten().find(|len| **len == stamp.size).or(lens[0].as_ref());
    signs(image, stamp, newest, known.copied()).map(|reason| format!("{reason} after fleecefs was killed"))
}

/// Whether clock words are those of a session that served this file. Device numbers hold as long as a boot, but for those
/// of file systems that were unmounted in between.
fn is_the_file(image: &dyn Image, stamp: &Stamp, clock: &Words) -> bool {
    let is = |index: usize, value: u64| clock.get(index).is_none_or(|word| word.load(Ordering::SeqCst) == value);
    image.is_block_device() || (is(CLOCK_INO, stamp.ino) && is(CLOCK_DEV, stamp.dev))
}

/// Whether words that a state names are those of its image: where the state was copied, they are of another one, which
/// may be served now, and must stay.
pub(super) fn are_of(words: &dyn Shm, image: &dyn Image) -> Result<bool> {
    let Some(clock) = words.open(CLOCK)? else { return Ok(true) };
    Ok(is_the_file(image, &image.stamp()?, &clock))
}

/// Why an image with this stamp was written by somebody else, judged by the time of our newest write and the size that
/// we know.
pub(super) fn signs(image: &dyn Image, stamp: &Stamp, newest_write_ns: i64, size: Option<u64>) -> Option<String> {
    if size.is_some_and(|size| size != stamp.size) && !image.is_block_device() {
        return Some(format!("another program made the image {} bytes long", stamp.size));
    }
    let late = stamp.ctime_ns > newest_write_ns.saturating_add(SLACK_NS);
    late.then(|| "the image was changed by another program".to_owned())
}

/// Why an image was written by somebody else before or after a power loss, judged by the last heartbeat; `boot_ns` is
/// when the host started, if it has since.
pub(super) fn signs_after_power_loss(
    image: &dyn Image,
    stamp: &Stamp,
    heartbeat_ns: i64,
    boot_ns: Option<i64>,
) -> Option<String> {
    if image.is_block_device() {
        return None;
    }
    if now_ns() < heartbeat_ns {
        return Some(
            "the host's clock went back since the last stop, so writes of other programs are not seen".to_owned(),
        );
    }
    if boot_ns.is_some_and(|boot_ns| stamp.ctime_ns >= boot_ns) {
        return Some("the image was changed by another program since the host started".to_owned());
    }
    let latest = heartbeat_ns.saturating_add(HEARTBEAT_NS).saturating_add(SLACK_NS);
    (stamp.ctime_ns > latest).then(|| "the image was changed by another program before the host stopped".to_owned())
}

impl Disk {
    /// A view of what others may change would be none.
    pub(super) fn check_freezable(&self) -> Result<()> {
        if !self.image().is_shared() {
            return Ok(());
        }
        let why = "others may change it while it is read (force-share), so it cannot be frozen";
        let e = Error::new(errno::EOPNOTSUPP, format!("disk '{}'", self.name()), why);
        Err(e.hint("freeze the other disks alone (--disk), or mount this one without force-share"))
    }

    /// Looks for a foreign writer, and says and notes it where there is one; also whether the disk's files still have
    /// their names.
    pub(super) fn check_foreign(&self) -> Result<()> {
        self.check_names()?;
        self.save_loss();
        if self.foreign_signs()?.is_none() {
            self.note_look();
            return Ok(());
        }
        // A write of ours that is under way may be ahead of the clock word: none is once the gate is held.
        let _gate = self.gate.write();
        let Some(reason) = self.foreign_signs()? else { return Ok(()) };
        if let Some(layer) = self.chain.load().newest() {
            self.break_views(layer, &reason);
        }
        // Who wrote before the newest checkpoint was made, unseen, changed something in the interval before it.
        let since_checkpoint = *self.looked.lock() == self.recording_uuid();
        self.lose(&reason, !since_checkpoint);
        // What they wrote may not be durable.
        if let Err(e) = self.arm_all() {
            log::warn!("disk '{}': {e}", self.name());
            self.note_on_image(&reason);
            self.give_up_arming();
        }
        // What came so far is noted: the next sign is of another write.
        self.tracking.note_write();
        self.set_known_size();
        self.begin_in_image()
    }

    /// Nobody else has written so far.
    pub(super) fn note_look(&self) {
        *self.looked.lock() = self.recording_uuid();
    }

    fn recording_uuid(&self) -> Option<Uuid> {
        super::lost::recording_uuid(&self.tracking.directory())
    }

    fn foreign_signs(&self) -> Result<Option<String>> {
        if self.read_only() {
            return Ok(None);
        }
        if self.mark_is_ours()? == Some(false) {
            return Ok(Some("another program opened the image for writing".to_owned()));
        }
        let image = &**self.image();
        Ok(signs(image, &image.stamp()?, self.tracking.last_write_ns(), Some(self.known_size())))
    }

    /// What tells foreign writers of this disk: `stamp` (times of its files), `mark` (in the image). Nothing does of one
    /// that is read-only, nor need it.
    pub(super) fn guards(&self) -> Vec<&'static str> {
        let stamped = !self.read_only() && !self.image().on_block_device();
        let marked = self.marked.load(Ordering::SeqCst);
        [(stamped, "stamp"), (marked, "mark")].into_iter().filter(|(has, _)| *has).map(|(_, guard)| guard).collect()
    }

    /// The image or the state were removed or replaced: what is written goes to files that nobody finds.
    fn check_names(&self) -> Result<()> {
        let stamp = self.image().stamp()?;
        let path = &*self.file;
        let misplaced = if stamp.dev != 0 && identity(path) != Some((stamp.dev, stamp.ino)) {
            Some(format!("{} was removed or replaced: what the guest writes is lost at unmount", path.display()))
        } else if !self.state.exists(SIDECAR)? {
            Some(format!("{} was removed: changes and snapshots are not saved", self.state.path(SIDECAR).display()))
        } else {
            None
        };
        let mut known = self.misplaced.lock();
        if let (None, Some(what)) = (&*known, &misplaced) {
            log::error!("disk '{}': {what}", self.name());
        }
        *known = misplaced;
        Ok(())
    }
}
