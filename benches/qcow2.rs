//! 4 KiB random reads, overwrites and allocating writes through the `Image` trait, and the look-up alone: a raw image,
//! our qcow2 driver and imago's, in one run.
//!
//! ```text
//! cargo bench --bench qcow2 -- [--dir DIR] [--rounds N] [--ops N] [--only NAME]
//! ```
//!
//! NAME is how the names of the wanted rows begin: `read`, `overwrite`, `allocating`, `look-up`. The contestants take
//! turns within each round, so that what else the machine does falls on all of them; the figures are medians over the
//! rounds. All go through the page cache, on files of their own in one directory (by default in the target directory),
//! qcow2 with clusters of 64 KiB. Needs qemu-img and qemu-io.

mod options;

use fleecefs::image::{Format, Image, OpenOptions};
use imago::file::File;
use imago::qcow2::Qcow2;
use imago::{FormatAccess, FormatDriverBuilder, PermissiveImplicitOpenGate};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Barrier};
use std::time::Instant;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const TIB: u64 = 1 << 40;
const BLOCK: usize = 4096;
const CLUSTER: u64 = 64 << 10;
/// Disk of the reads and overwrites; all of it is data.
const FULL_DISK: u64 = 512 * MIB;
/// Disk of the allocating writes; none of it is.
const EMPTY_DISK: u64 = 4 * GIB;
/// Bytes that one L2 table maps.
const TABLE_COVERS: u64 = 512 * MIB;

struct Settings {
    dir: PathBuf,
    rounds: usize,
    /// Operations in a round, of all threads together.
    ops: u64,
    only: Option<String>,
}

impl Settings {
    fn wants(&self, name: &str) -> bool {
        self.only.as_ref().is_none_or(|word| name.starts_with(word.as_str()))
    }

    /// Whether a row of one of these kinds is wanted.
    fn wants_any(&self, kinds: &[&str]) -> bool {
        self.only.as_ref().is_none_or(|word| kinds.iter().any(|kind| word.starts_with(kind)))
    }
}

fn settings() -> Settings {
    let mut settings =
        Settings { dir: PathBuf::from(env!("CARGO_TARGET_TMPDIR")), rounds: 11, ops: 20_000, only: None };
    options::each(|option, value| match option {
        "--dir" => settings.dir = value.into(),
        "--rounds" => settings.rounds = value.parse().expect("a number of rounds"),
        "--ops" => settings.ops = value.parse().expect("a number of operations"),
        "--only" => settings.only = Some(value),
        _ => panic!("unknown option {option}"),
    });
    settings
}

/// What the contestants have in common.
trait Disk: Sync {
    fn read(&self, buf: &mut [u8], offset: u64);
    fn write(&self, buf: &[u8], offset: u64);
    fn flush(&self);
}

struct Ours(Arc<dyn Image>);

impl Disk for Ours {
    fn read(&self, buf: &mut [u8], offset: u64) {
        self.0.read_at(buf, offset).expect("read");
    }
    fn write(&self, buf: &[u8], offset: u64) {
        self.0.write_at(buf, offset).expect("write");
    }
    fn flush(&self) {
        self.0.flush().expect("flush");
    }
}

struct Imago(FormatAccess<File>);

