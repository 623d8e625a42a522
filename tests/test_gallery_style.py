"""The example of style and contrast: it runs, and its measures are right."""

import re

import chex
import numpy as np
import pytest


@pytest.fixture(scope='module')
def style(example):
  return example('style')


@pytest.fixture
def images():
  return np.random.default_rng(0).uniform(size=(3, 8, 8, 3)).astype(np.float32)


def test_contrast_scales_the_distance_to_the_mean(style, images):
  mean = images.mean((1, 2), keepdims=True, dtype=np.float64)
  changed = style.with_contrast(images, 0.25)
  chex.assert_trees_all_close(changed, mean + 0.25 * (images - mean), atol=1e-6)


def test_distance_is_that_of_means_and_deviations(style, images):
  x, y = np.float64(images), np.float64(2 * images[::-1])
  wanted = 0
  for of in (np.mean, np.std):
    wanted += ((of(x, (1, 2)) - of(y, (1, 2))) ** 2).sum()
  found = style.distance(images, 2 * images[::-1])
  chex.assert_trees_all_close(float(found), wanted, rtol=1e-3)


def test_halves_are_means_of_four_pixels(style):
  photograph = np.arange(5 * 4 * 3, dtype=np.uint8).reshape(5, 4, 3)
  halved = style.halve(photograph)
  assert halved.shape == (2, 2, 3)
  wanted = photograph[2:4, :2].mean((0, 1)) / 255
  chex.assert_trees_all_close(halved[1, 0], wanted, rtol=1e-5)


def test_patches_are_of_the_photographs_named(style, monkeypatch):
  plain = {n: np.full((60, 70, 3), n, np.float32) for n in range(4)}
  monkeypatch.setattr(style, 'photographs', lambda: plain)
  batch = next(style.patches([1, 3], 20, seed=0))
  assert batch.shape == (20, style.PATCH, style.PATCH, 3)
  assert set(np.unique(batch)) == {1, 3}
  assert style.training_names() == [0, 1, 2, 3]


def test_instance_norm_takes_contrast_away(style, images):
  """Exactly, as borders are mirrored, but for epsilon."""
  x = 100 * images
  conv = style.Conv(4, style.NORMS['instance'], 2)
  key = style.jax.random.key(0, impl='rbg')
  variables = conv.init(key, x, train=False)
  apply = style.jax.jit(lambda x: conv.apply(variables, x, train=False))
  full, half = (apply(style.with_contrast(x, c)) for c in (1, 0.5))
  assert np.std(full) > 0.1
  chex.assert_trees_all_close(half, full, atol=1e-4)


@pytest.mark.second_tier
def test_runs_small(style, run_small):
  printed = run_small(
    style,
    'style_contrast',
    'style_contrast_accuracy',
    'style_decoders',
    'style_grid',
  )
  rows = re.findall(r'^│ (batch|instance|none) +│(.+)│$', printed, re.MULTILINE)
  assert [name for name, _ in rows] == 2 * ['batch', 'instance', 'none']
  values = [float(n) for _, row in rows for n in re.findall(r'[\d.]+', row)]
  assert len(values) == 3 * (6 + 2) * 2
  assert np.isfinite(values).all()
  assert (
    len(re.findall(r'^(Holds|Not clear|Does not hold): ', printed, re.M)) == 4
  )


@pytest.mark.second_tier
def test_numbers_are_those_of_the_images_given(
  style, takes_images, photographs_folder
):
  takes_images(style, photographs_folder)
