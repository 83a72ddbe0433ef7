"""deltaexp: the lab for delta tuning.

The public names are imported when they are first used (PEP 562), because the command line imports this package on its way
to ``--help`` and to the errors in a config, and neither should wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "AutoDeltaConfig": "auto",
    "AutoDeltaModel": "auto",
    "DeltaModel": "model",
    "DeltaConfig": "registry",
    "register": "registry",
    "Layer": "lazy",
    "Site": "targets",
    "Visualization": "visualize",
    "HashCheck": "verification",
    "MergeReport": "merging",
    "combine": "combining",
    "route": "routing",
    "DeltaExpError": "errors",
}
__all__ = ["__version__", *_HOMES]

if TYPE_CHECKING:
    from deltaexp.auto import AutoDeltaConfig as AutoDeltaConfig
    from deltaexp.auto import AutoDeltaModel as AutoDeltaModel
    from deltaexp.combining import combine as combine
    from deltaexp.errors import DeltaExpError as DeltaExpError
    from deltaexp.lazy import Layer as Layer
    from deltaexp.merging import MergeReport as MergeReport
    from deltaexp.model import DeltaModel as DeltaModel
    from deltaexp.registry import DeltaConfig as DeltaConfig
    from deltaexp.registry import register as register
    from deltaexp.routing import route as route
    from deltaexp.targets import Site as Site
    from deltaexp.verification import HashCheck as HashCheck
    from deltaexp.visualize import Visualization as Visualization


def __getattr__(name: str) -> Any:
    """Import a public name from its module, or the direct class of a delta type such as ``LoraModel``."""
    if name in _HOMES:
        return getattr(import_module(f"deltaexp.{_HOMES[name]}"), name)
    if name.endswith("Model"):
        return getattr(import_module("deltaexp.model"), name)
    raise AttributeError(f"module 'deltaexp' has no attribute {name!r}")
