//! The control thread: snapshots are taken and dropped here, in order, and never in a FUSE worker.
//!
//! Who waits for whom, and why nothing goes round in a circle:
//! - Before a snapshot the kernel writes back what is dirty in shared mappings of the live files. That needs workers,
//!   so no worker waits for the control thread: mkdir and rmdir below `snapshots/` are handed over and answered from
//!   here.
//! - The write-back looks the live file up, and so waits for whoever holds the lock of `live/` or of the root. Hence
//!   what would make or remove something there is refused in the worker, at once, and never queued here.
//! - During mkdir and rmdir the kernel holds the lock of `snapshots/`; nothing here looks a name up in it or notifies
//!   the kernel of one. Names below it are not cached at all.
//! - During truncate the kernel keeps the write-back of that file until truncate is answered. Were truncate queued
//!   behind a snapshot, each would wait for the other. So it has a thread of its own (in the adapter) and waits for
//!   nothing but the core.
//! - A killed process must not wait for its own answer: see [`crate::storage::writeback`].

use super::adapter::caught;
use super::attr::Attr;
use super::inodes::Inode;
use super::node::Node;
use super::tree::Tree;
use crate::error::{Error, Result, errno};
use crate::fleece::{Action, Applied, Refused, Snapshot, SnapshotRequest};
use parking_lot::Mutex;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle, ThreadId};
use std::time::Duration;

/// How often the maps of snapshots that are gone are looked for.
const TIDY_INTERVAL: Duration = Duration::from_secs(5);

/// Work for the control thread.
pub type Job = Box<dyn FnOnce() + Send>;

/// What the kernel does for us. Neither may be asked for by a FUSE worker.
pub trait Kernel: Send + Sync {
    /// Returns when what was dirty in shared mappings of the disk's live file has arrived as writes.
    fn write_back(&self, disk: &str) -> Result<()>;
    /// Has the attributes of an inode asked for again. Touches no page.
    fn attributes_changed(&self, ino: u64) -> Result<()>;
}

/// The handle of the control thread, for the mount and for the control socket.
pub struct Control {
    tree: Arc<Tree>,
    /// `None` once stopped.
    jobs: Mutex<Option<Sender<Job>>>,
    thread: Mutex<Option<JoinHandle<()>>>,
    thread_id: ThreadId,
    kernel: OnceLock<Box<dyn Kernel>>,
}

fn going_away() -> Error {
    Error::new(errno::ENODEV, "control", "the mount is going away")
}

impl Control {
    /// Starts the thread.
    pub fn start(tree: Arc<Tree>) -> Result<Arc<Control>> {
        let (sender, receiver) = channel();
        let thread = {
            let tree = tree.clone();
            thread::Builder::new().name("control".to_owned()).spawn(move || serve(&tree, &receiver))
        };
        let thread = thread.map_err(|e| Error::io("start the control thread", e))?;
        Ok(Arc::new(Control {
            tree,
            jobs: Mutex::new(Some(sender)),
            thread_id: thread.thread().id(),
            thread: Mutex::new(Some(thread)),
            kernel: OnceLock::new(),
        }))
    }

    /// Connects the kernel; until then it is asked for nothing.
    pub fn connect(&self, kernel: Box<dyn Kernel>) {
        // A second connection would be a second session over one tree: the first stays.
        let _ = self.kernel.set(kernel);
    }

    /// Runs a job on the control thread; nobody waits for it. A job that comes after the stop is dropped.
    pub fn run(&self, job: Job) {
        if let Some(jobs) = &*self.jobs.lock() {
            // Fails only when the thread has gone, and then the job is dropped like any other after the stop.
            let _ = jobs.send(job);
        }
    }

    /// Takes a snapshot, after the kernel wrote back what is dirty in shared mappings of the live files. Not for a
    /// FUSE worker.
    pub fn create_snapshot(self: &Arc<Self>, request: &SnapshotRequest) -> Result<Arc<Snapshot>> {
        let request = request.clone();
        self.on_thread(move |control| control.freeze(&request)).unwrap_or_else(|| Err(going_away()))
    }

