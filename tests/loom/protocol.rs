//! The rules alone. Every cell holds [`OLD`] or [`NEW`]; a view must see [`OLD`] or say that it cannot.

use super::explore::{acts, always};
use loom::sync::Mutex;
use loom::sync::atomic::{AtomicU64, Ordering, fence};
use std::sync::Arc;

const OLD: u64 = 1;
const NEW: u64 = 2;
/// What a punched or never written store holds.
const HOLE: u64 = 0;

/// Which full fences stand, and what is done in the wrong order.
#[derive(Clone, Copy)]
struct Rules {
    /// Between the state and the guest's write (I2).
    guest_fence: Option<Ordering>,
    /// Between the view's read and its second look (I3).
    view_fence: Option<Ordering>,
    /// The state is set before the store is written.
    state_first: bool,
    /// The second look comes before the read of the image.
    look_first: bool,
}

const RIGHT: Rules = Rules {
    guest_fence: Some(Ordering::SeqCst),
    view_fence: Some(Ordering::SeqCst),
    state_first: false,
    look_first: false,
};

fn fence_if(order: Option<Ordering>) {
    if let Some(order) = order {
        fence(order);
    }
}

/// One chunk in one layer. The state's own orders are those of the product's bits: release to set, acquire to look.
struct Chunk {
    image: AtomicU64,
    store: AtomicU64,
    state: AtomicU64,
    stripe: Mutex<()>,
}

impl Chunk {
    fn new() -> Arc<Chunk> {
        Arc::new(Chunk {
            image: AtomicU64::new(OLD),
            store: AtomicU64::new(HOLE),
            state: AtomicU64::new(0),
            stripe: Mutex::new(()),
        })
    }

    fn is_set(&self) -> bool {
        self.state.load(Ordering::Acquire) != 0
    }

    fn preserve(&self, rules: Rules) {
        let _claim = self.stripe.lock().unwrap();
        if self.is_set() {
            return;
        }
        if rules.state_first {
            self.state.fetch_or(1, Ordering::AcqRel);
        }
        self.store.store(self.image.load(Ordering::Relaxed), Ordering::Relaxed);
        self.state.fetch_or(1, Ordering::AcqRel);
    }

    fn guest_writes(&self, rules: Rules) {
        if !self.is_set() {
            self.preserve(rules);
        }
        fence_if(rules.guest_fence);
        self.image.store(NEW, Ordering::Relaxed);
    }

    fn view_reads(&self, rules: Rules) -> u64 {
        if self.is_set() {
            return self.store.load(Ordering::Relaxed);
        }
        let (answer, set) = if rules.look_first {
            let set = self.is_set();
            fence_if(rules.view_fence);
            (self.image.load(Ordering::Relaxed), set)
        } else {
            let answer = self.image.load(Ordering::Relaxed);
            fence_if(rules.view_fence);
            (answer, self.is_set())
        };
        if set { self.store.load(Ordering::Relaxed) } else { answer }
    }
}

/// A first writer of a chunk against a view.
fn frozen_under(rules: Rules) -> bool {
    always(None, move || {
        let chunk = Chunk::new();
        let guest = chunk.clone();
        [acts(move || guest.guest_writes(rules)), Box::new(move || chunk.view_reads(rules) == OLD)]
    })
}

#[test]
fn preserve_before_overwrite_and_look_again_after_the_read() {
    assert!(frozen_under(RIGHT));
}

/// Release and acquire on the state alone are not enough: nothing orders the image against it.
#[test]
fn without_fences_a_view_sees_the_guests_write() {
    assert!(!frozen_under(Rules { guest_fence: None, view_fence: None, ..RIGHT }));
}

#[test]
fn without_the_guests_fence_a_view_sees_the_guests_write() {
    assert!(!frozen_under(Rules { guest_fence: None, ..RIGHT }));
}

#[test]
fn without_the_views_fence_a_view_sees_the_guests_write() {
    assert!(!frozen_under(Rules { view_fence: None, ..RIGHT }));
}

