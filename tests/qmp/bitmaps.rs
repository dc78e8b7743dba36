//! Bitmaps, transactions and nodes: what is ours and not QEMU's. What is QEMU's is compared with it in `blackbox`.

use super::*;

fn bitmaps(c: &mut Client, node: &str) -> Value {
    let nodes = c.execute("query-named-block-nodes", json!({"flat": true})).unwrap();
    let row = nodes.as_array().unwrap().iter().find(|row| row["node-name"] == node).unwrap().clone();
    row.get("dirty-bitmaps").cloned().unwrap_or(json!([]))
}

fn act(kind: &str, data: Value) -> Value {
    json!({"type": kind, "data": data})
}

#[test]
fn a_snapshot_and_bitmaps_are_of_one_instant_or_are_not() {
    let f = Fixture::new();
    let mut c = f.client();
    c.execute("block-dirty-bitmap-add", json!({"node": "vda", "name": "b"})).unwrap();
    f.fleece.disk("vda").unwrap().write(b"x", 0).unwrap();
    let actions = vec![
        act("block-dirty-bitmap-add", json!({"node": "vda", "name": "since"})),
        act("fleecefs-snapshot-create", json!({"name": "s", "disks": ["vda"]})),
        act("block-dirty-bitmap-disable", json!({"node": "vda", "name": "b"})),
    ];
    let mut aborted = actions.clone();
    aborted.push(act("abort", json!({})));
    let e = c.execute("transaction", json!({"actions": aborted})).unwrap_err();
    assert!(e.to_string().contains("Transaction aborted using Abort action"), "{e}");
    assert!(f.fleece.snapshots().is_empty() && f.fleece.checkpoints().is_empty());
    assert_eq!(bitmaps(&mut c, "vda").as_array().unwrap().len(), 1);
    c.execute("transaction", json!({"actions": actions})).unwrap();
    f.fleece.disk("vda").unwrap().write(b"x", 1 << 19).unwrap();
    let rows = bitmaps(&mut c, "vda");
    let count = |name: &str| {
        let row = rows.as_array().unwrap().iter().find(|row| row["name"] == name).unwrap();
        row["count"].as_u64().unwrap()
    };
    assert_eq!((count("b"), count("since"), count("s")), (65536, 65536, 65536), "{rows}");
    let mut byte = [0];
    let snapshot = f.fleece.snapshots().pop().unwrap();
    snapshot.view("vda").unwrap().read(&mut byte, 1 << 19).unwrap();
    assert_eq!(byte, [0], "the view is of the instant");
    c.execute("fleecefs-snapshot-complete", json!({"name": "s"})).unwrap();
}

#[test]
fn what_a_checkpoint_owns_is_marked_and_only_read() {
    let f = Fixture::new();
    let mut c = f.client();
    c.execute("fleecefs-snapshot-create", json!({"name": "monday"})).unwrap();
    c.execute("fleecefs-snapshot-complete", json!({"name": "monday"})).unwrap();
    let row = bitmaps(&mut c, "vda")[0].clone();
    assert_eq!((&row["name"], &row["checkpoint"]), (&json!("monday"), &json!(true)));
    for command in ["clear", "enable", "disable", "remove"] {
        let command = format!("block-dirty-bitmap-{command}");
        let e = c.execute(&command, json!({"node": "vda", "name": "monday"})).unwrap_err();
        assert!(e.to_string().contains("checkpoint") && e.to_string().contains("monday"), "{e}");
    }
    f.fleece.disk("vda").unwrap().write(b"x", 0).unwrap();
    c.execute("block-dirty-bitmap-add", json!({"node": "vda", "name": "b", "disabled": true})).unwrap();
    c.execute("block-dirty-bitmap-merge", json!({"node": "vda", "target": "b", "bitmaps": ["monday"]})).unwrap();
    let mut hash = |name: &str| {
        c.execute("x-debug-block-dirty-bitmap-sha256", json!({"node": "vda", "name": name})).unwrap()["sha256"].clone()
    };
    assert_eq!(hash("b"), hash("monday"));
}

