"""Array aliases and the one legend of dimension names used in annotations throughout the package.

Dimension names:
    b  batch            n  tokens of the video (queries)     m  keys             l  text tokens
    h  heads            d  width of one head                 c  model width (h * d) or channels
    f  features of a feature map (degree * d)                p  parameter groups / patches
    t  frames           y  rows          x  columns          (pixels or latent cells, as the docstring says)
    B  blocks of the transformer (stacked parameters)
"""

from jaxtyping import Array, Bool, Float, Int, PyTree, Shaped

__all__ = ["Array", "Bool", "Float", "Int", "PyTree", "Shaped"]
