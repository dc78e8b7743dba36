#!/usr/bin/env python3
"""LVM2 metadata without LVM2 and without fleecefs.

lvm.py make SPEC             writes labels and metadata; SPEC is JSON:
    {"vg": NAME, "extent": BYTES, "pvs": [{"file": F, "offset": N, "size": N}, ...],
     "lvs": {NAME: [{"count": EXTENTS, "stripe": BYTES, "places": [[PV, EXTENT], ...]}, ...]}}
lvm.py read LV OUT FILE@OFFSET...
    finds the physical volumes at these places, reads the text metadata of the newest, and copies what LV holds to OUT,
    stripe by stripe
lvm.py areas FILE@OFFSET...  prints where each physical volume's metadata lie: FILE OFFSET LENGTH
"""
import json
import re
import struct
import sys
import zlib

SECTOR = 512
MDA_START, MDA_SIZE, PE_START = 4096, 1 << 20, 2 << 20
MAGIC = b" LVM2 x[5A%r0N*>"


def crc(data):
    return zlib.crc32(data, 0xF597A6CF ^ 0xFFFFFFFF) ^ 0xFFFFFFFF


def uuid_of(text):
    letters = "".join("0123456789abcdefghijklmnopqrstuvwxyz"[b % 36] for b in (text * 32).encode()[:32])
    return letters


def dashed(uuid):
    ends = [6, 10, 14, 18, 22, 26, 32]
    return "-".join(uuid[a:b] for a, b in zip([0] + ends, ends))


def text_of(spec, uuids):
    extent = spec["extent"] // SECTOR
    out = [spec["vg"] + " {", f'id = "{dashed(uuid_of("vg" + spec["vg"]))}"', "seqno = 7", 'format = "lvm2"',
           'status = ["RESIZEABLE", "READ", "WRITE"]', "flags = []", f"extent_size = {extent}", "max_lv = 0", "max_pv = 0",
           "metadata_copies = 0", "", "physical_volumes {"]
    for n, (pv, uuid) in enumerate(zip(spec["pvs"], uuids)):
        count = (pv["size"] - PE_START) // spec["extent"]
        out += [f"pv{n} {{", f'id = "{dashed(uuid)}"', 'device = "/dev/none"\t# Hint only', 'status = ["ALLOCATABLE"]',
                "flags = []", f'dev_size = {pv["size"] // SECTOR}', f"pe_start = {PE_START // SECTOR}",
                f"pe_count = {count}", "}"]
    out += ["}", "", "logical_volumes {"]
    for name, segments in spec["lvs"].items():
        out += [f"{name} {{", f'id = "{dashed(uuid_of("lv" + name))}"', 'status = ["READ", "WRITE", "VISIBLE"]',
                "flags = []", f"segment_count = {len(segments)}"]
        start = 0
        for n, segment in enumerate(segments, 1):
            places = segment["places"]
            out += [f"segment{n} {{", f"start_extent = {start}", f'extent_count = {segment["count"]}', 'type = "striped"',
                    f"stripe_count = {len(places)}"]
            if len(places) > 1:
                out.append(f'stripe_size = {segment["stripe"] // SECTOR}')
            out += ["stripes = ["] + [",\n".join(f'"pv{pv}", {at}' for pv, at in places)] + ["]", "}"]
            start += segment["count"]
        out.append("}")
    out += ["}", "}", '# Generated', 'contents = "Text Format Volume Group"', "version = 1", 'description = ""',
            'creation_host = "test"', "creation_time = 1700000000", ""]
    return "\n".join(out).encode() + b"\0"


