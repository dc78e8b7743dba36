//! The server: accepts connections, runs a [`Session`] on each, watches over them, and stops.
//!
//! * **Bounded.** No more connections than [`ServerOptions::max_connections`]; who comes then waits in the socket's queue.
//! * **Handshakes end** after [`ServerOptions::handshake_time`].
//! * **Nobody keeps memory by not moving**: a client that takes no bytes of a reply, or sends none of its data, is
//!   disconnected after [`STUCK_TIME`] where others wait for memory; one that takes no bytes at the latest after
//!   [`SILENT_TIME`]. For every 256 KiB of a reply that it takes, the time begins anew.
//! * **A stop is in order**: what was begun is finished and answered, what comes then gets `NBD_ESHUTDOWN`, and all ends
//!   after [`STOP_TIME`] at the latest.

use super::export::Exports;
use super::handshake::{Offer, shake};
use super::house::{CONNECTION_THREADS, House};
use super::listen::{Address, Listener};
use super::memory::MEMORY_MAX_BYTES;
use super::session::{Seen, Session};
use super::transport::{Socket, Tls, Transport};
use crate::error::{Error, Result};
use parking_lot::{Condvar, Mutex};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// How long a handshake may take where nothing else is said, as in QEMU.
pub const HANDSHAKE_TIME: Duration = Duration::from_secs(10);
/// How long a client may keep memory without moving while others wait for it.
pub const STUCK_TIME: Duration = Duration::from_secs(5);
/// How long a client may take no bytes of a reply.
pub const SILENT_TIME: Duration = Duration::from_secs(60);
/// How long a stop waits for requests that were begun.
pub const STOP_TIME: Duration = Duration::from_secs(10);
/// Most connections of a server, whatever its options say.
pub const CONNECTIONS_MAX: usize = 1024;
/// How often the watch looks while there is work.
const TICK: Duration = Duration::from_millis(3);
/// How often it looks while there is none.
const DOZE: Duration = Duration::from_millis(50);
/// How long after the last request there is work.
const AWAKE: Duration = Duration::from_secs(1);
/// After a failure to accept for want of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// How a server serves.
#[derive(Clone)]
pub struct ServerOptions {
    /// Most connections at once, 0 for as many as there may be: [`CONNECTIONS_MAX`].
    pub max_connections: usize,
    /// How long a handshake may take; none for no limit.
    pub handshake_time: Option<Duration>,
    /// What puts TLS over a connection; none refuses it.
    pub tls: Option<Arc<dyn Tls>>,
    /// Whether nothing is said without TLS.
    pub tls_required: bool,
    /// Mode of Unix sockets.
    pub unix_mode: u32,
}

impl Default for ServerOptions {
    fn default() -> Self {
        ServerOptions {
            max_connections: 100,
            handshake_time: Some(HANDSHAKE_TIME),
            tls: None,
            tls_required: false,
            unix_mode: 0o600,
        }
    }
}

/// A server that serves. Dropping it stops it.
pub struct Server {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

struct Shared {
    listeners: Vec<Listener>,
    exports: Arc<dyn Exports>,
    options: ServerOptions,
    house: Arc<House>,
    connections: Mutex<Vec<Arc<Connection>>>,
    /// A connection has ended, or the server stops.
    changed: Condvar,
}

struct Connection {
    socket: Arc<Socket>,
    peer: String,
    begun: Instant,
    phase: Mutex<Phase>,
}

enum Phase {
    /// Up to the name of the export that is being entered.
    Handshake(Option<String>),
    Session {
        name: String,
        session: Arc<Session>,
        seen: Seen,
    },
    /// It has left, or is to leave.
    Ended,
}

impl Phase {
    /// The export that it has open, or opens.
    fn export(&self) -> Option<&str> {
        match self {
            Phase::Handshake(name) => name.as_deref(),
            Phase::Session { name, .. } => Some(name),
            Phase::Ended => None,
        }
    }
}

impl Server {
    /// Binds all of `addresses` and begins to serve.
    pub fn start(addresses: &[Address], exports: Arc<dyn Exports>, options: ServerOptions) -> Result<Server> {
        let mut listeners = Vec::new();
        for address in addresses {
            listeners.extend(Listener::bind(address, options.unix_mode)?);
        }
        Server::on(listeners, exports, options)
    }

    /// Begins to serve on sockets that are bound: who connected meanwhile has waited.
    pub fn on(listeners: Vec<Listener>, exports: Arc<dyn Exports>, options: ServerOptions) -> Result<Server> {
        let shared = Arc::new(Shared {
            listeners,
            exports,
            options,
            house: House::new(MEMORY_MAX_BYTES, CONNECTION_THREADS),
            connections: Mutex::default(),
            changed: Condvar::new(),
        });
        let server = Server { shared: shared.clone(), threads: Mutex::default() };
        for index in 0..shared.listeners.len() {
            let shared = shared.clone();
            server.threads.lock().push(spawn("nbd-accept", move || shared.accept_all(index))?);
        }
        server.threads.lock().push(spawn("nbd-watch", move || shared.watch())?);
        for address in server.addresses() {
            log::info!("NBD server: listens on {address}");
        }
        Ok(server)
    }

