//! Checkpoints on their way to another mount: what changed since one, with a proof of what the disk held then.
//!
//! An export freezes the disk for a moment, takes what changed from the checkpoint up to that instant, and the SHA-256 of what
//! the disk held at it. An import freezes its disk, too, and believes the bits only where that holds the very same bytes.
//!
//! Invariants:
//! - **X1 Equal content is the only proof.** Names, sizes, times and identities say nothing of what was written to an image
//!   between: two reads of the whole disk do. Holes are not read.
//! - **X2 One instant.** The bits of an export are taken in one batch with its view, over all checkpoints from the one that is
//!   exported: where the list of them changed around the batch, it is done again.
//! - **X3 Nothing between proof and record.** The snapshot of an import makes a checkpoint, which records from its instant on
//!   and cannot be deleted while that is open. The imported one is put right before it, and nowhere else: what it knows
//!   is true up to that instant, so older views and points must not count from it.
//! - **X4 The bits are those that were exported**: the file has the SHA-256 of them and of their granularity.

use super::batch::{Action, BitmapRef, Refused};
use super::fleece::Fleece;
use super::hold::HoldEnd;
use super::info::rfc3339;
use super::skip::Skip;
use super::snapshot::SnapshotRequest;
use super::tracking::Recording;
use super::{Disk, Frozen, View};
use crate::bitmap::{Bits, CheckpointEntry, CheckpointState, Directory, DirtyBitmap};
use crate::error::{Error, Result, errno};
use crate::image::persistent::NewBitmap;
use crate::image::qcow2::carrier::{self, Carried};
use crate::storage::buffer::is_zero;
use crate::units::check_name;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::path::Path;
use std::sync::Arc;
use uuid::Uuid;

/// Version of the note.
const NOTE_VERSION: u32 = 1;
/// How often an export begins anew because checkpoints came or went.
const TRIES: u32 = 8;
/// What is read at once, and the unit of the digest, which leaves out units of zeros.
const PIECE_BYTES: u64 = 1 << 20;
const UNIT_BYTES: usize = 64 << 10;
/// How the snapshot of an import is named: the disk's name and a UUID stand behind it.
pub const IMPORT_PREFIX: &str = "import-";

/// What stands in the file beside the bits.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Note {
    version: u32,
    checkpoint: String,
    uuid: Uuid,
    /// Of the checkpoint, in nanoseconds since the epoch.
    time_ns: i64,
    completed: bool,
    disk: String,
    /// Of the disk, in all mounts that its checkpoints have been in.
    identities: Vec<Uuid>,
    size: u64,
    /// What the disk held at the instant up to which the bits go; see [`digest`].
    content_sha256: String,
    bits_sha256: String,
}

/// A checkpoint that was exported or imported.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CarriedInfo {
    /// Name of the checkpoint.
    pub checkpoint: String,
    /// Its identity.
    pub uuid: Uuid,
    /// Its instant, RFC 3339, UTC.
    pub time: String,
    /// The disk.
    pub disk: String,
    /// Size of the disk in bytes.
    pub size: u64,
    /// Bytes that changed since.
    pub dirty: u64,
}

impl Note {
    fn info(&self, disk: &str, bits: &DirtyBitmap) -> CarriedInfo {
        CarriedInfo {
            checkpoint: self.checkpoint.clone(),
            uuid: self.uuid,
            time: rfc3339(self.time_ns),
            disk: disk.to_owned(),
            size: self.size,
            dirty: bits.count_bytes().min(self.size),
        }
    }
}

impl Fleece {
    /// Writes what changed on a disk since a checkpoint into a new file. ENOENT for an unknown disk or checkpoint, EEXIST where
    /// the file exists, ESTALE where changes since then are not known, EROFS for a read-only disk.
    ///
    /// All of the disk is read, but for holes. What the guest writes after the call began is not in the file, and an import into
    /// a copy that has it is refused.
    pub fn export_checkpoint(&self, name: &str, disk: &str, file: &Path) -> Result<CarriedInfo> {
        if std::fs::symlink_metadata(file).is_ok() {
            return Err(Error::new(errno::EEXIST, "export", "the file exists already").at_path(file));
        }
        let disk = self.disk(disk)?;
        if disk.read_only() {
            let why = format!("disk '{}' is served read-only, where nobody looks for other writers", disk.name());
            return Err(Error::new(errno::EROFS, "export", why).hint("mount it without -r"));
        }
        let (frozen, entry, bits) = self.changes_since(&disk, name)?;
        let there = || self.disk(disk.name()).map(drop);
        let note = Note {
            version: NOTE_VERSION,
            checkpoint: entry.name.clone(),
            uuid: entry.uuid,
            time_ns: entry.time_ns,
            completed: entry.completed,
            disk: disk.name().to_owned(),
            identities: disk.identities(),
            size: frozen.view().size(),
            content_sha256: digest(frozen.view(), &there)?,
            bits_sha256: sha256_of(bits.granularity(), bits.bits().words()),
        };
        self.check_nobody_wrote(&disk, &frozen, name)?;
        drop(frozen);
        let words: Vec<u64> = bits.bits().words().collect();
        let granularity_bits = bits.granularity().trailing_zeros() as u8;
        let bitmap = NewBitmap { name: &note.checkpoint, granularity_bits, auto: false, words: &words };
        let text = serde_json::to_vec(&note).map_err(|e| Error::new(errno::EINVAL, "export", e.to_string()))?;
        carrier::write(file, note.size, bitmap, &text)?;
        log::info!("checkpoint '{name}' of disk '{}' exported to {}", disk.name(), file.display());
        Ok(note.info(disk.name(), &bits))
    }

