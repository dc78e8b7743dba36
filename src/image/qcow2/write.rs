//! Changes of guest data: writes, zeros, discards.
//!
//! Data in a cluster that is referred to once are overwritten in place, without a lock; the mapping stays. Everything
//! else is a *change*: it holds the range lock of its clusters from the look at their entries to the new ones, makes a
//! [`Plan`] for each cluster, and carries the plans out together:
//!
//! 1. allocate; 2. old bytes around the new ones, then the new ones, to the host clusters; 3. sync, where it must be;
//! 4. L2 entries; 5. old clusters freed, discarded ones punched.
//!
//! Invariants:
//! - **An entry on disk never shows what the guest did not have there.** Until new bytes are durable, the host bytes of
//!   what a new entry shows read as the guest's did before; else they are synced first (step 3). Old and new alike are
//!   zeros where the guest had zeros and the host cluster is fresh or a durable hole: then nothing is synced.
//! - **Disjoint writes lose nothing of each other.** Bytes that a request does not own are written only to (sub)clusters
//!   that no entry shows yet, with the range lock held; who writes in place writes its own bytes alone.
//! - **Host clusters of data do not move** while an entry says that they are referred to once, so a reader or a writer
//!   in place that looked at the entry before a change meets bytes of the same guest cluster.
//! - **A cluster whose entry may be on disk is not handed out again**: where writing an entry fails, its cluster leaks.

use super::Qcow2Image;
use super::mapping::RawEntry;
use super::range_lock::RangeLock;
use super::session::{Clusters, Session};
use super::tables::{COPIED, CompressedAt, Geometry, HostOffset, L1Entry, L2Entry, ZERO, decode_l2};
use crate::error::Result;
use crate::image::Image;
use crate::storage::buffer::with_scratch;
use crate::storage::{BlockStatus, Storage};
use crate::units::round_down;
use parking_lot::Mutex;
use std::ops::Range;

/// Most bytes that are copied at once.
const COPY_BYTES: u64 = 1 << 20;

/// What makes an image writable. Lock order: resizing, range lock, session.
#[derive(Debug)]
pub(super) struct Writer {
    /// Held by who changes the size.
    pub resizing: Mutex<()>,
    /// Guest clusters whose entries change.
    pub ranges: RangeLock,
    pub session: Mutex<Session>,
}

impl Writer {
    /// With a session that has not changed anything yet.
    pub fn new(session: Session) -> Writer {
        Writer { resizing: Mutex::new(()), ranges: RangeLock::default(), session: Mutex::new(session) }
    }
}

/// What a request puts into its range.
#[derive(Debug, Clone, Copy)]
pub(super) enum Content<'a> {
    Data(&'a [u8]),
    Zeros { discard: bool },
}

/// Where a plan's bytes go.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Host {
    /// Nowhere: only the entry changes.
    None,
    /// To the cluster that is there.
    At(HostOffset),
    /// To a cluster that is to be allocated.
    Wanted,
    /// To an allocated cluster; fresh or not.
    New(HostOffset, bool),
}

/// What an entry no longer refers to.
#[derive(Debug, Clone, Copy)]
enum Old {
    Nothing,
    Cluster(HostOffset),
    Compressed(CompressedAt),
}

/// What a request does to one cluster.
#[derive(Debug)]
struct Plan {
    /// The cluster's guest offset.
    guest: u64,
    /// What the request covers of it.
    part: Range<u64>,
    host: Host,
    /// (Sub)clusters that the new entry shows and the old one did not show at this host cluster.
    fill: u32,
    /// The entry afterwards; a host cluster to be allocated is put in later.
    entry: RawEntry,
    changed: bool,
    /// What the request brings is written to the host cluster.
    put: bool,
    /// Punched once the entry is written.
    punch: bool,
    old: Old,
}

impl Plan {
    fn nothing(guest: u64, part: Range<u64>, entry: RawEntry) -> Plan {
        let (host, old) = (Host::None, Old::Nothing);
        Plan { guest, part, host, fill: 0, entry, changed: false, put: false, punch: false, old }
    }

    /// Where a guest offset of the cluster lies in the host file.
    fn host_of(&self, offset: u64) -> Option<HostOffset> {
        match self.host {
            Host::At(host) | Host::New(host, _) => Some(HostOffset(host.0 + (offset - self.guest))),
            Host::None | Host::Wanted => None,
        }
    }
}

/// An entry taken apart, the same for clusters with and without subclusters: without, the cluster is its only one.
#[derive(Debug, Clone, Copy)]
struct Parts {
    host: Option<(HostOffset, bool)>,
    compressed: Option<CompressedAt>,
    /// Data in the host cluster.
    allocated: u32,
    zero: u32,
}

