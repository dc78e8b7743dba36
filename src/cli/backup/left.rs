//! What earlier runs of `fleecefs backup` left: points that are not whole, and whole ones whose snapshot was not completed.
//!
//! Invariants:
//! - **A point is given up or gone on with, never left lying**, by the first run on a mount that has one of its disks. Where
//!   none is there, it is of another mount, which may use the same directory: nothing of it is touched.
//! - **Gone is what is known to be gone.** A snapshot that could not be looked at keeps its point, and the run ends with that
//!   error: what is copied may be hours of work.

use super::super::connect::{Mount, read_reply};
use super::super::map::Status;
use super::super::output::{complain, printable};
use super::super::snapshot;
use super::{BackupArgs, Plan, Taken, complete};
use crate::backup::manifest::Manifest;
use crate::backup::save::{Draft, Partial, Settings, Shelf};
use crate::error::{Result, errno};
use serde_json::json;

/// A snapshot of that name; None: there is none.
fn taken(mount: &Mount, name: &str) -> Result<Option<Taken>> {
    match snapshot::manifest(mount, name) {
        Ok(reply) => read_reply(&reply).map(Some),
        Err(e) if e.errno() == errno::ENOENT => Ok(None),
        Err(e) => Err(e),
    }
}

/// Whether a point is of this mount: one of its disks is there, and it was begun here and not where a checkpoint of that disk
/// was imported from.
fn is_ours(status: &Status, draft: &Draft) -> bool {
    let disks = &draft.manifest.disks;
    let here = status.disk_uuids();
    draft.mount_disks.iter().any(|uuid| here.contains(uuid))
        && (disks.is_empty() || disks.iter().any(|disk| status.has_disk(disk.uuid)))
}

/// The first disk of a point that the mount does not have any more, under the name that it had.
fn missing<'a>(status: &Status, manifest: &'a Manifest) -> Option<&'a str> {
    let gone = manifest.disks.iter().find(|disk| !status.is_disk(&disk.name, disk.uuid));
    gone.map(|disk| disk.name.as_str())
}

/// Ends a point that is not whole, with its snapshot where that is there. Whoever runs us unattended is to have a backup.
fn give_up(mount: &Mount, partial: Partial, snapshot_is_there: bool, why: &str) -> Result<()> {
    let name = partial.point().to_owned();
    complain(&format!("fleecefs: the interrupted point '{}' is given up{why}", printable(&name)));
    if snapshot_is_there {
        mount.execute("fleecefs-snapshot-cancel", json!({ "name": name }))?;
    }
    partial.discard()
}

impl BackupArgs {
    /// What an interrupted run of the same settings left, where its snapshot is still there; what else earlier runs on
    /// this mount's disks left goes.
    pub(super) fn interrupted(
        &self,
        mount: &Mount,
        shelf: &Shelf,
        settings: &Settings,
    ) -> Result<Option<(Partial, Vec<Plan>)>> {
        let status: Status = read_reply(&mount.status)?;
        for mut partial in shelf.partials()? {
            if !is_ours(&status, &partial.draft) {
                continue;
            }
            let name = partial.point().to_owned();
            let draft = &partial.draft;
            let found = taken(mount, &name).map_err(|e| self.interrupted_error(&partial, e))?;
            // Killed between the two: the snapshot of that name is the one that it was about to take, where it was taken
            // since then and on the same mount. It had none of that name when it was begun.
            let before_taken = draft.manifest.disks.is_empty();
            let found = found.filter(|taken| match before_taken {
                true => is_later(&taken.time, &draft.manifest.time),
                false => taken.uuid == draft.manifest.snapshot_uuid,
            });
            if let Some(disk) = missing(&status, &draft.manifest) {
                let why = format!(": the mount has no disk '{}' of it any more", printable(disk));
                give_up(mount, partial, found.is_some(), &why)?;
                continue;
            }
            let Some(taken) = found else {
                give_up(mount, partial, false, ": its snapshot is gone")?;
                continue;
            };
            let same = draft.settings == *settings && self.name.as_ref().is_none_or(|wanted| *wanted == name);
            let broken = || Ok(snapshot::rows(mount)?.iter().any(|row| row.name() == name && row.is_broken()));
            if !same || self.restart || broken()? {
                give_up(mount, partial, true, "")?;
                continue;
            }
            if before_taken {
                self.fill(mount, shelf, &mut partial, &taken)?;
            }
            match self.plans(mount, &partial) {
                Ok(plans) => {
                    complain(&format!("fleecefs: going on with the interrupted point '{}'", printable(&name)));
                    return Ok(Some((partial, plans)));
                }
                Err(e) if e.errno() == errno::ESTALE => give_up(mount, partial, true, &format!(": {e}"))?,
                Err(e) => return Err(self.interrupted_error(&partial, e)),
            }
        }
        Ok(None)
    }
}

