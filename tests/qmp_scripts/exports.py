"""NBD's server and exports. Disks: a, q; r is added, read-only. `dir` has the image r.raw, and room for a socket."""

import json
import socket
import struct
import subprocess

from peer import run

LONG = "n" * 4097


class Client:
    """An NBD client that has an export and asks nothing."""

    def __init__(self, path, name):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(60)
        self.socket.connect(path)
        self.take(18)
        name = name.encode()
        self.socket.sendall(struct.pack(">I8sII", 3, b"IHAVEOPT", 1, len(name)) + name)
        size, self.flags = struct.unpack(">QH", self.take(10))

    def take(self, count):
        taken = b""
        while len(taken) < count:
            more = self.socket.recv(count - len(taken))
            if not more:
                raise SystemExit("the server hung up")
            taken += more
        return taken

    def is_ended(self):
        """Waits for the server's end."""
        try:
            return self.socket.recv(1) == b""
        except ConnectionError:
            return True

    def leave(self):
        self.socket.close()


def export(id, node, **more):
    return {"type": "nbd", "id": id, "node-name": node} | {key.replace("_", "-"): value for key, value in more.items()}


def of(node, name):
    return {"node": node, "name": name}


def output(*words):
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120)
    if done.returncode or "failed" in done.stdout + done.stderr:
        raise SystemExit(f"{words}: {done.stdout}{done.stderr}")
    return done.stdout


def extents(path, name, context=None):
    """What `qemu-img map` makes of a context; without one of what is allocated."""
    options = f"driver=nbd,export={name},server.type=unix,server.path={path}"
    if context:
        options += f",x-dirty-bitmap={context}"
    rows = json.loads(output("qemu-img", "map", "--output=json", "--image-opts", options))
    return [[row["start"], row["length"], row["data"], row["zero"]] for row in rows]


async def objects(peer):
    """TLS credentials. Without `dir` there are none; what needs some is tested with clients."""
    psk = {"qom-type": "tls-creds-psk", "id": "t", "dir": "/no/such", "endpoint": "server"}
    for more in [
        {}, {"qom-type": "zoo"}, {"id": "1"}, {"id": ""}, {"id": "a b"}, {"dir": 1}, {"endpoint": "zoo"}, {"zoo": 1},
        {"verify-peer": 1}, {"sanity-check": True}, {"passwordid": "x"}, {"qom-type": "tls-creds-x509"},
        {"qom-type": "tls-creds-x509", "username": "x"}, {"qom-type": "tls-creds-x509", "sanity-check": 1},
    ]:
        await peer.ask("object-add", psk | more)
    for absent in ("qom-type", "id", "dir"):
        await peer.ask("object-add", {key: value for key, value in psk.items() if key != absent})
    for arguments in [{}, {"id": "no"}, {"id": 1}, {"id": "no", "zoo": 1}]:
        await peer.ask("object-del", arguments)