impl Parts {
    fn of(entry: L2Entry) -> Parts {
        let none = Parts { host: None, compressed: None, allocated: 0, zero: 0 };
        match entry {
            L2Entry::Unallocated => none,
            L2Entry::ZeroPlain => Parts { zero: 1, ..none },
            L2Entry::ZeroPreallocated { offset, copied } => Parts { host: Some((offset, copied)), zero: 1, ..none },
            L2Entry::Standard { offset, copied } => Parts { host: Some((offset, copied)), allocated: 1, ..none },
            L2Entry::Compressed(at) => Parts { compressed: Some(at), ..none },
            L2Entry::Subclusters { offset, copied, allocated, zero } => {
                Parts { host: offset.map(|offset| (offset, copied)), allocated, zero, ..none }
            }
        }
    }

    /// The entry that says this, without the host cluster where there is none yet.
    fn encode(&self, geometry: &Geometry) -> RawEntry {
        let host = self.host.map_or(0, |(host, copied)| host.0 | if copied { COPIED } else { 0 });
        if geometry.extended_l2 {
            return (host, u64::from(self.allocated) | u64::from(self.zero) << 32);
        }
        (host | if self.zero != 0 { ZERO } else { 0 }, 0)
    }
}

/// The bits of the (sub)clusters that a range touches.
fn units(geometry: &Geometry, guest: u64, range: &Range<u64>) -> u32 {
    let size = geometry.subcluster_size();
    let first = (range.start - guest) / size;
    let last = (range.end - 1 - guest) / size;
    ((1u64 << (last + 1)) - (1u64 << first)) as u32
}

/// The runs of set bits.
fn runs(mut bits: u32) -> impl Iterator<Item = Range<u32>> {
    std::iter::from_fn(move || {
        let first = (bits != 0).then(|| bits.trailing_zeros())?;
        let end = first + (bits >> first).trailing_ones();
        bits &= !(((1u64 << end) - 1) as u32);
        Some(first..end)
    })
}

impl Qcow2Image {
    /// Writes `buf`, in place as far as that goes.
    pub(super) fn write(&self, writer: &Writer, buf: &[u8], offset: u64) -> Result<()> {
        let end = offset + buf.len() as u64;
        let mut at = offset;
        while at < end {
            let rest = &buf[(at - offset) as usize..];
            at += match self.mapping.own_run(&self.file, self.data(), at, end - at)? {
                Some((host, len)) => {
                    self.data().write_at(&rest[..len as usize], host.0)?;
                    len
                }
                None => {
                    let stop = self.stop_of_change(at, end)?;
                    let len = stop - at;
                    self.change(writer, at..stop, Content::Data(&rest[..len as usize]))?;
                    len
                }
            };
        }
        Ok(())
    }

    /// Where a change that begins at `at` ends: with its slice, or before a cluster that is written in place.
    fn stop_of_change(&self, at: u64, end: u64) -> Result<u64> {
        let cluster_size = self.header.cluster_size();
        let end = end.min(round_down(at, self.mapping.slice_covers()) + self.mapping.slice_covers());
        let mut stop = round_down(at, cluster_size) + cluster_size;
        while stop < end && self.mapping.own_run(&self.file, self.data(), stop, 1)?.is_none() {
            stop += cluster_size;
        }
        Ok(stop.min(end))
    }

    /// Makes a range read as zeros: whole (sub)clusters by their entries, parts by writing.
    pub(super) fn zero(&self, writer: &Writer, range: Range<u64>, discard: bool) -> Result<()> {
        let unit = self.header.geometry().subcluster_size();
        let is_end = |at: u64| at >= self.size();
        let mut at = range.start;
        while at < range.end {
            let slice_end = round_down(at, self.mapping.slice_covers()) + self.mapping.slice_covers();
            let next_unit = round_down(at, unit) + unit;
            let whole_end = if is_end(range.end) { range.end } else { round_down(range.end, unit) };
            let stop = if at.is_multiple_of(unit) && whole_end > at {
                whole_end.min(slice_end)
            } else {
                range.end.min(next_unit)
            };
            self.change(writer, at..stop, Content::Zeros { discard })?;
            at = stop;
        }
        Ok(())
    }

