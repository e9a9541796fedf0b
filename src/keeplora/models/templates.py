"""Prompt templates: text with one place, `{}` or `{c}`, for the class name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from keeplora.errors import ConfigError, did_you_mean

_PLACE = re.compile(r"\{c?\}")


@dataclass(frozen=True)
class TemplateSet:
    """Templates that are used together (their features are averaged), and where they come from."""

    templates: tuple[str, ...]
    source: str


TEMPLATES: dict[str, TemplateSet] = {
    "plain": TemplateSet(("{}",), "the class name alone"),
    "photo": TemplateSet(
        ("a photo of a {}.",),
        "Radford et al. 2021 (CLIP), Learning Transferable Visual Models From Natural Language Supervision, 3.1.4",
    ),
    "siglip": TemplateSet(
        ("This is a photo of {}.",), "the pipeline template of the SigLIP model cards (google/siglip-base-patch16-224)"
    ),
    "imagenet-7": TemplateSet(
        (
            "itap of a {}.",
            "a bad photo of the {}.",
            "a origami {}.",
            "a photo of the large {}.",
            "a {} in a video game.",
            "art of the {}.",
            "a photo of the small {}.",
        ),
        "github.com/openai/CLIP (MIT), notebooks/Prompt_Engineering_for_ImageNet.ipynb: the subset of 7 of its 80 "
        "templates that its authors found by forward selection",
    ),
}


def resolve_templates(value: str | Sequence[str]) -> list[str]:
    """Return the templates that `value` names: the name of a set in `TEMPLATES`, one template, or a list of templates.

    Raises `ConfigError` for an unknown name, an empty list, or a template that does not have a place for the class.

    >>> resolve_templates("photo")
    ['a photo of a {}.']
    >>> resolve_templates(["a sketch of a {c}", "a toy {}"])
    ['a sketch of a {c}', 'a toy {}']
    """
    if isinstance(value, str):
        if not _PLACE.search(value):
            if value not in TEMPLATES:
                raise ConfigError(
                    f"templates: {value!r} is neither a template with a place '{{}}' for the class name nor the name "
                    f"of a template set{did_you_mean(value, TEMPLATES)}"
                )
            return list(TEMPLATES[value].templates)
        value = [value]
    if not value:
        raise ConfigError("templates: the list is empty; give at least one template, such as 'a photo of a {}.'")
    for template in value:
        if not isinstance(template, str) or not _PLACE.search(template):
            raise ConfigError(f"templates: {template!r} has no place '{{}}' for the class name")
    return list(value)


def fill(template: str, class_name: str) -> str:
    """Put `class_name`, as it is (braces and backslashes too), into every place of `template`.

    >>> fill("a photo of a {}.", "snow {leopard}")
    'a photo of a snow {leopard}.'
    """
    return _PLACE.sub(lambda _: class_name, template)
