"""Batches: complete, repeatable from any position, shared out over processes, and not stopped by a few bad samples."""

import collections
import itertools
import json

import jax
import latent_sets
import ml_dtypes
import numpy as np
import pytest
from latent_sets import CHANNELS, VAE, WIDTH

from hybrid_dit.data import source as source_module
from hybrid_dit.data.feed import Form, LatentSource
from hybrid_dit.data.library import BadSample, Entry, Index, Library, Sample
from hybrid_dit.data.open_source import LIBRARIES
from hybrid_dit.errors import UserError
from hybrid_dit.models.wan import pack_text

SHAPES = ((3, 4, 6), (1, 6, 4))
BUCKETS = {"wide": list(range(0, 20, 2)), "tall": list(range(1, 20, 2))}
FORM = Form(CHANNELS, WIDTH, text_tokens=16, rows=8, dtype="float32")


class Memory(Library):
    """Samples in memory, some of them bad."""

    kind = "memory"

    def __init__(self, pairs, bad=None, found_bad=None):
        self.pairs, self.bad, self.reads = pairs, bad or {}, collections.Counter()
        entries = [Entry(latents.shape[:3], len(text), ()) for latents, text in pairs]
        self.index = Index(("file",), [0] * len(pairs), entries, found_bad or {})

    def key(self, i):
        return f"sample {i}"

    def read(self, i):
        self.reads[i] += 1
        if isinstance(self.bad.get(i), str):
            raise BadSample(self.bad[i])
        return self.bad.get(i, Sample(*self.pairs[i]))


PAIRS = latent_sets.samples(20, SHAPES)


def make(library=None, buckets=BUCKETS, form=FORM, **changes):
    options = {"batch": 4, "seed": 0, "max_bad": 3, "threads": 0} | changes
    return LatentSource(library or Memory(PAIRS), buckets, form, **options)


def take(source, count):
    return [source.next() for _ in range(count)]


