//! Block nodes of the drivers `file` and `host_device`: names for files, for disks to be served from.
//!
//! A disk is a node too, but the core keeps those. A file node opens and locks nothing: the disk over it does.
//!
//! Invariants: no two nodes have one name, whatever comes at the same time; a file node stays while a disk lies on it or
//! is being opened over it. No lock is held while a disk is opened.

use crate::fleece::{Disk, Fleece};
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use uuid::Uuid;

/// A file under a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileNode {
    /// `file` or `host_device`.
    pub driver: &'static str,
    /// Where the file is.
    pub filename: PathBuf,
    /// Whether disks over it refuse the guest's writes.
    pub read_only: bool,
    /// Whether others may write to it meanwhile.
    pub force_share: bool,
}

#[derive(Debug, Default)]
struct Table {
    /// By name, with the disks that were opened over them. Some of these may have gone.
    files: BTreeMap<String, (FileNode, Vec<Uuid>)>,
    /// Nodes that jobs use, each as often as it is used.
    occupied: Vec<(String, Role)>,
    /// Disks that are being opened, with the file node that they are to lie on.
    opening: BTreeMap<String, Option<String>>,
}

/// The file nodes of a daemon, by name.
#[derive(Debug, Default)]
pub struct Nodes(Arc<Mutex<Table>>);

/// What a node is to a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// It is read; several jobs may do that.
    Source,
    /// It is written to, by this job alone.
    Target,
}

/// A node that a job uses, until this goes.
#[derive(Debug)]
pub struct Occupied {
    table: Arc<Mutex<Table>>,
    name: String,
    role: Role,
}

/// A name is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Duplicate;

/// What a file node is used by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User(pub String);

/// The name of a disk that is being opened; free again, or the disk's, when this goes.
#[derive(Debug)]
pub struct Opening<'a> {
    nodes: &'a Nodes,
    name: String,
}

impl Table {
    fn is_taken(&self, name: &str, fleece: &Fleece) -> bool {
        self.files.contains_key(name) || self.opening.contains_key(name) || fleece.disk(name).is_ok()
    }

    fn user(&self, name: &str, fleece: &Fleece) -> Option<User> {
        let opening = self.opening.iter().find(|(_, file)| file.as_deref() == Some(name));
        if let Some((disk, _)) = opening {
            return Some(User(disk.clone()));
        }
        let (_, users) = self.files.get(name)?;
        let disk = fleece.disks().into_iter().find(|disk| users.contains(&disk.uuid()))?;
        Some(User(disk.name().to_owned()))
    }
}

impl Nodes {
    /// Adds a file node.
    pub fn add(&self, name: &str, file: FileNode, fleece: &Fleece) -> Result<(), Duplicate> {
        let mut table = self.0.lock();
        if table.is_taken(name, fleece) {
            return Err(Duplicate);
        }
        table.files.insert(name.to_owned(), (file, Vec::new()));
        Ok(())
    }

    /// Removes a file node; false where there is none of this name.
    pub fn remove(&self, name: &str, fleece: &Fleece) -> Result<bool, User> {
        let mut table = self.0.lock();
        match table.user(name, fleece) {
            Some(user) => Err(user),
            None => Ok(table.files.remove(name).is_some()),
        }
    }

    /// Notes that a job uses a node; its name where that cannot be.
    pub fn occupy(&self, name: &str, role: Role) -> Result<Occupied, String> {
        let mut table = self.0.lock();
        let mut others = table.occupied.iter().filter(|(other, _)| other == name);
        if others.any(|(_, other)| role == Role::Target || *other == Role::Target) {
            return Err(name.to_owned());
        }
        table.occupied.push((name.to_owned(), role));
        Ok(Occupied { table: self.0.clone(), name: name.to_owned(), role })
    }

    /// Whether a job uses a node.
    pub fn is_occupied(&self, name: &str) -> bool {
        self.0.lock().occupied.iter().any(|(other, _)| other == name)
    }

    /// All file nodes, by name.
    pub fn list(&self) -> Vec<(String, FileNode)> {
        self.0.lock().files.iter().map(|(name, (file, _))| (name.clone(), file.clone())).collect()
    }

    /// Keeps a name for a disk that is to be opened, over a file node where `below` names one that there is.
    pub fn begin(&self, name: &str, below: Option<&str>, fleece: &Fleece) -> Result<Opening<'_>, Duplicate> {
        let mut table = self.0.lock();
        if table.is_taken(name, fleece) {
            return Err(Duplicate);
        }
        table.opening.insert(name.to_owned(), below.map(str::to_owned));
        Ok(Opening { nodes: self, name: name.to_owned() })
    }

    /// One file node.
    pub fn get(&self, name: &str) -> Option<FileNode> {
        self.0.lock().files.get(name).map(|(file, _)| file.clone())
    }
}

impl Opening<'_> {
    /// The disk is open.
    pub fn done(self, disk: &Arc<Disk>) {
        let mut table = self.nodes.0.lock();
        if let Some(Some(below)) = table.opening.get(&self.name).cloned()
            && let Some((_, users)) = table.files.get_mut(&below)
        {
            users.push(disk.uuid());
        }
    }
}

impl Drop for Occupied {
    fn drop(&mut self) {
        let mut table = self.table.lock();
        let own = table.occupied.iter().position(|(name, role)| *name == self.name && *role == self.role);
        own.into_iter().for_each(|index| {
            table.occupied.swap_remove(index);
        });
    }
}

impl Drop for Opening<'_> {
    fn drop(&mut self) {
        self.nodes.0.lock().opening.remove(&self.name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleece::Options;

    #[test]
    fn names_are_unique_and_a_file_stays_while_a_disk_opens_over_it() {
        let fleece = Fleece::new(Options::default());
        let nodes = Nodes::default();
        let file = FileNode { driver: "file", filename: "/x".into(), read_only: false, force_share: false };
        nodes.add("f", file.clone(), &fleece).unwrap();
        assert_eq!(nodes.add("f", file.clone(), &fleece), Err(Duplicate));
        assert!(nodes.begin("f", None, &fleece).is_err());
        let opening = nodes.begin("d", Some("f"), &fleece).unwrap();
        assert_eq!(nodes.add("d", file.clone(), &fleece), Err(Duplicate));
        assert!(nodes.begin("d", None, &fleece).is_err());
        assert_eq!(nodes.remove("f", &fleece), Err(User("d".into())));
        drop(opening);
        assert_eq!(nodes.remove("f", &fleece), Ok(true));
        assert_eq!(nodes.remove("f", &fleece), Ok(false));
        nodes.add("d", file, &fleece).unwrap();
        assert_eq!(nodes.list().len(), 1);
    }
}
