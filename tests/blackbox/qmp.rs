//! The control socket speaks QMP: to a client of a few lines, and to QEMU's own.

use crate::harness::*;
use crate::qmp_peer::python_with_qmp;
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::time::Duration;

pub struct Client {
    reader: BufReader<UnixStream>,
    greeting: Value,
    /// Events that came before answers.
    events: VecDeque<Value>,
}

impl Client {
    fn raw(mount: &Mount) -> Client {
        let path = mount.status()["qmp"].as_str().expect("status.json names the socket").to_owned();
        let stream = UnixStream::connect(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let mut client = Client { reader: BufReader::new(stream), greeting: Value::Null, events: VecDeque::new() };
        client.greeting = client.line();
        client
    }

    pub fn new(mount: &Mount) -> Client {
        let mut client = Client::raw(mount);
        assert_eq!(client.call(json!({"execute": "qmp_capabilities"})), json!({"return": {}}));
        client
    }

    #[track_caller]
    fn line(&mut self) -> Value {
        let mut line = String::new();
        assert_ne!(self.reader.read_line(&mut line).unwrap(), 0, "the daemon hung up");
        serde_json::from_str(&line).unwrap_or_else(|e| panic!("{e}: {line}"))
    }

    /// Sends a request and gives its answer; events in between are kept.
    #[track_caller]
    fn call(&mut self, request: Value) -> Value {
        self.send(&request.to_string());
        loop {
            let answer = self.line();
            if answer.get("event").is_none() {
                return answer;
            }
            self.events.push_back(answer);
        }
    }

    fn send(&mut self, text: &str) {
        self.reader.get_mut().write_all(format!("{text}\n").as_bytes()).unwrap();
    }

    /// The next event of that name; those before it are passed over.
    #[track_caller]
    pub fn event(&mut self, name: &str) -> Value {
        loop {
            let event = self.events.pop_front().unwrap_or_else(|| self.line());
            if event["event"] == name {
                return event;
            }
        }
    }

    #[track_caller]
    pub fn ok(&mut self, command: &str, arguments: Value) -> Value {
        let answer = self.call(json!({"execute": command, "arguments": arguments}));
        answer.get("return").unwrap_or_else(|| panic!("{command}: {answer}")).clone()
    }

    #[track_caller]
    pub fn error(&mut self, command: &str, arguments: Value) -> (String, String) {
        let answer = self.call(json!({"execute": command, "arguments": arguments}));
        let error = answer.get("error").unwrap_or_else(|| panic!("{command} succeeded: {answer}"));
        (error["class"].as_str().unwrap().to_owned(), error["desc"].as_str().unwrap().to_owned())
    }
}

#[test]
fn greeting_capabilities_ids_and_error_objects_are_qemus() {
    requires!();
    let rig = Rig::new();
    let mount = rig.mount([rig.image("vda", 1)]);
    let mut client = Client::raw(&mount);
    assert!(client.greeting["QMP"]["version"].is_object() && client.greeting["QMP"]["capabilities"].is_array());
    assert_eq!(client.error("query-version", json!({})).0, "CommandNotFound", "before qmp_capabilities");
    client.call(json!({"execute": "qmp_capabilities"}));
    assert_eq!(client.call(json!({"execute": "query-status", "id": "x7"}))["id"], "x7");
    assert_eq!(
        client.error("no-such-command", json!({})),
        ("CommandNotFound".into(), "The command no-such-command has not been found".into())
    );
    client.send("{ this is no JSON }");
    assert_eq!(client.line()["error"]["class"], "GenericError");
    assert!(client.ok("query-version", json!({}))["qemu"].is_object());
    let commands = client.ok("query-commands", json!({}));
    assert!(commands.as_array().unwrap().iter().any(|c| c["name"] == "fleecefs-snapshot-create"), "{commands}");
}

#[test]
fn snapshots_and_consumers_are_driven_by_the_socket() {
    requires!();
    let rig = Rig::new();
    let mount = rig.mount([rig.image("vda", 1)]);
    let mut client = Client::new(&mount);
    client.ok("fleecefs-snapshot-create", json!({"name": "a"}));
    assert!(mount.view("a", "vda").exists(), "a snapshot of the socket is in the tree");
    assert_eq!(client.ok("fleecefs-snapshot-list", json!({}))[0]["name"], "a");
    let (class, text) = client.error("fleecefs-snapshot-create", json!({"name": "a"}));
    assert!(class == "GenericError" && text.contains("'a'"), "{text}");
    client.ok("fleecefs-snapshot-complete", json!({"name": "a", "consumer": "daily"}));
    assert!(!mount.snapshot_dir("a").exists());
    assert_eq!(client.ok("fleecefs-consumer-list", json!({}))[0]["name"], "daily");
    client.ok("fleecefs-snapshot-create", json!({"name": "b"}));
    client.ok("fleecefs-snapshot-cancel", json!({"name": "b"}));
    assert_eq!(client.ok("fleecefs-checkpoint-list", json!({})).as_array().unwrap().len(), 1);
    assert_eq!(client.ok("fleecefs-status", json!({}))["disks"][0]["name"], "vda");
}

#[test]
fn a_transaction_freezes_and_switches_bitmaps_at_one_instant() {
    requires!();
    let rig = Rig::new();
    let mount = rig.mount([rig.image("vda", 1), rig.image("vdb", 1)]);
    let mut client = Client::new(&mount);
    client.ok("block-dirty-bitmap-add", json!({"node": "vda", "name": "until", "persistent": true}));
    let guest = mount.guest("vda");
    guest.write_all_at(b"old", 0).unwrap();
    let act = |kind: &str, data: Value| json!({"type": kind, "data": data});
    let mut actions = vec![
        act("block-dirty-bitmap-disable", json!({"node": "vda", "name": "until"})),
        act("fleecefs-snapshot-create", json!({"name": "s", "disks": ["vda"]})),
        act("block-dirty-bitmap-add", json!({"node": "vda", "name": "since"})),
        act("abort", json!({})),
    ];
    let (class, text) = client.error("transaction", json!({"actions": actions}));
    assert_eq!((class.as_str(), text.as_str()), ("GenericError", "Transaction aborted using Abort action"));
    assert!(!mount.snapshot_dir("s").exists());
    actions.pop();
    client.ok("transaction", json!({"actions": actions}));
    guest.write_all_at(b"new", 0).unwrap();
    guest.write_all_at(b"new", 5 * GRANULE).unwrap();
    assert_eq!(&fs::read(mount.view("s", "vda")).unwrap()[..3], b"old");
    assert!(!mount.view("s", "vdb").exists(), "of the disks that were named");
    let nodes = client.ok("query-named-block-nodes", json!({}));
    let count = |name: &str| {
        let rows = nodes[0]["dirty-bitmaps"].as_array().unwrap();
        rows.iter().find(|row| row["name"] == name).unwrap()["count"].as_u64().unwrap() / GRANULE
    };
    assert_eq!((count("until"), count("since"), count("s")), (1, 2, 2), "{nodes}");
    mount.drop_snap("s");
}

#[test]
fn the_socket_is_where_qmp_says() {
    requires!();
    let rig = Rig::new();
    let socket = rig.path("control.sock");
    let mount = rig.mount(args!["--qmp", &socket, rig.image("vda", 1)]);
    assert_eq!(mount.status()["qmp"].as_str(), socket.to_str());
    Client::new(&mount).ok("query-status", json!({}));
}

#[test]
fn quit_ends_the_daemon_cleanly() {
    requires!();
    let rig = Rig::new();
    let image = rig.image("vda", 1);
    let mount = rig.mount([&image]);
    let pid = mount.pid;
    Client::new(&mount).call(json!({"execute": "quit"}));
    eventually("the end of the daemon", || !alive(pid) && !is_mounted(&mount.dir));
    let mount = rig.mount([&image]);
    assert_eq!(mount.run("status", args![]).status.code(), Some(0));
}

#[test]
fn qemus_own_client_drives_it() {
    requires!("python3");
    let Some(python) = python_with_qmp("qmp") else { return };
    let rig = Rig::new();
    let mount = rig.mount([rig.image("vda", 1)]);
    let script = r#"
import asyncio, sys
from qemu.qmp import QMPClient, ExecuteError

async def main(path):
    client = QMPClient("test")
    await client.connect(path)
    assert (await client.execute("query-status"))["status"] == "running"
    await client.execute("fleecefs-snapshot-create", {"name": "a"})
    assert [s["name"] for s in await client.execute("fleecefs-snapshot-list")] == ["a"]
    try:
        await client.execute("fleecefs-snapshot-complete", {"name": "zzz"})
        raise SystemExit("an unknown snapshot was completed")
    except ExecuteError as e:
        assert "zzz" in str(e), e
    await client.execute("fleecefs-snapshot-complete", {"name": "a"})
    await client.disconnect()

asyncio.run(main(sys.argv[1]))
"#;
    ok(tool(python).args(["-c", script]).arg(mount.status()["qmp"].as_str().unwrap()));
}
