"""get_nb: an executable companion to "One-Step Diffusion Distillation via Deep Equilibrium Models" (GET, NeurIPS 2023).

The names that others rely on are listed in __init__.pyi and loaded when they are first used:
`import get_nb` itself imports neither torch nor anything else that is slow.
"""

import lazy_loader

__version__ = "0.2.0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
