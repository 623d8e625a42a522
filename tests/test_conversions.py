"""Small public models, as `python -m benchmarks conversions` takes large ones.

Weights are at random: converted into a twin, given back, compared layer by
layer, folded.
"""

import pytest

from benchmarks import conversions

WHY = "models as published: pip install 'normkit[peers]'"
BASIC = {'layers': (1, 1, 1, 1), 'size': 32}
SMALL = {  # options, and how many layers there are
  'timm resnet18': (BASIC, 25),
  'timm convnext_atto': (
    {'depths': (1, 1, 1, 1), 'widths': (8, 16, 24, 32), 'size': 32},
    26,
  ),
  'timm vit_tiny_patch16': ({'width': 24, 'depth': 1, 'size': 32}, 9),
  'transformers ViTModel': ({'width': 16, 'depth': 1}, 10),
  'transformers BertModel': ({'width': 16, 'depth': 1}, 13),
  'haiku ResNet18': (BASIC, None),
  'haiku MobileNetV1': (
    {'widths': (16, 32), 'strides': (1, 2), 'size': 32},
    None,
  ),
}


@pytest.mark.second_tier
@pytest.mark.parametrize('name', SMALL)
def test_model_in_flax(name):
  library, _ = name.split()
  pytest.importorskip(library, reason=WHY, exc_type=ImportError)
  options, layers = SMALL[name]
  found = conversions.MODELS[name](**options)
  assert conversions.is_right(found), found.compared or found
  assert found.back
  if layers:
    assert len(found.compared.layers) == layers + 1  # and the outputs
    assert found.compared.unseen == ()
  if found.folded and 'et' in name:  # of batch norms none is left
    norms = [row for row in found.folded.rows if 'own input' not in row.reason]
    assert norms and all(row.layer for row in norms)


@pytest.mark.parametrize(
  ('change', 'is_right'),
  [
    ({}, True),
    ({'error': 1e-3}, False),
    ({'error': float('nan')}, False),
    ({'back': False}, False),
  ],
)
def test_what_is_right(change, is_right):
  values = {'error': 1e-6, 'back': True, 'compared': None, 'folded': None}
  found = conversions.Converted(**values | change)
  assert conversions.is_right(found) is is_right


def test_the_table(monkeypatch, tmp_path, capsys):
  def model():
    return conversions.Converted(2e-7, True, None, None)

  page = tmp_path / 'page.md'
  page.write_text('<!-- conversions -->\n<!-- /conversions -->\n')
  monkeypatch.setitem(conversions.MODELS, 'keras MobileNet', model)
  from benchmarks.__main__ import main  # noqa: PLC0415

  argv = ['conversions', '--model', 'keras MobileNet', '--update', str(page)]
  monkeypatch.setattr('sys.argv', ['benchmarks', *argv])
  assert main() == 0
  assert '| keras MobileNet | 2e-07 | yes | - | - | - | - |' in page.read_text()