def same(a, b):
    return a.keys == b.keys and all(x.tobytes() == y.tobytes() for x, y in zip(a[:3], b[:3]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_batch_holds_the_samples_that_it_names(dtype):
    for batch in take(make(form=FORM._replace(dtype=dtype)), 8):
        assert isinstance(make(), source_module.Source)
        numbers = [int(key.split()[1]) for key in batch.keys]
        assert len({PAIRS[i][0].shape for i in numbers}) == 1
        assert batch.latents.dtype.name == batch.text.dtype.name == dtype and batch.count.dtype == np.float32
        for i, latents in zip(numbers, batch.latents):
            np.testing.assert_array_equal(latents.astype(np.float32), PAIRS[i][0].astype(np.float32))
        rows = [np.pad(PAIRS[i][1].astype(np.float32), ((0, 8 - len(PAIRS[i][1])), (0, 0))) for i in numbers]
        text, count = pack_text(np.stack(rows), np.array([len(PAIRS[i][1]) for i in numbers]), 16)
        np.testing.assert_array_equal(batch.text.astype(np.float32), text)
        np.testing.assert_array_equal(batch.count, count)


@pytest.mark.parametrize("kind", ["tar", "parquet", "csv", "tfds"])
def test_threads_change_nothing_and_a_position_inside_an_epoch_is_continued(kind, tmp_path):
    latent_sets.write_set(kind, tmp_path, PAIRS)
    library = LIBRARIES[kind](tmp_path, VAE)
    expected = take(make(library), 12)
    source = make(library, threads=3, ahead=4)
    assert all(map(same, take(source, 3), expected))  # the next ones are being read already
    state = json.loads(json.dumps(source.state()))
    assert all(map(same, take(source, 4), expected[3:]))
    resumed = make(LIBRARIES[kind](tmp_path, VAE), threads=2)
    resumed.restore(state)
    assert resumed.state() == state
    assert all(map(same, take(resumed, 9), expected[3:]))
    source.restore(state)  # backwards too
    assert same(source.next(), expected[3])


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_take_disjoint_samples_that_together_are_all(processes):
    sources = [make(process=p, processes=processes) for p in range(processes)]
    seen = [collections.Counter() for _ in sources]
    for _ in range(4 * sources[0].steps):
        batches = [source.next() for source in sources]
        assert len({batch.latents.shape for batch in batches}) == 1 and len(batches[0].keys) == 4 // processes
        for counter, batch in zip(seen, batches):
            counter.update(batch.keys)
    assert all(not (a.keys() & b.keys()) for a, b in itertools.combinations(seen, 2))
    assert set().union(*seen) == {f"sample {i}" for i in range(20)}


def broken(i, **changes):
    return Sample(*PAIRS[i])._replace(**changes)


def with_nan(array):
    array = array.copy()
    array.reshape(-1)[5] = np.nan
    return array


@pytest.mark.parametrize(
    "bad, reason",
    [
        ("disk fails", "disk fails"),
        (broken(4, latents=PAIRS[5][0]), r"latents are \[1, 6, 4, 4\], expected \[3, 4, 6, 4\]"),
        (broken(4, latents=with_nan(PAIRS[4][0])), "latents holds NaN or infinity"),
        (broken(4, text=with_nan(PAIRS[4][1])), "text embedding holds NaN or infinity"),
        (broken(4, text=np.ones((2, 7), np.float32)), "width 7, the model takes 8"),
        (broken(4, text=np.ones((9, 8), np.float32)), r"has 9 tokens, batches have room for 8 \(data.text_rows\)"),
        (broken(4, text=np.ones((0, 8), np.float32)), "empty or all zeros"),
    ],
)
def test_a_bad_sample_is_replaced_counted_and_named_once(bad, reason, capsys):
    library = Memory(PAIRS, {4: bad})
    source, clean = make(library), make()
    batches, expected = take(source, 30), take(clean, 30)
    assert [b.latents.shape for b in batches] == [b.latents.shape for b in expected]
    replaced = 0
    for batch, whole in zip(batches, expected):
        assert "sample 4" not in batch.keys and np.isfinite(batch.latents).all()
        for here, there, latents in zip(batch.keys, whole.keys, batch.latents):
            assert (here == there) == (there != "sample 4")
            np.testing.assert_array_equal(latents, PAIRS[int(here.split()[1])][0].astype(np.float32))
            replaced += here != there
    assert replaced > 2 and library.reads[4] == 1
    assert list(source.bad) == ["sample 4"]
    with pytest.raises(BadSample, match=reason):
        raise BadSample(source.bad["sample 4"])
    told = capsys.readouterr().err  # stdout of all processes but the first goes nowhere
    assert told.count("left out sample 4") == 1 and "1 bad samples so far, at most 3 are accepted" in told


def test_what_no_process_can_use_is_named_by_the_first_alone_and_the_rest_by_whoever_meets_it(capsys):
    bad = {"part.tar": "cut off"}
    sources = [make(Memory(PAIRS, {4: "a", 16: "b"}, bad), process=p, processes=2) for p in range(2)]
    assert capsys.readouterr().out.count("left out part.tar: cut off") == 2  # of which the console shows the first
    for source, mine, others in zip(sources, (4, 16), (16, 4)):
        take(source, 20)
        out, err = capsys.readouterr()
        assert not out and f"left out sample {mine}" in err and f"sample {others}" not in err
    assert "2 bad samples so far on process 1, at most 3" in err


def test_replacements_are_the_same_after_a_resume():
    bad = {4: "a", 7: "b"}
    expected = take(make(Memory(PAIRS, bad)), 20)
    source = make(Memory(PAIRS, bad))
    take(source, 9)
    resumed = make(Memory(PAIRS, bad), threads=2)
    resumed.restore(source.state())
    assert resumed.bad == source.bad
    assert all(map(same, take(resumed, 11), expected[9:]))


def test_the_limit_is_an_error_that_names_all_of_them():
    source = make(Memory(PAIRS, {i: f"reason {i}" for i in (2, 6, 9, 12)}, {"part.tar": "cut off"}), threads=2)
    with pytest.raises(UserError, match="too many bad samples: 4, and data.max_bad=3") as error:
        take(source, 100)
    assert "part.tar: cut off" in str(error.value) and str(error.value).count("reason") == 3
    with pytest.raises(UserError, match=r"too many bad samples: 12, (.*\n)+  and 2 more"):
        make(Memory(PAIRS, {}, {f"file {i}": "gone" for i in range(12)}))


def test_a_bucket_without_a_good_sample_is_an_error():
    with pytest.raises(UserError, match="no usable sample is left for a batch: 10, and data.max_bad=50"):
        take(make(Memory(PAIRS, {i: "gone" for i in BUCKETS["tall"]}), max_bad=50), 20)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (4, 2), (2, 4)])
