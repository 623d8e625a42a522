"""Recurrent cells whose summed inputs are normalized, as pure functions.

Ba, Kiros and Hinton, "Layer Normalization" (2016), and Cooijmans, Ballas,
Laurent, Gülçehre and Courville, "Recurrent Batch Normalization" (2017).

A cell takes a carry and the input of one time step. The gates lie side by side
in the columns of its kernels, in the order of Flax: input, forget, candidate,
output in the LSTM; reset, update, candidate in the GRU. The Flax cells are in
`normkit.linen` and `normkit.nnx`.
"""

from normkit.recurrent.batch_norm import (
  BatchNormLSTMCarry,
  BatchNormLSTMState,
  batch_norm_lstm,
  init_batch_norm_lstm,
)
from normkit.recurrent.cells import CellParams
from normkit.recurrent.layer_norm import layer_norm_gru, layer_norm_lstm

__all__ = [
  'BatchNormLSTMCarry',
  'BatchNormLSTMState',
  'CellParams',
  'batch_norm_lstm',
  'init_batch_norm_lstm',
  'layer_norm_gru',
  'layer_norm_lstm',
]
