//! Exports over real images, without a protocol.

use super::contexts::{ALLOCATION, DEPTH, DIRTY};
use super::*;
use crate::fleece::{Action, BitmapRef, DiskSpec, Options, Refused, SnapshotRequest};
use crate::nbd::export::{Context, Export, Exports, Run, Zeroes};
use parking_lot::Mutex;

const MIB: u64 = 1 << 20;
const DISK_BYTES: u64 = 4 * MIB;

struct Rig {
    _dir: tempfile::TempDir,
    fleece: Arc<Fleece>,
    mount: MountExports,
    table: ExportTable,
    gone: Arc<Mutex<Vec<String>>>,
}

impl Rig {
    fn new() -> Rig {
        Rig::with(Options::default())
    }

    fn with(options: Options) -> Rig {
        let dir = tempfile::tempdir().unwrap();
        let fleece = Fleece::new(Options { state_dir: Some(dir.path().join("state")), ..options });
        for (name, read_only) in [("vda", false), ("ro", true)] {
            let file = dir.path().join(format!("{name}.raw"));
            std::fs::File::create(&file).unwrap().set_len(DISK_BYTES).unwrap();
            fleece.add_disk(&DiskSpec { name: Some(name.into()), file, read_only, ..DiskSpec::default() }).unwrap();
        }
        let gone: Arc<Mutex<Vec<String>>> = Arc::default();
        let told = gone.clone();
        let table = ExportTable::new(fleece.clone(), move |id| told.lock().push(id.to_owned()));
        Rig { _dir: dir, mount: MountExports::new(fleece.clone()), table, fleece, gone }
    }

    fn snap(&self, name: &str) {
        let request = SnapshotRequest { name: name.into(), disks: vec!["vda".into()], ..SnapshotRequest::default() };
        self.fleece.create_snapshot(&request).unwrap();
    }

    fn write(&self, byte: u8, offset: u64, len: u64) {
        let data = vec![byte; len as usize];
        assert_eq!(self.fleece.disk("vda").unwrap().write(&data, offset).unwrap(), data.len());
    }

    fn apply(&self, action: Action) -> std::result::Result<(), Refused> {
        self.fleece.apply(&[action]).map(drop)
    }

    fn add_bitmap(&self, disk: &str, name: &str, disabled: bool) {
        let action =
            Action::Add { disk: disk.into(), name: name.into(), granularity: Some(65536), persistent: false, disabled };
        self.apply(action).unwrap();
    }

    fn clear(&self, name: &str) -> std::result::Result<(), Refused> {
        self.apply(Action::Clear(BitmapRef::new("vda", name)))
    }

    fn add(&self, spec: ExportSpec) -> String {
        self.table.add(spec, true).map_or_else(|refused| refused.text, |()| String::new())
    }
}

fn spec(id: &str, node: &str) -> ExportSpec {
    ExportSpec { id: id.into(), node: node.into(), name: id.into(), ..ExportSpec::default() }
}

fn own(name: &str) -> BitmapName {
    BitmapName::Own(name.into())
}

fn of(node: &str, name: &str) -> BitmapName {
    BitmapName::Of(BitmapRef::new(node, name))
}

fn names(exports: &dyn Exports) -> Vec<String> {
    exports.list().into_iter().map(|(name, _)| name).collect()
}

/// All runs of a context, neighbours of equal flags as one.
fn runs(export: &dyn Export, context: &str) -> Vec<(u64, u32)> {
    let context: Arc<dyn Context> = export.context(context).unwrap();
    let (mut at, mut all) = (0, Vec::<(u64, u32)>::new());
    while at < export.size() {
        let Run { flags, len } = context.run(at, export.size() - at).unwrap();
        assert!(len > 0 && at + len <= export.size());
        match all.last_mut() {
            Some((before, last)) if *last == flags => *before += len,
            _ => all.push((len, flags)),
        }
        at += len;
    }
    all
}

fn dirty(name: &str) -> String {
    format!("{DIRTY}{name}")
}

fn bytes(export: &dyn Export, offset: u64, len: usize) -> Vec<u8> {
    let mut buf = vec![0xEE; len];
    export.read(&mut buf, offset).unwrap();
    buf
}

