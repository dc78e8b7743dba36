//! `--freeze` and `--hook`: guests are frozen at the instant, and thawed whatever happens.

use crate::freeze_rig::*;
use crate::harness::*;
use serde_json::{Value, json};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant, SystemTime};

fn phases(manifest: &Value) -> Vec<(String, i64)> {
    let hooks = manifest["hooks"].as_array().unwrap();
    hooks.iter().map(|hook| (hook["phase"].as_str().unwrap().to_owned(), hook["exit"].as_i64().unwrap())).collect()
}

fn create(mount: &Mount, name: &str, freeze: &str, more: &[&str]) -> Output {
    let mut all = args![name, "--freeze", freeze, "--freeze-timeout", "2"];
    all.extend(more.iter().map(Into::into));
    mount.run("snapshot create", all)
}

#[test]
fn a_guest_is_frozen_at_the_instant_and_the_manifest_says_so() {
    requires!();
    let rig = Rig::new();
    let image = rig.image("vda", 1);
    let mount = rig.mount([&image]);
    let agent = Agent::new(&rig, "qga", Manner::Good);
    let log = rig.path("log");
    let line = "echo \"$FLEECEFS_MOUNT $FLEECEFS_SNAPSHOT $FLEECEFS_NAME $FLEECEFS_PHASE\"";
    let hook = script(&rig.path("hook"), &format!("{line} \"$@\" >> '{}'; echo noise", log.display()));
    let command = format!("{} word", hook.display());
    let out = create(&mount, "one", &agent.option(), &["--hook", &command, "--json"]);
    assert_eq!(out.status.code(), Some(0), "{}", stderr(&out));
    let printed: Value = serde_json::from_str(&stdout(&out)).unwrap();

    let manifest = mount.json("snapshots/one/manifest.json");
    assert_eq!(printed, manifest);
    assert_eq!(manifest["consistency"], "filesystem");
    let expected = ["pre", "freeze", "thaw", "post"].map(|phase| (phase.to_owned(), 0));
    assert_eq!(phases(&manifest), expected);
    assert_eq!(manifest["hooks"][0]["command"], command);
    assert_eq!(manifest["hooks"][1]["command"], agent.option());
    assert!(manifest["hooks"][1]["ms"].is_u64() && manifest["hooks"][1]["error"].is_null());
    let dir = mount.dir.display();
    let said = |phase: &str| format!("{dir} {dir}/snapshots/one one {phase} word {phase}\n");
    assert_eq!(std::fs::read_to_string(&log).unwrap(), said("pre") + &said("post"));

    let guest = agent.guest.lock().unwrap();
    assert!(!guest.frozen);
    let time: String = ok(tool("date").args(["+%s%N", "-d", manifest["time"].as_str().unwrap()]));
    let time = SystemTime::UNIX_EPOCH + Duration::from_nanos(time.trim().parse().unwrap());
    assert!(guest.frozen_at.unwrap() < time && time < guest.thawed_at.unwrap(), "{guest:?} {time:?}");
    drop(guest);

    assert!(mount.done("snapshot show", args!["one"]).contains("content   file-system-consistent\n"));
    // It stands with the snapshot.
    let mount = Mount::at(mount.kill(), [&image]);
    assert_eq!(mount.json("snapshots/one/manifest.json"), manifest);
    mount.snap("two");
    let plain = mount.json("snapshots/two/manifest.json");
    assert_eq!((&plain["consistency"], &plain["hooks"]), (&json!("crash"), &json!([])));
}

