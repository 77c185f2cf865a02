"""The generated pages of the documentation site."""

import importlib.util
import re

import pytest

from clip_jax.__main__ import COMMANDS
from clip_jax.config import schema_keys
from clip_jax.losses import LOSSES
from clip_jax.models.towers import TOWERS
from tests.commands import ROOT


@pytest.fixture(scope="module")
def reference():
    spec = importlib.util.spec_from_file_location("reference", ROOT / "docs/reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_config_key_has_type_default_and_meaning(reference):
    page = reference.config_page()
    found = {
        m[1]: m.groups() for m in re.finditer(r"^\| `(\S+)` \| (.+?) \| (.*?) \| (.*?) \| (.*) \|$", page, re.MULTILINE)
    }
    selectors = {"loss.name", "model.image.kind", "model.text.kind"}  # headings
    given = {key for key in schema_keys() if not key.startswith("data.captions.")} - selectors  # by the user's names
    assert given <= {*found} and len(found) > 120
    assert not [key for key, (_, _, default, _, meaning) in found.items() if not meaning or not default]
    assert found["optim.learning_rate"][1:] == (
        "`float`",
        "`0.0005`",
        "0.0 to 10.0",
        "peak; lion: 3 to 10 times smaller, with a weight decay 3 to 10 times larger",
    )
    assert found["train.batch_size"][2:4] == ("`32768`", "from 1")
    assert all(f"### name={name!r}" in page for name in LOSSES) and all(f"### kind={name!r}" in page for name in TOWERS)


def test_every_public_module_of_the_api_exists(reference):
    for modules in reference.API.values():
        assert all(importlib.util.find_spec(name) for name in modules)


def test_links_lead_to_generated_pages(reference, tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "commands_page", lambda: "# Commands\n")
    reference.write_pages(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.md", "commands.md", "api.md", "launch.md"}
    for target in re.findall(r"\]\(\.\./(\w+\.md)", (tmp_path / "launch.md").read_text()):
        assert (ROOT / "docs" / target).exists()


def test_every_page_is_in_the_table_of_contents():
    listed = set(re.findall(r"^(\w+(?:/\w+)?)$", (ROOT / "docs/index.md").read_text(), re.MULTILINE))
    assert {path.stem for path in (ROOT / "docs").glob("*.md")} - {"index"} <= listed
    assert {f"generated/{name}" for name in ("config", "commands", "api", "launch")} <= listed
    assert len(COMMANDS) >= 9
