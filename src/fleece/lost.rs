//! Tracking that is lost: where that stands, and who is told.
//!
//! Changes of an interval are not known where somebody else wrote, where the image's flush failed, or where a change
//! could not be recorded. From then on every map over that interval says everything, until the next checkpoint begins a
//! new one.
//!
//! * **Bits first.** All bits of the recording bitmaps are set before anything else, so that a kill finds them set.
//! * **Then the directory**, which has the reason. Where it can't be written, it is tried again at each look for foreign
//!   writers, which comes before each snapshot.
//! * **A note on the image** ([`Image::set_note`]) where what lies beside the image can't be trusted to take it: where the
//!   directory can't be written, and whenever a change could not be recorded, before the guest's write goes on. It stays
//!   while nothing is recorded: until a checkpoint has armed the whole disk, or a clean close has made the image, the bits
//!   and the reason durable. An open that finds it believes nothing, and takes it away only once the directory says
//!   everything.
//! * **An operator is told once an interval**: one event, one line, one count; status says so as long as it is so.

use super::disk::{Disk, EXACT};
use super::events::Event;
use super::info::{TrackingLoss, rfc3339};
use super::tracking::recording_checkpoint;
use super::{Options, TrackingErrorPolicy};
use crate::bitmap::{Directory, Loss, UserBitmap, UserBitmapState};
use crate::error::{Error, Result, errno};
use crate::image::Image;
use crate::storage::clock::now_ns;
use crate::sync::Mutex;
use crate::sync::atomic::{AtomicBool, Ordering};
use uuid::Uuid;

/// What a disk knows of its losses in this session.
#[derive(Debug)]
pub(super) struct Losses {
    policy: TrackingErrorPolicy,
    /// The image bears the note. Held while that is written: nobody goes on before it is durable.
    noted: Mutex<bool>,
    /// The checkpoint that recorded when tracking was lost, if one did, and the loss that the directory could not take.
    unsaved: Mutex<Option<(Option<Uuid>, Loss)>>,
    /// What an operator has to know beside that, in words.
    troubles: Mutex<Vec<String>>,
    /// Tracking was lost before the newest checkpoint was made.
    pub(super) some: AtomicBool,
}

impl Losses {
    pub(super) fn new(options: &Options) -> Self {
        Losses {
            policy: options.on_tracking_error,
            noted: Mutex::new(false),
            unsaved: Mutex::new(None),
            troubles: Mutex::new(Vec::new()),
            some: AtomicBool::new(false),
        }
    }

    /// Keeps what an operator has to know; false where it is known.
    fn trouble(&self, what: String) -> bool {
        let mut troubles = self.troubles.lock();
        let new = !troubles.contains(&what);
        if new {
            troubles.push(what);
        }
        new
    }
}

/// Why nothing is believed of what an image with a note is found with, or of one whose note cannot be read.
pub(super) fn noted(image: &dyn Image) -> Option<String> {
    match image.note() {
        Ok(note) => note.map(|why| format!("tracking was lost while the disk was served: {why}")),
        Err(e) => Some(format!("whether tracking was lost cannot be read from the image: {e}")),
    }
}

/// Notes when the loss that a recovery found came to light.
pub(super) fn note_found(directory: &mut Directory) {
    let everything = recording_checkpoint(directory).and_then(|entry| entry.bitmap.everything.clone());
    if let Some(reason) = everything.filter(|reason| directory.lost.as_ref().is_none_or(|lost| lost.reason != *reason))
    {
        directory.lost = Some(Loss { reason, time_ns: now_ns() });
    }
}

/// Sets the reason on the interval that records; `before`: on the one before it, too.
fn set_everything(directory: &mut Directory, loss: &Loss, before: bool) {
    for user in directory.bitmaps.iter_mut().filter(|user| user.state == UserBitmapState::Recording) {
        user.bitmap.everything.get_or_insert_with(|| loss.reason.clone());
    }
    let count = if before { 2 } else { 1 };
    if recording_checkpoint(directory).is_some() {
        for entry in directory.checkpoints.iter_mut().rev().take(count) {
            entry.bitmap.everything.get_or_insert_with(|| loss.reason.clone());
        }
        if directory.lost.as_ref().is_none_or(|lost| lost.reason != loss.reason) {
            directory.lost = Some(loss.clone());
        }
    }
}

