"""What an NBD server answers to each command, asked by libnbd's Python binding.

Takes one argument: a JSON object with
  socket   the server's Unix socket
  live     name of a writable export, 8 MiB or more
  frozen   name of a read-only one, or null
It prints `done` and what was negotiated.
"""
import errno
import json
import random
import sys

import nbd

ZERO = 2
STATUS_MAX = (1 << 32) - 65536


def connect(socket, name, contexts=()):
    """A connection that sends also what its server says it does not take."""
    handle = nbd.NBD()
    for context in contexts:
        handle.add_meta_context(context)
    handle.set_export_name(name)
    handle.connect_unix(socket)
    handle.set_strict_mode(0)
    return handle


def refused(number, call, *arguments, **more):
    """The call must fail with this errno, and the connection live on."""
    expected = number if isinstance(number, tuple) else (number,)
    try:
        call(*arguments, **more)
    except nbd.Error as error:
        assert error.errnum in expected, f"{call.__name__}{arguments}: {error}"
        return
    raise AssertionError(f"{call.__name__}{arguments} {more} was answered")


def status(handle, context, start=0, end=None, flags=0):
    """Runs (offset, length, flags) of a context; must cover the range without gaps."""
    end = handle.get_size() if end is None else end
    runs, at = [], start
    while at < end:
        found = []
        handle.block_status(min(end - at, STATUS_MAX), at,
                            lambda name, offset, entries, error: found.append((name, offset, entries)), flags=flags)
        (entries,) = [entries for name, _, entries in found if name == context]
        assert all(offset == at for _, offset, _ in found), found
        assert entries and len(entries) % 2 == 0
        if flags & nbd.CMD_FLAG_REQ_ONE:
            assert len(entries) == 2, entries
        for length, state in zip(entries[::2], entries[1::2]):
            assert length > 0, entries
            runs.append((at, length, state))
            at += length
    return runs


def zeros_are_zeros(handle, runs):
    """What a status calls zeros reads as zeros."""
    size = handle.get_size()
    for at, length, state in runs:
        length = min(length, size - at)
        while state & ZERO and length:
            piece = min(length, 1 << 20)
            assert handle.pread(piece, at) == bytearray(piece), f"data in {at}+{piece}"
            at, length = at + piece, length - piece


def writes(handle):
    """Lengths and places that are no multiple of anything; the ends of the disk."""
    size = handle.get_size()
    for at, length in ((0, 1), (511, 2), (4095, 4098), (65536 - 7, 70001), (size - 1, 1), (size - 4097, 4097)):
        data = random.randbytes(length)
        handle.pwrite(data, at)
        assert handle.pread(length, at) == data, (at, length)
        handle.pwrite(data[::-1], at, flags=nbd.CMD_FLAG_FUA)
        assert handle.pread(length, at, flags=nbd.CMD_FLAG_DF) == data[::-1], (at, length)


def zeroes(handle, socket, name):
    """Zeroes of each kind, up to the whole disk in one request; trims. Neighbours stay."""
    size = handle.get_size()
    kinds = [0, nbd.CMD_FLAG_NO_HOLE, nbd.CMD_FLAG_FUA, nbd.CMD_FLAG_FAST_ZERO,
             nbd.CMD_FLAG_FAST_ZERO | nbd.CMD_FLAG_NO_HOLE]
    for flags in kinds:
        for at, length in ((1 << 20, 1 << 20), ((2 << 20) + 513, 300001), (0, size)):
            first, last = max(0, at - 4096), min(size, at + length + 4096)
            noise = random.randbytes(min(last - first, 4 << 20))
            handle.pwrite(noise, first)
            before, after = handle.pread(at - first, first) if at > first else b"", b""
            if last > at + length:
                after = handle.pread(last - at - length, at + length)
            try:
                handle.zero(length, at, flags=flags)
                assert handle.pread(min(length, 4 << 20), at) == bytearray(min(length, 4 << 20)), (at, length, flags)
            except nbd.Error as error:
                # It may say that it is not fast, and only then; nothing is changed then.
                assert flags & nbd.CMD_FLAG_FAST_ZERO and error.errnum == errno.ENOTSUP, error
                assert handle.pread(len(noise), first) == noise, "a refused zero changed something"
            if before:
                assert handle.pread(len(before), first) == before, (at, length, flags)
            if after:
                assert handle.pread(len(after), at + length) == after, (at, length, flags)
    handle.pwrite(b"\x55" * 8192, (3 << 20) - 4096)
    handle.trim(1 << 20, 3 << 20, flags=nbd.CMD_FLAG_FUA)
    assert handle.pread(4096, (3 << 20) - 4096) == b"\x55" * 4096
    handle.cache(1 << 20, 0)
    other = connect(socket, name, ["base:allocation"])
    zeros_are_zeros(other, status(other, "base:allocation"))
    other.shutdown()


