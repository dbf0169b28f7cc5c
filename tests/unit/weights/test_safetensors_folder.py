"""Safetensors folders: read and written like the safetensors package, and refused with a reason."""

import json

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from megatron.weights.errors import WeightsError
from megatron.weights.safetensors_folder import INDEX_FILE, SINGLE_FILE, SafetensorsFolder, SafetensorsWriter

TENSORS = {
    "a.weight": torch.arange(12, dtype=torch.float32).view(3, 4),
    "b.weight": torch.randn(5, 3).to(torch.bfloat16),
    "c.scalar": torch.tensor(2.5, dtype=torch.float64),
    "d.empty": torch.empty(0, 4),
    "e.half": torch.randn(7).half(),
    "f.ids": torch.arange(6).view(2, 3),
    "g.mask": torch.tensor([True, False, True]),
}


def write(folder, tensors, max_shard_bytes=10**9):
    with SafetensorsWriter(folder, max_shard_bytes) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)


def assert_same(got, want):
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    assert torch.equal(got, want)


@pytest.fixture
def sharded(tmp_path):
    """A folder of three shards of two tensors each."""
    folder = tmp_path / "sharded"
    write(folder, {f"t{number}": torch.full((4,), float(number)) for number in range(6)}, max_shard_bytes=32)
    return folder


@pytest.mark.parametrize("max_shard_bytes", [1, 50, 10**9])
def test_what_is_written_is_read_back(tmp_path, max_shard_bytes):
    write(tmp_path / "out", TENSORS, max_shard_bytes)
    folder = SafetensorsFolder(tmp_path / "out")
    assert folder.names == tuple(TENSORS)
    for name, tensor in TENSORS.items():
        assert folder.shape(name) == tuple(tensor.shape)
        assert folder.dtype(name) == tensor.dtype
        assert_same(folder.get(name), tensor)


def test_reads_what_the_safetensors_package_writes(tmp_path):
    save_file(TENSORS, tmp_path / SINGLE_FILE)
    for path in (tmp_path, tmp_path / SINGLE_FILE):
        folder = SafetensorsFolder(path)
        for name, tensor in TENSORS.items():
            assert_same(folder.get(name), tensor)


def test_the_safetensors_package_reads_what_is_written(tmp_path):
    write(tmp_path / "out", TENSORS, max_shard_bytes=60)
    index = json.loads((tmp_path / "out" / INDEX_FILE).read_text())
    assert set(index["weight_map"]) == set(TENSORS)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in TENSORS.values())
    for name, shard in index["weight_map"].items():
        assert_same(load_file(tmp_path / "out" / shard)[name], TENSORS[name])


def test_shards_are_named_with_their_count(sharded):
    assert sorted(file.name for file in sharded.iterdir()) == [
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
        INDEX_FILE,
    ]


def test_one_shard_has_no_index(tmp_path):
    write(tmp_path / "some", {name: TENSORS[name] for name in ("a.weight", "b.weight")})
    write(tmp_path / "nothing", {})
    assert [file.name for file in (tmp_path / "some").iterdir()] == [SINGLE_FILE]
    assert [file.name for file in (tmp_path / "nothing").iterdir()] == [SINGLE_FILE]
    assert SafetensorsFolder(tmp_path / "nothing").names == ()


def test_many_names_begin_a_new_shard_before_the_header_is_full(tmp_path):
    tensors = {f"layers.{number}.{'x' * 200}": torch.tensor([float(number)]) for number in range(2000)}
    write(tmp_path / "out", tensors)
    folder = SafetensorsFolder(tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert all(torch.equal(folder.get(name), tensor) for name, tensor in tensors.items())


def test_a_tensor_that_would_be_misaligned_begins_a_new_shard(tmp_path):
    write(tmp_path / "out", {"odd": torch.ones(3).bfloat16(), "wide": torch.ones(2)})
    assert sorted(file.name for file in (tmp_path / "out").glob("*.safetensors")) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]


def test_strided_tensors_are_written_in_order(tmp_path):
    square = torch.arange(16.0).view(4, 4)
    write(tmp_path / "out", {"transposed": square.t(), "column": square[:, 1]})
    folder = SafetensorsFolder(tmp_path / "out")
    assert torch.equal(folder.get("transposed"), square.t())
    assert torch.equal(folder.get("column"), square[:, 1])


