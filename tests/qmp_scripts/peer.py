"""A QMP server and its disks, fleecefs or qemu-storage-daemon alike, driven by QEMU's own client.

A script takes one argument: a JSON object with
  side     "fleecefs" or "qemu"
  socket   the QMP socket
  disks    {NODE: {"image": the image's path, "guest": what qemu-io opens to write as the guest does}}
  plus what the script names itself.
It prints one JSON line for each question with its answer, the same on both sides, so that they can be compared.
"""

import asyncio
import json
import subprocess
import sys

from qemu.qmp import ExecuteError, QMPClient

# What differs between two hosts and says nothing: paths, names that QEMU makes up, what it tells beyond its schema's
# demands.
HIDDEN = {"filename", "file", "actual-size", "format-specific", "full-backing-filename", "backing-filename", "hint", "errno"}


class Peer:
    def __init__(self, config):
        self.config = config
        self.ours = config["side"] == "fleecefs"
        self.client = QMPClient("script")
        self.client.logger.setLevel(100)
        self.step = 0

    async def ask(self, command, arguments=None, show=None, hide=False):
        """Asks; prints question and answer unless hidden; gives the answer."""
        try:
            answer = {"return": await self.client.execute(command, arguments or {})}
        except ExecuteError as e:
            answer = {"error": {"class": e.error_class, "desc": str(e)}}
        if not hide:
            self.show(command, arguments, show(answer) if show else answer)
        return answer

    def show(self, *line):
        self.step += 1
        print(json.dumps([self.step, *line], sort_keys=True))

    async def must(self, command, arguments=None):
        """Asks, prints nothing, and ends the script where that fails."""
        answer = await self.ask(command, arguments, hide=True)
        if "return" not in answer:
            raise SystemExit(f"{command} {arguments}: {answer}")
        return answer["return"]

    async def bitmaps(self, node):
        """The bitmaps of a node, newest first, as QEMU lists them."""
        nodes = await self.must("query-named-block-nodes", {"flat": True})
        rows = [row.get("dirty-bitmaps", []) for row in nodes if row["node-name"] == node]
        return rows[0] if rows else None

    async def show_bitmaps(self, *nodes):
        for node in nodes:
            self.show("bitmaps of", node, await self.bitmaps(node))

    async def sha256(self, node, name):
        return (await self.must("x-debug-block-dirty-bitmap-sha256", {"node": node, "name": name}))["sha256"]

    async def show_sha256(self, *bitmaps):
        for node, name in bitmaps:
            self.show("sha256 of", node, name, await self.sha256(node, name))

    async def show_events(self, last=None):
        """Prints the events up to the one named `last`; their times are hidden."""
        while True:
            event = await asyncio.wait_for(self.client.events.get(), 60)
            self.show("event", event["event"], event.get("data"))
            if last is None or event["event"] == last:
                return

    def guest(self, node, *commands):
        """Runs qemu-io commands as the guest."""
        words = [word for command in commands for word in ("-c", command)]
        done = subprocess.run(
            ["qemu-io", "-f", "raw", self.config["disks"][node]["guest"], *words],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120,
        )
        if done.returncode or "failed" in done.stdout + done.stderr:
            raise SystemExit(f"qemu-io {commands}: {done.stdout}{done.stderr}")

    async def resize(self, node, size):
        if self.ours:
            await self.must("fleecefs-disk-resize", {"name": node, "size": size})
            return
        # QEMU resizes no node that is exported.
        exports = await self.must("query-block-exports")
        await self.must("block-export-del", {"id": f"export-{node}", "mode": "hard"})
        while len(await self.must("query-block-exports")) == len(exports):
            await asyncio.sleep(0.01)
        await self.must("block_resize", {"node-name": node, "size": size})
        export = {"type": "nbd", "id": f"export-{node}", "node-name": node, "name": node, "writable": True}
        await self.must("block-export-add", export)

    async def add(self, node, name, **more):
        await self.must("block-dirty-bitmap-add", {"node": node, "name": name, **more})


def without_hidden(value):
    if isinstance(value, dict):
        return {k: without_hidden(v) for k, v in value.items() if k not in HIDDEN}
    if isinstance(value, list):
        return [without_hidden(v) for v in value]
    return value


def run(main):
    async def whole():
        peer = Peer(json.loads(sys.argv[1]))
        await peer.client.connect(peer.config["socket"])
        await main(peer)
        await peer.client.disconnect()

    asyncio.run(whole())
