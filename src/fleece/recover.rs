//! Opening a disk's tracking state, and closing it.
//!
//! What an open finds, and what it may believe:
//!
//! | found | believed |
//! | --- | --- |
//! | no `dirty.log` | nothing is known; tracking starts |
//! | CLEAN, and the image bears the stamp | everything is exact; kept views are whole |
//! | OPEN, words with our nonce of this boot are there, the image was not written after the clock word (+ 1 s) | exact: the daemon was killed; views are whole |
//! | OPEN, another boot or no such words, and nobody else wrote as far as the heartbeat tells (see `foreign`) | the saved bits, and all of the regions whose intent is set: a power loss. Views are dropped |
//! | a note on the image, or a block device that is not trusted, see `foreign` | nothing, as in the last row |
//! | a mark in the image, see `persistent` | exact where it proves that nobody else wrote, or where the image's own bitmap has what others wrote |
//! | anything else | changes since the newest checkpoint are not known: its bitmap says everything; views are dropped |
//!
//! The order of an open: a new nonce; new words, filled completely; the bits of the recording bitmaps in new areas; the
//! intents that are found, or all where the image may not be durable for reasons of others, or none after a clean close;
//! the superblock {OPEN, nonce}, durable; the directory with the outcome; only then the old words go, a note on the image
//! is taken away, and writes are accepted. A crash at any point recovers from the same facts: until the directory stands,
//! a power loss finds the old areas and no fewer intents. A kill finds the old words until the superblock stands; from
//! then on the new ones, which hold the
//! outcome (bits all set where everything counts as dirty) under the unchanged or the new directory. Between the
//! directory and the first write the image's own bitmaps are taken over.

use super::chain::Chain;
use super::counters::Counters;
use super::disk::{Disk, DiskParts, EXACT};
use super::events::{Event, Events};
use super::found::{Found, open_sidecar, regions_of};
use super::keep;
use super::layer::{Layer, PARTS, word_name};
use super::pace::Pace;
use super::persistent::{Bitmaps, Proof};
use super::place::{self, Environment, Place};
use super::regions::Regions;
use super::store::{StoreIo, Stores};
use super::tracking::{
    CLOCK, CLOCK_WORDS, Recording, Tracking, fine_name, recording_checkpoint, recording_entry, start_clock, with_area,
};
use super::transaction;
use super::{BlockDevicePolicy, Options};
use crate::bitmap::{
    BitmapEntry, Bits, CheckpointState, Directory, DirtyBitmap, INTENT_REGIONS, LayerEntry, PreparedAction, Sidecar,
    State,
};
use crate::error::{Error, Result, errno};
use crate::image::Image;
use crate::storage::Shm;
use crate::storage::clock::now_ns;
use crate::sync::Mutex;
use crate::sync::atomic::Ordering;
use crate::units::human_size;
use std::sync::Arc;
use uuid::Uuid;
/// What all disks of a mount share.
pub(super) struct Shared<'a> {
    pub options: &'a Options,
    pub env: &'a Environment,
    pub stores: &'a Arc<Stores>,
    pub counters: &'a Arc<Counters>,
    pub pace: &'a Arc<Pace>,
    pub events: &'a Arc<Events>,
    pub recovered: &'a Mutex<Vec<(String, String)>>,
    /// What is believed of this disk where it is on a block device.
    pub block_devices: BlockDevicePolicy,
    /// Disks that are served already: one of them may coordinate a prepared change.
    pub known: Vec<Arc<Disk>>,
}

