import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import torch

from sferd_lab.errors import SferdError
from sferd_lab.files import (
    METADATA_KEY,
    content_sha256,
    load_tensors,
    read_json,
    read_record,
    read_yaml,
    replacing,
    save_tensors,
    sha256,
    write_json,
    write_text,
)

TENSORS = {
    "weights": torch.arange(6.0).reshape(2, 3),
    "labels": torch.tensor([3, 1, 2]),
    "scalar": torch.tensor(0.1, dtype=torch.float64),
    "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "mask": torch.tensor([True, False]),
    "empty": torch.zeros(0, 4),
}
INFO = {"kind": "test", "widths": [8, 16], "nested": {"b": 1, "a": None}, "text": "größer"}


def names(folder):
    return sorted(file.name for file in folder.iterdir())


# ---- whole or not at all


def test_a_file_takes_the_old_ones_place_only_when_the_block_ends_well(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
        assert temporary.parent == tmp_path  # the same file system, or the replacement would be a copy
    assert path.read_text() == "new"
    assert names(tmp_path) == ["file.txt"]


@pytest.mark.parametrize("failure", [OSError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("existed", [True, False])
def test_a_block_that_fails_leaves_what_was_there_and_nothing_else(tmp_path, failure, existed):
    path = tmp_path / "file.txt"
    if existed:
        path.write_text("old")

    def write_half():
        with replacing(path) as temporary:
            temporary.write_text("ne")
            raise failure

    with pytest.raises(failure):
        write_half()
    assert names(tmp_path) == (["file.txt"] if existed else [])
    assert not existed or path.read_text() == "old"


def test_a_killed_process_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    code = (
        "import os, sys; from sferd_lab.files import replacing\n"
        "with replacing(sys.argv[1]) as temporary:\n"
        "    temporary.write_text('ne'); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == 9
    assert path.read_text() == "old"


def test_missing_folders_are_made_and_others_may_read_the_file(tmp_path):
    path = tmp_path / "a" / "b" / "file.txt"
    write_text(path, "größer\n")
    assert path.read_bytes() == "größer\n".encode()
    assert os.stat(path).st_mode & 0o777 == 0o644


# ---- JSON


def test_json_comes_back_as_it_went_in_with_its_keys_sorted(tmp_path):
    path = tmp_path / "file.json"
    write_json(path, INFO)
    assert read_json(path) == INFO
    assert list(json.loads(path.read_text())) == sorted(INFO)
    assert path.read_text().endswith("}\n")


def test_a_number_that_json_cannot_hold_is_refused_and_nothing_is_written(tmp_path):
    path = tmp_path / "file.json"
    write_json(path, {"fd": 1.0})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, {"fd": float("nan")})
    assert read_json(path) == {"fd": 1.0}


def test_missing_json_is_an_error_that_names_the_file(tmp_path):
    with pytest.raises(SferdError, match=r"none\.json is missing"):
        read_json(tmp_path / "none.json")


BAD_JSON = {
    "cut short": b'{"a": 1',
    "empty": b"",
    "not text": b"\xff\xfe",
    "too deep": b"[" * 100_000,
    "a name twice": b'{"a": 1, "b": {"c": 2, "c": 3}}',
    "not a number": b'{"a": NaN}',
    "infinity": b'{"a": -Infinity}',
    "beyond a float": b'{"a": 1e999}',
    "beyond an int": b"9" * 10_000,
}


@pytest.mark.parametrize("content", BAD_JSON.values(), ids=BAD_JSON)
def test_bad_json_is_an_error_that_names_the_file(tmp_path, content):
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(SferdError, match=r"bad\.json is not JSON"):
        read_json(path)


def test_a_record_is_an_object_with_what_is_asked_of_it(tmp_path):
    path = tmp_path / "record.json"
    write_json(path, {"a": 1})
    assert read_record(path, "a") == {"a": 1}
    with pytest.raises(SferdError, match=r"record.json has no 'b'; expected an object with a, b"):
        read_record(path, "a", "b")
    write_json(path, [1])
    with pytest.raises(SferdError, match=r"record.json holds a list; expected an object"):
        read_record(path)


BOMB = "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nd: [*c, *c]"


@pytest.mark.parametrize(
    "text",
    [
        "a: [1",
        "a: !!python/object/apply:os.getcwd []",
        "a: !!python/name:os.system",
        "a: !<tag:yaml.org,2002:python/object/new:os.system> [echo]",
        BOMB,
        "a: &a [*a]",
        "a: 1\na: 2",
        "a: !!bool x",
        "a: !!int ''",
        "a: !!timestamp x",
        "a: 2026-13-45",
        "[" * 5000,
        "\ud800",
    ],
)
def test_yaml_that_is_more_than_plain_values_is_refused(tmp_path, text):
    path = tmp_path / "file.yaml"
    path.write_text(text, errors="surrogatepass")
    with pytest.raises(SferdError, match=r"file.yaml cannot be read as YAML"):
        read_yaml(path)


def test_plain_yaml_is_read(tmp_path):
    path = tmp_path / "file.yaml"
    path.write_text("a: [1, 2.5, text, null, true]\nb: {c: -1}\n")
    assert read_yaml(path) == {"a": [1, 2.5, "text", None, True], "b": {"c": -1}}
    with pytest.raises(SferdError, match=r"none.yaml is missing"):
        read_yaml(tmp_path / "none.yaml")


@pytest.mark.parametrize("name", ["a" * 5000, "a\x00b"])
@pytest.mark.parametrize("read", [read_json, read_yaml, load_tensors])
def test_a_name_that_no_file_can_have_is_of_a_missing_one(tmp_path, read, name):
    with pytest.raises(SferdError, match="is missing"):
        read(tmp_path / name)


# ---- tensors


def test_tensors_and_their_description_come_back_as_they_went_in(tmp_path):
    path = tmp_path / "file.safetensors"
    save_tensors(path, TENSORS, INFO)
    tensors, info = load_tensors(path)
    assert info == INFO
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)


def test_a_view_or_a_tensor_with_a_gradient_is_saved_by_its_values(tmp_path):
    path = tmp_path / "file.safetensors"
    whole = torch.arange(12.0).reshape(3, 4)
    save_tensors(path, {"transposed": whole.T, "part": torch.arange(9.0)[2:5], "leaf": torch.ones(2, requires_grad=True)}, {})
    tensors, _ = load_tensors(path)
    assert torch.equal(tensors["transposed"], whole.T)
    assert tensors["part"].tolist() == [2, 3, 4]
    assert tensors["leaf"].tolist() == [1, 1]
    assert path.stat().st_size < 1000  # the part, not all that it is a part of


def test_the_same_input_gives_the_same_bytes_whatever_its_order(tmp_path):
    save_tensors(tmp_path / "a", TENSORS, INFO)
    save_tensors(tmp_path / "b", dict(reversed(TENSORS.items())), dict(reversed(INFO.items())))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    # In another process too, whose hashes of strings differ.
    code = (
        "import sys; from sferd_lab.files import load_tensors, save_tensors\n"
        "tensors, info = load_tensors(sys.argv[1]); save_tensors(sys.argv[2], tensors, info)"
    )
    environment = os.environ | {"PYTHONHASHSEED": "1"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a"), str(tmp_path / "c")], check=True, env=environment)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "c").read_bytes()


def test_loaded_tensors_do_not_change_with_the_file(tmp_path):
    path = tmp_path / "file.safetensors"
    save_tensors(path, {"a": torch.ones(1000)}, {})
    tensors, _ = load_tensors(path)
    with path.open("r+b") as file:
        file.seek(-4000, os.SEEK_END)
        file.write(bytes(4000))
    assert tensors["a"].tolist() == [1] * 1000
    with pytest.raises(SferdError, match="was altered"):
        load_tensors(path)


# ---- what was altered


def test_every_bit_of_a_file_counts(tmp_path):
    path = tmp_path / "file.safetensors"
    save_tensors(path, TENSORS, INFO)
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :])
        try:
            tensors, info = load_tensors(path)
        except SferdError:
            continue
        # Another spelling of the same: capitals in an escape or, in safetensors' own header, a space.
        assert info == INFO
        assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS | tensors)


