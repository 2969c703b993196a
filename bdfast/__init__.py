"""Find and remove backdoors in trained PyTorch networks, from a small clean set, fast.

result = bdfast.purify(model, clean)
metrics = bdfast.evaluate(result.model, test, triggered)
"""

import lazy_loader

from bdfast._version import __version__ as __version__

# The public names stand in `__init__.pyi`. Each is loaded at first use, so that `import bdfast` costs no more than
# `import torch`.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
