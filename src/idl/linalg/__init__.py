"""Mathematics of tensors: norms, projections, state-matrix operators, Krylov solves; no model."""
