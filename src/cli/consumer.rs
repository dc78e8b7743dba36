//! `fleecefs consumer`: readers of changes and the checkpoints that they last finished.

use super::connect::{Mount, execute, read_reply};
use super::output::{Out, Table};
use super::{Exit, JsonArg};
use crate::error::Result;
use clap::{Args, Subcommand};
use serde::Deserialize;
use serde_json::json;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

/// Commands of `consumer`.
#[derive(Debug, Subcommand)]
pub enum ConsumerCommand {
    /// List consumers
    List(ListArgs),
    /// Point a consumer, new or known, at a checkpoint
    Set(SetArgs),
    /// Forget a consumer
    Delete(DeleteArgs),
}

/// Arguments of `consumer list`.
#[derive(Debug, Args)]
pub struct ListArgs {
    /// The mount
    mnt: PathBuf,
    #[command(flatten)]
    json: JsonArg,
}

/// Arguments of `consumer set`.
#[derive(Debug, Args)]
pub struct SetArgs {
    /// The mount
    mnt: PathBuf,
    /// The consumer
    consumer: String,
    /// The checkpoint
    checkpoint: String,
}

/// Arguments of `consumer delete`.
#[derive(Debug, Args)]
pub struct DeleteArgs {
    /// The mount
    mnt: PathBuf,
    /// The consumer
    consumer: String,
}

/// A consumer as the daemon lists it.
#[derive(Debug, Deserialize)]
pub struct Row {
    /// Its name.
    pub name: String,
    /// The checkpoint's name.
    pub checkpoint: String,
    /// The checkpoint's identity.
    pub uuid: String,
    /// The disks on which it is there.
    pub disks: Vec<String>,
}

impl ConsumerCommand {
    /// Runs the command.
    pub fn run(&self) -> Result<Exit> {
        match self {
            ConsumerCommand::List(args) => args.run()?,
            ConsumerCommand::Set(args) => {
                let arguments = json!({ "name": args.consumer, "checkpoint": args.checkpoint });
                execute(&args.mnt, "fleecefs-consumer-set", arguments)?;
            }
            ConsumerCommand::Delete(args) => {
                execute(&args.mnt, "fleecefs-consumer-delete", json!({ "name": args.consumer }))?;
            }
        }
        Ok(Exit::Done)
    }
}

/// How long the daemon may take to let go of a lock.
const UNLOCK_LIMIT: Duration = Duration::from_secs(5);

/// A consumer is at work: nobody else begins to work for it as long as this value lives, and this process.
#[derive(Debug)]
pub struct ConsumerLock {
    connection: UnixStream,
    ended: Arc<AtomicBool>,
    closed: Receiver<()>,
}

impl Drop for ConsumerLock {
    /// Returns when the daemon has let go: who comes next must not be refused.
    fn drop(&mut self) {
        if self.connection.shutdown(Shutdown::Write).is_ok() {
            let _ = self.closed.recv_timeout(UNLOCK_LIMIT);
        }
    }
}

impl ConsumerLock {
    /// EBUSY where somebody works for that consumer already.
    pub fn take(mount: &Mount, consumer: &str) -> Result<ConsumerLock> {
        let mut client = mount.client()?;
        client.execute("fleecefs-consumer-lock", json!({ "name": consumer }))?;
        let ended = Arc::new(AtomicBool::new(false));
        let (told, connection) = (ended.clone(), client.handle()?);
        let (closing, closed) = channel();
        // The lock is the connection's. Who does not read its events loses it.
        std::thread::spawn(move || {
            let _ = client.wait_event("FLEECEFS_CLOSED");
            told.store(true, Ordering::SeqCst);
            let _ = closing.send(());
        });
        Ok(ConsumerLock { connection, ended, closed })
    }

    /// Whether the daemon has ended since; another one may serve the mount by now.
    pub fn daemon_ended(&self) -> bool {
        self.ended.load(Ordering::SeqCst)
    }
}

impl ListArgs {
    fn run(&self) -> Result<()> {
        let reply = execute(&self.mnt, "fleecefs-consumer-list", json!({}))?;
        let mut out = Out::new();
        if self.json.json {
            return out.json(&reply);
        }
        table(&read_reply::<Vec<Row>>(&reply)?).print(&mut out)
    }
}

/// One line a consumer.
pub fn table(rows: &[Row]) -> Table {
    let mut table = Table::new(&["CONSUMER", "CHECKPOINT", "DISKS"]);
    for row in rows {
        table.row([row.name.clone(), row.checkpoint.clone(), row.disks.join(" ")]);
    }
    table
}
