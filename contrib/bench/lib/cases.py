"""What is measured. A case has lines, each of which is run once a round; a line's figures are a dict."""
import contextlib
import os
import random
import statistics
import time
from dataclasses import dataclass, field

from contenders import Bare, Forwarder, Ours, Qemu
from host import GIB, MIB, TIB, fio, fio_until_left, remove, run, settle, status_kib

AREA = 65536
DEPTHS = {
    "d1": ["--ioengine=io_uring", "--iodepth=1"],
    "d4": ["--ioengine=io_uring", "--iodepth=4"],
    "d16": ["--ioengine=io_uring", "--iodepth=16"],
    "j4": ["--ioengine=psync", "--numjobs=4"],
    "psync": ["--ioengine=psync"],
}
SAID = {"d1": "depth 1", "d4": "depth 4", "d16": "depth 16", "j4": "4 jobs", "psync": "psync"}


@dataclass
class Setup:
    """Where, over what and for how long; the disks, filled once and shared by all contenders."""

    dir: str
    format: str
    direct: bool
    medium: str
    size: int
    seconds: float
    fleecefs: str
    forwarder: str
    aio: str
    quick: bool = False
    # Binaries of qemu-storage-daemon by what they are called in tables.
    qemus: dict = field(default_factory=dict)

    def path(self, name):
        """A file of ours."""
        return os.path.join(self.dir, name)

    @property
    def raw(self):
        """The raw disk."""
        return self.path("disk.raw")

    @property
    def qcow2(self):
        """The same as qcow2, all clusters allocated."""
        return self.path("disk.qcow2")

    @property
    def other(self):
        """A file that nobody writes to."""
        return self.path("other.raw")

    @property
    def disk(self):
        """The disk in the format that is measured."""
        return self.qcow2 if self.format == "qcow2" else self.raw

    def raw_too(self):
        """The same setup over the raw disk."""
        return Setup(**{**self.__dict__, "format": "raw"})

    def key(self):
        """What tells it from other setups."""
        return {"medium": self.medium, "format": self.format, "cache": "none" if self.direct else "writeback"}


@dataclass
class Case:
    """A kind of work. `lines` gives, for a setup, `name: a function that runs it`; QEMU's begin with `qemu`."""

    name: str
    title: str
    unit: str
    lines: object
    formats: tuple = ("raw", "qcow2")
    caches: tuple = ("writeback", "none")

    def fits(self, setup):
        """Whether there is anything to measure in this setup."""
        key = setup.key()
        return key["format"] in self.formats and key["cache"] in self.caches


# ---- runs

def timed(setup, ramp=0.5):
    """fio's options for work that goes on for a time."""
    return ["--time_based=1", f"--runtime={int(setup.seconds * 1000)}ms", f"--ramp_time={int(ramp * 1000)}ms"]


def at(contender, size, path=None):
    """fio's options for a file."""
    return [f"--filename={path or contender.live}", f"--direct={int(contender.direct)}", f"--size={size}"]


def random_work(setup, contender, work, depth):
    """Random 4 KiB over the whole disk."""
    options = [*at(contender, setup.size), f"--rw=rand{work}", "--bs=4k", *DEPTHS[depth], *timed(setup)]
    return fio({"guest": options}, contender.pid)["guest"]


def touch(setup, contender, length, depth):
    """One write at the start of each area of 64 KiB (or of its own length), in random order, each once."""
    log = setup.path("touch.iolog")
    places = list(range(0, setup.size - length + 1, max(AREA, length)))
    random.Random(length).shuffle(places)
    with open(log, "w", encoding="utf-8") as file:
        file.write(f"fio version 2 iolog\n{contender.live} add\n{contender.live} open\n")
        file.writelines(f"{contender.live} write {place} {length}\n" for place in places)
        file.write(f"{contender.live} close\n")
    options = [f"--filename={contender.live}", f"--direct={int(contender.direct)}", f"--read_iolog={log}",
               "--replay_no_stall=1", *DEPTHS[depth], f"--runtime={max(1, round(setup.seconds * 2))}"]
    figures = fio({"guest": options}, contender.pid)["guest"]
    remove(log)
    return figures


def overwrite_all(setup, contender):
    """Every chunk once, in order."""
    fio({"fill": [*at(contender, setup.size), "--rw=write", "--bs=1M", "--ioengine=psync"]})


