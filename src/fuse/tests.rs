//! The tree and the control thread over the core, without a mount.

mod volumes;

use super::attr::Attr;
use super::control::{Control, Kernel};
use super::files::{Access, Caching, Whence};
use super::inodes::Inode;
use super::node::{Kind, Node, ROOT_INO};
use super::tree::Tree;
use crate::error::{Result, errno};
use crate::fleece::{Disk, DiskSpec, Fleece, Options};
use crate::image::Format;
use parking_lot::Mutex;
use std::collections::{BTreeSet, HashSet};
use std::io::Write;
use std::sync::Arc;
use std::sync::mpsc::channel;
use tempfile::TempDir;

const MIB: u64 = 1 << 20;
const DISK: u64 = 4 * MIB;
const READ: Access = Access { read: true, write: false, direct: false };
const WRITE: Access = Access { read: false, write: true, direct: false };
const PUNCH: i32 = 0x3;

fn fleece_with(bytes: u64, options: Options) -> (TempDir, Arc<Fleece>) {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("vda.raw");
    std::fs::File::create(&file).unwrap().set_len(bytes).unwrap();
    let fleece = Fleece::new(Options { state_dir: Some(dir.path().join("state")), ..options });
    fleece.add_disk(&DiskSpec { file, format: Some(Format::Raw), ..Default::default() }).unwrap();
    (dir, fleece)
}

struct Mount {
    _dir: TempDir,
    fleece: Arc<Fleece>,
    tree: Arc<Tree>,
    control: Arc<Control>,
}

fn tree_over(fleece: &Arc<Fleece>) -> Arc<Tree> {
    Arc::new(Tree::new(fleece.clone(), 0o640, Arc::new(|| serde_json::json!({"version": "test"}))))
}

impl Mount {
    fn new() -> Mount {
        Mount::with(Options::default())
    }

    fn with(options: Options) -> Mount {
        let (dir, fleece) = fleece_with(DISK, options);
        let tree = tree_over(&fleece);
        let control = Control::start(tree.clone()).unwrap();
        Mount { _dir: dir, fleece, tree, control }
    }

    /// Walks a path as the kernel does: one counted lookup per name.
    fn walk(&self, path: &str) -> Result<(Arc<Inode>, Attr)> {
        let mut inode = self.tree.inode(ROOT_INO)?;
        let mut attr = self.tree.getattr(&inode, None)?;
        for name in path.split('/').filter(|name| !name.is_empty()) {
            attr = self.tree.lookup(&inode, name)?;
            inode = self.tree.inode(attr.ino)?;
        }
        Ok((inode, attr))
    }

    fn inode(&self, path: &str) -> Arc<Inode> {
        self.walk(path).unwrap_or_else(|e| panic!("{path}: {e}")).0
    }

    fn attr(&self, path: &str) -> Attr {
        self.walk(path).unwrap_or_else(|e| panic!("{path}: {e}")).1
    }

    fn errno(&self, path: &str) -> i32 {
        self.walk(path).map(|_| ()).unwrap_err().errno()
    }

    fn names(&self, path: &str) -> BTreeSet<String> {
        let entries = self.tree.readdir(&self.inode(path), 0).unwrap();
        entries.into_iter().map(|entry| entry.name).filter(|name| !name.starts_with('.')).collect()
    }

    fn mkdir(&self, name: &str) -> Result<Attr> {
        self.control.mkdir(name)
    }

    fn rmdir(&self, name: &str) -> Result<()> {
        self.control.rmdir(&self.inode("snapshots"), name)
    }

    fn read(&self, path: &str, offset: u64, len: usize) -> Result<Vec<u8>> {
        let inode = self.inode(path);
        let opened = self.tree.open(&inode, READ)?;
        let mut buf = vec![0xee; len];
        let count = self.tree.read(&inode, opened.handle, offset, &mut buf);
        self.tree.release(&inode, opened.handle);
        buf.truncate(count?);
        Ok(buf)
    }

