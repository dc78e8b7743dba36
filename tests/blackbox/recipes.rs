//! The scripts of contrib/recipes with the tools that they are for: each point restored is what the disk held.

use crate::harness::*;
use serde_json::Value;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Runs a recipe on the first of two disks.
fn recipe(name: &str, mount: &Mount, target: &str, environment: &[(&str, &Path)]) -> Output {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("contrib/recipes").join(name);
    let mut command = tool(script);
    command.env("FLEECEFS", env!("CARGO_BIN_EXE_fleecefs")).envs(environment.iter().copied());
    command.arg(&mount.dir).args([target, "vda"]).output().unwrap()
}

#[track_caller]
fn good(out: &Output) {
    assert_eq!(out.status.code(), Some(0), "{}{}", stdout(out), stderr(out));
}

/// Where the consumers point.
fn consumers(mount: &Mount) -> Vec<String> {
    let list: Value = serde_json::from_str(&mount.done("consumer list", args!["--json"])).unwrap();
    list.as_array().unwrap().iter().map(|row| name_of(&row["checkpoint"]).unwrap().to_owned()).collect()
}

/// Two points of a disk: between them some of it changes, and some is discarded.
fn changed(mount: &Mount) -> Vec<u8> {
    let guest = mount.guest("vda");
    guest.write_all_at(&pattern(9, 100_000), 3 * GRANULE + 77).unwrap();
    drop(guest);
    ok(tool("fallocate").args(["-p", "-o", "262144", "-l", "131072"]).arg(mount.live("vda")));
    std::fs::read(mount.live("vda")).unwrap()
}

fn rig(dir: &str) -> (Rig, Mount, PathBuf) {
    let rig = Rig::new();
    let mount = rig.mount([rig.image("vda", 1), rig.image("vdb", 1)]);
    let place = rig.mount_point(dir);
    (rig, mount, place)
}

#[test]
fn restic_keeps_what_the_disk_held() {
    requires!("restic");
    let (rig, mount, place) = rig("a repository");
    let password = rig.path("password");
    std::fs::write(&password, "secret").unwrap();
    let cache = rig.mount_point("cache");
    let environment = [("RESTIC_PASSWORD_FILE", password.as_path()), ("RESTIC_CACHE_DIR", cache.as_path())];
    let repository = place.to_str().unwrap();
    let restic = |args: &[&str]| ok(tool("restic").envs(environment).args(["--repo", repository]).args(args));
    // Nothing is there yet to back up to.
    assert_ne!(recipe("restic-backup", &mount, repository, &environment).status.code(), Some(0));
    assert!(consumers(&mount).is_empty());
    restic(&["init"]);
    let mut points = vec![std::fs::read(mount.live("vda")).unwrap()];
    good(&recipe("restic-backup", &mount, repository, &environment));
    let first = consumers(&mount);
    points.push(changed(&mount));
    good(&recipe("restic-backup", &mount, repository, &environment));
    assert_ne!(consumers(&mount), first);
    for (point, tag) in points.iter().zip([&first[0], &consumers(&mount)[0]]) {
        let target = rig.path(tag);
        restic(&["restore", "latest", "--tag", tag, "--target", target.to_str().unwrap()]);
        let found = ok(tool("find").arg(&target).args(["-name", "vda.raw"]));
        assert!(std::fs::read(found.trim()).unwrap() == *point, "{tag}");
        assert_eq!(ok(tool("find").arg(&target).args(["-name", "vdb.raw"])), "");
    }
}

#[test]
fn borg_keeps_what_the_disk_held() {
    requires!("borg");
    let (rig, mount, place) = rig("repository");
    let home = rig.mount_point("home");
    let environment = [("BORG_BASE_DIR", home.as_path())];
    let repository = place.to_str().unwrap();
    assert_ne!(recipe("borg-backup", &mount, repository, &environment).status.code(), Some(0));
    assert!(consumers(&mount).is_empty());
    ok(tool("borg").envs(environment).args(["init", "-e", "none", repository]));
    let mut points = vec![std::fs::read(mount.live("vda")).unwrap()];
    good(&recipe("borg-backup", &mount, repository, &environment));
    let first = consumers(&mount);
    points.push(changed(&mount));
    good(&recipe("borg-backup", &mount, repository, &environment));
    for (point, name) in points.iter().zip([&first[0], &consumers(&mount)[0]]) {
        let target = rig.mount_point(name);
        let mut extract = tool("borg");
        extract.envs(environment).args(["extract", &format!("{repository}::{name}")]).current_dir(&target);
        ok(&mut extract);
        assert!(std::fs::read(target.join("vda.raw")).unwrap() == *point, "{name}");
        assert!(target.join("manifest.json").exists() && !target.join("vdb.raw").exists());
    }
}

#[test]
fn rsync_makes_increments_that_rebuild_what_the_disk_held() {
    requires!("rsync");
    let (rig, mount, place) = rig("a place");
    let destination = place.to_str().unwrap();
    assert_ne!(recipe("rsync-increment", &mount, "/proc/none", &[]).status.code(), Some(0));
    assert!(consumers(&mount).is_empty());
    let mut points = vec![std::fs::read(mount.live("vda")).unwrap()];
    good(&recipe("rsync-increment", &mount, destination, &[]));
    let first = consumers(&mount);
    points.push(changed(&mount));
    good(&recipe("rsync-increment", &mount, destination, &[]));
    let mut disk = vec![0xaa; points[0].len()];
    for (point, name) in points.iter().zip([&first[0], &consumers(&mount)[0]]) {
        let read = |file: &str| std::fs::read(place.join(name).join(file)).unwrap();
        let (map, increment) = (serde_json::from_slice(&read("vda.map")).unwrap(), read("vda.changed.raw"));
        for extent in Map::parse(&map).0.iter().filter(|extent| extent.dirty) {
            let range = extent.start as usize..(extent.start + extent.length) as usize;
            disk[range.clone()].copy_from_slice(&increment[range]);
        }
        assert!(disk == *point, "{name}");
        assert!(read("manifest.json").starts_with(b"{"));
    }
    let names = std::fs::read_dir(&place).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    assert!(names.into_iter().all(|name| !name.ends_with(".partial")));
    let small = blocks_below(&place.join(&consumers(&mount)[0])) * 512;
    assert!(small < 6 * GRANULE, "{small}");
    // Whose tool is killed has nothing for whole.
    let mut run = Command::new(env!("CARGO_BIN_EXE_fleecefs"));
    let out =
        run.arg("run").arg(&mount.dir).args(["--consumer", "rsync", "--", "sh", "-c", "kill $$"]).output().unwrap();
    assert_eq!(out.status.code(), Some(143));
    drop(rig);
}