#[test]
fn disks_and_views_come_and_go_with_their_names() {
    let rig = Rig::new();
    assert_eq!(names(&rig.mount), ["ro", "vda"]);
    rig.snap("a b");
    assert_eq!(names(&rig.mount), ["a b/vda", "ro", "vda"]);
    for unknown in ["", "vdb", "a b", "a b/", "/vda", "a b/ro", "no/vda", "a b/vda/"] {
        assert_eq!(rig.mount.open(unknown).err().unwrap().errno(), errno::ENOENT, "{unknown}");
    }
    assert!(rig.mount.open("ro").unwrap().read_only());
    assert!(!rig.mount.open("vda").unwrap().read_only());
    rig.fleece.complete_snapshot("a b", None).unwrap();
    assert_eq!(names(&rig.mount), ["ro", "vda"]);
}

#[test]
fn a_view_stays_valid_for_who_reads_it_and_is_no_longer_listed() {
    let rig = Rig::new();
    rig.write(1, 0, 3 * MIB);
    rig.snap("s");
    assert_eq!(rig.add(spec("e", "s/vda")), "");
    let (auto, asked) = (rig.mount.open("s/vda").unwrap(), rig.table.open("e").unwrap());
    rig.fleece.complete_snapshot("s", None).unwrap();
    assert!(rig.mount.open("s/vda").is_err() && rig.table.open("e").is_err());
    assert!(rig.table.list().is_empty());
    assert!(rig.table.infos()[0].is_ending);
    rig.write(2, 0, 3 * MIB);
    for export in [auto, asked] {
        // More than one piece, and not from the beginning of one.
        assert_eq!(bytes(&*export, 512, 2 * MIB as usize), vec![1; 2 * MIB as usize]);
        assert_eq!(export.size(), DISK_BYTES);
        drop(export);
    }
    rig.table.remove("e", false).unwrap();
    // With the last close the view went, and with it what kept the disk.
    rig.fleece.reap();
    rig.fleece.remove_disk("vda").unwrap();
}

#[test]
fn a_disk_is_not_removed_while_it_is_exported_or_a_client_has_it() {
    let rig = Rig::new();
    let client = rig.mount.open("vda").unwrap();
    assert_eq!(rig.fleece.remove_disk("vda").unwrap_err().errno(), errno::EBUSY);
    drop(client);
    assert_eq!(rig.add(spec("e", "vda")), "");
    assert_eq!(rig.fleece.remove_disk("vda").unwrap_err().errno(), errno::EBUSY);
    let client = rig.table.open("e").unwrap();
    rig.table.remove("e", true).unwrap();
    assert_eq!(rig.fleece.remove_disk("vda").unwrap_err().errno(), errno::EBUSY, "its client is still there");
    drop(client);
    rig.fleece.remove_disk("vda").unwrap();
    assert!(rig.mount.open("vda").is_err());
}

#[test]
fn writes_zeroes_and_discards_reach_the_disk() {
    let rig = Rig::new();
    let export = rig.mount.open("vda").unwrap();
    export.write(&vec![7; 3 * MIB as usize], 100).unwrap();
    assert_eq!(bytes(&*export, 100, 3 * MIB as usize), vec![7; 3 * MIB as usize]);
    let fast = Zeroes { no_hole: true, only_fast: true };
    assert_eq!(export.write_zeroes(0, MIB, fast).unwrap_err().errno(), errno::EOPNOTSUPP);
    export.write_zeroes(0, MIB, Zeroes { no_hole: true, only_fast: false }).unwrap();
    export.write_zeroes(MIB, MIB, Zeroes { no_hole: false, only_fast: true }).unwrap();
    export.trim(2 * MIB, MIB).unwrap();
    assert_eq!(bytes(&*export, 0, 3 * MIB as usize), vec![0; 3 * MIB as usize]);
    export.flush().unwrap();
    export.cache(0, MIB).unwrap();
    assert_eq!(export.write(&[1], DISK_BYTES).unwrap_err().errno(), errno::ENOSPC);
    let read_only = rig.mount.open("ro").unwrap();
    assert_eq!(read_only.write(&[1], 0).unwrap_err().errno(), errno::EPERM);
    read_only.flush().unwrap();
}

