"""Which bits writes set, and what transactions leave. Disks: a, b (raw, 64 MiB), q (qcow2, 64 MiB)."""

from peer import run

K = 1024
M = 1024 * K


def of(command, **data):
    return {"type": f"block-dirty-bitmap-{command}", "data": data}


ABORT = {"type": "abort", "data": {}}


async def main(peer):
    nodes = ("a", "q")
    for node in nodes:
        for granularity in (512, 4 * K, 32 * K, 64 * K, 128 * K):
            await peer.add(node, f"g{granularity}", granularity=granularity)
        await peer.add(node, "off", disabled=True)
        await peer.add(node, "default")
        # Whole, unaligned, across a boundary, the last bytes, zeroes, discards.
        peer.guest(node, "write -P 1 0 64k", "write -P 2 1M 512", "write -P 3 33554427 10", "write -P 4 67108352 512")
        await peer.show_bitmaps(node)
        peer.guest(node, "write -z 8M 1M", "discard 16M 1M", "write -P 5 131071 2")
        await peer.show_bitmaps(node)
        await peer.show_sha256(*[(node, f"g{granularity}") for granularity in (512, 4 * K, 32 * K, 64 * K, 128 * K)])

    # A bitmap that was built by merging equals one that recorded throughout.
    await peer.add("a", "all")
    await peer.add("a", "first")
    peer.guest("a", "write -P 1 4M 1M", "write -P 1 9M 1")
    await peer.must("transaction", {"actions": [
        of("disable", node="a", name="first"),
        of("add", node="a", name="second"),
    ]})
    peer.guest("a", "write -P 2 5M 1M", "write -P 2 63M 1M")
    await peer.must("block-dirty-bitmap-disable", {"node": "a", "name": "second"})
    await peer.add("a", "sum", disabled=True)
    await peer.must("block-dirty-bitmap-merge", {"node": "a", "target": "sum", "bitmaps": ["first", "second"]})
    await peer.show_bitmaps("a")
    assert await peer.sha256("a", "all") == await peer.sha256("a", "sum")
    await peer.show_sha256(("a", "all"), ("a", "first"), ("a", "second"), ("a", "sum"))

    # Other granularities, up and down, and other nodes.
    await peer.add("a", "coarse", granularity=1 * M, disabled=True)
    await peer.add("a", "fine", granularity=4 * K, disabled=True)
    await peer.must("block-dirty-bitmap-merge", {"node": "a", "target": "coarse", "bitmaps": ["first", "g512"]})
    await peer.must("block-dirty-bitmap-merge", {"node": "a", "target": "fine", "bitmaps": ["second"]})
    await peer.add("b", "other", disabled=True)
    await peer.must("block-dirty-bitmap-merge", {"node": "b", "target": "other", "bitmaps": [{"node": "a", "name": "fine"}]})
    await peer.show_bitmaps("a", "b")
    await peer.show_sha256(("a", "coarse"), ("a", "fine"), ("b", "other"))

    # Each way to be rolled back, from each step.
    steps = [
        of("clear", node="a", name="all"),
        of("add", node="a", name="new"),
        of("merge", node="a", target="new", bitmaps=["sum"]),
        of("disable", node="a", name="default"),
        of("enable", node="a", name="off"),
        of("remove", node="a", name="fine"),
        of("clear", node="b", name="other"),
        of("remove", node="q", name="default"),
    ]
    for count in range(len(steps) + 1):
        await peer.ask("transaction", {"actions": steps[:count] + [ABORT]})
        await peer.show_bitmaps("a", "b", "q")
        await peer.show_sha256(("a", "all"), ("b", "other"))
    await peer.ask("transaction", {"actions": steps[:5] + [of("clear", node="a", name="nope")]})
    await peer.show_bitmaps("a")
    await peer.ask("transaction", {"actions": steps})
    await peer.show_bitmaps("a", "b", "q")
    await peer.show_sha256(("a", "new"), ("a", "all"), ("a", "sum"))
    peer.guest("a", "write -P 3 40M 1M")
    await peer.show_bitmaps("a")

    # A merge that fails leaves its target alone; a merge of a bitmap with itself changes nothing.
    await peer.ask("block-dirty-bitmap-merge", {"node": "a", "target": "sum", "bitmaps": ["new", "nope"]})
    await peer.ask("block-dirty-bitmap-merge", {"node": "a", "target": "sum", "bitmaps": ["sum"]})
    await peer.show_bitmaps("a")

    # One at a time.
    for command in ("clear", "disable", "enable", "remove"):
        await peer.ask(f"block-dirty-bitmap-{command}", {"node": "a", "name": "all"})
        await peer.show_bitmaps("a")
        peer.guest("a", "write -P 3 41M 64k")
        await peer.show_bitmaps("a")


run(main)