/// Opens the state of one disk, recovers what can be believed, and makes the disk.
pub(super) fn open(name: &str, image: Arc<dyn Image>, mut place: Place, shared: Shared<'_>) -> Result<Disk> {
    let root = place.shm.clone().unwrap_or_else(|| shared.env.shm.clone());
    let (sidecar, found, proof) = open_sidecar(name, &*image, &*place.state, &*root, shared.block_devices)?;
    let bitmaps = Bitmaps::new(&*image, proof)?;
    let kept = matches!(found, Found::Clean | Found::Killed(_));
    if let Some(dir) = place::stores_in_use(kept, &sidecar.directory(), &*place.stores)? {
        log::warn!("disk '{name}': stores stay in {} while it has snapshots there", dir.path("").display());
        place.stores = dir;
    }
    let store_io = store_io(name, &place, &shared);
    let nonce = Uuid::new_v4();
    let shm: Arc<dyn Shm> = Arc::from(root.create(&nonce.to_string())?);
    let opened = Opening {
        name,
        image: &*image,
        sidecar: &sidecar,
        shm: &*shm,
        store_io: &store_io,
        shared: &shared,
        bitmaps: &bitmaps,
    };
    let mut state = opened.recover(&found).inspect_err(|_| {
        let _ = shm.remove_all();
    })?;
    super::lost::note_found(&mut state.directory);
    let clock = shm.create(CLOCK, CLOCK_WORDS)?;
    start_clock(&clock, &image.stamp()?);
    if proof == Proof::Ours {
        sidecar.commit(|directory| {
            bitmaps.keep_mark(&mut directory.in_image);
            Ok(())
        })?;
    }
    let mut superblock = sidecar.superblock();
    let old_nonce = match &superblock.state {
        State::Open { nonce, .. } => Some(*nonce),
        State::Clean { .. } => None,
    };
    superblock.state = State::Open { nonce, boot_id: root.boot_id() };
    superblock.heartbeat_ns = now_ns();
    let (region_size, armed) = regions_of(&found, &sidecar, &*image);
    let regions = Regions::new(region_size, armed.iter().copied());
    // What was read may stand in the page cache only. Where the size changes, every bit is set meanwhile; after a clean
    // close they mean nothing.
    let changes = region_size != superblock.region_size && !matches!(found, Found::Clean);
    sidecar.reset_intents(if changes { 0..INTENT_REGIONS } else { 0..0 }.chain(armed.iter().copied()))?;
    superblock.region_size = region_size;
    sidecar.set_superblock(superblock)?;
    if changes {
        sidecar.reset_intents(armed.into_iter())?;
    }
    sidecar.commit(|directory| {
        *directory = state.directory.clone();
        Ok(())
    })?;
    for sealed in state.directory.checkpoints.iter().filter(|entry| entry.state != CheckpointState::Recording) {
        shm.remove(&fine_name(sealed.bitmap.uuid))?;
    }
    if let Some(old) = old_nonce.filter(|old| *old != nonce)
        && let Some(old) = root.find(&old.to_string())?
        && super::foreign::are_of(&*old, &*image)?
    {
        old.remove_all()?;
    }
    if matches!(found, Found::Clean) {
        for entry in &state.directory.layers {
            keep::forget(&store_io, entry.uuid)?;
        }
    }
    if let Err(e) = remove_strays(&store_io, &state.directory) {
        log::warn!("disk '{name}': leftover stores could not be removed: {e}");
    }
    let origin = tell(name, &found, &state, &shared);
    let tracking = Tracking::new(sidecar, shm, clock, state.recording);
    let parts = DiskParts {
        name: name.to_owned(),
        image,
        chain: Chain { layers: state.layers },
        tracking,
        regions,
        state: place.state,
        store_io,
        counters: shared.counters.clone(),
        pace: shared.pace.clone(),
        events: shared.events.clone(),
        origin,
        lock: place.lock,
    };
    let disk = Disk::new(parts, shared.options);
    disk.losses.some.store(disk.tracking_loss().is_some(), Ordering::SeqCst);
    disk.note_look();
    disk.take_note_away();
    disk.begin_in_image()?;
    Ok(disk)
}

