"""What the recipes share: loading, adapters, activation checkpointing, data, training.

Importing this package sets environment variables for the whole process, before torch is imported: process_state.py.
"""

from pathlib import Path

from common.process_state import set_environment

REPOSITORY = Path(__file__).parent.parent  # with models/, data/ and recipes/ in it

set_environment()
