"""The detector: a DETR whose every design choice is a toggle.

Knows nothing of studies, Ray, MLflow or Streamlit. `core.config`, `core.events`, `core.metrics` and
`core.numerics` are leaves that load without torch.
"""
