"""The keys of the YAML, their types, defaults and meaning. The reference in the README is made from here."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, StrictBool, StrictInt, ValidationInfo, field_validator

from loader.config.kinds import Builder, Bytes, Conversion, Directory, Dtype, Function, Seconds, Text, at_least
from loader.config.mesh import FILL, check_mesh
from loader.config.section import Proof, Section
from loader.config.values import parse_bytes, parse_seconds, show
from loader.errors import ConfigError
from loader.ground.uri import at_revision, public_uri

# The names torchtitan gives to mesh dims. Of these, a dim of size 1 may be left out of `mesh` and still be spoken of.
MESH_DIMS = frozenset({"pp", "dp_replicate", "dp_shard", "cp", "tp", "ep", "etp"})


class Source(Section):
    """Where the checkpoint is and which of its keys count."""

    uri: Text = Field(
        description="a directory in HF layout, or one file (.safetensors, .bin, .pt, .pth): s3, gs, hf, https, file or "
        "any fsspec scheme"
    )
    storage_options: dict[str, Any] = Field(
        default={},
        repr=False,  # holds credentials
        exclude=True,
        description="given to fsspec, for the source alone; credentials come from the usual chain where none are here",
    )
    ignore: tuple[Text, ...] = Field(
        default=(),
        description="globs over checkpoint keys that are not wanted, before strip_prefix; one that matches nothing is "
        "fine",
    )
    strip_prefix: str = Field(default="", description="taken off keys that begin with it")
    revision: Text | None = Field(
        default=None,
        description="hf:// alone: a branch, tag or commit, as hf://org/name@revision; null is main. Every range is of "
        "the one commit that it names as the load begins",
    )

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

    builder: Builder | None = Field(
        default="transformers",
        description="who makes the model: transformers takes the class that config.json names; a function of yours is "
        "called with (hf_config, mesh); null is a state dict without a model",
    )
    dtype: Dtype | None = Field(default=None, description="of the parameters; null keeps the checkpoint's")
    dtype_rules: tuple[DtypeRule, ...] = Field(
        default=(), description="other dtypes for some FQNs, before model.dtype; the first match wins"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="where the shards live; auto: cuda if there is one"
    )
    vocabulary: Vocabulary = Field(
        default=Vocabulary(),
        description="whether embedding and head may have another number of rows than the checkpoint",
    )
    initialise: tuple[Text, ...] = Field(
        default=(),
        description="globs over FQNs that the checkpoint may lack (a value head, LoRA): they get their first values "
        "from the model's own code",
    )
    dequantize: StrictBool = Field(
        default=True, description="whether quantised weights are; false keeps them and their scales as they are stored"
    )
    trust_remote_code: StrictBool = Field(
        default=False,
        description="whether code in the checkpoint may run, where config.json names a class (auto_map) that "
        "transformers does not have",
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
        default="world",
        description="how far a byte that was read is shared before it is read again: over the job, within a node, not "
        "at all",
    )
    memory_budget: Annotated[Bytes, at_least("8MiB")] = Field(
        default=parse_bytes("512MiB"),
        description="host memory of a rank, above its own shards. What the storage client (S3's: 24 MiB) and the "
        "catalog (1.6 kB a key) take is part of it; a budget that they fill is an error",
    )
    range_size: Annotated[Bytes, at_least("64KiB")] = Field(
        default=parse_bytes("8MiB"), description="what one GET asks for, about; less where the budget is small"
    )
    concurrency: Annotated[StrictInt, Field(ge=1)] = Field(
        default=16,
        description="ranges in flight of a rank at first. It is doubled, up to 64, while that brings a fifth more, and "
        "halved where the bucket asks for fewer requests; fewer where the budget is small",
    )
    backend: Literal["auto", "direct", "fsspec"] = Field(
        default="auto",
        description="who reads ranges: direct, over HTTP straight into the buffer (s3, gs, https, hf); fsspec, the "
        "scheme's own client (s3fs, gcsfs, …); auto, direct where the scheme and its options allow it",
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
        description="called in every rank with (model, mesh, report) when all is loaded; gives the exit code",
    )
    checkpoint: Text | None = Field(
        default=None, description="a torch.distributed.checkpoint directory, any fsspec URL"
    )
    local: Directory | None = Field(
        default=None,
        description="a directory of each node, such as /dev/shm/init, for its ranks' shards: loader.attach maps them",
    )
    if_exists: Literal["error", "use", "overwrite"] = Field(
        default="error",
        description="what a complete checkpoint, or complete shards, there mean: an error, nothing to do, or written "
        "anew",
    )


class Config(Proof):
    """One run of the init step."""

    source: Source = Field(description="where the checkpoint is")
    model: Model = Field(default=Model(), description="what is to be filled")
    mesh: Annotated[dict[str, StrictInt], AfterValidator(check_mesh)] = Field(
        default={"dp_shard": FILL},
        description="mesh dims and their sizes, outermost first, named as torchtitan's; one -1 fills. The transformers "
        "builder takes dp_replicate, dp_shard and tp",
    )
    placements: tuple[Placement, ...] = Field(
        default=(),
        description="with builder null: how each FQN is sharded; the first match wins, no match is replicated",
    )
    convert: Conversion | None = Field(
        default=None,
        description="from the checkpoint's keys to the model's FQNs; null keeps HF names and layouts, and with the "
        "transformers builder means transformers",
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
