"""Alignment of a block's tokens with a frozen vision encoder's (REPA, arXiv 2410.06940; D2C, section 3.3)."""

import torch
from torch import Tensor


def loss(projected: Tensor, vision: Tensor) -> Tensor:
    """L_align an image (N) = - mean over tokens cos(head(h_i), v_i), for N x L x V tokens of both sides."""
    projected, vision = projected.float(), vision.float()
    # Three passes over the tokens; normalising both sides first would take six.
    norms = torch.linalg.vector_norm(projected, dim=-1) * torch.linalg.vector_norm(vision, dim=-1)
    return -(torch.linalg.vecdot(projected, vision) / norms.clamp(min=1e-8)).mean(1)


def default_depth(blocks: int) -> int:
    """The block whose output is aligned: the published 8, or a third of a shallower model."""
    return min(8, -(-blocks // 3))