def test_the_folder_appears_only_when_it_is_whole(tmp_path):
    out = tmp_path / "deep" / "out"
    writer = SafetensorsWriter(out)
    writer.add("a", torch.ones(3))
    (writer.staging / "config.json").write_text("{}")
    assert not out.exists()
    writer.close()
    assert sorted(file.name for file in out.iterdir()) == ["config.json", SINGLE_FILE]
    assert list(out.parent.iterdir()) == [out]


def test_an_error_leaves_nothing_behind(tmp_path):
    writer = SafetensorsWriter(tmp_path / "out")
    with pytest.raises(WeightsError), writer:
        writer.add("a", torch.ones(3, dtype=torch.complex64))
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_may_be_filled(tmp_path):
    (tmp_path / "out").mkdir()
    write(tmp_path / "out", {"a": torch.ones(3)})
    assert SafetensorsFolder(tmp_path / "out").names == ("a",)


def test_a_folder_with_something_in_it_is_not_overwritten(tmp_path):
    (tmp_path / "file").write_text("precious")
    for path in (tmp_path, tmp_path / "file"):
        with pytest.raises(WeightsError, match="exists and is not an empty folder; name a new one"):
            SafetensorsWriter(path)
    assert (tmp_path / "file").read_text() == "precious"


def test_a_name_is_written_once(tmp_path):
    with SafetensorsWriter(tmp_path / "out") as writer:
        writer.add("a", torch.ones(3))
        with pytest.raises(WeightsError, match="'a' is written twice"):
            writer.add("a", torch.ones(3))


def test_other_dtypes_and_sizes_are_refused(tmp_path):
    with pytest.raises(WeightsError, match=r"'a' is torch.complex64"), SafetensorsWriter(tmp_path / "out") as writer:
        writer.add("a", torch.ones(3, dtype=torch.complex64))
    with pytest.raises(WeightsError, match="must be 1 byte or more"):
        SafetensorsWriter(tmp_path / "out", 0)


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(WeightsError, match=r"holds neither model.safetensors nor model.safetensors.index.json"):
        SafetensorsFolder(tmp_path)
    with pytest.raises(WeightsError, match="is not there; name a folder"):
        SafetensorsFolder(tmp_path / "absent")


def test_an_unknown_tensor_is_refused(sharded):
    for ask in (SafetensorsFolder.get, SafetensorsFolder.shape, SafetensorsFolder.dtype):
        with pytest.raises(WeightsError, match=r"has no tensor 'u' \(it has 6\)"):
            ask(SafetensorsFolder(sharded), "u")


def test_a_missing_shard_is_named(sharded):
    (sharded / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"names the shard model-00002-of-00003.safetensors, which is not there"):
        SafetensorsFolder(sharded)


def test_an_index_that_names_what_its_shard_lacks_is_refused(sharded):
    index = json.loads((sharded / INDEX_FILE).read_text())
    index["weight_map"]["stranger"] = "model-00001-of-00003.safetensors"
    (sharded / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(WeightsError, match=r"'stranger' in model-00001-of-00003.safetensors, which lacks it"):
        SafetensorsFolder(sharded)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {}, "weight_map": {}}', '{"a": ' * 100_000]
)
def test_an_index_that_is_none_is_refused(sharded, text):
    (sharded / INDEX_FILE).write_text(text)
    with pytest.raises(WeightsError, match="is not an index of shards"):
        SafetensorsFolder(sharded)


@pytest.mark.parametrize(
    "keep, message",
    [
        (0, "a header of 0 bytes"),
        (4, "is cut off: it has 4 bytes"),
        (1000, "is cut off"),
        (-1, "is cut off: it has 262171 b"),
    ],
)
def test_a_file_that_is_cut_off_is_refused(sharded, keep, message):
    shard = sharded / "model-00003-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:keep] if keep >= 0 else shard.read_bytes()[:-5])
    with pytest.raises(WeightsError, match=message):
        SafetensorsFolder(sharded)


def test_a_file_that_shrinks_after_it_was_opened_is_refused(sharded):
    folder = SafetensorsFolder(sharded)
    shard = sharded / "model-00003-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-5])
    with pytest.raises(WeightsError, match="is cut off"):
        folder.get("t5")


def write_raw(folder, header, data=bytes(16)):
    """One file with a header of our own making."""
    text = header if isinstance(header, str) else json.dumps(header)
    (folder / SINGLE_FILE).write_bytes(len(text).to_bytes(8, "little") + text.encode() + data)


