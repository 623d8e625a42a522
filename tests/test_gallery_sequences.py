"""The sequence example: its text, its loop against NumPy, and a small run."""

import re

import chex
import jax.numpy as jnp
import numpy as np
import pytest


@pytest.fixture(scope='module')
def sequences(example):
  return example('sequences')


def test_docstrings_are_found_once_and_not_in_tests(
  sequences, tmp_path, monkeypatch
):
  package = tmp_path / 'somepackage'  # a folder of pytest's: 'test' is above
  (package / 'tests').mkdir(parents=True)
  code = '"""Module."""\ndef f():\n  """Function.\n\n  More.\n  """\n'
  (package / '__init__.py').write_text('"""Module."""\n')
  (package / 'a.py').write_text(code)
  (package / 'tests' / 'test_a.py').write_text('"""Not this."""\n')
  monkeypatch.syspath_prepend(tmp_path)
  found = sequences.docstrings('somepackage', 10)
  assert found == ['Function.\n\nMore.', 'Module.']


def test_words_are_of_the_first_paragraph_without_names(sequences):
  text = 'Returns an array,\nas numpy.array does.\n\nNot this.'
  words = ('returns', 'an', 'array', 'as', 'array', 'does')
  assert sequences.to_words(text) == words


def test_sentences_are_of_one_package_and_in_one_set(sequences):
  texts = [
    [f'shared sentence number {"x" * n}' for n in range(1, 6)]
    + [f'package{"abc"[i]} has sentence {"y" * n}' for n in range(1, 21)]
    + ['too short', 'a ' * 21]
    for i in range(3)
  ]
  train, test = sequences.classify_data(texts, 10)
  np.testing.assert_array_equal(np.bincount(train.labels), [8, 8, 8])
  np.testing.assert_array_equal(np.bincount(test.labels), [2, 2, 2])
  assert (train.lengths == 4).all() and (test.lengths == 4).all()
  for part in (train, test):
    known = part.words[:, :4] > 0
    assert known.all() and not part.words[:, 4:].any()
  # The first three words tell the package, the last is another in each.
  assert len({tuple(words) for words in train.words}) == 24
  heads = {
    (tuple(words[:3]), label)
    for words, label in zip(train.words, train.labels, strict=True)
  }
  assert len(heads) == 3


def test_characters_are_those_of_the_texts(sequences):
  codes = sequences.characters([['ab\n~ é'], ['ab\n~ é']])
  np.testing.assert_array_equal(codes, [66, 67, 0, 95, 1])


def test_entropy_and_bits(sequences):
  assert sequences.entropy(np.repeat([3, 5], [3, 1])) == pytest.approx(
    -(0.75 * np.log2(0.75) + 0.25 * np.log2(0.25))
  )
  losses = np.array([np.log(2), np.nan, np.inf, 100.0])
  worst = np.log2(96)
  np.testing.assert_allclose(sequences.bits(losses), [1, worst, worst, worst])


def test_windows_are_pieces_of_the_text(sequences):
  text = np.arange(100)
  x = sequences.windows(text, np.array([0, 7]))
  np.testing.assert_array_equal(x[1], text[7 : 7 + sequences.LENGTH + 1])
  assert x.shape == (2, sequences.LENGTH + 1)


def test_runs_side_by_side_are_those_of_adam_in_numpy(sequences):
  """A parabola for each run, with its own rates and batches."""
  rng = np.random.default_rng(0)
  runs, rounds, steps = 2, 2, 3
  start = rng.normal(size=(runs, 4))
  batches = rng.normal(size=(runs, rounds, steps, 4))
  rates = rng.uniform(0.1, 0.3, (runs, rounds, steps))

  def loss(variables, batch):
    x = variables['params']
    return ((x - batch) ** 2).sum(), {'sum': x.sum()}

  variables = {'params': start, 'batch_stats': {'sum': np.zeros(runs)}}
  found, tests = sequences.train(
    loss,
    lambda variables: variables['params'],
    variables,
    jnp.asarray(batches),
    jnp.asarray(rates),
  )
  wanted, tested = start.copy(), []
  for run in range(runs):
    x, mean, square = wanted[run], np.zeros(4), np.zeros(4)
    for count in range(1, rounds * steps + 1):
      index = (run, *divmod(count - 1, steps))
      last = x.sum()
      gradient = 2 * (x - batches[index])
      mean = 0.9 * mean + 0.1 * gradient
      square = 0.999 * square + 0.001 * gradient**2
      unbiased = np.sqrt(square / (1 - 0.999**count))
      x -= rates[index] * mean / (1 - 0.9**count) / (unbiased + 1e-8)
      if count % steps == 0:
        tested.append(x.copy())
    chex.assert_trees_all_close(
      found['batch_stats']['sum'][run], last, rtol=1e-4, atol=1e-5
    )
  chex.assert_trees_all_close(found['params'], wanted, rtol=1e-4, atol=1e-5)
  tested = np.reshape(tested, (runs, rounds, 4))
  chex.assert_trees_all_close(tests, tested, rtol=1e-4, atol=1e-5)


@pytest.mark.second_tier
def test_padding_moves_nothing_without_a_norm(sequences):
  setting = sequences.SMALL
  texts = [sequences.docstrings(p, setting.files) for p in sequences.PACKAGES]
  sets = sequences.classify_data(texts, setting.sentences)
  run = sequences.classify('none', *sets, setting)
  accuracies = sequences.accuracies(run)
  assert (accuracies >= 0).all() and (accuracies <= 100).all()
  np.testing.assert_array_equal(run.shift.round(1), 0)


@pytest.mark.second_tier
def test_runs_small(sequences, run_small):
  out = run_small(
    sequences, 'sequences_lstm', 'sequences_transformer', 'sequences_gradients'
  )
  number = r'([\d.]+)'
  rows = re.findall(
    rf'(batch|batch, no mask) +\S +{number} ± .* {number} \S\n', out
  )
  assert [name for name, *_ in rows] == ['batch', 'batch, no mask']
  assert all(0 <= float(accuracy) <= 100 for _, accuracy, _ in rows)
  # With a mask the padding moves nothing.
  moved = [float(points) for *_, points in rows]
  assert moved[0] == 0 and moved[1] > 0
  (losses,) = re.findall(
    rf'layer +\S both +\S +{number} ± \S+ \S +{number} ±', out
  )
  assert all(np.isfinite(float(loss)) for loss in losses)
  (best,) = re.findall(rf'both: best {number} bits', out)
  assert 0 < float(best) <= 6.59  # of 96 characters