fn store_io(name: &str, place: &Place, shared: &Shared<'_>) -> Arc<StoreIo> {
    let (events, disk) = (shared.events.clone(), name.to_owned());
    let warn = move |used, limit| events.emit(&Event::StoreNearlyFull { disk: disk.clone(), used, limit });
    StoreIo::new(place.stores.clone(), shared.stores.clone(), Box::new(warn))
}

/// Removes what no directory entry names: layers that were dropped now, or whose removal a crash cut off.
fn remove_strays(io: &Arc<StoreIo>, directory: &Directory) -> Result<()> {
    let names = io.run("list the stores", |io| io.dir.list("layers"))?;
    let strays = names.iter().filter_map(|name| Uuid::parse_str(name).ok());
    for stray in strays.filter(|uuid| directory.layers.iter().all(|entry| entry.uuid != *uuid)) {
        io.remove_later(stray);
    }
    Ok(())
}

/// Logs what was found, hands it on as an event, and returns it for status.
fn tell(name: &str, found: &Found, state: &Recovered, shared: &Shared<'_>) -> String {
    // Where the image's own bitmap was looked at in vain, the checkpoint says so.
    let full = |reason: &String| -> String {
        let told = recording_checkpoint(&state.directory).and_then(|entry| entry.bitmap.everything.clone());
        told.filter(|told| told.starts_with(reason.as_str())).unwrap_or_else(|| reason.clone())
    };
    let origin = match found {
        Found::New => "tracking starts".to_owned(),
        Found::Clean => EXACT.to_owned(),
        Found::Killed(_) => "exact after a kill".to_owned(),
        Found::PowerLoss { .. } if state.recorded => "exact after a power loss".to_owned(),
        Found::PowerLoss { armed, region_size } => after_power_loss(state, armed, *region_size),
        Found::Lost(_) if state.recorded => "exact after writes of another program".to_owned(),
        Found::Lost(reason) => format!("everything: {}", full(reason)),
    };
    let event = match found {
        Found::New | Found::Clean => None,
        Found::Killed(_) | Found::PowerLoss { .. } => {
            Some(Event::Recovered { disk: name.to_owned(), how: origin.clone() })
        }
        Found::Lost(_) if state.recorded => Some(Event::Recovered { disk: name.to_owned(), how: origin.clone() }),
        Found::Lost(reason) => Some(Event::TrackingLost { disk: name.to_owned(), reason: full(reason) }),
    };
    if let Some(event) = event {
        shared.events.emit(&event);
        let lost = matches!(event, Event::TrackingLost { .. });
        shared.counters.tracking_lost.add(u64::from(lost));
        // Of a loss status tells as long as it lasts, which is to the next checkpoint.
        if !lost || recording_checkpoint(&state.directory).is_none() {
            shared.recovered.lock().push((name.to_owned(), event.to_string()));
        }
    }
    if !state.dropped_views.is_empty() {
        let text = format!("disk '{name}': snapshots {} could not be kept", state.dropped_views.join(", "));
        log::warn!("{text}");
        shared.recovered.lock().push((name.to_owned(), text));
    }
    origin
}

/// How exact maps are after a power loss, for status.
fn after_power_loss(state: &Recovered, armed: &[u64], region_size: u64) -> String {
    let reason = recording_checkpoint(&state.directory).and_then(|entry| entry.bitmap.everything.clone());
    let count = armed.iter().filter(|region| region.saturating_mul(region_size) < state.directory.size).count();
    match (reason, count) {
        (Some(reason), _) => format!("everything: {reason}"),
        (None, 0) => "exact after a power loss".to_owned(),
        (None, 1) => format!("exact after a power loss but for 1 region of {}", human_size(region_size)),
        (None, _) => format!("exact after a power loss but for {count} regions of {}", human_size(region_size)),
    }
}

struct Opening<'a> {
    name: &'a str,
    image: &'a dyn Image,
    sidecar: &'a Sidecar,
    shm: &'a dyn Shm,
    store_io: &'a Arc<StoreIo>,
    shared: &'a Shared<'a>,
    bitmaps: &'a Bitmaps<'a>,
}

