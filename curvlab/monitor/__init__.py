"""Curvature while a model trains, within a share of the time: quantities, events, writers, a live figure."""

from curvlab.monitor.events import Condition, Event
from curvlab.monitor.figure import LiveFigure
from curvlab.monitor.layers import Alignment, Layers
from curvlab.monitor.quantity import QUANTITIES, Quantity
from curvlab.monitor.run import Measurement, Monitor, QuantityDropped, monitor
from curvlab.monitor.samples import Anisotropy, EffectiveRank, Noise
from curvlab.monitor.sharpness import Edge, Eigenvalues, Trace
from curvlab.monitor.stepping import Stepping
from curvlab.monitor.training import Training
from curvlab.monitor.writers import CSV, MLflow, TensorBoard, Trackio, WandB

__all__ = [
    "CSV",
    "QUANTITIES",
    "Alignment",
    "Anisotropy",
    "Condition",
    "Edge",
    "EffectiveRank",
    "Eigenvalues",
    "Event",
    "Layers",
    "LiveFigure",
    "MLflow",
    "Measurement",
    "Monitor",
    "Noise",
    "Quantity",
    "QuantityDropped",
    "Stepping",
    "TensorBoard",
    "Trace",
    "Trackio",
    "Training",
    "WandB",
    "monitor",
]