    /// Changes a range within one slice. Zeros cover whole (sub)clusters or lie in one.
    fn change(&self, writer: &Writer, range: Range<u64>, content: Content<'_>) -> Result<()> {
        let cluster_size = self.header.cluster_size();
        let first = round_down(range.start, cluster_size);
        let count = (range.end - first).div_ceil(cluster_size);
        let _held = writer.ranges.lock(first..first + count * cluster_size);
        let mut plans = Vec::with_capacity(count as usize);
        self.mapping.raw_entries(&self.file, first, count, |guest, entry| {
            let part = range.start.max(guest)..range.end.min(guest + cluster_size);
            plans.push(self.plan(writer, guest, part, entry, content).map_err(|e| e.at_offset(guest))?);
            Ok(())
        })?;
        let changed = plans.iter().any(|plan| plan.changed);
        if changed {
            self.own_table(writer, first)?;
        }
        let filled = self
            .allocate(writer, &mut plans)
            .and_then(|()| self.fill(&plans))
            .and_then(|durable_first| self.put(&plans, range.start, content).map(|()| durable_first))
            .and_then(|durable_first| if durable_first { self.data().sync() } else { Ok(()) });
        if let Err(e) = filled {
            let mut session = writer.session.lock();
            for plan in &plans {
                if let Host::New(offset, fresh) = plan.host {
                    session.take_back(&Clusters { offset, count: 1, fresh });
                }
            }
            return Err(e);
        }
        if changed {
            if plans.iter().any(|plan| !matches!(plan.old, Old::Nothing)) {
                writer.session.lock().begin()?;
            }
            let written = self.mapping.update(&self.file, first, plans.iter().map(|plan| plan.entry));
            written.inspect_err(|e| writer.session.lock().leak(e))?;
        }
        self.let_go(writer, &plans);
        Ok(())
    }

    fn plan(&self, writer: &Writer, guest: u64, part: Range<u64>, raw: RawEntry, content: Content<'_>) -> Result<Plan> {
        let geometry = self.header.geometry();
        let mut parts = Parts::of(decode_l2(raw.0, raw.1, &geometry)?);
        if let Some((host, copied)) = &mut parts.host
            && !geometry.external_data
        {
            self.data().check("a data cluster", *host, 1)?;
            self.data().check_not_table("a data cluster", *host)?;
            *copied = *copied || writer.session.lock().is_own(*host)?;
        }
        let Content::Zeros { discard } = content else { return Ok(self.plan_data(guest, part, raw, parts)) };
        if self.reads_zero(&part)? {
            return Ok(Plan::nothing(guest, part, raw));
        }
        let unit = geometry.subcluster_size();
        let whole = part.start.is_multiple_of(unit) && (part.end.is_multiple_of(unit) || part.end >= self.size());
        let plan = if whole { self.plan_zero(guest, &part, raw, parts, discard)? } else { None };
        Ok(plan.unwrap_or_else(|| self.plan_data(guest, part, raw, parts)))
    }

    /// Bytes are put into the cluster.
    fn plan_data(&self, guest: u64, part: Range<u64>, raw: RawEntry, parts: Parts) -> Plan {
        let geometry = self.header.geometry();
        let touched = units(&geometry, guest, &part);
        let (host, shown, old) = match (parts.host, parts.compressed) {
            _ if geometry.external_data => (Host::At(HostOffset(guest)), parts.allocated, Old::Nothing),
            (Some((host, true)), _) => (Host::At(host), parts.allocated, Old::Nothing),
            (Some((host, false)), _) => (Host::Wanted, 0, Old::Cluster(host)),
            (None, Some(at)) => (Host::Wanted, 0, Old::Compressed(at)),
            (None, None) => (Host::Wanted, 0, Old::Nothing),
        };
        let all = if parts.compressed.is_some() {
            units(&geometry, guest, &(guest..guest + geometry.cluster_size()))
        } else {
            0
        };
        let allocated = parts.allocated | touched | all;
        let place = match host {
            Host::At(host) => Some((host, true)),
            _ => None,
        };
        let entry = Parts { host: place, compressed: None, allocated, zero: parts.zero & !allocated }.encode(&geometry);
        let changed = host == Host::Wanted || entry != raw;
        Plan { guest, part, host, fill: allocated & !shown, entry, changed, put: true, punch: false, old }
    }

