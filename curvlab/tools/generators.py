"""Sources of random numbers, as users hand them over."""

import torch


def check_generator(generator: object) -> None:
    """Refuse what is no generator, such as a seed.

    Raises:
        ValueError: with the generator to make of it.
    """
    if not isinstance(generator, torch.Generator | None):
        made = f"torch.Generator().manual_seed({generator if isinstance(generator, int) else 0})"
        raise ValueError(f"generator is a torch.Generator, such as {made}, got {generator!r}.")


def source_of(generator: torch.Generator | None) -> torch.Generator:
    """Return the generator, one with a fixed seed if None; raises as `check_generator`."""
    check_generator(generator)
    return generator or torch.Generator().manual_seed(0)
