"""The ledger against memory and speed that other people measured on their GPUs and published.

`rows` has what they published, and how they say they measured it. `environment` installs their versions of transformers
and PEFT, `stack` rebuilds what is not Python in their stack, `count` counts one step of it with common.plan.ledger, in
a process of its own. `python -m benchmarks.published` does all of it; `report` makes the tables of docs/published.md.
"""
