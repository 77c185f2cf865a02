"""ImageNet's class names and templates against open_clip's."""

import pytest

from clip_jax.evals import prompts


@pytest.mark.parametrize("name, count", [("imagenet_80", 80), ("imagenet_7", 7)])
def test_templates_against_open_clip(name, count):
    import open_clip

    expected = getattr(open_clip, prompts.OPEN_CLIP_TEMPLATES[name])
    templates = prompts.templates(f"open_clip:{name}")
    assert len(templates) == count
    assert [template.replace("{}", "{x}") for template in templates] == [template("{x}") for template in expected]


def test_class_names_against_open_clip():
    import open_clip

    names = prompts.class_names("open_clip:imagenet")
    assert names == tuple((name,) for name in open_clip.IMAGENET_CLASSNAMES)
    assert (len(names), len(set(names))) == (1000, 998)
