"""How good a model is: text, recall, and what each branch contributes."""
