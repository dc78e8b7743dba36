//! The fuzz targets on any toolchain: every seed, and a bounded number of mutations of the seeds, the same in each run.
//!
//! What fails is written to a file below `target/fuzz-failures`, and the message says how to run it again.
//! `contrib/fuzz` drives the same targets under libFuzzer, with coverage guidance.

#![cfg(not(feature = "shuttle"))]

#[path = "../fuzz/src/lib.rs"]
mod fuzz;

use fuzz::{Target, mutate, mutation, run};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// An input runs alone instead of the corpus where this names its file.
const INPUT_VARIABLE: &str = "FLEECEFS_FUZZ_INPUT";
/// An input that takes longer hangs.
const HANG: Duration = Duration::from_secs(300);

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The seeds, in order of their names.
fn seeds(name: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let dir = root().join("fuzz/corpus").join(name);
    let mut paths: Vec<_> = std::fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    assert!(paths.len() > 20, "{}: {} seeds", dir.display(), paths.len());
    paths.into_iter().map(|path| (path.clone(), std::fs::read(path).unwrap())).collect()
}

/// What runs now: since when, the input, and the words for it.
type Running = Arc<Mutex<Option<(Instant, Vec<u8>, String)>>>;

/// Ends the process, with the words for it, where one input takes too long.
fn watch(name: &'static str, running: &Running) {
    let running = Arc::downgrade(running);
    std::thread::spawn(move || {
        while let Some(running) = running.upgrade() {
            if let Some((since, input, what)) = &*running.lock().unwrap()
                && since.elapsed() > HANG
            {
                eprintln!("{what} hangs; {}", keep(name, input));
                std::process::abort();
            }
            drop(running);
            std::thread::sleep(Duration::from_secs(1));
        }
    });
}

/// Keeps an input that fails, and says how to run it again.
fn keep(name: &str, input: &[u8]) -> String {
    let path = root().join(format!("target/fuzz-failures/{name}-{:08x}", crc32c::crc32c(input)));
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(&path, input).unwrap();
    let path = path.display();
    format!(
        "run it again with: {INPUT_VARIABLE}={path} cargo test --test fuzz_corpus {name}\n  \
         or, under libFuzzer, with: contrib/fuzz {name} {path}"
    )
}

fn attempt(name: &str, target: Target, input: &[u8], what: String, running: &Running) {
    *running.lock().unwrap() = Some((Instant::now(), input.to_vec(), what.clone()));
    let result = catch_unwind(AssertUnwindSafe(|| run(target, input)));
    *running.lock().unwrap() = None;
    assert!(result.is_ok(), "{what} fails; {}", keep(name, input));
}

fn fuzz(name: &'static str, target: Target, mutations: u64) {
    if let Some(path) = std::env::var_os(INPUT_VARIABLE) {
        return run(target, &std::fs::read(path).unwrap());
    }
    let running = Running::default();
    watch(name, &running);
    let seeds = seeds(name);
    for (path, input) in &seeds {
        attempt(name, target, input, path.display().to_string(), &running);
    }
    let full = std::env::var_os("FLEECEFS_FULL").is_some();
    for number in 0..if full { 100 * mutations } else { mutations } {
        let mut random = mutation::Random::new(number);
        let (path, seed) = &seeds[random.below(seeds.len())];
        let (_, other) = &seeds[random.below(seeds.len())];
        let seed = if random.below(4) == 0 { mutation::splice(target, seed, other, number) } else { seed.clone() };
        let what = format!("mutation {number} of {name}, from {}", path.display());
        attempt(name, target, &mutate(target, &seed, number), what, &running);
    }
}

#[test]
fn header() {
    fuzz("header", Target::Header, 20_000);
}

#[test]
fn tables() {
    fuzz("tables", Target::Tables, 20_000);
}

#[test]
fn volumes() {
    fuzz("volumes", Target::Volumes, 4_000);
}

#[test]
fn image() {
    fuzz("image", Target::Image, 600);
}

#[test]
fn nbd() {
    fuzz("nbd", Target::Nbd, 20_000);
}