#[test]
fn an_agent_that_misbehaves_costs_the_snapshot_and_leaves_nothing_frozen() {
    requires!();
    let rig = Rig::new();
    let mount = rig.mount([rig.image("vda", 1)]);
    for (manner, word) in [
        (Manner::Silent, "does not answer"),
        (Manner::Refuses, "too warm"),
        (Manner::FreezesInSilence, "does not answer"),
        (Manner::Nothing, "no file system"),
        (Manner::ThawsEarly, "thawed before"),
    ] {
        let agent = Agent::new(&rig, &format!("{manner:?}"), manner);
        let log = rig.path(&format!("{manner:?}.log"));
        let hook = format!("echo >> {}", log.display());
        let begun = Instant::now();
        let out = create(&mount, "bad", &agent.option(), &["--hook", &hook]);
        refused(&out, 2, &["no snapshot", &agent.option(), word]);
        assert!(begun.elapsed() < Duration::from_secs(8), "{manner:?}: {:?}", begun.elapsed());
        assert!(!agent.frozen(), "{manner:?}");
        assert_eq!(agent.asked("guest-fsfreeze-thaw") > 0, manner != Manner::Silent, "{manner:?}");
        assert!(!mount.snapshot_dir("bad").exists(), "{manner:?}");
        let told = std::fs::read_to_string(&log).unwrap();
        assert!(told.lines().eq(["pre", "failed"]), "{manner:?} {told}");

        let out = create(&mount, &format!("{manner:?}"), &agent.option(), &["--on-freeze-error", "continue"]);
        assert_eq!(out.status.code(), Some(0), "{manner:?}: {}", stderr(&out));
        assert!(stderr(&out).contains("crash-consistent"), "{}", stderr(&out));
        let manifest = mount.json(&format!("snapshots/{manner:?}/manifest.json"));
        assert_eq!(manifest["consistency"], "crash", "{manner:?}");
        assert!(phases(&manifest).iter().any(|(_, exit)| *exit != 0), "{manifest}");
        assert!(!agent.frozen(), "{manner:?}");
    }
    let checkpoints: Value = serde_json::from_str(&mount.done("checkpoint list", args!["--json"])).unwrap();
    assert_eq!(checkpoints.as_array().unwrap().len(), 5, "{checkpoints}");
}

#[test]
fn stale_answers_and_late_thaws_are_coped_with() {
    requires!();
    let rig = Rig::new();
    let mount = rig.mount([rig.image("vda", 1)]);
    for manner in [Manner::Stale, Manner::ThawsLate] {
        let agent = Agent::new(&rig, &format!("{manner:?}"), manner);
        let name = format!("{manner:?}");
        let out = create(&mount, &name, &agent.option(), &[]);
        assert_eq!(out.status.code(), Some(0), "{manner:?}: {}", stderr(&out));
        assert_eq!(mount.json(&format!("snapshots/{name}/manifest.json"))["consistency"], "filesystem");
        assert!(!agent.frozen());
    }
}

#[test]
fn a_guest_that_somebody_else_froze_stays_frozen() {
    requires!();
    let rig = Rig::new();
    let mount = rig.mount([rig.image("vda", 1)]);
    let agent = Agent::new(&rig, "qga", Manner::Good);
    agent.guest.lock().unwrap().frozen = true;
    refused(&create(&mount, "one", &agent.option(), &[]), 2, &["frozen already", "thaw it"]);
    assert!(agent.frozen());
    assert_eq!(agent.asked("guest-fsfreeze-thaw"), 0);
}

#[test]
fn of_several_guests_all_are_frozen_or_none() {
    requires!();
    let rig = Rig::new();
    let mount = rig.mount([rig.image("vda", 1)]);
    let good = [Agent::new(&rig, "a", Manner::Good), Agent::new(&rig, "b", Manner::Good)];
    let bad = Agent::new(&rig, "c", Manner::Refuses);
    let out = create(&mount, "one", &good[0].option(), &["--freeze", &good[1].option(), "--freeze", &bad.option()]);
    refused(&out, 2, &["too warm"]);
    assert!(good.iter().all(|agent| !agent.frozen() && agent.asked("guest-fsfreeze-thaw") > 0));
    let out = create(&mount, "one", &good[0].option(), &["--freeze", &good[1].option()]);
    assert_eq!(out.status.code(), Some(0), "{}", stderr(&out));
    assert_eq!(mount.json("snapshots/one/manifest.json")["consistency"], "filesystem");
    assert!(good.iter().all(|agent| !agent.frozen()));
}