/// Every command with every argument of a kind that it may not expect: refused or done, and never a bug.
#[test]
fn no_argument_meets_a_bug() {
    let f = Fixture::new();
    let mut c = f.client();
    let names = c.execute("query-commands", json!({})).unwrap();
    let keys = [
        "node",
        "name",
        "target",
        "bitmaps",
        "granularity",
        "persistent",
        "disabled",
        "actions",
        "properties",
        "driver",
        "node-name",
        "file",
        "filename",
        "cache",
        "id",
        "device",
        "speed",
        "force",
        "flat",
        "disk",
        "disks",
        "size",
        "offset",
        "length",
        "consumer",
        "checkpoint",
        "since",
        "format",
        "snapshot",
        "l2-cache-size",
    ];
    let own = f.dir.path().join("none").display().to_string();
    let values = [
        json!(null),
        json!(true),
        json!(0),
        json!(-1),
        json!(u64::MAX),
        json!(i64::MIN),
        json!(1e300),
        json!(""),
        json!("vda"),
        json!("\u{0}\n/../ä"),
        json!("x".repeat(2000)),
        json!(own),
        json!([]),
        json!([null]),
        json!([{"node": "vda", "name": "b"}]),
        json!([{"type": "abort", "data": {}}]),
        json!({}),
        json!({"driver": "file", "filename": own}),
    ];
    for name in names.as_array().unwrap() {
        let name = name["name"].as_str().unwrap();
        if name == "quit" {
            continue;
        }
        for key in keys {
            for value in &values {
                // Alone, and beside what the command needs to go on.
                for mut arguments in [
                    json!({}),
                    json!({"node": "vda", "name": "b", "target": "b", "bitmaps": ["b"], "driver": "raw",
                        "node-name": "n", "device": "j", "speed": 1}),
                ] {
                    arguments[key] = value.clone();
                    if let Err(e) = c.execute(name, arguments.clone()) {
                        assert!(!e.to_string().contains("internal error"), "{name} {arguments}: {e}");
                    }
                }
            }
        }
    }
    let actions = ["abort", "block-dirty-bitmap-add", "block-dirty-bitmap-merge", "fleecefs-snapshot-create"];
    for (kind, value) in actions.iter().flat_map(|kind| values.iter().map(move |value| (kind, value))) {
        for key in ["node", "name", "bitmaps", "granularity", "disks"] {
            let mut data = json!({"node": "vda", "name": "b", "target": "b"});
            data[key] = value.clone();
            let question = json!({"actions": [{"type": kind, "data": data}, {"type": "abort", "data": value}]});
            if let Err(e) = c.execute("transaction", question.clone()) {
                assert!(!e.to_string().contains("internal error"), "{question}: {e}");
            }
        }
    }
}

#[test]
fn raw_disks_keep_persistent_bitmaps() {
    let f = Fixture::new();
    let mut c = f.client();
    c.execute("block-dirty-bitmap-add", json!({"node": "vda", "name": "b", "persistent": true})).unwrap();
    assert_eq!(bitmaps(&mut c, "vda")[0]["persistent"], true);
}

#[test]
fn a_merge_of_nothing_changes_nothing() {
    // qemu-storage-daemon 10.0.2 crashes here.
    let f = Fixture::new();
    let mut c = f.client();
    c.execute("block-dirty-bitmap-add", json!({"node": "vda", "name": "b"})).unwrap();
    let merge = json!({"node": "vda", "target": "b", "bitmaps": []});
    assert_eq!(c.execute("block-dirty-bitmap-merge", merge).unwrap(), json!({}));
}

#[test]
fn a_push_backup_that_is_refused_takes_its_transaction_with_it() {
    let f = Fixture::new();
    let mut raw = f.raw().negotiated();
    let add = act("block-dirty-bitmap-add", json!({"node": "vda", "name": "b"}));
    let backup = act("blockdev-backup", json!({"device": "vda", "target": "t", "sync": "full"}));
    let question = json!({"execute": "transaction", "arguments": {"actions": [add, backup]}});
    let text = "Cannot find device='t' nor node-name='t'";
    assert_eq!(raw.ask(&question.to_string()), error("GenericError", text));
    assert_eq!(bitmaps(&mut f.client(), "vda"), json!([]));
}

