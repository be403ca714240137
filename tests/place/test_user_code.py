"""The user's functions: found by name, and blamed by name."""

import sys

import pytest
from torch import nn

from loader.errors import BuilderError, ConfigError
from loader.place.user_code import call_builder, resolve


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A working directory with a package of the user's; names of its own, for modules stay imported."""
    directory = tmp_path / "their_package"
    directory.mkdir()
    (directory / "__init__.py").touch()
    (directory / "models.py").write_text("def build(config, mesh):\n    return config\nsize = 3\n")
    (directory / "broken.py").write_text("import not_installed_anywhere\n")
    (directory / "raising.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in [name for name in sys.modules if name.startswith("their_package")]:
        del sys.modules[name]


@pytest.mark.usefixtures("package")
def test_a_function_in_the_working_directory():
    assert resolve("their_package.models:build")(1, None) == 1


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("their_package.models", "write package.module:function"),
        ("their_package.models:biuld", "their_package.models has no 'biuld'; did you mean build"),
        ("their_package.models:size", "is a int, not a function"),
        ("their_package.model:build", "no module 'model' in their_package; did you mean models"),
        ("their_pakage.models:build", "no module 'their_pakage' in the working directory.*did you mean their_package"),
        ("their_package.broken:build", "(?s)importing their_package.broken failed.*not_installed_anywhere"),
        ("their_package.raising:build", "(?s)importing their_package.raising failed.*ZeroDivisionError"),
    ],
)
def test_what_cannot_be_resolved(spec, message):
    with pytest.raises(ConfigError, match=message):
        resolve(spec)


def raising(config, mesh):
    raise KeyError(config["absent"])


def test_a_builder_that_raises_is_told_with_its_traceback():
    with pytest.raises(BuilderError, match=r"(?s)test_user_code:raising failed.*in raising.*KeyError: 'absent'"):
        call_builder(raising, {}, None)


def not_a_module(config, mesh):
    return dict


def test_a_builder_must_return_a_module():
    with pytest.raises(BuilderError, match="not_a_module returned a type; it must return"):
        call_builder(not_a_module, {}, None)


def test_a_builder_gets_config_and_mesh():
    assert call_builder(lambda config, mesh: nn.ModuleList([config, mesh]), nn.ReLU(), nn.GELU())
