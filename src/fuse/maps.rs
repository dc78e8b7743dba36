//! Maps that were looked at lately, so that `stat`, `open` and `read` of one file make it once.
//!
//! Each key is made by one thread at a time while the others wait for it; failures are not kept. The count is
//! bounded, and [`Recent::retain`] lets go of what belongs to snapshots that are gone.

use crate::error::Result;
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::sync::Arc;

type Slot<V> = Arc<Mutex<Option<Arc<V>>>>;

/// The last few values by key, the most recently used in front.
pub struct Recent<K, V> {
    capacity: usize,
    slots: Mutex<VecDeque<(K, Slot<V>)>>,
}

impl<K: Copy + Eq, V> Recent<K, V> {
    /// Keeps at most `capacity` values.
    pub fn new(capacity: usize) -> Self {
        Recent { capacity, slots: Mutex::default() }
    }

    /// The value of `key`, made by `make` where it is not kept.
    pub fn get(&self, key: K, make: impl FnOnce() -> Result<Arc<V>>) -> Result<Arc<V>> {
        let slot = self.slot(key);
        // Held while the value is made: that is what makes the others wait for it.
        let mut value = slot.lock();
        if let Some(value) = &*value {
            return Ok(value.clone());
        }
        let made = make()?;
        *value = Some(made.clone());
        Ok(made)
    }

    fn slot(&self, key: K) -> Slot<V> {
        let mut slots = self.slots.lock();
        let found = slots.iter().position(|(k, _)| *k == key).and_then(|index| slots.remove(index));
        let (key, slot) = found.unwrap_or_else(|| (key, Slot::default()));
        slots.push_front((key, slot.clone()));
        slots.truncate(self.capacity);
        slot
    }

    /// Lets go of every value whose key `keep` refuses.
    pub fn retain(&self, keep: impl Fn(&K) -> bool) {
        self.slots.lock().retain(|(key, _)| keep(key));
    }

    /// Whether there is nothing to let go of.
    pub fn is_empty(&self) -> bool {
        self.slots.lock().is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{Error, errno};
    use std::cell::Cell;

    #[test]
    fn a_value_is_made_once_and_the_oldest_one_goes() {
        let recent = Recent::new(2);
        let made = Cell::new(0);
        let get = |key: u32| {
            *recent
                .get(key, || {
                    made.set(made.get() + 1);
                    Ok(Arc::new(key * 10))
                })
                .unwrap()
        };
        assert_eq!((get(1), get(1), get(2), get(1)), (10, 10, 20, 10));
        assert_eq!(made.get(), 2);
        get(3);
        get(1);
        assert_eq!(made.get(), 3, "1 was used after 2, so 2 went");
        get(2);
        assert_eq!(made.get(), 4);
        recent.retain(|key| *key != 2);
        get(1);
        assert_eq!(made.get(), 4);
        get(2);
        assert_eq!(made.get(), 5);
    }

    #[test]
    fn a_failure_is_not_kept() {
        let recent: Recent<u32, u32> = Recent::new(2);
        assert!(recent.get(1, || Err(Error::new(errno::EIO, "map", "no"))).is_err());
        assert_eq!(*recent.get(1, || Ok(Arc::new(7))).unwrap(), 7);
    }
}
