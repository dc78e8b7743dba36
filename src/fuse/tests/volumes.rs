//! Volumes in the tree.

use super::*;

const SECTOR: u64 = 512;
const P1: (u64, u64) = (MIB, MIB);
const P2: (u64, u64) = (2 * MIB + 65536, MIB);

/// A master boot record with these partitions.
fn mbr(partitions: &[(u64, u64)]) -> Vec<u8> {
    let mut sector = vec![0; SECTOR as usize];
    for (index, (start, len)) in partitions.iter().enumerate() {
        let entry = &mut sector[446 + 16 * index..][..16];
        entry[4] = 0x83;
        entry[8..12].copy_from_slice(&((start / SECTOR) as u32).to_le_bytes());
        entry[12..16].copy_from_slice(&((len / SECTOR) as u32).to_le_bytes());
    }
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    sector
}

fn mounted(writable_volumes: bool) -> Mount {
    let mount = Mount::with(Options { writable_volumes, ..Options::default() });
    mount.write(0, &mbr(&[P1, P2])).unwrap();
    mount.write(P1.0, &[1; 65536]).unwrap();
    mount.write(P2.0, &[2; 65536]).unwrap();
    mount
}

/// An open file: its inode and handle.
fn open(mount: &Mount, path: &str, access: Access) -> Result<(Arc<Inode>, u64)> {
    let inode = mount.inode(path);
    let handle = mount.tree.open(&inode, access)?.handle;
    Ok((inode, handle))
}

fn read_open(mount: &Mount, (inode, handle): &(Arc<Inode>, u64), len: usize) -> std::result::Result<Vec<u8>, i32> {
    let mut buf = vec![0xee; len];
    let count = mount.tree.read(inode, *handle, 0, &mut buf).map_err(|e| e.errno())?;
    buf.truncate(count);
    Ok(buf)
}

fn write_open(mount: &Mount, (inode, handle): &(Arc<Inode>, u64), offset: u64, data: &[u8]) -> Result<usize> {
    let (told, tells) = channel();
    mount.tree.write_then(inode, *handle, offset, data, true, move |count| told.send(count).unwrap());
    tells.recv().unwrap()
}

#[test]
fn volumes_have_names_sizes_and_permissions() {
    let mount = mounted(false);
    mount.mkdir("one").unwrap();
    assert_eq!(mount.names("live/vda/volumes"), set(&["p1.raw", "p2.raw"]));
    assert_eq!(mount.names("snapshots/one/vda/volumes"), set(&["p1.raw", "p1.map", "p2.raw", "p2.map"]));
    let (live, frozen) = (mount.attr("live/vda/volumes/p2.raw"), mount.attr("snapshots/one/vda/volumes/p2.raw"));
    assert_eq!((live.size, live.perm, frozen.size, frozen.perm), (P2.1, 0o440, P2.1, 0o440));
    assert_eq!(frozen.time_ns, mount.fleece.snapshot("one").unwrap().time_ns());
    assert!(live.attr_ttl.is_zero() && !frozen.attr_ttl.is_zero());
    assert_eq!(mounted(true).attr("live/vda/volumes/p2.raw").perm, 0o640);
    let map = mount.attr("snapshots/one/vda/volumes/p2.map");
    assert_eq!(map.size, mount.text("snapshots/one/vda/volumes/p2.map").len() as u64);
    for path in ["live/vda/volumes/p3.raw", "snapshots/one/vda/volumes/p1", "live/vda/volumes/p1.map"] {
        assert_eq!(mount.errno(path), errno::ENOENT, "{path}");
    }
    let manifest: serde_json::Value = serde_json::from_str(&mount.text("snapshots/one/manifest.json")).unwrap();
    let row = &manifest["disks"][0]["volumes"][1];
    assert_eq!(
        (row["name"].as_str(), row["offset"].as_u64(), row["size"].as_u64()),
        (Some("p2"), Some(P2.0), Some(P2.1))
    );
    assert_eq!(row["type"], "0x83");
}

