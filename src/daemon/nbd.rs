//! The NBD servers of a daemon: the mount's own (`--nbd`), which serves all disks and views, and that of the commands
//! (`nbd-server-start`), which serves what `block-export-add` names.
//!
//! They share nothing: a backup program that starts and stops its server touches no guest that has its disk from the
//! mount's.

use super::own_mount::OwnMount;
use crate::error::{Error, Result, errno};
use crate::fleece::{Fleece, Refused};
use crate::nbd::export::Exports;
use crate::nbd::exports::{BitmapName, ExportSpec, ExportTable, MountExports};
use crate::nbd::listen::{Address, Listener};
use crate::nbd::server::{Server, ServerOptions};
use crate::qmp::Events;
use crate::qmp::exports::{ExportBitmap, ExportHost, ExportRequest, ExportRow, ServerAddress, ServerRequest};
use parking_lot::Mutex;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Permissions of Unix sockets: who may connect may write to disks.
const SOCKET_MODE: u32 = 0o600;

/// What `fleecefs mount` was told of NBD.
#[derive(Debug, Clone, Default)]
pub struct NbdPlan {
    /// Where the mount's own server listens; empty: there is none.
    pub addresses: Vec<Address>,
    /// TCP may go without TLS.
    pub plain_tcp: bool,
}

impl NbdPlan {
    /// Refuses what is not to be listened on.
    pub fn check(&self) -> Result<()> {
        self.addresses.iter().try_for_each(|address| self.check_plain(address))
    }

    fn check_plain(&self, address: &Address) -> Result<()> {
        match address {
            Address::Tcp { .. } if !self.plain_tcp => {
                Err(Error::new(errno::EPERM, format!("NBD server on {address}"), "TCP needs TLS")
                    .hint("give credentials, or --nbd-tls=off where everybody who can connect may read and write"))
            }
            _ => Ok(()),
        }
    }
}

/// Sockets that are bound before anything else is done, so that an address in use costs nothing.
pub fn bind(plan: &NbdPlan) -> Result<Vec<Listener>> {
    plan.check()?;
    let mut listeners = Vec::new();
    for address in &plan.addresses {
        listeners.extend(Listener::bind(address, SOCKET_MODE)?);
    }
    Ok(listeners)
}

/// See the module.
pub struct Nbd {
    plan: NbdPlan,
    mountpoint: PathBuf,
    everything: Arc<MountExports>,
    table: Arc<ExportTable>,
    own: Mutex<Option<Server>>,
    /// Held for a whole command, so that commands of several connections do not meet.
    asked: Mutex<Option<Server>>,
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
            own: Mutex::new(None),
            asked: Mutex::new(None),
        }
    }

    /// Begins to serve everything on sockets that are bound.
    pub fn serve(&self, listeners: Vec<Listener>) -> Result<()> {
        if listeners.is_empty() {
            return Ok(());
        }
        let options = ServerOptions { max_connections: 0, ..ServerOptions::default() };
        *self.own.lock() = Some(Server::on(listeners, self.everything.clone(), options)?);
        Ok(())
    }

    /// Ends all servers. What they are asked for is finished, what comes meanwhile refused.
    pub fn stop(&self) {
        let servers = [self.own.lock().take(), self.asked.lock().take()];
        servers.into_iter().flatten().for_each(|server| server.stop());
        self.table.clear();
    }

    /// `nbd` of `status.json`: the servers that listen.
    pub fn status(&self) -> Value {
        let own = self.own.lock().as_ref().map(|server| server_status("mount", server, &*self.everything));
        // A command may hold it for as long as clients take to go.
        let asked = self.asked.try_lock();
        let asked = asked.and_then(|server| Some(server_status("qmp", server.as_ref()?, &*self.table)));
        [own, asked].into_iter().flatten().collect()
    }
}

fn server_status(by: &str, server: &Server, exports: &dyn Exports) -> Value {
    let addresses: Vec<String> = server.addresses().iter().map(Address::to_string).collect();
    let exports: Vec<Value> = exports
        .list()
        .into_iter()
        .map(|(name, description)| {
            json!({ "name": name, "description": description, "connections": server.connections(&name) })
        })
        .collect();
    json!({ "by": by, "addresses": addresses, "exports": exports })
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
                self.plan.check_plain(&address)?;
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
        if let Some(id) = &request.tls_creds {
            return Err(refused(errno::ENOENT, format!("No TLS credentials with id '{id}'")));
        }
        let address = self.address(request)?;
        let max_connections = request.max_connections as usize;
        let options = ServerOptions { max_connections, unix_mode: SOCKET_MODE, ..ServerOptions::default() };
        *server = Some(Server::start(&[address], self.table.clone(), options)?);
        Ok(())
    }

    fn stop(&self) -> std::result::Result<(), Refused> {
        let mut server = self.asked.lock();
        let Some(server) = server.take() else {
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
        if let (true, Some(server)) = (hard, server.as_ref()) {
            server.disconnect(&name);
        }
        Ok(())
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
