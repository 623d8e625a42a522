"""What `jax.checkpoint` may keep of a network with norms."""

from typing import Any

from normkit.centred import STATISTICS


def products_saveable(primitive: Any, *_: Any, **params: Any) -> bool:
  """A policy for `jax.checkpoint`: keep products and statistics, no more.

  What is kept for the backward are the results of matrix products and
  convolutions and the statistics of norms; the output of a norm, and of the
  activation after it, is computed again from the norm's input. Wrap what
  belongs together, the norm, the activation and the layer that takes them: a
  block, or the whole loss.

  Returns:
    Whether JAX may keep what the primitive gives.

  Examples:
    >>> import jax, jax.numpy as jnp, normkit as nk
    >>> def block(x, kernel):
    ...   return x + jax.nn.gelu(nk.layer_norm(x)) @ kernel
    >>> lean = jax.checkpoint(block, policy=nk.products_saveable)
    >>> x, kernel = jnp.ones((4, 8)), jnp.ones((8, 8))
    >>> grads = jax.grad(lambda *a: lean(*a).sum(), (0, 1))(x, kernel)
    >>> grads[1].shape
    (8, 8)
  """
  products = 'dot_general', 'conv_general_dilated'
  return primitive.name in products or params.get('name') == STATISTICS