    /// A view of the disk, and what changed since a checkpoint up to its instant (X2).
    fn changes_since(&self, disk: &Disk, name: &str) -> Result<(Frozen, CheckpointEntry, DirtyBitmap)> {
        for _ in 0..TRIES {
            let before = disk.tracking.directory();
            let span = span_from(&before, name)?;
            let granularity = span.iter().map(|entry| entry.bitmap.granularity).min();
            let sum = BitmapRef::new(disk.name(), format!("export-{}", Uuid::new_v4().simple()));
            let applied = self.apply(&[
                Action::Freeze { disk: disk.name().to_owned(), record: None },
                Action::Add {
                    disk: disk.name().to_owned(),
                    name: sum.name.clone(),
                    granularity,
                    persistent: false,
                    disabled: true,
                },
                Action::Merge {
                    target: sum.clone(),
                    sources: span.iter().map(|entry| BitmapRef::new(disk.name(), &entry.name)).collect(),
                },
                Action::Hold(sum.clone()),
            ]);
            let same = checkpoints_are(&before, &disk.tracking.directory());
            let applied = match applied {
                Ok(applied) => applied,
                Err(_) if !same => continue,
                Err(e) => return Err(refused(name, e)),
            };
            let bits = applied.holds.first().map(|hold| copy_of(hold.bitmap())).transpose()?;
            for hold in &applied.holds {
                self.end_holds(&[(hold, HoldEnd::Reclaim)])?;
            }
            self.apply(&[Action::Remove(sum)]).map_err(|e| refused(name, e))?;
            let (Some(entry), Some(bits), Some(frozen)) = (span.first(), bits, applied.frozen.into_iter().next())
            else {
                break;
            };
            if same {
                return Ok((frozen, entry.clone(), bits));
            }
        }
        Err(Error::new(errno::EBUSY, format!("checkpoint '{name}'"), "checkpoints come and go all the time")
            .hint("try again"))
    }

    /// What somebody else wrote while the view was read may be in the digest, and is in no bit (X2).
    fn check_nobody_wrote(&self, disk: &Disk, frozen: &Frozen, name: &str) -> Result<()> {
        let _control = self.control.lock();
        disk.check_foreign()?;
        match frozen.view().broken() {
            Some(reason) => Err(unknown_since(name, &reason)),
            None => Ok(()),
        }
    }

    /// Makes the checkpoint in a file known for a disk (`None`: the one of the name that it had, or the only one). ESTALE where
    /// the disk does not hold what it held at the export, EEXIST where the name is taken, EINVAL for a file that is none, or
    /// of a disk of another size. All of the disk is read, but for holes.
    pub fn import_checkpoint(&self, file: &Path, disk: Option<&str>) -> Result<CarriedInfo> {
        let carried = carrier::read(file)?;
        let (note, bits) = parse(&carried).map_err(|e| e.at_path(file))?;
        let disk = self.disk_for(disk, &note)?;
        let what = || format!("checkpoint '{}'", note.checkpoint);
        if disk.size() != note.size {
            let why = format!("it is of a disk of {} bytes, and disk '{}' has {}", note.size, disk.name(), disk.size());
            return Err(Error::new(errno::EINVAL, what(), why).at_path(file));
        }
        self.check_importable(&disk, &note)?;
        let name = format!("{IMPORT_PREFIX}{}-{}", disk.name(), Uuid::new_v4().simple());
        // What a view leaves out reads as zeros, and would not be what the disk holds.
        let skip = Some(Skip::default());
        let disks = vec![disk.name().to_owned()];
        let snapshot =
            self.create_snapshot(&SnapshotRequest { name: name.clone(), disks, skip, ..Default::default() })?;
        let there = || self.snapshot(&name).map(drop);
        let imported = snapshot.view(disk.name()).and_then(|view| digest(view, &there)).and_then(|found| {
            if found != note.content_sha256 {
                let why = format!("disk '{}' does not hold what it held at the export", disk.name());
                let hint = "something was written to it since, or it is another disk: changes since the checkpoint are not known";
                return Err(Error::new(errno::ESTALE, what(), why).at_path(file).hint(hint));
            }
            self.put_before(&disk, snapshot.uuid(), &note, &bits)
        });
        drop(snapshot);
        // Its checkpoint goes to the one before it, which is the imported one: from here on that records.
        let cancelled = self.cancel_snapshot(&name);
        imported?;
        cancelled?;
        log::info!("checkpoint '{}' imported for disk '{}'", note.checkpoint, disk.name());
        Ok(note.info(disk.name(), &bits))
    }