    /// Whole (sub)clusters get to read as zeros without bytes being written; None where the format has no way.
    fn plan_zero(
        &self,
        guest: u64,
        part: &Range<u64>,
        raw: RawEntry,
        parts: Parts,
        discard: bool,
    ) -> Result<Option<Plan>> {
        let geometry = self.header.geometry();
        let cluster = guest..guest + geometry.cluster_size();
        let (touched, all) = (units(&geometry, guest, part), units(&geometry, guest, &cluster));
        let own = matches!(parts.host, Some((_, true)));
        let whole = touched == all;
        let nothing = Plan::nothing(guest, part.clone(), raw);
        let without = |zero| match (parts.compressed, parts.host) {
            (Some(at), _) => (Parts { host: None, compressed: None, allocated: 0, zero }, Old::Compressed(at)),
            (None, Some((host, _))) => (Parts { host: None, compressed: None, allocated: 0, zero }, Old::Cluster(host)),
            (None, None) => (Parts { zero, ..parts }, Old::Nothing),
        };
        let (after, old, punch) = if geometry.version < 3 {
            if own || !self.backing_reads_zero(part)? {
                return Ok(None);
            }
            let (after, old) = without(0);
            (after, old, false)
        } else if whole && !own && !geometry.external_data {
            let (after, old) = without(all);
            (after, old, false)
        } else if parts.compressed.is_some() {
            return Ok(None);
        } else {
            let allocated = parts.allocated & !touched;
            (Parts { allocated, zero: parts.zero | touched, ..parts }, Old::Nothing, own || geometry.external_data)
        };
        let host = match parts.host {
            Some((host, _)) if punch => Host::At(host),
            _ if geometry.external_data => Host::At(HostOffset(guest)),
            _ => Host::None,
        };
        // A raw external data file shows the same as the image, so there the bytes go as well.
        let put = self.header.has_raw_data_file();
        let punch = punch && discard && !put;
        Ok(Some(Plan { host, entry: after.encode(&geometry), changed: true, put, punch, old, ..nothing }))
    }

    /// The L2 table for a guest offset becomes one that is referred to once, by the active L1 table.
    pub(super) fn own_table(&self, writer: &Writer, offset: u64) -> Result<()> {
        let cluster_size = self.header.cluster_size();
        // Once ours, always ours: the lock would tell nothing new.
        if let L1Entry::Table { copied: true, .. } = self.mapping.table(offset)? {
            return Ok(());
        }
        let mut session = writer.session.lock();
        let old = match self.mapping.table(offset)? {
            L1Entry::Table { copied: true, .. } => return Ok(()),
            L1Entry::Table { offset: table, .. } if session.is_own(table)? => {
                return self.mapping.set_table(&self.file, offset, table.0 | COPIED);
            }
            L1Entry::Table { offset: table, .. } => Some(table),
            L1Entry::Unallocated => None,
        };
        let new = session.allocate(1)?;
        let written = match old {
            Some(old) => self.copy_table(old, new.offset),
            None if new.fresh => Ok(()),
            None => self.file.write_at(&vec![0; cluster_size as usize], new.offset.0).and_then(|()| self.file.sync()),
        };
        if let Err(e) = written {
            session.take_back(&new);
            return Err(e);
        }
        self.mapping.forget_table(new.offset);
        self.file.note_tables([new.offset.0]);
        let linked = self.mapping.set_table(&self.file, offset, new.offset.0 | COPIED);
        linked.inspect_err(|e| session.leak(e))?;
        let freed = old.map_or(Ok(()), |old| session.free(old));
        let _ = freed.inspect_err(|e| session.leak(e));
        Ok(())
    }

    fn copy_table(&self, from: HostOffset, to: HostOffset) -> Result<()> {
        self.file.check("an L2 table", from, self.header.cluster_size())?;
        let mut table = vec![0; self.header.cluster_size() as usize];
        self.file.read_at(&mut table, from.0)?;
        self.file.write_at(&table, to.0)?;
        self.file.sync()
    }

    fn allocate(&self, writer: &Writer, plans: &mut [Plan]) -> Result<()> {
        let cluster_size = self.header.cluster_size();
        let mut at = 0;
        while let Some(first) = plans.iter().skip(at).position(|plan| plan.host == Host::Wanted) {
            let first = at + first;
            let count = plans[first..].iter().take_while(|plan| plan.host == Host::Wanted).count();
            let clusters = writer.session.lock().allocate(count as u64)?;
            for (i, plan) in (0..clusters.count).zip(&mut plans[first..]) {
                let host = HostOffset(clusters.offset.0 + i * cluster_size);
                plan.host = Host::New(host, clusters.fresh);
                plan.entry.0 |= host.0 | COPIED;
            }
            at = first + clusters.count as usize;
        }
        Ok(())
    }

