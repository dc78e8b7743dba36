//! Guest agents: QEMU's, by its socket, and libvirt's, by `virsh`.
//!
//! * A guest that is frozen already is somebody else's: it is neither frozen again nor thawed.
//! * What an agent answers is believed only behind an answer to `guest-sync-delimited` with our own number, so that
//!   answers to whoever was there before are passed over.
//! * From the moment at which a freeze is asked for, the guest counts as frozen until it says that it is not.

use super::child;
use crate::error::{Error, Result, errno};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::fmt;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::time::{Duration, Instant};

/// Most bytes that an agent may send before what is waited for.
const MAX_ANSWER_BYTES: usize = 1 << 20;
/// What a guest-agent's answer begins with, where it was asked to.
const DELIMITER: u8 = 0xff;

/// How a guest is reached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Guest {
    /// By the socket of its agent.
    Qga(String),
    /// By libvirt, under its domain's name.
    Libvirt(String),
}

/// How a guest thawed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Thawed {
    /// It was frozen until then.
    pub held: bool,
}

impl Guest {
    /// `qga:SOCKET` or `libvirt:DOMAIN`.
    pub fn parse(text: &str) -> std::result::Result<Guest, String> {
        match text.split_once(':') {
            Some(("qga", socket)) if !socket.is_empty() => Ok(Guest::Qga(socket.to_owned())),
            Some(("libvirt", domain)) if !domain.is_empty() => Ok(Guest::Libvirt(domain.to_owned())),
            _ => Err("give qga:SOCKET or libvirt:DOMAIN".to_owned()),
        }
    }

    /// Freezes. `begin` is asked immediately before the freeze is; where it says no, nothing is done to the guest.
    pub fn freeze(&self, deadline: Instant, begin: impl FnOnce() -> bool) -> Result<u64> {
        let mut agent = self.connect(deadline)?;
        if agent.frozen()? {
            return Err(Error::new(
                errno::EBUSY,
                self.to_string(),
                "it is frozen already: another backup may be at work",
            )
            .hint(format!("if there is none, thaw it: {}", self.how_to_thaw())));
        }
        if !begin() {
            return Err(self.late());
        }
        match agent.freeze()? {
            0 => Err(Error::new(errno::EIO, self.to_string(), "no file system was frozen")),
            count => Ok(count),
        }
    }

    /// Thaws; an error means that it may still be frozen.
    pub fn thaw(&self, deadline: Instant) -> Result<Thawed> {
        let mut agent = self.connect(deadline)?;
        let was_frozen = agent.frozen();
        let count = agent.thaw();
        if agent.frozen()? {
            let why = count.map_or_else(|e| e.to_string(), |_| "it says that it is frozen still".to_owned());
            return Err(Error::new(errno::EIO, self.to_string(), why));
        }
        Ok(Thawed { held: was_frozen.unwrap_or(false) && count.is_ok_and(|count| count > 0) })
    }

    /// What a user does where all else failed.
    pub fn how_to_thaw(&self) -> String {
        match self {
            Guest::Qga(socket) => {
                format!("printf '\\xff{{\"execute\":\"guest-fsfreeze-thaw\"}}\\n' | socat -t5 - UNIX-CONNECT:{socket}")
            }
            Guest::Libvirt(domain) => format!("virsh domfsthaw {domain}"),
        }
    }

    fn late(&self) -> Error {
        Error::new(errno::ETIMEDOUT, self.to_string(), "the time was up before it could be frozen")
    }

    fn connect(&self, deadline: Instant) -> Result<Box<dyn Agent + '_>> {
        match self {
            Guest::Qga(socket) => Ok(Box::new(Qga::connect(self, socket, deadline)?)),
            Guest::Libvirt(domain) => Ok(Box::new(Virsh { guest: self, domain, deadline })),
        }
    }
}

impl fmt::Display for Guest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Guest::Qga(socket) => write!(f, "qga:{socket}"),
            Guest::Libvirt(domain) => write!(f, "libvirt:{domain}"),
        }
    }
}

/// What is asked of an agent.
trait Agent {
    fn frozen(&mut self) -> Result<bool>;
    /// Count of the file systems that were frozen.
    fn freeze(&mut self) -> Result<u64>;
    /// Count of the file systems that were thawed.
    fn thaw(&mut self) -> Result<u64>;
}

