"""Statistics of verdicts: rules of decision, evidence of the seeds, correction for many claims and several looks."""
