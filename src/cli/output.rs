//! What people see: standard output that copes with a closed pipe, aligned tables, colour where it is wanted.

use crate::error::{Error, Result};
use serde::Serialize;
use std::io::{self, ErrorKind, IsTerminal, StdoutLock, Write};

/// Standard output. When its reader has gone, the process ends in silence: nothing is left to be told to anybody.
pub struct Out(StdoutLock<'static>);

impl Out {
    /// Standard output, locked.
    pub fn new() -> Out {
        Out(io::stdout().lock())
    }

    /// One line.
    pub fn line(&mut self, text: impl AsRef<str>) -> Result<()> {
        writeln!(self, "{}", text.as_ref()).map_err(failed)
    }

    /// One line of somebody who has more to do than to print: a closed pipe does not end the process.
    pub fn to_the_end(text: &str) -> io::Result<()> {
        writeln!(io::stdout(), "{text}")
    }

    /// A value as JSON, indented.
    pub fn json(&mut self, value: &impl Serialize) -> Result<()> {
        serde_json::to_writer_pretty(&mut *self, value).map_err(|e| failed(e.into()))?;
        self.line("")
    }
}

fn failed(e: io::Error) -> Error {
    Error::io("standard output", e)
}

impl Write for Out {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        end_on_closed_pipe(self.0.write(buf))
    }

    fn flush(&mut self) -> io::Result<()> {
        end_on_closed_pipe(self.0.flush())
    }
}

fn end_on_closed_pipe<T>(outcome: io::Result<T>) -> io::Result<T> {
    if outcome.as_ref().is_err_and(|e| e.kind() == ErrorKind::BrokenPipe) {
        std::process::exit(0);
    }
    outcome
}

/// One message on standard error, whether or not anybody reads it.
pub fn complain(text: &str) {
    let _ = writeln!(io::stderr(), "{text}");
}

/// Colours, where standard output is a terminal and NO_COLOR is not set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Style {
    colour: bool,
}

impl Style {
    /// As standard output wants it.
    pub fn of_stdout() -> Style {
        let refused = |name: &str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
        let dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        Style { colour: io::stdout().is_terminal() && !refused("NO_COLOR") && !dumb }
    }

    fn paint(self, code: &str, text: &str) -> String {
        if self.colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }

    /// Headings.
    pub fn bold(self, text: &str) -> String {
        self.paint("1", text)
    }

    /// What needs an operator.
    pub fn bad(self, text: &str) -> String {
        self.paint("31", text)
    }

    /// What was found to be right.
    pub fn good(self, text: &str) -> String {
        self.paint("32", text)
    }
}

/// Rows under headings, columns aligned. A heading that begins with `>` aligns its column to the right.
#[derive(Debug)]
pub struct Table {
    headings: Vec<&'static str>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table without rows.
    pub fn new(headings: &[&'static str]) -> Table {
        Table { headings: headings.to_vec(), rows: Vec::new() }
    }

    /// Adds a row of as many cells as there are headings.
    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().map(|cell| printable(&cell)).collect());
    }

    /// Lines, the headings first; no lines where there are no rows.
    pub fn lines(&self, style: Style) -> Vec<String> {
        if self.rows.is_empty() {
            return Vec::new();
        }
        let titles: Vec<String> = self.headings.iter().map(|h| h.trim_start_matches('>').to_owned()).collect();
        let width = |column: usize| {
            let cells = self.rows.iter().chain([&titles]).filter_map(|row| row.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..titles.len()).map(width).collect();
        let line = |row: &Vec<String>| {
            let cells = row.iter().zip(&widths).zip(&self.headings).map(|((cell, &width), heading)| {
                if heading.starts_with('>') { format!("{cell:>width$}") } else { format!("{cell:<width$}") }
            });
            cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
        };
        std::iter::once(style.bold(&line(&titles))).chain(self.rows.iter().map(line)).collect()
    }

    /// Writes the lines.
    pub fn print(&self, out: &mut Out) -> Result<()> {
        self.lines(Style::of_stdout()).iter().try_for_each(|line| out.line(line))
    }
}

/// Names come from users: what would steer a terminal is shown, not obeyed.
pub fn printable(text: &str) -> String {
    if !text.chars().any(char::is_control) {
        return text.to_owned();
    }
    text.chars().map(|c| if c.is_control() { c.escape_default().to_string() } else { c.to_string() }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_and_colour_is_left_out() {
        let mut table = Table::new(&["NAME", ">SIZE", "IMAGE"]);
        table.row(["a".into(), "10".into(), "/x".into()]);
        table.row(["längst".into(), "1".into(), "\x1b[31m".into()]);
        let plain = Style { colour: false };
        assert_eq!(table.lines(plain), ["NAME    SIZE  IMAGE", "a         10  /x", "längst     1  \\u{1b}[31m"]);
        assert_eq!(plain.bad("x"), "x");
        assert_eq!(Style { colour: true }.bad("x"), "\x1b[31mx\x1b[0m");
        assert!(Table::new(&["A"]).lines(plain).is_empty());
    }
}
