"""The commands of `python -m pallas`, and what they share; no op imports them."""
