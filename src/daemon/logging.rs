//! Where log lines go: standard error in the foreground, syslog in the background.

use env_logger::{Builder, Env, Target};
use log::{Level, Record};
use std::io::{self, Write};
use std::os::unix::net::UnixDatagram;
use std::path::Path;

const SYSLOG: &str = "/dev/log";
/// Libraries speak up only where something is wrong; fuser calls a reply to a request that was interrupted an error.
const DEFAULT_FILTER: &str = "fleecefs=info,fuser=off,warn";
/// Facility `daemon` of syslog, where a priority is facility x 8 + severity.
const FACILITY_DAEMON: u8 = 3;

/// syslog(3): err, warning, info, debug.
fn severity(level: Level) -> u8 {
    match level {
        Level::Error => 3,
        Level::Warn => 4,
        Level::Info => 6,
        Level::Debug | Level::Trace => 7,
    }
}

/// Lines on standard error; where that is the journal, the priority stands in front as it expects.
pub fn to_stderr() {
    let journal = std::env::var_os("JOURNAL_STREAM").is_some();
    start(Target::Stderr, move |out, record| {
        if journal {
            write!(out, "<{}>", severity(record.level()))?;
        }
        writeln!(out, "fleecefs: {}", record.args())
    });
}

/// Lines to the system's log. Where there is none (a bare container), they are dropped: run with `--foreground` there.
pub fn to_syslog() {
    start(Target::Pipe(Box::new(Syslog(connect(Path::new(SYSLOG))))), |out, record| {
        let priority = FACILITY_DAEMON * 8 + severity(record.level());
        write!(out, "<{priority}>fleecefs[{}]: {}", std::process::id(), record.args())
    });
}

fn start(target: Target, format: impl Fn(&mut dyn Write, &Record) -> io::Result<()> + Send + Sync + 'static) {
    let env = Env::default().filter_or("FLEECEFS_LOG", DEFAULT_FILTER);
    let mut builder = Builder::from_env(env);
    builder.target(target).format(move |out, record| format(out, record));
    // A logger that is there already (a test's) stays.
    let _ = builder.try_init();
    std::panic::set_hook(Box::new(|panic| log::error!("internal error: {panic}")));
}

fn connect(path: &Path) -> Option<UnixDatagram> {
    let socket = UnixDatagram::unbound().ok()?;
    socket.connect(path).ok()?;
    // A log that is full must not hold up the guest.
    socket.set_nonblocking(true).ok()?;
    Some(socket)
}

/// One datagram per line.
struct Syslog(Option<UnixDatagram>);

impl Write for Syslog {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if let Some(socket) = &self.0 {
            // Lost lines cannot be logged.
            let _ = socket.send(line);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_a_datagram_and_a_missing_log_no_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let log = UnixDatagram::bind(&path).unwrap();
        Syslog(connect(&path)).write_all(b"<30>fleecefs[1]: x").unwrap();
        let mut buf = [0; 64];
        let count = log.recv(&mut buf).unwrap();
        assert_eq!(&buf[..count], b"<30>fleecefs[1]: x");
        assert!(connect(&dir.path().join("none")).is_none());
        Syslog(None).write_all(b"x").unwrap();
    }
}
