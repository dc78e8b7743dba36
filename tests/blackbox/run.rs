//! `fleecefs run`: what the command gets, how it ends, and when its consumer moves.

use crate::freeze_rig::*;
use crate::harness::*;
use serde_json::Value;
use std::os::unix::fs::FileExt;
use std::process::{Child, Command, Output, Stdio};

fn run(mount: &Mount, options: &[&str], command: &[&str]) -> Output {
    let mut all = args!["--consumer", "daily"];
    all.extend(options.iter().chain(&["--"]).chain(command).map(Into::into));
    mount.run("run", all)
}

fn sh(mount: &Mount, script: &str) -> Output {
    run(mount, &[], &["sh", "-c", script])
}

/// The checkpoint of the consumer, if there is one.
fn daily(mount: &Mount) -> Option<String> {
    let list: Value = serde_json::from_str(&mount.done("consumer list", args!["--json"])).unwrap();
    list.as_array().unwrap().iter().find(|row| row["name"] == "daily").map(|row| row["checkpoint"].to_string())
}

#[track_caller]
fn no_snapshots(mount: &Mount) {
    let left: Value = serde_json::from_str(&mount.done("snapshot list", args!["--json"])).unwrap();
    assert_eq!(left, serde_json::json!([]));
}

/// One that works in the background.
fn started(mount: &Mount, script: &str) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fleecefs"));
    command.arg("run").arg(&mount.dir).args(["--consumer", "daily", "--", "sh", "-c", script]);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

#[test]
fn the_first_run_is_a_full_one_and_the_next_gets_what_changed() {
    requires!();
    let rig = Rig::new();
    let mount = rig.mount([rig.image("vda", 1)]);
    let script =
        "[ \"$FLEECEFS_FULL\" = 1 ] && [ ! -e \"$1/none\" ] && cp \"$1/manifest.json\" \"$2\" \"$3\" \"$4\" && cat";
    let out_dir = rig.mount_point("out");
    let place = out_dir.to_str().unwrap();
    let marks = ["{snapshot}", "{map}", "{disk}", place];
    let all = ["sh", "-c", script, "sh", marks[0], marks[1], marks[2], marks[3]];
    let out = run(&mount, &["--name", "first"], &all);
    assert_eq!(out.status.code(), Some(0), "{}", stderr(&out));
    assert!(stderr(&out).contains("'vda' since '@daily': everything counts as changed"), "{}", stderr(&out));
    assert_eq!(daily(&mount).as_deref(), Some("\"first\""));
    no_snapshots(&mount);
    let manifest: Value = serde_json::from_slice(&std::fs::read(out_dir.join("manifest.json")).unwrap()).unwrap();
    assert_eq!(manifest["name"], "first");
    assert!(std::fs::read(out_dir.join("vda.raw")).unwrap() == std::fs::read(mount.live("vda")).unwrap());

    mount.guest("vda").write_all_at(b"new", 5 * GRANULE).unwrap();
    let script = "[ -z \"$FLEECEFS_FULL\" ] && cp \"$FLEECEFS_MAP\" \"$1\" && test -r \"$FLEECEFS_DISK\" && env | grep ^FLEECEFS_";
    let out = run(&mount, &[], &["sh", "-c", script, "sh", place]);
    assert_eq!((out.status.code(), stderr(&out).as_str()), (Some(0), ""));
    let map = Map::parse(&serde_json::from_slice(&std::fs::read(out_dir.join("vda.map")).unwrap()).unwrap());
    assert_eq!(map.granules(), [5]);
    let name = daily(&mount).unwrap();
    assert!(name.starts_with("\"daily-20"), "{name}");
    let told = stdout(&out);
    let dir = mount.dir.display();
    for line in [
        format!("FLEECEFS_MOUNT={dir}"),
        format!("FLEECEFS_NAME={}", name.trim_matches('"')),
        format!("FLEECEFS_SNAPSHOT={dir}/snapshots/{}", name.trim_matches('"')),
        "FLEECEFS_CONSUMER=daily".to_owned(),
        "FLEECEFS_DISKS=vda".to_owned(),
    ] {
        assert!(told.lines().any(|other| other == line), "{line} is not in {told}");
    }
}

