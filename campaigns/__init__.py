"""Campaigns: the promises of docs/reliability.md, each tried as often as it says.

`scripts/campaign list` names them, `scripts/campaign NAME` runs one and replaces its row in
`benchmarks/results/reliability.md`. A short form of each stands in the tests.
"""
