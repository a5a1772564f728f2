"""Hostile files: 2,400 broken, lying or malicious ones, each a clean error or exactly what the bytes say.

Every case is made from a seed, so a failure names what to repeat. What holds for all of them: only `UserError` is
raised, within a second; no more memory is taken than the files are long plus a constant; nothing is written and no
code is run. A mutation that happens to leave a valid file must give what an independent reading of the bytes gives.
"""

import io
import json
import os
import pickle
import random
import resource
import time
import tracemalloc
import zipfile

import numpy as np
import pytest
import safetensors
import torch
from pipelines import random_like

from hybrid_dit.convert import hybrid, pipeline, sources, tables
from hybrid_dit.convert.files import Weights, write_safetensors
from hybrid_dit.errors import UserError
from hybrid_dit.models.wan import WanConfig

ITEM = {"BF16": 2, "F16": 2, "F32": 4, "U8": 1, "BOOL": 1, "I64": 8, "F64": 8, "I8": 1, "I16": 2, "U16": 2, "I32": 4}
ITEM |= {"U32": 4, "U64": 8, "C64": 8, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1}
# What opening allocates beside the tensors: parsed JSON (some 25 bytes per byte of a few kB), messages, descriptors.
OVERHEAD = 1_000_000
ODD = [-1, -(2**63), 2**63, 2**64, 10**4000, 0.5, 3.0, True, None, "7", "", [], [1], {}, float("nan"), float("inf")]


class Marker:
    """Unpickling an instance would create a file: what a malicious "checkpoint" does."""

    def __init__(self, path, how):
        self.path, self.how = str(path), how

    def __reduce__(self):
        if self.how == "system":
            return os.system, (f"touch {self.path}",)
        if self.how == "open":
            return open, (self.path, "w")
        return eval, (f"open({self.path!r}, 'w')",)


def pairs():
    """The header of a valid file as (name, description), in which mutations may repeat names."""
    header, end = [["__metadata__", {"format": "pt", "note": '{[,"é'}]], 0
    plain = [("blocks.0.a", "F32", [3, 4]), ("blocks.0.b", "BF16", [5]), ("é", "F16", []), ("none", "F32", [0, 7])]
    for name, dtype, shape in [*plain, ("bytes", "U8", [9])]:
        begin, end = end, end + ITEM[dtype] * int(np.prod(shape))
        header.append([name, {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}])
    return header


def encode(header):
    return "{" + ",".join(f"{json.dumps(name)}:{json.dumps(info)}" for name, info in header) + "}"


def build(text, data, length=None):
    text = text if isinstance(text, bytes) else text.encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


DATA = bytes(range(pairs()[-1][1]["data_offsets"][1]))


