//! The NBD servers of a daemon: the mount's own (`--nbd`), which serves all disks and views, and that of the commands
//! (`nbd-server-start`), which serves what `block-export-add` names.
//!
//! They share nothing: a backup program that starts and stops its server touches no guest that has its disk from the
//! mount's.

use super::nbd_tls::{TlsMode, TlsPlan};
use super::own_mount::OwnMount;
use crate::error::{Result, errno};
use crate::fleece::{Fleece, Refused};
use crate::nbd::export::Exports;
use crate::nbd::exports::{BitmapName, ExportSpec, ExportTable, MountExports};
use crate::nbd::listen::{Address, Listener};
use crate::nbd::server::{Server, ServerOptions};
use crate::nbd::tls::{Credentials, Store};
use crate::nbd::transport::Tls;
use crate::qmp::Events;
use crate::qmp::exports::{
    ExportBitmap, ExportHost, ExportRequest, ExportRow, ServerAddress, ServerRequest, TlsKind, TlsObject,
};
use parking_lot::Mutex;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// Permissions of Unix sockets: who may connect may write to disks.
const SOCKET_MODE: u32 = 0o600;

/// What `fleecefs mount` was told of NBD.
#[derive(Debug, Clone, Default)]
pub struct NbdPlan {
    /// Where the mount's own server listens; empty: there is none.
    pub addresses: Vec<Address>,
    /// Who has to use TLS.
    pub tls: TlsPlan,
}

impl NbdPlan {
    /// Refuses what is not to be listened on.
    pub fn check(&self) -> Result<()> {
        self.tls.check(&self.addresses)
    }
}

/// Sockets of one server.
pub struct Sockets {
    listeners: Vec<Listener>,
    mode: TlsMode,
    tls: Option<Arc<dyn Tls>>,
}

/// Credentials are read and sockets bound before anything else is done, so that a malformed file or an address in use costs
/// nothing.
pub fn bind(plan: &NbdPlan) -> Result<Vec<Sockets>> {
    plan.check()?;
    let tls = plan.tls.load()?;
    let mut bound: Vec<Sockets> = Vec::new();
    for address in &plan.addresses {
        let mode = plan.tls.mode_of(address)?;
        let listeners = Listener::bind(address, SOCKET_MODE)?;
        match bound.iter_mut().find(|sockets| sockets.mode == mode) {
            Some(sockets) => sockets.listeners.extend(listeners),
            None => {
                let tls = tls.clone().filter(|_| mode != TlsMode::Off);
                bound.push(Sockets { listeners, mode, tls });
            }
        }
    }
    Ok(bound)
}

/// See the module.
pub struct Nbd {
    plan: NbdPlan,
    mountpoint: PathBuf,
    everything: Arc<MountExports>,
    table: Arc<ExportTable>,
    /// One for each way to use TLS.
    own: Mutex<Vec<(TlsMode, Server)>>,
    /// Held for a whole command, so that commands of several connections do not meet.
    asked: Mutex<Option<(TlsMode, Server)>>,
    credentials: Store,
}

impl Nbd {
    /// No server yet.
    pub fn new(plan: NbdPlan, mountpoint: &Path, fleece: &Arc<Fleece>, events: &Arc<Events>) -> Nbd {
        let told = events.clone();
        let gone = move |id: &str| told.emit("BLOCK_EXPORT_DELETED", &json!({ "id": id }));
        Nbd {
            plan,
            mountpoint: mountpoint.to_owned(),
            everything: Arc::new(MountExports::new(fleece.clone())),
            table: Arc::new(ExportTable::new(fleece.clone(), gone)),
            own: Mutex::default(),
            asked: Mutex::new(None),
            credentials: Store::default(),
        }
    }

    /// Begins to serve everything on sockets that are bound.
    pub fn serve(&self, bound: Vec<Sockets>) -> Result<()> {
        for Sockets { listeners, mode, tls } in bound {
            let options = ServerOptions {
                max_connections: 0,
                tls,
                tls_required: mode == TlsMode::Require,
                ..ServerOptions::default()
            };
            self.own.lock().push((mode, Server::on(listeners, self.everything.clone(), options)?));
        }
        Ok(())
    }

    /// Ends all servers. What they are asked for is finished, what comes meanwhile refused.
    pub fn stop(&self) {
        let mut servers = std::mem::take(&mut *self.own.lock());
        servers.extend(self.asked.lock().take());
        servers.iter().for_each(|(_, server)| server.stop());
        self.table.clear();
    }

    /// `nbd` of `status.json`: the servers that listen.
    pub fn status(&self) -> Value {
        let mut all: Vec<Value> =
            self.own.lock().iter().map(|server| server_status("mount", server, &*self.everything)).collect();
        // A command may hold it for as long as clients take to go.
        let asked = self.asked.try_lock();
        let asked = asked.and_then(|server| Some(server_status("qmp", server.as_ref()?, &*self.table)));
        all.extend(asked);
        Value::Array(all)
    }
}