    fn disk_for(&self, disk: Option<&str>, note: &Note) -> Result<Arc<Disk>> {
        if let Some(name) = disk {
            return self.disk(name);
        }
        match (self.disk(&note.disk), self.disks().as_slice()) {
            (Ok(disk), _) => Ok(disk),
            (Err(_), [only]) => Ok(only.clone()),
            (Err(e), _) => Err(e.hint("say which disk it is of with --disk")),
        }
    }

    /// A name stands for one checkpoint, on all disks.
    fn check_importable(&self, disk: &Disk, note: &Note) -> Result<()> {
        let name = &note.checkpoint;
        let taken = |who: &str| {
            Err(Error::new(errno::EEXIST, format!("checkpoint '{name}'"), format!("{who} of that name exists"))
                .hint(format!("`fleecefs checkpoint delete MNT {name}` would forget the one that is there")))
        };
        if self.snapshots().iter().any(|snapshot| snapshot.name() == *name) {
            return taken("a snapshot");
        }
        for other in self.disks() {
            let directory = other.tracking.directory();
            if directory.bitmaps.iter().any(|user| user.name == *name) {
                return taken("a bitmap");
            }
            let here = other.uuid() == disk.uuid();
            let clashes = |entry: &CheckpointEntry| match (entry.name == *name, entry.uuid == note.uuid) {
                (true, same) => here || !same,
                (false, same) => here && same,
            };
            if directory.checkpoints.iter().any(clashes) {
                return taken("a checkpoint");
            }
        }
        Ok(())
    }

    /// Puts the checkpoint right before that of the import's snapshot (X3).
    fn put_before(&self, disk: &Disk, snapshot: Uuid, note: &Note, bits: &DirtyBitmap) -> Result<()> {
        let _control = self.control.lock();
        self.settle()?;
        self.check_importable(disk, note)?;
        let open: Vec<Uuid> = self.snapshots().iter().map(|snapshot| snapshot.uuid()).collect();
        let tracking = &disk.tracking;
        let recording = Recording { uuid: Uuid::new_v4(), bitmap: Arc::new(copy_of(bits)?), area: None };
        let sealed = tracking.seal(&recording, None)?;
        let put = tracking.sidecar.commit(|directory| {
            let gone =
                || Error::new(errno::ENOENT, format!("checkpoint '{}'", note.checkpoint), "the disk was not kept");
            let index = directory.checkpoints.iter().position(|entry| entry.uuid == snapshot).ok_or_else(gone)?;
            let (before, after) = directory.checkpoints.split_at(index);
            // Clocks of hosts differ, and the list is in order of time.
            let latest = after.first().map_or(note.time_ns, |entry| note.time_ns.min(entry.time_ns));
            let time_ns = before.last().map_or(latest, |entry| latest.max(entry.time_ns));
            let entry = CheckpointEntry {
                uuid: note.uuid,
                name: note.checkpoint.clone(),
                time_ns,
                // Who counts from the newest completed one may have read one of this mount's, or be about to: an older
                // snapshot that is open may be completed yet.
                completed: note.completed && before.iter().all(|entry| !entry.completed && !open.contains(&entry.uuid)),
                bitmap: sealed.clone(),
                state: CheckpointState::Sealed,
            };
            directory.checkpoints.insert(index, entry);
            let new = |uuid: &&Uuid| !directory.identities.contains(uuid) && **uuid != directory.disk;
            let new: Vec<Uuid> = note.identities.iter().filter(new).copied().collect();
            directory.identities.extend(new);
            Ok(())
        });
        put.inspect_err(|_| tracking.abandon(&sealed))
    }
}

impl Disk {
    /// What this mount and others call the disk: points of backups are known by that.
    fn identities(&self) -> Vec<Uuid> {
        let directory = self.tracking.directory();
        std::iter::once(directory.disk).chain(directory.identities.iter().copied()).collect()
    }
}

