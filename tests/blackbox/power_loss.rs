//! What a host that stopped leaves: the daemon is killed and what it had in memory is taken away. The sidecar and the
//! image stand as the page cache has them, so that no write is lost here; that is for the tests of the core.

use crate::harness::*;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// What one intent covers on the small disks here.
const REGION: u64 = 1 << 20;

/// Kills the daemon and takes the words of the session away, as a stop of the host does.
#[track_caller]
fn host_stops(mount: Mount, state: &Path) -> PathBuf {
    let dir = mount.kill();
    let log = fs::File::open(state.join("dirty.log")).unwrap();
    let newest = [0_u64, 4096]
        .map(|slot| {
            let mut page = [0; 88];
            log.read_exact_at(&mut page, slot).unwrap();
            let generation = u64::from_le_bytes(page[24..32].try_into().unwrap());
            (generation, uuid::Uuid::from_slice(&page[72..88]).unwrap())
        })
        .into_iter()
        .max()
        .unwrap();
    let words = ["/run/fleecefs", "/dev/shm/fleecefs"].map(|root| Path::new(root).join(newest.1.to_string()));
    let words = words.iter().find(|dir| dir.exists()).expect("the words of the session");
    fs::remove_dir_all(words).unwrap();
    dir
}

/// A new disk begins with all of it armed, since whoever made the image may not have synced it.
fn all_is_durable(mount: &Mount) {
    eventually("the end of disarming", || mount.status()["counters"]["armed_regions"] == 0);
}

fn image(rig: &Rig, format: &str) -> (PathBuf, PathBuf) {
    let image = rig.path(&format!("vda.{format}"));
    ok(tool("qemu-img").args(["create", "-q", "-f", format]).arg(&image).arg("64M"));
    let state = rig.path(&format!("vda.{format}.fleece"));
    (image, state)
}

#[test]
fn after_a_power_loss_a_map_says_at_most_the_armed_regions_more() {
    requires!("qemu-img");
    for format in ["raw", "qcow2"] {
        let rig = Rig::new();
        let (image, state) = image(&rig, format);
        let mount = rig.mount([&image]);
        all_is_durable(&mount);
        mount.snap("base");
        mount.drop_snap("base");
        let written = [3 * REGION + 5 * GRANULE, 40 * REGION];
        for at in written {
            mount.guest("vda").write_all_at(&[0xd1; 512], at).unwrap();
        }
        let mount = Mount::at(host_stops(mount, &state), [&image]);
        has_problem(&mount, "vda");
        mount.snap("next");
        let map = mount.map("next", "vda");
        let dirty = map.granules();
        for at in written {
            assert!(dirty.contains(&(at / GRANULE)), "{format}: a change is missing in {dirty:?}");
        }
        assert!(!map.all_dirty(), "{format}: everything, where few regions were armed");
        let far = |granule: &&u64| written.iter().all(|at| (*granule * GRANULE).abs_diff(*at) > 16 * REGION);
        assert_eq!(dirty.iter().find(far), None, "{format}: a region that nobody wrote to");
        assert!(mount.manifest("next", "vda")["full_reason"].is_null(), "{format}");
        mount.drop_snap("next");
        mount.guest("vda").write_all_at(&[0xd2; 512], 10 * REGION).unwrap();
        mount.snap("after");
        let dirty = mount.map("after", "vda").granules();
        assert_eq!(dirty, [10 * REGION / GRANULE], "{format}: the checkpoint after it is exact again");
    }
}

#[test]
fn changes_before_several_power_losses_are_all_known() {
    requires!("qemu-img");
    let rig = Rig::new();
    let (image, state) = image(&rig, "raw");
    let mut mount = rig.mount([&image]);
    all_is_durable(&mount);
    mount.snap("base");
    mount.drop_snap("base");
    let written = [0, 12, 24, 36].map(|region| region * REGION);
    for at in written {
        mount.guest("vda").write_all_at(&[0xd1; 512], at).unwrap();
        mount = Mount::at(host_stops(mount, &state), [&image]);
    }
    mount.snap("next");
    let map = mount.map("next", "vda");
    assert!(written.iter().all(|at| map.granules().contains(&(at / GRANULE))), "{:?}", map.granules());
    assert!(!map.all_dirty());
}

#[test]
fn a_write_of_another_program_after_a_power_loss_means_everything() {
    requires!("qemu-img", "qemu-io");
    for format in ["raw", "qcow2"] {
        let rig = Rig::new();
        let (image, state) = image(&rig, format);
        let mount = rig.mount([&image]);
        mount.snap("base");
        mount.drop_snap("base");
        mount.guest("vda").write_all_at(&[0xd1; 512], 0).unwrap();
        let dir = host_stops(mount, &state);
        // Past the heartbeat's interval and the slack, within which a change may still be the daemon's own.
        if format == "raw" {
            std::thread::sleep(std::time::Duration::from_secs(13));
        }
        ok(tool("qemu-io").args(["-f", format, "-c", "write -P 7 50M 64k"]).arg(&image));
        let mount = Mount::at(dir, [&image]);
        mount.snap("next");
        let full_reason = mount.manifest("next", "vda")["full_reason"].clone();
        let map = mount.map("next", "vda");
        assert!(map.granules().contains(&(50 * REGION / GRANULE)), "{format}: {full_reason}");
        // A bitmap that plain QEMU found in use is good for nothing.
        assert!(map.all_dirty() && full_reason.is_string(), "{format}: {full_reason}");
    }
}
