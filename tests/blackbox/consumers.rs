//! Consumers: who has read what, and what a failed backup leaves alone.

use crate::harness::*;
use std::os::unix::fs::FileExt;

fn consumers(mount: &Mount) -> Vec<(String, String)> {
    let list: serde_json::Value = serde_json::from_str(&mount.done("consumer list", args!["--json"])).unwrap();
    let row =
        |c: &serde_json::Value| (c["name"].as_str().unwrap().to_owned(), name_of(&c["checkpoint"]).unwrap().to_owned());
    list.as_array().unwrap().iter().map(row).collect()
}

fn touch(mount: &Mount, granule: u64) {
    mount.guest("vda").write_all_at(b"new", granule * GRANULE).unwrap();
}

#[test]
fn a_consumer_gets_a_full_map_first_with_exit_code_3_and_then_increments() {
    requires!();
    let rig = Rig::new();
    let mount = rig.mount([rig.image("vda", 1)]);
    let first = mount.run("snapshot create", args!["one", "--since", "@daily"]);
    assert_eq!(first.status.code(), Some(3), "{}", stderr(&first));
    assert!(format!("{}{}", stdout(&first), stderr(&first)).contains("daily"), "it says why");
    assert!(mount.map("one", "vda").all_dirty());
    mount.done("snapshot complete", args!["one", "--consumer", "daily"]);
    assert_eq!(consumers(&mount), [("daily".into(), "one".into())]);

    touch(&mount, 5);
    mount.done("snapshot create", args!["two", "--since", "@daily"]);
    assert_eq!(mount.map("two", "vda").granules(), [5]);
    mount.done("map", args!["two", "vda", "--since", "@daily", "--output", "json"]);
    mount.done("snapshot complete", args!["two", "--consumer", "daily"]);
    assert_eq!(consumers(&mount), [("daily".into(), "two".into())]);
}

#[test]
fn a_base_whose_changes_were_lost_is_a_full_map_with_exit_code_3_too() {
    requires!();
    let rig = Rig::new();
    let image = rig.image("vda", 1);
    let mount = rig.mount([&image]);
    mount.snap("one");
    mount.done("snapshot complete", args!["one", "--consumer", "daily"]);
    mount.umount();
    std::fs::OpenOptions::new().write(true).open(&image).unwrap().write_all_at(b"another", 0).unwrap();
    let mount = rig.mount([&image]);
    for since in ["one", "@daily"] {
        let out = mount.run("snapshot create", args!["two", "--since", since]);
        assert!(mount.map("two", "vda").all_dirty());
        refused(&out, 3, &["'vda'", since, "everything counts as changed", "another program"]);
        let shown = mount.done("snapshot show", args!["two"]);
        assert!(shown.contains("(all: the image was changed by another program"), "{shown}");
        mount.done("snapshot cancel", args!["two"]);
    }
    // The interval after it is exact again, and its base can be had.
    mount.snap("three");
    mount.drop_snap("three");
    touch(&mount, 5);
    let shown = mount.done("status", args![]);
    assert!(shown.contains("exact since 'three'"), "{shown}");
    mount.done("snapshot create", args!["four", "--since", "three"]);
    assert_eq!(mount.map("four", "vda").granules(), [5]);
}

#[test]
fn a_failed_backup_does_not_move_its_consumer() {
    requires!();
    let rig = Rig::new();
    let mount = rig.mount([rig.image("vda", 1)]);
    mount.snap("one");
    mount.done("snapshot complete", args!["one", "--consumer", "daily"]);
    touch(&mount, 3);
    mount.done("snapshot create", args!["two", "--since", "@daily"]);
    mount.done("snapshot cancel", args!["two"]);
    touch(&mount, 4);
    mount.done("snapshot create", args!["three", "--since", "@daily"]);
    assert_eq!(mount.map("three", "vda").granules(), [3, 4]);
    assert_eq!(consumers(&mount), [("daily".into(), "one".into())]);
}

