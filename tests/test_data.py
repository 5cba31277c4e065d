"""Text to batches: every kind of source, exact packing, epochs, continuing, held-out text, errors."""

import copy
import dataclasses
import functools
import json
import random

import numpy as np
import pytest

from jaxlin import streams
from jaxlin.command_line import parse_run
from jaxlin.config import DataConfig, UserError
from jaxlin.data import Prepare, heldout_batches, prepare, train_batches, training_text
from jaxlin.sources import PIECE_BYTES, Shard, open_text
from jaxlin.split import documents, split
from jaxlin.training_data import TrainingData

SEPARATOR = 0
WORDS = [f"w{n}" for n in range(200)]
# Documents of very different lengths, each starting with a word of its own.
TEXTS = [
    " ".join([f"d{n}", *random.Random(n).choices(WORDS, k=random.Random(n).choice([0, 1, 3, 9, 40]))])
    for n in range(83)
]
CONFIG = DataConfig(seq_len=16, heldout_fraction=0.0)


@pytest.fixture(scope="module")
def tokenizer():
    """One id per word; 0 is the end of text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<|endoftext|>", "?", *(f"d{n}" for n in range(len(TEXTS))), *WORDS]
    whole = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="?"))
    whole.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=whole, eos_token="<|endoftext|>", unk_token="?")


def batches_of(text, config, tokenizer, **options):
    return train_batches(training_text(text, config, tokenizer).corpus, config, tokenizer, **options)


def records(texts):
    """As FineWeb's: the text and what came with it."""
    return [{"text": text, "id": f"<urn:{n}>", "token_count": len(text)} for n, text in enumerate(texts)]


def write_jsonl(path, texts=TEXTS, compress=None):
    data = "".join(json.dumps(record) + "\n" for record in records(texts)).encode()
    path.write_bytes(compress(data) if compress else data)
    return str(path)


def write_parquet(path, texts=TEXTS, row_group_size=10):
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(exist_ok=True, parents=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records(texts)), path, row_group_size=row_group_size)
    return str(path)


def write_source(kind, folder, tokenizer):
    """TEXTS as a source of this kind."""
    if kind == "txt":
        for n, text in enumerate(TEXTS):
            (folder / f"{n:03}.txt").write_text(text)
        return str(folder)
    if kind == "glob":
        write_jsonl(folder / "a1.jsonl", TEXTS[:30])
        write_jsonl(folder / "a2.jsonl", TEXTS[30:])
        write_jsonl(folder / "b.jsonl", ["w1 w2"])
        return str(folder / "a*.jsonl")
    if kind == "jsonl":
        return write_jsonl(folder / "a.jsonl")
    if kind == "jsonl.zst":
        import zstandard

        half = zstandard.ZstdCompressor().compress  # two frames in one file, as parallel compressors write
        return write_jsonl(folder / "a.jsonl.zst", compress=lambda data: half(data[:2000]) + half(data[2000:]))
    if kind == "jsonl.gz":
        import gzip

        return write_jsonl(folder / "a.jsonl.gz", compress=gzip.compress)
    if kind == "parquet":
        write_parquet(folder / "a.parquet", TEXTS[:50])
        write_parquet(folder / "b.parquet", TEXTS[50:])
        return str(folder)
    if kind == "hf":
        write_parquet(folder / "sample" / "000.parquet", TEXTS[:50])
        write_parquet(folder / "sample" / "001.parquet", TEXTS[50:])
        return f"hf:{folder / 'sample'}"
    if kind == "arrayrecord":
        from array_record.python.array_record_module import ArrayRecordWriter

        writer = ArrayRecordWriter(str(folder / "a.arrayrecord"), "group_size:1")
        for n, record in enumerate(records(TEXTS)):
            writer.write(json.dumps(record).encode() if n % 2 else record["text"].encode())
        writer.close()
        return str(folder / "a.arrayrecord")
    if kind == "npy":
        path = folder / "a.npy"
        assert prepare(Prepare(out=path, text=(write_jsonl(folder / "a.jsonl"),)), tokenizer)[0] == len(TEXTS)
        assert np.load(path).dtype == np.uint16
        return str(path)
    if kind == "tfds":
        builder = tfds_builder()(data_dir=folder, file_format="array_record")
        builder.download_and_prepare()
        return f"tfds:{builder.data_dir}"
    raise AssertionError(kind)


