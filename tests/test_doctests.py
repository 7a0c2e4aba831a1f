"""What the docstrings show is run."""

import doctest

import pyro
import pytest

import vma_pyro._system.markdown
import vma_pyro.infer


@pytest.mark.parametrize("module", [vma_pyro.infer, vma_pyro._system.markdown])
def test_examples_in_docstrings(module):
    with pyro.settings.context(module_local_params=False):
        found = doctest.testmod(module, optionflags=doctest.IGNORE_EXCEPTION_DETAIL | doctest.ELLIPSIS)
    assert found.attempted > 0
    assert found.failed == 0
