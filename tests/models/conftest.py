from __future__ import annotations

import pytest

from keeplora.models import load_model
from tests.models import tiny, tiny_generative


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    return {family: tiny.make_tiny(family, root / family) for family in tiny.FAMILIES}


@pytest.fixture(params=tiny.FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def encoder(family, folders):
    return load_model(folders[family])


@pytest.fixture(scope="session")
def generative_folder(tmp_path_factory):
    """Folder of a tiny generative model by kind, made once."""
    root, made = tmp_path_factory.mktemp("generative"), {}
    return lambda kind: made.get(kind) or made.setdefault(kind, tiny_generative.tiny(kind, root / kind))


@pytest.fixture(scope="session")
def generative(generative_folder):
    """The opened tiny model by kind, shared by all tests, which leave it as it was."""
    made = {}
    return lambda kind: made.get(kind) or made.setdefault(kind, load_model(generative_folder(kind)))


@pytest.fixture
def fresh(generative_folder):
    """A tiny generative model of the test's own, to be changed."""
    return lambda kind, **options: load_model(generative_folder(kind), **options)


@pytest.fixture(params=tiny_generative.AVAILABLE)
def kind(request):
    return request.param
