"""Attention over packed rows: one signature, one reference, and the kernels that take its place.

`cudnn` runs on GPUs, `splash` on TPUs; neither ever holds the scores. Both ask more of a row than the
reference does: queries and keys are the same tokens, and those of a segment stand together in the order of
their positions. Rows of `jlora.data` are so; the steps of decoding are not.

Knows nothing of projections, rotary embedding or caches.
"""

from jlora.model.attention.choice import choose
from jlora.model.attention.gpu import cudnn, cudnn_one_segment
from jlora.model.attention.interface import Attention, Places
from jlora.model.attention.plain import reference
from jlora.model.attention.tiles import blocked
from jlora.model.attention.tpu import splash
