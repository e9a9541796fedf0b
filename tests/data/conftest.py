from __future__ import annotations

from pathlib import Path

import pytest
from picture_files import Tree


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


@pytest.fixture
def pets(tree: Tree) -> Tree:
    """pets/train and pets/test with the classes cat and dog: 4 and 2 pictures each."""
    tree.classes("pets/train", "cat dog", 4)
    tree.classes("pets/test", "cat dog", 2)
    return tree