/// QEMU's agent at its socket, in step with us.
struct Qga<'a> {
    guest: &'a Guest,
    stream: UnixStream,
    read: Vec<u8>,
    deadline: Instant,
}

impl<'a> Qga<'a> {
    fn connect(guest: &'a Guest, socket: &str, deadline: Instant) -> Result<Qga<'a>> {
        let stream = UnixStream::connect(socket).map_err(|e| Error::io(guest.to_string(), e))?;
        let mut agent = Qga { guest, stream, read: Vec::new(), deadline };
        agent.sync()?;
        Ok(agent)
    }

    /// Passes over everything that was on its way before.
    fn sync(&mut self) -> Result<()> {
        let (number, _) = uuid::Uuid::new_v4().as_u64_pair();
        let number = number >> 12;
        let mut message = vec![DELIMITER];
        message.extend(json!({ "execute": "guest-sync-delimited", "arguments": { "id": number } }).to_string().bytes());
        self.send(message)?;
        loop {
            self.until(DELIMITER)?;
            let line = self.until(b'\n')?;
            let answer: Option<Value> = serde_json::from_slice(&line).ok();
            if answer.is_some_and(|answer| answer.get("return").and_then(Value::as_u64) == Some(number)) {
                return Ok(());
            }
        }
    }

    fn ask(&mut self, command: &str) -> Result<Value> {
        self.send(json!({ "execute": command }).to_string().into_bytes())?;
        let line = self.until(b'\n')?;
        let answer: Value = serde_json::from_slice(&line).map_err(|_| self.failed(command, "its answer is no JSON"))?;
        if let Some(error) = answer.get("error") {
            let why = error.get("desc").and_then(Value::as_str).unwrap_or("an error without a text");
            return Err(self.failed(command, why));
        }
        answer.get("return").cloned().ok_or_else(|| self.failed(command, "its answer says nothing"))
    }

    fn count(&mut self, command: &str) -> Result<u64> {
        let answer = self.ask(command)?;
        answer.as_u64().ok_or_else(|| self.failed(command, "its answer is no count"))
    }

    fn failed(&self, command: &str, why: &str) -> Error {
        Error::new(errno::EIO, self.guest.to_string(), format!("{command}: {why}"))
    }

    fn silent(&self) -> Error {
        Error::new(errno::ETIMEDOUT, self.guest.to_string(), "the agent does not answer")
            .hint("does qemu-guest-agent run in the guest? where libvirt has this socket, give libvirt:DOMAIN")
    }

    fn left(&self) -> Result<Duration> {
        let left = self.deadline.checked_duration_since(Instant::now()).filter(|left| !left.is_zero());
        left.ok_or_else(|| self.silent())
    }

    fn send(&mut self, mut message: Vec<u8>) -> Result<()> {
        message.push(b'\n');
        let left = self.left()?;
        let sent = self.stream.set_write_timeout(Some(left)).and_then(|()| self.stream.write_all(&message));
        sent.map_err(|e| self.broken(e))
    }

    fn broken(&self, e: std::io::Error) -> Error {
        match e.kind() {
            ErrorKind::WouldBlock | ErrorKind::TimedOut => self.silent(),
            _ => Error::io(self.guest.to_string(), e),
        }
    }

    /// What comes before the next `end`.
    fn until(&mut self, end: u8) -> Result<Vec<u8>> {
        let mut looked_at = 0;
        let mut buf = [0; 4096];
        loop {
            if let Some(at) = self.read.iter().skip(looked_at).position(|byte| *byte == end) {
                let mut line: Vec<u8> = self.read.drain(..=looked_at + at).collect();
                line.pop();
                return Ok(line);
            }
            looked_at = self.read.len();
            if looked_at > MAX_ANSWER_BYTES {
                return Err(Error::new(errno::EIO, self.guest.to_string(), "what it sends is no answer"));
            }
            let left = self.left()?;
            let got = self.stream.set_read_timeout(Some(left)).and_then(|()| self.stream.read(&mut buf));
            match got {
                Ok(0) => return Err(Error::new(errno::EIO, self.guest.to_string(), "the agent closed the connection")),
                Ok(count) => self.read.extend_from_slice(buf.get(..count).unwrap_or_default()),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(self.broken(e)),
            }
        }
    }
}

impl Agent for Qga<'_> {
    fn frozen(&mut self) -> Result<bool> {
        let status = self.ask("guest-fsfreeze-status")?;
        is_frozen(&status).ok_or_else(|| self.failed("guest-fsfreeze-status", &status.to_string()))
    }

