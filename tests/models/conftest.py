from __future__ import annotations

import pytest

from keeplora.models import load_model
from tests.models import tiny


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
