"""What answers depend on: saliency and attention by kind of token, and the similarity of speech and text in the LLM."""
