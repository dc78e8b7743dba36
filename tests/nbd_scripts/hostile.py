"""Clients that do not keep to the protocol, beside one that does and a guest on the live file.

Takes one argument: a JSON object with
  socket     the server's Unix socket
  pid        the server's process
  name       a writable export, 8 MiB or more
  live       a file through which a guest writes to the same disk
  malformed  how many malformed or cut sessions
  idle       how many connections that say nothing
  rss_mib    what the server's memory may grow by, in MiB
  threads    what its threads may grow by
Each kind comes while a well-behaved client and a guest go on; both must get through meanwhile, and memory and threads stay
within these bounds. It prints a line for each kind, and last `done`.
"""
import contextlib
import json
import os
import random
import socket
import struct
import sys
import threading
import time

IHAVEOPT = 0x49484156454F5054
REQUEST, EXTENDED = 0x25609513, 0x21E41C71
OPTIONS = {"export-name": 1, "abort": 2, "list": 3, "starttls": 5, "info": 6, "go": 7, "structured": 8,
           "list-meta": 9, "set-meta": 10, "extended": 11}
READ, WRITE, DISC, FLUSH, TRIM, CACHE, ZEROES, STATUS = range(8)
# Longest time in which who keeps to the protocol must be answered, in seconds: far beyond what a loaded machine needs.
PATIENCE = 30


def option(number, data=b"", length=None, magic=IHAVEOPT):
    """An option, of a length that need not be true."""
    return struct.pack(">QII", magic, number, len(data) if length is None else length) + data


def go(name, requests=(), length=None):
    """The data of GO and INFO."""
    name = name.encode()
    return (struct.pack(">I", len(name) if length is None else length) + name + struct.pack(">H", len(requests))
            + b"".join(struct.pack(">H", one) for one in requests))


def meta(name, *queries):
    """The data of LIST_META_CONTEXT and SET_META_CONTEXT."""
    name = name.encode()
    words = [struct.pack(">I", len(name)) + name, struct.pack(">I", len(queries))]
    return b"".join(words + [struct.pack(">I", len(query)) + query for query in queries])


def request(kind, offset=0, length=512, flags=0, cookie=1, magic=REQUEST):
    """A request's header."""
    return struct.pack(">IHHQQI", magic, flags, kind, cookie, offset, length)


def opened(path, timeout=PATIENCE):
    """A connection."""
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(timeout)
    connection.connect(path)
    return connection


def exactly(connection, count):
    """So many bytes."""
    data = b""
    while len(data) < count:
        piece = connection.recv(count - len(data))
        if not piece:
            raise EOFError
        data += piece
    return data


def in_transmission(path, name):
    """A connection behind EXPORT_NAME: a client of the oldest kind, simple replies alone."""
    connection = opened(path)
    exactly(connection, 18)
    connection.sendall(struct.pack(">I", 3) + option(OPTIONS["export-name"], name.encode()))
    exactly(connection, 10)
    return connection


class Client:
    """One that keeps to the protocol."""

    def __init__(self, path, name):
        self.connection = in_transmission(path, name)

    def ask(self, kind, offset, length, data=b"", back=0):
        """Sends, waits for the reply without an error, gives its bytes."""
        self.connection.sendall(request(kind, offset, length) + data)
        magic, error, cookie = struct.unpack(">IIQ", exactly(self.connection, 16))
        assert (magic, error, cookie) == (0x67446698, 0, 1), (hex(magic), error, cookie)
        return exactly(self.connection, back)


