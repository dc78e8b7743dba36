//! Guest first: readers of views yield to the guest, as `--guest-share` says.

use crate::harness::*;
use std::fs;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::thread;

const MIB: u64 = 4;

fn counter(mount: &Mount, name: &str) -> u64 {
    mount.status()["counters"][name].as_u64().unwrap_or_else(|| panic!("no counter {name}"))
}

/// Reads new snapshots one after the other, so that no page of them is cached, until `done`.
fn read_until(mount: &Mount, prefix: &str, done: impl Fn() -> bool) {
    for round in 0..1000 {
        let name = format!("{prefix}{round}");
        mount.snap(&name);
        assert_eq!(fs::read(mount.view(&name, "vda")).unwrap().len() as u64, MIB << 20);
        mount.drop_snap(&name);
        if done() {
            return;
        }
    }
    panic!("not after 1000 snapshots");
}

/// Ends the guest also where the test fails beside it.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, SeqCst);
    }
}

/// Runs `work` beside a guest that writes all the time.
fn beside_a_guest(mount: &Mount, work: impl FnOnce()) {
    let stop = AtomicBool::new(false);
    let guest = mount.guest("vda");
    thread::scope(|scope| {
        let _stop = Stop(&stop);
        scope.spawn(|| {
            while !stop.load(SeqCst) {
                guest.write_all_at(&[7; 4096], 8192).unwrap();
            }
        });
        work();
    });
}

#[test]
fn readers_wait_for_a_guest_that_writes() {
    requires!();
    let rig = Rig::new();
    let image = rig.image("vda", MIB);
    let mount = rig.mount([image]);
    assert_eq!(mount.status()["guest_share"], 50);
    read_until(&mount, "idle", || true);
    assert_eq!((counter(&mount, "view_reads_paced"), counter(&mount, "view_pause_ns")), (0, 0), "an idle guest");
    beside_a_guest(&mount, || {
        read_until(&mount, "busy", || counter(&mount, "view_reads_paced") > 0 && counter(&mount, "view_pause_ns") > 0);
    });
}

#[test]
fn readers_do_not_wait_where_that_is_not_wanted() {
    requires!();
    let rig = Rig::new();
    let image = rig.image("vda", MIB);
    let mount = rig.mount(args!["--guest-share", "0", image]);
    assert_eq!(mount.status()["guest_share"], 0);
    beside_a_guest(&mount, || read_until(&mount, "busy", || counter(&mount, "guest_writes") > 100));
    assert!(counter(&mount, "view_reads") > 0);
    assert_eq!((counter(&mount, "view_reads_paced"), counter(&mount, "view_pause_ns")), (0, 0));
}

#[test]
fn a_share_that_leaves_readers_nothing_is_refused() {
    let rig = Rig::new();
    let (image, mnt) = (rig.image("vda", 1), rig.mount_point("mnt"));
    for share in ["96", "100", "-1", "50%", "x"] {
        let out = fleecefs(args!["mount", format!("--guest-share={share}"), &image, &mnt]);
        assert_eq!(out.status.code(), Some(2), "{share}: {}", stderr(&out));
        assert!(stderr(&out).contains("guest-share"), "{share}: {}", stderr(&out));
    }
}
