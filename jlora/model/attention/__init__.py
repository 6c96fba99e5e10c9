"""Attention over packed rows: one signature, one reference, and the kernels that take its place.

`cudnn` runs on GPUs, `splash` on TPUs; neither ever holds the scores. Both ask more of a row than the
reference does: queries and keys are the same tokens, and those of a segment stand together in the order of
their positions. Rows of `jlora.data` are so; the steps of decoding are not.

Knows nothing of projections, rotary embedding or caches.
"""

from jlora.attention.choice import choose
from jlora.attention.gpu import cudnn, cudnn_one_segment
from jlora.attention.interface import Attention
from jlora.attention.plain import reference
from jlora.attention.tiles import blocked
from jlora.attention.tpu import splash

__all__ = ["Attention", "blocked", "choose", "cudnn", "cudnn_one_segment", "reference", "splash"]