def test_another_number_of_processes_goes_on_with_the_same_global_batches(before, after):
    bad = {4: "a", 7: "b"}

    def sources(processes):
        return [make(Memory(PAIRS, bad), process=p, processes=processes) for p in range(processes)]

    def keys(sources, count):
        return [sum((source.next().keys for source in sources), ()) for _ in range(count)]

    whole, begun, continued = sources(before), sources(before), sources(after)
    expected, again = keys(whole, 30), keys(begun, 11)
    states = json.loads(json.dumps([source.state() for source in begun]))
    for i, source in enumerate(continued):
        source.restore(states[i % before])
    assert again + keys(continued, 9) == expected[:20]
    states = [source.state() for source in continued]
    for source in begun:  # and back
        source.restore(states[0])
    assert keys(begun, 10) == expected[20:]
    assert all(source.bad.keys() <= {"sample 4", "sample 7"} for source in continued + begun)


def test_bad_samples_are_counted_anew_by_another_process():
    begun = make(Memory(PAIRS, {4: "a"}, {"part.tar": "cut off"}), process=0, processes=2)
    take(begun, 20)
    assert begun.bad.keys() == {"part.tar", "sample 4"}
    for process, processes, known in ((0, 2, True), (1, 2, False), (0, 1, False)):
        other = make(Memory(PAIRS, {}, {"part.tar": "cut off"}), process=process, processes=processes)
        other.restore(begun.state())
        assert ("sample 4" in other.bad) == known and "part.tar" in other.bad


@pytest.mark.parametrize(
    "change, message",
    [
        ({"seed": 1}, "other shapes, batch or seed"),
        ({"batch": 2}, "other shapes, batch or seed"),
        ({"buckets": {"wide": BUCKETS["wide"]}}, "other shapes, batch or seed"),
        ({"library": Memory(PAIRS[:19])}, "other files or samples"),
    ],
)
def test_a_position_of_something_else_is_refused(change, message):
    buckets = {name: [i for i in members if i < 19] for name, members in BUCKETS.items()}
    state = make(buckets=buckets).state()
    with pytest.raises(UserError, match=message):
        make(**{"buckets": buckets} | change).restore(state)


@pytest.mark.parametrize("length", [0, 1, 8])
def test_packing_on_the_host_is_the_models(length):
    own = np.random.default_rng(0).standard_normal((length, WIDTH)).astype(ml_dtypes.bfloat16)
    text, count = source_module.pack(own, 8, 16)
    padded = np.pad(own, ((0, 8 - length), (0, 0)))[None]
    for got, expected in zip((text, count), pack_text(padded, np.array([length]), 16)):
        assert got.tobytes() == np.asarray(expected[0]).tobytes() and got.dtype == expected.dtype
    assert source_module.own_rows(text, count).tobytes() == own.tobytes()


def test_batches_can_be_placed_on_devices_as_they_are():
    batch = make(form=FORM._replace(dtype="bfloat16")).next()
    placed = jax.device_put(batch[:3])
    assert placed[0].dtype == ml_dtypes.bfloat16 and np.asarray(placed[0]).tobytes() == batch.latents.tobytes()
