//! The control socket against the core: what a QMP client sees, over a real socket and real images.

#[path = "qmp/bitmaps.rs"]
mod bitmaps;
#[path = "qmp/exports.rs"]
mod exports;
#[path = "qmp/jobs.rs"]
mod jobs;
#[cfg(feature = "tls")]
#[path = "qmp/objects.rs"]
mod objects;
#[path = "qmp/push.rs"]
mod push;

use fleecefs::backup::jobs::Jobs;
use fleecefs::daemon::{Nbd, NbdPlan};
use fleecefs::error::Result;
use fleecefs::fleece::{Action, Applied, Disk, DiskSpec, Event, Fleece, Options, Refused, Snapshot, SnapshotRequest};
use fleecefs::qmp::{Client, Events, ExportHost, Host, Listener, Nodes, Server, server::MAX_CONNECTIONS};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

/// The daemon without FUSE and signals.
struct TestHost {
    fleece: Arc<Fleece>,
    jobs: Arc<Jobs>,
    nodes: Nodes,
    nbd: Arc<Nbd>,
    quits: Sender<()>,
}

impl Host for TestHost {
    fn fleece(&self) -> &Arc<Fleece> {
        &self.fleece
    }
    fn create_snapshot(&self, request: &SnapshotRequest) -> Result<Arc<Snapshot>> {
        self.fleece.create_snapshot(request)
    }
    fn apply(&self, actions: &[Action]) -> std::result::Result<Applied, Refused> {
        self.fleece.apply(actions)
    }
    fn jobs(&self) -> &Arc<Jobs> {
        &self.jobs
    }
    fn nodes(&self) -> &Nodes {
        &self.nodes
    }
    fn exports(&self) -> &dyn ExportHost {
        &*self.nbd
    }
    fn check_image(&self, _: &DiskSpec) -> Result<()> {
        Ok(())
    }
    fn add_disk(&self, spec: &DiskSpec) -> Result<Arc<Disk>> {
        self.fleece.add_disk(spec)
    }
    fn status(&self) -> Value {
        json!({ "disks": self.fleece.disk_infos() })
    }
    fn quit(&self) {
        self.quits.send(()).unwrap();
    }
}

struct Fixture {
    dir: tempfile::TempDir,
    fleece: Arc<Fleece>,
    jobs: Arc<Jobs>,
    nbd: Arc<Nbd>,
    events: Arc<Events>,
    server: Option<Server>,
    quits: Receiver<()>,
}

const DISK_BYTES: u64 = 1 << 20;
/// So that a test fails and does not hang where an answer never comes.
const NEVER: Duration = Duration::from_secs(60);

impl Fixture {
    fn new() -> Fixture {
        let dir = tempfile::tempdir().unwrap();
        let fleece = Fleece::new(Options { state_dir: Some(dir.path().join("state")), ..Options::default() });
        let events = Arc::new(Events::default());
        let (quits, quit) = channel();
        let told = events.clone();
        let jobs = Jobs::new(move |event| told.emit_job(event));
        let nodes = Nodes::default();
        let nbd = Arc::new(Nbd::new(NbdPlan::default(), &dir.path().join("mnt"), &fleece, &events));
        let host = Arc::new(TestHost { fleece: fleece.clone(), jobs: jobs.clone(), nodes, nbd: nbd.clone(), quits });
        let listener = Listener::bind(&dir.path().join("qmp")).unwrap();
        let server = Server::start(listener, host, events.clone()).unwrap();
        let fixture = Fixture { dir, fleece, jobs, nbd, events, server: Some(server), quits: quit };
        let image = fixture.image("vda");
        fixture.fleece.add_disk(&spec("vda", image)).unwrap();
        fixture
    }

    fn image(&self, name: &str) -> PathBuf {
        let path = self.dir.path().join(format!("{name}.raw"));
        std::fs::File::create(&path).unwrap().set_len(DISK_BYTES).unwrap();
        path
    }

    fn raw(&self) -> Raw {
        let stream = UnixStream::connect(self.dir.path().join("qmp")).unwrap();
        stream.set_read_timeout(Some(NEVER)).unwrap();
        Raw { lines: BufReader::new(stream.try_clone().unwrap()), stream }
    }

