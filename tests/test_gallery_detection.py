"""The detection example: its scenes, its score by hand, and a small run."""

import re

import chex
import jax
import numpy as np
import pytest

from normkit.tools.freeze import assert_frozen


@pytest.fixture(scope='module')
def detection(example):
  return example('detection')


@pytest.fixture(scope='module')
def parts(detection):
  return detection.load_parts(detection.data.digits())


@pytest.fixture(scope='module')
def scenes(detection, parts):
  return detection.compose(parts[0], 40, detection.CANVAS, detection.MOST, 2)


@pytest.mark.second_tier
def test_scenes_repeat_and_their_boxes_hold_ink(detection, parts, scenes):
  again = detection.compose(parts[0], 40, detection.CANVAS, detection.MOST, 2)
  chex.assert_trees_all_equal(scenes, again)
  assert scenes.images.min() >= 0 and scenes.images.max() <= 1
  assert set((scenes.labels >= 0).sum(1)) == {1, 2, 3}
  # Another seed lays other scenes out, also where the parts are others.
  others = detection.compose(parts[1], 40, detection.CANVAS, detection.MOST, 3)
  alike = (others.boxes == scenes.boxes).all((1, 2))
  assert alike.mean() < 0.2
  for image, boxes, labels in zip(*scenes, strict=True):
    covered = np.zeros(image.shape[:2], int)
    for top, left, bottom, right in boxes[labels >= 0].astype(int):
      # Backgrounds are no lighter than a half.
      assert image[top:bottom, left:right].max() > 0.9
      covered[top:bottom, left:right] += 1
    assert covered.max() == 1


def test_no_background_is_in_training_and_test(parts):
  train, test = ({a.tobytes() for a in p.backgrounds} for p in parts)
  assert (len(parts[0].backgrounds), len(parts[1].backgrounds)) == (400, 100)
  # Plain black blocks are in both sets, and hardly anything else.
  assert len(train & test) <= 1


def answer(detection, scenes):
  """What a detector says that is always right, and sure of it."""
  targets = detection.encode(scenes)
  n, cells, _ = targets.present.shape
  y = np.zeros((n, cells, cells, 15), np.float32)
  y[..., 0] = np.where(targets.present, 20, -20)
  y[..., 1:11] = 20 * np.eye(10)[targets.labels]
  y[..., 11:] = targets.boxes
  return y


def test_what_is_encoded_is_decoded(detection, scenes):
  found = detection.decode(answer(detection, scenes))
  wanted = sorted(
    (scene, label, *box)
    for scene, (boxes, labels) in enumerate(zip(*scenes[1:], strict=True))
    for box, label in zip(boxes, labels, strict=True)
    if label >= 0
  )
  rows = zip(found.scenes, found.labels, found.boxes, strict=True)
  rows = sorted((scene, label, *box) for scene, label, box in rows)
  np.testing.assert_allclose(rows, wanted, atol=1e-4)
  assert detection.mean_average_precision(found, scenes) == 100


def test_overlap_is_that_of_pixels(detection):
  rng = np.random.default_rng(0)
  low = rng.integers(0, 10, (20, 2))
  boxes = np.concatenate([low, low + rng.integers(1, 8, (20, 2))], -1)
  masks = np.zeros((20, 18, 18), bool)
  for mask, (top, left, bottom, right) in zip(masks, boxes, strict=True):
    mask[top:bottom, left:right] = True
  wanted = [(masks[0] & m).sum() / (masks[0] | m).sum() for m in masks]
  np.testing.assert_allclose(detection.overlap(boxes[0], boxes), wanted)


def test_the_worse_of_two_that_overlap_goes(detection):
  boxes = np.array([[0, 0, 8, 8], [0, 1, 8, 9], [0, 0, 8, 8], [9, 9, 12, 12]])
  found = detection.Found(
    np.array([0, 0, 0, 0]),
    np.array([3, 3, 4, 3]),
    np.array([0.4, 0.9, 0.5, 0.2]),
    boxes,
  )
  kept = detection.suppress(found)
  np.testing.assert_array_equal(kept.scores, [0.9, 0.5, 0.2])
  np.testing.assert_array_equal(kept.labels, [3, 4, 3])


def test_average_precision_by_hand(detection):
  """Two digits: one found twice and missed once, the other never."""
  box, far = [0, 0, 10, 10], [20, 20, 30, 30]
  scenes = detection.Scenes(
    np.zeros((2, 48, 48, 1)),
    np.array([[box, far], [box, box]]),
    np.array([[3, 3], [3, 5]])[:, :2],
  )
  found = detection.Found(
    np.array([0, 0, 1, 0, 1]),
    np.array([3, 3, 3, 3, 7]),
    np.array([0.9, 0.8, 0.7, 0.6, 0.5]),
    # right; the same again; half too far; right; no such digit
    np.array([box, box, [0, 6, 10, 16], far, box]),
  )
  # Hits: yes, no, no, yes; precision 1 and 2/4 at recalls of 1/3 and 2/3.
  wanted = 100 * np.mean([(1 + 0.5) / 3, 0])
  score = detection.mean_average_precision(found, scenes)
  assert score == pytest.approx(wanted)


