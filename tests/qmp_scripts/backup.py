"""Push backups: which bits are left, for each mode, end of the job and write meanwhile; what targets hold; groups.

Disks: a, b (raw, 16 MiB). Also: dir, where targets go; full, a file system without space in which full.raw has room for
its first MiB alone, and full2.raw none.
"""

import asyncio
import hashlib
import subprocess

from peer import run

M = 1 << 20
SIZE = 16 * M
ENDS = {"BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED"}


class Jobs:
    def __init__(self, peer):
        self.peer = peer

    async def begin(self, job, node, target, **more):
        data = {"job-id": job, "device": node, "target": target, **more}
        return await self.peer.ask("blockdev-backup", data)

    async def end(self, count=1, show=True):
        """Prints how jobs ended, in the order of their names, and the errors on the way."""
        lines = []
        while count:
            event = await asyncio.wait_for(self.peer.client.events.get(), 60)
            name, data = event["event"], event.get("data")
            if name in ENDS:
                count -= 1
                data["error"] = "error" in data
                if name == "BLOCK_JOB_CANCELLED":
                    # QEMU's has copied besides what the guest overwrote.
                    data.pop("offset")
                lines.append([name, data])
            elif name == "BLOCK_JOB_ERROR":
                lines.append([name, data])
        while self.jobs_left and await self.peer.must("query-jobs"):
            await asyncio.sleep(0.01)
        if show:
            self.peer.show("end", sorted(lines, key=str))

    jobs_left = True

    async def progress(self, job, at):
        for _ in range(1000):
            for row in await self.peer.must("query-jobs"):
                if row["id"] == job and row["current-progress"] == at:
                    return
            await asyncio.sleep(0.01)
        raise SystemExit(f"{job} does not come to {at}: {await self.peer.must('query-jobs')}")