def entry(start, end, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


@pytest.mark.parametrize(
    "header, message",
    [
        ({"a": entry(0, 4), "b": entry(4, 12)}, "bytes 0 to 4 for a tensor of 8"),
        ({"a": entry(0, 8), "b": entry(0, 8)}, "b begins at byte 0, and the one before it ends at 8"),
        ({"a": entry(0, 8), "b": entry(4, 12)}, "b begins at byte 4, and the one before it ends at 8"),
        ({"a": entry(0, 4, [1]), "b": entry(8, 16)}, "b begins at byte 8, and the one before it ends at 4"),
        ({"b": entry(8, 16)}, "b begins at byte 8, and the one before it ends at 0"),
        ({"a": entry(0, 8)}, "and its header describes"),
        ({"a": entry(-8, 0), "b": entry(0, 16, [4])}, r"shape \[2\] at bytes -8 to 0"),
        ({"a": entry(0.0, 16.0, [4])}, r"at bytes 0.0 to 16.0"),
        ({"a": entry(0, 16, [-2, -2])}, r"shape \[-2, -2\]"),
        ({"a": entry(0, 16, [2**62, 4])}, "bytes 0 to 16 for a tensor of"),
        (json.dumps({"a": entry(0, 8), "b": entry(8, 16)}).replace("b", "a"), "the key 'a' twice"),
        ('{"a": ' * 100_000, "nested too deep"),
    ],
)
def test_a_header_that_is_not_of_the_format_is_refused_as_by_the_safetensors_package(tmp_path, header, message):
    write_raw(tmp_path, header)
    with pytest.raises(WeightsError, match=message) as error:
        SafetensorsFolder(tmp_path)
    assert "\n" not in str(error.value)
    with pytest.raises(SafetensorError):
        load_file(tmp_path / SINGLE_FILE)


def test_empty_tensors_between_others_are_read(tmp_path):
    header = {"c": entry(8, 16), "b": entry(8, 8, [0, 3]), "a": entry(0, 8)}
    write_raw(tmp_path, header)
    assert SafetensorsFolder(tmp_path).names == tuple(load_file(tmp_path / SINGLE_FILE)) == ("a", "b", "c")


@pytest.mark.parametrize(
    "shard", ["../model.safetensors", "/{}/x", "..", ".", "a/b", "a\\b", "", "x" * 256, "a\0b", 3, None]
)
def test_a_shard_that_is_no_plain_name_is_refused(sharded, shard):
    (sharded.parent / SINGLE_FILE).write_bytes((sharded / "model-00001-of-00003.safetensors").read_bytes())
    index = json.loads((sharded / INDEX_FILE).read_text())
    index["weight_map"]["t0"] = shard
    (sharded / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(WeightsError, match="which must be the plain name of a file in"):
        SafetensorsFolder(sharded)


def test_shards_may_be_links_as_in_hugging_face_s_cache(sharded):
    blob = sharded.parent / "blob"
    (sharded / "model-00001-of-00003.safetensors").rename(blob)
    (sharded / "model-00001-of-00003.safetensors").symlink_to(blob)
    assert torch.equal(SafetensorsFolder(sharded).get("t0"), torch.zeros(4))


def test_a_tensor_in_two_shards_is_refused(sharded):
    shards = [sharded / f"model-0000{number}-of-00003.safetensors" for number in (1, 2)]
    shards[0].write_bytes(shards[1].read_bytes())
    with pytest.raises(WeightsError, match="both hold 't2'"):
        SafetensorsFolder(sharded)


def test_a_tensor_that_the_index_does_not_name_is_part_of_the_weights(sharded):
    index = json.loads((sharded / INDEX_FILE).read_text())
    del index["weight_map"]["t1"]
    (sharded / INDEX_FILE).write_text(json.dumps(index))
    assert SafetensorsFolder(sharded).names == tuple(f"t{number}" for number in range(6))


def test_two_sets_of_weights_in_one_folder_are_refused(sharded):
    (sharded / SINGLE_FILE).write_bytes((sharded / "model-00001-of-00003.safetensors").read_bytes())
    with pytest.raises(WeightsError, match=r"holds both model.safetensors and model.safetensors.index.json"):
        SafetensorsFolder(sharded)