class Others:
    """A client and a guest who write and read all the time. `check` says that both got on since the last check."""

    def __init__(self, config):
        self.stop = threading.Event()
        self.done = {"client": 0, "guest": 0}
        self.failed = []
        client, live = Client(config["socket"], config["name"]), os.open(config["live"], os.O_RDWR)

        def by_client(number):
            data = struct.pack(">I", number) * 1024
            client.ask(WRITE, 0, 4096, data)
            assert client.ask(READ, 0, 4096, back=4096) == data, "the client reads other bytes"

        def by_guest(number):
            data = struct.pack(">I", number) * 1024
            os.pwrite(live, data, 4096)
            assert os.pread(live, 4096, 4096) == data, "the guest reads other bytes"

        self.threads = [threading.Thread(target=self._run, args=one) for one in
                        (("client", by_client), ("guest", by_guest))]
        for thread in self.threads:
            thread.start()

    def _run(self, name, work):
        while not self.stop.is_set():
            try:
                work(self.done[name])
            except Exception as error:  # pylint: disable=broad-except
                self.failed.append(f"{name}: {error!r}")
                return
            self.done[name] += 1
            self.stop.wait(0.001)

    def check(self):
        """Waits until both have done three more."""
        before, end = dict(self.done), time.monotonic() + PATIENCE
        while any(self.done[name] < before[name] + 3 for name in before):
            assert not self.failed, self.failed
            assert time.monotonic() < end, f"nobody is served: {before}, {self.done}"
            time.sleep(0.01)

    def end(self):
        """Stops them."""
        self.stop.set()
        for thread in self.threads:
            thread.join()


def options_at_random(rng, name):
    """Options that are right, cut, too long, unknown or noise."""
    kinds = [
        lambda: option(rng.choice(list(OPTIONS.values())), rng.randbytes(rng.randrange(64))),
        lambda: option(OPTIONS["go"], go(name, [3], rng.choice([0, 1, 4096, 0xffffffff]))),
        lambda: option(OPTIONS["info"], go(name, [0, 1, 2, 3, 77])),
        lambda: option(OPTIONS["go"], go("x" * rng.choice([1, 4096, 4097, 60000]))),
        lambda: option(rng.randrange(1 << 32), b"abc", rng.choice([3, 1 << 20, 0xffffffff])),
        lambda: option(OPTIONS["set-meta"], meta(name, b"base:allocation", b"qemu:", b"x" * 5000)),
        lambda: option(OPTIONS["list-meta"], meta(name, *[b"base:"] * rng.choice([0, 1, 5000]))),
        lambda: option(OPTIONS["list-meta"], meta(name)[:-4] + struct.pack(">I", 0xffffffff)),
        lambda: option(OPTIONS["structured"]),
        lambda: option(OPTIONS["structured"], b"x"),
        lambda: option(OPTIONS["extended"]),
        lambda: option(OPTIONS["list"], b"x" * rng.choice([0, 1])),
        lambda: option(OPTIONS["list"], magic=rng.getrandbits(64)),
        lambda: rng.randbytes(rng.randrange(200)),
    ]
    return b"".join(rng.choice(kinds)() for _ in range(rng.randrange(1, 6)))


def requests_at_random(rng):
    """Requests with odd lengths, places, flags, magics and data that stop half way. None of them hits the places that
    the others write to."""
    parts = []
    for _ in range(rng.randrange(1, 8)):
        kind = rng.choice([READ, FLUSH, TRIM, CACHE, ZEROES, STATUS, rng.randrange(8, 65536)])
        offset = rng.choice([8192, 65536, 1 << 40, (1 << 64) - 1, (1 << 64) - 512, rng.getrandbits(63) | 8192])
        length = rng.choice([0, 1, 512, 65536, 0x80000000, 0xffffffff])
        flags = rng.choice([0, 0, 1, 2, 4, 8, 16, 32, rng.getrandbits(16)])
        magic = rng.choice([REQUEST] * 8 + [EXTENDED, rng.getrandbits(32)])
        parts.append(request(kind, offset, length, flags, rng.getrandbits(64), magic))
        if rng.randrange(4) == 0:
            length = rng.choice([1, 4096, 1 << 20, 33 << 20, 0xffffffff])
            parts.append(request(WRITE, 65536, length) + rng.randbytes(min(length, rng.choice([0, 1, 4096]))))
    return b"".join(parts)


