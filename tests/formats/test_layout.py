import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loader.errors import CatalogError
from loader.formats.layout import Layout, assemble, choose, weight_files
from loader.plan.catalog import Contents, Entry, File, View

URI = "s3://models/llama"
INDEX = "model.safetensors.index.json"
NUMBERED = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
BINS = [f"pytorch_model-0000{i}-of-00003.bin" for i in (1, 2, 3)]
BIN_INDEX = "pytorch_model.bin.index.json"
OTHERS = ["config.json", "tokenizer.json", "README.md", "pytorch_model.bin"]


@pytest.mark.parametrize(
    ("names", "index", "files"),
    [
        ([INDEX, *NUMBERED], INDEX, []),
        ([INDEX, *NUMBERED, "model.safetensors"], None, ["model.safetensors"]),
        ([INDEX, "model.fp16.safetensors.index.json"], INDEX, []),
        (["model.safetensors"], None, ["model.safetensors"]),
        (["model.safetensors", "adapter_model.safetensors", "model.fp16.safetensors"], None, ["model.safetensors"]),
        (["model.safetensors", "extra.safetensors.index.json"], None, ["model.safetensors"]),
        (["diffusion_pytorch_model.safetensors.index.json"], "diffusion_pytorch_model.safetensors.index.json", []),
        (["diffusion_pytorch_model.safetensors"], None, ["diffusion_pytorch_model.safetensors"]),
        (["b.safetensors", "a.safetensors"], None, ["a.safetensors", "b.safetensors"]),
        (NUMBERED[::-1], None, NUMBERED),
        ([*NUMBERED, "consolidated.safetensors"], None, NUMBERED),
        ([*NUMBERED, "consolidated.safetensors.index.json"], None, NUMBERED),
        (["m-0-of-2.safetensors", "m-1-of-2.safetensors"], None, ["m-0-of-2.safetensors", "m-1-of-2.safetensors"]),
    ],
)
def test_choose(names, index, files):
    for there in ([*names, *OTHERS], {*names[::-1], *OTHERS}):
        layout = choose(there, URI)
        assert (layout.index, layout.files) == (index, tuple(files))
        assert "pytorch_model.bin" in layout.passed_over


@pytest.mark.parametrize(
    ("names", "layout"),
    [
        ([BIN_INDEX, *BINS], Layout(BIN_INDEX, ())),
        (["pytorch_model.bin"], Layout(None, ("pytorch_model.bin",))),
        (BINS, Layout(None, tuple(BINS))),
        ([*BINS, "training_args.bin", "optimizer.bin", "scheduler.bin"], Layout(None, tuple(BINS))),
        ([*BINS, "adapter_model.bin"], Layout(None, tuple(BINS), ("adapter_model.bin",))),
        (["consolidated.safetensors"], Layout(None, ("consolidated.safetensors",))),
        (["consolidated.safetensors.index.json"], Layout("consolidated.safetensors.index.json", ())),
        (["diffusion_pytorch_model.bin"], Layout(None, ("diffusion_pytorch_model.bin",))),
        (["a.bin.index.json", "a-1-of-2.bin"], Layout("a.bin.index.json", ())),
        ([*BINS, BIN_INDEX, "model.safetensors"], Layout(None, ("model.safetensors",), tuple(BINS))),
        ([*BINS, INDEX, *NUMBERED], Layout(INDEX, (), tuple(BINS))),
        ([*NUMBERED, "adapter_model.safetensors"], Layout(None, tuple(NUMBERED), ("adapter_model.safetensors",))),
        (
            ["pytorch_model.bin", "consolidated.safetensors"],
            Layout(None, ("pytorch_model.bin",), ("consolidated.safetensors",)),
        ),
    ],
)
def test_bin_files_where_there_is_nothing_better(names, layout):
    found = choose([*names, "config.json"], URI)
    assert (found, found.passed_over) == (layout, layout.passed_over)


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        ([], ["There is nothing", "Check the URI", "model.safetensors"]),
        (["config.json", "a\nb"], ["There are: 'a\\nb', config.json.", "model.safetensors.index.json"]),
        (["training_args.bin"], ["There are: training_args.bin.", "pytorch_model.bin"]),
        (["consolidated.00.pth"], ["There are: consolidated.00.pth.", "source.uri"]),
        (BINS[::2], ["2 of 3 files pytorch_model-*-of-00003.bin are there", f"missing are {BINS[1]}."]),
        ([f"file{i:03}" for i in range(100)], ["file019 and 80 more"]),
        (["a.safetensors.index.json", "b.safetensors.index.json"], ["several indexes", "a.safetensors.index.json, b."]),
        (NUMBERED[::2], ["2 of 3 files model-*-of-00003.safetensors are there", f"missing are {NUMBERED[1]}."]),
        (["m-0-of-3.safetensors", "m-2-of-3.safetensors"], ["missing are m-1-of-3.safetensors."]),
    ],
)
def test_what_cannot_be_chosen_is_told(names, parts):
    with pytest.raises(CatalogError) as error:
        choose(names, URI)
    for part in [f"{URI}: ", *parts]:
        assert part in error.value.message


