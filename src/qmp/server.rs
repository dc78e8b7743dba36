//! The Unix socket: accepts, checks who it is, and runs one [`Session`] per connection.
//!
//! A connection has two threads, one that reads and answers and one that writes what its [`Outbox`] holds. At the
//! end, [`Server::stop`] takes no more commands while events still go out, so that a client can learn how the end
//! went; [`Server::finish`] sends what is left and closes everything.

use super::codec::{Decoder, encode};
use super::outbox::Outbox;
use super::session::Session;
use super::{CommandError, Events, Host};
use crate::error::{Error, Result, errno};
use crate::storage::process;
use parking_lot::Mutex;
use serde_json::json;
use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// Most connections at a time.
pub const MAX_CONNECTIONS: usize = 32;
/// How long [`Server::stop`] waits for commands that run.
const COMMAND_GRACE: Duration = Duration::from_secs(10);
/// How long [`Server::finish`] waits for clients to take what is left.
const CLIENT_GRACE: Duration = Duration::from_secs(2);
const READ_BYTES: usize = 64 << 10;

/// A bound socket that does not answer yet; clients queue meanwhile. Dropping it removes the file.
#[derive(Debug)]
pub struct Listener {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode, so that nobody else's socket is removed.
    identity: (u64, u64),
}

impl Listener {
    /// Binds `path`, mode 0600. A socket that nobody serves is replaced; one that answers is refused with EBUSY, and
    /// what is no socket with EEXIST.
    pub fn bind(path: &Path) -> Result<Listener> {
        let failed = |e| Error::io("control socket", e).at_path(path);
        let listener = match UnixListener::bind(path) {
            Err(e) if e.kind() == ErrorKind::AddrInUse => {
                remove_stale(path)?;
                UnixListener::bind(path).map_err(failed)?
            }
            Err(e) if e.kind() == ErrorKind::InvalidInput => {
                return Err(Error::new(errno::ENAMETOOLONG, "control socket", "path is longer than 107 bytes")
                    .at_path(path)
                    .hint("give a shorter one with --qmp PATH"));
            }
            bound => bound.map_err(|e| failed(e).hint("choose another place with --qmp PATH"))?,
        };
        let metadata = fs::symlink_metadata(path).map_err(failed)?;
        let identity = (metadata.dev(), metadata.ino());
        // Whoever connects before this is still held to the check of the peer's user.
        fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(failed)?;
        Ok(Listener { listener, path: path.to_owned(), identity })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Removes the file, unless it is gone or another's.
    fn remove(&self) {
        let ours = fs::symlink_metadata(&self.path).is_ok_and(|m| (m.dev(), m.ino()) == self.identity);
        if ours && let Err(e) = fs::remove_file(&self.path) {
            log::warn!("{}", Error::io("remove control socket", e).at_path(&self.path));
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.remove();
    }
}

/// Removes a socket that nobody serves.
fn remove_stale(path: &Path) -> Result<()> {
    let failed = |e| Error::io("control socket", e).at_path(path);
    if !fs::symlink_metadata(path).map_err(failed)?.file_type().is_socket() {
        return Err(Error::new(errno::EEXIST, "control socket", "something else has this name").at_path(path));
    }
    match UnixStream::connect(path) {
        Ok(_) => Err(Error::new(errno::EBUSY, "control socket", "another process serves it")
            .at_path(path)
            .hint("give another one with --qmp PATH")),
        Err(e) if e.kind() == ErrorKind::ConnectionRefused => fs::remove_file(path).map_err(failed),
        Err(e) => Err(failed(e)),
    }
}

/// The socket being served.
#[derive(Debug)]
pub struct Server {
    shared: Arc<Shared>,
    acceptor: Mutex<Option<JoinHandle<()>>>,
}

struct Shared {
    listener: Listener,
    host: Arc<dyn Host>,
    events: Arc<Events>,
    stopping: AtomicBool,
    connections: Mutex<Vec<Connection>>,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("listener", &self.listener).finish_non_exhaustive()
    }
}

struct Connection {
    stream: Arc<UnixStream>,
    outbox: Arc<Outbox>,
    reader: JoinHandle<()>,
    writer: JoinHandle<()>,
}

impl Server {
    /// Begins to answer.
    pub fn start(listener: Listener, host: Arc<dyn Host>, events: Arc<Events>) -> Result<Server> {
        let shared = Arc::new(Shared {
            listener,
            host,
            events,
            stopping: AtomicBool::new(false),
            connections: Mutex::new(Vec::new()),
        });
        let acceptor = spawn("qmp-accept", {
            let shared = shared.clone();
            move || accept_all(&shared)
        })?;
        Ok(Server { shared, acceptor: Mutex::new(Some(acceptor)) })
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        self.shared.listener.path()
    }

