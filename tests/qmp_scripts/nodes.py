"""Nodes come and go. Config: `dir`, a directory with n.raw (1 MiB), n.qcow2 (2 MiB), text, and the directory sub."""

import os

from peer import run, without_hidden

REFUSED = [
    {},
    {"driver": 1},
    {"driver": "zoo"},
    {"driver": "raw"},
    {"driver": "raw", "node-name": "x"},
    {"driver": "raw", "file": "x"},
    {"driver": "file", "filename": "@n.raw"},
    {"driver": "file", "node-name": "f"},
    {"driver": "file", "node-name": "f", "filename": 1},
    {"driver": "file", "node-name": "f", "filename": ""},
    {"driver": "file", "node-name": "f", "filename": "@sub"},
    {"driver": "file", "node-name": "f f", "filename": "@n.raw"},
    {"driver": "file", "node-name": "1f", "filename": "@n.raw"},
    {"driver": "file", "node-name": "", "filename": "@n.raw"},
    {"driver": "file", "node-name": "f" * 32, "filename": "@n.raw"},
    {"driver": "file", "node-name": "f", "filename": "@n.raw", "zoo": 1},
    {"driver": "file", "node-name": "f", "filename": "@n.raw", "read-only": "x"},
    {"driver": "file", "node-name": "f", "filename": "@n.raw", "discard": "zoo"},
    {"driver": "raw", "node-name": "x", "file": "nope"},
    {"driver": "raw", "node-name": "x", "file": 1},
    {"driver": "raw", "node-name": "x", "file": {}},
    {"driver": "raw", "node-name": "x", "file": {"driver": "zoo"}},
    {"driver": "raw", "node-name": "x", "file": {"driver": "file"}},
    {"driver": "raw", "node-name": "x", "file": {"driver": "file", "filename": "@n.raw", "zoo": 1}},
    {"driver": "raw", "node-name": "x", "file": {"driver": "file", "filename": "@n.raw"}, "zoo": 1},
    {"driver": "raw", "node-name": "x", "file": {"driver": "file", "filename": "@n.raw"}, "cache": 1},
    {"driver": "raw", "node-name": "x", "file": {"driver": "file", "filename": "@n.raw"}, "cache": {"direct": 1}},
    {"driver": "raw", "node-name": "x", "file": {"driver": "file", "filename": "@n.raw"}, "cache": {"zoo": 1}},
    {"driver": "qcow2", "node-name": "x", "file": {"driver": "file", "filename": "@n.raw"}, "l2-cache-size": "x"},
    {"driver": "raw", "node-name": "a", "file": {"driver": "file", "filename": "@n.raw"}},
]
MISSING = {"driver": "raw", "node-name": "x", "file": {"driver": "file", "filename": "@none.raw"}}
STEPS = [
    ("blockdev-add", {"driver": "file", "node-name": "f", "filename": "@n.raw", "auto-read-only": True}),
    ("blockdev-add", {"driver": "file", "node-name": "f", "filename": "@n.raw"}),
    ("blockdev-add", {"driver": "raw", "node-name": "x", "file": "f", "discard": "unmap"}),
    ("blockdev-del", {"node-name": "f"}),
    ("blockdev-del", {"node-name": "x"}),
    ("blockdev-add", {"driver": "raw", "node-name": "x", "file": "f", "read-only": True}),
    ("query", "x"),
    ("blockdev-del", {"node-name": "x"}),
    ("blockdev-del", {"node-name": "x"}),
    ("blockdev-del", {"node-name": "f"}),
    ("blockdev-del", {"node-name": "f"}),
    ("blockdev-del", {}),
    ("blockdev-del", {"node-name": 1}),
    ("blockdev-add", {"driver": "qcow2", "node-name": "x", "file": {"driver": "file", "filename": "@n.qcow2"}}),
    ("query", "x"),
    ("block-dirty-bitmap-add", {"node": "x", "name": "kept", "persistent": True}),
    ("block-dirty-bitmap-add", {"node": "x", "name": "lost"}),
    ("query", "x"),
    ("blockdev-del", {"node-name": "x"}),
    ("blockdev-add", {"driver": "qcow2", "node-name": "x", "file": {"driver": "file", "filename": "@n.qcow2"}}),
    ("query", "x"),
    ("blockdev-del", {"node-name": "x"}),
]


def paths(value, place):
    """`@NAME` is a file in the directory."""
    if isinstance(value, dict):
        return {k: paths(v, place) for k, v in value.items()}
    if isinstance(value, str) and value.startswith("@"):
        return os.path.join(place, value[1:])
    return value


async def main(peer):
    place = peer.config["dir"]

    def shown(arguments):
        return lambda answer: {**answer, "error": {"desc": answer["error"]["desc"].replace(place, "DIR")}} if "error" in answer else answer

    async def ask(command, arguments):
        answer = await peer.ask(command, paths(arguments, place), hide=True)
        peer.show(command, arguments, shown(arguments)(answer))

    for arguments in REFUSED:
        await ask("blockdev-add", arguments)
    await ask("blockdev-add", MISSING)
    for command, arguments in STEPS:
        if command != "query":
            await ask(command, arguments)
            continue
        nodes = await peer.must("query-named-block-nodes", {"flat": True})
        for node in nodes:
            if node["node-name"] == arguments:
                peer.show("node", without_hidden(node))


run(main)
