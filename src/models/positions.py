"""The cross-attention position table of legacy readers.

Shapes: B questions, S real tokens of a question's passages, T tokens of an answer, H heads.
"""

import math

import torch
from torch import nn
from transformers import T5Config


class CrossAttentionPositions(nn.Module):
    """Adds the position table of legacy readers to the decoder's cross-attention scores.

    The distance is between a token's position in the decoder's sequence and a key's position in
    the concatenated, padded passages. Keys after the query, nearly all of them, share bucket 0, so
    the table distinguishes tokens of the first passage only, and only late in an answer.
    """

    def __init__(self, config: T5Config):
        super().__init__()
        self.n_buckets = config.relative_attention_num_buckets
        self.max_distance = config.relative_attention_max_distance
        self.table = nn.Embedding(self.n_buckets, config.num_heads)

    def forward(self, query_positions: torch.Tensor, key_positions: torch.Tensor) -> torch.Tensor:
        """Positions [T] and [B, S] -> the bias of the scores, [B, H, T, S]."""
        distance = (query_positions[None, :, None] - key_positions[:, None, :]).clamp(min=0)
        half = self.n_buckets // 2  # exact buckets for small distances, logarithmic ones beyond
        ratio = torch.log(distance.clamp(min=1).float() / half)
        ratio = ratio / math.log(self.max_distance / half) * (self.n_buckets - half)
        large = half + ratio.long()
        bucket = torch.where(distance < half, distance, large.clamp(max=self.n_buckets - 1))
        return self.table(bucket).permute(0, 3, 1, 2)
