"""Eight host devices, no silent rank promotion, the same examples each run.

`JAX_PLATFORMS` chooses another platform than the CPU, `--hypothesis-profile
long` draws twenty times as many examples, others each run.
"""

import os

import hypothesis
import jax

jax.config.update('jax_platforms', os.environ.get('JAX_PLATFORMS') or 'cpu')
jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_rank_promotion', 'raise')
hypothesis.settings.register_profile(
  'normkit', derandomize=True, deadline=None, max_examples=10
)
hypothesis.settings.register_profile('long', deadline=None, max_examples=200)
hypothesis.settings.load_profile('normkit')
