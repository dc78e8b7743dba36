"""Rounds of external_backup.py beside a guest that writes at random, with failures and kills at each of its steps.

Takes one argument: a JSON object with
  side     "fleecefs" or "qemu"
  qmp      the QMP socket
  nbd      the socket of the NBD server
  node     the disk; its live export, which it adds, has the same name
  dir      a directory for the chain and for what is restored
  points   how many points to make
  seed     of what the guest writes and of where it fails
Every point is restored and held against the frozen disk that it was taken from. It prints a line for each round, and
last `done POINTS FULL FAILED`.
"""
import hashlib
import json
import multiprocessing
import os
import random
import sys

import nbd

import external_backup as external

BLOCK = 512


class Injected(Exception):
    """A failure that the backup cleans up after."""


class Killed(BaseException):
    """An end of the backup that it cannot clean up after."""


def guest(config, stop, done):
    """Writes, zeroes and discards at random until it is told to stop."""
    handle = nbd.NBD()
    handle.set_export_name(config["node"])
    handle.connect_unix(config["nbd"])
    size, rng = handle.get_size(), random.Random(config["seed"])
    while not stop.is_set():
        length = BLOCK * rng.choice((1, 3, 8, 16, 128, 200))
        at = rng.randrange(0, size - length) // BLOCK * BLOCK
        kind = rng.randrange(10)
        if kind < 7:
            handle.pwrite(rng.randbytes(length), at)
        elif kind < 9:
            handle.zero(length, at)
        else:
            handle.trim(length, at)
        with done.get_lock():
            done.value += 1
        # So that increments differ from full points.
        stop.wait(0.002)
    handle.shutdown()


def content(frozen):
    """The digest of a whole frozen disk."""
    digest = hashlib.sha256()
    for piece in frozen.pieces([[0, frozen.size, False]]):
        digest.update(piece)
    return digest.hexdigest()


class Steps:
    """Lets a round fail at a place, and looks at the frozen disk while it is there."""

    def __init__(self, fail_at, error):
        self.fail_at, self.error, self.digest = fail_at, error, None

    def __call__(self, name, frozen=None):
        if frozen:
            self.digest = content(frozen)
        if name == self.fail_at:
            raise self.error(name)


def restored(chain, number):
    """The digest of a point as it is restored."""
    path = os.path.join(chain.directory, "restored")
    chain.restore(number, path)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def one_round(server, config, chain, rng):
    """A backup that succeeds, fails or is killed; (digest or None, how it went)."""
    places = ["frozen", "exported", "opened", "copied 0", "copied 3", "added"]
    fail_at = rng.choice(places) if rng.randrange(2) else None
    error = rng.choice((Injected, Killed))
    steps = Steps(fail_at, error)
    settle = external.settle
    calls = []

    def settled_unless_killed(*arguments):
        # The first call is at the beginning, the second one is what a kill leaves out.
        calls.append(arguments)
        if len(calls) == 2 and isinstance(sys.exc_info()[1], Killed):
            return None
        return settle(*arguments)

    external.settle = settled_unless_killed
    before = chain.points()
    try:
        external.backup(server, config["node"], chain, steps)
        how = "made"
    except (Injected, Killed) as end:
        how = f"{type(end).__name__} at {end}"
    finally:
        external.settle = settle
    made = len(chain.points()) > len(before)
    return (steps.digest if made else None), how


def main():
    config = json.loads(sys.argv[1])
    rng = random.Random(config["seed"])
    if config["side"] == "fleecefs":
        server = external.Fleecefs(config["qmp"], config["nbd"])
    else:
        server = external.Qemu(config["qmp"], config["nbd"], os.path.join(config["dir"], "scratch"))
    chain = external.Chain(os.path.join(config["dir"], "chain"))
    server.listen()
    node = config["node"]
    server.qmp("block-export-add", type="nbd", id="live", node_name=node, name=node, writable=True)
    stop, done = multiprocessing.Event(), multiprocessing.Value("Q", 0)
    writer = multiprocessing.Process(target=guest, args=(config, stop, done))
    writer.start()
    digests, failed = {}, 0
    try:
        while len(digests) < config["points"]:
            # Something is written between rounds.
            seen = done.value
            while done.value < seen + 20 and writer.is_alive():
                stop.wait(0.01)
            digest, how = one_round(server, config, chain, rng)
            failed += how != "made"
            print("round", how, flush=True)
            if digest:
                newest = chain.points()[-1]
                digests[newest] = digest
                assert restored(chain, newest) == digest, f"point {newest} is not what was frozen"
        assert writer.is_alive(), "the guest ended"
    finally:
        stop.set()
        writer.join(20)
    assert writer.exitcode == 0, "the guest failed"
    full = 0
    for number in chain.points():
        assert restored(chain, number) == digests[number], f"point {number} is not what was frozen"
        with open(os.path.join(chain.directory, f"{number}.json"), encoding="utf-8") as file:
            full += json.load(file)["base"] is None
    print("done", len(digests), full, failed)


main()