def malformed(config, _stack):
    """Sessions of noise, cut anywhere."""
    rng = random.Random(11)
    for number in range(config["malformed"]):
        connection = opened(config["socket"])
        with contextlib.suppress(OSError, EOFError), connection:
            if rng.randrange(8) == 0:
                connection.sendall(rng.randbytes(rng.randrange(1, 300)))
                continue
            words = struct.pack(">I", rng.choice([1, 3, 3, 3, 3, rng.getrandbits(32)]))
            if rng.randrange(2):
                words += options_at_random(rng, config["name"])
            words += option(rng.choice([1, 1, 7]), b"") if rng.randrange(8) == 0 else b""
            if rng.randrange(2):
                words += option(OPTIONS["export-name"], config["name"].encode()) + requests_at_random(rng)
            if rng.randrange(2):
                words = words[:rng.randrange(len(words) + 1)]
            connection.sendall(words)
            if rng.randrange(3) == 0:
                connection.settimeout(0.002)
                connection.recv(rng.choice([1, 18, 4096]))
            if rng.randrange(8) == 0:
                connection.shutdown(socket.SHUT_WR)
        if number % 500 == 499:
            yield


def idle(config, stack):
    """Connections that say nothing: half of them at once, half after the handshake, as far as the server lets them in."""
    # Of those that wait in the socket's queue; each costs time here.
    waits = 0
    for number in range(config["idle"]):
        with contextlib.suppress(OSError, EOFError):
            connection = stack.enter_context(opened(config["socket"], 0.2))
            if number % 2 and waits < 20:
                waits += 1
                exactly(connection, 18)
                connection.sendall(struct.pack(">I", 3) + option(1, config["name"].encode()))
                waits -= 1
        if number % 100 == 99:
            yield
    yield


def never_reads(config, stack):
    """Asks for much, and takes nothing of it."""
    for _ in range(4):
        connection = stack.enter_context(in_transmission(config["socket"], config["name"]))
        connection.setblocking(False)
        with contextlib.suppress(OSError):
            for _ in range(4096):
                connection.send(request(READ, 8192, 4 << 20))
    for _ in range(10):
        time.sleep(0.2)
        yield


def half_a_write(config, stack):
    """Says that 32 MiB come, sends a byte of them, and waits."""
    for _ in range(16):
        connection = stack.enter_context(in_transmission(config["socket"], config["name"]))
        connection.sendall(request(WRITE, 65536, 32 << 20) + b"x")
    for _ in range(5):
        time.sleep(0.2)
        yield


def slowly(config, stack):
    """A byte at a time."""
    words = [struct.pack(">I", 3) + option(OPTIONS["go"], go(config["name"])),
             struct.pack(">I", 3) + option(1, config["name"].encode()) + request(READ, 0, 65536)]
    connections = [stack.enter_context(opened(config["socket"])) for _ in range(32)]
    for at in range(12 if config["malformed"] > 1000 else 3):
        for number, connection in enumerate(connections):
            with contextlib.suppress(OSError):
                connection.send(words[number % 2][at:at + 1])
        yield
        time.sleep(1)


def of_process(pid, key):
    """A line of /proc/PID/status, as a number."""
    with open(f"/proc/{pid}/status", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key + ":"))


def main():
    config = json.loads(sys.argv[1])
    pid, others = config["pid"], Others(config)
    try:
        others.check()
        rss, threads = of_process(pid, "VmRSS"), of_process(pid, "Threads")
        for kind in (malformed, idle, never_reads, half_a_write, slowly):
            start, worst = time.monotonic(), [0, 0]
            with contextlib.ExitStack() as stack:
                for _ in kind(config, stack):
                    others.check()
                    worst[0] = max(worst[0], of_process(pid, "VmRSS") - rss)
                    worst[1] = max(worst[1], of_process(pid, "Threads") - threads)
            others.check()
            print(f"{kind.__name__}: {worst[0] >> 10} MiB and {worst[1]} threads more, "
                  f"{time.monotonic() - start:.1f} s, {others.done}", flush=True)
            assert worst[0] <= config["rss_mib"] << 10, f"{kind.__name__}: {worst[0] >> 10} MiB more"
            assert worst[1] <= config["threads"], f"{kind.__name__}: {worst[1]} threads more"
    finally:
        others.end()
    assert not others.failed, others.failed
    # A new client is let in, and nobody's bytes were changed.
    last = Client(config["socket"], config["name"])
    for at in (0, 4096):
        assert len(set(struct.unpack(">1024I", last.ask(READ, at, 4096, back=4096)))) == 1
    print("done")


main()