impl Disk for Imago {
    fn read(&self, buf: &mut [u8], offset: u64) {
        self.0.read(buf, offset).expect("read");
    }
    fn write(&self, buf: &[u8], offset: u64) {
        self.0.write(buf, offset).expect("write");
    }
    fn flush(&self) {
        self.0.flush().and_then(|()| self.0.sync()).expect("flush");
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Contestant {
    Raw,
    Ours,
    Imago,
}

use Contestant as C;

impl Contestant {
    const ALL: [C; 3] = [C::Raw, C::Ours, C::Imago];

    fn format(self) -> &'static str {
        if self == C::Raw { "raw" } else { "qcow2" }
    }

    fn file(self, dir: &Path, name: &str) -> PathBuf {
        dir.join(format!("{name}-{self:?}.{}", self.format()).to_lowercase())
    }

    fn open(self, path: &Path, read_only: bool) -> Box<dyn Disk> {
        if self == C::Imago {
            let builder = Qcow2::<File>::builder_path(path).write(!read_only);
            let image = builder.open(PermissiveImplicitOpenGate::default()).expect("imago opens the image");
            return Box::new(Imago(FormatAccess::new(image)));
        }
        let format = if self == C::Raw { Format::Raw } else { Format::Qcow2 };
        let options = OpenOptions { format: Some(format), read_only, ..Default::default() };
        Box::new(Ours(fleecefs::image::open(path, &options).expect("the image opens")))
    }
}

fn run(tool: &str, args: &[&str]) {
    let out = Command::new(tool).args(args).output().unwrap_or_else(|e| panic!("{tool}: {e}"));
    assert!(out.status.success(), "{tool} {args:?}: {}", String::from_utf8_lossy(&out.stderr));
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a path in UTF-8")
}

fn create(contestant: C, path: &Path, size: u64) {
    let _ = std::fs::remove_file(path);
    run("qemu-img", &["create", "-q", "-f", contestant.format(), text(path), &size.to_string()]);
}

/// A disk that is data from end to end. Its file is in the page cache in single pages: larger folios, which depend on who
/// wrote or read it, make an overwrite on ext4 several times slower.
fn create_full(contestant: C, path: &Path) {
    create(contestant, path, FULL_DISK);
    let write = format!("write -q -P 165 0 {FULL_DISK}");
    run("qemu-io", &["-f", contestant.format(), "-c", &write, "-c", "flush", text(path)]);
    let bytes = std::fs::read(path).expect("the file is ours");
    std::fs::remove_file(path).expect("the file is ours");
    let mut file = std::fs::File::create_new(path).expect("the directory is ours");
    bytes.chunks(BLOCK).for_each(|page| file.write_all(page).expect("space for the file"));
    file.sync_all().expect("sync");
}

struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

/// Nanoseconds for one operation.
#[derive(Debug, Clone, Copy)]
struct Figure {
    /// On the clock, of all threads together.
    wall: f64,
    /// On a processor, in the program and in the kernel: what else the machine does leaves it alone.
    cpu: f64,
}

/// Nanoseconds that this thread has been on a processor.
fn cpu_ns() -> f64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").expect("schedstat of Linux");
    text.split(' ').next().and_then(|number| number.parse().ok()).expect("a number")
}

/// Runs `op` with each number below `ops`, which `threads` threads share.
fn timed(threads: u64, ops: u64, op: impl Fn(u64, &mut Random) + Sync) -> Figure {
    let barrier = Barrier::new(threads as usize);
    let run = |thread: u64| {
        let mut random = Random(0x9e37_79b9_7f4a_7c15 ^ ((thread + 1) << 20));
        barrier.wait();
        let (began, cpu) = (Instant::now(), cpu_ns());
        (thread..ops).step_by(threads as usize).for_each(|n| op(n, &mut random));
        (began, Instant::now(), cpu_ns() - cpu)
    };
    let spans: Vec<(Instant, Instant, f64)> = std::thread::scope(|scope| {
        let run = &run;
        let handles: Vec<_> = (0..threads).map(|thread| scope.spawn(move || run(thread))).collect();
        handles.into_iter().map(|handle| handle.join().expect("no panic")).collect()
    });
    let began = spans.iter().map(|span| span.0).min().expect("a thread");
    let ended = spans.iter().map(|span| span.1).max().expect("a thread");
    let count = ops as f64;
    let cpu: f64 = spans.iter().map(|span| span.2).sum();
    Figure { wall: (ended - began).as_secs_f64() * 1e9 / count, cpu: cpu / count }
}

thread_local! {
    static BUFFER: std::cell::RefCell<Box<[u8]>> = std::cell::RefCell::new(vec![0x5a; BLOCK].into());
}

fn read(disk: &dyn Disk, offset: u64, len: usize) {
    BUFFER.with_borrow_mut(|buf| disk.read(&mut buf[..len], offset));
}