    fn freeze(&mut self) -> Result<u64> {
        self.count("guest-fsfreeze-freeze")
    }

    fn thaw(&mut self) -> Result<u64> {
        self.count("guest-fsfreeze-thaw")
    }
}

fn is_frozen(status: &Value) -> Option<bool> {
    match status.as_str()? {
        "frozen" => Some(true),
        "thawed" => Some(false),
        _ => None,
    }
}

/// The agent that libvirt talks to, by its command line.
struct Virsh<'a> {
    guest: &'a Guest,
    domain: &'a str,
    deadline: Instant,
}

impl Virsh<'_> {
    fn run(&self, arguments: &[&str], deadline: Instant) -> Result<String> {
        let mut command = Command::new("virsh");
        command.args(arguments).env("LC_ALL", "C");
        let out = child::output(&mut command, deadline).map_err(|e| e.context(self.guest.to_string()))?;
        if out.code == 0 {
            return Ok(out.stdout);
        }
        let why = out.stderr.trim();
        let why = why.strip_prefix("error: ").unwrap_or(why).replace('\n', " ");
        Err(Error::new(
            errno::EIO,
            self.guest.to_string(),
            format!("virsh {}: {why}", arguments.first().unwrap_or(&"")),
        ))
    }

    /// The number in `Froze 2 filesystem(s)`.
    fn count(&self, command: &str) -> Result<u64> {
        let text = self.run(&[command, "--domain", self.domain], self.deadline)?;
        let number = text.split_whitespace().find_map(|word| word.parse().ok());
        number
            .ok_or_else(|| Error::new(errno::EIO, self.guest.to_string(), format!("virsh {command}: {}", text.trim())))
    }
}

