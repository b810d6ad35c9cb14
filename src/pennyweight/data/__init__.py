"""Rows of a file become batches of tokens.

`read` and `formats` turn files into conversations, `dataset` mixes and splits them, `chat` renders
them to ids and a mask born together, `prepare` does all of it for a run and keeps the ledger,
`batch` packs the result. Nothing is imported here, so that naming one part does not load the rest.
"""
