"""Emoji as evaluation datasets: candidates, prompts and targets of each split; the vendor that is not trained on."""

import io
import subprocess

import numpy as np
import pytest
from PIL import Image

from clip_jax.config import DataConfig
from clip_jax.data.sources import emoji as source
from clip_jax.evals.datasets import emoji
from clip_jax.typing import Unavailable
from tests.test_data_emoji import CATEGORIES, CONCEPTS, MEMBERS, SUBCATEGORIES


@pytest.fixture(scope="session")
def config(tmp_path_factory):
    # The folder of tests/contracts/test_sources.py: one rendering per session.
    return DataConfig(source="emoji", cache_dir=str(tmp_path_factory.getbasetemp() / "emoji-cache"))


@pytest.fixture(scope="session")
def unseen(config):
    return emoji.load(config, "unseen_concepts")


def test_unseen_concepts_are_not_trained_on(config, unseen):
    training = source.EmojiSource(config.cache_dir, ["name"])
    names = {training.read(i).captions["name"][0] for i in range(len(training))}
    assert not names & {texts[0] for texts in unseen.texts}


def test_images_are_rgba_of_72_pixels_and_not_blank(unseen):
    for png in unseen.images:
        image = Image.open(io.BytesIO(png))
        assert (image.format, image.mode, image.size) == ("PNG", "RGBA", (72, 72))
        assert np.asarray(image)[..., 3].max() > 0


def test_unseen_concepts_are_candidates_by_name(unseen):
    assert unseen.name == "emoji_unseen_concepts"
    assert len(unseen.texts) >= MEMBERS["test"] and len(unseen.images) == 2 * len(unseen.texts)
    assert len(set(unseen.texts)) == len(unseen.texts)
    for target, name in zip(unseen.targets, unseen.image_names, strict=True):
        assert f" {unseen.texts[target][0]} (" in name
    assert {name.rpartition("(")[2] for name in unseen.image_names} == {"twemoji)", "openmoji)"}


@pytest.mark.parametrize("language", source.LANGUAGES)
def test_each_language_has_its_candidates_and_the_same_images(config, unseen, language):
    found = emoji.load(config, f"unseen_concepts_{language}")
    assert found.images == unseen.images
    assert len(set(found.texts)) == len(found.texts) >= 0.95 * len(unseen.texts)
    concepts = {c.texts["name"][0]: c for c in source.concepts()}
    for number in range(0, len(found.images), 37):
        english = unseen.texts[unseen.targets[number]][0]
        assert found.texts[found.targets[number]] == concepts[english].texts[f"name_{language}"]


@pytest.mark.parametrize("split, classes", [("categories", CATEGORIES), ("subcategories", SUBCATEGORIES)])
def test_classes_have_prompts_and_the_unseen_images(config, unseen, split, classes):
    found = emoji.load(config, split)
    assert found.images == unseen.images
    assert len(found.texts) >= classes and all(found.texts)
    (zebra,) = (t for t, name in zip(found.targets, found.image_names, strict=True) if "zebra (twemoji)" in name)
    assert found.texts[zebra][0] == {"categories": "animal", "subcategories": "animal mammal"}[split]


def test_every_category_has_a_prompt():
    assert set(emoji.CATEGORY_PROMPTS) == {c.category for c in source.concepts()}


@pytest.mark.parametrize(
    "slug, prompts",
    [("face-smiling", ("face smiling", "smiling face")), ("other-object", ("object",)), ("sound", ("sound",))],
)
def test_subcategory_prompts_have_both_word_orders(slug, prompts):
    assert emoji._subcategory_prompts(slug) == prompts


def test_search_has_all_images_of_the_trained_vendors(config):
    assert len(emoji.load(config, "search").images) >= 2 * CONCEPTS


def test_unknown_split_raises_with_the_known_ones(config):
    with pytest.raises(ValueError, match="no split 'tset'; it has unseen_concepts, .*unseen_concepts_de"):
        emoji.load(config, "tset")


# ----------------------------------------------------------------------------- the vendor that is not trained on


def test_unseen_vendor_without_npm_is_unavailable_with_the_command_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setattr(source.shutil, "which", lambda name: None)
    with pytest.raises(Unavailable, match="npm is not installed.*apt install npm"):
        emoji.load(DataConfig(cache_dir=str(tmp_path)), "unseen_vendor")


def test_unseen_vendor_without_network_is_unavailable(tmp_path, monkeypatch):
    def run(command, **options):
        raise subprocess.TimeoutExpired(command, options["timeout"])

    monkeypatch.setattr(source.shutil, "which", lambda name: "/usr/bin/npm")
    monkeypatch.setattr(source.subprocess, "run", run)
    with pytest.raises(Unavailable, match="timed out after 120 seconds.*registry"):
        emoji.load(DataConfig(cache_dir=str(tmp_path)), "unseen_both")


def test_later_run_with_npm_adds_the_unseen_vendor(tmp_path, monkeypatch):
    """The first run has no npm; then the package has two icons, one of them under an alias."""
    config = DataConfig(cache_dir=str(tmp_path))
    monkeypatch.setattr(source.shutil, "which", lambda name: None)
    with pytest.raises(Unavailable):
        emoji.load(config, "unseen_vendor")
    trained = [c for c in source.concepts() if source.split_of(c.family) == "train"][:2]
    square = {"body": '<rect width="9" height="9" x="3" y="3" fill="red"/>', "width": 16, "height": 16}
    icons = {"icons": {"one": square, "two": square}, "aliases": {"second": {"parent": "two"}}}
    codes = {trained[0].code: "one", f"{trained[1].code}-fe0f": "second"}
    monkeypatch.setattr(source, "_noto_package", lambda: (icons, codes))
    found = emoji.load(config, "unseen_vendor")
    assert sorted(texts[0] for texts in found.texts) == sorted(c.texts["name"][0] for c in trained)
    assert all(name.endswith("(noto)") for name in found.image_names)
