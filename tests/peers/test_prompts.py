"""ImageNet's names and templates as open_clip itself has them, filled in by its own functions."""

import pytest

from clip_jax.evals import prompts


@pytest.mark.parametrize("name, count", [("imagenet_80", 80), ("imagenet_7", 7)])
def test_templates_against_open_clip(name, count):
    import open_clip

    theirs = getattr(open_clip, prompts.OPEN_CLIP_TEMPLATES[name])
    ours = prompts.templates(f"open_clip:{name}")
    assert len(ours) == count
    assert [template.replace("{}", "{x}") for template in ours] == [template("{x}") for template in theirs]


def test_class_names_against_open_clip():
    import open_clip

    ours = prompts.class_names("open_clip:imagenet")
    assert ours == tuple((name,) for name in open_clip.IMAGENET_CLASSNAMES)
    assert (len(ours), len(set(ours))) == (1000, 998)