/// Users' bitmaps come back as they were, but for losses that `now` has of those of the same names.
pub(super) fn keep_lost(back: &mut [UserBitmap], now: &[UserBitmap]) {
    for user in back.iter_mut().filter(|user| user.state == UserBitmapState::Recording) {
        let lost = now.iter().find(|other| other.name == user.name).and_then(|other| other.bitmap.everything.clone());
        user.bitmap.everything = user.bitmap.everything.take().or(lost);
    }
}

pub(super) fn recording_uuid(directory: &Directory) -> Option<Uuid> {
    recording_checkpoint(directory).map(|entry| entry.uuid)
}

impl Disk {
    /// Changes since the newest checkpoint are not known from here on.
    pub(super) fn lose_tracking(&self, reason: &str) {
        self.lose(reason, false);
    }

    /// The same; `before`: nor are those of the interval before it.
    pub(super) fn lose(&self, reason: &str, before: bool) {
        self.tracking.mark_all();
        let told = self.losses.some.load(Ordering::SeqCst);
        let was_lost = match recording_uuid(&self.tracking.directory()) {
            Some(_) => self.tracking_loss().is_some(),
            None => told,
        };
        let loss = Loss { reason: reason.to_owned(), time_ns: now_ns() };
        let saved = self.tracking.sidecar.commit(|directory| {
            set_everything(directory, &loss, before);
            Ok(())
        });
        if let Err(e) = saved {
            log::warn!("disk '{}': {e}", self.name());
            *self.losses.unsaved.lock() = Some((recording_uuid(&self.tracking.directory()), loss));
            self.note_on_image(reason);
        }
        // Those that have come into the directory meanwhile got the reason, too.
        self.tracking.mark_all();
        self.losses.some.store(true, Ordering::SeqCst);
        if was_lost {
            return log::debug!("disk '{}': tracking was lost already: {reason}", self.name());
        }
        self.counters.tracking_lost.add(1);
        self.events.emit(&Event::TrackingLost { disk: self.name().to_owned(), reason: reason.to_owned() });
    }

    /// After recording bitmaps were replaced: a flush that failed meanwhile has been noted on those before.
    pub(super) fn renew_loss(&self) {
        let Some(reason) = self.flush_failure() else { return };
        let directory = self.tracking.directory();
        let checkpoint = recording_checkpoint(&directory).is_some_and(|entry| entry.bitmap.everything.is_none());
        let recording = |user: &&UserBitmap| user.state == UserBitmapState::Recording;
        let mut users = directory.bitmaps.iter().filter(recording);
        if checkpoint || users.any(|user| user.bitmap.everything.is_none()) {
            // Where the newest checkpoint does not know, it was made meanwhile, and the interval before may not either.
            self.lose(&reason, checkpoint);
        }
    }

    /// What the directory could not take is tried again.
    pub(super) fn save_loss(&self) {
        let unsaved = self.losses.unsaved.lock().clone();
        let Some((_, loss)) = unsaved else { return };
        let saved = self.tracking.sidecar.commit(|directory| {
            set_everything(directory, &loss, false);
            Ok(())
        });
        if saved.is_ok() {
            self.losses.unsaved.lock().take_if(|(_, other)| *other == loss);
        }
    }

    /// A change that is about to be made cannot be recorded so that a power loss does not undo that. No gate is held. Ok:
    /// the guest's write goes on; tracking is lost, which stands on the image by now, and need not be kept any more in this
    /// session. An error (EIO) is the guest's: the write must not be made, and nothing is lost.
    pub fn tracking_failed(&self, e: &Error) -> Result<()> {
        self.counters.tracking_errors.add(1);
        if self.losses.policy == TrackingErrorPolicy::FailWrite {
            let what = format!("writes are refused while they cannot be recorded: {e}");
            if self.losses.trouble(what.clone()) {
                log::error!("disk '{}': {what}", self.name());
            }
            let what = format!("write to disk '{}' refused, it cannot be recorded", self.name());
            return Err(Error::new(errno::EIO, what, e.to_string())
                .hint("make room for the state directory, or mount with --on-tracking-error continue"));
        }
        if !(*self.losses.noted.lock() && self.tracking_loss().is_some()) {
            let reason = format!("changes could not be recorded: {e}");
            self.note_on_image(&reason);
            self.lose_tracking(&reason);
        }
        // A checkpoint that began meanwhile may have taken the note away. Given up only now: whoever finds that goes on
        // at once.
        let mut noted = self.losses.noted.lock();
        self.note_in(&mut noted, &format!("changes could not be recorded: {e}"));
        self.give_up_arming();
        Ok(())
    }