/// Completes the snapshots of points that are whole: a run was killed before it did.
pub(super) fn end_finished(mount: &Mount, shelf: &Shelf) -> Result<()> {
    let status: Status = read_reply(&mount.status)?;
    for (point, draft) in shelf.unfinished()? {
        if !is_ours(&status, &draft) {
            continue;
        }
        match taken(mount, &draft.manifest.point)? {
            Some(taken) if taken.uuid == draft.manifest.snapshot_uuid => complete(mount, shelf, &draft.manifest)?,
            _ => shelf.finished(&point)?,
        }
    }
    Ok(())
}

/// Whether a time is not before another one.
fn is_later(time: &str, than: &str) -> bool {
    let of = |text: &str| text.parse::<jiff::Timestamp>();
    of(time).is_ok_and(|time| of(than).is_ok_and(|than| time >= than))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;
    use uuid::Uuid;

    #[test]
    fn a_snapshot_that_cannot_be_looked_at_is_not_taken_for_gone() {
        let temp = tempfile::tempdir().unwrap();
        let (mnt, to, disk) = (temp.path().join("mnt"), temp.path().join("to"), Uuid::new_v4());
        let manifest = mnt.join("snapshots/p/manifest.json");
        // Not a file: reading it fails with another error than that it is not there.
        std::fs::create_dir_all(&manifest).unwrap();
        let status = json!({ "pid": 1, "qmp": "/none", "disks": [{"name": "vda", "uuid": disk}], "checkpoints": [],
            "consumers": [] });
        std::fs::write(mnt.join("status.json"), status.to_string()).unwrap();
        let words = ["fleecefs", "backup", mnt.to_str().unwrap(), "--to", to.to_str().unwrap()];
        let parsed = crate::cli::Cli::try_parse_from(words);
        let Ok(crate::cli::Cli { command: crate::cli::Command::Backup(args) }) = parsed else { panic!() };
        let (mount, shelf, settings) =
            (Mount::find(&mnt).unwrap(), Shelf::open(&to).unwrap(), args.settings().unwrap());
        let draft = |uuid| Draft {
            settings: settings.clone(),
            manifest: Manifest::new(if uuid == disk { "p" } else { "q" }),
            mount_disks: vec![uuid],
        };
        shelf.begin(draft(disk)).unwrap();
        shelf.begin(draft(Uuid::new_v4())).unwrap();
        let e = args.interrupted(&mount, &shelf, &settings).map(drop).unwrap_err();
        assert!(e.to_string().contains("manifest.json") && e.hint_text().unwrap().contains("the same command"), "{e}");
        assert!(to.join("p.partial").exists());
        std::fs::remove_dir(&manifest).unwrap();
        assert!(args.interrupted(&mount, &shelf, &settings).unwrap().is_none());
        assert!(!to.join("p.partial").exists());
        assert!(to.join("q.partial").exists(), "another mount's");
    }
}
