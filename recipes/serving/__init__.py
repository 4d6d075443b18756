"""An OpenAI-compatible server for an LSM: clips, requests, continuous batches, HTTP."""
