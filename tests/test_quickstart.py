"""launch/test.sh runs the quickstart itself; this tells sooner when its config is no longer right."""

import pytest

from loader.config.mesh import resolve_mesh
from loader.config.parse import parse
from tests.processes import ROOT


@pytest.mark.parametrize(("overrides", "mesh"), [((), {"dp_shard": 4}), (("mesh.tp=2",), {"dp_shard": 2, "tp": 2})])
def test_the_config_fits_four_ranks(overrides, mesh):
    config = parse(str(ROOT / "launch/quickstart.yaml"), ["source.uri=s3://loader/llama", *overrides])
    assert {name: size for name, size in resolve_mesh(config.mesh, 4).items() if size > 1} == mesh
    assert config.source.uri == "s3://loader/llama"