    /// Where it listens.
    pub fn addresses(&self) -> Vec<Address> {
        self.shared.listeners.iter().filter_map(|listener| listener.address().ok()).collect()
    }

    /// How many connections have an export open, or open it, by the name that their clients gave. A connection counts
    /// until the last of its requests has come back from the export.
    pub fn connections(&self, export: &str) -> usize {
        let connections = self.shared.connections.lock();
        connections.iter().filter(|connection| connection.phase.lock().export() == Some(export)).count()
    }

    /// Ends all connections of an export without waiting for what is in flight, also those that are just opening it: who
    /// takes a name off its list and then calls this has none left that will take up requests.
    pub fn disconnect(&self, export: &str) {
        let connections = self.shared.connections.lock().clone();
        for connection in connections {
            let mut phase = connection.phase.lock();
            if phase.export() != Some(export) {
                continue;
            }
            connection.socket.shutdown();
            match &*phase {
                Phase::Session { session, .. } => session.kill(),
                _ => *phase = Phase::Ended,
            }
        }
    }

    /// Stops: see the head of the file. Unix sockets are removed when the server is dropped or this is done.
    pub fn stop(&self) {
        let shared = &self.shared;
        if shared.house.is_stopping() && self.threads.lock().is_empty() {
            return;
        }
        shared.house.stop();
        shared.changed.notify_all();
        shared.listeners.iter().for_each(Listener::close);
        for thread in std::mem::take(&mut *self.threads.lock()) {
            let _ = thread.join();
        }
        let deadline = Instant::now() + STOP_TIME;
        let sessions = shared.sessions();
        while sessions.iter().any(|session| session.is_busy()) && Instant::now() < deadline {
            thread::sleep(TICK);
            let connections = shared.connections.lock().clone();
            for connection in &connections {
                shared.look_at(connection, Instant::now(), true);
            }
        }
        for session in sessions.iter().filter(|session| !session.is_busy()) {
            session.kill();
        }
        let all = shared.connections.lock().clone();
        all.iter().for_each(|connection| connection.socket.shutdown());
        sessions.iter().for_each(|session| session.kill());
        drop((all, sessions));
        let mut connections = shared.connections.lock();
        while !connections.is_empty() && !shared.changed.wait_until(&mut connections, deadline).timed_out() {}
        drop(connections);
        shared.listeners.iter().for_each(Listener::remove);
        log::info!("NBD server: stopped");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop();
    }
}

fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>> {
    thread::Builder::new().name(name.into()).spawn(run).map_err(|e| Error::io("start a thread", e))
}

impl Shared {
    fn accept_all(self: &Arc<Self>, listener: usize) {
        let Some(listener) = self.listeners.get(listener) else { return };
        let mut failing = false;
        while self.wait_for_room() {
            let accepted = listener.accept();
            if self.house.is_stopping() {
                return;
            }
            let accepted = accepted.map_err(|e| Error::io("accept", e));
            let failed = accepted.and_then(|(socket, peer)| self.admit(socket, peer)).err();
            if let Some(e) = &failed {
                // Out of descriptors, memory or threads: it would fail again at once, and each time be said.
                let level = if failing { log::Level::Debug } else { log::Level::Warn };
                log::log!(level, "NBD server: {e}");
                thread::sleep(ACCEPT_PAUSE);
            }
            failing = failed.is_some();
        }
    }

    /// `false` once the server stops.
    fn wait_for_room(&self) -> bool {
        let limit = match self.options.max_connections {
            0 => CONNECTIONS_MAX,
            limit => limit.min(CONNECTIONS_MAX),
        };
        let mut connections = self.connections.lock();
        while connections.len() >= limit && !self.house.is_stopping() {
            self.changed.wait(&mut connections);
        }
        !self.house.is_stopping()
    }

    fn admit(self: &Arc<Self>, socket: Socket, peer: String) -> Result<()> {
        let (begun, phase) = (Instant::now(), Mutex::new(Phase::Handshake(None)));
        let connection = Arc::new(Connection { socket: Arc::new(socket), peer, begun, phase });
        self.connections.lock().push(connection.clone());
        self.changed.notify_all();
        let run = {
            let (shared, connection) = (self.clone(), connection.clone());
            move || {
                shared.serve(&connection);
                shared.remove(&connection);
            }
        };
        // Its thread is not waited for at a stop: it leaves when its export lets it.
        spawn("nbd-session", run).map(drop).inspect_err(|_| self.remove(&connection))
    }