def sequential(setup, contender, way):
    """1 MiB reads of the frozen file in order: `buffered` goes through it once, the others again and again."""
    path = contender.view or contender.live
    options = [*at(contender, setup.size, path), "--rw=read", "--bs=1M", *DEPTHS.get(way, DEPTHS["psync"])]
    if way == "buffered":
        options += ["--direct=0", f"--runtime={int(setup.seconds * 2000)}ms"]
    else:
        options += timed(setup)
    return fio({"reader": options}, contender.pid)["reader"]


def beside(setup, contender, depth, reader):
    """A guest's random 4 KiB writes; with `reader`, beside 1 MiB reads of that file at full speed. At depth 1 it writes
    by psync: an io_uring hands buffered writes of a bare file to another thread."""
    engine = DEPTHS["psync" if depth == "d1" else depth]
    jobs = {"guest": [*at(contender, setup.size), "--rw=randwrite", "--bs=4k", *engine, *timed(setup)]}
    if reader:
        jobs["reader"] = [*at(contender, setup.size, reader), "--rw=read", "--bs=1M", *DEPTHS["psync"], *timed(setup)]
    figures = fio(jobs)
    return {**figures["guest"], "reader_mbs": figures["reader"]["mbs"] if reader else 0}


def with_contender(make, work):
    """A line: brings a contender up, lets it work, and leaves nothing of it to the next."""
    def line():
        with make() as contender:
            figures = work(contender)
        for disk in {contender.setup.raw, contender.setup.disk}:
            settle(disk)
        return figures
    return line


def qemus(setup, work, temps=(None,)):
    """QEMU's lines: each version, with each kind of image for old content."""
    lines = {}
    for version, binary in setup.qemus.items():
        for temp in temps:
            name = f"{version}, {temp} store" if temp and len(temps) > 1 else version
            lines[name] = with_contender(lambda binary=binary, temp=temp: Qemu(setup, binary, temp), work)
    return lines


def limits(setup, work, forwarder=True):
    """What FUSE allows, and the file itself. The forwarder takes aligned requests alone, those of O_DIRECT."""
    found = {}
    if forwarder and setup.forwarder:
        found["forwarder"] = with_contender(lambda: Forwarder(setup), work)
    return {**found, "bare": with_contender(lambda: Bare(setup), work)}


# ---- lines of each kind of case

def live_lines(work, depth):
    """Random work on the live disk."""
    def lines(setup):
        job = lambda contender: random_work(setup, contender, work, depth)
        found = {"ours": with_contender(lambda: Ours(setup), job), **qemus(setup, job)}
        if setup.format == "qcow2":
            found["ours, raw"] = with_contender(lambda: Ours(setup.raw_too()), job)
        return {**found, **limits(setup, job)}
    return lines


def touch_lines(length, depth):
    """First touches of a fresh snapshot, and the same writes without one."""
    def lines(setup):
        job = lambda contender: touch(setup, contender, length, depth)
        return {
            "ours": with_contender(lambda: Ours(setup, snapshots=1), job),
            "ours, no snapshot": with_contender(lambda: Ours(setup), job),
            **qemus(setup, job, ("raw", "qcow2")),
        }
    return lines


def rewrite_lines(depth):
    """Writes to what has been preserved already, and without a snapshot."""
    def lines(setup):
        def job(contender):
            overwrite_all(setup, contender)
            return random_work(setup, contender, "write", depth)
        return {
            "ours": with_contender(lambda: Ours(setup, snapshots=1), job),
            "ours, no snapshot": with_contender(lambda: Ours(setup), job),
        }
    return lines


def view_lines(way):
    """Reading what was frozen, with nothing else to do."""
    def lines(setup):
        job = lambda contender: sequential(setup, contender, way)
        return {
            "ours": with_contender(lambda: Ours(setup, snapshots=1), job),
            **qemus(setup, job, ("raw",)),
            **limits(setup, job, forwarder=way != "buffered"),
        }
    return lines


def beside_lines(depth):
    """A guest beside a reader of the view, and alone with a snapshot."""
    def lines(setup):
        def pair(name, make, frozen):
            return {
                name: with_contender(make, lambda c: beside(setup, c, depth, frozen(c))),
                f"{name}, alone": with_contender(make, lambda c: beside(setup, c, depth, None)),
            }
        found = pair("ours", lambda: Ours(setup, snapshots=1), lambda c: c.view)
        for version, binary in setup.qemus.items():
            found |= pair(version, lambda binary=binary: Qemu(setup, binary, "raw"), lambda c: c.view)
        return found | pair("bare", lambda: Bare(setup), lambda _: setup.other)
    return lines