    /// Takes no more connections and commands; waits for those that run. Events still go out.
    pub fn stop(&self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        // Shutting a listening socket down wakes its accept; the standard library has it for streams only.
        if let Ok(listener) = self.shared.listener.listener.try_clone() {
            let _ = UnixStream::from(OwnedFd::from(listener)).shutdown(Shutdown::Both);
        }
        if let Some(acceptor) = self.acceptor.lock().take() {
            let _ = acceptor.join();
        }
        let connections = self.shared.connections.lock();
        for connection in connections.iter() {
            connection.outbox.hurry();
            let _ = connection.stream.shutdown(Shutdown::Read);
        }
        let deadline = Instant::now() + COMMAND_GRACE;
        while connections.iter().any(|c| !c.reader.is_finished()) && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Lets the clients take what is left, closes all connections and removes the socket.
    pub fn finish(self) {
        self.stop();
        let deadline = Instant::now() + CLIENT_GRACE;
        let connections = std::mem::take(&mut *self.shared.connections.lock());
        for connection in &connections {
            connection.outbox.finish();
        }
        for connection in connections {
            connection.outbox.wait_drained(deadline);
            connection.outbox.abort();
            let _ = connection.writer.join();
        }
        // A command that hangs still holds the listener.
        self.shared.listener.remove();
    }
}

fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>> {
    thread::Builder::new().name(name.into()).spawn(run).map_err(|e| Error::io("start a thread", e))
}

fn accept_all(shared: &Arc<Shared>) {
    loop {
        let accepted = shared.listener.listener.accept();
        if shared.stopping.load(Ordering::SeqCst) {
            return;
        }
        let outcome = accepted.map_err(|e| Error::io("accept", e)).and_then(|(stream, _)| admit(shared, stream));
        if let Err(e) = outcome {
            log::warn!("control socket: {e}");
            // Out of descriptors or memory: accept would fail again at once.
            thread::sleep(Duration::from_millis(50));
        }
    }
}

/// Starts the two threads of a connection, or refuses it.
fn admit(shared: &Arc<Shared>, stream: UnixStream) -> Result<()> {
    let peer = process::peer_uid(&stream)?;
    if !may_command(peer, process::uid_gid().0) {
        log::warn!("control socket: user {peer} refused");
        refuse(&stream, "Permission denied: only root and the user of the daemon may use this socket");
        return Ok(());
    }
    let mut connections = shared.connections.lock();
    connections.retain(|c| !(c.reader.is_finished() && c.writer.is_finished()));
    if connections.len() >= MAX_CONNECTIONS {
        log::warn!("control socket: more than {MAX_CONNECTIONS} connections: one refused");
        refuse(&stream, &format!("Too many connections: at most {MAX_CONNECTIONS}"));
        return Ok(());
    }
    let stream = Arc::new(stream);
    let closing = stream.clone();
    let outbox = Arc::new(Outbox::new(Box::new(move || drop(closing.shutdown(Shutdown::Both)))));
    let writer = spawn("qmp-write", {
        let (stream, outbox) = (stream.clone(), outbox.clone());
        move || write_all(&stream, &outbox)
    })?;
    let reader = spawn("qmp-read", {
        let (shared, stream, outbox) = (shared.clone(), stream.clone(), outbox.clone());
        move || {
            converse(&shared, &stream, &outbox);
            // While the daemon ends, events still go to clients whose commands it no longer reads.
            if !shared.stopping.load(Ordering::SeqCst) {
                outbox.finish();
            }
        }
    });
    match reader {
        Ok(reader) => connections.push(Connection { stream, outbox, reader, writer }),
        Err(e) => {
            outbox.abort();
            return Err(e);
        }
    }
    Ok(())
}

fn may_command(peer_uid: u32, own_uid: u32) -> bool {
    peer_uid == 0 || peer_uid == own_uid
}

/// Says why, without waiting for the client.
fn refuse(mut stream: &UnixStream, why: &str) {
    let message = json!({ "error": CommandError::generic(why).to_json() });
    let _ = stream.set_nonblocking(true);
    let _ = stream.write_all(&encode(&message));
}

fn converse(shared: &Shared, mut stream: &UnixStream, outbox: &Arc<Outbox>) {
    let mut session = Session::new(shared.host.clone(), shared.events.clone(), outbox.clone());
    let mut decoder = Decoder::default();
    let mut buf = vec![0; READ_BYTES];
    loop {
        let count = match stream.read(&mut buf) {
            Ok(0) => return,
            Ok(count) => count,
            Err(e) if e.kind() == ErrorKind::Interrupted => continue,
            Err(_) => return,
        };
        decoder.push(buf.get(..count).unwrap_or_default());
        while let Some(input) = decoder.next() {
            // What came in before the end but was not begun is not run any more.
            if shared.stopping.load(Ordering::SeqCst) || !session.handle(input) {
                return;
            }
        }
    }
}

fn write_all(mut stream: &UnixStream, outbox: &Outbox) {
    while let Some(bytes) = outbox.pop() {
        if stream.write_all(&bytes).is_err() {
            break;
        }
    }
    outbox.abort();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_and_the_daemons_user_may_command() {
        assert!(may_command(0, 1000) && may_command(1000, 1000) && may_command(0, 0));
        assert!(!may_command(1001, 1000) && !may_command(1000, 0));
    }

    #[test]
    fn a_stale_socket_is_replaced_and_a_live_one_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        drop(UnixListener::bind(&path).unwrap());
        let first = Listener::bind(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert_eq!(Listener::bind(&path).unwrap_err().errno(), errno::EBUSY);
        drop(first);
        assert!(!path.exists());
        fs::write(&path, "precious").unwrap();
        assert_eq!(Listener::bind(&path).unwrap_err().errno(), errno::EEXIST);
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn anothers_socket_of_the_name_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let ours = Listener::bind(&path).unwrap();
        fs::remove_file(&path).unwrap();
        let _other = UnixListener::bind(&path).unwrap();
        // A file system may hand out the freed inode number at once; then there is nothing to see here.
        if fs::symlink_metadata(&path).map(|m| (m.dev(), m.ino())).unwrap() != ours.identity {
            drop(ours);
            assert!(path.exists());
        }
    }

    #[test]
    fn a_path_that_is_too_long_says_so() {
        let dir = tempfile::tempdir().unwrap();
        let e = Listener::bind(&dir.path().join("x".repeat(120))).unwrap_err();
        assert_eq!(e.errno(), errno::ENAMETOOLONG);
        assert!(e.hint_text().unwrap().contains("--qmp"));
    }
}
