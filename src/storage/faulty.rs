//! Storage that fails, or hangs, when a test says so.

use super::{BlockStatus, SharedStorage, Stamp, Storage};
use crate::error::{Error, Result};
use parking_lot::{Condvar, Mutex};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

/// Kinds of calls that can fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Call {
    /// `read_at`.
    Read,
    /// `write_at`.
    Write,
    /// `sync` of a file.
    Sync,
    /// `set_len`.
    SetLen,
    /// `punch_hole`.
    Punch,
    /// `write_zeroes`.
    Zero,
    /// `block_status`.
    Status,
    /// What changes a directory, or syncs it.
    Directory,
    /// `set_attribute`.
    Attribute,
}

/// Which calls fail, and how; shared by any number of files. A call that fails changes nothing.
#[derive(Debug, Default)]
pub struct FaultPlan {
    state: Mutex<State>,
    released: Condvar,
}

#[derive(Debug, Default)]
struct State {
    calls: BTreeMap<Call, u64>,
    faults: Vec<Fault>,
    stalled: BTreeSet<Call>,
}

#[derive(Debug)]
struct Fault {
    call: Call,
    when: When,
    errno: i32,
}

#[derive(Debug)]
enum When {
    /// At the call of this number since the start.
    Nth(u64),
    /// At every call that touches these bytes.
    Overlap(Range<u64>),
    Always,
}

impl FaultPlan {
    /// A plan by which nothing fails.
    pub fn new() -> Self {
        Self::default()
    }

    /// Fails the `n`-th call of a kind (the first is 1) from when the plan was made or last cleared, and only that one.
    pub fn fail_nth(&self, call: Call, n: u64, errno: i32) {
        self.add(call, When::Nth(n), errno);
    }

    /// Fails every call of a kind that touches a byte of `range`.
    pub fn fail_range(&self, call: Call, range: Range<u64>, errno: i32) {
        self.add(call, When::Overlap(range), errno);
    }

    /// Fails every call of a kind.
    pub fn fail_all(&self, call: Call, errno: i32) {
        self.add(call, When::Always, errno);
    }

    fn add(&self, call: Call, when: When, errno: i32) {
        self.state.lock().faults.push(Fault { call, when, errno });
    }

    /// Forgets all faults and counts from 0 again. What is stalled stays so.
    pub fn clear(&self) {
        let mut state = self.state.lock();
        state.faults.clear();
        state.calls.clear();
    }

    /// From now on calls of a kind block (as calls to a dead disk do) until [`FaultPlan::release`].
    pub fn stall(&self, call: Call) {
        self.state.lock().stalled.insert(call);
    }

    /// Lets the blocked calls of a kind go on, and no more block.
    pub fn release(&self, call: Call) {
        self.state.lock().stalled.remove(&call);
        self.released.notify_all();
    }

    /// Calls of a kind so far, the failed and the blocked ones too.
    pub fn calls(&self, call: Call) -> u64 {
        self.state.lock().calls.get(&call).copied().unwrap_or(0)
    }

    /// Counts a call, blocks it while its kind is stalled, then lets it pass or fails it.
    pub(super) fn pass(&self, call: Call, range: Range<u64>, path: &Path) -> Result<()> {
        let mut state = self.state.lock();
        let count = state.calls.entry(call).or_insert(0);
        *count += 1;
        let nth = *count;
        while state.stalled.contains(&call) {
            self.released.wait(&mut state);
        }
        let hit = state.faults.iter().find(|fault| {
            fault.call == call
                && match &fault.when {
                    When::Nth(n) => *n == nth,
                    When::Overlap(bad) => bad.start < range.end && range.start < bad.end,
                    When::Always => true,
                }
        });
        match hit {
            Some(fault) => Err(Error::io(format!("{call:?}"), io::Error::from_raw_os_error(fault.errno))
                .at_path(path)
                .at_offset(range.start)),
            None => Ok(()),
        }
    }
}

/// A storage whose calls fail as a plan says.
#[derive(Debug, Clone)]
pub struct Faulty {
    /// What does the work of the calls that pass.
    pub inner: SharedStorage,
    /// Which ones don't.
    pub plan: Arc<FaultPlan>,
}

impl Faulty {
    fn pass(&self, call: Call, offset: u64, len: u64) -> Result<()> {
        self.plan.pass(call, offset..offset.saturating_add(len), self.inner.path())
    }
}