@functools.cache
def tfds_builder():
    """TEXTS as a TFDS dataset."""
    import tensorflow_datasets as tfds

    class Tiny(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "token_count": np.int64})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, _):
            return {"train": ((n, {"text": text, "token_count": n}) for n, text in enumerate(TEXTS))}

        def _generate_examples(self):
            raise NotImplementedError

    return Tiny


KINDS = ("txt", "glob", "jsonl", "jsonl.zst", "jsonl.gz", "parquet", "hf", "arrayrecord", "npy", "tfds")


def ids(tokenizer, text):
    return tokenizer(text)["input_ids"]


def take(batches, count):
    """`count` batches, as one array of rows for each key."""
    got = [next(batches) for _ in range(count)]
    return {key: np.concatenate([batch[key] for batch in got]) for key in got[0]}


def train(text, config, tokenizer, count, batch_size=4, seed=0):
    batches = batches_of([text], config, tokenizer, batch_size=batch_size, seed=seed)
    got = take(batches, count)
    batches.close()
    return got


def epochs(rows):
    """Whole documents (tuples of ids, with their separator) in a stream of rows, in order."""
    stream = rows["tokens"].reshape(-1)
    ends = np.flatnonzero(stream == SEPARATOR) + 1
    return [tuple(map(int, part)) for part in np.split(stream, ends)[:-1]]


def expected(tokenizer, texts=TEXTS):
    return [(*ids(tokenizer, text), SEPARATOR) for text in texts]


