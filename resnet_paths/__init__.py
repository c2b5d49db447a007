"""Residual networks as ensembles of paths (Veit, Wilber and Belongie 2016).

    import resnet_paths as rp

    chain = rp.unravel(model, example_inputs)      # a residual network as a chain of blocks
    rp.path_histogram(chain)                       # its 2^n paths by length, exactly
    rp.delete_block(chain, "layer2.0")             # a new network that shares every weight
    rp.lesion_study(chain, loader, rp.single_deletions(chain))

The public names are listed in ``__init__.pyi``. Each is loaded when it is first used, so that ``import resnet_paths``
adds little to the time of importing torch.
"""

import lazy_loader

__version__ = "0.2.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