impl Agent for Virsh<'_> {
    fn frozen(&mut self) -> Result<bool> {
        // A question that hangs leaves time for the thaw behind it.
        let left = self.deadline.saturating_duration_since(Instant::now()) / 2;
        let limit_s = left.as_secs().max(1).to_string();
        let asked = json!({ "execute": "guest-fsfreeze-status" }).to_string();
        let command = ["qemu-agent-command", "--timeout", &limit_s, "--domain", self.domain, "--cmd", &asked];
        let text = self.run(&command, Instant::now() + left)?;
        let answer: Option<Value> = serde_json::from_str(text.trim()).ok();
        let status = answer.as_ref().and_then(|answer| is_frozen(answer.get("return")?));
        let unclear =
            || Error::new(errno::EIO, self.guest.to_string(), format!("guest-fsfreeze-status: {}", text.trim()));
        status.ok_or_else(unclear)
    }

    fn freeze(&mut self) -> Result<u64> {
        self.count("domfsfreeze")
    }

    fn thaw(&mut self) -> Result<u64> {
        self.count("domfsthaw")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader};
    use std::os::unix::net::UnixListener;

    #[test]
    fn guests_are_named_by_kind_and_place() {
        assert_eq!(Guest::parse("qga:/run/a:b").unwrap(), Guest::Qga("/run/a:b".into()));
        assert_eq!(Guest::parse("libvirt:web").unwrap().to_string(), "libvirt:web");
        for bad in ["", "x", "qga", "qga:", "libvirt:", "xen:1"] {
            assert!(Guest::parse(bad).is_err(), "{bad:?}");
        }
    }

    /// An agent that serves one connection: `answers` gives what it says to each command, in bytes.
    fn agent(answers: impl Fn(&str, &Value) -> Vec<u8> + Send + 'static) -> (tempfile::TempDir, Guest) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qga");
        let listener = UnixListener::bind(&path).unwrap();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut lines = BufReader::new(stream.try_clone().unwrap());
            let mut line = Vec::new();
            while lines.read_until(b'\n', &mut line).is_ok_and(|count| count > 0) {
                let text: Value = serde_json::from_slice(line.strip_prefix(&[DELIMITER]).unwrap_or(&line)).unwrap();
                let answer = answers(text["execute"].as_str().unwrap(), &text);
                if stream.write_all(&answer).is_err() {
                    return;
                }
                line.clear();
            }
        });
        let guest = Guest::Qga(path.to_str().unwrap().to_owned());
        (dir, guest)
    }

    fn synced(text: &Value) -> Vec<u8> {
        let mut answer =
            b"{\"error\": {\"desc\": \"JSON parse error\"}}\n\xff{\"return\": 1}\n\xffno json\n\xff".to_vec();
        answer.extend(format!("{{\"return\": {}}}\n", text["arguments"]["id"]).into_bytes());
        answer
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_millis(300)
    }

    #[test]
    fn stale_answers_are_passed_over() {
        let (_dir, guest) = agent(|command, text| match command {
            "guest-sync-delimited" => synced(text),
            "guest-fsfreeze-status" => b"{\"return\": \"thawed\"}\n".to_vec(),
            _ => b"{\"return\": 2}\n".to_vec(),
        });
        assert_eq!(guest.freeze(soon(), || true).unwrap(), 2);
    }

    #[test]
    fn a_guest_that_is_frozen_is_left_alone() {
        let (_dir, guest) = agent(|command, text| match command {
            "guest-sync-delimited" => synced(text),
            "guest-fsfreeze-status" => b"{\"return\": \"frozen\"}\n".to_vec(),
            _ => panic!("{command}"),
        });
        let e = guest.freeze(soon(), || panic!("begun")).unwrap_err();
        assert!(e.to_string().contains("frozen already"), "{e}");
    }

    #[test]
    fn silence_errors_and_nonsense_are_told_apart() {
        let (_dir, guest) = agent(|_, _| Vec::new());
        let e = guest.freeze(soon(), || panic!("begun")).unwrap_err();
        assert!(e.to_string().contains("does not answer") && e.hint_text().unwrap().contains("libvirt"), "{e}");
        for (answer, why) in [
            ("{\"error\": {\"class\": \"GenericError\", \"desc\": \"it is too warm\"}}\n", "it is too warm"),
            ("nonsense\n", "no JSON"),
            ("{}\n", "says nothing"),
            ("{\"return\": \"x\"}\n", "no count"),
            ("{\"return\": 0}\n", "no file system was frozen"),
            ("{\"return\"", "does not answer"),
        ] {
            let (_dir, guest) = agent(move |command, text| match command {
                "guest-sync-delimited" => synced(text),
                "guest-fsfreeze-status" => b"{\"return\": \"thawed\"}\n".to_vec(),
                _ => answer.as_bytes().to_vec(),
            });
            let e = guest.freeze(soon(), || true).unwrap_err();
            assert!(e.to_string().contains(why), "{e}");
        }
        let e = Guest::Qga("/nonexistent".into()).freeze(soon(), || true).unwrap_err();
        assert!(e.to_string().contains("qga:/nonexistent"), "{e}");
    }

    #[test]
    fn a_thaw_tells_whether_the_freeze_had_held() {
        for (before, count, held) in [("frozen", 2, true), ("thawed", 0, false), ("frozen", 0, false)] {
            let asked = std::sync::atomic::AtomicU32::new(0);
            let (_dir, guest) = agent(move |command, text| match command {
                "guest-sync-delimited" => synced(text),
                "guest-fsfreeze-status" => {
                    let first = asked.fetch_add(1, std::sync::atomic::Ordering::Relaxed) == 0;
                    format!("{{\"return\": \"{}\"}}\n", if first { before } else { "thawed" }).into_bytes()
                }
                _ => format!("{{\"return\": {count}}}\n").into_bytes(),
            });
            assert_eq!(guest.thaw(soon()).unwrap(), Thawed { held }, "{before} {count}");
        }
        let (_dir, guest) = agent(|command, text| match command {
            "guest-sync-delimited" => synced(text),
            "guest-fsfreeze-status" => b"{\"return\": \"frozen\"}\n".to_vec(),
            _ => b"{\"error\": {\"desc\": \"no\"}}\n".to_vec(),
        });
        assert!(guest.thaw(soon()).unwrap_err().to_string().contains("no"));
    }
}
