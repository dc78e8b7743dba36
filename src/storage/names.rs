//! The names in a directory that lies in memory: what the fakes of [`super::Dir`] share.

use crate::error::{Error, Result, errno};
use std::collections::BTreeMap;

/// Checks that a name stays in its directory. `""` is the directory itself, where `or_whole` allows it.
pub(super) fn check_name(name: &str, or_whole: bool) -> Result<()> {
    let plain = |part: &str| !part.is_empty() && part != "." && part != ".." && !part.contains('\0');
    if (or_whole && name.is_empty()) || name.split('/').all(plain) {
        return Ok(());
    }
    Err(Error::new(errno::EINVAL, format!("file name '{}'", name.escape_debug()), "leads out of its directory"))
}

/// The name of the subdirectory that `name` lies in.
pub(super) fn parent_of(name: &str) -> &str {
    name.rsplit_once('/').map_or("", |(parent, _)| parent)
}

/// A tree of names for files `F`, with the rules of a Unix directory.
#[derive(Debug, Clone)]
pub(super) struct Names<F> {
    /// By full name; `None` is a subdirectory.
    entries: BTreeMap<String, Option<F>>,
}

impl<F> Names<F> {
    pub fn new() -> Self {
        Names { entries: BTreeMap::new() }
    }

    /// The files of all names.
    pub fn files(&self) -> impl Iterator<Item = &F> {
        self.entries.values().flatten()
    }

    pub fn file(&self, name: &str) -> Result<&F> {
        match self.entries.get(name) {
            Some(Some(file)) => Ok(file),
            Some(None) => Err(refused("open", name, errno::EISDIR, "Is a directory")),
            None => Err(refused("open", name, errno::ENOENT, "No such file or directory")),
        }
    }

    pub fn exists(&self, name: &str) -> bool {
        name.is_empty() || self.entries.contains_key(name)
    }

    /// Adds a file, and the subdirectories on the way to it.
    pub fn create(&mut self, name: &str, file: F) -> Result<()> {
        if self.entries.contains_key(name) {
            return Err(refused("create", name, errno::EEXIST, "File exists"));
        }
        let mut parent = parent_of(name);
        while !parent.is_empty() {
            if self.entries.get(parent).is_some_and(Option::is_some) {
                return Err(refused("create", name, errno::ENOTDIR, "Not a directory"));
            }
            parent = parent_of(parent);
        }
        parent = parent_of(name);
        while !parent.is_empty() {
            self.entries.insert(parent.to_owned(), None);
            parent = parent_of(parent);
        }
        self.entries.insert(name.to_owned(), Some(file));
        Ok(())
    }

    pub fn remove(&mut self, name: &str) {
        for entry in self.below(name) {
            self.entries.remove(&entry);
        }
        self.entries.remove(name);
    }

    pub fn rename(&mut self, from: &str, to: &str) -> Result<()> {
        let refused = |errno, why| Err(refused(&format!("rename to {to}"), from, errno, why));
        if !self.entries.contains_key(from) || !self.is_dir(parent_of(to)) {
            return refused(errno::ENOENT, "No such file or directory");
        }
        if from == to {
            return Ok(());
        }
        match (self.is_dir(from), self.is_dir(to)) {
            (false, true) => return refused(errno::EISDIR, "Is a directory"),
            (true, false) if self.exists(to) => return refused(errno::ENOTDIR, "Not a directory"),
            (true, true) if !self.below(to).is_empty() => return refused(errno::ENOTEMPTY, "Directory not empty"),
            (true, _) if to.starts_with(&format!("{from}/")) => return refused(errno::EINVAL, "Invalid argument"),
            _ => (),
        }
        for name in self.below(from).into_iter().chain([from.to_owned()]) {
            if let Some(entry) = self.entries.remove(&name) {
                self.entries.insert(format!("{to}{}", &name[from.len()..]), entry);
            }
        }
        Ok(())
    }

    /// The names of what lies in a subdirectory itself.
    pub fn list(&self, sub: &str) -> Vec<String> {
        let names = self.entries.keys().filter(|name| parent_of(name) == sub);
        names.map(|name| name[sub.len()..].trim_start_matches('/').to_owned()).collect()
    }

    /// The full names of everything below a subdirectory.
    fn below(&self, sub: &str) -> Vec<String> {
        let prefix = format!("{sub}/");
        self.entries.keys().filter(|name| name.starts_with(&prefix)).cloned().collect()
    }

    fn is_dir(&self, name: &str) -> bool {
        name.is_empty() || matches!(self.entries.get(name), Some(None))
    }
}

fn refused(what: &str, name: &str, errno: i32, why: &str) -> Error {
    Error::new(errno, what, why).at_path(name)
}