/// The checkpoints from the one of that name on. ESTALE where what changed since is not known.
fn span_from(directory: &Directory, name: &str) -> Result<Vec<CheckpointEntry>> {
    let index = directory.checkpoints.iter().position(|entry| entry.name == name).ok_or_else(|| {
        Error::new(errno::ENOENT, format!("checkpoint '{name}'"), "no such checkpoint of this disk")
            .hint("list them with `fleecefs checkpoint list`")
    })?;
    let span = directory.checkpoints.get(index..).unwrap_or_default().to_vec();
    match span.iter().find_map(|entry| entry.bitmap.everything.as_ref()) {
        Some(reason) => Err(unknown_since(name, reason)),
        None => Ok(span),
    }
}

fn unknown_since(name: &str, reason: &str) -> Error {
    Error::new(errno::ESTALE, format!("checkpoint '{name}'"), reason)
        .hint("what changed since is not known: the next backup is a full one")
}

/// Whether both have the same checkpoints with the same bitmaps, and know as much.
fn checkpoints_are(one: &Directory, other: &Directory) -> bool {
    let of = |directory: &Directory| -> Vec<(Uuid, Uuid, bool)> {
        let key = |entry: &CheckpointEntry| (entry.uuid, entry.bitmap.uuid, entry.bitmap.everything.is_some());
        directory.checkpoints.iter().map(key).collect()
    };
    of(one) == of(other)
}

fn refused(name: &str, refusal: Refused) -> Error {
    Error::new(refusal.errno, format!("checkpoint '{name}'"), refusal.text)
}

fn copy_of(bitmap: &DirtyBitmap) -> Result<DirtyBitmap> {
    let mut copy = DirtyBitmap::heap(bitmap.granularity(), bitmap.size())?;
    copy.absorb(bitmap);
    Ok(copy)
}

/// Reads the note, and checks the bits against it (X4).
fn parse(carried: &Carried) -> Result<(Note, DirtyBitmap)> {
    let bad = |why: String| Error::new(errno::EINVAL, "exported checkpoint", why);
    let note: Note = serde_json::from_slice(&carried.note).map_err(|e| bad(e.to_string()))?;
    if note.version != NOTE_VERSION {
        return Err(bad(format!("version {} is not known to this program", note.version)));
    }
    check_name("checkpoint", &note.checkpoint)?;
    if sha256_of(carried.granularity, carried.words.iter().copied()) != note.bits_sha256 {
        return Err(bad("its bitmap was changed since".to_owned()));
    }
    // An image has no part of a sector.
    if note.size > carried.size {
        return Err(bad(format!("the image has {} bytes, and the disk had {}", carried.size, note.size)));
    }
    let mut bits = Bits::heap(DirtyBitmap::bits_for(carried.granularity, note.size)?);
    if carried.words.len() != Bits::words_for(bits.len()) {
        return Err(bad(format!("{} words of bits for {} bytes", carried.words.len(), note.size)));
    }
    bits.or_words(0, carried.words.iter().copied());
    let bits = DirtyBitmap::new(carried.granularity, note.size, bits)?;
    Ok((note, bits))
}

/// Of what the bits stand for, too: other units would be other places.
fn sha256_of(granularity: u64, words: impl Iterator<Item = u64>) -> String {
    let mut hash = Sha256::new();
    hash.update(granularity.to_le_bytes());
    words.for_each(|word| hash.update(word.to_le_bytes()));
    hex(hash)
}

fn hex(hash: Sha256) -> String {
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The SHA-256 of what a view holds: of its size, and of each unit of 64 KiB that is not all zeros its offset (both 64 bits,
/// least significant byte first) and its bytes. So it costs nothing where nothing is stored, and does not depend on what
/// is. `go_on` is asked in between.
fn digest(view: &View, go_on: &dyn Fn() -> Result<()>) -> Result<String> {
    let mut hash = Sha256::new();
    hash.update(view.size().to_le_bytes());
    let mut buf = vec![0; PIECE_BYTES as usize];
    let mut at = 0;
    while at < view.size() {
        go_on()?;
        let status = view.block_status(at, view.size() - at)?;
        // Whole units of a hole; a unit that it shares with data is read.
        let hole = if status.zero { (at + status.len) / UNIT_BYTES as u64 * UNIT_BYTES as u64 } else { at };
        let hole = if status.zero && at + status.len >= view.size() { view.size() } else { hole };
        if hole > at {
            at = hole;
            continue;
        }
        let piece = buf.get_mut(..PIECE_BYTES.min(view.size() - at) as usize).unwrap_or_default();
        let count = view.read(piece, at)?;
        if count != piece.len() {
            return Err(Error::new(errno::EIO, "view", "it ends early").at_offset(at + count as u64));
        }
        for (unit, index) in piece.chunks(UNIT_BYTES).zip(0u64..) {
            if !is_zero(unit) {
                hash.update((at + index * UNIT_BYTES as u64).to_le_bytes());
                hash.update(unit);
            }
        }
        at += piece.len() as u64;
    }
    Ok(hex(hash))
}
