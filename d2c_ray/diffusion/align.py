"""Alignment of a block's tokens with a frozen vision encoder's (REPA, arXiv 2410.06940; D2C, section 3.3)."""

import torch.nn.functional as F
from torch import Tensor


def loss(projected: Tensor, vision: Tensor) -> Tensor:
    """L_align an image (N) = - mean over tokens cos(head(h_i), v_i), for N x L x V tokens of both sides."""
    return -F.cosine_similarity(projected.float(), vision.float(), dim=-1).mean(1)


def default_depth(blocks: int) -> int:
    """The block whose output is aligned: the published 8, or a third of a shallower model."""
    return min(8, -(-blocks // 3))