    fn client(&self) -> Client {
        Client::connect(&self.dir.path().join("qmp")).unwrap()
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        if let Some(server) = self.server.take() {
            server.finish();
        }
        self.nbd.stop();
        let _ = self.fleece.close();
    }
}

fn spec(name: &str, file: PathBuf) -> DiskSpec {
    DiskSpec { name: Some(name.into()), file, ..Default::default() }
}

/// A connection on which every byte is ours.
struct Raw {
    stream: UnixStream,
    lines: BufReader<UnixStream>,
}

impl Raw {
    fn send(&mut self, text: &str) {
        self.stream.write_all(text.as_bytes()).unwrap();
    }

    fn receive(&mut self) -> Value {
        let mut line = String::new();
        assert_ne!(self.lines.read_line(&mut line).unwrap(), 0, "connection closed");
        assert!(line.ends_with("\r\n"));
        serde_json::from_str(&line).unwrap()
    }

    fn ask(&mut self, text: &str) -> Value {
        self.send(text);
        self.receive()
    }

    fn negotiated(mut self) -> Raw {
        assert!(self.receive()["QMP"].is_object());
        assert_eq!(self.ask(r#"{"execute":"qmp_capabilities"}"#), json!({"return": {}}));
        self
    }

    fn is_closed(&mut self) -> bool {
        // A reset is an end, too: the server closes with input unread.
        match self.lines.read(&mut [0]) {
            Ok(count) => count == 0,
            Err(e) => e.kind() != ErrorKind::WouldBlock,
        }
    }
}

fn error(class: &str, desc: &str) -> Value {
    json!({"error": {"class": class, "desc": desc}})
}

#[test]
fn greeting_and_negotiation_are_qemus() {
    let f = Fixture::new();
    let mut c = f.raw();
    let greeting = c.receive();
    assert!(greeting["QMP"]["version"]["qemu"]["major"].is_u64());
    assert_eq!(greeting["QMP"]["version"]["package"], concat!("fleecefs ", env!("CARGO_PKG_VERSION")));
    assert_eq!(greeting["QMP"]["capabilities"], json!([]));
    let expecting = error("CommandNotFound", "Expecting capabilities negotiation with 'qmp_capabilities'");
    assert_eq!(c.ask(r#"{"execute":"query-version"}"#), expecting);
    assert_eq!(c.ask(r#"{"execute":"no-such"}"#), expecting);
    assert_eq!(
        c.ask(r#"{"execute":"qmp_capabilities","arguments":{"enable":["oob"]}}"#),
        error("GenericError", "Capability oob not available")
    );
    assert_eq!(
        c.ask(r#"{"execute":"qmp_capabilities","arguments":{"enable":1}}"#),
        error("GenericError", "Invalid parameter type for 'enable', expected: array")
    );
    assert_eq!(c.ask(r#"{"execute":"qmp_capabilities","id":[1,{}]}"#), json!({"return": {}, "id": [1, {}]}));
    let mut again = error("CommandNotFound", "Capabilities negotiation is already complete, command ignored");
    again["id"] = json!("x");
    assert_eq!(c.ask(r#"{"execute":"qmp_capabilities","id":"x"}"#), again);
}

#[test]
fn wrong_input_gets_qemus_texts_and_costs_nothing() {
    let f = Fixture::new();
    let mut c = f.raw().negotiated();
    for (input, desc) in [
        ("[1]", "QMP input must be a JSON object"),
        ("42\n", "QMP input must be a JSON object"),
        (r#"{"foo":1}"#, "QMP input member 'foo' is unexpected"),
        ("{}", "QMP input lacks member 'execute'"),
        (r#"{"execute":1}"#, "QMP input member 'execute' must be a string"),
        (r#"{"execute":"query-version","arguments":[]}"#, "QMP input member 'arguments' must be an object"),
        (r#"{"execute":"query-version","arguments":{"a":1}}"#, "Parameter 'a' is unexpected"),
        (r#"{"execute":"fleecefs-snapshot-create"}"#, "Parameter 'name' is missing"),
        (
            r#"{"execute":"fleecefs-snapshot-create","arguments":{"name":1}}"#,
            "Invalid parameter type for 'name', expected: string",
        ),
        (
            r#"{"execute":"fleecefs-snapshot-create","arguments":{"name":"s","disks":["vda",1]}}"#,
            "Invalid parameter type for 'disks[1]', expected: string",
        ),
        (r#"{"execute":"fleecefs-snapshot-create","arguments":{"name":"s","zoo":1}}"#, "Parameter 'zoo' is unexpected"),
        (
            r#"{"execute":"fleecefs-snapshot-create","arguments":{"name":"s","skip":["swap","tmp"]}}"#,
            "Parameter 'skip' does not accept value 'tmp'",
        ),
        (
            r#"{"execute":"fleecefs-disk-resize","arguments":{"name":"vda","size":-1}}"#,
            "Parameter 'size' expects uint64",
        ),
        (
            r#"{"execute":"fleecefs-disk-add","arguments":{"file":"/x","format":"vhd"}}"#,
            "Parameter 'format' does not accept value 'vhd'",
        ),
    ] {
        assert_eq!(c.ask(input), error("GenericError", desc), "{input}");
    }
    assert_eq!(
        c.ask(r#"{"execute":"foo","id":7}"#),
        json!({"error": {"class": "CommandNotFound", "desc": "The command foo has not been found"}, "id": 7})
    );
    let parse = c.ask("{\"a\":}\n");
    assert!(parse["error"]["desc"].as_str().unwrap().starts_with("JSON parse error, "), "{parse}");
    assert!(f.fleece.snapshots().is_empty());
    assert!(c.ask(r#"{"execute":"query-version"}"#)["return"]["qemu"].is_object());
}

#[test]
fn commands_may_come_in_one_packet_or_in_many() {
    let f = Fixture::new();
    let mut c = f.raw().negotiated();
    c.send(r#"{"execute":"query-status","id":1}{"execute":"query-status","id":2}  {"execute":"query-status","id":3}"#);
    for id in 1..=3 {
        let reply = c.receive();
        assert_eq!(reply, json!({"return": {"running": true, "status": "running"}, "id": id}));
    }
    for piece in [r#"{"exec"#, r#"ute":"query-"#, r#"status"}"#] {
        c.send(piece);
    }
    assert_eq!(c.receive()["return"]["running"], true);
}

#[test]
fn a_client_that_only_sends_gets_its_replies() {
    let f = Fixture::new();
    let mut c = f.raw();
    c.send(r#"{"execute":"qmp_capabilities"}{"execute":"query-status"}"#);
    c.stream.shutdown(Shutdown::Write).unwrap();
    let mut text = String::new();
    c.lines.read_to_string(&mut text).unwrap();
    assert_eq!(text.lines().count(), 3);
    assert!(text.contains("running"));
}

#[test]
fn input_past_the_limits_ends_that_connection_only() {
    let f = Fixture::new();
    let mut good = f.raw().negotiated();
    for bad in ["[".repeat(200), format!("\"{}", "x".repeat(2 << 20))] {
        let mut c = f.raw().negotiated();
        // The server may close before it has read all of it.
        let _ = c.stream.write_all(bad.as_bytes());
        let mut text = String::new();
        let _ = c.lines.read_line(&mut text);
        assert!(text.is_empty() || text.contains("limit exceeded"), "{text}");
        assert!(c.is_closed());
    }
    assert_eq!(good.ask(r#"{"execute":"query-status"}"#)["return"]["running"], true);
}

#[test]
fn every_command_is_listed() {
    let f = Fixture::new();
    let list = f.client().execute("query-commands", json!({})).unwrap();
    let names: Vec<_> = list.as_array().unwrap().iter().map(|c| c["name"].as_str().unwrap()).collect();
    for name in [
        "qmp_capabilities",
        "query-version",
        "query-commands",
        "query-status",
        "quit",
        "fleecefs-snapshot-create",
        "fleecefs-snapshot-complete",
        "fleecefs-snapshot-annotate",
        "fleecefs-consumer-lock",
        "fleecefs-snapshot-cancel",
        "fleecefs-snapshot-release",
        "fleecefs-snapshot-list",
        "fleecefs-checkpoint-list",
        "fleecefs-checkpoint-delete",
        "fleecefs-checkpoint-export",
        "fleecefs-checkpoint-import",
        "fleecefs-consumer-list",
        "fleecefs-consumer-set",
        "fleecefs-consumer-delete",
        "fleecefs-disk-add",
        "fleecefs-disk-remove",
        "fleecefs-disk-resize",
        "fleecefs-status",
        "block-dirty-bitmap-add",
        "block-dirty-bitmap-clear",
        "block-dirty-bitmap-disable",
        "block-dirty-bitmap-enable",
        "block-dirty-bitmap-merge",
        "block-dirty-bitmap-remove",
        "block-job-cancel",
        "block-job-set-speed",
        "blockdev-add",
        "blockdev-del",
        "job-cancel",
        "job-dismiss",
        "job-finalize",
        "query-block",
        "query-block-jobs",
        "query-jobs",
        "query-named-block-nodes",
        "transaction",
        "x-debug-block-dirty-bitmap-sha256",
    ] {
        assert!(names.contains(&name), "{name}");
    }
}

#[test]
fn a_snapshot_lives_and_its_consumer_moves() {
    let f = Fixture::new();
    let mut c = f.client();
    let manifest = c.execute("fleecefs-snapshot-create", json!({"name": "s1"})).unwrap();
    assert_eq!(manifest["name"], "s1");
    assert_eq!(manifest["disks"][0]["name"], "vda");
    let list = c.execute("fleecefs-snapshot-list", json!({})).unwrap();
    assert_eq!(list[0]["name"], "s1");
    let twice = c.execute("fleecefs-snapshot-create", json!({"name": "s1"})).unwrap_err();
    assert_eq!(twice.errno(), fleecefs::error::errno::EEXIST);
    c.execute("fleecefs-snapshot-release", json!({"name": "s1", "disk": "vda", "offset": 0, "length": 65536})).unwrap();
    c.execute("fleecefs-snapshot-complete", json!({"name": "s1", "consumer": "daily"})).unwrap();
    assert_eq!(c.execute("fleecefs-snapshot-list", json!({})).unwrap(), json!([]));
    let consumers = c.execute("fleecefs-consumer-list", json!({})).unwrap();
    assert_eq!((&consumers[0]["name"], &consumers[0]["checkpoint"]), (&json!("daily"), &json!("s1")));
    let checkpoints = c.execute("fleecefs-checkpoint-list", json!({"disk": "vda"})).unwrap();
    assert_eq!(checkpoints[0]["name"], "s1");
    assert_eq!(checkpoints[0]["disks"][0]["completed"], true);

    let manifest =
        c.execute("fleecefs-snapshot-create", json!({"name": "s2", "consumer": "daily", "disks": ["vda"]})).unwrap();
    assert!(manifest["disks"][0]["reference"].to_string().contains("s1"), "{manifest}");
    c.execute("fleecefs-snapshot-cancel", json!({"name": "s2"})).unwrap();
    c.execute("fleecefs-consumer-set", json!({"name": "weekly", "checkpoint": "s1"})).unwrap();
    c.execute("fleecefs-consumer-delete", json!({"name": "weekly"})).unwrap();
    c.execute("fleecefs-consumer-delete", json!({"name": "daily"})).unwrap();
    c.execute("fleecefs-checkpoint-delete", json!({"name": "s1"})).unwrap();
}

#[test]
fn what_does_not_exist_is_enoent_with_a_class_of_its_own() {
    let f = Fixture::new();
    let mut raw = f.raw().negotiated();
    let reply = raw.ask(r#"{"execute":"fleecefs-snapshot-cancel","arguments":{"name":"none"}}"#);
    assert_eq!(reply["error"]["class"], "DeviceNotFound");
    assert_eq!(reply["error"]["errno"], 2);
    let mut c = f.client();
    for (command, arguments) in [
        ("fleecefs-snapshot-complete", json!({"name": "none"})),
        ("fleecefs-snapshot-create", json!({"name": "s", "disks": ["none"]})),
        ("fleecefs-checkpoint-delete", json!({"name": "none"})),
        ("fleecefs-checkpoint-list", json!({"disk": "none"})),
        ("fleecefs-consumer-delete", json!({"name": "none"})),
        ("fleecefs-consumer-set", json!({"name": "c", "checkpoint": "none"})),
        ("fleecefs-disk-remove", json!({"name": "none"})),
        ("fleecefs-disk-resize", json!({"name": "none", "size": 1})),
    ] {
        assert_eq!(c.execute(command, arguments).unwrap_err().errno(), 2, "{command}");
    }
}

#[test]
fn disks_come_grow_and_go() {
    let f = Fixture::new();
    let image = f.image("vdb");
    let mut c = f.client();
    let relative = c.execute("fleecefs-disk-add", json!({"file": "vdb.raw"})).unwrap_err();
    assert!(relative.to_string().contains("absolute"), "{relative}");
    let added = c.execute("fleecefs-disk-add", json!({"file": image, "format": "raw"})).unwrap();
    assert_eq!((&added["name"], &added["size"]), (&json!("vdb"), &json!(DISK_BYTES)));
    c.execute("fleecefs-disk-resize", json!({"name": "vdb", "size": 2 * DISK_BYTES})).unwrap();
    assert_eq!(f.fleece.disk("vdb").unwrap().size(), 2 * DISK_BYTES);
    assert_eq!(c.execute("fleecefs-status", json!({})).unwrap()["disks"].as_array().unwrap().len(), 2);
    c.execute("fleecefs-disk-remove", json!({"name": "vdb"})).unwrap();
    assert_eq!(f.fleece.disks().len(), 1);
    let shared = |more: serde_json::Value| {
        let mut arguments = json!({"file": image, "format": "raw", "force-share": true, "l2-cache-size": 1 << 20});
        arguments.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        arguments
    };
    for (more, why) in [
        (json!({}), "force-share=on can only be used with read-only images"),
        (json!({"read-only": true, "l2-cache-size": 1}), "l2-cache-size 1: not from 128K to 64G"),
    ] {
        let e = c.execute("fleecefs-disk-add", shared(more)).unwrap_err();
        assert!(e.to_string().contains(why), "{e}");
    }
    c.execute("fleecefs-disk-add", shared(json!({"read-only": true}))).unwrap();
    let e = c.execute("fleecefs-snapshot-create", json!({"name": "s", "disks": ["vdb"]})).unwrap_err();
    assert!(e.to_string().contains("cannot be frozen"), "{e}");
}

#[test]
fn events_reach_every_negotiated_connection_and_no_other() {
    let f = Fixture::new();
    let mut fresh = f.raw();
    fresh.receive();
    let mut listeners = [f.raw().negotiated(), f.raw().negotiated()];
    f.events.emit_core(&Event::ViewBroken { disk: "vda".into(), reason: "store full".into() });
    for c in &mut listeners {
        let event = c.receive();
        assert_eq!(event["event"], "FLEECEFS_VIEW_BROKEN");
        assert_eq!(event["data"], json!({"disk": "vda", "reason": "store full"}));
        assert!(event["timestamp"]["seconds"].is_u64() && event["timestamp"]["microseconds"].is_u64());
    }
    // The next thing that it hears is its own reply.
    assert_eq!(fresh.ask(r#"{"execute":"qmp_capabilities"}"#), json!({"return": {}}));
}

#[test]
fn a_client_that_reads_no_events_holds_up_nobody() {
    let f = Fixture::new();
    let deaf = f.raw().negotiated();
    let mut good = f.client();
    let reason = "x".repeat(64 << 10);
    for _ in 0..100 {
        f.events.emit_core(&Event::TrackingLost { disk: "vda".into(), reason: reason.clone() });
        // Reads its events as it waits for the reply.
        good.execute("query-status", json!({})).unwrap();
    }
    let mut rest = Vec::new();
    let all_bytes = 100 * reason.len() as u64;
    let _ = deaf.lines.take(all_bytes).read_to_end(&mut rest);
    assert!((rest.len() as u64) < all_bytes, "the connection was to be given up");
}

#[test]
fn one_connection_too_many_is_told_so() {
    let f = Fixture::new();
    let mut clients: Vec<_> = (0..MAX_CONNECTIONS).map(|_| f.raw().negotiated()).collect();
    let refused = f.raw().receive();
    assert!(refused["error"]["desc"].as_str().unwrap().starts_with("Too many connections"), "{refused}");
    let mut gone = clients.pop().unwrap();
    gone.stream.shutdown(Shutdown::Write).unwrap();
    assert!(gone.is_closed());
    // The slot is free once the server's threads have ended.
    while f.raw().receive().get("QMP").is_none() {
        std::thread::yield_now();
    }
}

#[test]
fn quit_is_answered_first_and_the_end_is_told() {
    let mut f = Fixture::new();
    let mut c = f.raw().negotiated();
    let mut other = f.raw().negotiated();
    assert_eq!(c.ask(r#"{"execute":"quit","id":1}"#), json!({"return": {}, "id": 1}));
    f.quits.recv_timeout(NEVER).unwrap();
    let server = f.server.take().unwrap();
    f.events.emit("SHUTDOWN", &json!({"guest": false, "reason": "host-qmp-quit"}));
    server.stop();
    // No command is taken any more, while events still come.
    let _ = other.stream.write_all(br#"{"execute":"fleecefs-snapshot-create","arguments":{"name":"late"}}"#);
    f.events.emit("FLEECEFS_CLOSED", &json!({"error": null}));
    server.finish();
    for c in [&mut c, &mut other] {
        assert_eq!(c.receive()["event"], "SHUTDOWN");
        assert_eq!(c.receive()["event"], "FLEECEFS_CLOSED");
        assert!(c.is_closed());
    }
    assert!(f.fleece.snapshots().is_empty());
    assert!(!f.dir.path().join("qmp").exists());
}

#[test]
fn a_failed_quit_ends_nothing() {
    let f = Fixture::new();
    let mut c = f.raw().negotiated();
    c.ask(r#"{"execute":"quit","arguments":{"now":true}}"#);
    assert_eq!(c.ask(r#"{"execute":"query-status"}"#)["return"]["running"], true);
    assert!(f.quits.try_recv().is_err());
}

#[test]
fn what_its_maker_says_of_a_snapshot_stands_in_the_manifest() {
    let f = Fixture::new();
    let mut c = f.client();
    let pre = json!({ "command": "h", "phase": "pre", "exit": 0, "ms": 3 });
    let made = c.execute("fleecefs-snapshot-create", json!({ "name": "s", "hooks": [pre] })).unwrap();
    assert_eq!((&made["consistency"], &made["hooks"]), (&json!("crash"), &json!([pre])));
    let thaw = json!({ "command": "qga:/s", "phase": "thaw", "exit": 1, "ms": 4, "error": "e" });
    let notes = json!({ "name": "s", "consistency": "filesystem", "hooks": [pre, thaw] });
    let noted = c.execute("fleecefs-snapshot-annotate", notes).unwrap();
    assert_eq!((&noted["consistency"], &noted["hooks"]), (&json!("filesystem"), &json!([pre, thaw])));
    assert_eq!(f.fleece.snapshot("s").unwrap().manifest(), noted);
    let infos = c.execute("fleecefs-snapshot-list", json!({})).unwrap();
    assert_eq!(infos[0]["consistency"], "filesystem");
    for (arguments, text) in [
        (json!({ "name": "none" }), "no such snapshot"),
        (json!({ "name": "s", "consistency": "x" }), "Parameter 'consistency' does not accept value 'x'"),
        (json!({ "name": "s", "hooks": [{}] }), "Parameter 'hooks[0].command' is missing"),
        (json!({ "name": "s", "hooks": vec![pre.clone(); 65] }), "at most 64 entries"),
        (
            json!({ "name": "s", "hooks": [{ "command": "x".repeat(20000), "phase": "pre", "exit": 0, "ms": 0 }] }),
            "bytes of text",
        ),
    ] {
        let e = c.execute("fleecefs-snapshot-annotate", arguments).unwrap_err();
        assert!(e.to_string().contains(text), "{e}");
    }
    assert_eq!(f.fleece.snapshot("s").unwrap().manifest(), noted);
    c.execute("fleecefs-snapshot-cancel", json!({ "name": "s" })).unwrap();
}

#[test]
fn a_consumer_is_locked_as_long_as_its_connection_lives() {
    let f = Fixture::new();
    let (mut first, mut second) = (f.client(), f.client());
    first.execute("fleecefs-consumer-lock", json!({ "name": "c" })).unwrap();
    let e = second.execute("fleecefs-consumer-lock", json!({ "name": "c" })).unwrap_err();
    assert!(e.to_string().contains("at work") && e.errno() == fleecefs::error::errno::EBUSY, "{e}");
    assert!(first.execute("fleecefs-consumer-lock", json!({ "name": "c" })).is_err());
    second.execute("fleecefs-consumer-lock", json!({ "name": "d" })).unwrap();
    drop(first);
    let begun = std::time::Instant::now();
    while second.execute("fleecefs-consumer-lock", json!({ "name": "c" })).is_err() {
        assert!(begun.elapsed() < NEVER);
    }
    assert!(second.execute("fleecefs-consumer-lock", json!({ "name": "a/b" })).is_err());
}
