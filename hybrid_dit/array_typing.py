"""Array aliases and the one legend of dimension names used in annotations throughout the package.

Dimension names:
    b  batch            n  tokens of the video (queries)     m  keys             l  text tokens
    h  heads            d  width of one head                 c  model width (h * d) or channels
    f  features of a feature map (degree * d)                p  parameter groups / patches
    t  frames           y  rows          x  columns          (pixels or latent cells, as the docstring says)
    B  blocks of the transformer (stacked parameters)
"""

import jax
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int, PyTree, Shaped

Array = jax.Array | np.ndarray  # functions of JAX take both, outside jit too

__all__ = ["Array", "Bool", "DTypeLike", "Float", "Int", "PyTree", "Shaped"]
