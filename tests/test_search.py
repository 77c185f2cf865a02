"""The command `python -m clip_jax.search`."""

import inspect

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from PIL import Image

from clip_jax import command, inference, search
from tests import commands, tiny_models
from tests.permissions import as_user


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return tiny_models.write_edgenet(tmp_path_factory.mktemp("weights") / "tiny.msgpack")


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    (folder / "below" / "it").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.JPG", "below/c.webp", "below/it/d.jpeg", "below/it/e.png"):
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    (folder / "odd.png").mkdir()
    return folder


def run(*arguments):
    return commands.run(["-m", "clip_jax.search", *map(str, arguments)], timeout=120)


def test_images_are_found_recursively_in_sorted_order(image_folder):
    paths, names = search.images_in(image_folder)
    assert names == ["a.png", "b.JPG", "below/c.webp", "below/it/d.jpeg", "below/it/e.png"]
    assert paths == [str(image_folder / name) for name in names]


def test_unreadable_folders_are_named(tmp_path, capsys):
    """A folder without permission looked like an empty one."""
    for name in ("a.png", "below/b.png", "other/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (20, 30)).save(tmp_path / name)
    (tmp_path / "below").chmod(0)
    assert as_user(search.images_in, tmp_path)[1] == ["a.png", "other/c.png"]
    assert f"a folder is skipped: {tmp_path}/below: permission denied; give another path" in capsys.readouterr().err
    with pytest.raises(PermissionError) as error:
        as_user(search.images_in, tmp_path / "below")
    assert error.value.filename == str(tmp_path / "below")


def test_unreadable_images_are_listed_and_skipped(weights, tmp_path):
    for number, name in enumerate(("a.png", "b.png", "c.gif")):
        Image.new("RGB", (20, 30), (80 * number, 0, 0)).save(tmp_path / name)
    (tmp_path / "b.png").write_bytes((tmp_path / "b.png").read_bytes()[:60])
    (tmp_path / "._a.png").write_bytes(b"a leftover of macOS")
    done = run(f"--weights={weights}", f"--images={tmp_path}", "a dog")
    assert done.returncode == 0, done.stderr
    assert "'a dog' among 2 images" in done.stdout and "b.png" not in done.stdout
    assert f"image 1 is skipped: {tmp_path / 'b.png'}: expected an image" in done.stderr
    for name in ("a.png", "c.gif"):
        (tmp_path / name).write_bytes(b"")
    done = run(f"--weights={weights}", f"--images={tmp_path}", "a dog")
    assert done.returncode == 2 and "got 3 files of which none can be decoded" in done.stderr


def test_ranking_is_by_cosine_and_stable():
    image_nE = np.float32([[0, 1], [1, 0], [0, 1], [0.6, 0.8]])
    order, similarity = search.ranking(image_nE, np.float32([0, 1]))
    assert order.tolist() == [0, 2, 3, 1]
    np.testing.assert_allclose(similarity, [1, 1, 0.8, 0])


def test_command_prints_rank_cosine_and_name(weights, image_folder):
    done = run(f"--weights={weights}", f"--images={image_folder}", "--top=3", "a happy dog", "two cats")
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.strip().split("\n\n")
    assert first.startswith("'a happy dog' among 5 images") and second.startswith("'two cats' among 5 images")
    rows = [line.split() for line in first.splitlines()[2:]]
    assert [row[0] for row in rows] == ["1", "2", "3"] and len({row[2] for row in rows}) == 3
    cosines = [float(row[1]) for row in rows]
    assert cosines == sorted(cosines, reverse=True) and all(-1 <= cosine <= 1 for cosine in cosines)


def test_flags_of_weights_are_arguments_of_load(monkeypatch):
    """Also those of the other commands, which share their definition."""
    given = {"model": "vit_b32", "activation": "gelu", "preprocess": "siglip", "tokenizer": "t.json", "prefix": "ema"}
    given |= {"dtype": "bfloat16", "heads": ["12", "8"]}

    def load(path, **options):
        raise ValueError(f"{path} {options}")

    parameters = inspect.signature(inference.load).parameters
    monkeypatch.setattr("clip_jax.inference.load", load)
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["search"])
    with flagsaver.flagsaver(weights="w.pt", **given), pytest.raises(ValueError, match=r"w\.pt ") as error:
        search.main(["a dog"])
    assert str(error.value) == f"w.pt { {'dtype': 'bfloat16'} | given | {'heads': (12, 8)} }"
    assert {*given} <= {*parameters}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a dog"], "expected --weights=FILE and a query"),
        (["--weights=WEIGHTS"], "expected --weights=FILE and a query"),
        (["--weights=/nowhere", "a dog"], "/nowhere"),
        (["--weights=WEIGHTS", "--images=/nowhere", "a dog"], "--images: expected a folder, got /nowhere"),
        (["--weights=WEIGHTS", "--images=EMPTY", "a dog"], "--images: expected files with .bmp, .gif"),
        (["--weights=WEIGHTS", "--preprocess=clip", "a dog"], "preprocess='clip': expected one of openai"),
        (["--weights=WEIGHTS", "dog " * 99], "model.text.context_length=12"),
    ],
)
def test_wrong_input_exits_with_one_line(arguments, message, weights, tmp_path, monkeypatch, capsys):
    known = {"WEIGHTS": str(weights), "EMPTY": str(tmp_path)}
    for word, path in known.items():
        arguments = [argument.replace(word, path) for argument in arguments]
    monkeypatch.setattr(command, "_set_up_logging", lambda level: None)
    monkeypatch.setattr(command.app, "run", lambda main, flags_parser: main(flags_parser(["search", *arguments])))
    with flagsaver.flagsaver(), pytest.raises(SystemExit) as ended:
        command.run(search.main, positional=True)
    assert ended.value.code == command.REFUSED
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
