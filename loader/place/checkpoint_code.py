"""Code that comes with a checkpoint: with `model.trust_remote_code`, and by no other way, it runs.

What rank 0 has read of it is imported from memory, on every rank alike: nothing is written, and nothing is fetched that
was not there when the load began.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from importlib.abc import InspectLoader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType
from typing import Any

from transformers import PreTrainedConfig

from loader.errors import BuilderError
from loader.place.user_code import told


class _Package(MetaPathFinder, InspectLoader):
    """A package whose modules are `sources`, by name."""

    def __init__(self, name: str, sources: Mapping[str, str]) -> None:
        self.name = name
        self.sources = {f"{name}.{module}": source for module, source in sources.items()} | {name: ""}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        del path, target
        if fullname not in self.sources:
            return None
        return importlib.util.spec_from_loader(fullname, self, is_package=fullname == self.name)

    def get_source(self, fullname: str) -> str:
        return self.sources[fullname]

    def get_code(self, fullname: str) -> CodeType:
        where = f"{fullname.rpartition('.')[2]}.py of the checkpoint"  # as a traceback shows it
        return self.source_to_code(self.sources[fullname], where)


def own_classes(fields: Mapping[str, Any], sources: Mapping[str, str]) -> type[PreTrainedConfig]:
    """The config class that `config.json`'s `auto_map` names, whose `checkpoint_class` is the model's.

    `sources` are the checkpoint's modules by name. Raises BuilderError for what is not there, or cannot be imported.
    """
    auto_map: Mapping[str, Any] = fields["auto_map"]
    wanted = (fields.get("architectures") or [""])[0]
    model = next((each for each in auto_map.values() if isinstance(each, str) and each.endswith(f".{wanted}")), None)
    if model is None:
        raise BuilderError(f"config.json names {wanted or 'no class'} under `architectures`, which `auto_map` has not")
    config = _imported(auto_map["AutoConfig"], sources) if "AutoConfig" in auto_map else PreTrainedConfig
    own: type[PreTrainedConfig] = type(config.__name__, (config,), {"__module__": config.__module__})
    own.checkpoint_class = _imported(model, sources)
    return own


def refuse_kernels(config: PreTrainedConfig) -> None:
    """Raise BuilderError where the config names a repository whose code is to compute the attention: where the package
    `kernels` is there, transformers would fetch and run it as it builds the model."""
    parts = [config, *(getattr(config, name, None) for name in config.sub_configs)]
    for part in parts:
        asked = getattr(part, "_attn_implementation", None)
        if asked is not None and (not isinstance(asked, str) or "/" in asked):
            raise BuilderError(
                f"config.json asks for attention by {asked!r}: code of a repository, which is not run. Take "
                "attn_implementation out of config.json, and choose one in your program"
            )


def _imported(reference: Any, sources: Mapping[str, str]) -> Any:
    """The class that "module.Class" names."""
    module, _, name = str(reference).rpartition(".")
    if module not in sources:
        there = ", ".join(f"{each}.py" for each in sorted(sources)) or "no such files"
        raise BuilderError(f"config.json's `auto_map` names {reference}: code beside it was expected, found {there}")
    digest = hashlib.sha256(repr(sorted(sources.items())).encode()).hexdigest()
    package = f"checkpoint_{digest[:16]}"  # the same code is imported once
    if package not in sys.modules:
        sys.meta_path.append(_Package(package, sources))
    try:
        return getattr(importlib.import_module(f"{package}.{module}"), name)
    except Exception as error:
        raise BuilderError(
            f"{reference}, of the checkpoint's own code, could not be imported\n{told(error)}"
        ) from error
