"""Whether our answers and events are what QEMU's own schema says of them.

Config: `qemu`, a QMP socket of qemu-storage-daemon, which tells the schema. Disks: any, with bitmaps.
"""

import asyncio

from qemu.qmp import QMPClient

from peer import run

# Members of our own, that QEMU's schema does not know.
OURS = {"checkpoint"}


class Schema:
    def __init__(self, entries):
        self.entries = {entry["name"]: entry for entry in entries}

    def check(self, kind, value, way):
        entry = self.entries[kind]
        meta = entry["meta-type"]
        if meta == "builtin":
            types = {
                "string": str, "int": int, "number": (int, float), "boolean": bool, "null": type(None),
                "object": dict, "array": list, "value": object,
            }
            fits = isinstance(value, types[entry["json-type"]])
            assert fits and (entry["json-type"] == "boolean" or not isinstance(value, bool)), (way, value, entry)
        elif meta == "enum":
            assert value in [member["name"] for member in entry["members"]], (way, value)
        elif meta == "array":
            assert isinstance(value, list), (way, value)
            for index, element in enumerate(value):
                self.check(entry["element-type"], element, f"{way}[{index}]")
        elif meta == "object":
            self.check_object(entry, value, way)
        elif meta == "alternate":
            raise AssertionError(f"{way}: an alternate in an answer")

    def members(self, entry, value):
        found = {member["name"]: member for member in entry["members"]}
        for variant in entry.get("variants", []):
            if variant["case"] == value.get(entry["tag"]):
                found |= self.members(self.entries[variant["type"]], value)
        return found

    def check_object(self, entry, value, way):
        assert isinstance(value, dict), (way, value)
        members = self.members(entry, value)
        for name, member in members.items():
            if name in value:
                self.check(member["type"], value[name], f"{way}.{name}")
            else:
                assert "default" in member, f"{way}: {name} is missing in {value}"
        unknown = set(value) - set(members) - OURS
        assert not unknown, f"{way}: {unknown} of {value}"


async def check_jobs(peer, schema, node):
    """Jobs, live and ended, and the events that tell of them."""

    async def fits(command, arguments=None):
        answer = await peer.must(command, arguments)
        schema.check(schema.entries[command]["ret-type"], answer, command)
        return answer

    backup = {
        "job-id": "j", "device": node, "target": peer.config["target"], "sync": "full", "format": "raw", "speed": 1,
        "auto-finalize": False, "auto-dismiss": False,
    }
    schema.check(schema.entries["drive-backup"]["arg-type"], backup, "drive-backup")
    await fits("drive-backup", backup)
    assert len(await fits("query-jobs")) == len(await fits("query-block-jobs")) == 1
    for command, name in [
        ("job-pause", "id"), ("job-resume", "id"), ("block-job-pause", "device"), ("block-job-resume", "device"),
    ]:
        await fits(command, {name: "j"})
        await fits("query-block-jobs")
    await fits("block-job-set-speed", {"device": "j", "speed": 0})
    while (await fits("query-jobs"))[0]["status"] != "pending":
        await asyncio.sleep(0.01)
    await fits("job-finalize", {"id": "j"})
    assert (await fits("query-jobs"))[0]["status"] == "concluded"
    await fits("job-dismiss", {"id": "j"})
    seen = set()
    # What ends the job is followed by its last change.
    while True:
        event = await asyncio.wait_for(peer.client.events.get(), 60)
        schema.check(schema.entries[event["event"]]["arg-type"], event["data"], event["event"])
        seen.add(event["event"])
        if event["data"].get("status") == "null":
            break
    assert seen == {"JOB_STATUS_CHANGE", "BLOCK_JOB_PENDING", "BLOCK_JOB_COMPLETED"}, seen
    peer.show("jobs and their events fit")


async def main(peer):
    client = QMPClient("schema")
    await client.connect(peer.config["qemu"])
    schema = Schema(await client.execute("query-qmp-schema"))
    await client.disconnect()
    commands = [row["name"] for row in await peer.must("query-commands")]
    assert commands == sorted(commands), "sorted"
    for command in commands:
        entry = schema.entries.get(command)
        # QEMU's system emulator has more commands than its storage daemon.
        known = entry is not None and entry["meta-type"] == "command"
        assert known or command.startswith("fleecefs-") or command in ("query-status",), command
    asked = {
        "query-version": {}, "query-commands": {}, "query-block": {}, "query-named-block-nodes": {},
        "query-jobs": {}, "query-block-jobs": {},
    }
    node = next(iter(peer.config["disks"]))
    name = (await peer.bitmaps(node))[0]["name"]
    asked["x-debug-block-dirty-bitmap-sha256"] = {"node": node, "name": name}
    for command, arguments in asked.items():
        answer = await peer.must(command, arguments)
        schema.check(schema.entries[command]["ret-type"], answer, command)
        peer.show(command, "fits")
    blocks = await peer.must("query-block")
    assert [row["device"] for row in blocks] == sorted(peer.config["disks"]), blocks
    await check_jobs(peer, schema, node)


run(main)
