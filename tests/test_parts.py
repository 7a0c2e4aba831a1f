"""Parts remember how they were made."""

import copy

import pytest
from pyro.nn import PyroModule
from torch import nn

from vma_pyro._system.parts import Part


class Base(Part):
    def __init__(self, width, *, depth=2):
        super().__init__()
        self.layer = nn.Linear(width, depth)


class Inherits(Base):
    pass


class Wider(Base):
    def __init__(self, width, factor=3, *others, **options):
        super().__init__(factor * width)


class Holds(Part, PyroModule):
    def __init__(self, part):
        super().__init__()
        self.part = part


def test_arguments_and_defaults_are_noted():
    assert Base(3).made_with == {"width": 3, "depth": 2}
    assert Inherits(3, depth=4).made_with == {"width": 3, "depth": 4}
    assert Wider(3, 5, 6, seven=7).made_with == {"width": 3, "factor": 5, "others": (6,), "options": {"seven": 7}}


def test_parts_of_parts_are_the_same_objects_and_stay_so_in_a_copy():
    part = Base(3)
    holder = Holds(part)
    assert holder.made_with == {"part": part}
    copied = copy.deepcopy(holder)
    assert copied.made_with["part"] is copied.part
    assert copied.part is not part
    assert len(list(holder.parameters())) == 2


def test_wrong_arguments_are_refused_as_by_any_class():
    with pytest.raises(TypeError, match="unexpected keyword argument 'height'"):
        Base(3, height=2)
