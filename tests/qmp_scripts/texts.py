"""What is refused, and in which words. Disks: a, b (raw, 64 MiB), c (raw, 32 MiB), q (qcow2, 64 MiB)."""

from peer import run

MIB = 1 << 20
LONG = "x" * 1024

ADD = [
    {},
    {"zoo": 1},
    {"node": 1, "name": 1},
    {"node": "a", "zoo": 1},
    {"node": "a", "name": 1},
    {"node": "nope", "name": "x"},
    {"node": "a", "name": ""},
    {"node": "a", "name": "x", "zoo": 1},
    {"node": "a", "name": "x", "granularity": 64000},
    {"node": "a", "name": "x", "granularity": 256},
    {"node": "a", "name": "x", "granularity": 0},
    {"node": "a", "name": "x", "granularity": 1 << 32},
    {"node": "a", "name": "x", "granularity": -1},
    {"node": "a", "name": "x", "granularity": "1"},
    {"node": "a", "name": "x", "granularity": 1.5},
    {"node": "a", "name": "x", "persistent": 1},
    {"node": "a", "name": "x", "disabled": "yes"},
    {"node": "a", "name": LONG},
    {"node": "q", "name": LONG},
    {"node": "q", "name": LONG, "persistent": True},
    {"node": "a", "name": "big", "granularity": 1 << 31},
    {"node": "q", "name": "small", "granularity": 512, "disabled": True},
    {"node": "q", "name": "p", "persistent": True},
    {"node": "q", "name": "p"},
    {"node": "q", "name": "p", "persistent": True, "granularity": 65536},
    {"node": "a", "name": "x"},
    {"node": "a", "name": "x"},
    {"node": "c", "name": "c"},
]
ONE = [
    {},
    {"node": "a"},
    {"name": "x"},
    {"node": 1, "name": "x"},
    {"node": "a", "name": 1},
    {"node": "a", "name": "x", "zoo": 1},
    {"node": "nope", "name": "x"},
    {"node": "a", "name": "nope"},
    {"node": "a", "name": ""},
]
MERGE = [
    {},
    {"node": "q"},
    {"node": "q", "target": "p"},
    {"node": "q", "target": "p", "bitmaps": "p"},
    {"node": "q", "target": "p", "bitmaps": [1]},
    {"node": "q", "target": "p", "bitmaps": ["p", None]},
    {"node": "q", "target": "p", "bitmaps": [["p"]]},
    {"node": "q", "target": "p", "bitmaps": [{}]},
    {"node": "q", "target": "p", "bitmaps": ["p", {"node": "a"}]},
    {"node": "q", "target": "p", "bitmaps": [{"node": "a", "name": "x", "zoo": 1}]},
    {"node": "q", "target": "p", "bitmaps": [{"node": "nope", "name": "x"}]},
    {"node": "q", "target": "p", "bitmaps": [{"node": "a", "name": "nope"}]},
    {"node": "q", "target": "p", "bitmaps": ["nope"]},
    {"node": "q", "target": "nope", "bitmaps": ["p"]},
    {"node": "nope", "target": "p", "bitmaps": ["p"]},
    {"node": "q", "target": "p", "bitmaps": [{"node": "c", "name": "c"}]},
    {"node": "q", "target": "p", "bitmaps": ["p", {"node": "c", "name": "c"}]},
    {"node": "q", "target": "p", "bitmaps": ["p"]},
    {"node": "q", "target": "p", "bitmaps": [{"node": "a", "name": "x"}, "small"]},
]


def add(**more):
    return {"type": "block-dirty-bitmap-add", "data": {"node": "q", "name": "t1", **more}}


def of(command, **data):
    return {"type": f"block-dirty-bitmap-{command}", "data": data}


