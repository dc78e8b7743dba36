//! The demo's guest: a thread that writes random 4 KiB blocks to the live disk and never pauses. As most guests do, it
//! writes some places again and again and leaves others alone.

use super::disk::{GUEST_BYTES, GUEST_OFFSET, Random};
use crate::error::{Error, Result, errno};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Instant;

const BLOCK_BYTES: u64 = 4096;
/// Of every so many bytes the guest writes the first [`BUSY_BYTES`].
const STRIDE_BYTES: u64 = 512 << 10;
const BUSY_BYTES: u64 = 64 << 10;

/// What the guest has done so far.
#[derive(Debug, Default)]
struct Tally {
    writes: AtomicU64,
    slowest_us: AtomicU64,
    stop: AtomicBool,
}

/// A running guest. Dropping it stops it.
#[derive(Debug)]
pub struct Guest {
    tally: Arc<Tally>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Guest {
    /// Opens the live disk and starts to write.
    pub fn start(live: &Path) -> Result<Guest> {
        let file = File::options().read(true).write(true).open(live).map_err(|e| Error::io("open", e).at_path(live))?;
        let tally = Arc::new(Tally::default());
        let thread = std::thread::Builder::new()
            .name("guest".into())
            .spawn({
                let tally = tally.clone();
                let live = live.to_owned();
                move || write_blocks(&file, &tally).map_err(|e| e.at_path(live))
            })
            .map_err(|e| Error::io("start a thread", e))?;
        Ok(Guest { tally, thread: Some(thread) })
    }

    /// Count of blocks written so far.
    pub fn writes(&self) -> u64 {
        self.tally.writes.load(Ordering::Relaxed)
    }

    /// The longest that a write took since this was last asked, in microseconds.
    pub fn take_slowest_us(&self) -> u64 {
        self.tally.slowest_us.swap(0, Ordering::Relaxed)
    }

    /// Stops; fails where a write did.
    pub fn stop(mut self) -> Result<u64> {
        self.end()?;
        Ok(self.writes())
    }

    fn end(&mut self) -> Result<()> {
        self.tally.stop.store(true, Ordering::Relaxed);
        match self.thread.take().map(JoinHandle::join) {
            Some(Err(_)) => Err(Error::new(errno::EIO, "guest", "its thread has died")),
            Some(Ok(outcome)) => outcome,
            None => Ok(()),
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // Whoever wants to know calls `stop`.
        let _ = self.end();
    }
}

fn write_blocks(file: &File, tally: &Tally) -> Result<()> {
    let mut random = Random::new();
    let mut block = [0; BLOCK_BYTES as usize];
    while !tally.stop.load(Ordering::Relaxed) {
        random.fill(&mut block);
        let place = random.next() % (GUEST_BYTES / STRIDE_BYTES) * STRIDE_BYTES;
        let offset = GUEST_OFFSET + place + random.next() % (BUSY_BYTES / BLOCK_BYTES) * BLOCK_BYTES;
        let start = Instant::now();
        file.write_all_at(&block, offset).map_err(|e| Error::io("guest's write", e).at_offset(offset))?;
        let us = u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX);
        tally.slowest_us.fetch_max(us, Ordering::Relaxed);
        tally.writes.fetch_add(1, Ordering::Relaxed);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_writes_its_part_of_the_disk_only() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("d");
        let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        file.set_len(GUEST_OFFSET + GUEST_BYTES).unwrap();
        let guest = Guest::start(&path).unwrap();
        while guest.writes() < 10 {
            std::thread::yield_now();
        }
        assert!(guest.stop().unwrap() >= 10);
        assert_eq!(file.metadata().unwrap().len(), GUEST_OFFSET + GUEST_BYTES);
        let mut head = vec![0; GUEST_OFFSET as usize];
        file.read_exact_at(&mut head, 0).unwrap();
        assert!(head.iter().all(|&b| b == 0));
    }

    #[test]
    fn a_guest_without_a_disk_says_so() {
        assert_eq!(Guest::start(Path::new("/no/disk")).unwrap_err().errno(), errno::ENOENT);
    }
}