def scramble(content, rng, head):
    """Flips bits, cuts, inserts, repeats or overwrites bytes; mostly among the first `head`."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        end = min(len(content), head) if rng.random() < 0.8 else len(content)
        at = rng.randrange(max(end, 1))
        kind = rng.randrange(6)
        if kind == 0 and content:
            content[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del content[rng.randrange(len(content) + 1) :]
        elif kind == 2:
            content[at:at] = rng.randbytes(rng.randint(1, 9))
        elif kind == 3:
            del content[at : at + rng.randint(1, 9)]
        elif kind == 4:
            content[at : at + 8] = rng.choice([b"\xff" * 8, b"\0" * 8, rng.randbytes(8)])
        else:
            content += content[at : at + rng.randint(1, 99)]
    return bytes(content)


def scrambled_file(folder, rng):
    content = build(encode(pairs()), DATA)
    (folder / "x.safetensors").write_bytes(scramble(content, rng, len(content) - len(DATA)))


def lying_length(folder, rng):
    content = build(encode(pairs()), DATA)
    lie = rng.choice([0, 1, 7, len(content), len(content) - 8, 2**31, 2**63, 2**64 - 1, 10**8, rng.randrange(999)])
    (folder / "x.safetensors").write_bytes(lie.to_bytes(8, "little") + content[8:])


def lying_header(folder, rng):
    (folder / "x.safetensors").write_bytes(build(encode(lied(pairs(), rng)), DATA))


def lied(header, rng):
    """Returns a header that is well-formed JSON, but lies about shapes and dtypes, overlaps, or repeats names."""
    for _ in range(rng.randint(1, 2)):
        one, other = (header[i][1] for i in rng.sample(range(1, len(header)), 2))
        kind = rng.randrange(10)
        near = [rng.randint(-2, 80), rng.choice(ODD)]
        if kind == 0:
            one["data_offsets"] = [rng.choice(near), rng.choice(near)]
        elif kind == 1:
            one["data_offsets"] = other.get("data_offsets")
        elif kind == 2:
            by = rng.choice([-4, -1, 1, 4, 2**40, 2**63])
            one["data_offsets"] = [by + n for n in one["data_offsets"] if isinstance(n, int)]
        elif kind == 3:
            one["shape"] = [rng.choice([*near, 0, 1, 2**31, 2**62]) for _ in range(rng.choice([0, 1, 2, 3, 40]))]
        elif kind == 4:
            one["dtype"] = rng.choice([*ITEM, "F4", "f32", "object", *ODD])
        elif kind == 5:
            one.pop(rng.choice([*one]))
        elif kind == 6:
            one[rng.choice(["more", "dtype", "shape", "data_offsets"])] = rng.choice(ODD)
        elif kind == 7:
            header.append(rng.choice(header))
        elif kind == 8:
            rng.choice(header)[0] = rng.choice(["", "\0", "\ud800", "a\nb", "x" * 5000, "blocks.0.a", "__metadata__"])
        else:
            header[0][1] = rng.choice([*ODD, {"a": 1}, {"\udc00": "a"}, {"a": "\udfff"}])
        if not all(isinstance(info.get("data_offsets"), list) for _, info in header[1:] if isinstance(info, dict)):
            break
        if not all(isinstance(info, dict) for _, info in header):
            break
    return header


def no_object(folder, rng):
    """Headers that are other JSON, no JSON, or nested without end."""
    depth = rng.choice([10, 900, 980, 990, 1000, 3000, 20000])
    deep = rng.choice(["[" * depth, "[" * depth + "]" * depth, '{"a":' * depth, '{"a":' * depth + "1" + "}" * depth])
    meta = '{"__metadata__":' + "[" * depth + "]" * depth + "}"
    digits = '{"a":{"dtype":"F32","shape":[' + "9" * rng.choice([20, 4300, 9999]) + '],"data_offsets":[0,71]}}'
    text = rng.choice([deep, meta, '{"a":' + deep, digits, "[]", "null", "", " ", "{", "{}", '"{"', "\ufeff{}", "{\0}"])
    (folder / "x.safetensors").write_bytes(build(text, rng.choice([DATA, b""])))


def hostile_index(folder, rng):
    """Two shards, and an index that lies about them or leads out of the folder; sometimes shards without an index."""
    outside = folder.parent / "outside.safetensors"
    part = [[["a", {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]}]], [["b", {"dtype": "U8", "shape": [2],
            "data_offsets": [0, 2]}]]]  # fmt: skip
    for i, header in enumerate(part):
        (folder / f"x-{i}.safetensors").write_bytes(build(encode(header), DATA[: 3 - i]))
    index = {"metadata": {"total_size": 5}, "weight_map": {"a": "x-0.safetensors", "b": "x-1.safetensors"}}
    kind = rng.randrange(8)
    name = rng.choice(["a", "b", "c", "\ud800", "x" * 3000])
    ways = ["../outside.safetensors", str(outside), "sub/../x-0.safetensors", "./x-0.safetensors", "..", ".", "", "~"]
    ways += ["x-0.safetensors\0", "..\\outside.safetensors", "C:x.safetensors", "x-1.safetensors", "y.safetensors"]
    ways += ["link.safetensors", "loop.safetensors", "x" * 300 + ".safetensors", "dir.safetensors", "pipe.safetensors"]
    ways += ["file:///etc/passwd", "x.pth", "\ud800.safetensors", *ODD]
    if kind < 4:
        index["weight_map"][name] = rng.choice(ways)
        (folder / "link.safetensors").symlink_to(rng.choice([outside, "../outside.safetensors", "/etc/passwd"]))
        (folder / "loop.safetensors").symlink_to("loop.safetensors")
        (folder / "dir.safetensors").mkdir()
        os.mkfifo(folder / "pipe.safetensors")  # opening it would wait for ever
    elif kind == 4:
        index[rng.choice(["weight_map", "metadata"])] = rng.choice(ODD)
    elif kind == 5:
        del index["weight_map"][rng.choice("ab")]
    text = json.dumps(index)
    if kind == 6:
        text = text.replace('"b"', '"a"') if rng.random() < 0.2 else "[" * rng.choice([3, 990, 50000])
    content = text.encode()
    if kind == 7:
        content = scramble(content, rng, len(content))
    (folder / "x.safetensors.index.json").write_bytes(content)
    if rng.random() < 0.2:
        broken = folder / f"x-{rng.randrange(2)}.safetensors"
        broken.write_bytes(scramble(broken.read_bytes(), rng, 60))


def malicious_pickle(folder, rng):
    """A pickle that would create a file if it was run, plain or as `torch.save` packs it, under any name."""
    bomb = Marker(folder / "marker", rng.choice(["system", "open", "eval"]))
    value = rng.choice([bomb, {"a": bomb}, {"state_dict": {"a": torch.ones(2), "b": bomb}}, {bomb.how: [bomb]}])
    file = folder / rng.choice(["x.pth", "x.pt", "x.bin", "x.safetensors"])
    way = rng.randrange(4)
    if way == 0:
        file.write_bytes(pickle.dumps(value, rng.randrange(6)))
    else:
        torch.save(value, file, pickle_protocol=rng.randint(2, 5), _use_new_zipfile_serialization=way > 1)
    if way == 3:
        file.write_bytes(scramble(file.read_bytes(), rng, 200))


def broken_pickle(folder, rng):
    """What torch writes, zipped or not, scrambled; or packed so that it would unpack to more than the file."""
    value = {"a": torch.arange(12.0).reshape(3, 4).T, "b": torch.ones(5, dtype=torch.bfloat16), "c": torch.tensor(1)}
    file, zipped = folder / "x.pth", rng.random() < 0.6
    torch.save(value, file, _use_new_zipfile_serialization=zipped)
    content = file.read_bytes()
    if zipped and rng.random() < 0.3:
        packed = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
            for entry in old.infolist():
                extra = b"\0" * 20_000_000 if rng.random() < 0.05 else b""
                new.writestr(entry.filename, old.read(entry) + extra)
        content = packed.getvalue()
    # A scrambled pickle may spell a name out of allowed ones only; half of the time hit the directory at the end.
    content = content[::-1] if zipped and rng.random() < 0.5 else content
    flipped = scramble(content, rng, 600)
    file.write_bytes(flipped[::-1] if content[:4] != b"PK\3\4" and zipped else flipped)


FAMILIES = {
    scrambled_file: 600,
    lying_header: 700,
    hostile_index: 400,
    no_object: 250,
    lying_length: 150,
    malicious_pickle: 150,
    broken_pickle: 150,
}


def snapshot(folder):
    return {p.name: (p.lstat().st_size, p.lstat().st_mtime_ns, p.lstat().st_mode) for p in folder.iterdir()}


def independent(path):
    """Name -> (dtype, shape, bytes) of a safetensors file by the letter of the format; later names win."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    infos = {name: (i["dtype"], tuple(i["shape"]), i["data_offsets"]) for name, i in header.items()}
    return {name: (dtype, shape, content[start:][begin:end]) for name, (dtype, shape, (begin, end)) in infos.items()}