def per_epoch(tokenizer, config, batch_size=4):
    return -(-sum(map(len, expected(tokenizer))) // (batch_size * config.seq_len))


@pytest.mark.parametrize("kind", KINDS)
def test_every_source_gives_every_document_once_an_epoch(kind, tmp_path, tokenizer):
    text = write_source(kind, tmp_path, tokenizer)
    count = 2 * per_epoch(tokenizer, CONFIG)
    got = epochs(train(text, dataclasses.replace(CONFIG, shuffle=False), tokenizer, count))
    if kind == "tfds":  # has shuffled the records when it wrote them
        assert got[: len(TEXTS)] == got[len(TEXTS) : 2 * len(TEXTS)]
    else:
        assert got[: 2 * len(TEXTS)] == 2 * expected(tokenizer)
    shuffled = epochs(train(text, CONFIG, tokenizer, count))
    first, second = shuffled[: len(TEXTS)], shuffled[len(TEXTS) : 2 * len(TEXTS)]
    assert sorted(first) == sorted(second) == sorted(expected(tokenizer))
    assert first != second != expected(tokenizer)


def test_packing_is_exact(tmp_path, tokenizer):
    config = dataclasses.replace(CONFIG, shuffle=False)
    rows = train(write_jsonl(tmp_path / "a.jsonl"), config, tokenizer, 30)
    stream = [(token, n) for n, text in enumerate(3 * expected(tokenizer)) for token in text]
    length = rows["tokens"].size
    assert rows["tokens"].dtype == rows["segment_ids"].dtype == np.int32
    assert rows["tokens"].reshape(-1).tolist() == [token for token, _ in stream[:length]]
    for row, start in zip(rows["segment_ids"], range(0, length, config.seq_len), strict=True):
        owners = [n for _, n in stream[start : start + config.seq_len]]
        assert row.tolist() == [n - owners[0] + 1 for n in owners]


@pytest.mark.parametrize("kind", ["jsonl", "npy"])
def test_documents_begin_as_the_tokenizer_begins_texts(kind, tmp_path, tokenizer):
    """A prepared file may have the beginnings or, of another tool, not."""
    from tokenizers.processors import TemplateProcessing

    plain, begun = copy.deepcopy(tokenizer), copy.deepcopy(tokenizer)
    begun.bos_token = "d0"
    begun.backend_tokenizer.post_processor = TemplateProcessing(single="d0 $A", special_tokens=[("d0", 2)])
    config = dataclasses.replace(CONFIG, shuffle=False)
    found = []
    for name, prepared_by in (("with", begun), ("without", plain)):
        (tmp_path / name).mkdir()
        text = write_source(kind, tmp_path / name, prepared_by)
        found.append(epochs(train(text, config, begun, 2 * per_epoch(begun, config)))[: len(TEXTS)])
    # The first text begins with the word that is the beginning.
    documents = [(*ids(plain, text), SEPARATOR) for text in TEXTS]
    wanted = [document if document[0] == 2 else (2, *document) for document in documents]
    assert found == [wanted, wanted]


def test_without_separation_text_runs_on(tmp_path, tokenizer):
    config = dataclasses.replace(CONFIG, shuffle=False, separate_documents=False)
    for kind in ("jsonl", "npy"):
        rows = train(write_source(kind, tmp_path, tokenizer), config, tokenizer, 10)
        assert (rows["segment_ids"] == 1).all()
        stream = [token for text in TEXTS for token in ids(tokenizer, text)]
        assert rows["tokens"].reshape(-1).tolist() == stream[: rows["tokens"].size]


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.zst", "parquet"])
def test_a_document_trains_or_is_held_out(kind, tmp_path, tokenizer):
    text = write_source(kind, tmp_path, tokenizer)
    training, heldout = split(open_text([text], "text", end_of_text=0, vocab_size=len(tokenizer)), 0.1)
    heldout = list(heldout)
    assert len(heldout) == 9
    assert sorted([*documents(training), *heldout]) == sorted(TEXTS)


@pytest.mark.parametrize("kind", KINDS)
def test_continues_bit_for_bit(kind, tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(streams, "WINDOW_DOCUMENTS", 40)  # so that several windows make an epoch
    text = write_source(kind, tmp_path, tokenizer)
    for k in (0, 1, 7, 26):
        batches = batches_of([text], CONFIG, tokenizer, batch_size=2, seed=3)
        if k:
            take(batches, k)
        state = json.loads(json.dumps(batches.get_state()))
        after = take(batches, 9)
        fresh = batches_of([text], CONFIG, tokenizer, batch_size=2, seed=3)
        fresh.set_state(state)
        again = take(fresh, 9)
        assert all((after[key] == again[key]).all() for key in after)
        batches.set_state(state)  # also in place, under way
        again = take(batches, 9)
        assert all((after[key] == again[key]).all() for key in after)
        batches.close(), fresh.close()


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_the_order_depends_on_the_seed_alone(kind, tmp_path, tokenizer):
    text = write_source(kind, tmp_path, tokenizer)
    one, same, other = (train(text, CONFIG, tokenizer, 20, seed=seed) for seed in (1, 1, 2))
    assert all((one[key] == same[key]).all() for key in one)
    assert (one["tokens"] != other["tokens"]).any()


def test_a_window_shuffles_and_loses_nothing(monkeypatch):
    monkeypatch.setattr(streams, "WINDOW_DOCUMENTS", 7)
    monkeypatch.setattr(streams, "GROUP", 3)
    shards = [Shard(f"{n}", lambda start, n=n: iter([f"{n}.{i}" for i in range(start, 10 + n)])) for n in range(4)]
    groups = iter(streams.ShardedText(shards, 5, True))
    every = sorted(f"{n}.{i}" for n in range(4) for i in range(10 + n))
    for _ in range(3):
        epoch = []
        while len(epoch) < len(every):
            epoch += next(groups)
        assert sorted(epoch) == every


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_workers_change_nothing(kind, tmp_path, tokenizer):
    text = write_source(kind, tmp_path, tokenizer)
    alone = train(text, CONFIG, tokenizer, 25)
    batches = batches_of([text], dataclasses.replace(CONFIG, workers=2), tokenizer, batch_size=4, seed=0)
    together = take(batches, 11)
    state = json.loads(json.dumps(batches.get_state()))
    rest = take(batches, 14)
    assert all((alone[k] == np.concatenate([together[k], rest[k]])).all() for k in alone)
    batches.set_state(state)
    assert (take(batches, 14)["tokens"] == rest["tokens"]).all()
    batches.close()


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_heldout_text_is_not_trained_on(kind, tmp_path, tokenizer):
    text = write_source(kind, tmp_path, tokenizer)
    config = dataclasses.replace(CONFIG, heldout_fraction=0.1)
    batches = heldout_batches([text], config, tokenizer, batch_size=4)
    again = heldout_batches([text], config, tokenizer, batch_size=4)
    rows = {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}
    assert all((a[key] == b[key]).all() for a, b in zip(batches, again, strict=True) for key in a)
    assert rows["tokens"].shape[0] % 4 == 0 and (rows["tokens"][rows["segment_ids"] == 0] == 0).all()
    real = rows["tokens"].reshape(-1)[rows["segment_ids"].reshape(-1) > 0]
    heldout = epochs({"tokens": real})
    trained = epochs(train(text, config, tokenizer, 2 * per_epoch(tokenizer, config)))
    assert len(heldout) == 9 and len(set(trained)) == len(TEXTS) - 9
    assert not set(heldout) & set(trained)
    few = heldout_batches([text], dataclasses.replace(config, eval_tokens=32), tokenizer, batch_size=2)
    assert len(few) == 1 and (few[0]["segment_ids"] > 0).all()


def test_own_heldout_text(tmp_path, tokenizer):
    a, b = write_jsonl(tmp_path / "a.jsonl", TEXTS[:60]), write_jsonl(tmp_path / "b.jsonl", TEXTS[60:])
    config = dataclasses.replace(CONFIG, heldout=(b,), heldout_fraction=0.5)
    rows = [batch["tokens"] for batch in heldout_batches([a], config, tokenizer, batch_size=1)]
    assert epochs({"tokens": np.concatenate(rows)})[:23] == expected(tokenizer, TEXTS[60:])
    trained = epochs(train(a, config, tokenizer, per_epoch(tokenizer, config)))
    assert set(trained) == set(expected(tokenizer, TEXTS[:60]))


def test_one_document_is_cut_for_heldout(tmp_path, tokenizer):
    (tmp_path / "book.txt").write_text(" ".join(WORDS))
    config = dataclasses.replace(CONFIG, heldout_fraction=0.1)
    text = str(tmp_path / "book.txt")
    heldout = heldout_batches([text], config, tokenizer, batch_size=2)[0]["tokens"].reshape(-1)
    trained = train(text, config, tokenizer, 4)["tokens"].reshape(-1)
    assert "w199" in tokenizer.decode(heldout) and "w199" not in tokenizer.decode(trained)


def test_a_long_text_file_is_cut_at_line_ends(tmp_path):
    path = tmp_path / "long.txt"
    lines = "".join(f"line {n} é\n" for n in range(60_000))
    for whole in (lines, "é" * PIECE_BYTES, "x" * (PIECE_BYTES + 1)):
        path.write_text(whole)
        pieces = list(documents(open_text([str(path)], "text", end_of_text=0, vocab_size=1)))
        assert len(pieces) > 1 and "".join(pieces) == whole
        assert whole is not lines or all(piece.endswith("\n") for piece in pieces)


def test_python_reference_needs_no_files(tokenizer):
    corpus = open_text([], "text", end_of_text=0, vocab_size=1)
    assert len(corpus) > 50 and sum(len(text) for text in documents(corpus)) > 300_000
    batches = batches_of([], CONFIG, tokenizer, batch_size=2, seed=0)
    assert next(batches)["tokens"].shape == (2, 16)
    batches.close()


def test_short_texts_say_how_often_they_are_read(tmp_path, tokenizer):
    (tmp_path / "short.txt").write_text("w1 w2 " * 100)

    def said(tokens):
        text = ["--text", str(tmp_path / "short.txt"), "--data.heldout-fraction", "0.5", "--data.seq-len", "16"]
        run = parse_run(["--config", "tiny", "--tokens", tokens, *text])
        data = TrainingData(run, run.stages(), tokenizer, resuming=False)
        data.close()
        return data.summary

    count = training_text(
        [str(tmp_path / "short.txt")], dataclasses.replace(CONFIG, heldout_fraction=0.5), tokenizer, 1000
    ).tokens
    assert 90 < count < 110
    assert said("10_000") == [f"text: {count} tokens to train on, each read {10_000 / count:.1f} times"]
    assert said("60") == []


def test_errors_are_one_clear_line(tmp_path, tokenizer):
    good = write_jsonl(tmp_path / "good.jsonl")
    bad = {
        "no.jsonl": (None, "no such file"),
        "a.csv": (b"a,b", "unknown kind of file"),
        "s3:bucket": (None, "unknown scheme s3:"),
        "empty.jsonl": (b"", "0 tokens"),
        "short.txt": (b"w1 w2", "tokens to train on are fewer than one sequence of 16"),
        "half.jsonl": (b'{"text": "w1"}\n\n{"text": "w', "line 3: not a line of JSON"),
        "list.jsonl": (b"[1]\n", "line 1: expected a record"),
        "fields.jsonl": (b'{"content": "w1", "id": 3}\n', "no field 'text' among content, id"),
        "number.jsonl": (b'{"text": 3}\n', "field 'text' is int"),
        "latin.txt": (b"caf\xe9", "not UTF-8"),
        "bad.jsonl.zst": (b"garbage, not zstandard", "damaged or incomplete"),
        "bad.parquet": (b"PAR1 garbage PAR1", "not a readable Parquet file"),
        "bad.npy": (b"garbage", "not a readable .npy file"),
        "bad.arrayrecord": (b"garbage", "not a readable ArrayRecord file"),
    }
    import zstandard

    whole = zstandard.ZstdCompressor().compress((tmp_path / "good.jsonl").read_bytes())
    bad["cut.jsonl.zst"] = (whole[:-20], "damaged or incomplete")
    np.save(tmp_path / "float.npy", np.zeros(9))
    np.save(tmp_path / "large.npy", np.full(9, 60_000, np.uint16))
    bad |= {"float.npy": (None, "found float64"), "large.npy": (None, "outside the vocabulary")}
    (tmp_path / "folder").mkdir()
    bad |= {"folder": (None, "holds no file ending in"), "*.none": (None, "holds no file")}
    for name, (data, message) in bad.items():
        if data is not None:
            (tmp_path / name).write_bytes(data)
        config = dataclasses.replace(CONFIG, heldout_fraction=0.0, seq_len=16 if name != "cut.jsonl.zst" else 10_000)
        with pytest.raises(UserError, match=message) as caught:
            batches_of([name if ":" in name else str(tmp_path / name)], config, tokenizer, batch_size=1, seed=0)
        assert "\n" not in str(caught.value) and name.split("*")[0].split(":")[0] in str(caught.value)
    with pytest.raises(UserError, match="cannot be opened"):
        batches_of([f"hf:{tmp_path / 'absent'}"], CONFIG, tokenizer, batch_size=1, seed=0)
    with pytest.raises(UserError, match="heldout-fraction 0"):
        heldout_batches([good], CONFIG, tokenizer, batch_size=3)


def test_an_error_under_way_reaches_the_caller(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    write_jsonl(path)
    path.write_bytes(path.read_bytes() + b"not JSON\n")
    batches = batches_of([str(path)], dataclasses.replace(CONFIG, shuffle=False), tokenizer, batch_size=4, seed=0)
    with pytest.raises(UserError, match="line 84: not a line of JSON"):
        take(batches, 100)
    batches.close()


def test_preparing_leaves_nothing_behind_when_it_fails(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "w1"}\nnot JSON\n')
    for content, message in ((b'{"text": "\\ud800"}\n', "line 1: holds half a character"), (b"", "holds no text")):
        (tmp_path / "odd.jsonl").write_bytes(content)
        with pytest.raises(UserError, match=message):
            prepare(Prepare(out=tmp_path / "out.npy", text=(str(tmp_path / "odd.jsonl"),)), tokenizer)
    (tmp_path / "odd.jsonl").unlink()
    settings = Prepare(out=tmp_path / "out.npy", text=(str(tmp_path / "a.jsonl"),))
    with pytest.raises(UserError, match="line 2"):
        prepare(settings, tokenizer)
    with pytest.raises(UserError, match="no field 'body' among text; set --text-field"):
        prepare(dataclasses.replace(settings, text_field="body"), tokenizer)
    with pytest.raises(UserError, match="cannot be written"):
        prepare(dataclasses.replace(settings, out=tmp_path / "no" / "out.npy"), tokenizer)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
