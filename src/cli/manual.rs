//! Completions and man pages, made from what the command line says of itself: they cannot fall behind it.

use super::{Cli, Exit};
use crate::error::{Error, Result};
use clap::{Args, CommandFactory};
use clap_complete::Shell;
use std::fs;
use std::io::Write;
use std::path::PathBuf;

/// Arguments of `completions`.
#[derive(Debug, Args)]
pub struct CompletionsArgs {
    /// The shell
    shell: Shell,
}

/// Arguments of `man-pages`.
#[derive(Debug, Args)]
pub struct ManPagesArgs {
    /// Where to put them: made if it is not there
    dir: PathBuf,
}

impl CompletionsArgs {
    /// Prints the script.
    pub fn run(&self) -> Result<Exit> {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut Cli::command(), "fleecefs", &mut script);
        super::output::Out::new().write_all(&script).map_err(|e| Error::io("standard output", e))?;
        Ok(Exit::Done)
    }
}

impl ManPagesArgs {
    /// Writes a page for each command.
    pub fn run(&self) -> Result<Exit> {
        let failed = |e| Error::io("write man pages", e).at_path(&self.dir);
        fs::create_dir_all(&self.dir).map_err(failed)?;
        let command = Cli::command().disable_help_subcommand(true);
        clap_mangen::generate_to(command, &self.dir).map_err(failed)?;
        Ok(Exit::Done)
    }
}