    fn remove(&self, connection: &Arc<Connection>) {
        self.connections.lock().retain(|other| !Arc::ptr_eq(other, connection));
        self.changed.notify_all();
    }

    /// The life of a connection.
    fn serve(self: &Arc<Self>, connection: &Connection) {
        let peer = &connection.peer;
        let tls = self.options.tls.as_deref();
        let entering = |name: Option<&str>| {
            let mut phase = connection.phase.lock();
            if matches!(&*phase, Phase::Handshake(_)) {
                *phase = Phase::Handshake(name.map(str::to_owned));
            }
        };
        let tls_required = self.options.tls_required;
        let offer = Offer { exports: &*self.exports, tls, tls_required, entering: &entering };
        let socket = connection.socket.clone();
        let agreed = match shake(socket.clone(), Some(socket), offer) {
            Ok(Some(agreed)) => agreed,
            Ok(None) => return connection.socket.shutdown(),
            Err(e) => {
                log::debug!("nbd: {peer}: {e}");
                return connection.socket.shutdown();
            }
        };
        let name = agreed.name.clone();
        log::debug!("nbd: {peer}: export '{name}', {:?} replies", agreed.style);
        let session = Session::new(agreed, self.house.clone());
        let mut phase = connection.phase.lock();
        if matches!(&*phase, Phase::Ended) {
            // Requests that came with the last option are not begun any more.
            return;
        }
        *phase = Phase::Session { name: name.clone(), session: session.clone(), seen: Seen::default() };
        drop(phase);
        self.changed.notify_all();
        // Looked at behind the phase, as a stop looks the other way round.
        if self.house.is_stopping() {
            session.kill();
        }
        session.run();
        *connection.phase.lock() = Phase::Ended;
        log::debug!("nbd: {peer}: export '{name}': left");
    }

    fn sessions(&self) -> Vec<Arc<Session>> {
        let connections = self.connections.lock();
        let session = |connection: &Arc<Connection>| match &*connection.phase.lock() {
            Phase::Session { session, .. } => Some(session.clone()),
            _ => None,
        };
        connections.iter().filter_map(session).collect()
    }

    /// Looks at every connection every few milliseconds while requests come, and every [`DOZE`] otherwise.
    fn watch(&self) {
        let mut active_at = Instant::now();
        while !self.house.is_stopping() {
            let mut connections = self.connections.lock();
            let now = Instant::now();
            let pause = match () {
                () if connections.is_empty() => Duration::from_secs(60),
                () if now.duration_since(active_at) < AWAKE => TICK,
                () => DOZE,
            };
            self.changed.wait_for(&mut connections, pause);
            let all = connections.clone();
            drop(connections);
            let (now, wanted) = (Instant::now(), self.house.memory.is_wanted());
            for connection in all {
                if self.look_at(&connection, now, wanted) {
                    active_at = now;
                }
            }
        }
    }

    /// Whether it is at work; `wanted` where others wait for memory.
    fn look_at(&self, connection: &Connection, now: Instant, wanted: bool) -> bool {
        let mut phase = connection.phase.lock();
        match &mut *phase {
            Phase::Handshake(_) => {
                if self.options.handshake_time.is_some_and(|limit| now.duration_since(connection.begun) > limit) {
                    log::debug!("nbd: {}: the handshake takes too long", connection.peer);
                    connection.socket.shutdown();
                }
                false
            }
            Phase::Session { name, session, seen } => {
                let look = session.tick(seen, now);
                let limit = if wanted { STUCK_TIME } else { SILENT_TIME };
                if look.stuck.is_some_and(|since| since > limit) {
                    log::warn!("NBD server: {}: export '{name}': disconnected: it takes no data", connection.peer);
                    // First: under TLS an orderly end may wait for the client.
                    connection.socket.shutdown();
                    session.kill();
                }
                look.active
            }
            Phase::Ended => false,
        }
    }
}

/// What tests ask for.
#[cfg(test)]
impl Server {
    pub(super) fn memory_in_use(&self) -> usize {
        self.shared.house.memory.used()
    }

    /// For how long a client of an export has kept memory without moving.
    pub(super) fn stuck_for(&self, export: &str) -> Option<Duration> {
        let connections = self.shared.connections.lock().clone();
        connections.iter().find_map(|connection| match &*connection.phase.lock() {
            Phase::Session { name, seen, .. } if name == export => seen.stuck_for(Instant::now()),
            _ => None,
        })
    }

    /// A look of the watch as if `later` had passed.
    pub(super) fn watch_as_if_later(&self, later: Duration, wanted: bool) {
        let connections = self.shared.connections.lock().clone();
        for connection in connections {
            // The first look may be the first that sees the newest bytes; the second one sees that it stands still.
            self.shared.look_at(&connection, Instant::now(), wanted);
            self.shared.look_at(&connection, Instant::now(), wanted);
            self.shared.look_at(&connection, Instant::now() + later, wanted);
        }
    }
}