impl Storage for Faulty {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.pass(Call::Read, offset, buf.len() as u64)?;
        self.inner.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.pass(Call::Write, offset, buf.len() as u64)?;
        self.inner.write_at(buf, offset)
    }

    fn sync(&self) -> Result<()> {
        self.pass(Call::Sync, 0, 0)?;
        self.inner.sync()
    }

    fn sync_all(&self) -> Result<()> {
        self.pass(Call::Sync, 0, 0)?;
        self.inner.sync_all()
    }

    fn len(&self) -> Result<u64> {
        self.inner.len()
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.pass(Call::SetLen, len, 0)?;
        self.inner.set_len(len)
    }

    fn punch_hole(&self, offset: u64, len: u64) -> Result<()> {
        self.pass(Call::Punch, offset, len)?;
        self.inner.punch_hole(offset, len)
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        self.pass(Call::Zero, offset, len)?;
        self.inner.write_zeroes(offset, len)
    }

    fn block_status(&self, offset: u64, len: u64) -> Result<BlockStatus> {
        self.pass(Call::Status, offset, len)?;
        self.inner.block_status(offset, len)
    }

    fn stamp(&self) -> Result<Stamp> {
        self.inner.stamp()
    }

    fn attribute(&self, name: &str) -> Result<Option<Vec<u8>>> {
        self.inner.attribute(name)
    }

    fn set_attribute(&self, name: &str, value: Option<&[u8]>) -> Result<()> {
        self.pass(Call::Attribute, 0, 0)?;
        self.inner.set_attribute(name, value)
    }

    fn alignment(&self) -> u64 {
        self.inner.alignment()
    }

    fn path(&self) -> &Path {
        self.inner.path()
    }
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests {
    use super::*;
    use crate::error::errno;
    use crate::storage::MemFile;

    fn faulty() -> (MemFile, Arc<FaultPlan>, Faulty) {
        let file = MemFile::new("f", 1 << 20);
        let plan = Arc::new(FaultPlan::new());
        let faulty = Faulty { inner: file.shared(), plan: plan.clone() };
        (file, plan, faulty)
    }

    #[test]
    fn the_nth_call_of_a_kind_fails_once_and_changes_nothing() {
        let (file, plan, faulty) = faulty();
        plan.fail_nth(Call::Write, 2, errno::ENOSPC);
        faulty.write_at(b"a", 0).unwrap();
        faulty.sync().unwrap();
        let e = faulty.write_at(b"b", 0).unwrap_err();
        assert_eq!(e.errno(), errno::ENOSPC);
        assert!(e.to_string().contains("f at offset 0"), "{e}");
        let mut buf = [0];
        file.read_at(&mut buf, 0).unwrap();
        assert_eq!(&buf, b"a");
        faulty.write_at(b"c", 0).unwrap();
        assert_eq!((plan.calls(Call::Write), plan.calls(Call::Sync)), (3, 1));
        plan.clear();
        assert_eq!(plan.calls(Call::Write), 0);
    }

    #[test]
    fn bad_ranges_fail_for_ever_and_neighbours_do_not() {
        let (_, plan, faulty) = faulty();
        plan.fail_range(Call::Read, 512..1024, errno::EIO);
        for (offset, len, good) in
            [(0, 512, true), (0, 513, false), (1023, 1, false), (1024, 9, true), (0, 4096, false)]
        {
            assert_eq!(faulty.read_at(&mut vec![0; len], offset).is_ok(), good, "{offset} {len}");
        }
        faulty.write_at(&[0; 4096], 0).unwrap();
        plan.clear();
        faulty.read_at(&mut [0; 4096], 0).unwrap();
    }

    #[test]
    fn every_kind_of_call_can_fail() {
        let (_, plan, faulty) = faulty();
        for call in [Call::Read, Call::Write, Call::Sync, Call::SetLen, Call::Punch, Call::Zero, Call::Status] {
            plan.fail_all(call, errno::EIO);
            let results = [
                (Call::Read, faulty.read_at(&mut [0], 0)),
                (Call::Write, faulty.write_at(&[0], 0)),
                (Call::Sync, faulty.sync()),
                (Call::SetLen, faulty.set_len(5)),
                (Call::Punch, faulty.punch_hole(0, 1)),
                (Call::Zero, faulty.write_zeroes(0, 1)),
                (Call::Status, faulty.block_status(0, 1).map(|_| ())),
            ];
            for (kind, result) in results {
                assert_eq!(result.is_err(), kind == call, "{kind:?}");
            }
            plan.clear();
        }
    }

    #[test]
    fn a_stalled_call_blocks_until_it_is_released() {
        let (file, plan, faulty) = faulty();
        plan.stall(Call::Write);
        let writer = std::thread::spawn(move || faulty.write_at(b"x", 0));
        while plan.calls(Call::Write) == 0 {
            std::thread::yield_now();
        }
        assert!(!writer.is_finished());
        let mut buf = [0];
        file.read_at(&mut buf, 0).unwrap();
        assert_eq!(buf, [0]);
        plan.release(Call::Write);
        writer.join().unwrap().unwrap();
        file.read_at(&mut buf, 0).unwrap();
        assert_eq!(&buf, b"x");
    }
}
