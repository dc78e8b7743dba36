#!/usr/bin/env python3
"""Backs up a disk of a running VM from outside, by QMP and NBD alone: a full copy first, then increments.

    external_backup.py backup  --qmp SOCKET --nbd SOCKET --node NODE --dir DIR [--peer fleecefs|qemu]
    external_backup.py restore --dir DIR [--point NUMBER] FILE

DIR has for each point NUMBER.json (what it builds on, and its extents) and NUMBER.data (the bytes of its extents, one
behind the other). A point counts once its .json is there, and that comes last.

A bitmap records what was written since the newest point. A backup begins a new bitmap, stops the old one and freezes
the disk, all at one instant; it copies from the frozen disk what the old one says. Then:

  * it succeeded: the old bitmap is dropped. The new one says what changed since the new point.
  * it failed: the old bitmap is merged into the new one, which so says what changed since the last point.
  * it was killed: there are two bitmaps. The next run does the one or the other, as the point is there or not.

--nbd is the socket that the server listens on, or is made to listen on where it does not yet. Servers differ in how
they freeze a disk: see the classes below. Needs Python's libnbd (python3-libnbd).
"""
import argparse
import json
import os
import socket
import sys
import time
import uuid

import nbd

PIECE = 1 << 20
# NBD_STATE_ZERO of base:allocation; the dirty bit of qemu:dirty-bitmap.
ZERO, DIRTY = 2, 1
# Longest range of one NBD_CMD_BLOCK_STATUS; its length has 32 bits without extended headers.
STATUS_MAX = 1 << 30


