"""Where an answer comes from: saliency and attention by kind of token; how alike speech and text are in the LLM."""