async def main(peer):
    path = peer.config["dir"] + "/exports"
    here = {"type": "unix", "data": {"path": path}}
    if not peer.ours:
        # The one of its command line.
        await peer.must("nbd-server-stop")
        for _ in peer.config["disks"]:
            await peer.client.events.get()

    for arguments in [
        {}, {"addr": 1}, {"addr": {"type": "foo"}}, {"addr": {"type": "unix"}}, {"addr": {"type": "unix", "data": {}}},
        {"addr": {"type": "unix", "data": {"path": 1}}}, {"addr": {"type": "unix", "data": {"path": path, "foo": 1}}},
        {"addr": {"type": "inet", "data": {"host": "127.0.0.1"}}}, {"addr": here, "max-connections": -1},
        {"addr": here, "handshake-max-seconds": "x"}, {"addr": here, "zoo": 1}, {"addr": here, "tls-creds": "t"},
    ]:
        answer = await peer.ask("nbd-server-start", arguments, hide=True)
        peer.show("nbd-server-start", str(arguments).replace(path, "PATH"), answer)
    for command, arguments in [
        ("nbd-server-stop", {}), ("nbd-server-stop", {"zoo": 1}), ("query-block-exports", {}),
        ("block-export-add", export("e", "a")), ("nbd-server-add", {"device": "a"}),
        ("block-export-add", export("e", "no")), ("block-export-del", {"id": "e"}),
        ("nbd-server-remove", {"name": "a"}),
    ]:
        await peer.ask(command, arguments)

    await objects(peer)
    await peer.must("nbd-server-start", {"addr": here, "max-connections": 0})
    again = await peer.ask("nbd-server-start", {"addr": here}, hide=True)
    peer.show("again", again)
    file = {"driver": "file", "filename": peer.config["dir"] + "/r.raw", "read-only": True}
    await peer.must("blockdev-add", {"driver": "raw", "node-name": "r", "read-only": True, "file": file})
    await peer.add("a", "on")
    await peer.add("a", "off", disabled=True)
    await peer.add("q", "q")
    await peer.add("r", "r")
    for arguments in [
        {}, {"type": "nbd"}, {"type": "nbd", "id": "e"}, {"id": "e", "node-name": "a"},
        {"type": "zoo", "id": "e", "node-name": "a"}, export("", "a"), export("1", "a"), export("a/b", "a"),
        export("é", "a"), export("e", "no"), export("e", "r", writable=True), export("e", "a", name=LONG),
        export("e", "a", description=LONG), export("e", "a", writable=1), export("e", "a", zoo=1),
        export("e", "a", bitmaps=1), export("e", "a", bitmaps=[1]), export("e", "a", bitmaps=[{"node": "a"}]),
        export("e", "a", bitmaps=["no"]), export("e", "a", bitmaps=[of("no", "on")]),
        export("e", "a", bitmaps=[of("a", "no")]), export("e", "a", bitmaps=["on"]), export("e", "a", iothread="x"),
        export("e", "a", bitmaps=["off", of("a", "on")], fixed_iothread=True), export("e", "q"), export("f", "a", name="a"),
        export("f", "a", name="b", bitmaps=[of("a", "on")]), export("q", "q", writable=True, bitmaps=["q"]),
        export("r", "r", bitmaps=["r"], allocation_depth=True), export("n", "a", name=""),
    ]:
        await peer.ask("block-export-add", arguments)
    await peer.ask("query-block-exports")
    await peer.show_bitmaps("a", "q", "r")
    # A bitmap that records goes on, and what is shown with it.
    uri = f"nbd+unix:///q?socket={path}"
    for commands in (["write -P 1 1M 128k", "write -P 2 60M 64k"], ["write -z 2M 128k", "discard 1M 64k", "write -f 8M 64k"]):
        output("qemu-io", "-f", "raw", uri, *(word for command in commands for word in ("-c", command)))
        peer.show("dirty", extents(path, "q", "qemu:dirty-bitmap:q"))
        peer.show("allocated", extents(path, "q"))
        peer.show("dirty elsewhere", extents(path, "a", "qemu:dirty-bitmap:on"))
        await peer.show_bitmaps("q")
    for verb in ("clear", "remove", "enable", "disable"):
        await peer.ask(f"block-dirty-bitmap-{verb}", of("a", "on"))
    await peer.ask("block-dirty-bitmap-merge", {"node": "a", "target": "off", "bitmaps": ["on"]})
    await peer.ask("blockdev-del", {"node-name": "a"})

    for arguments in [{}, {"id": "no"}, {"id": "e", "mode": "zoo"}, {"id": "e", "zoo": 1}, {"id": "e"}, {"id": "e"}]:
        await peer.ask("block-export-del", arguments)
    await peer.show_events("BLOCK_EXPORT_DELETED")
    await peer.ask("block-dirty-bitmap-clear", of("a", "on"))

    for arguments in [
        {}, {"device": "no"}, {"device": "r", "writable": True}, {"device": "a", "name": "1"},
        {"device": "a", "name": "q"}, {"device": "a", "name": "s", "bitmap": "no"},
        {"device": "a", "name": "s", "bitmap": "off"}, {"device": "a", "zoo": 1},
    ]:
        await peer.ask("nbd-server-add", arguments)
    await peer.ask("query-block-exports")

    # One with a client goes by force alone, and is over for the client then.
    client = Client(path, "q")
    peer.show("read-only", bool(client.flags & 2))
    await peer.ask("block-export-del", {"id": "q"})
    await peer.ask("nbd-server-remove", {"name": "q", "mode": "safe"})
    await peer.ask("block-export-del", {"id": "q", "mode": "hard"})
    peer.show("ended", client.is_ended())
    client.leave()
    await peer.show_events("BLOCK_EXPORT_DELETED")
    await peer.ask("query-block-exports")
    await peer.ask("block-dirty-bitmap-clear", of("q", "q"))

    client = Client(path, "s")
    await peer.ask("nbd-server-stop")
    peer.show("ended", client.is_ended())
    for _ in range(3):
        await peer.show_events("BLOCK_EXPORT_DELETED")
    await peer.ask("query-block-exports")
    await peer.ask("nbd-server-stop")
    await peer.show_bitmaps("a", "q", "r")
    # The name is free again.
    await peer.must("nbd-server-start", {"addr": here})
    await peer.must("nbd-server-stop")


run(main)
