"""What is written is read back with the real protocol buffer library, from the published message definitions."""

import struct
import time

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from hybrid_dit.event_file import EventFile, crc32c

KINDS = {"double": 1, "float": 2, "int64": 3, "string": 9, "message": 11, "enum": 5}  # int32 stands for the enum
MESSAGES = {  # field: (number, type, message type, repeated), from tensorflow/core/util/event.proto and summary.proto
    "Value": {"tag": (1, "string"), "simple_value": (2, "float")},
    "Summary": {"value": (1, "message", "Value", True)},
    "SessionLog": {"status": (1, "enum")},
    "Event": {
        "wall_time": (1, "double"),
        "step": (2, "int64"),
        "file_version": (3, "string"),
        "summary": (5, "message", "Summary"),
        "session_log": (7, "message", "SessionLog"),
    },
}


@pytest.fixture(scope="module")
def event_class():
    file = descriptor_pb2.FileDescriptorProto(name="event_test.proto", package="test", syntax="proto2")
    for name, fields in MESSAGES.items():
        message = file.message_type.add(name=name)
        for field, (number, kind, *rest) in fields.items():
            added = message.field.add(name=field, number=number, type=KINDS[kind], label=3 if len(rest) > 1 else 1)
            if rest:
                added.type_name = f".test.{rest[0]}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("test.Event"))


def records(path):
    data, out = path.read_bytes(), []

    def check(part, stored):
        crc = crc32c(part)
        assert struct.unpack("<I", stored)[0] == ((crc >> 15 | crc << 17 & 0xFFFFFFFF) + 0xA282EAD8) % 2**32

    while data:
        (length,) = struct.unpack("<Q", data[:8])
        check(data[:8], data[8:12])
        check(data[12 : 12 + length], data[12 + length : 16 + length])
        out.append(data[12 : 12 + length])
        data = data[16 + length :]
    return out


def test_crc_of_published_vectors():
    # RFC 3720, B.4, and the check value of CRC-32C catalogues.
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA and crc32c(b"\xff" * 32) == 0x62A8AB43


def test_scalars_are_read_back_while_the_file_is_open(tmp_path, event_class):
    before = time.time()
    with EventFile(tmp_path / "new", first=301) as events:
        events.add(301, {"train/loss": 0.25, "loss_t/0-250": -1.5e-30})
        events.add(2**40, {"train/loss": float("nan")})
        (file,) = (tmp_path / "new").iterdir()
        version, start, first, second = (event_class.FromString(r) for r in records(file))
    assert "tfevents" in file.name and version.file_version == "brain.Event:2"
    assert start.step == 301 and start.session_log.status == 1  # what earlier files say of later steps is dropped
    assert [(v.tag, v.simple_value) for v in first.summary.value] == [
        ("train/loss", 0.25),
        ("loss_t/0-250", struct.unpack("<f", struct.pack("<f", -1.5e-30))[0]),
    ]
    assert first.step == 301 and second.step == 2**40
    assert second.summary.value[0].simple_value != second.summary.value[0].simple_value
    assert before <= version.wall_time <= second.wall_time <= time.time()


def test_a_continued_run_writes_a_file_of_its_own(tmp_path):
    names = []
    for first in (1, 5):
        with EventFile(tmp_path, first):
            names.append({file.name for file in tmp_path.iterdir()})
    assert len(names[1]) == 2 and max(names[1]) not in names[0]  # read in the order of names
