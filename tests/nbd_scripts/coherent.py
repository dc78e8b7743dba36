"""One disk by two NBD connections and by its live file: what one wrote, the others read at once.

Takes one argument: a JSON object with
  socket   the server's Unix socket
  name     the export
  live     the live file
  rounds   how many operations
  seed     of what is done
It prints `done`.
"""
import json
import os
import random
import sys

import nbd


class ByNbd:
    """A connection."""

    def __init__(self, socket, name):
        self.handle = nbd.NBD()
        self.handle.set_export_name(name)
        self.handle.connect_unix(socket)
        self.read = lambda at, length: bytes(self.handle.pread(length, at))
        self.write = lambda at, data: self.handle.pwrite(data, at)
        self.zero = lambda at, length: self.handle.zero(length, at)
        self.trim = lambda at, length: self.handle.trim(length, at)


class ByFile:
    """The live file; without zero and trim, which Python's os does not have."""

    def __init__(self, path):
        self.handle = os.open(path, os.O_RDWR)
        self.read = lambda at, length: os.pread(self.handle, length, at)

    def write(self, at, data):
        """All of it."""
        assert os.pwrite(self.handle, data, at) == len(data)


def main():
    config = json.loads(sys.argv[1])
    rng = random.Random(config["seed"])
    doors = [ByNbd(config["socket"], config["name"]), ByNbd(config["socket"], config["name"]), ByFile(config["live"])]
    size = os.stat(config["live"]).st_size
    assert size == doors[0].handle.get_size()
    twin = bytearray(doors[0].read(0, size))
    for number in range(config["rounds"]):
        door = rng.choice(doors)
        length = rng.choice((1, 512, 4096, 5000, 65536, 200000))
        at = rng.randrange(0, size - length)
        kind = rng.choice(("write", "write", "write", "zero", "trim"))
        if kind == "write" or not hasattr(door, kind):
            data = rng.randbytes(length)
            door.write(at, data)
        elif kind == "zero":
            data = bytes(length)
            door.zero(at, length)
        else:
            # What a trim leaves is the disk's matter; all doors must agree on it.
            door.trim(at, length)
            data = door.read(at, length)
        twin[at:at + length] = data
        first, last = max(0, at - 4096), min(size, at + length + 4096)
        for reader in doors:
            got = reader.read(first, last - first)
            assert got == twin[first:last], f"{number}: {kind} by {type(door).__name__}, read by {type(reader).__name__}"
    for reader in doors:
        assert b"".join(reader.read(at, 1 << 20) for at in range(0, size, 1 << 20)) == bytes(twin)
    print("done")


main()
