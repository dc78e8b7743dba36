"""Reads a map as its consumer does and prints it, a line for each range, for the test to compare.

    read.py imageio FILE    by oVirt imageio's own HTTP client; IMAGEIO is the directory of its unpacked source
    read.py csi FILE        as a message of CSI's SnapshotMetadata service, by protobuf's own JSON reader
    read.py borg FILE       by the grammar that `borg create --help` gives for --map
    read.py rbd FILE        as Benji reads `rbd diff --format json`: the first line of the file is all of it

Numbers are decimal. Anything that the consumer would refuse, or take for something else, is an error.
"""

import json
import os
import sys


def imageio(path):
    import http.server
    import threading
    import types
    from urllib.parse import urlparse

    sys.path.insert(0, os.environ["IMAGEIO"])
    # The part written in C, which has no say in extents.
    sys.modules["ovirt_imageio._internal.ioutil"] = types.ModuleType("ioutil")
    from ovirt_imageio._internal.backends import http as backend

    class Server(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def reply(self, body):
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_OPTIONS(self):
            self.reply(json.dumps({"features": ["extents"], "max_readers": 1}).encode())

        def do_GET(self):
            assert self.path == "/images/ticket/extents?context=dirty", self.path
            with open(path, "rb") as file:
                self.reply(file.read())

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = "http://127.0.0.1:%d/images/ticket" % server.server_port
    with backend.open(urlparse(url)) as image:
        for extent in image.extents("dirty"):
            assert all(type(value) is int for value in (extent.start, extent.length))
            yield extent.start, extent.length, extent.dirty, extent.zero


def csi(path):
    from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory

    # GetMetadataDeltaResponse of the CSI specification, version 1.10.
    file = descriptor_pb2.FileDescriptorProto(name="csi.proto", package="csi.v1", syntax="proto3")
    kinds = file.enum_type.add(name="BlockMetadataType")
    for number, name in enumerate(("UNKNOWN", "FIXED_LENGTH", "VARIABLE_LENGTH")):
        kinds.value.add(name=name, number=number)
    field = descriptor_pb2.FieldDescriptorProto

    def message(name, *fields):
        message = file.message_type.add(name=name)
        for number, (name, label, kind, of) in enumerate(fields, 1):
            message.field.add(name=name, number=number, label=label, type=kind, type_name=of)

    one, many = field.LABEL_OPTIONAL, field.LABEL_REPEATED
    message(
        "BlockMetadata",
        ("byte_offset", one, field.TYPE_INT64, None),
        ("size_bytes", one, field.TYPE_INT64, None),
    )
    message(
        "GetMetadataDeltaResponse",
        ("block_metadata_type", one, field.TYPE_ENUM, ".csi.v1.BlockMetadataType"),
        ("volume_capacity_bytes", one, field.TYPE_INT64, None),
        ("block_metadata", many, field.TYPE_MESSAGE, ".csi.v1.BlockMetadata"),
    )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    response = message_factory.GetMessageClass(pool.FindMessageTypeByName("csi.v1.GetMetadataDeltaResponse"))
    with open(path) as file:
        reply = json_format.Parse(file.read(), response())
    # Over the wire and back.
    reply = response.FromString(reply.SerializeToString())
    assert reply.block_metadata_type == 2, "VARIABLE_LENGTH"
    end = 0
    for block in reply.block_metadata:
        assert block.byte_offset >= end and block.size_bytes > 0, "not in order: %s" % block
        end = block.byte_offset + block.size_bytes
        assert end <= reply.volume_capacity_bytes, "behind the end: %s" % block
        yield block.byte_offset, block.size_bytes
    yield "capacity", reply.volume_capacity_bytes


def borg(path):
    end = 0
    with open(path) as file:
        for line in file:
            line = line.split("#", 1)[0].strip()
            if line:
                start, length, state = line.split()
                start, length = int(start, 0), int(length, 0)
                assert start == end and length > 0, "gap or overlap: %r" % line
                assert state in ("data", "zero", "same"), line
                end = start + length
                yield start, length, state
    yield "size", end


def rbd(path):
    with open(path) as file:
        extents = json.loads(file.readline())
        assert not file.read(), "more than one line"
    for extent in extents:
        assert sorted(extent) == ["exists", "length", "offset"] and extent["exists"] in ("true", "false"), extent
        yield extent["offset"], extent["length"], extent["exists"]


for row in {"imageio": imageio, "csi": csi, "borg": borg, "rbd": rbd}[sys.argv[1]](sys.argv[2]):
    print(*row)
