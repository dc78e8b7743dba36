"""Who serves a disk: fleecefs, QEMU, the bare forwarder, and nobody at all.

Each is a context manager with `live` (where the guest writes), `view` (what is frozen, where there is a snapshot),
`pid` (of the server, None where there is none) and `direct` (whether fio opens with O_DIRECT).
"""
import json
import os
import socket
import subprocess
import tempfile

from host import Failed, detach, is_mounted, remove, run, until, unmounted


class Qmp:
    """A connection to a QMP socket."""

    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(60)
        self.socket.connect(path)
        self.lines = self.socket.makefile("r", encoding="utf-8")
        self.lines.readline()
        self("qmp_capabilities")

    def __call__(self, command, **arguments):
        arguments = {key.replace("_", "-"): value for key, value in arguments.items()}
        self.socket.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        for line in self.lines:
            answer = json.loads(line)
            if "error" in answer:
                raise Failed(f"{command}: {answer['error']}")
            if "return" in answer:
                return answer["return"]
        raise Failed(f"{command}: the other side closed")

    def close(self):
        """Closes the connection."""
        self.lines.close()
        self.socket.close()


class Contender:
    """What all have. `stop` also takes away what a `start` that failed has left."""

    direct = True
    pid = None
    view = None

    def __init__(self, setup):
        self.setup = setup

    def start(self):
        """Brings it up."""

    def stop(self):
        """Takes it down."""

    def __enter__(self):
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_):
        self.stop()


class Bare(Contender):
    """The file itself, through the page cache or past it."""

    def __init__(self, setup):
        super().__init__(setup)
        self.live = setup.raw
        self.direct = setup.direct


class Forwarder(Contender):
    """The bare forwarder, `examples/forwarder.rs`."""

    def __init__(self, setup):
        super().__init__(setup)
        self.mnt = setup.path("forwarder")
        self.live = os.path.join(self.mnt, "disk.raw")

    def start(self):
        os.makedirs(self.mnt, exist_ok=True)
        options = ["--direct"] if self.setup.direct else []
        self.process = subprocess.Popen([self.setup.forwarder, *options, self.setup.raw, self.mnt])
        self.pid = self.process.pid
        until("the forwarder's mount", lambda: self.process.poll() is not None or is_mounted(self.mnt))
        if self.process.poll() is not None:
            raise Failed("the forwarder ended")

    def stop(self):
        unmounted(["umount", self.mnt], self.mnt)
        if self.pid:
            self.process.wait(20)


class Ours(Contender):
    """A mount of ours. The state of earlier mounts goes, so each one begins alike: nothing recorded, all regions armed,
    as behind a guest that has been writing for a while."""

    # More options of the mount.
    options = ()

    def __init__(self, setup, disks=None, snapshots=0):
        super().__init__(setup)
        self.disks = disks or [setup.disk]
        self.names = [f"vd{chr(ord('a') + at)}" for at in range(len(self.disks))]
        self.snapshots = snapshots
        self.mnt = setup.path("mnt")

    def start(self):
        self.forget()
        os.makedirs(self.mnt, exist_ok=True)
        words = [self.setup.fleecefs, "mount", "--cache", "none" if self.setup.direct else "writeback",
                 *self.options]
        for name, disk in zip(self.names, self.disks):
            kind = "qcow2" if disk.endswith(".qcow2") else "raw"
            words += ["--disk", f"name={name},file={disk},format={kind}"]
        # The daemon keeps its parent's output open.
        with tempfile.TemporaryFile("w+") as output:
            code = subprocess.run([*words, self.mnt], stdout=output, stderr=output, check=False).returncode
            output.seek(0)
            if code:
                raise Failed(f"{' '.join(words)}: {output.read()}")
        self.pid = self.status()["pid"]
        self.live = self.live_of(self.names[0])
        for number in range(self.snapshots):
            self.snap(f"s{number}")
        self.view = os.path.join(self.mnt, "snapshots", self.newest(), f"{self.names[0]}.raw")

    def stop(self):
        unmounted([self.setup.fleecefs, "umount", self.mnt], self.mnt)
        if self.pid:
            until("the end of the daemon", lambda: not os.path.exists(f"/proc/{self.pid}"))
        self.forget()

    def forget(self):
        """Removes the state of the disks. A qcow2 image keeps the newest checkpoint as a bitmap of its name."""
        for disk in self.disks:
            remove(f"{disk}.fleece")
            if self.snapshots and disk.endswith(".qcow2"):
                words = ["qemu-img", "bitmap", "--remove", disk, self.newest()]
                subprocess.run(words, stderr=subprocess.DEVNULL, check=False)

    def newest(self):
        """The name of the newest of the snapshots that were taken at the start."""
        return f"s{self.snapshots - 1}"

    def live_of(self, name):
        """The live file of a disk."""
        return os.path.join(self.mnt, "live", f"{name}.raw")

    def status(self):
        """What the mount says of itself."""
        with open(os.path.join(self.mnt, "status.json"), encoding="utf-8") as file:
            return json.load(file)

    def snap(self, name):
        """Takes a snapshot of all disks."""
        os.mkdir(os.path.join(self.mnt, "snapshots", name))

    def drop(self, name):
        """Completes one."""
        os.rmdir(os.path.join(self.mnt, "snapshots", name))

    def add_bitmaps(self, count):
        """Adds bitmaps that record to the first disk."""
        qmp = Qmp(self.status()["qmp"])
        for number in range(count):
            qmp("block-dirty-bitmap-add", node=self.names[0], name=f"b{number}", granularity=65536)
        qmp.close()


