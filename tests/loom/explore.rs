//! How executions are explored, and how their outcome is told.

use loom::thread::{Builder, JoinHandle};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Setting up the core takes more steps than loom allows at first.
const MAX_BRANCHES: usize = 100_000;
/// Stacks in words: the core does not fit in those that loom gives.
const STACK_WORDS: usize = 64 << 10;

/// One thread of a model: says whether what it saw was right.
pub type Body = Box<dyn FnOnce() -> bool + Send>;

/// Explores the executions of the threads that `bodies` makes, with at most `preemptions` (None: any number); true
/// where each thread was right in all of them.
///
/// loom starts from the schedule in which the threads run one after the other as they were made, and branches off where
/// an access races the *last* one of that cell. A thread that loads a cell before it stores to it so hides the earlier
/// loads of others from its store, and whole executions are never tried. Hence every order is a start of its own.
///
/// A violation is carried out of the model, not panicked: loom explores on, and mutants end in order.
pub fn always<const N: usize>(
    preemptions: Option<usize>,
    bodies: impl Fn() -> [Body; N] + Send + Sync + 'static,
) -> bool {
    let bodies = Arc::new(bodies);
    let executions = Arc::new(AtomicU64::new(0));
    let right = orders(N).into_iter().all(|order| {
        let violated = Arc::new(AtomicBool::new(false));
        let (seen, bodies, count) = (violated.clone(), bodies.clone(), executions.clone());
        let mut builder = loom::model::Builder::new();
        builder.max_branches = MAX_BRANCHES;
        builder.preemption_bound = preemptions;
        builder.check(move || {
            count.fetch_add(1, Ordering::SeqCst);
            let (bodies, order) = (bodies.clone(), order.clone());
            let all = spawn(move || {
                let mut bodies = bodies().map(Some);
                let threads: Vec<_> = order.iter().filter_map(|index| bodies[*index].take()).map(spawn).collect();
                let right: Vec<bool> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
                !right.contains(&false)
            });
            if !all.join().unwrap() {
                seen.store(true, Ordering::SeqCst);
            }
        });
        !violated.load(Ordering::SeqCst)
    });
    eprintln!("{} executions", executions.load(Ordering::SeqCst));
    right
}

fn spawn(body: impl FnOnce() -> bool + Send + 'static) -> JoinHandle<bool> {
    Builder::new().stack_size(STACK_WORDS).spawn(body).unwrap()
}

/// All orders of `count` threads.
fn orders(count: usize) -> Vec<Vec<usize>> {
    match count {
        0 => vec![vec![]],
        _ => orders(count - 1)
            .into_iter()
            .flat_map(|order| (0..count).map(move |at| [&order[..at], &[count - 1], &order[at..]].concat()))
            .collect(),
    }
}

/// A thread whose part is to act; the others see what it does.
pub fn acts(body: impl FnOnce() + Send + 'static) -> Body {
    Box::new(move || {
        body();
        true
    })
}
