"""Measurements of the whole: against published figures, and beside a peer in the same run."""