def snapshots_lines(depth):
    """First touches below one snapshot and below eight."""
    def lines(setup):
        job = lambda contender: touch(setup, contender, 4096, depth)
        return {f"ours, {count} snapshot{'s' * (count > 1)}":
                with_contender(lambda count=count: Ours(setup, snapshots=count), job) for count in (1, 8)}
    return lines


def bitmap_lines(depth):
    """Writes beside bitmaps that record."""
    def lines(setup):
        def line(count):
            def job(contender):
                contender.add_bitmaps(count)
                return random_work(setup, contender, "write", depth)
            return with_contender(lambda: Ours(setup), job)
        return {f"ours, {count} bitmaps" if count else "ours": line(count) for count in (0, 1, 8, 64)}
    return lines


# ---- freeze

def freeze(setup, count):
    """Snapshots of eight disks that are all written to: how long writes were held, and the guests' worst one."""
    size = min(setup.size, 128 * MIB)
    disks = [setup.path(f"freeze{number}.raw") for number in range(8)]
    try:
        for disk in disks:
            run("dd", f"if={setup.raw}", f"of={disk}", "bs=1M", f"count={size // MIB}", "conv=fsync", "status=none")
        with Ours(setup, disks=disks) as ours:
            return _freeze_under_load(ours, size, count)
    finally:
        for disk in disks:
            remove(disk)


def _freeze_under_load(ours, size, count):
    words = []
    for name in ours.names:
        words += [f"--name={name}", *at(ours, size, ours.live_of(name)), "--rw=randwrite", "--bs=4k", *DEPTHS["psync"],
                  "--time_based=1", "--runtime=3600"]
    with fio_until_left(words) as load:
        time.sleep(1)
        held = [_held_ms(ours, f"f{number}") for number in range(count)]
        if not held:
            time.sleep(2)
    jobs = load["jobs"]
    figures = {"max_us": max(job["write"]["clat_ns"]["max"] for job in jobs) / 1e3,
               "iops": sum(job["write"]["iops"] for job in jobs)}
    if held:
        figures |= {"median_ms": statistics.median(held), "worst_ms": max(held), "held_ms": held}
    return figures


def _held_ms(ours, name):
    before = ours.status()["counters"]["freeze_ns"]
    ours.snap(name)
    held = ours.status()["counters"]["freeze_ns"] - before
    time.sleep(0.1)
    ours.drop(name)
    time.sleep(0.05)
    return held / 1e6


# ---- memory and mounts

def resident(pid):
    """Memory of a process in MiB."""
    kib = {key: status_kib(pid, key) for key in ("VmRSS", "RssAnon", "RssFile", "RssShmem")}
    return {key.lower() + "_mib": round(value / 1024, 2) for key, value in kib.items()}


@contextlib.contextmanager
def sparse(path, size):
    """A disk of holes, gone afterwards."""
    remove(path)
    with open(path, "wb") as file:
        file.truncate(size)
    try:
        yield path
    finally:
        remove(path)


def memory_ours(setup, snapshot=False, work=None):
    """Resident memory of a mount of 1 TiB with one checkpoint, after some work."""
    with sparse(setup.path("tib.raw"), TIB) as disk, Ours(setup, disks=[disk]) as ours:
        ours.snap("checkpoint")
        if not snapshot:
            ours.drop("checkpoint")
        if work:
            work(setup, ours)
        time.sleep(0.5)
        return resident(ours.pid)


def write_all_over(_, ours):
    """A write for each page of the bits that say what a snapshot has copied: a bit is 4 KiB."""
    live = os.open(ours.live, os.O_WRONLY)
    for place in range(0, TIB, 4096 * 8 * 4096):
        os.pwrite(live, b"x" * 4096, place)
    os.close(live)


def load(setup, ours):
    """Small and large requests in great numbers."""
    for work in ("read", "write"):
        fio({"small": [*at(ours, 4 * GIB), f"--rw=rand{work}", "--bs=4k", *DEPTHS["d16"], *timed(setup, 0)]})
        fio({"large": [*at(ours, GIB), f"--rw={work}", "--bs=1M", *DEPTHS["d16"], *timed(setup, 0)]})


def memory_qemu(setup, binary):
    """The same for QEMU: a bitmap stands for the checkpoint."""
    with sparse(setup.path("tib.raw"), TIB) as disk:
        one = Setup(**{**setup.__dict__, "format": "raw"})
        with _QemuOver(one, binary, disk) as qemu:
            time.sleep(0.5)
            return resident(qemu.pid)


