"""What a monitor takes of the time, and when it tells of instabilities that are planted: `python -m benchmarks.monitor`."""