@given(st.sets(st.text(max_size=20) | st.sampled_from([INDEX, *NUMBERED, *OTHERS, "consolidated.safetensors"])))
def test_choose_takes_only_names_that_are_there(names):
    try:
        layout = choose(names, URI)
    except CatalogError as error:
        assert "\n" not in error.message  # noqa: PT017
        return
    assert bool(layout.index) != bool(layout.files)
    assert names.issuperset({layout.index, *layout.files} - {None})


WEIGHT_MAP = {"a": NUMBERED[1], "b": NUMBERED[0], "c": NUMBERED[1]}


def test_weight_files_are_sorted_and_there():
    assert weight_files(WEIGHT_MAP, [*NUMBERED, INDEX], index=INDEX, uri=URI) == NUMBERED[:2]
    assert weight_files(WEIGHT_MAP, None, index=INDEX, uri=URI) == NUMBERED[:2]


def test_a_file_that_the_index_names_and_is_not_there():
    with pytest.raises(CatalogError) as error:
        weight_files(WEIGHT_MAP, ["other", INDEX], index=INDEX, uri=URI)
    for part in [URI, f"{INDEX} names 2 files", "2 are not there", *NUMBERED[:2], "'b'", f"There are: {INDEX}, other."]:
        assert part in error.value.message


def headers(*keys_of_files):
    files = [File(f"{i}.safetensors", 100, "pin", 50) for i in range(len(keys_of_files))]
    entry = {"dtype": torch.uint8, "shape": (1,)}
    return files, [
        Contents({key: Entry(**entry, file=number, start=50 + i, stop=51 + i) for i, key in enumerate(keys)})
        for number, keys in enumerate(keys_of_files)
    ]


def test_the_catalog_is_in_order_of_files_and_offsets():
    files, found = headers("zb", "", "ca")
    weight_map = {"a": "2.safetensors", "c": "2.safetensors", "b": "0.safetensors", "z": "0.safetensors"}
    for catalog in (assemble(files, found), assemble(files, found, weight_map=weight_map, index=INDEX)):
        assert list(catalog.entries) == ["z", "b", "c", "a"]
        assert catalog.files == tuple(files)
        assert catalog.entries["a"] == Entry(torch.uint8, (1,), 2, 51, 52)
        assert catalog.checkpoint_bytes == 300


@pytest.mark.parametrize(
    ("keys_of_files", "weight_map", "parts"),
    [
        (("ab", "b"), None, ["key 'b' is in two files, 0.safetensors and 1.safetensors"]),
        (("ab", "b"), {"a": "0.safetensors", "b": "1.safetensors"}, ["key 'b' is in two files"]),
        (
            ("a",),
            {"a": "0.safetensors", "b": "0.safetensors"},
            [INDEX, "'b' is in 0.safetensors, but no file holds it"],
        ),
        (("a", "b"), {"a": "1.safetensors", "b": "0.safetensors"}, ["'a' is in 1.safetensors, but it is in 0."]),
        (("ab", "c"), {"a": "0.safetensors"}, ["0.safetensors holds key 'b'", INDEX, "2 such keys"]),
    ],
)
def test_files_and_index_that_differ_are_refused(keys_of_files, weight_map, parts):
    files, found = headers(*keys_of_files)
    with pytest.raises(CatalogError) as error:
        assemble(files, found, weight_map=weight_map, index=INDEX)
    for part in parts:
        assert part in error.value.message


def test_a_key_that_is_a_view_is_in_a_file_as_well():
    files, found = headers("a", "b")
    found[1] = found[1]._replace(views={"c": View("b", (1,), 0, (1,))})
    weight_map = {"a": "0.safetensors", "b": "1.safetensors", "c": "1.safetensors"}
    assert list(assemble(files, found, weight_map=weight_map, index=INDEX).keys) == ["a", "b", "c"]
    with pytest.raises(CatalogError, match="holds key 'c'"):
        assemble(files, found, weight_map={"a": "0.safetensors", "b": "1.safetensors"}, index=INDEX)
    found[0] = found[0]._replace(views={"b": View("a", (1,), 0, (1,))})
    with pytest.raises(CatalogError, match="key 'b' is in two files"):
        assemble(files, found)