/// What the pattern asks of the C11 rules is a release fence and an acquire fence; the product's are full ones, which
/// also order what those rules do not speak of: the loads and stores of system calls and devices around them.
#[test]
fn a_release_and_an_acquire_fence_carry_the_pattern() {
    let rules = Rules { guest_fence: Some(Ordering::Release), view_fence: Some(Ordering::Acquire), ..RIGHT };
    assert!(frozen_under(rules));
}

#[test]
fn with_the_state_before_the_store_a_view_sees_a_hole() {
    assert!(!frozen_under(Rules { state_first: true, ..RIGHT }));
}

#[test]
fn with_the_second_look_before_the_read_a_view_sees_the_guests_write() {
    assert!(!frozen_under(Rules { look_first: true, ..RIGHT }));
}

/// A writer that finds the chunk copied takes no stripe and copies nothing, but passes the fence.
#[test]
fn a_second_writer_of_a_copied_chunk_needs_the_fence_too() {
    let with = |fence_of_second: Option<Ordering>| {
        always(None, move || {
            let chunk = Chunk::new();
            let (first, second) = (chunk.clone(), chunk.clone());
            [
                // Held up before its own fence, which loom would run at once with what precedes it.
                acts(move || first.preserve(RIGHT)),
                acts(move || {
                    if second.is_set() {
                        fence_if(fence_of_second);
                        second.image.store(NEW, Ordering::Relaxed);
                    }
                }),
                Box::new(move || chunk.view_reads(RIGHT) == OLD),
            ]
        })
    };
    assert!(with(Some(Ordering::SeqCst)));
    assert!(!with(None), "seen through two other threads, the state is not ordered before the write");
}

/// Two layers under a chain that is published as a whole: bit 0 stands for the older, bit 1 for the newer layer.
struct Layered {
    image: AtomicU64,
    stores: [AtomicU64; 2],
    states: [AtomicU64; 2],
    chain: AtomicU64,
    gate: Mutex<()>,
}

impl Layered {
    fn new(chain: u64) -> Arc<Layered> {
        Arc::new(Layered {
            image: AtomicU64::new(OLD),
            stores: [AtomicU64::new(HOLE), AtomicU64::new(HOLE)],
            states: [AtomicU64::new(0), AtomicU64::new(0)],
            chain: AtomicU64::new(chain),
            gate: Mutex::new(()),
        })
    }

    fn first_set(&self, chain: u64) -> Option<usize> {
        (0..2).find(|layer| chain & 1 << layer != 0 && self.states[*layer].load(Ordering::Acquire) != 0)
    }

    /// A view of the older layer. `fresh`: the second look walks the chain as it is after the read.
    fn view_reads(&self, fresh: bool) -> u64 {
        let chain = self.chain.load(Ordering::Acquire);
        if let Some(layer) = self.first_set(chain) {
            return self.stores[layer].load(Ordering::Relaxed);
        }
        let answer = self.image.load(Ordering::Relaxed);
        fence(Ordering::SeqCst);
        let chain = if fresh { self.chain.load(Ordering::Acquire) } else { chain };
        match self.first_set(chain) {
            Some(layer) => self.stores[layer].load(Ordering::Relaxed),
            None => answer,
        }
    }

    fn copy(&self, layer: usize, content: u64) {
        self.stores[layer].store(content, Ordering::Relaxed);
        self.states[layer].fetch_or(1, Ordering::AcqRel);
        fence(Ordering::SeqCst);
    }
}

/// I4: a freeze, then a write whose copy goes to the new layer.
fn frozen_while_a_layer_is_pushed(fresh: bool) -> bool {
    always(None, move || {
        let disk = Layered::new(0b01);
        let other = disk.clone();
        [
            acts(move || {
                {
                    let _exclusive = other.gate.lock().unwrap();
                    other.chain.store(0b11, Ordering::Release);
                }
                let _shared = other.gate.lock().unwrap();
                other.copy(1, other.image.load(Ordering::Relaxed));
                other.image.store(NEW, Ordering::Relaxed);
            }),
            Box::new(move || disk.view_reads(fresh) == OLD),
        ]
    })
}

