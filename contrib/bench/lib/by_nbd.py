"""NBD over a Unix socket: fleecefs beside qemu-storage-daemon, the same client for both."""
import contextlib
import os
import subprocess
import threading
import time

from cases import DEPTHS, Case, at, timed, with_contender
from contenders import Contender, Ours, Qemu
from goals import Goal
from host import MIB, Failed, fio, remove, run, until

CLIENTS = {"1c": ("1 connection", 1), "4c": ("4 connections", 4)}
SAID = {"d1": "depth 1", "d16": "depth 16"}


def uri(socket, export):
    """Where a client connects to."""
    return f"nbd+unix:///{export}?socket={socket}"


def answers(socket, export):
    """Whether an export is there."""
    words = ["nbdinfo", "--size", uri(socket, export)]
    return not subprocess.run(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False).returncode


class OursByNbd(Ours):
    """A mount that serves its disks and views by NBD, too."""

    def __init__(self, setup, snapshots=0):
        super().__init__(setup, snapshots=snapshots)
        self.nbd = setup.path("ours.nbd")
        self.options = ["--nbd", f"unix:{self.nbd}"]
        self.live_uri = uri(self.nbd, self.names[0])
        self.view_uri = uri(self.nbd, f"{self.newest()}/{self.names[0]}")


class QemuByNbd(Qemu):
    """qemu-storage-daemon with NBD exports: of the disk alone, or, with `temp`, of what is frozen beside the disk by
    FUSE. (No node is exported for writing by both.)"""

    def __init__(self, setup, binary, temp=None):
        super().__init__(setup, binary, temp)
        self.nbd = setup.path("qemu.nbd")
        self.live_uri, self.view_uri = uri(self.nbd, "live"), uri(self.nbd, "view")

    def exports(self, top):
        remove(self.nbd)
        words = ["--nbd-server", f"addr.type=unix,addr.path={self.nbd},max-connections=0"]
        if not self.temp:
            return [*words, "--export", f"type=nbd,id=live,name=live,node-name={top},writable=on"]
        return [*words, "--export", f"type=fuse,id=live,node-name={top},mountpoint={self.live},writable=on",
                "--export", "type=nbd,id=view,name=view,node-name=snap"]

    def is_ready(self):
        return answers(self.nbd, "view" if self.temp else "live")

    def stop(self):
        super().stop()
        remove(self.nbd)


class Unrelated(Contender):
    """qemu-storage-daemon over a file that the guest has nothing to do with; the guest is on a bare one."""

    def __init__(self, setup):
        super().__init__(setup)
        self.live, self.direct = setup.raw, setup.direct
        self.nbd = setup.path("unrelated.nbd")
        self.view_uri = uri(self.nbd, "view")
        self.process = None

    def start(self):
        remove(self.nbd)
        setup, direct = self.setup, "on" if self.setup.direct else "off"
        self.process = subprocess.Popen([
            next(iter(setup.qemus.values())), "--blockdev",
            f"driver=file,node-name=file,filename={setup.other},aio={setup.aio},cache.direct={direct},read-only=on",
            "--blockdev", f"driver=raw,node-name=disk,file=file,cache.direct={direct},read-only=on",
            "--nbd-server", f"addr.type=unix,addr.path={self.nbd},max-connections=0",
            "--export", "type=nbd,id=view,name=view,node-name=disk"], stderr=subprocess.DEVNULL)
        until("the unrelated export", lambda: answers(self.nbd, "view"))

    def stop(self):
        if self.process:
            self.process.terminate()
            self.process.wait(60)
        remove(self.nbd)


# ---- runs

def by_fio(setup, contender, work, clients, depth, block):
    """fio's nbd engine; with several connections a process each."""
    count, size = CLIENTS[clients][1], setup.size
    options = ["--ioengine=nbd", f"--uri={contender.live_uri}", f"--rw={work}", f"--bs={block}", f"--size={size}",
               f"--iodepth={depth[1:]}", f"--numjobs={count}", *timed(setup)]
    if not work.startswith("rand"):
        # Each reads a part of its own.
        part = size // count // MIB * MIB
        options += [f"--offset_increment={part}", f"--io_size={part}"]
    return fio({"client": options}, contender.pid)["client"]


def copy_whole(setup, contender):
    """One nbdcopy of the whole view to nowhere."""
    start = time.monotonic()
    run("nbdcopy", contender.view_uri, "null:")
    return {"mbs": setup.size / 1e6 / (time.monotonic() - start)}