#[test]
fn consumers_of_different_pace_do_not_disturb_each_other() {
    requires!();
    let rig = Rig::new();
    let image = rig.image("vda", 1);
    let mount = rig.mount([&image]);
    mount.snap("one");
    mount.done("snapshot complete", args!["one", "--consumer", "weekly"]);
    mount.done("consumer set", args!["daily", "one"]);
    for (name, granule) in [("two", 2), ("three", 3)] {
        touch(&mount, granule);
        mount.done("snapshot create", args![name, "--since", "@daily"]);
        assert_eq!(mount.map(name, "vda").granules(), [granule]);
        mount.done("snapshot complete", args![name, "--consumer", "daily"]);
    }
    mount.umount();
    let mount = rig.mount([&image]);
    mount.done("snapshot create", args!["four", "--since", "@weekly"]);
    assert_eq!(mount.map("four", "vda").granules(), [2, 3]);
    assert_eq!(mount.map_since("four", "vda", "three").granules(), Vec::<u64>::new());
}

#[test]
fn a_checkpoint_that_a_consumer_points_at_is_not_deleted() {
    requires!();
    let rig = Rig::new();
    let mount = rig.mount([rig.image("vda", 1)]);
    mount.snap("one");
    mount.done("snapshot complete", args!["one", "--consumer", "daily"]);
    refused(&mount.run("checkpoint delete", args!["one"]), 2, &["one", "daily"]);
    mount.done("consumer delete", args!["daily"]);
    mount.done("checkpoint delete", args!["one"]);
    assert!(consumers(&mount).is_empty());
}

#[test]
fn cancel_keeps_a_checkpoint_that_a_consumer_points_at() {
    requires!();
    let rig = Rig::new();
    let mount = rig.mount([rig.image("vda", 1)]);
    mount.snap("one");
    mount.done("consumer set", args!["daily", "one"]);
    mount.done("snapshot cancel", args!["one"]);
    assert!(!mount.snapshot_dir("one").exists());
    assert_eq!(consumers(&mount), [("daily".into(), "one".into())]);
    touch(&mount, 7);
    mount.done("snapshot create", args!["two", "--since", "@daily"]);
    assert_eq!(mount.map("two", "vda").granules(), [7]);
}

#[test]
fn a_consumer_cannot_be_set_to_an_unknown_checkpoint() {
    requires!();
    let rig = Rig::new();
    let mount = rig.mount([rig.image("vda", 1)]);
    let out = mount.run("consumer set", args!["daily", "nowhere"]);
    assert!(matches!(out.status.code(), Some(1 | 2)) && stderr(&out).contains("nowhere"), "{}", stderr(&out));
    refused(&mount.run("consumer set", args!["a/b", "nowhere"]), 2, &["a/b"]);
}

#[test]
fn a_name_that_was_taken_again_is_not_the_base() {
    requires!();
    let rig = Rig::new();
    let mount = rig.mount([rig.image("vda", 1)]);
    mount.snap("one");
    mount.done("snapshot complete", args!["one"]);
    mount.done("checkpoint delete", args!["one"]);
    touch(&mount, 1);
    mount.snap("one");
    mount.drop_snap("one");
    touch(&mount, 2);
    mount.snap("two");
    assert_eq!(mount.map_since("two", "vda", "one").granules(), [2]);
}

#[test]
fn the_oldest_checkpoints_are_merged_away_but_never_one_in_use() {
    requires!();
    let rig = Rig::new();
    let mount = rig.mount(args!["--keep-checkpoints", "3", rig.image("vda", 1)]);
    mount.snap("kept");
    mount.done("snapshot complete", args!["kept", "--consumer", "slow"]);
    for n in 1..=6 {
        touch(&mount, n);
        mount.snap(&format!("s{n}"));
        mount.drop_snap(&format!("s{n}"));
    }
    let list: serde_json::Value = serde_json::from_str(&mount.done("checkpoint list", args!["--json"])).unwrap();
    assert!(list.as_array().unwrap().len() <= 4, "{list}");
    touch(&mount, 7);
    mount.done("snapshot create", args!["last", "--since", "@slow"]);
    assert_eq!(mount.map("last", "vda").granules(), (1..=7).collect::<Vec<_>>());
}
