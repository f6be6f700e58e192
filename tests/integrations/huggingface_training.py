"""Trains by the Trainer of Hugging Face on a share of each batch: `torchrun … huggingface_training.py FILE OPTIMISER`."""

import sys

from integration_cases import BATCH, flat
from test_huggingface import trainer
from torchrun import leave

if __name__ == "__main__":
    sys.modules["torchvision"] = None  # does not import beside every build of torch
    import transformers

    from curvlab.integrations import huggingface

    made = trainer(huggingface, transformers, f"{sys.argv[1]}.run", sys.argv[2], per_device_train_batch_size=BATCH // 2)
    made.train()
    leave(flat(made.preconditioner.model), sys.argv[1])
