"""The frozen results of every analysis: all its measurements and verdicts at small sizes, and the comparison with them.

`python -m tests.frozen` compares, `python -m tests.frozen --store` writes `<analysis>.parquet` and `<analysis>.json` here.
"""