def open_and_read(source):
    """Returns what every tensor is, or None after a clean error."""
    try:
        weights = Weights(source)
        found = {name: (weights.dtypes[name], weights.shapes[name], weights.read(name)) for name in weights.shapes}
    except UserError as error:
        assert str(error).isprintable() and len(str(error)) < 3000 and str(source.parent) in str(error)
        return None, None
    return found, weights


def check_valid(found, weights, folder):
    for name, (dtype, shape, array) in found.items():
        path = weights.file_of(name)
        assert array.shape == shape and array.nbytes == ITEM[dtype] * int(np.prod(shape))
        assert path.resolve().parent == folder.resolve()
        if path.suffix == ".safetensors":
            assert (dtype, shape, array.tobytes()) == independent(path)[name]
            safetensors.safe_open(path, "numpy")  # what the library refuses, we must
        else:
            expected = torch.load(path, weights_only=True)[name].contiguous()
            assert array.tobytes() == expected.reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("make", FAMILIES, ids=lambda make: make.__name__)
def test_every_hostile_file_is_a_clean_error_or_what_its_bytes_say(tmp_path, make):
    (tmp_path / "outside.safetensors").write_bytes(build('{"c":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"s"))
    refused, slowest, resident = 0, 0.0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in range(FAMILIES[make]):
        folder = tmp_path / str(seed)
        folder.mkdir()
        make(folder, random.Random(f"{make.__name__} {seed}"))
        before = snapshot(folder)
        alone = [path for path in folder.iterdir() if path.is_file()]
        source = alone[0] if len(before) == 1 else folder
        try:
            tracemalloc.start()
            start = time.perf_counter()
            found, weights = open_and_read(source)
            slowest = max(slowest, time.perf_counter() - start)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < sum(path.stat().st_size for path in alone) + OVERHEAD
            assert snapshot(folder) == before, "something was written"
            if found is None:
                refused += 1
            else:
                check_valid(found, weights, folder)
        except BaseException as error:
            tracemalloc.stop()
            error.add_note(f"case: {make.__name__}, seed {seed}")
            raise
    assert slowest < 1, f"{slowest} s for one file"  # typical is a millisecond or ten
    assert refused >= 0.5 * FAMILIES[make], f"only {refused} of {FAMILIES[make]} were broken at all"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident) * 1024
    assert grown < 150e6, f"{grown / 1e6:.0f} MB more were resident"  # sees what torch allocates, too


def test_conversion_of_a_hostile_dit_is_a_clean_error_too(tmp_path):
    """The same through `open_dit`, which looks for layout and sizes in what the file says; a DiT of width 128."""
    config = WanConfig(dim=128, num_heads=1, ffn_dim=8, num_layers=1, in_channels=4, text_dim=8, freq_dim=16)
    params = random_like(pipeline.abstract_dit(config), np.random.default_rng(0))
    entries = hybrid.stored_entries(config, (), "wan", params)
    write_safetensors(tmp_path / "dit.safetensors", dict(tables.export_tree(entries, params)), {"format": "pt"})
    content = (tmp_path / "dit.safetensors").read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    opened = 0
    for seed in range(100):
        rng = random.Random(seed)
        file = tmp_path / f"{seed}.safetensors"
        header = [[name, info] for name, info in json.loads(content[8:start]).items()]
        lies = seed % 2 == 0
        file.write_bytes(build(encode(lied(header, rng)), content[start:]) if lies else scramble(content, rng, start))
        try:
            sources.open_dit(file).read()
            opened += 1
        except UserError as error:
            assert file.name in str(error)
        except BaseException as error:
            error.add_note(f"case: seed {seed}")
            raise
    assert opened < 50, "too few were broken"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["dit.safetensors", *(f"{seed}.safetensors" for seed in range(100))]
    )


def test_there_are_enough_cases():
    assert sum(FAMILIES.values()) >= 2000