#[test]
fn a_consumer_moves_where_the_command_ends_with_0_and_nowhere_else() {
    requires!();
    let rig = Rig::new();
    let mount = rig.mount([rig.image("vda", 1)]);
    for (script, code) in [("exit 7", 7), ("exit 1", 1), ("kill -9 $$", 137), ("kill -TERM $$", 143), ("exit 255", 255)]
    {
        let out = sh(&mount, script);
        assert_eq!(out.status.code(), Some(code), "{script}: {}", stderr(&out));
        assert_eq!(daily(&mount), None, "{script}");
        no_snapshots(&mount);
    }
    assert_eq!(sh(&mount, "exit 0").status.code(), Some(0));
    let first = daily(&mount);
    assert!(first.is_some());
    mount.guest("vda").write_all_at(b"new", 3 * GRANULE).unwrap();
    assert_eq!(sh(&mount, "exit 3").status.code(), Some(3));
    assert_eq!(daily(&mount), first);
    let out = run(&mount, &[], &["cat", "{map}"]);
    assert_eq!(Map::parse(&serde_json::from_str(&stdout(&out)).unwrap()).granules(), [3], "nothing is forgotten");
}

#[test]
fn what_cannot_be_run_and_what_fails_here_have_codes_of_their_own() {
    requires!();
    let rig = Rig::new();
    let mount = rig.mount([rig.image("vda", 1), rig.image("vdb", 1)]);
    let plain = rig.path("plain");
    std::fs::write(&plain, "").unwrap();
    refused(&last_line(run(&mount, &[], &["/nonexistent"])), 127, &["/nonexistent", "No such file"]);
    refused(&last_line(run(&mount, &[], &[plain.to_str().unwrap()])), 126, &["plain", "Permission denied"]);
    refused(&last_line(run(&mount, &[], &["echo", "-m{map}"])), 125, &["'-m{map}'", "there are 2", "--disk"]);
    refused(&run(&mount, &["--disk", "none"], &["true"]), 125, &["disk 'none'", "no such disk"]);
    refused(&run(&mount, &["--name", "a/b"], &["true"]), 125, &["a/b"]);
    refused(&run(&mount, &["--what"], &["true"]), 125, &["--what"]);
    refused(&fleecefs(args!["run", rig.path("out"), "--consumer", "c", "--", "true"]), 125, &["not a fleecefs mount"]);
    refused(&fleecefs(args!["run", &mount.dir, "--consumer", "c"]), 125, &["usage"]);
    no_snapshots(&mount);
    assert_eq!(daily(&mount), None);
    let out = run(&mount, &["--name", "s"], &["echo", "{map}", "{disk}"]);
    let dir = mount.snapshot_dir("s").display().to_string();
    assert_eq!(stdout(&out), format!("{dir}/vda.map {dir}/vdb.map {dir}/vda.raw {dir}/vdb.raw\n"));
    let out = run(&mount, &["--disk", "vdb", "--name", "t"], &["echo", "-m{map}"]);
    assert_eq!(stdout(&out), format!("-m{}/vdb.map\n", mount.snapshot_dir("t").display()));
}

/// Without what is said of a full map.
fn last_line(mut out: Output) -> Output {
    let text = stderr(&out);
    let rest: Vec<&str> = text.lines().skip_while(|line| line.contains("everything counts")).collect();
    out.stderr = rest.join("\n").into_bytes();
    out
}

#[test]
fn a_signal_goes_to_the_command_and_the_snapshot_goes_when_it_ends() {
    requires!();
    let rig = Rig::new();
    let mount = rig.mount([rig.image("vda", 1)]);
    for (signal, code) in [("-TERM", 9), ("-INT", 9), ("-USR1", 9)] {
        let child = started(&mount, "trap 'exit 9' TERM INT USR1; echo ready; while :; do sleep 0.05; done");
        eventually("the command", || mount.path("snapshots/latest").exists());
        std::thread::sleep(std::time::Duration::from_millis(300));
        kill(signal, child.id());
        let out = child.wait_with_output().unwrap();
        assert_eq!(out.status.code(), Some(code), "{signal}: {}", stderr(&out));
        no_snapshots(&mount);
        assert_eq!(daily(&mount), None);
    }
}

#[test]
fn a_run_under_nohup_outlives_its_session() {
    requires!();
    let rig = Rig::new();
    let mount = rig.mount([rig.image("vda", 1)]);
    let mut command = tool("sh");
    let script = "trap '' HUP; exec \"$0\" run \"$1\" --consumer daily -- sh -c 'kill -HUP $PPID; sleep 0.3; exit 0'";
    let out = command.args(["-c", script, env!("CARGO_BIN_EXE_fleecefs")]).arg(&mount.dir).output().unwrap();
    assert_eq!(out.status.code(), Some(0), "{}", stderr(&out));
    assert!(daily(&mount).is_some());
    no_snapshots(&mount);
}