def test_precision_is_made_to_fall(detection):
  """Misses before a hit count no more than what comes after it."""
  boxes = np.array([[[i, 0, i + 9, 9] for i in (0, 10, 20)]])
  scenes = detection.Scenes(
    np.zeros((1, 48, 48, 1)), boxes, np.array([[2, 2, 2]])
  )
  away = [30, 30, 40, 40]
  found = detection.Found(
    np.zeros(4, int),
    np.full(4, 2),
    np.array([0.9, 0.8, 0.7, 0.6]),
    np.array([away, *boxes[0]]),
  )
  # Precision 0, 1/2, 2/3, 3/4: at every recall 3/4 is reached later.
  assert detection.mean_average_precision(found, scenes) == pytest.approx(75)


def test_loss_is_that_of_numpy(detection, scenes):
  y = np.random.default_rng(0).normal(size=(40, 6, 6, 15))
  targets = detection.encode(scenes)
  present = targets.present.astype(bool)
  presence = np.log1p(np.exp(np.where(present, -1, 1) * y[..., 0]))
  logits = y[..., 1:11]
  named = np.take_along_axis(logits, targets.labels[..., None], -1)[..., 0]
  label = np.log(np.exp(logits).sum(-1)) - named
  off = abs(y[..., 11:] - targets.boxes)
  box = np.where(off < 0.2, off**2 / 2, 0.2 * (off - 0.1)).sum(-1)
  wanted = (presence + present * (label + 4 * box)).sum() / 40
  found = jax.jit(detection.detection_loss)(np.float32(y), targets)
  chex.assert_trees_all_close(found, wanted, rtol=1e-5)


@pytest.mark.second_tier
def test_simulated_devices_are_those_of_pmap(detection, scenes):
  """Outputs and statistics, pooled over the devices and not."""
  images = scenes.images[:16].reshape(8, 2, *scenes.images.shape[1:])
  for name in ('batch', 'synchronized'):
    backbone = detection.Backbone(detection.DETECTORS[name].norm)
    variables = detection.training.initial(
      backbone, jax.random.key(0, impl='rbg'), images[0]
    )

    def apply(images, backbone=backbone, variables=variables):
      return backbone.apply(
        variables, images, train=True, mutable=['batch_stats']
      )

    simulated = jax.jit(jax.vmap(apply, axis_name=detection.AXIS))(images)
    real = jax.pmap(apply, axis_name=detection.AXIS)(images)
    chex.assert_trees_all_close(simulated, real, rtol=1e-4, atol=1e-4)
    means = np.asarray(real[1]['batch_stats']['conv1']['norm']['mean'])
    spread = np.ptp(means, axis=0).max()
    assert (spread < 1e-6) == (name == 'synchronized')


@pytest.mark.second_tier
def test_frozen_is_the_backbone_alone(detection, scenes):
  model = detection.FROZEN
  images = scenes.images[:16].reshape(8, 2, *scenes.images.shape[1:])
  targets = jax.tree.map(
    lambda a: a[:16].reshape(8, 2, *a.shape[1:]), detection.encode(scenes)
  )
  optimizer = detection.make_optimizer(model, scenes.images, 10)
  before = detection.training.init(model, optimizer, scenes.images, 0)
  after = detection.step(model, optimizer, before, images, targets)
  assert_frozen(before.variables, after.variables, 'backbone/*')
  moved = jax.tree.map(
    lambda a, b: not np.array_equal(a, b), before.params, after.params
  )
  assert moved['backbone']['conv1']['conv']['kernel']
  assert all(jax.tree.leaves(moved['head']))


@pytest.mark.second_tier
def test_runs_small(detection, run_small):
  out = run_small(detection, 'detection', 'detection_scenes')
  number = r'([\d.]+)'
  rows = re.findall(
    rf'(batch|frozen) +\S +{number} ± {number} \S +{number} to {number}', out
  )
  assert [row[0] for row in rows] == ['batch', 'frozen']
  for _, mean, _, low, high in rows:
    assert 0 <= float(low) <= float(mean) <= float(high) <= 100
  (change,) = re.findall(r'frozen: ([+-][\d.]+) ± [\d.]+ points', out)
  assert np.isfinite(float(change))


@pytest.mark.second_tier
def test_numbers_are_those_of_the_images_given(
  detection, takes_images, digits_folder
):
  takes_images(detection, digits_folder)
