"""The keys of the YAML, their types, defaults and meaning. The reference in the README is made from here."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PlainValidator,
    StrictBool,
    StrictInt,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
)

from loader.config.mesh import FILL, check_mesh
from loader.config.section import Proof, Section
from loader.config.values import parse_bytes, parse_dtype, parse_function, parse_seconds, show
from loader.errors import ConfigError
from loader.uri import at_revision, public_uri

# The names torchtitan gives to mesh dims. Of these, a dim of size 1 may be left out of `mesh` and still be spoken of.
MESH_DIMS = frozenset({"pp", "dp_replicate", "dp_shard", "cp", "tp", "ep", "etp"})

Text = Annotated[str, Field(min_length=1)]
Function = Annotated[str, AfterValidator(parse_function)]
Bytes = Annotated[int, BeforeValidator(parse_bytes), WithJsonSchema({"type": ["string", "integer"]})]
Seconds = Annotated[float, BeforeValidator(parse_seconds), WithJsonSchema({"type": ["string", "number"]})]
Dtype = Annotated[torch.dtype, PlainValidator(parse_dtype), WithJsonSchema({"type": "string"})]


def _builder(value: str) -> str:
    if value == "transformers" or ":" in value:
        return value if value == "transformers" else parse_function(value)
    raise ConfigError(f'should be transformers, "package.module:function" or null, found {show(value)}')


def _at_least(least: str) -> AfterValidator:
    def check(size: int) -> int:
        if size < parse_bytes(least):
            raise ConfigError(f"should be at least {least}, found {size} bytes")
        return size

    return AfterValidator(check)


def _directory(path: str) -> str:
    if "://" in path:
        raise ConfigError(
            f"should be a directory of the node, such as /dev/shm/init, found {public_uri(path)}: shards are mapped "
            "into memory where they are; for a bucket, set output.checkpoint"
        )
    return path


class Source(Section):
    """Where the checkpoint is and which of its keys count."""

    uri: Text = Field(description="a directory in HF layout, or one file: s3, gs, hf, https, file or any fsspec scheme")
    storage_options: dict[str, Any] = Field(
        default={},
        repr=False,  # holds credentials
        exclude=True,
        description="given to fsspec, for the source alone; credentials come from the usual chain where none are here",
    )
    ignore: tuple[Text, ...] = Field(
        default=(), description="globs over checkpoint keys, before strip_prefix; one that matches nothing is fine"
    )
    strip_prefix: str = Field(default="", description="left off the front of every checkpoint key")
    revision: Text | None = Field(default=None, description="hf:// alone: a branch, tag or commit; null is main")

    @field_validator("revision")
    @classmethod
    def _of_the_hub(cls, revision: str | None, info: ValidationInfo) -> str | None:
        uri = info.data.get("uri", "hf://")  # absent when it was itself refused
        if revision and not uri.startswith("hf://"):
            raise ConfigError(f"is for hf:// alone, but source.uri is {public_uri(uri)}")
        if revision and "@" in uri:
            raise ConfigError(f"source.uri names a revision already: {uri}")
        return revision

    @property
    def pinned_uri(self) -> str:
        """`uri`, with `revision` in it."""
        return at_revision(self.uri, self.revision) if self.revision else self.uri


class DtypeRule(Section):
    """The dtype of some FQNs."""

    match: Text = Field(description="a glob over FQNs")
    dtype: Dtype = Field(description="of the floating parameters and persistent buffers that match")


class Vocabulary(Section):
    """What may be done where the model has another number of tokens than the checkpoint."""

    pad: StrictBool = Field(default=False, description="more rows in the model: those past the checkpoint's are zeros")
    cut: StrictBool = Field(default=False, description="fewer rows in the model: the checkpoint's last are left out")


class Model(Section):
    """What is to be filled."""

    builder: Annotated[str, AfterValidator(_builder)] | None = Field(
        default="transformers",
        description='transformers, or "package.module:function"; null is a state dict without a model',
    )
    dtype: Dtype | None = Field(default=None, description="of the parameters; null keeps the checkpoint's")
    dtype_rules: tuple[DtypeRule, ...] = Field(
        default=(), description="over model.dtype, first match wins: routers in float32, say"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="where the shards live; auto: cuda if any"
    )
    vocabulary: Vocabulary = Field(
        default=Vocabulary(), description="of embedding and lm_head, whether rows may be added or left out"
    )
    initialise: tuple[Text, ...] = Field(
        default=(), description="globs over FQNs: those without a source get first values from the model's own code"
    )
    dequantize: StrictBool = Field(
        default=True, description="whether quantised weights are; false keeps them and their scales as they are stored"
    )

    trust_remote_code: StrictBool = Field(
        default=False,
        description="whether code in the checkpoint may run, for a model that transformers does not have",
    )

    @field_validator("trust_remote_code")
    @classmethod
    def _runs_it(cls, trusted: bool, info: ValidationInfo) -> bool:
        builder = info.data.get("builder", "transformers")
        if trusted and builder != "transformers":
            raise ConfigError(
                f"only the transformers builder runs a checkpoint's code, found builder {builder}: leave it out"
            )
        return trusted

    @field_validator("initialise")
    @classmethod
    def _has_code(cls, globs: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        if globs and info.data.get("builder", "") is None:
            raise ConfigError("only a model has code that gives first values, found builder null: set model.builder")
        return globs


class Placement(Section):
    """How the tensors of some FQNs are sharded where there is no model."""

    match: Text = Field(description="a glob over FQNs")
    shard: dict[str, Annotated[StrictInt, Field(ge=0)]] = Field(
        description="mesh dim to tensor dim; {} replicates; several mesh dims on one tensor dim nest in mesh order"
    )


class Read(Section):
    """How the bytes are fetched: limits are per rank."""

    share: Literal["world", "node", "none"] = Field(
        default="world", description="how far a byte that was read is shared before it is read again"
    )
    memory_budget: Annotated[Bytes, _at_least("8MiB")] = Field(
        default=parse_bytes("512MiB"), description="host memory of a rank, above its own shards"
    )
    range_size: Annotated[Bytes, _at_least("64KiB")] = Field(
        default=parse_bytes("8MiB"), description="bytes asked for in one GET"
    )
    concurrency: Annotated[StrictInt, Field(ge=1)] = Field(
        default=16,
        description="ranges in flight per rank at first, then as many as pay, to 64; fewer where the budget is small",
    )
    backend: Literal["auto", "direct", "fsspec"] = Field(
        default="auto",
        description="who reads ranges: direct, over HTTP straight into the buffer; fsspec, the scheme's own client; "
        "auto, direct where the scheme and its options allow it",
    )
    retries: Annotated[StrictInt, Field(ge=0)] = Field(default=8, description="of one range, after its first try")
    timeout: Seconds = Field(default=parse_seconds("30s"), description="without a byte, until a range is tried again")
    deadline: Seconds = Field(default=parse_seconds("30min"), description="for the whole load")

    @field_validator("range_size")
    @classmethod
    def _fits_the_budget(cls, size: int, info: ValidationInfo) -> int:
        budget = info.data.get("memory_budget", size)  # absent when it was itself refused
        if size > budget:
            raise ConfigError(f"should be at most the memory_budget of {budget} bytes, found {size} bytes")
        return size


class Output(Section):
    """What becomes of the loaded tensors."""

    entrypoint: Function | None = Field(
        default=None,
        description='"package.module:function", called in every rank with the loaded model, mesh and report',
    )
    checkpoint: Text | None = Field(
        default=None, description="a torch.distributed.checkpoint directory, any fsspec URL"
    )
    local: Annotated[Text, AfterValidator(_directory)] | None = Field(
        default=None, description="a directory of each node, for its ranks' shards: loader.attach maps them"
    )
    if_exists: Literal["error", "use", "overwrite"] = Field(
        default="error", description="what a complete checkpoint at the output means"
    )


class Config(Proof):
    """One run of the init step."""

    source: Source = Field(description="where the checkpoint is")
    model: Model = Field(default=Model(), description="what is to be filled")
    mesh: Annotated[dict[str, StrictInt], AfterValidator(check_mesh)] = Field(
        default={"dp_shard": FILL},
        description="mesh dims and their sizes, outermost first, named as torchtitan's; one -1 fills",
    )
    placements: tuple[Placement, ...] = Field(
        default=(), description="with builder null: how each FQN is sharded, first match wins; no match is replicated"
    )
    convert: str | None = Field(
        default=None, description="the conversion from checkpoint to model; null keeps HF names and layouts"
    )
    read: Read = Field(default=Read(), description="how the bytes are fetched")
    output: Output = Field(default=Output(), description="what becomes of the loaded tensors")
    report: Text | None = Field(default="report.json", description="where the report is written; null writes none")
    trace: Text | None = Field(
        default=None, description="where a timeline of every rank is written, for ui.perfetto.dev; null writes none"
    )

    @field_validator("placements")
    @classmethod
    def _placements_apply(cls, placements: tuple[Placement, ...], info: ValidationInfo) -> tuple[Placement, ...]:
        model = info.data.get("model")
        if placements and model is not None and model.builder is not None:
            raise ConfigError(
                f"only a state dict without a model takes placements, found builder {model.builder}: "
                "set model.builder to null, or leave placements out"
            )
        known = MESH_DIMS.union(info.data.get("mesh", ()))
        for rule in placements:
            if unknown := sorted(rule.shard.keys() - known):
                raise ConfigError(
                    f"{show(rule.match)} shards over {', '.join(unknown)}, which mesh does not have: name it in mesh"
                )
        return placements