class Refused(Exception):
    """The error that a QMP command was answered with."""


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
                raise Refused(f"{command}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]
        raise Refused(f"{command}: the server hung up")


class Server:
    """What both servers do alike: bitmaps and exports."""

    def __init__(self, qmp, nbd_socket):
        self.qmp = Qmp(qmp)
        self.nbd_socket = nbd_socket

    def listen(self):
        """Has the server listen, where it does not yet."""
        try:
            self.qmp("nbd-server-start", addr={"type": "unix", "data": {"path": self.nbd_socket}})
        except Refused as error:
            if "already running" not in str(error):
                raise

    def bitmaps(self, node, prefix):
        """The backup's bitmaps, oldest first: each with its name and whether its bits can be believed."""
        rows = [row for row in self.qmp("query-named-block-nodes", flat=True) if row["node-name"] == node]
        found = [(row["name"], not row.get("inconsistent", False)) for row in rows[0].get("dirty-bitmaps", [])
                 if row.get("name", "").startswith(prefix)]
        return sorted(found)

    def transaction(self, *actions):
        """All of it or nothing, at one instant."""
        self.qmp("transaction", actions=[{"type": kind, "data": data} for kind, data in actions])

    def export(self, node, name, bitmap):
        """Exports a frozen disk, with a bitmap that says what of it to copy."""
        more = {"bitmaps": [bitmap]} if bitmap else {}
        self.qmp("block-export-add", type="nbd", id=name, node_name=node, name=name, **more)

    def unexport(self, prefix):
        """Takes away exports of these names, and waits until they are gone."""
        def ours():
            return [row["id"] for row in self.qmp("query-block-exports") if row["id"].startswith(prefix)]

        for name in ours():
            self.qmp("block-export-del", id=name, mode="hard")
        while ours():
            time.sleep(0.01)


class Fleecefs(Server):
    """A mount of fleecefs: a snapshot is an action of the transaction. Node names of frozen disks are SNAPSHOT/NODE."""

    def freeze(self, node, prefix, new, old):
        """Begins the bitmap `new`, stops `old` (None: there is none) and freezes the disk. Gives the frozen node."""
        actions = [("block-dirty-bitmap-add", {"node": node, "name": new, "persistent": True})]
        if old:
            actions.append(("block-dirty-bitmap-disable", {"node": node, "name": old}))
        name = f"{prefix}{uuid.uuid4()}"
        actions.append(("fleecefs-snapshot-create", {"name": name, "disks": [node]}))
        self.transaction(*actions)
        return f"{name}/{node}"

    def thaw(self, _node, prefix):
        """Gives up frozen disks of ours, those of runs that were killed too."""
        for snapshot in self.qmp("fleecefs-snapshot-list"):
            if snapshot["name"].startswith(prefix):
                self.qmp("fleecefs-snapshot-cancel", name=snapshot["name"])


class Qemu(Server):
    """qemu-storage-daemon or QEMU. The guest writes to `node`, a node of driver raw whose child is the node NODE-disk;
    a copy-before-write filter is put between the two. That is a command of its own, so both bitmaps record around it:
    each says a little more than it has to."""

    def __init__(self, qmp, nbd_socket, scratch):
        super().__init__(qmp, nbd_socket)
        self.scratch = scratch

    def freeze(self, node, prefix, new, old):
        """As above. `scratch` is a file for the old content of what the guest overwrites."""
        self.transaction(("block-dirty-bitmap-add", {"node": node, "name": new}))
        size = next(row["image"]["virtual-size"] for row in self.qmp("query-named-block-nodes", flat=True)
                    if row["node-name"] == node)
        with open(self.scratch, "wb") as file:
            file.truncate(size)
        self.qmp("blockdev-add", driver="file", node_name=f"{prefix}temp", filename=self.scratch)
        self.qmp("blockdev-add", driver="copy-before-write", node_name=f"{prefix}cbw", file=f"{node}-disk",
                 target=f"{prefix}temp", on_cbw_error="break-snapshot")
        self._put_below(node, f"{prefix}cbw")
        if old:
            self.transaction(("block-dirty-bitmap-disable", {"node": node, "name": old}))
        self.qmp("blockdev-add", driver="snapshot-access", node_name=f"{prefix}snap", file=f"{prefix}cbw")
        return f"{prefix}snap"

    def thaw(self, node, prefix):
        """As above."""
        there = {row["node-name"] for row in self.qmp("query-named-block-nodes", flat=True)}
        for name in ("snap", "cbw", "temp"):
            if name == "cbw":
                self._put_below(node, f"{node}-disk")
            if prefix + name in there:
                self.qmp("blockdev-del", node_name=prefix + name)

    def _put_below(self, node, child):
        self.qmp("blockdev-reopen", options=[{"driver": "raw", "node-name": node, "file": child}])


class Frozen:
    """A frozen disk as an NBD client sees it."""

    def __init__(self, path, name, bitmap):
        self.handle = nbd.NBD()
        self.contexts = ["base:allocation"] + ([f"qemu:dirty-bitmap:{bitmap}"] if bitmap else [])
        for context in self.contexts:
            self.handle.add_meta_context(context)
        self.handle.set_export_name(name)
        self.handle.connect_unix(path)
        for context in self.contexts:
            if not self.handle.can_meta_context(context):
                raise Refused(f"{name} has no context {context}")
        self.size = self.handle.get_size()

    def _runs(self, context):
        """Runs `(start, end, flags)` of a context over the whole disk."""
        found = []

        def note(name, offset, entries, _error):
            if name != context:
                return
            for length, flags in zip(entries[::2], entries[1::2]):
                found.append((offset, min(offset + length, self.size), flags))
                offset += length

        at = 0
        while at < self.size:
            self.handle.block_status(min(STATUS_MAX, self.size - at), at, note)
            if not found or found[-1][1] <= at:
                raise Refused(f"no status of {context} at {at}")
            at = found[-1][1]
        return found

    def to_copy(self):
        """Extents `[start, length, zero]` of what a bitmap says, or of everything."""
        zeros = self._runs("base:allocation")
        wanted = [(0, self.size)]
        if len(self.contexts) > 1:
            wanted = [(start, end) for start, end, flags in self._runs(self.contexts[1]) if flags & DIRTY]
        extents, at = [], 0
        for start, end in wanted:
            while start < end:
                while zeros[at][1] <= start:
                    at += 1
                last = min(zeros[at][1], end)
                extents.append([start, last - start, bool(zeros[at][2] & ZERO)])
                start = last
        return extents

    def pieces(self, extents):
        """The bytes of what is not zero."""
        for start, length, zero in extents:
            for at in range(start, start + length, PIECE):
                if not zero:
                    yield self.handle.pread(min(PIECE, start + length - at), at)

    def close(self):
        """Ends the connection."""
        self.handle.shutdown()


class Chain:
    """Points in a directory."""

    def __init__(self, directory):
        self.directory = directory
        os.makedirs(directory, exist_ok=True)
        # Names of bitmaps and exports begin with it: several chains of one disk do not meet.
        label = self._path("chain")
        if not os.path.exists(label):
            self._write(label, [uuid.uuid4().hex[:8].encode()])
        for name in os.listdir(directory):
            if name.endswith(".partial"):
                os.unlink(self._path(name))
        with open(label, encoding="ascii") as file:
            self.prefix = f"backup-{file.read()}-"

    def _path(self, name):
        return os.path.join(self.directory, name)

    def _write(self, path, parts):
        """Whole and durable, or not there."""
        with open(path + ".partial", "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.rename(path + ".partial", path)
        handle = os.open(self.directory, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)

    def points(self):
        """Numbers of complete points."""
        return sorted(int(name[:-5]) for name in os.listdir(self.directory) if name.endswith(".json"))

    def bitmap(self, number, first):
        """The bitmap that records from a point on. The `first` one of its kind continues no other: if its point was not
        finished, it says nothing."""
        return f"{self.prefix}{number:06}" + ("-first" if first else "")

    def number(self, bitmap):
        """The point from which a bitmap records."""
        return int(bitmap.removeprefix(self.prefix).split("-")[0])

    def is_void(self, bitmap):
        """Whether a bitmap says nothing."""
        return bitmap.endswith("-first") and self.number(bitmap) not in self.points()

    def add(self, number, base, size, extents, pieces):
        """Writes a point: its bytes, then what it is."""
        self._write(self._path(f"{number}.data"), pieces)
        point = {"base": base, "size": size, "extents": extents}
        self._write(self._path(f"{number}.json"), [json.dumps(point).encode()])

    def restore(self, number, target):
        """Writes the disk of a point into a file."""
        with open(self._path(f"{number}.json"), encoding="utf-8") as file:
            point = json.load(file)
        if point["base"] is None:
            open(target, "wb").close()
        else:
            self.restore(point["base"], target)
        with open(target, "r+b") as out, open(self._path(f"{number}.data"), "rb") as data:
            out.truncate(point["size"])
            for start, length, zero in point["extents"]:
                out.seek(start)
                for at in range(0, length, PIECE):
                    count = min(PIECE, length - at)
                    out.write(bytes(count) if zero else data.read(count))


def settle(server, node, chain):
    """Ends what a run that failed or was killed has left. Gives the one bitmap that is left, or None."""
    server.unexport(chain.prefix)
    server.thaw(node, chain.prefix)
    bitmaps = server.bitmaps(node, chain.prefix)
    if not all(sound for _, sound in bitmaps) or any(chain.is_void(name) for name, _ in bitmaps):
        # Nothing is known of what was written: a full copy comes next.
        server.transaction(*[("block-dirty-bitmap-remove", {"node": node, "name": name}) for name, _ in bitmaps])
        return None
    if len(bitmaps) < 2:
        return bitmaps[0][0] if bitmaps else None
    old, new = [name for name, _ in bitmaps]
    actions = [("block-dirty-bitmap-remove", {"node": node, "name": old})]
    if chain.number(new) not in chain.points():
        actions.insert(0, ("block-dirty-bitmap-merge", {"node": node, "target": new, "bitmaps": [old]}))
    server.transaction(*actions)
    return new


def backup(server, node, chain, step=lambda name, frozen=None: None):
    """Makes a point and gives its number. `step` is told how far it is."""
    server.listen()
    old = settle(server, node, chain)
    points = chain.points()
    base = points[-1] if old else None
    number = max([-1, *points] + ([chain.number(old)] if old else [])) + 1
    name = f"{chain.prefix}{number:06}"
    bitmap = {"node": node, "name": old} if old else None
    try:
        frozen_node = server.freeze(node, chain.prefix, chain.bitmap(number, first=not old), old)
        step("frozen")
        server.export(frozen_node, name, bitmap)
        step("exported")
        frozen = Frozen(server.nbd_socket, name, old)
        extents = frozen.to_copy()

        def pieces():
            for count, piece in enumerate(frozen.pieces(extents)):
                step(f"copied {count}")
                yield piece

        step("opened", frozen)
        chain.add(number, base, frozen.size, extents, pieces())
        step("added")
        frozen.close()
    finally:
        settle(server, node, chain)
    return number


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("backup")
    for option in ("--qmp", "--nbd", "--node", "--dir"):
        make.add_argument(option, required=True)
    make.add_argument("--peer", choices=("fleecefs", "qemu"), default="fleecefs")
    back = commands.add_parser("restore")
    back.add_argument("--dir", required=True)
    back.add_argument("--point", type=int)
    back.add_argument("file")
    said = parser.parse_args()
    chain = Chain(said.dir)
    if said.command == "restore":
        points = chain.points()
        if not points:
            sys.exit(f"{said.dir}: no complete point")
        chain.restore(points[-1] if said.point is None else said.point, said.file)
        return
    if said.peer == "qemu":
        server = Qemu(said.qmp, said.nbd, os.path.join(said.dir, "scratch"))
    else:
        server = Fleecefs(said.qmp, said.nbd)
    print(backup(server, said.node, chain))


if __name__ == "__main__":
    main()