    /// Puts old bytes around the new ones, in the (sub)clusters that the new entries will show. Whether all bytes there
    /// must be durable before the entries are written.
    fn fill(&self, plans: &[Plan]) -> Result<bool> {
        let unit = self.header.geometry().subcluster_size();
        let mut durable_first = false;
        for plan in plans {
            for run in runs(plan.fill) {
                let range = plan.guest + u64::from(run.start) * unit..plan.guest + u64::from(run.end) * unit;
                let Some(host) = plan.host_of(range.start) else { continue };
                let is_hole = match plan.host {
                    Host::New(_, true) => true,
                    _ => self.data().is_durable_hole(host, range.end - range.start)?,
                };
                let inside = range.start..range.end.min(self.size().max(plan.part.end));
                let was_zero = self.reads_zero(&inside)?;
                if is_hole && was_zero {
                    continue;
                }
                durable_first = true;
                let before = inside.start..plan.part.start.clamp(inside.start, inside.end);
                let behind = plan.part.end.clamp(inside.start, inside.end)..inside.end;
                for pad in [before, behind] {
                    self.fill_pad(plan, pad, was_zero)?;
                }
                // What is behind the end of the disk is uncovered by a growth, which may be under way.
                if !is_hole {
                    self.fill_pad(plan, inside.end..range.end, true)?;
                }
            }
        }
        Ok(durable_first)
    }

    fn fill_pad(&self, plan: &Plan, pad: Range<u64>, was_zero: bool) -> Result<()> {
        let mut at = pad.start;
        while at < pad.end {
            let len = (pad.end - at).min(COPY_BYTES);
            let Some(host) = plan.host_of(at) else { break };
            if was_zero {
                self.data().write_zeroes(host.0, len)?;
            } else {
                with_scratch(len as usize, |bytes| {
                    self.read_at(bytes, at)?;
                    self.data().write_at(bytes, host.0)
                })?;
            }
            at += len;
        }
        Ok(())
    }

    /// Writes what the request brings; neighbours in one go.
    fn put(&self, plans: &[Plan], start: u64, content: Content<'_>) -> Result<()> {
        let mut piece: Option<(HostOffset, Range<u64>)> = None;
        for plan in plans.iter().filter(|plan| plan.put) {
            let Some(host) = plan.host_of(plan.part.start) else { continue };
            match &mut piece {
                Some((first, range))
                    if range.end == plan.part.start && first.0 + (range.end - range.start) == host.0 =>
                {
                    range.end = plan.part.end;
                }
                _ => {
                    if let Some((host, range)) = piece.replace((host, plan.part.clone())) {
                        self.put_piece(host, range, start, content)?;
                    }
                }
            }
        }
        piece.map_or(Ok(()), |(host, range)| self.put_piece(host, range, start, content))
    }

    fn put_piece(&self, host: HostOffset, range: Range<u64>, start: u64, content: Content<'_>) -> Result<()> {
        match content {
            Content::Data(data) => {
                self.data().write_at(&data[(range.start - start) as usize..(range.end - start) as usize], host.0)
            }
            Content::Zeros { discard: true } => self.data().punch_hole(host.0, range.end - range.start),
            Content::Zeros { discard: false } => self.data().write_zeroes(host.0, range.end - range.start),
        }
    }

    /// Gives up what the entries no longer refer to, now that they are written. The request is done: what fails here
    /// costs space alone.
    fn let_go(&self, writer: &Writer, plans: &[Plan]) {
        for plan in plans {
            let freed = match plan.old {
                Old::Nothing => Ok(()),
                Old::Cluster(host) => writer.session.lock().free(host),
                Old::Compressed(at) => writer.session.lock().free_compressed(at),
            };
            if let Err(e) = freed {
                writer.session.lock().leak(&e);
            }
            if let (true, Some(host)) = (plan.punch, plan.host_of(plan.part.start))
                && let Err(e) = self.data().punch_hole(host.0, plan.part.end - plan.part.start)
            {
                log::debug!("a discarded range keeps its space: {e}");
            }
        }
    }

    /// Whether a range is known to read as zeros.
    pub(super) fn reads_zero(&self, range: &Range<u64>) -> Result<bool> {
        all_zero(range, |at, len| self.status(at, len))
    }

    fn backing_reads_zero(&self, range: &Range<u64>) -> Result<bool> {
        all_zero(range, |at, len| self.backing_status(at, len))
    }
}

fn all_zero(range: &Range<u64>, status: impl Fn(u64, u64) -> Result<BlockStatus>) -> Result<bool> {
    let mut at = range.start;
    while at < range.end {
        let run = status(at, range.end - at)?;
        if !run.zero {
            return Ok(false);
        }
        at += run.len;
    }
    Ok(true)
}
