"""The machine: commands, fio, processes, and the disks that are measured."""
import contextlib
import json
import mmap
import os
import platform
import re
import shutil
import signal
import subprocess
import time

MIB = 1 << 20
GIB = 1 << 30
TIB = 1 << 40
PAGE = 4096


class Failed(Exception):
    """A command or a run that did not do what it should; the text says which and why."""


def run(*command, **options):
    """What a command prints; Failed with its output where it fails."""
    command = [str(word) for word in command]
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)
    if done.returncode:
        raise Failed(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}")
    return done.stdout


def until(what, done, limit=20.0):
    """Polls until `done()`; Failed after `limit` seconds."""
    end = time.monotonic() + limit
    while not done():
        if time.monotonic() > end:
            raise Failed(f"{what} did not happen within {limit} s")
        time.sleep(0.005)


def is_mounted(path):
    """Whether something is mounted at exactly this path, looked up without touching it."""
    path = os.path.abspath(path)
    with open("/proc/self/mountinfo", encoding="utf-8") as mounts:
        return any(line.split()[4] == path for line in mounts)


def detach(path):
    """Takes a mount away, whatever state it is in."""
    while is_mounted(path):
        subprocess.run(["umount", "-l", path], check=False)


def unmounted(command, path):
    """Unmounts by `command` what may be mounted, again and again: files that an io_uring had open are closed some time
    after its process has ended."""
    def done():
        subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
        return not is_mounted(path)

    try:
        until(f"the end of {path}", lambda: not is_mounted(path) or done())
    finally:
        detach(path)


def remove(path):
    """Removes a file or a tree, or nothing."""
    if os.path.isdir(path):
        shutil.rmtree(path)
    else:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


# ---- processes

def status_kib(pid, key):
    """A line of /proc/PID/status that counts in KiB."""
    with open(f"/proc/{pid}/status", encoding="utf-8") as status:
        return next((int(line.split()[1]) for line in status if line.startswith(key + ":")), 0)


def cpu_s(pid):
    """Processor seconds that a process took, program and kernel."""
    if not pid:
        return 0.0
    with open(f"/proc/{pid}/stat", encoding="utf-8") as stat:
        fields = stat.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# ---- fio

def _figures(job):
    side = max((job["read"], job["write"]), key=lambda side: side["total_ios"])
    percentile = side["clat_ns"].get("percentile", {})
    return {
        "iops": side["iops"],
        "mbs": side["bw_bytes"] / 1e6,
        "ios": side["total_ios"],
        "p50_us": percentile.get("50.000000", 0) / 1e3,
        "p99_us": percentile.get("99.000000", 0) / 1e3,
        "max_us": side["clat_ns"]["max"] / 1e3,
        "runtime_ms": side["runtime"],
    }


def _ramp_ms(options):
    said = [option for option in map(str, options) if option.startswith("--ramp_time=")]
    return int(said[0].split("=")[1].removesuffix("ms")) if said else 0


def fio(jobs, server=None):
    """Runs jobs side by side, each `name: [options]`; gives `name: figures`, with the server's processor time for one
    operation where its process id is given and there is one job."""
    command = ["fio", "--output-format=json", "--group_reporting=1", "--randrepeat=0", "--norandommap=1",
               "--allow_file_create=0", "--percentile_list=50:99:99.9"]
    for name, options in jobs.items():
        command += [f"--name={name}", *map(str, options)] + (["--new_group"] if len(jobs) > 1 else [])
    before = cpu_s(server)
    done = subprocess.run(command, text=True, capture_output=True)
    spent = cpu_s(server) - before
    if done.returncode:
        raise Failed(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr or done.stdout}")
    report = json.loads(done.stdout[done.stdout.index("{"):])
    if any(job.get("error") for job in report["jobs"]):
        raise Failed(f"{' '.join(command)}: {done.stderr}")
    figures = {job["jobname"]: _figures(job) for job in report["jobs"]}
    if server and len(figures) == 1:
        ((name, only),) = figures.items()
        # The ramp costs too, and is not counted.
        share = only["runtime_ms"] / max(1, only["runtime_ms"] + _ramp_ms(jobs[name]))
        only["cpu_us"] = spent * share * 1e6 / max(1, only["ios"])
    return figures


@contextlib.contextmanager
def fio_until_left(options):
    """Runs fio until the block is left, and fills the dict that it gives with fio's report."""
    report = {}
    command = ["fio", "--output-format=json", "--randrepeat=0", "--norandommap=1", "--allow_file_create=0", *options]
    process = subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                               text=True)
    try:
        yield report
    finally:
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    if "{" not in output:
        raise Failed(f"{' '.join(command)}: {output}")
    report |= json.loads(output[output.index("{"):])


# ---- disks

def fill_random(path, size):
    """A file of random bytes, all of it allocated: an overwrite of a hole would measure allocation, and zeros are kept
    as holes by some. Nothing of it stays in the page cache."""
    with open(path, "wb") as file:
        for _ in range(0, size, MIB):
            file.write(os.urandom(MIB))
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cache_by_pages(path):
    """Puts a whole file into the page cache, page by page: in large pieces ext4 would walk over all blocks of a piece
    at each small overwrite."""
    size = os.path.getsize(path)
    buffer = mmap.mmap(-1, MIB)
    source = os.open(path, os.O_RDONLY | os.O_DIRECT)
    target = os.open(path, os.O_WRONLY)
    try:
        for start in range(0, size, MIB):
            count = os.preadv(source, [buffer], start)
            for at in range(0, count, PAGE):
                os.pwrite(target, buffer[at:min(at + PAGE, count)], start + at)
        os.fsync(target)
    finally:
        os.close(source)
        os.close(target)


def settle(path):
    """What one run left unwritten must not be the next one's load."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


# ---- what was measured

def _first(pattern, text):
    found = re.search(pattern, text)
    return found.group(1) if found else "?"


def qemu_version(binary):
    """As it says itself, without its packager."""
    return _first(r"version (\S+)", run(binary, "--version"))


def file_system(path):
    """The type of the file system below `path`."""
    return run("stat", "-f", "-c", "%T", path).strip().replace("ext2/ext3", "ext4")


def machine():
    """Kernel, processors, memory."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "kernel": platform.release(),
        "cpus": os.cpu_count(),
        "memory_gib": round(pages / GIB, 1),
        "fio": _first(r"fio-(\S+)", run("fio", "--version")),
    }