class Qemu(Contender):
    """qemu-storage-daemon with its FUSE export; with `temp` a copy-before-write filter over the disk, and an export of
    what was frozen beside it. `temp` is the format of the image that old content goes to."""

    def __init__(self, setup, binary, temp=None, bitmaps=0):
        super().__init__(setup)
        self.binary = binary
        self.temp = temp
        self.bitmaps = bitmaps
        self.live = setup.path("qemu-live")
        self.view = setup.path("qemu-view")
        self.socket = setup.path("qemu.qmp")
        self.temp_file = setup.path("qemu-temp")
        # What it says, for when it goes wrong.
        self.log = tempfile.TemporaryFile("w+")

    def arguments(self):
        """Its command line."""
        disk, kind = self.setup.disk, self.setup.format
        words = ["--chardev", f"socket,id=qmp,path={self.socket},server=on,wait=off", "--monitor", "chardev=qmp",
                 *self.node("disk", disk, kind)]
        top = "disk"
        if self.temp:
            words += self.node("temp", self.temp_file, self.temp)
            words += ["--blockdev", "driver=copy-before-write,node-name=cbw,file=disk,target=temp",
                      "--blockdev", "driver=snapshot-access,node-name=snap,file=cbw"]
            top = "cbw"
        return words + self.exports(top)

    def exports(self, top):
        """What of its command line says what it serves."""
        words = ["--export", f"type=fuse,id=live,node-name={top},mountpoint={self.live},writable=on"]
        if self.temp:
            words += ["--export", f"type=fuse,id=view,node-name=snap,mountpoint={self.view}"]
        return words

    def is_ready(self):
        """Whether it serves."""
        return is_mounted(self.view if self.temp else self.live)

    def node(self, name, file, kind):
        """The two nodes of an image."""
        direct = "on" if self.setup.direct else "off"
        more = ",discard=unmap" if kind == "qcow2" else ""
        return ["--blockdev", f"driver=file,node-name={name}-file,filename={file},aio={self.setup.aio},"
                              f"cache.direct={direct}",
                "--blockdev", f"driver={kind},node-name={name},file={name}-file,cache.direct={direct}{more}"]

    def start(self):
        remove(self.socket)
        if self.temp:
            remove(self.temp_file)
            run("qemu-img", "create", "-q", "-f", self.temp, self.temp_file, os.path.getsize(self.setup.raw))
        for mountpoint in (self.live, self.view):
            with open(mountpoint, "a", encoding="utf-8"):
                pass
        words = [self.binary, *self.arguments()]
        self.process = subprocess.Popen(words, stdout=self.log, stderr=self.log)
        self.pid = self.process.pid
        until("QEMU's export", lambda: self.process.poll() is not None or self.is_ready())
        if self.process.poll() is not None:
            self.log.seek(0)
            raise Failed(f"{' '.join(words)}: {self.log.read()}")
        if self.bitmaps:
            qmp = Qmp(self.socket)
            for number in range(self.bitmaps):
                qmp("block-dirty-bitmap-add", node="disk", name=f"b{number}", granularity=65536)
            qmp.close()

    def stop(self):
        if self.pid:
            self.process.terminate()
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.log.close()
        for path in (self.live, self.view):
            detach(path)
        remove(self.temp_file)
        remove(self.socket)
