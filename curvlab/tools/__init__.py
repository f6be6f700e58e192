"""Helpers that know nothing of curvature: text for people, progress, files that are whole or not there, free memory."""