#[test]
fn a_view_is_read_in_pieces_that_each_wait_for_the_guest_in_their_turn() {
    let rig = Rig::new();
    rig.snap("s");
    let view = rig.mount.open("s/vda").unwrap();
    let reads = || rig.fleece.counters().iter().find(|counter| counter.name == "view_reads").unwrap().value;
    let before = reads();
    bytes(&*view, 100, 3 * MIB as usize);
    assert_eq!(reads() - before, 3);
}

#[test]
fn a_broken_view_is_an_error_and_never_data_nor_a_hole() {
    let rig = Rig::with(Options { store_limit: Some(65536), ..Options::default() });
    rig.write(1, 0, 2 * MIB);
    rig.snap("s");
    let view = rig.mount.open("s/vda").unwrap();
    rig.write(2, 0, 2 * MIB);
    assert!(rig.fleece.snapshot("s").unwrap().broken().is_some());
    for offset in [0, 3 * MIB] {
        assert_eq!(view.read(&mut [0; 512], offset).unwrap_err().errno(), errno::EIO);
        for context in [ALLOCATION, DEPTH] {
            let refused = view.context(context).unwrap().run(offset, 512).unwrap_err();
            assert_eq!(refused.errno(), errno::EIO, "{context}");
        }
    }
}

#[test]
fn a_client_of_a_closed_mount_is_told_so() {
    let rig = Rig::new();
    rig.snap("s");
    let (live, view) = (rig.mount.open("vda").unwrap(), rig.mount.open("s/vda").unwrap());
    rig.fleece.close().unwrap();
    for export in [live, view] {
        assert_eq!(export.read(&mut [0], 0).unwrap_err().errno(), errno::ESHUTDOWN);
        assert_eq!(export.flush().unwrap_err().errno(), errno::ESHUTDOWN);
        assert_eq!(export.context(ALLOCATION).unwrap().run(0, 1).unwrap_err().errno(), errno::ESHUTDOWN);
    }
}

#[test]
fn holes_and_depths_are_the_images() {
    let rig = Rig::new();
    rig.write(1, MIB, MIB);
    rig.snap("s");
    rig.write(2, 3 * MIB, MIB);
    let (live, view) = (rig.mount.open("vda").unwrap(), rig.mount.open("s/vda").unwrap());
    assert_eq!(live.contexts()[..2], [ALLOCATION, DEPTH]);
    assert_eq!(runs(&*live, ALLOCATION), [(MIB, 3), (MIB, 0), (MIB, 3), (MIB, 0)]);
    assert_eq!(runs(&*view, ALLOCATION), [(MIB, 3), (MIB, 0), (2 * MIB, 3)]);
    assert_eq!(runs(&*live, DEPTH), [(DISK_BYTES, 1)]);
    assert!(live.context("base:other").is_none() && live.context("").is_none());
}

#[test]
fn a_view_shows_what_changed_since_each_point() {
    let rig = Rig::new();
    rig.snap("one");
    rig.write(1, 0, 65536);
    rig.snap("two");
    rig.write(1, 2 * MIB, 1);
    rig.snap("three");
    rig.write(1, 3 * MIB, 65536);
    let view = rig.mount.open("three/vda").unwrap();
    assert_eq!(view.contexts()[2..], [dirty("one"), dirty("two")]);
    let rest = DISK_BYTES - 2 * MIB - 65536;
    assert_eq!(
        runs(&*view, &dirty("one")),
        [(65536, 1), (2 * MIB - 65536, 0), (65536, 1), (rest, 0)],
        "all that changed, and no more"
    );
    assert_eq!(runs(&*view, &dirty("two")), [(2 * MIB, 0), (65536, 1), (rest, 0)]);
    assert!(view.context(&dirty("three")).is_none());
    let first = rig.mount.open("one/vda").unwrap();
    assert_eq!(first.contexts(), [ALLOCATION, DEPTH]);
}