#[test]
fn a_name_that_is_taken_leaves_nothing_frozen() {
    requires!();
    let rig = Rig::new();
    let mount = rig.mount([rig.image("vda", 1)]);
    mount.snap("one");
    let agent = Agent::new(&rig, "qga", Manner::Good);
    refused(&create(&mount, "one", &agent.option(), &[]), 2, &["exists already"]);
    assert!(!agent.frozen() && agent.asked("guest-fsfreeze-thaw") == 1);
    assert!(mount.snapshot_dir("one").exists());
}

#[test]
fn a_hook_that_says_no_ends_it_before_anything_is_frozen() {
    requires!();
    let rig = Rig::new();
    let mount = rig.mount([rig.image("vda", 1)]);
    let agent = Agent::new(&rig, "qga", Manner::Good);
    let log = rig.path("log");
    let first = format!("echo first >> {}", log.display());
    for (second, word) in
        [("exit 3; :", "exit code 3"), ("[ $1 = failed ] || sleep 30; :", "too long"), ("/nonexistent", "127")]
    {
        std::fs::write(&log, "").unwrap();
        let begun = Instant::now();
        let out = create(&mount, "one", &agent.option(), &["--hook", &first, "--hook", second]);
        let said = stderr(&out);
        assert_eq!(out.status.code(), Some(2), "{said}");
        assert!(said.contains("fleecefs: no snapshot: hook '") && said.contains(word), "{said}");
        assert!(begun.elapsed() < Duration::from_secs(20), "{second}");
        assert_eq!(std::fs::read_to_string(&log).unwrap(), "first pre\nfirst failed\n", "{second}");
    }
    assert!(agent.guest.lock().unwrap().commands.is_empty());
    // A post that fails is told, and the snapshot stays.
    let out = mount.run("snapshot create", args!["one", "--hook", "test pre ="]);
    assert_eq!(out.status.code(), Some(0), "{}", stderr(&out));
    assert!(stderr(&out).contains("post: exit code 1"), "{}", stderr(&out));
    let manifest = mount.json("snapshots/one/manifest.json");
    assert_eq!(manifest["consistency"], "crash");
    assert_eq!(phases(&manifest), [("pre".to_owned(), 0), ("post".to_owned(), 1)]);
}

