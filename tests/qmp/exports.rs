//! NBD's commands: their texts, what they hold, and their event. `exports` of the crate tests the rules one by one, and
//! `qmp_peer` beside qemu-storage-daemon.

use super::*;

impl Fixture {
    fn listen(&self, c: &mut Raw) -> PathBuf {
        let path = self.dir.path().join("nbd");
        let addr = json!({"type": "unix", "data": {"path": path}});
        assert_eq!(run(c, "nbd-server-start", &json!({ "addr": addr })), json!({}));
        path
    }
}

/// What a command gives: the `return` or the text of the error. Events are passed over.
pub fn run(c: &mut Raw, command: &str, arguments: &Value) -> Value {
    c.send(&json!({ "execute": command, "arguments": arguments }).to_string());
    loop {
        let reply = c.receive();
        if reply["event"].is_null() {
            return reply.get("return").cloned().unwrap_or_else(|| reply["error"]["desc"].clone());
        }
    }
}

fn export(id: &str, node: &str) -> Value {
    json!({ "type": "nbd", "id": id, "node-name": node })
}

fn with(mut object: Value, members: Value) -> Value {
    object.as_object_mut().unwrap().extend(members.as_object().unwrap().clone());
    object
}

/// The names that a server lists, by `NBD_OPT_LIST`: connected as the protocol's baseline has it.
fn names(path: &std::path::Path) -> Vec<String> {
    let mut stream = UnixStream::connect(path).unwrap();
    stream.set_read_timeout(Some(NEVER)).unwrap();
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting).unwrap();
    stream.write_all(&3u32.to_be_bytes()).unwrap();
    stream.write_all(b"IHAVEOPT").unwrap();
    stream.write_all(&[0, 0, 0, 3, 0, 0, 0, 0]).unwrap();
    let mut names = Vec::new();
    loop {
        let mut head = [0; 20];
        stream.read_exact(&mut head).unwrap();
        let word = |at: usize| u32::from_be_bytes(head[at..at + 4].try_into().unwrap());
        let mut payload = vec![0; word(16) as usize];
        stream.read_exact(&mut payload).unwrap();
        if word(12) != 2 {
            return names;
        }
        let len = u32::from_be_bytes(payload[..4].try_into().unwrap()) as usize;
        names.push(String::from_utf8(payload[4..4 + len].to_vec()).unwrap());
    }
}

#[test]
fn the_server_starts_once_and_stops_with_its_exports() {
    let f = Fixture::new();
    let mut c = f.raw().negotiated();
    assert_eq!(run(&mut c, "nbd-server-stop", &json!({})), "NBD server not running");
    assert_eq!(run(&mut c, "block-export-add", &export("e", "vda")), "NBD server not running");
    assert_eq!(run(&mut c, "nbd-server-add", &json!({"device": "vda"})), "NBD server not running");
    let path = f.listen(&mut c);
    let addr = json!({"type": "unix", "data": {"path": f.dir.path().join("other")}});
    assert_eq!(run(&mut c, "nbd-server-start", &json!({ "addr": addr })), "NBD server already running");
    assert_eq!(run(&mut c, "block-export-add", &export("e", "vda")), json!({}));
    assert_eq!(run(&mut c, "nbd-server-add", &json!({"device": "vda", "name": "two"})), json!({}));
    assert_eq!(names(&path), ["two", "vda"]);
    let row = |id: &str| json!({"id": id, "type": "nbd", "node-name": "vda", "shutting-down": false});
    assert_eq!(run(&mut c, "query-block-exports", &json!({})), json!([row("two"), row("e")]));
    assert_eq!(run(&mut c, "nbd-server-stop", &json!({})), json!({}));
    assert!(!path.exists());
    assert_eq!(run(&mut c, "query-block-exports", &json!({})), json!([]));
    assert_eq!(run(&mut c, "nbd-server-stop", &json!({})), "NBD server not running");
    f.listen(&mut c);
}