def guest_hash(peer, node):
    out = subprocess.run(
        ["qemu-img", "dd", "-f", "raw", "-O", "raw", "bs=1M", "if=" + peer.config["disks"][node]["guest"],
         "of=" + peer.config["dir"] + "/guest.out"], capture_output=True, text=True, timeout=120)
    if out.returncode:
        raise SystemExit(out.stderr)
    with open(peer.config["dir"] + "/guest.out", "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def file_hash(path):
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


async def target(peer, name):
    """A node over a new sparse file."""
    path = peer.config["dir"] + "/" + name
    with open(path, "wb") as file:
        file.truncate(SIZE)
    await peer.must("blockdev-add", {"driver": "file", "node-name": name, "filename": path})
    return path


async def modes(peer, jobs):
    """Scenario 8: exact bits."""
    number = 0
    for sync in ("bitmap", "full", "incremental"):
        for mode in ("on-success", "never", "always"):
            if sync == "full" and mode == "never" or sync == "incremental" and mode != "on-success":
                continue
            for end in ("ok", "cancelled", "failed"):
                number += 1
                node = "t-fail" if end == "failed" else "t"
                await peer.add("a", "m", granularity=65536)
                peer.guest("a", f"write -P {number} 0 3M", f"write -P {number} 8M 64k")
                peer.show(sync, mode, end)
                await jobs.begin("j", "a", node, sync=sync, bitmap="m", **{"bitmap-mode": mode}, speed=65536)
                await jobs.progress("j", M)
                await peer.ask("block-dirty-bitmap-clear", {"node": "a", "name": "m"})
                # While it runs: what is copied, what is to be, what is neither. QEMU copies to the target before the
                # guest's write, which fails where the target is full.
                writes = ["write -P 91 0 64k", "write -P 93 12M 128k", "write -P 92 2M 64k"]
                peer.guest("a", *writes[:3 if end != "failed" else 1 if sync == "full" else 2])
                # QEMU lists the successor, too, without a name.
                peer.show([bitmap for bitmap in await peer.bitmaps("a") if "name" in bitmap])
                if end == "cancelled":
                    await peer.ask("block-job-cancel", {"device": "j"})
                else:
                    await peer.ask("block-job-set-speed", {"device": "j", "speed": 0})
                await jobs.end()
                await peer.show_bitmaps("a")
                await peer.show_sha256(("a", "m"))
                await peer.must("block-dirty-bitmap-remove", {"node": "a", "name": "m"})


async def retry(peer, jobs):
    """Scenario 9: a failed increment, more writes, and again."""
    path = await target(peer, "chain")
    await peer.must("block-dirty-bitmap-add", {"node": "a", "name": "i"})
    await peer.must("transaction", {"actions": [
        {"type": "block-dirty-bitmap-clear", "data": {"node": "a", "name": "i"}},
        {"type": "blockdev-backup", "data": {"job-id": "j", "device": "a", "target": "chain", "sync": "full"}},
    ]})
    await jobs.end()
    peer.show("equal", guest_hash(peer, "a") == file_hash(path))
    peer.guest("a", "write -P 31 4M 1M", "write -z 1M 64k", "write -P 32 16777152 64")
    await jobs.begin("j", "a", "t-fail2", sync="incremental", bitmap="i")
    await jobs.end(show=False)
    peer.guest("a", "write -P 33 5M 100k", "discard 9M 1M")
    await peer.show_bitmaps("a")
    await jobs.begin("j", "a", "chain", sync="incremental", bitmap="i")
    await jobs.end()
    await peer.show_bitmaps("a")
    peer.show("equal", guest_hash(peer, "a") == file_hash(path))
    await peer.must("block-dirty-bitmap-remove", {"node": "a", "name": "i"})


def backup(job, device, node, **more):
    return {"type": "blockdev-backup", "data": {"job-id": job, "device": device, "target": node, **more}}


async def groups(peer, jobs):
    """Scenario 10: one disk fails, both bitmaps keep their point."""
    grouped = {"properties": {"completion-mode": "grouped"}}
    await target(peer, "u")
    for properties in (grouped, {}):
        for node in ("a", "b"):
            await peer.add(node, "g", granularity=65536)
            peer.guest(node, "write -P 41 0 2M")
        await peer.ask("transaction", {"actions": [
            backup("ja", "a", "t", sync="incremental", bitmap="g"),
            backup("jb", "b", "t-fail2", sync="incremental", bitmap="g"),
        ], **properties})
        await jobs.end(2, show=False)
        await peer.show_bitmaps("a", "b")
        peer.guest("a", "write -P 42 3M 64k")
        await peer.ask("transaction", {"actions": [
            backup("ja", "a", "t", sync="bitmap", bitmap="g", **{"bitmap-mode": "always", "auto-finalize": False}),
            backup("jb", "b", "u", sync="incremental", bitmap="g"),
        ], **properties})
        if properties:
            while [row["status"] for row in await peer.must("query-jobs")] != ["pending", "pending"]:
                await asyncio.sleep(0.01)
            await peer.ask("query-jobs")
            await peer.ask("job-finalize", {"id": "ja"})
        else:
            while [row["status"] for row in await peer.must("query-jobs")] != ["pending"]:
                await asyncio.sleep(0.01)
            await peer.ask("job-finalize", {"id": "ja"})
        await jobs.end(2)
        await peer.show_bitmaps("a", "b")
        for node in ("a", "b"):
            await peer.must("block-dirty-bitmap-remove", {"node": node, "name": "g"})


async def verbs(peer, jobs):
    """Pause, resume, finalize, dismiss, and what is refused meanwhile."""
    await jobs.begin("j", "a", "t", sync="full", speed=65536, **{"auto-finalize": False, "auto-dismiss": False})
    await jobs.progress("j", M)
    await peer.ask("job-pause", {"id": "j"})
    await peer.ask("job-pause", {"id": "j"})
    await peer.ask("query-jobs")
    await peer.ask("query-block-jobs")
    await peer.ask("block-job-pause", {"device": "j"})
    await peer.ask("block-job-resume", {"device": "j"})
    await peer.ask("job-resume", {"id": "j"})
    await peer.ask("block-job-resume", {"device": "none"})
    await peer.ask("block-job-finalize", {"id": "j"})
    await peer.ask("block-job-dismiss", {"id": "j"})
    await jobs.begin("j", "b", "t", sync="full")
    await jobs.begin("k", "b", "t", sync="full")
    await jobs.begin("k", "a", "a", sync="full")
    await peer.ask("block-job-set-speed", {"device": "j", "speed": 0})
    while (await peer.must("query-jobs"))[0]["status"] != "pending":
        await asyncio.sleep(0.01)
    await peer.ask("query-block-jobs")
    await peer.ask("job-pause", {"id": "j"})
    await peer.ask("block-job-finalize", {"id": "j"})
    await peer.ask("query-jobs")
    await peer.ask("job-dismiss", {"id": "j"})
    jobs.jobs_left = False
    await jobs.end()
    jobs.jobs_left = True
    # An error of the target, for which the job stops: no space.
    for policy in ("stop", "enospc"):
        peer.guest("a", "write -P 5 0 16M")
        await jobs.begin("j", "a", "t-fail2", sync="full", **{"on-target-error": policy})
        while (await peer.must("query-jobs"))[0]["status"] != "paused":
            await asyncio.sleep(0.01)
        await peer.ask("query-block-jobs")
        await peer.ask("block-job-cancel", {"device": "j"})
        await peer.ask("block-job-cancel", {"device": "j", "force": True})
        await jobs.end(show=False)


async def none(peer, jobs):
    """The old content of what is overwritten."""
    peer.guest("a", "write -P 1 0 16M")
    path = await target(peer, "old")
    await jobs.begin("j", "a", "old", sync="none")
    peer.guest("a", "write -P 2 4k 4k", "write -P 2 1M 128k", "write -z 8M 64k")
    peer.guest("a", "write -P 3 4k 4k", "write -P 3 16777152 64")
    if peer.ours:
        await jobs.progress("j", 5 * 65536)
    await peer.ask("query-jobs")
    await peer.ask("job-cancel", {"id": "j"})
    await jobs.end()
    with open(path, "rb") as file:
        content = file.read()
    for start in range(0, SIZE, 65536):
        piece = content[start:start + 65536]
        if piece.strip(b"\0"):
            peer.show("old", start, piece == b"\1" * 65536)


REFUSED = [
    {},
    {"device": "a"},
    {"device": "a", "target": "t"},
    {"device": "nope", "target": "t", "sync": "full"},
    {"device": "a", "target": "nope", "sync": "full"},
    {"job-id": "1j", "device": "a", "target": "t", "sync": "full"},
    {"device": "a", "target": "a", "sync": "full"},
    {"device": "a", "target": "small", "sync": "full"},
    {"device": "a", "target": "ro", "sync": "full"},
    {"device": "a", "target": "t", "sync": "full", "compress": True},
    {"device": "a", "target": "t", "sync": "weird"},
    {"device": "a", "target": "t", "sync": "incremental"},
    {"device": "a", "target": "t", "sync": "bitmap"},
    {"device": "a", "target": "t", "sync": "bitmap", "bitmap": "b0"},
    {"device": "a", "target": "t", "sync": "bitmap", "bitmap": "nope", "bitmap-mode": "never"},
    {"device": "a", "target": "t", "sync": "bitmap", "bitmap-mode": "never"},
    {"device": "a", "target": "t", "sync": "incremental", "bitmap": "b0", "bitmap-mode": "always"},
    {"device": "a", "target": "t", "sync": "full", "bitmap": "b0", "bitmap-mode": "never"},
    {"device": "a", "target": "t", "sync": "full", "bitmap": "b0"},
    {"device": "a", "target": "t", "sync": "top", "bitmap": "b0", "bitmap-mode": "never"},
    {"device": "a", "target": "t", "sync": "none", "bitmap": "b0", "bitmap-mode": "never"},
    {"device": "a", "target": "t", "sync": "none", "bitmap": "b0"},
    {"device": "a", "target": "t", "sync": "full", "bitmap-mode": "never"},
    {"device": "a", "target": "t", "sync": "full", "bitmap": "nope", "bitmap-mode": "always"},
    {"device": "a", "target": "t", "sync": "full", "bitmap": "b0", "bitmap-mode": "weird"},
    {"device": "a", "target": "t", "sync": "full", "on-source-error": "weird"},
    {"device": "a", "target": "t", "sync": "full", "on-target-error": "weird"},
    {"device": "a", "target": "t", "sync": "full", "foo": 1},
    {"device": "a", "target": "t", "sync": "full", "x-perf": {"max-workers": 0}},
    {"device": "a", "target": "t", "sync": "full", "speed": "1"},
]


async def refusals(peer):
    await peer.add("a", "b0")
    for data in REFUSED:
        job = {} if "job-id" in data or "device" not in data else {"job-id": "j"}
        await peer.ask("blockdev-backup", {**job, **data})
    grouped = {"properties": {"completion-mode": "grouped"}}
    add = {"type": "block-dirty-bitmap-add", "data": {"node": "a", "name": "n"}}
    clear = {"type": "block-dirty-bitmap-clear", "data": {"node": "a", "name": "n"}}
    of_n = {"sync": "bitmap", "bitmap": "n", "bitmap-mode": "on-success"}
    for actions, properties in [
        ([backup("j", "a", "t", sync="full"), add], grouped),
        ([backup("j", "a", "t", sync="full"), add, {"type": "abort", "data": {}}], {}),
        ([backup("j", "a", "t", sync="full"), backup("k", "b", "t", sync="full")], {}),
        ([add, backup("j", "a", "t", **of_n), clear], {}),
        ([backup("j", "a", "t", sync="full"), backup("j", "b", "u", sync="full")], {}),
    ]:
        await peer.ask("transaction", {"actions": actions, **properties})
    await peer.show_bitmaps("a")
    await peer.must("block-dirty-bitmap-remove", {"node": "a", "name": "b0"})


async def main(peer):
    jobs = Jobs(peer)
    await target(peer, "t")
    for name, file in (("t-fail", "full.raw"), ("t-fail2", "full2.raw")):
        await peer.must("blockdev-add", {
            "driver": "file", "node-name": name, "filename": peer.config["full"] + "/" + file})
    small = peer.config["dir"] + "/small"
    with open(small, "wb") as file:
        file.truncate(M)
    await peer.must("blockdev-add", {"driver": "file", "node-name": "small", "filename": small})
    await peer.must("blockdev-add", {
        "driver": "file", "node-name": "ro", "filename": peer.config["dir"] + "/ro", "read-only": True})
    # Refusals that come after a job was made show in events alone, and not alike.
    await modes(peer, jobs)
    await retry(peer, jobs)
    await groups(peer, jobs)
    await verbs(peer, jobs)
    await none(peer, jobs)
    await refusals(peer)


run(main)
