//! Foreign writers: who writes an image behind our back.
//!
//! The clock word says when the image was last written through us: it is stored before and after each write. An image
//! whose ctime is later than that, by more than the slack, was written by somebody else. Asked at open after a kill, at
//! every snapshot, at a clean close, and every few seconds in between. Then changes are not known, and the frozen views
//! can't be believed. Not seen: a write within the slack after one of ours, one that comes with a clock set back, and
//! any to a block device, which has no such time.

use super::disk::Disk;
use super::recover::SIDECAR;
use crate::error::{Error, Result, errno};
use crate::image::Image;
use crate::storage::Stamp;
use crate::storage::os::identity;

/// Clocks of files are coarse, and a write may wait in the kernel between our clock and the file's.
const SLACK_NS: i64 = 1_000_000_000;

/// Why an image with this stamp was written by somebody else, judged by the time of our newest write and the size that
/// we know.
pub(super) fn signs(image: &dyn Image, stamp: &Stamp, newest_write_ns: i64, size: Option<u64>) -> Option<String> {
    if size.is_some_and(|size| size != stamp.size) && !image.is_block_device() {
        return Some(format!("another program made the image {} bytes long", stamp.size));
    }
    let late = stamp.ctime_ns > newest_write_ns.saturating_add(SLACK_NS);
    late.then(|| "the image was changed by another program".to_owned())
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
        if self.foreign_signs()?.is_none() {
            return Ok(());
        }
        // A write of ours that is under way may be ahead of the clock word: none is once the gate is held.
        let _gate = self.gate.write();
        let Some(reason) = self.foreign_signs()? else { return Ok(()) };
        if let Some(layer) = self.chain.load().newest() {
            self.break_views(layer, &reason);
        }
        self.lose_tracking(&reason);
        // What came so far is noted: the next sign is of another write.
        self.tracking.note_write();
        self.set_known_size();
        self.begin_in_image()
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