def holes(handle, socket, name):
    """After a write into zeros its status is data, on a connection that asked before, too."""
    size = handle.get_size()
    other = connect(socket, name, ["base:allocation"])
    handle.zero(size, 0)
    status(other, "base:allocation")
    handle.pwrite(b"\x11", size // 2)
    runs = [run for run in status(other, "base:allocation") if run[0] <= size // 2 < run[0] + run[1]]
    assert len(runs) == 1 and not runs[0][2] & ZERO, f"data is called a hole: {runs}"
    one = status(other, "base:allocation", flags=nbd.CMD_FLAG_REQ_ONE)
    assert [run[2] & ZERO for run in one if run[0] <= size // 2 < run[0] + run[1]] == [0]
    # A structured read has each byte once.
    pieces = []
    got = other.pread_structured(1 << 20, size // 2 - (1 << 19),
                                 lambda piece, offset, kind, error: pieces.append((offset, len(piece), kind)))
    assert sum(length for _, length, _ in pieces) == 1 << 20, pieces
    assert got == bytes(1 << 19) + b"\x11" + bytes((1 << 19) - 1)
    other.shutdown()


def out_of_range(handle):
    """Past the end: EINVAL for reads, ENOSPC for writes (the protocol's rule); nothing is written."""
    size = handle.get_size()
    tail = handle.pread(4096, size - 4096)
    either = (errno.EINVAL, errno.ENOSPC)
    for at, length in ((size - 511, 512), (size, 1), (size + (1 << 40), 512), ((1 << 63) - 512, 512)):
        refused(errno.EINVAL, handle.pread, length, at)
        refused(errno.ENOSPC, handle.pwrite, b"\x77" * length, at)
        refused(either, handle.zero, length, at)
        refused(either, handle.trim, length, at)
        refused(errno.EINVAL, handle.block_status, length, at, lambda *_: 0)
    refused(either, handle.zero, (1 << 32) - 1, size - 512)
    assert handle.pread(4096, size - 4096) == tail


def odd_flags(handle):
    """Flags that a command does not have."""
    fua, df, one = nbd.CMD_FLAG_FUA, nbd.CMD_FLAG_DF, nbd.CMD_FLAG_REQ_ONE
    refused(errno.EINVAL, handle.pread, 512, 0, flags=nbd.CMD_FLAG_NO_HOLE)
    refused(errno.EINVAL, handle.pwrite, b"\x66" * 512, 0, flags=df)
    refused(errno.EINVAL, handle.trim, 512, 0, flags=one)
    refused(errno.EINVAL, handle.pwrite, b"\x66" * 512, 0, flags=1 << 9)
    refused(errno.EINVAL, handle.flush, flags=df)
    handle.flush()
    # FUA on what does not write is no error.
    handle.pread(512, 0, flags=fua)


def in_flight(socket, name):
    """Many requests at once on several connections, whose replies come in any order, each with its own bytes."""
    handles = [connect(socket, name) for _ in range(4)]
    size, unit = handles[0].get_size(), 16384
    blocks = {at: random.randbytes(unit) for at in random.sample(range(0, size - unit, unit), 128)}
    pending = []
    for number, (at, data) in enumerate(blocks.items()):
        handle = handles[number % 4]
        pending.append((handle, handle.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(data)), at)))
    wait(pending)
    # A flush covers what was answered on any connection.
    assert handles[0].can_multi_conn()
    handles[3].flush()
    reads = []
    for number, at in enumerate(blocks):
        handle, buffer = handles[(number + 1) % 4], nbd.Buffer(unit)
        reads.append((at, buffer, handle, handle.aio_pread(buffer, at)))
    wait([(handle, cookie) for _, _, handle, cookie in reads])
    for at, buffer, _, _ in reads:
        assert buffer.to_bytearray() == blocks[at], f"other bytes at {at}"
    for handle in handles:
        handle.shutdown()


def wait(pending):
    """Until all are answered, without an error."""
    for handle, cookie in pending:
        while not handle.aio_command_completed(cookie):
            handle.poll(-1)


def read_only(handle, name):
    """What is frozen takes no change."""
    assert handle.is_read_only(), name
    before = handle.pread(4096, 0)
    refused(errno.EPERM, handle.pwrite, b"\x44" * 512, 0)
    refused(errno.EPERM, handle.zero, 512, 0)
    refused(errno.EPERM, handle.trim, 512, 0)
    # There is nothing to flush: an error, or nothing.
    try:
        handle.flush()
    except nbd.Error:
        pass
    assert handle.pread(4096, 0) == before
    assert handle.can_multi_conn()
    zeros_are_zeros(handle, status(handle, "base:allocation"))


def main():
    config = json.loads(sys.argv[1])
    random.seed(7)
    socket, live = config["socket"], config["live"]
    handle = connect(socket, live, ["base:allocation"])
    for can in ("can_flush", "can_fua", "can_zero", "can_trim", "can_fast_zero", "can_multi_conn", "can_cache", "can_df"):
        assert getattr(handle, can)(), can
    refused((errno.ENOENT, errno.EINVAL, errno.EIO, 0), connect, socket, "no such export")
    writes(handle)
    zeroes(handle, socket, live)
    holes(handle, socket, live)
    out_of_range(handle)
    odd_flags(handle)
    in_flight(socket, live)
    if config.get("frozen"):
        read_only(connect(socket, config["frozen"], ["base:allocation"]), config["frozen"])
    extended = getattr(handle, "get_extended_headers_negotiated", lambda: None)()
    if extended:
        runs = []
        handle.block_status_64(handle.get_size(), 0, lambda name, offset, entries, error: runs.extend(entries))
        assert runs
    handle.shutdown()
    print("done, extended headers:", extended)


main()
