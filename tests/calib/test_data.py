"""Calibration data: what is read, how it is packed, and what is refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict

from qdeltanet.calib import load_samples
from qdeltanet.core import QDeltaNetError
from qdeltanet.eval.embedded import DATASETS, model_path
from qdeltanet.models import load_tokenizer

EOS = 256
TEMPLATE = "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] }}{% endfor %}"
CHAT = [{"role": "user", "content": "ping"}, {"role": "assistant", "content": "pong"}]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(model_path("tiny-hybrid"))


@pytest.fixture
def talker() -> Any:
    made = load_tokenizer(model_path("tiny-hybrid"))
    made.chat_template = TEMPLATE
    return made


def written(folder: Path, rows: list[dict[str, Any]], name: str = "data.jsonl") -> str:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


def text_of(tokens: torch.Tensor) -> str:
    return bytes(t for t in tokens.flatten().tolist() if t < 256).decode()


# -- what the published figures stand on -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "dataset", "samples", "seq_len", "shape", "digest"),
    [
        ("tiny-recall", "recall", 128, 128, (128, 128), "6c7f91637915f31f"),
        ("tiny-hybrid", "bytes", None, 512, (98, 512), "d699d50fcb220fd1"),
        ("tiny-hybrid", "bytes", 16, 512, (16, 512), "ad8b0ebc5ea767b5"),
        ("tiny-recall", "recall", 10, 100, (10, 100), "ce47d6d1a905355d"),
        ("tiny-hybrid", "bytes", 64, 1024, (64, 1024), "e71f37afe1269686"),
    ],
)
def test_tokens_of_the_embedded_sets_never_change(model, dataset, samples, seq_len, shape, digest):
    data = load_samples(DATASETS[dataset], load_tokenizer(model_path(model)), samples, seq_len)
    assert (data.tokens.shape, data.digest[:16]) == (shape, digest)


# -- packing -----------------------------------------------------------------------------------------------------------


def test_long_documents_are_cut_and_short_ones_joined(tokenizer, tmp_path):
    file = written(tmp_path, [{"n": 1, "text": t} for t in ("a" * 25, "bb", "cccc", "d" * 7, "")])
    data = load_samples(file, tokenizer, 3, 10)
    assert data.tokens[:2].tolist() == [[ord("a")] * 10] * 2
    assert data.tokens[2].tolist() == [*b"bb", EOS, *b"cccc", EOS, *b"dd"]


def test_without_an_end_of_text_documents_are_joined_directly(tmp_path):
    tokenizer = load_tokenizer(model_path("tiny-hybrid"))
    tokenizer.eos_token = None
    assert text_of(load_samples(written(tmp_path, [{"text": "ab"}] * 4), tokenizer, 1, 8).tokens) == "abababab"


def test_fewer_than_asked_says_how_many(tokenizer, tmp_path):
    file = written(tmp_path, [{"text": "a" * 25}])
    with pytest.raises(QDeltaNetError, match="holds 2 sequences of 10 tokens, 3 were asked for: lower --samples or"):
        load_samples(file, tokenizer, 3, 10)
    assert load_samples(file, tokenizer, None, 10).tokens.shape == (2, 10)


# -- what is recorded --------------------------------------------------------------------------------------------------


def test_described_is_json_and_counts_what_was_read(tokenizer, tmp_path):
    file = written(tmp_path, [{"id": n, "body": letter * 10} for n, letter in enumerate("abcdef")])
    data = load_samples(file, tokenizer, 3, 10, seed=4)
    assert json.loads(json.dumps(data.described())) == {
        "name": file,
        "samples": 3,
        "seq_len": 10,
        "sha256": hashlib.sha256(data.tokens.numpy().tobytes()).hexdigest(),
        "seed": 4,
        "column": "body",
        "documents": 3,
    }


def test_the_digest_follows_what_was_used(tokenizer, tmp_path):
    rows = [{"text": letter * 10} for letter in "abcdef"]
    first = load_samples(written(tmp_path, rows), tokenizer, 3, 10)
    rows[5] = {"text": "z" * 10}
    unused = load_samples(written(tmp_path, rows), tokenizer, 3, 10)
    rows[2] = {"text": "c" * 9 + "!"}
    used = load_samples(written(tmp_path, rows), tokenizer, 3, 10)
    assert first.described() == unused.described()
    assert first.digest != used.digest


@pytest.mark.parametrize("kind", ["file", "saved"])
def test_seeds(tokenizer, tmp_path, kind):
    rows = [{"text": chr(c) * 10} for c in range(ord("a"), ord("z"))]
    name = written(tmp_path, rows)
    if kind == "saved":
        name = str(tmp_path / "saved")
        Dataset.from_list(rows).save_to_disk(name)

    def order(seed: int | None) -> str:
        return text_of(load_samples(name, tokenizer, 25, 10, seed=seed).tokens[:, 0])

    ordered = "".join(row["text"][0] for row in rows)
    assert order(None) == ordered
    assert order(1) == order(1)
    assert len({ordered, order(1), order(2)}) == 3
    assert sorted(order(1)) == list(ordered)


# -- sources -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form", ["x.txt", "x.jsonl", "x.jsonl.gz", "x.json", "x.parquet", "x.arrow", "saved", "folder"]
)
def test_local_forms_hold_the_same(tokenizer, tmp_path, form):
    texts = [letter * 10 for letter in "abcdef"]
    data = Dataset.from_dict({"content": texts})
    path = tmp_path / form
    if form == "x.txt":
        path.write_text("\n".join(texts) + "\n\n")
    elif form == "x.json":
        path.write_text(json.dumps([{"content": text} for text in texts]))
    elif form.startswith("x.jsonl"):
        data.to_json(str(path), compression="gzip" if form.endswith("gz") else None)
    elif form == "x.parquet":
        data.to_parquet(str(path))
    elif form == "x.arrow":
        data.save_to_disk(str(tmp_path / "there"))
        next((tmp_path / "there").glob("*.arrow")).rename(path)
    elif form == "saved":
        data.save_to_disk(str(path))
    else:
        path.mkdir()
        data.to_parquet(str(path / "train.parquet"))
    assert text_of(load_samples(str(path), tokenizer, 6, 10).tokens) == "".join(texts)


def test_a_split_of_a_saved_dataset(tokenizer, tmp_path):
    path = str(tmp_path / "saved")
    splits = {name: Dataset.from_dict({"text": [name[0] * 8]}) for name in ("left", "right")}
    DatasetDict(splits).save_to_disk(path)
    assert text_of(load_samples(f"{path}::right", tokenizer, 1, 8).tokens) == "r" * 8
    with pytest.raises(QDeltaNetError, match=r"no split 'train'; name one as .*::SPLIT \(left, right\)"):
        load_samples(path, tokenizer, 1, 8)


# -- columns and conversations -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({"id": "7", "text": "x" * 8}, "text"),
        ({"title": "t", "content": "x" * 8}, "content"),
        ({"n": 1, "body": "x" * 8}, "body"),
        ({"text": 3, "body": "x" * 8}, "body"),
    ],
)
def test_the_text_column_is_found(tokenizer, tmp_path, row, column):
    data = load_samples(written(tmp_path, [row]), tokenizer, 1, 8)
    assert data.column == column
    assert text_of(data.tokens) == "x" * 8


def test_empty_values_do_not_lead_to_another_column(tokenizer, tmp_path):
    rows = [{"text": None, "url": "http"}, {"text": "x" * 8, "url": "http"}]
    assert text_of(load_samples(written(tmp_path, rows), tokenizer, 1, 8).tokens) == "x" * 8
    rows = [{"body": None, "url": "http"}, {"body": "x" * 8, "url": "http"}]
    with pytest.raises(QDeltaNetError, match=r"several columns may hold the text: name one .* \(body, url\)"):
        load_samples(written(tmp_path, rows), tokenizer, 1, 8)
    named = load_samples(written(tmp_path, rows), tokenizer, 1, 8, text_column="body")
    assert (text_of(named.tokens), named.column, named.documents) == ("x" * 8, "body", 1)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": CHAT, "prompt": "ping"},
        {"conversations": [{"from": "human", "value": "ping"}, {"from": "gpt", "value": "pong"}]},
        {"messages": [{**CHAT[0], "name": None}, CHAT[1]]},
    ],
)
def test_conversations_go_through_the_template(talker, tmp_path, row):
    expected = "<user>ping<assistant>pong"
    data = load_samples(written(tmp_path, [row]), talker, 1, len(expected))
    assert text_of(data.tokens) == expected


def test_empty_conversations_are_skipped(talker, tmp_path):
    data = load_samples(written(tmp_path, [{"messages": CHAT}, {"messages": []}, {"messages": CHAT}]), talker, 2, 26)
    assert data.documents == 2


def test_conversations_in_a_named_column(talker, tmp_path):
    file = written(tmp_path, [{"text": "no", "talk": CHAT}])
    assert load_samples(file, talker, 1, 20, text_column="talk").column == "talk"


def test_conversations_need_a_template(tokenizer, tmp_path):
    file = written(tmp_path, [{"messages": CHAT, "prompt": "ping"}])
    with pytest.raises(QDeltaNetError, match="column 'messages' holds conversations and the tokenizer has no chat"):
        load_samples(file, tokenizer, 1, 8)
    assert load_samples(file, tokenizer, 1, 4, text_column="prompt").column == "prompt"


def test_what_a_template_refuses(talker, tmp_path):
    talker.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(QDeltaNetError, match=r"the chat template refuses row 1 \(roles must alternate\)"):
        load_samples(written(tmp_path, [{"messages": CHAT}]), talker, 1, 8)


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("none.jsonl", None, "no such file"),
        ("empty.jsonl", "", "the file is empty"),
        ("blank.jsonl", '{"text": ""}\n', "holds no text"),
        ("numbers.jsonl", '{"n": 1}\n', "no text column; columns are n"),
        ("short.jsonl", '{"text": "ab"}\n', "too short for one sequence of 16"),
        ("broken.jsonl", "{", "cannot be read"),
        ("broken.parquet", "PAR1", "cannot be read"),
        ("broken.arrow", "ARROW1", "cannot be read"),
        ("table.csv", "a,b\n", "local files end in .jsonl"),
        ("mixed.jsonl", '{"text": "ab"}\n{"text": {"a": 1}}\n', "column .text. of row 2 holds dict, not text"),
    ],
)
def test_bad_files(tokenizer, tmp_path, name, content, says):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(QDeltaNetError, match=says) as caught:
        load_samples(str(tmp_path / name), tokenizer, 4, 16)
    assert "\n" not in str(caught.value)


def test_bad_requests(tokenizer, tmp_path):
    file = written(tmp_path, [{"text": "x" * 32, "n": 3}])
    with pytest.raises(QDeltaNetError, match="row 1 has no column 'body'; columns are text"):
        load_samples(file, tokenizer, 1, 16, text_column="body")
    with pytest.raises(QDeltaNetError, match="column 'n' of row 1 holds int, not text"):
        load_samples(file, tokenizer, 1, 16, text_column="n")
    for samples, seq_len in ((0, 16), (1, 0)):
        with pytest.raises(QDeltaNetError, match="must be at least 1"):
            load_samples(file, tokenizer, samples, seq_len)


def test_a_hub_id_without_a_network_is_one_line(tokenizer):
    with pytest.raises(QDeltaNetError, match=r"dataset no-such-owner/no-such-set:x: cannot be read") as caught:
        load_samples("no-such-owner/no-such-set:x", tokenizer, 1, 16)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_of_another_model(tokenizer, tmp_path):
    file = written(tmp_path, [{"text": "ab"}] * 10)
    assert load_samples(file, tokenizer, 1, 8, vocab_size=EOS + 1).tokens.max() == EOS
    with pytest.raises(
        QDeltaNetError, match="does not match the model: it gave token 256, the model's vocabulary has 256"
    ):
        load_samples(file, tokenizer, 1, 8, vocab_size=EOS)
