"""The network of a learned reference value, V(s): a critic without actions, with an encoder of its own for images.

Axes: `B` batch, `H` hidden width.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rllib_calql.networks.actor_critic import ACTIVATIONS, apply_hidden, apply_linear, initialise
from rllib_calql.networks.image_encoder import ImageEncoder, Trunk
from rllib_calql.networks.model_settings import has_layer_norm


class ValueNetwork(nn.Module):
    """V(s), of the critics' widths, activation and layer norm.

    It shares no parameter with critics or policy, so that no loss but its own moves it.

    Args:
        obs_dim: Size of an observation, or of the features of an image.
        settings: The module's `model_config`.
        image_shape: Height, width and channels, if observations are images.
    """

    def __init__(self, obs_dim: int, settings: Mapping[str, Any], *, image_shape: Sequence[int] | None = None) -> None:
        super().__init__()
        self.product_dtype: torch.dtype | None = None  # Of hidden layers; None is that of the parameters.
        is_orthogonal = settings["orthogonal_init"]
        self.encoder: ImageEncoder | None = None
        if image_shape is not None:
            self.encoder = ImageEncoder(image_shape, settings["conv_filters"], orthogonal_init=is_orthogonal)
            self.trunk = Trunk(self.encoder.size, obs_dim)
        self._activation = ACTIVATIONS[settings["activation"]]
        widths = [obs_dim, *settings["critic_hiddens"]]
        self.layers = nn.ModuleList(nn.Linear(n_in, n_out) for n_in, n_out in itertools.pairwise(widths))
        has_norms = has_layer_norm(settings, "critic")
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in widths[1:]) if has_norms else None
        self.head = nn.Linear(widths[-1], 1)
        for layer in [*self.layers, self.head]:
            initialise(layer.weight.data.T, layer.bias.data, orthogonal=is_orthogonal, is_output=layer is self.head)

    def set_product_dtype(self, dtype: torch.dtype | None) -> None:
        """Sets the type of the hidden layers' products, those of the encoder included."""
        self.product_dtype = dtype
        if self.encoder is not None:
            self.encoder.product_dtype = dtype

    def forward(self, obs: Tensor) -> Tensor:
        """V of B states, shape (B,).

        Args:
            obs: Normalised observations, shape (B, obs_dim), or images, shape (B, height, width, channels) or flat.
        """
        hidden = obs if self.encoder is None else self.trunk(self.encoder(obs))
        dtype = hidden.dtype
        hidden = apply_hidden(hidden, self.layers, self.norms, self._activation, self.product_dtype)
        return apply_linear(self.head, hidden, dtype)[:, 0]
