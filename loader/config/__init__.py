"""Typed config: one YAML file and dotted overrides."""

from loader.config.mesh import resolve_mesh
from loader.config.model import Config, Model, Output, Placement, Read, Source
from loader.config.parse import parse
from loader.config.section import Proof
from loader.config.values import parse_bytes, parse_seconds

__all__ = [
    "Config",
    "Model",
    "Output",
    "Placement",
    "Proof",
    "Read",
    "Source",
    "parse",
    "parse_bytes",
    "parse_seconds",
    "resolve_mesh",
]
