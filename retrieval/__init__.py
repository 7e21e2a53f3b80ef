"""Evaluation: shortlists, their re-ranking by matching, and Recall."""