#[test]
fn a_bitmap_is_busy_as_long_as_a_client_sees_it_and_grows_meanwhile() {
    let rig = Rig::new();
    rig.add_bitmap("vda", "b", false);
    rig.add_bitmap("vda", "off", true);
    rig.write(1, 0, 1);
    let (one, two) = (rig.mount.open("vda").unwrap(), rig.mount.open("vda").unwrap());
    assert!([dirty("b"), dirty("off")].iter().all(|name| one.contexts().contains(name)));
    rig.clear("off").unwrap();
    let (seen, again) = (one.context(&dirty("b")).unwrap(), two.context(&dirty("b")).unwrap());
    assert_eq!(rig.clear("b").unwrap_err().errno, errno::EBUSY);
    assert!(two.contexts().contains(&dirty("b")), "others may see it, too");
    assert_eq!(rig.fleece.resize_disk("vda", 2 * DISK_BYTES).unwrap_err().errno(), errno::EBUSY);
    assert_eq!(seen.run(MIB, MIB).unwrap(), Run { flags: 0, len: MIB });
    rig.write(1, MIB, 1);
    assert_eq!(again.run(MIB, MIB).unwrap(), Run { flags: 1, len: 65536 });
    assert_eq!(rig.fleece.bitmaps("vda").unwrap().iter().find(|info| info.name == "b").unwrap().count, 2 * 65536);
    drop((seen, again));
    rig.clear("b").unwrap();
    assert_eq!(runs(&*one, &dirty("b")), [(DISK_BYTES, 0)]);
    rig.clear("b").unwrap();
}

#[test]
fn views_and_read_only_disks_show_bitmaps_that_do_not_record() {
    let rig = Rig::new();
    rig.add_bitmap("vda", "on", false);
    rig.add_bitmap("vda", "off", false);
    rig.write(1, 0, 1);
    rig.apply(Action::Disable(BitmapRef::new("vda", "off"))).unwrap();
    rig.snap("s");
    rig.write(1, MIB, 1);
    let view = rig.mount.open("s/vda").unwrap();
    assert_eq!(view.contexts(), [ALLOCATION.to_owned(), DEPTH.to_owned(), dirty("off")]);
    assert!(view.context(&dirty("on")).is_none());
    assert_eq!(runs(&*view, &dirty("off")), [(65536, 1), (DISK_BYTES - 65536, 0)]);
}

