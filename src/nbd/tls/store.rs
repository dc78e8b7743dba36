//! Credentials by name, as `object-add` makes them and `nbd-server-start` asks for them.
//!
//! A server that listens keeps what it was started with: removing a name ends nothing.

use super::{Credentials, load};
use crate::error::{Error, Result, errno};
use crate::nbd::transport::Tls;
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::sync::Arc;

/// See the module.
#[derive(Default)]
pub struct Store {
    by_id: Mutex<BTreeMap<String, Arc<dyn Tls>>>,
}

impl Store {
    /// Loads credentials and gives them a name. EEXIST where it is taken.
    pub fn add(&self, id: &str, credentials: &Credentials) -> Result<()> {
        let taken = || Error::new(errno::EEXIST, format!("credentials '{id}'"), "the name is taken");
        if self.by_id.lock().contains_key(id) {
            return Err(taken());
        }
        let loaded = load(credentials)?;
        match self.by_id.lock().entry(id.to_owned()) {
            std::collections::btree_map::Entry::Occupied(_) => Err(taken()),
            std::collections::btree_map::Entry::Vacant(place) => {
                place.insert(loaded);
                Ok(())
            }
        }
    }

    /// Forgets a name; whether there was one.
    pub fn remove(&self, id: &str) -> bool {
        self.by_id.lock().remove(id).is_some()
    }

    /// What has that name.
    pub fn get(&self, id: &str) -> Option<Arc<dyn Tls>> {
        self.by_id.lock().get(id).cloned()
    }
}