fn server_status(by: &str, (mode, server): &(TlsMode, Server), exports: &dyn Exports) -> Value {
    let addresses: Vec<String> = server.addresses().iter().map(Address::to_string).collect();
    let exports: Vec<Value> = exports
        .list()
        .into_iter()
        .map(|(name, description)| {
            json!({ "name": name, "description": description, "connections": server.connections(&name) })
        })
        .collect();
    json!({ "by": by, "tls": mode.name(), "addresses": addresses, "exports": exports })
}

fn refused(errno: i32, text: impl Into<String>) -> Refused {
    Refused { index: 0, errno, text: text.into(), hint: None }
}

impl Nbd {
    fn address(&self, request: &ServerRequest) -> std::result::Result<Address, Refused> {
        match &request.address {
            ServerAddress::Unix(path) => {
                if !path.is_absolute() {
                    return Err(refused(errno::EINVAL, "Parameter 'addr.data.path' is not an absolute path"));
                }
                OwnMount::served(&self.mountpoint)?.refuse("NBD socket", path)?;
                Ok(Address::Unix(path.clone()))
            }
            ServerAddress::Tcp { host, port } => {
                let address = Address::Tcp { host: host.clone(), port: *port };
                if request.tls_creds.is_none() {
                    let plain = self.plan.tls.without_credentials().mode_of(&address);
                    plain.map_err(|e| e.hint("name tls-creds, or mount with --nbd-tls=off"))?;
                }
                Ok(address)
            }
        }
    }
}

impl ExportHost for Nbd {
    fn start(&self, request: &ServerRequest) -> std::result::Result<(), Refused> {
        let mut server = self.asked.lock();
        if server.is_some() {
            return Err(refused(errno::EBUSY, "NBD server already running"));
        }
        let credentials = |id: &String| {
            let missing = || refused(errno::ENOENT, format!("No TLS credentials with id '{id}'"));
            self.credentials.get(id).ok_or_else(missing)
        };
        let tls = request.tls_creds.as_ref().map(credentials).transpose()?;
        let mode = if tls.is_some() { TlsMode::Require } else { TlsMode::Off };
        let address = self.address(request)?;
        let max_connections = request.max_connections as usize;
        let tls_required = tls.is_some();
        let seconds = u64::from(request.handshake_seconds);
        let handshake_time = (seconds > 0).then(|| Duration::from_secs(seconds));
        let unix_mode = SOCKET_MODE;
        let options = ServerOptions { max_connections, handshake_time, unix_mode, tls, tls_required };
        *server = Some((mode, Server::start(&[address], self.table.clone(), options)?));
        Ok(())
    }

    fn stop(&self) -> std::result::Result<(), Refused> {
        let mut server = self.asked.lock();
        let Some((_, server)) = server.take() else {
            return Err(refused(errno::EINVAL, "NBD server not running"));
        };
        server.stop();
        self.table.clear();
        Ok(())
    }

    fn add(&self, request: &ExportRequest) -> std::result::Result<(), Refused> {
        let server = self.asked.lock();
        let bitmap = |bitmap: &ExportBitmap| match bitmap {
            ExportBitmap::Own(name) => BitmapName::Own(name.clone()),
            ExportBitmap::Of(of) => BitmapName::Of(of.clone()),
        };
        let spec = ExportSpec {
            id: request.id.clone(),
            node: request.node.clone(),
            name: request.name.clone().unwrap_or_else(|| request.node.clone()),
            description: request.description.clone(),
            writable: request.writable,
            downgrade: request.downgrade,
            writethrough: request.writethrough,
            bitmaps: request.bitmaps.iter().map(bitmap).collect(),
            allocation_depth: request.allocation_depth,
        };
        self.table.add(spec, server.is_some())
    }

    fn remove(&self, id: &str, hard: bool) -> std::result::Result<(), Refused> {
        let server = self.asked.lock();
        let name = self.table.remove(id, hard)?;
        if let (true, Some((_, server))) = (hard, server.as_ref()) {
            server.disconnect(&name);
        }
        Ok(())
    }

    fn add_credentials(&self, id: &str, object: &TlsObject) -> std::result::Result<(), Refused> {
        if !object.dir.is_absolute() {
            return Err(refused(errno::EINVAL, "Parameter 'dir' is not an absolute path"));
        }
        OwnMount::served(&self.mountpoint)?.refuse("TLS credentials", &object.dir)?;
        let credentials = match object.kind {
            TlsKind::X509 { verify_peer, check } => Credentials::X509 { dir: object.dir.clone(), verify_peer, check },
            TlsKind::Psk => Credentials::Psk { file: object.dir.join("keys.psk") },
        };
        self.credentials.add(id, &credentials).map_err(|e| match e.errno() {
            errno::EEXIST => {
                let text = format!("attempt to add duplicate property '{id}' to object (type 'container')");
                refused(errno::EEXIST, text)
            }
            _ => e.into(),
        })
    }

    fn remove_credentials(&self, id: &str) -> bool {
        self.credentials.remove(id)
    }

    fn list(&self) -> Vec<ExportRow> {
        let row = |info: crate::nbd::exports::ExportInfo| ExportRow {
            id: info.id,
            node: info.node,
            shutting_down: info.is_ending,
        };
        self.table.infos().into_iter().map(row).collect()
    }
}
