//! The command line: parses, calls, prints.

use std::process::ExitCode;

fn main() -> ExitCode {
    fleecefs::cli::main()
}
