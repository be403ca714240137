import warnings

import pytest
import torch

from loader.config import parse
from loader.errors import ConfigError

SOURCE = "source: {uri: s3://b/m}\n"
SECRET = "hunter2"


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Parse a text as the file cfg.yaml."""
    monkeypatch.chdir(tmp_path)

    def load(text, *overrides):
        (tmp_path / "cfg.yaml").write_text(text)
        return parse("cfg.yaml", overrides)

    return load


@pytest.fixture
def refusal(load):
    """The message with which a text is refused."""

    def refusal(text, *overrides):
        with pytest.raises(ConfigError) as caught:
            load(text, *overrides)
        assert caught.value.exit_code == 2
        return caught.value.message

    return refusal


def test_a_file_with_a_source_alone_has_the_defaults(load):
    config = load(SOURCE)
    assert config.source.uri == "s3://b/m"
    assert (config.model.builder, config.model.dtype, config.model.device) == ("transformers", None, "auto")
    assert config.mesh == {"dp_shard": -1}
    assert (config.placements, config.convert, config.report) == ((), None, "report.json")
    assert (config.read.memory_budget, config.read.timeout) == (512 * 2**20, 30.0)
    assert (config.output.entrypoint, config.output.checkpoint, config.output.if_exists) == (None, None, "error")


def test_every_key(load):
    config = load(
        """
        source:
          uri: gs://b/m
          storage_options: {token: anon, client_kwargs: {n: 1}}
          ignore: ["a*", b]
          strip_prefix: model.
        model: {builder: null, dtype: bfloat16, device: cpu}
        mesh: {tp: 2, dp_shard: -1}
        placements:
        - {match: "*.weight", shard: {dp_shard: 0, tp: 1}}
        - {match: "*", shard: {}}
        convert: package.module:function
        read: {share: none, memory_budget: 64MiB, range_size: 4MB, concurrency: 2, backend: fsspec, retries: 0,
               timeout: 500ms, deadline: 1.5h}
        output: {entrypoint: "train:main", checkpoint: s3://b/out, if_exists: overwrite}
        report: null
        """
    )
    assert config.source.storage_options == {"token": "anon", "client_kwargs": {"n": 1}}
    assert config.source.ignore == ("a*", "b")
    assert config.source.strip_prefix == "model."
    assert config.model.builder is None
    assert config.model.dtype is torch.bfloat16
    assert list(config.mesh.items()) == [("tp", 2), ("dp_shard", -1)]
    assert [(rule.match, rule.shard) for rule in config.placements] == [
        ("*.weight", {"dp_shard": 0, "tp": 1}),
        ("*", {}),
    ]
    assert (config.read.share, config.read.range_size, config.read.deadline) == ("none", 4_000_000, 5400.0)
    assert config.output.if_exists == "overwrite"
    assert config.report is None


def test_overrides_follow_the_file_in_order(load):
    config = load(
        SOURCE + "mesh: {dp_shard: 4}\nreport: r.json\n",
        "read.share=node",
        'source.ignore=["a*"]',
        "mesh.tp=2",
        "read.share=none",
        "report=null",
        "source.storage_options.client_kwargs.endpoint_url=http://localhost:1",
        "output.checkpoint=s3://b/out",
    )
    assert config.read.share == "none"
    assert config.source.ignore == ("a*",)
    assert list(config.mesh.items()) == [("dp_shard", 4), ("tp", 2)]
    assert config.report is None
    assert config.source.storage_options == {"client_kwargs": {"endpoint_url": "http://localhost:1"}}
    assert config.output.checkpoint == "s3://b/out"


def test_overrides_can_be_all_there_is_and_replace_whole_sections(load):
    config = load("# nothing\n", "source.uri=x", "read={retries: 1}", "mesh={dp_replicate: 2}")
    assert (config.source.uri, config.read.retries, config.mesh) == ("x", 1, {"dp_replicate": 2})


def test_an_override_adds_to_the_default_mesh(load):
    assert load(SOURCE, "mesh.tp=2").mesh == {"dp_shard": -1, "tp": 2}


def test_an_override_leaves_what_an_alias_shares(load):
    config = load(
        SOURCE + "model: {builder: null}\nplacements: [{match: a, shard: &m {tp: 1}}]\nmesh: *m\n", "mesh.tp=4"
    )
    assert (config.mesh, config.placements[0].shard) == ({"tp": 4}, {"tp": 1})


def test_anchors_and_merges_are_plain_yaml(load, refusal):
    text = "source: &s {uri: x, strip_prefix: a}\n"
    assert load(text + "read: {<<: {retries: 3}, share: node}\n").read.retries == 3
    assert refusal(text + "read:\n  <<: {shrae: node}\n").startswith("cfg.yaml:2: read.shrae: unknown key")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("read:\n  memroy_budget: 1GiB", "cfg.yaml:3: read.memroy_budget: unknown key; did you mean 'memory_budget'?"),
        ("memory_budget: 1GiB", "cfg.yaml:2: memory_budget: unknown key; did you mean 'read.memory_budget'?"),
        (
            "output: {qqq: 1}",
            "cfg.yaml:2: output.qqq: unknown key; known here: entrypoint, checkpoint, local, if_exists",
        ),
        ("read:\n\n  share: nodes", "cfg.yaml:4: read.share: should be 'world', 'node' or 'none', found \"nodes\""),
        ("read: {concurrency: true}", "cfg.yaml:2: read.concurrency: should be a whole number, found true"),
        ("read: {concurrency: 1.5}", "cfg.yaml:2: read.concurrency: should be a whole number, found 1.5"),
        ("read:", "cfg.yaml:2: read: should be a mapping, found null"),
        ("report: 1", "cfg.yaml:2: report: should be a string, found 1"),
        ("report: 2024-12-04", 'cfg.yaml:2: report: should be a string, found "2024-12-04 (a date)"'),
        ("report: ''", 'cfg.yaml:2: report: should not be empty, found ""'),
        ("model: {device: tpu}", "cfg.yaml:2: model.device: should be 'auto', 'cpu' or 'cuda', found \"tpu\""),
        (
            "model:\n  dtype: bf16",
            'cfg.yaml:3: model.dtype: should be a dtype of torch such as bfloat16 or float32, found "bf16"',
        ),
        (
            "model: {builder: llama}",
            'cfg.yaml:2: model.builder: should be transformers, "package.module:function" or null, found "llama"',
        ),
        (
            "output: {entrypoint: train.main}",
            'cfg.yaml:2: output.entrypoint: should be "package.module:function", found "train.main"',
        ),
        ("mesh: {a: -1, b: -1}", "cfg.yaml:2: mesh: one dim at most can be -1, found a and b: give all but one a size"),
        ("mesh: {a: 0}", "cfg.yaml:2: mesh: every size should be positive, or -1 to fill, found a: 0"),
        ("mesh: {a: '2'}", 'cfg.yaml:2: mesh.a: should be a whole number, found "2"'),
        ("mesh: {}", "cfg.yaml:2: mesh: should name at least one dim, such as {dp_shard: -1}"),
        ("mesh: {1: 2}", "cfg.yaml:2: a key should be a string: quote it"),
        (
            "read: {range_size: 64MiB, memory_budget: 32MiB}",
            "cfg.yaml:2: read.range_size: should be at most the memory_budget of 33554432 bytes, found 67108864 bytes",
        ),
        (
            "read:\n  share: none\n  share: node",
            "cfg.yaml:4: key 'share' is there twice, first at cfg.yaml:3: remove one",
        ),
    ],
)
def test_a_bad_entry_is_told_with_its_line_its_key_and_what_is_allowed(refusal, text, message):
    assert refusal(SOURCE + text) == message


def test_every_fault_is_told_at_once(refusal):
    message = refusal(SOURCE + "read:\n  share: all\n  retries: -1\nreprot: x\n")
    places = [line.split(": ")[:2] for line in message.splitlines()]
    assert places == [["cfg.yaml:3", "read.share"], ["cfg.yaml:4", "read.retries"], ["cfg.yaml:5", "reprot"]]


@pytest.mark.parametrize("text", ["", "read: {}\n", "source: {ignore: []}\n"])
def test_a_source_is_needed(refusal, text):
    assert refusal(text).startswith("cfg.yaml:1: source.uri: missing, and it has no default: add it (a directory in HF")


@pytest.mark.parametrize("text", ["- 1\n", "source\n", "3\n"])
def test_the_top_level_is_a_mapping(refusal, text):
    assert refusal(text).startswith("cfg.yaml:1: the config should be a mapping")


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        ("read: [1\nmesh: 2", 3, "while parsing a flow sequence, expected ',' or ']', but got ':'"),
        ("read: {\n\n", 4, "while parsing a flow node, expected the node content, but found '<stream end>'"),
        ("source.ignore: *.bias", 2, "found undefined alias"),
        ("report: @x", 2, "found character '@' that cannot start any token"),
        ("---\nread: {}", 2, "but found another document"),
    ],
)
def test_what_is_not_yaml_is_told_with_its_line(refusal, text, line, problem):
    message = refusal(SOURCE + text)
    assert message.startswith(f"cfg.yaml:{line}: this is not YAML: ")
    assert problem in message


def test_bytes_that_are_no_text_are_told(refusal, tmp_path):
    assert refusal(SOURCE + "a: \x01").startswith("cfg.yaml:1: this is not YAML: it holds a control character")
    (tmp_path / "cfg.bin").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"cfg\.bin: the config is not UTF-8 text"):
        parse("cfg.bin")


def test_a_file_that_cannot_be_read_is_told(tmp_path):
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(ConfigError, match=f"{path}: the config cannot be read: "):
            parse(str(path))


@pytest.mark.parametrize("tag", ["int", "float", "bool", "timestamp", "merge", "binary"])
@pytest.mark.parametrize("value", [SECRET, "''", f"'{SECRET}'", f"[{SECRET}]", f"{{a: {SECRET}}}"])
def test_a_value_under_the_tag_of_another_type_is_refused_unseen(refusal, tag, value):
    message = refusal(f"source:\n  uri: x\n  storage_options:\n    a: !!{tag} {value}\n")
    assert message.startswith("cfg.yaml:4: ")
    assert SECRET not in message


@pytest.mark.parametrize("where", ["report: {}", "source: {{storage_options: {{a: {}}}}}"])
@pytest.mark.parametrize(
    "value",
    ["!!python/object/apply:pathlib.Path.touch ['touched']", "!!python/name:os.system ''", "!custom x", "!!set {a}"],
)
def test_tags_make_nothing(refusal, tmp_path, where, value):
    message = refusal("\n" + where.format(value.replace("touched", str(tmp_path / "touched"))))
    assert message.startswith("cfg.yaml:2: a YAML tag (a word that begins with '!') is refused")
    assert not (tmp_path / "touched").exists()


def test_aliases_in_a_circle_or_by_the_million_are_refused(refusal):
    levels = "".join(f"    l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]\n" for i in range(1, 30))
    for text in ("circle: &c [*c]\n", "circle: {a: &c {b: *c}}\n", f"bomb:\n    l0: &l0 [x]\n{levels}"):
        message = refusal(SOURCE + text)
        assert message == "cfg.yaml:1: with its aliases written out this has more than 100,000 values"


def test_what_stands_too_deep_is_refused(refusal):
    message = refusal(SOURCE + "deep: " + "[" * 1000 + "]" * 1000)
    assert message.startswith("cfg.yaml:1: lists or mappings stand in each other too deeply")


def test_half_of_a_surrogate_pair_is_refused(refusal):
    message = refusal(SOURCE + 'report: "\\ud800"\n')
    assert message.startswith("cfg.yaml:2: a value is no text: half of a surrogate pair")


BUILDER_NULL = SOURCE + "model: {builder: null}\n"


def test_placements_need_a_state_dict_without_a_model(refusal):
    assert refusal(SOURCE + "placements:\n- {match: '*', shard: {dp_shard: 0}}\n") == (
        "cfg.yaml:2: placements: only a state dict without a model takes placements, found builder transformers: "
        "set model.builder to null, or leave placements out"
    )


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("{match: '*', shrd: {}}", "placements.0.shrd: unknown key; did you mean 'shard'?"),
        (
            "{match: '*', shard: {dp_shard: -1}}",
            "placements.0.shard.dp_shard: should be greater than or equal to 0, found -1",
        ),
        (
            "{match: '*', shard: {dp_shrd: 0}}",
            'placements: "*" shards over dp_shrd, which mesh does not have: name it in mesh',
        ),
    ],
)
def test_a_bad_rule_is_told(refusal, rule, message):
    assert message in refusal(BUILDER_NULL + f"placements: [{rule}]\n")


def test_a_rule_may_speak_of_a_dim_of_size_1_that_the_mesh_leaves_out(load):
    config = load(
        BUILDER_NULL + "placements: [{match: '*', shard: {dp_shard: 0, tp: 1, expert: 0}}]\n", "mesh.expert=2"
    )
    assert config.placements[0].shard == {"dp_shard": 0, "tp": 1, "expert": 0}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("read.shrae=node", "override 'read.shrae=node': read.shrae: unknown key; did you mean 'share'?"),
        ("read.share=all", "override 'read.share=all': read.share: should be 'world', 'node' or 'none', found \"all\""),
        (
            "mesh.tp=-1",
            "override 'mesh.tp=-1': mesh: one dim at most can be -1, found dp_shard and tp: give all but one",
        ),
        ("read", "override 'read': should have the form section.key=value, such as read.share=node"),
        ("read..share=node", "override 'read..share=…': should have the form section.key=value"),
        (
            "placements.0=x",
            "override 'placements.0=x': placements is not a mapping: override it whole, as placements=value",
        ),
        ("report=[", "override 'report=…': this is not YAML: while parsing a flow"),
    ],
)
def test_a_bad_override_is_told_by_itself(refusal, override, message):
    assert refusal(BUILDER_NULL + "placements: []\n", override).startswith(message)


@pytest.mark.parametrize(
    "text",
    [
        f"source: {{uri: x, storage_options: {SECRET}}}",
        f"source: {{uri: x, storage_options: [{SECRET}]}}",
        f"source: [{{storage_options: {{key: {SECRET}}}}}]",
        f"source: {{uri: {{storage_options: {SECRET}}}}}",
        f"source: {{uri: x, storage_option: {{key: {SECRET}}}}}",
        f"source: {{storage_options: {{key: {SECRET}}}}}",
        f"storage_options: {{key: {SECRET}}}",
        f"source: {{uri: x, storage_options: {{key: *{SECRET}}}}}",
        f"source: {{uri: x, storage_options: {{key: !{SECRET} a}}}}",
        f"source: {{uri: x, storage_options: {{key: !{SECRET}!a a}}}}",
        f"source: {{uri: x, storage_options: {{key: {SECRET}",
        f"source: {{uri: x, storage_options: {{key: {SECRET}, key: {SECRET}}}}}",
        f"source: {{uri: x, storage_options: {{key: !!int {SECRET}}}}}",
        f"source: {{uri: x, storage_options: {{<<: {SECRET}}}}}",
        f"source: {{uri: x, storage_options: {{<<: *{SECRET}}}}}",
        f"source:\n  storage_options: '{SECRET}\n",
        f"source:\n  storage_options:\n    key: {SECRET}: {SECRET}\n",
        f"source:\n  storage_options:\n    a: &{SECRET} 1\n    b: &{SECRET} 2\n",
    ],
)
def test_no_error_of_a_file_shows_a_storage_option(refusal, text):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert SECRET not in refusal(text)


@pytest.mark.parametrize(
    "override",
    [
        f"source.storage_options={SECRET}",
        f"source.storage_options.key=*{SECRET}",
        f"source.storage_options.key={{a: {SECRET}",
        f"source.storage_options.key={{a: {SECRET}, a: {SECRET}}}",
        f"source.storage_options..key={SECRET}",
        f"source.storage_options.key:{SECRET}",
        f"source.storage_option.key={SECRET}",
        f"sourc.storage_options.key={SECRET}",
        f"storage_options.key={SECRET}",
        f"read.storage_options.key={SECRET}",
        f"source={{storage_options: {{key: {SECRET}}}, x: 1}}",
        f"read={{storage_options: {{key: {SECRET}}}}}",
        f"source.uri.storage_options.key={SECRET}",
        SECRET,
    ],
)
def test_no_error_of_an_override_shows_a_storage_option(refusal, override):
    assert SECRET not in refusal(SOURCE, override)
    assert SECRET not in refusal(SOURCE, f"source.storage_options.secret={SECRET}", override)