@pytest.mark.parametrize(
    ("tensors", "info"),
    [
        ({**TENSORS, "labels": torch.tensor([3, 1, 4])}, INFO),
        ({**TENSORS, "weights": TENSORS["weights"].reshape(3, 2)}, INFO),
        ({**TENSORS, "mask": TENSORS["mask"].to(torch.uint8)}, INFO),
        ({("labelz" if name == "labels" else name): tensor for name, tensor in TENSORS.items()}, INFO),
        ({name: tensor for name, tensor in TENSORS.items() if name != "empty"}, INFO),
        (TENSORS, {**INFO, "widths": [8, 17]}),
    ],
)
def test_a_hash_of_other_values_shapes_types_names_or_words_is_not_this_ones(tensors, info):
    assert content_sha256(tensors, info) != content_sha256(TENSORS, INFO)


def test_a_file_without_a_hash_is_read_as_it_is_and_gets_one_when_it_is_saved_again(tmp_path):
    path = tmp_path / "old.safetensors"
    safetensors.torch.save_file({"a": torch.ones(3)}, path, {METADATA_KEY: json.dumps(INFO)})
    tensors, info = load_tensors(path)
    assert info == INFO
    save_tensors(path, tensors, info)
    with safetensors.safe_open(path, "pt") as file:
        assert json.loads(file.metadata()[METADATA_KEY]) == [content_sha256(tensors, INFO), INFO]


