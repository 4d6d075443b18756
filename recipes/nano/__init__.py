"""How the nano base models under `assets/nano` were trained."""
