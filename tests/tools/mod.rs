//! Outside tools that tests need.

use std::io::Write;
use std::process::Command;

/// Whether all of them are there; one `skip` line where they are not, a failure where nothing may be skipped.
pub fn has_tools(test: &str, tools: &[&str]) -> bool {
    let found = |tool: &&str| Command::new(tool).arg("--version").output().is_ok_and(|out| out.status.success());
    if tools.iter().all(found) {
        return true;
    }
    let tools = tools.join(", ");
    assert!(std::env::var_os("FLEECEFS_REQUIRE_TOOLS").is_none(), "{test}: without {tools}");
    let _ = writeln!(std::io::stderr(), "skip {test}: without {tools}");
    false
}
