"""Modules that a library imports and its models do not need, such as data loaders, as empty mocks."""

import importlib.abc
import importlib.machinery
import sys
import types
from unittest.mock import MagicMock


class Stub(types.ModuleType):
    """A module in which every name is a mock."""

    __path__ = ()
    __version__ = "0.0"

    def __getattr__(self, name):
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        if name == "typechecked":  # a decorator of functions that models do call
            return lambda function: function
        mock = MagicMock(name=f"{self.__name__}.{name}")
        setattr(self, name, mock)
        return mock


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds mocks for some modules and all modules below them."""

    def __init__(self, names):
        self.names = set(names)

    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] in self.names:
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec):
        return Stub(spec.name)

    def exec_module(self, module):
        """Nothing runs."""


def stub(*names):
    """Makes mocks of modules that are not installed; call it before the library is imported."""
    sys.meta_path.append(Finder(names))
