//! The guard: a process that freezes guests, and thaws them whatever becomes of who asked for it.
//!
//! It is this program in a role of its own, in a process group of its own, and talks to its client by its standard
//! input and output, one JSON value a line. The plan comes first; then:
//!
//! | guard | client |
//! | --- | --- |
//! | `pre` of each hook, one after another | |
//! | `Freezing`, and the freeze, of all guests at once | |
//! | `Ready` (or undoes everything: `Refused`) | |
//! | | takes the snapshot; `true` or `false`: whether it is there |
//! | thaws; `post` or `failed` of each hook that was begun, the last one first; `Done` | |
//!
//! The end of its input, a signal and the end of the time count as `false`.

use super::agent::Guest;
use super::child;
use crate::cli::output::{complain, printable};
use crate::daemon::log_to_syslog;
use crate::error::{Error, Result, errno};
use crate::fleece::HookNote;
use crate::storage::process;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

/// The first argument of a guard.
pub const ROLE: &str = "freeze-guard";
/// What is left of the time for the thaw itself.
const THAW_RESERVE: Duration = Duration::from_millis(500);
/// How long after the end of the time the threads that freeze may take to say how it went.
const GRACE: Duration = Duration::from_millis(250);
/// How long one try to thaw may take, and all of them.
const THAW_TRY: Duration = Duration::from_secs(5);
const THAW_LIMIT: Duration = Duration::from_secs(120);
/// The same where nobody listens at the agent's socket: the guest has ended, most likely.
const GONE_LIMIT: Duration = Duration::from_secs(10);
const THAW_PAUSE: Duration = Duration::from_millis(200);
/// How long each hook may take for `post` or `failed`.
const END_LIMIT: Duration = Duration::from_secs(10);
/// Most bytes of a command or an error in the manifest.
const MAX_NOTE_BYTES: usize = 160;

/// What to do about a guest that cannot be frozen.
pub const CONTINUE_HINT: &str = "`--on-freeze-error continue` takes a crash-consistent snapshot then";

/// What a guard is to do.
#[derive(Debug, Serialize, Deserialize)]
pub struct Plan {
    pub guests: Vec<Guest>,
    pub hooks: Vec<String>,
    /// The mount, and the name of the snapshot.
    pub mount: PathBuf,
    pub name: String,
    /// A guest that cannot be frozen is no reason to give up.
    pub goes_on: bool,
    /// From the first hook to the thaw, in milliseconds.
    pub limit_ms: u64,
}

/// What a guard says.
#[derive(Debug, Serialize, Deserialize)]
pub enum Report {
    /// This guest (by its place in the plan) may be frozen from now on.
    Freezing(usize),
    /// The instant may come.
    Ready(Done),
    /// Nothing is frozen, and nothing will be.
    Refused(String, Option<String>),
    /// All is over.
    Done(Done),
}

/// How it went until now.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Done {
    /// Why the snapshot is not what was asked for.
    pub trouble: Option<String>,
    pub hooks: Vec<HookNote>,
}

/// What a guard waits for.
enum Word {
    Taken(bool),
    /// The client is gone, or somebody asks for an end: why.
    Over(&'static str),
    /// A guest was frozen, or not.
    Frozen(usize, Result<u64>, u64),
}

/// Runs a guard where this process is to be one.
pub fn main() -> ExitCode {
    match serve() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            complain(&format!("fleecefs: freeze guard: {e}"));
            ExitCode::from(2)
        }
    }
}

