//! Snapshots of guests that hold still: `--freeze` and `--hook` of every command that takes a snapshot.
//!
//! * **Thawed, whatever happens.** Who freezes is a process of its own (`guard`), which thaws when it is told to, when the
//!   time is up, and when the pipe to this process closes, so also where this one is killed. Where the guard is killed
//!   instead, this process thaws what the guard said it was about to freeze.
//! * **Bounded.** From the first `pre` to the thaw no more than `--freeze-timeout` seconds pass, 10 at most; a snapshot
//!   that takes longer was not taken of a frozen guest.
//! * **Never a promise.** The manifest says 'filesystem' only after each guest, asked after the instant, was still frozen.

mod agent;
mod child;
mod client;
mod guard;

use super::connect::Mount;
use super::output::{complain, printable};
use crate::daemon::absolute;
use crate::error::{Error, Result, errno};
use crate::fleece::HookNote;
use agent::Guest;
use clap::{Args, ValueEnum};
use client::Guard;
use guard::{Done, Plan};
pub use guard::{ROLE as GUARD_ROLE, main as guard_main};
use serde_json::{Value, json};

/// Longest time from the first hook to the thaw, in seconds.
const MAX_FREEZE_S: u64 = 10;
/// Most guests, and most hooks, of one snapshot: what is noted of them has to fit into the manifest.
const MAX_EACH: usize = 10;

/// How the guests of a snapshot are held still.
#[derive(Debug, Args)]
pub struct FreezeArgs {
    /// Freeze the file systems of a guest at the instant: by its agent's socket, or by libvirt. May be repeated
    #[arg(long = "freeze", value_name = "qga:SOCKET|libvirt:DOMAIN", value_parser = Guest::parse)]
    guests: Vec<Guest>,
    /// Shell command to run around the instant, as `CMD pre`, and then `CMD post` or, where there is no snapshot, `CMD
    /// failed`. May be repeated
    #[arg(long = "hook", value_name = "CMD")]
    hooks: Vec<String>,
    /// When a guest cannot be frozen, or thaws too early: take no snapshot, or one that is crash-consistent
    #[arg(long, value_name = "POLICY", value_enum, default_value_t = OnFreezeError::Fail)]
    on_freeze_error: OnFreezeError,
    /// Seconds from the first hook to the thaw, at most
    #[arg(long, value_name = "SECS", value_parser = clap::value_parser!(u64).range(1..=MAX_FREEZE_S), default_value_t = MAX_FREEZE_S)]
    freeze_timeout: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum OnFreezeError {
    /// There is no snapshot
    Fail,
    /// The snapshot is taken, and its manifest says that it is crash-consistent
    Continue,
}

impl FreezeArgs {
    /// Runs `fleecefs-snapshot-create` with `arguments`, the guests frozen and the hooks around it, and gives the
    /// manifest. An error: there is no snapshot, no guest is frozen, and each hook that was begun was told so.
    pub fn create_snapshot(&self, mount: &Mount, mut arguments: Value) -> Result<Value> {
        if self.guests.is_empty() && self.hooks.is_empty() {
            return mount.execute("fleecefs-snapshot-create", arguments);
        }
        if self.guests.len() > MAX_EACH || self.hooks.len() > MAX_EACH {
            let why = format!("at most {MAX_EACH} guests and {MAX_EACH} hooks of one snapshot");
            return Err(Error::new(errno::EINVAL, "freeze", why));
        }
        let name = arguments.get("name").and_then(Value::as_str).unwrap_or_default().to_owned();
        // All that can fail before the guests stand still comes before.
        let mut client = mount.client()?;
        let mut guard = Guard::start(self.plan(mount, &name)?)?;
        let ready = guard.ready()?;
        arguments["hooks"] = json!(ready.hooks);
        let taken = client.execute("fleecefs-snapshot-create", arguments);
        let end = guard.finish(taken.is_ok());
        taken?;
        let finished = end.and_then(|done| self.accept(done)).and_then(|(consistency, hooks)| {
            let arguments = json!({ "name": name, "consistency": consistency, "hooks": hooks });
            client.execute("fleecefs-snapshot-annotate", arguments)
        });
        finished.inspect_err(|_| {
            // The error at hand is the one to tell; a snapshot that stays is seen in the list.
            let _ = client.execute("fleecefs-snapshot-cancel", json!({ "name": name }));
        })
    }

    fn plan(&self, mount: &Mount, name: &str) -> Result<Plan> {
        Ok(Plan {
            guests: self.guests.clone(),
            hooks: self.hooks.clone(),
            mount: absolute(&mount.path)?,
            name: name.to_owned(),
            goes_on: self.on_freeze_error == OnFreezeError::Continue,
            limit_ms: self.freeze_timeout * 1000,
        })
    }

    /// What the manifest is to say, unless the snapshot is not what was asked for.
    fn accept(&self, done: Done) -> Result<(&'static str, Vec<HookNote>)> {
        for note in done.hooks.iter().filter(|note| note.exit != 0 && ["post", "failed"].contains(&note.phase.as_str()))
        {
            complain(&format!("fleecefs: hook '{}' {}: exit code {}", printable(&note.command), note.phase, note.exit));
        }
        match done.trouble {
            None if self.guests.is_empty() => Ok(("crash", done.hooks)),
            None => Ok(("filesystem", done.hooks)),
            Some(why) if self.on_freeze_error == OnFreezeError::Continue => {
                complain(&format!("fleecefs: the snapshot is crash-consistent only: {}", printable(&why)));
                Ok(("crash", done.hooks))
            }
            Some(why) => Err(refused(&why, Some(guard::CONTINUE_HINT))),
        }
    }
}

/// No snapshot, as a guest could not be frozen or a hook did not want it.
fn refused(why: &str, hint: Option<&str>) -> Error {
    let e = Error::new(errno::EIO, "no snapshot", printable(why));
    hint.map_or(e.clone(), |hint| e.hint(printable(hint)))
}
