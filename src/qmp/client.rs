//! The client that the command line uses: one command after another, events in between kept or skipped.

use super::codec::encode;
use crate::error::{Error, Result, errno};
use serde::Deserialize;
use serde_json::de::IoRead;
use serde_json::{Deserializer, StreamDeserializer, Value, json};
use std::io::{BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

/// A negotiated connection.
pub struct Client {
    path: PathBuf,
    stream: UnixStream,
    replies: StreamDeserializer<'static, IoRead<BufReader<UnixStream>>, Value>,
    last_id: u64,
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client").field("path", &self.path).finish_non_exhaustive()
    }
}

/// The `error` member of a reply.
#[derive(Deserialize)]
struct Refusal {
    desc: String,
    errno: Option<i32>,
    hint: Option<String>,
}

impl Client {
    /// Connects and negotiates.
    pub fn connect(path: &Path) -> Result<Client> {
        let failed = |e: std::io::Error| match e.kind() {
            ErrorKind::ConnectionRefused | ErrorKind::NotFound => {
                Error::new(errno::ENOTCONN, "control socket", "nobody serves it")
                    .at_path(path)
                    .hint("the daemon has ended, or is about to")
            }
            _ => Error::io("control socket", e).at_path(path),
        };
        let stream = UnixStream::connect(path).map_err(failed)?;
        let reader = BufReader::new(stream.try_clone().map_err(failed)?);
        let replies = Deserializer::from_reader(reader).into_iter();
        let mut client = Client { path: path.to_owned(), stream, replies, last_id: 0 };
        let greeting = client.receive()?;
        if greeting.get("QMP").is_none() {
            return Err(match greeting.get("error") {
                Some(error) => refusal(None, "connect", error),
                None => client.broken("no greeting of a QMP server"),
            });
        }
        client.execute("qmp_capabilities", json!({}))?;
        Ok(client)
    }

    /// Runs one command; events that come before its reply are skipped.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        self.ask(None, command, arguments)
    }

    /// Runs one command about `what`: its errors name that, and have the daemon's whole text as their reason.
    pub fn execute_for(&mut self, what: &str, command: &str, arguments: Value) -> Result<Value> {
        self.ask(Some(what), command, arguments)
    }

    fn ask(&mut self, what: Option<&str>, command: &str, arguments: Value) -> Result<Value> {
        self.last_id += 1;
        let request = json!({ "execute": command, "arguments": arguments, "id": self.last_id });
        let path = self.path.clone();
        self.stream.write_all(&encode(&request)).map_err(|e| Error::io("control socket", e).at_path(path))?;
        loop {
            let mut message = self.receive()?;
            if message.get("id") != Some(&json!(self.last_id)) {
                continue;
            }
            if let Some(error) = message.get("error") {
                return Err(refusal(what, command, error));
            }
            return Ok(message.get_mut("return").map(Value::take).unwrap_or_default());
        }
    }

    /// A handle that says, by [`UnixStream::shutdown`] for writing, that no more commands come: the daemon lets go of all
    /// that the connection holds, and then closes it.
    pub fn handle(&self) -> Result<UnixStream> {
        self.stream.try_clone().map_err(|e| Error::io("control socket", e).at_path(&self.path))
    }

    /// Waits for an event of that name and gives its data; `None` where the connection ends first.
    pub fn wait_event(&mut self, name: &str) -> Option<Value> {
        loop {
            let mut message = self.receive().ok()?;
            if message.get("event").and_then(Value::as_str) == Some(name) {
                return Some(message.get_mut("data").map(Value::take).unwrap_or_default());
            }
        }
    }

    fn receive(&mut self) -> Result<Value> {
        match self.replies.next() {
            Some(Ok(message)) => Ok(message),
            Some(Err(e)) if !e.is_eof() && !e.is_io() => Err(self.broken(&e.to_string())),
            _ => Err(self.broken("connection closed")),
        }
    }

    fn broken(&self, why: &str) -> Error {
        Error::new(errno::EIO, "control socket", why).at_path(&self.path)
    }
}

/// The daemon's error, in the words that it had there.
fn refusal(what: Option<&str>, command: &str, error: &Value) -> Error {
    let Ok(refusal) = Refusal::deserialize(error) else {
        return Error::new(errno::EIO, command, error.to_string());
    };
    let number = refusal.errno.unwrap_or(errno::EINVAL);
    let e = match (what, refusal.desc.split_once(": ")) {
        (Some(what), _) => Error::new(number, what, refusal.desc),
        // `WHAT: WHY` of the daemon's error is taken apart again, so that it is printed once and unchanged.
        (None, Some((what, why))) => Error::new(number, what, why),
        (None, None) => Error::new(number, command, refusal.desc),
    };
    match refusal.hint {
        Some(hint) => e.hint(hint),
        None => e,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_daemons_error_keeps_text_errno_and_hint() {
        let e = refusal(
            None,
            "c",
            &json!({"class": "DeviceNotFound", "desc": "snapshot 'a': not found: really", "errno": 2, "hint": "h"}),
        );
        assert_eq!(e.to_string(), "snapshot 'a': not found: really");
        assert_eq!((e.errno(), e.hint_text()), (errno::ENOENT, Some("h")));
        let missing = json!({"class": "GenericError", "desc": "Parameter 'x' is missing"});
        assert_eq!(refusal(None, "c", &missing).to_string(), "c: Parameter 'x' is missing");
        let exists = json!({"class": "GenericError", "desc": "Bitmap already exists: b"});
        assert_eq!(refusal(Some("bitmap 'b'"), "c", &exists).to_string(), "bitmap 'b': Bitmap already exists: b");
    }

    #[test]
    fn nobody_at_the_socket_is_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let e = Client::connect(&dir.path().join("none")).unwrap_err();
        assert_eq!(e.errno(), errno::ENOTCONN);
        assert!(e.hint_text().is_some());
    }
}