fn serve() -> Result<()> {
    let failed = |e| Error::io("freeze guard", e);
    // Before the first guest is touched: from here on nothing but SIGKILL ends this process.
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP]).map_err(failed)?;
    process::ignore_terminal_output_signal();
    log_to_syslog();
    let mut input = BufReader::new(std::io::stdin());
    let mut line = String::new();
    input.read_line(&mut line).map_err(failed)?;
    let plan: Plan = serde_json::from_str(&line)
        .map_err(|e| Error::new(errno::EINVAL, "freeze guard", format!("not for people to run: {e}")))?;
    let (words, word) = channel();
    let heard = words.clone();
    thread::spawn(move || {
        for _ in signals.forever() {
            let _ = heard.send(Word::Over("the guard was asked to end"));
        }
    });
    let heard = words.clone();
    thread::spawn(move || {
        let taken = input.lines().map_while(|line| serde_json::from_str::<bool>(&line.ok()?).ok()).next();
        let _ = heard.send(match taken {
            Some(taken) => Word::Taken(taken),
            None => Word::Over("the command that asked for it has ended"),
        });
    });
    let deadline = Instant::now() + Duration::from_millis(plan.limit_ms).saturating_sub(THAW_RESERVE);
    Guarded { plan, deadline, word, words, begun: 0, notes: Vec::new(), trouble: None, over: None }.run();
    Ok(())
}

/// A guard at work.
struct Guarded {
    plan: Plan,
    deadline: Instant,
    word: Receiver<Word>,
    words: Sender<Word>,
    /// How many of the hooks were begun.
    begun: usize,
    notes: Vec<HookNote>,
    trouble: Option<String>,
    /// Why the client is not listened to any more.
    over: Option<&'static str>,
}

/// Whether a guest may be frozen.
#[derive(Default)]
struct Gate {
    closed: bool,
    /// The freeze was asked for.
    touched: bool,
}

impl Guarded {
    fn run(mut self) {
        if let Err(e) = self.pre() {
            self.refuse(&[], &e);
            return;
        }
        let (frozen, failure) = self.freeze();
        if let Some(e) = failure.as_ref().filter(|_| !self.plan.goes_on) {
            let e = if e.hint_text().is_some() { e.clone() } else { e.clone().hint(CONTINUE_HINT) };
            self.refuse(&frozen, &e);
            return;
        }
        self.trouble = failure.map(|e| e.to_string());
        say(&Report::Ready(Done { trouble: self.trouble.clone(), hooks: self.notes.clone() }));
        let taken = self.wait_taken();
        self.thaw(&frozen);
        // Its client takes the snapshot back where it is not what was asked for.
        let stays = taken && (self.trouble.is_none() || self.plan.goes_on);
        self.end(if stays { "post" } else { "failed" });
        say(&Report::Done(Done { trouble: self.trouble.take(), hooks: std::mem::take(&mut self.notes) }));
    }

    /// Undoes all, then says why.
    fn refuse(&mut self, frozen: &[usize], e: &Error) {
        self.thaw(frozen);
        self.end("failed");
        say(&Report::Refused(e.to_string(), e.hint_text().map(str::to_owned)));
    }

    /// Whether there is a snapshot.
    fn wait_taken(&mut self) -> bool {
        while self.over.is_none() {
            match self.word.recv_timeout(self.deadline.saturating_duration_since(Instant::now())) {
                Ok(Word::Taken(taken)) => return taken,
                Ok(Word::Over(why)) => self.over = Some(why),
                Ok(Word::Frozen(..)) => {}
                Err(_) => {
                    let why = format!("there was no snapshot within {} s", self.plan.limit_ms / 1000);
                    self.trouble.get_or_insert(why);
                    return false;
                }
            }
        }
        let why = self.over.unwrap_or_default();
        tell(&format!("{why}: guests are thawed"));
        self.trouble.get_or_insert_with(|| why.to_owned());
        false
    }

    fn pre(&mut self) -> Result<()> {
        for index in 0..self.plan.hooks.len() {
            self.begun = index + 1;
            let note = self.hook(index, "pre", self.deadline, true);
            let failed = (note.exit != 0).then(|| {
                let why = note.error.clone().unwrap_or_else(|| format!("exit code {}", note.exit));
                Error::new(errno::ECANCELED, format!("hook '{}' pre", printable(&note.command)), why)
            });
            self.notes.push(note);
            if let Some(e) = failed {
                return Err(e);
            }
        }
        Ok(())
    }

    /// Tells each hook that was begun how it ended.
    fn end(&mut self, phase: &str) {
        for index in (0..self.begun).rev() {
            let note = self.hook(index, phase, Instant::now() + END_LIMIT, false);
            self.notes.push(note);
        }
    }