#[test]
fn the_second_look_walks_the_chain_as_it_is_after_the_read() {
    assert!(frozen_while_a_layer_is_pushed(true));
    assert!(!frozen_while_a_layer_is_pushed(false));
}

/// I4: the newer layer holds the chunk, is hidden, and is folded into the older one; the image is new already.
fn frozen_while_a_layer_is_folded(copy_first: bool) -> bool {
    always(None, move || {
        let disk = Layered::new(0b11);
        disk.copy(1, OLD);
        disk.image.store(NEW, Ordering::Relaxed);
        let folder = disk.clone();
        [
            acts(move || {
                if !copy_first {
                    folder.chain.store(0b01, Ordering::Release);
                }
                folder.copy(0, folder.stores[1].load(Ordering::Relaxed));
                folder.chain.store(0b01, Ordering::Release);
            }),
            Box::new(move || disk.view_reads(true) == OLD),
        ]
    })
}

#[test]
fn a_fold_publishes_the_shorter_chain_after_the_copies() {
    assert!(frozen_while_a_layer_is_folded(true));
    assert!(!frozen_while_a_layer_is_folded(false));
}

/// I7: the store fails, so the guest sets a flag in the place of a copy, then writes.
fn right_or_refused(flag_first: bool, guest_fence: bool, looked_at_last: bool) -> bool {
    always(None, move || {
        let chunk = Chunk::new();
        let broken = Arc::new(AtomicU64::new(0));
        let (guest, flag) = (chunk.clone(), broken.clone());
        [
            acts(move || {
                if flag_first {
                    flag.swap(1, Ordering::SeqCst);
                }
                if guest_fence {
                    fence(Ordering::SeqCst);
                }
                guest.image.store(NEW, Ordering::Relaxed);
                if !flag_first {
                    flag.swap(1, Ordering::SeqCst);
                }
            }),
            Box::new(move || {
                let early = broken.load(Ordering::SeqCst) != 0;
                let answer = chunk.view_reads(RIGHT);
                fence(Ordering::SeqCst);
                let refused = if looked_at_last { broken.load(Ordering::SeqCst) != 0 } else { early };
                refused || answer == OLD
            }),
        ]
    })
}

#[test]
fn broken_is_set_before_the_write_and_looked_at_last() {
    assert!(right_or_refused(true, true, true));
    assert!(!right_or_refused(false, true, true), "set after the write");
    assert!(!right_or_refused(true, false, true), "no fence between flag and write");
    assert!(!right_or_refused(true, true, false), "looked at first");
}

/// I7: a release of a chunk that was copied: marked, then punched.
fn released_or_right(mark_first: bool, looked_at_last: bool) -> bool {
    always(None, move || {
        let chunk = Chunk::new();
        chunk.preserve(RIGHT);
        chunk.image.store(NEW, Ordering::Relaxed);
        let released = Arc::new(AtomicU64::new(0));
        let (store, mark) = (chunk.clone(), released.clone());
        [
            acts(move || {
                if mark_first {
                    mark.fetch_or(1, Ordering::AcqRel);
                    fence(Ordering::SeqCst);
                }
                store.store.store(HOLE, Ordering::Relaxed);
                fence(Ordering::SeqCst);
                mark.fetch_or(1, Ordering::AcqRel);
            }),
            Box::new(move || {
                let early = released.load(Ordering::Acquire) != 0;
                let answer = chunk.view_reads(RIGHT);
                fence(Ordering::SeqCst);
                let refused = if looked_at_last { released.load(Ordering::Acquire) != 0 } else { early };
                refused || answer == OLD
            }),
        ]
    })
}

#[test]
fn released_is_marked_before_the_punch_and_looked_at_last() {
    assert!(released_or_right(true, true));
    assert!(!released_or_right(false, true), "punched before the mark");
    assert!(!released_or_right(true, false), "looked at first");
}
