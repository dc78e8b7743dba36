//! Guests that are frozen, and daemons that take their time: what the tests of `--freeze` and `run` share.

use crate::harness::*;
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

/// How an agent behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Manner {
    Good,
    /// Says nothing, ever.
    Silent,
    /// Answers that others asked for come before its own, and other things that are no answers.
    Stale,
    /// Refuses to freeze.
    Refuses,
    /// Freezes and says nothing.
    FreezesInSilence,
    /// There is nothing to freeze.
    Nothing,
    /// Is thawed by something else, at once.
    ThawsEarly,
    /// Refuses the first two thaws.
    ThawsLate,
}

/// What happened to a guest.
#[derive(Debug)]
pub struct Guest {
    pub frozen: bool,
    pub commands: Vec<String>,
    pub frozen_at: Option<SystemTime>,
    pub thawed_at: Option<SystemTime>,
}

/// An agent at a socket of its own.
pub struct Agent {
    pub path: PathBuf,
    pub guest: Arc<Mutex<Guest>>,
}

impl Agent {
    pub fn new(rig: &Rig, name: &str, manner: Manner) -> Agent {
        let path = rig.path(name);
        let listener = UnixListener::bind(&path).unwrap();
        let guest = Guest { frozen: false, commands: Vec::new(), frozen_at: None, thawed_at: None };
        let guest = Arc::new(Mutex::new(guest));
        let shared = guest.clone();
        // One connection at a time, as QEMU has it. The thread ends with the tests.
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let _ = converse(stream.unwrap(), manner, &shared);
            }
        });
        Agent { path, guest }
    }

    pub fn option(&self) -> String {
        format!("qga:{}", self.path.display())
    }

    pub fn frozen(&self) -> bool {
        self.guest.lock().unwrap().frozen
    }

    pub fn asked(&self, command: &str) -> usize {
        self.guest.lock().unwrap().commands.iter().filter(|asked| *asked == command).count()
    }
}

fn converse(mut stream: UnixStream, manner: Manner, guest: &Mutex<Guest>) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?);
    loop {
        let mut line = Vec::new();
        if lines.read_until(b'\n', &mut line)? == 0 {
            return Ok(());
        }
        let text: Value = serde_json::from_slice(line.strip_prefix(b"\xff").unwrap_or(&line)).unwrap();
        if let Some(answer) = answer(&text, manner, &mut guest.lock().unwrap()) {
            stream.write_all(&answer)?;
        }
    }
}

/// What qemu-ga answers, but for the manner.
fn answer(text: &Value, manner: Manner, guest: &mut Guest) -> Option<Vec<u8>> {
    let command = text["execute"].as_str().unwrap();
    guest.commands.push(command.to_owned());
    let value = |value: Value| Some(format!("{}\n", json!({ "return": value })).into_bytes());
    let error =
        |desc: &str| Some(format!("{}\n", json!({ "error": { "class": "GenericError", "desc": desc } })).into_bytes());
    if manner == Manner::Silent {
        return None;
    }
    match command {
        "guest-sync-delimited" => {
            let mut bytes = Vec::new();
            if manner == Manner::Stale {
                bytes.extend(b"{\"return\": \"frozen\"}\n\xff{\"return\": 7}\n\xff\xff{]\n");
            }
            bytes.push(0xff);
            bytes.extend(value(text["arguments"]["id"].clone())?);
            Some(bytes)
        }
        "guest-fsfreeze-status" => value(json!(if guest.frozen { "frozen" } else { "thawed" })),
        "guest-fsfreeze-freeze" if guest.frozen => error("the agent is in frozen state"),
        "guest-fsfreeze-freeze" => match manner {
            Manner::Refuses => error("failed to open /: too warm"),
            Manner::Nothing => value(json!(0)),
            _ => {
                (guest.frozen, guest.frozen_at) = (manner != Manner::ThawsEarly, Some(SystemTime::now()));
                if manner == Manner::FreezesInSilence { None } else { value(json!(2)) }
            }
        },
        "guest-fsfreeze-thaw" => {
            let tries = guest.commands.iter().filter(|asked| *asked == command).count();
            if manner == Manner::ThawsLate && tries <= 2 {
                return error("not now");
            }
            let count = if guest.frozen { 2 } else { 0 };
            (guest.frozen, guest.thawed_at) = (false, Some(SystemTime::now()));
            value(json!(count))
        }
        _ => error("The command has not been found"),
    }
}

/// A directory that names a daemon which does with snapshots what a test says.
pub struct FakeMount {
    pub dir: PathBuf,
    /// A snapshot is asked for.
    pub asked: Receiver<()>,
    /// Lets it be taken.
    pub take: Sender<()>,
    pub commands: Arc<Mutex<Vec<(String, Value)>>>,
}

impl FakeMount {
    pub fn new(rig: &Rig) -> FakeMount {
        let (dir, socket) = (rig.mount_point("fake"), rig.path("qmp"));
        let listener = UnixListener::bind(&socket).unwrap();
        std::fs::write(dir.join("status.json"), json!({ "pid": 1, "qmp": socket }).to_string()).unwrap();
        let (asking, asked) = channel();
        let (take, taking) = channel();
        let commands = Arc::new(Mutex::new(Vec::new()));
        let told = commands.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let _ = daemon(stream.unwrap(), &asking, &taking, &told);
            }
        });
        FakeMount { dir, asked, take, commands }
    }

    pub fn ran(&self, command: &str) -> Option<Value> {
        let commands = self.commands.lock().unwrap();
        commands.iter().rev().find(|(name, _)| name == command).map(|(_, arguments)| arguments.clone())
    }

    #[track_caller]
    pub fn wait_asked(&self) {
        self.asked.recv_timeout(Duration::from_secs(60)).expect("no snapshot is asked for");
    }
}

fn daemon(
    mut stream: UnixStream,
    asking: &Sender<()>,
    taking: &Receiver<()>,
    told: &Mutex<Vec<(String, Value)>>,
) -> std::io::Result<()> {
    stream.write_all(b"{\"QMP\": {}}\n")?;
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    while let Some(line) = lines.next().transpose()? {
        let request: Value = serde_json::from_str(&line).unwrap();
        let command = request["execute"].as_str().unwrap().to_owned();
        told.lock().unwrap().push((command.clone(), request["arguments"].clone()));
        if command == "fleecefs-snapshot-create" {
            let _ = asking.send(());
            let _ = taking.recv_timeout(Duration::from_secs(60));
        }
        stream.write_all(format!("{}\n", json!({ "return": { "disks": [] }, "id": request["id"] })).as_bytes())?;
    }
    Ok(())
}

/// An executable script.
pub fn script(path: &Path, text: &str) -> PathBuf {
    use std::os::unix::fs::PermissionsExt;
    std::fs::write(path, format!("#!/bin/sh\n{text}\n")).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path.to_owned()
}

/// Process ids of the children of a process.
pub fn children(pid: u32) -> Vec<u32> {
    let path = format!("/proc/{pid}/task/{pid}/children");
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.split_whitespace().filter_map(|pid| pid.parse().ok()).collect()
}

pub fn kill(signal: &str, pid: u32) {
    ok(tool("kill").args([signal, &pid.to_string()]));
}
