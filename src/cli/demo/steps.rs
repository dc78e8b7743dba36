//! What the demo does, step by step.

use super::disk::{self, DISK_BYTES, find_tool};
use super::guest::Guest;
use super::{Place, Talk};
use crate::backup::{ExtentSource, MapSource, Totals};
use crate::error::{Error, Result, errno};
use crate::units::human_size;
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// How long the guest writes between two steps.
const PAUSE: Duration = Duration::from_millis(700);
const PIECE_BYTES: usize = 1 << 20;
/// Most that the frozen views may take: more than the guest ever writes over.
const STORE_LIMIT: &str = "128M";

/// All steps; false where something differs.
pub fn run(place: &Place, talk: &Talk) -> Result<bool> {
    let content = disk::create(&place.image())?;
    talk.say("disk", format!("{}: {}, {content}", place.image().display(), human_size(DISK_BYTES)));
    let start = Instant::now();
    // A bound of its own: without one, stores leave 5 % of the file system free, which a full one does not have.
    place.fleecefs(&[&"mount", &"--store-limit", &STORE_LIMIT, &place.image(), &place.mnt()])?;
    let command = format!("fleecefs mount --store-limit {STORE_LIMIT} disk.raw mnt");
    talk.say("mount", format!("{command}: answers after {}", millis(start.elapsed())));
    let guest = Guest::start(&place.mnt().join("live/disk.raw"))?;
    talk.say("guest", "writes random 4 KiB blocks to mnt/live/disk.raw, without a pause");
    pause(talk)?;
    let outcome = snapshots(place, talk, &guest);
    // A guest that failed is the better explanation.
    let writes = guest.stop()?;
    let mut same = outcome?;
    talk.say("guest", format!("wrote {writes} blocks, none failed"));
    same &= revert(place, talk)?;
    let start = Instant::now();
    place.umount()?;
    talk.say("umount", format!("state saved in {}", millis(start.elapsed())));
    Ok(same)
}

fn snapshots(place: &Place, talk: &Talk, guest: &Guest) -> Result<bool> {
    let mut same = first(place, talk, guest)?;
    pause(talk)?;
    same &= second(place, talk, guest)?;
    backups(place, talk)?;
    Ok(same)
}

/// A full copy.
fn first(place: &Place, talk: &Talk, guest: &Guest) -> Result<bool> {
    let view = freeze(place, talk, guest, "first")?;
    let before = hash(&view)?;
    let start = Instant::now();
    copy_all(&view, &place.copy())?;
    talk.say("copy", format!("all of it, {} in {}", human_size(DISK_BYTES), millis(start.elapsed())));
    pause(talk)?;
    let same = talk.compare("copy and first view", &hash(&place.copy())?, &before)
        & talk.compare("first view before and after the guest's later writes", &before, &hash(&view)?);
    thaw(place, talk, guest, "first")?;
    Ok(same)
}

/// The changes since the first view, onto the copy of it.
fn second(place: &Place, talk: &Talk, guest: &Guest) -> Result<bool> {
    let view = freeze(place, talk, guest, "second")?;
    let before = hash(&view)?;
    let map = MapSource::new(&place.mnt().join("snapshots/second/disk/since/first/map.json"), DISK_BYTES, false);
    let totals = Totals::of(&map)?;
    talk.say(
        "map",
        format!(
            "since first: {} of {} changed, in {} extents",
            human_size(totals.dirty),
            human_size(totals.size),
            totals.extents
        ),
    );
    let start = Instant::now();
    let copied = copy_changes(&map, &view, &place.copy(), talk)?;
    talk.say("copy", format!("only what changed, {} in {}", human_size(copied), millis(start.elapsed())));
    pause(talk)?;
    let same = talk.compare("updated copy and second view", &hash(&place.copy())?, &before)
        & talk.compare("second view before and after the guest's later writes", &before, &hash(&view)?);
    thaw(place, talk, guest, "second")?;
    Ok(same)
}

