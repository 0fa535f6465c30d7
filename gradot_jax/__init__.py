"""GradOT in JAX: training-free, gradient-preserving offsite-tuning of language models.

The public functional API is listed in `__init__.pyi`. Each name is loaded when it is first used,
so that importing the package costs nothing and the command line answers at once.
"""

import lazy_loader

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
