//! How far a long command has come, and its end by ^C.

use super::output::complain;
use crate::backup::save::Watch;
use crate::error::{Error, Result, errno};
use crate::units::human_size;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use parking_lot::Mutex;
use signal_hook::consts::{SIGINT, SIGTERM};
use std::io::IsTerminal;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// How often a line is written where there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(2);
/// What a shell says of a command that ^C ended: here of the second one, which does not wait.
const INTERRUPTED: i32 = 130;

/// See the module.
pub struct Progress {
    stop: Arc<AtomicBool>,
    shown: bool,
    stage: Mutex<Stage>,
    done: AtomicU64,
}

struct Stage {
    what: String,
    total: u64,
    began: Instant,
    told: Instant,
    bar: Option<ProgressBar>,
}

impl Progress {
    /// From now on SIGINT and SIGTERM end the command at the next [`Watch::check`], and a second one at once. With
    /// `shown`, standard error has a bar on a terminal, else a line every few seconds.
    pub fn start(shown: bool) -> Result<Progress> {
        let stop = Arc::new(AtomicBool::new(false));
        for signal in [SIGINT, SIGTERM] {
            signal_hook::flag::register_conditional_shutdown(signal, INTERRUPTED, stop.clone())
                .and_then(|_| signal_hook::flag::register(signal, stop.clone()))
                .map_err(|e| Error::io("install signal handlers", e))?;
        }
        let now = Instant::now();
        let stage = Stage { what: String::new(), total: 0, began: now, told: now, bar: None };
        Ok(Progress { stop, shown, stage: Mutex::new(stage), done: AtomicU64::new(0) })
    }

    /// A stage of `total` bytes begins.
    pub fn begin(&self, what: &str, total: u64) {
        self.end();
        let now = Instant::now();
        self.done.store(0, Ordering::Relaxed);
        let bar = (self.shown && std::io::stderr().is_terminal()).then(|| {
            let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
            let form = "{prefix}  {binary_bytes} of {binary_total_bytes}  {bar:30}  {binary_bytes_per_sec}  {eta} left";
            if let Ok(style) = ProgressStyle::with_template(form) {
                bar.set_style(style);
            }
            bar.with_prefix(what.to_owned())
        });
        *self.stage.lock() = Stage { what: what.to_owned(), total, began: now, told: now, bar };
    }

    /// The stage has ended.
    pub fn end(&self) {
        if let Some(bar) = self.stage.lock().bar.take() {
            bar.finish_and_clear();
        }
    }

    fn show(&self, done: u64) {
        // Who finds it taken has nothing newer to show.
        let Some(mut stage) = self.stage.try_lock() else { return };
        if let Some(bar) = &stage.bar {
            bar.set_position(done);
            return;
        }
        if stage.told.elapsed() < LINE_EVERY {
            return;
        }
        stage.told = Instant::now();
        complain(&line(&stage.what, done, stage.total, stage.began.elapsed()));
    }
}

impl Watch for Progress {
    fn done(&self, bytes: u64) {
        let done = self.done.fetch_add(bytes, Ordering::Relaxed) + bytes;
        if self.shown {
            self.show(done);
        }
    }

    fn check(&self) -> Result<()> {
        if self.stop.load(Ordering::Relaxed) {
            return Err(Error::new(errno::ECANCELED, "interrupted", "it did not run to its end"));
        }
        Ok(())
    }
}

/// `vda: 1.0 GiB of 4.0 GiB, 25 %, 100.0 MiB/s, 31 s left`.
fn line(what: &str, done: u64, total: u64, time: Duration) -> String {
    let rate = done as f64 / time.as_secs_f64().max(0.001);
    let percent = if total == 0 { 100.0 } else { done as f64 * 100.0 / total as f64 };
    let left =
        if rate > 0.0 { format!("{:.0} s left", total.saturating_sub(done) as f64 / rate) } else { "waiting".into() };
    format!(
        "{what}: {} of {}, {percent:.0} %, {}/s, {left}",
        human_size(done),
        human_size(total),
        human_size(rate as u64)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_tells_how_far_it_is() {
        assert_eq!(
            line("vda", 1 << 30, 4 << 30, Duration::from_secs(8)),
            "vda: 1.0 GiB of 4.0 GiB, 25 %, 128.0 MiB/s, 24 s left"
        );
        assert!(line("vda", 0, 0, Duration::ZERO).ends_with("waiting"));
    }
}