#[test]
fn a_client_that_never_says_what_it_wants_goes_when_its_time_is_over() {
    let f = Fixture::new();
    let mut c = f.raw().negotiated();
    let path = f.dir.path().join("nbd");
    let addr = json!({"type": "unix", "data": {"path": path}});
    assert_eq!(run(&mut c, "nbd-server-start", &json!({ "addr": addr, "handshake-max-seconds": 1 })), json!({}));
    let mut silent = UnixStream::connect(&path).unwrap();
    silent.set_read_timeout(Some(NEVER)).unwrap();
    let began = std::time::Instant::now();
    let mut greeting = Vec::new();
    // Its end may be a reset.
    let _ = silent.read_to_end(&mut greeting);
    assert_eq!(greeting.len(), 18);
    assert!(began.elapsed() >= Duration::from_millis(900) && began.elapsed() < Duration::from_secs(9));
}

#[test]
fn an_export_that_goes_is_told() {
    let f = Fixture::new();
    let mut c = f.raw().negotiated();
    f.listen(&mut c);
    run(&mut c, "block-export-add", &export("e", "vda"));
    let in_use = f.client().execute("blockdev-del", json!({"node-name": "vda"})).unwrap_err();
    assert!(in_use.to_string().contains("Node vda is in use"), "{in_use}");
    c.send(r#"{"execute":"block-export-del","arguments":{"id":"e"}}"#);
    let event = c.receive();
    assert_eq!((&event["event"], &event["data"]), (&json!("BLOCK_EXPORT_DELETED"), &json!({"id": "e"})));
    assert_eq!(c.receive(), json!({"return": {}}));
    assert_eq!(run(&mut c, "block-export-del", &json!({"id": "e"})), "Export 'e' is not found");
    assert_eq!(run(&mut c, "nbd-server-remove", &json!({"name": "e"})), "Export 'e' is not found");
    assert_eq!(run(&mut c, "blockdev-del", &json!({"node-name": "vda"})), json!({}));
}

#[test]
fn addresses_and_options_that_are_not_served_are_refused_in_words() {
    let f = Fixture::new();
    let mut c = f.raw().negotiated();
    let here = json!({"type": "unix", "data": {"path": f.dir.path().join("n")}});
    let inet = |more: Value| json!({"type": "inet", "data": with(json!({"host": "127.0.0.1", "port": "0"}), more)});
    for (arguments, text) in [
        (json!({}), "Parameter 'addr' is missing"),
        (json!({"addr": {"type": "foo"}}), "Parameter 'type' does not accept value 'foo'"),
        (json!({"addr": {"type": "unix"}}), "Parameter 'addr.data' is missing"),
        (json!({"addr": {"type": "unix", "data": {}}}), "Parameter 'addr.data.path' is missing"),
        (json!({"addr": {"type": "unix", "data": {"path": "x", "foo": 1}}}), "Parameter 'addr.data.foo' is unexpected"),
        (json!({"addr": {"type": "unix", "data": {"path": "x"}}}), "is not an absolute path"),
        (json!({"addr": {"type": "unix", "data": {"path": "/x", "abstract": true}}}), "not supported by fleecefs"),
        (json!({"addr": {"type": "vsock", "data": {}}}), "addr.type=vsock is not supported"),
        (json!({"addr": {"type": "inet", "data": {"host": "::"}}}), "Parameter 'addr.data.port' is missing"),
        (json!({ "addr": inet(json!({"port": "99999"})) }), "no number up to 65535"),
        (json!({ "addr": inet(json!({"to": 5})) }), "addr.data.to is not supported"),
        (json!({ "addr": inet(json!({"ipv6": false})) }), "is not supported by fleecefs"),
        (json!({ "addr": inet(json!({})) }), "TCP needs TLS"),
        (json!({"addr": here, "tls-authz": "a"}), "tls-authz is not supported"),
        (json!({"addr": here, "tls-creds": "t"}), "No TLS credentials with id 't'"),
        (json!({"addr": here, "max-connections": -1}), "Parameter 'max-connections' expects uint32_t"),
        (
            json!({"addr": {"type": "unix", "data": {"path": f.dir.path().join("mnt/n")}}}),
            "lies inside the mount point",
        ),
        (json!({"addr": {"type": "unix", "data": {"path": f.dir.path().join("vda.raw")}}}), "something else has"),
    ] {
        let got = run(&mut c, "nbd-server-start", &arguments);
        assert!(got.as_str().is_some_and(|got| got.contains(text)), "{arguments}: {got}");
    }
    f.listen(&mut c);
    for (arguments, text) in [
        (json!({}), "Parameter 'type' is missing"),
        (json!({"type": "nbd"}), "Parameter 'id' is missing"),
        (json!({"type": "fuse", "id": "e", "node-name": "vda"}), "No driver found for the requested export type"),
        (json!({"type": "x", "id": "e", "node-name": "vda"}), "Parameter 'type' does not accept value 'x'"),
        (export("", "vda"), "Invalid block export id"),
        (export("1", "vda"), "Invalid block export id"),
        (export("a/b", "vda"), "Invalid block export id"),
        (with(export("e", "vda"), json!({"iothread": "i"})), "iothread \"i\" not found"),
        (with(export("e", "vda"), json!({"fixed-iothread": true, "foo": 1})), "Parameter 'foo' is unexpected"),
        (with(export("e", "vda"), json!({"bitmaps": [1]})), "expected: BlockDirtyBitmapOrStr"),
        (with(export("e", "vda"), json!({"bitmaps": [{"node": "x"}]})), "Parameter 'bitmaps[0].name' is missing"),
        (export("e", "no"), "Cannot find device='' nor node-name='no'"),
    ] {
        let got = run(&mut c, "block-export-add", &arguments);
        assert!(got.as_str().is_some_and(|got| got.contains(text)), "{arguments}: {got}");
    }
    let got = run(&mut c, "nbd-server-add", &json!({"device": "no"}));
    assert_eq!(got, "Cannot find device='no' nor node-name='no'");
    assert_eq!(
        run(&mut c, "block-export-del", &json!({"id": "e", "mode": "x"})),
        "Parameter 'mode' does not accept value 'x'"
    );
    assert_eq!(run(&mut c, "query-block-exports", &json!({})), json!([]));
}

/// QEMU's recipe of an external backup: one instant for the new bitmap, the end of the old one and the frozen node.
#[test]
fn an_external_backup_shows_the_old_bitmap_over_the_frozen_node() {
    let f = Fixture::new();
    let mut c = f.raw().negotiated();
    let disk = f.fleece.disk("vda").unwrap();
    assert_eq!(run(&mut c, "block-dirty-bitmap-add", &json!({"node": "vda", "name": "old"})), json!({}));
    disk.write(&[1; 4096], 0).unwrap();
    let actions = json!([
        {"type": "block-dirty-bitmap-add", "data": {"node": "vda", "name": "new"}},
        {"type": "block-dirty-bitmap-disable", "data": {"node": "vda", "name": "old"}},
        {"type": "fleecefs-snapshot-create", "data": {"name": "s", "disks": ["vda"]}},
    ]);
    assert_eq!(run(&mut c, "transaction", &json!({ "actions": actions })), json!({}));
    disk.write(&[2; 4096], 512 << 10).unwrap();
    f.listen(&mut c);
    let asked = with(export("e", "s/vda"), json!({"name": "backup", "bitmaps": ["old"]}));
    assert_eq!(run(&mut c, "block-export-add", &asked), json!({}));
    let old = json!({"node": "vda", "name": "old"});
    let busy = "Bitmap 'old' is currently in use by another operation and cannot be used";
    assert_eq!(run(&mut c, "block-dirty-bitmap-remove", &old), busy);
    let rows = run(&mut c, "query-block", &json!({}));
    let bitmaps = rows[0]["inserted"]["dirty-bitmaps"].as_array().unwrap().clone();
    let row = bitmaps.iter().find(|row| row["name"] == "old").unwrap();
    assert_eq!((&row["busy"], &row["recording"], &row["count"]), (&json!(true), &json!(false), &json!(65536)));
    assert_eq!(run(&mut c, "block-export-del", &json!({"id": "e"})), json!({}));
    // It failed: what was to be copied comes back.
    let merge = json!({"node": "vda", "target": "new", "bitmaps": ["old"]});
    assert_eq!(run(&mut c, "block-dirty-bitmap-merge", &merge), json!({}));
    assert_eq!(run(&mut c, "block-dirty-bitmap-remove", &old), json!({}));
    let count = f.fleece.bitmaps("vda").unwrap().iter().find(|info| info.name == "new").unwrap().count;
    assert_eq!(count, 2 * 65536);
}