fn write(disk: &dyn Disk, offset: u64) {
    BUFFER.with_borrow(|buf| disk.write(buf, offset));
}

fn median(figures: impl Iterator<Item = f64>) -> f64 {
    let mut figures: Vec<_> = figures.collect();
    figures.sort_by(f64::total_cmp);
    figures.get(figures.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Prints a row of medians: each contestant's figures of all rounds, in the order of [`Contestant::ALL`].
fn print_row(name: &str, figures: &[Vec<Figure>; 3]) {
    let [raw, ours, imago] = figures.each_ref().map(|rounds| median(rounds.iter().map(|figure| figure.wall)));
    let cpu = figures.each_ref().map(|rounds| median(rounds.iter().map(|figure| figure.cpu)));
    let line = format!(
        "{name:<46} {raw:>8.0} {ours:>8.0} {imago:>8.0} {:>6.2} {:>6.2}   {:>8.0} {:>8.0} {:>8.0} {:>6.2} {:>6.2}",
        ours / raw,
        ours / imago,
        cpu[0],
        cpu[1],
        cpu[2],
        cpu[1] / cpu[0],
        cpu[1] / cpu[2],
    );
    println!("{}", line.replace("NaN", "  -"));
}

/// Runs rounds in which the contestants take turns, another one first each time.
fn row(settings: &Settings, name: &str, mut measure: impl FnMut(C) -> Option<Figure>) {
    if !settings.wants(name) {
        return;
    }
    let mut figures: [Vec<Figure>; 3] = Default::default();
    // The first round warms up.
    for round in 0..=settings.rounds {
        for turn in 0..3 {
            let index = (round + turn) % 3;
            let figure = measure(C::ALL[index]);
            if round > 0 {
                figures[index].extend(figure);
            }
        }
    }
    print_row(name, &figures);
}

fn reads_and_overwrites(settings: &Settings) {
    let paths = C::ALL.map(|contestant| {
        let path = contestant.file(&settings.dir, "full");
        create_full(contestant, &path);
        path
    });
    let blocks = FULL_DISK / BLOCK as u64;
    let disks = [0, 1, 2].map(|index| C::ALL[index].open(&paths[index], false));
    let disk = |contestant: C| &*disks[contestant as usize];
    for disk in &disks {
        (0..FULL_DISK).step_by(CLUSTER as usize).for_each(|offset| read(&**disk, offset, BLOCK));
    }
    for threads in [1, 2] {
        row(settings, &format!("read, {threads}x"), |contestant| {
            Some(timed(threads, settings.ops, |_, random| {
                read(disk(contestant), random.below(blocks) * BLOCK as u64, BLOCK);
            }))
        });
    }
    for threads in [1, 2] {
        row(settings, &format!("overwrite, {threads}x"), |contestant| {
            let figure = timed(threads, settings.ops, |_, random| {
                write(disk(contestant), random.below(blocks) * BLOCK as u64);
            });
            disk(contestant).flush();
            Some(figure)
        });
    }
    drop(disks);
    paths.iter().for_each(|path| std::fs::remove_file(path).expect("the file is ours"));
}

/// Writes into clusters that nobody has written to, on a fresh file each time.
fn allocating(settings: &Settings) {
    let clusters = EMPTY_DISK / CLUSTER;
    // An odd factor walks through all clusters of the disk, each once, in no order.
    let scattered = |n: u64| n.wrapping_mul(0x9e37_79b1) % clusters * CLUSTER;
    let dense = |n: u64| n * BLOCK as u64;
    for (how, threads) in [("", 1), ("", 2), (" + flush", 1)] {
        let ops = (settings.ops / 2).min(clusters / 2);
        let name = format!("allocating, scattered{how}, {threads}x");
        row(settings, &name, |contestant| fresh(settings, contestant, threads, ops, how, scattered));
    }
    for (how, threads) in [("", 1), ("", 2), (" + flush", 1)] {
        let name = format!("allocating, sequential{how}, {threads}x");
        row(settings, &name, |contestant| fresh(settings, contestant, threads, settings.ops, how, dense));
    }
}

/// One round of the above; the flush at its end counts where `how` says so.
fn fresh(
    settings: &Settings,
    contestant: C,
    threads: u64,
    ops: u64,
    how: &str,
    place: impl Fn(u64) -> u64 + Sync,
) -> Option<Figure> {
    let path = contestant.file(&settings.dir, "fresh");
    create(contestant, &path, EMPTY_DISK);
    let disk = contestant.open(&path, false);
    let mut figure = timed(threads, ops, |n, _| write(&*disk, place(n)));
    if !how.is_empty() {
        let flush = timed(1, 1, |_, _| disk.flush());
        figure.wall += flush.wall / ops as f64;
        figure.cpu += flush.cpu / ops as f64;
    }
    drop(disk);
    std::fs::remove_file(path).expect("the file is ours");
    Some(figure)
}

/// Memory of this process that is in no file, in bytes.
fn memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux");
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).expect("RssAnon");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") * 1024
}

