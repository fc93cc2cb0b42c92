import importlib
import sys

import pytest
from stand_ins import ROOT


@pytest.fixture(scope="session")
def scripts():
    """Imports a script or a module of the laptop recipes from where it finds its modules when it is run."""
    folder = str(ROOT / "recipes" / "laptop")
    sys.path.insert(0, folder)
    yield importlib.import_module
    sys.path.remove(folder)
