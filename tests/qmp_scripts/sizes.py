"""Bitmaps over resizes, and over closes where they persist. Disk: q (qcow2, 64 GiB, 64 KiB clusters).

Config: `phase`, 0 to 3; the server is started anew before each, read-only before phase 2.
"""

from peer import run

K = 1024
G = 1 << 30
GRANULARITIES = (32 * K, 64 * K, 128 * K)


async def main(peer):
    phase = peer.config["phase"]

    async def bitmaps():
        # QEMU lists them the other way round after each open.
        return sorted(await peer.bitmaps("q"), key=lambda row: row["name"])

    async def show():
        peer.show("bitmaps", await bitmaps())

    await show()
    if phase == 0:
        for granularity in GRANULARITIES:
            await peer.add("q", f"kept{granularity}", granularity=granularity, persistent=True)
            await peer.add("q", f"lost{granularity}", granularity=granularity)
        await peer.ask("block-dirty-bitmap-add", {"node": "q", "name": "odd", "granularity": 64000})
        peer.guest("q", "write -P 1 0 64k", f"write -P 1 {60 * G} 1M")
        await peer.must("block-dirty-bitmap-disable", {"node": "q", "name": f"kept{128 * K}"})
    if phase == 1:
        await peer.must("block-dirty-bitmap-remove", {"node": "q", "name": f"kept{32 * K}"})
        await peer.add("q", "second", persistent=True)
        await peer.resize("q", 70 * G)
        await show()
        # Past the old end.
        peer.guest("q", f"write -P 2 {69 * G} 1M", f"write -P 2 {64 * G - 65536} 128k")
    if phase == 2:
        for command in ("clear", "enable", "disable", "remove"):
            await peer.ask(f"block-dirty-bitmap-{command}", {"node": "q", "name": "second"})
        await peer.ask("block-dirty-bitmap-merge", {"node": "q", "target": "second", "bitmaps": [f"kept{64 * K}"]})
        await peer.ask("block-dirty-bitmap-add", {"node": "q", "name": "temporary"})
        await peer.ask("block-dirty-bitmap-merge", {"node": "q", "target": "temporary", "bitmaps": [f"kept{64 * K}"]})
        await peer.ask("block-dirty-bitmap-add", {"node": "q", "name": "persistent", "persistent": True})
        await show()
        await peer.ask("block-dirty-bitmap-remove", {"node": "q", "name": "temporary"})
    if phase == 3:
        await peer.add("q", "third", persistent=True)
        await peer.must("block-dirty-bitmap-remove", {"node": "q", "name": "second"})
        await peer.resize("q", 50 * G)
        await show()
        peer.guest("q", f"write -P 2 {50 * G - 512} 512")
    await show()
    for row in await bitmaps():
        await peer.show_sha256(("q", row["name"]))


run(main)