/// Reads of 512 bytes from a disk of 1 TiB that has all its L2 tables and next to no data: the look-up, and zeros.
fn look_ups(settings: &Settings) {
    let path = settings.dir.join("sparse.qcow2");
    create(C::Ours, &path, TIB);
    let writes: Vec<_> = (0..TIB / TABLE_COVERS).map(|table| format!("write -q {} 4k", table * TABLE_COVERS)).collect();
    let commands: Vec<_> = writes.iter().flat_map(|command| ["-c", command.as_str()]).collect();
    run("qemu-io", &[&["-f", "qcow2"], commands.as_slice(), &[text(&path)]].concat());

    for threads in [1, 2] {
        let row = |name: &str, place: &(dyn Fn(u64, &mut Random) -> u64 + Sync)| {
            row(settings, &format!("look-up {name}, {threads}x"), |contestant| {
                let disk = (contestant != C::Raw).then(|| contestant.open(&path, true))?;
                Some(timed(threads, settings.ops * 5, |n, random| read(&*disk, place(n, random) & !511, 512)))
            });
        };
        row("in 8 GiB", &|_, random| random.below(8 * GIB));
        row("in 8 GiB that move every 1000", &|n, random| (n / 1000 * 64 * GIB + random.below(8 * GIB)) % TIB);
        row("anywhere in 1 TiB", &|_, random| random.below(TIB));
    }
    for contestant in ["ours", "imago"] {
        // In a process of its own: what others have freed would hide what it takes.
        let own = std::env::current_exe().expect("a program");
        let out = Command::new(own).args(["--memory", contestant, text(&path)]).output().expect("it runs");
        print!("{}", String::from_utf8_lossy(&out.stdout));
    }
    std::fs::remove_file(path).expect("the file is ours");
}

/// The memory that a contestant takes after a look at each of the places that its tables cover.
fn print_memory(contestant: C, path: &Path) {
    let before = memory();
    let disk = contestant.open(path, true);
    (0..TIB).step_by(CLUSTER as usize * 64).for_each(|offset| read(&*disk, offset, 512));
    let taken = memory().saturating_sub(before) as f64 / MIB as f64;
    println!("{contestant:?}: {taken:.1} MiB of memory after a look at all of 1 TiB");
}

fn main() {
    let args: Vec<_> = std::env::args().collect();
    if let [_, word, contestant, path] = args.as_slice()
        && word == "--memory"
    {
        return print_memory(if contestant == "ours" { C::Ours } else { C::Imago }, Path::new(path));
    }
    let settings = settings();
    std::fs::create_dir_all(&settings.dir).expect("the directory");
    println!("nanoseconds for one operation, medians of {} rounds", settings.rounds);
    let columns = format!("{:>8} {:>8} {:>8} {:>6} {:>6}", "raw", "ours", "imago", "/raw", "/imago");
    println!("{:<46} {columns}   {columns}", "on the clock; then on a processor");
    if settings.wants_any(&["read", "overwrite"]) {
        reads_and_overwrites(&settings);
    }
    if settings.wants_any(&["allocating"]) {
        allocating(&settings);
    }
    if settings.wants_any(&["look-up"]) {
        look_ups(&settings);
    }
}