ABORT = {"type": "abort", "data": {}}
TRANSACTION = [
    {},
    {"actions": 1},
    {"actions": []},
    {"actions": [1]},
    {"actions": [{}]},
    {"actions": [{"type": 1}]},
    {"actions": [{"type": "zoo"}]},
    {"actions": [{"type": "zoo", "data": {}}]},
    {"actions": [{"type": "abort"}]},
    {"actions": [{"type": "abort", "data": 1}]},
    {"actions": [{"type": "abort", "data": {"x": 1}}]},
    {"actions": [{"type": "abort", "data": {}, "zoo": 1}]},
    {"actions": [ABORT]},
    {"actions": [of("add")]},
    {"actions": [of("add", node="q")]},
    {"actions": [of("add", node="q", name=1)]},
    {"actions": [of("add", node="nope", name="x")]},
    {"actions": [add(), of("clear", node="nope", name="x")]},
    {"actions": [add(), of("clear", node="q", name="nope")]},
    {"actions": [add(), of("remove", node="q", name="nope")]},
    {"actions": [add(granularity="1")]},
    {"actions": [add(granularity=-1)]},
    {"actions": [add(granularity=3)]},
    {"actions": [add(), add()]},
    {"actions": [add(zoo=1)]},
    {"actions": [of("merge", node="q", target="p", bitmaps=[{"node": "a", "zoo": "x"}])]},
    {"actions": [of("merge", node="q", target="p", bitmaps=[1])]},
    {"actions": [add(), of("merge", node="q", target="t1", bitmaps=["nope"])]},
    {"actions": [add()], "properties": {"completion-mode": "grouped"}},
    {"actions": [ABORT], "properties": {"completion-mode": "grouped"}},
    {"actions": [], "properties": {"completion-mode": "grouped"}},
    {"actions": [], "properties": {"completion-mode": "zoo"}},
    {"actions": [], "properties": {"zoo": "zoo"}},
    {"actions": [], "properties": 1},
    {"actions": [], "properties": {}},
    {"actions": [], "zoo": {}},
    # A name becomes free when the transaction is done, not before.
    {"actions": [add(), of("remove", node="q", name="t1"), add()]},
    {"actions": [of("remove", node="q", name="p"), of("add", node="q", name="p")]},
    {"actions": [of("remove", node="q", name="p"), of("clear", node="q", name="p")]},
    {"actions": [of("remove", node="q", name="p"), of("remove", node="q", name="p")]},
]
JOBS = [
    ("query-jobs", [{}, {"a": 1}]),
    ("query-block-jobs", [{}, {"a": 1}]),
    ("job-cancel", [{}, {"id": 1}, {"id": "x"}, {"id": "x", "zoo": 1}]),
    ("job-dismiss", [{}, {"id": "x"}]),
    ("job-finalize", [{}, {"id": "x"}]),
    ("block-job-cancel", [{}, {"device": "x"}, {"device": "x", "force": 1}, {"device": "x", "force": True}]),
    (
        "block-job-set-speed",
        [{}, {"device": "x"}, {"device": "x", "speed": "1"}, {"device": "x", "speed": -1}, {"device": "x", "speed": 1}],
    ),
]
QUERIES = [
    ("query-block", [{"zoo": 1}]),
    ("query-named-block-nodes", [{"flat": 1}, {"zoo": 1}]),
    ("x-debug-block-dirty-bitmap-sha256", [{}, {"node": "nope", "name": "x"}, {"node": "a", "name": "nope"}]),
    ("no-such-command", [{}]),
]


async def main(peer):
    for arguments in ADD:
        await peer.ask("block-dirty-bitmap-add", arguments)
    for command in ("remove", "clear", "enable", "disable"):
        for arguments in ONE:
            await peer.ask(f"block-dirty-bitmap-{command}", arguments)
    for arguments in MERGE:
        await peer.ask("block-dirty-bitmap-merge", arguments)
    for arguments in TRANSACTION:
        await peer.ask("transaction", arguments)
        await peer.show_bitmaps("q")
    for command, each in JOBS + QUERIES:
        for arguments in each:
            await peer.ask(command, arguments)
    await peer.show_bitmaps("a", "b", "c", "q")
    await peer.show_sha256(("a", "x"), ("q", "p"), ("q", "small"))


run(main)