#[test]
fn the_rules_of_exports_are_qemus() {
    let rig = Rig::new();
    rig.snap("s");
    rig.add_bitmap("vda", "on", false);
    rig.add_bitmap("vda", "off", true);
    rig.add_bitmap("ro", "r", false);
    let not_running = rig.table.add(spec("e", "vda"), false).unwrap_err();
    assert_eq!(not_running.text, "NBD server not running");
    let writable = |node: &str| ExportSpec { writable: true, ..spec("e", node) };
    let with = |node: &str, bitmap: BitmapName| ExportSpec { bitmaps: vec![bitmap], ..spec("e", node) };
    let long = "n".repeat(4097);
    for (spec, text) in [
        (spec("e", "no"), "Cannot find device='' nor node-name='no'".to_owned()),
        (spec("e", "no/vda"), "Cannot find device='' nor node-name='no/vda'".to_owned()),
        (writable("ro"), "Cannot export read-only node as writable".to_owned()),
        (writable("s/vda"), "Cannot export read-only node as writable".to_owned()),
        (ExportSpec { name: long.clone(), ..spec("e", "vda") }, format!("export name '{long}' too long")),
        (ExportSpec { description: Some(long.clone()), ..spec("e", "vda") }, format!("description '{long}' too long")),
        (with("vda", own("no")), "Bitmap 'no' is not found".to_owned()),
        (with("vda", of("vda", "no")), "Dirty bitmap 'no' not found".to_owned()),
        (with("vda", of("no", "b")), "Node 'no' not found".to_owned()),
        (with("vda", of("ro", "r")), "Bitmap 'r' is of node 'ro', and not of 'vda'".to_owned()),
        (with("vda", own("on")), "Enabled bitmap 'on' incompatible with readonly export".to_owned()),
        (with("s/vda", own("on")), "Enabled bitmap 'on' incompatible with readonly export".to_owned()),
        (with("vda", own("s")), "Bitmap 's' belongs to checkpoint 's' and cannot be exported".to_owned()),
    ] {
        assert_eq!(rig.add(spec), text);
    }
    assert!(rig.table.infos().is_empty() && rig.fleece.bitmaps("vda").unwrap().iter().all(|info| !info.busy));
    assert_eq!(rig.add(with("s/vda", of("vda", "on"))), "");
    assert_eq!(rig.clear("on").unwrap_err().errno, errno::EBUSY);
    assert_eq!(rig.add(spec("e", "vda")), "Block export id 'e' is already in use");
    assert_eq!(rig.add(ExportSpec { name: "e".into(), ..spec("f", "vda") }), "NBD server already has export named 'e'");
    let busy = "Bitmap 'on' is currently in use by another operation and cannot be used";
    assert_eq!(rig.add(ExportSpec { writable: true, bitmaps: vec![own("on")], ..spec("f", "vda") }), busy);
    rig.table.remove("e", false).unwrap();
    assert_eq!(*rig.gone.lock(), ["e"]);
    rig.clear("on").unwrap();
    // One bitmap under both of its names, one that does not record, and one of a disk that nobody writes to.
    let twice = ExportSpec { bitmaps: vec![own("off"), of("vda", "off")], ..spec("e", "vda") };
    assert_eq!(rig.add(twice), "");
    assert_eq!(rig.add(ExportSpec { bitmaps: vec![own("r")], downgrade: true, writable: true, ..spec("r", "ro") }), "");
    assert!(rig.table.open("r").unwrap().read_only());
    let live = rig.table.open("e").unwrap();
    assert_eq!(live.contexts(), [ALLOCATION.to_owned(), dirty("off")]);
    assert_eq!(live.write(&[1], 0).unwrap_err().errno(), errno::EPERM);
    let order: Vec<_> = rig.table.infos().into_iter().map(|info| info.id).collect();
    assert_eq!(order, ["r", "e"]);
    drop(live);
    rig.table.clear();
    assert_eq!(*rig.gone.lock(), ["e", "r", "e"]);
}

#[test]
fn an_export_with_clients_goes_by_force_alone_and_holds_all_until_they_are_gone() {
    let rig = Rig::new();
    rig.add_bitmap("vda", "b", true);
    assert_eq!(rig.add(ExportSpec { bitmaps: vec![own("b")], ..spec("e", "vda") }), "");
    let client = rig.table.open("e").unwrap();
    let refused = rig.table.remove("e", false).unwrap_err();
    assert_eq!(refused.text, "export 'e' still in use");
    assert!(refused.hint.unwrap().contains("hard"));
    assert_eq!(rig.table.remove("no", true).unwrap_err().text, "Export 'no' is not found");
    assert_eq!(rig.table.remove("e", true).unwrap(), "e");
    assert!(rig.table.open("e").is_err() && rig.table.list().is_empty());
    assert_eq!(rig.table.remove("e", true).unwrap_err().text, "Export 'e' is already shutting down");
    assert_eq!(rig.add(spec("e", "vda")), "Block export id 'e' is already in use");
    assert!(rig.table.infos()[0].is_ending && rig.gone.lock().is_empty());
    let context = client.context(&dirty("b")).unwrap();
    drop(client);
    assert!(rig.clear("b").is_err() && rig.gone.lock().is_empty(), "a context is one that it has");
    drop(context);
    assert_eq!(*rig.gone.lock(), ["e"]);
    assert!(rig.table.infos().is_empty());
    rig.clear("b").unwrap();
    assert_eq!(rig.add(spec("e", "vda")), "");
}

#[test]
fn a_client_that_is_leaving_does_not_keep_its_export() {
    let rig = Rig::new();
    assert_eq!(rig.add(spec("e", "vda")), "");
    let client = rig.table.open("e").unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(std::time::Duration::from_millis(20));
            drop(client);
        });
        rig.table.remove("e", false).unwrap();
    });
}