class _QemuOver(Qemu):
    def __init__(self, setup, binary, disk):
        super().__init__(setup, binary, bitmaps=1)
        self.over = disk

    def node(self, name, file, kind):
        return super().node(name, self.over, kind)


def memory_lines(setup):
    """Resident memory."""
    lines = {
        "ours": lambda: memory_ours(setup),
        "ours, after a load": lambda: memory_ours(setup, work=load),
        "ours, all over": lambda: memory_ours(setup, work=write_all_over),
        "ours, all over with a snapshot": lambda: memory_ours(setup, True, write_all_over),
    }
    for version, binary in setup.qemus.items():
        lines[version] = lambda binary=binary: memory_qemu(setup, binary)
    return lines


def mount_time(setup, disk):
    """Seconds until `fleecefs mount` returns."""
    ours = Ours(setup, disks=[disk])
    start = time.monotonic()
    with ours:
        return {"seconds": time.monotonic() - start}


def mount_qcow2(setup):
    """1 TiB with ten bitmaps, in which writes all over the disk are recorded."""
    image = setup.path("tib.qcow2")
    remove(image)
    run("qemu-img", "create", "-q", "-f", "qcow2", image, TIB)
    for number in range(10):
        run("qemu-img", "bitmap", "--add", image, f"b{number}")
    writes = [word for place in range(0, TIB, TIB // 256) for word in ("-c", f"write -q {place} 64k")]
    run("qemu-io", "-f", "qcow2", *writes, image)
    try:
        return mount_time(setup, image)
    finally:
        remove(image)


def mount_raw(setup):
    """16 TiB of holes; ext4's largest file is a block short of that."""
    with sparse(setup.path("sparse.raw"), 16 * TIB - MIB) as disk:
        return mount_time(setup, disk)


def all_cases():
    """In the order of the tables."""
    raw_only = {"formats": ("raw",)}
    once = {"formats": ("raw",), "caches": ("writeback",)}
    cases = []
    for work in ("write", "read"):
        for depth in ("d1", "d16", "j4"):
            cases.append(Case(f"live-{work}-{depth}", f"live 4k random {work}, {SAID[depth]}", "iops",
                              live_lines(work, depth)))
    for length, said, depths in ((4096, "4k", ("d1", "d16")), (AREA, "64k", ("d1", "d16")), (MIB, "1M", ("d1", "d4"))):
        for depth in depths:
            cases.append(Case(f"touch-{said}-{depth}", f"first touch {said}, {SAID[depth]}", "iops",
                              touch_lines(length, depth)))
    for depth in ("d1", "d16"):
        cases.append(Case(f"rewrite-{depth}", f"rewrites, {SAID[depth]}", "iops", rewrite_lines(depth)))
    for way in ("psync", "d4", "buffered"):
        cases.append(Case(f"view-{way}", f"view 1M read, {SAID.get(way, way)}", "mbs", view_lines(way)))
    for depth in ("d1", "d16"):
        cases.append(Case(f"beside-{depth}", f"guest 4k beside a reader of the view, {SAID[depth]}", "iops",
                          beside_lines(depth)))
    for depth in ("d1", "d16"):
        cases.append(Case(f"snapshots-{depth}", f"first touch 4k below snapshots, {SAID[depth]}", "iops",
                          snapshots_lines(depth), **raw_only))
    for depth in ("d1", "d16"):
        cases.append(Case(f"bitmaps-{depth}", f"4k random writes, bitmaps record, {SAID[depth]}", "iops",
                          bitmap_lines(depth), **raw_only))
    cases.append(Case("freeze", "freeze of eight disks under load", "median_ms",
                      lambda setup: {"ours": lambda: freeze(setup, 4 if setup.quick else 20),
                                     "ours, no snapshots": lambda: freeze(setup, 0)}, **raw_only))
    cases.append(Case("memory", "resident memory, 1 TiB", "vmrss_mib", memory_lines, **once))
    cases.append(Case("mount-qcow2", "mount of 1 TiB qcow2 with 10 bitmaps", "seconds",
                      lambda setup: {"ours": lambda: mount_qcow2(setup)}, **once))
    cases.append(Case("mount-raw", "mount of 16 TiB raw", "seconds",
                      lambda setup: {"ours": lambda: mount_raw(setup)}, **once))
    return cases