    /// Where there is no place for the note, only status and log have it: a power loss would forget it.
    pub(super) fn note_on_image(&self, reason: &str) {
        self.note_in(&mut self.losses.noted.lock(), reason);
    }

    fn note_in(&self, noted: &mut bool, reason: &str) {
        if *noted || self.read_only() {
            return;
        }
        // It changes the image's times, and that was us.
        self.tracking.note_write();
        let done = self.image().set_note(Some(reason));
        self.tracking.note_write();
        *noted = done.is_ok();
        if let Err(e) = done {
            let what = "that tracking was lost is not noted anywhere, and maps miss changes if the host stops now";
            if self.losses.trouble(format!("{what}: {e}")) {
                log::error!("disk '{}': {what}: {e}; take a full backup after a stop of the host", self.name());
            }
        }
    }

    /// The note that the open found goes: the directory says everything by now.
    pub(super) fn take_note_away(&self) {
        self.take_away(&mut self.losses.noted.lock());
    }

    fn take_away(&self, noted: &mut bool) {
        *noted = false;
        if self.read_only() || !matches!(self.image().note(), Ok(Some(_))) {
            return;
        }
        self.tracking.note_write();
        let done = self.image().set_note(None);
        self.tracking.note_write();
        if let Err(e) = done {
            *noted = true;
            log::warn!("disk '{}': {e}; the next mount says everything, too", self.name());
        }
    }

    /// All that was not recorded is armed, or (`durable`) the disk is closed and all of it is durable: unless the directory
    /// lacks a loss, no note is needed. Whether there was one.
    pub(super) fn note_is_over(&self, durable: bool) -> bool {
        let mut noted = self.losses.noted.lock();
        // Given up again under this lock, see `tracking_failed`.
        let over = *noted && self.losses.unsaved.lock().is_none() && (durable || !self.regions.given_up());
        if over {
            self.take_away(&mut noted);
        }
        over
    }

    /// The session goes on after a close that failed.
    pub(super) fn note_again(&self) {
        if self.regions.given_up() {
            let reason = self.tracking_loss().map(|loss| loss.reason);
            self.note_on_image(reason.as_deref().unwrap_or("changes could not be recorded"));
        }
    }

    /// Why changes since the newest checkpoint are not known, and since when, where they aren't.
    pub(super) fn tracking_loss(&self) -> Option<Loss> {
        let directory = self.tracking.directory();
        let entry = recording_checkpoint(&directory);
        if let Some((checkpoint, loss)) = &*self.losses.unsaved.lock()
            && *checkpoint == entry.map(|entry| entry.uuid)
        {
            return Some(loss.clone());
        }
        let entry = entry?;
        let reason = entry.bitmap.everything.clone()?;
        let known = directory.lost.clone().filter(|loss| loss.reason == reason);
        // At the latest then: an interval that was merged with a lost one.
        Some(known.unwrap_or(Loss { reason, time_ns: entry.time_ns }))
    }

    /// How exact maps since the newest checkpoint are, in words.
    pub(super) fn tracking_text(&self) -> String {
        if let Some(loss) = self.tracking_loss() {
            return format!("everything: {}", loss.reason);
        }
        let directory = self.tracking.directory();
        match recording_checkpoint(&directory) {
            Some(entry) if self.was_inexact(entry.uuid) => format!("exact since '{}'", entry.name),
            _ => self.origin.clone(),
        }
    }

    /// Something before the checkpoint that records now was lost, or what was found at the open is about an interval
    /// before it.
    fn was_inexact(&self, recording: Uuid) -> bool {
        let later = self.origin != EXACT && self.opened_with != Some(recording);
        later || self.losses.some.load(Ordering::SeqCst)
    }

    /// The same for programs; None where they are exact.
    pub(super) fn tracking_loss_info(&self) -> Option<TrackingLoss> {
        self.tracking_loss().map(|loss| TrackingLoss { reason: loss.reason, since: rfc3339(loss.time_ns) })
    }

    /// What an operator has to know of all this.
    pub(super) fn tracking_problems(&self) -> Vec<String> {
        let mut problems = self.losses.troubles.lock().clone();
        if let Some(loss) = self.tracking_loss_info() {
            let since = format!("{} (since {})", loss.reason, loss.since);
            problems.insert(0, format!("changes are not known, maps say everything: {since}"));
        }
        problems.into_iter().map(|problem| format!("disk '{}': {problem}", self.name())).collect()
    }
}