    fn text(&self, path: &str) -> String {
        let mut text = Vec::new();
        loop {
            let piece = self.read(path, text.len() as u64, 1000).unwrap();
            if piece.is_empty() {
                return String::from_utf8(text).unwrap();
            }
            text.extend(piece);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<usize> {
        write(&self.tree, &self.inode("live/vda.raw"), offset, data)
    }

    /// Offsets where data and holes begin, alternating from the first data.
    fn seams(&self, path: &str) -> Vec<u64> {
        let inode = self.inode(path);
        let (mut seams, mut at, mut whence) = (Vec::new(), 0, Whence::Data);
        while let Ok(found) = self.tree.seek(&inode, 0, at, whence) {
            seams.push(found);
            at = found;
            whence = if whence == Whence::Data { Whence::Hole } else { Whence::Data };
        }
        seams
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        self.control.stop();
    }
}

fn set(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

fn write(tree: &Tree, inode: &Inode, offset: u64, data: &[u8]) -> Result<usize> {
    let (told, tells) = std::sync::mpsc::channel();
    tree.write_then(inode, 0, offset, data, false, move |count| told.send(count).unwrap());
    tells.recv().unwrap()
}

#[test]
fn every_name_of_the_tree_is_there() {
    let mount = Mount::new();
    assert_eq!(mount.names(""), set(&["status.json", "metrics", "live", "snapshots"]));
    assert_eq!(mount.names("live"), set(&["vda.raw", "vda"]));
    assert_eq!(mount.names("live/vda"), set(&["volumes"]));
    assert_eq!(mount.names("live/vda/volumes"), set(&[]));
    assert_eq!(mount.names("snapshots"), set(&[]));
    assert_eq!(mount.errno("snapshots/latest"), errno::ENOENT);
    mount.mkdir("one").unwrap();
    mount.mkdir("two").unwrap();
    assert_eq!(mount.names("snapshots"), set(&["one", "two", "latest"]));
    assert_eq!(mount.tree.readlink(&mount.inode("snapshots/latest")).unwrap(), "two");
    assert_eq!(mount.attr("snapshots/latest").kind, Kind::Symlink);
    assert_eq!(mount.names("snapshots/two"), set(&["manifest.json", "vda.raw", "vda.map", "vda"]));
    assert_eq!(mount.names("snapshots/two/vda"), set(&["changed.raw", "release.raw", "since", "volumes"]));
    assert_eq!(mount.names("snapshots/two/vda/since"), set(&["one"]));
    assert_eq!(mount.names("snapshots/one/vda/since"), set(&[]));
    assert_eq!(
        mount.names("snapshots/two/vda/since/one"),
        set(&["map.json", "map.borg", "map.rbd.json", "map.bmap", "map.ddrescue", "map.nbd.json", "changed.raw"])
    );
    for path in ["nope", "live/vdb.raw", "snapshots/three", "snapshots/two/vda/since/two", "live/vda/volumes/p1.raw"] {
        assert_eq!(mount.errno(path), errno::ENOENT, "{path}");
    }
    assert_eq!(mount.errno("status.json/x"), errno::ENOTDIR);
}

#[test]
fn attributes_tell_sizes_permissions_and_how_long_they_hold() {
    let mount = Mount::new();
    mount.mkdir("one").unwrap();
    let live = mount.attr("live/vda.raw");
    assert_eq!((live.size, live.perm, live.kind), (DISK, 0o640, Kind::File));
    assert!(live.attr_ttl.is_zero() && live.entry_ttl.is_zero());
    let frozen = mount.attr("snapshots/one/vda.raw");
    assert_eq!((frozen.size, frozen.perm), (DISK, 0o440));
    assert!(frozen.entry_ttl.is_zero() && !frozen.attr_ttl.is_zero());
    assert_eq!(frozen.time_ns, mount.fleece.snapshot("one").unwrap().time_ns());
    assert!(frozen.blocks < frozen.size / 512, "cp and tar look for holes only then");
    let release = mount.attr("snapshots/one/vda/release.raw");
    assert_eq!((release.size, release.perm), (DISK, 0o640));
    assert_eq!(mount.attr("snapshots/one").perm, 0o755);
    assert_eq!(mount.attr("status.json").perm, 0o444);
    for path in ["status.json", "metrics", "snapshots/one/manifest.json", "snapshots/one/vda.map"] {
        assert_eq!(mount.attr(path).size, mount.text(path).len() as u64, "{path}");
    }
    assert_eq!(mount.attr("snapshots/one/vda.map").perm, 0o440);
    let statfs = mount.tree.statfs();
    assert_eq!(statfs.blocks * u64::from(statfs.block), DISK);
}

#[test]
fn a_live_file_behaves_as_a_block_device() {
    let mount = Mount::new();
    assert_eq!(mount.write(DISK - 4, b"abcdefgh").unwrap(), 4, "cut at the end");
    assert_eq!(mount.write(DISK, b"x").unwrap_err().errno(), errno::ENOSPC);
    assert_eq!(mount.read("live/vda.raw", DISK - 4, 100).unwrap(), b"abcd");
    assert_eq!(mount.read("live/vda.raw", DISK, 100).unwrap(), b"");
    let live = mount.inode("live/vda.raw");
    // O_TRUNC and truncate(2) of a path to 0: the size stays; through a handle it is an error of the core.
    assert_eq!(mount.tree.set_size(&live, 0, false).unwrap().size, DISK);
    assert!(mount.tree.set_size(&live, 0, true).is_err());
    assert_eq!(mount.tree.set_size(&live, DISK + MIB, true).unwrap().size, DISK + MIB);
    assert_eq!(mount.attr("live/vda.raw").size, DISK + MIB);
    mount.mkdir("one").unwrap();
    assert_eq!(mount.tree.set_size(&live, DISK, false).unwrap_err().errno(), errno::EBUSY);
    let opened = mount.tree.open(&live, WRITE).unwrap();
    assert_eq!((opened.handle, opened.caching), (0, Caching::NoneParallel));
    mount.tree.release(&live, 0);
}

#[test]
fn fallocate_punches_zeroes_and_allocates_inside_the_disk_only() {
    let mount = Mount::new();
    let live = mount.inode("live/vda.raw");
    mount.write(0, &vec![7; 256 << 10]).unwrap();
    let fallocate = |mode, offset, len| mount.tree.fallocate(&live, 0, mode, offset, len).map_err(|e| e.errno());
    fallocate(PUNCH, 0, 4096).unwrap();
    fallocate(0x10, 8192, 4096).unwrap();
    fallocate(0x11, 16384, 4096).unwrap();
    for (offset, byte) in [(0, 0), (4096, 7), (8192, 0), (12288, 7), (16384, 0), (20480, 7)] {
        assert_eq!(mount.read("live/vda.raw", offset, 4096).unwrap(), vec![byte; 4096], "{offset}");
    }
    fallocate(0, 0, DISK).unwrap();
    fallocate(1, DISK, MIB).unwrap();
    assert_eq!(fallocate(0, 0, DISK + 1), Err(errno::ENOSPC));
    assert_eq!(fallocate(0x10, DISK - 1, 2), Err(errno::ENOSPC));
    mount.write(DISK - 4096, &[7; 4096]).unwrap();
    fallocate(PUNCH, DISK - 4096, MIB).unwrap();
    assert_eq!(mount.read("live/vda.raw", DISK - 4096, 4096).unwrap(), vec![0; 4096], "cut to the end");
    fallocate(0x11, DISK, 4096).unwrap();
    for mode in [0x2, 0x8, 0x9, 0x20, 0x40, 0x12] {
        assert_eq!(fallocate(mode, 0, 4096), Err(errno::EOPNOTSUPP), "{mode:#x}");
    }
}

#[test]
fn frozen_files_are_read_only_and_never_change() {
    let mount = Mount::new();
    mount.write(0, &[1; 4096]).unwrap();
    mount.mkdir("one").unwrap();
    let before = mount.attr("snapshots/one/vda.raw");
    mount.write(0, &[2; 8192]).unwrap();
    assert_eq!(mount.read("snapshots/one/vda.raw", 0, 8192).unwrap(), [vec![1; 4096], vec![0; 4096]].concat());
    assert_eq!(mount.attr("snapshots/one/vda.raw"), before);
    let paths = ["vda.raw", "vda.map", "vda/changed.raw", "manifest.json"];
    for path in paths.map(|path| format!("snapshots/one/{path}")) {
        let inode = mount.inode(&path);
        assert_eq!(mount.tree.open(&inode, WRITE).unwrap_err().errno(), errno::EROFS, "{path}");
        assert_eq!(write(&mount.tree, &inode, 0, b"x").unwrap_err().errno(), errno::EROFS, "{path}");
        assert_eq!(mount.tree.set_size(&inode, 0, false).unwrap_err().errno(), errno::EROFS, "{path}");
        assert_eq!(mount.tree.fallocate(&inode, 0, PUNCH, 0, 4096).unwrap_err().errno(), errno::EROFS, "{path}");
    }
    let frozen = mount.inode("snapshots/one/vda.raw");
    for (direct, caching) in [(false, Caching::Keep), (true, Caching::None)] {
        assert_eq!(mount.tree.open(&frozen, Access { direct, ..READ }).unwrap().caching, caching);
        mount.tree.release(&frozen, 0);
    }
}

#[test]
fn changed_raw_has_what_changed_as_data_and_the_rest_as_holes() {
    let mount = Mount::new();
    mount.write(0, &vec![1; MIB as usize]).unwrap();
    mount.mkdir("one").unwrap();
    mount.rmdir("one").unwrap();
    let granule = 65536;
    mount.write(2 * granule, &[2; 100]).unwrap();
    // Zeroed, and still data: it changed.
    mount.tree.fallocate(&mount.inode("live/vda.raw"), 0, PUNCH, 6 * granule, 2 * granule).unwrap();
    mount.mkdir("two").unwrap();
    mount.write(2 * granule, &[9; 100]).unwrap();
    for path in ["snapshots/two/vda/changed.raw", "snapshots/two/vda/since/one/changed.raw"] {
        assert_eq!(
            mount.seams(path),
            [2 * granule, 3 * granule, 6 * granule, 8 * granule],
            "{path}: SEEK_DATA finds just the changes"
        );
        let attr = mount.attr(path);
        assert_eq!((attr.size, attr.blocks), (DISK, 3 * granule / 512));
        let bytes = mount.read(path, granule, 3 * granule as usize).unwrap();
        let mut expected = vec![0; 3 * granule as usize];
        expected[granule as usize..2 * granule as usize].fill(1);
        expected[granule as usize..granule as usize + 100].fill(2);
        assert!(bytes == expected, "{path}");
        assert_eq!(mount.read(path, DISK - 10, 100).unwrap(), [0; 10]);
    }
    assert!(mount.text("snapshots/two/vda.map").contains("\"dirty\": true"));
    assert_eq!(mount.text("snapshots/two/vda.map"), mount.text("snapshots/two/vda/since/one/map.json"));
}

#[test]
fn holes_are_found_in_every_file() {
    let mount = Mount::new();
    mount.write(MIB, &vec![1; MIB as usize]).unwrap();
    mount.mkdir("one").unwrap();
    for path in ["live/vda.raw", "snapshots/one/vda.raw"] {
        assert_eq!(mount.seams(path), [MIB, 2 * MIB], "{path}");
        let inode = mount.inode(path);
        let seek = |offset, whence| mount.tree.seek(&inode, 0, offset, whence).map_err(|e| e.errno());
        assert_eq!(seek(0, Whence::Hole), Ok(0));
        assert_eq!(seek(MIB + 5, Whence::Data), Ok(MIB + 5));
        assert_eq!(seek(2 * MIB, Whence::Data), Err(errno::ENXIO));
        assert_eq!(seek(DISK, Whence::Hole), Err(errno::ENXIO));
    }
    for path in ["status.json", "metrics", "snapshots/one/manifest.json", "snapshots/one/vda.map"] {
        let size = mount.attr(path).size;
        assert_eq!(mount.seams(path), [0, size], "{path}: all data, then the end");
    }
    // All of it counts as changed without a reference point.
    assert_eq!(mount.seams("snapshots/one/vda/changed.raw"), [0, DISK]);
}

#[test]
fn a_released_range_is_gone_and_nothing_else() {
    let mount = Mount::new();
    mount.write(0, &vec![1; MIB as usize]).unwrap();
    mount.mkdir("one").unwrap();
    let release = mount.inode("snapshots/one/vda/release.raw");
    assert_eq!(mount.tree.open(&release, READ).unwrap_err().errno(), errno::EACCES);
    mount.tree.open(&release, WRITE).unwrap();
    assert_eq!(write(&mount.tree, &release, 0, b"x").unwrap_err().errno(), errno::EINVAL);
    assert_eq!(mount.tree.read(&release, 0, 0, &mut [0; 10]).unwrap_err().errno(), 9);
    assert_eq!(mount.tree.fallocate(&release, 0, 0x11, 0, 4096).unwrap_err().errno(), errno::EOPNOTSUPP);
    mount.tree.fallocate(&release, 0, PUNCH, 0, 65536).unwrap();
    mount.tree.release(&release, 0);
    assert_eq!(mount.read("snapshots/one/vda.raw", 0, 4096).unwrap_err().errno(), errno::EIO);
    assert_eq!(mount.read("snapshots/one/vda.raw", 65536, 4096).unwrap(), vec![1; 4096]);
}

#[test]
fn files_stay_valid_after_rmdir_until_the_last_close() {
    let mount = Mount::new();
    mount.write(0, &[1; 4096]).unwrap();
    mount.mkdir("one").unwrap();
    let uuid = mount.fleece.snapshot("one").unwrap().uuid();
    let frozen = mount.inode("snapshots/one/vda.raw");
    mount.tree.open(&frozen, READ).unwrap();
    mount.tree.open(&frozen, READ).unwrap();
    mount.rmdir("one").unwrap();
    mount.write(0, &[2; 4096]).unwrap();
    assert_eq!(mount.errno("snapshots/one"), errno::ENOENT);
    for _ in 0..2 {
        let mut buf = [0; 4096];
        assert_eq!(mount.tree.read(&frozen, 0, 0, &mut buf).unwrap(), 4096);
        assert_eq!(buf, [1; 4096]);
        mount.tree.release(&frozen, 0);
    }
    assert!(mount.fleece.snapshot_by_uuid(uuid).is_none(), "the last close ended it");
    assert_eq!(mount.tree.open(&frozen, READ).unwrap_err().errno(), errno::ESTALE);
    // A release too many (of an open before a take-over) gives back nothing.
    mount.tree.release(&frozen, 0);
}

#[test]
fn a_snapshot_keeps_to_the_rules_of_names() {
    let mount = Mount::new();
    mount.mkdir("one").unwrap();
    let errno = |name: &str| mount.mkdir(name).unwrap_err().errno();
    assert_eq!(errno("one"), errno::EEXIST);
    assert_eq!(errno(".hidden"), errno::EINVAL);
    assert_eq!(errno(&"x".repeat(201)), errno::ENAMETOOLONG);
    assert_eq!(mount.rmdir("latest").unwrap_err().errno(), errno::ENOTDIR);
    assert_eq!(mount.rmdir("none").unwrap_err().errno(), errno::ENOENT);
    mount.rmdir("one").unwrap();
    assert_eq!(errno("one"), errno::EEXIST, "the checkpoint keeps the name");
}

/// All nodes of the tree, by walking it.
fn everything(tree: &Tree) -> Vec<(String, u64)> {
    fn walk(tree: &Tree, path: &str, ino: u64, found: &mut Vec<(String, u64)>) {
        let inode = tree.inode(ino).unwrap();
        for entry in tree.readdir(&inode, 2).unwrap() {
            let path = format!("{path}/{}", entry.name);
            found.push((path.clone(), entry.ino));
            if entry.kind == Kind::Directory {
                assert_eq!(tree.lookup(&inode, &entry.name).unwrap().ino, entry.ino);
                walk(tree, &path, entry.ino, found);
            }
        }
    }
    let mut found = Vec::new();
    walk(tree, "", ROOT_INO, &mut found);
    found
}

#[test]
fn a_later_process_computes_the_same_inodes_and_finds_them_again() {
    let mount = Mount::new();
    for name in ["one", "two", "three"] {
        mount.mkdir(name).unwrap();
    }
    let nodes = everything(&mount.tree);
    let numbers: HashSet<u64> = nodes.iter().map(|(_, ino)| *ino).collect();
    assert_eq!(numbers.len(), nodes.len(), "no two of them share a number");
    assert!(numbers.iter().all(|ino| *ino > 2 && *ino <= i64::MAX as u64));
    let later = tree_over(&mount.fleece);
    for (path, ino) in &nodes {
        let inode = later.inode(*ino).unwrap_or_else(|e| panic!("{path}: {e}"));
        assert_eq!(inode.ino, mount.inode(path).ino, "{path}");
    }
    // Handles of the earlier process are not known here: the text is made again.
    let status = later.inode(Node::Status.ino()).unwrap();
    let mut buf = [0; 100];
    assert!(later.read(&status, 12345, 0, &mut buf).unwrap() > 0);
    assert_eq!(later.inode(4711).map(|_| ()).unwrap_err().errno(), errno::ESTALE);
}

#[test]
fn a_snapshot_of_the_same_name_has_new_inodes() {
    let mount = Mount::new();
    mount.mkdir("one").unwrap();
    let before = mount.attr("snapshots/one/vda.raw").ino;
    mount.fleece.cancel_snapshot("one").unwrap();
    mount.mkdir("one").unwrap();
    assert_ne!(mount.attr("snapshots/one/vda.raw").ino, before);
}

#[test]
fn what_the_kernel_forgets_is_let_go() {
    let mount = Mount::new();
    mount.mkdir("one").unwrap();
    let ino = mount.attr("snapshots/one/vda.raw").ino;
    mount.attr("snapshots/one/vda.raw");
    let count = mount.tree.inodes.len();
    mount.tree.forget(ino, 1);
    assert_eq!(mount.tree.inodes.len(), count, "one lookup is left");
    mount.tree.forget(ino, 1);
    assert_eq!(mount.tree.inodes.len(), count - 1);
    // A forget of more than was seen (after a take-over) is no harm.
    mount.tree.forget(ino, 7);
    let inode = mount.tree.inode(ino).unwrap();
    mount.tree.open(&inode, READ).unwrap();
    mount.tree.forget(ino, 1);
    assert!(mount.tree.inodes.is_open(ino), "an open file stays");
    mount.tree.release(&inode, 0);
    assert_eq!(mount.tree.inodes.len(), count - 1);
}

#[test]
fn a_text_is_one_state_from_open_to_release() {
    let mount = Mount::new();
    let metrics = mount.inode("metrics");
    let handle = mount.tree.open(&metrics, READ).unwrap().handle;
    assert_ne!(handle, 0);
    let read = |handle| {
        let mut buf = vec![0; 100_000];
        let count = mount.tree.read(&metrics, handle, 0, &mut buf).unwrap();
        String::from_utf8(buf[..count].to_vec()).unwrap()
    };
    let before = read(handle);
    assert!(before.contains("# TYPE fleecefs_"));
    mount.write(0, &[1; 4096]).unwrap();
    assert_eq!(read(handle), before);
    assert_ne!(read(0), before, "a counter moved");
    assert_eq!(mount.tree.getattr(&metrics, Some(handle)).unwrap().size, before.len() as u64);
    mount.tree.release(&metrics, handle);
    assert_eq!(mount.tree.texts.len(), 0);
}

#[test]
fn entries_that_come_and_go_neither_hide_nor_repeat_others() {
    let mount = Mount::new();
    for index in 0..40 {
        mount.mkdir(&format!("s{index}")).unwrap();
    }
    let inode = mount.inode("snapshots");
    let (mut seen, mut offset) = (Vec::new(), 0);
    loop {
        let entries = mount.tree.readdir(&inode, offset).unwrap();
        let Some(entry) = entries.first() else { break };
        offset = entry.offset;
        // Everybody already seen goes, and new ones come.
        if mount.fleece.snapshot(&entry.name).is_ok() {
            mount.rmdir(&entry.name).unwrap();
            if seen.len() < 60 {
                mount.mkdir(&format!("new{}", seen.len())).unwrap();
            }
        }
        seen.push(entry.name.clone());
    }
    let unique: HashSet<&String> = seen.iter().collect();
    assert_eq!(unique.len(), seen.len());
    for index in 0..40 {
        assert!(seen.contains(&format!("s{index}")), "s{index}");
    }
}

/// A kernel with a dirty page, which arrives as a write while it is asked to write back.
struct DirtyKernel {
    live: Arc<Disk>,
    asked: Mutex<Vec<String>>,
}

impl Kernel for Arc<DirtyKernel> {
    fn write_back(&self, disk: &str) -> Result<()> {
        self.asked.lock().push(disk.to_owned());
        self.live.write(&[5; 4096], 0).map(|_| ())
    }

    fn attributes_changed(&self, ino: u64) -> Result<()> {
        assert_eq!(ino, Node::Live(self.live.uuid()).ino());
        self.asked.lock().push("attributes".to_owned());
        Ok(())
    }
}

#[test]
fn write_back_comes_before_the_freeze() {
    let mount = Mount::new();
    let live = mount.fleece.disk("vda").unwrap();
    let kernel = Arc::new(DirtyKernel { live, asked: Mutex::default() });
    mount.control.connect(Box::new(kernel.clone()));
    mount.mkdir("one").unwrap();
    assert_eq!(mount.read("snapshots/one/vda.raw", 0, 4096).unwrap(), [5; 4096]);
    mount.control.resize_disk("vda", DISK + MIB).unwrap();
    assert_eq!(*kernel.asked.lock(), ["vda", "attributes"]);
}

#[test]
fn the_control_thread_serves_others_and_itself_until_it_stops() {
    let mount = Mount::new();
    let request = |name: &str| crate::fleece::SnapshotRequest { name: name.to_owned(), ..Default::default() };
    mount.control.create_snapshot(&request("one")).unwrap();
    mount.control.run(Box::new(|| panic!("on purpose")));
    let (sender, receiver) = channel();
    let control = mount.control.clone();
    mount.control.run(Box::new(move || sender.send(control.create_snapshot(&request("two")).is_ok()).unwrap()));
    assert!(receiver.recv().unwrap(), "from the control thread itself");
    mount.control.resize_disk("vda", DISK + MIB).unwrap();
    assert_eq!(mount.attr("live/vda.raw").size, DISK + MIB);
    mount.control.stop();
    assert_eq!(mount.control.create_snapshot(&request("three")).map(|_| ()).unwrap_err().errno(), errno::ENODEV);
}

#[test]
fn listing_builds_no_map_and_maps_of_dropped_snapshots_go() {
    let mount = Mount::new();
    mount.mkdir("one").unwrap();
    mount.mkdir("two").unwrap();
    everything(&mount.tree);
    assert!(!mount.tree.keeps_maps());
    mount.attr("snapshots/two/vda/since/one/map.bmap");
    assert!(mount.tree.keeps_maps());
    mount.rmdir("two").unwrap();
    mount.tree.tidy();
    assert!(!mount.tree.keeps_maps());
}

#[test]
fn a_disk_that_is_open_cannot_be_removed() {
    let mount = Mount::new();
    let live = mount.inode("live/vda.raw");
    mount.tree.open(&live, READ).unwrap();
    assert_eq!(mount.fleece.remove_disk("vda").unwrap_err().errno(), errno::EBUSY);
    mount.tree.release(&live, 0);
    mount.fleece.remove_disk("vda").unwrap();
    assert_eq!(mount.tree.open(&live, READ).unwrap_err().errno(), errno::ESTALE);
    assert_eq!(mount.names("live"), set(&[]));
}

#[test]
fn a_read_only_disk_is_not_opened_for_writing() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("ro.raw");
    std::fs::File::create(&file).unwrap().write_all(&[3; 65536]).unwrap();
    let fleece = Fleece::new(Options { state_dir: Some(dir.path().join("state")), ..Options::default() });
    fleece.add_disk(&DiskSpec { name: Some("ro".to_owned()), file, read_only: true, ..Default::default() }).unwrap();
    let tree = tree_over(&fleece);
    let live = tree.lookup(&tree.inode(ROOT_INO).unwrap(), "live").unwrap();
    let disk = tree.lookup(&tree.inode(live.ino).unwrap(), "ro.raw").unwrap();
    let disk = tree.inode(disk.ino).unwrap();
    assert_eq!(tree.open(&disk, WRITE).unwrap_err().errno(), errno::EROFS);
    assert_eq!(tree.set_size(&disk, MIB, true).unwrap_err().errno(), errno::EROFS);
    tree.open(&disk, READ).unwrap();
    let mut buf = [0; 10];
    assert_eq!(tree.read(&disk, 0, 65530, &mut buf).unwrap(), 6);
    tree.release(&disk, 0);
}