#[test]
fn frozen_volumes_never_change_and_their_maps_are_cut() {
    let mount = mounted(true);
    mount.mkdir("zero").unwrap();
    mount.rmdir("zero").unwrap();
    mount.write(P1.0 + 65536, &[3; 10]).unwrap();
    mount.write(P2.0 + P2.1 - 10, &[4; 20]).unwrap();
    mount.mkdir("one").unwrap();
    mount.write(0, &mbr(&[])).unwrap();
    mount.write(P2.0, &[9; 4096]).unwrap();
    assert_eq!(mount.names("live/vda/volumes"), set(&[]));
    let path = "snapshots/one/vda/volumes/p2.raw";
    assert_eq!(mount.read(path, 0, 65536).unwrap(), [2; 65536]);
    assert_eq!(mount.read(path, P2.1 - 12, 100).unwrap(), [[0; 2].as_slice(), &[4; 10]].concat());
    assert_eq!(mount.seams(path), [0, 65536, P2.1 - 4096, P2.1], "holes are holes");
    assert_eq!(open(&mount, path, WRITE).err().unwrap().errno(), errno::EROFS);
    assert_eq!(mount.tree.set_size(&mount.inode(path), 0, false).unwrap_err().errno(), errno::EROFS);
    let map = mount.text("snapshots/one/vda/volumes/p2.map");
    assert!(map.starts_with("[{\"start\": 0, \"length\": 65536, \"dirty\": false, \"zero\": false}"), "{map}");
    assert!(
        map.contains(&format!("{{\"start\": {}, \"length\": 4096, \"dirty\": true, \"zero\": false}}", P2.1 - 4096)),
        "{map}"
    );
    let map = mount.text("snapshots/one/vda/volumes/p1.map");
    assert!(map.contains("{\"start\": 65536, \"length\": 4096, \"dirty\": true, \"zero\": false}"), "{map}");
}

#[test]
fn live_volumes_are_written_to_where_that_is_asked_for() {
    let mount = mounted(false);
    assert_eq!(open(&mount, "live/vda/volumes/p1.raw", WRITE).err().unwrap().errno(), errno::EROFS);
    assert_eq!(mount.read("live/vda/volumes/p1.raw", 0, 10).unwrap(), [1; 10]);
    let mount = mounted(true);
    let file = open(&mount, "live/vda/volumes/p1.raw", WRITE).unwrap();
    let opened = mount.tree.open(&file.0, WRITE).unwrap();
    assert_eq!(opened.caching, Caching::NoneParallel, "no pages that the disk's own file does not know");
    assert_ne!(opened.handle, file.1);
    assert_eq!(write_open(&mount, &file, 0, &[5; 100]).unwrap(), 100);
    assert_eq!(write_open(&mount, &file, P1.1 - 10, &[6; 100]).unwrap(), 10, "cut at the end");
    assert_eq!(write_open(&mount, &file, P1.1, &[6]).unwrap_err().errno(), errno::ENOSPC);
    assert_eq!(mount.read("live/vda.raw", P1.0, 101).unwrap(), [[5; 100].as_slice(), &[1]].concat());
    assert_eq!(mount.read("live/vda.raw", P1.0 + P1.1 - 10, 11).unwrap(), [[6; 10].as_slice(), &[0]].concat());
    let fallocate = |mode, offset, len| mount.tree.fallocate(&file.0, file.1, mode, offset, len).map_err(|e| e.errno());
    fallocate(PUNCH, 0, 4096).unwrap();
    fallocate(0x10, 8192, 4096).unwrap();
    fallocate(0x11, P1.1 - 10, 4096).unwrap();
    fallocate(0, 0, P1.1).unwrap();
    assert_eq!(fallocate(0x10, P1.1 - 1, 2), Err(errno::ENOSPC));
    assert_eq!(fallocate(0x2, 0, 1), Err(errno::EOPNOTSUPP));
    assert_eq!(mount.read("live/vda.raw", P1.0, 4096).unwrap(), [0; 4096]);
    assert_eq!(mount.read("live/vda.raw", P1.0 + 4096, 4096).unwrap(), [1; 4096]);
    assert_eq!(mount.read("live/vda.raw", P1.0 + 8192, 4096).unwrap(), [0; 4096]);
    assert_eq!(mount.read("live/vda.raw", P1.0 + P1.1 - 10, 10).unwrap(), [0; 10]);
    mount.tree.fsync(&file.0, file.1).unwrap();
    // O_TRUNC, and the size that it has.
    assert_eq!(mount.tree.set_size(&file.0, 0, false).unwrap().size, P1.1);
    assert_eq!(mount.tree.set_size(&file.0, P1.1, true).unwrap().size, P1.1);
    assert_eq!(mount.tree.set_size(&file.0, P1.1 + 1, true).unwrap_err().errno(), errno::EINVAL);
    assert_eq!(mount.fleece.remove_disk("vda").unwrap_err().errno(), errno::EBUSY, "its volume is open");
    mount.tree.release(&file.0, file.1);
    mount.tree.release(&file.0, opened.handle);
    assert_eq!(mount.tree.live_volumes.len(), 0);
    mount.fleece.remove_disk("vda").unwrap();
}

