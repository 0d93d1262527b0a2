"""The recipe of the two bundled models: tokenizer, training, evaluation, export."""
