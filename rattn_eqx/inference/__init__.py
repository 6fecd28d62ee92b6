"""From a trained model to text, and what a model costs."""