#[test]
fn a_stale_file_stays_stale_whatever_others_open() {
    let mount = mounted(true);
    let path = "live/vda/volumes/p1.raw";
    let old = open(&mount, path, READ).unwrap();
    let other = open(&mount, "live/vda/volumes/p2.raw", READ).unwrap();
    assert_eq!(read_open(&mount, &old, 4).unwrap(), [1; 4]);
    mount.write(0, &mbr(&[P1])).unwrap();
    assert_eq!(read_open(&mount, &old, 4), Err(errno::ESTALE));
    assert_eq!(read_open(&mount, &other, 4), Err(errno::ESTALE));
    let new = open(&mount, path, READ).unwrap();
    assert_eq!(new.0.ino, old.0.ino, "the same place");
    assert_eq!(read_open(&mount, &new, 4).unwrap(), [1; 4]);
    assert_eq!(read_open(&mount, &old, 4), Err(errno::ESTALE));
    mount.write(0, &mbr(&[P2])).unwrap();
    let moved = open(&mount, path, READ).unwrap();
    assert_ne!(moved.0.ino, old.0.ino, "another place");
    assert_eq!(read_open(&mount, &moved, 4).unwrap(), [2; 4]);
    for file in [&old, &other, &new] {
        assert_eq!(read_open(&mount, file, 4), Err(errno::ESTALE));
        mount.tree.release(&file.0, file.1);
    }
    assert_eq!(mount.tree.getattr(&old.0, None).unwrap_err().errno(), errno::ESTALE);
}

#[test]
fn a_later_process_finds_volumes_by_number_and_without_a_handle() {
    let mount = mounted(true);
    mount.mkdir("one").unwrap();
    let later = tree_over(&mount.fleece);
    let mut buf = [0; 4];
    for path in ["live/vda/volumes/p2.raw", "snapshots/one/vda/volumes/p2.raw"] {
        let inode = later.inode(mount.attr(path).ino).unwrap();
        assert_eq!(later.read(&inode, 4711, 0, &mut buf).unwrap(), 4, "{path}");
        assert_eq!(buf, [2; 4]);
        // What an earlier process opened is closed.
        later.release(&inode, 4711);
    }
    let nodes = everything(&mount.tree);
    let numbers: HashSet<u64> = nodes.iter().map(|(_, ino)| *ino).collect();
    assert_eq!(numbers.len(), nodes.len());
    assert_eq!(nodes.iter().filter(|(path, _)| path.contains("/volumes/")).count(), 2 + 4);
}