#[test]
fn options_that_would_change_how_a_disk_behaves_are_refused() {
    let f = Fixture::new();
    let file = f.image("vdb");
    let mut c = f.client();
    for (more, words) in [
        (json!({"discard": "ignore"}), "'discard'"),
        (json!({"detect-zeroes": "on"}), "'detect-zeroes'"),
        (json!({"cache": {"direct": true}}), "'cache.direct'"),
        (json!({"cache": {"no-flush": true}}), "'cache.no-flush'"),
        (json!({"active": false}), "'active'"),
        (json!({"offset": 512}), "'offset' of driver 'raw' is not supported"),
        (json!({"driver": "qcow2", "backing": null}), "'backing' of driver 'qcow2' is not supported"),
        (json!({"driver": "nbd"}), "does not accept value 'nbd'"),
        (json!({"file": {"driver": "file", "filename": "vdb.raw"}}), "not an absolute path"),
        (json!({"file": {"driver": "file", "filename": file, "locking": "off"}}), "'locking'"),
        (json!({"file": {"driver": "host_device", "filename": file}}), "to be a block device"),
        (json!({"file": {"driver": "raw", "file": "x"}}), "lies on one of driver 'file'"),
        (json!({"file": "vda"}), "Node 'vda' is a disk"),
        (json!({"driver": "qcow2"}), "qcow2"),
    ] {
        let mut node = json!({"driver": "raw", "node-name": "vdb", "file": {"driver": "file", "filename": file}});
        node.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let e = c.execute("blockdev-add", node.clone()).unwrap_err();
        assert!(e.to_string().contains(words), "{node}: {e}");
        assert_eq!(f.fleece.disks().len(), 1);
    }
    let same = json!({"driver": "raw", "node-name": "vdb", "discard": "unmap", "detect-zeroes": "off",
        "auto-read-only": true, "cache": {"direct": false, "no-flush": false},
        "file": {"driver": "file", "filename": file, "aio": "io_uring", "locking": "on"}});
    c.execute("blockdev-add", same).unwrap();
    assert_eq!(f.fleece.disk("vdb").unwrap().size(), DISK_BYTES);
}

#[test]
fn a_disk_in_use_is_not_removed_and_says_why() {
    let f = Fixture::new();
    let mut c = f.client();
    c.execute("fleecefs-snapshot-create", json!({"name": "s"})).unwrap();
    let e = c.execute("blockdev-del", json!({"node-name": "vda"})).unwrap_err();
    assert!(e.to_string().contains("Node vda is in use"), "{e}");
    assert!(e.hint_text().unwrap().contains("snapshot 's' holds it"), "{e}");
    c.execute("fleecefs-snapshot-cancel", json!({"name": "s"})).unwrap();
    c.execute("blockdev-del", json!({"node-name": "vda"})).unwrap();
    assert_eq!(c.execute("query-block", json!({})).unwrap(), json!([]));
}

#[test]
fn a_disk_that_goes_by_another_way_frees_its_file_node() {
    let f = Fixture::new();
    let file = f.image("vdb");
    let mut c = f.client();
    c.execute("blockdev-add", json!({"driver": "file", "node-name": "f", "filename": file})).unwrap();
    let e = c.execute("fleecefs-disk-add", json!({"file": file, "name": "f"})).unwrap_err();
    assert!(e.to_string().contains("a block node has this name"), "{e}");
    c.execute("blockdev-add", json!({"driver": "raw", "node-name": "vdb", "file": "f"})).unwrap();
    let nodes = c.execute("query-named-block-nodes", json!({})).unwrap();
    let names: Vec<&str> = nodes.as_array().unwrap().iter().map(|row| row["node-name"].as_str().unwrap()).collect();
    assert_eq!(names, ["vda", "vdb", "f"]);
    let e = c.execute("blockdev-del", json!({"node-name": "f"})).unwrap_err();
    assert!(e.hint_text().unwrap().contains("disk 'vdb' lies on it"), "{e}");
    c.execute("fleecefs-disk-remove", json!({"name": "vdb"})).unwrap();
    c.execute("blockdev-del", json!({"node-name": "f"})).unwrap();
}