/// The same by one command: a full point of a backup, and one of what changed since.
fn backups(place: &Place, talk: &Talk) -> Result<()> {
    for kind in ["all of it", "only what changed"] {
        let start = Instant::now();
        let told = place.fleecefs(&[&"backup", &place.mnt(), &"--to", &place.backup(), &"--json"])?;
        let copied = number_in(&told, "/disks/0/copied_bytes")?;
        let text =
            format!("fleecefs backup mnt --to backup: {kind}, {}, in {}", human_size(copied), millis(start.elapsed()));
        talk.say("backup", text);
        pause(talk)?;
    }
    Ok(())
}

/// The guest is off: its disk as it was at the newest point, in place, for what changed since.
fn revert(place: &Place, talk: &Talk) -> Result<bool> {
    let (live, point) = (place.mnt().join("live/disk.raw"), place.point());
    place.fleecefs(&[&"restore", &place.backup(), &"--to", &point])?;
    let start = Instant::now();
    let told = place.fleecefs(&[&"restore", &place.backup(), &"--to", &live, &"--changed-only", &"--json"])?;
    let written = number_in(&told, "/written")?.saturating_add(number_in(&told, "/zeroed")?);
    talk.say(
        "restore",
        format!(
            "fleecefs restore backup --to mnt/live/disk.raw --changed-only: {} written in {}",
            human_size(written),
            millis(start.elapsed())
        ),
    );
    Ok(talk.compare("live disk and the backup's newest point", &hash(&live)?, &hash(&point)?))
}

/// A number in what a command said.
fn number_in(json: &str, place: &str) -> Result<u64> {
    let value: Option<Value> = serde_json::from_str(json).ok();
    let number = value.and_then(|value| value.pointer(place)?.as_u64());
    number.ok_or_else(|| Error::new(errno::EIO, "demo", format!("no number at {place} in: {}", json.trim())))
}

/// Takes a snapshot as any user would; gives the path of the view.
fn freeze(place: &Place, talk: &Talk, guest: &Guest, name: &str) -> Result<PathBuf> {
    let dir = place.mnt().join("snapshots").join(name);
    guest.take_slowest_us();
    let start = Instant::now();
    fs::create_dir(&dir).map_err(|e| Error::io("mkdir", e).at_path(&dir))?;
    talk.say(
        "freeze",
        format!(
            "mkdir mnt/snapshots/{name}: {}, after {} blocks of the guest",
            millis(start.elapsed()),
            guest.writes()
        ),
    );
    Ok(dir.join("disk.raw"))
}

fn thaw(place: &Place, talk: &Talk, guest: &Guest, name: &str) -> Result<()> {
    let dir = place.mnt().join("snapshots").join(name);
    fs::remove_dir(&dir).map_err(|e| Error::io("rmdir", e).at_path(&dir))?;
    let slowest = Duration::from_micros(guest.take_slowest_us());
    talk.say(
        "done",
        format!("rmdir mnt/snapshots/{name}; the guest's slowest write meanwhile took {}", millis(slowest)),
    );
    Ok(())
}

fn pause(talk: &Talk) -> Result<()> {
    thread::sleep(PAUSE);
    talk.go_on()
}

/// Not `fs::copy`: that copies the view's permissions too, and the copy is to be written again.
fn copy_all(view: &Path, copy: &Path) -> Result<()> {
    let mut from = File::open(view).map_err(|e| Error::io("open", e).at_path(view))?;
    let mut to = File::create_new(copy).map_err(|e| Error::io("create", e).at_path(copy))?;
    io::copy(&mut from, &mut to).map_err(|e| Error::io("copy", e).at_path(view))?;
    Ok(())
}