def make(spec):
    uuids = [uuid_of(f"pv{n}{spec['vg']}") for n in range(len(spec["pvs"]))]
    text = text_of(spec, uuids)
    for pv, uuid in zip(spec["pvs"], uuids):
        pairs = [(PE_START, 0), (0, 0), (MDA_START, MDA_SIZE), (0, 0)]
        header = uuid.encode() + struct.pack("<Q", pv["size"]) + b"".join(struct.pack("<QQ", *p) for p in pairs)
        header += struct.pack("<II", 2, 1) + struct.pack("<QQ", 0, 0)
        tail = (struct.pack("<I", 32) + b"LVM2 001" + header).ljust(SECTOR - 20, b"\0")
        label = b"LABELONE" + struct.pack("<QI", 1, crc(tail)) + tail
        # The text wraps around the end of its ring.
        ring = MDA_SIZE - SECTOR
        first = MDA_SIZE - 700
        locations = struct.pack("<QQII", first, len(text), crc(text), 0).ljust(96, b"\0")
        rest = (MAGIC + struct.pack("<IQQ", 1, MDA_START, MDA_SIZE) + locations).ljust(SECTOR - 4, b"\0")
        with open(pv["file"], "r+b") as file:
            def put(at, data):
                file.seek(pv["offset"] + at)
                file.write(data)
            put(SECTOR, label)
            put(MDA_START, struct.pack("<I", crc(rest)) + rest)
            room = MDA_SIZE - first
            assert len(text) - room < ring
            put(MDA_START + first, text[:room])
            put(MDA_START + SECTOR, text[room:])


class Pv:
    def __init__(self, place):
        self.path, offset = place.rsplit("@", 1)
        self.offset, self.file = int(offset), open(self.path, "rb")
        label = next(s for s in (self.at(n * SECTOR, SECTOR) for n in range(4)) if s[:8] == b"LABELONE")
        assert struct.unpack("<I", label[16:20])[0] == crc(label[20:])
        header = label[struct.unpack("<I", label[20:24])[0]:]
        self.uuid = dashed(header[:32].decode())
        pairs = struct.iter_unpack("<QQ", header[40:40 + 16 * 20])
        lists = [[]]
        for pair in pairs:
            if pair[0] == 0:
                lists.append([])
            else:
                lists[-1].append(pair)
        (self.mda, self.mda_size), = lists[1]
        head = self.at(self.mda, SECTOR)
        assert head[4:20] == MAGIC and struct.unpack("<I", head[:4])[0] == crc(head[4:])
        first, length = struct.unpack("<QQ", head[40:56])
        data = self.at(self.mda + first, min(length, self.mda_size - first))
        self.text = (data + self.at(self.mda + SECTOR, length - len(data))).rstrip(b"\0").decode()

    def at(self, offset, length):
        self.file.seek(self.offset + offset)
        return self.file.read(length)


def parse(text):
    """Nested {name: ...} of LVM's text."""
    text = re.sub(r"#[^\n]*", "", text)
    tokens = re.findall(r'"[^"]*"|[{}=\[\],]|[^\s{}=\[\],"]+', text)
    at = 0

    def section():
        nonlocal at
        found = {}
        while at < len(tokens) and tokens[at] != "}":
            name = tokens[at]
            at += 1
            if tokens[at] == "{":
                at += 1
                found[name] = section()
                at += 1
                continue
            at += 1
            if tokens[at] == "[":
                end = tokens.index("]", at)
                found[name] = [value(t) for t in tokens[at + 1:end] if t != ","]
                at = end + 1
            else:
                found[name] = value(tokens[at])
                at += 1
        return found

    def value(token):
        return token[1:-1] if token[0] == '"' else int(token)

    return section()


def read(name, out, places):
    pvs = {pv.uuid: pv for pv in map(Pv, places)}
    newest = max((parse(pv.text) for pv in pvs.values()), key=lambda t: next(v for v in t.values() if isinstance(v, dict))["seqno"])
    vg = next(v for v in newest.values() if isinstance(v, dict))
    extent = vg["extent_size"] * SECTOR
    lv = vg["logical_volumes"][name]
    with open(out, "wb") as target:
        for n in range(1, lv["segment_count"] + 1):
            segment = lv[f"segment{n}"]
            stripes = list(zip(segment["stripes"][::2], segment["stripes"][1::2]))
            size = segment["extent_count"] * extent
            step = segment.get("stripe_size", size // SECTOR) * SECTOR
            for done in range(0, size, step):
                row, column = divmod(done // step, len(stripes))
                pv_name, first = stripes[column]
                pv = vg["physical_volumes"][pv_name]
                offset = pv["pe_start"] * SECTOR + first * extent + row * step
                target.seek(segment["start_extent"] * extent + done)
                target.write(pvs[pv["id"]].at(offset, min(step, size - done)))


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(json.loads(sys.argv[2]))
    elif sys.argv[1] == "read":
        read(sys.argv[2], sys.argv[3], sys.argv[4:])
    else:
        for pv in map(Pv, sys.argv[2:]):
            print(pv.path, pv.offset + pv.mda, pv.mda_size)