/// The outcome of a recovery: the directory to be, and what stands in memory.
struct Recovered {
    directory: Directory,
    recording: Vec<Recording>,
    /// What another program wrote is in the image's own bitmap.
    recorded: bool,
    layers: Vec<Arc<Layer>>,
    dropped_views: Vec<String>,
}

impl Opening<'_> {
    fn recover(&self, found: &Found) -> Result<Recovered> {
        let mut directory = (*self.sidecar.directory()).clone();
        let old: Option<&dyn Shm> = match found {
            Found::Killed(words) => Some(&**words),
            _ => None,
        };
        let nobody_wrote = match self.bitmaps.proof {
            Proof::NoMark => matches!(found, Found::Clean | Found::Killed(_) | Found::PowerLoss { .. }),
            proof => proof == Proof::Ours,
        };
        directory.in_image.checkpoints = self.bitmaps.checkpoint_names(&directory, nobody_wrote);
        let extra = self.settle_prepared(&mut directory, found, old)?;
        let (checkpoint, recorded) = self.recover_recording(&mut directory, found, extra)?;
        let known = super::users::Known {
            nobody_wrote,
            clean: matches!(self.sidecar.superblock().state, State::Clean { .. }),
            bits: &|entry| match found {
                // What a close did not write, it did not know of: a change that was prepared names it.
                Found::Clean => entry.crc.and_then(|_| self.saved(entry).ok()),
                _ => self.recorded(found, entry).ok(),
            },
        };
        let (users, entries) = super::users::recover(self.bitmaps, &directory, self.shm, &known)?;
        directory.bitmaps = entries;
        self.bitmaps.keep_mark(&mut directory.in_image);
        let mut state = Recovered {
            directory,
            recording: checkpoint.into_iter().chain(users).collect(),
            recorded,
            layers: Vec::new(),
            dropped_views: Vec::new(),
        };
        self.recover_layers(&mut state, found, old);
        state.directory.size = self.image.size();
        self.give_areas(&mut state)?;
        Ok(state)
    }

    /// Makes a prepared change, or takes it back; see `transaction`. Returns a bitmap whose bits belong to the one
    /// that records: what the bitmap of a snapshot that was taken back had recorded by then.
    fn settle_prepared(
        &self,
        directory: &mut Directory,
        found: &Found,
        old: Option<&dyn Shm>,
    ) -> Result<Option<DirtyBitmap>> {
        let Some(prepared) = directory.prepared.take() else { return Ok(None) };
        let coordinator = self.shared.known.iter().find(|disk| disk.uuid() == prepared.coordinator);
        let committed =
            coordinator.is_some_and(|disk| disk.tracking.directory().committed.contains(&prepared.transaction));
        if committed {
            let sealed = match (&prepared.action, recording_checkpoint(directory)) {
                (PreparedAction::Snapshot { .. }, Some(last)) => Some(self.seal_old(&last.bitmap, found)?),
                _ => None,
            };
            transaction::apply(directory, &prepared.action, sealed);
            log::warn!("disk '{}': a change of several disks was made after the crash", self.name);
            return Ok(None);
        }
        let PreparedAction::Snapshot { layer, checkpoint, .. } = prepared.action else { return Ok(None) };
        directory.next_layer = directory.next_layer.max(layer.seq + 1);
        if old.map(|old| old.open(&word_name(layer.uuid, PARTS[0]))).transpose()?.flatten().is_some() {
            // It may have been published, and older views may look through it: it stays, hidden. Without words it never
            // was.
            directory.layers.push(LayerEntry { snapshot: None, ..layer });
        }
        log::warn!(
            "disk '{}': snapshot '{}' was not finished before the crash; it is dropped",
            self.name,
            checkpoint.name
        );
        self.bits_of(found, &checkpoint.bitmap)
    }

    /// The bitmap that a committed snapshot sealed, saved now.
    fn seal_old(&self, entry: &BitmapEntry, found: &Found) -> Result<BitmapEntry> {
        let bitmap = match self.bits_of(found, entry)? {
            // Until the directory says that it is sealed, a kill comes here again.
            Some(bitmap) => {
                let bits = bitmap.bits();
                let words = self.shm.create(&fine_name(entry.uuid), Bits::words_for(bits.len()))?;
                keep::fill(&words, bits.words());
                bitmap
            }
            None => {
                let reason = "the host stopped while a snapshot was taken".to_owned();
                return Ok(BitmapEntry { everything: Some(reason), ..entry.clone() });
            }
        };
        let area = self.sidecar.allocate((Bits::words_for(bitmap.bits().len()) * 8) as u64)?;
        let crc = self.sidecar.write_bits(&area, bitmap.bits())?;
        Ok(BitmapEntry { area: Some(area), crc: Some(crc), dirty: bitmap.count_bytes(), ..entry.clone() })
    }

    /// The bitmap of the checkpoint that records, in new words of the image's present size, and whether the image had it
    /// where nothing else is known.
    fn recover_recording(
        &self,
        directory: &mut Directory,
        found: &Found,
        extra: Option<DirtyBitmap>,
    ) -> Result<(Option<Recording>, bool)> {
        let Some(index) = recording_checkpoint(directory).map(|_| directory.checkpoints.len() - 1) else {
            return Ok((None, false));
        };
        let entry = directory.checkpoints[index].bitmap.clone();
        let kept = entry.crc.is_some().then(|| self.saved(&entry));
        let stored = self.bitmaps.checkpoint(directory, &directory.checkpoints[index], kept);
        let recorded = stored.is_ok() && entry.everything.is_none();
        let known: std::result::Result<DirtyBitmap, String> = match (stored, found) {
            (Ok(bitmap), _) => Ok(bitmap),
            (_, Found::Killed(_) | Found::PowerLoss { .. }) => self.recorded(found, &entry),
            (_, Found::Clean) if entry.crc.is_some() => self.saved(&entry),
            (Err(why), Found::Lost(reason)) if self.bitmaps.proof == Proof::SinceClose => {
                Err(format!("{reason}, and {why}"))
            }
            (_, Found::Lost(reason)) => Err(reason.clone()),
            (_, Found::New | Found::Clean) => Err("it was never saved".to_owned()),
        };
        let size = self.image.size();
        let bits = DirtyBitmap::bits_for(entry.granularity, size)?;
        let words = Bits::zeroed(self.shm.create(&fine_name(entry.uuid), Bits::words_for(bits))?, bits);
        let mut everything = entry.everything.clone();
        let bitmap = match known {
            Ok(bitmap) => {
                if let Some(extra) = &extra {
                    bitmap.merge_from(extra);
                }
                bitmap.resized(size, words, true)?
            }
            Err(reason) => {
                let bitmap = DirtyBitmap::new(entry.granularity, size, words)?;
                bitmap.mark_all();
                everything.get_or_insert(reason);
                bitmap
            }
        };
        let recording = Recording { uuid: entry.uuid, bitmap: Arc::new(bitmap), area: None };
        directory.checkpoints[index].bitmap = BitmapEntry { everything, ..recording_entry(&recording) };
        Ok((Some(recording), recorded && matches!(found, Found::Lost(_) | Found::PowerLoss { .. })))
    }

    /// The bits of a bitmap as they were recorded when the last session ended: from its words, or what is durable of them
    /// in its area.
    fn bits_of(&self, found: &Found, entry: &BitmapEntry) -> Result<Option<DirtyBitmap>> {
        match found {
            Found::Killed(old) => words_of(&**old, entry),
            Found::PowerLoss { .. } => Ok(self.saved(entry).ok()),
            _ => Ok(None),
        }
    }

    /// What a bitmap that recorded must hold; after a power loss all of the armed regions too. The error is the reason
    /// why it is not known.
    fn recorded(&self, found: &Found, entry: &BitmapEntry) -> std::result::Result<DirtyBitmap, String> {
        let known = match found {
            Found::PowerLoss { .. } => self.saved(entry)?,
            _ => self.bits_of(found, entry).map_err(|e| e.to_string())?.ok_or("its bitmap in memory is gone")?,
        };
        if entry.everything.is_some() {
            known.mark_all();
        }
        if let Found::PowerLoss { armed, region_size } = found {
            armed.iter().for_each(|region| known.mark(region.saturating_mul(*region_size), *region_size));
        }
        Ok(known)
    }

    /// Every bitmap that records has its bits in a new area: the old ones stay as they are until the directory with the
    /// outcome stands. One that does not record any more keeps none that is not final.
    fn give_areas(&self, state: &mut Recovered) -> Result<()> {
        for recording in &mut state.recording {
            *recording = with_area(self.sidecar, recording.clone())?;
        }
        for entry in state.directory.all_bitmaps_mut().filter(|entry| entry.crc.is_none()) {
            entry.area = state.recording.iter().find(|one| one.uuid == entry.uuid).and_then(|one| one.area);
        }
        Ok(())
    }

    fn saved(&self, entry: &BitmapEntry) -> std::result::Result<DirtyBitmap, String> {
        let area = entry.area.as_ref().ok_or("its bitmap was not saved")?;
        let load = || {
            let bits =
                self.sidecar.read_bits(area, DirtyBitmap::bits_for(entry.granularity, entry.size)?, entry.crc)?;
            DirtyBitmap::new(entry.granularity, entry.size, bits)
        };
        load().map_err(|e| format!("its saved bitmap cannot be read: {e}"))
    }

    /// The layers with their states; all go where one that others look through cannot be believed.
    fn recover_layers(&self, state: &mut Recovered, found: &Found, old: Option<&dyn Shm>) {
        let mut entries = std::mem::take(&mut state.directory.layers);
        let mut layers = Vec::new();
        let mut failure = None;
        for entry in &mut entries {
            let words = match (found, old) {
                (Found::Killed(_), Some(old)) => keep::take_over(old, self.shm, entry),
                (Found::Clean, _) => keep::load(self.store_io, self.shm, entry),
                _ => Err(Error::new(errno::ENOENT, "view", "what it held is not known after the crash")),
            };
            let made = words.and_then(|words| Ok((words, self.store_io.reopen(entry.uuid, entry.size)?)));
            match made {
                Ok((words, store)) => {
                    let layer = Layer::new(entry.uuid, entry.seq, entry.size, entry.chunk, store, words);
                    if !layer.is_viewed() {
                        entry.snapshot = None;
                    }
                    if entry.snapshot.is_none() {
                        layer.hide();
                    }
                    layers.push(Arc::new(layer));
                }
                Err(e) => {
                    failure = Some(e);
                    break;
                }
            }
        }
        match failure {
            None => {
                state.directory.layers = entries;
                state.layers = layers;
            }
            Some(e) => {
                log::warn!("disk '{}': its snapshots are dropped: {e}", self.name);
                state.dropped_views =
                    entries.iter().filter_map(|entry| Some(format!("'{}'", entry.snapshot.as_ref()?.name))).collect();
            }
        }
    }
}

/// A recording bitmap in the words of a killed daemon, as a copy of its recorded size.
fn words_of(old: &dyn Shm, entry: &BitmapEntry) -> Result<Option<DirtyBitmap>> {
    let Some(words) = old.open(&fine_name(entry.uuid))? else { return Ok(None) };
    let bits = DirtyBitmap::bits_for(entry.granularity, entry.size)?;
    if words.len() != Bits::words_for(bits) {
        return Ok(None);
    }
    let mut copy = Bits::heap(bits);
    copy.or_words(0, words.iter().map(|word| word.load(Ordering::SeqCst)));
    DirtyBitmap::new(entry.granularity, entry.size, copy).map(Some)
}
