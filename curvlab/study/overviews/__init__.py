"""Several runs side by side: every claim on every problem, one analysis on several problems, and two runs compared."""