#[test]
fn one_consumer_works_once_at_a_time() {
    requires!();
    let rig = Rig::new();
    let mount = rig.mount([rig.image("vda", 1)]);
    let mut first = started(&mount, "sleep 60");
    eventually("the first run", || mount.path("snapshots/latest").exists());
    refused(&sh(&mount, "true"), 125, &["consumer 'daily'", "at work"]);
    assert_eq!(mount.run("run", args!["--consumer", "weekly", "--", "true"]).status.code(), Some(0));
    // The lock goes with its holder; what it left is a snapshot, and no consumer that moved.
    let orphans = children(first.id());
    kill("-KILL", first.id());
    first.wait().unwrap();
    orphans.iter().for_each(|pid| kill("-KILL", *pid));
    let mut second = None;
    eventually("the second run", || second.insert(sh(&mount, "true")).status.code() == Some(0));
    assert!(stderr(&second.unwrap()).contains("is left of a run that was killed"));
    assert!(daily(&mount).is_some());
}

#[test]
fn runs_of_one_consumer_follow_each_other_at_once() {
    requires!();
    let rig = Rig::new();
    let mount = rig.mount([rig.image("vda", 1)]);
    for n in 0..sized(30, 300) {
        let out = sh(&mount, "exit 0");
        assert_eq!(out.status.code(), Some(0), "{n}: {}", stderr(&out));
    }
}

#[test]
fn a_view_that_breaks_and_a_daemon_that_dies_move_nothing() {
    requires!();
    let rig = Rig::new();
    let image = rig.image("vda", 1);
    let mount = rig.mount(args!["--store-limit", "64K", &image]);
    assert_eq!(run(&mount, &["--name", "good"], &["true"]).status.code(), Some(0));
    let live = mount.live("vda").display().to_string();
    for code in [0, 5] {
        let script =
            format!("dd if=/dev/urandom of='{live}' bs=64k count=8 conv=notrunc,fsync status=none; exit {code}");
        let out = sh(&mount, &script);
        refused(&out, 125, &["broke while the command ran", &format!("ended with {code}")]);
        assert_eq!(daily(&mount).as_deref(), Some("\"good\""));
        no_snapshots(&mount);
    }
    let pid = mount.pid;
    for code in [0, 5] {
        let out = sh(&mount, &format!("[ ! -e /proc/{pid} ] || kill -9 {pid}; sleep 0.2; exit {code}"));
        assert_eq!(out.status.code(), Some(125), "{}", stderr(&out));
        if code == 0 {
            assert!(stderr(&out).contains("the daemon ended while the command ran"), "{}", stderr(&out));
        }
    }
    drop(mount);
    let mount = rig.mount([&image]);
    assert_eq!(daily(&mount).as_deref(), Some("\"good\""));
}

#[test]
fn a_run_freezes_guests_and_thaws_them_before_its_command() {
    requires!();
    let rig = Rig::new();
    let mount = rig.mount([rig.image("vda", 1)]);
    let agent = Agent::new(&rig, "qga", Manner::Good);
    let out = run(&mount, &["--freeze", &agent.option()], &["cat", "{snapshot}/manifest.json"]);
    assert_eq!(out.status.code(), Some(0), "{}", stderr(&out));
    let manifest: Value = serde_json::from_str(&stdout(&out)).unwrap();
    assert_eq!(manifest["consistency"], "filesystem");
    assert!(!agent.frozen());
    let before = daily(&mount);
    let bad = Agent::new(&rig, "bad", Manner::Refuses);
    refused(&run(&mount, &["--freeze", &bad.option()], &["true"]), 125, &["no snapshot", "too warm"]);
    assert_eq!(daily(&mount), before);
    no_snapshots(&mount);
}

#[test]
fn an_interrupt_from_the_terminal_reaches_the_command_once() {
    requires!("script");
    let rig = Rig::new();
    let mount = rig.mount([rig.image("vda", 1)]);
    let log = rig.path("log");
    let worker = "trap \"echo got >> $1\" INT; echo ready >> $1; n=0; while [ $n -lt 20 ]; do sleep 0.05; n=$((n+1)); done; exit 4";
    let worker = script(&rig.path("worker"), worker);
    let program = env!("CARGO_BIN_EXE_fleecefs");
    let command = format!(
        "exec '{program}' run '{}' --consumer daily -- '{}' '{}'",
        mount.dir.display(),
        worker.display(),
        log.display()
    );
    let mut terminal = tool("script");
    // A shell that stays in between may end by the interrupt itself.
    terminal.env("SHELL", "/bin/sh").args(["-qec", &command, "/dev/null"]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut terminal = terminal.spawn().unwrap();
    eventually("the command", || log.exists());
    std::io::Write::write_all(terminal.stdin.as_mut().unwrap(), b"\x03").unwrap();
    eventually("the interrupt", || std::fs::read_to_string(&log).unwrap().contains("got"));
    let out = terminal.wait_with_output().unwrap();
    assert_eq!(out.status.code(), Some(4), "{}", stdout(&out));
    assert_eq!(std::fs::read_to_string(&log).unwrap(), "ready\ngot\n");
    assert_eq!(daily(&mount), None);
}