/// Copies the dirty extents of the map, zeros too: the copy holds older data there.
fn copy_changes(map: &MapSource, view: &Path, copy: &Path, talk: &Talk) -> Result<u64> {
    let from = File::open(view).map_err(|e| Error::io("open", e).at_path(view))?;
    let to = File::options().write(true).open(copy).map_err(|e| Error::io("open", e).at_path(copy))?;
    let mut buf = vec![0; PIECE_BYTES];
    let mut copied = 0;
    for extent in map.extents_from(0)? {
        let extent = extent?;
        if !extent.dirty {
            continue;
        }
        let mut offset = extent.start;
        let end = extent.start.saturating_add(extent.length).min(DISK_BYTES);
        while offset < end {
            talk.go_on()?;
            let count = usize::try_from(end - offset).unwrap_or(PIECE_BYTES).min(PIECE_BYTES);
            let piece = buf.get_mut(..count).unwrap_or_default();
            from.read_exact_at(piece, offset).map_err(|e| Error::io("read", e).at_path(view).at_offset(offset))?;
            to.write_all_at(piece, offset).map_err(|e| Error::io("write", e).at_path(copy).at_offset(offset))?;
            offset += count as u64;
        }
        copied += end.saturating_sub(extent.start);
    }
    Ok(copied)
}

/// SHA-256 by another program where there is one: it reads views as any tool would.
fn hash(path: &Path) -> Result<String> {
    let Some(tool) = find_tool("sha256sum") else { return own_hash(path) };
    let output = Command::new(tool)
        .arg(path)
        .stdin(Stdio::null())
        .output()
        .map_err(|e| Error::io("sha256sum", e).at_path(path))?;
    let text = String::from_utf8_lossy(&output.stdout);
    match text.split_whitespace().next() {
        // A backslash in front says that the name behind the digits is escaped.
        Some(digits) if output.status.success() => Ok(digits.trim_start_matches('\\').to_owned()),
        _ => {
            let why = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            Err(Error::new(errno::EIO, "sha256sum", why))
        }
    }
}

fn own_hash(path: &Path) -> Result<String> {
    let failed = |e| Error::io("read", e).at_path(path);
    let mut file = File::open(path).map_err(failed)?;
    let mut hash = Sha256::new();
    let mut buf = vec![0; PIECE_BYTES];
    loop {
        let count = file.read(&mut buf).map_err(failed)?;
        if count == 0 {
            return Ok(format!("{:x}", hash.finalize()));
        }
        hash.update(buf.get(..count).unwrap_or_default());
    }
}

fn millis(duration: Duration) -> String {
    format!("{:.1} ms", duration.as_secs_f64() * 1000.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::output::Style;
    use std::sync::Arc;

    fn talk() -> Talk {
        Talk { style: Style::of_stdout(), stop: Arc::default() }
    }

    #[test]
    fn both_ways_to_hash_agree() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        fs::write(&path, "abc").unwrap();
        assert!(own_hash(&path).unwrap().starts_with("ba7816bf8f01cfea"));
        assert_eq!(own_hash(&path).unwrap(), hash(&path).unwrap());
        for hash in [hash, own_hash] {
            assert!(hash(&dir.path().join("none")).is_err());
        }
    }

    #[test]
    fn changes_are_copied_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let (map, view, copy) = (dir.path().join("m"), dir.path().join("v"), dir.path().join("c"));
        fs::write(
            &map,
            r#"[{"start":0,"length":3,"dirty":true,"zero":false},{"start":3,"length":3,"dirty":false,"zero":false},
                {"start":6,"length":3,"dirty":true,"zero":true}]"#,
        )
        .unwrap();
        fs::write(&view, b"aaabbb\0\0\0").unwrap();
        fs::write(&copy, "xxxyyyzzz").unwrap();
        let copied = copy_changes(&MapSource::new(&map, 9, false), &view, &copy, &talk()).unwrap();
        assert_eq!((copied, fs::read(&copy).unwrap()), (6, b"aaayyy\0\0\0".to_vec()));
    }

    #[test]
    fn a_difference_is_seen() {
        assert!(talk().compare("a", "1", "1"));
        assert!(!talk().compare("a", "1", "2"));
    }
}
