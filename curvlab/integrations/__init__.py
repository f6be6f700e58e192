"""Training in other people's loops: PyTorch Lightning, the Trainer of Hugging Face, and whatever calls `optimizer.step()`.

`curvlab.integrations.lightning` and `curvlab.integrations.huggingface` import their frameworks, so they are imported by name.
"""

from curvlab.integrations.attaching import attach

__all__ = ["attach"]
