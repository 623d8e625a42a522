"""Tools for whole models: what people do to norms after and before training."""