    /// Makes changes of bitmaps and snapshots at one instant; where there is a snapshot among them, as
    /// [`Control::create_snapshot`] does. Not for a FUSE worker.
    pub fn apply(self: &Arc<Self>, actions: &[Action]) -> std::result::Result<Applied, Refused> {
        let freezes = |action: &Action| matches!(action, Action::Snapshot(_) | Action::Freeze { .. });
        if !actions.iter().any(freezes) {
            return self.tree.fleece.apply(actions);
        }
        let actions = actions.to_vec();
        let applied = self.on_thread(move |control| {
            for action in &actions {
                match action {
                    Action::Snapshot(request) => control.write_back(request),
                    Action::Freeze { disk, .. } => {
                        let (name, disks) = ("of a job".to_owned(), vec![disk.clone()]);
                        control.write_back(&SnapshotRequest { name, disks, ..SnapshotRequest::default() });
                    }
                    _ => (),
                }
            }
            control.tree.fleece.apply(&actions)
        });
        applied.unwrap_or_else(|| Err(going_away().into()))
    }

    /// Runs something on the control thread and waits for it; `None` where that has ended.
    fn on_thread<T: Send + 'static>(self: &Arc<Self>, run: impl FnOnce(&Control) -> T + Send + 'static) -> Option<T> {
        if thread::current().id() == self.thread_id {
            return Some(run(self));
        }
        let (sender, receiver) = channel();
        let control = self.clone();
        self.run(Box::new(move || {
            // The caller waits below: it cannot have gone.
            let _ = sender.send(run(&control));
        }));
        receiver.recv().ok()
    }

    /// Resizes a disk and has the kernel ask for its new size. Not for a FUSE worker.
    pub fn resize_disk(&self, name: &str, size: u64) -> Result<()> {
        let disk = self.tree.fleece.disk(name)?;
        self.tree.fleece.resize_disk(name, size)?;
        if let Some(kernel) = self.kernel.get()
            && let Err(e) = kernel.attributes_changed(Node::Live(disk.uuid()).ino())
        {
            log::debug!("disk '{name}': {e}");
        }
        Ok(())
    }

    /// mkdir(2) in `snapshots/`; on the control thread.
    pub fn mkdir(&self, name: &str) -> Result<Attr> {
        let snapshot = self.freeze(&SnapshotRequest { name: name.to_owned(), ..SnapshotRequest::default() })?;
        self.tree.enter(Node::Snapshot(snapshot.uuid()))
    }

    /// rmdir(2) in `snapshots/`; on the control thread. That the directory has entries is no obstacle: nobody put them
    /// there.
    pub fn rmdir(&self, parent: &Inode, name: &str) -> Result<()> {
        match self.tree.find(parent, name)? {
            Node::Snapshot(_) => self.tree.fleece.complete_snapshot(name, None),
            _ => Err(Error::new(errno::ENOTDIR, name, "not a directory")),
        }
    }

    /// Ends the thread after the jobs that it has.
    pub fn stop(&self) {
        *self.jobs.lock() = None;
        if thread::current().id() != self.thread_id
            && let Some(thread) = self.thread.lock().take()
            && thread.join().is_err()
        {
            log::error!("the control thread panicked");
        }
    }

    fn freeze(&self, request: &SnapshotRequest) -> Result<Arc<Snapshot>> {
        self.write_back(request);
        self.tree.fleece.create_snapshot(request)
    }

    /// Has the kernel write back what is dirty in shared mappings of the disks that are about to be frozen.
    fn write_back(&self, request: &SnapshotRequest) {
        if let Some(kernel) = self.kernel.get() {
            let disks = self.tree.fleece.disks();
            let wanted = |name: &str| request.disks.is_empty() || request.disks.iter().any(|disk| disk == name);
            for disk in disks.iter().filter(|disk| wanted(disk.name())) {
                // The promise is msync's; this is on top of it.
                if let Err(e) = kernel.write_back(disk.name()) {
                    log::info!("snapshot '{}' has synced stores of mappings only: {e}", request.name);
                }
            }
        }
    }
}

fn serve(tree: &Tree, jobs: &Receiver<Job>) {
    loop {
        match jobs.recv_timeout(TIDY_INTERVAL) {
            Ok(job) => caught("control", job),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
        if tree.keeps_maps() {
            tree.tidy();
        }
    }
}
