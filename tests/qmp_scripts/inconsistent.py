"""Bitmaps whose bits are lost. Disk: q (qcow2, 64 MiB) with the bitmaps lost and gone, both in use by nobody."""

from peer import run


async def main(peer):
    async def show():
        # QEMU lists them in another order after an open.
        peer.show("bitmaps", sorted(await peer.bitmaps("q"), key=lambda row: row["name"]))

    await show()
    await peer.ask("block-dirty-bitmap-add", {"node": "q", "name": "lost"})
    for command in ("clear", "enable", "disable"):
        await peer.ask(f"block-dirty-bitmap-{command}", {"node": "q", "name": "lost"})
    await peer.add("q", "fresh")
    for target, source in (("lost", "fresh"), ("fresh", "lost"), ("lost", "lost")):
        await peer.ask("block-dirty-bitmap-merge", {"node": "q", "target": target, "bitmaps": [source]})
    await peer.ask("transaction", {"actions": [
        {"type": "block-dirty-bitmap-remove", "data": {"node": "q", "name": "lost"}},
        {"type": "abort", "data": {}},
    ]})
    await show()
    await peer.ask("block-dirty-bitmap-remove", {"node": "q", "name": "lost"})
    await peer.ask("transaction", {"actions": [
        {"type": "block-dirty-bitmap-remove", "data": {"node": "q", "name": "gone"}},
    ]})
    await show()
    await peer.add("q", "lost", persistent=True)
    peer.guest("q", "write -P 1 0 64k")
    await show()


run(main)