class Copies:
    """nbdcopy of a view to nowhere, again and again; how many bytes it took is told by its progress."""

    def __init__(self, setup, contender):
        self.size, self.uri = setup.size, contender.view_uri
        self.passes, self.part, self.error = 0, 0, None
        self.stop, self.process = False, None
        self.thread = threading.Thread(target=self._run)

    def _run(self):
        while not self.stop:
            ours, theirs = os.pipe()
            words = ["nbdcopy", f"--progress={theirs}", self.uri, "null:"]
            self.process = subprocess.Popen(words, pass_fds=[theirs], stderr=subprocess.PIPE, text=True)
            os.close(theirs)
            with open(ours, encoding="ascii") as progress:
                for line in progress:
                    self.part = int(line.split("/")[0]) / 100
            if self.process.wait() and not self.stop:
                self.error = self.process.stderr.read()
                return
            self.process.stderr.close()
            self.passes, self.part = self.passes + 1, 0

    def taken(self):
        """Bytes so far."""
        return (self.passes + self.part) * self.size

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.stop = True
        with contextlib.suppress(OSError, AttributeError):
            self.process.terminate()
        self.thread.join()
        if self.error:
            raise Failed(self.error)


def beside_copies(setup, contender, depth, copies):
    """A guest's random 4 KiB writes to the live file; with `copies`, while nbdcopy pulls the view."""
    if not copies:
        return _guest(setup, contender, depth)
    with Copies(setup, contender) as reader:
        before, start = reader.taken(), time.monotonic()
        figures = _guest(setup, contender, depth)
        rate = (reader.taken() - before) / 1e6 / (time.monotonic() - start)
    return {**figures, "reader_mbs": rate}


def _guest(setup, contender, depth):
    # At depth 1 by psync: an io_uring hands buffered writes of a bare file to another thread.
    engine = DEPTHS["psync" if depth == "d1" else depth]
    options = [*at(contender, setup.size), "--rw=randwrite", "--bs=4k", *engine, *timed(setup)]
    return fio({"guest": options})["guest"]


# ---- lines

def _each(setup, work, snapshot=False):
    temp = "raw" if snapshot else None
    lines = {"ours": with_contender(lambda: OursByNbd(setup, int(snapshot)), work)}
    for version, binary in setup.qemus.items():
        lines[version] = with_contender(lambda binary=binary: QemuByNbd(setup, binary, temp), work)
    return lines


def live_lines(work, clients, depth, block):
    """Work on a live export."""
    return lambda setup: _each(setup, lambda one: by_fio(setup, one, work, clients, depth, block))


def view_lines(setup):
    """A whole frozen disk, with nothing else to do."""
    bare = with_contender(lambda: Unrelated(setup), lambda one: copy_whole(setup, one))
    return {**_each(setup, lambda one: copy_whole(setup, one), True), "bare, by QEMU": bare}


def beside_lines(depth):
    """A guest beside nbdcopy of its view, and alone with a snapshot."""
    def lines(setup):
        found = {}
        for copies, more in ((True, ""), (False, ", alone")):
            job = lambda one, copies=copies: beside_copies(setup, one, depth, copies)
            found |= {name + more: line for name, line in _each(setup, job, True).items()}
            found["bare" + more] = with_contender(lambda: Unrelated(setup), job)
        return found
    return lines


def all_cases():
    """In the order of the tables."""
    cases = []
    for clients, (said, _) in CLIENTS.items():
        for depth in SAID:
            cases.append(Case(f"nbd-seq-{clients}-{depth}", f"NBD 1M read, {said}, {SAID[depth]}", "mbs",
                              live_lines("read", clients, depth, "1M")))
    for work in ("read", "write"):
        for clients, (said, _) in CLIENTS.items():
            for depth in SAID:
                cases.append(Case(f"nbd-{work}-{clients}-{depth}", f"NBD 4k random {work}, {said}, {SAID[depth]}",
                                  "iops", live_lines(f"rand{work}", clients, depth, "4k")))
    cases.append(Case("nbd-view", "NBD view, nbdcopy to null", "mbs", view_lines))
    for depth in SAID:
        cases.append(Case(f"nbd-beside-{depth}", f"guest 4k beside nbdcopy of the view, {SAID[depth]}", "iops",
                          beside_lines(depth)))
    return cases


def all_goals():
    """In the order of the cases."""
    goals = [Goal(case.name, "QEMU", case.unit, "qemu", 1.0) for case in all_cases() if "beside" not in case.name]
    for depth in SAID:
        goals += [Goal(f"nbd-beside-{depth}", "share kept, bare", "iops", "bare", 0.9, share=True),
                  Goal(f"nbd-beside-{depth}", "guest, QEMU's", "iops", "qemu", 2)]
    return goals
