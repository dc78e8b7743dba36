//! What requests do: checked, carried out on the export, answered.
//!
//! * **Nothing is begun that is refused**: flags, range and permission are looked at before the export is called.
//! * **Long ranges go in pieces**, between which it is looked whether anybody still waits.
//! * **FUA is a flush** after the change, of the whole export, so it holds for all its sessions.

use super::export::Zeroes;
use super::proto::replies::{Extents, Head};
use super::proto::requests::Request;
use super::proto::{EXTENTS_MAX, PAYLOAD_MAX_BYTES, Style, clip, command, command_flags, wire_errno, wire_error};
use super::session::{Job, Session};
use crate::error::{Error, Result, errno};
use std::io;
use std::time::{Duration, Instant};

/// Zeros and discards go to the export in pieces of this size.
const PIECE_BYTES: u64 = 1 << 30;
/// So does what is brought nearer.
const CACHE_PIECE_BYTES: u64 = 8 << 20;
/// A status that has extents is sent after this time, however few they are.
const STATUS_TIME: Duration = Duration::from_millis(500);

fn refuse(errno: i32, what: &str, why: &str) -> Option<Error> {
    Some(Error::new(errno, what, why))
}

impl Session {
    /// Why a request is refused, if it is.
    pub(super) fn refusal(&self, request: &Request) -> Option<Error> {
        let what = name_of(request.command);
        let refuse = |errno, why| refuse(errno, what, why);
        if self.house.is_stopping() {
            return refuse(wire_errno::ESHUTDOWN as i32, "the server stops");
        }
        let Some(valid) = request.valid_flags(self.style) else {
            return refuse(errno::EINVAL, "unknown command");
        };
        if request.flags & !valid != 0 {
            return refuse(errno::EINVAL, "flag that the command does not have");
        }
        if request.command == command::FLUSH {
            return None;
        }
        let writes = [command::WRITE, command::WRITE_ZEROES, command::TRIM].contains(&request.command);
        if writes && self.export.read_only() {
            return refuse(errno::EPERM, "the export is read-only");
        }
        let moves_data = [command::READ, command::WRITE].contains(&request.command);
        if moves_data && request.len > u64::from(PAYLOAD_MAX_BYTES) {
            return refuse(wire_errno::EOVERFLOW as i32, "more than 32 MiB");
        }
        if request.ends_behind(self.export.size()) {
            let grows = [command::WRITE, command::WRITE_ZEROES].contains(&request.command);
            return refuse(if grows { errno::ENOSPC } else { errno::EINVAL }, "beyond the end of the export");
        }
        if request.command == command::BLOCK_STATUS && (self.contexts.is_empty() || request.len == 0) {
            return refuse(errno::EINVAL, "no context, or no length");
        }
        None
    }

    /// Carries a request out and answers it. An error is one of sending.
    pub(super) fn perform(&self, job: &Job, more: bool) -> io::Result<()> {
        let request = &job.request;
        if let Some(refusal) = &job.refusal {
            return self.reply_error(request, refusal);
        }
        let begun = Instant::now();
        let done = match request.command {
            command::READ => return self.read(request, more),
            command::BLOCK_STATUS => return self.block_status(request),
            command::WRITE => self.export.write(job.data.as_deref().unwrap_or_default(), request.offset),
            command::FLUSH => self.export.flush(),
            command::TRIM => self.pieces(request, PIECE_BYTES, |offset, len| self.export.trim(offset, len)),
            command::CACHE => self.pieces(request, CACHE_PIECE_BYTES, |offset, len| self.export.cache(offset, len)),
            _ => self.write_zeroes(request),
        };
        self.note_pace(begun.elapsed());
        let writes = ![command::FLUSH, command::CACHE].contains(&request.command);
        let durable = writes && request.has(command_flags::FUA);
        match done.and_then(|()| if durable { self.export.flush() } else { Ok(()) }) {
            Ok(()) => self.reply_done(request, more),
            Err(e) => self.reply_error(request, &e),
        }
    }

    /// Runs `work` on pieces of a range.
    fn pieces(&self, request: &Request, piece: u64, work: impl Fn(u64, u64) -> Result<()>) -> Result<()> {
        let end = request.offset + request.len;
        let mut at = request.offset;
        while at < end {
            // Pieces end at multiples of their size.
            let len = (end - at).min(piece - at % piece);
            work(at, len)?;
            at += len;
            if self.is_gone() {
                return Err(Error::new(errno::ECANCELED, name_of(request.command), "the client has left"));
            }
        }
        Ok(())
    }

