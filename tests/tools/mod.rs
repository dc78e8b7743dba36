//! Outside tools that tests need.

use std::io::Write;

/// Whether all of them are there; one `skip` line where they are not, a failure where nothing may be skipped.
pub fn has_tools(test: &str, tools: &[&str]) -> bool {
    let paths = std::env::var_os("PATH").unwrap_or_default();
    let found = |tool: &&str| std::env::split_paths(&paths).any(|dir| dir.join(tool).is_file());
    if tools.iter().all(found) {
        return true;
    }
    let tools = tools.join(", ");
    assert!(std::env::var_os("FLEECEFS_REQUIRE_TOOLS").is_none(), "{test}: without {tools}");
    let _ = writeln!(std::io::stderr(), "skip {test}: without {tools}");
    false
}
