//! `fleecefs demo`: the whole round on a disk of its own, with a guest that never stops writing.
//!
//! A full copy of a first frozen view, then only the changes of a second one on top, each compared with its view by
//! SHA-256. For that the view is read by another program (`sha256sum` where there is one) before the copy is made,
//! and once more when the guest has long written over what it shows. Then the same by `fleecefs backup`, and, once the
//! guest has stopped, its disk as it was by `fleecefs restore --changed-only`. Everything lies in one directory, which goes
//! with the mount whatever happens, Ctrl-C included.

mod disk;
mod guest;
mod steps;

use super::Exit;
use super::output::{Out, Style};
use crate::daemon::absolute;
use crate::error::{Error, Result, errno};
use crate::storage::process;
use clap::Args;
use signal_hook::consts::{SIGINT, SIGTERM};
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Arguments of `demo`.
#[derive(Debug, Args)]
pub struct DemoArgs {
    /// Where to work, in a directory that goes at the end [default: the directory for temporary files]
    dir: Option<PathBuf>,
}

impl DemoArgs {
    /// Runs the demo; [`Exit::Differs`] where a copy is not what its view was.
    pub fn run(&self) -> Result<Exit> {
        check_fuse()?;
        let stop = Arc::new(AtomicBool::new(false));
        for signal in [SIGINT, SIGTERM] {
            signal_hook::flag::register(signal, stop.clone()).map_err(|e| Error::io("install signal handlers", e))?;
        }
        let place = Place::create(&self.dir.clone().unwrap_or_else(std::env::temp_dir))?;
        let talk = Talk { style: Style::of_stdout(), stop };
        let same = steps::run(&place, &talk)?;
        place.remove()?;
        talk.say("end", "unmounted, files removed");
        Ok(if same { Exit::Done } else { Exit::Differs })
    }
}

/// Says what is missing before anything is made. fusermount3 opens the device with its user's rights.
fn check_fuse() -> Result<()> {
    let device = Path::new("/dev/fuse");
    let hint = "the demo mounts a file system: it needs /dev/fuse for reading and writing (modprobe fuse; in a container \
                --device /dev/fuse and CAP_SYS_ADMIN), and as a user fusermount3 (package fuse3)";
    let opened = File::options().read(true).write(true).open(device);
    opened.map_err(|e| Error::io("FUSE", e).at_path(device).hint(hint))?;
    if process::uid_gid().0 != 0 && disk::find_tool("fusermount3").is_none() {
        return Err(
            Error::new(errno::ENOENT, "fusermount3", "not found, and only root can mount without it").hint(hint)
        );
    }
    Ok(())
}

/// Short lines for people, and the question whether they have had enough.
struct Talk {
    style: Style,
    stop: Arc<AtomicBool>,
}

impl Talk {
    /// One line under a short heading.
    fn say(&self, heading: &str, text: impl AsRef<str>) {
        let heading = self.style.bold(&format!("{heading:<8}"));
        // The demo goes on, and cleans up, without a reader.
        let _ = Out::to_the_end(&format!("{heading} {}", text.as_ref()));
    }

    /// A comparison: true where both are the same.
    fn compare(&self, what: &str, ours: &str, theirs: &str) -> bool {
        let same = ours == theirs;
        let start = |hash: &str| hash.chars().take(16).collect::<String>();
        if same {
            self.say(&self.style.good("same    "), format!("{what}: sha256 {}...", start(ours)));
        } else {
            self.say(
                &self.style.bad("DIFFERS "),
                format!("{what}: sha256 {}... and {}...", start(ours), start(theirs)),
            );
        }
        same
    }

    /// Fails once Ctrl-C was pressed.
    fn go_on(&self) -> Result<()> {
        if self.stop.load(Ordering::Relaxed) {
            return Err(Error::new(errno::EAGAIN, "demo", "interrupted; everything is cleaned up"));
        }
        Ok(())
    }
}

/// The directory of the demo with its mount. Dropping it unmounts and removes.
struct Place {
    dir: PathBuf,
    removed: AtomicBool,
}

impl Place {
    fn create(parent: &Path) -> Result<Place> {
        let parent = absolute(parent)?;
        fs::create_dir_all(&parent).map_err(|e| Error::io("create directory", e).at_path(&parent))?;
        let dir = parent.join(format!("fleecefs-demo-{}", std::process::id()));
        fs::create_dir(&dir).map_err(|e| Error::io("create directory", e).at_path(&dir))?;
        let place = Place { dir, removed: AtomicBool::new(false) };
        fs::create_dir(place.mnt()).map_err(|e| Error::io("create directory", e).at_path(place.mnt()))?;
        Ok(place)
    }

    fn image(&self) -> PathBuf {
        self.dir.join("disk.raw")
    }

    fn mnt(&self) -> PathBuf {
        self.dir.join("mnt")
    }

    fn copy(&self) -> PathBuf {
        self.dir.join("copy.raw")
    }

    fn point(&self) -> PathBuf {
        self.dir.join("point.raw")
    }

    fn backup(&self) -> PathBuf {
        self.dir.join("backup")
    }

    /// Runs this very program; gives what it prints.
    fn fleecefs(&self, words: &[&dyn AsRef<OsStr>]) -> Result<String> {
        let program = std::env::current_exe().map_err(|e| Error::io("find this program", e))?;
        let what = || format!("fleecefs {}", words.first().map_or("".into(), |word| word.as_ref().to_string_lossy()));
        let output = Command::new(program)
            .args(words.iter().map(|word| word.as_ref()))
            .stdin(Stdio::null())
            .output()
            .map_err(|e| Error::io(what(), e))?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        let text = String::from_utf8_lossy(&output.stderr);
        Err(Error::new(errno::EIO, what(), text.trim().to_owned()))
    }

    fn umount(&self) -> Result<()> {
        self.fleecefs(&[&"umount", &self.mnt()]).map(drop)
    }

    /// Unmounts where that is still to be done, and removes everything.
    fn remove(&self) -> Result<()> {
        if self.mnt().join("status.json").exists() {
            self.umount().or_else(|_| self.fleecefs(&[&"umount", &"--lazy", &self.mnt()]).map(drop))?;
        }
        fs::remove_dir_all(&self.dir).map_err(|e| Error::io("remove", e).at_path(&self.dir))?;
        self.removed.store(true, Ordering::Relaxed);
        Ok(())
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if !self.removed.load(Ordering::Relaxed)
            && let Err(e) = self.remove()
        {
            let _ = writeln!(std::io::stderr(), "fleecefs: clean up: {e}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_goes_when_it_is_dropped() {
        let parent = tempfile::tempdir().unwrap();
        let place = Place::create(parent.path()).unwrap();
        fs::write(place.image(), "x").unwrap();
        assert!(place.mnt().is_dir());
        drop(place);
        assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 0);
    }

    #[test]
    fn ctrl_c_ends_the_next_step() {
        let talk = Talk { style: Style::of_stdout(), stop: Arc::default() };
        talk.go_on().unwrap();
        talk.stop.store(true, Ordering::Relaxed);
        assert!(talk.go_on().is_err());
    }
}