    fn hook(&mut self, index: usize, phase: &str, deadline: Instant, stops: bool) -> HookNote {
        let command = self.plan.hooks.get(index).cloned().unwrap_or_default();
        let begun = Instant::now();
        let mut shell = Command::new("/bin/sh");
        shell.arg("-c").arg(format!("{command} \"$@\"")).arg(&command).arg(phase);
        shell
            .env("FLEECEFS_MOUNT", &self.plan.mount)
            .env("FLEECEFS_NAME", &self.plan.name)
            .env("FLEECEFS_PHASE", phase);
        shell.env("FLEECEFS_SNAPSHOT", self.plan.mount.join("snapshots").join(&self.plan.name));
        // What it prints is for people; our standard output is not.
        shell.stdin(Stdio::null()).stdout(std::io::stderr());
        let stopped = || {
            if let (true, Ok(Word::Over(why))) = (stops, self.word.try_recv()) {
                self.over = Some(why);
            }
            stops && self.over.is_some()
        };
        let ended = child::start(&mut shell).and_then(|mut child| child::wait(&mut child, deadline, stopped));
        let (exit, error) = match ended {
            Ok(Some(status)) => (i32::from(process::exit_code(status)), None),
            Ok(None) => (137, Some(self.over.filter(|_| stops).unwrap_or("it took too long").to_owned())),
            Err(e) => (127, Some(e.to_string())),
        };
        note(&command, phase, exit, begun.elapsed(), error)
    }

    /// Freezes all guests at once. Gives those that may be frozen now, and the first failure.
    fn freeze(&mut self) -> (Vec<usize>, Option<Error>) {
        let gates: Vec<Arc<Mutex<Gate>>> = self.plan.guests.iter().map(|_| Arc::default()).collect();
        for (index, (guest, gate)) in self.plan.guests.iter().zip(&gates).enumerate() {
            let (guest, gate, words, deadline) = (guest.clone(), gate.clone(), self.words.clone(), self.deadline);
            thread::spawn(move || {
                let begun = Instant::now();
                let outcome = guest.freeze(deadline, || {
                    let mut gate = gate.lock();
                    gate.touched = !gate.closed;
                    if gate.touched {
                        say(&Report::Freezing(index));
                    }
                    gate.touched
                });
                let _ = words.send(Word::Frozen(index, outcome, begun.elapsed().as_millis() as u64));
            });
        }
        let mut failure = None;
        let mut answered = vec![false; gates.len()];
        while answered.contains(&false) && self.over.is_none() {
            let left = (self.deadline + GRACE).saturating_duration_since(Instant::now());
            match self.word.recv_timeout(left) {
                Ok(Word::Frozen(index, outcome, ms)) => {
                    answered.iter_mut().skip(index).take(1).for_each(|answered| *answered = true);
                    let error = outcome.as_ref().err().map(|e| e.to_string());
                    self.note_guest(index, "freeze", ms, error);
                    failure = failure.or(outcome.err());
                }
                Ok(Word::Over(why)) => self.over = Some(why),
                Ok(Word::Taken(_)) => {}
                Err(_) => break,
            }
        }
        for (index, _) in answered.iter().enumerate().filter(|(_, answered)| !**answered) {
            let why = self.over.unwrap_or("the agent does not answer");
            self.note_guest(index, "freeze", self.plan.limit_ms, Some(why.to_owned()));
            let guest = self.plan.guests.get(index).map(Guest::to_string).unwrap_or_default();
            failure.get_or_insert_with(|| Error::new(errno::ETIMEDOUT, guest, why));
        }
        let touched = gates.iter().map(|gate| {
            let mut gate = gate.lock();
            gate.closed = true;
            gate.touched
        });
        let frozen = touched.enumerate().filter(|(_, touched)| *touched).map(|(index, _)| index).collect();
        (frozen, failure)
    }