/// A client that waits for its snapshot, its guest frozen.
fn frozen(mount: &FakeMount, agent: &Agent, timeout_s: &str) -> Child {
    // Who runs in the background ignores SIGINT, and so do its children.
    let mut command = Command::new("env");
    command.args(["--default-signal=INT", env!("CARGO_BIN_EXE_fleecefs")]);
    command.args(["snapshot", "create"]).arg(&mount.dir).args(["s", "--freeze", &agent.option()]);
    let child =
        command.args(["--freeze-timeout", timeout_s]).stdin(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    mount.wait_asked();
    assert!(agent.frozen());
    child
}

#[track_caller]
fn thawed_within(agent: &Agent, limit: Duration) {
    let begun = Instant::now();
    while agent.frozen() {
        assert!(begun.elapsed() < limit, "still frozen");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_client_that_is_killed_leaves_nothing_frozen() {
    for signal in ["-KILL", "-INT", "-TERM"] {
        let rig = Rig::new();
        let (mount, agent) = (FakeMount::new(&rig), Agent::new(&rig, "qga", Manner::Good));
        let mut client = frozen(&mount, &agent, "10");
        kill(signal, client.id());
        thawed_within(&agent, Duration::from_secs(1));
        assert!(!client.wait().unwrap().success());
    }
}

#[test]
fn a_guard_that_is_asked_to_end_thaws_and_one_that_is_killed_is_stood_in_for() {
    for signal in ["-TERM", "-KILL"] {
        let rig = Rig::new();
        let (mount, agent) = (FakeMount::new(&rig), Agent::new(&rig, "qga", Manner::Good));
        let client = frozen(&mount, &agent, "10");
        let guards = children(client.id());
        assert_eq!(guards.len(), 1);
        kill(signal, guards[0]);
        if signal == "-TERM" {
            thawed_within(&agent, Duration::from_secs(1));
        }
        mount.take.send(()).unwrap();
        let out = client.wait_with_output().unwrap();
        assert!(!agent.frozen(), "{signal}");
        refused(&out, 2, &["no snapshot", "guard"]);
        assert_eq!(mount.ran("fleecefs-snapshot-cancel"), Some(json!({ "name": "s" })), "{signal}");
        assert_eq!(mount.ran("fleecefs-snapshot-annotate"), None, "{signal}");
    }
}

#[test]
fn a_snapshot_that_hangs_keeps_no_guest_frozen() {
    let rig = Rig::new();
    let (mount, agent) = (FakeMount::new(&rig), Agent::new(&rig, "qga", Manner::Good));
    let client = frozen(&mount, &agent, "1");
    thawed_within(&agent, Duration::from_secs(2));
    mount.take.send(()).unwrap();
    let out = client.wait_with_output().unwrap();
    refused(&out, 2, &["no snapshot", "within 1 s"]);
    assert_eq!(mount.ran("fleecefs-snapshot-cancel"), Some(json!({ "name": "s" })));
}

#[test]
fn libvirt_guests_are_frozen_by_virsh() {
    requires!();
    let rig = Rig::new();
    let mount = rig.mount([rig.image("vda", 1)]);
    let bin = rig.mount_point("bin");
    let (state, log) = (rig.path("state"), rig.path("log"));
    let text = format!(
        r#"state='{}'; echo "$@" >> '{}'
        case $1 in
        qemu-agent-command) [ ! -e "$state.hangs" ] || [ "$(cat "$state")" = thawed ] || sleep 60
            echo "{{\"return\":\"$(cat "$state")\"}}" ;;
        domfsfreeze) [ ! -e "$state.broken" ] || {{ echo 'error: Guest agent is not responding' >&2; exit 1; }}
            echo frozen > "$state"; echo 'Froze 2 filesystem(s)' ;;
        domfsthaw) echo thawed > "$state"; echo 'Thawed 2 filesystem(s)' ;;
        esac"#,
        state.display(),
        log.display()
    );
    script(&bin.join("virsh"), &text);
    std::fs::write(&state, "thawed\n").unwrap();
    let create = |name: &str, path: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_fleecefs"));
        command.env("PATH", format!("{}:{path}", bin.display())).args(["snapshot", "create"]).arg(&mount.dir);
        command.args([name, "--freeze", "libvirt:web server"]).output().unwrap()
    };
    let path = std::env::var("PATH").unwrap();
    let out = create("one", &path);
    assert_eq!(out.status.code(), Some(0), "{}", stderr(&out));
    assert_eq!(mount.json("snapshots/one/manifest.json")["consistency"], "filesystem");
    assert_eq!(std::fs::read_to_string(&state).unwrap(), "thawed\n");
    let asked = std::fs::read_to_string(&log).unwrap();
    assert!(
        asked.contains("domfsfreeze --domain web server\n") && asked.contains("domfsthaw --domain web server\n"),
        "{asked}"
    );
    // A question that hangs does not keep the guest frozen.
    std::fs::write(rig.path("state.hangs"), "").unwrap();
    refused(&create("two", &path), 2, &["no snapshot", "libvirt:web server"]);
    assert_eq!(std::fs::read_to_string(&state).unwrap(), "thawed\n");
    std::fs::remove_file(rig.path("state.hangs")).unwrap();
    std::fs::write(rig.path("state.broken"), "").unwrap();
    refused(&create("two", &path), 2, &["libvirt:web server", "domfsfreeze", "not responding"]);
    std::fs::remove_file(bin.join("virsh")).unwrap();
    refused(&create("three", ""), 2, &["libvirt:web server", "run virsh", "No such file"]);
}

#[test]
fn what_is_no_guest_is_refused_before_anything_is_done() {
    requires!();
    let rig = Rig::new();
    let mount = rig.mount([rig.image("vda", 1)]);
    for bad in ["x", "qga:", "libvirt:", "ssh:host"] {
        refused(&create(&mount, "one", bad, &[]), 2, &["qga:SOCKET or libvirt:DOMAIN"]);
    }
    refused(&create(&mount, "one", "qga:/nonexistent", &[]), 2, &["qga:/nonexistent", "No such file"]);
    assert!(!mount.snapshot_dir("one").exists());
}