def test_names_that_are_numbers_are_hashed_as_they_are_read(tmp_path):
    path = tmp_path / "numbers.safetensors"
    save_tensors(path, {"a": torch.ones(3)}, {"n": {10: "ten", 9: "nine"}})
    assert load_tensors(path)[1] == {"n": {"10": "ten", "9": "nine"}}


def test_missing_tensors_are_an_error_that_names_the_file(tmp_path):
    with pytest.raises(SferdError, match=r"none\.safetensors is missing"):
        load_tensors(tmp_path / "none.safetensors")


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_a_safetensors_file_of_someone_else_is_refused(tmp_path, metadata):
    path = tmp_path / "foreign.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(1)}, path, metadata)
    with pytest.raises(SferdError, match="was not written by sferd_lab"):
        load_tensors(path)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("[1]", "is list; expected a SHA-256 and an object"),
        ("3", "is int; expected"),
        ('["a", {}, {}]', "is list; expected"),
        ('["a", {}]', "was altered"),
        *((text.decode("latin-1"), "not a readable") for text in BAD_JSON.values()),
    ],
)
def test_a_description_that_is_no_json_object_is_refused(tmp_path, metadata, message):
    path = tmp_path / "odd.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(1)}, path, {METADATA_KEY: metadata})
    with pytest.raises(SferdError, match=message):
        load_tensors(path)


@pytest.mark.parametrize("keep", [0, 4, 50, 0.5, -1])
def test_a_file_that_was_cut_short_is_refused(tmp_path, keep):
    path = tmp_path / "cut.safetensors"
    save_tensors(path, TENSORS, INFO)
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(SferdError, match=r"cut\.safetensors is not a readable safetensors file"):
        load_tensors(path)


def test_a_pickle_is_refused_without_being_run(tmp_path):
    path, trace = tmp_path / "evil.safetensors", tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(trace),)

    torch.save({"a": Evil()}, path)
    with pytest.raises(SferdError, match="is not a readable safetensors file"):
        load_tensors(path)
    np.save(path.with_suffix(".npy"), np.array([Evil()], dtype=object), allow_pickle=True)
    with pytest.raises(SferdError, match="is not a readable safetensors file"):
        load_tensors(path.with_suffix(".npy"))
    assert not trace.exists()


def test_the_sha256_is_that_of_the_files_bytes(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    assert sha256(path) == hashlib.sha256(b"abc").hexdigest()