    /// Thaws guests, all at once, and does not return before that, or [`THAW_LIMIT`].
    fn thaw(&mut self, frozen: &[usize]) {
        let guests: Vec<(usize, Guest)> =
            frozen.iter().filter_map(|index| Some((*index, self.plan.guests.get(*index)?.clone()))).collect();
        let threads: Vec<_> = guests
            .into_iter()
            .map(|(index, guest)| {
                let begun = Instant::now();
                (index, begun, thread::spawn(move || thaw_for_sure(&guest)))
            })
            .collect();
        for (index, begun, thread) in threads {
            let outcome = thread.join().unwrap_or_else(|_| Some("internal error".to_owned()));
            self.note_guest(index, "thaw", begun.elapsed().as_millis() as u64, outcome.clone());
            if let (Some(why), Some(guest)) = (outcome, self.plan.guests.get(index)) {
                let why = if why.starts_with(&guest.to_string()) { why } else { format!("{guest}: {why}") };
                self.trouble.get_or_insert(why);
            }
        }
    }

    fn note_guest(&mut self, index: usize, phase: &str, ms: u64, error: Option<String>) {
        let guest = self.plan.guests.get(index).map(Guest::to_string).unwrap_or_default();
        let exit = i32::from(error.is_some());
        self.notes.push(note(&guest, phase, exit, Duration::from_millis(ms), error));
    }
}

/// Thaws a guest, and tries again where that fails. None: it had been frozen until then; else why not, or that it may be
/// frozen still.
pub fn thaw_for_sure(guest: &Guest) -> Option<String> {
    let begun = Instant::now();
    let mut told = false;
    loop {
        // A thread of its own: connecting to a socket whose owner does not accept has no time limit.
        let (sender, receiver) = channel();
        let asked = guest.clone();
        thread::spawn(move || drop(sender.send(asked.thaw(Instant::now() + THAW_TRY))));
        let outcome = receiver.recv_timeout(THAW_TRY + GRACE);
        let e = match outcome {
            Ok(Ok(thawed)) if thawed.held => return None,
            Ok(Ok(_)) => return Some("it was thawed before the snapshot was there".to_owned()),
            Ok(Err(e)) => e,
            Err(_) => Error::new(errno::ETIMEDOUT, guest.to_string(), "nobody answers at its socket"),
        };
        let gone = [errno::ENOENT, errno::ECONNREFUSED].contains(&e.errno());
        if begun.elapsed() > if gone { GONE_LIMIT } else { THAW_LIMIT } {
            tell(&format!("{e}: the guest may be frozen still; thaw it: {}", guest.how_to_thaw()));
            return Some(format!("it may be frozen still: {e}"));
        }
        if !told {
            tell(&format!("not thawed yet, trying on: {e}"));
            told = true;
        }
        thread::sleep(THAW_PAUSE);
    }
}

/// One line for people: on standard error, and in the system's log, since who would read the first may be gone.
fn tell(text: &str) {
    complain(&format!("fleecefs: {}", printable(text)));
    log::warn!("freeze guard: {text}");
}

/// One line to the client. Where it is gone, nobody needs to know.
fn say(report: &Report) {
    let Ok(mut line) = serde_json::to_vec(report) else { return };
    line.push(b'\n');
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(&line).and_then(|()| out.flush());
}

fn note(command: &str, phase: &str, exit: i32, took: Duration, error: Option<String>) -> HookNote {
    let error = error.map(|text| cut(&text));
    HookNote { command: cut(command), phase: phase.to_owned(), exit, ms: took.as_millis() as u64, error }
}

/// The beginning of a text that is too long for the manifest.
fn cut(text: &str) -> String {
    if text.len() <= MAX_NOTE_BYTES {
        return text.to_owned();
    }
    let end = (0..=MAX_NOTE_BYTES).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
    format!("{}…", text.get(..end).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_texts_are_cut_between_characters() {
        assert_eq!(cut("short"), "short");
        let long = cut(&"ä".repeat(200));
        assert!(long.ends_with("ä…") && long.len() <= MAX_NOTE_BYTES + '…'.len_utf8());
    }
}