    /// ENOTSUP is for `NBD_CMD_FLAG_FAST_ZERO` alone, and for what has changed nothing: later pieces are zeroed in any
    /// way.
    fn write_zeroes(&self, request: &Request) -> Result<()> {
        let only_fast = request.has(command_flags::FAST_ZERO);
        let no_hole = request.has(command_flags::NO_HOLE);
        self.pieces(request, PIECE_BYTES, |offset, len| {
            let only_fast = only_fast && offset == request.offset;
            self.export.write_zeroes(offset, len, Zeroes { no_hole, only_fast }).map_err(|e| {
                let misplaced = e.errno() == errno::EOPNOTSUPP && !only_fast;
                if misplaced { Error::new(errno::EIO, "write zeroes", e.to_string()) } else { e }
            })
        })
    }

    fn read(&self, request: &Request, more: bool) -> io::Result<()> {
        if request.len == 0 {
            return self.reply_done(request, more);
        }
        let Some(mut data) = self.share.take(request.len as usize, || ()) else { return Ok(()) };
        let begun = Instant::now();
        let done = self.export.read(&mut data, request.offset);
        self.note_pace(begun.elapsed());
        if let Err(e) = done {
            return self.reply_error(request, &e);
        }
        let head = match self.style {
            Style::Simple => Head::simple(request, 0),
            style => Head::data(style, request, true, request.offset, request.len as u32),
        };
        self.send(head.as_bytes(), &data, more)
    }

    /// One chunk a context. Each may cover less than was asked for.
    fn block_status(&self, request: &Request) -> io::Result<()> {
        let mut extents = Extents::default();
        let last = self.contexts.len().saturating_sub(1);
        for (id, context) in self.contexts.iter().enumerate() {
            extents.clear();
            if let Err(e) = self.collect(request, &**context, &mut extents) {
                return self.reply_error(request, &e);
            }
            let head = Head::status(self.style, request, id == last, id as u32, &extents);
            self.send(head.as_bytes(), extents.as_bytes(), false)?;
        }
        Ok(())
    }

    /// Extents from the request's offset on, neighbours of one status as one. What comes after the first failure is
    /// asked for again, so that error is the next request's.
    fn collect(&self, request: &Request, context: &dyn super::export::Context, extents: &mut Extents) -> Result<()> {
        let begun = Instant::now();
        let max = if request.has(command_flags::REQ_ONE) { 1 } else { EXTENTS_MAX };
        let end = request.offset + request.len;
        let (mut at, mut open) = (request.offset, None::<(u64, u32)>);
        while at < end && (open.is_none() || begun.elapsed() < STATUS_TIME) {
            let run = match context.run(at, end - at) {
                Ok(run) => run,
                Err(e) if open.is_none() => return Err(e),
                Err(_) => break,
            };
            let len = run.len.clamp(1, end - at);
            at += len;
            open = match open {
                Some((before, flags)) if flags == run.flags => Some((before + len, flags)),
                Some((before, flags)) => {
                    extents.push(self.style, before, flags);
                    if extents.count() == max {
                        return Ok(());
                    }
                    Some((len, run.flags))
                }
                None => Some((len, run.flags)),
            };
        }
        if let Some((len, flags)) = open {
            extents.push(self.style, len, flags);
        }
        Ok(())
    }

    fn reply_done(&self, request: &Request, more: bool) -> io::Result<()> {
        let head = match self.style {
            Style::Simple => Head::simple(request, 0),
            style => Head::none(style, request),
        };
        self.send(head.as_bytes(), &[], more)
    }

    fn reply_error(&self, request: &Request, e: &Error) -> io::Result<()> {
        log::debug!("nbd: {e}");
        let error = wire_error(e.errno());
        if self.style == Style::Simple {
            return self.send(Head::simple(request, error).as_bytes(), &[], false);
        }
        let text = e.to_string();
        let text = clip(&text);
        self.send(Head::error(self.style, request, error, text).as_bytes(), text.as_bytes(), false)
    }
}

fn name_of(command: u16) -> &'static str {
    match command {
        command::READ => "read",
        command::WRITE => "write",
        command::FLUSH => "flush",
        command::TRIM => "trim",
        command::CACHE => "cache",
        command::WRITE_ZEROES => "write zeroes",
        command::BLOCK_STATUS => "block status",
        _ => "request",
    }
}
